"""The fused merge against the reference: the same groups, and the same bits of what they become."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from rows import clear, exact, reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pitome_mllm.methods import get_method, kernels, triton_kernels
from pitome_mllm.methods.kernels import FusedMerge
from pitome_mllm.methods.merge import log_sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = {
    "paper": ("pitome", {}),
    "elu": ("pitome", {"energy": "elu", "margin": 0.45, "alpha": 0.5}),
    "no alpha": ("pitome", {"margin": 0.6, "alpha": 0.0}),
    "low margin": ("pitome", {"margin": -0.2, "energy": "elu"}),
    "half protected": ("pitome", {"protect": 0.5}),
    "bsm": ("pitome-bsm", {}),
    "tome": ("tome", {}),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_option = pytest.mark.parametrize("name, options", OPTIONS.values(), ids=OPTIONS)


def assert_same(merge, expected) -> None:
    """The same decision, in all that says it."""
    assert isinstance(merge, FusedMerge)
    assert merge.count == expected.count and merge.group.dtype == torch.int64
    assert torch.equal(merge.group.cpu(), expected.group)
    assert torch.equal(merge._first.cpu(), expected._first) and torch.equal(merge._rest.cpu(), expected._rest)
    if expected.energy is not None:
        torch.testing.assert_close(merge.energy.cpu(), expected.energy, atol=1e-6, rtol=1e-5)


@each_option
@pytest.mark.parametrize(
    "dtype, r, protected, depth", [("float32", 9, 1, 0.3), ("bfloat16", 20, 0, 0.0), ("float16", 1, 2, 1.0)]
)
def test_clear_decisions_are_those_of_the_reference(device, switch, name, options, dtype, r, protected, depth):
    dtype = DTYPES[dtype]
    reducer, given = get_method(name, **options), {"protected": protected, "depth": depth}
    metric = clear(reducer, 2, 41 + protected, 24, r, dtype, **given)
    assert_same(reducer.match(metric.to(device), r, **given), reference(switch, reducer, metric, r, **given))


@pytest.mark.parametrize("name", ["pitome", "tome"])
def test_a_merge_goes_with_the_last_who_asks_for_it(device, name):
    """Without the garbage collector, which comes late: a merge holds memory of the GPU."""
    gc.disable()
    try:
        merge = get_method(name).match(exact(1, 66, 16, 9, 0).to(device), 9)
        memory = weakref.ref(merge._memory)
        assert merge.in_source_order().count == 57
        del merge
        assert memory() is None
    finally:
        gc.enable()


SIZES = [
    # dtype, batch, tokens, width, kinds, r, protected
    ("float32", 1, 2, 16, 2, 1, 0),
    ("float16", 3, 3, 16, 2, 1, 1),
    ("float32", 2, 66, 80, 9, 17, 1),
    ("bfloat16", 1, 257, 1280, 400, 100, 1),
    ("float16", 1, 577, 64, 40, 150, 1),
    ("bfloat16", 1, 577, 64, 3, 288, 1),
]


@pytest.mark.parametrize("name, options", [OPTIONS["no alpha"], OPTIONS["tome"]], ids=["pitome", "tome"])
@pytest.mark.parametrize("dtype, batch, tokens, width, kinds, r, protected", SIZES)
def test_ties_go_to_the_first_token_at_every_size(
    device, switch, name, options, dtype, batch, tokens, width, kinds, r, protected
):
    metric = exact(batch, tokens, width, kinds, seed=tokens).to(DTYPES[dtype])
    reducer = get_method(name, **options)
    merge = reducer.match(metric.to(device), r, protected=protected)
    assert_same(merge, reference(switch, reducer, metric, r, protected=protected))


def test_many_tokens(device, switch):
    metric = exact(1, 1500, 16, 60, seed=3)
    reducer = get_method("pitome", margin=0.6, alpha=0.0, protect=0.5)
    merge = reducer.match(metric.to(device), 400, protected=1)
    assert_same(merge, reference(switch, reducer, metric, 400, protected=1))


@pytest.mark.parametrize("name", ["pitome", "tome"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, 1e30, 1e-40])
def test_rows_without_a_length_are_similar_to_nothing(device, switch, name, bad):
    reducer = get_method(name)
    metric = clear(reducer, 2, 37, 24, 9, torch.float32, protected=1, depth=0.3)
    for token in (0, 5, 6, 20):
        metric[:, token, : 1 if not math.isfinite(bad) else None] = bad
    options = {"protected": 1, "depth": 0.3}
    assert_same(reducer.match(metric.to(device), 9, **options), reference(switch, reducer, metric, 9, **options))


def merged(device: str, dtype: torch.dtype = torch.float32, r: int = 30):
    """A fused merge of (2, 97, 16), and features (2, 97, 48) and sizes (2, 97, 1)."""
    random = torch.Generator().manual_seed(7)
    metric = exact(2, 97, 16, 5, seed=1).to(device)  # large groups
    x = torch.randn(2, 97, 48, generator=random).to(device, dtype)
    size = torch.randint(1, 9, (2, 97, 1), generator=random).float().to(device)
    return get_method("pitome").match(metric, r, protected=1), x, size


@each_dtype
@pytest.mark.parametrize("sized", [True, False])
def test_what_groups_become_has_the_bits_of_the_reference(device, dtype, sized):
    merge, x, size = merged(device, dtype)
    features, sizes = merge.reduce(x, size if sized else None)
    expected, expected_sizes = super(FusedMerge, merge).reduce(x, size if sized else None)
    assert features.dtype == dtype and sizes.dtype == torch.float32
    assert torch.equal(sizes, expected_sizes) and sizes.max() > 8
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off instead of rounding
        torch.testing.assert_close(features, expected, atol=1e-3, rtol=2**-7)
    else:
        assert torch.equal(features, expected)
    alone = (merge.reduce(x)[1] == 1)[..., 0]
    assert torch.equal(features[alone], x.gather(1, merge._first[..., None].expand(-1, -1, 48))[alone])


@each_dtype
@pytest.mark.parametrize("r", [30, 25])
def test_what_attention_adds_is_written_along(device, dtype, r):
    merge, x, size = merged(device, dtype, r)
    sizes = merge.reduce(x, size)[1]
    expected = log_sizes(sizes, dtype)
    with Operations() as torchs:
        logs = merge.log_sizes(sizes, dtype)
    assert not torchs.seen and logs.shape == (2, 1, 1, 97 - r) and logs.stride() == expected.stride()
    torch.testing.assert_close(logs, expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)
    whole = logs.as_strided((2, logs.stride(0)), (logs.stride(0), 1))
    assert not whole[:, 97 - r :].any()
    again = merge.log_sizes(sizes, dtype)  # which was not kept
    torch.testing.assert_close(again, expected, atol=0, rtol=0)


def test_what_attention_adds_of_other_sizes_or_in_another_dtype_is_torchs(device):
    merge, x, size = merged(device)
    sizes = merge.reduce(x, size)[1]
    assert torch.equal(merge.log_sizes(2 * sizes, torch.float32), log_sizes(2 * sizes, torch.float32))
    merge.reduce(x, size)
    assert torch.equal(merge.log_sizes(sizes, torch.bfloat16), log_sizes(sizes, torch.bfloat16))


def test_slices_wide_features_and_float64_reduce_too(device):
    merge, x, size = merged(device)
    wide = torch.randn(2, 97, 2000, device=device)[..., 100:1300]
    for features in (wide, x.double(), x.mT.contiguous().mT, size):
        seen, expected = merge.reduce(features, size), super(FusedMerge, merge).reduce(features, size)
        if features is size:  # of single numbers torch adds several at once on a GPU
            torch.testing.assert_close(seen[0], expected[0])
        else:
            assert torch.equal(seen[0], expected[0])
        assert torch.equal(seen[1], expected[1])


def test_means_in_which_tokens_count_once(device):
    merge, x, size = merged(device)
    seen, expected = merge.reduce_evenly(x, size), super(FusedMerge, merge).reduce_evenly(x, size)
    assert torch.equal(seen[0], expected[0]) and torch.equal(seen[1], expected[1])
    assert not torch.equal(seen[0], merge.reduce(x, size)[0])


class Subclass(torch.Tensor):
    pass


MISFITS = {
    "few tokens": lambda x, size: (x[:, :60], size),
    "many tokens": lambda x, size: (x.repeat(1, 2, 1), size),
    "another batch": lambda x, size: (x[:1], size),
    "few sizes": lambda x, size: (x, size[:, :60]),
    "sizes of one": lambda x, size: (x, size[:1]),
    "sizes elsewhere": lambda x, size: (x, size.to("meta")),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_features_and_sizes_that_do_not_fit_go_to_torch(device, misfit):
    """Which refuses them; the kernel would read, or write, beyond their memory."""
    merge, x, size = merged(device)
    given = MISFITS[misfit](x, size)
    assert merge._fused(x, size) and not merge._fused(*given)
    if device == "cpu" and misfit != "sizes elsewhere":  # on a GPU an index out of bounds ends the process
        with pytest.raises((IndexError, RuntimeError)):
            merge.reduce(*given)


def test_what_the_kernel_knows_nothing_of_is_combined_by_torch(device):
    merge, x, size = merged(device)
    assert type(merge.reduce(x.as_subclass(Subclass))[0]) is Subclass
    assert merge.reduce(x, size.requires_grad_())[1].requires_grad
    weight = torch.rand(2, 97, device=device) + 0.5
    inside = torch.nn.functional.one_hot(merge.group).mT * weight[:, None]
    means = merge.weighted_by(weight).reduce(x)[0]
    torch.testing.assert_close(means, inside @ x / inside.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_broken_feature_stays_inside_its_group(device):
    merge, x, size = merged(device)
    x[0, 40] = math.nan
    broken = torch.zeros(2, merge.count, dtype=torch.bool, device=device)
    broken[0, merge.group[0, 40]] = True
    assert torch.equal(merge.reduce(x, size)[0].isfinite().all(-1), ~broken)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_for_gradients_is_decided_alike(device, reentrant):
    reducer, made = get_method("pitome"), []
    metric = exact(2, 97, 16, 5, seed=1).to(device).requires_grad_()

    def merged(x: torch.Tensor) -> torch.Tensor:
        made.append(reducer.match(1 * x, 30, protected=1))
        return made[-1].reduce(x)[0]

    checkpoint(merged, metric, use_reentrant=reentrant).sum().backward()
    assert len(made) == 2 and all(isinstance(merge, FusedMerge) for merge in made)
    torch.testing.assert_close(metric.grad.sum(1), torch.full((2, 16), 67.0, device=device))


@pytest.mark.parametrize("published", [False, True])
def test_merges_that_were_looked_at_are_saved_and_copied(device, published):
    merge, x, size = merged(device)
    merge = merge.in_source_order() if published else merge
    (means, sizes), looked_at = merge.reduce(x, size), (merge.group, merge.energy, merge.by_energy, merge._rest)
    saved = io.BytesIO()
    torch.save(merge, saved)
    saved.seek(0)
    for again in (torch.load(saved, weights_only=False), copy.deepcopy(merge)):
        for seen, expected in zip((again.group, again.energy, again.by_energy, again._rest), looked_at):
            assert torch.equal(seen, expected)
        assert torch.equal(again.reduce(x, size)[0], means)
    assert torch.equal(copy.deepcopy(merge).log_sizes(sizes, x.dtype), log_sizes(sizes, x.dtype))  # torch's: not kept


@pytest.mark.parametrize("name", ["pitome", "tome"])
def test_the_order_of_the_published_code(device, switch, name):
    reducer = get_method(name)
    metric = clear(reducer, 2, 41, 24, 9, torch.float32, protected=1)
    merge = reducer.match(metric.to(device), 9, protected=1).in_source_order()
    expected = reference(switch, reducer, metric, 9, protected=1).in_source_order()
    assert torch.equal(merge.group.cpu(), expected.group)
    seen, sizes = merge.reduce(metric.to(device))
    assert torch.equal(seen.cpu(), expected.reduce(metric)[0])
    with Operations() as torchs:
        merge.log_sizes(sizes, torch.float32)
    assert not torchs.seen


def test_merges_in_a_row_compose(device, switch):
    reducer, metric = get_method("pitome", margin=0.6, alpha=0.0), exact(2, 41, 16, 9, seed=2).to(device)
    first = reducer.match(metric, 9, protected=1)
    later = reducer.match(first.reduce(metric)[0], 9, protected=1)
    assert isinstance(first, FusedMerge) and isinstance(later, FusedMerge)
    merge = first.then(later)
    y = torch.arange(41.0, device=device)[None, :, None].expand(2, -1, 1)
    means, sizes = merge.reduce(y)
    inside = torch.nn.functional.one_hot(merge.group).float().mT
    torch.testing.assert_close(sizes, inside.sum(-1, keepdim=True))
    torch.testing.assert_close(means, inside @ y / sizes)


class Operations(TorchDispatchMode):
    """Counts the operations of torch that launch something: neither views nor empty memory."""

    FREE = ("empty", "view", "slice", "select", "transpose", "expand", "alias", "detach", "unbind", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(word in str(function) for word in self.FREE):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pitome", "pitome-bsm", "tome"])
def test_a_merge_takes_few_launches(monkeypatch, name):
    """From the keys on up to what attention adds, with sizes, and counting what torch itself launches."""
    launched = []
    for kernel in ("prepare", "add_energies", "rank", "match", "place", "combine"):
        monkeypatch.setattr(triton_kernels, kernel, Noted(kernel, launched))
    keys, size = torch.randn(1, 577, 16, 64), torch.ones(1, 577, 1)
    kernels._device_reason(keys.device)
    launched.clear()
    with Operations() as torchs:
        merge = get_method(name).match(keys.mean(2), 58, protected=1, size=size)
        sizes = merge.reduce_evenly(torch.randn(1, 577, 1024), size)[1]
        merge.log_sizes(sizes, torch.float32)
    torchs.seen.remove("aten.randn.default")
    assert torchs.seen == ["aten.mean.dim"]
    assert len(launched) == (4 if name == "tome" else 6)


class Noted:
    """A kernel that only notes that it was launched."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


