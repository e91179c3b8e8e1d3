"""Models that `routing` compares: any groups of the dense model's weights as a folder that the trainer takes.

Groups are uint8 arrays of a matrix's own shape, by parameter name: an expert's number, the number of experts for the
core, `DROPPED` for what is not kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn.config import ModelConfig
from tinyonn.dense.copies import copy_file, tokenizer_files
from tinyonn.dense.parameters import list_parameters
from tinyonn.dense.source import read_model_config
from tinyonn.evaluate.baselines import masks_of, recipe_of
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Experts, gates_of
from tinyonn.experts.folder import open_assembled
from tinyonn.experts.shards import compress
from tinyonn.model.configuration_tinyonn import TinyONNConfig
from tinyonn.model.matrix_tinyonn import rows_and_groups
from tinyonn.model.modeling_tinyonn import TinyONNForCausalLM
from tinyonn.profile.profile import Profile
from tinyonn.score.source import DROPPED, Source, digest
from tinyonn.select.select import select
from tinyonn.select.selection import SelectOptions
from tinyonn.train.data import Batch
from tinyonn.train.losses import profile_targets

Groups = Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]


def write_experts(folder: Path, dense: DenseWeights, groups: Groups, experts: int, base: Path) -> Path:
    """A sparse model of the dense one's weights.

    Parameters
    ----------
    folder : Path
        Replaced if it is there.
    dense : DenseWeights
    groups : mapping of str to uint8 array
        Of every linear layer in the decoder.
    experts : int
    base : Path
        The dense model's folder.
    """
    modules = {name.removesuffix(".weight"): group for name, group in groups.items()}
    parts = {
        module: compress(dense.original(f"{module}.weight"), group, experts + 1)
        for module, group in modules.items()
    }
    sizes = np.sum([part.sizes for part in parts.values()], axis=0)
    fingerprint = digest([[name, group.shape, group.tobytes().hex()] for name, group in groups.items()])
    config = TinyONNConfig(
        base_config=read_model_config(base),
        experts=experts,
        sparse_layers={
            module: {"out": group.shape[0], "in": group.shape[1], "entries": parts[module].values.numel()}
            for module, group in modules.items()
        },
        expert_sizes=sizes.tolist(),
        assembly={"id": fingerprint},
    )
    with torch.device("meta"):
        model = TinyONNForCausalLM(config)
    model = model.to(dense.model.dtype).to_empty(device="cpu")
    state = {f"base.{name}": tensor for name, tensor in dense.model.state_dict().items()}
    for module, part in parts.items():
        del state[f"base.{module}.weight"]
        state |= {
            f"base.{module}.{name}": getattr(part, name) for name in ("values", "columns", "row_pointer")
        }
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    for name, buffer in model.base.named_buffers():  # those that are not saved
        if name not in dense.model.state_dict() and name in dict(dense.model.named_buffers()):
            buffer.copy_(dense.model.get_buffer(name))
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    _write_index(folder)
    copy_tokenizer(base, folder)
    return folder


def groups_of_model(model: TinyONNForCausalLM) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The groups of an assembled model, by parameter name."""
    found = {}
    for name, layer in model.sparse_layers.items():
        matrix = layer.matrix
        rows, groups = rows_and_groups(matrix)
        group_OI = np.full((matrix.out, matrix.inputs), DROPPED, np.uint8)
        group_OI[rows.numpy(), matrix.columns.long().numpy()] = groups.numpy()
        found[f"{name}.weight"] = group_OI
    return found


def all_kept(dense: DenseWeights) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Every weight in the core, beside one empty expert."""
    return {p.name: np.ones(p.shape, np.uint8) for p in dense.parameters}


def random_groups(groups: Groups, experts: int, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The experts' weights dealt out anew at random, as many to each; the core stays."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, group in groups.items():
        dealt = group.copy()
        theirs = np.flatnonzero(group.reshape(-1) < experts)
        dealt.reshape(-1)[generator.permutation(theirs)] = np.arange(theirs.size) % experts
        found[name] = dealt
    return found


def small_model(folder: Path, base: Path, share: float, seed: int) -> float:
    """A dense model like the base but narrower, of random weights.

    Parameters
    ----------
    folder : Path
    base : Path
        Whose configuration and tokenizer are taken.
    share : float
        Of the base's linear weights that it should have.
    seed : int

    Returns
    -------
    float
        The share that it has: heads have an even number of features.
    """
    tree = read_model_config(base)
    wide, heads = int(tree["hidden_size"]), int(tree["num_attention_heads"])
    step = 2 * heads
    narrow = max(step, round(wide * share**0.5 / step) * step)
    tree |= {"hidden_size": narrow, "intermediate_size": round(tree["intermediate_size"] * narrow / wide)}
    tree.pop("head_dim", None)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), dtype=torch.float32)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read_model_config(base)))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    copy_tokenizer(base, folder)
    return _linear(model) / _linear(twin)


def _linear(model: Any) -> int:
    """Weights of the linear layers in the decoder."""
    return sum(p.size for p in list_parameters(model) if p.kind == "linear" and p.layer is not None)


def active_shares(
    model: TinyONNForCausalLM,
    batches: Sequence[Batch],
    k: Experts,
    slice_gates: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Share of every linear layer's weights that work on a token, by parameter name, mean over the samples.

    Parameters
    ----------
    model : TinyONNForCausalLM
        With a router.
    batches : sequence of Batch
    k : int or "all"
        Experts on.
    slice_gates : mapping of str to float32 [E], optional
        Gates by slice, in place of those that would be chosen.
    """
    with torch.no_grad():
        if slice_gates is None:
            on_E = torch.cat([_on(model, batch, k) for batch in batches]).mean(0)
        else:
            on_E = (
                torch.stack([slice_gates[name] for batch in batches for name in batch.slices])
                .double()
                .mean(0)
            )
    on_G = torch.cat([on_E, torch.ones(1, dtype=torch.float64)])
    found = {}
    for name, layer in model.sparse_layers.items():
        matrix = layer.matrix
        sizes_G = matrix.group_sizes().double()
        found[f"{name}.weight"] = float(on_G @ sizes_G) / (matrix.out * matrix.inputs)
    return found


