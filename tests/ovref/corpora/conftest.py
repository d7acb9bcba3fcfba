"""An S3 server (moto) on the loopback."""

import pytest


@pytest.fixture
def bucket(s3_environment):
    """An s3fs file system with the bucket `corpora`, found through the environment."""
    import s3fs

    return s3fs.S3FileSystem()
