"""Encoders alone: published tables of retrieval and classification, and real weights on real photographs."""
