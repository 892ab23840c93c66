"""The U-Net of simple diffusion (Fig. 7-8, appendix) and the blocks that it shares with the U-ViT.

From top to bottom: the 5/3 wavelet, the embedding, ResBlock, attention, down- and upsampling, stem
and head (input down-sampling, "patching"), the U-Net, and its published configurations.

    python unet.py    # a table of them: U-Net 128 has 979.4 M parameters and 289.0 GMAC per image

A net is one call: v_hat = net(z, logsnr, label). z: (B, C, H, W); logsnr: (B,); label: (B,) int64,
or None for the null label, which is class number num_classes. Returns v_hat, shaped like z.

The weights are float32. For bfloat16, call the net under torch.autocast, and on a GPU convert it
with net.to(memory_format=torch.channels_last). For float64, call net.double(). [S] marks details
from later papers and public code of the authors.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- the 5/3 wavelet (dwt_1, dwt_2)


def _lift(x):
    """One wavelet step along the last axis: (..., 2N) -> smooth (..., N), detail (..., N)."""
    even, odd = x[..., 0::2], x[..., 1::2]

    # Predict: d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2. The signal is mirrored at its ends.
    next_even = torch.cat([even[..., 1:], even[..., -1:]], -1)
    detail = odd - (even + next_even) / 2

    # Update: s[n] = x[2n] + (d[n-1] + d[n]) / 4, which preserves the mean.
    previous_detail = torch.cat([detail[..., :1], detail[..., :-1]], -1)
    smooth = even + (previous_detail + detail) / 4
    return smooth, detail


def _unlift(smooth, detail):
    """The inverse of _lift: undo the update, undo the prediction, interleave."""
    # The update used only the details, so it can be recomputed and subtracted.
    previous_detail = torch.cat([detail[..., :1], detail[..., :-1]], -1)
    even = smooth - (previous_detail + detail) / 4
    # Then the even values are known, and so is the prediction of the odd ones.
    next_even = torch.cat([even[..., 1:], even[..., -1:]], -1)
    odd = detail + (even + next_even) / 2
    return torch.stack([even, odd], -1).flatten(-2)


def dwt53(x, levels=1):
    """The linear 5/3 wavelet transform of rows and columns: invertible down-sampling.

    x: (B, C, H, W). Returns (B, 4^levels C, H / 2^levels, W / 2^levels): the smooth image, then the
    details from coarse to fine. Raises ValueError for sides that are not divisible by 2^levels.
    """
    if x.shape[-2] % 2**levels or x.shape[-1] % 2**levels:
        raise ValueError(
            f"a wavelet of {levels} levels needs sides divisible by {2**levels}, "
            f"not {tuple(x.shape[-2:])}"
        )
    if levels == 0:
        return x
    # Transform the width, then the height (.mT swaps the two). This gives four bands. In their
    # names, s means smooth and d detail, for the width first.
    smooth, detail = _lift(x)  # (B, C, H, W / 2) each
    ss, sd = _lift(smooth.mT)  # (B, C, W / 2, H / 2) each
    ds, dd = _lift(detail.mT)
    # The smooth band is transformed again. Space-to-depth brings the other bands to its size.
    details = torch.cat([sd.mT, ds.mT, dd.mT], 1)  # (B, 3 C, H / 2, W / 2)
    details = F.pixel_unshuffle(details, 2 ** (levels - 1))
    return torch.cat([dwt53(ss.mT, levels - 1), details], 1)


def idwt53(y, levels=1):
    """The inverse of dwt53. y: (B, 4^levels C, h, w). Returns (B, C, 2^levels h, 2^levels w)."""
    if levels == 0:
        return y
    # The first quarter of the channels is the transformed smooth band, the rest are the details.
    quarter = y.shape[1] // 4
    coarse, details = y.split([quarter, y.shape[1] - quarter], 1)
    sd, ds, dd = F.pixel_shuffle(details, 2 ** (levels - 1)).mT.chunk(3, 1)
    # Undo the height, then the width.
    smooth = _unlift(idwt53(coarse, levels - 1).mT, sd)
    detail = _unlift(ds, dd)
    return _unlift(smooth.mT, detail.mT)


# ---------------------------------------------------------------- blocks


def at_least_float32(x):
    """Convert bfloat16 to float32. float32 and float64 are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_init(layer):
    """Set the weight and bias of a layer to zero, and return the layer."""
    # The last layer of each residual branch and of the net starts at zero. At initialization every
    # block is then the identity, and v_hat is 0.
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm_float32(x, groups, weight, bias, eps):
    """GroupNorm that computes in float32, or in float64 for float64. Returns a tensor like x."""
    h = F.group_norm(at_least_float32(x), groups, weight, bias, eps)
    # The next operations are twice as fast in bfloat16.
    return h.to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups, or groups of 4 channels below 128 channels."""

    def __init__(self, channels):
        super().__init__(min(32, max(1, channels // 4)), channels)

    def forward(self, x):
        # The sums over a group need float32. The kernel for CPUs uses it internally.
        if x.is_cpu:
            return super().forward(x).to(x.dtype)
        return group_norm_float32(x, self.num_groups, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Embed logsnr and label as one vector, (B, emb_channels), the input of every FiLM layer."""

    def __init__(self, num_classes, emb_channels):
        super().__init__()
        self.num_classes = num_classes
        self.dense1 = nn.Linear(256, emb_channels)
        self.dense2 = nn.Linear(emb_channels, emb_channels)
        self.label = nn.Embedding(num_classes + 1, emb_channels)  # the last row is the null label

    def forward(self, logsnr, label=None, extra=0.0):
        """logsnr: (B,). label: (B,) or None. extra: (B, emb_channels), an embedding to add."""
        # Without labels, all images have the null label: the unconditional net of guidance.
        if label is None:
            label = torch.full(logsnr.shape, self.num_classes, device=logsnr.device)

        # The logsnr is rescaled linearly [S]. The net does not know the schedule, so the limits are
        # fixed: [-20, 20] maps to [0, 1000]. Shifted schedules go down to -22, slightly outside.
        # u is not clamped. It is as precise as the weights: float64 after net.double().
        logsnr = logsnr.to(torch.promote_types(self.dense1.weight.dtype, torch.float32))
        u = 1000.0 * (logsnr[:, None] + 20.0) / 40.0  # (B, 1)

        # 256 sinusoidal features, then Dense, SiLU, Dense.
        frequencies = torch.exp(
            torch.arange(128, dtype=u.dtype, device=u.device) * (-math.log(10000.0) / 127)
        )
        angles = u * frequencies  # (B, 128)
        h = self.dense1(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.dense2(F.silu(h))

        # Add the label embedding. The SiLU at the end is our choice, after ADM (arXiv 2105.05233).
        return F.silu(h + self.label(label) + extra)  # (B, emb_channels)


class ResBlock(nn.Module):
    """The residual block of Fig. 7-8 [S]. x, skip: (B, C, H, W). emb: (B, emb_channels)."""

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.norm_skip = GroupNorm(channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels)
        self.film = nn.Linear(emb_channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, emb, skip=None):
        # A skip connection is normalized and added, not concatenated [S]. Division by sqrt(2) keeps
        # the variance at 1 if the two are uncorrelated.
        h = self.norm1(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)
        h = self.conv1(F.silu(h))

        # FiLM: noise level and label scale and shift each channel.
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift

        # The residual branch ends in a zero-initialized convolution.
        return x + self.conv2(self.dropout(F.silu(h)))


def attend(q, k, v, mask=None):
    """Softmax attention. q: (B, heads, T, dim); k, v: (B, heads, N, dim). Returns a tensor like q.

    mask: (B, N) bool, True for the keys that take part, or None for all.
    """
    if mask is not None:
        mask = mask[:, None, None]  # (B, 1, 1, N)
    # On a GPU, PyTorch chooses the kernel. docs/performance.md says which one heads of 512 get.
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, mask)
    # On a CPU in bfloat16, the fused kernel takes 1.5 to 6 times as long as matrix products.
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, heads, T, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1).to(v.dtype) @ v


