"""Distillation: students that need few sampling steps.

Progressive distillation: Salimans & Ho, 2022, arXiv 2202.00512.
Multistep consistency models: Heek, Hoogeboom & Salimans, 2024, arXiv 2403.06807.
Distilled guidance: Meng et al., 2023, arXiv 2210.03142.

Simple diffusion distilled its text model to 0.4 seconds per image. Progressive distillation trains
a student whose one DDIM step equals two steps of its teacher. The student is the next teacher, so
the number of steps halves in each stage. A consistency model cuts time into N segments instead: it
learns to jump from anywhere in a segment to its end. Its target is one small teacher step followed
by its own jump. The first teacher is guided by random scales, and the student sees the scale.
Meng et al. distill guidance in a stage of its own; here it is part of the first stage.

    python -m related.distill assets/shapes32.pt --steps 8                 # 64 -> 32 -> 16 -> 8
    torchrun --nproc-per-node 8 -m related.distill runs/large --steps 8    # ranks share the batch
    python sample.py runs/shapes32-8steps --guidance 2 --out grid.png      # 8 calls of the network
    python -m related.distill runs/text --steps 8                          # also texts and latents
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn

from loss import mean_squares
from related.common import (
    check_classes,
    check_numbers,
    fit,
    introduce,
    no_arguments,
)
from sample import can_guide, clip_x, ddim_step, guided, has_captions
from schedule import alpha_sigma, diffuse, x_from_v
from support.checkpoint import (
    build_net,
    list_checkpoints,
    load,
    load_checkpoint,
    load_weights,
    sample_size,
    save_checkpoint,
)
from support.data import image_order, load_batch
from support.heldout import training_part
from support.runtime import in_bf16, join_ranks, leave_ranks, run_command, writing
from support.settings import absolute_paths
from train import DEFAULTS, open_run_dataset, training_step
from unet import zero_init

# ---------------------------------------------------------------- the student


class ScaleEmbedding(nn.Module):
    """The embedding of a net plus an embedding of the guidance scale, which is 0 at initialization.

    noise: (B, 2): logsnr, and the logarithm of the scale. A net passes its logsnr to its embedding
    and to nothing else, so the scale can travel with it. label, extra: see unet.Embedding.
    """

    def __init__(self, embedding, emb_channels):
        super().__init__()
        self.embedding = embedding
        self.scale = nn.Sequential(
            nn.Linear(1, emb_channels), nn.SiLU(), zero_init(nn.Linear(emb_channels, emb_channels))
        )

    def forward(self, noise, label=None, extra=0.0):
        logsnr, log_scale = noise.unbind(1)
        return self.embedding(logsnr, label, extra) + self.scale(log_scale[:, None])


class Student(nn.Module):
    """A net that sees the guidance scale: v_hat = net(z, logsnr, (label, scale)).

    label: (B,), or texts. scale: (B,), 1 or more; sample.guided passes it. A label alone means
    scale 1. The student learns nothing about the null label.

    model: one of MODELS. max_guidance: the largest scale that it learns. The other arguments are
    those of the model. Raises ValueError for another model.
    """

    # Their conditioning is all in `embedding`, (B, emb_channels).
    MODELS = ("uvit", "unet", "related.sid2:ResidualUViT")
    NEEDED = f"a student needs one of {', '.join(MODELS)}"

    def __init__(self, model, num_classes, max_guidance=1.0, emb_channels=1024, **fields):
        super().__init__()
        if model not in self.MODELS:
            raise ValueError(f"{model}: {self.NEEDED}")
        self.num_classes = num_classes
        self.max_guidance = max_guidance
        model_args = dict(fields, num_classes=num_classes, emb_channels=emb_channels)
        self.net = build_net(model, model_args)
        self.net.embedding = ScaleEmbedding(self.net.embedding, emb_channels)

    def copy_from(self, net):
        """Copy the weights of a net without the scale. The scale's embedding stays as it is."""
        # Without the added embedding, the state dicts have the same names.
        embedding = self.net.embedding
        self.net.embedding = embedding.embedding
        self.net.load_state_dict(net.state_dict())
        self.net.embedding = embedding

    def forward(self, z, logsnr, label=None):
        scale = torch.ones_like(logsnr)
        if isinstance(label, tuple):
            label, scale = label
        # The logarithm puts scale 1, no guidance, at 0.
        return self.net(z, torch.stack([logsnr, scale.log()], 1), label)


