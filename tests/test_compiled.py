"""``compiled=``: the merged tower as one graph for each plan and shape, the same as without, and off again."""

from __future__ import annotations

import copy
import itertools
import queue
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from checks import assert_wide_gaps
from families import FAMILIES, QUESTIONS, pictures
from models import build
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils._pytree import tree_map_only

from pitome_mllm import METHODS, attach
from pitome_mllm.costs import latency
from pitome_mllm.costs.latency import timed_tower
from pitome_mllm.hooks import graphs as captured
from pitome_mllm.hooks.turns import Turns
from pitome_mllm.methods.baselines import _shuffled
from pitome_mllm.methods.tome import ToMe
from pitome_mllm.settings import BACKENDS


@pytest.fixture(autouse=True)
def counted():
    """Counters of torch start at zero, and no graph of another test is found again."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def layer(model):
    return next(module for module in model.modules() if type(module).__name__ == "MergingCLIPEncoderLayer")


@torch.no_grad()
def seen(model, inputs):
    return model(**inputs).logits


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def assert_same_run(handle, model, inputs, **settings):
    """The same bits and the same groups with graphs as without."""
    with handle.using(compiled=False, **settings):
        expected, stats = seen(model, inputs), handle.stats
    with handle.using(compiled=handle.settings.compiled, **settings):
        assert torch.equal(seen(model, inputs), expected)
    assert (
        handle.stats is not stats
        and handle.stats.counts == stats.counts
        and torch.equal(handle.stats.sizes, stats.sizes)
    )
    assert stats.groups is None or torch.equal(handle.stats.groups, stats.groups)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bits_in_one_graph(method, one, pair):
    model, other = build(layers=2), {k: v[1:] for k, v in pair.items()}
    with attach(model, method, keep=256 if method == "pool" else 400, compiled="eager") as handle:
        assert_same_run(handle, model, one)
        assert_same_run(handle, model, other)  # another picture, the same graph
        assert graphs() == 1


def test_graphs_of_aot_autograd_give_the_same_bits(one):
    model = build(layers=3)
    with attach(model, keep=144, compiled="aot_eager") as handle:
        assert_same_run(handle, model, one)
    assert graphs() == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_counts_and_answers_within_its_rounding(pair):
    model, picture = build(layers=3), {k: v[1:] for k, v in pair.items()}
    with attach(model, "pitome", keep=144, energies=True) as handle:
        assert_wide_gaps(build(layers=3), picture, handle.plan.counts)
        expected, stats = seen(model, picture), handle.stats
        handle.update(compiled=True)
        torch.testing.assert_close(seen(model, picture), expected, atol=1e-4, rtol=1e-4)
        seen(model, picture)
        assert graphs() == 1 and handle.plan.compiled == "inductor"
        assert handle.stats.counts == stats.counts and torch.equal(handle.stats.groups, stats.groups)
        torch.testing.assert_close(handle.stats.energies, stats.energies, atol=1e-6, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_shuffles_as_torch_does():
    shuffle = captured.graph(partial(_shuffled, 576, 3), "inductor", torch.device("cpu"))
    assert torch.equal(shuffle(torch.device("cpu")), _shuffled(576, 3, torch.device("cpu")))


def test_every_setting_and_every_shape_has_one_graph(one, pair):
    model = build(layers=3)
    with attach(model, "pitome", keep=288, compiled="eager") as handle:
        for batch, setting in ((one, {"keep": 288}), (pair, {"keep": 288}), (one, {"ratio": 0.9})):
            handle.update(**setting)
            assert_same_run(handle, model, batch)
        assert graphs() == 3
        handle.update(keep=288)
        assert_same_run(handle, model, one)
        assert_same_run(handle, model, one, ratio=0.9)
        assert graphs() == 3  # those there are serve again


def test_as_many_settings_as_one_likes(one):
    """More than the graphs of one function at which torch gives up."""
    model = build(layers=1, feature_layer=-1)
    with attach(model, "tome", keep=500, compiled="eager") as handle, dynamo.patch(cache_size_limit=1):
        for keep in range(500, 497, -1):
            assert_same_run(handle, model, one, keep=keep)
    assert graphs() == 3


def test_generate_and_forward_share_a_graph(one):
    model, eager = build(layers=3), build(layers=3)
    with attach(model, keep=144, compiled="eager") as handle, attach(eager, keep=144):
        for _ in range(2):
            answers = [m.generate(**one, max_new_tokens=4, do_sample=False) for m in (model, eager)]
            assert torch.equal(*answers) and handle.stats.tokens_after == 144
            seen(model, one)
    assert graphs() == 1


def test_the_plain_model_and_the_eager_tower_are_there_at_any_time(one):
    model, plain = build(layers=3), build(layers=3)
    expected = seen(plain, one)
    seen(model, one)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = attach(model, keep=144, compiled="eager")
    seen(model, one)
    with handle.using(None):
        assert torch.equal(seen(model, one), expected) and handle.stats is None
    with handle.using(compiled=False):
        seen(model, one)
    assert graphs() == 1
    handle.update(compiled=False)
    assert_same_run(handle, model, one)
    handle.remove()
    assert torch.equal(seen(model, one), expected) and graphs() == 1
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_threads_with_settings_of_their_own_do_not_mix(one, pair):
    model = build(layers=3)
    handle = attach(model, "pitome", keep=288)
    asked = [(one, 288, "eager"), (one, 144, "eager"), (pair, 200, "aot_eager"), (one, 200, False)]

    def expected(inputs, keep, _):
        with handle.using(keep=keep):
            return seen(model, inputs), handle.stats.groups

    def run(inputs, keep, compiled):
        with handle.using(keep=keep, compiled=compiled):
            return [(seen(model, inputs), handle.stats.groups) for _ in range(3)]

    alone = [expected(*case) for case in asked]
    with ThreadPoolExecutor(4) as pool:
        for (logits, groups), found in zip(alone, pool.map(lambda case: run(*case), asked)):
            assert all(torch.equal(a, logits) and torch.equal(b, groups) for a, b in found)
    assert graphs() == 3


@pytest.mark.parametrize("settings", [(None,), False], ids=["plain", "eager"])
def test_calls_without_a_graph_run_together(settings, one):
    """Also once graphs were asked for: two threads meet in the middle of a tower."""
    model, meeting = build(layers=1, feature_layer=-1), threading.Barrier(2)
    handle = attach(model, "tome", keep=500, compiled="eager")

    def meet(*_):
        meeting.wait(20)

    def call(_):
        with handle.using(None) if settings else handle.using(compiled=False):
            return seen(model, one)

    layer(model).register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(*pool.map(call, range(2)))


class Told(threading.Condition):
    """A condition that tells a queue of every thread that has to wait for it, so that no test waits for nothing."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __enter__(self):
        if not self.acquire(blocking=False):
            self.told.put("waits")
            self.acquire()
        return True

    def wait(self, timeout=None):
        self.told.put("waits")
        return super().wait(timeout)


