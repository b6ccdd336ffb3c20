"""A model of transformers with the weights of one of ours."""

from __future__ import annotations

from typing import Any


def twin(model: Any, **changes: Any) -> Any:
    """The transformers model that computes what `model` does, float32; `changes` to its config."""
    import torch
    import transformers

    from llm.load import config_values

    values = {key: value for key, value in config_values(model).items() if value is not None} | changes
    kept = {key: values[key] for key in values.keys() - {"dtype", "architectures", "model_type"}}
    config = transformers.AutoConfig.for_model(model.model_type, **kept)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {name: torch.tensor(weight.numpy().astype("float32")) for name, weight in model.named_tensors().items()}
    theirs.load_state_dict(tensors, strict=not model.config.tie_word_embeddings)
    return theirs.float().eval()
