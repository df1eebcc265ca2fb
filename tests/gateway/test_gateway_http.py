"""What one request becomes, and its answer: JSON, headers, errors."""

from __future__ import annotations

import asyncio
import gzip
import json

import grpc
import pytest
from google.protobuf import json_format

from services.runtime import errors
from tests.gateway.gateway_rig import BUILD_SECONDS, behind, until

pytestmark = pytest.mark.timeout(BUILD_SECONDS)

CHAT = "/v1/chat/completions"


async def test_requests_and_answers_are_openais():
    schema = '{"type":"object", "properties":{"z":{"type":"string"},"a":{"const":"\\u00e9"}}}'
    body = (
        '{"model":"m","messages":[{"role":"user","content":"é"}],"temperature":0,"seed":-1,'
        '"unknown":[1],"stop":["a"],"tools":[{"type":"function","function":{"name":"f",'
        f'"parameters":{schema}}}}}],"response_format":{{"type":"json_schema","json_schema":'
        f'{{"name":"n","schema":{schema}}}}}}}'
    )
    async with behind() as (gateway, backend):
        answer = await gateway.post(CHAT, body.encode())
        assert answer.status == 200
        assert answer.head["content-type"] == "application/json"
        assert answer.json == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 7,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "hi"},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
        }
        (asked,) = backend.asked
        assert asked.tools[0].function.parameters == schema
        assert asked.response_format.json_schema.schema == schema
        asked.tools[0].function.ClearField("parameters")
        asked.response_format.json_schema.ClearField("schema")
        assert json_format.MessageToDict(asked, preserving_proto_field_name=True) == {
            "model": "m",
            "messages": [{"role": "user", "content": "é"}],
            "temperature": 0.0,
            "seed": "-1",
            "stop": ["a"],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n"}},
        }
        assert (await gateway.ask("GET", "/v1/models")).json == {"object": "list", "data": []}
        for path in ("/tokenize", "/v1/tokenize"):
            told = await gateway.post(path, {"model": "m", "prompt": ""})
            assert told.json == {"count": 0, "max_model_len": 8, "tokens": []}
        for path in ("/detokenize", "/v1/detokenize"):
            assert (await gateway.post(path, {"tokens": [1, 2]})).json == {"prompt": "xx"}
        told = await gateway.post("/v1/completions", {"model": "m", "prompt": [1, 2]})
        choice = {"index": 0, "text": "hi", "logprobs": None, "finish_reason": None}
        assert told.json["choices"] == [choice]


@pytest.mark.parametrize("asked", ["org/name", "org%2Fname", "a:stream", "ft:a:b", "x@1+y"])
async def test_names_of_models_stand_in_paths(asked):
    async with behind() as (gateway, _):
        answer = await gateway.ask("GET", f"/v1/models/{asked}")
        assert answer.json["id"] == asked.replace("%2F", "/")
        assert answer.json["created"] == 0


async def test_headers_that_go_on_and_come_back():
    async with behind("--tenant-header", "x-tenant", "--max-timeout", "50s") as (gateway, backend):
        sent = {
            "x_request_id": "mine-1",
            "authorization": "Bearer key",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "tracestate": "a=b",
            "x_tenant": "acme",
            "grpc_metadata_x_evil": "1",
            "cookie": "c=d",
            "x_request_timeout": "100",
        }
        answer = await gateway.post(CHAT, {"model": "m"}, **sent)
        assert answer.head["x-request-id"] == "mine-1"
        got = backend.metadata[0]
        for name in ("x_request_id", "authorization", "traceparent", "tracestate", "x_tenant"):
            assert got[name.replace("_", "-")] == sent[name]
        assert not [name for name in got if "evil" in name or "cookie" in name]
        assert 0 < backend.remaining[0] <= 50

        answer = await gateway.post(CHAT, {"model": "m"}, x_request_id="not an id!")
        made = answer.head["x-request-id"]
        assert backend.metadata[1]["x-request-id"] == made != "not an id!"
        assert backend.remaining[1] is None or backend.remaining[1] > 1e6
        answer = await gateway.post(CHAT, {"model": "m"}, grpc_timeout="30S")
        assert 0 < backend.remaining[2] <= 30
        answer = await gateway.post(CHAT, {"model": "m"}, x_request_timeout="soon")
        assert (answer.status, answer.error["param"]) == (400, "x-request-timeout")


async def test_the_tenant_is_not_passed_unless_asked_for():
    async with behind() as (gateway, backend):
        await gateway.post(CHAT, {"model": "m"}, x_tenant="acme")
        assert "x-tenant" not in backend.metadata[0]


