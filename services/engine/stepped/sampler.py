"""From logits to tokens: what comes out of a row depends on that row and its request alone.

The order of things, on float32 logits of one row: tokens that a guide forbids; penalties; the
request's own bias; tokens that min_tokens forbids, unless a guide leaves no other;
division by temperature; top-k; top-p of the mass that top-k left; min-p; inverse transform over
the tokens left, in order of id, with one uniform of (seed, position). Ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.api import Sampling, TokenLogprob
from services.engine.stepped.philox import uniform

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

# Weights relative to the greatest that are tried as lower bounds in the search for the k greatest:
# few tokens pass, so the exact selection is among few.
_CUTS = (1e-2, 1e-4, 1e-8)
# The same for the most probable tokens of a given mass; all tokens pass the last.
_BOUNDS = tuple(np.float32(b) for b in (0.1, 0.02, 4e-3, 1e-3, 2e-4, 2e-5, 2e-7, 0.0))
_GROUP = 256
# Weights that are sorted as they are; trailing bits of a float32 that its bucket leaves out.
_FEW, _BUCKET_BITS = 1024, 16


class Occurrences:
    """Which tokens a sequence has, and how often its output has each; follows it as it grows."""

    def __init__(self, prompt: Seq[int]) -> None:
        self._known = len(prompt)
        self._seen = np.unique(np.asarray(prompt, dtype=np.intp))
        self._counts: dict[int, int] = {}

    def follow(self, tokens: Seq[int]) -> None:
        """`tokens` is the whole sequence, of which the rest since the last call is new."""
        new = tokens[self._known :]
        for token in new:
            self._counts[token] = self._counts.get(token, 0) + 1
        if new:
            self._known = len(tokens)
            self._seen = np.union1d(self._seen, np.asarray(new, dtype=np.intp))

    def penalize(self, row: Floats, sampling: Sampling) -> None:
        """Changes logits [vocabulary] in place."""
        seen = self._seen[self._seen < len(row)]
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            values = row[seen]
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = np.fromiter(self._counts, dtype=np.intp)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            inside = ids < len(row)
            row[ids[inside]] -= np.float32(sampling.presence_penalty) + counts[inside] * np.float32(
                sampling.frequency_penalty
            )


@dataclass(frozen=True, slots=True)
class Row:
    """Whose logits a row is: the token at index `position` of its sequence is to be chosen."""

    sampling: Sampling
    position: int
    occurrences: Occurrences | None = None
    """Needed if `penalized(sampling)`; up to date."""
    forbidden: frozenset[int] = frozenset()
    """Tokens that min_tokens rules out as yet."""
    allowed: NDArray[np.uint32] | None = None
    """Tokens that a guide allows, a bit each, 32 to a word; None: all."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and its log-probability if that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


def penalized(sampling: Sampling) -> bool:
    """Whether the choice depends on which tokens the sequence has."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def sample(logits: Floats, rows: Seq[Row]) -> list[Choice | None]:
    """Chooses a token for each row of float32 [len(rows), vocabulary].

    None stands for a row from which none can be chosen: it has a NaN, or no finite logit.
    """
    best = logits.argmax(axis=1)
    return [choose(row, logits[i], int(best[i])) for i, row in enumerate(rows)]


def choose(row: Row, raw: Floats, best: int) -> Choice | None:
    """The same for one row, float32 [vocabulary], of which `best` is the greatest's index."""
    token = token_of(row, raw, best)
    if token is None or row.sampling.logprobs is None:
        return None if token is None else Choice(token)
    return Choice(token, _logprob(raw, token, row.sampling.logprobs))


def token_of(row: Row, raw: Floats, best: int) -> int | None:
    """What choose() chooses, without its log-probability."""
    if not np.isfinite(raw[best]):
        return None
    sampling = row.sampling
    logits = raw
    if row.forbidden or row.allowed is not None or penalized(sampling) or sampling.logit_bias:
        logits = _adjusted(row, raw)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            return None
    if sampling.temperature == 0:
        return best
    return _draw(logits, best, sampling, uniform(sampling.seed, row.position))


def _adjusted(row: Row, raw: Floats) -> Floats:
    logits = raw.copy() if row.allowed is None else _masked(raw, row.allowed)
    if row.occurrences is not None:
        row.occurrences.penalize(logits, row.sampling)
    for token, bias in row.sampling.logit_bias:
        if token < len(logits):
            logits[token] += np.float32(bias)
    forbidden = [t for t in row.forbidden if t < len(logits)]
    if row.allowed is None or np.isfinite(np.delete(logits, forbidden)).any():
        logits[forbidden] = -np.inf
    return logits


