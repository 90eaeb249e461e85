"""Memory from a configuration: weights as loaded, and a bound that what really lives at once stays under."""

import pytest
import torch
from checks import Alive
from models import QUESTION, build, config, picture, processor

from pitome_mllm import attach, load
from pitome_mllm.costs.flops import estimate
from pitome_mllm.costs.memory import footprint, largest_batch, weight_bytes
from pitome_mllm.costs.published import SHAPES

TEXT = len(QUESTION.split())


def stored(model):
    """Bytes of all tensors that a model holds, the scales of quantised ones included."""
    held = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        held += [state.absmax, state.code] if state is not None else []
        scale = getattr(weight, "SCB", None)
        held += [scale] if isinstance(scale, torch.Tensor) else []
    return sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_are_what_the_embedded_model_holds(dtype, bits):
    model, _ = load("tiny", bits=bits, dtype=dtype)
    assert weight_bytes(model.config, dtype, bits) == stored(model)


def test_weights_of_published_models():
    seven = SHAPES["llava-1.5-7b"].config()
    assert weight_bytes(seven) == pytest.approx(2 * 7.063e9, rel=1e-3)
    assert weight_bytes(SHAPES["llava-1.5-13b"].config()) == pytest.approx(2 * 13.35e9, rel=1e-3)
    assert weight_bytes(seven, bits=8) == pytest.approx(6.8e9 + 0.263e9 * 2, rel=2e-3)
    assert weight_bytes(seven, bits=4) == pytest.approx(6.8e9 * (0.5 + 4 / 64) + 0.263e9 * 2, rel=2e-3)


@pytest.fixture(scope="module")
def wide():
    """A model in which rows of tokens weigh more than pairs of tokens, as in real ones."""
    return build(layers=4, width=512, dtype=torch.float32)


RUNS = [
    {},
    {"keep": 144},
    {"keep": 144, "method": "tome"},
    {"keep": 144, "method": "pitome-llava"},
    {"keep": 72, "where": "projector"},
    {"keep": 36, "where": "both"},
    {"batch": 2, "keep": 288},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_what_lives_at_once_stays_under_the_bound_and_near_it(settings, wide):
    settings = dict(settings)
    batch = settings.pop("batch", 1)
    inputs = processor()(images=[picture(i) for i in range(batch)], text=[QUESTION] * batch, return_tensors="pt")
    bound = footprint(wide, batch=batch, text_tokens=TEXT, new_tokens=3, dtype="float32", **settings)
    handle = attach(wide, **settings) if settings else None
    try:
        with Alive(wide.parameters(), wide.buffers()) as peak:
            wide.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    finally:
        if handle:
            handle.remove()
    assert peak.most <= bound.activations + bound.kv
    assert peak.most >= 0.5 * (bound.activations + bound.kv)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "dtype": "bfloat16"}, {"images": 5, "keep": 0.25}])
def test_the_largest_batch_is_the_largest_that_fits(options):
    seven = SHAPES["llava-1.5-7b"].config()
    found = largest_batch(seven, 24e9, **options)
    assert found > 1
    assert footprint(seven, batch=found, **options).total <= 24e9
    assert footprint(seven, batch=found + 1, **options).total > 24e9


def test_fewer_tokens_and_bits_let_more_rows_in():
    seven = SHAPES["llava-1.5-7b"].config()
    plain, merged, quantised = (largest_batch(seven, 24e9, **o) for o in ({}, {"keep": 0.25}, {"bits": 4}))
    assert plain < merged and plain < quantised
    assert largest_batch(seven, 14e9) == 0


def test_the_cache_is_that_of_the_estimate():
    own = footprint(config(), keep=144, batch=3, new_tokens=5, dtype="float32")
    assert own.kv == estimate(config(), keep=144, batch=3, new_tokens=5, dtype="float32").kv_bytes
    assert own.total == own.weights + own.kv + own.activations


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: footprint(config(), bits=3), "bits=3 is not possible; choose 4 or 8"),
        (lambda: footprint(config(), dtype="half-ish"), "unknown dtype 'half-ish'"),
        (lambda: footprint(SHAPES["vit-mae-h"].config()), "CLIPVisionConfig is a vision tower alone"),
        (lambda: weight_bytes(config().text_config), "unsupported family 'llama'; supported: llava"),
        (lambda: largest_batch(config(), 0), "memory=0 is not possible"),
        (lambda: largest_batch(config(), 1e9, batch=2), "batch is what largest_batch finds"),
    ],
)
def test_errors_say_what_is_possible(call, words):
    with pytest.raises(ValueError, match=words):
        call()
