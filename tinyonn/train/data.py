"""What the model is trained on: the batch of a step is a pure function of the corpus, the seed and the step.

Samples come in a new permutation every epoch, one epoch after the other without a seam; permutations are of all
slices together, so that batches mix them. A *window* is what 16 batches take from that stream: within it samples of
like length share a batch, which saves padding, and the batches stand in a random order. So the batch of any step can
be made without those before it, whoever asks, and resuming needs no state.

Random numbers come from Philox, keyed by the seed and by what they are for.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tinyonn.corpus.file import Corpus, Sample
from tinyonn.corpus.tokens import PROMPT_TOKENS, UNLABELLED, prompt_length
from tinyonn.errors import InputError

WINDOW = 16  # batches within which samples of like length are put together


@dataclass(frozen=True)
class Batch:
    """Samples padded at the end: in a causal model no token sees what stands behind it.

    Attributes
    ----------
    ids_BT : int64 [B, T]
        0 where a sample has ended.
    labels_BT : int64 [B, T]
        -100 where nothing is labelled. Not shifted.
    lengths_B : int64 [B]
        Tokens of each sample.
    prompts_B : int64 [B]
        Tokens from which a sample's gates are chosen, `prompt_lengths`.
    indexes : tuple of int
        Rows of the source.
    slices : tuple of str
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    lengths_B: torch.Tensor
    prompts_B: torch.Tensor
    indexes: tuple[int, ...]
    slices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indexes)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        ids_BT, labels_BT = self.ids_BT.to(device), self.labels_BT.to(device)
        lengths_B, prompts_B = self.lengths_B.to(device), self.prompts_B.to(device)
        return Batch(ids_BT, labels_BT, lengths_B, prompts_B, self.indexes, self.slices)

    @property
    def mask_BT(self) -> torch.Tensor:
        """Which places hold a sample's own tokens, bool [B, T]."""
        places = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return places[None] < self.lengths_B[:, None]

    def rows(self, chosen: Sequence[int]) -> Batch:
        """Some of the samples, padded no longer than they need."""
        longest = int(self.lengths_B[list(chosen)].max())
        return Batch(
            self.ids_BT[list(chosen), :longest],
            self.labels_BT[list(chosen), :longest],
            self.lengths_B[list(chosen)],
            self.prompts_B[list(chosen)],
            tuple(self.indexes[row] for row in chosen),
            tuple(self.slices[row] for row in chosen),
        )

    def prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that gates are chosen from, int64 [B, P], and which of them are a sample's own, bool [B, P]."""
        longest = int(self.prompts_B.max())
        mask_BP = torch.arange(longest, device=self.ids_BT.device)[None] < self.prompts_B[:, None]
        return self.ids_BT[:, :longest], mask_BP

    def targets(self, prompts: bool = False) -> torch.Tensor:
        """The token that each place predicts, int64 [B, T - 1]; -100 where it does not count.

        Parameters
        ----------
        prompts : bool
            Labelled tokens of the prompt count too. The gates were chosen by someone who has seen them.
        """
        next_BT = self.labels_BT[:, 1:].clone()
        if not prompts:
            places = torch.arange(1, self.labels_BT.shape[1], device=next_BT.device)
            next_BT[places[None] < self.prompts_B[:, None]] = UNLABELLED
        return next_BT


def prompt_lengths(
    labels_BT: torch.Tensor, lengths_B: torch.Tensor, limit: int = PROMPT_TOKENS
) -> torch.Tensor:
    """Tokens of each sample from which its gates are chosen, int64 [B].

    All before the first labelled one where a sample begins unlabelled, as a chat does; of a text, which is labelled
    throughout, the first `limit`, at most half.
    """
    if limit < 1:
        raise InputError(f"prompt_tokens = {limit}; gates are chosen from at least 1 token")
    rows = zip(labels_BT.numpy(), lengths_B.tolist(), strict=True)
    return torch.tensor([prompt_length(labels_T[:length], limit) for labels_T, length in rows])


