"""Log lines for people and for programs."""

from __future__ import annotations

import json
import logging

import pytest

from services.runtime.log import JsonFormatter, configure
from services.runtime.settings import LogSettings


@pytest.fixture
def root():
    """The root logger, given back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logging.captureWarnings(False)
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_json_is_one_object_a_line(root, capsys):
    configure(LogSettings(format="json", level="debug"), "decode-0")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("a.b").exception("what %s", "ünï")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["message"] == "what ünï"
    assert (record["level"], record["process"], record["logger"]) == ("error", "decode-0", "a.b")
    assert "two\nlines" in record["exception"]


def test_text_names_the_process_and_honours_the_level(root, capsys):
    configure(LogSettings(level="warning"), "prefill-1")
    logging.getLogger("x").info("not this")
    logging.getLogger("x").warning("but this")
    said = capsys.readouterr().err
    assert "not this" not in said
    assert "WARNING prefill-1 x: but this" in said


def test_text_is_one_line_whatever_a_peer_put_into_the_message(root, capsys):
    configure(LogSettings(), "coordinator")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("x").exception("worker %s", "a\x1b[2J\nINFO forged \u202e ünï")
    first, *trace = capsys.readouterr().err.splitlines()
    assert first.endswith(r"x: worker a\x1b[2J\nINFO forged \u202e ünï")
    assert trace[0].startswith("Traceback")
    assert trace[-2:] == ["ValueError: two", "lines"]


def test_time_is_utc():
    record = logging.LogRecord("n", logging.INFO, "", 0, "m", None, None)
    record.created = 0.5
    assert json.loads(JsonFormatter("p").format(record))["time"] == "1970-01-01T00:00:00.500+00:00"
