"""Models that ovref is known to work with: the table, random weights of each, and its own forward
pass, with which `ovref check` and the tests compare."""
