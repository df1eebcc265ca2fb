"""Requests made by schemathesis out of the gateway's OpenAPI document, for a whole cluster.

python -m tests.conformance.fuzz [--cases 5000] [--seed 1]

Half of them are as the document says, half are not. Whatever is asked, the answer must be one that
the document has, no process may break or keep anything, and memory must stay where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import psutil
import requests
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks

from tests.conformance.conformance_world import MODEL, VOCABULARY, World, serving

SHARES = {"CreateChatCompletion": 6, "CreateCompletion": 4, "Tokenize": 2, "Detokenize": 2}
"""Of cases; any other operation has one."""
BATCH = 100
BOUNDS = {"max_tokens": 64, "max_completion_tokens": 64, "n": 8}
"""What may be asked of one request, so that all of them end soon."""
USER = {"role": "user", "content": "a"}
FORMS = ("response_format", "guided_regex", "guided_choice", "guided_grammar")
MOST_GROWTH = 48 * 2**20
"""Bytes of memory that a process may have more at the end than after half of the cases. Caches
fill, and an allocator keeps what it had; a leak of a request's size is 10 KB times the cases."""
SECONDS = 120.0
CONFORMS = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


class BrokenError(AssertionError):
    """An answer, or a process, is not as it must be."""


@dataclass
class Report:
    """What came. `growth`: of memory, bytes by process, over the second half of the cases."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    growth: dict[str, int] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """Requests that were answered."""
        return sum(self.statuses.values())

    def text(self) -> str:
        """For a person."""
        lines = [f"{self.cases} requests"]
        for name in sorted({name for name, _ in self.statuses}):
            of = sorted((s, n) for (other, s), n in self.statuses.items() if other == name)
            lines.append(f"  {name}: " + ", ".join(f"{n} x {status}" for status, n in of))
        if self.growth:
            told = ", ".join(f"{n} {b / 2**20:+.1f}" for n, b in sorted(self.growth.items()))
            lines.append(f"memory over the second half, MiB: {told}")
        return "\n".join(lines)


def fuzz(url: str, cases: int, seed: int, report: Report, halfway: Callable[[], None]) -> None:
    """Sends them, one after the other. Raises BrokenError, or what schemathesis finds wrong."""
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.max_stream_events = 2**20  # it would leave long streams
    operations = [result.ok() for result in schema.get_all_operations()]
    shares = [SHARES.get(of.definition.raw["operationId"].rstrip("2"), 1) for of in operations]
    rounds = math.ceil(cases / sum(shares) / BATCH)
    with requests.Session() as session:
        for turn in range(2 * rounds):
            if turn == rounds:
                halfway()
            for operation, share in zip(operations, shares, strict=True):
                most = math.ceil(cases * share / sum(shares) / rounds / 2)
                mode = list(schemathesis.GenerationMode)[turn % 2]
                _batch(operation, mode, most, seed + turn, url, session, report)


def _batch(operation, mode, most, seed, url, session, report) -> None:
    sent = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case) -> None:
        nonlocal sent
        if sent == most:
            return
        sent += 1
        _aim(case, sent)
        try:
            response = case.call(base_url=url, session=session, timeout=SECONDS)
        except (requests.exceptions.InvalidHeader, UnicodeError):
            return  # no HTTP at all: the client does not send it
        report.statuses[operation.label, response.status_code] += 1
        try:
            _check(case, response)
        except Exception as error:
            error.add_note(case.as_curl_command())
            raise

    ask()


def _aim(case, turn: int) -> None:
    """Most requests get as far as the model, and no answer is long."""
    if turn % 2:
        (case.headers or {}).pop("x-request-timeout", None)
        if case.path_parameters:
            case.path_parameters["model"] = MODEL
    body = case.body
    if not isinstance(body, dict):
        return
    if turn % 4:
        body["model"] = MODEL
        if case.meta is not None and case.meta.generation.mode.is_positive:
            _mend(body)
    for name, most in BOUNDS.items():
        bound = body.get(name)
        # 20.0 is an integer, too. What is beyond the type's own range stays as it is.
        if isinstance(bound, int | float) and most < bound < 2**32:
            body[name] = bound % most + 1


def _mend(body: dict[str, object]) -> None:
    """What the document can't say: which fields go together, and how many tokens there are."""
    forms = [name for name in FORMS if name in body]
    for name in ("best_of", "min_tokens", *forms["tools" not in body :]):
        body.pop(name, None)
    if "messages" in body:
        body.pop("prompt", None)
        body["messages"] = [_spoken(turn) for turn in body["messages"]] or [USER]
    else:
        body.pop("tools", None)
        body.setdefault("prompt", "a")
    for i, tool in enumerate(body.get("tools", [])):
        tool["function"]["name"] = f"f{i}"
    if "tools" not in body:
        body.pop("tool_choice", None)
    if "top_logprobs" in body:
        body["logprobs"] = True
    if "stream_options" in body:
        body["stream"] = True
    if "messages" in body:
        body.setdefault("max_completion_tokens", body.pop("max_tokens", 16))
    for name in {"tokens", "prompt", "stop_token_ids"} & body.keys():
        body[name] = _known(body[name])
    if "logit_bias" in body:
        body["logit_bias"] = {str(int(k) % VOCABULARY): v for k, v in body["logit_bias"].items()}


