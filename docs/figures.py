"""Draw the figures that explain the paper: noise schedules, architectures and denoising.

    python -m docs.figures schedules                # assets/schedules.png, needs matplotlib
    python -m docs.figures schedules photo.jpg      # the same with a photo of yours
    python -m docs.figures architecture             # assets/architecture.png, needs matplotlib
    python -m docs.figures architecture --size tiny --res 32
    python -m docs.figures denoising assets/shapes32.pt --label moon,star   # assets/denoising.png

Run it from the root of the repository. --out names another file. Each figure is computed first, as
numbers or images that can be tested, and then drawn.
"""

import argparse
import io
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from fid import to_rgb
from sample import (
    can_guide,
    has_captions,
    parse_labels,
    to_float,
    to_uint8,
)
from schedule import diffuse, make_schedule
from support.checkpoint import build_net, load, net_class, sample_size
from support.data import Shapes, load_batch
from support.recipes import RECIPES
from support.runtime import in_bf16, run_command, writing
from support.strip import make_strip, record_steps
from unet import UNetBlock, count
from uvit import TransformerBlock

# GitHub shows figures about 830 pixels wide. Twice as many are sharp on all screens.
WIDTH = 1660
DPI = 200  # turns sizes of fonts and lines, in points, into pixels

MAX_BYTES = 300_000  # of a figure in the repository

# Colors that colorblind readers can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
DARK, GRAY = "#222222", "#777777"


# ---------------------------------------------------------------- drawing


