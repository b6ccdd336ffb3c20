"""`limpid bench`: JSON that a program reads, tables that a person does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm import bench


def test_bench_json(limpid, quick):
    def result(what: str) -> dict[str, Any]:
        code, out, _ = limpid("bench", what, "--json")
        assert code == 0
        values = json.loads(out)
        assert (values["bench"], values["shape"], values["dtype"]) == (what, "tiny", "float32")
        return values

    costs = result("dispatch")
    assert 0 < costs["bare_us"] < costs["call_us"]
    assert costs["overhead_us"] == pytest.approx(costs["call_us"] - costs["bare_us"])
    for row in result("gemv")["rows"]:
        assert len(row["shape"]) == 2
        assert row["gb_per_s"] > 0
        assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
    rows = result("ops")["rows"]
    assert {"gelu none", "softmax_with_sinks, 1024 keys", "rope interleaved"} <= {row["op"] for row in rows}
    assert all(row["us"] > 0 and row["percent_of_bandwidth"] > 0 for row in rows)
    prefill = result("prefill")
    assert prefill["tokens_per_s"] > 0
    assert prefill["share_of_peak"] == pytest.approx(prefill["gflop_per_s"] / 100)  # of the pretended peak
    decode = result("decode")
    assert decode["tokens_per_s"] > 0
    assert decode["peak_memory_bytes"] > 2**20
    assert isinstance(decode["compiles"], int)


def test_contexts_take_turns():
    said: list[str] = []

    class Model:
        device = "cpu"

        def __call__(self, ids, cache, **_):
            said.append(cache)

    times = bench._steps(Model(), {16: "a", 1024: "b"}, most=5, seconds=9.0)
    assert {context: len(each) for context, each in times.items()} == {16: 5, 1024: 5}
    assert said == ["a", "b"] * 8


def test_bench_tables(limpid, quick):
    code, out, _ = limpid("bench", "dispatch")
    assert code == 0
    assert "rms_norm float32[1, " in out
    for what, wanted in {"gemv": "share of", "ops": "cache_write", "prefill": "share_of_peak"}.items():
        code, out, _ = limpid("bench", what)
        assert code == 0
        assert wanted in out
