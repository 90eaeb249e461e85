"""Files of the chat's visitors: they do not outlive them."""

import shutil

import pytest
from models import picture

from pitome_mllm_demo.belongings import Belongings


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    (folder / "hash").mkdir(parents=True)
    for name in ("a.png", "b.png", "example.png"):
        picture(0).save(folder / "hash" / name)
    picture(0).save(tmp_path / "outside.png")
    return folder


@pytest.fixture
def belongings(cache):
    return Belongings(cache, keep=[cache / "hash" / "example.png"])


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_uploads_go_with_the_last_visitor_who_sent_them(cache, belongings):
    belongings.add("one", [cache / "hash" / "a.png", str(cache / "hash" / "b.png")])
    belongings.add("other", [cache / "hash" / "a.png"])
    belongings.drop("one")
    assert names(cache) == ["a.png", "example.png"]
    belongings.drop("other")
    belongings.drop("other")
    assert names(cache) == ["example.png"]


def test_a_file_that_was_sent_once_more_waits_for_its_question(cache, belongings):
    """As where a page is loaded anew and gets the same picture before Gradio notices that the old one was closed."""
    path = cache / "hash" / "a.png"
    belongings.add("old page", [path])
    shutil.move(shutil.copy(path, cache), path)  # as Gradio puts an upload there
    belongings.drop("old page")
    assert path.exists()
    belongings.add("new page", [path])
    belongings.drop("new page")
    assert not path.exists()


def test_examples_and_files_from_elsewhere_stay(cache, belongings, tmp_path):
    belongings.add("one", [cache / "hash" / "example.png", tmp_path / "outside.png", cache / ".." / "outside.png"])
    belongings.drop("one")
    assert "example.png" in names(cache) and (tmp_path / "outside.png").exists()


def test_what_is_made_for_a_visitor_lies_apart_and_goes_with_them(cache, belongings):
    drawings = [belongings.drawing("../one", picture(number)) for number in (0, 1, 0)]
    assert drawings[0] == drawings[2] != drawings[1] and belongings.drawing("../one", None) is None
    belongings.path("other", "conversation.json").write_text("{}")
    assert all(path.startswith(str(cache.resolve())) for path in drawings)
    belongings.drop("../one")
    assert names(cache) == ["a.png", "b.png", "conversation.json", "example.png"]
