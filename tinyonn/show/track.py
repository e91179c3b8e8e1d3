"""Metrics to TensorBoard or to a W&B-compatible tracker, when the configuration asks for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError
from tinyonn.show.escape import visible

if TYPE_CHECKING:
    from tinyonn.config import TrackConfig

UNFIT = re.compile(r"[/\\#?%:]")  # in an id of W&B's


class Tracker:
    """Sends scalars to every tracker that the configuration names; to none by default.

    Parameters
    ----------
    config : TrackConfig
    folder : Path
        The run's folder; TensorBoard's event files go to ``folder/metrics``.
    name : str
        The run's name.

    Raises
    ------
    InputError
        A tracker is asked for and its package is not installed.
    """

    def __init__(self, config: TrackConfig, folder: Path, name: str) -> None:
        self._writer: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "track.tensorboard = true needs the package: pip install 'tiny-onn[track]'"
                ) from None
            self._writer = SummaryWriter(str(folder / "metrics"))
        if config.wandb is not None:
            try:
                import wandb
            except ImportError:
                raise InputError(
                    f"track.wandb = {config.wandb!r} needs the package: pip install 'tiny-onn[track]'"
                ) from None
            self._wandb = wandb.init(
                project=config.wandb,
                name=visible(name),
                dir=str(folder),
                resume="allow",
                id=UNFIT.sub("-", visible(name)),
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars by name, at a step counted in samples."""
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(visible(key), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
