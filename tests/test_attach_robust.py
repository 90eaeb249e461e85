"""It really merges, every time: checkpointing, compilation, threads, attention backends, low precision."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from by_hand import Reference, encode
from checks import assert_merged_like, assert_row, assert_works, is_plain, logits, merged_by_hand, new_ids, reference
from models import IMAGE, PATCHES, build, build_text_model
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from pitome_mllm import METHODS, attach, get_method

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

# ---- training --------------------------------------------------------------------------------------------------------


def train_step(model, inputs):
    """Loss, gradients by name, and how often the first block ran (twice under checkpointing)."""
    calls = []
    hook = model.model.vision_tower.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    hook.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(calls)


def assert_same_gradients(seen, expected):
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("where", ["tower", "both"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_merges_and_gives_the_same_gradients(model, pair, where, reentrant):
    settings = {"keep": 144, "where": where}
    other = build()
    attach(other, "pitome", published=True, **settings)
    loss, expected, once = train_step(other, pair)
    handle = attach(model, "pitome", published=True, **settings)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed, seen, twice = train_step(model, pair)
    assert (once, twice) == (1, 2), "checkpointing must really recompute"
    assert handle.stats.tokens_after == 144 and handle.stats.images == 2
    assert handle.stats.counts == handle.plan.counts
    torch.testing.assert_close(checkpointed, loss)
    assert_same_gradients(seen, expected)


def test_checkpointing_enabled_before_attaching(model, pair):
    model.gradient_checkpointing_enable()
    handle = attach(model, "pitome", published=True, keep=144)
    _, seen, calls = train_step(model, pair)
    assert calls == 2 and handle.stats.tokens_after == 144
    other = build()
    attach(other, "pitome", published=True, keep=144)
    assert_same_gradients(seen, train_step(other, pair)[1])


def test_gradients_equal_the_merge_written_out(model, one):
    twin = build()
    handle = attach(model, "pitome", published=True, keep=144)
    _, seen, _ = train_step(model, one)
    tokens = encode(twin, one["pixel_values"], handle.plan.counts, get_method("pitome"))
    expected = Reference(twin, one, tokens)
    embeddings = twin.get_input_embeddings()(one["input_ids"][0, expected.caller[0]])
    is_image = one["input_ids"][0, expected.caller[0]] == IMAGE
    embeddings = embeddings.masked_scatter(is_image[:, None], tokens.features[0])
    hidden = twin.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state
    labels = one["input_ids"][0, expected.caller[0]].masked_fill(is_image, -100)
    torch.nn.functional.cross_entropy(twin.lm_head(hidden)[0, :-1], labels[1:]).backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name for name in gradients)
    assert_same_gradients({n: seen[n] for n in gradients}, gradients)


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shallow(one):
    """A model with two merging blocks, and its plain twin. Both ran once: the very first run takes a lock (a recorder
    of transformers is installed), which no compiler gets through."""
    torch.compiler.reset()
    models = build(layers=3), build(layers=3)
    for model in models:
        logits(model, one)
    yield models
    torch.compiler.reset()


def assert_compiled_run(handle, model, plain, inputs):
    seen = logits(model, inputs)
    expected = reference(plain, inputs, handle.plan.counts)
    for row in range(len(seen)):
        assert_row(seen[row], expected.logits(row))
    assert_merged_like(handle, expected.tokens)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tower_compiled_after_attaching_merges_without_graph_breaks(shallow, one, backend):
    model, plain = shallow
    with attach(model, "pitome", published=True, keep=288) as handle:
        model.model.vision_tower = torch.compile(model.model.vision_tower, fullgraph=True, backend=backend)
        assert_compiled_run(handle, model, plain, one)
        logits(model, one)
        assert handle.stats.tokens_after == 288  # the second run takes the finished graph


def test_a_tower_compiled_before_attaching_merges_too(shallow, one):
    model, plain = shallow
    model.model.vision_tower = torch.compile(model.model.vision_tower, fullgraph=True, backend="eager")
    logits(model, one)
    with attach(model, "pitome", published=True, keep=288) as handle:
        assert_compiled_run(handle, model, plain, one)
        handle.update(keep=144)  # the graph of the old plan must not be used again
        assert_compiled_run(handle, model, plain, one)
        assert new_ids(model, one, 4) == [reference(plain, one, handle.plan.counts).greedy(0, 4)]
    torch.testing.assert_close(logits(model, one), logits(plain, one), atol=1e-4, rtol=1e-4)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_four_threads_with_different_settings(model, plain, one, pair):
    """Each thread has its own settings, its own state in every call, and its own stats."""
    settings = [
        ({"keep": 300}, one),
        ({"keep": 72, "method": "tome"}, pair),
        (None, one),
        ({"ratio": 0.9, "where": "tower"}, pair),
        ({"keep": 144, "where": "projector"}, one),
    ]
    handle = attach(model, "pitome", published=True, keep=144)
    expected = []
    for setting, inputs in settings:
        with handle.using(None) if setting is None else handle.using(**setting):
            expected.append((logits(model, inputs), None if setting is None else handle.stats.groups))
    assert torch.equal(expected[2][0], logits(plain, one))
    barrier, wrong = threading.Barrier(len(settings)), []

    def work(i):
        setting, inputs = settings[i]
        try:
            assert handle.stats is None, "the stats of another thread"
            with handle.using(None) if setting is None else handle.using(**setting):
                for _ in range(6):
                    barrier.wait(60)
                    seen = logits(model, inputs)
                    if setting is not None:
                        assert torch.equal(handle.stats.groups, expected[i][1])
                    torch.testing.assert_close(seen, expected[i][0], atol=1e-5, rtol=1e-5)
            barrier.wait(60)
            logits(model, inputs)
            assert handle.stats.tokens_after == 144, "settings must end with the block"
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            wrong.append((i, error))
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [(i, error) for i, error in wrong if not isinstance(error, threading.BrokenBarrierError)]
    assert not real, real
    assert_works(handle, model, plain, one)


def test_settings_for_a_block_nest_and_end(model, plain, one):
    handle = attach(model, "pitome", published=True, keep=144)
    with handle.using(keep=288):
        assert_works(handle, model, plain, one, keep=288)
        with handle.using(keep=72, method="tome", published=True):
            assert_works(handle, model, plain, one, "tome", keep=72)
        with handle.using(None):
            assert is_plain(model, plain, one)
            assert new_ids(model, one) == new_ids(plain, one)
        assert_works(handle, model, plain, one, keep=288)
    assert_works(handle, model, plain, one, keep=144)
    with pytest.raises(KeyError):
        with handle.using(keep=72):
            raise KeyError
    assert_works(handle, model, plain, one)


def test_settings_for_a_block_stay_in_their_thread(model, one):
    handle, seen = attach(model, "pitome", published=True, keep=144), []

    def other():
        logits(model, one)
        seen.append(handle.stats.tokens_after)

    with handle.using(keep=72):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert handle.stats is None
    assert seen == [144]


# ---- attention backends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_backends_agree_with_the_definition(plain, pair, attention):
    model = build(attention=attention)
    with attach(model, "pitome", published=True, keep=144) as handle:
        seen = logits(model, pair)
        assert model.config.vision_config._attn_implementation == attention
        expected = reference(plain, pair, handle.plan.counts)
        assert_merged_like(handle, expected.tokens)
        for row in range(2):
            assert_row(seen[row], expected.logits(row))
    assert model.config.vision_config._attn_implementation == attention


def test_sdpa_never_materialises_attention_weights(model, one, monkeypatch):
    from transformers.models.clip import modeling_clip

    def refuse(*_, **__):
        raise AssertionError("attention weights were materialised")

    fast, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*args, **options):
        calls.append(1)
        return fast(*args, **options)

    monkeypatch.setattr(modeling_clip, "eager_attention_forward", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    with attach(model, "pitome", published=True, keep=144) as handle:
        logits(model, one)
        assert handle.stats.tokens_after == 144
    assert len(calls) == 7 + 2  # every block of the tower and of the LLM


def strange_attention(module, query, key, value, attention_mask, **_):
    """A backend that ignores every mask, as flash attention does."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous(), None


