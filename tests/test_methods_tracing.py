"""No method waits for the host: no value is read, nothing is copied, and traces serve any values."""

from __future__ import annotations

import torch
from drawn import NAMES, Tokens, each, extras
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pitome_mllm.methods import get_method

UNORDERED = ("index_add", "scatter_add", "scatter_reduce", "cumsum", "cumprod", "aten.put", "bincount")
WAITING = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "equal.default", "is_nonzero", "tolist")


class Recorder(TorchDispatchMode):
    """Notes every operation on tensors, the kinds of device it reads and writes, and what of floats it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, set[str]]] = []
        self.on_floats: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        self.operations.append((str(function), {value.device.type for value in tensors}))
        if any(value.is_floating_point() for value in tree_leaves(result) if isinstance(value, Tensor)):
            self.on_floats.append(f"{function}{args[3:] if 'reduce' in str(function) else ''}")
        return result


def hot_case(name: str, device: str = "cpu"):
    """match, reduce, expand and then, as a function of tensors alone; and the tensors for it."""
    reducer = get_method(name)
    t = Tokens("normal", 2, 16, 1, 4, 0.75, 0.6, seed=5).make(reducer)
    left = t.patches - t.r
    later = t.options | ({} if reducer.once else extras(reducer, 2, left + 1, left))
    attention = [given["attention"] for given in (t.options, later) if "attention" in given]
    fixed = {"protected": t.options["protected"], "depth": t.options["depth"]}
    if "grid" in t.options:
        fixed["grid"] = t.options["grid"]

    def run(metric: Tensor, x: Tensor, size: Tensor, *attention: Tensor) -> tuple[Tensor, ...]:
        first, second = ({"attention": value} for value in attention) if attention else ({}, {})
        merge = reducer.match(metric, t.r, size=size, **fixed, **first)
        features, sizes = merge.reduce(x, size)
        if merge.group is None or reducer.once:
            return features, sizes
        whole = merge.then(reducer.match(features, min(1, reducer.max_removable(left)), size=sizes, **fixed, **second))
        features, sizes = whole.reduce(x, size)
        return features, sizes, whole.group, whole.expand(features)

    return run, tuple(value.to(device) for value in (t.metric, t.x, t.size, *attention))


@each(NAMES)
def test_no_value_is_read_and_nothing_is_copied_to_the_device(name):
    """The meta device holds no values: reading one fails, and a copy from the host shows up as such.

    Both would make a GPU wait for the host, and neither can be captured in a CUDA graph. The first call is not
    counted, so that a constant may be made once.
    """
    run, inputs = hot_case(name, "meta")
    run(*inputs)
    with Recorder() as recorder:
        results = run(*inputs)
    assert all(result.device.type == "meta" for result in results)
    assert recorder.operations
    mixed = [operation for operation, devices in recorder.operations if devices - {"meta"}]
    assert not mixed, f"{name} moves values between host and device: {sorted(set(mixed))}"


@each(NAMES)
def test_no_sum_of_floats_depends_on_the_order_in_which_a_gpu_adds(name):
    """Such sums differ from run to run, and near-ties of the next merge with them. The largest of some is the same."""
    run, inputs = hot_case(name, "meta")
    with Recorder() as recorder:
        run(*inputs)
    unordered = [op for op in recorder.on_floats if any(word in op for word in UNORDERED) and "amax" not in op]
    assert not unordered, f"{name} adds by {sorted(set(unordered))}"


@each(NAMES)
def test_no_operation_waits_for_its_result(name):
    run, inputs = hot_case(name)
    with Recorder() as recorder:
        run(*inputs)
    waiting = [op for op, _ in recorder.operations if any(word in op for word in WAITING)]
    assert not waiting, f"{name} waits for {sorted(set(waiting))}"


@each(NAMES)
def test_a_trace_serves_other_values(name):
    """Traced on fake tensors, the graph gives the groups of any values: no Python branch depends on them."""
    run, inputs = hot_case(name)
    graph = make_fx(run, tracing_mode="fake")(*inputs)
    random = torch.Generator().manual_seed(11)
    for _ in range(3):
        other = (*(torch.randn(value.shape, generator=random) for value in inputs[:2]), inputs[2] + 1, *inputs[3:])
        for traced, eager in zip(graph(*other), run(*other), strict=True):
            torch.testing.assert_close(traced, eager)
