"""CUDA source to PTX, machine code and its listing, by NVIDIA's wheels: no GPU, no driver and no toolkit is needed."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KernelError
from .base import SourceError

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # that generated kernels are compiled for in the tests
_SECONDS = 120  # after which a disassembler is given up


class Compiled(NamedTuple):
    """What NVRTC makes of a text: PTX, machine code for one architecture, and what it has to say about the text."""

    ptx: str
    cubin: bytes
    log: str


def compile(text: str, arch: str = "sm_90", options: Sequence[str] = (), name: str = "kernel.cu") -> Compiled:
    """Compile CUDA C++ for `arch`, such as "sm_90". Functions to launch are `extern "C" __global__`.

    Sums keep their order and division is exact: there is no fast math unless `options` ask for it. Raises SourceError
    with the compiler's words; `#line` directives decide of which file they speak, `name` where there are none.
    """
    nvrtc: Any = _module("cuda.bindings.nvrtc", "cuda-bindings")
    known = [f"sm_{each}" for each in _done(nvrtc, nvrtc.nvrtcGetSupportedArchs())]
    if arch.rstrip("af") not in known:  # sm_90a has what no other has
        raise KernelError(f"NVRTC does not compile for {arch!r}; it knows {', '.join(known)}")
    program = _done(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        given = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", *_include(), *options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), [each.encode() for each in given])
        log = _text(nvrtc, program, "ProgramLog").decode().rstrip("\0\n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise SourceError(log or f"NVRTC gives no reason: {status}")
        ptx = _text(nvrtc, program, "PTX").rstrip(b"\0").decode()
        return Compiled(ptx, _text(nvrtc, program, "CUBIN"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def available() -> bool:
    """Whether NVRTC is installed."""
    try:
        _module("cuda.bindings.nvrtc", "cuda-bindings")
    except Missing:
        return False
    return True


def sass(cubin: bytes) -> str:
    """The listing of machine code, by nvdisasm."""
    with tempfile.TemporaryDirectory(prefix="limpid-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([_tool("nvdisasm"), str(path)], capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise KernelError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout


class Missing(KernelError):
    """A tool that is not installed."""


def missing(what: str) -> Missing:
    """The error of a tool that is not installed."""
    return Missing(f"{what} is missing: pip install 'limpid[cuda]' (or -e '.[cuda]' in a clone)")


def _module(name: str, wheel: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise missing(f"the package {wheel}") from None
    try:
        module.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there, the library is not
        raise missing(f"the package nvidia-cuda-nvrtc ({error})") from None
    return module


@functools.cache
def _folders() -> tuple[Path, ...]:
    """Where NVIDIA's wheels have put things: site-packages/nvidia/cu13."""
    places = [Path(each) / "nvidia" for each in sys.path if each]
    return tuple(found for place in places for found in sorted(place.glob("cu[0-9]*"), reverse=True))


@functools.cache
def _include() -> tuple[str, ...]:
    """Options that name the folders of cuda_fp16.h, mma.h and the like. A text that includes none needs none."""
    found = [folder / "include" for folder in _folders() if (folder / "include" / "cuda_fp16.h").exists()]
    return tuple(f"-I{each}" for folder in found[:1] for each in (folder, folder / "cccl"))


def libraries(pattern: str) -> list[Path]:
    """NVIDIA's libraries of a name, as the wheels have put them."""
    return [path for folder in _folders()[:1] for path in sorted((folder / "lib").glob(pattern))]


def _tool(name: str) -> str:
    for folder in _folders():
        if (path := folder / "bin" / name).exists():
            return str(path)
    raise missing(f"the package nvidia-cuda-{name}")


def _done(nvrtc: Any, result: tuple) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    """A result of a program, of the size that it tells."""
    text = bytearray(_done(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program)))
    _done(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))  # writes there, which no bytes may be given for
    return bytes(text)
