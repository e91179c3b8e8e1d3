"""Load the dense model that is recorded: any ``transformers`` causal LM, in NF4 or unquantized, frozen.

Forward and backward give what the recorder needs without a gradient on any weight: the output of every
embedding is made to require one, so that a hook on each module's output sees ``G``. (The
``enable_input_require_grads`` of ``transformers`` does so for token embeddings alone, not GPT-2's positions.)

With checkpointing (non-reentrant) a layer's modules run twice, in the forward pass and again in the backward
pass, where Torch may stop before the layer's last module; ``G`` arrives on the outputs of the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tinyonn.dense.checkpoint import check_tensors, weight_files
from tinyonn.dense.head import head_of
from tinyonn.dense.nf4 import BLOCK, NF4Linear
from tinyonn.dense.parameters import list_uses
from tinyonn.dense.quiet import quiet
from tinyonn.dense.settings import TEXT_NAMES, context_length, text_settings
from tinyonn.dense.source import (
    config_folder,
    fingerprint_model,
    model_folder,
    quantized_by,
    read_model_config,
    resolve_model,
)
from tinyonn.errors import CapacityError, InputError, first_line
from tinyonn.machine import bound_memory

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

__all__ = [
    "DenseModel",
    "choose_device",
    "context_length",
    "fingerprint_model",
    "load_model",
    "load_shape",
    "load_tokenizer",
    "model_folder",
    "prepare_model",
    "recordable_shape",
    "resolve_model",
]

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PLAIN = {"quantization": "none"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class DenseModel:
    """A loaded model, ready to be recorded.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode, every parameter frozen, without a key-value cache.
    tokenizer : transformers.PreTrainedTokenizerBase
    device : torch.device
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def choose_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device; ``auto`` takes the GPU if there is one.

    Raises
    ------
    InputError
        A GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        why = (
            "this Torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        )
        raise InputError(
            f"model.device = 'cuda' but {why} (torch {torch.__version__}); use model.device: cpu or auto, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_model(config: ModelConfig, device: torch.device | None = None) -> DenseModel:
    """Load a model and its tokenizer.

    A model with modules that cannot be recorded is refused from its configuration alone, before any weight is
    read. Weights come from safetensors, or from ``.bin`` as tensors alone, and no code of the model's repository
    is run. With ``nf4`` every linear layer but the head is quantized, once and not twice; biases, norms and
    embeddings stay as they are.

    Parameters
    ----------
    config : ModelConfig
    device : torch.device, optional
        Overrides ``config.device``.

    Raises
    ------
    InputError
        No such model, unsupported modules, missing or unreadable weights, no such GPU.
    CapacityError
        The weights do not fit on the device.
    """
    bound_memory()
    target = device if device is not None else choose_device(config.device)
    folder = model_folder(config)
    recordable_shape(config)
    tokenizer = load_tokenizer(config)
    files = weight_files(folder)
    check_tensors(files)
    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(target)}}
    settings, nested = text_settings(folder)
    if nested:
        options |= {"key_mapping": TEXT_NAMES}
    if config.quantization == "nf4":
        options["quantization_config"] = _nf4(dtype)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=settings,
                use_safetensors=files[0].suffix == ".safetensors",
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise CapacityError(
            f"{config.path} in {config.quantization} does not fit on {target}: {first_line(error)}; "
            "see `tinyonn plan`, use quantization: nf4 or model.device: cpu"
        ) from None
    except Exception as error:  # safetensors, transformers and the OS each have their own
        raise InputError(
            f"{config.path}: its weights in {folder} cannot be read "
            f"({type(error).__name__}: {first_line(error)}); fetch or save the model again"
        ) from None
    lost = (
        sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]) + _misshapen(model)
    )
    if lost:  # transformers would fill these with random numbers
        raise InputError(
            f"{config.path}: {len(lost)} tensors are missing from its weights or have another shape, "
            f"{lost[0]} first; save a complete checkpoint that fits its config.json"
        )
    return DenseModel(prepare_model(model, config.checkpointing), tokenizer, target)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with its chat template if it has one.

    Raises
    ------
    InputError
        There is none, or it cannot be read.
    """
    folder = model_folder(config, weights=False)
    if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one
        raise InputError(
            f"{config.path}: no usable tokenizer in {folder}, none of {', '.join(VOCABULARIES)}; "
            "save the model's tokenizer beside it with save_pretrained()"
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{config.path}: no usable tokenizer in {folder} ({type(error).__name__}: {first_line(error)}); "
            "save the model's tokenizer beside it with save_pretrained()"
        ) from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def recordable_shape(config: ModelConfig) -> torch.nn.Module:
    """The model of `load_shape`, if all of it can be recorded: its modules, how they are called, its head.

    Raises
    ------
    InputError
        As `load_shape`; or names what cannot be recorded, and why.
    """
    shape = load_shape(config)
    list_uses(shape)
    head_of(shape)
    check_calls(shape if config.quantization == "none" else load_shape(config.model_copy(update=PLAIN)))
    return shape


def load_shape(config: ModelConfig) -> torch.nn.Module:
    """Build the model on the meta device from ``config.json`` alone: shapes and modules, no weights.

    Of a model that sees pictures or hears too it is the text part. With ``nf4`` the same layers are ``Linear4bit``
    (with unpacked shapes) as in the loaded model, so that `list_parameters` gives the same list for both.

    Raises
    ------
    InputError
        Not a causal LM that this version of ``transformers`` knows, or already quantized.
    """
    folder = config_folder(config)
    tree = read_model_config(folder)
    if (method := quantized_by(folder, tree)) is not None:
        raise InputError(
            f"{config.path} is quantized already ({method}); give the original model, it is quantized here"
        )
    dtype = DTYPES[config.dtype]
    try:
        with quiet(), torch.device("meta"):
            settings, _ = text_settings(folder)
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{config.path}: model_type {tree.get('model_type')!r} is not a causal language model that "
            f"transformers {transformers.__version__} can build ({type(error).__name__}: "
            f"{first_line(error)}); choose another model"
        ) from None
    model.tie_weights()
    if config.quantization == "nf4":
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), _nf4(dtype))
    assert isinstance(model, torch.nn.Module)
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise InputError(
            f"{folder / 'config.json'}: {empty[0]} would have no weights; give the sizes that its weights have"
        )
    return model.eval().requires_grad_(False)


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
    )


def _misshapen(model: torch.nn.Module) -> list[str]:
    """Quantized weights of another shape than their layer's, which nothing else notices."""
    found = []
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(module, torch.nn.Linear) and state is not None:
            shape = tuple(state.shape)
            if shape != (module.out_features, module.in_features):
                found.append(f"{name}.weight {list(shape)}")
    return found


