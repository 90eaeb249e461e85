"""Models in memory: loaded once, shared by visitors, used by one run at a time, freed with the last visitor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from pitome_mllm import attach, estimate, load
from pitome_mllm.accounting import MLP_MATRICES, kv_bytes_per_token
from pitome_mllm.features import pixel_values, tower_features
from pitome_mllm.loading import read_config

from .controls import Controls

Say = Callable[[float, str], None]  # how far something is, from 0 to 1, and what happens


class Engine:
    """One attached model with a thread of its own, on which runs take their turn in the order they came.

    Settings are per run, through ``handle.using``.

    Attributes
    ----------
    key : name and bits, as the visitor gave them.
    users : visitors that hold it.
    """

    def __init__(self, key: tuple[str, int | None], model: Any, processor: Any) -> None:
        self.key = key
        self.model, self.processor = model, processor
        self.handle = attach(model, keep=0.25)
        self.users = 0
        self._runs: list[Future] = []  # those that wait or run, in their order
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._picture_flops = lru_cache(maxsize=256)(self._per_picture)  # counting them takes a good part of a second

    @property
    def name(self) -> str:
        name, bits = self.key
        return f"{name} ({bits} bit)" if bits else name

    @property
    def available(self) -> int:
        """Visual tokens per picture of the plain model."""
        return self.handle.geometry.available

    def warm_up(self) -> None:
        """Run the tower once merged and once plain, so that the first figures are like all others."""
        blank = pixel_values(self.processor, Image.new("RGB", (32, 32)))
        tower_features(self.model, blank)
        with self.handle.using(None):
            tower_features(self.model, blank)

    def plan(self, controls: Controls) -> Any:
        """What the settings come to; ValueError if they are not possible here."""
        with self.handle.using(**controls.settings()):
            return self.handle.plan

    def submit(self, run: Callable[[], Any]) -> Future:
        """Queue a run on the model's thread."""
        future = self._thread.submit(run)
        with self._lock:
            self._runs.append(future)
        future.add_done_callback(self._finished)
        return future

    def ahead(self, run: Future) -> int:
        """How many runs come before one that `submit` returned."""
        with self._lock:
            return self._runs.index(run) if run in self._runs else 0

    def _finished(self, run: Future) -> None:
        with self._lock:
            self._runs.remove(run)  # and with it what its visitor holds

    def cost(self, controls: Controls | None, pictures: int, text_tokens: int) -> tuple[float, float | None]:
        """MB of the prompt's KV cache, and 10^9 FLOPs up to the first new token; None = not known for this LLM.

        ``controls`` None = the plain model.
        """
        text = self.model.config.text_config
        keep = self.available if controls is None else self.plan(controls).keep
        prompt = pictures * keep + text_tokens
        kv = prompt * kv_bytes_per_token(text, self.model.dtype) / 1e6
        if text.model_type not in MLP_MATRICES:
            return kv, None
        llm = estimate(self.model, images=0, text_tokens=prompt).prefill_flops
        return kv, (pictures * self._picture_flops(controls) + llm) / 1e9

    def _per_picture(self, controls: Controls | None) -> int:
        """FLOPs of tower, merging and projector for one picture."""
        one = estimate(self.model, **({} if controls is None else controls.settings()), text_tokens=0)
        return one.tower_flops + one.merging_flops + one.projector_flops


class Models:
    """All models in memory.

    Parameters
    ----------
    first : name and bits of the model that visitors start with; it stays in memory.
    dtype, device : of every model, as for `load`.
    """

    def __init__(
        self, first: str = "tiny", bits: int | None = None, dtype: str | None = None, device: str | None = None
    ) -> None:
        self.first = (first, bits)
        self._options = {"dtype": dtype, "device": device}
        self._loading = threading.Lock()
        self._count = threading.Lock()
        self.loaded: dict[tuple[str, int | None], Engine] = {}

    def open(self, name: str, bits: int | None = None, say: Say = lambda share, text: None) -> Engine:
        """The model, loaded if it is not yet there; give it back with `release`.

        Raises
        ------
        ValueError : as `load`, or not enough memory.
        """
        key = (name.strip(), bits or None)
        say(0.0, f"waiting to load {name}")
        with self._loading:
            engine = self.loaded.get(key) or self._load(key, say)
            with self._count:
                self.loaded[key] = engine
                engine.users += 1
        say(1.0, f"{engine.name} is ready")
        return engine

    def release(self, engine: Engine) -> None:
        """One visitor less; the last one to leave a model frees it, unless it is the first."""
        with self._count:
            engine.users -= 1
            if engine.users == 0 and engine.key != self.first:
                self.loaded.pop(engine.key, None)

    def _load(self, key: tuple[str, int | None], say: Say) -> Engine:
        name, bits = key
        say(0.1, f"reading the configuration of {name}")
        read_config(name)
        say(0.2, f"loading the weights of {name}")
        try:
            model, processor = load(name, bits=bits, **self._options)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(f"not enough memory for {name}; choose 4 or 8 bits, or a smaller model") from error
        say(0.9, "warming up")
        engine = Engine(key, model, processor)
        engine.warm_up()
        return engine
