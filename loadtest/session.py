"""A whole load test: options in, report out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from loadtest import arrivals, environment, lengths, measures, report, traces
from loadtest.drive import Bounds, Ended, Run
from loadtest.errors import OptionsError, WarmupError
from loadtest.options import LoadOptions
from loadtest.outcome import Outcome, Progress
from loadtest.processes import Memory, ProcessMeter
from loadtest.view import View
from loadtest.wire import InferenceClient, context_tokens
from loadtest.workload import Recorded, RequestPlan, Source, Synthetic, Workload
from services.runtime.channels import Channels

SAMPLE_SECONDS = 0.25
"""Between looks at the processes, and between redraws of the view."""

WARM_UP_SEED = 1 << 64
"""Added to the seed, and above all that users give."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Options, made concrete: what is asked and when."""

    workload: Workload
    offsets: Iterator[float] | None
    """Of an open loop."""
    order: tuple[int, ...] | None
    """Which recorded row each arrival is, where a trace gives the arrivals."""
    notes: tuple[str, ...]

    def request(self, index: int) -> RequestPlan:
        """The request that arrives as number `index`."""
        return self.workload.request(index if self.order is None else self.order[index])

    def warm_up(self, index: int) -> RequestPlan:
        """One of the same lengths whose content no measured request has."""
        return replace(self.workload, seed=self.workload.seed + WARM_UP_SEED).request(index)


def plan(options: LoadOptions, window_tokens: int) -> Plan:
    """Reads the trace if there is one. Raises OptionsError, LengthsError, TraceError.

    `window_tokens` is the model's context window: recorded lengths beyond it must be cut by the
    options, not by the server's refusals.
    """
    prompts, load = options.prompts, options.load
    if not prompts.first_token < prompts.end_token:
        raise OptionsError(
            f"token ids from {prompts.first_token} to below {prompts.end_token}: the range is empty"
        )
    rows = traces.read(Path(prompts.trace), load.requests) if prompts.trace else ()
    source, notes = _source(options, rows, window_tokens)
    workload = Workload(
        source, options.seed, prompts.first_token, prompts.end_token, prompts.sampling
    )
    if load.loop == "closed":
        return Plan(workload, None, None, notes)
    if load.arrivals == "trace":
        if not rows:
            raise OptionsError("arrivals from a trace need a trace file (--trace)")
        times, order = arrivals.replay(
            [row.at for row in rows],
            speed=load.speed,
            jitter_seconds=load.jitter_seconds,
            seed=options.seed,
        )
        return Plan(workload, iter(times), tuple(order), notes)
    if load.rate <= 0:
        raise OptionsError("an open loop needs a rate above 0 (--rate)")
    drawn = (
        arrivals.poisson(load.rate, options.seed)
        if load.arrivals == "poisson"
        else arrivals.constant(load.rate)
    )
    return Plan(workload, drawn, None, notes)


def _source(
    options: LoadOptions, rows: tuple[traces.TraceRow, ...], window_tokens: int
) -> tuple[Source, tuple[str, ...]]:
    prompts = options.prompts
    if not rows:
        source = Synthetic(
            lengths.parse(prompts.input_tokens),
            lengths.parse(prompts.output_tokens),
            prompts.prefix_share,
            prompts.prefix_tokens,
            prompts.prefixes,
        )
        longest = source.input_tokens.most + source.output_tokens.most
        if longest > window_tokens:
            raise OptionsError(
                f"prompt and output may need {longest} tokens together; the model's context "
                f"window is {window_tokens}"
            )
        return source, ()
    recorded = Recorded(rows, prompts.scale, prompts.max_input, prompts.max_output)
    too_long = recorded.rows_over(window_tokens)
    if too_long:
        raise OptionsError(
            f"{too_long} of {len(rows)} recorded requests need more than the model's "
            f"{window_tokens} tokens: scale them (--scale) or cut them (--max-input, --max-output)"
        )
    cut = recorded.cut_rows
    return recorded, (f"{cut} of {len(rows)} recorded requests were cut in length",) if cut else ()


async def run(
    options: LoadOptions,
    *,
    view: View,
    stop: asyncio.Event,
    clock: Callable[[], float] = time.perf_counter,
    on_memory: Callable[[float, int, dict[str, Memory]], None] | None = None,
) -> report.Report:
    """Puts the load on and reports; setting `stop` ends it early, with the report so far.

    `on_memory(seconds, requests ended, memory by process)` is called at every sample.
    Raises LoadTestError, and CallFailedError if the server can't be reached.
    """
    channels = Channels()
    try:
        model, window = await context_tokens(channels, options.address, options.model)
        planned = plan(options, window)
        before = environment.here()
        client = InferenceClient(
            channels.get(options.address),
            model=model,
            sampling=options.prompts.sampling,
            timeout_seconds=options.load.timeout_seconds,
            clock=clock,
        )
        await _warm_up(options, planned, client, clock, stop)
        driver = Run(
            planned.request,
            client.ask,
            Bounds(options.load.requests, options.load.seconds, options.load.finish_seconds),
            clock=clock,
            stop=stop,
        )
        meter = ProcessMeter(options.pids)

        def look() -> None:
            memory = meter.sample()
            view.update(driver)
            if on_memory is not None:
                on_memory(clock() - driver.started, len(driver.outcomes), memory)

        with view:
            ended = await _watched(driver, options, planned, look)
    finally:
        await channels.close()
    return _report(options, model, planned, before, driver, ended, meter, client.examples)


async def _warm_up(
    options: LoadOptions,
    planned: Plan,
    client: InferenceClient,
    clock: Callable[[], float],
    stop: asyncio.Event,
) -> None:
    for index in range(options.load.warmup):
        if stop.is_set():
            return
        request = planned.warm_up(index)
        reason = await client.ask(request, Progress(index, clock(), len(request.token_ids)))
        if reason:
            raise WarmupError(
                f"warm-up request {index} ended with {reason}: {client.examples[reason]}"
            )


async def _watched(
    driver: Run, options: LoadOptions, planned: Plan, look: Callable[[], None]
) -> Ended:
    """Drives the load while `look` is called at every interval, and once at the end."""

    async def keep_looking() -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            look()

    watcher = asyncio.create_task(keep_looking())
    load = options.load
    try:
        if planned.offsets is None:
            return await driver.closed(load.users, load.think_seconds, options.seed)
        return await driver.open(planned.offsets)
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        look()


def _report(
    options: LoadOptions,
    model: str,
    planned: Plan,
    before: environment.Environment,
    driver: Run,
    ended: Ended,
    meter: ProcessMeter,
    examples: Mapping[str, str],
) -> report.Report:
    outcomes: list[Outcome] = driver.outcomes
    numbers = measures.numbers(outcomes, driver.started, options.slo)
    rows = tuple(report.row(o, driver.started) for o in sorted(outcomes, key=lambda o: o.index))
    return report.Report(
        schema=report.SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        ended_by=ended,
        options=options,
        environment=before,
        numbers=numbers,
        processes=meter.usage(numbers.counts.succeeded),
        notes=planned.notes,
        error_examples=dict(examples),
        rows=rows if options.rows else None,
    )
