"""Runs a step's shards through its stages, in this process; what any engine needs."""
