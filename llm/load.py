"""From a name or a path to a model that is ready to call, and back to a directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import OpError, Spec, Tensor, memory, quantize
from ops.quantize import FORMATS
from ops.spec import DTYPES, FLOATS

from .config import parse_config, rope_values
from .errors import CheckpointError, ConfigError, UserError
from .experts import ExpertLinear
from .model import Model
from .models import architecture
from .nn import load_parameters
from .rope import Rope
from .tokenizer import Tokenizer
from .weights import checkpoint_files, pack_all, read_directory, read_llama2c, resolve, unquantized, write_directory
from .writing import new_folder

_OF_LAYERS = {"layer_types": "layer_type", "no_rope_layers": "use_rope"}  # lists in a config -> what a layer knows


def load(
    name_or_path: str | os.PathLike[str] = "tiny",
    dtype: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    progress: bool = True,
    weights: str | None = None,
) -> Any:
    """A model with its weights and tokenizer.

    `name_or_path`: "tiny" (the embedded model), a directory in Hugging Face's layout, a `.gguf` file (the first, where
    there are several), a llama2.c `.bin` with its `tok*.bin` beside it, or a Hugging Face repository, downloaded at
    `revision`. Weights are mapped from the file and copied only where `dtype` (float32, float16, bfloat16; default: as
    stored) asks for a conversion. Of a GGUF file, matrices in Q4_0, Q8_0, Q4_K, Q6_K and MXFP4 stay packed, to the very
    same numbers, unless `weights` says otherwise; other types are unpacked. Experts are packed where the rows of each
    are a multiple of a vector's lanes, up to 16, as those of published models are.

    `weights` is how matrices are held, whatever `dtype` the rest and the activations have: one of those, or "q4" or
    "q8", packed with 4 or 8 bits a value (`ops.quantize`) and kept in the disk cache; then `dtype` is float32 when it
    is not given, and a cache is float16.

    `device` is where it runs: "cpu"; "cuda", an NVIDIA GPU; "emulate", such a GPU's kernels on the CPU, to see them
    work without one: slow, for small models. Raises UserError: ModelNotFound, ConfigError, CheckpointError or
    TokenizerError.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not supported; choose one of {', '.join(FLOATS)}")
    if weights not in (None, *FLOATS, *FORMATS):
        raise UserError(f"weights {weights!r} are not supported; choose one of {', '.join((*FORMATS, *FLOATS))}")
    check_device(device)
    path = resolve(str(name_or_path), revision)
    dtype = "float32" if dtype is None and weights in FORMATS else dtype
    read = (_load_gguf if path.suffix == ".gguf" else _load_llama2c) if path.is_file() else _load_directory
    return read(path, dtype, weights, progress).to(device)


def check_device(name: str) -> None:
    """Raises UserError where there is no such device."""
    try:
        ops.device.check(name)
    except OpError as error:
        raise UserError(str(error)) from None


def outline(name_or_path: str | os.PathLike[str], weights: str | None = None) -> Model | None:
    """The model of a config.json, or of a folder that holds no weights, without them; None where `load` finds some.

    Its dtype is the one that the config names, else float32. Raises UserError for a config that is not understood.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors*")) and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix != ".json" or not path.is_file():
        return None
    raw = _read_config(path)
    named = raw.get("dtype") or raw.get("torch_dtype")
    model = build(raw, named if named in FLOATS and weights not in FORMATS else "float32", weights)
    if (path.parent / "tokenizer.json").exists():
        model.tokenizer = Tokenizer.from_directory(path.parent)
    return model


def _load_directory(path: Path, dtype: str | None, weights: str | None, progress: bool) -> Model:
    raw, tensors = unquantized(_read_config(path / "config.json"), read_directory(path))
    _check_counts(raw, tensors)
    floats = {name: array for name, array in tensors.items() if getattr(array, "form", None) is None}
    model = build(raw, dtype or _stored_dtype(floats or tensors), weights)
    _fill(model, tensors, checkpoint_files(path), progress, as_stored=weights is None)
    if (path / "tokenizer.json").exists():
        model.tokenizer = Tokenizer.from_directory(path)
        model.tokenizer.check_fits(model.config.vocab_size)
    return model


def _check_counts(raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises CheckpointError for more layers, or experts, than there are tensors: before anything is made for each."""
    for key, value in raw.items():
        counts = key.endswith(("_layers", "_layer", "_experts")) and type(value) is int
        if counts and value > max(len(tensors), 512):
            raise CheckpointError(f"{key} is {value}, and the checkpoint has {len(tensors)} tensors: they do not fit")


