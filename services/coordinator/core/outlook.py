"""What is foreseen for one candidate, by what all workers have measured."""

from __future__ import annotations

from collections.abc import Hashable

from services.coordinator.core.membership import Worker
from services.coordinator.core.paths import route
from services.coordinator.core.pools import Pool
from services.coordinator.core.predict import NOMINAL_TOKENS_PER_SECOND, Forecast, Predictor, Prompt
from services.coordinator.core.scoring import Candidate


def kind_of(worker: Worker) -> Hashable:
    """Workers whose figures may stand for each other's."""
    return worker.info.model, worker.info.kv_layout, worker.info.role


def foresee_prompt(predictor: Predictor, candidate: Candidate) -> None:
    """Fills in when the candidate would have the prompt done, and its KV at the decode worker."""
    worker, sink = candidate.worker, candidate.beside
    uncached = candidate.uncached_tokens
    prompt = Prompt(
        worker.info.worker_id,
        worker.load.queued_tokens,
        uncached,
        candidate.context_tokens - uncached,
    )
    candidate.prompt = prompt
    candidate.known_seconds = predictor.prompt_seconds(prompt)
    nominal = (prompt.queued_tokens + uncached) / NOMINAL_TOKENS_PER_SECOND
    candidate.prompt_seconds = candidate.known_seconds or nominal
    if sink is not None:
        way = route(worker.info, sink.info)
        candidate.path = way.path
        size = worker.info.kv_block_bytes * candidate.blocks
        if size:
            rates = predictor.sink(sink.info.worker_id)
            candidate.transfer_seconds = rates.seconds(size, way)


def foresee_tokens(predictor: Predictor, candidate: Candidate) -> None:
    """Fills in the time between tokens with the request on the candidate's rank."""
    ranks = [(rank.requests, rank.kv_tokens) for rank in candidate.worker.load.ranks]
    candidate.itl_seconds = predictor.itl_seconds(
        candidate.worker.worker_id, ranks, candidate.rank, candidate.context_tokens
    )


def least(predictor: Predictor, pool: Pool, uncached_tokens: int) -> Forecast:
    """The best that a request may hope for in a pool; 0 for what nobody there has measured."""
    sides = (pool.prefill, pool.decode)
    roles = {role for side in sides for role, count in side.roles.items() if count}
    floors = {r: predictor.floor((pool.model, pool.kv_layout, r), uncached_tokens) for r in roles}
    return Forecast(
        prompt_seconds=min((f.prompt_seconds for f in floors.values()), default=0.0),
        itl_seconds=min((f.itl_seconds for r, f in floors.items() if r.decodes), default=0.0),
    )
