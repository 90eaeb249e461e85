"""What a CUDA graph has to know of a call of a module that it may stand in for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan
from .classes import Hook
from .guards import guard_of, unsupported_modules
from .run import RUN, Run, begin
from .tower import finish_run


class Work:
    """One call of a module, for which a graph may stand in."""

    name = ""  # of the module, in the log
    apart: Sequence[str] = ()  # keywords that bring nothing that a graph depends on
    watched: Sequence[nn.Module] = ()  # modules beside it whose state counts

    def __init__(self, module: nn.Module, plan: Plan, plain: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        self.module, self.plan, self.plain, self.args, self.kwargs = module, plan, plain, args, kwargs
        # Names and values of what a graph depends on, and the tensors of those.
        self.given = [*enumerate(args), *((name, value) for name, value in kwargs.items() if name not in self.apart)]
        self.inputs = [value for _, value in self.given if isinstance(value, Tensor)]

    @property
    def settings(self) -> tuple:
        """What else a graph depends on."""
        raise NotImplementedError

    @property
    def last(self) -> Any:
        """The last of the module's forward hooks that is to be part of the graph; what comes after runs around it."""
        raise NotImplementedError

    def eager_reason(self) -> str | None:
        """Why such a call cannot be captured."""
        module, asked = self.module, self.kwargs.get
        if asked("output_attentions") or module.config.output_attentions:
            return "attention weights were asked for"
        if asked("return_dict") is False:
            return "return_dict=False gives a tuple"
        if not self.inputs or any(type(x) is not Tensor or not _is_dense(x) for x in self.inputs):
            return "an input is not an ordinary, contiguous tensor"
        if len({x.device for x in self.inputs}) > 1 or self.inputs[0].device != module.device:
            return "inputs and weights lie on several devices"
        return None

    def eager_reason_inside(self) -> str | None:
        """Why its modules cannot be captured, as they are."""
        return unsupported_modules(self.module, last=self.last)

    def placed(self, tensors: Sequence[Tensor]) -> tuple[list, dict[str, Any]]:
        """The arguments of the call with ``tensors`` in the place of its own."""
        given = iter(tensors)
        args = [next(given) if isinstance(value, Tensor) else value for value in self.args]
        return args, {
            name: next(given) if isinstance(value, Tensor) and name not in self.apart else value
            for name, value in self.kwargs.items()
        }

    def again(self, *tensors: Tensor) -> Any:
        """What the call makes of ``tensors``, all of it, so that copies can be handed out."""
        raise NotImplementedError

    def hand_out(self, made: Any) -> Any:
        """What the call returns where a graph made copies of what `again` gives."""
        raise NotImplementedError


class TowerWork(Work):
    """A call of a vision tower, merging before the projector included."""

    name, apart = "the vision tower", (RUN,)
    most = 64  # pictures; more take a GPU (an H200, at 7B) longer than launching takes its host

    def __init__(self, module: nn.Module, plan: Plan, plain: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        super().__init__(module, plan, plain, args, kwargs)
        self.watched = (module._pitome.projector,)

    @property
    def settings(self) -> tuple:
        hash(self.plan)
        return self.plan, self.module.config._attn_implementation, guard_of(self.module.config.output_hidden_states)

    @property
    def last(self) -> Any:
        """Our hook at the end of a call."""
        ours = (hook for hook in self.module._forward_hooks.values() if isinstance(hook, Hook))
        return next((hook for hook in ours if inspect.unwrap(hook.func) is finish_run), None)

    def eager_reason(self) -> str | None:
        if self.plan.energies:
            return "energies=True keeps what it makes"
        reason = super().eager_reason()
        if reason is None and self.plan.graph == "auto" and len(self.inputs[0]) > self.most:
            return f"more than {self.most} pictures keep a GPU busy without one (graph=True makes one of any number)"
        return reason

    def eager_reason_inside(self) -> str | None:
        others = self.watched if self.plan.metric == "projected" else ()
        return unsupported_modules(self.module, *others, last=self.last)

    def again(self, *tensors: Tensor) -> tuple[Any, Any]:
        (args, kwargs), run = self.placed(tensors), begin(self.plan)
        output = self.plain(*args, **{**kwargs, RUN: run})
        run.finish(output, self.module._pitome.projector)
        if self.plan.calibration != "none" and run.stats is not None and run.stats.groups is not None:
            vars(run.stats)["median"] = run.stats.median  # what the LLM will be told
        return output, run.stats

    def hand_out(self, made: Any) -> Any:
        run: Run = self.kwargs[RUN]
        output, run.stats = made
        run.is_finished = True
        return output


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
