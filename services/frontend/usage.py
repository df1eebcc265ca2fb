"""Prompt tokens that were not computed for a request, over all its attempts."""

from __future__ import annotations

from collections.abc import Iterable

from services.frontend.attempt import Attempt


def cached_tokens(prompt_tokens: int, attempts: Iterable[Attempt]) -> int:
    """Length of the prompt's prefix whose KV no worker computed for this request.

    Caches hold prefixes, so what a worker computed is a suffix of the attempt's context, and what
    all attempts left uncomputed is the shortest of their prefixes.
    """
    least = prompt_tokens
    for attempt in attempts:
        least = min(least, *_uncomputed(attempt))
    return max(0, least)


def _uncomputed(attempt: Attempt) -> list[int]:
    """Tokens from the context's start that each worker of the attempt did not compute."""
    prefill, decode, placement = attempt.prefill_kv, attempt.decode_kv, attempt.placement
    runner = placement.prefill or placement.decode
    report = prefill if placement.prefill else decode
    found = [attempt.context_tokens]
    if report is not None:
        # What it took from a worker that held it was not computed either.
        elsewhere = report.prefix.tokens if report.prefix is not None else 0
        found.append(report.cached_tokens + elsewhere)
    elif attempt.tokens or attempt.accepted:
        # It was at work and took its report with it: what it was known to hold is all we have.
        found.append(runner.cached_tokens)
    if placement.prefill is not None and decode is not None:
        # Only where a fetch failed and the decode worker went on by itself.
        found.append(attempt.context_tokens - decode.computed_tokens)
    return found
