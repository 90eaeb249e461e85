"""A method is one file and one row: one from outside the package takes part in everything, and nothing is made anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from asking import ask
from checks import command_line

from pitome_mllm import METHODS, attach, estimate, load
from pitome_mllm.methods import Merge, Method, Reducer
from pitome_mllm_demo.controls import Controls
from pitome_mllm_eval.accuracy import curves
from pitome_mllm_eval.lmms.cost import Meter
from pitome_mllm_eval.lmms.identity import identity
from pitome_mllm_eval.lmms.tables import TABLES, Run
from pitome_mllm_eval.report import texts

ROOT = Path(__file__).resolve().parents[1]


class Neighbours(Reducer):
    """The last tokens that are not protected join the one before them that stays."""

    def match(self, metric, r, *, size=None, protected=0, depth=0.0):
        rows, tokens = metric.shape[:2]
        stays = tokens - r
        group = torch.arange(tokens, device=metric.device).clamp_max(stays - 1)
        return Merge(group.expand(rows, -1), stays)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "neighbours", Method(Neighbours, "join the last tokens", "this test"))


@pytest.fixture
def run(capsys):
    return partial(command_line, capsys)


@torch.no_grad()
def test_it_merges_and_is_counted(model, one):
    with attach(model, "neighbours", keep=144) as handle:
        model(**one)
        assert handle.stats.tokens_after == 144 and handle.stats.method == "neighbours"
    plain, merged = estimate(model), estimate(model, "neighbours", keep=144)
    assert merged.visual_tokens == 144 and merged.flops < plain.flops


def test_commands_take_it(run, tmp_path):
    assert "neighbours" in run("methods")[1]
    code, out, err = run("ask", "--method", "neighbours")
    assert (code, err) == (0, "") and "merged, 144 of 576 visual tokens: " in out
    code, out, err = run("groups", "--method", "neighbours", "--out", tmp_path / "groups.png")
    assert (code, err) == (0, "") and "neighbours: 144 of 576 tokens" in out
    code, out, err = run("cost", "llava-1.5-7b", "--method", "neighbours", "--keep", 144, "--ratio", 0.9)
    assert (code, err) == (0, "") and "Method neighbours" in " ".join(out.split())


def test_the_chat_takes_it(chat, files):
    reply = ask(chat, "is there a star?", files[:1], Controls("neighbours", keep=72)).replies["merged"]
    assert (
        reply.label.startswith("neighbours · 72 of 576 tokens (12%) · inside and after")
        and reply.looks[0].groups.max() == 71
    )


def test_the_benchmark_plug_in_takes_it():
    """What lmms-eval's record says of a run with it; the plug-in itself needs lmms-eval (`make test-lmms`)."""
    run = Run("tiny", "neighbours", keep=72)
    meter = Meter(load("tiny")[0], run.attached)
    assert meter.flops(1, 20, 2) < Meter(load("tiny")[0], {}).flops(1, 20, 2)
    known = identity(run, TABLES["embedded"], None, {"files": "f"}, {})
    assert known["settings"] == {"method": "neighbours", "keep": 72}


def test_it_is_measured_by_default_and_as_published():
    found = curves.settings(["neighbours"], [144], load("tiny")[0])
    assert {setting.published: where for setting, where in found.items()} == {True: "tower", False: "both"}


def test_what_was_recorded_stays_as_it_is():
    for name, parts in texts().items():
        assert all(text in (ROOT / name).read_text() for text in parts.values()), name
