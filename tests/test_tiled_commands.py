"""The commands on families that cut pictures into tiles: they work, or say in one line why not."""

from __future__ import annotations

import json

import pytest
from checks import command_line
from families import BY_TITLE, IMAGE
from models import picture, tokenizer
from PIL import Image

from pitome_mllm.commands import ask, groups, spectrum

NEXT, ONEVISION, SMOL = (BY_TITLE[title] for title in ("LLaVA-NeXT (1.6)", "LLaVA-OneVision", "SmolVLM"))
PACKED_ONLY = pytest.mark.parametrize("family", [ONEVISION, SMOL], ids=lambda family: family.title)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command on a family's model and a wide picture; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    picture(1).resize((150, 60)).save("wide.png")

    def call(family, command, *arguments):
        made = family.processor(tokenizer())
        loaded = family.build(), getattr(made, "processor", made)
        for module in (ask, groups, spectrum):
            monkeypatch.setattr(module, "open_model", lambda options: loaded)
        return command_line(capsys, command, "wide.png", *arguments)

    return call


@pytest.mark.parametrize("family", [NEXT, ONEVISION, SMOL], ids=lambda family: family.title)
def test_ask_counts_what_the_picture_has(run, family):
    question = "how many are there"
    code, out, err = run(family, "ask", question, "--keep", "9", "--compare", "--repeats", "1", "--json")
    assert code == 0, err
    plain, merged = (json.loads(out)["runs"][mode] for mode in ("plain", "merged"))
    made = family.process([(f"USER: <image> {question} ASSISTANT:", [Image.open("wide.png")])])
    assert plain["visual_tokens"] == int((made["input_ids"] == IMAGE).sum())
    assert 9 <= merged["visual_tokens"] < plain["visual_tokens"] / 2
    assert plain["prompt_tokens"] - plain["visual_tokens"] == merged["prompt_tokens"] - merged["visual_tokens"]
    assert merged["kv_cache_mb"] < plain["kv_cache_mb"] and "gflops" not in {**plain, **merged}


def test_the_table_says_why_flops_are_unknown(run):
    code, out, _ = run(NEXT, "ask", "how many are there", "--keep", "9", "--compare", "--repeats", "1")
    assert code == 0 and "unknown" in out and "FLOPs are unknown where pictures are cut into tiles" in out


@pytest.mark.parametrize("options", [[], ["--steps"], ["--energy"]], ids=str)
def test_groups_of_every_tile_are_drawn(run, options):
    code, out, err = run(NEXT, "groups", "--method", "pitome", "--keep", "36", "--out", "drawn.png", *options)
    assert code == 0 and "pitome: 36 of 144 tokens" in out, err
    assert Image.open("drawn.png").width > 400


@PACKED_ONLY
def test_what_merged_behind_the_projector_is_not_drawn(run, family, tmp_path):
    for command in (["groups", "--out"], ["groups", "--steps", "--out"]):
        code, _, err = run(family, *command, "drawn.png", "--keep", "9")
        assert code == 2 and "where='packed' merges what the projector made of all tiles" in err
        assert not (tmp_path / "drawn.png").exists()


def test_spectra_are_of_the_towers_tokens(run):
    code, out, err = run(NEXT, "spectrum", "--method", "pitome", "tome", "--keep", "36", "--json")
    assert code == 0, err
    assert all(value > 0 for values in json.loads(out)["spectral_distance"].values() for value in values)


@PACKED_ONLY
def test_spectra_behind_the_projector_are_refused(run, family):
    code, _, err = run(family, "spectrum", "--method", "pitome", "--keep", "9")
    assert code == 2 and "where='packed' merges behind the projector; spectra are those of the tower's tokens" in err
