"""How fast KV moves between two processes of this machine, beside what the machine can do.

Each thing is measured in turns with its baseline, so ratios hold on a machine that does other
things too, up to the noise that stands beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import uvloop

from kvtransfer.bench import bytes_work, fetches, reads, registering, show
from kvtransfer.bench.figures import Registration, Report, Row, Share, machine
from kvtransfer.bench.peer import PeerError
from kvtransfer.bench.serving import AbsentError
from kvtransfer.errors import KvError

TRANSPORTS = ("shm", "tcp", "nixl", "ucx")
PARTS = ("reads", "fetches", "bytes", "registration")

T = TypeVar("T")
Say = Callable[[str], None]


class _Run:
    """Measures one thing after the other; what can't be measured is noted and left out."""

    def __init__(self, options: argparse.Namespace, say: Say) -> None:
        self._options = options
        self._say = say
        self._absent: dict[str, str] = {}

    async def report(self) -> Report:
        """Everything that was asked for."""
        options, where = self._options, machine()
        rows: list[Row] = []
        shares: list[Share] = []
        registrations: list[Registration] = []
        most = options.mib * 2**20
        for name in options.transports if "reads" in options.parts else ():
            found = await self._try(name, reads.measure(name, most, options.rounds, self._say))
            rows += found or []
        if "bytes" in options.parts:
            rows += await bytes_work.measure(most, options.rounds, self._say)
        for name in options.transports if "fetches" in options.parts else ():
            both = await self._try(
                f"fetch, {name}", fetches.measure(name, options.rounds, self._say)
            )
            if both is not None:
                rows += both[0]
                shares += both[1]
        for name in options.transports if "registration" in options.parts else ():
            one = await self._try(
                f"registration, {name}", registering.measure(name, 4 * most, self._say)
            )
            registrations += [] if one is None else [one]
        return Report(
            where,
            {key: value for key, value in vars(options).items() if not isinstance(value, Path)},
            tuple(rows),
            tuple(shares),
            tuple(registrations),
            self._absent,
        )

    async def _try(self, what: str, work: Awaitable[T]) -> T | None:
        try:
            return await work
        except (AbsentError, PeerError, KvError) as error:
            self._absent[what] = str(error)
            return None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvtransfer.bench", description=__doc__)
    parser.add_argument(
        "--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="default: all"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--mib", type=_positive, default=64, help="largest read, MiB (64)")
    parser.add_argument("--rounds", type=_positive, default=20, help="of each thing at most (20)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw a PNG here")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = _options(arguments)
    if options.plot:
        try:
            show.check_plot()
        except show.PlotUnavailableError as error:
            print(error, file=sys.stderr)
            return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(_Run(options, _say).report())
    print(show.text(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if options.plot:
        show.draw(report, options.plot)
    return 0


def _say(words: str) -> None:
    print(f"  {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
