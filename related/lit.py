"""LiT, linear attention in a trained transformer (arXiv 2501.12976): softmax goes, a depthwise convolution comes, all other weights stay, and what
they knew is distilled from the net as it was. The cost is linear in the number of tokens.

`LiT` is the paper's net, a DiT with that attention; `LinearUViT` is the core's U-ViT with it; `convert` and `hybrid_loss` are the way from one to the other.

    python -m related.lit                                                        # parameters and GMAC of LiT beside DiT
    python -m related.lit --time                                                 # milliseconds of a layer, linear and softmax
    python -m related.lit runs/shapes-32 --steps 800 --out runs/lit              # converts a trained U-ViT, and distills it
    python sample.py runs/lit --guidance 2 --out grid.png
    python train.py --res 32 --model related.lit:LinearUViT --size tiny          # or from scratch
"""

import argparse
import copy
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from data import example_noise, order
from loss import mean_squares
from related.common import check_numbers, one_process, open_pictures
from sample import build_net, checkpoints, drawn_size, in_bf16, load, run_command, to_float
from schedule import diffuse, v_from_x_eps
from train import RECIPES, ema_update, learning_rate, save_checkpoint
from unet import Embedding, attend, count, grid_sizes, to_tokens, zero_init
from uvit import TransformerBlock, UViT


def linear_attention(q, k, v):
    """sum_j phi(q_i) phi(k_j) v_j / sum_j phi(q_i) phi(k_j), phi(x) = max(x, 0) + 1e-6, of (B, heads, N, dim) each, without the N x N matrix."""
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    states = k.mT @ (
        v / k.shape[2]
    )  # (B, heads, dim, dim); 1 / N keeps half precision from overflowing
    total = q @ k.mean(2, keepdim=True).mT  # (B, heads, N, 1)
    return q / total @ states


class LinearAttention(nn.Module):
    """Attention of tokens (B, T, C) to themselves on their grid (H, W), T = H W, linear with a convolution of the values added; kernel 0: softmax, as in DiT.

    The convolution has C / num_heads channels and is the same for all heads. Returns (B, T, C), without norm or residual.
    """

    def __init__(self, channels, num_heads, kernel=5):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads, dim = num_heads, channels // num_heads
        self.q, self.kv, self.proj = (
            nn.Linear(channels, channels),
            nn.Linear(channels, 2 * channels),
            nn.Linear(channels, channels),
        )
        self.dwc = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None

    def forward(self, x, grid):
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, dim)
        k, v = (
            each.transpose(1, 2)
            for each in self.kv(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        )
        if self.dwc is None:
            h = attend(q, k, v)
        else:
            near = self.dwc(v.mT.flatten(0, 1).unflatten(2, grid))  # (B heads, dim, H, W)
            h = linear_attention(q, k, v) + near.flatten(2).unflatten(0, (len(x), -1)).mT
        return self.proj(h.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- the paper's net


class DiTBlock(nn.Module):
    """x + gate1 Attention(norm x), x + gate2 MLP(norm x), both norms modulated by emb (B, C); x: (B, T, C) on a grid. At first the identity."""

    def __init__(self, channels, num_heads, kernel):
        super().__init__()
        self.modulation = zero_init(nn.Linear(channels, 6 * channels))
        self.attention = LinearAttention(channels, num_heads, kernel)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU("tanh"), nn.Linear(4 * channels, channels)
        )
        for layer in (
            self.attention.q,
            self.attention.kv,
            self.attention.proj,
            self.mlp[0],
            self.mlp[2],
        ):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, emb, grid):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, 2)
        norm = lambda x, shift, scale: F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift
        x = x + gate1 * self.attention(norm(x, shift1, scale1), grid)
        return x + gate2 * self.mlp(norm(x, shift2, scale2))


