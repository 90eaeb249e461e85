"""What a visitor does with the chat, in headless Chromium."""

import json
import os
import re
import threading
from types import SimpleNamespace

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import NARROW, WIDE
from gradio_client import Client
from PIL import Image

from pitome_mllm import load
from pitome_mllm.settings import DEFAULT_METHOD, Settings
from pitome_mllm_demo.app import serve
from pitome_mllm_demo.controls import PLACES
from pitome_mllm_demo.engine import Engine
from pitome_mllm_demo.session import Conversation
from pitome_mllm_eval.benchmark.sets import scene

DEFAULT_PLACE = PLACES[Settings().defaults["where"]]


def truth(number):
    return scene(number)[1][0].text, scene(number)[1][0].answer


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_upload_and_ask(visitor, files):
    question, answer = truth(16)
    assert visitor.ask(question, files[16]) == answer
    assert visitor.last(".pm-label") == f"{DEFAULT_METHOD} · 144 of 576 tokens (25%) · {DEFAULT_PLACE}"
    assert visitor.page.locator("#pm-chat img.pm-thumb").count() == 1
    assert visitor.page.locator("#pm-box textarea").input_value() == ""


def test_several_turns_and_pictures(visitor, files):
    visitor.ask("is there a star?", files[16])
    visitor.ask("is there a circle?")
    visitor.add(files[6])
    visitor.ask("is there a star?", files[0])
    values = visitor.page.locator(".pm-merged .pm-strip").last.inner_text().split("\n")
    assert values[:2] == ["visual tokens", "432"] and "3 pictures × 144 of 576" in visitor.last(".pm-merged .pm-label")
    assert visitor.page.locator(".pm-question").count() == 3


