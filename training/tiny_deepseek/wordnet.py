"""WordNet's data files (wndb(5WN)): sets of words with one meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PARTS = {"noun": (1, "noun"), "verb": (2, "verb"), "adj": (3, "adjective"), "adv": (4, "adverb")}
_SATELLITE = 5
_PERSON = 18


@dataclass(frozen=True, slots=True)
class Synset:
    """Words that share a meaning.

    counts: how often each word was met in this meaning in WordNet's own text. kinds: keys of the
    sets that this one is a kind of; instance: of one thing (Tokyo), not a kind of thing (city).
    """

    key: str
    part: str
    words: tuple[str, ...]
    counts: tuple[int, ...]
    gloss: str
    examples: tuple[str, ...]
    kinds: tuple[str, ...]
    instance: bool
    person: bool


def read_synsets(folder: Path) -> list[Synset]:
    """All of them, in the order of the files, which keeps like beside like."""
    counts = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        sense, _, count = line.split()
        counts[tuple(sense.split(":")[:3])] = int(count)
    return [
        _synset(line, file, counts)
        for file in _PARTS
        for line in (folder / f"data.{file}").read_text(encoding="utf-8").splitlines()
        if not line.startswith("  ")  # the licence
    ]


def _synset(line: str, file: str, counts: dict[tuple[str, ...], int]) -> Synset:
    data, _, about = line.partition(" | ")
    offset, lexfile, kind, count, *fields = data.split()
    number, part = _PARTS[file]
    end = 2 * int(count, 16)
    names, ids = fields[0:end:2], fields[1:end:2]
    pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]
    above = [
        (symbol, target + form)
        for symbol, target, form in zip(pointers[0::4], pointers[1::4], pointers[2::4], strict=True)
        if symbol in ("@", "@i")
    ]
    names = [re.sub(r"\((a|p|ip)\)$", "", name) for name in names]
    gloss, *rest = re.split(r';\s*(?=")', about.strip())
    return Synset(
        key=offset + file[0],
        part=part,
        words=tuple(name.replace("_", " ") for name in names),
        counts=tuple(
            counts.get(
                (
                    f"{name.lower()}%{_SATELLITE if kind == 's' else number}",
                    lexfile,
                    f"{int(i, 16):02}",
                ),
                0,
            )
            for name, i in zip(names, ids, strict=True)
        ),
        gloss=gloss.strip(" ;"),
        examples=tuple(found for one in rest for found in re.findall(r'"([^"]+)"', one)),
        kinds=tuple(target for _, target in above),
        instance=any(symbol == "@i" for symbol, _ in above),
        person=int(lexfile) == _PERSON,
    )
