"""SimpleTuner's ``multidatabackend.json``: its keys, reading and writing."""
