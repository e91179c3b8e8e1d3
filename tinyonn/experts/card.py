"""The model card of an assembled model: what was kept, on what data, figures, limits, licence of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tinyonn.show.escape import code, markdown

LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
with model.gates([1.0] + [0.0] * (model.config.experts - 1)):  # the first expert and the core alone
    model.generate(**inputs)
```

The code in this folder needs Torch and transformers alone; with Numba it has faster kernels. With Tiny-ONN installed,
`import tinyonn.experts` makes `trust_remote_code` unnecessary."""


def write_card(folder: Path, config: dict[str, Any], base: Path, figures: Any = None) -> None:
    """Write ``README.md``.

    Parameters
    ----------
    folder : Path
    config : dict
        The model's ``config.json``.
    base : Path
        Folder of the base model, whose card says its licence.
    figures : dict, optional
        Held-out loss in nats by line, from `tinyonn evaluate`: ``{"line": {"slice": loss, ..., "mean": loss}}``; of a
        trained model on the tokens after the prompt, from ``tinyonn evaluate --trained``.
    """
    assembly = config["assembly"]
    front, licence = _front(base, assembly)
    (folder / "README.md").write_text(
        "\n".join(
            [
                "---",
                yaml.safe_dump(front, sort_keys=False).strip(),
                "---",
                "",
                f"# {markdown(_name(assembly))} as sparse experts",
                "",
                *_kept(assembly, _chosen(config)),
                "",
                "## Use",
                "",
                LOADING,
                "",
                "## Quality",
                "",
                *_quality(figures, "training" in assembly),
                "",
                "## Limits",
                "",
                f"- {_training(assembly)} What the model knew through the dropped weights is lost, and",
                "  perplexity does not show all of it.",
                "- Scores come from the samples named above. On other kinds of text more is lost.",
                "- Speed and memory gain as fewer experts are on; with all on, the model runs as a dense one.",
                "",
                "## Licence",
                "",
                licence,
                "",
            ]
        ),
        "utf-8",
    )


def _front(base: Path, assembly: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Front matter, and a sentence on the licence."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse", "mixture-of-experts", "tiny-onn"],
    }
    path = assembly["base"]["path"]
    if "/" in path and not Path(path).exists():
        front["base_model"] = path
    theirs = _front_matter(base / "README.md")
    licence = theirs.get("license")
    if licence is None:
        return (
            front,
            "The weights are those of the base model; its licence holds for them. See the base model's card.",
        )
    front["license"] = licence
    for key in ("license_name", "license_link", "language"):
        if key in theirs:
            front[key] = theirs[key]
    return (
        front,
        f"The weights are those of the base model, whose card names the licence {code(licence)}; it holds here too.",
    )


def _front_matter(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    parts = path.read_text("utf-8").split("---", 2)
    try:
        tree = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _name(assembly: dict[str, Any]) -> str:
    path = str(assembly["base"]["path"]).rstrip("/")
    return "The reference model" if path == "reference" else path.rsplit("/", 1)[-1]


def _training(assembly: dict[str, Any]) -> str:
    training = assembly.get("training")
    if training is None:
        return "Nothing was trained after the cut."
    options = training.get("options", {})
    steps = options.get("steps", training["steps"])
    learned = ["experts"] if options.get("optimizers.experts") != "frozen" else []
    if options.get("optimizers.norms_lr", 0) > 0:
        learned.append("norms and biases")
    if options.get("optimizers.trunk_lr", 0) > 0:
        learned.append("embeddings and head")
    taught = f", and the router {options['warm_start']:,} before" if options.get("warm_start") else ""
    return f"Trained after the cut: {', '.join(learned) or 'the router'}, {steps:,} steps{taught}."


def _chosen(config: dict[str, Any]) -> int | None:
    """Experts on per prompt, None is all; earlier folders say ``top_k``."""
    if config.get("router"):
        chosen: int | None = config["router"]["top_k"]
        return chosen
    return config.get("experts_top_k", config.get("top_k"))


def _kept(assembly: dict[str, Any], top_k: int | None) -> list[str]:
    report, selection = assembly["report"], assembly["selection"]
    experts = len(report["sizes"]) - 1
    on = "all experts are on" if top_k is None else f"{top_k} of {experts} experts are on"
    slices = ", ".join(f"{markdown(name)} ({count:,})" for name, count in assembly["slices"].items())
    base, share = assembly["base"], report["budget"] / report["linear"]
    since = "what was trained since is named below" if "training" in assembly else "none was trained"
    rounded = " after NF4" if base["quantization"] == "nf4" else ""
    what = (
        f"{report['budget']:,} of {report['linear']:,} weights of the linear layers ({share:.1%}) of "
        f"{code(base['path'])}, in {experts} experts and a core of {report['sizes'][-1]:,} weights that is "
        f"always on. Values are the base's{rounded}; {since}. Embeddings, head, norms and biases "
        f"({report['trunk']:,}) are whole. "
        f"By default {on}."
    )
    made = (
        f"Made with Tiny-ONN {assembly['tinyonn']} from what every weight did on {assembly['samples']:,} samples: "
        f"{slices}. Score {code(selection['score'])}, best within each {markdown(selection['within'])}, budget across "
        f"tensors {code(selection['allocation'])}, core {selection['core']:.0%} of the budget, "
        f"seed {selection['seed']}."
    )
    lines = [what, "", made, "", "| kind | weights | kept | share |", "|---|---|---|---|"]
    for kind, (kept, every) in report["kinds"].items():
        lines.append(f"| {markdown(kind)} | {every:,} | {kept:,} | {kept / every:.1%} |")
    return lines


def _quality(figures: Any, trained: bool) -> list[str]:
    if not figures:
        option = " --trained" if trained else ""
        return [
            f"Not measured yet: `tinyonn evaluate{option}` measures it, `tinyonn export{option}` puts the figures here."
        ]
    slices = list(next(iter(figures.values())))
    lines = [
        f"Held-out loss, nats a token{' after the prompt' if trained else ''}:",
        "",
        f"| | {' | '.join(map(markdown, slices))} |",
        f"|---|{'---|' * len(slices)}",
    ]
    for name, losses in figures.items():
        lines.append(f"| {markdown(name)} | {' | '.join(f'{losses[s]:.3f}' for s in slices)} |")
    return lines
