"""What the flags of `tandem loadtest` mean together, and which combinations are refused."""

from __future__ import annotations

import pytest

from cli import load_flags as f
from loadtest.errors import OptionsError
from loadtest.measures import Slo


@pytest.mark.parametrize(
    ("rate", "arrivals", "users", "think", "expected"),
    [
        (None, "poisson", None, 0.0, "closed"),
        (None, "poisson", 3, 0.5, "closed"),
        (2.0, "poisson", None, 0.0, "open"),
        (2.0, "constant", None, 0.0, "open"),
        (None, "trace", None, 0.0, "open"),
        (2.0, "poisson", 3, 0.0, "no --users"),
        (None, "trace", None, 0.5, "no --users or --think"),
        (2.0, "trace", None, 0.0, "use --speed"),
        (None, "constant", None, 0.0, "add --rate"),
    ],
)
def test_which_loop_is_meant(rate, arrivals, users, think, expected):
    if expected in ("open", "closed"):
        assert f.loop(rate, arrivals, users, think) == expected
    else:
        with pytest.raises(OptionsError, match=expected):
            f.loop(rate, arrivals, users, think)


def test_prefixes_are_read():
    assert f.prefix(None) == (0.0, 0, 1)
    assert f.prefix("0.5:256") == (0.5, 256, 1)
    assert f.prefix("1:16:4") == (1.0, 16, 4)


@pytest.mark.parametrize(
    "text", ["", "0.5", "0:16", "1.1:16", "nan:16", "0.5:0", "1:1:0", "1:2:3:4"]
)
def test_prefixes_that_make_no_sense_are_refused(text):
    with pytest.raises(OptionsError, match="SHARE:TOKENS"):
        f.prefix(text)


def test_an_slo_is_in_milliseconds_and_either_half_may_be_left_out():
    assert f.slo(None, None) is None
    assert f.slo(500.0, None) == Slo(0.5, None)
    assert f.slo(None, 50.0) == Slo(None, 0.05)


def test_pids_are_named():
    assert f.pids(["frontend=12", "a=1"]) == {"frontend": 12, "a": 1}
    for text in ("12", "=12", "a=", "a=x", "a=-1"):
        with pytest.raises(OptionsError, match="NAME=PID"):
            f.pids([text])


def test_seeds_are_new_unless_given():
    assert f.seed(0) == 0
    assert len({f.seed(None) for _ in range(5)}) > 1
