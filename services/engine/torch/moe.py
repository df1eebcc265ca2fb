"""Mixture of experts: route, compute, combine.

A row chooses its experts (`route`), each expert's linear layers are applied to the rows that chose it
(`ExpertCompute`: here, or wherever the experts are), and the row's owner adds up what comes back, in
float32, in the order in which the row chose (`combine`). So a row's bits depend neither on its
company nor on where a replica of an expert ran.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Int32s = npt.NDArray[np.int32]


class ExpertCompute(Protocol):
    """Applies experts to the rows that chose them.

    It is called once for every mixture-of-experts layer of every step, in their order, also where no
    row is left (n = 0): so ranks that exchange rows meet here.
    """

    def __call__(
        self, layer: int, x: torch.Tensor, ids: Int32s
    ) -> tuple[torch.Tensor, Int32s]:
        """Experts ids [n, k] (-1: none) of the layer applied to x [n, hidden].

        layer counts the layers with experts alone, that of multi-token prediction last. Returns rows
        [m, hidden] of x's dtype, unweighted, in any order, and where int32 [n, k]: which of them is
        that of a row and choice, -1 where the id was. x must stay as it is until this returns;
        what is returned stands until the next call.
        """
