"""Models of the original llava package (PyPI llava-torch 1.2.2), and all that its old torch and transformers ask for.

They write images into the prompt themselves, in place of one id each, so prompts stay as they are. The encoder layers
of transformers 4.36 take no keyword of ours and return tuples; and tiles are packed in the middle of one long method,
which is made to work on what we give it by running it on a `_View` of the model.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..families.anyres import Packed, Places
from ..methods import UserError
from ..stats import Stats
from .classes import Merging, plain_class
from .packed import merge_pictures
from .run import RUN, Run
from .state import Attached
from .tiles import merged_tiles
from .tower import MergingLayer, finish_run, start_run

IMAGE = -200  # the id that stands for an image: llava.constants.IMAGE_TOKEN_INDEX
PREPARE = "prepare_inputs_labels_for_multimodal"

# The vision tower: a run reaches its layers by a variable that is set while the tower runs, not by a keyword.

_current: ContextVar[Run | None] = ContextVar("pitome_run", default=None)


class _Outside:
    """Mixin before `MergingLayer`: finds the run, and returns a tuple."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        run = _current.get()
        if run is None:
            return plain_class(type(self)).forward(self, hidden_states, *args, **kwargs)
        return (super().forward(hidden_states, *args, **kwargs, **{RUN: run}),)


class _Inside:
    """Mixin between `MergingLayer` and the layer's own class: takes its tensor out of the tuple."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)[0]


@lru_cache
def merging_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an encoder layer class of transformers 4.36 that merges."""
    own = {"__module__": __name__, "_plain": base}
    return Merging(f"Merging{base.__name__}", (_Outside, MergingLayer, _Inside, base), own)


