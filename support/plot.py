"""Plot the curves of one or several runs, and how their sample grids change.

    python -m support.plot runs/a runs/b                # plot.png: all curves, needs matplotlib
    python -m support.plot runs/a --samples --row 2     # grids.png: one row of every sample grid

Run it from the root of the repository, also while the runs are training. It reads log.jsonl,
config.json and samples_STEP.png from the folder of each run. No network is run, and torch is not
imported. Curves are computed first, as numbers that can be tested, and then drawn.
"""

import argparse
import glob
import io
import json
import math
import os
import re
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------- reading a run


class Run(NamedTuple):
    """What is read from the folder of a run."""

    name: str  # the shortest end of the folder's path that no other run has
    folder: str
    config: dict  # the settings; empty if config.json is missing
    lines: list[dict]  # the lines of log.jsonl, sorted by images seen


def unique_names(folders):
    """Name each folder by as few of the last parts of its path as tell it from all others."""
    parts = [os.path.abspath(folder).strip(os.sep).split(os.sep) for folder in folders]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        # Bytes of a name that are not UTF-8 cannot be drawn.
        names.append(os.fsencode("/".join(own[-length:])).decode(errors="replace"))
    return names


def read_config(folder):
    """The settings in config.json. Returns {} if the file is missing or damaged."""
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return {}


def to_number(value):
    """Return a number of the log as a float, NaN if it is infinite, or None for anything else."""
    if type(value) not in (int, float):
        return None
    return float(value) if abs(value) < 1e300 else math.nan


def read_log(path, batch):
    """Read log.jsonl. Returns (lines, number of lines that were skipped).

    Every returned line has "images". In logs of old runs without it, it is step x batch, where
    batch may be None. Lines that are not valid are skipped. The last line has no end while the
    training process writes it, and does not count as skipped. Raises OSError.
    """
    lines, skipped = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = dict(json.loads(text))
            except (ValueError, TypeError, RecursionError):
                skipped += text.endswith("\n")
                continue
            images = to_number(line.get("images"))
            step = to_number(line.get("step"))
            if images is None and step is not None and batch is not None:
                images = step * batch
            if images is None or not math.isfinite(images):
                skipped += 1
                continue
            line["images"] = images
            lines.append(line)
    return lines, skipped


def read_run(folder, name, needs_log=True):
    """Read the folder of a run. Returns (run, notes), where notes are lines for the user.

    Raises ValueError if needs_log and there is no log.jsonl. An empty log is allowed.
    """
    config, notes = read_config(folder), []
    path = os.path.join(folder, "log.jsonl")
    try:
        lines, skipped = read_log(path, to_number(config.get("batch")))
    except OSError as error:
        if needs_log:
            reason = error.strerror or type(error).__name__
            raise ValueError(f"{path}: {reason}. Name the folder of a run of train.py") from error
        lines, skipped = [], 0
    if skipped:
        notes.append(f"{path}: skipped {skipped:,} lines that are not valid")
    # train.py writes lines in this order. A log that was put together by hand may have another.
    lines.sort(key=lambda line: line["images"])
    return Run(name, folder, config, lines), notes


# ---------------------------------------------------------------- curves from a log

# A bin of logsnr in the log is named by its lower end, and has this width.
BIN_WIDTH = 2
# A run with at least so many points is smoothed, over a window of this fraction of the run.
MANY_POINTS = 100
WINDOW = 0.02


def series(run, key):
    """The values of a key over the log. Returns (images, values), each (N,) float64.

    Values that are not finite become NaN, which leaves a gap in the curve.
    """
    points = [(line["images"], to_number(line[key])) for line in run.lines if key in line]
    points = [point for point in points if point[1] is not None]
    images, values = np.array(points, float).reshape(-1, 2).T
    return images, values


