"""All tests: identities and closed forms, on tiny nets and small pictures.

    python test_all.py                          # everything, about two minutes on two cores
    python test_all.py -k sampler               # what pytest takes, goes to pytest
    RUN=runs/shapes-32 python test_all.py -k judge -s      # class accuracy of a trained run's samples, several minutes
"""

import io
import json
import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import fid
import sample as sampling
import train
import unet
import uvit
from loss import diffusion_loss, elbo_bpd, mean_squares
from sample import ddim_step, ddpm_step, guided, sample, to_uint8
from schedule import (alpha_sigma, diffuse, eps_from_v, logsnr_schedule_cosine, logsnr_schedule_cosine_interpolated,
                      logsnr_schedule_cosine_shifted, make_schedule, posterior, v_from_x_eps, x_from_v)
from unet import UNet, dwt53, idwt53
from uvit import UViT

HERE = os.path.dirname(os.path.abspath(__file__))
float64 = torch.float64
T = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])

TINY_UVIT = dict(res=16, num_classes=3, base_channels=16, emb_channels=32, channel_multiplier=(1, 2), num_res_blocks=(1,),
                 num_transformer_blocks=2, transformer_dropout=0.0)
TINY_UNET = dict(res=16, num_classes=3, base_channels=16, emb_channels=32, channel_multiplier=(1, 2), num_res_blocks=(1, 1),
                 dropout=0.0, attn_resolutions=(8,))


def tiny_nets(**fields):
    torch.manual_seed(0)
    return [UViT(**TINY_UVIT | fields), UNet(**TINY_UNET | fields)]


