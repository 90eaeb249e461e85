"""Where a vision tower keeps its parts and how a family hands features to its LLM: data, no behaviour.

Read from transformers 5.6 .. 5.23. A new tower or family is one row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..methods import UserError

IN_TOWER = ("tower", "projector", "both")  # where tokens merge if nothing behind the projector needs a whole grid


@dataclass(frozen=True)
class TowerSpec:
    """The attribute names of one kind of encoder layer, and its class tokens."""

    norm1: str = "layer_norm1"
    attention: str = "self_attn"
    norm2: str = "layer_norm2"
    mlp: str = "mlp"
    query: str = "q_proj"  # on the attention module
    key: str = "k_proj"
    class_tokens: int = 1


@dataclass(frozen=True)
class FamilySpec:
    """Where a multimodal model keeps its parts (dotted paths from the model), and what its projector reads.

    Attributes
    ----------
    config : ``model_type`` of its configuration.
    select : "full", or "default" (without the first token), where the configuration does not say which.
    last : the projector reads the tower's normed output, not the hidden states of a feature layer.
    linear : linear layers of the projector.
    first_position : position id of the first token in the LLM.
    core : the part that encodes pictures.
    tiles : how pictures of several tiles are packed: "" = they have one; "anyres" = by the core's
        ``pack_image_features``; "connector" = tile by tile, by a projector that joins neighbouring patches.
    places : where tokens can merge; the first one unless a method says something else.
    obstacle : why not elsewhere.
    plain : methods of the core that never merge.
    videos : why videos do not merge; empty if the family takes none.
    pixels : what the model calls pictures.
    original : a model of the original llava package, which writes pictures into the prompt itself (`original`).
    """

    config: str
    tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    language: str = "model.language_model"
    select: str | None = None
    last: bool = False
    linear: int = 2
    first_position: int = 0
    core: str = "model"
    tiles: str = ""
    places: tuple[str, ...] = IN_TOWER
    obstacle: str = "pictures are not cut into tiles"
    plain: tuple[str, ...] = ()
    videos: str = ""
    pixels: str = "pixel_values"
    original: bool = False


ANYWHERE = (*IN_TOWER, "packed")
POOLED = "every frame's whole grid of patches is pooled behind the projector"


def _shuffled(config: str) -> FamilySpec:
    """A family whose projector joins squares of patches into one token (pixel shuffle)."""
    return FamilySpec(
        config,
        tower="model.vision_model",
        projector="model.connector",
        language="model.text_model",
        select="full",
        last=True,
        linear=1,
        tiles="connector",
        places=("packed",),
        obstacle="the projector joins neighbouring patches of the whole grid",
    )


TOWERS: dict[str, TowerSpec] = {  # key: class name of the encoder layer
    "CLIPEncoderLayer": TowerSpec(),
    "SiglipEncoderLayer": TowerSpec(class_tokens=0),
}
TOWER_OF_CONFIG = {"clip_vision_model": "CLIPEncoderLayer", "siglip_vision_model": "SiglipEncoderLayer"}

FAMILIES: dict[str, FamilySpec] = {  # key: class name of the model
    "LlavaForConditionalGeneration": FamilySpec("llava"),
    "VipLlavaForConditionalGeneration": FamilySpec("vipllava", select="default"),
    "PaliGemmaForConditionalGeneration": FamilySpec("paligemma", select="full", last=True, linear=1, first_position=1),
    "LlavaNextForConditionalGeneration": FamilySpec("llava_next", tiles="anyres", places=ANYWHERE),
    "LlavaNextVideoForConditionalGeneration": FamilySpec(
        "llava_next_video", tiles="anyres", places=ANYWHERE, plain=("get_video_features",), videos=POOLED
    ),
    "LlavaOnevisionForConditionalGeneration": FamilySpec(
        "llava_onevision",
        tiles="anyres",
        places=("packed",),
        obstacle="large pictures are scaled down on the whole grid",
        videos=POOLED,
    ),
    "VideoLlavaForConditionalGeneration": FamilySpec(
        "video_llava",
        tower="model.image_tower",
        videos="they have a tower of their own, and one tower merges",
        pixels="pixel_values_images",
    ),
    "Idefics3ForConditionalGeneration": _shuffled("idefics3"),
    "SmolVLMForConditionalGeneration": _shuffled("smolvlm"),
}
FAMILY_OF_CONFIG = {spec.config: name for name, spec in FAMILIES.items()}

# Attention implementations that accept an additive (B, 1, N, N) bias, as proportional attention needs it, and that
# read no borders of packed sequences out of the position ids.
PLAIN_BACKENDS = ("sdpa", "eager")


@dataclass(frozen=True)
class Geometry:
    """Token counts of one picture on its way through tower and projector.

    Attributes
    ----------
    patches : patch tokens of one picture inside the tower, class tokens not counted.
    grid : rows and columns of those patches.
    class_tokens : tokens in front of the patches that never merge.
    visible_class_tokens : class tokens that reach the LLM (feature selection "full").
    merging_blocks : blocks whose output, or an ancestor of it, feeds the projector; merging happens only there.
    blocks : all blocks of the tower; those after ``merging_blocks`` run without effect on the LLM.
    llm_obstacle : why the LLM takes neither gaps between positions nor a bias of sizes; empty if it takes both.
    layers : the hidden states that the projector reads, side by side: the number of blocks before each; empty if it
        reads the tower's normed output.
    linear : linear layers of the projector.
    places : where tokens can merge, the first one by default.
    obstacle : why not elsewhere.
    tiled : pictures are cut into tiles; the counts are those of one tile.
    joined : rows and columns of patches that the projector joins into one token.
    original : a model of the original llava package.
    """

    grid: tuple[int, int]
    class_tokens: int
    visible_class_tokens: int
    merging_blocks: int
    blocks: int
    llm_obstacle: str = ""
    layers: tuple[int, ...] = ()
    linear: int = 2
    places: tuple[str, ...] = IN_TOWER
    obstacle: str = ""
    tiled: bool = False
    joined: int = 1
    original: bool = False

    @property
    def merges_in_tower(self) -> bool:
        return "tower" in self.places

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def available(self) -> int:
        """Visual tokens per picture that reach the LLM when nothing merges."""
        return self.patches // self.joined**2 + self.visible_class_tokens


def geometry(config: Any) -> Geometry:
    """Token counts of a LLaVA-like configuration.

    Raises
    ------
    ValueError : the configuration is of a family, or holds a vision tower, that has no row here.
    """
    family, vision = family_of(config), config.vision_config
    class_tokens = _class_tokens(vision, family)
    side = vision.image_size // vision.patch_size
    full = (family.select or config.vision_feature_select_strategy) == "full"
    if not full and not class_tokens:
        raise UserError(
            f"vision_feature_select_strategy='default' drops the first token, which is a patch in "
            f"{vision.model_type!r}, a tower without class token; set it to 'full'"
        )
    if full and class_tokens and family.tiles:
        raise UserError(
            "vision_feature_select_strategy='full' leaves class tokens among the patches of tiles, which then form no "
            "grid; set it to 'default'"
        )
    layers = () if family.last else feature_layers(config)
    return Geometry(
        grid=(side, side),
        class_tokens=class_tokens,
        visible_class_tokens=class_tokens if full else 0,
        merging_blocks=max(layers, default=vision.num_hidden_layers),
        blocks=vision.num_hidden_layers,
        llm_obstacle=llm_obstacle(config.text_config),
        layers=layers,
        linear=family.linear,
        places=family.places,
        obstacle=family.obstacle,
        tiled=bool(family.tiles),
        joined=config.scale_factor if family.tiles == "connector" else 1,
    )


def _class_tokens(vision: Any, family: FamilySpec) -> int:
    """Class tokens of a vision tower.

    Raises
    ------
    ValueError : tokens are to merge in a tower of a kind that has no row, or it does not say how many patches it has.
    """
    kind = getattr(vision, "model_type", None) or type(vision).__name__
    if kind in TOWER_OF_CONFIG:
        return TOWERS[TOWER_OF_CONFIG[kind]].class_tokens
    sides = (getattr(vision, name, None) for name in ("image_size", "patch_size", "num_hidden_layers"))
    if "tower" in family.places or not all(isinstance(side, int) for side in sides):
        raise UserError(f"unsupported vision tower {kind!r}; supported: {', '.join(sorted(TOWER_OF_CONFIG))}")
    return 0


def family_of(config: Any) -> FamilySpec:
    """The row of a configuration's family; ValueError if there is none."""
    if config.model_type not in FAMILY_OF_CONFIG:
        raise UserError(f"unsupported family {config.model_type!r}; supported: {', '.join(FAMILY_OF_CONFIG)}")
    return FAMILIES[FAMILY_OF_CONFIG[config.model_type]]


def llm_obstacle(text: Any) -> str:
    """What of an LLM's configuration stands in the way of an attention mask of our own; empty if nothing does."""
    backend, kinds = text._attn_implementation, getattr(text, "layer_types", None)
    if backend not in (None, *PLAIN_BACKENDS):  # None: a configuration alone, which runs nothing
        return f"its attention is {backend!r}, not {' or '.join(PLAIN_BACKENDS)}"
    if kinds is None:
        kinds = ["full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"]
    partial = sorted({*kinds} - {"full_attention"})
    return f"it has {' and '.join(partial)}" if partial else ""


def feature_layers(config: Any) -> tuple[int, ...]:
    """Indices into the tower's hidden states that the projector reads; each equals the number of blocks before it."""
    several = getattr(config, "vision_feature_layers", None)  # VipLLaVA's name before transformers 5.18
    layers = config.vision_feature_layer if several is None else several
    states = config.vision_config.num_hidden_layers + 1
    layers = [layers] if isinstance(layers, int) else layers
    return tuple(layer if layer >= 0 else states + layer for layer in layers)
