"""Implementations of the verbs of `ovref`, one module each; the build itself is in `recipe`."""
