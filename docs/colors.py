"""Why do the colors of samples vary too little? Two tables for a run on the built-in Shapes.

    python -m docs.colors assets/shapes32.pt        # the tables of docs/experiments.md

The first table asks the network for the mean color of held-out images, at one noise level after
another. The second replaces the network by an exact denoiser above some noise level, and measures
how much the colors of the samples then vary. Where the exact denoiser helps, the network loses
color.
"""

import argparse
import math
import sys

import torch

from docs.judge import HELD_OUT, Pooled
from docs.samplers import draw, load_shapes
from sample import to_float
from schedule import alpha_sigma, diffuse, x_from_v
from support.data import Shapes, load_batch
from support.runtime import run_command

REFERENCE = HELD_OUT + 100_000  # the first image of the exact denoiser
DENOISED = 1000  # held-out images for the first table
REAL = 5000  # and for the variances of real images


def shapes(res, first, n):
    """Return n shapes (n, 3, H, W) uint8 from number `first` on, and their labels (n,)."""
    data = Shapes(res, first=first)
    batches = [load_batch(data, part) for part in torch.arange(n).split(500)]
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


# ---------------------------------------------------------------- the exact denoiser


class ExactDenoiser:
    """The v of the best possible network for a finite set of images.

    images: uint8 (N, C, H, W). labels: (N,). Call: z (B, C, H, W), logsnr (B,) all equal,
    label (B,) -> v. At high noise, where many images could have become z, it is nearly exact for
    all Shapes. At low noise it returns one of its images.
    """

    def __init__(self, images, labels):
        self.images = {
            label: to_float(images[labels == label]).flatten(1)
            for label in labels.unique().tolist()
        }

    def __call__(self, z, logsnr, label):
        alpha, sigma = alpha_sigma(logsnr[:1], like=z[:1].flatten(1))
        x_hat = torch.empty_like(z)
        for number in label.unique().tolist():
            rows = label == number
            x = self.images[number]  # (n, C H W)
            # E[x | z] is a weighted mean of the images. By Bayes, the weight of image x is
            # proportional to exp(-|z - alpha x|^2 / (2 sigma^2)). |z|^2 is the same for all.
            noisy = z[rows].flatten(1)
            products = alpha * noisy @ x.T - alpha**2 * x.square().sum(1) / 2
            weights = (products / sigma**2).softmax(1)
            x_hat[rows] = (weights @ x).reshape(-1, *z.shape[1:])
        # x = alpha z - sigma v, solved for v.
        alpha, sigma = alpha_sigma(logsnr[:1], like=z[:1])
        return (alpha * z - x_hat) / sigma


def exact_below(threshold, exact, net):
    """Return a network that is exact at logsnr below a threshold, and net elsewhere."""

    def hybrid(z, logsnr, label):
        chosen = exact if logsnr[0] < threshold else net
        return chosen(z, logsnr, label)

    return hybrid


# ---------------------------------------------------------------- the mean color of one image


def total_variance(values):
    """Return the sum of the variances of the columns of values (N, D)."""
    return values.double().var(0).sum().item()


def linear_error(colors, noise):
    """Return the mean squared error of the best linear estimate of mean colors (N, 3).

    noise: the variance of the noise that was added to each of the three numbers.
    """
    # The Wiener filter S (S + noise I)^-1 leaves the covariance S - S (S + noise I)^-1 S.
    covariance = colors.double().T.cov()
    gain = torch.linalg.solve(covariance + noise * torch.eye(3, dtype=torch.float64), covariance)
    return (covariance - covariance @ gain).trace().item()


