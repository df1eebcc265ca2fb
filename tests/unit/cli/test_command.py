"""The command line without a cluster: help, settings, words and exit statuses of failures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cli import flags
from cli.advice import explain
from cli.output import printable
from cli.view import duration, size
from services.runtime.client import CallFailedError
from services.runtime.load import Given

COMMANDS = ("serve", "up", "demo", "generate", "chat", "status", "settings", "version")
NOBODY = "127.0.0.1:1"


def tandem(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=clean | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_names_every_command():
    said = tandem("--help")
    assert said.returncode == 0
    for command in (*COMMANDS, "models", "loadtest"):
        assert command in said.stdout
    assert "Exit status" in said.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    said = tandem(command, "--help")
    assert said.returncode == 0, said.stderr
    assert "Usage: tandem" in said.stdout


def test_settings_prints_values_and_origins(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text("[engine]\nblock_tokens = 8\n")
    said = tandem(
        "settings", "decode", "-c", str(file), "-s", "kv.transports=tcp", TANDEM_ENGINE__THREADS="3"
    ).stdout
    lines = {line.partition(" = ")[0]: line for line in said.splitlines() if " = " in line}
    assert "8" in lines["block_tokens"]
    assert f"from file {file}" in lines["block_tokens"]
    assert "from environment TANDEM_ENGINE__THREADS" in lines["threads"]
    assert "from --set kv.transports=tcp" in lines["transports"]
    assert "from default" in lines["chunk_tokens"]


def test_the_settings_file_of_the_environment(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text("[engine]\nblock_tokens = 8\n")
    assert f"from file {file}" in tandem("settings", "decode", TANDEM_CONFIG=str(file)).stdout


def test_settings_of_a_role_are_told_from_those_of_all():
    sets = ["engine.threads=1", "decode:engine.ranks=2", "frontend.coordinator=h:7450"]
    assert flags.by_role(sets) == ([sets[0], sets[2]], {"decode": {"engine.ranks": "2"}})


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["serve", "decode", "--set", "engine.threads=x"], {}, "engine.threads: 'x'"),
        (["serve", "frontend"], {"TANDEM_SERVER__PORT": "99999"}, "from 0 to 65535"),
        (["serve", "coordinator"], {"TANDEM_SERVRE__PORT": "1"}, "TANDEM_SERVER__PORT"),
        (["up", "--set", "nonsense"], {}, "expected section.key=value"),
        (["up", "--engine", "warp"], {}, "one of: torch, scripted"),
        (["demo", "--config", "absent.toml"], {}, "absent.toml: No such file"),
        (["serve", "gateway"], {}, "gateway"),
        (["up", "--port", "-4"], {}, "--port"),
        (["up", "--set", "coordinator.lease_seconds=0"], {}, "a number above 0"),
        (["up", "--set", "frontend.coordinator=nonsense"], {}, "a list of: host:port"),
        (["up", "--set", "decoding:engine.ranks=2"], {}, "decoding is none of coordinator,"),
        (["up", "--set", "decode:engine.ranks=x"], {}, "(--set decode:engine.ranks=x)"),
        (["generate", "hello", "--regex", os.fsdecode(b"a\xff")], {}, "--regex: expected UTF-8"),
        (["generate", "hello", "--json-schema", "/dev/zero"], {}, "262144 bytes, the most that"),
    ],
)
def test_wrong_flags_and_settings_exit_with_2(arguments, environment, words):
    said = tandem(*arguments, **environment)
    assert said.returncode == 2
    assert words in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(
    "arguments", [["generate", "hi", "-a", NOBODY], ["status", "--coordinator", NOBODY]]
)
def test_nobody_there_exits_with_3(arguments):
    said = tandem(*arguments)
    assert said.returncode == 3
    assert NOBODY in said.stderr
    assert "tandem up" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_process_that_may_not_listen_exits_with_1():
    said = tandem("serve", "coordinator", "--host", "0.0.0.0")
    assert said.returncode == 1
    assert "server.allow_unauthenticated_remote" in said.stderr
    assert "Traceback" not in said.stderr


def test_version():
    assert tandem("version").stdout.startswith("tandem ")


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (None, {}),
        ("smollm2-135m-instruct", {"model.name": "smollm2-135m-instruct"}),
        ("/m/Llama-3", {"model.path": "/m/Llama-3", "model.name": "llama-3"}),
        ("/m/Some.Q8_0.gguf", {"model.path": "/m/Some.Q8_0.gguf", "model.name": "some.q8_0"}),
    ],
)
def test_model_is_a_name_or_a_path(text, settings):
    assert {given.key: given.value for given in flags.model(text)} == settings


def test_a_folder_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert flags.model("mine")[0] == Given("model.path", str(tmp_path / "mine"), "--model")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("127.0.0.1:7400", "127.0.0.1:7450")),
        ({"TANDEM_SERVER__PORT": "1234"}, ("127.0.0.1:1234", "127.0.0.1:7450")),
        ({"TANDEM_SERVER__HOST": "0.0.0.0"}, ("127.0.0.1:7400", "127.0.0.1:7450")),
        (
            {"TANDEM_SERVER__ADVERTISE": "f:1", "TANDEM_FRONTEND__COORDINATOR": "c:2"},
            ("f:1", "c:2"),
        ),
    ],
)
def test_where_clients_look(environment, expected):
    assert flags.addresses(None, environment) == expected


def test_what_a_model_says_can_not_drive_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\nc\td\x9b") == "a[2Jb\nc\td"
    spoken = "日本\u00a0é 👩\u200d🚀"
    assert printable(spoken) == spoken
    assert printable("a\u202eb\udcff\u2066c") == "abc"


def test_advice_follows_a_reason():
    error = CallFailedError("h:1", "UNAVAILABLE", "NO_WORKERS", "no decode worker is up")
    first, second = explain(error).splitlines()
    assert first == "no decode worker is up (NO_WORKERS)"
    assert "Start a worker" in second
    unknown = CallFailedError("h:1", "DATA_LOSS", "", "odd")
    assert explain(unknown) == "odd (DATA_LOSS)"


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB")]
)
def test_sizes(count, words):
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 ms"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (59.999, "60.00 s"),
        (3599.7, "60 min 0 s"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_default_prompt_of_the_demo_is_the_one_it_checks():
    from cli.demo import PROMPT

    said = tandem("demo", "--help").stdout
    assert PROMPT in " ".join(said.replace("│", " ").split())
