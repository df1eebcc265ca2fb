import pytest

from kvtransfer.errors import NoTransportError
from kvtransfer.negotiate import choose
from kvtransfer.transports.base import Offer


class Judge:
    def __init__(self, obstacle: str = "") -> None:
        self._obstacle = obstacle

    def obstacle(self, source: Offer, sink: Offer) -> str:
        return self._obstacle


def offers(*names: str) -> list[Offer]:
    return [Offer(name, {}) for name in names]


FITS = {"shm": Judge(), "tcp": Judge(), "nixl": Judge()}


def test_first_of_the_source_that_the_sink_has():
    choice = choose(offers("nixl", "shm", "tcp"), offers("tcp", "shm"), FITS, {})
    assert choice.name == "shm"
    assert choice.why == "shm fits; not nixl: the sink does not offer it"


def test_the_best_needs_no_excuse():
    assert choose(offers("shm"), offers("shm"), FITS, {}).why == "shm is the best offered"


def test_obstacles_are_passed_over_and_told():
    judges = {**FITS, "shm": Judge("other host")}
    choice = choose(offers("shm", "tcp"), offers("shm", "tcp"), judges, {})
    assert choice.name == "tcp"
    assert "shm: other host" in choice.why


def test_what_the_source_can_not_offer_is_told():
    choice = choose(offers("tcp"), offers("shm", "tcp"), FITS, {"shm": "no memfd"})
    assert "shm: no memfd" in choice.why


def test_nothing_fits():
    with pytest.raises(NoTransportError) as raised:
        choose(offers("shm"), offers("shm", "tcp"), {"shm": Judge("other host")}, {"nixl": "none"})
    for part in ("shm: other host", "tcp: the source does not offer it", "nixl: none"):
        assert part in raised.value.message
    assert raised.value.metadata == {"source": "shm", "sink": "shm,tcp"}


@pytest.mark.parametrize(("source", "sink"), [((), ()), (("tcp",), ()), ((), ("tcp",))])
def test_one_side_has_nothing(source, sink):
    with pytest.raises(NoTransportError):
        choose(offers(*source), offers(*sink), FITS, {})


ALL = ("shm", "nixl", "ucx", "tcp")


def test_on_one_host_shared_memory_and_on_two_the_best_that_both_have():
    judges = {name: Judge() for name in ALL}
    assert choose(offers(*ALL), offers(*ALL), judges, {}).name == "shm"
    judges["shm"] = Judge("not on one host")
    choice = choose(offers(*ALL), offers(*ALL), judges, {})
    assert (choice.name, choice.why) == ("nixl", "nixl fits; not shm: not on one host")
    choice = choose(offers(*ALL), offers("shm", "ucx", "tcp"), judges, {})
    assert choice.name == "ucx"
    assert choice.why == "ucx fits; not shm: not on one host; nixl: the sink does not offer it"
    why = {"nixl": "NIXL is not installed", "ucx": "UCX is not installed"}
    choice = choose(offers("shm", "tcp"), offers(*ALL), judges, why)
    assert choice.name == "tcp"
    assert "nixl: NIXL is not installed; ucx: UCX is not installed" in choice.why
