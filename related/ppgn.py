"""PPGN, plug and play generative networks (arXiv 1612.00005): pictures of a condition by a chain that follows the gradients of a prior and of a classifier.

h <- h + eps1 (R(h) - h) + eps2 grad log p(y | decode(h)) + N(0, eps3^2), where R is a denoising auto-encoder, of which R(h) - h is the gradient of the log
prior times the variance of its noise. Here a trained diffusion net at one noise level is that auto-encoder. With --plain h is the picture itself (the paper's
PPGN-x); otherwise, as in its PPGN-h, what is drawn is decoded from h: h is a picture with this level's noise, which keeps the chain moving, and R its decoder.

    python -m related.ppgn runs/shapes-32 --guide runs/ppap --out grid.png               # the classifier of related.ppap
    python -m related.ppgn runs/shapes-32 --guide runs/ppap --plain --prior 0 --noise 0.1 --out grid.png        # without a prior: noise that fools the classifier
    python -m related.ppgn runs/shapes-32 --guide runs/ppap --inpaint --out grid.png     # the middle of shapes filled in
"""

import argparse
import math
import sys

import torch

from related.common import (
    check_numbers,
    check_out,
    labels,
    load_run,
    noise_of,
    one_process,
    some_pictures,
    write_pictures,
)
from related.ppap import load_guide
from sample import pixels, run_command, to_uint8
from schedule import alpha_sigma, x_from_v


def denoiser(net, logsnr):
    """R: h -> x_hat of z = alpha h, the net as a denoising auto-encoder for noise of variance exp(-logsnr) in h. logsnr: a number."""

    def decode(h):
        level = torch.full((len(h),), float(logsnr), dtype=h.dtype, device=h.device)
        z = alpha_sigma(level, like=h)[0] * h
        return x_from_v(z, net(z, level, None).to(h.dtype), level)

    return decode


def prior_from_diffusion(net, logsnr):
    """h -> R(h) - h (see denoiser). Divided by exp(-logsnr) it is the gradient of log p of a picture with such noise."""
    decode = denoiser(net, logsnr)
    return torch.no_grad()(lambda h: decode(h) - h)


@torch.no_grad()
def chain(
    prior,
    log_condition,
    h,
    eps1,
    eps2,
    eps3,
    steps,
    *,
    noise=None,
    decode=lambda h: h,
    lr=None,
    limits=None,
    mask=None,
    known=None,
):
    """Runs the chain from h (B, ...) and returns its last state.

    prior: h -> R(h) - h, or None. log_condition: x -> log p(y | x), (B,), differentiable: a class, a hidden unit, anything. noise: a function that
    returns standard normal noise like h, with each call other (default: torch.randn). decode: from h to x.
    lr: normalizes each step d as in the authors' code, h + lr / mean|d| d, so that only ratios of eps1, eps2 and eps3 count; None does not.
    limits: (low, high) that h is clipped to. mask, known: parts of h, where mask is 1, that are what `known` says, before and after every step.
    """
    paste = lambda h: h if mask is None else torch.where(mask > 0, known, h)
    h = paste(h)
    for _ in range(steps):
        d = torch.zeros_like(h) if prior is None else eps1 * prior(h)
        if eps2:
            with torch.enable_grad():
                at = h.detach().requires_grad_(True)
                d = d + eps2 * torch.autograd.grad(log_condition(decode(at)).sum(), at)[0]
        if eps3:
            d = d + eps3 * (torch.randn_like(h) if noise is None else noise())
        if lr is not None:
            d = (
                lr
                / d.flatten(1).abs().mean(1).clamp(min=1e-30).reshape(-1, *[1] * (h.ndim - 1))
                * d
            )
        h = h + d
        h = paste(h if limits is None else h.clamp(*limits))
    return h


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="ppgn",
        description="Draw pictures of classes by a chain in pixels.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"ppgn: {message}")
    parser.add_argument("run", help="a run's folder or a checkpoint, with classes")
    parser.add_argument(
        "--guide",
        metavar="FOLDER",
        required=True,
        help="where related.ppap has put its experts, and the classifier that is used here",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="h is the picture itself, not one with noise that is decoded",
    )
    parser.add_argument("--prior", type=float, default=0.1, help="eps1")
    parser.add_argument("--condition", type=float, default=5.0, help="eps2")
    parser.add_argument(
        "--noise",
        type=float,
        help="eps3 (default: Langevin's, the square root of 2 eps1 exp(-logsnr))",
    )
    parser.add_argument("--logsnr", type=float, default=0.0, help="noise level of the auto-encoder")
    parser.add_argument("--chain", type=int, default=80, help="steps")
    parser.add_argument(
        "--inpaint",
        action="store_true",
        help="start from other pictures, of which all but the middle quarter stays",
    )
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)
    check_numbers(options, ("n", "batch", "chain"), ("seed",))
    check_out(options.out)
    if not -20 <= options.logsnr <= 20 or not 0 <= options.prior < math.inf:
        raise ValueError("--prior takes a finite number from 0 on, --logsnr one from -20 to 20")
    std = math.exp(-0.5 * options.logsnr)  # of the noise in h
    numbers = (
        options.prior,
        options.condition,
        math.sqrt(2 * options.prior) * std if options.noise is None else options.noise,
    )
    if not all(map(math.isfinite, numbers)):
        raise ValueError("--condition and --noise take finite numbers")
    device = one_process(options.device)
    net, config, _ = load_run(options.run, device)
    classifier, _ = load_guide(options.guide, device, len(config["classes"]))
    all_known, label = (
        some_pictures(config, options.n, device)
        if options.inpaint
        else (None, labels(config, options.n).to(device))
    )
    n, shape, pictures, found = len(label), (3, *pixels(config["res"])), [], 0
    mask = torch.ones(shape, device=device)
    top, left = shape[1] // 4, shape[2] // 4
    mask[:, top : shape[1] - top, left : shape[2] - left] = 0
    prior = prior_from_diffusion(net, options.logsnr) if options.prior else None
    decode, limits = (
        (lambda h: h, (-1.5, 1.5)) if options.plain else (denoiser(net, options.logsnr), None)
    )
    for first in range(0, n, options.batch):
        y = label[first : first + options.batch]
        log_condition = lambda x: classifier(x).log_softmax(1).gather(1, y[:, None])[:, 0]
        noise = noise_of(options.seed, range(first, first + len(y)), shape, device)
        known, begin = all_known[first : first + len(y)] if options.inpaint else None, std * noise()
        inpainting = (
            dict(mask=mask, known=known if options.plain else known + begin)
            if options.inpaint
            else {}
        )
        h = chain(
            prior,
            log_condition,
            0.5 * noise() if options.plain else begin,
            *numbers,
            options.chain,
            noise=noise,
            decode=decode,
            limits=limits,
            **inpainting,
        )
        with torch.no_grad():
            x = decode(h).clamp(-1, 1)
            x = torch.where(mask > 0, known, x) if options.inpaint else x
            found += (classifier(x).argmax(1) == y).sum().item()
        pictures.append(to_uint8(x).permute(0, 2, 3, 1).cpu())
    print(f"the classifier that guided finds the class in {100 * found / n:.1f} % of {n} pictures")
    write_pictures(options.out, torch.cat(pictures), label, config["classes"])


if __name__ == "__main__":
    run_command(main)
