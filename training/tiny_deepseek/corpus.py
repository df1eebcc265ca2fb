"""The corpus: text that Debian packages carry, fetched by `apt-get download`, cut into documents.

Only packages whose text may be used and passed on by anyone: `SOURCES` says each one's licence.
Nothing is installed, and no root is needed.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.tiny_deepseek.dialogues import dialogues
from training.tiny_deepseek.wordnet import Synset, read_synsets

HELD_OUT_EVERY = 50
"""Of this many documents one is never trained on."""
_SYNSETS_A_DOCUMENT = 12
_DIALOGUES = 60_000
_LONGEST_CODE = 200_000


@dataclass(frozen=True, slots=True)
class Source:
    """A domain of the corpus. share: of the training tokens, in hundredths."""

    domain: str
    packages: tuple[str, ...]
    share: int
    licence: str
    about: str


SOURCES = (
    Source(
        "scripture",
        ("bible-kjv", "bible-kjv-text"),
        20,
        "public domain",
        "the King James Bible, a chapter a document",
    ),
    Source(
        "dictionary",
        ("wordnet-base",),
        15,
        "WordNet 3.0 licence",
        "WordNet's words, meanings and examples",
    ),
    Source(
        "jargon",
        ("dict-jargon",),
        10,
        "public domain",
        "the Jargon File, an entry a document",
    ),
    Source(
        "manual",
        ("python3.11-doc",),
        10,
        "PSF licence 2",
        "Python's tutorial, library and language reference, in reStructuredText",
    ),
    Source(
        "code",
        ("libpython3.11-stdlib", "libpython3.11-minimal"),
        10,
        "PSF licence 2",
        "Python's standard library",
    ),
    Source(
        "chat",
        ("wordnet-base",),
        35,
        "WordNet 3.0 licence",
        "questions and answers made from WordNet: meanings, kinds, synonyms, capitals",
    ),
)


@dataclass(frozen=True, slots=True)
class Document:
    """text of one domain; of a dialogue `turns` instead: question, answer, question, ..."""

    text: str = ""
    turns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """Documents to train on, and others to measure with."""

    train: list[Document]
    held_out: list[Document]


def fetch(folder: Path) -> dict[str, str]:
    """Downloads and unpacks what is missing; returns each package's version.

    Raises CalledProcessError, with what apt-get or dpkg-deb said on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in sorted({p for source in SOURCES for p in source.packages}):
        if not any(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        if not (folder / package).is_dir():
            subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True)
        asked = ["dpkg-deb", "--field", str(deb), "Version"]
        versions[package] = subprocess.run(
            asked, check=True, capture_output=True, text=True
        ).stdout.strip()
    return versions


def read(folder: Path) -> dict[str, Domain]:
    """Every domain, from the packages that `fetch` unpacked below `folder`."""
    entries = read_synsets(folder / "wordnet-base/usr/share/wordnet")
    runs = [
        entries[i : i + _SYNSETS_A_DOCUMENT] for i in range(0, len(entries), _SYNSETS_A_DOCUMENT)
    ]
    dictionary = _divided(_plain("\n".join(_entry(s) for s in run) for run in runs))
    parts = [
        [synset for i, run in enumerate(runs) if _is_held_out(i) == held for synset in run]
        for held in (False, True)
    ]
    chat = [
        [Document(turns=d) for d in dialogues(part, entries, count, seed)]
        for seed, (part, count) in enumerate(
            zip(parts, (_DIALOGUES, _DIALOGUES // HELD_OUT_EVERY), strict=True)
        )
    ]
    return {
        "scripture": _divided(_plain(_scripture(folder))),
        "dictionary": dictionary,
        "jargon": _divided(_plain(_jargon(folder))),
        "manual": _divided(_plain(_manual(folder))),
        "code": _divided(_plain(_code(folder))),
        "chat": Domain(*chat),
    }


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2


def _divided(documents: Iterable[Document]) -> Domain:
    domain = Domain([], [])
    for index, document in enumerate(documents):
        (domain.held_out if _is_held_out(index) else domain.train).append(document)
    return domain


def _plain(texts: Iterable[str]) -> Iterator[Document]:
    return (Document(text.strip() + "\n") for text in texts if text.strip())


def _scripture(folder: Path) -> Iterator[str]:
    """The text is compressed in a form of its own, which its program reads."""
    program = folder / "bible-kjv/usr/bin/bible"
    data = folder / "bible-kjv-text/usr/lib"
    said = subprocess.run(
        [program, "-l0", "-p", data, "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    for chapter in re.split(r"\n(?=\n[1-3A-Z][\w ]+ \d+\n\n)", said):
        lines = [" ".join(part.split()) for part in re.split(r"\n(?=  \d+ |\n)", chapter)]
        yield "\n".join(re.sub(r"^\d+ (?=[A-Z(])", "", line) for line in lines if line)


def _entry(synset: Synset) -> str:
    examples = "".join(f'; "{example}"' for example in synset.examples)
    return f"{', '.join(synset.words)} ({synset.part}): {synset.gloss}{examples}"


def _jargon(folder: Path) -> Iterator[str]:
    packed = folder / "dict-jargon/usr/share/dictd/jargon.dict.dz"
    text = gzip.decompress(packed.read_bytes()).decode()
    text = re.sub(r"[{}]", "", re.sub(r"\{\s+", "{", text))
    for entry in re.split(r"\n(?=\S)", text):
        if not entry.startswith("00-database"):
            yield re.sub(r"\n\s*\n\s*\n", "\n\n", re.sub(r"(?m)^    ", "", entry))


def _manual(folder: Path) -> Iterator[str]:
    home = folder / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for part in ("tutorial", "library", "reference", "howto", "faq", "using", "c-api"):
        for path in sorted((home / part).rglob("*.txt")):
            yield path.read_text(encoding="utf-8")


def _code(folder: Path) -> Iterator[str]:
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        home = folder / package / "usr/lib/python3.11"
        for path in sorted(home.rglob("*.py")):
            if path.is_file() and "encodings" not in path.parts:  # some links lead nowhere
                text = path.read_text(encoding="utf-8", errors="replace")
                if text.isascii() and len(text) < _LONGEST_CODE:
                    yield text
