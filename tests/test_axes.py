"""Models whose positions have several axes (M-RoPE), and features that go into early blocks of the LLM (deepstack)."""

from __future__ import annotations

import pytest
import torch
from checks import logits, new_ids
from families import NO_PICTURE, QUESTIONS, TWO_PICTURES, pictures
from models import CACHE, since_518
from packed import PACKED

from pitome_mllm import attach
from pitome_mllm.methods import UserError

BY_TITLE = {family.title: family for family in PACKED}
AXES = ["Qwen2.5-VL", "Qwen3-VL"]
ROWS = [(QUESTIONS[0], (0,)), (TWO_PICTURES, (1, 2)), (NO_PICTURE, ()), (QUESTIONS[1], (3,))]
CALIBRATIONS = ["none", "size", "distance"]
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(params=AXES)
def family(request):
    return BY_TITLE[request.param]


@pytest.fixture
def model(family):
    return family.build()


@pytest.fixture
def plain(family):
    return family.build()


def inputs_of(family, *rows, side="left"):
    return family.process([(text, pictures(*numbers)) for text, numbers in rows], side)


def counted(plain, inputs):
    """(T, 3) the plain model's positions of a row, and its placeholders (T,)."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    ids, _ = plain.model.get_rope_index(**{name: inputs[name] for name in names})
    return ids[:, 0].T, inputs["input_ids"][0] == plain.config.image_token_id


def told_by_hand(plain, inputs, groups, calibration):
    """(S, 3) the positions of a merged row, written out: which columns stay, what they are."""
    positions, image = counted(plain, inputs)
    out, column, back = [], 0, 0
    units = iter(groups)
    while column < len(image):
        if not image[column]:
            out.append(positions[column] - back)
            column += 1
            continue
        group = next(units)
        own = positions[column : column + len(group)]
        column += len(group)
        kept = int(group.max()) + 1
        if calibration == "none":
            start, (rows, columns) = own[0, 1] - back, (own[:, 1:].max(0).values - own[0, 1] + 1).tolist()
            across = min(max(1, round((kept * columns / rows) ** 0.5)), kept)
            new = [torch.stack([own[0, 0] - back, start + k // across, start + k % across]) for k in range(kept)]
            back += int(own.max()) - int(torch.stack(new).max()) - back
        else:
            new = [own[group == k].median(0).values for k in range(kept)]
        out += new
    return torch.stack(out)


def mask_by_hand(language, positions, sizes, calibration):
    """(1, 1, S, S) what attention adds, written out entry by entry."""
    theta = torch.zeros(3, 16)
    for axis in range(3):
        cos, sin = language.rotary_emb(torch.zeros(1), torch.eye(3, dtype=torch.long)[:, axis, None, None])
        theta[axis] = torch.atan2(sin, cos)[0, 0, :16]
    assert bool(((theta != 0).sum(0) == 1).all()), "every frequency turns along one axis"
    length = len(positions)
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    for q in range(length):
        told = bool((sizes[: q + 1] > 0).any())
        for k in range(q + 1):
            away = (positions[q] - positions[k]).abs().double() @ theta.double()
            near = 2 - away.cos().mean() if calibration == "distance" and told else torch.tensor(1.0)
            mask[q, k] = (near * sizes[k].clamp(min=1)).log()
    return mask[None, None]


@torch.no_grad()
def by_hand(plain, inputs, stats, calibration):
    """Logits of a row whose pictures merged into these groups."""
    image = inputs["input_ids"][0] == plain.config.image_token_id
    made = plain.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])

    def mean(features):
        pairs = zip(features, stats.groups, strict=True)
        return torch.cat([torch.stack([x[g == k].mean(0) for k in range(int(g.max()) + 1)]) for x, g in pairs])

    lengths = [len(x) for x in made.pooler_output]
    layers = [x.split(lengths) if isinstance(x, torch.Tensor) else x for x in getattr(made, "deepstack_features", ())]
    merged, deep = mean(made.pooler_output), [mean(layer) for layer in layers]
    positions = told_by_hand(plain, inputs, stats.groups, calibration)
    starts = torch.cat([torch.arange(len(g)) < int(g.max()) + 1 for g in stats.groups])
    stays = torch.ones_like(image).masked_scatter(image, starts)
    there, ids = image[stays], inputs["input_ids"][:, stays]
    embeds = plain.get_input_embeddings()(ids).masked_scatter(there[None, :, None], merged)
    sizes = torch.zeros(len(there)).masked_scatter(there, torch.cat(stats.sizes))
    language = plain.model.language_model
    mask = None if calibration == "none" else mask_by_hand(language, positions, sizes, calibration)
    more = {"visual_pos_masks": there[None], "deepstack_visual_embeds": deep} if deep else {}
    given = {"position_ids": positions.T[:, None], "attention_mask": mask}
    return plain.lm_head(language(inputs_embeds=embeds, **given, **more).last_hidden_state)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_merged_row_is_that_written_out(family, model, plain, calibration):
    inputs = inputs_of(family, ROWS[1])
    with attach(model, keep=0.25, calibration=calibration, weighted=True) as handle:
        seen = logits(model, inputs)
        assert handle.stats.lengths == tuple(round(len(g) / 4) for g in handle.stats.groups)
        torch.testing.assert_close(seen, by_hand(plain, inputs, handle.stats, calibration), atol=1e-4, rtol=1e-4)


def test_both_orders_of_axes_are_read_out_of_the_model():
    """Qwen2.5-VL has its axes' frequencies one after the other, Qwen3-VL in turns."""
    for title, sections in (("Qwen2.5-VL", [0] * 4 + [1] * 6 + [2] * 6), ("Qwen3-VL", [0, 1, 2] * 5 + [0])):
        rotary = BY_TITLE[title].build().model.language_model.rotary_emb
        _, sin = rotary(torch.zeros(1), torch.eye(3, dtype=torch.long)[:, :, None])
        assert (sin[:, 0, :16] != 0).int().argmax(0).tolist() == sections


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_rows_of_a_batch_are_as_alone(family, model, calibration, side):
    batch = inputs_of(family, *ROWS, side=side)
    with attach(model, keep=5, calibration=calibration) as handle:
        together, groups = logits(model, batch), handle.stats.groups
        real = handle.stats.layout >= 0
        for row, text in enumerate(ROWS):
            alone = logits(model, inputs_of(family, text, side=side))[0]
            torch.testing.assert_close(together[row, real[row]], alone, **CLOSE)
        assert [int(g.max()) + 1 for g in groups] == [5] * 4