class Attention(nn.Module):
    """The self-attention block [S], over tokens x (B, T, C). It has no FiLM layer."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided into {num_heads} heads")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = nn.LayerNorm(channels // num_heads)
        self.norm_k = nn.LayerNorm(channels // num_heads)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        # One projection computes the queries, keys and values of all heads.
        h = self.qkv(self.norm(x))  # (B, T, 3 C)
        q, k, v = h.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # (B, T, heads, dim) each

        # QK-norm: normalizing queries and keys over the head dimension bounds the attention logits.
        q = self.norm_q(q).transpose(1, 2)  # (B, heads, T, dim)
        k = self.norm_k(k).transpose(1, 2)
        h = attend(q, k, v.transpose(1, 2))
        return x + self.out(h.transpose(1, 2).flatten(2))  # (B, T, C)


def run_block(block, *args):
    """Call block(*args). If block.recompute is set, recompute its activations in backward()."""
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def to_tokens(x):
    """(B, C, H, W) -> (B, H W, C), a view if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x, like):
    """(B, H W, C) -> (B, C, H, W), with the height and width of like."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])


class Down(nn.Sequential):
    """2x2 average pooling, then a 1x1 projection to the channels of the next level [S]."""

    def __init__(self, channels, next_channels):
        super().__init__(nn.AvgPool2d(2), nn.Conv2d(channels, next_channels, 1))


class Up(nn.Conv2d):
    """A 1x1 projection to the channels of the level above, then nearest-neighbor x2 [S]."""

    def __init__(self, channels, next_channels):
        super().__init__(channels, next_channels, 1)

    def forward(self, x):
        x = super().forward(x)
        # Expanding repeats each pixel 2x2 times, and its gradient is a plain sum. torch.compile
        # turns the gradient of nn.Upsample into slow scattered additions.
        b, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


# ---------------------------------------------------------------- stem and head ("patching")

# The factor by which each input down-sampling reduces the image, and the levels of its wavelet.
PATCHING = {"none": 1, "dwt_1": 2, "dwt_2": 4, "conv_2": 2, "conv_4": 4}
WAVELET_LEVELS = {"dwt_1": 1, "dwt_2": 2}


class Stem(nn.Module):
    """The input layer: down-sample the image and project it to the channels of the first level."""

    def __init__(self, channels, patching, in_channels):
        super().__init__()
        factor = PATCHING[patching]
        self.levels = WAVELET_LEVELS.get(patching, 0)
        # conv_d is one d x d convolution with stride d. Otherwise a 3x3 convolution follows the
        # wavelet, or the image itself.
        if patching.startswith("conv"):
            self.conv = nn.Conv2d(in_channels, channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(in_channels * 4**self.levels, channels, 3, padding=1)

    def forward(self, z):
        # With 0 levels the wavelet returns z.
        return self.conv(dwt53(z, self.levels))


class Head(nn.Module):
    """The output layer: Norm, SiLU, a zero-initialized convolution, and upsampling to pixels."""

    def __init__(self, channels, patching, in_channels):
        super().__init__()
        factor = PATCHING[patching]
        self.levels = WAVELET_LEVELS.get(patching, 0)
        self.norm = GroupNorm(channels)
        # A transposed convolution returns to pixels after conv_d, the inverse wavelet after dwt_n.
        if patching.startswith("conv"):
            conv = nn.ConvTranspose2d(channels, in_channels, factor, stride=factor)
        else:
            conv = nn.Conv2d(channels, in_channels * 4**self.levels, 3, padding=1)
        self.conv = zero_init(conv)

    def forward(self, h):
        h = self.conv(F.silu(self.norm(h)))
        # The inverse wavelet runs in float32: bfloat16 would round at every lifting step.
        return idwt53(at_least_float32(h), self.levels)


def grid_sizes(res, patching, levels):
    """Return the (height, width) of the feature maps of each level.

    res: side of the image in pixels, or (height, width). Raises ValueError if the sides are not
    divisible by the total stride or patching is unknown.
    """
    if patching not in PATCHING:
        raise ValueError(f"patching {patching!r} is none of {', '.join(PATCHING)}")
    height, width = (res, res) if isinstance(res, int) else res
    # The stem reduces the image by the patching factor, and each further level halves it.
    factor = PATCHING[patching]
    stride = factor * 2 ** (levels - 1)
    if height % stride or width % stride:
        raise ValueError(
            f"a net of {levels} levels with patching {patching} needs sides divisible by {stride}, "
            f"not {height}x{width}"
        )
    return [(height // factor >> level, width // factor >> level) for level in range(levels)]


# ---------------------------------------------------------------- the U-Net


class UNetBlock(nn.Module):
    """A ResBlock, followed by self-attention at low resolutions. x, skip: (B, C, H, W)."""

    def __init__(self, channels, emb_channels, num_heads, dropout, attention, skip=False):
        super().__init__()
        self.res = ResBlock(channels, emb_channels, dropout, skip)
        self.attention = Attention(channels, num_heads) if attention else None

    def forward(self, x, emb, skip=None):
        h = self.res(x, emb, skip)
        if self.attention is None:
            return h
        # Every pixel of the feature map is one token.
        return to_grid(self.attention(to_tokens(h)), like=h)


class UNet(nn.Module):
    """The U-Net of Fig. 7-8: n blocks down and n + 1 blocks up on each level, with skips.

    res: side of the image in pixels, or (height, width). num_classes: number of classes, without
    the null label. channel_multiplier, num_res_blocks: one number per level. Three options name
    feature map sizes (the shorter side): blocks of attn_resolutions have self-attention, blocks of
    size dropout_from_resolution or smaller have dropout, and blocks of checkpoint_resolutions
    recompute their activations, which saves memory and costs time. Raises ValueError for sizes and
    lists that do not match.
    """

    def __init__(
        self,
        res,
        num_classes=1000,
        base_channels=128,
        emb_channels=1024,
        channel_multiplier=(1, 2, 4, 8, 8),
        num_res_blocks=(3, 4, 4, 12, 4),
        num_heads=4,
        dropout=0.1,
        dropout_from_resolution=16,
        patching="none",
        attn_resolutions=(16, 8),
        checkpoint_resolutions=(),
        in_channels=3,
    ):
        super().__init__()
        if len(channel_multiplier) != len(num_res_blocks):
            raise ValueError(
                f"channel_multiplier {channel_multiplier} and num_res_blocks {num_res_blocks} "
                "must have the same length"
            )
        channels = [base_channels * multiplier for multiplier in channel_multiplier]
        sizes = [min(size) for size in grid_sizes(res, patching, len(channels))]
        self.num_classes = num_classes

        def make_block(level, attention, skip=False):
            # The published networks have dropout at 16x16 and below only.
            p = dropout if sizes[level] <= dropout_from_resolution else 0.0
            block = UNetBlock(channels[level], emb_channels, num_heads, p, attention, skip)
            block.recompute = sizes[level] in checkpoint_resolutions
            return block

        def make_level(level, n, skip):
            attention = sizes[level] in attn_resolutions
            return nn.ModuleList(make_block(level, attention, skip) for _ in range(n))

        levels = range(len(channels))
        self.embedding = Embedding(num_classes, emb_channels)
        self.stem = Stem(channels[0], patching, in_channels)
        # The input of a level and the outputs of its n down blocks feed its n + 1 up blocks.
        self.down = nn.ModuleList(make_level(i, num_res_blocks[i], skip=False) for i in levels)
        self.downsample = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in levels[:-1])
        # In the middle: ResBlock, self-attention, ResBlock.
        self.middle = nn.ModuleList([make_block(-1, True), make_block(-1, False)])
        self.up = nn.ModuleList(make_level(i, num_res_blocks[i] + 1, skip=True) for i in levels)
        self.upsample = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in levels[:-1])
        self.head = Head(channels[0], patching, in_channels)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W); logsnr: (B,); label: (B,) or None. Returns v_hat like z."""
        emb = self.embedding(logsnr, label)  # (B, emb_channels)
        h = self.stem(z)  # (B, C_0, H_0, W_0)

        # Down: every level below the first starts by pooling, (B, C_i, H_0 / 2^i, W_0 / 2^i).
        skips = []
        for i, level in enumerate(self.down):
            if i > 0:
                h = self.downsample[i - 1](h)
            skips.append(h)
            for block in level:
                h = run_block(block, h, emb)
                skips.append(h)

        # Middle: two blocks at the lowest resolution, without skips.
        for block in self.middle:
            h = run_block(block, h, emb)

        # Up: the same levels in reverse order. Each block takes one skip, the last one first.
        for i, level in reversed(list(enumerate(self.up))):
            for block in level:
                h = run_block(block, h, emb, skips.pop())
            if i > 0:
                h = self.upsample[i - 1](h)
        return self.head(h)


