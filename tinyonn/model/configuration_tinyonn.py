"""Configuration of a model that is cut into sparse experts, and of its router; saved beside exported models."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .digests_tinyonn import AGAIN, DIGESTS, check_settings, sealed_settings

ANY = object()
# Settings of routers that were: the value at which a saved model does without it, and what stands in its place.
REMOVED: dict[str, tuple[Any, str]] = {
    "threshold": (None, "router.top_k says how many experts are on"),
    "max_k": (ANY, ""),  # the most that a threshold chose
    "gate": ("one", "a chosen expert works as in the dense model"),
}


@dataclass(frozen=True)
class RouterOptions:
    """The ``router`` of a configuration, as plain JSON can say it.

    Attributes
    ----------
    branches : tuple of tuples of int
        The main router chooses among these groups of experts; together they hold every expert once.
    width : int
        Features of the router's own encoder.
    top_k : int, optional
        Experts chosen per prompt, those in `shared` not counted; None is all.
    shared : tuple of int
        Experts that are always on.
    prompt_tokens : int
        Of a text that is no dialogue, so many tokens at most serve as its prompt in training and evaluation.

    Raises
    ------
    ValueError
        Values that contradict each other; names value, limit and remedy.
    """

    branches: tuple[tuple[int, ...], ...]
    width: int = 128
    top_k: int | None = None
    shared: tuple[int, ...] = ()
    prompt_tokens: int = 64

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> RouterOptions:
        """Options from plain JSON.

        Raises
        ------
        ValueError
            Unknown or missing keys, values that do not fit, or a removed setting that was in use.
        """
        tree = _without_removed(tree)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(tree) - set(known))
        if unknown:
            raise ValueError(f"router has {unknown[0]!r}; it knows {', '.join(known)}")
        if "branches" not in tree:
            raise ValueError(
                "router has no branches; give lists of expert numbers that hold each expert once"
            )
        try:
            given = {
                **tree,
                "branches": tuple(tuple(map(int, branch)) for branch in tree["branches"]),
                "shared": tuple(map(int, tree.get("shared") or ())),
            }
            return cls(**given)
        except TypeError as error:
            raise ValueError(
                f"router has a value of the wrong kind ({error}); see its keys in config.json"
            ) from None

    def __post_init__(self) -> None:
        self._check_branches()
        experts = self.experts
        _within("width", self.width, 1, None)
        _within("prompt_tokens", self.prompt_tokens, 1, None)
        if len(set(self.shared)) != len(self.shared) or not set(self.shared) <= set(range(experts)):
            raise ValueError(
                f"router.shared = {list(self.shared)}; give numbers from 0 to {experts - 1}, each at most once"
            )
        choices = experts - len(self.shared)
        if self.top_k is not None:
            _within("top_k", self.top_k, 0, choices)

    def _check_branches(self) -> None:
        numbers = [number for branch in self.branches for number in branch]
        if not self.branches or not all(self.branches):
            raise ValueError("router.branches has an empty branch; every branch needs an expert")
        if sorted(numbers) != list(range(len(numbers))):
            twice = sorted({number for number in numbers if numbers.count(number) > 1})
            lost = sorted(set(range(len(numbers))) - set(numbers))
            wrong = f"{twice[0]} is there twice" if twice else f"{lost[0]} is in none"
            raise ValueError(
                f"router.branches must hold each expert from 0 on once, but expert {wrong}; find branches anew"
            )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return sum(map(len, self.branches))

    def branch_of(self) -> Sequence[int]:
        """The branch of each expert."""
        owner = [0] * self.experts
        for number, branch in enumerate(self.branches):
            for expert in branch:
                owner[expert] = number
        return owner

    def tree(self) -> dict[str, Any]:
        """All options as plain JSON."""
        return {
            **dataclasses.asdict(self),
            "branches": [list(branch) for branch in self.branches],
            "shared": list(self.shared),
        }


def _without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Options as models were saved with once; one that was not in use is left out."""
    for name, value in tree.items():
        unused, instead = REMOVED.get(name, (value, ""))
        if unused is not ANY and value != unused:
            raise ValueError(f"router.{name} = {value!r} was removed: {instead}; train the router again")
    return {name: value for name, value in tree.items() if name not in REMOVED}


def _within(name: str, value: Any, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"router.{name} = {value!r}; give a whole number")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"router.{name} = {value}; give {limit}")


