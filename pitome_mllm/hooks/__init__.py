"""What `attach` puts on a model: hooks on its tower, its prompt and its LLM, and how they come off."""
