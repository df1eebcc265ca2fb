"""A transport that was asked for and can't move the memory there is: it says why, and no more."""

from __future__ import annotations

from typing import NoReturn

from kvtransfer.errors import TransportUnusableError
from kvtransfer.transports.base import Offer, Reader


class UnfitTransport:
    """In the place of the transport `name`; everything but why_not() and close() raises."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self._why = why

    def why_not(self) -> str:
        """Why it does not fit."""
        return self._why

    async def start(self) -> None:
        """Can't be."""
        self._refuse()

    async def close(self) -> None:
        """Nothing was begun."""

    def source_offer(self) -> Offer:
        """Can't be."""
        self._refuse()

    def sink_offer(self) -> Offer:
        """Can't be."""
        self._refuse()

    def ticket(self) -> Offer:
        """Can't be."""
        self._refuse()

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """The same as why_not()."""
        return self._why

    async def connect(self, ticket: Offer, address: str, timeout: float) -> Reader:
        """Can't be."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TransportUnusableError(f"{self.name}: {self._why}")
