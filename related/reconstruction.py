"""Measures of reconstructions, PSNR and SSIM, and the discriminator of related/vitok.py.

Not a command of its own.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- metrics


def psnr(x, y):
    """Peak signal-to-noise ratio in dB. x, y: (B, C, H, W) in [-1, 1]. Returns (B,)."""
    # The pixels have a range of 2, so the squared peak is 4.
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def ssim(x, y):
    """Structural similarity (Wang et al. 2004). x, y: (B, C, H, W) in [-1, 1]. Returns (B,).

    Raises ValueError for images below 11 x 11 pixels.
    """
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, not {tuple(x.shape[2:])}")
    # Windows of 11 x 11 pixels, with Gaussian weights of standard deviation 1.5.
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=x.dtype, device=x.device) / 1.5).square())
    window = (line[:, None] * line / line.sum().square()).expand(x.shape[1], 1, -1, -1)

    def mean(a):
        return F.conv2d(a, window, groups=x.shape[1])

    # Means, variances and covariance of each window.
    mx, my = mean(x), mean(y)
    vx, vy = mean(x * x) - mx * mx, mean(y * y) - my * my
    cov = mean(x * y) - mx * my

    # The constants are (K L)^2, with K1 = 0.01, K2 = 0.03 and the range L = 2 of the pixels.
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


# ---------------------------------------------------------------- the discriminator


class Discriminator(nn.Sequential):
    """Distinguish real images (B, 3, H, W) from reconstructions: logits of patches (B, 1, h, w)."""

    # The paper uses the discriminator of StyleGAN. This one is small.
    def __init__(self, width=64):
        def unit(channels, out, stride):
            kernel = 4 if stride > 1 else 3
            conv = nn.Conv2d(channels, out, kernel, stride, 1)
            return [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]

        super().__init__(
            *unit(3, width, 1),
            *unit(width, width, 2),
            *unit(width, 2 * width, 2),
            *unit(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, 1, 1),
        )


def discriminator_loss(real, fake):
    """The hinge loss of logits of real images and reconstructions, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
