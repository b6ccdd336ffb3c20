"""A recording on disk, `records.json` and `tensors.safetensors`; and how one prints."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import ops
from ops import Spec, target
from ops.display import Statistics

from .record import Held, Record, from_bytes, to_bytes

_FORMAT = 1


def save(records: Sequence[Record], folder: Path) -> Path:
    """Write the records and what they keep into `folder`, which must not be there yet; a tensor kept twice, once."""
    if folder.exists():
        raise ops.OpError(f"{folder} is there already: give a new folder")
    names: dict[int, str] = {}
    tensors: dict[str, tuple[np.ndarray, Spec]] = {}
    for record in records:
        for name, held in record.held.items():
            if id(held) not in names:
                key = names[id(held)] = f"{record.full_address} {name}"
                tensors[key] = to_bytes(held.tensor), held.spec
    listed = [_entry(each, names) for each in records]
    specs = {key: _plain(spec) for key, (_, spec) in tensors.items()}
    text = json.dumps({"format": _FORMAT, "lanes": target.lanes(), "tensors": specs, "records": listed}, indent=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (work / "records.json").write_text(text)
        safetensors.serialize_file(
            {key: _described(*each) for key, each in tensors.items()}, work / "tensors.safetensors", None
        )
        os.rename(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def load(folder: Path) -> list[Record]:
    """The records of a folder. Raises OpError when the files are missing, damaged or of another machine's packing."""
    try:
        found = json.loads((folder / "records.json").read_text())
        if found["format"] != _FORMAT:
            raise ops.OpError(f"{folder} is a recording of format {found['format']}, expected {_FORMAT}")
        raw = dict(safetensors.deserialize((folder / "tensors.safetensors").read_bytes()))
        held = {}
        for key, spec in found["tensors"].items():
            spec = _spec(spec)
            if spec.format is not None and found["lanes"] != target.lanes():
                raise ops.OpError(f"{folder} holds packed weights of a machine with {found['lanes']} lanes")
            held[key] = Held(from_bytes(np.frombuffer(bytearray(raw[key]["data"]), "uint8"), spec))
        return [_record(each, held) for each in found["records"]]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, ops.OpError):
            raise
        raise ops.OpError(f"{folder} is no recording that can be read: {type(error).__name__}: {error}") from error


def _described(data: np.ndarray, spec: Spec) -> safetensors.TensorSpec:
    """A tensor as the library takes it; of a packed weight the bytes."""
    dtype, shape = ("uint8", data.shape) if spec.format else (spec.dtype, spec.shape)
    return safetensors.TensorSpec(dtype=dtype, shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes)


def _entry(record: Record, names: dict[int, str]) -> dict[str, Any]:
    plain = {name: getattr(record, name) for name in ("path", "op_name", "ordinal", "number", "kernel", "seconds")}
    return plain | {
        "source": record.source,
        "inputs": {name: _plain(value) for name, value in record.inputs.items()},
        "constants": record.constants,
        "outputs": [_plain(each) for each in record.outputs],
        "statistics": [each and vars(each) for each in record.statistics],
        "held": {name: names[id(held)] for name, held in record.held.items()},
    }


def _record(entry: dict[str, Any], held: dict[str, Held]) -> Record:
    record = Record.__new__(Record)
    for name in ("path", "op_name", "ordinal", "number", "kernel", "seconds", "source"):
        setattr(record, name, entry[name])
    record.inputs = {
        name: _spec(value) if isinstance(value, dict) else value for name, value in entry["inputs"].items()
    }
    record.constants = entry["constants"]
    record.outputs = tuple(_spec(each) for each in entry["outputs"])
    record.moments = [each and Statistics(**each) for each in entry["statistics"]]
    record.held = {name: held[key] for name, key in entry["held"].items()}
    return record


def _plain(value: Any) -> Any:
    return {"shape": value.shape, "dtype": value.dtype, "device": value.device} if isinstance(value, Spec) else value


def _spec(plain: dict[str, Any]) -> Spec:
    return ops.device.here(Spec(tuple(plain["shape"]), plain["dtype"], plain["device"]))


def table(rows: Sequence[dict[str, str]], most: int, width: int = 160) -> str:
    """Rows as a text table, the first and the last of them when there are more than `most`."""
    from rich.table import Table

    from ops.plain import plain

    if not rows:
        return "no calls"
    made = Table(box=None, pad_edge=False)
    for name in rows[0]:
        made.add_column(name, justify="right" if name == "us" else "left", overflow="fold")
    shown = [*rows] if len(rows) <= most else [*rows[: most // 2], dict.fromkeys(rows[0], "..."), *rows[-most // 2 :]]
    for row in shown:
        made.add_row(*row.values())
    return f"{plain(made, width)}\n{len(rows)} calls"
