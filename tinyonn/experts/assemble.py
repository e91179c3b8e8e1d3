"""``tinyonn assemble``: the kept weights, expert by expert, as a folder that ``transformers`` loads.

Data flow: rows, affinity and labels of the run, weights of the base model → `select` → one task per shard, each of
which cuts, compresses and writes a layer's matrices (`shards`) → index, tokenizer, card, code and configuration
(`TinyONNForCausalLM.save_shell`). The configuration comes last: without it the folder is not a model. Shards of the
same assembly that are there already are kept, so a killed call goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.base.load import load_shape
from tinyonn.base.source import fingerprint_model, read_model_config
from tinyonn.base.weights import BaseWeights
from tinyonn.config import ExpertsConfig, ModelConfig
from tinyonn.engine import THREADS, Compute, EngineOptions, computing
from tinyonn.errors import InputError
from tinyonn.experts.card import write_card
from tinyonn.experts.options import Selection, SelectOptions
from tinyonn.experts.select import select, select_bytes
from tinyonn.experts.shards import (
    Layer,
    Shard,
    Sources,
    contents,
    plan_shards,
    shard_bytes,
    task_bytes,
    write_shard,
)
from tinyonn.experts.source import RunSource, digest
from tinyonn.places import local_folder
from tinyonn.run import Run, open_run
from tinyonn.sizes import format_seconds, format_size
from tinyonn.store.lock import RunLock

if TYPE_CHECKING:
    from rich.table import Table

    from tinyonn.experts.modeling_tinyonn import TinyONNForCausalLM

LOG = logging.getLogger(__name__)
FORMAT = 1  # of the assembled folder
MARKER = "selection.json"  # says that a folder is ours
GATE_RULE = (
    "no router yet: the top_k experts through which most of the recorded output energy went (expert_prior: mean over "
    "layers of an expert's share of the sum of squared |W| rms x, all slices) are on with gate 1; all if top_k is null"
)
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
)


@dataclass(frozen=True)
class AssembleReport:
    """What a call of `assemble_run` did.

    Attributes
    ----------
    budget, linear, trunk : int
        Weights kept, weights that could be, and weights that stay whole.
    sizes : list of int
        Of the experts, the core last.
    kinds : dict of str to (int, int)
        Kept and all weights by kind of module.
    empty : list of int
        Experts without a weight.
    bytes, planned_bytes : int
        Of the matrices on disk, and what the format's arithmetic gives.
    """

    location: str
    folder: str
    assembly: str
    budget: int
    linear: int
    trunk: int
    sizes: list[int]
    kinds: dict[str, tuple[int, int]]
    empty: list[int]
    bytes: int
    planned_bytes: int
    files: int
    workers: int
    select_seconds: float
    write_seconds: float
    fresh: bool

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        from rich.table import Table

        core, experts = self.sizes[-1], np.array(self.sizes[:-1])
        every, kept = self.linear + self.trunk, self.budget + self.trunk
        sizes = f"{experts.min():,} to {experts.max():,}, median {int(np.median(experts)):,}"
        lines = [
            f"{self.budget:,} of {self.linear:,} linear weights kept ({self.budget / self.linear:.1%})",
            f"with the trunk {kept:,} of {every:,} ({kept / every:.1%})",
            f"core {core:,}; {experts.size} experts of {sizes}",
            f"matrices {format_size(self.bytes)} on disk, {format_size(self.planned_bytes)} by arithmetic",
        ]
        if self.empty:
            lines.append(f"warning: experts {', '.join(map(str, self.empty))} are empty")
        if not self.fresh:
            lines.append("nothing to do: assembled already")
        else:
            lines.append(
                f"selected in {format_seconds(self.select_seconds)}, written in {format_seconds(self.write_seconds)}"
            )
        table = Table(title=f"assembled {self.folder}", title_justify="left", caption_justify="left")
        table.caption = "\n".join(lines)
        for heading in ("kind", "weights", "kept", "share"):
            table.add_column(heading, justify="left" if heading == "kind" else "right")
        for kind, (kept, every) in self.kinds.items():
            table.add_row(kind, f"{every:,}", f"{kept:,}", f"{kept / every:.1%}")
        return table


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
        Another process works on the run.
    """
    target = local_folder(location) / "experts" if folder is None else folder
    run = open_run(location)
    with RunLock(local_folder(location)):
        return _Assembly(run, location, target, model, config, options).carry_out()


