"""Tensor parallelism: rank 0 has the engine, the others compute along.

Rank 0 tells what it is about to compute (tensor_orders.py), and all compute it: each its columns
and heads of every layer, which are brought together behind the layer (tensor_gather.py). Sampling,
scheduling, caches and everything that others see are rank 0's alone.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtransfer.layout import KvLayout
from services.engine.adapters import Adapter, AdapterFiles, AdapterLimits
from services.engine.stepped.rounds import Alone
from services.engine.torch.kernels.batch import Batch, DraftRows
from services.engine.torch.lora import LoraAdapters, LoraWeights
from services.engine.torch.model import AfterLayers, Logits, Pool, TorchModel
from services.engine.torch.parallel.mesh import Mesh
from services.engine.torch.parallel.tensor_mirror import Mirror
from services.engine.torch.parallel.tensor_orders import (
    Order,
    OrderLine,
    What,
    batch_of,
    draft_of,
    order_of,
)

log = logging.getLogger(__name__)

NONE = np.zeros(0, np.int64)


class Together(Alone):
    """Rounds of an engine whose model is shared: a step that fails leaves the others waiting."""

    shared = True


class TensorLead:
    """The model of rank 0 as its engine calls it: what is asked, the others are told first."""

    def __init__(self, model: TorchModel, mesh: Mesh) -> None:
        self._model = model
        self._line = OrderLine(mesh)
        self._mirror: Mirror | None = None
        self._pool: Pool | None = None
        self.adapters = LeadAdapters(model.adapters, self._line)

    @property
    def layout(self) -> KvLayout:
        """See TorchModel."""
        return self._model.layout

    @property
    def numerics(self) -> str:
        """See TorchModel."""
        return self._model.numerics

    @property
    def told_bytes(self) -> int:
        """Of orders and KV blocks, to each other rank."""
        return self._line.bytes

    def bind(self, memory: Pool) -> None:
        """See TorchModel. The others make pools of as many blocks."""
        self._line.send(Order(What.BIND, {"blocks": np.array([len(memory)], np.int32)}))
        self._pool = memory
        self._model.bind(memory)

    def mirror(self, generations: npt.NDArray[np.uint64]) -> None:
        """Of the pool's blocks, at any time. To be called before the first step."""
        self._mirror = Mirror(generations, self._model.layout.block_tokens)

    def warm_up(self) -> None:
        """See TorchModel."""
        self._line.send(Order(What.WARM_UP))
        self._model.warm_up()

    def forward(
        self, batch: Batch, after_layers: AfterLayers | None = None, layers_per_piece: int = 1
    ) -> Logits:
        """See TorchModel. Raises WorkerLostError too."""
        if len(batch.token_ids):
            assert self._mirror is not None, "mirror() comes before the first step"
            assert self._pool is not None, "bind() comes before the first step"
            blocks = self._mirror.step(batch)
            self._line.send(order_of(What.FORWARD, batch, blocks))
            if len(blocks):
                self._line.spread(self._pool[blocks])
        return self._model.forward(batch, after_layers, layers_per_piece)

    def draft(self, batch: DraftRows) -> Logits:
        """See TorchModel. Raises WorkerLostError too.

        It reads what the forward() before it read or wrote, and what draft() wrote: all have that.
        """
        if len(batch.token_ids):
            self._line.send(order_of(What.DRAFT, batch, NONE))
        return self._model.draft(batch)

    def end(self) -> None:
        """There are no more steps."""
        self._line.send(Order(What.END))


class LeadAdapters:
    """See stepped.batch.Adapters: of all ranks. Between two steps each makes its own weights."""

    def __init__(self, own: LoraAdapters, line: OrderLine) -> None:
        self._own = own
        self._line = line

    def read(
        self, files: AdapterFiles, limits: AdapterLimits
    ) -> tuple[Adapter, tuple[AdapterFiles, LoraWeights]]:
        """See Adapters. What can be made into weights here the others can."""
        adapter, weights = self._own.read(files, limits)
        return adapter, (files, weights)

    def put(self, adapter_id: str, weights: Any) -> None:
        """See Adapters."""
        files, mine = weights
        words = {"id": files.id}
        self._line.send(Order(What.PUT_ADAPTER, words=words, data=(files.config, files.weights)))
        self._own.put(adapter_id, mine)

    def drop(self, adapter_id: str) -> None:
        """See Adapters."""
        self._line.send(Order(What.DROP_ADAPTER, words={"id": adapter_id}))
        self._own.drop(adapter_id)


def follow(model: TorchModel, mesh: Mesh, limits: AdapterLimits) -> None:
    """What all but rank 0 do until they are told that it is over. Raises WorkerLostError.

    limits: of adapters, which rank 0 has checked.
    """
    line = OrderLine(mesh)
    pool = np.zeros((0, model.layout.block_bytes), np.uint8)
    while (order := line.take()).what is not What.END:
        match order.what:
            case What.BIND:
                (blocks,) = order.arrays["blocks"].tolist()
                pool = np.zeros((blocks, model.layout.block_bytes), np.uint8)
                model.bind(pool)
            case What.WARM_UP:
                model.warm_up()
            case What.FORWARD:
                _receive(line, pool, order.arrays["blocks"])
                model.forward(batch_of(order))
            case What.DRAFT:
                model.draft(draft_of(order))
            case What.PUT_ADAPTER:
                config, weights = order.data
                files = AdapterFiles(str(order.words["id"]), config, weights)
                adapter, made = model.adapters.read(files, limits)
                model.adapters.put(adapter.id, made)
            case What.DROP_ADAPTER:
                model.adapters.drop(str(order.words["id"]))


def _receive(line: OrderLine, pool: Pool, blocks: npt.NDArray[np.int32]) -> None:
    if len(blocks):
        found = np.empty((len(blocks), pool.shape[1]), np.uint8)
        line.spread(found)
        pool[blocks] = found