def test_transforms_of_torch_take_the_torch_path(switch):
    switch("auto")
    reducer, x = get_method("pitome"), torch.randn(3, 1, 9, 16)

    def merged(x):
        return reducer.match(x, 3).reduce(x)[0]

    fused = kernels.merge(x[0], 3, 0)
    kernels_used = torch.vmap(lambda x: fused.reduce(x)[0])(x)
    assert torch.equal(torch.vmap(merged)(x), torch.stack([merged(each) for each in x]))
    assert torch.equal(kernels_used, torch.stack([fused.reduce(each)[0] for each in x]))


def test_what_cannot_be_fused_is_torchs_or_an_error(switch):
    reducer, metric = get_method("pitome"), torch.randn(1, 9, 16)
    for impossible in (metric.double(), torch.randn(1, 2100, 16)):
        with pytest.raises(RuntimeError, match="PITOME_KERNELS=fused, but"):
            reducer.match(impossible, 3)
    for choice in ("auto", "torch"):
        switch(choice)
        assert not isinstance(reducer.match(metric, 3), FusedMerge)
    switch("fused")
    assert isinstance(reducer.match(metric, 3), FusedMerge)


def refused(kind: type[Exception], again: bool):
    """What stands in for `triton_kernels.launcher`: raises where a launch is made first, or again."""

    def launch(*_):
        raise kind("not so")

    return (lambda compiled, grid: launch) if again else launch


