"""DiMR, a network of several resolutions (arXiv 2406.09416): a transformer sees the picture in large patches, ConvNeXt branches refine it pixel by pixel.

Every branch sees the same noisy picture, each at its own patch size, from coarse to fine; a branch is also given all features of the one before it, and
predicts v at its own resolution. Time enters through the norms alone: their gains and biases move between two learned values ("time-dependent
layer norm"). Beside the paper: `TimeParameter` is TD-LN, `Branch` one resolution, `multi_resolution_loss` its loss; configurations are below.

    python -m related.dimr                                              # parameters and GMAC of the configurations, as published
    python -m related.dimr --stripes stripes.npz                        # pictures with fine detail; then train.py --data stripes.npz
    python -m related.dimr stripes.npz samples.npz                      # how far the spectrum of samples is off
    python train.py --res 32 --model related.dimr:DiMR --size tiny --out runs/dimr
    python sample.py runs/dimr --guidance 2 --out grid.png
"""

import argparse
import math
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Shapes
from fid import read_arrays
from sample import run_command, writing
from schedule import alpha_sigma, diffuse
from unet import attend, count, zero_init


class TimeParameter(nn.Module):
    """A vector (C,) that moves with time: sigmoid(w tau + b) p0 + (1 - sigmoid(w tau + b)) p1, each of them (C,), at first p0 = p1, w = 1, b = 0."""

    def __init__(self, channels, value):
        super().__init__()
        self.p0, self.p1 = (nn.Parameter(torch.full((channels,), value)) for _ in range(2))
        self.w, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, tau):
        """tau: (B,). Returns (B, C)."""
        return self.p1 + torch.sigmoid(self.w * tau[:, None] + self.b) * (self.p0 - self.p1)