# The published configurations (appendix). The paper's results at 512 px use dwt_2. The others at
# 512 px are from its ablation of input down-sampling.
_HALVED = dict(channel_multiplier=(1, 2, 2, 4, 8, 8), num_res_blocks=(2, 2, 2, 4, 12, 4))
CONFIGS = {
    "U-Net 128": dict(res=128, channel_multiplier=(1, 2, 4, 8, 8), num_res_blocks=(3, 4, 4, 12, 4)),
    "U-Net 256": dict(
        res=256, channel_multiplier=(1, 1, 2, 4, 8, 8), num_res_blocks=(1, 2, 2, 4, 12, 4)
    ),
    "U-Net 512 none": dict(
        res=512, channel_multiplier=(1, 1, 1, 2, 4, 8, 8), num_res_blocks=(1, 1, 2, 2, 4, 12, 4)
    ),
    "U-Net 512 dwt_1": dict(_HALVED, res=512, patching="dwt_1"),
    "U-Net 512 conv_2": dict(_HALVED, res=512, patching="conv_2"),
    "U-Net 512 dwt_2": dict(
        res=512,
        patching="dwt_2",
        channel_multiplier=(2, 3, 4, 8, 8),
        num_res_blocks=(3, 3, 4, 12, 4),
    ),
}


