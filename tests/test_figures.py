"""Tests of docs/figures.py: what the figures show, and that each command writes its file."""

import functools
import importlib.util
import itertools
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from docs import figures
from sample import sample, to_uint8
from schedule import alpha_sigma, diffuse, make_schedule
from support.checkpoint import load
from support.recipes import RECIPES
from support.strip import make_strip
from tests.helpers import call, outcome

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs: pip install matplotlib"
)


# Several tests use the same descriptions, which take a second.
describe = functools.cache(figures.describe)


def shown_at(image, left, top, side):
    """A square of a PIL image, as an array."""
    return np.asarray(image.crop((left, top, left + side, top + side)))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that commands draw, as PIL images, before the file limits their colors."""
    images = []

    def keeping(draw):
        return lambda **options: images.append(draw(**options)) or images[-1]

    for name, draw in figures.FIGURES.items():
        monkeypatch.setitem(figures.FIGURES, name, keeping(draw))
    return images


def written(out, capsys):
    """The image that a command has written to the file `out`, and has announced."""
    assert capsys.readouterr().out.startswith(f"wrote {out}: ")
    with Image.open(out) as image:
        return image.convert("RGB")


# ---------------------------------------------------------------- schedules


def test_averaged_noise_follows_equation_4():
    x = figures.read_image()
    rows = figures.noise_rows(x)
    reference, cosine, shifted, _ = rows
    assert [row.spec for row in rows[1:]] == figures.SCHEDULES

    # Every averaged image is that of the process at 64 px, with the same noise and a higher logsnr.
    small_x = figures.average(x[None])
    alpha, sigma = alpha_sigma(reference.small_logsnr, like=reference.small)
    small_eps = (reference.small - alpha * small_x) / sigma
    assert small_eps.std().item() == pytest.approx(1, abs=0.02)
    for row in rows[1:]:
        expected = diffuse(small_x, small_eps, row.small_logsnr)
        torch.testing.assert_close(row.small, expected, atol=1e-4, rtol=0)
        full_logsnr = make_schedule(row.spec, 512)(torch.tensor(figures.TIMES))
        torch.testing.assert_close(row.full_logsnr, full_logsnr)
        assert (row.small_logsnr - full_logsnr).tolist() == pytest.approx(3 * [2 * np.log(8)])

    # The shifted schedule is the cosine schedule of 64 px. The cosine schedule has less noise.
    torch.testing.assert_close(shifted.small_logsnr, reference.small_logsnr)
    torch.testing.assert_close(shifted.small, reference.small, atol=1e-4, rtol=0)
    torch.testing.assert_close(cosine.full_logsnr, reference.small_logsnr)


def test_tiles_keep_colors_on_average():
    rows = figures.noise_rows(figures.read_image())
    for z in torch.cat([row.full for row in rows[1:]]):
        image = figures.crop(to_uint8(z).permute(1, 2, 0).numpy())
        means = np.asarray(figures.to_tile(z)).mean((0, 1))
        assert means == pytest.approx(image.mean((0, 1)), abs=6)


@needs_matplotlib
def test_schedules_command(tmp_path, monkeypatch, capsys, drawn):
    # Without options the figure is assets/schedules.png.
    monkeypatch.chdir(tmp_path)
    figures.main(["schedules"])
    [figure] = drawn
    assert written("assets/schedules.png", capsys).size == figure.size
    assert os.path.getsize("assets/schedules.png") <= figures.MAX_BYTES

    # It has a tile for each image: at full size in columns 0 to 2, averaged in columns 3 to 5.
    for i, row in enumerate(figures.noise_rows(figures.read_image())):
        top = figures.PLOT_HEIGHT + i * figures.ROW_HEIGHT + 80
        tiles = [None, None, None] if row.full is None else list(row.full)
        for column, z in enumerate([*tiles, *row.small]):
            if z is not None:
                shown = shown_at(figure, figures.tile_left(column), top, figures.TILE)
                assert np.array_equal(shown, figures.to_tile(z))


@needs_matplotlib
def test_schedules_of_a_photo(tmp_path, capsys):
    # The photo is cropped to its center, here a red square.
    photo = tmp_path / "photo.png"
    image = Image.new("RGB", (1200, 600), "blue")
    image.paste("red", (290, 0, 910, 600))
    image.save(photo)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 512, 512)
    torch.testing.assert_close(figures.read_image(photo), red)

    out = tmp_path / "new" / "figure.png"
    call(figures.main, "schedules", photo, "--out", out)
    figure = written(out, capsys)
    assert figure.getpixel((200, figures.PLOT_HEIGHT + 100)) == pytest.approx((255, 0, 0), abs=8)


# ---------------------------------------------------------------- architecture


def expected_labels(model, size, res):
    """The labels of a recipe's boxes, from its numbers: on the way down, up, and at the bottom."""
    recipe = RECIPES[model][size][res]
    defaults = dict(base_channels=128, patching="none", num_transformer_blocks=36)
    if model == "uvit":
        defaults |= dict(channel_multiplier=[1, 2, 4, 16], num_res_blocks=[2, 2, 2])
    recipe = defaults | recipe
    blocks = recipe["num_res_blocks"]
    first = res // {"none": 1, "dwt_1": 2, "dwt_2": 4}[recipe["patching"]]

    places = [
        f"{recipe['base_channels'] * multiplier} @ {first >> i}×{first >> i}"
        for i, multiplier in enumerate(recipe["channel_multiplier"])
    ]
    more = 1 if model == "unet" else 0  # the U-Net has n + 1 blocks on the way up
    down = [f"{n} × {place}" for n, place in zip(blocks, places)]
    up = [f"{n + more} × {place}" for n, place in zip(blocks, places)]
    bottom = 2 if model == "unet" else recipe["num_transformer_blocks"]
    return down, up, f"{bottom} × {places[-1]}"


