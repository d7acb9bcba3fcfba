"""A package that is not installed gives one sentence with the pip command on first use."""

import subprocess
import sys

import pytest

from ovref_inference import ReferenceCollection
from ovref_inference.errors import CollectionError, MissingPackageError
from ovref_inference.lazy import missing_package

PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from ovref_inference.errors import OvrefError
try:
    {statement}
except OvrefError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "package, statement, found",
    [
        ("torch", "from ovref_inference.encoders import load_text_encoder", "encoders.load_text"),
        ("open_clip", "from ovref_inference.encoders import load_region_encoder", "load_region"),
        ("scipy", "import ovref_inference.proposers as p; p.load_proposer", "load_proposer"),
        ("torch", "from ovref_inference.segmenters import FossilSegmenter", "FossilSegmenter"),
    ],
)
def test_the_first_use_of_what_is_missing_names_the_extra(package, statement, found):
    program = PROGRAM.format(package=package, statement=statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert found in line
    assert line.endswith(f"needs {package}, which is not installed: pip install 'ovref[segment]'")


def test_a_store_whose_client_is_missing_names_the_extra():
    statement = "import ovref_inference as o; o.ReferenceCollection.open('s3://bucket/collection')"
    program = PROGRAM.format(package="s3fs", statement=statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == (
        "s3://bucket/collection needs s3fs, which is not installed: pip install 'ovref[s3]'\n"
    ), done.stderr


def test_an_unknown_protocol_is_an_error_of_the_collection():
    with pytest.raises(CollectionError, match="nope://bucket/x cannot be opened"):
        ReferenceCollection.open("nope://bucket/x")


def test_other_missing_modules_are_errors_as_they_are():
    error = ModuleNotFoundError("No module named 'x'", name="x")
    assert missing_package(error, "y") is error
    submodule = ModuleNotFoundError("No module named 'torch.x'", name="torch.x")
    assert isinstance(missing_package(submodule, "y"), MissingPackageError)
