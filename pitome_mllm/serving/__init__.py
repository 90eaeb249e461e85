"""What serves strangers: prompts and uploads with limits, for chat and server, and the OpenAI-compatible server."""
