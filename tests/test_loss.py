"""Tests of loss.py: the losses and the likelihood bound."""

import math

import numpy as np
import pytest
import torch

from loss import diffusion_loss, elbo_bpd, mean_squares
from schedule import (
    alpha_sigma,
    diffuse,
    eps_from_v,
    logsnr_schedule_cosine,
    make_schedule,
    v_from_x_eps,
)
from tests.helpers import float64, gaussian_net, named


def test_eps_loss_is_literal_and_sigmoid_times_the_v_loss():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8, dtype=float64) * 2 - 1
    eps = torch.randn(64, 3, 8, 8, dtype=float64)
    t = torch.rand(64, dtype=float64)
    schedule = make_schedule("cosine", 32)

    def net(z, logsnr, label):
        return torch.tanh(z.flip(3) + 0.3)

    # The eps loss is the mean square of eps - eps_hat.
    loss, logsnr = diffusion_loss(net, x, schedule, space="eps", t=t, eps=eps)
    z = diffuse(x, eps, logsnr)
    eps_hat = eps_from_v(z, net(z, logsnr, None), logsnr)
    literal = (eps - eps_hat).square().mean((1, 2, 3))
    assert (loss - literal).abs().max() < 1e-12
    assert torch.equal(logsnr, schedule(t))

    # It is the v loss times alpha^2 = sigmoid(logsnr).
    loss_v, _ = diffusion_loss(net, x, schedule, space="v", t=t, eps=eps)
    assert (loss - torch.sigmoid(logsnr) * loss_v).abs().max() < 1e-12

    with pytest.raises(ValueError, match=named("space", "x")):
        diffusion_loss(net, x, schedule, space="x")


def multiscale_by_hand(error):
    """Eq. 7-8 times the shorter side, with explicit windows. error: (B, C, H, W). Returns (B,)."""
    height, width = error.shape[2:]
    shorter = min(height, width)
    total = 0
    size = shorter
    while size >= 32:
        # Eq. 7: the mean over each window of factor x factor pixels.
        factor = shorter // size
        pooled = []
        for top in range(0, height, factor):
            for left in range(0, width, factor):
                window = error[:, :, top : top + factor, left : left + factor]
                pooled.append(window.mean((2, 3)).numpy())

        # Eq. 8, with weight shorter / size. Axes of the array: windows, images, channels.
        total = total + shorter / size * (np.array(pooled) ** 2).mean((0, 2))
        size //= 2
    return total


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (96, 64)])
def test_multiscale_loss_by_hand(size):
    torch.manual_seed(0)
    error = torch.randn(2, 3, *size, dtype=float64)
    loss = mean_squares(error, multiscale=True)
    assert np.allclose(loss.numpy(), multiscale_by_hand(error), atol=1e-12)
    assert (mean_squares(0 * error, multiscale=True) == 0).all()

    # Images with sides that cannot be pooled evenly, or below 32 pixels, are rejected.
    for height, width in ((65, 65), (16, 64)):
        with pytest.raises(ValueError, match=rf"\b{height}\D+{width}\b"):
            mean_squares(torch.zeros(1, 3, height, width), multiscale=True)


@pytest.mark.parametrize("space", ["eps", "v"])
def test_multiscale_minimizer_is_the_conditional_mean(space):
    torch.manual_seed(0)
    x = torch.rand(6, 1, 64, 64, dtype=float64)
    eps = torch.randn(6, 1, 64, 64, dtype=float64)
    t = torch.full((6,), 0.4, dtype=float64)
    schedule = make_schedule("cosine", 64)

    # A network that ignores its input: v_hat is one free parameter for all six images.
    v_hat = torch.zeros(1, 1, 64, 64, dtype=float64, requires_grad=True)

    def net(z, logsnr, label):
        return v_hat.expand_as(z)

    optimizer = torch.optim.LBFGS(
        [v_hat], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16
    )

    def closure():
        optimizer.zero_grad()
        losses, _ = diffusion_loss(net, x, schedule, space=space, multiscale=True, t=t, eps=eps)
        loss = 1000 * losses.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    v = v_from_x_eps(x, eps, schedule(t))
    assert (v_hat - v.mean(0)).abs().max() < 1e-6


def test_elbo_rejects_unknown_kinds_of_pixels():
    with pytest.raises(ValueError, match=named("pixels", "float")):
        elbo_bpd(None, None, None, pixels="float")


def test_elbo_of_a_gaussian_is_its_differential_entropy():
    torch.manual_seed(0)
    std = 0.25
    x = std * torch.randn(16, 3, 32, 32, dtype=float64)
    net = gaussian_net(0.0, std**2)
    bits = elbo_bpd(net, x, make_schedule("cosine", 32), draws=256, pixels="gaussian")
    assert bits.shape == (16,)
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e))
    assert bits.mean().item() == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize("logsnr_max", [15, 8])
def test_elbo_of_8_bit_pixels_is_their_entropy(logsnr_max):
    torch.manual_seed(0)

    # The 256 levels of a Gaussian with std 0.25, rounded to 8 bits.
    levels = torch.arange(256, dtype=float64) / 127.5 - 1
    edges = torch.special.ndtr((torch.arange(257, dtype=float64) - 0.5) / 127.5 / 0.25 - 4)
    probability = edges.diff() / edges.diff().sum()
    entropy = -(probability * probability.log2()).sum().item()
    assert entropy == pytest.approx(7.041, abs=1e-3)

    # Images of independent pixels.
    pixels = torch.multinomial(probability, 4 * 3 * 16 * 16, replacement=True)
    x = levels[pixels].reshape(4, 3, 16, 16)

    def net(z, logsnr, label=None):
        """The exact denoiser: x_hat is the mean of the posterior over the 256 levels."""
        alpha, sigma = alpha_sigma(logsnr, like=z)
        distance = (z[..., None] - alpha[..., None] * levels) / sigma[..., None]
        posterior = torch.softmax(probability.log() - 0.5 * distance.square(), -1)
        return (alpha * z - posterior @ levels) / sigma

    def schedule(t):
        return logsnr_schedule_cosine(t, -15.0, logsnr_max)

    bits = elbo_bpd(net, x, schedule, draws=64)
    assert bits.mean().item() == pytest.approx(entropy, rel=0.01)
