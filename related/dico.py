"""DiCo (Ai, Fan, Hu, Yang, He and Huang 2025, arXiv 2505.11196): a diffusion ConvNet.

Self-attention in trained diffusion transformers is mostly local, so convolutions can replace it.
DiCo has 1x1 and depthwise 3x3 convolutions only, and its cost is linear in the number of pixels.
A plain ConvNet leaves most of its channels inactive. "Compact channel attention" corrects this: it
multiplies each channel by a sigmoid gate, computed from the means of all channels over the image.
The blocks form a U with three levels and concatenated skips.

    python -m related.dico              # parameters and GMAC of the published configurations
    python -m related.dico --speed 16 32 64      # seconds of DiT, DiCo, LiT and a U-ViT
    python -m related.dico runs/dico    # the fraction of active channels of a trained net
    python train.py --res 32 --model related.dico:DiCo --size tiny --out runs/dico
    python train.py --res 64 --model related.dico:DiCo --size tiny \\
        --model-args '{"width": 64, "depth": [2, 2, 2, 2, 2]}'
    python sample.py runs/dico --guidance 2 --out grid.png
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from related.common import introduce, open_images
from related.dit import CONFIGS as DIT_CONFIGS
from related.dit import Condition, DiT, initialize, time_of
from related.lit import HEADS as LIT_HEADS
from related.lit import LiT
from sample import to_float
from schedule import diffuse
from support.checkpoint import load
from support.data import load_batch
from support.runtime import run_command
from unet import count, zero_init
from uvit import UViT


def modulated_norm(x, shift, scale):
    """Normalize the channels of each pixel, then scale and shift (adaLN).

    x: (B, C, H, W). shift, scale: (B, C). The LayerNorm has no weights of its own.
    """
    x = F.layer_norm(x.movedim(1, 3), x.shape[1:2], eps=1e-6).movedim(3, 1)
    return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


# ---------------------------------------------------------------- the network


class Block(nn.Module):
    """A convolution module, then an MLP over channels; both are gated residual branches.

    x: (B, C, H, W). condition: (B, C). At initialization it is the identity.
    channel_attention: False leaves out the channel gates, for an ablation.
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
        # adaLN-zero: six vectors (B, C), which are 0 at first.
        vectors = self.modulation(F.silu(condition)).chunk(6, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors

        # The convolution module: 1x1, depthwise 3x3, GELU.
        h = self.conv1(modulated_norm(x, shift1, scale1))
        h = F.gelu(self.depthwise(h))

        # Compact channel attention: CCA(X) = X * sigmoid(W mean(X) + b). The mean is over all
        # positions. W is one C x C matrix, without the bottleneck of squeeze-and-excitation.
        if self.attention is not None:
            h = h * torch.sigmoid(self.attention(h.mean((2, 3), keepdim=True)))
        x = x + gate1[:, :, None, None] * self.conv3(h)

        # The MLP acts on each pixel: 1x1, GELU, 1x1.
        h = self.mlp2(F.gelu(self.mlp1(modulated_norm(x, shift2, scale2))))
        return x + gate2[:, :, None, None] * h


def run_blocks(blocks, h, condition):
    """Apply the blocks one after the other."""
    for block in blocks:
        h = block(h, condition)
    return h


class DiCo(nn.Module):
    """The U-shaped network: three levels with D, 2 D and 4 D channels.

    res: side of the image in pixels, or (height, width), divisible by 4; the weights do not depend
    on it. width: D. depth: number of blocks down (two levels), in the middle, and up (two levels).
    Raises ValueError for sides that are not divisible by 4.
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
            raise ValueError(f"DiCo needs sides divisible by 4, not {res}")
        d = width
        self.num_classes = num_classes

        def blocks(n, channels):
            return nn.ModuleList(Block(channels, mlp_ratio, channel_attention) for _ in range(n))

        # Each width has its own embedding of noise level and label.
        self.conditions = nn.ModuleList(Condition(c, num_classes) for c in (d, 2 * d, 4 * d))
        self.stem = nn.Conv2d(in_channels, d, 3, padding=1)

        # Down: a convolution to half the channels; then 2x2 pixels become channels.
        self.down1 = blocks(depth[0], d)
        self.down2 = blocks(depth[1], 2 * d)
        self.shrink1 = nn.Conv2d(d, d // 2, 3, padding=1, bias=False)
        self.shrink2 = nn.Conv2d(2 * d, d, 3, padding=1, bias=False)
        self.middle = blocks(depth[2], 4 * d)

        # Up: a convolution to twice the channels; then four channels become 2x2 pixels. A 1x1
        # convolution joins the result with the skip. The last level keeps 2 D channels.
        self.grow2 = nn.Conv2d(4 * d, 8 * d, 3, padding=1, bias=False)
        self.grow1 = nn.Conv2d(2 * d, 4 * d, 3, padding=1, bias=False)
        self.join2 = nn.Conv2d(4 * d, 2 * d, 1)
        self.join1 = nn.Conv2d(2 * d, 2 * d, 1)
        self.up2 = blocks(depth[3], 2 * d)
        self.up1 = blocks(depth[4], 2 * d)
        self.modulation = nn.Linear(2 * d, 4 * d)
        self.head = nn.Conv2d(2 * d, out_channels or in_channels, 3, padding=1)

        # As in the published code, convolutions are initialized like linear layers, the stem is a
        # linear layer, and the prediction is 0 at first.
        initialize(self, (nn.Linear, nn.Conv2d))
        nn.init.xavier_uniform_(self.stem.weight.data.flatten(1))
        zero_init(self.head)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W). logsnr: (B,). label: (B,) int64 or None. Returns v_hat."""
        return self.at_time(z, time_of(logsnr), label)[:, : z.shape[1]]

    def at_time(self, z, time, label=None):
        """Return all outputs (B, out_channels, H, W) at times (B,) from 0 to 999."""
        # One condition per width: (B, D), (B, 2 D), (B, 4 D).
        c1, c2, c4 = (condition(time, label) for condition in self.conditions)

        # Down. h1 and h2 are the skips.
        h1 = run_blocks(self.down1, self.stem(z), c1)  # (B, D, H, W)
        h2 = F.pixel_unshuffle(self.shrink1(h1), 2)  # (B, 2 D, H / 2, W / 2)
        h2 = run_blocks(self.down2, h2, c2)
        h = F.pixel_unshuffle(self.shrink2(h2), 2)  # (B, 4 D, H / 4, W / 4)
        h = run_blocks(self.middle, h, c4)

        # Up: concatenate each skip, and project.
        h = torch.cat([F.pixel_shuffle(self.grow2(h), 2), h2], 1)  # (B, 4 D, H / 2, W / 2)
        h = run_blocks(self.up2, self.join2(h), c2)
        h = torch.cat([F.pixel_shuffle(self.grow1(h), 2), h1], 1)  # (B, 2 D, H, W)
        h = run_blocks(self.up1, self.join1(h), c2)

        # The head: a modulated norm and a zero-initialized convolution.
        shift, scale = self.modulation(F.silu(c2)).chunk(2, 1)
        return self.head(modulated_norm(h, shift, scale))


# ---------------------------------------------------------------- configurations

# Each published configuration, its million parameters and its GMAC. The networks work on 32x32
# latents with 4 channels, and they also predict a variance: 8 channels out.
_LATENT = dict(res=32, in_channels=4, out_channels=8)
CONFIGS = {
    "S": (dict(_LATENT, width=128), 33.1, 4.25),
    "B": (dict(_LATENT, width=256), 130.0, 16.88),
    "L": (dict(_LATENT, width=352, depth=(9, 8, 9, 8, 9)), 463.9, 60.24),
    "XL": (dict(_LATENT, width=416, depth=(9, 9, 10, 9, 9)), 701.2, 87.30),
    "H": (dict(_LATENT, width=416, depth=(14, 12, 10, 12, 14), mlp_ratio=4), 1000, 194.15),
}

# The sizes for train.py: the same networks on images, and a tiny one of ours.
_SIZES = {
    name.lower(): {key: value for key, value in config.items() if key not in _LATENT}
    for name, (config, *_) in CONFIGS.items()
}
DiCo.RECIPES = {"tiny": {res: dict(width=32, depth=[2, 2, 3, 2, 2]) for res in (32, 64)}}
DiCo.RECIPES |= {name: {res: fields for res in (32, 64)} for name, fields in _SIZES.items()}

# The published training. H has a larger batch and learning rate.
_PUBLISHED = dict(batch=256, steps=400_000, lr=1e-4, warmup=0, ema=0.9999)
DiCo.TRAINING = {
    (name, res): _PUBLISHED | (dict(batch=1024, lr=2e-4) if name == "h" else {})
    for name in _SIZES
    for res in (32, 64)
}

# ---------------------------------------------------------------- measurements


@torch.no_grad()
def active_channels(net, z, logsnr, label=None):
    """Return the fraction of active channels in the convolution modules of a DiCo, in [0, 1].

    A channel is active if the mean of its ReLU exceeds 0.05 of the largest mean in its block. The
    result is an average over blocks. Raises ValueError for a net without DiCo blocks.
    """
    convolutions = [module.conv3 for module in net.modules() if hasattr(module, "conv3")]
    if not convolutions:
        raise ValueError("a net without DiCo blocks")
    fractions = []

    def measure(conv, args, h):
        mean = h.relu().mean((0, 2, 3))  # (C,)
        active = (mean > 0.05 * mean.max()).float()
        fractions.append(active.mean().item())

    # conv3 is the last layer of the convolution module.
    hooks = [conv.register_forward_hook(measure) for conv in convolutions]
    net(z, logsnr, label)
    for hook in hooks:
        hook.remove()
    return sum(fractions) / len(fractions)


# Four networks of 33 million parameters: the sizes S of DiT, LiT and DiCo, and a U-ViT of ours. Its
# transformer has the width and the tokens of DiT-S. DiCo has no tokens, but its second level has as
# many pixels.
NETWORKS = {
    "DiT": (DiT, DIT_CONFIGS["S"]),
    "DiCo": (DiCo, CONFIGS["S"][0]),
    "LiT": (LiT, DIT_CONFIGS["S"] | dict(num_heads=LIT_HEADS["S"])),
    "U-ViT": (
        UViT,
        dict(
            in_channels=4,
            base_channels=128,
            emb_channels=512,
            channel_multiplier=(1, 3),
            num_res_blocks=(2,),
            num_transformer_blocks=9,
        ),
    ),
}


def forward_seconds(net, z):
    """Time a forward pass without gradients."""
    start = time.perf_counter()
    with torch.no_grad():
        net(z, torch.zeros(len(z)))
    return time.perf_counter() - start


def step_seconds(net, z):
    """Time a forward and a backward pass. The optimizer costs the same for all networks."""
    start = time.perf_counter()
    net(z, torch.zeros(len(z))).square().mean().backward()
    seconds = time.perf_counter() - start
    net.zero_grad()
    return seconds


def print_speed(sides, rounds=3):
    """Print the seconds of NETWORKS for one latent of side x side tokens, on this machine's CPU.

    The networks take turns in `rounds` rounds, so that a slower machine slows all of them. Medians.
    """
    for side in sides:
        z = torch.randn(1, 4, 2 * side, 2 * side)
        print(f"{side}x{side} tokens, latents of {2 * side}x{2 * side}")
        nets, counts = {}, {}
        for name, (network, fields) in NETWORKS.items():
            fields = fields | dict(res=2 * side)
            nets[name] = network(**fields)
            counts[name] = count(network, fields)

        # The first call of each network allocates memory. It is not measured.
        seconds = {(name, kind): [] for name in nets for kind in (forward_seconds, step_seconds)}
        for round in range(rounds + 1):
            for (name, kind), measured in seconds.items():
                value = kind(nets[name], z)
                if round > 0:
                    measured.append(value)
        medians = {key: statistics.median(values) for key, values in seconds.items()}

        for name, (parameters, macs, _) in counts.items():
            forward, step = medians[name, forward_seconds], medians[name, step_seconds]
            print(
                f"  {name:6s} {parameters / 1e6:5.1f} M, {macs / 1e9:7.2f} GMAC, "
                f"forward {forward:7.3f} s ({medians['DiT', forward_seconds] / forward:.2f} times "
                f"as fast as DiT), forward and backward {step:7.3f} s "
                f"({medians['DiT', step_seconds] / step:.2f} times)",
                flush=True,
            )


def print_active(path):
    """Print the fraction of active channels of a run, for its first 128 images at random t."""
    net, config, schedule = load(path, "cpu")
    data = open_images(config)
    images, label = load_batch(data, range(min(128, len(data))))
    torch.manual_seed(0)
    x = to_float(images)  # (N, 3, H, W)
    logsnr = schedule(torch.rand(len(x)))
    z = diffuse(x, torch.randn_like(x), logsnr)
    try:
        fraction = active_channels(net, z, logsnr, label)
    except ValueError as error:
        raise ValueError(f"{path} is a run of {config['model']}, {error}") from error
    print(f"{path}: {100 * fraction:.1f} % of the channels are active")


def print_configurations():
    """Print parameters and multiply-accumulates of the published configurations."""
    for name, (config, published, published_gmac) in CONFIGS.items():
        parameters, macs, _ = count(DiCo, config)
        print(
            f"DiCo-{name:3s} {parameters:13,d} parameters ({published:g} M published), "
            f"{macs / 1e9:8.3f} GMAC per image ({published_gmac:g} published)"
        )


# ---------------------------------------------------------------- the command


def main(argv=None):
    """Parse the options and print what they ask for."""
    parser = argparse.ArgumentParser(
        prog="dico",
        description="Print the configurations of DiCo, or the active channels of trained runs.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"dico: {message}")
    parser.add_argument(
        "runs", nargs="*", help="folders or checkpoints of train.py --model related.dico:DiCo"
    )
    parser.add_argument(
        "--speed",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="seconds of DiT, DiCo, LiT and a U-ViT for so many tokens a side, on a CPU: 16 32 64",
    )
    options = parser.parse_args(argv)
    if options.speed is not None and not all(4 <= side <= 256 for side in options.speed):
        parser.error("--speed must be sides from 4 to 256")

    if options.speed:
        print_speed(options.speed)
    for path in options.runs:
        print_active(path)
    if not options.speed and not options.runs:
        introduce(__doc__, print_configurations)


if __name__ == "__main__":
    run_command(main)
