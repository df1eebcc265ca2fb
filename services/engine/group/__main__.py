"""A rank that its leader starts as a child process: settings as JSON, and the leader's pid."""

from __future__ import annotations

import logging
import os
import sys

from services.runtime import log, process
from services.runtime.settings import RankProcess

# As in cli/main.py: read when gRPC is first used.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def main() -> int:
    """Exit status."""
    settings = RankProcess.model_validate_json(sys.argv[1])
    process.die_with_parent(int(sys.argv[2]))
    log.configure(settings.log, settings.rank.name)
    from services.engine.group.app import serve

    def ready(address: str) -> None:
        logging.getLogger(__name__).info("ready at %s", address)

    async def run(stop: process.Stop) -> None:
        await serve(settings, ready=ready, stop=stop)

    try:
        return process.run(run)
    except Exception as error:
        # What a settings or model error says is for people; the rest is a bug.
        logging.getLogger(__name__).exception("the rank ends: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
