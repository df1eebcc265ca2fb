"""What a client asks of sampling arrives at the engine as it was, on every way there is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from services.engine.api import Guide, GuideKind, Hold, Request, Sampling
from services.engine.group.wire import prefill_from, prefill_to
from services.engine.wire import request_from
from services.frontend.wire import sampling_to, token_request
from services.runtime.errors import InvalidRequestError

# Numbers that are the same as float32.
ALL = Sampling(
    temperature=0.5,
    top_k=7,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.75,
    max_tokens=9,
    min_tokens=2,
    stop_token_ids=(4, 5),
    seed=2**64 - 1,
    logprobs=3,
    ignore_eos=True,
    guide=Guide(GuideKind.REGEX, ("a+",)),
    logit_bias=((3, -100.0), (8, 0.5)),
)


def test_every_field_is_tried():
    default = Sampling()
    assert all(getattr(ALL, f.name) != getattr(default, f.name) for f in fields(Sampling))


@pytest.mark.parametrize("sampling", [ALL, Sampling()])
def test_to_a_worker_and_on_to_a_rank(sampling):
    request = request_from(token_request("r/0", [1, 2], [3], sampling_to(sampling)), 10)
    assert request == Request("r/0", (1, 2), sampling, (3,))
    message = prefill_to(request, Hold(1.0), None).prefill
    assert prefill_from(message, 10)[0] == request


@pytest.mark.parametrize("bias", [((10, 1.0),), ((3, float("nan")),)])
def test_a_worker_refuses_a_bias_that_would_break_its_engine(bias):
    message = token_request("r/0", [1], [], sampling_to(replace(ALL, logit_bias=bias)))
    with pytest.raises(InvalidRequestError) as raised:
        request_from(message, 10)
    assert raised.value.metadata["field"] == "request.sampling.logit_bias"
