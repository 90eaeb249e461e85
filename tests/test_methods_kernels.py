"""Which path a merge takes where there is no GPU; the kernels themselves are tried by `make test-kernels`."""

from __future__ import annotations

import pytest
import torch

from pitome_mllm.methods import get_method
from pitome_mllm.methods.merge import Merge

METRIC = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["pitome", "tome", "pitome-llava"])
def test_the_switch_forces_a_path(monkeypatch, name):
    reducer = get_method(name)
    for choice in ("auto", "torch"):
        monkeypatch.setenv("PITOME_KERNELS", choice)
        assert type(reducer.match(METRIC, 3)) is Merge
    monkeypatch.setenv("PITOME_KERNELS", "fused")
    with pytest.raises(RuntimeError, match="PITOME_KERNELS=fused, but .*set it to torch"):
        reducer.match(METRIC, 3)
    monkeypatch.setenv("PITOME_KERNELS", "yes")
    with pytest.raises(ValueError, match="'yes' is not possible; choose one of auto, torch, fused"):
        reducer.match(METRIC, 3)
