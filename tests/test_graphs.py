"""``graph=``: which calls a graph may serve, and that it serves those as eager calls would; without a GPU.

`Recorded` stands in for a CUDA graph: what it made lies at fixed places, which every replay writes again, and nothing
may wait for the device while it is made.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, QUESTIONS, pictures
from models import build
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers.utils import import_utils

from pitome_mllm import METHODS, attach
from pitome_mllm.hooks import graphs, guards, lock
from pitome_mllm.hooks.capture import Copies, _remaker
from pitome_mllm.hooks.guards import guard_of
from pitome_mllm.hooks.lock import captures
from pitome_mllm.hooks.work import TowerWork, Work


class Capturing(TorchDispatchMode):
    """Refuses what a capture on a GPU would: what the host waits for to have a value or a shape, or gives values to."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        index = args[1] if name.removesuffix("_") in ("index", "index_put") else ()
        single = name == "lift_fresh" and not args[0].dim()  # x[:, :k] = 0, which a GPU fills
        masked = any(x is not None and x.dtype == torch.bool for x in index)
        if masked or (name in self.REFUSED and args[0].numel() and not single):
            raise RuntimeError(f"{name} is not permitted when stream is capturing\nand more")
        return function(*args, **(kwargs or {}))

    @staticmethod
    def is_on() -> bool:
        return any(isinstance(mode, Capturing) for mode in _get_current_dispatch_mode_stack())


class Recorded:
    """A capture for processors."""

    made_so_far: list[Recorded] = []

    def __init__(self, call, inputs, pool, device):
        self.call, self.inputs = call, [torch.empty_like(x).copy_(x) for x in inputs]
        call(*self.inputs)
        with Capturing():
            self.made = call(*self.inputs)
        self.lock, self.replays = threading.Lock(), 0
        Recorded.made_so_far.append(self)

    def replay(self, inputs, read):
        with self.lock:
            if self.made is None:
                return None
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            places, again = {}, {}
            _remaker(self.made, places)
            with Capturing():
                _remaker(self.call(*self.inputs), again)
            for place, value in zip(places.values(), again.values(), strict=True):
                place.copy_(value)
            self.replays += 1
            return read()

    def free(self):
        with self.lock:
            self.made = None


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "Capture", Recorded)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", Capturing.is_on)
    monkeypatch.setattr(Recorded, "made_so_far", [])


def made() -> int:
    return len(Recorded.made_so_far)


def replays() -> int:
    return sum(each.replays for each in Recorded.made_so_far)


@torch.no_grad()
def seen(model, inputs):
    return model(**inputs).logits


def other_picture(pair):
    return {name: value[1:] for name, value in pair.items()}


def assert_same_run(handle, model, inputs, **settings):
    """The same bits, the same stats with a graph as without."""
    with handle.using(graph=False, **settings):
        expected, stats = seen(model, inputs), handle.stats
    assert torch.equal(seen(model, inputs), expected)
    assert handle.stats is not stats and torch.equal(handle.stats.sizes, stats.sizes)
    assert stats.groups is None or torch.equal(handle.stats.groups, stats.groups)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_by_a_graph(method, one, pair):
    model, other = build(layers=2), other_picture(pair)
    with attach(model, method, keep=256 if method == "pool" else 400, graph=True) as handle:
        seen(model, one)
        assert (made(), replays()) == (1, 0)
        assert_same_run(handle, model, one)
        assert_same_run(handle, model, other)
        assert (made(), replays()) == (1, 2)


def test_the_second_equal_call_makes_a_graph_and_the_third_uses_it(one, pair):
    model = build(layers=3)
    with attach(model, keep=144) as handle:
        assert handle.plan.graph == "auto"
        for expected in ((0, 0), (1, 0), (1, 1)):
            seen(model, one)
            assert (made(), replays()) == expected
        seen(model, pair)
        assert made() == 1
        seen(model, pair)
        assert made() == 2
        answer = model.generate(**one, max_new_tokens=3, do_sample=False)
        assert replays() == 2  # generate and forward share graphs
        handle.update(graph=False)
        assert len(handle.graphs) == 0 and torch.equal(model.generate(**one, max_new_tokens=3, do_sample=False), answer)
        assert replays() == 2


