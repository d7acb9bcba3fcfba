"""A store of each sort: a local folder, and S3 as spoken by a moto server on the loopback."""

import secrets

import pytest

from ovref.storage.file_store import Store


@pytest.fixture(scope="session")
def s3_options(s3_endpoint):
    """What fsspec needs for the S3 server of this test session; there is a bucket `bucket`."""
    return {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}


@pytest.fixture
def s3_store(s3_options):
    return Store.open(f"s3://bucket/{secrets.token_hex(4)}", **s3_options)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.open(str(tmp_path / "store"))
    return request.getfixturevalue("s3_store")
