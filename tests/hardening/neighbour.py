"""Another user of this machine, and another machine in a network namespace: for real, which takes root."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NEIGHBOUR = 54321  # a user without a name, in no group of anybody
DROP = f"import os; os.setgroups([]); os.setgid({NEIGHBOUR}); os.setuid({NEIGHBOUR})\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder like /tmp: everybody's, with the sticky bit, and short."""
    with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        yield folder


def attack(imports: str, code: str, *arguments: Any, **variables: str) -> Any:
    """What the neighbour's code prints last, as JSON; it imports as root, since Python may lie in a private home."""
    program = f"import json, sys\n{imports}\n{DROP}ARGUMENTS = json.loads(sys.argv[1])\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd="/",
        env={**environment(), "HOME": "/nowhere", **variables},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(**others: str) -> dict[str, str]:
    """Of a process of ours: without what tests set for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TINYONN_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **others}


@contextmanager
def victim(code: str, **others: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process of ours that prints a line of JSON and then waits for its standard input to close."""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(**others),
        cwd=ROOT,
    )
    assert child.stdout is not None and child.stdin is not None
    try:
        yield child, json.loads(child.stdout.readline())
        child.stdin.close()
        assert child.wait(60) == 0
    finally:
        for process in reversed(
            [psutil.Process(child.pid), *tree(child.pid)] if child.poll() is None else []
        ):
            process.kill()
        child.wait()
        child.stdout.close()


def tree(pid: int) -> list[psutil.Process]:
    """All processes below one."""
    return psutil.Process(pid).children(recursive=True)


def listening(pid: int) -> dict[int, tuple[str, str]]:
    """Address and process by port, of a process and all below it."""
    found = {}
    for process in (psutil.Process(pid), *tree(pid)):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found[connection.laddr.port] = (connection.laddr.ip, process.name())
    return found


@contextmanager
def other_machine() -> Iterator[tuple[str, str]]:
    """A network namespace that reaches this machine over a pair of virtual cards: its name, our address."""
    name, ours, theirs = f"tonn{os.getpid()}", "10.213.77.1", "10.213.77.2"
    inside = ["ip", "netns", "exec", name]
    steps = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", f"a{os.getpid()}", "type", "veth", "peer", "name", f"b{os.getpid()}"],
        ["ip", "link", "set", f"b{os.getpid()}", "netns", name],
        ["ip", "addr", "add", f"{ours}/24", "dev", f"a{os.getpid()}"],
        ["ip", "link", "set", f"a{os.getpid()}", "up"],
        [*inside, "ip", "addr", "add", f"{theirs}/24", "dev", f"b{os.getpid()}"],
        [*inside, "ip", "link", "set", f"b{os.getpid()}", "up"],
    ]
    try:
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield name, ours
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", f"a{os.getpid()}"], capture_output=True)


CONNECT = """
import json, socket, sys
open_ports = []
for port in json.loads(sys.argv[2]):
    try:
        socket.create_connection((sys.argv[1], port), 2).close()
        open_ports.append(port)
    except OSError:
        pass
print(json.dumps(open_ports))
"""


def reachable(machine: str, address: str, ports: list[int]) -> list[int]:
    """Which ports of an address answer from another machine."""
    command = ["ip", "netns", "exec", machine, sys.executable, "-c", CONNECT, address, json.dumps(ports)]
    return list(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@contextmanager
def open_to_all() -> Iterator[int]:
    """A port that listens on every address, by which a test sees that it would see one."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server.getsockname()[1]
