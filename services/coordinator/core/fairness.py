"""Fairness among tenants: a virtual token counter for each.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A counter is what a
tenant was served, in weighted tokens: a prompt token counts 1, a generated one 2. Of the tenants
that wait, the one with the least counter is next. Who begins to wait is lifted to the least counter
among those that wait (or, if nobody does, to that of the one that ceased to wait last), so that
nobody saves up for a rush.

The paper counts tokens as they are generated. Tokens don't pass through here, so a request is
charged at its dispatch, for the prompt tokens that are to be computed and for the output that its
tenant's requests usually have; and what was really served is settled at its end. The bound:

    Let C be the greatest charge, and E the greatest sum, over the requests of a tenant that run at
    one time, of the difference between charge and final figure. Then the counters of two tenants
    that both wait never come further apart than C + 2 E, and what the two are served while both
    wait (by their counters) differs by 2 (C + 2 E) at most.

For: the counter of f passes that of g by a dispatch of f only from below, to at most C above. Until
the next such moment only settlements move them apart, and only of requests that ran at that moment,
since one that is dispatched later never takes back more than its charge: E up for f, E down for g.
With the paper's w_p L for the charge and no estimate of output, E is its w_q M, M the output of all
that run; the better the estimate, the closer this comes to twice the greatest request. It holds
where every dispatch goes to the least counter: requests that don't fit, and those that have waited
too long (admission.py), are out of it, but are charged, so the rest makes up for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from services.coordinator.core.ranking import Ranking

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""As in the paper: a generated token costs about two of a prompt."""

IDLE_LIMIT = 4096
"""Tenants without a waiting request whose counters are kept, the latest ones. A tenant that is
forgotten starts from the least counter again, as one never seen."""

OUTPUT_MEMORY = 0.2
"""Weight of the last request in the average output of a tenant."""


class Line(NamedTuple):
    """Those who wait in one line: tenants are weighed against others of the same one."""

    model: str
    priority: int


@dataclass(frozen=True, slots=True)
class Charge:
    """What a dispatch was charged, to be settled at its end."""

    line: Line
    tenant: str
    tokens: float
    """Weighted."""


@dataclass(slots=True)
class _Account:
    counter: float = 0.0
    """Weighted tokens, divided by the tenant's weight."""
    output: float = 0.0
    """Tokens that its requests generate, a moving average; 0: none has ended."""
    waits: bool = False


@dataclass(slots=True)
class _Book:
    """The accounts of one line."""

    accounts: dict[str, _Account] = field(default_factory=dict)
    waiting: Ranking[str] = field(default_factory=Ranking)
    last: str = ""
    """The tenant that ceased to wait last."""
    output: float = 0.0
    """As in an account, of all tenants."""


class Fairness:
    """Counters by line and tenant. `weights`: a tenant's share against 1 of those not named.

    Raises ValueError for a weight that is not positive. All operations are O(log tenants).
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, idle_limit: int = IDLE_LIMIT
    ) -> None:
        self._weights = dict(weights or {})
        for tenant, weight in self._weights.items():
            if not weight > 0:
                raise ValueError(f"weight of {tenant}: {weight} is not positive")
        self._idle_limit = idle_limit
        self._books: dict[Line, _Book] = {}
        self._idle: OrderedDict[tuple[Line, str], None] = OrderedDict()

    def weight(self, tenant: str) -> float:
        """A tenant's share against 1."""
        return self._weights.get(tenant, 1.0)

    def join(self, line: Line, tenant: str) -> None:
        """A tenant begins to wait in a line."""
        book = self._books.setdefault(line, _Book())
        account = book.accounts.setdefault(tenant, _Account())
        if account.waits:
            return
        least = book.waiting.least()
        if least is None:
            least = book.accounts.get(book.last, account).counter
        account.counter = max(account.counter, least)
        account.waits = True
        book.waiting.put(tenant, account.counter)
        self._idle.pop((line, tenant), None)

    def leave(self, line: Line, tenant: str) -> None:
        """A tenant has no request left that waits in a line."""
        book = self._books[line]
        account = book.accounts[tenant]
        account.waits = False
        book.waiting.discard(tenant)
        book.last = tenant
        self._idle[line, tenant] = None
        if len(self._idle) > self._idle_limit:
            self._forget(*self._idle.popitem(last=False)[0])

    def next(self, line: Line, count: int) -> list[str]:
        """The tenants to be served next in a line, in order; `count` at most."""
        book = self._books.get(line)
        return book.waiting.first(count) if book else []

    def charge(self, line: Line, tenant: str, prompt_tokens: int, max_tokens: int) -> Charge:
        """A request is dispatched: so many tokens to compute, at most so many to generate.

        The output expected is the tenant's average, else that of its line, else `max_tokens`.
        """
        book = self._books.get(line) or _Book()
        account = book.accounts.get(tenant) or _Account()
        usual = account.output or book.output or max_tokens
        tokens = PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * min(max_tokens, usual)
        self._add(line, tenant, tokens)
        return Charge(line, tenant, tokens)

    def settle(self, charge: Charge, computed_tokens: int, generated_tokens: int) -> None:
        """A request that was charged ended; nothing happens if its tenant was forgotten."""
        book = self._books.get(charge.line)
        account = book.accounts.get(charge.tenant) if book else None
        if book is None or account is None:
            return
        served = PROMPT_WEIGHT * computed_tokens + OUTPUT_WEIGHT * generated_tokens
        self._add(charge.line, charge.tenant, served - charge.tokens)
        if generated_tokens:
            account.output = _moved(account.output, generated_tokens)
            book.output = _moved(book.output, generated_tokens)

    def counter(self, line: Line, tenant: str) -> float | None:
        """Weighted tokens a unit of the tenant's weight; None if it is not known."""
        book = self._books.get(line)
        account = book.accounts.get(tenant) if book else None
        return account.counter if account else None

    def _add(self, line: Line, tenant: str, tokens: float) -> None:
        book = self._books.get(line)
        account = book.accounts.get(tenant) if book else None
        if book is None or account is None:
            return
        account.counter += tokens / self.weight(tenant)
        if account.waits:
            book.waiting.put(tenant, account.counter)

    def _forget(self, line: Line, tenant: str) -> None:
        book = self._books[line]
        del book.accounts[tenant]
        if not book.accounts:
            del self._books[line]


def _moved(average: float, value: float) -> float:
    return average + OUTPUT_MEMORY * (value - average) if average else value
