"""LiT (Wang, Kang, Yao, ..., Luo 2025, arXiv 2501.12976): a linear diffusion transformer.

The cost of softmax attention is quadratic in the number of tokens. LiT replaces it by linear
attention plus a depthwise convolution of the values, with few heads. The new network inherits all
other weights from the trained one, and it learns from the data and from the predictions of the
trained network ("hybrid distillation"). A fifth of the training steps is then enough.

`LiT` is the paper's network, a DiT (dit.py) with linear attention. `LinearUViT` is the core's U-ViT
with it. `convert` and `hybrid_loss` lead from a trained DiT to a LiT, and from a trained U-ViT to a
LinearUViT.

    python -m related.lit             # parameters and GMAC of LiT and DiT
    python -m related.lit --time      # milliseconds of a layer, linear and softmax
    python -m related.lit assets/shapes32.pt --steps 800 --out runs/lit        # convert and distill
    python -m related.lit dit-xl.pt --data z.npz --heads 4 --lr 1e-4 --out runs/lit-xl    # latents
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
    check_classes,
    check_numbers,
    fit,
    introduce,
    milliseconds,
    one_process,
    open_images,
    progress_printer,
)
from related.dit import CONFIGS as DIT_CONFIGS
from related.dit import TINY, Attention, DiT, count_by_depth, loss_of_prediction
from schedule import alpha_sigma, diffuse, v_from_x_eps
from support.checkpoint import build_net, list_checkpoints, load, save_checkpoint
from support.data import image_order, load_batch
from support.heldout import training_part
from support.recipes import RECIPES
from support.runtime import in_bf16, run_command
from support.settings import DEFAULTS, absolute_paths
from train import drop_labels, training_step
from unet import grid_sizes, zero_init
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

    kernel: side of the depthwise convolution; 0: none, for an ablation.
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
        h = linear_attention(q, k, v)
        # Linear attention ignores positions. The convolution of the values restores locality.
        if self.dwc is not None:
            near = self.dwc(v.mT.flatten(0, 1).unflatten(2, grid))  # (B heads, dim, H, W)
            h = h + near.flatten(2).unflatten(0, (len(x), -1)).mT
        return self.proj(h.transpose(1, 2).flatten(2))


class LiT(DiT):
    """The paper's network: DiT with linear attention.

    num_heads, kernel: see LinearAttention. Other arguments are those of dit.DiT.
    """

    def __init__(self, res, num_classes=1000, num_heads=2, kernel=5, **fields):
        attention = partial(LinearAttention, kernel=kernel)
        super().__init__(res, num_classes, num_heads=num_heads, attention=attention, **fields)


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


# What becomes of each kind of teacher. An official DiT becomes a LiT in the same wrapper.
OFFICIAL = "related.official:Official"
LINEAR = {
    "uvit": "related.lit:LinearUViT",
    "related.dit:DiT": "related.lit:LiT",
    OFFICIAL: OFFICIAL,
}


def linear_arguments(model, model_args, linear_heads, kernel):
    """Return the arguments of LINEAR[model] for a teacher with the arguments model_args."""
    heads = "linear_heads" if model == "uvit" else "num_heads"
    family = dict(family="LiT") if model == OFFICIAL else {}
    return model_args | {heads: linear_heads, "kernel": kernel} | family


def attention_weights(old, prefix):
    """Return the weights of one LinearAttention that a softmax attention has, too.

    old: state dict of the teacher. prefix: name of the LinearAttention in the student, with a dot.
    """
    # In a U-ViT, the linear attention lies one module deeper than the softmax attention.
    softmax, out = prefix, "proj"
    if prefix + "qkv.weight" not in old:
        softmax, out = prefix.removesuffix("attention."), "out"
    new = {}
    for kind in ("weight", "bias"):
        qkv = old[f"{softmax}qkv.{kind}"]
        third = len(qkv) // 3
        new[f"{prefix}q.{kind}"] = qkv[:third]
        new[f"{prefix}kv.{kind}"] = qkv[third:]
        new[f"{prefix}proj.{kind}"] = old[f"{softmax}{out}.{kind}"]
    return new


def convert(net, model, model_args, linear_heads=2, kernel=5, inherit="others"):
    """Return a network with linear attention and with weights of a trained network.

    model, model_args: the class and the arguments of that network, a key of LINEAR. inherit:
    "others" copies all weights except those of self-attention, which the paper found to be best;
    "all" also copies its linear layers; "none" copies nothing. Raises ValueError for others.
    """
    if inherit not in ("others", "all", "none"):
        raise ValueError(f"inherit {inherit!r} must be others, all or none")
    fields = linear_arguments(model, model_args, linear_heads, kernel)
    new = build_net(LINEAR[model], fields, next(net.parameters()).device)
    weights, old = new.state_dict(), net.state_dict()
    # The names of its LinearAttention modules.
    last = "kv.weight"
    prefixes = tuple(name.removesuffix(last) for name in weights if name.endswith("." + last))

    # Both kinds of attention of a DiT have a layer of the name "proj". It belongs to attention.
    if inherit != "none":
        others = {name for name in weights if not name.startswith(prefixes)}
        weights |= {name: old[name] for name in others}
    if inherit == "all":
        for prefix in prefixes:
            weights |= attention_weights(old, prefix)
    new.load_state_dict(weights)
    return new


# ---------------------------------------------------------------- hybrid distillation


def hybrid_loss(
    student,
    teacher,
    x,
    schedule,
    label=None,
    *,
    weight=0.5,
    variance_weight=None,
    space="v",
    t=None,
    eps=None,
):
    """The student's own loss, plus weight ||v_T - v_S||^2 and variance_weight ||s_T - s_S||^2.

    weight: lambda_1 of the paper. variance_weight: lambda_2, for networks that predict variances
    s; without it, the networks predict v alone and the own loss is the v loss. space: "v", or "eps"
    as in the paper, for the first two squared errors. Other arguments and results are those of
    loss.diffusion_loss.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if eps is None:
        eps = torch.randn_like(x)
    if variance_weight is not None:
        t = t.clamp(min=1e-3)  # a reverse step does not lead below 0
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)
    # eps - eps_hat = alpha (v - v_hat).
    factor = alpha_sigma(logsnr, like=x)[0] if space == "eps" else 1.0

    def predict(net):
        if variance_weight is None:
            return net(z, logsnr, label).to(x.dtype), None
        return [output.to(x.dtype) for output in net(z, logsnr, label, variance=True)]

    # The usual loss of the student.
    v_student, s_student = predict(student)
    if variance_weight is None:
        loss = mean_squares(factor * (v_from_x_eps(x, eps, logsnr) - v_student))
    else:
        loss = loss_of_prediction(v_student, s_student, z, x, eps, t, schedule, space)

    # The teacher predicts from the same z. It is frozen.
    if weight or variance_weight:
        with torch.no_grad():
            v_teacher, s_teacher = predict(teacher)
        loss = loss + weight * mean_squares(factor * (v_teacher - v_student))
        if variance_weight is not None:
            # The networks predict from -1 to 1, which is twice the range of s.
            loss = loss + variance_weight * mean_squares(2 * (s_teacher - s_student))
    return loss, logsnr


