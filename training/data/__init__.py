"""Pictures and captions: where they come from, what the model sees of them, and in which order."""
