"""Debugging tools over the one seam: no model file, op or kernel knows of them. Imports ops only.

    with debug.trace("layers.0.*", keep=True) as t: ...         what was computed, call by call
    debug.stop("layers.3", when=debug.nonfinite)                the debugger, at the model's line; it can go back
    with debug.check() as c: ...                                every call beside its NumPy reference
    with debug.nan_hunt() as h: ...                             where the first NaN was born, and of what
    with debug.patch("layers.3.mlp", output=debug.ablate()): ...
    debug.compare(model, other, ids), debug.doctor(model, reference), debug.bisect(run, changes)
    debug.invariance(model, ids), debug.why(t[...], index=(5, 17)), debug.profile(), debug.repro(t[...], "bug.zip")
    with debug.race("/rms_norm") as r: ...                      all kernels of an op on the model's own inputs

In IPython, `%load_ext debug` gives the same as magics.
"""

from typing import Any

from .activation import Effects, activation_patching, run_with_cache
from .births import NanHunt, nan_hunt
from .bisection import BisectError, Bisection, bisect
from .comparison import Comparison, Run, compare
from .conditions import above, diverges, nonfinite
from .cuts import Invariance, invariance
from .diagnosis import doctor
from .explain import Explanation, why
from .findings import Diagnosis, Finding
from .patches import ablate, noise, patch, scale
from .profiler import Profile, profile
from .races import Races, race
from .record import Record
from .reproduce import repro
from .shadow import Check, CheckError, check
from .show_code import show
from .stop import Stop, clear, stop, stops
from .trace import Recording, Trace, trace

__all__ = [
    "BisectError",
    "Bisection",
    "Check",
    "CheckError",
    "Comparison",
    "Diagnosis",
    "Effects",
    "Explanation",
    "Finding",
    "Invariance",
    "NanHunt",
    "Profile",
    "Races",
    "Record",
    "Recording",
    "Run",
    "Stop",
    "Trace",
    "ablate",
    "above",
    "activation_patching",
    "bisect",
    "check",
    "clear",
    "compare",
    "diverges",
    "doctor",
    "invariance",
    "load_ipython_extension",
    "nan_hunt",
    "noise",
    "nonfinite",
    "patch",
    "profile",
    "race",
    "repro",
    "run_with_cache",
    "scale",
    "show",
    "stop",
    "stops",
    "trace",
    "why",
]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext debug`: the magics. IPython is imported only here."""
    from .magics import load_ipython_extension as load

    load(shell)
