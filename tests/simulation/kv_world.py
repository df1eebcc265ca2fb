"""The KV hand-off in a world of its own: seeded histories with everything that can go wrong.

One source, one sink, one network, virtual time. The source is a real KvStore (pool, leases,
watches, checksums, real bytes) driven as its engine and its servicer drive it; the sink is a real
KvStore and the real core of a fetch (kvtransfer/fetching.py). What the world makes up is what
lies between and around them: messages late, lost and doubled, calls that break, peers that freeze,
die and come again, readers so slow that leases run out under them, prompts cancelled half-way, and
other prompts that want the memory.

Each history is checked for:
    bytes used that are not what the key says       (used after free)
    a block given to somebody while leased          (freed while used)
    anything held, leased or watched at the end     (leak)
    a fetch not over by its bound                   (hang)

    python -m tests.simulation.kv_world --schedules 100000 --seed 1
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvtransfer.keys import block_keys, salt
from kvtransfer.pieces import Piece
from kvtransfer.store import KvStore
from tests.simulation.kv_fetch import KEEPALIVE_SECONDS, Fetch
from tests.simulation.kv_peer import BLOCKS, LAYOUT, NONCE, Prompt, Source, ViolationError

END = 120.0
"""Nothing new begins long before this; then everything must be at rest."""
_SALT = salt(LAYOUT.model, LAYOUT.fingerprint)


@dataclass(frozen=True, slots=True)
class Checks:
    """What a sink looks at, so that each safeguard can be shown to hold alone."""

    checksums: bool = True
    generations: bool = True


class World:
    """One history, all of it a function of the seed."""

    def __init__(self, seed: int, checks: Checks | None = None) -> None:
        self.random = random.Random(seed)
        self.checks = checks or Checks()
        self.now = 0.0
        self.count: Counter[str] = Counter()
        self.died_at: float | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._keys = itertools.count()
        draw = self.random
        self.loss = draw.choice((0.0, 0.0, 0.02, 0.2))
        self.pace = draw.choice((0.01, 0.1, 1.0))
        self.slow_reads = draw.choice((0.0, 0.0, 0.1, 0.5))
        self.one_host = draw.random() < 0.5
        # Also settings that nobody should choose: a read may outlast its lease by far.
        self.lease_seconds = draw.choice((1.0, 3.0, 10.0))
        self.stall_seconds = draw.choice((5.0, 30.0))
        self.partition = (0.0, 0.0)
        self.sink = KvStore(
            LAYOUT,
            2 * BLOCKS,
            layers_per_piece=draw.randint(1, 2),
            scratch_bytes=0,
            clock=lambda: self.now,
            nonce=NONCE,
        )
        self.source = Source(self)
        self.fetches: list[Fetch] = []
        self._plan()

    # Chance

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._serial), action))

    def delay(self) -> float:
        return self.random.expovariate(1 / self.pace)

    def latency(self) -> float:
        return self.random.expovariate(1 / (self.pace / 4))

    def notice(self) -> float:
        """How long until a broken connection shows: at once, or only by its keepalive."""
        return self.random.choice((0.0, 0.01, KEEPALIVE_SECONDS))

    def read_seconds(self) -> float:
        if self.random.random() < self.slow_reads:
            return self.random.choice((1.0, 4.0, 15.0, 40.0)) * self.random.random()
        return self.latency()

    def lost(self) -> bool:
        return self.partition[0] <= self.now < self.partition[1] or self.random.random() < self.loss

    def unary(self, deliver: Callable[[Source], None], *, twice: bool = True) -> None:
        """A request to whoever is at the source's address then: once, late, twice or never."""
        for _ in range(1 + (twice and self.random.random() < self.loss / 4)):
            if not self.lost():
                self.at(self.latency(), lambda: self._deliver(deliver))

    def _deliver(self, deliver: Callable[[Source], None]) -> None:
        source = self.source
        if source.alive:
            source.at(0.0, lambda: deliver(source))

    def shuffled(self, pieces: list[Piece]) -> Iterable[Piece]:
        """In any order, and some of them twice."""
        result = [*pieces, *(p for p in pieces if self.random.random() < 0.05)]
        self.random.shuffle(result)
        return result

    def fresh_key(self) -> bytes:
        return next(self._keys).to_bytes(16, "little")

    # The history

    def _plan(self) -> None:
        draw = self.random
        stem = [draw.randrange(100) for _ in range(4 * LAYOUT.block_tokens)]
        for i in range(draw.randint(1, 4)):
            tokens = stem[: draw.randint(1, len(stem))] + [i] * draw.randint(0, 3)
            keys = block_keys(tokens, LAYOUT.block_tokens, _SALT, partial=True)
            self.at(draw.uniform(0, 20), lambda i=i, k=keys: self._request(f"lease-{i}", k))
        for _ in range(draw.choice((0, 5, 40))):
            self.at(draw.uniform(0, 40), lambda: self.source.at(0.0, self.source.crowd))
        if draw.random() < 0.3:
            start = draw.uniform(0, 20)
            self.partition = (start, start + draw.choice((0.5, 5.0, 20.0)))
        if draw.random() < 0.3:
            self.at(draw.uniform(0, 20), self._crash)
        if draw.random() < 0.2:
            self.at(draw.uniform(0, 20), self._freeze)
        if draw.random() < 0.2:
            self.at(draw.uniform(0, 20), self._sink_dies)

    def _request(self, lease_id: str, keys: list[bytes]) -> None:
        """The frontend tells both sides at once; either may be the first to hear."""
        prompt, draw = Prompt(lease_id, keys), self.random
        source = self.source
        if draw.random() < 0.9:
            source.at(self.latency(), lambda: source.begin(prompt))
        if draw.random() < 0.15:
            source.at(draw.uniform(0, 10 * self.pace), lambda: source.cancel(prompt))
        if draw.random() < 0.95:
            held_only = draw.random() < 0.1
            self.at(self.latency(), lambda: self._fetch(lease_id, keys, held_only))
        if draw.random() < 0.1:
            self.at(self.delay(), lambda: self._fetch(lease_id, keys, held_only=False))

    def _fetch(self, lease_id: str, keys: list[bytes], held_only: bool) -> None:
        if len(keys) <= self.sink.available():
            self.fetches.append(Fetch(self, lease_id, keys, held_only=held_only))

    def _crash(self) -> None:
        self.count["source died"] += 1
        self.died_at = self.now
        self.source.die()
        self.at(self.random.choice((0.1, 5.0)), self._restart)

    def _restart(self) -> None:
        self.source = Source(self)

    def _freeze(self) -> None:
        """Stopped: it answers nothing, and the network says nothing either."""
        self.count["source frozen"] += 1
        source = self.source
        source.frozen_until = self.now + self.random.choice((0.5, 6.0, 30.0))
        for call in list(source.calls):
            if source.frozen_until > self.now + KEEPALIVE_SECONDS:
                self.at(KEEPALIVE_SECONDS, call.cut)

    def _sink_dies(self) -> None:
        """Its fetches are gone without a word; leases are left to time."""
        for fetch in self.fetches:
            if not fetch.ended:
                self.count["sink died"] += 1
                fetch.finish("sink died")

    def run(self) -> Counter[str]:
        """Plays it to the end. Raises ViolationError."""
        while self._queue:
            self.now, _, action = heapq.heappop(self._queue)
            if self.now > END:
                break
            action()
            self.count["events"] += 1
        for fetch in self.fetches:
            if not fetch.ended:
                raise ViolationError(f"a fetch begun at {fetch.began} never ended")
        for name, store in ("source", self.source.store), ("sink", self.sink):
            store.check_integrity()
            stats = store.stats()
            if stats.held or stats.leases or stats.watches:
                raise ViolationError(f"the {name} ends with {stats}")
        self.count["fetches"] += len(self.fetches)
        return self.count


