"""Turn the numbers of an evaluation into pictures for a page: each function returns one `data:` URI.

Every plot has a title, named axes and units, and stays legible from 2 classes to some hundred: beyond
`NAMED` classes it names groups or extremes instead of all. Drawn on figures of their own, never through
pyplot, whose state is global and would outlive a training worker's report.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, PercentFormatter, SymmetricalLogLocator

from pipelines.evaluation.metrics import Array
from pipelines.taxonomy.taxonomy import SEPARATOR

NAMED = 40
"""Most classes that get a label each; a full-width plot has room for no more at a readable size."""
COUNTED = 25
"""Most classes whose cells of the confusion matrix hold their number."""
EXTREMES = 15
"""Best and worst classes named where not all can be."""
WIDE, HALF = 11.2, 5.5
"""Inches of a plot over the full page and over one of two columns."""

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2563a8", "#d97706"
COLOURS = ("#2563a8", "#d97706", "#0f8a5f", "#b4437c", "#6d5bd0", "#5b6b7a", "#a3611b", "#1a9bb5")
"""Distinguishable in the common forms of colour blindness, dark enough on white."""

STYLE = {
    "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.6, "svg.hashsalt": "iab-vision", "axes.prop_cycle": cycler(color=COLOURS),
}  # fmt: skip

Classes = Sequence[Mapping[str, Any]]


@contextmanager
def draw_figure(width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A styled figure to draw on, and a list that receives its `data:` URI as SVG when the block ends."""
    uris: list[str] = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, uris
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        uris.append(f"data:image/svg+xml;base64,{base64.b64encode(sink.getvalue()).decode()}")


def plot_axes(width: float, height: float, draw: Callable[[Any], None]) -> str:
    """One set of axes, drawn on by `draw`, as SVG."""
    with draw_figure(width, height) as (figure, uris):
        draw(figure.subplots())
    return uris[0]


def shorten(name: str, length: int = 30) -> str:
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def plot_confusion(classes: Classes, cells: Sequence[Sequence[int]]) -> str:
    """Share of each true class that went to each predicted one; siblings next to each other."""
    order = sorted(range(len(classes)), key=lambda c: classes[c]["path"])
    counts_cc = np.zeros((len(classes), len(classes)))
    for true, predicted, images in cells:
        counts_cc[true, predicted] = images
    counts_cc = counts_cc[np.ix_(order, order)]
    names = [classes[c]["name"] for c in order]
    groups = [classes[c]["path"].split(SEPARATOR)[0] for c in order]
    if len(classes) <= NAMED:
        return _plot_named_matrix(counts_cc, names, groups, "Confusion matrix")
    return _plot_dense_matrix(counts_cc, groups)


def plot_tier1_confusion(classes: Classes, cells: Sequence[Sequence[int]]) -> str | None:
    """The confusion matrix summed to Tier 1; None where it would say nothing new or have no room."""
    groups = [one["path"].split(SEPARATOR)[0] for one in classes]
    names = sorted(set(groups))
    if not 1 < len(names) < len(classes) or len(names) > NAMED:
        return None
    index = {name: position for position, name in enumerate(names)}
    counts_cc = np.zeros((len(names), len(names)))
    for true, predicted, images in cells:
        counts_cc[index[groups[true]], index[groups[predicted]]] += images
    return _plot_named_matrix(counts_cc, names, names, "Confusion matrix at Tier 1")


def _share_rows(counts_cc: Array) -> Array:
    """Each row as shares of its sum; a class without images keeps an empty row."""
    return np.asarray(counts_cc / np.maximum(counts_cc.sum(axis=1, keepdims=True), 1))


def _plot_named_matrix(counts_cc: Array, names: list[str], groups: list[str], title: str) -> str:
    n = len(names)
    side = min(max(3.6 + 0.4 * n, 5.0), WIDE)
    with draw_figure(side, side - 1.2) as (figure, uris):
        axes = _matrix(figure, counts_cc, mpl.colors.Normalize(0, 1))
        labels = [shorten(name) for name in names]
        axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels)
        _separate(axes, groups, MUTED)
        if n <= COUNTED:
            _write_counts(axes, counts_cc)
        axes.set_title(f"{title} (number: images)" if n <= COUNTED else title)
    return uris[0]


def _matrix(figure: Figure, counts_cc: Array, norm: Any) -> Any:
    """Axes with the shares of each true class as colours and a bar that explains them."""
    axes = figure.subplots()
    # Without interpolation the cells go into the SVG as they are: sharp at any zoom, one pixel each.
    image = axes.imshow(_share_rows(counts_cc), cmap="Blues", norm=norm, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, label="share of the true class", format=PercentFormatter(1), shrink=0.6)
    return axes


