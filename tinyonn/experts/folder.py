"""An assembled or trained model's folder as it was written, or the file of it that is not.

Four things say so: the shards' own digests, those of our settings in ``config.json`` (`digests_tinyonn`), the index,
which follows from the shards' headers, and ``digests.json`` for all else but the card (`tinyonn.files`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.dense.source import read_model_config
from tinyonn.errors import InputError
from tinyonn.files import SEALS, check_folder, folder_fault, seal_folder
from tinyonn.machine import bound_memory
from tinyonn.model.configuration_tinyonn import FREE, TinyONNConfig
from tinyonn.model.digests_tinyonn import DIGESTS, check_files, check_settings, free_settings_differ
from tinyonn.model.shards_tinyonn import check_index

if TYPE_CHECKING:
    from tinyonn.model.modeling_tinyonn import TinyONNForCausalLM

LOG = logging.getLogger(__name__)
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MARKER = "selection.json"  # says that a folder is ours, and what its shards are cut by
AGAIN = "assemble or train it again"


def read_settings(folder: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The tree of ``config.json``, of an assembled or trained model or of any other.

    Parameters
    ----------
    folder : Path
    remedy : str

    Raises
    ------
    InputError
        It is not readable; what has a digest does not fit it; of a sparse model, settings contradict each other.
    """
    path = folder / CONFIG
    tree = read_model_config(folder, remedy)
    sparse = tree.get("model_type") == TinyONNConfig.model_type
    try:
        if sparse or DIGESTS in tree:
            check_settings(tree, path)
    except ValueError as error:
        raise InputError(str(error)) from None
    if sparse and free_settings_differ(tree, FREE):
        LOG.warning(
            "%s: one of %s is not what was written, by damage or by hand; it is taken as it is",
            path,
            ", ".join(FREE),
        )
    try:
        if sparse:
            TinyONNConfig.from_dict(copy.deepcopy(tree), name_or_path=str(folder))
    except ValueError as error:
        raise InputError(f"{error}; {remedy}") from None
    return tree


def check_model(folder: Path, remedy: str = AGAIN) -> None:
    """Make sure that a folder is as it was written, but for its shards' tensors, which whoever reads them compares.

    Raises
    ------
    InputError
        Names the file that is not.
    """
    read_settings(folder, remedy)
    try:
        check_index(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
    check_folder(folder, remedy)


def compare(path: Path, names: list[str] | None = None) -> None:
    """Compare tensors of a shard with their digests.

    Raises
    ------
    InputError
        It is damaged; names the file and the tensor.
    """
    try:
        check_files([path], names)
    except ValueError as error:
        raise InputError(str(error)) from None


def model_faults(folder: Path) -> Iterator[str]:
    """What in a complete folder is not as it was written, in words that name the file."""
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        if fault := shard_fault(path):
            yield fault
    if fault := folder_fault(folder):
        yield fault
    if len(files) != 1 and not (folder / INDEX).is_file():
        yield f"{folder / INDEX} is not there"
    try:
        check_index(folder)
    except ValueError as error:
        yield str(error).rpartition(";")[0]


def shard_fault(path: Path) -> str | None:
    """What is wrong with a shard, in words that name it; None if all is well."""
    try:
        check_files([path])
    except ValueError as error:
        return str(error).rpartition(";")[0]
    return None


def seal_model(folder: Path) -> None:
    """Write ``digests.json`` for all files that have no digests of their own and that nobody is meant to change."""
    own = {CONFIG, MARKER, SEALS, "README.md"}
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in own]
    seal_folder(folder, [path for path in files if path.suffix not in (".safetensors", ".part", ".partial")])


def open_assembled(folder: str | Path) -> TinyONNForCausalLM:
    """Load an assembled model.

    Raises
    ------
    InputError
        It is not there, not complete or not as it was written; names the file.
    """
    from transformers import AutoModelForCausalLM

    bound_memory()
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} holds no assembled model; run `tinyonn assemble` first")
    check_model(path)
    try:
        model: TinyONNForCausalLM = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True
        )
        return model
    except Exception as error:  # transformers, safetensors and the base's class each have their own
        raise InputError(f"{path} cannot be loaded: {error}") from None
