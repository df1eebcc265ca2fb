"""How far a process's start has come, as lines of its log that `tandem bench start` finds again."""

from __future__ import annotations

import logging
import re
import time

LOGGER = "tandem.start"
_log = logging.getLogger(LOGGER)

PROCESS = "the process runs"
SERVICES = "services are imported"
FETCHED = "the model's files are here"
ENGINE = "the engine is imported"
WEIGHTS = "weights are laid out"
RULES = "rules of linear layers are known"
TRIED = "the model has computed"
WARM = "the engine is warm"
READY = "ready"
MILESTONES = (PROCESS, SERVICES, FETCHED, ENGINE, WEIGHTS, RULES, TRIED, WARM, READY)
"""In order. A process may lack some."""


def reached(milestone: str) -> None:
    """Logs one of MILESTONES, with the CPU time that the process has used so far."""
    _log.info("%s after %.3f s of CPU", milestone, time.process_time())


def parsed(message: str) -> tuple[str, float] | None:
    """The milestone and the seconds of CPU of a message; None for another one."""
    found = re.fullmatch(r"(.*) after ([0-9.]+) s of CPU", message)
    if found is None or found[1] not in MILESTONES:
        return None
    return found[1], float(found[2])
