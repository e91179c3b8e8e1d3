"""Where tasks run: the same results in the same order, a dashboard, refusals."""

from __future__ import annotations

import logging
import urllib.request

import pytest

from tinyonn.errors import CapacityError, InputError
from tinyonn.machine import usable_cpus
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import GiB, MiB
from tinyonn.workers.tasks import PROCESS_BYTES, EngineOptions, Watch, computing


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("kind", ["threads", "distributed"])
def test_results_come_in_the_order_of_the_calls_and_each_is_counted(kind: str) -> None:
    options = EngineOptions(kind, 2)  # type: ignore[arg-type]
    with (
        Bar("squaring", sum(range(20))) as bar,
        computing(options, 2, Watch(bar, lambda call: call[1][0])) as compute,
    ):
        assert compute([(square, (i,)) for i in range(20)]) == [i * i for i in range(20)]
    assert bar.share == 1
    assert bar.line().startswith("squaring: 190/190")


def test_the_dask_dashboard_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINYONN_DASHBOARD", "127.0.0.1:0")
    pages = []
    caplog.set_level(logging.INFO, "tinyonn")
    with computing(EngineOptions("distributed", 1), 1) as compute:
        compute([(square, (2,))])
        link = caplog.text.split("dashboard: ")[1].split()[0]
        pages.append(urllib.request.urlopen(link, timeout=20).read().decode())
    assert "Dask" in pages[0]


TASKS = [GiB] * 1000


def test_workers_are_as_many_as_fit() -> None:
    assert EngineOptions(memory=64 * GiB).fit(TASKS, "it").workers == 2 * usable_cpus()
    assert EngineOptions(workers=7, memory=64 * GiB).fit(TASKS, "it").workers == 7
    assert EngineOptions(workers=7, memory=PROCESS_BYTES + 3 * GiB).fit(TASKS, "it").workers == 3
    each = GiB + PROCESS_BYTES  # workers of a cluster are processes
    options = EngineOptions("distributed", 7, memory=PROCESS_BYTES + 3 * each)
    assert options.fit(TASKS, "it").workers == 3


def test_what_does_not_fit_or_is_unknown_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"it needs 1\.\d+ GiB .* does not fit in 700 MiB of --memory"):
        EngineOptions(memory=700 * MiB).fit(TASKS, "it")
    with (
        pytest.raises(InputError, match="--engine 'spark' is unknown; choose threads, distributed, ray"),
        computing(
            EngineOptions("spark"),  # type: ignore[arg-type]
            1,
        ),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"),
        computing(EngineOptions("distributed", address="tcp://127.0.0.1:1"), 1),
    ):
        pass
