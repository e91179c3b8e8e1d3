"""Where a model's files come from: the project, a folder, a GGUF or the hub. No code in it is ever run."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.dense.checkpoint import BIN, SAFETENSORS, fetch, fetch_weights, weight_files
from tinyonn.dense.copies import check_regular
from tinyonn.errors import InputError
from tinyonn.files import read_derived, write_json
from tinyonn.show.progress import Bar

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent / "reference"
REFERENCE_MODEL = REFERENCE / "model"
SHAPES = HERE / "shapes"
ADAPTER = "adapter_config.json"
NEEDED = ("*.json", "*.jinja", "*.txt", "*.model")  # beside the weights
QUANTIZED = ("quantization_config", "compression_config")  # in config.json
QUANTIZED_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
CHUNK = 1 << 22
LARGEST, DEEPEST = 64 << 20, 32  # bytes and levels of a config.json

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
            f"model.path = {config.path!r} {what}; give a folder with config.json and weights, a GGUF file, "
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

    Of the weights only the files that `weight_files` names are fetched; a GGUF is converted.

    Parameters
    ----------
    config : ModelConfig
    weights : bool
        Also fetch the weights, and refuse a folder that has none.

    Raises
    ------
    InputError
        No such folder or repository, no ``config.json``, an adapter in place of a model or beside one, no weights
        that can be read, or the hub cannot be reached.
    CapacityError
        There is no room to convert a GGUF.
    """
    place = resolve_model(config)
    if isinstance(place, Path) and place.is_file():
        from tinyonn.dense.gguf_folder import gguf_shell, gguf_weights

        return gguf_weights(place, config.dtype, _gguf_digest) if weights else gguf_shell(place)
    folder = place if isinstance(place, Path) else fetch(config, NEEDED)
    _check_model(config, folder)
    if not weights:
        return folder
    if isinstance(place, str):
        fetch_weights(config, folder)
    if not weight_files(folder):
        raise InputError(f"{config.path}: {_no_weights(folder, isinstance(place, str))}")
    return folder


def _check_model(config: ModelConfig, folder: Path) -> None:
    """Refuse a folder that is not one whole model by itself."""
    check_regular(folder, NEEDED)
    whole = (folder / "config.json").is_file()
    if (folder / ADAPTER).is_file():
        base = _adapted(folder / ADAPTER)
        there = "beside the weights, which it changes" if whole else f"of {base}, which is no model by itself"
        load = f"AutoModelForCausalLM.from_pretrained({(config.path if whole else base)!r})"
        raise InputError(
            f"{config.path}: {ADAPTER} says that there is an adapter {there}; give "
            f"{'a copy without it' if whole else base}, or merge them: PeftModel.from_pretrained({load}, "
            f"{config.path!r}).merge_and_unload().save_pretrained(new)"
        )
    if not whole:
        raise InputError(
            f"{config.path}: no config.json in {folder}; save a model there with save_pretrained(), or give one GGUF "
            "file as model.path"
        )
    if (named := read_model_config(folder).get("transformers_weights")) is not None:
        raise InputError(
            f"{config.path}: its config.json names {named!r} as its weights, which is not read; take "
            "transformers_weights out and give the file the usual name, model.safetensors"
        )


def _adapted(path: Path) -> str:
    """The model that an adapter is for."""
    try:
        name = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None
    return name if isinstance(name, str) and name else "its base model"


def _no_weights(folder: Path, hub: bool) -> str:
    """What is there instead of weights, and what to do."""
    wanted = " or ".join((SAFETENSORS[0], BIN[0]))
    if hub:
        return (
            f"no {wanted}, nor an index of such files, in the cache or on the hub; go online if they were never "
            "fetched, or choose a model that has them (of GGUF files fetch one with `hf download` and give its path)"
        )
    others = sorted(path.name for pattern in (*PICKLES, "*.safetensors") for path in folder.glob(pattern))
    if not others:
        return f"no weights, and {wanted} is needed; save a model there with save_pretrained()"
    pickled = all(not name.endswith(".safetensors") for name in others)
    found = f"{'only pickled weights' if pickled else 'weights'} ({', '.join(others[:3])})"
    why = ", which can run code" if pickled else ", which no index names"
    return (
        f"{found}{why}, and {wanted} is needed; convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
    )


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
        folder = fetch(config, ("config.json", ADAPTER))
    except InputError:
        shipped = SHAPES / place.replace("/", "--")
        if (shipped / "config.json").is_file():
            return shipped
        raise
    _check_model(config, folder)
    return folder


