"""How often a model calls its modules, told on the meta device: no weights are read and no arithmetic is done."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinyonn.dense.parameters import list_uses
from tinyonn.errors import InputError


class _Assumed(TorchDispatchMode):
    """What code reads out of a tensor without values: true, 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def check_calls(model: Any) -> None:
    """Check that every module with parameters is called once in a forward pass, which is all that can be recorded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device, not quantized. One that cannot be run there is left to the recorder, which looks too.

    Raises
    ------
    InputError
        Names a module that is called several times, not at all, or without a tensor first.
    """
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
