"""Latents and text embeddings, encoded once and kept on disk under what they were made from."""