def test_a_call_without_a_graph_waits_while_one_is_made(one, monkeypatch):
    """transformers says that hidden states are not recorded thread-safely while something compiles."""
    model = build(layers=1, feature_layer=-1)
    handle = attach(model, "tome", keep=500, compiled="eager")
    making, go, told, make = threading.Event(), threading.Event(), queue.Queue(), captured.graph

    def slow(*args):
        making.set()
        assert go.wait(60)
        return make(*args)

    def plain():
        with handle.using(None):
            return seen(model, one)

    plain()
    monkeypatch.setattr(captured, "graph", slow)
    monkeypatch.setattr(handle.graphs.turns, "_turn", Told(told))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(seen, model, one)
        assert making.wait(60)
        hook = model.model.vision_tower.embeddings.register_forward_pre_hook(lambda *_: told.put("runs"))
        other = pool.submit(plain)
        early = told.get(timeout=60)
        hook.remove()  # which no graph could hold
        go.set()
        assert torch.isfinite(first.result(60)).all() and torch.isfinite(other.result(60)).all()
    assert early == "waits" and graphs() == 1


def test_a_graph_waits_for_calls_without_one():
    turns, inside, leave, told = Turns(), threading.Event(), threading.Event(), queue.Queue()
    turns._turn = Told(told)

    def call():
        with turns.together(), turns.together():
            inside.set()
            assert leave.wait(60)

    def make():
        with turns.alone():
            told.put("made")

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(call)
        assert inside.wait(60)
        making = pool.submit(make)
        first = told.get(timeout=60)
        leave.set()
        running.result(60), making.result(60)
    assert first == "waits" and "made" in told.queue


def test_a_call_within_a_call_of_the_same_thread_does_not_wait_for_itself():
    turns = Turns()

    def nested():
        with turns.together(), turns.together(), turns.alone(), turns.alone(), turns.together():
            pass
        with turns.alone():
            pass

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def halved(model, one):
    model.model.vision_tower.bfloat16()
    return {"pixel_values": one["pixel_values"].bfloat16()}


