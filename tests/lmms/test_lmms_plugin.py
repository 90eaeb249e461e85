"""The plug-in gives the Python API's answers, whatever the batch, the kind of request and the number of pictures."""

import pytest
import torch
from evaluating import COLOUR, COUNT, answers, by_hand, evaluate, request
from lmms_eval.models import get_model

from pitome_mllm import attach, estimate, load
from pitome_mllm_eval.benchmark import sets
from pitome_mllm_eval.lmms import scene_tasks
from pitome_mllm_eval.lmms.model import PitomeLlava, PitomeLlavaChat
from pitome_mllm_eval.lmms.results import EvaluationError

SETTINGS = {"method": "tome", "keep": 72}
GREEDY = {"max_new_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


@pytest.fixture
def make(loaded):
    """Plug-ins around one model; the last one is taken off at the end."""
    made = []

    def plug_in(cls=PitomeLlava, **options):
        for one in made:
            one.close()
        made.append(cls("tiny", loaded=loaded, **{"batch_size": 4, **options}))
        return made[-1]

    yield plug_in
    made[-1].close()


def test_it_is_found_by_its_name():
    assert get_model("pitome_llava") is PitomeLlavaChat
    assert get_model("pitome_llava", force_simple=True) is PitomeLlava
    assert get_model("pitome_vlm") is PitomeLlavaChat


def test_the_tasks_are_the_recorded_benchmark():
    from datasets import load_dataset

    from pitome_mllm_eval.benchmark.questions import CATEGORIES

    asked = []
    for category in CATEGORIES:
        file = str(scene_tasks.TASKS / "data" / f"{category}.parquet")
        stored = load_dataset("parquet", data_files={"test": file})["test"].to_list()
        assert stored == scene_tasks.rows(category)
        asked += [(row["scene"], category, row["question"], row["answer"]) for row in stored]
    assert all(scene_tasks.recorded("test")[row["scene"]] == row["sha256"] for row in stored)
    assert sorted(asked) == sorted((n, q.category, q.text, q.answer) for n, q in sets.questions("test"))
    assert len(asked) == 3360


def test_a_picture_of_another_benchmark_is_refused():
    with pytest.raises(RuntimeError, match="scene 3 .* is not that of this benchmark"):
        scene_tasks.picture({"scene": 3, "sha256": "0" * 64})


@pytest.mark.parametrize("model_args", ["method=tome,keep=72", "method=pitome,ratio=0.7", "keep=144", "method=none"])
def test_answers_are_those_of_the_python_api(model_args):
    results = evaluate("pitome_llava", [COLOUR, COUNT], model_args=f"pretrained=tiny,{model_args}", batch_size=1)
    settings = {k: v if k == "method" else float(v) for k, v in (part.split("=") for part in model_args.split(","))}
    settings = {k: int(v) if k == "keep" else v for k, v in settings.items()}
    settings = {} if settings.get("method") == "none" else settings
    given = answers(results)
    assert len(given) == 12
    for category, task in (("colour", COLOUR), ("count", COUNT)):
        for number, row in enumerate(scene_tasks.rows(category)[:6]):
            expected = by_hand(scene_tasks.picture(row), row["question"], **settings)
            assert given[task, number] == expected, row["question"]


def test_a_spread_model_with_eager_attention_answers_the_same():
    lm = PitomeLlava("tiny", device_map="auto", attn_implementation="eager", dtype="float32", **SETTINGS)
    assert lm.model.config.vision_config._attn_implementation == "eager"
    given = answers(evaluate(lm, [COLOUR], limit=3))
    rows = scene_tasks.rows("colour")[:3]
    assert list(given.values()) == [by_hand(scene_tasks.picture(row), row["question"], **SETTINGS) for row in rows]


@pytest.mark.parametrize("cls", [PitomeLlava, PitomeLlavaChat])
def test_a_batch_gives_the_answers_of_single_questions_where_groups_are_equal(make, cls, monkeypatch):
    groups = []
    plain = cls._generate

    def noting(self, asked):
        found = plain(self, asked)
        groups.extend(self.handle.stats.groups.clone())
        return found

    monkeypatch.setattr(cls, "_generate", noting)
    found = {}
    for size in (1, 8):
        groups.clear()
        found[size] = (answers(evaluate(make(cls, batch_size=size, **SETTINGS), [COLOUR, COUNT], limit=16)), [*groups])
    equal = [torch.equal(a, b) for a, b in zip(found[1][1], found[8][1], strict=True)]
    pairs = list(zip(found[1][0].items(), found[8][0].items(), strict=True))
    assert len(pairs) == len(equal) == 32 and sum(equal) > 24
    assert all(one == other for (one, other), same in zip(pairs, equal, strict=True) if same)


def test_questions_with_two_pictures_one_and_none_share_a_batch(make):
    pictures = [sets.scene(number)[0] for number in range(3)]
    documents = [[pictures[0], pictures[1]], [pictures[2]], []]
    texts = ["how many digits are there?", "is there a red star?", "what colour is the star?"]
    lm = make(**SETTINGS)
    lm.task_dict = {"own": {"test": documents}}
    asked = [request(number, text, GREEDY) for number, text in enumerate(texts)]
    found = lm.generate_until(asked)
    assert [one.text for one in found] == [by_hand(*pair, **SETTINGS) for pair in zip(documents, texts, strict=True)]
    visual = [one.token_counts.input_tokens for one in found]
    assert [count - visual[2] for count in visual] == [2 * 72, 72, 0]  # the texts have as many words
    found = lm.meter.gather(1)
    assert found["visual_tokens"] == 72 and found["visual_tokens_per_picture"] == 72


def test_placeholders_in_the_text_say_where_pictures_stand(make):
    pictures = [sets.scene(number)[0] for number in range(2)]
    lm = make(**SETTINGS)
    lm.task_dict = {"own": {"test": [pictures]}}
    (inline,) = lm.generate_until([request(0, "<image>\n<image>\nhow many digits are there?", GREEDY)])
    (before,) = lm.generate_until([request(0, "how many digits are there?", GREEDY)])
    assert inline == before
    with pytest.raises(EvaluationError, match="task own, document 0: .* 1 placeholders .* for 2 images"):
        list(lm.generate_until([request(0, "<image> how many?", GREEDY)]))


@pytest.mark.parametrize("size", [1, 4])
def test_likelihoods_are_the_model_s(make, size):
    lm = make(batch_size=size, **SETTINGS)
    pictures = [sets.scene(number)[0] for number in range(4)]
    lm.task_dict = {"own": {"test": [[picture] for picture in pictures]}}
    texts, said = ["is there a red star?", "what colour is the star?", "how many stars are there?"], ["yes", "no", "2"]
    asked = [
        request(number, texts[number % 3], answer, "loglikelihood")
        for number in range(4)
        for answer in (said[number % 3], "top left")
    ]
    found = list(lm.loglikelihood(asked))
    model, processor = load("tiny")
    attach(model, **SETTINGS)
    for one, (loss, greedy) in zip(asked, [one.text for one in found], strict=True):
        prompt = f"USER: <image>\n{one.args[0]} ASSISTANT:"
        inputs = processor(images=pictures[one.args[3]], text=f"{prompt} {one.args[1]}", return_tensors="pt")
        new = len(one.args[1].split())
        labels = inputs["input_ids"].clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            expected = model(**inputs, labels=labels)
        assert loss == pytest.approx(float(expected.loss), abs=1e-4)
        best = expected.logits[0, -new - 1 : -1].argmax(-1)
        assert greedy == bool((best == inputs["input_ids"][0, -new:]).all())


def test_choices_by_likelihood_agree_with_the_answers(make, tmp_path):
    (tmp_path / "choice.yaml").write_text(
        f"""task: choice
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {scene_tasks.TASKS}/data/existence.parquet}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function pitome_mllm_eval.lmms.scene_tasks.picture
doc_to_text: question
doc_to_target: answer
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    lm = make(batch_size=8, **SETTINGS)
    chosen = evaluate(lm, ["choice"], include=tmp_path, limit=20)["results"]["choice"]["acc,none"]
    told = evaluate(lm, ["pitome_scenes_existence"], limit=20)["results"]["pitome_scenes_existence"]["exact_match,none"]
    assert chosen == told > 0.5
    with pytest.raises(EvaluationError, match="response cache cannot hold likelihoods"):
        evaluate(lm, ["choice"], include=tmp_path, limit=1, use_cache=str(tmp_path / "cache"))


def test_the_cost_stands_in_the_results(make):
    results = evaluate(make(**SETTINGS), [COUNT], limit=5)
    (about,) = results["config"]["batch_sizes"]
    cost = about["cost"]
    assert cost["questions_asked"] == 5 and cost["visual_tokens"] == 72
    assert (about["method"], about["settings"]["where"], about["asked"]["keep"]) == ("tome", "both", 72)
    assert set(about["versions"]) >= {"lmms_eval", "torch", "transformers", "pitome_mllm"}
    assert 0 < cost["tower_ms"] < cost["prefill_ms"] and cost["decode_ms"] > 0 and "peak_memory_mb" not in cost
    assert cost["tokens_per_second"] == pytest.approx(cost["total_new_tokens"] / cost["seconds"])
    assert {f"avg_{name}" for name in cost} <= set(results["throughput"])
    counts = [one["token_counts"][0] for one in results["samples"][COUNT]]
    expected = [
        estimate(load("tiny")[0], **SETTINGS, text_tokens=c["input_tokens"] - 72, new_tokens=c["output_tokens"]).flops
        for c in counts
    ]
    assert cost["gflops"] == pytest.approx(sum(expected) / 5e9)
    assert cost["new_tokens"] == 2  # the word and the token that ends it


def test_the_cache_tells_apart_what_gives_other_answers(tmp_path):
    asked = []
    changes = (
        {},
        {"keep": 36},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"system_prompt": "hello"},
        {},
    )
    for changed in changes:
        lm = PitomeLlava("tiny", **{**SETTINGS, **changed})
        found = evaluate(lm, [COLOUR], limit=2, use_cache=str(tmp_path))
        asked.append(found["config"]["batch_sizes"][0]["cost"].get("questions_asked", 0))
    assert asked == [2, 2, 2, 2, 2, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": "auto"}, "batch_size='auto' is not possible"),
        ({"method": "tom", "keep": 4}, "did you mean 'tome'"),
        ({"method": "none", "keep": 4}, "method=none takes no settings, got keep"),
        ({"method": "tome"}, "nothing to merge was asked for"),
    ],
)
def test_settings_that_are_not_possible_are_refused(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        PitomeLlava("tiny", loaded=loaded, **options)


def test_unknown_generation_options_are_refused(make):
    lm = make(**SETTINGS)
    lm.task_dict = {"own": {"test": [[]]}}
    with pytest.raises(EvaluationError, match="document 0: unknown generation options beams"):
        list(lm.generate_until([request(0, "what colour is the star?", {"beams": 3})]))


def test_a_model_without_a_token_that_ends_answers_is_counted_whole():
    model, processor = load("tiny")
    model.generation_config.eos_token_id = None
    lm = PitomeLlava("tiny", loaded=(model, processor), **SETTINGS)
    lm.task_dict = {"own": {"test": [[]]}}
    (found,) = lm.generate_until([request(0, "what colour is the star?", GREEDY)])
    assert found.token_counts.output_tokens == GREEDY["max_new_tokens"]


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_answer_like_the_python_api(bits):
    model_args = f"pretrained=tiny,bits={bits},method=tome,keep=72"
    results = evaluate("pitome_llava", [COLOUR], model_args=model_args, batch_size=1, limit=3)
    (about,) = results["config"]["batch_sizes"]
    assert about["bits"] == bits
    rows = scene_tasks.rows("colour")[:3]
    expected = [by_hand(scene_tasks.picture(row), row["question"], bits=bits, **SETTINGS) for row in rows]
    assert list(answers(results).values()) == expected