def collate(samples: Sequence[Sample], prompt_tokens: int = PROMPT_TOKENS) -> Batch:
    """Pad samples to the longest of them."""
    longest = max(sample.input_ids.size for sample in samples)
    ids = np.zeros((len(samples), longest), np.int64)
    labels = np.full((len(samples), longest), UNLABELLED, np.int64)
    for row, sample in enumerate(samples):
        ids[row, : sample.input_ids.size] = sample.input_ids
        labels[row, : sample.labels.size] = sample.labels
    labels_BT = torch.from_numpy(labels)
    lengths_B = torch.tensor([sample.input_ids.size for sample in samples])
    return Batch(
        torch.from_numpy(ids),
        labels_BT,
        lengths_B,
        prompt_lengths(labels_BT, lengths_B, prompt_tokens),
        tuple(sample.index for sample in samples),
        tuple(sample.slice for sample in samples),
    )


def held_out_batches(
    samples: Sequence[Sample], *, tokens: int = 2048, prompt_tokens: int = PROMPT_TOKENS
) -> list[Batch]:
    """Samples of like lengths together, for `tinyonn.evaluate.loss`; the same batches for any order of the samples.

    Parameters
    ----------
    samples : sequence of Sample
    tokens : int
        Of a batch at most, padding counted; a longer sample is a batch alone.
    prompt_tokens : int
        As of `prompt_lengths`.

    Raises
    ------
    InputError
        No sample has a labelled token after its prompt.
    """
    kept = [sample for sample in samples if (collate([sample], prompt_tokens).targets() >= 0).any()]
    if not kept:
        raise InputError(
            f"none of the {len(samples)} samples has a labelled token after its prompt of up to {prompt_tokens} "
            "tokens; give longer texts, or a smaller prompt_tokens"
        )
    groups: list[list[Sample]] = []
    for sample in sorted(kept, key=lambda sample: (-sample.input_ids.size, sample.slice, sample.index)):
        if not groups or (len(groups[-1]) + 1) * groups[-1][0].input_ids.size > tokens:
            groups.append([])
        groups[-1].append(sample)
    return [collate(group, prompt_tokens) for group in groups]


class Order:
    """Which samples a step takes.

    Parameters
    ----------
    corpus : Corpus
    batch : int
        Samples of a step, all workers together.
    seed : int
    places : sequence of (str, int), optional
        Slices and positions to take samples from; all of the corpus by default.
    prompt_tokens : int
        As of `prompt_lengths`.

    Raises
    ------
    InputError
        No samples, or a batch below 1.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch: int,
        seed: int,
        places: Sequence[tuple[str, int]] | None = None,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> None:
        if batch < 1:
            raise InputError(f"train.batch = {batch}; a step takes at least 1 sample")
        self.corpus, self.batch, self.seed = corpus, batch, seed
        self.prompt_tokens = prompt_tokens
        every = [(name, place) for name, count in corpus.slices.items() for place in range(count)]
        self.places = every if places is None else list(places)
        if not self.places:
            raise InputError(f"{corpus.path}: no samples to train on; record or profile some first")
        self._epoch = lru_cache(maxsize=2)(self._permutation)
        self._window = lru_cache(maxsize=2)(self._sorted_window)

    def step(self, step: int) -> Batch:
        """The whole batch of a step, longest sample first, the same for every worker."""
        samples = self._window(step // WINDOW)[step % WINDOW]
        return collate(samples, self.prompt_tokens)

    def _sorted_window(self, number: int) -> list[list[Sample]]:
        first = number * WINDOW * self.batch
        samples = [self._sample(place) for place in range(first, first + WINDOW * self.batch)]
        order = sorted(range(len(samples)), key=lambda row: (-samples[row].input_ids.size, row))
        batches = [
            [samples[row] for row in order[n : n + self.batch]] for n in range(0, len(order), self.batch)
        ]
        turns = generator(self.seed, "windows", number).permutation(WINDOW)
        return [batches[turn] for turn in turns]

    def _sample(self, place: int) -> Sample:
        """What stands at a place of the endless stream of epochs."""
        epoch, within = divmod(place, len(self.places))
        name, position = self.places[int(self._epoch(epoch)[within])]
        return self.corpus.sample(name, position)

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return generator(self.seed, "epochs", epoch).permutation(len(self.places))


def generator(seed: int, what: str, number: int) -> np.random.Generator:
    """Random numbers for one purpose and one step (or epoch): what is drawn elsewhere does not change them."""
    words = np.random.SeedSequence([seed, zlib.crc32(what.encode()), number]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def share(batch: Batch, rank: int, world: int) -> list[int]:
    """Rows of a batch that one of `world` workers takes: every so many, so that lengths are spread evenly."""
    return list(range(rank, len(batch), world))
