"""What the package promises as a whole: what a wheel holds, how little an import costs."""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pitome_mllm"


def test_methods_need_torch_only():
    for path in (PACKAGE / "methods").glob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        foreign = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
        allowed = {"torch", "triton"} if path.name == "triton_kernels.py" else {"torch"}
        assert foreign <= allowed, f"{path.name} imports {sorted(foreign)}"


def test_mistakes_of_users_have_a_class_of_their_own():
    """`UserError`: the command line shows other ValueErrors with their traceback, as faults."""
    for path in [path for folder in ("pitome_mllm", "eval", "demo") for path in (ROOT / folder).rglob("*.py")]:
        assert "raise ValueError" not in path.read_text(), f"{path}: raise a UserError"


def python(code: str, *flags: str) -> str:
    """What a fresh interpreter writes to stdout for ``code``."""
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_stays_light():
    heavy = ("transformers.models.llava", "transformers.models.clip.modeling_clip", "transformers.modeling_utils")
    heavy += ("gradio", "lmms_eval", "matplotlib", "bitsandbytes")
    code = f"import sys, pitome_mllm; sys.stdout.write(' '.join(m for m in {heavy} if m in sys.modules))"
    assert python(code) == ""


def test_help_and_version_come_without_transformers():
    code = (
        "import sys\nfrom pitome_mllm import __version__, cli\n"
        "try: cli.main(['--version'])\nexcept SystemExit: pass\n"
        "sys.stdout.write(str('transformers.modeling_utils' in sys.modules) + __version__)"
    )
    version, rest = python(code).split("\n")
    assert version.startswith("pitome-mllm ") and rest == "False" + version.removeprefix("pitome-mllm ")


def test_folders_of_a_bare_checkout_are_found():
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "sys.path[:] = [p for p in sys.path if 'pitome' not in p]\n"
        "import os; sys.path.insert(0, os.getcwd())\n"
        "from pitome_mllm.commands._companion import companion\n"
        "module = companion('eval', 'benchmark.sets')\n"
        "sys.stdout.write(module.__name__ + ' ' + module.__file__ + ' ' + companion('demo').__name__)"
    )
    first, file, last = python(code, "-E").split(" ")
    assert first == "pitome_mllm_eval.benchmark.sets" and last == "pitome_mllm_demo"
    assert Path(file) == ROOT / "eval" / "benchmark" / "sets.py"


def test_a_missing_companion_names_its_extra():
    from pitome_mllm.commands._companion import companion

    with pytest.raises(ValueError, match=r"pip install '\.\[nothing\]'"):
        companion("nothing")
    with pytest.raises(ValueError, match=r"pitome_mllm_eval.nothing needs .*pip install '\.\[eval\]'"):
        companion("eval", "nothing")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, since building writes beside them."""
    copy = tmp_path_factory.mktemp("sources")
    for item in ("pitome_mllm", "eval", "demo"):
        shutil.copytree(ROOT / item, copy / item, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for item in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / item, copy / item)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", copy / "out", "."]
    done = subprocess.run([str(c) for c in command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "out").glob("pitome_mllm-*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(built) -> list[str]:
    """The names in it."""
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_embedded_model_answers_from_a_wheel(built, tmp_path):
    """Unpacked far from the checkout, which is hidden."""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if p not in ('', {str(ROOT)!r}))]\n"
        "import pitome_mllm, pitome_mllm_eval.benchmark.score as score\n"
        "model, processor = pitome_mllm.load('tiny', dtype='float32')\n"
        "right = [record.right for record in score.score(model, processor, 'test', 16)]\n"
        "sys.stdout.write(f'{pitome_mllm.__file__} {score.__file__} {sum(right)}')"
    )
    package, evaluation, right = python(code, "-E").split(" ")
    assert Path(package) == tmp_path / "pitome_mllm" / "__init__.py"
    assert Path(evaluation) == tmp_path / "pitome_mllm_eval" / "benchmark" / "score.py" and int(right) >= 12


def test_the_files_of_the_embedded_model_are_those_recorded():
    folder = PACKAGE / "tiny"
    recorded = dict(reversed(line.split("  ")) for line in (folder / "SHA256").read_text().splitlines())
    files = {path.name for path in folder.iterdir()} - {"SHA256", "README.md"}
    assert files <= set(recorded)
    for name, sha in recorded.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha, name


def test_wheel_holds_every_source_and_nothing_else(wheel):
    tops = {n.split("/")[0] for n in wheel if ".dist-info" not in n}
    assert tops == {"pitome_mllm", "pitome_mllm_eval", "pitome_mllm_demo"}
    for folder, installed in (
        ("pitome_mllm", "pitome_mllm"),
        ("eval", "pitome_mllm_eval"),
        ("demo", "pitome_mllm_demo"),
    ):
        sources = {f"{installed}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
        sources = {source for source in sources if "/training/" not in source}  # of the embedded model: for checkouts
        assert sources == {n for n in wheel if n.startswith(f"{installed}/") and n.endswith(".py")}


def test_wheel_holds_model_and_data(wheel):
    for folder, installed in (("pitome_mllm/tiny", "pitome_mllm/tiny"), ("eval/data", "pitome_mllm_eval/data")):
        files = {f"{installed}/{p.name}" for p in (ROOT / folder).iterdir() if p.is_file()}
        assert files and files <= set(wheel), f"missing: {sorted(files - set(wheel))}"
    assert any(n.endswith("licenses/LICENSE") for n in wheel)
    assert "pitome_mllm_eval/results/accuracy.csv" in wheel  # which the chat shows


def test_the_wheel_is_small(built):
    assert built.stat().st_size < 5_500_000


def test_the_page_of_the_architecture_names_what_there_is():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(\.?[\w./]+(?:\.py|/))`", page.replace("methods/NAME", "methods/tome").replace("NAME", "ask"))
    assert len(named) > 30 and all((PACKAGE / name).exists() or (ROOT / name).exists() for name in named)
    hooks = {path.stem for path in (PACKAGE / "hooks").glob("*.py")} | {"hooks/"}
    assert {*re.findall(r"hooks/(\w+)", page)} <= hooks
    assert {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")} <= {*re.findall(r"\w+/", page)}
    assert len(page.splitlines()) <= 120


def test_files_and_functions_are_short():
    """As CONTRIBUTING says: 300 lines a file, 60 a function, its docstring aside."""
    long = []
    for path in sorted((ROOT / "pitome_mllm").rglob("*.py")):
        source = path.read_text()
        long += [path.name] * (len(source.splitlines()) > 300)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                said = node.body[0].end_lineno - node.lineno if ast.get_docstring(node) else 0
                long += [f"{path.name}: {node.name}"] * (node.end_lineno - node.lineno + 1 - said > 60)
    assert not long
