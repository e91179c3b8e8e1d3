"""Another user of the machine, and another machine: what of a run they can enter, reach, and make do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.config
import pytest

from tests.hardening.neighbour import (
    ROOT,
    attack,
    environment,
    listening,
    needs_root,
    open_to_all,
    other_machine,
    reachable,
    shared_folder,
    victim,
)

LOCAL_RAY = """
import json, os, sys
from tinyonn.workers.ray import connected
import ray
from ray._private.worker import _global_node as before
with connected(None, 1):
    @ray.remote
    class Actor:
        def ready(self):
            return os.getpid()
    actor = Actor.remote()
    ray.get(actor.ready.remote())
    node = ray._private.worker._global_node
    told = {"session": node.get_session_dir_path(), "gcs": node.gcs_address, "token": os.environ["RAY_AUTH_TOKEN"]}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
"""
GRPC = "import copy, encodings.idna, grpc, grpc._channel"
CALLS = """
def answer(port, method, **more):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10, **more)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name
methods = ("NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys",
           "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
           "CoreWorkerService/GetCoreWorkerStats", "ReporterService/GetTraceback")
token = (("authorization", f"Bearer {ARGUMENTS[1]}"),)
found = [(m, p, answer(p, m), answer(p, m, metadata=token)) for p in ARGUMENTS[0] for m in methods]
print(json.dumps([row for row in found if row[3] != "UNIMPLEMENTED"]))
"""
SCRATCH = """
import json, sys
from tinyonn.files import scratch_folder
with scratch_folder() as folder:
    (folder / "r" / "logs").mkdir(parents=True)
    (folder / "r").chmod(0o777)
    print(json.dumps(str(folder)), flush=True)
    sys.stdin.read()
"""
WRITE = """
import os
written = []
for folder, _, files in os.walk(ARGUMENTS[0]):
    try:
        os.symlink("/etc/hostname", os.path.join(folder, "planted"))
        written.append(folder)
    except OSError:
        pass
    for name in files:
        try:
            open(os.path.join(folder, name), "rb").close()
            written.append(name)
        except OSError:
            pass
print(json.dumps(written))
"""
HTTP = "import encodings.idna, urllib.request"
GET = """
import urllib.request
answers = {}
for port in ARGUMENTS[0]:
    for path in ("/", "/metrics", "/api/version", "/json/workers", "/info/main/workers.html"):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=3) as answer:
                answers[f"{port}{path}"] = answer.status
        except Exception as error:
            answers[f"{port}{path}"] = getattr(error, "code", type(error).__name__)
print(json.dumps(answers))
"""
ASK_RAY = """
try:
    client = GcsClient(address=ARGUMENTS[0])
    print(json.dumps(str(len(client.get_all_node_info(timeout=10)))))
except Exception as error:
    print(json.dumps(str(error)[:300]))
"""
DASK = """
import asyncio, logging, os
from distributed import Client
from distributed.comm import connect
from distributed.security import Security
Security.temporary()  # which loads what it imports only when it is called
logging.disable()
"""
RUN_ON_DASK = """
async def who_runs(address, security):
    try:
        comm = await connect(address, timeout=3, **(security.get_connection_args("client") if security else {}))
        await comm.write({"op": "identity", "reply": True})
        kind = (await asyncio.wait_for(comm.read(), 3))["type"]
        comm.abort()
        if kind != "Scheduler":
            return None
        async with Client(address, timeout=20, security=security, asynchronous=True) as client:
            return await client.submit(os.getuid)
    except Exception:
        return None
async def attack():
    calls = []
    for port in ARGUMENTS[0]:
        calls.append(who_runs(f"tcp://127.0.0.1:{port}", None))
        calls.append(who_runs(f"tls://127.0.0.1:{port}", Security.temporary()))
    done, _ = await asyncio.wait([asyncio.ensure_future(call) for call in calls], timeout=12)
    print(json.dumps([call.result() for call in done if call.result() is not None]), flush=True)
    os._exit(0)
