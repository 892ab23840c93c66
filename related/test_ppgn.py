"""Tests of related/ppgn.py."""

import math

import torch
import torch.nn.functional as F

from related import (
    ppgn,
)
from schedule import (
    alpha_sigma,
)


def test_a_step_of_the_chain_is_the_formula():
    torch.manual_seed(0)
    h, target, noise = (
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
    )
    prior, log_condition = (lambda h: 0.5 * h - h), (lambda x: -(x - target).square().sum(1))
    d = 0.1 * (-0.5 * h) + 0.2 * (-2) * (2 * h - target) * 2 + 0.3 * noise  # of decode(h) = 2 h

    def step(*eps, **more):
        return ppgn.chain(
            prior, log_condition, h, *eps, 1, noise=lambda: noise, decode=lambda h: 2 * h, **more
        )

    torch.testing.assert_close(step(0.1, 0.2, 0.3), h + d)
    normalized = step(0.1, 0.2, 0.3, lr=0.7)
    torch.testing.assert_close(normalized, h + 0.7 * d / d.abs().mean(1, keepdim=True))
    torch.testing.assert_close(step(1.0, 2.0, 3.0, lr=0.7), normalized)  # only ratios count then
    torch.testing.assert_close(step(0.1, 0.2, 0.3, limits=(0.0, 0.1)), (h + d).clamp(0, 0.1))
    assert (h + d).min() < 0 and (h + d).max() > 0.1
    mask = torch.tensor([1.0, 0.0]).double()
    torch.testing.assert_close(
        step(0.1, 0.2, 0.3, mask=mask, known=target), torch.stack([target[:, 0], (h + d)[:, 1]], 1)
    )
    assert torch.equal(
        ppgn.chain(None, None, h, 0.0, 0.0, 0.0, 0, mask=mask, known=target)[:, 0], target[:, 0]
    )


def test_the_chain_climbs_or_contracts():
    torch.manual_seed(0)
    h, values = torch.randn(4, 3).double(), []

    def log_condition(x):
        return F.logsigmoid(x.sum(1))

    for _ in range(20):
        values.append(log_condition(h).tolist())
        h = ppgn.chain(None, log_condition, h, 0.0, 0.1, 0.0, 1)
    assert all(a <= b for before, after in zip(values, values[1:]) for a, b in zip(before, after))
    h, fixed = torch.randn(4, 3).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    end = ppgn.chain(lambda h: fixed - h, None, h, 0.2, 0.0, 0.0, 7)
    torch.testing.assert_close(end - fixed, 0.8**7 * (h - fixed))
    unit = torch.nn.Linear(3, 5).double()  # a hidden unit, as any function of x
    end = ppgn.chain(None, lambda x: unit(x)[:, 2], h, 0.0, 1.0, 0.0, 2)
    torch.testing.assert_close(end, h + 2 * unit.weight[2])
    decoder = torch.nn.Linear(3, 3, bias=False).double()
    end = ppgn.chain(None, lambda x: unit(x)[:, 2], h, 0.0, 1.0, 0.0, 2, decode=decoder)
    torch.testing.assert_close(end, h + 2 * unit.weight[2] @ decoder.weight)


def test_the_prior_of_a_gaussian_is_its_score():
    mean, variance, logsnr = 0.3, 0.5, 1.2

    def net(z, level, label):
        alpha, sigma = alpha_sigma(level, like=z)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma

    h = torch.linspace(-2, 2, 9).double().reshape(9, 1, 1, 1)
    noise = math.exp(-logsnr)
    torch.testing.assert_close(
        ppgn.prior_from_diffusion(net, logsnr)(h) / noise, -(h - mean) / (variance + noise)
    )
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not ppgn.chain(lambda h: weight * -h, None, h, 0.5, 0.0, 0.0, 3).requires_grad


def test_the_chain_with_exact_gradients_draws_from_the_posterior():
    """Unadjusted Langevin on a mixture of four Gaussians, given one bit about them."""
    torch.manual_seed(0)
    means, variance = (
        torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double(),
        0.2,
    )

    def log_parts(x):
        return -(x[:, None] - means).square().sum(2) / (2 * variance)

    def gradient(f, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(f(x).sum(), x)[0]

    def prior(h):
        return gradient(lambda x: log_parts(x).logsumexp(1), h)

    def condition(x):  # one of the upper two
        return log_parts(x).log_softmax(1)[:, :2].logsumexp(1)

    h = ppgn.chain(prior, condition, torch.randn(5000, 2).double(), 0.01, 0.01, 0.02**0.5, 1000)
    exact = means[torch.randint(2, (200_000,))] + variance**0.5 * torch.randn(200_000, 2).double()
    torch.testing.assert_close(h.mean(0), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(
        h.T.cov(), torch.diag(torch.tensor([1 + variance, variance]).double()), rtol=0, atol=0.05
    )
    assert abs((h[:, 0] > 0).double().mean() - 0.5) < 0.05

    def bins(x):
        return torch.histogramdd(x, 20, range=[-2.5, 2.5, -1.0, 3.0]).hist / len(x)

    assert (bins(h) - bins(exact)).abs().sum() / 2 < 0.1
