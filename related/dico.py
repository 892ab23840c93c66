"""DiCo, a diffusion network of convolutions alone (arXiv 2505.11196): depthwise 3x3 and 1x1, and an attention over channels instead of positions.

A pure ConvNet lets most of its channels fall silent, where attention does not; a single sigmoid gate per channel, computed from the mean over
all positions ("compact channel attention"), keeps them busy. Its cost is linear in the number of pixels. Beside the paper: `Block`, `DiCo` (the U of
three levels), and the published configurations.

    python -m related.dico                                              # the configurations: parameters and GMAC, as published
    python -m related.dico --time                                       # milliseconds of the tiny net at 16, 32 and 64 px
    python -m related.dico runs/dico                                    # the share of a trained net's channels that do something
    python train.py --res 32 --model related.dico:DiCo --size tiny --out runs/dico
    python train.py --res 64 --model related.dico:DiCo --size tiny --model-args '{"width": 64, "depth": [2, 2, 2, 2, 2]}'
    python sample.py runs/dico --guidance 2 --out grid.png
"""

import argparse
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from data import open_data
from sample import load, run_command, to_float
from schedule import diffuse
from train import DEFAULTS
from unet import count, zero_init


def modulated_norm(x, shift, scale):
    """LayerNorm over the channels of each pixel of (B, C, H, W), without weights of its own; shift, scale: (B, C)."""
    x = F.layer_norm(x.movedim(1, 3), x.shape[1:2], eps=1e-6).movedim(3, 1)
    return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class Condition(nn.Module):
    """The condition of one width, (B, C): the sum of an MLP of the noise level and a table of labels, of which the last row is no label."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(256, channels), nn.Linear(channels, channels)
        self.label = nn.Embedding(num_classes + 1, channels)

    def forward(self, sinusoids, label):
        return self.dense2(F.silu(self.dense1(sinusoids))) + self.label(label)


class Block(nn.Module):
    """x + gate1 Conv(norm x), x + gate2 MLP(norm x), both modulated by the condition (B, C); x: (B, C, H, W). At first the identity.

    channel_attention: X * sigmoid(W mean(X) + b), one C x C matrix, without a bottleneck; False leaves it out.
    """

    def __init__(self, channels, mlp_ratio, channel_attention=True):
        super().__init__()
        self.modulation = nn.Linear(channels, 6 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.attention = nn.Conv2d(channels, channels, 1) if channel_attention else None
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.mlp1 = nn.Conv2d(channels, mlp_ratio * channels, 1)
        self.mlp2 = nn.Conv2d(mlp_ratio * channels, channels, 1)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(
            6, 1
        )
        h = F.gelu(self.depthwise(self.conv1(modulated_norm(x, shift1, scale1))))
        if self.attention is not None:
            h = h * torch.sigmoid(self.attention(h.mean((2, 3), keepdim=True)))
        x = x + gate1[:, :, None, None] * self.conv3(h)
        h = self.mlp2(F.gelu(self.mlp1(modulated_norm(x, shift2, scale2))))
        return x + gate2[:, :, None, None] * h


class DiCo(nn.Module):
    """Three levels of width D, 2 D and 4 D, and back up with concatenated skips; the last level, at full resolution, is 2 D wide.

    res: side in pixels or (height, width), divisible by 4, of which the weights know nothing. width: D; depth: blocks of the levels, down, middle and up.
    Raises ValueError for a size that is not divisible by 4.
    """

    def __init__(
        self,
        res,
        num_classes=1000,
        width=128,
        depth=(5, 4, 4, 4, 4),
        mlp_ratio=2,
        channel_attention=True,
        in_channels=3,
        out_channels=None,
    ):
        super().__init__()
        if any(side % 4 for side in ([res] if isinstance(res, int) else res)):
            raise ValueError(f"DiCo takes sides divisible by 4, not {res}")
        blocks = lambda n, channels: nn.ModuleList(
            Block(channels, mlp_ratio, channel_attention) for _ in range(n)
        )
        d, out_channels = width, out_channels or in_channels
        self.num_classes = num_classes
        self.conditions = nn.ModuleList(
            Condition(channels, num_classes) for channels in (d, 2 * d, 4 * d)
        )
        self.stem = nn.Conv2d(in_channels, d, 3, padding=1)
        self.down1, self.down2 = blocks(depth[0], d), blocks(depth[1], 2 * d)
        self.shrink1, self.shrink2 = (
            nn.Conv2d(c, c // 2, 3, padding=1, bias=False) for c in (d, 2 * d)
        )  # then four pixels become channels
        self.middle = blocks(depth[2], 4 * d)
        self.grow2, self.grow1 = (
            nn.Conv2d(c, 2 * c, 3, padding=1, bias=False) for c in (4 * d, 2 * d)
        )  # then channels become four pixels
        self.join2, self.join1 = nn.Conv2d(4 * d, 2 * d, 1), nn.Conv2d(2 * d, 2 * d, 1)
        self.up2, self.up1 = blocks(depth[3], 2 * d), blocks(depth[4], 2 * d)
        self.modulation, self.head = (
            nn.Linear(2 * d, 4 * d),
            nn.Conv2d(2 * d, out_channels, 3, padding=1),
        )

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight.data.flatten(1))
        for condition in self.conditions:
            for weight in (
                condition.dense1.weight,
                condition.dense2.weight,
                condition.label.weight,
            ):
                nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if hasattr(module, "modulation"):
                zero_init(module.modulation)
        zero_init(self.head)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W), logsnr: (B,), label: (B,) int64 or None. Returns v_hat like z."""
        if label is None:
            label = torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
        frequencies = torch.exp(
            torch.arange(128, device=logsnr.device) * (-math.log(10000.0) / 128)
        )
        angles = (
            1000.0 * (logsnr.float()[:, None] + 20.0) / 40.0 * frequencies
        )  # as the core's nets; the paper has times up to 1000
        c1, c2, c4 = (
            condition(torch.cat([angles.cos(), angles.sin()], 1), label)
            for condition in self.conditions
        )

        def run(blocks, h, c):
            for block in blocks:
                h = block(h, c)
            return h

        h1 = run(self.down1, self.stem(z), c1)  # (B, D, H, W)
        h2 = run(self.down2, F.pixel_unshuffle(self.shrink1(h1), 2), c2)  # (B, 2 D, H / 2, W / 2)
        h = run(self.middle, F.pixel_unshuffle(self.shrink2(h2), 2), c4)  # (B, 4 D, H / 4, W / 4)
        h = run(self.up2, self.join2(torch.cat([F.pixel_shuffle(self.grow2(h), 2), h2], 1)), c2)
        h = run(
            self.up1, self.join1(torch.cat([F.pixel_shuffle(self.grow1(h), 2), h1], 1)), c2
        )  # (B, 2 D, H, W)
        return self.head(modulated_norm(h, *self.modulation(F.silu(c2)).chunk(2, 1)))


