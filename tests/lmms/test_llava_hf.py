"""With all tokens kept the plug-in answers like lmms-eval's own LLaVA."""

import pytest
from evaluating import answers, evaluate

from pitome_mllm.loading import TINY

TASKS = ["pitome_scenes_colour", "pitome_scenes_relation", "pitome_scenes_count"]


@pytest.mark.llava_hf
@pytest.mark.parametrize("merging", ["method=none", "method=pitome,keep=576", "keep=1.0"])
@pytest.mark.parametrize("force_simple", [True, False])
def test_all_tokens_give_the_answers_of_the_built_in_llava(merging, force_simple, built_in):
    ours = evaluate("pitome_llava", TASKS, model_args=f"pretrained=tiny,{merging}", limit=10, force_simple=force_simple)
    assert answers(ours) == answers(built_in)
    for task in TASKS:
        assert ours["results"][task]["exact_match,none"] == built_in["results"][task]["exact_match,none"] > 0.5


@pytest.fixture(scope="module")
def built_in():
    """lmms-eval's own, which takes one question at a time."""
    where = "device=cpu,device_map=cpu,dtype=float32"
    found = evaluate(
        "llava_hf", TASKS, model_args=f"pretrained={TINY},{where}", limit=10, batch_size=1, force_simple=True
    )
    assert "simple" in found["config"]["model_backend"] and all(answers(found).values())
    return found
