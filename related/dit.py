"""DiT (Peebles and Xie 2022, arXiv 2212.09748): a transformer on patches, without a U.

The noise level and the label modulate the norms of every block ("adaLN-zero"). DiT is the network
that LiT converts, that T-Stitch stitches and that DiCo is compared with; it also shares parts with
them. As an option it predicts the variance of a reverse step, as the authors' networks do.

    python -m related.dit            # parameters and GMAC of the published configurations
    python train.py --res 32 --model related.dit:DiT --size tiny --out runs/dit
    python train.py --res 32 --model related.dit:DiT --size tiny --out runs/dit-variance \\
        --model-args '{"learned_variance": true}' --loss related.dit:learned_variance_loss
    python sample.py runs/dit --guidance 2 --out grid.png
"""

import argparse
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import mean_squares
from related.common import introduce
from schedule import alpha_sigma, diffuse, posterior, v_from_x_eps, x_from_v
from support.runtime import run_command
from unet import attend, count, to_tokens, zero_init

# ---------------------------------------------------------------- time and label
# DiCo and LiT have the same ones.


def time_of(logsnr):
    """Map logsnr (B,) from 20 to -20 linearly to a time from 0 to 999, the range of the paper."""
    # The paper's time is the number of a step of its schedule. Our networks do not know the
    # schedule. Noisier images have larger times in both cases.
    return 999.0 * (20.0 - logsnr) / 40.0


def time_features(time):
    """Return 256 sinusoidal features (B, 256) of times (B,): the cosines, then the sines."""
    index = torch.arange(128, dtype=time.dtype, device=time.device)
    angles = time[:, None] * torch.exp(index * (-math.log(10000.0) / 128))  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Condition(nn.Module):
    """Embed the time and the label as one vector (B, channels)."""

    # It cannot be unet.Embedding: its frequencies, the order of its features and its activation are
    # those of the published code.

    def __init__(self, channels, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.dense1 = nn.Linear(256, channels)
        self.dense2 = nn.Linear(channels, channels)
        self.label = nn.Embedding(num_classes + 1, channels)  # the last row is the null label

    def forward(self, time, label=None):
        """time: (B,), from 0 to 999. label: (B,) int64, or None for the null label."""
        if label is None:
            label = torch.full(time.shape, self.num_classes, device=time.device)
        # float32 also under bfloat16 autocast, and float64 after net.double().
        dtype = torch.promote_types(self.dense1.weight.dtype, torch.float32)
        features = time_features(time.to(dtype))  # (B, 256)
        return self.dense2(F.silu(self.dense1(features))) + self.label(label)


def initialize(net, layers):
    """Initialize a network as the published code does. layers: the types of its ordinary layers."""
    # Xavier-uniform weights and zero biases.
    for module in net.modules():
        if isinstance(module, layers):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    # Small normal weights for the embeddings.
    for module in net.modules():
        if isinstance(module, Condition):
            nn.init.normal_(module.dense1.weight, std=0.02)
            nn.init.normal_(module.dense2.weight, std=0.02)
            nn.init.normal_(module.label.weight, std=0.02)

    # adaLN-zero: at initialization every block is the identity.
    for module in net.modules():
        if hasattr(module, "modulation"):
            zero_init(module.modulation)


# ---------------------------------------------------------------- positions


def rope_angles(grid, dim):
    """Return angles (N, dim / 2) of the N positions of a grid, also for vitok.

    grid: (H, W), or (T, H, W) for video. The first angles are proportional to the position along
    the first axis, and so on. Each axis has the same number of angles. If it does not divide, the
    first axes have one more: dim = 64 and three axes give 11, 11 and 10. Raises ValueError if there
    are fewer angles than axes.
    """
    pairs, axes = dim // 2, len(grid)
    if pairs < axes:
        raise ValueError(f"heads of {dim} channels are too small for positions on {axes} axes")
    positions = torch.meshgrid(*[torch.arange(side) for side in grid], indexing="ij")
    angles = []
    for axis in range(axes):
        # Geometric frequencies from 1 to about 1 / 10000.
        n = pairs // axes + (axis < pairs % axes)
        frequencies = 10000.0 ** (-torch.arange(n) / n)
        angles.append(positions[axis].flatten()[:, None] * frequencies)  # (N, n)
    return torch.cat(angles, 1)


def rotated(x, angles):
    """Rotate pairs of channels, for vitok. x: (..., N, dim); angles: rope_angles, (N, dim / 2)."""
    # A pair has one channel of the first half and one of the second half. The products of rotated
    # queries and keys depend on differences of positions only.
    a, b = x.chunk(2, -1)
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def sine_positions(grid, channels):
    """Return the fixed position embedding of a grid (H, W), shape (H W, channels).

    Sines and cosines of the column, then of the row, with channels / 4 frequencies each.
    """
    rows, columns = rope_angles(grid, channels).chunk(2, 1)  # (H W, C / 4) each
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)


