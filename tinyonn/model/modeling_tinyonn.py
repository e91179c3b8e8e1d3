"""A causal language model whose linear layers are sums of sparse experts, a few of them on at a time.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with model.gates([1.0, 0.0, 0.5]):
        model.generate(**tokenizer(text, return_tensors="pt"))

Attention, norms, embeddings, head and caches are the base architecture's own, from ``transformers``. Without gates
the router decides, and without a router the rule in ``config.gate_rule``. This file is saved beside exported models,
with those it imports.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .configuration_tinyonn import GATE_RULE, PATHS, ROUTER_RULE, RouterOptions, TinyONNConfig
from .digests_tinyonn import seal_file
from .gates_tinyonn import Switch, read_gates
from .generation_tinyonn import TinyONNGenerationMixin, follow_result, routing_of
from .linear_tinyonn import ExpertLinear, TinyONNExpert, swap
from .router_tinyonn import PromptRouter
from .shards_tinyonn import ASSEMBLY, check_finite, check_index, check_shards

Gates = torch.Tensor | Sequence[Any]


def _sparse(module: Any) -> ExpertLinear:
    """A sparse layer, also where an adapter's layer has been put around it."""
    while not isinstance(module, ExpertLinear):
        module = module.base_layer
    return module


class _Backbone:
    """The base without its head, under the model's gates, for trainers that fuse head and loss."""

    def __init__(self, model: TinyONNForCausalLM) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.base, name)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        gates: Gates | None = None,
        value_gates: Gates | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        model = self._model
        active, _ = model._prepare(**given, cache=past_key_values, gates=gates, value_gates=value_gates)
        with model.switch.use(active):
            return model.base.get_decoder()(**given, past_key_values=past_key_values, **kwargs)