@torch.no_grad()
def color_errors(net, logsnr, x, labels, eps):
    """Return error, linear error and slope of the mean color that net predicts for x.

    x, eps: (N, 3, H, W). error: of the network. linear error: of the best linear estimate from the
    mean color of z. Both are shares of the variance of mean colors. slope: how much the true color
    changes on average when the predicted one changes by 1. Above 1, predictions vary too little.
    """
    levels = torch.full((len(x),), float(logsnr))
    z = diffuse(x, eps, levels)
    predicted = []
    for part in torch.arange(len(x)).split(50):
        v_hat = net(z[part], levels[part], labels[part])
        predicted.append(x_from_v(z[part], v_hat, levels[part]).mean((2, 3)))
    predicted = torch.cat(predicted).double()  # (N, 3)
    colors = x.mean((2, 3)).double()

    # In the mean of z / alpha, the noise has the variance exp(-logsnr) / (H W).
    variance = total_variance(colors)
    noise = levels[0].neg().exp().item() / x[0, 0].numel()
    error = (predicted - colors).square().mean(0).sum().item()

    # The slope is a least-squares fit of true to predicted colors, one for all three channels.
    deviation = predicted - predicted.mean(0)
    slope = (deviation * colors).sum() / deviation.square().sum()
    return error / variance, linear_error(colors, noise) / variance, slope.item()


# ---------------------------------------------------------------- the colors of samples


def color_variances(images):
    """Return the variance of the mean color, and that of the layout of colors around it.

    images: uint8 (N, 3, H, W). The layout is the image pooled to 8 x 8, minus its mean color.
    """
    pooled = Pooled()(images).unflatten(1, (3, 64))
    mean = pooled.mean(2)  # (N, 3)
    layout = (pooled - mean[:, :, None]).flatten(1)  # (N, 3 * 64)
    # The mean over the 64 positions has the unit of the other variance.
    return total_variance(mean), total_variance(layout) / 64


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.colors", description="Where color gets lost.")
    parser.error = lambda message: sys.exit(f"docs.colors: {message}")
    parser.add_argument("run", help="a run on Shapes")
    parser.add_argument("--n", type=int, default=500, help="samples of each row (default 500)")
    images_help = "images per class of the exact denoiser (default 2,000)"
    parser.add_argument("--images", type=int, default=2000, help=images_help)
    parser.add_argument("--steps", type=int, default=32, help="of DPM-Solver++ (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(argv)

    # Fresh images that no run was trained on: some to denoise, and others for the exact denoiser.
    net, config, schedule = load_shapes(args.run)
    classes = len(config["classes"])
    # The exact denoiser needs float32, so both tables use it.
    config = config | dict(bf16=False)
    images, labels = shapes(config["res"], HELD_OUT, DENOISED)
    exact = ExactDenoiser(*shapes(config["res"], REFERENCE, args.images * classes))

    print("The mean color of held-out images. Errors are shares of its variance.")
    print("| logsnr | network | linear | exact | slope of the network |\n" + "|---" * 5 + "|")
    x = to_float(images)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(args.seed))
    for logsnr in range(-7, 5):
        error, linear, slope = color_errors(net, logsnr, x, labels, eps)
        # With few images, the exact denoiser is exact at high noise only.
        best = f"{color_errors(exact, logsnr, x, labels, eps)[0]:.3f}" if logsnr <= -3 else ""
        print(f"| {logsnr} | {error:.3f} | {linear:.3f} | {best} | {slope:.3f} |", flush=True)

    print(f"\nThe colors of {args.n} samples. Variances are shares of those of real images.")
    print("| exact at logsnr below | mean color | layout of colors |\n" + "|---" * 3 + "|")
    real = color_variances(shapes(config["res"], HELD_OUT, REAL)[0])
    for threshold in (-math.inf, -4, -2, 0, 2, math.inf):
        hybrid = exact_below(threshold, exact, net)
        options = dict(sampler="dpmpp", steps=args.steps, seed=args.seed)
        samples = draw((hybrid, config, schedule), torch.arange(args.n) % classes, **options)
        row = [f"{a / b:.2f}" for a, b in zip(color_variances(samples), real)]
        name = {-math.inf: "never", math.inf: "always"}.get(threshold, threshold)
        print(f"| {name} | {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    run_command(main)