@pytest.fixture
def wordy_page(wordy, tmp_path, monkeypatch):
    """A page whose model gives long answers, as ``url``; after ``hold()`` it writes 20 words, then waits for Stop."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # put back at the end
    model, processor = load(wordy)
    stop, pressed, words = Conversation.stop, threading.Event(), []

    def wait(*_):
        if words and not next(words[0], False):
            pressed.wait(90)

    def noted(chat):
        stop(chat)
        pressed.set()

    model.register_forward_pre_hook(wait)
    monkeypatch.setattr(Conversation, "stop", noted)
    engine = Engine("wordy", model, processor)
    page = serve(engine, tmp_path, "127.0.0.1", None, False, prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(url=page.blocks.local_url, hold=lambda: words.append(iter([True] * 20)))
    pressed.set()
    page.blocks.close()


def test_a_reply_streams_and_can_be_stopped(wordy_page, visit, files):
    visitor = visit(url=wordy_page.url)
    page, seen = visitor.page, []

    def done():
        text = page.locator(".pm-merged .pm-text").last.inner_text() if page.locator(".pm-merged").count() else ""
        if text and text not in seen:
            seen.append(text)
        return page.locator(".pm-merged.pm-done").count() > 0

    visitor.choose("#pm-compare", "nothing")
    visitor.send("what colour is the star", files[0])
    visitor.until(done)
    words = [text for text in seen if not text.startswith(("Looking", "Waiting"))]
    assert len(words) > 1 and all(words[-1].startswith(text.strip()) for text in words), words[:3]
    wordy_page.hold()
    visitor.send("what shape is the thing")
    visitor.until(
        lambda: page.locator(".pm-merged").count() == 2 and page.locator(".pm-merged.pm-writing").count() == 1
    )
    page.locator("#pm-stop").click()
    visitor.until(lambda: page.locator(".pm-merged.pm-stopped").count() == 1)
    assert 1 < len(visitor.last(".pm-merged.pm-stopped .pm-text").split()) < 30


def test_retry_clear_and_json(visitor, files):
    visitor.ask("is there a star?", files[16])
    visitor.keep(72)
    visitor.page.locator("#pm-retry").click()
    visitor.until(lambda: "72 of 576" in visitor.last(".pm-label"))
    visitor.until(lambda: visitor.page.locator(".pm-merged.pm-done").count() == 1)
    with visitor.page.expect_download() as download:
        visitor.page.locator("#pm-json").click()
    told = json.loads(download.value.path().read_text())
    assert told["turns"][0]["question"] == "is there a star?"
    assert told["turns"][0]["replies"]["merged"]["settings"]["keep"] == 72
    visitor.page.locator("#pm-clear").click()
    visitor.until(lambda: visitor.page.locator(".pm-card").count() == 0)
    visitor.send("is there a star?")
    visitor.until(lambda: "add a picture first" in visitor.page.locator("#pm-notice").inner_text())


def test_a_drawing_that_comes_after_clear_is_not_shown(visitor, files, served, monkeypatch):
    handlers, drawn = served.handlers, []
    show, before = handlers.show_groups, source(visitor, "#pm-groups")

    def interrupted(request, value):
        drawn.append(show(request, value))
        handlers.of(request).clear()
        return drawn[-1]

    monkeypatch.setattr(handlers, "show_groups", interrupted)
    visitor.ask("is there a star?", files[16])
    visitor.until(lambda: drawn)
    visitor.page.wait_for_timeout(1000)
    assert drawn[0][0] is not None and source(visitor, "#pm-groups") == before


@pytest.mark.parametrize("size", [(1280, 720), NARROW], ids=["1280", "390"])
def test_examples_start_new_conversations_and_their_answers_come_into_view(visit, size):
    """One after the other, without Clear: no picture of before comes along."""
    visitor, page = visit(size), None
    page = visitor.page
    for question, answer in (("which shape is blue?", "circle"), ("what colour is the star?", "cyan")):
        page.get_by_role("button", name=question).click()
        visitor.until(lambda q=question: page.locator(".pm-question").all_inner_texts() == [q])
        visitor.until(lambda: page.locator(".pm-merged.pm-done").count() == 1)
        assert visitor.last(".pm-merged .pm-text") == answer
        assert "pictures" not in visitor.last(".pm-merged .pm-label")
        assert page.locator(".pm-merged .pm-value").first.inner_text() == "144"
        visitor.until(lambda: visitor.in_view("#pm-chat") and visitor.in_view(".pm-merged .pm-text"))
        assert page.locator("#pm-box textarea").input_value() == ""
    visitor.shot(f"{size[0]}-example", whole=False)


def test_a_photograph_is_there_to_look_inside(visitor):
    """And the page says why nothing is asked about it."""
    note = visitor.page.get_by_text("was trained on drawn scenes such as these, not on photographs")
    assert note.is_visible()
    visitor.page.get_by_role("button", name="rocket.png").click()
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("1. rocket.png"))
    visitor.shot("1280-photograph")


def test_a_pasted_picture(visitor, files):
    visitor.page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
            document.querySelector("#pm-box textarea").dispatchEvent(event);
        }""",
        list(files[16].read_bytes()),
    )
    visitor.until(lambda: visitor.page.locator("#pm-box .thumbnail-item").count() == 1)
    assert visitor.ask(*truth(16)[:1]) == truth(16)[1]


def test_a_webcam_picture(visitor):
    """Chromium's fake camera."""
    page = visitor.page
    page.get_by_role("button", name="Webcam").click()
    page.get_by_text("Click to Access Webcam").click()
    playing = "document.querySelector('video')?.readyState === 4 && document.querySelector('video').videoWidth > 0"
    visitor.until(lambda: page.evaluate(playing))
    page.get_by_label("capture photo").click()
    visitor.until(lambda: page.locator("#pm-box .thumbnail-item").count() == 1)
    page.locator("#pm-box textarea").press("Enter")
    visitor.until(lambda: page.locator(".pm-merged.pm-done").count() == 1)
    assert "Look inside" in visitor.last(".pm-merged .pm-text")


