"""`pitome-mllm reproduce` of retrieval and of ImageNet: end to end on made pictures, and figures by hand."""

import json

import numpy as np
import pytest
import torch
from checks import command_line
from models import BEFORE_518, picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    DeiTImageProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    ViTConfig,
    ViTForImageClassification,
)

from pitome_mllm_eval.encoders.pictures import data_of
from pitome_mllm_eval.encoders.reproduce import Encoder, recalls

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "red", "blue", "old", "new", "house", "tree", "."]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
VISION = dict(SIZES, image_size=48, patch_size=8)
NEEDS_TORCHVISION = pytest.mark.skipif(
    BEFORE_518, reason="before 5.18 transformers reads the image processors of classifiers with torchvision only"
)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A CLIP, a classifier, and data of both kinds."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    text = dict(SIZES, vocab_size=len(WORDS), max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48)
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).save_pretrained(folder / "clip")
    CLIPProcessor(images, tokenizer()).save_pretrained(folder / "clip")
    square = dict(size={"height": 48, "width": 48})
    siglip = SiglipConfig(vision_config=VISION, text_config={**text, "projection_size": 32})
    SiglipModel(siglip).save_pretrained(folder / "siglip")
    SiglipProcessor(SiglipImageProcessor(**square), tokenizer()).save_pretrained(folder / "siglip")
    read = {**text, "encoder_hidden_size": 32, "pad_token_id": 0, "sep_token_id": 2}
    blip = BlipConfig(vision_config=VISION, text_config=read, image_text_hidden_size=16)
    BlipForImageTextRetrieval(blip).save_pretrained(folder / "blip")
    BlipProcessor(BlipImageProcessor(**square), tokenizer()).save_pretrained(folder / "blip")
    ViTForImageClassification(ViTConfig(**VISION, num_labels=3)).save_pretrained(folder / "vit")
    DeiTImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(folder / "vit")
    pairs, classes = folder / "data" / "flickr30k", folder / "data" / "imagenet"
    pairs.mkdir(parents=True)
    rows = [{"file_name": f"{n}.png", "captions": [f"a {a} house", f"a photo of {b} tree"]}
            for n, (a, b) in enumerate([("red", "old"), ("blue", "new"), ("old", "blue"), ("new", "red")])]  # fmt: skip
    (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(6):
        (classes / f"class_{n // 2}").mkdir(parents=True, exist_ok=True)
        picture(n).save(classes / f"class_{n // 2}" / f"{n}.png")
        picture(n).save(pairs / f"{n}.png")
    return folder


def run(capsys, here, out, table, model, *more):
    asked = ["--table", table, "--model", here / model, "--data", here / "data", "--out", out, "--batch-size", 3]
    return command_line(capsys, "reproduce", *asked, "--method", "pitome", "--json", *more)


@pytest.mark.parametrize(
    "table, model, task, questions, names",
    [
        ("pitome-retrieval", "clip", "flickr30k", 4, ["text R@1", "text R@5", "text R@10", "image R@1"]),
        ("pitome-retrieval", "blip", "flickr30k", 4, ["text R@1", "text R@5", "text R@10", "image R@1"]),
        ("pitome-imagenet", "siglip", "imagenet", 6, ["top-1"]),
        pytest.param("pitome-imagenet", "vit", "imagenet", 6, ["top-1"], marks=NEEDS_TORCHVISION),
    ],
)
def test_a_table_of_encoders_runs_offline_and_goes_on_where_it_was(
    capsys, here, tmp_path, table, model, task, questions, names
):
    code, out, err = run(capsys, here, tmp_path, table, model, "--task", task)
    rows = json.loads(out)
    assert code == 0 and "GFLOPs and" in err and "is there already" not in err
    assert [row["task"] for row in rows][: len(names)] == [f"{task} {name}" for name in names]
    assert {row["questions"] for row in rows} == {questions}
    assert {row["method"] for row in rows} == {"none", "pitome"}
    assert all(row["low"] <= row["ours"] <= row["high"] for row in rows)
    for_all = {row["task"]: row["ours"] for row in rows if row["method"] == "none"}
    if table == "pitome-retrieval":
        assert for_all.pop("flickr30k Rsum") == pytest.approx(sum(for_all.values()))
    again = run(capsys, here, tmp_path, table, model, "--task", task)
    assert json.loads(again[1]) == rows and again[2].count("is there already") == len({row["run"] for row in rows})


@pytest.mark.parametrize("name", ["clip", "siglip", "blip"])
def test_pictures_and_texts_are_as_near_as_the_model_says(here, name):
    encoder, data = Encoder(str(here / name), None, "cpu"), data_of("flickr30k", here / "data", None)
    texts = [text for captions in data.captions for text in captions]
    with torch.inference_mode():
        found = encoder.images(data, 3) @ encoder.texts(texts, 5).T
        longest = dict(padding="max_length", max_length=16) if name == "siglip" else dict(padding=True)
        inputs = encoder.processor(images=next(data.batches(9)), text=texts, return_tensors="pt", **longest)
        if name == "siglip":
            del inputs["attention_mask"]  # it reads padding, as in its training
        if name == "blip":
            own = encoder.model(**inputs, use_itm_head=False).itm_score
        else:
            own = encoder.model(**inputs).logits_per_image - (encoder.model.logit_bias if name == "siglip" else 0)
            own = own / encoder.model.logit_scale.exp()
    assert len(set(found.flatten().tolist())) > len(texts) and torch.allclose(found, own, atol=1e-5)


def test_recall_counts_own_captions_among_the_nearest():
    images = torch.eye(12)
    texts = torch.cat([images, images.roll(1, 0)])  # of each picture one caption that fits, one that fits another
    hits, trials = recalls(images, texts, torch.arange(12).repeat(2))
    assert np.allclose(
        100 * hits.sum(0) / trials.sum(0), [hits[:, 0].mean() * 100, 100, 100, 50, *hits.sum(0)[4:] / 0.24]
    )
    assert (hits[:, 3] == 1).all() and (trials[:, 3] == 2).all() and (trials[:, 0] == 1).all()


def test_a_limit_takes_every_class_in_turn(here):
    assert data_of("imagenet", here / "data", 4).labels == [0, 1, 2, 0]
    assert data_of("imagenet", here / "data", None).classes == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--table", "pitome-retrieval", "--data", "nowhere"], "metadata.jsonl"),
        (["--table", "pitome-imagenet", "--data", "nowhere"], "put a folder for each class there"),
        (["--table", "pitome-imagenet", "--group-a"], "--group-a is about questions"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, more, message):
    code, out, err = command_line(capsys, "reproduce", *more, "--out", tmp_path)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


CAPTIONS = (', "captions": []', ', "captions": "a"', ', "captions": ["é"]', "")


@pytest.mark.parametrize("said", ["", "no json", "[1]", *(f'{{"file_name": "0.png"{more}}}' for more in CAPTIONS)])
def test_lines_without_captions_are_refused(tmp_path, said):
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "flickr30k" / "metadata.jsonl").write_bytes(f"{said}\n".encode("latin-1"))
    with pytest.raises(ValueError, match="give a line for each picture" if said else "no pictures in"):
        data_of("flickr30k", tmp_path, None)


