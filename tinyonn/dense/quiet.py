"""``transformers`` without its bars and warnings."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings: what matters is raised here as an error."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # Ray forks; a forked pool of the tokenizer hangs
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
