"""What calls, tasks and threads remember, and forget: settings for a block, errors, half-made attachments."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import gc
import pickle
import queue
import threading
import weakref

import pytest
import torch
from checks import assert_same_modules, assert_works, is_plain, logits
from families import BY_TITLE, QUESTIONS, pictures
from models import build
from torch import nn
from transformers import LlavaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from pitome_mllm import attach
from pitome_mllm.attach import Attachment
from pitome_mllm.families.geometry import geometry
from pitome_mllm.hooks import graphs, install
from pitome_mllm.plan import make_plan
from pitome_mllm.settings import Settings

SHALLOW = 3  # layers of the tower


@pytest.fixture
def shallow():
    return build(layers=SHALLOW)


@pytest.fixture(scope="module")
def shallow_plain():
    return build(layers=SHALLOW)


@pytest.fixture
def tokens(shallow, one):
    """An attachment that keeps 288 tokens, and a function that tells how many a call by the caller keeps."""
    handle = attach(shallow, "pitome", keep=288)

    def ask():
        logits(shallow, one)
        return handle.stats.tokens_after

    return handle, ask


def left(handle):
    """What the calling task still knows besides its stats."""
    return handle.state.choices, handle.encoded


# ---- settings for a block --------------------------------------------------------------------------------------------


def test_tasks_on_one_thread_have_settings_and_stats_of_their_own(tokens):
    handle, ask = tokens
    seen = {}

    async def request(keep):
        with handle.using(keep=keep):
            for _ in range(2):
                await asyncio.sleep(0)
                asked = ask()
                await asyncio.sleep(0)  # the other task asks
                seen.setdefault(keep, []).append((asked, handle.stats.tokens_after, handle.plan.keep))

    async def main():
        await asyncio.gather(request(200), request(144))
        return left(handle), handle.stats

    assert asyncio.run(main()) == (((), None), None)
    assert seen == {200: [(200, 200, 200)] * 2, 144: [(144, 144, 144)] * 2}
    assert ask() == 288 and left(handle) == ((), None)


def test_a_task_starts_with_the_settings_of_who_made_it_and_ends_them_with_the_block(tokens):
    handle, ask = tokens
    seen = []

    async def child():
        seen.append(ask())
        await asyncio.sleep(0)
        seen.append(ask())

    async def main():
        with handle.using(keep=200):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        await task

    asyncio.run(main())
    assert seen == [200, 288]


def test_blocks_may_end_in_any_order(tokens):
    handle, ask = tokens
    first, second = handle.using(keep=200), handle.using(keep=144)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ask() == 144  # the one that is still open
    second.__exit__(None, None, None)
    assert ask() == 288 and left(handle) == ((), None)


def test_a_block_may_end_in_another_thread(tokens):
    handle, ask = tokens
    block = handle.using(keep=200)
    block.__enter__()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: block.__exit__(None, None, None)).result() is False
        assert pool.submit(ask).result() == 288
        assert pool.submit(left, handle).result() == ((), None)
    assert ask() == 288 and not handle.state.open


def test_a_generator_that_threads_step_in_turn_leaves_nothing(tokens):
    handle, ask = tokens

    def answers():
        with handle.using(keep=200):
            for _ in range(3):
                yield ask()

    pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(2)]
    stream = answers()
    seen = [pools[step % 2].submit(next, stream, "end").result() for step in range(4)]
    assert seen == [200, 288, 200, "end"]  # it has its settings where it opened them
    assert [pool.submit(ask).result() for pool in pools] == [288, 288]

    paused = answers()
    assert next(paused) == 200 and ask() == 200  # its caller's too, as `using` says
    paused.close()
    assert ask() == 288


def test_the_plan_within_the_plain_model_is_none(tokens):
    handle, ask = tokens
    with handle.using(None):
        assert handle.plan is None
        with handle.using(keep=200):
            assert handle.plan.keep == ask() == 200
    assert handle.plan.keep == 288


def test_concurrent_updates_lose_none(tokens, monkeypatch):
    (handle, _), planned, told, first = tokens, Attachment._planned, queue.Queue(), threading.Semaphore(1)

    class Telling:
        """A lock that tells who has to wait for it."""

        lock = threading.Lock()

        def __enter__(self):
            if not self.lock.acquire(blocking=False):
                told.put("waits")
                self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    def slowly(self, settings):
        """The first one goes on once the other waits for it, or is in here too."""
        if not first.acquire(blocking=False):
            told.put("in")
        else:
            told.get(timeout=60)
        return planned(self, settings)

    monkeypatch.setattr(handle, "_updating", Telling())
    monkeypatch.setattr(Attachment, "_planned", slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        changes = {"keep": 200}, {"method": "tome"}
        for done in [pool.submit(handle.update, **change) for change in changes]:
            done.result()
    assert (handle.plan.keep, handle.plan.method, handle.settings.keep, handle.settings.method) == (200, "tome") * 2


def test_nothing_keeps_a_model_that_nobody_has(one):
    model = build(layers=SHALLOW)
    handle = attach(model, keep=144)
    logits(model, one)
    gone = [weakref.ref(thing) for thing in (model, handle, handle.stats)]
    del model, handle
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_contexts_keep_nothing_of_attachments_that_ended(shallow, one):
    """Those of threads and tasks that live on: neither stats, nor a variable for each (see `hooks.state`)."""

    def attachments(times):
        """Attach, choose, run and remove; what is left of that, and the variables of the context."""
        gone = []
        for _ in range(times):
            with attach(shallow, keep=144) as handle, handle.using(keep=200):
                logits(shallow, one)
                gone += map(weakref.ref, (handle, handle.stats))
        del handle
        gc.collect()
        return [ref() for ref in gone if ref() is not None], len(contextvars.copy_context())

    async def task():
        return attachments(1), attachments(2)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = [pool.submit(attachments, times).result() for times in (1, 2)]
    for (few, before), (many, after) in (found, asyncio.run(task())):
        assert few == many == [] and after == before


# ---- errors on the way -----------------------------------------------------------------------------------------------

LAYER = "model.vision_tower.encoder.layers.1"
NEIGHBOURS = ["", "model", "model.vision_tower", LAYER, f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.q_proj"]
NEIGHBOURS += [f"{LAYER}.mlp", "model.multi_modal_projector", "model.language_model", "model.language_model.layers.0"]
NEIGHBOURS += ["lm_head"]


def fail_once(module, error, when):
    """The next call of ``module`` raises ``error`` before or after its forward."""

    def hook(*_):
        handle.remove()
        raise error

    register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    handle = register(hook)


def inside(model, hidden=64):
    """The LLM alone, called past the model."""
    embeds = torch.linspace(-1, 1, 7 * hidden).view(1, 7, hidden)
    with torch.no_grad():
        return model.model.language_model(inputs_embeds=embeds, position_ids=torch.arange(7)[None]).last_hidden_state


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_an_error_leaves_nothing(shallow, shallow_plain, one, name, when):
    handle = attach(shallow, keep=144)  # original positions, and a bias of sizes in the LLM
    expected = logits(shallow, one)
    for error in (ValueError("ours"), KeyboardInterrupt()):
        for call in (logits, lambda model, inputs: model.generate(**inputs, max_new_tokens=2)):
            fail_once(shallow.get_submodule(name), error, when)
            with pytest.raises(type(error)):
                call(shallow, one)
            assert left(handle) == ((), None)
            assert torch.equal(inside(shallow), inside(shallow_plain))
            with handle.using(None):
                assert is_plain(shallow, shallow_plain, one)
            assert torch.equal(logits(shallow, one), expected)


def test_an_error_drops_pictures_that_were_encoded_ahead():
    family = BY_TITLE["LLaVA-NeXT (1.6)"]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    handle = attach(model, keep=9)
    expected = logits(model, inputs)
    for call in (logits, lambda model, inputs: model.generate(**inputs, max_new_tokens=2)):
        fail_once(model.model.language_model, ValueError("ours"), "before")
        with pytest.raises(ValueError, match="ours"):
            call(model, inputs)
        assert left(handle) == ((), None)
        assert torch.equal(logits(model, inputs), expected)


def test_a_layer_called_alone_after_an_error_keeps_nothing(shallow, one):
    attach(shallow, "pitome", keep=144)
    layer = shallow.get_submodule(LAYER)
    fail_once(layer.self_attn.out_proj, ValueError("ours"), "before")
    with pytest.raises(ValueError, match="ours"):
        logits(shallow, one)
    inbox = layer._pitome.inbox
    assert (inbox.wanted, inbox.keys, inbox.query) == ((), None, None)


def test_an_llm_that_is_not_called_as_merging_needs_it_is_noticed(shallow, one):
    attach(shallow, keep=144)
    forward = shallow.model.forward
    shallow.model.forward = lambda pitome_call=None, **kwargs: forward(**kwargs)
    with pytest.raises(RuntimeError, match="attach again"):
        logits(shallow, one)


# ---- whole or not at all ---------------------------------------------------------------------------------------------

STEPS = [(nn.Module, "register_forward_hook"), (nn.Module, "register_forward_pre_hook"), (install, "_swap_class")]
STEPS += [(install, "make_generate"), (install, "_attached_modules"), (graphs, "install")]


@pytest.mark.parametrize("owner, name", STEPS)
def test_an_attachment_that_fails_half_way_undoes_itself(shallow, shallow_plain, one, monkeypatch, owner, name):
    own, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    for at in (1, 2, 5):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with contextlib.suppress(KeyboardInterrupt):
                attach(shallow, "pitome", published=True, keep=144)
        if len(calls) >= at:
            assert Attachment.of(shallow) is None
        else:
            Attachment.of(shallow).remove()
        assert_same_modules(shallow, build(layers=SHALLOW))
    assert_works(attach(shallow, "pitome", published=True, keep=144), shallow, shallow_plain, one)


def test_a_compiled_model_merges(shallow, shallow_plain, one):
    """Also one that ran before."""
    torch.compiler.reset()
    compiled = torch.compile(shallow, backend="eager")
    logits(compiled, one)
    with attach(compiled, "pitome", keep=144) as handle:
        assert handle.model is shallow
        merged = logits(compiled, one)
        assert handle.stats.tokens_after == 144
        torch.testing.assert_close(merged, logits(shallow, one))
        with handle.using(keep=200):
            logits(compiled, one)
            assert handle.stats.tokens_after == 200
    torch.testing.assert_close(logits(compiled, one), logits(shallow_plain, one))
    torch.compiler.reset()


def test_classes_that_others_derive_stay_theirs(shallow, one):
    """As FSDP does: a class derived from the layer's own, whichever that is at the time."""
    handle = attach(shallow, "pitome", keep=144)
    layers = shallow.model.vision_tower.encoder.layers

    class Sharded:
        note = "theirs"

    for layer in layers:
        layer.__class__ = type(f"Sharded{type(layer).__name__}", (Sharded, type(layer)), {"more": 1})
    logits(shallow, one)
    assert handle.stats.tokens_after == 144
    expected = build(layers=SHALLOW)
    handle.remove()
    for layer in layers:
        assert type(layer).__mro__[1:3] == (Sharded, CLIPEncoderLayer)
        assert (type(layer).__name__, layer.note, layer.more) == ("ShardedCLIPEncoderLayer", "theirs", 1)
    assert is_plain(shallow, expected, one)
    with attach(shallow, "pitome", keep=144) as handle:
        logits(shallow, one)
        assert handle.stats.tokens_after == 144


