"""Memory of a training: what a process really takes is less than was said, and not by much."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.defaults import optimizer_options
from tests.train.runs import OPTIONS, World
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.plan.demands import ModelFacts, Need
from tinyonn.plan.training import StudentFacts, check_needs, train_needs
from tinyonn.show.sizes import GiB, MiB

BASE = ModelFacts("big", 40, 2560, 6912, 151_936, "nf4", 2)
PARAMETERS = [
    Parameter("model.embed_tokens.weight", (151_936, 2560), None, "embedding"),
    *(Parameter(f"model.layers.{n}.mlp.up_proj.weight", (30_000, 2560), n, "linear") for n in range(40)),
    Parameter("lm_head.weight", (151_936, 2560), None, "linear"),
]
STUDENT = StudentFacts(1_000_000_000, 2 * 151_936 * 2560, 10_000, 2_000_000_000, 6912 * 2560)


def bytes_of(**changes: object) -> dict[str, int]:
    options = replace(OPTIONS, precision="bfloat16", **changes)  # type: ignore[arg-type]
    needs = train_needs(STUDENT, BASE, PARAMETERS, (PARAMETERS, BASE), options, 2048, "cpu")
    return {need.what: need.bytes for need in needs}


def test_a_teacher_of_another_size_needs_its_own() -> None:
    def of_teacher(teacher: tuple[list[Parameter], ModelFacts] | None) -> dict[str, int]:
        return {
            need.what: need.bytes
            for need in train_needs(STUDENT, BASE, PARAMETERS, teacher, OPTIONS, 2048, "cpu")
        }

    alone, beside = of_teacher(None), of_teacher((PARAMETERS, BASE))
    plain = of_teacher((PARAMETERS, replace(BASE, quantization="none")))
    (what,) = beside.keys() - alone.keys()
    assert plain[what] > beside[what] > 0
    assert {name: beside[name] for name in alone} == alone


def test_a_billion_trained_weights_need_what_masters_and_moments_take() -> None:
    assert bytes_of()["experts, trained"] == 1_000_000_000 * (4 + 4 + 8 + 2)
    assert (
        bytes_of(optimizers=optimizer_options(experts="muon", norms_lr=0.0))["experts, trained"]
        == 14_000_000_000
    )
    assert bytes_of(optimizers=optimizer_options(experts="frozen", norms_lr=0.0))["experts"] == 4_000_000_000


def test_a_trunk_that_is_trained_needs_masters_and_moments() -> None:
    matrices = 2 * 151_936 * 2560 - 10_000
    for options, bytes_each, of_norms in (
        (optimizer_options(norms_lr=0.0), 2, 2),
        (optimizer_options(norms_lr=1e-3), 2, 16),
        (optimizer_options(trunk_lr=1e-3, norms_lr=0.0), 16, 2),
    ):
        found = bytes_of(optimizers=options)["trunk and head of the student"]
        assert found == matrices * bytes_each + 10_000 * of_norms


def test_checkpointing_and_smaller_micro_batches_need_less() -> None:
    whole = sum(bytes_of().values())
    assert sum(bytes_of(checkpointing=True).values()) < whole
    assert sum(bytes_of(micro_batch=1).values()) < whole


def test_what_does_not_fit_names_the_largest_and_a_remedy() -> None:
    needs = [Need("experts, trained", 18 * GiB), Need("activations", 3 * GiB), Need("process", GiB)]
    with pytest.raises(
        CapacityError,
        match=r"training needs 22\.0 GiB of VRAM of a GPU and 8\.00 GiB are there \(experts, trained 18\.0 GiB",
    ):
        check_needs(needs, 1, "cuda", 8 * GiB)
    assert check_needs(needs, 1, "cuda", None).fits  # a machine of the cluster that nobody asked
    assert check_needs(needs, 2, "cpu", 64 * GiB).total == 44 * GiB + GiB + 512 * MiB


def test_a_process_takes_less_than_was_said(world: World, tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.train.runs import World\n"
        "from tinyonn.config import Config\n"
        "from tinyonn.train.stage import train_run\n"
        "world = World(Path(sys.argv[1]), Config.model_validate_json(sys.argv[2]))\n"
        "report = train_run(world.run, world.config, world.options(Path(sys.argv[3])))\n"
        "print(json.dumps([report.need_bytes, report.peak_worker_bytes]))\n"
    )
    arguments = [str(world.folder), world.config.model_dump_json(), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=250
    )
    need, peak = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 * need < peak <= need