# ---------------------------------------------------------------- the network


class Attention(nn.Module):
    """Softmax self-attention of tokens x (B, T, C), without norm or residual."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x, grid):
        """grid: (H, W) of the tokens. Softmax attention does not need it, other kinds do."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, dim)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, T, dim) each
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def modulated_norm(x, shift, scale):
    """adaLN: a LayerNorm without weights, then scale and shift. x: (B, T, C)."""
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and an MLP with adaLN-zero. At initialization it is the identity.

    attention: a module, h = attention(x, grid) for tokens x (B, T, C).
    """

    def __init__(self, channels, attention):
        super().__init__()
        self.modulation = nn.Linear(channels, 6 * channels)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU("tanh"), nn.Linear(4 * channels, channels)
        )

    def forward(self, x, condition, grid):
        """x: (B, T, C). condition: (B, C). grid: (H, W) with T = H W."""
        # Six vectors (B, 1, C), 0 at first, modulate the two branches.
        vectors = self.modulation(F.silu(condition))[:, None].chunk(6, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        # x + gate1 Attention(norm(x)), then x + gate2 MLP(norm(x)).
        x = x + gate1 * self.attention(modulated_norm(x, shift1, scale1), grid)
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))


class DiT(nn.Module):
    """The network.

    res: side of the image in pixels, or (height, width). depth: number of blocks. patch: side of a
    patch in pixels. learned_variance: also predict variances. attention: makes the attention of a
    block from (channels, num_heads). Raises ValueError for sides that the patches do not divide,
    and for channels that are not divisible by 4.
    """

    def __init__(
        self,
        res,
        num_classes=1000,
        channels=384,
        depth=12,
        num_heads=6,
        patch=2,
        in_channels=3,
        learned_variance=False,
        attention=Attention,
    ):
        super().__init__()
        height, width = (res, res) if isinstance(res, int) else res
        if height % patch or width % patch or channels % 4:
            raise ValueError(
                f"{type(self).__name__} needs sides divisible by the patch and channels divisible "
                f"by 4, not {height}x{width} px, patches of {patch} and {channels} channels"
            )
        self.num_classes = num_classes
        self.patch = patch
        self.grid = (height // patch, width // patch)
        self.register_buffer("position", sine_positions(self.grid, channels), persistent=False)
        self.condition = Condition(channels, num_classes)
        self.patchify = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.blocks = nn.ModuleList(
            DiTBlock(channels, attention(channels, num_heads)) for _ in range(depth)
        )
        self.modulation = nn.Linear(channels, 2 * channels)
        out_channels = 2 * in_channels if learned_variance else in_channels
        self.head = nn.Linear(channels, patch**2 * out_channels)

        # The patches are a linear layer, too. The prediction is 0 at first.
        initialize(self, nn.Linear)
        nn.init.xavier_uniform_(self.patchify.weight.data.flatten(1))
        nn.init.zeros_(self.patchify.bias)
        zero_init(self.head)

    def forward(self, z, logsnr, label=None, variance=False):
        """z: (B, in_channels, H, W). logsnr: (B,). label: (B,) int64 or None. Returns v_hat.

        variance: also return the predicted variance, like z: 0 stands for the lower bound of the
        variance of a reverse step and 1 for the upper bound, see schedule.posterior.
        """
        out = self.at_time(z, time_of(logsnr), label)
        if not variance:
            return out[:, : z.shape[1]]
        if out.shape[1] != 2 * z.shape[1]:
            raise ValueError(
                "this DiT predicts no variance: use --model-args '{\"learned_variance\": true}'"
            )
        # The network predicts from -1 to 1, as the published one does. It is free to leave that.
        v_hat, fraction = out.chunk(2, 1)
        return v_hat, (fraction + 1) / 2

    def at_time(self, z, time, label=None):
        """Return all outputs (B, in_channels or 2 in_channels, H, W) at times (B,) from 0 to 999.

        The second half, if there is one, stands for the variance.
        """
        # Patches become tokens, with fixed positions.
        condition = self.condition(time, label)  # (B, C)
        x = to_tokens(self.patchify(z))
        x = x + self.position.to(x.dtype)  # (B, T, C)
        for block in self.blocks:
            x = block(x, condition, self.grid)

        # Each token predicts the pixels of its patch: its rows, their columns, their channels.
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, 2)
        x = self.head(modulated_norm(x, shift, scale))  # (B, T, patch^2 out_channels)
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, self.grid)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, out_channels, rows, patch, columns, patch)
        return x.flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------- learned variances


def variance_bits(z, x, v_hat, fraction, logsnr_t, logsnr_s):
    """KL(q(z_s | z_t, x) || p(z_s | z_t)) of a reverse step, in bits per dimension. Returns (B,).

    This is the term "vb" of improved DDPM (arXiv 2102.09672). z, x, v_hat: (B, C, H, W), z at
    logsnr_t. fraction: like z, the predicted variance. logsnr_t < logsnr_s: (B,).
    """
    # Eq. 3: the true posterior, and the one with the predicted image instead of x.
    mean, log_var_min, log_var_max = posterior(z, x, logsnr_t, logsnr_s)
    mean_hat, _, _ = posterior(z, x_from_v(z, v_hat, logsnr_t), logsnr_t, logsnr_s)

    # Interpolate between the bounds of the variance, in log space.
    log_var = fraction * log_var_max + (1 - fraction) * log_var_min

    # The KL divergence of two normal distributions. The true variance is the lower bound.
    difference = log_var_min - log_var
    squares = (mean - mean_hat).square() * torch.exp(-log_var)
    nats = 0.5 * (torch.exp(difference) - 1 - difference + squares)
    return nats.mean((1, 2, 3)) / math.log(2)


def loss_of_prediction(v_hat, fraction, z, x, eps, t, schedule, space="v", steps=1000):
    """The loss of a prediction from z at times t >= 1 / steps. Returns (B,).

    v_hat, fraction: like z; see DiT.forward. space: "v" or "eps" for the squared error, see
    loss.diffusion_loss. steps: the bound is that of a reverse step of length 1 / steps.
    """
    logsnr = schedule(t)
    error = v_from_x_eps(x, eps, logsnr) - v_hat
    if space == "eps":
        alpha, _ = alpha_sigma(logsnr, like=x)
        error = alpha * error

    # The bound trains the variance alone: the mean is detached, as in improved DDPM.
    bits = variance_bits(z, x, v_hat.detach(), fraction, logsnr, schedule(t - 1 / steps))
    return mean_squares(error) + bits


def learned_variance_loss(net, x, schedule, label=None, *, t=None, eps=None, steps=1000):
    """The v loss, plus the bound of a reverse step, for a net with learned_variance.

    Other arguments and results are those of loss.diffusion_loss.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if eps is None:
        eps = torch.randn_like(x)
    # There is no reverse step to a time below 0.
    t = t.clamp(min=1 / steps)
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)
    v_hat, fraction = (output.to(x.dtype) for output in net(z, logsnr, label, variance=True))
    return loss_of_prediction(v_hat, fraction, z, x, eps, t, schedule, steps=steps), logsnr


