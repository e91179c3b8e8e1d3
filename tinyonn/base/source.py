"""Where a model's files come from: the project, a folder or the hub. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError
from tinyonn.progress import Bar, hub_bar

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

BASE = Path(__file__).resolve().parent
REFERENCE_MODEL = BASE / "reference" / "model"
SHAPES = BASE / "shapes"
WEIGHTS = "*.safetensors"
NEEDED = (WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CHUNK = 1 << 22


def resolve_model(config: ModelConfig) -> Path | str:
    """Tell where a model lies: the shipped folder for ``reference``, a folder, or a name on the hub.

    Raises
    ------
    InputError
        The path is neither a folder nor fit to be a hub name.
    """
    if config.path == "reference":
        return REFERENCE_MODEL
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    parts = config.path.split("/")
    if folder.exists() or len(parts) > 2 or config.path.startswith((".", "/", "~")) or not all(parts):
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"model.path = {config.path!r} {what}; give a folder with config.json and {WEIGHTS}, "
            "a hub name such as Qwen/Qwen1.5-4B, or 'reference'"
        )
    return config.path


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
        File name to hexadecimal digest, sorted; for a hub model ``commit`` too.
    """
    folder = model_folder(config)
    files = {path for pattern in NEEDED for path in folder.glob(pattern) if path.is_file()}
    with Bar("hashing the model", sum(path.stat().st_size for path in files), "B") as bar:
        digest = sha256 if known is None else _Remembered(known).digest
        prints = {}
        for path in sorted(files):
            prints[path.name] = digest(path)
            bar.add(path.stat().st_size)
    if folder.parent.name == "snapshots":
        prints["commit"] = folder.name
    return prints


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
        side = self._memory.with_suffix(".part")
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
        with Bar("fetching the model", unit="B") as bar:
            chosen, shown = list(patterns), hub_bar(bar)
            return Path(
                snapshot_download(name, revision=config.revision, allow_patterns=chosen, tqdm_class=shown)
            )
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
