"""What the command line makes of picture files and of words."""

import re

import pytest
from models import BOS, processor
from models import picture as textured
from packed import PACKED
from PIL import Image

from pitome_mllm import load
from pitome_mllm.commands._inputs import Subject, encode, read_picture
from pitome_mllm.serving.prompts import check_question, message, tokenized, unknown_words, write
from pitome_mllm.serving.resolution import near_grid


def saved(tmp_path, picture, name="p.png", **options):
    picture.save(tmp_path / name, **options)
    return read_picture(tmp_path / name)


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        assert saved(tmp_path, textured(0).convert("RGB").convert(mode)).mode == "RGB"
    assert saved(tmp_path, textured(0).convert("CMYK"), "p.jpg").mode == "RGB"
    assert saved(tmp_path, Image.new("RGB", (1, 1))).size == (1, 1)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 65535)
    deep.putpixel((1, 0), 32768)
    assert [saved(tmp_path, deep).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (128, 128, 128)]


def test_transparency_is_white_and_the_camera_decides_what_is_up(tmp_path):
    assert saved(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    lying = Image.new("RGB", (40, 20))
    exif = lying.getexif()
    exif[0x0112] = 6  # taken with the camera turned
    assert saved(tmp_path, lying, "p.jpg", exif=exif).size == (20, 40)


def test_unknown_words_are_found_once_and_in_order():
    tokenizer = load("tiny")[1].tokenizer
    assert unknown_words(tokenizer, "What colour is the star?") == []
    assert unknown_words(tokenizer, "is the zebra, or ZEBRA, or a (zebra) here?") == ["zebra", "or", "ZEBRA", "here"]


def test_a_template_that_writes_the_first_token_gets_no_second_one():
    made = processor()
    for first in ("", "<s>"):
        made.chat_template = first + "USER: <image> how many ASSISTANT:"
        ids = tokenized(made, [write(made, [message("how many", 1)])], [[textured(0)]])["input_ids"]
        assert (ids == BOS).sum() == 1 and ids[0, 0] == BOS


@pytest.mark.parametrize("word", ["<image>", "<patch>"])
def test_no_question_holds_what_stands_for_a_picture_or_a_part_of_one(word):
    made = next(family for family in PACKED if family.title == "Gemma 3").chat()
    check_question(made, "how many are there")
    with pytest.raises(ValueError, match=f"holds '{word}', which stands for the picture"):
        check_question(made, f"how many {word} are there")


@pytest.mark.parametrize(
    "tokens, slope, grid",
    [(64, 1.0, (8, 8)), (15, 0.4, (2, 7)), (1, 3.0, (1, 1)), (100, 0.01, (1, 100)), (4, 4, (4, 1))],
)
def test_a_smaller_grid_has_about_the_tokens_and_proportions_asked_for(tokens, slope, grid):
    assert near_grid(tokens, slope) == grid


def test_the_advice_for_too_long_a_text_is_one_that_helps():
    model, processor = load("tiny")
    subject, question = Subject(textured(0), "a picture"), "what colour is the star?"
    with pytest.raises(ValueError, match=r"ask for at most (\d+) new tokens") as caught:
        encode(model, processor, subject, question, 100000)
    most = int(re.search(r"at most (\d+) new", str(caught.value)).group(1))
    length = encode(model, processor, subject, question, most)["input_ids"].shape[1]
    assert length + most == model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"ask for at most {most} new tokens"):
        encode(model, processor, subject, question, most + 1)
    with pytest.raises(ValueError, match="holds 2048; shorten what is said"):
        encode(model, processor, subject, "what " * 2000, 100000)
