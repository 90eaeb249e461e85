"""Other families in the chat: figures are counted in the run, also where pictures are cut into tiles."""

import pytest
import torch
from asking import PITOME, ask
from families import BY_TITLE, pictures
from models import IMAGE, tokenizer
from packed import PACKED

from pitome_mllm.serving.resolution import CONTROL
from pitome_mllm_demo.controls import Controls
from pitome_mllm_demo.engine import Engine
from pitome_mllm_demo.session import Conversation

QUESTION = "what colour is the star"
TILED = "LLaVA-NeXT (1.6)"
NATIVE = "Qwen2.5-VL"
QUARTER = Controls("pitome", keep=0.25)
PACKED_BY_TITLE = {family.title: family for family in PACKED}


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
        if title in PACKED_BY_TITLE:
            family = PACKED_BY_TITLE[title]
            made = family.chat()
        else:
            family = BY_TITLE[title]
            made = family.processor(tokenizer())
        model = family.build()
        model.generation_config.max_new_tokens = 8
        return Conversation(Engine(title, model, getattr(made, "processor", made)))

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
        (NATIVE, QUARTER),
        ("Qwen3-VL", Controls("tome", keep=10)),
        ("InternVL", Controls("tome", keep=3)),
        ("Pixtral", QUARTER),
    ],
)
def test_figures_are_what_the_language_model_read(chat_of, paths, title, controls):
    chat = chat_of(title)
    read = prompts_of(chat)
    turn = ask(chat, QUESTION, paths, controls, compare="plain")
    plain, merged = turn.replies["plain"].figures, turn.replies["merged"].figures
    assert [plain.prompt_tokens, merged.prompt_tokens] == read
    text = plain.prompt_tokens - plain.visual_tokens
    breaks = 12 if title == "Pixtral" else 0  # of rows, which go with them
    assert text - breaks == merged.prompt_tokens - merged.visual_tokens
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
    chat = chat_of("LLaVA-OneVision")
    with pytest.raises(ValueError, match="merges behind the vision tower.*ask a question"):
        ask(chat, "", paths, Controls("tome", keep=10))
    assert chat.turns == [] and ask(chat, QUESTION, paths, Controls("tome", keep=10)).replies["merged"].looks == ()


@pytest.mark.parametrize(
    "title, grids, counts",
    [
        (NATIVE, [(6, 6), (5, 12), (11, 5)], [(36, 9), (60, 15), (55, 14)]),
        ("Pixtral", [(6, 6), (3, 6), (6, 3)], [(36, 9), (18, 4), (18, 4)]),
        ("InternVL", [(4, 4)] * 12, [(16, 4)] * 12),
        ("SmolVLM", [(6, 6)] * 11, [(36, 9)] * 11),
    ],
)
def test_groups_behind_the_projector_stand_on_the_grid_that_the_model_has(chat_of, paths, title, grids, counts):
    chat = chat_of(title)
    chat.engine.warm_up()
    for question in ("", QUESTION):
        chat.clear()
        reply = ask(chat, question, paths, QUARTER).replies["merged"]
        assert [look.grid for look in reply.looks] == grids and [look.counts for look in reply.looks] == counts
        assert reply.figures.visual_tokens == sum(left for _, left in counts)
    assert all(len({*look.groups.tolist()}) == look.counts[-1] for look in reply.looks)
    live = chat.preview(reply.looks[0].picture, QUARTER)
    assert live.grid == grids[0] and live.draw().width > 0 and live.describe(0).startswith("Token 0: ")


def test_a_smaller_picture_of_as_many_tokens_answers_beside(chat_of, paths):
    """Where pictures keep their size, that is what merging has to beat."""
    chat = chat_of(NATIVE)
    controls = Controls.of({"method": "tome", "amount": "tokens", "keep": 25, "ratio": 0.9}, chat.engine.available)
    turn = ask(chat, QUESTION, paths, controls, compare=CONTROL)
    rival, merged = turn.replies[CONTROL], turn.replies["merged"]
    assert (
        merged.figures.visual_tokens == 9 + 15 + 14 and merged.plain.visual_tokens == rival.plain.visual_tokens == 151
    )
    assert rival.figures.visual_tokens == 9 + 14 + 15, "the nearest of these proportions"
    assert rival.figures.prompt_tokens < rival.plain.prompt_tokens
    assert merged.label == "tome · 3 pictures of 25% of a picture's tokens · after the projector"
    with pytest.raises(ValueError, match="101 per cent are not possible; give a whole number from 1 to 100"):
        Controls.of({"amount": "tokens", "keep": 101, "ratio": 0.9}, chat.engine.available)
    with pytest.raises(ValueError, match="scales all pictures to one size"):
        ask(chat_of("InternVL"), QUESTION, paths, QUARTER, compare=CONTROL)


def test_packed_is_refused_where_there_are_no_tiles(chat, files):
    with pytest.raises(ValueError, match="where='packed' is not possible in this family"):
        ask(chat, "is there a star?", files[:1], Controls("pitome", keep=144, where="packed"))
    assert ask(chat, "is there a star?", files[:1], PITOME).replies["merged"].state == "done"
