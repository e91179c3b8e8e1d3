"""``tinyonn assemble``: the kept weights, expert by expert, as a folder that ``transformers`` loads.

Data flow: rows and labels of the run, weights of the base model → `select`, with the run's cells as experts → one task
per shard, each of which cuts, compresses and writes a layer's matrices (`shards`) → index, tokenizer,
card, code and configuration (`TinyONNForCausalLM.save_shell`). The configuration comes last: without it the folder is
not a model. Shards of the same assembly that are there already are kept, so a killed call goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.config import ExpertsConfig, ModelConfig
from tinyonn.dense.copies import check_files, copy_file, tokenizer_files
from tinyonn.dense.load import load_shape, load_tokenizer
from tinyonn.dense.parameters import Parameter
from tinyonn.dense.settings import base_settings
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.experts.card import write_card
from tinyonn.experts.ending import with_turn_ends
from tinyonn.experts.folder import (
    CONFIG,
    INDEX,
    MARKER,
    model_faults,
    read_settings,
    seal_model,
    shard_fault,
)
from tinyonn.experts.report import AssembleReport, totals
from tinyonn.experts.shards import (
    Layer,
    Shard,
    Sources,
    matrix_bytes,
    plan_shards,
    shard_bytes,
    task_bytes,
    tensor_bytes,
    write_shard,
)
from tinyonn.files import read_derived, write_json
from tinyonn.places import local_folder
from tinyonn.plan.demands import codec_bytes
from tinyonn.record.identity import check_base
from tinyonn.run import Run, open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource, digest, tensors_outside
from tinyonn.select.cuts import cut_tensors
from tinyonn.select.select import groups_bytes, select, select_needs, worth_histograms
from tinyonn.select.selection import (
    Selection,
    searched_shares,
    select_options,
)
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import MiB
from tinyonn.store.lock import RunLock, only_writer
from tinyonn.workers.tasks import THREADS, Call, EngineOptions, Watch, computing

LOG = logging.getLogger(__name__)
OWN_BYTES = 900 * MiB  # of the process: Python with the store, Dask, Torch, Transformers and Numba's kernels
FORMAT = 1  # of the assembled folder
# Of a task: microseconds of one core for each of its weights, as measured on the shipped model.
EFFORT = {
    worth_histograms: 0.4,
    cut_tensors: 0.15,
    write_shard: 0.1,
}
GATE_RULE = (
    "without a router the experts_top_k experts through which most of the recorded output energy went (expert_prior: "
    "mean over layers of an expert's share of the sum of squared |W| rms x, all slices) are on with gate 1, all if null"
)


def assemble_run(
    location: str,
    model: ModelConfig,
    config: ExpertsConfig,
    options: EngineOptions = THREADS,
    folder: Path | None = None,
) -> AssembleReport:
    """Assemble a clustered run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    model : ModelConfig
        The base model, which must be the recorded one.
    config : ExpertsConfig
    options : EngineOptions
    folder : Path, optional
        Of the assembled model; by default ``experts`` in the run's folder.

    Raises
    ------
    InputError
        The run is not clustered, or its labels are of other rows; the base model is not the recorded one; the budget is
        out of range.
    CapacityError
        The memory limit is below what one task needs, or the disk is full.
    StoreBusyError
        Another process changes the run, or reads what this would replace (train, evaluate, export).
    """
    target = local_folder(location) / "experts" if folder is None else folder
    run = open_run(location)
    with RunLock(local_folder(location), what="assemble"):
        return _Assembly(run, location, target, model, config, options).carry_out()


class _Assembly:
    """One assembly, from the selection to the folder."""

    def __init__(
        self,
        run: Run,
        location: str,
        folder: Path,
        model: ModelConfig,
        config: ExpertsConfig,
        options: EngineOptions,
    ) -> None:
        self.run, self.location, self.folder = run, location, folder
        self.model, self.config, self.options = model, config, options
        self.planned = 0
        self.base = BaseWeights(model)
        check_files(self.base.folder)
        read = self.base.recorded_rows, self.base.recorded_across
        self.fingerprint = check_base(run.store, location, model)
        self.shape = load_shape(model)
        self.source = RunSource(run, *read)
        score = name_of(self.source.scored_by)
        self.choice = select_options(config, score, searched_shares(run, location, config.budget))
        made_of = [
            FORMAT,
            self.choice.tree(),
            self.source.identity,
            self.fingerprint,
            model.quantization,
            model.dtype,
        ]
        self.id = digest(made_of)

    def carry_out(self) -> AssembleReport:
        """Select, write the shards, then all else."""
        stored = self._stored()
        if stored is not None:
            return AssembleReport(
                **stored | {"location": self.location, "folder": str(self.folder), "fresh": False}
            )
        self._take_folder()
        inside = tensors_outside(self.run.parameters)
        weights = sum(parameter.size for parameter in inside)
        with only_writer(self.folder), Bar("assembling", weights * sum(EFFORT.values())) as self.bar:
            for name in (CONFIG, INDEX):
                (self.folder / name).unlink(missing_ok=True)
            return self._make()

    def _make(self) -> AssembleReport:
        started = time.monotonic()
        selection = self._selection()
        selected = time.monotonic()
        sources = Sources(self.id, self.source, self.base, selection, self._quantized())
        shards = plan_shards(self.folder, self.run.parameters, list(selection.tensors), self._buffers())
        self._drop_others(shards)
        self._drop_damaged(shards)
        layers, workers = self._write(shards, sources)
        report = self._report(
            selection, shards, sources, workers, selected - started, time.monotonic() - selected
        )
        self._finish(selection, shards, layers, report)
        return report

    def _take_folder(self) -> None:
        """Make the folder, or refuse one that holds anything but an assembled model: its weights would be replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / MARKER
        if not marker.exists() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} is not empty and was not written by `tinyonn assemble`; give a new folder as --output"
            )
        marker.touch()

    def _stored(self) -> dict[str, Any] | None:
        """The report of the same assembly, if it is complete."""
        if not (self.folder / CONFIG).is_file():
            return None
        try:
            tree = read_settings(self.folder, "it is made again").get("assembly")
        except InputError as error:
            LOG.warning("%s", error)
            return None
        if not isinstance(tree, dict) or tree.get("id") != self.id:
            return None
        faults = list(model_faults(self.folder))
        for fault in faults:
            LOG.warning("%s; it is made again", fault)
        return None if faults else dict(tree["report"])

    def _selection(self) -> Selection:
        """Made, or taken from a call that was killed."""
        path = self.folder / MARKER
        tree = (read_derived(path) if path.stat().st_size else None) or {}
        if tree.get("assembly") == self.id:
            return Selection.from_tree(tree)
        with self._computing(select_needs(self.source), "selecting") as compute:
            selection = select(self.source, self.choice, compute)
        write_json(path, {"assembly": self.id, **selection.tree()})
        return selection

    def _computing(self, tasks: Sequence[int], what: str) -> Any:
        own = OWN_BYTES + codec_bytes(parameter.shape for parameter in self.run.parameters)
        fit = self.options.fit(tasks, what, own)
        self.workers, self.planned = fit.workers, max(self.planned, fit.bytes)
        return computing(self.options, self.workers, Watch(self.bar, _call_effort))

    def _quantized(self) -> frozenset[str]:
        """Weights that the dense model holds in NF4."""
        if self.model.quantization != "nf4":
            return frozenset()
        from bitsandbytes.nn import Linear4bit

        return frozenset(
            f"{name}.weight" for name, m in self.shape.named_modules() if isinstance(m, Linear4bit)
        )

    def _buffers(self) -> list[str]:
        """Persistent buffers of the base that its checkpoint has."""
        names = {name for name, _ in self.shape.named_buffers()} & set(self.shape.state_dict())
        return sorted(name for name in names if self.base.has(name))

    def _drop_others(self, shards: Sequence[Shard]) -> None:
        """Remove weights that do not belong to this folder any more."""
        ours = {shard.path.name for shard in shards}
        for path in (*self.folder.glob("model*.safetensors"), *self.folder.glob("*.part")):
            if path.name not in ours and path.is_file():
                path.unlink()

    def _drop_damaged(self, shards: Sequence[Shard]) -> None:
        """Remove shards of an earlier call that are not what was written; the others are kept."""
        for path in (shard.path for shard in shards if shard.path.is_file()):
            if fault := shard_fault(path):
                LOG.warning("%s; it is made again", fault)
                path.unlink()

    def _write(self, shards: Sequence[Shard], sources: Sources) -> tuple[list[Layer], int]:
        sizes = {parameter.name: parameter.size for parameter in self.run.parameters}
        needs = [
            task_bytes(shard, sources, sizes) + max(map(groups_bytes, shard.cut), default=0)
            for shard in shards
        ]
        # The largest first, so that no worker is left with one at the end.
        order = sorted(shards, key=lambda shard: -task_bytes(shard, sources, sizes))
        with self._computing(needs, "assembling") as compute:
            done: dict[Path, list[Layer]] = dict(
                zip(
                    [shard.path for shard in order],
                    compute([(write_shard, (shard, sources)) for shard in order]),
                    strict=True,
                )
            )
        return [layer for shard in shards for layer in done[shard.path]], self.workers

    def _report(
        self,
        selection: Selection,
        shards: Sequence[Shard],
        sources: Sources,
        workers: int,
        select_seconds: float,
        write_seconds: float,
    ) -> AssembleReport:
        found = totals(selection, self.run.parameters)
        return AssembleReport(
            self.location,
            str(self.folder),
            self.id,
            selection.budget,
            found.linear.weights,
            found.trunk,
            list(found.experts),
            {kind: (kept.kept, kept.weights) for kind, kept in found.kinds.items()},
            list(found.empty),
            sum(matrix_bytes(shard) for shard in shards),
            sum(shard_bytes(shard, sources) for shard in shards),
            len(shards),
            workers,
            select_seconds,
            write_seconds,
            True,
            self.planned,
        )

    def _finish(
        self, selection: Selection, shards: Sequence[Shard], layers: Sequence[Layer], report: AssembleReport
    ) -> None:
        """Index, tokenizer, card, code; and last the configuration."""
        sizes = {shard.path.name: tensor_bytes(shard) for shard in shards}
        index = {
            "metadata": {"total_size": sum(sum(its.values()) for its in sizes.values()), "assembly": self.id},
            "weight_map": {name: file for file, its in sizes.items() for name in its},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        for path in tokenizer_files(self.base.folder):
            copy_file(path, self.folder)
        shell = self._shell(selection, layers, report)
        write_card(self.folder, shell.config.to_dict(), self.base.folder)
        side = self.folder / "config.part"
        shutil.rmtree(side, ignore_errors=True)
        shell.save_shell(side)
        for path in sorted(side.iterdir()):
            if path.name != CONFIG:
                path.replace(self.folder / path.name)
        seal_model(self.folder)
        (side / CONFIG).replace(self.folder / CONFIG)
        side.rmdir()

    def _shell(self, selection: Selection, layers: Sequence[Layer], report: AssembleReport) -> Any:
        """The model without its weights."""
        import torch
        from transformers import GenerationConfig

        from tinyonn.model.configuration_tinyonn import TinyONNConfig
        from tinyonn.model.modeling_tinyonn import TinyONNForCausalLM

        prior = np.mean([layer.worth for layer in layers], axis=0)
        config = TinyONNConfig(
            base_config=base_settings(self.base.folder),
            experts=selection.experts,
            sparse_layers={
                layer.module: {"out": layer.out, "in": layer.inputs, "entries": sum(layer.sizes)}
                for layer in layers
            },
            expert_sizes=selection.group_sizes,
            expert_prior=[float(value) for value in prior[:-1]],
            experts_top_k=self.config.top_k,
            reroute_every=self.config.reroute_every,
            gate_rule=GATE_RULE,
            assembly=self._provenance(selection, report),
            dtype=self.model.dtype,
        )
        with torch.device("meta"):
            model = TinyONNForCausalLM(config)
        model = model.to(self.base.dtype)
        if (self.base.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.base.folder)
        with contextlib.suppress(InputError):  # no tokenizer
            settings, tokenizer = model.generation_config, load_tokenizer(self.model)
            settings.eos_token_id = with_turn_ends(settings.eos_token_id, tokenizer)
        return model

    def _provenance(self, selection: Selection, report: AssembleReport) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "id": self.id,
            "format": FORMAT,
            "tinyonn": version("tiny-onn"),
            "base": {
                "path": self.model.path,
                "quantization": self.model.quantization,
                "fingerprint": self.fingerprint,
            },
            "samples": self.run.samples,
            "slices": {name: self.run.manifest.slices[name] for name in self.run.slices},
            "selection": selection.options.tree(),
            "needs": needs_by_slice(self.source.clustered),
            "report": report.figures(),
        }


def needs_by_slice(clustered: Mapping[str, Any]) -> dict[str, list[float]]:
    """By slice what it needs of every expert, from the labels' attributes.

    The budget under which the slice would keep the expert's weights, as a multiple of the one that was clustered for.
    """
    return {name: [cell["needs"][name] for cell in clustered["cells"]] for name in clustered["slices"]}


def _call_effort(call: Call) -> float:
    """Of one task."""
    function, arguments = call
    parts = [part.cut if isinstance(part, Shard) else part for part in arguments]
    items = [item for part in parts if isinstance(part, tuple) for item in part]
    parameters = [item[0] if isinstance(item, tuple) else item for item in items]
    return EFFORT[function] * sum(item.size for item in parameters if isinstance(item, Parameter))
