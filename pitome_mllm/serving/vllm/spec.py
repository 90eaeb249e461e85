"""What an operator asked of the plug-in, in a model's configuration, and what one request asked, as a `Plan`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ... import __version__
from ...errors import UserError
from ...families.geometry import Geometry, geometry
from ...methods import METHODS
from ...plan import Plan, make_plan
from ...schedule import picture_count, target_count
from ...settings import Settings
from . import ARCHITECTURES, KEY

# What is not for vLLM's models to choose: its LLMs take no positions and no mask of ours, and graphs are vLLM's own.
FIXED: dict[str, Any] = {"calibration": "none", "graph": False, "logits": "merged", "energies": False}
TOWERS = ("clip_vision_model", "siglip_vision_model")  # whose layers `tower` knows
PLANS = 256  # that are remembered


def hf_overrides(config: Any, **settings: Any) -> dict[str, Any]:
    """What ``--hf-overrides`` has to say, as JSON, so that vLLM serves a model with merged tokens.

    Parameters
    ----------
    config : PretrainedConfig
        Of a LLaVA-1.5 or LLaVA-NeXT model.
    **settings
        Keywords of `attach`; None = left out.

    Raises
    ------
    ValueError
        Another model, or settings that it or vLLM does not take.
    """
    names = [name for name in config.architectures or () if name in ARCHITECTURES]
    if not names:
        raise UserError(
            f"the vLLM plug-in serves {' and '.join(ARCHITECTURES)}, got {config.architectures}; serve others with "
            "--engine transformers"
        )
    asked = {name: value for name, value in settings.items() if value is not None}
    _plan(json.dumps(asked, sort_keys=True), None, _shape(config))
    return {"architectures": [ARCHITECTURES[names[0]]], KEY: asked}


def plan_of(config: Any, keep: Any = None) -> Plan:
    """What happens to every image of a model whose configuration has the settings; with ``keep``, of one request.

    Raises
    ------
    ValueError
        The settings are missing or not possible, or ``keep`` is no count and no share.
    """
    asked = getattr(config, KEY, None)
    if not isinstance(asked, Mapping):
        raise UserError(
            f"the model's configuration says {KEY}={asked!r}; ask for merging with --hf-overrides "
            f'\'{{"architectures": {json.dumps(config.architectures)}, "{KEY}": {{"keep": 144}}}}\''
        )
    said, shape = json.dumps(dict(asked), sort_keys=True), _shape(config)
    plan = _plan(said, None, shape)
    if keep is None:
        return plan
    if plan.where == "packed":  # of each picture's own tokens
        picture_count(keep, shape.available)  # before anything else is done with nonsense
        return _plan(said, keep, shape)
    count = target_count(keep, shape.available)
    return plan if count == plan.keep else _plan(said, count, shape)


def requested(mm_kwargs: Mapping[str, Any]) -> Any:
    """The ``keep`` in the ``mm_processor_kwargs`` of a request, None without; UserError for anything else there."""
    asked = mm_kwargs.get(KEY)
    if asked is None:
        return None
    if not isinstance(asked, Mapping) or set(asked) != {"keep"}:
        raise UserError(f"a request may ask for {KEY}={{'keep': ...}} and nothing else, got {asked!r}")
    return asked["keep"]


def check_defaults(mm_kwargs: Mapping[str, Any]) -> None:
    """UserError where a server's own ``mm_processor_kwargs`` say what only a request's may."""
    if KEY in mm_kwargs:
        raise UserError(f"{KEY} in --mm-processor-kwargs has no effect; all requests have what --hf-overrides says")


def fingerprint(plan: Plan) -> str:
    """A short name of what ``plan`` makes of an image, for caches that outlive a server."""
    return hashlib.sha256(f"{__version__} {plan.asked.keep} {plan!r}".encode()).hexdigest()[:16]


def _shape(config: Any) -> Geometry:
    """The geometry of a model whose tower the plug-in knows; UserError for another."""
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise UserError(
            f"the plug-in merges behind vision towers of CLIP and SigLIP, got {kind!r}; serve the model with "
            "--engine transformers"
        )
    return geometry(config)


@lru_cache(maxsize=PLANS, typed=True)  # keep=1 is one token, keep=1.0 all
def _plan(said: str, keep: int | float | None, shape: Geometry) -> Plan:
    asked: dict[str, Any] = json.loads(said)
    for name in asked.keys() & FIXED.keys():
        if asked[name] != FIXED[name]:
            raise UserError(f"{name}={asked[name]!r} is not possible in vLLM, {FIXED[name]!r} is; leave it out")
    if not asked.keys() & {"keep", "ratio", "counts"}:
        raise UserError(f"nothing to merge was asked for; give {KEY} a keep, such as 144 or 0.25, or a ratio")
    if shape.family.tiles and asked.setdefault("where", "packed") != "packed":
        raise UserError(
            f"where={asked['where']!r} leaves a number of tokens that only the tower knows, and vLLM counts them "
            "before it runs; with images of several tiles choose where='packed'"
        )
    settings = Settings().changed(**{**asked, **FIXED})
    plan = make_plan(settings if keep is None else settings.changed(keep=keep), shape)
    if plan.reducer.needs:
        possible = ", ".join(name for name, row in METHODS.items() if not row.reducer.needs)
        needs = " and ".join(sorted(plan.reducer.needs))
        raise UserError(f"{plan.method} needs {needs}, which vLLM's tower does not give; choose one of {possible}")
    if len(shape.layers) > 1 and not shape.family.tiles:
        raise UserError(f"the projector reads the layers {shape.layers} side by side, and vLLM's tower gives one")
    return plan
