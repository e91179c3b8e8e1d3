"""What a router read and chose along a sequence, kept with the call's cache; saved beside exported models.

A router reads tokens, and a cache holds none. Both what was read and what was chosen are therefore an attribute of the
cache: sequences in two caches know nothing of each other, a copy of a cache goes its own way, and whatever is done to a
cache's rows and tokens (beams that change places, rejected candidates) is done to these as well.
"""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import torch

ATTRIBUTE = "_tinyonn_routing"


class Routing:
    """A router's choices along a sequence: on the prompt, and again every so many tokens.

    The gates of a token are a function of the tokens up to the latest choice before it, however many are run at once.

    Attributes
    ----------
    ids : int64 [batch, tokens] or float [batch, tokens, hidden], optional
        Tokens in the cache, as far as they were seen; their embeddings if these were given.
    prompt : int
        Tokens that the first choice reads.
    gates : tensor, optional
        Of the latest tokens.
    """

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.prompt = 0
        self.gates: torch.Tensor | None = None
        self._chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by tokens read: they, their gates

    def along(self, ids: torch.Tensor, past: int, embed: Any = None) -> torch.Tensor:
        """All tokens of the sequence when `ids` follow `past` tokens of a cache, [batch, past + tokens].

        Parameters
        ----------
        ids : int64 [batch, tokens] or float [batch, tokens, hidden]
        past : int
        embed : callable, optional
            From tokens to embeddings, for a sequence that has both.

        Raises
        ------
        ValueError
            The cache holds tokens that were never seen here.
        """
        if past == 0:
            return ids
        if self.ids is None or self.ids.shape[:2] != (ids.shape[0], past):
            seen = "none" if self.ids is None else list(self.ids.shape)
            raise ValueError(
                f"the router has to see the {past} tokens in the cache but saw {seen}; "
                "pass gates=, or run the prompt with this model first"
            )
        parts = [self.ids.to(ids.device), ids]
        if len({part.is_floating_point() for part in parts}) == 2:
            parts = [part if part.is_floating_point() else embed(part).detach() for part in parts]
        return torch.cat(parts, 1)

    def shown(self, ids: torch.Tensor, past: int, tokens: int) -> bool:
        """Whether `ids`, of which the last are run now, are the whole sequence.

        A cache may hold more than that: what an adapter has put before the first token.
        """
        seen = 0 if self.ids is None else self.ids.shape[1]
        return ids.shape[1] - tokens in (past, seen)

    def choose(
        self,
        router: Any,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        past: int,
        tokens: int,
        every: int | None,
    ) -> torch.Tensor:
        """Gates of the tokens past : past + tokens of a sequence, [batch, experts], or, if a choice falls among them,
        [batch, tokens, experts].

        Parameters
        ----------
        router : module
            ``forward(input_ids, attention_mask) -> gates [batch, experts]``.
        ids : int64 [batch, at least past + tokens]
            The sequence, or the whole prompt of which a part is run.
        mask : [batch, tokens], optional
        past, tokens : int
            In the cache, and run now.
        every : int, optional
            Generated tokens between two choices; None is one choice.
        """
        lengths = range(past + 1, past + tokens + 1)
        reads = [self._read(length, every) for length in (lengths if tokens > 1 else [past + 1])]
        chosen = {read: self._gates(router, ids[:, :read], mask) for read in sorted(set(reads))}
        self.ids = ids[:, : past + tokens].detach()
        self._chosen = {
            read: (ids[:, :read], gates) for read, gates in chosen.items() if not gates.requires_grad
        }
        if len(chosen) == 1:
            return chosen[reads[0]]
        return torch.stack([chosen[read] for read in reads], 1)

    def _read(self, length: int, every: int | None) -> int:
        """Tokens that the gates of the last of so many follow from."""
        if every is None or length <= self.prompt:
            return self.prompt
        return self.prompt + (length - self.prompt) // every * every

    def _gates(self, router: Any, prefix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        read = prefix.shape[1]
        if read in self._chosen and torch.equal(self._chosen[read][0], prefix):
            return self._chosen[read][1]
        gates: torch.Tensor = router(prefix, None if mask is None or mask.dim() != 2 else mask[:, :read])
        return gates

    # What is done to the cache

    def crop(self, removed: int) -> None:
        """Drop so many of the last tokens."""
        self.ids = None if self.ids is None else self.ids[:, : self.ids.shape[1] - removed]

    def select(self, rows: torch.Tensor) -> None:
        """Take these rows instead, in this order."""
        self._chosen = {}
        if self.ids is not None:
            self.ids = self.ids.index_select(0, rows.to(self.ids.device))

    def repeat(self, times: int) -> None:
        """Put every row there so many times."""
        self._chosen = {}
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(times, 0)

    def clear(self) -> None:
        """Nothing was read."""
        self.ids, self.prompt, self.gates, self._chosen = None, 0, None, {}


class _Followed:
    """In front of a cache's own class: what changes rows or tokens of the cache changes those of its `Routing`."""

    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        getattr(self, ATTRIBUTE).select(beam_idx)

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        getattr(self, ATTRIBUTE).select(indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        getattr(self, ATTRIBUTE).repeat(repeats)

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        before = int(self.get_seq_length())
        super().crop(*args, **kwargs)  # type: ignore[misc]
        getattr(self, ATTRIBUTE).crop(before - int(self.get_seq_length()))

    def reset(self: Any) -> None:
        super().reset()  # type: ignore[misc]
        getattr(self, ATTRIBUTE).clear()

    def __reduce__(self) -> Any:
        return _remade, (type(self).__mro__[2],), self.__dict__


@cached
def _followed(kind: Any) -> Any:
    """The class of a cache, followed; by the same name."""
    return type(kind.__name__, (_Followed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _remade(kind: type) -> Any:
    followed = _followed(kind)
    return followed.__new__(followed)


def follow(cache: Any, routing: Routing) -> Routing:
    """Make a `Routing` the cache's; gives it back."""
    if not isinstance(cache, _Followed):
        cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]
    setattr(cache, ATTRIBUTE, routing)
    return routing


def routing_of(cache: Any, new: Routing | None = None) -> Routing:
    """The `Routing` of a cache; if it has none, or without a cache, a new one."""
    routing = getattr(cache, ATTRIBUTE, None)
    if isinstance(routing, Routing):
        return routing
    routing = Routing() if new is None else new
    return routing if cache is None else follow(cache, routing)


def follow_result(result: Any, routing: Routing) -> None:
    """Make a `Routing` that of the cache in a model's result, if there is one."""
    parts = result.values() if isinstance(result, dict) else result
    cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
    if cache is not None:
        follow(cache, routing)
