"""From an op and its specs to a compiled function: a memo, the disk cache, the compiler, and a log of what it did."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import tirx
from tvm.support import cc

from . import device as devices
from . import store, target
from .digest import source_digest
from .errors import KernelError
from .listing import Text
from .progress import tracked
from .spec import DTYPES, Dim, Spec

if TYPE_CHECKING:
    from .op import Op


@dataclass(frozen=True)
class Compiled:
    """One entry of the log: what was compiled, why it was not found ready, and how long it took."""

    op: str
    specs: str
    reason: str
    seconds: float


log: list[Compiled] = []
_memo: dict[tuple[str, str], Callable] = {}  # by device and key: an emulated GPU's machine code is not a GPU's
_lock = threading.Lock()
_building: dict[tuple[str, str], threading.Lock] = {}


@dataclass(frozen=True)
class Request:
    """An op at symbolic specs with its constants: what one kernel is built from."""

    op: Op
    specs: tuple
    constants: dict[str, Any]

    @property
    def arguments(self) -> str:
        given = zip(self.op.parameters, self.specs, strict=False)
        plain = [(n, v.on("cpu") if isinstance(v, Spec) else v) for n, v in given if v is not None]
        shown = [f"{n}={v.__name__ if isinstance(v, type) else v}" for n, v in plain]
        return ", ".join(shown + [f"{n}={v!r}" for n, v in sorted(self.constants.items())])

    @property
    def device(self) -> str:
        """Where it runs: where its tensors are."""
        return next((each.device for each in self.specs if isinstance(each, Spec)), "cpu")

    @property
    def key(self) -> str:
        """A digest of all that the machine code depends on."""
        with devices.building(self.device):
            machine = target.describe()
        parts = (self.op.name, self.arguments, source_digest(self.op.builders), machine, _versions())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The specs of what the op gives."""
        return self.op._outputs(self.specs, self.constants)

    def blocks(self) -> Any:
        """The op's block definition, unscheduled and without regard to a target."""
        if self.op._kernel is None:
            raise KernelError(f"{self.op.name} has no kernel; register one with @{self.op.name}.kernel")
        function = self.build(self.op._kernel)
        return function.with_attr("has_template", True) if "cpu" in self.op._templates else function

    def scheduled(self) -> Any:
        """The function to compile: the op's template where it has one that applies, else its scheduled blocks."""
        from .schedule import gpu

        chosen = target.gpu()
        template = self.op._templates.get("cpu" if chosen is None else "gpu")
        if chosen is not None:
            self._check_dtypes(chosen)
        function = self.build(template) if template else None
        if function is None:
            return self.rule_scheduled()
        return function if chosen is None else gpu.narrow(function)

    def rule_scheduled(self) -> Any:
        """The blocks, scheduled by the rule, whether the op has a template or not."""
        from .schedule import cpu, gpu

        chosen = target.gpu()
        return cpu.schedule(self.blocks(), self._rows()) if chosen is None else gpu.schedule(self.blocks(), chosen)

    def _check_dtypes(self, chosen: target.Gpu) -> None:
        """Raise KernelError for an argument, or an output, that the GPU's language cannot hold."""
        try:
            chosen.check(each.dtype for each in (*self.specs, *self.outputs) if isinstance(each, Spec))
        except KernelError as error:
            raise KernelError(f"{self.op.name}({self.arguments}): {error}") from None

    def _rows(self) -> int:
        """The least size of the first open dimension."""
        sizes = [spec.shape[0] for spec in self.specs if isinstance(spec, Spec) and spec.shape]
        return next((size.low for size in sizes if isinstance(size, Dim)), 1)

    def build(self, builder: Callable) -> Any:
        """What a builder of the op makes of the specs; None where it does not apply."""
        missing = (None,) * (len(self.op.parameters) - len(self.specs))
        outputs = self.outputs
        primfunc = builder(*self.specs, *missing, *outputs, **self.constants)
        return primfunc and _fixed(primfunc, [s for s in (*self.specs, *outputs) if s is not None])


def _fixed(primfunc: Any, specs: list) -> Any:
    """The function with the sizes that it leaves open, but that the specs know, put in: a range of one size."""
    for parameter, spec in zip(primfunc.params, specs, strict=True):
        if isinstance(spec, Spec) and not spec.symbolic and any(isinstance(each, tirx.Var) for each in parameter.shape):
            sizes = zip(parameter.shape, spec.shape, strict=True)
            shape = [tirx.IntImm("int64", size) if isinstance(each, tirx.Var) else each for each, size in sizes]
            buffer = tirx.decl_buffer(
                shape, spec.dtype, parameter.name, elem_offset=parameter.elem_offset,
                data_alignment=parameter.data_alignment, offset_factor=parameter.offset_factor,
            )  # fmt: skip
            return _fixed(primfunc.specialize({parameter: buffer}), specs)
    return primfunc


def function(request: Request) -> Callable:
    """The compiled function for `request`: from the memo, the disk cache, or the compiler."""
    place = _, key = request.device, request.key
    found = _memo.get(place)
    if found is not None:
        return found
    with _lock:
        lock = _building.setdefault(place, threading.Lock())
    with lock:
        if place not in _memo:
            _memo[place] = _load_or_compile(request, key)
        return _memo[place]


