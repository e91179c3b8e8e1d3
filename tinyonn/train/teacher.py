"""What the student learns from: the dense model as it runs, or its likeliest tokens kept on disk.

`Live` runs the dense model on every batch and gives its hidden states, from which the head makes logits. `Cached` reads
the K largest log-probabilities of every labelled token, which `cache_teacher` has written once: a step then costs no
forward pass of the teacher, but there are no hidden states to compare.

The cache is a folder of safetensors, one part for so many samples, named by what decides their bits (corpus, model, K);
each part is written beside and renamed, so that a killed call goes on with the next part.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tinyonn.corpus.file import Corpus, Sample
from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.head import Head, head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.experts.shards import write_tensors
from tinyonn.files import read_json, write_json
from tinyonn.model.digests_tinyonn import check_files
from tinyonn.show.progress import Bar
from tinyonn.train.data import Batch, collate

LOG = logging.getLogger(__name__)
PART = 64  # samples of a part of the cache
HEAD_BYTES = 64 << 20  # of logits held at a time, in float32


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch; either the first two or the last two are there.

    Attributes
    ----------
    hidden : tuple of Tensor [B, T, H]
        What every layer puts out, the last of them normed, as the head reads it; empty from a cache.
    head : Head, optional
    indices_BTK : int64 [B, T - 1, K], optional
        The likeliest next tokens at every labelled place.
    logprobs_BTK : float32 [B, T - 1, K], optional
    """

    hidden: tuple[torch.Tensor, ...] = ()
    head: Head | None = None
    indices_BTK: torch.Tensor | None = None
    logprobs_BTK: torch.Tensor | None = None


class Live:
    """The dense model, run on every batch without gradients.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Frozen.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.head = head_of(model)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Hidden states of a batch."""
        device = self.head.weight.device
        with torch.no_grad():
            hidden = decoder_states(self.model, batch.ids_BT.to(device))
        return TeacherOutput(hidden, self.head)


class Cached:
    """The K likeliest tokens at every labelled place, read from disk.

    Parameters
    ----------
    folder : path
        Written by `cache_teacher`.

    Raises
    ------
    InputError
        There is no complete cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.about = read_json(self.folder / "teacher.json", "run the same command again")
            paths = sorted(self.folder.glob("part-*.safetensors"))
            check_files(paths)
            self._parts = [_open(path) for path in paths]
        except (OSError, ValueError, SafetensorError, StoreDamagedError) as error:
            raise InputError(
                f"{folder} holds no teacher cache that can be read ({error}); make it anew"
            ) from None
        if len(self._parts) != self.about["parts"]:
            raise InputError(
                f"{folder} has {len(self._parts)} of {self.about['parts']} parts of the teacher's cache; "
                "run the same command again, it goes on where it ended"
            )
        self._places: dict[int, tuple[int, int, int]] = {}
        for number, part in enumerate(self._parts):
            ends = part.get_tensor("ends").tolist()
            indexes = part.get_tensor("indexes").tolist()
            starts = [0, *ends[:-1]]
            for index, start, end in zip(indexes, starts, ends, strict=True):
                self._places[index] = (number, start, end)

    @property
    def vocabulary(self) -> int:
        """Rows of the teacher's head."""
        return int(self.about["vocabulary"])

    def __call__(self, batch: Batch) -> TeacherOutput:
        """The likeliest tokens of a batch."""
        k = self.about["k"]
        shape = (len(batch), batch.ids_BT.shape[1] - 1, k)
        indices_BTK = torch.zeros(shape, dtype=torch.int64)
        logprobs_BTK = torch.full(shape, -torch.inf)
        for row, index in enumerate(batch.indexes):
            if index not in self._places:
                raise InputError(f"sample {index} is not in the teacher's cache {self.folder}; make it anew")
            number, start, end = self._places[index]
            labelled = batch.labels_BT[row, 1:].cpu() != UNLABELLED
            indices_BTK[row, labelled] = self._parts[number].get_slice("indices")[start:end].long()
            logprobs_BTK[row, labelled] = self._parts[number].get_slice("logprobs")[start:end].float()
        device = batch.ids_BT.device
        return TeacherOutput((), None, indices_BTK.to(device), logprobs_BTK.to(device))


