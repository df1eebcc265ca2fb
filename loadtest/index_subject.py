"""One prefix index under load, in a process of its own: what bench_index.py runs for each.

`python -m loadtest.index_subject SUBJECT --block-tokens N` prints one line of JSON. Nothing but the
standard library is imported beside the subject, so that a peer's own Python can run this too.

Workers hold sequences of 4,096 tokens that begin with one of 16 system prompts of 1,024. Messages
are made beforehand, as they are on the wire; what is measured is from there to the index.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

SEQUENCE_TOKENS = 4096
SYSTEM_TOKENS = 1024
SYSTEM_PROMPTS = 16
WORKERS = 64
HOLDERS = 8
"""Workers that hold a prompt that is looked up."""
PROMPTS = 24
"""Different ones of a length: no answer is remembered from the last time."""
LENGTHS = (4096, 32_768, 131_072)
SEQUENCES_AT_ONCE = 64
SMALL_MESSAGE = 16
"""Blocks that a busy worker tells of at once."""

Key = bytes
"""16 bytes that stand for a block and all before it."""


class Subject(Protocol):
    """An index, and its messages."""

    def stored(self, keys: Sequence[Key], parent: Key | None) -> object:
        """The message that a worker has these blocks of one chain now; `parent` is before them."""

    def removed(self, keys: Sequence[Key]) -> object:
        """The message that it has them no more."""

    def apply(self, worker: int, message: object) -> None:
        """Takes a message in; it may do so later."""

    def settle(self) -> None:
        """Returns when all messages are taken in."""

    def query(self, keys: Sequence[Key]) -> object:
        """A prompt as a request brings it."""

    def find(self, query: object) -> object:
        """How many leading blocks each worker holds."""

    def answer(self, found: object) -> dict[int, int]:
        """That in a form to compare: worker to blocks, those that hold none left out."""

    def drop(self, worker: int) -> None:
        """Forgets a worker, and frees what only it held."""


class Tandem:
    """The coordinator's index, fed with KvEvents as they come over gRPC."""

    def __init__(self) -> None:
        from services.coordinator.core.index import PrefixIndex
        from services.coordinator.core.packed import PackedKeys
        from tandem.coordinator.v1 import coordinator_pb2 as pb

        self._events = pb.KvEvents
        self._packed = PackedKeys
        self._index = PrefixIndex()
        self._names = [f"worker-{number}" for number in range(WORKERS)]
        self._everyone = sum(map(self._index.add, self._names))

    def stored(self, keys: Sequence[Key], parent: Key | None) -> object:
        """See Subject."""
        return self._events(stored=b"".join(keys)).SerializeToString()

    def removed(self, keys: Sequence[Key]) -> object:
        """See Subject."""
        return self._events(removed=b"".join(keys)).SerializeToString()

    def apply(self, worker: int, message: object) -> None:
        """See Subject."""
        assert isinstance(message, bytes)
        events, name = self._events.FromString(message), self._names[worker]
        self._index.remove(name, self._packed(events.removed))
        self._index.store(name, self._packed(events.stored))

    def settle(self) -> None:
        """See Subject."""

    def query(self, keys: Sequence[Key]) -> object:
        """See Subject."""
        return tuple(keys)

    def find(self, query: object) -> object:
        """See Subject."""
        assert isinstance(query, tuple)
        return list(self._index.reach(query, self._everyone))

    def answer(self, found: object) -> dict[int, int]:
        """See Subject."""
        assert isinstance(found, list)
        return {
            self._names.index(name): count
            for count, some in found
            if count
            for name in self._index.names(some)
        }

    def drop(self, worker: int) -> None:
        """See Subject."""
        self._index.forget(self._names[worker])
        while self._index.sweep(1 << 18):
            pass


