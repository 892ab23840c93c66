"""PPAP: practical plug-and-play diffusion models (Go et al., 2022, arXiv 2212.05973).

A classifier guides a diffusion model, although it has never seen noise. Alone it guides badly.
PPAP gives each range of t an expert: the frozen classifier with a few trained weights, which are
low-rank changes of its convolutions, its biases and its norms. An expert learns to say of a noisy
image what the classifier says of the clean one. This needs no labels and no dataset: the diffusion
model itself draws the images.

    python -m related.ppap assets/shapes32.pt --experts 5 --updates 1500 --out runs/ppap
    python -m related.ppap assets/shapes32.pt --guide runs/ppap --scale 2 --out grid.png

The first command trains a classifier on the run's dataset, then its experts, and writes both to
runs/ppap/experts.pt. The second one draws images without labels, guided by the experts.
"""

import argparse
import copy
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
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
    some_images,
    write_images,
)
from sample import mix_seed, to_float
from schedule import alpha_sigma, diffuse
from support.data import load_batch
from support.runtime import run_command, writing

# ---------------------------------------------------------------- the classifier and its experts


class Classifier(nn.Module):
    """A small classifier to guide with. x: (B, 3, H, W) in [-1, 1]. Returns logits (B, classes)."""

    def __init__(self, num_classes):
        super().__init__()

        def unit(channels, next_channels):
            # Half the resolution.
            conv = nn.Conv2d(channels, next_channels, 3, stride=2, padding=1)
            return [conv, nn.BatchNorm2d(next_channels), nn.ReLU()]

        # The pooling to 4 x 4 makes the head independent of the resolution.
        self.body = nn.Sequential(
            *unit(3, 32), *unit(32, 64), *unit(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.head = nn.Linear(16 * 128, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


class LowRank(nn.Module):
    """A low-rank change of a weight: W + (alpha / rank) B A, which is W at initialization.

    weight: (out, in), or (out, in, k, k) for a convolution. B A, of shape (out k, in k), is viewed
    as the weight.
    """

    def __init__(self, weight, rank, alpha=8.0):
        super().__init__()
        k = weight.shape[2] if weight.ndim == 4 else 1
        # As in LoRA, A is random and B is zero, so that the change is zero at initialization.
        self.a = nn.Parameter(torch.empty(rank * k, weight.shape[1] * k))
        self.b = nn.Parameter(torch.zeros(weight.shape[0] * k, rank * k))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.factor = alpha / rank

    def forward(self, weight):
        return weight + self.factor * (self.b @ self.a).view_as(weight)


def expert(classifier, rank=3, last="head"):
    """Copy the classifier and choose what an expert trains.

    Trainable are low-rank changes of convolutions and linear layers, biases, and norms. Everything
    else is frozen, and so is the whole layer named `last`.
    """
    net = copy.deepcopy(classifier).requires_grad_(False)
    for name, module in list(net.named_modules()):
        if name == last:
            continue

        # Low-rank changes of the weights of convolutions and linear layers.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))

        # All biases, and the scales of norms.
        trained = [getattr(module, "bias", None)]
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
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
    """Combine experts to one function, (z, logsnr) -> logits (B, classes)."""

    def classify(z, logsnr):
        # Each expert classifies the images of its range of t.
        which = expert_of(logsnr, len(experts), schedule)
        parts = {k: experts[k](z[which == k]) for k in which.unique().tolist()}

        # Put the logits in the order of the batch.
        some_logits = next(iter(parts.values()))
        logits = some_logits.new_empty(len(z), some_logits.shape[1])
        for k, part in parts.items():
            logits[which == k] = part
        return logits

    return classify


# ---------------------------------------------------------------- guidance


def guided_by(net, experts, scale, schedule):
    """Classifier guidance as a net: eps_hat - scale sigma grad_z log p(label | z).

    net: is not given the label. experts: noisy images -> logits, one for each range of t; images of
    one batch may have different noise levels. Raises ValueError without labels.
    """

    def guided_net(z, logsnr, label=None):
        v_hat = net(z, logsnr, None)
        if not scale:
            return v_hat
        if label is None:
            raise ValueError("guidance needs labels: without a label there is no class to guide to")

        # The gradient of log p(label | z) at the noisy image itself, by the expert for its t.
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            which = expert_of(logsnr, len(experts), schedule)
            log_p = sum(
                experts[k](z[which == k]).log_softmax(1).gather(1, label[which == k, None]).sum()
                for k in which.unique().tolist()
            )
            (gradient,) = torch.autograd.grad(log_p, z)  # (B, 3, H, W)

        # At one z, v = (eps - sigma z) / alpha: a change of eps is divided by alpha.
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return v_hat - scale * sigma / alpha * gradient

    guided_net.num_classes = getattr(net, "num_classes", None)
    return guided_net


# ---------------------------------------------------------------- training

# The learning rate falls linearly to zero, without warmup. No average: the last weights count.
# Gradients are not clipped, and Adam's other settings are PyTorch's defaults.
_TRAINING = dict(warmup=0, decay=1.0, ema=0.0, betas=(0.9, 0.999), eps=1e-8, clip=None)


def trained_classifier(data, num_classes, device, steps=400, batch=128, seed=0):
    """Train a Classifier on clean images and their labels. Returns it in eval mode."""
    torch.manual_seed(mix_seed(seed, 0))
    net = Classifier(num_classes).to(device).train()

    def gradients(step):
        # A random batch of clean images: this classifier never sees noise.
        images, label = load_batch(data, torch.randint(len(data), (batch,)).tolist())
        logits = net(to_float(images.to(device)))
        loss = F.cross_entropy(logits, label.to(device))
        loss.backward()
        return loss.detach()

    return fit(net, gradients, steps=steps, lr=2e-3, **_TRAINING)


def transfer(
    classifier,
    n,
    images,
    schedule,
    *,
    steps=300,
    batch=64,
    lr=1e-3,
    rank=3,
    temperature=0.25,
    seed=0,
):
    """Train n experts for equal ranges of t on images (N, 3, H, W) in [-1, 1], without labels.

    classifier: in eval mode. Returns an nn.ModuleList of experts, in eval mode. Each expert starts
    as the classifier; in the authors' code it starts as the expert before it.
    """
    experts, device = nn.ModuleList(), images.device
    for k in range(n):
        torch.manual_seed(mix_seed(seed, 1 + k))
        # In train mode, the statistics of batch norms adapt to noise, as in the authors' code.
        net = expert(classifier, rank).train()

        def gradients(step, k=k, net=net):
            # Noise images to a t in this expert's range, k / n to (k + 1) / n.
            x = images[torch.randint(len(images), (batch,), device=device)]
            eps = torch.randn_like(x)
            t = (k + torch.rand(batch, device=device)) / n
            z = diffuse(x, eps, schedule(t))

            # The teacher sees the clean image. Its temperature below 1 sharpens the target.
            with torch.no_grad():
                target = (classifier(x) / temperature).softmax(1)  # (B, classes)

            # KL(teacher(x), expert(z)), averaged over the batch.
            loss = F.kl_div(net(z).log_softmax(1), target, reduction="batchmean")
            loss.backward()
            return loss.detach()

        experts.append(fit(net, gradients, steps=steps, lr=lr, weight_decay=0.05, **_TRAINING))
    return experts


@torch.no_grad()
def accuracies(classify, x, y, schedule, times, seed=0):
    """Return the accuracy on noisy versions of images x (B, 3, H, W) in [-1, 1], one per t.

    classify: (z, logsnr) -> logits. y: (B,), the true classes. times: values of t in [0, 1].
    """
    torch.manual_seed(seed)
    shares = []
    for t in times:
        logsnr = schedule(torch.full((len(x),), t, device=x.device))
        z = diffuse(x, torch.randn_like(x), logsnr)

        # 100 images at a time, to limit memory.
        right = 0
        for i in range(0, len(x), 100):
            found = classify(z[i : i + 100], logsnr[i : i + 100]).argmax(1)
            right += (found == y[i : i + 100]).sum().item()
        shares.append(right / len(x))
    return shares


# ---------------------------------------------------------------- files


def save_guide(folder, num_classes, rank, classifier, experts):
    """Write the classifier and its experts to folder/experts.pt."""
    state = dict(
        classes=num_classes,
        rank=rank,
        n=len(experts),
        classifier=classifier.state_dict(),
        experts=experts.state_dict(),
    )
    with writing(f"{folder}/experts.pt") as file:
        torch.save(state, file)
    print(f"wrote {folder}/experts.pt")


def load_guide(folder, device, classes):
    """Load what save_guide wrote, for a run with `classes` classes. Returns (classifier, experts).

    Both are in eval mode. Raises FileNotFoundError, and ValueError for another kind of file.
    """
    path = os.path.join(folder, "experts.pt")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        # Build the networks as they were built for training, then copy the weights.
        classifier = Classifier(saved["classes"]).to(device)
        experts = nn.ModuleList(expert(classifier, saved["rank"]) for _ in range(saved["n"]))
        experts = experts.to(device)
        classifier.load_state_dict(saved["classifier"])
        experts.load_state_dict(saved["experts"])
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken file raises errors of many kinds
        raise ValueError(
            f"{path} was not written by related.ppap ({type(error).__name__})"
        ) from error
    if saved["classes"] != classes:
        raise ValueError(f"{path} has {saved['classes']} classes, but the run has {classes}")
    return classifier.eval().requires_grad_(False), experts.eval().requires_grad_(False)


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        prog="ppap",
        description="Guide a run of train.py by a classifier and its experts for noisy images.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"ppap: {message}")
    add = parser.add_argument
    add("run", help="folder or checkpoint of a run with classes")
    add("--guide", metavar="FOLDER", help="folder of trained experts; without it, train them")
    add("--plain", action="store_true", help="with --guide: the classifier itself, as a baseline")
    add("--scale", type=float, default=2.0, help="with --guide: guidance scale (default 2)")
    add("--n", type=int, default=100, help="with --guide: number of images (default 100)")
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
    add("--rank", type=int, default=3, help="training: rank of the weight changes (default 3)")
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
    if options.guide:
        check_out(options.out)
    else:
        os.makedirs(options.out, exist_ok=True)
    return options


def draw_guided(options, net, config, schedule, settings, device):
    """Draw images guided by the experts of --guide, and write them to --out."""
    classifier, experts = load_guide(options.guide, device, len(config["classes"]))
    # Baseline: the classifier itself, as the only expert for all t.
    if options.plain:
        experts = [classifier]
    guided_net = guided_by(net, experts, options.scale, schedule)
    label = labels(config, options.n)
    images = drawn(guided_net, config, schedule, label, options.batch, device, **settings)
    write_images(options.out, images, label, config["classes"])


def train_guide(options, net, config, schedule, settings, device):
    """Train a classifier and its experts, and write them to --out."""
    num_classes = len(config["classes"])
    data = open_images(config, device)
    classifier = trained_classifier(data, num_classes, device, seed=options.seed)

    # The experts learn from images that the run draws with the null label.
    null_labels = torch.full((options.images,), num_classes)
    samples = drawn(net, config, schedule, null_labels, options.batch, device, **settings)
    images = to_float(samples.movedim(3, 1).to(device))  # (N, 3, H, W)
    experts = transfer(
        classifier,
        options.experts,
        images,
        schedule,
        steps=options.updates,
        rank=options.rank,
        seed=options.seed,
    )
    print_accuracies(options, config, schedule, classifier, experts, device)
    save_guide(options.out, num_classes, options.rank, classifier, experts)


def print_accuracies(options, config, schedule, classifier, experts, device):
    """Print the accuracy of the classifier and of its experts at ten noise levels."""
    # The trained weights of an expert, compared with those of the classifier.
    new = expert(classifier, options.rank)
    trained = sum(p.numel() for p in new.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in classifier.parameters())
    print(
        f"{options.experts} experts, trained on {options.images} samples; each trains as many "
        f"parameters as {100 * share:.1f} % of the classifier's; accuracy:"
    )

    # Both classify the same noisy images. Those of built-in Shapes are new to them.
    times = [0.05 + 0.1 * i for i in range(10)]
    x, y = some_images(config, 1000, device)
    rows = (
        ("classifier", lambda z, logsnr: classifier(z)),
        ("experts", as_one(experts, schedule)),
    )
    for name, classify in rows:
        shares = accuracies(classify, x, y, schedule, times)
        by_time = " ".join(f"t={t:.2f}: {100 * value:.0f} %" for t, value in zip(times, shares))
        print(f"{name:10s} {by_time}, mean {100 * sum(shares) / 10:.1f} %")


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
    # The images for the experts are drawn without labels.
    net, config, schedule = load_run(options.run, device, null_label=not options.guide)
    settings = dict(steps=options.steps, sampler="ddim", seed=options.seed)
    command = draw_guided if options.guide else train_guide
    command(options, net, config, schedule, settings, device)


if __name__ == "__main__":
    run_command(main)
