"""Image placeholders in the caller's prompt, and in the shorter one that the LLM gets: pure functions.

The processor writes as many placeholders per picture as the plain model needs. Callers keep that prompt; the model
gets a shorter one. A `Layout` says which of the caller's columns stands at each place of the shorter prompt, so
everything with a column per token (ids, mask, labels, embeddings, positions) moves by one rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that no loss counts
# What fills a padding place, for each argument of generate() and forward() that has one column per token.
FILL = {"attention_mask": 0, "labels": IGNORED, "inputs_embeds": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the columns of a shorter prompt come from.

    Attributes
    ----------
    index : (B, S) int64, the caller's column at each place.
    real : (B, S) bool, False at padding places.
    width : number of columns of the caller, T.
    original : position ids count the caller's columns, not the places.
    """

    index: Tensor
    real: Tensor
    width: int
    original: bool = False

    def take(self, x: Tensor, fill: int) -> Tensor:
        """``x`` (B, T) or (B, T, C) in this layout, with ``fill`` at padding places."""
        index = self.index.to(x.device)
        real = self.real.to(x.device)
        if x.dim() == 3:
            index, real = index[..., None].expand(-1, -1, x.shape[-1]), real[..., None]
        return x.gather(1, index).masked_fill(~real, fill)

    @property
    def columns(self) -> Tensor:
        """(B, S) int64, the caller's column at every place, -1 at padding."""
        return self.index.where(self.real, -1)

    def take_shifted(self, labels: Tensor) -> Tensor:
        """``labels`` (B, T) of the tokens behind every column, as labels of those behind every place."""
        own = self.take(F.pad(labels[:, :-1], (1, 0), value=IGNORED), IGNORED)
        return torch.cat([own[:, 1:], labels[:, -1:].masked_fill(~self.real[:, -1:].to(labels.device), IGNORED)], 1)

    def then(self, later: Layout) -> Layout:
        """This layout, and ``later`` behind it for the columns that follow."""
        return Layout(
            torch.cat([self.index, later.index + self.width], 1),
            torch.cat([self.real, later.real], 1),
            self.width + later.width,
            self.original,
        )

    def repeated(self, rows: int) -> Layout:
        """The layout for ``rows`` rows, where beams or several answers repeat each row of the prompt.

        Raises
        ------
        ValueError : ``rows`` is no multiple of the layout's rows.
        """
        times, rest = divmod(rows, len(self.index))
        if rest or not times:
            raise ValueError(
                f"a KV cache of {len(self.index)} rows does not go with {rows} rows; "
                "continue it with as many rows, or with a multiple of them"
            )
        return replace(self, index=self.index.repeat_interleave(times, 0), real=self.real.repeat_interleave(times, 0))

    def fitted_to(self, places: int) -> Layout:
        """This layout for a cache of ``places`` places: what follows or was cropped off the prompt is one to one."""
        rows, have = self.index.shape
        if places < have:
            return replace(
                self, index=self.index[:, :places], real=self.real[:, :places], width=self.width - (have - places)
            )
        return self.then(unchanged(rows, places - have, self.index.device))