def test_a_broken_file_is_refused_readably(visitor, files, tmp_path):
    visitor.ask(truth(16)[0], files[16])
    (tmp_path / "broken.png").write_bytes(files[16].read_bytes()[:3000])
    visitor.send("is there a star?", tmp_path / "broken.png")
    visitor.until(lambda: visitor.page.locator("#pm-notice .pm-error").count() == 1)
    said = visitor.page.locator("#pm-notice").inner_text()
    assert said == "cannot read the picture 'broken.png': image file is truncated"
    assert visitor.page.locator(".pm-question").count() == 1
    assert visitor.page.locator("#pm-box textarea").input_value() == "is there a star?"


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_change_the_next_turn_only_and_never_reload(visitor, files, served):
    engine = served.engine
    visitor.ask("is there a star?", files[16])
    slider = visitor.page.locator("#pm-keep input[type=range]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    visitor.until(lambda: "147 of 576 visual tokens (26%)" in visitor.page.locator("#pm-plan").inner_text())
    visitor.choose("#pm-method", "tome")
    visitor.choose("#pm-where", "after the vision tower")
    visitor.until(lambda: "after the vision tower" in visitor.page.locator("#pm-plan").inner_text())
    visitor.ask("is there a circle?")
    labels = visitor.page.locator(".pm-merged .pm-label").all_inner_texts()
    assert labels[0].startswith(f"{DEFAULT_METHOD} · 144 of 576")
    assert labels[1] == "tome · 147 of 576 tokens (26%) · after the vision tower"
    assert served.handlers.visitors.engine is engine


def test_ratio_per_block_and_settings_that_are_not_possible(visitor, files):
    page = visitor.page
    visitor.choose("#pm-method", "pitome")
    visitor.choose("#pm-amount", "ratio per block")
    visitor.until(lambda: page.locator("#pm-ratio").is_visible() and not page.locator("#pm-keep").is_visible())
    visitor.until(lambda: "inside the vision tower" in page.locator("#pm-plan").inner_text())
    visitor.choose("#pm-where", "after the vision tower")
    visitor.until(lambda: "with where='projector' give keep" in page.locator("#pm-plan").inner_text())
    visitor.send("is there a star?", files[16])
    visitor.until(lambda: "give keep" in page.locator("#pm-notice").inner_text())


def test_a_number_that_is_not_possible_is_said_and_nothing_stale_stays(visitor):
    page = visitor.page
    number, token = (page.locator(f"{slider} input[type=number]") for slider in ("#pm-keep", "#pm-token"))
    token.fill("")
    token.blur()
    page.wait_for_timeout(1000)  # Gradio makes 0 of nothing, and may light that token
    drawn = source(visitor, "#pm-groups")
    for given, words in (("", "no number; give 1 to 576"), ("9999", "9999 tokens are not possible")):
        number.fill(given)
        visitor.until(lambda words=words: words in page.locator("#pm-plan").inner_text())
        page.wait_for_timeout(500)
        assert "Error" not in page.locator("body").inner_text() and source(visitor, "#pm-groups") == drawn
    visitor.keep(99)
    visitor.until(lambda: "99 of 576" in page.locator("#pm-which input").input_value())


def test_compare_with_the_plain_model_or_another_method(visitor, files):
    question, answer = truth(16)
    assert visitor.ask(question, files[16]) == answer
    plain, merged = (visitor.page.locator(f".pm-{lane}") for lane in ("plain", "merged"))
    assert plain.locator(".pm-text").inner_text() == answer
    for lane in (plain, merged):
        names = lane.locator(".pm-name").all_inner_texts()
        assert names == [
            "visual tokens", "prompt tokens", "tower, ms", "1st token, ms", "each token, ms", "KV cache, MB", "GFLOPs"
        ]  # fmt: skip
        assert re.search(r"\d+% of the time to the first token went to the vision tower", lane.inner_text())
    assert plain.locator(".pm-ratio").count() == 0
    saved = r"Saved: 75% of the visual tokens, \d\d% of the FLOPs, \d\d% of the KV cache\. × = .*"
    assert re.fullmatch(saved, merged.locator(".pm-saved").inner_text())
    ratios = "\n".join(merged.locator(".pm-ratio").all_inner_texts())
    assert re.fullmatch(r"×0\.25 ▼(\n×\d+\.\d\d( [▼▲]|)){6}", ratios)
    left, right = plain.bounding_box(), merged.bounding_box()
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] <= right["x"]
    visitor.choose("#pm-compare", "tome")
    visitor.page.locator("#pm-retry").click()
    visitor.until(lambda: visitor.page.locator(".pm-other.pm-done").count() == 1)
    visitor.until(lambda: visitor.page.locator(".pm-merged.pm-done").count() == 1)
    assert (
        visitor.last(".pm-other .pm-label").startswith("tome · 144") and visitor.page.locator(".pm-plain").count() == 0
    )
    visitor.choose("#pm-compare", "nothing")
    visitor.page.locator("#pm-retry").click()
    visitor.until(lambda: visitor.page.locator(".pm-card").count() == 1)


# ---- looking inside --------------------------------------------------------------------------------------------------


