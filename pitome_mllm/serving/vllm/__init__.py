"""The vLLM plug-in: LLaVA-1.5 and LLaVA-NeXT with merged visual tokens, under architecture names of their own.

vLLM calls `register` in every one of its processes, so nothing heavy is imported here. Read next: `spec` for what an
operator and a request may ask, `processing` for the prompt, `tower` for merging, `models` for the models.
"""

KEY = "visual_token_merging"  # in the model's configuration, and in the ``mm_processor_kwargs`` of a request
MIDDLEWARE = f"{__name__}.middleware.Keep"
BEGINNING = f"{MIDDLEWARE}AndBegin"  # in place of it, where a chat template leaves out the token that texts begin with
PREFIX = "Pitome"  # vLLM's own classes keep their names
ARCHITECTURES = {name: PREFIX + name for name in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")}


def register() -> None:
    """Tell vLLM's registry where the architectures are; the entry point of ``vllm.general_plugins``."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
