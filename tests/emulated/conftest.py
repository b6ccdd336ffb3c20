"""Every test in this folder runs once for each machine, or is about one."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ops.schedule import dot, vector
from ops.target import MACHINES

from .emulate import CPUS, Emulator
from .instructions import documented, vdpbf16ps

# What QEMU has no processor for is built for AVX2, each instruction for bytes replaced by its documented arithmetic.
BY_ARITHMETIC = [name for name in MACHINES if name not in CPUS]


@pytest.fixture(scope="session", params=MACHINES)
def machine(request, tmp_path_factory) -> Emulator:
    """A machine of `ops.target.MACHINES`; the programs of its kernels are kept for the session."""
    chosen = MACHINES[request.param]
    folder = tmp_path_factory.mktemp(chosen.name)
    if chosen.name in BY_ARITHMETIC:
        return Emulator(replace(chosen, llvm=MACHINES["avx2"].llvm), CPUS["avx2"], folder)
    return Emulator(chosen, CPUS[chosen.name], folder)


def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have each instruction for bytes and for pairs of bfloat16 replaced by its documented arithmetic."""
    monkeypatch.setattr(dot, "_call", documented)
    monkeypatch.setattr(vector.Arithmetic, "add", vdpbf16ps)
    monkeypatch.setattr(vector.Arithmetic, "declared", lambda _: contextlib.nullcontext())


@pytest.fixture
def emulator(machine, monkeypatch) -> Iterator[Emulator]:
    """Switched on: weights are packed for the machine and op calls run on it, on two threads."""
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    if machine.machine.name in BY_ARITHMETIC:
        by_arithmetic(monkeypatch)
    with machine.running():
        yield machine
