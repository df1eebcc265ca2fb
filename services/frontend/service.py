"""InferenceService: what clients call."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.engine.wire import FINISH, logprobs_to
from services.frontend import validate, wire
from services.frontend.begin import Beginning, Context, Prepared
from services.frontend.live import LiveRequest
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves one model's requests."""

    def __init__(self, beginning: Beginning) -> None:
        self._beginning = beginning
        self._cluster = beginning.cluster
        self._most_messages = beginning.settings.max_messages

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """The whole answer; see inference.proto."""
        arrived = self._cluster.clock()
        asked = wire.asked_from(request, self._most_messages)
        with self._beginning.named(asked.request_id) as request_id:
            live, prepared = await self._begin(asked, request_id, arrived, context)
            try:
                piece = await live.whole()
            finally:
                live.close()
            return inference_pb2.GenerateResponse(
                request_id=request_id,
                text=piece.text,
                token_ids=piece.token_ids,
                logprobs=logprobs_to(piece.logprobs),
                finish_reason=FINISH[live.finish_reason],
                usage=wire.usage_to(live.core),
                route=wire.route_to(live.core),
                model=prepared.served.name,
                seed=prepared.sampling.seed,
            )

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """The answer as it comes; see inference.proto."""
        arrived = self._cluster.clock()
        asked = wire.asked_from(request.request, self._most_messages)
        with self._beginning.named(asked.request_id) as request_id:
            live, prepared = await self._begin(asked, request_id, arrived, context)
            try:
                first, last = True, False
                while not last:
                    piece = await live.piece()
                    # Nothing runs between the two: what is not in this piece is to come.
                    last = live.finish_reason is not None
                    message = inference_pb2.StreamGenerateResponse(
                        request_id=request_id, text=piece.text, token_ids=piece.token_ids
                    )
                    if piece.logprobs:
                        message.logprobs.extend(logprobs_to(piece.logprobs))
                    if first:
                        message.model = prepared.served.name
                        message.seed = prepared.sampling.seed
                        first = False
                    if last:
                        message.finish_reason = FINISH[live.finish_reason]
                        message.usage.CopyFrom(wire.usage_to(live.core))
                        message.route.CopyFrom(wire.route_to(live.core))
                    yield message
            finally:
                live.close()

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The models that can be asked now; see inference.proto."""
        served = await self._cluster.coordinator.list_models()
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=m.name,
                    context_tokens=m.context_tokens,
                    block_tokens=m.block_tokens,
                    prefill_workers=m.prefill_workers,
                    decode_workers=m.decode_workers,
                    adapters=[a.id for a in m.adapters],
                )
                for m in served
                if m.name == self._beginning.model.name
            ]
        )

    async def _begin(
        self, asked: validate.Asked, request_id: str, arrived: float, context: Context
    ) -> tuple[LiveRequest, Prepared]:
        caller = self._beginning.caller(context, arrived)
        prepared = await self._beginning.prepare(asked, caller)
        return self._beginning.start(prepared, request_id), prepared
