import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.leases import LeaseState, LeaseTable

IDS = st.sampled_from(["a", "b", "c"])
KEYS = [bytes([i]) * 16 for i in range(5)]


def test_open_lease_does_not_expire():
    leases = LeaseTable()
    leases.open("a", 1.0, now=0.0)
    assert leases.due(1e9) == []
    leases.complete("a", now=5.0)
    assert leases.due(5.9) == []
    assert leases.due(6.0) == ["a"]


def test_touch_renews():
    leases = LeaseTable()
    leases.adopt("a", 1.0, [0], KEYS[:1], now=0.0)
    leases.touch("a", now=0.9)
    assert leases.due(1.8) == []
    leases.touch("a", now=0.1)  # A clock that seems to go back takes nothing away.
    assert leases.due(1.8) == []
    assert leases.due(1.9) == ["a"]


def test_release_before_open_holds_nothing():
    leases = LeaseTable()
    assert leases.end("a", "released") is None
    assert not leases.open("a", 1.0, now=0.0)
    assert leases.add("a", [0], KEYS[:1], now=0.0) == []
    assert leases.why_ended("a") == "released"


def test_the_first_reason_stays():
    leases = LeaseTable()
    leases.open("a", 1.0, now=0.0)
    leases.end("a", "cancelled")
    assert leases.end("a", "released") is None
    assert leases.why_ended("a") == "cancelled"


def test_ended_leases_are_forgotten_in_the_end():
    leases = LeaseTable(remember=2)
    for lease_id in "abc":
        leases.open(lease_id, 1.0, now=0.0)
        leases.end(lease_id, "released")
    assert leases.state("a") is LeaseState.UNKNOWN
    assert leases.state("b") is leases.state("c") is LeaseState.ENDED


def test_keys_and_blocks_must_be_as_many():
    leases = LeaseTable()
    leases.open("a", 1.0, now=0.0)
    with pytest.raises(ValueError):
        leases.add("a", [0, 1], KEYS[:1], now=0.0)


class LeasesAgainstModel(RuleBasedStateMachine):
    """References handed out and given back must balance, whatever comes in whatever order."""

    def __init__(self):
        super().__init__()
        self.leases = LeaseTable()
        self.now = 0.0
        self.owed = [0] * 5
        self.model: dict[str, tuple[LeaseState, float, float]] = {}

    def state(self, lease_id):
        return self.model.get(lease_id, (LeaseState.UNKNOWN, 0.0, 0.0))

    @rule(lease_id=IDS, seconds=st.integers(1, 5))
    def open(self, lease_id, seconds):
        state, *_ = self.state(lease_id)
        assert self.leases.open(lease_id, seconds, self.now) == (state is not LeaseState.ENDED)
        if state is not LeaseState.ENDED:
            self.model[lease_id] = (LeaseState.OPEN, seconds, self.now)

    @rule(lease_id=IDS, seconds=st.integers(1, 5), count=st.integers(1, 5))
    def adopt(self, lease_id, seconds, count):
        unknown = self.state(lease_id)[0] is LeaseState.UNKNOWN
        adopted = self.leases.adopt(lease_id, seconds, list(range(count)), KEYS[:count], self.now)
        assert adopted == unknown
        if adopted:
            self.model[lease_id] = (LeaseState.COMPLETE, seconds, self.now)
            for block in range(count):
                self.owed[block] += 1

    @rule(lease_id=IDS, first=st.integers(0, 4), count=st.integers(0, 5))
    def add(self, lease_id, first, count):
        blocks = list(range(5))[first : first + count]
        new = self.leases.add(lease_id, blocks, [KEYS[b] for b in blocks], self.now)
        state, seconds, _ = self.state(lease_id)
        if state is LeaseState.OPEN:
            self.model[lease_id] = (state, seconds, self.now)
        else:
            assert new == []
        for block in new:
            self.owed[block] += 1

    @rule(lease_id=IDS)
    def complete(self, lease_id):
        state, seconds, _ = self.state(lease_id)
        assert self.leases.complete(lease_id, self.now) == (state is LeaseState.OPEN)
        if state is LeaseState.OPEN:
            self.model[lease_id] = (LeaseState.COMPLETE, seconds, self.now)

    @rule(lease_id=IDS)
    def touch(self, lease_id):
        state, seconds, _ = self.state(lease_id)
        live = state in (LeaseState.OPEN, LeaseState.COMPLETE)
        assert self.leases.touch(lease_id, self.now) == live
        if live:
            self.model[lease_id] = (state, seconds, self.now)

    @rule(lease_id=IDS)
    def end(self, lease_id):
        blocks = self.leases.end(lease_id, "released")
        live = self.state(lease_id)[0] in (LeaseState.OPEN, LeaseState.COMPLETE)
        assert (blocks is not None) == live
        for block in blocks or ():
            self.owed[block] -= 1
        self.model[lease_id] = (LeaseState.ENDED, 0.0, 0.0)

    @rule(seconds=st.integers(0, 4))
    def pass_time(self, seconds):
        self.now += seconds
        due = self.leases.due(self.now)
        assert set(due) == {
            i
            for i, (state, duration, touched) in self.model.items()
            if state is LeaseState.COMPLETE and touched + duration <= self.now
        }
        for lease_id in due:
            self.end(lease_id)

    @invariant()
    def agree(self):
        held = self.leases.held()
        assert [held.get(b, 0) for b in range(5)] == self.owed
        for lease_id in "abc":
            assert self.leases.state(lease_id) is self.state(lease_id)[0]


LeasesAgainstModel.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)
TestLeasesAgainstModel = LeasesAgainstModel.TestCase
