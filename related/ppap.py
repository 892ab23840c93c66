"""PPAP: practical plug-and-play diffusion models (Go et al., 2022, arXiv 2212.05973).

A network for clean images guides a diffusion model, although it has never seen noise. Alone it
guides badly. PPAP gives each range of t an expert: the frozen network with a few trained weights,
which are low-rank changes of its convolutions, its biases and its norms. An expert learns to say of
a noisy image what the network says of the clean one. This needs no labels and no dataset: the
diffusion model itself draws the images. The network may be a classifier, or may predict the depth
or the mask of each pixel: see related/guides.py.

    python -m related.ppap assets/shapes32.pt --experts 5 --out runs/ppap
    python -m related.ppap assets/shapes32.pt --guide runs/ppap --scale 2 --out grid.png
    python -m related.ppap assets/shapes32.pt --task segmentation --out runs/ppap-mask
    python -m related.ppap assets/shapes32.pt --guide runs/ppap-mask --scale 3 --out grid.png

The first command trains a classifier on the run's dataset, then its experts, and writes both to
runs/ppap/experts.pt. The second one draws images without labels, guided by the experts. The others
do so with masks: the grid shows masks of new Shapes, and below each an image that is guided to it.
"""

import argparse
import copy
import math
import os
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from related.common import (
    check_numbers,
    check_out,
    drawn,
    fit,
    introduce,
    labels,
    load_run,
    no_arguments,
    one_process,
    open_images,
    reading,
    write_images,
)
from related.guides import TASKS, TRAINING, check_task, held_out, loss_of, trained_net
from sample import mix_seed, to_float, to_uint8
from schedule import alpha_sigma, diffuse
from support.heldout import training_part
from support.runtime import run_command, writing
from support.settings import DEFAULTS

# ---------------------------------------------------------------- experts


class LowRank(nn.Module):
    """A low-rank change of a weight: W + (alpha / rank) B A, which is W at initialization.

    weight: (out, in), or (out, in, k, k) for a convolution. B A, of shape (out k, in k), is viewed
    as the weight.
    """

    def __init__(self, weight, rank, alpha=8.0):
        super().__init__()
        k = weight.shape[2] if weight.ndim == 4 else 1
        # As in LoRA, A is random and B is zero, so that the change is zero at initialization.
        device = weight.device
        self.a = nn.Parameter(torch.empty(rank * k, weight.shape[1] * k, device=device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0] * k, rank * k, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.factor = alpha / rank

    def forward(self, weight):
        return weight + self.factor * (self.b @ self.a).view_as(weight)


# Layers of other people's networks that keep their weights, by a part of their name. Of ResNet: the
# third convolution of a block and the shortcut. Of DeiT: the patch embedding and the MLPs.
KEPT = {"conv3", "downsample", "patch_embed", "mlp"}
LAST = {"head", "fc"}  # the last layer, which also keeps its bias


def expert(net, rank=16):
    """Copy a network and choose what an expert trains, as in the authors' code.

    Trainable are low-rank changes of convolutions and linear layers, except in KEPT, all biases,
    and the scales of batch norms. Everything else is frozen, and so is the whole last layer.
    """
    net = copy.deepcopy(net).requires_grad_(False)
    for name, module in list(net.named_modules()):
        parts = set(name.split("."))
        if parts & LAST:
            continue

        # Low-rank changes of the weights of convolutions and linear layers.
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not parts & KEPT:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))

        # All biases, and the scales of batch norms.
        trained = [getattr(module, "bias", None)]
        if isinstance(module, nn.BatchNorm2d):
            trained.append(module.weight)
        for parameter in trained:
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(True)
    return net


def expert_of(logsnr, n, schedule):
    """Return which of n experts is responsible at logsnr (B,), as int64 (B,).

    The experts have equal ranges of t; expert 0 begins at t = 0.
    """
    # logsnr at t = (n - 1) / n, ..., 1 / n, which is rising.
    ends = schedule(torch.arange(n - 1, 0, -1, dtype=torch.float64) / n).to(logsnr.device)
    return n - 1 - torch.bucketize(logsnr.double(), ends)


def as_one(experts, schedule):
    """Combine experts to one function, (z, logsnr) -> output (B, ...)."""

    def predict(z, logsnr):
        # Each expert sees the images of its range of t.
        which = expert_of(logsnr, len(experts), schedule)
        parts = {k: experts[k](z[which == k]) for k in which.unique().tolist()}

        # Put the outputs in the order of the batch.
        some = next(iter(parts.values()))
        output = some.new_empty(len(z), *some.shape[1:])
        for k, part in parts.items():
            output[which == k] = part
        return output

    return predict


