"""Other programs, run for real where they are installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.models import dense_of, model_of, tokens
from tests.documents import ROOT
from tests.model.assembled import assembled
from tinyonn.reference import model_path

KINDS = ("all on", "routed", "dense")


def given(folder: Path, kind: str) -> Any:
    """The model of a kind; its tokenizer is in the folder."""
    model = model_of(folder, router=kind == "routed")
    return dense_of(model, folder) if kind == "dense" else model


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    request = importlib.import_module("lm_eval.api.instance").Instance
    model = given(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wrapped: Any = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=64
    )
    [(found, _)] = wrapped.loglikelihood([request("loglikelihood", {}, ("one two", " three"), 0)])
    ids = tokenizer("one two three", return_tensors="pt").input_ids
    known = len(tokenizer("one two").input_ids)
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits.log_softmax(-1)[0, known - 1 :]
    assert found == pytest.approx(log_p.gather(1, ids[0, known:, None]).sum().item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_fine_tunes(tmp_path: Path, kind: str, lora: bool) -> None:
    """All weights, or an adapter with gradient checkpoints."""
    pytest.importorskip("trl", reason="trl is not installed")
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    adapter = None
    if lora:
        pytest.importorskip("peft", reason="peft is not installed")
        adapter = importlib.import_module("peft").LoraConfig(
            target_modules="all-linear", task_type="CAUSAL_LM"
        )
    model = given(tmp_path / "base", kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    turns = [
        [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(8)
    ]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, max_length=64, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=lora,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"messages": turns})
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    if lora:
        held = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert held and all("lora_" in name for name in held)
        return
    trainer.save_model(str(tmp_path / "tuned"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


def test_hidden_states_have_the_gates(tmp_path: Path) -> None:
    """Trainers that fuse head and loss call the base without its head."""
    model = model_of(tmp_path, router=True)
    with torch.no_grad():
        for gates in (None, [1.0, 0, 0, 0]):
            hidden = model.base_model(tokens(), gates=gates).last_hidden_state
            logits = model(tokens(), gates=gates).logits
            assert torch.equal(model.get_output_embeddings()(hidden), logits)


@contextmanager
def served(folder: Path, seconds: float = 60) -> Iterator[str]:
    """The address of `transformers serve`, started as docs/clients.md says; it ends with the block."""
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    (snippet,) = re.findall(r"^    # serve\.py\n((?:(?:    .*)?\n)+?)(?=\S)", page, re.MULTILINE)
    (folder / "serve.py").write_text(re.sub(r"^    ", "", snippet, flags=re.MULTILINE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder / "log"
    command = [
        sys.executable,
        "serve.py",
        "sparse",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with log.open("w") as output:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + seconds
        while f"running on {address}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def asked(address: str, folder: Path, chat: list[dict[str, str]], count: int) -> str:
    """What the server answers, greedily."""
    body = {"model": str(folder), "messages": chat, "max_tokens": count, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def test_transformers_serve(tmp_path: Path) -> None:
    """One server, the sparse folder and its dense export: what `generate` says."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package}, of transformers[serving], is not installed")
    _, model = assembled(model_path(), kept=0.9)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.save_pretrained(tmp_path / "sparse")
    dense = dense_of(model, tmp_path)
    chat, said = [{"role": "user", "content": "Write a function that adds two numbers."}], []
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with served(tmp_path) as address:
        for one, folder in ((model, "sparse"), (dense, "dense")):
            ids = one.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1] :]
            said.append(tokenizer.decode(ids, skip_special_tokens=True))
            # of architectures that it knows, the server strips the text
            assert asked(address, tmp_path / folder, chat, 16).strip() == said[-1].strip()
    assert len(said[0].strip()) > 20
