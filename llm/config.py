"""config.json -> the dataclass of a model: every key is understood, known to be harmless, or an error."""

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llm.errors import ConfigError
from llm.rope import ROPE_KEYS, Rope, parse_rope

C = TypeVar("C")

# Keys that do not change what a forward computes: about files, training, tokens, generation, or the library itself.
_HARMLESS_NAMES = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
_flash_attn_2_enabled _name_or_path architectures attn_implementation auto_map cache_implementation
custom_pipelines dtype language license model_type tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version unsloth_fixed use_bfloat16 use_cache
attention_dropout attention_probs_dropout_prob attn_dropout attn_dropout_prob attn_pdrop aux_loss_alpha
classifier_dropout dropout embd_pdrop embedding_dropout ep_size ffn_dropout gradient_checkpointing
hidden_dropout hidden_dropout_prob initializer_factor initializer_range output_router_logits resid_pdrop
residual_dropout router_aux_loss_coef router_jitter_noise router_z_loss_coef seq_aux tf_legacy_loss
bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id
mask_token_id pad_token_id sep_token_id suppress_tokens begin_suppress_tokens unk_token_id
bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences prefix remove_invalid_values repetition_penalty temperature
top_k top_p typical_p
finetuning_task id2label label2id num_labels output_attentions output_hidden_states output_scores
problem_type return_dict return_dict_in_generate summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj task_specific_params use_return_dict
"""
HARMLESS = frozenset(_HARMLESS_NAMES.split())
_HARMLESS_PREFIXES = ("unsloth_",)

# Harmless at one value, which says that a feature is off: (that value, what any other would mean).
HARMLESS_AT: Mapping[str, tuple[Any, str]] = {
    "add_cross_attention": (False, "it adds cross-attention"),
    "attention_bias": (False, "it adds biases to the attention projections"),
    "attn_logit_softcapping": (None, "it caps the attention scores"),
    "chunk_size_feed_forward": (0, "it splits the feed-forward"),
    "clip_qkv": (None, "it clamps queries, keys and values"),
    "cross_attention_hidden_size": (None, "it adds cross-attention"),
    "embedding_multiplier": (1, "it scales the embeddings"),
    "attention_multiplier": (1, "it scales the attention scores"),
    "residual_multiplier": (1, "it scales the residual branches"),
    "logits_scaling": (1, "it scales the logits"),
    "lm_head_bias": (False, "it adds a bias to the logits"),
    "logit_scale": (1, "it scales the logits"),
    "final_logit_softcapping": (None, "it caps the logits"),
    "full_attn_mod": (1, "it makes some layers attend to everything"),
    "interpolate_factor": (1, "it stretches the positions"),
    "is_decoder": (False, "it changes the attention mask"),
    "is_encoder_decoder": (False, "it is an encoder-decoder"),
    "is_llama_config": (True, "the model is not a Llama"),
    "mlp_bias": (False, "it adds biases to the feed-forward"),
    "mlp_only_layers": ([], "it makes some layers dense"),
    "partial_rotary_factor": (1, "it rotates only a part of each head"),
    "pretraining_tp": (1, "it splits the projections, which changes the order of the sums"),
    "pruned_heads": ({}, "it removes heads"),
    "qk_layernorm": (False, "it normalises queries and keys"),
    "qkv_bias": (False, "it adds biases to the attention projections"),
    "quantization": (None, "the weights are quantized by another library: use the unquantized checkpoint"),
    "quantization_config": (None, "the weights are quantized by another library: use the unquantized checkpoint"),
    "compression_config": (None, "the weights are compressed by another library: use the uncompressed checkpoint"),
    "rms_norm": (True, "its norms take the mean away and add a bias"),
    "rope_interleaved": (False, "it rotates neighbouring pairs"),
    "rope_scaling": (None, "it changes the rotary frequencies"),
    "rope_parameters": (None, "it sets the rotary frequencies"),
    "shared_expert_intermediate_size": (0, "it adds a shared expert"),
    "sliding_window": (None, "it limits how far attention reaches"),
    "tie_encoder_decoder": (False, "it is an encoder-decoder"),
    "use_mrope": (False, "it uses multimodal rotary positions"),
    "use_qk_norm": (False, "it normalises queries and keys"),
    "use_sliding_window": (False, "it limits how far attention reaches"),
}
LayerType = Literal["full_attention", "sliding_attention"]
_SLIDING = ("sliding_window", "max_window_layers")  # mean nothing where use_sliding_window is false

_POSITIVE = frozenset(
    {
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "no_rope_layer_interval",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "query_pre_attn_scalar",
        "sliding_window",
        "sliding_window_pattern",
        "vocab_size",
        *("n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
        *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
        *("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "context_length", "attention_hidden_size"),
        *("num_heads", "state_size", "n_groups", "expand", "conv_kernel"),
    }
)
_ABOVE_ZERO = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "clip_qkv"})


def parse_config(cls: type[C], raw: Mapping[str, Any], *, ignored: Collection[str] = ()) -> C:
    """Build the dataclass `cls`, whose fields carry HF's names, from the values of a config.json.

    A missing key takes the field's default. A key that is neither a field, nor in `ignored`, nor known to leave the
    arithmetic alone is an error: it is never dropped. A field annotated `Rope` is built from all the rope keys, its
    metadata being further arguments of `parse_rope`. Where old checkpoints spell things otherwise, the class has a
    static method `modern(values)`, which gives the values in the names of its fields; where transformers still wants
    the old ones, another, `written(values)`, gives them back.
    Raises ConfigError, which lists everything found wrong: keys missing, not understood, or of the wrong type.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"parse_config builds dataclasses, given {cls!r}")
    raw = getattr(cls, "modern", dict)(raw)
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    ropes = {name: field for name, field in fields.items() if hints[name] is Rope}
    plain = {name: field for name, field in fields.items() if name not in ropes}
    understood = plain.keys() | set(ignored) | (ROPE_KEYS if ropes else set())
    problems = [_refusal(key, raw, fields) for key in raw if key not in understood]
    values: dict[str, Any] = {}
    missing: list[str] = []
    for name, field in plain.items():
        if name in raw:
            try:
                values[name] = _convert(name, raw[name], hints[name])
            except ConfigError as error:
                problems.append(str(error))
        elif _required(field):
            missing.append(name)
    if missing:
        problems.insert(0, f"missing keys {', '.join(map(repr, missing))}")
    if problems := [problem for problem in problems if problem]:
        raise ConfigError(f"config of {raw.get('model_type', cls.__name__)}: {'; '.join(problems)}")
    if ropes:
        known = {name: field.default for name, field in plain.items() if field.default is not dataclasses.MISSING}
        known |= {key: value for key, value in raw.items() if value is not None}
        for name, field in ropes.items():
            values[name] = parse_rope(known, _head_dim(known), **field.metadata)
        _check_heads(known)
    return cls(**values)