def randomize(net):
    """Gives every weight, the zero-initialized ones too, a value that matters."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


# ---------------------------------------------------------------- schedule.py


@pytest.mark.parametrize("spec, image_d, values", [
    ("cosine", 64, [15, 3.680, 1.761, 0, -1.761, -3.680, -15]),
    ("shifted:64", 256, [12.2274, 0.9074, -1.0116, -2.7726, -4.5336, -6.4526, -17.7726]),
    ("interpolated:32:256", 512, [13.614, 1.878, -0.665, -3.466, -6.267, -8.809, -20.545])])
def test_schedule_values(spec, image_d, values):
    for dtype in (torch.float32, float64):
        assert torch.allclose(make_schedule(spec, image_d)(T.to(dtype)), torch.tensor(values, dtype=dtype), rtol=0, atol=1e-3)


def test_schedule_identities():
    t = torch.linspace(0, 1, 1001, dtype=float64)
    for image_d, noise_d in ((512, 64), (256, 32), (128, 128)):
        logsnr = logsnr_schedule_cosine_shifted(t, image_d, noise_d)
        assert abs(logsnr[500].item() - 2 * math.log(noise_d / image_d)) < 1e-9
        assert (logsnr.diff() < 0).all()
    assert torch.equal(logsnr_schedule_cosine_shifted(t, 64, 64), logsnr_schedule_cosine(t))
    assert torch.allclose(logsnr_schedule_cosine_interpolated(t, 64, 64, 64), logsnr_schedule_cosine(t), atol=1e-12)
    alpha, sigma = alpha_sigma(torch.linspace(-20, 20, 401))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(401), atol=3e-7)
    assert logsnr_schedule_cosine(0.5).item() == pytest.approx(0, abs=1e-6)  # a plain number is a time, too
    shifted = make_schedule("shifted:64", 512)
    assert shifted(torch.tensor(0.079, dtype=float64)).abs() < 0.02  # alpha = sigma at t = 0.079


def test_interpolated_schedule_falls_where_the_printed_equation_does_not():
    t = torch.linspace(0, 1, 10001, dtype=float64)
    assert (make_schedule("interpolated:32:1024", 1024)(t).diff() < 0).all()
    printed = t * logsnr_schedule_cosine_shifted(t, 1024, 1024) + (1 - t) * logsnr_schedule_cosine_shifted(t, 1024, 32)
    assert (printed.diff() > 0).any()


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_pooled_snr_of_a_shifted_schedule_is_the_reference_schedules(t):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 64, 64, generator=generator)  # 122,880 pooled values
    full = F.interpolate(x, scale_factor=4)  # constant over each window of 4x4 pixels
    logsnr = make_schedule("shifted:64", 256)(torch.tensor([t]))
    pooled = F.avg_pool2d(diffuse(full, torch.randn(full.shape, generator=generator), logsnr), 4)
    signal = (pooled * x).sum() / x.square().sum()
    snr = signal**2 / (pooled - signal * x).square().mean()
    assert snr.item() == pytest.approx(logsnr_schedule_cosine(t).exp().item(), rel=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (float64, 1e-12)])
def test_conversions_are_inverse(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    logsnr = torch.linspace(-20, 20, 161, dtype=dtype)
    x = 2 * torch.rand(161, 3, 4, 4, dtype=dtype, generator=generator) - 1
    eps = torch.randn(161, 3, 4, 4, dtype=dtype, generator=generator)
    z, v = diffuse(x, eps, logsnr), v_from_x_eps(x, eps, logsnr)
    assert (x_from_v(z, v, logsnr) - x).abs().max() < tolerance
    assert (eps_from_v(z, v, logsnr) - eps).abs().max() < tolerance


def test_posterior_is_equation_3():
    z, x = torch.randn(2, 5, 3, 2, 2, dtype=float64)
    logsnr_t, logsnr_s = torch.tensor([-14.0, -3, 0, 5, 9], dtype=float64), torch.tensor([-13.5, -1, 4, 6, 15], dtype=float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t, like=z), alpha_sigma(logsnr_s, like=z)
    alpha_ts = alpha_t / alpha_s
    variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    mean, logvar, logvar_max = posterior(z, x, logsnr_t, logsnr_s)
    assert torch.allclose(mean, alpha_ts * sigma_s**2 / sigma_t**2 * z + alpha_s * variance_ts / sigma_t**2 * x, atol=1e-12)
    assert torch.allclose(logvar.exp(), variance_ts * sigma_s**2 / sigma_t**2, rtol=1e-9)
    assert torch.allclose(logvar_max.exp(), variance_ts, rtol=1e-9)


@pytest.mark.parametrize("spec", ["cosin", "shifted", "shifted:x", "shifted:128", "interpolated:64:32", "interpolated:32", "cosine:64", "shifted:0", "shifted:-64"])
def test_make_schedule_refuses(spec):
    with pytest.raises(ValueError, match="schedule"):
        make_schedule(spec, 64)


# ---------------------------------------------------------------- unet.py: the wavelet


def lift_by_hand(row):
    """The 5/3 wavelet of one row, an index at a time, straight from its definition."""
    n = len(row)
    mirror = lambda i: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    at = lambda i: row[mirror(i)]
    detail = {i: at(2 * i + 1) - (at(2 * i) + at(2 * i + 2)) / 2 for i in range(-1, n // 2)}
    return [at(2 * i) + (detail[i - 1] + detail[i]) / 4 for i in range(n // 2)], [detail[i] for i in range(n // 2)]


def test_wavelet_is_the_scalar_loop():
    x = torch.randn(1, 1, 6, 8, dtype=float64)
    rows = [lift_by_hand(row) for row in x[0, 0].tolist()]
    halves = [torch.tensor([row[k] for row in rows], dtype=float64) for k in (0, 1)]  # smooth and detail along the width
    bands = []
    for half in halves:
        columns = [lift_by_hand(column) for column in half.T.tolist()]
        bands += [torch.tensor([column[k] for column in columns], dtype=float64).T for k in (0, 1)]
    assert torch.allclose(dwt53(x)[0], torch.stack(bands), atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_inverse_channels_and_constants(levels):
    x = torch.randn(2, 3, 24, 16)
    y = dwt53(x, levels)
    assert y.shape == (2, 3 * 4**levels, 24 // 2**levels, 16 // 2**levels)
    assert (idwt53(y, levels) - x).abs().max() < 1e-6
    constant = dwt53(torch.full((1, 3, 16, 16), 0.7), levels)
    assert torch.allclose(constant[:, :3], torch.tensor(0.7)) and (constant[:, 3:] == 0).all()
    with pytest.raises(ValueError, match="divisible"):
        dwt53(torch.randn(1, 3, 2**levels + 1, 16), levels)


# ---------------------------------------------------------------- unet.py, uvit.py: the nets

NETS = [(UViT, TINY_UVIT), (UNet, TINY_UNET)]


@pytest.mark.parametrize("net_class, fields", NETS)
@pytest.mark.parametrize("patching", list(unet.PATCHING))
def test_zero_at_init_then_labels_matter(net_class, fields, patching):
    torch.manual_seed(0)
    net = net_class(**fields | dict(res=(32, 16), patching=patching, channel_multiplier=(1, 2)))
    z, logsnr, label = torch.randn(4, 3, 32, 16), torch.tensor([-5.0, 0, 3, 9]), torch.tensor([0, 1, 2, 3])
    for y in (label, None):
        assert net(z, logsnr, y).shape == z.shape and not net(z, logsnr, y).any()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(z, logsnr, label) - z).square().mean().backward()
        optimizer.step()
    assert (net(z, logsnr, torch.zeros(4, dtype=torch.int64)) - net(z, logsnr)).abs().max() > 1e-4
    assert torch.equal(net(z, logsnr, torch.full((4,), 3)), net(z, logsnr))  # num_classes is the null label


@pytest.mark.parametrize("net_class, fields", [*NETS, (UViT, TINY_UVIT | dict(channel_multiplier=(1, 2, 2), num_res_blocks=(1, 1), attn_resolutions=(8,)))])
def test_gradients_reach_every_weight(net_class, fields):
    torch.manual_seed(0)
    net = randomize(net_class(**fields))
    net(torch.randn(4, 3, 16, 16), torch.tensor([-5.0, 0, 3, 9]), torch.arange(4)).square().mean().backward()
    films = [name for name, parameter in net.named_parameters() if "film" in name]
    assert len(films) >= 8
    for name, parameter in net.named_parameters():  # keys' biases cancel in the softmax; all else, every FiLM among it, counts
        assert parameter.grad is not None and (parameter.grad.abs().max() > 1e-9 or "norm_k.bias" in name), name


def test_position_of_a_token_matters():
    net = randomize(tiny_nets()[0])
    z, logsnr = torch.randn(1, 3, 16, 16), torch.zeros(1)
    before = net(z, logsnr)
    net.position.data = net.position.data.flip(3)
    assert (net(z, logsnr) - before).abs().max() > 1e-5


def test_dropout_acts_only_where_configured():
    rates = lambda blocks: {module.p for module in blocks.modules() if isinstance(module, nn.Dropout)}
    net = UNet(res=32, base_channels=8, emb_channels=8, channel_multiplier=(1, 1, 1), num_res_blocks=(1, 1, 1), dropout=0.3, dropout_from_resolution=16, attn_resolutions=())
    assert [rates(level) for level in net.down] == [rates(level) for level in net.up] == [{0.0}, {0.3}, {0.3}]
    assert rates(net.middle) == {0.3}
    net = UViT(res=32, base_channels=8, emb_channels=8, channel_multiplier=(1, 1, 1), num_res_blocks=(1, 1), num_transformer_blocks=1, dropout=0.3, transformer_dropout=0.2)
    assert [rates(net.down[0]), rates(net.down[1]), rates(net.transformer)] == [{0.0}, {0.3}, {0.2}]
    for dropout in (0.0, 0.5):
        net = randomize(UNet(**TINY_UNET | dict(dropout=dropout))).train()
        a, b = (net(torch.ones(1, 3, 16, 16), torch.zeros(1)) for _ in range(2))
        assert torch.equal(a, b) == (dropout == 0)
        assert torch.equal(*(net.eval()(torch.ones(1, 3, 16, 16), torch.zeros(1)) for _ in range(2)))


@pytest.mark.parametrize("net_class, name, millions, gmacs, tolerance", [
    (UViT, "family 64", 394.19, 109.2, 0.003), (UViT, "family 64 wide", 1243.2, 419.2, 0.003), (UViT, "family 128", 397.59, 138.5, 0.003),
    (UViT, "family 128 wide", 1253.7, 536.4, 0.003), (UViT, "U-ViT L 128", 2455, 533.3, 0.003), (UViT, "U-ViT L 256", 2455, 555, 0.05),
    (UViT, "U-ViT L 512", 2455, 535.0, 0.003), (UNet, "U-Net 128", 979.4, 289.0, 0.01), (UNet, "U-Net 256", 973.2, 318.9, 0.01),
    (UNet, "U-Net 512 none", 974.9, 554.3, 0.01), (UNet, "U-Net 512 dwt_1", 980.2, 432.2, 0.01), (UNet, "U-Net 512 conv_2", 980.2, 432.2, 0.01),
    (UNet, "U-Net 512 dwt_2", 996.7, 427.3, 0.01)])
def test_published_configurations(net_class, name, millions, gmacs, tolerance):
    parameters, macs, _ = unet.count(net_class, {UViT: uvit, UNet: unet}[net_class].CONFIGS[name])
    assert parameters / 1e6 == pytest.approx(millions, rel=min(tolerance, 0.01))
    assert macs / 1e9 == pytest.approx(gmacs, rel=tolerance)


def test_nets_refuse_what_does_not_fit():
    for net_class, fields in NETS:
        with pytest.raises(ValueError, match="divisible by 2"):
            net_class(**fields | dict(res=15))
        with pytest.raises(ValueError, match="patching"):
            net_class(**fields | dict(patching="dwt_3"))
        with pytest.raises(ValueError, match="num_res_blocks"):
            net_class(**fields | dict(num_res_blocks=(1, 1, 1)))
        with pytest.raises(ValueError, match="heads"):
            net_class(**fields | dict(num_heads=5))


# ---------------------------------------------------------------- loss.py


def test_eps_loss_is_the_literal_one_and_sigmoid_times_v():
    torch.manual_seed(0)
    x, eps, t = torch.rand(64, 3, 8, 8, dtype=float64) * 2 - 1, torch.randn(64, 3, 8, 8, dtype=float64), torch.rand(64, dtype=float64)
    schedule = make_schedule("cosine", 32)
    net = lambda z, logsnr, label: torch.tanh(z.flip(3) + 0.3)
    loss, logsnr = diffusion_loss(net, x, schedule, space="eps", t=t, eps=eps)
    z = diffuse(x, eps, logsnr)
    literal = (eps - eps_from_v(z, net(z, logsnr, None), logsnr)).square().mean((1, 2, 3))
    assert (loss - literal).abs().max() < 1e-12 and torch.equal(logsnr, schedule(t))
    loss_v, _ = diffusion_loss(net, x, schedule, space="v", t=t, eps=eps)
    assert (loss - torch.sigmoid(logsnr) * loss_v).abs().max() < 1e-12
    with pytest.raises(ValueError, match="space"):
        diffusion_loss(net, x, schedule, space="x")


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (96, 64)])
def test_multiscale_loss_by_hand(size):
    torch.manual_seed(0)
    error = torch.randn(2, 3, *size, dtype=float64)
    d, expected, s = min(size), 0, min(size)
    while s >= 32:
        f = d // s
        pooled = np.array([[error[:, :, f * i:f * i + f, f * j:f * j + f].mean((2, 3)).numpy() for j in range(size[1] // f)] for i in range(size[0] // f)])
        expected = expected + d / s * (pooled**2).mean((0, 1, 3))
        s //= 2
    assert np.allclose(mean_squares(error, multiscale=True).numpy(), expected, atol=1e-12)
    assert (mean_squares(0 * error, multiscale=True) == 0).all()
    for bad in ((65, 65), (16, 64)):
        with pytest.raises(ValueError, match="multiscale"):
            mean_squares(torch.zeros(1, 3, *bad), multiscale=True)


@pytest.mark.parametrize("space", ["eps", "v"])
def test_multiscale_minimizer_is_the_conditional_mean(space):
    torch.manual_seed(0)
    x, eps = torch.rand(6, 1, 64, 64, dtype=float64), torch.randn(6, 1, 64, 64, dtype=float64)
    t, schedule = torch.full((6,), 0.4, dtype=float64), make_schedule("cosine", 64)
    answer = torch.zeros(1, 1, 64, 64, dtype=float64, requires_grad=True)  # a net that knows nothing: one v_hat for all six
    optimizer = torch.optim.LBFGS([answer], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = 1000 * diffusion_loss(lambda z, logsnr, label: answer.expand_as(z), x, schedule, space=space, multiscale=True, t=t, eps=eps)[0].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (answer - v_from_x_eps(x, eps, schedule(t)).mean(0)).abs().max() < 1e-6


def gaussian_net(mean, variance):
    """The exact denoiser of independent Gaussian values; mean and variance broadcast against z."""
    def net(z, logsnr, label=None):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma
    return net


def test_elbo_of_a_gaussian_is_its_differential_entropy():
    torch.manual_seed(0)
    x = 0.25 * torch.randn(16, 3, 32, 32, dtype=float64)
    bits = elbo_bpd(gaussian_net(0.0, 0.25**2), x, make_schedule("cosine", 32), draws=256, pixels="gaussian")
    assert bits.shape == (16,)
    assert bits.mean().item() == pytest.approx(math.log2(0.25 * math.sqrt(2 * math.pi * math.e)), abs=0.02)


@pytest.mark.parametrize("logsnr_max", [15, 8])
def test_elbo_of_8_bit_pixels_is_their_entropy(logsnr_max):
    torch.manual_seed(0)
    levels = torch.arange(256, dtype=float64) / 127.5 - 1
    edges = torch.special.ndtr((torch.arange(257, dtype=float64) - 0.5) / 127.5 / 0.25 - 4)
    probability = edges.diff() / edges.diff().sum()
    entropy = -(probability * probability.log2()).sum().item()
    assert entropy == pytest.approx(7.041, abs=1e-3)
    x = levels[torch.multinomial(probability, 4 * 3 * 16 * 16, replacement=True)].reshape(4, 3, 16, 16)

    def net(z, logsnr, label=None):  # the mean of the 256 levels' posterior
        alpha, sigma = alpha_sigma(logsnr, like=z)
        logits = probability.log() - 0.5 * ((z[..., None] - alpha[..., None] * levels) / sigma[..., None]).square()
        return (alpha * z - torch.softmax(logits, -1) @ levels) / sigma

    schedule = lambda t: logsnr_schedule_cosine(t, -15.0, logsnr_max)
    assert elbo_bpd(net, x, schedule, draws=64).mean().item() == pytest.approx(entropy, rel=0.01)


# ---------------------------------------------------------------- sample.py


def recursion(sampler, interpolation, logsnrs, mean, variance):
    """Mean and variance of the samples of a scalar Gaussian, exactly: (z, last x_hat) is an affine map of itself and noise.

    Every formula is the literal one of the papers, not this project's. Returns them for z at the end.
    """
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnrs))), np.sqrt(1 / (1 + np.exp(logsnrs)))
    m, cov = np.zeros(2), np.diag([1.0, 0.0])
    for i in range(len(logsnrs) - 1):
        (a, s), (a1, s1) = (alpha[i], sigma[i]), (alpha[i + 1], sigma[i + 1])
        k = a * variance / (a**2 * variance + s**2)
        x = np.array([k, 0.0]), mean - k * a * mean  # x_hat as a row acting on (z, last x_hat), and a constant
        z = np.array([1.0, 0.0])
        last, noise = i == len(logsnrs) - 2, 0.0
        if sampler == "ddpm":
            r = np.exp(logsnrs[i] - logsnrs[i + 1])
            row, constant = r * a1 / a * z + (1 - r) * a1 * x[0], (1 - r) * a1 * x[1]
            noise = 0.0 if last else ((1 - r) * s**2) ** interpolation * ((1 - r) * s1**2) ** (1 - interpolation)
        else:
            if sampler == "dpmpp" and i > 0 and not last:
                h, h_last = (logsnrs[i + 1] - logsnrs[i]) / 2, (logsnrs[i] - logsnrs[i - 1]) / 2
                d = (1 + h / (2 * h_last)) * x[0] - h / (2 * h_last) * np.array([0.0, 1.0]), (1 + h / (2 * h_last)) * x[1]
            else:
                d = x
            row, constant = a1 * d[0] + s1 * (z - a * d[0]) / s, a1 * d[1] - s1 * a * d[1] / s
        matrix = np.stack([row, x[0]])
        m, cov = matrix @ m + np.array([constant, x[1]]), matrix @ cov @ matrix.T + np.diag([noise, 0.0])
    return m[0], cov[0, 0]


def grid_of(schedule, steps, grid="t"):
    u = torch.linspace(1, 0, steps + 1, dtype=float64)
    ends = schedule(torch.tensor([0.0, 1.0], dtype=float64))
    return (schedule(u) if grid == "t" else ends[0] + (ends[1] - ends[0]) * u).numpy()


SETTINGS = [("ddpm", 0.0, "t"), ("ddpm", 0.2, "t"), ("ddpm", 1.0, "t"), ("ddim", 0.0, "t"), ("ddim", 0.0, "logsnr"), ("dpmpp", 0.0, "t"), ("dpmpp", 0.0, "logsnr")]


@pytest.mark.parametrize("sampler, interpolation, grid", SETTINGS)
def test_samplers_follow_the_closed_form_on_a_gaussian(sampler, interpolation, grid):
    schedule, n = make_schedule("cosine", 32), 20_000
    mean, variance = torch.tensor([0.3, -0.5, 0.0], dtype=float64), torch.tensor([0.25, 0.04, 1.0], dtype=float64)
    net = gaussian_net(mean[:, None, None], variance[:, None, None])
    z = sample(net, (1, 3, 100, 200), schedule, steps=48, sampler=sampler, grid=grid, interpolation=interpolation, clip=None, dtype=float64).flatten(2)[0]
    covariance = torch.cov(z)
    expected = [recursion(sampler, interpolation, grid_of(schedule, 48, grid), *pair) for pair in zip(mean.tolist(), variance.tolist())]
    for i, (m, v) in enumerate(expected):
        assert abs(z[i].mean() - m) < 4 * math.sqrt(v / n)
        assert abs(covariance[i, i] - v) < 4 * v * math.sqrt(2 / n)
        assert abs(covariance[i, i - 1]) < 4 * math.sqrt(v * expected[i - 1][1] / n)


@pytest.mark.parametrize("sampler, interpolation, percent", [("ddpm", 0.0, (-2.9, -6.3)), ("ddpm", 0.2, (-2.2, -4.7)), ("ddpm", 1.0, (0.7, 2.2)), ("ddim", 0.0, (-1.2, -2.5))])
def test_bias_of_256_steps(sampler, interpolation, percent):
    schedule = make_schedule("cosine", 32)
    error = lambda steps, variance: recursion(sampler, interpolation, grid_of(schedule, steps), 0.0, variance)[1] / variance - 1
    for variance, expected in zip((0.25, 0.04), percent):
        assert 100 * error(256, variance) == pytest.approx(expected, abs=0.06)
    assert abs(error(256, 0.25)) < 0.04
    assert 3.4 < error(256, 0.25) / error(1024, 0.25) < 4.2


def deterministic_std(sampler, steps, variance=0.25):
    """The std of a deterministic sampler's output on a Gaussian: its slope in the initial noise, from two values of it."""
    start = []
    net = gaussian_net(0.0, variance)

    def watched(z, logsnr, label):
        start.append(z) if not start else None
        return net(z, logsnr, label)

    z = sample(watched, (1, 1, 1, 2), make_schedule("cosine", 32), steps=steps, sampler=sampler, grid="logsnr", clip=None, dtype=float64)
    return ((z[..., 1] - z[..., 0]) / (start[0][..., 1] - start[0][..., 0])).item()


