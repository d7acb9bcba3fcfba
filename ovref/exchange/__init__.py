"""What goes in and out of ovref: photographs, class lists, segmentations, collections."""