@pytest.mark.parametrize("graph", ["auto", True])
def test_what_keeps_a_gpu_busy_gains_nothing_by_a_graph_that_takes_memory(graph, pair, monkeypatch):
    model = build(layers=2)
    with attach(model, keep=144, graph=graph) as handle:
        for most, number in ((1, 0 if graph == "auto" else 1), (2, 1)):
            monkeypatch.setattr(TowerWork, "most", most)
            for _ in range(2):
                seen(model, pair)
            assert len(handle.graphs) == number


def test_nothing_of_an_earlier_call_changes(one, pair):
    model, tower = build(layers=3), None
    with attach(model, "pitome", keep=100, where="both", graph=True, published=True) as handle, torch.no_grad():
        tower = model.model.vision_tower
        tower(one["pixel_values"], output_hidden_states=True)
        first, stats = tower(one["pixel_values"], output_hidden_states=True), handle.stats
        kept = copy.deepcopy([*first.hidden_states, first.pooler_output, stats.sizes])
        merges = [(m.group.clone(), m.reduce(torch.ones(1, m.group.shape[1], 2))[0]) for m in stats.merges]
        tower(pair["pixel_values"][1:], output_hidden_states=True)
        assert replays() == 2 and not torch.equal(handle.stats.sizes, stats.sizes)
        for now, before in zip([*first.hidden_states, first.pooler_output, stats.sizes], kept, strict=True):
            assert torch.equal(now, before)
        for merge, (group, reduced) in zip(stats.merges, merges, strict=True):
            assert torch.equal(merge.group, group)
            assert torch.equal(merge.reduce(torch.ones(1, group.shape[1], 2))[0], reduced)
        with pytest.raises(RuntimeError, match="order='source'"):
            next(m for m in stats.merges if m.source).in_source_order()


@pytest.mark.parametrize(
    "value", [{}, [torch.ones(1)], ([torch.ones(1)],), object()], ids=lambda value: type(value).__name__
)
def test_arguments_that_cannot_be_told_apart_are_no_key(value):
    with pytest.raises(TypeError, match="an argument is a"):
        guard_of(value)


def test_what_cannot_be_copied_is_no_graph():
    with pytest.raises(TypeError, match="makes a Linear"):
        Copies([nn.Linear(1, 1)])


# ---- what a graph is made for ----------------------------------------------------------------------------------------


def weights_moved(model, one):
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    weight.data = weight.data + 1  # made while the old one is there, so that it lies elsewhere


def weight_replaced(model, one):
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight + 1)


def halved(model, one):
    model.model.vision_tower.bfloat16()
    return {"pixel_values": one["pixel_values"].bfloat16()}


def setting(call, value, usual):
    def change(model, one):
        class Within:
            def __enter__(self):
                call(value)

            def __exit__(self, *error):
                call(usual)

        return Within()

    return change


@contextmanager
def class_patched(model, one):
    kind = type(model.model.vision_tower.encoder.layers[0].mlp)
    own = kind.forward
    kind.forward = lambda self, x: own(self, x) + 1
    try:
        yield
    finally:
        kind.forward = own


@contextmanager
def another_flash_attention(model, one):
    attention.register_flash_attention_impl("another", register_fn=lambda: SimpleNamespace(remove=lambda: None))
    attention.activate_flash_attention_impl("another")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


