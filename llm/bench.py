"""`limpid bench`: what calls, kernels and models cost on this machine, beside what the machine can do.

Medians over interleaved repetitions, so that a machine whose speed drifts is drifting for all sides alike.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import build, ceilings, quantize
from ops.interleave import interleaved
from ops.quantize import FORMATS
from ops.spec import DTYPES, FLOATS

from .errors import UserError
from .generate import prepare
from .info import peak_memory
from .load import build as build_model
from .load import check_device, load, randomize

_LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0},
    "llama-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    "3b": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
}
_COLD = 512 * 2**20  # bytes of weights to rotate through, at the least
_PREFILL = 512


def run(
    what: str, shape: str, dtype: str, weights: str | None, device: str, as_json: bool, tools: Callable[[], Any]
) -> None:
    """Measure `what` and print it: JSON, or a table. Raises UserError for a name that is not known.

    `tools()` gives what the bench "debug" measures: by name what makes a debugging tool.
    """
    benches: dict[str, Callable[[Case], dict[str, Any]]] = {
        "dispatch": dispatch,
        "ops": per_op,
        "gemv": gemv,
        "decode": decode,
        "prefill": prefill,
        "debug": lambda case: _debug(case, tools()),
        "swap": lambda case: _swap(),
    }
    if what not in benches:
        raise UserError(f"bench {what}: expected {', '.join(benches)}")
    if shape != "tiny" and shape not in SHAPES:
        raise UserError(f"shape {shape!r} is not known; choose tiny, {', '.join(SHAPES)}")
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not supported; choose one of {', '.join(FLOATS)}")
    if weights not in (None, *FLOATS, *FORMATS):
        raise UserError(f"weights {weights!r} are not supported; choose one of {', '.join((*FORMATS, *FLOATS))}")
    if device != "cpu":
        check_device(device)
        if what not in ("decode", "prefill"):
            raise UserError(f"bench {what} measures the CPU; on a device there are decode and prefill")
    case = Case(shape, dtype, weights or dtype, device)
    result = {"bench": what} | case._asdict() | {"threads": ops.target.threads()} | benches[what](case)
    result.setdefault("peak_memory_bytes", peak_memory())
    if as_json:
        json.dump(result, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _table(result)


class Case(NamedTuple):
    """What is measured: a model's shape by name, the dtype of activations, how matrices are held, and where."""

    shape: str
    dtype: str
    weights: str
    device: str = "cpu"

    def model(self, filled: bool = True) -> Any:
        """The model: random weights, or specs where it need not be `filled`; the embedded one is what it is."""
        if self.shape == "tiny":
            return load("tiny", dtype=self.dtype, weights=self.weights, device=self.device)
        model = build_model(SHAPES[self.shape], self.dtype, self.weights).to(self.device)
        return randomize(model) if filled else model


def dispatch(case: Case) -> dict[str, Any]:
    """What one op call costs above a bare call of the same compiled function; allocation of the output included."""
    width = case.model(filled=False).config.hidden_size
    x, weight = _normal((1, width), case.dtype), _normal((width,), case.dtype)
    out = ops.rms_norm(x, weight, eps=1e-5)
    function = build.function(ops.rms_norm.plan((x, weight), {"eps": 1e-5, "plus_one": False}).request())
    data = (x.buffer.data, weight.buffer.data, out.buffer.data)
    sides = {"bare": lambda: function(*data), "call": lambda: ops.rms_norm(x, weight, eps=1e-5)}
    median = interleaved(sides, batch=200)
    bare, call = median["bare"] * 1e6, median["call"] * 1e6
    return {"op": f"rms_norm {x.spec}", "bare_us": bare, "call_us": call, "overhead_us": call - bare}


def _debug(case: Case, tools: Any) -> dict[str, Any]:
    from .bench_debug import measure

    return measure(case, tools)


def _swap() -> dict[str, Any]:
    from .bench_swap import measure

    return measure()


