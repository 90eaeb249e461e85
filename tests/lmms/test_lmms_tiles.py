"""Pictures cut into tiles: what is counted is what the LLM got, and there is room for what fits after merging."""

from contextlib import contextmanager

import families
import pytest
from evaluating import request
from models import tokenizer
from packed import PACKED

from pitome_mllm.families.geometry import geometry
from pitome_mllm_eval.lmms.model import PitomeLlava
from pitome_mllm_eval.lmms.results import EvaluationError

GREEDY = {"max_new_tokens": 3, "temperature": 0}
TEXTS = ("how many are there", "what colour is the star", "what is there in this picture and that one")
LENGTHS = [len(tokenizer()(f"USER: {text} ASSISTANT:")["input_ids"]) for text in TEXTS]
PICTURES = ([], families.pictures(1), families.pictures(3, 2))
NEXT = families.BY_TITLE["LLaVA-NeXT (1.6)"]


def plug_in(family=NEXT, **settings):
    """A shrunken model of a family in the plug-in, about rows of no, one and two pictures."""
    processor = family.processor(tokenizer())
    loaded = family.build(), getattr(processor, "processor", processor)
    lm = PitomeLlava("shrunken", loaded=loaded, batch_size=3, **settings)
    lm.task_dict = {"own": {"test": PICTURES}}
    return lm


@contextmanager
def prompts_of(lm):
    """The widths of all that the LLM gets within the block."""
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["inputs_embeds"].shape[1])

    language = lm.model.get_submodule(geometry(lm.model).family.language)
    hook = language.register_forward_pre_hook(note, with_kwargs=True)
    yield widths
    hook.remove()


def counted(lm, **options):
    """The tokens of every prompt as the plug-in counts them."""
    asked = [request(number, text, GREEDY | options) for number, text in enumerate(TEXTS)]
    return [one.token_counts.input_tokens for one in lm.generate_until(asked)]


def encoded(lm, pictures):
    return lm.processor(images=[pictures], text="<image> " * len(pictures), return_tensors="pt")


@pytest.mark.parametrize("where", ["tower", "packed"])
@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_of_tiles_are_counted_as_the_llm_got_them(where, beams):
    lm = plug_in(method="tome", keep=24, where=where)
    with prompts_of(lm) as widths:
        counts = counted(lm, num_beams=beams)
    visual = [count - length for count, length in zip(counts, LENGTHS, strict=True)]
    assert max(counts) == widths[0], "the longest row fills the LLM's prompt"
    features = [
        lm.model.model.get_image_features(**_sized(lm, row), return_dict=True).pooler_output for row in PICTURES[1:]
    ]
    assert visual == [0, *(sum(map(len, row)) for row in features)]
    assert (visual[1] == 24) == (where == "packed"), "tiles of the tower and newlines add up"
    cost = lm.meter.gather(1)
    assert cost["visual_tokens"] == pytest.approx(sum(visual) / 3) and "gflops" not in cost


def _sized(lm, row):
    inputs = encoded(lm, row)
    return {name: inputs[name] for name in NEXT.sized}


@pytest.mark.parametrize("settings", [{"method": "none"}, {"method": "tome", "keep": 1.0}])
def test_all_tokens_of_tiles_are_the_placeholders(settings):
    lm = plug_in(**settings)
    full = [sum(NEXT.full(NEXT.build(), encoded(lm, row))) for row in PICTURES[1:]]
    assert [count - length for count, length in zip(counted(lm), LENGTHS, strict=True)] == [0, *full]


@pytest.mark.parametrize("title", ["LLaVA-OneVision", "Idefics3"])
def test_families_that_merge_behind_the_projector_are_counted_too(title):
    lm = plug_in(families.BY_TITLE[title], method="tome", keep=9)
    with prompts_of(lm) as widths:
        counts = counted(lm)
    assert max(counts) == widths[0] and counts[0] == LENGTHS[0]
    assert "gflops" not in lm.meter.gather(1), "what tiles cost is not known"


PACKED_BY_TITLE = {family.title: family for family in PACKED}


@pytest.mark.parametrize("title", ["Qwen2.5-VL", "Qwen3-VL", "InternVL", "Gemma 3", "Pixtral"])
def test_models_of_pictures_of_any_size_are_served_with_their_templates(title):
    family, visual = PACKED_BY_TITLE[title], {}
    for method, keep in (("none", None), ("tome", 0.25)):
        lm = packed_plug_in(family, method=method, keep=keep)
        with prompts_of(lm) as widths:
            counts = counted(lm)
        assert max(counts) == widths[0] and counts[0] == LENGTHS[0], "the longest row fills the LLM's prompt"
        visual[method] = lm.meter.gather(1)["visual_tokens"]
        lm.close()
    assert 0 < visual["tome"] == pytest.approx(visual["none"] / 4, abs=0.5)


def packed_plug_in(family, **settings):
    """A shrunken model that puts pictures among the text itself, in the plug-in."""
    lm = PitomeLlava("shrunken", loaded=(family.build(), family.chat()), batch_size=3, **settings)
    lm.task_dict = {"own": {"test": PICTURES}}
    return lm


@pytest.mark.parametrize("title", ["Qwen2.5-VL", "GLM-4.1V", "Pixtral"])
def test_smaller_pictures_of_as_many_tokens_are_a_control(title):
    """Where pictures keep their size; the processor's own options go to it with any method."""
    family = PACKED_BY_TITLE[title]
    visual = {}
    for name, settings in {
        "plain": {"method": "none"},
        "merged": {"method": "tome", "keep": 0.25},
        "smaller": {"method": "max_pixels", "keep": 0.25},
        "few": {"method": "tome", "keep": 4},
        "smallest": {"method": "max_pixels", "keep": 4},
        "limited": {"method": "none", "longest_edge": 600 if title == "Pixtral" else 24 * 24},
    }.items():
        lm = packed_plug_in(family, **settings)
        counted(lm)
        visual[name] = lm.meter.gather(1)["visual_tokens"]
        assert "tome" in settings.values() or lm.handle is None
        lm.close()
    assert visual["merged"] == pytest.approx(visual["plain"] / 4, abs=0.5)
    assert visual["smaller"] == pytest.approx(visual["merged"], rel=0.1)
    assert visual["few"] == 4 and visual["smallest"] == pytest.approx(4, abs=1)
    assert (visual["limited"] < visual["plain"]) == (title != "Pixtral")
    assert str(lm) != str(packed_plug_in(family, method="none")), "a cache tells them apart"


def test_what_a_processor_does_not_know_is_refused():
    with pytest.raises(ValueError, match="unknown setting or option of tome 'min_pixel'"):
        packed_plug_in(PACKED_BY_TITLE["Qwen2.5-VL"], method="tome", keep=9, min_pixel=9)
    with pytest.raises(ValueError, match="method=max_pixels scales pictures down .* got keep=9 and InternVL"):
        packed_plug_in(PACKED_BY_TITLE["InternVL"], method="max_pixels", keep=9)
    with pytest.raises(ValueError, match="method=max_pixels takes no settings, got where"):
        packed_plug_in(PACKED_BY_TITLE["Qwen2.5-VL"], method="max_pixels", keep=9, where="packed")


def test_what_fits_only_after_merging_is_asked():
    lm = plug_in(method="tome", keep=24)
    lm.model.config.text_config.max_position_embeddings = encoded(lm, PICTURES[2])["input_ids"].shape[1] // 2
    assert len(counted(lm)) == 3
    lm.model.config.text_config.max_position_embeddings = 40
    with pytest.raises(EvaluationError, match="the prompt of .* tokens does not fit: the model holds 40"):
        counted(lm)
