"""PPAP (arXiv 2212.05973): a classifier that never saw noise guides a diffusion model, by experts for ranges of t, trained without any label.

An expert is the frozen classifier with a few new weights (low-rank changes of its convolutions, its biases and norms) that learns to say of a noisy
picture what the classifier says of the clean one. The pictures it learns from are drawn by the diffusion model itself.

    python -m related.ppap runs/shapes-32 --experts 5 --out runs/ppap            # a classifier of the run's pictures, and its experts: runs/ppap/experts.pt
    python -m related.ppap runs/shapes-32 --guide runs/ppap --scale 2 --n 100 --out grid.png        # pictures without label, guided by them
"""

import argparse
import copy
import math
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from data import open_data
from sample import in_bf16, join_ranks, load, make_grid, parse_labels, pixels, run_command, sample, to_uint8, writing
from schedule import alpha_sigma, diffuse
from train import DEFAULTS


class Classifier(nn.Module):
    """A small classifier, the one to be guided by. x: (B, 3, H, W) in [-1, 1], clean or not. Returns logits (B, num_classes)."""

    def __init__(self, num_classes):
        super().__init__()
        unit = lambda a, b: [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*unit(3, 32), *unit(32, 64), *unit(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(16 * 128, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


class LowRank(nn.Module):
    """A change of a weight, W + (alpha / rank) B A, at first 0. weight: (out, in) or (out, in, k, k), of which B A, (out k, in k), is a view."""

    def __init__(self, weight, rank, alpha=8.0):
        super().__init__()
        k = weight.shape[2] if weight.ndim == 4 else 1
        self.a, self.b = nn.Parameter(torch.empty(rank * k, weight.shape[1] * k)), nn.Parameter(torch.zeros(weight.shape[0] * k, rank * k))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.factor = alpha / rank

    def forward(self, weight):
        return weight + self.factor * (self.b @ self.a).view_as(weight)


def expert(classifier, rank=3, last="head"):
    """A copy of the classifier of which only low-rank changes of convolutions, biases and norms can be trained, and nothing of the layer `last`."""
    net = copy.deepcopy(classifier).requires_grad_(False)
    for name, module in list(net.named_modules()):
        if name == last:
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
        for parameter in (getattr(module, "bias", None), module.weight if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) else None):
            if parameter is not None:
                parameter.requires_grad_(True)
    return net


def expert_of(logsnr, n, schedule):
    """Which of n experts of equal shares of t, from t = 0 on, a noise level belongs to. logsnr: (B,). Returns int64 (B,)."""
    ends = schedule(torch.arange(n - 1, 0, -1, dtype=torch.float64) / n).to(logsnr.device)  # logsnr at t = (n - 1) / n, ..., 1 / n, rising
    return n - 1 - torch.bucketize(logsnr.double(), ends)


def guided_by(net, experts, scale, schedule):
    """Classifier guidance as a net: eps - scale sigma grad log p(label | z), that is v - scale (sigma / alpha) grad, of a net that is not told the label.

    experts: from noisy pictures to logits, each for its share of t. Where these differ within a batch, each expert sees its pictures.
    """
    def guided_net(z, logsnr, label):
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            which = expert_of(logsnr, len(experts), schedule)
            log_p = sum(experts[k](z[which == k]).log_softmax(1).gather(1, label[which == k, None]).sum() for k in which.unique().tolist())
            gradient, = torch.autograd.grad(log_p, z)
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return net(z.detach(), logsnr, None) - scale * sigma / alpha * gradient

    guided_net.num_classes = getattr(net, "num_classes", None)
    return guided_net if scale else lambda z, logsnr, label=None: net(z, logsnr, None)


def transfer(classifier, n, pictures, schedule, *, steps=300, batch=64, lr=1e-3, rank=3, temperature=0.25, seed=0):
    """n experts for equal shares of t, from pictures (N, 3, H, W) in [-1, 1] alone: there is no argument for labels.

    Each starts as the classifier (the authors' code goes on from the expert before) and minimizes KL(softmax(classifier(x) / temperature), softmax(expert(z))).
    """
    experts, device = nn.ModuleList(), pictures.device
    for k in range(n):
        torch.manual_seed(seed + k)
        net = expert(classifier, rank).train()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr, weight_decay=0.05)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = pictures[torch.randint(len(pictures), (batch,), device=device)]
            z = diffuse(x, torch.randn_like(x), schedule((k + torch.rand(batch, device=device)) / n))
            with torch.no_grad():
                target = (classifier(x) / temperature).softmax(1)
            loss = F.kl_div(net(z).log_softmax(1), target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        experts.append(net.eval().requires_grad_(False))
    return experts


def trained_classifier(data, num_classes, steps=400, batch=128, seed=0):
    """A Classifier of the clean pictures of a data set, by their labels."""
    torch.manual_seed(seed)
    net = Classifier(num_classes).train()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, y = data[torch.randint(len(data), (batch,)).tolist()]
        loss = F.cross_entropy(net(x.float() / 127.5 - 1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def accuracies(classify, data, schedule, times, seed=0):
    """The share of a data set's first 1,000 pictures whose class is found in their noisy versions at these t. classify: (z, logsnr) -> logits."""
    torch.manual_seed(seed)
    x, y = data[range(1000)]
    x, shares = x.float() / 127.5 - 1, []
    for t in times:
        logsnr = schedule(torch.full((len(x),), t, device=x.device))
        shares.append((classify(diffuse(x, torch.randn_like(x), logsnr), logsnr).argmax(1) == y).float().mean().item())
    return shares


def as_one(experts, schedule):
    """(z, logsnr) -> logits (B, num_classes), of the expert in charge of each picture."""
    def classify(z, logsnr):
        which = expert_of(logsnr, len(experts), schedule)
        logits = {k: experts[k](z[which == k]) for k in which.unique().tolist()}
        all_logits = next(iter(logits.values())).new_empty(len(z), next(iter(logits.values())).shape[1])
        for k, own in logits.items():
            all_logits[which == k] = own
        return all_logits

    return classify


def main(argv=None):
    parser = argparse.ArgumentParser(prog="ppap", description="Guide a run of train.py by a classifier, and its experts for noisy pictures.", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"ppap: {message}")
    parser.add_argument("run", help="a run's folder or a checkpoint, with classes")
    parser.add_argument("--guide", metavar="FOLDER", help="where the experts are; without, they are trained")
    parser.add_argument("--experts", type=int, default=5, help="number of experts to be trained; with --guide: 0 for the classifier itself")
    parser.add_argument("--updates", type=int, default=400, help="of the weights of an expert")
    parser.add_argument("--pictures", type=int, default=2000, help="drawn to learn from")
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", required=True, help="a folder for the experts; with --guide grid.png or samples.npz")
    options = parser.parse_args(argv)
    if min(options.n, options.batch, options.steps, options.updates, options.pictures, options.rank) < 1 or min(options.experts, options.seed) < 0 or not math.isfinite(options.scale):
        raise ValueError("--n, --batch, --steps, --updates, --pictures and --rank go from 1, --experts and --seed from 0")
    if options.guide and not options.out.endswith((".png", ".npz")):
        raise ValueError(f"--out {options.out} is neither grid.png nor samples.npz")
    _, world, device = join_ranks(options.device)
    if world > 1:
        raise ValueError("this command takes one process")
    net, config, schedule = load(options.run, device)
    if not config["classes"] or config.get("captions") is not None:
        raise ValueError(f"{options.run} was trained without classes: there is nothing to guide towards")
    net, shape = in_bf16(net, config["bf16"]), (3, *pixels(config["res"]))
    draw = lambda net, y, first: sample(net, (len(y), *shape), schedule, steps=options.steps, sampler="ddim", label=y, first=first, seed=options.seed, device=device)

    if not options.guide:
        os.makedirs(options.out, exist_ok=True)
        data = open_data(DEFAULTS | config, device)
        classifier = trained_classifier(data, len(config["classes"]), seed=options.seed).to(device)
        unlabeled = torch.full((options.pictures,), len(config["classes"]), device=device)
        drawn = torch.cat([draw(net, unlabeled[i:i + options.batch], i).clamp(-1, 1) for i in range(0, options.pictures, options.batch)])
        experts = transfer(classifier, max(1, options.experts), drawn, schedule, steps=options.updates, rank=options.rank, seed=options.seed)
        one = expert(classifier, options.rank)
        share = sum(p.numel() for p in one.parameters() if p.requires_grad) / sum(p.numel() for p in classifier.parameters())
        print(f"{len(experts)} experts from {options.pictures} drawn pictures, {100 * share:.1f} % of the classifier's parameters each; share of classes found:")
        others = type(data)(config["res"], device, first=2**30) if not config["data"] else data
        times = [0.05 + 0.1 * i for i in range(10)]
        for name, classify in (("classifier", lambda z, logsnr: classifier(z)), ("experts", as_one(experts, schedule))):
            shares = accuracies(classify, others, schedule, times)
            print(f"{name:10s} " + " ".join(f"t={t:.2f}: {100 * value:.0f} %" for t, value in zip(times, shares)) + f", mean {100 * sum(shares) / 10:.1f} %")
        with writing(f"{options.out}/experts.pt") as file:
            torch.save(dict(classes=len(config["classes"]), rank=options.rank, n=len(experts), classifier=classifier.state_dict(), experts=experts.state_dict()), file)
        print(f"wrote {options.out}/experts.pt")
        return

    saved = torch.load(f"{options.guide}/experts.pt", map_location=device, weights_only=True)
    if saved["classes"] != len(config["classes"]):
        raise ValueError(f"{options.guide} knows {saved['classes']} classes, {options.run} {len(config['classes'])}")
    classifier = Classifier(saved["classes"]).to(device)
    experts = nn.ModuleList(expert(classifier, saved["rank"]) for _ in range(saved["n"])).to(device)
    classifier.load_state_dict(saved["classifier"])
    experts.load_state_dict(saved["experts"])
    guides = experts if options.experts else [classifier]
    for module in guides:
        module.eval().requires_grad_(False)
    guided_net, label = guided_by(net, guides, options.scale, schedule), parse_labels(None, config["classes"], options.n).to(device)
    pictures = torch.cat([to_uint8(draw(guided_net, label[i:i + options.batch], i)).permute(0, 2, 3, 1).cpu() for i in range(0, options.n, options.batch)]).numpy()
    with writing(options.out) as file:
        if options.out.endswith(".npz"):
            np.savez(file, arr_0=pictures, y=label.cpu().numpy())
        else:
            make_grid(pictures, len(config["classes"])).save(file, "PNG")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
