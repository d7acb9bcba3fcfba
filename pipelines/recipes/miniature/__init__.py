"""How the miniature's models are trained, exported and measured.

    python -m recipes.miniature.train_vae --work runs/miniature_work

This needs the installation by `make install`, whose path file adds the folder `pipelines`.

Each `train_*` module trains one model in a work folder, in this order: `train_vae`,
`train_classifier`, `train_backbone`, `refine_backbone`, `train_clip`, `train_diffusion`, and at any
time `train_sam`, `train_grounding_dino`, `train_maskformer` and `train_tagger`. `export` writes the
models into `pipelines/ovref_miniature`, `measure` and `measure_grounding` measure those, and
`restart` makes a work folder from which training can resume. `train_clip_convnext` and
`train_diffusion_transformer` want the exported models, the latter a GPU as well;
`measure_transformer` measures what it made.
"""
