"""Attach merging to a model, change it, and take it off again without a trace.

Read next: `settings` for what may be asked, `plan` for what it means, `hooks.state` for what is remembered and where,
`hooks.install` for what is put on a model, `hooks.tower` for merging inside the blocks, `hooks.tiles` for images cut
into tiles, `hooks.prompt` and `hooks.generate` for the placeholders, `hooks.llm` for what the LLM is told.
"""

from __future__ import annotations

import copy
import html
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .costs.flops import estimate
from .families import FAMILIES
from .families.encoders import ENCODERS
from .families.geometry import geometry
from .hooks import install, llm, trial
from .hooks.classes import refuse_pickling
from .hooks.graphs import Graphs
from .hooks.state import Attached
from .methods import Reducer, UserError
from .plan import Plan, make_plan
from .settings import Settings
from .stats import Stats

logger = logging.getLogger(__name__)
UNCHANGED: Any = object()


class Attachment(Attached):
    """Merging on one model; made by `attach`. Also a context manager that removes itself.

    What `using` asks for, and ``stats``, belong to the asyncio task or the thread that asks. A task has those of the
    task that made it from the start; a thread has none.

    Attributes
    ----------
    model : nn.Module
        The model.
    settings : Settings
        What was asked for, of all tasks and threads.
    plan : Plan or None
        What happens to every image; within ``using(keep=72)`` what that asks for, None within ``using(None)``.
    stats : Stats or None
        The last run, None before it or if the plain model ran.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        found = geometry(model)
        super().__init__(model, found, make_plan(settings, found))
        self.settings = settings
        llm.tell_left_out(self, settings, self._plan)
        self.graphs, self.prefills = Graphs(), Graphs()
        self._updating = threading.Lock()
        install.install(self)
        if not self.family.known:
            self._plan = trial.planned(self, settings)

    @classmethod
    def of(cls, model: nn.Module) -> Attachment | None:
        """The attachment that a model carries; a deep copy of a model carries its own."""
        return vars(model).get("_pitome")

    @property
    def stats(self) -> Stats | None:
        """What the last run of the calling task or thread did; None before one, or if the plain model ran."""
        return self.state.stats

    def update(self, method: str | Reducer | None = UNCHANGED, **settings: Any) -> None:
        """Change settings for all tasks and threads; the same arguments as `attach`. On an error nothing changes.

        What is not given stays, but for what the library chose because of it, and what says nothing any more, such as
        merges where blocks no longer merge; a new place of merging is logged.
        """
        self._check_attached()
        if method is not UNCHANGED:
            settings["method"] = method
        with self._updating:
            before, changed = self._plan, self.settings.changed(**settings)
            self._plan, self.settings = self._planned(changed), changed
        if self._plan.where != before.where and "where" not in settings:
            logger.warning("tokens now merge where=%r, no longer where=%r", self._plan.where, before.where)
        if not self._plan.graph:
            self.graphs.clear()
        if self._plan.graph is not True:
            self.prefills.clear()

    @contextmanager
    def using(self, *method: str | Reducer | None, **settings: Any) -> Iterator[Attachment]:
        """Other settings within a ``with`` block, for this task or thread only. ``using(None)`` is the plain model.

        Blocks may end in any order and anywhere. While a generator pauses inside of one, its caller has these settings
        too, and a generator that is stepped by several threads has them in the first: open one around each step.
        """
        self._check_attached()
        plain = method == (None,)
        settings |= {} if plain or len(method) != 1 else {"method": method[0]}
        if len(method) > 1 or plain == bool(settings):
            raise UserError(f"got using{method}; call using(None) for the plain model, or using(keep=72, ...)")
        with self.choosing(None if plain else self._planned(self.settings.changed(**settings))):
            yield self

    def _planned(self, settings: Settings) -> Plan:
        """What ``settings`` mean for this model."""
        plan = llm.planned(self, settings)
        install.check(self, plan)
        install.listen(self, plan)
        return plan

    def _check_attached(self) -> None:
        if Attachment.of(self.model) is not self:
            raise UserError(f"this attachment was removed from {type(self.model).__name__}; attach again")

    def unmerge(self, hidden: Tensor) -> Tensor:
        """Values of the last run's tokens (B, class tokens + tokens, C) for every patch; see `Stats.unmerge`."""
        if self.stats is None:
            raise UserError("no run is there to undo; call the model first, with merging")
        return self.stats.unmerge(hidden)

    def remove(self) -> None:
        """Restore the model exactly. A second call does nothing.

        A KV cache that a merged turn filled goes with merging: the plain model cannot continue it.
        """
        if Attachment.of(self.model) is not self:
            return
        install.uninstall(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({type(self.model).__name__}: {_describe(self._plan)})"

    def summary(self) -> str:
        """A few lines: what happens to an image, what that saves by `estimate`, and what the last run did."""
        plan = self.plan
        if plan is None:
            return f"{type(self.model).__name__}: the plain model"
        lines = [f"{type(self.model).__name__}: {_describe(plan)}"]
        left = dict.fromkeys((plan.input_patches, *plan.counts, *plan.projector_counts, *plan.packed))
        lines.append(f"patch tokens, merge by merge: {', '.join(map(str, left))}")
        try:
            plain, merged, alone = estimate(self.model), estimate(self.model, plan), self.family.encoder
            share, kv = 1 - merged.flops / plain.flops, 1 - merged.kv_bytes / max(plain.kv_bytes, 1)
            picture = "one image" if plain.tower_flops else f"the LLM, for one image of {plan.available} tokens"
            lines.append(
                f"{picture}{' and 40 text tokens' * (not alone)}, calculated: {merged.flops / 1e9:.4g} of "
                f"{plain.flops / 1e9:.4g} GFLOPs ({share:.0%} saved){f', KV cache {kv:.0%} saved' * (not alone)}"
            )
        except UserError as error:
            lines.append(f"FLOPs are not known: {error}")
        return "\n".join([*lines, f"last run: {self.stats or 'none'}"])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """The attachment of a copied model; graphs, which are of the modules themselves, stay behind."""
        copied = memo[id(self)] = object.__new__(type(self))
        own = {"graphs": Graphs(), "prefills": Graphs(), "_updating": threading.Lock()}
        vars(copied).update(copy.deepcopy({k: v for k, v in vars(self).items() if k not in own}, memo), **own)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_pickling(type(self))


def attach(model: nn.Module, method: str | Reducer | None = None, **settings: Any) -> Attachment:
    """Merge the visual tokens of a model, in place, until the returned handle is removed.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a supported family, such as LlavaForConditionalGeneration, or a vision encoder, such as
        CLIPModel, with peft's adapters or without; put adapters on first, then attach.
    method : str or Reducer, optional
        Which tokens join: a name in `METHODS` or a `Reducer`; default "pitome".
    published : bool, default False
        What the method's paper does, in place of what the library does with every method of its kind.
    keep : int or float, optional
        Visual tokens per image, or per tile of one, that reach the LLM, or of an encoder alone patch tokens at its end:
        a count, or a fraction in (0, 1]. With where="packed" of each image's (tile's, frame's) own tokens, at least 1
        and at most what it has.
    ratio : float, optional
        Instead of keep: the share of its tokens that every block keeps (the paper's rho).
    counts : sequence of int, optional
        Instead of keep: the patch tokens left after each merging block.
    merges : int or "every", optional
        With keep: how many blocks of the tower merge.
    schedule : {"equal", "early", "delayed", "last"}, optional
        With keep: the part of the blocks that merges: all (or see merges), the first or last two thirds, or as late as
        possible.
    where : {"tower", "projector", "both", "packed"}, optional
        Inside the blocks; before the projector; or both, and then ``tower_keep`` tokens leave the tower. Where images
        are cut into tiles, or their numbers of tokens differ, also after the projector, each image by itself, without
        the tokens that end its rows.
    tower_keep : int or float, optional
        With where="both"; default: a third of all, or the geometric mean of all and keep if that is less.
    metric : {"keys", "hidden", "projected"}, optional
        Keys of the block's attention; hidden states; or, before the projector, what it projected.
    place : {"mid", "end"}, optional
        Between attention and MLP of a block, or at its end.
    weighted : bool, optional
        Mean weighted by the patches that tokens stand for.
    proportional_attention : bool, optional
        Add log(size) to the attention logits of merged tokens.
    order : {"reading", "source"}, optional
        The order of tokens: as in the image, or as the authors' code of ToMe and of the paper's PiToMe leaves them.
    calibration : {"distance", "size", "none"}, optional
        What the LLM is told of visual tokens. "distance": each has the median position of its patches, and attention
        logits grow by log(s * (2 - D(d))), with s patches behind the key and D the part of RoPE that only knows the
        distance d. "size": those positions, and log(s) only. "none": counted positions, and nothing. Default: the best
        that the LLM's attention takes.
    logits : {"merged", "caller"}, default "merged"
        A call returns the logits of the tokens that there are; or of all columns of the caller's prompt, as training
        loops want them, where a column that was dropped repeats the one before it.
    energies : bool, default False
        Keep the energy of every token in ``handle.stats``.
    graph : "auto" or bool, default "auto"
        "auto": on a CUDA device, without gradients, the vision tower with its merging runs as one CUDA graph for each
        setting and shape of up to 64 images, made on the second equal call; True: of any number, on the first, and the
        LLM's prefill in generate() as another; False: never. What no graph can hold runs as it is, and the log says
        why. A few graphs are kept, until `remove`, or an `update` that asks for none.
    **settings
        Anything else is an option of the method, such as ``margin=0.45``.

    Returns
    -------
    Attachment
        The handle.

    Raises
    ------
    ValueError
        An unsupported model, one that carries an attachment already, or settings that cannot be reached.

    Notes
    -----
    What is left out is the library's choice, the same for every method that goes in steps, and for every one that does
    not, as `settings.STEPS` and `ONE_STEP` have it; with ``published=True`` that of `settings.PUBLISHED`. What a method
    itself needs goes before, as its row in `METHODS` says, and what the caller gives before all.

    With a number of merges each block removes an equal share, at equal distances over the first three quarters of the
    blocks, or where schedule puts them; in a tower of fewer than 12 over all. More blocks merge where one would remove
    over 40 %, and the same holds for merging before the projector, which takes several steps then.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"got {str(model)[:60]!r} ({type(model).__name__}), not a model; load one first, such as load('tiny'); "
            f"supported: {', '.join((*FAMILIES, *ENCODERS))}"
        )
    model = _unwrapped(model)
    carried = _carried(model)
    if carried is not None:
        raise UserError(
            f"{type(model).__name__} already carries {_describe(carried._plan)}; "
            "call its handle.update(...) to change it, or handle.remove() first"
        )
    asked = Settings().changed(method=method, **settings)
    if asked.keep is None and asked.ratio is None and asked.counts is None:
        raise UserError("nothing to merge was asked for; give keep=144, keep=0.25 or ratio=0.9")
    handle = Attachment(model, asked)
    logger.info("attached %s", handle)
    return handle


def _unwrapped(model: Any) -> nn.Module:
    """The model that wrappers of torch.compile and of peft call."""
    if hasattr(model, "_orig_mod"):
        torch.compiler.reset()  # graphs of the plain model may be taken for those of the merging one
        return _unwrapped(model._orig_mod)
    return _unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def _describe(plan: Plan) -> str:
    published = ", published" if plan.published else ""
    return f"{plan.method} (keep={plan.keep} of {plan.available}, {plan.where}{published})"


def _carried(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or of another model that shares its vision tower."""
    return next((a for a in map(Attachment.of, model.modules()) if isinstance(a, Attachment)), None)
