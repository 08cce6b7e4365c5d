"""A training run: its identity, its folder, its loop."""