def ranks(image: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which picture every placeholder belongs to, and its rank within that picture.

    Parameters
    ----------
    image : (B, T) bool, True at placeholders; row by row they are the pictures in order, which may adjoin.
    lengths : placeholders of every picture.

    Returns
    -------
    picture, rank : (B, T) int64 each; elsewhere they mean nothing.
    """
    ends = torch.tensor(lengths, device=image.device).cumsum(0)
    flat = (image.flatten().cumsum(0) - 1).view_as(image)
    picture = torch.bucketize(flat, ends, right=True).clamp(max=len(lengths) - 1)
    return picture, flat - (ends - torch.tensor(lengths, device=image.device))[picture]


def shorten(image: Tensor, mask: Tensor, full: Sequence[int], kept: Sequence[int]) -> Layout:
    """Keep the first placeholders of every picture, and drop padding that is not needed any more.

    The columns behind the last picture of every row stay the last columns, padding included: a slice from the end has
    the tokens that it has in the caller's prompt. In front of them padding stays on the side where a row has it.

    Parameters
    ----------
    image : (B, T) bool, True at placeholders; row by row they are the pictures in order, which may adjoin.
    mask : (B, T), 0 at the caller's padding.
    full, kept : placeholders of every picture before and after.

    Raises
    ------
    ValueError : the placeholders of a row are not those of whole pictures.
    """
    counts = image.sum(1)
    ends = torch.tensor([0, *full], device=image.device).cumsum(0)
    if not bool(torch.isin(counts.cumsum(0), ends).all()):
        expected = f"multiples of {full[0]}" if len({*full}) == 1 else f"those of pictures with {list(full)}"
        raise ValueError(
            f"rows hold {counts.tolist()} image placeholders, expected {expected}: "
            "use the model's own processor, one placeholder text per picture"
        )
    picture, rank = ranks(image, full)
    stays = (mask != 0) & (~image | (rank < torch.tensor(kept, device=image.device)[picture]))
    column = torch.arange(image.shape[1], device=image.device)
    tail = int(torch.where(image, column, -1).max()) + 1  # the first of the columns that all rows have behind pictures
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
    """The arguments of ``kwargs`` with every per-token tensor in the layout of its width.

    Raises
    ------
    ValueError : an attention mask that is not (B, T), or of a width that no layout has.
    """
    by_width = {layout.width: layout for layout in layouts}
    taken = dict(kwargs)
    for name, fill in {"input_ids": pad, **FILL, "shift_labels": IGNORED}.items():
        x = kwargs.get(name)
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dim() != (3 if name == "inputs_embeds" else 2) or x.shape[1] not in by_width:
            raise ValueError(
                f"{name} of shape {tuple(getattr(x, 'shape', ())) or type(x).__name__} cannot be shortened; "
                f"pass the processor's, with {' or '.join(map(str, by_width))} columns"
            )
        layout = by_width[x.shape[1]]
        taken[name] = layout.take_shifted(x) if name == "shift_labels" else layout.take(x, fill)
    return taken


def caller_positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) of the columns of a prompt; padding (0 in ``mask``) does not count."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def missing_before(image: Tensor, full: Sequence[int], kept: Sequence[int]) -> Tensor:
    """(B, T) how many placeholders are missing in front of each column of a short prompt, of pictures in its row."""
    picture, rank = ranks(image, kept)
    kept, full = (torch.tensor(lengths, device=image.device) for lengths in (kept, full))
    gap = (full - kept)[picture].masked_fill(~image | (rank != kept[picture] - 1), 0)
    return gap.cumsum(1) - gap


def place_pictures(positions: Tensor, image: Tensor, first: Sequence[Tensor]) -> Tensor:
    """Give each visual token the position of the first patch of its group.

    Parameters
    ----------
    positions : (B, S) position ids, where the placeholders of a picture count up from the position of its first one.
    image : (B, S) bool, True at placeholders; row by row they are the pictures in order. B may be a multiple of the
        rows that the pictures were given for (beams): then every row is repeated in place.
    first : per picture (K,) the first patch of every visual token, counted within its picture.
    """
    shift = [place - torch.arange(len(place), device=place.device) for place in first]
    return positions + at_placeholders(image, [s.to(positions.device) for s in shift])


def at_placeholders(image: Tensor, values: Sequence[Tensor]) -> Tensor:
    """(B, S) with ``values`` (K,) of each picture at its placeholders, 0 elsewhere; see `place_pictures`."""
    flat = torch.cat(tuple(values))
    counts = image.sum(1)
    repeats = max(1, int(counts.sum()) // len(flat))
    row_start = counts[::repeats].cumsum(0) - counts[::repeats]
    rank = (image.long().cumsum(1) - 1).clamp(min=0)
    at = row_start.repeat_interleave(repeats)[:, None] + rank
    return flat[at.clamp(max=len(flat) - 1)].masked_fill(~image, 0)


def restore_prompt(sequences: Tensor, prompt: Tensor, short: int) -> Tensor:
    """Put ``prompt`` (B, T) in front of ``sequences`` (B * n, S + new) in place of their own (S = ``short``)."""
    repeated = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    return torch.cat([repeated, sequences[:, short:]], dim=1)
