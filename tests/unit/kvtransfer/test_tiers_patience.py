"""Work that is waited for no longer than it may take, and what happens to work behind it."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtransfer.tiers.patience import Patience


def test_what_work_returns_or_raises_comes_back():
    patience = Patience("test", 2, 30.0)
    assert patience.run(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        patience.run(lambda: 1 // 0)
    assert patience.run(lambda: 6) == 6
    assert not patience.lost
    patience.close()


def test_the_time_counts_from_when_a_thread_takes_the_work():
    patience = Patience("test", 1, 1.0)
    never = threading.Event()
    with ThreadPoolExecutor(5) as callers:
        # One after the other they take longer than any of them may.
        waits = [callers.submit(patience.run, lambda: never.wait(0.25)) for _ in range(5)]
        assert [wait.result(30) for wait in waits] == [False] * 5
    assert not patience.lost
    patience.close()


def test_nothing_is_begun_once_work_was_left_behind():
    patience = Patience("test", 1, 0.1)
    taken, go_on, begun = threading.Event(), threading.Event(), []

    def stuck():
        taken.set()
        go_on.wait(30)

    with ThreadPoolExecutor(3) as callers:
        first = callers.submit(patience.run, stuck)
        assert taken.wait(30)
        others = [callers.submit(patience.run, lambda: begun.append(1)) for _ in range(2)]
        for call in (first, *others):
            with pytest.raises(OSError, match="no answer") as raised:
                call.result(30)
            assert raised.value.errno == errno.ETIMEDOUT
    assert patience.lost
    go_on.set()
    patience.close()
    for thread in patience._threads:  # it is there again, and ends
        thread.join(30)
    assert begun == []
