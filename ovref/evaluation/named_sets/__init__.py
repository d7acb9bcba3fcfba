"""Published labelled data sets by name: `ovref.evaluation.named_sets.opening.open_set`.

Each set is a `layouts.NamedSet`: its class lists, its possible folder layouts, and the meaning of
the values in its label files. Nothing here needs mmsegmentation or detectron2.
"""
