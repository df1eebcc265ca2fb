"""Every field of GenerateRequest: what is taken, what is refused and how it is named."""

from __future__ import annotations

import pytest

from services.engine.api import Sampling
from services.frontend.chat import Chat, Turn
from services.frontend.validate import (
    AskedSampling,
    ModelLimits,
    Prompt,
    Tokens,
    Wishes,
    check_input,
    check_model,
    check_request_id,
    check_sampling,
    check_session,
    check_stops,
    check_tenant,
    room_for_output,
)
from services.runtime.errors import InvalidRequestError, UnknownModelError

LIMITS = ModelLimits("m", context_tokens=100, vocabulary=50, default_max_tokens=16)
NAN, INF = float("nan"), float("inf")


def sampling(**given) -> Sampling:
    return check_sampling(AskedSampling(**given), LIMITS, lambda: 99)


def refused(call, *args, **kwargs) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_defaults_are_those_of_the_proto():
    assert sampling() == Sampling(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=16,
        min_tokens=0,
        stop_token_ids=(),
        seed=99,
        logprobs=None,
        ignore_eos=False,
    )


def test_what_is_given_is_kept():
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "max_tokens": 9,
        "min_tokens": 9,
        "stop_token_ids": (4, 49),
        "seed": 2**64 - 1,
        "logprobs": 20,
        "ignore_eos": True,
    }
    assert sampling(**given) == Sampling(**given)


def test_zero_is_a_value_not_an_absence():
    assert sampling(temperature=0.0).temperature == 0.0
    assert sampling(seed=0).seed == 0
    assert sampling(logprobs=0).logprobs == 0


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0.0, 2.0], [-0.001, 2.001, NAN, INF, -INF]),
        ("top_p", [1e-9, 1.0], [0.0, -0.5, 1.001, NAN, INF]),
        ("min_p", [0.0, 1.0], [-0.001, 1.001, NAN, -INF]),
        ("repetition_penalty", [0.001, 10.0], [0.0, -1.0, 10.01, NAN, INF]),
        ("presence_penalty", [-2.0, 2.0], [-2.01, 2.01, NAN, INF]),
        ("frequency_penalty", [-2.0, 2.0], [-2.01, 2.01, NAN, -INF]),
        ("max_tokens", [1, 2**32 - 1], [0]),
        ("min_tokens", [0, 16], [17]),
        ("logprobs", [0, 20], [21]),
        ("top_k", [0, 2**32 - 1], []),
        ("stop_token_ids", [(), (0, 49)], [(50,), (1, 2**32 - 1)]),
    ],
)
def test_ranges(field, good, bad):
    for value in good:
        sampling(**{field: value})
    for value in bad:
        error = refused(sampling, **{field: value})
        assert error.metadata["field"].startswith(f"sampling.{field}")
        assert error.metadata["allowed"]
        assert error.code == "INVALID_ARGUMENT"


def test_the_message_shows_what_the_client_wrote_not_its_float32():
    as_float32 = 2.0999999046325684
    error = refused(sampling, temperature=as_float32)
    assert error.message == "sampling.temperature: 2.1 is not allowed; 0 to 2"


def test_min_tokens_is_measured_against_the_default_too():
    error = refused(sampling, min_tokens=17)
    assert "16 by default" in error.message
    assert "by default" not in refused(sampling, min_tokens=6, max_tokens=5).message


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert sampling(top_k=49).top_k == 49
    assert sampling(top_k=50).top_k == 0


def test_a_stop_token_out_of_vocabulary_is_named_by_index():
    error = refused(sampling, stop_token_ids=(1, 77))
    assert error.metadata["field"] == "sampling.stop_token_ids[1]"
    assert "77" in error.message
    assert "49" in error.message


def test_stop_tokens_twice_count_once():
    assert sampling(stop_token_ids=(5, 3, 5)).stop_token_ids == (5, 3)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (None, "input"),
        (Prompt(""), "prompt"),
        (Chat(()), "chat.messages"),
        (Chat((Turn("user", "hi"), Turn("", "x"))), "chat.messages[1].role"),
        (Tokens(()), "tokens.token_ids"),
        (Tokens((1, 2, 50)), "tokens.token_ids[2]"),
    ],
)
def test_inputs_refused(given, field):
    assert refused(check_input, given, 50).metadata["field"] == field


@pytest.mark.parametrize(
    "given", [Prompt(" "), Prompt("\0"), Chat((Turn("user", ""),)), Tokens((0, 49))]
)
def test_inputs_taken(given):
    assert check_input(given, 50) is given


@pytest.mark.parametrize(
    ("stops", "field"),
    [(["a"] * 17, "stop"), (["a", ""], "stop[1]"), (["x" * 257], "stop[0]")],
)
def test_stops_refused(stops, field):
    assert refused(check_stops, stops).metadata["field"] == field


def test_stops_taken():
    check_stops([])
    check_stops(["x" * 256] * 16)
    check_stops(["é" * 256])


@pytest.mark.parametrize("name", ["", "a", "A-z_0.9:x", "a" * 128])
def test_ids_taken(name):
    check_request_id(name)


@pytest.mark.parametrize("name", ["a b", "a/0", "a\n", "ä", "\uff11", "a" * 129, "a\0"])
def test_ids_refused(name):
    assert refused(check_request_id, name).metadata["field"] == "request_id"


def test_models():
    check_model("", "m", [])
    check_model("m", "m", [])
    with pytest.raises(UnknownModelError) as caught:
        check_model("gpt-17", "m", ["m", "other"])
    assert caught.value.message == "model 'gpt-17' is not served; served: m"
    with pytest.raises(UnknownModelError) as caught:
        check_model("x" * 10_000, "m", [])
    assert len(caught.value.message) < 200


def test_the_context_window_is_told_with_both_numbers():
    assert room_for_output(Prompt("x"), 99, 100) == 1
    for given, field in ((Prompt("x"), "prompt"), (Chat(()), "chat"), (Tokens(()), "tokens")):
        error = refused(room_for_output, given, 100, 100)
        assert error.metadata["field"].startswith(field)
        assert "100 tokens" in error.message
        assert "99 tokens" in error.message
        assert "window of 100" in error.message


def test_a_prompt_of_no_tokens_is_refused():
    assert refused(room_for_output, Prompt("\u200b"), 0, 100).metadata["field"] == "prompt"


def test_what_is_left_of_a_service_level():
    wishes = Wishes(tenant="a", ttft_seconds=1.0, itl_seconds=0.1)
    assert wishes.left(0, 0.25) == Wishes(tenant="a", ttft_seconds=0.75, itl_seconds=0.1)
    assert 0 < wishes.left(0, 5.0).ttft_seconds < 0.01
    # A stream that has begun goes on, however slowly.
    assert wishes.left(3, 0.25) == Wishes(tenant="a")
    assert Wishes(tenant="a").left(0, 5.0) == Wishes(tenant="a")


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x9b", "\u202e", "\ud800"])
def test_names_that_end_up_in_logs_have_no_control_characters(character):
    error = refused(check_session, f"s{character}")
    assert error.metadata["field"] == "session"
    assert character not in error.message
    error = refused(check_tenant, "x-tenant", [f"t{character}"])
    assert error.metadata["field"] == "metadata x-tenant"
    assert character not in error.message
    check_session("Größe 1/2")
    assert check_tenant("x-tenant", ["Größe 1/2"]) == "Größe 1/2"
