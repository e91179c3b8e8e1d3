"""Where a model's files come from: the project, a folder, a GGUF or the hub. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

BASE = Path(__file__).resolve().parent
REFERENCE_MODEL = BASE / "reference" / "model"
SHAPES = BASE / "shapes"
WEIGHTS = "*.safetensors"
NEEDED = (WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
CHUNK = 1 << 22

logger = logging.getLogger(__name__)


def resolve_model(config: ModelConfig) -> Path | str:
    """Tell where a model lies: the shipped folder for ``reference``, a folder, a GGUF file, or a name on the hub.

    A folder without ``config.json`` stands for the one GGUF file that it holds.

    Raises
    ------
    InputError
        The path is neither a folder nor a GGUF nor fit to be a hub name, or a folder holds several GGUF files.
    """
    if config.path == "reference":
        return REFERENCE_MODEL
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return _gguf_of(folder) or folder
    if _is_gguf(folder):
        return _whole(folder)
    parts = config.path.split("/")
    if folder.exists() or len(parts) > 2 or config.path.startswith((".", "/", "~")) or not all(parts):
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"model.path = {config.path!r} {what}; give a folder with config.json and {WEIGHTS}, a GGUF file, "
            "a hub name such as Qwen/Qwen1.5-4B, or 'reference'"
        )
    return config.path


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _gguf_of(folder: Path) -> Path | None:
    """The GGUF that a folder stands for."""
    if (folder / "config.json").is_file():
        return None
    found = sorted(filter(_is_gguf, folder.iterdir()))
    if len(found) > 1 and not SPLIT.search(found[0].name):
        names = ", ".join(path.name for path in found[:4])
        raise InputError(f"{folder} holds {len(found)} GGUF files ({names}); give one of them as model.path")
    return _whole(found[0]) if found else None


def _whole(path: Path) -> Path:
    """A GGUF that is not one part of several."""
    if part := SPLIT.search(path.name):
        first = f"{path.name[: part.start()]}-00001-of-{part[2]}.gguf"
        raise InputError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a split GGUF, which is not read; join them with "
            f"llama.cpp's `llama-gguf-split --merge {first} whole.gguf`"
        )
    return path


def model_folder(config: ModelConfig, weights: bool = True) -> Path:
    """Find the folder that holds the model's files, fetching them from the hub where needed.

    Parameters
    ----------
    config : ModelConfig
    weights : bool
        Also fetch the weights, and refuse a folder that has none as safetensors.

    Raises
    ------
    InputError
        No such folder or repository, no ``config.json``, only pickled weights, or the hub cannot be reached.
    """
    place = resolve_model(config)
    if isinstance(place, Path) and place.is_file():
        from tinyonn.base.gguf_folder import gguf_shell, gguf_weights

        return gguf_weights(place, config.dtype, _gguf_digest) if weights else gguf_shell(place)
    folder = place if isinstance(place, Path) else _fetch(config, NEEDED if weights else NEEDED[1:])
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{config.path}: no config.json in {folder}; save a model there with save_pretrained()"
        )
    if weights and not list(folder.glob(WEIGHTS)):
        if isinstance(place, str):
            raise InputError(
                f"{config.path}: no {WEIGHTS} in the cache or on the hub; go online if they were never "
                "fetched, or choose a model that has them: pickled weights can run code and are not loaded"
            )
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = (
            f"only pickled weights ({', '.join(pickled[:3])}), which can run code"
            if pickled
            else "no weights"
        )
        raise InputError(
            f"{config.path}: {found}, and {WEIGHTS} is needed; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    return folder


def config_folder(config: ModelConfig) -> Path:
    """Find a folder with the model's ``config.json`` and no more; a copy that ships with the project will do.

    Raises
    ------
    InputError
        As `model_folder`, where no copy ships with the project.
    """
    place = resolve_model(config)
    if isinstance(place, Path):
        return model_folder(config, weights=False)
    try:
        return _fetch(config, ("config.json",))
    except InputError:
        shipped = SHAPES / place.replace("/", "--")
        if (shipped / "config.json").is_file():
            return shipped
        raise


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` as a dict.

    Raises
    ------
    InputError
        It is not a JSON object.
    """
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); save the model again") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(tree).__name__}; save the model again")
    return tree


def context_length(folder: Path) -> int | None:
    """Longest sample the model was made for, in tokens; None if its configuration does not say."""
    tree = read_model_config(folder)
    value = tree.get("max_position_embeddings", tree.get("n_positions"))
    return int(value) if isinstance(value, int) else None


def describe_origin(config: ModelConfig) -> str:
    """What a GGUF's values were rounded to, in a line; empty for any other model."""
    from tinyonn.base.gguf_folder import describe_gguf

    place = resolve_model(config)
    return describe_gguf(place) if isinstance(place, Path) and place.is_file() else ""


def fingerprint_model(config: ModelConfig, known: Path | None = None) -> dict[str, str]:
    """SHA-256 of every file that decides the model: weights, configuration and tokenizer.

    Reads all the weights. A folder that was moved or copied keeps its fingerprint.

    Parameters
    ----------
    config : ModelConfig
    known : Path, optional
        A JSON file that remembers digests by path, size and time of change, so that files are not read again.

    Returns
    -------
    dict
        File name to hexadecimal digest, sorted; for a hub model ``commit`` too. A GGUF has one, ``model.gguf``.
    """
    place = resolve_model(config)
    if isinstance(place, Path) and place.is_file():
        logger.info("%s", describe_origin(config))
        return {"model.gguf": _gguf_digest(place)}
    folder = model_folder(config)
    files = {path for pattern in NEEDED for path in folder.glob(pattern) if path.is_file()}
    digest = sha256 if known is None else _Remembered(known).digest
    prints = {path.name: digest(path) for path in sorted(files)}
    if folder.parent.name == "snapshots":
        prints["commit"] = folder.name
    return prints


def _gguf_digest(path: Path) -> str:
    from tinyonn.base.gguf_folder import cache_folder

    return _Remembered(cache_folder() / "digests.json").digest(path)


class _Remembered:
    """Digests of files, remembered as long as size and time of change stay."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, Any] = json.loads(memory.read_text("utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def digest(self, path: Path) -> str:
        state = path.stat()
        key, mark = str(path.resolve()), [state.st_size, state.st_mtime_ns]
        entry = self._known.get(key)
        if isinstance(entry, dict) and entry.get("mark") == mark:
            return str(entry["sha256"])
        self._known[key] = {"mark": mark, "sha256": sha256(path)}
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        side = self._memory.with_suffix(f".{os.getpid()}.part")
        side.write_text(json.dumps(self._known), "utf-8")
        side.replace(self._memory)
        return str(self._known[key]["sha256"])


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = config.path
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=list(patterns)))
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
