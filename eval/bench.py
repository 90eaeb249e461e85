"""The benchmark of speed, ``pitome-mllm bench``, in a checkout where nothing is installed: ``python eval/bench.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not eval/, whose modules are no top-level ones
    from pitome_mllm.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
