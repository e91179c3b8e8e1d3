"""What a member of a process group does, and what its machine listens on meanwhile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed


def add_and_look(folder: str, report: Any) -> None:
    """Sum the ranks; the first writes down the ports of all of the group's processes."""
    total = torch.tensor([float(distributed.get_rank())])
    distributed.all_reduce(total)
    mine = torch.zeros(distributed.get_world_size(), dtype=torch.int64)
    mine[distributed.get_rank()] = psutil.Process().pid
    distributed.all_reduce(mine)
    if distributed.get_rank() == 0:
        ports = [
            connection.laddr.ip
            for pid in mine.tolist()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        Path(folder, "seen.json").write_text(json.dumps([total.item(), ports]))
    distributed.barrier()


def main(folder: str) -> None:
    """Two members on a local Ray."""
    from tinyonn.workers.group import GroupOptions, run_group
    from tinyonn.workers.ray import connected

    with connected(None, 2):
        run_group(add_and_look, folder, Path(folder) / "train", GroupOptions(2, 1, "cpu"), lambda: 0)


if __name__ == "__main__":
    from tests.hardening import group_child

    group_child.main(sys.argv[1])
