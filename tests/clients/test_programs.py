"""Other programs, run for real where they are installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.models import model_of, tokens


@pytest.mark.parametrize("router", [False, True])
def test_lm_eval(tmp_path: Path, router: bool) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    request = importlib.import_module("lm_eval.api.instance").Instance
    model = model_of(tmp_path, router=router)
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


@pytest.mark.parametrize("router", [False, True])
def test_trl_fine_tunes(tmp_path: Path, router: bool) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    model = model_of(tmp_path / "base", router=router)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    turns = [
        [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(8)
    ]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, max_length=64, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"messages": turns})
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
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