Teacher = Live | Cached


def cache_key(corpus: Corpus, model: str, k: int) -> str:
    """Name of a cache: a digest of the corpus's and the model's fingerprints and of K."""
    return hashlib.sha256(json.dumps([corpus.fingerprint, model, k]).encode()).hexdigest()[:16]


def cache_teacher(
    teacher: Live,
    corpus: Corpus,
    folder: str | Path,
    model: str,
    k: int,
    tell: Callable[[int, int], None] | None = None,
) -> Cached:
    """Write the teacher's likeliest tokens for all of a corpus; may be killed at any moment and called again."""
    if not 1 <= k <= teacher.vocabulary:
        raise InputError(
            f"teacher top-k = {k}; from 1 to {teacher.vocabulary} tokens, the vocabulary, can be kept"
        )
    target = Path(folder) / cache_key(corpus, model, k)
    target.mkdir(parents=True, exist_ok=True)
    places = [(name, place) for name, count in corpus.slices.items() for place in range(count)]
    starts = range(0, len(places), PART)
    with Bar("caching the teacher", len(starts), "parts") as bar:
        for number, start in enumerate(starts):
            path = target / f"part-{number:06d}.safetensors"
            if path.exists() and _is_whole(path):
                bar.skip(1)
            else:
                samples = [corpus.sample(*place) for place in places[start : start + PART]]
                write_tensors(path, _part(teacher, samples, k), {"format": "pt"})
                bar.add()
            if tell is not None:
                tell(number + 1, len(starts))
    about = {"parts": len(starts), "k": k, "vocabulary": teacher.vocabulary, "model": model}
    write_json(target / "teacher.json", about)
    return Cached(target)


def _part(teacher: Live, samples: list[Sample], k: int) -> dict[str, torch.Tensor]:
    indices, logprobs, ends = [], [], []
    end = 0
    for sample in samples:
        batch = collate([sample])
        hidden_TH = teacher(batch).hidden[-1][0, :-1]
        wanted_TH = hidden_TH[batch.labels_BT[0, 1:].to(hidden_TH.device) != UNLABELLED]
        for some in chunks(wanted_TH, teacher.head):
            top = log_probabilities(teacher.head, some).topk(k)
            indices.append(top.indices.int().cpu())
            logprobs.append(top.values.half().cpu())
        end += len(wanted_TH)
        ends.append(end)
    return {
        "indexes": torch.tensor([sample.index for sample in samples]),
        "ends": torch.tensor(ends),
        "indices": torch.cat(indices),
        "logprobs": torch.cat(logprobs),
    }


def chunks(hidden_TH: torch.Tensor, head: Any, bytes_: int = HEAD_BYTES) -> Iterator[torch.Tensor]:
    """Tokens in parts whose logits do not take more than `bytes_` in float32."""
    yield from hidden_TH.split(max(16, bytes_ // (4 * head.weight.shape[0])))


@torch.no_grad()
def log_probabilities(head: Any, hidden_TH: torch.Tensor) -> torch.Tensor:
    """Of the next token, float32 [T, V]."""
    logs: torch.Tensor = head(hidden_TH).float().log_softmax(-1)
    return logs


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Make sure that both read text as the same tokens."""
    one, other = vocabulary_digest(student), vocabulary_digest(teacher)
    if one != other:
        raise InputError(
            f"student and teacher have different vocabularies ({len(student.get_vocab())} tokens, {one[:8]}; "
            f"{len(teacher.get_vocab())} tokens, {other[:8]}), so their logits do not mean the same; "
            "train with the dense model that the experts were cut from"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's tokens and their numbers."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a part is what was written; warns if it is not."""
    try:
        check_files([path])
    except ValueError as error:
        LOG.warning("%s: it is made again", str(error).rpartition(";")[0])
        return False
    return True


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")
