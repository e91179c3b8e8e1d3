"""Bits turned in the files of a finished run, and what their readers say to that.

PYTHONPATH=. python -m tests.hardening.flips 400 0     (flips, seed)

For every kind of file there is a reader: the function by which a stage takes it up. A turned bit must end as the same
result (where nothing depends on it), as a file that was made again or a part that was left out, both with a warning
that names it, or as an error that names it. What is only looked at, such as pictures and logs, has no reader.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tests.experts.runs import clustered_run
from tests.train.runs import OPTIONS, ROUTER
from tinyonn.config import Config, DataConfig, ExpertsConfig
from tinyonn.corpus.file import Corpus
from tinyonn.dense.load import fingerprint_model
from tinyonn.errors import TinyONNError
from tinyonn.evaluate.allocate import AllocateOptions, allocate_run
from tinyonn.evaluate.report import VERSION, Line, Results, card_figures
from tinyonn.evaluate.stage import EvaluateOptions, evaluate_run, held_out_corpus
from tinyonn.evaluate.trained import evaluate_trained, trained_card_figures
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.folder import open_assembled
from tinyonn.files import read_derived
from tinyonn.profile.profile import open_profile
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.record.identity import recorded_corpus
from tinyonn.run import open_run
from tinyonn.select.selection import SelectOptions, all_searched_shares, read_allocation
from tinyonn.store.arrays import codebooks_of, read_rows
from tinyonn.train.checkpoint import Checkpoints
from tinyonn.train.data import held_out_batches
from tinyonn.train.monitor import FILE, read_lines
from tinyonn.train.plan import make_spec, training_corpus
from tinyonn.train.stage import TrainStageOptions, _starts, _stored, train_run
from tinyonn.train.teacher import Cached
from tinyonn.train.worker import USE

T = TypeVar("T")
EXPERTS = ExpertsConfig(budget=0.6)
OUTCOMES = ("same", "remade or left out, named", "error, named", "unnamed", "silent")
SAME, REMADE, ERROR, UNNAMED, SILENT = OUTCOMES


@dataclass(frozen=True)
class World:
    """A finished run in ``folder / "run"``, which may be hit, and what it was in ``folder / "whole"``."""

    folder: Path
    config: Config
    evaluate: EvaluateOptions

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def training(self) -> TrainStageOptions:
        """How it was trained."""
        train = replace(OPTIONS, keep=3, weights=replace(OPTIONS.weights, hidden=0.0))
        return TrainStageOptions(train=train, router=ROUTER, threads=1, teacher_k=4)

    def restore(self) -> None:
        """Put the run back as it was."""
        shutil.rmtree(self.run)
        shutil.copytree(self.folder / "whole", self.run)


def make_world(folder: Path) -> World:
    """Record, score, cluster, search, assemble, profile, train and evaluate a small random model."""
    config = clustered_run(folder, quantization="none", rows_each=8)
    run = str(folder / "run")
    held_out = folder / "heldout.jsonl"
    texts = [("code", "def g(y): return y * {}"), ("prose", "It snowed on the {}th night.")]
    rows = [json.dumps({"text": text.format(n), "kind": kind}) for n in range(3) for kind, text in texts]
    held_out.write_text("\n".join(rows), "utf-8")
    more = folder / "more.jsonl"
    more.write_text("\n".join([(folder / "rows.jsonl").read_text("utf-8"), *rows]), "utf-8")
    data: DataConfig = config.data.model_copy(update={"path": str(more)})
    config = config.model_copy(update={"train": config.train.model_copy(update={"data": data})})
    options = EvaluateOptions(
        methods=("default",),
        budgets=(0.6,),
        data=config.data.model_copy(update={"path": str(held_out)}),
        samples=4,
        split="all",
        calibration=2,
        selection=SelectOptions(allocation="global", score="wg"),
    )
    world = World(folder, config, options)
    fingerprint_model(config.model, world.run / "fingerprint.json")
    allocate_run(run, config, AllocateOptions(budgets=(0.6,), samples=2, rounds=0))
    assemble_run(run, config.model, EXPERTS)
    profile_run(run, config, ProfileOptions(workers=1))
    train_run(run, config, world.training)
    evaluate_run(run, config, options)
    evaluate_trained(run, config, options)
    shutil.copytree(world.run, folder / "whole")
    return world


def store(world: World) -> Any:
    """All that the store says: manifest, calibration, segments, rows, affinity, labels."""
    run = open_run(world.run)
    reader = run.store.reader()
    found: list[Any] = [run.manifest.to_json(), run.calibration, run.set_aside]
    found += [reader.stage(group) for group in ("rows", "affinity", "labels")]
    for parameter in run.parameters:
        name, rows = parameter.name, parameter.shape[0]
        for segment in reader.segments:
            array, what = reader.array(segment, name), reader.what(segment, name)
            found += [segment.name, segment.samples, codebooks_of(array, what).tolist()]
            found.append(read_rows(array, 0, rows, what).tobytes())
        for group in ("rows", "affinity", "labels"):
            array = reader.output(group, name)
            found += [dict(array.attrs), read_rows(array, 0, rows, reader.what(group, name)).tobytes()]
    found.append(run.mean(run.parameters[0].name).tobytes())
    return found


def samples(corpus: Corpus) -> Any:
    """Every sample of a corpus, and what it says of itself."""
    every = [corpus.sample(name, at) for name, count in corpus.slices.items() for at in range(count)]
    rows = [(s.index, s.slice, s.input_ids.tolist(), s.labels.tolist()) for s in every]
    return corpus.header, corpus.slicer, rows


def recorded(world: World) -> Any:
    """The corpus as profile and evaluation open it."""
    return samples(recorded_corpus(world.run, world.config, open_run(world.run).manifest))


def trained_on(world: World) -> Any:
    """The corpus that is trained on."""
    return samples(training_corpus(world.config, world.run))


def held_out(world: World) -> Any:
    """The corpus that is evaluated on."""
    return samples(held_out_corpus(world.config, world.evaluate, world.run))


def fingerprint(world: World) -> Any:
    """The base model's."""
    return fingerprint_model(world.config.model, world.run / "fingerprint.json")


