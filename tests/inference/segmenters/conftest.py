"""A trained head for the tests of this folder."""

from trained_heads import trained_head

__all__ = ["trained_head"]
