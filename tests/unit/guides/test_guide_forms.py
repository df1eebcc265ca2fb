"""Every form: what comes out has it, what has it can come out, and where it ends."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance._lib import LLParserLimits

from services.engine.api import Guide, GuideKind
from services.engine.guides import guided as module
from services.engine.guides.guided import SAVED_SECONDS, Guided
from services.runtime.errors import GuideFailedError
from tests.unit.guides.guide_world import (
    EOS,
    PIECES,
    TOKENS,
    VOCABULARY,
    allowed,
    check,
    ids_of,
    regex,
    schema,
    schemas,
    spoken,
    text_of,
)

_atoms = st.sampled_from(["a", "b", "é", r"\d", "[a-c]", "[^a]", ".", r"\n", "/", r"\/", r"\."])
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        inner.map(lambda p: f"(?:{p})?"),
        inner.map(lambda p: f"({p}){{1,3}}"),
        inner.map(lambda p: f"(?:{p})*"),
    ),
    max_leaves=5,
)


def follows(guide: Guide, text: str) -> bool:
    """Whether a byte after byte of it is allowed, and then the end."""
    guided = Guided(VOCABULARY, guide)
    for token in ids_of(text):
        if token not in allowed(guided.masks()[0]):
            return False
        guided.accept([token])
    return set(EOS) <= set(allowed(guided.masks()[0]))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(schemas(), st.integers(0, 2**32))
def test_documents_are_what_their_schema_allows(of, seed):
    # A key or a number's digits have no end but by chance: one in a hundred tokens.
    tokens, ended = spoken(Guided(VOCABULARY, schema(of)), seed, most=5000)
    assert ended
    check(json.loads(text_of(tokens)), of)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(_patterns, st.text(alphabet="abcé0/.\n", max_size=6), st.integers(0, 2**32))
def test_a_regular_expression_matches_as_a_whole(pattern, text, seed):
    expected = re.fullmatch(pattern, text, re.ASCII) is not None
    assert follows(regex(pattern), text) == expected
    tokens, ended = spoken(Guided(VOCABULARY, regex(pattern)), seed)
    if ended:
        assert re.fullmatch(pattern, text_of(tokens))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    st.integers(0, 2**32),
)
def test_a_choice_is_one_of_its_texts(texts, seed):
    guide = Guide(GuideKind.CHOICE, tuple(texts))
    tokens, ended = spoken(Guided(VOCABULARY, guide), seed)
    assert ended
    assert text_of(tokens) in texts
    assert all(follows(guide, text) for text in texts)
    assert not follows(guide, "".join(texts) + "x")


def test_a_grammar_derives_what_comes():
    grammar = """
        start: sum   // an example
        sum: product ("+" product)*
        product: NUMBER ("*" NUMBER)~0..2
        NUMBER: /[1-9][0-9]?/
    """
    guide = Guide(GuideKind.GRAMMAR, (grammar,))
    assert follows(guide, "1+22*3")
    assert not follows(guide, "1+")
    assert not follows(guide, "1*2*3*4")
    for seed in range(20):
        tokens, ended = spoken(Guided(VOCABULARY, guide), seed)
        if ended:
            assert re.fullmatch(r"[1-9][0-9]?([+*][1-9][0-9]?)*", text_of(tokens))


def test_any_json_object_and_nothing_else():
    guide = Guide(GuideKind.JSON_OBJECT)
    for good in ("{}", '{"a":1}', '{ "a": [1, {"b": null}], "c": "x\\n" }', '{\n  "a": 1\n}'):
        assert follows(guide, good), good
    for bad in ("[]", "1", '{"a":1} ', '{"a":01}', '{"a":1,}', ' {"a":1}', '{"a":\t1}'):
        assert not follows(guide, bad), bad
    ended = 0
    for seed in range(40):
        tokens, over = spoken(Guided(VOCABULARY, guide), seed)
        if over:
            ended += 1
            assert isinstance(json.loads(text_of(tokens)), dict)
    assert ended > 10


def test_white_space_comes_once_at_a_place():
    """A model that likes line ends could go on for ever."""
    guide = schema({"type": "array", "items": {"type": "null"}})
    assert follows(guide, "[null, null,\n    null ]")
    assert not follows(guide, "[null,  null]")
    assert not follows(guide, "[\n\nnull]")


def test_properties_come_in_the_schemas_order_and_once():
    guide = schema({"properties": {"b": {"const": 1}, "a": {"const": 2}}, "type": "object"})
    assert follows(guide, '{"b":1,"a":2}')
    assert not follows(guide, '{"a":2,"b":1}')
    assert not follows(guide, '{"b":1,"b":1}')


def test_a_schema_may_refer_to_itself():
    tree = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/tree"}, "n": {"type": "integer"}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    }
    assert follows(schema(tree), '{"left":{"left":{"n":1},"n":2},"n":3}')
    assert not follows(schema(tree), '{"left":{"n":"1"},"n":3}')


def test_no_token_without_text_is_ever_allowed():
    guided = Guided(VOCABULARY, regex(r"(?s:.)*"))
    may = allowed(guided.masks()[0])
    assert set(may) <= {i for i, t in enumerate(TOKENS) if t} | set(EOS)
    assert {i for i, t in enumerate(TOKENS) if t in {p.encode() for p in PIECES}} <= set(may)


def test_every_token_that_spells_the_text_may():
    guided = Guided(VOCABULARY, regex("abc"))
    assert {TOKENS[t] for t in allowed(guided.masks()[0])} == {b"a", b"ab", b"abc"}
    twice = [i for i, t in enumerate(TOKENS) if t == b"ab"]
    assert set(twice) <= set(allowed(guided.masks()[0]))


def test_the_end_comes_where_the_form_is_complete_and_alone_where_nothing_can_follow():
    guided = Guided(VOCABULARY, regex("ab?"))
    assert not set(EOS) & set(allowed(guided.masks()[0]))
    guided.accept(ids_of("a"))
    assert set(allowed(guided.masks()[0])) == {*EOS, *ids_of("b")}
    guided.accept(ids_of("b"))
    assert set(allowed(guided.masks()[0])) == set(EOS)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(schemas(), st.integers(0, 2**32))
def test_a_form_taken_up_in_the_middle_allows_what_it_would_have(of, seed):
    form = Guided(VOCABULARY, schema(of))
    tokens, _ = spoken(form.again(), seed)
    masks = []
    whole = Guided(VOCABULARY, schema(of))
    for token in tokens:
        masks.append(whole.masks()[0])
        whole.accept([token])
    for cut in range(len(tokens)):
        late = form.again()
        late.accept(tokens[:cut])
        assert (late.masks()[0] == masks[cut]).all(), cut


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(schemas(), st.integers(0, 2**32), st.integers(1, 4))
def test_looking_ahead_sees_what_following_does_and_changes_nothing(of, seed, ahead):
    tokens, _ = spoken(Guided(VOCABULARY, schema(of)), seed)
    tokens = tokens[:-1]
    guided, plain = Guided(VOCABULARY, schema(of)), Guided(VOCABULARY, schema(of))
    chance = random.Random(seed)
    expected = []
    for token in tokens:
        expected.append(plain.masks()[0])
        plain.accept([token])
    expected.append(plain.masks()[0])
    at = 0
    while at < len(tokens):
        drafts = list(tokens[at : at + ahead])
        wrong = chance.randrange(len(drafts) + 1)
        if wrong < len(drafts):
            may = set(allowed(expected[at + wrong]))
            drafts[wrong] = next(t for t in range(len(TOKENS)) if t not in may)
        for row in range(len(drafts) + 1):
            look = guided.look(drafts[:row])
            assert (row > wrong) if look is None else (look == expected[at + row]).all()
        rows = guided.masks(drafts)
        assert len(rows) == wrong + 1
        for row, mask in enumerate(rows):
            assert (mask == expected[at + row]).all()
        guided.accept(tokens[at : at + wrong + 1])
        at += wrong + 1
    assert guided.failure is None


def test_a_draft_of_the_end_is_looked_behind_by_nobody():
    guided = Guided(VOCABULARY, regex("a*"))
    drafts = [*ids_of("a"), EOS[1], *ids_of("a")]
    rows = guided.masks(drafts)
    assert len(rows) == 2
    assert set(EOS) <= set(allowed(rows[1]))
    assert guided.look(drafts[:2]) is None
    guided.accept(ids_of("aa"))
    assert set(EOS) <= set(allowed(guided.masks()[0]))


DEAD_END = 'start: "a" end | "ok"\nend: end "x"'


def test_a_dead_end_is_told_and_is_no_end_of_the_text():
    guided = Guided(VOCABULARY, Guide(GuideKind.GRAMMAR, (DEAD_END,)))
    guided.accept(ids_of("a"))
    assert allowed(guided.masks()[0]) == []
    assert isinstance(guided.failure, GuideFailedError)
    assert "no text" in guided.failure.message


def test_a_dead_end_behind_a_draft_harms_only_who_goes_there():
    guided = Guided(VOCABULARY, Guide(GuideKind.GRAMMAR, (DEAD_END,)))
    rows = guided.masks(ids_of("a"))
    assert allowed(rows[1]) == []
    assert allowed(guided.look(ids_of("a"))) == []
    assert guided.failure is None
    assert set(ids_of("ao")) <= set(allowed(guided.masks()[0]))
    guided.accept(ids_of("ok"))
    assert set(allowed(guided.masks()[0])) == set(EOS)


def test_what_the_library_says_of_a_grammar_beyond_it_is_one_line_for_a_person(monkeypatch):
    monkeypatch.setattr(module, "_LIMITS", LLParserLimits(step_max_items=30))
    grammar = 'start: "b" x*\nx: y{1,500}\ny: "a" | "a" "a" | x'
    guided = Guided(VOCABULARY, Guide(GuideKind.GRAMMAR, (grammar,)))
    guided.accept(ids_of("b"))
    guided.masks()
    assert "too complex to follow here: parser error: Too many items" in guided.failure.message
    assert not set("\n<>") & set(guided.failure.message)


def test_output_that_does_not_have_the_form_is_told():
    guided = Guided(VOCABULARY, regex("ab"))
    guided.accept(ids_of("ax"))
    assert allowed(guided.masks()[0]) == []
    assert guided.failure is not None


def test_a_grammar_that_takes_too_long_is_given_up():
    ticks = iter(range(1000))
    guided = Guided(VOCABULARY, regex("a*"), cpu_clock=lambda: 0.1)
    assert guided.failure is None
    guided._clock = lambda: float(next(ticks))
    guided.masks()
    assert guided.failure is not None
    assert "too long" in guided.failure.message


class Clock:
    """Goes on by `each` whenever it is read."""

    def __init__(self) -> None:
        self.now = self.each = 0.0

    def __call__(self) -> float:
        self.now += self.each
        return self.now


@pytest.mark.parametrize(("each", "given_up"), [(0.009, False), (0.05, True), (0.2, True)])
def test_what_masks_take_is_bounded_over_time(each, given_up):
    clock = Clock()
    guided = Guided(VOCABULARY, regex("a*b"), cpu_clock=clock)
    clock.each = each
    spent = 0.0
    for _ in range(300):
        guided.accept(ids_of("a"))
        guided.masks()
        if guided.failure is not None:
            break
        spent += each
    assert (guided.failure is not None) is given_up
    assert not given_up or SAVED_SECONDS <= spent <= 1.3 * SAVED_SECONDS


def test_what_looking_ahead_takes_is_bounded_over_time_and_ends_nothing_else():
    clock = Clock()
    guided = Guided(VOCABULARY, regex("a*b"), cpu_clock=clock)
    looks = 0
    for _ in range(300):
        clock.each = 0.03
        looks += guided.look(ids_of("a")) is not None
        clock.each = 0.0
        guided.accept(ids_of("a"))
        guided.masks()
        assert guided.failure is None
    assert 10 <= looks <= 60


def test_who_was_slow_at_a_draft_has_no_drafts_any_more_and_goes_on():
    clock = Clock()
    guided = Guided(VOCABULARY, regex("a*b"), cpu_clock=clock)
    drafts = ids_of("aaa")
    assert len(guided.masks(drafts)) == 4
    clock.each = 0.3
    assert guided.look(drafts) is None
    clock.each = 0.0
    assert guided.look(drafts) is None
    assert guided.failure is None
    rows = guided.masks(drafts)
    assert len(rows) == 1
    assert set(allowed(rows[0])) == {
        *ids_of("ab"),
        *(i for i, t in enumerate(TOKENS) if t == b"ab"),
    }
    guided.accept(ids_of("aab"))
    assert set(allowed(guided.masks()[0])) == set(EOS)
    assert guided.failure is None


def test_rows_end_where_looking_ahead_takes_too_long():
    clock = Clock()
    guided = Guided(VOCABULARY, regex("a*b"), cpu_clock=clock)
    clock.each = 0.1  # the mask itself takes so long, three behind drafts three times that
    assert len(guided.masks(ids_of("aaa"))) == 3
    assert guided.failure is None
    assert len(guided.masks(ids_of("aaa"))) == 1


def test_what_was_said_of_the_last_mask_is_not_said_of_the_next():
    clock = Clock()
    guided = Guided(VOCABULARY, regex("a*b"), cpu_clock=clock)
    clock.each = 0.3
    guided.masks()
    assert guided.failure is not None
    clock.each = 0.0
    assert allowed(guided.masks()[0])
    assert guided.failure is None


def test_output_without_the_form_stays_without_it():
    guided = Guided(VOCABULARY, regex("aax"))
    guided.accept(ids_of("ax"))
    for _ in range(3):
        assert guided.look(()) is None
        assert allowed(guided.masks()[0]) == []
        assert guided.failure is not None


def test_sequences_of_one_form_know_nothing_of_each_other():
    one = Guided(VOCABULARY, regex("ab|cd"))
    one.accept(ids_of("a"))
    one.masks()
    other = one.again()
    other.accept(ids_of("c"))
    assert set(allowed(one.masks()[0])) == set(ids_of("b"))
    assert set(allowed(other.masks()[0])) == set(ids_of("d"))
    one.accept(ids_of("x"))
    one.masks()
    assert one.failure is not None
    assert one.again().failure is None


@pytest.mark.parametrize("text", ["", "x", "ab", "日本é"])
def test_bytes_of_a_character_may_come_apart(text):
    assert follows(regex(f"{text}|never"), text)
