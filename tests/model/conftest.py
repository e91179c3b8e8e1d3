from tests.dense.conftest import few_threads, model_of

__all__ = ["few_threads", "model_of"]
