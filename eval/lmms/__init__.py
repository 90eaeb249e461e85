"""Plug-in for lmms-eval: ``--model pitome_llava``."""