def sine_positions(grid, channels):
    """(H W, C): sines and cosines of the row and of the column, of C / 4 frequencies each."""
    frequencies = 10000.0 ** (-torch.arange(channels // 4) / (channels // 4))
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)  # (side, C / 4)
    of_column, of_row = (torch.cat([angles.sin(), angles.cos()], 1) for angles in (columns, rows))
    return torch.cat(
        [of_column.expand(grid[0], -1, -1), of_row[:, None].expand(-1, grid[1], -1)], 2
    ).flatten(0, 1)


class LiT(nn.Module):
    """DiT with linear attention, or with kernel=0 DiT itself: patches of 2 x 2, `depth` blocks. res: side in pixels, or (height, width). Raises ValueError."""

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
                f"LiT takes even sides and channels divisible by 4, not {height}x{width} and {channels}"
            )
        self.num_classes, self.grid = num_classes, (height // 2, width // 2)
        self.register_buffer("position", sine_positions(self.grid, channels), persistent=False)
        self.embedding = Embedding(num_classes, channels)
        self.patchify = nn.Conv2d(in_channels, channels, 2, stride=2)
        self.blocks = nn.ModuleList(DiTBlock(channels, num_heads, kernel) for _ in range(depth))
        self.modulation = zero_init(nn.Linear(channels, 2 * channels))
        self.head = zero_init(nn.Linear(channels, 4 * (out_channels or in_channels)))

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W) of the built size, logsnr: (B,), label: (B,) int64 or None. Returns v_hat like z."""
        emb = self.embedding(logsnr, label)
        x = to_tokens(self.patchify(z))
        x = x + self.position.to(x.dtype)  # (B, T, C)
        for block in self.blocks:
            x = block(x, emb, self.grid)
        shift, scale = self.modulation(emb)[:, None].chunk(2, 2)
        x = self.head(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift)
        return F.pixel_shuffle(x.mT.unflatten(2, self.grid), 2)


# ---------------------------------------------------------------- the core's U-ViT with linear attention


class LinearBlock(nn.Module):
    """In the place of unet.Attention: norm, linear attention on a grid, + x; without another start, the identity as there."""

    def __init__(self, channels, num_heads, kernel, grid):
        super().__init__()
        self.grid, self.norm, self.attention = (
            grid,
            nn.LayerNorm(channels),
            LinearAttention(channels, num_heads, kernel),
        )
        zero_init(self.attention.proj)

    def forward(self, x):
        return x + self.attention(self.norm(x), self.grid)


class LinearUViT(UViT):
    """uvit.UViT whose self-attention is linear, of linear_heads heads; cross-attention to a text stays. Other fields, and forward: as there."""

    def __init__(self, res, num_classes=1000, linear_heads=2, kernel=5, **fields):
        super().__init__(res, num_classes, **fields)
        grids = grid_sizes(res, fields.get("patching", "none"), len(self.down) + 1)
        for blocks, grid in zip([*self.down, *self.up, self.transformer], [*grids[:-1], *grids]):
            for block in blocks:
                if isinstance(block, TransformerBlock):
                    block.attention = LinearBlock(
                        block.attention.qkv.in_features, linear_heads, kernel, grid
                    )


def convert(net, config, linear_heads=2, kernel=5, inherit="others"):
    """A LinearUViT with the weights of a trained UViT. config: the fields of that UViT.

    inherit: "others" takes all weights but those of the self-attention, bit for bit, as the paper found best; "all" takes its products, too; "none" none. Raises ValueError.
    """
    if inherit not in ("others", "all", "none"):
        raise ValueError(f"inherit {inherit!r} is none of others, all and none")
    new = build_net(
        "related.lit:LinearUViT",
        config | dict(linear_heads=linear_heads, kernel=kernel),
        next(net.parameters()).device,
    )
    own, old = new.state_dict(), net.state_dict()
    if inherit in ("others", "all"):
        own |= {
            name: value for name, value in old.items() if name in own
        }  # products of attention have other names there
    for name in [name for name in own if inherit == "all" and name.endswith(".attention.q.weight")]:
        for kind in ("weight", "bias"):
            qkv, block = (
                old[name.replace("attention.q.weight", f"qkv.{kind}")],
                name.removesuffix("q.weight"),
            )
            own |= {
                f"{block}q.{kind}": qkv[: len(qkv) // 3],
                f"{block}kv.{kind}": qkv[len(qkv) // 3 :],
                f"{block}proj.{kind}": old[name.replace("attention.q.weight", f"out.{kind}")],
            }
    new.load_state_dict(own)
    return new


def hybrid_loss(student, teacher, x, schedule, label=None, *, weight=0.5, t=None, eps=None):
    """||v - v_S||^2 + weight ||v_T - v_S||^2 (arXiv 2501.12976, in v; its nets also predict variances, for which it has a third term). As loss.diffusion_loss."""
    t = torch.rand(len(x), device=x.device) if t is None else t
    eps = torch.randn_like(x) if eps is None else eps
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)
    v_student = student(z, logsnr, label).to(x.dtype)
    loss = mean_squares(v_from_x_eps(x, eps, logsnr) - v_student)
    if weight:
        with torch.no_grad():
            v_teacher = teacher(z, logsnr, label).to(x.dtype)
        loss = loss + weight * mean_squares(v_teacher - v_student)
    return loss, logsnr


LinearUViT.RECIPES = RECIPES["uvit"]  # those of the core, "text" among them

SIZES = {  # channels, depth, heads of DiT and of LiT; heads of B and L are not certain
    "S": (384, 12, 6, 2),
    "B": (768, 12, 12, 3),
    "L": (1024, 24, 16, 4),
    "XL": (1152, 28, 16, 4),
}
CONFIGS = {
    f"{name}-{size}": dict(
        res=32,
        in_channels=4,
        out_channels=8,
        channels=channels,
        depth=depth,
        num_heads=heads,
        kernel=kernel,
    )
    for size, (channels, depth, *both) in SIZES.items()
    for name, heads, kernel in zip(("DiT", "LiT"), both, (0, 5))
}
LiT.RECIPES = {"tiny": {res: dict(channels=128, depth=6) for res in (32, 64)}} | {
    size.lower(): {res: dict(channels=channels, depth=depth, num_heads=heads) for res in (32, 64)}
    for size, (channels, depth, _, heads) in SIZES.items()
}
LiT.TRAINING = {
    (size.lower(), res): dict(batch=256, steps=400_000, lr=1e-4, warmup=0, ema=0.9999)
    for size in SIZES
    for res in (32, 64)
}  # as published


def print_times(seconds=3.0):
    """Milliseconds of one layer of 192 channels for one picture, on one thread of the CPU, each from measurements of so many seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, kernel in (("linear", 5), ("softmax", 0)):
        layer, times = LinearAttention(192, 2, kernel).eval(), []
        for side in (16, 32, 64):
            x = torch.randn(1, side**2, 192)
            with torch.no_grad():
                times.append(
                    1000
                    * Timer("layer(x, (side, side))", globals=locals())
                    .blocked_autorange(min_run_time=seconds)
                    .median
                )
        print(
            f"{name:8s}"
            + ", ".join(f"{side**2} tokens: {ms:.2f} ms" for side, ms in zip((16, 32, 64), times))
            + f"; slope from 1024 to 4096: {math.log(times[2] / times[1], 4):.2f}"
        )
    torch.set_num_threads(threads)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="lit",
        description="The configurations of LiT; or give a trained U-ViT linear attention, and distill it.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"lit: {message}")
    parser.add_argument(
        "run", nargs="?", help="the teacher: a run's folder or a checkpoint of --model uvit"
    )
    parser.add_argument("--out", help="the new run's folder")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument(
        "--weight", type=float, default=0.5, help="of the teacher in the loss; 0 leaves it out"
    )
    parser.add_argument(
        "--inherit",
        default="others",
        choices=["others", "all", "none"],
        help="weights: all but those of attention (default), all, or none",
    )
    parser.add_argument(
        "--data", nargs="+", help="the pictures, where they are not where the run had them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--time",
        action="store_true",
        help="milliseconds of one layer of 192 channels, linear and softmax, on one thread of the CPU",
    )
    options = parser.parse_args(argv)
    check_numbers(options, ("steps", "batch", "heads"), ("seed",))
    if not (0 < options.lr < math.inf and 0 <= options.weight < math.inf):
        raise ValueError("--lr must be above 0, --weight from 0 on")
    if options.time:
        return print_times()
    if not options.run:
        for name, config in CONFIGS.items():
            counts = [count(LiT, config | dict(res=res)) for res in (32, 64, 128)]
            print(
                f"{name:6s} {counts[0][0]:12,d} parameters, at 256, 1024 and 4096 tokens "
                + ", ".join(f"{macs / 1e9:7.2f}" for _, macs, _ in counts)
                + " GMAC per picture"
            )
        return
    if not options.out:
        parser.error("--out is missing: the new run's folder")
    device = one_process(options.device)
    teacher, config, schedule = load(options.run, device)
    if config["model"] != "uvit":
        raise ValueError(
            f"{options.run} is a run of --model {config['model']}: only uvit can be converted"
        )
    if config.get("captions") is not None or drawn_size(config)[1]:
        raise ValueError(
            f"{options.run} was trained on texts or latents: only a net for pictures with labels, or without, can be converted"
        )
    if os.path.isdir(options.out) and checkpoints(options.out):
        raise ValueError(f"{options.out} holds a run: choose another --out, or delete it")
    os.makedirs(options.out, exist_ok=True)
    config |= dict(data=options.data or config["data"])
    data = open_pictures(config, device)
    if data.classes != config["classes"]:
        raise ValueError(
            f"the pictures have other classes ({', '.join(data.classes[:20])}) than those {options.run} was trained on"
        )
    torch.manual_seed(options.seed)
    student = convert(teacher, config["model_args"], options.heads, inherit=options.inherit)
    config |= dict(
        model="related.lit:LinearUViT",
        model_args=config["model_args"] | dict(linear_heads=options.heads),
        loss=None,
    )
    config |= {key: getattr(options, key) for key in ("steps", "batch", "lr", "seed")}
    average = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(
        student.parameters(), options.lr, betas=(0.9, 0.99), eps=1e-12, fused=True
    )
    nets, begun, part = (
        [in_bf16(net, config["bf16"]) for net in (student, teacher)],
        time.time(),
        range(options.batch),
    )
    for step, pictures in zip(
        range(options.steps), order(len(data), options.seed, options.batch, 0, [part])
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.lr, 50, 0.5, options.steps)
        x, label = (tensor.to(device) for tensor in data[pictures])
        u, eps = example_noise(options.seed, step, part, x.shape[1:], device)
        label = torch.where(u[:, 0] < config["label_drop"], len(data.classes), label)
        if config["flip"]:
            x = torch.where(u[:, 1, None, None, None] < 0.5, x.flip(3), x)
        loss = hybrid_loss(
            *nets, to_float(x), schedule, label, weight=options.weight, t=u[:, 2], eps=eps
        )[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(average, student, min(0.99, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            print(
                f"step {step + 1}/{options.steps}  loss {loss.item():.4f}  {(step + 1) * options.batch / (time.time() - begun):.0f} img/s",
                flush=True,
            )
    saved = dict(
        config=config,
        step=options.steps,
        images=options.steps * options.batch,
        net=dict(student.state_dict()),
        ema=dict(average.state_dict()),
        optimizer=optimizer.state_dict(),
    )
    save_checkpoint(options.out, 1, saved)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
