"""A saved model runs where nothing but Torch and ``transformers`` is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dense.architectures import make_model
from tests.model.assembled import assembled
from tests.model.routers import FOUR

HIDDEN = (
    "tinyonn",
    "numba",
    "llvmlite",
    "triton",
    "ray",
    "zarr",
    "scipy",
    "sklearn",
    "bitsandbytes",
    "dask",
    "accelerate",
)
PRELUDE = f"""
import sys
from importlib.machinery import PathFinder

HIDDEN = {HIDDEN!r}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""
PROGRAM = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("def f(x):", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, gates=[1.0, 0, 0.5, 0])
with torch.no_grad():
    logits = model(ids).logits
    routed = model.router(ids)
pipeline("text-generation", model=model, tokenizer=tokenizer)("one", max_new_tokens=2)
model.save_pretrained(f"{out}/again")
torch.save({"ids": ids, "logits": logits, "routed": routed, "module": type(model).__module__}, f"{out}/result.pt")
assert not any(name.partition(".")[0] in HIDDEN for name in sys.modules)
"""


def run(folder: Path, out: Path) -> dict[str, object]:
    """Run the program isolated, offline, with a cache of its own; gives what it saved."""
    out.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(out),
        "HF_HOME": str(out / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + PROGRAM, str(folder), str(out)],
        env=environment, cwd=out, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded: dict[str, object] = torch.load(out / "result.pt")
    return loaded


@pytest.mark.parametrize(("name", "rounds"), [("qwen2_tied", 2), ("gpt2", 1)])
def test_bare_environment(tmp_path: Path, name: str, rounds: int) -> None:
    """Loads with the code in its folder, generates as here, and what it saves loads and does the same again."""
    base = make_model(name, tmp_path / "base")
    _, model = assembled(base, kept=0.6)
    model.set_router(FOUR)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="100KB")
    results = []
    for number in range(rounds):
        for file in base.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        results.append(run(folder, tmp_path / str(number)))
        folder = tmp_path / str(number) / "again"

    for result in results:
        assert str(result["module"]).startswith("transformers_modules.")
        ids, logits, routed = result["ids"], result["logits"], result["routed"]
        assert isinstance(ids, torch.Tensor)
        assert isinstance(logits, torch.Tensor)
        assert isinstance(routed, torch.Tensor)
        assert model.router is not None
        with torch.no_grad():
            wanted = model(ids).logits
            assert torch.equal(routed, model.router(ids))
        assert float((logits - wanted).abs().max() / wanted.abs().max()) <= 1e-5
        prompt = ids.shape[1] - 8
        here = model.generate(
            ids[:, :prompt],
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            gates=[1.0, 0, 0.5, 0],
        )
        assert torch.equal(here, ids)
