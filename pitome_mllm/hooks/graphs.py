"""Modules as CUDA graphs, one for each shape and setting: what ``graph=`` asks for.

The module's own eager call is captured: the same kernels, launched at once. Its forward is replaced by one that finds
the graph of a call, and runs eagerly where there is none. What a graph has to know of a call is its `Work`.
"""

from __future__ import annotations

import functools
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
from .guards import Watch, guard_of, process_state, unsupported_now
from .lock import captures
from .run import RUN
from .state import Attached
from .work import TowerWork, Work

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
KEPT = 4  # graphs of one module; each holds the memory of a call
SEEN = 64  # kinds of calls that are remembered without a graph
RAREST = 8  # doublings after which what a capture takes is nothing beside the calls before it
Key = tuple[Any, ...]


class Graphs:
    """The graphs of one module of an attachment, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._kept: OrderedDict[Key, tuple[Capture, Copies]] = OrderedDict()  # the latest used last
        self._seen: OrderedDict[Key, int] = OrderedDict()  # how often such calls ran eagerly; -1 = always will
        self._rare = 0  # how often calls of a kind have to come again before they are captured: 2 ** this times
        self._pool: Any = None
        self._said: set[str] = set()
        self._cleared = 0  # how often all were given back

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, kind: type[Work], device: torch.device, *call: Any) -> Any:
        """What a call on ``device`` gives, by a graph where there is one; ``call`` is what this ``kind`` is made of."""
        _, plan, plain, args, kwargs = call
        if device.type not in DEVICES:
            if plan.graph is True:
                self._say(f"it is on {device}, and {' and '.join(DEVICES)} has them", kind, plan)
            return plain(*args, **kwargs)
        work, reason, cleared = kind(*call), unsupported_now(), self._cleared
        key = self._find(work) if reason is None else None
        made = None if key is None else self._replayed(key, work.inputs)
        if made is not None:
            return work.hand_out(made)
        with captures.shared():
            output = plain(*args, **kwargs)
        if reason is not None:
            self._say(reason, kind, plan)
        elif key is not None:
            self._learn(work, cleared)
        return output

    def _find(self, work: Work) -> Key | None:
        """What a graph of such a call is found by; None where there can be none."""
        reason = work.eager_reason()
        if reason is None:
            try:
                call = tuple((name, guard_of(value)) for name, value in work.given)
                return work.settings, call, process_state(work.inputs[0].device.type), self._modules(work)
            except TypeError as error:
                reason = f"what it depends on cannot be compared: {error}"
        self._say(reason, type(work), work.plan)
        return None

    def _modules(self, work: Work) -> tuple:
        with self._lock:
            if self._watch is None or not self._watch.is_current():
                self._forget()
                self._watch = Watch(work.module, *work.watched, last=work.last)
            return self._watch.state()

    def _replayed(self, key: Key, inputs: list[Tensor]) -> Any:
        """What the graph of this key makes, None if there is none."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            capture, copies = found
        return capture.replay(inputs, copies)

    def _learn(self, work: Work, cleared: int) -> None:
        """Count a call that ran eagerly, and capture it if it came often enough, and nothing was ``cleared`` since."""
        key = self._find(work)  # anew: the first call of a module may have changed its hooks
        if key is None or not self._is_due(key, work.plan):
            return
        reason = work.eager_reason_inside()
        if reason is None:
            with captures.exclusive() as free:
                if not free:  # later, and later each time
                    self._rare, self._seen[key] = self._rare + 1, 0
                    return
                reason = self._capture(key, work, cleared)
        if reason is not None:
            self._seen[key] = -1
            self._say(reason, type(work), work.plan)

    def _is_due(self, key: Key, plan: Plan) -> bool:
        """Whether a call of this kind is to be captured now; each graph that had to go made that twice as rare."""
        with self._lock:
            times = self._seen.pop(key, 0)
            self._seen[key] = times = times + 1 if times >= 0 else -1
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            least = (1 if plan.graph is True else 2) << min(self._rare, RAREST)
            return times >= least and key not in self._kept

    def _capture(self, key: Key, work: Work, cleared: int) -> str | None:
        """Make the graph of a call; if that fails, why."""
        with self._lock:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)[1][0].free()
                self._rare += 1
        try:
            self._pool = self._pool or new_pool()
            capture = Capture(work.again, work.inputs, self._pool, work.inputs[0].device)
            found = capture, Copies(capture.made)
        except Exception as error:  # the call itself went well just now, without a capture
            self._pool = None
            while error.__context__ is not None:  # torch says of the end of a capture only that something was before
                error = error.__context__
            said = str(error).strip().partition("\n")[0]
            return f"the capture failed: {type(error).__name__}: {said}"
        with self._lock:
            if self._cleared != cleared:  # nobody wants it any more
                capture.free()
                return None
            self._kept[key] = found
            self._seen.pop(key, None)
        return None

    def clear(self) -> None:
        """Give all graphs and their memory back."""
        with self._lock:
            self._cleared += 1
            self._forget()

    def _forget(self) -> None:
        for capture, _ in self._kept.values():
            capture.free()
        self._kept.clear()
        self._seen.clear()
        self._watch = self._pool = None
        self._rare = 0

    def _say(self, reason: str, kind: type[Work], plan: Plan) -> None:
        """Log, once, why a call runs eagerly; a warning where graphs were asked for."""
        if reason and reason not in self._said:
            self._said.add(reason)
            level = logging.WARNING if plan.graph is True else logging.INFO
            logger.log(level, "%s runs without a CUDA graph: %s", kind.name, reason)


def run_tower(tower: nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call of a tower, by a graph where there is one; then `Run.stats` is there too."""
    run = kwargs.get(RUN)
    if run is None or not run.plan.graph:
        return plain(*args, **kwargs)
    device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), torch.device("cpu"))
    return tower._pitome.graphs.run(TowerWork, device, tower, run.plan, plain, args, kwargs)


def install(handle: Attached, module: nn.Module, name: str, run: Callable[..., Any]) -> None:
    """Put a forward on ``module`` that hands itself, its own forward and its arguments to ``run``.

    ``name`` : among what the attachment replaced.
    """
    own = type(module).forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = self._pitome.replaced[name] or functools.partial(own, self)
        return plain(*args, **kwargs) if torch.compiler.is_compiling() else run(self, plain, args, kwargs)

    forward.is_pitome = True
    if not hasattr(module, "_orig_mod"):  # what torch.compile gives
        handle.replaced[name] = vars(module).get("forward")
        module.forward = MethodType(forward, module)


def uninstall(module: nn.Module, before: Any) -> None:
    """Take it off again, also from below a hook of accelerate that came later; ``before`` : what was there."""
    kept = vars(module)
    for name in ("forward", "_old_forward"):
        if isinstance(kept.get(name), MethodType) and hasattr(kept[name].__func__, "is_pitome"):
            kept[name] = before or MethodType(type(module).forward, module)
            if name == "forward" and before is None:
                del kept[name]
