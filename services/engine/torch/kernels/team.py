"""Runs a kernel on torch's own threads.

A second thread pool beside torch's OpenMP team would fight it for the cores: OpenMP threads spin
for a while after a parallel region. So kernels run on the very same team, through GOMP_parallel of
the OpenMP library that torch was linked with (GNU's and LLVM's both have it).

A kernel may be entered by any number of threads at once: every entry takes work items, by an
atomic counter, until none is left. So results can't depend on the number of threads, and one
plain call is a complete run too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc

log = logging.getLogger(__name__)


def _find_parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags), or None if torch's OpenMP has none."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # The loader looks a name up in the libraries this one was linked with, too.
            found = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
        return found
    return None


_PARALLEL = _find_parallel()
if _PARALLEL is None:
    log.warning("torch's OpenMP has no GOMP_parallel: the engine's own kernels use one thread")


class Entry:
    """A kernel's entry, compiled when it is first used (seconds) or read from the cache."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    @functools.cached_property
    def address(self) -> int:
        """Of the machine code, `void entry(int64)`. It stays for the process' life."""
        self._compiled = cfunc("void(int64)", cache=True, error_model="numpy")(self.function)
        address = self._compiled.address
        assert address is not None, "compiled above"
        return address


def entry(function: Callable[[int], None]) -> Entry:
    """Marks a function of one address as a kernel's entry."""
    return Entry(function)


class Call:
    """A kernel with its arguments, to be run again and again.

    `entry` takes the address of int64 arguments: first the counter of work
    taken, which every run starts from 0, then one for each of `names`. Addresses among them must
    stay valid while the call is used: the owner keeps the arrays. `module` is where the kernel
    stands, for whoever measures.
    """

    __slots__ = ("_address", "_index", "_plain", "_values", "_where", "module")

    def __init__(self, entry: Entry, names: Sequence[str], **values: int) -> None:
        self.module = entry.function.__module__.rpartition(".")[2]
        self._index = {name: i for i, name in enumerate(names, start=1)}
        self._values = np.zeros(len(names) + 1, np.int64)
        self._where = self._values.ctypes.data
        self._address = entry.address
        self._plain = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address)
        self.set(**values)

    def set(self, **values: int) -> None:
        """Gives arguments their values."""
        for name, value in values.items():
            self._values[self._index[name]] = value

    def run(self, threads: int) -> None:
        """Runs to completion on up to `threads` threads, without the GIL."""
        self._values[0] = 0
        if threads > 1 and _PARALLEL is not None:
            _PARALLEL(self._address, self._where, threads, 0)
        else:
            self._plain(self._where)


def float_argument(value: float) -> int:
    """A float32 as the integer of its bits."""
    return int(np.float32(value).view(np.int32))
