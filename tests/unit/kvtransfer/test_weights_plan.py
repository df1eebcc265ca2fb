"""Which peer is asked for which piece, against peers that die, stall, lie and refuse, by seed."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.weights.plan import (
    MOST_DIALS,
    MOST_PEERS,
    MOST_WRONG,
    Arrived,
    Ask,
    Dial,
    FetchPlan,
    HangUp,
    Lost,
    Opened,
    Tick,
)

STALL = 15.0


@dataclass
class Peer:
    """A peer as the network shows it. Chances are of a piece, or of a dial."""

    seconds: float = 0.01
    window: int = 8
    wrong: float = 0.0
    dies: float = 0.0
    stalls: float = 0.0
    refuses: float = 0.0
    unreachable: float = 0.0
    call: int = 0
    """Grows with each call; what an older one still brings is nobody's."""
    open: bool = False
    owes: set[int] = field(default_factory=set)

    @property
    def sound(self) -> bool:
        return not (self.wrong or self.dies or self.stalls or self.refuses or self.unreachable)


class World:
    """Plays peers until the plan is over, and checks every command."""

    def __init__(self, pieces: int, peers: list[Peer], chance: random.Random) -> None:
        self.peers = peers
        self.chance = chance
        self.plan = FetchPlan(range(pieces), [f"peer-{i}" for i in range(len(peers))], STALL)
        self.now = 0.0
        self.dials = [0] * len(peers)
        self.wrong = [0] * len(peers)
        self.here: set[int] = set()
        self._coming: list = []
        self._count = itertools.count()

    def play(self) -> None:
        self._tell(Tick())
        while not self.plan.over:
            at, _, peer, call, event = self._coming[0] if self._coming else (1e18, 0, 0, 0, None)
            if self.plan.timer <= at:
                assert self.plan.timer < 1e9, "nothing will ever happen any more"
                self.now = max(self.now, self.plan.timer)
                self._tell(Tick())
                continue
            heapq.heappop(self._coming)
            self.now = at
            if self.peers[peer].call == call:
                self._happens(peer, event)

    def _happens(self, index: int, event) -> None:
        peer = self.peers[index]
        match event:
            case Lost():
                peer.open, peer.owes = False, set()
                peer.call += 1
            case Opened():
                peer.open = True
            case Arrived(piece=piece, right=right):
                peer.owes.discard(piece)
                if right:
                    self.here.add(piece)
                    self.dials[index] = 0
                else:
                    self.wrong[index] += 1
        self._tell(event)

    def _tell(self, event) -> None:
        for command in self.plan.handle(event, self.now):
            self._check_and_do(command)
        assert self.plan.left == len(self.plan.missing)

    def _check_and_do(self, command) -> None:
        peer = self.peers[command.peer]
        match command:
            case Dial(index):
                assert not peer.open
                assert not peer.owes
                assert self.dials[index] < MOST_DIALS
                self.dials[index] += 1
                self._dialled(index, peer)
            case Ask(index, pieces):
                assert peer.open
                assert not peer.owes & set(pieces), "asked twice at once"
                assert not self.here & set(pieces), "it is here"
                peer.owes |= set(pieces)
                assert len(peer.owes) <= peer.window
                for piece in pieces:
                    assert sum(piece in other.owes for other in self.peers) <= 2
                    self._asked(index, peer, piece)
            case HangUp():
                assert peer.open
                peer.open, peer.owes = False, set()
                peer.call += 1
        assert sum(p.open for p in self.peers) <= MOST_PEERS

    def _dialled(self, index: int, peer: Peer) -> None:
        draw = self.chance.random()
        if draw < peer.refuses:
            self._later(index, 0.01, Lost(index, "refused", refused=True))
        elif draw < peer.refuses + peer.unreachable:
            self._later(index, 0.01, Lost(index, "unreachable"))
        else:
            self._later(index, 0.01, Opened(index, peer.window))

    def _asked(self, index: int, peer: Peer, piece: int) -> None:
        draw = self.chance.random()
        seconds = peer.seconds * (0.5 + self.chance.random())
        if draw < peer.dies:
            self._later(index, seconds, Lost(index, "died"))
        elif draw < peer.dies + peer.stalls:
            return
        else:
            right = self.chance.random() >= peer.wrong
            self._later(index, seconds, Arrived(index, piece, right))

    def _later(self, index: int, seconds: float, event) -> None:
        call = self.peers[index].call
        entry = (self.now + seconds, next(self._count), index, call, event)
        heapq.heappush(self._coming, entry)


def chances():
    return st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.3, 1.0])


