"""Tests of related/ppgn.py. Those of its command are in test_ppap.py."""

import math

import torch
import torch.nn.functional as F

from related import ppgn
from tests.helpers import float64, gaussian_net


def test_a_step_of_the_chain_is_the_formula():
    torch.manual_seed(0)
    h = torch.randn(3, 2).double()
    target = torch.randn(3, 2).double()
    noise = torch.randn(3, 2).double()

    def log_condition(x):
        return -(x - target).square().sum(1)

    def step(*eps, **options):
        """One step of the chain from h, with decode(h) = 2 h and encode(x) = x / 4."""
        return ppgn.chain(
            log_condition,
            h,
            *eps,
            1,
            encode=lambda x: x / 4,
            decode=lambda h: 2 * h,
            noise=lambda: noise,
            **options,
        )

    # The formula: eps1 (E(G(h)) - h) + eps2 gradient + eps3 noise. By the chain rule, the gradient
    # has a factor 2 of the decoder.
    d = 0.1 * (-0.5 * h) + 0.2 * (-2) * (2 * h - target) * 2 + 0.3 * noise
    torch.testing.assert_close(step(0.1, 0.2, 0.3), h + d)

    # With lr, the step has a fixed size: only ratios of eps1, eps2 and eps3 matter.
    normalized = step(0.1, 0.2, 0.3, lr=0.7)
    torch.testing.assert_close(normalized, h + 0.7 * d / d.abs().mean(1, keepdim=True))
    torch.testing.assert_close(step(1.0, 2.0, 3.0, lr=0.7), normalized)

    # The limits clip h. Some values of this example are below them, and some above.
    torch.testing.assert_close(step(0.1, 0.2, 0.3, limits=(0.0, 0.1)), (h + d).clamp(0, 0.1))
    assert (h + d).min() < 0
    assert (h + d).max() > 0.1

    # Where the mask is 1, h is the known one: after each step, and also without any step.
    mask = torch.tensor([1.0, 0.0]).double()
    expected = torch.stack([target[:, 0], (h + d)[:, 1]], 1)
    torch.testing.assert_close(step(0.1, 0.2, 0.3, mask=mask, known=target), expected)
    start = ppgn.chain(None, h, 0.0, 0.0, 0.0, 0, mask=mask, known=target)
    assert torch.equal(start[:, 0], target[:, 0])

    # With eps4, the context has a gradient: eps4 mask (known - x) times 2 of the decoder. The prior
    # and the condition see the known values.
    known = torch.randn(3, 2).double()
    x = torch.stack([known[:, 0], 2 * h[:, 1]], 1)
    d = 0.1 * (x / 4 - h) + 0.3 * noise
    d[:, 1] += 0.2 * (-2) * (x - target)[:, 1] * 2
    d[:, 0] += 0.7 * (known - 2 * h)[:, 0] * 2
    inpainting = dict(mask=mask, known=known, eps4=0.7)
    torch.testing.assert_close(step(0.1, 0.2, 0.3, **inpainting), h + d)


def test_a_step_calls_each_network_once():
    calls = []

    def network(name):
        def call(h):
            calls.append(name)
            return h

        return call

    h = torch.randn(3, 2)
    networks = dict(encode=network("E"), decode=network("G"))
    ppgn.chain(lambda x: -x.square().sum(1), h, 0.1, 0.2, 0.3, 4, **networks)
    assert calls == 4 * ["G", "E"]


def test_distance_within_classes():
    # Two images of class 1 differ by 3 and 4 in two of four values, those of class 0 by 1.
    images = torch.zeros(4, 1, 2, 2)
    images[1, 0, 0] = torch.tensor([3.0, 4.0])
    images[3] = 1.0
    label = torch.tensor([1, 1, 0, 0])
    assert ppgn.distance_within(images, label) == (2.5 + 1.0) / 2


def test_the_condition_rises_in_each_step():
    torch.manual_seed(0)
    h = torch.randn(4, 3).double()

    def log_condition(x):
        return F.logsigmoid(x.sum(1))

    values = []
    for _ in range(20):
        values.append(log_condition(h))
        h = ppgn.chain(log_condition, h, 0.0, 0.1, 0.0, 1)
    for before, after in zip(values, values[1:]):
        assert (before <= after).all()


