"""PPGN: plug and play generative networks (Nguyen et al., 2016, arXiv 1612.00005).

A chain draws images of a class by following two gradients, that of a prior and that of a
classifier. Any classifier will do. The prior is a denoising autoencoder R: R(h) - h is the gradient
of log p(h) times the variance of its noise. Here R is a trained diffusion net at one noise level.
By default h is an image with the noise of that level, which keeps the chain moving, and R decodes
it (as in the paper's PPGN-h). With --plain, h is the image itself (PPGN-x).

    python -m related.ppgn assets/shapes32.pt --guide runs/ppap --out grid.png
    python -m related.ppgn assets/shapes32.pt --guide runs/ppap --inpaint --out grid.png
    python -m related.ppgn assets/shapes32.pt --guide runs/ppap --plain --prior 0 --noise 0.1

runs/ppap is a folder of related.ppap, whose classifier is used. The second command fills in the
middle of images. The third one has no prior, so it draws noise that fools the classifier.
"""

import argparse
import math
import sys

import torch

from related.common import (
    check_numbers,
    check_out,
    introduce,
    labels,
    load_run,
    no_arguments,
    noise_by_number,
    one_process,
    some_images,
    write_images,
)
from related.ppap import load_guide
from sample import to_uint8
from schedule import alpha_sigma, x_from_v
from support.runtime import pixels, run_command

# ---------------------------------------------------------------- the prior


def denoiser(net, logsnr):
    """Turn a diffusion net into a denoising autoencoder R(h), at one logsnr (a number).

    The noise in h has the variance exp(-logsnr). h: (B, C, H, W). R(h) is like h.
    """

    def decode(h):
        # h = x + noise with signal-to-noise ratio exp(logsnr), so z = alpha h.
        level = torch.full((len(h),), float(logsnr), dtype=h.dtype, device=h.device)
        alpha, _ = alpha_sigma(level, like=h)
        z = alpha * h
        return x_from_v(z, net(z, level, None).to(h.dtype), level)

    return decode


def prior_from_diffusion(net, logsnr):
    """Return the function h -> R(h) - h, see denoiser.

    Divided by exp(-logsnr), it is the gradient of log p(h) of images with that noise.
    """
    decode = denoiser(net, logsnr)

    @torch.no_grad()
    def prior(h):
        return decode(h) - h

    return prior


# ---------------------------------------------------------------- the chain


def identity(h):
    """The decoder of PPGN-x: h is the image."""
    return h


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
    decode=identity,
    lr=None,
    limits=None,
    mask=None,
    known=None,
):
    """Run the chain for some steps from h (B, ...). Returns its last state.

    h <- h + eps1 (R(h) - h) + eps2 grad_h log p(y | decode(h)) + N(0, eps3^2)

    prior: h -> R(h) - h, or None. log_condition: x -> log p(y | x) (B,), differentiable: a class, a
    hidden unit, or anything else. noise: a function that draws standard normal noise like h
    (default: torch.randn_like). decode: h -> x. limits: (low, high), to clip h. mask, known: where
    mask is 1, h is set to known before and after each step. lr: see below; None is the formula.
    """

    def paste(h):
        return h if mask is None else torch.where(mask > 0, known, h)

    h = paste(h)
    for _ in range(steps):
        # The prior: towards the denoised h.
        d = torch.zeros_like(h) if prior is None else eps1 * prior(h)

        # The condition: the gradient of its log probability, through the decoder.
        if eps2:
            with torch.enable_grad():
                at = h.detach().requires_grad_(True)
                log_p = log_condition(decode(at)).sum()
                d = d + eps2 * torch.autograd.grad(log_p, at)[0]

        # The noise, which lets the chain visit more than one mode.
        if eps3:
            d = d + eps3 * (torch.randn_like(h) if noise is None else noise())

        # The authors' code normalizes each step to lr d / mean|d|, so that only the ratios of
        # eps1, eps2 and eps3 matter.
        if lr is not None:
            size = d.flatten(1).abs().mean(1).clamp(min=1e-30)  # (B,)
            d = lr / size.reshape(-1, *[1] * (h.ndim - 1)) * d

        h = h + d
        if limits is not None:
            h = h.clamp(*limits)
        h = paste(h)
    return h


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range.

    Sets options.noise to its default, Langevin's, if it is not on the command line.
    """
    parser = argparse.ArgumentParser(
        prog="ppgn",
        description="Draw images of classes by a chain along the gradients of a prior and a "
        "classifier.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"ppgn: {message}")
    add = parser.add_argument
    add("run", help="folder or checkpoint of a run with classes")
    add(
        "--guide",
        metavar="FOLDER",
        required=True,
        help="output folder of related.ppap; only its classifier is used",
    )
    add("--plain", action="store_true", help="h is the image itself, not decoded")
    add("--prior", type=float, default=0.1, help="eps1 (default 0.1)")
    add("--condition", type=float, default=5.0, help="eps2 (default 5)")
    add(
        "--noise",
        type=float,
        help="eps3 (default: Langevin's, the square root of 2 eps1 exp(-logsnr))",
    )
    add("--logsnr", type=float, default=0.0, help="noise level of the autoencoder (default 0)")
    add("--chain", type=int, default=80, help="steps of the chain (default 80)")
    add(
        "--inpaint",
        action="store_true",
        help="start from other images, and draw only the middle quarter of each",
    )
    add("--n", type=int, default=60, help="number of images (default 60)")
    add("--batch", type=int, default=64, help="batch size (default 64)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)

    check_numbers(options, ("n", "batch", "chain"), ("seed",))
    check_out(options.out)
    if not -20 <= options.logsnr <= 20 or not 0 <= options.prior < math.inf:
        raise ValueError("--prior must be a finite number, 0 or more, and --logsnr from -20 to 20")

    # Langevin dynamics: a step of size s along the gradient needs noise of variance 2 s. The
    # prior's gradient is (R(h) - h) / exp(-logsnr), so s = eps1 exp(-logsnr).
    if options.noise is None:
        options.noise = math.sqrt(2 * options.prior) * noise_std(options)
    if not all(map(math.isfinite, (options.condition, options.noise))):
        raise ValueError("--condition and --noise must be finite numbers")
    return options


def noise_std(options):
    """Return the standard deviation of the noise in h."""
    return math.exp(-0.5 * options.logsnr)


def border_mask(shape, device):
    """Return a mask of an image's shape (C, H, W): 0 in the middle quarter, 1 elsewhere."""
    # A quarter of each side remains on the left, on the right, at the top and at the bottom.
    mask = torch.ones(shape, device=device)
    top, left = shape[1] // 4, shape[2] // 4
    mask[:, top : shape[1] - top, left : shape[2] - left] = 0
    return mask