MAX_EXPERTS = 254
# Of the base, said again where programs look that read a plain ``config.json``.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Settings of the library's, which other programs and people may change in ``config.json``: they have no digest there.
FREE = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
)
MAX_LAYERS = 10_000  # of a base: more are a turned bit
PATHS = ("auto", "dense", "sparse")
GATE_RULE = (
    "without a router the experts_top_k experts of the largest expert_prior are on with gate 1, all if null"
)
ROUTER_RULE = "the router chooses experts from the prompt; router says how many, and which are always on"


class TinyONNConfig(PretrainedConfig):
    """What the model is made of: a base architecture, and which of its linear layers are sparse.

    Attributes of the base's configuration (``vocab_size``, ``hidden_size``, ...) can be read here too.

    Parameters
    ----------
    base_config : dict or PretrainedConfig
        The base's ``config.json``, with its ``model_type``.
    experts : int
        k, at most 254. The core, always on, is group k.
    sparse_layers : dict
        Module name in the base -> ``{"out": int, "in": int, "entries": int}``.
    expert_sizes : list of int
        Weights of each expert and, last, of the core: k + 1.
    expert_prior : list of float
        Orders the experts until a router is trained: k. Empty counts as all the same.
    experts_top_k : int, optional
        Experts on per prompt where no router chooses; None is all. Folders that say ``top_k``, which is a sampler's
        word, are read too.
    reroute_every : int, optional
        A router chooses again after so many generated tokens; None is never.
    gate_rule : str
        Says where gates come from.
    router : dict, optional
        What the router is made of: the fields of `RouterOptions`, of which ``branches`` must be given. None is no
        router.
    forward_path : str
        ``auto``, ``dense`` or ``sparse``.
    assembly : dict
        Where the weights come from. Its ``id`` is that in the metadata of every shard.

    Raises
    ------
    ValueError
        Values that contradict each other; names value, limit and remedy.
    """

    model_type = "tiny_onn"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012 as transformers declares it
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        base_config: dict[str, Any] | PretrainedConfig | None = None,
        experts: int = 0,
        sparse_layers: dict[str, dict[str, int]] | None = None,
        expert_sizes: list[int] | None = None,
        expert_prior: list[float] | None = None,
        experts_top_k: int | None = None,
        reroute_every: int | None = None,
        gate_rule: str = GATE_RULE,
        forward_path: str = "auto",
        assembly: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_config, dict):
            base_config = _base_of(base_config)
        self.base_config = base_config
        self.experts = experts
        self.sparse_layers = sparse_layers or {}
        self.expert_sizes = expert_sizes or [0] * (experts + 1)
        self.expert_prior = expert_prior or [0.0] * experts
        former = kwargs.pop("top_k", None)
        self.experts_top_k = former if experts_top_k is None else experts_top_k
        self.reroute_every = reroute_every
        self.router = None if router is None else RouterOptions.read(router).tree()
        self.gate_rule = ROUTER_RULE if router and gate_rule.startswith("without a router") else gate_rule
        if (per := kwargs.pop("gates_per", "prompt")) != "prompt":
            raise ValueError(
                f"gates_per = {per!r} was removed: a router chooses from the prompt; reroute_every lets it choose again"
            )
        self.forward_path = forward_path
        self.assembly = assembly or {}
        self._check()
        # The base's own setting says whether its embeddings are tied; the model around it ties nothing.
        for name in ("tie_word_embeddings", *SIZES):
            kwargs.pop(name, None)
        super().__init__(tie_word_embeddings=getattr(base_config, "tie_word_embeddings", False), **kwargs)

    def _check(self) -> None:
        k = self.experts
        self._check_kinds()
        if not 0 <= k <= MAX_EXPERTS:
            raise ValueError(f"experts = {k}; from 0 to {MAX_EXPERTS} fit, labels are bytes")
        for name, values, wanted in (
            ("expert_sizes", self.expert_sizes, k + 1),
            ("expert_prior", self.expert_prior, k),
        ):
            if len(values) != wanted:
                raise ValueError(f"{name} has {len(values)} values but {k} experts need {wanted}")
        if not all(math.isfinite(value) for value in self.expert_prior):
            raise ValueError("expert_prior has a value that is not finite; give each expert a number")
        if self.experts_top_k is not None and not 0 <= self.experts_top_k <= k:
            raise ValueError(
                f"experts_top_k = {self.experts_top_k}; from 0 to {k} experts can be on, null is all"
            )
        if self.reroute_every is not None and self.reroute_every < 1:
            raise ValueError(
                f"reroute_every = {self.reroute_every}; give at least 1 token, or null for never"
            )
        if self.router is not None and (held := sum(map(len, self.router["branches"]))) != k:
            raise ValueError(
                f"router.branches hold {held} experts but the model has {k}; give branches of this model's experts"
            )
        if self.forward_path not in PATHS:
            raise ValueError(f"forward_path = {self.forward_path!r}; choose one of {', '.join(PATHS)}")
        for name, layer in self.sparse_layers.items():
            if set(layer) != {"out", "in", "entries"}:
                raise ValueError(f"sparse_layers[{name!r}] has {sorted(layer)}; it needs out, in and entries")
            if not 0 <= layer["entries"] <= layer["out"] * layer["in"]:
                raise ValueError(
                    f"sparse_layers[{name!r}] has {layer['entries']} entries but only "
                    f"{layer['out']} x {layer['in']} places; assemble the model again"
                )
        kept = sum(layer["entries"] for layer in self.sparse_layers.values())
        if any(self.expert_sizes) and sum(self.expert_sizes) != kept:
            raise ValueError(
                f"expert_sizes add up to {sum(self.expert_sizes)} but sparse_layers hold {kept} entries; "
                "assemble the model again"
            )

    def _check_kinds(self) -> None:
        numbers = {
            "experts": self.experts,
            "experts_top_k": self.experts_top_k,
            "reroute_every": self.reroute_every,
        }
        for name, value in numbers.items():
            if not (_whole(value) or (value is None and name != "experts")):
                raise ValueError(f"{name} = {value!r}; give a whole number")
        lists = {"expert_sizes": self.expert_sizes, "expert_prior": self.expert_prior}
        for name, values in lists.items():
            if not isinstance(values, list | tuple) or not all(_number(value) for value in values):
                raise ValueError(f"{name} is not a list of numbers; {AGAIN}")
        for name, tree in {"sparse_layers": self.sparse_layers, "assembly": self.assembly}.items():
            if not isinstance(tree, dict):
                raise ValueError(f"{name} is a {type(tree).__name__}, not an object; {AGAIN}")
        for name, layer in self.sparse_layers.items():
            if not isinstance(layer, dict) or not all(_whole(value) for value in layer.values()):
                raise ValueError(f"sparse_layers[{name!r}] holds something else than whole numbers; {AGAIN}")

    @property
    def chosen_experts(self) -> list[int]:
        """Numbers of the experts that the stated rule switches on, ascending."""
        if self.experts_top_k is None:
            return list(range(self.experts))
        by_prior = sorted(range(self.experts), key=lambda expert: (-self.expert_prior[expert], expert))
        return sorted(by_prior[: self.experts_top_k])

    def to_dict(self) -> dict[str, Any]:
        """All fields, the base's nested and its sizes beside them; without the folder that the base came from."""
        tree: dict[str, Any] = super().to_dict()
        base = self.base_config
        tree |= {name: found for name in SIZES if (found := getattr(base, name, None)) is not None}
        if isinstance(tree.get("base_config"), dict):
            tree["base_config"].pop("_name_or_path", None)
        return tree

    def to_json_string(self, use_diff: bool = True) -> str:
        """As in ``transformers``, with a digest of every setting but the library's own, which are `FREE`."""
        tree = json.loads(super().to_json_string(use_diff))
        return json.dumps(sealed_settings(tree, FREE), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in ``transformers``; errors name the file."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in ``transformers``; what has a digest must fit it.

        Raises
        ------
        ValueError
            A setting is not what was written, or of the wrong kind; names the file.
        """
        place = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        path = f"{place}/config.json" if place else "config.json"
        check_settings(cls._encode_special_floats(config_dict), path)
        plain = {name: value for name, value in config_dict.items() if name != DIGESTS}
        try:
            return super().from_dict(plain, **kwargs)
        except Exception as error:  # of the base's configuration every version of the library has its own
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{path}: {kind}{error}") from None

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's configuration, which caches and generation read."""
        return self if self.base_config is None else self.base_config

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base_config")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)


def _base_of(tree: dict[str, Any]) -> PretrainedConfig:
    if "model_type" not in tree:
        raise ValueError("base_config has no model_type; give the base model's whole config.json")
    base = AutoConfig.for_model(**tree)
    layers = getattr(base, "num_hidden_layers", 0)
    if not _whole(layers) or layers > MAX_LAYERS:
        raise ValueError(f"base_config.num_hidden_layers = {layers!r}; from 0 to {MAX_LAYERS:,} can be built")
    return base


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TinyONNConfig.register_for_auto_class()