def _on(model: TinyONNForCausalLM, batch: Batch, k: Experts) -> torch.Tensor:
    gates = gates_of(model, batch, k)
    assert gates is not None
    return (gates != 0).double().expand(len(batch), -1)


def label_gates(profile: Profile, slices: Sequence[str], k: int) -> dict[str, torch.Tensor]:
    """Gates by slice, float32 [E]: on are the k experts that do most on its samples, over what they usually do.

    Parameters
    ----------
    profile : Profile
        From which the router learned too.
    slices : sequence of str
        One that was not profiled is given the experts that did most on all samples.
    k : int
    """
    contribution_SE = torch.from_numpy(np.ascontiguousarray(profile.contribution[:, : profile.experts]))
    targets_SE = profile_targets(contribution_SE, per_E=contribution_SE.double().mean(0))
    found = {}
    for name in slices:
        own = [row for row, slice in enumerate(profile.slices) if slice == name]
        wanted_E = targets_SE[own].mean(0) if own else contribution_SE.double().mean(0).float()
        gates_E = torch.zeros(profile.experts)
        gates_E[wanted_E.argsort(descending=True, stable=True)[:k]] = 1
        found[name] = gates_E
    return found


def without_slices(path: Path, left_out: Sequence[str], target: Path) -> Path:
    """A Parquet file of the rows of another one whose column `slice` is none of these."""
    table = pq.read_table(path)
    kept = [name not in left_out for name in table["slice"].to_pylist()]
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.filter(pa.array(kept)), target)
    return target


def bands(
    source: Source,
    selection: SelectOptions,
    method: str,
    shares: Sequence[Mapping[str, float]],
    own: bool = False,
) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Masks within masks as groups: with the first n of them on, what works is the mask of the n-th shares.

    Parameters
    ----------
    source : Source
    selection : SelectOptions
    method : str
        A score, as of `tinyonn.evaluate.baselines.recipe_of`.
    shares : sequence of mapping
        Of every tensor, smallest first.
    own : bool
        Whether the masks have an allocation of their own, and of the shares only the sum.
    """
    found: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    sizes = {parameter.name: parameter.size for parameter in source.parameters}
    for number, its in reversed(list(enumerate(shares))):
        its = {name: max(share, 1 / sizes[name]) for name, share in its.items()}  # no tensor is left out
        budget = round(sum(share * sizes[name] for name, share in its.items()))
        chosen = select(source, recipe_of(method, selection, float(budget), {} if own else its).options)
        for name, mask in masks_of(chosen, source):
            band = found.setdefault(name, np.full(tuple(mask.shape), DROPPED, np.uint8))
            band[mask.numpy()] = number
    return found


def in_order(folder: Path, experts: int) -> None:
    """Give a model of `bands` the router that switches them on from the first, whatever the prompt."""
    model = open_assembled(folder)
    model.set_router({"branches": [list(range(experts))], "width": 1, "top_k": 1})
    router = model.router
    assert router is not None
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.get_buffer("bias").copy_(-torch.arange(float(experts)))
    model.save_pretrained(folder)
    _write_index(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Tokenizer files of a model."""
    for path in tokenizer_files(source):
        copy_file(path, folder)


def base_folder(config: ModelConfig) -> Path:
    """Where the dense model lies."""
    from tinyonn.dense.weights import BaseWeights

    return BaseWeights(config).folder


def _write_index(folder: Path) -> None:
    """Of the one file, as larger models have it."""
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    index = {
        "metadata": {"total_size": weights.stat().st_size},
        "weight_map": dict.fromkeys(names, weights.name),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
