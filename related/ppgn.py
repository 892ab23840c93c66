"""PPGN, plug and play generative networks (arXiv 1612.00005): pictures of a condition by a chain that follows the gradients of a prior and of a classifier.

h <- h + eps1 (R(h) - h) + eps2 grad log p(y | decode(h)) + N(0, eps3^2), where R is a denoising auto-encoder, of which R(h) - h is the gradient of the log
prior times the variance of its noise. Here a trained diffusion net at one noise level is that auto-encoder, and h the picture itself (the paper's PPGN-x).

    python -m related.ppgn runs/shapes-32 --guide runs/ppap --out grid.png               # the classifier of related.ppap
    python -m related.ppgn runs/shapes-32 --guide runs/ppap --prior 0 --out grid.png     # without the prior: noise that fools the classifier
    python -m related.ppgn runs/shapes-32 --guide runs/ppap --inpaint --out grid.png     # the middle of shapes filled in
"""

import argparse
import math
import sys

import numpy as np
import torch

from data import Shapes, open_data
from related.ppap import Classifier
from sample import in_bf16, join_ranks, load, make_grid, mix_seed, parse_labels, pixels, run_command, to_uint8, writing
from schedule import alpha_sigma, x_from_v
from train import DEFAULTS


def prior_from_diffusion(net, logsnr):
    """h -> R(h) - h, R(h) = x_hat of z = alpha h: the net as a denoising auto-encoder for noise of variance exp(-logsnr) in h. logsnr: a number.

    Divided by that variance it is the gradient of log p of a picture with such noise.
    """
    @torch.no_grad()
    def prior(h):
        level = torch.full((len(h),), float(logsnr), dtype=h.dtype, device=h.device)
        z = alpha_sigma(level, like=h)[0] * h
        return x_from_v(z, net(z, level, None).to(h.dtype), level) - h

    return prior


def chain(prior, log_condition, h, eps1, eps2, eps3, steps, *, decode=lambda h: h, lr=None, limits=None, mask=None, known=None, generator=None):
    """Runs the chain from h (B, ...) and returns its last state, in which known parts, if any, are pasted.

    prior: h -> R(h) - h, or None. log_condition: x -> log p(y | x), (B,), differentiable: a class, a hidden unit, anything. decode: from h to x.
    lr: normalizes each step d as in the authors' code, h + lr / mean|d| d, so that only ratios of eps1, eps2 and eps3 count; None does not.
    limits: (low, high) that h is clipped to. mask, known: parts of h, where mask is 1, that are what `known` says in every step.
    """
    for _ in range(steps):
        d = torch.zeros_like(h) if prior is None else eps1 * prior(h)
        if eps2:
            with torch.enable_grad():
                at = h.detach().requires_grad_(True)
                d = d + eps2 * torch.autograd.grad(log_condition(decode(at)).sum(), at)[0]
        if eps3:
            d = d + eps3 * torch.randn(h.shape, dtype=h.dtype, device=h.device, generator=generator)
        if lr is not None:
            d = lr / d.flatten(1).abs().mean(1).clamp(min=1e-30).reshape(-1, *[1] * (h.ndim - 1)) * d
        h = h + d
        h = h if limits is None else h.clamp(*limits)
        h = h if mask is None else torch.where(mask > 0, known, h)
    return h


def main(argv=None):
    parser = argparse.ArgumentParser(prog="ppgn", description="Draw pictures of classes by a chain in pixels.", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"ppgn: {message}")
    parser.add_argument("run", help="a run's folder or a checkpoint, with classes")
    parser.add_argument("--guide", metavar="FOLDER", required=True, help="where related.ppap has put its experts, and the classifier that is used here")
    parser.add_argument("--prior", type=float, default=0.3, help="eps1")
    parser.add_argument("--condition", type=float, default=0.05, help="eps2")
    parser.add_argument("--noise", type=float, default=0.02, help="eps3")
    parser.add_argument("--logsnr", type=float, default=0.0, help="noise level of the auto-encoder")
    parser.add_argument("--chain", type=int, default=200, help="steps")
    parser.add_argument("--inpaint", action="store_true", help="start from new shapes, of which the outer half stays")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)
    numbers = (options.prior, options.condition, options.noise, options.logsnr)
    if min(options.n, options.chain) < 1 or options.seed < 0 or not all(map(math.isfinite, numbers)) or not options.out.endswith((".png", ".npz")):
        raise ValueError("--n and --chain go from 1, --seed from 0; --out takes grid.png or samples.npz")
    _, world, device = join_ranks(options.device)
    if world > 1:
        raise ValueError("this command takes one process")
    net, config, _ = load(options.run, device)
    saved = torch.load(f"{options.guide}/experts.pt", map_location=device, weights_only=True)
    if saved["classes"] != len(config["classes"]) or config.get("captions") is not None:
        raise ValueError(f"{options.guide} knows {saved['classes']} classes, {options.run} {len(config['classes'])}")
    classifier = Classifier(saved["classes"]).to(device)
    classifier.load_state_dict(saved["classifier"])
    classifier.eval().requires_grad_(False)
    label, shape = parse_labels(None, config["classes"], options.n).to(device), (options.n, 3, *pixels(config["res"]))
    generator = torch.Generator(device).manual_seed(mix_seed(options.seed))
    h, mask, known = 0.5 * torch.randn(shape, generator=generator, device=device), None, None
    if options.inpaint:
        data = open_data(DEFAULTS | config, device) if config["data"] else Shapes(config["res"], device, first=2**30)
        known = data[range(options.n)][0].to(device) / 127.5 - 1
        mask = torch.ones_like(known)
        top, left = shape[2] // 4, shape[3] // 4
        mask[:, :, top:shape[2] - top, left:shape[3] - left] = 0
        h = torch.where(mask > 0, known, h)
    log_condition = lambda x: classifier(x).log_softmax(1).gather(1, label[:, None])[:, 0]
    prior = prior_from_diffusion(in_bf16(net, config["bf16"]), options.logsnr) if options.prior else None
    h = chain(prior, log_condition, h, *numbers[:3], options.chain, limits=(-1.5, 1.5), mask=mask, known=known, generator=generator)
    with torch.no_grad():
        print(f"the classifier is sure of its class in {100 * (classifier(h.clamp(-1, 1)).argmax(1) == label).float().mean():.1f} % of {options.n} pictures")
    pictures = to_uint8(h).permute(0, 2, 3, 1).cpu().numpy()
    with writing(options.out) as file:
        if options.out.endswith(".npz"):
            np.savez(file, arr_0=pictures, y=label.cpu().numpy())
        else:
            make_grid(pictures, len(config["classes"])).save(file, "PNG")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