def prepare_model(model: Any, checkpointing: bool) -> torch.nn.Module:
    """Freeze a causal language model as it is recorded, in place: gradients flow through its activations alone."""
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    _replace_ragged(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # autograd would call the padding token's gradient 0, which it is not
            module.register_forward_hook(_require_gradient)
        # On CPUs with AVX512-BF16 bitsandbytes would repack the weights in a forward without gradients, after
        # which they neither dequantize to their shape nor multiply as they do with gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if checkpointing:
        _checkpoint(model)
    assert isinstance(model, torch.nn.Module)
    return model


def _replace_ragged(model: torch.nn.Module) -> None:
    """Put `NF4Linear` where rows are no whole number of blocks: on CPUs with AVX512 bitsandbytes takes wrong scales."""
    for path, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or not isinstance(module, torch.nn.Linear) or module.weight.device.type != "cpu":
            continue
        out, inputs = module.out_features, module.in_features
        if inputs % BLOCK and out * inputs % BLOCK == 0:
            bias = None if module.bias is None else module.bias.detach()
            packed = module.weight.data.reshape(-1)
            parent, _, name = path.rpartition(".")
            layer = NF4Linear(out, inputs, packed, state.absmax.float(), state.dtype, bias)
            setattr(model.get_submodule(parent), name, layer.eval())


def _checkpoint(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and isinstance(
            module, GradientCheckpointingLayer
        ):
            module.training = True  # layers checkpoint in training only; what is inside stays in evaluation


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


class _Assumed(TorchDispatchMode):
    """What code reads out of a tensor without values: true, 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def check_calls(model: Any) -> None:
    """Check that every module with parameters is called once in a forward pass, which is all that can be recorded."""
    modules = {use.module_name: use.module for use in list_uses(model)}
    calls = dict.fromkeys(modules, 0)
    bare: list[str] = []

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls[name] += 1
            if not inputs and not isinstance(module, torch.nn.Embedding):
                bare.append(name)

        return hook

    handles = [m.register_forward_pre_hook(count(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with torch.no_grad(), _Assumed():  # type: ignore[no-untyped-call]
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception:  # of the library's code, for which a tensor without values is not enough
        return
    finally:
        for handle in handles:
            handle.remove()
    wrong = [f"{name} is called {found} times" for name, found in calls.items() if found != 1]
    wrong += [f"{name} is called without a tensor first" for name in bare]
    if wrong:
        raise InputError(
            f"{type(model).__name__} cannot be recorded: in a forward pass {'; '.join(wrong[:3])}, and each module "
            "with weights must be called once; choose another model"
        )
