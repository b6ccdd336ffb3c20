"""LoRA adapters against PEFT itself and an independent NumPy; on, off, merged and restored; hostile folders."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llm
import ops
from llm.errors import CheckpointError, ConfigError, UserError
from llm.weights import write_file

from . import small
from .test_families import drawn, named, raw

IDS = [1, 2, 3, 50, 60, 9, 9, 7]
PREFIX = "base_model.model.model."


def adapter(
    rng: np.random.Generator,
    model: Any,
    folder: Path,
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    rank: int = 4,
    dtype: Any = "float32",
    **settings: Any,
) -> Path:
    """A folder as PEFT writes it, of random matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, module in model.modules():
        if isinstance(module, llm.Linear) and path.endswith(targets):
            rows, inputs = module.weight.shape
            tensors[f"{PREFIX}{path}.lora_A.weight"] = (rng.standard_normal((rank, inputs)) * 0.3).astype(dtype)
            tensors[f"{PREFIX}{path}.lora_B.weight"] = (rng.standard_normal((rows, rank)) * 0.3).astype(dtype)
    write_file(folder / "adapter_model.safetensors", tensors)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return folder


def deltas(folder: Path, scale: float) -> dict[str, np.ndarray]:
    """What is added to each weight, float64, by the definition."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors}
    return {
        name: scale
        * (
            tensors[f"{PREFIX}{name}.lora_B.weight"].astype("float64")
            @ tensors[f"{PREFIX}{name}.lora_A.weight"].astype("float64")
        )
        for name in names
    }


def with_added(model: Any, *added: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of the model whose weights have the deltas in them; the model is then as it was."""
    weights = {name: weight for name, weight in model.parameters() if any(name[:-7] in each for each in added)}
    for name, weight in weights.items():
        total = sum((each[name[:-7]] for each in added if name[:-7] in each), weight.numpy().astype("float64"))
        model.set_parameter(name, ops.tensor(total.astype("float32")))
    logits = model(IDS).numpy().copy()
    for name, weight in weights.items():
        model.set_parameter(name, weight)
    return logits


def near(a: np.ndarray, b: np.ndarray, bound: float = 2e-4) -> bool:
    return bool(np.abs(a - b).max() <= bound * np.abs(b).max())


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"lora_alpha": 3.0}, 0.75), ({"use_rslora": True}, 4.0), ({"lora_alpha": 0}, 0.0)],
)
def test_it_adds_its_product(rng, tmp_path, settings, scale):
    model = small.model(rng)
    folder = adapter(rng, model, tmp_path / "a", **settings)
    plain, wanted = model(IDS).numpy().copy(), with_added(model, deltas(folder, scale))
    given = llm.load_adapter(model, folder)
    assert near(model(IDS).numpy(), wanted) and (scale == 0 or not near(wanted, plain, 1e-2))
    given.disable()
    assert np.array_equal(model(IDS).numpy(), plain)
    given.enable()
    given.remove()
    assert np.array_equal(model(IDS).numpy(), plain)


@pytest.mark.parametrize("bits", ["float16", ml_dtypes.bfloat16, "float64"])
def test_matrices_of_other_types(rng, tmp_path, bits):
    model = small.model(rng)
    folder = adapter(rng, model, tmp_path / "a", dtype=bits)
    if bits is ml_dtypes.bfloat16:
        from llm.weights import read_file

        found = read_file(folder / "adapter_model.safetensors")
        write_file(folder / "adapter_model.safetensors", {name: each.astype("float32") for name, each in found.items()})
        wanted = with_added(model, deltas(folder, 2.0))
        write_file(folder / "adapter_model.safetensors", found)
    else:
        wanted = with_added(model, deltas(folder, 2.0))
    llm.load_adapter(model, folder)
    assert near(model(IDS).numpy(), wanted)


