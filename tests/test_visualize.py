"""Drawings of merged groups: right pixels in the right places, clear errors, and pictures as the tower saw them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import QUESTION, build
from models import picture as textured
from models import processor as plain_processor
from PIL import Image

from pitome_mllm import attach
from pitome_mllm.commands.groups import step_rows
from pitome_mllm.families.features import pixel_values
from pitome_mllm.visualize import (
    PALETTE,
    below,
    captioned,
    draw_counts,
    draw_energies,
    draw_groups,
    draw_run,
    draw_step_energies,
    draw_steps,
    energy_range,
    like,
    patch_energies,
    patch_groups,
    protected_patches,
    seen_by,
    side_by_side,
    step_names,
    tiles_seen_by,
    token_counts,
)
from pitome_mllm.visualize.heat import colours


def gradient(width: int = 96, height: int = 96) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def cell(picture: Image.Image, row: int, column: int, grid: int = 4) -> np.ndarray:
    """The inner pixels of one patch, borders left out."""
    size = picture.height // grid
    area = pixels(picture)[row * size : (row + 1) * size, column * size : (column + 1) * size]
    return area[size // 3 : -size // 3, size // 3 : -size // 3]


BLOCKS = [0, 0, 1, 1, 0, 0, 1, 1, 2, 3, 4, 4, 5, 5, -1, 4]  # 4 x 4 patches: three larger groups, two alone, one dropped


@pytest.mark.parametrize("style", ["outline", "mean"])
@pytest.mark.parametrize("side", [16, 96, 99, 336, 1000])
def test_the_drawing_has_the_side_asked_for(style, side):
    assert draw_groups(gradient(), BLOCKS, style=style, side=side).size == (side, side)


def test_the_default_side_is_legible_and_never_smaller_than_the_picture():
    assert draw_groups(gradient(), torch.arange(576)).size == (672, 672)
    assert draw_groups(gradient(900, 900), torch.arange(576)).size == (900, 900)


def test_a_grid_that_is_not_square_sets_the_proportions():
    assert draw_groups(gradient(), list(range(8)), grid=(2, 4), side=400).size == (400, 200)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda g: torch.tensor([g])])
def test_groups_may_come_as_list_array_or_tensor(convert):
    expected = pixels(draw_groups(gradient(), torch.tensor(BLOCKS)))
    assert (pixels(draw_groups(gradient(), convert(BLOCKS))) == expected).all()


def test_mean_fills_a_group_with_the_mean_of_its_own_pixels():
    drawn = draw_groups(gradient(), BLOCKS, style="mean", side=96)
    expected = pixels(gradient())[:48, :48].reshape(-1, 3).mean(0)
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert np.abs(cell(drawn, row, column) - expected).max() <= 1


def test_a_group_in_several_places_has_one_colour():
    drawn = draw_groups(gradient(), [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], style="mean", side=96)
    assert (cell(drawn, 0, 0)[0, 0] == cell(drawn, 3, 3)[0, 0]).all()


@pytest.mark.parametrize("style", ["outline", "mean"])
def test_patches_that_stayed_alone_keep_their_pixels(style):
    drawn = draw_groups(gradient(240, 240), BLOCKS, style=style, side=240)
    before, after = pixels(gradient(240, 240))[125:140, 5:15], pixels(drawn)[125:140, 5:15]  # token 2, off its dot
    assert (before == after).all()


def test_outline_leaves_the_inside_of_groups_untouched():
    drawn = draw_groups(gradient(240, 240), BLOCKS, side=240)
    assert (pixels(drawn)[20:100, 20:100] == pixels(gradient(240, 240))[20:100, 20:100]).all()


def test_neighbouring_groups_get_different_colours_of_the_palette():
    drawn = pixels(draw_groups(gradient(240, 240), [0, 0, 1, 1] * 4, side=240))
    left, right = drawn[120, 118], drawn[120, 124]  # both sides of the border at column 120, off the hairline
    palette = {tuple(colour) for colour in PALETTE.astype(int).tolist()}
    assert tuple(left) in palette and tuple(right) in palette and tuple(left) != tuple(right)


@pytest.mark.parametrize("style", ["outline", "mean"])
def test_dropped_patches_are_grey(style):
    drawn = draw_groups(gradient(), BLOCKS, style=style, side=240)
    assert np.ptp(cell(drawn, 3, 2), axis=-1).max() == 0
    assert np.ptp(cell(drawn, 3, 3), axis=-1).min() > 0


def test_everything_dropped_can_be_drawn():
    assert draw_groups(gradient(), [-1] * 16).size == (112, 112)


def test_a_class_token_is_left_out_by_the_caller():
    with_class = [0, *(group + 1 if group >= 0 else -1 for group in BLOCKS)]
    drawn = draw_groups(gradient(), with_class[1:], style="mean", side=96)
    assert (pixels(drawn) == pixels(draw_groups(gradient(), BLOCKS, style="mean", side=96))).all()


def test_the_inputs_are_left_as_they_were():
    picture, groups = gradient(), torch.tensor(BLOCKS)
    before, labels = pixels(picture), groups.clone()
    draw_groups(picture, groups)
    assert (pixels(picture) == before).all() and torch.equal(groups, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": None}, "forms no groups"),
        ({"groups": [0] * 15}, r"15 patches do not fill a square; pass grid=\(rows, columns\)"),
        ({"groups": [0] * 17}, r"17 patches do not fill a square; leave out the class token \(groups\[1:\]\)"),
        ({"grid": (3, 5)}, "3 x 5 has 15 patches, got 16"),
        ({"groups": torch.zeros(2, 16, dtype=torch.int64)}, "those of one picture"),
        ({"groups": []}, "those of one picture"),
        ({"groups": [0.5] * 16}, "integers"),
        ({"groups": [-2] * 16}, "integers from 0"),
        ({"style": "outlines"}, "unknown style 'outlines'; choose from outline, mean, size"),
        ({"side": 12}, "pass at least 16"),
        ({"picture": np.zeros((4, 4, 3))}, "expected a PIL picture, got ndarray"),
    ],
)
def test_errors_say_what_to_do(change, words):
    arguments = {"picture": gradient(), "groups": BLOCKS, **change}
    with pytest.raises(ValueError, match=words):
        draw_groups(**arguments)


@pytest.fixture(scope="module")
def clip_processor():
    """The class: every test picks its own sizes. Its name changed between releases."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@pytest.mark.parametrize("size", [(336, 336), (500, 300), (300, 500), (64, 48)])
