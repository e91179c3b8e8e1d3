"""What a run holds: ``tinyonn status``. Reads only, also while the run is being recorded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.places import check_there, local_folder, store_location
from tinyonn.show.escape import visible
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_size

if TYPE_CHECKING:
    from tinyonn.run import Run

SHOWN = 20  # samples set aside that the table lists; --json lists all


@dataclass(frozen=True)
class SliceStatus:
    """One slice: samples committed (those set aside included) of how many, and its live segments."""

    slice: str
    committed: int
    total: int
    segments: int
    set_aside: int


@dataclass(frozen=True)
class StatusReport:
    """What a run holds.

    Attributes
    ----------
    location : str
    slices : tuple of SliceStatus
    samples : int
        Recorded in all slices.
    set_aside : tuple of dict
        ``{"index", "slice", "reason"}``: by the recorder within a slice, by the corpus before it had one.
    weights, tensors : int
    model : str
    tokens : int or None
        Of the whole corpus; None where the run's local folder is not at hand.
    disk_bytes : int or None
        Of the store; None in a bucket.
    """

    location: str
    slices: tuple[SliceStatus, ...]
    samples: int
    set_aside: tuple[dict[str, Any], ...]
    weights: int
    tensors: int
    model: str
    tokens: int | None
    disk_bytes: int | None

    @property
    def complete(self) -> bool:
        """Whether every sample is committed."""
        return all(part.committed == part.total for part in self.slices)

    @property
    def merged(self) -> bool:
        """Whether every slice is one segment."""
        return self.complete and all(part.segments == 1 for part in self.slices)

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        own = {
            "committed": sum(part.committed for part in self.slices),
            "total": sum(part.total for part in self.slices),
            "live_segments": sum(part.segments for part in self.slices),
            "complete": self.complete,
            "merged": self.merged,
        }
        return {**asdict(self), **own}

    def table(self) -> Sheet:
        """For people."""
        title = (
            f"{whole(self.location)}\n{visible(self.model)}, {whole(f'{format_count(self.weights)} weights')}"
        )
        columns = ("committed", "total", "segments", "set_aside")
        sheet = Sheet(title, self._notes()).text("slice")
        sheet.number(*(name.replace("_", " ") for name in columns))
        for part in self.slices:
            sheet.add(whole(part.slice), *(f"{getattr(part, name):,}" for name in columns))
        if len(self.slices) > 1:
            sheet.section()
            totals = (sum(getattr(part, name) for part in self.slices) for name in columns)
            sheet.add("together", *(f"{total:,}" for total in totals), style="bold")
        return sheet

    def _notes(self) -> list[str]:
        stage = (
            "merged" if self.merged else "recorded, to be merged" if self.complete else "to be gone on with"
        )
        words = [f"{self.samples:,} samples recorded"]
        if self.tokens is not None:
            words.append(f"{format_count(self.tokens)} tokens in the corpus")
        if self.disk_bytes is not None:
            words.append(f"{format_size(self.disk_bytes)} on disk")
        lines = [", ".join([*words, stage])]
        for item in self.set_aside[:SHOWN]:
            place = f" of {item['slice']}" if item["slice"] else ""
            lines.append(visible(f"set aside: sample {item['index']}{place}: {item['reason']}"))
        if len(self.set_aside) > SHOWN:
            lines.append(f"... and {len(self.set_aside) - SHOWN} more; --json lists them all")
        return lines


def read_status(location: str) -> StatusReport:
    """Read what is committed.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.

    Raises
    ------
    InputError
        No run is there.
    StoreDamagedError
        The store cannot be read.
    """
    check_there(location)
    from tinyonn.run import open_run

    run = open_run(location)
    segments = run.segments
    slices = []
    for name, total in run.manifest.slices.items():
        own = [segment for segment in segments if segment.slice == name]
        committed = sum(segment.last - segment.first for segment in own)
        aside = sum(len(segment.set_aside) for segment in own)
        slices.append(SliceStatus(name, committed, total, len(own), aside))
    recorder = [{**item, "slice": segment.slice} for segment in segments for item in segment.set_aside]
    tokens, corpus = _corpus_facts(location)
    return StatusReport(
        location=location,
        slices=tuple(slices),
        samples=sum(segment.samples for segment in segments),
        set_aside=tuple(sorted([*recorder, *corpus], key=lambda item: int(item["index"]))),
        weights=sum(parameter.size for parameter in run.parameters),
        tensors=len(run.parameters),
        model=_model_name(run),
        tokens=tokens,
        disk_bytes=None if location.startswith("s3://") else folder_bytes(Path(location)),
    )


def is_complete(location: str) -> bool:
    """Whether a run is there with every sample committed and every slice merged."""
    from tinyonn.store.repository import Store

    return Store.exists(store_location(location)) and read_status(location).merged


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _model_name(run: Run) -> str:
    prints, options = run.manifest.model, run.manifest.config
    weights = next((str(prints[name])[:12] for name in sorted(prints) if name.endswith(".safetensors")), "")
    words = [str(prints[key]) for key in ("name", "path") if key in prints][:1] or ["model"]
    words += [weights] if weights else []
    return " ".join([*words, *(str(options[key]) for key in ("quantization", "dtype") if key in options)])


def _corpus_facts(location: str) -> tuple[int | None, list[dict[str, Any]]]:
    """Tokens and what was set aside before recording, from the run's folder if it is on this machine."""
    from tinyonn.corpus.file import Corpus

    path = local_folder(location) / "corpus.arrow"
    if not path.is_file():
        return None, []
    corpus = Corpus(path)
    return corpus.tokens, [asdict(item) for item in corpus.set_aside]