class DynamoRadixTree:
    """RadixTree of the ai-dynamo-runtime wheel, fed with the JSON that its Python interface takes.

    A thread of its own does the work.
    """

    def __init__(self) -> None:
        from dynamo.llm import RadixTree  # type: ignore[import-not-found]  # it is a peer's

        self._tree = RadixTree()
        self._sent = 0

    def stored(self, keys: Sequence[Key], parent: Key | None) -> object:
        """See Subject."""
        blocks = [{"block_hash": _whole(key), "tokens_hash": _content(key)} for key in keys]
        above = None if parent is None else _whole(parent)
        return self._message({"stored": {"parent_hash": above, "blocks": blocks}})

    def removed(self, keys: Sequence[Key]) -> object:
        """See Subject."""
        return self._message({"removed": {"block_hashes": list(map(_whole, keys))}})

    def apply(self, worker: int, message: object) -> None:
        """See Subject."""
        self._tree.apply_event(worker, message)

    def settle(self) -> None:
        """See Subject."""
        self._tree.find_matches([1])  # Its thread does one after the other.

    def query(self, keys: Sequence[Key]) -> object:
        """See Subject."""
        return list(map(_content, keys))

    def find(self, query: object) -> object:
        """See Subject."""
        return self._tree.find_matches(query)

    def answer(self, found: object) -> dict[int, int]:
        """See Subject."""
        scores = getattr(found, "scores")  # noqa: B009  # nothing is known of its type here
        return {worker: count for (worker, _rank), count in scores.items()}

    def drop(self, worker: int) -> None:
        """See Subject."""
        self._tree.remove_worker(worker)
        self.settle()

    def _message(self, data: object) -> bytes:
        self._sent += 1
        return json.dumps({"event_id": self._sent, "data": data, "dp_rank": 0}).encode()


SUBJECTS: dict[str, Callable[[], Subject]] = {"tandem": Tandem, "dynamo": DynamoRadixTree}


def _whole(key: Key) -> int:
    return int.from_bytes(key[:8], "little")


def _content(key: Key) -> int:
    return int.from_bytes(key[8:], "little")


def chain(draw: random.Random, length: int, start: Sequence[Key] = ()) -> list[Key]:
    """Keys of a sequence, each a hash of the one before and of something new."""
    keys = list(start)
    while len(keys) < length:
        before = keys[-1] if keys else b""
        keys.append(hashlib.blake2b(before + draw.randbytes(8), digest_size=16).digest())
    return keys


