"""LoRA adapters in the torch engine, on a tiny DeepSeek: side by side, handed over, with drafts."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from services.engine.api import FirstTokens, Hold, Request
from services.engine.build import build
from services.engine.models.errors import UnsupportedAdapterError
from services.engine.stepped import adapters as stepped_adapters
from services.engine.stepped.inbox import Cancel, ChangeAdapter, Command, Inbox, Submit
from services.runtime.errors import AdapterLimitError, AdapterNotLoadedError, InvalidRequestError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.test_engine import GREEDY, SAMPLED, WAIT, Worker, eventually, prompt
from tests.unit.engine_torch import torch_adapters, torch_deepseek

TARGETS = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj")
LONG = dataclasses.replace(GREEDY, max_tokens=60)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, and adapters of it; `drafts` changes the module of multi-token prediction, too."""
    root = tmp_path_factory.mktemp("adapters")
    model = torch_deepseek.write(root / "model")
    (model / "tokenizer.json").write_text("{}")
    skip = (".experts.", "layers.3.")
    torch_adapters.write(root / "a", model, TARGETS, seed=1, skip=skip)
    torch_adapters.write(root / "b", model, TARGETS[:3], seed=2, rank=3, skip=skip)
    torch_adapters.write(root / "drafts", model, ("o_proj",), seed=3)
    return root


@pytest.fixture
async def new(root):
    """new(**engine settings) -> a Worker that is up, with adapters a and b."""
    workers = []

    async def make(**settings) -> Worker:
        values = {
            "block_tokens": 8,
            "chunk_tokens": 20,
            "kv_blocks": 64,
            "threads": 1,
            "draft_tokens": 0,
            "adapter_folder": str(root),
            "adapters": ("a=a", "b=b"),
        }
        engine = build(
            ModelSettings(name="tiny", path=str(root / "model")),
            EngineSettings(**(values | settings)),
            KvSettings(layers_per_piece=2),
            "127.0.0.1",
        )
        workers.append(Worker(engine))
        await workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        await worker.close()


def adapters(worker: Worker) -> dict[str, str]:
    """Ids by name, none of them too."""
    return {"": ""} | {i.partition("@")[0]: i for i in worker.engine.stats().adapters}


async def generate(worker: Worker, name: str, ids, sampling, adapter: str) -> list[int]:
    worker.engine.decode(Request(name, tuple(ids), sampling, adapter=adapter), None)
    return await worker.tokens(name)


def requests(ids: dict[str, str]) -> dict[str, tuple]:
    """Of every adapter several, some with the same prompt."""
    return {
        f"{name}-{length}-{kind}": (prompt(length), sampling, adapter)
        for name, adapter in ids.items()
        for length in (5, 24, 41)
        for kind, sampling in (("g", GREEDY), ("s", SAMPLED))
    }


@pytest.mark.parametrize("drafts", [0, 2])
async def test_in_one_batch_each_has_the_tokens_that_it_has_alone(new, drafts):
    """Under preemption, and with prefixes that only requests with the same adapter may share."""
    alone = await new(max_running=1)
    asked = requests(adapters(alone))
    expected = {name: await generate(alone, name, *one) for name, one in asked.items()}
    for length in (5, 24, 41):
        assert len({tuple(expected[f"{name}-{length}-g"]) for name in ("", "a", "b")}) == 3
    worker = await new(draft_tokens=drafts, kv_blocks=24, chunk_tokens=11)
    found = await asyncio.gather(*(generate(worker, name, *one) for name, one in asked.items()))
    assert dict(zip(asked, found, strict=True)) == expected
    # A warm cache gives the same, and is hit by the same adapter alone.
    for name in ("", "a", "b"):
        again = f"again-{name}"
        request = prompt(41), GREEDY, adapters(worker)[name]
        assert await generate(worker, again, *request) == expected[f"{name}-41-g"]
    await worker.settled()


async def test_kv_of_an_adapter_is_handed_over(new):
    source, sink, plain = await new(), await new(), await new()
    for adapter in adapters(plain).values():
        name = f"handed-{adapter[:1]}"
        expected = await generate(plain, name, prompt(41), SAMPLED, adapter)
        request = Request(name, prompt(41), SAMPLED, adapter=adapter)
        source.engine.prefill(request, Hold(30.0))
        sink.engine.decode(request, source.source(name))
        first = await source.first(name)
        sink.engine.proceed(name, FirstTokens(first.token_ids))
        assert [*first.token_ids, *await sink.tokens(name)] == expected
        report = next(o.kv for o in sink.outputs[name] if o.kv)
        assert report.blocks == 6
    await source.settled()
    await sink.settled()


