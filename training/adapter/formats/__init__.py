"""Adapter files in every format that Lumina2's loaders read, through one form that all of them are read into."""
