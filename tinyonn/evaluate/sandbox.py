"""Programs that a model wrote, each in a process of its own that can do little, and ``pass@k`` of them.

What holds for such a process (`tinyonn/evaluate/confined.py` gives these up before the program's first line):

- CPU seconds, address space, bytes of a file, and seconds of the clock, after which it is killed with its children;
- no new processes or threads (root's processes are not counted by Linux; a process namespace ends them with the first);
- an empty folder of its own, which is removed; with Landlock (Linux 5.13) it can write nowhere else;
- no network: a namespace without one, where ``unshare`` is permitted; else Landlock refuses TCP (Linux 6.7).

It can read what its user can. What of this the machine does not permit is said by `Isolation.told`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError

CONFINED = Path(__file__).with_name("confined.py")
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--kill-child")
TRIED = (("unshare", "--user", "--map-current-user", *NAMESPACES[1:]), NAMESPACES, ())
TCP_SINCE = 4  # version of Landlock
REMEDY = "pass --run-code to have them run, each in a process of its own with limits"


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    cpu_seconds: int = 3
    memory: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 0
    wall_seconds: float = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``passed``, ``timed out`` or why it failed."""

    result: str
    landlock: int = 0

    @property
    def passed(self) -> bool:
        """Whether it came to its end."""
        return self.result == "passed"


@dataclass(frozen=True)
class Isolation:
    """What this machine permits.

    Attributes
    ----------
    prefix : tuple of str
        Words before the interpreter's, which make the namespaces; empty where none are permitted.
    landlock : int
        Its version; 0 where there is none.
    """

    prefix: tuple[str, ...]
    landlock: int

    def told(self) -> str:
        """What holds, in words."""
        network = "no network"
        if not self.prefix:
            network = "no TCP" if self.landlock >= TCP_SINCE else "the network is NOT closed (no `unshare`)"
        files = "writes in its own folder alone"
        if not self.landlock:
            files = "files are NOT protected (no Landlock): run it as a user who owns none"
        return f"programs run with limits, {network}, {files}"


@cache
def isolation() -> Isolation:
    """What this machine permits, tried once.

    Raises
    ------
    InputError
        Not even a harmless program runs.
    """
    tried = []
    for prefix in TRIED:
        found = run_program("answer = 6 * 7", isolated=Isolation(prefix, 0))
        if found.passed:
            return Isolation(prefix, found.landlock)
        tried.append(found.result)
    raise InputError(f"no program can be run apart on this machine ({tried[-1]}); leave out --run-code")


def run_program(program: str, limits: Limits | None = None, isolated: Isolation | None = None) -> Outcome:
    """Run a program in a process of its own.

    Parameters
    ----------
    program : str
        Python; it passes if its last line is reached.
    limits : Limits, optional
    isolated : Isolation, optional
        By default what this machine permits.
    """
    limits = limits or Limits()
    prefix = (isolation() if isolated is None else isolated).prefix
    token = secrets.token_hex(8)
    told = json.dumps({"program": program, "token": token, **asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="tinyonn-program-", ignore_cleanup_errors=True) as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-I", str(CONFINED)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:  # no `unshare`
            return Outcome(f"failed: {error}")
        try:
            answer, _ = process.communicate(told.encode(), limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timed out")
        finally:
            _end(process)
    return _outcome(answer, token)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it and of its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


def _outcome(answer: bytes, token: str) -> Outcome:
    try:
        told = json.loads(answer)
        if told["token"] == token:
            return Outcome(str(told["result"]), int(told["landlock"]))
    except (ValueError, KeyError, TypeError):
        pass
    return Outcome("failed: two answers" if answer else "failed: stopped by a limit, or by itself")


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k programs out of so many is right: ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class CodeEval:
    """In place of the ``code_eval`` of the library ``evaluate``, which runs programs in this process's own children.

    Parameters
    ----------
    allowed : bool
        Whether programs may run at all.
    """

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[str]]]:
        """Run every candidate of every task with the task's test after it.

        Parameters
        ----------
        references : sequence of str
            A test of each task.
        predictions : sequence of sequence of str
            Programs that are to pass it.
        k : sequence of int

        Returns
        -------
        dict, dict
            ``pass@k``, mean over the tasks, for every k of which there are enough candidates; by task how each ended.

        Raises
        ------
        InputError
            Programs may not run.
        """
        if not self.allowed:
            raise InputError(f"the task runs programs that the model writes; {REMEDY}")
        results = {
            number: [run_program(f"{program}\n{test}").result for program in programs]
            for number, (test, programs) in enumerate(zip(references, predictions, strict=True))
        }
        counts = [(len(found), found.count("passed")) for found in results.values()]
        rates: dict[str, Any] = {
            f"pass@{one}": math.fsum(pass_at_k(n, right, one) for n, right in counts) / len(counts)
            for one in k
            if all(n >= one for n, _ in counts)
        }
        return rates, results
