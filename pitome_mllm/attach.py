"""Attach merging to a model, change it, and take it off again without a trace.

Read next: `plan` for what a setting means, `tower` for merging inside the blocks, `prompt` for the placeholders,
`language` for what the LLM is told.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from . import language, prompt, tower
from .methods import Reducer
from .plan import Plan, Settings, make_plan
from .prompt import Call
from .specs import FAMILIES, TOWERS, FamilySpec, TowerSpec, geometry
from .stats import Stats

logger = logging.getLogger(__name__)

# Every hook we register: the table of the module it lives in, and the function.
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_HOOKS = (
    tower.start_run,
    tower.finish_run,
    tower.catch_keys,
    tower.catch_query,
    prompt.before_forward,
    prompt.after_forward,
    language.before_language,
)


class _Thread:
    """What one thread does with one attachment."""

    def __init__(self) -> None:
        self.plans: list[Plan | None] = []  # of `using`, innermost last
        self.generating: Call | None = None  # the prompt of the generate() that is running
        self.call: Call | None = None
        self.stats: Stats | None = None
        self.log_size: Tensor | None = None  # of the places of the KV cache, while a call runs


class _Threads(threading.local):
    """Every thread's own `_Thread`: an ordinary object, because compiled graphs cannot write to a local itself."""

    def __init__(self) -> None:
        self.mine = _Thread()


class Attachment:
    """Merging on one model; made by `attach`. Also a context manager that removes itself.

    Attributes
    ----------
    model : the model.
    plan : what happens to every picture; within ``using(keep=72)`` what that asks for.
    stats : this thread's last run, None before it or if the plain model ran.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.family = family = _family(model)
        self.geometry = geometry(model.config)
        self.settings = settings
        self._plan = make_plan(settings, self.geometry)
        self._threads = _Threads()
        self.projector: nn.Module = operator.attrgetter(family.projector)(model)
        self._tower: nn.Module = operator.attrgetter(family.tower)(model)
        self._language: nn.Module = operator.attrgetter(family.language)(model)
        self._own_generate = vars(model).get("generate")
        self._install()

    @classmethod
    def of(cls, model: nn.Module) -> Attachment | None:
        """The attachment that a model carries; a deep copy of a model carries its own."""
        return vars(model).get("_pitome")

    @property
    def state(self) -> _Thread:
        return self._threads.mine

    @property
    def active(self) -> Plan | None:
        """The plan in force on this thread; None = the plain model."""
        return self.state.plans[-1] if self.state.plans else self._plan

    @property
    def plan(self) -> Plan:
        return self.active or self._plan

    @property
    def stats(self) -> Stats | None:
        return self.state.stats

    def update(self, **settings: Any) -> None:
        """Change settings for all threads; the same keywords as `attach`. On an error nothing changes."""
        self._check_attached()
        changed = self.settings.changed(**settings)
        self._plan = make_plan(changed, self.geometry)
        self.settings = changed

    @contextmanager
    def using(self, *plain: None, **settings: Any) -> Iterator[Attachment]:
        """Other settings within a ``with`` block, for this thread only. ``using(None)`` is the plain model."""
        self._check_attached()
        if plain not in ((), (None,)) or bool(plain) == bool(settings):
            raise ValueError(f"got using{plain}; call using(None) for the plain model, or using(keep=72, ...)")
        plan = None if plain else make_plan(self.settings.changed(**settings), self.geometry)
        with self._pinned(plan):
            yield self

    @contextmanager
    def generating(self, call: Call) -> Iterator[None]:
        """Within generate(): prompts are short already, and the plan stays what it was at its start."""
        outer, self.state.generating = self.state.generating, call
        try:
            with self._pinned(self.active):
                yield
        finally:
            self.state.generating = outer

    def _check_attached(self) -> None:
        if Attachment.of(self.model) is not self:
            raise ValueError(f"this attachment was removed from {type(self.model).__name__}; attach again")

    @contextmanager
    def _pinned(self, plan: Plan | None) -> Iterator[None]:
        self.state.plans.append(plan)
        try:
            yield
        finally:
            self.state.plans.pop()

    def remove(self) -> None:
        """Restore the model exactly. A second call does nothing.

        A KV cache that a merged turn filled goes with merging: the plain model cannot continue it.
        """
        if Attachment.of(self.model) is not self:
            return
        if self._own_generate is None:
            del self.model.generate
        else:
            self.model.generate = self._own_generate
        for layer in _layers(self._tower):
            for projection in _projections(layer, layer._pitome[1]):
                _unhook(projection)
            _swap_class(layer, type(layer).__bases__[1])
            del layer._pitome
        for module in (self.model, self._tower, self._language):
            _unhook(module)
            del module._pitome

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({type(self.model).__name__}: {_describe(self._plan)})"

    def __getstate__(self) -> dict[str, Any]:
        """For deep copies: what threads are doing stays behind."""
        return {k: v for k, v in vars(self).items() if k != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _threads=_Threads())

    def _install(self) -> None:
        layers = _layers(self._tower)
        if len(layers) != self.geometry.blocks:
            raise ValueError(
                f"found {len(layers)} encoder layers of {', '.join(TOWERS)} in the vision tower, "
                f"expected {self.geometry.blocks}"
            )
        for index, layer in enumerate(layers):
            spec = _tower_spec(layer)
            layer._pitome = (index, spec)
            key, query = _projections(layer, spec)
            key.register_forward_hook(tower.catch_keys)
            query.register_forward_hook(tower.catch_query)
            _swap_class(layer, tower.merging_class(type(layer)))
        for module in (self.model, self._tower, self._language):
            module._pitome = self
        self._tower.register_forward_pre_hook(tower.start_run, with_kwargs=True)
        self._tower.register_forward_hook(tower.finish_run, with_kwargs=True)
        self.model.register_forward_pre_hook(prompt.before_forward, with_kwargs=True)
        self.model.register_forward_hook(prompt.after_forward, with_kwargs=True)
        self._language.register_forward_pre_hook(language.before_language, with_kwargs=True)
        self.model.generate = MethodType(_generate_like(self.model), self.model)


def attach(model: nn.Module, method: str | Reducer | None = None, **settings: Any) -> Attachment:
    """Merge the visual tokens of a model, in place, until the returned handle is removed.

    Important
    ---------
    model : a transformers model of a supported family, such as LlavaForConditionalGeneration.
    method : a name in `METHODS` or a `Reducer`; None = "pitome-tuned".
    keep : visual tokens per picture that reach the LLM; an int is a count, a float in (0, 1] a fraction.
    ratio : instead of keep: the share of its tokens that every block keeps (the paper's rho).
    counts : instead of keep: the patch tokens left after each merging block.

    If you want to tinker
    ---------------------
    These are the method's own choice unless given; `METHODS` says which.
    schedule : shape of the way down to keep over the blocks: "equal", "constant", "linear", "late", "early",
        "delayed", "last".
    where : "tower" (inside the blocks), "projector" (in front of it), or "both" (then ``tower_keep`` tokens leave the
        tower, by default the geometric mean of all and keep).
    metric : "keys" of the block's attention; "history", these and, halved from block to block, those of the blocks
        before; "hidden" states; or, in front of the projector, what it "projected".
    place : "mid" (between attention and MLP) or "end" of a block.
    weighted : mean weighted by the patches that tokens stand for.
    proportional_attention : add log(size) to the attention logits of merged tokens.
    order : "reading", or "source" as the reference code of a method leaves the tokens.
    positions : "compact", or "original": visual tokens keep the position id of their first patch in the LLM.
    llm_size_bias : add log(size) to the LLM's attention logits of visual tokens, which then weigh what they stand for.
    energies : keep the energy of every token in ``handle.stats``.
    Anything else is an option of the method, such as ``margin=0.45``.

    Raises
    ------
    ValueError : an unsupported model, one that carries an attachment already, or settings that cannot be reached.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"got {str(model)[:60]!r} ({type(model).__name__}), not a model; load one first, such as load('tiny'); "
            f"supported: {', '.join(FAMILIES)}"
        )
    carried = _carried(model)
    if carried is not None:
        raise ValueError(
            f"{type(model).__name__} already carries {_describe(carried._plan)}; "
            "call its handle.update(...) to change it, or handle.remove() first"
        )
    asked = Settings().changed(method=method, **settings)
    if asked.keep is None and asked.ratio is None and asked.counts is None:
        raise ValueError("nothing to merge was asked for; give keep=144, keep=0.25 or ratio=0.9")
    handle = Attachment(model, asked)
    logger.info("attached %s", handle)
    return handle


