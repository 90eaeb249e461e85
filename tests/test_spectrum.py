"""``pitome-mllm spectrum``: the figures are those of the definition, and mistakes are one clear line."""

import json
import re
from functools import partial

import pytest
import torch
from checks import command_line
from models import PATCHES, build, picture, processor

from pitome_mllm import METHODS, attach, spectral_distance
from pitome_mllm.commands import spectrum
from pitome_mllm.families.features import pixel_values, tower_features
from pitome_mllm.methods import Merge, Method, Reducer


@pytest.fixture
def run(capsys):
    """Run ``pitome-mllm spectrum``; returns the exit code, stdout and stderr."""
    return partial(command_line, capsys, "spectrum")


def pixels(*numbers):
    return pixel_values(processor(), [picture(number) for number in numbers])


def test_features_are_what_the_projector_reads():
    model, seen = build(layers=4), []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = processor()(images=picture(0), text="<image> what", return_tensors="pt")
    model(**inputs)
    plain = tower_features(model, inputs["pixel_values"])
    assert (plain[:, 1:] - seen[0]).abs().max() < 1e-5 and plain.shape[1] == 1 + PATCHES
    with attach(model, "tome", keep=100, where="both") as handle:
        model(**inputs)
        groups = handle.stats.groups
        assert (tower_features(model, inputs["pixel_values"])[:, 1:] - seen[1]).abs().max() < 1e-5
        assert (handle.stats.groups == groups).all()


def test_distances_are_those_of_the_plain_model_s_features():
    model = build(layers=4)
    found = spectrum.compare(model, pixels(0, 1), ["tome", "pitome"], [100, 0.5, 288], {"where": "tower"})
    assert found.keeps == [288, 100] and list(found.distances) == ["tome", "pitome"] and not found.why
    plain = tower_features(model, pixels(0, 1))
    with attach(model, "pitome", keep=100, where="tower") as handle:
        tower_features(model, pixels(0, 1))
        expected = spectral_distance(plain, handle.stats.merges).mean()
    assert found.distances["pitome"][1] == pytest.approx(float(expected), rel=1e-6)


def test_keeping_all_changes_nothing():
    found = spectrum.compare(build(layers=4), pixels(0), ["pitome", "random"], [PATCHES, 288], {"where": "tower"})
    assert [values[0] < 1e-9 < values[1] for values in found.distances.values()] == [True, True]


def test_what_cannot_be_is_left_out_with_its_reason():
    found = spectrum.compare(build(layers=4), pixels(0), ["pool", "tome"], [144, 7], {"where": "tower"})
    assert found.distances["pool"][0] > 0 and found.distances["pool"][1] > 0
    assert (
        found.distances["tome"][1] is None and len(found.why) == 1 and found.why[0].startswith("tome: cannot reach 7")
    )
    with pytest.raises(ValueError, match="cannot reach 7 of 576"):
        spectrum.compare(build(layers=4), pixels(0), ["tome"], [7], {"where": "tower"})


class Cut(Merge):
    """The first tokens only, as if no group existed."""

    def __init__(self, count):
        self.group, self.count, self.energy = None, count, None

    def reduce(self, x, size=None):
        return x[:, : self.count], torch.ones_like(x[:, : self.count, :1])


class Groupless(Reducer):
    def match(self, metric, r, **_):
        return Cut(metric.shape[1] - r)


def test_a_method_without_groups_says_so(monkeypatch):
    monkeypatch.setitem(METHODS, "cut", Method(Groupless, "cut", "here"))
    found = spectrum.compare(build(layers=4), pixels(0), ["cut", "tome"], [144, 72], {"where": "projector"})
    assert found.distances["cut"] == [None, None] and None not in found.distances["tome"]
    assert found.why == ["cut: this method forms no groups, so there is no graph of groups; choose one that merges"]


def test_a_fault_inside_a_method_is_no_missing_figure(monkeypatch):
    class Broken(Reducer):
        def match(self, metric, r, **_):
            raise ValueError("broken inside")

    monkeypatch.setitem(METHODS, "broken", Method(Broken, "broken", "here"))
    with pytest.raises(ValueError, match="broken inside"):
        spectrum.compare(build(layers=4), pixels(0), ["broken", "tome"], [144], {"where": "tower"})


def test_the_table_names_every_method_and_keep(run):
    code, out, err = run("--keep", 288, 144)
    said = " ".join(out.split())
    assert (
        (code, err) == (0, "")
        and "test scene 0, tiny, every method at its own place" in said
        and "A dropped token" in said
    )
    for name in METHODS:
        cell = r"-" if name == "dct" else r"\d\S*"
        assert re.search(rf"(?m)^ *{name} +{cell} +{cell} *$", out), name
    assert "dct: this method forms no groups" in said


def test_json_is_one_object(run):
    code, out, err = run("--method", "tome", "--keep", 0.25, "--where", "projector", "--json", "--scene", 2)
    said = json.loads(out)
    assert (code, err) == (0, "") and said["keep"] == [144] and said["where"] == "projector"
    assert said["picture"] == "test scene 2" and said["spectral_distance"]["tome"][0] > 0 and said["impossible"] == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "tom"], "did you mean 'tome'"),
        (["--keep", "577"], "keep=577 is more than the 576 tokens there are"),
        (["--keep", "few"], "'few' is neither"),
        (["--where", "kitchen"], "unknown where 'kitchen'"),
        (["nowhere.png"], "no picture file 'nowhere.png'"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