async def test_weights_that_give_no_number_are_blamed_on_the_adapter(new):
    worker = await new()
    stepper = worker.engine._stepper
    model, ids = stepper._model, adapters(worker)

    def absurd(batch, after_layers, layers_per_piece):
        return np.full_like(model.forward(batch, after_layers, layers_per_piece), np.nan)

    stepper._model = type("Absurd", (), {"forward": staticmethod(absurd)})()
    for adapter, reason in ((ids["a"], "ADAPTER_FAILED"), ("", "ENGINE_FAILED")):
        worker.engine.decode(Request(reason, prompt(9), GREEDY, adapter=adapter), None)
        assert (await worker.ended(reason))[-1].error.reason == reason
    stepper._model = model
    assert await generate(worker, "good", prompt(9), GREEDY, ids["a"])
    await worker.settled()


async def test_weights_stay_for_those_that_have_them(new, root):
    worker = await new(adapters=())
    assert worker.engine.stats().adapters == ()
    loaded = await worker.engine.load_adapter("mine", "a")
    expected = await generate(worker, "alone", prompt(9), LONG, loaded.id)
    worker.engine.decode(Request("runs", prompt(9), LONG, adapter=loaded.id), None)
    # Replaced by others, then unloaded, while it runs.
    other = await worker.engine.load_adapter("mine", "b")
    assert worker.engine.stats().adapters == (other.id, loaded.id)
    (first, second) = worker.engine.unload_adapter("mine")
    assert worker.engine.stats().adapters == ()
    assert {first.adapter.id, second.adapter.id} == {loaded.id, other.id}
    with pytest.raises(AdapterNotLoadedError, match="loaded: none"):
        worker.engine.decode(Request("late", prompt(9), GREEDY, adapter=loaded.id), None)
    assert await worker.tokens("runs") == expected
    await eventually(lambda: not worker.engine.adapters())
    # Cancelled in the same moment as it is unloaded: the step that may run has it still.
    back = await worker.engine.load_adapter("mine", "a")
    for number in range(5):
        worker.engine.decode(Request(f"c{number}", prompt(9), LONG, adapter=back.id), None)
    await worker.until(lambda: worker.outputs.get("c0"))
    for number in range(5):
        worker.engine.cancel(f"c{number}")
    worker.engine.unload_adapter("mine")
    assert await generate(worker, "base", prompt(9), GREEDY, "")
    assert worker.engine.adapters() == []
    await worker.settled()


async def test_weights_are_dropped_after_those_who_have_them_were_cancelled(new, monkeypatch):
    worker = await new()
    told = []
    put = Inbox.put

    def recorded(inbox: Inbox, command: Command) -> None:
        told.append(type(command))
        put(inbox, command)

    monkeypatch.setattr(Inbox, "put", recorded)
    worker.engine.decode(Request("r", prompt(5), LONG, adapter=adapters(worker)["a"]), None)
    worker.engine.unload_adapter("a")
    worker.engine.cancel("r")
    # A step between the last two must not name an adapter that is gone.
    assert told == [Submit, Cancel, ChangeAdapter]


async def test_what_can_not_be_loaded_changes_nothing(new, root):
    worker = await new(adapters=("a=a",), max_adapters=1)
    before = worker.engine.stats().adapters
    for name, path, error in (
        ("x", "model", UnsupportedAdapterError),
        ("x", "nothing", UnsupportedAdapterError),
        ("x", "..", InvalidRequestError),
        ("x/y", "a", InvalidRequestError),
        ("x", "b", AdapterLimitError),
        # A module that this engine does not have loaded, as it drafts nothing.
        ("a", "drafts", UnsupportedAdapterError),
    ):
        with pytest.raises(error):
            await worker.engine.load_adapter(name, path)
    assert worker.engine.stats().adapters == before
    # The same again is no other.
    assert (await worker.engine.load_adapter("a", "a")).id == before[0]
    assert worker.engine.stats().adapters == before


async def test_a_load_that_is_cancelled_ends_before_the_next_one_reads(new, monkeypatch):
    """So that memory for one is all that loading takes."""
    worker = await new(adapters=())
    reading, gate, real = [], threading.Event(), stepped_adapters.read_files

    def read(name, *rest):
        reading.append(name)
        assert gate.wait(WAIT)
        found = real(name, *rest)
        reading.remove(name)
        assert not reading
        return found

    monkeypatch.setattr(stepped_adapters, "read_files", read)
    load = worker.engine.load_adapter
    begun, waiting, last = (
        asyncio.create_task(load(name, path)) for name, path in (("a", "a"), ("x", "a"), ("b", "b"))
    )
    await eventually(lambda: reading)
    for task in (begun, waiting):
        task.cancel()
    await asyncio.wait((begun, waiting))
    assert reading == ["a"]
    assert not last.done()
    gate.set()
    assert (await asyncio.wait_for(last, WAIT)).name == "b"
    # What had begun was loaded; what waited was not.
    assert set(adapters(worker)) == {"", "a", "b"}
    assert await generate(worker, "r", prompt(9), GREEDY, adapters(worker)["a"])
