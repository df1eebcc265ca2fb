"""The training loop: a budget of minutes, checkpoints that it goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.tiny_deepseek import data
from training.tiny_deepseek.data import Tokens, Windows
from training.tiny_deepseek.evaluate import evaluate
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.optimizer import optimizers
from training.tiny_deepseek.shape import Shape
from training.tiny_deepseek.together import Together, join

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train. Rates fall from the moment `steady` of the time is over, linearly to nothing.

    phases: (until which part of the time, window length); tokens_a_step, in each
    process, is the same in all.
    """

    minutes: float
    seed: int = 0
    tokens_a_step: int = 3072
    phases: tuple[tuple[float, int], ...] = ((0.65, 256), (0.9, 512), (1.0, 1024))
    muon: float = 0.015
    adam: float = 0.004
    draft_weight: float = 0.3
    balance: float = 0.002
    warmup_steps: int = 40
    steady: float = 0.45
    clip: float = 1.0
    save_seconds: float = 120.0
    look_seconds: float = 400.0

    def speed(self, progress: float, step: int) -> float:
        """What the learning rates are multiplied by."""
        falling = min(1.0, (1.0 - progress) / (1.0 - self.steady))
        return max(falling, 0.0) * min(1.0, (step + 1) / self.warmup_steps)

    def length(self, progress: float) -> int:
        """Tokens of a window."""
        return next((size for end, size in self.phases if progress < end), self.phases[-1][1])


class Training:
    """A model, its optimizers and where it stands."""

    def __init__(self, shape: Shape, plan: Plan, found: Tokens, together: Together) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.data, self.together = plan, found, together
        self.model = TinyDeepseek(shape)
        self.optimizers = optimizers(self.model, plan.muon, plan.adam)
        self.windows = Windows(found.train, (plan.seed, together.rank, 0))
        self.seconds = 0.0
        self.steps = 0
        self.tokens = 0

    @property
    def progress(self) -> float:
        """Part of the time that is spent."""
        return self.seconds / (60 * self.plan.minutes)

    def step(self) -> tuple[float, float]:
        """One step; returns the losses of the next token and of the drafts, nats a token."""
        plan, speed = self.plan, self.plan.speed(self.progress, self.steps)
        length = plan.length(self.progress)
        windows = self.windows.draw(plan.tokens_a_step // length, length + 1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * speed
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model(windows[:, :-1], draft=True)
            loss, draft_loss = (_loss(x, windows[:, 1:]) for x in (out.logits, out.drafts))
        torch.autograd.backward(loss + plan.draft_weight * draft_loss)
        losses = torch.stack([loss.detach(), draft_loss.detach()])
        loads = [load.float() for load in out.loads]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.together.average([*gradients, *loads, losses])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for router, load in zip(self.model.routers(), loads, strict=True):
            router.balance(load, plan.balance * speed)
        self.steps += 1
        self.tokens += windows[:, 1:].numel() * self.together.size
        return losses[0].item(), losses[1].item()

    def save(self, path: Path) -> None:
        """A checkpoint; the one before it stays until this one is whole."""
        state: dict[str, Any] = {
            "shape": self.model.shape.as_dict(),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens": self.tokens,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        """Goes on where a checkpoint was saved, with this plan's minutes and rates."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.seconds, self.steps, self.tokens = state["seconds"], state["steps"], state["tokens"]
        seed = (self.plan.seed, self.together.rank, self.steps)
        self.windows = Windows(self.data.train, seed)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(training: Training, folder: Path, say: Callable[[str], None]) -> None:
    """Trains until the time is over; counts only time that steps took, over all runs."""
    path, first = folder / CHECKPOINT, training.together.rank == 0
    if path.exists():
        training.restore(path)
        say(f"goes on from step {training.steps}, {training.seconds / 60:.1f} min")
    saved = looked = training.seconds
    while training.progress < 1:
        start = time.perf_counter()
        loss, draft_loss = training.step()
        training.seconds += training.together.first(time.perf_counter() - start)
        if not first:
            continue
        if training.steps % 20 == 0:
            say(
                f"step {training.steps}, {training.seconds / 60:.1f} min,"
                f" {training.tokens / 1e6:.2f}M tokens,"
                f" {training.tokens / training.seconds:.0f} a second:"
                f" loss {loss:.3f}, of drafts {draft_loss:.3f}"
            )
        if training.seconds - saved > training.plan.save_seconds:
            saved = training.seconds
            training.save(path)
        if training.seconds - looked > training.plan.look_seconds:
            looked = training.seconds
            say(str(evaluate(training.model, training.data, windows=8, length=256)))
    if first:
        training.save(path)


def run(rank: int, processes: int, address: str, plan: Plan, folder: Path) -> None:
    """Process `rank` of those that train together; the first one speaks and saves."""
    torch.set_num_threads(1)
    together = join(rank, processes, address)
    training = Training(Shape(), plan, data.load(folder / "data"), together)
    if rank == 0:
        parameters = sum(p.numel() for p in training.model.parameters())
        print(f"{parameters / 1e6:.2f}M parameters", flush=True)
    train(training, folder, lambda line: print(line, flush=True) if rank == 0 else None)


def load(path: Path) -> TinyDeepseek:
    """The model of a checkpoint."""
    state = torch.load(path, weights_only=True)
    model = TinyDeepseek(Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    return model.eval()
