"""Tests of support/plot.py: curves equal the log, sample figures equal the sample grids."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from sample import make_grid
from support import plot
from tests.helpers import call, log_lines, outcome

pytest.importorskip("matplotlib", reason="needs: pip install matplotlib")

CONFIG = dict(res=32, batch=16, loss=None, space="v", multiscale=False, schedule="cosine")
LOSS, HELD_OUT, DISTANCE, LEVELS, RATE, NORM = plot.PANELS


def write_run(folder, lines, **config):
    """Write a run's folder with these lines of the log. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def training_lines(count=20):
    """Lines of a log. Line i has the loss 1 / i, and (k + 30) / i in bin k."""
    return [
        dict(
            step=10 * i,
            images=160 * i,
            loss=1 / i,
            loss_by_logsnr={str(k): (k + 30) / i for k in range(-10, 12, 2)},
            lr=1e-3 * i,
            grad_norm=2 + math.sin(i),
        )
        for i in range(1, count + 1)
    ]


def drawn(folder):
    """The panels of the figure of a run: {title: matplotlib axes}."""
    figure = plot.draw_figure(plot.read_runs([folder]))
    return {axes.get_title(): axes for axes in figure.axes}


def lines_of(axes, style="solid"):
    """The (x, y) of the curves in a panel that have this style."""
    wanted = dict(linestyle="-", alpha=None) | plot.STYLES[style]
    return [
        (line.get_xdata().tolist(), line.get_ydata().tolist())
        for line in axes.get_lines()
        if all(getattr(line, f"get_{key}")() == value for key, value in wanted.items())
    ]


def values(lines, key):
    """The (images, values) of a key in the lines of a log."""
    found = [line for line in lines if key in line]
    return [line["images"] for line in found], [line[key] for line in found]


# ---------------------------------------------------------------- the curves


def test_curves_of_a_training_are_those_of_its_log(run):
    lines = log_lines(run)
    panels = drawn(run)
    # Without held-out losses and FIDs, their panels are left out.
    assert list(panels) == [LOSS, LEVELS, RATE, NORM]
    for title, key in ((LOSS, "loss"), (RATE, "lr"), (NORM, "grad_norm")):
        assert lines_of(panels[title]) == [values(lines, key)]
        # Few points are marked: a single one would be invisible otherwise.
        assert panels[title].get_lines()[0].get_marker() == "."
        assert panels[title].get_xlabel() == "images seen"
    scales = [axes.get_yscale() for axes in panels.values()]
    assert scales == ["log", "log", "linear", "log"]


def test_held_out_losses_and_distances(tmp_path):
    held_out = [
        dict(step=10 * i, images=160 * i, val_loss=1.5 / i, val_loss_ema=1.2 / i)
        for i in (5, 10, 20)
    ]
    fids = [
        {"step": 10 * i, "images": 160 * i, "FD-Class": 100 / i, "sFD-Class": 50 / i}
        | dict(FID=9 * i, sFID=8 * i, fid_images=1000)
        for i in (10, 20)
    ]
    panels = drawn(write_run(tmp_path / "a", training_lines() + held_out + fids))
    assert list(panels) == list(plot.PANELS)
    assert lines_of(panels[HELD_OUT]) == [values(held_out, "val_loss_ema")]
    assert lines_of(panels[HELD_OUT], "dashed") == [values(held_out, "val_loss")]
    solid, dashed = ([values(fids, s + name) for name in ("FD-Class", "FID")] for s in ("", "s"))
    assert lines_of(panels[DISTANCE]) == solid
    assert lines_of(panels[DISTANCE], "dashed") == dashed