def test_on_and_off_by_context_and_by_thread(rng, tmp_path):
    model = small.model(rng)
    plain = model(IDS).numpy().copy()
    given = llm.load_adapter(model, adapter(rng, model, tmp_path / "a"))
    changed = model(IDS).numpy().copy()
    seen: list[np.ndarray] = []
    with given.active(False):
        assert not given.on and np.array_equal(model(IDS).numpy(), plain)
        with given.active():
            assert np.array_equal(model(IDS).numpy(), changed)
        thread = threading.Thread(target=lambda: seen.append(model(IDS).numpy().copy()))  # another context
        thread.start()
        thread.join()
        assert not given.on
    given.disable()
    with given.active() as same:
        assert same is given and np.array_equal(model(IDS).numpy(), changed)
    assert np.array_equal(model(IDS).numpy(), plain) and np.array_equal(seen[0], changed)
    with pytest.raises(RuntimeError), given.active():
        raise RuntimeError
    assert not given.on and "off" in repr(given)


def test_several_add_up_in_any_order(rng, tmp_path):
    model = small.model(rng)
    plain, before = model(IDS).numpy().copy(), dict(model.parameters())
    folders = [adapter(rng, model, tmp_path / "a"), adapter(rng, model, tmp_path / "b", ("q_proj", "v_proj"), 3)]
    added = [deltas(folders[0], 2.0), deltas(folders[1], 8 / 3)]
    both, alone = with_added(model, *added), with_added(model, added[1])
    first, second = (llm.load_adapter(model, folder) for folder in folders)
    assert near(model(IDS).numpy(), both)
    with first.active(False):
        assert near(model(IDS).numpy(), alone)
    first.merge()
    assert near(model(IDS).numpy(), both)
    second.merge()
    assert near(model(IDS).numpy(), both)
    first.unmerge()  # not the last that was merged
    first.disable()
    assert near(model(IDS).numpy(), alone)
    second.unmerge()
    second.disable()
    assert np.array_equal(model(IDS).numpy(), plain)
    assert all(weight is before[name] for name, weight in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merged_and_restored(rng, tmp_path, dtype):
    model = small.model(rng, dtype)
    folder = adapter(rng, model, tmp_path / "a")
    before = {name: weight.numpy().tobytes() for name, weight in model.parameters()}
    given = llm.load_adapter(model, folder)
    live = model(IDS).numpy().astype("float32")
    given.merge()
    for name, delta in deltas(folder, 2.0).items():
        weight = dict(model.parameters())[f"{name}.weight"]
        wanted = np.frombuffer(before[f"{name}.weight"], weight.numpy().dtype).reshape(delta.shape) + delta
        assert weight.dtype == dtype
        assert near(
            weight.numpy().astype("float64"), wanted, {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
        )
    assert near(model(IDS).numpy().astype("float32"), live, {"float32": 2e-4, "float16": 5e-2, "bfloat16": 0.5}[dtype])
    saved = llm.load(model.save(tmp_path / "merged"))
    assert np.array_equal(saved(IDS).numpy(), model(IDS).numpy())
    given.unmerge()
    assert {name: weight.numpy().tobytes() for name, weight in model.parameters()} == before


def test_merging_that_cannot_be(rng, tmp_path):
    model = small.model(rng)
    given = llm.load_adapter(model, adapter(rng, model, tmp_path / "a"))
    with pytest.raises(UserError, match="is not merged"):
        given.unmerge()
    given.merge()
    for refused in (given.merge, given.disable, given.remove, lambda: given.active(False).__enter__()):
        with pytest.raises(UserError, match=r"merged into the weights; unmerge\(\) it first"):
            refused()
    kept = model.layers[2].mlp.down_proj.weight
    model.layers[2].mlp.down_proj.weight = ops.tensor(kept.numpy())
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.down_proj was changed"):
        given.unmerge()
    assert given.merged and model.layers[0].mlp.down_proj._merged is not None  # nothing was done by half
    model.layers[2].mlp.down_proj.weight = kept
    given.unmerge()


@pytest.mark.parametrize("form", ["q4", "q8"])
def test_packed_weights_take_it_live(rng, tmp_path, form):
    source = small.model(rng).save(tmp_path / "source")
    model = llm.load(source, weights=form)
    folder = adapter(rng, model, tmp_path / "a")
    x, linear = ops.tensor(rng.standard_normal((5, 32)).astype("float32")), model.layers[0].self_attn.q_proj
    plain = linear(x).numpy().copy()
    given = llm.load_adapter(model, folder)
    wanted = plain + x.numpy() @ deltas(folder, 2.0)["layers.0.self_attn.q_proj"].T
    assert near(linear(x).numpy(), wanted, 1e-5)
    with pytest.raises(UserError, match=f"is {form}, into which nothing can be merged"):
        given.merge()
    assert not given.merged


def test_patterns(rng, tmp_path):
    model = small.model(rng)
    alphas = {"layers.1.self_attn.q_proj": 2, "down_proj": 16}
    folder = adapter(rng, model, tmp_path / "a", alpha_pattern=alphas, rank_pattern={"q_proj": 4}, r=7)
    with pytest.raises(CheckpointError, match="the settings give rank 7"):
        llm.load_adapter(model, folder)
    folder = adapter(rng, model, tmp_path / "a", alpha_pattern=alphas, rank_pattern={"q_proj": 4, "down_proj": 4}, r=7)
    given = llm.load_adapter(model, folder)
    for name, delta in deltas(folder, 1.0).items():
        alpha = 2 if name == "layers.1.self_attn.q_proj" else 16 if name.endswith("down_proj") else 8
        assert near(given.deltas[name].b.numpy() @ given.deltas[name].a.numpy(), delta * alpha / 4, 1e-5)


def changed_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("bias", "all"), ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]), ("megatron_config", {"a": 1}), ("use_qalora", True), ("of_tomorrow", 1.5),
        ("alora_invocation_tokens", [3]), ("r", 0), ("r", True), ("r", "8"), ("lora_alpha", "x"), ("peft_type", "LOHA"),
        ("lora_alpha", math.inf), ("rank_pattern", {"(a+)+$": 3}), ("alpha_pattern", [1]), ("use_rslora", 1),
        ("init_lora_weights", ["pissa"]), ("rank_pattern", {"q_proj": "many"}),
    ],
)  # fmt: skip
def test_settings_that_are_not_understood(rng, tmp_path, key, value):
    model = small.model(rng)
    folder = adapter(rng, model, tmp_path / "a")
    changed_config(folder, **{key: value})
    with pytest.raises(ConfigError, match=key):
        llm.load_adapter(model, folder)
    assert all(module._deltas == () for _, module in model.modules() if isinstance(module, llm.Linear))