# ---------------------------------------------------------------- the command: sizes and costs


def count(net_class, config):
    """Return the parameters, multiply-accumulates and activation bytes of a configuration.

    The last two are per image, for one forward pass and for the activations that a training step
    keeps in float32.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device nothing is computed or stored. FlopCounterMode also counts attention there,
    # which it misses on a CPU.
    with torch.device("meta"):
        net = net_class(**config)
        res = config["res"]
        size = (res, res) if isinstance(res, int) else res
        z = torch.empty(1, config.get("in_channels", 3), *size)
        logsnr = torch.empty(1)

        # Autograd calls this hook for each tensor that it keeps for backward().
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as flops, hooks:
            net(z, logsnr)

    # Autograd also keeps weights. These are not activations.
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    activations = sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return parameters, flops.get_total_flops() / 2, activations


def print_table(net_class, configs):
    """Print one line per configuration."""
    print(
        f"{'configuration':20s}{'parameters':>12s}{'GMAC/image':>14s}"
        f"{'state GiB':>11s}{'activations GiB/image':>25s}"
    )
    for name, config in configs.items():
        parameters, macs, activations = count(net_class, config)
        # The training state takes 20 bytes per parameter, five float32 numbers: weight, gradient,
        # the two moments of Adam, and EMA weight.
        state = 20 * parameters
        print(
            f"{name:20s}{parameters / 1e6:10.2f} M{macs / 1e9:14.1f}"
            f"{state / 2**30:11.1f}{activations / 2**30:25.2f}"
        )


if __name__ == "__main__":
    print_table(UNet, CONFIGS)
