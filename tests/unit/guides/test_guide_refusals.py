"""What is refused, in which words, and that trying it can't hurt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from services.engine.api import Guide, GuideKind, Request, Sampling
from services.engine.guides import trial
from services.engine.guides.compiling import Guides as EngineGuides
from services.engine.guides.grammar import MAX_TEXT_BYTES
from services.engine.guides.guided import Guided
from services.engine.guides.trial import Trial
from services.engine.guides.vocabulary import Vocabulary
from services.frontend.guides import Guides
from services.runtime.errors import GuideFailedError, InvalidRequestError
from tests.unit.guides.guide_world import EOS, SIZE, TOKENS, VOCABULARY, ids_of, regex, schema

SECONDS = 2.0


def refusal(guide: Guide) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as found:
        Guided(VOCABULARY, guide)
    return found.value


@pytest.mark.parametrize(
    ("of", "place", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "#", "uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a", "'not'"),
        ({"properties": {"a/b": {"maxLenght": 3}}}, "#/properties/a~1b", "maxLenght"),
        ({"anyOf": [{}, {"if": {}, "then": {}}]}, "#/anyOf/1", "'if'"),
        ({"$defs": {"x": {"contains": {}}}}, "#/$defs/x", "contains"),
        ({"items": {"x-guidance": {"lenient": True}}}, "#/items", "x-guidance"),
        ({"x-guidance": {"lenient": True}}, "#", "x-guidance"),
        ({"items": [{}, {}]}, "#/items", "object, true or false"),
        ({"properties": {"$id": {"$id": "x"}}}, "#/properties/$id", "$id"),
        ({"$ref": "#/examples/0", "examples": [{"not": {}}]}, "#/$ref", "#/$defs/name"),
        ({"$ref": "https://example.com/s.json"}, "#/$ref", "#/$defs/name"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "#/$schema", "2020-12"),
        ({"type": "integer", "exclusiveMinimum": True}, "#/exclusiveMinimum", "number"),
        ({"type": "string", "maxLength": -1}, "#/maxLength", "0 or more"),
        ({"type": "object", "required": "a"}, "#/required", "array of texts"),
        ({"type": "object", "minProperties": 2}, "#/minProperties", "one more than"),
        ({"anyOf": {}}, "#/anyOf", "array of schemas"),
        ({"properties": []}, "#/properties", "object of schemas"),
        ({"allOf": [3]}, "#/allOf/0", "object, true or false"),
        ({"type": "object", "patternProperties": {"a": 5}}, "#/patternProperties/a", "object,"),
    ],
)
def test_a_keyword_that_is_not_enforced_is_named_with_its_place(of, place, words):
    error = refusal(schema(of))
    assert error.metadata["field"] == "sampling.guide.json_schema"
    assert f"at {place}:" in error.message
    assert words in error.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least one character"),
        ("{", "must be JSON"),
        ("[]", "is an object"),
        ("false", "is an object"),
        ('{"minimum": NaN}', "no such number"),
        ('{"minimum": 1e999}', "float64"),
        ('{"enum": []}', "empty"),
        ('{"type": "strin"}', "strin"),
        ('{"type": "string", "format": "colour"}', "colour"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
        ('{"type": "integer", "minimum": 2, "maximum": 1}', "greater than"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no text"),
        ('{"const": "\\ud800"}', "json_schema"),
    ],
)
def test_what_is_no_schema_is_refused_in_words(text, words):
    error = refusal(Guide(GuideKind.JSON_SCHEMA, (text,)))
    assert error.metadata["field"] == "sampling.guide.json_schema"
    assert words in error.message


@pytest.mark.parametrize(
    "of",
    [
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "type": "null"},
        {"title": "t", "description": "d", "default": 3, "examples": [{"not": 1}], "type": "null"},
        {"const": {"not": {"uniqueItems": 1}}},
        {"enum": [{"if": 1}]},
        {"type": "object", "required": ["a"], "minProperties": 2, "properties": {"a": {}}},
        {"properties": {"not": {"type": "null"}, "$ref": {"type": "null"}}},
        {"$ref": "#/properties/a", "properties": {"a": {"type": "object"}}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}},
        {"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "null"}}},
        True,
    ],
)
def test_what_looks_like_a_keyword_and_is_none_is_no_reason(of):
    Guided(VOCABULARY, schema(of))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('start: "a" b', "unknown name"),
        ("start: <[5]>", "line 1"),
        ('start: "a"\nx: <|end|>', "line 2"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "%import and %ignore"),
        ("start: %json {}", "%import and %ignore"),
        ("start: %regex {}", "%import and %ignore"),
        ("start: @other", "refer"),
        ('start: x\nx[temperature=2.0]: "a"', "attributes"),
        ('start: x\n?x[max_tokens=2] : "a"', "attributes"),
        ("start: X\nX: /a/ & /b/", "intersected"),
        ("start: X\nX: ~/a/", "negated"),
        ('start: perm::0x0\nperm::_: "a"', "parameters"),
        ('b: "a"', "start"),
        ("start: a\na: a", "no text"),
        ('start: "a\n', "grammar"),
    ],
)
def test_only_larks_own_notation_is_taken(grammar, words):
    error = refusal(Guide(GuideKind.GRAMMAR, (grammar,)))
    assert error.metadata["field"] == "sampling.guide.grammar"
    assert words in error.message


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "<[5]>" "@x" "%json" "a & b" "x[y]:" // <a> @b %json {}',
        r"start: /<a>|@b|\/%json|~c&/ # ~ & <a>",
        'start: ["a"] "b"~2 ("c")~1..3',
        '%import common.INT\n%ignore " "\nstart: INT',
    ],
)
def test_text_and_comments_may_say_anything(grammar):
    Guided(VOCABULARY, Guide(GuideKind.GRAMMAR, (grammar,)))


def test_regular_expressions_and_choices_are_refused_by_name():
    for bad in ("(a", r"\1", "(?!a)", "[", r"\bfoo", "", "(?x"):
        assert refusal(regex(bad)).metadata["field"] == "sampling.guide.regex"
    for texts in ((), ("",), ("a", "a"), ("a",) * 5000):
        field = refusal(Guide(GuideKind.CHOICE, texts)).metadata["field"]
        assert field.startswith("sampling.guide.choice.texts")
    assert str(MAX_TEXT_BYTES) in refusal(regex("a" * (MAX_TEXT_BYTES + 1))).message


def test_a_message_does_not_repeat_a_long_guide():
    error = refusal(regex("(" * 20_000))
    assert len(error.message) < 700


def test_a_model_without_an_end_can_follow_no_guide():
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        Vocabulary(TOKENS, SIZE, ())


# Hostile ones, tried as a frontend does


def chain(n: int, link) -> dict:
    """Definitions that each refer to the next."""
    found = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": found | {f"d{n}": {"type": "null"}}}


def product(n: int) -> dict:
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"maxLength": j}}} for j in range(4)]}
            for i in range(n)
        ]
    }


HOSTILE = {
    "deep": Guide(GuideKind.JSON_SCHEMA, ('{"items":' * 5000 + "{}" + "}" * 5000,)),
    "deep arrays": Guide(GuideKind.JSON_SCHEMA, ("[" * 100_000,)),
    "huge enum": schema({"enum": [f"value {i}" for i in range(15_000)]}),
    "many properties": schema({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    "long chain": schema(chain(4000, lambda ref: {"items": ref})),
    "long chain of all": schema(chain(3000, lambda ref: {"allOf": [ref, {"minLength": 1}]})),
    "fan": schema(chain(40, lambda ref: {"anyOf": [ref, ref]})),
    "wide fan": schema(chain(40, lambda ref: {"properties": {"a": ref, "b": ref}})),
    "product": schema(product(14)),
    "patterns": schema({"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(60)]}),
    "long text": schema({"type": "string", "minLength": 10**8, "maxLength": 10**9}),
    "many items": schema({"type": "array", "minItems": 10**7, "items": {"type": "integer"}}),
    "factor": schema({"type": "integer", "multipleOf": 982_451_653}),
    "catastrophic": regex("(x+x+)+y" * 50),
    "counted": regex("(((.{1,100}){1,100}){1,100}){1,100}x"),
    "stars": regex(".*" * 20_000),
    "brackets": regex("(" * 60_000 + "a" + ")" * 60_000),
    "chain of rules": Guide(
        GuideKind.GRAMMAR,
        ("start: x0\n" + "".join(f"x{i}: x{i + 1}\n" for i in range(15_000)) + 'x15000: "a"',),
    ),
    "chain of terminals": Guide(
        GuideKind.GRAMMAR,
        ("start: X0\n" + "".join(f"X{i}: X{i + 1} X{i + 1}\n" for i in range(60)) + 'X60: "a"',),
    ),
    "nested groups": Guide(GuideKind.GRAMMAR, ("start: " + "(" * 50_000 + '"a"' + ")" * 50_000,)),
}


@pytest.fixture(scope="module")
def shared():
    tried = Trial(TOKENS, SIZE, EOS, SECONDS)
    yield tried
    tried.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_guide_takes_long_to_try_and_none_ends_the_trial_for_others(name, shared):
    shared.check(regex("a"))
    began = time.monotonic()
    refused = None
    try:
        shared.check(HOSTILE[name])
    except InvalidRequestError as error:
        refused = error
    # A process that it was too much for is started again by the next one.
    assert time.monotonic() - began < SECONDS + 10
    if refused is not None:
        assert refused.metadata["field"].startswith("sampling.guide.")
        assert len(refused.message) < 700
    shared.check(schema({"type": "integer"}))
    with pytest.raises(InvalidRequestError, match="unclosed"):
        shared.check(regex("(a"))


def test_what_can_be_compiled_can_be_followed_by_many_where_masks_are_made():
    """In a process, since a stack that is too small would end this one."""
    code = """
