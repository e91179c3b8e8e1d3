"""Another machine that holds a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def beating(path: Path, skew: float = 0.0, host: str = "elsewhere", odd: Any = None) -> Iterator[None]:
    """A process of another machine, with another clock, holds the run."""
    ended = threading.Event()
    path.parent.mkdir(exist_ok=True)

    def write() -> None:
        beat = time.time() + skew if odd is None else f"{odd}{time.time()}"
        text = json.dumps({"host": host, "pid": 5, "started": 1.0 + skew, "heartbeat": beat})
        side = path.with_suffix(".side")
        side.write_text(text)
        side.replace(path)

    def go_on() -> None:
        while not ended.wait(0.05):
            write()

    write()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