def test_seen_by_undoes_resize_crop_and_normalisation(clip_processor, size):
    processor = clip_processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    picture = gradient(*size)
    seen = seen_by(processor, picture)
    scale = 336 / min(size)
    full = picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (full.width - 336) // 2, (full.height - 336) // 2
    assert seen.size == (336, 336)
    difference = np.abs(pixels(seen) - pixels(full.crop((left, top, left + 336, top + 336))))
    assert np.median(difference) <= 1 and difference.max() <= 8  # resizing libraries round positions differently


def test_seen_by_without_crop_or_normalisation(clip_processor):
    processor = clip_processor(
        size={"height": 64, "width": 64}, do_center_crop=False, do_normalize=False, do_rescale=False
    )
    seen = seen_by(processor, gradient(64, 64))
    assert np.abs(pixels(seen) - pixels(gradient(64, 64))).max() <= 1


def test_seen_by_takes_the_image_processor_out_of_a_multimodal_one(clip_processor):
    class Processor:
        image_processor = clip_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    assert seen_by(Processor(), gradient(50, 40)).size == (32, 32)


def test_seen_by_accepts_pictures_of_any_mode(clip_processor):
    processor = clip_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert seen_by(processor, gradient().convert("L")).mode == "RGB"
    assert seen_by(processor, gradient().convert("RGBA")).mode == "RGB"


def test_seen_by_needs_an_image_processor():
    with pytest.raises(ValueError, match="object has no image processor"):
        seen_by(object(), gradient())


def test_side_by_side_shows_every_picture_at_one_height_under_its_title():
    sheet = side_by_side([gradient(100, 100), gradient(100, 50)], ["plain", "a title of many words " * 4])
    bare = side_by_side([gradient(100, 100), gradient(100, 50)])
    assert bare.size == (348, 132)  # the second picture is twice as wide at height 100
    assert sheet.width == 348 and sheet.height > 132
    assert (pixels(sheet)[-116:-16, 16:116] == pixels(gradient(100, 100))).all()


