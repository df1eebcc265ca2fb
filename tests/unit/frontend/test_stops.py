"""Stop strings: the same answer however the text is cut, and nothing held back in vain."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.stops import StopStrings
from services.frontend.text import TextStream

WORDS = st.text("ab", min_size=1, max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By brute force: the first stop string to end, and of those the one that begins first."""
    for end in range(1, len(text) + 1):
        ending = [len(s) for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(derandomize=True, deadline=None)
@given(
    st.text("abc", max_size=40),
    st.lists(WORDS, min_size=1, max_size=4),
    st.lists(st.integers(0, 99)),
)
def test_any_cut_gives_what_brute_force_gives(text, stops, places):
    watch = StopStrings(stops)
    out = "".join(watch.push(piece) for piece in cut(text, places))
    if not watch.found:
        out += watch.finish()
    assert (out, watch.found) == expected(text, stops)


@settings(derandomize=True, deadline=None)
@given(st.text("ab", max_size=30), st.lists(WORDS, min_size=1, max_size=4))
def test_only_what_may_begin_a_stop_string_is_held(text, stops):
    watch = StopStrings(stops)
    out = ""
    for i, character in enumerate(text, start=1):
        out += watch.push(character)
        if watch.found:
            return
        held = text[len(out) : i]
        assert out + held == text[:i]
        assert not held or any(s.startswith(held) for s in stops)


def test_nothing_comes_after_the_end():
    watch = StopStrings(["."])
    assert watch.push("a.b") == "a"
    assert watch.push("c") == ""
    assert watch.finish() == ""


class Letters:
    """Token n is a letter; 26 and above are half of an 'é', which comes with the second half."""

    def __init__(self) -> None:
        self.half = False

    def push(self, token_ids):
        out = ""
        for token in token_ids:
            if token >= 26:
                out += "é" if self.half else ""
                self.half = not self.half
            else:
                out += chr(97 + token)
        return out

    def finish(self):
        return "\ufffd" if self.half else ""


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 3) | st.just(26), max_size=30),
    st.lists(st.text("abcdé", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 99)),
)
def test_tokens_taken_and_text_do_not_depend_on_frames(tokens, stops, places):
    def run(frames):
        stream = TextStream(Letters(), stops)
        taken, text = 0, ""
        for frame in frames:
            count, more = stream.push(frame)
            taken, text = taken + count, text + more
            if stream.stopped:
                return taken, text, True
        text += stream.finish()
        return taken, text, stream.stopped

    edges = sorted({0, len(tokens), *(p % (len(tokens) + 1) for p in places)})
    frames = [tokens[a:b] for a, b in itertools.pairwise(edges)]
    assert run(frames) == run([[t] for t in tokens])


def test_a_stop_string_in_what_was_held_back_is_found():
    stream = TextStream(Letters(), ["\ufffd"])
    assert stream.push([0, 26]) == (2, "a")
    assert stream.finish() == ""
    assert stream.stopped
