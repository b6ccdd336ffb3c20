"""What a planted bug is: how it is planted, which reference the hunt goes against, and the truth about it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.cache import Layer
from llm.models import llama, mistral

ROOT = Path(__file__).resolve().parents[2]

# What stands on the model line of a call, by the last name of its address.
_BLOCK = {
    "input_layernorm": "self.self_attn(self.input_layernorm(x)",
    "post_attention_layernorm": "self.mlp(self.post_attention_layernorm(x))",
}
_ATTENTION = {
    "q_proj": "self.q_proj(x)",
    "k_proj": "self.k_proj(x)",
    "v_proj": "self.v_proj(x)",
    "rope": "rotate(q), rotate(k)",
    "attention": "ops.attention(",
    "o_proj": "self.o_proj(",
}
_MLP = {
    "gate_proj": "self.down_proj(",
    "up_proj": "self.down_proj(",
    "silu_mul": "self.down_proj(",
    "down_proj": "self.down_proj(",
}
_TOP = {"embed_tokens": "self.embed_tokens(ids)", "norm": "self.norm(x[", "lm_head": "ops.linear(x"}


@dataclass(frozen=True)
class Place:
    """A call, by its address, and the line that makes it: the one line of `function` that holds `text`."""

    address: str
    function: Callable
    text: str

    @property
    def path(self) -> str:
        return self.address.partition("/")[0]

    @property
    def op(self) -> str:
        return self.address.partition("/")[2].partition("[")[0]

    @property
    def source(self) -> tuple[Path, int]:
        """The file, and the line in it."""
        lines, start = inspect.getsourcelines(self.function)
        found = [start + i for i, line in enumerate(lines) if self.text in line]
        if len(found) != 1:
            raise LookupError(f"{len(found)} lines of {self.function.__qualname__} hold {self.text!r}, expected one")
        return Path(inspect.getsourcefile(self.function) or "").resolve(), found[0]

    def __str__(self) -> str:
        file, line = self.source
        return f"{self.address} at {file.relative_to(ROOT)}:{line}"


def place(address: str, family: Any = llama) -> Place:
    """A call that the model file itself makes, such as `layers.0.self_attn/rope[0]`."""
    path, _, rest = address.partition("/")
    name, op = path.rpartition(".")[2], rest.partition("[")[0]
    if op == "cache_write":
        return Place(address, Layer.write, f"ops.cache_write(self.{('keys', 'values')['[1]' in rest]}, ")
    key = op if name in ("self_attn", "mlp") else name
    for function, texts in (
        (family.Block.forward, _BLOCK),
        (family.Attention.forward, _ATTENTION),
        (family.MLP.forward, _MLP),
        ((family.Llama if family is llama else family.Mistral).forward, _TOP),
    ):
        if key in texts:
            return Place(address, function, texts[key])
    raise LookupError(f"no line is known for {address}")


def in_mistral(address: str) -> Place:
    """The same in Mistral's file."""
    return place(address, mistral)


@dataclass(frozen=True)
class Bug:
    """A bug to plant: `with bug.plant(model):` the model has it.

    `places` are the answers that count: the first wrong call. More than one only where it is a matter of view, with
    the reason beside it. `parameters` are the names of the wrong weight that count; without any, none is to be blamed.
    `reference` is what the hunt goes against, `recipe` the model that the bug needs, `prompt` the number of tokens
    on which the symptom was seen, where nobody could know: else the doctor gets no ids.
    """

    name: str
    plant: Callable[[Any], contextlib.AbstractContextManager[None]]
    places: tuple[Place, ...]
    reference: str
    parameters: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    prompt: int | None = None

    @property
    def what(self) -> str:
        return (self.plant.__doc__ or "").partition("\n")[0].rstrip(".")


class Bugs(list[Bug]):
    """The bugs of a file; `@bugs.add(...)` adds the decorated function, which plants one and takes it out again."""

    def add(
        self, name: str, *places: str | Place, reference: str = "hf", parameters: tuple[str, ...] = (),
        prompt: int | None = None, **recipe: Any,
    ) -> Callable[[Callable[[Any], Iterator[None]]], Callable]:  # fmt: skip
        def register(function: Callable[[Any], Iterator[None]]) -> Callable:
            found = tuple(place(each) if isinstance(each, str) else each for each in places)
            plant = contextlib.contextmanager(function)
            self.append(Bug(name, plant, found, reference, parameters, recipe, prompt))
            return plant

        return register
