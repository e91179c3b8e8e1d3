"""The profile on disk: a Parquet dataset in parts, whole or not there, that any tool reads.

```
profile/manifest.json                              what it is a profile of; written first
profile/experts/slice=NAME/FIRST-LAST.parquet      sample, expert, act, grad, contribution, pull
profile/samples/slice=NAME/FIRST-LAST.parquet      sample, position, loss, tokens, labelled, prompt, excerpt
```

``sample`` is the row of the source; ``FIRST-LAST`` a half-open range of positions in the slice's stored order;
``expert`` counts the groups, the core last. A part's samples come last, so that a part is complete once they are there.
Samples that were set aside stand in the metadata ``set_aside`` of that file, as JSON.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from tinyonn.errors import InputError
from tinyonn.files import write_json
from tinyonn.profile.manifest import MANIFEST, TABLES, Manifest, Part, read_manifest
from tinyonn.profile.tables import PartProfile, holds, write_part


class Dataset:
    """A profile's folder, for the one process that writes it.

    Parameters
    ----------
    folder : Path
    manifest : Manifest
        What is to be measured. Of the same groups, model and corpus a profile that is there goes on, with the larger
        number of samples.
    fresh : bool
        Begin anew, whatever is there.

    Raises
    ------
    InputError
        The folder holds a profile of something else.
    """

    def __init__(self, folder: Path, manifest: Manifest, fresh: bool = False) -> None:
        self.folder = folder
        stored = None if fresh else read_manifest(folder)
        if stored is not None and (difference := manifest.difference(stored)):
            raise InputError(
                f"{folder} holds a profile of something else ({difference}); give what it was measured with, "
                "or measure all of it again with --fresh"
            )
        if stored is None:
            (folder / MANIFEST).unlink(missing_ok=True)
            for table in TABLES:
                shutil.rmtree(folder / table, ignore_errors=True)
        else:
            taken = {name: max(count, stored.taken.get(name, 0)) for name, count in manifest.taken.items()}
            manifest = replace(manifest, taken=taken, part=stored.part)
        self.manifest = manifest
        if manifest != stored:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MANIFEST, asdict(manifest), indent=1)
        self._drop_others()

    def missing(self) -> list[Part]:
        """Parts that are still to be measured."""
        return [p for p in self.manifest.parts if not holds(self.folder, p, self.manifest.groups.id)]

    def write(self, part: Part, found: PartProfile) -> None:
        """Write a part; once it returns, the part is on the disk."""
        write_part(self.folder, part, found, self.manifest.groups.id)

    def _drop_others(self) -> None:
        """Remove what was half written, and the shorter last parts of a profile that has grown."""
        ours = {part.path(self.folder, table) for part in self.manifest.parts for table in TABLES}
        for table in TABLES:
            for path in (self.folder / table).glob("slice=*/*"):
                if path not in ours:
                    path.unlink()