async def test_the_deadline_ends_a_request():
    async with behind() as (gateway, backend):

        async def forever(request):
            await asyncio.Event().wait()

        backend.whole = forever
        answer = await gateway.post(CHAT, {"model": "m"}, x_request_timeout="0.5")
        assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
        assert answer.head["x-should-retry"] == "false"
        if backend.arrived.is_set():  # on a busy machine the deadline may come first
            await asyncio.wait_for(backend.cancelled.wait(), 30)


def kinds(root=errors.TandemError):
    return [root, *(kind for sub in root.__subclasses__() for kind in kinds(sub))]


STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "INTERNAL": 500,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "FAILED_PRECONDITION": 500,
}


async def test_every_error_of_a_frontend_in_openais_shape():
    async with behind() as (gateway, backend):
        for kind in kinds():
            error = kind.__new__(kind)
            Exception.__init__(error)
            error.message, error.metadata = "words", {"field": "top_p"}
            if isinstance(error, errors.RetryableError):
                error.retry_seconds = 2.5
            backend.error = error
            for answer in (await gateway.chat(), await gateway.chat(stream=True)):
                told = answer.error
                assert answer.status == STATUS[kind.code], kind
                assert (told["message"], told["param"]) == ("words", "top_p")
                assert told["code"] in (
                    kind.reason.lower(),
                    *("model_not_found", "rate_limit_exceeded", "invalid_value"),
                    *("request_cancelled", "deadline_exceeded"),
                )
                retryable = isinstance(error, errors.RetryableError)
                assert answer.head.get("retry-after") == ("3" if retryable else None)


async def test_errors_of_the_transport_name_no_address():
    async with behind() as (gateway, backend):
        assert (await gateway.ask("GET", "/health")).status == 200
        await backend.stop()
        answer = await gateway.chat()
        assert (answer.status, answer.error["type"]) == (503, "server_error")
        assert backend.address not in answer.body.decode()
        assert (await gateway.ask("GET", "/health")).status == 503
        assert (await gateway.ask("GET", "/healthz")).json == {"status": "ok"}


async def test_what_is_refused_before_a_frontend_hears_of_it():
    async with behind("--max-body-bytes", "1000") as (gateway, backend):
        for path, body, head, status, param, code in (
            (CHAT, b"{", {}, 400, None, "invalid_json"),
            (CHAT, b"", {}, 400, None, "invalid_json"),
            (CHAT, b"[]", {}, 400, None, "invalid_type"),
            (CHAT, b'{"temperature":"1","stream":true}', {}, 400, "temperature", "invalid_type"),
            (CHAT, b'{"messages":[{"role":1}]}', {}, 400, "messages[0].role", "invalid_type"),
            (CHAT, b'{"stream":"true"}', {}, 400, "stream", "invalid_type"),
            (CHAT, b"{}", {"content_type": "text/plain"}, 415, None, "unsupported_media_type"),
            (CHAT, b"{}", {"content_encoding": "br"}, 415, None, "unsupported_encoding"),
            (CHAT, b"{}", {"content_encoding": "gzip"}, 400, None, "invalid_encoding"),
            (CHAT, b"x" * 1001, {}, 413, None, "request_too_large"),
            ("/v1/chat", b"{}", {}, 404, None, "unknown_url"),
            (CHAT + ":stream", b"{}", {}, 404, None, "unknown_url"),
            (CHAT + "/", b"{}", {}, 404, None, "unknown_url"),
            ("/v1/models", b"{}", {}, 405, None, "method_not_supported"),
            ("/metrics", b"{}", {}, 405, None, "method_not_supported"),
        ):
            answer = await gateway.post(path, body, **head)
            told = answer.error
            assert (answer.status, told["param"], told["code"]) == (status, param, code), body
            assert told["type"] == "invalid_request_error"
        answer = await gateway.ask("GET", CHAT)
        assert (answer.status, answer.head["allow"]) == (405, "POST")
        assert (await gateway.ask("GET", "/v1/models/")).status == 404
        assert backend.asked == []


async def test_bodies_too_large_are_not_read_to_their_end():
    async with behind("--max-body-bytes", "1000") as (gateway, backend):
        # Chunked, so that the size is not known; and packed, so that it is not on the wire.
        connection = await gateway.connect()
        await connection.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"400\r\n"
            + b" " * 0x400
            + b"\r\n"
        )
        answer = await connection.answer()
        assert (answer.status, answer.head["connection"]) == (413, "close")
        connection.close()
        bomb = gzip.compress(b" " * 10_000_000)
        assert len(bomb) > 1000
        packed = gzip.compress(b" " * 100_000)
        assert len(packed) < 1000
        answer = await gateway.post(CHAT, packed, content_encoding="gzip")
        assert answer.status == 413
        answer = await gateway.ask("POST", CHAT, b"x" * 2000, expect="100-continue")
        assert answer.status == 413
        assert backend.asked == []


