"""Which machine kernels are built for: its instruction set, as the schedules see it, its caches and its threads.

A schedule asks for the width of a vector, the number of registers and the dot-product instruction, never for the name
of a machine. `LIMPID_CPU` names one of `MACHINES` to build for something else than the processor at hand, and
`building_for_gpu` a GPU, which need not be there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

from .errors import KernelError
from .threads import count

# Sums may be reordered so that LLVM vectorises them; nothing else of floating-point arithmetic is relaxed.
_COMMON = {"kind": "llvm", "fast-math-contract": 1, "fast-math-reassoc": 1}


@dataclass(frozen=True)
class Machine:
    """An instruction set. `lanes` float32 values fit in a vector register, of which there are `registers`.

    `dot` is how bytes are multiplied and added up: "vnni" (vpdpbusd), "maddubs" (vpmaddubsw), "sdot" and "usdot"
    (NEON dotprod and i8mm), "smull" (NEON), or "portable", without an instruction of its own. `needs` are the features
    by LLVM's names that its kernels cannot do without. `bf16` says whether there is a dot product of bfloat16 pairs.
    Caches are in bytes: of a core, `l3` of all of them.
    """

    name: str
    llvm: dict[str, Any] = field(hash=False)
    lanes: int
    registers: int
    dot: str
    needs: frozenset[str] = frozenset()
    bf16: bool = False
    l1: int = 32 * 2**10
    l2: int = 1024 * 2**10
    l3: int = 32 * 2**20

    @functools.cached_property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return tvm.target.Target(_COMMON | self.llvm)

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """The features by LLVM's names, such as avx2 and avx512f."""
        return frozenset(str(each) for each in codegen.llvm_get_cpu_features(self.target))


def _x86(mcpu: str, *more: str) -> dict[str, Any]:
    return {"mtriple": "x86_64-linux-gnu", "mcpu": mcpu} | ({"mattr": list(more)} if more else {})


def _arm(*more: str) -> dict[str, Any]:
    return {"mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon", *more]}


_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512vnni"}
_NEON = frozenset({"neon"})
MACHINES: dict[str, Machine] = {
    each.name: each
    for each in (
        Machine("portable", _x86("x86-64"), 4, 16, "portable", frozenset({"sse2"})),
        Machine("avx2", _x86("x86-64-v3"), 8, 16, "maddubs", _AVX2),
        Machine("avx-vnni", _x86("x86-64-v3", "+avxvnni"), 8, 16, "vnni", _AVX2 | {"avxvnni"}),
        Machine("avx512", _x86("x86-64-v4"), 16, 32, "maddubs", _AVX512),
        Machine("avx512-vnni", _x86("x86-64-v4", "+avx512vnni"), 16, 32, "vnni", _VNNI),
        Machine(
            "avx512-bf16", _x86("x86-64-v4", "+avx512vnni", "+avx512bf16"), 16, 32, "vnni", _VNNI | {"avx512bf16"}, True
        ),
        Machine("neon", _arm(), 4, 32, "smull", _NEON),
        Machine("neon-dotprod", _arm("+dotprod"), 4, 32, "sdot", _NEON | {"dotprod"}),
        Machine("neon-i8mm", _arm("+dotprod", "+i8mm"), 4, 32, "usdot", _NEON | {"dotprod", "i8mm"}),
    )
}
_USED = frozenset().union(*(each.needs for each in MACHINES.values()))
_LINUX = {"neon": "asimd", "dotprod": "asimddp"}  # Linux's names for what it calls otherwise than LLVM
_chosen: contextvars.ContextVar[Machine | None] = contextvars.ContextVar("machine", default=None)


def machine() -> Machine:
    """The machine that kernels are built for now."""
    return _chosen.get() or _default()


@contextlib.contextmanager
def building_for(chosen: Machine | str) -> Iterator[Machine]:
    """In the `with`, weights are packed and kernels are built for another machine than this one."""
    found = MACHINES[chosen] if isinstance(chosen, str) else chosen
    token = _chosen.set(found)
    try:
        yield found
    finally:
        _chosen.reset(token)


@functools.cache
def _default() -> Machine:
    named = os.environ.get("LIMPID_CPU", "")
    if named in ("", "native"):
        return _native()
    if named not in MACHINES:
        raise KernelError(f"LIMPID_CPU is {named!r}, expected native, {', '.join(MACHINES)}")
    if missing := MACHINES[named].needs - _native().features:
        raise KernelError(f"LIMPID_CPU is {named!r}, and this processor has no {', '.join(sorted(missing))}")
    return MACHINES[named]


def _native() -> Machine:
    """The processor at hand. LLVM knows it by its name: what a hypervisor hides of it is taken away."""
    llvm: dict[str, Any] = {"mcpu": codegen.llvm_get_system_cpu()}
    hidden = sorted(_USED & Machine("native", llvm, 4, 16, "portable").features - _flags())
    if hidden:
        llvm["mattr"] = [f"-{feature}" for feature in hidden]
    have = Machine("native", llvm, 4, 16, "portable").features
    dots = {"avx512vnni": "vnni", "avxvnni": "vnni", "avx2": "maddubs", "i8mm": "usdot", "dotprod": "sdot"}
    dot = next((name for feature, name in dots.items() if feature in have), "smull" if "neon" in have else "portable")
    lanes = 16 if "avx512bw" in have else 8 if "avx2" in have else 4
    caches = {f"l{level}": size for level, size in _caches().items()}
    registers = 32 if lanes == 16 or "neon" in have else 16
    return Machine("native", llvm, lanes, registers, dot, _USED & have, "avx512bf16" in have, **caches)


