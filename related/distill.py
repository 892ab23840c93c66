"""Students of a trained net that need few steps, as the paper's text model was distilled to 0.4 seconds per picture (here: nets on labels).

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): one DDIM step of the student is two of its teacher, and the student
is the next teacher, so that the steps halve. Multistep consistency (Heek, Hoogeboom, Salimans 2024, arXiv 2403.06807): time is cut into N
segments, and from anywhere in one the student learns to jump to its end; its target is one small step of the teacher, then its own jump
from there. Distilled guidance (Meng et al. 2023, arXiv 2210.03142): the first teacher is guided by scales at random, which the student is
told; there it is a stage of its own, here part of the first one.

    python -m related.distill runs/shapes-32 --steps 8                     # 64 -> 32 -> 16 -> 8 steps, one run's folder each
    torchrun --nproc-per-node 8 -m related.distill runs/large --steps 8    # the same, each rank its share of the batch
    python sample.py runs/shapes-32-8steps --guidance 2 --out grid.png     # 8 DDIM steps, one call of the net each
"""

import argparse
import copy
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import example_noise, order
from related.common import open_pictures
from sample import (
    build_net,
    checkpoints,
    clip_x,
    ddim_step,
    drawn_size,
    guided,
    in_bf16,
    join_ranks,
    leave_ranks,
    load,
    load_checkpoint,
    load_weights,
    run_command,
    to_float,
    writing,
)
from schedule import alpha_sigma, diffuse, x_from_v
from train import ema_update, learning_rate, save_checkpoint
from unet import zero_init


class ScaleEmbedding(nn.Module):
    """The embedding of a net plus one of the guidance scale, (B,), 1 or more; that is 0 at first. label: (label, scale); a label alone is scale 1."""

    def __init__(self, embedding, emb_channels):
        super().__init__()
        self.embedding = embedding
        self.scale = nn.Sequential(
            nn.Linear(1, emb_channels), nn.SiLU(), zero_init(nn.Linear(emb_channels, emb_channels))
        )

    def forward(self, logsnr, label=None):
        label, scale = label if isinstance(label, tuple) else (label, torch.ones_like(logsnr))
        return self.embedding(logsnr, label) + self.scale(scale.log()[:, None])


class Student(nn.Module):
    """A net that is told the guidance scale: net(z, logsnr, (label, scale)); a label alone is scale 1. See sample.guided.

    model: one of MODELS; max_guidance: the largest scale that it learns; the other fields are that net's. Of the null label it learns
    nothing. Raises ValueError.
    """

    MODELS = (
        "uvit",
        "unet",
        "related.sid2:ResidualUViT",
    )  # whose conditioning is all in `embedding`, of emb_channels

    def __init__(self, model, num_classes, max_guidance=1.0, emb_channels=1024, **fields):
        super().__init__()
        if model not in self.MODELS:
            raise ValueError(f"a student is made of {', '.join(self.MODELS)}, not of {model}")
        self.num_classes, self.max_guidance = num_classes, max_guidance
        self.net = build_net(
            model, dict(fields, num_classes=num_classes, emb_channels=emb_channels)
        )
        self.net.embedding = ScaleEmbedding(self.net.embedding, emb_channels)

    def copy_from(self, net):
        """Takes the weights of a net that does not know the scale; the embedding of the scale stays, at first 0."""
        embedding = self.net.embedding
        self.net.embedding = embedding.embedding
        self.net.load_state_dict(net.state_dict())
        self.net.embedding = embedding

    def forward(self, z, logsnr, label=None):
        return self.net(z, logsnr, label)


# ---------------------------------------------------------------- what a student is to learn


def ddim(net, z, logsnr_t, logsnr_s, label):
    """One DDIM step with the net, its x_hat clipped as in sampling."""
    return ddim_step(
        z, clip_x(x_from_v(z, net(z, logsnr_t, label), logsnr_t), "static"), logsnr_t, logsnr_s
    )