def check_base(run: Run, location: str, model: ModelConfig) -> dict[str, Any]:
    """Refuse a base model that is not the recorded one; its fingerprint.

    Raises
    ------
    InputError
        Names the first difference and both values.
    """
    manifest = run.manifest
    for option in ("quantization", "dtype"):
        recorded, given = manifest.config.get(option), getattr(model, option)
        if recorded not in (None, given):
            raise InputError(
                f"the run was recorded with model.{option}: {recorded}, not {given}; give the same"
            )
    found = fingerprint_model(model, local_folder(location) / "fingerprint.json")
    for name in sorted(manifest.model.keys() | found.keys()) if manifest.model else ():
        before, now = manifest.model.get(name), found.get(name)
        if before != now:
            raise InputError(
                f"model.path = {model.path!r} is not the model that was recorded: {name} has the fingerprint "
                f"{_short(now)} and had {_short(before)}; give the recorded model, or record this one into another run"
            )
    return found


def _short(text: str | None) -> str:
    return "none" if text is None else text[:12]


def select_options(config: ExpertsConfig, shares: Mapping[str, float] | None = None) -> SelectOptions:
    """What the configuration asks of selection.

    Parameters
    ----------
    config : ExpertsConfig
    shares : mapping of str to float, optional
        By tensor, as they were searched: for ``allocation: auto``, which is ``global`` without them.
    """
    auto = config.allocation == "auto"
    given = dict(shares or {}) if auto else {}
    return SelectOptions(
        budget=config.budget,
        score=config.score,
        within=config.within,
        balance=config.balance,
        core=config.core,
        allocation="given" if given else "global" if auto else config.allocation,
        shares=given,
        seed=config.seed,
    )


def searched_shares(run: Run, location: str, budget: float) -> Mapping[str, float]:
    """Shares by tensor that `tinyonn evaluate --allocate` found for a budget; empty if there are none."""
    from tinyonn.evaluate.allocate import stored_shares

    return stored_shares(local_folder(location), run.store.reader().stage("rows")).get(budget, {})


def tree_of(options: SelectOptions) -> dict[str, Any]:
    """JSON values."""
    return json.loads(json.dumps(asdict(options) | {"shares": dict(options.shares)}))  # type: ignore[no-any-return]


