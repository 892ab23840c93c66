"""PPGN: plug and play generative networks (Nguyen et al., 2016, arXiv 1612.00005).

A chain draws images of a class by following two gradients, that of a prior and that of a
classifier. Any classifier will do. The prior is a denoising autoencoder R: R(h) - h is the gradient
of log p(h) times the variance of its noise. Each variant decodes its state h to an image x = G(h)
and has the prior E(G(h)) - h:

                    h                           G                   E
    (default)       an image with noise         a diffusion net     nothing
    --plain         an image                    nothing             a diffusion net
    --joint VITOK   latents of an autoencoder   its decoder         its encoder

A trained diffusion net at one noise level is a denoising autoencoder. --plain is the paper's PPGN-x
and --joint its Joint PPGN-h, with the autoencoder of related.vitok. The default is ours: PPGN-x
whose state keeps the noise that its autoencoder expects, which keeps the chain moving.

    python -m related.ppgn assets/shapes32.pt --guide runs/guide --out grid.png
    python -m related.ppgn assets/shapes32.pt --guide runs/guide --inpaint --out grid.png
    python -m related.ppgn assets/shapes32.pt --guide runs/guide --plain --prior 0 --noise 0.1
    python -m related.ppgn assets/shapes32.pt --guide runs/guide --joint runs/joint --out grid.png

runs/guide is a folder of related.ppap, whose classifier is used. The second command fills in the
middle of images. The third one has no prior, so it draws noise that fools the classifier.
"""

import argparse
import math
import sys
from functools import partial
from typing import NamedTuple

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
from related.vitok import load_vitok
from sample import to_float, to_uint8
from schedule import alpha_sigma, x_from_v
from support.runtime import pixels, run_command

# ---------------------------------------------------------------- the chain


def identity(h):
    """The decoder of PPGN-x, where h is the image."""
    return h


def denoiser(net, logsnr):
    """Turn a diffusion net into a denoising autoencoder R(h), at one logsnr (a number).

    The noise in h has the variance exp(-logsnr). h: (B, C, H, W). R(h) is like h. Divided by this
    variance, R(h) - h is the gradient of log p(h).
    """

    def decode(h):
        # h = x + noise with signal-to-noise ratio exp(logsnr), so z = alpha h.
        level = torch.full((len(h),), float(logsnr), dtype=h.dtype, device=h.device)
        alpha, _ = alpha_sigma(level, like=h)
        z = alpha * h
        return x_from_v(z, net(z, level, None).to(h.dtype), level)

    return decode


@torch.no_grad()
def chain(
    log_condition,
    h,
    eps1,
    eps2,
    eps3,
    steps,
    *,
    encode=identity,
    decode=identity,
    noise=None,
    lr=None,
    limits=None,
    mask=None,
    known=None,
    eps4=None,
):
    """Run the chain for some steps from h (B, ...). Returns its last state.

    x = decode(h)
    h <- h + eps1 (encode(x) - h) + eps2 grad_h log p(y | x) + N(0, eps3^2)

    log_condition: x -> log p(y | x) (B,), differentiable: a class, a hidden unit, or anything else.
    noise: a function that draws standard normal noise like h (default: torch.randn_like). limits:
    (low, high), to clip h. lr: see below; None is the formula.

    mask, known: for inpainting. Without eps4, h is an image, and where mask is 1 it is set to known
    before and after each step. With eps4, known is the image, and the step has the further term
    eps4 grad_h (-1/2 ||mask (known - x)||^2).
    """

    def paste(h):
        return h if mask is None or eps4 is not None else torch.where(mask > 0, known, h)

    h = paste(h)
    for _ in range(steps):
        # All terms share one decoded image x. Its gradient is needed by the condition and the
        # context.
        with torch.set_grad_enabled(bool(eps2 or eps4)):
            at = h.detach().requires_grad_()
            x = decode(at)
            value = 0.0

            # The context: x should agree with the known pixels. The other two terms see them.
            if eps4 is not None:
                value = value - eps4 * 0.5 * (mask * (known - x)).square().sum()
                x = torch.where(mask > 0, known, x)

            # The condition: its log probability.
            if eps2:
                value = value + eps2 * log_condition(x).sum()
        d = torch.autograd.grad(value, at)[0] if eps2 or eps4 else torch.zeros_like(h)

        # The prior: towards the autoencoded h.
        if eps1:
            d = d + eps1 * (encode(x.detach()) - h)

        # The noise, which lets the chain visit more than one mode.
        if eps3:
            d = d + eps3 * (torch.randn_like(h) if noise is None else noise())

        # The authors' code normalizes each step to lr d / mean|d|, so that only the ratios of
        # eps1, eps2, eps3 and eps4 matter.
        if lr is not None:
            size = d.flatten(1).abs().mean(1).clamp(min=1e-30)  # (B,)
            d = lr / size.reshape(-1, *[1] * (h.ndim - 1)) * d

        h = h + d
        if limits is not None:
            h = h.clamp(*limits)
        h = paste(h)
    return h


