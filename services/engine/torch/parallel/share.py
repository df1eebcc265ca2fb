"""What loading a model as one rank of several is given, and gives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch

from services.engine.api import ExpertShape
from services.engine.group.part import Part
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.moe_steps import ExpertSteps
from services.engine.torch.moe import ExpertCompute
from services.engine.torch.parallel.exchange import ExpertExchange
from services.engine.torch.parallel.experts import RankExperts
from services.engine.torch.parallel.mesh import PATIENCE, Mesh, find_store, open_store
from services.engine.torch.parallel.rounds import MeshRounds
from services.engine.torch.shapes import MoeShape
from services.engine.torch.tensors import TensorFiles
from services.engine.torch.weights import ModelWeights
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings


def join(part: Part, patience: timedelta = PATIENCE) -> Mesh:
    """Meets the other ranks; see Mesh. Blocks until all are there."""
    if part.rank == 0:
        store, address = open_store(part.host, part.ranks)
        part.announce(address)
    else:
        store = find_store(part.find(), part.ranks)
    return Mesh(store, part.rank, part.ranks, part.host, patience)


class ExpertShare:
    """One rank's share of the experts, while its model is loaded and then."""

    rounds: MeshRounds
    experts: RankExperts

    def __init__(self, part: Part, moe: MoeShape, layers: int, engine: EngineSettings) -> None:
        """layers: those with experts. Raises SettingsError if they can't be shared so."""
        physical = moe.experts + engine.redundant_experts
        if physical % part.ranks:
            raise SettingsError(
                f"engine.redundant_experts: {moe.experts} experts and {engine.redundant_experts} "
                f"redundant ones can't be shared evenly by {part.ranks} ranks (engine.ranks)"
            )
        self._part = part
        self._moe = moe
        self._threads = engine.threads
        self._dtype = torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32
        self._physical = physical
        each = physical // part.ranks
        first = part.rank * each
        here = tuple(place % moe.experts for place in range(first, first + each))
        self.places = [here] * layers
        """The expert in each place here, by layer with experts, before any plan."""

    def compute(self, config: ModelConfig, weights: ModelWeights) -> ExpertCompute:
        """What applies experts, wherever they are. Meets the other ranks."""
        mesh = join(self._part)
        layer = weights.experts[0]
        moe = self._moe
        shape = ExpertShape(
            layers=len(weights.experts),
            logical=moe.experts,
            physical=self._physical,
            groups=moe.groups,
            hosts=1,
            gpus=mesh.ranks,
            expert_bytes=layer.gate_up[0].nbytes + layer.down[0].nbytes,
        )
        # The model, which counts them, is made of what this returns.
        self.experts = RankExperts(mesh, shape, weights.experts)
        self.rounds = MeshRounds(mesh, self._part.want_round, self.experts)
        local = ExpertSteps(
            weights.experts, config.hidden, moe.intermediate, self._dtype, self._threads
        )
        return ExpertExchange(
            mesh,
            local,
            self.experts.replicas,
            places=self._physical // mesh.ranks,
            choices=moe.choices,
            hidden=config.hidden,
            dtype=self._dtype,
        )


def share_of(part: Part | None, folder: Path, engine: EngineSettings) -> ExpertShare | None:
    """None if the model is computed by this rank alone, as one without experts is."""
    config = ModelConfig.from_folder(folder)
    if part is None or config.moe is None:
        if engine.redundant_experts:
            raise SettingsError(
                "engine.redundant_experts: only a model with experts has them, with engine.ranks"
            )
        return None
    layers = sum(config.sparse)
    if engine.draft_tokens and config.draft_layers:
        # The weights may lack the layer that config.json has.
        files = TensorFiles(folder, config.fp8_block)
        layers += f"model.layers.{config.layers}.eh_proj.weight" in files
    return ExpertShare(part, config.moe, layers, engine)
