"""What rank 0 tells those that share its model to do next: a few numbers before each step.

An order is broadcast: in one message of a fixed size if it fits, else with a second one. The bytes
of KV blocks that belong to it follow by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.kernels.batch import Batch, DraftRows
from services.engine.torch.parallel.mesh import Mesh
from services.engine.torch.parallel.tensor_gather import lost

FIRST_BYTES = 4096
"""Of the message that every order begins with."""
LENGTH_BYTES = 8

Int32s = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


class What(StrEnum):
    """To be done."""

    BIND = "bind"
    WARM_UP = "warm_up"
    FORWARD = "forward"
    DRAFT = "draft"
    PUT_ADAPTER = "put_adapter"
    DROP_ADAPTER = "drop_adapter"
    END = "end"


@dataclass(frozen=True, slots=True)
class Order:
    """One of them: numbers, texts and bytes by name."""

    what: What
    arrays: Mapping[str, Int32s] = field(default_factory=dict)
    words: Mapping[str, object] = field(default_factory=dict)
    data: tuple[bytes, ...] = ()


def order_of(what: What, rows: Batch | DraftRows, blocks: npt.NDArray[np.int64]) -> Order:
    """To compute a step; the bytes of `blocks` follow."""
    values = {f.name: getattr(rows, f.name) for f in fields(rows)}
    arrays = {k: np.asarray(v, np.int32) for k, v in values.items() if isinstance(v, np.ndarray)}
    words = {k: v for k, v in values.items() if isinstance(v, bool | tuple)}
    return Order(what, {**arrays, "blocks": blocks.astype(np.int32)}, words)


def batch_of(order: Order) -> Batch:
    """The step of an order to compute one."""
    arrays = dict(order.arrays)
    del arrays["blocks"]
    words = order.words
    return Batch(**arrays, hidden=bool(words["hidden"]), adapters=_names(words["adapters"]))


def draft_of(order: Order) -> DraftRows:
    """The rows of an order to draft."""
    arrays = dict(order.arrays)
    del arrays["blocks"]
    words = order.words
    return DraftRows(**arrays, deeper=bool(words["deeper"]), adapters=_names(words["adapters"]))


def _names(found: object) -> tuple[str, ...]:
    assert isinstance(found, list | tuple)
    return tuple(map(str, found))


def packed(order: Order) -> bytes:
    """As bytes; unpacked() is the way back."""
    said = {
        "what": order.what,
        "arrays": [[name, list(array.shape)] for name, array in order.arrays.items()],
        "words": order.words,
        "data": [len(part) for part in order.data],
    }
    head = json.dumps(said).encode()
    arrays = [np.ascontiguousarray(array, np.int32).tobytes() for array in order.arrays.values()]
    return b"".join((len(head).to_bytes(LENGTH_BYTES, "little"), head, *arrays, *order.data))


def unpacked(raw: bytes) -> Order:
    """See packed()."""
    at = LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")
    said = json.loads(raw[LENGTH_BYTES:at])
    arrays = {}
    for name, shape in said["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(raw, np.int32, count, at).reshape(shape)
        at += 4 * count
    data = []
    for size in said["data"]:
        data.append(raw[at : at + size])
        at += size
    return Order(What(said["what"]), arrays, said["words"], tuple(data))


class OrderLine:
    """From rank 0 to the others. Both raise WorkerLostError if one is gone."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.bytes = 0
        """Of orders and blocks, to each other rank."""

    def send(self, order: Order) -> None:
        """Of rank 0."""
        raw = packed(order)
        first = np.zeros(FIRST_BYTES, np.uint8)
        first[:LENGTH_BYTES] = np.frombuffer(len(raw).to_bytes(LENGTH_BYTES, "little"), np.uint8)
        found = np.frombuffer(raw, np.uint8)
        inline = found[: FIRST_BYTES - LENGTH_BYTES]
        first[LENGTH_BYTES : LENGTH_BYTES + len(inline)] = inline
        self.spread(first)
        if len(found) > len(inline):
            self.spread(found[len(inline) :].copy())

    def take(self) -> Order:
        """Of the others: waits for the next."""
        first = np.empty(FIRST_BYTES, np.uint8)
        self.spread(first)
        size = int.from_bytes(first[:LENGTH_BYTES].tobytes(), "little")
        inline = first[LENGTH_BYTES : LENGTH_BYTES + size].tobytes()
        rest = np.empty(size - len(inline), np.uint8)
        if len(rest):
            self.spread(rest)
        return unpacked(inline + rest.tobytes())

    def spread(self, data: Bytes) -> None:
        """What rank 0 has in `data` the others have in theirs, of the same size."""
        self.bytes += data.nbytes
        try:
            self._mesh.spread(torch.from_numpy(data))
        except RuntimeError as error:
            raise lost(error) from error
