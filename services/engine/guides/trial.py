"""A process in which guides are tried: one that is too much for it harms nobody.

It is told the vocabulary, then guides, over a pipe, and answers each with what is wrong with it. It
ends when the other end does.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from services.engine.api import Guide
from services.engine.guides.grammar import FIELDS
from services.engine.guides.guided import Guided
from services.engine.guides.threads import STACK_BYTES, deep_threads
from services.engine.guides.vocabulary import Vocabulary
from services.runtime.errors import InvalidRequestError, TandemError, by_reason

MEMORY_BYTES = 2**30
"""Beyond the stack."""
START_SECONDS = 60.0


class Trial:
    """Tries guides, in a process that is started when it is needed. One thread at a time."""

    def __init__(
        self, tokens: Sequence[bytes], size: int, eos_token_ids: Sequence[int], seconds: float
    ) -> None:
        """The model's, as for a Vocabulary; `seconds` is what a guide may take."""
        self._model = tokens, size, eos_token_ids
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def check(self, guide: Guide) -> None:
        """Raises InvalidRequestError for a guide that can't be enforced."""
        pipe = self._asked(guide)
        field, shown = FIELDS[guide.kind], guide.texts[0] if guide.texts else ""
        if not pipe.poll(self._seconds):
            self.close()
            allowed = f"it took more than {self._seconds:g} s to compile; make it simpler"
            raise InvalidRequestError(field, shown, allowed)
        try:
            refusal = pipe.recv()
        except (EOFError, OSError):
            self.close()
            allowed = "it took too much memory to compile; make it simpler"
            raise InvalidRequestError(field, shown, allowed) from None
        if refusal is not None:
            raise by_reason(*refusal)

    def close(self) -> None:
        """Ends the process, if there is one. The next check() starts another."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            process.wait()

    def _asked(self, guide: Guide) -> Connection:
        """Whose answer is waited for. A process that was ended meanwhile is no guide's fault."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(guide)
                return self._pipe
            self.close()
        pipe = self._start()
        pipe.send(guide)
        return pipe

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        # The same modules as here, wherever this process has them from.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._pipe = ours
        with contextlib.suppress(OSError, EOFError):
            ours.send(self._model)
            if ours.poll(START_SECONDS):
                ours.recv()
                return ours
        self.close()
        raise RuntimeError("the process that tries guides did not start")


def serve() -> None:
    """What the process does. The pipe is the file that its first argument numbers."""
    # Ctrl-C goes to a whole group of processes; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = MEMORY_BYTES + STACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    thread = deep_threads("guides")
    with Connection(int(sys.argv[1])) as parent, contextlib.suppress(EOFError, OSError):
        vocabulary = Vocabulary(*parent.recv())
        parent.send(None)
        while True:
            parent.send(thread.submit(_refusal, vocabulary, parent.recv()).result())


def _refusal(vocabulary: Vocabulary, guide: Guide) -> tuple[str, str, dict[str, str]] | None:
    try:
        Guided(vocabulary, guide)
    except TandemError as error:
        return error.reason, error.message, error.metadata
    return None