def _load_or_compile(request: Request, key: str) -> Callable:
    if request.device != "cpu":
        found = devices.find(request.device)
        started, ready = time.perf_counter(), found.has(key)
        with devices.building(request.device), named(request):
            made = found.function(request)
        if not ready:
            reason = f"for {request.device}"
            log.append(Compiled(request.op.name, request.arguments, reason, time.perf_counter() - started))
        return made
    with store.kernels.locked(key):
        path, reason = store.kernels.find(key)
        if path is not None:
            try:
                return tvm.runtime.load_module(str(path))[request.op.name]
            except Exception as error:  # a file of the right digest that still does not load
                reason = f"the cached kernel does not load: {error}"
        started = time.perf_counter()
        executable = compiled_for_cpu(request)
        log.append(Compiled(request.op.name, request.arguments, reason, time.perf_counter() - started))
        linked = []

        def write(folder: Path) -> Path:
            path = _write(executable.mod, folder)
            if path.suffix == ".so":
                with suppress(RuntimeError):  # a folder that nothing may be executed from
                    linked.append(tvm.runtime.load_module(str(path)))
            return path

        store.kernels.put(key, f"{request.op.name}({request.arguments})", write)
        return (linked or [executable])[0][request.op.name]  # TVM's own would generate the machine code once more


def _write(module: Any, folder: Path) -> Path:
    """The kernel as a shared library, which loads in no time; where no compiler links one, as LLVM's own code."""
    linker = cc.get_cc()
    if linker is not None:
        library, machine_code = folder / "kernel.so", folder / "kernel.o"
        module.write_to_file(str(machine_code))
        try:
            cc.create_shared(str(library), [str(machine_code)], cc=linker)
            return library
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{linker} does not link kernels: {error}", RuntimeWarning, stacklevel=2)
    code = folder / "kernel.ll"
    module.write_to_file(str(code))
    return code


def compiled_for_cpu(request: Request) -> Any:
    """What TVM makes of the kernel for the CPU at hand, or the one of `target.building_for`."""
    if (chosen := target.gpu()) is not None:
        raise KernelError(f"{request.op.name}: kernels for {chosen.language} are built by ops.cross, and not run here")
    with named(request):
        primfunc = request.scheduled()
        _check_alignment(request.op.name, primfunc)
        return tvm.compile(primfunc.with_attr("global_symbol", request.op.name), target=target.host())


@contextmanager
def named(request: Request) -> Iterator[None]:
    """Errors of TVM, and of builders, say which kernel it was."""
    try:
        yield
    except KernelError:
        raise
    except Exception as error:
        raise KernelError(f"{request.op.name}({request.arguments}) does not compile: {error}") from error


def _check_alignment(name: str, primfunc: Any) -> None:
    """A kernel that assumes more than its elements' alignment would crash on a mapped weight."""
    for parameter in primfunc.params:
        assumed = getattr(parameter, "data_alignment", None) if hasattr(parameter.ty, "data_alignment") else None
        if assumed is not None and assumed > DTYPES[str(parameter.dtype)].itemsize:
            raise KernelError(
                f"{name}: {parameter.name} assumes {assumed}-byte alignment; pass align= its element size"
            )


def compiled(primfunc: Any, name: str) -> Callable:
    """Compile a PrimFunc that a user wrote, as it is. Not cached on disk: it has no source to key it by."""
    started = time.perf_counter()
    _check_alignment(name, primfunc)
    try:
        executable = tvm.compile(primfunc.with_attr("global_symbol", name), target=target.host())
    except Exception as error:
        raise KernelError(f"the PrimFunc for {name} does not compile: {error}") from error
    log.append(Compiled(name, "PrimFunc", "given by op.use", time.perf_counter() - started))
    return executable[name]


def is_primfunc(value: Any) -> bool:
    return isinstance(value, tirx.PrimFunc)


def prepare(requests: Iterable[Request], progress: bool = True) -> int:
    """Build what is not in memory yet, in parallel, with a progress bar when anything must be compiled.

    Gives the number of kernels that were compiled.
    """
    wanted = {(request.device, request.key): request for request in requests}
    missing = [request for place, request in wanted.items() if place not in _memo]
    before = len(log)
    if len(missing) < 2:
        for request in missing:
            function(request)
        return len(log) - before
    absent = sum(not store.kernels.has(request.key) for request in missing)
    with ThreadPoolExecutor(target.threads()) as pool:
        results = pool.map(function, missing)
        try:
            for _ in tracked(results, "Compiling kernels", len(missing), shown=progress and absent > 1):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one failed, or Ctrl-C: the others are not waited for
            raise
    return len(log) - before


def tir(request: Request) -> Text:
    """TVMScript of the op's block definition."""
    return Text(request.blocks().script(), "tvmscript")


@functools.cache
def _versions() -> str:
    return f"apache-tvm {version('apache-tvm')}, apache-tvm-ffi {version('apache-tvm-ffi')}"
