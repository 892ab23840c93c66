"""Plot the curves of one or several runs, and how their sample grids change.

    python -m support.plot runs/a runs/b --out plot.png     # six panels, needs matplotlib
    python -m support.plot runs/a runs/b --samples --row 2 --out grids.png

Run it from the root of the repository, also while the runs are training. It reads log.jsonl,
config.json and samples_STEP.png from the folder of each run. No network is run.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.runtime import pixels, run_command, writing

# ---------------------------------------------------------------- reading runs


class Run(NamedTuple):
    """What is read from the folder of a run."""

    name: str  # what the figure calls it
    folder: str
    config: dict  # the settings
    lines: list[dict]  # the lines of log.jsonl, each with "step" and "images"


def read_runs(folders):
    """Read config.json and log.jsonl of each run. Returns a list of Run.

    Raises ValueError, which names the folder, if it is not that of a run.
    """
    # The last part of the path is short, but may be the same for two runs.
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders

    runs = []
    for name, folder in zip(names, folders):
        try:
            with open(f"{folder}/config.json", encoding="utf-8") as file:
                config = json.load(file)
            lines = read_log(f"{folder}/log.jsonl", config)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not the folder of a run of train.py: {error}") from error
        runs.append(Run(name, folder, config, lines))
    return runs


def read_log(path, config):
    """Read the lines of log.jsonl. Returns a list of dicts. Raises OSError.

    Lines that are not complete are skipped: the last one while train.py writes it, and others after
    a crash of the machine.
    """
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                if "images" not in line:  # an old log
                    line["images"] = line["step"] * config["batch"]
                lines.append(line)
    return lines


# The settings that decide what the value of a loss means.
LOSS_SETTINGS = ("loss", "space", "multiscale", "schedule", "res")


def comparison_note(runs):
    """Say that the losses of the runs cannot be compared, and why. Returns "" if they can."""
    # False counts as missing: old runs lack --multiscale.
    settings = [{key: run.config.get(key) or None for key in LOSS_SETTINGS} for run in runs]
    different = [key for key in LOSS_SETTINGS if len({str(own[key]) for own in settings}) > 1]
    texts = []
    for run, own in zip(runs, settings):
        values = [f"{key} {own[key] or 'none'}" for key in different]
        texts.append(f"{run.name} has {', '.join(values)}")
    return f"the losses cannot be compared: {'; '.join(texts)}" if different else ""


# ---------------------------------------------------------------- the curves of each panel

LONG = 100  # logs of at least so many lines are smoothed
WINDOW = 0.02  # by a mean over this fraction of their lines


class Curve(NamedTuple):
    """One line in a panel."""

    style: str  # a key of STYLES
    x: np.ndarray  # (N,) images seen, or logsnr
    y: np.ndarray  # (N,)


def values_of(run, key):
    """The values of a key in the log. Returns (images seen, values), each (N,) float64."""
    points = [(line["images"], line[key]) for line in run.lines if key in line]
    return np.array(points, float).reshape(-1, 2).T


def plain(run, key, style="solid"):
    """A curve over images seen. Returns a list with a Curve, or an empty one without data."""
    images, values = values_of(run, key)
    return [Curve(style, images, values)] if len(values) else []


def smoothed(run, key):
    """Like plain. A long log becomes a thin curve, and its running mean a thick one."""
    images, values = values_of(run, key)
    # NaNs would spread over the whole window.
    is_finite = np.isfinite(values)
    if is_finite.sum() < LONG:
        return plain(run, key)

    window = int(WINDOW * is_finite.sum())
    weights = np.ones(window) / window
    # The mean of the images seen is the center of the window.
    centers = np.convolve(images[is_finite], weights, "valid")
    means = np.convolve(values[is_finite], weights, "valid")
    return [Curve("thin", images, values), Curve("solid", centers, means)]


def held_out_loss(run):
    """The loss of images that the run does not train on, with the EMA and the raw weights."""
    return plain(run, "val_loss_ema") + plain(run, "val_loss", "dashed")


def distances(run):
    """FID, or FD-NAME of other features, and their spatial variants sFID and sFD-NAME."""
    names = {key for line in run.lines for key in line if re.match("s?(FID|FD-)", key)}
    curves = []
    for name in sorted(names):
        curves += plain(run, name, "dashed" if name.startswith("s") else "solid")
    return curves


def loss_by_level(run):
    """Loss by noise level: in the first and the last tenth of the log, and held out at the end."""
    training = [line["loss_by_logsnr"] for line in run.lines if "loss_by_logsnr" in line]
    held_out = [line["val_loss_by_logsnr"] for line in run.lines if "val_loss_by_logsnr" in line]
    tenth = math.ceil(len(training) / 10)
    curves = [
        mean_by_level("pale", training[:tenth]),
        mean_by_level("solid", training[-tenth:]),
        mean_by_level("dashed", held_out[-1:]),
    ]
    return [curve for curve in curves if len(curve.x)]


def mean_by_level(style, tables):
    """The mean of several tables {lower end of a bin of logsnr: loss}, as a Curve.

    A table lacks the bins that had no image.
    """
    losses = {}
    for table in tables:
        for low, loss in table.items():
            if math.isfinite(loss):
                # Bins have width 2: the center is 1 above the lower end.
                losses.setdefault(float(low) + 1, []).append(loss)
    centers = sorted(losses)
    means = [sum(losses[center]) / len(losses[center]) for center in centers]
    return Curve(style, np.array(centers), np.array(means))


# Panels with other axes than the rest.
BY_LEVEL = "Loss by noise level (pale: first tenth; dashed: held-out)"
RATE = "Learning rate"

# The title of each panel, and a function that returns its curves of a run.
PANELS = {
    "Training loss": lambda run: smoothed(run, "loss"),
    "Held-out loss (dashed: without EMA)": held_out_loss,
    "FID or FD (dashed: sFID)": distances,
    BY_LEVEL: loss_by_level,
    RATE: lambda run: plain(run, "lr"),
    "Gradient norm (before clipping at 1)": lambda run: smoothed(run, "grad_norm"),
}

# ---------------------------------------------------------------- the figure

# How curves are drawn, as arguments of matplotlib's plot.
STYLES = dict(
    solid=dict(linewidth=1.8),
    thin=dict(linewidth=0.7, alpha=0.35),
    pale=dict(linewidth=1.8, alpha=0.35),
    dashed=dict(linewidth=1.3, linestyle="--"),
)


def draw_figure(runs):
    """Draw all panels that have data. Returns a matplotlib Figure.

    Raises ValueError if no panel has data, or if matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install matplotlib") from error

    # For each panel, the curves of each run.
    panels = {title: [curves_of(run) for run in runs] for title, curves_of in PANELS.items()}
    panels = {title: curves for title, curves in panels.items() if any(curves)}
    if not panels:
        raise ValueError(f"{runs[0].folder}/log.jsonl has nothing to plot yet")

    # Without pyplot there is no window and no global state.
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    size = (5 * max(2, columns), 3.5 * rows + 0.7)  # in inches
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    # From dark blue to orange, which colorblind readers can tell apart.
    colors = colormaps["plasma"](np.linspace(0, 0.8, len(runs)))
    for i, (title, curves) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(rows, columns, i + 1), title, curves, colors)

    # The heading has the name of each run in its color.
    figure.legend(
        [Line2D([], [], color=color, linewidth=3) for color in colors],
        [run.name for run in runs],
        loc="outside upper center",
        ncols=min(3, len(runs)),
        labelcolor=colors,
        frameon=False,
    )
    if note := comparison_note(runs):
        # At this font size, 14 characters fit into an inch.
        figure.supxlabel(textwrap.fill(note, round(14 * size[0])), fontsize=9, color="red")
    return figure


