"""Inputs that do not fit: a clear error, and a model that stays attached and works. Odd pictures just work."""

from __future__ import annotations

import io

import pytest
import torch
from checks import logits
from families import BY_TITLE, FAMILIES, QUESTIONS, TWO_PICTURES, pictures
from models import picture
from packed import PACKED
from PIL import Image

from pitome_mllm import attach
from pitome_mllm.attach import Attachment

LLAVA, NEXT, IDEFICS, VIDEO = (BY_TITLE[t] for t in ("LLaVA-1.5", "LLaVA-NeXT (1.6)", "Idefics3", "Video-LLaVA"))
CLASSES = {family.model: family for family in reversed(FAMILIES)}.values()  # one row of each: LLMs make no difference
TILE_BY_TILE = (IDEFICS, BY_TITLE["SmolVLM"])
KINDS = ("Qwen3-VL", "GLM-4.1V", "InternVL", "Gemma 4", "Pixtral", "Ovis2")  # of what processors make of pictures
BEHIND = [family for family in PACKED if family.title in KINDS]
EVERY = pytest.mark.parametrize("family", (*CLASSES, *BEHIND), ids=lambda family: family.title)
TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def attached():
    """A family's model with merging on, good inputs, and what it says of them."""
    made = {}

    def make(family):
        if family.title not in made:
            model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
            attach(model, "pitome", keep=7)
            made[family.title] = model, inputs, logits(model, inputs)
        return made[family.title]

    return make


def assert_refused(attached, family, inputs, *words):
    """Both calls say what is wrong; afterwards the model is attached and says what it said before."""
    model, good, expected = attached(family)
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value), f"{word!r} is not said in: {error.value}"
        assert Attachment.of(model) is not None
        assert torch.equal(logits(model, good), expected)


