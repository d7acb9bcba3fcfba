"""The models of the miniature: small instances of the real architectures, and the noun tagger.

Any model id `miniature:<name>` means a folder here. `weights/README.md` says what each is;
`pipelines/recipes/miniature` made them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Holds `weights`, one folder a model, and `tagger`."""

WEIGHTS = (
    "stable_diffusion",
    "stable_diffusion_3",
    "clip",
    "clip_convnext",
    "dinov2",
    "dino",
    "classifier",
    "sam",
    "grounding_dino",
    "maskformer",
    "clip_rc",
    "fcclip",
    "open_mask_former",
)
"""Names of the shipped model folders of this package."""


def weights_path(name):
    """The folder of a shipped model.

    Args:
        name: a folder under `weights`, for instance `stable_diffusion` or `clip`.

    Returns:
        Path of the existing folder.
    """
    folder = FOLDER / "weights"
    if not (folder / name).is_dir():
        have = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"no miniature weights called {name!r} in {folder}; there are {have}"
        )
    return folder / name
