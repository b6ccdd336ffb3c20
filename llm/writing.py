"""New files and folders that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def check_new(path: str | Path) -> Path:
    """`path`, absolute. Raises UserError where something stands there already."""
    path = Path(path).expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: choose another place, or remove it first")
    return path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into. It takes that name at the end, and on an error, or Ctrl-C, is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        work.chmod(0o755)
        yield work
        if path.is_dir():
            path.rmdir()  # an empty one, or it is an error
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