# ---------------------------------------------------------------- configurations

# Channels, depth, heads; then the published millions of parameters and the published GMAC.
SIZES = {
    "S": (384, 12, 6, 33, 6.06),
    "B": (768, 12, 12, 130, 23.01),
    "L": (1024, 24, 16, 458, 80.71),
    "XL": (1152, 28, 16, 675, 118.64),
}

# The published networks have patches of 2 and work on 32x32 latents with 4 channels.
LATENT = dict(res=32, in_channels=4, learned_variance=True)
CONFIGS = {
    size: dict(LATENT, channels=channels, depth=depth, num_heads=heads)
    for size, (channels, depth, heads, *_) in SIZES.items()
}

# The sizes for train.py: the same networks on images, with the published training, and a tiny one
# of ours with larger patches.
TINY = dict(channels=128, depth=6, patch=4)
DiT.RECIPES = {"tiny": {res: dict(TINY, num_heads=4) for res in (32, 64)}} | {
    size.lower(): {res: dict(channels=channels, depth=depth, num_heads=heads) for res in (32, 64)}
    for size, (channels, depth, heads, *_) in SIZES.items()
}
DiT.TRAINING = {
    (size.lower(), res): dict(batch=256, steps=400_000, lr=1e-4, warmup=0, ema=0.9999)
    for size in SIZES
    for res in (32, 64)
}


def count_by_depth(network, config):
    """Return what unet.count does, in a fraction of its time: for a DiT, or a class like it."""
    # All blocks cost the same, so networks of one and of two blocks tell what any depth costs.
    one, two = (count(network, config | dict(depth=depth)) for depth in (1, 2))
    return [a + (config["depth"] - 1) * (b - a) for a, b in zip(one, two)]


def print_configurations():
    """Print parameters and multiply-accumulates of the published configurations."""
    for size, config in CONFIGS.items():
        parameters, macs, _ = count_by_depth(DiT, config)
        *_, published, published_gmac = SIZES[size]
        print(
            f"DiT-{size + '/2':5s} {parameters:12,d} parameters ({published} M published), "
            f"{macs / 1e9:7.2f} GMAC per image ({published_gmac:g} published)"
        )


# ---------------------------------------------------------------- the command


def main(argv=None):
    """Print the configurations."""
    parser = argparse.ArgumentParser(
        prog="dit", description="Print the configurations of DiT.", allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"dit: {message}")
    parser.parse_args(argv)
    introduce(__doc__, print_configurations)


if __name__ == "__main__":
    run_command(main)
