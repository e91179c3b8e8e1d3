"""cluster.yaml by Ray's loader and schema, what a job uploads, and docs/cluster.md's commands on real nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.documents import ROOT, blocks
from tests.test_docs import given, ray_options

FILE = ROOT / "cluster.yaml"
DEALT_BY_RAY = range(10002, 20000)
BIN = Path(sys.executable).parent
HEAD, WORKER = "127.0.0.2", "127.0.0.3"  # Ray takes 127.0.0.1 for "not given" and looks for another address


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return tree


def start_commands(cluster: dict[str, Any]) -> list[str]:
    both = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in both if "ray start" in command]


def documented_starts() -> list[str]:
    """The head's and the worker's command of docs/cluster.md."""
    return [block.text for block in blocks("sh") if block.text.startswith("ray start")]


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_ray_accepts_a_head_alone(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster | {"provider": cluster["provider"] | {"worker_ips": []}}))


def test_blanks_are_marked() -> None:
    lines = FILE.read_text("utf-8").splitlines()
    marked = [line for line in lines if "# <-" in line]
    assert len(marked) == 5
    for blank in ("head_ip", "worker_ips", "ssh_user", "ssh_private_key", "python3 -m venv"):
        assert any(blank in line for line in marked), blank


@pytest.mark.parametrize("command", [*start_commands(yaml.safe_load(FILE.read_text())), *documented_starts()])
def test_start_command(command: str) -> None:
    """Known options, an explicit address, ports outside the range that Ray deals to workers."""
    line = re.sub(r"\\\n\s*", "", command)
    start = line[line.index("ray start") :]
    options, _ = ray_options(["start"])
    assert given(re.sub(r"\$\([^)]*\)", "", start).split()) <= options
    assert "--node-ip-address=" in start
    ports = [int(port) for port in re.findall(r"-port=(\d+)", start)]
    ports += [int(port) for port in re.findall(r"--address=[^ ]+:(\d+)", start)]
    assert len(ports) >= 7
    assert not set(ports) & set(DEALT_BY_RAY)
    fixed, lowest = [port for port in ports if port < 20000], min(port for port in ports if port >= 20000)
    assert len(set(fixed)) == len(fixed)
    assert max(fixed) < lowest


def test_token_is_asked_for_and_travels(cluster: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])
    assert all("RAY_AUTH_MODE=token" in command for command in start_commands(cluster))


def test_what_is_copied_exists_and_is_not_the_whole_clone(cluster: dict[str, Any]) -> None:
    """Ray hashes all of it, excluded or not, at every look: storage and .git must not lie below."""
    for source in cluster["file_mounts"].values():
        if not source.startswith("~"):
            assert (ROOT / source).exists(), source
            assert (ROOT / source).resolve() != ROOT


def test_every_command_parses(cluster: dict[str, Any]) -> None:
    keys = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in (command for key in keys for command in cluster[key]):
        subprocess.run(["bash", "-n"], input=command, text=True, check=True, timeout=20)


def test_head_finds_its_address(cluster: dict[str, Any], tmp_path: Path) -> None:
    """In the copy of the configuration that `ray up` leaves on the head, which is one line of JSON."""
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(prepare_config(cluster)), "utf-8")
    assert substituted(start_commands(cluster)[0], HOME=str(tmp_path)) == cluster["provider"]["head_ip"]


def test_worker_finds_its_address(cluster: dict[str, Any], tmp_path: Path) -> None:
    """By the route to the head, here from what ``ip route get`` prints."""
    fake = tmp_path / "ip"
    fake.write_text("#!/bin/sh\necho '10.0.0.1 via 10.0.0.9 dev eth0 src 10.0.0.7 uid 0'\necho '    cache'\n")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert substituted(start_commands(cluster)[1], PATH=path, RAY_HEAD_IP="10.0.0.1") == "10.0.0.7"


def substituted(command: str, **environment: str) -> str:
    """What a start command gives to ``--node-ip-address``."""
    match = re.search(r"--node-ip-address=(\$\(.*?\)) --", command)
    assert match
    shell = subprocess.run(
        ["bash", "-c", f"echo {match[1]}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return shell.stdout.strip()


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_upload_has_code_model_and_corpus_and_no_runs(tmp_path: Path, include_gitignore: bool) -> None:
    """Of a clone with runs, history and an environment in it; .rayignore is enough by itself."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    shipped = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tinyonn" / "reference").rglob("*")]
    assert shipped
    wanted = ["jobs/record.py", "configs/demo.yaml", "tinyonn/cli.py", "tinyonn/dense/shapes/a/config.json"]
    wanted += [name for name in shipped if (ROOT / name).is_file() and "__pycache__" not in name]
    unwanted = [
        ".git/objects/ab/cd",
        "storage/demo/store/chunks/x",
        "storage/demo/corpus.arrow",
        ".venv/bin/python",
    ]
    unwanted += ["tinyonn/__pycache__/cli.pyc", ".mypy_cache/x.json", ".hypothesis/y", "build/z", "dist/w"]
    for name in (*wanted, *unwanted):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    create_package(str(clone), tmp_path / "package.zip", include_gitignore=include_gitignore)
    names = set(zipfile.ZipFile(tmp_path / "package.zip").namelist())
    assert set(wanted) <= names
    assert not set(unwanted) & names


@pytest.mark.slow
def test_documented_commands_make_a_cluster(nodes: Path) -> None:
    """Head and worker of docs/cluster.md, on two addresses of this machine; without the token nobody joins."""
    head, worker = (localised(command, nodes, offset) for offset, command in enumerate(documented_starts()))
    assert start(head).returncode == 0
    refused = start(worker, RAY_AUTH_TOKEN_PATH=str(nodes / "none"))
    assert refused.returncode != 0
    assert "token" in refused.stderr
    assert start(worker).returncode == 0
    program = (
        f"import ray; ray.init('{HEAD}:26379', log_to_driver=False); "
        "print([node['NodeManagerAddress'] for node in ray.nodes()])"
    )
    seen = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=90
    )
    assert sorted(yaml.safe_load(seen.stdout.strip().splitlines()[-1])) == [HEAD, WORKER]


def localised(command: str, folder: Path, offset: int) -> list[str]:
    """The command for this machine: other ports (two nodes share them here), one CPU, a folder of its own."""
    line = re.sub(r"\\\n\s*", "", command).replace("192.168.1.10", HEAD).replace("192.168.1.11", WORKER)
    line = re.sub(r"(-port=|:)(6\d\d\d)", lambda m: f"{m[1]}{int(m[2]) + 20000 + 100 * offset}", line)
    line = line.replace(":26479", ":26379").replace("=20000", f"={27000 + 400 * offset}")
    line = line.replace("=20999", f"={27399 + 400 * offset}")
    more = ["--num-cpus=1", f"--temp-dir={folder}/{offset}", "--include-dashboard=false"]
    if "--head" not in line:
        more.pop()
    return [str(BIN / "ray"), *shlex.split(line)[1:], *more]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, env={**os.environ, **environment}, **options)


@pytest.fixture
def nodes() -> Iterator[Path]:
    """A folder for the nodes' sockets, whose path must be short; all processes that know it end with the test."""
    with tempfile.TemporaryDirectory(prefix="tonn-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        ours = [process for process in psutil.process_iter(["cmdline"]) if is_of(process, folder)]
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=10)


def is_of(process: psutil.Process, folder: str) -> bool:
    """Whether a process was started with the folder or with the head's address."""
    return any(folder in word or f"={HEAD}:26379" in word for word in process.info["cmdline"] or [])