def read_model_config(folder: Path, remedy: str = "save the model again") -> dict[str, Any]:
    """Read ``config.json`` as a dict.

    Raises
    ------
    InputError
        It is not a JSON object, larger than `LARGEST` bytes, or nests deeper than `DEEPEST` levels.
    """
    path = folder / "config.json"
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: {size:,} bytes, a configuration has at most {LARGEST:,}; {remedy}")
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(tree).__name__}; {remedy}")
    if _nests_deeper(tree, DEEPEST):
        raise InputError(f"{path}: nests deeper than {DEEPEST} levels; {remedy}")
    return tree


def _nests_deeper(tree: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other more than so many levels deep."""
    level: list[Any] = [tree]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def quantized_by(folder: Path, tree: dict[str, Any]) -> str | None:
    """How a model's weights were quantized before, or None if they were not.

    Parameters
    ----------
    folder : Path
        Its files are looked at too: some tools write what they did beside ``config.json``.
    tree : dict
        ``config.json``, or a part of it; what it nests, such as ``text_config``, counts.

    Returns
    -------
    str or None
        Such as ``gptq, 4 bits``.
    """
    beside = (QUANTIZED_FILES[name] for name in QUANTIZED_FILES if (folder / name).is_file())
    return _quantized(tree) or next(beside, None)


def _quantized(tree: dict[str, Any]) -> str | None:
    for key in QUANTIZED:
        if said := tree.get(key):
            return _method(said) if isinstance(said, dict) else str(said)
    parts = (_quantized(part) for part in tree.values() if isinstance(part, dict))
    return next((method for method in parts if method is not None), None)


def _method(said: dict[str, Any]) -> str:
    bits = said.get("bits", said.get("w_bit"))
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        bits = 4 if said.get("load_in_4bit") else 8
    method = str(said.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in said else "unknown"))
    return f"{method}, {bits} bits" if bits else method


def describe_origin(config: ModelConfig) -> str:
    """What a GGUF's values were rounded to, in a line; empty for any other model."""
    place = resolve_model(config)
    if not isinstance(place, Path) or place.is_dir():
        return ""
    from tinyonn.dense.gguf_folder import describe_gguf

    return describe_gguf(place)


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
    files |= set(weight_files(folder))
    with Bar("hashing the model", sum(path.stat().st_size for path in files), "B") as bar:
        digest = sha256 if known is None else _Remembered(known).digest
        prints = {}
        for path in sorted(files):
            prints[path.name] = digest(path)
            bar.add(path.stat().st_size)
    if folder.parent.name == "snapshots":
        prints["commit"] = folder.name
    return prints


def _gguf_digest(path: Path) -> str:
    from tinyonn.dense.gguf_folder import cache_folder

    return _Remembered(cache_folder() / "digests.json").digest(path)


class _Remembered:
    """Digests of files, remembered as long as size and time of change stay."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, Any] = read_derived(memory) or {}

    def digest(self, path: Path) -> str:
        state = path.stat()
        key, mark = str(path.resolve()), [state.st_size, state.st_mtime_ns]
        entry = self._known.get(key)
        if isinstance(entry, dict) and entry.get("mark") == mark and _is_sha256(entry.get("sha256")):
            return str(entry["sha256"])
        self._known[key] = {"mark": mark, "sha256": sha256(path)}
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._memory, self._known)
        return str(self._known[key]["sha256"])


def _is_sha256(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
