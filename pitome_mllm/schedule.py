"""How many tokens every block leaves. `Schedule.counts` is the one source of truth.

The tower, the placeholders, the costs and servers all ask it, so that they cannot disagree.
"""

from __future__ import annotations

import math
import numbers
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable
from fractions import Fraction

from .errors import UserError
from .methods.reducer import is_count, is_number

MaxRemovable = Callable[[int], int]

# The part of the blocks, as shares of their number, over which tokens go; every block of it removes the same share.
SHAPES: dict[str, tuple[float, float]] = {
    "equal": (0, 1),
    "early": (0, 2 / 3),
    "delayed": (1 / 3, 1),
    "last": (1, 1),  # as late as possible
}
EVERY = "every"
FRONT = 0.75  # few merge points of shape "equal" are in this part of a tower ...
DEEP = 12  # ... of so many blocks or more, and none in its first block


def half(n: int) -> int:
    """The most tokens a bipartite method removes of ``n`` at once."""
    return n // 2


def gentle(max_removable: MaxRemovable) -> MaxRemovable:
    """At most 40 % of the tokens, or one of them, within ``max_removable``: few merges lose little by that."""
    return lambda n: min(max(2 * n // 5, 1), max_removable(n))


class Schedule:
    """Token counts over the merging blocks.

    Parameters
    ----------
    keep : int or float, optional
        Patch tokens after the last block; an int is a count, a float in (0, 1] a fraction.
    ratio : float, optional
        Share of its tokens that every block keeps, in (0, 1]; the paper's rho. A block of N tokens loses
        floor(N - rho N), at most half.
    counts : iterable of int, optional
        Tokens after each block, explicitly.
    shape : str, default 'equal'
        The token schedule: over which part of the blocks tokens go, a name in `SHAPES`. It goes with ``keep``.
    merges : int or str, optional
        How many of the blocks merge, each an equal share, at places that ``shape`` decides; "every" (None) = all. More
        do where one would remove over 40 %. It goes with ``keep``.

    Raises
    ------
    ValueError
        Two of keep, ratio and counts; merges or a shape with ratio or counts; a value out of range; an unknown shape.
    """

    def __init__(
        self,
        keep: int | float | None = None,
        ratio: float | None = None,
        counts: Iterable[int] | None = None,
        shape: str = "equal",
        merges: int | str | None = None,
    ) -> None:
        given = {k: v for k, v in {"keep": keep, "ratio": ratio, "counts": counts}.items() if v is not None}
        if len(given) > 1:
            raise UserError(f"got {' and '.join(f'{k}={v}' for k, v in given.items())}: give one of them only")
        if keep is not None:
            _check_keep(keep)
        if ratio is not None and not (is_number(ratio) and 0 < ratio <= 1):
            raise UserError(f"ratio={ratio!r} is not possible; choose a number above 0 and up to 1, such as 0.9")
        if shape not in SHAPES:
            raise UserError(f"unknown schedule {shape!r}; choose one of {', '.join(SHAPES)}")
        for name in given.keys() - {"keep"} if shape != "equal" else ():
            raise UserError(f"{name} already says what every block keeps; schedule={shape!r} goes with keep")
        check_merges(merges, ratio, counts)
        self.keep = keep
        self.ratio = ratio
        self.explicit = None if counts is None else _integers(counts)
        self.shape = shape
        self.merges = None if isinstance(merges, str) else merges

    def counts(self, tokens: int, blocks: int, max_removable: MaxRemovable | None = None) -> list[int]:
        """Patch tokens left after each of ``blocks`` merging blocks, class tokens not counted.

        Parameters
        ----------
        tokens : int
            Patch tokens before the first block.
        blocks : int
            Number of merging blocks.
        max_removable : callable, optional
            The most that one step removes of n tokens, `Reducer.max_removable`; None = half.

        Raises
        ------
        ValueError
            The request cannot be reached; names what can.
        """
        max_removable = half if max_removable is None else max_removable
        if self.ratio is not None:
            return _by_ratio(tokens, blocks, self.ratio, max_removable)
        if self.explicit is not None:
            return _check_explicit(self.explicit, tokens, blocks, max_removable)
        keep = target_count(self.keep, tokens)
        if self.merges is not None:
            return _at_points(tokens, blocks, keep, self.shape, max_removable, self.merges)
        return _towards(tokens, blocks, keep, self.shape, max_removable)


def target_count(keep: int | float | None, tokens: int, name: str = "keep") -> int:
    """``keep`` (count, fraction or None = all) as a count of ``tokens``; ``name`` is what the caller calls it."""
    if keep is None:
        return tokens
    _check_keep(keep, name)
    count = int(keep) if isinstance(keep, numbers.Integral) else max(1, round(keep * tokens))
    if count > tokens:
        raise UserError(f"{name}={keep} is more than the {tokens} tokens there are; choose 1 to {tokens}")
    return count


def picture_count(keep: int | float | None, tokens: int) -> int:
    """``keep``, see `target_count`, as a count of one picture's ``tokens``, which may be fewer than asked for."""
    if keep is None:
        return tokens
    _check_keep(keep)
    return min(int(keep), tokens) if isinstance(keep, numbers.Integral) else max(1, round(keep * tokens))


def projector_counts(tokens: int, keep: int, max_removable: MaxRemovable = half) -> list[int]:
    """Counts after each of the fewest steps from ``tokens`` down to ``keep``, in equal shares; [] if there are none."""
    steps, reached = 0, tokens
    while reached > keep:
        if max_removable(reached) < 1:
            raise UserError(f"cannot go from {tokens} to {keep} tokens: {reached} is the fewest possible")
        steps, reached = steps + 1, reached - max_removable(reached)
    return _towards(tokens, steps, keep, "equal", max_removable)


def _by_ratio(tokens: int, blocks: int, ratio: float, max_removable: MaxRemovable) -> list[int]:
    left, counts = Fraction(str(ratio)), []
    for _ in range(blocks):
        tokens -= min(math.floor(tokens - left * tokens), max_removable(tokens))
        counts.append(tokens)
    return counts


def _towards(tokens: int, blocks: int, keep: int, shape: str, max_removable: MaxRemovable) -> list[int]:
    """Follow the shape as closely as the limit per block allows, and land exactly on ``keep``."""
    least = fewest(tokens, blocks, max_removable)
    if keep < least:
        raise UserError(
            f"cannot reach {keep} of {tokens} tokens in {blocks} blocks: {least} to {tokens} are possible; "
            "keep more, or merge in more places"
        )
    ceilings = [keep]  # per block, from the last one: the most tokens from which the rest of the way is possible
    while len(ceilings) < blocks:
        ceilings.append(bisect_right(range(tokens + 1), ceilings[-1], key=lambda n: n - max_removable(n)) - 1)
    (begin, end), first, counts = SHAPES[shape], tokens, []
    for block in range(1, blocks + 1):
        part = (block / blocks - begin) / (end - begin) if begin < end else block // blocks
        wanted = round(first * (keep / first) ** min(max(part, 0), 1))
        tokens = max(min(wanted, ceilings[blocks - block], tokens), tokens - max_removable(tokens))
        counts.append(tokens)
    return counts


def _at_points(tokens: int, blocks: int, keep: int, shape: str, max_removable: MaxRemovable, merges: int) -> list[int]:
    """Counts where only ``merges`` of the blocks remove tokens, or as many more as keep each at 40 %."""
    limit = gentle(max_removable)
    merges = next((m for m in range(merges, blocks) if fewest(tokens, m, limit) <= keep), blocks)
    if merges == blocks:
        reached = fewest(tokens, blocks, limit) <= keep
        return _towards(tokens, blocks, keep, shape, limit if reached else max_removable)
    points = _merge_points(merges, blocks, shape)
    after = dict(zip(points, _towards(tokens, merges, keep, "equal", limit)))
    counts = []
    for block in range(blocks):
        tokens = after.get(block, tokens)
        counts.append(tokens)
    return counts


def _merge_points(merges: int, blocks: int, shape: str = "equal") -> list[int]:
    """Indices of ``merges`` of the blocks, at equal distances over the part of them that ``shape`` stands for."""
    begin, end = SHAPES[shape]
    first = max(math.ceil(begin * blocks), int(blocks >= DEEP))
    last = math.floor((FRONT if shape == "equal" and blocks >= DEEP else end) * blocks) - 1
    last = max(last, min(first + merges, blocks) - 1)  # where the part has fewer blocks, more after it ...
    first = min(first, last - merges + 1)  # ... or, at the end, before it
    return [first + round(point * (last - first) / max(merges - 1, 1)) for point in range(merges)]


def fewest(tokens: int, merges: int, max_removable: MaxRemovable) -> int:
    """The smallest count that so many merges can leave."""
    for _ in range(merges):
        tokens -= max_removable(tokens)
    return tokens


def _check_explicit(counts: list[int], tokens: int, blocks: int, max_removable: MaxRemovable) -> list[int]:
    if len(counts) != blocks:
        raise UserError(f"got {len(counts)} counts for {blocks} merging blocks; give one count per block")
    for block, (before, after) in enumerate(zip([tokens, *counts], counts)):
        fewest = before - max_removable(before)
        if not max(fewest, 1) <= after <= before:
            raise UserError(
                f"counts[{block}]={after} cannot follow {before} tokens; {max(fewest, 1)} to {before} are possible"
            )
    return list(counts)


def check_merges(merges: object, ratio: object = None, counts: object = None) -> None:
    """ValueError unless ``merges`` is None, "every" or a number from 1, and None beside ratio or counts."""
    if merges is None:
        return
    for name, value in (("ratio", ratio), ("counts", counts)):
        if value is not None:
            raise UserError(f"{name} says what every block removes, got merges={merges!r} too; give merges with keep")
    if not is_count(merges) and not (isinstance(merges, str) and merges == EVERY):
        raise UserError(f"merges={merges!r} is not possible; choose a number of merge points from 1, or {EVERY!r}")


def _check_keep(keep: object, name: str = "keep") -> None:
    """ValueError unless ``keep`` is a count of at least one or a fraction above 0 and up to 1."""
    if not is_count(keep) and not (is_number(keep) and not isinstance(keep, numbers.Integral) and 0 < keep <= 1):
        raise UserError(
            f"{name}={keep!r} is not possible; choose an int from 1 (a count) or a float in (0, 1] (a share)"
        )


def _integers(counts: Iterable[int]) -> list[int]:
    """``counts`` as a list; ValueError unless it is a sequence of whole numbers."""
    try:
        if any(isinstance(count, bool) for count in counts):
            raise TypeError
        return [operator.index(count) for count in counts]
    except TypeError:
        raise UserError(
            f"counts={counts!r} is not a sequence of whole numbers; give the tokens left after each block"
        ) from None