@pytest.fixture
def strange():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("strange", strange_attention)
    AttentionMaskInterface.register("strange", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield "strange"


@pytest.mark.parametrize("switch_first", [True, False])
@pytest.mark.parametrize("backend", ["strange", "flex_attention"])
def test_a_backend_without_bias_is_refused_or_the_tower_switched(model, plain, one, strange, backend, switch_first):
    switch = functools.partial(model.set_attn_implementation, {"vision_config": backend})
    text_backend = model.config.text_config._attn_implementation
    try:
        if switch_first:
            switch()
        handle = attach(model, "pitome", published=True, keep=144)
        if not switch_first:
            switch()
        seen = logits(model, one)
    except (ValueError, RuntimeError) as error:
        said = str(error)
        assert backend in said and "sdpa" in said
    else:
        expected = reference(plain, one, handle.plan.counts)
        assert_merged_like(handle, expected.tokens)
        assert_row(seen[0], expected.logits())
        handle.remove()
    assert model.config.text_config._attn_implementation == text_backend
    assert model.config.vision_config._attn_implementation == backend


def test_a_backend_without_bias_is_fine_where_no_bias_is_needed(model, plain, one, strange):
    model.set_attn_implementation({"vision_config": strange})
    with attach(model, "pitome", published=True, keep=144, proportional_attention=False) as handle:
        seen = logits(model, one)
        expected = reference(plain, one, handle.plan.counts, proportional=False)
        assert_merged_like(handle, expected.tokens)
        assert_row(seen[0], expected.logits())


def test_the_llm_may_use_any_backend(model, one, strange):
    model.set_attn_implementation({"text_config": strange})
    with attach(model, "pitome", published=True, keep=144) as handle:
        logits(model, one)
        assert handle.stats.tokens_after == 144


# ---- a block that does not merge is noticed --------------------------------------------------------------------------


def bypass_forward(layers):
    layers[2].forward = functools.partial(CLIPEncoderLayer.forward, layers[2])


def swap_layer(layers):
    fresh = CLIPEncoderLayer(layers[2].self_attn.config).double().eval()
    fresh.load_state_dict(layers[2].state_dict())
    layers[2] = fresh


@pytest.mark.parametrize("sabotage", [bypass_forward, swap_layer])
@pytest.mark.parametrize("call", [logits, new_ids])
def test_a_planned_block_that_did_not_merge_is_an_error(model, one, sabotage, call):
    attach(model, "pitome", published=True, keep=144)
    logits(model, one)
    sabotage(model.model.vision_tower.encoder.layers)
    with pytest.raises((RuntimeError, ValueError), match="(?i)block|merge"):
        call(model, one)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["tower", "projector", "both"])
