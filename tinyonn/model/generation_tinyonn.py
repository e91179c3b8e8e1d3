"""Gates along a sequence, in ``generate`` and in passes by hand; saved beside exported models.

Prompts may be read in chunks, sequences be searched, drafted by another model or gone on with from a cache: the experts
of a token are those that decoding token by token would have chosen for it.

A router reads tokens, and a cache holds none. Both what was read and what was chosen are therefore an attribute of the
cache: sequences in two caches know nothing of each other, a copy of a cache goes its own way, and whatever is done to a
cache's rows and tokens (beams that change places, rejected candidates) is done to these as well.
"""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import torch
from transformers import GenerationMixin

from .gates_tinyonn import Call, read_gates
from .router_tinyonn import PromptRouter

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


class TinyONNGenerationMixin(GenerationMixin):
    """What ``generate`` asks of a model with gates."""

    def generate(self, *args: Any, gates: Any = None, **kwargs: Any) -> Any:
        """As in ``transformers``; `gates` as in `forward`, one row for each prompt."""
        chosen = self._given() if gates is None else read_gates(gates, self.config.experts)
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        call = Call(None, None if prompt is None else prompt.shape[-1], Routing())
        if chosen is not None and (chosen.dim() == 1 or len(chosen) == 1):
            call.gates = chosen
        elif chosen is not None:  # sampled and searched with: one row for each prompt becomes several
            kwargs["gates"] = chosen
        with self.switch.calling(call):
            return super().generate(*args, **kwargs)

    def _prefill(self, input_ids: torch.Tensor, settings: Any, kwargs: dict[str, Any], **options: Any) -> Any:
        """As in ``transformers``; a router sees the whole of a prompt that is read in chunks."""
        call, cache = self.switch.call, kwargs.get("past_key_values")
        if self.router is None or call is None or cache is None or settings.prefill_chunk_size is None:
            return super()._prefill(input_ids, settings, kwargs, **options)
        mask = kwargs.get("attention_mask")
        past = int(cache.get_seq_length())
        new = mask is not None and mask.shape[1] == past + input_ids.shape[1]
        whole = routing_of(cache).along(input_ids, past, self.get_input_embeddings()) if new else input_ids
        call.prompt = whole, mask
        try:
            return super()._prefill(input_ids, settings, kwargs, **options)
        finally:
            call.prompt = None

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """As in ``transformers``, with the router's gates, which depend on the whole sequence."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if self.router is None or inputs.get("gates") is not None or self._given() is not None:
            return inputs
        if inputs.get("input_ids") is None:
            return inputs
        tokens, cache, call = inputs["input_ids"].shape[1], kwargs.get("past_key_values"), self.switch.call
        past = 0 if cache is None else int(cache.get_seq_length())
        routing = routing_of(cache, None if call is None else call.routing)
        ids, mask = input_ids, kwargs.get("attention_mask")
        if call is not None and call.prompt is not None:
            ids, mask = call.prompt
        elif not routing.shown(ids, past, tokens):  # what the cache began with was not given again
            ids = routing.along(ids[:, -tokens:], past, self.get_input_embeddings())
        if kwargs.get("is_first_iteration") or (cache is not None and past == 0) or not routing.prompt:
            candidates = 0  # of assisted decoding: behind the prompt
            if call is not None and call.tokens is not None and call.prompt is None:
                candidates = max(0, input_ids.shape[1] - call.tokens)
            routing.prompt = ids.shape[1] - candidates
        chunk = call is not None and call.prompt is not None
        inputs["gates"] = self._route(routing, ids, mask, past if chunk else ids.shape[1] - tokens, tokens)
        return inputs

    def _given(self) -> torch.Tensor | None:
        """Gates of this call of `generate`, or of the model."""
        call = self.switch.call
        given: torch.Tensor | None = self._gates if call is None or call.gates is None else call.gates
        return given

    def _route(
        self, routing: Routing, ids: torch.Tensor, attention_mask: Any, past: int, tokens: int
    ) -> torch.Tensor:
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        assert self.router is not None
        gates = routing.choose(self.router, ids, mask, past, tokens, self.config.reroute_every)
        routing.gates = read_gates(gates, self.config.experts)
        return routing.gates

    def _routed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        past: int,
        routing: Routing,
    ) -> torch.Tensor:
        """Gates of a pass by hand: the first tokens in a cache are the prompt."""
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if given.is_floating_point() and not isinstance(self.router, PromptRouter):
            raise ValueError("the router reads input_ids but inputs_embeds are given; pass gates= too")
        ids = routing.along(given, past, self.get_input_embeddings())
        if past == 0 or past < routing.prompt:
            routing.prompt = ids.shape[1]
        return self._route(routing, ids, attention_mask, past, given.shape[1])

    def _check_length(
        self, past: int, tokens: int, attention_mask: Any, position_ids: torch.Tensor | None, cache: Any
    ) -> None:
        length, context = past + tokens, getattr(self.config.base_config, "max_position_embeddings", None)
        if context is not None and length > context:
            if position_ids is not None and position_ids.dim() == 2:  # padding takes no position
                length = int(position_ids.max()) + 1
            elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                length = int(attention_mask.sum(1).max())
            if length > context:
                raise ValueError(
                    f"{length} tokens do not fit the model's context of {context} (max_position_embeddings); "
                    "give a shorter prompt or fewer max_new_tokens"
                )
        for layer in getattr(cache, "layers", ()):
            room = getattr(layer, "max_cache_len", None)
            if room is not None and not layer.is_sliding and past + tokens > room:
                raise ValueError(
                    f"{past + tokens} tokens do not fit a cache of {room} (max_cache_len); "
                    "make a larger cache, or give fewer tokens"
                )