def test_classes_have_to_be_those_of_the_model(capsys, here, tmp_path):
    folders = tmp_path / "imagenet"
    for n in range(2):
        (folders / f"{n}").mkdir(parents=True)
        picture(n).save(folders / f"{n}" / "0.png")
    asked = ["reproduce", "--table", "pitome-imagenet", "--data", tmp_path, "--out", tmp_path, "--model"]
    code, _, err = command_line(capsys, *asked, here / "vit")
    assert code == 2 and "knows 3 classes, the data have 2" in err
    (folders / "classes.txt").write_text("house")
    code, _, err = command_line(capsys, *asked, here / "clip")
    assert code == 2 and "names 1 classes of 2 folders" in err
    (folders / "classes.txt").unlink()
    code, _, err = command_line(capsys, *asked, "tiny")
    assert code == 2 and "neither classifies pictures nor embeds texts" in err
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae", "mask_ratio": "none"}')
    code, _, err = command_line(capsys, *asked, tmp_path)
    assert code == 2 and "holds a value that is not possible" in err


def test_the_plan_needs_no_data_and_no_weights(capsys, here):
    for table in ("pitome-retrieval", "pitome-imagenet"):
        code, out, err = command_line(capsys, "reproduce", "--table", table, "--plan", "--json")
        said = json.loads(out)
        assert code == 0 and not err and "openai/clip-vit-base-patch16" in said["downloads"]
        assert all(row["gflops"] > 0 for row in said["runs"])
    _, out, _ = command_line(capsys, "reproduce", "--table", table, "--plan", "--json", "--model", here / "clip")
    assert all(row["gflops"] > 0 for row in json.loads(out)["runs"])


def test_pictures_come_from_the_hub_too(monkeypatch, here):
    class Rows(list):
        column_names = ("image", "caption", "split")

        def select(self, numbers):
            return Rows(self[n] for n in numbers)

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    held = Rows({"image": picture(n), "caption": [f"{n}"], "split": "test" if n else "train"} for n in range(3))
    hub = type("datasets", (), {"load_dataset": staticmethod(lambda name, split: held)})
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    found = data_of("flickr30k", None, None)
    assert found.captions == [["1"], ["2"]] and [len(batch) for batch in found.batches(2)] == [2]
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data_of("flickr30k", None, None)
