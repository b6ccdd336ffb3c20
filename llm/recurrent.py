"""What recurrent models share: states of a fixed size, which stand in the place of keys and values."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

import ops
from ops import Tensor

from .cache import Cache
from .model import Model

State = TypeVar("State", bound=tuple[Tensor, ...])


class Memory(Cache):
    """The layers' states in the place of keys and values; a state is a tuple of tensors.

    A state cannot be shortened: after `truncate` what is left is read again, by the next forward.
    """

    def __init__(self, limit: int, dtype: str | None = None, device: str = "cpu"):
        super().__init__(limit, dtype, device)
        self._states: dict[int, tuple] = {}
        self._next: dict[int, tuple] = {}  # of the forward that runs; they count when it commits

    def state(self, layer: int, start: State) -> State:
        """What the layer remembers; `start` before the first token."""
        return self._states.get(layer, start)  # type: ignore[return-value]

    def keep(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """What the layer remembers after the tokens of this forward."""
        self._next[layer] = state

    def extend(self, tokens: int) -> Tensor:
        self._next = {}
        return super().extend(tokens)

    def commit(self, ids: Tensor) -> None:
        super().commit(ids)
        self._states, self._next = {**self._states, **self._next}, {}

    def unread(self, ids: Tensor) -> Tensor:
        """The tokens that a forward of `ids` reads: also those that the states have lost."""
        if not self.ids or self._states:
            return ids
        return ops.tensor(np.array(self.ids + ids.numpy().tolist(), "int32"), device=ids.device)

    def truncate(self, length: int) -> None:
        if length != len(self):
            super().truncate(length)
            self._states = {}

    def copy(self) -> Memory:
        twin = Memory(self.limit, self.dtype, self.device)
        twin.ids, twin._states = [*self.ids], dict(self._states)  # no op writes to a state
        return twin

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for state in self._states.values() for each in state)

    def __repr__(self) -> str:
        return f"<state of {len(self)} tokens, {len(self._states)} layers, {self.nbytes} bytes>"


class Recurrent(Model):
    """Base of the models whose cache is a `Memory`."""

    @property
    def token_values(self) -> int:
        return 0  # the state is as large after a million tokens as after one

    def new_cache(self, dtype: str | None = None) -> Memory:
        return Memory(self.context, dtype, self.device)