def rope_values(config: Any) -> dict[str, Any]:
    """The keys of a config.json that give the `Rope` fields of `config` back."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        rope = getattr(config, field.name)
        if not isinstance(rope, Rope):
            continue
        scaling = {} if rope.scaling is None else dataclasses.asdict(rope.scaling)
        scaling = {key: value for key, value in scaling.items() if value is not None}
        part = rope.rotary_dim / config.head_dim
        found: dict[str, Any] = {"rope_theta": rope.theta}
        found |= {"partial_rotary_factor": part} if part != field.metadata.get("partial_rotary_factor", 1.0) else {}
        if layer_type := field.metadata.get("layer_type"):
            values.setdefault("rope_parameters", {})[layer_type] = {"rope_type": "default"} | found | scaling
        else:
            values |= found | ({"rope_scaling": scaling} if scaling else {})
    return values


def check_layer_types(config: Any) -> None:
    """Raises ConfigError unless `layer_types` has an entry a layer, and a window where one asks for it."""
    kinds, layers = config.layer_types, config.num_hidden_layers
    if len(kinds) != layers:
        raise ConfigError(f"layer_types has {len(kinds)} entries, expected {layers}, one for each layer")
    if "sliding_attention" in kinds and config.sliding_window is None:
        raise ConfigError("layer_types asks for sliding_attention, and there is no sliding_window (or it is off)")


def _refusal(key: str, raw: Mapping[str, Any], fields: Collection[str]) -> str:
    """Why a key that is no field cannot be accepted; empty if it can."""
    value = raw[key]
    if key in HARMLESS or key.startswith(_HARMLESS_PREFIXES):
        return ""
    if key in _SLIDING and raw.get("use_sliding_window") is False:
        return ""
    if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
        return ""
    if key in HARMLESS_AT:
        harmless, reason = HARMLESS_AT[key]
        same = value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
        return "" if same else f"{key!r} is {_short(value)}, only {harmless!r} is supported here: {reason}"
    close = difflib.get_close_matches(key, fields, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown key {key!r} = {_short(value)}, which could change the arithmetic{hint}"


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _head_dim(values: Mapping[str, Any]) -> int:
    """How wide the heads are that rotate."""
    given = values.get("qk_rope_head_dim") or values.get("head_dim")
    if given:
        return given
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise ConfigError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is missing"
        )
    return width // heads


def _check_heads(values: Mapping[str, Any]) -> None:
    """Each head of keys and values serves as many heads of queries."""
    heads, groups = values["num_attention_heads"], values.get("num_key_value_heads")
    if groups and heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation wants it: an int serves as a float, a list as a tuple; nothing else is bent."""
    if _fits(value, hint):
        if _is_bad_size(key, value):
            least = "at least 1" if key in _POSITIVE else "more than 0" if key in _ABOVE_ZERO else "no negative number"
            raise ConfigError(f"{key!r} is {value}, expected {least}")
        return _shaped(value, hint)
    raise ConfigError(f"{key!r} is {_short(value)} ({_json_type(value)}), expected {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300  # false for infinity and NaN, which JSON lets through
    base = origin or hint
    if base in (list, tuple):
        items = [arg for arg in args if arg is not Ellipsis]
        fixed = base is tuple and args and args[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(items)):
            return False
        hints = items if fixed else (items or [Any]) * len(value)
        return all(_fits(item, item_hint) for item, item_hint in zip(value, hints, strict=True))
    if base in (dict, Mapping):
        inner = args[1] if args else Any
        return isinstance(value, Mapping) and all(isinstance(k, str) and _fits(v, inner) for k, v in value.items())
    return type(value) is base  # int, str, bool: a bool is no int here


def _shaped(value: Any, hint: Any) -> Any:
    """The floats and tuples of the annotation from JSON's ints and lists; the value is known to fit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # An exact type first: `int | float` keeps an int.
        option = next((arg for arg in args if type(value) is arg), None)
        return _shaped(value, option or next(arg for arg in args if _fits(value, arg)))
    if hint is float:
        return float(value)
    if (origin or hint) in (list, tuple):
        items = [arg for arg in args if arg is not Ellipsis] or [Any]
        hints = items if len(items) == len(value) else items[:1] * len(value)
        return (origin or hint)(_shaped(item, item_hint) for item, item_hint in zip(value, hints, strict=True))
    return value


def _is_bad_size(key: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_bad_size(key, item) for item in value)
    least = 1 if key in _POSITIVE else 0
    return type(value) in (int, float) and (value < least or (value == 0 and key in _ABOVE_ZERO))


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if (origin or hint) in (list, tuple):
        items = [_describe(arg) for arg in args if arg is not Ellipsis]
        return f"list of {', '.join(items)}" if items else "list"
    if (origin or hint) in (dict, Mapping):
        return "object"
    return "null" if hint in (None, types.NoneType) else "finite float" if hint is float else hint.__name__


def _json_type(value: Any) -> str:
    names = {type(None): "null", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
