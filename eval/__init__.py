"""Scenes, questions, the embedded model's training recipe and its benchmark."""
