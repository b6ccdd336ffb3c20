"""Hooks on modules: torch's order and signatures, removal, and that they cost nothing while none is registered."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest

import llm
import ops
from debug.trace import trace
from ops import hooks, intercept
from tests.llm.small import model as small


class Twice(llm.Module):
    def forward(self, x: ops.Tensor, times: float = 2.0) -> ops.Tensor:
        return x * times


class Two(llm.Module):
    def __init__(self) -> None:
        self.first, self.second = Twice(), Twice()

    def forward(self, x: ops.Tensor) -> ops.Tensor:
        return self.second(self.first(x), times=3.0)


@pytest.fixture
def model() -> Two:
    return Two()


def value(model: Any, x: float = 1.0) -> float:
    return float(model(ops.tensor([x])).item())


def test_forward_hook_sees_and_replaces(model):
    seen = []

    def look(module, args, output):
        seen.append((module, args[0].item(), output.item()))

    handle = model.second.register_forward_hook(look)
    assert value(model) == 6.0
    assert seen == [(model.second, 2.0, 6.0)]
    handle.remove()
    with model.first.register_forward_hook(lambda module, args, output: ops.offset(output, 1.0)):
        assert value(model) == 9.0
    assert value(model) == 6.0
    assert len(seen) == 1


def test_pre_hook_replaces_arguments(model):
    with model.first.register_forward_pre_hook(lambda module, args: args[0] * 10.0):
        assert value(model) == 60.0, "one argument needs no tuple"
    with model.first.register_forward_pre_hook(lambda module, args: (*args, 5.0)):
        assert value(model) == 15.0
    with model.first.register_forward_pre_hook(lambda module, args: None):
        assert value(model) == 6.0


def test_with_kwargs(model):
    seen = []
    second = model.second
    before = second.register_forward_pre_hook(lambda m, args, kwargs: (args, {"times": 7.0}), with_kwargs=True)
    with before, second.register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs), with_kwargs=True):
        assert value(model) == 14.0
    assert seen == [{"times": 7.0}], "hooks after the forward see what it was called with"
    wrong, says = second.register_forward_pre_hook(lambda m, args, kwargs: args, with_kwargs=True), "gives None or"
    with wrong, pytest.raises(ops.OpError, match=says):
        value(model)


def test_order_is_torchs(model):
    torch = pytest.importorskip("torch", reason="torch is not installed (it is in the extra `parity`)")

    def orders(module: Any, call: Any) -> list[str]:
        order: list[str] = []
        for name, prepend in (("a", False), ("b", True), ("c", False)):
            module.register_forward_hook(lambda *_, name=name: order.append(name), prepend=prepend)
            module.register_forward_pre_hook(lambda *_, name=name: order.append("before " + name), prepend=prepend)
        call()
        return order

    twin = torch.nn.Linear(1, 1)
    ours = orders(model.first, lambda: value(model))
    assert ours == orders(twin, lambda: twin(torch.ones(1)))
    assert ours == ["before b", "before a", "before c", "b", "a", "c"]
    for hook in hooks._hooks[id(model.first)]:
        hook.remove()


def test_nothing_is_on_without_hooks(model):
    before = intercept._installed
    handles = [model.first.register_forward_hook(lambda *_: None) for _ in range(3)]
    handles.append(model.second.register_forward_pre_hook(lambda *_: None))
    assert len(intercept._installed) == len(before) + 1, "however many hooks, one interceptor"
    for handle in handles:
        handle.remove()
        handle.remove()
    assert intercept._installed == before
    assert id(model.first) not in hooks._hooks and id(model.second) not in hooks._hooks


def test_on_in_all_threads_and_not_in_copies(model):
    twin, given = copy.deepcopy(model), []
    with model.first.register_forward_hook(lambda module, args, output: output * 10.0):
        copied = copy.deepcopy(model)
        thread = threading.Thread(target=lambda: given.append(value(model)))
        thread.start()
        thread.join()
        assert given == [60.0]
        assert value(twin) == value(copied) == 6.0


def test_tools_see_what_hooks_made_and_hooks_ops_apart(model):
    with model.first.register_forward_hook(lambda module, args, output: output * 10.0), trace(keep="outputs") as t:
        value(model)
    assert t["first"].output.item() == 20.0
    assert t["first/scale[0]"].output.item() == 2.0
    assert t["first.hooks/scale[0]"].output.item() == 20.0
    assert [each.address for each in t] == ["first/scale[0]", "first.hooks/scale[0]", "second/scale[0]"]


def test_a_hook_may_call_its_module(model):
    """As it runs without hooks then, that ends."""
    with model.first.register_forward_hook(lambda module, args, output: module(output)):
        assert value(model) == 12.0


def test_an_error_in_a_hook_reaches_the_caller(model):
    def fail(module, args, output):
        raise RuntimeError("no")

    with model.second.register_forward_hook(fail), pytest.raises(RuntimeError, match="no"):
        value(model)
    assert value(model) == 6.0


def test_list_members_by_their_place(rng):
    net, seen = small(rng), []
    look = net.layers[1].register_forward_hook(lambda module, args, output: seen.append((module, output)))
    with look, trace(keep="outputs") as t:
        net([3, 1, 4])
    assert [module for module, _ in seen] == [net.layers[1]]
    assert np.array_equal(seen[0][1].numpy(), t["layers.1"].output.numpy())
