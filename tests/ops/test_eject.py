"""Ejected kernels: a file with TVM's own kernel, which swaps in unchanged, for every op."""

import importlib.util

import numpy as np
import pytest

import ops
from ops import examples
from ops.op import registry

OPS = sorted(name for name, op in registry.items() if op.__module__.startswith("ops."))


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language", ["c", "tvmscript"])
@pytest.mark.parametrize("name", OPS)
def test_every_op_swaps_in_unchanged(name, language, tmp_path):
    op = registry[name]
    args, constants = examples.of(op)[-1]
    path = tmp_path / "mine.py"
    text = op.eject(language, *args, path=path, **constants)
    assert path.read_text() == text
    swap = getattr(imported(path), f"{name}_{language}")
    op(*args, **constants)
    assert swap.hits == 1 and swap.checked >= 1 and swap.state == "checking"


@pytest.mark.parametrize("language", ["cuda", "metal", "wgsl", "opencl"])
@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "softmax", "linear", "rope", "attention", "cache_write"])
def test_gpu_kernels_swap_in_unchanged(name, language, tmp_path):
    package = {"wgsl": "wgpu", "opencl": "pyopencl"}.get(language)
    if package:
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[{language}]'")
    op = registry[name]
    args, constants = next(
        (args, constants)
        for args, constants in reversed(examples.of(op))
        if all(each.spec.format is None for each in args if isinstance(each, ops.Tensor))
    )
    path = tmp_path / "mine.py"
    op.eject(language, *args, path=path, **constants)
    swap = getattr(imported(path), f"{name}_{language}")
    op(*args, **constants)
    assert swap.hits == 1 and swap.checked >= 1


def test_a_gpus_kernel_in_two_parts_is_refused():
    x, weight = ops.zeros((5, 20)), ops.zeros((20,))  # rows too short for a thread block of their own
    with pytest.raises(ops.OpError, match=r"rms_norm\(.*takes 2 kernels on a GPU, .*; a swap holds one"):
        ops.rms_norm.eject("metal", x, weight, eps=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_in_c(dtype, tmp_path):
    for op in (ops.rms_norm, ops.silu, ops.softmax):
        args, constants = examples.of(op, dtype)[-1]
        path = tmp_path / f"{op.name}.py"
        op.eject("c", *args, path=path, **constants)
        swap = getattr(imported(path), f"{op.name}_c")
        op(*args, **constants)
        assert swap.hits == 1 and swap.checked >= 1


def test_edited_it_is_reloaded_and_serves_other_lengths(tmp_path):
    x, weight = ops.tensor(np.ones((3, 8), "float32")), ops.tensor(np.ones(8, "float32"))
    path = tmp_path / "mine.py"
    ops.rms_norm.eject("c", x, weight, eps=1e-5, path=path)
    swap = imported(path).rms_norm_c
    ops.rms_norm(x, weight, eps=1e-5)
    path.write_text(path.read_text().replace("void rms_norm_c(", "// mine\nvoid rms_norm_c("))
    assert swap.reload()
    for rows in (2, 5, 16):
        ops.rms_norm(ops.tensor(np.ones((rows, 8), "float32")), weight, eps=1e-5)
    ops.rms_norm(x, weight, eps=1e-6)
    ops.rms_norm(ops.zeros((3, 9)), ops.zeros((9,)), eps=1e-5)
    assert swap.hits == 4, "other constants and widths are not meant"
    with pytest.raises(ops.OpError, match=r"mine\.py exists, and may hold what you have edited; name another file"):
        ops.rms_norm.eject("c", x, weight, eps=1e-5, path=path)
    with pytest.raises(ops.OpError, match=r"rms_norm ejects to 'c', 'tvmscript'.*, not to 'pascal'"):
        ops.rms_norm.eject("pascal", x, weight, eps=1e-5)


def test_what_the_kernel_checks_stays_checked(tmp_path):
    ids, weight = ops.tensor(np.array([1, 2], "int32")), ops.tensor(np.ones((3, 4), "float32"))
    ops.embedding.eject("c", ids, weight, path=tmp_path / "mine.py")
    swap = imported(tmp_path / "mine.py").embedding_c
    ops.embedding(ids, weight)
    assert swap.hits == 1
    swap.schedule = type(swap.schedule).of("never")
    with pytest.raises(ops.KernelError, match=r"ids hold a value outside \[0, 3\)"):
        ops.embedding(ops.tensor(np.array([1, 3], "int32")), weight)