def allocation(world: World) -> Any:
    """Shares of tensors that were found, and the curves."""
    return all_searched_shares(open_run(world.run), str(world.run)), read_allocation(
        world.run / "allocation.json"
    )


def experts(world: World) -> Any:
    """Assembled once more: what is damaged is made again. The card and the report tell of the call itself."""
    assemble_run(str(world.run), world.config.model, EXPERTS)
    folder = world.run / "experts"
    state, settings = loaded(folder)
    assembly = {name: value for name, value in settings["assembly"].items() if name != "report"}
    told = ("README.md", "config.json", "digests.json", "selection.json")
    files = {name: its for name, its in contents(folder).items() if name not in told}
    return state, {**settings, "assembly": assembly}, files


def loaded(folder: Path) -> Any:
    """A sparse model as the package opens it."""
    model = open_assembled(folder)
    state = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    return state, model.config.to_dict()


def profile(world: World) -> Any:
    """All of it."""
    found = vars(open_profile(world.run / "profile"))
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


def checkpoint(world: World) -> Any:
    """What a training goes on from."""
    about = json.loads(
        next((world.folder / "whole/train").glob("checkpoint-*/state.json")).read_text("utf-8")
    )
    found = Checkpoints(world.run / "train", about["identity"]).latest()
    assert found is not None
    return found.step, found.state, {name: digest(tensor) for name, tensor in found.tensors.items()}


def log(world: World) -> Any:
    """What was written of every step."""
    folder = world.run / "train"
    return list(read_lines(folder / FILE)), _starts(folder)


def ended(world: World) -> Any:
    """What a training says at its end."""
    spec = make_spec(str(world.run), world.config, world.training)
    return _stored(spec), read_derived(world.run / "train" / USE)


def teacher(world: World) -> Any:
    """The teacher's likeliest tokens for every sample."""
    (folder,) = (path.parent for path in (world.folder / "whole/train").rglob("teacher.json"))
    cached = Cached(world.run / folder.relative_to(world.folder / "whole"))
    corpus = training_corpus(world.config, world.run)
    every = [corpus.sample(name, at) for name, count in corpus.slices.items() for at in range(count)]
    said = [cached(batch) for batch in held_out_batches(every, tokens=4)]
    return [(digest(out.indices_BTK), digest(out.logprobs_BTK)) for out in said], cached.vocabulary


def evaluated(world: World) -> Any:
    """Lines and the figures of cards."""
    whole = world.folder / "whole"
    cards = json.loads((whole / "evaluate/cards.json").read_text("utf-8"))["cards"]
    assembly = json.loads((whole / "evaluate/trained.json").read_text("utf-8"))["assembly"]
    lines = Results(world.run / "evaluate/lines.json", VERSION, Line.from_tree)
    return (
        lines._lines,
        card_figures(world.run, cards[0]["selection"]),
        trained_card_figures(world.run, assembly),
    )


@dataclass(frozen=True)
class Kind:
    """Files of a kind and who reads them."""

    name: str
    patterns: tuple[str, ...]
    read: Callable[[World], Any]
    may_differ: bool = False  # where a part that is left out, with a warning, gives another result