OPTIONS = [
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2},
    pytest.param({"prefill_chunk_size": 7}, marks=since_518),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_searches_and_caches(family, model, options):
    """Of a batch as of its rows; and where there is one best answer, it is the greedy one by hand."""
    rows = [ROWS[0], ROWS[1]] if "prompt_lookup_num_tokens" not in options else [ROWS[1]]
    batch = inputs_of(family, *rows)
    with attach(model, keep=0.25):
        greedy = new_ids(model, batch, 5)
        seen = model.generate(**batch, max_new_tokens=5, do_sample=False, **options)
        width, times = batch["input_ids"].shape[1], options.get("num_return_sequences", 1)
        assert torch.equal(seen[:, :width], batch["input_ids"].repeat_interleave(times, 0))
        if "num_beams" not in options:
            assert seen[:, width:].tolist() == greedy
        for row, text in enumerate(rows):
            alone = inputs_of(family, text)
            one = model.generate(**alone, max_new_tokens=5, do_sample=False, **options)[:, -5:]
            assert torch.equal(one, seen[row * times : (row + 1) * times, -5:])


@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_an_assistant_changes_nothing(family, model, calibration):
    draft, inputs = family.build(), inputs_of(family, ROWS[1])
    with attach(model, keep=0.25, calibration=calibration):
        expected = new_ids(model, inputs, 6)
        assert new_ids(model, inputs, 6, assistant_model=draft) == expected
        attach(draft, keep=0.25, calibration=calibration)
        assert new_ids(model, inputs, 6, assistant_model=draft) == expected


