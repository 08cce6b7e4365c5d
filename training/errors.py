"""What can go wrong, as one family: every message names the thing, the place and the remedy."""


class Lumina2Error(Exception):
    """Anything this project raises on purpose."""


class SettingError(Lumina2Error):
    """A setting is out of range or contradicts another."""


class DataError(Lumina2Error):
    """A folder, picture or caption cannot be used."""


class ModelError(Lumina2Error):
    """A model or LoRA file is of another family or size than needed."""


class CacheError(Lumina2Error):
    """A cache entry that should be there is missing or damaged."""


class RunError(Lumina2Error):
    """A training run cannot start, go on or be found."""