_LATENT = dict(
    res=32, in_channels=4, out_channels=8
)  # as published, on latents and with a learned variance
CONFIGS = {  # million parameters, GMAC as published
    "S": (dict(_LATENT, width=128), 33.1, 4.25),
    "B": (dict(_LATENT, width=256), 130.0, 16.88),
    "L": (dict(_LATENT, width=352, depth=(9, 8, 9, 8, 9)), 463.9, 60.24),
    "XL": (dict(_LATENT, width=416, depth=(9, 9, 10, 9, 9)), 701.2, 87.30),
    "H": (dict(_LATENT, width=416, depth=(14, 12, 10, 12, 14), mlp_ratio=4), 1000, 194.15),
}

_SIZES = {
    name.lower(): {key: value for key, value in config.items() if key not in _LATENT}
    for name, (config, *_) in CONFIGS.items()
}
DiCo.RECIPES = {"tiny": {res: dict(width=32, depth=[2, 2, 3, 2, 2]) for res in (32, 64)}} | {
    name: {res: fields for res in (32, 64)} for name, fields in _SIZES.items()
}
_PUBLISHED = dict(batch=256, steps=400_000, lr=1e-4, warmup=0, ema=0.9999)
DiCo.TRAINING = {
    (name, res): _PUBLISHED | (dict(batch=1024, lr=2e-4) if name == "h" else {})
    for name in _SIZES
    for res in (32, 64)
}


@torch.no_grad()
def active_channels(net, z, logsnr, label=None):
    """The share of channels that the convolutions of a DiCo's blocks use: those whose ReLU has a mean above 0.05 of the largest one's, averaged over blocks."""
    shares, convolutions = (
        [],
        [module.conv3 for module in net.modules() if hasattr(module, "conv3")],
    )
    if not convolutions:
        raise ValueError("a net without blocks of DiCo")

    def note(conv, args, h):
        mean = h.relu().mean((0, 2, 3))  # (C,)
        shares.append((mean > 0.05 * mean.max()).float().mean().item())

    hooks = [conv.register_forward_hook(note) for conv in convolutions]
    net(z, logsnr, label)
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


def print_times(seconds=3.0):
    """Milliseconds per forward pass of the tiny net, for 8 pictures on one thread of the CPU, each from measurements of so many seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, last = DiCo(32, **DiCo.RECIPES["tiny"][32]).eval(), None
    for res in (16, 32, 64):
        z, logsnr = torch.randn(8, 3, res, res), torch.zeros(8)
        with torch.no_grad():
            ms = (
                1000
                * Timer("net(z, logsnr)", globals=locals())
                .blocked_autorange(min_run_time=seconds)
                .median
            )
        print(
            f"{res}x{res} pixels: {ms:.1f} ms"
            + (f", {ms / last:.2f} times as long" if last else "")
        )
        last = ms
    torch.set_num_threads(threads)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="dico",
        description="The configurations of DiCo; or with runs, how many of their channels are active.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"dico: {message}")
    parser.add_argument(
        "runs", nargs="*", help="folders or checkpoints of train.py --model related.dico:DiCo"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="milliseconds per forward pass of the tiny net, batch 8, on one thread of the CPU",
    )
    options = parser.parse_args(argv)
    if options.time:
        print_times()
    for path in options.runs:
        net, config, schedule = load(path, "cpu")
        x, label = open_data(DEFAULTS | config)[range(128)]
        torch.manual_seed(0)
        x, logsnr = to_float(x), schedule(torch.rand(len(x)))
        try:
            share = active_channels(net, diffuse(x, torch.randn_like(x), logsnr), logsnr, label)
        except ValueError as error:
            raise ValueError(f"{path} is a run of {config['model']}, {error}") from error
        print(f"{path}: {100 * share:.1f} % of the channels are active")
    if not options.time and not options.runs:
        for name, (config, parameters, macs) in CONFIGS.items():
            ours = count(DiCo, config)
            print(
                f"DiCo-{name:3s} {ours[0]:13,d} parameters ({parameters:g} M published), {ours[1] / 1e9:8.3f} GMAC per picture ({macs:g} published)"
            )


if __name__ == "__main__":
    run_command(main)
