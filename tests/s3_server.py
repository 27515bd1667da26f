"""A real S3 server of its own process, on loopback, with an empty bucket; what is in it is gone with it."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"
_RUNNING = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which `s3://bucket/...` is on the server."""
    command = [sys.executable, "-c", "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert server.stderr
    try:
        said = b""
        while (found := _RUNNING.search(said)) is None:
            line = server.stderr.readline()
            assert line, said.decode(errors="replace")
            said += line
        with open(os.devnull, "wb") as nowhere:
            drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=nowhere)  # or a full pipe would hold it up
        endpoint = found[1].decode()
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=30).close()
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()
        drain.wait(30)
