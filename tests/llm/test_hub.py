"""Finding a model: names, paths, and what the Hub can answer (its client is replaced: no network)."""

from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

import llm.errors
from llm.errors import ModelNotFound
from llm.weights import resolve

RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid/api"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stands in for snapshot_download: keeps its arguments, raises hub["raises"] or gives files hub["files"]."""
    state: dict[str, Any] = {"raises": None, "files": ["config.json", "model.safetensors"]}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        state.update(repo=repo_id, options=options)
        if isinstance(state["raises"], Exception):
            raise state["raises"]
        folder = tmp_path / "snapshot"
        folder.mkdir()
        for name in state["files"]:
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **options: Any) -> str:
        raise AssertionError(f"the Hub was asked: {args}, {options}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def refused(name: str, revision: str | None = None) -> str:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("no_hub")
def test_tiny_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = Path(llm.errors.__file__).parent / "tiny"
    assert resolve("tiny") == embedded
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == embedded
    assert resolve("./tiny").resolve() == tmp_path / "tiny"


@pytest.mark.usefixtures("no_hub")
def test_existing_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "stories.bin").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/model") == Path("org/model")
    assert resolve("stories.bin") == Path("stories.bin")
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.usefixtures("no_hub")
def test_missing_paths_name_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qwen3-0.6b").mkdir()
    (tmp_path / "stories.bin").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path} has no 'qwen3-0.6'; did you mean 'qwen3-0.6b'?" in refused(f"{tmp_path}/qwen3-0.6")
    assert "it holds 'qwen3-0.6b', 'stories.bin'" in refused(f"{tmp_path}/zzz/deeper/still")
    assert "did you mean 'stories.bin'?" in refused("storys.bin")
    assert "has no 'x'" in refused("./x") and "has no 'a'" in refused("a/b/c")
    assert "no model at '~nobody-here/x'" in refused("~nobody-here/x")
    assert "it holds no directories or model files" in refused(f"{tmp_path}/qwen3-0.6b/zzz")


@pytest.mark.usefixtures("no_hub")
def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "give its directory" in refused(str(tmp_path / "model.safetensors"))
    assert "no model given" in refused("") and "no model given" in refused("  ")
    assert "has no revision 'main'" in refused("tiny", "main")
    assert "has no revision 'main'" in refused(str(tmp_path), "main")


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "Qwen/Qwen2.5-0.5B"])
def test_anything_else_is_a_repository(hub: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert resolve(name, "v1") == tmp_path / "snapshot"
    assert hub["repo"] == name and hub["options"]["revision"] == "v1"


def test_only_what_is_needed_is_downloaded(hub: dict[str, Any]) -> None:
    resolve("owner/name")
    options = hub["options"]
    files = """config.json tokenizer.json model.safetensors model-00001-of-00002.safetensors chat_template.jinja
        model.safetensors.index.json pytorch_model.bin tokenizer.model original/params.json x.gguf README.md
        original/consolidated.00.pth onnx/model.safetensors consolidated.safetensors model.pt""".split()  # noqa: SIM905
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == files[:6]
    assert options["revision"] is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.HFValidationError("bad id"), "not a repository id such as 'owner/name'"),
        (errors.GatedRepoError("gated\n\nlong", response=RESPONSE), "is gated: accept its terms"),
        (errors.RepositoryNotFoundError("none\n", response=RESPONSE), "no such repository on the Hub"),
        (errors.RevisionNotFoundError("none", response=RESPONSE), "has no revision 'v9'"),
        (
            errors.IncompleteSnapshotError("part", snapshot_path="x"),
            "only part of 'owner/name' at revision 'v9' is in the cache",
        ),
        (errors.LocalEntryNotFoundError("none"), "is not in the cache, and the Hub cannot be reached"),
        (errors.XetDownloadError("broke"), "could not be downloaded (XetDownloadError: broke): run again to resume"),
        (errors.HfHubHTTPError("500 oh\nmore", response=RESPONSE), "(HfHubHTTPError: 500 oh)"),
        (httpx2.ConnectError("refused"), "(ConnectError: refused)"),
        (httpx2.ReadTimeout(""), "(ReadTimeout)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_errors_of_the_hub_are_one_clear_line(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub["raises"] = error
    message = refused("owner/name", "v9")
    assert expected in message and "'owner/name'" in message


def test_offline_mode_is_named(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub["raises"] = errors.LocalEntryNotFoundError("none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused("owner/name")
    assert "unset it to download; did you mean 'tiny'?" in refused("tine")


def test_offline_mode_of_the_real_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "'owner/name' is not in the cache, and HF_HUB_OFFLINE is set" in refused("owner/name")
    assert "not a repository id" in refused("owner/na me")


def test_a_repository_of_pickles_is_refused(hub: dict[str, Any]) -> None:
    hub["files"] = ["config.json"]
    assert "has no safetensors weights" in refused("owner/name")
