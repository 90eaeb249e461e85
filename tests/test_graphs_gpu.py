"""``graph=`` on a GPU: what a CUDA graph replays is what the eager tower gives, bit for bit, in every circumstance.

``PYTHONPATH=. python -m pytest -q -m gpu tests/test_graphs_gpu.py`` runs it where nothing is installed.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import peft
import pytest
import torch
from models import build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pitome_mllm import METHODS, attach
from pitome_mllm.hooks import graphs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def bf16(**options):
    return build(**options).to(DEVICE, torch.bfloat16)


def on_gpu(inputs):
    moved = {name: value.to(DEVICE) for name, value in inputs.items()}
    return {**moved, "pixel_values": moved["pixel_values"].bfloat16()}


@pytest.fixture(scope="module")
def pixels():
    """Two pictures: noise, so that no two similarities are equal."""
    made = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return made.to(DEVICE, torch.bfloat16)


def tensors(output, stats):
    found = [*output.hidden_states, output.last_hidden_state, output.pooler_output, stats.sizes]
    return [*found, *(merge.group for merge in stats.merges if merge.group is not None)]


@torch.no_grad()
def run(model, pixels):
    """All that a call of the tower makes."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return tensors(output, model._pitome.stats)


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_by_a_graph(handle, pixels, more=1):
    """Replays give the bits of eager calls; ``more`` graphs come to be."""
    made = len(handle.graphs)
    with handle.using(graph=False):
        expected = run(handle.model, pixels)
    for _ in range(3):
        assert_equal(run(handle.model, pixels), expected)
    assert len(handle.graphs) == made + more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_replays_its_eager_bits(method, dtype, pixels):
    model = build(layers=3).to(DEVICE, dtype)
    with attach(model, method, keep=256 if method == "pool" else 400, graph=True) as handle:
        assert_by_a_graph(handle, pixels.to(dtype))
        with handle.using(graph=False):
            expected = run(model, pixels.to(dtype).flip(0))
        assert_equal(run(model, pixels.to(dtype).flip(0)), expected)


def test_the_default_captures_the_second_equal_call(pixels):
    model = bf16(layers=3)
    with attach(model, keep=144) as handle:
        for graphs_then in (0, 1, 1):
            run(model, pixels)
            assert len(handle.graphs) == graphs_then
        assert handle.plan.graph == "auto"


def test_generate_answers_alike(one):
    model = bf16(layers=3)
    inputs = on_gpu(one)
    with attach(model, keep=144, graph=True) as handle:
        made = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for _ in range(3)]
        assert len(handle.graphs) == 1
        with handle.using(graph=False):
            made.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert_equal(made[1:], made[:-1])


def test_nothing_of_an_earlier_call_changes(pixels):
    model = bf16(layers=3)
    with attach(model, "pitome", keep=100, where="both", graph=True) as handle, torch.no_grad():
        run(model, pixels)
        output = model.model.vision_tower(pixels, output_hidden_states=True)
        found = tensors(output, handle.stats)
        kept = copy.deepcopy(found)
        for _ in range(3):
            run(model, torch.randn_like(pixels))
        assert_equal(found, kept)


# ---- what a graph is made for ----------------------------------------------------------------------------------------


def moved(model):
    model.model.vision_tower.to("cpu").to(DEVICE)


def replaced(model):
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight + 1)


