"""How much of the profile's ranking of experts the recording knows already: needs by slice beside what was measured.

    python benchmarks/targets.py storage/RUN [--on 10 25 50] [--json]

RUN is assembled and profiled. For every profiled sample the experts are put in order by what they contribute a weight,
as the router is first taught; beside it stand the order of the sample's slice by the cells' needs, which the recording
gives without a pass, one order for all samples, and the mean of the slice's other profiled samples. What is told is the
contribution of the first so many experts of an order over that of the sample's own first ones, means over samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import at_least, finish
from tinyonn.experts.folder import read_settings
from tinyonn.profile.profile import open_profile
from tinyonn.store.records import Float64

Order = Callable[[int], Float64]  # of a sample's experts, the higher the sooner: float64 [experts]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--on", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    profile = open_profile(wanted.run / "profile")
    settings = read_settings(wanted.run / "experts", "assemble again")
    needs = {name: np.array(its) for name, its in settings["assembly"]["needs"].items()}
    sizes_E = np.array(settings["expert_sizes"][:-1])
    whole_SE = profile.contribution[:, : sizes_E.size].astype(np.float64)
    each_SE = whole_SE / np.maximum(sizes_E, 1)
    slices_S = np.array(profile.slices)

    def of_others(sample: int) -> Float64:
        others = slices_S == slices_S[sample]
        others[sample] = False
        return np.asarray(each_SE[others].mean(0))

    every_E = each_SE.mean(0)
    orders: dict[str, Order] = {
        "needs by slice": lambda sample: np.asarray(-needs[slices_S[sample]]),
        "one order for all": lambda sample: every_E,
        "other samples of the slice": of_others,
    }
    rows, figures = [], {}
    for name, order in orders.items():
        shares = {on: [] for on in wanted.on}  # type: dict[int, list[float]]
        agreement = []
        for sample in range(len(slices_S)):
            given_E = order(sample)
            agreement.append(float(spearmanr(given_E, each_SE[sample]).statistic))
            for on, its in shares.items():
                chosen = np.argsort(-given_E, kind="stable")[:on]
                best = np.argsort(-each_SE[sample], kind="stable")[:on]
                its.append(float(whole_SE[sample, chosen].sum() / whole_SE[sample, best].sum()))
        figures[name] = {str(on): float(np.mean(its)) for on, its in shares.items()}
        rows.append(
            [name, f"{np.mean(agreement):.3f}", *(f"{value:.3f}" for value in figures[name].values())]
        )
    goals = [
        at_least(
            f"{on} on: needs, of the other samples'", of / figures["other samples of the slice"][on], 0.95
        )
        for on, of in figures["needs by slice"].items()
    ]
    columns = ("order", "rank correlation", *(f"{on} of {sizes_E.size}" for on in wanted.on))
    finish("targets", columns, rows, goals, wanted.json, {"samples": len(slices_S), **figures})


if __name__ == "__main__":
    main()
