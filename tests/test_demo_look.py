"""What is inside a run: picking groups, lighting them up, energies by block, and the charts."""

import re
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pitome_mllm.methods import UserError
from pitome_mllm_demo import charts
from pitome_mllm_demo.look import DIM
from pitome_mllm_demo.session import Controls, Conversation
from pitome_mllm_eval.benchmark.sets import scene


@pytest.fixture(scope="module")
def look_of(tmp_path_factory, engine):
    path = tmp_path_factory.mktemp("uploads") / "scene.png"
    scene(1)[0].save(path)

    def look(controls):
        *_, turn = Conversation(engine).ask("", [path], controls)
        return turn.replies["merged"].looks[0]

    return look


@pytest.fixture(scope="module")
def look(look_of):
    return look_of(Controls("pitome", keep=72))


def test_every_patch_belongs_to_the_group_that_a_click_picks(look):
    rows, columns = look.grid
    for row, column in [(0, 0), (5, 17), (rows - 1, columns - 1)]:
        picked = look.pick((column + 0.5) / columns, (row + 0.5) / rows)
        assert picked == look.groups[row * columns + column]
    assert look.pick(1.0, 1.0) == look.groups[-1]
    assert {*look.groups.tolist()} == {*range(72)}


def test_picking_a_group_dims_everything_else(look):
    largest = int(np.bincount(look.groups).argmax())
    whole, lit = (np.asarray(look.draw(group), dtype=float) for group in (None, largest))
    inside = np.kron((look.groups == largest).reshape(look.grid), np.ones((28, 28))).astype(bool)
    assert whole.shape == lit.shape == (672, 672, 3)
    assert np.array_equal(whole[inside], lit[inside])
    assert np.abs(lit[~inside] - DIM * whole[~inside]).max() <= 1


def test_a_group_tells_its_size_and_its_energy(look):
    sizes = np.bincount(look.groups)
    largest, single = int(sizes.argmax()), int(sizes.argmin())
    text = look.describe(largest)
    assert text.startswith(
        f"Token {largest}: {sizes[largest]} patches of 576. Mean energy before the merge in block 0: "
    )
    mean = look.energies[0][look.groups == largest].mean()
    assert f"{mean:.2f} (all patches: {look.energies[0].min():.2f} to {look.energies[0].max():.2f}" in text
    assert sizes[single] > 1 or look.describe(single).startswith(f"Token {single}: 1 patch of 576")
    for call in (look.describe, look.draw):
        with pytest.raises(ValueError, match="there is no token 72; choose 0 to 71"):
            call(72)


def test_energies_of_every_merge(look):
    assert look.energy_steps == list(range(len(look.steps)))
    drawn = [look.draw_energy(step) for step in look.energy_steps]
    assert [text for _, text in drawn][0] == f"block 0: 576 → {look.counts[1]} tokens"
    assert len({np.asarray(picture).tobytes() for picture, _ in drawn}) == len(look.steps)
    with pytest.raises(ValueError, match="no energies"):
        look.draw_energy(len(look.steps))


def test_methods_without_energies_or_groups_say_so(look_of):
    tome = look_of(Controls("tome", keep=72))
    assert tome.energy_steps == [] and "This run has no energies" in tome.describe(0)
    with pytest.raises(ValueError, match="choose a method that has some"):
        tome.draw_energy(0)
    dct = look_of(Controls("dct", keep=72))
    assert dct.counts[-1] == 72
    for call in (lambda: dct.pick(0.5, 0.5), dct.draw, lambda: dct.describe(0)):
        with pytest.raises(ValueError, match="forms no groups"):
            call()


def test_dropped_patches_belong_to_no_group(look_of):
    look = look_of(Controls("uniform", keep=72))
    dropped = int(np.flatnonzero(look.groups < 0)[0])
    assert look.pick((dropped % 24 + 0.5) / 24, (dropped // 24 + 0.5) / 24) is None
    assert isinstance(look.draw(), Image.Image)


@pytest.mark.parametrize("controls", [Controls(), Controls("downsample", keep=144), Controls("pitome", keep=576)])
def test_every_kind_of_run_can_be_looked_at(look_of, controls):
    look = look_of(controls)
    assert look.counts[-1] == look.groups.max() + 1
    assert look.describe(0).startswith("Token 0: ") and look.draw(0).size == (672, 672)
    ElementTree.fromstring(charts.bars(look))


# ---- charts ----------------------------------------------------------------------------------------------------------


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.text and node.text.strip()]


def test_the_chart_of_tokens_says_every_count(look):
    said = texts(charts.bars(look))
    steps = (step.replace("before the projector, step", "projector") for step in look.steps)
    assert {"picture", *steps, *map(str, look.counts)} <= set(said)


KEEPS = (16, 36, 72, 144, 288)


@pytest.fixture
def found(monkeypatch):
    """A curve from a record of one method in one place, of .5 to .9."""
    plain = {"value": "0.95", "questions": "3360"}
    rows = [{"value": 0.5 + n / 10, "low": 0.4 + n / 10, "high": 0.6 + n / 10, "date": "2026-11-28"} for n in range(5)]
    cells = {(("tome", True, "tower"), keep): row for keep, row in zip(KEEPS, rows, strict=True)}
    monkeypatch.setattr(charts, "_record", lambda: SimpleNamespace(plain=plain, blind={"value": "0.3"}, cells=cells))
    return charts.curve("tome", "tower", published=True)


def test_the_accuracy_curve_says_what_was_measured_at_the_current_setting(found):
    assert found.name == "tome, published, inside the vision tower" and found.about.startswith("3,360 held-out")
    assert "keep 144: 80.0%;" in " ".join(texts(charts.accuracy(found, 144)))
    between = " ".join(texts(charts.accuracy(found, 100)))
    assert "keep 100: between 70.0% (keep 72) and 80.0% (keep 144)" in between


@pytest.mark.parametrize("keep, words", [(8, "not measured; keep 16"), (700, "has only 576 visual tokens")])
def test_a_setting_beyond_what_was_measured_says_so(found, keep, words):
    """As with another model, whose pictures have more tokens."""
    assert words in found.at(keep) and words in " ".join(texts(charts.accuracy(found, keep)))


def test_a_setting_without_measurements_has_no_curve(found, monkeypatch):
    assert charts.curve("tome", "tower") is charts.curve("tome", "both", published=True) is None
    monkeypatch.setattr(charts, "_record", mock.Mock(side_effect=UserError("no results")))
    assert charts.curve("tome", "tower", published=True) is None


def test_charts_are_drawn_without_anything_from_outside(look, found):
    for svg in (charts.bars(look), charts.accuracy(found, 144)):
        assert not re.search(r"""(href|src)=["'](?!#)|<script|url\((?!#)|@import""", svg)
