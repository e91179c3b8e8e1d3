"""``tinyonn doctor``: is this machine fit to record? Each line says what is there and what to do about it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shlex
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tinyonn.files import open_to_others
from tinyonn.machine import free_disk, free_ram, gpus, usable_cpus
from tinyonn.show.sheet import Sheet, Style, whole
from tinyonn.show.sizes import GiB, format_size

State = Literal["ok", "warn", "fail"]
PYTHONS = ((3, 11), (3, 14))  # from, before
PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "ray",
    "zarr",
    "icechunk",
    "numpy",
    "numba",
    "datasets",
    "pyarrow",
)
LOW_RAM, LOW_DISK = 4 * GiB, 10 * GiB
NF4_ERROR = 0.25  # of a 4-bit product against the exact one, relative; a broken kernel is off by 1 and more


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found and what to do about it."""

    what: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All lines.

    Attributes
    ----------
    findings : tuple of Finding
    """

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether something must be mended before anything can run."""
        return any(finding.state == "fail" for finding in self.findings)

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return {"healthy": not self.failed, "findings": [asdict(finding) for finding in self.findings]}

    def table(self) -> Sheet:
        """For people."""
        colours: dict[str, Style] = {"ok": "green", "warn": "yellow", "fail": "red"}
        remedies = any(item.remedy for item in self.findings)
        sheet = Sheet().text("what", "", "found", *(["remedy"] if remedies else []))
        for item in self.findings:
            cells = whole(item.what), item.state, item.found, *([item.remedy] if remedies else [])
            styles: list[Style] = [""] * len(cells)
            styles[1] = colours[item.state]
            sheet.add(*cells, style=styles)
        return sheet


def examine(folder: Path) -> DoctorReport:
    """Look at everything; a look that fails itself is a line too.

    Parameters
    ----------
    folder : Path
        Where runs are stored, or would be.
    """
    looks: tuple[tuple[str, Callable[[], Finding | list[Finding]]], ...] = (
        ("python", look_at_python),
        ("packages", look_at_packages),
        ("GPU", look_at_gpus),
        ("bitsandbytes", look_at_nf4),
        ("CPU", look_at_cpus),
        ("RAM", lambda: look_at_ram(free_ram())),
        ("disk", lambda: look_at_disk(folder, free_disk(folder))),
        ("run", lambda: look_at_run(folder)),
        ("Ray", look_at_ray),
    )
    findings: list[Finding] = []
    for what, look in looks:
        try:
            found = look()
        except Exception as error:  # whatever is broken must not hide the other lines
            found = Finding(
                what, "fail", f"{type(error).__name__}: {error}", "install again: make clean, then make demo"
            )
        findings += found if isinstance(found, list) else [found]
    return DoctorReport(tuple(findings))


def look_at_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    """3.11 to 3.13."""
    found = ".".join(map(str, version))
    if PYTHONS[0] <= version[:2] < PYTHONS[1]:
        return Finding("python", "ok", f"{found} on {platform.platform(terse=True)}, {platform.machine()}")
    return Finding(
        "python", "fail", found, "use Python 3.11, 3.12 or 3.13: make clean, then make demo PYTHON=python3.12"
    )


def look_at_packages() -> list[Finding]:
    """Version of each package that matters."""
    findings, missing = [], []
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    findings.append(Finding("packages", "ok", ", ".join(versions)))
    if missing:
        remedy = "pip install -c requirements/constraints.txt -e ."
        findings.append(Finding("packages", "fail", f"not installed: {', '.join(missing)}", remedy))
    return findings


def look_at_gpus() -> list[Finding]:
    """Torch's CUDA build and each GPU's free memory."""
    import torch

    build = torch.version.cuda
    there = gpus()
    if build is None:
        found = f"torch {torch.__version__} is built without CUDA"
        if there:
            remedy = f"{there[0].name} is not used; install a CUDA build of torch"
            return [Finding("GPU", "warn", found, remedy)]
        return [Finding("GPU", "ok", f"none; {found}, so everything runs on the CPU")]
    if not there:
        remedy = "if there is one, check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return [Finding("GPU", "warn", f"none to be seen; torch is built for CUDA {build}", remedy)]
    if not torch.cuda.is_available():
        remedy = "update the driver, or install a torch built for an older CUDA"
        return [Finding("GPU", "fail", f"{there[0].name}, but torch for CUDA {build} cannot use it", remedy)]
    findings = []
    for number, gpu in enumerate(there):
        found = f"{gpu.name}, {format_size(gpu.free)} free of {format_size(gpu.total)}, CUDA {build}"
        if gpu.free < gpu.total // 2:
            remedy = (
                "another process holds memory: see nvidia-smi (after a crash, end left-over ray:: processes)"
            )
            findings.append(Finding(f"GPU {number}", "warn", found, remedy))
        else:
            findings.append(Finding(f"GPU {number}", "ok", found))
    return findings