def _spoken(turn: dict[str, object]) -> dict[str, object]:
    """A turn with what belongs to its role."""
    said = turn | {"content": turn.get("content") or "a"}
    if turn["role"] == "tool":
        said["tool_call_id"] = "c"
    else:
        said.pop("tool_call_id", None)
    if turn["role"] != "assistant":
        for name in ("tool_calls", "reasoning_content", "refusal"):
            said.pop(name, None)
    for call in said.get("tool_calls") or []:
        function = {"name": "f0", "arguments": "{}"}
        call |= {"id": call.get("id") or "c", "type": "function", "function": function}
    return said


def _known(tokens: object) -> object:
    """The same of tokens that the model has, and no text that is empty."""
    match tokens:
        case list():
            return [_known(token) for token in tokens]
        case int():
            return tokens % VOCABULARY
    return tokens or "a"


def _check(case, response) -> None:
    status = response.status_code
    # A client's own deadline passes: that is what the document says of it.
    late = status == 504 and "x-request-timeout" in (case.headers or {})
    if status >= 500 and not late:
        raise BrokenError(f"{status}: {response.text[:500]}")
    if status < 400 and "event-stream" in response.headers["content-type"][0]:
        _check_events(response.text)
        return
    case.validate_response(response, checks=[CHECKS.get_one(name) for name in CONFORMS])
    if status >= 400 and set(response.json()["error"]) != {"message", "type", "param", "code"}:
        raise BrokenError(f"not an error of OpenAI's shape: {response.text[:500]}")


def _check_events(text: str) -> None:
    *events, end = text.split("\n\n")
    if end or not events or not all(event.startswith("data: ") for event in events):
        raise BrokenError(f"not a whole stream: {text[-200:]!r}")
    *pieces, last = (event.removeprefix("data: ") for event in events)
    if last != "[DONE]" and "error" not in json.loads(last):
        raise BrokenError(f"a stream ends with {last[:200]!r}")
    for piece in pieces:
        json.loads(piece)


async def run(world: World, cases: int, seed: int) -> Report:
    """Fuzzes the cluster, and looks at what it is like then. Raises BrokenError."""
    report, pids, before = Report(), world.local.pids, {}
    await asyncio.to_thread(
        fuzz, world.url.removesuffix("/v1"), cases, seed, report, lambda: before.update(rss(pids))
    )
    if world.local.pids != pids:
        raise BrokenError(f"not all processes are left: {sorted(world.local.pids)}")
    await world.nothing_held()
    report.growth = {name: now - before[name] for name, now in rss(pids).items()}
    for log in sorted(world.local.logs.glob("*.log")):
        for word in ("Traceback", "panic:", "incident"):
            if word in (text := log.read_text(encoding="utf-8", errors="replace")):
                at = text.index(word)
                raise BrokenError(f"{log.name}: {text[max(0, at - 300) : at + 2000]}")
    return report


def rss(pids: dict[str, int]) -> dict[str, int]:
    """Memory of processes, bytes."""
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


async def main(cases: int, seed: int) -> None:
    """Prints the report. Raises BrokenError, also if memory has grown."""
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder)) as world:
            report = await run(world, cases, seed)
    print(report.text())
    grown = {name: growth for name, growth in report.growth.items() if growth > MOST_GROWTH}
    if grown:
        raise BrokenError(f"memory has grown: {grown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    asyncio.run(main(asked.cases, asked.seed))