def _load_llama2c(path: Path, dtype: str | None, weights: str | None, progress: bool) -> Model:
    raw, tensors = read_llama2c(path)
    model = build(raw, dtype or "float32", weights)
    _fill(model, dict(model.from_checkpoint(tensors)), [path], progress)
    usual = [path.with_name(name) for name in (f"tok{model.config.vocab_size}.bin", "tokenizer.bin")]
    beside = [each for each in usual if each.exists()] or sorted(path.parent.glob("tok*.bin"))
    if beside:
        model.tokenizer = Tokenizer.from_llama2c(beside[0], model.config.vocab_size)
    return model


def _load_gguf(path: Path, dtype: str | None, weights: str | None, progress: bool) -> Model:
    # Imported here: the library they use takes 40 ms, which other models need not pay.
    from .gguf_tokenizer import from_metadata
    from .weights.gguf import read_gguf
    from .weights.gguf_model import translate

    given = read_gguf(path)
    raw, tensors = translate(given)
    _check_counts(raw, tensors)
    model = build(raw, dtype or _stored_dtype(tensors), weights)
    _fill(model, tensors, given.files, progress, as_stored=weights is None)
    if given.metadata.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none"):
        model.tokenizer = from_metadata(given.metadata, path)
        model.tokenizer.check_fits(model.config.vocab_size)
    return model


def _hold_as_stored(model: Model, tensors: Mapping[str, Any]) -> None:
    """Matrices whose numbers a packed format holds exactly take that format."""
    forms = {name.removeprefix(model.base): getattr(array, "form", None) for name, array in tensors.items()}
    for name, spec in _matrices(model, packed=True):
        if form := forms.get(name):
            model.set_parameter(name, Spec(spec.shape, form))
            model.cache_dtype = "float16"


def _matrices(model: Model, packed: bool) -> list[tuple[str, Tensor | Spec]]:
    """Weights whose dtype may be chosen. Not packed are experts whose rows do not fill their last record."""
    whole = model.kept or ("\0",)
    apart = {
        f"{path}.weight" for path, module in model.modules() if isinstance(module, ExpertLinear) and not module.packs
    }
    return [
        (name, spec)
        for name, spec in model.parameters()
        if spec.ndim == 2 and not name.endswith(whole) and not (packed and name in apart)
    ]


def build(raw: dict[str, Any], dtype: str = "float32", weights: str | None = None) -> Model:
    """A model without weights from the values of a config.json: each weight is a Spec until it is loaded.

    Matrices are held as `weights`, by default as `dtype`.
    """
    config_class, model_class = architecture(raw.get("model_type"))
    model = model_class(parse_config(config_class, raw), dtype)
    if weights is not None:
        for name, spec in _matrices(model, packed=weights in FORMATS):
            model.set_parameter(name, Spec(spec.shape, weights))
    if weights in FORMATS:
        model.cache_dtype = "float16"
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no config.json; expected a directory in Hugging Face's layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, expected an object")
    return raw


def _stored_dtype(tensors: dict[str, Any]) -> str:
    """The float dtype that most of the weights have."""
    sizes = Counter[str]()
    for array in tensors.values():
        sizes[array.dtype.name] += array.size
    known = [name for name, _ in sizes.most_common() if name in FLOATS]
    if not known:
        raise CheckpointError(f"the weights are {', '.join(sizes) or 'missing'}; expected one of {', '.join(FLOATS)}")
    return known[0]


