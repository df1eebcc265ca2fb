"""Which event loop the contract tests run on."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    """KV tests run on the loop that workers have; transports, which use raw sockets, on both."""
    if item.path.name == "test_transports.py":
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    if item.path.name == "test_kv_endpoint.py":
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