class Bench:
    """The measurements of one subject."""

    def __init__(self, subject: Subject, blocks: int, block_tokens: int) -> None:
        self._subject = subject
        self._blocks = blocks
        self._tokens = block_tokens
        self._length = SEQUENCE_TOKENS // block_tokens
        self._draw = random.Random(block_tokens)
        system = SYSTEM_TOKENS // block_tokens
        self._system = [chain(self._draw, system) for _ in range(SYSTEM_PROMPTS)]
        self._stored = 0
        """Sequences. They are made again when they are wanted again: memory is the subject's."""

    def run(self) -> dict[str, object]:
        """All figures."""
        gc.collect()
        before = _resident()
        stored = self._store(self._blocks, self._length)
        gc.collect()
        grown = _resident() - before
        system = len(self._system[0])
        groups = {self._place_of(number) for number in range(self._stored)}
        distinct = self._stored * (self._length - system) + len(groups) * system
        result: dict[str, object] = {
            "blocks": distinct,
            "bytes_per_block": grown / distinct,
            "store": stored,
            "store_small": self._store(self._blocks // 10, SMALL_MESSAGE),
            "find": self._finds(),
            "remove": self._remove(self._blocks // 4),
        }
        start = time.process_time()
        self._subject.drop(0)
        result["drop_worker_ms"] = (time.process_time() - start) * 1e3
        return result

    def _place_of(self, number: int) -> tuple[int, int]:
        """The worker of a sequence, and its system prompt."""
        return number % WORKERS, number // 4 % SYSTEM_PROMPTS

    def _sequence(self, number: int) -> list[Key]:
        system = self._system[self._place_of(number)[1]]
        return chain(random.Random(f"{self._tokens}/{number}"), self._length, system)

    def _store(self, blocks: int, message_blocks: int) -> dict[str, float]:
        """Stores more sequences, each of a worker. Messages are made beforehand, some at a time."""
        cpu = wall = 0.0
        first, count = self._stored, blocks // self._length
        for start in range(first, first + count, SEQUENCES_AT_ONCE):
            messages = []
            for number in range(start, min(first + count, start + SEQUENCES_AT_ONCE)):
                worker, _ = self._place_of(number)
                messages += self._messages(worker, self._sequence(number), message_blocks)
            times = _timed(partial(self._apply, messages))
            cpu, wall = cpu + times[0], wall + times[1]
        self._stored += count
        return {"per_cpu_s": count * self._length / cpu, "per_wall_s": count * self._length / wall}

    def _messages(self, worker: int, keys: list[Key], size: int) -> list[tuple[int, object]]:
        return [
            (worker, self._subject.stored(keys[at : at + size], keys[at - 1] if at else None))
            for at in range(0, len(keys), size)
        ]

    def _apply(self, messages: Sequence[tuple[int, object]]) -> None:
        for worker, message in messages:
            self._subject.apply(worker, message)
        self._subject.settle()

    def _remove(self, blocks: int) -> dict[str, float]:
        """Removes the second halves of sequences, the last block first, as pools do."""
        half, messages = self._length // 2, []
        for number in range(min(self._stored, blocks // half)):
            keys = self._sequence(number)[half:]
            messages.append((self._place_of(number)[0], self._subject.removed(keys[::-1])))
        cpu, wall = _timed(partial(self._apply, messages))
        return {
            "per_cpu_s": len(messages) * half / cpu,
            "per_wall_s": len(messages) * half / wall,
        }

    def _finds(self) -> dict[str, dict[str, float]]:
        found = {}
        for tokens in LENGTHS:
            length = tokens // self._tokens
            alone = [chain(self._draw, length) for _ in range(PROMPTS)]
            shared = [chain(self._draw, length, system) for system in self._system]
            for number, keys in enumerate([*alone, *shared]):
                for holder in range(HOLDERS):
                    worker = (number + holder * WORKERS // HOLDERS) % WORKERS
                    self._apply(self._messages(worker, keys, len(keys)))
            half = [chain(self._draw, length, keys[: length // 2]) for keys in alone]
            for kind, prompts in (("whole", alone), ("half", half), ("shared", shared)):
                found[f"{kind}_{tokens}"] = self._find(prompts)
        return found

    def _find(self, prompts: Sequence[Sequence[Key]]) -> dict[str, float]:
        """p50 and p99, and CPU time of one, over many rounds through the prompts."""
        subject = self._subject
        queries = [subject.query(keys) for keys in prompts]
        for query, keys in zip(queries, prompts, strict=True):
            self._verify(subject.answer(subject.find(query)), keys)
        times = []
        cpu = time.process_time()
        for _ in range(20):
            for query in queries:
                start = time.perf_counter()
                subject.find(query)
                times.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
        times.sort()
        return {
            "p50_us": times[len(times) // 2] * 1e6,
            "p99_us": times[int(len(times) * 0.99)] * 1e6,
            "cpu_us": cpu / len(times) * 1e6,
        }

    def _verify(self, answer: dict[int, int], keys: Sequence[Key]) -> None:
        """Who is fast and wrong is not measured."""
        counts = sorted(answer.values(), reverse=True)
        whole = len(keys) if counts and counts[0] == len(keys) else len(keys) // 2
        if counts[:HOLDERS] != [whole] * HOLDERS:
            raise RuntimeError(f"{len(keys)} blocks, held by {HOLDERS} workers: found {counts}")


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds; CPU time is that of all threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _resident() -> int:
    """Bytes of memory that this process has."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main() -> None:
    """Measures one subject, and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--block-tokens", type=int, default=16)
    options = parser.parse_args()
    bench = Bench(SUBJECTS[options.subject](), options.blocks, options.block_tokens)
    print(json.dumps(bench.run()))


if __name__ == "__main__":
    main()