def _flags() -> frozenset[str]:
    """Which of the features that schedules use Linux says the processor has; all of them where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _USED
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = {flag.replace("_", "") for flag in line.partition(":")[2].split()}
    return frozenset(feature for feature in _USED if _LINUX.get(feature, feature) in flags) if flags else _USED


def _caches() -> dict[int, int]:
    """Bytes of the first core's data caches by level, as far as Linux tells."""
    found = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):  # elsewhere the defaults of Machine hold
            if (folder / "type").read_text().strip() != "Instruction":
                size = (folder / "size").read_text().strip().removesuffix("K")
                found[int((folder / "level").read_text())] = int(size) * 1024
    return {level: size for level, size in found.items() if level in (1, 2, 3)}


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its schedules see it. `language` is what its kernels are written in; `arch` is NVIDIA's, as sm_90.

    `warp` threads run in step and read each other's registers; 1 where nothing is known of them. A block has up to
    `threads` threads and `shared` bytes of their own. `lacks` names dtypes that kernels cannot hold, each with what to
    do instead; `apart` says that each function needs a text of its own, and `double` that there is float64.
    """

    language: str
    kind: str  # TVM's name
    arch: str = ""
    warp: int = 1
    threads: int = 256
    shared: int = 16 * 2**10
    lacks: dict[str, str] = field(default_factory=dict, hash=False)
    apart: bool = False
    double: bool = False

    @functools.cached_property
    def target(self) -> tvm.target.Target:
        """TVM's target, with this machine as its host."""
        attributes = {"kind": self.kind, "thread_warp_size": self.warp, "max_num_threads": self.threads}
        if self.arch:
            attributes["arch"] = self.arch
        return tvm.target.Target(attributes, host=host())

    @property
    def version(self) -> int:
        """NVIDIA's compute capability times 10, such as 90; 0 for others."""
        return int(self.arch.removeprefix("sm_").rstrip("af") or 0)

    def check(self, dtypes: Iterable[str]) -> None:
        """Raise KernelError for a dtype that the language cannot hold."""
        for dtype in dtypes:
            if dtype in self.lacks:
                raise KernelError(f"{self.language} has no {dtype}: {self.lacks[dtype]}")

    def __str__(self) -> str:
        without = f" without {', '.join(sorted(self.lacks))}" if self.lacks else ""
        return f"{self.language} {self.arch} warp={self.warp} threads={self.threads} shared={self.shared}{without}"


_BYTES = "it stores no single bytes; "
GPUS: dict[str, Gpu] = {
    each.language: each
    for each in (
        Gpu("cuda", "cuda", "sm_80", warp=32, threads=1024, shared=48 * 2**10, double=True),
        Gpu("metal", "metal", warp=32, threads=256, shared=32 * 2**10),
        Gpu("opencl", "opencl"),
        Gpu(
            "wgsl",
            "webgpu",
            apart=True,
            lacks={
                "bfloat16": "convert it to float16 or float32, by ops.cast or when the checkpoint is loaded",
                "int64": "give int32",
                "int8": f"{_BYTES}give int32",
                "uint8": f"{_BYTES}give int32",
            }
            | dict.fromkeys(
                ("q4", "q8", "q4k", "q6k", "mxfp4"), f"{_BYTES}load the weights unpacked, in float16 or float32"
            ),
        ),
    )
}
_chosen_gpu: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar("gpu", default=None)


def gpu() -> Gpu | None:
    """The GPU that kernels are built for now; None where that is the CPU."""
    return _chosen_gpu.get()


@contextlib.contextmanager
def building_for_gpu(language: Gpu | str, arch: str = "", without: Iterable[str] = ()) -> Iterator[Gpu]:
    """In the `with`, kernels are built for a GPU, whether there is one or not: "cuda", "metal", "opencl" or "wgsl".

    `arch` is NVIDIA's architecture (default sm_80); `without` are dtypes that the device lacks, such as "float16".
    """
    if isinstance(language, str) and language not in GPUS:
        raise KernelError(f"no GPU kernels in {language!r}; known are {', '.join(GPUS)}")
    found = GPUS[language] if isinstance(language, str) else language
    if arch and not found.arch:
        raise KernelError(f"{found.language} has no architectures; arch is {arch!r}")
    lacks = dict.fromkeys(without, "the device has no such arithmetic; give float32")
    found = replace(found, arch=arch or found.arch, lacks=found.lacks | lacks)
    token = _chosen_gpu.set(found)
    try:
        yield found
    finally:
        _chosen_gpu.reset(token)


def host() -> tvm.target.Target:
    """TVM's target for the current machine."""
    return machine().target


def features() -> frozenset[str]:
    """The current machine's features by LLVM's names, such as avx2 and avx512f."""
    return machine().features


def lanes() -> int:
    """How many float32 values a vector register holds."""
    return machine().lanes


def registers() -> int:
    """How many vector registers there are."""
    return machine().registers


def threads() -> int:
    """How many threads a kernel runs on: LIMPID_THREADS, else the physical cores this process may use."""
    return count()


def describe() -> str:
    """The machine as one line, part of every cache key."""
    m = machine()
    if (device := gpu()) is not None:
        return f"{host()} lanes={m.lanes} and {device}"
    return f"{host()} dot={m.dot} bf16={m.bf16} caches={m.l1},{m.l2},{m.l3} threads={threads()}"
