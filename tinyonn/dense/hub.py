"""A model's files from the hub, and no more of them than are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tinyonn.dense.checkpoint import BIN, SAFETENSORS, named_files
from tinyonn.errors import InputError
from tinyonn.progress import Bar, hub_bar

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig


def fetch_weights(config: ModelConfig, folder: Path) -> None:
    """The files that an index names, or else the one file that takes its place; of the commit that was fetched."""
    config = config.model_copy(update={"revision": folder.name})
    for whole, index in (SAFETENSORS, BIN):
        if (folder / index).is_file():
            names = named_files(folder / index)
            if not all((folder / name).is_file() for name in names):
                fetch(config, tuple(names))
            return
        if (folder / whole).is_file() or (fetch(config, (whole,)) / whole).is_file():
            return


def fetch(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    """Fetch the files of a repository's top folder that match, unless they are in the cache; the folder they are in.

    Raises
    ------
    InputError
        No such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = config.path
    try:
        with Bar("fetching the model", unit="B") as bar:
            found = snapshot_download(
                name,
                revision=config.revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                tqdm_class=hub_bar(bar),
            )
            return Path(found)
    except GatedRepoError:
        raise InputError(
            f"model {name!r} wants its licence accepted on the hub and a login (hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise InputError(
            f"model.revision = {config.revision!r} is not a revision of {name!r} on the hub"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"model.path = {name!r} is neither a folder here nor a model on the hub; check the spelling, "
            "give a folder, or use 'reference'"
        ) from None
    except (
        Exception
    ) as error:  # httpx, offline mode, time-outs, cache misses: all mean that the hub is out of reach
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise InputError(
            f"model.path = {name!r} is not a folder here and the hub cannot be reached{offline}: "
            f"{type(error).__name__}; go online, give a folder with the model's files, or use 'reference'"
        ) from None
