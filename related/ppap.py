"""PPAP (arXiv 2212.05973): a classifier that never saw noise guides a diffusion model, by experts for ranges of t, trained without any label.

An expert is the frozen classifier with a few trained weights (low-rank changes of its convolutions; its biases and norms) that learns to say of a noisy
picture what the classifier says of the clean one. The pictures it learns from are drawn by the diffusion model itself.

    python -m related.ppap runs/shapes-32 --experts 5 --updates 1500 --out runs/ppap     # a classifier of the run's pictures, and its experts: runs/ppap/experts.pt
    python -m related.ppap runs/shapes-32 --guide runs/ppap --scale 2 --n 100 --out grid.png        # pictures without label, guided by them
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
    labels,
    load_run,
    one_process,
    open_pictures,
    some_pictures,
    write_pictures,
)
from sample import mix_seed, run_command, to_float, writing
from schedule import alpha_sigma, diffuse


class Classifier(nn.Module):
    """A small classifier, the one to be guided by. x: (B, 3, H, W) in [-1, 1], clean or not. Returns logits (B, num_classes)."""

    def __init__(self, num_classes):
        super().__init__()
        unit = lambda a, b: [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(
            *unit(3, 32), *unit(32, 64), *unit(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.head = nn.Linear(16 * 128, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


class LowRank(nn.Module):
    """A change of a weight, W + (alpha / rank) B A, at first 0. weight: (out, in), or (out, in, k, k) of a square kernel, of which B A, (out k, in k), is a view."""

    def __init__(self, weight, rank, alpha=8.0):
        super().__init__()
        k = weight.shape[2] if weight.ndim == 4 else 1
        self.a, self.b = (
            nn.Parameter(torch.empty(rank * k, weight.shape[1] * k)),
            nn.Parameter(torch.zeros(weight.shape[0] * k, rank * k)),
        )
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.factor = alpha / rank

    def forward(self, weight):
        return weight + self.factor * (self.b @ self.a).view_as(weight)


def expert(classifier, rank=3, last="head"):
    """A copy of the classifier of which only low-rank changes of convolutions and linear layers, biases and norms can be trained, and nothing of the layer `last`."""
    net = copy.deepcopy(classifier).requires_grad_(False)
    for name, module in list(net.named_modules()):
        if name == last:
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
        for parameter in (
            getattr(module, "bias", None),
            module.weight
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
            else None,
        ):
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(True)
    return net


def expert_of(logsnr, n, schedule):
    """Which of n experts of equal shares of t, from t = 0 on, a noise level belongs to. logsnr: (B,). Returns int64 (B,)."""
    ends = schedule(torch.arange(n - 1, 0, -1, dtype=torch.float64) / n).to(
        logsnr.device
    )  # logsnr at t = (n - 1) / n, ..., 1 / n, rising
    return n - 1 - torch.bucketize(logsnr.double(), ends)


def guided_by(net, experts, scale, schedule):
    """Classifier guidance as a net: eps - scale sigma grad log p(label | z), that is v - scale (sigma / alpha) grad, of a net that is not told the label.

    experts: from noisy pictures to logits, each for its share of t. Where these differ within a batch, each expert sees its pictures.
    """

    def guided_net(z, logsnr, label=None):
        v_hat = net(z, logsnr, None)
        if not scale:
            return v_hat
        if label is None:
            raise ValueError("guidance needs labels: without any there is nothing to guide towards")
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            which = expert_of(logsnr, len(experts), schedule)
            log_p = sum(
                experts[k](z[which == k]).log_softmax(1).gather(1, label[which == k, None]).sum()
                for k in which.unique().tolist()
            )
            (gradient,) = torch.autograd.grad(log_p, z)
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return v_hat - scale * sigma / alpha * gradient

    guided_net.num_classes = getattr(net, "num_classes", None)
    return guided_net


def transfer(
    classifier,
    n,
    pictures,
    schedule,
    *,
    steps=300,
    batch=64,
    lr=1e-3,
    rank=3,
    temperature=0.25,
    seed=0,
):
    """n experts for equal shares of t, from pictures (N, 3, H, W) in [-1, 1] alone: there is no argument for labels.

    Each starts as the classifier (the authors' code goes on from the expert before) and minimizes KL(softmax(classifier(x) / temperature), softmax(expert(z))).
    classifier: in eval mode. Statistics of batch norms move along, as in the authors' code.
    """
    experts, device = nn.ModuleList(), pictures.device
    for k in range(n):
        torch.manual_seed(mix_seed(seed, 1 + k))
        net = expert(classifier, rank).train()
        optimizer = torch.optim.AdamW(
            [p for p in net.parameters() if p.requires_grad], lr, weight_decay=0.05
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = pictures[torch.randint(len(pictures), (batch,), device=device)]
            z = diffuse(
                x, torch.randn_like(x), schedule((k + torch.rand(batch, device=device)) / n)
            )
            with torch.no_grad():
                target = (classifier(x) / temperature).softmax(1)
            loss = F.kl_div(net(z).log_softmax(1), target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        experts.append(net.eval().requires_grad_(False))
    return experts


def trained_classifier(data, num_classes, device, steps=400, batch=128, seed=0):
    """A Classifier of the clean pictures of a data set, by their labels, in eval mode."""
    torch.manual_seed(mix_seed(seed, 0))
    net = Classifier(num_classes).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, y = (tensor.to(device) for tensor in data[torch.randint(len(data), (batch,)).tolist()])
        loss = F.cross_entropy(net(to_float(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def accuracies(classify, x, y, schedule, times, seed=0):
    """The share of pictures (B, 3, H, W) in [-1, 1] whose class is found in their noisy versions at these t. classify: (z, logsnr) -> logits."""
    torch.manual_seed(seed)
    shares = []
    for t in times:
        logsnr = schedule(torch.full((len(x),), t, device=x.device))
        z = diffuse(x, torch.randn_like(x), logsnr)
        right = sum(
            (classify(z[i : i + 100], logsnr[i : i + 100]).argmax(1) == y[i : i + 100]).sum().item()
            for i in range(0, len(x), 100)
        )
        shares.append(right / len(x))
    return shares


def as_one(experts, schedule):
    """(z, logsnr) -> logits (B, num_classes), of the expert in charge of each picture."""

    def classify(z, logsnr):
        which = expert_of(logsnr, len(experts), schedule)
        logits = {k: experts[k](z[which == k]) for k in which.unique().tolist()}
        all_logits = next(iter(logits.values())).new_empty(
            len(z), next(iter(logits.values())).shape[1]
        )
        for k, own in logits.items():
            all_logits[which == k] = own
        return all_logits

    return classify


def load_guide(folder, device, classes):
    """(classifier, experts) that this command wrote, for a run with so many classes. Raises FileNotFoundError or ValueError."""
    path = os.path.join(folder, "experts.pt")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        classifier = Classifier(saved["classes"]).to(device)
        experts = nn.ModuleList(expert(classifier, saved["rank"]) for _ in range(saved["n"])).to(
            device
        )
        classifier.load_state_dict(saved["classifier"])
        experts.load_state_dict(saved["experts"])
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(
            f"{path} was not written by related.ppap ({type(error).__name__})"
        ) from error
    if saved["classes"] != classes:
        raise ValueError(f"{path} knows {saved['classes']} classes, the run {classes}")
    return classifier.eval().requires_grad_(False), experts.eval().requires_grad_(False)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="ppap",
        description="Guide a run of train.py by a classifier, and its experts for noisy pictures.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"ppap: {message}")
    parser.add_argument("run", help="a run's folder or a checkpoint, with classes")
    parser.add_argument(
        "--guide", metavar="FOLDER", help="where the experts are; without, they are trained"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="with --guide: the classifier itself guides, for comparison",
    )
    parser.add_argument(
        "--scale", type=float, default=2.0, help="with --guide: of guidance (default 2)"
    )
    parser.add_argument("--n", type=int, default=100, help="with --guide: pictures (default 100)")
    parser.add_argument(
        "--experts", type=int, default=5, help="in training: their number (default 5)"
    )
    parser.add_argument(
        "--updates", type=int, default=400, help="in training: of the weights of an expert"
    )
    parser.add_argument(
        "--pictures", type=int, default=2000, help="in training: drawn to learn from"
    )
    parser.add_argument(
        "--rank", type=int, default=3, help="in training: of the changes of a weight"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--out",
        required=True,
        help="a folder for the experts; with --guide grid.png or samples.npz",
    )
    options = parser.parse_args(argv)
    check_numbers(
        options, ("n", "experts", "updates", "pictures", "rank", "batch", "steps"), ("seed",)
    )
    if not math.isfinite(options.scale):
        raise ValueError("--scale takes a finite number")
    if options.guide:
        check_out(options.out)
    else:
        os.makedirs(options.out, exist_ok=True)
    device = one_process(options.device)
    net, config, schedule = load_run(options.run, device)
    settings = dict(steps=options.steps, sampler="ddim", seed=options.seed)

    if options.guide:
        classifier, experts = load_guide(options.guide, device, len(config["classes"]))
        guided_net, label = (
            guided_by(net, [classifier] if options.plain else experts, options.scale, schedule),
            labels(config, options.n),
        )
        return write_pictures(
            options.out,
            drawn(guided_net, config, schedule, label, options.batch, device, **settings),
            label,
            config["classes"],
        )

    classifier = trained_classifier(
        open_pictures(config, device), len(config["classes"]), device, seed=options.seed
    )
    unlabeled = torch.full((options.pictures,), len(config["classes"]))
    pictures = to_float(
        drawn(net, config, schedule, unlabeled, options.batch, device, **settings)
        .movedim(3, 1)
        .to(device)
    )
    experts = transfer(
        classifier,
        options.experts,
        pictures,
        schedule,
        steps=options.updates,
        rank=options.rank,
        seed=options.seed,
    )
    share = sum(
        p.numel() for p in expert(classifier, options.rank).parameters() if p.requires_grad
    ) / sum(p.numel() for p in classifier.parameters())
    print(
        f"{options.experts} experts from {options.pictures} drawn pictures, {100 * share:.1f} % of the classifier's parameters each; share of classes found:"
    )
    times, (x, y) = [0.05 + 0.1 * i for i in range(10)], some_pictures(config, 1000, device)
    for name, classify in (
        ("classifier", lambda z, logsnr: classifier(z)),
        ("experts", as_one(experts, schedule)),
    ):
        shares = accuracies(classify, x, y, schedule, times)
        print(
            f"{name:10s} "
            + " ".join(f"t={t:.2f}: {100 * value:.0f} %" for t, value in zip(times, shares))
            + f", mean {100 * sum(shares) / 10:.1f} %"
        )
    with writing(f"{options.out}/experts.pt") as file:
        torch.save(
            dict(
                classes=len(config["classes"]),
                rank=options.rank,
                n=options.experts,
                classifier=classifier.state_dict(),
                experts=experts.state_dict(),
            ),
            file,
        )
    print(f"wrote {options.out}/experts.pt")


if __name__ == "__main__":
    run_command(main)
