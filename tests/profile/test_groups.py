"""Groups as the assembled model and the store have them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.experts.independent_reader import read_weights
from tests.experts.runs import clustered_run
from tests.profile.runs import CELLS, World, assemble
from tinyonn.errors import InputError
from tinyonn.profile.groups import find_groups
from tinyonn.run import open_run


def test_groups_are_those_of_an_independent_reader(world: World) -> None:
    groups = find_groups(open_run(world.folder), world.folder / "experts", world.config.model)
    assert (groups.identity.kind, groups.identity.groups, groups.identity.experts) == (
        "assembly",
        CELLS + 1,
        CELLS,
    )
    by_name = {parameter.name: parameter for parameter in groups.tensors}
    for module, (experts, rows, columns, _) in read_weights(world.folder / "experts"):
        wanted = np.full(by_name.pop(f"{module}.weight").shape, 255, np.uint8)
        wanted[rows, columns] = experts
        np.testing.assert_array_equal(groups.read(f"{module}.weight"), wanted)
    assert not by_name


def test_tensors_that_were_recorded_across_are_read_across(tmp_path: Path) -> None:
    config = clustered_run(tmp_path, "gpt2", "none", "float32")
    assemble(tmp_path / "run", config)
    run = open_run(tmp_path / "run")
    groups = find_groups(run, tmp_path / "run" / "experts", config.model)
    for parameter in groups.tensors:
        group, labels = groups.read(parameter.name), np.asarray(run.labels(parameter.name)[:])
        assert group.shape == parameter.shape
        cells = group < groups.identity.experts
        assert cells.any() and np.array_equal(group[cells], labels[cells])


def test_without_an_assembled_model_or_when_asked_for_groups_are_the_cells(
    world: World, tmp_path: Path
) -> None:
    run = open_run(world.folder)
    for folder, wanted in ((tmp_path / "none", "auto"), (world.folder / "experts", "labels")):
        groups = find_groups(run, folder, world.config.model, wanted)  # type: ignore[arg-type]
        assert (groups.identity.kind, groups.identity.groups, groups.identity.experts) == (
            "labels",
            CELLS,
            CELLS,
        )
        for parameter in groups.tensors:
            assert parameter.kind == "linear" and parameter.layer is not None
            np.testing.assert_array_equal(groups.read(parameter.name), run.labels(parameter.name)[:])


def test_an_assembly_that_was_killed_is_refused(world: World, tmp_path: Path) -> None:
    experts = world.copy(tmp_path / "run") / "experts"
    run = open_run(tmp_path / "run")
    (experts / "config.json").unlink()
    with pytest.raises(InputError, match="no complete assembled model; run `tinyonn assemble`"):
        find_groups(run, experts, world.config.model)


def test_shards_that_are_lost_or_of_another_assembly_are_refused(world: World, tmp_path: Path) -> None:
    experts = world.copy(tmp_path / "run") / "experts"
    run = open_run(tmp_path / "run")
    config = json.loads((experts / "config.json").read_text("utf-8"))
    groups = find_groups(run, experts, world.config.model)
    name = groups.tensors[0].name
    config["assembly"]["id"] = "another"
    del config["digests"]
    (experts / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(InputError, match="belongs to assembly"):
        find_groups(run, experts, world.config.model).read(name)
    for shard in experts.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        groups.read(name)
