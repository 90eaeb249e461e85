"""What lmms-eval reads before it runs anything: the entry point, the light manifest, the tasks. Without lmms-eval."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from pitome_mllm_eval.benchmark.questions import CATEGORIES
from pitome_mllm_eval.lmms import manifest
from pitome_mllm_eval.lmms.scene_tasks import GROUP, TASKS, picture, rows

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Manifest:
    """Takes what lmms-eval's own takes."""

    model_id: str
    simple_class_path: str
    chat_class_path: str
    aliases: tuple[str, ...] = ()


def test_the_entry_point_leads_to_the_manifest(monkeypatch):
    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = Manifest
    for name in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    (found,) = importlib.metadata.entry_points(group="lmms_eval.models", name="pitome_llava")
    said = found.load()()
    assert (said.model_id, said.aliases) == ("pitome_llava", ("pitome_vlm",))


@pytest.mark.parametrize("path", manifest.CLASSES.values())
def test_its_classes_exist(path):
    module, name = path.rsplit(".", 1)
    source = Path(importlib.util.find_spec(module).origin).read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    said = [ast.unparse(node) for node in classes[name].body]
    assert f"is_simple = {name == 'PitomeLlava'}" in said


def test_the_manifest_is_light():
    code = (
        "import sys, pitome_mllm_eval.lmms.manifest\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pitome_mllm', 'lmms_eval'}\n"
        "sys.stdout.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == ""


def test_there_is_a_task_for_every_category_and_a_group_of_all():
    files = {path.stem for path in TASKS.glob("*.yaml")}
    assert files == {GROUP, *(f"{GROUP}_{category}" for category in CATEGORIES)}
    group = (TASKS / f"{GROUP}.yaml").read_text()
    for category in CATEGORIES:
        task = (TASKS / f"{GROUP}_{category}.yaml").read_text()
        assert f"  - {GROUP}_{category}\n" in group and f"task: {GROUP}_{category}\n" in task
        assert f"test: data/{category}.parquet" in task and (TASKS / "data" / f"{category}.parquet").is_file()


def test_a_row_brings_its_picture():
    row = rows("digit")[0]
    (drawn,) = picture(row)
    assert drawn.size == (192, 192)
    with pytest.raises(RuntimeError, match="not that of this benchmark"):
        picture(row | {"sha256": ""})
