"""The page: layout and wiring. What happens is in `handlers` and `session`, how it looks in `view` and style.css."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # else 10,000 events stay in memory, and after each one
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),  # pandas counts them all anew, for a page of figures that is off
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import gradio as gr

from pitome_mllm.serving.resolution import CONTROL
from pitome_mllm.serving.uploads import FORMATS, MAX_BYTES
from pitome_mllm.settings import DEFAULT_METHOD

from . import examples
from .controls import AMOUNTS, MERGES, NOTHING, OWN, PER_CENT, PLACES, PLAIN, menu
from .engine import Engine
from .handlers import Handlers
from .pictures import open_upload
from .visitors import MAX_VISITORS

HEAD = """<div id="pm-head"><h1>See the visual tokens merge</h1>
<p>A vision-language model reads a picture as hundreds of tokens, many of them alike. Merge them, and compare answers,
time and memory.</p></div>"""
EMPTY = (
    '<div class="pm-empty"><b>Take an example below, or drop a picture and ask about it.</b><br>'
    "The plain model answers beside the merged one; <i>Compare with</i> takes any other method instead.<br>"
    "A picture without a question is only looked into.</div>"
)
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
STYLE = Path(__file__).with_name("style.css")
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
DOWNLOAD = """told => Object.assign(document.createElement("a"), {
    href: URL.createObjectURL(new Blob([told], {type: "application/json"})), download: "conversation.json"}).click()"""
SHOW = """() => document.querySelector("#pm-chat").scrollIntoView({block: innerWidth < 760 ? "start" : "nearest"})"""
NAMES = """() => {  // what Gradio leaves without a name, or out of the keyboard's reach
    const named = button => button.innerText.trim() || (image =>
        image?.alt || decodeURI(image?.src ?? "").split("/").pop())(button.querySelector("img"));
    const name = () => {
        document.querySelectorAll("#pm-chat [role=log]").forEach(log => log.tabIndex = 0);
        document.querySelectorAll("#pm-examples .gallery-item, #pm-groups button, #pm-energy button").forEach(
            button => button.ariaLabel = named(button));
    };
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
LIVE_SECONDS = 600  # that what visitors sent, and what was drawn for them, stays in the temporary folder
CACHE = "cache"  # Gradio's folder in ours


def theme() -> gr.themes.Base:
    """Colours and fonts that every machine has; nothing is fetched."""
    made = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO)
    subdued = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    return made.set(**subdued, block_label_text_color="*neutral_700", block_title_text_color="*neutral_700")


