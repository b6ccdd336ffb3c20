"""The machinery of `tests.bench.peers`, with sides that only pretend to compute; the peers themselves are not run."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llm.bench import SHAPES
from llm.load import build
from tests.bench import peers, report, rounds
from tests.bench.own import FIGURES, Figure, flops, off_line
from tests.bench.process import Worker, WorkerError
from tests.bench.table import LLAMA, ROWS, Row, matrices

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the peers' driver reads Linux's /proc")
TINY = SHAPES["135m"] | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 160} | {
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
ROW = Row("decode", "q4", LLAMA, "q4", 1.6)


def side(tmp_path: Path, **variants: float) -> Worker:
    worker = Worker(sys.executable, "tests.bench.worker_pretend", 1, tmp_path / f"{'-'.join(variants)}.log")
    worker.ask(open=variants)
    return worker


def taken(ours: float, theirs: float, others: float) -> dict[str, Any]:
    return {
        "ours": {"eager": [ours]},
        "theirs": {"plain": [theirs]},
        "others": {"ours": others, "theirs": 0.0},
        "compiles": 0,
    }


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    dispatch = {"weights": "q4", "outside_kernels": 0.031, "nothing_launched": 0.012, "other_kernels": 0.035}
    one: dict[str, Any] = {
        "dispatch": dispatch,
        "compiles": 0,
        "peak_memory_bytes": {"ours": 2 * 10**9, "theirs": 10**9},
    }
    one["ceilings"] = {"read_bandwidth": 38.0e9}
    failure = {"rows": ["prefill-q8"], "error": "llama.cpp went away"}
    figure = Figure("gemv", "GEMV", lambda *_: (0.84, [0.84]), "{:.0%}", least=0.9)
    return {
        "shape": "135m",
        "threads": 2,
        "machine": {"cpu": "a processor"},
        "rows": list(rows),
        "own": [figure.take(None, {})],
        "sides": [one],
        "failures": [failure],
    }


def test_rounds_go_through_the_pipe(tmp_path):
    with side(tmp_path, eager=0.5) as ours, side(tmp_path, flash=1.0, plain=2.0) as theirs:
        rounds.warm([ROW], ours, theirs)
        each = rounds.take([ROW], ours, theirs, 2)[ROW]
        peak = ours.peak_memory()
    assert 2 <= len(each) <= 6
    assert peak > 10**6
    row = rounds.summary(ROW, each, 2)
    assert (row["variant"], row["ours"], row["theirs"]) == ("flash", 2.0, 1.0)
    assert row["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0, "of_fastest": 2.0}
    assert row["met"] is True
    assert sum(one["counts"] for one in row["rounds"]) == 2


def test_only_the_calmest_rounds_count():
    disturbed, calm = taken(1.0, 9.0, 0.5), [taken(1.0, ratio, 0.01) for ratio in (1.2, 1.1, 1.3)]
    row = rounds.summary(ROW, [calm[0], disturbed, *calm[1:]], 3)
    assert [each["counts"] for each in row["rounds"]] == [True, False, True, True]
    assert row["ratio"] == {"median": 1.2, "min": 1.1, "max": 1.3, "of_fastest": 1.1}
    assert row["met"] is False
    assert row["others"] == 0.01


def test_a_worker_that_fails_says_so(tmp_path):
    with side(tmp_path, eager=1.0) as worker:
        with pytest.raises(WorkerError, match=r"ValueError: nothing to measure\nTraceback"):
            worker.ask(test="fail")
        assert worker.ask(test="decode")["seconds"] == {"eager": [1.0] * 3}
        with pytest.raises(WorkerError, match=r"ended at .*exit status 1; .*\n(.*\n)*no more"):
            worker.ask(test="end")
        with pytest.raises(WorkerError, match="has ended"):
            worker.ask(test="decode")


def test_a_worker_that_hangs_is_ended(tmp_path):
    with side(tmp_path, eager=1.0) as worker:
        with pytest.raises(WorkerError, match="did not answer"):
            worker.ask(0.2, test="decode", sleep=60)
        with pytest.raises(WorkerError, match="has ended"):
            worker.ask(test="decode")


def test_a_worker_is_waited_for_until_its_threads_sleep(tmp_path):
    with side(tmp_path, eager=1.0) as worker:
        worker.ask(test="decode", spin=1)
        started = time.monotonic()
        worker.settle()
        assert time.monotonic() - started > 0.8


def test_table_and_json(tmp_path):
    made = result(rounds.summary(ROW, [taken(0.5, 1.0, 0.2)], 1))
    pytest.importorskip("matplotlib", reason="the bench extra is not installed: pip install -e '.[bench]'")
    report.write(made, tmp_path)
    assert json.loads((tmp_path / report.JSON).read_text("utf-8")) == made
    assert (tmp_path / report.CHART).read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    report.show(made, Console(width=150, file=shown))
    text = " ".join(shown.getvalue().split())
    assert "decode q4, empty cache 2.0 tok/s llama.cpp q4: 1.0 2.00 (2.00 to 2.00) >= 1.6 yes" in text
    assert "Python and dispatch of a decode step, q4 3.1% <= 4% yes" in text
    assert "peak resident memory, q4 2.00 GB" in text
    assert "read bandwidth of the machine, beside q4 38.0 GB/s" in text
    assert "GEMV 84% >= 90% no" in text
    assert "more than 5 % of the machine in: decode-q4" in text
    assert "prefill-q8: llama.cpp went away" in text


def test_rows_are_selected_by_name(capsys):
    names = [each.name for each in (*ROWS, *FIGURES)]
    assert len(set(names)) == len(names)
    assert {"decode-q4", "decode-q4-1024", "prefill-bf16-compile", "decode-q4-bf16", "gemm-fp32"} <= {*names}
    assert peers.main(["--only", "decode-q5"]) == 2
    assert "decode-q5 selects nothing of decode-q4, " in capsys.readouterr().out


def test_growth_is_measured_against_the_best_line():
    work = np.array([[1.0], [10.0], [100.0], [1000.0]])
    assert off_line(work, 3 + 0.5 * work[:, 0]) < 1e-9
    bent = 3 + 0.5 * work[:, 0] * np.array([1.0, 1.0, 1.0, 2.0])
    assert 0.1 < off_line(work, bent) < 1
    both = np.concatenate([work, work**2], axis=1)  # two kinds of work, which cost differently
    assert off_line(both, 3 + both @ [0.5, 0.01]) < 1e-9 < 0.1 < off_line(work, 3 + both @ [0.5, 0.01])


def test_flops_count_every_matrix_and_every_pair_once():
    layers, head = matrices(TINY)
    spec_sizes = {name: spec.size for name, spec in build(TINY).parameters() if spec.ndim == 2}
    assert layers + head == sum(spec_sizes.values())
    pairs = 5 * 6 // 2  # of a query and a key that it sees
    both = 2 * 2 * 64 * pairs  # scores and mix, of two layers, a multiplication for each of 64 values
    assert flops(TINY, 5) == (2 * (5 * layers + head), 2 * both)


@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_has_the_tensors_of_the_model(shape):
    gguf_model = _gguf_model()
    ours = sorted(spec.shape for _, spec in build(SHAPES[shape]).parameters())
    assert sorted(each for _, each in gguf_model.shapes(SHAPES[shape])) == ours


@pytest.mark.parametrize("weights", ["q4", "q8", "float16", "bfloat16", "float32"])
def test_gguf_is_pure(weights, tmp_path):
    gguf_model = _gguf_model()
    import gguf  # pyright: ignore[reportMissingImports]

    path = tmp_path / "tiny.gguf"
    total = gguf_model.write(path, TINY, weights)
    read = gguf.GGUFReader(path)
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in read.tensors} == dict(gguf_model.shapes(TINY))
    assert {t.tensor_type.name for t in read.tensors if "norm" not in t.name} == {gguf_model.TYPES[weights]}
    assert {t.tensor_type.name for t in read.tensors if "norm" in t.name} == {"F32"}
    assert sum(int(t.n_bytes) for t in read.tensors) == total
    matrix = next(t for t in read.tensors if t.name == "blk.1.ffn_up.weight")
    values = gguf.dequantize(matrix.data, matrix.tensor_type)
    assert abs(values.std() - 0.02) < 0.002  # 6144 values of deviation 0.02: ten times the deviation of their own
    assert read.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    gguf_model.write(path, TINY, weights, vocabulary=True)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == TINY["vocab_size"]
    with pytest.raises(ValueError, match=r"weights 'q5' have no GGUF type here; choose one of q4, q8"):
        gguf_model.write(path, TINY, "q5")


@pytest.mark.parametrize("weights", ["q4", "float16"])
def test_llama_cpp_runs_it(weights, tmp_path):
    pytest.importorskip("llama_cpp", reason="the bench extra is not installed; CONTRIBUTING.md says how to build it")
    from tests.bench.worker_llama import Llama

    llama = Llama(TINY, 1, weights, str(tmp_path))
    assert not list(tmp_path.iterdir())
    for test in ({"test": "decode", "context": 5, "steps": 3}, {"test": "prefill", "prompt": 7}):
        seconds = llama.measure(**test)["seconds"]
        assert set(seconds) == {"flash attention", "no flash attention"}
        assert all(len(each) >= test.get("steps", 1) and min(each) > 0 for each in seconds.values())
    assert not list(tmp_path.iterdir())


def _gguf_model() -> Any:
    pytest.importorskip("gguf", reason="the bench extra is not installed: pip install -e '.[bench]'")
    from tests.bench import gguf_model

    return gguf_model