def gemv(case: Case) -> dict[str, Any]:
    """Decode's matrix-vector products with weights that come from memory, beside a plain read of such weights."""
    rows = []
    for outputs, inputs in _linear_shapes(case):
        spec = ops.Spec((outputs, inputs), case.weights)
        cold = max(_COLD, 5 * ops.target.machine().l3)  # of four times its size a cache still keeps some
        data, weights = _copies(spec, max(4, -(-cold // spec.nbytes)))
        x, read = _normal((1, inputs), case.dtype), ceilings.reader(spec.nbytes)
        turn, other = _cycle(weights), _cycle(data[len(data) // 2 :] + data[: len(data) // 2])
        sides = {
            "gemv": lambda x=x, turn=turn: ops.linear(x, next(turn)),
            "read": lambda read=read, other=other: read(next(other)),
        }
        seconds = interleaved(sides, 1.5)
        rows.append({
            "shape": [outputs, inputs],
            "bytes": spec.nbytes,
            "us": seconds["gemv"] * 1e6,
            "gb_per_s": spec.nbytes / seconds["gemv"] / 1e9,
            "read_gb_per_s": spec.nbytes / seconds["read"] / 1e9,
            "share_of_bandwidth": seconds["read"] / seconds["gemv"],
        })  # fmt: skip
        del data, weights, turn, other, sides
    return {"rows": rows}


def _copies(spec: ops.Spec, count: int) -> tuple[list[np.ndarray], list[ops.Tensor]]:
    """The bytes of `count` weights, apart in memory, and the weights."""
    room = -(-spec.nbytes // 64) * 64
    memory = ops.memory.huge(count * room)
    data = [memory[i * room : i * room + spec.nbytes] for i in range(count)]
    if spec.format is None:
        first = _normal(spec.shape, spec.dtype).numpy().reshape(-1).view("uint8")
    else:
        first = quantize.pack(_normal(spec.shape, "float32").numpy(), spec.format)
    for each in data:
        each[...] = first
    if spec.format is not None:
        return data, [ops.tensor_from_packed(each, spec) for each in data]
    return data, [ops.tensor(each.view(DTYPES[spec.dtype]).reshape(spec.shape)) for each in data]


def decode(case: Case) -> dict[str, Any]:
    """Tokens a second, one at a time, after short and long contexts."""
    model = case.model()
    caches = {context: model.new_cache() for context in (16, 1024) if context + 80 <= model.context}
    for context, cache in caches.items():
        prepare(model, context)
        model([1] * context, cache, logits_to_keep=1)
    rows = [
        {"context": context, "tokens_per_s": 1 / statistics.median(times), "steps": len(times)}
        for context, times in _steps(model, caches, most=64, seconds=8.0 * len(caches)).items()
    ]
    compiles, peak = len(build.log), peak_memory()  # before the ceilings take memory of their own
    bandwidth = ceilings.read_bandwidth() if case.device == "cpu" else ceilings.copy_bandwidth(case.device)
    read = rows[0]["tokens_per_s"] * model.nbytes
    return {
        "tokens_per_s": rows[0]["tokens_per_s"],
        "gb_per_s": read / 1e9,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "share_of_bandwidth": read / bandwidth,
        "rows": rows,
        "weight_bytes": model.nbytes,
        "compiles": compiles,
        "peak_memory_bytes": peak,
    }


def _steps(model: Any, caches: dict[int, Any], most: int, seconds: float) -> dict[int, list[float]]:
    """Seconds of the steps after each context; the caches take turns. The first three steps do not count."""
    times: dict[int, list[float]] = {context: [] for context in caches}
    until = time.perf_counter() + seconds
    for step in range(3 + most):
        if step >= 8 and time.perf_counter() > until:
            break
        for context, cache in caches.items():
            started = time.perf_counter()
            model([1], cache, logits_to_keep=1)
            ops.device.wait(model.device)
            times[context].append(time.perf_counter() - started)
    return {context: each[3:] for context, each in times.items()}


def prefill(case: Case) -> dict[str, Any]:
    """Tokens a second while a prompt is read, against the FMA peak."""
    model = case.model()
    tokens = min(_PREFILL, model.context)
    prepare(model, tokens)
    read = lambda: model([1] * tokens, model.new_cache(), logits_to_keep=1).numpy()  # noqa: E731 - to the end
    seconds = interleaved({"prefill": read}, 4.0)["prefill"]
    compiles, peak = len(build.log), peak_memory()
    flops = 2 * tokens * sum(w.size for name, w in model.parameters() if w.ndim == 2 and "embed" not in name)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "gflop_per_s": flops / seconds / 1e9,
        "share_of_peak": flops / seconds / ceilings.fma_peak() if case.device == "cpu" else None,
        "compiles": compiles,
        "peak_memory_bytes": peak,
    }


def per_op(case: Case) -> dict[str, Any]:
    """Every op of a forward, alone, for one token and for a prompt: time, and how near the machine's ceilings."""
    bandwidth, peak = ceilings.read_bandwidth(), ceilings.fma_peak()
    model = case.model(filled=False)
    rows = []
    for tokens in (1, _PREFILL):
        cases = list(_cases(model.config, tokens, case))
        medians = interleaved({str(i): call for i, (_, call, _, _) in enumerate(cases)}, 0.4 * len(cases))
        for i, (name, _, nbytes, flops) in enumerate(cases):
            seconds = medians[str(i)]
            rows.append({
                "op": name,
                "tokens": tokens,
                "us": seconds * 1e6,
                "bytes": nbytes,
                "flops": flops,
                "percent_of_bandwidth": 100 * nbytes / seconds / bandwidth,
                "percent_of_peak": 100 * flops / seconds / peak,
            })  # fmt: skip
    ceiling = {"bandwidth_gb_per_s": bandwidth / 1e9, "peak_gflop_per_s": peak / 1e9}
    return ceiling | {"note": "operands stay in the caches where they fit", "rows": rows}


def _cases(c: Any, tokens: int, case: Case) -> Iterable[tuple[str, Callable[[], Any], int, int]]:
    """Name, call, bytes that must move, flops."""
    dtype = case.dtype
    heads, kv, dim, width, inner = (
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size, c.intermediate_size,
    )  # fmt: skip
    x, wide = _normal((tokens, width), dtype), _normal((tokens, inner), dtype)
    weight = _normal((width,), dtype)
    positions = ops.tensor(np.arange(tokens, dtype="int32"))
    q, k = _normal((tokens, heads, dim), dtype), _normal((tokens, kv, dim), dtype)
    frequencies = _normal((dim // 2,), "float32")
    keys = _normal((1024, kv, dim), dtype)
    last = ops.tensor(np.arange(1024 - tokens, 1024, dtype="int32"))
    pairs = heads * (tokens * 1024 - tokens * (tokens - 1) // 2)  # query and key pairs that causality leaves
    ids = ops.tensor(np.zeros(tokens, "int32"))
    table = _normal((1024, width), dtype)
    yield "embedding", lambda: ops.embedding(ids, table), 2 * x.nbytes, 0
    yield "rms_norm", lambda: ops.rms_norm(x, weight, eps=1e-5), 2 * x.nbytes, 4 * x.size
    for name, pairs in (("rope", False), ("rope interleaved", True)):
        rope = functools.partial(ops.rope, q, positions, frequencies, interleaved=pairs)
        yield name, rope, 2 * q.nbytes, 3 * q.size
    yield "cache_write", lambda: ops.cache_write(keys, k, positions), 2 * k.nbytes, 0
    yield (
        "attention, 1024 keys",
        lambda: ops.attention(q, keys, keys, last, scale=dim**-0.5),
        2 * keys.nbytes + 2 * q.nbytes,
        4 * dim * pairs,
    )
    yield from _plain_cases(x, wide, weight)
    weights = _normal((tokens, heads, 1024), "float32")
    yield (
        "scores, 1024 keys",
        lambda: ops.scores(q, keys, last, scale=dim**-0.5),
        keys.nbytes + q.nbytes + weights.nbytes,
        2 * dim * pairs,
    )
    yield "softmax, 1024 keys", lambda: ops.softmax(weights), 2 * weights.nbytes, 12 * weights.size
    sinks = _normal((heads,), dtype)
    with_sinks = functools.partial(ops.softmax_with_sinks, weights, sinks)
    yield "softmax_with_sinks, 1024 keys", with_sinks, 2 * weights.nbytes, 12 * weights.size
    yield (
        "mix, 1024 keys",
        lambda: ops.mix(weights, keys, dtype=dtype),
        keys.nbytes + q.nbytes + weights.nbytes,
        2 * dim * weights.size,
    )
    if tokens == 1:  # what a head's output goes through
        logits = _normal((1, c.vocab_size), dtype)
        yield "log_softmax, vocabulary", lambda: ops.log_softmax(logits), 2 * logits.nbytes, 12 * logits.size
        yield "argmax, vocabulary", lambda: ops.argmax(logits), logits.nbytes, logits.size
        yield "top_k 50, vocabulary", lambda: ops.top_k(logits, k=50), logits.nbytes, logits.size
    for outputs, inputs in ((width, width), (inner, width), (width, inner)):
        matrix = _copies(ops.Spec((outputs, inputs), case.weights), 1)[1][0]
        given = x if inputs == width else wide
        yield (
            f"linear {outputs}x{inputs}",
            lambda given=given, matrix=matrix: ops.linear(given, matrix),
            matrix.nbytes + given.nbytes + tokens * outputs * given.spec.itemsize,
            2 * tokens * outputs * inputs,
        )


def _plain_cases(x: Any, wide: Any, weight: Any) -> Iterable[tuple[str, Callable[[], Any], int, int]]:
    """The cases that go over their arguments once."""
    yield "layer_norm", lambda: ops.layer_norm(x, weight, weight, eps=1e-5), 2 * x.nbytes, 8 * x.size
    yield "silu_mul", lambda: ops.silu_mul(wide, wide), 3 * wide.nbytes, 12 * wide.size
    for form in ("none", "tanh"):
        yield f"gelu {form}", functools.partial(ops.gelu, wide, approximate=form), 2 * wide.nbytes, 19 * wide.size
        gelu_mul = functools.partial(ops.gelu_mul, wide, wide, approximate=form)
        yield f"gelu_mul {form}", gelu_mul, 3 * wide.nbytes, 20 * wide.size
    for name, two in (("add", ops.add), ("mul", ops.mul)):
        yield name, functools.partial(two, x, x), 3 * x.nbytes, x.size
    yield "scale", lambda: ops.scale(x, 0.5), 2 * x.nbytes, x.size
    yield "softcap", lambda: ops.softcap(x, cap=30.0), 2 * x.nbytes, 14 * x.size
    other = "bfloat16" if x.dtype == "float32" else "float32"
    yield f"cast to {other}", lambda: ops.cast(x, dtype=other), x.nbytes + x.size * ops.Spec((), other).itemsize, x.size
    yield "concat", lambda: ops.concat(x, x), 4 * x.nbytes, 0


def _linear_shapes(case: Case) -> list[tuple[int, int]]:
    c = case.model(filled=False).config
    attention = c.num_attention_heads * c.head_dim
    return [
        (attention, c.hidden_size),
        (c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
        (c.vocab_size, c.hidden_size),
    ]


def _normal(shape: tuple[int, ...], dtype: str) -> Any:
    """Normal values; a large tensor repeats a block of them."""
    result = ops.empty(shape, dtype)
    flat = result.numpy().reshape(-1)
    block = np.random.default_rng(0).standard_normal(min(flat.size, 1 << 18)).astype(flat.dtype)
    for start in range(0, flat.size, block.size):
        flat[start : start + block.size] = block[: flat.size - start]
    return result


def _cycle(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def _table(result: dict[str, Any]) -> None:
    """The facts as lines, then the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    for key, value in result.items():
        if key != "rows":
            facts.add_row(key, _shown(value))
    console.print(facts)
    rows = result.get("rows", [])
    if rows:
        table = Table(box=None, pad_edge=False)
        for key in rows[0]:
            table.add_column(key.replace("_", " "), justify="left" if isinstance(rows[0][key], str) else "right")
        for row in rows:
            table.add_row(*map(_shown, row.values()))
        console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return (
        "x".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
    )
