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
    x, eps, t = (
        torch.rand(64, 3, 8, 8, dtype=float64) * 2 - 1,
        torch.randn(64, 3, 8, 8, dtype=float64),
        torch.rand(64, dtype=float64),
    )
    schedule = make_schedule("cosine", 32)

    def net(z, logsnr, label):
        return torch.tanh(z.flip(3) + 0.3)

    loss, logsnr = diffusion_loss(net, x, schedule, space="eps", t=t, eps=eps)
    z = diffuse(x, eps, logsnr)
    literal = (eps - eps_from_v(z, net(z, logsnr, None), logsnr)).square().mean((1, 2, 3))
    assert (loss - literal).abs().max() < 1e-12 and torch.equal(logsnr, schedule(t))
    loss_v, _ = diffusion_loss(net, x, schedule, space="v", t=t, eps=eps)
    assert (loss - torch.sigmoid(logsnr) * loss_v).abs().max() < 1e-12
    with pytest.raises(ValueError, match=named("space", "x")):
        diffusion_loss(net, x, schedule, space="x")


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (96, 64)])
def test_multiscale_loss_by_hand(size):
    torch.manual_seed(0)
    error = torch.randn(2, 3, *size, dtype=float64)
    d, expected, s = min(size), 0, min(size)
    while s >= 32:
        f = d // s
        pooled = np.array(
            [
                [
                    error[:, :, f * i : f * i + f, f * j : f * j + f].mean((2, 3)).numpy()
                    for j in range(size[1] // f)
                ]
                for i in range(size[0] // f)
            ]
        )
        expected = expected + d / s * (pooled**2).mean((0, 1, 3))
        s //= 2
    assert np.allclose(mean_squares(error, multiscale=True).numpy(), expected, atol=1e-12)
    assert (mean_squares(0 * error, multiscale=True) == 0).all()
    for bad in ((65, 65), (16, 64)):
        with pytest.raises(ValueError, match=rf"\b{bad[0]}\D+{bad[1]}\b"):
            mean_squares(torch.zeros(1, 3, *bad), multiscale=True)


@pytest.mark.parametrize("space", ["eps", "v"])
def test_multiscale_minimizer_is_the_conditional_mean(space):
    torch.manual_seed(0)
    x, eps = torch.rand(6, 1, 64, 64, dtype=float64), torch.randn(6, 1, 64, 64, dtype=float64)
    t, schedule = torch.full((6,), 0.4, dtype=float64), make_schedule("cosine", 64)
    answer = torch.zeros(
        1, 1, 64, 64, dtype=float64, requires_grad=True
    )  # a net that knows nothing: one v_hat for all six
    optimizer = torch.optim.LBFGS(
        [answer], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16
    )

    def closure():
        optimizer.zero_grad()
        loss = (
            1000
            * diffusion_loss(
                lambda z, logsnr, label: answer.expand_as(z),
                x,
                schedule,
                space=space,
                multiscale=True,
                t=t,
                eps=eps,
            )[0].mean()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (answer - v_from_x_eps(x, eps, schedule(t)).mean(0)).abs().max() < 1e-6


def test_elbo_of_a_gaussian_is_its_differential_entropy():
    with pytest.raises(ValueError, match=named("pixels", "float")):
        elbo_bpd(None, None, None, pixels="float")
    torch.manual_seed(0)
    x = 0.25 * torch.randn(16, 3, 32, 32, dtype=float64)
    bits = elbo_bpd(
        gaussian_net(0.0, 0.25**2), x, make_schedule("cosine", 32), draws=256, pixels="gaussian"
    )
    assert bits.shape == (16,)
    assert bits.mean().item() == pytest.approx(
        math.log2(0.25 * math.sqrt(2 * math.pi * math.e)), abs=0.02
    )


@pytest.mark.parametrize("logsnr_max", [15, 8])
def test_elbo_of_8_bit_pixels_is_their_entropy(logsnr_max):
    torch.manual_seed(0)
    levels = torch.arange(256, dtype=float64) / 127.5 - 1
    edges = torch.special.ndtr((torch.arange(257, dtype=float64) - 0.5) / 127.5 / 0.25 - 4)
    probability = edges.diff() / edges.diff().sum()
    entropy = -(probability * probability.log2()).sum().item()
    assert entropy == pytest.approx(7.041, abs=1e-3)
    x = levels[torch.multinomial(probability, 4 * 3 * 16 * 16, replacement=True)].reshape(
        4, 3, 16, 16
    )

    def net(z, logsnr, label=None):  # the mean of the 256 levels' posterior
        alpha, sigma = alpha_sigma(logsnr, like=z)
        logits = (
            probability.log()
            - 0.5 * ((z[..., None] - alpha[..., None] * levels) / sigma[..., None]).square()
        )
        return (alpha * z - torch.softmax(logits, -1) @ levels) / sigma

    def schedule(t):
        return logsnr_schedule_cosine(t, -15.0, logsnr_max)

    assert elbo_bpd(net, x, schedule, draws=64).mean().item() == pytest.approx(entropy, rel=0.01)
