"""Comparisons that several test files need."""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import torch
from by_hand import Reference, Tokens, encode
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pitome_mllm import cli, get_method

TOLERANCE = 1e-4  # of logits, once the groups are equal


def command_line(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


@torch.no_grad()
def logits(model: nn.Module, inputs: Any, **options: Any) -> Tensor:
    return model(**inputs, **options).logits


def positions_of(model: nn.Module, inputs: Any, call: str) -> list[Tensor]:
    """The position ids that the LLM gets, call by call, in "forward" or in "generate" of one token."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    if call == "forward":
        logits(model, inputs)
    else:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return seen


def new_ids(model: nn.Module, inputs: Any, steps: int = 6, **options: Any) -> list[list[int]]:
    """The ids that greedy `generate` adds, sliced off as everybody does."""
    out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"]), "the caller's prompt must come back unchanged"
    return out[:, width:].tolist()


@torch.no_grad()
def merged_by_hand(plain: nn.Module, inputs: Any, counts: list[int], method: str = "pitome", **options: Any) -> Tokens:
    return encode(plain, inputs["pixel_values"], counts, get_method(method), **options)


def reference(
    plain: nn.Module,
    inputs: Any,
    counts: list[int],
    method: str = "pitome",
    calibration: str = "none",
    **options: Any,
) -> Reference:
    """What must come out, from the plain twin and a merge written out by hand."""
    tokens = merged_by_hand(plain, inputs, counts, method, **options)
    return Reference(plain, inputs, tokens, calibration)


def gaps(metric: Tensor, r: int, depth: float, protected: int = 1) -> tuple[float, float, float]:
    """By how much PiToMe decides in float64: energies apart, nearest targets apart, cosines off the margin."""
    unit = nn.functional.normalize(metric[:, protected:].double(), dim=-1)
    cosines, margin = unit @ unit.mT, 0.9 - 0.9 * depth
    values = torch.where(cosines >= margin, cosines, (cosines - margin).exp() - 1)
    energies, order = values.mean(-1).sort(descending=True, stable=True)
    a, b = order[:, 0 : 2 * r : 2, None], order[:, None, 1 : 2 * r : 2]
    best = cosines.gather(1, a.expand(-1, -1, cosines.shape[2])).gather(2, b.expand(-1, r, -1)).topk(2).values
    apart = (-energies.diff()[:, : 2 * r], best[..., 0] - best[..., 1], (cosines - margin).abs())
    return tuple(gap.min().item() for gap in apart)


class WideGaps:
    """PiToMe that fails where rounding, 6e-8 of a cosine in float32, may turn what it decides."""

    def match(self, metric: Tensor, r: int, *, depth: float, protected: int, **given: Any) -> Any:
        energies, targets, margin = gaps(metric, r, depth, protected)
        assert energies > 1e-7 and min(targets, margin) > 1e-6, (energies, targets, margin)
        return get_method("pitome").match(metric, r, depth=depth, protected=protected, **given)


@torch.no_grad()
def assert_wide_gaps(plain: nn.Module, inputs: Any, counts: list[int]) -> None:
    """What PiToMe decides for these pictures hangs on no machine's rounding."""
    encode(plain, inputs["pixel_values"], counts, WideGaps())


def assert_merged_like(handle: Any, tokens: Tokens) -> None:
    """The last run merged exactly as by hand: equal groups first, then sizes."""
    assert handle.stats is not None, "nothing ran"
    assert torch.equal(handle.stats.groups, tokens.groups)
    assert torch.equal(handle.stats.sizes, tokens.sizes)


def assert_row(logits: Tensor, expected: Tensor, side: str = "left") -> None:
    """One row of a possibly padded batch of logits equals the unpadded expectation (n, V)."""
    n = len(expected)
    seen = logits[-n:] if side == "left" else logits[:n]
    torch.testing.assert_close(seen, expected, atol=TOLERANCE, rtol=TOLERANCE, check_dtype=False)


def assert_works(
    handle: Any, model: nn.Module, plain: nn.Module, inputs: Any, method: str = "pitome", keep: int | None = None
) -> None:
    """One call that proves real merging: groups, sizes and logits of a single-row input equal the hand-made ones.

    ``keep`` where it differs from the handle's plan (inside `using`).
    """
    seen = logits(model, inputs)
    stats = handle.stats
    expected = reference(plain, inputs, stats.counts, method)
    assert_merged_like(handle, expected.tokens)
    assert (stats.method, stats.tokens_after) == (method, handle.plan.keep if keep is None else keep)
    assert keep is not None or list(stats.counts) == list(handle.plan.counts)
    assert_row(seen[0], expected.logits())


def is_plain(model: nn.Module, plain: nn.Module, inputs: Any) -> bool:
    """Logits are bit-identical to the plain model's."""
    return torch.equal(logits(model, inputs), logits(plain, inputs))


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Its `vars()`, without a forward that is its class's own: accelerate leaves that behind."""
    own = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
    return {name: value for name, value in vars(module).items() if not (own and name == "forward")}


def assert_same_modules(left: nn.Module, right: nn.Module) -> None:
    """Every module of both has the same class and the same `vars()`; hooks and functions compare by what they run."""
    pairs = list(zip(left.named_modules(), right.named_modules(), strict=True))
    for (name, a), (other, b) in pairs:
        assert name == other
        assert type(a) is type(b), f"{name}: {type(a)} is not {type(b)}"
        mine, others = attributes_of(a), attributes_of(b)
        assert set(mine) == set(others), f"{name}: {set(mine) ^ set(others)}"
        for key, value in mine.items():
            assert _fingerprint(value) == _fingerprint(others[key]), f"{name}.{key}"
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _fingerprint(value: Any) -> Any:
    """Something comparable that says what a value is, across two twin models."""
    if isinstance(value, dict):
        if all(isinstance(key, int) for key in value):  # hooks, keyed by a running number
            return [_fingerprint(item) for item in value.values()]
        return {key: _fingerprint(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return type(value), [_fingerprint(item) for item in value]
    if isinstance(value, (int, float, str, bytes, bool, type, type(None))):
        return value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if hasattr(value, "to_dict"):
        return type(value), value.to_dict()
    function = getattr(value, "__func__", value)
    return type(value), getattr(function, "__module__", None), getattr(function, "__qualname__", None)


class Operations(TorchDispatchMode):
    """Notes what runs, with the shapes of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Size | None]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen.append((str(function), getattr(result, "shape", None)))
        return result


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as these live; ``most`` is the most at once."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in chain(*known)}

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen and storage.nbytes():
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result
