"""The miniature: a small drawn world and small models of the real architectures trained on it.

No number measured on it says anything about the real models; it exists so that everything can be
run, tested and compared without a download. `ovref/miniature/weights/README.md` says what each
folder is.
"""

from importlib.resources import files
from pathlib import Path

WEIGHTS = (
    "stable_diffusion",
    "clip",
    "dinov2",
    "dino",
    "classifier",
    "sam",
    "grounding_dino",
    "maskformer",
)
"""Names of the shipped model folders of this package."""


def weights_path(name):
    """The folder of a shipped model.

    Args:
        name: a folder under `weights`, for instance `stable_diffusion` or `clip`.

    Returns:
        Path of the existing folder.
    """
    folder = Path(str(files(__name__))) / "weights"
    if not (folder / name).is_dir():
        have = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"no miniature weights called {name!r} in {folder}; there are {have}"
        )
    return folder / name