def test_fsdp_stays_after_removing(shallow, shallow_plain, one, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        handle = attach(shallow, "pitome", keep=144)
        layers = shallow.model.vision_tower.encoder.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(shallow)
        logits(shallow, one)
        assert handle.stats.tokens_after == 144
        handle.remove()
        assert all(isinstance(layer, FSDPModule) and type(layer).__mro__[2] is CLIPEncoderLayer for layer in layers)
        torch.testing.assert_close(logits(shallow, one), logits(shallow_plain, one))
    finally:
        distributed.destroy_process_group()


# ---- refused in words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["LLaVA-NeXT (1.6)", "Idefics3"])
def test_pickling_says_what_to_do(shallow, title):
    for model in (shallow, BY_TITLE[title].build()):
        attach(model, keep=0.25)
        with pytest.raises(ValueError, match=r"handle.remove\(\) before torch.save.*save_pretrained"):
            pickle.dumps(model)
        Attachment.of(copy.deepcopy(model)).remove()
        Attachment.of(model).remove()
        pickle.dumps(model)


def test_replicas_of_data_parallel_are_refused(shallow, one):
    attach(shallow, "pitome", keep=144)
    replica = shallow._replicate_for_data_parallel()  # as nn.DataParallel does it
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        replica(**one)


class Adapted(CLIPEncoderLayer):
    """An encoder layer with a bottleneck adapter behind it."""

    def forward(self, *args, **kwargs):
        x = super().forward(*args, **kwargs)
        return x + self.up(torch.relu(self.down(x)))


def test_a_layer_s_own_forward_is_called_or_refused(shallow, one):
    for layer in shallow.model.vision_tower.encoder.layers:
        layer.__class__, width = Adapted, layer.layer_norm1.normalized_shape[0]
        layer.down, layer.up = nn.Linear(width, 4).double(), nn.Linear(4, width).double()
    with pytest.raises(ValueError, match="Adapted.*place='end'"):
        attach(shallow, "pitome", keep=144)
    assert Attachment.of(shallow) is None
    with attach(shallow, "pitome", keep=144, place="end") as handle:
        with pytest.raises(ValueError, match="Adapted.*place='end'"):
            handle.update(place="mid")
        shallow(**one).logits.sum().backward()
        adapters = [layer.up.weight for layer in shallow.model.vision_tower.encoder.layers[: len(handle.plan.counts)]]
        assert all(bool(weight.grad.abs().sum() > 0) for weight in adapters)


def test_a_forward_that_was_put_on_a_layer_is_refused(shallow):
    layer = shallow.get_submodule(LAYER)
    layer.forward = lambda *args, **kwargs: CLIPEncoderLayer.forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match="forward replaced by .*lambda"):
        attach(shallow, "pitome", keep=144, place="end")
    assert Attachment.of(shallow) is None


