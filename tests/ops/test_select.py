from types import SimpleNamespace

import pytest

import ops
from ops.call import Call
from ops.scope import Scope
from ops.select import Selector


@pytest.fixture(scope="module")
def x() -> ops.Tensor:
    return ops.zeros((1, 64), "bfloat16")


def call(at: str, x: ops.Tensor | None = None) -> Call:
    """A call at a full address, `layers.3.mlp/linear[0]@1`."""
    path, _, rest = at.partition("/")
    name, _, rest = rest.partition("[")
    ordinal, _, number = rest.partition("]@")
    op = SimpleNamespace(name=name, rule=None)
    return Call(op, () if x is None else (x,), {}, Scope(path, int(number)), int(ordinal))  # type: ignore[arg-type]


CALLS = [
    "/embedding[0]@1",
    "layers.0.self_attn/rope[0]@1",
    "layers.0.self_attn/rope[1]@1",
    "layers.0.self_attn.q_proj/linear[0]@1",
    "layers.0.mlp/silu_mul[0]@1",
    "layers.3.self_attn/rope[1]@2",
    "layers.3.mlp.gate_proj/linear[0]@2",
    "layers.7.mlp.gate_proj/linear[0]@2",
    "layers.30.mlp/silu_mul[0]@2",
    "lm_head/linear[0]@2",
]


@pytest.mark.parametrize(
    "selector, meant",
    [
        (None, range(10)),
        ("layers.3", [5, 6]),
        ("layers.0-3", [1, 2, 3, 4, 5, 6]),
        ("layers.1-30", [5, 6, 7, 8]),
        ("layers", range(1, 9)),
        ("layers.*.self_attn", [1, 2, 5]),
        ("layers.*", range(1, 9)),
        ("layers.?.mlp", [4]),
        ("*.mlp", [4, 8]),
        ("layers.0-3.*", [1, 2, 3, 4, 5, 6]),
        ("layers.0-3.mlp*", [4, 6]),
        ("layers.0.self_attn/rope[1]", [2]),
        ("layers.0.self_attn/rope", [1, 2]),
        ("layers.0.self_attn", [1, 2, 3]),
        ("/rope", [1, 2, 5]),
        ("/linear", [3, 6, 7, 9]),
        ("/rope[1]", [2, 5]),
        ("/silu*", [4, 8]),
        ("/line?r", [3, 6, 7, 9]),
        ("@2", [5, 6, 7, 8, 9]),
        ("/rope@2", [5]),
        ("layers.0-3.*/linear@2", [6]),
        ("layers.0.self_attn/rope[0]@1", [1]),
        ("layers.0, layers.7", [1, 2, 3, 4, 7]),
        ("/embedding,lm_head", [0, 9]),
        (["layers.7", "lm_head"], [7, 9]),
        ({"layers.7"}, [7]),
        (("layers.7", ["/embedding", lambda call: call.ordinal == 1]), [0, 2, 5, 7]),
        (lambda call: call.path.endswith("mlp"), [4, 8]),
        (Selector("layers.7"), [7]),
        ("layers.99", []),
        ("layer", []),
    ],
)
def test_addresses(selector, meant):
    matches = Selector(selector).matches
    assert [i for i, at in enumerate(CALLS) if matches(call(at))] == list(meant)


@pytest.mark.parametrize(
    "selector, matched",
    [
        ("/linear dtype=bfloat16 rows=1", True),
        ("/linear dtype=float32", False),
        ("/linear rows=2", False),
        ("dtype=bfloat16", True),
        ("shape=1x64", True),
        ("shape=64", False),
        ("lm_head shape=1x64 dtype=bfloat16", True),
        ("lm_head  rows=1 , layers.9", True),
        ("layers.9 rows=1", False),
        ("rows=1 shape=1x64 dtype=float16", False),
    ],
)
def test_words_narrow_by_the_first_tensor(selector, matched, x):
    assert Selector(selector).matches(call("lm_head/linear[0]@1", x)) is matched
    assert not Selector("rows=1").matches(call("lm_head/linear[0]@1")), "no tensor, no rows"


def test_an_op_selects_its_calls():
    given = call("layers.0/rms_norm[0]@1")
    assert not Selector(ops.rms_norm).matches(given), "an op is meant itself, not its name"
    given.op = ops.rms_norm
    assert Selector(ops.rms_norm).matches(given) and Selector([ops.rms_norm]).matches(given)


@pytest.mark.parametrize(
    "selector, message",
    [
        ("", "selector '' is not understood; examples: 'layers.0-3'"),
        ("layers.0,", "selector '' is not understood"),
        ("layers[0]", "'layers\\[0\\]' is not understood"),
        ("layers.0/", "'layers.0/' is not understood"),
        ("layers.0/rope[x]", "is not understood"),
        ("layers.0/rope[1", "is not understood"),
        ("/rope[-1]", "is not understood"),
        ("layers/0/rope", "is not understood"),
        ("/rope@", "is not understood"),
        ("/rope @2", "'@2' is not understood; further words are as rows=1, shape=1x64, dtype=float32"),
        ("/linear rows=many", "'rows=many' is not understood"),
        ("/linear rows=", "'rows=' is not understood"),
        ("/linear dtype=float33", "'dtype=float33' is not understood.*the dtypes are float32, float16"),
        ("/linear shape=1x", "'shape=1x' is not understood"),
        ("/linear color=red", "'color=red' is not understood"),
        ("layers.3-1", "the range 3-1 is empty; write it as 1-3"),
        ("layers.0-3, layers.9-7.mlp", "the range 9-7 is empty; write it as 7-9"),
        ([], "an empty list of selectors means no call; pass None for every call"),
        (["layers.0", ""], "selector '' is not understood"),
        (7, "a selector is a string, a function of the call, an op or a list of these, not 7"),
    ],
)
def test_what_is_not_understood(selector, message):
    with pytest.raises(ops.SelectorError, match=message):
        Selector(selector)


def test_a_selector_shows_itself():
    assert repr(Selector()) == "every call" and repr(Selector("layers.3")) == "'layers.3'"