def test_low_precision_is_finite_and_counts_exactly(pair, dtype, where):
    model = build().to(dtype)
    inputs = {**pair, "pixel_values": pair["pixel_values"].to(dtype)}
    with attach(model, "pitome", published=True, keep=9, where=where, energies=True) as handle:
        seen = logits(model, inputs)
        stats = handle.stats
        assert seen.dtype == dtype and seen.isfinite().all()
        assert len(new_ids(model, inputs, 3)[0]) == 3
    assert stats.sizes.dtype == torch.float32
    assert stats.tokens_after == 9 and stats.sizes.shape == (2, 9)
    for groups, sizes in zip(stats.groups, stats.sizes, strict=True):
        assert torch.equal(groups.bincount(minlength=9).float(), sizes)  # 257 patches are not 256
    assert all(energy.dtype == torch.float32 and energy.isfinite().all() for energy in stats.energies)


def test_autocast_merges(model, one):
    with (
        attach(model, "pitome", published=True, keep=144, energies=True) as handle,
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert logits(model, one).isfinite().all()
        assert handle.stats.tokens_after == 144 and handle.stats.sizes.sum() == PATCHES
        assert all(energy.dtype == torch.float32 for energy in handle.stats.energies)


@pytest.mark.parametrize("method", list(METHODS))
def test_autocast_does_not_reach_the_decision(method):
    """Energies and similarities are float32 whatever surrounds them."""
    reducer = get_method(method)
    random = torch.Generator().manual_seed(0)
    metric = torch.randn(2, PATCHES, 32, generator=random)
    available = {"grid": (24, 24), "attention": torch.rand(2, PATCHES, generator=random)}
    options = {name: available[name] for name in reducer.needs}
    expected = reducer.match(metric, 288, **options)
    with torch.autocast("cpu", torch.bfloat16):
        seen = reducer.match(metric, 288, **options)
        merged, sizes = seen.reduce(metric)
    if expected.group is not None:
        assert torch.equal(seen.group, expected.group)
    torch.testing.assert_close((merged, sizes), expected.reduce(metric))


def test_inference_mode(model, plain, one):
    with attach(model, "pitome", published=True, keep=144) as handle, torch.inference_mode():
        seen = model(**one).logits
        assert_merged_like(handle, merged_by_hand(plain, one, handle.plan.counts))
        assert_row(seen[0], reference(plain, one, handle.plan.counts).logits())
    logits(model, one)  # nothing cached in inference mode may come back


def test_a_text_model_beside_it_is_untouched(model, one):
    text = build_text_model()
    ids = one["input_ids"][:, -8:]
    with torch.no_grad():
        before = text(ids).logits
        with attach(model, keep=144):
            logits(model, one)
            assert torch.equal(text(ids).logits, before)