def _masked(raw: Floats, allowed: NDArray[np.uint32]) -> Floats:
    bits = np.unpackbits(allowed.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    masked: Floats = np.where(bits[: len(raw)].view(np.bool_), raw, np.float32(-np.inf))
    return masked


def _draw(logits: Floats, best: int, sampling: Sampling, u: float) -> int:
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats = logits - logits[best]
        weights /= np.float32(max(sampling.temperature, 1e-6))
        np.exp(weights, out=weights)
    ids = _kept(weights, sampling)
    index = _locate(weights if ids is None else weights[ids], u)
    return index if ids is None else int(ids[index])


def _locate(weights: Floats, u: float) -> int:
    """Index whose interval holds u, intervals being laid end to end and scaled to [0, 1)."""
    # Sums of groups first: a running sum over a whole vocabulary is slow.
    starts = np.arange(0, len(weights), _GROUP)
    groups = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    point = u * groups[-1]
    group = _first_above(groups, point)
    if group:
        point -= groups[group - 1]
    members = np.cumsum(weights[starts[group] :][:_GROUP], dtype=np.float64)
    return int(starts[group]) + _first_above(members, point)


def _first_above(reached: NDArray[np.float64], point: float) -> int:
    """First index with reached > point; rounding must not step over the last with a weight."""
    index = int(np.searchsorted(reached, point, side="right"))
    return min(index, int(np.searchsorted(reached, reached[-1], side="left")))


def _kept(weights: Floats, sampling: Sampling) -> Ids | None:
    """Ids of the tokens that the filters leave, ascending; None stands for all."""
    ids: Ids | None = None
    if 0 < sampling.top_k < len(weights):
        ids = greatest(weights, sampling.top_k)
    if sampling.top_p < 1:
        ids = _nucleus(weights, ids, sampling.top_p)
    if sampling.min_p > 0:
        # The greatest weight is 1.
        floor = np.float32(sampling.min_p)
        ids = np.flatnonzero(weights >= floor) if ids is None else ids[weights[ids] >= floor]
    return ids


def greatest(values: Floats, k: int) -> Ids:
    """Ids of the k greatest of values in [0, 1] with maximum 1, ascending."""
    for cut in _CUTS:
        ids = np.flatnonzero(values >= np.float32(cut))
        if len(ids) >= k:
            break
    else:
        ids = np.arange(len(values))
    if len(ids) == k:
        return ids
    found = values[ids]
    least = np.partition(found, len(found) - k)[len(found) - k]
    above = ids[found > least]
    level = ids[found == least][: k - len(above)]
    return np.sort(np.concatenate([above, level]))


def _nucleus(weights: Floats, ids: Ids | None, top_p: float) -> Ids:
    """The fewest of `ids`, greatest first, whose mass reaches top_p of the mass of them all."""
    if ids is not None:
        weights = weights[ids]
    target = top_p * float(weights.sum(dtype=np.float64))
    # The tokens at or above a bound, which is lowered until their mass reaches the target. Those
    # at or above the bound before are in; only the rest has to be sorted.
    bound, mass = np.float32(np.inf), 0.0
    for lower in _BOUNDS:
        found = np.flatnonzero(weights >= lower)
        reached = float(weights[found].sum(dtype=np.float64))
        if reached >= target:
            break
        bound, mass = lower, reached
    values = weights[found]
    band, mass = _narrowed(values[values < bound], mass, target)
    # Sorting numbers is several times faster than sorting their places.
    band = np.sort(band)[::-1]
    running = mass + np.cumsum(band, dtype=np.float64)
    count = min(int(np.searchsorted(running, target, side="left")) + 1, len(band))
    least = band[count - 1] if count else bound
    level = int(np.count_nonzero(band[:count] == least))
    at = values == least
    kept: Ids = found[(values > least) | at & (np.cumsum(at) <= level)]
    return kept if ids is None else ids[kept]


def _narrowed(band: Floats, mass: float, target: float) -> tuple[Floats, float]:
    """The part of a band in which the target is reached, and the mass with all that is greater.

    Where many tokens are about as probable there are tens of thousands, which take long to sort. A
    histogram over the leading bits, which order positive floats as they are, tells which to sort.
    """
    if len(band) <= _FEW:
        return band, mass
    keys = band.view(np.uint32) >> _BUCKET_BITS
    least = int(keys.min())
    masses = np.bincount(keys - least, weights=band)[::-1]
    reached = mass + np.cumsum(masses)
    index = min(int(np.searchsorted(reached, target, side="left")), len(masses) - 1)
    chosen = least + len(masses) - 1 - index
    return band[keys == chosen], float(reached[index - 1]) if index else mass


def _logprob(raw: Floats, token: int, rivals: int) -> TokenLogprob:
    """Of the raw logits: before penalties, temperature and filters."""
    shifted = raw - raw.max()
    weights = np.exp(shifted)
    log_sum = np.log(weights.sum(dtype=np.float64))
    top: tuple[tuple[int, float], ...] = ()
    if rivals:
        ids = greatest(weights, min(rivals, len(raw)))
        # Weights of the least probable may underflow and tie; logits tell them apart.
        order = np.argsort(-raw[ids], kind="stable")
        top = tuple((int(i), float(shifted[i] - log_sum)) for i in ids[order])
    return TokenLogprob(token, float(shifted[token] - log_sum), top)
