"""A causal language model's head: from the decoder's hidden states to its logits, with what stands around the product.

    logits = cap * tanh(scale / cap * W (before * hidden))        without a cap: scale * W (before * hidden)

`before` is 1 for most (MiniCPM divides what its head reads), `scale` is Granite's and Cohere's, `cap` is Gemma's soft
cap on the final logits. All three are found by running the model's own ``forward`` with a stand-in for its decoder and
for its head, which takes no weights: whatever the model does to its logits is seen here, under any name in its
configuration, and what is not of this form is refused. Autograd does the chain rule behind the head's product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tinyonn.errors import InputError

PROBE_WIDTH = 1e6  # of the logits at which a soft cap is read off
CLOSE = 1e-5


@dataclass(frozen=True)
class Head:
    """Hidden states in, logits out; see the module's equation.

    Attributes
    ----------
    module : torch.nn.Module
        The output embeddings, [vocabulary, H].
    before : float
        On what the module reads.
    scale : float
        On what it gives.
    cap : float or None
        Bound of the logits.
    """

    module: Any
    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Of the output embeddings."""
        weight: torch.Tensor = self.module.weight
        return weight

    @property
    def plain(self) -> bool:
        """Whether the logits are the product itself."""
        return self.scale == 1 and self.cap is None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., H]."""
        return self.finish(self.module(self.read(hidden)))

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output embeddings read of the decoder's output, same shape."""
        return hidden if self.before == 1 else hidden * self.before

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """Logits of the output embeddings' product, same shape and dtype."""
        if self.scale != 1:
            product = product * self.scale
        return product if self.cap is None else torch.tanh(product / self.cap) * self.cap


def head_of(model: Any) -> Head:
    """Find a model's head.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, dense or sparse, loaded or on the meta device.

    Raises
    ------
    InputError
        It has none, or does something else to its hidden states or logits.
    """
    model = getattr(model, "base", model) if hasattr(model, "sparse_layers") else model
    name, module = type(model).__name__, model.get_output_embeddings()
    if module is None:
        raise InputError(
            f"{name} has no output embeddings that transformers knows, so its head cannot be told from the rest; "
            "choose a causal language model with one head"
        )
    out, width = module.weight.shape
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, width, generator=noise, dtype=torch.float64)
    product = _probe(int(out))
    try:
        read, logits = _outer(model, module, hidden, product)
    except Exception as error:  # of the model's own code, which met a stand-in where it wants its own modules
        raise InputError(
            f"{name} does more between its decoder and its head than a product, which cannot be recorded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); {REMEDY}"
        ) from None
    before = _factor(hidden, read)
    if before is None:
        raise InputError(
            f"{name} changes the hidden states before its head, which cannot be recorded; {REMEDY}"
        )
    found = _form(product, logits)
    if found is None:
        raise InputError(
            f"{name} changes its logits after the head by neither a scale nor a soft cap, which cannot be recorded; "
            f"{REMEDY}"
        )
    return Head(module, before, *found)


REMEDY = "use a model whose logits are its head's output, scaled or soft-capped, such as Llama, Qwen3, Gemma or Granite"


def _probe(vocabulary: int) -> torch.Tensor:
    """Logits that a head might give, float64 [1, 2, vocabulary]: small and large ones of both signs."""
    values = torch.cat(
        [
            torch.tensor([1e-3, PROBE_WIDTH, -PROBE_WIDTH], dtype=torch.float64),
            torch.linspace(-150, 150, 61, dtype=torch.float64),
        ]
    )
    line = values.repeat(2 * vocabulary // len(values) + 1)[: 2 * vocabulary]
    return line.view(1, 2, vocabulary)


def _outer(
    model: Any, module: Any, hidden: torch.Tensor, product: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads and the logits that come out, with `hidden` of the decoder and `product` of the head."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """Whatever else a decoder may give, such as a router's logits, is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    seen: list[torch.Tensor] = []

    def head(given: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(given)
        return product.clone()

    def decoder(*_: Any, **__: Any) -> Any:
        return Output(last_hidden_state=hidden.clone())

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(_instead(module, head))
        for part in {id(part): part for part in (model.base_model, model.get_decoder())}.values():
            stack.enter_context(_instead(part, decoder))
        logits = (
            type(model).forward(model, input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        )
    if len(seen) != 1:
        raise ValueError(f"its head is called {len(seen)} times in a forward pass")
    return seen[0], logits


@contextlib.contextmanager
def _instead(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Run a function in the place of a module, without its hooks."""
    own = module.__dict__.get("forward")
    hooks = module._forward_hooks, module._forward_pre_hooks
    module._forward_hooks, module._forward_pre_hooks = type(hooks[0])(), type(hooks[1])()
    module.forward = forward
    try:
        yield
    finally:
        module._forward_hooks, module._forward_pre_hooks = hooks
        if own is None:
            del module.forward
        else:
            module.forward = own


def _factor(given: torch.Tensor, found: torch.Tensor) -> float | None:
    """The number that all values were multiplied by, if there is one."""
    if found.is_meta or found.shape != given.shape:
        return None
    factor = float(found.double().flatten()[0] / given.flatten()[0])
    wanted = given * factor
    return _round(factor) if torch.allclose(found.double(), wanted, rtol=CLOSE, atol=0) else None


def _form(product: torch.Tensor, logits: torch.Tensor) -> tuple[float, float | None] | None:
    """Scale and cap of logits, if they have this form."""
    if logits.is_meta or logits.shape != product.shape:
        return None
    scale = _factor(product, logits)
    if scale is not None:
        return scale, None
    logits = logits.double()
    line, cap = logits.flatten(), float(logits.max())
    if not 0 < cap < PROBE_WIDTH:
        return None
    scale = float(line[0] / product.flatten()[0])
    wanted = torch.tanh(product * scale / cap) * cap
    close = torch.allclose(logits, wanted, rtol=CLOSE, atol=CLOSE * cap)
    return (_round(scale), _round(cap)) if close else None


def _round(value: float) -> float:
    """Without the noise of a product in float32."""
    near = float(f"{value:.7g}")
    inverse = 1 / float(f"{1 / value:.7g}") if value else near
    return (
        min(near, inverse, key=lambda one: abs(one - value))
        if abs(near - value) < 1e-6 * abs(value)
        else value
    )
