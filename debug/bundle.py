"""A bundle: all of one call in a file, so that it can be run again elsewhere. Written by `repro`, run by `replay`.

manifest.json            op, address, arguments, constants, kernel, outcome, versions, machine
inputs/x.safetensors     each tensor that the call was given, a written one as it was before
results/output.safetensors, results/cache.safetensors, ...    what it gave, and wrote; absent when it did not return
kernel.tir               the op's block definition, TVMScript
kernel.py                the source of the Python kernel that was in use
replay.py                a script for people
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ops
from ops import Call, OpError, Spec, Tensor, target
from ops.difference import Difference, difference
from ops.difference import results as gave
from ops.op import registry
from ops.scope import Scope

from . import archive
from .kernel_source import KernelSource, kernel_source
from .record import from_bytes, to_bytes

_FORMAT = 1
_LARGEST = 4 * 2**30  # bytes that a call without results may give
_SCRIPT = '''"""A call of {op}, as it was recorded: python replay.py BUNDLE.zip, where limpid is installed.

`limpid replay BUNDLE.zip` does the same in a process of its own. Here the runtime's own kernel runs: change what you
like, and step into it.
"""

import sys

from debug.bundle import Bundle
from ops.op import registry

bundle = Bundle.read(sys.argv[1])
{names} = bundle.call.args
output = registry["{op}"]({names} **bundle.call.constants)
for name, difference in bundle.differences(bundle.call, output).items():
    print(name, difference)
'''


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: the call on its inputs, what it gave when it was recorded, and the texts beside it.

    `results` by name; empty when the call did not return, or raised `error`. `hash` is the sha256 of their bytes.
    """

    path: Path
    call: Call
    results: dict[str, Tensor]
    hash: str | None
    error: str | None
    kernel: dict[str, Any]
    versions: dict[str, str]
    source: str
    texts: dict[str, str]

    @staticmethod
    def read(path: str | Path) -> Bundle:
        """Nothing in it is run. Raises OpError for a file that is no bundle, or none that this process can use."""
        path = Path(path)
        members = archive.read(path)
        try:
            return _Reader(path, members).bundle()
        except OpError as error:
            if str(error).startswith(str(path)):
                raise
            raise OpError(f"{path} cannot be used: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise OpError(f"{path} is no bundle that can be read: {type(error).__name__}: {error}") from error

    def differences(self, call: Call, output: Any) -> dict[str, Difference]:
        """How what a call gave differs from what was recorded, by name of the result; only where bits do."""
        found = {}
        for name, tensor in gave(call, output).items():
            kept = self.results.get(name)
            if kept is not None and not (to_bytes(kept) == to_bytes(tensor)).all():
                found[name] = difference(tensor.numpy(), kept.numpy(), tensor.dtype)
        return found


def hashed(results: Iterable[Tensor]) -> str:
    """sha256 of the bytes of a call's results, in order."""
    digest = hashlib.sha256()
    for each in results:
        digest.update(to_bytes(each).data)
    return digest.hexdigest()


def manifest(call: Call, source: str, kernel: dict[str, Any], outcome: dict[str, str]) -> dict[str, Any]:
    """What stands in `manifest.json`. `outcome`: its "hash", or the "error"; nothing when it did not return."""
    given = list(zip(call.op.parameters, call.args, strict=False))
    return {
        "format": _FORMAT,
        "op": call.op.name,
        "address": call.address,
        "path": call.path,
        "ordinal": call.ordinal,
        "pass": call.scope.number,
        "source": source,
        "arguments": [
            {"name": name} | (_plain(v.spec) if isinstance(v, Tensor) else {"value": v}) for name, v in given
        ],
        "constants": call.constants,
        "outputs": [_plain(spec) for spec in call.outputs],
        "kernel": kernel,
        "outcome": outcome,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What a result may depend on."""
    names = ("limpid", "apache-tvm", "numpy", "ml_dtypes")
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    return found | {"machine": target.describe(), "lanes": str(target.lanes())}


def texts(call: Call, kernel: KernelSource | None, tir: str | None = None) -> dict[str, str]:
    """The members of a call's bundle that are for people, or for --trust; `tir` where the TVMScript is known."""
    found = {}
    if call.op._kernel is not None:
        found["kernel.tir"] = tir or str(ops.build.tir(call.op.plan(call.args, call.constants).request()))
    if kernel is not None and kernel.text is not None:
        found["kernel.py"] = kernel.text
    names = "".join(f"{name}, " for name in call.op.parameters[: len(call.args)])
    return found | {"replay.py": _SCRIPT.format(names=names.rstrip(" "), op=call.op.name)}


def described_kernel(call: Call) -> tuple[dict[str, Any], KernelSource | None]:
    """What the manifest says of the kernel that computes a call, and its source where it is not the op's own."""
    use = call.op.used_for(call)
    if use is None:
        return {"name": "tvm", "origin": "own"}, None
    source = kernel_source(use.kernel)
    plain = {"name": use.kernel.name, "origin": use.kernel.origin, "function": source.function, "note": source.note}
    return plain, source


def write(
    path: Path, call: Call, source: str, kernel: tuple[dict[str, Any], KernelSource | None],
    results: dict[str, Tensor], error: str | None = None,
) -> None:  # fmt: skip
    """Write the bundle of a call, atomically; without results when it did not return."""
    outcome = {"hash": hashed(results.values())} if results else {"error": error} if error else {}
    members: dict[str, list[Any]] = {
        "manifest.json": [json.dumps(manifest(call, source, kernel[0], outcome), indent=1).encode()]
    }
    members |= {name: [text.encode()] for name, text in texts(call, kernel[1]).items()}
    inputs = {name: value for name, value in call.inputs.items() if isinstance(value, Tensor)}
    for folder, tensors in (("inputs", inputs), ("results", results)):
        for name, tensor in tensors.items():
            members[archive.member(folder, name)] = [archive.head(name, tensor.spec), to_bytes(tensor)]
    archive.write(path, members)


class _Reader:
    """The members of an archive as a bundle."""

    def __init__(self, path: Path, members: dict[str, bytes]):
        self.path, self.members = path, members
        if "manifest.json" not in members:
            raise OpError(f"{path} holds no manifest.json")
        self.found = json.loads(members["manifest.json"])
        if not isinstance(self.found, dict) or self.found.get("format") != _FORMAT:
            given = self.found.get("format") if isinstance(self.found, dict) else type(self.found).__name__
            raise OpError(f"{path} is a bundle of format {given!r}, expected {_FORMAT}")

    def bundle(self) -> Bundle:
        found, call = self.found, self.call()
        texts = {name: data.decode() for name, data in self.members.items() if not name.endswith(".safetensors")}
        kernel = {name: found["kernel"].get(name) for name in ("name", "origin", "function", "note")}
        versions = {str(name): str(each) for name, each in found["versions"].items()}
        outcome = found["outcome"]
        hash, error = outcome.get("hash"), outcome.get("error")
        results = {} if hash is None else self.results(call, hash)
        return Bundle(self.path, call, results, hash, error, kernel, versions, str(found["source"]), texts)

    def call(self) -> Call:
        """The call, checked by the op's rule."""
        found, path = self.found, self.path
        op = registry.get(found["op"])
        if op is None:
            raise OpError(f"{path} is of the op {found['op']!r}, which this process does not have")
        arguments = {each["name"]: each for each in found["arguments"]}
        if tuple(arguments) != op.parameters[: len(arguments)]:
            raise OpError(f"{path}: the arguments are {[*arguments]}; {op.name} takes {[*op.parameters]}")
        args = [
            self.tensor("inputs", name, _spec(each)) if "shape" in each else each["value"]
            for name, each in arguments.items()
        ]
        constants = {name: _constant(each) for name, each in found["constants"].items()}
        args, constants = op._bound(tuple(args), constants)
        call = Call(op, args, constants, Scope(str(found["path"]), int(found["pass"])), int(found["ordinal"]))
        outputs = tuple(_spec(each) for each in found["outputs"])
        if (given := _declared(call)) != outputs:
            raise OpError(f"{path}: {call!r} gives {', '.join(map(str, given))}, not {', '.join(map(str, outputs))}")
        if (size := sum(spec.nbytes for spec in outputs)) > _LARGEST:
            raise OpError(f"{path}: the call would give {size} bytes, at most {_LARGEST} are computed")
        return call

    def results(self, call: Call, hash: str) -> dict[str, Tensor]:
        """What the call gave, of this hash."""
        specs = {f"output {i}" if i else "output": spec for i, spec in enumerate(call.outputs)}
        specs |= {name: each.spec for name, each in call.written.items()}
        results = {name: self.tensor("results", name, spec) for name, spec in specs.items()}
        if hashed(results.values()) != hash:
            raise OpError(f"{self.path} is damaged: its results do not have the hash that it gives")
        return results

    def tensor(self, folder: str, name: str, spec: Spec) -> Tensor:
        key, lanes = archive.member(folder, name), self.found["versions"]["lanes"]
        if key not in self.members:
            raise OpError(f"{self.path} holds no {key}")
        if spec.format is not None and lanes != str(target.lanes()):
            here = target.lanes()
            raise OpError(f"{self.path}: {name} was packed for vectors of {lanes} lanes, this machine's have {here}")
        return from_bytes(archive.tensor_bytes(self.path, key, self.members[key], spec), spec)


def _declared(call: Call) -> tuple[Spec, ...]:
    """The outputs by the op's rule. Raises OpError for constants that it cannot make sense of."""
    try:
        return call.outputs
    except OpError:
        raise
    except Exception as error:  # whatever a rule does with a constant of a kind that it does not expect
        raise OpError(f"{call.op.name} takes no {call.constants}: {type(error).__name__}: {error}") from error


def _constant(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_constant(each) for each in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise OpError(f"a constant is a number, a string or a list, not {type(value).__name__}")


def _plain(spec: Spec) -> dict[str, Any]:
    return {"shape": list(spec.shape), "dtype": spec.dtype} | ({"device": spec.device} if spec.device != "cpu" else {})


def _spec(plain: dict[str, Any]) -> Spec:
    """The spec, on its device where this machine has that."""
    return ops.device.here(Spec(tuple(plain["shape"]), plain["dtype"], plain.get("device", "cpu")))