CHANGES = {  # of a call that has a graph, what torch would make it anew for
    "gradients": lambda model, one: torch.enable_grad(),
    "inference": lambda model, one: torch.inference_mode(),
    "training": lambda model, one: model.train() and None,
    "frozen": lambda model, one: model.requires_grad_(False) and None,
    "dtype": halved,
    "autocast": lambda model, one: torch.autocast("cpu", torch.bfloat16),
    "attention": lambda model, one: model.set_attn_implementation("eager"),
    "hidden states": lambda model, one: {"output_hidden_states": False},
    "a new argument": lambda model, one: {"return_dict": True},
    "names": lambda model, one: {"pixel_values": None, "x": one["pixel_values"]},
    "strides": lambda model, one: {"pixel_values": one["pixel_values"].to(memory_format=torch.channels_last)},
    "pictures that learn": lambda model, one: {"pixel_values": one["pixel_values"].clone().requires_grad_()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_never_made_anew_where_it_was(change, one):
    """Then other threads would run beside it; each of these has a graph of its own."""
    model = build(layers=3)
    handle, tower = attach(model, keep=144, compiled="eager"), model.model.vision_tower

    def made(**changed):
        given = {"pixel_values": one["pixel_values"], "output_hidden_states": True, **changed}
        x = given.pop("x", None)
        args = () if x is None else (given.pop("pixel_values") or x,)
        for _ in range(2):
            tower(*args, **given)
        return len(handle.graphs._made), graphs()

    with torch.no_grad():
        assert made() == (1, 1)
        changed = CHANGES[change](model, one)
        with changed if hasattr(changed, "__enter__") else nullcontext():
            assert made(**(changed if isinstance(changed, dict) else {})) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_half_precision_gives_the_same_bits(backend, dtype, one):
    model = build(layers=3).to(dtype)
    inputs = {**one, "pixel_values": one["pixel_values"].to(dtype)}
    with attach(model, "pitome", keep=144, compiled=backend) as handle:
        assert_same_run(handle, model, inputs)
        assert seen(model, inputs).dtype == dtype
    assert graphs() == 1


def test_hooks_of_the_tower_run_around_its_graph(one):
    """Whenever they came, and until they are taken off; they may change what goes in and what comes out."""
    model, called = build(layers=3), []
    tower = model.model.vision_tower

    def note(module, *_):
        called.append((module, threading.get_ident()))  # which no graph could hold

    def pictures_named(module, args, kwargs):
        note(module)
        return (), {**kwargs, "pixel_values": kwargs.get("pixel_values", *args)}

    tower.register_forward_hook(note)
    with attach(model, keep=144, compiled="eager") as handle:
        expected = seen(model, one)
        hooks = [
            tower.register_forward_pre_hook(note),
            tower.register_forward_pre_hook(lambda module, args: args[0], prepend=True),
            tower.register_forward_pre_hook(pictures_named, with_kwargs=True),
            tower.register_forward_hook(lambda module, args, kwargs, output: note(module) or output, with_kwargs=True),
        ]
        assert torch.equal(seen(model, one), expected) and len(called) == 1 + 4
        blind = tower.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, Tensor.zero_, output))
        assert not torch.equal(seen(model, one), expected) and handle.stats.tokens_after == 144
        for hook in (*hooks, blind):
            hook.remove()
        assert torch.equal(seen(model, one), expected) and len(called) == 1 + 4 + 4 + 1
    assert {module for module, _ in called} == {tower} and graphs() == 2  # one for pictures by name, one by place


def test_the_time_of_a_tower_with_a_graph_is_taken(one, monkeypatch):
    model, clock = build(layers=3), itertools.count()
    monkeypatch.setattr(latency, "now", lambda device: next(clock))
    with attach(model, keep=144, compiled="eager"), timed_tower(model) as ticks:
        for _ in range(2):
            seen(model, one)
    assert ticks == [0, 1, 2, 3]
    assert graphs() == 1


def test_a_deep_copy_makes_graphs_of_its_own(one):
    model = build(layers=3)
    attach(model, keep=144, compiled="eager")
    expected = seen(model, one)
    other = copy.deepcopy(model)
    assert torch.equal(seen(other, one), expected) and graphs() == 2


def test_gradients_flow_through_a_graph(one):
    grown = []
    for compiled in (False, "aot_eager"):
        model = build(layers=3)
        with attach(model, keep=144, compiled=compiled):
            model(**one).logits.square().sum().backward()
        grown.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grown[0].keys() < grown[1].keys() and graphs() == 1
    for name, gradient in grown[1].items():  # a graph gives zeros to the block behind the feature layer
        torch.testing.assert_close(gradient, grown[0].get(name, torch.zeros_like(gradient)), atol=1e-4, rtol=1e-3)


