"""The recipes, as tables: RECIPES for networks, TRAINING for their training.

"paper" is published (appendix), "text" follows the paper. "tiny", "small" and "base" are ours, and
their recipes for other resolutions are derived from these tables.
"""

import inspect

from unet import PATCHING


def _net(common, channel_multiplier, num_res_blocks, **fields):
    """A row of RECIPES: the arguments of a network that differ from the defaults of its class."""
    levels = dict(channel_multiplier=channel_multiplier, num_res_blocks=num_res_blocks)
    return common | fields | levels


# ---------------------------------------------------------------- networks
# RECIPES[model][size][res]. The columns: common arguments, width of each level as a multiple of
# base_channels, and residual blocks of each level. The last level of a U-ViT is its transformer.
#
# The network predicts v, which contains all of the noise. The widest feature maps therefore need
# more channels than patching creates: 3 without it, 12 with dwt_1, 48 with dwt_2.

_TINY = dict(emb_channels=128, base_channels=32, num_transformer_blocks=4, transformer_dropout=0.0)
_SMALL = dict(
    emb_channels=512, base_channels=128, num_transformer_blocks=12, transformer_dropout=0.1
)
_BASE = dict(
    emb_channels=1024,
    base_channels=128,
    num_transformer_blocks=16,
    transformer_dropout=0.1,
    attn_resolutions=[32],
)

_TINY_UNET = dict(emb_channels=128, base_channels=32, dropout=0.0, attn_resolutions=[8])
_SMALL_UNET = dict(emb_channels=512, base_channels=64)
_BASE_UNET = dict(emb_channels=1024, base_channels=96)

_UVIT = {
    # Ours: 0.8 to 2 M parameters, for two CPU cores. 4 to 16 px are for latents.
    "tiny": {
        4: _net(_TINY, [4], []),
        8: _net(_TINY, [4], []),
        16: _net(_TINY, [1, 4], [2]),
        # Without a wavelet, 16 channels per pixel: the noise of 3 values passes them unharmed, and
        # samples have no grain. With dwt_1, 32 channels for its 12 bands do not suffice. The
        # transformer at 4x4 costs little, and makes more shapes right. 28 is not divisible by 8.
        28: _net(_TINY, [1, 2, 8], [1, 1], base_channels=16, num_transformer_blocks=2),
        32: _net(_TINY, [1, 2, 4, 8], [1, 1, 1], base_channels=16),
        64: _net(_TINY, [1, 2, 4], [2, 2], patching="dwt_1"),
        128: _net(_TINY, [1, 2, 4, 8], [1, 2, 2], patching="dwt_1", base_channels=16),
        256: _net(_TINY, [1, 1, 2, 4, 8], [1, 1, 2, 2], patching="dwt_1", base_channels=16),
        512: _net(_TINY, [1, 1, 1, 2, 4, 8], [1, 1, 1, 2, 2], patching="dwt_1", base_channels=16),
    },
    # Ours: meant for a GPU with 24 GB.
    "small": {
        32: _net(_SMALL, [1, 4], [3]),
        64: _net(_SMALL, [1, 2, 4], [3, 3]),
        128: _net(_SMALL, [1, 2, 4], [3, 3], patching="dwt_1"),
        256: _net(_SMALL, [1, 2, 4], [3, 3], patching="dwt_2"),
        512: _net(_SMALL, [1, 1, 2, 4], [1, 3, 3], patching="dwt_2"),
    },
    # Ours, after the family with published parameter counts that uvit.py reproduces.
    "base": {
        32: _net(_BASE, [1, 2], [3], base_channels=512, attn_resolutions=[]),
        64: _net(_BASE, [1, 2, 4], [3, 3], base_channels=256),
        128: _net(_BASE, [1, 2, 4, 8], [3, 3, 3]),
        256: _net(_BASE, [1, 2, 4, 8], [3, 3, 3], patching="dwt_1"),
        512: _net(_BASE, [1, 2, 4, 8], [3, 3, 3], patching="dwt_2"),
    },
    # Published: U-ViT L. The other arguments are the defaults of the class. Recomputing activations
    # (checkpoint_resolutions) is ours: it saves memory and changes no result.
    "paper": {
        128: dict(patching="none"),
        256: dict(patching="dwt_1"),
        512: dict(patching="dwt_2", checkpoint_resolutions=[16]),
    },
    # After the paper: the same with transformer blocks also at 32x32. It needs --captions.
    "text": {
        256: dict(patching="dwt_1", attn_resolutions=[32]),
        512: dict(patching="dwt_2", attn_resolutions=[32], checkpoint_resolutions=[32, 16]),
        "384x640": dict(patching="dwt_2", attn_resolutions=[24], checkpoint_resolutions=[24, 12]),
    },
}

