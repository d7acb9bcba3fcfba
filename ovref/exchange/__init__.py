"""Import and export: photographs, class lists, segmentations, collections."""
