"""What every engine refuses at once: requests that it could never compute. Pure."""

from __future__ import annotations

from services.engine.api import EngineInfo, Request
from services.runtime.errors import InvalidRequestError


def check_request(request: Request, info: EngineInfo) -> None:
    """Raises InvalidRequestError, which names the field."""
    tokens = request.token_ids
    if request.dp_rank >= info.dp_ranks:
        raise InvalidRequestError("dp_rank", request.dp_rank, f"this worker has {info.dp_ranks}")
    if not request.prompt_token_ids:
        raise InvalidRequestError("prompt_token_ids", (), "at least one token is")
    if len(tokens) >= info.context_tokens:
        raise InvalidRequestError(
            "prompt_token_ids",
            f"{len(tokens)} tokens",
            f"at most {info.context_tokens - 1} fit the context window with one to generate",
        )
    if min(tokens) < 0 or max(tokens) >= info.vocabulary:
        wrong = next(t for t in tokens if not 0 <= t < info.vocabulary)
        raise InvalidRequestError(
            "prompt_token_ids", wrong, f"token ids are 0 to {info.vocabulary - 1}"
        )