asyncio.run(attack())
"""
LOCAL_DASK = """
import json, sys
from tinyonn.workers.tasks import EngineOptions, computing
if __name__ == "__main__":
    with computing(EngineOptions("distributed", 1), 1) as compute:
        assert compute([(abs, (-3,))]) == [3]
        print(json.dumps(None), flush=True)
        sys.stdin.read()
"""


@dataclass
class LocalRay:
    pid: int
    folder: Path
    session: Path
    gcs: str
    token: str
    ports: dict[int, tuple[str, str]]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[LocalRay]:
    """The Ray of a process of ours, whose temporary folder is everybody's."""
    with shared_folder() as folder:
        with victim(LOCAL_RAY, TMPDIR=str(folder)) as (child, told):
            time.sleep(2)  # the last agents open their ports
            ports = listening(child.pid)
            yield LocalRay(child.pid, folder, Path(told["session"]), told["gcs"], told["token"], ports)
        assert not list(folder.glob("tinyonn-*")), "removed at the end"


@needs_root
def test_nobody_else_can_write_or_read_in_rays_folders(local_ray: LocalRay) -> None:
    assert local_ray.session.is_relative_to(local_ray.folder)
    assert attack("import os", WRITE, str(local_ray.folder)) == [str(local_ray.folder)], (
        "its own planted link alone"
    )


@needs_root
def test_every_port_of_a_local_ray_is_this_machines(local_ray: LocalRay) -> None:
    ports = local_ray.ports
    assert len(ports) > 5
    assert {ip for ip, _ in ports.values()} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, ports
    with other_machine() as (machine, address), open_to_all() as control:
        assert reachable(machine, address, [*ports, control]) == [control]


@needs_root
def test_no_port_of_a_local_ray_tells_a_neighbour_anything(local_ray: LocalRay) -> None:
    answers = attack(HTTP, GET, list(local_ray.ports))
    assert 401 in answers.values()
    assert not [place for place, answer in answers.items() if isinstance(answer, int) and answer < 400]
    ask = "from ray._raylet import GcsClient"
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": local_ray.token}
    assert attack(ask, ASK_RAY, local_ray.gcs, **with_token) == "1"
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    for guess in (wrong, {}):
        assert "InvalidAuthToken" in attack(ask, ASK_RAY, local_ray.gcs, **guess)


@needs_root
def test_every_service_of_a_local_ray_asks_for_the_token(local_ray: LocalRay) -> None:
    http = ("RuntimeEnvAgent",)
    ports = [p for p, (_, name) in local_ray.ports.items() if not name.endswith(http) and p != 52365]
    rows = attack(GRPC, CALLS, ports, local_ray.token)
    answers = {method: (without, with_token) for method, _, without, with_token in rows if with_token == "OK"}
    assert len(answers) == 6, "each is asked, and answers whoever has the token"
    assert not [row for row in rows if row[2] == "OK"]
    assert {without for without, _ in answers.values()} == {"UNAUTHENTICATED"}


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else() -> None:
    with shared_folder() as folder:
        stranger = folder / f"tinyonn-{os.geteuid()}-stranger"
        with suppress(AssertionError), victim(SCRATCH, TMPDIR=str(folder)) as (child, told):
            left = Path(told)
            child.kill()
            child.wait()
        assert (left / "r" / "logs").is_dir()
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
        stranger.symlink_to("/etc")
        with (
            victim(SCRATCH, TMPDIR=str(folder)) as (_, first),
            victim(SCRATCH, TMPDIR=str(folder)) as (_, second),
        ):
            assert not left.exists()
            assert Path(first).is_dir() and Path(second).is_dir(), "those of the living stay"
        assert [path.name for path in folder.iterdir()] == [stranger.name], "they are gone at the end"
    assert Path("/etc/passwd").exists()


