"""Which instructions kernels are made of, and that what stands in for some of them computes the same."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

import ops
from ops import target
from ops.quantize import FORMATS
from ops.target import MACHINES
from tests.ops.harness import random
from tests.ops.test_quantize import RUNS_HERE

from . import emulate
from .conftest import BY_ARITHMETIC, by_arithmetic
from .emulate import CPUS, Emulator

pytestmark = pytest.mark.emulated
EVEX = 0x62  # the first byte of what AVX-512 encodes

# What the dot product of bytes must be made of, and what the machine does not have.
INSTRUCTIONS = {
    "portable": (r"\bpmulld|pmuludq|pmullw|pmaddwd", r"ymm|zmm|^v"),
    "avx2": (r"vpmaddubsw .*ymm", r"zmm|vpdpbusd"),
    "avx-vnni": (r"\{vex\} vpdpbusd .*ymm", r"zmm"),
    "avx512": (r"vpmaddubsw .*zmm", r"vpdpbusd"),
    "avx512-vnni": (r"vpdpbusd .*zmm", r"vpmaddubsw"),
    "avx512-bf16": (r"vpdpbusd .*zmm", r"vpmaddubsw"),
    "neon": (r"smull", r"sdot|usdot|[su]mmla"),
    "neon-dotprod": (r"sdot v", r"usdot|[su]mmla"),
    "neon-i8mm": (r"usdot v", r"bfdot|bfmmla"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MACHINES)
def test_the_instructions_of_a_machine(tmp_path, name, form):
    wanted, absent = INSTRUCTIONS[name]
    with target.building_for(name) as machine:
        emulator = Emulator(machine, "none", tmp_path)
        for n in (1, 5, 70):
            request = ops.linear._request((ops.Spec((n, 100), "float32"), ops.Spec((70, 100), form)), {})
            code = emulate.disassembly(emulator.machine_code(request.scheduled()), emulator.architecture)
            assert any(re.search(wanted, text) for _, text in code), f"no {wanted} for {n} tokens"
            assert not [text for _, text in code if re.search(absent, text)]
            if "avx512f" not in machine.features and emulator.architecture == "x86_64":
                assert not [text for encoded, text in code if encoded[0] == EVEX]


def test_pairs_of_bfloat16_are_multiplied_by_the_instruction_for_them(tmp_path):
    for name, wanted in (("avx512-bf16", True), ("avx512-vnni", False)):
        with target.building_for(name) as machine:
            emulator = Emulator(machine, "none", tmp_path)
            for n in (1, 5, 70):
                request = ops.linear._request(tuple(ops.Spec((m, 100), "bfloat16") for m in (n, 70)), {})
                code = emulate.disassembly(emulator.machine_code(request.scheduled()), emulator.architecture)
                assert any(text.startswith("vdpbf16ps") and "zmm" in text for _, text in code) == wanted


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BY_ARITHMETIC)
def test_the_documented_arithmetic_is_what_the_processor_computes(rng, monkeypatch, name, form):
    if name not in RUNS_HERE:
        pytest.skip(f"this processor is no {name}")
    genuine = MACHINES[name]
    x, weight = random(rng, (70, 100), "float32"), random(rng, (70, 100), "float32")
    results = []
    for machine in (genuine, replace(genuine, llvm=MACHINES["avx2"].llvm)):
        with target.building_for(machine):
            for n in (1, 5, 70):
                arguments = ops.tensor(x[:n].copy()), ops.tensor(weight, form)
                with ops.linear.use(ops.linear._request(arguments, {}).scheduled()):
                    results.append(ops.linear(*arguments).numpy())
        by_arithmetic(monkeypatch)
    assert all(np.array_equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))


@pytest.mark.parametrize("name", ["neon", "avx2"])
def test_a_read_past_the_end_of_a_tensor_is_found(tmp_path, name):
    n = tirx.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("past")
        x, y = (T.arg(each, T.buffer((n,), "float32", align=4)) for each in ("x", "y"))
        T.buffer_store(y, x[n + 4], [0])
    emulator = Emulator(MACHINES[name], CPUS[name], tmp_path)
    arrays = [np.zeros(5, "float32") for _ in range(2)]
    with pytest.raises(RuntimeError, match="Segmentation fault"):
        emulator.run("past", builder.get, arrays)


def test_what_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"no qemu-nothing, .*apt-get install qemu-user"):
        emulate._installed("qemu-nothing")