def source(visitor, part):
    image = visitor.page.locator(f"{part} img")
    return image.get_attribute("src") if image.count() else None


def test_the_slider_draws_the_groups_anew_as_it_moves(visitor, served, monkeypatch):
    """With the first picture, without a question: one pass of the tower for each drawing."""
    page, drawn = visitor.page, {source(visitor, "#pm-groups")}
    monkeypatch.setattr(served.engine.model, "generate", None)
    slider = page.locator("#pm-keep input[type=range]")
    slider.focus()
    for step in range(1, 4):
        slider.press("ArrowRight")
        wanted = f"As set above: astronaut.png · {DEFAULT_METHOD} · {144 + step} of 576"
        visitor.until(lambda wanted=wanted: page.locator("#pm-which input").input_value() == wanted)
        drawn.add(source(visitor, "#pm-groups"))
    assert len(drawn) == 4
    visitor.choose("#pm-method", "uniform")
    visitor.until(lambda: "Hatched patches were dropped" in page.locator("#pm-picked").inner_text())
    page.locator("#pm-clear").click()
    visitor.until(lambda: "uniform" in page.locator("#pm-which input").input_value())


def test_groups_are_picked_by_the_keyboard_too(visitor):
    slider, whole = visitor.page.locator("#pm-token input[type=range]"), source(visitor, "#pm-groups")
    slider.focus()
    slider.press("ArrowRight")
    visitor.until(lambda: visitor.page.locator("#pm-picked").inner_text().startswith("Token 1: "))
    visitor.until(lambda: source(visitor, "#pm-groups") != whole)


def test_pick_a_group(visitor, files):
    visitor.ask(truth(16)[0], files[16])
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("1. scene16"))
    whole = source(visitor, "#pm-groups")
    assert "a diamond one that the method protects. Click" in visitor.page.locator("#pm-picked").inner_text()
    visitor.page.locator("#pm-groups img").click(position={"x": 150, "y": 150})
    visitor.until(lambda: "Token" in visitor.page.locator("#pm-picked").inner_text())
    said = visitor.page.locator("#pm-picked").inner_text()
    assert re.fullmatch(r"Token \d+: \d+ patch(es)? of 576.* Mean energy before the merge in block 0: .*", said)
    visitor.until(lambda: source(visitor, "#pm-groups") != whole)


def test_a_click_finds_the_group_under_it(visitor, files, served):
    """The corner of the picture: the page scales it and leaves margins, the answer must not."""
    visitor.ask(truth(16)[0], files[16])
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("1. scene16"))
    (chat,) = (c for c in served.handlers.visitors.conversations.values() if c.turns and c.turns[0].question)
    look = chat.turns[0].replies["merged"].looks[0]
    box = visitor.page.locator("#pm-groups img").bounding_box()
    side = min(box["width"], box["height"])
    for x, y in ((0.02, 0.02), (0.98, 0.98), (0.3, 0.7)):
        position = {"x": (box["width"] - side) / 2 + x * side, "y": (box["height"] - side) / 2 + y * side}
        visitor.page.locator("#pm-groups img").click(position=position)
        wanted = f"Token {look.pick(x, y)}:"
        visitor.until(lambda wanted=wanted: visitor.page.locator("#pm-picked").inner_text().startswith(wanted))


def test_energy_tokens_and_accuracy(visitor, files):
    visitor.choose("#pm-method", "pitome")
    visitor.ask("", files[16])
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("1. scene16"))
    visitor.tab("Tokens")
    visitor.until(lambda: "scene16" in visitor.page.locator("#pm-tokens").inner_text())
    visitor.tab("Energy")
    visitor.until(lambda: source(visitor, "#pm-energy"))
    first = source(visitor, "#pm-energy")
    assert "block 0: 576 → " in visitor.page.locator("#pm-energy-note").inner_text()
    slider = visitor.page.locator("#pm-step input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    visitor.until(lambda: re.match(r"block [1-9]\d*: ", visitor.page.locator("#pm-energy-note").inner_text()))
    visitor.until(lambda: source(visitor, "#pm-energy") != first)
    visitor.tab("Tokens")
    assert "block 0" in visitor.page.locator("#pm-tokens svg").text_content()
    visitor.tab("Accuracy")
    visitor.until(lambda: "keep 144" in visitor.page.locator("#pm-accuracy").inner_text())
    visitor.keep(72)
    visitor.until(lambda: "keep 72" in visitor.page.locator("#pm-accuracy svg title").first.text_content())


def test_earlier_turns_can_be_looked_into(visitor, files):
    visitor.ask("", files[16])
    visitor.ask("", files[6])
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("2. scene6.png"))
    now = source(visitor, "#pm-groups")
    visitor.page.locator("#pm-which input").first.click()
    visitor.page.get_by_role("option", name="1. scene16.png").click()
    visitor.until(lambda: source(visitor, "#pm-groups") != now)


