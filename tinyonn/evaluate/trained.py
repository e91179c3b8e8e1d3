"""``tinyonn evaluate --trained``: the trained model beside the dense one, with fewer and fewer experts on.

Experts are chosen from each sample's prompt; losses count the labelled tokens after it, for the dense model too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyonn.config import Config
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.errors import InputError
from tinyonn.evaluate.demand import state, trained_needs
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Experts, Losses, evaluate_routed, gates_of
from tinyonn.evaluate.stage import EvaluateOptions, held_out_corpus, samples_of
from tinyonn.experts.folder import open_assembled
from tinyonn.files import read_derived, write_json
from tinyonn.model.configuration_tinyonn import RouterOptions
from tinyonn.places import local_folder
from tinyonn.plan.facts import describe_model
from tinyonn.plan.training import StudentFacts, sparse_bytes
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds
from tinyonn.store.lock import evaluating
from tinyonn.train.data import Batch, held_out_batches
from tinyonn.train.spec import experts_of, read_student

CARD = "trained.json"  # in the run's evaluate/: figures for the trained model's card
DENSE, ASSEMBLED, TRAINED = "dense, as recorded", "assembled, untrained", "trained"


@dataclass(frozen=True)
class TrainedLine:
    """One model with so many experts on.

    Attributes
    ----------
    model : str
    experts : int or None
        On for a prompt, mean over samples; None for the dense model.
    weights : float
        Linear weights that work on a token, mean over samples.
    losses : Losses
    """

    model: str
    experts: float | None
    weights: float
    losses: Losses


@dataclass(frozen=True)
class TrainedReport:
    """The dense model, then the sparse ones.

    Attributes
    ----------
    lines : tuple of TrainedLine
        The first is the dense model.
    linear : int
        Linear weights of the dense model.
    samples : int
    evaluate_seconds : float
    """

    location: str
    lines: tuple[TrainedLine, ...]
    linear: int
    samples: int
    evaluate_seconds: float
    planned_rss_bytes: int = 0
    split: str = "test"

    def figures(self) -> dict[str, Any]:
        """JSON values; ratios are those of perplexities to the dense model's."""
        dense = self.lines[0].losses.perplexity
        lines = [
            {
                "model": line.model,
                "experts": line.experts,
                "active_weights": line.weights,
                "active_share": line.weights / self.linear,
                "loss": line.losses.mean,
                "perplexity": line.losses.perplexity,
                "ratio": line.losses.perplexity / dense,
                "by_slice": line.losses.by_slice,
            }
            for line in self.lines
        ]
        return {
            "location": self.location,
            "lines": lines,
            "samples": self.samples,
            "split": self.split,
            "evaluate_seconds": self.evaluate_seconds,
            "planned_rss_bytes": self.planned_rss_bytes,
        }

    def table(self) -> Sheet:
        """For people."""
        dense = self.lines[0].losses.perplexity
        notes = [
            "active: linear weights that work on a token, as a share of the dense model's",
            f"loss: nats per held-out token after the prompt, mean over {len(self.lines[0].losses.by_slice)} slices",
            "x dense: perplexity over the dense model's",
            f"{self.samples:,} samples of the split {self.split} in {format_seconds(self.evaluate_seconds)}",
        ]
        sheet = Sheet(f"trained model of {whole(self.location)}", notes).text("model")
        sheet.number("experts on", "active", "loss", "perplexity", "x dense")
        for line in self.lines:
            perplexity = line.losses.perplexity
            sheet.add(
                line.model,
                "" if line.experts is None else f"{line.experts:.0f}",
                f"{line.weights / self.linear:.1%}",
                f"{line.losses.mean:.4f}",
                f"{perplexity:,.2f}",
                f"{perplexity / dense:.3f}",
            )
        return sheet


def evaluate_trained(
    location: str,
    config: Config,
    options: EvaluateOptions,
    model: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> TrainedReport:
    """Measure a run's trained model, and the assembled one that it was made from.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
    options : EvaluateOptions
        Held-out data and how many samples.
    model : Path, optional
        The trained model's folder; by default ``model`` in the run's folder.
    tell : callable
        Gets a line of text as each model is measured.

    Raises
    ------
    InputError
        Nothing is trained; no held-out data.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process changes or evaluates the run.
    """
    folder = model or local_folder(location) / "model"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no trained model; run `tinyonn train` first")
    with evaluating(location):
        return _measured(location, config, options, folder, tell)


def _measured(
    location: str, config: Config, options: EvaluateOptions, folder: Path, tell: Callable[[str], None]
) -> TrainedReport:
    started = time.monotonic()
    run = local_folder(location)
    corpus = held_out_corpus(config, options, run)
    parameters, facts = describe_model(config.model)
    student = read_student(folder)
    sparse = sparse_bytes(StudentFacts.of(student, parameters), facts.dtype_bytes)
    dense_needs, sparse_needs = trained_needs(parameters, facts, sparse, corpus.longest)
    on_cpu = config.model.model_copy(update={"device": "cpu"})  # where sparse models are loaded
    planned = max(
        state("evaluating the dense model", config.model, dense_needs),
        state("evaluating the trained model", on_cpu, sparse_needs),
    )
    samples = samples_of(corpus, options.split)
    batches = held_out_batches(samples, prompt_tokens=PROMPT_TOKENS)
    lines: list[TrainedLine] = []

    def measure(name: str, one: Any, k: Experts, all_weights: float) -> None:
        experts, weights = active_weights(one, batches, k, all_weights)
        lines.append(TrainedLine(name, experts, weights, evaluate_routed(one, batches, k)))
        tell(f"{name}, {weights / all_weights:.1%} of the weights active: {lines[-1].losses.mean:.4f} nats")

    numbers = _numbers(student)
    assembled = (run / "experts" / "config.json").is_file()
    with Bar("evaluating", 1 + assembled + len(numbers), "lines") as bar:
        dense = DenseWeights(config.model)
        linear = sum(parameter.size for parameter in dense.parameters)
        measure(DENSE, dense.model, None, linear)
        bar.add()
        del dense
        gc.collect()  # a model is a ring of references: one is there at a time
        if assembled:
            measure(ASSEMBLED, open_assembled(run / "experts"), "all", linear)
            bar.add()
            gc.collect()
        trained = open_assembled(folder)
        for k in numbers:
            measure(TRAINED, trained, k, linear)
            bar.add()
    report = TrainedReport(
        location, tuple(lines), linear, len(samples), time.monotonic() - started, planned, options.split
    )
    _remember(run / "evaluate" / CARD, str(trained.config.assembly.get("id")), report.figures()["lines"])
    return report


def _remember(path: Path, assembly: str, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"assembly": assembly, "lines": lines})