def smooth(images, values):
    """Mean over a window centered on each point, 2 % of the run wide. NaNs are left out.

    images, values: (N,), images sorted. The window is cut off at the ends of the run. Returns (N,).
    """
    reach = WINDOW / 2 * images[-1]
    first = np.searchsorted(images, images - reach, "left")
    last = np.searchsorted(images, images + reach, "right")
    # The sum over a window is the difference of two cumulative sums.
    valid = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(valid, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def levels(line, key):
    """The losses by noise level in a line of the log: {center of the logsnr bin: loss}."""
    try:
        items = [(float(low) + BIN_WIDTH / 2, to_number(loss)) for low, loss in line[key].items()]
    except (KeyError, AttributeError, ValueError):
        return {}
    return {center: loss for center, loss in items if loss is not None and math.isfinite(loss)}


def mean_levels(run, begin, end):
    """Mean training loss by noise level while a run saw its images from `begin` to `end`.

    A line of the log is the mean since the line before it. The lines that overlap with the interval
    count the same, because the log has no counts. Bins that more than half of these lines lack are
    left out: few images decide their mean. Returns {center of the bin: loss}.
    """
    found, previous = [], 0
    for line in run.lines:
        if "loss_by_logsnr" in line:
            if line["images"] > begin and previous < end:
                found.append(levels(line, "loss_by_logsnr"))
            previous = line["images"]

    by_center = {}
    for losses in found:
        for center, loss in losses.items():
            by_center.setdefault(center, []).append(loss)
    return {
        center: sum(losses) / len(losses)
        for center, losses in sorted(by_center.items())
        if 2 * len(losses) >= len(found)
    }


def last_held_out(run, key, images=math.inf):
    """The last held-out losses by noise level, up to a number of images. Returns (images, losses).

    Returns (0, {}) if there are none.
    """
    for line in reversed(run.lines):
        if line["images"] <= images and (losses := levels(line, key)):
            return line["images"], losses
    return 0, {}


def percent_change(losses, reference):
    """How much larger losses are than the reference, in percent, in the bins that both have."""
    return {
        center: 100 * (loss / reference[center] - 1)
        for center, loss in losses.items()
        if reference.get(center, 0) > 0
    }


def last_value(run, key):
    """The last finite value of a key. Returns None if there is none.

    The training loss of a long run is smoothed: a single line of the log is noisy.
    """
    images, values = series(run, key)
    if key == "loss" and len(values) >= MANY_POINTS:
        values = smooth(images, values)
    values = values[np.isfinite(values)]
    return values[-1].item() if len(values) else None


# ---------------------------------------------------------------- which runs can be compared

# Settings that change what the value of the loss means.
LOSS_SETTINGS = ("loss", "space", "multiscale", "res")
# Settings that change neither the weights nor the losses, apart from rounding.
OTHER_SETTINGS = {
    *("log_every", "sample_every", "save_every", "keep", "tensorboard", "skip_bad", "sampling"),
    *("fid_every", "fid_ref", "fid_images", "classes", "num_classes", "micro", "compile", "fsdp"),
    *("dataset", "torch", "ranks", "threads", "val_every", "val_images"),
}


def loss_settings(run):
    """The settings that decide what the value of the loss means."""
    settings = dict(multiscale=False) | {
        key: run.config[key] for key in LOSS_SETTINGS if key in run.config
    }
    # --loss replaces diffusion_loss, whose settings then mean nothing.
    return settings | (dict(multiscale=False, space=None) if settings.get("loss") else {})


def as_option(key, value):
    """Write a setting like an option of train.py, such as --space v."""
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"


def list_options(settings, keys):
    """Write some of the settings like options, without those that are None, empty or missing."""
    given = [key for key in keys if settings.get(key) not in (None, [])]
    return " ".join(as_option(key, settings[key]) for key in given)


def differences(runs, settings):
    """Group runs by the settings in which they differ, as one text. Returns "" if all are equal.

    settings: a dict for each run.
    """
    keys = dict.fromkeys(key for own in settings for key in own)
    keys = [key for key in keys if len({str(own.get(key)) for own in settings}) > 1]
    groups = {}
    for run, own in zip(runs, settings):
        groups.setdefault(list_options(own, keys) or "default", []).append(run.name)
    texts = [f"{options}: {', '.join(names)}" for options, names in groups.items()]
    return "; ".join(texts) if keys else ""


def comparison_notes(runs):
    """One line for each kind of number that cannot be compared between these runs."""
    known = [run for run in runs if run.config]
    unknown = ", ".join(run.name for run in runs if not run.config)
    notes = []
    if unknown and len(runs) > 1:
        notes.append(f"losses may not be comparable (without a valid config.json: {unknown})")
    if text := differences(known, [loss_settings(run) for run in known]):
        notes.append(f"losses cannot be compared ({text})")
    schedules = [dict(schedule=run.config.get("schedule")) for run in known]
    if text := differences(known, schedules):
        notes.append(f"compare losses by noise level only, not their means ({text})")
    # A held-out loss depends on the images that are held out.
    held_out = [run for run in runs if last_value(run, "val_loss") is not None]
    settings = [
        {key: run.config.get(key) for key in ("data", "val", "val_images")} for run in held_out
    ]
    if text := differences(held_out, settings):
        notes.append(f"held-out losses cannot be compared ({text})")
    # FID depends on the number of samples and on the reference.
    measured = [run for run in runs if distance_names([run])]
    settings = [
        dict(fid_images=last_value(run, "fid_images"), fid_ref=run.config.get("fid_ref"))
        for run in measured
    ]
    if text := differences(measured, settings):
        notes.append(f"FIDs cannot be compared ({text})")
    return notes


def distance_names(runs):
    """The names of the distances in the logs: FID, sFID, or FD-Class."""
    keys = {key for run in runs for line in run.lines if "fid_images" in line for key in line}
    return sorted(key for key in keys if key in ("FID", "sFID") or key.startswith("FD-"))


def describe_settings(runs):
    """For each run, its settings that differ from those of another run, as one text."""
    flat = [run.config | dict(run.config.get("model_args") or {}) for run in runs]
    keys = [key for config in flat for key in config]
    keys = [key for key in dict.fromkeys(keys) if key not in OTHER_SETTINGS | {"model_args"}]
    keys = [key for key in keys if len({str(own[key]) for own in flat if key in own}) > 1]
    return [list_options(own, keys) for own in flat]


def describe_values(run):
    """The last values of a run, as one text."""
    parts = [f"{run.lines[-1]['images']:,.0f} images"]
    names = dict(loss="loss", val_loss="held-out", val_loss_ema="held-out (EMA)")
    for key, name in (names | {key: key for key in distance_names([run])}).items():
        if (value := last_value(run, key)) is not None:
            parts.append(f"{name} {value:.4g}")
    if (bits := last_value(run, "val_bpd")) is not None:
        parts.append(f"{bits:.3f} bits/dim")
    return ", ".join(parts)


# ---------------------------------------------------------------- panels: what is drawn


class Curve(NamedTuple):
    """One line of a panel."""

    run: int  # index of the run, which decides the color
    style: str  # a key of STYLES
    x: np.ndarray  # (N,)
    y: np.ndarray  # (N,)


class Panel(NamedTuple):
    """One plot of the figure."""

    title: str
    note: str  # what the line styles mean
    curves: list[Curve]
    over: str  # what x is: "images" or "logsnr"
    log: bool = False  # whether a logarithmic y axis may help
    level: float | None = None  # where to draw a horizontal line, for reference


# Styles of curves, as arguments of matplotlib's plot.
STYLES = dict(
    raw=dict(linewidth=0.7, alpha=0.35),
    line=dict(linewidth=1.8),
    points=dict(linewidth=1.8, marker="o", markersize=4),
    dashed=dict(linewidth=1.3, linestyle=(0, (5, 2))),
    dotted=dict(linewidth=1.2, linestyle=(0, (1, 1.5)), alpha=0.8),
    ring=dict(linestyle="", marker="o", markersize=10, markerfacecolor="none"),
)


def smoothed_curves(index, run, key):
    """A key of the log over images seen: thin as it is, and thick smoothed if it is long."""
    images, values = series(run, key)
    if len(values) < MANY_POINTS:
        return [Curve(index, "line", images, values)] if len(values) else []
    smoothed = Curve(index, "line", images, smooth(images, values))
    return [Curve(index, "raw", images, values), smoothed]


def plain_curves(index, run, key, style):
    """A key of the log over images seen, as it is."""
    images, values = series(run, key)
    return [Curve(index, style, images, values)] if len(values) else []


def level_curves(index, losses, style):
    """Losses by noise level over logsnr."""
    x, y = np.array(sorted(losses.items()), float).reshape(-1, 2).T
    return [Curve(index, style, x, y)] if len(x) else []


def smoothing_note(curves):
    """What thin and thick lines mean, if a curve is smoothed."""
    is_smoothed = any(curve.style == "raw" for curve in curves)
    return f"thin: the log; thick: mean over {100 * WINDOW:g} % of the run" if is_smoothed else ""


def loss_panel(runs):
    """Training loss over images seen."""
    curves = [curve for i, run in enumerate(runs) for curve in smoothed_curves(i, run, "loss")]
    note = f"mean since the last log line\n{smoothing_note(curves)}"
    return Panel("Training loss", note, curves, "images", log=True)


def held_out_panel(runs):
    """Held-out loss over images seen, next to the training loss."""
    curves = []
    for i, run in enumerate(runs):
        own = plain_curves(i, run, "val_loss_ema", "points")
        # A ring marks the lowest loss of the EMA weights. Where it is not the last, a run overfits.
        for curve in own:
            if np.isfinite(curve.y).any():
                lowest = [np.nanargmin(curve.y)]
                own = [*own, Curve(i, "ring", curve.x[lowest], curve.y[lowest])]
        own += plain_curves(i, run, "val_loss", "dashed")
        # The training loss of the same images seen, for comparison.
        if own:
            training = smoothed_curves(i, run, "loss")[-1:]
            curves += [curve._replace(style="dotted") for curve in training] + own
    note = "solid: EMA weights (ring: lowest); dashed: raw weights;\ndotted: training loss"
    return Panel("Held-out loss", note, curves, "images", log=True)


def distance_panel(runs):
    """FID, or FD-Class, and sFID over images seen."""
    names = distance_names(runs)
    styles = dict(zip(names, ("points", "dashed", *["dotted"] * len(names))))
    curves = []
    for i, run in enumerate(runs):
        for name in names:
            curves += plain_curves(i, run, name, styles[name])
    counts = sorted({last_value(run, "fid_images") for run in runs} - {None})
    note = f"of {' or '.join(f'{count:,.0f}' for count in counts)} samples, EMA weights"
    if len(names) > 1:
        kinds = dict(points="solid", dashed="dashed", dotted="dotted")
        note += "\n" + ", ".join(f"{name}: {kinds[styles[name]]}" for name in names)
    return Panel(", ".join(names), note, curves, "images", log=True)


def level_panel(runs):
    """Loss by noise level: at the beginning and at the end of each run, and held out."""
    curves = []
    for i, run in enumerate(runs):
        end = run.lines[-1]["images"]
        first, last = mean_levels(run, 0, 0.1 * end), mean_levels(run, 0.9 * end, end)
        if first != last:  # they are the same if the log has one line
            curves += level_curves(i, first, "dotted")
        curves += level_curves(i, last, "line")
        curves += level_curves(i, last_held_out(run, "val_loss_by_logsnr")[1], "dashed")
    note = "training: first tenth of the run (dotted), last tenth (solid)"
    if any(curve.style == "dashed" for curve in curves):
        note += ";\ndashed: held-out, raw weights, at the end"
    return Panel("Loss by noise level", note, curves, "logsnr", log=True)


def change_panel(runs):
    """Where the loss still falls: the last tenth of a run against the tenth before its middle."""
    curves = []
    for i, run in enumerate(runs):
        end = run.lines[-1]["images"]
        last, middle = mean_levels(run, 0.9 * end, end), mean_levels(run, 0.4 * end, 0.5 * end)
        if middle != last:  # they are the same if the log has one line
            curves += level_curves(i, percent_change(last, middle), "line")
    note = "training loss: last tenth of the run against the tenth\n"
    note += "before its middle; below 0 it still falls"
    return Panel("Change in the second half (%)", note, curves, "logsnr", level=0)


def gap_panel(runs):
    """Where runs overfit: held-out against training loss, by noise level, with the raw weights."""
    curves = []
    for i, run in enumerate(runs):
        images, held_out = last_held_out(run, "val_loss_by_logsnr")
        training = mean_levels(run, images - run.lines[-1]["images"] / 10, images)
        curves += level_curves(i, percent_change(held_out, training), "line")
    note = "raw weights, at the end: well above 0, the run overfits"
    return Panel("Held-out against training loss (%)", note, curves, "logsnr", level=0)


def versus_panel(runs):
    """Which run is better where: losses by noise level against those of the first run.

    All runs are compared at the same number of images: where the shortest one ends.
    """
    same = [i for i, run in enumerate(runs) if loss_settings(run) == loss_settings(runs[0])]
    end = min(runs[i].lines[-1]["images"] for i in same)
    curves = []
    for i in same[1:]:
        pair = [mean_levels(run, 0.9 * end, end) for run in (runs[i], runs[0])]
        curves += level_curves(i, percent_change(*pair), "line")
        # Held-out losses are compared if both runs measured them at the same number of images.
        key = "val_loss_ema_by_logsnr"
        (images, losses), (others, reference) = (
            last_held_out(run, key, end) for run in (runs[i], runs[0])
        )
        if images == others:
            curves += level_curves(i, percent_change(losses, reference), "dashed")
    note = f"training loss at {end:,.0f} images: below 0 better than the first"
    if any(curve.style == "dashed" for curve in curves):
        note += ";\ndashed: held-out, EMA weights"
    return Panel("Against the first run (%)", note, curves, "logsnr", level=0)


def lr_panel(runs):
    """Learning rate over images seen."""
    curves = [curve for i, run in enumerate(runs) for curve in plain_curves(i, run, "lr", "line")]
    return Panel("Learning rate", "of the last step before each log line", curves, "images")


def norm_panel(runs):
    """Gradient norm over images seen, before it is clipped."""
    curves = []
    for i, run in enumerate(runs):
        curves += smoothed_curves(i, run, "grad_norm")
        largest = smoothed_curves(i, run, "max_grad_norm")[-1:]
        curves += [curve._replace(style="dotted") for curve in largest]
    note = "before clipping at 1; dotted: the largest since the last log line\n"
    return Panel(
        "Gradient norm", note + smoothing_note(curves), curves, "images", log=True, level=1
    )


def make_panels(runs):
    """All panels that have data. runs: each with at least one line. Raises ValueError if none."""
    panels = [loss_panel(runs), held_out_panel(runs), distance_panel(runs)]
    panels += [level_panel(runs), change_panel(runs), gap_panel(runs), versus_panel(runs)]
    panels += [lr_panel(runs), norm_panel(runs)]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        raise ValueError(f"{runs[0].folder}/log.jsonl has nothing to plot, such as a loss")
    return panels


# ---------------------------------------------------------------- the figure

# Colors that colorblind readers can tell apart (Okabe and Ito).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DARK, GRAY, RED = "#222222", "#6A6A6A", "#B00020"
DPI = 120
PANEL_WIDTH, PANEL_HEIGHT = 5.0, 4.0  # in inches, with the space for labels
LINE = 0.26  # height of a line of text in the heading, in inches


def run_colors(count):
    """A color for each run. From eight runs on, neighbors have similar colors."""
    if count <= len(COLORS):
        return COLORS[:count]
    from matplotlib import colormaps

    return list(colormaps["plasma"](np.linspace(0, 0.85, count)))


def is_log_scale(panel):
    """True if a logarithmic y axis helps: all values are positive and span a factor of 5."""
    if not panel.log:
        return False
    values = np.concatenate([curve.y for curve in panel.curves])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() > 5 * values.min()


def draw_figure(runs, panels, notes):
    """Draw the panels below a heading that names the runs. Returns a matplotlib Figure.

    notes: lines to print in red below the names. Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install matplotlib") from error

    # Up to three panels in a row; four make a square.
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    settings = describe_settings(runs)
    heading = LINE * ((2 if any(settings) else 1) * len(runs) + len(notes)) + 0.35
    width, height = max(2, columns) * PANEL_WIDTH, rows * PANEL_HEIGHT + heading
    # Without pyplot there is no window and no global state.
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    colors = run_colors(len(runs))
    draw_heading(figure, runs, settings, notes, colors)

    # Each panel leaves room for its title and note above, and for the labels of its axes.
    panel_width = width / columns
    first = {}  # the first axes over images, and over logsnr: the others have the same limits
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        left = column * panel_width + 0.7
        bottom = height - heading - (row + 1) * PANEL_HEIGHT + 0.6
        size = (panel_width - 0.95, PANEL_HEIGHT - 1.5)
        box = (left / width, bottom / height, size[0] / width, size[1] / height)
        axes = figure.add_axes(box, sharex=first.get(panel.over))
        first.setdefault(panel.over, axes)
        draw_panel(axes, panel, colors)
    return figure


def draw_heading(figure, runs, settings, notes, colors):
    """Write for each run its name, last values and own settings, and then the notes."""
    width, height = figure.get_size_inches()
    indent = 0.2 + 0.115 * max(len(run.name) for run in runs) + 0.3
    y = height - 0.3

    def write(x, text, size, **style):
        text = shorten(text, int((width - x) / (0.0077 * size)))
        style |= dict(fontsize=size, va="center", parse_math=False)
        figure.text(x / width, y / height, text, **style)

    for run, color, own_settings in zip(runs, colors, settings):
        write(0.2, run.name, 11, color=color, fontweight="bold")
        write(indent, describe_values(run), 11, color=DARK)
        y -= LINE
        if any(settings):
            write(indent, own_settings, 9.5, color=GRAY)
            y -= LINE
    for note in notes:
        write(0.2, note, 10.5, color=RED)
        y -= LINE


def shorten(text, length):
    """Cut a text to a number of characters."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def with_minus(text):
    """Replace the hyphens of a number by minus signs, as matplotlib does."""
    return text.replace("-", "\N{MINUS SIGN}")


def draw_panel(axes, panel, colors):
    """Draw the curves of a panel into matplotlib axes."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    if panel.level is not None:
        axes.axhline(panel.level, color="#999999", linewidth=1)
    for curve in panel.curves:
        style = dict(color=colors[curve.run]) | STYLES[curve.style]
        if len(curve.x) == 1:  # a line of one point would be invisible
            style.setdefault("marker", "o")
        axes.plot(curve.x, curve.y, **style)

    if is_log_scale(panel):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Within few decades, 2 and 5 are labeled as well.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: with_minus(f"{value:g}")))
    if panel.over == "images":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.set_xlabel("images seen", fontsize=10, color=DARK)
    else:
        axes.set_xlabel("logsnr (left: noise, right: data)", fontsize=10, color=DARK)

    # Two lines of notes fit between the title and the curves.
    axes.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", pad=36)
    note = dict(fontsize=9, color=GRAY, va="top", linespacing=1.3, parse_math=False)
    axes.annotate(panel.note, (0, 1), (0, 32), "axes fraction", "offset points", **note)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9.5, colors=DARK)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(folders):
    """Draw all curves of these runs. Returns (matplotlib Figure, runs, notes).

    Runs with an empty log are left out. notes: lines for the user. Raises ValueError if no run has
    a line yet.
    """
    runs, notes = [], []
    for folder, name in zip(folders, unique_names(folders)):
        run, own_notes = read_run(folder, name)
        notes += own_notes
        if run.lines:
            runs.append(run)
        else:
            notes.append(f"{folder}/log.jsonl has no lines yet: this run is left out")
    if not runs:
        raise ValueError(f"{folders[0]}/log.jsonl has no lines yet: wait until training writes one")
    notes += comparison_notes(runs)
    return draw_figure(runs, make_panels(runs), notes), runs, notes


def write_curves(folders, out):
    """Write the figure of all curves to the file `out`. Print notes and the last values of runs."""
    figure, runs, notes = plot_curves(folders)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for run in runs:
        print(f"{run.name}: {describe_values(run)}")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_png(data.getvalue(), out)


def write_png(data, out):
    """Write the bytes of a PNG. They replace an older file only when they are complete.

    Raises OSError, which names the file.
    """
    try:
        with open(f"{out}.part", "wb") as file:
            file.write(data)
        os.replace(f"{out}.part", out)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}") from error
    with Image.open(out) as image:
        print(f"wrote {out}: {image.width} x {image.height}")


# ---------------------------------------------------------------- sample grids

GAP = 2  # pixels between the images of a grid, see sample.make_grid
CAPTION_HEIGHT = 4 * 12  # pixels below each image of a grid with captions
MIN_SIDE = 64  # smaller images are enlarged, each pixel to a square
MARGIN = 12  # white pixels around the labels


class Strip(NamedTuple):
    """One row of each sample grid of a run."""

    labels: list[str]  # "step 650" and the images seen, for each grid
    rows: list[np.ndarray]  # for each grid, uint8 (H, W, 3); the last one with its captions
    column_width: int  # from the left edge of an image to that of the next, in pixels
    columns: list[str]  # the class of each column, or an empty list


def list_grids(folder):
    """The sample grids of a run, as (step, path), sorted. Raises ValueError if there are none."""
    paths = glob.glob(f"{glob.escape(folder)}/samples_*.png")
    grids = [(int(found[1]), found[0]) for path in paths if (found := match_grid(path))]
    if not grids:
        raise ValueError(f"{folder} has no samples_STEP.png yet: see --sample-every of train.py")
    return sorted(grids)


def match_grid(path):
    """Return (path, step) of a sample grid, or None for another file."""
    found = re.fullmatch(r"samples_(\d+)\.png", os.path.basename(path))
    return (path, found[1]) if found else None


def spread(items, count):
    """Choose `count` of the items at equal distances, the first and the last among them."""
    if count >= len(items):
        return items
    if count == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def images_at(run, step):
    """Images seen at a step, or None if neither the log nor config.json tell it."""
    known = [(0, 0.0)] + [
        (line["step"], line["images"])
        for line in run.lines
        if to_number(line.get("step")) is not None
    ]
    steps, images = zip(*known)
    if step <= steps[-1]:
        return np.interp(step, steps, images).item()
    batch = to_number(run.config.get("batch"))
    return None if batch is None else images[-1] + (step - steps[-1]) * batch


def grid_layout(run):
    """The layout of the sample grids: (image height, image width, height of a caption), in pixels.

    Raises ValueError if config.json does not tell it.
    """
    sides = [int(side) for side in re.findall(r"\d+", str(run.config.get("res")))]
    if not sides or min(sides) == 0:
        raise ValueError(f"{run.folder} needs a config.json with res, to find images in its grids")
    height, width = (sides * 2)[:2]  # 64 or 48x64
    if run.config.get("captions") is None:
        return height, width, 0
    # With captions, make_grid enlarges images to a width of at least 128 pixels.
    scale = -(-128 // width)
    return height * scale, width * scale, CAPTION_HEIGHT


def read_grid(path, layout):
    """Read a sample grid. Returns its pixels, uint8 (H, W, 3).

    Raises ValueError, which names the file, if it cannot be read or has another layout.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of errors for a broken file
        raise ValueError(f"{path} is not an image that Pillow can read") from error
    height, width, caption = layout
    if (pixels.shape[0] + GAP) % (height + caption + GAP) or (pixels.shape[1] + GAP) % (
        width + GAP
    ):
        raise ValueError(
            f"{path} is not a grid of {width} x {height} images, which config.json describes"
        )
    return pixels


def read_strip(run, row, lines):
    """Read one row of up to `lines` sample grids of a run. Returns a Strip.

    row: counted from 1. Raises ValueError if the grids have fewer rows, or cannot be read.
    """
    layout = height, width, caption = grid_layout(run)
    labels, rows = [], []
    grids = spread(list_grids(run.folder), lines)
    for step, path in grids:
        pixels = read_grid(path, layout)
        count = (pixels.shape[0] + GAP) // (height + caption + GAP)
        if not 1 <= row <= count:
            raise ValueError(f"--row must be 1 to {count}, not {row}: {path} has {count} rows")
        # The captions are the same in all grids: only the last one shows them.
        top = (row - 1) * (height + caption + GAP)
        bottom = top + height + (caption if step == grids[-1][0] else 0)
        rows.append(pixels[top:bottom])
        images = images_at(run, step)
        labels.append(f"step {step:,}" + ("" if images is None else f"\n{images:,.0f} images"))

    # In grids without captions, each column shows one class.
    classes = [str(name) for name in run.config.get("classes") or []]
    count = (rows[0].shape[1] + GAP) // (width + GAP)
    columns = classes[:count] if len(classes) >= count and not caption else []
    return Strip(labels, rows, width + GAP, columns)


LABEL_FONT_SIZE, NAME_FONT_SIZE = 15, 22


def label_width(strip):
    """The width of the labels of a strip, in pixels."""
    font = ImageFont.load_default(LABEL_FONT_SIZE)
    return max(font.getlength(line) for text in strip.labels for line in text.split("\n"))


def draw_strip(name, strip, left):
    """Draw a strip: a line for each grid, with its label at the left. Returns a PIL image.

    left: where the images begin, in pixels.
    """
    name_font = ImageFont.load_default(NAME_FONT_SIZE)
    font = ImageFont.load_default(LABEL_FONT_SIZE)
    # Whole factors keep every pixel as it is.
    scale = max(1, -(-MIN_SIDE // (strip.column_width - GAP)))
    gap, column = GAP * scale, strip.column_width * scale

    # The classes are written above the columns if all of them fit.
    fits = max(map(font.getlength, strip.columns), default=math.inf) <= column - gap
    top = 2 * MARGIN + NAME_FONT_SIZE + (LABEL_FONT_SIZE + 5 if fits else 0)
    heights = [len(row) * scale for row in strip.rows]
    width = max(left + strip.rows[0].shape[1] * scale, 2 * MARGIN + name_font.getlength(name))
    image = Image.new(
        "RGB", (round(width) + MARGIN, top + sum(heights) + gap * len(heights) + MARGIN), "white"
    )

    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), name, DARK, name_font)
    for i, text in enumerate(strip.columns if fits else []):
        middle = left + i * column + (column - gap) / 2
        draw.text((middle, top - 4), text, DARK, font, anchor="ms")
    for label, row, height in zip(strip.labels, strip.rows, heights):
        enlarged = row.repeat(scale, 0).repeat(scale, 1)
        image.paste(Image.fromarray(enlarged), (left, top))
        draw.multiline_text((MARGIN, top + 4), label, DARK, font, spacing=5)
        top += height + gap
    return image


def plot_samples(folders, row, lines):
    """Draw one row of the sample grids of these runs, the runs below each other.

    row: counted from 1. lines: at most so many grids of each run. Returns a PIL image. Raises
    ValueError.
    """
    names = unique_names(folders)
    runs = [read_run(folder, name, needs_log=False)[0] for folder, name in zip(folders, names)]
    strips = [read_strip(run, row, lines) for run in runs]
    # The images of all runs begin at the same place: each column then has the same noise.
    left = round(max(map(label_width, strips))) + 2 * MARGIN
    parts = [draw_strip(name, strip, left) for name, strip in zip(names, strips)]

    image = Image.new(
        "RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white"
    )
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height
    return image


def write_samples(folders, out, row, lines):
    """Write the image of plot_samples to the file `out`."""
    data = io.BytesIO()
    plot_samples(folders, row, lines).save(data, "PNG")
    write_png(data.getvalue(), out)


# ---------------------------------------------------------------- the command


def make_parser():
    """The parser of the options."""
    parser = argparse.ArgumentParser(
        prog="support.plot", description="Plot the curves or the sample grids of runs."
    )
    parser.error = lambda message: sys.exit(f"support.plot: {message}")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the folders of runs of train.py")
    add("--out", metavar="PNG", help="default: plot.png, or grids.png with --samples")
    add("--samples", action="store_true", help="show one row of each sample grid, not curves")
    add("--row", type=int, help="with --samples: which row of the grids, from 1 (default 1)")
    add("--lines", type=int, help="with --samples: at most so many grids of a run (default 12)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        # A run that is named twice is drawn once.
        folders = list({os.path.realpath(folder): folder for folder in args.runs}.values())
        out = args.out or ("grids.png" if args.samples else "plot.png")
        if not out.lower().endswith(".png"):
            raise ValueError(f"--out {out}: the name must end in .png")
        if not args.samples and (args.row is not None or args.lines is not None):
            raise ValueError("--row and --lines need --samples")
        if args.lines is not None and args.lines < 1:
            raise ValueError(f"--lines must be at least 1, not {args.lines}")
        if args.samples:
            row = 1 if args.row is None else args.row
            write_samples(folders, out, row, args.lines or 12)
        else:
            write_curves(folders, out)
    except (ValueError, OSError) as error:
        sys.exit(f"support.plot: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