# ---------------------------------------------------------------- guidance


def guided_by(net, losses, scale, schedule):
    """Guidance as a net: eps_hat + scale sigma grad_z loss(z, target).

    net: is not given the target. losses: a guide loss(z, target) -> (B,) for each range of t;
    images of one batch may have different noise levels. Raises ValueError without targets.
    """

    def guided_net(z, logsnr, target=None):
        v_hat = net(z, logsnr, None)
        if not scale:
            return v_hat
        if target is None:
            raise ValueError("guidance needs a target, such as a label: without it, no direction")

        # The gradient of the loss at the noisy image itself, by the expert for its t.
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            which = expert_of(logsnr, len(losses), schedule)
            loss = sum(
                losses[k](z[which == k], target[which == k]).sum() for k in which.unique().tolist()
            )
            (gradient,) = torch.autograd.grad(loss, z)  # (B, 3, H, W)

        # At one z, v = (eps - sigma z) / alpha: a change of eps is divided by alpha.
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return v_hat + scale * sigma / alpha * gradient

    guided_net.num_classes = getattr(net, "num_classes", None)
    return guided_net


# ---------------------------------------------------------------- training


def transfer(
    task,
    teacher,
    n,
    images,
    schedule,
    *,
    steps=400,
    batch=32,
    lr=1e-3,
    rank=16,
    temperature=0.25,
    seed=0,
):
    """Train n experts for equal ranges of t on images (N, 3, H, W) in [-1, 1], without targets.

    teacher: the network for clean images, in eval mode. Returns an nn.ModuleList of experts, in
    eval mode. Each starts as the teacher; in the authors' code, as the expert before it.
    """
    experts, device = nn.ModuleList(), images.device
    for k in range(n):
        torch.manual_seed(mix_seed(seed, 1 + k))
        # In train mode, the statistics of batch norms adapt to noise, as in the authors' code.
        net = expert(teacher, rank).train()

        def gradients(step, k=k, net=net):
            # A random batch. Half of the images are flipped horizontally.
            x = images[torch.randint(len(images), (batch,), device=device)]
            flipped = torch.rand(batch, 1, 1, 1, device=device) < 0.5
            x = torch.where(flipped, x.flip(3), x)

            # Noise them to a t in this expert's range, k / n to (k + 1) / n.
            eps = torch.randn_like(x)
            t = (k + torch.rand(batch, device=device)) / n
            z = diffuse(x, eps, schedule(t))

            # The teacher sees the clean image.
            with torch.no_grad():
                target = task.teach(teacher(x), temperature)

            # For logits this is KL(teacher(x), expert(z)), up to a constant.
            loss = task.loss(net(z), target).mean()
            loss.backward()
            return loss.detach()

        experts.append(fit(net, gradients, steps=steps, lr=lr, weight_decay=0.05, **TRAINING))
    return experts


@torch.no_grad()
def scores(task, predict, x, target, schedule, times, seed=0):
    """Return the mean score on noisy versions of images x (B, 3, H, W) in [-1, 1], one per t.

    predict: (z, logsnr) -> output. target: (B, ...), the truth. times: values of t in [0, 1].
    """
    torch.manual_seed(seed)
    means = []
    for t in times:
        logsnr = schedule(torch.full((len(x),), t, device=x.device))
        z = diffuse(x, torch.randn_like(x), logsnr)

        # 100 images at a time, to limit memory.
        parts = [slice(i, i + 100) for i in range(0, len(x), 100)]
        values = [task.score(predict(z[part], logsnr[part]), target[part]) for part in parts]
        means.append(torch.cat(values).mean().item())
    return means


# ---------------------------------------------------------------- files


class Guide(NamedTuple):
    """What a file of experts holds."""

    task: str
    net: nn.Module  # for clean images
    experts: nn.ModuleList

    def losses(self, plain=False):
        """The guide of each range of t; plain: that of the network for clean images, for all t."""
        nets = [self.net] if plain else self.experts
        return [loss_of(TASKS[self.task], net) for net in nets]


