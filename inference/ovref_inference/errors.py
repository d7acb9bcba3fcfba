"""The errors of the light half. One bad query is a ValueError; these two are about files."""


class CollectionError(Exception):
    """A reference collection is missing, cut off, foreign or of another format version."""


class ModelLoadError(Exception):
    """A frozen model (encoder, proposer) cannot be loaded: its id, path or files are wrong."""
