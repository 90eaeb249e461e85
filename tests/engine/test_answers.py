"""Greedy answers of vLLM with merged tokens are those of transformers with the same settings attached."""

from __future__ import annotations

import families
import models
import prometheus_client
import pytest
import torch
from asked import answers, expected, outputs, request

TWO = "USER: <image> <image> what is there ASSISTANT:"
TEXT = "USER: how many are there ASSISTANT:"
BURST = 128  # pictures at once ...
BUDGET = 8192  # ... of 64 tokens each, which vLLM has encoded together


def pictures(name, *numbers):
    return families.pictures(*numbers) if name == "next" else [models.picture(number) for number in numbers]


def prompts(name, keep):
    """One picture, two, none, and one with a smaller number of tokens."""
    one, two, three = pictures(name, 0, 1, 2)
    return [
        request(models.QUESTION, one),
        request(TWO, two, three),
        request(TEXT),
        request(models.QUESTION, one, keep=keep),
    ]


CASES = {
    "default": ("clip-default", {"keep": 144}, 64, {}),
    "chunked prefill": ("clip-default", {"keep": 144}, 64, {"max_num_batched_tokens": 160}),
    "keys, class token": ("clip-full", {"keep": 145, "method": "tome", "metric": "keys", "place": "end"}, 65, {}),
    "SigLIP": ("siglip-full", {"keep": 144, "where": "tower"}, 100, {}),
    "before the projector": ("clip-default", {"keep": 0.25, "method": "divprune"}, 0.125, {}),
    "LLaVA-NeXT": ("next", {"keep": 36}, 20, {"max_num_batched_tokens": 160, "block_size": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(engine, checkpoint, case):
    name, settings, less, options = CASES[case]
    asked = prompts(name, less)
    where = {"where": "packed"} if name == "next" else {}
    wanted = expected(checkpoint(name), asked, **settings, **where)
    llm = engine(name, settings, **options)
    assert answers(llm, asked) == wanted
    again = outputs(llm, asked)
    assert [list(output.outputs[0].token_ids) for output in again] == wanted
    assert again[0].num_cached_tokens > 0  # of the prefix cache
    assert wanted[0] != wanted[3]


@pytest.mark.parametrize("name", ["clip-default", "next"])
def test_all_tokens_are_the_answers_of_vllms_own_model(engine, checkpoint, name):
    asked = prompts(name, None)
    own, ours = engine(name, old=True), engine(name, {"keep": 1.0})
    assert answers(ours, asked) == answers(own, asked) == expected(checkpoint(name), asked)
    counts = [[len(output.prompt_token_ids) for output in outputs(llm, asked, 1)] for llm in (own, ours)]
    assert counts[0] == counts[1]


def test_the_prompt_is_as_long_as_what_is_left_and_the_metrics_say_so(engine):
    llm = engine("clip-default", {"keep": 144})

    def counted():
        names = [f"pitome_visual_tokens_{when}_total" for when in ("before", "after")]
        return [prometheus_client.REGISTRY.get_sample_value(name) for name in names]

    before = counted()
    found = outputs(llm, prompts("clip-default", 64), 1)
    words = [len(one["prompt"].split()) - 2 * bool(one.get("multi_modal_data")) for one in prompts("clip-default", 64)]
    assert [len(output.prompt_token_ids) for output in found][2] == words[2] + 1
    assert [len(output.prompt_token_ids) for output in found] == [152, 294, 7, 72]
    assert [b - a for a, b in zip(before, counted())] == [4 * 576, 3 * 144 + 64]


@pytest.mark.parametrize("keep", [145, 577, 0, -1, 1.5, "a", [3], True, {"a": 1}])
def test_a_request_for_more_or_for_nonsense_is_refused(engine, keep):
    llm, picture = engine("clip-default", {"keep": 144}), models.picture(0)
    with pytest.raises(ValueError, match="keep="):
        outputs(llm, [request(models.QUESTION, picture, keep=keep)])
    with pytest.raises(ValueError, match="nothing else"):
        more = {"mm_processor_kwargs": {"visual_token_merging": {"method": "tome"}}}
        outputs(llm, [{**request(models.QUESTION, picture), **more}])
    assert len(outputs(llm, [request(models.QUESTION, picture)], 1)[0].prompt_token_ids) == 152


@pytest.mark.parametrize("keep", [37, 0.9, 1.0])
def test_a_request_for_more_of_a_picture_in_tiles_is_refused(engine, keep):
    name, settings, _, options = CASES["LLaVA-NeXT"]
    with pytest.raises(ValueError, match=f"keep={keep} comes to .* at most 36 are served"):
        outputs(engine(name, settings, **options), [request(models.QUESTION, *pictures("next", 1), keep=keep)])


@pytest.mark.parametrize("name", ["clip-default", "next"])
def test_a_burst_of_pictures_is_encoded_in_chunks(engine, name):
    """The scheduler counts tokens after merging; the tower gets as many pictures as it would have had without."""
    llm = engine(
        name, {"keep": 64 if name == "clip-default" else 12}, max_num_batched_tokens=BUDGET, max_num_seqs=BURST
    )
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    together, rows = [], []
    model.vision_tower.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))  # of LLaVA-NeXT
    embeddings = model.vision_tower.vision_model.embeddings
    embeddings.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    own, model.encode = model.encode, lambda inputs, keeps: together.append(len(keeps)) or own(inputs, keeps)
    try:
        burst = [request(models.QUESTION, *pictures(name, n % 6)) for n in range(BURST)]
        for number, one in enumerate(burst):
            one["multi_modal_data"]["image"][0].putpixel((0, 0), (number, 0, 0))
        found = answers(llm, burst, 1)
    finally:
        model.encode = own
    most = BUDGET // models.PATCHES if name == "clip-default" else BUDGET // families.PATCHES
    assert max(together) > BURST / 2 and max(rows) <= most
    assert found[7] == answers(llm, [burst[7]], 1)[0]


def test_pictures_of_another_keep_have_another_identity(engine):
    llm = engine("clip-default", {"keep": 144})
    other = engine("clip-default", {"keep": 144, "method": "tome"})
    picture = models.picture(3)

    def identity(llm, keep=None, uuid=None):
        processor = llm.llm_engine.input_processor.renderer.get_mm_processor()
        asked = {} if keep is None else {"visual_token_merging": {"keep": keep}}
        items = processor.info.parse_mm_data({"image": [picture]})
        uuids = None if uuid is None else {"image": [uuid]}
        made = processor(models.QUESTION, items, uuids, hf_processor_mm_kwargs=asked)
        return made["mm_hashes"]["image"][0]

    found = [identity(llm), identity(llm, 64), identity(llm, 65), identity(other)]
    found += [identity(llm, uuid="mine"), identity(llm, 64, uuid="mine"), identity(other, uuid="mine")]
    assert len({*found}) == len(found) and identity(llm) == found[0]
    assert "mine" in found[4] and found[4] != "mine"


def test_a_picture_that_vllm_knows_may_be_named_only(engine):
    llm, asked = engine("clip-default", {"keep": 144}), request(models.QUESTION, models.picture(4))
    first = answers(llm, [{**asked, "multi_modal_uuids": {"image": ["known"]}}])
    named = {**asked, "multi_modal_data": {"image": [None]}, "multi_modal_uuids": {"image": ["known"]}}
    assert answers(llm, [named]) == first == answers(llm, [asked])


def test_two_ranks_decide_alike(checkpoint, engine):
    asked = prompts("clip-default", 64)
    llm = engine("clip-default", {"keep": 144}, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert answers(llm, asked) == expected(checkpoint("clip-default"), asked, keep=144)


def test_graphs_give_what_is_encoded_without(engine, monkeypatch):
    """vLLM's own manager of encoder graphs, with a stand-in for CUDA's."""
    from vllm.v1.worker import encoder_cudagraph as managed

    llm = engine("clip-default", {"keep": 144}, max_num_batched_tokens=4096)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.get_model()

    class Manager(managed.EncoderCudaGraphManager):
        def _capture_budget_graph(self, token_budget, path="default", axis_keys=()):
            made = model.prepare_encoder_cudagraph_capture_inputs(
                token_budget, self.max_batch_size, 0, torch.device("cpu"), torch.float32, path, axis_keys
            )
            output = model.encoder_cudagraph_forward({**made.values}, path=path)

            class Graph:
                def replay(self):
                    output.copy_(model.encoder_cudagraph_forward({**made.values}, path=path))

            self._get_graph_set(path)[token_budget] = managed.BudgetGraphMetadata(
                token_budget, self.max_batch_size, 0, Graph(), made.values, output
            )

    with torch.inference_mode():
        manager = Manager(runner.vllm_config, torch.device("cpu"), torch.float32, model)
        manager.capture(None)
        pixels = torch.randn(9, 3, models.SIDE, models.SIDE)
        kwargs = {
            "pixel_values": pixels,
            "visual_tokens_kept": torch.tensor([144, 64, 144, 144, 50, 64, 144, 144, 144]),
        }
        graphed, plain = manager.execute({**kwargs}), model.embed_multimodal(**kwargs)
    assert [len(one) for one in graphed] == kwargs["visual_tokens_kept"].tolist()
    for a, b in zip(graphed, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert manager.graph_hits == 6 and manager.graph_misses == 3


def test_pictures_that_are_encoded_already_keep_all(engine):
    llm = engine("clip-default", {"keep": 144}, enable_mm_embeds=True)
    embeddings = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0))
    (found,) = outputs(llm, [{"prompt": models.QUESTION, "multi_modal_data": {"image": embeddings}}])
    assert len(found.prompt_token_ids) == 10 + 8 and len(found.outputs[0].token_ids) == 12
