"""The device "cuda" without a GPU: a stub of NVIDIA's driver (`cuda_stub.c`) whose kernels the emulator computes.

All else is what runs on a GPU: TVM's CUDA runtime, NVIDIA's Python package, unified memory, launches that are waited
for. A process that should have it is started with `environment(build(folder))`, and calls `install()`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ops import cross
from ops.build import Request
from ops.languages import cuda, hosted, native
from ops.languages.base import Program
from ops.spec import DTYPES

SOURCE = Path(__file__).with_suffix(".c")
_MARK = "LIMPID_TEST_CUDA_STUB"


def build(folder: Path) -> Path:
    """The stub's two libraries, in a folder."""
    compiler = [native.compiler("c"), "-shared", "-fPIC", "-O1", "-w", str(SOURCE)]
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: *; };\n")
    for name, more in (("libcuda.so.1", ["-DDRIVER"]), ("libcudart.so.13", [f"-Wl,--version-script={versions}"])):
        subprocess.run([*compiler, *more, f"-Wl,-soname,{name}", "-ldl", "-o", str(folder / name)], check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """What a process with the stub is started with."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    return os.environ | {"LD_LIBRARY_PATH": path, _MARK: "1"}


def install() -> None:
    """In a process with the stub: NVRTC makes machine code, and the stub's image takes its place."""
    if _MARK not in os.environ:
        return
    built, compiled = cross.built, cuda.Cuda._compiled

    def with_image(request: Request) -> cross.Built:
        return replace(built(request), cubin=_image(hosted.functions(cross.lowered(request), cuda.emulated)))

    def compiled_to_image(self, source, arch):
        parameters = self.parse(source)
        assert parameters is not None
        image = _image({source.entry: cuda.emulated(source, parameters)})
        return compiled(self, source, arch)._replace(cubin=image)

    cross.built = with_image
    cuda.Cuda._compiled = compiled_to_image


def _image(programs: Mapping[str, Program]) -> bytes:
    """A line a function: its name, the bytes of its numbers (0 for an array), the library."""
    lines = []
    for name, program in programs.items():
        sizes = [
            0 if p.pointer else (native.NUMBERS.get(p.type) or DTYPES[p.dtype or ""]).itemsize
            for p in program.parameters
        ]
        lines.append(f"{name} {','.join(map(str, sizes))} {program.library}")
    return "\n".join(lines).encode() + b"\n\0"
