"""The engine is imported before torch, as in a worker: see services/engine/torch/__init__.py."""

import services.engine.torch  # noqa: F401
