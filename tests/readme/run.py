"""The README's commands as a newcomer runs them: `make test-readme`.

A clone of what is committed, an environment with nothing in it, every line of the README's bash blocks one after the
other, then its Python. Indented commands need weights, and are not run. Needs git, and an index for pip.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVERS = {"pitome-mllm demo": "http://127.0.0.1:7860/", "pitome-mllm serve": "http://127.0.0.1:8000/v1/models"}
MINUTES = 20  # for one command


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """One command; CalledProcessError or TimeoutExpired where it fails."""
    began = time.monotonic()
    print(f"$ {command}", flush=True)
    address = next((url for name, url in SERVERS.items() if command.startswith(name)), None)
    if address:
        serve(command, address, folder, environment)
    else:
        subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True, timeout=60 * MINUTES)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def answers(address: str) -> bool:
    """Whether something does there."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def serve(command: str, address: str, folder: Path, environment: dict[str, str]) -> None:
    """A server: it answers at its address, and an interrupt ends it."""
    assert not answers(address), f"something else answers at {address}; end it first"
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment)
    try:
        ends = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < ends, f"nothing answers at {address}"
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(60)


def main() -> None:
    """Run them all."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        venv.create(Path(name) / "fresh", with_pip=True)
        there = Path(name) / "fresh" / "bin"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PATH": f"{there}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "PIP_QUIET": "1"}
        text = (folder / "README.md").read_text()
        for block in blocks(text, "bash"):
            for line in filter(None, block.splitlines()):
                run(line.split("  #")[0].rstrip(), folder, environment)
        drawn = "from PIL import Image; Image.open('groups.png').convert('RGB').save('photo.jpg')"
        for code in (drawn, *blocks(text, "python")):
            subprocess.run([there / "python", "-c", code], cwd=folder, env=environment, check=True)
    print("the README's commands work")


if __name__ == "__main__":
    main()