def look_at_nf4() -> list[Finding]:
    """A real product with an NF4 weight on every kind of device there is."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    findings = []
    for device in devices:
        what = f"bitsandbytes on {device}"
        try:
            error = nf4_error(device)
        except Exception as problem:
            found = f"{type(problem).__name__}: {problem}"
            findings.append(
                Finding(what, "fail", found, "use model.quantization: none, or install bitsandbytes again")
            )
            continue
        if error < NF4_ERROR:
            findings.append(Finding(what, "ok", f"an NF4 product is right to {error:.1%}"))
        else:
            remedy = "use model.quantization: none, or install another version of bitsandbytes"
            findings.append(Finding(what, "fail", f"an NF4 product is off by {error:.0%}", remedy))
    return findings


def nf4_error(device: str) -> float:
    """Relative error of ``x W`` with W in NF4, forward and backward, against float32."""
    import torch
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(128, 256, generator=generator)
    X_TI = torch.randn(16, 256, generator=generator)
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": weight_OI})
    layer = layer.to(device).requires_grad_(False)
    inputs = X_TI.to(device, torch.bfloat16).requires_grad_()
    out = layer(inputs)
    out.float().sum().backward()
    exact = X_TI @ weight_OI.T
    forward = float((out.detach().float().cpu() - exact).norm() / exact.norm())
    wanted = weight_OI.sum(0).expand(16, -1)
    gradient = inputs.grad
    assert gradient is not None
    backward = float((gradient.float().cpu() - wanted).norm() / wanted.norm())
    return max(forward, backward)


def look_at_cpus() -> Finding:
    """How many there are."""
    return Finding("CPU", "ok", f"{usable_cpus()} usable")


def look_at_ram(free: int) -> Finding:
    """Free RAM."""
    found = f"{format_size(free)} free"
    if free < LOW_RAM:
        return Finding(
            "RAM", "warn", found, "the demo needs about 4 GiB: end something, or use record.workers: 1"
        )
    return Finding("RAM", "ok", found)


def look_at_disk(folder: Path, free: int) -> Finding:
    """Free disk space where runs are stored, and whether one may write there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    found = f"{format_size(free)} free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "fail", f"{place} cannot be written to", "choose another storage.root")
    if free < LOW_DISK:
        return Finding(
            "disk",
            "warn",
            found,
            "a segment of a 4B model takes 5 GiB: free some, or choose another storage.root",
        )
    return Finding("disk", "ok", found)


def look_at_run(folder: Path) -> list[Finding]:
    """Whether others may read what a run holds: tokens of its texts. Runs of earlier versions were made so."""
    if not folder.is_dir():
        return []
    if not open_to_others(folder):
        return [Finding("run", "ok", f"{folder} is its owner's alone")]
    remedy = f"if nobody shares it, close it: chmod 700 {shlex.quote(str(folder))}"
    mode = stat.S_IMODE(folder.stat().st_mode)
    return [
        Finding("run", "warn", f"other users may enter {folder} (mode {mode:o}), which holds texts", remedy)
    ]


def look_at_ray() -> Finding:
    """How Ray authenticates, and which cluster would be used."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    stored = (Path.home() / ".ray" / "auth_token").is_file()
    address = os.environ.get("RAY_ADDRESS")
    where = f"cluster at {address}" if address else "no cluster: a local Ray is started for each run"
    source = (
        "a token from the environment"
        if token
        else "the token in ~/.ray/auth_token"
        if stored
        else "no token yet"
    )
    found = f"{where}; RAY_AUTH_MODE {mode or 'not set (tinyonn sets token)'}, {source}"
    if mode.lower() == "disabled":
        remedy = (
            "whoever reaches an open cluster can run code on it: set RAY_AUTH_MODE=token, see docs/cluster.md"
        )
        return Finding("Ray", "warn" if address else "ok", found, remedy if address else "")
    if address and not (token or stored):
        return Finding("Ray", "warn", found, "give every machine the head's token, see docs/cluster.md")
    return Finding("Ray", "ok", found)
