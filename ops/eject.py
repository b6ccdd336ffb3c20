"""Eject: the kernel that TVM generates for an op, as a file with the swap's decorator around it, ready to be edited.

    ops.rms_norm.eject("c", x, weight, eps=1e-6, path="my_norm.py")

The file swaps in unchanged. Its kernel is made for calls like the one it was ejected for: sizes that the op leaves open
stay open, all others, dtypes and constants are in the text, and in its `where=`.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import build
from .errors import OpError
from .languages.base import Language, Options, Parameter
from .languages.binding import held, output_names
from .op import Op
from .source import source
from .spec import Dim, Spec

_HEAD = '''"""{op}, as TVM generates it in {language} for {arguments}.

Import this file, or paste it into a notebook, and it replaces the op's kernel for such calls; edit it and it is
reloaded, when it is right.
"""

{imports}

@ops.{op}.swap(
    {options},
)
'''


def eject(op: Op, language: str, args: tuple, constants: dict[str, Any], path: str | Path | None) -> build.Text:
    """See `Op.eject`."""
    if language not in _WRITERS:
        raise OpError(f"{op.name} ejects to {', '.join(map(repr, _WRITERS))}, not to {language!r}")
    text = build.Text(_WRITERS[language](op, op._request(args, constants)), "python")
    if path is not None:
        _write(Path(path), text)
    return text


def _write(path: Path, text: str) -> None:
    """Write the whole file or nothing; what is there already stays."""
    if path.exists():
        raise OpError(f"{path} exists, and may hold what you have edited; name another file")
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".limpid-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _head(request: build.Request, language: str, imports: str, options: list[str]) -> str:
    """The file down to the function: what it is for, and the decorator."""
    where = "\n        and ".join(_conditions(request))
    options = [f'"{language}"', *[f"where=lambda call: (\n        {where}\n    )"] * bool(where), *options]
    arguments = request.arguments or "any call"
    return _HEAD.format(
        op=request.op.name, language=language, arguments=arguments, imports=imports, options=",\n    ".join(options)
    )  # fmt: skip


def _conditions(request: build.Request) -> list[str]:
    """What a call must be for the kernel to be made for it, as Python."""
    found = []
    for i, name in enumerate(request.op.parameters):
        given, spec = f'call.inputs["{name}"]', request.specs[i] if i < len(request.specs) else None
        if request.op._kinds[i][1]:
            found.append(f'call.inputs.get("{name}") is {"not " * (spec is not None)}None')
        if isinstance(spec, Spec):
            found.append(f'{given}.dtype == "{spec.dtype}"')
            open_sizes = [i for i, size in enumerate(spec.shape) if isinstance(size, Dim)]
            if open_sizes in ([], [0]):
                start = len(open_sizes)
                if spec.shape[start:] or not start:
                    found.append(f"{given}.shape{'[1:]' if start else ''} == {spec.shape[start:]!r}")
            else:
                fixed = [(i, size) for i, size in enumerate(spec.shape) if not isinstance(size, Dim)]
                found += [f"{given}.shape[{i}] == {size}" for i, size in fixed]
    if request.constants:
        found.append(f"call.constants == {request.constants!r}")
    return found


def _tvmscript(op: Op, request: build.Request) -> str:
    function = request.rule_scheduled().with_attr("global_symbol", f"{op.name}_tvmscript")
    lines = function.script().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("@T.prim_func"))
    sizes = [line for line in lines[:start] if "TypeVar(" in line]
    imports = ["from __future__ import annotations", "", "from typing import TypeVar"] if sizes else [
        "from __future__ import annotations", ""
    ]  # fmt: skip
    imports += ["", "from tvm.script import tirx as T", "", "import ops", "", *sizes]
    head = _head(request, "tvmscript", "\n".join(imports).strip("\n") + "\n", [])
    return head + "\n".join(lines[start:]) + "\n"


def _c(op: Op, request: build.Request) -> str:
    from .languages.c import C

    name = f"{op.name}_c"
    body = _c_body(str(source(request, "c")))
    parameters, dims, views = _signature(op, request, C(Options()))
    for tvms, _, _ in views:  # TVM's arrays are of other types than the op's, or named otherwise
        body = re.sub(rf"\b{tvms}\b", f"{tvms}_", body)
    lines = [f"  {stored}* {tvms}_ = ({stored}*){ours};" for tvms, stored, ours in views]
    text = "\n".join([f"void {name}({', '.join(map(str, parameters))}) {{", *lines, body, "}"])
    sizes = ", ".join(f'"{size}": {given}' for size, given in dims.items())
    head = _head(request, "c", "import ops\n", [f"dims={{{sizes}}}"] * bool(dims))
    return f"{head}def {name}():\n    r'''\n{text}\n'''\n"


View = tuple[str, str, str]  # TVM's name of an array, the type that it has there, the op's name


def _signature(
    op: Op, request: build.Request, language: Language
) -> tuple[list[Parameter], dict[str, str], list[View]]:
    """Parameters with the op's names, what gives the sizes that stay open, and TVM's views of the arrays."""
    specs = [*request.specs, *op._outputs(request.specs, request.constants)]
    named = [(n, s) for n, s in zip([*op.parameters[: len(request.specs)], *output_names(op)], specs, strict=True) if s]
    parameters: list[Parameter] = []
    dims: dict[str, str] = {}
    views: list[View] = []
    for (name, spec), given in zip(named, request.blocks().params, strict=True):
        if not isinstance(spec, Spec):
            dtype = "float32" if spec is float else "int64"
            parameters.append(Parameter(name, language.spelling(dtype), dtype, False, False))
            continue
        const = name in op.parameters and name not in op.writes
        made = Parameter(name, language.spelling(held(spec)), held(spec), True, const)
        parameters.append(made)
        stored = "uint16_t" if spec.dtype == "bfloat16" else made.type
        if given.name != name or stored != made.type:
            views.append((given.name, stored, name))
        for axis, size in enumerate(given.shape if name in op.parameters else ()):
            if isinstance(size, build.tirx.Var) and size.name not in dims:
                before = [*op.parameters[: op.parameters.index(name) + 1], "*_"]
                dims[size.name] = f"lambda {', '.join(before)}: {name}.shape[{axis}]"
    parameters += [Parameter(size, "int64_t", "int64", False, False) for size in dims]
    return parameters, dims, views


def _c_body(text: str) -> str:
    """The statements of TVM's function in C without the unpacking and checking of its arguments."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if "_handle)" in line)
    if lines[last].lstrip().startswith("if "):
        last += next(i for i, line in enumerate(lines[last:]) if line == "  }")
    end = next(i for i in range(last, len(lines)) if lines[i] == "  return 0;")
    body = "\n".join(lines[last + 1 : end])
    body = re.sub(r"TVMBackendAllocWorkspace\(\d+, dev_id, (.*), \d+, \d+\)", r"malloc(\1)", body)
    body = re.sub(
        r"if \(TVMBackendFreeWorkspace\(\d+, dev_id, (\w+)\) != 0\) \{\n\s*return -1;\n\s*\}", r"free(\1);", body
    )
    body = re.sub(r"TVMFFIErrorSetRaisedFromCStrParts\(.*?, (\w+), \d+\);", r"strcpy(limpid_error, \1[0]);", body)
    body = re.sub(r"\binff?\b", "INFINITY", re.sub(r"\bnanf?\b", "NAN", body))
    return body.replace("return -1;", "return;")


def _gpu(op: Op, request: build.Request, language: str) -> str:
    from .eject_gpu import kernel

    name = f"{op.name}_{language}"
    text, options, dims = kernel(request, language, name)
    sizes = ", ".join(f'"{size}": {given}' for size, given in dims.items())
    head = _head(request, language, "import ops\n", [*options, *[f"dims={{{sizes}}}"] * bool(dims)])
    return f"{head}def {name}():\n    r'''\n{text.strip()}\n'''\n"


_WRITERS: dict[str, Callable[[Op, build.Request], str]] = {
    "c": _c,
    "tvmscript": _tvmscript,
    **{language: functools.partial(_gpu, language=language) for language in ("cuda", "metal", "wgsl", "opencl")},
}
