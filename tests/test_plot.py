"""Tests of support/plot.py: curves equal the log, strips equal the sample grids."""

import importlib.util
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
from tests.helpers import HERE, call, command, log_lines, outcome

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs: pip install matplotlib"
)
CONFIG = dict(res=32, batch=16, loss=None, space="v", multiscale=False, schedule="cosine", lr=1e-3)


def write_run(folder, lines, **config):
    """Write a run's folder with these lines of the log. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def training_lines(count=20, factor=1.0, batch=16):
    """Lines of a log. The loss in bin k is factor * (k + 30) / line number."""
    return [
        dict(
            step=10 * i,
            images=10 * i * batch,
            loss=factor / i,
            loss_by_logsnr={str(k): factor * (k + 30) / i for k in range(-10, 12, 2)},
            lr=1e-3 * i,
            grad_norm=2 + math.sin(i),
            max_grad_norm=4 + math.sin(i),
        )
        for i in range(1, count + 1)
    ]


def held_out_line(i, ratio, ema_ratio, batch=16):
    """A held-out line next to line i of training_lines: the training loss times a ratio."""
    losses = training_lines(i, batch=batch)[-1]["loss_by_logsnr"]
    return dict(
        step=10 * i,
        images=10 * i * batch,
        val_loss=ratio / i,
        val_loss_ema=ema_ratio / i,
        val_loss_by_logsnr={k: ratio * loss for k, loss in losses.items()},
        val_loss_ema_by_logsnr={k: ema_ratio * loss for k, loss in losses.items()},
        val_images=100,
    )


def settings_of(folder):
    """The settings of a run."""
    with open(f"{folder}/config.json") as file:
        return json.load(file)


def drawn(*folders):
    """The panels of the figure of these runs: {title: matplotlib axes}."""
    figure, _, _ = plot.plot_curves([str(folder) for folder in folders])
    return {axes.get_title("left"): axes for axes in figure.axes}


def lines_of(axes, style=None):
    """The (x, y) of the curves in a panel, without reference lines; those of one style if given."""
    width = plot.STYLES[style]["linewidth"] if style else None
    return [
        (line.get_xdata().tolist(), line.get_ydata().tolist())
        for line in axes.get_lines()
        if line.get_color() != "#999999" and width in (None, line.get_linewidth())
    ]


def values(lines, key):
    """The (images, values) of a key in the lines of a log."""
    found = [line for line in lines if key in line]
    return [line["images"] for line in found], [line[key] for line in found]


# ---------------------------------------------------------------- the curves


@needs_matplotlib
def test_curves_of_a_run_are_those_of_its_log(run):
    lines = log_lines(run)
    axes = drawn(run)
    assert lines_of(axes["Training loss"]) == [values(lines, "loss")]
    assert lines_of(axes["Learning rate"]) == [values(lines, "lr")]
    norms = lines_of(axes["Gradient norm"])
    assert norms == [values(lines, "grad_norm"), values(lines, "max_grad_norm")]
    for title in ("Training loss", "Learning rate", "Gradient norm"):
        assert axes[title].get_xlabel() == "images seen"

    # Without held-out losses, FIDs and other runs, their panels are left out.
    others = {"Loss by noise level", "Change in the second half (%)"}
    assert set(axes) - others == {"Training loss", "Learning rate", "Gradient norm"}


@needs_matplotlib
def test_runs_are_compared_over_images_seen(tmp_path):
    # The same steps at four times the batch size are four times as many images.
    small = write_run(tmp_path / "small", training_lines())
    large = write_run(tmp_path / "large", training_lines(batch=64, factor=2), batch=64)
    curves = lines_of(drawn(small, large)["Training loss"])
    assert [x[-1] for x, _ in curves] == [3200, 12800]
    assert [y[-1] for _, y in curves] == [1 / 20, 2 / 20]


@needs_matplotlib
def test_held_out_losses_and_distances(tmp_path):
    held_out = [held_out_line(i, 1.5, ratio) for i, ratio in ((5, 1.2), (10, 2.0), (20, 9.0))]
    fids = [
        dict(step=10 * i, images=160 * i, FID=100 / i, sFID=50 / i, fid_images=1000)
        for i in (10, 20)
    ]
    bits = [held_out_line(20, 1.5, 9.0) | dict(val_bpd=3.25)]
    lines = training_lines() + held_out[:2] + fids + bits
    folder = write_run(tmp_path / "a", lines)
    axes = drawn(folder)

    # The training loss for comparison, the held-out losses, and a ring at the lowest one.
    training, ema, ring, raw = lines_of(axes["Held-out loss"])
    assert training == values(training_lines(), "loss")
    assert ema == values(held_out, "val_loss_ema")
    assert raw == values(held_out, "val_loss")
    assert ring == ([1600], [0.2])
    assert lines_of(axes["FID, sFID"]) == [values(fids, "FID"), values(fids, "sFID")]
    run, _ = plot.read_run(folder, "a")
    text = plot.describe_values(run)
    for number in ("3,200 images", "loss 0.05", "held-out 0.075", "FID 5", "sFID 2.5", "3.250"):
        assert number in text


@needs_matplotlib
def test_other_features_have_their_name(tmp_path):
    line = {"step": 10, "images": 160, "FD-ResNet56": 9.5, "fid_images": 100, "sFID": 4}
    axes = drawn(write_run(tmp_path / "a", [line]))
    assert list(axes) == ["FD-ResNet56, sFID"]
    assert lines_of(axes["FD-ResNet56, sFID"]) == [([160], [9.5]), ([160], [4])]


def test_smoothing_is_the_mean_over_two_percent_of_the_run():
    random = np.random.default_rng(0)
    images = np.sort(random.integers(0, 100_000, 500)).astype(float)
    loss = random.standard_normal(500)
    loss[[3, 4, 200]] = np.nan
    half = 0.01 * images[-1]
    expected = [np.nanmean(loss[np.abs(images - center) <= half]) for center in images]
    np.testing.assert_allclose(plot.smooth(images, loss), expected, atol=1e-12)

    # Inside of the run, a straight line stays as it is. A window without numbers gives none.
    images = np.arange(1.0, 1001)
    np.testing.assert_allclose(plot.smooth(images, 3 * images)[10:-10], 3 * images[10:-10])
    assert np.isnan(plot.smooth(images, images * np.nan)).all()


@needs_matplotlib
def test_long_runs_are_smoothed_and_keep_the_raw_curve(tmp_path):
    long, short = training_lines(plot.MANY_POINTS), training_lines(plot.MANY_POINTS - 1)
    raw, smoothed = lines_of(drawn(write_run(tmp_path / "long", long))["Training loss"])
    assert raw == values(long, "loss")
    assert smoothed[0] == raw[0]
    assert smoothed[1] == pytest.approx(plot.smooth(*map(np.array, raw)).tolist())
    axes = drawn(write_run(tmp_path / "short", short))
    assert lines_of(axes["Training loss"]) == [values(short, "loss")]


# ---------------------------------------------------------------- by noise level


@needs_matplotlib
def test_loss_by_noise_level_at_the_beginning_and_end(tmp_path):
    lines = training_lines()
    axes = drawn(write_run(tmp_path / "a", lines))["Loss by noise level"]
    # Of 20 lines, the first two are the first tenth, and the last two the last. Points are in the
    # middle of a bin, which is named by its lower end and has the width 2.
    (beginning,), (end,) = lines_of(axes, "dotted"), lines_of(axes, "line")
    centers = list(range(-9, 13, 2))
    assert beginning[0] == end[0] == centers
    assert beginning[1] == pytest.approx([(k + 29) * (1 + 1 / 2) / 2 for k in centers])
    assert end[1] == pytest.approx([(k + 29) * (1 / 19 + 1 / 20) / 2 for k in centers])
    assert axes.get_yscale() == "log"


def test_means_take_the_lines_of_the_interval(tmp_path):
    lines = training_lines()
    lines[3]["loss_by_logsnr"] = {"0": 7.0, "20": 1.0}
    run, _ = plot.read_run(write_run(tmp_path / "a", lines), "a")
    # Line i is the mean from 160 (i - 1) to 160 i images.
    assert plot.mean_levels(run, 160, 320)[1] == pytest.approx(30 / 2)
    assert plot.mean_levels(run, 200, 210)[1] == pytest.approx(30 / 2)
    assert plot.mean_levels(run, 319, 321)[1] == pytest.approx(30 * (1 / 2 + 1 / 3) / 2)
    # A bin is shown if at least half of the lines have it.
    assert plot.mean_levels(run, 480, 640) == {1: 7, 21: 1}
    assert plot.mean_levels(run, 320, 640)[21] == 1
    assert 21 not in plot.mean_levels(run, 160, 640)


@needs_matplotlib
def test_change_shows_where_the_loss_still_falls(tmp_path):
    # Bin -10 halves in the second half of the run, bin 0 stays, and bin 10 doubles.
    lines = training_lines()
    for i, line in enumerate(lines):
        factor = 2 if i >= 10 else 1
        line["loss_by_logsnr"] = {"-10": 1 / factor, "0": 3.0, "10": 1.0 * factor}
    [curve] = lines_of(drawn(write_run(tmp_path / "a", lines))["Change in the second half (%)"])
    assert curve == ([-9, 1, 11], pytest.approx([-50, 0, 100]))


@needs_matplotlib
def test_gap_shows_where_held_out_exceeds_training(tmp_path):
    # Held-out losses are compared with training at that time, here in the middle of the run.
    lines = training_lines() + [held_out_line(5, 3, 9.0), held_out_line(10, 1.5, 9.0)]
    lines[-1]["val_loss_by_logsnr"]["-10"] /= 1.5
    [curve] = lines_of(
        drawn(write_run(tmp_path / "a", lines))["Held-out against training loss (%)"]
    )
    training = (1 / 9 + 1 / 10) / 2
    assert curve[0] == list(range(-9, 13, 2))
    gaps = [100 * (ratio / 10 / training - 1) for ratio in (1.0, *[1.5] * 10)]
    assert curve[1] == pytest.approx(gaps)


@needs_matplotlib
def test_runs_are_compared_with_the_first_at_equal_images(tmp_path):
    # The second run is twice as good at each number of images, but is still training.
    first = write_run(tmp_path / "first", training_lines(20) + [held_out_line(10, 1, 1)])
    second = write_run(tmp_path / "second", training_lines(10, 0.5) + [held_out_line(10, 1, 0.25)])
    unlike = write_run(tmp_path / "unlike", training_lines(20), space="eps")
    axes = drawn(first, second, unlike)["Against the first run (%)"]
    training, held_out = lines_of(axes)
    assert training == (list(range(-9, 13, 2)), pytest.approx([-50] * 11))
    assert held_out[1] == pytest.approx([-75] * 11)
    # Losses of different meaning are not compared.
    assert "Against the first run (%)" not in drawn(first, unlike)


# ---------------------------------------------------------------- what cannot be compared


def written(capsys, *args):
    """Call the command. Returns (stdout, stderr)."""
    call(plot.main, *args)
    return capsys.readouterr()


@needs_matplotlib
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(space="eps"), ["--space v: a;", "--space eps: b"]),
        (
            dict(loss="related.sid2:sigmoid_loss"),
            ["--space v: a;", "--loss related.sid2:sigmoid_loss: b"],
        ),
        (dict(multiscale=True), ["--no-multiscale: a;", "--multiscale: b"]),
        (dict(res=64), ["--res 32: a;", "--res 64: b"]),
        (dict(schedule="shifted:16"), ["noise level", "cosine: a;", "shifted:16: b"]),
    ],
)
def test_unlike_losses_are_called_out(tmp_path, settings, words):
    a = write_run(tmp_path / "a", training_lines())
    b = write_run(tmp_path / "b", training_lines(), **settings)
    figure, _, [note] = plot.plot_curves([a, b])
    for word in words:
        assert word in note
    assert note in [text.get_text() for text in figure.texts]


@needs_matplotlib
def test_other_settings_are_shown_as_differences(tmp_path):
    a = write_run(tmp_path / "a", training_lines(), model_args=dict(width=8, num_classes=3))
    b = write_run(tmp_path / "b", training_lines(), model_args=dict(width=16), lr=0.5, keep=9)
    figure, _, notes = plot.plot_curves([a, b])
    assert notes == []
    assert {"--lr 0.001 --width 8", "--lr 0.5 --width 16"} <= {
        text.get_text() for text in figure.texts
    }


@needs_matplotlib
def test_the_command_writes_the_figure_and_prints_notes(tmp_path, monkeypatch, capsys):
    a = write_run(tmp_path / "a", training_lines())
    b = write_run(tmp_path / "b", training_lines(), space="eps")
    monkeypatch.chdir(tmp_path)
    output, errors = written(capsys, a, b, a)
    assert [line.split(":")[0] for line in output.splitlines()] == ["a", "b", "wrote plot.png"]
    with Image.open("plot.png") as image:
        assert output.endswith(f": {image.width} x {image.height}\n")
    assert len(errors.splitlines()) == 1
    assert "--space eps" in errors
    assert sorted(os.listdir()) == ["a", "b", "plot.png"]


@needs_matplotlib
def test_settings_that_mean_the_same_are_not_called_out(tmp_path):
    # --loss replaces --space. Old runs lack --multiscale, which was off.
    sigmoid = dict(loss="related.sid2:sigmoid_loss")
    a = write_run(tmp_path / "a", training_lines(), **sigmoid)
    b = write_run(tmp_path / "b", training_lines(), **sigmoid, space="eps", multiscale=True)
    assert plot.plot_curves([a, b])[2] == []
    old, new = (write_run(tmp_path / name, training_lines()) for name in ("old", "new"))
    config = settings_of(old)
    del config["multiscale"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert plot.plot_curves([old, new])[2] == []


@needs_matplotlib
def test_a_single_point_is_visible(tmp_path):
    axes = drawn(write_run(tmp_path / "a", training_lines(1)))
    [line] = axes["Training loss"].get_lines()
    assert line.get_marker() == "o"
    # One line is beginning and end at once. Nothing has changed since the middle.
    assert len(lines_of(axes["Loss by noise level"])) == 1
    assert "Change in the second half (%)" not in axes


@needs_matplotlib
def test_unlike_fids_are_called_out(tmp_path):
    folders = []
    for count in (100, 1000):
        fid = dict(step=10, images=160, FID=5.0, fid_images=count)
        folders.append(write_run(tmp_path / str(count), [fid]))
    _, _, [note] = plot.plot_curves(folders)
    assert "FID" in note
    assert "--fid-images 100: 100; --fid-images 1000: 1000" in note


@needs_matplotlib
def test_unlike_held_out_images_are_called_out(tmp_path):
    lines = training_lines() + [held_out_line(20, 1.5, 1.2)]
    folders = [
        write_run(tmp_path / name, lines, val="0.1", val_images=count)
        for name, count in (("a", 100), ("b", 100), ("c", 50))
    ]
    assert plot.plot_curves(folders[:2])[2] == []
    _, _, [note] = plot.plot_curves(folders)
    assert "held-out" in note
    assert "--val-images 100: a, b; --val-images 50: c" in note


@needs_matplotlib
def test_logarithmic_scale_where_it_helps(tmp_path):
    # A loss that falls to a twentieth has one; that to a quarter, percents and rates have not.
    axes = drawn(write_run(tmp_path / "a", training_lines(20)))
    scales = {title: one.get_yscale() for title, one in axes.items()}
    assert scales["Training loss"] == "log"
    assert scales["Learning rate"] == scales["Change in the second half (%)"] == "linear"
    axes = drawn(write_run(tmp_path / "b", training_lines(4)))
    assert axes["Training loss"].get_yscale() == "linear"


@needs_matplotlib
def test_a_run_without_settings_is_named(tmp_path):
    a, b = (write_run(tmp_path / name, training_lines()) for name in "ab")
    os.remove(f"{b}/config.json")
    _, _, [note] = plot.plot_curves([a, b])
    assert note.endswith("config.json: b)")
    assert plot.plot_curves([b])[2] == []


def test_runs_have_the_shortest_unique_names():
    assert plot.unique_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert plot.unique_names(["x/runs/a", "y/runs/a", "b"]) == ["x/runs/a", "y/runs/a", "b"]
    assert plot.unique_names(["runs/a"]) == ["a"]


@needs_matplotlib
def test_runs_have_different_colors_and_names_in_the_figure(tmp_path):
    # Names with special characters of TeX are written as they are.
    folders = [write_run(tmp_path / f"run_$x$_{i}", training_lines()) for i in range(12)]
    for count in (2, 12):
        figure, _, _ = plot.plot_curves(folders[:count])
        curves = [line for line in figure.axes[0].get_lines()]
        colors = {tuple(np.ravel(line.get_color())) for line in curves}
        assert len(colors) == count
        texts = {text.get_text(): text for text in figure.texts}
        for i, line in enumerate(curves):
            name = texts[f"run_$x$_{i}"]
            assert np.array_equal(name.get_color(), line.get_color())
            assert not name.get_parse_math()


@needs_matplotlib
def test_no_text_leaves_its_place(tmp_path):
    # Long names, all panels, and long lists of settings.
    lines = training_lines(200) + [held_out_line(i, 1.5, 1.2) for i in (50, 200)]
    lines += [dict(step=9, images=1, FID=3, sFID=2, fid_images=1000)]
    folders = [
        write_run(
            tmp_path / ("long-name-" * 3 + str(i)), lines, data=["/data/" * 40 + str(i)], seed=i
        )
        for i in range(3)
    ]
    figure, _, _ = plot.plot_curves(folders)
    assert len(figure.axes) == 9
    figure.canvas.draw()
    for text in figure.texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert all(box.y0 > axes.bbox.y1 for axes in figure.axes)
    # Notes and labels of a panel stay out of the next panel.
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert not box.overlaps(other)


# ---------------------------------------------------------------- unusual logs


@needs_matplotlib
def test_a_log_that_is_being_written(tmp_path, capsys):
    folder = write_run(tmp_path / "a", training_lines(5))
    with open(f"{folder}/log.jsonl", "a") as file:
        file.write('{"step": 60, "images": 960, "lo')
    output, errors = written(capsys, folder, "--out", tmp_path / "plot.png")
    assert errors == ""
    assert "800 images" in output
    assert lines_of(drawn(folder)["Training loss"]) == [values(training_lines(5), "loss")]


@needs_matplotlib
def test_damaged_lines_are_counted(tmp_path):
    folder = write_run(tmp_path / "a", training_lines(5))
    with open(f"{folder}/log.jsonl", "ab") as file:
        file.write(b'{"step": 6\n[1]\n\xff\xfe\n3\n{"loss": 2}\n{"images": "x"}\n\n')
        file.write(
            b'{"step": 60, "images": 960, "loss": 4, "loss_by_logsnr": {"x": 1}, "lr": "y"}\n'
        )
    figure, _, [note] = plot.plot_curves([folder])
    assert f"{folder}/log.jsonl" in note
    assert "skipped 7 lines" in note
    [(images, loss)] = lines_of(figure.axes[0])
    assert (images[-1], loss[-1]) == (960, 4)


@needs_matplotlib
def test_values_that_are_not_finite_leave_gaps(tmp_path):
    lines = training_lines(8)
    lines[2]["loss"] = math.nan
    lines[3]["loss"] = math.inf
    lines[4]["grad_norm"] = 10**400
    lines[7]["loss_by_logsnr"]["0"] = math.nan
    axes = drawn(write_run(tmp_path / "a", lines))
    [(images, loss)] = lines_of(axes["Training loss"])
    assert images == values(lines, "loss")[0]
    assert [i for i, value in enumerate(loss) if math.isnan(value)] == [2, 3]
    assert math.isnan(lines_of(axes["Gradient norm"])[0][1][4])
    [(centers, end)] = lines_of(axes["Loss by noise level"], "line")
    assert 1 not in centers
    assert np.isfinite(end).all()


@needs_matplotlib
def test_old_logs_without_some_keys(tmp_path):
    # The number of images follows from the step and the batch size.
    lines = [dict(step=10 * i, loss=1 / i) for i in (1, 2, 3)]
    axes = drawn(write_run(tmp_path / "a", lines))
    assert list(axes) == ["Training loss"]
    assert lines_of(axes["Training loss"]) == [([160, 320, 480], [1, 1 / 2, 1 / 3])]


@needs_matplotlib
def test_an_empty_log_is_left_out(tmp_path, capsys):
    full = write_run(tmp_path / "full", training_lines())
    empty = write_run(tmp_path / "empty", [])
    _, errors = written(capsys, empty, full, "--out", tmp_path / "plot.png")
    assert f"{empty}/log.jsonl" in errors
    assert len(errors.splitlines()) == 1


def test_bad_input_is_one_line(tmp_path):
    full = write_run(tmp_path / "full", training_lines())
    empty = write_run(tmp_path / "empty", [])
    useless = write_run(tmp_path / "useless", [dict(step=1, images=16)])
    out = ["--out", tmp_path / "plot.png"]
    for args, words in [
        ([tmp_path / "none", *out], [tmp_path / "none" / "log.jsonl"]),
        ([f"{full}/log.jsonl", *out], [f"{full}/log.jsonl/log.jsonl"]),
        ([tmp_path, full, *out], [tmp_path / "log.jsonl"]),
        ([empty, *out], [f"{empty}/log.jsonl"]),
        ([useless, *out], [f"{useless}/log.jsonl"]),
        ([full, "--out", tmp_path / "plot.pdf"], ["plot.pdf", ".png"]),
        ([full, "--row 2", *out], ["--row", "--samples"]),
        ([full, "--lines 2", *out], ["--lines", "--samples"]),
        ([full, "--samples --lines 0", *out], ["--lines"]),
        ([full, "--samples", *out], [full, "samples_STEP.png"]),
        ([full, "--unknown"], ["--unknown"]),
    ]:
        line = outcome(plot.main, args)
        assert all(str(word) in line for word in words), line
    assert not os.path.exists(tmp_path / "plot.png")


@needs_matplotlib
def test_a_folder_that_does_not_exist_is_named(tmp_path):
    full = write_run(tmp_path / "full", training_lines())
    out = tmp_path / "none" / "plot.png"
    assert str(out) in outcome(plot.main, [full, "--out", out])


def test_matplotlib_is_optional(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", training_lines())
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install matplotlib" in outcome(plot.main, [folder, "--out", tmp_path / "p.png"])
    # Sample grids do not need it.
    write_grids(folder, [10])
    assert outcome(plot.main, [folder, "--samples --out", tmp_path / "grids.png"]) == ""


def test_torch_is_not_imported():
    script = "import sys, support.plot; sys.exit('torch' in sys.modules)"
    assert command("-c", script, cwd=HERE).returncode == 0


# ---------------------------------------------------------------- sample grids


def write_grids(folder, steps, size=(32, 32), columns=3, texts=None):
    """Write a grid of six rows of random images for each step. Returns the images of each."""
    all_images = []
    for step in steps:
        random = np.random.default_rng(step)
        images = random.integers(0, 256, (6 * columns, *size, 3), np.uint8)
        make_grid(images, columns, texts=texts).save(f"{folder}/samples_{step:07d}.png")
        all_images.append(images.reshape(6, columns, *size, 3))
    return all_images


def place_of(image, tile):
    """Where a tile is in an image: (left, top), or None. Both are arrays (H, W, 3)."""
    height, width, _ = tile.shape
    rows, lefts = np.nonzero((image == tile[0, 0]).all(-1))
    for top, left in zip(rows, lefts):
        if np.array_equal(image[top : top + height, left : left + width], tile):
            return left, top
    return None


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (72, 80)])
@pytest.mark.parametrize("row", [1, 6])
def test_strips_have_the_pixels_of_the_grids(tmp_path, size, row, capsys):
    res = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
    folder = write_run(tmp_path / "a", training_lines(2), res=res, classes=["x", "y", "z"])
    grids = write_grids(folder, [10, 20, 300], size)
    out = tmp_path / "grids.png"
    call(plot.main, folder, "--samples --row", row, "--out", out)
    image = np.asarray(Image.open(out))
    assert f"wrote {out}: {image.shape[1]} x {image.shape[0]}" in capsys.readouterr().out

    # Each image is enlarged by a whole factor. A line has a step, a column has a class.
    scale = 1 if size[1] >= 64 else 2
    places = [
        [place_of(image, tile.repeat(scale, 0).repeat(scale, 1)) for tile in grid[row - 1]]
        for grid in grids
    ]
    step_x, step_y = (size[1] + 2) * scale, (size[0] + 2) * scale
    left, top = places[0][0]
    for i, line in enumerate(places):
        assert line == [(left + k * step_x, top + i * step_y) for k in range(3)]
    # Nothing else of the grids is shown.
    assert image.shape[0] < top + 3 * step_y + 2 * plot.MARGIN


def test_labels_have_steps_and_images(tmp_path):
    folder = write_run(tmp_path / "a", training_lines(2), batch=16)
    write_grids(folder, [10, 15, 300])
    run, _ = plot.read_run(folder, "a")
    strip = plot.read_strip(run, 1, 12)
    # Step 300 is after the end of the log: its images follow from the batch size.
    labels = ["step 10\n160 images", "step 15\n240 images", "step 300\n4,800 images"]
    assert strip.labels == labels
    # Without a log and a batch size, the step alone is known.
    write_run(tmp_path / "a", [], batch=None)
    run, _ = plot.read_run(folder, "a")
    assert plot.read_strip(run, 1, 12).labels == ["step 10", "step 15", "step 300"]


def test_at_most_so_many_lines_are_shown(tmp_path):
    folder = write_run(tmp_path / "a", training_lines(2))
    grids = write_grids(folder, range(10, 110, 10))
    out = tmp_path / "grids.png"
    for lines, shown in [(1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (20, range(10))]:
        call(plot.main, folder, "--samples --out", out, "--lines", lines)
        image = np.asarray(Image.open(out))
        enlarged = [grid[0, 0].repeat(2, 0).repeat(2, 1) for grid in grids]
        found = [i for i, tile in enumerate(enlarged) if place_of(image, tile)]
        assert found == list(shown)


def test_runs_are_below_each_other(tmp_path):
    a = write_run(tmp_path / "a", training_lines(2))
    b = write_run(tmp_path / "b", training_lines(2), res=64)
    tile_a, tile_b = write_grids(a, [10])[0][0, 0], write_grids(b, [30], (64, 64), 5)[0][0, 0]
    image = np.asarray(plot.plot_samples([a, b], 1, 12))
    place_a = place_of(image, tile_a.repeat(2, 0).repeat(2, 1))
    place_b = place_of(image, tile_b)
    assert place_a[1] + 64 < place_b[1]


def test_captions_are_shown_once(tmp_path):
    folder = write_run(tmp_path / "a", training_lines(2), captions="", text_encoder="bytes")
    texts = [f"a red circle, number {i}" for i in range(18)]
    grids = write_grids(folder, [10, 20], texts=texts)
    image = np.asarray(plot.plot_samples([folder], 2, 12))
    scale = 4  # the grid enlarges its images to 128 pixels
    places = [place_of(image, grid[1, 0].repeat(scale, 0).repeat(scale, 1)) for grid in grids]
    (left, first), (_, second) = places
    assert second - first == 128 + 2
    # The captions of the last grid are below its images.
    with Image.open(f"{folder}/samples_0000020.png") as grid:
        top = 128 + 48 + 2
        captions = np.asarray(grid)[top + 128 : top + 176]
    assert (captions < 128).any()
    below = image[second + 128 : second + 176, left : left + captions.shape[1]]
    assert np.array_equal(below, captions)


def test_the_grids_of_a_training(run, tmp_path):
    """The grid that train.py draws has the layout that its config.json describes."""
    folder = shutil.copytree(run, tmp_path / "run")
    run, _ = plot.read_run(str(folder), "run")
    strip = plot.read_strip(run, 3, 12)
    with Image.open(f"{folder}/samples_0000006.png") as grid:
        assert np.array_equal(strip.rows[0], np.asarray(grid)[2 * 34 : 2 * 34 + 32])
    assert strip.labels == ["step 6\n48 images"]
    assert strip.columns == settings_of(folder)["classes"]


def test_bad_grids_are_named(tmp_path):
    folder = write_run(tmp_path / "a", training_lines(2))
    path = f"{folder}/samples_0000010.png"
    out = ["--samples --out", tmp_path / "grids.png"]
    write_grids(folder, [10])
    for row in (0, 7):
        assert "--row" in outcome(plot.main, [folder, "--row", row, *out])
    # Another size than that of the settings, a damaged file, and no settings.
    write_grids(folder, [10], (16, 20))
    assert path in outcome(plot.main, [folder, *out])
    with open(path, "wb") as file:
        file.write(b"no PNG")
    assert path in outcome(plot.main, [folder, *out])
    os.remove(f"{folder}/config.json")
    assert "config.json" in outcome(plot.main, [folder, *out])
    assert not os.path.exists(tmp_path / "grids.png")