def save_guide(folder, num_classes, rank, guide):
    """Write a network and its experts to folder/experts.pt."""
    state = dict(
        task=guide.task,
        classes=num_classes,
        rank=rank,
        n=len(guide.experts),
        classifier=guide.net.state_dict(),
        experts=guide.experts.state_dict(),
    )
    with writing(f"{folder}/experts.pt") as file:
        torch.save(state, file)
    print(f"wrote {folder}/experts.pt")


def load_guide(folder, device, classes):
    """Load what save_guide wrote, for a run with `classes` classes. Returns a Guide.

    Its networks are in eval mode. Raises FileNotFoundError, and ValueError for another kind of
    file.
    """
    path = os.path.join(folder, "experts.pt")
    with reading(path, "related.ppap"):
        saved = torch.load(path, map_location=device, weights_only=True)
        # Build the networks as they were built for training, then copy the weights.
        task = saved.get("task", "class")  # files of earlier versions have no task
        net = TASKS[task].make(saved["classes"]).to(device)
        experts = nn.ModuleList(expert(net, saved["rank"]) for _ in range(saved["n"])).to(device)
        net.load_state_dict(saved["classifier"])
        experts.load_state_dict(saved["experts"])
    if saved["classes"] != classes:
        raise ValueError(f"{path} has {saved['classes']} classes, but the run has {classes}")
    return Guide(task, net.eval().requires_grad_(False), experts.eval().requires_grad_(False))


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        prog="ppap",
        description="Guide a run of train.py by a network for clean images and its experts for "
        "noisy images.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"ppap: {message}")
    add = parser.add_argument
    add("run", help="folder or checkpoint of a run with classes")
    add("--guide", metavar="FOLDER", help="folder of trained experts; without it, train them")
    add("--plain", action="store_true", help="with --guide: the clean network alone, as a baseline")
    add("--scale", type=float, default=2.0, help="with --guide: guidance scale (default 2)")
    add("--n", type=int, default=100, help="with --guide: number of images (default 100)")
    judge_help = "with --guide: the clean network of this folder, best of another seed, judges"
    add("--judge", metavar="FOLDER", help=judge_help)
    task_help = "training: what the network predicts (default class)"
    add("--task", choices=TASKS, default="class", help=task_help)
    add("--experts", type=int, default=5, help="training: number of experts (default 5)")
    add("--updates", type=int, default=400, help="training: steps per expert (default 400)")
    add(
        "--images",
        "--pictures",
        dest="images",
        type=int,
        default=2000,
        help="training: number of images to draw and learn from (default 2000); "
        "--pictures is its old name",
    )
    add("--rank", type=int, default=16, help="training: rank of the weight changes (default 16)")
    add("--batch", type=int, default=64, help="batch size of sampling (default 64)")
    add("--steps", type=int, default=25, help="sampling steps (default 25)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add(
        "--out",
        required=True,
        help="a folder for the experts; with --guide grid.png or samples.npz",
    )
    options = parser.parse_args(argv)

    numbers = ("n", "experts", "updates", "images", "rank", "batch", "steps")
    check_numbers(options, numbers, ("seed",))
    if not math.isfinite(options.scale):
        raise ValueError("--scale must be a finite number")
    if options.judge and not options.guide:
        raise ValueError("--judge needs --guide: no images are drawn without it")
    if options.guide:
        check_out(options.out)
    else:
        os.makedirs(options.out, exist_ok=True)
    return options


def draw_guided(options, net, config, schedule, settings, device):
    """Draw images guided by the experts of --guide, and write them to --out."""
    guide = load_guide(options.guide, device, len(config["classes"]))
    check_task(f"--guide {options.guide}", guide.task, config)
    task = TASKS[guide.task]
    if options.judge:
        judge = load_guide(options.judge, device, len(config["classes"]))
        if judge.task != guide.task:
            raise ValueError(f"--judge {options.judge} is for {judge.task}, not for {guide.task}")

    # The targets: all classes in turn, or the maps of new Shapes.
    target = labels(config, options.n)
    if task.shade:
        target = held_out(task, config, options.n, device)[1].cpu()
    guided_net = guided_by(net, guide.losses(options.plain), options.scale, schedule)
    images = drawn(guided_net, config, schedule, target, options.batch, device, **settings)

    if options.judge:
        # The judge on the samples, and as a reference on real images.
        x = to_float(images.movedim(3, 1).to(device))
        real, truth = held_out(task, config, options.n, device)
        pairs = ((x, target.to(device)), (real, truth))
        values = [task.score(judge.net(x), target).mean() for x, target in pairs]
        print("{}: {:.4f}; of real images: {:.4f}".format(task.measure, *values))

    # A grid shows each map above its sample.
    if task.shade and options.out.endswith(".png"):
        maps = to_uint8(2 * task.shade(target) - 1)[..., None].expand_as(images)
        images = torch.cat([maps, images], 1)
    write_images(options.out, images, target, config["classes"])


