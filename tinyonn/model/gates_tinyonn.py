"""Which experts are on, and how strongly: gates as a user gives them become what every layer reads.

A gate is a float for each expert; the core's, appended here, is 1. Gates are [experts] for all that is run,
[batch, experts] for each sample (prompt) or [batch, tokens, experts] for each token. Saved beside exported models.

Shape suffixes: R rows (samples, or tokens of all samples), E experts, G groups (experts and the core).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Pattern:
    """Gates that some rows share.

    Attributes
    ----------
    gates_G : float32 [groups]
    key : bytes, optional
        Tells patterns apart; None for gates that need a gradient, of which nothing is kept.
    """

    gates_G: torch.Tensor
    key: bytes | None


@dataclass(frozen=True)
class Active:
    """The gates of one forward pass, sorted out once and read by every layer.

    Attributes
    ----------
    gates_RG : float32 [rows, groups]
    patterns : list of Pattern
        The first goes for all rows if `rows` is empty. None at all: `gates_RG` are learned and per sample, or per
        token and too many.
    rows : list of int64 [n]
        Rows of each pattern.
    per_token : bool
        Rows are tokens, not samples.
    value_gates_RG : float32 [1 or rows, groups], optional
        What the values' gradients are multiplied by instead of the gates.
    once : bool
        No pass goes on from this one: of several patterns nothing is kept.
    """

    gates_RG: torch.Tensor
    patterns: list[Pattern]
    rows: list[torch.Tensor] = field(default_factory=list)
    per_token: bool = False
    value_gates_RG: torch.Tensor | None = None
    once: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all rows share one pattern."""
        return len(self.patterns) == 1 and not self.rows


def read_gates(
    gates: torch.Tensor | Sequence[Any], experts: int, name: str = "gates", dimensions: int = 3
) -> torch.Tensor:
    """Gates as given by a user, checked.

    Parameters
    ----------
    gates : float [experts], [batch, experts] or [batch, tokens, experts]
    experts : int
    name : str
        For messages.
    dimensions : int
        At most.

    Returns
    -------
    float32, same shape

    Raises
    ------
    ValueError
        Another shape, or values that are negative or not finite.
    """
    given = torch.as_tensor(gates)
    if not 1 <= given.dim() <= dimensions or given.shape[-1] != experts:
        shapes = [f"[{experts}]", f"[batch, {experts}]", f"[batch, tokens, {experts}]"][:dimensions]
        raise ValueError(
            f"{name} of shape {list(given.shape)} do not fit {experts} experts; give "
            f"{', '.join(shapes[:-1])} or {shapes[-1]} (the core has no gate, it is always on)"
        )
    given = given.float()
    wrong = ~((given >= 0) & (given < torch.inf))
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        value = given[tuple(place)].item()
        raise ValueError(
            f"{name}: the gate at {place} is {value}; a gate is a finite number from 0 on, 0 is off"
        )
    return given


def activate(gates: torch.Tensor, batch: int, tokens: int, value_gates: torch.Tensor | None = None) -> Active:
    """Sort gates into patterns for an input of so many samples and tokens.

    Parameters
    ----------
    gates : float32, checked by `read_gates`
    batch, tokens : int
    value_gates : float32 [experts] or [batch, experts], optional
        For the gradients of values; checked likewise.

    Returns
    -------
    Active

    Raises
    ------
    ValueError
        Gates for another number of samples or tokens.
    """
    active = _sorted(gates, batch, tokens)
    if value_gates is None:
        return active
    _check_fit(value_gates, batch, tokens)
    if gates.dim() == 3 and gates.shape[1] > 1:
        raise ValueError("value_gates do not go with gates per token; give gates per sample")
    return replace(active, value_gates_RG=_with_core(torch.atleast_2d(value_gates)))


def _with_core(gates_RE: torch.Tensor) -> torch.Tensor:
    return torch.cat([gates_RE, gates_RE.new_ones(len(gates_RE), 1)], 1)


