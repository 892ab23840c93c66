"""DiMR (Liu, Zeng, He, Yu, Shen and Chen 2024, arXiv 2406.09416): a multi-resolution network.

Transformers on large patches distort fine detail. DiMR has several branches, from coarse to fine.
All of them see the same noisy image, each in patches of its own size. The coarsest branch is a
transformer. ConvNeXt branches refine its features, and each branch predicts v at its resolution.
Time enters only through the norms: their gains and biases move between two learned values
("time-dependent layer norm", TD-LN).

    python -m related.dimr                           # parameters and GMAC of the configurations
    python -m related.dimr --stripes stripes.npz     # images with fine detail, for train.py --data
    python -m related.dimr stripes.npz samples.npz   # the error of the samples' spectrum
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

from fid import read_arrays
from related.common import introduce
from schedule import alpha_sigma, diffuse
from support.data import Shapes, load_batch
from support.runtime import run_command, writing
from unet import attend, count, zero_init

# ---------------------------------------------------------------- norms that depend on time
# A parameter is a function of tau (B,), the rescaled logsnr, to vectors (B, channels). The three
# classes are the paper's and two baselines.


class TimeParameter(nn.Module):
    """The paper's parameter: p(tau) = s p0 + (1 - s) p1 with s = sigmoid(w tau + b).

    All of these are vectors (channels,). At initialization p0 = p1 = value, w = 1 and b = 0.
    """

    def __init__(self, channels, value):
        super().__init__()
        self.p0 = nn.Parameter(torch.full((channels,), value))
        self.p1 = nn.Parameter(torch.full((channels,), value))
        self.w = nn.Parameter(torch.ones(channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, tau):
        s = torch.sigmoid(self.w * tau[:, None] + self.b)  # (B, C)
        return self.p1 + s * (self.p0 - self.p1)


class AdaptiveParameter(nn.Module):
    """A baseline like adaLN: a linear function of sinusoids of tau, constant at initialization."""

    def __init__(self, channels, value):
        super().__init__()
        self.value = value
        self.dense = nn.Linear(channels, channels)

    def forward(self, tau):
        frequencies = math.pi * torch.arange(self.dense.in_features // 2, device=tau.device)
        angles = tau[:, None] / 2 * frequencies  # (B, C / 2)
        return self.value + self.dense(torch.cat([angles.cos(), angles.sin()], 1))


class FixedParameter(nn.Module):
    """A baseline that ignores time."""

    def __init__(self, channels, value):
        super().__init__()
        self.value = nn.Parameter(torch.full((channels,), value))

    def forward(self, tau):
        return self.value.expand(len(tau), -1)


PARAMETERS = dict(td=TimeParameter, ada=AdaptiveParameter, none=FixedParameter)


class Norm(nn.Module):
    """TD-LN: LayerNorm with a gain and a bias that depend on time; rms: RMSNorm with a gain.

    time: a key of PARAMETERS. x: (B, ..., C). tau: (B,).
    """

    def __init__(self, channels, time, rms=False):
        super().__init__()
        self.gain = PARAMETERS[time](channels, 1.0)
        self.bias = None if rms else PARAMETERS[time](channels, 0.0)

    def forward(self, x, tau):
        shape = (len(x), *[1] * (x.ndim - 2), -1)  # (B, 1, ..., C)
        gain = self.gain(tau).reshape(shape)
        if self.bias is None:
            # RMSNorm as published: x / (||x|| / sqrt(C) + 1e-8).
            h = gain * x
            rms = x.float().norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            h = h / (rms + 1e-8)
        else:
            h = gain * F.layer_norm(x, x.shape[-1:], eps=1e-5) + self.bias(tau).reshape(shape)
        # Under autocast the parameters are float32. The next layers continue in the dtype of x.
        return h.to(x.dtype)


# ---------------------------------------------------------------- blocks


class GatedMLP(nn.Module):
    """Norm, then the gated MLP W2 (GELU(W0 x) * W1 x) (GEGLU)."""

    def __init__(self, channels, hidden, time):
        super().__init__()
        self.norm = Norm(channels, time, rms=True)
        self.w0 = nn.Linear(channels, hidden)
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(hidden, channels)

    def forward(self, x, tau):
        h = self.norm(x, tau)
        return self.w2(F.gelu(self.w0(h)) * self.w1(h))


class SelfAttention(nn.Module):
    """Norm, then self-attention of tokens (B, T, C), without the QK-norm of unet.Attention."""

    def __init__(self, channels, num_heads, time):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided into {num_heads} heads")
        self.num_heads = num_heads
        self.norm = Norm(channels, time, rms=True)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x, tau):
        h = self.qkv(self.norm(x, tau)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = h.transpose(1, 3).unbind(2)  # (B, heads, T, dim) each
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block that mixes positions, then channels, with residual connections.

    num_heads: a transformer block for tokens (B, T, C); 0: a ConvNeXt block for (B, H, W, C).
    """

    def __init__(self, channels, hidden, time, num_heads=0):
        super().__init__()
        self.attention = self.conv = None
        if num_heads:
            self.attention = SelfAttention(channels, num_heads, time)
        else:
            self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mlp = GatedMLP(channels, hidden, time)

    def forward(self, x, tau):
        if self.attention is not None:
            x = x + self.attention(x, tau)
        else:
            # ConvNeXt: a depthwise 7x7 convolution, without a norm in front of it.
            x = x + self.conv(x.movedim(3, 1)).movedim(1, 3)
        return x + self.mlp(x, tau)


