"""The pictures of a run as the model gets them: with options of its processor, or smaller in place of fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from PIL import Image

from pitome_mllm.families.features import tokens_of_picture
from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import make_plan
from pitome_mllm.serving.resolution import CONTROL, cell, options_of, smaller, with_options, without_floor
from pitome_mllm.settings import Settings


class Pictures:
    """What a run's ``settings`` say of pictures: its processor, and `CONTROL` in the place of a method."""

    def __init__(self, model: Any, processor: Any, settings: Mapping[str, Any]) -> None:
        named = {*options_of(processor)} - {field.name for field in fields(Settings)}
        self.options = {name: value for name, value in settings.items() if name in named}
        self.processor, self.kept, self.mark = with_options(processor, self.options), None, model.config.image_token_id
        if settings.get("method") == CONTROL:
            if not cell(self.processor) or "keep" not in settings:
                raise UserError(
                    f"method={CONTROL} scales pictures down to the tokens that keep= says, of a model whose pictures "
                    f"keep their size; got keep={settings.get('keep')} and {type(model).__name__}"
                )
            self.whole, self.processor = self.processor, without_floor(self.processor)
            self.kept = make_plan(Settings().changed(keep=settings["keep"]), geometry(model)).kept

    def seen(self, picture: Image.Image) -> Image.Image:
        """The picture, or a smaller one that the plain model makes as many tokens of as merging would leave."""
        if self.kept is None:
            return picture
        return smaller(self.processor, picture, self.kept(tokens_of_picture(self.whole, picture, self.mark)))