def draw_panel(axes, title, curves, colors):
    """Draw a panel into matplotlib axes. curves: for each run, a list of Curve."""
    from matplotlib.ticker import EngFormatter

    for own_curves, color in zip(curves, colors):
        for curve in own_curves:
            # A few points are marked: a line of a single one would be invisible.
            marker = "." if len(curve.x) < 20 else None
            axes.plot(curve.x, curve.y, color=color, marker=marker, **STYLES[curve.style])

    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if title != RATE:
        axes.set_yscale("log")
    if title == BY_LEVEL:
        axes.set_xlabel("logsnr (left: noise, right: data)")
    else:
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 3M
        axes.set_xlim(left=0)


# ---------------------------------------------------------------- sample grids

GAP = 2  # pixels between the images of a grid, as sample.make_grid draws it
MAX_GRIDS = 12  # at most this many grids of a run are shown
LABEL_WIDTH = 170  # pixels at the left of each line, for the step and the images seen


def draw_samples(runs, row):
    """Draw one row of the sample grids, a line for each step, the runs below each other.

    row: counted from 1. Returns a PIL image. Raises ValueError.
    """
    font = ImageFont.load_default(14)
    name_font = ImageFont.load_default(20)
    lines = []  # (text, its font, image at its right)
    for run in runs:
        # Above the lines of a run is its name. The white image makes room for it.
        room = (round(name_font.getlength(run.name)), 34)
        lines.append((run.name, name_font, Image.new("RGB", room, "white")))
        for step in grid_steps(run):
            label = f"step {step:,}\n{images_at(run, step):,} images"
            lines.append((label, font, read_row(run, step, row)))

    width = LABEL_WIDTH + max(image.width for _, _, image in lines)
    height = sum(image.height + GAP for _, _, image in lines)
    figure = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(figure)
    top = 0
    for text, text_font, image in lines:
        figure.paste(image, (LABEL_WIDTH, top))
        draw.text((8, top + 4), text, "black", text_font)
        top += image.height + GAP
    return figure


