"""Tests of related/reconstruction.py. The discriminator is tested in test_vitok.py."""

import math

import pytest
import torch

from related.reconstruction import psnr, ssim
from tests.helpers import float64


def test_psnr():
    x = torch.rand(2, 3, 12, 13, dtype=float64) * 2 - 1
    # The pixels have the range 2: 20 log10(2 / 0.2) is 20.
    assert psnr(x, x + 0.2)[1].item() == pytest.approx(20)
    assert psnr(x, x + 0.02)[0].item() == pytest.approx(40)


def test_ssim():
    x = torch.rand(2, 3, 12, 13, dtype=float64) * 2 - 1
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=float64))

    # Constant images have no variance, so only their means count.
    a = torch.full_like(x, 0.5)
    b = torch.full_like(x, -0.25)
    expected = (2 * 0.5 * -0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    assert ssim(a, b)[0].item() == pytest.approx(expected)

    # The formula by hand, at all windows of 11x11 pixels. Their weights are Gaussian.
    y = torch.rand_like(x)
    line = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    window = torch.tensor([[p * q for q in line] for p in line], dtype=float64)
    window = window / window.sum()
    values = []
    for channel in range(3):
        for top in range(2):
            for left in range(3):
                u = x[0, channel, top : top + 11, left : left + 11]
                v = y[0, channel, top : top + 11, left : left + 11]
                u_mean = (window * u).sum()
                v_mean = (window * v).sum()
                u_variance = (window * (u - u_mean) ** 2).sum()
                v_variance = (window * (v - v_mean) ** 2).sum()
                covariance = (window * (u - u_mean) * (v - v_mean)).sum()
                numerator = (2 * u_mean * v_mean + 4e-4) * (2 * covariance + 3.6e-3)
                denominator = (u_mean**2 + v_mean**2 + 4e-4) * (u_variance + v_variance + 3.6e-3)
                values.append(numerator / denominator)
    expected = torch.stack(values).mean().item()
    assert ssim(x, y)[0].item() == pytest.approx(expected)
