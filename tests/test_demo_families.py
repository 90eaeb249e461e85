"""Other families in the chat: figures are counted in the run, also where pictures are cut into tiles."""

import pytest
import torch
from asking import PITOME, ask
from families import BY_TITLE, pictures
from models import IMAGE, tokenizer

from pitome_mllm_demo.controls import Controls
from pitome_mllm_demo.engine import Engine
from pitome_mllm_demo.session import Conversation

QUESTION = "what colour is the star"
TILED = "LLaVA-NeXT (1.6)"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Pictures of three sizes, as files."""
    folder = tmp_path_factory.mktemp("sizes")
    made = [folder / f"{number}.png" for number in range(3)]
    for path, image in zip(made, pictures(0, 1, 2), strict=True):
        image.save(path)
    return made


@pytest.fixture
def chat_of():
    """A conversation with the shrunken model of a family."""

    def open_(title):
        family = BY_TITLE[title]
        made = family.processor(tokenizer())
        return Conversation(Engine(title, family.build(), getattr(made, "processor", made)))

    return open_


def prompts_of(chat):
    """Collects how many tokens the LLM reads at first in every run."""
    lengths = []

    def note(module, args, kwargs):
        width = kwargs["inputs_embeds"].shape[1]
        if width > 1:
            lengths.append(width)

    chat.engine.handle.language.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


@pytest.mark.parametrize(
    "title, controls",
    [
        (TILED, Controls()),
        (TILED, Controls("tome", keep=10, where="tower")),
        (TILED, Controls("pitome", keep=10, where="packed")),
        ("LLaVA-OneVision", Controls("pitome", keep=10)),
        ("SmolVLM", Controls("tome", keep=10)),
        ("PaliGemma", Controls("pitome", keep=10)),
        ("Video-LLaVA", Controls()),
    ],
)
def test_figures_are_what_the_language_model_read(chat_of, paths, title, controls):
    chat = chat_of(title)
    read = prompts_of(chat)
    turn = ask(chat, QUESTION, paths, controls, compare="plain")
    plain, merged = turn.replies["plain"].figures, turn.replies["merged"].figures
    assert [plain.prompt_tokens, merged.prompt_tokens] == read
    assert plain.prompt_tokens - plain.visual_tokens == merged.prompt_tokens - merged.visual_tokens
    assert 0 < merged.visual_tokens < plain.visual_tokens
    assert merged.kv_cache_mb / plain.kv_cache_mb == pytest.approx(read[1] / read[0])


def test_figures_of_tiles_are_counted_not_multiplied(chat_of, paths):
    """Pictures of different sizes have different numbers of tiles and of newlines."""
    chat = chat_of(TILED)
    engine = chat.engine
    inputs = engine.processor(images=pictures(0, 1, 2), text="<image> <image> <image>", return_tensors="pt")
    full = int((inputs["input_ids"] == IMAGE).sum())
    with torch.no_grad(), engine.handle.using(method="tome", keep=10, where="tower"):
        sizes = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        features = engine.model.model.get_image_features(**sizes, return_dict=True).pooler_output
    turn = ask(chat, QUESTION, paths, Controls("tome", keep=10, where="tower"))
    reply = turn.replies["merged"]
    assert reply.figures.visual_tokens == sum(map(len, features)) not in (3 * 10, 0)
    assert reply.plain.visual_tokens == full != 3 * engine.available
    assert reply.figures.gflops is None and reply.plain.gflops is None  # not known; not wrong
    assert reply.label == "tome · 3 pictures of 10 of 144 tokens per tile (7%) · inside the vision tower"


def test_every_tile_can_be_looked_into(chat_of, paths):
    chat = chat_of(TILED)
    for question in (QUESTION, ""):
        chat.clear()
        reply = ask(chat, question, paths, Controls("pitome", keep=10)).replies["merged"]
        names = [look.name for look in reply.looks]
        assert names[0] == "0.png" and {"1.png", "1.png, tile 1", "2.png"} < {*names}
        assert all(look.counts[-1] == 10 for look in reply.looks)
    assert reply.figures.visual_tokens is None and reply.figures.tower_ms > 0


def test_merging_behind_the_projector_needs_a_question(chat_of, paths):
    chat = chat_of("SmolVLM")
    with pytest.raises(ValueError, match="merges behind the vision tower.*ask a question"):
        ask(chat, "", paths, Controls("tome", keep=10))
    assert chat.turns == [] and ask(chat, QUESTION, paths, Controls("tome", keep=10)).replies["merged"].looks == ()


def test_packed_is_refused_where_there_are_no_tiles(chat, files):
    with pytest.raises(ValueError, match="where='packed' is not possible in this family"):
        ask(chat, "is there a star?", files[:1], Controls("pitome", keep=144, where="packed"))
    assert ask(chat, "is there a star?", files[:1], PITOME).replies["merged"].state == "done"