@pytest.mark.parametrize(
    "family,other,words",
    [
        (
            LLAVA,
            NEXT,
            ["(1, 4, 3, 48, 48)", "LlavaForConditionalGeneration takes (pictures, 3, H, W)", "own processor"],
        ),
        (LLAVA, IDEFICS, ["takes (pictures, 3, H, W)", "own processor"]),
        (NEXT, LLAVA, ["without image_sizes", "own processor"]),
        (IDEFICS, LLAVA, ["(1, 3, 48, 48)", "takes (pictures, tiles, 3, H, W)"]),
        (VIDEO, LLAVA, ["got pixel_values,", "takes pixel_values_images", "own processor"]),
        (LLAVA, VIDEO, ["got pixel_values_images,", "takes pixel_values;", "own processor"]),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_the_processor_of_another_family(attached, family, other, words):
    wide = [picture(1).resize((150, 48))]
    made = other.process([(QUESTIONS[0], wide)])
    inputs = {key: made[key] for key in ("input_ids", "attention_mask", other.pixels)}
    assert_refused(attached, family, inputs, *words)


def test_pictures_of_another_size(attached):
    _, good, _ = attached(LLAVA)
    larger = {**good, "pixel_values": torch.zeros(1, 3, 96, 96)}
    assert_refused(attached, LLAVA, larger, "96 x 96", "48 x 48", "own processor")


@EVERY
def test_pixels_of_no_picture(attached, family):
    _, good, _ = attached(family)
    none = {**good, family.pixels: good[family.pixels][:0]}
    assert_refused(attached, family, none, "no picture", "leave them out")


@EVERY
def test_placeholders_without_a_picture(attached, family):
    """The plain model would take the placeholder's own embedding for what is in the picture."""
    _, good, _ = attached(family)
    count = int((good["input_ids"] == family.placeholder).sum())
    none = {key: good[key] for key in TEXT & good.keys()}
    assert_refused(attached, family, none, f"{count} image placeholders and no picture", family.pixels)


def tiles_of(family, inputs):
    """How many tiles two pictures are cut into, or the pictures themselves."""
    pixels = inputs[family.pixels]
    return int((pixels.flatten(pixels.dim() - 3) != 0).any(-1).sum()) if family.unit == "tile" else 2


@EVERY
def test_more_pictures_than_placeholders(attached, family):
    two, one = (family.process([(text, pictures(*[2] * n))]) for n, text in ((2, TWO_PICTURES), (1, QUESTIONS[0])))
    wrong = {**two, **{key: one[key] for key in TEXT & one.keys()}}
    expected, count = (int((inputs["input_ids"] == family.placeholder).sum()) for inputs in (two, one))
    got = f"got {tiles_of(family, two)} tiles" if family in TILE_BY_TILE else f"got {tiles_of(family, two)} pictures"
    assert_refused(attached, family, wrong, got, f"{count} image placeholders", f"expected {expected}")


@EVERY
def test_a_prompt_without_image_token(attached, family):
    _, good, _ = attached(family)
    wrong = {**good, **{key: torch.full((1, 3), 5 if key == "input_ids" else 1) for key in TEXT & good.keys()}}
    got = "tiles but" if family.unit == "tile" else "got 1 picture"
    assert_refused(attached, family, wrong, got, "no image placeholder", "<image>")


@EVERY
def test_inputs_on_several_devices(attached, family):
    _, good, _ = attached(family)
    for name in ("attention_mask", family.pixels):
        mixed = {**good, name: good[name].to("meta")}
        assert_refused(attached, family, mixed, f"{name} on meta", "input_ids on cpu", "inputs.to(model.device)")


@EVERY
def test_inputs_on_another_device_than_the_model(attached, family):
    _, good, _ = attached(family)
    elsewhere = {key: value.to("meta") for key, value in good.items()}
    assert_refused(attached, family, elsewhere, "input_ids on meta", "the model on cpu", "inputs.to(model.device)")


@EVERY
def test_inputs_that_are_no_tensors(attached, family):
    _, good, _ = attached(family)
    for name in ("input_ids", family.pixels):
        listed = {**good, name: good[name].tolist()}
        assert_refused(attached, family, listed, f"got {name} as list", "return_tensors='pt'")


def odd(name: str) -> Image.Image:
    colours = picture(0)
    return {
        "grey": lambda: colours.convert("L"),
        "with alpha": lambda: colours.convert("RGBA"),
        "CMYK": lambda: colours.convert("CMYK"),
        "16 bit": lambda: Image.new("I;16", (60, 40), 40000),
        "palette": lambda: colours.convert("P"),
        "very wide": lambda: colours.resize((900, 6)),
        "very high": lambda: colours.resize((6, 900)),
        "one pixel": lambda: colours.resize((1, 1)),
    }[name]()


ODD = ["grey", "with alpha", "CMYK", "16 bit", "palette", "very wide", "very high", "one pixel"]


REFUSED = {("Video-LLaVA", "one pixel"): "mean must have"}  # by processors
REFUSED |= dict.fromkeys([("Pixtral", "very wide"), ("Pixtral", "very high")], "Size must contain")


@EVERY
def test_odd_pictures_merge_like_any(attached, family):
    """All of them in two families; the others' processors are no code of ours, so shapes do there."""
    (model, good, expected), plain = attached(family), family.build()
    for name in ODD if family in (LLAVA, NEXT) else ("very wide", "very high", "one pixel"):
        if (family.title, name) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[family.title, name]):
                family.process([(QUESTIONS[0], [odd(name)])])
            continue
        inputs = family.process([(QUESTIONS[0], [odd(name)])])
        seen = logits(model, inputs)
        shorter = sum(family.full(plain, inputs)) - sum(Attachment.of(model).stats.lengths)
        assert seen.isfinite().all() and seen.shape[1] == inputs["input_ids"].shape[1] - shorter, name
    assert torch.equal(logits(model, good), expected)


def test_a_truncated_file(attached):
    model, good, expected = attached(LLAVA)
    file = io.BytesIO()
    picture(0).save(file, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        LLAVA.process([(QUESTIONS[0], [Image.open(io.BytesIO(file.getvalue()[:1500]))])])
    assert torch.equal(logits(model, good), expected)


def test_borders_of_packed_samples_that_merging_moves(attached):
    _, inputs, _ = attached(LLAVA)
    length = inputs["input_ids"].shape[1]
    borders = {"cu_seq_lens_q": torch.tensor([0, length]), "max_length_q": length}
    assert_refused(attached, LLAVA, {**inputs, **borders}, "cu_seq_lens_q, max_length_q", "position_ids")


@pytest.mark.parametrize("family", [LLAVA, NEXT], ids=lambda family: family.title)
def test_features_of_another_layer(attached, family):
    """Asked for without the LLM."""
    model, inputs, expected = attached(family)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with pytest.raises(ValueError, match="vision_feature_layer=1, merging is planned for"):
        model.get_image_features(**pixels, vision_feature_layer=1)
    with Attachment.of(model).using(None):
        model.get_image_features(**pixels, vision_feature_layer=1)
    assert torch.equal(logits(model, inputs), expected)