def train_guide(options, net, config, schedule, settings, device):
    """Train a network on clean images, then its experts, and write all to --out."""
    num_classes = len(config["classes"])
    check_task(f"--task {options.task}", options.task, config)
    task = TASKS[options.task]
    data = open_images(config, device)
    # The images that the run holds out stay unseen. Shapes with maps are drawn anew.
    if task is TASKS["class"]:
        data = training_part(DEFAULTS | config, data)
    teacher = trained_net(task, data, num_classes, device, seed=options.seed)

    # The experts learn from images that the run draws with the null label.
    null_labels = torch.full((options.images,), num_classes)
    samples = drawn(net, config, schedule, null_labels, options.batch, device, **settings)
    images = to_float(samples.movedim(3, 1).to(device))  # (N, 3, H, W)
    experts = transfer(
        task,
        teacher,
        options.experts,
        images,
        schedule,
        steps=options.updates,
        rank=options.rank,
        seed=options.seed,
    )
    print_scores(options, config, schedule, teacher, experts, device)
    save_guide(options.out, num_classes, options.rank, Guide(options.task, teacher, experts))


def print_scores(options, config, schedule, teacher, experts, device):
    """Print the score of the clean network and of its experts at ten noise levels."""
    # The trained weights of an expert, compared with those of the clean network.
    task, new = TASKS[options.task], expert(teacher, options.rank)
    trained = sum(p.numel() for p in new.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in teacher.parameters())
    print(
        f"{options.experts} experts, trained on {options.images} samples; each trains as many "
        f"parameters as {100 * share:.1f} % of the clean network's; {task.measure}:"
    )

    # Both see the same noisy images. Those of built-in Shapes are new to them.
    times = [0.05 + 0.1 * i for i in range(10)]
    x, target = held_out(task, config, 1000, device)
    rows = (("clean", lambda z, logsnr: teacher(z)), ("experts", as_one(experts, schedule)))
    for name, predict in rows:
        values = scores(task, predict, x, target, schedule, times)
        by_time = " ".join(f"t={t:.2f}: {value:.3f}" for t, value in zip(times, values))
        print(f"{name:7s} {by_time}, mean {sum(values) / 10:.3f}")


def resnet50_weights(rank):
    """Count the weights of an expert of ResNet-50: the low-rank changes, and the norms."""
    # A change of a k x k convolution has k rank rows for the input and for the output. The authors
    # change the stem and the first two convolutions of each block, not the third, not the shortcut.
    low_rank = rank * 7**2 * (3 + 64)
    norms = 2 * 64
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            low_rank += rank * (channels + width) + rank * 3**2 * (width + width)
            # Gains and biases of three norms, and of the shortcut's in the first block.
            norms += 2 * (width + width + 4 * width) + (2 * 4 * width if block == 0 else 0)
            channels = 4 * width
    return low_rank, norms


def print_configurations():
    """Print the weights of an expert of ResNet-50 for two ranks, and the published settings."""
    for rank in (16, 8):
        low_rank, norms = resnet50_weights(rank)
        share = 100 * (low_rank + norms) / 25_557_032
        print(
            f"ResNet-50, rank {rank:2d}: {low_rank:9,d} low-rank weights and {norms:,d} of norms, "
            f"{share:.2f} % of the classifier (published: at most 10 %)"
        )
    print(
        "The authors' experts: 5, of 60,000 steps of 256 images each, on 500,000 images from\n"
        "25 DDIM steps, at temperature 0.25; guidance scale 7.5."
    )


def main(argv=None):
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = parse(argv)
    device = one_process(options.device)
    # Images are drawn without labels: those for the experts, and those that they guide.
    net, config, schedule = load_run(options.run, device, null_label=True)
    settings = dict(steps=options.steps, sampler="ddim", seed=options.seed)
    command = draw_guided if options.guide else train_guide
    command(options, net, config, schedule, settings, device)


if __name__ == "__main__":
    run_command(main)