from services.engine.guides.guided import Guided
from services.engine.guides.threads import MaskThreads, deep_threads
from tests.unit.guides.guide_world import VOCABULARY
from tests.unit.guides.test_guide_refusals import HOSTILE

guides = deep_threads("guides", 2)
guided = guides.submit(Guided, VOCABULARY, HOSTILE["chain of rules"]).result()
others = [guides.submit(guided.again).result() for _ in range(20)]
found = MaskThreads().begin({i: other.masks for i, other in enumerate(others)}).result()
assert len(found) == 20
assert all((masks == found[0]).all() for masks in found.values())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_takes_too_long_is_given_up_and_the_next_is_tried():
    tried = Trial(TOKENS, SIZE, EOS, 0.3)
    try:
        with pytest.raises(InvalidRequestError, match=r"more than 0\.3 s"):
            tried.check(HOSTILE["patterns"])
        assert tried._process is None
        tried.check(regex("a"))
    finally:
        tried.close()
    assert tried._process is None


def test_a_trial_that_dies_refuses_its_guide_and_the_next_is_tried(monkeypatch):
    tried = Trial(TOKENS, SIZE, EOS, SECONDS)
    try:
        tried.check(regex("a"))
        os.kill(tried._process.pid, signal.SIGSTOP)
        pid, send = tried._process.pid, tried._pipe.send

        def die(guide):
            send(guide)
            os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(tried._pipe, "send", die)
        with pytest.raises(InvalidRequestError, match="memory"):
            tried.check(regex("b"))
        tried.check(regex("b"))
        tried._process.kill()
        tried._process.wait()
        tried.check(regex("c"))
    finally:
        tried.close()


