"""The gateway's own tests, in Go, and that it builds."""

from __future__ import annotations

import subprocess

import pytest

from tests.gateway.gateway_rig import BUILD_SECONDS, program, run_build

pytestmark = pytest.mark.timeout(BUILD_SECONDS)


def test_the_tests_in_go_pass():
    run_build("--test")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--nonsense",), "nonsense"),
        (("--frontends", ""), "--frontends names none"),
        (("--tls-cert", "x"), "need each other"),
        (("--frontend-cert", "x", "--frontend-key", "y"), "needs --frontend-ca"),
        (("--body-timeout", "0s"), "--body-timeout"),
        (("--max-streams", "-1"), "can't be negative"),
        (("--log", "xml"), "text or json"),
        (("surplus",), "no flag"),
        (("--listen", "0.0.0.0:0"), "can be reached from other machines"),
        (("--listen", ":0"), "can be reached from other machines"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "/no", "--tls-key", "/no"), "/no"),
    ],
)
def test_flags_that_are_refused(flags, words):
    done = subprocess.run([program(), *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert words in done.stderr
