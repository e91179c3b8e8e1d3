"""The model cut along its cells: selection, assembly, and the sparse model itself.

Importing this package makes ``transformers`` load assembled models without code from their folders.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn.experts.configuration_tinyonn import TinyONNConfig
from tinyonn.experts.expert_tinyonn import TinyONNExpert
from tinyonn.experts.modeling_tinyonn import TinyONNForCausalLM

__all__ = ["TinyONNConfig", "TinyONNExpert", "TinyONNForCausalLM"]

AutoConfig.register(TinyONNConfig.model_type, TinyONNConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyONNConfig, TinyONNForCausalLM, exist_ok=True)
