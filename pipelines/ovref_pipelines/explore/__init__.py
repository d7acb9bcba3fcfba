"""The explorer: a local web page over a build or a published collection."""
