"""The layout on disk is a promise: a frozen store stays readable, by this package and by plain Zarr."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store.independent_reader import read
from tinyonn.run import open_run
from tinyonn.store.repository import Store

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("layout-*.zip"))


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    archive: Path = request.param
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    return tmp_path / "store", json.loads(archive.with_suffix(".json").read_text())


def test_a_frozen_store_is_read(frozen: tuple[Path, dict[str, Any]]) -> None:
    location, expected = frozen
    store = Store.open(location)
    assert store.manifest.to_json() == expected["manifest"]
    assert [segment.name for segment in store.segments()] == list(expected["segments"])
    for segment in store.segments():
        entry = expected["segments"][segment.name]
        assert (segment.samples, list(segment.set_aside)) == (entry["samples"], entry["set_aside"])
        for name, values in entry["records"].items():
            assert np.asarray(store.records(segment, name)[...]).ravel()[::97].tolist() == values


def test_plain_zarr_reads_the_same_means(frozen: tuple[Path, dict[str, Any]]) -> None:
    location, _ = frozen
    run = open_run(location)
    found = read(location)
    assert found["samples"] == run.samples > 0
    assert set(found["means"]) == {parameter.name for parameter in run.parameters}
    for name, means in found["means"].items():
        np.testing.assert_allclose(run.mean(name), means, rtol=1e-6)


def test_the_metadata_say_how_to_read_the_codes(frozen: tuple[Path, dict[str, Any]]) -> None:
    location, _ = frozen
    store = Store.open(location)
    array = store.records(store.segments()[0], "embed.weight")
    metadata = array.metadata.to_dict()
    assert metadata["zarr_format"] == 3
    assert array.dtype == np.uint16
    assert array.shape == (40, 24)
    codecs: Any = metadata["codecs"]
    assert [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
    fields: Any = array.attrs["fields"]
    assert [(name, fields[name]["shift"]) for name in fields] == [
        ("act", 12),
        ("grad", 8),
        ("freq", 4),
        ("score", 0),
    ]
    assert all(len(fields[name]["codebook"]) == 16 for name in ("act", "grad", "freq"))
    assert {"base"} <= fields["act"].keys() & fields["grad"].keys()
    assert "threshold" in fields["freq"]
