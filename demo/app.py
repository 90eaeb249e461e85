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

from pitome_mllm import METHODS
from pitome_mllm.serving.uploads import FORMATS, MAX_BYTES
from pitome_mllm.settings import DEFAULT_METHOD

from . import examples
from .belongings import Belongings
from .controls import AMOUNTS, MERGES, OWN_MERGES, OWN_PLACE, PLACES
from .engine import Engine
from .handlers import Handlers
from .visitors import MAX_VISITORS

HEAD = """<div id="pm-head"><h1>See the visual tokens merge</h1>
<p>A vision-language model reads a picture as hundreds of tokens, many of them alike. Merge them, ask both ways, and
compare answers, time and memory.</p></div>"""
EMPTY = (
    '<div class="pm-empty"><b>Paste or drop a picture, or take an example below, and ask about it.</b><br>'
    "Tick <i>Compare</i> to see the plain model's answer beside it.<br>"
    "Send a picture without a question to look inside only.</div>"
)
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
STYLE = Path(__file__).with_name("style.css")
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
DOWNLOAD = "() => setTimeout(() => document.querySelector('#pm-file').click(), 200)"  # once it has the new file
LIVE_SECONDS = 600  # that a file which nobody asked about, or an old drawing, stays in the temporary folder
CACHE = "cache"  # Gradio's folder in ours


def theme() -> gr.themes.Base:
    """Colours and fonts that every machine has; nothing is fetched."""
    made = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO)
    subdued = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    return made.set(**subdued, block_label_text_color="*neutral_700", block_title_text_color="*neutral_700")