def test_settings_that_are_off_or_about_training(rng, tmp_path):
    model = small.model(rng)
    off: dict[str, Any] = {"use_dora": False, "modules_to_save": None, "loftq_config": {}, "of_tomorrow": None}
    training: dict[str, Any] = {"init_lora_weights": "gaussian", "lora_dropout": 0.3}
    about: dict[str, Any] = {"megatron_core": "megatron.core", "base_model_name_or_path": "x/y"}
    llm.load_adapter(model, adapter(rng, model, tmp_path / "a", **off, **training, **about))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    from llm.weights import read_file

    return read_file(folder / "adapter_model.safetensors")


def test_tensors_that_do_not_fit(rng, tmp_path):
    model = small.model(rng)
    folder = adapter(rng, model, tmp_path / "a")
    good = {name: each.copy() for name, each in tensors_of(folder).items()}
    q = f"{PREFIX}layers.0.self_attn.q_proj.lora_"

    def refused(message: str, **changes: Any) -> None:
        tensors = {name.replace("~", "."): each for name, each in (good | changes).items() if each is not None}
        write_file(folder / "adapter_model.safetensors", tensors)
        with pytest.raises(CheckpointError, match=message):
            llm.load_adapter(model, folder)

    ones = np.ones((4, 4), "float32")
    refused("q_proj has only one of", **{f"{q}A.weight": None})
    refused(r"q_proj is among target_modules and not in", **{f"{q}A.weight": None, f"{q}B.weight": None})
    refused(r"q_proj is \[32, 32\], lora_A \[4, 31\]", **{f"{q}A.weight": np.ones((4, 31), "float32")})
    refused(r"q_proj is \[32, 32\], lora_A \[5, 32\]", **{f"{q}A.weight": np.ones((5, 32), "float32")})
    refused("no LoRA matrices", **{f"{q}A.weight": np.ones((4, 32), "int32")})
    refused("no LoRA matrices", **{f"{PREFIX}layers.0.self_attn.q_proj.lora_magnitude_vector": ones})
    refused("no LoRA matrices", **{f"{PREFIX}embed_tokens.lora_embedding_A": ones})
    nowhere = f"{PREFIX}layers.7.self_attn.q_proj.lora_"
    refused("q_proj is no module", **{f"{nowhere}A.weight": ones, f"{nowhere}B.weight": ones})
    other = f"{PREFIX}layers.0.self_attn.k_proj.lora_"
    fits = {f"{other}A.weight": np.ones((4, 32), "float32"), f"{other}B.weight": np.ones((16, 4), "float32")}
    refused("k_proj is not among target_modules", **fits)
    twice = {name.removeprefix("base_model.model."): each for name, each in good.items()}
    refused("is there twice", **twice)
    bare = {name.removeprefix(PREFIX): each for name, each in good.items()}
    refused("with and without 'model.' in front", **bare)
    norm = f"{PREFIX}norm.lora_"
    refused("a RMSNorm, only linear layers", **{f"{norm}A.weight": ones, f"{norm}B.weight": ones})
    q_proj = model.layers[0].self_attn.q_proj.weight.numpy()
    refused("another than the float32 weight", **{f"{PREFIX}layers.0.self_attn.q_proj.base_layer.weight": q_proj + 1})
    write_file(folder / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        llm.load_adapter(model, folder)


def test_experts_and_tied_heads_are_refused(rng, tmp_path):
    model = drawn(rng, raw(named("mixtral"), tie_word_embeddings=True))
    for name, kind in (("layers.0.block_sparse_moe.experts.up_proj", "ExpertLinear"), ("lm_head", "embedding's table")):
        folder = adapter(rng, model, tmp_path / name, ("q_proj",))
        tensors = {each: array.copy() for each, array in tensors_of(folder).items()}
        path = next((each for each, module in model.modules() if type(module).__name__ == kind), name)
        front = "base_model.model." + ("" if name == "lm_head" else "model.")
        tensors |= {f"{front}{path}.lora_{each}.weight": np.ones((4, 4), "float32") for each in "AB"}
        write_file(folder / "adapter_model.safetensors", tensors)
        with pytest.raises(CheckpointError, match=kind):
            llm.load_adapter(model, folder)


def test_folders_that_hold_no_adapter(rng, tmp_path):
    model = small.model(rng)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        llm.load_adapter(model, tmp_path)
    folder = adapter(rng, model, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        llm.load_adapter(model, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(CheckpointError):
        llm.load_adapter(model, folder)
    for text in ("[1]", "{", "[" * 100000, "\ud800".encode("utf-8", "surrogatepass")):
        (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError):
            llm.load_adapter(model, folder)


def test_command(limpid, rng, tmp_path):
    model = small.model(rng)
    source = str(model.save(tmp_path / "source"))
    one, two = adapter(rng, model, tmp_path / "a"), adapter(rng, model, tmp_path / "b", ("v_proj",))
    llm.load_adapter(model, one)
    llm.load_adapter(model, two)
    wanted = model.generate("a", max_tokens=8)
    given = limpid("generate", "a", "-m", source, "-n", "8", "--adapter", str(one), "--adapter", str(two))
    assert given[0] == 0 and given[1].endswith(f"a{wanted}\n")
    code, _, errors = limpid("generate", "a", "-m", source, "--adapter", str(tmp_path))
    assert code == 2 and "adapter_config.json" in errors and errors.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_alpha": 5},
        {"target_modules": "all-linear", "rank_pattern": {"layers.1.mlp.up_proj": 3}, "alpha_pattern": {"k_proj": 1.5}},
        {"target_modules": r".*\.[01]\..*o_proj", "lora_dropout": 0.5},
        {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda settings: str(settings["target_modules"]),
)
def test_peft_computes_the_same(rng, tmp_path, settings):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    peft = pytest.importorskip("peft", reason="not installed: pip install -e '.[parity]'")
    source = small.model(rng).save(tmp_path / "source")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0].numpy()
    model = llm.load(source)
    plain = model(IDS).numpy().copy()
    given = llm.load_adapter(model, tmp_path / "adapter")
    assert near(model(IDS).numpy(), wanted) and not near(plain, wanted, 1e-2)
    given.merge()
    assert near(model(IDS).numpy(), wanted)
