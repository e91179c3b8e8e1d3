"""A dense export, converted by llama.cpp's own converter and run by llama.cpp, says what transformers says.

Runs where ``llama-cpp-python`` is installed and ``LLAMA_CPP`` names llama.cpp's source folder, as it lies in that
package's sdist under ``vendor/llama.cpp``; see docs/clients.md.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.model.assembled import assembled
from tinyonn.experts.export import export_model
from tinyonn.reference import model_path

SOURCE = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
    ),
    pytest.mark.skipif(
        not SOURCE, reason="LLAMA_CPP does not name llama.cpp's source folder, which has the converter"
    ),
]
# The converter knows a tokenizer by a hash of what its vocabulary makes of a text; this one's splitting is Qwen2's.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
PROMPT = "def add(a, b):\n    return"


def test_the_same_text(tmp_path: Path) -> None:
    _, model = assembled(model_path(), kept=0.9)
    model.save_pretrained(tmp_path / "sparse")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.save_pretrained(tmp_path / "sparse")
    export_model(tmp_path / "sparse", tmp_path / "dense", "dense")
    file = tmp_path / "model.gguf"
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, SOURCE, str(tmp_path / "dense"), "--outfile", str(file), "--outtype", "f32"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = dense.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    llama: Any = importlib.import_module("llama_cpp").Llama(str(file), n_ctx=128, verbose=False, n_threads=2)
    prompt = inputs.input_ids[0].tolist()
    assert llama.tokenize(PROMPT.encode(), add_bos=False, special=True) == prompt
    said = llama.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert said == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
