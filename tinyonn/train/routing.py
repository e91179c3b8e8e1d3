"""Which experts are on in a step, the router's own losses, and what the profile wants of it.

Every worker routes the whole batch: the router is small, so that costs less than to exchange what balance and capacity
need of all samples, and the choice is the same everywhere. Gradients of the router's own losses come out `world` times
over and are divided by that; those of the gates come from a worker's own samples alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyonn.corpus.file import Corpus, Int64
from tinyonn.corpus.growth import as_digests, content_digest, match_keys
from tinyonn.errors import InputError
from tinyonn.train import losses
from tinyonn.train.data import Batch, generator
from tinyonn.train.losses import profile_targets
from tinyonn.train.options import LossWeights, RoutingOptions
from tinyonn.train.stages import Growth
from tinyonn.train.student import Student

if TYPE_CHECKING:
    from tinyonn.profile.profile import Profile


@dataclass(frozen=True)
class Routed:
    """The choice for a batch.

    Attributes
    ----------
    gates_BE : float32 [B, E]
        With the router's graph.
    active_BE : bool [B, E]
    probabilities_BE : float32 [B, E]
    load_E : int64 [E]
        Samples that chose each expert; experts that are always on have none.
    loss : Tensor []
        Weighted sum of the router's own losses, means over samples.
    parts : dict of str to float
        Those losses unweighted, and the entropy of the probabilities, nats.
    """

    gates_BE: torch.Tensor
    active_BE: torch.Tensor
    probabilities_BE: torch.Tensor
    load_E: torch.Tensor
    loss: torch.Tensor
    parts: dict[str, float]


def drawn_ks(
    options: RoutingOptions, seed: int, step: int, samples: int, experts: int, growth: Growth | None = None
) -> torch.Tensor | None:
    """Experts on for each sample, int64 [B]; None leaves it to the router's rule."""
    if not options.ks:
        return None
    counts = [k or experts for k in options.ks]
    choices = torch.tensor([growth.of(k, experts) if growth else k for k in counts])
    return choices[torch.from_numpy(generator(seed, "ks", step).integers(0, len(choices), samples))]


def choose_experts(
    student: Student,
    batch: Batch,
    step: int,
    seed: int,
    options: RoutingOptions,
    weights: LossWeights,
    targets: ProfileTargets | None,
    growth: Growth | None = None,
) -> Routed:
    """Route a whole batch."""
    router, samples, experts = student.router, len(batch), student.experts
    ks = drawn_ks(options, seed, step, samples, experts, growth)
    noise = dropped = None
    if options.noise > 0:
        drawn = generator(seed, "noise", step).standard_normal((samples, experts), "float32")
        noise = torch.from_numpy(drawn) * options.noise
    if options.dropout > 0:
        dropped = torch.from_numpy(generator(seed, "dropout", step).random(experts) < options.dropout)
    choice = student.route(batch, ks, noise, dropped, options.capacity)
    return _measured(choice, router, batch, weights, targets)


def _measured(
    choice: Any, router: Any, batch: Batch, weights: LossWeights, targets: ProfileTargets | None
) -> Routed:
    p_BE, logits, options = choice.probabilities_BE, choice.logits, router.options
    free_E = torch.ones(p_BE.shape[1], dtype=torch.bool, device=p_BE.device)
    free_E[list(options.shared)] = False
    load_E = choice.active_BE.sum(0) * free_E
    # Experts that are always on count as evenly loaded, else all probability would flee to them.
    mean_load = load_E.sum() / free_E.sum().clamp(min=1)
    share_E = losses.shares(torch.where(free_E, load_E.double(), mean_load.double()))
    found = {
        "balance": losses.balance(p_BE, share_E).mean,
        "z": losses.z_loss(logits.main_BN).mean + losses.z_loss(logits.sub_BE, options.branches).mean,
    }
    if targets is not None:
        known, targets_RE = targets.of(batch)
        if known:
            found["profile"] = losses.profile_kl(targets_RE.to(p_BE.device), p_BE[known]).mean
    loss = torch.stack([getattr(weights, name) * value for name, value in found.items()]).sum()
    parts = {name: float(value.detach()) for name, value in found.items()}
    entropy = -torch.xlogy(p_BE.detach(), p_BE.detach().clamp(min=1e-30)).sum(1).mean()
    parts["gate_entropy"] = float(entropy)
    return Routed(choice.gates_BE, choice.active_BE, p_BE, load_E, loss, parts)


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
        """Slices and positions of the profiled samples in a corpus."""
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
    """Find the profiled samples in a corpus: by position where it has grown from theirs, else by their tokens."""
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
            f"none of the {len(places)} profiled samples is in {corpus.path.name}, which is trained on; "
            "add what was recorded to train.data"
        )
    indexes = np.array([corpus.sample(*every[place]).index for place in found.tolist()], np.int64)
    return np.where(found >= 0, indexes, -1)


def _digests(corpus: Corpus, places: Iterable[tuple[str, int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    samples = (corpus.sample(*place) for place in places)
    return as_digests(b"".join(content_digest(sample.input_ids, sample.labels) for sample in samples))