def _describe(plan: Plan) -> str:
    return f"{plan.method} (keep={plan.keep} of {plan.available}, {plan.where})"


def _family(model: nn.Module) -> FamilySpec:
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(f"unsupported model {type(model).__name__}; supported: {', '.join(FAMILIES)}")


def _carried(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or of another model that shares its vision tower."""
    return next((a for a in map(Attachment.of, model.modules()) if isinstance(a, Attachment)), None)


def _tower_spec(module: nn.Module) -> TowerSpec | None:
    """The row of an encoder layer, by the name of its class or of one it derives from; None for other modules."""
    return next((TOWERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in TOWERS), None)


def _layers(root: nn.Module) -> list[nn.Module]:
    """The encoder layers of a tower, found by type: their paths differ between versions."""
    return [module for module in root.modules() if _tower_spec(module)]


def _projections(layer: nn.Module, spec: TowerSpec) -> tuple[nn.Module, nn.Module]:
    """The key and the query projection of an encoder layer."""
    attention = getattr(layer, spec.attention)
    return getattr(attention, spec.key), getattr(attention, spec.query)


def _swap_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Give a layer another class, and rebind a forward that accelerate or an older library keeps on the instance."""
    old = type(layer).forward
    layer.__class__ = cls
    for name in ("forward", "_old_forward"):
        kept = vars(layer).get(name)
        if isinstance(kept, MethodType) and kept.__func__ is old:
            vars(layer)[name] = MethodType(cls.forward, layer)


def _unhook(module: nn.Module) -> None:
    """Remove our hooks; found by function, so that it works on deep copies too."""
    for table in _HOOK_TABLES:
        hooks = getattr(module, table)
        for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
            del hooks[key]
            getattr(module, f"{table}_with_kwargs").pop(key, None)


def _generate_like(model: nn.Module) -> Callable[..., Any]:
    """A generate() that looks like the model's own, which callers and transformers inspect."""

    @functools.wraps(type(model).generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = self._pitome._own_generate or MethodType(type(self).generate, self)
        return prompt.generate(self, plain, args, kwargs)

    return generate
