"""WGSL on a device of wgpu: the device, the pipelines and buffers that are kept, and errors on the user's line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .base import Launch, LaunchError, Parameter, Program, Source, SourceError, Value
from .shared import check_launch, check_values, load, located, without_comments
from .wgsl import SIZES, Binding, Declared

_PACKED = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i32": np.dtype("<i4"), "u32": np.dtype("<u4")}
_SUBGROUPS = re.compile(r"\benable +subgroups *;")  # wgpu has them, and knows not the standard's word for it
_FEATURES = ("shader-f16", "subgroup", "subgroup-barrier")  # where the device has them
_LIMITS = (
    "max-buffer-size", "max-storage-buffer-binding-size", "max-storage-buffers-per-shader-stage",
    "max-compute-invocations-per-workgroup", "max-compute-workgroup-size-x", "max-compute-workgroup-size-y",
    "max-compute-workgroup-size-z", "max-compute-workgroup-storage-size", "max-compute-workgroups-per-dimension",
)  # fmt: skip
_POISON = 0xFF  # bytes of a NaN


class Device:
    """A device of wgpu. `name` is what its driver calls it; one lock for all that run on it."""

    def __init__(self, adapter: Any):
        self.wgpu = load("wgpu", "wgsl")
        self.name: str = adapter.info["device"]
        features = [each for each in _FEATURES if each in adapter.features]
        self.f16 = "shader-f16" in features
        limits = {name: adapter.limits[name] for name in _LIMITS}
        self.handle = adapter.request_device_sync(required_features=features, required_limits=limits)
        self.limits: Mapping[str, int] = self.handle.limits
        self.lock = threading.Lock()


_opening = threading.Lock()


def device(named: str | None = None) -> Device:
    """The device to run on: the fastest; a part of its name; or "emulate" for one that computes on the CPU."""
    with _opening:
        return _device(named)


@functools.cache
def _device(named: str | None) -> Device:
    wgpu = load("wgpu", "wgsl")
    with contextlib.suppress(ImportError):  # after the software driver's LLVM, Triton's crashes when it is loaded
        importlib.import_module("triton._C.libtriton")
    with _window_system():
        adapters = wgpu.gpu.enumerate_adapters_sync()
    adapters = [each for each in adapters if each.info["backend_type"] in _API]
    adapters.sort(key=lambda each: _KINDS.get(each.info["adapter_type"], len(_KINDS)))
    if not adapters:
        raise SourceError(
            "no driver for WGSL kernels: install Vulkan's of your GPU, or without one Debian's mesa-vulkan-drivers"
        )
    if named is None:
        return Device(adapters[0])
    for each in adapters:
        cpu = each.info["adapter_type"] == "CPU"
        if cpu if named == "emulate" else named.lower() in each.info["device"].lower():
            return Device(each)
    raise SourceError(f"no device {named!r}; there are {', '.join(each.info['device'] for each in adapters)}")


@contextlib.contextmanager
def _window_system() -> Iterator[None]:
    """Where there is none, drivers complain of it on standard error, though nobody asks for a window."""
    if "XDG_RUNTIME_DIR" in os.environ:
        yield
        return
    os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["XDG_RUNTIME_DIR"]


_API = ("Vulkan", "Metal", "D3D12")  # OpenGL lacks float16, and more
_KINDS = {"DiscreteGPU": 0, "IntegratedGPU": 1, "Unknown": 2, "CPU": 3}


class WgpuProgram(Program):
    """A WGSL kernel. The arrays are copied to the device and what may be written is copied back, so nothing that an
    earlier run left there can pass for a result."""

    def __init__(self, source: Source, parameters: Sequence[Parameter], found: Declared, on: Device):
        self.source, self.found, self._on = source, found, on
        self.device = on.name
        if re.search(r"\benable\s+f16\b", without_comments(source.text)) and not on.f16:
            raise SourceError(f"{source.file}:{source.line}: error: {on.name} has no float16 (shader-f16)")
        bound = {each.name: each for binding in found.bindings for each in binding.parameters}
        if strange := [each for each in parameters if each.name not in bound]:
            raise SourceError(f"{source.file}:{source.line}: error: the text binds no {', '.join(map(str, strange))}")
        if missing := bound.keys() - {each.name for each in parameters}:
            raise SourceError(f"{source.file}:{source.line}: error: nothing is given for {', '.join(sorted(missing))}")
        self.parameters = tuple(bound[each.name] for each in parameters)
        self._pipelines: dict[tuple[int, ...], Any] = {}
        self._buffers: dict[str, Any] = {}
        self._groups: dict[tuple, dict[int, Any]] = {}
        with on.lock:
            text = _SUBGROUPS.sub("", source.text)
            self._module = self._tried(lambda: on.handle.create_shader_module(code=text))
            self._layouts = self._bound_layouts()
            if all(found.block):
                self._pipeline(found.block)

    def sources(self) -> dict[str, str]:
        return {"wgsl": self.source.text}

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        check_launch(launch, "declare var<workgroup> in the text")
        check_values(self.parameters, values)
        block = self._block(launch)
        if 0 in launch.grid or 0 in block:
            return
        most = self._on.limits["max-compute-workgroups-per-dimension"]
        if max(launch.grid) > most:
            raise LaunchError(f"grid {launch.grid} has more than {most} workgroups along one axis on {self.device}")
        given = {each.name: value for each, value in zip(self.parameters, values, strict=True)}
        sizes = tuple(self._size(binding, given) for binding in self.found.bindings)
        with self._on.lock:
            try:
                self._compute(given, sizes, block, launch.grid)
            except self._on.wgpu.GPUError as error:
                raise LaunchError(f"{self.source.entry} on {self.device}: {_first(str(error))}") from error

    def _block(self, launch: Launch) -> tuple[int, ...]:
        """The workgroup size: the text's where it says one."""
        declared = self.found.block
        block = tuple(said or asked for said, asked in zip(declared, launch.block, strict=True))
        if launch.block not in ((1, 1, 1), block):
            raise LaunchError(f"block {launch.block} is not the @workgroup_size of {self.source.entry}, {declared}")
        limits = self._on.limits
        most = [limits[f"max-compute-workgroup-size-{axis}"] for axis in "xyz"]
        total = limits["max-compute-invocations-per-workgroup"]
        if any(size > limit for size, limit in zip(block, most, strict=True)) or math.prod(block) > total:
            raise LaunchError(f"block {block}: {self.device} takes {tuple(most)}, and {total} in all")
        return block

    def _size(self, binding: Binding, given: Mapping[str, Value]) -> int:
        """Bytes that are bound; wgpu takes multiples of 4, and none that are empty."""
        if not binding.element:
            return -(-binding.size // 16) * 16
        array = np.asarray(given[binding.name])
        name, element = binding.parameters[0], SIZES[binding.element] * binding.lanes
        if array.nbytes % element:
            raise LaunchError(f"{name} takes vectors of {binding.lanes}, got {array.size} numbers")
        if binding.count is not None and array.nbytes != binding.count * element:
            raise LaunchError(f"{name} has {binding.count} elements in the text, got {array.nbytes // element}")
        if array.nbytes > (most := self._on.limits["max-storage-buffer-binding-size"]):
            raise LaunchError(f"{name} has {array.nbytes} bytes; {self.device} takes {most}")
        return max(-(-array.nbytes // 4) * 4, 4, element)

    def _compute(self, given: Mapping[str, Value], sizes: tuple[int, ...], block: tuple, grid: tuple) -> None:
        handle = self._on.handle
        pipeline = self._pipeline(block)
        for binding, size in zip(self.found.bindings, sizes, strict=True):
            self._fill(binding, size, given)
        encoder = handle.create_command_encoder()
        computing = encoder.begin_compute_pass()
        computing.set_pipeline(pipeline)
        for number, group in self._bind_groups(sizes).items():
            computing.set_bind_group(number, group)
        computing.dispatch_workgroups(*grid)
        computing.end()
        written = [(b, size) for b, size in zip(self.found.bindings, sizes, strict=True) if b.writes]
        usage = self._on.wgpu.BufferUsage
        back = self._buffer("", sum(size for _, size in written) or 4, usage.COPY_DST | usage.MAP_READ)
        start = 0
        for binding, size in written:
            encoder.copy_buffer_to_buffer(self._buffers[binding.name], 0, back, start, size)
            start += size
        handle.queue.submit([encoder.finish()])
        if not written:
            return
        back.map_sync("READ", 0, start)
        try:
            data, start = np.frombuffer(back.read_mapped(0, start, copy=False), "uint8"), 0
            for binding, size in written:
                array = np.asarray(given[binding.name])
                _bytes(array)[:] = data[start : start + array.nbytes]
                start += size
            del data
        finally:
            back.unmap()

    def _fill(self, binding: Binding, size: int, given: Mapping[str, Value]) -> None:
        """Put an array, or a struct of numbers, where the kernel finds it; poison after its end."""
        usage = self._on.wgpu.BufferUsage
        kind = usage.UNIFORM if binding.uniform else usage.STORAGE
        buffer = self._buffer(binding.name, size, kind | usage.COPY_DST | usage.COPY_SRC)
        if binding.element:
            data = _bytes(np.asarray(given[binding.name]))
        else:
            data = np.zeros(size, "uint8")
            for each in binding.members:
                kept = np.array([given[each.name]], _PACKED[each.type]).view("uint8")
                data[each.offset : each.offset + kept.size] = kept
        whole = data.size // 4 * 4
        if whole:
            self._on.handle.queue.write_buffer(buffer, 0, data, 0, whole)
        if whole < size:
            rest = np.full(size - whole, _POISON, "uint8")
            rest[: data.size - whole] = data[whole:]
            self._on.handle.queue.write_buffer(buffer, whole, rest)

    def _buffer(self, name: str, size: int, usage: int) -> Any:
        """The buffer that is kept for a variable, or for reading back; made anew when it is too small."""
        kept = self._buffers.get(name)
        if kept is None or kept.size < size:
            room = 1 << (size - 1).bit_length() if size < 2**20 else size
            kept = self._buffers[name] = self._on.handle.create_buffer(size=max(room, 16), usage=usage)
            self._groups.clear()
        return kept

    def _bind_groups(self, sizes: tuple[int, ...]) -> dict[int, Any]:
        found = self._groups.get(sizes)
        if found is None:
            entries: dict[int, list] = {number: [] for number in range(len(self._layouts))}
            for binding, size in zip(self.found.bindings, sizes, strict=True):
                resource = {"buffer": self._buffers[binding.name], "offset": 0, "size": size}
                entries[binding.group].append({"binding": binding.index, "resource": resource})
            found = {
                number: self._on.handle.create_bind_group(layout=layout, entries=entries[number])
                for number, layout in enumerate(self._layouts)
            }
            self._groups = {sizes: found}
        return found

    def _bound_layouts(self) -> list:
        """What is bound, said outright: an array that the text does not use may be bound as well."""
        entries: dict[int, list] = {}
        for binding in self.found.bindings:
            kind = "uniform" if binding.uniform else "storage" if binding.writes else "read-only-storage"
            entries.setdefault(binding.group, []).append(
                {"binding": binding.index, "visibility": self._on.wgpu.ShaderStage.COMPUTE, "buffer": {"type": kind}}
            )
        groups = range(max(entries, default=-1) + 1)
        make = self._on.handle.create_bind_group_layout
        return [self._tried(lambda at=at: make(entries=entries.get(at, []))) for at in groups]

    def _pipeline(self, block: tuple[int, ...]) -> Any:
        if block not in self._pipelines:
            stage: dict[str, Any] = {"module": self._module, "entry_point": self.source.entry}
            sizes = zip(("block_x", "block_y", "block_z"), block, self.found.block, strict=True)
            if own := {name: size for name, size, said in sizes if not said}:
                stage["constants"] = own
            layout = self._on.handle.create_pipeline_layout(bind_group_layouts=self._layouts)
            make = self._on.handle.create_compute_pipeline
            self._pipelines[block] = self._tried(lambda: make(layout=layout, compute=stage))
        return self._pipelines[block]

    def _tried(self, make: Any) -> Any:
        try:
            return make()
        except self._on.wgpu.GPUError as error:
            raise SourceError(_told(self.source, str(error))) from error


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view("uint8")


def _first(text: str) -> str:
    """What an error of wgpu is about: its last line is the most exact."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else text


def _told(source: Source, text: str) -> str:
    """An error of wgpu's compiler, on the user's own line."""
    place = re.search(r"^(.*)\n\s*┌─ [^\n:]*:(\d+):\d+", text, re.MULTILINE)
    if place is None:
        return f"{source.file}:{source.line}: error: {_first(text)}"
    message = re.sub(r"^Shader (?:'' parsing|validation) error: ", "", place[1])
    below = text[place.end() :]
    noted = [*re.findall(r"\^+ (.+)", below), *re.findall(r"^\s*= (?:note: )?(.+)", below, re.MULTILINE)]
    more = [each for each in noted if "naga::" not in each and not re.fullmatch(r"Expression \[\d+\] is invalid", each)]
    return located(source, source.line + int(place[2]) - 1, "; ".join(dict.fromkeys([message, *more])))
