"""Models of the original llava package merge, come off again, and load from a folder."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from threading import Thread

import llava.model.llava_arch as arch
import pytest
import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from shrunken import BLOCKS, IMAGE, LAYOUTS, PATCHES, build, inputs, lengths, picture
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from pitome_mllm import attach, get_method, load

WHERES = ("tower", "projector", "both")
CASES = [("square", where) for where in WHERES]
CASES += [(layout, where) for layout in ("anyres", "spatial") for where in (*WHERES, "packed")]
ROWS = [[1, 5, IMAGE, 7, 8, 9], [1, IMAGE, 9, 10, 11, 12, 13, 14, 6]]


def test_the_package_has_the_signatures_that_are_relied_on():
    classes = {c.__name__: c for c in (arch.LlavaMetaForCausalLM, CLIPVisionTower, CLIPEncoderLayer, CLIPAttention)}
    signatures = Path(__file__).parents[1] / "data" / "llava_signatures.json"
    for name, parameters in json.loads(signatures.read_text()).items():
        owner, method = name.split(".")
        found = inspect.signature(inspect.unwrap(getattr(classes[owner], method))).parameters
        assert list(found)[1:] == parameters, name


@torch.no_grad()
@pytest.mark.parametrize("layout, where", CASES)
def test_all_tokens_kept_changes_no_bit(tower, layout, where):
    plain, model = build(tower, layout), build(tower, layout)
    given = inputs(plain, [0, 1], ROWS)
    with attach(model, "pitome", published=True, keep=1.0, where=where) as handle:
        assert torch.equal(model(**given).logits, plain(**given).logits)
        assert handle.stats.tokens_after == PATCHES


@torch.no_grad()
@pytest.mark.parametrize("llm", ["llama", "mistral"])
@pytest.mark.parametrize("layout, where", CASES)
def test_a_quarter_of_the_tokens_reaches_the_llm(tower, layout, where, llm):
    plain, model = build(tower, layout, llm), build(tower, layout, llm)
    given = inputs(plain, [1, 3], ROWS)
    text = given["attention_mask"].sum(1) - 1
    full = (torch.tensor(lengths(plain, given)) - text).tolist()
    handle = attach(model, "pitome", published=True, keep=0.25, where=where)
    seen = (torch.tensor(lengths(model, given)) - text).tolist()
    assert tuple(seen) == handle.stats.lengths
    if layout == "square":
        assert seen == [PATCHES // 4] * 2
    elif where == "packed":
        newlines = [_newlines(plain, given, i) for i in range(2)]
        assert seen == [round((n - lines) / 4) for n, lines in zip(full, newlines)]
    else:  # what shows nothing but padding is left out, newlines stay
        for i, (before, after) in enumerate(zip(full, seen)):
            lines, tiles = _newlines(plain, given, i), len(given["images"][i])
            assert (before - lines) / 5 < after - lines <= tiles * PATCHES // 4
    ids = {"images": given["images"], "image_sizes": given["image_sizes"], "attention_mask": given["attention_mask"]}
    answer = model.generate(given["input_ids"], **ids, max_new_tokens=5, do_sample=False, use_cache=True)
    again = model.generate(given["input_ids"], **ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert answer.shape[0] == 2 and torch.equal(answer, again)


def _newlines(model, given, row):
    """Newlines in a row of the plain model's prompt, found by their value."""
    if not hasattr(model.model, "image_newline"):
        return 0
    _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], None, given["attention_mask"], None, None, given["images"], given["image_sizes"]
    )
    return int((embeds[row] == model.model.image_newline).all(-1).sum())


