"""The load generator against a frontend that follows a script, and against a real cluster."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cli.cluster import LocalCluster
from loadtest import local, session
from loadtest.drive import Ended
from loadtest.errors import ModelError, OptionsError, WarmupError
from loadtest.measures import Slo
from loadtest.options import Load, LoadOptions, Prompts
from loadtest.view import NoView
from services.runtime.client import CallFailedError
from services.runtime.errors import OverloadedError, WorkerLostError
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

SERVICE = "tandem.inference.v1.InferenceService"
LENGTH = generation_pb2.FINISH_REASON_LENGTH


class ScriptedFrontend(inference_pb2_grpc.InferenceServiceServicer):
    """Answers each request by the script that belongs to its prompt's length.

    A script is a list of steps: a number of tokens to send, an exception to raise, an event to
    wait for, or "end" for a last message. Lengths without one get all their tokens and an end.
    """

    def __init__(self):
        self.scripts = {}
        self.requests = []
        self.cancelled = 0
        self._changed = asyncio.Condition()

    async def ListModels(self, request, context):  # noqa: N802
        model = inference_pb2.Model(name="scripted", context_tokens=1000, block_tokens=4)
        return inference_pb2.ListModelsResponse(models=[model])

    async def Generate(self, request, context):  # noqa: N802
        raise NotImplementedError

    async def StreamGenerate(self, request, context):  # noqa: N802
        asked = request.request
        self.requests.append(asked)
        await self._tell()
        wanted = asked.sampling.max_tokens
        sent = 0
        try:
            for step in self.scripts.get(len(asked.tokens.token_ids), [1] * wanted + ["end"]):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif step == "end":
                    yield self.end(asked, sent)
                else:
                    sent += step
                    yield inference_pb2.StreamGenerateResponse(token_ids=[7] * step)
        except asyncio.CancelledError:
            self.cancelled += 1
            await self._tell()
            raise

    async def _tell(self):
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds):
        """Waits for a request or a cancellation that makes `holds()` true."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(holds)

    def end(self, asked, sent):
        kv = generation_pb2.KvReport(
            transport="shm", bytes=1000, seconds=0.01, exposed_seconds=0.002
        )
        attempt = inference_pb2.RouteAttempt(prefill_worker="p", decode_worker="d", kv=kv)
        usage = inference_pb2.Usage(
            prompt_tokens=len(asked.tokens.token_ids), completion_tokens=sent, cached_tokens=2
        )
        return inference_pb2.StreamGenerateResponse(
            finish_reason=LENGTH, usage=usage, route=inference_pb2.Route(attempts=[attempt])
        )


@pytest.fixture
async def frontend():
    servicer = ScriptedFrontend()
    server = Server(ServerSettings(), "frontend")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE)
    servicer.address = await server.start()
    yield servicer
    await server.stop(0)


def options(address, load=None, prompts=None, **more):
    load = load or Load(loop="closed", users=3, requests=12, warmup=0)
    return LoadOptions(address, seed=3, load=load, prompts=prompts or Prompts("8", "5"), **more)


async def go(given, stop=None):
    return await session.run(given, view=NoView(), stop=stop or asyncio.Event())


async def test_counts_and_structure_of_a_closed_run(frontend):
    result = await go(options(frontend.address, slo=Slo(60.0, 60.0), rows=True))
    assert result.ended_by is Ended.REQUESTS
    assert result.model == "scripted"
    numbers = result.numbers
    assert (numbers.counts.ended, numbers.counts.succeeded) == (12, 12)
    assert numbers.counts.errors == {}
    assert numbers.counts.input_tokens == 12 * 8
    assert numbers.counts.output_tokens == 12 * 5
    assert numbers.counts.cached_tokens == 12 * 2
    assert numbers.counts.tokens_per_message == 1.0
    assert numbers.kv.bytes_by_transport == {"shm": 12_000}
    assert numbers.kv.exposed.p50 == pytest.approx(0.002)
    assert numbers.ttft.count == numbers.e2e.count == numbers.tpot.count == 12
    assert numbers.itl.count == 12 * 4
    assert numbers.goodput.share == 1.0
    assert [r.index for r in result.rows] == list(range(12))
    assert [p.name for p in result.processes] == ["loadtest"]
    assert 0 < numbers.ttft.mean <= numbers.e2e.mean


async def test_what_is_sent_is_what_was_asked_for(frontend):
    await go(options(frontend.address, prompts=Prompts("uniform:3:9", "uniform:2:4")))
    for asked in frontend.requests:
        assert asked.model == "scripted"
        assert 3 <= len(asked.tokens.token_ids) <= 9
        assert all(100 <= t < 30_000 for t in asked.tokens.token_ids)
        assert 2 <= asked.sampling.max_tokens <= 4
        assert asked.sampling.ignore_eos
        assert asked.sampling.temperature == 0.0
        assert asked.sampling.HasField("seed")
        assert not asked.sampling.HasField("top_p")
    assert len({tuple(a.tokens.token_ids) for a in frontend.requests}) == 12