def grid_steps(run):
    """The steps of up to MAX_GRIDS sample grids of a run, sorted.

    Raises ValueError if there are none, or if captions are written into them.
    """
    if run.config.get("captions") is not None:
        raise ValueError(f"{run.folder}: --samples cannot show the grids of a run with --captions")
    matches = [re.fullmatch(r"samples_(\d{7,})\.png", name) for name in os.listdir(run.folder)]
    steps = sorted(int(match[1]) for match in matches if match)
    if not steps:
        raise ValueError(f"{run.folder} has no samples_STEP.png yet: see --sample-every")
    # Every second or every third one, and so on, counted from the last, which is always shown.
    interval = math.ceil(len(steps) / MAX_GRIDS)
    return steps[::-1][::interval][::-1]


def images_at(run, step):
    """Images seen at a step: those of the last log line up to it, and whole batches since then."""
    last = dict(step=0, images=0)
    for line in run.lines:
        if line["step"] <= step:
            last = line
    return last["images"] + (step - last["step"]) * run.config["batch"]


def read_row(run, step, row):
    """Read one row of a sample grid. Returns a PIL image, at least 64 pixels high.

    Raises ValueError, which names the file, if it has no such row.
    """
    path = f"{run.folder}/samples_{step:07d}.png"
    with Image.open(path) as image:
        grid = image.convert("RGB")
    height, _ = pixels(run.config["res"])
    rows, rest = divmod(grid.height + GAP, height + GAP)
    if rest or not 1 <= row <= rows:
        raise ValueError(f"--row {row}: {path} has no such row of images {height} pixels high")

    top = (row - 1) * (height + GAP)
    image = grid.crop((0, top, grid.width, top + height))
    # A whole factor enlarges each pixel to a square.
    scale = math.ceil(64 / height)
    return image.resize((scale * image.width, scale * height), Image.Resampling.NEAREST)


# ---------------------------------------------------------------- the command


def make_parser():
    """The parser of the options."""
    parser = argparse.ArgumentParser(
        prog="plot", description="Plot the curves or the sample grids of runs.", allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"plot: {message}")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the folders of runs of train.py")
    add("--out", metavar="PNG", help="default: plot.png, or grids.png with --samples")
    add("--samples", action="store_true", help="show one row of the sample grids, not curves")
    add("--row", type=int, help="with --samples: the row of the grids, from 1 (default 1)")
    return parser


def main(argv=None):
    options = make_parser().parse_args(argv)
    if options.row is not None and not options.samples:
        raise ValueError("--row needs --samples")
    out = options.out or ("grids.png" if options.samples else "plot.png")
    if not out.endswith(".png"):
        raise ValueError(f"--out {out}: the name must end in .png")

    runs = read_runs(options.runs)
    if options.samples:
        image = draw_samples(runs, 1 if options.row is None else options.row)
        with writing(out) as file:
            image.save(file, "PNG")
    else:
        figure = draw_figure(runs)
        if note := comparison_note(runs):
            print(f"note: {note}", file=sys.stderr)
        with writing(out) as file:
            figure.savefig(file, format="png")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
