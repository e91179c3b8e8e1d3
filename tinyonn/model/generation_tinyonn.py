"""``generate`` with a router: gates follow from the whole sequence, however that is run; saved beside models.

Prompts may be read in chunks, sequences be searched, drafted by another model or gone on with from a cache: the experts
of a token are those that decoding token by token would have chosen for it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from .gates_tinyonn import Call, read_gates
from .routing_tinyonn import Routing, routing_of


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
