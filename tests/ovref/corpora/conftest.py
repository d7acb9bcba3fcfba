"""An S3 server (moto) on the loopback."""

import pytest


@pytest.fixture(scope="session")
def bucket(s3_endpoint):
    """An s3fs file system with an empty bucket `corpora`, found through the environment."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        yield files
        s3fs.S3FileSystem.clear_instance_cache()
