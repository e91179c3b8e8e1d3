"""What assembly and evaluation share: the recorded base model, what selection is asked for, searched shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyonn.config import ExpertsConfig, ModelConfig
from tinyonn.dense.source import fingerprint_model
from tinyonn.errors import InputError
from tinyonn.experts.options import SelectOptions
from tinyonn.experts.source import digest
from tinyonn.files import damaged, read_json
from tinyonn.places import local_folder
from tinyonn.run import Run

ALLOCATION = "allocation.json"  # in the run's folder: what `tinyonn evaluate --allocate` measured and found


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
        within="tensor" if config.by == "need" and config.within == "cell" else config.within,
        balance=config.balance,
        core=config.core,
        core_by=config.core_by,
        allocation="given" if given else "global" if auto else config.allocation,
        shares=given,
        seed=config.seed,
    )


def searched_shares(run: Run, location: str, budget: float) -> Mapping[str, float]:
    """Shares by tensor that `tinyonn evaluate --allocate` found for a budget; empty if there are none."""
    return all_searched_shares(run, location).get(budget, {})


def all_searched_shares(run: Run, location: str) -> dict[float, dict[str, float]]:
    """By budget the shares by tensor that `tinyonn evaluate --allocate` found."""
    return stored_shares(local_folder(location), run.store.reader().stage("rows"))


def stored_shares(folder: Path, scored: Any) -> dict[float, dict[str, float]]:
    """By budget the shares by tensor that were found last; empty if nothing was searched.

    Parameters
    ----------
    folder : Path
        Of the run.
    scored : dict
        Attributes of its rows; what was searched on others counts for nothing.
    """
    path = folder / ALLOCATION
    tree = read_allocation(path) if path.exists() else {}
    if tree.get("scored") != digest(scored):
        return {}
    return {item["budget"]: item["found"]["shares"] for item in tree["found"]}


def read_allocation(path: Path) -> dict[str, Any]:
    """A file of found allocations.

    Raises
    ------
    StoreDamagedError
        It is not what was written, or holds shares that cannot be; names it.
    """
    remedy = "delete it and search again"
    tree = read_json(path, remedy)
    try:
        shares = [share for item in tree["found"] for share in dict(item["found"]["shares"]).values()]
        odd = [share for share in shares if not 0 < float(share) <= 1]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"it is no allocation: {error!r}", remedy) from None
    if odd:
        raise damaged(path, f"it gives a tensor the share {odd[0]}, beyond 0 to 1", remedy)
    return tree
