"""The Ray of one machine and one command: for its user alone, on the loopback address alone.

Ray opens the folders of its sessions to everybody (0777) and listens on every address. Its folders are therefore put
below a private one, and the settings by which it stays on 127.0.0.1 on Windows are used here too. What it offers for
Prometheus answers without a token and is switched off. docs/security.md says what is left, as measured.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tinyonn.private import scratch_folder

FOLDER = "r"  # in the private folder: what Ray opens to everybody; short, since sockets lie below
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster: this node's address is 127.0.0.1, and all bind to that
    "RAY_enable_metrics_collection": "0",
    # Of two more places for Prometheus, no ports: they fail to open, Ray writes that into its log and goes on.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # of the groups that train
LOOPBACK = "lo"


@contextmanager
def private_session() -> Iterator[dict[str, Any]]:
    """The environment of a Ray of this machine alone; gives what `ray.init` must be given besides.

    Raises
    ------
    InputError
        There is no place for its folder.
    """
    import ray._private.ray_constants as constants

    # A token for this Ray alone, so that none is left in the user's home.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    chosen = SETTINGS | {name: LOOPBACK for name in INTERFACES if name not in os.environ}
    before = constants.ENABLE_RAY_CLUSTER
    with scratch_folder() as folder, _environment(chosen):
        constants.ENABLE_RAY_CLUSTER = False
        try:
            yield {"_temp_dir": str(folder / FOLDER)}
        finally:
            constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(chosen: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and put back what was there."""
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
