"""Kernels for machines other than this one: compiled for them, linked with `runtime.c`, and run by QEMU."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi.libinfo

import ops
from ops import target
from ops.target import Machine

# QEMU's processor for a machine: one that has what the machine has, and, where there is such a one, nothing beyond it.
# "max" is all that QEMU emulates. For x86 that ends at AVX2.
CPUS = {
    "portable": "qemu64",
    "avx2": "max",
    "neon": "cortex-a57",
    "neon-dotprod": "neoverse-n1",
    "neon-i8mm": "max",
}
_PACKAGES = "qemu-user gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
_RUNTIME = Path(__file__).with_name("runtime.c")
_ARGUMENT = np.dtype(
    [("type_index", "i4"), ("padding", "i4"), ("value", "i8"), ("code", "u1"), ("bits", "u1"), ("lanes", "u2"),
     ("ndim", "i4"), ("nbytes", "i8"), ("shape", "i8", 8)]
)  # fmt: skip
_INT, _FLOAT, _TENSOR = 1, 3, 7  # TVMFFITypeIndex
_CODES = {"i": 0, "u": 1, "f": 2, "V": 4}  # DLDataTypeCode by NumPy's kind; ml_dtypes' bfloat16 is a V
_SECONDS = 300


class Emulator(ops.Interceptor):
    """A machine run by QEMU as its processor `cpu`; programs and their files go to `folder`."""

    def __init__(self, machine: Machine, cpu: str, folder: Path):
        self.machine, self.cpu, self.folder = machine, cpu, folder
        self._programs: dict[str, Path] = {}

    @property
    def architecture(self) -> str:
        """As in the names of GNU's and QEMU's programs."""
        return self.machine.llvm["mtriple"].partition("-")[0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """In the `with`, weights are packed for the machine and every op call runs on it."""
        with target.building_for(self.machine), ops.intercepted(self):
            yield

    def call(self, call: ops.Call, launch: Callable[[ops.Call], Any]) -> Any:
        outputs = tuple(ops.empty(spec.shape, spec.dtype) for spec in call.outputs)
        request = call.op.plan(call.args, call.constants).request()
        given = [_memory(each) for each in (*call.args, *outputs) if each is not None]
        self.run(request.key, request.scheduled, given)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def run(self, key: str, primfunc: Callable[[], Any], arguments: list) -> None:
        """Launch the kernel on arrays, which it changes in place, and numbers; it is compiled once for a `key`.

        Raises KernelError for what the kernel refuses, RuntimeError for one that does not end as it should.
        """
        if key not in self._programs:
            self._programs[key] = self._program(f"{len(self._programs)}", primfunc())
        file = self.folder / "arguments"
        arrays = _write(file, arguments)
        emulator = _installed(f"qemu-{self.architecture}")
        command = [emulator, "-cpu", self.cpu, str(self._programs[key]), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, cwd=self.folder)
        if done.returncode == 1:
            raise ops.KernelError(done.stderr.strip())
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        _read(file, len(arguments), arrays)

    def machine_code(self, primfunc: Any) -> Path:
        """An object file of a PrimFunc, compiled for the machine."""
        path = self.folder / "kernel.o"
        compiled = tvm.compile(primfunc.with_attr("global_symbol", "kernel"), target=self.machine.target)
        compiled.mod.write_to_file(str(path))
        return path

    def _program(self, name: str, primfunc: Any) -> Path:
        path = self.folder / name
        objects = _runtime(self.architecture, self.folder), self.machine_code(primfunc)
        named = "-Wl,--defsym=kernel=__tvm_ffi_kernel"
        _done(_compiler(self.architecture), "-static", *objects, named, "-lm", "-o", path)
        return path


def disassembly(machine_code: Path, architecture: str) -> list[tuple[bytes, str]]:
    """The instructions of an object file: bytes and text, such as (b"...", "vpdpbusd %zmm1,%zmm2,%zmm3")."""
    listing = _done(_installed(f"{architecture}-linux-gnu-objdump"), "-d", "-w", machine_code)
    lines = [line.split("\t", 2) for line in listing.splitlines()]  # the address, the bytes, the text
    return [(bytes.fromhex(line[1].replace(" ", "")), " ".join(line[2].split())) for line in lines if len(line) == 3]


@functools.cache
def _runtime(architecture: str, folder: Path) -> Path:
    path = folder / f"runtime-{architecture}.o"
    headers = (
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
        Path(tvm.__file__).parent / "include",
    )
    _done(_compiler(architecture), "-O1", *(f"-I{each}" for each in headers), "-c", _RUNTIME, "-o", path)
    return path


def _compiler(architecture: str) -> str:
    return _installed(f"{architecture}-linux-gnu-gcc")


@functools.cache
def _installed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"no {program}, which emulation takes; on Debian: apt-get install {_PACKAGES}")
    return found


def _done(*command: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def _memory(value: Any) -> Any:
    """A tensor's memory, of a packed weight its bytes; a number as it is."""
    if not isinstance(value, ops.Tensor):
        return value
    return value.numpy() if value.spec.format is None else np.from_dlpack(value.buffer.data)


def _write(file: Path, arguments: list) -> list[np.ndarray]:
    """Write a file of arguments, as `runtime.c` reads it, and give those that are arrays."""
    table = np.zeros(len(arguments), _ARGUMENT)
    for row, value in zip(table, arguments, strict=True):
        if isinstance(value, np.ndarray):
            row["type_index"], row["nbytes"], row["ndim"] = _TENSOR, value.nbytes, value.ndim
            row["code"], row["bits"], row["lanes"] = _CODES[value.dtype.kind], 8 * value.itemsize, 1
            row["shape"][: value.ndim] = value.shape
        else:
            row["type_index"] = _INT if isinstance(value, int) else _FLOAT
            row["value"] = value if isinstance(value, int) else np.float64(value).view("int64")
    arrays = [each for each in arguments if isinstance(each, np.ndarray)]
    file.write_bytes(b"".join([np.int64(len(table)).tobytes(), table.tobytes(), *(each.tobytes() for each in arrays)]))
    return arrays


def _read(file: Path, count: int, arrays: list[np.ndarray]) -> None:
    """Take the arrays over from a file of `count` arguments."""
    data, start = file.read_bytes(), 8 + count * _ARGUMENT.itemsize
    for array in arrays:
        array.reshape(-1).view("uint8")[...] = np.frombuffer(data, "uint8", array.nbytes, start)
        start += array.nbytes
