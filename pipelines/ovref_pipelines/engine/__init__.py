"""Runs a step's shards through its stages in this process; shared code of all engines."""