CHANGES = {
    "moved": moved,
    "replaced": replaced,
    "autocast": lambda model: torch.autocast("cuda", torch.float16),
    "inference": lambda model: torch.inference_mode(),
    "math": lambda model: sdpa_kernel(SDPBackend.MATH),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_make_a_graph_anew(change, pixels):
    model = build(layers=3).to(DEVICE, torch.float32)
    with attach(model, "pitome", keep=144, graph=True) as handle:
        assert_by_a_graph(handle, pixels.float())
        changed = CHANGES[change](model)
        with changed if hasattr(changed, "__enter__") else nullcontext():
            for _ in range(2):
                run(model, pixels.float())
            assert_by_a_graph(handle, pixels.float(), more=0)


def test_weights_in_place_keep_their_graph(pixels):
    model, other = bf16(layers=3), bf16(layers=3, seed=1)
    with attach(model, keep=144, graph=True) as handle:
        run(model, pixels)
        model.load_state_dict(other.state_dict())
        assert_by_a_graph(handle, pixels, more=0)


def test_adapters(pixels):
    model = bf16(layers=3)
    lora = peft.LoraConfig(r=2, target_modules=r".*vision_tower.*\.fc1", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    with attach(wrapped, keep=144, graph=True) as handle:
        for change in ("disable_adapter_layers", "enable_adapter_layers", "merge_adapter", "unmerge_adapter"):
            getattr(wrapped.base_model, change)()
            run(model, pixels)
            assert_by_a_graph(handle, pixels, more=0)


def test_hooks(pixels):
    model, called = bf16(layers=3), []
    with attach(model, keep=144, graph=True) as handle:
        assert_by_a_graph(handle, pixels)
        hook = model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: called.append(1))
        for _ in range(3):
            run(model, pixels)
        assert len(called) == 3
        hook.remove()
        assert_by_a_graph(handle, pixels, more=0)
        assert len(called) == 3


def test_gradients_run_eagerly(pixels):
    model = bf16(layers=3)
    with attach(model, keep=144, graph=True) as handle:
        model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2].sum().backward()
        assert len(handle.graphs) == 0
        assert any(parameter.grad is not None for parameter in model.model.vision_tower.parameters())


# ---- threads, streams, memory, errors --------------------------------------------------------------------------------


def test_four_threads_with_streams_of_their_own(pixels):
    model = bf16(layers=3)
    handle, keeps = attach(model, "pitome", keep=288, graph=True), (288, 144, 200, 288)

    def work(keep):
        with handle.using(keep=keep), torch.cuda.stream(torch.cuda.Stream()):
            found = [run(model, pixels) for _ in range(6)]
            torch.cuda.current_stream().synchronize()
        return found

    expected = []
    for keep in keeps:
        with handle.using(keep=keep, graph=False):
            expected.append(run(model, pixels))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(work, keeps), expected):
            for each in found:
                assert_equal(each, right)
    assert len(handle.graphs) <= 3


def test_random_numbers_of_other_threads_are_drawn_meanwhile(one):
    """torch refuses to draw on the device while a graph is captured; generate() that samples keeps captures away."""
    model = bf16(layers=3)
    inputs = on_gpu(one)
    handle = attach(model, keep=288, graph=True)

    def work(keep):
        with handle.using(keep=keep):
            for _ in range(4):
                model.generate(**inputs, max_new_tokens=8, do_sample=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (288, 144, 200, 100)))


def test_streams_wait_for_each_other(pixels):
    model, other = bf16(layers=3), torch.cuda.Stream()
    with attach(model, keep=144, graph=True) as handle:
        inputs = [pixels, pixels.flip(0)]
        with handle.using(graph=False):
            expected = [run(model, each) for each in inputs]
        torch.cuda.synchronize()
        run(model, pixels)
        for _ in range(10):
            first = run(model, inputs[0])
            with torch.cuda.stream(other):
                second = run(model, inputs[1])
            torch.cuda.synchronize()
            assert_equal(first, expected[0])
            assert_equal(second, expected[1])


