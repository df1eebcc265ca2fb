"""What form an answer must have, by response_format or by one of guided_*: at most one guide."""

from __future__ import annotations

from services.engine.api import Guide, GuideKind
from services.frontend.openai.turns import NAME, NAME_ALLOWED
from services.runtime.errors import InvalidRequestError
from tandem.openai.v1 import openai_pb2 as pb

Request = pb.CreateChatCompletionRequest | pb.CreateCompletionRequest

SCHEMA = "response_format.json_schema.schema"


def form_of(message: Request) -> tuple[Guide | None, str]:
    """The guide, and the path of the field that asks for it. Raises InvalidRequestError."""
    found: list[tuple[Guide, str]] = []
    if message.HasField("response_format"):
        form = _response_format(message.response_format)
        if form is not None:
            found.append(form)
    if message.guided_regex:
        found.append((Guide(GuideKind.REGEX, (message.guided_regex,)), "guided_regex"))
    if message.guided_choice:
        found.append((Guide(GuideKind.CHOICE, tuple(message.guided_choice)), "guided_choice"))
    if message.guided_grammar:
        found.append((Guide(GuideKind.GRAMMAR, (message.guided_grammar,)), "guided_grammar"))
    if len(found) > 1:
        allowed = f"one form at a time, and there is {found[0][1]} already"
        raise InvalidRequestError(found[1][1], "a form", allowed)
    return found[0] if found else (None, "")


def _response_format(form: pb.ResponseFormat) -> tuple[Guide, str] | None:
    match form.type:
        case "text":
            return None
        case "json_object":
            return Guide(GuideKind.JSON_OBJECT), "response_format"
        case "json_schema":
            schema = form.json_schema
            if not NAME.fullmatch(schema.name):
                path = "response_format.json_schema.name"
                raise InvalidRequestError(path, schema.name, NAME_ALLOWED)
            if not schema.schema:
                raise InvalidRequestError(SCHEMA, None, "a JSON schema")
            return Guide(GuideKind.JSON_SCHEMA, (schema.schema,)), SCHEMA
    allowed = '"text", "json_object" or "json_schema"'
    raise InvalidRequestError("response_format.type", form.type, allowed)