def v_between(z, z_s, logsnr_t, logsnr_s):
    """The v_hat with which one DDIM step leads from z to z_s (arXiv 2202.00512: the target of Algorithm 2, as v). Shapes: see ddim_step.

    z_s = (sigma_s / sigma_t) z - alpha_s expm1((logsnr_t - logsnr_s) / 2) x is solved for x, and v = (alpha_t z - x) / sigma_t.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        alpha_sigma(logsnr_t, like=z),
        alpha_sigma(logsnr_s, like=z),
    )
    half = 0.5 * (logsnr_t - logsnr_s).reshape(-1, *[1] * (z.ndim - 1))
    x = (sigma_s / sigma_t * z - z_s) / (alpha_s * torch.expm1(half))
    return (alpha_t * z - x) / sigma_t


@torch.no_grad()
def progressive_target(teacher, student, z, times, schedule, label):
    """v_hat of a student whose step from the first of the times to the last is two steps of the teacher. times: a tuple of three (B,)."""
    t, middle, s = map(schedule, times)
    return v_between(z, ddim(teacher, ddim(teacher, z, t, middle, label), middle, s, label), t, s)


@torch.no_grad()
def consistency_target(teacher, student, z, times, schedule, label):
    """The same, but the teacher makes only the first step, and the student itself, as it is, the second, to the end of the segment.

    arXiv 2403.06807 takes noisier teacher steps (aDDIM), ever shorter ones, and another norm: here they are DDIM's, of one length.
    """
    t, middle, s = map(
        schedule, times
    )  # where the middle is the end already, the student's step leaves z as it is
    return v_between(z, ddim(student, ddim(teacher, z, t, middle, label), middle, s, label), t, s)


def progressive_times(u, steps):
    """Of a student with `steps` steps: where one of them begins, its middle, its end, the step drawn by u (B,) uniform in [0, 1)."""
    begin = (u * steps).floor() + 1
    return begin / steps, (begin - 0.5) / steps, (begin - 1) / steps


def consistency_times(u, steps, teacher_steps):
    """Where one of teacher_steps begins, drawn by u, where it ends, and the end of the one of `steps` segments that it lies in."""
    begin = (u * teacher_steps).floor() + 1
    return (
        begin / teacher_steps,
        (begin - 1) / teacher_steps,
        ((begin - 1) * steps / teacher_steps).floor() / steps,
    )


# ---------------------------------------------------------------- the command


def distill(teacher, student, data, schedule, n, options, report):
    """Trains the student, in place, to need n steps where the teacher needs 2 n, or with consistency options.teacher_steps.

    teacher, student: nets that take (label, scale), in eval mode. report(update, loss) is called after each update. Returns the averaged
    student, in eval mode. All ranks call it. Raises ValueError on all if its weights are no longer finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(student.parameters()).device
    part = range(rank * options.batch // world, (rank + 1) * options.batch // world)
    pictures = order(
        len(data), options.seed, options.batch, n * options.updates * options.batch, [part]
    )  # other ones in each stage
    target = consistency_target if options.consistency else progressive_target
    average = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(
        student.parameters(), options.lr, betas=(0.9, 0.99), eps=1e-12, fused=True
    )
    model = in_bf16(
        nn.parallel.DistributedDataParallel(student) if world > 1 else student, options.bf16
    )
    teacher_call, student_call = in_bf16(teacher, options.bf16), in_bf16(student, options.bf16)
    for update in range(options.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, options.lr, 50, 0.5, options.updates)
        x, label = (tensor.to(device) for tensor in data[next(pictures)])
        x = to_float(x)
        u, eps = example_noise(
            options.seed, n * options.updates + update, part, x.shape[1:], device
        )
        scale = 1 + (student.max_guidance - 1) * u[:, 0]
        if options.flip:
            x = torch.where(u[:, 1, None, None, None] < 0.5, x.flip(3), x)
        times = (
            consistency_times(u[:, 2], n, options.teacher_steps)
            if options.consistency
            else progressive_times(u[:, 2], n)
        )
        logsnr = schedule(times[0])
        z = diffuse(x, eps, logsnr)
        v = target(teacher_call, student_call, z, times, schedule, (label, scale))
        loss = F.mse_loss(
            model(z, logsnr, (label, scale)), v
        )  # in x this is the weighting SNR + 1 of arXiv 2202.00512
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(average, student, min(0.99, (update + 1) / (update + 10)))
        if (
            (update + 1) % 100 == 0 or update + 1 == options.updates
        ) and not nn.utils.get_total_norm(average.parameters()).isfinite():
            raise ValueError(
                f"the weights are not finite after {update + 1} updates of the student of {n} steps: try a lower --lr than {options.lr:g}"
            )
        report(update, loss)
    return average


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Distill a run of train.py into a student of few DDIM steps.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"distill: {message}")
    parser.add_argument("run", help="the teacher: a run's folder or a checkpoint, also a student's")
    parser.add_argument("--steps", type=int, default=8, help="of the student")
    parser.add_argument(
        "--teacher-steps",
        type=int,
        help="DDIM steps of the teacher (default 64, or a student's own); for progressive distillation --steps times a power of two",
    )
    parser.add_argument(
        "--consistency",
        action="store_true",
        help="multistep consistency, in one stage, instead of halving the steps again and again",
    )
    parser.add_argument(
        "--updates", type=int, default=500, help="of the student's weights, per stage"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures per update, over all ranks")
    parser.add_argument(
        "--lr", type=float, help="(default: a quarter of what the run was trained with)"
    )
    parser.add_argument(
        "--max-guidance",
        type=float,
        default=3.0,
        help="guidance scales are drawn from 1 to this (default 3); a student as the teacher passes its own on",
    )
    parser.add_argument(
        "--data", nargs="+", help="the pictures, where they are not where the run had them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 in the nets (default: as in training)",
    )
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--out",
        help="the students' folders, to which -8steps is added, and so on (default: the teacher's)",
    )
    options = parser.parse_args(argv)
    if not all(
        1 <= number <= 10**9
        for number in (options.steps, options.teacher_steps or 1, options.updates, options.batch)
    ):
        raise ValueError(
            "--steps, --teacher-steps, --updates and --batch go from 1 to 1,000,000,000"
        )
    if not (
        0 < (1.0 if options.lr is None else options.lr) < math.inf
        and 1 <= options.max_guidance < math.inf
        and options.seed >= 0
    ):
        raise ValueError("--lr must be above 0, --max-guidance from 1 on, --seed from 0 on")

    rank, world, device = join_ranks(options.device)
    if options.batch % world:
        raise ValueError(f"--batch {options.batch} is not divisible by {world} ranks")
    net, config, schedule = load(options.run, device)
    taught = config["model"] == "related.distill:Student"
    own_steps = config["sampling"]["steps"] if taught else None
    options.teacher_steps = options.teacher_steps or own_steps or 64
    if own_steps and options.teacher_steps != own_steps:
        raise ValueError(
            f"{options.run} is a student of {own_steps} steps, not of --teacher-steps {options.teacher_steps}"
        )
    halvings = math.log2(options.teacher_steps / options.steps)
    if not options.consistency and (halvings < 1 or halvings % 1):
        raise ValueError(
            f"--teacher-steps {options.teacher_steps} is not --steps {options.steps} times 2, 4, 8, ..."
        )
    if options.consistency and (options.teacher_steps % options.steps or halvings <= 0):
        raise ValueError(
            f"--teacher-steps {options.teacher_steps} is not --steps {options.steps} times 2, 3, 4, ..."
        )
    stages = (
        [options.steps]
        if options.consistency
        else [options.teacher_steps >> i for i in range(1, int(halvings) + 1)]
    )
    folder = os.path.normpath(
        options.out or (options.run if os.path.isdir(options.run) else os.path.dirname(options.run))
    )
    folders = [
        f"{os.path.abspath(folder) if folder.endswith('.') else folder}-{n}steps" for n in stages
    ]
    if config.get("captions") is not None or drawn_size(config)[1]:
        raise ValueError(
            f"{options.run} was trained on texts or latents: only a net for pictures with labels, or without, can be distilled"
        )
    if options.data:
        config["data"] = [os.path.abspath(path) for path in options.data]
    data = open_pictures(config, device)
    if data.classes != config["classes"]:
        raise ValueError(
            f"the pictures have other classes ({', '.join(data.classes[:20])}) than those {options.run} was trained on"
        )
    options.bf16, options.flip = (
        config["bf16"] if options.bf16 is None else options.bf16,
        config["flip"],
    )
    options.lr = config["lr"] / 4 if options.lr is None else options.lr
    torch.manual_seed(options.seed)
    if taught:
        teacher, student = net, copy.deepcopy(net)
    else:
        low, high = config["sampling"].get("guidance_interval", (-math.inf, math.inf))
        max_guidance = (
            options.max_guidance if config["classes"] and config["label_drop"] else 1.0
        )  # else there is nothing to guide with

        def teacher(z, logsnr, label):
            scale = torch.where((low <= logsnr) & (logsnr <= high), label[1], 1.0)
            return guided(net, scale.reshape(-1, 1, 1, 1) if max_guidance > 1 else 1.0)(
                z, logsnr, label[0]
            )

        config["model_args"] |= dict(model=config["model"], max_guidance=max_guidance)
        config["model"] = "related.distill:Student"
        student = build_net(config["model"], config["model_args"], device)
        student.copy_from(net)
    student.eval().requires_grad_(
        True
    )  # without dropout: its targets are computed for ever new noise, so that it cannot learn them by heart
    config["distilled"] = dict(
        teacher=os.path.abspath(options.run),
        **{
            key: getattr(options, key)
            for key in ("teacher_steps", "consistency", "updates", "batch", "lr", "seed")
        },
        max_guidance=student.max_guidance,
    )
    done = {}  # the stages that an earlier, interrupted command, or one for more steps, has finished
    for n, out in zip(stages, folders):
        if os.path.isdir(out) and checkpoints(out):
            done[n] = load_checkpoint(out)
            if done[n]["config"].get("distilled") != config["distilled"]:
                raise ValueError(f"{out} holds another run: choose another --out, or delete it")
    if rank == 0:
        print(" ".join(f"{key}={value}" for key, value in config["distilled"].items()), flush=True)

    for n, out in zip(stages, folders):
        if n in done:
            load_weights(out, student, done[n]["ema"])
            teacher = copy.deepcopy(student).requires_grad_(False)
            if rank == 0:
                print(f"{out} is there already", flush=True)
            continue
        start = time.time()

        def report(update, loss):
            if rank == 0 and ((update + 1) % 100 == 0 or update + 1 == options.updates):
                print(
                    f"{n} steps: update {update + 1}/{options.updates}  loss {loss.item():.5f}  {(update + 1) * options.batch / (time.time() - start):.0f} img/s",
                    flush=True,
                )

        teacher = distill(teacher, student, data, schedule, n, options, report)
        student.load_state_dict(teacher.state_dict())
        if rank == 0:
            os.makedirs(out, exist_ok=True)
            config["sampling"] = dict(sampler="ddim", steps=n)
            with writing(f"{out}/config.json") as file:
                file.write(json.dumps(config, indent=1).encode())
            save_checkpoint(
                out,
                1,
                dict(
                    config=config,
                    step=options.updates,
                    images=options.updates * options.batch,
                    net=dict(student.state_dict()),
                    ema=dict(teacher.state_dict()),
                    optimizer={},
                ),
            )
            print(f"wrote {out}", flush=True)
    leave_ranks()


if __name__ == "__main__":
    run_command(main)
