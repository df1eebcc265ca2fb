"""Engine outputs as messages of the decode stream."""

from __future__ import annotations

from services.engine.api import EngineFault, TokenOutput
from services.engine.wire import FINISH, fault_to, kv_to, logprobs_to
from tandem.decode.v1 import decode_pb2
from tandem.generation.v1 import generation_pb2


def output_to(output: TokenOutput) -> decode_pb2.RequestOutput:
    """One request's share of an engine step."""
    return decode_pb2.RequestOutput(
        request_id=output.request_id,
        token_ids=output.token_ids,
        logprobs=logprobs_to(output.logprobs),
        finish_reason=FINISH[output.finish_reason],
        error=None if output.error is None else fault_to(output.error),
        kv=None if output.kv is None else kv_to(output.kv),
    )


def error_output(request_id: str, fault: EngineFault) -> decode_pb2.RequestOutput:
    """The last output of a request that this worker does not run."""
    return decode_pb2.RequestOutput(
        request_id=request_id,
        finish_reason=generation_pb2.FINISH_REASON_ERROR,
        error=fault_to(fault),
    )


def moving_output(request_id: str) -> decode_pb2.RequestOutput:
    """Word that this worker wants to be rid of a request, with which it goes on."""
    return decode_pb2.RequestOutput(request_id=request_id, moving=True)
