"""The Lumina2 transformer, its names in other formats, and loading."""
