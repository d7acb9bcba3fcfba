"""The miniature: a small synthetic world, whose scenes have captions and exact masks.

Small models of the real architectures, trained on it, are in the package `ovref_miniature`, which
is installed on its own. No number measured on it says anything about the real models; it exists so
that everything can be run, tested and compared without a download.
"""
