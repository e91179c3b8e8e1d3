"""Where a store lies: a folder or an S3 prefix."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import icechunk

from tinyonn.errors import InputError, StoreError
from tinyonn.store.faults import NEWER, NOT_S3, newer_store

ABSENT = "doesn't exist"


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


def check_absent(location: str) -> None:
    """Make sure that there is no store in a bucket where none is found.

    What says yes to everything, such as a login page, is taken for a store of another kind; it has one under any name.

    Raises
    ------
    InputError
        There is one that a newer Icechunk wrote.
    StoreError
        Something answers that is no S3.
    """
    if _seems_absent(location):
        return
    if _seems_absent(f"{location}/{uuid4().hex}"):
        raise InputError(newer_store(location))
    raise StoreError(f"{location}: something answers that is no S3; {NOT_S3}")


def _seems_absent(location: str) -> bool:
    try:
        icechunk.Repository.open(storage_of(location))
    except icechunk.IcechunkError as error:
        newer = any(text in str(error).lower() for text in (*NEWER, "v2 format"))
        if ABSENT not in str(error) and not newer:
            raise
        return ABSENT in str(error)
    return False
