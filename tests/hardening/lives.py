"""A small run before each of its stages, lives of ``tinyonn`` that are killed in it, and what must come out."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.dense.architectures import make_model
from tests.record.runs import record_in_order, records_of
from tests.train.trained import read_curve
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, load_config
from tinyonn.experts.assemble import assemble_run
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store
from tinyonn.train.plan import train_stage_options
from tinyonn.train.stage import train_run

ROOT = Path(__file__).parents[2]
HANG = 90.0  # seconds in which a stage whose Ray is lost must have ended
SOON = 10.0  # and one that is terminated, on a machine that is idle
PATIENCE = 1500.0  # seconds for anything else
SERVERS = {"gcs": "gcs_server", "raylet": "raylet"}
Bits = dict[str, Any]


def slack() -> float:
    """How much longer than on an idle machine things may take now."""
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


@dataclass
class World:
    """Snapshots of a run before each stage, by the stage's name."""

    folder: Path
    config: Path = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.folder / "config.yaml"
        make_model("qwen2", self.folder / "model")
        self._write_config()

    def _write_config(self) -> None:
        chance = random.Random(0)
        for name, counts in {"rows": {"even": 60, "odd": 40}, "heldout": {"even": 8, "odd": 8}}.items():
            rows = [
                {"text": "".join(chance.choices(string.ascii_lowercase + " ", k=chance.randrange(8, 24))), "kind": kind}
                for kind, count in counts.items()
                for _ in range(count)
            ]  # fmt: skip
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / f"{name}.jsonl").write_text(text, "utf-8")
        data = {"path": str(self.folder / "rows.jsonl"), "slice": "kind", "max_tokens": 64}
        model = {"path": str(self.folder / "model"), "quantization": "none", "dtype": "float32"}
        train = {"steps": 40, "batch": 4, "micro_batch": 2, "warm_start": 10}
        tree = {
            "model": {**model, "device": "cpu"},
            "data": data,
            "record": {"segment": 2, "workers": 2},
            "cluster": {"cells": 6},
            "experts": {"budget": 0.6},
            "profile": {"samples": 64},
            "router": {"top_k": 2},
            "train": {**train, "checkpoint_every": 5, "routing": {"ks": [2, 4, 0]}},
            "evaluate": {"data": {**data, "path": str(self.folder / "heldout.jsonl")}},
        }
        self.config.write_text(json.dumps(tree), "utf-8")  # JSON is YAML

    def snapshot(self, stage: str) -> Path:
        """The run's folder before a stage, made by way of the stages before it, in this process."""
        place = self.folder / "before" / stage
        if place.exists():
            return place
        config = load_config(self.config)
        if stage == "record":
            place.mkdir(parents=True)
            return place
        before = MADE_BY[stage]
        part = place.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.snapshot(before), part)
        _advance(part, before, config)
        (part / "lock").unlink(missing_ok=True)
        part.rename(place)
        return place


MADE_BY = {
    "merge": "record", "score": "merge", "cluster": "score", "assemble": "cluster", "profile": "assemble",
    "train": "profile", "evaluate": "assemble", "export": "assemble", "after": "train",
}  # fmt: skip


def _advance(run: Path, stage: str, config: Config) -> None:
    """Do a stage, alone and undisturbed."""
    place = str(run)
    if stage == "record":
        record_in_order(run, config)
    elif stage == "merge":
        merge_ready(Store.open(run / "store", read_only=False))
    elif stage == "score":
        score_run(place, config)
    elif stage == "cluster":
        cluster_run(place, config)
    elif stage == "assemble":
        assemble_run(place, config.model, config.experts)
    elif stage == "profile":
        profile_run(place, config, ProfileOptions(samples=config.profile.samples, workers=1))
    elif stage == "train":
        train_run(place, config, train_stage_options(config))


def records(run: Path) -> Bits:
    """Calibration, segments and every record."""
    store = Store.open(run / "store")
    found: Bits = {name: table.tobytes() for name, table in records_of(store).items()}
    found["segments"] = [vars(segment) for segment in store.segments()]
    found["calibration"] = store.calibration
    return found


