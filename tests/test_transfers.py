"""How often a prompt waits for its device, shown without one: by tensors that say they are elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pitome_mllm
from pitome_mllm.hooks import llm, prompt, validate

ELSEWHERE = torch.device("meta")
ASKING = ("_local_scalar_dense", "equal.default", "nonzero", "unique", "masked_select")


class Far(Tensor):
    """A tensor with numbers of its own that says that it is on another device."""

    @staticmethod
    def __new__(cls, numbers: Tensor):
        strides, kind = numbers.stride(), numbers.dtype
        return Tensor._make_wrapper_subclass(cls, numbers.shape, strides=strides, dtype=kind, device=ELSEWHERE)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("outside of Device")


class Device(TorchDispatchMode):
    """Runs what is asked of tensors elsewhere, refuses to mix them with others, and notes who waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), str(function)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far, asked = any(isinstance(x, Far) for x in tensors), kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if "_to_copy" in name:
            moves = asked is not None and (torch.device(asked) == ELSEWHERE) != far
            if moves and (far or not kwargs.get("non_blocking")):
                self.waited.append(name)
        elif far:
            assert all(isinstance(x, Far) or not x.dim() for x in tensors), f"{name} of tensors on several devices"
            self.waited += [name] if any(word in name for word in ASKING) else []
        result = function(*tree_map(near, args), **tree_map(near, kwargs))
        stays = far if asked is None else torch.device(asked) == ELSEWHERE
        return tree_map(lambda x: Far(x) if isinstance(x, Tensor) and stays else x, result)


def near(value):
    return value.numbers if isinstance(value, Far) else value


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("calibration", ["none", "size", "distance"])
def test_a_prompt_is_shortened_after_one_look_at_it(model, pair, monkeypatch, calibration, masked):
    monkeypatch.setattr(validate, "_check_devices", lambda *_: None)
    kwargs = dict(pair) if masked else {name: x for name, x in pair.items() if name != "attention_mask"}
    with torch.no_grad(), pitome_mllm.attach(model, keep=144, calibration=calibration) as handle:
        model.get_image_features(pixel_values=pair["pixel_values"])
        stats = handle.state.stats
        expected = prompt.rewrite(handle, kwargs, whole=True)
        told = llm._told(expected, stats, 2)
        with Device() as device:
            away = {name: x if name == "pixel_values" else Far(x) for name, x in kwargs.items()}
            call = prompt.rewrite(handle, away, whole=True)
            assert len(device.waited) == 1, device.waited
            there = SimpleNamespace(device=ELSEWHERE, median=Far(stats.median), sizes=Far(stats.sizes), packed=())
            layout = llm._told(call, there, 2)
            given = () if calibration == "none" else layout.of_places(layout.places + 1)
            assert len(device.waited) == 1, device.waited  # the LLM is told without waiting for the tower
            assert prompt._is_part(handle, call, call.kwargs) and len(device.waited) == 2
    for name, x in expected.kwargs.items():
        if isinstance(x, Tensor) and name != "pixel_values":
            assert isinstance(call.kwargs[name], Far) and torch.equal(near(call.kwargs[name]), x)
    if calibration != "none":
        assert all(map(torch.equal, map(near, given), told.of_places(told.places + 1)))