# ---------------------------------------------------------------- the targets
# All of them are values of v_hat at z. times: three tensors (B,) with t > middle >= s.


def ddim(net, z, logsnr_t, logsnr_s, label, clip="static"):
    """Make one DDIM step with the net, with x_hat clipped as in sampling. Shapes: see ddim_step.

    clip: see sample.clip_x. Latents are not clipped: None.
    """
    x_hat = clip_x(x_from_v(z, net(z, logsnr_t, label), logsnr_t), clip)
    return ddim_step(z, x_hat, logsnr_t, logsnr_s)


def v_between(z, z_s, logsnr_t, logsnr_s):
    """Return the v_hat whose one DDIM step leads from z to z_s. Shapes: see ddim_step.

    This is the target of Algorithm 2 of arXiv 2202.00512, written as v.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t, like=z)
    alpha_s, sigma_s = alpha_sigma(logsnr_s, like=z)
    half = 0.5 * (logsnr_t - logsnr_s).reshape(-1, *[1] * (z.ndim - 1))

    # DDIM: z_s = (sigma_s / sigma_t) z - alpha_s expm1((logsnr_t - logsnr_s) / 2) x. Solve for x.
    x = (sigma_s / sigma_t * z - z_s) / (alpha_s * torch.expm1(half))

    # From z = alpha x + sigma eps and v = alpha eps - sigma x follows v = (alpha z - x) / sigma.
    return (alpha_t * z - x) / sigma_t


@torch.no_grad()
def progressive_target(teacher, student, z, times, schedule, label, clip="static"):
    """Return the v_hat of a student whose step from t to s equals two steps of the teacher."""
    # Algorithm 2 of arXiv 2202.00512: the teacher steps from t to the middle, then to s.
    t, middle, s = map(schedule, times)
    z_middle = ddim(teacher, z, t, middle, label, clip)
    z_s = ddim(teacher, z_middle, middle, s, label, clip)
    return v_between(z, z_s, t, s)


@torch.no_grad()
def consistency_target(teacher, student, z, times, schedule, label, clip="static"):
    """Return the v_hat of a student that jumps from t to s, the end of its segment.

    arXiv 2403.06807 uses noisier teacher steps (aDDIM) that become shorter during training, and
    another norm. Here the teacher's steps are DDIM steps of one length.
    """
    # The teacher makes a small step. The student, as it is, jumps from there to the end. If the
    # middle is the end already, the jump changes nothing.
    t, middle, s = map(schedule, times)
    z_middle = ddim(teacher, z, t, middle, label, clip)
    z_s = ddim(student, z_middle, middle, s, label, clip)
    return v_between(z, z_s, t, s)


def progressive_times(u, steps):
    """Choose one of the student's `steps` steps by u (B,), uniform in [0, 1).

    Returns its begin, its middle and its end, (B,) each.
    """
    # Step 1 ends at t = 0, and step number `steps` begins at t = 1.
    begin = (u * steps).floor() + 1
    return begin / steps, (begin - 0.5) / steps, (begin - 1) / steps


def consistency_times(u, steps, teacher_steps):
    """Choose one of teacher_steps steps by u (B,), uniform in [0, 1).

    Returns its begin, its end, and the end of its segment, one of `steps`; (B,) each.
    """
    begin = (u * teacher_steps).floor() + 1
    end = begin - 1
    return begin / teacher_steps, end / teacher_steps, (end * steps / teacher_steps).floor() / steps


# ---------------------------------------------------------------- training


def distillation_loss(net, x, schedule, label, *, t, eps, choose_times, target):
    """The loss of a student, ||v - v_hat||^2 against its target; see loss.diffusion_loss.

    label: (label, scale). t: (B,), uniform in [0, 1); chooses the step of each image by
    choose_times(t). target(z, times, schedule, label) returns v. Returns the loss and logsnr, (B,).
    """
    times = choose_times(t)
    logsnr = schedule(times[0])
    z = diffuse(x, eps, logsnr)  # (B, C, H, W)
    v = target(z, times, schedule, label)

    # As ||x - x_hat||^2 = sigma^2 ||v - v_hat||^2, this weights the error of x by SNR + 1, one of
    # the weightings of arXiv 2202.00512.
    return mean_squares(net(z, logsnr, label) - v), logsnr


def distill(teacher, student, data, schedule, n, options, report):
    """Train the student in place to need n steps. Return its EMA copy, in eval mode.

    teacher, student: nets whose label is (label, scale), in eval mode. The teacher needs 2 n steps,
    or with options.consistency options.teacher_steps. report(update, loss) is called after each
    update. All ranks call this function. Raises ValueError on all of them if weights become
    infinite or NaN.
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    device = next(student.parameters()).device
    model = nn.parallel.DistributedDataParallel(student) if world > 1 else student
    model = in_bf16(model, options.bf16)

    # The targets need the student without DDP, which synchronizes only gradients.
    nets = (in_bf16(teacher, options.bf16), in_bf16(student, options.bf16))
    if options.consistency:
        target = partial(consistency_target, *nets, clip=options.clip)
        choose_times = partial(consistency_times, steps=n, teacher_steps=options.teacher_steps)
    else:
        target = partial(progressive_target, *nets, clip=options.clip)
        choose_times = partial(progressive_times, steps=n)
    loss_fn = partial(distillation_loss, choose_times=choose_times, target=target)

    # Each rank takes its positions of the global batch. Each stage has images and noise of its own.
    positions = range(rank * options.batch // world, (rank + 1) * options.batch // world)
    first_update = n * options.updates
    indices = image_order(
        len(data), options.seed, options.batch, first_update * options.batch, [positions]
    )

    def condition(labels, u):
        # arXiv 2210.03142: one student for all guidance scales, drawn uniformly.
        return labels, 1 + (student.max_guidance - 1) * u

    def gradients(update):
        images, labels = load_batch(data, next(indices))
        loss, _ = training_step(
            model,
            images.to(device),
            labels.to(device),
            positions,
            loss_fn=loss_fn,
            schedule=schedule,
            seed=options.seed,
            step=first_update + update,
            flip=options.flip,
            condition=condition,
        )
        return loss.mean()

    try:
        return fit(student, gradients, steps=options.updates, lr=options.lr, report=report)
    except ValueError as error:
        raise ValueError(f"the student of {n} steps: {error}") from error


# ---------------------------------------------------------------- the stages


def plan_stages(steps, teacher_steps, consistency):
    """Return the number of steps of each student to train, from many to few.

    Raises ValueError for step counts that do not divide.
    """
    # A consistency model is trained in one stage.
    if consistency:
        if teacher_steps % steps or teacher_steps <= steps:
            raise ValueError(
                f"--teacher-steps {teacher_steps} must be 2, 3, 4, ... times --steps {steps}"
            )
        return [steps]

    # Progressive distillation halves the steps in each stage.
    halvings = math.log2(teacher_steps / steps)
    if halvings < 1 or halvings % 1:
        raise ValueError(
            f"--teacher-steps {teacher_steps} must be 2, 4, 8, ... times --steps {steps}"
        )
    return [teacher_steps >> i for i in range(1, int(halvings) + 1)]


def stage_folders(options, stages):
    """Return the folder of each stage's student: --out, or the teacher's folder, plus -8steps."""
    folder = options.out or options.run
    if not os.path.isdir(folder) and not options.out:
        # A checkpoint stands for its run. An exported model has no folder of its own.
        name = os.path.splitext(os.path.basename(options.run))[0]
        is_checkpoint = name.startswith("ckpt_")
        folder = os.path.dirname(options.run) if is_checkpoint else f"runs/{name}"
    folder = os.path.normpath(folder)
    if folder.endswith("."):  # "." and ".." become names
        folder = os.path.abspath(folder)
    return [f"{folder}-{n}steps" for n in stages]


def guided_teacher(net, config, max_guidance):
    """Turn a net into a teacher whose label is (label, scale), guided as the run is sampled.

    Where the run has a guidance interval, the scale outside of it is 1.
    """
    low, high = config["sampling"].get("guidance_interval", (-math.inf, math.inf))

    def teacher(z, logsnr, label):
        label, scale = label
        if max_guidance == 1:
            return net(z, logsnr, label)

        # The null label follows the classes. For texts it is the empty text, zeros alone. The last
        # token of a text may say that the image is rotated, which guidance must keep.
        null_label = len(config["classes"])
        if has_captions(config):
            null_label = torch.zeros_like(label)
            if config["model_args"].get("portrait"):
                null_label[:, -1:] = label[:, -1:]

        # Classifier-free guidance with a scale per image.
        scale = torch.where((low <= logsnr) & (logsnr <= high), scale, 1.0)
        return guided(net, scale.reshape(-1, 1, 1, 1), null_label)(z, logsnr, label)

    return teacher


def make_student(net, config, options, device):
    """Build the first teacher and its student. Returns both; makes config that of the student."""
    # Guidance needs labels and a net that knows the null label.
    max_guidance = options.max_guidance if can_guide(config) else 1.0
    teacher = guided_teacher(net, config, max_guidance)

    # The student starts with its teacher's weights.
    config["model_args"] |= dict(model=config["model"], max_guidance=max_guidance)
    config["model"] = "related.distill:Student"
    student = build_net(config["model"], config["model_args"], device)
    student.copy_from(net)
    return teacher, student


def find_finished(stages, folders, settings):
    """Return {steps: checkpoint} of the stages that an interrupted command has finished.

    Raises ValueError if a folder holds a run with other settings.
    """
    finished = {}
    for n, out in zip(stages, folders):
        if os.path.isdir(out) and list_checkpoints(out):
            finished[n] = load_checkpoint(out)
            if finished[n]["config"].get("distilled") != settings:
                raise ValueError(f"{out} holds another run: choose another --out, or delete it")
    return finished


def save_student(out, config, n, options, student, ema_net):
    """Write a student's run: config.json and a checkpoint that sample.py and this file load."""
    os.makedirs(out, exist_ok=True)
    # sample.py takes these settings as defaults.
    config["sampling"] = dict(sampler="ddim", steps=n)
    with writing(f"{out}/config.json") as file:
        file.write(json.dumps(config, indent=1).encode())
    state = dict(
        config=config,
        step=options.updates,
        images=options.updates * options.batch,
        net=dict(student.state_dict()),
        ema=dict(ema_net.state_dict()),
        optimizer={},
    )
    save_checkpoint(out, 1, state)
    print(f"wrote {out}", flush=True)


def train_stages(stages, folders, teacher, student, data, schedule, config, options, rank):
    """Train the students one after the other, each the teacher of the next. All ranks call it."""
    finished = find_finished(stages, folders, config["distilled"])
    if rank == 0:
        print(" ".join(f"{key}={value}" for key, value in config["distilled"].items()), flush=True)

    for n, out in zip(stages, folders):
        # An interrupted command continues at the first stage that is missing.
        if n in finished:
            load_weights(out, student, finished[n]["ema"])
            teacher = copy.deepcopy(student).requires_grad_(False)
            if rank == 0:
                print(f"{out} exists already", flush=True)
            continue
        start = time.time()

        def report(update, loss, n=n, start=start):
            if rank == 0 and ((update + 1) % 100 == 0 or update + 1 == options.updates):
                speed = (update + 1) * options.batch / (time.time() - start)
                print(
                    f"{n} steps: update {update + 1}/{options.updates}  "
                    f"loss {loss.item():.5f}  {speed:.0f} img/s",
                    flush=True,
                )

        # The EMA copy is the next teacher. The next student starts with its weights.
        teacher = distill(teacher, student, data, schedule, n, options, report)
        student.load_state_dict(teacher.state_dict())
        if rank == 0:
            save_student(out, config, n, options, student, teacher)


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for numbers out of range."""
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Distill a run of train.py into a student that needs few DDIM steps.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"distill: {message}")
    add = parser.add_argument
    add("run", help="the teacher: the folder or a checkpoint of a run")
    add("--steps", type=int, default=8, help="DDIM steps of the student (default 8)")
    teacher_help = "DDIM steps of the teacher (default 64): without --consistency, a power of two "
    teacher_help += "times --steps"
    add("--teacher-steps", type=int, default=64, help=teacher_help)
    consistency_help = "multistep consistency, in one stage, instead of progressive distillation"
    add("--consistency", action="store_true", help=consistency_help)
    add("--updates", type=int, default=500, help="training steps per stage (default 500)")
    add("--batch", type=int, default=64, help="batch size, summed over all ranks (default 64)")
    add("--lr", type=float, help="learning rate (default: a quarter of the run's)")
    guidance_help = "draw guidance scales from 1 to this value (default 3)"
    add("--max-guidance", type=float, default=3.0, help=guidance_help)
    add("--data", nargs="+", help="the images, if they are not where the run found them")
    add("--seed", type=int, default=0)
    bf16_help = "bfloat16 in the nets (default: as in training)"
    add("--bf16", action=argparse.BooleanOptionalAction, help=bf16_help)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    out_help = "the students' folders, before the suffix such as -8steps (default: the teacher's)"
    add("--out", help=out_help)
    options = parser.parse_args(argv)

    check_numbers(options, ("steps", "teacher_steps", "updates", "batch"), ("seed",))
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise ValueError("--lr must be above 0 and finite")
    if not 1 <= options.max_guidance < math.inf:
        raise ValueError("--max-guidance must be 1 or more and finite")
    return options


def open_data(config, options, device):
    """Open the run's dataset, or that of --data, which config then names.

    Raises ValueError for a dataset with other classes, text embeddings or latents.
    """
    if options.data:
        given = dict(data=options.data)
        absolute_paths(given)
        config |= given
    # A checkpoint must not import code, a person who names a class with --data may.
    data = open_run_dataset(DEFAULTS | config, device, bool(options.data), folder=None)
    check_classes(data, options.run, config)
    if not data.net_fields.items() <= config["model_args"].items():
        raise ValueError(f"{data} has other texts or latents than {options.run} was trained on")
    return data


def print_configurations():
    """Print the stages from 64 steps, and what the papers report."""
    for steps in (8, 4):
        halves = [64 >> k for k in range(7) if 64 >> k >= steps]
        print(f"--steps {steps}: {' -> '.join(map(str, halves))} steps in {len(halves) - 1} stages")
    print("--steps 8 --consistency: 8 steps in one stage")
    print(
        "Published: FID 3.0 on CIFAR-10 in 4 steps (progressive), FID 1.4 on ImageNet at 64 px in\n"
        "8 steps (consistency), 0.42 s per 512 px image of simple diffusion's text model."
    )


def main(argv=None):
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = parse(argv)
    rank, world, device = join_ranks(options.device)
    if options.batch % world:
        raise ValueError(f"--batch {options.batch} is not divisible by {world} ranks")

    # The teacher, the stages and the images.
    net, config, schedule = load(options.run, device)
    if config["model"] == "related.distill:Student":
        raise ValueError(
            f"{options.run} is a student already: distill its teacher, with fewer --steps"
        )
    if config["model"] not in Student.MODELS:
        raise ValueError(f"{options.run} is a {config['model']}: {Student.NEEDED}")
    stages = plan_stages(options.steps, options.teacher_steps, options.consistency)
    folders = stage_folders(options, stages)
    data = open_data(config, options, device)

    # What is not set on the command line is as in the run's training.
    options.flip = config["flip"]
    options.clip = None if sample_size(config)[1] else "static"
    if options.bf16 is None:
        options.bf16 = config["bf16"]
    config["bf16"] = options.bf16
    if options.lr is None:
        options.lr = config["lr"] / 4

    # The student has no dropout. Its targets are computed for new noise each time, so that it
    # cannot memorize them.
    torch.manual_seed(options.seed)
    teacher, student = make_student(net, config, options, device)
    student.eval().requires_grad_(True)

    keys = ("teacher_steps", "consistency", "updates", "batch", "lr", "seed", "bf16")
    config["distilled"] = dict(
        teacher=os.path.abspath(options.run),
        **{key: getattr(options, key) for key in keys},
        max_guidance=student.max_guidance,
    )
    # The images that the run holds out stay unseen.
    data = training_part(DEFAULTS | config, data)
    train_stages(stages, folders, teacher, student, data, schedule, config, options, rank)
    leave_ranks()


if __name__ == "__main__":
    run_command(main)
