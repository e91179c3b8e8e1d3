"""A tiny model and corpus with bad samples in it, and the serial run that all others must equal bit by bit."""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file

from tests.dense.architectures import make_model
from tinyonn.config import Config, parse_config
from tinyonn.corpus.corpus import prepare_corpus
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_tokenizer
from tinyonn.plan.recording import layer_windows
from tinyonn.record.identity import identity_of
from tinyonn.record.worker import Worker
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store

POISON = "~"  # its embedding is infinite: the loss is NaN
LATE = (
    "^"  # squares beyond float32 as the input of one linear layer of the last block, finite everywhere else
)
SLICES = {"even": 19, "odd": 10, "rare": 7, "sick": 2}  # every sample of the last one is bad

Records = dict[str, np.ndarray[Any, np.dtype[np.uint16]]]


def reasons(layers: int = 1) -> dict[str, str]:
    """Why a sample with each of the two letters is set aside."""
    return {POISON: "loss is nan", LATE: f"input of {late_tensor(layers)} is not finite"}


def late_tensor(layers: int) -> str:
    """The tensor whose input ``LATE`` makes too large."""
    return f"model.layers.{layers - 1}.mlp.down_proj.weight"


def make_sick_model(folder: Path, layers: int = 1) -> Path:
    """A random Qwen2 of one or two blocks that cannot stand two letters.

    Dimension 0 of an embedding is -4 for ``LATE`` and 4 for all others. In the last block one gate opens on its
    negative side alone; behind it the values are 5e24 for that letter and 0 for all others.
    """
    make_model("qwen2", folder)
    file, settings = folder / "model.safetensors", folder / "config.json"
    tree = json.loads(settings.read_text("utf-8"))
    tree |= {"num_hidden_layers": layers, "layer_types": tree["layer_types"][:layers]}
    settings.write_text(json.dumps(tree), "utf-8")
    weights = {
        name: tensor for name, tensor in load_file(file).items() if layers > 1 or "layers.1." not in name
    }
    mlp = f"model.layers.{layers - 1}.mlp"
    token = {sign: load_token(folder, sign) for sign in (POISON, LATE)}
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 4.0
    embedding[token[LATE], 0] = -4.0
    embedding[token[POISON]] = torch.inf
    for name, value in (("gate_proj", -1e3), ("up_proj", 1e20)):
        row = torch.zeros(embedding.shape[1])
        row[0] = value
        weights[f"{mlp}.{name}.weight"][5] = row
    weights[late_tensor(layers)][:, 5] = 1e-30
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def load_token(folder: Path, sign: str) -> int:
    """The id of a letter."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return int(vocabulary[sign])


def write_rows(path: Path, slices: dict[str, int] = SLICES, seed: int = 0) -> list[dict[str, str]]:
    """A JSONL file of random words; returns its rows."""
    chance = random.Random(seed)
    rows = []
    for name, count in slices.items():
        for number in range(count):
            text = "".join(chance.choices(string.ascii_lowercase + " ", k=chance.randrange(8, 24)))
            bad = POISON if name == "sick" or number == 3 else LATE if number == 6 else ""
            rows.append({"text": f"{text}{bad}.", "kind": name})
    chance.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def config_of(model: Path, rows: Path, **record: Any) -> Config:
    """Segments of four samples."""
    return parse_config(
        {
            "model": {"path": str(model), "quantization": "none", "dtype": "float32", "device": "cpu"},
            "data": {"path": str(rows), "slice": "kind", "max_tokens": 64},
            "record": {"segment": 4, "workers": 2, **record},
        },
        whole=True,
    )


def expected_aside(rows: Sequence[dict[str, str]]) -> dict[int, str]:
    """Reason by index of the rows that must be set aside."""
    return {
        index: reason
        for index, row in enumerate(rows)
        for sign, reason in reasons().items()
        if sign in row["text"]
    }


def serial_run(folder: Path, config: Config) -> Store:
    """The whole run in this process, segment after segment, without Ray; merged."""
    store = record_in_order(folder, config)
    merge_ready(store)
    return store


def record_in_order(folder: Path, config: Config) -> Store:
    """As `serial_run`, with every segment as it was committed."""
    corpus = prepare_corpus(config, load_tokenizer(config.model), folder / "corpus.arrow")
    worker = Worker(config.model, config.record.threads, config.record.seed)
    parameters = worker.load().parameters
    windows = layer_windows([(p.name, p.layer, p.size) for p in parameters], 1)
    assert isinstance(config.record.segment, int)
    manifest = Manifest(
        **identity_of(config),
        data={"corpus": corpus.fingerprint},
        slices=corpus.slices,
        segment_size=config.record.segment,
        parameters=parameters,
    )
    store = Store.create(folder / "store", manifest)
    calibration = worker.calibrate(corpus.calibration(config.record.calibration), windows)
    store.commit_calibration(calibration)
    worker.prepare(calibration, windows)
    for name in manifest.slices:
        for leaf in manifest.leaves(name):
            record_segment(worker, store, leaf, corpus.range(leaf.slice, leaf.first, leaf.last), len(windows))
    return store


def record_segment(
    worker: Worker, store: Store, leaf: Segment, samples: Sequence[Sample], windows: int
) -> dict[int, str]:
    """Record, write and commit one segment, window by window; returns what was set aside."""
    bad: dict[int, str] = {}
    fork: Any = None
    window = 0
    while window < windows:
        found = worker.record(samples, window, bad)
        bad.update(found)
        if found and window > 0:  # earlier windows have these samples in their sums
            store.drop(leaf)
            fork, window = None, 0
            continue
        aside = tuple({"index": index, "reason": reason} for index, reason in sorted(bad.items()))
        counted = Segment(leaf.slice, leaf.first, leaf.last, len(samples) - len(aside), aside)
        fork = worker.write(fork if fork is not None else store.begin(leaf), counted, window)
        window += 1
    assert store.commit(fork, counted)
    return bad


def records_of(store: Store) -> Records:
    """Every tensor of every live segment by ``segment tensor``."""
    reader = store.reader()
    return {
        f"{segment.name} {parameter.name}": reader.read(segment, parameter.name, 0, parameter.shape[0])
        for segment in reader.segments
        for parameter in store.manifest.parameters
        if segment.samples
    }


def assert_same_run(one: Store, other: Store) -> None:
    """Equal calibration, segments with counts and set-aside samples, and equal bits of every record."""
    assert one.calibration == other.calibration
    assert [vars(segment) for segment in one.segments()] == [vars(segment) for segment in other.segments()]
    assert_same_records(records_of(one), records_of(other))


def assert_same_records(one: Records, other: Records) -> None:
    assert one.keys() == other.keys()
    for name, records in one.items():
        np.testing.assert_array_equal(records, other[name], err_msg=name)


def wait_until_gone() -> None:
    """Until no recording actor lives any more; Ray ends them after it has said so."""
    deadline = time.monotonic() + 60
    while left := actors():
        assert time.monotonic() < deadline, f"actors outlived their recording: {left}"
        time.sleep(0.05)


def actors() -> list[psutil.Process]:
    """Living processes of recording actors below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            named = "ray::Worker" in " ".join([process.name(), *process.cmdline()])
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