@pytest.mark.parametrize(("count", "titles"), [(0, None), (2, ["one"])])
def test_side_by_side_errors(count, titles):
    with pytest.raises(ValueError, match=f"got {count} pictures"):
        side_by_side([gradient()] * count, titles)


def test_side_by_side_goes_on_in_further_rows():
    sheet = side_by_side([gradient(100, 100)] * 5, columns=2)
    assert sheet.size == (248, 3 * 132)
    assert (pixels(sheet)[280:380, 16:116] == pixels(gradient(100, 100))).all()
    assert (pixels(sheet)[280:380, 132:] == 255).all()


def test_a_caption_stands_below_and_wraps():
    sheet = captioned(gradient(200, 50), "a caption of many words that does not fit one line at all")
    assert sheet.width == 200 and sheet.height > 90 and (pixels(sheet)[:50] == pixels(gradient(200, 50))).all()
    assert pixels(sheet)[50:].min() < 100


def test_a_picture_beside_a_drawing_has_its_width():
    drawing = below([gradient(300, 300), Image.new("RGB", (300, 40), "white")])
    beside = like(gradient(90, 90), drawing)
    assert beside.size == (300, 340) and (pixels(beside)[300:] == 255).all() and pixels(beside)[:300].min() < 50


# ---- sizes, protection, energies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [336, 1000])
def test_size_fills_tokens_with_the_colour_of_their_size(side):
    drawn = draw_groups(gradient(), BLOCKS, style="size", side=side)
    assert drawn.width == side and drawn.height > side
    area, patch = pixels(drawn)[:side], side // 4
    corner = area[patch // 8, patch // 8]  # sizes 4, 3, 2: off the number in the middle
    assert np.abs(corner - colours(1)).max() <= 1
    middle = area[2 * patch + patch // 8, 2 * patch + patch // 8]
    assert np.abs(middle - colours(np.log2(3) / np.log2(4))).max() <= 1
    assert (area[2 * patch + patch // 8, patch // 8] != colours(0)).any()  # alone: its own pixels


def test_sizes_are_written_where_they_can_be_read():
    group = np.zeros(576, dtype=int)
    drawn = [
        pixels(draw_groups(Image.new("RGB", (9, 9)), group, style="size", side=side))[:side] for side in (336, 672)
    ]
    assert [np.ptp(area, axis=(0, 1)).max() > 200 for area in drawn] == [False, True]


def test_protected_patches_get_a_diamond():
    marked = np.zeros(16, dtype=bool)
    marked[[0, 8]] = True  # patch 0 is part of a larger token, 8 is alone
    plain, drawn = (pixels(draw_groups(gradient(), BLOCKS, protected=p, side=400)) for p in (None, marked))
    changed = np.argwhere((plain != drawn).any(-1))
    assert len(changed) and (changed.min(0) >= (200, 0)).all() and (changed.max(0) < (300, 100)).all()
    assert (drawn[249, 49] == 0).all() and (plain[249, 49] > 250).all()


def test_energies_are_colours_with_their_range_below():
    energies = torch.linspace(-3, -2, 16)
    drawn = draw_energies(Image.new("RGB", (8, 8), (128, 128, 128)), energies, side=400)
    assert drawn.size[0] == 400 and drawn.size[1] > 400
    first, last = pixels(drawn)[50, 50], pixels(drawn)[350, 350]
    assert np.abs(first - colours(0)).max() <= 1 and np.abs(last - colours(1)).max() <= 1
    energies[3] = torch.nan
    hatched = draw_energies(gradient(), energies, side=400)
    assert np.ptp(pixels(hatched)[10:90, 310:390], axis=-1).max() == 0


@pytest.mark.parametrize("energies", [torch.ones(16), torch.full((16,), torch.nan)])
def test_energies_without_a_range_can_be_drawn(energies):
    assert draw_energies(gradient(), energies).width == 112


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"energies": None}, "has no energies"),
        ({"energies": [0.0] * 15}, "15 patches do not fill a square"),
        ({"picture": None}, "expected a PIL picture"),
        ({"side": 3}, "pass at least 16"),
    ],
)
def test_errors_of_energies(change, words):
    with pytest.raises(ValueError, match=words):
        draw_energies(**{"picture": gradient(), "energies": [0.5] * 16, **change})


