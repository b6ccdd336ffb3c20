"""A model of Hugging Face's transformers as a reference: run in this process, its intermediates under our names.

Hooks tell what its modules take and give; an attention function of our own, which calls the model's eager one, tells
the rotated queries and keys, the values and the mixed values. Nothing is downloaded, and no code of a checkpoint runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ops

from .values import Values

_NAME = "limpid"  # of our attention function in transformers' tables
_CONSTANTS = {"scaling": "scale", "sliding_window": "window", "softcap": "softcap"}
_EPSILONS = ("variance_epsilon", "eps")


def is_torch(model: Any) -> bool:
    """True for a torch module; torch is not imported to tell."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def load(folder: str | Path) -> Any:
    """The causal language model of a folder in Hugging Face's layout, float32, for use as a reference.

    Raises OpError where transformers or torch are missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        missing = f"{error.name} is not installed: pip install 'limpid[parity]', or choose another reference"
        raise ops.OpError(missing) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except (OSError, ValueError) as error:
        raise ops.OpError(f"transformers cannot load {folder}: {error}") from error


class HuggingFace:
    """A transformers model as a reference. `base` is the prefix of the names that ours have not, such as `model.`."""

    def __init__(self, model: Any, base: str):
        self.model, self.base = model, base

    @property
    def label(self) -> str:
        return f"{type(self.model).__name__} of transformers"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Weights by name, as our models have them: a Conv1D's turned round."""
        found = {name: _array(each) for name, each in self.model.state_dict().items()}
        for path, module in self.model.named_modules():
            if type(module).__name__ == "Conv1D":  # [inputs, outputs]
                found[f"{path}.weight"] = np.ascontiguousarray(found[f"{path}.weight"].T)
        return found

    def run(self, ids: Sequence[int]) -> Values:
        """What the model gives for the token ids, in one forward without a cache."""
        import torch

        values = Values(len(ids), str(self.model.dtype).removeprefix("torch."))
        was_training = self.model.training
        with torch.no_grad(), ExitStack() as stack:
            stack.callback(self.model.train, was_training)
            self.model.eval()
            self._forward(ids[:1])  # NTK's frequencies are those of the longest text since a short one: start afresh
            stack.enter_context(self._attention(values))
            for path, module in self.model.named_modules():
                hook = partial(self._after, values, self._ours(path))
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._forward(ids)
        self._constants(values)
        return values

    def _forward(self, ids: Sequence[int]) -> None:
        import torch

        self.model(input_ids=torch.tensor([[int(each) for each in ids]]), use_cache=False)

    def _ours(self, path: str) -> str | None:
        """Our path of one of its modules; None for the base model, which ours are without."""
        return None if path and path == self.base.rstrip(".") else path.removeprefix(self.base)

    def _after(self, values: Values, path: str | None, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        given, gave = _first((*args, *kwargs.values())), _first(output)
        if path is None:
            return
        if given is not None and given.ndim == 3:
            values.add(path, "input", _array(given[0]))
        if gave is not None and gave.ndim == 3 and len(gave[0]) == values.tokens:
            values.add(path, "output", _array(gave[0]))

    @contextmanager
    def _attention(self, values: Values) -> Iterator[None]:
        """Switch on the attention function that tells what it takes and gives."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        paths = {id(module): self._ours(path) for path, module in self.model.named_modules()}

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            output = eager(module, q, k, v, mask, *args, **kwargs)
            path = paths[id(module)]
            if path is not None:
                for slot, each in (("q", q), ("k", k), ("v", v)):
                    values.add(path, slot, _array(each[0].transpose(0, 1)))
                values.add(path, "mixed", _array(output[0][0]))
                given = {ours: kwargs[theirs] for theirs, ours in _CONSTANTS.items() if theirs in kwargs}
                values.constants[path, "attention"] = given
            return output

        configs = {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None}
        before = [(each, each._attn_implementation) for each in configs.values()]
        ALL_ATTENTION_FUNCTIONS[_NAME] = attend
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
        try:
            for each, _ in before:
                each._attn_implementation = _NAME
            yield
        finally:
            for each, name in before:
                each._attn_implementation = name
            del ALL_ATTENTION_FUNCTIONS[_NAME]
            del type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping[_NAME]

    def _constants(self, values: Values) -> None:
        for path, module in self.model.named_modules():
            ours = self._ours(path)
            epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
            if isinstance(epsilon, float) and ours is not None:
                values.constants |= {(ours, op): {"eps": epsilon} for op in ("rms_norm", "layer_norm")}
            if hasattr(module, "inv_freq"):
                values.rotary.append((_array(module.inv_freq), float(getattr(module, "attention_scaling", 1.0))))


def _first(given: Any) -> Any:
    """The first tensor of what a module takes or gives; of a model's output the logits."""
    import torch

    if isinstance(given, torch.Tensor):
        return given
    if hasattr(given, "values"):
        given = tuple(given.values())
    return next((each for each in given if isinstance(each, torch.Tensor)), None) if isinstance(given, tuple) else None


def _array(tensor: Any) -> np.ndarray:
    """A copy as float32; integers as they are."""
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), copy=True)