@pytest.mark.parametrize("call", [logits, lambda model, inputs, **more: model.generate(**inputs, **more)])
def test_other_features_than_planned_are_refused_by_name(shallow, shallow_plain, one, call):
    handle = attach(shallow, keep=144)
    with pytest.raises(ValueError, match="vision_feature_layer=-3, merging is planned for -2"):
        call(shallow, one, vision_feature_layer=-3)
    shallow.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match="vision_feature_layer=-1, merging is planned for -2"):
        call(shallow, one)
    call(shallow, one, vision_feature_layer=-2)
    with handle.using(None):
        expected = logits(shallow_plain, one, vision_feature_layer=-1)
        assert torch.equal(logits(shallow, one), expected)


@pytest.mark.parametrize("kind", ["pixtral", "siglip2_vision_model", "dinov2", "timm_wrapper", "hiera", "mllama"])
def test_towers_without_a_row_are_merged_behind(kind):
    from transformers import AutoConfig, LlavaOnevisionConfig

    vision = AutoConfig.for_model(kind)
    if kind == "mllama":
        vision = vision.vision_config
    for config in (LlavaConfig(vision_config=vision), LlavaOnevisionConfig(vision_config=vision)):
        found = geometry(config)
        assert found.family.places == ("packed",) and found.available > 0
        with pytest.raises(ValueError, match="where='both' is not possible.*choose where='packed'"):
            make_plan(Settings(keep=0.5, where="both"), found)