class Page:
    """The layout, and what each part does; ``folder`` is temporary, for examples."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        made = examples.write(folder)
        self.handlers = Handlers(engine, open_upload(made[-2][1]))
        with gr.Blocks(title="pitome-mllm", analytics_enabled=False, delete_cache=(60, LIVE_SECONDS)) as self.blocks:
            gr.HTML(HEAD)
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=340):
                    self._lay_out_settings()
                    self._lay_out_look()
                with gr.Column(scale=3, min_width=340):
                    self._lay_out_chat(made)
            self._wire()
            self._offer_api()

    # layout

    def _lay_out_settings(self) -> None:
        most, methods = self.engine.available or PER_CENT, menu()
        per = "Visual tokens per picture" if self.engine.available else "Visual tokens left, % of a picture's"
        rival = [("a smaller picture", CONTROL)] if self.engine.scales else []
        with gr.Group():
            with gr.Row():
                self.method = gr.Dropdown(
                    methods, value=DEFAULT_METHOD, label="Method", elem_id="pm-method", min_width=150
                )
                self.compare = gr.Dropdown(
                    [("the plain model", PLAIN), *rival, ("nothing", NOTHING), *methods], value=PLAIN,
                    label="Compare with", elem_id="pm-compare", min_width=150,
                )  # fmt: skip
            with gr.Group() as self.by_tokens:
                self.keep = gr.Slider(1, most, most // 4, step=1, label=per, elem_id="pm-keep")
            with gr.Group(visible=False) as self.by_ratio:
                self.ratio = gr.Slider(
                    0.5, 1, 0.9, step=0.005, label="Share that every block keeps", elem_id="pm-ratio"
                )
            for slider in (self.keep, self.ratio):  # an update of theirs would undo this
                slider.preprocess = lambda value: value  # what is out of range, or cleared, is said in our words
            self.plan = gr.HTML(elem_id="pm-plan")
            with gr.Accordion("More settings", open=False), gr.Row():
                self.amount = gr.Dropdown(_turned(AMOUNTS), value="tokens", label="How much", elem_id="pm-amount")
                self.where = gr.Dropdown(_turned(PLACES), value=OWN, label="Where", elem_id="pm-where")
                self.merges = gr.Dropdown(MERGES, value=OWN, label="Merging blocks", elem_id="pm-merges")
                self.published = gr.Checkbox(label="As published: what the method's paper does", elem_id="pm-published")
        amounts = [self.amount, self.keep, self.ratio]
        self.controls = [self.method, *amounts, self.where, self.merges, self.published]

    def _lay_out_look(self) -> None:
        gr.HTML("<h2>Look inside</h2>")
        shown = {"show_label": False, "interactive": False, "buttons": [], "format": "jpeg", "height": 300}
        with gr.Tabs():
            with gr.Tab("Groups"):
                self.groups = gr.Image(elem_id="pm-groups", alt_text="which patches became one token", **shown)
                self.token = gr.Slider(0, 1, 0, step=1, label="Light up token", elem_id="pm-token", interactive=True)
                self.picked = gr.HTML(elem_id="pm-picked")
            with gr.Tab("Energy"):
                self.energy = gr.Image(elem_id="pm-energy", alt_text="the energy of every patch", **shown)
                self.step = gr.Slider(
                    0, 1, 0, step=1, label="Merge, in the order of the blocks", elem_id="pm-step", interactive=True
                )
                self.energy_note = gr.HTML(elem_id="pm-energy-note")
            with gr.Tab("Tokens"):
                self.tokens = gr.HTML(elem_id="pm-tokens")
            with gr.Tab("Accuracy"):
                self.accuracy = gr.HTML(elem_id="pm-accuracy")
        self.which = gr.Dropdown([], label="Picture", elem_id="pm-which")
        self.inside = [self.groups, self.token, self.picked]

    def _lay_out_chat(self, made: list[tuple[str, Path]]) -> None:
        self.chat = gr.Chatbot(
            show_label=False, elem_id="pm-chat", layout="panel", placeholder=EMPTY, latex_delimiters=[],
            buttons=[], allow_tags=False, feedback_options=None, group_consecutive_messages=False,
        )  # fmt: skip
        self.notice = gr.HTML(visible=False, padding=False, elem_id="pm-notice")
        self.box = gr.MultimodalTextbox(
            show_label=False, placeholder="Ask about your picture", file_count="multiple",
            file_types=[f".{name.lower()}" for name in (*FORMATS, "jpg")], elem_id="pm-box", autofocus=False,
        )  # fmt: skip
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", min_width=56, elem_id="pm-stop")
            self.retry = gr.Button("Retry", size="sm", min_width=56, elem_id="pm-retry")
            self.clear = gr.Button("Clear", size="sm", min_width=56, elem_id="pm-clear")
            self.save = gr.Button("JSON", size="sm", min_width=56, elem_id="pm-json")
            self.told = gr.Textbox(visible=False)
        rows = [[{"text": asked, "files": [str(path)]}] for asked, path in made]
        self.examples = gr.Examples(
            rows, [self.box], label="Examples: each starts a new conversation", elem_id="pm-examples"
        )
        gr.HTML(f'<div class="pm-note">{examples.NOTE}</div>', padding=False)
        self.about = gr.HTML(elem_id="pm-about", padding=False)
        with gr.Accordion("Webcam", open=False):
            self.camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, show_label=False, height=240)

    # wiring

    def _wire(self) -> None:
        do = self.handlers
        asked = [self.box, *self.controls, self.compare]
        shown, inside = [self.chat, self.notice, self.box], [self.which, *self.inside]
        last = {"trigger_mode": "always_last", **QUIET}
        changed = [self.blocks.load, *(control.change for control in self.controls)]
        cleared = gr.on([self.clear.click, self.chat.clear], do.forget, None, shown, **QUIET)
        for said in (
            self.box.submit(do.send, asked, shown, trigger_mode="multiple", **QUIET),
            self.retry.click(do.ask_again, asked[1:], shown, **QUIET),
            self.examples.load_input_event.then(do.begin, asked, shown, trigger_mode="multiple", **QUIET),
        ):
            said.then(None, None, None, js=SHOW)
            self._look_again(said.then(do.newest_look, None, inside, trigger_mode="multiple", **QUIET))
        settings = [self.which, *self.controls]
        self._look_again(gr.on(changed, do.redraw, settings, inside, **last))
        self._look_again(cleared.then(do.redraw, settings, inside, **last))
        self._look_again(self.which.input(do.show_groups, self.which, self.inside, **QUIET))
        gr.on([self.examples.dataset.click, self.box.submit], None, None, None, js=SHOW)
        self.stop.click(do.end, None, None, queue=False, **QUIET)
        self.save.click(do.to_json, None, self.told, **QUIET).then(None, self.told, None, js=DOWNLOAD)
        self.camera.change(do.snap, [self.box, self.camera], [self.box, self.camera], **QUIET)
        planned = [self.plan, self.accuracy, self.by_tokens, self.by_ratio]
        gr.on(changed, do.show_plan, self.controls, planned, **last)
        self.blocks.load(do.show_model, None, self.about, **QUIET)
        self.groups.select(do.pick, self.which, [self.groups, self.picked, self.token], **QUIET)
        self.token.input(do.light, [self.which, self.token], [self.groups, self.picked], preprocess=False, **last)
        energy = [self.energy, self.energy_note]
        self.step.input(do.show_energy, [self.which, self.step], energy, preprocess=False, **last)
        self.blocks.unload(self._leave)
        uploads_only(self.box, self.camera)

    def _look_again(self, shown: Any) -> None:
        """Once other groups are shown, the tabs beside them follow."""
        steps = [self.step, self.energy, self.energy_note, self.tokens]
        shown.then(self.handlers.show_steps, self.which, steps, trigger_mode="always_last", **QUIET)

    def _leave(self, request: gr.Request) -> None:
        """A visitor closed the page. Gradio would keep what their parts showed, some 100 kB, in case they come back."""
        self.handlers.leave(request)
        held = self.blocks.state_holder
        with held.lock:
            held.session_data.pop(request.session_hash, None)
            held.time_last_used.pop(request.session_hash, None)

    def _offer_api(self) -> None:
        """What gradio_client calls: hidden parts, so that uploads pass the same checks."""
        do = self.handlers
        picture = gr.File(visible=False, label="picture", file_types=["image"])
        question = gr.Textbox(visible=False, label="question")
        answer = gr.JSON(visible=False, label="turn")
        button = gr.Button(visible=False)
        uploads_only(picture)
        inputs = [question, picture, *self.controls, self.compare]
        button.click(do.api_ask, inputs, answer, api_name="ask")
        button.click(do.api_conversation, None, answer, api_name="conversation")


def _turned(words: dict[str, str]) -> list[tuple[str, str]]:
    """Values with their words, as a menu takes them."""
    return [(said, value) for value, said in words.items()]


def uploads_only(*parts: gr.components.Component) -> None:
    """Have parts of a page refuse addresses in the place of files, which Gradio would fetch from other machines."""

    def guarded(take: Callable[..., Any]) -> Callable[..., Any]:
        async def taken(path: Any) -> Any:
            if str(path).startswith(("http://", "https://")):
                raise gr.Error("addresses are not fetched here; send the picture itself", print_exception=False)
            return await take(path)

        return taken

    for part in parts:
        part.async_move_resource_to_block_cache = guarded(part.async_move_resource_to_block_cache)


def serve(engine: Engine, folder: Path, host: str, port: int | None, share: bool, **launch: Any) -> Page:
    """Build the page and serve it until interrupted; with ``prevent_thread_lock=True`` return at once.

    All that is written goes into ``folder``, which the caller removes.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder / CACHE)
    engine.warm_up()
    page = Page(engine, folder)
    page.handlers.visitors.watch()
    page.blocks.queue(default_concurrency_limit=32, max_size=256)
    page.blocks.launch(
        server_name=host, server_port=port, share=share, theme=theme(), css_paths=STYLE, max_file_size=MAX_BYTES,
        js=NAMES, footer_links=[], ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        state_session_capacity=2 * MAX_VISITORS,  # also of those who never said goodbye
        **launch,
    )  # fmt: skip
    return page
