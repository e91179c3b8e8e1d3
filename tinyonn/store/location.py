"""Where a store lies: a folder or an S3 prefix."""

from __future__ import annotations

import os
from pathlib import Path

import icechunk


def storage_of(location: str | Path) -> icechunk.Storage:
    """Icechunk storage of a folder or of ``s3://bucket/prefix``, set up by the environment."""
    text = str(location)
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return icechunk.s3_storage(
            bucket=bucket,
            prefix=prefix.strip("/"),
            from_env=True,
            endpoint_url=endpoint,
            allow_http=bool(endpoint and endpoint.startswith("http://")),
            force_path_style=bool(endpoint),
        )
    # The local backend warns at each start that two must not commit at once; the run's lock sees to that.
    icechunk.set_logs_filter("error")
    return icechunk.local_filesystem_storage(str(Path(text).absolute()))
