"""The least of many things whose keys change."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Ranking(Generic[T]):
    """Items by key, least first; of equal ones, the one that was put first. O(log n) amortized.

    A heap in which former places of an item stay until they come up, or outnumber the others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._place: dict[T, tuple[float, int, T]] = {}
        self._puts = 0

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, item: T) -> bool:
        return item in self._place

    def put(self, item: T, key: float) -> None:
        """Takes an item in, or gives it another key; behind those that have the same one."""
        self._puts += 1
        self._place[item] = place = (key, self._puts, item)
        heapq.heappush(self._heap, place)
        if len(self._heap) > 2 * len(self._place) + 64:
            self._heap = list(self._place.values())
            heapq.heapify(self._heap)

    def discard(self, item: T) -> None:
        """Takes an item out, if it is here."""
        self._place.pop(item, None)

    def first(self, count: int = 1) -> list[T]:
        """The least items, in order; `count` at most."""
        places: list[tuple[float, int, T]] = []
        while len(places) < count and (place := self._top()) is not None:
            places.append(heapq.heappop(self._heap))
        for place in places:
            heapq.heappush(self._heap, place)
        return [item for _, _, item in places]

    def least(self) -> float | None:
        """The least key; None if nothing is here."""
        place = self._top()
        return None if place is None else place[0]

    def pop_through(self, key: float) -> list[T]:
        """Takes out all items whose key is at most this one, in order."""
        items = []
        while (place := self._top()) is not None and place[0] <= key:
            heapq.heappop(self._heap)
            del self._place[place[2]]
            items.append(place[2])
        return items

    def _top(self) -> tuple[float, int, T] | None:
        """The least place; those that were left are gone before."""
        heap = self._heap
        while heap:
            if self._place.get(heap[0][2]) is heap[0]:
                return heap[0]
            heapq.heappop(heap)
        return None