def _sorted(gates: torch.Tensor, batch: int, tokens: int) -> Active:
    _check_fit(gates, batch, tokens)
    per_token = gates.dim() == 3 and gates.shape[1] > 1
    gates = gates.squeeze(1) if gates.dim() == 3 and not per_token else gates
    if per_token:
        gates = gates.expand(batch, -1, -1).flatten(0, 1)
    gates_RG = _with_core(torch.atleast_2d(gates))
    learned = gates.requires_grad and torch.is_grad_enabled()
    if len(gates_RG) == 1:
        return Active(gates_RG, [_pattern(gates_RG[0], learned)])
    if learned and not per_token:  # a batch of weights, not some patterns
        return Active(gates_RG, [])
    if learned:  # equal rows may need different gradients
        count, which = len(gates_RG), torch.arange(len(gates_RG), device=gates.device)
        distinct_PG = gates_RG
    else:
        distinct_PG, which = gates_RG.unique(dim=0, return_inverse=True)
        count = len(distinct_PG)
    if count == 1:
        return Active(gates_RG, [_pattern(distinct_PG[0], learned)])
    if count > gates_RG.shape[1] and per_token:
        return Active(gates_RG, [], [], per_token)
    patterns = [_pattern(gates_G, learned) for gates_G in distinct_PG]
    rows = [(which == number).nonzero().squeeze(1) for number in range(count)]
    return Active(gates_RG, patterns, rows, per_token)


def _check_fit(gates: torch.Tensor, batch: int, tokens: int) -> None:
    if gates.dim() > 1 and gates.shape[0] not in (1, batch):
        raise ValueError(
            f"gates for {gates.shape[0]} samples do not fit a batch of {batch}; "
            "give one row for each sample, or gates of one dimension for all"
        )
    if gates.dim() == 3 and gates.shape[1] not in (1, tokens):
        raise ValueError(
            f"gates for {gates.shape[1]} tokens do not fit an input of {tokens}; give one row for each token "
            "of the input (with a cache, of the new tokens), or gates per sample"
        )


def _pattern(gates_G: torch.Tensor, learned: bool) -> Pattern:
    return Pattern(gates_G, None if learned else gates_G.detach().cpu().numpy().tobytes())


@dataclass
class Call:
    """A call of ``generate``.

    Attributes
    ----------
    gates : float32 [experts] or [1, experts], optional
        For all that it runs.
    tokens : int, optional
        Of the prompt.
    routing : Any
        The router's choices where there is no cache.
    prompt : (ids, mask), optional
        The whole prompt while it is read chunk by chunk.
    """

    gates: torch.Tensor | None
    tokens: int | None
    routing: Any
    prompt: tuple[torch.Tensor, torch.Tensor | None] | None = None


class _Thread(threading.local):
    """What a thread is at with a model; a copy of the model is at nothing."""

    active: Active | None = None
    call: Call | None = None

    def __reduce__(self) -> Any:
        return _Thread, ()


class Switch:
    """What all sparse layers of a model share: the forced path and, thread by thread, the gates of the pass that runs.

    Parameters
    ----------
    config : TinyONNConfig
        Its stated rule gives the gates when nothing else does.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.path: str = config.forward_path
        self._thread = _Thread()
        self._latest: tuple[Any, Active] | None = None

    def active(self, device: torch.device) -> Active:
        """The gates of this pass; those of the rule outside a pass."""
        return self._thread.active or self.sorted(self.rule(device), 1, 1)

    def rule(self, device: torch.device) -> torch.Tensor:
        """Gates of the stated rule, float32 [experts]."""
        gates_E = torch.zeros(self.config.experts, device=device)
        gates_E[self.config.chosen_experts] = 1
        return gates_E

    def sorted(
        self, gates: torch.Tensor, batch: int, tokens: int, value_gates: torch.Tensor | None = None
    ) -> Active:
        """`activate`, not repeated while the gates stay the same, as they do from token to token."""
        if gates.requires_grad or gates.dim() == 3 or value_gates is not None:
            return activate(gates, batch, tokens, value_gates)
        latest = self._latest
        if latest is not None:
            known, active = latest
            if known.shape == gates.shape and known.device == gates.device and torch.equal(known, gates):
                _check_fit(gates, batch, tokens)
                return active
        active = activate(gates, batch, tokens)
        self._latest = (gates.detach().clone(), active)
        return active

    @contextlib.contextmanager
    def use(self, active: Active | None) -> Iterator[None]:
        """Gates of what runs inside."""
        before, self._thread.active = self._thread.active, active
        try:
            yield
        finally:
            self._thread.active = before

    @property
    def now(self) -> Active | None:
        """Gates of the pass that runs, None outside."""
        return self._thread.active

    @contextlib.contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """The call of ``generate`` that runs inside."""
        before, self._thread.call = self._thread.call, call
        try:
            yield
        finally:
            self._thread.call = before

    @property
    def call(self) -> Call | None:
        """The call of ``generate`` that runs, None outside."""
        return self._thread.call
