"""GGUF's blocks: unpacked as the library does, repacked to the same numbers, and multiplied as they lie."""

import gguf
import numpy as np
import pytest

import ops
from llm.weights import compressed
from llm.weights.blocks import QUANTIZED, Blocks, Kind, nbytes, row_bytes
from llm.weights.lazy import Lazy, concatenated
from ops import quantize, target
from ops.quantize import KNOWN
from ops.tolerance import KERNEL, relative_error
from tests.ops.harness import check, random
from tests.ops.test_quantize import compiled, reference

KINDS = sorted(QUANTIZED, key=lambda kind: kind.name)
PACKED = {Kind.Q4_0: "q4", Kind.Q8_0: "q8", Kind.Q4_K: "q4k", Kind.Q6_K: "q6k", Kind.MXFP4: "mxfp4"}
RUNS_HERE = ["native", *(name for name, each in target.MACHINES.items() if each.needs <= target.features())]


def random_bytes(rng, kind, shape):
    """Any bytes: every code and every scale, those of float16 finite and not huge."""
    raw = rng.integers(0, 256, (*shape[:-1], row_bytes(kind, shape[-1])), "uint8")
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    for at in {Kind.Q4_0: (0,), Kind.Q8_0: (0,), Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}.get(kind, ()):
        blocks[:, at : at + 2] = rng.normal(0, 1e-3, len(blocks)).astype("float16")[:, None].view("uint8")
    if kind == Kind.MXFP4:
        blocks[:, 0] = rng.integers(0, 130, len(blocks))  # from below float32's normal numbers on
    return raw


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_unpacked_as_the_library_does(rng, kind):
    raw = random_bytes(rng, kind, (3, 7, 512))
    given = Blocks(kind, raw)
    assert given.shape == (3, 7, 512) and given.dtype == np.float32 and nbytes(kind, given.shape) == raw.nbytes
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind)
    assert np.asarray(given).tobytes() == wanted.tobytes()
    assert np.asarray(given[1][[4, 2]]).tobytes() == wanted[1][[4, 2]].tobytes()


@pytest.mark.parametrize("name", RUNS_HERE)
@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 256), (40, 512), (257, 768)])
def test_repacked_to_exactly_the_same_numbers(rng, name, kind, shape):
    raw, form = random_bytes(rng, kind, shape), PACKED[kind]
    with target.building_for(target.machine() if name == "native" else target.MACHINES[name]):
        given, form = Blocks(kind, raw), KNOWN[form]
        assert given.form == form.name
        packed = given.pack(form.name, np.empty(form.nbytes(shape), "uint8"))
        assert np.array_equal(quantize.unpack(packed, shape, form), gguf.dequantize(raw, kind))
        # As large as in the file, but for the fill of the last rows, and scales: Q4_K's of 6 bits take 8, MXFP4's 32.
        rows = -(-shape[0] // target.lanes()) * target.lanes()
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size += {Kind.Q4_K: 4, Kind.MXFP4: 3}.get(kind, 0)
        assert packed.nbytes == rows * shape[1] // block * size


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.MXFP4], ids=lambda kind: kind.name)
class TestHeldAsGiven:
    """The ops over formats that are only taken over."""

    def weight(self, rng, kind, shape):
        spec = ops.Spec(shape, PACKED[kind])
        return ops.tensor_from_packed(
            Blocks(kind, random_bytes(rng, kind, shape)).pack(spec.dtype, np.empty(spec.nbytes, "uint8")), spec
        )

    @pytest.mark.parametrize("shape", [(19, 256), (70, 1024), (1031, 512)])
    def test_linear(self, rng, kind, shape):
        w, x = self.weight(rng, kind, shape), random(rng, (300, shape[1]), "float32")
        whole = ops.linear(ops.tensor(x), w).numpy()
        for n in (1, 2, 3, 9, 16, 17, 33, 300):
            result = check(ops.linear, x[:n].copy(), w).numpy()
            assert np.array_equal(result, whole[:n]), "a token's result depends on the others"

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_linear_of_other_activations_with_bias(self, rng, kind, dtype):
        w = self.weight(rng, kind, (33, 256))
        for n in (1, 5, 40):
            check(ops.linear, random(rng, (n, 256), dtype), w, random(rng, (33,), dtype))

    def test_the_block_definition_of_linear(self, rng, kind):
        for n in (1, 20):
            arguments = ops.tensor(random(rng, (n, 512), "float32")), self.weight(rng, kind, (33, 512))
            with ops.linear.use(ops.linear._request(arguments, {}).blocks()) as use:
                check(ops.linear, *arguments)
            assert use.hits == 1

    def test_embedding(self, rng, kind):
        ids = rng.integers(0, 50, 7).astype("int32")
        check(ops.embedding, ids, self.weight(rng, kind, (50, 512)), tolerance=0.0, dtype="float32")

    def test_the_largest_products_do_not_overflow(self, kind):
        raw = np.full((20, row_bytes(kind, 256)), 0xFF, "uint8")
        for at in {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}.get(kind, ()):
            raw[:, at : at + 2] = np.full((20, 1), 0.5, "float16").view("uint8")
        if kind == Kind.MXFP4:
            raw.reshape(-1, 17)[:, 0] = 128
        spec = ops.Spec((20, 256), PACKED[kind])
        w = ops.tensor_from_packed(Blocks(kind, raw).pack(spec.dtype, np.empty(spec.nbytes, "uint8")), spec)
        for n in (1, 17):
            check(ops.linear, np.ones((n, 256), "float32"), w)
            check(ops.linear, -np.ones((n, 256), "float32"), w)

    @pytest.mark.parametrize("name", RUNS_HERE)
    def test_every_machine(self, rng, kind, name):
        with target.building_for(target.machine() if name == "native" else target.MACHINES[name]):
            form = KNOWN[PACKED[kind]]
            given = Blocks(kind, random_bytes(rng, kind, (41, 512)))
            packed = given.pack(form.name, np.empty(form.nbytes(given.shape), "uint8"))
            values = quantize.unpack(packed, given.shape, form)
            for n, low, high in ((300, 17, None), (5, 2, 16), (1, 1, 1)):
                x, y = random(rng, (n, 512), "float32"), np.full((n, 41), np.nan, "float32")
                compiled(41, 512, form, low, high)(x, packed, y)
                assert relative_error(y, reference(x, values, form)) <= KERNEL["float32"]

    def test_it_is_not_made_from_floats(self, rng, kind):
        with pytest.raises(ops.DTypeError, match=r"is not made from floats, only taken over from a file: use q4, q8"):
            ops.tensor(random(rng, (16, 256), "float32"), PACKED[kind])


