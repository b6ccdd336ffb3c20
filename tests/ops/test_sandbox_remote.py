"""The sandbox of WGSL and OpenCL C: another Python, which goes when it must and is there again when it is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ops.languages.base import Launch, LaunchError, SourceError
from ops.languages.opencl import OpenCL
from ops.sandbox import remote

from .languages.running import ROOT, source
from .languages.test_opencl import array

LANGUAGE = OpenCL()
OUT = np.zeros(2, "int32")  # what is given for `out`
PARAMETERS = array("x", "int32"), array("out", "int32", const=False)


@pytest.fixture(scope="module", autouse=True)
def _device():
    pytest.importorskip("pyopencl", reason="OpenCL kernels need pyopencl: pip install -e '.[opencl]'")
    from ops.languages import opencl_program

    try:
        opencl_program.device()
    except SourceError as error:
        pytest.skip(str(error))
    yield
    remote.stop()


def ran(body: str, seconds: float = 30.0, **names: tuple[str, ...]) -> list[int]:
    x = np.array([3, 5], "int32")
    OUT[:] = 7, 9
    whole = LANGUAGE.with_signature(source(body), PARAMETERS)
    try:
        remote.run(LANGUAGE, whole, PARAMETERS, [x, OUT], Launch(), seconds, **names)
    finally:
        assert x.tolist() == [3, 5]
    return OUT.tolist()


def test_what_it_writes_comes_back():
    assert ran("out[0] = x[1];") == [5, -1]  # an output holds nothing of use before
    assert ran("out[0] = x[1];", outputs=()) == [5, 9]


def test_errors_are_those_of_this_process():
    with pytest.raises(SourceError, match="use of undeclared identifier 'y'\n    out\\[0\\] = y;"):
        ran("out[0] = y;")
    with pytest.raises(LaunchError, match=r"work writes out\[2\], of 2 elements"):
        ran("out[2] = 1;")
    with pytest.raises(LaunchError, match="the kernel writes out, which is read only"):
        ran("out[0] = 1;", inputs=("out",), outputs=())
    assert OUT.tolist() == [7, 9]
    assert ran("out[0] = 1; out[1] = 2;") == [1, 2]


@pytest.mark.parametrize("body", ["out[1 << 28] = 1;", "volatile int i = 0; while (!i) i = i & 1;"])
def test_a_crash_and_no_end(body):
    message = "ended its process by SIG" if "28" in body else "did not end within 2 s, and was stopped"
    ran("out[0] = 0;")
    with pytest.raises(LaunchError, match=message):
        ran(body, 2.0)
    assert OUT.tolist() == [7, 9]
    assert ran("out[0] = 1; out[1] = 2;") == [1, 2]


def test_it_goes_when_this_process_is_killed():
    """Also while it waits: the other end of its connection is closed."""
    code = "import time; from ops.sandbox import remote; remote.start(); print(remote._child._process.pid, flush=True)"
    code += "; time.sleep(99)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{child}/stat") as stat:  # where nobody waits for it
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is still there")
