"""Documents of well-known tasks from the files in which people have them, in the form that lm-eval's task expects.

The task itself (prompts, metrics, filters) stays lm-eval's own of that name; its documents alone come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyonn.corpus.files import file_rows
from tinyonn.errors import InputError

PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
Documents = dict[str, list[dict[str, Any]]]  # by split


def read_local(name: str, folder: Path, shots: int | None) -> dict[str, Any]:
    """What is to be changed in lm-eval's description of a task, so that its documents come from files.

    Parameters
    ----------
    name : str
        Of the task.
    folder : Path
        Where its files lie.
    shots : int or None
        Examples that will be taken from the training split, if there is to be another number than the task's.

    Raises
    ------
    InputError
        No files of this task are known, or they are not there; or examples are wanted and there is no training split.
    """
    base = next((known for known in LOCAL if name == known or name.startswith(f"{known}_")), None)
    if base is None:
        raise InputError(
            f"--tasks-data: which files hold {name} is not known, of {', '.join(LOCAL)} it is; leave it out to take "
            "the task from the hub, or describe it in a YAML file (see configs/tasks/example.yaml)"
        )
    read, examples = LOCAL[base]
    documents = read(folder)
    changes: dict[str, Any] = {"custom_dataset": lambda **_: _dataset(documents)}
    if "train" not in documents:
        if (examples if shots is None else shots) and base not in WITHOUT_EXAMPLES:
            raise InputError(
                f"--tasks-data {folder}: {base} takes examples from its training split, and no {base}_train file is "
                "there; add it, or give --shots 0"
            )
        changes |= {"training_split": None, "fewshot_split": None, "num_fewshot": 0}
    return changes


def _dataset(documents: Documents) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(rows) for split, rows in documents.items()})


def _piqa(folder: Path) -> Documents:
    found = {}
    for split, stem in (("validation", "piqa_valid"), ("train", "piqa_train")):
        questions = _find(folder, f"{stem}.jsonl", needed=split == "validation")
        if questions is None:
            continue
        labels = _find(
            folder, f"{stem}_labels.lst", "piqa_labels.lst" if split == "validation" else f"{stem}-labels.lst"
        )
        assert labels is not None
        rows, right = _rows(questions), labels.read_text("utf-8").split()
        if len(rows) != len(right):
            raise InputError(f"{labels} has {len(right):,} labels for {len(rows):,} questions of {questions}")
        found[split] = [{**row, "label": int(label)} for row, label in zip(rows, right, strict=True)]
    return found


def _gsm8k(folder: Path) -> Documents:
    test = _find(folder, "gsm8k_test.jsonl")
    assert test is not None
    train = _find(folder, "gsm8k_train.jsonl", "gsm8k_train_*.jsonl", needed=False)
    return {"test": _rows(test), **({} if train is None else {"train": _rows(train)})}


def _humaneval(folder: Path) -> Documents:
    path = _find(folder, "HumanEval.jsonl")
    assert path is not None
    return {"test": _rows(path)}


def _hellaswag(folder: Path) -> Documents:
    path, train = _find(folder, "hellaswag_val.jsonl"), _find(folder, "hellaswag_train.jsonl", needed=False)
    assert path is not None
    documents = {"validation": path, **({} if train is None else {"train": train})}
    return {
        split: [{**row, "label": str(row["label"])} for row in _rows(file)]
        for split, file in documents.items()
    }


LOCAL: dict[
    str, tuple[Callable[[Path], Documents], int]
] = {  # and the examples that each task takes by itself
    "piqa": (_piqa, 0),
    "gsm8k": (_gsm8k, 5),
    "humaneval": (_humaneval, 0),
    "hellaswag": (_hellaswag, 0),
}
WITHOUT_EXAMPLES = ("humaneval",)  # whatever --shots says


def _find(folder: Path, *patterns: str, needed: bool = True) -> Path | None:
    """The one file of a name, packed or not."""
    for pattern in patterns:
        found = sorted(path for ending in PACKED for path in folder.glob(pattern + ending))
        if len(found) > 1:
            raise InputError(
                f"--tasks-data {folder} has {' and '.join(p.name for p in found)}; leave one of them there"
            )
        if found:
            return found[0]
    if needed:
        raise InputError(f"--tasks-data {folder} has no {' or '.join(patterns)} (also .gz); put it there")
    return None


def _rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file."""
    rows = [row for _, row in file_rows(path)]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is not lines of JSON objects; fetch it again")
    return [dict(row) for row in rows]  # type: ignore[arg-type]