async def test_the_same_seed_sends_the_same_again(frontend):
    prompts = Prompts("uniform:3:9", "uniform:2:4")
    sent = []
    for _ in range(2):
        await go(options(frontend.address, prompts=prompts))
        sent.append(sorted(r.SerializeToString() for r in frontend.requests))
        frontend.requests.clear()
    assert sent[0] == sent[1]


async def test_warm_up_is_not_measured_and_asks_other_things(frontend):
    load = Load(users=1, requests=3, warmup=2)
    result = await go(options(frontend.address, load))
    assert result.numbers.counts.ended == 3
    assert len(frontend.requests) == 5
    assert len({tuple(a.tokens.token_ids) for a in frontend.requests}) == 5


async def test_errors_are_counted_by_reason_and_explained(frontend):
    frontend.scripts = {
        1: [OverloadedError("the queue is full", queued=9)],
        2: [2, WorkerLostError("decode-0 is gone")],
        3: [3],
        4: [2, "end"],
        5: [ValueError("a bug")],
    }
    load = Load(users=2, requests=60, warmup=0)
    result = await go(options(frontend.address, load, Prompts("uniform:1:6", "3")))
    counts = result.numbers.counts
    by_length = [len(r.tokens.token_ids) for r in frontend.requests]
    assert counts.errors == {
        "OVERLOADED": by_length.count(1),
        "WORKER_LOST": by_length.count(2),
        "TRUNCATED": by_length.count(3),
        "WRONG_COUNT": by_length.count(4),
        "INTERNAL": by_length.count(5),
    }
    assert counts.succeeded == by_length.count(6) == result.numbers.ttft.count
    assert result.error_examples["OVERLOADED"] == "the queue is full"
    assert "2 tokens came" in result.error_examples["WRONG_COUNT"]


async def test_a_deadline_is_an_error_of_the_request(frontend):
    frontend.scripts = {8: [1, asyncio.Event()]}
    load = Load(users=2, requests=2, warmup=0, timeout_seconds=0.3)
    result = await go(options(frontend.address, load))
    (reason,) = result.numbers.counts.errors
    assert "DEADLINE" in reason
    assert result.numbers.counts.ended == 2


async def test_a_server_that_goes_away_ends_requests_not_the_run(frontend):
    """Nobody listens: every request fails by the transport's own status, and the run ends."""
    server = Server(ServerSettings(), "short")
    short = ScriptedFrontend()
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, short, SERVICE)
    address = await server.start()
    asked = asyncio.Event()
    short.scripts = {8: [1, asked, 4, "end"]}
    run = asyncio.create_task(go(options(address, Load(users=2, requests=6, warmup=0))))
    await short.until(lambda: len(short.requests) == 2)
    await server.stop(0)
    result = await run
    assert result.numbers.counts.succeeded == 0
    assert sum(result.numbers.counts.errors.values()) == 6
    assert all(reason.startswith("RPC_") for reason in result.numbers.counts.errors)


async def test_an_open_run_counts_tokens_of_each_message(frontend):
    frontend.scripts = {8: [1, 2, 2, "end"]}
    load = Load(loop="open", rate=200.0, requests=10, warmup=0)
    result = await go(options(frontend.address, load))
    assert result.numbers.counts.succeeded == 10
    assert result.numbers.itl.count == 20
    assert result.numbers.counts.tokens_per_message == pytest.approx(5 / 3)
    assert result.numbers.lateness.count == 10


async def test_stopping_reports_what_there_is_and_cancels_the_rest(frontend):
    held, stop = asyncio.Event(), asyncio.Event()
    frontend.scripts = {8: [1, held, 4, "end"]}
    run = asyncio.create_task(go(options(frontend.address), stop))
    await frontend.until(lambda: len(frontend.requests) == 3)
    stop.set()
    result = await run
    assert result.ended_by is Ended.INTERRUPTED
    assert result.numbers.counts.interrupted == 3
    assert result.numbers.counts.errors == {}
    await frontend.until(lambda: frontend.cancelled == 3)


async def test_a_trace_is_played(frontend, tmp_path):
    file = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 600, "output_length": 30, "hash_ids": [0, i + 1]}
        for i in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    load = Load(loop="open", arrivals="trace", speed=100.0, warmup=0)
    prompts = Prompts(trace=str(file), scale=0.1)
    result = await go(options(frontend.address, load, prompts))
    assert result.ended_by is Ended.TRACE
    assert [len(r.tokens.token_ids) for r in frontend.requests] == [60] * 4
    assert {r.sampling.max_tokens for r in frontend.requests} == {3}
    heads = {tuple(r.tokens.token_ids[:51]) for r in frontend.requests}
    assert len(heads) == 1
    assert result.numbers.counts.succeeded == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": Prompts("990", "11")}, "1001 tokens"),
        ({"prompts": Prompts("8", "1", first_token=5, end_token=5)}, "empty"),
        ({"load": Load(loop="open")}, "rate above 0"),
        ({"load": Load(loop="open", arrivals="trace")}, "trace file"),
    ],
)
async def test_options_that_cannot_be_served_are_refused_first(frontend, change, words):
    with pytest.raises(OptionsError, match=words):
        await go(replace(options(frontend.address), **change))
    assert frontend.requests == []


