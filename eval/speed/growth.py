"""How merging grows with the number of tokens: ``python -m pitome_mllm_eval.speed.growth``.

One merge of PiToMe at ratio 0.9, widths of CLIP-L (keys 64, features 1024), random tokens, one thread. What works on
pairs of tokens (energies, and the match of A with B) and what works on tokens is timed apart, and memory is that of the
tensors which are alive at once, with energies in blocks of rows as they come and all at once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from pitome_mllm.methods import get_method
from pitome_mllm.methods.matching import most_similar_first, ranked, unit_metric
from pitome_mllm.methods.merge import Merge
from pitome_mllm.methods.pitome import BLOCK

from ..accuracy.costs import yardstick
from ..documents import write_csv
from .clocks import Call, in_turns, quantiles
from .peak import Alive
from .rows import stamp

RESULTS = Path(__file__).parents[1] / "results" / "growth.csv"
TOKENS = (72, 144, 288, 576, 1152, 2304, 4608, 9216)
KEYS, WIDTH, REMOVED, DEPTH = 64, 1024, 0.1, 0.5


@dataclass(frozen=True)
class Growth:
    """One number of tokens: milliseconds with percentiles, and megabytes (10^6) of tensors alive at most.

    ``pairs_ms`` is the part that works on pairs of tokens, ``pairs_share`` its share of the whole.
    ``floor_ms`` is the `yardstick`.
    ``whole_mb`` is the memory with all energies at once.
    """

    tokens: int
    removed: int
    ms: float
    p20: float
    p80: float
    pairs_ms: float
    pairs_share: float
    floor_ms: float
    mb: float
    whole_mb: float
    repeats: int


class Merging:
    """One merge of ``tokens`` tokens, and the part of it that works on pairs."""

    def __init__(self, tokens: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.keys = torch.randn(1, tokens, KEYS, generator=random)
        self.x = torch.randn(1, tokens, WIDTH, generator=random)
        self.removed, self.reducer = int(REMOVED * tokens), get_method("pitome")
        self.unit = unit_metric(self.keys)
        order = ranked(self.reducer.energy_of(self.unit, DEPTH))
        self.a, self.b = order[:, 0 : 2 * self.removed : 2], order[:, 1 : 2 * self.removed : 2]

    def whole(self) -> Merge:
        merge = self.reducer.match(self.keys, self.removed, depth=DEPTH)
        merge.reduce(self.x)
        return merge

    def pairs(self) -> None:
        self.reducer.energy_of(self.unit, DEPTH)
        most_similar_first(self.unit, self.a, self.b, self.removed)

    def floor(self) -> None:
        yardstick(self.x, KEYS, self.x.shape[1] - self.removed)

    def peak(self) -> float:
        """10^6 bytes that one merge holds at most, besides keys and features."""
        with Alive() as alive:
            self.whole()
        return alive.peak / 1e6


@torch.inference_mode()
def growth(tokens: int, repeats: int) -> Growth:
    """What one merge of so many tokens takes."""
    made = Merging(tokens)
    calls = {"whole": Call(made.whole), "pairs": Call(made.pairs), "floor": Call(made.floor)}
    taken = in_turns(calls, torch.device("cpu"), repeats, warmup=1)
    low, middle, high = quantiles(taken["whole"])
    pairs, share = quantiles(taken["pairs"])[1], quantiles([p / w for p, w in zip(taken["pairs"], taken["whole"])])[1]
    floor, bounded = quantiles(taken["floor"])[1], made.peak()
    with patch.dict(BLOCK, cpu=2**62):
        whole = made.peak()
    times = [round(value, 3) for value in (middle, low, high, pairs, share, floor)]
    return Growth(tokens, made.removed, *times, round(bounded, 1), round(whole, 1), repeats)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    args = parser.parse_args(argv)
    about = stamp(parser, args.out)
    torch.set_num_threads(1)
    found = [growth(tokens, args.repeats) for tokens in track(args.tokens, "tokens")]
    write_csv(args.out, found, about)


if __name__ == "__main__":
    main()
