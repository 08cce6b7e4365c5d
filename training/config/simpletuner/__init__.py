"""SimpleTuner's ``config.json``: which options there are, what they mean here, reading and writing."""
