"""A vision tower as one CUDA graph for each shape and setting: what ``graph=`` asks for.

The attached tower's own eager call is captured, merging before the projector included: the same kernels, launched at
once. The tower's forward is replaced by one that finds the graph of a call, and runs eagerly where there is none.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan
from .capture import Capture, Copies, new_pool
from .classes import Hook
from .guards import Watch, guard_of, process_state, unsupported_modules, unsupported_now
from .lock import captures
from .run import RUN, Run
from .state import Attached
from .tower import finish_run

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
KEPT = 4  # graphs of one attachment; each holds the memory of a call
SEEN = 64  # kinds of calls that are remembered without a graph
FORWARD = "tower.forward"  # among what an attachment replaced
Key = tuple[Any, ...]


class Graphs:
    """The graphs of one attachment, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._kept: OrderedDict[Key, tuple[Capture, Copies]] = OrderedDict()  # the latest used last
        self._seen: OrderedDict[Key, int] = OrderedDict()  # how often such calls ran eagerly; -1 = always will
        self._rare = 0  # how often calls of a kind have to come again before they are captured: 2 ** this times
        self._pool: Any = None
        self._said: set[str] = set()

    def say_device(self, device: torch.device, plan: Plan) -> None:
        """Say that there are no graphs on a device, where they were asked for."""
        if plan.graph is True:
            self._say(f"it is on {device}, and {' and '.join(DEVICES)} has them", plan)

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, tower: nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What ``plain`` forward of the tower gives, by a graph where there is one; then `Run.stats` is there too."""
        run: Run = kwargs[RUN]
        reason = unsupported_now()
        if reason is not None:
            self._say(reason, run.plan)
            with captures.shared():
                return plain(*args, **kwargs)
        key, inputs = self._find(tower, run.plan, args, kwargs)
        made = self._replayed(key, inputs)
        if made is None:
            with captures.shared():
                output = plain(*args, **kwargs)
            self._learn(tower, plain, args, kwargs)
            return output
        output, run.stats = made
        run.is_finished = True
        return output

    def _find(self, tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[Key | None, list]:
        """What a graph of such a call is found by, and the tensors that it takes; no key where there can be none."""
        given = [*enumerate(args), *((name, value) for name, value in kwargs.items() if name != RUN)]
        inputs = [value for _, value in given if isinstance(value, Tensor)]
        reason = _unsupported_call(tower, plan, inputs, kwargs)
        if reason is None:
            try:
                hash(plan)
                call, modules = tuple((name, guard_of(value)) for name, value in given), self._modules(tower)
            except TypeError as error:
                reason = f"what it depends on cannot be compared: {error}"
        if reason is not None:
            self._say(reason, plan)
            return None, inputs
        config = tower.config
        defaults = config._attn_implementation, guard_of(config.output_hidden_states)
        return (plan, call, defaults, process_state(inputs[0].device.type), modules), inputs

    def _modules(self, tower: nn.Module) -> tuple:
        with self._lock:
            if self._watch is None or not self._watch.is_current():
                self._forget()
                self._watch = Watch(tower, tower._pitome.projector, last=_last_hook(tower))
            return self._watch.state()

    def _replayed(self, key: Key | None, inputs: list[Tensor]) -> Any:
        """What the graph of this key makes, None if there is none."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            capture, copies = found
        return capture.replay(inputs, copies)

    def _learn(self, tower: nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Count a call that ran eagerly, and capture it if it came often enough."""
        plan = kwargs[RUN].plan
        key, inputs = self._find(tower, plan, args, kwargs)  # the first call of a tower may have changed its hooks
        if key is None or not self._is_due(key, plan):
            return
        reason = unsupported_modules(tower, *_others(tower, plan), last=_last_hook(tower))
        if reason is None:
            with captures.exclusive() as free:
                if not free:  # later, and later each time
                    self._rare, self._seen[key] = self._rare + 1, 0
                    return
                reason = self._capture(key, tower, plan, plain, inputs, args, kwargs)
        if reason is not None:
            self._seen[key] = -1
            self._say(reason, plan)

    def _is_due(self, key: Key, plan: Plan) -> bool:
        """Whether a call of this kind is to be captured now; each graph that had to go made that twice as rare."""
        with self._lock:
            times = self._seen.pop(key, 0)
            self._seen[key] = times = times + 1 if times >= 0 else -1
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            least = (1 if plan.graph is True else 2) << self._rare
            return times >= least and key not in self._kept

    def _capture(
        self, key: Key, tower: nn.Module, plan: Plan, plain: Callable[..., Any], inputs: list, args: tuple, kwargs: dict
    ) -> str | None:
        """Make the graph of a call; if that fails, why."""

        def call(*tensors: Tensor) -> tuple[Any, Any]:
            given, run = iter(tensors), Run(plan)
            fixed = [next(given) if isinstance(value, Tensor) else value for value in args]
            named = {name: next(given) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            output = plain(*fixed, **{**named, RUN: run})
            run.finish(output, tower._pitome.projector)
            return output, run.stats

        with self._lock:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)[1][0].free()
                self._rare += 1
        try:
            self._pool = self._pool or new_pool()
            capture = Capture(call, inputs, self._pool, inputs[0].device)
            found = capture, Copies(capture.made)
        except Exception as error:  # the call itself went well just now, without a capture
            self._pool = None
            while error.__context__ is not None:  # torch says of the end of a capture only that something was before
                error = error.__context__
            said = str(error).strip().partition("\n")[0]
            return f"the capture failed: {type(error).__name__}: {said}"
        with self._lock:
            self._kept[key] = found
            self._seen.pop(key, None)
        return None

    def clear(self) -> None:
        """Give all graphs and their memory back."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        for capture, _ in self._kept.values():
            capture.free()
        self._kept.clear()
        self._seen.clear()
        self._watch = self._pool = None
        self._rare = 0

    def _say(self, reason: str, plan: Plan) -> None:
        """Log, once, why a call runs eagerly; a warning where graphs were asked for."""
        if reason and reason not in self._said:
            self._said.add(reason)
            level = logging.WARNING if plan.graph is True else logging.INFO
            logger.log(level, "the vision tower runs without a CUDA graph: %s", reason)


def _unsupported_call(tower: nn.Module, plan: Plan, inputs: list[Tensor], kwargs: dict[str, Any]) -> str | None:
    """Why such a call cannot be captured."""
    if hasattr(tower, "_orig_mod") or vars(tower).get("_compiled_call_impl") is not None:
        return "it is compiled already"
    if plan.energies:
        return "energies=True keeps what it makes"
    if kwargs.get("output_attentions") or tower.config.output_attentions:
        return "attention weights were asked for"
    if kwargs.get("return_dict") is False:
        return "return_dict=False gives a tuple"
    if not inputs or any(type(x) is not Tensor or not _is_dense(x) for x in inputs):
        return "a picture is not an ordinary, contiguous tensor"
    if len({x.device for x in inputs}) > 1 or inputs[0].device != tower.device:
        return "pictures and weights lie on several devices"
    return None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _last_hook(tower: nn.Module) -> Any:
    """Our hook at the end of a call."""
    ours = (hook for hook in tower._forward_hooks.values() if isinstance(hook, Hook))
    return next((hook for hook in ours if inspect.unwrap(hook.func) is finish_run), None)


def _others(tower: nn.Module, plan: Plan) -> list[nn.Module]:
    """The modules beside the tower that its graph runs."""
    return [tower._pitome.projector] if plan.metric == "projected" else []


def make_forward(tower: nn.Module) -> Callable[..., Any]:
    """A forward of the tower, such as its own, that goes through the graphs of its attachment."""

    own = type(tower).forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle, run = self._pitome, kwargs.get(RUN)
        plain = handle.replaced[FORWARD] or functools.partial(own, self)
        if run is None or not run.plan.graph or torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), torch.device("cpu"))
        if device.type not in DEVICES:
            handle.graphs.say_device(device, run.plan)
            return plain(*args, **kwargs)
        return handle.graphs.run(self, plain, args, kwargs)

    forward.is_pitome = True
    return forward


def install(handle: Attached) -> None:
    """Put a forward on the tower that goes through graphs."""
    tower = handle.tower
    if not hasattr(tower, "_orig_mod"):  # what torch.compile gives
        handle.replaced[FORWARD] = vars(tower).get("forward")
        tower.forward = MethodType(make_forward(tower), tower)


def uninstall(handle: Attached) -> None:
    """Take it off again, also from below a hook of accelerate that came later, and free all graphs."""
    kept, before = vars(handle.tower), handle.replaced.get(FORWARD)
    for name in ("forward", "_old_forward"):
        if isinstance(kept.get(name), MethodType) and hasattr(kept[name].__func__, "is_pitome"):
            kept[name] = before or MethodType(type(handle.tower).forward, handle.tower)
            if name == "forward" and before is None:
                del kept[name]
    handle.graphs.clear()
