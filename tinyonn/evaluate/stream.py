"""Perplexity of a stream of tokens, as the papers on pruning and quantization report that of WikiText-2.

The text of a file becomes tokens in one go, with the special tokens that the tokenizer adds by itself. The tokens are
cut into windows of ``n`` that follow one another without overlap; what is left at the end is dropped. In each window
the model predicts the ``n - 1`` tokens after the first, from those of the window alone:
``perplexity = exp(1/N Σ -ln p(token))`` over the N predicted tokens of all windows (GPTQ, Frantar et al. 2022,
arXiv:2210.17323; so SparseGPT and Wanda).

The text is taken as it is: nothing is detokenised, no line is left out. The papers take the raw test split
(``wikitext-2-raw-v1``), its lines joined by an empty line; so rows of a Parquet or JSONL file with a column ``text``
are joined here. The tokenised form, with ``<unk>`` and ``@-@`` in it, gives other figures, which compare with each
other alone.

A sparse model with a router chooses for a window by the last tokens of the window before it; for the first one, before
which nothing is known, the experts of the largest prior are on. So all models are measured on the same tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyonn.corpus.files import UNPACKING, content_of, file_rows, opened
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.evaluate.loss import token_losses

ROWS = ("json", "parquet", "arrow")
BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class Stream:
    """Tokens of a file.

    Attributes
    ----------
    name : str
        Of the file.
    ids_T : int64 [tokens]
    digest : str
        Of the tokens.
    """

    name: str
    ids_T: torch.Tensor
    digest: str


@dataclass(frozen=True)
class StreamLoss:
    """What a model says of a stream.

    Attributes
    ----------
    nats : float
        Mean over the predicted tokens.
    error : float
        Standard error of it over windows; NaN of one window.
    windows, tokens : int
        Windows, and tokens predicted in them.
    """

    nats: float
    error: float
    windows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """Of the mean; infinite beyond what a float holds."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


def read_stream(path: Path, tokenizer: Any) -> Stream:
    """Read a text, packed or not, or the column ``text`` of rows, and make one row of tokens of it.

    Raises
    ------
    InputError
        It is not there or cannot be read, or holds no text.
    """
    try:
        text = _text(path)
    except (*UNPACKING, UnicodeDecodeError) as error:
        raise InputError(
            f"--stream {path} cannot be read ({error}); give a text in UTF-8, plain or packed"
        ) from None
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise InputError(f"--stream {path} holds {len(ids)} tokens; give a longer text")
    ids_T = torch.tensor(ids, dtype=torch.int64)
    return Stream(path.name, ids_T, hashlib.blake2b(ids_T.numpy().tobytes(), digest_size=16).hexdigest())


def _text(path: Path) -> str:
    if content_of(path) in ROWS:
        rows = [row for _, row in file_rows(path, ["text"])]
        texts = [row["text"] for row in rows if isinstance(row, dict) and isinstance(row.get("text"), str)]
        if len(texts) != len(rows):
            raise InputError(
                f"--stream {path}: {len(rows) - len(texts):,} of its rows have no text; give a column `text`"
            )
        return BETWEEN_ROWS.join(texts)
    with opened(path) as file:
        return file.read().decode("utf-8")


def windows_of(stream: Stream, length: int, limit: int | None = None) -> torch.Tensor:
    """The stream's windows, int64 [windows, length]; the first ones if there is a limit.

    Raises
    ------
    InputError
        Not one window is full.
    """
    count = len(stream.ids_T) // length
    if not count:
        raise InputError(
            f"--stream {stream.name} has {len(stream.ids_T):,} tokens, below one window of {length:,}; give a longer "
            "text or smaller --windows"
        )
    windows_WT = stream.ids_T[: count * length].view(count, length)
    return windows_WT if limit is None else windows_WT[:limit]


@torch.no_grad()
def stream_loss(
    model: Any, windows_WT: torch.Tensor, experts: int | None = None, tell: Callable[[], None] = lambda: None
) -> StreamLoss:
    """Loss of a model on windows of a stream, one at a time.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal; sparse or not.
    windows_WT : int64 [windows, tokens]
    experts : int, optional
        On for a window, by the model's router.
    tell : callable
        Called after each window.
    """
    head = head_of(model)
    device = head.weight.device
    means: list[float] = []
    before_T: torch.Tensor | None = None
    for window_T in windows_WT:
        ids_BT = window_T[None].to(device)
        options = {} if experts is None else {"gates": _gates(model, before_T, experts, device)}
        (hidden_BTH,) = decoder_states(model, ids_BT, layers=False, **options)
        means.append(float(token_losses(head, hidden_BTH[:, :-1], ids_BT[:, 1:]).double().mean()))
        before_T = window_T[-PROMPT_TOKENS:]
        tell()
    mean = math.fsum(means) / len(means)
    spread = math.fsum((one - mean) ** 2 for one in means)
    error = math.sqrt(spread / (len(means) - 1) / len(means)) if len(means) > 1 else math.nan
    return StreamLoss(mean, error, len(means), len(means) * (windows_WT.shape[1] - 1))


def _gates(model: Any, before_T: torch.Tensor | None, experts: int, device: torch.device) -> torch.Tensor:
    """Gates of a window by the tokens before it, float32 [1, E]; without any those of the largest prior."""
    if before_T is not None:
        gates_BE: torch.Tensor = model.router.choose(
            model.router.logits(before_T[None].to(device)), experts
        ).gates_BE
        return gates_BE
    prior_E = torch.tensor(model.config.expert_prior, device=device)
    gates_E = torch.zeros_like(prior_E, dtype=torch.float32)
    gates_E[prior_E.argsort(descending=True, stable=True)[:experts]] = 1
    return gates_E[None]
