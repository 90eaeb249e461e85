"""A family without a row: find its parts by type, and send one picture through it to see whether tokens can merge.

Tokens can merge if a CLIP or SigLIP tower gives tokens to a projector that treats each one by itself, and if what comes
out is what the LLM gets. All of that is checked, not guessed from names.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import UserError
from . import FAMILIES, IN_TOWER, TOWER_OF_CONFIG, TOWERS, FamilySpec, Geometry, llm_obstacle

logger = logging.getLogger(__name__)


def probe(model: nn.Module) -> tuple[FamilySpec, Geometry]:
    """The row that an unknown model would have, and its geometry.

    Raises
    ------
    ValueError : something is not there, or not as merging needs it; says what was looked for.
    """
    if not hasattr(model, "generate"):
        raise UserError(f"{_looked(model)} a generate(): there is none; give the whole model, not a part of it")
    tower_name, tower = _tower(model)
    core_name, core = _core(model)
    language_name, language = _language(model)
    if getattr(model.config, "image_token_id", None) is None:
        raise UserError(f"{_looked(model)} an image_token_id in its configuration: there is none")
    pixels = _picture(tower)
    with torch.no_grad():
        read, outputs = _run(core, (tower, language), pixels)
        states = tower(pixels, output_hidden_states=True)
    found = [(name, *_source(x, states, tower)) for name, x in read.items() if _source(x, states, tower)]
    if not found:
        raise UserError(
            f"{_looked(model)} a projector that reads the hidden states of {tower_name}: none of "
            f"{', '.join(read) or 'its parts'} does"
        )
    name, layers, hidden, places = found[0]
    _check_per_token(model, core.get_submodule(name), read[name], outputs)
    vision = tower.config
    side, blocks = vision.image_size // vision.patch_size, vision.num_hidden_layers
    class_tokens = TOWERS[TOWER_OF_CONFIG[vision.model_type]].class_tokens
    prefix = f"{core_name}." if core_name else ""
    family = FamilySpec(
        model.config.model_type,
        tower=tower_name,
        projector=prefix + name,
        language=language_name,
        core=core_name,
        last=not layers,
        places=places,
        obstacle="found by probing, it is not known which output of the tower its projector reads",
    )
    geometry = Geometry(
        grid=(side, side),
        class_tokens=class_tokens,
        visible_class_tokens=class_tokens - hidden,
        merging_blocks=max(layers, default=blocks),
        blocks=blocks,
        llm_obstacle=llm_obstacle(model.config.get_text_config()),
        layers=layers,
        places=places,
        obstacle=family.obstacle,
    )
    logger.warning(
        "%s is no family that is known here; found by probing: vision tower %s, projector %s, LLM %s; compare answers "
        "at keep=1.0 with those of the plain model before you rely on it",
        type(model).__name__,
        family.tower,
        family.projector,
        family.language,
    )
    return family, geometry


def _looked(model: nn.Module) -> str:
    known = ", ".join(FAMILIES)
    return f"unsupported model {type(model).__name__}; supported: {known}. In any other is looked for"


def _tower(model: nn.Module) -> tuple[str, nn.Module]:
    """The one vision tower of a known kind."""
    kinds = {name: getattr(getattr(m, "config", None), "model_type", None) for name, m in model.named_modules() if name}
    towers = [name for name, kind in kinds.items() if kind in TOWER_OF_CONFIG]
    outermost = [name for name in towers if not any(name.startswith(f"{other}.") for other in towers)]
    if len(outermost) != 1:
        got = "there is none" if not outermost else f"there are several: {', '.join(outermost)}"
        raise UserError(f"{_looked(model)} one vision tower of the kinds {', '.join(TOWER_OF_CONFIG)}: {got}")
    return outermost[0], model.get_submodule(outermost[0])


def _core(model: nn.Module) -> tuple[str, nn.Module]:
    """The part that encodes pictures and needs nothing but pixels for it."""
    for name in ("model", ""):
        core = getattr(model, name, None) if name else model
        function = getattr(core, "get_image_features", None)
        if function is None:
            continue
        needed = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "pixel_values"
        ]
        if needed:
            raise UserError(f"{_looked(model)} a get_image_features() of pixels alone: it needs {', '.join(needed)}")
        return name, core
    raise UserError(f"{_looked(model)} a get_image_features() on it or on its .model: there is none")


def _language(model: nn.Module) -> tuple[str, nn.Module]:
    for name in ("model.language_model", "model.text_model", "language_model"):
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    raise UserError(f"{_looked(model)} an LLM at .model.language_model, .model.text_model or .language_model")


def _picture(tower: nn.Module) -> Tensor:
    """Noise of the size that the tower takes."""
    weight, vision = next(tower.parameters()), tower.config
    noise = torch.randn(
        1, vision.num_channels, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0)
    )
    floating = weight.dtype if weight.is_floating_point() else tower.dtype
    return noise.to(weight.device, floating)


def _run(core: nn.Module, others: tuple[nn.Module, ...], pixels: Tensor) -> tuple[dict[str, Tensor], Any]:
    """What each part of ``core`` besides ``others`` reads when it encodes a picture, and what comes out."""
    read: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                read[name] = args[0]

        return note

    parts = [(name, part) for name, part in core.named_children() if part not in others]
    hooks = [part.register_forward_pre_hook(reader(name)) for name, part in parts]
    try:
        output = core.get_image_features(pixels, return_dict=True).pooler_output
    finally:
        for hook in hooks:
            hook.remove()
    return read, output


def _source(x: Tensor, states: Any, tower: nn.Module) -> tuple[tuple[int, ...], int, tuple[str, ...]] | None:
    """Which output of the tower ``x`` is: feature layers, class tokens left out, and places where tokens can merge."""
    class_tokens = TOWERS[TOWER_OF_CONFIG[tower.config.model_type]].class_tokens
    for hidden in sorted({0, class_tokens}):
        same = [
            layer
            for layer, state in enumerate(states.hidden_states)
            if state[:, hidden:].shape == x.shape and torch.equal(state[:, hidden:], x)
        ]
        last = states.last_hidden_state[:, hidden:]
        normed = last.shape == x.shape and torch.equal(last, x)
        if same or normed:
            return tuple(same[:1]), hidden, ("tower",) if same and normed else IN_TOWER
    return None


def _check_per_token(model: nn.Module, projector: nn.Module, x: Tensor, output: Any) -> None:
    """ValueError unless the projector treats every token by itself, and gives what the LLM gets."""
    with torch.no_grad():
        whole, reversed_ = projector(x), projector(x.flip(1))
    said = f"{_looked(model)} a projector that treats every token by itself"
    if not isinstance(whole, Tensor) or whole.shape[:2] != x.shape[:2]:
        shape = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        raise UserError(f"{said}: {type(projector).__name__} makes {shape} of {tuple(x.shape)}, it joins patches")
    if not torch.allclose(whole.flip(1), reversed_, atol=1e-3, rtol=1e-3):
        raise UserError(f"{said}: {type(projector).__name__} mixes them")
    features = torch.cat(tuple(output)).reshape(-1, whole.shape[-1])
    if features.shape[0] != x.shape[1] or not torch.allclose(features, whole[0], atol=1e-3, rtol=1e-3):
        raise UserError(f"{said}, and nothing behind it: the LLM gets something else than what it makes")
