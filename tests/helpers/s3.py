"""An S3 server in this process (moto's), with one empty bucket."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from unittest import mock

import pytest


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """Start a server, let this process and its children talk to it, and give the bucket's address.

    Skips the test where moto or s3fs is not installed.
    """
    server_of = pytest.importorskip("moto.server", reason="pip install 's3fs' 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install 's3fs' 'moto[server]'")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    account = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3fs.S3FileSystem.clear_instance_cache()
    with mock.patch.dict(os.environ, account):
        name = f"lab-{uuid.uuid4().hex}"  # servers of one process have the same buckets
        s3fs.S3FileSystem().mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