@pytest.mark.parametrize("size, res", [("paper", 256), ("tiny", 32)])
def test_labels_are_the_numbers_of_the_recipe(size, res, monkeypatch):
    # Counting takes seconds. test_unet.py and test_uvit.py test these numbers.
    monkeypatch.setattr(figures, "count", lambda *_: (2_455_004_684, 533_641_560_064.0, 0))
    for model, name in (("unet", "U-Net"), ("uvit", "U-ViT")):
        net = figures.describe(model, size, res)
        assert net.title == f"{name}, {res} px: 2455 M parameters, 533.6 GMAC"
        down, up, bottom = expected_labels(model, size, res)
        assert [figures.box_label(level.down, level) for level in net.levels] == down
        assert [figures.box_label(level.up, level) for level in net.levels] == up
        assert figures.box_label(net.bottom.down, net.bottom) == bottom

        # Every block on the way up takes a skip. The rest of the parameters is in other layers.
        assert all(level.skips == len(level.up) for level in net.levels)
        assert net.bottom.skips == 0
        assert 0.7 < sum(level.share for level in [*net.levels, net.bottom]) < 1


def test_kinds_of_blocks():
    unet = describe("unet", "tiny", 32)
    assert [set(level.down + level.up) for level in unet.levels] == [{"res"}, {"attention"}]
    assert unet.bottom.down == ["attention", "res"]
    assert unet.stem == ["wavelet: 12 @ 16×16", "3×3 convolution"]
    assert unet.head == ["3×3 convolution", "inverse wavelet"]
    uvit = describe("uvit", "tiny", 32)
    assert [set(level.down + level.up) for level in uvit.levels] == 3 * [{"res"}]
    assert set(uvit.bottom.down) == {"transformer"}
    assert uvit.stem == uvit.head == ["3×3 convolution"]

    # The other kinds of input down-sampling.
    conv = torch.nn.Conv2d(3, 8, 4, stride=4)
    assert figures.conv_name(conv) == "4×4 convolution, stride 4"
    conv = torch.nn.ConvTranspose2d(8, 3, 4, stride=4)
    assert figures.conv_name(conv) == "4×4 transposed convolution, stride 4"


