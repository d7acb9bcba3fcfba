"""Runs the builder's stages: shards on Ray actors or in this process, and the recipes."""