def idle(compiled, grid):
    """Stands in for it too: a launch that does nothing when it is made again."""
    return lambda *_: None


PROBES = {
    "all goes well": (triton_kernels.launcher, ""),
    "it does not compile": (refused(triton_kernels.TritonError, False), "Triton cannot compile (not so)"),
    "another launcher": (refused(TypeError, True), "Triton's launcher is another (not so)"),
    "none": (refused(AttributeError, False), "Triton's launcher is another (not so)"),
    "nothing is launched": (idle, "two equal tokens did not become one"),
}


@pytest.fixture
def nothing_launched():
    for kept in (kernels._decision, kernels._combination):
        kept.cache_clear()
    torch.use_deterministic_algorithms(True)  # empty memory is filled, and holds nothing that was right before
    yield
    torch.use_deterministic_algorithms(False)
    for kept in (kernels._decision, kernels._combination):
        kept.cache_clear()


@pytest.mark.parametrize("launcher, reason", PROBES.values(), ids=PROBES)
def test_a_gpu_is_asked_once_whether_it_merges_first_and_again(monkeypatch, nothing_launched, launcher, reason):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_kernels, "launcher", launcher)
    assert kernels._device_reason.__wrapped__(torch.device("cuda:0")) == reason


def test_a_gpu_is_not_asked_about_what_is_no_ordinary_tensor(monkeypatch, switch, caplog):
    switch("auto")
    kernels._say.cache_clear()
    monkeypatch.setattr(kernels, "_device_reason", lambda device: pytest.fail("it was asked"))
    with FakeTensorMode():
        assert not any(kernels.fuses(torch.empty(1, 9, 16, device="cuda")) for _ in range(2))
    assert caplog.messages == ["merging by torch's operations: a FakeTensor has no memory of its own"]


def test_within_torch_compile_merges_are_torchs(monkeypatch):
    reducer, x = get_method("pitome"), torch.randn(1, 9, 16)
    fused = reducer.match(x, 3)
    expected = fused.reduce(x)[0]
    monkeypatch.setattr(kernels, "merge", lambda *_: pytest.fail("it was fused"))
    monkeypatch.setattr(FusedMerge, "_combine", lambda *_: pytest.fail("it was fused"))
    for merged in (lambda x: reducer.match(x, 3).reduce(x)[0], lambda x: fused.reduce(x)[0]):
        torch.testing.assert_close(torch.compile(merged, backend="eager")(x), expected)