class Page:
    """The layout, and what each part does.

    Parameters
    ----------
    engine : what visitors talk to.
    folder : temporary, for examples and downloads.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        with gr.Blocks(title="pitome-mllm", analytics_enabled=False, delete_cache=(60, LIVE_SECONDS)) as self.blocks:
            gr.HTML(HEAD)
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=340):
                    self._lay_out_chat(folder)
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_settings()
                    self._lay_out_look()
                    self.about = gr.HTML(elem_id="pm-about")
            of_the_page = list((folder / CACHE).rglob("*"))  # that Gradio has copied into its folder by now
            self.handlers = Handlers(engine, Belongings(folder / CACHE, keep=of_the_page))
            self._wire()
            self._offer_api()

    # layout

    def _lay_out_chat(self, folder: Path) -> None:
        self.chat = gr.Chatbot(
            show_label=False, elem_id="pm-chat", height=620, layout="panel", placeholder=EMPTY, latex_delimiters=[],
            buttons=[], allow_tags=False, feedback_options=None, group_consecutive_messages=False,
        )  # fmt: skip
        self.notice = gr.HTML(visible=False, padding=False, elem_id="pm-notice")
        self.box = gr.MultimodalTextbox(
            show_label=False, placeholder="Ask about your picture", file_count="multiple",
            file_types=[f".{name.lower()}" for name in (*FORMATS, "jpg")], elem_id="pm-box", autofocus=True,
        )  # fmt: skip
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", min_width=56, elem_id="pm-stop")
            self.retry = gr.Button("Retry", size="sm", min_width=56, elem_id="pm-retry")
            self.clear = gr.Button("Clear", size="sm", min_width=56, elem_id="pm-clear")
            self.save = gr.Button("JSON", size="sm", min_width=56, elem_id="pm-json")
            self.file = gr.DownloadButton(visible="hidden", elem_id="pm-file")
        made = examples.write(folder)
        gr.Examples([[{"text": asked, "files": [str(path)]}] for asked, path in made], [self.box], label="Examples")
        gr.HTML(f'<div class="pm-note">{examples.NOTE}</div>', padding=False)
        with gr.Accordion("Webcam", open=False):
            self.camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, show_label=False, height=240)

    def _lay_out_settings(self) -> None:
        with gr.Group():
            with gr.Row():
                self.method = gr.Dropdown(
                    list(METHODS), value=DEFAULT_METHOD, label="Method", elem_id="pm-method", min_width=170
                )
                self.where = gr.Dropdown(PLACES, value=OWN_PLACE, label="Where", elem_id="pm-where", min_width=170)
                self.merges = gr.Dropdown(
                    MERGES, value=OWN_MERGES, label="Merging blocks", elem_id="pm-merges", min_width=170
                )
            self.amount = gr.Radio(
                [("tokens left", AMOUNTS[0]), ("ratio per block", AMOUNTS[1])], value=AMOUNTS[0], label="How much",
                elem_id="pm-amount",
            )  # fmt: skip
            most = self.engine.available
            self.keep = gr.Slider(1, most, most // 4, step=1, label="Visual tokens per picture", elem_id="pm-keep")
            self.ratio = gr.Slider(
                0.5, 1, 0.9, step=0.005, label="Share that every block keeps", elem_id="pm-ratio", visible=False
            )
            self.published = gr.Checkbox(
                False, label="As published: what the method's paper does", elem_id="pm-published"
            )
            self.compare = gr.Checkbox(False, label="Compare: the plain model answers too", elem_id="pm-compare")
            self.plan = gr.HTML(elem_id="pm-plan")
        amounts = [self.amount, self.keep, self.ratio]
        self.controls = [self.method, *amounts, self.where, self.merges, self.published]

    def _lay_out_look(self) -> None:
        gr.Markdown("### Look inside")
        self.which = gr.Dropdown([], label="Picture", elem_id="pm-which")
        with gr.Tabs():
            with gr.Tab("Groups"):
                self.groups = gr.Image(
                    show_label=False, interactive=False, buttons=[], elem_id="pm-groups", format="png", height=400
                )
                self.picked = gr.HTML(elem_id="pm-picked")
            with gr.Tab("Energy"):
                self.step = gr.Slider(
                    0, 1, 0, step=1, label="Merge, in the order of the blocks", elem_id="pm-step", interactive=True
                )
                self.energy = gr.Image(
                    show_label=False, interactive=False, buttons=[], elem_id="pm-energy", format="png", height=440
                )
                self.energy_note = gr.HTML(elem_id="pm-energy-note")
            with gr.Tab("Tokens"):
                self.tokens = gr.HTML(elem_id="pm-tokens")
            with gr.Tab("Accuracy"):
                self.accuracy = gr.HTML(elem_id="pm-accuracy")
        self.inside = [self.groups, self.picked, self.step, self.energy, self.energy_note, self.tokens]

    # wiring

    def _wire(self) -> None:
        do = self.handlers
        asked = [self.box, *self.controls, self.compare]
        shown = [self.chat, self.notice, self.box]
        look = {
            "fn": do.newest_look,
            "outputs": [self.which, *self.inside],
            "trigger_mode": "multiple",
            **QUIET,
        }
        self.box.submit(do.send, asked, shown, trigger_mode="multiple", **QUIET).then(**look)
        self.retry.click(do.ask_again, asked[1:], shown, **QUIET).then(**look)
        self.stop.click(do.end, None, None, queue=False, **QUIET)
        cleared = gr.on([self.clear.click, self.chat.clear], do.forget, None, shown, **QUIET)
        cleared.then(**look).then(do.tidy, None, None, **QUIET)
        self.save.click(do.write_json, None, self.file, **QUIET).then(None, None, None, js=DOWNLOAD)
        self.camera.change(do.snap, [self.box, self.camera], [self.box, self.camera], **QUIET)
        planned = [self.plan, self.accuracy, self.keep, self.ratio]
        gr.on(
            [self.blocks.load, *(control.change for control in self.controls)], do.show_plan, self.controls, planned,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.blocks.load(do.show_model, None, self.about, **QUIET)
        self.which.input(do.show_look, self.which, self.inside, **QUIET)
        self.groups.select(do.pick, self.which, [self.groups, self.picked], **QUIET)
        self.step.input(
            do.show_energy, [self.which, self.step], [self.energy, self.energy_note],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.blocks.unload(self._leave)
        uploads_only(self.box, self.camera)

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
        footer_links=[], ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        state_session_capacity=2 * MAX_VISITORS,  # also of those who never said goodbye
        **launch,
    )  # fmt: skip
    return page