@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_turns_and_a_loop_by_hand(family, model, calibration):
    """A second picture in a second turn, by generate() and by forward(), and then token by token: as all in one."""
    first, second = inputs_of(family, ROWS[1]), inputs_of(family, ROWS[0])
    whole = {
        name: torch.cat([first[name], second[name]], -1 if name.endswith(("ids", "mask")) else 0) for name in first
    }
    news = {**second, "attention_mask": whole["attention_mask"]}
    with attach(model, keep=0.25, calibration=calibration):
        expected = logits(model, whole)[0, -1]
        answer = new_ids(model, whole, 4)[0]
        with torch.no_grad():
            cache = model(**first, use_cache=True)[CACHE]
            out = model(**news, **{CACHE: cache}, use_cache=True)
            torch.testing.assert_close(out.logits[0, -1], expected, **CLOSE)
            for token in answer[:-1]:
                assert int(out.logits[0, -1].argmax()) == token
                news["attention_mask"] = torch.cat([news["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
                ids = torch.tensor([[token]])
                out = model(input_ids=ids, attention_mask=news["attention_mask"], **{CACHE: out[CACHE]}, use_cache=True)
            assert int(out.logits[0, -1].argmax()) == answer[-1]


def test_what_later_steps_count_with_is_left_on_the_model(family, model, plain):
    """As the plain model leaves it: what the position of the next token is more than the tokens before it."""
    inputs = inputs_of(family, ROWS[1])
    logits(plain, inputs)
    with attach(model, keep=0.25) as handle:
        places = logits(model, inputs).shape[1]
        assert int(model.model.rope_deltas) + places == int(plain.model.rope_deltas) + inputs["input_ids"].shape[1]
        handle.update(calibration="none")
        assert int(model.model.rope_deltas) + logits(model, inputs).shape[1] > 0
        positions = told_by_hand(plain, inputs, handle.stats.groups, "none")
        assert int(model.model.rope_deltas) + len(positions) == int(positions.max()) + 1


def test_positions_of_the_caller_are_taken(family, model, plain):
    """As a collator of a training loop makes them, with those of the text in front or not."""
    inputs = inputs_of(family, ROWS[1])
    ids = counted(plain, inputs)[0].T[:, None]
    text = torch.arange(ids.shape[-1])[None, None]
    with attach(model, keep=0.25):
        expected = logits(model, inputs)
        for given in (ids, torch.cat([text, ids])):
            torch.testing.assert_close(logits(model, inputs, position_ids=given), expected, **CLOSE)
        shifted = logits(model, inputs, position_ids=ids * 2)
        assert not torch.allclose(shifted, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_positions_of_the_caller_count_on_after_a_cache(family, model, plain, calibration):
    whole = inputs_of(family, (f"{QUESTIONS[0]} and {QUESTIONS[1]}", (0, 1)))
    ids, image = counted(plain, whole)
    ids, end = ids.T[:, None], int(image.int().diff().eq(-1).nonzero()[0]) + 3
    turns = [{"input_ids": whole["input_ids"][:, :end]}, {"input_ids": whole["input_ids"][:, end:]}]
    cut = int(whole["image_grid_thw"][0].prod())
    pixels = whole["pixel_values"].split([cut, len(whole["pixel_values"]) - cut])
    past = None
    with attach(model, keep=0.25, calibration=calibration):
        for turn, places in enumerate((slice(end), slice(end, None))):
            turns[turn] |= {"pixel_values": pixels[turn], "image_grid_thw": whole["image_grid_thw"][turn : turn + 1]}
            types = whole["mm_token_type_ids"][:, places]
            output = model(**turns[turn], mm_token_type_ids=types, position_ids=ids[..., places], **{CACHE: past})
            past = output[CACHE]
        expected = logits(model, whole)[:, -output.logits.shape[1] :]
    torch.testing.assert_close(output.logits, expected, **CLOSE)


def test_one_axis_is_the_same_in_all(family, model):
    """Positions (B, T) of the caller; and of embeddings alone, of which the model knows no grid."""
    inputs = inputs_of(family, ROWS[1])
    ids = torch.arange(inputs["input_ids"].shape[1])[None]
    embeds = {name: x for name, x in inputs.items() if name != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with attach(model, keep=0.25):
        seen = logits(model, inputs, position_ids=ids)
        assert not torch.allclose(seen, logits(model, inputs), atol=1e-3)
        torch.testing.assert_close(seen, logits(model, inputs, position_ids=ids.expand(3, 1, -1)), **CLOSE)
        torch.testing.assert_close(logits(model, embeds), seen, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_learning_goes_through_merged_pictures(family, model):
    """Labels follow their columns, also with gradient checkpointing; the tower gets gradients."""
    inputs, found = inputs_of(family, *ROWS[:2]), []
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with attach(model, keep=0.25) as handle:
        at_places = logits(model, inputs)
        column = handle.stats.layout
        wanted = labels.gather(1, column.clamp(min=0)).masked_fill(column < 0, -100)
        expected = torch.nn.functional.cross_entropy(at_places[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.testing.assert_close(loss, expected.float(), **CLOSE)
            found.append(next(model.model.visual.parameters()).grad.clone())
            model.zero_grad()
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, **CLOSE)


def test_what_cannot_be_counted_is_refused(family, model):
    inputs = inputs_of(family, ROWS[1])
    ids = torch.arange(inputs["input_ids"].shape[1])[None, None].expand(3, -1, -1)
    with attach(model, keep=0.25) as handle:
        logits(model, inputs)
        short = {name: inputs[name][:, handle.stats.layout[0]] for name in ("input_ids", "mm_token_type_ids")}
        wrong = [
            ({"mm_token_type_ids": None}, "without mm_token_type_ids.*own processor"),
            ({"image_grid_thw": None}, "pixel_values without image_grid_thw"),
            ({**short, "attention_mask": None}, "short already.*whole grid"),
            ({"position_ids": ids % 9}, "start once in every row"),
            ({"position_ids": ids[:, :, 1:]}, r"got position_ids of shape \(3, 1, \d+\), expected \(3, 1, "),
        ]
        for changes, words in wrong:
            with pytest.raises(UserError, match=words):
                logits(model, {**inputs, **changes})
