"""Fixtures of the tests of the fused kernels, in an environment of their own.

Without a GPU they run in Triton's interpreter. On one, with the package's own environment and nothing installed:
``PYTHONPATH=. python -m pytest --confcutdir=tests/kernels -m gpu tests/kernels``.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    """Set what the kernels' switch says; "fused" unless a test asks for something else."""

    def say(choice: str) -> None:
        monkeypatch.setenv("PITOME_KERNELS", choice)

    say("fused")
    return say
