"""The U-Net of simple diffusion (Fig. 7 and 8, appendix) and the building blocks that it shares with the U-ViT.

From top to bottom: the 5/3 wavelet, the embedding of logsnr and label, ResBlock, attention, the stem and the head with
their input down-sampling ("patching"), and the U-Net. Its published configurations are CONFIGS.

    python unet.py          # their table: U-Net 128 has 979.4 M parameters and 289.0 GMAC per picture

A net is one call: v_hat = net(z, logsnr, label), with z (B, 3, H, W), logsnr (B,) and label (B,) int64 or None, which is the
null label, num_classes. Weights stay float32; for bfloat16 put the call under torch.autocast, as sample.in_bf16 does, and on
a GPU the weights in channels_last, net.to(memory_format=torch.channels_last), as sample.build_net does.
What the paper leaves open is taken from its authors' later papers [S], or is a choice of ours, said where it is made.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- the 5/3 wavelet (input down-sampling dwt_1 and dwt_2)


def _lift(x):
    """Along the last axis, mirrored at the ends: d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2, s[n] = x[2n] + (d[n-1] + d[n]) / 4."""
    even, odd = x[..., 0::2], x[..., 1::2]
    d = odd - (even + torch.cat([even[..., 1:], even[..., -1:]], -1)) / 2
    return even + (torch.cat([d[..., :1], d[..., :-1]], -1) + d) / 4, d


def _unlift(s, d):
    """The inverse of _lift: its two steps undone in reverse order."""
    even = s - (torch.cat([d[..., :1], d[..., :-1]], -1) + d) / 4
    odd = d + (even + torch.cat([even[..., 1:], even[..., -1:]], -1)) / 2
    return torch.stack([even, odd], -1).flatten(-2)


def dwt53(x, levels=1):
    """The linear 5/3 wavelet by lifting, rows and columns, as an invertible way to a coarser grid.

    x: (B, C, H, W). Returns (B, C * 4^levels, H / 2^levels, W / 2^levels): first the smooth picture, then its details from
    coarse to fine, the finer ones rearranged from space to depth. Raises ValueError for sides that do not divide.
    """
    if x.shape[-2] % 2**levels or x.shape[-1] % 2**levels:
        raise ValueError(
            f"a wavelet of {levels} levels takes sides divisible by {2**levels}, not {tuple(x.shape[-2:])}"
        )
    if levels == 0:
        return x
    smooth, detail = _lift(x)
    (ss, sd), (ds, dd) = _lift(smooth.mT), _lift(detail.mT)
    fine = F.pixel_unshuffle(torch.cat([sd.mT, ds.mT, dd.mT], 1), 2 ** (levels - 1))
    return torch.cat(
        [dwt53(ss.mT, levels - 1), fine], 1
    )  # (B, 4^levels C, H / 2^levels, W / 2^levels)


def idwt53(y, levels=1):
    """The inverse of dwt53. y: (B, C * 4^levels, h, w). Returns (B, C, h * 2^levels, w * 2^levels)."""
    if levels == 0:
        return y
    coarse, fine = y.split([y.shape[1] // 4, y.shape[1] - y.shape[1] // 4], 1)
    sd, ds, dd = F.pixel_shuffle(fine, 2 ** (levels - 1)).mT.chunk(3, 1)
    smooth, detail = _unlift(idwt53(coarse, levels - 1).mT, sd), _unlift(ds, dd)
    return _unlift(smooth.mT, detail.mT)


# ---------------------------------------------------------------- blocks


def zero_init(layer):
    """Every residual branch, and the net, ends in such a layer: at first a block is the identity and v_hat is 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """GroupNorm-32, with fewer groups below 128 channels: a group of one channel could not tell how strong it is."""

    def __init__(self, channels):
        super().__init__(min(32, max(1, channels // 4)), channels)

    def forward(
        self, x
    ):  # its sums need float32, which the CPU's kernel uses inside; what follows in bf16 takes half the time
        return super().forward(x if x.is_cpu else x.float()).to(x.dtype)


class Embedding(nn.Module):
    """logsnr and label -> (B, emb_channels), the input of every FiLM.

    A net has no schedule and shifts reach logsnr -22, so logsnr is rescaled by fixed limits, linearly and unclamped:
    u = (logsnr + 20) / 40. Then 1000 u -> 256 sinusoids -> Dense -> SiLU -> Dense, + label, and a SiLU (our choice, ADM's).
    text: (B, emb_channels), to be added, too.
    """

    def __init__(self, num_classes, emb_channels):
        super().__init__()
        self.num_classes = num_classes
        self.dense1 = nn.Linear(256, emb_channels)
        self.dense2 = nn.Linear(emb_channels, emb_channels)
        self.label = nn.Embedding(num_classes + 1, emb_channels)  # the last row is the null label

    def forward(self, logsnr, label=None, text=0.0):
        if label is None:
            label = torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
        frequencies = torch.exp(
            torch.arange(128, device=logsnr.device) * (-math.log(10000.0) / 127)
        )
        angles = 1000.0 * (logsnr.float()[:, None] + 20.0) / 40.0 * frequencies  # (B, 128)
        h = self.dense1(torch.cat([angles.sin(), angles.cos()], 1))
        return F.silu(self.dense2(F.silu(h)) + self.label(label) + text)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 conv, Norm, FiLM, SiLU, dropout, 3x3 conv; a skip is normalized and *added*, not concatenated [S].

    text: not looked at here; the U-ViT calls all its blocks alike.
    """

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.norm_skip = GroupNorm(channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels)
        self.film = nn.Linear(emb_channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, emb, skip=None, text=None):
        h = self.norm1(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)
        h = self.conv1(F.silu(h))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return x + self.conv2(self.dropout(h))


def attend(q, k, v, mask=None):
    """Softmax attention of queries over keys and their values, (B, heads, T, dim) each; mask: (B, T), where the keys count."""
    mask = None if mask is None else mask[:, None, None]
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = (
        q @ k.mT / math.sqrt(q.shape[-1])
    )  # in bf16 the fused kernel takes 1.5 to 6 times as long there as plain products
    return (
        torch.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf), -1).to(
            v.dtype
        )
        @ v
    )


class Attention(nn.Module):
    """Self-attention over tokens (B, T, C), queries and keys normalized over the head's dimension; no FiLM in it [S]."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = nn.LayerNorm(channels // num_heads)
        self.norm_k = nn.LayerNorm(channels // num_heads)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        q, k, v = (
            self.qkv(self.norm(x)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        )  # (B, T, heads, dim) each
        q, k, v = (
            self.norm_q(q).transpose(1, 2),
            self.norm_k(k).transpose(1, 2),
            v.transpose(1, 2),
        )  # (B, heads, T, dim)
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, T, C)


def run_block(block, *args):
    """block(*args); where block.recompute says so its activations are not kept but computed again for the gradient."""
    return (
        checkpoint(block, *args, use_reentrant=False)
        if block.recompute and torch.is_grad_enabled()
        else block(*args)
    )


def to_tokens(x):
    """(B, C, H, W) -> (B, H * W, C), without a copy when x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x, like):
    """(B, H * W, C) -> (B, C, H, W), with the height and width of like."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])


class Down(nn.Sequential):
    """2x2 average pooling, then a 1x1 projection to the next level's channels [S]."""

    def __init__(self, channels, next_channels):
        super().__init__(nn.AvgPool2d(2), nn.Conv2d(channels, next_channels, 1))


class Up(nn.Conv2d):
    """A 1x1 projection to the upper level's channels, then nearest-neighbor x2 [S]."""

    def __init__(self, channels, next_channels):
        super().__init__(channels, next_channels, 1)

    def forward(self, x):
        b, c, h, w = (
            x := super().forward(x)
        ).shape  # torch.compile makes nn.Upsample's gradient scattered additions, this one's a sum
        return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


# ---------------------------------------------------------------- stem and head (input down-sampling)

PATCHING = {
    "none": 1,
    "dwt_1": 2,
    "dwt_2": 4,
    "conv_2": 2,
    "conv_4": 4,
}  # how much coarser the net's grid is
WAVELET_LEVELS = {"dwt_1": 1, "dwt_2": 2}


class Stem(nn.Module):
    """The picture on the net's grid: a wavelet, or nothing, and a 3x3 conv; or one d x d conv of stride d."""

    def __init__(self, channels, patching, in_channels):
        super().__init__()
        d, self.levels = PATCHING[patching], WAVELET_LEVELS.get(patching, 0)
        self.conv = (
            nn.Conv2d(in_channels, channels, d, stride=d)
            if patching.startswith("conv")
            else nn.Conv2d(in_channels * 4**self.levels, channels, 3, padding=1)
        )

    def forward(self, z):
        return self.conv(dwt53(z, self.levels))


class Head(nn.Module):
    """Norm, SiLU, a zero-initialized conv, and the way back to pixels: the stem's inverse or a transposed conv."""

    def __init__(self, channels, patching, in_channels):
        super().__init__()
        d, self.levels = PATCHING[patching], WAVELET_LEVELS.get(patching, 0)
        self.norm = GroupNorm(channels)
        self.conv = zero_init(
            nn.ConvTranspose2d(channels, in_channels, d, stride=d)
            if patching.startswith("conv")
            else nn.Conv2d(channels, in_channels * 4**self.levels, 3, padding=1)
        )

    def forward(self, h):
        return idwt53(
            self.conv(F.silu(self.norm(h))).float(), self.levels
        )  # float: bf16 would round at every lifting step


def grid_sizes(res, patching, levels):
    """The (height, width) of each level's feature maps. res: side in pixels, or (height, width). Raises ValueError."""
    if patching not in PATCHING:
        raise ValueError(f"patching {patching!r} is none of {', '.join(PATCHING)}")
    height, width = (res, res) if isinstance(res, int) else res
    stride = PATCHING[patching] * 2 ** (levels - 1)
    if height % stride or width % stride:
        raise ValueError(
            f"a net of {levels} levels with patching {patching} takes sides divisible by {stride}, not {height}x{width}"
        )
    return [
        (height // PATCHING[patching] >> i, width // PATCHING[patching] >> i) for i in range(levels)
    ]


# ---------------------------------------------------------------- the U-Net


class UNetBlock(nn.Module):
    """A ResBlock, followed by self-attention where there is any. x, skip: (B, C, H, W)."""

    def __init__(self, channels, emb_channels, num_heads, dropout, attention, skip=False):
        super().__init__()
        self.res = ResBlock(channels, emb_channels, dropout, skip)
        self.attention = Attention(channels, num_heads) if attention else None

    def forward(self, x, emb, skip=None):
        h = self.res(x, emb, skip)
        return h if self.attention is None else to_grid(self.attention(to_tokens(h)), like=h)


class UNet(nn.Module):
    """The U-Net of Fig. 7 and 8: levels of n blocks down and n + 1 up, every one of them with a skip connection.

    res: side of the picture in pixels, or (height, width). channel_multiplier, num_res_blocks: a number per level.
    attn_resolutions: feature map sizes, the shorter side; self-attention follows the ResBlocks of these sizes. dropout acts
    in the ResBlocks of size dropout_from_resolution and below. The activations of blocks of sizes in checkpoint_resolutions
    are recomputed (see run_block): less memory, more time. Raises ValueError for sizes and lists that do not fit.
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
                f"channel_multiplier {channel_multiplier} and num_res_blocks {num_res_blocks} differ in length"
            )
        channels = [base_channels * m for m in channel_multiplier]
        sizes = [min(size) for size in grid_sizes(res, patching, len(channels))]
        self.num_classes = num_classes

        def block(level, attention, skip=False):
            p = dropout if sizes[level] <= dropout_from_resolution else 0.0
            one = UNetBlock(channels[level], emb_channels, num_heads, p, attention, skip)
            one.recompute = sizes[level] in checkpoint_resolutions
            return one

        def blocks(level, n, skip):
            return nn.ModuleList(
                block(level, sizes[level] in attn_resolutions, skip) for _ in range(n)
            )

        levels = range(len(channels))
        self.embedding = Embedding(num_classes, emb_channels)
        self.stem = Stem(channels[0], patching, in_channels)
        self.down = nn.ModuleList(blocks(i, num_res_blocks[i], skip=False) for i in levels)
        self.downsample = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in levels[:-1])
        self.middle = nn.ModuleList([block(-1, attention=True), block(-1, attention=False)])
        self.up = nn.ModuleList(blocks(i, num_res_blocks[i] + 1, skip=True) for i in levels)
        self.upsample = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in levels[:-1])
        self.head = Head(channels[0], patching, in_channels)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W), logsnr: (B,), label: (B,) int64 or None. Returns v_hat like z."""
        emb = self.embedding(logsnr, label)
        h, skips = self.stem(z), []
        for i, level in enumerate(self.down):
            h = self.downsample[i - 1](h) if i > 0 else h
            skips.append(h)
            for block in level:
                h = run_block(block, h, emb)
                skips.append(h)
        for block in self.middle:
            h = run_block(block, h, emb)
        for i, level in reversed(list(enumerate(self.up))):
            for block in level:
                h = run_block(block, h, emb, skips.pop())
            h = self.upsample[i - 1](h) if i > 0 else h
        return self.head(h)


CONFIGS = {  # as published; of those at 512 px only the last was kept, the others are from the ablations
    "U-Net 128": dict(res=128, channel_multiplier=(1, 2, 4, 8, 8), num_res_blocks=(3, 4, 4, 12, 4)),
    "U-Net 256": dict(
        res=256, channel_multiplier=(1, 1, 2, 4, 8, 8), num_res_blocks=(1, 2, 2, 4, 12, 4)
    ),
    "U-Net 512 none": dict(
        res=512, channel_multiplier=(1, 1, 1, 2, 4, 8, 8), num_res_blocks=(1, 1, 2, 2, 4, 12, 4)
    ),
    "U-Net 512 dwt_1": dict(
        res=512,
        patching="dwt_1",
        channel_multiplier=(1, 2, 2, 4, 8, 8),
        num_res_blocks=(2, 2, 2, 4, 12, 4),
    ),
    "U-Net 512 conv_2": dict(
        res=512,
        patching="conv_2",
        channel_multiplier=(1, 2, 2, 4, 8, 8),
        num_res_blocks=(2, 2, 2, 4, 12, 4),
    ),
    "U-Net 512 dwt_2": dict(
        res=512,
        patching="dwt_2",
        channel_multiplier=(2, 3, 4, 8, 8),
        num_res_blocks=(3, 3, 4, 12, 4),
    ),
}


def count(net_class, config):
    """Parameters, multiply-accumulates per picture, and bytes of float32 activations that a training step keeps per picture.

    Everything is built on the meta device, where FlopCounterMode sees attention too (on a CPU it misses it).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = net_class(**config)
        size = (config["res"],) * 2 if isinstance(config["res"], int) else config["res"]
        z, logsnr = torch.empty(1, config.get("in_channels", 3), *size), torch.empty(1)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with (
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            net(z, logsnr)
    activations = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    return sum(p.numel() for p in net.parameters()), flops.get_total_flops() / 2, activations


def print_table(net_class, configs):
    """A line per configuration. state: weights, gradients, Adam's two moments and EMA in float32, 20 bytes a parameter."""
    print(
        f"{'configuration':20s}{'parameters':>12s}{'GMAC/picture':>14s}{'state GiB':>11s}{'activations GiB/picture':>25s}"
    )
    for name, config in configs.items():
        parameters, macs, activations = count(net_class, config)
        print(
            f"{name:20s}{parameters / 1e6:10.2f} M{macs / 1e9:14.1f}{20 * parameters / 2**30:11.1f}{activations / 2**30:25.2f}"
        )


if __name__ == "__main__":
    print_table(UNet, CONFIGS)