peers = st.builds(
    Peer,
    seconds=st.sampled_from([0.001, 0.01, 1.0]),
    window=st.integers(1, 8),
    wrong=chances(),
    dies=chances(),
    stalls=chances(),
    refuses=chances(),
    unreachable=chances(),
)


@given(st.integers(0, 60), st.lists(peers, min_size=1, max_size=7), st.integers(0, 2**32))
def test_a_fetch_ends_and_never_by_a_sound_peers_fault(pieces, found, seed):
    world = World(pieces, found, random.Random(seed))
    world.play()
    plan = world.plan
    assert (plan.error is None) == (plan.left == 0)
    assert world.here == set(range(pieces)) - plan.missing
    if any(peer.sound for peer in found):
        assert plan.error is None
    for index, peer in enumerate(found):
        assert not (peer.sound and f"peer-{index}" in plan.dropped)
        assert world.wrong[index] <= MOST_WRONG + peer.window
    if plan.error is not None:
        assert set(plan.dropped) == {f"peer-{i}" for i in range(len(found))}
        for name, why in plan.dropped.items():
            assert why
            assert f"{name}: {why}" in plan.error.message


def test_faster_peers_bring_more():
    fast, slow = Peer(seconds=0.01), Peer(seconds=0.1)
    world = World(400, [fast, slow], random.Random(1))
    brought = {0: 0, 1: 0}
    happens = world._happens

    def counted(index, event):
        if isinstance(event, Arrived):
            brought[index] += 1
        happens(index, event)

    world._happens = counted
    world.play()
    assert brought[0] > 5 * brought[1] > 0
    # Together in less time than the fast one alone, and not held up by the slow one's last pieces.
    assert world.now < 400 * 0.01 / 8 * 2


def test_what_a_silent_peer_owes_comes_from_another():
    plan = FetchPlan(range(4), ["a", "b"], STALL)
    assert plan.handle(Tick(), 0.0) == [Dial(0), Dial(1)]
    assert plan.handle(Opened(0, 4), 0.0) == [Ask(0, (0, 1, 2, 3))]
    # Nothing is left to ask for: the idle one is asked for what is owed longest.
    assert plan.handle(Opened(1, 2), 1.0) == [Ask(1, (0,))]
    assert plan.handle(Arrived(1, 0, True), 2.0) == [Ask(1, (1,))]
    assert plan.timer == 15.0
    assert plan.handle(Tick(), 15.0) == [HangUp(0), Ask(1, (2,))]
    assert plan.handle(Arrived(1, 1, True), 15.1) == [Ask(1, (3,))]


def test_a_liar_is_dropped_by_name_and_a_flipped_bit_is_forgiven():
    plan = FetchPlan(range(9), ["a"], STALL)
    plan.handle(Tick(), 0.0)
    plan.handle(Opened(0, 1), 0.0)
    assert plan.handle(Arrived(0, 0, False), 1.0) == [Ask(0, (0,))]
    assert plan.handle(Arrived(0, 0, True), 2.0) == [Ask(0, (1,))]
    assert plan.handle(Arrived(0, 1, False), 3.0) == [HangUp(0)]
    assert "a: it brought 2 pieces whose bytes are not those described" in plan.error.message


def test_a_peer_that_comes_back_goes_on():
    plan = FetchPlan(range(2), ["a"], STALL)
    plan.handle(Tick(), 0.0)
    plan.handle(Opened(0, 1), 0.0)
    assert plan.handle(Lost(0, "it died"), 1.0) == []
    assert plan.timer == 1.5
    assert plan.handle(Tick(), 1.5) == [Dial(0)]
    assert plan.handle(Lost(0, "can't be reached"), 1.6) == []
    assert plan.timer == 2.6
    assert plan.handle(Tick(), 2.6) == [Dial(0)]
    assert plan.handle(Opened(0, 1), 2.7) == [Ask(0, (0,))]
    assert plan.handle(Arrived(0, 0, True), 2.8) == [Ask(0, (1,))]


def test_without_peers_it_fails_at_once():
    plan = FetchPlan([1], [], STALL)
    plan.handle(Tick(), 0.0)
    assert plan.over
    assert "there are none" in plan.error.message


@pytest.mark.parametrize("count", [1, MOST_PEERS, MOST_PEERS + 3])
def test_only_a_few_are_used_and_the_next_takes_a_dropped_ones_place(count):
    plan = FetchPlan(range(100), [str(i) for i in range(count)], STALL)
    used = min(count, MOST_PEERS)
    assert plan.handle(Tick(), 0.0) == [Dial(i) for i in range(used)]
    commands = plan.handle(Lost(0, "no", refused=True), 0.0)
    assert commands == ([Dial(used)] if count > used else [])
