"""The sparse model: what ``transformers`` loads, and what is saved with its weights, so that it needs nothing of us.

Importing this package makes ``transformers`` load assembled models without code from their folders. Files end in
``_tinyonn`` because they lie beside weights in other people's folders, where an export takes them along by that name.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_tinyonn import TinyONNConfig
from .linear_tinyonn import TinyONNExpert
from .modeling_tinyonn import TinyONNForCausalLM

__all__ = ["TinyONNConfig", "TinyONNExpert", "TinyONNForCausalLM"]

AutoConfig.register(TinyONNConfig.model_type, TinyONNConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyONNConfig, TinyONNForCausalLM, exist_ok=True)