def make_tower_forward(tower: nn.Module) -> Callable[..., Any]:
    """A forward of the tower that starts and finishes a run, as hooks of newer towers do."""

    @functools.wraps(type(tower).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self._pitome.replaced["forward"] or MethodType(type(self).forward, self)  # accelerate's, if it has one
        started = start_run(self, args, kwargs)
        args, given = (args, {**kwargs}) if started is None else started
        run = given.pop(RUN, None)
        token = _current.set(run)
        try:
            output = own(*args, **given)
        finally:
            _current.reset(token)
        finish_run(self, args, {**given, RUN: run}, output)
        return output

    return forward


# Tiles: what the model packs is merged, and the model puts it into the prompt.


class _View:
    """A model with some attributes replaced."""

    def __init__(self, model: nn.Module, /, **replaced: Any) -> None:
        vars(self).update(replaced, _model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def make_prepare(model: nn.Module) -> Callable[..., Any]:
    """A prepare_inputs_labels_for_multimodal() whose images of several tiles have merged tokens."""
    own = getattr(type(model), PREPARE)

    @functools.wraps(own)
    def prepare(
        self: nn.Module,
        input_ids: Tensor,
        position_ids: Any,
        attention_mask: Any,
        past_key_values: Any,
        labels: Any,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple:
        prompt = (input_ids, position_ids, attention_mask, past_key_values, labels)
        handle, plan = self._pitome, self._pitome.plan
        if images is None or input_ids.shape[1] == 1:  # no images, or decoding
            return own(self, *prompt, images, image_sizes)
        if plan is None or plan.is_plain:
            made = own(self, *prompt, images, image_sizes)
            handle.note(stats=plan and Stats(plan, len(images), (), None, made[4].device))
            return made
        features, packed = zip(*_merged(self, images, image_sizes))
        handle.note(stats=_stats_of(handle, packed, features[0].device))
        config = _changed(self.config, mm_patch_merge_type="flat")
        one_token_tiles = [x[:, None, None] for x in features]  # (K, 1, 1, C): K tiles of one token each
        view = _View(self, config=config, encode_images=lambda tiles: tiles[:, 0])
        return own(view, *prompt, one_token_tiles, None)

    return prepare


def _merged(model: nn.Module, images: Any, sizes: Any) -> list[tuple[Tensor, Packed]]:
    """Every image's merged features (K, C), and what became of its tokens."""
    plan = model._pitome.plan
    places = _places(model, images, sizes)
    if plan.where == "packed":
        packed = pack(model, images, sizes, model.encode_images)
        ends = [place.newline.to(x.device) for x, place in zip(packed, places)]
        return list(zip(*merge_pictures(plan, packed, ends)))
    flat = images if _whole(images) else torch.cat([x[None] if x.dim() == 3 else x for x in images])
    features = model.encode_images(flat)
    counts = _tiles(images)
    newline = getattr(model.get_model(), "image_newline", features.new_zeros(features.shape[-1]))
    pictures = zip(features.split(counts), model._pitome.state.stats.groups.split(counts), places)
    return [merged_tiles(*picture, newline) for picture in pictures]


def _stats_of(handle: Attached, packed: tuple[Packed, ...], device: torch.device) -> Stats:
    made = handle.state.stats if handle.plan.where != "packed" else None
    images, merges, sizes = (len(packed), (), None) if made is None else (made.images, made.merges, made.token_sizes)
    return Stats(handle.plan, images, merges, sizes, device, packed)


def _whole(images: Any) -> bool:
    """Whether images come as one tensor (I, 3, H, W), of which the model packs nothing."""
    return isinstance(images, Tensor) and images.dim() == 4


def _tiles(images: Any) -> list[int]:
    """Tiles of every image."""
    return [1 if image.dim() == 3 else len(image) for image in images]


def _places(model: nn.Module, images: Any, sizes: Any) -> list[Places]:
    """How the model packs every image: its own packing of the indices of patches, with -1 for newlines."""
    patches = model._pitome.geometry.patches
    blank = SimpleNamespace(embed_tokens=lambda ids: torch.empty(0, 1), image_newline=torch.tensor([-1.0]))

    def indices(tiles: Tensor) -> Tensor:
        return torch.arange(len(tiles) * patches, dtype=torch.float32).view(len(tiles), patches, 1)

    blanks = [torch.empty(n, 3, 1, 1) for n in _tiles(images)]
    given = torch.cat(blanks) if _whole(images) else blanks
    view = _View(model, model=blank, get_model=lambda: blank, device=torch.device("cpu"))
    first, places = 0, []
    for tiles, index in zip(_tiles(images), pack(view, given, sizes, indices)):
        source = index[:, 0].long()
        places.append(Places((source - first).where(source >= 0, -1), patches))
        first += tiles * patches
    return places


def pack(model: Any, images: Any, sizes: Any, encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Every image's features (L, C) as the model packs them, from what ``encode`` makes of all tiles.

    The model writes each image into a prompt of its own, which holds nothing else: the second id is masked out, since
    prompts of one id count as decoding.
    """
    ids = torch.full((len(images), 2), IMAGE, device=model.device)
    mask = torch.tensor([[1, 0]], device=model.device).expand_as(ids)
    config = _changed(model.config, tokenizer_model_max_length=None)
    view = _View(model, config=config, encode_images=encode)
    own = getattr(type(getattr(model, "_model", model)), PREPARE)
    _, _, mask, _, embeds, _ = own(view, ids, None, mask, None, None, images, sizes)
    return [row[real.bool()] for row, real in zip(embeds, mask)]


def _changed(config: Any, **values: Any) -> Any:
    changed = copy.copy(config)
    vars(changed).update(values)
    return changed


# Loading


class Processor:
    """What a loaded model reads: ``processor(images=[...], text="USER: <image> what is this? ASSISTANT:")``.

    Images and ids are made by the package's own functions; the result goes to ``model.generate(**inputs)``.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any) -> None:
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config

    def __call__(self, images: Any, text: str) -> dict[str, Any]:
        """The ids (1, T), the images, and their sizes (width, height)."""
        from llava.mm_utils import process_images, tokenizer_image_token

        images = images if isinstance(images, (list, tuple)) else [images]
        return {
            "inputs": tokenizer_image_token(text, self.tokenizer, return_tensors="pt")[None],
            "images": process_images(images, self.image_processor, self.config),
            "image_sizes": [image.size for image in images],
        }

    def decode(self, ids: Any, **options: Any) -> str:
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, **options)


def load(source: str, architecture: str, dtype: Any, device_map: Any) -> tuple[nn.Module, Processor]:
    """A model of the original package in evaluation mode, with its vision tower, and its `Processor`."""
    if importlib.util.find_spec("llava") is None:
        raise UserError(
            f"{source!r} is a checkpoint of the original llava package, which is not installed; install "
            "llava-torch==1.2.2.post1 in an environment of its own (Python 3.11 or older), or load a checkpoint in "
            "transformers' layout, such as 'llava-hf/llava-1.5-7b-hf'"
        )
    import llava.model
    from transformers import AutoTokenizer

    model, report = getattr(llava.model, architecture).from_pretrained(
        source, torch_dtype=dtype, device_map=device_map, low_cpu_mem_usage=True, output_loading_info=True
    )
    if report["missing_keys"]:  # they would be random numbers
        missing = sorted(report["missing_keys"])
        raise UserError(f"{source!r} lacks {len(missing)} weights of {architecture}, such as {missing[0]}")
    tower = model.get_vision_tower()
    if not tower.is_loaded:  # checkpoints with a tower of their own bring it along
        tower.load_model()
    tower.to(device=model.device, dtype=model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    return model.eval(), Processor(tokenizer, tower.image_processor, model.config)
