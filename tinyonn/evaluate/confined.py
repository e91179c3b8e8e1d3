"""Runs one program that somebody else wrote, in a process that gives up what it could do harm with; see `sandbox.py`.

Run as a script, with a JSON object on stdin: ``program``, ``token``, ``cpu_seconds``, ``memory``, ``file_bytes`` and
``processes``. One JSON object on stdout says how the program ended; ``token`` in it shows that it is not the program's.

Landlock (Linux 5.13 and later) is asked for without a library: its three calls have one number on every processor.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls
NO_NEW_PRIVILEGES = 38
# Every right that changes files: write, remove, make whatever kind; link and truncate, which later versions have.
WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 13))
REFER, TRUNCATE = 1 << 13, 1 << 14
TCP = 0b11  # bind and connect, of version 4
LONGEST = 300  # characters of a reason


def confine(folder: str) -> int:
    """Let this process write below a folder alone, and speak no TCP; Landlock's version, 0 where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = max(0, libc.syscall(CREATE_RULESET, None, 0, 1))
    if not version:
        return 0
    rights = WRITES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    ruled = struct.pack("=QQ", rights, TCP) if version >= 4 else struct.pack("=Q", rights)
    ruleset = libc.syscall(CREATE_RULESET, ruled, len(ruled), 0)
    below = os.open(folder, os.O_PATH)
    done = (
        ruleset >= 0
        and libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, below), 0) == 0
        and libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    )
    os.close(below)
    return version if done else 0


def limit(kind: int, most: int) -> None:
    """Lower a limit of this process for good."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def main() -> None:
    """Read the program, give up what it does not need, run it, say how it ended."""
    told = json.load(sys.stdin)
    if child := os.fork():  # the first process of a namespace is deaf to its own limits
        os.waitpid(child, 0)
        os._exit(0)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    version = confine(str(Path.cwd()))
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, told["cpu_seconds"])
    limit(resource.RLIMIT_AS, told["memory"])
    limit(resource.RLIMIT_FSIZE, told["file_bytes"])
    limit(resource.RLIMIT_NPROC, told["processes"])
    try:
        exec(compile(told["program"], "program.py", "exec"), {"__name__": "program"})
        result = "passed"
    except BaseException as error:  # SystemExit too: it came before the end
        result = f"failed: {type(error).__name__}: {error}"[:LONGEST]
    os.write(answer, json.dumps({"token": told["token"], "result": result, "landlock": version}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
