"""The OpenAPI 3.1 document of the gateway, from what protoc-gen-openapiv2 makes of the proto.

That generator knows the proto, not OpenAI's JSON: here stands where the two differ.
"""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
JSON_SCHEMA: Schema = {"type": "object", "additionalProperties": True}


def _array(items: Schema, **more: int) -> Schema:
    return {"type": "array", "items": items, **more}


STOP: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 256},
        _array({"type": "string", "minLength": 1, "maxLength": 256}, maxItems=16),
    ]
}

UNIONS: dict[str, Schema] = {
    "ChatMessage.content": {
        "anyOf": [
            TEXT,
            _array(
                {
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": TEXT},
                    "required": ["type", "text"],
                },
                minItems=1,
            ),
            {"type": "null"},
        ]
    },
    "CreateChatCompletionRequest.stop": STOP,
    "CreateCompletionRequest.stop": STOP,
    "CreateCompletionRequest.prompt": {
        "anyOf": [
            TEXT,
            _array(TEXT, minItems=1, maxItems=128),
            _array(TOKEN, minItems=1),
            _array(_array(TOKEN, minItems=1), minItems=1, maxItems=128),
        ]
    },
    "CreateChatCompletionRequest.tool_choice": {
        "anyOf": [
            {"type": "string", "enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {"name": TEXT},
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
        ]
    },
    "FunctionDefinition.parameters": JSON_SCHEMA,
    "JsonSchemaFormat.schema": JSON_SCHEMA,
    "CreateChatCompletionRequest.chat_template_kwargs": JSON_SCHEMA,
}
"""Fields that take several types, or JSON itself."""

REQUIRED: dict[str, list[str]] = {
    "ChatMessage": ["role"],
    "Tool": ["type", "function"],
    "FunctionDefinition": ["name"],
    "JsonSchemaFormat": ["name"],
    "ResponseFormat": ["type"],
    "CreateChatCompletionRequest": ["model", "messages"],
    "CreateCompletionRequest": ["model", "prompt"],
    "TokenizeRequest": ["model"],
    "DetokenizeRequest": ["model", "tokens"],
    "AnswerMessage": ["role", "content"],
    "ChatChoice": ["index", "message", "logprobs", "finish_reason"],
    "ChunkChoice": ["index", "delta", "logprobs", "finish_reason"],
    "CompletionChoice": ["index", "text", "logprobs", "finish_reason"],
    "CreateChatCompletionResponse": ["id", "object", "created", "model", "choices"],
    "CreateCompletionResponse": ["id", "object", "created", "model", "choices"],
    "StreamChatCompletionResponse": ["id", "object", "created", "model", "choices"],
    "StreamCompletionResponse": ["id", "object", "created", "model", "choices"],
    "ListModelsResponse": ["object", "data"],
    "Model": ["id", "object", "created", "owned_by"],
    "RetrieveModelResponse": ["id", "object", "created", "owned_by"],
    "TokenizeResponse": ["count", "max_model_len", "tokens"],
    "DetokenizeResponse": ["prompt"],
    "Usage": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "TokenLogprob": ["token", "logprob", "bytes", "top_logprobs"],
    "TopLogprob": ["token", "logprob", "bytes"],
}
"""Fields that must be there in requests, and always are in answers."""

NULLABLE = {
    "AnswerMessage.content",
    "ChatChoice.finish_reason",
    "ChatChoice.logprobs",
    "ChunkChoice.finish_reason",
    "ChunkChoice.logprobs",
    "CompletionChoice.finish_reason",
    "CompletionChoice.logprobs",
    "CompletionLogprobs.top_logprobs",
    "StreamChatCompletionResponse.usage",
    "StreamCompletionResponse.usage",
    "TokenLogprob.bytes",
    "TopLogprob.bytes",
}
"""Fields of answers that are null where there is nothing."""

NULL_ITEMS = {"CompletionLogprobs.token_logprobs", "CompletionLogprobs.top_logprobs"}
"""Lists with null in them: a prompt's first token has no log-probability."""

STREAMED = {
    "/v1/chat/completions": "StreamChatCompletionResponse",
    "/v1/completions": "StreamCompletionResponse",
}

ERRORS = {
    "400": "The request can't be served as it is; `param` names the field.",
    "401": "No valid API key.",
    "404": "No such model, or no such path.",
    "408": "The body did not arrive in time.",
    "409": "A live request has this id.",
    "413": "The body is too large.",
    "415": "The body is not JSON by its Content-Type, or packed in an unknown way.",
    "429": "Too much is asked for now; Retry-After says when to come back.",
    "500": "Something broke.",
    "503": "Nobody can serve this now; Retry-After says when to come back.",
    "504": "The request's deadline passed.",
}

ERROR_SCHEMA: Schema = {
    "type": "object",
    "description": "What went wrong.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "For a person."},
                "type": {"type": "string", "description": "Kind of error."},
                "param": {"type": ["string", "null"], "description": "Field that it is about."},
                "code": {"type": ["string", "null"], "description": "For programs."},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

HEADERS: list[Schema] = [
    {
        "name": "x-request-id",
        "in": "header",
        "description": "Id of the request, echoed; 1 to 128 letters, digits and -_.:",
        "schema": TEXT,
    },
    {
        "name": "x-request-timeout",
        "in": "header",
        "description": "Deadline of the request, seconds from now.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]

BOUNDS = {
    # OpenAPI's own names of integers say nothing of their bounds. Those of protobuf's are these.
    "seed": (-(2**63), 2**63 - 1),
    "priority": (-100, 100),
}


NAME: Schema = {"pattern": "^[A-Za-z0-9_-]{1,64}$"}
PENALTY: Schema = {"minimum": -2, "maximum": 2}
SECONDS: Schema = {"minimum": 0}

LIMITS: dict[str, Schema] = {
    "ChatMessage.role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
    "Tool.type": {"const": "function"},
    "FunctionDefinition.name": NAME,
    "JsonSchemaFormat.name": NAME,
    "ResponseFormat.type": {"enum": ["text", "json_object", "json_schema"]},
    "CreateCompletionRequest.logprobs": {"maximum": 5},
    "*.model": {"minLength": 1},
    "*.messages": {"minItems": 1},
    "*.temperature": {"minimum": 0, "maximum": 2},
    "*.top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "*.n": {"minimum": 1, "maximum": 128},
    "*.max_tokens": {"minimum": 1},
    "*.max_completion_tokens": {"minimum": 1},
    "*.presence_penalty": PENALTY,
    "*.frequency_penalty": PENALTY,
    "*.logit_bias": {
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 300,
    },
    "*.top_logprobs": {"maximum": 20},
    "*.tools": {"maxItems": 128},
    "*.user": {"maxLength": 128},
    "*.service_tier": {"enum": ["auto", "default", "flex", "priority"]},
    "*.metadata": {"maxProperties": 16},
    "*.store": {"const": False},
    "*.reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high"]},
    "*.suffix": {"maxLength": 0},
    "*.min_p": {"minimum": 0, "maximum": 1},
    "*.repetition_penalty": {"minimum": 0.001, "maximum": 10},
    "*.ttft_seconds": SECONDS,
    "*.itl_seconds": SECONDS,
}
"""What values may be, as the proto says in words; * stands for the Create...Requests."""


def document(swagger: Schema) -> Schema:
    """OpenAPI 3.1, from OpenAPI 2."""
    schemas = {name: _message(name, of) for name, of in swagger["definitions"].items()}
    schemas.pop("NullValue", None)
    schemas["Error"] = ERROR_SCHEMA
    paths = {
        path.replace("=**", ""): {
            method: _operation(path, method, of) for method, of in operations.items()
        }
        for path, operations in swagger["paths"].items()
        if not path.endswith(":stream")
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tandem",
            "version": "1",
            "description": "OpenAI's API, as Tandem serves it. Any OpenAI client works with this "
            "server's address and /v1 as its base URL. Unknown fields are ignored, and null is as "
            "if the field were absent.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _message(name: str, swagger: Schema) -> Schema:
    properties = {}
    for field, of in swagger.get("properties", {}).items():
        properties[field] = _field(f"{name}.{field}", of)
    made: Schema = {
        "type": "object",
        "description": swagger.get("description", ""),
        "properties": properties,
    }
    required = [field for field in REQUIRED.get(name, []) if field in properties]
    if required:
        made["required"] = required
    return made


def _field(full: str, swagger: Schema) -> Schema:
    words = {"description": swagger["description"]} if "description" in swagger else {}
    if full in UNIONS:
        return {**UNIONS[full], **words}
    made = _type(swagger, full.rpartition(".")[2])
    if full in NULL_ITEMS:
        made["items"] = _or_null(made["items"])
    if full in NULLABLE:
        made = _or_null(made)
    return {**made, **_limits(full), **words}


def _limits(full: str) -> Schema:
    message, _, field = full.partition(".")
    asked = message.startswith("Create") and message.endswith("Request")
    return LIMITS.get(full) or (LIMITS.get(f"*.{field}", {}) if asked else {})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _type(swagger: Schema, field: str) -> Schema:
    if "$ref" in swagger:
        return {"$ref": swagger["$ref"].replace("#/definitions/", "#/components/schemas/")}
    kind = swagger.get("type")
    if kind == "array":
        return _array(_type(swagger["items"], field))
    if kind == "object":
        return {"type": "object", "additionalProperties": _map_values(swagger)}
    if kind == "integer" or swagger.get("format") == "int64":
        low, high = BOUNDS.get(field, (0, 2**32 - 1))
        return {"type": "integer", "minimum": low, "maximum": high}
    return {"type": kind} if kind else {}


def _map_values(swagger: Schema) -> Schema | bool:
    values = swagger.get("additionalProperties")
    return _type(values, "") if isinstance(values, dict) and "type" in values else True


def _operation(path: str, method: str, swagger: Schema) -> Schema:
    answer = _type(swagger["responses"]["200"]["schema"], "")
    content: Schema = {"application/json": {"schema": answer}}
    words = swagger["summary"]
    if path in STREAMED:
        event = STREAMED[path]
        words += (
            ' With `"stream": true` it comes as server-sent events, each a '
            f"{event}, and `[DONE]` at the end."
        )
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-event": event}
    made: Schema = {
        "summary": swagger["summary"].split(".")[0].replace("\n", " ") + ".",
        "description": words,
        "operationId": re.sub(r"^\w+_", "", swagger["operationId"]),
        "parameters": [
            *(_parameter(p) for p in swagger.get("parameters", []) if p["in"] == "path"),
            *HEADERS,
        ],
        "responses": {"200": {"description": "The answer.", "content": content}, **_errors(method)},
    }
    for parameter in swagger.get("parameters", []):
        if parameter["in"] == "body":
            schema = _type(parameter["schema"], "")
            made["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema}},
            }
    return made


def _parameter(swagger: Schema) -> Schema:
    return {
        "name": swagger["name"],
        "in": "path",
        "required": True,
        "description": swagger.get("description", ""),
        "schema": {"type": "string", "minLength": 1},
    }


def _errors(method: str) -> Schema:
    body_only = {"408", "413", "415"}
    return {
        status: {
            "description": words,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, words in ERRORS.items()
        if method == "post" or status not in body_only
    }