def test_lazy_arrays_are_rearranged_like_others(rng):
    values = rng.standard_normal((6, 4)).astype("float32")
    lazy = Lazy(values.shape, lambda: values)
    for change in (
        lambda a: a.T,
        lambda a: a[2:5],
        lambda a: a[[3, 1]],
        lambda a: a[:, ::2],
        lambda a: a[4],
        lambda a: a.reshape(3, -1),
        lambda a: a.reshape(2, 3, 4)[1].T,
    ):
        given, wanted = change(lazy), change(values)
        assert isinstance(given, Lazy) and given.shape == wanted.shape and np.array_equal(np.asarray(given), wanted)
    with pytest.raises(ValueError, match="cannot reshape"):
        lazy.reshape(5, -1)
    both = concatenated([lazy, values])
    assert isinstance(both, Lazy) and np.array_equal(np.asarray(both), np.concatenate([values] * 2))
    assert isinstance(concatenated([values, values]), np.ndarray)
    with pytest.raises(ValueError, match=r"rows of shapes \(.,\) and \(.,\) are not put one below the other"):
        concatenated([lazy, values[:, :1]])


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_a_pile_is_packed_part_by_part(rng, kind):
    rows, form = 2 * target.lanes(), KNOWN[PACKED[kind]]
    raw = random_bytes(rng, kind, (3, rows, 512))
    pile, whole = concatenated([*Blocks(kind, raw)]), Blocks(kind, raw).reshape(-1, 512)
    assert isinstance(whole, Blocks) and pile.form == whole.form == form.name and pile.shape == whole.shape
    given, wanted = (each.pack(form.name, np.empty(form.nbytes(whole.shape), "uint8")) for each in (pile, whole))
    assert np.array_equal(given, wanted)
    assert np.array_equal(quantize.unpack(given, whole.shape, form), gguf.dequantize(raw, kind).reshape(-1, 512))
    assert np.array_equal(np.asarray(pile), gguf.dequantize(raw, kind).reshape(-1, 512))
    assert Blocks(kind, raw).reshape(3, rows, 2, 256).form is None


def test_what_a_pile_is_not_packed_to(rng):
    lanes = target.lanes()
    raw = random_bytes(rng, Kind.Q4_0, (2, lanes, 64))
    floats = random(rng, (lanes, 64), "float32")
    parts = [*Blocks(Kind.Q4_0, raw)]
    assert concatenated(parts).form == "q4"
    assert concatenated([each[1:] for each in parts]).form is None, "a record would hold rows of two"
    others = (floats, Blocks(Kind.Q8_0, random_bytes(rng, Kind.Q8_0, (lanes, 64))))
    for other in others:
        mixed = concatenated([*parts, other])
        assert mixed.form is None
        wanted = np.concatenate([*gguf.dequantize(raw, Kind.Q4_0), np.asarray(other)])
        assert np.array_equal(np.asarray(mixed), wanted)
    half = Lazy(floats.shape, lambda: floats.astype("float16"), "float16")
    assert concatenated([half, parts[0]]).dtype == "float32"


def test_a_pile_of_another_librarys_codes(rng):
    shape = (2 * target.lanes(), 96)
    parts = [compressed.packed(random(rng, shape, "float32"), "q4") for _ in range(3)]
    pile = concatenated(parts)
    packed = pile.pack("q4", np.empty(KNOWN["q4"].nbytes(pile.shape), "uint8"))
    exact = [(each.codes() - np.float32(8)) * each.scales.repeat(32, 1).astype("float32") for each in parts]
    assert pile.form == "q4" and np.array_equal(quantize.unpack(packed, pile.shape, "q4"), np.concatenate(exact))
