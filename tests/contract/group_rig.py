"""A group whose ranks are tasks of this process: quick to start, and open to look into."""

from __future__ import annotations

import asyncio

from services.engine.build import build_rank, compute_along
from services.engine.group.engine import GroupEngine
from services.engine.group.rank import Rank
from services.engine.group.task import Task
from services.runtime.settings import RankSettings, ServerSettings


class Tasks:
    """See launch.Launch. Everything goes over real connections."""

    def __init__(self, make=build_rank) -> None:
        self.ranks: list[Rank] = []
        self.tasks: list[asyncio.Task] = []
        self._make = make

    async def start(self, address, ranks, ended) -> None:
        for number in ranks:
            settings = RankSettings(group=address, number=number)
            rank = Rank(settings, ServerSettings(), self._make, compute_along)
            self.ranks.append(rank)
            self.tasks.append(asyncio.create_task(rank.run(lambda address: None)))

    async def end(self, grace_seconds: float) -> None:
        if self.tasks and grace_seconds:
            await asyncio.wait(self.tasks, timeout=grace_seconds)
        for task in self.tasks:
            task.cancel()
        found = await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []
        for rank in self.ranks:  # a process would just be gone
            if rank.engine is not None:
                await rank.engine.close()
        if grace_seconds:
            for error in found:
                if isinstance(error, Exception):
                    raise error


class Group(GroupEngine):
    """Tests of one engine look into rank 0, which has all requests that name no other."""

    def __init__(self, task: Task) -> None:
        self.launch = Tasks()
        super().__init__(task, self.launch, ServerSettings())

    @property
    def first(self):
        return self.launch.ranks[0].engine

    @property
    def _store(self):
        return self.first._store

    @property
    def _stepper(self):
        return self.first._stepper
