"""What the verbs of the command `ovref` do, one module each; `recipe` has the build itself."""
