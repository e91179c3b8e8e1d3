"""The model cut along its cells: what is kept, and the assembled model that it becomes (`tinyonn.model`)."""

from tinyonn.model import TinyONNConfig, TinyONNExpert, TinyONNForCausalLM

__all__ = ["TinyONNConfig", "TinyONNExpert", "TinyONNForCausalLM"]