@torch.no_grad()
def test_the_tower_merges_as_written_out_by_hand(tower):
    """The blocks of the plain tower one by one, with keys, sizes and proportional attention in plain sight."""
    plain, model = build(tower), build(tower)
    given = inputs(plain, [0, 1], ROWS)
    handle = attach(model, "pitome", published=True, keep=36)
    counts, reducer = handle.plan.counts, get_method("pitome")
    clip = plain.get_vision_tower().vision_tower.vision_model
    x = clip.pre_layrnorm(clip.embeddings(given["images"]))
    size = torch.ones(*x.shape[:2], 1)
    for block, (layer, left) in enumerate(zip(clip.encoder.layers, counts)):
        normed = layer.layer_norm1(x)
        bias = size.log().mT[:, None].expand(-1, -1, x.shape[1], -1)
        keys = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).mean(2)
        x = x + layer.self_attn(normed, bias)[0]
        merge = reducer.match(keys, x.shape[1] - 1 - left, size=size, protected=1, depth=block / len(counts))
        x, size = merge.reduce(x, size)
        x = x + layer.mlp(layer.layer_norm2(x))
    assert len(counts) == BLOCKS - 1
    expected = plain.get_model().mm_projector(x[:, 1:])
    torch.testing.assert_close(model.encode_images(given["images"]), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(handle.stats.sizes, size[:, 1:, 0])


@torch.no_grad()
@pytest.mark.parametrize("layout, where", CASES)
def test_a_batch_gives_what_its_rows_give_alone(tower, layout, where):
    """Pictures of several sizes, two in the first row."""
    model = build(tower, layout)
    rows = [[1, IMAGE, 4, IMAGE, 5, 6], [1, IMAGE, 9, 10]]
    whole = inputs(model, [1, 0, 3], rows)
    with attach(model, "pitome", published=True, keep=36, where=where) as handle:
        together = model(**whole).logits
        groups = handle.stats.groups
        for row, (numbers, ids) in enumerate(zip(([1, 0], [3]), rows)):
            alone = model(**inputs(model, numbers, [ids])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)
        tiles = len(handle.stats.groups)
    assert torch.equal(torch.as_tensor(groups[-1]), torch.as_tensor(handle.stats.groups[-1])) and tiles


@torch.no_grad()
def test_packed_tokens_are_merged_without_newlines(tower):
    """Newlines are found by their value here."""
    plain, model = build(tower, "anyres"), build(tower, "anyres")
    given = inputs(plain, [1], [[IMAGE, 5]])
    arguments = (given["input_ids"], None, None, None, None, given["images"], given["image_sizes"])
    full = plain.prepare_inputs_labels_for_multimodal(*arguments)[4][0, :-1]
    attach(model, "tome", published=True, keep=0.5, where="packed")
    seen = model.prepare_inputs_labels_for_multimodal(*arguments)[4][0, :-1]
    full = full[~(full == plain.model.image_newline).all(-1)][None]
    merge = get_method("tome").match(full, full.shape[1] - round(full.shape[1] / 2), depth=1.0)
    torch.testing.assert_close(seen, merge.reduce(full)[0][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_removing_leaves_no_trace(tower, layout):
    plain, model = build(tower, layout), build(tower, layout)
    given = inputs(plain, [0, 1], ROWS)
    handle = attach(model, keep=36)
    model(**given)
    with handle.using(None):
        assert torch.equal(model(**given).logits, plain(**given).logits)
        assert handle.stats is None
    handle.update(keep=18, method="tome", published=True)
    model(**given)
    assert handle.stats.tokens_after == 18
    with pytest.raises(ValueError, match="already carries tome"):
        attach(model, keep=9)
    handle.remove()
    assert torch.equal(model(**given).logits, plain(**given).logits)
    for (name, ours), (_, theirs) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert type(ours) is type(theirs) and set(vars(ours)) == set(vars(theirs)), name
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
            assert len(getattr(ours, hooks)) == len(getattr(theirs, hooks)), name


@torch.no_grad()
def test_a_copy_and_another_thread_have_their_own(tower):
    model = build(tower, "anyres")
    given = inputs(model, [1], [[1, IMAGE, 5]])
    attach(model, "pitome", published=True, keep=36)
    twin, seen = copy.deepcopy(model), {}

    def run(name, one):
        with one._pitome.using(keep=18 if name == "twin" else 72):
            seen[name] = (one(**given).logits.shape[1], one._pitome.stats.tokens_after)

    threads = [Thread(target=run, args=pair) for pair in (("twin", twin), ("model", model)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["twin"][1] == 18 and seen["model"][1] == 72 and seen["twin"][0] < seen["model"][0]
    model(**given)
    assert model._pitome.stats.tokens_after == 36


def test_gradients_flow_through_the_merge(tower):
    model = build(tower, "anyres").train()
    given = inputs(model, [1, 3], ROWS)
    labels = (
        given["input_ids"]
        .masked_fill(given["attention_mask"] == 0, -100)
        .masked_fill(given["input_ids"] == IMAGE, -100)
    )
    for where in ("tower", "packed"):
        with attach(model, "pitome", published=True, keep=36, where=where):
            model.zero_grad()
            loss = model(**given, labels=labels).loss
            loss.backward()
        gradients = [w.grad for w in model.get_model().mm_projector.parameters()]
        assert loss.isfinite() and all(g is not None and g.isfinite().all() and g.any() for g in gradients)


@torch.no_grad()
@pytest.mark.parametrize("layout, where", CASES)
def test_turns_continue_the_cache(tower, layout, where):
    """A second question on the cache of the first one: the same as both at once."""
    model = build(tower, layout)
    first = inputs(model, [1], [[1, IMAGE, 5, 6]])
    both = inputs(model, [1], [[1, IMAGE, 5, 6, 7, 8, 9]])
    attach(model, "pitome", published=True, keep=36, where=where)
    begun = model(**first, use_cache=True)
    more = model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=begun.past_key_values, use_cache=True)
    torch.testing.assert_close(more.logits, model(**both).logits[:, -3:], atol=1e-4, rtol=1e-4)


def test_mpt_models_cannot_take_pictures_and_are_refused(tower):
    """The reason for refusing them: forward() calls a method of the package with too few arguments."""
    from llava.model import LlavaMptConfig, LlavaMptForCausalLM

    config = LlavaMptConfig(d_model=64, n_heads=2, n_layers=1, vocab_size=64, mm_vision_tower=str(tower))
    for name, value in dict(
        mm_projector_type="linear", mm_hidden_size=64, mm_vision_select_layer=-2, mm_vision_select_feature="patch"
    ).items():
        setattr(config, name, value)
    model = LlavaMptForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    given = inputs(model, [0], [[1, IMAGE, 5]])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'images'"):
        model(input_ids=given["input_ids"], images=given["images"])
    with pytest.raises(ValueError, match="LlavaMptForCausalLM: its own forward"):
        attach(model, keep=36)


@torch.no_grad()
def test_the_default_goes_without_what_the_package_cannot_take(tower, caplog):
    model = build(tower)
    handle = attach(model, keep=36)
    assert "calibration='none', which costs accuracy: the original llava package" in caplog.text
    assert handle.plan.calibration == "none"
    assert lengths(model, inputs(model, [0], [[1, IMAGE, 5]])) == [38]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"calibration": "size"}, "calibration='size' is not possible: the original llava package"),
        ({"logits": "caller"}, "logits=.caller. is not possible with the original llava package"),
        ({"method": "downsample"}, "method='downsample' is not possible with the original llava package"),
    ],
)
def test_what_it_cannot_take_is_refused(tower, settings, said):
    model = build(tower)
    with pytest.raises(ValueError, match=said):
        attach(model, keep=36, **{"method": "pitome", **settings})
    attach(model, "pitome", published=True, keep=36)  # and nothing was left on it


