"""repro: a call as a file that runs anywhere, and crash capture, which leaves one when a kernel kills the process.

Before a call that is suspected, for the rest of the process:

    debug.repro(t["layers.3.self_attn/attention[0]"], "bug.zip")
    debug.repro.arm()
"""

from __future__ import annotations

import threading
from pathlib import Path

from ops import Call, OpError
from ops.difference import results

from . import bundle
from .capture import Capture
from .recall import kept_results, launched, recalled
from .record import Record


class Repro:
    """`repro(call, path)` writes a bundle; `arm` and `disarm` switch crash capture on and off for the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: Capture | None = None

    def __call__(self, call: Record | Call, path: str | Path) -> Path:
        """Write all of one call into a zip file, for `limpid replay`. Gives the path.

        `call`: a record kept with `keep=True`, or a Call, which is then launched on copies of what it writes; the file
        is written before that, should the launch not return. Raises OpError when the inputs were not kept.
        """
        path = Path(path)
        if isinstance(call, Record):
            made = recalled(call)
            given = {} if call.seconds is None else kept_results(call, made)
            bundle.write(path, made, call.source, _kernel_of(call, made), given)
            return path
        source, kernel = call.source, bundle.described_kernel(call)
        bundle.write(path, call, source, kernel, {})
        try:
            fresh, output = launched(call)
        except Exception as error:
            bundle.write(path, call, source, kernel, {}, f"{type(error).__name__}: {error}")
            return path
        bundle.write(path, call, source, kernel, results(fresh, output))
        return path

    def arm(self, folder: str | Path = "crashes", limit: int = 2**30) -> Capture:
        """Switch crash capture on: a call that kills the process leaves `crash-PID-N.zip` in `folder`.

        What a call is given is written before each launch, to a file that is mapped into memory, and is void when the
        launch returns. Weights are written once, up to `limit` bytes of them, when a second pass reads them: a change
        made to one in place after that, other than by an op, is not seen. Gives a handle: a context manager that
        disarms. Raises OpError when it is armed already.
        """
        with self._lock:
            if self._armed is not None and self._armed.on:
                raise OpError(f"crash capture is armed already, into {self._armed.folder}; disarm it first")
            self._armed = Capture(Path(folder), limit)
            return self._armed

    def disarm(self) -> None:
        """Switch it off, and remove the files in which no call is. Harmless when it is not on."""
        with self._lock:
            armed, self._armed = self._armed, None
        if armed is not None:
            armed.remove()


def _kernel_of(record: Record, call: Call) -> tuple[dict, bundle.KernelSource | None]:
    """The kernel that computed a record, as far as it is still in use."""
    kernel, source = bundle.described_kernel(call)
    if kernel["name"] == record.kernel:
        return kernel, source
    note = f"{record.kernel} is in use no more, its source is not known"
    return {"name": record.kernel, "origin": "own" if record.kernel == "tvm" else "other", "note": note}, None


repro = Repro()