@pytest.mark.parametrize("sampler, low, high", [("ddim", 1.9, 2.1), ("dpmpp", 3.8, 4.2)])
def test_order_of_convergence(sampler, low, high):
    errors = [abs(deterministic_std(sampler, steps) / 0.5 - 1) for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:]):
        assert low <= coarse / fine <= high, errors


def test_dpmpp_beats_ddim_in_25_steps_on_a_mixture():
    centers, weights, variance = torch.tensor([-0.6, 0.1, 0.7], dtype=float64), torch.tensor([0.2, 0.5, 0.3], dtype=float64), 0.01

    def net(z, logsnr, label):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        total = (alpha**2 * variance + sigma**2)[..., None]
        posterior_weights = torch.softmax(weights.log() - 0.5 * (z[..., None] - alpha[..., None] * centers).square() / total, -1)
        means = centers + alpha[..., None] * variance / total * (z[..., None] - alpha[..., None] * centers)
        return (alpha * z - (posterior_weights * means).sum(-1)) / sigma

    draw = lambda sampler, steps: sample(net, (1, 1, 50, 50), make_schedule("cosine", 32), steps=steps, sampler=sampler, grid="logsnr", clip=None, dtype=float64)
    exact = draw("dpmpp", 4096)
    error = {sampler: (draw(sampler, 25) - exact).square().mean().sqrt() for sampler in ("ddim", "dpmpp")}
    assert error["dpmpp"] <= 0.5 * error["ddim"], error