def distill(student, teacher, optimizer, data, config, schedule, device, **weights):
    """Train the student in place. Return a copy with EMA weights.

    optimizer: for the student. config: settings of the new run. weights: see hybrid_loss.
    """
    positions = range(config["batch"])
    # The same images and the same noise as a run of train.py with this seed.
    indices = image_order(len(data), config["seed"], config["batch"], 0, [positions])
    model, teacher = in_bf16(student, config["bf16"]), in_bf16(teacher, config["bf16"])
    condition = partial(drop_labels, config=config)

    def loss_fn(net, x, schedule, label, *, t, eps):
        space = config.get("space", "v")
        return hybrid_loss(net, teacher, x, schedule, label, space=space, t=t, eps=eps, **weights)

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

# The heads of LiT. Those of B and L are not certain. Everything else is as in DiT.
HEADS = {"S": 2, "B": 3, "L": 4, "XL": 4}

CONFIGS = {}
for size, fields in DIT_CONFIGS.items():
    CONFIGS[f"DiT-{size}"] = (DiT, fields)
    CONFIGS[f"LiT-{size}"] = (LiT, fields | dict(num_heads=HEADS[size]))

# The sizes for train.py, as those of DiT.
LiT.RECIPES = {"tiny": {res: dict(TINY, num_heads=2) for res in (32, 64)}}
for size, heads in HEADS.items():
    rows = DiT.RECIPES[size.lower()]
    LiT.RECIPES[size.lower()] = {res: dict(row, num_heads=heads) for res, row in rows.items()}
LiT.TRAINING = DiT.TRAINING


def print_configurations():
    """Print parameters and multiply-accumulates of LiT and DiT, for two numbers of tokens."""
    for name, (network, config) in CONFIGS.items():
        counts = [count_by_depth(network, config | dict(res=res)) for res in (32, 128)]
        gmac = ", ".join(f"{macs / 1e9:7.2f}" for _, macs, _ in counts)
        print(
            f"{name:6s} {counts[0][0]:12,d} parameters, "
            f"at 256 and 4096 tokens {gmac} GMAC per image"
        )


