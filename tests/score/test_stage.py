"""`tinyonn score` on a real store: what it writes, refuses and leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.recorded import SLICES, commit_part, make_run, make_store, parameters, score, weights
from tinyonn.config import Config, ScoreConfig
from tinyonn.errors import CapacityError, InputError, StoreBusyError, StoreDamagedError
from tinyonn.run import open_run
from tinyonn.score.scores import name_of, score_named
from tinyonn.score.source import DROPPED, RunSource, tensors_outside
from tinyonn.score.stage import score_run, task_groups
from tinyonn.select.select import groups_of, select
from tinyonn.select.selection import SelectOptions
from tinyonn.show.sizes import MiB
from tinyonn.store.arrays import spread
from tinyonn.store.lock import RunLock
from tinyonn.store.records import unpack
from tinyonn.workers.tasks import EngineOptions


def everything(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    run = open_run(folder)
    return {
        p.name: (np.asarray(run.rows(p.name)).tobytes(), np.asarray(run.affinity(p.name)).tobytes())
        for p in run.parameters
    }


def test_rows_and_affinity_of_every_tensor(tmp_path: Path) -> None:
    make_run(tmp_path, parts=2)
    report = score(tmp_path)
    assert report.fresh
    assert report.samples == sum(SLICES.values())
    run = open_run(tmp_path)
    for parameter in parameters():
        rows, affinity = run.rows(parameter.name), run.affinity(parameter.name)
        assert (rows.shape, str(rows.dtype)) == (parameter.shape, "uint16")
        assert (affinity.shape, str(affinity.dtype)) == (parameter.shape, "uint8")
        mean = run.mean(parameter.name)
        fields = rows.attrs["fields"]
        for s, (key, code) in enumerate(
            zip(("act", "grad", "freq"), unpack(np.asarray(rows))[:3], strict=True)
        ):
            book = np.array(fields[key]["codebook"])  # type: ignore[index, call-overload]
            best = np.abs(book.reshape(-1, *[1] * mean[s].ndim) - mean[s]).min(axis=0)
            span = float(mean[s].max() - mean[s].min())
            assert np.all(np.abs(book[code] - mean[s]) <= best + span / 500)
        assert (np.asarray(affinity) >> 4).max() <= 2


@pytest.mark.parametrize("name", ["balanced", "source", "magnitude"])
def test_the_code_of_s_is_of_what_selection_cuts_by(tmp_path: Path, name: str) -> None:
    """The same function on the rows that are written, exactly; and so no weight that is kept has a lower code."""
    make_run(tmp_path, parts=2)
    score(tmp_path, ScoreConfig(weights=name))
    source = RunSource(open_run(tmp_path), weights, labels=False)
    assert name_of(source.scored_by) == name
    selection = select(source, SelectOptions(budget=0.3, score=name))
    for parameter in tensors_outside(source.parameters):
        band = source.band(parameter.name, 0, parameter.shape[0], ("records", "weights"))
        assert band.records is not None
        S = score_named(name).prepare(source, parameter)(band)
        field = source.attributes(parameter.name)["fields"]["score"]
        codes = band.records & 15
        assert np.array_equal(codes, np.searchsorted(np.array(field["from"], np.float32), S, side="right"))
        assert np.abs(np.bincount(codes.reshape(-1), minlength=16) / codes.size - 1 / 16).max() < 0.02
        kept = groups_of(selection, source, parameter.name) != DROPPED
        assert codes[kept].min() >= codes[~kept].max()


def test_the_same_again_is_nothing_to_do_and_new_segments_are(tmp_path: Path) -> None:
    store = make_store(tmp_path, parts=2)
    for name in SLICES:
        commit_part(store, name, 0)
    assert score(tmp_path).fresh
    before = everything(tmp_path)
    assert not score(tmp_path).fresh
    assert everything(tmp_path) == before
    commit_part(store, "code", 1)
    assert score(tmp_path).fresh
    assert everything(tmp_path) != before
    assert score(tmp_path, ScoreConfig(weights="source")).fresh


def test_slices_with_few_samples_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, {"code": 40, "prose": 7})
    report = score(tmp_path)
    assert len(report.warnings) == 1
    assert "slice prose has 7 samples" in report.warnings[0]


def test_nothing_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run is stored there"):
        score_run(str(tmp_path / "nowhere"), Config())
    assert not (tmp_path / "nowhere").exists()
    make_store(tmp_path)
    with pytest.raises(InputError, match=r"no samples are recorded yet.*tinyonn record"):
        score(tmp_path)


def test_scoring_while_a_recorder_holds_the_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with RunLock(tmp_path), pytest.raises(StoreBusyError):
        score(tmp_path)
    assert score(tmp_path).fresh


def test_too_little_memory_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(CapacityError, match=r"scoring needs .* does not fit in 100 MiB of --memory"):
        score(tmp_path, options=EngineOptions(memory=100 * MiB))


def test_a_damaged_chunk_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    make_run(tmp_path)
    score(tmp_path)
    before = everything(tmp_path)
    chunks = sorted((tmp_path / "store" / "chunks").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    damaged = chunks[0]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 8
    damaged.write_bytes(bytes(data))
    with pytest.raises(StoreDamagedError, match=r"weight of segment .*chunk"):
        score(tmp_path, ScoreConfig(weights="source"))
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "engine", ["distributed", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_every_engine_gives_the_same_bits(tmp_path: Path, engine: str) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    score(tmp_path / "a", options=EngineOptions("threads", 3))
    score(tmp_path / "b", options=EngineOptions(engine, 2))  # type: ignore[arg-type]
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_tasks_hold_all_tensors_once_largest_first() -> None:
    groups = task_groups(parameters())
    assert sorted(p.name for group in groups for p in group) == sorted(p.name for p in parameters())
    assert len(groups) == 1
    assert [p.size for p in groups[0]] == sorted((p.size for p in parameters()), reverse=True)


def test_spread_bands_reach_over_the_whole_tensor() -> None:
    spans = [(i, i + 1) for i in range(93)]
    chosen = spread(spans, 8)
    assert len(chosen) == 8
    assert chosen[0][0] < 10
    assert chosen[-1][0] > 83
    assert spread(spans[:5], 8) == spans[:5]
