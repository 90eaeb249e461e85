"""Who may import whom: every file belongs to a layer, imports what stands above it only, and no files form a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"pitome_mllm": "pitome_mllm", "eval": "pitome_mllm_eval", "demo": "pitome_mllm_demo"}
# Each layer imports only those above it. A name stands for a module or for a whole folder.
LAYERS = (
    "pitome_mllm.errors",
    "pitome_mllm.methods",
    "pitome_mllm.schedule",
    "pitome_mllm.families",
    "pitome_mllm.settings",
    "pitome_mllm.plan",
    "pitome_mllm.spectral",
    "pitome_mllm.stats",
    "pitome_mllm.costs",
    "pitome_mllm.hooks",
    "pitome_mllm.attach",
    "pitome_mllm.loading",
    "pitome_mllm.visualize",
    "pitome_mllm",  # the names at its root; for what follows
    "pitome_mllm.serving",
    "pitome_mllm.commands",
    "pitome_mllm.cli",
    "pitome_mllm_eval",  # the folder's own __init__
    "pitome_mllm_eval.provenance",
    "pitome_mllm_eval.documents",
    "pitome_mllm_eval.benchmark",
    "pitome_mllm_eval.accuracy",
    "pitome_mllm_eval.training",
    "pitome_mllm_eval.speed",
    "pitome_mllm_eval.encoders.report",
    "pitome_mllm_eval.encoders.weights",
    "pitome_mllm_eval.encoders.real",
    "pitome_mllm_eval.front",
    "pitome_mllm_eval.report",
    "pitome_mllm_eval.lmms",
    "pitome_mllm_eval.encoders",
    "pitome_mllm_eval.bench",
    "pitome_mllm_demo",
)


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for folder, package in NAMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def layer(name: str) -> str | None:
    """The longest name among `LAYERS` that ``name`` is or lies in; the roots stand for themselves only."""
    fits = [one for one in LAYERS if name == one or (name.startswith(one + ".") and one not in NAMES.values())]
    fits += ["pitome_mllm_demo"] if name.startswith("pitome_mllm_demo.") else []
    return max(fits, key=len, default=None)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, wherever in it: in functions and for type checkers too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() | ({origin} if inner - MODULES.keys() else set())
    return (found & MODULES.keys()) - {name}


def test_every_file_is_in_a_layer():
    assert not [name for name in MODULES if layer(name) is None]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_only_those_above_it(name):
    above = {*LAYERS[: LAYERS.index(name) + 1]}
    below = {
        (own, other) for own in MODULES if layer(own) == name for other in imports(own) if layer(other) not in above
    }
    assert not below


def test_no_files_import_each_other_in_a_circle():
    left = {name: imports(name) for name in MODULES}
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_root_holds_the_story_only():
    assert len(list((ROOT / "pitome_mllm").glob("*.py"))) <= 10


def test_these_tests_see_imports():
    assert imports("pitome_mllm.stats") >= {"pitome_mllm.plan", "pitome_mllm.families.anyres"}
    assert "pitome_mllm.attach" in imports("pitome_mllm")
