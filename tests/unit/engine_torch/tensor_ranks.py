"""Ranks that share a model, as threads of this process with a mesh between them."""

from __future__ import annotations

import concurrent.futures

from services.engine.group.part import Part
from services.engine.torch.model import TorchModel
from services.engine.torch.parallel.share import join
from services.engine.torch.parallel.tensor_cuts import Cuts
from services.engine.torch.parallel.tensor_gather import TensorGather

WAIT = 120
BLOCK = 16


class TensorRanks:
    """do() runs something with every rank's model, at once."""

    def __init__(self, count: int, folder, **load) -> None:
        self.count = count
        self._threads = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(count)]
        self._address: concurrent.futures.Future[str] = concurrent.futures.Future()
        self.meshes = [None] * count
        self.gathers: list[TensorGather] = []
        given = {"block_tokens": BLOCK, "threads": 1} | load
        self.models = self.each(
            lambda rank: TorchModel.load(
                folder, cuts=Cuts(rank, count), meet=lambda: self._meet(rank), **given
            )
        )

    def _meet(self, rank: int) -> TensorGather:
        address = self._address
        part = Part(
            rank,
            self.count,
            f"127.0.0.{rank + 1}",
            address.set_result,
            lambda: address.result(WAIT),
            print,
        )
        self.meshes[rank] = join(part)
        self.gathers.append(TensorGather(self.meshes[rank]))
        return self.gathers[-1]

    def each(self, work):
        """work(rank) on each rank's thread; what they return."""
        tasks = [t.submit(work, n) for n, t in enumerate(self._threads)]
        return [t.result(WAIT) for t in tasks]

    def do(self, work):
        """work(model) on each."""
        return self.each(lambda rank: work(self.models[rank]))

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()
