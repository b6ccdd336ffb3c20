"""From what a person types to a place on disk: the embedded model, a path, or a repository of the Hugging Face Hub."""

import difflib
import os
from pathlib import Path

from llm.errors import ModelNotFound

_FILES = (".bin", ".gguf")  # a model that is one file
_PATH_SUFFIXES = (*_FILES, ".json", ".safetensors")
# Top-level files only: subdirectories and "consolidated" files repeat the weights in other forms. No pickles.
_ALLOW = ["*.json", "*.safetensors", "*.jinja"]
_IGNORE = ["*/*", "consolidated*"]


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """Where the model `name_or_path` lies: "tiny", a directory, a .gguf or .bin file, or a Hub repository's id.

    "tiny" is the embedded model (`./tiny` is a directory of that name). A repository is downloaded to the Hub's own
    cache, resuming what an earlier call left; HF_HUB_OFFLINE=1 uses the cache alone. Raises ModelNotFound with one
    line that says what to do; also for a `revision` of something that has none.
    """
    if not name_or_path.strip():
        raise ModelNotFound(
            "no model given: expected 'tiny', a directory, a .gguf or .bin file, or a Hub repository id"
        )
    path = Path(os.path.expanduser(name_or_path))
    local = Path(__file__).parents[1] / "tiny" if name_or_path == "tiny" else path if path.exists() else None
    if local is None and not _looks_like_path(name_or_path):
        return _download(name_or_path, revision)
    if local is None:
        raise ModelNotFound(f"no model at {name_or_path!r}: {_candidates(path)}")
    if revision is not None:
        raise ModelNotFound(f"{name_or_path!r} is local and has no revision {revision!r}: leave the revision out")
    if local.is_file() and local.suffix not in _FILES:
        raise ModelNotFound(f"{name_or_path!r} is not a model file ({', '.join(_FILES)}): give its directory")
    return local


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith(_PATH_SUFFIXES) or text.count("/") > 1


def _candidates(path: Path) -> str:
    """What the nearest existing parent of a missing path has to offer."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    parent = missing.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix in _FILES)
    except OSError as error:
        return f"{parent} cannot be listed: {error.strerror or error}"
    close = difflib.get_close_matches(missing.name, names, n=3)
    if close:
        return f"{parent} has no {missing.name!r}; did you mean {' or '.join(repr(name) for name in close)}?"
    shown = ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{parent} has no {missing.name!r}; it holds {shown or 'no directories or model files'}"


def _download(repo: str, revision: str | None) -> Path:
    # Imported here: they take a third of a second, which a local model need not pay.
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    meant = "; did you mean 'tiny'?" if difflib.get_close_matches(repo, ["tiny"]) else ""
    at = f"{repo!r}" + (f" at revision {revision!r}" if revision is not None else "")
    try:
        found = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, library_name="limpid"
            )
        )
    except errors.HFValidationError:
        raise ModelNotFound(
            f"{repo!r} is no file or directory here, and not a repository id such as 'owner/name'"
        ) from None
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{repo!r} is gated: accept its terms on its page, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"no file or directory {repo!r} here, and no such repository on the Hub "
            f"(if it is private, log in with `hf auth login`){meant}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(f"{repo!r} has no revision {revision!r}: give a branch, tag or commit of it") from None
    except errors.IncompleteSnapshotError:
        raise ModelNotFound(
            f"only part of {at} is in the cache, and the Hub cannot be reached: go online once"
        ) from None
    except errors.LocalEntryNotFoundError:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ModelNotFound(
                f"{at} is not in the cache, and HF_HUB_OFFLINE is set: unset it to download{meant}"
            ) from None
        raise ModelNotFound(
            f"{at} is not in the cache, and the Hub cannot be reached: check the network{meant}"
        ) from None
    except (errors.XetDownloadError, errors.RevisionResolutionError, httpx2.HTTPError, OSError) as error:
        raise ModelNotFound(f"{at} could not be downloaded ({_first_line(error)}): run again to resume") from None
    if not any(found.glob("*.safetensors")):
        raise ModelNotFound(
            f"{at} has no safetensors weights at its top level: pickles are never loaded; choose another"
        )
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
