"""Fixtures of the tests that run beside the original llava package, in an environment of its own."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from shrunken import tokenizer_files, tower_files

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """The folder of a vision tower with random weights."""
    return tower_files(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """The folder of a sentencepiece tokenizer."""
    return tokenizer_files(tmp_path_factory.mktemp("words"))