async def test_a_model_that_is_not_served(frontend):
    with pytest.raises(ModelError, match="'other' is not served"):
        await go(options(frontend.address, model="other"))


async def test_a_warm_up_that_fails_ends_it_with_the_servers_words(frontend):
    frontend.scripts = {8: [OverloadedError("the queue is full")]}
    with pytest.raises(WarmupError, match="OVERLOADED: the queue is full"):
        await go(options(frontend.address, Load(warmup=1)))


async def test_no_server_at_all():
    with pytest.raises(CallFailedError) as caught:
        await go(options("127.0.0.1:1"))
    assert caught.value.unreachable


async def test_processes_that_are_not_found_are_named():
    found = await local.find("127.0.0.1:1", "127.0.0.1:2")
    assert found.pids == {}
    assert len(found.notes) == 3


SCRIPTED = {"engine.kind": "scripted", "engine.block_tokens": "4"}


async def test_a_real_cluster_and_the_command(tmp_path):
    """Everything together: counts, CPU of every process, KV moved, and Ctrl-C on the command."""
    async with LocalCluster(prefill=1, decode=1, settings=SCRIPTED) as cluster:
        address, coordinator = cluster.address("frontend"), cluster.address("coordinator")
        base = [sys.executable, "-m", "cli.main", "loadtest", "-a", address]
        base += ["--coordinator", coordinator, "--input", "120", "--output", "6"]
        ran = await asyncio.to_thread(
            subprocess.run,
            [*base, "-n", "20", "--json", str(tmp_path / "a.json"), "--slo-ttft-ms", "60000"],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        found = json.loads((tmp_path / "a.json").read_text())
        counts = found["numbers"]["counts"]
        assert (counts["succeeded"], counts["errors"]) == (20, {})
        assert counts["output_tokens"] == 120
        assert found["numbers"]["goodput"]["share"] == 1.0
        assert sum(found["numbers"]["kv"]["bytes_by_transport"].values()) > 0
        by_role = {re.sub(r"-.*", "", p["name"]): p for p in found["processes"]}
        assert by_role.keys() == {"prefill", "decode", "frontend", "coordinator", "loadtest"}
        pids = {p["pid"] for p in found["processes"]}
        assert pids >= set(cluster.pids.values())
        assert all(p["cpu_ms_per_request"] is not None for p in found["processes"])

        endless = [*base, "-n", "1000000", "--seconds", "600", "--json", str(tmp_path / "b.json")]
        process = await asyncio.create_subprocess_exec(
            *endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        await process.stderr.readline()  # the first line of progress
        process.send_signal(signal.SIGINT)
        output, _ = await process.communicate()
        assert process.returncode == 130
        assert b"interrupted" in output
        assert json.loads((tmp_path / "b.json").read_text())["ended_by"] == "interrupted"


def test_the_command_refuses_in_words_and_status():
    def ask(*arguments):
        command = [sys.executable, "-m", "cli.main", "loadtest", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ)

    both = ask("--rate", "2", "--users", "3")
    assert both.returncode == 2
    assert "no --users" in both.stderr
    nobody = ask("-a", "127.0.0.1:1")
    assert nobody.returncode == 3
    assert "127.0.0.1:1" in nobody.stderr


async def bench(*arguments):
    """`tandem bench` on clusters of its own; returns what it printed."""
    command = [sys.executable, "-m", "cli.main", "bench", *arguments, "--engine", "scripted"]
    ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


async def test_both_sides_of_disaggregation_are_measured(tmp_path):
    file = tmp_path / "d.json"
    shape = ["--input", "120", "--output", "6", "-u", "2", "--rounds", "2", "-n", "3"]
    await bench("disagg", *shape, "--json", str(file))
    found = json.loads(file.read_text())
    assert found["schema"] == "tandem.bench.disagg/1"
    measures = {r["measure"] for r in found["ratios"]}
    assert {"TTFT p50, ms", "ITL p50, ms", "CPU ms/request"} <= measures
    assert all(r["users"] == 2 and r["low"] <= r["median"] <= r["high"] for r in found["ratios"])
    assert found["kv_bytes_per_request"] > 0
    assert found["options"]["single"]["pids"].keys() == {"coordinator", "frontend", "decode-0"}


async def test_memory_of_every_process_is_watched(tmp_path):
    file = tmp_path / "m.json"
    steps = ["--set", "engine.scripted_step_seconds=0.02"]
    await bench("memory", "-n", "160", "--json", str(file), *steps)
    found = json.loads(file.read_text())
    assert found["succeeded"] == 160
    assert found["errors"] == {}
    names = {g["name"] for g in found["growth"]}
    assert names == {"coordinator", "frontend", "prefill-0", "decode-0"}
    assert found["samples"][-1]["requests"] == 160