_UNET = {
    # Ours, for the same purposes as those of U-ViT.
    "tiny": {
        32: _net(_TINY_UNET, [1, 3], [2, 3], patching="dwt_1"),
        64: _net(_TINY_UNET, [1, 2, 3], [1, 2, 2], patching="dwt_1"),
        128: _net(_TINY_UNET, [1, 2, 4, 6], [1, 1, 2, 2], patching="dwt_1", base_channels=16),
        256: _net(_TINY_UNET, [1, 1, 2, 4, 6], [1, 1, 1, 2, 2], patching="dwt_1", base_channels=16),
        512: _net(
            _TINY_UNET, [1, 1, 1, 2, 4, 6], [1, 1, 1, 1, 2, 2], patching="dwt_1", base_channels=16
        ),
    },
    "small": {
        32: _net(_SMALL_UNET, [2, 4, 8], [3, 4, 2]),
        64: _net(_SMALL_UNET, [1, 2, 4, 8], [2, 3, 4, 2]),
        128: _net(_SMALL_UNET, [1, 2, 4, 8], [2, 3, 4, 2], patching="dwt_1"),
        256: _net(_SMALL_UNET, [1, 2, 4, 8], [2, 3, 4, 2], patching="dwt_2"),
        512: _net(_SMALL_UNET, [1, 1, 2, 4, 8], [1, 2, 3, 4, 2], patching="dwt_2"),
    },
    "base": {
        32: _net(_BASE_UNET, [4, 8, 8], [4, 6, 4]),
        64: _net(_BASE_UNET, [2, 4, 8, 8], [3, 4, 6, 4]),
        128: _net(_BASE_UNET, [1, 2, 4, 8, 8], [3, 4, 4, 6, 4]),
        256: _net(_BASE_UNET, [1, 2, 4, 8, 8], [3, 4, 4, 6, 4], patching="dwt_1"),
        512: _net(_BASE_UNET, [2, 3, 4, 8, 8], [3, 3, 4, 6, 4], patching="dwt_2"),
    },
    # Published.
    "paper": {
        128: _net({}, [1, 2, 4, 8, 8], [3, 4, 4, 12, 4]),
        256: _net({}, [1, 1, 2, 4, 8, 8], [1, 2, 2, 4, 12, 4]),
        512: _net({}, [2, 3, 4, 8, 8], [3, 3, 4, 12, 4], patching="dwt_2"),
    },
}

RECIPES = {"uvit": _UVIT, "unet": _UNET}

# ---------------------------------------------------------------- training
# TRAINING[model, size]; TRAINING[model, size, res] overrides it. "micro" is ours everywhere: the
# micro-batch size per rank, estimated from counted memory; not yet run on a GPU.

# The published U-ViT compares in v space, the text of the paper in eps space. Ours use v space:
# short runs in eps space sample badly. The decay of the learning rate at the end is ours.
_COMMON = dict(space="v", decay=0.0, beta2=0.99, ema=0.9999, multiscale=False)

# Ours: minutes on two CPU cores.
_TINY_RUN = dict(_COMMON, batch=64, steps=4000, lr=2e-3, warmup=200, decay=0.33, ema=0.998)
# Four grids. All but the last are drawn in fewer sampling steps: a glance, not a result.
_TINY_RUN |= dict(sample_every=1000, save_every=1000, sampling=dict(early_steps=16))

# Ours: a GPU with 24 GB.
_SMALL_RUN = dict(_COMMON, batch=256, steps=200_000, lr=2e-4, warmup=1000, ema=0.9995, micro=32)

# Published for "paper" and "text": 10,000 steps of warmup, then a constant learning rate.
_LONG_RUN = dict(_COMMON, warmup=10_000)

TRAINING = {
    # Ours.
    ("uvit", "tiny"): dict(_TINY_RUN),
    # A newcomer's first run: minutes for 41,600 images. Small batches make the most of few images.
    ("uvit", "tiny", 32): dict(batch=16, steps=2600, sample_every=650, save_every=650),
    ("uvit", "tiny", 28): dict(batch=16, steps=2800, sample_every=700, save_every=700),
    ("unet", "tiny"): dict(_TINY_RUN),
    ("uvit", "small"): dict(_SMALL_RUN),
    ("unet", "small"): dict(_SMALL_RUN),
    ("uvit", "base"): dict(_LONG_RUN, batch=1024, steps=500_000, lr=1e-4, micro=32),
    ("unet", "base"): dict(_LONG_RUN, batch=512, steps=1_000_000, lr=1e-4, micro=32),
    # Published.
    ("uvit", "paper"): dict(_LONG_RUN, batch=2048, steps=500_000, lr=1e-4, micro=16),
    ("uvit", "paper", 512): dict(multiscale=True, micro=32),
    ("uvit", "text"): dict(_LONG_RUN, batch=2048, steps=700_000, lr=1e-4, micro=16)
    | dict(multiscale=True, schedule="interpolated:32:256"),
    ("unet", "paper"): dict(_LONG_RUN, batch=512, steps=2_000_000, lr=5e-5, space="eps", micro=16),
    ("unet", "paper", 128): dict(steps=1_500_000, beta2=0.999),
    ("unet", "paper", 512): dict(multiscale=True),
}

