"""The commands on families that cut pictures into tiles: they work, or say in one line why not."""

from __future__ import annotations

import json

import pytest
from checks import command_line
from families import BY_TITLE, IMAGE
from models import picture, tokenizer
from packed import PACKED
from PIL import Image

from pitome_mllm.commands import ask, groups, spectrum
from pitome_mllm.serving.resolution import CONTROL
from pitome_mllm.visualize import run as drawn_runs

NEXT, ONEVISION, SMOL = (BY_TITLE[title] for title in ("LLaVA-NeXT (1.6)", "LLaVA-OneVision", "SmolVLM"))
PACKED_ONLY = pytest.mark.parametrize("family", [ONEVISION, SMOL], ids=lambda family: family.title)
BEHIND = {family.title: family for family in (SMOL, *PACKED)}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command on a family's model and a wide picture; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    picture(1).resize((150, 60)).save("wide.png")

    def call(family, command, *arguments):
        made = family.chat() if family in PACKED else family.processor(tokenizer())
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
    assert (
        code == 0
        and "unknown" in out
        and "FLOPs are unknown where pictures are cut into tiles or keep their size" in out
    )


@pytest.mark.parametrize("options", [[], ["--steps"], ["--energy"]], ids=str)
def test_groups_of_every_tile_are_drawn(run, options):
    code, out, err = run(NEXT, "groups", "--method", "pitome", "--keep", "36", "--out", "drawn.png", *options)
    assert code == 0 and "pitome: 36 of 144 tokens" in out, err
    assert Image.open("drawn.png").width > 400


def test_what_forms_no_grid_is_not_drawn(run, tmp_path):
    for command in (["groups", "--out"], ["groups", "--steps", "--out"]):
        code, _, err = run(ONEVISION, *command, "drawn.png", "--keep", "9")
        assert code == 2 and "where='packed' merges what the projector made of all tiles" in err
        assert not (tmp_path / "drawn.png").exists()


@pytest.mark.parametrize(
    "title, grids, said",
    [
        ("Qwen3-VL", [(5, 12)], "15 of 60"),
        ("Mistral Small (Mistral 3)", [(3, 6)], "4 of 18"),
        ("InternVL", [(4, 4)] * 4, "16 of 64"),
        ("Gemma 3", [(4, 4)], "4 of 16"),
        *[("Gemma 4", [(5, 13)], "16 of 65")][: "Gemma 4" in BEHIND],  # which not every release has
        ("SmolVLM", [(6, 6)] * 3, "27 of 108"),
    ],
)
def test_groups_behind_the_projector_are_drawn_on_the_grid_of_visual_tokens(run, monkeypatch, title, grids, said):
    plain, found = drawn_runs.draw_groups, []

    def noting(picture, labels, **options):
        found.append(options["grid"])
        return plain(picture, labels, **options)

    monkeypatch.setattr(drawn_runs, "draw_groups", noting)
    code, out, err = run(BEHIND[title], "groups", "--method", "tome", "--out", "drawn.png")
    assert code == 0 and f"tome: {said} tokens" in out, err
    assert found == grids and Image.open("drawn.png").width > 100
    code, _, err = run(BEHIND[title], "groups", "--energy", "--out", "drawn.png")
    assert code == 2 and "where='packed' keeps what every token became in the end, not its merges" in err


@pytest.mark.parametrize("title", ["Qwen2.5-VL", "GLM-4.1V", "Pixtral"])
def test_a_smaller_picture_stands_in_the_comparison_where_pictures_keep_their_size(run, title):
    question = "how many are there"
    code, out, err = run(BEHIND[title], "ask", question, "--compare", "--repeats", "1", "--json")
    assert code == 0, err
    plain, rival, merged = (json.loads(out)["runs"][mode]["visual_tokens"] for mode in ("plain", CONTROL, "merged"))
    assert merged == round(plain / 4) and abs(rival - merged) <= 1
    code, out, _ = run(BEHIND[title], "ask", question, "--compare", "--repeats", "1")
    assert code == 0 and "max_pixels: the plain model, the picture scaled down to as many tokens" in out


def test_spectra_are_of_the_towers_tokens(run):
    code, out, err = run(NEXT, "spectrum", "--method", "pitome", "tome", "--keep", "36", "--json")
    assert code == 0, err
    assert all(value > 0 for values in json.loads(out)["spectral_distance"].values() for value in values)


@PACKED_ONLY
def test_spectra_behind_the_projector_are_refused(run, family):
    code, _, err = run(family, "spectrum", "--method", "pitome", "--keep", "9")
    assert code == 2 and "where='packed' merges behind the projector; spectra are those of the tower's tokens" in err