class Counted(nn.Module):
    """A net of the label and z that remembers the batch sizes of its calls."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, logsnr, label):
        self.calls.append(len(z))
        return torch.tanh(z) * (1 + label[:, None, None, None]) / 3


def test_guidance():
    net, label = Counted(), torch.tensor([0, 2])
    draw = lambda **kwargs: sample(net, (2, 3, 4, 4), make_schedule("cosine", 32), steps=10, label=label, **kwargs)
    assert guided(net, 1.0) is net
    plain = draw()
    assert torch.equal(draw(guidance=1.0), plain) and net.calls == [2] * 20  # scale 1 costs nothing and changes nothing
    net.calls.clear()
    assert not torch.equal(draw(guidance=2.0), plain) and net.calls == [4] * 10

    z, logsnr = torch.randn(2, 3, 4, 4), torch.tensor([0.0, 5.0])
    cond, uncond = net(z, logsnr, label), net(z, logsnr, torch.full((2,), 3))
    eps = lambda v: eps_from_v(z, v, logsnr)
    assert torch.allclose(eps(guided(net, 1.5)(z, logsnr, label)), 1.5 * eps(cond) - 0.5 * eps(uncond), atol=1e-6)  # eta = 0.5
    inside = guided(net, 1.5, (-1, 1))(z, logsnr, label)
    assert torch.equal(inside[1], cond[1]) and torch.allclose(inside[0], guided(net, 1.5)(z, logsnr, label)[0])
    net.calls.clear()
    logsnrs = grid_of(make_schedule("cosine", 32), 10)[:-1]
    draw(guidance=2.0, guidance_interval=(-2, 2))
    assert net.calls == [4 if -2 <= logsnr <= 2 else 2 for logsnr in logsnrs]


def test_a_picture_does_not_depend_on_its_batch():
    net = Counted()
    draw = lambda first, n: sample(net, (n, 3, 4, 4), make_schedule("cosine", 32), steps=5, label=torch.arange(first, first + n) % 3, seed=7, first=first)
    assert torch.equal(draw(0, 6), torch.cat([draw(0, 1), draw(1, 3), draw(4, 2)]))
    assert not torch.equal(draw(0, 1), draw(3, 1))


def test_clipping_and_rounding():
    x = torch.tensor([[-3.0, 0.5, 2.0, 1.0]])
    assert sampling.clip_x(x, "static").tolist() == [[-1, 0.5, 1, 1]]
    assert torch.equal(sampling.clip_x(x, None), x)
    limit = torch.tensor([0.5, 1.0, 2.0, 3.0]).quantile(0.995).item()
    assert torch.allclose(sampling.clip_x(x, "dynamic"), (x / limit).clamp(-1, 1))
    assert torch.equal(sampling.clip_x(x / 4, "dynamic"), x / 4)  # a picture inside the range stays
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-2.0, -0.9930, 2.0, (200.4 / 127.5) - 1, (200.6 / 127.5) - 1])).tolist() == [0, 1, 255, 200, 201]
    for kwargs in (dict(sampler="euler"), dict(grid="sigma"), dict(clip="tanh")):
        with pytest.raises(ValueError, match="not known"):
            sample(Counted(), (1, 3, 4, 4), make_schedule("cosine", 32), **kwargs)


def test_the_last_ddpm_step_is_its_mean():
    z, x = torch.randn(2, 3, 8)
    mean = posterior(z, x, torch.tensor(-1.0), torch.tensor(2.0))[0]
    assert torch.equal(ddpm_step(z, x, torch.tensor(-1.0), torch.tensor(2.0)), mean)
    assert torch.allclose(ddim_step(z, x, torch.tensor(-1.0), torch.tensor(60.0)), x, atol=1e-6)  # no noise left: x itself