class AdaptiveParameter(nn.Module):
    """The usual way, to compare with: a linear function of an embedding of time."""

    def __init__(self, channels, value):
        super().__init__()
        self.value, self.dense = value, nn.Linear(channels, channels)

    def forward(self, tau):
        frequencies = math.pi * torch.arange(self.dense.in_features // 2, device=tau.device)
        angles = tau[:, None] / 2 * frequencies
        return self.value + self.dense(torch.cat([angles.cos(), angles.sin()], 1))


class FixedParameter(nn.Module):
    """No time at all."""

    def __init__(self, channels, value):
        super().__init__()
        self.value = nn.Parameter(torch.full((channels,), value))

    def forward(self, tau):
        return self.value.expand(len(tau), -1)


PARAMETERS = dict(td=TimeParameter, ada=AdaptiveParameter, none=FixedParameter)


class Norm(nn.Module):
    """LayerNorm with a gain and a bias of time, or with rms RMSNorm with a gain of time. x: (B, ..., C), tau: (B,)."""

    def __init__(self, channels, time, rms=False):
        super().__init__()
        self.gain = PARAMETERS[time](channels, 1.0)
        self.bias = None if rms else PARAMETERS[time](channels, 0.0)

    def forward(self, x, tau):
        as_x = lambda parameter: parameter(tau).reshape(len(x), *[1] * (x.ndim - 2), -1)
        if self.bias is None:
            h = (
                as_x(self.gain)
                * x
                / (x.float().norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + 1e-8)
            )
        else:
            h = as_x(self.gain) * F.layer_norm(x, x.shape[-1:], eps=1e-5) + as_x(self.bias)
        return h.to(x.dtype)  # or in bf16 all that follows would be float32


class GatedMLP(nn.Module):
    """Norm, then W2 (GELU(W0 x) * W1 x)."""

    def __init__(self, channels, hidden, time):
        super().__init__()
        self.norm = Norm(channels, time, rms=True)
        self.w0, self.w1, self.w2 = (
            nn.Linear(channels, hidden),
            nn.Linear(channels, hidden),
            nn.Linear(hidden, channels),
        )

    def forward(self, x, tau):
        h = self.norm(x, tau)
        return self.w2(F.gelu(self.w0(h)) * self.w1(h))


class SelfAttention(nn.Module):
    """Norm, then attention of the tokens (B, T, C) to themselves."""

    def __init__(self, channels, num_heads, time):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.norm = Norm(channels, time, rms=True)
        self.qkv, self.out = (
            nn.Linear(channels, 3 * channels, bias=False),
            nn.Linear(channels, channels),
        )

    def forward(self, x, tau):
        q, k, v = (
            each.transpose(1, 2)
            for each in self.qkv(self.norm(x, tau)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        )  # (B, heads, T, dim) each
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + mixing of positions, x + MLP: a transformer's block for tokens (B, T, C) with num_heads, else ConvNeXt's for (B, H, W, C), whose 7x7 has no norm."""

    def __init__(self, channels, hidden, time, num_heads=0):
        super().__init__()
        self.attention = SelfAttention(channels, num_heads, time) if num_heads else None
        self.conv = (
            None if num_heads else nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        )
        self.mlp = GatedMLP(channels, hidden, time)

    def forward(self, x, tau):
        x = x + (
            self.conv(x.movedim(3, 1)).movedim(1, 3)
            if self.attention is None
            else self.attention(x, tau)
        )
        return x + self.mlp(x, tau)


class Branch(nn.Module):
    """One resolution: patches of patch x patch pixels, num_blocks blocks around a middle one with skips as in U-ViT, and a prediction.

    num_heads: of a transformer, which also takes the label as a token, or 0 for ConvNeXt. below: channels of the features of a grid half as fine, or None.
    """

    def __init__(
        self,
        grid,
        patch,
        num_classes,
        in_channels,
        time,
        below,
        *,
        channels,
        hidden,
        num_blocks,
        num_heads=0,
    ):
        super().__init__()
        self.patchify = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(*grid, channels))
        self.label = nn.Embedding(num_classes + 1, channels) if num_heads else None
        if below:
            self.norm_below, self.expand, self.norm_expanded = (
                Norm(below, time),
                nn.Linear(below, 4 * channels),
                Norm(channels, time),
            )
        block = lambda: Block(channels, hidden, time, num_heads)
        half = num_blocks // 2
        self.first, self.middle, self.second = (
            nn.ModuleList(block() for _ in range(half)),
            block(),
            nn.ModuleList(block() for _ in range(half)),
        )
        self.merge = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(half))
        self.norm, self.head = Norm(channels, time), nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, z, tau, label, below):
        """below: (B, H, W, C) of the coarser branch, or None. Returns the prediction (B, in_channels, H', W') and all features (B, H', W', C')."""
        x = self.patchify(z).movedim(1, 3)
        x = x + self.position.to(x.dtype)  # (B, H', W', C)
        grid = x.shape[1:3]
        if below is not None:
            h = self.expand(self.norm_below(below, tau)).unflatten(
                3, (2, 2, -1)
            )  # (B, H, W, 2, 2, C)
            x = x + self.norm_expanded(h.transpose(2, 3).flatten(3, 4).flatten(1, 2), tau)
        if self.label is not None:
            x = torch.cat(
                [self.label(label)[:, None].to(x.dtype), x.flatten(1, 2)], 1
            )  # (B, 1 + H' W', C)
        features, skips = [x], []
        for block in self.first:
            x = block(x, tau)
            skips.append(x)
        features += skips
        x = self.middle(x, tau)
        features.append(x)
        for merge, block in zip(self.merge, self.second):
            x = block(merge(torch.cat([x, skips.pop()], -1)), tau)
            features.append(x)
        features = torch.cat(features, -1)
        if self.label is not None:
            x, features = x[:, 1:].unflatten(1, grid), features[:, 1:].unflatten(1, grid)
        return self.head(self.norm(x, tau).movedim(3, 1)), features


class DiMR(nn.Module):
    """branches: fields of each Branch, from the coarsest, of patches of 2^(n - 1) pixels, to single pixels. time: "td", "ada" or "none".

    In eval mode net(z, logsnr, label) is v_hat like z, that of the last branch. In training it is (B, C, H + H / 4 + ..., W), as losses take one
    tensor: the predictions of all branches, from fine to coarse, one below the other; `unpack` separates them, and so it is trained with
    multi_resolution_loss only. Raises ValueError for a size that the largest patches do not divide.
    """

    def __init__(self, res, num_classes=1000, branches=(), time="td", in_channels=3):
        super().__init__()
        (height, width), coarsest = (
            (res, res) if isinstance(res, int) else res,
            2 ** max(0, len(branches) - 1),
        )
        if not branches:
            raise ValueError(
                "DiMR takes at least one branch: --size, or --model-args with branches"
            )
        if height % coarsest**2 or width % coarsest:
            raise ValueError(
                f"{len(branches)} branches do not go with pictures of {height}x{width}: patches of {coarsest} pixels must divide the width, their square the height"
            )
        self.num_classes, self.branches, below = num_classes, nn.ModuleList(), None
        for i, fields in enumerate(branches):
            patch = coarsest >> i
            self.branches.append(
                Branch(
                    (height // patch, width // patch),
                    patch,
                    num_classes,
                    in_channels,
                    time,
                    below,
                    **fields,
                )
            )
            below = fields["channels"] * (fields["num_blocks"] // 2 * 2 + 2)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Branch):
                nn.init.trunc_normal_(module.position, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaptiveParameter):
                zero_init(module.dense)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W) of the built size, logsnr: (B,), label: (B,) int64 or None."""
        if label is None:
            label = torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
        tau, below, outputs = (
            logsnr.float() / 10,
            None,
            [],
        )  # |tau| up to 2, where the paper's is up to 1
        for branch in self.branches:
            output, below = branch(z, tau, label, below)
            outputs.insert(0, output)
        return (
            torch.cat([output.reshape(*z.shape[:2], -1, z.shape[3]) for output in outputs], 2)
            if self.training
            else outputs[0]
        )


def unpack(v, height, width):
    """The predictions (B, C, H, W), (B, C, H / 2, W / 2), ... of a DiMR in training, from fine to coarse, for pictures of this size; in eval mode the first."""
    outputs, row = [], 0
    while row < v.shape[2]:
        scale = 2 ** len(outputs)
        rows = height // scale**2
        outputs.append(
            v[:, :, row : row + rows].reshape(*v.shape[:2], height // scale, width // scale)
        )
        row += rows
    return outputs


def multi_resolution_loss(net, x, schedule, label=None, *, t=None, eps=None):
    """The sum over resolutions s = 1, 2, ... (from fine to coarse) of 1 / s^2 times the mean square of v_s - v_hat_s.

    eps_s = s avgpool_s(eps) is white noise again. As avgpool_s(z) has less noise than z, its v is that of logsnr + 2 log s, of x_s = avgpool_s(x): this is
    ours, as the paper predicts eps. x, label, t, eps, and what is returned: as in loss.diffusion_loss.
    """
    t = torch.rand(len(x), device=x.device) if t is None else t
    eps = torch.randn_like(x) if eps is None else eps
    logsnr, loss = schedule(t), 0.0
    for k, v_hat in enumerate(unpack(net(diffuse(x, eps, logsnr), logsnr, label), *x.shape[2:])):
        s = 2**k
        alpha, sigma = alpha_sigma(logsnr + 2 * math.log(s), like=x)
        v = alpha * s * F.avg_pool2d(eps, s) - sigma * F.avg_pool2d(x, s)
        loss = loss + (v - v_hat).square().mean((1, 2, 3)) / s**2
    return loss, logsnr


def parameter_groups(net, weight_decay):
    """Groups for torch.optim.AdamW, as published: weight decay for all but the slopes and offsets of the time-dependent parameters."""
    free = {
        id(p)
        for module in net.modules()
        if isinstance(module, TimeParameter)
        for p in (module.w, module.b)
    }
    return [
        dict(params=[p for p in net.parameters() if id(p) not in free], weight_decay=weight_decay),
        dict(params=[p for p in net.parameters() if id(p) in free], weight_decay=0.0),
    ]


_XL = [
    dict(channels=960, hidden=1920, num_blocks=39, num_heads=16),
    dict(channels=480, hidden=960, num_blocks=20),
]
_G = [
    dict(channels=1152, hidden=2304, num_blocks=57, num_heads=16),
    dict(channels=576, hidden=1152, num_blocks=29),
]
CONFIGS = {
    "XL/2R": (dict(res=32, in_channels=4, branches=_XL), 505, 160),
    "G/2R": (dict(res=32, in_channels=4, branches=_G), 1060, 331),
}  # M parameters, GMAC, as published

_TINY = [
    dict(channels=96, hidden=192, num_blocks=5, num_heads=4),
    dict(channels=48, hidden=96, num_blocks=3),
    dict(channels=24, hidden=48, num_blocks=3),
]
DiMR.RECIPES = {
    "tiny": {res: dict(branches=_TINY) for res in (32, 64)},
    "xl": {res: dict(branches=_XL) for res in (32, 64)},
    "g": {res: dict(branches=_G) for res in (32, 64)},
}
DiMR.TRAINING = {
    (size, res): dict(
        dict()
        if size == "tiny"
        else dict(batch=1024, steps=1_000_000, lr=2e-4, warmup=5000, ema=0.9999),
        loss="related.dimr:multi_resolution_loss",
    )
    for size in DiMR.RECIPES
    for res in (32, 64)
}  # large ones as published, but for AdamW's betas and weight decay


def striped_shapes(n, res=32, first=0):
    """n of the built-in shapes under stripes one pixel wide, upright or lying in turns: uint8 (n, 3, res, res), and labels."""
    x, label = Shapes(res, first=first)[range(n)]
    odd = 40 * (torch.arange(res) % 2) - 20
    upright = (torch.arange(n) // 10 % 2 == 0)[:, None, None, None]
    return (x + torch.where(upright, odd, odd[:, None])).clamp(0, 255).to(torch.uint8), label


def spectrum(x):
    """The mean power of pictures (B, C, S, S) at wave numbers 0, 1, ... in all directions, up to the corner of the plane, (S / sqrt 2,)."""
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))  # (S, S)
    waves = torch.fft.fftfreq(x.shape[3]) * x.shape[3]
    radius = torch.hypot(waves[:, None], waves).round().long().flatten()
    return torch.bincount(radius, power.flatten()) / torch.bincount(radius)


def spectrum_error(x, real):
    """|P(x) - P(real)| / P(real), summed over the wave numbers above half of the highest along an axis."""
    ours, theirs = spectrum(x)[real.shape[3] // 4 :], spectrum(real)[real.shape[3] // 4 :]
    return ((ours - theirs).abs().sum() / theirs.sum()).item()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="dimr",
        description="The configurations of DiMR; or how far the spectrum of pictures is off.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"dimr: {message}")
    parser.add_argument(
        "pictures",
        nargs="*",
        help=".npz or .npy files: the real ones, then samples to be compared with them",
    )
    parser.add_argument("--stripes", metavar="NPZ", help="write 20,000 striped shapes of 32 pixels")
    options = parser.parse_args(argv)
    if len(options.pictures) == 1:
        parser.error("real pictures are compared with samples: two files, or more")
    if options.stripes:
        x, label = map(
            torch.cat, zip(*(striped_shapes(1000, first=first) for first in range(0, 20_000, 1000)))
        )
        with writing(options.stripes) as file:
            np.savez_compressed(
                file, x=x.permute(0, 2, 3, 1).numpy(), y=label.numpy(), classes=Shapes.classes
            )
        print(f"wrote {options.stripes}")
    as_floats = lambda path: (
        torch.from_numpy(np.array(read_arrays(path)[0])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    real, *others = map(as_floats, options.pictures) if options.pictures else [None]
    for path, x in zip(options.pictures[1:], others):
        if x.shape[1:] != real.shape[1:] or x.shape[2] != x.shape[3]:
            raise ValueError(
                f"{path}: pictures of {tuple(x.shape[1:])}, not square or not like those of {options.pictures[0]}, {tuple(real.shape[1:])}"
            )
        print(f"{path}: the power of fine detail is off by {100 * spectrum_error(x, real):.1f} %")
    if not options.stripes and not options.pictures:
        for name, (config, parameters, macs) in CONFIGS.items():
            ours = count(DiMR, config)
            print(
                f"DiMR-{name:6s} {ours[0]:13,d} parameters ({parameters:,} M published), {ours[1] / 1e9:7.1f} GMAC per picture ({macs} published)"
            )


if __name__ == "__main__":
    run_command(main)