def _fill(
    model: Model, tensors: dict[str, Any], files: list[Path], progress: bool, as_stored: bool = False
) -> None:  # fmt: skip
    tensors = dict(model.from_checkpoint(tensors))
    if as_stored:
        _hold_as_stored(model, tensors)
    tied = tuple(f"{head}.weight" for head in model.heads) if model.config.tie_word_embeddings else ()
    unknown = {name: a.dtype.name for name, a in tensors.items() if a.dtype not in [DTYPES[each] for each in FLOATS]}
    unknown = {name: kind for name, kind in unknown.items() if kind != "float64" and not name.endswith(model.ignored)}
    if unknown:
        shown = ", ".join(f"{name} is {kind}" for name, kind in list(unknown.items())[:4])
        raise CheckpointError(f"{shown}: expected {', '.join(FLOATS)}")
    pack = functools.partial(pack_all, files=files, progress=progress)
    load_parameters(model, tensors, model.base, (*model.ignored, *tied), progress, pack)


def save(model: Model, directory: Path) -> Path:
    """Write config, weights and tokenizer in Hugging Face's layout: into a folder beside `directory`, then renamed."""
    tensors = dict(model.to_checkpoint({name: weight.numpy() for name, weight in model.named_tensors().items()}))
    values = config_values(model)
    check_expressible(model, values)
    directory = directory.expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory; choose another place to save to")
    with new_folder(directory) as work:
        write_checkpoint(work, values, tensors, model.tokenizer)
    return directory


def write_checkpoint(
    folder: Path, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokenizer: Tokenizer | None
) -> None:
    """What a folder in Hugging Face's layout consists of."""
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    write_directory(folder, tensors)
    if tokenizer is not None:
        tokenizer.save(folder)


def check_expressible(model: Model, values: dict[str, Any]) -> None:
    """Raises UserError when the config would give other weights than the model has: loading would fail."""
    wanted = {name: spec.shape for name, spec in build(values).parameters()}
    given = {name: weight.shape for name, weight in model.parameters()}
    differing = [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]
    if differing:
        raise UserError(
            f"a config.json cannot say how this model was changed: {', '.join(differing[:4])}"
            f"{f' and {len(differing) - 4} more' if len(differing) > 4 else ''} would not load as they are; "
            f"undo the change, or save the weights with llm.weights.write_file"
        )


def config_values(model: Model) -> dict[str, Any]:
    """The config.json of a model, in HF's names, as it stands: a changed number of layers is written as it is."""
    config = model.config
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if not isinstance(value, Rope)} | rope_values(config)
    layers = getattr(model, "layers", None)
    if layers is not None:
        values["num_hidden_layers"] = len(layers)
        for name, attribute in _OF_LAYERS.items():
            if name in values and all(hasattr(layer, attribute) for layer in layers):
                values[name] = [getattr(layer, attribute) for layer in layers]
    values |= {"model_type": model.model_type, "dtype": model.dtype}
    values["architectures"] = [model.hf_class or f"{type(model).__name__}ForCausalLM"]
    if model.tokenizer is not None:
        eos = sorted(model.tokenizer.eos_ids)
        values |= {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return getattr(config, "written", dict)(values)


def randomize(model: Model, seed: int = 0) -> Model:
    """Fill every weight that is not loaded with normal values of deviation 0.02; norms with ones."""
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(1 << 20) * 0.02).astype("float32")
    for name, weight in list(model.parameters()):
        if isinstance(weight, Spec):
            model.set_parameter(name, _ones(weight) if name.endswith("norm.weight") else _repeated(block, weight))
    return model


def _ones(spec: Spec) -> Tensor:
    return ops.tensor(np.ones(spec.shape, DTYPES[spec.dtype]), device=spec.device)


def _repeated(block: np.ndarray, spec: Spec) -> Tensor:
    """A tensor that repeats the values of `block`, each time from another place."""
    if spec.format is not None:
        piece = quantize.pack(np.resize(block, (256, spec.shape[1])), spec.format)
        data = memory.huge(spec.nbytes)
        for start in range(0, data.size, piece.size):
            data[start : start + piece.size] = piece[: data.size - start]
        return ops.tensor_from_packed(data, spec)
    result = ops.empty(spec)
    flat, source = result.numpy().reshape(-1), block.astype(DTYPES[spec.dtype])
    for start in range(0, flat.size, source.size):
        flat[start : start + source.size] = np.roll(source, start % 977)[: flat.size - start]
    return result
