"""Recorded traffic as a workload: arrivals, lengths, and which prompts share which prefix.

Two public formats are read, told apart by the file's ending:

- Azure LLM inference traces, .csv: TIMESTAMP,ContextTokens,GeneratedTokens. Nothing is known of the
  content, so no prompt shares anything with another.
- Mooncake traces, .jsonl: timestamp (ms), input_length, output_length, hash_ids: one id for each
  block of 512 prompt tokens, the last one possibly short; equal ids mean equal content up to there.

Either may be compressed (.xz).
"""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from loadtest.errors import TraceError

MOONCAKE_BLOCK_TOKENS = 512

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request."""

    at: float
    """Seconds from the first row."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Content of each block of MOONCAKE_BLOCK_TOKENS prompt tokens; empty: unlike any other."""


def read(path: Path, limit: int | None = None) -> tuple[TraceRow, ...]:
    """The first `limit` requests of a trace file, in order of time. Raises TraceError."""
    readers = {".csv": _azure, ".jsonl": _mooncake}
    compressed = path.suffix == ".xz"
    reader = readers.get(path.with_suffix("").suffix if compressed else path.suffix)
    if reader is None:
        raise TraceError(f"{path}: a trace ends in .csv (Azure) or .jsonl (Mooncake), or then .xz")
    opened = lzma.open if compressed else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as lines:
            rows = list(islice(reader(path, lines), limit))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from None
    if not rows:
        raise TraceError(f"{path}: no request in it")
    rows.sort(key=lambda row: row.at)
    first = rows[0].at
    return tuple(
        TraceRow(row.at - first, row.input_tokens, row.output_tokens, row.hash_ids) for row in rows
    )


def _azure(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    reader = csv.reader(lines)
    header = next(reader, [])
    if tuple(header) != AZURE_COLUMNS:
        raise TraceError(f"{path}:1: columns {header}; expected {','.join(AZURE_COLUMNS)}")
    for number, fields in enumerate(reader, start=2):
        if not fields:
            continue
        try:
            when, given, generated = fields
            # UTC for times without a zone: only distances count, and it has no gaps.
            at = datetime.fromisoformat(when)
            seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
            yield _row(seconds, int(given), int(generated), ())
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {error}") from None


def _mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            tokens, ids = int(fields["input_length"]), tuple(map(int, fields["hash_ids"]))
            row = _row(float(fields["timestamp"]) / 1e3, tokens, int(fields["output_length"]), ids)
            if len(ids) != -(-tokens // MOONCAKE_BLOCK_TOKENS):
                raise ValueError(
                    f"{len(ids)} hash_ids for {tokens} tokens; "
                    f"expected one for each {MOONCAKE_BLOCK_TOKENS} tokens begun"
                )
            if min(ids) < 0:
                raise ValueError(f"hash id {min(ids)}; expected 0 or more")
            yield row
        except (ValueError, KeyError, TypeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise TraceError(f"{path}:{number}: {why}") from None


def _row(at: float, given: int, generated: int, ids: tuple[int, ...]) -> TraceRow:
    if given < 1 or generated < 0:
        raise ValueError(f"{given} prompt and {generated} output tokens; expected at least 1 and 0")
    return TraceRow(at, given, generated, ids)
