"""The embedded benchmark: scenes, questions about them, and the score of answers."""