def test_the_chart_shows_counts_in_proportion():
    bars = (pixels(draw_counts([100, 50, 25], (400, 400))) == PALETTE[0]).all(-1)
    places = np.flatnonzero(bars.any(0))
    heights = [bars[:, part].any(1).sum() for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 4], abs=3) and heights[0] > 200


# ---- from the stats of a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of():
    """The stats of a run on two pictures, by settings."""
    model, process = build(layers=4), plain_processor()
    inputs = process(images=[textured(0), textured(1)], text=[QUESTION] * 2, return_tensors="pt")

    def run(method, **settings):
        with attach(model, method, **settings) as handle, torch.no_grad():
            model(**inputs)
        return handle.stats

    return run


def test_groups_after_every_step_end_in_those_of_the_run(run_of):
    stats = run_of("pitome", keep=100, where="both")
    assert token_counts(stats)[0] == 576 and token_counts(stats)[-1] == 100
    assert (
        step_names(stats)
        == ["block 0", "block 1", "block 2", "before the projector, step 1", "before the projector, step 2"][
            : len(stats.merges)
        ]
    )
    for image in (0, 1):
        assert torch.equal(patch_groups(stats, image), stats.groups[image])
        for steps, count in enumerate(token_counts(stats)):
            assert patch_groups(stats, image, steps).unique().tolist() == list(range(count))
    drawings, titles = draw_steps(textured(0), stats, side=96)
    assert len(drawings) == len(stats.merges) and titles[0] == f"after block 0: {stats.counts[0]} tokens"


def test_energies_come_back_to_patches_through_the_groups(run_of):
    stats = run_of("pitome", keep=100, energies=True)
    found = patch_energies(stats, image=1)
    assert torch.equal(found[0], stats.merges[0].energy[1])
    for step, energy in enumerate(found):
        groups = patch_groups(stats, 1, step)
        for token in (0, 7, 50):
            assert (energy[groups == token] == stats.merges[step].energy[1, token]).all()


def test_protected_are_the_tokens_of_least_energy(run_of):
    stats = run_of("pitome", keep=288, published=True)
    counts = token_counts(stats)
    first = protected_patches(stats, 0, 0)
    assert int(first.sum()) == 576 - 2 * (576 - counts[1])
    energy = stats.merges[0].energy[0]
    assert energy[first].max() <= energy[~first].min()
    always, alone = protected_patches(stats, 0), stats.sizes[0][stats.groups[0]] == 1
    assert 0 < always.sum() and (alone | ~always).all()  # what is always protected stays alone
    for method in ("tome", "pitome-bsm", "random", "dct"):
        assert not protected_patches(run_of(method, keep=288), 0).any()


def test_dropped_patches_stay_dropped(run_of):
    stats = run_of("random", keep=100)
    assert (patch_groups(stats, 0) < 0).sum() == 476
    assert draw_run([textured(0), textured(1)], stats, side=96)[0].size == (96, 96)


def test_what_a_run_does_not_have_is_said(run_of):
    with pytest.raises(ValueError, match="attach with energies=True"):
        patch_energies(run_of("pitome", keep=100))
    with pytest.raises(ValueError, match="tome has no energies"):
        draw_step_energies(textured(0), run_of("tome", keep=100, energies=True))
    with pytest.raises(ValueError, match="dct forms no groups"):
        draw_run([textured(0)] * 2, run_of("dct", keep=100))
    with pytest.raises(ValueError, match="dct has no energies"):
        draw_step_energies(textured(0), run_of("dct", keep=100, energies=True))
    with pytest.raises(ValueError, match="got 1 pictures for a run of 2"):
        draw_run([textured(0)], run_of("tome", keep=100))


def test_a_smaller_picture_is_one_step(run_of):
    stats = run_of("downsample", keep=144)
    assert step_names(stats) == ["a smaller picture"] and token_counts(stats) == [576, 144]
    assert patch_groups(stats).bincount().tolist() == [4] * 144


