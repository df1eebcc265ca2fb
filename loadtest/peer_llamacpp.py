"""llama.cpp as a peer, through the C interface of its shared library.

The library is not ours to install: `HOW` says where one can be had. Of the structs that it takes by
value only the first fields are named here, which are checked against their known defaults; the
rest is handed back as the library filled it in.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.engine_subjects import Floats, Tokens

HOW = (
    "npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz, "
    "then --llama-cpp package/bins/linux-x64"
)
"""10.8 MB: the library alone, built for several kinds of x86."""

_BATCH_TOKENS = 512
_FIRST_FIELDS = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
_DEFAULTS = (512, 2048, 512, 1)
_SPARE = ("rest", c.c_uint64 * 128)
"""More than any release's structs hold, so that one returned by value finds room."""


class LlamaCppError(Exception):
    """The library can't be used, or a call of it failed. The words say why."""


class _ContextParams(c.Structure):
    _fields_ = [*((name, c.c_uint32) for name in _FIRST_FIELDS), _SPARE]


class _ModelParams(c.Structure):
    _fields_ = [_SPARE]


class _Batch(c.Structure):
    """llama_batch of llama.h."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class LlamaCpp:
    """A GGUF model computed by libllama. See engine_subjects.Subject."""

    def __init__(
        self, folder: Path, model: Path, *, threads: int, vocabulary: int, longest: int
    ) -> None:
        self._threads, self._vocabulary = threads, vocabulary
        self._library = _library(folder)
        self._model = self._library.llama_model_load_from_file(
            str(model).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise LlamaCppError(f"llama.cpp can't load {model}")
        self.precision = f"weights as in {model.name}, float16 KV"
        self.logits: Floats = np.empty((0, 0), np.float32)
        # One context for prompts, made before anything is measured, and one for the last batch.
        self._single = self._open(1, longest)
        self._batched: Any = None
        self._context = self._single

    def prefill(self, prompt: Tokens) -> None:
        """See Subject."""
        self._prompt, self._context = prompt, self._single
        self._library.llama_memory_clear(self._memory, False)
        self._compute_prompt()

    def spread(self, batch: int, steps: int) -> None:
        """See Subject; the prompt is computed again, in a context for so many sequences."""
        last = self.logits
        if self._batched:
            self._library.llama_free(self._batched)
        self._batched = self._context = self._open(batch, len(self._prompt) + steps)
        self._compute_prompt()
        for sequence in range(1, batch):
            self._library.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self.logits = np.repeat(last, batch, axis=0)

    def decode(self) -> None:
        """See Subject."""
        batch = len(self.logits)
        tokens = self.logits.argmax(-1)
        self._decode(tokens, [self._position] * batch, range(batch), wanted=range(batch))
        self._position += 1

    def close(self) -> None:
        """Frees everything."""
        for context in filter(None, (self._single, self._batched)):
            self._library.llama_free(context)
        self._library.llama_model_free(self._model)

    @property
    def _memory(self) -> Any:
        return self._library.llama_get_memory(self._context)

    def _open(self, sequences: int, tokens: int) -> Any:
        """A context for so many sequences of so many tokens each."""
        params = self._library.llama_context_default_params()
        # Each sequence's share is a multiple of 256.
        params.n_ctx = sequences * (-(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.n_seq_max = sequences
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise LlamaCppError(f"llama.cpp has no room for {sequences} sequences of {tokens}")
        self._library.llama_set_n_threads(context, self._threads, self._threads)
        return context

    def _compute_prompt(self) -> None:
        prompt = self._prompt
        for start in range(0, len(prompt), _BATCH_TOKENS):
            part = prompt[start : start + _BATCH_TOKENS]
            at = range(start, start + len(part))
            ends = at.stop == len(prompt)
            self._decode(part, at, [0] * len(part), wanted=[len(part) - 1] if ends else [])
        self._position = len(prompt)

    def _decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        """Computes rows; `logits` becomes those of the wanted rows."""
        count = len(tokens)
        rows = self._library.llama_batch_init(count, 0, 1)
        try:
            rows.n_tokens = count
            for i, (token, at, owner) in enumerate(zip(tokens, positions, sequences, strict=True)):
                rows.token[i], rows.pos[i] = int(token), at
                rows.n_seq_id[i], rows.seq_id[i][0] = 1, owner
                rows.logits[i] = i in wanted
            failed = self._library.llama_decode(self._context, rows)
        finally:
            self._library.llama_batch_free(rows)
        if failed:
            raise LlamaCppError(f"llama_decode gave {failed}")
        # Reading them waits for the computation.
        found = [self._library.llama_get_logits_ith(self._context, i) for i in wanted]
        if found:
            self.logits = np.stack([np.ctypeslib.as_array(x, (self._vocabulary,)) for x in found])


def _library(folder: Path) -> Any:
    """The library with its calls typed. Raises LlamaCppError."""
    found = [p for p in sorted(folder.glob("libllama.*")) if ".so" in p.suffixes]
    if not found:
        raise LlamaCppError(f"{folder} has no libllama; {HOW}")
    try:
        library: Any = c.CDLL(str(found[0]))
        _type(library)
        library.llama_log_set(_QUIET, None)
        # Backends, one for each kind of CPU, lie beside the library.
        ggml = next(p for p in sorted(folder.glob("libggml.*")) if ".so" in p.suffixes)
        c.CDLL(str(ggml)).ggml_backend_load_all_from_path(str(folder).encode())
    except (OSError, AttributeError, StopIteration) as error:
        raise LlamaCppError(f"{found[0]} can't be used: {error}") from error
    first = library.llama_context_default_params()
    if tuple(getattr(first, name) for name in _FIRST_FIELDS) != _DEFAULTS:
        raise LlamaCppError(f"{found[0]}: its llama_context_params is not the known one; {HOW}")
    library.llama_backend_init()
    return library


_Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_QUIET = _Log(lambda level, text, data: None)


def _type(library: Any) -> None:
    pointer, number = c.c_void_p, c.c_int32
    for name, returned, *takes in (
        ("llama_log_set", None, _Log, pointer),
        ("llama_backend_init", None),
        ("llama_model_default_params", _ModelParams),
        ("llama_model_load_from_file", pointer, c.c_char_p, _ModelParams),
        ("llama_model_free", None, pointer),
        ("llama_context_default_params", _ContextParams),
        ("llama_init_from_model", pointer, pointer, _ContextParams),
        ("llama_free", None, pointer),
        ("llama_set_n_threads", None, pointer, number, number),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, c.c_bool),
        ("llama_memory_seq_cp", None, pointer, number, number, number, number),
        ("llama_batch_init", _Batch, number, number, number),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", number, pointer, _Batch),
        ("llama_get_logits_ith", c.POINTER(c.c_float), pointer, number),
    ):
        call = getattr(library, name)
        call.restype, call.argtypes = returned, takes
