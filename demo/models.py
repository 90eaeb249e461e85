"""Models in memory: loaded once, shared by visitors, used by one run at a time, freed with the last visitor."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from pitome_mllm import attach, estimate, load
from pitome_mllm.costs.flops import MLP_MATRICES, kv_bytes_per_token
from pitome_mllm.families.features import pixel_values, tower_features
from pitome_mllm.loading import check_bits, read_config
from pitome_mllm.plan import Plan, make_plan
from pitome_mllm.settings import Settings

from .controls import Controls

Key = tuple[str, int | None]  # name and bits of a model
Say = Callable[[float, str], None]  # how far something is, from 0 to 1, and what happens


class Engine:
    """One attached model with a thread of its own, on which runs take their turn in the order they came.

    Settings are per run, through ``handle.using``.

    Attributes
    ----------
    key : name and bits, as the visitor gave them.
    users : visitors that hold it.
    """

    def __init__(self, key: Key, model: Any, processor: Any) -> None:
        self.key = key
        self.model, self.processor = model, processor
        self.handle = attach(model, keep=0.25)
        self.geometry = self.handle.geometry
        self.users = 0
        self._runs: list[Future] = []  # those that wait or run, in their order
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._picture_flops = lru_cache(maxsize=256)(self._per_picture)  # counting them takes a good part of a second

    def close(self) -> None:
        """Free the model once the run that is under way has ended; runs that wait are cancelled."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.handle.remove()
        self._picture_flops.cache_clear()
        del self.model, self.processor, self.handle
        gc.collect()  # models refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def name(self) -> str:
        name, bits = self.key
        return f"{name} ({bits} bit)" if bits else name

    @property
    def available(self) -> int:
        """Visual tokens per picture of the plain model."""
        return self.geometry.available

    def warm_up(self) -> None:
        """Run the tower once merged and once plain, so that the first figures are like all others."""
        blank = pixel_values(self.processor, Image.new("RGB", (32, 32)))
        tower_features(self.model, blank)
        with self.handle.using(None):
            tower_features(self.model, blank)

    def plan(self, controls: Controls) -> Plan:
        """What the settings come to; ValueError if they are not possible here."""
        return make_plan(Settings().changed(**controls.settings()), self.geometry)

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

    def cost(self, controls: Controls | None, pictures: int, prompt_tokens: int) -> tuple[float, float | None]:
        """MB of the prompt's KV cache, and 10^9 FLOPs up to the first new token.

        The latter None = not known: of this LLM, or of pictures that are cut into tiles. ``controls`` None = the plain
        model; ``prompt_tokens`` as the LLM reads them.
        """
        text = self.model.config.text_config
        kv = prompt_tokens * kv_bytes_per_token(text, self.model.dtype) / 1e6
        if text.model_type not in MLP_MATRICES or self.geometry.family.tiles:
            return kv, None
        llm = estimate(self.model, images=0, text_tokens=prompt_tokens).prefill_flops
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
        self.first = self.key(first, bits)
        self._options = {"dtype": dtype, "device": device}
        self._loading = threading.Lock()
        self._count = threading.Lock()
        self.loaded: dict[Key, Engine] = {}
        self._desk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="desk")

    @staticmethod
    def key(name: str, bits: int | None = None) -> Key:
        """What visitors call a model, in the form that `loaded` has."""
        return name.strip(), bits or None

    def open(self, key: Key, say: Say = lambda share, text: None) -> Engine:
        """The model, loaded if it is not yet there; give it back with `release`.

        One model is loaded at a time; who wants one that is in memory does not wait.

        Raises
        ------
        ValueError : as `load`, or not enough memory.
        """
        engine = self._take(key)
        if engine is None:
            say(0.0, f"waiting to load {key[0]}")
            with self._loading:
                engine = self._take(key) or self._add(self._load(key, say))  # another visitor may have loaded it
        say(1.0, f"{engine.name} is ready")
        return engine

    def check(self, key: Key) -> None:
        """Refuse what can be seen to be no model without loading it; ValueError as `load`."""
        if key not in self.loaded:
            name, bits = key
            check_bits(bits)
            read_config(name)

    def prepare(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do something short that takes much memory for a moment, such as decoding, on one thread for all visitors.

        The C library keeps what every thread once needed, and a page has dozens of threads.
        """
        return self._desk.submit(work, *given).result()

    def release(self, engine: Engine) -> None:
        """One visitor less; the last one to leave a model frees it, unless it is the first."""
        with self._count:
            engine.users -= 1
            freed = engine.users == 0 and engine.key != self.first
            if freed:
                del self.loaded[engine.key]
        if freed:
            engine.close()

    def _take(self, key: Key) -> Engine | None:
        """One visitor more for a model that is in memory."""
        with self._count:
            engine = self.loaded.get(key)
            if engine is not None:
                engine.users += 1
            return engine

    def _add(self, engine: Engine) -> Engine:
        with self._count:
            self.loaded[engine.key] = engine
            engine.users = 1
        return engine

    def _load(self, key: Key, say: Say) -> Engine:
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
