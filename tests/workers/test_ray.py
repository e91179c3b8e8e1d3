"""The token of a Ray of this machine alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinyonn.workers.ray import private_session


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is put back
    return tmp_path


def token() -> str:
    with private_session():
        return os.environ.get("RAY_AUTH_TOKEN", "")


def test_without_a_token_it_has_one_of_its_own(home: Path) -> None:
    assert len(token()) == 64
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("variable", [True, False], ids=["named", "at home"])
def test_with_a_token_of_the_users_it_has_no_other(
    variable: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reads a token once for a process: a local Ray after a cluster would refuse its own client."""
    file = home / "token" if variable else home / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    file.write_text("a" * 64)
    if variable:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert token() == ""


def test_an_empty_file_is_no_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "token").write_text("\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    assert len(token()) == 64
