"""Is routing worth it? The routed model beside what else the same number of active weights could be.

    python benchmarks/routing.py storage/routing --steps 400
    python benchmarks/routing.py storage/routing --small --json
    python benchmarks/routing.py storage/unseen --leave-out romance c --arms routed label static own

With 10, 25 and 50 of 100 experts on, as many linear weights work on a token as the choices sum up to, mean over the
samples; every baseline has as many, those with masks (but ``own``) in every tensor:

routed       cells as experts, chosen from the prompt; trained with 10, 25, 50 and all experts on; measured also with as
             many on as half of what is kept allows, and a tenth of the linear weights
label        the routed model with the same experts for all prompts of a slice, which it is told: those that the profile
             says do most there
static       the same weights for all prompts: masks within masks by the selection's score; trained in the same way
own          the same with an allocation of its own across tensors: one cut through all of them
magnitude    the same, by |W|
random       the routed model's weights dealt out to 100 experts of one size at random; with a router, trained
wanda        |W| times the norm of its input on the prompt, cut anew for each prompt (mu-MoE, Koike-Akino et al. 2025);
             no training
small        a dense model of as many linear weights, from scratch, distilled by the same script from the same tokens
dense        as recorded; and trained further on the same tokens

All trainings of a seed see the same samples in the same order and take the same steps, and have the same teacher: the
dense model as recorded, or with --teacher-steps after it has learned so long from the text itself. Losses are those
of held-out tokens after the prompt. Slices that are left out are neither recorded nor trained on; what the models lose
on them stands in a table of its own. What is done already is kept in the folder, so a killed call goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import record
from benchmarks.routing_models import (
    active_shares,
    all_kept,
    bands,
    base_folder,
    groups_of_model,
    in_order,
    label_gates,
    random_groups,
    small_model,
    without_slices,
    write_experts,
)
from benchmarks.routing_report import ALL, Line, report
from benchmarks.routing_wanda import evaluate_prompt_masks
from tinyonn.cli import CONFIGS
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, load_config
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.errors import InputError
from tinyonn.evaluate.allocate import AllocateOptions, allocate_run
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Experts, Losses, evaluate_routed
from tinyonn.evaluate.stage import EvaluateOptions, held_out_corpus, samples_of
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import export_model
from tinyonn.experts.folder import open_assembled
from tinyonn.profile.profile import open_profile
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.reference import corpus_path
from tinyonn.run import open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource, digest
from tinyonn.score.stage import score_run
from tinyonn.select.selection import select_options
from tinyonn.store.repository import Store
from tinyonn.train.data import held_out_batches
from tinyonn.train.options import LossWeights, TrainOptions
from tinyonn.train.plan import train_stage_options
from tinyonn.train.stage import TrainStageOptions, train_run
from tinyonn.workers.tasks import EngineOptions

ARMS = ("routed", "label", "static", "own", "magnitude", "random", "wanda", "small", "dense")
SHARED = ("store", "corpus.arrow", "train.arrow", "heldout.arrow", "fingerprint.json")


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/routing"))
    parser.add_argument("--config", type=Path, default=CONFIGS / "demo-full.yaml")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher-steps", type=int, default=0, help="of the dense model before it teaches")
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 25, 50], help="experts on, and all of them")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="SLICE", help="kinds of the shipped corpus to leave out"
    )
    parser.add_argument("--search", action="store_true", help="search the allocation across tensors first")
    parser.add_argument("--small", action="store_true", help="a few samples and steps: does it work?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    config = load_config(options.config)
    if options.small:
        options.seeds, options.steps = options.seeds[:1], 3
        config = made_small(config)
    if options.leave_out:
        config = left_out(options.run, config, options.leave_out)
    prepare(options.run, config, options)
    comparison = Comparison(options.run, config, options)
    lines = {seed: comparison.lines(seed) for seed in options.seeds}
    report(lines, options)


def made_small(config: Config) -> Config:
    """The configuration with so few samples that every arm takes seconds."""
    data = config.data.model_copy(update={"samples": 14})
    profile = config.profile.model_copy(update={"samples": 14})
    few = {"data": data.model_copy(update={"samples": 56}), "batch": 4, "micro_batch": 4, "warm_start": 8}
    train = config.train.model_copy(update=few)
    return config.model_copy(update={"data": data, "profile": profile, "train": train})


def left_out(place: Path, config: Config, slices: Sequence[str]) -> Config:
    """The configuration with the shipped corpus but for these slices; held out are all of them."""
    path = without_slices(corpus_path(), slices, place.with_name(f"{place.name}-data") / "train.parquet")
    given = {"path": str(path.absolute())}
    train = config.train
    if train.data is not None:
        train = train.model_copy(update={"data": train.data.model_copy(update=given)})
    evaluate = config.evaluate
    if evaluate.data is None:
        held_out = config.data.model_copy(update={"split": "heldout"})
        evaluate = evaluate.model_copy(update={"data": held_out})
    data = config.data.model_copy(update=given)
    return config.model_copy(update={"data": data, "train": train, "evaluate": evaluate})


def prepare(place: Path, config: Config, options: Any) -> None:
    """Record, score, cluster, assemble and profile, as far as it has not been done."""
    engine = EngineOptions("threads", options.threads)
    if not Store.exists(place / "store"):
        record(place, config, options.threads)
    score_run(str(place), config, engine)
    if options.search and not (place / "experts").exists():
        selection = select_options(config.experts, name_of(config.score.exponents))
        budgets = (0.04, 0.1, config.experts.budget)
        allocate_run(
            str(place), config, AllocateOptions(budgets, 56, selection.score, selection=selection), tell
        )
    cluster_run(str(place), config, engine)  # by the shares that were searched
    assemble_run(str(place), config.model, config.experts, engine)
    _profile(place, config)


def _profile(place: Path, config: Config) -> None:
    samples, tokens = config.profile.samples, PROMPT_TOKENS
    profile_run(str(place), config, ProfileOptions(samples=samples, prompt_tokens=tokens, workers=1))


class Comparison:
    """All models of a run, trained and measured once."""

    def __init__(self, place: Path, config: Config, options: Any) -> None:
        self.place, self.config, self.options = place.absolute(), config, options
        held = EvaluateOptions(
            data=config.evaluate.data, samples=14 if options.small else config.evaluate.samples
        )
        corpus = held_out_corpus(config, held, self.place)
        self.batches = held_out_batches(samples_of(corpus), prompt_tokens=PROMPT_TOKENS)
        self.dense = DenseWeights(config.model)
        self.base = base_folder(config.model)
        self.linear = sum(parameter.size for parameter in self.dense.parameters)
        self.own = json.loads((self.place / "experts" / "config.json").read_text("utf-8"))["assembly"]["id"]
        if options.teacher_steps:
            self.config = self._with_teacher(options.teacher_steps)

    def lines(self, seed: int) -> list[Line]:
        """All arms of a seed; the routed model comes first, since it says how many weights are active."""
        lines = self._routed(seed)
        for arm in self.options.arms:
            if arm != "routed":
                lines += getattr(self, f"_{arm}")(seed)
        return lines

    # The arms

    def _routed(self, seed: int) -> list[Line]:
        ks: list[Experts] = [*self.options.ks, "all"]
        folder = self._trained("routed", seed, self.place, self._options(seed))

        def measure() -> list[Line]:
            model = open_assembled(folder)
            shares = {str(k): active_shares(model, self.batches, k) for k in ks}
            (folder / "shares.json").write_text(json.dumps(shares), "utf-8")
            lines = [self._line("routed", str(k), shares[str(k)], model, k) for k in ks]
            for name, limit in {"half": lines[-1].active / 2, "tenth": 0.1}.items():
                k = self._experts_within(model, limit)
                lines.append(self._line("routed", name, active_shares(model, self.batches, k), model, k))
            return lines

        return self._known(f"routed-{seed}", measure)

    def _label(self, seed: int) -> list[Line]:
        def measure() -> list[Line]:
            model = open_assembled(self._trained("routed", seed, self.place, self._options(seed)))
            profile = open_profile(self.place / "profile")
            slices = sorted({name for batch in self.batches for name in batch.slices})
            found = []
            for k in self.options.ks:
                gates = label_gates(profile, slices, k)
                shares = active_shares(model, self.batches, k, gates)
                losses = evaluate_routed(model, self.batches, slice_gates=gates)
                found.append(self._measured("label", str(k), self._active(shares), losses))
            return found

        return self._known(f"label-{seed}", measure)

    def _static(self, seed: int) -> list[Line]:
        return self._banded("static", name_of(self.config.score.exponents), seed)

    def _own(self, seed: int) -> list[Line]:
        return self._banded("own", name_of(self.config.score.exponents), seed)

    def _magnitude(self, seed: int) -> list[Line]:
        return self._banded("magnitude", "magnitude", seed)

    def _banded(self, arm: str, score: str, seed: int) -> list[Line]:
        names = [*map(str, sorted(self.options.ks)), ALL]

        def measure() -> list[Line]:
            place = self._variant(f"{arm}-{seed}")
            shares = self._shares(seed)
            if not (place / "experts" / "config.json").exists():
                run, dense = open_run(str(self.place)), self.dense
                source = RunSource(run, dense.rows, dense.transposed, labels=False)
                selection = select_options(self.config.experts, name_of(self.config.score.exponents))
                groups = bands(source, selection, score, [shares[name] for name in names], arm == "own")
                write_experts(place / "experts", dense, groups, len(names), self.base)
                in_order(place / "experts", len(names))
            counts = tuple(range(1, len(names) + 1))
            options = self._options(seed, ks=counts, warm_start=0)
            frozen = replace(options.train.optimizers, router="frozen")
            routing = replace(options.train.routing, bias_rate=0.0)
            train = replace(options.train, optimizers=frozen, routing=routing)
            folder = self._trained(arm, seed, place, replace(options, train=train, router=None))
            model = open_assembled(folder)
            return [
                self._line(arm, name, active_shares(model, self.batches, count), model, count)
                for name, count in zip(names, counts, strict=True)
            ]

        return self._known(f"{arm}-{seed}", measure)

    def _random(self, seed: int) -> list[Line]:
        def measure() -> list[Line]:
            place = self._variant(f"random-{seed}")
            routed = open_assembled(self.place / "experts")
            experts = int(routed.config.experts)
            if not (place / "experts" / "config.json").exists():
                groups = random_groups(groups_of_model(routed), experts, seed)
                write_experts(place / "experts", self.dense, groups, experts, self.base)
            _profile(place, self.config)
            sizes = np.array(routed.config.expert_sizes)
            counts = {  # experts of one size that hold as many weights
                name: round((self._active(shares) * self.linear - sizes[-1]) / sizes[:-1].mean())
                for name, shares in self._shares(seed).items()
            }
            ks = tuple(max(1, min(experts, count)) for count in counts.values())
            folder = self._trained("random", seed, place, self._options(seed, ks=ks))
            model = open_assembled(folder)
            return [
                self._line("random", name, active_shares(model, self.batches, k), model, k)
                for name, k in zip(counts, ks, strict=True)
            ]

        return self._known(f"random-{seed}", measure)

    def _wanda(self, seed: int) -> list[Line]:
        def measure() -> list[Line]:
            found = []
            for name, shares in self._shares(seed).items():
                losses = evaluate_prompt_masks(self.dense, self.batches, shares)
                found.append(self._measured("wanda", name, self._active(shares), losses))
            return found

        return self._known(f"wanda-{seed}", measure)

    def _small(self, seed: int) -> list[Line]:
        def measure() -> list[Line]:
            found = []
            for name, shares in self._shares(seed).items():
                if name == ALL:
                    continue
                place = self._variant(f"small-{name}-{seed}")
                share = small_model(place / "experts", self.base, self._active(shares), seed)
                options = self._plain(seed, replace(self._losses, hidden=0.0), trunk_lr=3e-3, norms_lr=3e-3)
                folder = self._trained(f"small-{name}", seed, place, options)
                found.append(
                    self._measured("small", name, share, evaluate_routed(_load(folder), self.batches))
                )
            return found

        return self._known(f"small-{seed}", measure)

    def _dense(self, seed: int) -> list[Line]:
        def measure() -> list[Line]:
            folder = self._dense_further("dense", seed, self.options.steps)
            return [
                self._measured("dense", name, 1.0, evaluate_routed(model, self.batches))
                for name, model in (("as it is", self.dense.model), ("trained", open_assembled(folder)))
            ]

        return self._known(f"dense-{seed}", measure)

    # What they share

    def _dense_further(self, name: str, seed: int, steps: int) -> Path:
        """The dense model, trained on the text itself: an assembled one of which all is kept."""
        place = self._variant(f"{name}-{seed}")
        if not (place / "experts" / "config.json").exists():
            write_experts(place / "experts", self.dense, all_kept(self.dense), 1, self.base)
        alone = replace(self._losses, kl=0.0, ce=1.0, hidden=0.0)
        given = self.config.train.optimizers  # gentler than what a cut model needs
        rates = {name: getattr(given, name) / 4 for name in ("experts_lr", "trunk_lr", "norms_lr")}
        options = self._plain(seed, alone, **rates)
        return self._trained(name, seed, place, replace(options, train=replace(options.train, steps=steps)))

    def _with_teacher(self, steps: int) -> Config:
        """The configuration in which the dense model teaches after so many steps."""
        folder = self._dense_further("teacher", 0, steps)
        dense, part = folder.parent / "dense", folder.parent / "dense.part"
        if not dense.exists():
            shutil.rmtree(part, ignore_errors=True)
            export_model(folder, part, "dense")
            part.rename(dense)
        teacher = self.config.model.model_copy(update={"path": str(dense), "quantization": "none"})
        train = self.config.train.model_copy(update={"teacher_model": teacher})
        return self.config.model_copy(update={"train": train})

    def _options(self, seed: int, **changes: Any) -> TrainStageOptions:
        """Of a training with a router; `changes` of ks or of `TrainOptions`."""
        options = train_stage_options(self.config)
        ks = changes.pop("ks", (*self.options.ks, 0))
        routing = replace(options.train.routing, ks=ks)
        given = {"seed": seed, "steps": self.options.steps, "routing": routing, **changes}
        return replace(options, train=replace(options.train, **given), threads=self.options.threads)

    @property
    def _losses(self) -> LossWeights:
        return train_stage_options(self.config).train.weights

    def _plain(self, seed: int, weights: LossWeights, **rates: Any) -> TrainStageOptions:
        """Of one without: a dense model."""
        options = self._options(seed, ks=(), warm_start=0, weights=weights)
        optimizers = replace(options.train.optimizers, **rates)
        return replace(options, train=replace(options.train, optimizers=optimizers), router=None)

    def _trained(self, arm: str, seed: int, place: Path, options: TrainStageOptions) -> Path:
        """The folder of a trained model."""
        own = self.place / "bench" / f"{arm}-{seed}-{self._stamp(options.train)}"
        tell(f"training {own.name}")
        train_run(str(place), self.config, replace(options, folder=own / "train", output=own / "model"))
        return own / "model"

    def _stamp(self, train: TrainOptions) -> str:
        taught: list[Any] = [self.config.profile.model_dump(), self.config.router.model_dump()]
        if (teacher := self.config.train.teacher_model) is not None:
            taught.append(self.options.teacher_steps or teacher.model_dump())
        return digest([self.own, train.deciding(), taught])[:8]

    def _variant(self, name: str) -> Path:
        """A run's folder that shares all but the assembled model."""
        place = self.place / "bench" / f"{name}-{self._stamp(self._options(0).train)}"
        place.mkdir(parents=True, exist_ok=True)
        for shared in SHARED:
            if (self.place / shared).exists() and not (place / shared).exists():
                (place / shared).symlink_to(self.place / shared)
        return place

    def _known(self, name: str, measure: Callable[[], list[Line]]) -> list[Line]:
        """What was measured before, or is now."""
        stamp = self._stamp(self._options(0).train)
        path = self.place / "bench" / f"{name}-{stamp}-{len(self.batches)}.json"
        if path.exists():
            return [Line(**line) for line in json.loads(path.read_text("utf-8"))]
        started = time.monotonic()
        lines = measure()
        path.write_text(json.dumps([vars(line) for line in lines]), "utf-8")
        figures = ", ".join(f"{line.k}: {line.loss:.4f} at {line.active:.1%}" for line in lines)
        tell(f"{name}: {figures} ({time.monotonic() - started:.0f} s)")
        return lines

    def _shares(self, seed: int) -> dict[str, dict[str, float]]:
        """Active share of every tensor by number of experts, smallest first."""
        folder = self.place / "bench" / f"routed-{seed}-{self._stamp(self._options(seed).train)}"
        tree: dict[str, dict[str, float]] = json.loads((folder / "model" / "shares.json").read_text("utf-8"))
        return tree

    def _experts_within(self, model: Any, limit: float) -> int:
        """Most experts whose weights and the core's are no more than a share of the linear ones."""
        counts = range(1, int(model.config.experts) + 1)
        return max(
            1, bisect_right(counts, limit, key=lambda k: self._active(active_shares(model, self.batches, k)))
        )

    def _active(self, shares: dict[str, float]) -> float:
        sizes = {parameter.name: parameter.size for parameter in self.dense.parameters}
        return sum(share * sizes[name] for name, share in shares.items()) / self.linear

    def _line(self, arm: str, k: str, shares: dict[str, float], model: Any, experts: Experts) -> Line:
        return self._measured(arm, k, self._active(shares), evaluate_routed(model, self.batches, experts))

    def _measured(self, arm: str, k: str, active: float, losses: Losses) -> Line:
        def mean(unseen: bool) -> float | None:
            own = [x for name, x in losses.by_slice.items() if (name in self.options.leave_out) == unseen]
            return float(np.mean(own)) if own else None

        seen = mean(unseen=False)
        if seen is None:
            raise InputError("nothing is held out of the kinds that were recorded; leave fewer out")
        return Line(arm, k, active, seen, mean(unseen=True))


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()


def tell(line: str) -> None:
    """To people, beside the tables."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
