"""Programs that a model wrote can do nothing but end well or badly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.evaluate.sandbox import CodeEval, Isolation, Limits, isolation, pass_at_k, run_program

ENDS = {
    "answer = 6 * 7": "passed",
    "print('x' * 100_000)": "passed",
    "open('own', 'w').write('x'); assert open('own').read() == 'x'": "passed",
    "import os; assert os.listdir() == []": "passed",
    "assert 1 == 2, 'no'": "failed: AssertionError: no",
    "def f(:": "failed: SyntaxError",
    "import sys; sys.exit(0)": "failed: SystemExit",
    "import os; os._exit(0)": "failed: stopped",
    "x = bytearray(2 << 30)": "failed: MemoryError",
    "open('own', 'wb').write(bytes(2 << 20))": "failed: OSError",
    "input()": "failed: EOFError",
    "import os; assert os.environ.get('TINYONN_SECRET') is None": "passed",
}


@pytest.mark.parametrize("program", ENDS)
def test_how_a_program_ends(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYONN_SECRET", "1")
    assert run_program(program).result.startswith(ENDS[program])


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_program("while True: pass", Limits(cpu_seconds=1)).result.startswith(
        ("failed: stopped", "timed out")
    )
    started = time.monotonic()
    sleeping = "import time; time.sleep(60)"
    assert run_program(sleeping, Limits(wall_seconds=1.0)).result == "timed out"
    assert run_program(sleeping, Limits(wall_seconds=1.0), Isolation((), 0)).result == "timed out"
    assert time.monotonic() - started < 30


def test_there_is_no_network() -> None:
    if not isolation().prefix:
        pytest.skip("no namespaces on this machine")
    program = (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))"
    )
    assert run_program(program).result.startswith("failed: OSError")
    assert "no network" in isolation().told()


def test_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    if not isolation().landlock:
        pytest.skip("no Landlock on this machine")
    (tmp_path / "mine").write_text("x", "utf-8")
    for program in (f"open('{tmp_path}/theirs', 'w')", f"import os; os.remove('{tmp_path}/mine')"):
        assert run_program(program).result.startswith("failed: PermissionError")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_not_permitted_is_said() -> None:
    assert "network is NOT closed" in Isolation((), 0).told()
    assert "files are NOT protected" in Isolation((), 0).told()
    assert "no TCP" in Isolation((), 4).told()


def test_pass_at_k() -> None:
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(10, 0, 5) == 0
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    judge = CodeEval(allowed=True)
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    rates, ends = judge.compute(["assert add(2, 3) == 5"] * 2, [[right, wrong], [wrong, wrong]], k=[1, 2, 3])
    assert rates == {"pass@1": 0.25, "pass@2": 0.5}
    assert [end == "passed" for end in ends[0]] == [True, False]


def test_programs_run_only_if_asked_for() -> None:
    with pytest.raises(InputError, match="--run-code"):
        CodeEval(allowed=False).compute(["pass"], [["pass"]], k=[1])
