"""Tests of schedule.py: closed forms of the schedules, the process and the posterior."""

import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import schedule
from schedule import (
    alpha_sigma,
    diffuse,
    eps_from_v,
    logsnr_schedule_cosine,
    logsnr_schedule_cosine_interpolated,
    logsnr_schedule_cosine_shifted,
    make_schedule,
    posterior,
    v_from_x_eps,
    x_from_v,
)
from tests.helpers import float64, photo

# The times of the table in test_schedule_values.
T = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])


@pytest.mark.parametrize(
    "spec, image_d, values",
    [
        ("cosine", 64, [15, 3.680, 1.761, 0, -1.761, -3.680, -15]),
        ("shifted:64", 256, [12.2274, 0.9074, -1.0116, -2.7726, -4.5336, -6.4526, -17.7726]),
        ("interpolated:32:256", 512, [13.614, 1.878, -0.665, -3.466, -6.267, -8.809, -20.545]),
        ("shifted:64@10", 256, [7.2274, 0.8442, -1.0288, -2.7726, -4.5163, -6.3894, -12.7726]),
    ],
)
def test_schedule_values(spec, image_d, values):
    for dtype in (torch.float32, float64):
        logsnr = make_schedule(spec, image_d)(T.to(dtype))
        expected = torch.tensor(values, dtype=dtype)
        assert torch.allclose(logsnr, expected, rtol=0, atol=1e-3)


def test_shifted_schedule_decreases_and_is_shifted_at_the_midpoint():
    t = torch.linspace(0, 1, 1001, dtype=float64)
    for image_d, noise_d in ((512, 64), (256, 32), (128, 128)):
        logsnr = logsnr_schedule_cosine_shifted(t, image_d, noise_d)
        # Index 500 is t = 0.5, where the cosine schedule is 0 and only the shift is left.
        assert abs(logsnr[500].item() - 2 * math.log(noise_d / image_d)) < 1e-9
        assert (logsnr.diff() < 0).all()


def test_schedules_without_a_shift_equal_the_cosine_schedule():
    t = torch.linspace(0, 1, 1001, dtype=float64)
    cosine = logsnr_schedule_cosine(t)
    assert torch.equal(logsnr_schedule_cosine_shifted(t, 64, 64), cosine)
    interpolated = logsnr_schedule_cosine_interpolated(t, 64, 64, 64)
    assert torch.allclose(interpolated, cosine, atol=1e-12)


def test_process_is_variance_preserving():
    alpha, sigma = alpha_sigma(torch.linspace(-20, 20, 401))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(401), atol=3e-7)


def test_cosine_schedule_takes_a_number():
    assert logsnr_schedule_cosine(0.5).item() == pytest.approx(0, abs=1e-6)


def test_shifted_schedule_has_equal_signal_and_noise_at_0_079():
    shifted = make_schedule("shifted:64", 512)
    assert shifted(torch.tensor(0.079, dtype=float64)).abs() < 0.02


def test_interpolated_schedule_decreases_but_the_printed_equation_does_not():
    t = torch.linspace(0, 1, 10001, dtype=float64)
    assert (make_schedule("interpolated:32:1024", 1024)(t).diff() < 0).all()

    # Eq. 6 as printed swaps the two shifts.
    low = logsnr_schedule_cosine_shifted(t, 1024, 32)
    high = logsnr_schedule_cosine_shifted(t, 1024, 1024)
    printed = t * high + (1 - t) * low
    assert (printed.diff() > 0).any()


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_pooled_snr_of_a_shifted_schedule_is_that_of_the_reference(t):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 64, 64, generator=generator)

    # Images of 256 px that are constant over each window of 4 x 4 pixels, and noise.
    full = F.interpolate(x, scale_factor=4)
    eps = torch.randn(full.shape, generator=generator)
    logsnr = make_schedule("shifted:64", 256)(torch.tensor([t]))
    pooled = F.avg_pool2d(diffuse(full, eps, logsnr), 4)

    # Regress the 122,880 pooled values on x: the slope is the signal, the residual is the noise.
    signal = (pooled * x).sum() / x.square().sum()
    snr = signal**2 / (pooled - signal * x).square().mean()
    assert snr.item() == pytest.approx(logsnr_schedule_cosine(t).exp().item(), rel=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (float64, 1e-12)])
def test_conversions_are_inverse(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    logsnr = torch.linspace(-20, 20, 161, dtype=dtype)
    x = 2 * torch.rand(161, 3, 4, 4, dtype=dtype, generator=generator) - 1
    eps = torch.randn(161, 3, 4, 4, dtype=dtype, generator=generator)
    z = diffuse(x, eps, logsnr)
    v = v_from_x_eps(x, eps, logsnr)
    assert (x_from_v(z, v, logsnr) - x).abs().max() < tolerance
    assert (eps_from_v(z, v, logsnr) - eps).abs().max() < tolerance


def test_posterior_is_equation_3():
    z, x = torch.randn(2, 5, 3, 2, 2, dtype=float64)
    logsnr_t = torch.tensor([-14.0, -3, 0, 5, 9], dtype=float64)
    logsnr_s = torch.tensor([-13.5, -1, 4, 6, 15], dtype=float64)
    alpha_t, sigma_t = alpha_sigma(logsnr_t, like=z)
    alpha_s, sigma_s = alpha_sigma(logsnr_s, like=z)

    # Eq. 3, literally.
    alpha_ts = alpha_t / alpha_s
    variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    expected = alpha_ts * sigma_s**2 / sigma_t**2 * z + alpha_s * variance_ts / sigma_t**2 * x

    mean, logvar, logvar_max = posterior(z, x, logsnr_t, logsnr_s)
    assert torch.allclose(mean, expected, atol=1e-12)
    assert torch.allclose(logvar.exp(), variance_ts * sigma_s**2 / sigma_t**2, rtol=1e-9)
    assert torch.allclose(logvar_max.exp(), variance_ts, rtol=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        "cosin",
        "shifted",
        "shifted:x",
        "shifted:128",
        "interpolated:64:32",
        "interpolated:32",
        "cosine:64",
        "shifted:0",
        "shifted:-64",
        "cosine@",
        "cosine@x",
        "shifted@10",
    ],
)
def test_make_schedule_rejects_unknown_specs(spec):
    with pytest.raises(ValueError, match=re.escape(spec)):
        make_schedule(spec, 64)


def test_schedule_command_draws_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo((70, 50)).save("photo.jpg")
    monkeypatch.setattr(sys, "argv", ["schedule.py", "photo.jpg"])
    captions = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, xy, text, color: captions.append(text)
    )
    schedule.main()

    # The table has logsnr of shifted:64 at t = 0.5. The figure has 5 x 4 tiles with captions.
    assert "-4.159" in capsys.readouterr().out
    assert Image.open("noised.png").size == (5 * 256, 4 * 272)

    # Eq. 4: averaging 4 x 4 pixels raises logsnr by 2 log 4 = 2.8.
    assert "cosine, 256 px, t = 0.5, logsnr 0.0" in captions
    assert "cosine, 64 px, t = 0.5, logsnr 2.8" in captions
    assert "shifted:64, 256 px, t = 0.5, logsnr -2.8" in captions
    assert "shifted:64, 64 px, t = 0.5, logsnr 0.0" in captions

    # An error is one line that names the file.
    monkeypatch.setattr(sys, "argv", ["schedule.py", "nowhere.jpg"])
    with pytest.raises(SystemExit, match=r"^.*nowhere.jpg.*$"):
        schedule.main()
