"""How far a process's start has come, as lines of its log that `tandem bench start` finds again."""

from __future__ import annotations

import logging

LOGGER = "tandem.start"
_log = logging.getLogger(LOGGER)

PROCESS = "the process runs"
SERVICES = "services are imported"
ENGINE = "the engine is imported"
WEIGHTS = "weights are laid out"
RULES = "rules of linear layers are known"
TRIED = "the model has computed"
WARM = "the engine is warm"
READY = "ready"
MILESTONES = (PROCESS, SERVICES, ENGINE, WEIGHTS, RULES, TRIED, WARM, READY)
"""In order. A process may lack some."""


def reached(milestone: str) -> None:
    """Logs one of MILESTONES."""
    _log.info("%s", milestone)
