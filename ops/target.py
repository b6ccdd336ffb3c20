"""Which machine kernels are built for: the CPU's instruction set, its vector width and its threads."""

from __future__ import annotations

import functools
import os

import tvm
from tvm.target import codegen


@functools.cache
def host() -> tvm.target.Target:
    """The target of this machine. Sums may be reordered so that LLVM vectorises them; nothing else is relaxed."""
    return tvm.target.Target(
        {
            "kind": "llvm",
            "mcpu": codegen.llvm_get_system_cpu(),
            "fast-math-contract": 1,
            "fast-math-reassoc": 1,
        }
    )


@functools.cache
def features() -> frozenset[str]:
    """The CPU's features by LLVM's names, such as avx2 and avx512f."""
    return frozenset(str(each) for each in codegen.llvm_get_cpu_features(host()))


@functools.cache
def lanes() -> int:
    """How many float32 values a vector register holds."""
    have = features()
    return 16 if "avx512f" in have else 8 if "avx" in have else 4


@functools.cache
def registers() -> int:
    """How many vector registers there are."""
    return 32 if "avx512f" in features() or "neon" in features() else 16


def threads() -> int:
    """How many threads a kernel runs on: LIMPID_THREADS, else the cores this process may use."""
    return int(os.environ["TVM_NUM_THREADS"])


def describe() -> str:
    """The target as one line, part of every cache key."""
    return f"{host()} threads={threads()}"