def rows(run: Path) -> Bits:
    """Rows and affinity of every tensor."""
    opened = open_run(run)
    return {
        p.name: np.asarray(opened.rows(p.name)).tobytes() + np.asarray(opened.affinity(p.name)).tobytes()
        for p in opened.parameters
    }


def labels(run: Path) -> Bits:
    """Labels of every tensor."""
    opened = open_run(run)
    return {p.name: np.asarray(opened.labels(p.name)).tobytes() for p in opened.parameters}


def files(folder: Path, *suffixes: str) -> Bits:
    """Bytes of the files in a folder, of these kinds if any are given."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (not suffixes or path.suffix in suffixes)
    }


def training(run: Path) -> Bits:
    """The curve and the trained tensors."""
    return {
        "curve": [json.dumps(line, sort_keys=True) for line in read_curve(run / "train")],
        **files(run / "model", ".safetensors"),
    }


def losses(run: Path) -> Bits:
    """What was evaluated."""
    lines = json.loads((run / "evaluate" / "lines.json").read_text("utf-8"))["lines"]
    parts = ("by_slice", "tokens")
    return {key: {part: line["losses"][part] for part in parts} for key, line in lines.items()}


class Life:
    """One call of ``tinyonn``."""

    def __init__(self, world: World, stage: str, run: Path, arguments: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "tinyonn", stage, str(run)]
        command += [argument.format(folder=run.parent) for argument in arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.output = run.parent / "output.txt"
        with self.output.open("w") as stream:  # no pipe, which what outlives it would hold
            self.process = subprocess.Popen(
                [*command, "--config", str(world.config)], cwd=ROOT, env=environment, stdout=stream, stderr=stream
            )  # fmt: skip
        self.family: set[psutil.Process] = set()
        self.started = time.monotonic()

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    def computed(self) -> float:
        """Seconds of CPU time that it has taken."""
        try:
            return sum(psutil.Process(self.process.pid).cpu_times()[:2])
        except psutil.Error:
            return 0.0

    def look(self) -> list[psutil.Process]:
        """All processes below it."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []
        self.family.update(found)
        return found

    def find(self, victim: str) -> psutil.Process | None:
        """The process that is to be killed, if it is there."""
        for process in self.look():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name, line = process.name(), process.cmdline()
            except psutil.Error:
                continue
            title = line[0] if line else ""
            if victim in SERVERS and name == SERVERS[victim]:
                return process
            agent = "Agent" in title or "IDLE" in title
            if victim == "worker" and title.startswith("ray::") and not agent:
                return process
            if victim == "worker" and any("spawn_main" in word for word in line):
                return process
        return None

    def wait(self, seconds: float) -> int:
        """Until it ends; its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still there after {seconds:.0f} s: {self.said()}"
            self.look()
            time.sleep(0.1)
        return int(self.process.returncode)

    def said(self) -> str:
        return self.output.read_text("utf-8", "replace")

    def wait_until_alone(self) -> None:
        """Until nothing that it has started runs any more."""
        deadline = time.monotonic() + 60 * slack()
        while left := [process for process in self.family if _runs(process)]:
            assert time.monotonic() < deadline, f"outlived their driver: {left}"
            time.sleep(0.1)

    def kill(self, victim: str, delay: float, workers: bool) -> bool:
        """Kill it or one of its processes, in the midst of its work; False if it ended before.

        Parameters
        ----------
        victim : str
        delay : float
            Of what has processes: seconds since they are there. Of others: seconds of its own computing, so that the
            moment does not depend on what else the machine does.
        workers : bool
            It has processes that work.
        """
        target: psutil.Process | None = None
        if workers:
            while target is None:
                if self.process.poll() is not None:
                    return False
                target = self.find(victim if victim in (*SERVERS, "worker") else "worker")
                time.sleep(0.05)
            target = target if victim in SERVERS else None
        began = time.monotonic()
        while (time.monotonic() - began if workers else self.computed()) < delay:
            if self.process.poll() is not None:
                return False
            self.look()
            time.sleep(0.02)
        if victim == "worker":
            target = self.find(victim)  # there are others by now
        if self.process.poll() is not None or (target is None and victim == "worker"):
            return False
        if target is not None:
            target.kill()
        else:
            signals = {"driver": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}
            self.process.send_signal(signals[victim])
        return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


Found = Callable[[Path], Bits]