def test_a_tower_that_does_not_merge_as_planned_is_found_in_a_graph_too(one):
    model = build(layers=3)
    with attach(model, "pitome", keep=400, compiled="eager"):
        block = layer(model)
        block.forward = type(block).__bases__[-1].forward.__get__(block)
        with pytest.raises(RuntimeError, match="did not merge as planned"):
            seen(model, one)


def test_a_machine_without_a_compiler_says_so(one, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = build(layers=1, feature_layer=-1)
    with (
        attach(model, "random", keep=500, compiled=True),
        inductor.patch({"cpp.cxx": ("nowhere",), "force_disable_caches": True}),
    ):
        with pytest.raises(
            RuntimeError, match=r"could not compile on cpu: .*C\+\+ compiler.*nowhere.*; compiled=False"
        ):
            seen(model, one)


def test_the_reason_is_what_the_backend_raised():
    def backend(graph, inputs):
        raise NotImplementedError("no such operator\nand more")

    doubled = graphs.graph(lambda x: x + x, backend, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="could not compile on cpu: no such operator; compiled=False runs without"):
        doubled(torch.ones(2))


def test_a_graph_that_torch_would_make_too_often_says_so():
    doubled = graphs.graph(lambda x: x + x, "eager", torch.device("cpu"))
    with dynamo.patch(cache_size_limit=1), pytest.raises(RuntimeError, match="'eager' could not compile on cpu: "):
        doubled(torch.ones(2)), doubled(torch.ones(3))


@pytest.mark.parametrize("compiled", ["fast", 1, None, 0.5])
def test_what_cannot_be_is_refused(compiled, one):
    model = build(layers=3)
    with pytest.raises(ValueError, match="compiled=.*choose one of True, False, 'inductor'"):
        attach(model, keep=144, compiled=compiled)
    assert not hasattr(model, "_pitome")


def test_a_cuda_graph_needs_a_cuda_device(one):
    model = build(layers=3)
    with pytest.raises(ValueError, match="compiled='cudagraphs' needs the model on a CUDA device, got cpu"):
        attach(model, keep=144, compiled="cudagraphs")
    assert not hasattr(model, "_pitome") and graphs.CALL not in vars(model.model.vision_tower)
    with attach(model, keep=144) as handle, pytest.raises(ValueError, match="needs the model on a CUDA device"):
        handle.update(compiled="cudagraphs")
    assert "cudagraphs" in BACKENDS


def test_settings_that_cannot_be_looked_up_are_refused():
    @dataclass(frozen=True)
    class Listed(ToMe):
        layers: list = field(default_factory=list)

    with pytest.raises(ValueError, match="of Listed cannot be looked up .*hashable"):
        attach(build(layers=3), Listed(), keep=288, compiled=True)


TOWERS = {family.model: family for family in FAMILIES if "tower" in family.wheres}  # one of each class


@pytest.mark.parametrize("family", TOWERS.values(), ids=TOWERS)
def test_families_run_in_graphs(family):
    """Pictures of several tiles too."""
    model = family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    with attach(model, "pitome", keep=100, where="tower", compiled="eager") as handle:
        with handle.using(compiled=False):
            expected, groups = seen(model, inputs), handle.stats.groups
        assert torch.equal(seen(model, inputs), expected) and torch.equal(handle.stats.groups, groups)
    assert graphs() == 1


def test_a_tower_that_never_merges_is_refused():
    family = next(family for family in FAMILIES if "tower" not in family.wheres)
    with pytest.raises(ValueError, match="for vision towers that merge"):
        attach(family.build(), keep=0.5, compiled=True)


@pytest.mark.parametrize("how", ["method", "function"])
def test_a_tower_that_the_caller_compiled_is_left_to_them(how):
    model = build(layers=3)
    if how == "method":
        model.model.vision_tower.compile(backend="eager")
    else:
        model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        attach(model, keep=144, compiled=True)
    with attach(model, keep=144):
        pass
    assert how == "function" or vars(model.model.vision_tower)[graphs.CALL] is not None


def test_what_a_cuda_graph_gives_is_copied(monkeypatch):
    """Its memory is written again by the next launch."""
    x = torch.ones(2)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made = graphs.graph(lambda: {"a": (x, 1)}, "cudagraphs", torch.device("cuda"))
    x_copy = made()["a"][0]
    assert torch.equal(x_copy, x) and x_copy.data_ptr() != x.data_ptr()
    assert graphs.graph(lambda: x, "eager", torch.device("cpu"))() is x
