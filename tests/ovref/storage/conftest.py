"""A store of each sort: a local folder, and S3 as spoken by a moto server on the loopback."""

import secrets

import pytest

from ovref.storage.store import Store


@pytest.fixture(scope="session")
def s3_options():
    """What fsspec needs for the S3 server of this test session; there is a bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "testing", "secret": "testing"}
    # All servers of one process share moto's state, so another test may have made it.
    Store.open("s3://bucket", **options)._fs.makedirs("bucket", exist_ok=True)
    yield options
    server.stop()


@pytest.fixture
def s3_store(s3_options):
    return Store.open(f"s3://bucket/{secrets.token_hex(4)}", **s3_options)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.open(str(tmp_path / "store"))
    return request.getfixturevalue("s3_store")
