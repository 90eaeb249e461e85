"""Drawings of merged groups: right pixels in the right places, clear errors, and pictures as the tower saw them."""

import numpy as np
import pytest
import torch
from PIL import Image

from pitome_mllm.visualize import PALETTE, draw_groups, seen_by, side_by_side


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


def test_sizes_say_which_tokens_stayed_alone():
    ones = draw_groups(gradient(), BLOCKS, torch.ones(6), side=240)
    counted = draw_groups(gradient(), BLOCKS, torch.tensor([4.0, 4.0, 1.0, 1.0, 3.0, 2.0]), side=240)
    assert (pixels(counted) == pixels(draw_groups(gradient(), BLOCKS, side=240))).all()
    assert (pixels(ones) != pixels(counted)).any()


def test_a_class_token_is_left_out_by_the_caller():
    with_class = [0, *(group + 1 if group >= 0 else -1 for group in BLOCKS)]
    drawn = draw_groups(gradient(), with_class[1:], [1.0, 4.0, 4.0, 1.0, 1.0, 3.0, 2.0], style="mean", side=96)
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
        ({"sizes": [1.0]}, "got 1 sizes for 6 tokens"),
        ({"style": "outlines"}, "unknown style 'outlines'; choose from outline, mean"),
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
    sheet = side_by_side([gradient(100, 100), gradient(100, 50)], ["plain", "a title of many words " * 4], gap=10)
    bare = side_by_side([gradient(100, 100), gradient(100, 50)], gap=10)
    assert bare.size == (330, 120)  # the second picture is twice as wide at height 100
    assert sheet.width == 330 and sheet.height > 120
    assert (pixels(sheet)[-110:-10, 10:110] == pixels(gradient(100, 100))).all()


@pytest.mark.parametrize(("count", "titles"), [(0, None), (2, ["one"])])
def test_side_by_side_errors(count, titles):
    with pytest.raises(ValueError, match=f"got {count} pictures"):
        side_by_side([gradient()] * count, titles)
