"""The models of the dense room, for tests of this room too."""

from tests.dense.conftest import few_threads, model_of

__all__ = ["few_threads", "model_of"]
