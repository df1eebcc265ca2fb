"""What every test run starts with."""

from __future__ import annotations

import os
import signal

import pytest
from xdist.scheduler import LoadScopeScheduling

# As the command does it (cli/main.py): tests start processes from one that uses gRPC, too.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and processes inherit
    # that: the commands under test would not hear Ctrl-C or a hang-up.
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    # Hundreds of processes are started from here. Each would compile the project for itself.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


CLUSTERS = ("tests/conformance/", "tests/e2e/", "tests/integration/")
"""Tests of many processes, which get in each other's way: one after the other, and at once."""


class Halves(LoadScopeScheduling):
    """For `-n 2`: one runs the clusters, the other one the rest, file by file, until both end."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith(CLUSTERS) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Halves:
    config.option.loadscopereorder = False
    return Halves(config, log)


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(CLUSTERS))
