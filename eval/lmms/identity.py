"""What tells one run of a table from another: its results may be used again only where all of this is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pitome_mllm.loading import TINY

from ..accuracy.runs import code
from . import tables
from .scene_tasks import GROUP, TASKS
from .tables import Run, Table

# What answers and scores follow from beside our own code; torchvision and bitsandbytes where they are installed.
PACKAGES = ("torch", "torchvision", "transformers", "bitsandbytes", "pillow", "lmms_eval")


def identity(
    run: Run, table: Table, data: Path | None, model: Mapping[str, str], how: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a run's results follow from: with its `model_identity`, and how it was loaded and asked.

    Local ``data`` counts by its content, lmms-eval's own data sets by their names.
    """
    return {
        "model": dict(model),
        "settings": run.settings,
        "system_prompt": table.system_prompt,
        "tasks": {name: _task(name, data) for name in table.tasks},
        "how": dict(how),
        "code": [code(), fingerprint(Path(__file__).parent.glob("*.py"))],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def model_identity(model: str) -> dict[str, str]:
    """A model on the hub by its name and commit, one that is here by what is in its files, wherever they lie."""
    folder = TINY if model == "tiny" else Path(model).expanduser()
    if folder.is_dir():
        return {"files": fingerprint(folder.iterdir())}
    return {"hub": model, "commit": str(getattr(tables.own_config(model), "_commit_hash", None))}


def _task(name: str, data: Path | None) -> dict[str, Any]:
    """A task by its definition and data where they are files of ours or of the user's."""
    task = tables.TASKS[name]
    files = list(TASKS.rglob("*")) if name == GROUP else []
    if data is not None and task.data:
        files.append(data / f"{task.task}.parquet")
    return {"task": task.task, "metric": task.metric, "changes": task.changes, "files": fingerprint(files)}


def fingerprint(files: Iterable[Path]) -> str:
    """Of names and contents; bytes that Python leaves beside its sources do not count."""
    sha = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file() and path.suffix != ".pyc"):
        sha.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()


def short(known: Mapping[str, Any]) -> str:
    """Enough of its hash to name a folder."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
