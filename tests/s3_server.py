"""A real S3 server of this machine (moto's), spoken to through s3fs as users' stores are."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


class S3Server:
    """url: of a new, empty bucket. `stop`: nobody answers from then on."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        self._server = server
        self.stop = server.stop

    def url(self) -> str:
        bucket = f"captune-{uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}/prefix"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """The address and the credentials stand in the environment meanwhile, where operators put them too."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()  # fsspec keeps them, whatever the environment says meanwhile
        yield S3Server(server)
    S3FileSystem.clear_instance_cache()
    server.stop()