def test_a_trial_ends_with_who_asks_it():
    tried = Trial(TOKENS, SIZE, EOS, SECONDS)
    tried.check(regex("a"))
    process = tried._process
    tried._pipe.close()
    assert process.wait(20) == 0


class Speaker:
    name, vocabulary, eos_token_ids, tokens = "m", SIZE, EOS, TOKENS


async def test_a_frontend_remembers_what_was_good(monkeypatch):
    guides = Guides(Speaker(), 1000, 10.0)
    tries: list[Guide] = []
    check = Trial.check
    monkeypatch.setattr(trial.Trial, "check", lambda s, g: (tries.append(g), check(s, g))[1])
    try:
        for _ in range(3):
            await guides.check(regex("a+"))
            with pytest.raises(InvalidRequestError):
                await guides.check(regex("(a"))
        assert tries.count(regex("a+")) == 1
        assert tries.count(regex("(a")) == 3
        with pytest.raises(InvalidRequestError, match="at most 1000 bytes"):
            await guides.check(schema({"enum": ["x" * 1000]}))
        assert len(tries) == 4
    finally:
        await guides.close()


async def test_a_frontend_for_a_model_without_an_end_says_so():
    speaker = Speaker()
    speaker.eos_token_ids = ()
    guides = Guides(speaker, 1000, 10.0)
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        await guides.check(regex("a"))
    await guides.close()


# At the engine


def request(guide: Guide, output=(), **sampling) -> Request:
    return Request("r", (5,), Sampling(guide=guide, **sampling), tuple(output))


async def test_an_engine_follows_what_earlier_attempts_generated():
    guides = EngineGuides(lambda: TOKENS, SIZE, EOS)
    guided = await guides.begin(request(regex("abc"), ids_of("ab")))
    assert [TOKENS[t] for t in range(SIZE) if guided.masks()[0][t // 32] >> (t % 32) & 1] == [b"c"]
    await guides.begin(request(regex("ab"), [*ids_of("ab"), EOS[0]]))
    with pytest.raises(GuideFailedError):
        await guides.begin(request(regex("abc"), ids_of("ax")))
    with pytest.raises(InvalidRequestError):
        await guides.begin(request(regex("(a")))
    guides.close()


def test_an_engine_refuses_what_it_could_not_follow():
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        EngineGuides(None, SIZE, EOS).check(request(regex("a")))
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        EngineGuides(lambda: TOKENS, SIZE, EOS).check(request(regex("a"), ignore_eos=True))
    EngineGuides(None, SIZE, EOS).check(Request("r", (5,), Sampling(ignore_eos=True)))


def test_schemas_of_every_size_are_walked_once():
    wide = {"properties": {f"p{i}": {"type": "string"} for i in range(400)}}
    began = time.process_time()
    Guided(VOCABULARY, Guide(GuideKind.JSON_SCHEMA, (json.dumps(wide),)))
    assert time.process_time() - began < 5