def print_times(seconds=3.0):
    """Print the time of a layer of 192 channels for one image, linear and softmax."""
    sides = (16, 32, 64)
    for name, kind in (("linear", LinearAttention), ("softmax", Attention)):
        layer = kind(192, 2).eval()
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
    """Return (net, config, schedule) of a run of a U-ViT or DiT. Raises ValueError."""
    teacher, config, schedule = load(path, device)
    family = config["model_args"].get("family", "DiT")  # of official models
    if config["model"] not in LINEAR or family != "DiT":
        raise ValueError(
            f"{path} is a run of --model {config['model']}: only uvit, related.dit:DiT and "
            "official DiTs can be converted"
        )
    if config.get("captions") is not None:
        raise ValueError(f"{path} was trained on texts: it cannot be converted")
    return teacher, config, schedule


def convert_run(options):
    """Convert a run of train.py, distill it, and write a new run. Raises ValueError."""
    device = one_process(options.device)
    teacher, config, schedule = load_teacher(options.run, device)
    if os.path.isdir(options.out) and list_checkpoints(options.out):
        raise ValueError(f"{options.out} holds a run: choose another --out, or delete it")
    os.makedirs(options.out, exist_ok=True)
    if options.data:
        given = dict(data=options.data)
        absolute_paths(given)
        config |= given
    # A checkpoint must not import code, a person who names a class with --data may.
    data = open_images(config, device, import_classes=bool(options.data))
    check_classes(data, options.run, config)
    # The images that the run holds out stay unseen.
    data = training_part(DEFAULTS | config, data)

    # The student starts from the weights of the teacher.
    torch.manual_seed(options.seed)
    model, model_args = config["model"], config["model_args"]
    student = convert(teacher, model, model_args, options.heads, options.kernel, options.inherit)
    predicts_variance = model == OFFICIAL or model_args.get("learned_variance", False)
    config |= dict(
        model=LINEAR[model],
        model_args=linear_arguments(model, model_args, options.heads, options.kernel),
        loss="related.dit:learned_variance_loss" if predicts_variance else None,
    )
    config |= {key: getattr(options, key) for key in ("steps", "batch", "lr", "seed")}
    optimizer = torch.optim.Adam(
        student.parameters(), options.lr, betas=(0.9, 0.99), eps=1e-12, fused=True
    )
    weights = dict(weight=options.weight)
    if predicts_variance:
        weights["variance_weight"] = options.variance_weight
    ema_net = distill(student, teacher, optimizer, data, config, schedule, device, **weights)

    # A checkpoint of train.py, which can continue the run without the teacher. Only the schedules
    # of official models are unknown to it.
    state = dict(config=config, step=options.steps, images=options.steps * options.batch)
    state |= dict(net=dict(student.state_dict()), ema=dict(ema_net.state_dict()))
    state |= dict(optimizer=optimizer.state_dict())
    save_checkpoint(options.out, 1, state)
    print(f"wrote {options.out}")


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="lit",
        description="Print the configurations of LiT, or convert and distill a trained network.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"lit: {message}")
    add = parser.add_argument
    add("run", nargs="?", help="the teacher: a run of a U-ViT or DiT, or an official DiT")
    add("--out", help="the folder of the new run")
    add("--steps", type=int, default=800, help="training steps")
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3, help="learning rate")
    add("--heads", type=int, default=2, help="heads of the linear attention")
    add("--kernel", type=int, default=5, help="side of the depthwise convolution; 0: none")
    add(
        "--weight", type=float, default=0.5, help="of the teacher's output in the loss; 0: not used"
    )
    add(
        "--variance-weight",
        type=float,
        default=0.05,
        help="of the teacher's variances in the loss, if it predicts them",
    )
    inherit = "weights to copy: all but those of attention (default), all, or none"
    add("--inherit", default="others", choices=["others", "all", "none"], help=inherit)
    add("--data", nargs="+", help="the data, if they have moved since the run")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--time", action="store_true", help="milliseconds of one layer on one CPU thread")
    return parser


def main(argv=None):
    """Parse the options, then convert a run, or print costs."""
    parser = make_parser()
    options = parser.parse_args(argv)
    check_numbers(options, ("steps", "batch", "heads"), ("kernel", "seed"))
    weights_fit = all(0 <= w < math.inf for w in (options.weight, options.variance_weight))
    if not (0 < options.lr < math.inf and weights_fit):
        raise ValueError("--lr must be above 0, --weight and --variance-weight must be 0 or more")
    if options.kernel % 2 == 0 and options.kernel != 0:
        raise ValueError(f"--kernel must be odd, or 0, not {options.kernel}")
    if options.time:
        return print_times()
    if not options.run:
        return introduce(__doc__, print_configurations)
    if not options.out:
        parser.error("--out is missing: the folder of the new run")
    convert_run(options)


if __name__ == "__main__":
    run_command(main)
