"""Image placeholders in the caller's prompt, and in the shorter one that the LLM gets: pure functions.

The processor writes as many placeholders per image as the plain model needs. Callers keep that prompt; the model
gets a shorter one. A `Layout` says which of the caller's columns stands at each place of the shorter prompt, so
everything with a column per token (ids, mask, labels, embeddings, positions) moves by one rule.

All of it happens on the host, where a prompt is small: a device is asked once where placeholders and padding are
(`transfers.on_host`), and is never waited for when it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import UserError
from .positions import caller_positions, ranks
from .transfers import on

IGNORED = -100  # the label of a token that no loss counts
# What fills a padding place, for each argument of generate() and forward() that has one column per token.
FILL = {"attention_mask": 0, "labels": IGNORED, "inputs_embeds": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the columns of a shorter prompt come from, and what the LLM is told of them."""

    index: Tensor  # (B, S) int64, the caller's column at each place
    real: Tensor  # (B, S) bool, False at padding places
    width: int  # number of columns of the caller, T
    position: Tensor | None = None  # (B, S) int64, counting the caller's columns; None = the LLM counts the places;
    # (B, S, A) where it counts in several axes, then ``follows`` and ``shift`` too
    follows: Tensor | None = None  # (B, 1) int64, the position of the column after them; with ``position`` only
    calibration: str = "none"  # what the LLM is told of visual tokens that merged; if "none", shift and size are None
    shift: Tensor | None = None  # (B, S) int64, what visual tokens add to their ``position``
    size: Tensor | None = None  # (B, S) float32, the patches that a visual token stands for, 0 at text
    reach: int = 0  # no position is larger

    @property
    def places(self) -> int:
        return self.index.shape[1]

    def take(self, x: Tensor, fill: int) -> Tensor:
        """``x`` (B, T) or (B, T, C) in this layout, with ``fill`` at padding places."""
        index, real = on(x.device, self.index), on(x.device, self.real)
        if x.dim() == 3:
            index, real = index[..., None].expand(-1, -1, x.shape[-1]), real[..., None]
        return x.gather(1, index).masked_fill(~real, fill)

    @property
    def columns(self) -> Tensor:
        """(B, S) int64, the caller's column at every place, -1 at padding."""
        return self.index.where(self.real, -1)

    def take_shifted(self, labels: Tensor) -> Tensor:
        """``labels`` (B, T) of the tokens after every column, as labels of those after every place."""
        own = self.take(F.pad(labels[:, :-1], (1, 0), value=IGNORED), IGNORED)
        return torch.cat([own[:, 1:], labels[:, -1:].masked_fill(~on(labels.device, self.real[:, -1:]), IGNORED)], 1)

    def then(self, later: Layout) -> Layout:
        """This layout, and ``later`` after it for the columns that follow; positions of ``later`` start at 0."""
        position, follows, shift, size = self.position, self.follows, self.shift, self.size
        if position is not None:
            later = later if later.position is not None else later.positioned(caller_positions(later.real))
            position, follows, added, then = alike(position, follows, later.position, later.follows)
            position, follows = torch.cat([position, follows + added], 1), follows + then
        if shift is not None and size is not None:
            (shift,) = alike(shift, like=position)
            shift, size = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, later.places)) for x in (shift, size))
        return Layout(
            torch.cat([self.index, later.index + self.width], 1),
            torch.cat([self.real, later.real], 1),
            self.width + later.width,
            position,
            follows,
            self.calibration,
            shift,
            size,
            self.reach + later.width,
        )

    def positioned(self, positions: Tensor) -> Layout:
        """This layout with ``positions`` (B, T + 1) of the caller's columns, and of the one after them."""
        return replace(self, position=self.take(positions, 0), follows=positions[:, -1:])

    def on(self, device: torch.device) -> Layout:
        """This layout on a device."""
        return self if self.index.device == device else self._each(lambda x: on(device, x))

    def rows(self, which: Any) -> Layout:
        """The layout of the rows ``which``, anything that a tensor's first dimension takes."""
        which = which.to(self.index.device) if isinstance(which, Tensor) else which
        return self._each(lambda x: x[which])

    def repeated(self, rows: int) -> Layout:
        """The layout for ``rows`` rows, where beams or several answers repeat each row of the prompt, or did."""
        have = len(self.index)
        times, rest = divmod(rows, have)
        if times and not rest:
            return self if times == 1 else self._each(lambda x: x.repeat_interleave(times, 0))
        if rows and not have % rows:
            one = self.rows(slice(None, None, have // rows))
            again, tensors = vars(one.repeated(have)), vars(self)
            if all(torch.equal(x, again[name]) for name, x in tensors.items() if isinstance(x, Tensor)):
                return one
        raise UserError(
            f"a KV cache of {have} rows does not go with {rows} rows; "
            "continue it with as many rows, or with a multiple of them"
        )

    def fitted_to(self, places: int, mask: Tensor | None = None) -> Layout:
        """This layout for a cache of ``places`` places: what follows the prompt is one to one.

        ``mask`` (B, T or more) is 0 at the caller's padding.
        """
        rows, have = self.index.shape
        if places < have:
            return self._cropped(places)
        if places == have:
            return self
        more = unchanged(rows, places - have, self.index.device)
        if mask is not None and mask.shape[1] >= self.width + more.width:
            mask = mask[:, self.width : self.width + more.width].to(more.index.device)
            more = more.positioned(caller_positions(mask))
        return self.then(more)

    def told(self, image: Tensor, shift: Tensor, size: Tensor, calibration: str) -> Layout:
        """This layout with what the LLM is told of the placeholders ``image`` (B, S') of its last S' places: what
        positions there grow by (B, S'), and patches (B, S').
        """
        old = self.places - image.shape[1]
        told = self.on(size.device)
        return replace(
            told,
            calibration=calibration,
            shift=_behind(told.shift, shift, old),
            size=_behind(told.size, size, old),
            reach=max(self.reach, int(self.follows.max())),
        )

    def of_places(self, places: int) -> tuple[Tensor, Tensor | None]:
        """(B, S) position ids that the LLM gets, and sizes, of as many ``places``: what follows is text."""
        position = self.position if self.shift is None else self.position + self.shift
        if places <= self.places:
            return position[:, :places], None if self.size is None else self.size[:, :places]
        more = torch.arange(places - self.places, device=position.device)
        after = self.follows + (more if position.dim() == 2 else more[:, None])
        return torch.cat([position, after], 1), None if self.size is None else F.pad(self.size, (0, len(more)))

    def _cropped(self, places: int) -> Layout:
        """The first ``places`` places; what follows is the first that is gone."""
        gone, there = self.index[:, places : places + 1], self.real[:, places : places + 1]
        column = int(gone.masked_fill(~there, -1).max())
        width = column if column >= 0 else self.width - (self.places - places)
        left = replace(self._each(lambda x: x[:, :places]), width=width, follows=self.follows)
        if self.position is None:
            return left
        there = there if self.position.dim() == 2 else there[..., None]
        return replace(left, follows=self.position[:, places : places + 1].where(there, self.follows))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The layout with every tensor changed alike."""
        changed = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)


def _behind(earlier: Tensor | None, x: Tensor, places: int) -> Tensor:
    """``x`` behind the first ``places`` of what was there, 0 where there was nothing."""
    if not places:
        return x
    before = x.new_zeros(len(x), places, *x.shape[2:]) if earlier is None else earlier[:, :places]
    return torch.cat(alike(before, x), 1)


def alike(*positions: Tensor, like: Tensor | None = None) -> list[Tensor]:
    """Positions (B, S) and (B, S, A) with as many axes each: those of one axis are the same in all."""
    most = max((*positions, *(() if like is None else (like,))), key=Tensor.dim)
    return [x if x.dim() == most.dim() else x[..., None].expand(*x.shape, most.shape[-1]) for x in positions]


def shorten(image: Tensor, mask: Tensor, full: Sequence[int], kept: Sequence[int]) -> Layout:
    """Keep the first placeholders of every image, and drop what ends its rows, and padding that is not needed any more.

    The columns after the last image of every row stay the last columns, padding included: a slice from the end has
    the tokens that it has in the caller's prompt. Before them padding stays on the side where a row has it.

    ``image`` (B, T) is True at placeholders, row by row those of the images in order, ``mask`` (B, T) 0 at the caller's
    padding; ``full`` and ``kept`` are the placeholders of every image before and after.
    """
    counts = image.sum(1)
    ends = torch.tensor([0, *full], device=image.device).cumsum(0)
    if not bool(torch.isin(counts.cumsum(0), ends).all()):
        expected = f"multiples of {full[0]}" if len({*full}) == 1 else f"those of pictures with {list(full)}"
        raise UserError(
            f"rows hold {counts.tolist()} image placeholders, expected {expected}: "
            "use the model's own processor, one placeholder text per picture"
        )
    number, rank = ranks(image, full)
    full, kept = (torch.tensor(lengths, device=image.device) for lengths in (full, kept))
    inside = (rank >= 0) & (rank < full[number] - 1)  # the columns between the placeholders of a picture, its row ends
    stays = (mask != 0) & torch.where(image, rank < kept[number], ~inside | (kept == full)[number])
    column = torch.arange(image.shape[1], device=image.device)
    tail = int(torch.where(image, column, -1).max()) + 1  # the first of the columns that all rows have after images
    return _packed(stays, mask != 0, tail)


def _packed(stays: Tensor, real: Tensor, tail: int) -> Layout:
    """The columns that ``stays`` (B, T) marks, and all from ``tail`` on, of a prompt that is ``real`` (B, T)."""
    width = stays.shape[1]
    head = stays[:, :tail]
    lengths = head.sum(1, keepdim=True)
    places = int(lengths.max())
    place = torch.arange(places, device=stays.device).expand(len(stays), -1)
    padded_right = ~real[:, min(tail, width - 1) :].any(1, keepdim=True)
    shift = (places - lengths).masked_fill(padded_right, 0)
    there = (place >= shift) & (place < shift + lengths)
    order = head.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    index = order.gather(1, (place - shift).clamp(min=0))
    behind = torch.arange(tail, width, device=stays.device).expand(len(stays), -1)
    return Layout(torch.cat([index, behind], 1), torch.cat([there, real[:, tail:]], 1), width)


def unchanged(rows: int, width: int, device: torch.device) -> Layout:
    """The layout that keeps all of ``width`` columns as they are."""
    index = torch.arange(width, device=device).expand(rows, -1)
    return Layout(index, torch.ones_like(index, dtype=torch.bool), width)


def take_all(kwargs: Mapping[str, Any], pad: int, *layouts: Layout) -> dict[str, Any]:
    """The arguments of ``kwargs`` with every per-token tensor in the layout of its width."""
    by_width = {int(layout.width): layout for layout in layouts}
    taken = dict(kwargs)
    for name, fill in {"input_ids": pad, **FILL, "shift_labels": IGNORED}.items():
        x = kwargs.get(name)
        if x is None:
            continue
        fits = isinstance(x, Tensor) and x.dim() == (3 if name == "inputs_embeds" else 2)
        if not fits or (width := int(x.shape[1])) not in by_width:  # torch.jit.trace has tensors for sizes
            raise UserError(
                f"{name} of shape {tuple(map(int, getattr(x, 'shape', ()))) or type(x).__name__} cannot be shortened; "
                f"pass the processor's, with {' or '.join(map(str, by_width))} columns"
            )
        layout = by_width[width] = by_width[width].on(x.device)
        taken[name] = layout.take_shifted(x) if name == "shift_labels" else layout.take(x, fill)
    return taken


def restore_prompt(sequences: Tensor, prompt: Tensor, short: int) -> Tensor:
    """Put ``prompt`` (B, T) before ``sequences`` (B * n, S + new) in place of their own (S = ``short``)."""
    repeated = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    return torch.cat([repeated, sequences[:, short:]], dim=1)