def test_a_run_that_merged_nothing_can_be_drawn(run_of):
    stats = run_of("pitome", keep=576)
    assert len(draw_run([textured(0), textured(1)], stats, side=96)) == 2 and draw_steps(textured(0), stats) == ([], [])


@pytest.fixture
def tile_processor(clip_processor):
    """An image processor that makes two tiles of every picture: itself and its mirror image."""

    class Tiles(clip_processor):
        def __call__(self, images, **options):
            views = [images, images.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
            made = super().__call__(images=views, **options)
            made["pixel_values"] = made["pixel_values"][None]
            return made

    return Tiles(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def test_tiles_are_all_returned_in_their_order(tile_processor):
    tiles = tiles_seen_by(tile_processor, gradient(32, 32))
    assert len(tiles) == 2 and (pixels(tiles[0]) == pixels(seen_by(tile_processor, gradient(32, 32)))).all()
    assert np.abs(pixels(tiles[1])[:, ::-1] - pixels(tiles[0])).max() <= 1


def test_the_tower_takes_tiles_one_by_one(tile_processor):
    values = pixel_values(SimpleNamespace(image_processor=tile_processor), gradient(32, 32))
    assert values.shape == (2, 3, 32, 32)
    assert torch.allclose(values[1].flip(-1), values[0], atol=0.02)


# ---- step by step, as the command draws ------------------------------------------------------------------------------


def asked(**changes):
    return SimpleNamespace(**{"energy": False, "steps": False, "style": "outline", "side": 96} | changes)


@pytest.mark.parametrize("shown", [{"energy": True}, {"steps": True}, {"energy": True, "steps": True}], ids=str)
def test_every_tile_has_a_row_of_its_own_groups(run_of, shown):
    runs = [run_of(method, keep=144, energies=True) for method in ("pitome", "pitome-bsm")]
    tiles = [textured(0), textured(1)]
    rows = step_rows(tiles, runs, ["first", "second"], asked(**shown))
    assert [heads[0] for _, heads in rows] == [f"{name}, tile {n} of 2" for name in ("first", "second") for n in (1, 2)]
    steps = len(runs[0].merges) + bool(shown.get("steps"))
    assert all(len(panels) == len(heads) == 1 + steps for panels, heads in rows)
    if "energy" not in shown:
        expected = draw_steps(tiles[1], runs[0], 1, side=96)[0]
        assert all((pixels(a) == pixels(b)).all() for a, b in zip(rows[1][0][1:-1], expected, strict=True))
    (panels, heads), *others = step_rows(tiles[:1], runs[:1], ["alone"], asked(**shown))
    assert heads[0] == "alone" and others == []


def test_energies_of_several_runs_share_their_colours(run_of):
    runs = [run_of(method, keep=144, energies=True) for method in ("pitome", "pitome-llava")]
    found = torch.cat([energy.flatten() for stats in runs for energy in stats.energies if energy is not None])
    assert energy_range(runs) == (float(found.min()), float(found.max()))
    assert energy_range(runs[:1]) != energy_range(runs[1:])
    panels = [panels for panels, _ in step_rows([textured(0)], runs, ["a", "b"], asked(energy=True, side=400))]
    bars = [pixels(panel)[400:] for row in panels for panel in row[1:]]
    assert len(bars) > 3 and all((bar == bars[0]).all() for bar in bars)


def test_the_ends_of_the_colours_may_be_given():
    energies = torch.linspace(-1, 1, 16)
    own, wide = (
        draw_energies(Image.new("RGB", (8, 8), (128, 128, 128)), energies, side=400, span=s) for s in (None, (-3, 1))
    )
    assert (pixels(own)[399, 399] == pixels(wide)[399, 399]).all()
    assert np.abs(pixels(own)[0, 0] - colours(0)).max() <= 1
    assert np.abs(pixels(wide)[0, 0] - colours(0.5)).max() <= 1


def test_steps_of_a_run_that_merged_nothing_are_refused(run_of):
    with pytest.raises(ValueError, match="pitome merged nothing, so there are no steps to draw; keep fewer tokens"):
        step_rows([textured(0)], [run_of("pitome", keep=576, energies=True)], ["nothing"], asked(steps=True))
