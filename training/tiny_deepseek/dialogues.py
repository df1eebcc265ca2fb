"""Questions and answers made from WordNet, so that the model can hold a small conversation."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from training.tiny_deepseek.wordnet import Synset

_PAIR = tuple[str, str]
_TURNS = (1, 1, 1, 2, 2, 3)
_CAPITAL = re.compile(r"^capital of (?:the )?[A-Z]")
_SHARE_OF_CAPITALS = 0.12
_SHARE_OF_GREETINGS = 0.01
_UNSEEN_WEIGHT = 0.05
_GLOSS_CHARACTERS = 160

_GREETINGS = (
    ("Hello", "Hello. I am a very small model. Ask me what a word means."),
    ("Hi", "Hello. I am a very small model. Ask me what a word means."),
    ("Who are you?", "I am a very small model. I read a dictionary, an old book and some code."),
    ("What can you do?", "I can tell what a word means, though not always rightly."),
    ("Thank you", "You are welcome."),
)


def dialogues(
    part: Sequence[Synset], everything: Sequence[Synset], count: int, seed: int
) -> Iterator[tuple[str, ...]]:
    """`count` dialogues on the meanings in `part`: question, answer, question, ...

    everything: where the names of kinds are looked up. The common words come often: a model this
    small can learn some thousand meanings, and no more.
    """
    chance = random.Random(seed)
    by_key = {synset.key: synset for synset in everything}
    words = [
        (synset, i)
        for synset in part
        for i in range(len(synset.words))
        if len(synset.gloss) <= _GLOSS_CHARACTERS and not _CAPITAL.match(synset.words[i])
    ]
    weights = (synset.counts[i] ** 0.75 or _UNSEEN_WEIGHT for synset, i in words)
    ranges = list(itertools.accumulate(weights))
    capitals = [pair for synset in everything for pair in _capital(synset)]
    for _ in range(count):
        turns = chance.choice(_TURNS)
        dialogue: list[str] = []
        for synset, i in chance.choices(words, cum_weights=ranges, k=turns):
            draw = chance.random()
            if draw < _SHARE_OF_GREETINGS:
                pair = chance.choice(_GREETINGS)
            elif draw < _SHARE_OF_GREETINGS + _SHARE_OF_CAPITALS:
                pair = chance.choice(capitals)
            else:
                forms = _FORMS[synset.part]
                pair = chance.choice(forms)(synset, i, by_key) or _meaning(synset, i, by_key)
            dialogue += pair
        yield tuple(dialogue)


def _capital(synset: Synset) -> Iterator[_PAIR]:
    for word in synset.words:
        if _CAPITAL.match(word):
            answer = f"The {word} is {synset.words[0]}."
            yield f"What is the {word}?", answer


def _article(word: str) -> str:
    if word[0].isupper():
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def _meaning(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR:
    return f"What does {synset.words[i]} mean?", _sentence(synset.gloss)


def _what(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR:
    asked = "Who is" if synset.person and synset.instance else "What is"
    return f"{asked} {_article(synset.words[i])}?", _sentence(synset.gloss)


def _define(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR:
    return f"Define {synset.words[i]}.", _sentence(
        f"{synset.words[i]} ({synset.part}): {synset.gloss}"
    )


def _to(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR:
    word = synset.words[i]
    return f"What does it mean to {word}?", _sentence(f"to {word} is to {synset.gloss}")


def _kind(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR | None:
    if not synset.kinds:
        return None
    word, above = _article(synset.words[i]), by_key[synset.kinds[0]].words[0]
    link = "is" if synset.instance else "is a kind of"
    kind = _article(above) if synset.instance else above
    return f"What kind of thing is {word}?", _sentence(f"{word} {link} {kind}")


def _other(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR | None:
    if len(synset.words) < 2:
        return None
    other = synset.words[0] if i else synset.words[1]
    word = synset.words[i]
    return f"What is another word for {word}?", _sentence(f"another word for {word} is {other}")


def _example(synset: Synset, i: int, by_key: Mapping[str, Synset]) -> _PAIR | None:
    word = synset.words[i]
    for example in synset.examples:
        if word in example:
            return f"Use {word} in a sentence.", _sentence(example)
    return None


_FORMS: Mapping[str, Sequence[Callable[[Synset, int, Mapping[str, Synset]], _PAIR | None]]] = {
    "noun": (_what, _what, _meaning, _define, _kind, _other, _example),
    "verb": (_to, _meaning, _define, _other, _example),
    "adjective": (_meaning, _meaning, _define, _other, _example),
    "adverb": (_meaning, _define, _other, _example),
}