# ---------------------------------------------------------------- other resolutions
# A derived recipe has the widths, blocks and training of a row. The paper puts most of a network
# near 16x16. So the lowest feature maps, 8x8 or 16x16 in most rows, keep about that size.
# "paper" and "text" are not derived: their names stand for what the paper says.

DERIVED = ("tiny", "small", "base")

# At 1024 px the paper uses the multiscale loss. Activations take more memory than at 512 px.
TRAINING |= {
    (model, size, 1024): dict(multiscale=True, micro=16) for model in RECIPES for size in DERIVED
}


def rows_for_images(model, size):
    """The rows of a size in DERIVED, and one for 1024 px."""
    rows = RECIPES[model][size]
    # An extrapolation. Without patching, the published U-Nets grow from 128 to 512 px by levels of
    # the first width with one block. One more such level turns 512 into 1024 px.
    widths, blocks = rows[512]["channel_multiplier"], rows[512]["num_res_blocks"]
    return rows | {1024: _net(rows[512], [widths[0], *widths], [1, *blocks])}


def total_stride(fields):
    """The factor from the lowest feature maps to the image."""
    return PATCHING[fields.get("patching", "none")] * 2 ** (len(fields["channel_multiplier"]) - 1)


def find_row(rows, side):
    """The resolution of the row for images of this shorter side; None if they are out of range.

    Without a row of its own: the largest that is at most a third larger than the image, and whose
    lowest feature maps become 7 to 24 pixels.
    """
    if side in rows:
        return side
    fitting = [
        res
        for res, fields in rows.items()
        if 3 * res <= 4 * side and 7 <= side // total_stride(fields) <= 24
    ]
    return max(fitting, default=None)


def fits(rows, height, width):
    """True if there is a row, and its levels divide both sides."""
    row = find_row(rows, min(height, width))
    return row is not None and not any(side % total_stride(rows[row]) for side in (height, width))


def nearest_sizes(rows, height, width):
    """Two sizes near (height, width) that fit, as text: "28 and 32" for 30, 30."""
    short, long = sorted((height, width))
    largest = 24 * total_stride(rows[1024])
    sides = [side for side in range(1, largest + 1) if fits(rows, side, side)]
    sides = sorted(sorted(sides, key=lambda side: abs(side - short))[:2])
    if height == width:
        return " and ".join(map(str, sides))
    names = []
    for side in sides:
        stride = total_stride(rows[find_row(rows, side)])
        longer = max(side, (long + stride // 2) // stride * stride)
        names.append(f"{side}x{longer}" if height == short else f"{longer}x{side}")
    return " and ".join(names)


def derive(model, size, height, width, network, own_levels=False):
    """The recipe of a size in DERIVED for (height, width): (resolution of the row, arguments).

    network: the class of the network. own_levels: other arguments will replace the levels, so they
    need not divide the sides. Raises ValueError, naming the nearest sizes that fit.
    """
    rows, side = rows_for_images(model, size), min(height, width)
    row = find_row(rows, side)
    if row is None or not (own_levels or fits(rows, height, width)):
        res = height if height == width else f"{height}x{width}"
        raise ValueError(
            f"--model {model} --size {size} does not fit --res {res}: the nearest sizes that fit "
            f"are {nearest_sizes(rows, height, width)}"
        )
    if row == side:
        return row, rows[row]
    fields = {name: field.default for name, field in inspect.signature(network).parameters.items()}
    return row, rows[row] | scaled_sizes(fields | rows[row], side, row)


def scaled_sizes(fields, side, old_side):
    """The three arguments that name sizes of feature maps, for an image of another shorter side.

    fields: arguments of a network; it may lack some. At 96 px, the 32x32 maps of a network for 128
    px are 24x24.
    """
    scaled = {}
    for name in ("dropout_from_resolution", "attn_resolutions", "checkpoint_resolutions"):
        if isinstance(value := fields.get(name), int):
            scaled[name] = value * side // old_side
        elif value is not None:
            scaled[name] = [size * side // old_side for size in value]
    return scaled


def derived_from(model, size, side):
    """A line that says from which row a recipe is derived; "" if it is a row of RECIPES."""
    if model not in RECIPES or size not in DERIVED or side in RECIPES[model][size]:
        return ""
    row = find_row(rows_for_images(model, size), side)
    source = (
        "extrapolated from that for 512 px" if row == 1024 else f"derived from that for {row} px"
    )
    return f"--size {size} has no recipe for {side} px: {source}"
