"""SeaweedFS as the embedded object store: an S3 server on loopback that wants signed requests.

Without `-disableHttp` its filer hands out every object without a login, telemetry is on unless switched off, and two
instances collide unless every part has ports of its own.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PORTS = 10
_PARTS = ("s3", "master", "volume", "filer", "admin")


@dataclass(frozen=True)
class SeaweedFS:
    """One server: its data lies in `folder`, `ports` are PORTS free ones, sockets go into the short path `runtime`."""

    folder: Path
    runtime: Path
    ports: tuple[int, ...]
    access_key_id: str
    secret_access_key: str

    @property
    def endpoint_url(self) -> str:
        """The address of the S3 interface."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def argv(self) -> tuple[str, ...]:
        """Return the command that runs the server in the foreground, and create its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ports: list[str] = []
        for index, part in enumerate(_PARTS):
            http_port, grpc_port = self.ports[2 * index : 2 * index + 2]
            ports += [f"-{part}.port={http_port}", f"-{part}.port.grpc={grpc_port}"]
        return (
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            "mini",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-disableHttp",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            "-volume.preStopSeconds=0",
            # The default is the free disk in volumes of 128 MB, of which every bucket takes seven at once: some eighty
            # buckets, and then each write is an InternalError. Volumes take no room before they are written.
            "-volume.max=10000",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self.runtime / 's3.sock'}",
            f"-filer.localSocket={self.runtime / 'filer.sock'}",
            *ports,
        )

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return `base` with the server's credentials, which it takes from there so that no process list shows them."""
        return {
            **base,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def is_ready(self) -> bool:
        """Return whether the S3 interface says that it is healthy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=2)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def remove_sockets(self) -> None:
        """Remove what a killed server leaves in /tmp: that folder is fixed in SeaweedFS 4.48."""
        for part, port in zip(_PARTS, self.ports[1::2], strict=True):
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)
