"""What every test run starts with."""

from __future__ import annotations

import os
import signal

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
