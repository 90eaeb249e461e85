"""Token counts of one image on its way through tower and projector, from a model or a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..methods import UserError
from . import ANYWHERE, FAMILIES, FAMILY_OF_CONFIG, IN_TOWER, LLAVA_PACKAGE, TOWER_OF_CONFIG, TOWERS, FamilySpec
from .encoders import ENCODER_OF_CONFIG, ENCODERS, LAYER_OF_CONFIG, REFUSED
from .packed import read_out_of, usual_picture

# Attention implementations that accept an additive (B, 1, N, N) bias, as proportional attention needs it, and that
# read no borders of packed sequences out of the position ids.
PLAIN_BACKENDS = ("sdpa", "eager")
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers of an LLM that can be told anything
RECURRENT = "linear_attention"  # and one whose layers only ask for the padding
LLAVA_MPT = "LlavaMptForCausalLM"  # its own forward() fails on any image


@dataclass(frozen=True)
class Geometry:
    """Token counts of one image, or of one tile where images are cut into tiles.

    Attributes
    ----------
    grid : tuple of int
        Rows and columns of patches inside the tower.
    class_tokens : int
        Tokens before the patches that never merge: class and distillation tokens, and registers.
    visible_class_tokens : int
        Class tokens that reach the LLM (feature selection "full").
    merging_blocks : int
        Blocks whose output, or an ancestor of it, feeds the projector; merging happens only there.
    blocks : int
        All blocks of the tower; those after ``merging_blocks`` run without effect on the LLM.
    family : FamilySpec
        The row of the model.
    llm_unsupported_reason : str
        Why the LLM takes no calibration, and what to change; empty if it takes one.
    llm_rotary : bool
        The LLM has a rotary embedding, or one for each kind of its layers, of which distances can be told.
    layers : tuple of int
        The hidden states that the projector reads, side by side: the number of blocks before each; empty if it reads
        the tower's normed output.
    shuffle_factor : int
        Rows and columns of patches that the projector joins into one token.
    """

    grid: tuple[int, int]
    class_tokens: int
    visible_class_tokens: int
    merging_blocks: int
    blocks: int
    family: FamilySpec = FamilySpec("")
    llm_unsupported_reason: str = ""
    llm_rotary: bool = True
    layers: tuple[int, ...] = ()
    shuffle_factor: int = 1

    @property
    def patches(self) -> int:
        """Patch tokens inside the tower, class tokens not counted."""
        return self.grid[0] * self.grid[1]

    @property
    def available(self) -> int:
        """Visual tokens that reach the LLM when nothing merges."""
        return self.patches // self.shuffle_factor**2 + self.visible_class_tokens


def geometry(model_or_config: Any) -> Geometry:
    """Token counts of a multimodal model or of a vision encoder, or of a configuration of one.

    Parameters
    ----------
    model_or_config : nn.Module or PretrainedConfig
        A model of the original llava package needs its vision tower loaded.

    Returns
    -------
    Geometry

    Raises
    ------
    ValueError
        The family or the vision tower has no row here, or a class token is where only patches can be.
    """
    config, encoder = model_or_config, None
    if isinstance(model_or_config, nn.Module):
        names = [cls.__name__ for cls in type(model_or_config).__mro__]
        if {*names} & {*LLAVA_PACKAGE, LLAVA_MPT}:
            return _of_llava_package(model_or_config)
        for name in (name for name in names if name in REFUSED):
            raise UserError(f"unsupported model {names[0]}: {REFUSED[name]}")
        encoder = next((ENCODERS[name] for name in names if name in ENCODERS), None)
        if not encoder and not {*names} & {*FAMILIES}:
            family = read_out_of(model_or_config)
            if family is None:
                raise UserError(_unsupported("model", names[0], (*FAMILIES, *ENCODERS)))
            return _of_features(model_or_config.config, family)
        config = model_or_config.config
    encoder = encoder or ENCODER_OF_CONFIG.get(config.model_type)
    if encoder:
        return _of_encoder(getattr(config, "vision_config", config), encoder)
    family, vision = family_of(config), config.vision_config
    if family.tiles == "features":
        return _of_features(config, family)
    tower = _tower(vision, family)
    full = (family.select or config.vision_feature_select_strategy) == "full"
    if not full and not tower["class_tokens"]:
        raise UserError(
            f"vision_feature_select_strategy='default' drops the first token, which is a patch in "
            f"{vision.model_type!r}, a tower without class token; set it to 'full'"
        )
    if full and tower["class_tokens"] and family.tiles:
        raise UserError(
            "vision_feature_select_strategy='full' leaves class tokens among the patches of tiles, which then form no "
            "grid; set it to 'default'"
        )
    layers = () if family.last else feature_layers(config)
    return Geometry(
        **tower,
        visible_class_tokens=tower["class_tokens"] if full else 0,
        merging_blocks=max(layers, default=vision.num_hidden_layers),
        llm_unsupported_reason=llm_unsupported_reason(config.text_config),
        llm_rotary=_is_rotary(config.text_config),
        layers=layers,
    )


def _of_features(config: Any, family: FamilySpec) -> Geometry:
    """The geometry of a model that puts pictures among the text itself, for a picture of the usual size."""
    usual = usual_picture(config, family)
    return Geometry(
        **usual,
        visible_class_tokens=0,
        merging_blocks=usual["blocks"],
        family=family,
        llm_unsupported_reason=llm_unsupported_reason(config.text_config),
        llm_rotary=_is_rotary(config.text_config),
    )


def _of_encoder(vision: Any, family: FamilySpec) -> Geometry:
    """The geometry of an encoder alone: all blocks of its tower merge."""
    if getattr(vision, "mask_ratio", 0):
        raise UserError(
            f"mask_ratio={vision.mask_ratio} hides patches at random; load with mask_ratio=0.0, as for features"
        )
    tower = _tower(vision, family)
    reason = "an encoder alone has no LLM that could be told"
    return Geometry(
        **tower, visible_class_tokens=0, merging_blocks=tower["blocks"], llm_unsupported_reason=reason, llm_rotary=False
    )


def _of_llava_package(model: Any) -> Geometry:
    """The geometry of a model of the original package, which only its loaded vision tower tells."""
    if any(cls.__name__ == LLAVA_MPT for cls in type(model).__mro__):
        raise UserError(
            f"unsupported model {LLAVA_MPT}: its own forward() fails on pictures in llava-torch 1.2.2; supported "
            f"there: {', '.join(LLAVA_PACKAGE)}"
        )
    loaded = model.get_vision_tower()
    if not getattr(loaded, "is_loaded", False):
        raise UserError("the vision tower is not loaded yet; call model.get_vision_tower().load_model() first")
    full = loaded.select_feature == "cls_patch"
    tiled = getattr(model.config, "mm_patch_merge_type", "flat") != "flat"
    if full and tiled:
        raise UserError(
            "mm_vision_select_feature='cls_patch' leaves class tokens among the patches of tiles, which then form no "
            "grid; set it to 'patch'"
        )
    family = FamilySpec(
        model.config.model_type,
        tower="model.vision_tower.vision_tower",
        projector="model.mm_projector",
        language="model",
        original=True,
        tiles="anyres" if tiled else "",
        places=ANYWHERE if tiled else IN_TOWER,
        linear=sum(isinstance(module, nn.Linear) for module in model.get_model().mm_projector.modules()),
    )
    layer = loaded.select_layer % (loaded.config.num_hidden_layers + 1)
    return Geometry(
        **_tower(loaded.config, family),
        visible_class_tokens=int(full),
        merging_blocks=layer,
        llm_unsupported_reason="the original llava package writes pictures into the prompt itself; load the checkpoint "
        "in transformers' layout (llava-hf)",
        layers=(layer,),
    )


def _tower(vision: Any, family: FamilySpec) -> dict[str, Any]:
    """What `Geometry` takes of a vision tower's configuration.

    Raises
    ------
    ValueError
        Tokens are to merge in a tower of a kind that has no row, or it does not say how many patches it has.
    """
    kind = getattr(vision, "model_type", None) or type(vision).__name__
    rows = {**TOWER_OF_CONFIG, **LAYER_OF_CONFIG} if family.encoder else TOWER_OF_CONFIG
    blocks = getattr(vision, "num_hidden_layers", None)
    sides: list[Any] = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    sides = [(side, side) if isinstance(side, int) else side for side in sides]
    counted = isinstance(blocks, int) and all(isinstance(side, (list, tuple)) and len(side) == 2 for side in sides)
    if kind not in rows and ("tower" in family.places or not counted):
        raise UserError(f"unsupported vision tower {kind!r}; supported: {', '.join(sorted(rows))}")
    grid = tuple(side // patch for side, patch in zip(*sides))
    class_tokens = TOWERS[rows[kind]].class_tokens if kind in rows else 0
    class_tokens += getattr(vision, "num_register_tokens", 0)
    return {"grid": grid, "class_tokens": class_tokens, "blocks": blocks, "family": family}


def family_of(config: Any) -> FamilySpec:
    """The row of a configuration's family; with a vision tower of a kind that has none, tokens merge behind it.

    Raises
    ------
    ValueError
        There is none, or the model has no vision tower.
    """
    if config.model_type not in FAMILY_OF_CONFIG:
        raise UserError(_unsupported("family", repr(config.model_type), FAMILY_OF_CONFIG))
    if config.vision_config is None:
        raise UserError(f"this {config.model_type!r} has no vision tower, hence no visual tokens to merge")
    family, kind = FAMILIES[FAMILY_OF_CONFIG[config.model_type]], config.vision_config.model_type
    if not family.merges_in_tower or kind in TOWER_OF_CONFIG:
        return family
    reason = f"its vision tower {kind!r} has no row in pitome_mllm.families"
    side = usual_picture(config, family)["grid"][0]  # as for all we know its pictures keep their size
    return replace(family, tiles="features", places=("packed",), unsupported_reason=reason, linear=0, side=side)


def _unsupported(what: str, got: str, supported: Iterable[str]) -> str:
    return (
        f"unsupported {what} {got}; supported: {', '.join(supported)}; a new one is a row in pitome_mllm.families "
        "that names its tower, its projector and its LLM (see CONTRIBUTING.md)"
    )


def llm_unsupported_reason(text: Any) -> str:
    """Why an LLM takes no attention mask of our own, and what to change; empty if it takes one."""
    backend = text._attn_implementation
    if backend not in (None, *PLAIN_BACKENDS):  # None: a configuration alone, which runs nothing
        return f"the LLM's attention is {backend!r}; load with attn_implementation='sdpa' or 'eager'"
    other = sorted({*layer_kinds(text)} - {FULL, SLIDING, RECURRENT})
    return f"the LLM has {' and '.join(other)}; use a checkpoint with full or sliding attention" if other else ""


def layer_kinds(text: Any) -> list[str]:
    """The kind of attention of every layer of an LLM; one for all where its configuration lists none."""
    kinds = getattr(text, "layer_types", None)
    return list(kinds or [FULL if getattr(text, "sliding_window", None) is None else SLIDING])


def _is_rotary(text: Any) -> bool:
    """Whether an LLM has a rotary embedding, or one for each kind of its layers."""
    rope = getattr(text, "rope_parameters", None) or {"": None}
    return "rope_type" in rope or all(isinstance(one, dict) and "rope_type" in one for one in rope.values())


def feature_layers(config: Any) -> tuple[int, ...]:
    """Indices into the tower's hidden states that the projector reads; each equals the number of blocks before it."""
    several = getattr(config, "vision_feature_layers", None)  # VipLLaVA's name before transformers 5.18
    layers = config.vision_feature_layer if several is None else several
    states = config.vision_config.num_hidden_layers + 1
    layers = [layers] if isinstance(layers, int) else layers
    return tuple(layer if layer >= 0 else states + layer for layer in layers)
