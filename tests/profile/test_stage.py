"""The stage: what it writes, whatever happens on the way, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from tests.profile.runs import CELLS, SLICES, World, assemble, contents
from tests.record.runs import expected_aside
from tests.store.machines import beating
from tinyonn.config import parse_config
from tinyonn.corpus.file import Corpus
from tinyonn.dense.load import load_model
from tinyonn.errors import CapacityError, InputError, StoreBusyError, StoreDamagedError
from tinyonn.profile import open_profile
from tinyonn.profile.groups import find_groups
from tinyonn.profile.measure import Measurer, PartProfile, ProfileWorker
from tinyonn.profile.profile import ProfileReport
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.run import open_run
from tinyonn.store.lock import RunLock

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys
from tinyonn.config import parse_config
from tinyonn.profile.stage import profile_run
profile_run(sys.argv[1], parse_config(json.loads(sys.argv[2]), whole=True))
"""


def profile(run: Path, world: World, **options: Any) -> ProfileReport:
    return profile_run(str(run), world.config, ProfileOptions(**options))


@pytest.fixture(scope="module")
def profiled(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProfileReport]:
    """A run and the report of its profile, which nothing disturbed; not to be written into."""
    run = world.copy(tmp_path_factory.mktemp("profiled") / "run")
    return run, profile(run, world)


@pytest.fixture
def again(profiled: tuple[Path, ProfileReport], tmp_path: Path) -> Path:
    """The same, to write into."""
    shutil.copytree(profiled[0], tmp_path / "run")
    return tmp_path / "run"


def test_every_sample_is_there_but_for_those_set_aside(
    world: World, profiled: tuple[Path, ProfileReport]
) -> None:
    run, report = profiled
    aside = expected_aside(world.rows)
    assert aside.keys() == {item["index"] for item in open_run(run).set_aside}
    found = open_profile(run / "profile")
    assert found.set_aside == aside
    assert sorted(found.samples) == sorted(set(range(len(world.rows))) - aside.keys())
    assert found.contribution.shape == found.act.shape == (len(found.samples), CELLS + 1)
    assert [world.rows[row]["kind"] for row in found.samples] == found.slices
    assert [world.rows[row]["text"] for row in found.samples] == found.excerpts
    assert report.samples == report.samples_measured - len(aside) == len(found.samples)
    assert (report.set_aside, report.experts, report.groups) == (len(aside), CELLS, CELLS + 1)
    assert json.loads(json.dumps(report.figures()))["slices"] == {"even": 68, "odd": 8}
    assert report.core_share is not None and 0 < report.core_share < 1
    assert 1 < report.effective_experts <= CELLS
    assert report.loss == pytest.approx(found.losses.mean())


def test_rows_are_what_a_measurer_measures(world: World, profiled: tuple[Path, ProfileReport]) -> None:
    run, found = open_run(profiled[0]), open_profile(profiled[0] / "profile")
    groups = find_groups(run, profiled[0] / "experts", world.config.model)
    measurer = Measurer(load_model(world.config.model), groups, run.calibration)
    corpus = Corpus(profiled[0] / "corpus.arrow")
    for place in (0, 40, len(found.samples) - 1):
        sample = corpus.sample(found.slices[place], int(found.positions[place]))
        assert sample.index == found.samples[place]
        measured = measurer.run(sample)
        assert measured.loss == found.losses[place]
        np.testing.assert_array_equal(found.act[place], measured.totals.act)
        np.testing.assert_array_equal(found.grad[place], measured.totals.grad)
        np.testing.assert_array_equal(
            found.contribution[place], measured.totals.contribution.astype(np.float32)
        )
        np.testing.assert_array_equal(found.pull[place], measured.totals.pull.astype(np.float32))
        assert found.tokens[place] == len(sample.labels) == found.labelled[place] + 1
        assert found.prompts[place] == len(sample.labels) // 2


