"""Shared fixtures. No test reaches the network, and every test runs on one thread so that figures repeat."""

from __future__ import annotations

import inspect
import os
import warnings
from importlib import import_module

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from models import LONG, QUESTION, build, picture, processor
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava
from transformers.models.siglip import modeling_siglip

from pitome_mllm.commands import _options

_options.EVERY = 1e6  # seconds: however slow the machine is, no line of a progress bar among what tests read
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*incompatible with gradient checkpointing.*")

PATCHABLE = (modeling_clip, modeling_llama, modeling_llava, modeling_siglip, transformers.generation.utils, torch.nn)


def attributes() -> dict[str, int]:
    """Identity of all that a careless add-on might patch: functions and class attributes of the modules above."""
    found = {}
    for module in PATCHABLE:
        for name, thing in vars(module).items():
            found[f"{module.__name__}.{name}"] = id(thing)
            if inspect.isclass(thing):
                found |= {f"{module.__name__}.{name}.{key}": id(value) for key, value in vars(thing).items()}
    names = ("scaled_dot_product_attention", "softmax")
    return found | {f"torch.nn.functional.{name}": id(getattr(torch.nn.functional, name)) for name in names}


BEFORE = attributes()  # taken before anything imports pitome_mllm
import_module("pitome_mllm.attach")
IMPORTED = attributes()


@pytest.fixture
def patched_by_import() -> set[str]:
    """What importing pitome_mllm changed or added, whatever tests did since."""
    return {name for name, _ in BEFORE.items() ^ IMPORTED.items()}


@pytest.fixture(scope="session")
def plain():
    """A plain model. Shared by the session: never attach to it."""
    return build()


@pytest.fixture
def model():
    """A fresh twin of ``plain``, to attach to."""
    return build()


@pytest.fixture(scope="session")
def process():
    """The ordinary processor, padding on the left."""
    return processor()


@pytest.fixture(scope="session")
def one(process):
    """One picture and one question."""
    return process(images=[picture(0)], text=QUESTION, return_tensors="pt")


@pytest.fixture(scope="session")
def pair(process):
    """Two pictures with a question each; both rows have the same length."""
    return process(images=[picture(0), picture(1)], text=[QUESTION, QUESTION], return_tensors="pt")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Pictures of held-out scenes 0 to 16, as files."""
    from pitome_mllm_eval.benchmark.sets import scene  # after what `BEFORE` notes

    folder = tmp_path_factory.mktemp("uploads")
    paths = [folder / f"scene{number}.png" for number in range(17)]
    for number, path in enumerate(paths):
        scene(number)[0].save(path)
    return paths


@pytest.fixture(scope="session")
def wordy(tmp_path_factory):
    """A folder with random weights, no chat template, and answers of `LONG` words."""
    folder = tmp_path_factory.mktemp("wordy")
    model = build()
    model.generation_config.max_new_tokens = LONG
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine():
    """The chat's engine with the embedded model."""
    from pitome_mllm import load
    from pitome_mllm_demo.engine import Engine

    return Engine("tiny", *load("tiny"))


@pytest.fixture
def chat(engine):
    """A new conversation with the embedded model."""
    from pitome_mllm_demo.session import Conversation

    return Conversation(engine)


@pytest.fixture
def photo(tmp_path):
    """A textured picture as a file."""
    picture(0).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