class TinyONNForCausalLM(PreTrainedModel, TinyONNGenerationMixin):
    """The base architecture with sparse layers in the place of its linear ones.

    Attributes
    ----------
    base : PreTrainedModel
        The base's own causal language model.
    router : PromptRouter, another module or None
        ``forward(input_ids, attention_mask) -> gates``, float [batch, k], called on the prompt and again after every
        ``config.reroute_every`` generated tokens.

    Raises
    ------
    ValueError
        The configuration names layers that the base does not have.
    """

    config_class = TinyONNConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012 as transformers declares it
    _supports_sdpa = property(lambda self: _supports(self.config, "sdpa"))
    _supports_flash_attn = property(lambda self: _supports(self.config, "flash_attn"))
    _supports_flex_attn = property(lambda self: _supports(self.config, "flex_attn"))
    _supports_attention_backend = property(lambda self: _supports(self.config, "attention_backend"))

    def __init__(self, config: TinyONNConfig) -> None:
        if config.base_config is None:
            raise ValueError("TinyONNConfig has no base_config; give the base model's config.json")
        super().__init__(config)
        target = torch.get_default_device()
        with torch.device("meta"):
            self.base = AutoModelForCausalLM.from_config(
                config.base_config,
                dtype=torch.get_default_dtype(),
                attn_implementation=config._attn_implementation,
                trust_remote_code=False,
            )
            self.switch = Switch(config)
            swap(self.base, config.sparse_layers, config.experts + 1, self.switch)
        config.base_config = self.base.config
        self.generation_config = self.base.generation_config
        self.router: nn.Module | None = None
        self._gates: torch.Tensor | None = None
        if target.type != "meta":
            self.base.to_empty(device=target)
            for layer in self.sparse_layers.values():
                layer.reset_parameters()
        if config.router is not None:
            self.router = PromptRouter(config.router, self.base)
        self.post_init()

    @property
    def base_model(self) -> Any:
        """What makes the hidden states: called as the base's own, it runs with the gates of a call of the model."""
        return _Backbone(self)

    @property
    def sparse_layers(self) -> dict[str, ExpertLinear]:
        """The sparse layers by their names in the base."""
        return {name: _sparse(self.base.get_submodule(name)) for name in self.config.sparse_layers}

    def expert(self, number: int) -> TinyONNExpert:
        """One expert, or the core, which has the number k.

        Raises
        ------
        ValueError
            No such expert.
        """
        if not 0 <= number <= self.config.experts:
            raise ValueError(
                f"no expert {number}; there are 0 to {self.config.experts - 1}, {self.config.experts} is the core"
            )
        return TinyONNExpert(self, number)

    # Gates and paths

    def set_router(self, options: RouterOptions | Mapping[str, Any] | None, seed: int = 0) -> None:
        """Give the model a new, untrained router, or take it away.

        Parameters
        ----------
        options : RouterOptions or its plain tree, optional
        seed : int
            Of the router's random weights.

        Raises
        ------
        ValueError
            Options that contradict each other, or for another number of experts.
        """
        if options is None:
            self.router, self.config.router, self.config.gate_rule = None, None, GATE_RULE
            return
        options = options if isinstance(options, RouterOptions) else RouterOptions.read(options)
        if options.experts != self.config.experts:
            raise ValueError(
                f"router.branches hold {options.experts} experts but the model has {self.config.experts}; "
                "give branches of this model's experts"
            )
        router = PromptRouter(options, self.base)
        self.router = router.to(self.get_input_embeddings().weight.device)
        router.reset_parameters(seed)
        self.config.router, self.config.gate_rule = options.tree(), ROUTER_RULE

    def set_gates(self, gates: Gates | None) -> None:
        """Use these gates until told otherwise; None goes back to the router or the stated rule.

        Parameters
        ----------
        gates : float [experts], [batch, experts] or [batch, tokens, experts], optional

        Raises
        ------
        ValueError
            Another shape; a value negative or not finite.
        """
        self._gates = None if gates is None else read_gates(gates, self.config.experts)

    @contextlib.contextmanager
    def gates(self, gates: Gates | None) -> Iterator[None]:
        """`set_gates` for what runs inside."""
        before = self._gates
        self.set_gates(gates)
        try:
            yield
        finally:
            self._gates = before

    def set_path(self, path: str) -> None:
        """Force a way to compute: ``dense``, ``sparse``, or ``auto`` for what the cost model finds quickest.

        Raises
        ------
        ValueError
            Not one of these.
        """
        if path not in PATHS:
            raise ValueError(f"path = {path!r}; choose one of {', '.join(PATHS)}")
        self.switch.path = self.config.forward_path = path
        self.forget()

    def forget(self) -> None:
        """Drop the merged and dense weights that inference keeps while gates stay; they come back when needed."""
        for layer in self.sparse_layers.values():
            layer.forget()

    def train(self, mode: bool = True) -> TinyONNForCausalLM:
        """As in Torch; in training nothing is kept for inference."""
        if mode:
            self.forget()
        super().train(mode)
        return self

    # Running

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        gates: Gates | None = None,
        value_gates: Gates | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward pass, with gates.

        Parameters
        ----------
        gates : float [experts], [batch, experts] or [batch, tokens, experts], optional
            Instead of `set_gates`, the router or the stated rule.
        value_gates : float [experts] or [batch, experts], optional
            For training: what the gradients of experts' values are multiplied by instead of `gates`. An expert that is
            off learns where they are not 0, one that is on stays as it is where they are 0.
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep
            As for the base, and so are all others.

        Returns
        -------
        CausalLMOutputWithPast

        Raises
        ------
        ValueError
            Gates that do not fit, or more tokens than the model's context or the cache.
        """
        active, routing = self._prepare(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            gates,
            value_gates,
            use_cache,
        )
        with self.switch.use(active):
            result = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if routing is not None and past_key_values is None:
            follow_result(result, routing)
        return result

    @torch.compiler.disable
    def _prepare(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Any,
        gates: Gates | None,
        value_gates: Gates | None,
        use_cache: bool | None = None,
    ) -> Any:
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds are given; give one of them")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, tokens = given.shape[:2]
        self._check_length(past, tokens, attention_mask, position_ids, cache)
        chosen = self._given() if gates is None else read_gates(gates, self.config.experts)
        if gates is not None and inputs_embeds is not None and gates is routing_of(cache).gates:
            chosen = None  # an adapter has put tokens of its own before those that they are for
        routing = None
        if chosen is None and self.router is not None:
            routing = routing_of(cache)
            chosen = self._routed(input_ids, inputs_embeds, attention_mask, past, routing)
        if chosen is None:
            chosen = self.switch.rule(given.device)
        chosen = chosen.to(given.device)
        taught = None
        if value_gates is not None:
            taught = read_gates(value_gates, self.config.experts, "value_gates", 2).detach().to(given.device)
        active = self.switch.sorted(chosen, batch, tokens, taught)
        goes_on = use_cache is not False or self.switch.call is not None
        return active if goes_on else replace(active, once=True), routing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        switch = self.switch

        def with_gates(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            active = switch.now

            def again(*inner: Any, **named: Any) -> Any:  # runs a second time when the pass is long over
                with switch.use(active):
                    return function(*inner, **named)

            return gradient_checkpointing_func(again, *args, **options)

        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=with_gates, **kwargs)

    # The base's own

    def get_input_embeddings(self) -> Any:
        """Of the base."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the base."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Of the base."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Of the base."""
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        """Of the base."""
        return self.base.get_decoder()

    # Files

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in ``transformers``; a router that no shard holds starts untrained."""
        if isinstance(module, PromptRouter):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in ``transformers``; shards are checked before and their entries after they are read.

        Raises
        ------
        ValueError
            Names the shard or index that is missing, damaged or of another assembly.
        """
        folder = Path(str(args[0] if args else kwargs.get("pretrained_model_name_or_path")))
        check_index(folder / (kwargs.get("subfolder") or ""), kwargs.get("variant"))
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for layer in model.sparse_layers.values():
            layer.check()
        check_finite(model, str(folder))
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if checkpoint_files is not None:
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            check_shards(
                checkpoint_files,
                shapes,
                model.config.assembly.get("id"),
                model.all_tied_weights_keys,
                optional="router.",
            )
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in ``transformers``, with the modelling code, and the assembly's id and digests in every shard."""
        if isinstance(self.router, PromptRouter):  # its options may have changed
            self.config.router = self.router.options.tree()
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process:  # of the files that lay there before
            (Path(save_directory) / "digests.json").unlink(missing_ok=True)
        identity = self.config.assembly.get("id")
        if is_main_process:
            stem = "model" if kwargs.get("variant") is None else f"model.{kwargs['variant']}"
            for path in sorted(Path(save_directory).glob("model*.safetensors")):
                if re.fullmatch(re.escape(stem) + r"(-\d{5}-of-\d{5})?", path.stem):
                    seal_file(path, {} if identity is None else {ASSEMBLY: identity})
        if push_to_hub:  # what is pushed is saved once more, by this method
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, token=kwargs.get("token"))

    def save_shell(self, folder: str | Path) -> None:
        """Save all but the weights: configuration, generation settings, code. Works on the meta device."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        custom_object_save(self, folder, config=self.config)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)


def _supports(config: TinyONNConfig, kind: str) -> bool:
    """Whether the base's class has a kind of attention."""
    base = AutoModelForCausalLM._model_mapping[type(config.base_config)]
    return bool(getattr(base, f"_supports_{kind}", False))


TinyONNForCausalLM.register_for_auto_class("AutoModelForCausalLM")
