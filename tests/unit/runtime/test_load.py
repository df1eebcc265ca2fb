"""Settings: precedence, origins, and the words of every way to get one wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime import describe
from services.runtime.load import Given, SettingsError, known, load, parse_flag, variable
from services.runtime.settings import CoordinatorProcess, FrontendProcess, WorkerProcess


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "tandem.toml"
        path.write_text(text)
        return path

    return write


def failure(process, file=None, env=(), flags=()) -> str:
    with pytest.raises(SettingsError) as caught:
        load(process, file, dict(env), list(flags))
    return str(caught.value)


def test_defaults_are_each_process_own():
    assert load(FrontendProcess, None, {})[0].server.port == 7400
    assert load(CoordinatorProcess, None, {})[0].server.port == 7450
    settings, origins = load(WorkerProcess, None, {})
    assert settings == WorkerProcess()
    assert set(origins.values()) == {"default"}


def test_each_layer_wins_over_the_one_before(file):
    path = file("[engine]\nthreads = 1\nchunk_tokens = 11\nmax_running = 5\n")
    env = {"TANDEM_ENGINE__THREADS": "2", "TANDEM_ENGINE__CHUNK_TOKENS": "12"}
    flags = [parse_flag("engine.threads=3"), Given("engine.threads", 4, "--threads")]
    settings, origins = load(WorkerProcess, path, env, flags)
    assert (settings.engine.threads, settings.engine.chunk_tokens) == (4, 12)
    assert settings.engine.max_running == 5
    assert origins["engine.threads"] == "--threads"
    assert origins["engine.chunk_tokens"] == "environment TANDEM_ENGINE__CHUNK_TOKENS"
    assert origins["engine.max_running"] == f"file {path}"
    assert origins["engine.block_tokens"] == "default"


def test_a_section_that_is_partly_given_keeps_the_process_own_defaults(file):
    settings, _ = load(FrontendProcess, file("[server]\nhost = 'localhost'"), {})
    assert (settings.server.host, settings.server.port) == ("localhost", 7400)


def test_what_other_processes_read_is_passed_over(file):
    path = file("[engine]\nthreads = 3\n[coordinator]\nqueue_limit = 9\n")
    settings, origins = load(CoordinatorProcess, path, {"TANDEM_KV__TRANSPORTS": "tcp"})
    assert settings.coordinator.queue_limit == 9
    assert "engine.threads" not in origins


@pytest.mark.parametrize("text", ["tcp", "tcp,shm", " shm , tcp "])
def test_lists_from_text(text):
    settings, _ = load(WorkerProcess, None, {"TANDEM_KV__TRANSPORTS": text})
    assert list(settings.kv.transports) == [part.strip() for part in text.split(",")]


def test_lists_from_toml(file):
    settings, _ = load(WorkerProcess, file('[kv]\ntransports = ["tcp"]'), {})
    assert settings.kv.transports == ("tcp",)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("engine.threads", "-1", "a whole number at least 0"),
        ("engine.threads", "two", "a whole number at least 0"),
        ("engine.threads", "1.5", "a whole number at least 0"),
        ("engine.block_tokens", "2000", "a whole number from 1 to 1024"),
        ("engine.kind", "tensorrt", "one of: torch, scripted"),
        ("engine.batch_invariant", "maybe", "true or false"),
        ("kv.transports", "", "a list (at least 1) of: shm, nixl, ucx, tcp"),
        ("kv.transports", "carrier-pigeon", "a list (at least 1) of: shm, nixl, ucx, tcp"),
        ("kv.export_regions", "eu=us", "a list of texts"),
        ("kv.tenant_regions", "bank", "tenant=region+region"),
        ("kv.lease_seconds", "0", "a number from 0.1 to 86400"),
        ("kv.lease_seconds", "inf", "a number from 0.1 to 86400"),
        ("kv.lease_seconds", "nan", "a number from 0.1 to 86400"),
    ],
)
@pytest.mark.parametrize("where", ["environment", "flag"])
def test_a_bad_value_names_key_value_origin_and_what_is_allowed(key, value, expected, where):
    if where == "flag":
        said = failure(WorkerProcess, flags=[parse_flag(f"{key}={value}")])
        assert f"--set {key}={value}" in said
    else:
        said = failure(WorkerProcess, env={variable(key): value})
        assert f"environment {variable(key)}" in said
    assert key in said
    assert repr(value) in said
    assert expected in said


@pytest.mark.parametrize("value", ["true", '"many"', "[1]", "{ a = 1 }", "2026-01-01", "-1"])
def test_a_bad_value_in_a_file(file, value):
    path = file(f"[engine]\nthreads = {value}\n")
    said = failure(WorkerProcess, path)
    assert "engine.threads" in said
    assert str(path) in said


def test_unknown_things_name_themselves_and_what_may_have_been_meant(file):
    said = failure(WorkerProcess, env={"TANDEM_ENGINE_THREADS": "3"})
    assert "TANDEM_ENGINE_THREADS=3" in said
    assert "did you mean TANDEM_ENGINE__THREADS?" in said
    said = failure(FrontendProcess, flags=[parse_flag("engine.thread=3")])
    assert "unknown setting engine.thread = 3 (--set engine.thread=3)" in said
    assert "did you mean engine.threads?" in said
    path = file("[engin]\nthreads = 3")
    said = failure(WorkerProcess, path)
    assert f"file {path}" in said
    assert "did you mean engine.threads?" in said
    assert "sections are: server, log" in failure(WorkerProcess, file("[nonsense]\nx = 1"))
    assert "nonsense" in failure(WorkerProcess, file("[nonsense]"))


def test_files_that_are_none(file, tmp_path):
    assert "No such file" in failure(WorkerProcess, tmp_path / "absent.toml")
    assert "is not TOML" in failure(WorkerProcess, file("[engine"))
    assert "threads = 3" in failure(WorkerProcess, file("threads = 3"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "is not TOML" in failure(WorkerProcess, binary)
    assert "Is a directory" in failure(WorkerProcess, tmp_path)


def test_variables_that_are_not_tandems_are_left_alone():
    load(WorkerProcess, None, {"PATH": "/bin", "TANDEM_CONFIG": "x.toml", "tandem_x": "1"})


def test_flags_need_a_value():
    with pytest.raises(SettingsError, match=r"--set engine.threads: expected section\.key=value"):
        parse_flag("engine.threads")
    assert parse_flag("model.path=/a=b").value == "/a=b"


@given(st.dictionaries(st.sampled_from(sorted(known())), st.text(max_size=12), max_size=4))
def test_any_text_is_a_setting_or_an_error_that_names_a_key(values):
    env = {variable(key): value for key, value in values.items()}
    for process in (CoordinatorProcess, FrontendProcess, WorkerProcess):
        said, origins = None, {}
        try:
            _, origins = load(process, None, env)
        except SettingsError as error:
            said = str(error)
        if said is None:
            given_here = {key for key, origin in origins.items() if origin != "default"}
            assert given_here == values.keys() & origins.keys()
        else:
            assert any(key in said for key in values)


def test_every_default_survives_being_written_and_read_back():
    for process in (CoordinatorProcess, FrontendProcess, WorkerProcess):
        flags = [
            parse_flag(f"{name}.{key}={describe.show(getattr(section, key))}")
            for name, section in describe.sections(process).items()
            for key in describe.fields(section)
        ]
        assert load(process, None, {}, flags)[0] == process()


def test_every_setting_says_what_it_means_and_what_it_takes():
    for key, field in known().items():
        assert field.description, key
        assert field.description.endswith("."), key
        assert describe.allowed(field), key


@pytest.mark.parametrize("name", ["", "prefill-0", "gpu7.rack_3", "10.0.0.1:7451", "0@host"])
def test_a_worker_can_be_called(name):
    env = {"TANDEM_WORKER__NAME": name}
    assert load(WorkerProcess, None, env)[0].worker.name == name


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "/tmp", "../up", "a\n", "a b", "é"])
def test_a_workers_name_is_a_folders(name):
    """It gets its part of the disk tier by it, and must not get another's."""
    assert "worker.name" in failure(WorkerProcess, env={"TANDEM_WORKER__NAME": name})