def test_loss_by_noise_level_at_the_beginning_and_end(tmp_path):
    lines = training_lines()
    lines[10]["val_loss_by_logsnr"] = lines[0]["loss_by_logsnr"]
    lines[19]["val_loss_by_logsnr"] = lines[2]["loss_by_logsnr"]
    axes = drawn(write_run(tmp_path / "a", lines))[LEVELS]
    # Of 20 lines, the first two are the first tenth, and the last two the last. Points are in the
    # middle of a bin, which is named by its lower end and has the width 2.
    centers = list(range(-9, 13, 2))
    factors = dict(pale=(1 + 1 / 2) / 2, solid=(1 / 19 + 1 / 20) / 2, dashed=1 / 3)
    for style, factor in factors.items():
        expected = [factor * (center + 29) for center in centers]
        assert lines_of(axes, style) == [(centers, pytest.approx(expected))]


def test_means_by_noise_level_of_tables_that_lack_bins():
    curve = plot.mean_by_level("solid", [{"2": 1.0, "-4": 5.0}, {"2": 2.0, "0": math.nan}])
    assert curve.x.tolist() == [-3, 3]
    assert curve.y.tolist() == [5.0, 1.5]


def test_long_logs_are_smoothed_and_keep_the_raw_curve(tmp_path):
    lines = training_lines(500)
    lines[3]["loss"] = lines[200]["loss"] = math.nan
    [run] = plot.read_runs([write_run(tmp_path / "long", lines)])
    raw, smooth = plot.smoothed(run, "loss")
    assert (raw.style, smooth.style) == ("thin", "solid")
    np.testing.assert_array_equal([raw.x, raw.y], values(lines, "loss"))

    # Each point is the mean of 2 % of the 498 finite values, 9, at the mean of their images.
    finite = np.array([(x, y) for x, y in zip(raw.x, raw.y) if math.isfinite(y)])
    expected = [finite[i : i + 9].mean(0) for i in range(490)]
    np.testing.assert_allclose(np.transpose([smooth.x, smooth.y]), expected)

    [run] = plot.read_runs([write_run(tmp_path / "short", lines[:101])])
    assert [len(curve.x) for curve in plot.smoothed(run, "loss")] == [101, 99]
    [run] = plot.read_runs([write_run(tmp_path / "short", lines[:100])])
    assert [len(curve.x) for curve in plot.smoothed(run, "loss")] == [100]


# ---------------------------------------------------------------- the figure


def test_unlike_losses_are_called_out(tmp_path):
    a = write_run(tmp_path / "run-a", [])
    for key, value in dict(
        space="eps", loss="x:y", multiscale=True, res=64, schedule="shifted:16"
    ).items():
        b = write_run(tmp_path / "run-b", [], lr=7, **{key: value})
        note = plot.comparison_note(plot.read_runs([a, b]))
        assert f"run-a has {key} {CONFIG[key] or 'none'}; run-b has {key} {value}" in note
    # Other settings have no effect. Old runs lack --multiscale, which was off.
    b = write_run(tmp_path / "run-b", [], lr=7)
    config = {key: value for key, value in CONFIG.items() if key != "multiscale"}
    (tmp_path / "run-b" / "config.json").write_text(json.dumps(config))
    assert plot.comparison_note(plot.read_runs([a, b])) == ""


def test_the_heading_has_the_names_in_the_colors_of_the_curves(tmp_path):
    folders = [write_run(tmp_path / f"run_{i}", training_lines(2)) for i in range(12)]
    figure = plot.draw_figure(plot.read_runs(folders))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run_{i}" for i in range(12)]
    colors = [tuple(line.get_color()) for line in figure.axes[0].get_lines()]
    assert len(set(colors)) == 12
    assert [tuple(text.get_color()) for text in legend.get_texts()] == colors


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    a, b, c = (write_run(tmp_path / path, []) for path in ("x/a", "y/a", "y/c"))
    assert [run.name for run in plot.read_runs([a, f"{c}/"])] == ["a", "c"]
    assert [run.name for run in plot.read_runs([a, b])] == [a, b]


