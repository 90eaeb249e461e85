"""What strangers send: every broken, huge or odd file is refused in one readable line, without decoding it."""

import io
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from bombs import png_of
from models import picture
from PIL import Image

from pitome_mllm.serving.uploads import FORMATS, MAX_BYTES, MAX_SIDE
from pitome_mllm_demo.pictures import data_uri, open_upload


@pytest.mark.parametrize("width, height", [(30_000, 30_000), (9_000, 9_000), (100_000, 10_000)])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(width, height))
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^'bomb.png' (would have far too many|has \d+ x \d+) pixels.*scale it down$"):
        open_upload(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_text_that_unpacks_to_far_too_much_is_refused(tmp_path):
    buffer = io.BytesIO()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("bomb", "a" * 80_000_000, zip=True)
    picture(0).save(buffer, "PNG", pnginfo=info)
    (tmp_path / "text.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="'text.png'|text.png"):
        open_upload(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_truncated_files_are_refused_readably(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    picture(1).save(whole)
    assert open_upload(whole).image.size == picture(1).size
    data = whole.read_bytes()
    for share in (0.02, 0.5):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError) as caught:
            open_upload(cut)
        assert f"cut.{suffix}" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe"])
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"'a.png' is no picture in one of the formats {', '.join(FORMATS)}"):
        open_upload(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["tiff", "eps", "pdf"])
def test_rare_formats_are_not_even_tried(tmp_path, suffix):
    picture(0).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match="is no picture in one of the formats"):
        open_upload(tmp_path / f"a.{suffix}")


def test_too_many_bytes_and_files_that_are_gone(tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="'large.png' has 20.0 MB; at most 20 MB"):
        open_upload(tmp_path / "large.png")
    with pytest.raises(ValueError, match="'gone.png' is gone"):
        open_upload(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="is gone"):
        open_upload(tmp_path)


def test_large_pictures_are_scaled_down_and_odd_ones_become_rgb(tmp_path):
    Image.new("RGB", (4000, 1000), "red").save(tmp_path / "wide.jpg")
    assert open_upload(tmp_path / "wide.jpg").image.size == (MAX_SIDE, MAX_SIDE // 4)
    Image.new("RGBA", (50, 60), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    made = open_upload(tmp_path / "clear.png")
    assert made.image.mode == "RGB" and made.name == "clear.png" and made.image.getpixel((5, 5)) == (255, 255, 255)


def test_a_photo_of_48_megapixels_is_scaled_down_while_it_is_decoded(tmp_path):
    """Only a JPEG can be; what comes out is as sharp as before, and turned as its camera says."""
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright
    Image.new("RGB", (8000, 6000), "red").save(tmp_path / "photo.jpg", exif=exif)
    with mock.patch.object(Image.Image, "resize", autospec=True, side_effect=Image.Image.resize) as resized:
        assert open_upload(tmp_path / "photo.jpg").image.size == (MAX_SIDE * 3 // 4, MAX_SIDE)
    assert all(call.args[0].width * call.args[0].height < 8e6 for call in resized.call_args_list)


def test_the_small_copy_needs_no_file():
    uri = data_uri(Image.fromarray(np.full((900, 300, 3), 200, np.uint8)))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 10_000
