"""What `limpid info` and `limpid cache` show."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ops import store, target
from ops.quantize import FORMATS

from .load import build, config_values
from .tree import size


def show(model: Any, name: str) -> None:
    """The model's tree, then a table of what it is and needs."""
    console = Console(highlight=False, markup=False)
    console.print(repr(model), soft_wrap=True)
    values = model.token_values
    parameters = sum(weight.size for _, weight in model.parameters())
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in (
        ("model", f"{name} ({model.model_type})"),
        ("parameters", f"{parameters:,}"),
        ("weights", f"{size(model.nbytes)} as {_dtypes(model)}"),
        *((f"  as {each}", size(nbytes_as(model, each))) for each in ("float32", "bfloat16", "q8", "q4")),
        ("cache", f"{size(4 * values)} a token as float32, {size(2 * values)} as float16 or bfloat16"),
        ("context", f"{model.context} tokens"),
        ("vocabulary", _vocabulary(model)),
        ("chat template", "yes" if model.tokenizer and model.tokenizer.chat_template else "no"),
        ("runs on", f"{target.host().attrs['mcpu']}, {target.threads()} threads"),
        ("peak memory", size(peak_memory())),
    ):
        table.add_row(label, value)
    console.print(table)


def nbytes_as(model: Any, dtype: str) -> int:
    """What the weights take in a float dtype, or as `llm.load(..., weights=dtype)` holds them in a packed format."""
    packed = dtype in FORMATS
    return build(config_values(model), "float32" if packed else dtype, dtype if packed else None).nbytes


def _dtypes(model: Any) -> str:
    """What the weights are held as, that of most bytes first."""
    sizes = Counter[str]()
    for _, weight in model.parameters():
        sizes[weight.dtype] += weight.nbytes
    return " and ".join(dtype for dtype, _ in sizes.most_common())


def _vocabulary(model: Any) -> str:
    if model.tokenizer is None:
        return f"{model.config.vocab_size}, no tokenizer"
    return f"{model.config.vocab_size}, tokenizer of {model.tokenizer.vocab_size}"


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    try:  # getrusage would begin with what the parent process had
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def show_cache() -> None:
    """The compiled kernels and packed weights on disk, the latest used last, and how much room they take."""
    if store.kernels.directory() is None:
        print("the disk cache is off (LIMPID_CACHE=off)")
        return
    for each in (store.kernels, store.weights):
        entries = each.entries()
        for entry in reversed(entries):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            print(f"{when}  {size(entry.bytes):>7}  {entry.what}")
        total = sum(entry.bytes for entry in entries)
        print(f"{counted(len(entries), each)}, {size(total)} of at most {size(each.limit())}, in {each.directory()}")


def counted(count: int, kept: store.Store) -> str:
    """`1 kernel`, `2 kernels`, `1 file of weights`."""
    noun = "kernel" if kept is store.kernels else "file"
    return f"{count} {noun}{'' if count == 1 else 's'}{'' if kept is store.kernels else ' of packed weights'}"
