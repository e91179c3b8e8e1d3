"""What a lock file says of its owner. Anybody may have written it: nothing in it is trusted."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

LOCK_BYTES = 4096  # more than any lock file has
TEXT = 100  # characters of a name that are shown
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after every start of the machine

Owner = dict[str, Any]


def this_process(what: str) -> Owner:
    """The owner that the calling process is: ``host``, ``boot``, ``pid``, ``started``, ``heartbeat`` (Unix time)."""
    now = time.time()
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": now,
        "heartbeat": now,
        "what": what,
    }


def parse_owner(data: bytes) -> Owner:
    """The owner that a lock file names; empty if it names none, is no JSON object or too long."""
    if len(data) > LOCK_BYTES:
        return {}
    try:
        owner = json.loads(data.decode("utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and isinstance(owner.get("host"), str) else {}


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def described(owner: Mapping[str, Any]) -> str:
    """An owner for people: process, host, stage, and ages where the clock is ours."""
    pid, what = owner.get("pid"), owner.get("what")
    process = f"process {pid}" if type(pid) is int and 0 < pid < 1 << 31 else "a process"
    stage = f" ({_shown(what)})" if isinstance(what, str) and what else ""
    text = f"{process} on {_shown(owner.get('host', '?'))}{stage}"
    if owner.get("host") != socket.gethostname():
        return text  # its clock may be another
    for word, key in (("started", "started"), ("last heard of", "heartbeat")):
        age = _age(owner.get(key))
        text += f", {word} {age:.0f} s ago" if age is not None else ""
    return text


def _age(moment: Any) -> float | None:
    if type(moment) not in (int, float):
        return None
    try:
        age = time.time() - float(moment)
    except OverflowError:
        return None
    return max(0.0, age) if math.isfinite(age) and abs(age) < 1e9 else None


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT])


@cache
def _boot() -> str:
    try:
        return BOOT.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