def trained_card_figures(folder: Path, assembly: str) -> dict[str, dict[str, float]] | None:
    """Losses for a trained model's card, by line and slice; None if this model was not evaluated last.

    Parameters
    ----------
    folder : Path
        Of the run.
    assembly : str
        Id of the trained model.
    """
    tree = read_derived(folder / "evaluate" / CARD)
    if tree is None:
        return None
    try:
        if tree["assembly"] != assembly:
            return None
        figures = {}
        for line in tree["lines"]:
            name = str(line["model"])
            if line["model"] == TRAINED:
                name = f"this model, {line['experts']:.0f} experts on ({line['active_share']:.1%} active)"
            figures[name] = {**line["by_slice"], "mean": line["loss"]}
        return figures
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Continuation:
    """What a trained model writes after a prompt, and who worked on it.

    Attributes
    ----------
    text : str
    experts : tuple of int
        Those that the router put on, beside the core.
    of : int
        Experts there are.
    slice : str
        The kind of text that needs these experts most, beside what it needs of all.
    """

    text: str
    experts: tuple[int, ...]
    of: int
    slice: str


def continued(folder: Path, prompt: str, tokens: int = 24) -> Continuation:
    """What a trained model writes after a prompt, greedily, its router choosing from the prompt.

    Parameters
    ----------
    folder : Path
        Of the model.
    prompt : str
    tokens : int
        New ones, at most.
    """
    from transformers import AutoTokenizer

    model, tokenizer = open_assembled(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True)
    ids_BT = inputs["input_ids"]
    written_BT = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    on_E = model.router(ids_BT)[0].nonzero().ravel().tolist()
    text = str(tokenizer.decode(written_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))
    needs = model.config.assembly.get("needs") or {}
    return Continuation(text, tuple(on_E), model.config.experts, most_in_need(needs, on_E))


def most_in_need(needs: Mapping[str, Sequence[float]], experts: Sequence[int]) -> str:
    """The slice that needs these experts most, beside what it needs of all; "" where no needs are known.

    A need is the budget under which a slice keeps an expert's weights: the smaller, the more.
    """
    ratios = {
        name: torch.tensor(need_E)[experts].log().mean() - torch.tensor(need_E).log().mean()
        for name, need_E in needs.items()
    }
    return min(ratios, key=lambda name: float(ratios[name]), default="")


def _numbers(student: Mapping[str, Any]) -> list[Experts]:
    """All experts, half of them, a quarter, a tenth; and as the model is set."""
    experts = experts_of(student)
    found: list[Experts] = ["all"]
    if student.get("router") is None:
        return found
    top_k = RouterOptions.read(student["router"]).top_k
    fewer = [*(max(1, experts // part) for part in (2, 4, 10)), top_k]
    return found + sorted({k for k in fewer if k is not None and k < experts}, reverse=True)


@torch.no_grad()
def active_weights(
    model: Any, batches: Sequence[Batch], k: Experts, all_weights: float
) -> tuple[float | None, float]:
    """Experts on (None of a dense model) and linear weights that work, means over samples."""
    if not hasattr(model, "sparse_layers"):
        return None, all_weights
    sizes_G = torch.tensor(model.config.expert_sizes, dtype=torch.float64)
    experts, weights, samples = 0.0, 0.0, 0
    for batch in batches:
        gates = gates_of(model, batch.to(model.get_output_embeddings().weight.device), k)
        if gates is None:
            gates = torch.zeros(len(sizes_G) - 1)
            gates[model.config.chosen_experts] = 1
        on_BE = (gates.cpu() != 0).double().expand(len(batch), -1)
        experts += float(on_BE.sum())
        weights += float((on_BE @ sizes_G[:-1]).sum() + len(batch) * sizes_G[-1])
        samples += len(batch)
    return experts / samples, weights / samples
