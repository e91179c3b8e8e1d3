"""Where the processes of a group find each other: on one machine in a file that their user alone can reach.

By default Torch opens a port for that on every address, which takes orders from whoever connects. Over several machines
there is no other way (docs/security.md says how to close it to strangers).
"""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@contextmanager
def meeting_place(backend: str) -> Iterator[TorchConfig]:
    """What Ray Train is told of the process group.

    Parameters
    ----------
    backend : str
        ``gloo`` or ``nccl``.
    """
    if not _alone():
        yield TorchConfig(backend=backend)
        return
    folder = tempfile.mkdtemp(prefix="tinyonn-group-")  # 0700
    try:
        yield FileConfig(backend=backend, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alone() -> bool:
    """Whether there is this machine and no other."""
    return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} == {socket.gethostname()}


@dataclass
class FileConfig(TorchConfig):
    """A process group whose members meet in a file of `folder`, a new one at every start."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the group."""
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if not _alone():  # a machine has joined since
            super().on_start(worker_group, replace(backend_config, init_method="env"))
            return
        url = f"file://{Path(backend_config.folder) / secrets.token_hex(8)}"
        super().on_start(_Redirected(worker_group, url), replace(backend_config, init_method="env"))


class _Redirected:
    """Ray Train's workers, told another place to meet than the one that it chose."""

    def __init__(self, group: Any, url: str) -> None:
        self._group, self._url = group, url

    def __len__(self) -> int:
        return len(self._group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def execute_single_async(self, rank: int, function: Any, *arguments: Any, **options: Any) -> Any:
        if "init_method" in options:
            options["init_method"] = self._url
        return self._group.execute_single_async(rank, function, *arguments, **options)