# ---- visitors --------------------------------------------------------------------------------------------------------


def test_two_visitors_at_once_never_mix(visit, files):
    one, other = visit(), visit()
    other.choose("#pm-method", "tome")
    other.keep(288)
    for visitor, number in ((one, 16), (other, 6)):
        visitor.add(files[number])
    one.send(truth(16)[0])
    other.send(truth(6)[0])
    for visitor in (one, other):
        visitor.until(lambda v=visitor: v.page.locator(".pm-merged.pm-done").count() == 1)
    assert one.last(".pm-merged .pm-text") == truth(16)[1] and f"{DEFAULT_METHOD} · 144" in one.last(".pm-label")
    assert other.last(".pm-question") == truth(6)[0] and "tome · 288" in other.last(".pm-label")
    assert one.page.locator(".pm-card").count() == other.page.locator(".pm-card").count() == 2


def test_a_visitor_who_leaves_frees_what_they_hold(visit, files, served, tmp_path):
    mine = tmp_path / "mine.png"  # no other visitor sends this one
    Image.open(files[16]).rotate(90).save(mine)
    visitor = visit()
    held = served.handlers.visitors.conversations
    visitor.ask("is there a star?", mine)
    visitor.until(lambda: source(visitor, "#pm-groups"))
    key = next(key for key, chat in held.items() if chat.turns and chat.turns[0].pictures[0].name == "mine.png")
    visitor.page.close()

    def gone():
        return key not in held and key not in served.blocks.state_holder.session_data

    for _ in range(600):  # Gradio notices a quarter of a minute later
        if gone():
            break
        visitor.context.pages or visitor.context.new_page()
        visitor.context.pages[0].wait_for_timeout(100)
    assert gone()
    assert len(served.blocks._queue.event_analytics) <= 1  # nor does Gradio keep a list of what visitors did


def test_who_comes_when_it_is_full_is_told(served, files, monkeypatch):
    visitors = served.handlers.visitors
    visitors.expire()
    monkeypatch.setattr(visitors, "most", len(visitors.conversations))
    with pytest.raises(Exception, match="visitors are here, and there is no room for more; come back later"):
        Client(served.url, verbose=False).predict(api_name="/conversation")


