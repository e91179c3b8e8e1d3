"""Which experts are on, and how strongly: gates as a user gives them become what every layer reads.

A gate is a float for each expert; the core's, appended here, is 1. Gates are [experts] for all that is run,
[batch, experts] for each sample (prompt) or [batch, tokens, experts] for each token. Saved beside exported models.

Shape suffixes: R rows (samples, or tokens of all samples), E experts, G groups (experts and the core).
"""

from __future__ import annotations

import contextlib
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
    """

    gates_RG: torch.Tensor
    patterns: list[Pattern]
    rows: list[torch.Tensor] = field(default_factory=list)
    per_token: bool = False
    value_gates_RG: torch.Tensor | None = None

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


class Switch:
    """What all sparse layers of a model share: the gates of the pass that is run now, and the forced path.

    Parameters
    ----------
    config : TinyONNConfig
        Its stated rule gives the gates when nothing else does.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.path: str = config.forward_path
        self._active: Active | None = None
        self._latest: tuple[Any, Active] | None = None

    def active(self, device: torch.device) -> Active:
        """The gates of this pass; those of the rule outside a pass."""
        return self._active or self.sorted(self.rule(device), 1, 1)

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
        if self._latest is not None:
            known, active = self._latest
            if known.shape == gates.shape and known.device == gates.device and torch.equal(known, gates):
                _check_fit(gates, batch, tokens)
                return active
        active = activate(gates, batch, tokens)
        self._latest = (gates.detach().clone(), active)
        return active

    @contextlib.contextmanager
    def use(self, active: Active | None) -> Iterator[None]:
        """Gates of what runs inside."""
        before, self._active = self._active, active
        try:
            yield
        finally:
            self._active = before

    @property
    def now(self) -> Active | None:
        """Gates of the pass that runs, None outside."""
        return self._active


class Routing:
    """A router's choices along a sequence: on the prompt, and again every so many tokens.

    The gates are a function of the tokens up to the latest choice, so that a beam that takes another's place gets
    the gates that belong to its own tokens.
    """

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self._prompt = 0
        self._chosen: tuple[torch.Tensor, torch.Tensor] | None = None

    def along(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """All tokens of the sequence when `ids` follow `past` tokens of a cache, int64 [batch, past + tokens].

        Raises
        ------
        ValueError
            The cache holds tokens that were never seen here.
        """
        if past == 0:
            return ids
        if self.ids is None or self.ids.shape != (ids.shape[0], past):
            seen = "none" if self.ids is None else list(self.ids.shape)
            raise ValueError(
                f"the router has to see the {past} tokens in the cache but saw {seen}; "
                "pass gates=, or run the prompt with this model first"
            )
        return torch.cat([self.ids.to(ids.device), ids], 1)

    def choose(
        self, router: Any, ids: torch.Tensor, mask: torch.Tensor | None, first: bool, every: int | None
    ) -> torch.Tensor:
        """Gates per prompt [batch, experts] for a sequence as far as it goes.

        Parameters
        ----------
        router : module
            ``forward(input_ids, attention_mask) -> gates [batch, experts]``.
        ids : int64 [batch, tokens]
            The whole sequence.
        mask : [batch, tokens], optional
        first : bool
            The sequence is the prompt.
        every : int, optional
            Generated tokens between two choices.
        """
        self.ids = ids.detach()
        length = ids.shape[1]
        if first:
            self._prompt, self._chosen = length, None
        seen = length if every is None else self._prompt + (length - self._prompt) // every * every
        seen = self._prompt if every is None else seen
        prefix = ids[:, :seen]
        if self._chosen is not None and torch.equal(self._chosen[0], prefix):
            return self._chosen[1]
        gates: torch.Tensor = router(prefix, None if mask is None or mask.dim() != 2 else mask[:, :seen])
        self._chosen = None if gates.requires_grad else (prefix, gates)
        return gates
