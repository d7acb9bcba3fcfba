"""What tests of all folders share: one S3 server, helper modules, the benchmarks' own packages."""

import gc
import sys
from pathlib import Path

import pytest

# Imported by their plain names; behind all else, so that they hide nothing.
sys.path += [str(Path(__file__).parent / name) for name in ("helpers", "benchmarks")]


def pytest_collection_finish():
    """What importing made is never garbage: builds collect often, and need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # extensions complain of objects that outlive the interpreter


@pytest.fixture(scope="session")
def s3_endpoint():
    """URL of an S3 server (moto) on the loopback, with the empty buckets `bucket` and `corpora`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    files = s3fs.S3FileSystem(endpoint_url=url, key="testing", secret="testing")
    for bucket in ("bucket", "corpora"):  # all of moto's servers in one process share theirs
        files.makedirs(bucket, exist_ok=True)
    yield url
    server.stop()


@pytest.fixture
def s3_environment(s3_endpoint):
    """That S3 server is the one of the environment, where s3fs looks for it in real use."""
    import s3fs

    # fsspec keeps file systems by arguments, which do not hold an endpoint of the environment.
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    s3fs.S3FileSystem.clear_instance_cache()
