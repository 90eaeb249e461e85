"""The plug-in's edges: what is in front of the server, and another vLLM."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import families
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.multimodal.processing import BaseMultiModalProcessor

from pitome_mllm.serving.vllm import (
    ARCHITECTURES,
    BEGINNING,
    MIDDLEWARE,
    middleware,
    models,
    processing,
    register,
    versions,
)


@pytest.fixture
def client():
    """Of a server that answers with the body it gets, and of one that never reads it."""

    async def body(request):
        return JSONResponse(await request.json())

    async def stream(request):
        await request.body()
        return StreamingResponse(iter(["a", "b"]))

    async def deaf(request):
        return JSONResponse(None, 401)

    paths = {"/chat/completions": body, "/responses": body, "/messages": body, "/invocations": stream, "/deaf": deaf}
    routes = [Route(path, one, methods=["GET", "POST"]) for path, one in paths.items()]
    return TestClient(middleware.Keep(Starlette(routes=routes)), raise_server_exceptions=False)


def test_chats_begin_as_texts_do_where_the_template_leaves_that_out(client):
    client.app.__class__ = middleware.KeepAndBegin
    more, own = {"add_special_tokens": True}, {"add_special_tokens": False}
    assert client.post("/chat/completions", json={"model": "m"}).json() == {**more, "model": "m"}
    assert more.items() <= client.post("/chat/completions", json={"keep": 9}).json().items()
    assert client.post("/chat/completions", json=own).json() == own
    assert client.post("/responses", json={"model": "m"}).json() == {"model": "m"}
    assert BEGINNING.rsplit(".", 1) == [middleware.__name__, "KeepAndBegin"]


def test_keep_goes_where_vllm_looks_for_it(client):
    asked = {"model": "m", "messages": [{"role": "user", "content": "ä"}], "keep": 72}
    wanted = {"mm_processor_kwargs": {"visual_token_merging": {"keep": 72}}}
    assert client.post("/chat/completions", json=asked).json() == {
        "model": "m",
        "messages": asked["messages"],
        **wanted,
    }
    for same in ({"model": "m"}, {"keep": None}, [1], "text"):
        assert client.post("/chat/completions", json=same).json() == same
    assert client.post("/invocations", json=asked).text == "ab"
    assert MIDDLEWARE.rsplit(".", 1) == [middleware.__name__, "Keep"]


@pytest.mark.parametrize(
    "wrong",
    [{"keep": keep} for keep in (0, -1, 1.5, "72", True, [72], {})]
    + [
        {"mm_processor_kwargs": {"size": 9999}},
        {"mm_processor_kwargs": {"a": 1}, "keep": 72},
        {"media_io_kwargs": {"a": {}}},
    ],
)
def test_nonsense_and_what_vllm_would_trust_is_a_bad_request(client, wrong):
    answer = client.post("/chat/completions", json=wrong)
    assert answer.status_code == 400 and "keep" in answer.text
    assert client.post("/chat/completions", content=json.dumps(wrong).replace("mm_p", "mm_\\u0070")).status_code == 400
    assert client.post("/deaf", json=wrong).status_code == 401  # nothing of a stranger is read


def test_keep_where_vllm_would_not_read_it_is_a_bad_request(client):
    answer = client.post("/messages", json={"model": "m", "keep": 72})
    assert answer.status_code == 400 and "keep has no effect at /messages; ask at /v1/chat/completions" in answer.text
    assert client.post("/messages", json={"model": "m"}).json() == {"model": "m"}


@pytest.mark.parametrize("share", [1.0, 1])
def test_all_tokens_and_one_are_numbers_too(client, share):
    assert client.post("/responses", json={"keep": share}).json()["mm_processor_kwargs"]["visual_token_merging"] == {
        "keep": share
    }


def test_a_body_that_is_no_json_goes_on_as_it_is(client):
    assert client.post("/invocations", content=b"\xff{").text == "ab" and client.get("/invocations").text == "ab"


def imported():
    """The module of the models, once more."""
    known = importlib.util.find_spec("pitome_mllm.serving.vllm.models")
    again = importlib.util.spec_from_file_location("pitome_mllm.serving.vllm.models_again", known.origin)
    module = importlib.util.module_from_spec(again)
    again.loader.exec_module(module)
    return module


def test_another_vllm_is_told_the_range(monkeypatch):
    assert {*ARCHITECTURES.values()} <= {*vars(imported())}
    with monkeypatch.context() as patch:
        patch.setattr(versions, "version", lambda name: "0.34.0")
        with pytest.raises(ValueError, match="vLLM 0.34.0 .* vLLM 0.32 to 0.33"):
            imported()
    with monkeypatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, "embed_multimodal", lambda self, images: None)
        with pytest.raises(ValueError, match="in this vLLM, and the plug-in expects self, kwargs"):
            imported()
    monkeypatch.delattr(BaseMultiModalProcessor, "_get_mm_hashes")
    with pytest.raises(ValueError, match="has no _get_mm_hashes in this vLLM"):
        imported()


def test_registering_twice_is_harmless_and_leaves_vllms_own():
    from vllm import ModelRegistry

    own = {name: ModelRegistry.models[name] for name in ARCHITECTURES}
    register()
    register()
    assert {name: ModelRegistry.models[name] for name in ARCHITECTURES} == own
    assert {*ARCHITECTURES.values()} <= {*ModelRegistry.get_supported_archs()}


def test_tiles_that_only_pad_are_the_models_too():
    vision = SimpleNamespace(image_size=48, patch_size=4)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=[[144, 48]])
    assert processing.places_of(config, (48, 48)).tiles == 3 and processing.tiles_of(config, (48, 48)) == 4


def test_memory_is_measured_with_the_most_tiles():
    config = next(one for one in families.FAMILIES if one.model == "LlavaNextForConditionalGeneration").config()
    config.update({"visual_token_merging": {"keep": 36}})
    info = object.__new__(processing.MergedLlavaNextInfo)
    info.get_hf_config = lambda: config
    size = info.get_image_size_with_most_features()
    assert processing.tiles_of(config, (size.height, size.width)) == 5
    assert info.get_num_image_tokens(image_width=size.width, image_height=size.height) == 36


def test_the_names_of_a_tower_that_transformers_5_saved():
    names = ["model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.head.probe", "language_model.head"]
    assert models.SAVED_BY_5.apply_list(names) == [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.head.probe", names[2],
    ]  # fmt: skip