class Branch(nn.Module):
    """One resolution: patches, blocks with skips as in U-ViT (arXiv 2209.12152), a prediction.

    grid: (height, width) in patches. patch: side of a patch in pixels. below: channels of the
    features of the coarser branch, whose grid is half as fine, or None. num_blocks: an even number
    is rounded up, so that one block is in the middle. num_heads: of a transformer, which also
    receives the label as a token; 0 for ConvNeXt.
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
        half = num_blocks // 2
        self.patchify = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(*grid, channels))
        self.label = nn.Embedding(num_classes + 1, channels) if num_heads else None
        if below:
            self.norm_below = Norm(below, time)
            self.expand = nn.Linear(below, 4 * channels)
            self.norm_expanded = Norm(channels, time)

        def blocks(n):
            return nn.ModuleList(Block(channels, hidden, time, num_heads) for _ in range(n))

        self.first = blocks(half)
        self.middle = Block(channels, hidden, time, num_heads)
        self.second = blocks(half)
        self.merge = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(half))
        self.norm = Norm(channels, time)
        self.head = nn.Conv2d(channels, in_channels, 3, padding=1)

    def upsample(self, below, tau):
        """Bring the features of the coarser branch to this grid and these channels.

        below: (B, H, W, C'). Returns (B, 2 H, 2 W, C).
        """
        # TD-LN, a linear layer to four times the channels, pixel shuffle, TD-LN.
        h = self.expand(self.norm_below(below, tau))
        h = h.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, H, 2, W, 2, C)
        return self.norm_expanded(h.flatten(3, 4).flatten(1, 2), tau)

    def forward(self, z, tau, label, below):
        """Return the prediction and the features of all blocks.

        z: (B, in_channels, H, W). tau, label: (B,). below: the features of the coarser branch, or
        None. The results are (B, in_channels, H / patch, W / patch) and (B, H / patch, W / patch,
        channels of all blocks).
        """
        # Patches and their positions, plus what the coarser branch found.
        x = self.patchify(z).movedim(1, 3)
        x = x + self.position.to(x.dtype)  # (B, H', W', C)
        grid = x.shape[1:3]
        if below is not None:
            x = x + self.upsample(below, tau)

        # The transformer works on tokens. The label is the first one.
        if self.label is not None:
            label_token = self.label(label)[:, None].to(x.dtype)  # (B, 1, C)
            x = torch.cat([label_token, x.flatten(1, 2)], 1)  # (B, 1 + H' W', C)

        # The first half of the blocks stores skips.
        features = [x]
        skips = []
        for block in self.first:
            x = block(x, tau)
            skips.append(x)
        features += skips
        x = self.middle(x, tau)
        features.append(x)

        # The second half takes them, the last one first: concatenated and projected.
        for merge, block in zip(self.merge, self.second):
            x = block(merge(torch.cat([x, skips.pop()], -1)), tau)
            features.append(x)

        # The next branch receives the input and the output of every block. The label stays here.
        features = torch.cat(features, -1)
        if self.label is not None:
            x = x[:, 1:].unflatten(1, grid)
            features = features[:, 1:].unflatten(1, grid)
        return self.head(self.norm(x, tau).movedim(3, 1)), features


# ---------------------------------------------------------------- the network


class DiMR(nn.Module):
    """The multi-resolution network.

    branches: the fields of each Branch, from the coarsest, with patches of 2^(n - 1) pixels, to
    the finest, with patches of one pixel. time: "td", "ada" or "none", see PARAMETERS. Raises
    ValueError for sides that the largest patches do not divide.

    It must be trained with multi_resolution_loss, because another loss trains the last branch only.
    """

    def __init__(self, res, num_classes=1000, branches=(), time="td", in_channels=3):
        super().__init__()
        height, width = (res, res) if isinstance(res, int) else res
        if not branches:
            raise ValueError(
                "DiMR needs at least one branch: use --size, or --model-args with branches"
            )
        coarsest = 2 ** (len(branches) - 1)
        if height % coarsest or width % coarsest:
            raise ValueError(
                f"{len(branches)} branches do not fit images of {height}x{width}: "
                f"both sides must be divisible by patches of {coarsest} pixels"
            )
        self.num_classes = num_classes
        self.branches = nn.ModuleList()
        below = None
        for i, fields in enumerate(branches):
            patch = coarsest >> i
            grid = (height // patch, width // patch)
            branch = Branch(grid, patch, num_classes, in_channels, time, below, **fields)
            self.branches.append(branch)
            # The channels of its features: the input and an odd number of blocks.
            below = fields["channels"] * (fields["num_blocks"] // 2 * 2 + 2)
        self._initialize()

    def _initialize(self):
        """Initialize all weights as the published code does."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Branch):
                nn.init.trunc_normal_(module.position, std=0.02)
        # The adaptive baseline starts without any dependence on time.
        for module in self.modules():
            if isinstance(module, AdaptiveParameter):
                zero_init(module.dense)

    def forward(self, z, logsnr, label=None, all_branches=False):
        """z: (B, in_channels, H, W). logsnr: (B,). label: (B,) int64 or None. Returns v_hat.

        v_hat is the prediction of the finest branch. all_branches: return those of all branches, as
        branches_at does.
        """
        # tau is between about -2 and 2; the paper's is between -1 and 1.
        outputs = self.branches_at(z, logsnr.float() / 10, label)
        return outputs if all_branches else outputs[0]

    def branches_at(self, z, tau, label=None):
        """Return the predictions of all branches at rescaled times tau (B,), from fine to coarse.

        The shapes are (B, in_channels, H, W), (B, in_channels, H / 2, W / 2), and so on.
        """
        if label is None:
            label = torch.full(tau.shape, self.num_classes, device=tau.device)
        below = None
        outputs = []
        for branch in self.branches:
            output, below = branch(z, tau, label, below)
            outputs.insert(0, output)
        return outputs


# ---------------------------------------------------------------- training


def multi_resolution_loss(net, x, schedule, label=None, *, t=None, eps=None):
    """The sum over scales s = 1, 2, 4, ... of ||v_s - v_hat_s||^2 / s^2, from fine to coarse.

    Arguments and results are those of loss.diffusion_loss.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if eps is None:
        eps = torch.randn_like(x)
    logsnr = schedule(t)
    v_hats = net(diffuse(x, eps, logsnr), logsnr, label, all_branches=True)

    loss = 0.0
    for k, v_hat_s in enumerate(v_hats):
        s = 2**k
        # The paper predicts eps_s = s avgpool_s(eps), which is white noise again. Predicting v_s
        # instead is our choice. avgpool_s(z) = alpha x_s + (sigma / s) eps_s has s^2 times the SNR
        # of z, so its logsnr is larger by 2 log s.
        alpha, sigma = alpha_sigma(logsnr + 2 * math.log(s), like=x)
        v_s = alpha * s * F.avg_pool2d(eps, s) - sigma * F.avg_pool2d(x, s)
        # The paper weights the scales by the number of their pixels.
        loss = loss + (v_s - v_hat_s).square().mean((1, 2, 3)) / s**2
    return loss, logsnr


def parameter_groups(net, weight_decay):
    """Return the published groups for AdamW: w and b of the time parameters do not decay."""
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


# ---------------------------------------------------------------- configurations

_XL = [
    dict(channels=960, hidden=1920, num_blocks=39, num_heads=16),
    dict(channels=480, hidden=960, num_blocks=20),
]
_G = [
    dict(channels=1152, hidden=2304, num_blocks=57, num_heads=16),
    dict(channels=576, hidden=1152, num_blocks=29),
]
_TINY = [
    dict(channels=96, hidden=192, num_blocks=5, num_heads=4),
    dict(channels=48, hidden=96, num_blocks=3),
    dict(channels=24, hidden=48, num_blocks=3),
]

# Each published configuration, on 32x32 latents, its million parameters and its GMAC.
CONFIGS = {
    "XL/2R": (dict(res=32, in_channels=4, branches=_XL), 505, 160),
    "G/2R": (dict(res=32, in_channels=4, branches=_G), 1060, 331),
}

# The sizes for train.py. The training of the large ones is published, except for the betas and the
# weight decay of AdamW, which train.py does not have.
DiMR.RECIPES = {
    size: {res: dict(branches=branches) for res in (32, 64)}
    for size, branches in dict(tiny=_TINY, xl=_XL, g=_G).items()
}
_LOSS = dict(loss="related.dimr:multi_resolution_loss")
_PUBLISHED = dict(_LOSS, batch=1024, steps=1_000_000, lr=2e-4, warmup=5000, ema=0.9999)
DiMR.TRAINING = {
    (size, res): _LOSS if size == "tiny" else _PUBLISHED
    for size in DiMR.RECIPES
    for res in (32, 64)
}

# ---------------------------------------------------------------- fine detail


def striped_shapes(n, res=32, first=0):
    """Return n built-in shapes with stripes of one pixel: uint8 (n, 3, res, res), and labels (n,).

    The stripes are vertical for the first ten images, horizontal for the next ten, and so on.
    """
    images, label = load_batch(Shapes(res, first=first), range(n))
    stripes = 40 * (torch.arange(res) % 2) - 20  # -20, 20, -20, ...
    vertical = (torch.arange(n) // 10 % 2 == 0)[:, None, None, None]
    images = images + torch.where(vertical, stripes, stripes[:, None])
    return images.clamp(0, 255).to(torch.uint8), label


def spectrum(x):
    """Return the mean power of images (B, C, S, S) at the wave numbers 0, 1, ..., about S / sqrt 2.

    The power is averaged over images, channels and directions.
    """
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))  # (S, S)
    waves = torch.fft.fftfreq(x.shape[3]) * x.shape[3]
    radius = torch.hypot(waves[:, None], waves).round().long().flatten()
    return torch.bincount(radius, power.flatten()) / torch.bincount(radius)


def spectrum_error(x, real):
    """Return the relative error of the power above half of the highest wave number of an axis."""
    first = real.shape[3] // 4
    ours = spectrum(x)[first:]
    theirs = spectrum(real)[first:]
    return ((ours - theirs).abs().sum() / theirs.sum()).item()


# ---------------------------------------------------------------- the command


STRIPED_SHAPES = 20_000  # number of images in the file of --stripes


def write_stripes(path):
    """Write STRIPED_SHAPES striped shapes of 32 pixels, with labels and classes, as an .npz."""
    parts = [striped_shapes(1000, first=first) for first in range(0, STRIPED_SHAPES, 1000)]
    images, label = map(torch.cat, zip(*parts))
    images = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    with writing(path) as file:
        np.savez_compressed(file, x=images, y=label.numpy(), classes=Shapes.classes)
    print(f"wrote {path}")


def read_images(path):
    """Return the images of an .npz or .npy as float32 (N, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(np.array(read_arrays(path)[0]))
    return images.permute(0, 3, 1, 2) / 127.5 - 1


def print_errors(real_path, paths):
    """Print the spectrum error of each file of samples. Raises ValueError for other sizes."""
    real = read_images(real_path)
    for path in paths:
        x = read_images(path)
        if x.shape[1:] != real.shape[1:] or x.shape[2] != x.shape[3]:
            raise ValueError(
                f"{path}: images of shape {tuple(x.shape[1:])} must be square, and shaped like "
                f"those of {real_path}, {tuple(real.shape[1:])}"
            )
        error = 100 * spectrum_error(x, real)
        print(f"{path}: the power of fine detail is off by {error:.1f} %")


def print_configurations():
    """Print parameters and multiply-accumulates of the published configurations."""
    for name, (config, published, published_gmac) in CONFIGS.items():
        parameters, macs, _ = count(DiMR, config)
        print(
            f"DiMR-{name:6s} {parameters:13,d} parameters ({published:,} M published), "
            f"{macs / 1e9:7.1f} GMAC per image ({published_gmac} published)"
        )


def main(argv=None):
    """Parse the options, and write or print what they ask for."""
    parser = argparse.ArgumentParser(
        prog="dimr",
        description="Print the configurations of DiMR, or compare the spectra of images.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"dimr: {message}")
    parser.add_argument(
        "images",
        nargs="*",
        help=".npz or .npy files: first the real images, then samples to compare with them",
    )
    parser.add_argument("--stripes", metavar="NPZ", help="write 20,000 striped shapes of 32 pixels")
    options = parser.parse_args(argv)
    if len(options.images) == 1:
        parser.error("the comparison needs real images and samples: two files, or more")

    if options.stripes:
        write_stripes(options.stripes)
    if options.images:
        print_errors(options.images[0], options.images[1:])
    if not options.stripes and not options.images:
        introduce(__doc__, print_configurations)


if __name__ == "__main__":
    run_command(main)
