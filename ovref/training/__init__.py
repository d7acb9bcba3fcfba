"""Training of small heads on frozen models: the loop, its checkpoints, labelled images for it."""
