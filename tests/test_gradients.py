"""Gradients through the merge, against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, QUESTIONS, WIDTH, pictures

from pitome_mllm import attach

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLASSES = {family.model: family for family in reversed(FAMILIES)}.values()  # the LLM makes no difference before it
STEP = 1e-8  # of pixels; so small that no other tokens merge
CASES = [
    pytest.param(family, where, id=f"{family.title}-{where}")
    for family in CLASSES
    for where in family.wheres
    if where in ("both", "packed")  # "both" is the tower and the projector
]


@pytest.mark.parametrize("family,where", CASES)
def test_gradients_of_merged_features_are_their_derivative(family, where):
    """From the pixels through all blocks, merges and the projector of a whole model; along a random direction."""
    model, inputs = family.build().double(), family.process([(QUESTIONS[0], pictures(0))])
    rest = {k: inputs[k] for k in ("image_sizes", "batch_num_images", "pixel_attention_mask") if k in inputs}
    handle = attach(model, keep=0.25, where=where)

    def features(pixels):
        found = torch.cat(tuple(model.model.get_image_features(pixels, **rest, return_dict=True).pooler_output))
        groups.append(torch.cat([group.flatten() for group in handle.stats.groups]))
        return (found * weights[: len(found)]).sum() / weights.shape[1]

    groups, generator = [], torch.Generator().manual_seed(0)
    weights = torch.randn(2000, WIDTH, dtype=torch.float64, generator=generator)
    pixels = inputs[family.pixels].double().requires_grad_()
    shown = pixels.detach() != 0  # tiles that are all zero are padding
    (gradient,) = torch.autograd.grad(features(pixels), pixels)
    for _ in range(5):  # what merges is decided in float32: a direction in which it changes tells nothing
        direction = torch.randn(pixels.shape, dtype=torch.float64, generator=generator) * shown
        with torch.no_grad():
            ahead, behind = (features(pixels + side * STEP * direction).item() for side in (1, -1))
        if all(torch.equal(groups[0], others) for others in groups[-2:]):
            break
    else:
        pytest.fail("other tokens merge in every direction")
    assert (ahead - behind) / (2 * STEP) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
    assert handle.stats.tokens_after < handle.stats.tokens_before
