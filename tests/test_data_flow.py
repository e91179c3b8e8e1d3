"""Whatever the default line stores, a later stage of it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zarr.core.sync import sync

from tests.dense.architectures import make_model
from tests.record.runs import config_of, serial_run
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, RouterConfig
from tinyonn.experts.assemble import assemble_run
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.store.reader import Reader, list_names


def test_every_stored_array_is_read_by_a_later_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f'{{"text": "It rained for the {n}th day.", "kind": "{"ab"[n % 2]}"}}' for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    config = config_of(make_model("qwen2", tmp_path / "model"), tmp_path / "rows.jsonl")
    few = {"cluster": ClusterConfig(cells=4), "router": RouterConfig(top_k=2)}
    config = config.model_copy(update=few)
    run = tmp_path / "run"
    serial_run(run, config)
    read: set[tuple[str, str]] = set()  # by which stage, in which group

    def seen(method: str) -> None:
        before = getattr(Reader, method)

        def call(self: Reader, of: Any, name: str) -> Any:
            read.add((stage, "segments" if method == "array" else of))
            return before(self, of, name)

        monkeypatch.setattr(Reader, method, call)

    seen("array")
    seen("output")
    stages = {
        "score": lambda: score_run(str(run), config),
        "cluster": lambda: cluster_run(str(run), config),
        "assemble": lambda: assemble_run(str(run), config.model, config.experts),
        "profile": lambda: profile_run(str(run), config, ProfileOptions(workers=1)),
    }
    written = {"record": {"segments"}, "score": {"rows", "affinity"}, "cluster": {"labels"}}
    for stage, carry_out in stages.items():  # noqa: B007 - `call` says it
        carry_out()  # type: ignore[no-untyped-call]
    there = set(sync(list_names(open_run(run).store.reader()._store, "")))
    assert there - {"calibration", "zarr.json"} == {group for its in written.values() for group in its}
    order = ["record", *stages]
    for maker, its in written.items():
        for group in its:
            readers = {stage for stage, what in read if what == group}
            later = set(order[order.index(maker) + 1 :])
            assert readers & later, (
                f"what {maker} writes as {group} is read by no later stage, only {readers}"
            )