def test_any_parquet_reader_finds_slices_samples_and_experts(profiled: tuple[Path, ProfileReport]) -> None:
    folder = profiled[0] / "profile"
    experts = ds.dataset(folder / "experts", partitioning="hive").to_table().to_pandas()
    samples = ds.dataset(folder / "samples", partitioning="hive").to_table().to_pandas()
    assert list(experts.columns) == ["sample", "expert", "act", "grad", "contribution", "pull", "slice"]
    assert len(experts) == len(samples) * (CELLS + 1)
    found = open_profile(folder)
    whole = experts.pivot_table(index="sample", columns="expert", values="contribution").loc[found.samples]
    np.testing.assert_array_equal(whole.to_numpy(np.float32), found.contribution)
    assert samples.groupby("slice")["sample"].count().to_dict() == {"even": 68, "odd": 8}


def test_a_second_call_does_nothing(world: World, again: Path, profiled: tuple[Path, ProfileReport]) -> None:
    before = contents(again / "profile")
    report = profile(again, world)
    assert (report.samples_measured, report.workers, report.samples) == (0, 0, profiled[1].samples)
    assert contents(again / "profile") == before


@pytest.mark.slow
def test_a_profile_killed_while_it_measures_ends_in_the_same_bytes(
    world: World, profiled: tuple[Path, ProfileReport], tmp_path: Path
) -> None:
    run = world.copy(tmp_path / "run")
    settings = json.dumps(world.config.model_dump(mode="json"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run), settings], cwd=ROOT, env=environment)
    try:
        while not list((run / "profile").glob("samples/*/*.parquet")):
            assert child.poll() is None, "ended before a part was written"
            time.sleep(0.001)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    wanted = contents(profiled[0] / "profile")
    left = contents(run / "profile")
    whole = {name: content for name, content in left.items() if not name.endswith(".part")}
    assert whole.items() <= wanted.items() and len(whole) < len(wanted)
    report = profile(run, world)
    assert 0 < report.samples_measured < sum(SLICES.values())
    assert contents(run / "profile") == wanted


def test_what_a_kill_can_leave_behind_is_cleared_and_measured_again(
    world: World, again: Path, profiled: tuple[Path, ProfileReport]
) -> None:
    folder = again / "profile"
    wanted = contents(folder)
    (folder / "samples" / "slice=odd" / "0-10.parquet").unlink()  # experts come first
    (folder / "experts" / "slice=even" / "0-32.parquet").unlink()
    (folder / "experts" / "slice=even" / "32-64.parquet").write_bytes(b"PAR1")
    (folder / "experts" / "slice=even" / "0-32.parquet.part").write_bytes(b"half")
    with pytest.raises(InputError, match=r"1 of 5 parts are missing, positions 0-10 of slice odd first"):
        open_profile(folder)
    assert profile(again, world).samples_measured == 32 + 32 + 10
    assert contents(folder) == wanted


def test_parts_without_a_manifest_are_not_trusted(world: World, again: Path) -> None:
    (again / "profile" / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds no profile; run `tinyonn profile` first"):
        open_profile(again / "profile")
    assert profile(again, world, samples=3).samples_measured == 3


def test_a_profile_grows_and_does_not_shrink(
    world: World, profiled: tuple[Path, ProfileReport], tmp_path: Path
) -> None:
    run = world.copy(tmp_path / "run")
    few = profile(run, world, samples=8)
    assert few.samples_measured == 8
    assert not any(name.endswith("/0-32.parquet") for name in contents(run / "profile"))
    whole = profile(run, world)
    assert whole.samples == profiled[1].samples
    assert contents(run / "profile") == contents(profiled[0] / "profile")
    assert profile(run, world, samples=8).samples == whole.samples


def test_another_assembly_is_refused_and_the_profile_stays(world: World, again: Path) -> None:
    before = contents(again / "profile")
    old = open_profile(again / "profile").manifest.groups.id
    new = assemble(again, world.config, budget=0.2)
    assert new != old
    with pytest.raises(InputError, match=rf"groups: assembly {new} instead of assembly {old}.*--fresh"):
        profile(again, world)
    with pytest.raises(InputError, match=rf"is a profile of assembly {old}, not of {new}.*--fresh"):
        open_profile(again / "profile", expect=new)
    with pytest.raises(InputError, match=r"groups: labels .* instead of assembly"):
        profile(again, world, groups="labels")
    assert contents(again / "profile") == before
    assert profile(again, world, samples=4, fresh=True).samples_measured == 4
    assert open_profile(again / "profile", expect=new).manifest.samples == 4


def test_cells_are_profiled_where_nothing_is_assembled(world: World, tmp_path: Path) -> None:
    run = world.copy(tmp_path / "run")
    shutil.rmtree(run / "experts")
    report = profile(run, world, samples=4)
    assert (report.source, report.experts, report.groups, report.core_share) == ("labels", CELLS, CELLS, None)
    assert open_profile(run / "profile").contribution.shape[1] == CELLS


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"excerpt": 20}, "excerpt: 20 instead of 160"),
        ({"prompt_tokens": 9}, "prompt_tokens: 9 instead of 64"),
    ],
)
def test_other_options_are_refused(world: World, again: Path, options: dict[str, int], what: str) -> None:
    with pytest.raises(InputError, match=what):
        profile(again, world, **options)