KINDS = (
    Kind("store snapshots", ("store/snapshots/*",), store),
    Kind("store manifests, refs", ("store/manifests/*", "store/refs/*/*"), store),
    Kind("store chunks", ("store/chunks/*",), store),
    Kind("corpus.arrow", ("corpus.arrow",), recorded),
    Kind("train.arrow", ("train.arrow",), trained_on),
    Kind("heldout.arrow", ("heldout.arrow",), held_out),
    Kind("fingerprint.json", ("fingerprint.json",), fingerprint),
    Kind("allocation.json", ("allocation.json",), allocation),
    Kind("experts: safetensors, assembled", ("experts/*.safetensors",), experts),
    Kind("experts: JSON, assembled", ("experts/*.json",), experts),
    Kind("experts: safetensors, loaded", ("experts/*.safetensors",), lambda w: loaded(w.run / "experts")),
    Kind(
        "experts: config and index, loaded",
        ("experts/config.json", "experts/model.safetensors.index.json"),
        lambda w: loaded(w.run / "experts"),
        True,
    ),
    Kind("profile manifest", ("profile/manifest.json",), profile),
    Kind("profile tables", ("profile/*/*/*.parquet",), profile),
    Kind("checkpoint state.json", ("train/checkpoint-*/state.json",), checkpoint, True),
    Kind("checkpoint tensors", ("train/checkpoint-*/state.safetensors",), checkpoint, True),
    Kind("train logs", ("train/*.jsonl",), log, True),
    Kind("train done, use", ("train/*.json",), ended, True),
    Kind("teacher's cache", ("train/*/*/teacher.json", "train/*/*/part-*.safetensors"), teacher),
    Kind("model: safetensors", ("model/*.safetensors",), lambda w: loaded(w.run / "model")),
    Kind(
        "model: config and index",
        ("model/config.json", "model/model.safetensors.index.json"),
        lambda w: loaded(w.run / "model"),
        True,
    ),
    Kind("evaluation", ("evaluate/*.json",), evaluated, True),
)


@dataclass(frozen=True)
class Flip:
    """A turned bit and what became of it; `said` are the error or the warnings."""

    kind: str
    path: str
    bit: int
    outcome: str
    said: str


class Flips:
    """Turns bits in a run, one at a time.

    Parameters
    ----------
    world : World
    seed : int
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world, self._chance = world, random.Random(seed)
        self._whole: dict[str, Any] = {}

    def take(self, kind: Kind) -> Flip:
        """Turn a bit of a file of a kind, read it, and put everything back."""
        world, chance = self._world, self._chance
        if kind.name not in self._whole:
            self._whole[kind.name] = kind.read(world)
            world.restore()
        paths = sorted(
            path for pattern in kind.patterns for path in world.run.glob(pattern) if path.is_file()
        )
        path = chance.choice([path for path in paths if path.stat().st_size])
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        try:
            outcome, said = self._read(kind, path)
        finally:
            world.restore()
        return Flip(kind.name, str(path.relative_to(world.run)), bit, outcome, said)

    def _read(self, kind: Kind, path: Path) -> tuple[str, str]:
        store_folder = self._world.run / "store"
        names = {path.name, str(store_folder)} if store_folder in path.parents else {path.name}
        with warnings_of() as said:
            try:
                found = kind.read(self._world)
            except TinyONNError as error:
                return (ERROR if any(name in str(error) for name in names) else UNNAMED), str(error)
            except Exception as error:  # a traceback for the user
                return UNNAMED, repr(error)
        told = "; ".join(said)
        named = any(name in told for name in names)
        if found == self._whole[kind.name]:
            return (REMADE if named else SAME), told
        return (REMADE if named and kind.may_differ else SILENT), told


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def warnings_of() -> Iterator[list[str]]:
    """What the package warns of inside, as a list."""
    heard = _Heard()
    logging.getLogger("tinyonn").addHandler(heard)
    try:
        yield heard.said
    finally:
        logging.getLogger("tinyonn").removeHandler(heard)


def outcome(read: Callable[..., T], *given: Any) -> T | TinyONNError:
    """What is read, or the error of ours that ends it."""
    try:
        return read(*given)
    except TinyONNError as error:
        return error


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit turned."""
    found = bytearray(content)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        str(path.relative_to(folder)): blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest(tensor: Any) -> str:
    """Of a tensor's type, shape and bytes."""
    import torch

    whole = tensor.detach().cpu().contiguous()
    content = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    return f"{whole.dtype} {list(whole.shape)} {blake2b(content, digest_size=16).hexdigest()}"


def take(world: World, count: int, seed: int) -> Iterator[Flip]:
    """So many flips, the kinds in turn."""
    flips = Flips(world, seed)
    for number in range(count):
        yield flips.take(KINDS[number % len(KINDS)])


def table(flips: list[Flip]) -> str:
    """Kinds by outcomes."""
    counts = Counter((flip.kind, flip.outcome) for flip in flips)
    head = "| kind of file | flips | " + " | ".join(OUTCOMES) + " |"
    lines = [head, "|---|" + "---|" * (1 + len(OUTCOMES))]
    rows = {kind.name: [counts[kind.name, outcome] for outcome in OUTCOMES] for kind in KINDS}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines += [f"| {name} | {sum(row)} | {' | '.join(map(str, row))} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the table, and every flip that is none of what it may be."""
    count, seed = (int(text) for text in (*sys.argv[1:], "400", "0")[:2])
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for flip in take(make_world(Path(folder)), count, seed):
            found.append(flip)
            if flip.outcome in (UNNAMED, SILENT):
                print(flip, flush=True)
        print(table(found))


if __name__ == "__main__":
    main()
