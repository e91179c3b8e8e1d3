"""``tinyonn export``: an assembled or trained model for others: for a hub, as a dense checkpoint, or as masks.

``hub``      the sparse model's folder, its card filled with the figures of `tinyonn evaluate`; with its router
``dense``    chosen experts and the core merged into a checkpoint of the base architecture, which every tool reads
``npz``      per layer an archive with every matrix's groups, uint8 [out, in]: expert, k for the core, 255 dropped
``parquet``  per layer a table of the kept weights: tensor, row, column, expert, value

Layer by layer, however the model's files are cut: memory is bounded by one layer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyonn.dense.checkpoint import tensor_files
from tinyonn.dense.copies import CARD, check_files, copy_file, tokenizer_files
from tinyonn.errors import InputError
from tinyonn.experts.card import write_card
from tinyonn.experts.ending import stop_at_turns
from tinyonn.experts.folder import AGAIN, INDEX, MARKER, check_model, compare, read_settings
from tinyonn.experts.shards import Compressed, expand, write_tensors
from tinyonn.model.matrix_tinyonn import ExpertMatrix, matrix_fault
from tinyonn.plan.demands import Need, state_ram
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import MiB, format_size
from tinyonn.store.lock import only_writer

if TYPE_CHECKING:
    pass

FORMATS = ("hub", "dense", "npz", "parquet")
UNFINISHED = ".unfinished"  # lies in a folder until all of it is written
GENERATION = "generation_config.json"
OWN = ("config.json", GENERATION, INDEX, "model*.safetensors", "*_tinyonn.py", "LICENSE*", "NOTICE*")
PARTS = ("values", "columns", "row_pointer")
# Of the process: Python with Torch and Transformers, the base's shape, what writes the format.
OWN_BYTES = {"hub": 760 * MiB, "dense": 740 * MiB, "npz": 760 * MiB, "parquet": 740 * MiB}
VALUE = 2  # bytes of a weight
ROW_BYTES = 48  # of a kept weight on its way into a table
NUMBER = re.compile(r"\.(\d+)\.")  # of a layer, in a tensor's name


@dataclass(frozen=True)
class ExportReport:
    """What a call of `export_model` wrote."""

    source: str
    folder: str
    format: str
    experts: list[int]
    weights: int
    files: int
    bytes: int
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        sheet = Sheet(f"exported {whole(self.folder)}").text("format")
        sheet.number("experts", "weights of matrices", "files", "on disk")
        counts = (len(self.experts), self.weights, self.files)
        sheet.add(self.format, *(f"{count:,}" for count in counts), format_size(self.bytes))
        return sheet


class Assembled:
    """An assembled or trained model's folder, layer by layer, without building the model; without its router.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    InputError
        No assembled model is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            tensors = tensor_files(folder, AGAIN) if (folder / "config.json").is_file() else {}
        except OSError:
            tensors = {}
        if not tensors:
            raise InputError(
                f"{folder} holds no assembled model and no trained one; run `tinyonn assemble` or `tinyonn train` first"
            )
        self.config = read_settings(folder)
        if self.config.get("model_type") != "tiny_onn":
            raise InputError(
                f"{folder} holds a model of type {self.config.get('model_type')!r}, not tiny_onn; give a folder that "
                "`tinyonn assemble` wrote, or `tinyonn train` from one"
            )
        check_model(folder)
        self.experts: int = self.config["experts"]
        self.layers: dict[str, dict[str, int]] = self.config["sparse_layers"]
        self.units: dict[int, dict[Path, list[str]]] = {}  # by layer, -1 is outside: keys by file
        for key, path in tensors.items():
            if not key.startswith("router."):
                number = NUMBER.search(key)
                unit = self.units.setdefault(-1 if number is None else int(number[1]), {})
                unit.setdefault(path, []).append(key)

    def shards(self) -> Iterator[tuple[str, dict[str, Compressed], dict[str, torch.Tensor]]]:
        """What lies outside the layers, then every layer: name of a file for it, matrices by module, other tensors by
        their name in the base.
        """
        for number, (_, files) in enumerate(sorted(self.units.items()), 1):
            tensors: dict[str, torch.Tensor] = {}
            for path, keys in files.items():
                tensors |= self._read(path, keys)
            matrices = {}
            for module, layer in self.layers.items():
                if f"{module}.values" in tensors:
                    values, columns, pointer = (tensors.pop(f"{module}.{part}") for part in PARTS)
                    matrix = ExpertMatrix(values, columns, pointer, layer["out"], layer["in"])
                    if fault := matrix_fault(matrix):
                        raise InputError(f"{self.folder}: {module}: {fault}; {AGAIN}")
                    sizes = np.diff(pointer[:: layer["out"]].numpy())
                    matrices[module] = Compressed(values, columns, pointer, sizes)
            yield f"model-{number:05d}-of-{len(self.units):05d}.safetensors", matrices, tensors

    def stored(self, path: Path, keys: Sequence[str]) -> int:
        """Bytes of tensors of a file, from its header."""
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        ends = [header[key]["data_offsets"] for key in keys if key in header]
        return sum(int(end) - int(begin) for begin, end in ends)

    def _read(self, path: Path, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as stream:
                self._check(path, stream.metadata() or {})
                compare(path, list(keys))
                return {key.removeprefix("base."): stream.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or damaged ({error}); assemble or train it again") from None

    def _check(self, path: Path, metadata: dict[str, str]) -> None:
        wanted = self.config["assembly"].get("id")
        if metadata.get("assembly") != wanted:
            raise InputError(
                f"{path} belongs to assembly {metadata.get('assembly', 'unknown')} but config.json to {wanted}; "
                "assemble or train it again"
            )


def export_model(
    source: Path,
    folder: Path,
    format: str,
    experts: Sequence[int] | None = None,
    base: Path | None = None,
    figures: Any = None,
) -> ExportReport:
    """Export an assembled or trained model.

    Parameters
    ----------
    source : Path
        Folder of the model.
    folder : Path
        New, or empty.
    format : str
        See the module.
    experts : sequence of int, optional
        For ``dense``, ``npz`` and ``parquet``: those beside the core; by default all.
    base : Path, optional
        Folder of the base model, whose card says its licence.
    figures : dict, optional
        For the card; see `tinyonn.experts.card.write_card`.

    Raises
    ------
    InputError
        Unknown format or expert; `folder` is not empty; the assembled model is not there, damaged or mixed;
        a file of it is a link to elsewhere.
    CapacityError
        It does not fit.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format!r} is unknown; choose {', '.join(FORMATS)}")
    assembled = Assembled(source)
    chosen = list(range(assembled.experts)) if experts is None else sorted(set(experts))
    if wrong := [number for number in chosen if not 0 <= number < assembled.experts]:
        raise InputError(f"there is no expert {wrong[0]}; there are 0 to {assembled.experts - 1}")
    _check_room(folder)
    check_files(source)
    if base is not None:
        check_files(base, CARD)
    planned = state_ram(
        f"exporting as {format}",
        export_needs(assembled, format),
        "end other programs, or export on a machine with more of it",
    )
    flags = np.isin(np.arange(assembled.experts + 1), [*chosen, assembled.experts])
    with _whole(folder):
        if format == "hub":
            for path in sorted(source.glob("model*.safetensors")):
                compare(path)
            _copy(source, folder)
            write_card(folder, assembled.config, base or source, figures)
            weights = sum(assembled.config["expert_sizes"])
        else:
            write = {"dense": _write_dense, "npz": _write_npz, "parquet": _write_parquet}[format]
            weights = write(assembled, folder, flags)
        if format in ("hub", "dense"):
            stop_at_turns(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return ExportReport(
        str(source),
        str(folder),
        format,
        chosen,
        weights,
        len(files),
        sum(path.stat().st_size for path in files),
        planned,
    )


def _check_room(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / UNFINISHED).exists():
        raise InputError(f"{folder} is not empty; give a new folder")


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Mark a folder while it is being written, so that after a kill the same call empties it and begins again."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        _check_room(folder)
        (folder / UNFINISHED).touch()
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != UNFINISHED:
                path.unlink()
        yield
        (folder / UNFINISHED).unlink()


def export_needs(assembled: Assembled, format: str) -> list[Need]:
    """What an export holds: a layer as it is stored beside the one before, and what is made of it."""
    own = Need("the process", OWN_BYTES[format])
    if format == "hub":
        return [own]
    stored, made = [], []
    for files in assembled.units.values():
        stored.append(sum(assembled.stored(path, keys) for path, keys in files.items()))
        names = {key.removeprefix("base.").rpartition(".")[0] for keys in files.values() for key in keys}
        its = [layer for name, layer in assembled.layers.items() if name in names]
        weights = [layer["out"] * layer["in"] for layer in its]
        largest = max(weights, default=0)
        if format == "dense":
            made.append(2 * VALUE * sum(weights) + largest)
        elif format == "npz":
            made.append(2 * sum(weights) + (VALUE + 2) * largest)
        else:
            made.append(ROW_BYTES * max((layer["entries"] for layer in its), default=0))
    largest_two = sum(sorted(stored)[-2:])
    read = Need("two layers as they are stored", largest_two, mapped=True)
    return [own, read, Need("what is made of one, and on its way into a file", max(made))]


def experts_needed(needs: Mapping[str, Sequence[float]], slices: Sequence[str]) -> list[int]:
    """Experts whose weights one of the slices would keep under the budget itself, or a smaller one."""
    if wrong := [name for name in slices if name not in needs]:
        raise InputError(f"no slice {wrong[0]!r} with samples in this model; there are {', '.join(needs)}")
    least_E = np.min([needs[name] for name in slices], axis=0)
    found = [int(number) for number in np.flatnonzero(least_E <= 1)]
    if not found:
        raise InputError(
            f"{', '.join(slices)} would keep no expert's weights under this budget; give numbers as --experts"
        )
    return found


def numbers_of(experts: str | None, slices: str | None, assembled: Assembled) -> list[int] | None:
    """Numbers of experts from the command line's texts, comma-separated; None takes all.

    Parameters
    ----------
    experts, slices : str or None
    assembled : Assembled
        Says what each slice needs.

    Raises
    ------
    InputError
        Both are given, or one is no number, or no slice of the run.
    """
    if experts is not None and slices is not None:
        raise InputError("--experts and --slices exclude each other; give one")
    if experts is not None:
        parts = [part.strip() for part in experts.split(",") if part.strip()]
        if wrong := [part for part in parts if not part.isdigit()]:
            raise InputError(
                f"--experts {experts!r}: {wrong[0]!r} is not a number; give numbers such as 0,4,17"
            )
        return [int(part) for part in parts]
    if slices is None:
        return None
    names = [name.strip() for name in slices.split(",")]
    assembly = assembled.config["assembly"]
    if assembly.get("needs") is None:
        raise InputError(
            f"{assembled.folder} is of an earlier version and does not say what its experts are for; run "
            "`tinyonn assemble` again, then `tinyonn train --fresh` for a trained model, or give numbers as --experts"
        )
    return experts_needed(assembly["needs"], names)


def _copy(source: Path, folder: Path) -> None:
    """What belongs to a model, and no other file that may lie beside it."""
    own = [path for pattern in OWN for path in sorted(source.glob(pattern)) if path.name != MARKER]
    for path in dict.fromkeys([*own, *tokenizer_files(source)]):
        copy_file(path, folder)


def _write_dense(assembled: Assembled, folder: Path, chosen: np.ndarray) -> int:
    """A checkpoint of the base architecture; weights in it that were kept."""
    across = _conv1d(assembled.config["base_config"])
    weight_map: dict[str, str] = {}
    weights = total = 0
    for file, matrices, tensors in assembled.shards():
        for module, matrix in matrices.items():
            layer = assembled.layers[module]
            dense, _ = expand(matrix, layer["out"], layer["in"], chosen)
            tensors[f"{module}.weight"] = dense.T.contiguous() if module in across else dense
            weights += int(matrix.sizes[chosen].sum())
        write_tensors(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
    for path in (assembled.folder / GENERATION, *tokenizer_files(assembled.folder)):
        if path.exists():
            copy_file(path, folder)
    base_config = assembled.config["base_config"] | {"dtype": assembled.config["dtype"]}
    (folder / "config.json").write_text(json.dumps(base_config, indent=2), "utf-8")
    return weights


def _conv1d(base_config: dict[str, Any]) -> set[str]:
    """Modules of the base whose weight is [in, out]."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base_config))
    return {name for name, module in model.named_modules() if type(module) is Conv1D}


def _write_npz(assembled: Assembled, folder: Path, chosen: np.ndarray) -> int:
    weights = 0
    for file, matrices, _ in assembled.shards():
        arrays: dict[str, Any] = {}
        for module, matrix in matrices.items():
            layer = assembled.layers[module]
            _, groups = expand(matrix, layer["out"], layer["in"], chosen)
            kept = np.append(chosen, np.zeros(256 - chosen.size, np.bool_))[groups]
            arrays[f"{module}.weight"] = np.where(kept, groups, np.uint8(255))
            weights += int(kept.sum())
        if arrays:
            np.savez_compressed(folder / file.replace(".safetensors", ".npz"), **arrays)
    return weights


def _write_parquet(assembled: Assembled, folder: Path, chosen: np.ndarray) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    weights = 0
    for file, matrices, _ in assembled.shards():
        if not matrices:
            continue
        schema = pa.schema(
            [
                ("tensor", pa.dictionary(pa.int16(), pa.string())),
                ("row", pa.int32()),
                ("column", pa.int32()),
                ("expert", pa.uint8()),
                ("value", pa.float32()),
            ]
        )
        with pq.ParquetWriter(
            folder / file.replace(".safetensors", ".parquet"),
            schema,
            compression="zstd",
            write_page_checksum=True,
        ) as out:
            for module, matrix in matrices.items():
                rows, expert = _places(matrix, assembled.layers[module]["out"])
                kept = chosen[expert]
                count = int(kept.sum())
                tensor = pa.DictionaryArray.from_arrays(np.zeros(count, np.int16), [f"{module}.weight"])
                columns = matrix.columns.numpy().astype(np.int32)[kept]
                values = matrix.values.float().numpy()[kept]
                arrays = [tensor, rows[kept], columns, expert[kept], values]
                out.write_table(pa.table(arrays, schema=schema))
                weights += count
    return weights


def _places(matrix: Compressed, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (int32) and group (uint8) of every entry."""
    lengths = np.diff(matrix.row_pointer.numpy())
    lines = np.repeat(np.arange(lengths.size), lengths)
    return (lines % out).astype(np.int32), (lines // out).astype(np.uint8)
