"""Tokens as OpenAI writes them, and answers taken apart token by token."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import TokenLogprob
from services.frontend.answers.deltas import CallArguments, CallBegins, Content, Reasoning
from services.frontend.openai.answer import AnswerText, joined
from services.frontend.openai.choices import seed_of
from services.frontend.openai.tokens import LEAST_LOGPROB, Offsets, Spelling
from tests.integration.openai_rig import EOS, Brackets, Bytes, Decoded

SPELLING = Spelling(Bytes.tokens, Bytes.control_tokens)


def test_what_has_no_probability_can_be_said_in_json():
    item = TokenLogprob(65, -math.inf, ((66, -math.inf),))
    said = SPELLING.chat([item])
    assert said.content[0].logprob == LEAST_LOGPROB
    assert said.content[0].top_logprobs[0].logprob == LEAST_LOGPROB
    assert Offsets(SPELLING).completion([item]).token_logprobs == [LEAST_LOGPROB]


def test_tokens_that_spell_nothing_have_names_or_none():
    assert [SPELLING.text_of(t) for t in (65, EOS, 300)] == ["A", "<|end|>", ""]
    assert SPELLING.chat([TokenLogprob(EOS, -1.0)]).content[0].token == "<|end|>"


@settings(deadline=None)
@given(st.text(max_size=12))
def test_offsets_are_where_tokens_begin(text):
    said = Offsets(SPELLING).completion([TokenLogprob(b, -1.0) for b in text.encode()])
    spelled = list(text.encode())
    for i, offset in enumerate(said.text_offset):
        before = bytes(spelled[:i]).decode(errors="ignore")
        assert offset == len(before)


@settings(deadline=None)
@given(
    st.text("ab[]{}()é", max_size=30), st.lists(st.integers(1, 4)), st.sampled_from(["", "b", "a)"])
)
def test_deltas_do_not_depend_on_how_tokens_come(text, cuts, stop):
    tokens = list(text.encode())
    stops = (stop,) if stop else ()
    whole = AnswerText(Decoded(), stops, Brackets(False))
    taken, _ = whole.push(tokens)
    if not whole.stopped:
        whole.finish()
    parts = AnswerText(Decoded(), stops, Brackets(False))
    deltas, at = [], 0
    for cut in [*cuts, len(tokens)]:
        if parts.stopped:
            break
        at += parts.push(tokens[at : at + cut])[0]
        deltas += parts.take()
    if not parts.stopped:
        parts.finish()
    assert joined([*deltas, *parts.take()]) == whole.take()
    assert at == taken
    assert parts.thought_tokens == whole.thought_tokens


def test_a_stop_string_gives_what_the_parser_held_back():
    text = AnswerText(Decoded(), ("!",), Brackets(False))
    assert text.push(list(b"a{fo!x")) == (5, "")
    assert text.stopped
    assert text.take() == [Content("a{fo")]


def test_only_what_goes_on_is_joined():
    deltas = [
        Content("a"),
        Content("b"),
        Reasoning("c"),
        CallBegins(0, "f"),
        CallArguments(0, "1"),
        CallArguments(0, "2"),
        CallBegins(1, "g"),
        CallArguments(1, "3"),
    ]
    assert joined(deltas) == [
        Content("ab"),
        Reasoning("c"),
        CallBegins(0, "f"),
        CallArguments(0, "12"),
        CallBegins(1, "g"),
        CallArguments(1, "3"),
    ]


def test_seeds_of_answers_differ_between_neighbours():
    seeds = {seed_of(seed, k) for seed in range(100) for k in range(20)}
    assert len(seeds) == 2000
    assert seed_of(5, 0) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)
    # SplitMix64's published first output for the state 0.
    assert seed_of(0, 1) == 0xE220A8397B1DCDAF
