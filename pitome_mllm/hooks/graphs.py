"""A vision tower as one graph for each plan and each kind of call: what ``compiled=`` asks for.

Token counts are static, so everything between the pixels and the projector, merging included, fits one graph without
breaks, and on a CUDA device that graph is launched as a whole. The tower's own call is replaced, as `nn.Module.compile`
does it, by one that looks at the plan of the calling thread first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..plan import Plan
from . import tower as towers
from .state import Hook
from .turns import Turns

CALL = "_compiled_call_impl"  # where `nn.Module.__call__` looks for a compiled call
_numbers = itertools.count()


class Graphs:
    """The graphs of one attachment, for all threads; kept until it is removed.

    A graph is made alone, without a call that has none beside it: what transformers records of hidden states goes
    astray between threads while one of them compiles.
    """

    def __init__(self) -> None:
        self._made: dict[tuple, Callable[..., Any]] = {}
        self.turns = Turns()

    def run(self, tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The tower's output by the graph for such arguments, which the first call makes."""
        args, kwargs = towers.started(tower, plan, args, kwargs)
        run = kwargs[towers.RUN]
        run.in_graph = True
        key = _key(tower, plan, args, kwargs)
        made = self._made.get(key)
        output = self._first(tower, plan, key, args, kwargs) if made is None else made(*args, **kwargs)
        if next(tower.parameters()).device.type == "cuda":
            run.stats = copy.deepcopy(run.stats, {id(plan): plan})
        towers.keep_stats(tower._pitome, run)
        return output

    def _first(self, tower: nn.Module, plan: Plan, key: tuple, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make a graph by its first call, unless another thread has made it meanwhile."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = tower.forward(*args, **kwargs)
            towers.finish_run(tower, args, kwargs, output)
            return output

        with self.turns.alone():
            if not self._made:  # transformers sets up its recorders in a tower's first call, which no graph can hold
                with torch.no_grad():
                    tower.forward(*args, **{**kwargs, towers.RUN: None})
            made = self._made.get(key) or graph(forward, plan.compiled, next(tower.parameters()).device)
            output = made(*args, **kwargs)
            self._made[key] = made
        return output


def _key(tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """What a graph is made for: with anything else here, torch would make it anew without a word."""

    def look(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_inference()

    weight = next(tower.parameters())
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    state = tower.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
    given = ((name, look(value)) for name, value in (*enumerate(args), *kwargs.items()) if name != towers.RUN)
    return plan, weight.device, weight.dtype, weight.requires_grad, tower.config._attn_implementation, state, *given


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


def prepare(tower: nn.Module, asked: Plan) -> None:
    """Where the plan asks for graphs, make calls of the tower go through those of its attachment."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # somebody compiles what is around the tower
            return tower._call_impl(*args, **kwargs)
        handle, plan = tower._pitome, tower._pitome.plan
        if plan is None or not plan.compiled:
            with handle.graphs.turns.together():
                return tower._call_impl(*args, **kwargs)
        return hooked(tower, partial(handle.graphs.run, tower, plan), args, kwargs)

    call.of_pitome = True
    if asked.compiled:
        vars(tower)[CALL] = call


def hooked(tower: nn.Module, run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """``run`` between the tower's own forward hooks, which no graph holds: torch would not see that they change."""
    for number, hook in [item for item in tower._forward_pre_hooks.items() if not isinstance(item[1], Hook)]:
        if number in tower._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(tower, args, kwargs) or (args, kwargs)
        else:
            given = hook(tower, args)
            args = args if given is None else given if isinstance(given, tuple) else (given,)
    output = run(args, kwargs)
    for number, hook in [item for item in tower._forward_hooks.items() if not isinstance(item[1], Hook)]:
        known = (args, kwargs) if number in tower._forward_hooks_with_kwargs else (args,)
        given = hook(tower, *known, output)
        output = output if given is None else given
    return output


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
        except _failures() as error:
            raise RuntimeError(
                f"{backend!r} could not compile on {device}: {_reason(error)}; compiled=False runs without"
            ) from error
        # what a CUDA graph gives lies in its own memory, where its next launch writes again
        return tree_map_only(Tensor, Tensor.clone, output) if device.type == "cuda" else output

    return call


def _failures() -> tuple[type[Exception], ...]:
    """What torch raises where it cannot compile; asked for late, since importing it takes seconds."""
    known = torch._dynamo.exc
    return known.TorchDynamoException, getattr(known, "FailOnRecompileLimitHit", known.TorchDynamoException)


def _reason(error: BaseException | None) -> str:
    """The first line of the innermost error that says anything."""
    said = []
    while error is not None:
        said.append(str(error))
        error = getattr(error, "inner_exception", None) or error.__cause__  # torch wraps what its backends raise
    return next((text.strip().splitlines()[0] for text in reversed(said) if text.strip()), "no reason given")
