"""File systems of URLs."""

import pytest

from ovref_inference.places import S3_CONNECTIONS, open_place


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_pool_connections": S3_CONNECTIONS}),
        ({"max_pool_connections": 3, "retries": {}}, {"max_pool_connections": 3, "retries": {}}),
        ({"retries": {}}, {"max_pool_connections": S3_CONNECTIONS, "retries": {}}),
    ],
)
def test_connections_to_s3(given, expected):
    options = {"config_kwargs": given} if given else {}
    fs, path = open_place("s3://bucket/x", anon=True, skip_instance_cache=True, **options)
    assert path == "bucket/x" and fs.config_kwargs == expected