def _write_counts(axes: Any, counts_cc: Array) -> None:
    shares_cc = _share_rows(counts_cc)
    for row, column in zip(*np.nonzero(counts_cc), strict=True):
        colour = "white" if shares_cc[row, column] > 0.5 else INK
        text = f"{int(counts_cc[row, column])}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def _separate(axes: Any, groups: Sequence[str], colour: str) -> None:
    """Lines between groups of siblings, unless every class is a group of its own."""
    if len(set(groups)) == len(groups):
        return
    for edge in _find_starts(groups)[1:]:
        axes.axhline(edge - 0.5, color=colour, linewidth=0.6)
        axes.axvline(edge - 0.5, color=colour, linewidth=0.6)


def _find_starts(groups: Sequence[str]) -> list[int]:
    return [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]


def _plot_dense_matrix(counts_cc: Array, groups: Sequence[str]) -> str:
    """Some hundred classes: a picture of the blocks, named by Tier 1 where there is room."""
    with draw_figure(10, 8.8) as (figure, uris):
        # The square root makes confusions of a few per cent visible off the diagonal.
        axes = _matrix(figure, counts_cc, mpl.colors.PowerNorm(0.5, 0, 1))
        _separate(axes, groups, GRID)
        axes.set_title(f"Confusion matrix of {len(groups)} classes")
        if len(set(groups)) < len(groups):
            _name_blocks(axes, groups)
        else:
            axes.set(xlabel="predicted class, by its name's rank", ylabel="true class, by its name's rank")
    return uris[0]


def _name_blocks(axes: Any, groups: Sequence[str]) -> None:
    """Tick labels in the middle of each block, left out where they would touch the one before."""
    starts = _find_starts(groups)
    least_gap = len(groups) / 45  # 45 lines of 8 points fill the height of the axes
    positions: list[float] = []
    names: list[str] = []
    for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True):
        middle = (start + stop - 1) / 2
        if not positions or middle - positions[-1] >= least_gap:
            positions.append(middle)
            names.append(shorten(groups[start], 24))
    axes.set_yticks(positions, names, fontsize=7)
    axes.set_xticks(positions, names, fontsize=7, rotation=90)


def plot_curves(found: Mapping[str, Any], classes: Classes) -> tuple[str, str]:
    """ROC and precision-recall curves: the average over all decisions, and single classes."""
    lines = [("all decisions", found["average"], {"color": INK, "linewidth": 2.2})]
    lines += [(shorten(classes[one["class"]]["name"], 26), one, {}) for one in found["classes"]]

    def roc(axes: Any) -> None:
        for name, one, how in lines:
            x, y = one["false_positive_rate"], one["true_positive_rate"]
            axes.plot(x, y, label=f"{name} ({one['roc_auc']:.2f})", **how)
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
        _set_shares(axes, "ROC curves (area)", "false positive rate (%)", "true positive rate (%)")

    def precision_recall(axes: Any) -> None:
        for name, one, how in lines:
            label = f"{name} ({one['average_precision']:.2f})"
            axes.step(one["recall"], one["precision"], where="post", label=label, **how)
        _set_shares(axes, "Precision-recall curves (average precision)", "recall (%)", "precision (%)")

    return plot_axes(HALF, 5.0, roc), plot_axes(HALF, 5.0, precision_recall)


