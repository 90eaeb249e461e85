"""What an attachment puts on a model: hooks, a class for the encoder layers, a few methods. And how it comes off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..families import TOWERS, TowerSpec
from . import graphs, llava_package, llm, prompt, tiles, tower

if TYPE_CHECKING:
    from ..attach import Attachment

# Every hook we register: the table of the module it lives in, and the function.
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_HOOKS = (
    tower.start_run,
    tower.finish_run,
    tower.catch_keys,
    tower.catch_query,
    prompt.before_forward,
    prompt.after_forward,
    llm.before_language,
    tiles.after_projector,
    llava_package.start_run,
    llava_package.finish_run,
)


def install(handle: Attachment) -> None:
    """Put everything on the model; ValueError, with nothing done, if its tower is not what family and plan say."""
    graphs.check(handle.tower, handle.plan)
    if handle.geometry.merges_in_tower:
        _hook_tower(handle)
    if not handle.family.original:
        handle.model.register_forward_pre_hook(prompt.before_forward, with_kwargs=True)
        handle.model.register_forward_hook(prompt.after_forward, with_kwargs=True)
        handle.language.register_forward_pre_hook(llm.before_language, with_kwargs=True)
    if handle.family.tiles == "connector":
        handle.projector.register_forward_hook(tiles.after_projector)
    for module in _marked(handle):
        module._pitome = handle
    handle.replaced = {name: vars(owner).get(name) for owner, name, _ in _methods(handle)}
    for owner, name, make in _methods(handle):
        setattr(owner, name, MethodType(make(owner), owner))
    graphs.prepare(handle.tower, handle.plan)


def uninstall(handle: Attachment) -> None:
    """Take everything off again."""
    graphs.uninstall(handle.tower)
    for owner, name, _ in _methods(handle):
        if handle.replaced[name] is None:
            delattr(owner, name)
        else:
            setattr(owner, name, handle.replaced[name])
    for layer in _layers(handle.tower):
        if "_pitome" in vars(layer):
            for part in layer.modules():  # adapters may have come around what we hooked
                _unhook(part)
            _swap_class(layer, type(layer).__bases__[-1])
            del layer._pitome
    for module in _marked(handle):
        _unhook(module)
        del module._pitome


def _marked(handle: Attachment) -> list[nn.Module]:
    """The modules that know their attachment."""
    if handle.family.original:
        return [handle.model, handle.tower]
    modules = [handle.model, handle.tower, handle.language]
    modules += [handle.core] if handle.family.tiles == "anyres" else []
    modules += [handle.projector] if handle.family.tiles == "connector" else []
    return modules


def _methods(handle: Attachment) -> list[tuple[nn.Module, str, Callable]]:
    """Methods that instances get in place of their class's: whose, which, and what makes them."""
    if handle.family.original:
        return [(handle.model, llava_package.PREPARE, llava_package.preparing_like)] if handle.geometry.tiled else []
    methods = [(handle.model, "generate", generate_like)]
    if handle.family.tiles == "anyres":
        methods.append((handle.core, "pack_image_features", tiles.packing_like))
        methods.append((handle.core, "get_image_features", tiles.encoding_like))
    for name in handle.family.plain:
        methods.append((handle.core, name, functools.partial(tiles.plain_like, name=name)))
    return methods


def _hook_tower(handle: Attachment) -> None:
    layers, kind = _layers(handle.tower), llava_package if handle.family.original else tower
    if len(layers) != handle.geometry.blocks:
        raise ValueError(
            f"found {len(layers)} encoder layers of {', '.join(TOWERS)} in the vision tower, "
            f"expected {handle.geometry.blocks}"
        )
    for index, layer in enumerate(layers):
        spec = _tower_spec(layer)
        layer._pitome = (index, spec)
        key, query = _projections(layer, spec)
        key.register_forward_hook(tower.catch_keys)
        query.register_forward_hook(tower.catch_query)
        _swap_class(layer, kind.merging_class(type(layer)))
    handle.tower.register_forward_pre_hook(kind.start_run, with_kwargs=True)
    handle.tower.register_forward_hook(kind.finish_run, with_kwargs=True)


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


def generate_like(model: nn.Module) -> Callable[..., Any]:
    """A generate() that looks like the model's own, which callers and transformers inspect."""

    @functools.wraps(type(model).generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = self._pitome.replaced["generate"] or MethodType(type(self).generate, self)
        return prompt.generate(self, plain, args, kwargs)

    return generate
