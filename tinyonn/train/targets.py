"""What the profile says of the samples of a batch: which experts mattered for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyonn.corpus.file import Corpus, Int64
from tinyonn.corpus.growth import as_digests, content_digest, match_keys
from tinyonn.errors import InputError
from tinyonn.train.data import Batch
from tinyonn.train.losses import profile_targets

if TYPE_CHECKING:
    from tinyonn.profile.profile import Profile

Float32 = np.ndarray[Any, np.dtype[np.float32]]


class ProfileTargets:
    """Targets of the router, by sample.

    Parameters
    ----------
    indexes : sequence of int
        Rows of the source, one of each profiled sample.
    contribution_SE : float32 [S, E]
        Sum of |w g| of every expert on every sample; the core left out.
    sharpness : float
        As of `profile_targets`.
    per_E : float [E], optional
        What contributions are divided by: an expert's weights, so that what does most for its size is wanted first; or
        its mean over samples, so that it is wanted where it does more than usual. Without it the largest come first.

    Raises
    ------
    InputError
        No samples.
    """

    def __init__(
        self,
        indexes: Sequence[int],
        contribution_SE: Float32,
        sharpness: float = 1.0,
        per_E: np.ndarray[Any, Any] | None = None,
    ) -> None:
        if not len(indexes):
            raise InputError("the profile has no samples; run `tinyonn profile` first")
        contribution = torch.from_numpy(np.ascontiguousarray(contribution_SE))
        divisor_E = None if per_E is None else torch.from_numpy(np.asarray(per_E, np.float64))
        self._targets_SE = profile_targets(contribution, sharpness, divisor_E)
        self._rows = {int(index): row for row, index in enumerate(indexes)}

    @property
    def experts(self) -> int:
        """That the targets are over."""
        return int(self._targets_SE.shape[1])

    def of(self, batch: Batch) -> tuple[list[int], torch.Tensor]:
        """Rows of a batch that were profiled, and their targets, float32 [rows, E]."""
        known = [row for row, index in enumerate(batch.indexes) if index in self._rows]
        return known, self._targets_SE[[self._rows[batch.indexes[row]] for row in known]]

    def places(self, corpus: Corpus) -> list[tuple[str, int]]:
        """Slices and positions of the profiled samples in a corpus.

        Raises
        ------
        InputError
            The corpus has none of them.
        """
        found = []
        for name, count in corpus.slices.items():
            for position in range(count):
                if corpus.sample(name, position).index in self._rows:
                    found.append((name, position))
                if len(found) == len(self._rows):
                    return found
        if not found:
            raise InputError(
                f"none of the {len(self._rows)} profiled samples is in {corpus.path}; profile this run again"
            )
        return found


def find_profiled(profile: Profile, recorded: Path, corpus: Corpus) -> Int64:
    """Find the profiled samples in a corpus: by their positions where it has grown from theirs, else by their tokens.

    Parameters
    ----------
    profile : Profile
    recorded : Path
        The corpus that was profiled, or one that has grown from it.
    corpus : Corpus
        What is trained on.

    Returns
    -------
    int64 [S]
        Index of each sample in `corpus`; -1 where it is not there.

    Raises
    ------
    InputError
        None of them is there, or `recorded` is another corpus.
    """
    places = list(zip(profile.slices, profile.positions.tolist(), strict=True))
    if corpus.begins_with(profile.manifest.corpus):
        return np.array([corpus.sample(*place).index for place in places], np.int64)
    known = Corpus(recorded)
    if not known.begins_with(profile.manifest.corpus):
        raise InputError(
            f"{recorded.parent / 'profile'} is a profile of another corpus than {recorded.name} is now; "
            "run `tinyonn profile` with --fresh"
        )
    every = [(name, place) for name, count in corpus.slices.items() for place in range(count)]
    found = match_keys(_digests(known, places), _digests(corpus, every))
    if not (found >= 0).any():
        raise InputError(
            f"none of the {len(places)} profiled samples is in {corpus.path.name}, which is trained on; set "
            "train.warm_start: 0 and train.loss.profile: 0, or add what was recorded to train.data"
        )
    indexes = np.array([corpus.sample(*every[place]).index for place in found.tolist()], np.int64)
    return np.where(found >= 0, indexes, -1)


def _digests(corpus: Corpus, places: Iterable[tuple[str, int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    samples = (corpus.sample(*place) for place in places)
    return as_digests(b"".join(content_digest(sample.input_ids, sample.labels) for sample in samples))
