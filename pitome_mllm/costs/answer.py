"""What an answer cost: the one record of it, for command line and chat."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class AnswerCost:
    """The cost of one answer; None = not measured, or not known.

    Attributes
    ----------
    visual_tokens, prompt_tokens : int or None
        Of all images and of the whole prompt, as the LLM reads them; counted.
    tower_ms : float or None
        The vision tower with its merging, by the clock.
    prefill_ms : float or None
        From the images to the first new token, tower included, by the clock.
    per_token_ms : float or None
        Each new token after the first, by the clock.
    kv_cache_mb : float or None
        Keys and values in 10^6 bytes, calculated.
    gflops : float or None
        10^9 floating-point operations, calculated; None for an LLM whose FLOPs `flops` does not know.
    """

    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    tower_ms: float | None = None
    prefill_ms: float | None = None
    per_token_ms: float | None = None
    kv_cache_mb: float | None = None
    gflops: float | None = None

    def over(self, plain: AnswerCost | None) -> dict[str, float]:
        """Each figure as a share of another answer's, where both are known."""
        if plain is None:
            return {}
        pairs = {name: (value, getattr(plain, name)) for name, value in asdict(self).items()}
        return {name: a / b for name, (a, b) in pairs.items() if a is not None and b}