def test_memory_is_bounded_and_given_back(pixels):
    model = bf16(layers=3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with attach(model, "pitome", keep=144, graph=True) as handle:
        used = []
        for batch in range(1, 13):
            for _ in range(9):
                run(model, pixels[:1].repeat(batch % 6 + 1, 1, 1, 1))
            assert len(handle.graphs) <= graphs.KEPT
            used.append(torch.cuda.memory_allocated())
        assert max(used[6:]) <= 1.2 * max(used[:6])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 64 << 20  # workspaces of libraries stay


def test_a_capture_that_fails_leaves_the_process_healthy(pixels, monkeypatch, caplog):
    model = bf16(layers=3)
    tower = model.model.vision_tower
    own = type(tower.encoder).forward

    def asks_for_a_value(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.last_hidden_state.sum().item()  # which a capture does not allow
        return output

    with attach(model, keep=144, graph=True) as handle, caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(type(tower.encoder), "forward", asks_for_a_value)
            first = run(model, pixels)
            assert_equal(run(model, pixels), first)
        assert len(handle.graphs) == 0 and "the capture failed" in caplog.text
        assert torch.rand(1000, device=DEVICE).std() > 0  # numbers can be drawn
        assert torch.multinomial(torch.ones(4, device=DEVICE), 1).item() < 4
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        handle.update(keep=145)
        assert_by_a_graph(handle, pixels)


def test_a_capture_of_the_caller_is_left_alone(pixels):
    model = bf16(layers=3)
    with attach(model, "pitome", keep=144, graph=True) as handle, torch.no_grad():
        expected = run(model, pixels)
        run(model, pixels)
        made, own = len(handle.graphs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(own):
            output = model.model.vision_tower(pixels, output_hidden_states=True)
            stats = handle.stats
        own.replay()
        torch.cuda.synchronize()
        assert_equal(tensors(output, stats)[:3], expected[:3])
        assert len(handle.graphs) == made == 1


def test_deterministic_algorithms(pixels, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    model = bf16(layers=3)
    torch.use_deterministic_algorithms(True)
    try:
        with attach(model, keep=144, graph=True) as handle:
            assert_by_a_graph(handle, pixels)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the LLM's prefill -----------------------------------------------------------------------------------------------


def answer(model, inputs, **options):
    """What generate() says: ids, logits, keys and values."""
    options = {"do_sample": False, "max_new_tokens": 4, **options}
    made = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    cache = next(value for name, value in made.items() if name in ("cache", "past_key_values"))
    return [made.sequences, *made.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefills_replay_their_eager_bits(dtype, one, pair):
    model = build(layers=3).to(DEVICE, dtype)
    with attach(model, keep=144, graph=True) as handle:
        asked = [on_gpu(one), {name: value[1:] for name, value in on_gpu(pair).items()}, on_gpu(pair)]
        for inputs in asked:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with handle.using(graph=False):
            expected = [answer(model, inputs) for inputs in asked]
        first = answer(model, asked[0])
        for _ in range(3):
            for inputs, right in zip(asked, expected):
                assert_equal(answer(model, inputs), right)
        assert_equal(first, expected[0])
        assert len(handle.prefills) == 2  # of one row and of two


def test_a_prefill_is_made_anew_where_its_weights_are(one):
    model, inputs = bf16(layers=3), on_gpu(one)
    with attach(model, keep=144, graph=True) as handle:
        for _ in range(2):
            answer(model, inputs)
        model.model.language_model.to("cpu").to(DEVICE)
        for _ in range(2):
            found = answer(model, inputs)
        with handle.using(graph=False):
            assert_equal(found, answer(model, inputs))
        assert len(handle.prefills) == 1


def test_two_models_in_four_threads_prefill_with_streams_of_their_own(one):
    models, inputs = [bf16(layers=3), bf16(layers=3, seed=1)], on_gpu(one)
    handles = [attach(model, keep=144, graph=True) for model in models]
    expected = []
    for model, handle in zip(models, handles):
        with handle.using(graph=False):
            expected.append(answer(model, inputs))
    torch.cuda.synchronize()

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [answer(models[number % 2], inputs) for _ in range(6)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(work, range(4))):
            for each in found:
                assert_equal(each, expected[number % 2])
    assert all(len(handle.prefills) <= 1 for handle in handles)


def test_later_turns_go_on_from_a_replayed_cache(one):
    model, inputs = bf16(layers=3), on_gpu(one)

    def talk():
        first = model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        name, cache = next((n, v) for n, v in first.items() if n in ("cache", "past_key_values"))
        ids = torch.cat([first.sequences, inputs["input_ids"][:, -3:]], 1)
        more = {"input_ids": ids, name: cache, "attention_mask": torch.ones_like(ids)}
        return answer(model, more)

    with attach(model, keep=144, graph=True) as handle:
        found = [talk() for _ in range(3)]
        with handle.using(graph=False):
            expected = talk()
        for each in found:
            assert_equal(each, expected)
        assert len(handle.prefills) == 1


def test_prefills_have_bounded_memory(one):
    model, inputs = bf16(layers=3), on_gpu(one)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with attach(model, keep=144, graph=True) as handle:
        used = []
        for keep in range(160, 172):
            with handle.using(keep=keep):
                for _ in range(9):
                    answer(model, inputs, max_new_tokens=1)
            assert len(handle.prefills) <= graphs.KEPT
            used.append(torch.cuda.memory_allocated())
        assert max(used[6:]) <= 1.2 * max(used[:6])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 64 << 20  # workspaces of libraries stay