def test_another_model_and_another_corpus_are_refused(world: World, tmp_path: Path) -> None:
    run = world.copy(tmp_path / "run")
    tree = world.config.model_dump(exclude_unset=True)
    other = parse_config({**tree, "model": {**tree["model"], "dtype": "bfloat16"}}, whole=True)
    with pytest.raises(InputError, match=r"model\.dtype"):
        profile(run, replace(world, config=other))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "something else", "kind": "even"}\n' * 9, "utf-8")
    other = parse_config({**tree, "data": {**tree["data"], "path": str(rows)}}, whole=True)
    (run / "corpus.arrow").unlink()
    with pytest.raises(InputError, match="the corpus that was recorded"):
        profile(run, replace(world, config=other))
    assert not (run / "corpus.arrow").exists()  # the other one is not left there
    assert profile(run, world, samples=2).samples_measured == 2  # tokenised anew


def test_what_cannot_be_is_refused(world: World, again: Path) -> None:
    refused: list[dict[str, Any]] = [{"samples": 0}, {"workers": 0}, {"excerpt": -1}]
    for options in refused:
        with pytest.raises(InputError, match="must be at least"):
            ProfileOptions(**options)
    with pytest.raises(CapacityError, match=r"profiling needs .* of RAM and .* are there .*; use"):
        profile(again, world, memory=1 << 20, fresh=True)
    with RunLock(again), pytest.raises(StoreBusyError):
        profile(again, world)


def test_nothing_is_written_once_another_machine_holds_the_run(
    world: World, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the run over while the first part is measured, as when this one slept."""
    real = ProfileWorker.measure

    def late(self: ProfileWorker, *arguments: Any) -> PartProfile:
        result = real(self, *arguments)
        with beating(again / "lock"):
            return result

    monkeypatch.setattr(ProfileWorker, "measure", late)
    with pytest.raises(StoreBusyError, match="elsewhere"):
        profile(again, world, fresh=True)
    assert not list((again / "profile").rglob("*.parquet"))


def unsealed(text: str) -> str:
    """As an earlier version wrote it."""
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "digest"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: text.replace('"part"', '"parts"'),
        lambda text: unsealed(text).replace('"part"', '"parts"'),
        lambda text: unsealed(text).replace('"format": 1', '"format": 9'),
    ],
)
def test_a_manifest_that_is_not_readable_is_named(
    world: World, again: Path, damage: Callable[[str], str]
) -> None:
    path = again / "profile" / "manifest.json"
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    for attempt in (lambda: open_profile(path.parent), lambda: profile(again, world)):
        with pytest.raises((InputError, StoreDamagedError), match=r"manifest\.json.*--fresh"):
            attempt()


def test_a_flipped_bit_is_an_error(again: Path) -> None:
    path = again / "profile" / "experts" / "slice=even" / "32-64.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        StoreDamagedError, match=r"32-64\.parquet is damaged .*delete it and run `tinyonn profile` again"
    ):
        open_profile(again / "profile")
