"""Where results come from: the commit, the weights, the processor; and what may stand among the published ones."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pitome_mllm.methods import UserError

RESULTS = Path(__file__).parent / "results"  # what README and docs are made from


def commit() -> str:
    """The checkout's commit, with "-dirty" behind it where files other than results differ; empty outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None or not git("ls-files", __file__):  # not there, or not this project's
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def check_commit(path: Path, found: str) -> None:
    """Refuse to put what is measured at ``found`` among the published results where that is no clean commit."""
    if path.resolve().is_relative_to(RESULTS.resolve()) and (not found or found.endswith("-dirty")):
        raise UserError(
            f"{str(path)!r} is among the published results, which name the commit that they are of, and here it is "
            f"{found or 'none'!r}; commit first, or say with --out another place"
        )


def parse_measuring(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options of a command that measures, whose ``--out`` is checked before it begins."""
    options = parser.parse_args(argv)
    try:
        check_commit(options.out, commit())
    except UserError as error:
        parser.error(str(error))
    return options


def check_out(out: Path, default: Path, whole: bool) -> None:
    """Refuse to replace the results of a whole benchmark by those of a part, or of no clean commit of a checkout."""
    if out == default and not whole:
        raise UserError(f"{default} holds the results of the whole benchmark; say with --out where those of a part go")
    if out == default and not (default.parents[2] / "pyproject.toml").is_file():
        raise UserError(f"{default} is no file of a checkout; say with --out where the results go")
    check_commit(out, commit())


def about_machine() -> dict[str, str]:
    """What every row says of the machine and the code."""
    import transformers

    import pitome_mllm

    return {
        "date": date.today().isoformat(),
        "device": processor_name(),
        "pitome_mllm": pitome_mllm.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def about_model(name: str, model: Any, split: str) -> dict[str, str]:
    """What every row of answers says about where it comes from."""
    sha = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        sha.update(key.encode())
        sha.update(weight.float().numpy().tobytes())
    return {"model": name, "weights": sha.hexdigest()[:12], "split": split, **about_machine()}


def processor_name() -> str:
    """What this machine calls its processor, and how many cores of it there are."""
    path = Path("/proc/cpuinfo")  # where the operating system has it
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
