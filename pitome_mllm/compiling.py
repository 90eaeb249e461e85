"""A vision tower as one graph for each plan and each shape of its pictures: what ``compiled=`` asks for.

Token counts are static, so everything between the pixels and the projector, merging included, fits one graph without
breaks, and on a CUDA device that graph is launched as a whole. The tower's own call is replaced, as `nn.Module.compile`
does it, by one that looks at the plan of the calling thread first.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import tower as towers
from .plan import Plan

CALL = "_compiled_call_impl"  # where `nn.Module.__call__` looks for a compiled call
NEEDS = {  # what a backend needs on a device, and what says so where it fails
    ("inductor", "cpu"): "; it needs a C++ compiler such as g++",
    ("inductor", "cuda"): "; it needs triton",
}
_numbers = itertools.count()


class Graphs:
    """The graphs of one attachment, for all threads; kept until it is removed.

    ``alone`` is held while a graph is made, and by calls without one: what transformers records of hidden states goes
    astray between threads while one of them compiles.
    """

    def __init__(self) -> None:
        self._made: dict[tuple, Callable[..., Any]] = {}
        self.alone = threading.Lock()

    def run(self, tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, towers.Run]:
        """The tower's output by the graph for tensors of these shapes, which the first call makes, and its run."""
        args, kwargs = towers.started(tower, plan, args, kwargs)
        run = kwargs[towers.RUN]
        run.in_graph = True
        device = next(tower.parameters()).device
        shapes = (tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        key = (plan, device, *shapes)
        made = self._made.get(key)
        output = self._first(tower, plan, device, key, args, kwargs) if made is None else made(*args, **kwargs)
        if device.type == "cuda":
            run.stats = copy.deepcopy(run.stats, {id(plan): plan})
        return output, run

    def _first(
        self, tower: nn.Module, plan: Plan, device: torch.device, key: tuple, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Make a graph by its first call, unless another thread has made it meanwhile."""
        with self.alone:
            if not self._made:  # transformers sets up its recorders in a tower's first call, which no graph can hold
                with torch.no_grad():
                    tower._call_impl(*args, **{**kwargs, towers.RUN: None})
            made = self._made.get(key) or graph(tower._call_impl, plan.compiled, device)
            output = made(*args, **kwargs)
            self._made[key] = made
        return output


def check(tower: nn.Module, plan: Plan) -> None:
    """ValueError if this tower cannot run as ``plan.compiled`` says."""
    if not plan.compiled:
        return
    if plan.geometry.original or not plan.geometry.merges_in_tower:
        raise ValueError(
            f"compiled={plan.compiled!r} is for vision towers that merge, and in this family none does or it is one of "
            "the original llava package; leave it out"
        )
    try:
        hash(plan)
    except TypeError as error:
        raise ValueError(
            f"compiled={plan.compiled!r} finds graphs by their settings, and those of {plan.method} cannot be looked "
            f"up ({error}); give the reducer options that are hashable, such as tuples for lists"
        ) from error
    kept = vars(tower).get(CALL)
    if hasattr(tower, "_orig_mod") or (kept is not None and not hasattr(kept, "of_pitome")):
        raise ValueError(
            f"compiled={plan.compiled!r} compiles the vision tower, which is compiled already; leave it out, or load "
            "the model anew and do not compile its tower yourself"
        )
    device = next(tower.parameters()).device
    if plan.compiled == "cudagraphs" and device.type != "cuda":
        raise ValueError(f"compiled='cudagraphs' needs the model on a CUDA device, got {device}; choose compiled=True")


def prepare(tower: nn.Module, plan: Plan) -> None:
    """Where the plan asks for graphs, make calls of the tower go through those of its attachment."""

    def call(*args: Any, **kwargs: Any) -> Any:
        handle = tower._pitome
        active = handle.active
        if torch.compiler.is_dynamo_compiling():  # somebody compiles what is around the tower
            return tower._call_impl(*args, **kwargs)
        if active is None or not active.compiled:
            with handle.graphs.alone:
                return tower._call_impl(*args, **kwargs)
        output, run = handle.graphs.run(tower, active, args, kwargs)
        towers.keep_stats(handle, run)
        return output

    call.of_pitome = True
    if plan.compiled:
        vars(tower)[CALL] = call


def uninstall(tower: nn.Module) -> None:
    """Take off what `prepare` put there."""
    if hasattr(vars(tower).get(CALL), "of_pitome"):
        del vars(tower)[CALL]


def graph(function: Callable[..., Any], backend: str, device: torch.device) -> Callable[..., Any]:
    """``function`` as one graph without breaks, made on the first call; a CUDA graph on a CUDA device.

    Raises, when called
    -------------------
    RuntimeError : it cannot be compiled on this machine.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # torch counts graphs by code object and gives up at a few, so each of ours has a code object of its own
    code = run.__code__.replace(co_name=f"graph{next(_numbers)}")
    own = FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    mode = "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None
    compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            output = compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"{backend!r} could not compile on {device}: {_reason(error)}{NEEDS.get((backend, device.type), '')}; "
                "compiled=False runs without"
            ) from error
        # what a CUDA graph gives lies in its own memory, where its next launch writes again
        return tree_map_only(Tensor, Tensor.clone, output) if device.type == "cuda" else output

    return call


def _reason(error: BaseException | None) -> str:
    """The first line of the innermost error that says anything."""
    said = []
    while error is not None:
        said.append(str(error))
        error = getattr(error, "inner_exception", None) or error.__cause__  # torch wraps what its backends raise
    return next((text.strip().splitlines()[0] for text in reversed(said) if text.strip()), "no reason given")
