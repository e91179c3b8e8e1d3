"""What a run must be resumed with: refused where it differs, and what was there is left as it is."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyonn.config import Config, ModelConfig
from tinyonn.corpus.corpus import Corpus, prepare_corpus
from tinyonn.corpus.growth import Earlier
from tinyonn.dense.load import fingerprint_model, load_tokenizer
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.places import local_folder
from tinyonn.store.manifest import Manifest
from tinyonn.store.repository import Store

LOG = logging.getLogger(__name__)


def identity_of(config: Config) -> dict[str, Any]:
    """What a run must be resumed with, but for the corpus."""
    record, model = config.record, config.model
    return {
        "model": fingerprint_model(model),
        "config": {
            "quantization": model.quantization,
            "dtype": model.dtype,
            "threads": record.threads,
            "calibration": record.calibration,
        },
        "seed": record.seed,
        "max_live": record.max_live,
    }


def check_same(folder: Path, stored: Manifest, config: Config, identity: dict[str, Any]) -> None:
    """Refuse to go on with something else; what `identity` leaves out is not compared."""
    size = config.record.segment
    kept = ("data", "slices", "parameters", "grown")
    rest = {name: getattr(stored, name) for name in kept}
    segment = stored.segment_size if size == "auto" else size
    now = Manifest(**{**rest, **identity}, segment_size=segment)
    if differences := stored.differences(now):
        raise InputError(
            f"{folder} was begun with something else: {'; '.join(differences)}; "
            "give it what it was begun with, or record into another run"
        )


def corpus_of_run(folder: Path, config: Config, identity: dict[str, Any], stored: Manifest | None) -> Corpus:
    """Tokenise or reuse the corpus; a run that has begun keeps its own where another one is refused.

    The corpus of such a run may have grown: `Corpus.begins_with` the run's then.

    Call it with the run's lock held: what a killed process left half done is removed.
    """
    path = folder / "corpus.arrow"
    kept = folder / "corpus.kept"
    if kept.exists():  # killed while it tokenised something else
        kept.replace(path)
    for scratch in folder.glob(f"{path.name}.*"):
        scratch.unlink()
    if stored is not None:
        with suppress(OSError):  # no corpus there, or a disk without links: it is tokenised anew when needed
            os.link(path, kept)
    try:
        damage = _damage(path)
        earlier = None if stored is None or damage is not None else _earlier(path, stored)
        corpus = prepare_corpus(config, load_tokenizer(config.model), path, earlier)
        if stored is not None and not corpus.begins_with(str(stored.data.get("corpus"))):
            if damage is not None:
                raise _not_again(damage)
            data = {"data": {"corpus": corpus.fingerprint}, "slices": corpus.slices}
            check_same(folder, stored, config, identity | data)
    except BaseException:
        if kept.exists():
            kept.replace(path)
        raise
    finally:
        kept.unlink(missing_ok=True)
    return corpus


def recorded_corpus(folder: Path, config: Config, stored: Manifest) -> Corpus:
    """Open the corpus that was recorded; where its file is gone it is tokenised anew. Never written over.

    Parameters
    ----------
    folder : Path
        Of the run.
    config : Config
        As the run was recorded.
    stored : Manifest

    Raises
    ------
    InputError
        What is there, or what the configuration makes, is another corpus.
    StoreDamagedError
        What is there is damaged, and what the configuration makes is another corpus.
    """
    path = folder / "corpus.arrow"
    recorded = str(stored.data.get("corpus"))
    there = path.exists()
    if there and (damage := _damage(path)) is not None:
        return _tokenised_again(path, config, recorded, damage)
    corpus = Corpus(path) if there else prepare_corpus(config, load_tokenizer(config.model), path)
    if corpus.fingerprint == recorded:
        return corpus
    if there and corpus.begins_with(recorded):
        raise InputError(
            f"{path}: the corpus has grown and what is new is not recorded yet; run `tinyonn record` again"
        )
    if not there:
        path.unlink()
    remedy = (
        "put back the file, as a corpus that has grown cannot be tokenised anew"
        if stored.grown
        else "delete the file and give the configuration that the run was recorded with"
        if there
        else "give the configuration that the run was recorded with"
    )
    raise InputError(
        f"{path} has the fingerprint {corpus.fingerprint[:12]} and the corpus that was recorded had "
        f"{recorded[:12]}; {remedy}"
    )


def _damage(path: Path) -> StoreDamagedError | None:
    """What is wrong with the bytes of a corpus, if it is there."""
    try:
        Corpus(path).check()
    except InputError:  # none there, or of another version
        return None
    except StoreDamagedError as error:
        return error
    return None


def _tokenised_again(path: Path, config: Config, recorded: str, damage: StoreDamagedError) -> Corpus:
    """The corpus in place of a damaged file, if it comes out the same."""
    LOG.warning("%s; it is made anew now", str(damage).partition("; ")[0])
    side = path.with_name(f"{path.name}.again")
    try:
        if prepare_corpus(config, load_tokenizer(config.model), side).fingerprint != recorded:
            raise _not_again(damage)
        side.replace(path)
    finally:
        side.unlink(missing_ok=True)
    return Corpus(path)


def _not_again(damage: StoreDamagedError) -> StoreDamagedError:
    return StoreDamagedError(
        f"{str(damage).partition('; ')[0]}, and what the data and the configuration give now is another corpus; put "
        "the file back from a copy, or give what the run was recorded with (a corpus that has grown cannot be "
        "tokenised anew)"
    )


def _earlier(path: Path, stored: Manifest) -> Earlier | None:
    """The corpus that the run was begun with, if it is there still."""
    try:
        corpus = Corpus(path)
    except InputError:
        return None
    fingerprint = stored.data.get("corpus")
    if not isinstance(fingerprint, str) or not corpus.begins_with(fingerprint):
        return None
    return Earlier(corpus, fingerprint, stored.slices)


def check_base(store: Store, location: str, model: ModelConfig) -> dict[str, Any]:
    """Refuse a base model that is not the recorded one; its fingerprint.

    Raises
    ------
    InputError
        Names the first difference and both values.
    """
    manifest = store.manifest
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
