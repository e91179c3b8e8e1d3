"""One worker without Ray: windows, order, bad samples and spilling change no bit that they should not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.record.runs import (
    LATE,
    POISON,
    Records,
    assert_same_records,
    config_of,
    late_tensor,
    make_sick_model,
    reasons,
    record_segment,
    records_of,
)
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_tokenizer
from tinyonn.plan.recording import layer_windows
from tinyonn.record.levels import SUM_SAMPLES
from tinyonn.record.worker import Worker
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.repository import Store


class Bench:
    """A worker with its calibration; every call of `record` takes a store of its own."""

    def __init__(self, folder: Path) -> None:
        config = config_of(make_sick_model(folder / "model", layers=2), folder / "rows.jsonl")
        self.folder = folder
        self.tokenizer = load_tokenizer(config.model)
        self.worker = Worker(config.model, 1, 0)
        self.parameters = self.worker.load().parameters
        self.calibration = self.worker.calibrate(self.samples(12), self.windows(1))
        self.stores = 0

    def windows(self, count: int) -> list[list[str]]:
        return layer_windows([(p.name, p.layer, p.size) for p in self.parameters], count)

    def each_alone(self) -> list[list[str]]:
        return [[parameter.name] for parameter in self.parameters]

    def sample(self, index: int, text: str) -> Sample:
        ids = np.array(self.tokenizer(text).input_ids, np.int32)
        return Sample(index, "x", ids, ids.copy())

    def samples(self, count: int, bad: dict[int, str] | None = None) -> list[Sample]:
        """Random words; a letter of `bad` stands in the middle of the sample at that place."""
        found = []
        for index in range(count):
            chance = random.Random(index)
            word = "".join(chance.choices("abcdefgh ", k=chance.randrange(6, 20)))
            found.append(self.sample(index, f"{word}{(bad or {}).get(index, '')}{word[:3]}."))
        return found

    def record(
        self, samples: Sequence[Sample], windows: list[list[str]] | None = None
    ) -> tuple[Records, Segment, dict[int, str]]:
        """The records of one segment of the same name each time, the segment and what was set aside."""
        self.stores += 1
        leaf = Segment("x", 0, 1000)
        manifest = Manifest({}, {}, {}, {"x": 1000}, 1000, self.parameters)
        store = Store.create(self.folder / f"store{self.stores}", manifest)
        windows = windows or self.windows(1)
        self.worker.prepare(self.calibration, windows)
        bad = record_segment(self.worker, store, leaf, samples, len(windows))
        (segment,) = store.segments()
        return records_of(store), segment, bad

    def sums(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """The sums of every tensor, as integers: grad, and act and freq or the histograms."""
        self.worker.prepare(self.calibration, self.windows(1))
        assert self.worker.record(samples, 0, {}) == {}
        found = {}
        for name, site in self.worker.recorder.sites.items():
            sums = site.sums(len(samples))
            parts = (sums.grad, sums.act, sums.freq, sums.histograms)
            found[name] = [part.astype(np.int64) for part in parts if part is not None]
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_windows_change_no_bit(bench: Bench) -> None:
    samples = bench.samples(9)
    whole, segment, bad = bench.record(samples)
    assert (segment.samples, bad) == (9, {})
    assert len({records.tobytes() for records in whole.values()}) == len(bench.parameters)
    for windows in (bench.windows(2), bench.windows(4)):
        assert len(windows) in (2, 4)
        assert_same_records(whole, bench.record(samples, windows)[0])


def test_the_order_of_samples_changes_no_bit(bench: Bench) -> None:
    samples = bench.samples(SUM_SAMPLES + 5)  # so that the batches hold other samples, too
    shuffled = random.Random(1).sample(samples, len(samples))
    assert_same_records(bench.record(samples)[0], bench.record(shuffled)[0])


def test_another_sample_changes_the_records(bench: Bench) -> None:
    samples = bench.samples(9)
    one, other = bench.record(samples)[0], bench.record(samples[:-1])[0]
    assert all(not np.array_equal(one[name], other[name]) for name in one if name.endswith("proj.weight"))


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize(
    "bad",
    [
        {0: POISON},
        {8: POISON, 20: POISON},  # found in the middle of the first batch, and of the second
        {4: LATE, 9: POISON, 21: LATE},
        {SUM_SAMPLES - 1: LATE, SUM_SAMPLES: POISON},  # the last of a batch and the first of the next
    ],
)
def test_a_bad_sample_is_set_aside_and_leaves_no_trace(
    bench: Bench, bad: dict[int, str], windows: int
) -> None:
    samples = bench.samples(23, bad)
    records, segment, found = bench.record(samples, bench.windows(windows))
    assert found == {index: reasons(2)[sign] for index, sign in bad.items()}
    assert segment.samples == 23 - len(bad)
    assert segment.set_aside == tuple({"index": i, "reason": reasons(2)[bad[i]]} for i in sorted(bad))
    without = bench.record([sample for sample in samples if sample.index not in bad])[0]
    assert_same_records(without, records)


def test_a_sample_that_is_bad_late_is_found_in_its_window_alone(bench: Bench) -> None:
    """Otherwise the test above would not show that earlier windows are recorded again."""
    windows = bench.each_alone()
    bench.worker.prepare(bench.calibration, windows)
    samples = bench.samples(4, {2: LATE})
    found = [window[0] for n, window in enumerate(windows) if bench.worker.record(samples, n, {})]
    assert found == [late_tensor(2)]


def test_a_segment_of_bad_samples_has_no_records(bench: Bench) -> None:
    records, segment, bad = bench.record(bench.samples(3, {0: POISON, 1: POISON, 2: LATE}))
    assert (segment.samples, len(segment.set_aside), len(bad)) == (0, 3, 3)
    assert records == {}


@pytest.mark.parametrize("count", [SUM_SAMPLES + 1, 3 * SUM_SAMPLES, 40])
def test_more_samples_than_a_byte_holds_are_spilled(bench: Bench, count: int) -> None:
    samples = bench.samples(count)
    whole = bench.sums(samples)
    parts = [bench.sums(samples[i : i + SUM_SAMPLES]) for i in range(0, count, SUM_SAMPLES)]
    for name, arrays in whole.items():
        for k, array in enumerate(arrays):
            np.testing.assert_array_equal(array, sum(part[name][k] for part in parts), err_msg=name)
    assert max(int(arrays[0].max()) for arrays in whole.values()) > 255


def test_a_window_frees_its_sums(bench: Bench) -> None:
    bench.record(bench.samples(3), bench.windows(4))
    for name, site in bench.worker.recorder.sites.items():
        assert (site.grad, site.grad_total, site.histograms, site.journal) == (None, None, None, []), name


def test_use_counts_samples_and_seconds(bench: Bench) -> None:
    before = bench.worker.use()
    bench.record(bench.samples(5, {1: POISON}))
    after = bench.worker.use()
    assert after.samples - before.samples == 4
    assert after.recording > before.recording
    assert after.writing > before.writing
    assert after.peak_rss > 100 << 20


@pytest.mark.parametrize("bad", [{}, {3: POISON}, {5: LATE}])
def test_calibration_does_not_depend_on_windows_or_bad_samples(bench: Bench, bad: dict[int, str]) -> None:
    samples = bench.samples(8, bad)
    good = [sample for sample in samples if sample.index not in bad]
    whole = bench.worker.calibrate(good, bench.windows(1))
    for windows in (bench.windows(1), bench.windows(4)):
        assert bench.worker.calibrate(samples, windows) == whole