def draw(options, net, classifier, shape, y, known, numbers):
    """Draw images x (B, C, H, W) of the classes y (B,) by the chain. shape: (C, H, W).

    known: images (B, C, H, W) whose border stays, or None. numbers: a number per image, for its
    noise.
    """
    # Every image has a generator of its own, so the batch size changes nothing.
    noise = noise_by_number(options.seed, numbers, shape, y.device)
    prior = prior_from_diffusion(net, options.logsnr) if options.prior else None
    start = noise_std(options) * noise()

    # PPGN-x begins with gray images and little noise, PPGN-h with the noise of its level alone.
    if options.plain:
        decode, limits, h = identity, (-1.5, 1.5), 0.5 * noise()
    else:
        decode, limits, h = denoiser(net, options.logsnr), None, start

    # Inpainting: the border of h is that of the known image, in PPGN-h with the level's noise.
    mask = border_mask(shape, y.device)
    inpainting = {}
    if known is not None:
        inpainting = dict(mask=mask, known=known if options.plain else known + start)

    h = chain(
        prior,
        lambda x: classifier(x).log_softmax(1).gather(1, y[:, None])[:, 0],
        h,
        options.prior,
        options.condition,
        options.noise,
        options.chain,
        noise=noise,
        decode=decode,
        limits=limits,
        **inpainting,
    )

    # The last state, decoded to an image. Inpainting pastes the known border once more.
    with torch.no_grad():
        x = decode(h).clamp(-1, 1)
    return x if known is None else torch.where(mask > 0, known, x)


# The authors' scripts: eps1, eps2, eps3, and the number of steps.
PUBLISHED = {
    "class": (1e-5, 1, 1e-17, 200),
    "hidden unit of CaffeNet": (1e-5, 1, 1e-17, 1000),
    "hidden unit of Places": (1e-7, 1, 1e-17, 1000),
    "caption": (1e-3, 1, 1e-17, 200),
    "from a real image": (1e-5, 1, 1e-17, 200),
    "inpainting": (1e-5, 1, 0, 20),
}


def print_configurations():
    """Print the settings of the authors' scripts."""
    print("In the authors' scripts, the weights of prior, condition and noise are:")
    for name, (prior, condition, noise, steps) in PUBLISHED.items():
        print(f"{name:24s} eps1 {prior:g}, eps2 {condition:g}, eps3 {noise:g}, {steps} steps")
    print("They divide each step by its mean absolute value. Our steps are not divided.")


def main(argv=None):
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = parse(argv)
    device = one_process(options.device)
    net, config, _ = load_run(options.run, device)
    shape = (3, *pixels(config["res"]))
    guide = load_guide(options.guide, device, len(config["classes"]))
    if guide.task != "class":
        raise ValueError(f"--guide {options.guide} is for {guide.task}, not for classes")
    classifier = guide.net
    if options.inpaint:
        known, label = some_images(config, options.n, device)
    else:
        known, label = None, labels(config, options.n).to(device)

    images, right = [], 0
    for first in range(0, len(label), options.batch):
        rows = slice(first, first + options.batch)
        y = label[rows]
        own_known = None if known is None else known[rows]
        numbers = range(first, first + len(y))
        x = draw(options, net, classifier, shape, y, own_known, numbers)
        with torch.no_grad():
            right += (classifier(x).argmax(1) == y).sum().item()
        images.append(to_uint8(x).permute(0, 2, 3, 1).cpu())

    # This classifier guided, so it is fooled easily. Judge images with another one.
    share = 100 * right / len(label)
    print(f"the guiding classifier finds the class in {share:.1f} % of {len(label)} images")
    write_images(options.out, torch.cat(images), label, config["classes"])


if __name__ == "__main__":
    run_command(main)
