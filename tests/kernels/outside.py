"""A Python of its own, in which Triton compiles: in that of the tests it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_outside(code: str, *args: str, **environment: str) -> None:
    """Run ``code`` with ``args`` and an ``environment`` besides; AssertionError with what it said if it fails."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(Path(__file__).parents[2]), *filter(None, [outside.get("PYTHONPATH")])]
    outside |= {"PYTHONPATH": os.pathsep.join(path), **environment}
    done = subprocess.run([sys.executable, "-c", code, *args], env=outside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
