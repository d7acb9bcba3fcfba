"""The public names of the light half, whose import loads neither torch nor faiss."""

import subprocess
import sys

import ovref_inference


def test_the_public_names():
    assert ovref_inference.__all__ == [
        "CollectionError",
        "ModelError",
        "OvrefError",
        "PrototypeHead",
        "Prototypes",
        "ReferenceCollection",
        "Segmentation",
        "Segmenter",
        "SegmenterModule",
        "Support",
        "load_segmenter",
        "open",
        "read_image",
        "register_backbone",
        "segment_features",
    ]
    assert all(getattr(ovref_inference, name) for name in ovref_inference.__all__)


def test_importing_loads_no_library():
    program = (
        "import sys, ovref_inference; "
        "print([n for n in ('torch', 'faiss', 'pyarrow', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