def source_of(run: Run, base: BaseWeights) -> RunSource:
    """What selection reads: the run's rows, and the base model's weights.

    Raises
    ------
    InputError
        The run is not scored or not clustered, or its labels are of other rows.
    """
    return RunSource(run, base.recorded_rows, base.recorded_across)


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
        self.base = BaseWeights(model)
        self.source = source_of(run, self.base)
        self.fingerprint = check_base(run, location, model)
        self.shape = load_shape(model)
        self.choice = select_options(config, searched_shares(run, location, config.budget))
        made_of = [
            FORMAT,
            tree_of(self.choice),
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
        for name in ("config.json", "model.safetensors.index.json"):
            (self.folder / name).unlink(missing_ok=True)
        started = time.monotonic()
        selection = self._selection()
        selected = time.monotonic()
        sources = Sources(self.id, self.source, self.base, selection, self._quantized())
        shards = plan_shards(self.folder, self.run.parameters, list(selection.tensors), self._buffers())
        self._drop_others(shards)
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
        try:
            tree = json.loads((self.folder / "config.json").read_text("utf-8"))["assembly"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if tree.get("id") != self.id:
            return None
        files = json.loads((self.folder / "model.safetensors.index.json").read_text("utf-8"))[
            "weight_map"
        ].values()
        return dict(tree["report"]) if all((self.folder / name).is_file() for name in files) else None

    def _selection(self) -> Selection:
        """Made, or taken from a call that was killed."""
        path = self.folder / MARKER
        text = path.read_text("utf-8")
        tree = json.loads(text) if text else {}
        if tree.get("assembly") == self.id:
            return Selection.from_tree(tree)
        with self._computing(select_bytes(self.source, self.choice), "selecting") as compute:
            selection = select(self.source, self.choice, compute)
        side = path.with_suffix(".part")
        side.write_text(json.dumps({"assembly": self.id, **selection.tree()}), "utf-8")
        side.replace(path)
        return selection

    def _computing(self, need: int, what: str) -> Any:
        self.workers = self.options.fitting_workers(need, what)
        return computing(self.options, self.workers)

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

    def _write(self, shards: Sequence[Shard], sources: Sources) -> tuple[list[Layer], int]:
        sizes = {parameter.name: parameter.size for parameter in self.run.parameters}
        need = max(task_bytes(shard, sources, sizes) for shard in shards) + select_bytes(
            self.source, self.choice
        )
        # The largest first, so that no worker is left with one at the end.
        order = sorted(shards, key=lambda shard: -task_bytes(shard, sources, sizes))
        with self._computing(need, "assembling") as compute:
            done: dict[Path, list[Layer]] = dict(
                zip([s.path for s in order], _all(compute, order, sources), strict=True)
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
        linear = [p for p in self.run.parameters if p.name in selection.tensors]
        every = sum(parameter.size for parameter in self.run.parameters)
        kinds: dict[str, tuple[int, int]] = {}
        for parameter in linear:
            kept, size = kinds.get(parameter.role, (0, 0))
            kinds[parameter.role] = (
                kept + int(selection.tensors[parameter.name].kept.sum()),
                size + parameter.size,
            )
        total = sum(parameter.size for parameter in linear)
        trunk = every - total
        return AssembleReport(
            self.location,
            str(self.folder),
            self.id,
            selection.budget,
            total,
            trunk,
            selection.group_sizes,
            kinds,
            selection.empty_experts,
            sum(contents(shard)["bytes"] for shard in shards) - self._whole_bytes(shards),
            sum(shard_bytes(shard, sources) for shard in shards),
            len(shards),
            workers,
            select_seconds,
            write_seconds,
            True,
        )

    def _whole_bytes(self, shards: Sequence[Shard]) -> int:
        """Of the tensors that are stored as they are."""
        from safetensors import safe_open

        total = 0
        for shard in shards:
            with safe_open(shard.path, framework="pt") as file:
                total += sum(file.get_tensor(f"base.{name}").nbytes for name in shard.whole)
        return total

    def _finish(
        self, selection: Selection, shards: Sequence[Shard], layers: Sequence[Layer], report: AssembleReport
    ) -> None:
        """Index, tokenizer, card, code; and last the configuration."""
        index = {
            "metadata": {
                "total_size": sum(contents(shard)["bytes"] for shard in shards),
                "assembly": self.id,
            },
            "weight_map": {name: shard.path.name for shard in shards for name in contents(shard)["names"]},
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
        for pattern in TOKENIZER:
            for path in self.base.folder.glob(pattern):
                shutil.copyfile(path, self.folder / path.name)
        shell = self._shell(selection, layers, report)
        write_card(self.folder, shell.config.assembly, self.base.folder, self.config.top_k)
        side = self.folder / "config.part"
        shutil.rmtree(side, ignore_errors=True)
        shell.save_shell(side)
        for path in sorted(side.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(self.folder / path.name)
        side.rmdir()

    def _shell(self, selection: Selection, layers: Sequence[Layer], report: AssembleReport) -> Any:
        """The model without its weights."""
        import torch
        from transformers import GenerationConfig

        from tinyonn.experts.configuration_tinyonn import TinyONNConfig
        from tinyonn.experts.modeling_tinyonn import TinyONNForCausalLM

        prior = np.mean([layer.worth for layer in layers], axis=0)
        config = TinyONNConfig(
            base_config=read_model_config(self.base.folder),
            experts=selection.experts,
            sparse_layers={
                layer.module: {"out": layer.out, "in": layer.inputs, "entries": sum(layer.sizes)}
                for layer in layers
            },
            expert_sizes=selection.group_sizes,
            expert_prior=[float(value) for value in prior[:-1]],
            top_k=self.config.top_k,
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
            "selection": tree_of(selection.options),
            "report": report.figures(),
        }


def _all(compute: Compute, shards: Sequence[Shard], sources: Sources) -> list[list[Layer]]:
    return compute([(write_shard, (shard, sources)) for shard in shards])


def open_assembled(folder: str | Path) -> TinyONNForCausalLM:
    """Load an assembled model.

    Raises
    ------
    InputError
        It is not there or not complete.
    """
    from transformers import AutoModelForCausalLM

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no assembled model; run `tinyonn assemble` first")
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be loaded: {error}") from None