def distance_within(images, label):
    """Return the mean distance between two images of one class: a measure of diversity.

    images: (N, C, H, W). label: (N,). The distance is the root of the mean squared difference.
    """
    distances = []
    for y in label.unique():
        own = images[label == y].flatten(1).double()
        distances.append(torch.pdist(own) / own.shape[1] ** 0.5)
    return torch.cat(distances).mean().item()


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
    guide_help = "output folder of related.ppap; only its classifier is used"
    add("--guide", metavar="FOLDER", required=True, help=guide_help)
    add("--plain", action="store_true", help="h is the image itself, not decoded")
    joint_help = "h is a latent of this autoencoder, a folder of related.vitok"
    add("--joint", metavar="FOLDER", help=joint_help)
    add("--prior", type=float, default=0.1, help="eps1 (default 0.1)")
    add("--condition", type=float, default=5.0, help="eps2 (default 5)")
    noise_help = "eps3 (default: Langevin's, the square root of 2 eps1 exp(-logsnr); --joint: 0)"
    add("--noise", type=float, help=noise_help)
    add("--logsnr", type=float, default=0.0, help="noise level of the diffusion net (default 0)")
    add("--lr", type=float, help="divide each step by its mean size, times this, as the authors do")
    add("--chain", type=int, default=80, help="steps of the chain (default 80)")
    inpaint_help = "start from other images, and draw only the middle quarter of each"
    add("--inpaint", action="store_true", help=inpaint_help)
    context_help = "--inpaint: eps4, by the gradient of the context instead of pasting it into h"
    add("--context", type=float, metavar="EPS4", help=context_help)
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
    if options.joint and options.plain:
        raise ValueError("--joint and --plain are two variants: choose one")
    if options.joint and options.inpaint and options.context is None:
        raise ValueError("--joint --inpaint needs --context: pixels cannot be pasted into latents")
    if options.context is not None and not options.inpaint:
        raise ValueError("--context needs --inpaint")

    # Langevin dynamics: a step of size s along the gradient needs noise of variance 2 s. The
    # prior's gradient is (R(h) - h) / exp(-logsnr), so s = eps1 exp(-logsnr).
    if options.noise is None:
        langevin = math.sqrt(2 * options.prior) * noise_std(options)
        options.noise = 0.0 if options.joint else langevin
    numbers = (options.condition, options.noise, options.context or 0.0, options.lr or 1.0)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("--condition, --noise, --context and --lr must be finite numbers")
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


class Variant(NamedTuple):
    """What h is: see the docstring of this file."""

    shape: tuple  # of one h, without the batch
    decode: object  # G: h -> x
    encode: object  # E: x -> h
    start: float  # the standard deviation of the first h
    limits: tuple | None  # of the values of h


def choose_variant(options, net, size, device):
    """Return the Variant. size: (3, H, W) of the images. Raises ValueError."""
    if options.joint:
        # The latents of a ViTok have about the distribution N(0, 1). Encoding means their mean.
        vitok, _ = load_vitok(options.joint, device)
        if vitok.tubelet:
            raise ValueError(f"{options.joint} is an autoencoder of video, not of images")
        mean, _ = vitok.encode(torch.zeros(1, *size, device=device))
        return Variant(mean.shape[1:], vitok.decode, lambda x: vitok.encode(x)[0], 1.0, None)
    if options.plain:
        # Gray images with a little noise.
        return Variant(size, identity, denoiser(net, options.logsnr), 0.5, (-1.5, 1.5))
    # The noise of the net's level alone.
    return Variant(size, denoiser(net, options.logsnr), identity, noise_std(options), None)


def draw(options, variant, classifier, y, known, numbers):
    """Draw images x (B, C, H, W) of the classes y (B,) by the chain.

    known: images (B, C, H, W) whose border stays, or None. numbers: a number per image, for its
    noise.
    """
    # Every image has a generator of its own, so the batch size changes nothing.
    noise = partial(noise_by_number(options.seed, numbers, y.device), *variant.shape)
    h = variant.start * noise()

    # Inpainting: the border of h is that of the known image, in the default variant with noise. Or
    # the context is the known image itself.
    mask, context = None, known
    if known is not None:
        mask = border_mask(known.shape[1:], y.device)
        if options.context is None and not options.plain:
            context = known + h

    h = chain(
        lambda x: classifier(x).log_softmax(1).gather(1, y[:, None])[:, 0],
        h,
        options.prior,
        options.condition,
        options.noise,
        options.chain,
        encode=variant.encode,
        decode=variant.decode,
        noise=noise,
        lr=options.lr,
        limits=variant.limits,
        mask=mask,
        known=context,
        eps4=options.context,
    )

    # The last state, decoded to an image. Inpainting pastes the known border once more.
    with torch.no_grad():
        x = variant.decode(h).clamp(-1, 1)
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
    print("They divide each step by its mean absolute value, as --lr 1 does.")


def main(argv=None):
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = parse(argv)
    device = one_process(options.device)
    # The prior of images comes from the network without a label.
    net, config, _ = load_run(options.run, device, null_label=not options.joint)
    variant = choose_variant(options, net, (3, *pixels(config["res"])), device)
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
        x = draw(options, variant, classifier, y, own_known, numbers)
        with torch.no_grad():
            right += (classifier(x).argmax(1) == y).sum().item()
        images.append(to_uint8(x).permute(0, 2, 3, 1).cpu())

    # This classifier guided, so it is fooled easily. Judge images with another one.
    share = 100 * right / len(label)
    print(f"the guiding classifier finds the class in {share:.1f} % of {len(label)} images")
    images = torch.cat(images)
    if len(label) > len(label.unique()):
        distance = distance_within(to_float(images.permute(0, 3, 1, 2)), label.cpu())
        print(f"root mean squared distance between images of one class: {distance:.3f}")
    write_images(options.out, images, label, config["classes"])


if __name__ == "__main__":
    run_command(main)
