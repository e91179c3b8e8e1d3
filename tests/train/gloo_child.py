"""One worker of a group of processes: ``python -m tests.train.gloo_child FOLDER RANK WORLD [KILL [STEPS]]``.

With KILL the first one ends itself by SIGKILL, as from outside, when so many steps are done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import FileStore  # type: ignore[attr-defined]

from tests.train.trained import OPTIONS, changed, load_models
from tinyonn.corpus.file import Corpus
from tinyonn.train.teacher import Live
from tinyonn.train.trainer import Trainer


def main(folder: Path, rank: int, world: int, kill: int = 0, steps: int = OPTIONS.steps) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = FileStore(str(folder / "store"), world)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )

    def observe(line: Mapping[str, Any]) -> None:
        if line["step"] == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    base, student = load_models(folder / "model")
    corpus, options = Corpus(folder / "corpus.arrow"), changed(steps=steps)
    trainer = Trainer(student, corpus, options, folder / "train", Live(base))
    trainer.observe = observe
    trainer.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
