import subprocess
import sys

import pytest

from kvtransfer.memory import Segment
from kvtransfer.transports import ucx_worker
from kvtransfer.transports.ucx import UcxTransport


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("ucxx", name="ucxx"), 'pip install "tandem-serving[ucx]"'),
        (ModuleNotFoundError("numpy", name="libucxx"), "can't be loaded"),
        (ImportError("libucp.so.0: cannot open"), "can't be loaded: libucp.so.0"),
    ],
)
def test_without_the_package_it_says_what_to_do(monkeypatch, error, words):
    def missing(name):
        raise error

    monkeypatch.setattr(ucx_worker.importlib, "import_module", missing)
    ucx_worker.load.cache_clear()
    segment = Segment(4096, bytes(16))
    try:
        assert words in UcxTransport(segment, "127.0.0.1").why_not()
    finally:
        ucx_worker.load.cache_clear()
        segment.close()


def test_importing_kvtransfer_imports_neither_library():

    code = (
        "import sys, kvtransfer.endpoint\n"
        "print([m for m in sys.modules if m.startswith(('ucxx', 'nixl_cu'))])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
