"""Vision encoders by themselves: which models there are, and which cannot merge. Data, as the rows of `families`."""

from __future__ import annotations

from typing import Any

from . import FamilySpec


def _alone(config: str, tower: str = "", **settings: Any) -> FamilySpec:
    """The row of a model whose vision tower lies at ``tower``; "" = it is the tower."""
    return FamilySpec(
        config,
        tower=tower,
        projector=tower,
        language=tower,
        core=tower,
        places=("tower",),
        unsupported_reason="an encoder alone has no projector",
        encoder=True,
        **settings,
    )


ENCODERS: dict[str, FamilySpec] = {  # key: class name of the model
    "CLIPModel": _alone("clip", "vision_model"),
    "CLIPVisionModel": _alone("clip_vision_model"),
    "CLIPVisionModelWithProjection": _alone("clip_vision_model", "vision_model"),
    "CLIPForImageClassification": _alone("clip", "vision_model", means=True),
    "SiglipModel": _alone("siglip", "vision_model"),
    "SiglipVisionModel": _alone("siglip_vision_model"),
    "SiglipForImageClassification": _alone("siglip", "vision_model", means=True),
    "ViTModel": _alone("vit"),
    "ViTForImageClassification": _alone("vit", "vit"),
    "DeiTModel": _alone("deit"),
    "DeiTForImageClassification": _alone("deit", "deit"),
    "DeiTForImageClassificationWithTeacher": _alone("deit", "deit"),
    "ViTMAEModel": _alone("vit_mae"),
    "Dinov2Model": _alone("dinov2"),
    "Dinov2ForImageClassification": _alone("dinov2", "dinov2", means=True),
    "Dinov2WithRegistersModel": _alone("dinov2_with_registers"),
    "Dinov2WithRegistersForImageClassification": _alone("dinov2_with_registers", "dinov2_with_registers", means=True),
    "DINOv3ViTModel": _alone("dinov3_vit", rotary=True),
    "BlipVisionModel": _alone("blip_vision_model"),
    "BlipForImageTextRetrieval": _alone("blip", "vision_model", reader="text_encoder"),
    "Blip2VisionModel": _alone("blip_2_vision_model"),
    "Blip2VisionModelWithProjection": _alone("blip-2", "vision_model", reader="qformer"),
    "Blip2ForImageTextRetrieval": _alone("blip-2", "vision_model", reader="qformer"),
}
ENCODER_OF_CONFIG = {spec.config: spec for spec in reversed(ENCODERS.values())}  # the first row of each
LAYER_OF_CONFIG = {  # of towers that stand alone only; those that LLMs have are in `TOWER_OF_CONFIG`
    "vit": "ViTLayer",
    "deit": "DeiTLayer",
    "vit_mae": "ViTMAELayer",
    "dinov2": "Dinov2Layer",
    "dinov2_with_registers": "Dinov2WithRegistersLayer",
    "dinov3_vit": "DINOv3ViTLayer",
    "blip_vision_model": "BlipEncoderLayer",
    "blip_2_vision_model": "Blip2EncoderLayer",
}
REFUSED = {  # key: class name of the model, or of one it derives from; why it cannot merge
    "Siglip2PreTrainedModel": "its pictures have any shape and are padded to one number of patches; SigLIP 2 "
    "checkpoints of a fixed resolution load as SiglipModel, which merges",
    "BeitPreTrainedModel": "the attention of published checkpoints adds a bias for every pair of patches of the whole "
    "grid, which merged tokens do not have",
    "ViTMAEForPreTraining": "its decoder puts every patch in its place, which merged ones have lost; for features "
    "attach to the encoder, model.vit, and call that, not the whole",
}