CHANGES = {
    "a class": class_patched,
    "weights moved": weights_moved,
    "a weight replaced": weight_replaced,
    "dtype": halved,
    "inference": lambda model, one: torch.inference_mode(),
    "autocast": lambda model, one: torch.autocast("cpu", torch.bfloat16),
    "kernels of attention": lambda model, one: sdpa_kernel(SDPBackend.MATH),
    **({"flash attention": another_flash_attention} if hasattr(attention, "activate_flash_attention_impl") else {}),
    "deterministic": setting(torch.use_deterministic_algorithms, True, False),
    "precision": setting(torch.set_float32_matmul_precision, "high", "highest"),
    "attention": lambda model, one: model.set_attn_implementation("eager"),
    "a new argument": lambda model, one: {"interpolate_pos_encoding": True},
    "names": lambda model, one: {"pixel_values": None, "x": one["pixel_values"]},
    "layout": lambda model, one: {"pixel_values": one["pixel_values"].to(memory_format=torch.channels_last)},
    "batch": lambda model, one: {"pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)},
    "settings": lambda model, one: model._pitome.using(keep=143),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_never_serves_what_it_was_not_made_for(change, one):
    model = build(layers=3)
    handle, tower = attach(model, keep=144, graph=True), model.model.vision_tower

    def run(**changed):
        given = {"pixel_values": one["pixel_values"], "output_hidden_states": True, **changed}
        x = given.pop("x", None)
        args = () if x is None else (given.pop("pixel_values") or x,)
        outputs = [tower(*args, **given).last_hidden_state for _ in range(3)]
        with handle.using(graph=False, keep=handle.plan.keep):
            expected = tower(*args, **given).last_hidden_state
        assert all(torch.equal(output, expected) for output in outputs)

    with torch.no_grad():
        run()
        assert (made(), replays()) == (1, 2)
        changed = CHANGES[change](model, one)
        with changed if hasattr(changed, "__enter__") else nullcontext():
            run(**(changed if isinstance(changed, dict) else {}))
    assert (made(), replays()) == (2, 4)


def test_weights_that_change_in_place_keep_their_graph(one):
    model, other = build(layers=3), build(layers=3, seed=1)
    with attach(model, keep=144, graph=True) as handle:
        seen(model, one)
        model.load_state_dict(other.state_dict())
        assert_same_run(handle, model, one)
        assert (made(), replays()) == (1, 1)


def test_adapters_are_switched_merged_and_switched_off(one):
    model = build(layers=3)
    lora = LoraConfig(r=2, target_modules=r".*vision_tower.*\.fc1", init_lora_weights=False)
    wrapped = get_peft_model(model, lora)
    wrapped.add_adapter("second", lora)
    wrapped.eval()
    handle, outputs = attach(wrapped, keep=144, graph=True), []
    for change in (
        lambda: None,
        lambda: wrapped.set_adapter("second"),
        lambda: wrapped.base_model.disable_adapter_layers(),
        lambda: wrapped.base_model.enable_adapter_layers() or wrapped.base_model.merge_adapter(),
        lambda: wrapped.base_model.unmerge_adapter(),
    ):
        change()
        wrapped.requires_grad_(False)
        for _ in range(3):
            outputs.append(seen(wrapped, one))
        with handle.using(graph=False):
            expected = seen(wrapped, one)
        assert all(torch.equal(output, expected) for output in outputs[-3:])
    assert len({output.sum().item() for output in outputs}) >= 3
    assert replays() >= 8


def test_few_graphs_are_kept_and_rare_shapes_do_not_drive_them_out(one):
    model = build(layers=2, feature_layer=-1)
    with attach(model, "tome", keep=500, graph=True) as handle:
        for keep in (*range(500, 500 - graphs.KEPT, -1), 400, 400):
            with handle.using(keep=keep):
                seen(model, one)
        assert made() == len(handle.graphs) + 1 == graphs.KEPT + 1  # the least lately used went
        assert Recorded.made_so_far[0].made is None
        for _ in range(2):
            with handle.using(keep=399):
                seen(model, one)
        assert made() == graphs.KEPT + 2  # only its second call
        seen(model, one)
        assert len(handle.graphs) == graphs.KEPT and made() == graphs.KEPT + 2
    assert len(handle.graphs) == 0 and all(each.made is None for each in Recorded.made_so_far)


def test_captures_do_not_become_rarer_without_end(one, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 1)
    monkeypatch.setattr(graphs, "RAREST", 1)
    model = build(layers=2, feature_layer=-1)
    with attach(model, "tome", keep=500, graph=True) as handle:
        for keep in (500, 499, 498, 497):
            for _ in range(2):
                with handle.using(keep=keep):
                    seen(model, one)
    assert made() == 4  # by a second call at the latest


# ---- what no graph can hold ------------------------------------------------------------------------------------------


def hook_inside(model):
    model.model.vision_tower.encoder.layers[1].mlp.register_forward_hook(lambda *_: None)


def hook_of_accelerate(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.vision_tower.encoder.layers[1].mlp, AlignDevicesHook(execution_device="cpu"))


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def compiled_part(model):
    layer = model.model.vision_tower.encoder.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")


def part_that_compiles(model):
    model.model.vision_tower.encoder.layers[1].mlp.compile(backend="eager")


EAGER = {
    "a compiled part": (compiled_part, "it is compiled already (on 'encoder.layers.1.mlp')"),
    "a part that compiles": (part_that_compiles, "it is compiled already (on 'encoder.layers.1.mlp')"),
    "gradients": (lambda model: torch.enable_grad(), "gradients are recorded"),
    "a hook inside": (hook_inside, "a forward hook on 'encoder.layers.1.mlp'"),
    "accelerate": (hook_of_accelerate, "accelerate moves weights"),
    "training": (lambda model: model.train() and None, "training mode"),
    "energies": (lambda model: model._pitome.using(energies=True), "energies=True"),
    "a mode": (lambda model: Counting(), "a mode watches operations"),
}


@pytest.mark.parametrize("case", EAGER)
def test_what_no_graph_can_hold_runs_eagerly_and_is_said_once(case, one, caplog):
    model, (change, reason) = build(layers=3), EAGER[case]
    tower = model.model.vision_tower
    with attach(model, keep=144, graph=True) as handle, torch.no_grad():
        expected = tower(one["pixel_values"], output_hidden_states=True).last_hidden_state
        assert made() == 1
        changed = change(model)
        with changed or nullcontext():
            for _ in range(3):
                found = tower(one["pixel_values"], output_hidden_states=True).last_hidden_state
        assert torch.equal(found, expected) and handle.stats.tokens_after == 144
        assert (made(), replays()) == (1, 0)
    said = [record for record in caplog.records if reason in record.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING


def test_a_hook_that_goes_lets_the_graph_serve_again(one):
    model, called = build(layers=3), []
    with attach(model, keep=144, graph=True):
        seen(model, one)
        hook = model.model.vision_tower.encoder.layers[0].register_forward_pre_hook(lambda *_: called.append(1))
        seen(model, one)
        hook.remove()
        assert (len(called), replays()) == (1, 0)
        seen(model, one)
    assert (len(called), replays()) == (1, 1)


@pytest.mark.parametrize("where", ["tower", "both"])
def test_hooks_of_the_tower_itself_run_around_its_graph(where, one):
    """One from before `attach` would see what was not merged yet, so it keeps the graph away."""
    model, called = build(layers=3), []
    tower = model.model.vision_tower
    with attach(model, keep=144, where=where, graph=True):
        expected = seen(model, one)
        hook = tower.register_forward_hook(lambda m, a, output: called.append(output.hidden_states[-2].shape[1]))
        tower.register_forward_pre_hook(lambda m, args: called.append(0))
        assert torch.equal(seen(model, one), expected) and replays() == 1
        assert called == [0, 145]
        hook.remove()
    tower.register_forward_hook(lambda m, a, output: called.append(output.hidden_states[-2].shape[1]))
    called.clear()
    with attach(model, keep=144, where=where, graph=True):
        assert torch.equal(seen(model, one), expected) and torch.equal(seen(model, one), expected)
    assert replays() == 1 and called[1] == called[3]


def test_graphs_need_a_gpu_which_is_said_where_they_were_asked_for(one, monkeypatch, caplog):
    """And nothing is asked of a call elsewhere."""
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    monkeypatch.setattr(Work, "__init__", lambda *_: pytest.fail("a call is looked at"))
    caplog.set_level(logging.INFO)
    model = build(layers=2)
    for graph in ("auto", True):
        with attach(model, keep=144, graph=graph):
            for _ in range(3):
                model.generate(**one, max_new_tokens=1, do_sample=False)
    said = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert made() == 0 and [line.partition(" runs")[0] for line in said] == ["the vision tower", "the LLM's prefill"]
    assert all("it is on cpu" in line for line in said)


def test_a_capture_that_fails_leaves_an_eager_tower(one, monkeypatch, caplog):
    model = build(layers=3)
    kind = type(model.model.vision_tower.encoder)
    own = kind.forward

    def asks_for_a_value(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.last_hidden_state.sum().item()
        return output

    with attach(model, keep=144, graph=True) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", asks_for_a_value)
            expected = seen(model, one)
            assert torch.equal(seen(model, one), expected) and len(handle.graphs) == 0
        assert caplog.text.count("the capture failed: RuntimeError: _local_scalar_dense is not permitted") == 1
        assert "and more" not in caplog.text
        handle.update(keep=145)
        seen(model, one)
        assert_same_run(handle, model, one)
        assert (made(), replays()) == (1, 1)


def test_a_capture_of_the_caller_is_left_alone(one, monkeypatch, caplog):
    model = build(layers=2)
    with attach(model, keep=144, graph=True):
        expected = seen(model, one)
        monkeypatch.setattr(guards, "is_capturing", lambda: True)
        assert torch.equal(seen(model, one), expected) and (made(), replays()) == (1, 0)
    assert "CUDA graph" not in caplog.text


def test_a_block_that_does_not_merge_is_found(one):
    model = build(layers=3)
    with attach(model, "pitome", keep=400, graph=True):
        seen(model, one)
        block = next(m for m in model.modules() if type(m).__name__ == "MergingCLIPEncoderLayer")
        block.forward = type(block).__bases__[-1].forward.__get__(block)
        with pytest.raises(RuntimeError, match="did not merge as planned"):
            seen(model, one)


@pytest.mark.parametrize("graph", ["fast", 1, None, 0.5, "True"])
def test_what_cannot_be_is_refused(graph):
    with pytest.raises(ValueError, match="unknown graph .*; choose one of True, False, 'auto'"):
        attach(build(layers=2), keep=144, graph=graph)


def test_the_old_keyword_says_what_to_write():
    with pytest.raises(ValueError, match=r"compiled=True is gone: graph=True .*torch.compile"):
        attach(build(layers=2), keep=144, compiled=True)


# ---- threads, copies, compilers --------------------------------------------------------------------------------------


def test_threads_with_settings_of_their_own_do_not_mix(one, pair):
    model = build(layers=3)
    handle = attach(model, "pitome", keep=288, graph=True)
    asked = [(one, 288), (one, 144), (pair, 200), (one, 288)]

    def run(inputs, keep):
        with handle.using(keep=keep):
            return [(seen(model, inputs), handle.stats.groups) for _ in range(3)]

    with handle.using(graph=False):
        alone = [run(*case)[0] for case in asked]
    with ThreadPoolExecutor(4) as pool:
        for (logits, groups), found in zip(alone, pool.map(lambda case: run(*case), asked)):
            assert all(torch.equal(a, logits) and torch.equal(b, groups) for a, b in found)


def test_nothing_is_captured_beside_another_call_and_nobody_waits_for_himself(one, monkeypatch):
    model, inside, leave = build(layers=2), threading.Event(), threading.Event()
    with attach(model, keep=144, graph=True), ThreadPoolExecutor(2) as pool:

        def elsewhere():
            with captures.shared(), captures.shared():
                inside.set()
                assert leave.wait(60)

        running = pool.submit(elsewhere)
        assert inside.wait(60)
        seen(model, one)
        assert made() == 0
        leave.set()
        running.result(60)
        with captures.shared():  # as within a generate() that draws
            seen(model, one)
            assert made() == 0  # captures are twice as rare now
            seen(model, one)
        assert made() == 1


def test_a_capture_waits_a_moment_for_calls_that_end(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60)
    inside, tried = threading.Event(), threading.Event()

    def elsewhere():
        with captures.shared():
            inside.set()
            assert tried.wait(60)
            with captures.shared():  # who is inside already is not kept out
                pass

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(elsewhere)
        assert inside.wait(60)
        tried.set()
        with captures.exclusive() as alone:
            assert alone and running.result(60) is None


def test_others_wait_while_a_graph_is_made(monkeypatch):
    told = queue.Queue()

    class Telling(threading.Condition):
        def wait(self, timeout=None):
            told.put("waits")
            return super().wait(timeout)

    monkeypatch.setattr(captures, "_changed", Telling())
    with ThreadPoolExecutor(1) as pool:
        with captures.exclusive() as alone, captures.shared():
            assert alone

            def other():
                with captures.shared():
                    told.put("came")

            waiting = pool.submit(other)
            assert told.get(timeout=60) == "waits"
        waiting.result(60)
    assert "came" in told.queue


def test_drawing_keeps_captures_away(one, monkeypatch):
    model, entered = build(layers=2), []
    shared = captures.shared
    monkeypatch.setattr(captures, "shared", lambda: entered.append(1) or shared())
    with attach(model, keep=144, graph=False):
        model.generate(**one, max_new_tokens=2, do_sample=False)
        assert not entered
        model.generate(**one, max_new_tokens=2, do_sample=True)
    assert entered


@pytest.mark.parametrize(
    "owner, name", [(graphs.Graphs, "_learn"), (TowerWork, "eager_reason_inside"), (Recorded, "__init__")]
)
def test_a_graph_that_another_thread_has_no_use_for_any_more_is_not_kept(owner, name, one, monkeypatch):
    model = build(layers=2)
    with attach(model, keep=144, graph=True) as handle:
        own = getattr(owner, name)

        def overtaken(*args):
            handle.update(graph=False)  # gives all graphs back
            return own(*args)

        monkeypatch.setattr(owner, name, overtaken)
        seen(model, one)
        assert made() == 1 and len(handle.graphs) == 0 and Recorded.made_so_far[0].made is None


def test_a_deep_copy_makes_graphs_of_its_own(one):
    model = build(layers=3)
    with attach(model, keep=144, graph=True) as handle:
        expected = seen(model, one)
        other = copy.deepcopy(model)
        assert len(other._pitome.graphs) == 0
        with torch.no_grad():
            other.model.vision_tower.encoder.layers[0].mlp.fc1.weight.add_(1)
        assert not torch.equal(seen(other, one), expected) and made() == 2
        assert torch.equal(seen(model, one), expected) and len(handle.graphs) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["function", "method"])
def test_a_tower_that_the_caller_compiled_is_left_to_them(how, backend, one):
    torch.compiler.reset()
    model = build(layers=3)
    expected = []
    with attach(model, "pitome", keep=144, graph=False):
        expected = seen(model, one)
    tower = model.model.vision_tower
    with attach(model, "pitome", keep=144, graph=True) as handle:
        if how == "method":
            tower.compile(backend=backend)
        else:
            model.model.vision_tower = torch.compile(tower, backend=backend)
        for _ in range(3):
            assert torch.equal(seen(model, one), expected) and handle.stats.tokens_after == 144
    assert made() == 0
    torch.compiler.reset()


TOWERS = {family.model: family for family in FAMILIES if "tower" in family.wheres}  # one of each class


@pytest.mark.parametrize("family", TOWERS.values(), ids=TOWERS)
def test_families_run_in_graphs(family):
    """Pictures of several tiles too."""
    model = family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    with attach(model, "pitome", keep=100, where="tower", graph=True) as handle:
        seen(model, inputs)
        with handle.using(graph=False):
            expected, groups = seen(model, inputs), handle.stats.groups
        assert torch.equal(seen(model, inputs), expected) and torch.equal(handle.stats.groups, groups)
    assert made() >= 1 and replays() >= 1
