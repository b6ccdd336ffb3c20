"""The generated code of a kernel, in each language that it can be had in, with or without the machine for it."""

from __future__ import annotations

import tvm

from . import cross, target
from .build import Request, Text, compiled_for_cpu, named
from .errors import KernelError
from .languages import nvrtc

_GPUS = {"cuda": "cuda", "ptx": "cuda", "sass": "cuda", "metal": "metal", "wgsl": "wgsl", "opencl": "opencl"}
LANGUAGES = ("llvm", "asm", "c", *_GPUS)


def source(request: Request, language: str) -> Text:
    """Generated code: "llvm", "asm" (as this machine runs it) or "c" (from the block definition); for GPUs "cuda",
    "metal", "wgsl", "opencl", and of what NVRTC makes of CUDA "ptx" and "sass".

    CUDA is for sm_80, or for what `target.building_for_gpu("cuda", arch)` names around the call. Raises KernelError for
    a dtype that a language lacks, and where a tool is missing.
    """
    if language not in LANGUAGES:
        raise KernelError(f"no source in {language!r}; known are {', '.join(map(repr, LANGUAGES))}")
    if language in _GPUS:
        return Text(_of_gpu(request, language))
    if language == "c":
        with named(request):
            generated = tvm.compile(request.blocks().with_attr("global_symbol", request.op.name), target="c")
        return Text(generated.mod.inspect_source())
    return Text(compiled_for_cpu(request).mod.inspect_source("ll" if language == "llvm" else "asm"))


def _of_gpu(request: Request, language: str) -> str:
    chosen = target.gpu()
    if chosen is None or chosen.language != _GPUS[language]:
        with target.building_for_gpu(_GPUS[language]):
            return _of_gpu(request, language)
    if language in ("ptx", "sass"):
        built = cross.built(request)
        return built.ptx if language == "ptx" else nvrtc.sass(built.cubin)
    return cross.lowered(request).text