def test_the_command_writes_the_figure(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", training_lines())
    write_run(tmp_path / "b", training_lines(), space="eps", schedule="shifted:64")
    monkeypatch.chdir(tmp_path)
    call(plot.main, "a", "b")
    output, errors = capsys.readouterr()
    assert output == "wrote plot.png\n"
    with Image.open("plot.png") as image:
        assert image.format == "PNG"
    assert sorted(os.listdir()) == ["a", "b", "plot.png"]

    # Losses of these runs cannot be compared. The figure says so in the words of stderr.
    assert errors.count("\n") == 1
    assert "b has space eps, schedule shifted:64" in errors
    figure = plot.draw_figure(plot.read_runs(["a", "b"]))
    assert figure.get_supxlabel().split() == errors.split()[1:]


# ---------------------------------------------------------------- unusual logs


def test_incomplete_lines_and_other_keys(tmp_path):
    # Logs of old runs have no images: the step and the batch size tell them.
    lines = [dict(step=10 * i, loss=1 / i) for i in (1, 2, 3)]
    folder = write_run(tmp_path / "a", lines)
    with open(f"{folder}/log.jsonl", "ab") as file:
        file.write(b'{"step": 6\n[1]\n\xff\xfe\0\n3\n{"loss": 2}\n\n{"step": 40, "lo')
    panels = drawn(folder)
    assert list(panels) == [LOSS]
    assert lines_of(panels[LOSS]) == [([160, 320, 480], [1, 1 / 2, 1 / 3])]


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_left_out(tmp_path):
    lines = training_lines(8)
    lines[2]["loss"] = math.nan
    lines[3]["loss"] = math.inf
    folder = write_run(tmp_path / "a", lines)
    [(images, loss)] = lines_of(drawn(folder)[LOSS])
    assert images == values(lines, "loss")[0]
    assert [i for i, value in enumerate(loss) if not math.isfinite(value)] == [2, 3]
    call(plot.main, folder, "--out", tmp_path / "plot.png")


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    full = write_run(tmp_path / "full", training_lines())
    damaged = write_run(tmp_path / "damaged", training_lines())
    (tmp_path / "damaged" / "config.json").write_text("{")
    useless = write_run(tmp_path / "useless", [dict(step=1, images=16)])
    os.remove(write_run(tmp_path / "no-log", []) + "/log.jsonl")
    empty = write_run(tmp_path / "empty", [])
    missing = tmp_path / "none" / "plot.png"
    out = ["--out", tmp_path / "plot.png"]
    for args, words in [
        ([tmp_path / "none", *out], ["none"]),
        ([tmp_path / "no-log", *out], ["no-log/log.jsonl"]),
        ([damaged, *out], [damaged]),
        ([empty, *out], [f"{empty}/log.jsonl"]),
        ([useless, *out], [f"{useless}/log.jsonl"]),
        ([full, "--out", missing], [missing]),
        ([full, "--out", tmp_path / "plot.pdf"], ["plot.pdf", ".png"]),
        ([full, "--row 2", *out], ["--row", "--samples"]),
        ([full, "--samples", *out], [full, "samples_STEP.png"]),
        ([full, "--unknown"], ["--unknown"]),
    ]:
        line = outcome(plot.main, args)
        assert all(str(word) in line for word in words), line
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install matplotlib" in outcome(plot.main, [full, *out])
    assert not os.path.exists(tmp_path / "plot.png")


# ---------------------------------------------------------------- sample grids


def write_grids(folder, steps, size=(32, 32), columns=3):
    """Write a grid of six rows of random images for each step. Returns the images of each."""
    all_images = []
    for step in steps:
        random = np.random.default_rng(step)
        images = random.integers(0, 256, (6 * columns, *size, 3), np.uint8)
        make_grid(images, columns).save(f"{folder}/samples_{step:07d}.png")
        all_images.append(images.reshape(6, columns, *size, 3))
    return all_images


def sample_figure(*folders, row=1):
    """The figure of --samples, as an array (H, W, 3)."""
    return np.asarray(plot.draw_samples(plot.read_runs(folders), row))


@pytest.mark.parametrize("size, scale", [((32, 32), 2), ((48, 64), 2), ((72, 80), 1)])
@pytest.mark.parametrize("row", [1, 6])
def test_lines_have_the_pixels_of_the_grids(tmp_path, size, scale, row, capsys):
    folder = write_run(tmp_path / "a", [], res=f"{size[0]}x{size[1]}")
    grids = write_grids(folder, [10, 20, 300], size)
    out = tmp_path / "grids.png"
    call(plot.main, folder, "--samples --row", row, "--out", out)
    assert capsys.readouterr().out == f"wrote {out}\n"

    # A line shows a step, each image enlarged by a whole factor. The last line is at the bottom.
    figure = np.asarray(Image.open(out))
    height, width = ((side + 2) * scale for side in size)
    line_height = size[0] * scale + 2
    top = len(figure) - 3 * line_height
    for i, grid in enumerate(grids):
        for k, image in enumerate(grid[row - 1]):
            y, x = top + i * line_height, plot.LABEL_WIDTH + k * width
            shown = figure[y : y + height - 2 * scale, x : x + width - 2 * scale]
            assert np.array_equal(shown, image.repeat(scale, 0).repeat(scale, 1))
    # Above them is nothing but the name.
    assert (figure[:top, plot.LABEL_WIDTH :] == 255).all()


def test_runs_are_below_each_other_and_have_labels(tmp_path):
    a, b = (write_run(tmp_path / name, []) for name in "ab")
    write_grids(a, [10])
    write_grids(b, [10, 20])
    figure = sample_figure(a, b)
    assert np.array_equal(figure, np.concatenate([sample_figure(a), sample_figure(b)]))
    # The name and the label of each line are at the left.
    labels = (figure[:, : plot.LABEL_WIDTH] < 128).any((1, 2))
    for top in (0, 36, 102, 138, 204):
        assert labels[top : top + 30].any()


def test_at_most_twelve_grids_are_shown(tmp_path):
    folder = write_run(tmp_path / "a", [])
    [run] = plot.read_runs([folder])
    for count, shown in [
        (1, [1]),
        (12, range(1, 13)),
        (13, range(1, 14, 2)),
        (30, range(3, 31, 3)),
    ]:
        write_grids(folder, range(1, count + 1))
        assert plot.grid_steps(run) == list(shown)


def test_images_at_a_step(tmp_path):
    # This run was resumed at step 20 with twice the batch size.
    lines = [dict(step=10, images=80), dict(step=20, images=160), dict(step=30, images=320)]
    [run] = plot.read_runs([write_run(tmp_path / "a", lines, batch=16)])
    assert [plot.images_at(run, step) for step in (20, 25, 30, 100)] == [160, 240, 320, 1440]


def test_the_grids_of_a_training(run, tmp_path):
    """The grid that train.py draws has the layout that its config.json describes."""
    folder = shutil.copytree(run, tmp_path / "run")
    [run] = plot.read_runs([str(folder)])
    assert plot.grid_steps(run) == [6]
    assert plot.images_at(run, 6) == 48
    with Image.open(f"{folder}/samples_0000006.png") as grid:
        expected = np.asarray(grid)[2 * 34 : 2 * 34 + 32]
    assert np.array_equal(plot.read_row(run, 6, 3), expected.repeat(2, 0).repeat(2, 1))


def test_bad_grids_are_named(tmp_path):
    folder = write_run(tmp_path / "a", [])
    path = f"{folder}/samples_0000010.png"
    out = ["--samples --out", tmp_path / "grids.png"]
    write_grids(folder, [10])
    for row in (0, 7):
        assert f"--row {row}" in outcome(plot.main, [folder, "--row", row, *out])
    # Another size than that of the settings, and a damaged file.
    write_grids(folder, [10], (16, 20))
    assert path in outcome(plot.main, [folder, *out])
    with open(path, "wb") as file:
        file.write(b"no PNG")
    assert path in outcome(plot.main, [folder, *out])
    write_run(tmp_path / "a", [], captions="")
    assert "--captions" in outcome(plot.main, [folder, *out])
    assert not os.path.exists(tmp_path / "grids.png")
