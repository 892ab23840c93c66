"""Tests of docs/colors.py."""

import math

import pytest
import torch

from docs import colors
from schedule import alpha_sigma, diffuse, x_from_v
from tests.helpers import call


def test_exact_denoiser_by_hand():
    # Two images of class 0 and one of class 1, each of one gray level. At alpha = sigma, the two
    # weights are the softmax of -|z / alpha - x|^2 / 2.
    images = torch.tensor([0, 255, 51]).to(torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    exact = colors.ExactDenoiser(images, torch.tensor([0, 0, 1]))
    z = torch.full((2, 3, 2, 2), 0.1 * math.sqrt(0.5))
    logsnr = torch.zeros(2)
    x_hat = x_from_v(z, exact(z, logsnr, torch.tensor([0, 1])), logsnr)
    near, far = math.exp(-12 * 0.9**2 / 2), math.exp(-12 * 1.1**2 / 2)
    assert torch.allclose(x_hat[0], torch.tensor((near - far) / (near + far)), atol=1e-5)
    assert torch.allclose(x_hat[1], torch.tensor(-0.6), atol=1e-5)


def test_exact_denoiser_finds_the_image_at_low_noise():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    exact = colors.ExactDenoiser(images, labels)
    x = images.float() / 127.5 - 1
    logsnr = torch.full((20,), 8.0)
    z = diffuse(x, torch.randn_like(x), logsnr)
    x_hat = x_from_v(z, exact(z, logsnr, labels), logsnr)
    assert (x_hat - x).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_errors_of_a_denoiser_of_constant_images(scale):
    # Images of one color, of independent channels with variance 0.25. The best denoiser is the
    # Wiener filter of the mean of z. Half of its prediction has twice its slope.
    generator = torch.Generator().manual_seed(0)
    n, side, logsnr = 4000, 4, -3.0
    color = 0.5 * torch.randn(n, 3, 1, 1, generator=generator)
    x = color.expand(n, 3, side, side)
    eps = torch.randn(x.shape, generator=generator)
    noise = math.exp(-logsnr) / side**2

    def net(z, levels, label):
        alpha, sigma = alpha_sigma(levels, like=z)
        x_hat = 0.25 / (0.25 + noise) * (z / alpha).mean((2, 3), keepdim=True)
        return (alpha * z - scale * x_hat) / sigma

    error, linear, slope = colors.color_errors(net, logsnr, x, torch.zeros(n).long(), eps)
    # Shares of the variance: noise / (0.25 + noise) is left, and 1 - scale of the rest is lost.
    left = noise / (0.25 + noise)
    assert linear == pytest.approx(left, rel=0.01)
    assert error == pytest.approx(left + (1 - left) * (1 - scale) ** 2, rel=0.02)
    assert slope == pytest.approx(1 / scale, rel=0.05)


def test_linear_error_uses_that_channels_are_related():
    # Three equal channels are one number that is measured three times.
    values = torch.randn(1000, 1, dtype=torch.float64).expand(1000, 3)
    variance = values[:, 0].var().item()
    expected = 3 * variance * (0.6 / 3) / (variance + 0.6 / 3)
    assert colors.linear_error(values, 0.6) == pytest.approx(expected, rel=1e-6)


def test_variances_of_colors():
    # Black and white images differ in their mean color only: 255 / 127.5 = 2 apart.
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 16, 16)
    mean, layout = colors.color_variances(images)
    assert mean == pytest.approx(3 * 2)  # three channels, sample variance of -1 and 1
    assert layout == pytest.approx(0, abs=1e-9)

    # Left half white or right half white: the mean is the same, and each pooled pixel differs.
    left = torch.zeros(3, 16, 16, dtype=torch.uint8)
    left[:, :, :8] = 255
    mean, layout = colors.color_variances(torch.stack([left, left.flip(2)]))
    assert mean == pytest.approx(0, abs=1e-9)
    assert layout == pytest.approx(3 * 2)


def test_hybrid_is_exact_at_high_noise_only():
    exact = lambda z, logsnr, label: z + 1  # noqa: E731
    hybrid = colors.exact_below(-2, exact, lambda z, logsnr, label: z)
    z = torch.zeros(1, 3, 2, 2)
    assert hybrid(z, torch.tensor([-2.5]), None).mean() == 1
    assert hybrid(z, torch.tensor([-2.0]), None).mean() == 0


def test_command_prints_both_tables(small_run, monkeypatch, capsys):
    monkeypatch.setattr(colors, "DENOISED", 20)
    monkeypatch.setattr(colors, "REAL", 100)
    # The run asks for bfloat16, which the exact denoiser does not use.
    net, config, schedule = colors.load_shapes(small_run)
    config = config | dict(bf16=True)
    monkeypatch.setattr(colors, "load_shapes", lambda path: (net, config, schedule))
    call(colors.main, small_run, "--n 20 --images 10 --steps 1")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    levels = [row.split("|")[1].strip() for row in rows]
    assert levels[1:13] == [str(logsnr) for logsnr in range(-7, 5)]
    assert levels[14:] == ["never", "-4", "-2", "0", "2", "always"]

    # At high noise, the network of two training steps is worse than a constant, which has the error
    # 1. The exact denoiser of 100 images is not.
    network, _, exact = (float(number) for number in rows[1].split("|")[2:5])
    assert network > 1.1 > exact
