"""replay: the call of a bundle once more, in a process of its own, and whether it gives what it gave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops import OpError
from ops.difference import results

from .bundle import Bundle, hashed, versions
from .recall import launched

_ROOT = Path(__file__).resolve().parent.parent
_CHILD = "import sys; from debug.verdict import answer; answer(*sys.argv[1:])"


@dataclass(frozen=True)
class Verdict:
    """`same` when the call did what the bundle says it did: gave the same hash, raised the same error, or crashed.

    `lines` say so, and what is different. `crash` is the signal or exit code that ended the process, None if it lived.
    """

    same: bool
    lines: tuple[str, ...]
    crash: str | None = None

    @property
    def code(self) -> int:
        """The exit code: 0 when it is the same, 1 when it is not."""
        return 0 if self.same else 1

    def __str__(self) -> str:
        return "\n".join(self.lines)


def replay(path: str | Path, trust: bool = False) -> Verdict:
    """Launch a bundle's call in a fresh process, by the runtime's own kernel, or with `trust` by the bundle's.

    Only with `trust` does source run that came with the bundle. Raises OpError for a file that cannot be used.
    """
    bundle = Bundle.read(path)
    found, crash = _in_a_process(bundle.path, trust)
    lines = [repr(bundle.call), f"made at {bundle.source}, by the kernel {bundle.kernel['name']}"]
    lines += _about_the_kernel(bundle, trust)
    here = versions()
    lines += [
        f"{name} was {old}, here {here.get(name)}" for name, old in bundle.versions.items() if here.get(name) != old
    ]
    same, outcome = _compared(bundle, found, crash)
    return Verdict(same, tuple(map(_printable, (*lines, *outcome))), crash)


def _printable(line: str) -> str:
    """What a file says, without what would steer a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def _about_the_kernel(bundle: Bundle, trust: bool) -> list[str]:
    kernel = bundle.kernel
    if kernel["origin"] == "own":
        return []
    if "kernel.py" not in bundle.texts:
        return [f"the bundle's kernel was not run: {kernel['note']}; the runtime's own kernel of the op ran"]
    if not trust:
        return [
            "the bundle's kernel was not run, the runtime's own kernel of the op ran; --trust runs what came with it"
        ]
    return [f"the bundle's kernel ran{f'; {note}' if (note := kernel['note']) else ''}"]


def _compared(bundle: Bundle, found: dict[str, Any], crash: str | None) -> tuple[bool, list[str]]:
    """Whether the outcome is the bundle's, and what it is."""
    expected = f"hash {bundle.hash}" if bundle.hash else bundle.error or "the call did not return"
    returned = bundle.hash is not None or bundle.error is not None
    if crash is not None:
        return not returned, [f"{'different' if returned else 'the same'}: it crashed, {crash}; recorded: {expected}"]
    if "error" in found:
        same = found["error"] == bundle.error
        return same, [f"{'the same' if same else 'different'}: it raised {found['error']}; recorded: {expected}"]
    if found["hash"] == bundle.hash:
        return True, [f"the same: hash {bundle.hash}"]
    return False, [f"different: hash {found['hash']}; recorded: {expected}", *found["differences"]]


def _in_a_process(path: Path, trust: bool) -> tuple[dict[str, Any], str | None]:
    """What the child answered; and what ended it, when it did not live to do so."""
    with tempfile.TemporaryDirectory(prefix="limpid-replay-") as folder:
        file = Path(folder, "answer.json")
        # The packages are those that run here: others of these names may lie in the working folder.
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-P", "-c", _CHILD, str(path), str(file), "trust" if trust else ""]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)
        found = json.loads(file.read_text()) if file.exists() else None
    if found is None:
        raise OpError(f"{path}: the process that replays did not start (exit code {done.returncode})")
    if found:
        return found, None
    code = done.returncode
    return {}, signal.Signals(-code).name if code < 0 else f"exit code {code} without returning"


def answer(path: str, file: str, trust: str) -> None:
    """In the child: launch the call, and write what came of it to `file`; `{}` until then."""
    bundle = Bundle.read(path)
    Path(file).write_text("{}")
    try:
        if trust and "kernel.py" in bundle.texts:
            bundle.call.op.use(_function(bundle))
        call, output = launched(bundle.call)
        found: dict[str, Any] = {"hash": hashed(results(call, output).values())}
        found["differences"] = [f"{name}: {each}" for name, each in bundle.differences(call, output).items()]
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(file).write_text(json.dumps(found))


def _function(bundle: Bundle) -> Any:
    """The kernel that came with a bundle, by running its source."""
    namespace: dict[str, Any] = {"__name__": "kernel"}
    exec(compile(bundle.texts["kernel.py"], f"{bundle.path}/kernel.py", "exec"), namespace)
    return namespace[bundle.kernel["function"]]
