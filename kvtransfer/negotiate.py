"""Which transport a fetch uses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.errors import NoTransportError
from kvtransfer.transports.base import Offer


class Judge(Protocol):
    """The part of a transport that negotiation asks."""

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """Why it does not fit; "" if it does."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why, in words."""

    name: str
    why: str


def choose(
    source: Sequence[Offer],
    sink: Sequence[Offer],
    judges: Mapping[str, Judge],
    not_offered: Mapping[str, str],
) -> Choice:
    """The first of the source's offers, best first, that the sink has too and nothing prevents.

    `not_offered` says of transports that the source was told to offer and can't, why. Raises
    NoTransportError that says of each transport why it does not fit.
    """
    of_sink = {offer.name: offer for offer in sink}
    passed = dict(not_offered)
    for offer in source:
        other = of_sink.get(offer.name)
        if other is None:
            passed[offer.name] = "the sink does not offer it"
            continue
        obstacle = judges[offer.name].obstacle(offer, other)
        if not obstacle:
            return Choice(offer.name, _why(offer.name, passed))
        passed[offer.name] = obstacle
    for name in of_sink:
        passed.setdefault(name, "the source does not offer it")
    raise NoTransportError(
        "no transport fits both sides: " + _listed(passed),
        source=",".join(offer.name for offer in source),
        sink=",".join(of_sink),
    )


def _why(name: str, passed: Mapping[str, str]) -> str:
    if not passed:
        return f"{name} is the best offered"
    return f"{name} fits; not {_listed(passed)}"


def _listed(passed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in passed.items()) or "neither offers any"
