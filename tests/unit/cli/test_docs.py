"""The pages made from the code are those that are checked in."""

from __future__ import annotations

import re

import pytest

from cli import docs
from cli.advice import ADVICE
from kvtransfer import errors as kv_errors
from services.runtime import errors
from services.runtime.load import known


@pytest.mark.parametrize(
    ("file", "page"), [("settings.md", docs.settings_page), ("errors.md", docs.errors_page)]
)
def test_the_page_is_current(file, page):
    assert (docs.DOCS / file).read_text() == page(), "run `make docs`"


def test_errors_lists_exactly_the_reasons_there_are():
    def tree(root: type) -> set[type]:
        return {root}.union(*(tree(kind) for kind in root.__subclasses__()))

    kinds = (tree(errors.TandemError) | tree(kv_errors.KvError)) - {errors.RetryableError}
    here = {kind.reason for kind in kinds if not kind.__module__.startswith("tests")}
    listed = re.findall(r"^\| `([A-Z_]+)` \|", docs.errors_page(), re.MULTILINE)
    assert sorted(here) == listed
    assert sorted(ADVICE) == listed


def test_settings_lists_every_setting():
    page = docs.settings_page()
    section, found = "", set()
    for line in page.splitlines():
        if match := re.match(r"## \[(\w+)\]", line):
            section = match[1]
        elif section and (match := re.match(r"\| `(\w+)` \|", line)):
            found.add(f"{section}.{match[1]}")
        elif line.startswith("## "):
            section = ""
    assert found == set(known())
