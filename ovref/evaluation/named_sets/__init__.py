"""The field's labelled data sets by name: `ovref.evaluation.named_sets.opening.open_set`.

Each set is a `definitions.NamedSet`: its class lists, the folders it is found in, and what the
values of its label files mean. Nothing here needs mmsegmentation or detectron2.
"""