def test_no_address_is_fetched_for_a_client(served, monkeypatch):
    """Gradio would download it in the place of an upload."""
    fetched = []

    async def note(url, **_):
        fetched.append(url)
        raise RuntimeError("not in a test")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", note)
    file = {"path": "https://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    settings = ("pitome", "tokens", 144, 0.9, "default", "default", False, "nothing")
    with pytest.raises(Exception, match="addresses are not fetched here; send the picture itself"):
        Client(served.url, verbose=False).predict("is there a star?", file, *settings, api_name="/ask")
    assert fetched == []


# ---- how it looks ----------------------------------------------------------------------------------------------------

SHOWN = """const shown = e => {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    return box.width > 1 && box.height > 1 && style.visibility !== 'hidden' && style.opacity !== '0'
        && !e.closest('.sr-only, .visually-hidden, [aria-hidden=true]');
};"""
TEXTS = "'.pm-name, .pm-value, .pm-ratio, .pm-saved, .pm-label, .pm-plan, .pm-note, .pm-text, [role=tab]'"
MISFITS = """() => { SHOWN return [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return shown(e) && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + '.' + e.className) }"""
CUT = """() => { SHOWN return [...document.querySelectorAll(TEXTS)]
    .filter(e => shown(e) && e.textContent.trim() && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
    .map(e => e.textContent) }"""
SMALL = """() => { SHOWN return [...document.querySelectorAll(TEXTS)]
    .filter(e => shown(e) && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.textContent) }"""
TABS = (
    """() => { SHOWN return [...document.querySelectorAll('[role=tab]')].filter(shown).map(e => e.innerText.trim()) }"""
)
FIGURES = """() => { SHOWN return [...document.querySelectorAll('.pm-strip')].filter(shown)
    .map(strip => [...strip.querySelectorAll('.pm-value')].filter(shown).length) }"""


def asked_of(visitor, script):
    return visitor.page.evaluate(script.replace("SHOWN", SHOWN).replace("TEXTS", TEXTS))


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080), NARROW], ids=["1280", "1920", "390"])
def test_it_opens_at_the_top_with_a_merged_photograph(visit, size):
    visitor = visit(size)
    page = visitor.page
    page.wait_for_timeout(1000)
    assert page.evaluate("[scrollY, document.activeElement.tagName]") == [0, "BODY"]
    assert page.locator("#pm-which input").input_value().startswith("As set above: astronaut.png")
    assert page.locator("#pm-compare input").input_value() == "the plain model"
    assert "of the arithmetic before the first word is the vision tower's" in page.locator("#pm-about").inner_text()
    if size != NARROW:
        for part in ("#pm-keep", "#pm-groups", "#pm-box", "#pm-examples"):
            assert visitor.in_view(part), part
        left, right = page.evaluate(
            "(b => [b.left, document.documentElement.clientWidth - b.right])"
            "(document.querySelector('.gradio-container').getBoundingClientRect())"
        )
        assert abs(left - right) < 2
    visitor.shot(f"{size[0]}-open", whole=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 720), NARROW], ids=["1280", "390"])
def test_everyone_can_use_it(visit, size, scheme):
    """No rule of axe is broken, headings come in order, and the keyboard scrolls the log."""
    visitor = visit(size, scheme=scheme)
    page = visitor.page
    page.get_by_role("button", name="More settings").click()
    assert broken(page) == []
    page.get_by_role("button", name="what colour is the star?").click()
    visitor.until(lambda: page.locator(".pm-merged.pm-done").count() == 1)
    visitor.send("is there an elephant?")
    visitor.until(lambda: page.locator("#pm-notice .pm-error").count() == 1)
    for tab in ("Energy", "Tokens", "Accuracy", "Groups"):
        visitor.tab(tab)
        page.wait_for_timeout(500)
        assert broken(page) == [], tab
    assert page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName)") == ["H1", "H2"]
    log = page.get_by_role("log")
    log.focus()
    for key, at in (("Home", lambda top: top == 0), ("End", lambda top: size != NARROW or top > 0)):
        page.keyboard.press(key)
        visitor.until(lambda at=at: at(log.evaluate("e => e.scrollTop")))
    visitor.shot(f"{size[0]}-{scheme}")


def broken(page):
    return [
        (rule["impact"], rule["id"], [node["html"][:200] for node in rule["nodes"]])
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
def test_everything_fits_and_can_be_read(visit, files, size):
    visitor = visit(size)
    visitor.shot(f"{size[0]}-empty")
    opened = source(visitor, "#pm-groups")
    visitor.ask(truth(16)[0], files[16])
    visitor.until(lambda: visitor.page.locator("#pm-which input").input_value().startswith("1. scene16"))
    visitor.until(lambda: source(visitor, "#pm-groups") != opened)  # what is clicked before goes with its picture
    visitor.page.locator("#pm-groups img").click(position={"x": 200, "y": 260})
    visitor.until(lambda: "Token" in visitor.page.locator("#pm-picked").inner_text())
    assert asked_of(visitor, FIGURES) == [7, 7]
    tabs = ["Groups", "Energy", "Tokens", "Accuracy"]
    for tab in tabs:
        if tab != "Groups":
            visitor.tab(tab)
            visitor.page.wait_for_timeout(700)
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], f"{tab}: the page is {width} wide"
        assert asked_of(visitor, TABS) == tabs  # none of them behind a menu
        for question in (MISFITS, CUT, SMALL):
            assert asked_of(visitor, question) == [], tab
        sizes = visitor.page.evaluate(
            "[...document.querySelectorAll('.pm-chart text')].filter(e => e.getBoundingClientRect().height)"
            ".map(e => e.getBoundingClientRect().height)"
        )
        assert all(height >= 12 for height in sizes), sizes
        visitor.shot(f"{size[0]}-{tab.lower()}")
