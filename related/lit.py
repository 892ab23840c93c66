"""LiT (Wang, Kang, Yao, ..., Luo 2025, arXiv 2501.12976): a linear diffusion transformer.

The cost of softmax attention is quadratic in the number of tokens. LiT replaces it by linear
attention plus a depthwise convolution of the values, with few heads. The new network inherits all
other weights from the trained one, and it learns from the data and from the predictions of the
trained network ("hybrid distillation"). A fifth of the training steps is then enough.

`LiT` is the paper's network, a DiT (arXiv 2212.09748) with linear attention. `LinearUViT` is the
core's U-ViT with it. `convert` and `hybrid_loss` lead from a trained U-ViT to a LinearUViT.

    python -m related.lit             # parameters and GMAC of LiT and DiT
    python -m related.lit --time      # milliseconds of a layer, linear and softmax
    python -m related.lit assets/shapes32.pt --steps 800 --out runs/lit        # convert and distill
    python sample.py runs/lit --guidance 2 --out grid.png
    python train.py --res 32 --model related.lit:LinearUViT --size tiny    # or train from scratch
"""

import argparse
import math
import os
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import mean_squares
from related.common import (
    check_numbers,
    fit,
    milliseconds,
    one_process,
    open_images,
    progress_printer,
)
from schedule import diffuse, v_from_x_eps
from support.checkpoint import build_net, list_checkpoints, load, sample_size, save_checkpoint
from support.data import image_order, load_batch
from support.recipes import RECIPES
from support.runtime import in_bf16, run_command
from train import drop_labels, training_step
from unet import Embedding, attend, count, grid_sizes, to_tokens, zero_init
from uvit import TransformerBlock, UViT

# ---------------------------------------------------------------- linear attention


def linear_attention(q, k, v):
    """Return sum_j phi(q_i) phi(k_j) v_j / sum_j phi(q_i) phi(k_j), with phi(x) = relu(x) + 1e-6.

    q, k, v: (B, heads, N, dim). The N x N matrix of weights is never computed.
    """
    # The kernel phi makes all weights positive, as softmax does.
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6

    # Sum over j first: one dim x dim matrix per head. Dividing by N avoids overflow in float16.
    states = k.mT @ (v / k.shape[2])  # (B, heads, dim, dim)
    total = q @ k.mean(2, keepdim=True).mT  # (B, heads, N, 1), also divided by N
    return q / total @ states


