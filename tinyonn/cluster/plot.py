"""Pictures of the cells: UMAP and t-SNE of a stratified sample of weights, cell sizes, layers by cell. PNG and HTML.

Needs the extra ``plot``. The sample is of the weights that the clustering has drawn, from every cell in proportion to
the root of its size, so that small cells are seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.cluster.centres import NEEDS
from tinyonn.cluster.look import coordinates, looked_at
from tinyonn.cluster.stage import Job, labels_of, source_of
from tinyonn.config import Config
from tinyonn.dense.parameters import kind_of
from tinyonn.errors import InputError
from tinyonn.places import store_location
from tinyonn.select.select import one_by_one
from tinyonn.show.escape import html, picture
from tinyonn.store.arrays import read_rows
from tinyonn.store.records import Float64
from tinyonn.store.repository import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE = 50_000  # weights in the projections
TSNE_SAMPLE = 10_000  # t-SNE grows faster than linearly; a part of the same sample
DOT = 2.0
PNG_DPI = 110


@dataclass(frozen=True)
class Sample:
    """Weights of the projections.

    Attributes
    ----------
    features : float64 [n, axes]
        Scaled, as the clustering saw them.
    cells : int64 [n]
    kinds, slices : list of str
        Of each weight: kind of module, slice that needs it most.
    """

    features: Float64
    cells: np.ndarray
    kinds: list[str]
    slices: list[str]


def plot_cells(location: str, config: Config, folder: Path, sample: int = SAMPLE) -> list[Path]:
    """Draw a clustered run.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        It was clustered with; its seed is that of the sample and of the projections, too.
    folder : Path
        Made if it is not there.
    sample : int
        Weights in the projections.

    Returns
    -------
    list of Path
        ``cells.png`` and ``cells.html``.

    Raises
    ------
    InputError
        The run is not clustered, or the extra is not installed.
    """
    try:
        import matplotlib
        import plotly  # noqa: F401
        import umap  # noqa: F401
    except ImportError as error:
        raise InputError(f"--plot needs the package {error.name}: pip install 'tiny-onn[plot]'") from None
    matplotlib.use("Agg")
    seed = config.cluster.seed
    drawn, stored = draw_sample(location, config, sample)
    maps = {"UMAP": _umap(drawn.features, seed)}
    part = np.random.default_rng(seed).permutation(drawn.cells.size)[:TSNE_SAMPLE]
    maps["t-SNE"] = _tsne(drawn.features[part], seed)
    parts = {"UMAP": np.arange(drawn.cells.size), "t-SNE": part}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "cells.png", folder / "cells.html"]
    _draw_png(paths[0], stored, drawn, maps, parts)
    _draw_html(paths[1], stored, drawn, maps, parts)
    return paths


def draw_sample(location: str, config: Config, wanted: int) -> tuple[Sample, dict[str, Any]]:
    """Weights from every cell in proportion to the root of its size, and the labels' attributes."""
    store = Store.open(store_location(location))
    stored = labels_of(store)
    if stored is None:
        raise InputError(f"{location} is not clustered yet; run `tinyonn cluster` first")
    job = Job(store, location, config, source_of(store, location, config))
    reader = store.reader()
    needs = [number for number, name in enumerate(job.space.names) if name.startswith(NEEDS)]
    looks, tables = job.look(one_by_one)
    features, cells, kinds, slices = [], [], [], []
    for parameter, look, table_FB in zip(job.inside, looks, tables, strict=True):
        array, what = reader.output("labels", parameter.name), reader.what("labels", parameter.name)
        width = parameter.size // parameter.shape[0]
        for first, last in looked_at(parameter.shape):
            inside = (look.at_N >= first * width) & (look.at_N < last * width)
            labels = read_rows(array, first, last, what).reshape(-1)[look.at_N[inside] - first * width]
            x_NA = coordinates(look, table_FB, job.space.place(parameter), np.flatnonzero(inside))
            features.append(x_NA)
            cells.append(labels.astype(np.int64))
            kinds += [kind_of(parameter)] * len(x_NA)
            slices += [job.space.slices[number] for number in x_NA[:, needs].argmin(1)]
    rng = np.random.default_rng(config.cluster.seed)
    drawn = _stratified(np.concatenate(features), np.concatenate(cells), kinds, slices, wanted, rng)
    return drawn, stored


