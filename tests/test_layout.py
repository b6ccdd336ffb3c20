"""The house as ARCHITECTURE.md draws it: who may import whom, where the packages lie, how large a file may be."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ops", "debug", "llm")
MAY_IMPORT = {"ops": {"ops"}, "debug": {"ops", "debug"}, "llm": {"ops", "llm"}}
SEES_DEBUG = {"llm/cli.py"}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level packages of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.level == 0 and node.module else path.relative_to(ROOT).parts[0])
    return found & {*PACKAGES, "tests"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    name = str(path.relative_to(ROOT))
    allowed = MAY_IMPORT[name.split("/")[0]] | ({"debug"} if name in SEES_DEBUG else set())
    assert imports(path) <= allowed


def test_models_do_not_import_each_other():
    models = {path.stem: path for path in (ROOT / "llm/models").glob("*.py") if path.stem != "__init__"}
    assert "llama" in models
    for path in models.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {part for name in named for part in name.split(".")} & {*models, "models"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_lie_in_this_repository(package):
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = {
        str(p.parent.relative_to(ROOT)).replace("/", ".") for q in PACKAGES for p in (ROOT / q).rglob("__init__.py")
    }
    assert set(listed) == found


@pytest.mark.parametrize("package", ["ops", "llm"])
def test_all_names_are_exported(package):
    module = importlib.import_module(package)
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not _is_own_module(value)}
    assert public == {name for name in module.__all__ if not _is_own_module(getattr(module, name))}


def _is_own_module(value):
    return type(value).__name__ == "module" and value.__name__.split(".")[0] in PACKAGES