class LinearAttention(nn.Module):
    """Self-attention of tokens (B, T, C) on a grid (H, W) with T = H W, without norm or residual.

    kernel: side of the depthwise convolution; 0: softmax attention instead, as in DiT.
    """

    def __init__(self, channels, num_heads, kernel=5):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided into {num_heads} heads")
        self.num_heads = num_heads
        dim = channels // num_heads
        # No QK-norm, unlike unet.Attention: the weights are those of DiT.
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        # One convolution of dim channels, shared by all heads.
        self.dwc = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None

    def forward(self, x, grid):
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, dim)
        kv = self.kv(x).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)  # (B, heads, T, dim) each
        if self.dwc is None:
            h = attend(q, k, v)
        else:
            # Linear attention ignores positions. The convolution of the values restores locality.
            near = self.dwc(v.mT.flatten(0, 1).unflatten(2, grid))  # (B heads, dim, H, W)
            near = near.flatten(2).unflatten(0, (len(x), -1)).mT  # (B, heads, T, dim)
            h = linear_attention(q, k, v) + near
        return self.proj(h.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- the paper's network


def modulated_norm(x, shift, scale):
    """adaLN: a LayerNorm without weights, then scale and shift. x: (B, T, C)."""
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero. x: (B, T, C). emb: (B, C). At first the identity."""

    def __init__(self, channels, num_heads, kernel):
        super().__init__()
        self.modulation = zero_init(nn.Linear(channels, 6 * channels))
        self.attention = LinearAttention(channels, num_heads, kernel)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU("tanh"), nn.Linear(4 * channels, channels)
        )
        # Initialize the linear layers as DiT does.
        attention = self.attention
        for layer in (attention.q, attention.kv, attention.proj, self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, emb, grid):
        # Six vectors (B, 1, C), 0 at first, modulate the two branches.
        vectors = self.modulation(emb)[:, None].chunk(6, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        # x + gate1 Attention(norm(x)), then x + gate2 MLP(norm(x)).
        x = x + gate1 * self.attention(modulated_norm(x, shift1, scale1), grid)
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))


def rope_angles(grid, dim):
    """Return angles (H W, dim / 2) of the positions of a grid (H, W), also for vitok.

    The first half is proportional to the row, the other half to the column.
    """
    # Geometric frequencies from 1 to about 1 / 10000, as many for rows as for columns.
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)  # (side, dim / 4)
    rows = rows[:, None].expand(-1, grid[1], -1)  # (H, W, dim / 4)
    columns = columns.expand(grid[0], -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def sine_positions(grid, channels):
    """Return the fixed position embedding of a grid (H, W), shape (H W, channels).

    Sines and cosines of the column, then of the row, with channels / 4 frequencies each.
    """
    rows, columns = rope_angles(grid, channels).chunk(2, 1)  # (H W, C / 4) each
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)


class LiT(nn.Module):
    """DiT with linear attention, or with kernel=0 DiT itself. The patches have 2 x 2 pixels.

    res: side of the image in pixels, or (height, width). depth: number of blocks. Raises ValueError
    for odd sides and for channels that are not divisible by 4.
    """

    def __init__(
        self,
        res,
        num_classes=1000,
        channels=384,
        depth=12,
        num_heads=2,
        kernel=5,
        in_channels=3,
        out_channels=None,
    ):
        super().__init__()
        height, width = (res, res) if isinstance(res, int) else res
        if height % 2 or width % 2 or channels % 4:
            raise ValueError(
                "LiT needs even sides and channels divisible by 4, "
                f"not {height}x{width} and {channels}"
            )
        self.num_classes = num_classes
        self.grid = (height // 2, width // 2)
        self.register_buffer("position", sine_positions(self.grid, channels), persistent=False)
        self.embedding = Embedding(num_classes, channels)
        self.patchify = nn.Conv2d(in_channels, channels, 2, stride=2)
        self.blocks = nn.ModuleList(DiTBlock(channels, num_heads, kernel) for _ in range(depth))
        self.modulation = zero_init(nn.Linear(channels, 2 * channels))
        self.head = zero_init(nn.Linear(channels, 4 * (out_channels or in_channels)))

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W). logsnr: (B,). label: (B,) int64 or None. Returns v_hat."""
        # Patches become tokens, with fixed positions.
        emb = self.embedding(logsnr, label)  # (B, C)
        x = to_tokens(self.patchify(z))
        x = x + self.position.to(x.dtype)  # (B, T, C)
        for block in self.blocks:
            x = block(x, emb, self.grid)

        # Each token predicts the 2 x 2 pixels of its patch.
        shift, scale = self.modulation(emb)[:, None].chunk(2, 2)
        x = self.head(modulated_norm(x, shift, scale))  # (B, T, 4 out_channels)
        return F.pixel_shuffle(x.mT.unflatten(2, self.grid), 2)


# ---------------------------------------------------------------- the U-ViT with linear attention


class LinearBlock(nn.Module):
    """A replacement of unet.Attention: norm, linear attention, residual. At first the identity."""

    def __init__(self, channels, num_heads, kernel, grid):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.attention = LinearAttention(channels, num_heads, kernel)
        zero_init(self.attention.proj)

    def forward(self, x):
        return x + self.attention(self.norm(x), self.grid)


class LinearUViT(UViT):
    """A U-ViT whose self-attention is linear. Cross-attention to a text stays as it is.

    linear_heads: heads of the linear attention. kernel: see LinearAttention. Other arguments are
    those of uvit.UViT.
    """

    def __init__(self, res, num_classes=1000, linear_heads=2, kernel=5, **fields):
        super().__init__(res, num_classes, **fields)
        grids = grid_sizes(res, fields.get("patching", "none"), len(self.down) + 1)
        # Each level, and the size of its feature maps.
        levels = [*self.down, *self.up, self.transformer]
        for blocks, grid in zip(levels, [*grids[:-1], *grids]):
            for block in blocks:
                if isinstance(block, TransformerBlock):
                    channels = block.attention.qkv.in_features
                    block.attention = LinearBlock(channels, linear_heads, kernel, grid)


def split_attention(old, name):
    """Return the weights of one LinearAttention that a softmax attention has, too.

    old: state dict of the U-ViT. name: prefix of the LinearAttention, "...attention.attention.".
    """
    softmax = name.removesuffix("attention.")
    new = {}
    for kind in ("weight", "bias"):
        qkv = old[f"{softmax}qkv.{kind}"]
        third = len(qkv) // 3
        new[f"{name}q.{kind}"] = qkv[:third]
        new[f"{name}kv.{kind}"] = qkv[third:]
        new[f"{name}proj.{kind}"] = old[f"{softmax}out.{kind}"]
    return new


def convert(net, config, linear_heads=2, kernel=5, inherit="others"):
    """Return a LinearUViT with weights of a trained UViT. config: the arguments of that UViT.

    inherit: "others" copies all weights except those of self-attention, which the paper found to be
    best; "all" also copies its linear layers; "none" copies nothing. Raises ValueError for others.
    """
    if inherit not in ("others", "all", "none"):
        raise ValueError(f"inherit {inherit!r} must be others, all or none")
    fields = config | dict(linear_heads=linear_heads, kernel=kernel)
    new = build_net("related.lit:LinearUViT", fields, next(net.parameters()).device)
    weights, old = new.state_dict(), net.state_dict()

    # The layers of the two kinds of attention have different names, so equal names are the others.
    if inherit != "none":
        weights |= {name: value for name, value in old.items() if name in weights}
    if inherit == "all":
        for name in list(weights):
            if name.endswith(".attention.attention.q.weight"):
                weights |= split_attention(old, name.removesuffix("q.weight"))
    new.load_state_dict(weights)
    return new


# ---------------------------------------------------------------- hybrid distillation


def hybrid_loss(student, teacher, x, schedule, label=None, *, weight=0.5, t=None, eps=None):
    """||v - v_S||^2 + weight ||v_T - v_S||^2: the loss on the data, and on the teacher.

    The paper has these terms for eps, and a third one for the predicted variance, which our nets do
    not have. Other arguments and results are those of loss.diffusion_loss.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if eps is None:
        eps = torch.randn_like(x)
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)

    # The usual loss of the student.
    v_student = student(z, logsnr, label).to(x.dtype)
    loss = mean_squares(v_from_x_eps(x, eps, logsnr) - v_student)

    # The teacher predicts from the same z. It is frozen.
    if weight:
        with torch.no_grad():
            v_teacher = teacher(z, logsnr, label).to(x.dtype)
        loss = loss + weight * mean_squares(v_teacher - v_student)
    return loss, logsnr


def distill(student, teacher, optimizer, data, config, schedule, weight, device):
    """Train the student in place. Return a copy with EMA weights.

    optimizer: for the student. config: settings of the new run. weight: of the teacher in the loss.
    """
    positions = range(config["batch"])
    # The same images and the same noise as a run of train.py with this seed.
    indices = image_order(len(data), config["seed"], config["batch"], 0, [positions])
    model, teacher = in_bf16(student, config["bf16"]), in_bf16(teacher, config["bf16"])
    condition = partial(drop_labels, config=config)

    def loss_fn(net, x, schedule, label, *, t, eps):
        return hybrid_loss(net, teacher, x, schedule, label, weight=weight, t=t, eps=eps)

    def gradients(step):
        # One batch. Noise, flips and dropped labels depend on (seed, step, position).
        images, labels = load_batch(data, next(indices))
        loss, _ = training_step(
            model,
            images.to(device),
            labels.to(device),
            positions,
            loss_fn=loss_fn,
            schedule=schedule,
            seed=config["seed"],
            step=step,
            flip=config["flip"],
            condition=condition,
        )
        return loss.mean()

    report = progress_printer(config["steps"], config["batch"], "loss {:.4f}")
    return fit(
        student,
        gradients,
        steps=config["steps"],
        lr=config["lr"],
        optimizer=optimizer,
        report=report,
    )


# ---------------------------------------------------------------- configurations

LinearUViT.RECIPES = RECIPES["uvit"]  # those of the core, "text" among them

# Channels, depth, heads of DiT, heads of LiT. The heads of LiT-B and LiT-L are not certain.
SIZES = {
    "S": (384, 12, 6, 2),
    "B": (768, 12, 12, 3),
    "L": (1024, 24, 16, 4),
    "XL": (1152, 28, 16, 4),
}


def _published(size, linear):
    """Return the arguments of LiT for LiT or DiT of a size, on 32x32 latents with 4 channels."""
    channels, depth, softmax_heads, linear_heads = SIZES[size]
    fields = dict(res=32, in_channels=4, out_channels=8, channels=channels, depth=depth)
    if linear:
        return dict(fields, num_heads=linear_heads, kernel=5)
    return dict(fields, num_heads=softmax_heads, kernel=0)


CONFIGS = {
    f"{name}-{size}": _published(size, linear=name == "LiT")
    for size in SIZES
    for name in ("DiT", "LiT")
}

# The sizes for train.py: the same networks on images, and a tiny one of ours. The training is the
# published one.
LiT.RECIPES = {"tiny": {res: dict(channels=128, depth=6) for res in (32, 64)}} | {
    size.lower(): {res: dict(channels=channels, depth=depth, num_heads=heads) for res in (32, 64)}
    for size, (channels, depth, _, heads) in SIZES.items()
}
LiT.TRAINING = {
    (size.lower(), res): dict(batch=256, steps=400_000, lr=1e-4, warmup=0, ema=0.9999)
    for size in SIZES
    for res in (32, 64)
}


def print_configurations():
    """Print parameters and multiply-accumulates of LiT and DiT, for three numbers of tokens."""
    for name, config in CONFIGS.items():
        counts = [count(LiT, config | dict(res=res)) for res in (32, 64, 128)]
        gmac = ", ".join(f"{macs / 1e9:7.2f}" for _, macs, _ in counts)
        print(
            f"{name:6s} {counts[0][0]:12,d} parameters, "
            f"at 256, 1024 and 4096 tokens {gmac} GMAC per image"
        )


def print_times(seconds=3.0):
    """Print the time of a layer of 192 channels for one image, linear and softmax."""
    sides = (16, 32, 64)
    for name, kernel in (("linear", 5), ("softmax", 0)):
        layer = LinearAttention(192, 2, kernel).eval()
        times = [
            milliseconds(layer, torch.randn(1, side**2, 192), (side, side), seconds=seconds)
            for side in sides
        ]
        text = ", ".join(f"{side**2} tokens: {ms:.2f} ms" for side, ms in zip(sides, times))
        # The slope is the exponent of the cost: 1 is linear in the number of tokens.
        slope = math.log(times[2] / times[1], 4)
        print(f"{name:8s}{text}; slope from 1024 to 4096: {slope:.2f}")


# ---------------------------------------------------------------- the command


def load_teacher(path, device):
    """Return (net, config, schedule) of a run of --model uvit on images. Raises ValueError."""
    teacher, config, schedule = load(path, device)
    if config["model"] != "uvit":
        raise ValueError(
            f"{path} is a run of --model {config['model']}: only uvit can be converted"
        )
    if config.get("captions") is not None or sample_size(config)[1]:
        raise ValueError(
            f"{path} was trained on texts or latents: "
            "only runs on images, with labels or without, can be converted"
        )
    return teacher, config, schedule


def convert_run(options):
    """Convert a run of train.py, distill it, and write a new run. Raises ValueError."""
    device = one_process(options.device)
    teacher, config, schedule = load_teacher(options.run, device)
    if os.path.isdir(options.out) and list_checkpoints(options.out):
        raise ValueError(f"{options.out} holds a run: choose another --out, or delete it")
    os.makedirs(options.out, exist_ok=True)
    data = open_images(config | dict(data=options.data or config["data"]), device)
    if data.classes != config["classes"]:
        raise ValueError(
            f"the images have other classes ({', '.join(data.classes[:20])}) "
            f"than those of {options.run}"
        )

    # The student starts from the weights of the teacher.
    torch.manual_seed(options.seed)
    student = convert(teacher, config["model_args"], options.heads, inherit=options.inherit)
    config |= dict(
        data=options.data or config["data"],
        model="related.lit:LinearUViT",
        model_args=config["model_args"] | dict(linear_heads=options.heads),
        loss=None,
    )
    config |= {key: getattr(options, key) for key in ("steps", "batch", "lr", "seed")}
    optimizer = torch.optim.Adam(
        student.parameters(), options.lr, betas=(0.9, 0.99), eps=1e-12, fused=True
    )
    ema_net = distill(student, teacher, optimizer, data, config, schedule, options.weight, device)

    # A checkpoint of train.py, which can continue the run without the teacher.
    state = dict(config=config, step=options.steps, images=options.steps * options.batch)
    state |= dict(net=dict(student.state_dict()), ema=dict(ema_net.state_dict()))
    state |= dict(optimizer=optimizer.state_dict())
    save_checkpoint(options.out, 1, state)
    print(f"wrote {options.out}")


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="lit",
        description="Print the configurations of LiT, or convert and distill a trained U-ViT.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"lit: {message}")
    add = parser.add_argument
    add("run", nargs="?", help="the teacher: a folder or checkpoint of train.py --model uvit")
    add("--out", help="the folder of the new run")
    add("--steps", type=int, default=800, help="training steps")
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3, help="learning rate")
    add("--heads", type=int, default=2, help="heads of the linear attention")
    add("--weight", type=float, default=0.5, help="of the teacher in the loss; 0: no teacher")
    inherit = "weights to copy: all but those of attention (default), all, or none"
    add("--inherit", default="others", choices=["others", "all", "none"], help=inherit)
    add("--data", nargs="+", help="the images, if they have moved since the run")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--time", action="store_true", help="milliseconds of one layer on one CPU thread")
    return parser


def main(argv=None):
    """Parse the options, then convert a run, or print costs."""
    parser = make_parser()
    options = parser.parse_args(argv)
    check_numbers(options, ("steps", "batch", "heads"), ("seed",))
    if not (0 < options.lr < math.inf and 0 <= options.weight < math.inf):
        raise ValueError("--lr must be above 0, and --weight must be 0 or more")
    if options.time:
        return print_times()
    if not options.run:
        return print_configurations()
    if not options.out:
        parser.error("--out is missing: the folder of the new run")
    convert_run(options)


if __name__ == "__main__":
    run_command(main)
