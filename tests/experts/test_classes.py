from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import tinyonn.experts.class_cuts as class_cuts
import tinyonn.experts.cuts as cuts_module
from tests.experts.arrays import CELLS, arrays, attributes
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.class_cuts import ClassCutter
from tinyonn.experts.class_passes import BLOCK
from tinyonn.experts.classes import Classes
from tinyonn.experts.cutting import Cutter, TensorView
from tinyonn.experts.options import CORES, SelectOptions, TensorCuts
from tinyonn.experts.source import ArraySource

SHAPE = (129, 64)  # two whole blocks and a part of one


def source_of(
    seed: int = 0, shape: tuple[int, int] = SHAPE, cells: int = CELLS, few: int = 0xFFFF
) -> ArraySource:
    """One tensor; `few` masks its records."""
    parameter = Parameter("w", shape, 0, "linear")
    data = arrays(shape, seed, max(cells, 1))
    data["records"] &= np.uint16(few)
    return ArraySource((parameter,), {"w": data}, {"w": attributes(seed)}, cells=cells)


def both(
    source: ArraySource, options: SelectOptions, keep: int, core: int, held: int = 1 << 40
) -> tuple[TensorCuts, TensorCuts]:
    """The cuts by class, and as for any score."""
    parameter = source.parameters[0]
    classes = classes_of(source, options)
    found = ClassCutter(source, parameter, classes, keep, core, options, held).cuts()
    return found, Cutter(source, parameter, keep, core, options, held).cuts()


def classes_of(source: ArraySource, options: SelectOptions) -> Classes:
    classes = Classes.of(source, source.parameters[0], options)
    assert isinstance(classes, Classes)
    return classes


def assert_same_groups(source: ArraySource, options: SelectOptions, cuts: TensorCuts) -> None:
    parameter = source.parameters[0]
    view = TensorView(source, parameter, options)
    band = view.band(0, parameter.shape[0])
    by_class = classes_of(source, options).groups(cuts)
    np.testing.assert_array_equal(by_class(band), view.groups(cuts)(band))
    one = view.band(parameter.shape[0] - 1, parameter.shape[0])
    np.testing.assert_array_equal(by_class(one), by_class(band)[-1:])


@pytest.mark.parametrize("within", ["cell", "tensor"])
@pytest.mark.parametrize("cells", [0, 1, CELLS])
def test_cuts_and_groups_are_those_of_any_score(within: str, cells: int) -> None:
    size = SHAPE[0] * SHAPE[1]
    balances = (0.0, 0.05, 1.0) if within == "cell" else (0.05,)
    for seed, (score, few) in enumerate((("S", 0xFFFF), ("seed", 0xFFFF), ("activation", 0xF000), ("S", 0))):
        source = source_of(seed, cells=cells, few=few)
        for balance, core in product(balances, (0.0, 0.3, 1.0)):
            by = CORES[seed % 2]
            options = SelectOptions(
                score=score, within=within, balance=balance, core=core, core_by=by, seed=seed
            )
            for keep in (0, 5, size // 3, size):
                found, wanted = both(source, options, keep, round(core * keep))
                assert found.tree() == wanted.tree()
                assert_same_groups(source, options, found)


@pytest.mark.parametrize("gathered", [0, 300, 4000])
@pytest.mark.parametrize("within", ["cell", "tensor"])
def test_tensors_of_more_than_is_sorted_at_once(
    within: str, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts_module, "GATHERED", gathered)
    monkeypatch.setattr(class_cuts, "GATHERED", gathered)
    size = SHAPE[0] * SHAPE[1]
    for few, core, keep in product((0xFFFF, 0x8000), (0.0, 0.5), (size // 4, size - 3)):
        source = source_of(few & 7, few=few)
        options = SelectOptions(within=within, core=core, core_by="even")
        found, wanted = both(source, options, keep, round(core * keep))
        assert found.tree() == wanted.tree()
        assert_same_groups(source, options, found)


def test_all_ties_lie_on_all_three_cuts() -> None:
    source = source_of(few=0)
    source.arrays["w"]["affinity"][:] = 7
    for core in (0.1, 0.5, 0.9):
        options = SelectOptions(core=core, core_by="even")
        found, wanted = both(source, options, 4000, round(core * 4000))
        assert found.tree() == wanted.tree()
        assert found.cut[0] >> np.uint64(32) == found.cell_cut[0] >> np.uint64(32)
        assert_same_groups(source, options, found)


def test_a_cut_that_is_sought_too_near_is_sought_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_cuts, "DEVIATIONS", 1e-4)
    source, options = source_of(few=0xF000), SelectOptions()
    found, wanted = both(source, options, 3000, 1500)
    assert found.tree() == wanted.tree()


def test_a_tensor_of_several_chunks_is_cut_the_same_held_or_read_again() -> None:
    shape = (2300, 2000)  # more weights than are sorted at once, two chunks
    source, options = source_of(shape=shape), SelectOptions(score="activation")
    keep = round(0.3 * shape[0] * shape[1])
    held, wanted = both(source, options, keep, keep // 2)
    read, _ = both(source, options, keep, keep // 2, held=0)
    assert held.tree() == read.tree() == wanted.tree()
    assert_same_groups(source, options, held)


@pytest.mark.parametrize("shape", [(1, 1), (1, BLOCK), (1, BLOCK + 1), (3, BLOCK + 1)])
def test_blocks_of_one_weight(shape: tuple[int, int]) -> None:
    source = source_of(shape=shape)
    source.arrays["w"]["labels"][:, -1] = CELLS - 1  # where the last block is that weight alone
    for core, keep in product((0.0, 0.5), {1, shape[0] * shape[1] // 2, shape[0] * shape[1]} - {0}):
        options = SelectOptions(core=core, core_by="even")
        found, wanted = both(source, options, keep, round(core * keep))
        assert found.tree() == wanted.tree()
        assert_same_groups(source, options, found)


def test_other_scores_and_rows_go_without_classes() -> None:
    source = source_of()
    parameter = source.parameters[0]
    others: list[dict[str, Any]] = [{"score": "magnitude"}, {"score": "wanda"}, {"within": "row"}]
    for options in others:
        assert Classes.of(source, parameter, SelectOptions(**options)) is None
    attribute = attributes()
    attribute["fields"]["act"]["codebook"][15] = float("nan")
    assert Classes.of(replace(source, attribute={"w": attribute}), parameter, SelectOptions()) is None


def test_labels_of_no_cell_are_refused() -> None:
    source = source_of()
    source.arrays["w"]["labels"][3, 4] = CELLS
    with pytest.raises(InputError, match=r"w has a weight with the label 5, but there are 5 cells"):
        ClassCutter(
            source, source.parameters[0], classes_of(source, SelectOptions()), 5, 2, SelectOptions()
        ).cuts()
