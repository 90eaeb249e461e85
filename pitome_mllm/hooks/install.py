"""What an attachment puts on a model: hooks, a class for the encoder layers, a few methods. And how it comes off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from ..families import TOWERS, TowerSpec
from ..methods import UserError
from ..plan import Plan
from . import encoders, encoding, graphs, llava_package, llm, prefill, prompt, tiles, tower
from .classes import Hook, author_of_forward, plain_class
from .generate import generate as generate_short
from .lock import drawing
from .state import Attached

TOWER, LLM = "tower.forward", "language.forward"  # among what an attachment replaced
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")  # of a module


def install(handle: Attached) -> None:
    """Put everything on the model, or nothing."""
    check(handle, handle.plan)
    try:
        _put_on(handle)
    except BaseException:
        uninstall(handle)
        raise


def check(handle: Attached, plan: Plan) -> None:
    """ValueError if the tower of this model cannot merge as ``plan`` says."""
    if not handle.family.merges_in_tower:
        return
    layers = _layers(handle.tower)
    if len(layers) != handle.geometry.blocks:
        raise UserError(
            f"found {len(layers)} encoder layers of {', '.join(TOWERS)} in the vision tower, "
            f"expected {handle.geometry.blocks}"
        )
    for layer in layers:
        spec = _tower_spec(layer)
        if not hasattr(getattr(layer, spec.attention), spec.key):
            raise UserError(
                f"{type(layer).__name__} has no {spec.attention}.{spec.key} in this release of transformers; 5.18 and "
                "newer ones have it"
            )
        _check_forward(layer, plan)


def _put_on(handle: Attached) -> None:
    if handle.family.merges_in_tower:
        _hook_tower(handle)
    if handle.family.encoder:
        for module, hook in encoders.parts(handle).items():
            module.register_forward_pre_hook(Hook(hook), with_kwargs=True)
    elif not handle.family.original:
        for module in dict.fromkeys((handle.model, handle.core)):
            module.register_forward_pre_hook(Hook(prompt.before_forward), with_kwargs=True)
            module.register_forward_hook(Hook(prompt.after_forward), with_kwargs=True)
        handle.language.register_forward_pre_hook(Hook(llm.before_language), with_kwargs=True)
    for module in _attached_modules(handle):
        module._pitome = handle
    for owner, name, make in _methods(handle):
        made = MethodType(make(owner), owner)
        handle.replaced[name] = vars(owner).get(name)
        setattr(owner, name, made)
    if handle.family.merges_in_tower and not handle.family.original:
        graphs.install(handle, handle.tower, TOWER, graphs.run_tower)
    if not handle.family.original and not handle.family.encoder:
        graphs.install(handle, handle.language, LLM, prefill.run_prefill)


def uninstall(handle: Attached) -> None:
    """Take everything off again, as far as it is there."""
    for module, name, made in ((handle.tower, TOWER, handle.graphs), (handle.language, LLM, handle.prefills)):
        graphs.uninstall(module, handle.replaced.get(name))
        made.clear()
    for owner, name, _ in _methods(handle):
        if handle.replaced.get(name) is not None:
            setattr(owner, name, handle.replaced[name])
        elif name in handle.replaced:
            delattr(owner, name)
    handle.replaced.clear()
    for layer in _layers(handle.tower):
        if "_pitome" in vars(layer):
            for part in layer.modules():  # adapters may have come around what we hooked
                _unhook(part)
            _swap_class(layer, plain_class(type(layer)))
    for module in _attached_modules(handle):
        _unhook(module)


def _attached_modules(handle: Attached) -> list[nn.Module]:
    """The modules that know their attachment."""
    if handle.family.original:
        return [handle.model, handle.tower]
    if handle.family.encoder:
        return list(dict.fromkeys((handle.model, handle.tower, *encoders.parts(handle))))
    return list(dict.fromkeys((handle.model, handle.core, handle.tower, handle.language)))


def _methods(handle: Attached) -> list[tuple[nn.Module, str, Callable]]:
    """Methods that instances get in place of their class's: whose, which, and what makes them."""
    if handle.family.encoder:
        return []
    if handle.family.original:
        methods = [(handle.tower, "forward", llava_package.make_tower_forward)]
        if handle.family.tiles:
            methods.append((handle.model, llava_package.PREPARE, llava_package.make_prepare))
        return methods
    methods = [
        (handle.model, "generate", make_generate),
        *(
            (handle.core, f"get_{kind}_features", partial(encoding.make_get_features, kind=kind))
            for kind in handle.kinds
        ),
    ]
    if handle.family.tiles == "anyres":
        methods.append((handle.core, "pack_image_features", tiles.make_pack_image_features))
    for name in handle.family.plain:
        methods.append((handle.core, name, partial(encoding.make_plain, name=name)))
    return methods


def _hook_tower(handle: Attached) -> None:
    kind = llava_package if handle.family.original else tower
    for index, layer in enumerate(_layers(handle.tower)):
        block = layer._pitome = tower.Block(index, _tower_spec(layer), tower.Inbox())
        for projection in _projections(layer, block.spec):
            projection._pitome = block.inbox
        _swap_class(layer, kind.merging_class(type(layer)))
    listen(handle, handle.plan)
    if not handle.family.original:
        handle.tower.register_forward_pre_hook(Hook(tower.start_run), with_kwargs=True)
        handle.tower.register_forward_hook(Hook(tower.finish_run), with_kwargs=True)


def listen(handle: Attached, plan: Plan) -> None:
    """Have the projections that were there at attach tell what ``plan`` asks for; a hook takes time in every call."""
    wanted = tower.CATCHING[: 1 + ("attention" in plan.match_inputs)] if plan.match_inputs else ()
    for layer in _layers(handle.tower) if wanted and handle.family.merges_in_tower else ():
        for projection, catch in zip(_projections(layer, layer._pitome.spec), wanted):
            if "_pitome" in vars(projection) and catch not in projection._forward_hooks.values():
                projection.register_forward_hook(catch)


def _check_forward(layer: nn.Module, plan: Plan) -> None:
    """ValueError if a layer has a forward that merging would go around, or that would go around merging."""
    kept = vars(layer).get("_old_forward", vars(layer).get("forward"))  # accelerate keeps what it calls
    if kept is not None and getattr(kept, "__func__", None) is not type(layer).forward:
        raise UserError(
            f"an encoder layer of the vision tower has its forward replaced by {kept!r:.80}, which would go around "
            "merging; restore it, or derive a class of the layer's own with that forward and set it as its __class__"
        )
    own = author_of_forward(plain_class(type(layer)))
    if plan.place == "mid" and plan.merging and own.__name__ not in TOWERS:
        raise UserError(
            f"encoder layers of the vision tower have a forward of their own ({own.__name__}), which merging between "
            "attention and MLP would leave out; give place='end', and it is called as a whole"
        )


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
    """Remove our hooks, found by what they are so that it works on deep copies too, and our mark."""
    for table in _HOOK_TABLES:
        hooks = getattr(module, table)
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) or hook in tower.CATCHING]:
            del hooks[key]
            getattr(module, f"{table}_with_kwargs", {}).pop(key, None)
    vars(module).pop("_pitome", None)


def make_generate(model: nn.Module) -> Callable[..., Any]:
    """A generate() that looks like the model's own, which callers and transformers inspect."""

    @functools.wraps(type(model).generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = self._pitome.replaced["generate"] or MethodType(type(self).generate, self)
        with drawing(self, kwargs):
            return generate_short(self, plain, args, kwargs)

    return generate