def _set_shares(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    """Both axes from 0 to 100 %, the legend below them where no curve can run through it."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.figure.legend(loc="outside lower center", ncols=2)


def plot_reliability(calibration: Mapping[str, Any]) -> str:
    """How often the answer is right against how sure it was, before and after the temperature."""
    with draw_figure(HALF, 5.0) as (figure, uris):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1, label="perfectly calibrated")
        for moment, colour in (("before", ORANGE), ("after", BLUE)):
            bins = calibration[moment]
            label = f"{moment} (error {bins['ece']:.3f})"
            upper.plot(bins["confidence"], bins["frequency"], "o-", markersize=4, color=colour, label=label)
            lower.plot(bins["confidence"], bins["count"], "o-", markersize=3, color=colour)
        upper.set(title="Reliability before and after calibration", ylabel="right (%)", ylim=(-0.02, 1.02))
        upper.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        upper.legend(loc="lower right")
        lower.set(xlabel="confidence (%)", ylabel="answers", xlim=(-0.02, 1.02))
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.8)
        lower.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return uris[0]


def plot_class_reliability(calibration: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> str:
    """How often an image has a class against the probability of that class: the least reliable ones."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
        for one in calibration["classes"]:
            label = f"{classes[one['class']]['name']} (error {one['ece']:.3f})"
            axes.plot(one["confidence"], one["frequency"], "o-", markersize=4, label=label)
        title = "Reliability of the least reliable classes"
        _set_shares(axes, title, "probability of the class (%)", "images that have it (%)")

    return plot_axes(HALF, 5.0, draw)


def plot_coverage(curve: Mapping[str, Sequence[float]]) -> str:
    """Precision of the best label when only the surest images are answered."""

    def draw(axes: Any) -> None:
        axes.plot(curve["coverage"], curve["precision"], color=BLUE, label="precision of the answers")
        axes.plot(
            curve["coverage"], curve["threshold"], color=ORANGE, linestyle="--", label="threshold needed"
        )
        _set_shares(axes, "Coverage against precision", "images answered (%)", "precision, threshold (%)")

    return plot_axes(HALF, 5.0, draw)


def plot_learning(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Losses, scores and learning rate of each evaluation of a training run; None without two of them."""
    numbers = _list_numbers(history)
    losses = [name for name in numbers if name.endswith("loss") and name != "log_loss"]
    panels = [
        ("Loss", "cross entropy (nats)", losses),
        ("Validation scores", "score (0 to 1)", [name for name in numbers if _is_score(name)]),
        ("Learning rate", "per step", [name for name in numbers if name.endswith("learning_rate")]),
    ]
    panels = [panel for panel in panels if panel[2]]
    if len(history) < 2 or not panels:
        return None
    with draw_figure(WIDE, 3.9) as (figure, uris):
        for axes, (title, unit, names) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for name in names:
                axes.plot(*_collect_series(history, name), "o-", markersize=2.5, label=name.replace("_", " "))
            axes.set(title=title, xlabel="epoch", ylabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return uris[0]


SCORES = ("accuracy", "accuracy@3", "balanced_accuracy", "f1_macro", "map", "f1_micro")


def _is_score(name: str) -> bool:
    return any(name == score or name.endswith(("_" + score, "/" + score)) for score in SCORES)


def _list_numbers(history: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for line in history for name in line)
    return [name for name in names if isinstance(next(line[name] for line in history if name in line), float)]


def _collect_series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    lines = [(i, line) for i, line in enumerate(history, start=1) if line.get(name) is not None]
    return [line.get("epoch", i) for i, line in lines], [line[name] for _, line in lines]


def plot_classes(classes: Classes) -> str:
    """F1 of every class with its 95 % interval; of many classes, the best and the worst."""
    known = [one for one in classes if one["images"]]
    ranked = sorted(known, key=lambda one: (-one["f1"], one["images"], one["path"]))
    if len(ranked) <= NAMED:
        panels = [("F1 of each class, with 95 % interval", ranked)]
    else:
        panels = [
            (f"Best {EXTREMES} classes", ranked[:EXTREMES]),
            (f"Worst {EXTREMES} classes", ranked[-EXTREMES:]),
        ]
    rows = max((len(shown) for _, shown in panels), default=1)
    with draw_figure(WIDE, 1.1 + 0.24 * rows) as (figure, uris):
        for axes, (title, shown) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw_forest(axes, shown)
            axes.set(title=title, xlabel="F1 (%)", ylabel="class (images)", xlim=(-0.01, 1.01))
            axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return uris[0]


def _draw_forest(axes: Any, shown: Classes) -> None:
    """One dot with whiskers per class, the best on top."""
    f1 = np.array([one["f1"] for one in shown])
    interval = np.array([one["f1_interval"] for one in shown]).reshape(-1, 2)
    whiskers = np.abs(interval.T - f1)
    axes.errorbar(
        f1, range(len(shown)), xerr=whiskers, fmt="o", markersize=4, color=BLUE, ecolor=MUTED, elinewidth=1
    )
    axes.set_yticks(range(len(shown)), [f"{shorten(one['name'])} ({one['images']})" for one in shown])
    axes.invert_yaxis()


def plot_balance(counts: Mapping[str, Mapping[str, int]], classes: Classes) -> str:
    """Images per class in each split: bars with names, or for many classes a curve by rank."""
    biggest = next(iter(counts.values()))
    ranked = sorted(classes, key=lambda one: -biggest.get(one["id"], 0))
    if len(classes) <= NAMED:
        return plot_axes(WIDE, 1.2 + 0.26 * len(classes), lambda axes: _draw_bars(axes, counts, ranked))
    return plot_axes(WIDE, 3.9, lambda axes: _draw_ranks(axes, counts, classes))


def _draw_bars(axes: Any, counts: Mapping[str, Mapping[str, int]], ranked: Classes) -> None:
    left = np.zeros(len(ranked))
    for split, of_class in counts.items():
        width = np.array([of_class.get(one["id"], 0) for one in ranked])
        axes.barh(range(len(ranked)), width, left=left, label=split, height=0.7)
        left += width
    axes.set_yticks(range(len(ranked)), [shorten(one["name"]) for one in ranked])
    axes.invert_yaxis()
    axes.set(title="Class balance", xlabel="images", ylabel="class")
    axes.figure.legend(loc="outside lower center", ncols=3)


def _draw_ranks(axes: Any, counts: Mapping[str, Mapping[str, int]], classes: Classes) -> None:
    """A falling curve for each split, by its own ranks: by those of another it would jump up and down."""
    for split, of_class in counts.items():
        images = sorted((of_class.get(one["id"], 0) for one in classes), reverse=True)
        axes.plot(range(1, len(images) + 1), images, label=split)
    axes.set(title="Class balance", xlabel="class, by rank in its split", ylabel="images")
    axes.set_yscale("symlog", linthresh=1)
    ticks = SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5))  # a decade may hold all counts
    axes.yaxis.set_major_locator(ticks)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.figure.legend(loc="outside lower center", ncols=3)