def test_a_tower_that_is_not_loaded_is_refused(tower):
    model = build(tower)
    model.get_vision_tower().is_loaded = False
    model.get_vision_tower().cfg_only = model.get_vision_tower().vision_tower.config
    with pytest.raises(ValueError, match="load_model"):
        attach(model, keep=36)


@pytest.fixture(params=["square", "anyres"])
def checkpoint(request, tower, words, tmp_path):
    """A folder as the package saves it, with its tokenizer: its configuration says llava_llama."""
    own_tower = request.param == "anyres"  # as liuhaotian/llava-v1.6-vicuna-7b
    model = build(tower, request.param, vocab_size=40, unfreeze_mm_vision_tower=own_tower)
    if own_tower:
        for weight in model.get_vision_tower().parameters():
            weight.data.mul_(1.1)
    model.save_pretrained(tmp_path)
    for file in words.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, model


@torch.no_grad()
def test_a_checkpoint_loads_merges_and_answers(checkpoint):
    folder, saved = checkpoint
    model, processor = load(folder, dtype="float32")
    assert not model.training and type(model).__name__ == "LlavaLlamaForCausalLM"
    asked = processor(images=[picture(1)], text="USER: <image> what is in this picture ? ASSISTANT:")
    assert int((asked["inputs"] == IMAGE).sum()) == 1
    settings = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**asked, **settings)
    assert torch.equal(answer, saved.generate(**asked, **settings))
    with attach(model, "pitome", published=True, keep=36) as handle:
        merged = model.generate(**asked, **settings)
        assert handle.stats.tokens_after == 36 and merged.shape == answer.shape
    assert isinstance(processor.batch_decode(answer)[0], str)


def test_checkpoints_that_cannot_be_loaded_say_why(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(ValueError, match="bits=4 is not possible .* then attach"):
        load(folder, bits=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights of LlavaLlamaForCausalLM"):
        load(folder)