def _stratified(
    features: Float64,
    cells: np.ndarray,
    kinds: list[str],
    slices: list[str],
    wanted: int,
    rng: np.random.Generator,
) -> Sample:
    sizes = np.bincount(cells)
    quota = np.sqrt(sizes)
    quota = np.minimum(sizes, np.ceil(quota * (wanted / max(quota.sum(), 1))))
    while quota.sum() < min(wanted, cells.size):  # small cells cannot fill their share
        room = sizes - quota
        quota = np.minimum(sizes, quota + np.ceil(room * ((wanted - quota.sum()) / room.sum())))
    order = rng.permutation(cells.size)
    by_cell = order[np.argsort(cells[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.concatenate([by_cell[starts[c] : starts[c] + int(quota[c])] for c in range(sizes.size)])
    return Sample(features[chosen], cells[chosen], [kinds[i] for i in chosen], [slices[i] for i in chosen])


def _umap(features: Float64, seed: int) -> Float64:
    import umap

    return np.asarray(
        umap.UMAP(n_neighbors=15, min_dist=0.1, random_state=seed, n_jobs=1).fit_transform(features)
    )


def _tsne(features: Float64, seed: int) -> Float64:
    from sklearn.manifold import TSNE

    jittered = features + np.random.default_rng(seed).normal(0, 1e-4, features.shape)  # rows repeat
    perplexity = min(30.0, (len(features) - 1) / 3)
    return np.asarray(TSNE(random_state=seed, init="pca", perplexity=perplexity).fit_transform(jittered))


def _layers_by_cell(stored: dict[str, Any]) -> Float64:
    """Share of each cell's weights by layer, float64 [layers, cells]."""
    return np.array([cell["layers"] for cell in stored["cells"]]).T


def _draw_png(
    path: Path, stored: dict[str, Any], drawn: Sample, maps: dict[str, Float64], parts: dict[str, np.ndarray]
) -> None:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, 3, figsize=(18, 17))
    for line, (name, points) in enumerate(maps.items()):
        chosen = parts[name]
        colours = {
            "cell": drawn.cells[chosen],
            "kind": np.array(drawn.kinds)[chosen],
            "slice that needs them most": np.array(drawn.slices)[chosen],
        }
        for column, (title, values) in enumerate(colours.items()):
            _scatter(grid[line, column], points, values)
            grid[line, column].set_title(f"{name} of {len(points):,} weights by {title}")
    sizes = np.array([cell["size"] for cell in stored["cells"]])
    grid[2, 0].bar(np.arange(sizes.size), np.sort(sizes)[::-1])
    grid[2, 0].set(title="cell sizes, largest first", ylabel="weights", yscale="log")
    image = grid[2, 1].imshow(_layers_by_cell(stored), aspect="auto", origin="lower", cmap="magma")
    grid[2, 1].set(title="share of a cell's weights by layer", xlabel="cell", ylabel="layer")
    figure.colorbar(image, ax=grid[2, 1])
    names = stored["slices"]
    needs = np.array([[cell["needs"][name] for name in names] for cell in stored["cells"]])
    image = grid[2, 2].imshow(-np.log2(needs.T), aspect="auto", cmap="magma")
    grid[2, 2].set(title="how much slices need a cell, octaves of the budget", xlabel="cell")
    grid[2, 2].set_yticks(range(len(names)), [picture(name) for name in names])
    figure.colorbar(image, ax=grid[2, 2])
    figure.tight_layout()
    figure.savefig(path, dpi=PNG_DPI)
    pyplot.close(figure)


def _scatter(axes: Axes, points: Float64, values: np.ndarray) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if values.dtype.kind in "iu":
        axes.scatter(points[:, 0], points[:, 1], c=values, s=DOT, cmap="gist_ncar", linewidths=0)
        return
    for number, name in enumerate(sorted(set(values))):
        chosen = values == name
        axes.scatter(
            points[chosen, 0],
            points[chosen, 1],
            s=DOT,
            color=f"C{number % 10}",
            label=picture(name),
            linewidths=0,
        )
    axes.legend(markerscale=5, fontsize=8)


def _draw_html(
    path: Path, stored: dict[str, Any], drawn: Sample, maps: dict[str, Float64], parts: dict[str, np.ndarray]
) -> None:
    """One page without a network: the projections with what each weight is, and the layers by cell."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=3, subplot_titles=[*maps, "share of a cell's weights by layer"])
    for column, (name, points) in enumerate(maps.items(), 1):
        text = [
            html(f"cell {drawn.cells[i]}, {drawn.kinds[i]}, {drawn.slices[i]}") for i in parts[name].tolist()
        ]
        marker = {"size": 3, "color": drawn.cells[parts[name]], "colorscale": "Turbo"}
        figure.add_trace(
            go.Scattergl(
                x=points[:, 0], y=points[:, 1], mode="markers", marker=marker, text=text, hoverinfo="text"
            ),
            row=1,
            col=column,
        )
    figure.add_trace(go.Heatmap(z=_layers_by_cell(stored), colorscale="Magma"), row=1, col=len(maps) + 1)
    figure.update_layout(title=f"{len(stored['cells'])} cells", showlegend=False, height=700)
    figure.write_html(path, include_plotlyjs=True)