def test_a_scratch_folder_lies_where_nobody_can_rename_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyonn.files import scratch_folder

    with shared_folder() as folder:
        open_one, long_one, good = folder / "o", folder / ("l" * 40), folder / "g"
        for path, mode in ((open_one, 0o777), (long_one, 0o700), (good, 0o700)):
            path.mkdir()
            path.chmod(mode)
        monkeypatch.setenv("RAY_TMPDIR", str(open_one))
        for second, parent in ((long_one, Path("/tmp")), (good, good)):
            monkeypatch.setenv("TMPDIR", str(second))
            with scratch_folder() as made:
                assert made.parent == parent
                assert stat.S_IMODE(made.stat().st_mode) == 0o700
            assert not made.exists()


@needs_root
def test_no_neighbour_runs_code_on_our_dask_cluster() -> None:
    with shared_folder() as folder, victim(LOCAL_DASK, TMPDIR=str(folder)) as (child, _):
        ports = listening(child.pid)
        assert len(ports) > 3
        assert attack(DASK, RUN_ON_DASK, list(ports)) == []
        answers = attack(HTTP, GET, list(ports))
        assert not [place for place, answer in answers.items() if isinstance(answer, int) and answer < 400]
        assert {ip for ip, _ in ports.values()} == {"127.0.0.1"}
        assert attack("import os", WRITE, str(folder)) == [str(folder)]


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Any]:
    """Dask's configuration with a key of its own, in files."""
    from distributed.security import Security

    made = Security.temporary()
    for name, text in (("key", made.tls_client_key), ("cert", made.tls_client_cert)):
        (tmp_path / f"{name}.pem").write_text(text)
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    tls = {"ca-file": cert} | {
        f"{role}.{what}": file
        for role in ("client", "scheduler", "worker")
        for what, file in (("key", key), ("cert", cert))
    }
    return {f"distributed.comm.tls.{name}": file for name, file in tls.items()}


def test_a_scheduler_of_ones_own_is_reached_with_dasks_certificates(certificates: dict[str, Any]) -> None:
    from distributed import LocalCluster
    from distributed.security import Security

    from tinyonn.errors import InputError
    from tinyonn.workers.tasks import EngineOptions, computing

    with dask.config.set(certificates):
        cluster = LocalCluster(
            n_workers=1,
            processes=False,
            protocol="tls://",
            security=Security(),
            dashboard_address=None,
        )
    with cluster:
        options = EngineOptions("distributed", 1, address=cluster.scheduler_address)
        with dask.config.set(certificates), computing(options, 1) as compute:
            assert compute([(abs, (-3,)), (abs, (4,))]) == [3, 4]
        with (
            pytest.raises(InputError, match=r"no Dask scheduler answers at tls://.*docs/security\.md"),
            computing(options, 1),
        ):
            pass


@pytest.mark.slow
def test_a_group_that_trains_here_listens_for_this_machine_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hardening.group_child", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    total, addresses = json.loads((tmp_path / "seen.json").read_text())
    assert total == 1
    assert len(addresses) > 2, "two workers of Ray, and gloo between them"
    assert set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@needs_root
def test_a_run_is_its_owners_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tinyonn.show.logs import close_logging, setup_logging
    from tinyonn.store.lock import RunLock

    with shared_folder() as folder:
        try:
            setup_logging(folder / "logged" / "logs", "record", console=False)
        finally:
            close_logging()
        with RunLock(folder / "locked"):
            (folder / "locked" / "corpus.arrow").write_bytes(b"tokens")
        old = folder / "old"
        old.mkdir(0o755)
        with RunLock(old):
            pass
        assert attack("import os", WRITE, str(folder)) == [str(folder)], (
            "an old run may be listed; nothing in it read"
        )
        assert stat.S_IMODE(old.stat().st_mode) == 0o755, "what is there keeps its mode"


def test_doctor_says_which_run_others_may_enter(tmp_path: Path) -> None:
    from tinyonn.doctor import look_at_run

    run = tmp_path / "a run"
    assert look_at_run(run) == []
    run.mkdir(0o755)
    assert (look_at_run(run)[0].state, look_at_run(run)[0].remedy[-len(f"chmod 700 '{run}'") :]) == (
        "warn",
        f"chmod 700 '{run}'",
    )
    run.chmod(0o700)
    assert look_at_run(run)[0].state == "ok"