def new_canvas(height):
    """Return a matplotlib figure of WIDTH x height pixels, and axes that cover it.

    The coordinates of the axes are pixels, with y pointing down, as in Pillow.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("this figure needs matplotlib: pip install matplotlib") from error

    # Without pyplot, no window and no global state: the figure is drawn into memory.
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def to_image(figure):
    """Draw a matplotlib figure. Returns a PIL image."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def with_minus(text):
    """Replace the hyphens of negative numbers in a text by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def draw_arrow(axes, start, end, color=GRAY):
    """Draw an arrow between two points (x, y)."""
    style = dict(arrowstyle="-|>", color=color, linewidth=1, mutation_scale=8)
    axes.annotate("", xy=end, xytext=start, arrowprops=style | dict(shrinkA=0, shrinkB=0))


def enlarge(image, scale):
    """Enlarge an image (H, W, 3) uint8, each pixel to a square. Returns a PIL image."""
    height, width, _ = image.shape
    size = (width * scale, height * scale)
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST)


def save_png(image, path):
    """Save an image as a PNG with a palette: a third of the size of 24 bits per pixel."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # Much noise needs a smaller palette, to keep the file below MAX_BYTES.
    for colors in (256, 128):
        data = io.BytesIO()
        image.quantize(colors, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        if data.tell() <= MAX_BYTES:
            break
    with writing(path) as file:
        file.write(data.getvalue())
    print(f"wrote {path}: {image.width} x {image.height}, {data.tell() / 1000:.0f} kB")


# ---------------------------------------------------------------- schedules: the images

SCHEDULES = ["cosine", "shifted:64", "interpolated:32:256"]
IMAGE_D = 512  # side of the image that is noised
NOISE_D = 64  # side to which it is averaged
TIMES = [0.25, 0.5, 0.75]
STAR = 17  # the number of a built-in image with a star in its center


def read_image(photo=None):
    """Read a photo, cropped to a square, or a built-in image. Returns x (3, 512, 512) in [-1, 1].

    Raises ValueError, with the name of the photo, if it cannot be read.
    """
    if photo is None:
        images, _ = load_batch(Shapes(IMAGE_D), [STAR])
        return to_float(images[0])
    try:
        image = to_rgb(Image.open(photo))
    except Exception as error:  # Pillow raises many kinds of errors for a broken photo
        reason = getattr(error, "strerror", None) or "not an image that Pillow can read"
        raise ValueError(f"{photo}: {reason}") from error
    image = ImageOps.fit(image, (IMAGE_D, IMAGE_D), Image.Resampling.LANCZOS)
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def average(z):
    """Average pooling of z (B, 3, 512, 512) to 64 x 64 pixels."""
    return F.avg_pool2d(z, IMAGE_D // NOISE_D)


def noise_and_average(x, eps, logsnr):
    """Noise x at full size, then average it. x, eps: (B, 3, 512, 512); logsnr: (B,).

    Returns z (B, 3, 512, 512), the average (B, 3, 64, 64), and its logsnr (B,).
    """
    z = diffuse(x, eps, logsnr)
    # Eq. 4: the average of s x s pixels keeps the signal and divides sigma by s.
    s = IMAGE_D // NOISE_D
    averaged_logsnr = logsnr + 2 * math.log(s)
    # The variance was alpha^2 + sigma^2 = 1, and is alpha^2 + sigma^2 / s^2. Dividing by its root
    # makes the average a z of the diffusion process at 64 px, and gives it the same contrast.
    variance = torch.sigmoid(logsnr) + torch.sigmoid(-logsnr) / s**2
    return z, average(z) / variance.sqrt()[:, None, None, None], averaged_logsnr


class Row(NamedTuple):
    """A row of tiles, one per time: noised images at full size, and at 64 px."""

    spec: str  # the schedule
    full: torch.Tensor | None  # (B, 3, 512, 512); None for the row that begins at 64 px
    small: torch.Tensor  # (B, 3, 64, 64)
    full_logsnr: torch.Tensor | None  # (B,)
    small_logsnr: torch.Tensor  # (B,)


def noise_rows(x):
    """Noise x (3, 512, 512) with all schedules. Returns a list of Row.

    The first row noises the average of x instead, with the cosine schedule at 64 px: the amount of
    noise that the shifted schedule reproduces.
    """
    t = torch.tensor(TIMES)
    eps = torch.randn(len(t), *x.shape, generator=torch.Generator().manual_seed(0))
    x = x.expand_as(eps)

    # The average of s x s noise values has the standard deviation 1 / s. Multiplied by s, it is
    # standard normal noise for 64 px. All rows then have the same noise, in different amounts.
    logsnr = make_schedule(SCHEDULES[0], NOISE_D)(t)
    small_eps = average(eps) * (IMAGE_D // NOISE_D)
    rows = [Row(SCHEDULES[0], None, diffuse(average(x), small_eps, logsnr), None, logsnr)]

    for spec in SCHEDULES:
        logsnr = make_schedule(spec, IMAGE_D)(t)
        z, averaged, averaged_logsnr = noise_and_average(x, eps, logsnr)
        rows.append(Row(spec, z, averaged, logsnr, averaged_logsnr))
    return rows


# ---------------------------------------------------------------- schedules: the figure

TILE = 256  # pixels of the figure: every pixel of an image has at least 2 x 2
CROP = 128  # side of the part of a full-size image that a tile shows
PLOT_HEIGHT = 560
ROW_HEIGHT = TILE + 112  # a heading and captions above the tiles
REMARKS = dict(
    zip(SCHEDULES, ("too little noise", "as noisy as the reference", "less noise at small t"))
)
COLORS = dict(zip(SCHEDULES, (BLUE, VERMILION, GREEN)))
STYLES = dict(zip(SCHEDULES, ("-", "--", "-.")))


def tile_left(column):
    """The left edge of a tile in a column from 0 to 5: two groups of three."""
    return column * (TILE + 8) + (76 if column >= 3 else 0)


def crop(image):
    """The center of a full-size image (512, 512, 3)."""
    edge = (IMAGE_D - CROP) // 2
    return image[edge : edge + CROP, edge : edge + CROP]


def to_tile(z):
    """Turn z (3, H, W) into a tile: all of a 64 px image, or the center of a larger one."""
    image = to_uint8(z).permute(1, 2, 0).numpy()
    if len(image) > NOISE_D:
        # Noise does not compress. Four levels per color keep the file small. They do not shift the
        # colors on average, because the noise acts as dithering.
        levels = np.array([0, 85, 170, 255], np.uint8)
        image = levels[(crop(image) / 85).round().astype(int)]
    return enlarge(image, TILE // len(image))


def draw_schedules(photo=None):
    """Draw the noise schedules at 512 px, and what they do to an image. Returns a PIL image.

    Caption: Top: the noise schedules for images of 512 x 512 pixels. Left: a part of such an image,
    noised with each schedule. Right: the whole image after averaging 8 x 8 pixels, which raises
    logsnr by 2 log 8 = 4.2 (Eq. 4). Averaging removes most of the noise of the cosine schedule,
    which is therefore too little at 512 px. The shifted schedule (Eq. 5) leaves as much noise as
    the cosine schedule at 64 px: its averaged row equals the reference row, because all images have
    the same noise.

    The averaged images are scaled to the same contrast. schedule.py draws Fig. 3 of the paper,
    which has two schedules, and does not scale.
    """
    x = read_image(photo)
    rows = noise_rows(x)
    figure, axes = new_canvas(PLOT_HEIGHT + len(rows) * ROW_HEIGHT - 24)
    plot_schedules(figure)
    for i, row in enumerate(rows):
        label_row(axes, row, PLOT_HEIGHT + i * ROW_HEIGHT)

    # Tiles are pasted into the finished drawing: matplotlib would interpolate between pixels.
    image = to_image(figure)
    for i, row in enumerate(rows):
        top = PLOT_HEIGHT + i * ROW_HEIGHT + 80
        for column, z in enumerate(row.small, 3):
            image.paste(to_tile(z), (tile_left(column), top))
        for column, z in enumerate([] if row.full is None else row.full):
            image.paste(to_tile(z), (tile_left(column), top))
    paste_original(image, x, PLOT_HEIGHT + 80)
    return image


def plot_schedules(figure):
    """Plot logsnr over t, with a dot for each column of tiles."""
    height = figure.get_figheight() * DPI
    plot = figure.add_axes(
        [110 / WIDTH, 1 - (PLOT_HEIGHT - 110) / height, 1520 / WIDTH, (PLOT_HEIGHT - 130) / height]
    )
    t = torch.linspace(0, 1, 401)
    plot.axhline(0, color="#CCCCCC", linewidth=0.8)
    for spec in SCHEDULES:
        schedule = make_schedule(spec, IMAGE_D)
        plot.plot(t, schedule(t), STYLES[spec], color=COLORS[spec], linewidth=1.6)
        plot.plot(TIMES, schedule(torch.tensor(TIMES)), "o", color=COLORS[spec], markersize=4)

    # Each name is next to its curve.
    name = dict(fontsize=9, fontweight="bold")
    plot.text(0.11, 4.3, "cosine", color=COLORS["cosine"], **name)
    plot.text(0.31, -5.6, "shifted:64", color=COLORS["shifted:64"], ha="right", **name)
    plot.text(0.95, -15, "interpolated:32:256", color=GREEN, ha="right", **name)
    draw_shift(plot)
    zero = "logsnr = 0: as much noise as signal"
    plot.text(1, 0.5, zero, fontsize=8, color=GRAY, ha="right")

    plot.set(xlim=(0, 1), ylim=(-20, 15), xticks=[0, *TIMES, 1], yticks=range(-20, 16, 5))
    plot.tick_params(labelsize=8)
    plot.set_xlabel("t   (0: data, 1: noise)", fontsize=9)
    plot.set_ylabel("logsnr at 512 px", fontsize=9)
    plot.spines[["top", "right"]].set_visible(False)


def draw_shift(plot):
    """Draw the distance between the cosine and the shifted schedule, with its formula (Eq. 5)."""
    t = 0.4
    start, end = (make_schedule(spec, IMAGE_D)(t).item() for spec in SCHEDULES[:2])
    draw_arrow(plot, (t, start), (t, end), DARK)
    formula = with_minus(f"shift 2 log({NOISE_D}/{IMAGE_D}) = {end - start:z.1f}")
    plot.text(t, start + 1, formula, fontsize=8, color=DARK, ha="center")


def label_row(axes, row, top):
    """Write the headings of a row, and the time and logsnr above each of its tiles."""
    heading = dict(fontsize=9, fontweight="bold", va="top")
    left, right = tile_left(0), tile_left(3)
    if row.full is None:
        axes.text(left, top, "the image, without noise", color=DARK, **heading)
        axes.text(right, top, "the image at 64 px, cosine: the reference", color=DARK, **heading)
    else:
        color = COLORS[row.spec]
        axes.text(left, top, f"{row.spec} at 512 px, full size", color=color, **heading)
        remark = f"averaged to 64 px: {REMARKS[row.spec]}"
        axes.text(right, top, remark, color=color, **heading)
        write_captions(axes, row.full_logsnr, 0, top)
        draw_arrow(
            axes, (tile_left(3) - 68, top + 80 + TILE / 2), (right - 16, top + 80 + TILE / 2)
        )
    write_captions(axes, row.small_logsnr, 3, top)


def write_captions(axes, logsnrs, first, top):
    """Write the time and logsnr above three tiles, from column `first` on."""
    for i, (t, logsnr) in enumerate(zip(TIMES, logsnrs.tolist())):
        caption = with_minus(f"t = {t:g}, logsnr {logsnr:z.1f}")
        axes.text(tile_left(first + i), top + 40, caption, fontsize=8, color=DARK, va="top")


def paste_original(image, x, top):
    """Paste the image without noise: all of it, with a frame around the crop, and the crop."""
    pixels = to_uint8(x).permute(1, 2, 0).numpy()
    whole = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX)
    edge = (TILE - CROP * TILE // IMAGE_D) // 2
    frame = (edge, edge, TILE - 1 - edge, TILE - 1 - edge)
    ImageDraw.Draw(whole).rectangle(frame, outline="white", width=3)
    image.paste(whole, (tile_left(0), top))
    image.paste(enlarge(crop(pixels), TILE // CROP), (tile_left(1), top))


# ---------------------------------------------------------------- architecture: the numbers


class Level(NamedTuple):
    """The blocks of a net at one resolution. A kind is a key of KINDS."""

    channels: int
    size: int  # side of the feature maps
    down: list[str]  # the kind of each block on the way down
    up: list[str]  # the kind of each block on the way up
    skips: int  # how many of the blocks on the way up take a skip
    share: float  # of all parameters of the net, in these blocks


class Architecture(NamedTuple):
    """What the figure shows of a net."""

    title: str
    res: int
    levels: list[Level]  # the highest resolution first
    bottom: Level  # the middle of the U-Net, or the transformer of the U-ViT, in `down`
    stem: list[str]  # the operations between the image and the first block
    head: list[str]  # the operations between the last block and the image


# The kinds of blocks: their colors and their names in the legend.
KINDS = {
    "res": (BLUE, "ResBlock"),
    "attention": (ORANGE, "ResBlock, then self-attention"),
    "transformer": (GREEN, "transformer block: MLP, then self-attention"),
}
NAMES = {"unet": "U-Net", "uvit": "U-ViT"}


def kind_of(block):
    """Return the kind of a block, a key of KINDS."""
    if isinstance(block, TransformerBlock):
        return "transformer"
    if isinstance(block, UNetBlock) and block.attention is not None:
        return "attention"
    return "res"


def record_blocks(net, res):
    """Call a net on the meta device. Returns {block: (output shape, True if it takes a skip)}."""
    records = {}

    def record(block, args, output):
        records[block] = (output.shape, len(args) == 3)  # a block is called with x, emb, skip

    bottom = net.transformer if hasattr(net, "transformer") else net.middle
    stacks = [*net.down, bottom, *net.up]
    hooks = [block.register_forward_hook(record) for stack in stacks for block in stack]
    with torch.no_grad(), torch.device("meta"):
        net(torch.empty(1, 3, res, res), torch.empty(1))
    for hook in hooks:
        hook.remove()
    return records


def size_of(module):
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe_level(net, records, down, up=()):
    """Describe the blocks of one resolution as a Level. records: see record_blocks."""
    # All blocks of a level have the same width and resolution.
    _, channels, size, _ = records[down[0]][0]
    skips = sum(takes_skip for _, takes_skip in (records[block] for block in up))
    share = sum(size_of(block) for block in (*down, *up)) / size_of(net)
    return Level(channels, size, list(map(kind_of, down)), list(map(kind_of, up)), skips, share)


def describe_ends(net, size):
    """Describe the input and output down-sampling. Returns (stem, head), lists of operations."""
    stem, head = net.stem.conv, net.head.conv
    if net.stem.levels:
        wavelet = f"wavelet: {stem.in_channels} @ {size}×{size}"
        return [wavelet, conv_name(stem)], [conv_name(head), "inverse wavelet"]
    return [conv_name(stem)], [conv_name(head)]


def conv_name(conv):
    """Return the name of a convolution, with its kernel size and stride."""
    height, width = conv.kernel_size
    stride = f", stride {conv.stride[0]}" if conv.stride[0] > 1 else ""
    transposed = "transposed " if conv.transposed else ""
    return f"{height}×{width} {transposed}convolution{stride}"


def describe(model, size, res):
    """Build a network of RECIPES on the meta device, and describe it as an Architecture.

    Raises ValueError if there is no such recipe.
    """
    recipes = RECIPES[model].get(size, {})
    if res not in recipes:
        known = ", ".join(map(str, recipes)) or "no resolution"
        raise ValueError(f"--size {size} --res {res}: {model} has recipes for {known}")
    model_args = dict(recipes[res], res=res, num_classes=1000)
    with torch.device("meta"):
        net = build_net(model, model_args)
    # What the blocks return says more than the configuration: real widths and resolutions.
    records = record_blocks(net, res)
    levels = [describe_level(net, records, down, up) for down, up in zip(net.down, net.up)]
    bottom = describe_level(net, records, getattr(net, "transformer", None) or net.middle)

    parameters, macs, _ = count(net_class(model), model_args)
    cost = f"{parameters / 1e6:.4g} M parameters, {macs / 1e9:.4g} GMAC"
    title = f"{NAMES[model]}, {res} px: {cost}"
    first_size = (levels or [bottom])[0].size
    return Architecture(title, res, levels, bottom, *describe_ends(net, first_size))


# ---------------------------------------------------------------- architecture: the figure

PANEL = 790  # width of the drawing of one net
GAP = 140  # between the blocks on the way down and up
BOTTOM_WIDTH = 400  # the widest box at the bottom
SIDE_WIDTH = 240  # the widest box on one side
SHARE = dict(fontsize=8, color=GRAY, ha="right", va="center")
FIRST_ROW = 250  # top of the highest resolution, below the title and the input layer


def box_label(kinds, level):
    """The label of a box: blocks x channels @ resolution."""
    return f"{len(kinds)} × {level.channels} @ {level.size}×{level.size}"


def box_height(size):
    """The height of a box. The square root keeps low resolutions visible."""
    return 7.5 * math.sqrt(size)


def row_tops(nets):
    """Return the top of each row, as {(size, is_middle): top}, and the bottom of the last one.

    Rows of the same resolution are at the same height in both drawings. The middle of a U-Net has
    the resolution of its last level, and gets a row of its own below it.
    """
    # False sorts before True: the middle of a U-Net comes below the level of its size.
    keys = {(level.size, False) for net in nets for level in net.levels}
    keys |= {bottom_key(net) for net in nets}
    tops = {}
    top = FIRST_ROW
    for size, is_middle in sorted(keys, key=lambda key: (-key[0], key[1])):
        tops[size, is_middle] = top
        top += box_height(size) + 62
    return tops, top


def bottom_key(net):
    """The row of the blocks at the bottom of a net."""
    return net.bottom.size, net.bottom.size in [level.size for level in net.levels]


def box_scale(nets):
    """Return the pixels per channel: as many as fit."""
    widest_bottom = max(net.bottom.channels for net in nets)
    widest_side = max((level.channels for net in nets for level in net.levels), default=1)
    return min(BOTTOM_WIDTH / widest_bottom, SIDE_WIDTH / widest_side)


def draw_architecture(size="paper", res=256):
    """Draw the U-Net and the U-ViT of a recipe side by side. Returns a PIL image.

    Caption: The published U-Net and U-ViT for images of 256 x 256 pixels. Most parameters
    are at 16 x 16, where feature maps are small: the paper adds blocks there, and not
    at high resolutions. The U-ViT first reduces the image to 128 x 128 with a wavelet. It replaces
    all levels from 16 x 16 on by one transformer without skips.
    """
    nets = [describe(model, size, res) for model in NAMES]
    tops, bottom = row_tops(nets)
    figure, axes = new_canvas(math.ceil(bottom) + 170)
    scale = box_scale(nets)
    for i, net in enumerate(nets):
        draw_net(axes, net, i * (WIDTH - PANEL) + PANEL / 2, tops, scale)
    draw_legend(axes, nets, bottom + 30)
    return to_image(figure)


def draw_net(axes, net, center, tops, scale):
    """Draw one net around the vertical line x = center. scale: pixels per channel."""
    axes.text(center, 10, net.title, fontsize=9.5, fontweight="bold", ha="center", va="top")
    left, right = center - GAP / 2, center + GAP / 2  # where the boxes of the two sides begin
    down, up = left - 12, right + 12  # the arrows between levels
    small = dict(fontsize=8, color=DARK)

    # The image that enters, and the prediction that leaves.
    image = f"3 @ {net.res}×{net.res}"
    axes.text(left, 92, f"$z_t$:  {image}", ha="right", **small)
    axes.text(right, 92, rf"$\hat{{v}}$:  {image}", ha="left", **small)

    # Down and up, level by level. y is where the arrow from the level above begins.
    y = 106
    for level in net.levels:
        top = tops[level.size, False]
        draw_arrow(axes, (down, y), (down, top - 4))
        draw_arrow(axes, (up, top - 4), (up, y))
        width = level.channels * scale
        y = top + box_height(level.size)
        draw_blocks(axes, level.down, left - width, top, width, y - top)
        draw_blocks(axes, level.up, right, top, width, y - top)
        axes.text(down - 14, y + 8, box_label(level.down, level), ha="right", va="top", **small)
        axes.text(up + 14, y + 8, box_label(level.up, level), ha="left", va="top", **small)
        draw_skips(axes, level.skips, left, right, (top + y) / 2)
        write_share(axes, level, center, (top + y) / 2)
        y += 4

    draw_bottom(axes, net, center, y, tops[bottom_key(net)], scale)
    draw_ends(axes, net, down, up)

    # The heading of the column of shares.
    top = tops[net.levels[0].size, False] if net.levels else tops[bottom_key(net)]
    axes.text(center + PANEL / 2 - 10, top - 20, "parameters:", **SHARE)


def draw_bottom(axes, net, center, y, top, scale):
    """Draw the blocks at the bottom, in one box in the center, with its top at `top`.

    y: where the arrows to and from the level above begin.
    """
    offset = GAP / 2 + 12
    draw_arrow(axes, (center - offset, y), (center - offset, top - 4))
    draw_arrow(axes, (center + offset, top - 4), (center + offset, y))
    width, height = net.bottom.channels * scale, box_height(net.bottom.size)
    draw_blocks(axes, net.bottom.down, center - width / 2, top, width, height)
    label = box_label(net.bottom.down, net.bottom)
    axes.text(center, top + height + 8, label, fontsize=8, color=DARK, ha="center", va="top")
    write_share(axes, net.bottom, center, top + height / 2)


def draw_blocks(axes, kinds, left, top, width, height):
    """Draw a box of equal slices, one per block."""
    from matplotlib.patches import Rectangle

    for i, kind in enumerate(kinds):
        corner = (left + i * width / len(kinds), top)
        color, _ = KINDS[kind]
        box = Rectangle(
            corner, width / len(kinds), height, facecolor=color, edgecolor="white", linewidth=0.5
        )
        axes.add_patch(box)


def draw_skips(axes, skips, left, right, y):
    """Draw an arrow from the way down to the way up, and the number of skips."""
    if skips:
        draw_arrow(axes, (left + 6, y), (right - 6, y))
        label = f"{skips} skip" if skips == 1 else f"{skips} skips"
        axes.text((left + right) / 2, y - 8, label, fontsize=8, color=GRAY, ha="center")


def write_share(axes, level, center, y):
    """Write the share of a level in the parameters, at the right edge of the drawing."""
    share = f"{100 * level.share:.0f} %" if level.share >= 0.005 else "< 1 %"
    axes.text(center + PANEL / 2 - 10, y, share, **SHARE)


def draw_ends(axes, net, down, up):
    """Write the operations of the input and the output layer beside their arrows."""
    text = dict(fontsize=8, color=GRAY, va="top", linespacing=1.3)
    axes.text(down - 14, 124, "\n".join(net.stem), ha="right", **text)
    # Along the upward arrow, the last operation is at the top.
    axes.text(up + 14, 124, "\n".join(reversed(net.head)), ha="left", **text)


def draw_legend(axes, nets, top):
    """Explain the colors, sizes and labels of the boxes."""
    used = {kind for net in nets for level in [*net.levels, net.bottom] for kind in level.down}
    left = 20
    for kind, (_, name) in KINDS.items():
        if kind in used:
            draw_blocks(axes, [kind], left, top, 28, 20)
            axes.text(left + 40, top + 10, name, fontsize=8, color=DARK, va="center")
            left += 110 + 13 * len(name)
    lines = (
        "Label: blocks × channels @ resolution. Each slice of a box is one block. Width of a box: "
        "channels.\nHeight: resolution (square root). Between levels: 2×2 average pooling down, "
        "nearest neighbor up.\nGMAC: 10⁹ multiply-accumulates per image. Percentages: share of the "
        "parameters of the net."
    )
    axes.text(20, top + 34, lines, fontsize=8, color=DARK, va="top", linespacing=1.4)


# ---------------------------------------------------------------- denoising


def record_sampling(run, labels=None, n=2, steps=256, guidance=2.0, seed=0):
    """Draw n samples of a run with the sampler of the paper, from step 0 at t = 1.

    labels: see sample.parse_labels. Returns (records, samples (n, 3, H, W), names of their
    classes), see record_steps. Raises ValueError for runs on texts or latents.
    """
    net, config, schedule = load(run)
    size, latents = sample_size(config)
    if latents or has_captions(config):
        raise ValueError(f"{run} does not draw images of classes: this figure needs such a run")
    classes = config["classes"]
    label = parse_labels(labels, classes, n)
    names = [classes[i] if classes else "" for i in label.tolist()]

    # Some runs cannot be guided.
    options = dict(label=label, null_label=len(classes), steps=steps, seed=seed)
    options |= dict(guidance=guidance if can_guide(config) else 1.0)
    net = in_bf16(net, config["bf16"])
    samples, records = record_steps(net, (n, *size), schedule, **options)
    return records, samples, names


def draw_denoising(run, steps=256, **options):
    """Draw how samples of a run emerge from noise. Returns a PIL image.

    Caption: Two samples of a small U-ViT trained on the built-in shapes, from pure noise (left) to
    the image (right). z_t is the input of the network, x_hat its estimate of the clean image. At
    t = 1 the input holds no information, so the estimate is an average of the class, which guidance
    exaggerates. Color and position are decided first, then the outline and the texture.
    """
    records, _, names = record_sampling(run, steps=steps, **options)
    return make_strip(records, names, steps)


# ---------------------------------------------------------------- the command


def make_parser():
    """The parser of the command, with one subcommand per figure."""
    parser = argparse.ArgumentParser(
        prog="docs.figures",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    figures = parser.add_subparsers(dest="figure", required=True)
    schedules = figures.add_parser("schedules", help="noise schedules at 512 px, and their noise")
    schedules.add_argument("photo", nargs="?", help="a photo (default: a built-in image)")

    architecture = figures.add_parser("architecture", help="the U-Net and the U-ViT")
    sizes = [size for size in RECIPES["unet"] if size in RECIPES["uvit"]]
    architecture.add_argument("--size", choices=sizes, default="paper")
    architecture.add_argument("--res", type=int, default=256, help="side in pixels (default 256)")

    denoising = figures.add_parser("denoising", help="z_t and x_hat while a run samples")
    add = denoising.add_argument
    add("run", help="a run's folder, or a checkpoint")
    add("--label", dest="labels", help="classes to cycle through: 3 or star,heart (default: all)")
    add("--n", type=int, default=2, help="number of samples (default 2)")
    add("--steps", type=int, default=256, help="number of steps (default 256)")
    add("--guidance", type=float, default=2.0, help="scale of guidance (default 2)")
    add("--seed", type=int, default=0, help="seed of the noise (default 0)")

    for name, each in figures.choices.items():
        each.add_argument("--out", default=f"assets/{name}.png", help="default: %(default)s")
    for each in (parser, *figures.choices.values()):
        each.error = lambda message: sys.exit(f"docs.figures: {message}")
    return parser


FIGURES = dict(schedules=draw_schedules, architecture=draw_architecture, denoising=draw_denoising)


def main(argv=None):
    options = vars(make_parser().parse_args(argv))
    figure, out = options.pop("figure"), options.pop("out")
    if min(options.get("n", 1), options.get("steps", 1)) < 1 or options.get("seed", 0) < 0:
        raise ValueError("--n and --steps must be at least 1, and --seed at least 0")
    if not math.isfinite(options.get("guidance", 1)):
        raise ValueError("--guidance must be a finite number")
    save_png(FIGURES[figure](**options), out)


if __name__ == "__main__":
    run_command(main)
