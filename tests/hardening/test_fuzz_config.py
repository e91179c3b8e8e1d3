"""Configurations as nobody should write them: a message or a plan, within seconds and within memory, never a traceback.

Each is read and, where it is valid, planned as ``tinyonn plan`` does, on the reference model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings

from tests.hardening.configurations import TEXTS, files
from tests.hardening.fuzz import COMMON, SECONDS, bounded
from tinyonn.config import load_config, parse_config
from tinyonn.errors import InputError, TinyONNError
from tinyonn.places import local_folder, run_location
from tinyonn.plan.facts import plan_run
from tinyonn.show.escape import shortened
from tinyonn.show.sizes import parse_size

LIMITS = {"ram": 32 << 30, "disk": 1 << 40}
seen: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def _no_network() -> Iterator[None]:
    """Names of models and data sets are looked for on this machine alone; libraries stay loaded from the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        plan_run("run", Path("/nowhere"), parse_config({}), LIMITS)
        yield


def tried(content: bytes, folder: Path) -> str:
    """What becomes of a configuration: the kind of its error, or planned; anything else is raised."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    kind, message = "planned", ""
    with bounded():
        try:
            config = load_config(path)
            location = run_location("run", config.storage.root)
            location = location if location.startswith("s3://") else str(folder / "run")
            plan_run(location, local_folder(location), config, LIMITS)
        except TinyONNError as error:
            kind, message = type(error).__name__, str(error)
    assert (kind == "planned") == (not message)
    assert len(message) < 5000
    return kind


@settings(max_examples=50, **COMMON)
@given(content=files)
def test_a_random_configuration(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    seen[tried(content, tmp_path_factory.getbasetemp())] += 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=500, **COMMON)
@given(content=files)
def test_five_hundred_random_configurations(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    seen[tried(content, tmp_path_factory.getbasetemp())] += 1


@pytest.mark.parametrize("content", TEXTS, ids=lambda text: repr(text[:20]))
def test_texts_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    assert tried(content, tmp_path) in ("InputError", "planned")


@pytest.mark.parametrize(
    "tree",
    [
        {"record": {"windows": 10**9}}, {"record": {"windows": 99_999}}, {"data": {"seed": -1}},
        {"cluster": {"seed": -5}}, {"cluster": {"features": {"act": 1e300}}}, {"score": {"act": 1e300}},
        {"score": {"grad": float("nan")}}, {"train": {"loss": {"kl": float("inf")}}},
        {"evaluate": {"budgets": [float("nan")]}}, {"data": {"max_tokens": 10**5000}},
        {"record": {"segment": 2**70}}, {"model": {"path": "~nosuch/model"}}, {"data": {"path": "a" * 5000}},
        {"model": {"path": "a\0b"}}, {"storage": {"root": "~nosuch"}}, {"data": {"text": "\ud800"}},
        {"train": {"optimizers": {"experts_lr": 1e300}}}, {"experts": {"budget": 1e300}},
    ],
    ids=lambda tree: shortened(tree)[:50],
)  # fmt: skip
def test_absurd_values_are_refused_at_once(tree: dict[str, object], tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(InputError):
        plan_run("run", tmp_path, parse_config(tree), LIMITS)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 400 + "GiB", "1e9GiB", "-1", "nan", "inf", "", "1.5.5", "٣GiB"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="not a size"):
        parse_size(text, "--ram")