def play(seed: int, checks: Checks | None = None) -> Counter[str]:
    """One history. Raises ViolationError that names the seed."""
    try:
        return World(seed, checks).run()
    except AssertionError as error:
        raise ViolationError(f"seed {seed}: {error}") from error


def _some(arguments: tuple[int, int, Checks]) -> Counter[str]:
    first, last, checks = arguments
    total: Counter[str] = Counter()
    for seed in range(first, last):
        total += play(seed, checks)
    return total


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.kv_world")
    parser.add_argument("--schedules", type=int, default=10_000, help="histories to play (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--without", choices=("checksums", "generations", "both"), help="off")
    options = parser.parse_args()
    checks = Checks(
        checksums=options.without not in ("checksums", "both"),
        generations=options.without not in ("generations", "both"),
    )
    first, last = options.seed, options.seed + options.schedules
    parts = [(a, min(a + 500, last), checks) for a in range(first, last, 500)]
    total: Counter[str] = Counter()
    began = time.perf_counter()
    with multiprocessing.Pool(options.jobs) as pool:
        try:
            for done in pool.imap_unordered(_some, parts):
                total += done
        except ViolationError as violation:
            print(f"VIOLATED: {violation}")
            return 1
    seconds = time.perf_counter() - began
    print(f"seeds {first} to {last - 1}: nothing violated")
    print(f"{options.schedules / seconds:.0f} schedules a second, {seconds:.0f} s")
    for name, number in sorted(total.items()):
        print(f"  {name:<28}{number:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