@needs_matplotlib
def test_architecture_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "describe", describe)
    canvases = []
    new_canvas = figures.new_canvas
    monkeypatch.setattr(
        figures, "new_canvas", lambda height: canvases.append(new_canvas(height)) or canvases[-1]
    )
    out = tmp_path / "figure.png"
    call(figures.main, "architecture", "--size tiny --res 32 --out", out)
    image = written(out, capsys)
    [(figure, axes)] = canvases
    assert image.size == (figures.WIDTH, round(figure.get_figheight() * figures.DPI))

    # The boxes are as described: a slice per block, as wide as its channels.
    slices = [(patch.get_width(), patch.get_height()) for patch in axes.patches]
    nets = [describe(model, "tiny", 32) for model in figures.NAMES]
    scale = figures.box_scale(nets)
    expected = [
        (level.channels * scale / len(kinds), figures.box_height(level.size))
        for net in nets
        for level in [*net.levels, net.bottom]
        for kinds in (level.down, level.up)
        for _ in kinds
    ]
    kinds = len(
        {kind for net in nets for level in [*net.levels, net.bottom] for kind in level.down}
    )
    np.testing.assert_allclose(slices[:-kinds], expected)  # the last ones are in the legend

    # No text overlaps another one, and all of it is inside of the figure.
    texts = [text for text in axes.texts if text.get_text()]
    labels = {text.get_text() for text in texts}
    for model in figures.NAMES:
        down, up, bottom = expected_labels(model, "tiny", 32)
        assert labels >= {*down, *up, bottom}
    boxes = [text.get_window_extent() for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= image.width and box.y0 >= 0 and box.y1 <= image.height


# ---------------------------------------------------------------- denoising


def test_denoising_command(run, tmp_path, capsys, drawn):
    out = tmp_path / "figure.png"
    options = "--label star,ring --n 3 --steps 9 --guidance 1.5 --seed 5 --out"
    call(figures.main, "denoising", run, options, out)
    [figure] = drawn
    assert written(out, capsys).size == figure.size

    # It is the strip of these samples, with their names.
    options = dict(n=3, steps=9, guidance=1.5, seed=5)
    records, samples, names = figures.record_sampling(run, "star,ring", **options)
    assert names == ["star", "ring", "star"]
    assert np.array_equal(figure, make_strip(records, names, 9))
    net, config, schedule = load(run)
    label = torch.tensor([config["classes"].index(name) for name in names])
    options = dict(steps=9, label=label, guidance=1.5, null_label=len(config["classes"]), seed=5)
    assert torch.equal(samples, sample(net, samples.shape, schedule, **options))


def test_denoising_without_classes(run, monkeypatch):
    # Such a run has the null label only, and cannot be guided.
    net, config, schedule = load(run)
    nameless = dict(config, classes=[])

    def unconditional(z, logsnr, label):
        assert torch.equal(label, torch.zeros(2, dtype=torch.int64))
        return net(z, logsnr, None)

    monkeypatch.setattr(figures, "load", lambda path: (unconditional, nameless, schedule))
    _, samples, names = figures.record_sampling(run, steps=2)
    assert names == ["", ""]
    assert torch.equal(samples, sample(net, samples.shape, schedule, steps=2))

    # Latents and texts are refused.
    for field in (dict(in_channels=4), dict(text_tokens=8)):
        other = dict(config, model_args=config["model_args"] | field)
        monkeypatch.setattr(figures, "load", lambda path, other=other: (net, other, schedule))
        with pytest.raises(ValueError, match="my-run "):
            figures.record_sampling("my-run")


# ---------------------------------------------------------------- wrong input


def test_wrong_input_gets_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "folder").mkdir()
    cases = [
        (["schedules", "nowhere.jpg"], "nowhere.jpg"),
        (["schedules", "broken.jpg"], "broken.jpg"),
        (["schedules", "folder"], "folder"),
        (["denoising", "nowhere"], "nowhere"),
        (["denoising", "folder"], "folder"),
        (["denoising", run, "--label cow"], "cow"),
        (["denoising", run, "--n 0"], "--n"),
        (["denoising", run, "--steps 0"], "--steps"),
        (["denoising", run, "--seed -1"], "--seed"),
        (["denoising", run, "--guidance nan"], "--guidance"),
        (["architecture", "--size tiny --res 33"], "--res 33"),
        (["architecture", "--size tiny --res 8"], "--res 8"),  # the U-ViT has one, the U-Net not
        (["architecture", "--size huge"], "huge"),
        (["landscape"], "landscape"),
        ([], "figure"),
    ]
    for line, name in cases:
        assert name in outcome(figures.main, line)
    assert not os.path.exists("assets")


def test_matplotlib_is_optional(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "describe", describe)
    monkeypatch.chdir(tmp_path)
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    for line in (["schedules"], ["architecture", "--size tiny --res 32"]):
        assert "pip install matplotlib" in outcome(figures.main, line)
    call(figures.main, "denoising", run, "--n 1 --steps 2")
    written("assets/denoising.png", capsys)