async def test_gzip_both_ways():
    async with behind() as (gateway, backend):
        body = json.dumps({"model": "m" * 5000}).encode()
        answer = await gateway.post(
            CHAT, gzip.compress(body), content_encoding="gzip", accept_encoding="gzip"
        )
        assert backend.asked[0].model == "m" * 5000
        assert answer.head["content-encoding"] == "gzip"
        assert len(answer.body) < 1000
        assert json.loads(gzip.decompress(answer.body))["model"] == "m" * 5000
        small = await gateway.post(CHAT, {"model": "m"}, accept_encoding="gzip")
        assert "content-encoding" not in small.head
        cut = await gateway.post(CHAT, gzip.compress(body)[:-9], content_encoding="gzip")
        assert (cut.status, cut.error["code"]) == (400, "invalid_encoding")


async def test_a_connection_is_used_again():
    async with behind() as (gateway, _):
        connection = await gateway.connect()
        for i in range(3):
            await connection.ask("POST", CHAT, b'{"model":"m","stream":true}', x_request_id=f"r{i}")
            answer = await connection.answer()
            assert (answer.head["x-request-id"], answer.events[-1]) == (f"r{i}", "[DONE]")
            await connection.ask("POST", CHAT, b'{"model":')
            assert (await connection.answer()).status == 400
            await connection.ask("GET", "/healthz")
            assert (await connection.answer()).status == 200
        connection.close()


async def test_pages_of_other_origins_need_leave():
    origin = "https://app.example"
    async with behind("--cors-origins", origin) as (gateway, _):
        asked = {"origin": origin, "access_control_request_method": "POST"}
        answer = await gateway.ask(
            "OPTIONS", CHAT, access_control_request_headers="authorization", **asked
        )
        assert answer.status == 204
        assert answer.head["access-control-allow-origin"] == origin
        assert answer.head["access-control-allow-headers"] == "authorization"
        answer = await gateway.post(CHAT, {"model": "m"}, origin=origin)
        assert answer.head["access-control-allow-origin"] == origin
        answer = await gateway.post(CHAT, {"model": "m"}, origin="https://evil.example")
        assert "access-control-allow-origin" not in answer.head
    async with behind() as (gateway, _):
        answer = await gateway.ask("OPTIONS", CHAT, **asked)
        assert (answer.status, "access-control-allow-origin" in answer.head) == (405, False)


async def test_pages_metrics_and_the_log():
    async with behind() as (gateway, _):
        described = await gateway.ask("GET", "/openapi.json")
        assert described.json["openapi"].startswith("3.1")
        assert CHAT in described.json["paths"]
        page = await gateway.ask("GET", "/docs")
        assert page.head["content-type"].startswith("text/html")
        assert b"://" not in page.body.replace(b"http://www.w3.org", b"")
        await gateway.chat()
        await gateway.chat(stream=True)
        await gateway.post(CHAT, b'{"secret":')
        await until(lambda: len(gateway.lines()) == 5)
        assert await gateway.metric("tandem_gateway_stream_pieces_total") == 2
        name = f'tandem_gateway_requests_total{{path="{CHAT}",status='
        assert await gateway.metric(name + '"200"}') == 2
        assert await gateway.metric(name + '"400"}') == 1
        assert await gateway.metric("tandem_gateway_request_seconds_count") >= 5
        lines = gateway.lines()[2:5]
        assert [line["status"] for line in lines] == [200, 200, 400]
        assert lines[1]["pieces"] == 2
        assert lines[2]["error"] == "invalid_json"
        assert "secret" not in gateway.log.read_text()


async def test_http2_without_tls():
    async with behind() as (gateway, _):
        curl = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "--http2-prior-knowledge", "-w", "%{http_version}"),
            *("-d", '{"model":"m","stream":true}', "-H", "content-type: application/json"),
            f"{gateway.url}{CHAT}",
            stdout=-1,
            stderr=-1,
        )
        out, err = await asyncio.wait_for(curl.communicate(), 60)
        assert curl.returncode == 0, err
        assert out.endswith(b"data: [DONE]\n\n2")


async def test_a_message_that_the_frontend_finds_too_large():
    async with behind("--max-body-bytes", "20000000") as (gateway, _):
        answer = await gateway.chat(user="x" * 5_000_000)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert grpc.StatusCode.RESOURCE_EXHAUSTED.name not in answer.body.decode()