def test_the_prior_alone_contracts_to_its_fixed_point():
    torch.manual_seed(0)
    h = torch.randn(4, 3).double()
    fixed = torch.tensor([1.0, 2.0, 3.0]).double()
    end = ppgn.chain(None, h, 0.2, 0.0, 0.0, 7, encode=lambda x: fixed)
    torch.testing.assert_close(end - fixed, 0.8**7 * (h - fixed))


def test_the_condition_may_be_any_function_of_the_image():
    torch.manual_seed(0)
    h = torch.randn(4, 3).double()

    # The chain raises a hidden unit. That of a linear layer has a constant gradient.
    layer = torch.nn.Linear(3, 5).double()

    def hidden_unit(x):
        return layer(x)[:, 2]

    end = ppgn.chain(hidden_unit, h, 0.0, 1.0, 0.0, 2)
    torch.testing.assert_close(end, h + 2 * layer.weight[2])

    # The gradient passes through the decoder.
    decoder = torch.nn.Linear(3, 3, bias=False).double()
    end = ppgn.chain(hidden_unit, h, 0.0, 1.0, 0.0, 2, decode=decoder)
    torch.testing.assert_close(end, h + 2 * layer.weight[2] @ decoder.weight)


def test_the_prior_of_a_gaussian_is_its_score():
    mean, variance, logsnr = 0.3, 0.5, 1.2
    h = torch.linspace(-2, 2, 9).double().reshape(9, 1, 1, 1)

    # h is a Gaussian value with noise, so the variances add.
    noise = math.exp(-logsnr)
    decode = ppgn.denoiser(gaussian_net(mean, variance), logsnr)
    torch.testing.assert_close((decode(h) - h) / noise, -(h - mean) / (variance + noise))


def test_the_chain_keeps_no_graph_for_the_gradient():
    h = torch.linspace(-2, 2, 9).double().reshape(9, 1, 1, 1)
    weight = torch.ones(1, dtype=float64, requires_grad=True)
    end = ppgn.chain(None, h, 0.5, 0.0, 0.0, 3, encode=lambda x: weight * x)
    assert not end.requires_grad


def test_the_chain_with_exact_gradients_draws_from_the_posterior():
    """Unadjusted Langevin on a mixture of four Gaussians, given one bit about them."""
    torch.manual_seed(0)
    means = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double()
    variance = 0.2

    def log_p_of_components(x):
        """log p(x | component) up to a constant, (B, 4)."""
        return -(x[:, None] - means).square().sum(2) / (2 * variance)

    def encode(h):
        """An autoencoder whose R(h) - h is the gradient of log p(h)."""
        with torch.enable_grad():
            x = h.detach().requires_grad_(True)
            log_p = log_p_of_components(x).logsumexp(1)
            return h + torch.autograd.grad(log_p.sum(), x)[0]

    def log_condition(x):
        """The log probability that x is from one of the upper two components."""
        return log_p_of_components(x).log_softmax(1)[:, :2].logsumexp(1)

    # Langevin dynamics: steps of size 0.01 need noise of variance 0.02.
    h = torch.randn(5000, 2).double()
    h = ppgn.chain(log_condition, h, 0.01, 0.01, 0.02**0.5, 1000, encode=encode)

    # The chain has the mean and the covariance of the posterior, and visits both modes.
    expected_mean = torch.tensor([0.0, 1.0]).double()
    torch.testing.assert_close(h.mean(0), expected_mean, rtol=0, atol=0.05)
    expected_covariance = torch.diag(torch.tensor([1 + variance, variance]).double())
    torch.testing.assert_close(h.T.cov(), expected_covariance, rtol=0, atol=0.05)
    assert abs((h[:, 0] > 0).double().mean() - 0.5) < 0.05

    def histogram(x):
        return torch.histogramdd(x, 20, range=[-2.5, 2.5, -1.0, 3.0]).hist / len(x)

    # Its total variation distance from independent draws is small.
    modes = means[torch.randint(2, (200_000,))]
    exact = modes + variance**0.5 * torch.randn(200_000, 2).double()
    assert (histogram(h) - histogram(exact)).abs().sum() / 2 < 0.1
