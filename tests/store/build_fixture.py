"""Writes the frozen store that later versions must read; run once for each version of the layout.

python -m tests.store.build_fixture
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from tests.invariants import expected_records, small_manifest
from tests.store.worlds import new_store, record_leaf
from tinyonn.store.manifest import VERSION
from tinyonn.store.merge import merge_ready

HERE = Path(__file__).parent / "fixtures"


def main() -> None:
    """One merged slice, one with two live leaves of which one has no good sample."""
    manifest = small_manifest({"code": 18, "prose": 40})
    with tempfile.TemporaryDirectory() as folder:
        store = new_store(Path(folder) / "store", manifest)
        for leaf in [*manifest.leaves("code"), *manifest.leaves("prose")[1:3]]:
            record_leaf(store, leaf)
        merge_ready(store)
        store.clean()
        expected = {
            segment.name: {
                "samples": segment.samples,
                "set_aside": list(segment.set_aside),
                "records": {
                    p.name: expected_records(manifest, segment, p).ravel()[::97].tolist()
                    for p in manifest.parameters
                    if segment.samples
                },
            }
            for segment in store.segments()
        }
        HERE.mkdir(exist_ok=True)
        shutil.make_archive(str(HERE / f"layout-{VERSION}"), "zip", folder)
        text = json.dumps({"manifest": manifest.to_json(), "segments": expected}, indent=1)
        (HERE / f"layout-{VERSION}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
