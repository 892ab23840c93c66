"""All tests: identities and closed forms, on tiny nets and small images.

python test_all.py                # about five minutes on two cores
python test_all.py -m slow        # what takes long, such as trainings that are killed: seven more
python test_all.py -k sampler     # what pytest takes, goes to pytest

Class accuracy of a trained run's samples, about three minutes, and for texts how many samples show
what was asked for:

RUN=runs/shapes-32 python test_all.py -k judge -s
TEXT_RUN=runs/shapes-text-32 python test_all.py -m slow -k of_texts -s
"""

import collections
import contextlib
import copy
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib

os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # the tests, and the commands that they start, are for the CPU
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # nets are so tiny that threads mostly wait for each other, for minutes where other programs run

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import sample as sampling
import train
import unet
import uvit
from loss import diffusion_loss, elbo_bpd, mean_squares
from sample import ddim_step, ddpm_step, guided, sample, to_uint8
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
from support import bench
from support.bench import Stopwatch, training_flops
from support.checkpoint import build_net, load, load_checkpoint, save_checkpoint
from support.data import ImageData, Shapes, example_noise, image_order, load_batch, open_dataset
from support.recipes import RECIPES, TRAINING
from support.runtime import in_bf16, pixels, run_command
from support.settings import DEFAULTS
from support.text import (
    T5,
    CaptionedImages,
    CaptionedShapes,
    CrossAttention,
    Text,
    TextUViT,
    byte_tokens,
    cache_embeddings,
    read_captions,
)
from unet import UNet, dwt53, idwt53
from uvit import UViT

HERE = os.path.dirname(os.path.abspath(__file__))
float64 = torch.float64
T = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])


def named(*words):
    """A regular expression for a text with all these words in it, in any order."""
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(word))}(?!\w))" for word in words)


def resumed_at(output):
    """The steps at which printed lines say that a run was resumed."""
    return [int(step) for step in re.findall(r"(?mi)^resum.*?\bstep (\d+)", output)]


def log_lines(out):
    """The lines of a run's log, parsed."""
    with open(f"{out}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def content_of(path):
    with open(path, "rb") as file:
        return file.read()


TINY_UVIT = dict(
    res=16,
    num_classes=3,
    base_channels=16,
    emb_channels=32,
    channel_multiplier=(1, 2),
    num_res_blocks=(1,),
    num_transformer_blocks=2,
    transformer_dropout=0.0,
)
TINY_UNET = dict(
    res=16,
    num_classes=3,
    base_channels=16,
    emb_channels=32,
    channel_multiplier=(1, 2),
    num_res_blocks=(1, 1),
    dropout=0.0,
    attn_resolutions=(8,),
)


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
        assert torch.allclose(
            make_schedule(spec, image_d)(T.to(dtype)),
            torch.tensor(values, dtype=dtype),
            rtol=0,
            atol=1e-3,
        )


def test_schedule_identities():
    t = torch.linspace(0, 1, 1001, dtype=float64)
    for image_d, noise_d in ((512, 64), (256, 32), (128, 128)):
        logsnr = logsnr_schedule_cosine_shifted(t, image_d, noise_d)
        assert abs(logsnr[500].item() - 2 * math.log(noise_d / image_d)) < 1e-9
        assert (logsnr.diff() < 0).all()
    assert torch.equal(logsnr_schedule_cosine_shifted(t, 64, 64), logsnr_schedule_cosine(t))
    assert torch.allclose(
        logsnr_schedule_cosine_interpolated(t, 64, 64, 64), logsnr_schedule_cosine(t), atol=1e-12
    )
    alpha, sigma = alpha_sigma(torch.linspace(-20, 20, 401))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(401), atol=3e-7)
    assert logsnr_schedule_cosine(0.5).item() == pytest.approx(
        0, abs=1e-6
    )  # a plain number is a time, too
    shifted = make_schedule("shifted:64", 512)
    assert shifted(torch.tensor(0.079, dtype=float64)).abs() < 0.02  # alpha = sigma at t = 0.079


def test_interpolated_schedule_falls_where_the_printed_equation_does_not():
    t = torch.linspace(0, 1, 10001, dtype=float64)
    assert (make_schedule("interpolated:32:1024", 1024)(t).diff() < 0).all()
    printed = t * logsnr_schedule_cosine_shifted(t, 1024, 1024) + (
        1 - t
    ) * logsnr_schedule_cosine_shifted(t, 1024, 32)
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
    logsnr_t, logsnr_s = (
        torch.tensor([-14.0, -3, 0, 5, 9], dtype=float64),
        torch.tensor([-13.5, -1, 4, 6, 15], dtype=float64),
    )
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        alpha_sigma(logsnr_t, like=z),
        alpha_sigma(logsnr_s, like=z),
    )
    alpha_ts = alpha_t / alpha_s
    variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    mean, logvar, logvar_max = posterior(z, x, logsnr_t, logsnr_s)
    assert torch.allclose(
        mean,
        alpha_ts * sigma_s**2 / sigma_t**2 * z + alpha_s * variance_ts / sigma_t**2 * x,
        atol=1e-12,
    )
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
def test_make_schedule_refuses(spec):
    with pytest.raises(ValueError, match=re.escape(spec)):
        make_schedule(spec, 64)


# ---------------------------------------------------------------- unet.py: the wavelet


def lift_by_hand(row):
    """The 5/3 wavelet of one row, an index at a time, straight from its definition."""
    n = len(row)

    def mirror(i):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    def at(i):
        return row[mirror(i)]

    detail = {i: at(2 * i + 1) - (at(2 * i) + at(2 * i + 2)) / 2 for i in range(-1, n // 2)}
    return [at(2 * i) + (detail[i - 1] + detail[i]) / 4 for i in range(n // 2)], [
        detail[i] for i in range(n // 2)
    ]


def test_wavelet_is_the_scalar_loop():
    x = torch.randn(1, 1, 6, 8, dtype=float64)
    rows = [lift_by_hand(row) for row in x[0, 0].tolist()]
    halves = [
        torch.tensor([row[k] for row in rows], dtype=float64) for k in (0, 1)
    ]  # smooth and detail along the width
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
    with pytest.raises(ValueError, match=rf"\b{2**levels + 1}\D+16\b"):
        dwt53(torch.randn(1, 3, 2**levels + 1, 16), levels)


# ---------------------------------------------------------------- unet.py, uvit.py: the nets

NETS = [(UViT, TINY_UVIT), (UNet, TINY_UNET)]


@pytest.mark.parametrize("net_class, fields", NETS)
@pytest.mark.parametrize("patching", list(unet.PATCHING))
def test_zero_at_init_then_labels_matter(net_class, fields, patching):
    torch.manual_seed(0)
    net = net_class(**fields | dict(res=(32, 16), patching=patching, channel_multiplier=(1, 2)))
    z, logsnr, label = (
        torch.randn(4, 3, 32, 16),
        torch.tensor([-5.0, 0, 3, 9]),
        torch.tensor([0, 1, 2, 3]),
    )
    for y in (label, None):
        assert net(z, logsnr, y).shape == z.shape and not net(z, logsnr, y).any()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(z, logsnr, label) - z).square().mean().backward()
        optimizer.step()
    assert (net(z, logsnr, torch.zeros(4, dtype=torch.int64)) - net(z, logsnr)).abs().max() > 1e-4
    assert torch.equal(
        net(z, logsnr, torch.full((4,), 3)), net(z, logsnr)
    )  # num_classes is the null label


@pytest.mark.parametrize(
    "net_class, fields",
    [
        *NETS,
        (
            UViT,
            TINY_UVIT
            | dict(channel_multiplier=(1, 2, 2), num_res_blocks=(1, 1), attn_resolutions=(8,)),
        ),
    ],
)
def test_gradients_reach_every_weight(net_class, fields):
    torch.manual_seed(0)
    net = randomize(net_class(**fields))
    net(
        torch.randn(4, 3, 16, 16), torch.tensor([-5.0, 0, 3, 9]), torch.arange(4)
    ).square().mean().backward()
    films = [name for name, parameter in net.named_parameters() if "film" in name]
    assert len(films) >= 8
    for (
        name,
        parameter,
    ) in (
        net.named_parameters()
    ):  # keys' biases cancel in the softmax; all else, every FiLM among it, counts
        assert parameter.grad is not None and (
            parameter.grad.abs().max() > 1e-9 or "norm_k.bias" in name
        ), name


def test_position_of_a_token_matters():
    net = randomize(tiny_nets()[0])
    z, logsnr = torch.randn(1, 3, 16, 16), torch.zeros(1)
    before = net(z, logsnr)
    net.position.data = net.position.data.flip(2)
    assert (net(z, logsnr) - before).abs().max() > 1e-5


@pytest.mark.parametrize("net_class, fields", NETS)
def test_recomputed_activations_are_the_same_and_fewer_are_kept(net_class, fields):
    kept, results = [], []
    for sizes in ((), (16,), (8,), (16, 8)):
        torch.manual_seed(0)
        net = randomize(net_class(**fields | dict(dropout=0.3), checkpoint_resolutions=sizes))
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.update({x.data_ptr(): x.numel()}), x)[1], lambda x: x
        ):
            v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2))
        v_hat.square().mean().backward()
        kept.append(sum(saved.values()))
        results.append([v_hat, *(p.grad for p in net.parameters())])
        assert all(
            torch.equal(a, b) for a, b in zip(results[0], results[-1])
        )  # dropout, too, is drawn alike
    assert kept[0] > kept[1] > kept[3] and kept[0] > kept[2] > kept[3]


def test_channels_last_changes_no_result():
    for net in map(randomize, tiny_nets()):
        z, logsnr = torch.randn(2, 3, 16, 16), torch.zeros(2)
        assert torch.allclose(
            net(z, logsnr), net.to(memory_format=torch.channels_last)(z, logsnr), atol=1e-5
        )


def test_dropout_acts_only_where_configured():
    def rates(blocks):
        return {module.p for module in blocks.modules() if isinstance(module, nn.Dropout)}

    net = UNet(
        res=32,
        base_channels=8,
        emb_channels=8,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=(1, 1, 1),
        dropout=0.3,
        dropout_from_resolution=16,
        attn_resolutions=(),
    )
    assert (
        [rates(level) for level in net.down]
        == [rates(level) for level in net.up]
        == [{0.0}, {0.3}, {0.3}]
    )
    assert rates(net.middle) == {0.3}
    net = UViT(
        res=32,
        base_channels=8,
        emb_channels=8,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=(1, 1),
        num_transformer_blocks=1,
        dropout=0.3,
        transformer_dropout=0.2,
    )
    assert [rates(net.down[0]), rates(net.down[1]), rates(net.transformer)] == [{0.0}, {0.3}, {0.2}]
    for dropout in (0.0, 0.5):
        net = randomize(UNet(**TINY_UNET | dict(dropout=dropout))).train()
        a, b = (net(torch.ones(1, 3, 16, 16), torch.zeros(1)) for _ in range(2))
        assert torch.equal(a, b) == (dropout == 0)
        assert torch.equal(
            *(net.eval()(torch.ones(1, 3, 16, 16), torch.zeros(1)) for _ in range(2))
        )


@pytest.mark.parametrize(
    "net_class, name, millions, gmacs, tolerance",
    [
        (UViT, "family 64", 394.19, 109.2, 0.003),
        (UViT, "family 64 wide", 1243.2, 419.2, 0.003),
        (UViT, "family 128", 397.59, 138.5, 0.003),
        (UViT, "family 128 wide", 1253.7, 536.4, 0.003),
        (UViT, "U-ViT L 128", 2455, 533.3, 0.003),
        (UViT, "U-ViT L 256", 2455, 555, 0.05),
        (UViT, "U-ViT L 512", 2455, 535.0, 0.003),
        (UNet, "U-Net 128", 979.4, 289.0, 0.01),
        (UNet, "U-Net 256", 973.2, 318.9, 0.01),
        (UNet, "U-Net 512 none", 974.9, 554.3, 0.01),
        (UNet, "U-Net 512 dwt_1", 980.2, 432.2, 0.01),
        (UNet, "U-Net 512 conv_2", 980.2, 432.2, 0.01),
        (UNet, "U-Net 512 dwt_2", 996.7, 427.3, 0.01),
    ],
)
def test_published_configurations(net_class, name, millions, gmacs, tolerance):
    parameters, macs, _ = unet.count(net_class, {UViT: uvit, UNet: unet}[net_class].CONFIGS[name])
    assert parameters / 1e6 == pytest.approx(millions, rel=min(tolerance, 0.01))
    assert macs / 1e9 == pytest.approx(gmacs, rel=tolerance)


def test_nets_refuse_what_does_not_fit():
    for net_class, fields in NETS:
        with pytest.raises(ValueError, match=r"\b15\D?15\b"):
            net_class(**fields | dict(res=15))
        with pytest.raises(ValueError, match=named("patching", "dwt_3")):
            net_class(**fields | dict(patching="dwt_3"))
        with pytest.raises(ValueError, match="num_res_blocks"):
            net_class(**fields | dict(num_res_blocks=(1, 1, 1)))
        with pytest.raises(ValueError, match=r"\b5\b"):
            net_class(**fields | dict(num_heads=5))


# ---------------------------------------------------------------- loss.py


def test_eps_loss_is_the_literal_one_and_sigmoid_times_v():
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


def gaussian_net(mean, variance):
    """The exact denoiser of independent Gaussian values; mean and variance broadcast against z."""

    def net(z, logsnr, label=None):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma

    return net


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


# ---------------------------------------------------------------- sample.py


def recursion(sampler, interpolation, logsnrs, mean, variance):
    """Mean and variance of the samples of a scalar Gaussian, exactly.

    (z, last x_hat) is an affine map of itself and noise. Every formula is the literal one of the
    papers, not this project's. Returns them for z at the end.
    """
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnrs))), np.sqrt(1 / (1 + np.exp(logsnrs)))
    m, cov = np.zeros(2), np.diag([1.0, 0.0])
    for i in range(len(logsnrs) - 1):
        (a, s), (a1, s1) = (alpha[i], sigma[i]), (alpha[i + 1], sigma[i + 1])
        k = a * variance / (a**2 * variance + s**2)
        x = (
            np.array([k, 0.0]),
            mean - k * a * mean,
        )  # x_hat as a row acting on (z, last x_hat), and a constant
        z = np.array([1.0, 0.0])
        last, noise = i == len(logsnrs) - 2, 0.0
        if sampler == "ddpm":
            r = np.exp(logsnrs[i] - logsnrs[i + 1])
            row, constant = r * a1 / a * z + (1 - r) * a1 * x[0], (1 - r) * a1 * x[1]
            noise = (
                0.0
                if last
                else ((1 - r) * s**2) ** interpolation * ((1 - r) * s1**2) ** (1 - interpolation)
            )
        else:
            if sampler == "dpmpp" and i > 0 and not last:
                h, h_last = (logsnrs[i + 1] - logsnrs[i]) / 2, (logsnrs[i] - logsnrs[i - 1]) / 2
                d = (
                    (1 + h / (2 * h_last)) * x[0] - h / (2 * h_last) * np.array([0.0, 1.0]),
                    (1 + h / (2 * h_last)) * x[1],
                )
            else:
                d = x
            row, constant = a1 * d[0] + s1 * (z - a * d[0]) / s, a1 * d[1] - s1 * a * d[1] / s
        matrix = np.stack([row, x[0]])
        m, cov = (
            matrix @ m + np.array([constant, x[1]]),
            matrix @ cov @ matrix.T + np.diag([noise, 0.0]),
        )
    return m[0], cov[0, 0]


def grid_of(schedule, steps, grid="t"):
    u = torch.linspace(1, 0, steps + 1, dtype=float64)
    ends = schedule(torch.tensor([0.0, 1.0], dtype=float64))
    return (schedule(u) if grid == "t" else ends[0] + (ends[1] - ends[0]) * u).numpy()


SETTINGS = [
    ("ddpm", 0.0, "t"),
    ("ddpm", 0.2, "t"),
    ("ddpm", 1.0, "t"),
    ("ddim", 0.0, "t"),
    ("ddim", 0.0, "logsnr"),
    ("dpmpp", 0.0, "t"),
    ("dpmpp", 0.0, "logsnr"),
]


@pytest.mark.parametrize("sampler, interpolation, grid", SETTINGS)
def test_samplers_follow_the_closed_form_on_a_gaussian(sampler, interpolation, grid):
    schedule, n = make_schedule("cosine", 32), 20_000
    mean, variance = (
        torch.tensor([0.3, -0.5, 0.0], dtype=float64),
        torch.tensor([0.25, 0.04, 1.0], dtype=float64),
    )
    net = gaussian_net(mean[:, None, None], variance[:, None, None])
    z = sample(
        net,
        (1, 3, 100, 200),
        schedule,
        steps=48,
        sampler=sampler,
        grid=grid,
        interpolation=interpolation,
        clip=None,
        dtype=float64,
    ).flatten(2)[0]
    covariance = torch.cov(z)
    expected = [
        recursion(sampler, interpolation, grid_of(schedule, 48, grid), *pair)
        for pair in zip(mean.tolist(), variance.tolist())
    ]
    for i, (m, v) in enumerate(expected):
        assert abs(z[i].mean() - m) < 4 * math.sqrt(v / n)
        assert abs(covariance[i, i] - v) < 4 * v * math.sqrt(2 / n)
        assert abs(covariance[i, i - 1]) < 4 * math.sqrt(v * expected[i - 1][1] / n)


@pytest.mark.parametrize(
    "sampler, interpolation, percent",
    [
        ("ddpm", 0.0, (-2.9, -6.3)),
        ("ddpm", 0.2, (-2.2, -4.7)),
        ("ddpm", 1.0, (0.7, 2.2)),
        ("ddim", 0.0, (-1.2, -2.5)),
    ],
)
def test_bias_of_256_steps(sampler, interpolation, percent):
    schedule = make_schedule("cosine", 32)

    def error(steps, variance):
        return (
            recursion(sampler, interpolation, grid_of(schedule, steps), 0.0, variance)[1] / variance
            - 1
        )

    for variance, expected in zip((0.25, 0.04), percent):
        assert 100 * error(256, variance) == pytest.approx(expected, abs=0.06)
    assert abs(error(256, 0.25)) < 0.04
    assert 3.4 < error(256, 0.25) / error(1024, 0.25) < 4.2


def deterministic_std(sampler, steps, variance=0.25):
    """The std of a deterministic sampler's output on a Gaussian.

    It is the output's slope in the initial noise, from two values of it.
    """
    start = []
    net = gaussian_net(0.0, variance)

    def watched(z, logsnr, label):
        start.append(z) if not start else None
        return net(z, logsnr, label)

    z = sample(
        watched,
        (1, 1, 1, 2),
        make_schedule("cosine", 32),
        steps=steps,
        sampler=sampler,
        grid="logsnr",
        clip=None,
        dtype=float64,
    )
    return ((z[..., 1] - z[..., 0]) / (start[0][..., 1] - start[0][..., 0])).item()


@pytest.mark.parametrize("sampler, low, high", [("ddim", 1.9, 2.1), ("dpmpp", 3.8, 4.2)])
def test_order_of_convergence(sampler, low, high):
    errors = [abs(deterministic_std(sampler, steps) / 0.5 - 1) for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:]):
        assert low <= coarse / fine <= high, errors


def test_dpmpp_beats_ddim_in_25_steps_on_a_mixture():
    centers, weights, variance = (
        torch.tensor([-0.6, 0.1, 0.7], dtype=float64),
        torch.tensor([0.2, 0.5, 0.3], dtype=float64),
        0.01,
    )

    def net(z, logsnr, label):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        total = (alpha**2 * variance + sigma**2)[..., None]
        posterior_weights = torch.softmax(
            weights.log() - 0.5 * (z[..., None] - alpha[..., None] * centers).square() / total, -1
        )
        means = centers + alpha[..., None] * variance / total * (
            z[..., None] - alpha[..., None] * centers
        )
        return (alpha * z - (posterior_weights * means).sum(-1)) / sigma

    def draw(sampler, steps):
        return sample(
            net,
            (1, 1, 50, 50),
            make_schedule("cosine", 32),
            steps=steps,
            sampler=sampler,
            grid="logsnr",
            clip=None,
            dtype=float64,
        )

    exact = draw("dpmpp", 4096)
    error = {
        sampler: (draw(sampler, 25) - exact).square().mean().sqrt() for sampler in ("ddim", "dpmpp")
    }
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

    def draw(**kwargs):
        return sample(
            net, (2, 3, 4, 4), make_schedule("cosine", 32), steps=10, label=label, **kwargs
        )

    assert guided(net, 1.0) is net
    plain = draw()
    assert (
        torch.equal(draw(guidance=1.0), plain) and net.calls == [2] * 20
    )  # scale 1 costs nothing and changes nothing
    net.calls.clear()
    assert not torch.equal(draw(guidance=2.0), plain) and net.calls == [4] * 10

    z, logsnr = torch.randn(2, 3, 4, 4), torch.tensor([0.0, 5.0])
    cond, uncond = net(z, logsnr, label), net(z, logsnr, torch.full((2,), 3))

    def eps(v):
        return eps_from_v(z, v, logsnr)

    assert torch.allclose(
        eps(guided(net, 1.5)(z, logsnr, label)), 1.5 * eps(cond) - 0.5 * eps(uncond), atol=1e-6
    )  # eta = 0.5
    # Functions from nets to a net compose.
    twice = guided(guided(net, 1.5), 1.5, net.num_classes)(z, logsnr, label)
    assert torch.allclose(twice, uncond + 2.25 * (cond - uncond), atol=1e-6)
    with pytest.raises(ValueError, match="guidance"):
        sample(net, (2, 3, 4, 4), make_schedule("cosine", 32), guidance=2.0)
    net.calls.clear()
    logsnrs = grid_of(make_schedule("cosine", 32), 10)[:-1]
    draw(guidance=2.0, guidance_interval=(-2, 2))
    assert net.calls == [4 if -2 <= logsnr <= 2 else 2 for logsnr in logsnrs]
    assert torch.equal(draw(guidance=2.0, guidance_interval=(20, 30)), plain)
    assert torch.equal(draw(guidance=2.0, guidance_interval=(-20, 20)), draw(guidance=2.0))


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: numbers read from tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_no_step_of_sampling_waits_for_the_device(sampler, clip):
    if clip == "dynamic" and torch.__version__ < "2.13":
        pytest.skip(
            "quantile() of older torch reads its argument to check it, though on a CPU only"
        )
    counts = []
    for steps in (3, 9):
        with Waits() as waits:
            sample(
                tiny_nets()[0],
                (2, 3, 16, 16),
                make_schedule("cosine", 32),
                steps=steps,
                sampler=sampler,
                label=torch.tensor([0, 1]),
                guidance=2.0,
                guidance_interval=(-2, 2),
                clip=clip,
            )
        counts.append(waits.count)
    assert counts[0] == counts[1]
    with Waits() as waits:
        assert torch.ones(3).any() and torch.ones(()).item()
    assert waits.count == 2  # so they are seen


def test_an_image_does_not_depend_on_its_batch():
    net = Counted()

    def draw(first, n):
        return sample(
            net,
            (n, 3, 4, 4),
            make_schedule("cosine", 32),
            steps=5,
            label=torch.arange(first, first + n) % 3,
            seed=7,
            first=first,
        )

    assert torch.equal(draw(0, 6), torch.cat([draw(0, 1), draw(1, 3), draw(4, 2)]))
    assert not torch.equal(draw(0, 1), draw(3, 1))


def test_clipping_and_rounding():
    x = torch.tensor([[-3.0, 0.5, 2.0, 1.0]])
    assert sampling.clip_x(x, "static").tolist() == [[-1, 0.5, 1, 1]]
    assert torch.equal(sampling.clip_x(x, None), x)
    limit = torch.tensor([0.5, 1.0, 2.0, 3.0]).quantile(0.995).item()
    assert torch.allclose(sampling.clip_x(x, "dynamic"), (x / limit).clamp(-1, 1))
    assert torch.equal(sampling.clip_x(x / 4, "dynamic"), x / 4)  # an image inside the range stays
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert (
        torch.equal(to_uint8(sampling.to_float(levels.to(torch.uint8))), levels.to(torch.uint8))
        and sampling.to_float(x) is x
    )
    assert to_uint8(
        torch.tensor([-2.0, -0.9930, 2.0, (200.4 / 127.5) - 1, (200.6 / 127.5) - 1])
    ).tolist() == [0, 1, 255, 200, 201]
    for kwargs in (dict(sampler="euler"), dict(grid="sigma"), dict(clip="tanh")):
        with pytest.raises(ValueError, match=named(*kwargs.values())):
            sample(Counted(), (1, 3, 4, 4), make_schedule("cosine", 32), **kwargs)


def test_the_last_ddpm_step_is_its_mean():
    z, x = torch.randn(2, 3, 8)
    mean = posterior(z, x, torch.tensor(-1.0), torch.tensor(2.0))[0]
    assert torch.equal(ddpm_step(z, x, torch.tensor(-1.0), torch.tensor(2.0)), mean)
    assert torch.allclose(
        ddim_step(z, x, torch.tensor(-1.0), torch.tensor(60.0)), x, atol=1e-6
    )  # no noise left: x itself


# ---------------------------------------------------------------- fid.py: reading images


def photo(size=(20, 16), seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )


def test_reading_folders_and_zips(tmp_path):
    for name in ("cats/a.png", "dogs/deep/b.png", "cats/c.bmp"):
        path = tmp_path / "set" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed=len(name)).save(path)
    (tmp_path / "set" / "train" / "notes.txt").write_text("not an image")
    pictures = fid.ImageReader(tmp_path / "set")
    assert (
        pictures.classes == ["cats", "dogs"]
        and pictures.labels.tolist() == [0, 0, 1]
        and len(pictures) == 3
    )
    assert np.array_equal(pictures[0], np.asarray(photo(seed=10)))
    for part, names in (("1", ("cats/a.png",)), ("2", ("cats/c.bmp", "dogs/deep/b.png"))):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for name in names:
                file.write(tmp_path / "set" / "train" / name, f"root/{name}")
    zipped = fid.ImageReader(
        [tmp_path / "1.zip", tmp_path / "2.zip"]
    )  # one data set in several archives
    assert zipped.classes == pictures.classes and zipped.labels.tolist() == [0, 0, 1]
    assert all(np.array_equal(zipped[i], pictures[i]) for i in range(3))
    flat = fid.ImageReader(tmp_path / "set" / "train" / "cats")
    assert flat.labels is None and flat.classes is None and len(flat) == 2


def test_reading_arrays(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", x=x, y=np.array([0, 1, 1, 0, 2]), classes=np.array(["a", "b", "c"])
    )
    np.save(tmp_path / "b.npy", x[..., :1])
    labeled, plain = fid.ImageReader(tmp_path / "a.npz"), fid.ImageReader([tmp_path / "b.npy"])
    assert labeled.classes == ["a", "b", "c"] and labeled.labels.tolist() == [0, 1, 1, 0, 2]
    assert all(np.array_equal(labeled[i], x[i]) for i in range(5))
    assert plain.labels is None and np.array_equal(plain[3], x[3, :, :, :1].repeat(3, 2))
    assert isinstance(plain.sources[0][0], np.memmap) and isinstance(
        labeled.sources[0][0], np.memmap
    )
    for save, dtype in ((np.savez_compressed, "C"), (np.savez, "F")):  # these cannot be mapped
        save(tmp_path / "e.npz", arr_0=np.asarray(x, order=dtype), other=x)
        other = fid.ImageReader(tmp_path / "e.npz")
        assert not isinstance(other.sources[0][0], np.memmap) and all(
            np.array_equal(other[i], x[i]) for i in range(5)
        )
    np.savez(tmp_path / "c.npz", arr_0=x, y=np.array([0, 1, 0, 1, 0]), classes=np.array(["c", "d"]))
    both = fid.ImageReader(
        [tmp_path / "a.npz", tmp_path / "c.npz"]
    )  # labels go by the names of the classes
    assert both.classes == ["a", "b", "c", "d"] and both.labels.tolist() == [
        0,
        1,
        1,
        0,
        2,
        2,
        3,
        2,
        3,
        2,
    ]
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 3, 0, 1, 0]))
    assert fid.ImageReader(tmp_path / "d.npz").classes == ["0", "1", "2", "3"]
    for other in ("b.npy", "d.npz"):
        with pytest.raises(ValueError, match=named("y", "classes")):
            fid.ImageReader([tmp_path / "a.npz", tmp_path / other])


def test_images_of_every_kind_become_what_a_person_sees(tmp_path):
    rgb = photo()
    gradient = np.linspace(0, 65535, 320).reshape(16, 20).astype(np.uint16)
    turned = rgb.getexif()
    turned[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    rgb.save(tmp_path / "exif.png", exif=turned)
    Image.fromarray(gradient).save(tmp_path / "16bit.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.quantize(16).save(tmp_path / "palette.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tiff")
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 0))
    alpha.save(tmp_path / "alpha.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    rgb.quantize(16).save(
        tmp_path / "animated.gif", save_all=True, append_images=[Image.new("P", rgb.size)] * 3
    )
    read = {
        name: fid.ImageReader(tmp_path)[i] for i, name in enumerate(sorted(os.listdir(tmp_path)))
    }
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in read.values())
    assert np.array_equal(read["exif.png"], np.rot90(np.asarray(rgb), -1))
    assert np.array_equal(read["16bit.png"][..., 0], (gradient / 257).round())
    assert np.array_equal(read["grey.png"][..., 1], np.asarray(rgb.convert("L")))
    assert np.array_equal(
        read["animated.gif"], np.asarray(rgb.quantize(16).convert("RGB"))
    )  # its first image
    assert np.array_equal(read["palette.png"], np.asarray(rgb.quantize(16).convert("RGB")))
    assert np.array_equal(read["cmyk.tiff"], np.asarray(rgb.convert("CMYK").convert("RGB")))
    assert (read["alpha.png"] == 255).all() and (abs(read["half.png"].astype(int) - 127) <= 1).all()


def test_unreadable_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"text, not an image")
    (tmp_path / "bad.zip").write_bytes(b"text, not an archive")
    np.savez(tmp_path / "float.npz", x=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    np.savez(
        tmp_path / "labels.npz",
        x=np.zeros((2, 4, 4, 3), np.uint8),
        y=np.array([0, 5]),
        classes=np.array(["a"]),
    )
    photo().save(tmp_path / ".hidden.png")
    (tmp_path / "hollow.zip").write_bytes(b"PK\5\6" + bytes(18))  # an archive of no files
    for name, message in (
        ("nowhere", "nowhere"),
        ("empty", "empty"),
        ("bad.zip", "bad.zip"),
        ("float.npz", "float64"),
        ("objects.npz", "objects.npz"),
        ("labels.npz", "labels.npz y"),
        ("hollow.zip", "hollow.zip"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named(*message.split())):
            fid.ImageReader(tmp_path / name)
    with pytest.raises(ValueError, match="broken.png"):
        fid.ImageReader(tmp_path / "bad")[0]


def test_broken_and_hidden_images(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args) or photo().im
    )
    for name, content in (
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\n"),
        ("zero.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
    photo().save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*")
    photo((99, 99)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "large.gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # 99 x 99 are more than twice as many
    names = sorted(os.listdir(tmp_path))
    for hidden in (".hidden.png", ".folder/a.png", "__MACOSX/._a.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / hidden)
    pictures = fid.ImageReader(tmp_path)
    assert [os.path.basename(file) for _, file in pictures.sources] == names
    for i, name in enumerate(names):
        if name == "large.gif":
            assert pictures[i].shape == (1, 1, 3)
        else:
            with pytest.raises(ValueError, match=rf"{re.escape(name)}\W+\w"):
                pictures[i]
    assert not started


# ---------------------------------------------------------------- fid.py: the network


@pytest.fixture(scope="module")
def inception():
    """Inception with random weights and norms that keep the signal at a size of about 1."""
    torch.manual_seed(0)
    net = fid.InceptionV3().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=(1.6 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1)
            module.running_mean.normal_(std=0.1)
            module.weight.uniform_(0.75, 1.25)
    return net


def public_weights(net):
    """The state of the net as the public file holds it, which does not count batches."""
    return {
        name: value
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def test_inception_has_the_keys_and_shapes_of_the_public_weights(inception):
    state = public_weights(inception)
    lines = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in state.items()))
    assert len(state) == 472 and sum(p.numel() for p in inception.parameters()) == 23_850_960
    assert tuple(state["Mixed_7c.branch3x3_2a.conv.weight"].shape) == (384, 384, 1, 3) and tuple(
        state["fc.weight"].shape
    ) == (1008, 2048)
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
    )  # that of pytorch-fid 0.3.0's network


def inception_by_hand(state, x):
    """Features of (B, 3, 299, 299) in [-1, 1] from the public weights, layer by layer."""

    def conv(x, name, stride=1, valid=False):
        weight = state[f"{name}.conv.weight"]
        padding = (0, 0) if valid or stride == 2 else (weight.shape[2] // 2, weight.shape[3] // 2)
        norm = [
            state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(F.conv2d(x, weight, None, stride, padding), *norm, eps=1e-3).relu()

    def chain(x, block, *names, stride=1):
        for name in names:
            x = conv(x, f"Mixed_{block}.{name}", stride if name == names[-1] else 1)
        return x

    def average(x):  # windows at the border are smaller
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", valid=True)
    x = F.max_pool2d(x, 3, 2)
    for block in ("5b", "5c", "5d"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch5x5_1", "branch5x5_2"),
                chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                chain(average(x), block, "branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, "6a", "branch3x3", stride=2),
            chain(x, "6a", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", stride=2),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block in ("6b", "6c", "6d", "6e"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                chain(x, block, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                chain(average(x), block, "branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, "7a", "branch3x3_1", "branch3x3_2", stride=2),
            chain(x, "7a", *(f"branch7x7x3_{i}" for i in range(1, 5)), stride=2),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block, pool in (("7b", average), ("7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single, double = (
            chain(x, block, "branch3x3_1"),
            chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2"),
        )
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(single, block, "branch3x3_2a"),
                chain(single, block, "branch3x3_2b"),
                chain(double, block, "branch3x3dbl_3a"),
                chain(double, block, "branch3x3dbl_3b"),
                chain(pool(x), block, "branch_pool"),
            ],
            1,
        )
    return x.mean((2, 3))


def test_inception_is_the_network_written_down_by_hand(inception):
    x = torch.randint(
        0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = inception_by_hand(public_weights(inception), (x.float() - 128) / 128)
    features, logits = inception(x)
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert (logits - expected @ inception.fc.weight.T).norm() < 1e-5 * logits.norm()


def pooled_by_hand(x, padding, stride, pool):
    """pool over the 3 x 3 windows of (C, H, W), each without what lies outside of the image."""
    height, width = x.shape[1:]
    rows, columns = (range(-padding, size + padding - 2, stride) for size in (height, width))
    return torch.stack(
        [
            torch.stack(
                [pool(x[:, max(i, 0) : i + 3, max(j, 0) : j + 3].flatten(1)) for j in columns], 1
            )
            for i in rows
        ],
        1,
    )


@pytest.mark.parametrize(
    "name, padding, stride, pool",
    [
        *(
            (f"Mixed_{block}", 1, 1, lambda window: window.mean(1))
            for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")
        ),
        ("Mixed_7c", 1, 1, lambda window: window.amax(1)),
        ("Mixed_6a", 0, 2, lambda window: window.amax(1)),
        ("Mixed_7a", 0, 2, lambda window: window.amax(1)),
    ],
)
def test_pooling_of_inception(inception, name, padding, stride, pool):
    block, seen = getattr(inception, name), []
    channels = (
        block.branch3x3
        if name == "Mixed_6a"
        else block.branch3x3_1
        if name == "Mixed_7a"
        else block.branch1x1
    ).conv.in_channels
    x = (
        torch.randn(1, channels, 7, 5) - 1
    )  # below zero mostly: padding with zeros would show in a maximum, too
    with contextlib.ExitStack() as stack:
        if stride == 1:
            stack.callback(
                block.branch_pool.register_forward_pre_hook(
                    lambda module, inputs: seen.append(inputs[0])
                ).remove
            )
        output = block(x)
    expected = pooled_by_hand(x[0], padding, stride, pool)
    assert torch.allclose(seen[0][0] if stride == 1 else output[0, -channels:], expected, atol=1e-6)


def resized_by_loop(picture, out=299):
    """TensorFlow 1's bilinear resize of (H, W), pixel by pixel; coordinates in float32 as there."""
    result = np.zeros((out, out))
    scale = [np.float32(size) / np.float32(out) for size in picture.shape]
    for i in range(out):
        y = np.float32(i) * scale[0]
        top, bottom = int(y), min(int(y) + 1, picture.shape[0] - 1)
        for j in range(out):
            x = np.float32(j) * scale[1]
            left, right = int(x), min(int(x) + 1, picture.shape[1] - 1)
            upper, lower = (
                picture[row, left] + (picture[row, right] - picture[row, left]) * float(x - left)
                for row in (top, bottom)
            )
            result[i, j] = upper + (lower - upper) * float(y - top)
    return result


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (299, 299), (512, 512), (48, 300)])
def test_resize_is_tensorflows(size):
    picture = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(picture)[None, None])[0, 0]
    assert (
        resized.dtype == torch.float32
        and np.abs(resized.numpy() - resized_by_loop(picture.astype(float))).max() < 1e-4
    )


def test_inception_in_float32_folded_and_in_any_batch_is_that_in_float64(inception):
    x = torch.randint(
        0, 256, (3, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    folded = copy.deepcopy(inception).fold()
    with torch.no_grad():
        features, logits = copy.deepcopy(inception).double()(x.double())

        def off(a, b):
            return ((a - b).norm() / b.norm()).item()

        assert (
            features.dtype == float64
            and features.shape == (3, 2048)
            and logits.shape == (3, 1008)
            and features.std(0).mean() > 1e-3
        )
        for net in (inception, folded):
            assert off(net(x)[0], features) < 2e-6 and off(net(x)[1], logits) < 2e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert off(folded(x)[0], features) < 2e-6
        alone = torch.cat([folded(x[i : i + 1])[0] for i in range(3)])
        assert (
            off(alone, folded(x)[0]) < 1e-5
            and (alone - folded(x)[0]).abs().max() < 1e-5 * alone.abs().max()
        )
        many = x.repeat(3 * torch.get_num_threads(), 1, 1, 1)  # more than are computed at once
        assert off(folded(many)[0], alone.repeat(len(many) // 3, 1)) < 1e-5
        assert torch.allclose(features @ inception.fc.weight.double().T, logits)  # without the bias
    assert folded.state_dict().keys() != inception.state_dict().keys() and not any(
        p.requires_grad for p in folded.parameters()
    )


def test_weights_of_others_are_refused_by_name(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(public_weights(inception), tmp_path / "right.pth")
    with open(tmp_path / "right.pth", "rb") as file:
        whole = file.read()
    (tmp_path / "truncated.pth").write_bytes(whole[:-1000])
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    public, digest = "pt_inception-2015-12-05-6726825d.pth", hashlib.sha256(whole).hexdigest()[:8]
    with pytest.raises(ValueError, match=named("right.pth", public, digest)):
        fid.load_inception(tmp_path / "right.pth")
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(whole).hexdigest()[:8])
    net = fid.load_inception(str(tmp_path / "right.pth"))
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.allclose(net(x)[0], inception(x)[0], rtol=1e-4, atol=1e-5)
    for name in ("truncated.pth", "code.pth"):
        with pytest.raises(ValueError, match=named(name, public)):
            fid.load_inception(tmp_path / name)
    monkeypatch.setattr(
        fid, "SHA256", ""
    )  # what is left then: no code is run, and every weight has its place
    with pytest.raises(pickle.UnpicklingError):
        fid.load_inception(tmp_path / "code.pth")
    torch.save(public_weights(inception) | dict(extra=torch.zeros(1)), tmp_path / "more.pth")
    with pytest.raises(RuntimeError, match="extra"):
        fid.load_inception(tmp_path / "more.pth")
    assert not os.path.exists("malicious")
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(whole).hexdigest()[:8])

    def no_network(url, file, prefix, progress):
        raise OSError("no network")

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError) as error:
        fid.load_inception()
    assert (
        fid.WEIGHTS in str(error.value)
        and str(tmp_path / "hub" / "checkpoints") in str(error.value)
        and "\n" not in str(error.value)
    )

    def download(url, file, prefix, progress):
        assert url == fid.WEIGHTS and prefix == fid.SHA256
        shutil.copy(tmp_path / "right.pth", file)

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", download)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])
    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])  # from the cache


class Malicious:
    def __reduce__(self):
        return open, ("malicious", "w")


# ---------------------------------------------------------------- fid.py: statistics


def test_statistics_are_numpys_in_any_batching():
    generator = torch.Generator().manual_seed(0)
    features, logits = (
        3 + torch.randn(103, 7, generator=generator) @ torch.randn(7, 7, generator=generator),
        torch.randn(103, 5, generator=generator),
    )
    splits, found = fid.is_splits(103), []
    for sizes in ((103,), (50, 53), (1,) * 103):
        statistics, other = fid.Statistics(), fid.Statistics()
        for i, rows in enumerate(torch.arange(103).split(sizes)):
            (other if i % 3 else statistics).update(features[rows], logits[rows], splits[rows])
        statistics.merge(other)
        found.append((*statistics.gaussian(), statistics.n, *statistics.inception_score()))
    x = features.double().numpy()
    for mu, sigma, n, *score in found:
        assert (
            n == 103
            and np.abs(mu - x.mean(0)).max() < 1e-12
            and np.abs(sigma - np.cov(x, rowvar=False)).max() < 1e-11
        )
        assert score == pytest.approx(fid.inception_score(logits), rel=1e-12)
    statistics = fid.Statistics()
    statistics.update(features[:1])
    with pytest.raises(ValueError, match=r"\b1\b"):
        statistics.gaussian()
    statistics.update(features * math.nan)
    with pytest.raises(ValueError, match="NaN"):
        statistics.gaussian()


def covariance(dim, rank, seed):
    x = np.random.default_rng(seed).standard_normal((dim, rank)) * np.exp(-np.linspace(0, 3, rank))
    return x @ x.T


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    mu, delta, (q, _) = (
        rng.standard_normal(30),
        rng.standard_normal(30),
        np.linalg.qr(rng.standard_normal((30, 30))),
    )
    for rank in (30, 11, 0):
        sigma = covariance(30, rank, 1)
        assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(
            0, abs=1e-12 * (1 + np.trace(sigma))
        )
        assert fid.frechet_distance(mu, sigma, mu + delta, sigma) == pytest.approx(
            delta @ delta, rel=1e-12
        )
        assert fid.frechet_distance(mu, sigma, mu, 0 * sigma) == pytest.approx(
            np.trace(sigma), rel=1e-12
        )
        a, b = rng.uniform(0, 2, 30), rng.uniform(0, 2, 30)
        a[rank:], b[: 30 - rank] = (
            0,
            0,
        )  # covariances that commute: sum (sqrt a - sqrt b)^2, also where both are singular in part
        expected = ((a**0.5 - b**0.5) ** 2).sum()
        assert fid.frechet_distance(mu, q * a @ q.T, mu, q * b @ q.T) == pytest.approx(
            expected, rel=1e-6
        )
    for bad in (
        (mu[:3], sigma, mu, sigma),
        (mu[:3], sigma[:3, :3], mu, sigma),
        (mu * math.nan, sigma, mu, sigma),
        (mu, sigma, mu, sigma + math.inf),
    ):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


@pytest.mark.parametrize(
    "ranks",
    [(60, 60, 60), (60, 60, 20), (60, 20, 60), (60, 20, 35), (200, 150, 200), (200, 70, 130)],
)  # 200: Cholesky's in blocks
def test_frechet_distance_is_that_with_sqrtm(ranks):
    dim, *ranks = ranks
    a, b = (covariance(dim, rank, seed) for seed, rank in enumerate(ranks))
    distance = fid.frechet_distance(np.zeros(dim), a, np.ones(dim), b)
    root = scipy.linalg.sqrtm(a @ b)  # complex by rounding where a covariance is singular
    assert isinstance(distance, float) and distance == pytest.approx(
        dim + np.trace(a) + np.trace(b) - 2 * np.trace(root).real, rel=1e-6
    )
    assert distance == fid.frechet_distance(torch.zeros(dim), torch.from_numpy(a), np.ones(dim), b)


def test_inception_score_of_known_distributions():
    assert fid.inception_score(torch.randn(1, 9).repeat(200, 1)) == pytest.approx(
        (1, 0), abs=1e-9
    )  # no image tells anything
    label, split = torch.arange(1000) % 5, fid.is_splits(1000)
    shares = (
        torch.stack([label[split == i].bincount(minlength=5) for i in range(10)]) / 100
    )  # five classes, each sure: exp of the entropy of the shares
    scores = torch.exp(-torch.xlogy(shares, shares).sum(1))
    assert (
        fid.inception_score(1e4 * torch.eye(5)[label])
        == pytest.approx((scores.mean().item(), scores.std(correction=0).item()), rel=1e-5)
        and scores.mean() > 4.9
    )
    logits, scores = torch.randn(105, 6, generator=torch.Generator().manual_seed(0)), []
    for i in range(10):  # as the definition goes
        p = (
            logits.double()
            .softmax(1)
            .numpy()[np.random.RandomState(2020).permutation(105)][
                i * 105 // 10 : (i + 1) * 105 // 10
            ]
        )
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert fid.inception_score(logits) == pytest.approx(
        (np.mean(scores), np.std(scores)), rel=1e-12
    )
    assert fid.inception_score(logits + 1000) == pytest.approx(
        fid.inception_score(logits), rel=1e-4
    )  # stable


def test_precision_and_recall_of_known_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    inner = torch.cartesian_prod(torch.arange(2.0, 7), torch.arange(2.0, 7)) + 0.25
    assert fid.precision_recall(grid, grid) == (1, 1) and fid.precision_recall(
        grid, grid + 100
    ) == (0, 0)
    # Third neighbors of a square grid are at 1, at the corners at sqrt 2: the inner set lies in the
    # outer one, and covers what is within.
    covered = (torch.cdist(grid, inner) <= torch.cdist(inner, inner).sort(1).values[:, 3]).any(1)
    assert (
        fid.precision_recall(grid, inner, block=7) == (1, covered.double().mean().item())
        and 0.25 <= covered.double().mean() < 0.5
    )
    assert fid.precision_recall(inner, grid, block=1000)[::-1] == fid.precision_recall(grid, inner)
    line = torch.tensor([[0.0], [1], [3], [6], [10]])  # to the third neighbors: 6, 5, 3, 5, 9
    assert fid.precision_recall(line, torch.tensor([[-6.0], [-6.5], [19], [19.5]])) == (0.5, 1)
    with pytest.raises(ValueError, match=r"\b100\b.*\b3\b"):
        fid.precision_recall(grid, grid[:3])


class Colors(nn.Module):
    """Features and logits of an image that need no weights: moments of its colors."""

    def forward(self, x):
        x = x.double() / 255
        features = torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, ::2, ::2].mean((2, 3))], 1)
        return features, 5 * features[:, :4]


class Plain(Colors):
    """Features without logits, of any shape."""

    def forward(self, x):
        return super().forward(x)[0].float()[:, :, None, None]


def measured(*args):
    """What fid.main prints, line by line."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as progress,
    ):
        fid.main([*map(str, args)])
    return out.getvalue().splitlines(), progress.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Forty images as a folder, zip, npz and npy file, and thirty others."""
    folder = tmp_path_factory.mktemp("sets")
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 10, 3), np.uint8)
    y = np.random.default_rng(1).integers(60, 200, (30, 12, 10, 3), np.uint8)
    for i, picture in enumerate(x):
        path = folder / "real" / str(i % 3) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    with zipfile.ZipFile(folder / "real.zip", "w") as file:
        for path in (folder / "real").rglob("*.png"):
            file.write(path, path.name)
    np.savez(folder / "real.npz", arr_0=x)
    np.save(folder / "real.npy", x)
    np.savez(folder / "fake.npz", arr_0=y)
    return folder


def test_fid_command_on_every_kind_of_data(sets, tmp_path):
    x, y = np.load(sets / "real.npy"), np.load(sets / "fake.npz")["arr_0"]
    features = [Colors()(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in (x, y)]
    gaussians = [(f.numpy().mean(0), np.cov(f.numpy(), rowvar=False)) for f, _ in features]
    distance = fid.frechet_distance(*gaussians[0], *gaussians[1])
    for real in ("real", "real.zip", "real.npz", "real.npy"):
        lines, progress = measured(
            sets / real,
            sets / "fake.npz",
            "--features",
            "test_all:Colors",
            "--pr",
            "--batch",
            7,
            "--save-stats",
            tmp_path / f"{real}.stats.npz",
        )
        assert f"{real}.stats.npz" in lines.pop(1)
        for line, path, n in ((lines[0], sets / real, 40), (lines[1], sets / "fake.npz", 30)):
            assert line.startswith(f"{path}: ") and line.endswith(f"N = {n}")
        assert re.search(r"\b40\b\D+\b40\b", progress)
        assert lines[2].startswith(f"FD-Colors {distance:.4f} ")
        assert re.search(named(sets / "fake.npz", sets / real), lines[2]) and "10,000" in lines[3]
        score = fid.inception_score(features[1][1])
        assert re.match(r"IS-Colors {:.4f}\D+{:.4f}\b".format(*score), lines[4])
        pair = fid.precision_recall(features[0][0].float(), features[1][0].float())
        assert re.match(r"precision {:.4f}\D+recall {:.4f}\D+3\D+40\D+30\b".format(*pair), lines[5])
        with np.load(tmp_path / f"{real}.stats.npz") as data:
            assert (
                np.abs(data["mu"] - gaussians[0][0]).max() < 1e-9
                and np.abs(data["sigma"] - gaussians[0][1]).max() < 1e-9
                and data["n"] == 40
            )
    assert measured(
        tmp_path / "real.stats.npz", sets / "fake.npz", "--features", "test_all:Colors"
    )[0][1:3] == [
        lines[1],
        lines[2].replace(str(sets / "real.npy"), str(tmp_path / "real.stats.npz")),
    ]
    lines, _ = measured(
        tmp_path / "real.stats.npz", tmp_path / "real.zip.stats.npz"
    )  # needs no network, and knows which it was
    assert (
        lines[2].startswith("FD-Colors 0.0000")
        and re.search(named("Inception", tmp_path / "real.zip.stats.npz"), lines[4])
        and len(lines) == 5
    )
    lines, _ = measured(sets / "real", sets / "fake.npz", "--features", "test_all:Plain")
    assert lines[2].startswith(f"FD-Plain {distance:.4f}") and len(lines) == 4
    only, _ = measured(
        sets / "real", "--features", "test_all:Plain", "--save-stats", tmp_path / "only.npz"
    )
    assert len(only) == 2 and "only.npz" in only[1]


def test_fid_reads_mu_and_sigma_of_others_and_prefers_them(sets, tmp_path, inception, monkeypatch):
    torch.save(public_weights(inception), tmp_path / "weights.pth")
    monkeypatch.setattr(fid, "SHA256", "")
    weights = ["--weights", tmp_path / "weights.pth"]
    small = tmp_path / "small.npz"
    np.savez(small, arr_0=np.load(sets / "fake.npz")["arr_0"][:5])
    np.savez(
        tmp_path / "other.npz",
        mu=np.zeros(2048),
        sigma=np.zeros((2048, 2048)),
        arr_0=np.load(sets / "real.npz")["arr_0"][:6],
    )
    lines, _ = measured(tmp_path / "other.npz", small, *weights, "--pr", "--selftest")
    features = fid.extract(
        fid.load_inception(tmp_path / "weights.pth"),
        torch.from_numpy(np.load(small)["arr_0"]).permute(0, 3, 1, 2),
    )[0].double()
    expected = (features.mean(0) ** 2).sum() + features.var(
        0
    ).sum()  # against a point at the origin
    assert re.match(rf"{tmp_path / 'other.npz'}: .*\bmu\b.*\bsigma\b.*N = \D+$", lines[0])
    assert lines[2].startswith("FID ") and float(lines[2].split()[1]) == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert (
        "3.1508" in lines[3]
        and lines[5].startswith("Inception Score 1.0")
        and re.search(r"\b6\b\D+\b5\b", lines[6])
    )
    (tmp_path / "mixed").mkdir()
    for i, size in enumerate(((20, 16), (16, 20), (20, 16))):
        photo(size, i).save(tmp_path / "mixed" / f"{i}.png")
    np.savez(tmp_path / "alike.npz", arr_0=np.stack([photo((20, 16), i) for i in (0, 2)]))
    statistics = [
        fid.measure(
            fid.ImageReader(tmp_path / name),
            fid.load_inception(tmp_path / "weights.pth"),
            keep=True,
        )
        for name in ("mixed", "alike.npz")
    ]
    mixed, alike = (torch.cat(part.kept) for part in statistics)
    order = torch.cdist(alike, mixed).argmin(1)
    assert (mixed[order] - alike).norm() < 1e-5 * alike.norm() and torch.cdist(
        mixed, mixed
    ).fill_diagonal_(1).min() > 1e-2
    mixed, alike = (
        fid.measure(fid.ImageReader(tmp_path / name), Colors()).moments
        for name in ("mixed", "alike.npz")
    )  # other networks get them as they are
    other = fid.Statistics()
    other.update(Colors()(torch.from_numpy(np.array(photo((16, 20), 1))).permute(2, 0, 1)[None])[0])
    assert torch.allclose(mixed, alike + other.moments)


def test_fid_of_images_resized_as_for_training(sets, tmp_path):
    options = ["--features", "test_all:Colors", "--save-stats"]
    measured(sets / "real", "--res", 8, *options, tmp_path / "a.npz")
    x, _ = load_batch(ImageData([sets / "real"], 8), range(40))
    np.savez(tmp_path / "small.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    measured(tmp_path / "small.npz", *options, tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert all(np.abs(a[key] - b[key]).max() < 1e-12 for key in ("mu", "sigma", "n"))


def test_bad_images_stop_fid_or_are_skipped_and_counted(sets, tmp_path):
    shutil.copytree(sets / "real", tmp_path / "real")
    (tmp_path / "real" / "broken.png").write_bytes(b"text, not an image")
    (tmp_path / "real" / "empty.jpg").write_bytes(b"")
    options = ["--features", "test_all:Colors", "--batch", 9]
    with pytest.raises(ValueError, match="broken.png"):
        measured(tmp_path / "real", sets / "fake.npz", *options)
    lines, progress = measured(tmp_path / "real", sets / "fake.npz", *options, "--skip-bad")
    assert (
        re.search(r"N = 40\D+2\b", lines[0])
        and "broken.png" in progress
        and "empty.jpg" in progress
    )
    assert (
        lines[2].split()[1] == measured(sets / "real", sets / "fake.npz", *options)[0][2].split()[1]
    )


def test_bad_input_of_fid(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, math.nan), sigma=np.eye(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3), features="test_all:Colors")
    np.savez(tmp_path / "pickled.npz", mu=np.array([Malicious()], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 and no archive")
    np.savez(tmp_path / "keys.npz", other=np.zeros(1))
    np.savez(
        tmp_path / "both.npz",
        mu=np.zeros(3),
        sigma=np.eye(3),
        arr_0=np.zeros((2, 8, 8, 3), np.uint8),
    )
    real, colors = str(sets / "real.npz"), ["--features", "test_all:Colors"]
    for args, expected in (
        ([tmp_path / "nan.npz", real], "nan.npz NaN"),
        ([tmp_path / "shape.npz", real], "shape.npz mu (3,)"),
        (
            [tmp_path / "three.npz", real],
            "three.npz test_all:Colors Inception-2015-12-05",
        ),
        ([tmp_path / "pickled.npz", real], "pickled.npz"),
        ([tmp_path / "three.npz", real, "--pr", *colors], "--pr three.npz"),
        ([tmp_path / "three.npz", real, *colors], "3 9"),
        (
            [tmp_path / "one.npz", real, *colors],
            "one.npz 1",
        ),
        ([tmp_path / "broken.npz", real, *colors], "broken.npz"),
        ([tmp_path / "nowhere", real, *colors], "nowhere"),
        ([real], "--save-stats"),
        ([real, real, "--features", "test_all:None"], "test_all:None"),
        ([real, real, "--features", "nowhere:Net"], "nowhere"),
        ([real, tmp_path / "nowhere"], "nowhere"),
        ([real, real, "--batch", 0], "--batch"),
        ([real, "--save-stats", "stats"], "--save-stats stats .npz"),
        ([real, "--save-stats", real], "--save-stats real.npz"),
        ([real, "--save-stats", tmp_path / "both.npz"], "--save-stats both.npz"),
        ([real, "--save-stats", "nowhere/stats.npz"], "nowhere/stats.npz"),
        ([tmp_path / "keys.npz", real], "keys.npz other"),
        ([real, real, "--selftest", *colors], "--selftest"),
        ([real, real, "--weights", tmp_path / "nowhere.pth"], "nowhere.pth"),
        ([real, real, "--weights", real], "real.npz pt_inception-2015-12-05-6726825d.pth"),
        ([real, real, "--device", "cuda"], "--device cuda"),
        ([real, real, "--sigma"], "--sigma"),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            measured(*args)
        assert re.search(named(*expected.split()), str(error.value)), args
    assert not os.path.exists("malicious")
    for args, expected in (
        ([tmp_path / "nan.npz", real], "fid.py nan.npz"),
        ([real, real, "--batch", "x"], "--batch"),
    ):
        result = command(f"{HERE}/fid.py", *map(str, args), cwd=tmp_path)
        assert (
            result.returncode != 0
            and len(result.stderr.strip().splitlines()) == 1
            and re.search(named(*expected.split()), result.stderr)
        ), result.stderr


class ResNet56(nn.Module):
    """The 64 features of a CIFAR-10 classifier (arXiv 1512.03385, shortcuts A).

    The weights are those in ../shared/data; it is called as fid.InceptionV3 is.
    """

    weights = os.path.join(HERE, "..", "shared", "data", "resnet56-4bfd9763.th")

    def __init__(self):
        super().__init__()
        state = torch.load(self.weights, map_location="cpu", weights_only=True)["state_dict"]
        self.state = {name.removeprefix("module."): value for name, value in state.items()}

    def conv(self, x, name, number, stride=1):
        norm = [
            self.state[f"{name}bn{number}.{key}"]
            for key in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(
            F.conv2d(x, self.state[f"{name}conv{number}.weight"], None, stride, 1), *norm
        )

    def forward(self, x):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        x = self.conv(
            ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last), "", 1
        ).relu()
        for layer in (1, 2, 3):
            for block in range(9):
                name, stride = f"layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1
                shortcut = (
                    F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                    if stride == 2
                    else x
                )
                x = (self.conv(self.conv(x, name, 1, stride).relu(), name, 2) + shortcut).relu()
        features = x.mean((2, 3))
        return features, F.linear(features, self.state["linear.weight"], self.state["linear.bias"])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists(ResNet56.weights),
    reason="the weights of ResNet-56 are not in ../shared/data",
)
def test_distance_in_features_of_resnet56_rises_with_noise(tmp_path):
    folder, n = os.path.dirname(ResNet56.weights), 1000
    test, labels = (np.load(f"{folder}/cifar10_test.npz")[key][:n] for key in ("x", "y"))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", arr_0=test)
    measured(
        tmp_path / "test.npz",
        "--features",
        "test_all:ResNet56",
        "--save-stats",
        tmp_path / "stats.npz",
        "--batch",
        200,
    )
    np.savez(tmp_path / "train.npz", arr_0=np.load(f"{folder}/cifar10_train_0of3.npz")["x"][:n])
    for std in (5, 10, 20):
        np.savez(
            tmp_path / f"{std}.npz",
            arr_0=(test + std * rng.standard_normal(test.shape))
            .round()
            .clip(0, 255)
            .astype(np.uint8),
        )
    found = []
    for name in ("train", "5", "10", "20"):
        lines, _ = measured(
            tmp_path / "stats.npz",
            tmp_path / f"{name}.npz",
            "--features",
            "test_all:ResNet56",
            "--batch",
            200,
        )
        assert lines[2].startswith("FD-ResNet56 ") and lines[4].startswith("IS-ResNet56 ")
        found.append(float(lines[2].split()[1]))
    print(
        f"FD-ResNet56 of 1,000 test images: against 1,000 training ones {found[0]}, "
        f"against themselves with noise of 5, 10, 20 gray levels {found[1:]}"
    )
    assert 0 < found[0] < found[1] < found[2] < found[3]
    with torch.no_grad():
        logits = ResNet56()(torch.from_numpy(test[:500]).permute(0, 3, 1, 2))[1]
    assert (
        logits.argmax(1).numpy() == labels[:500]
    ).mean() > 0.9  # it is the network that it should be


# ---------------------------------------------------------------- train.py: data


def test_shapes_follow_from_their_index():
    small, large = Shapes(32), Shapes(64)
    x, label = load_batch(small, range(40))
    assert (
        x.dtype == torch.uint8
        and x.shape == (40, 3, 32, 32)
        and label.tolist() == [i % 10 for i in range(40)]
    )
    assert torch.equal(x[7:9], load_batch(small, [7, 8])[0])  # whatever the batch
    assert torch.equal(load_batch(Shapes(32, first=30), range(10))[0], x[30:])
    assert len(torch.unique(x.flatten(1), dim=0)) == 40
    pooled = F.avg_pool2d(
        load_batch(large, range(40))[0].float(), 2
    )  # the same image at any resolution
    assert (pooled - x.float()).abs().mean() < 4
    assert load_batch(Shapes((32, 48)), range(2))[0].shape == (2, 3, 32, 48)


def test_image_data_crops_and_resizes(tmp_path):
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200  # the central square
    wide[:, 20:30, 0] = 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "tall.jpg", quality=100)
    data = ImageData([tmp_path], 10)
    x, label = load_batch(data, [1])
    assert (
        x.shape == (1, 3, 10, 10)
        and x.dtype == torch.uint8
        and label.tolist() == [0]
        and data.classes == []
    )
    assert (x[0, 1, :, 2:8] == 200).all() and (
        x[0, 0, :, 3] - 100.0
    ).abs().max() < 10  # column 3 of 10 was 22 to 26
    turned = load_batch(data, [0])[0][0].mT  # the tall one, through JPEG and its draft mode
    assert (turned - x[0].float()).abs().mean() < 4


def test_every_epoch_sees_each_image_once_for_any_split():
    parts = [range(0, 3), range(3, 6)]

    def seen(parts, images, n):
        stream = image_order(10, 5, 6, images, parts)
        return [next(stream) for _ in range(n)]

    whole = sum(seen([range(6)], 0, 5), [])
    assert (
        sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10)) and whole[:10] != whole[10:20]
    )
    assert sum(seen(parts, 0, 10), []) == whole
    assert sum(seen([range(6)], 18, 2), []) == whole[18:]  # resumed after 18


def test_seeds_differ():
    tuples = [(), (0,), (0, 0), (0, 0, 0), (5,), (5, 0), (0, 5), (0, 5, 0), (1, 5), (5, 1)]
    assert len({sampling.mix_seed(*integers) for integers in tuples}) == len(tuples)


def test_example_noise_is_that_of_its_place_in_the_batch():
    u, eps = example_noise(0, 3, range(4), (3, 8, 8), "cpu")
    u2, eps2 = example_noise(0, 3, range(2, 4), (3, 8, 8), "cpu")
    assert torch.equal(u[2:], u2) and torch.equal(eps[2:], eps2) and len(u.unique()) == 12
    assert not torch.equal(eps, example_noise(0, 4, range(4), (3, 8, 8), "cpu")[1])


# ---------------------------------------------------------------- train.py: training


@pytest.mark.slow
def test_every_recipe_builds_and_tiny_is_tiny():
    limits = dict(tiny=(1, 4), small=(55, 105), base=(300, 500), paper=(900, 2600))
    for model, sizes in RECIPES.items():
        assert list(sizes) == ["tiny", "small", "base", "paper"] + ["text"] * (model == "uvit")
        for size, by_res in sizes.items():
            if size == "text":
                continue  # see test_text_recipes
            assert (model, size) in TRAINING and list(by_res) == (
                [128, 256, 512]
                if size == "paper"
                else [4, 8, 16] * ((model, size) == ("uvit", "tiny")) + [32, 64, 128, 256, 512]
            )
            for res, fields in by_res.items():
                with torch.device("meta"):
                    net = build_net(model, dict(fields, res=res, num_classes=1000))
                    assert net(torch.empty(2, 3, res, res), torch.empty(2)).shape == (
                        2,
                        3,
                        res,
                        res,
                    )
                assert (
                    net.stem.conv.out_channels
                    > 3 * unet.PATCHING[fields.get("patching", "none")] ** 2
                )  # v holds the noise, which must get through
                millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
                assert limits[size][0] <= millions <= limits[size][1], (model, size, res, millions)
    for name, model, res in (
        ("U-Net 128", "unet", 128),
        ("U-Net 256", "unet", 256),
        ("U-Net 512 dwt_2", "unet", 512),
        ("U-ViT L 128", "uvit", 128),
        ("U-ViT L 256", "uvit", 256),
        ("U-ViT L 512", "uvit", 512),
    ):
        net_class, config = {"unet": (UNet, unet.CONFIGS), "uvit": (UViT, uvit.CONFIGS)}[model]
        with torch.device("meta"):
            published, ours = (
                net_class(**config[name]),
                net_class(**RECIPES[model]["paper"][res], res=res),
            )
        assert [p.shape for p in published.parameters()] == [p.shape for p in ours.parameters()]


def test_learning_rate():
    def rate(step, decay):
        return train.learning_rate(step, 2.0, 4, decay, 30)

    assert [rate(step, 0) for step in (0, 1, 3, 4, 29)] == [0.5, 1, 2, 2, 2]
    assert [rate(step, 0.5) for step in (10, 15, 20, 27)] == pytest.approx([2, 2, 4 / 3, 0.4])


def test_ema_is_the_written_out_formula():
    net, ema = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    net[1].running_mean += 1
    expected = [
        0.9 * e.detach() + 0.1 * n.detach() for e, n in zip(ema.parameters(), net.parameters())
    ]
    train.ema_update(ema, net, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ema.parameters(), expected))
    assert torch.equal(ema[1].running_mean, torch.ones(2))  # what is not a weight is copied


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_overfits_eight_images_in_every_bin_of_logsnr(index):
    torch.manual_seed(0)
    net = tiny_nets(base_channels=32, emb_channels=64)[index]
    x, label = load_batch(Shapes(16), range(8))
    x, label, schedule = x.float() / 127.5 - 1, label % 3, make_schedule("cosine", 16)

    def by_bin():
        torch.manual_seed(1)
        with torch.no_grad():
            return torch.stack(
                [
                    diffusion_loss(
                        net,
                        x.repeat(8, 1, 1, 1),
                        lambda t, low=low: low + 2 * t,
                        label.repeat(8),
                        space="v",
                    )[0].mean()
                    for low in range(-6, 6, 2)
                ]
            )

    before = by_bin()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        diffusion_loss(net, x.repeat(4, 1, 1, 1), schedule, label.repeat(4), space="v")[
            0
        ].mean().backward()
        optimizer.step()
    after = by_bin()
    assert (after < 0.7 * before).all() and after.mean() < 0.4 * before.mean(), (before, after)


TINY_RUN = [
    "--batch",
    "8",
    "--log-every",
    "2",
    "--save-every",
    "4",
    "--no-bf16",
    "--lr",
    "1e-3",
    "--warmup",
    "2",
    "--model-args",
    json.dumps(
        dict(base_channels=8, emb_channels=16, channel_multiplier=[1, 2], num_transformer_blocks=1)
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six tiny steps on shapes."""
    out = str(tmp_path_factory.mktemp("run") / "shapes")
    train.main([*TINY_RUN, "--steps", "6", "--out", out])
    return out


def test_a_run_leaves_log_samples_and_checkpoints(run):
    assert sorted(os.listdir(run)) == [
        "ckpt_0000004.pt",
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ]
    assert json.loads(content_of(f"{run}/config.json"))["classes"] == Shapes.classes
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[-1]["images"] == 48
    assert all(
        math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["loss_by_logsnr"]
        for line in lines
    )
    assert Image.open(f"{run}/samples_0000006.png").size == (10 * 34 - 2, 6 * 34 - 2)
    net, config, schedule = load(run)
    assert config["steps"] == 6 and schedule(torch.tensor(0.5)).abs() < 1e-5 and not net.training
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    assert all(torch.equal(value, state["ema"][name]) for name, value in net.state_dict().items())
    assert any(
        not torch.equal(value, state["net"][name]) for name, value in net.state_dict().items()
    )


@pytest.mark.parametrize("shape", [(256, 64, 128), (1024, 256, 1024), (4, 64, 32, 64)])
def test_float32_products_are_float32_after_what_train_sets(run, shape):
    *batch, m, k, n = shape
    torch.manual_seed(0)
    a, b, c = torch.randn(*batch, m, k), torch.randn(*batch, n, k), torch.randn(*batch, m, n)
    for x, y in ((a, b.mT), (c, b), (c.mT, a)):  # a product, and those of its gradients
        exact = x.double() @ y.double()
        assert (
            x @ y - exact
        ).norm() < 1e-6 * exact.norm()  # bf16 and TF32 inside would be off by 1e-3


def test_resumed_is_uninterrupted_bitwise(run, tmp_path, capsys):
    out = str(tmp_path / "part")
    train.main([*TINY_RUN, "--steps", "6", "--out", out])
    os.remove(f"{out}/ckpt_0000006.pt")
    train.main(["--out", out])  # everything else is in the run
    assert resumed_at(capsys.readouterr().out) == [4]
    whole, part = (load_checkpoint(f"{folder}/ckpt_0000006.pt") for folder in (run, out))
    for key in ("net", "ema"):
        assert all(torch.equal(whole[key][name], part[key][name]) for name in whole[key])


OPTIONS = [
    ["--model", "unet", "--space", "eps", "--schedule", "shifted:16"],
    [
        "--res",
        "64",
        "--multiscale",
        "--schedule",
        "interpolated:16:64",
        "--model-args",
        '{"patching": "dwt_2", "num_transformer_blocks": 1}',
    ],
    [
        "--micro",
        "4",
        "--decay",
        "0.5",
        "--ema",
        "0.5",
        "--flip",
        "--label-drop",
        "1",
        "--seed",
        "3",
        "--size",
        "tiny",
    ],
    ["--bf16", "--device", "cpu"],
    [
        "--compile",
        "--model-args",
        '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
        '"num_res_blocks": [1], "num_transformer_blocks": 1}',
    ],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_of_train(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(
        train,
        "sample_batches",
        lambda *args, **settings: sampling.sample_batches(*args, **settings | dict(steps=2)),
    )  # 64 take a minute in all
    base = TINY_RUN[:-2] if "--model" in options or "--model-args" in options else TINY_RUN
    train.main(
        [
            *base,
            "--steps",
            "2",
            "--sample-every",
            "1",
            "--save-every",
            "1",
            "--keep",
            "1",
            "--out",
            str(tmp_path / "run"),
            *options,
        ]
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        "ckpt_0000002.pt",
        "config.json",
        "log.jsonl",
        "samples_0000001.png",
        "samples_0000002.png",
    ]
    assert math.isfinite(log_lines(tmp_path / "run")[0]["loss"])
    load(tmp_path / "run")  # compiled or not, the names of the weights are the net's
    assert (
        shutil.which(os.environ.get("CXX", "g++")) is None
        or "--compile" not in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--flip"],
        ["--label-drop", "1"],
        ["--seed", "3"],
        ["--space", "eps"],
        ["--schedule", "shifted:16"],
    ],
    ids=" ".join,
)
def test_options_reach_the_gradient(run, tmp_path, monkeypatch, options):
    plain, other = (
        gradients_of_a_step(run, tmp_path / name, args, monkeypatch)
        for name, args in (("plain", []), ("other", options))
    )
    assert (plain - other).norm() > 1e-3 * plain.norm()


class Foreign(nn.Module):
    """Somebody else's net."""

    def __init__(self, res, num_classes, width=4):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, z, logsnr, label=None):
        return self.conv(
            torch.cat([z, logsnr[:, None, None, None].expand(-1, 1, *z.shape[2:]) / 15], 1)
        )


def foreign_loss(net, x, schedule, label=None, *, t=None, eps=None):
    loss, logsnr = diffusion_loss(net, x, schedule, label, t=t, eps=eps)
    return 0 * loss + 7, logsnr


def test_a_foreign_net_and_loss_train_resume_and_sample(tmp_path):
    out = str(tmp_path / "run")
    options = [
        "--out",
        out,
        "--model",
        "test_all:Foreign",
        "--batch",
        "4",
        "--save-every",
        "1",
        "--log-every",
        "1",
        "--no-bf16",
    ]
    train.main(
        [
            *options,
            "--loss",
            "test_all:foreign_loss",
            "--model-args",
            '{"width": 8}',
            "--steps",
            "1",
        ]
    )
    with pytest.raises(ValueError, match=named("--loss", "test_all:foreign_loss")):
        train.main([*options, "--steps", "2"])
    train.main([*options, "--loss", "test_all:foreign_loss", "--steps", "2"])
    assert [line["loss"] for line in log_lines(out)] == [7, 7]
    sampling.main(
        [
            out,
            "--model",
            "test_all:Foreign",
            "--n",
            "2",
            "--steps",
            "2",
            "--sampler",
            "dpmpp",
            "--device",
            "cpu",
            "--bf16",
            "--out",
            f"{tmp_path}/new/grid.png",
        ]
    )
    assert Image.open(tmp_path / "new" / "grid.png").size == (10 * 34 - 2, 32)
    with pytest.raises(ValueError, match=named("--model", "test_all:Foreign")):
        load(out)
    state = load_checkpoint(f"{out}/ckpt_0000002.pt")
    assert torch.equal(state["net"]["conv.1.running_mean"], state["ema"]["conv.1.running_mean"])


def no_grid(monkeypatch):
    """Saves the time of grids that nobody looks at."""
    monkeypatch.setattr(
        train,
        "sample_batches",
        lambda *args, **options: [(0, torch.zeros(60, 8, 8, 3, dtype=torch.uint8))],
    )


def gradients_of_a_step(run, out, options, monkeypatch):
    """The gradients of step 5 of the run, taken in its copy `out` with other options."""
    found = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, limit: clip(
            [found.append(p.grad.clone()) or p for p in parameters], limit
        ),
    )
    no_grid(monkeypatch)
    os.makedirs(out)
    shutil.copy(f"{run}/ckpt_0000004.pt", out)
    train.main(["--out", str(out), "--steps", "5", *options])
    return torch.cat([gradient.flatten() for gradient in found])


def test_micro_steps_are_one_batch(run, tmp_path, monkeypatch):
    whole = gradients_of_a_step(run, tmp_path / "whole", [], monkeypatch)
    parts = gradients_of_a_step(run, tmp_path / "parts", ["--micro", "2"], monkeypatch)
    assert whole.abs().max() > 0 and (whole - parts).norm() < 1e-5 * whole.norm()


def stopped(monkeypatch, name, number, call):
    """Lets train's function send this process a signal at its call-th call, then do its work."""
    function, calls = getattr(train, name), []

    def signaling(*args, **options):
        calls.append(1)
        if len(calls) == call:
            for _ in range(2 if number == signal.SIGTERM else 1):  # a scheduler's and torchrun's
                os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(train, name, signaling)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_after_the_step_and_nothing_is_lost(
    run, tmp_path, monkeypatch, capsys, number
):
    out, before = str(tmp_path / "run"), signal.getsignal(number)
    stopped(monkeypatch, "ema_update", number, call=3)
    with pytest.raises(SystemExit) as error:
        train.main([*TINY_RUN, "--steps", "6", "--out", out])
    assert (
        error.value.code == 128 + number
        and re.search(rf"(?m)^(?=.*{number.name}).*\bstep 3\b", capsys.readouterr().out)
        and signal.getsignal(number) is before
    )
    assert sorted(os.listdir(out)) == ["ckpt_0000003.pt", "config.json", "log.jsonl"]
    train.main(["--out", out])
    whole, part = (load_checkpoint(folder) for folder in (run, out))
    assert part["step"] == 6 and all(
        torch.equal(whole["ema"][name], part["ema"][name]) for name in whole["ema"]
    )


def test_a_signal_does_not_wait_for_a_grid(tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped(monkeypatch, "sample_batches", signal.SIGTERM, call=1)
    with pytest.raises(SystemExit):
        train.main([*TINY_RUN, "--steps", "6", "--sample-every", "1", "--out", str(out)])
    assert (
        sorted(os.listdir(out)) == ["ckpt_0000001.pt", "config.json", "log.jsonl"]
        and last_step(out) == 0
    )  # the first line is that of step 2
    no_grid(monkeypatch)
    train.main(["--out", str(out), "--steps", "1"])
    assert sorted(os.listdir(out)) == [
        "ckpt_0000001.pt",
        "config.json",
        "log.jsonl",
        "samples_0000001.png",
    ]


def test_a_broken_checkpoint_is_passed_over(run, tmp_path, monkeypatch, capsys):
    no_grid(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    newest = out / "ckpt_0000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert load_checkpoint(out)["step"] == 4 and "ckpt_0000006.pt" in capsys.readouterr().err
    train.main(["--out", str(out), "--steps", "5", "--keep", "1"])
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_0000005.pt",
        "ckpt_0000006.pt",
    ]  # a later one is not counted among the kept
    assert [line["step"] for line in log_lines(out)] == [2, 4, 5]
    train.main(["--out", str(out), "--steps", "6", "--keep", "3"])
    assert 4 in resumed_at(capsys.readouterr().out) and load_checkpoint(newest)["step"] == 6
    for path in out.glob("ckpt_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="ckpt_0000005.pt"):
        train.main(["--out", str(out)])


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with pytest.raises(ValueError, match=named("step 6", "ckpt_0000004.pt")):
        train.main(["--out", str(tmp_path), "--lr", "1e30", "--steps", "8"])
    assert [path.name for path in tmp_path.glob("ckpt*")] == ["ckpt_0000004.pt"]


def test_tensorboard(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it was not installed
        with pytest.raises(ValueError, match="--tensorboard"):
            train.main(["--out", str(tmp_path), "--tensorboard"])
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip(
            "what it writes is read back where tensorboard is installed; "
            "the message without it was tested"
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(["--out", str(tmp_path), "--tensorboard"])
    events = EventAccumulator(str(tmp_path)).Reload()
    line = log_lines(tmp_path)[0]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (6, pytest.approx(line["loss"]))
    ]
    assert [event.step for event in events.Images("samples")] == [6]


def test_a_run_with_other_classes_is_not_resumed(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    with pytest.raises(ValueError, match=named(tmp_path, Shapes.classes[0])):
        train.main(["--out", str(tmp_path), "--data", str(tmp_path / "data.npz")])


# ------------------------------------------------------- several processes, as torchrun starts them


def start(*args, cwd, **options):
    """A started command; whoever asks for it ends it."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def torchrun(*args, cwd, ranks=2, restarts=0, **options):
    return start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        "--max-restarts",
        restarts,
        *args,
        cwd=cwd,
        **options,
    )


def last_step(out):
    """The last step in a run's log, 0 without any."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads(content_of(f"{out}/log.jsonl").splitlines()[-1])["step"]
    return 0


def wait_for(condition, process, seconds=300):
    """Waits until the condition holds, or the process ends, or time is up."""
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.0005)


def processes_with(text):
    """The ids of all processes whose command line has this text in it."""
    found = []
    for folder in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            found += [int(folder[6:])] if text.encode() in content_of(f"{folder}/cmdline") else []
    return found


def test_two_ranks_are_one(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / name)
    train.main(["--out", str(tmp_path / "one"), "--steps", "5", "--micro", "2"])
    with torchrun(
        f"{HERE}/train.py", "--out", "two", "--steps", "5", "--micro", "2", cwd=tmp_path
    ) as process:
        output, errors = process.communicate(timeout=120)
    assert (
        process.returncode == 0 and output.count("step 5/5") == 1 and resumed_at(output) == [4]
    ), errors
    one, two = (log_lines(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 1
    for key in (
        "step",
        "images",
        "loss",
        "lr",
        "grad_norm",
        "loss_by_logsnr",
    ):  # by four micro-steps on one rank, and two on each of two
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-5)
    grids = [
        np.asarray(Image.open(tmp_path / name / "samples_0000005.png")).astype(int)
        for name in ("one", "two")
    ]
    assert abs(grids[0] - grids[1]).max() <= 1
    load(tmp_path / "two")  # strictly, so there is no "module." before the names


def test_moments_of_another_layout_are_resumed(run, tmp_path):
    for name, layout in (
        ("plain", torch.contiguous_format),
        ("other", torch.channels_last),
    ):  # as from a CPU, and from a GPU
        (tmp_path / name).mkdir()
        state = torch.load(f"{run}/ckpt_0000004.pt", weights_only=True)
        for moments in state["optimizer"]["state"].values():
            moments.update(
                {
                    key: x.contiguous(memory_format=layout)
                    for key, x in moments.items()
                    if x.ndim == 4
                }
            )
        torch.save(state, tmp_path / name / "ckpt_0000004.pt")
        train.main(
            [
                "--out",
                str(tmp_path / name),
                "--steps",
                "5",
                "--model-args",
                '{"checkpoint_resolutions": [8]}',
            ]
        )  # may change, too
    plain, other = (load_checkpoint(str(tmp_path / name))["net"] for name in ("plain", "other"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.slow
def test_split_over_any_ranks_training_is_that_of_one(run, tmp_path):
    for name in ("one", "split"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / name)
    for steps in (5, 7):
        train.main(["--out", str(tmp_path / "one"), "--steps", str(steps), "--save-every", "1"])
    for steps, ranks, options in (
        (5, 4, ["--save-every", "1", "--fsdp"]),
        (7, 2, ["--micro", "2", "--sample-every", "1"]),
    ):  # resumed from one process, then from 4
        with torchrun(
            f"{HERE}/train.py",
            "--out",
            "split",
            "--steps",
            steps,
            *options,
            cwd=tmp_path,
            ranks=ranks,
        ) as process:
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and resumed_at(output) == [4 if steps == 5 else 5], errors
        assert 0.8 < int(re.search(r"parameters \((\d+) %", output)[1]) * ranks / 100 < 1.3
    one, split = (load_checkpoint(str(tmp_path / name)) for name in ("one", "split"))
    for key in ("net", "ema"):
        assert list(one[key]) == list(split[key])
        # Keys' biases cancel in the softmax: their gradient is rounding alone, of which Adam makes
        # whole steps.
        for name in one[key]:
            assert "norm_k.bias" in name or torch.allclose(
                one[key][name], split[key][name], rtol=0, atol=1e-6
            ), name
    moments, split_moments = one["optimizer"]["state"], split["optimizer"]["state"]
    assert all(
        torch.allclose(moments[i][key], split_moments[i][key], rtol=1e-4, atol=1e-7)
        for i in moments
        for key in moments[i]
    )
    one, split = (log_lines(tmp_path / name) for name in ("one", "split"))
    for key in ("step", "images", "loss", "lr", "grad_norm", "loss_by_logsnr"):
        assert all(
            a[key] == pytest.approx(b[key], rel=1e-4) for a, b in zip(one, split, strict=True)
        )
    grids = [
        np.asarray(Image.open(tmp_path / name / "samples_0000007.png")).astype(int)
        for name in ("one", "split")
    ]
    assert abs(grids[0] - grids[1]).max() <= 1
    train.main(
        ["--out", str(tmp_path / "split"), "--steps", "8", "--no-fsdp"]
    )  # and a checkpoint of 2 by one process
    assert load_checkpoint(str(tmp_path / "split"))["step"] == 8


def test_two_ranks_sample_what_one_does(run, tmp_path):
    options = ["--number", 7, "--batch", 2, "--steps", 3, "--no-bf16", "--device", "cpu"]
    sampling.main([run, *map(str, options), "--out", f"{tmp_path}/one.npz"])
    for out in ("two.npz", "two/"):
        with torchrun(f"{HERE}/sample.py", run, *options, "--out", out, cwd=tmp_path) as process:
            output, errors = process.communicate(timeout=120)
        assert (
            process.returncode == 0
            and len(re.findall(rf"(?m)^(?=.*\b7\b).*{out}", output)) == 1
            and "100 %" in errors
        ), errors
    one, two = (np.load(f"{tmp_path}/{name}.npz") for name in ("one", "two"))
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and np.array_equal(
        one["y"], two["y"]
    )
    pictures = fid.ImageReader(tmp_path / "two")
    assert len(pictures) == 7 and all(
        np.array_equal(pictures[i], two["arr_0"][i]) for i in range(7)
    )


@pytest.mark.slow
def test_two_ranks_train_on_latents_and_draw_them_as_one_does(tmp_path):
    path = write_latents(tmp_path / "latents.npz")
    options = [
        "--data",
        path,
        "--res",
        8,
        "--model-args",
        '{"base_channels": 8, "emb_channels": 16}',
        "--steps",
        2,
        "--batch",
        4,
        "--no-bf16",
        "--device",
        "cpu",
    ]
    train.main([*map(str, options), "--out", f"{tmp_path}/one"])
    for out, extra in (("two", []), ("split", ["--fsdp"])):
        with torchrun(f"{HERE}/train.py", *options, *extra, "--out", out, cwd=tmp_path) as process:
            assert process.wait(120) == 0
        one, two = (load_checkpoint(f"{tmp_path}/{name}")["net"] for name in ("one", out))
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-3
    options = ["--number", 7, "--batch", 2, "--steps", 3, "--no-bf16", "--device", "cpu"]
    sampling.main([f"{tmp_path}/one", *map(str, options), "--out", f"{tmp_path}/one.npz"])
    with torchrun(
        f"{HERE}/sample.py", f"{tmp_path}/one", *options, "--out", "two.npz", cwd=tmp_path
    ) as process:
        assert process.wait(120) == 0
    one, two = (np.load(f"{tmp_path}/{name}.npz") for name in ("one", "two"))
    np.testing.assert_allclose(one["z"], two["z"], atol=1e-4)
    assert one["y"].tolist() == two["y"].tolist() and np.abs(one["z"]).max() > 1


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(sets, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("0", "2"):  # the first of two ranks gets no image of this folder
        (tmp_path / "bad" / f"{name}.png").write_bytes(b"not an image")
    for name in ("1", "3"):
        photo(seed=int(name)).save(tmp_path / "bad" / f"{name}.png")
    for real in (sets / "real", tmp_path / "bad"):
        options = [
            real,
            sets / "fake.npz",
            "--features",
            "test_all:Colors",
            "--batch",
            4,
            "--skip-bad",
            "--device",
            "cpu",
        ]
        options += ["--pr"] if real.name == "real" else []
        lines, _ = measured(*options, "--save-stats", f"{tmp_path}/one.npz")
        with torchrun(
            f"{HERE}/fid.py", *options, "--save-stats", "two.npz", cwd=tmp_path
        ) as process:
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and len(lines) == len(output.splitlines()), errors
        assert [line for line in output.splitlines() if "two.npz" not in line] == [
            line for line in lines if "one.npz" not in line
        ]
        one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
        assert all(np.abs(one[key] - two[key]).max() < 1e-9 for key in ("mu", "sigma", "n"))
    offline = os.environ | dict(TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")
    for options, expected in (
        (["--features", "test_all:Colors"], f"{tmp_path}/bad/"),
        ([], fid.WEIGHTS),
    ):
        with torchrun(
            f"{HERE}/fid.py",
            tmp_path / "bad",
            sets / "fake.npz",
            *options,
            cwd=tmp_path,
            env=offline,
        ) as process:
            _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.splitlines() if line.startswith("fid.py")]
        assert (
            process.returncode != 0
            and sum(expected in line for line in lines) == 1
            and len(lines) <= 2
        ), errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_fid_in_the_loop_is_that_of_the_samples(run, sets, tmp_path, monkeypatch, capsys, ranks):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / "run")
    np.savez(
        tmp_path / "ref.npz",
        mu=np.linspace(0, 1, 9),
        sigma=np.diag(np.linspace(0, 1, 9)),
        features="test_all:Colors",
    )
    options = [
        "--steps",
        "5",
        "--fid-every",
        "5",
        "--fid-images",
        "9",
        "--fid-ref",
        "ref.npz",
        "--fid-features",
        "test_all:Colors",
        "--micro",
        "2",
        "--out",
        "run",
    ]
    if ranks == 1:
        train.main(options)
        output, errors = capsys.readouterr()
    else:
        with torchrun(f"{HERE}/train.py", *options, cwd=tmp_path) as process:
            output, errors = process.communicate(timeout=120)
    lines = log_lines("run")
    assert [line["step"] for line in lines] == [5, 5] and lines[1]["fid_images"] == 9, errors
    assert re.search(rf"FD-Colors {lines[1]['FD-Colors']:.3f}\D+9\b", output)
    samples = [
        "--sampler",
        "dpmpp",
        "--steps",
        "64",
        "--n",
        "9",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "samples.npz"),
    ]
    sampling.main([str(tmp_path / "run"), *samples])
    found, _ = measured(
        tmp_path / "ref.npz", tmp_path / "samples.npz", "--features", "test_all:Colors"
    )
    assert float(found[2].split()[1]) == pytest.approx(lines[1]["FD-Colors"], rel=1e-3)


class Recorder(Foreign):
    """A net that notes the labels it is trained with."""

    def forward(self, z, logsnr, label=None):
        if self.training:
            with open(os.environ["SEEN"], "a") as file:
                file.write("".join(f"{i}\n" for i in label.tolist()))
        return super().forward(z, logsnr, label)


def test_another_number_of_ranks_goes_on_with_the_images_not_yet_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    no_grid(monkeypatch)
    np.savez(tmp_path / "data.npz", x=np.zeros((12, 32, 32, 3), np.uint8), y=np.arange(12))
    options = [
        "--data",
        str(tmp_path / "data.npz"),
        "--label-drop",
        "0",
        "--workers",
        "0",
        "--no-bf16",
        "--model",
        "test_all:Recorder",
        "--out",
        str(tmp_path / "run"),
    ]
    train.main([*options, "--batch", "2", "--steps", "2"])
    with torchrun(
        f"{HERE}/train.py", *options, "--batch", 4, "--steps", 4, cwd=tmp_path
    ) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sorted(map(int, content_of(tmp_path / "seen").split())) == list(
        range(12)
    )  # 2 x 2 on one rank, then 2 x 4 on two


def test_a_rank_that_fails_ends_the_others_with_one_clear_line(tmp_path):
    for i in range(8):
        photo((40, 40), i).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"not an image")
    with torchrun(
        f"{HERE}/train.py",
        *TINY_RUN,
        "--data",
        tmp_path,
        "--batch",
        2,
        "--workers",
        1,
        "--out",
        tmp_path / "run",
        cwd=tmp_path,
    ) as process:
        _, errors = process.communicate(timeout=100)
    lines = [
        line for line in errors.splitlines() if line.startswith("train.py") and "5.png" in line
    ]
    assert process.returncode != 0 and len(lines) == 1, errors
    assert not processes_with(str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_all_processes_of_a_run(tmp_path, ranks):
    np.savez(tmp_path / "data.npz", x=np.zeros((8, 32, 32, 3), np.uint8))
    options = [
        *TINY_RUN,
        "--log-every",
        "1",
        "--steps",
        "1000000",
        "--sample-every",
        "1000000",
        "--save-every",
        "1000000",
        "--data",
        "data.npz",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    process = (torchrun if ranks == 2 else start)(
        f"{HERE}/train.py", *options, cwd=tmp_path, start_new_session=True
    )
    try:
        wait_for(lambda: last_step(tmp_path / "run"), process)
        os.killpg(
            process.pid, signal.SIGTERM if ranks == 2 else signal.SIGINT
        )  # the processes that read data get it, too
        output, errors = process.communicate(timeout=60)
    finally:
        left = processes_with(str(tmp_path))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    line = re.search(r"(?m)^(?=.*\bSIG\w+).*\bstep (\d+)", output)
    assert line and os.listdir(tmp_path / "run").count(f"ckpt_{int(line[1]):07d}.pt") == 1, (
        output + errors
    )
    assert process.returncode == (128 + signal.SIGINT if ranks == 1 else 1) and (
        ranks == 2 or "Traceback" not in errors
    ), errors
    assert not left


def test_training_on_own_images(tmp_path):
    for i in range(6):
        folder = tmp_path / "my set" / ("sun" if i % 2 else "moon")
        folder.mkdir(parents=True, exist_ok=True)
        photo((50, 40), i).save(folder / f"{i}.jpg")
    out = str(tmp_path / "run")
    train.main(
        [
            *TINY_RUN,
            "--steps",
            "2",
            "--data",
            str(tmp_path / "my set"),
            "--workers",
            "1",
            "--out",
            out,
        ]
    )
    assert load(out)[1]["classes"] == ["moon", "sun"]


def test_bench_counts_and_times_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stopwatch, "steps", 30)
    train.main([*TINY_RUN, "--micro", "4", "--bench"])
    speed, mfu = capsys.readouterr().out.splitlines()[2:]
    assert re.fullmatch(
        r"[\d.]+ img/s \([\d.]+[^\d.]+[\d.]+\)\D+[\d.]+ ms\D+8\b\D+"
        r"data [\d.]+ ms\D+forward\+backward [\d.]+ ms\D+optimizer\+EMA [\d.]+ ms",
        speed,
    )
    assert re.match(
        r"MFU [\d.]+ %\D+[\d.]+ GFLOP\D+[\d.]+ TFLOP/s\W+float32\D+1\b\D+[\d.]+ GiB",
        mfu,
    )
    assert os.listdir() == []
    # Backward takes two products for each one of forward, but none for the gradient of the image.
    for net_class, fields in NETS:
        macs = unet.count(net_class, fields)[1]
        assert (
            0.9
            < training_flops(
                dict(model=net_class.__name__.lower(), model_args=fields, res=fields["res"])
            )
            / (6 * macs)
            < 1
        )


def test_stopwatch_counts_each_part_of_every_second_window(monkeypatch):
    seconds = dict(zip(Stopwatch.parts, (1, 10, 100)))  # by a clock that each part moves on
    stopwatch, clock = Stopwatch(torch.device("cpu")), [0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for step in range(Stopwatch.steps):
        for part in (
            "data",
            "forward+backward",
            "data",
            "forward+backward",
            "optimizer+EMA",
        ):  # two micro-steps
            clock[0] += 1000 * (step < 10) + seconds[part]
            stopwatch.tick(part)
    assert stopwatch.windows == [5 * 122] * 5 and stopwatch.seconds == {
        "data": 25 * 2,
        "forward+backward": 25 * 20,
        "optimizer+EMA": 25 * 100,
    }


def write_latents(path, **others):
    generator = np.random.default_rng(0)
    np.savez(
        path,
        **dict(
            z=3 * generator.standard_normal((40, 5, 8, 8)).astype(np.float32),
            y=np.arange(40) % 3,
            classes=["a", "b", "c"],
        )
        | others,
    )
    return str(path)


def test_latents_are_trained_on_and_drawn_as_they_are(tmp_path, monkeypatch, capsys):
    path, out, seen, loss = (
        write_latents(tmp_path / "latents.npz"),
        tmp_path / "run",
        [],
        train.diffusion_loss,
    )
    monkeypatch.setattr(
        train,
        "diffusion_loss",
        lambda net, x, schedule, label, **options: (
            seen.append((x, label)) or loss(net, x, schedule, label, **options)
        ),
    )
    train.main(
        [
            "--data",
            path,
            "--res",
            "8",
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16}',
            "--steps",
            "3",
            "--batch",
            "4",
            "--label-drop",
            "0",
            "--sample-every",
            "1",
            "--workers",
            "0",
            "--out",
            str(out),
        ]
    )
    z, y = np.load(path)["z"], np.load(path)["y"]
    (shown, label), order = seen[0], image_order(40, 0, 4, 0, [range(4)])
    first = next(order)
    assert torch.equal(shown, torch.from_numpy(z[first])) and label.tolist() == y[first].tolist()
    net, config, schedule = load(out)
    assert (
        config["model_args"]["in_channels"] == net.head.conv.out_channels == 5
        and config["flip"] is False
        and config["classes"] == ["a", "b", "c"]
    )
    assert not list(out.glob("*.png")) and training_flops(config) > 0
    sampling.main(
        [
            str(out),
            "--n",
            "7",
            "--batch",
            "3",
            "--steps",
            "3",
            "--no-bf16",
            "--out",
            str(tmp_path / "z.npz"),
        ]
    )
    with np.load(tmp_path / "z.npz") as drawn:
        expected = sample(
            net, (7, 5, 8, 8), schedule, steps=3, label=torch.arange(7) % 3, clip=None
        ).numpy()
        np.testing.assert_allclose(drawn["z"], expected, atol=1e-5)
        assert (
            drawn["z"].dtype == np.float32
            and np.abs(drawn["z"]).max() > 1
            and drawn["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        )
    again = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "z.npz")], res=8))
    assert (
        len(again) == 7
        and again.classes == ["a", "b", "c"]
        and again.size == (8, 8)
        and str(again) != str(open_dataset(DEFAULTS | dict(data=[path], res=8)))
    )
    train.main(["--out", str(out), "--steps", "4"])
    assert resumed_at(capsys.readouterr().out) == [3]
    for args, text in (
        (["--out", "grid.png"], f"{out} --out"),
        (["--out", "z.npz", "--clip", "static"], f"{out} --clip"),
    ):
        with pytest.raises(ValueError, match=named(*text.split())):
            sampling.main([str(out), *args])
    for model_args in ('{"in_channels": 3}', '{"in_channels": 5}'):
        with pytest.raises(ValueError, match="in_channels"):
            train.main(
                ["--model-args", model_args, "--steps", "1", "--out", str(tmp_path / "none")]
            )
    for args, text in (
        (["--res", "16"], "latents.npz 8x8 --res 16"),
        (["--res", "8", "--flip"], "--flip"),
        (["--res", "8", "--fid-every", "1"], "--fid-every"),
        (["--res", "8", "--model-args", '{"in_channels": 3}'], "in_channels"),
    ):
        with pytest.raises(ValueError, match=named(*text.split())):
            train.main(["--data", path, "--out", str(tmp_path / "none"), *args])
    other = write_latents(tmp_path / "other.npz", z=np.zeros((40, 6, 8, 8), np.float32))
    with pytest.raises(ValueError, match=named(out)):
        train.main(["--data", other, "--out", str(out)])


def test_latents_without_labels_and_in_half_precision(tmp_path):
    np.savez(tmp_path / "z.npz", z=np.ones((4, 2, 8, 16), np.float16))
    data = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "z.npz")], res="8x16"))
    z, y = load_batch(data, [0, 3])
    assert (
        z.dtype == torch.float32
        and z.shape == (2, 2, 8, 16)
        and y.tolist() == [0, 0]
        and data.classes == []
    )
    train.main(
        [
            "--data",
            str(tmp_path / "z.npz"),
            "--res",
            "8x16",
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16}',
            "--steps",
            "1",
            "--batch",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    sampling.main(
        [str(tmp_path / "run"), "--n", "3", "--steps", "1", "--out", str(tmp_path / "drawn.npz")]
    )
    drawn = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "drawn.npz")], res="8x16"))
    assert np.load(tmp_path / "drawn.npz").files == ["z"]
    assert load_batch(drawn, [2])[0].shape == (1, 2, 8, 16)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(z=np.zeros((40, 5, 8, 8), np.uint8)),
        dict(z=np.zeros((40, 8, 8), np.float32)),
        dict(z=np.zeros((0, 5, 8, 8), np.float32)),
        dict(y=np.arange(3)),
        dict(y=np.arange(40)),
        dict(y=np.zeros(40)),
        dict(y=np.arange(40) % 3, classes=[]),
    ],
)
def test_what_is_no_latents(tmp_path, arrays):
    with pytest.raises(ValueError, match=named("latents.npz", "z")):
        open_dataset(
            DEFAULTS | dict(data=[write_latents(tmp_path / "latents.npz", **arrays)], res=8)
        )


def test_packed_images_are_those_of_the_folder(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for data, out in ((sets / "real", "labeled.npz"), (sets / "real.npy", "plain.npz")):
        train.main(["--data", str(data), "--res", "8", "--pack", out])
        assert re.search(named(40, out), capsys.readouterr().out)
        folder, packed = ImageData([data], 8), ImageData([tmp_path / out], 8)
        assert (
            all(map(torch.equal, load_batch(folder, range(40)), load_batch(packed, range(40))))
            and folder.classes == packed.classes
        )
        assert isinstance(packed.reader.sources[0][0], np.memmap)
        with np.load(out, allow_pickle=False) as data:  # and numpy can read it
            assert data["x"].shape == (40, 8, 8, 3) and ("y" in data) == (out == "labeled.npz")
    shutil.copytree(sets / "real", tmp_path / "bad")
    (tmp_path / "bad" / "0" / "broken.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="broken.png"):
        train.main(["--data", "bad", "--res", "8", "--pack", "bad.npz"])
    assert sorted(os.listdir()) == ["bad", "labeled.npz", "plain.npz"]
    train.main(
        [*TINY_RUN, "--steps", "1", "--data", "plain.npz", "--res", "32", "--out", "run"]
    )  # another size still works


@pytest.mark.slow
def test_compiled_sampling_draws_the_same_images(run, tmp_path):
    for name, option in (("plain", "--no-compile"), ("compiled", "--compile")):
        sampling.main(
            [
                run,
                "--n",
                "3",
                "--batch",
                "2",
                "--steps",
                "2",
                "--no-bf16",
                option,
                "--out",
                f"{tmp_path}/{name}.npz",
            ]
        )
    plain, compiled = (
        np.load(f"{tmp_path}/{name}.npz")["arr_0"].astype(int) for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and abs(plain - compiled).max() <= 1


@pytest.mark.parametrize("out", ["grid.png", "folder/", "samples.npz"])
def test_sampling_command(run, tmp_path, out):
    out = f"{tmp_path}/{out}"
    options = [
        "--n",
        "5",
        "--batch",
        "2",
        "--steps",
        "3",
        "--label",
        "star,3",
        "--guidance",
        "1.5",
        "--guidance-interval",
        "-3",
        "3",
        "--no-bf16",
    ]
    sampling.main(
        [
            run,
            *options,
            "--sampler",
            "ddim",
            "--grid",
            "logsnr",
            "--clip",
            "dynamic",
            "--seed",
            "4",
            "--out",
            out,
        ]
    )
    if out.endswith(".png"):
        assert Image.open(out).size == (2 * 34 - 2, 3 * 34 - 2)
    elif out.endswith("/"):
        pictures = np.stack([np.asarray(Image.open(f"{out}{i:06d}.png")) for i in range(5)])
        sampling.main(
            [
                f"{run}/ckpt_0000006.pt",
                *options,
                "--batch",
                "5",
                "--sampler",
                "ddpm",
                "--interpolation",
                "1",
                "--out",
                f"{tmp_path}/a.npz",
            ]
        )
        sampling.main(
            [
                run,
                *options,
                "--batch",
                "3",
                "--sampler",
                "ddpm",
                "--interpolation",
                "1",
                "--out",
                f"{tmp_path}/b.npz",
            ]
        )
        a, b = np.load(f"{tmp_path}/a.npz")["arr_0"], np.load(f"{tmp_path}/b.npz")["arr_0"]
        assert abs(a.astype(int) - b).max() <= 1 and not np.array_equal(a, pictures)
    else:
        data = np.load(out)
        assert (
            data["arr_0"].shape == (5, 32, 32, 3)
            and data["arr_0"].dtype == np.uint8
            and data["y"].tolist() == [7, 3, 7, 3, 7]
        )


# -------------------------------------------------- nothing lost: faults, preemption, hostile input


def same_weights(a, b):
    a, b = (load_checkpoint(str(path)) for path in (a, b))

    def moments(state):
        return [x for moment in state["optimizer"]["state"].values() for x in moment.values()]

    return (
        a["step"] == b["step"]
        and all(
            torch.equal(a[key][name], b[key][name]) for key in ("net", "ema") for name in a[key]
        )
        and all(map(torch.equal, moments(a), moments(b)))
    )


KILLED_RUN = [
    *TINY_RUN[:-2],
    "--log-every",
    "1",
    "--save-every",
    "3",
    "--keep",
    "2",
    "--sample-every",
    "1000000",
    "--model-args",
    json.dumps(
        dict(
            base_channels=16, emb_channels=512, channel_multiplier=[1, 4], num_transformer_blocks=4
        )
    ),
]


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_nothing_is_lost(tmp_path):
    steps, random, parts = 120, np.random.default_rng(0), 0

    def again(out):
        return start(
            f"{HERE}/train.py",
            *KILLED_RUN,
            "--steps",
            steps,
            "--out",
            out,
            cwd=tmp_path,
            env=os.environ | dict(OMP_NUM_THREADS="1"),
        )

    with again("whole") as process:
        assert process.wait(timeout=300) == 0
    for kill in range(20):
        before = last_step(tmp_path / "run")
        part = tmp_path / "run" / f"ckpt_{3 * (before // 3 + random.integers(1, 3)):07d}.pt.part"
        with again("run") as process:
            if kill % 4 == 0:  # as it starts
                time.sleep(random.uniform(0, 4))
            elif kill % 4 == 1:  # some steps later
                wait_for(lambda before=before: last_step(tmp_path / "run") > before, process)
                time.sleep(random.uniform(0, 0.2))
            else:  # while it writes
                wait_for(part.exists, process)
                time.sleep(random.uniform(0, 0.02))
            assert process.poll() is None, process.communicate()
            process.kill()
            output, errors = process.communicate(timeout=60)
        parts += bool(glob.glob(f"{tmp_path}/run/*.part"))
        resumed = resumed_at(output)
        assert not errors and (not output or before - (resumed[0] if resumed else 0) <= 3), (
            kill,
            before,
            output,
            errors,
        )
    with again("run") as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and not errors and parts >= 3, (parts, errors)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    logs = [
        [
            {key: value for key, value in line.items() if key not in ("img_per_s", "seconds")}
            for line in log_lines(tmp_path / name)
        ]
        for name in ("whole", "run")
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, steps + 1)) and logs[0] == logs[1]
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(tmp_path):
    options = [f"{HERE}/train.py", *KILLED_RUN, "--steps", 40, "--out"]
    for name in ("whole", "run"):
        with torchrun(*options, name, cwd=tmp_path, restarts=2) as process:
            for step in (
                (8, 19) if name == "run" else ()
            ):  # the newest checkpoints are those of steps 6 and 18
                wait_for(lambda step=step: last_step(tmp_path / "run") >= step, process)
                (rank1,) = [
                    pid
                    for pid in processes_with("--out\0run")
                    if b"\0RANK=1\0" in content_of(f"/proc/{pid}/environ")
                ]
                os.kill(rank1, signal.SIGKILL)
            output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    resumed = resumed_at(output)
    assert (
        len(resumed) == 2
        and resumed[0] >= 8 - 3
        and resumed[1] >= 19 - 3
        and same_weights(tmp_path / "whole", tmp_path / "run")
    ), output


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_second_ctrl_c_stops_at_once(tmp_path):
    options = [
        f"{HERE}/train.py",
        *TINY_RUN[:-2],
        "--batch",
        "1024",
        "--steps",
        "1000000",
        "--log-every",
        "1",
        "--sample-every",
        "1000000",
        "--save-every",
        "1000000",
        "--out",
        tmp_path / "run",
    ]
    with start(*options, cwd=tmp_path) as process:  # of seconds per step
        wait_for(lambda: last_step(tmp_path / "run"), process)
        log = content_of(tmp_path / "run" / "log.jsonl")
        second = command(
            f"{HERE}/train.py", *TINY_RUN, "--steps", "2", "--out", "run", cwd=tmp_path
        )
        assert (
            second.returncode == 1
            and len(second.stderr.splitlines()) == 1
            and re.match(r"train\.py\W+run\b", second.stderr)
        )
        assert content_of(tmp_path / "run" / "log.jsonl").startswith(log)
        step = last_step(tmp_path / "run")
        wait_for(
            lambda: last_step(tmp_path / "run") > step, process
        )  # or the step could end, and be saved, between the two
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, errors = process.communicate(timeout=20)
    assert (
        process.returncode == -signal.SIGINT
        and not errors
        and not list((tmp_path / "run").glob("ckpt*"))
    )


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond this size: to the writer the same as a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_good(
    run, sets, tmp_path, monkeypatch, capsys
):  # capsys: else the output is a file, too
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    shutil.copy(f"{run}/ckpt_0000004.pt", "run")
    good = content_of("run/ckpt_0000004.pt")
    no_grid(monkeypatch)
    for size, file in ((100, "config.json"), (1500, "log.jsonl"), (50_000, "ckpt_0000005.pt")):
        with (
            contextlib.ExitStack() as stack,
            largest_file(size),
            pytest.raises(OSError, match=named(f"run/{file}")),
        ):
            if file == "log.jsonl":
                log = stack.enter_context(open("run/log.jsonl", "ab", 0))
                log.write(1400 * b"\n")
                monkeypatch.setattr(train, "open_log", lambda out, step, log=log: (log, []))
            train.main(["--out", "run", "--save-every", "1", "--keep", "1"])
        assert (
            {"ckpt_0000004.pt", "log.jsonl"}
            <= set(os.listdir("run"))
            <= {"ckpt_0000004.pt", "config.json", "log.jsonl"}
        )
        assert content_of("run/ckpt_0000004.pt") == good
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        no_grid(monkeypatch)
    train.main(["--out", "run", "--save-every", "1", "--keep", "1"])  # with room again
    assert sorted(os.listdir("run")) == [
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ] and same_weights("run", run)
    with largest_file(1000):
        for out in ("grid.png", "folder/", "samples.npz"):
            with pytest.raises(OSError, match=re.escape(out)):
                sampling.main([run, "--n", "2", "--steps", "1", "--out", out])
        with pytest.raises(OSError, match="packed.npz"):
            train.main(["--data", str(sets / "real"), "--res", "16", "--pack", "packed.npz"])
        with pytest.raises(ValueError, match="stats.npz"):
            measured(sets / "real", "--features", "test_all:Colors", "--save-stats", "stats.npz")
    assert sorted(os.listdir()) == ["folder", "run"] and os.listdir("folder") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    root = os.geteuid() == 0
    out = "/sys/run" if root else str(tmp_path / "run")  # where not even root can write
    os.chmod(tmp_path, 0o555)
    with pytest.raises(OSError, match=out):
        train.main([*TINY_RUN, "--steps", "2", "--out", out])
    os.chmod(tmp_path, 0o755)


def test_spaces_and_letters_of_all_kinds_in_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    for i in range(6):
        folder = tmp_path / "meine Bilder [ä] 図" / ("Möwe *" if i % 2 else "猫 ?")
        folder.mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(folder / f"Bild {i} é.png")
    train.main(["--data", "meine Bilder [ä] 図", "--res", "32", "--pack", "gepackt ü.npz"])
    for data in ("meine Bilder [ä] 図", "gepackt ü.npz"):
        for steps in ("1", "2"):
            train.main(
                [
                    *TINY_RUN,
                    "--data",
                    data,
                    "--workers",
                    "0",
                    "--steps",
                    steps,
                    "--out",
                    f"Lauf [1] {data}",
                ]
            )
        assert resumed_at(capsys.readouterr().out) == [1]
        sampling.main(
            [
                f"Lauf [1] {data}",
                "--n",
                "4",
                "--steps",
                "1",
                "--label",
                "Möwe *",
                "--out",
                "Gitter ñ/",
            ]
        )
        assert len(fid.ImageReader(tmp_path / "Gitter ñ")) == 4
        lines, _ = measured(
            data,
            "Gitter ñ",
            "--features",
            "test_all:Colors",
            "--res",
            "32",
            "--save-stats",
            "Maße.npz",
        )
        assert lines[0].startswith(f"{data}: ") and lines[0].endswith("N = 6")
        shutil.rmtree("Gitter ñ")
        os.remove("Maße.npz")


def bad_pictures(folder):
    """Writes 5 readable images and 6 that are not."""
    folder.mkdir()
    for i in range(5):
        photo((40, 40), i).save(folder / f"good{i}.png")
    photo((99, 99)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"text")
    bomb = Image.new("1", (8, 8))
    bomb.save(folder / "bomb.png")
    content = bytearray((folder / "bomb.png").read_bytes())
    content[16:24] = (40000).to_bytes(4, "big") * 2  # in the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(content)
    os.mkfifo(folder / "pipe.png")  # would never end
    os.symlink("nowhere.png", folder / "link.png")
    return ["bomb.png", "cut.jpg", "link.png", "pipe.png", "text.png", "zero.png"]


def test_bad_images_stop_training_or_are_named_once_and_counted(tmp_path, monkeypatch, capfd):
    bad = bad_pictures(tmp_path / "data")
    no_grid(monkeypatch)
    options = [
        *TINY_RUN,
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "5",
    ]
    with pytest.raises(ValueError, match="|".join(map(re.escape, bad))):
        train.main([*options, "--workers", "0"])
    capfd.readouterr()
    train.main([*options, "--skip-bad", "--workers", "2"])  # almost four epochs, by two processes
    output, errors = capfd.readouterr()
    assert (
        sorted(
            name[0]
            for line in errors.splitlines()
            if (name := re.search(r"\w+\.(png|jpg)\b", line))
        )
        == bad
    ), errors
    assert (
        "step 5/5" in output
        and re.search(r"\b6\b\D*$", output.splitlines()[-2])
        and log_lines(tmp_path / "run")[-1]["skipped"] == 6
    )
    data = ImageData([tmp_path / "data"], 8, skip_bad=True)
    plain = fid.ImageReader(tmp_path / "data")
    assert torch.equal(
        load_batch(data, range(11))[0][0],
        torch.from_numpy(plain.read(2, (8, 8)).copy()).permute(2, 0, 1),
    )  # bomb, cut -> good0
    train.main(
        [
            "--data",
            str(tmp_path / "data"),
            "--res",
            "8",
            "--skip-bad",
            "--pack",
            str(tmp_path / "packed.npz"),
        ]
    )
    assert np.array_equal(
        np.load(tmp_path / "packed.npz")["x"], load_batch(data, range(11))[0].permute(0, 2, 3, 1)
    )
    for path in (tmp_path / "data").glob("good*"):
        path.unlink()
    data = ImageData([tmp_path / "data"], 8, skip_bad=True)
    with pytest.raises(ValueError) as error:
        load_batch(data, [3])
    assert not any(name in str(error.value) for name in bad)  # not that of a single image


def test_two_ranks_name_and_count_bad_images_together(tmp_path):
    bad = bad_pictures(tmp_path / "data")
    options = [
        *TINY_RUN,
        "--steps",
        8,
        "--log-every",
        1,
        "--data",
        "data",
        "--skip-bad",
        "--workers",
        1,
        "--out",
        "run",
        "--sample-every",
        1000,
    ]
    with torchrun(f"{HERE}/train.py", *options, cwd=tmp_path) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and log_lines(tmp_path / "run")[-1]["skipped"] == len(bad), (
        errors
    )
    assert {
        name[0] for line in errors.splitlines() if (name := re.search(r"\w+\.(png|jpg)\b", line))
    } == set(bad)


def test_links_in_a_circle_and_closed_folders(tmp_path):
    photo().save(tmp_path / "a.png")
    for name in ("x", "y"):
        os.symlink(tmp_path, tmp_path / name)  # 2^40 paths, if followed
    assert len(fid.ImageReader(tmp_path)) == 1

    def closed(path, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "closed"))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PermissionError, match="closed"):
        patch.setattr(fid.os, "walk", closed)  # root may enter all
        fid.ImageReader(tmp_path)


def test_where_the_loss_is_not_finite_is_said(run, tmp_path, monkeypatch):
    plain = train.diffusion_loss

    def infected(*args, t, **options):
        loss, logsnr = plain(
            *args,
            t=torch.where(
                torch.arange(len(t)) < 2, torch.tensor([0.5, 0.9]).repeat(len(t))[: len(t)], t
            ),
            **options,
        )  # logsnr 0 and -3.7
        calls.append(1)
        return torch.where(
            torch.arange(len(t)) < 2, loss * (value if len(calls) == 2 else 1), loss
        ), logsnr

    monkeypatch.setattr(train, "diffusion_loss", infected)
    for value in (math.nan, math.inf):
        calls = []
        out = tmp_path / str(value)
        out.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", out)
        with pytest.raises(ValueError) as error:
            train.main(
                ["--out", str(out), "--steps", "12", "--log-every", "5", "--save-every", "7"]
            )
        message, _, rest = str(error.value).partition(f"{out}/ckpt_0000004.pt")
        assert re.search(named("step", "logsnr", "gradient"), message) and not rest
        assert [int(x) for x in re.findall(r"-?\d+", message)] == [6, -4, -2, 0, 2]
        assert [path.name for path in out.glob("ckpt*")] == ["ckpt_0000004.pt"] and last_step(
            out
        ) == 5


def test_the_largest_gradient_is_logged(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    no_grid(monkeypatch)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args: norms.append(clip(*args) * (7 if len(norms) == 1 else 1)) or norms[-1],
    )  # a spike
    train.main(["--out", str(tmp_path), "--steps", "10", "--log-every", "3", "--save-every", "100"])
    lines = log_lines(tmp_path)
    assert [line["grad_norm"] for line in lines] == [norms[i].item() for i in (1, 4, 5)]
    assert [line["max_grad_norm"] for line in lines] == [
        max(norms[i].item() for i in steps) for steps in ((0, 1), (2, 3, 4), (5,))
    ]


def test_what_has_changed_since_is_said_at_resume(tmp_path, monkeypatch, capsys):
    no_grid(monkeypatch)
    for i in range(6):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    np.savez(
        tmp_path / "data.npz",
        x=np.zeros((6, 32, 32, 3), np.uint8),
        y=np.arange(6) % 2,
        classes=["a", "b"],
    )
    changes = {
        "data": [
            lambda: photo((50, 40)).save(tmp_path / "data" / "a" / "0.png"),
            lambda: os.rename(tmp_path / "data" / "a" / "0.png", tmp_path / "data" / "b" / "0.png"),
            lambda: photo().save(tmp_path / "data" / "a" / "new.png"),
        ],
        "data.npz": [
            lambda: np.savez(
                tmp_path / "data.npz",
                x=np.ones((6, 32, 32, 3), np.uint8),
                y=np.arange(6) % 2,
                classes=["a", "b"],
            ),
            lambda: np.savez(
                tmp_path / "data.npz",
                x=np.ones((6, 32, 32, 3), np.uint8),
                y=np.arange(6) // 3,
                classes=["a", "b"],
            ),
        ],
    }
    for data, todo in changes.items():
        options = [
            "--data",
            str(tmp_path / data),
            "--workers",
            "0",
            "--out",
            str(tmp_path / f"run {data}"),
        ]
        train.main([*TINY_RUN, *options, "--steps", "1"])
        for step, change in enumerate(todo, 1):
            for steps in (step, step + 1):  # not changed, and changed
                if steps > step:
                    change()
                capsys.readouterr()
                train.main([*options, "--steps", str(steps)])
                (line,) = [
                    line for line in capsys.readouterr().out.splitlines() if resumed_at(line)
                ]
                assert bool(re.search(r"\d+ \(\w{8}\)\D+\d+ \(\w{8}\)", line)) == (steps > step), (
                    line
                )
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    train.main(options)
    before = load_checkpoint(str(tmp_path / "run data.npz"))["config"]["torch"]
    assert re.search(rf"torch {re.escape(before)}\D+2\.0\.0", capsys.readouterr().out)


def test_a_flipped_bit_in_a_checkpoint_is_found_at_resume(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    content = bytearray((out / "ckpt_0000006.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in the numbers
    (out / "ckpt_0000006.pt").write_bytes(content)
    train.main(["--out", str(out)])
    output = capsys.readouterr()
    assert (
        "ckpt_0000006.pt" in output.err and resumed_at(output.out) == [4] and same_weights(out, run)
    )


def test_a_grid_that_was_not_drawn_in_time_is_drawn_at_resume(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = (out / "samples_0000006.png").read_bytes()
    train.main(["--out", str(out)])
    assert "samples_0000006.png" not in capsys.readouterr().out
    os.remove(out / "samples_0000006.png")
    train.main(["--out", str(out)])
    assert (out / "samples_0000006.png").read_bytes() == before


def test_a_log_with_half_a_line_is_cut_and_goes_on(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    for i, rest in enumerate(
        (b'{"step": 6, "lo', b"\0" * 100, b'{"step": 6}', b"\xff\xfe\n", b"[1]\n")
    ):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", out)
        lines = content_of(f"{run}/log.jsonl").splitlines(True)
        (out / "log.jsonl").write_bytes(b"".join(lines[:2]) + rest)
        train.main(["--out", str(out)])
        assert [line["step"] for line in log_lines(out)] == [2, 4, 6]


class Evil:
    """When unpickled, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_of_strangers_run_no_code_and_write_nothing(run, tmp_path, monkeypatch):
    evil = Evil(str(tmp_path / "owned"))
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    state = load_checkpoint(f"{run}/ckpt_0000004.pt")
    for i, key in enumerate(state):
        torch.save(state | {key: evil}, f"{key}.pt", _use_new_zipfile_serialization=i % 2 == 0)
    with open("plain.pt", "wb") as file:
        pickle.dump(evil, file)
    x = np.zeros((3, 8, 8, 3), np.uint8)
    for name, arrays in dict(
        x=dict(x=np.array([evil] * 3, object)),
        z=dict(z=np.array([evil] * 3, object)),
        y=dict(x=x, y=np.array([evil] * 3, object)),
        mu=dict(mu=np.array([evil], object), sigma=np.eye(1)),
        classes=dict(x=x, y=np.arange(3), classes=np.array([evil] * 3, object)),
    ).items():
        np.savez(f"{name}.npz", **arrays)
    np.save("array.npy", np.array([evil], object), allow_pickle=True)
    picture = io.BytesIO()
    photo().save(picture, "PNG")
    names = [
        "../up.png",
        "a/../../../up.png",
        str(tmp_path / "absolute.png"),
        "..\\up.png",
        "C:\\up.png",
        "link/up.png",
    ]
    for kind, source in (("zip", None), ("pt", f"{run}/ckpt_0000004.pt"), ("npz", "good.npz")):
        np.savez("good.npz", x=x)
        if source:
            shutil.copy(source, f"climbing.{kind}")
        with zipfile.ZipFile(f"climbing.{kind}", "a") as archive:
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, str(tmp_path))
            for name in names:
                archive.writestr(name, picture.getvalue())
    before = sorted(tmp_path.rglob("*"))
    for file in sorted(glob.glob("*")):
        if file.endswith(".pt"):
            with pytest.raises(ValueError, match=file):
                load(file)
            os.mkdir("run")
            shutil.copy(file, "run/ckpt_0000004.pt")
            with pytest.raises(ValueError, match="ckpt_0000004.pt"):
                train.main(["--out", "run"])
            shutil.rmtree("run")
        elif file.startswith(("climbing", "good")):
            pictures = fid.ImageReader(file)
            assert len(pictures) == 3 and [pictures[i].shape[2] for i in range(3)] == [
                3,
                3,
                3,
            ]  # of the zip: absolute, C: and link
        elif file == "mu.npz":
            with pytest.raises(ValueError, match=file):
                fid.read_statistics(file)
        elif file == "z.npz":
            with pytest.raises(ValueError, match=file):
                open_dataset(DEFAULTS | dict(data=[file]))
        else:
            with pytest.raises(ValueError, match=file):
                fid.ImageReader(file)
    assert sorted(tmp_path.rglob("*")) == before
    pickle.loads(content_of("plain.pt")).close()
    assert os.path.exists(tmp_path / "owned")  # so it would have worked


def mutated(content, random):
    """The bytes with some changed, cut out, repeated or zeroed."""
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at, length = random.integers(len(content) or 1), int(2 ** random.uniform(0, 8))
        kind = random.integers(5)
        if kind == 0:
            content[at : at + 1] = bytes([random.integers(256)])
        elif kind == 1:
            content[at : at + length] = random.bytes(length)
        elif kind == 2:
            del content[at : at + length if random.integers(2) else None]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        else:
            content[at : at + length] = bytes(length)
    return bytes(content)


def outcome(main, args, seconds=60):
    """The error line of a command, "" without one.

    Anything but one line, such as a trace or a minute without an end, fails the test.
    """

    def stuck(*_):
        raise AssertionError(f"no end: {args}")

    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(seconds)
    try:
        run_command(lambda: main([str(arg) for arg in args]))
        return ""
    except SystemExit as error:
        line = str(error.code)
        assert (
            isinstance(error.code, str) and len(line.splitlines()) == 1 or error.code in (0, 2)
        ), (args, error.code)
        return line
    finally:
        signal.alarm(0)


@pytest.fixture
def outcomes(monkeypatch, tmp_path, capsys):
    """A list of all outcomes, in an empty folder, without grids, and with 8 GiB of memory.

    Beyond these there is an error instead of a slow machine.
    """
    import resource

    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = 1024 * int(re.search(rb"VmSize:\s+(\d+)", content_of("/proc/self/status"))[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, before[1]))
    try:
        yield collections.defaultdict(list)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_mutated_images_and_arrays_give_one_line_or_success(sets, outcomes):
    random = np.random.default_rng(0)

    def tries(name, number, *commands):
        content = content_of(name)
        for i in range(number + 1):
            with open(name, "wb") as file:
                file.write(mutated(content, random) if i else content)
            fid._archive.cache_clear()
            for main, *args in commands:
                line = outcome(main, args)
                outcomes[name].append(line)
                assert os.path.exists("out.npz") == (not line) and (i or not line), (name, i, line)
                for file in glob.glob("out.npz*"):
                    os.remove(file)

    def measure(data):
        return (
            fid.main,
            data,
            "--features",
            "test_all:Colors",
            "--save-stats",
            "out.npz",
            "--device",
            "cpu",
        )

    os.mkdir("one")
    photo().save("one/a.png")
    for extension in ("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm", "tga", "jp2", "avif"):
        name = f"one/b.{extension}"
        photo((40, 30)).save(name)
        tries(
            name,
            20,
            measure("one"),
            (train.main, "--data", "one", "--res", "8", "--skip-bad", "--pack", "out.npz"),
        )
        os.remove(name)
    with zipfile.ZipFile("set.zip", "w") as archive:
        for i in range(3):
            archive.write(
                "one/a.png", f"{i % 2}/{i}.png", zipfile.ZIP_DEFLATED if i else zipfile.ZIP_STORED
            )
    tries("set.zip", 80, measure("set.zip"))
    arrays = dict(
        x=np.asarray(photo((32, 32)))[None].repeat(5, 0),
        y=np.arange(5),
        classes=["a", "b", "c", "d", "e"],
    )
    np.savez("a.npz", **arrays)
    np.savez_compressed("b.npz", **arrays)
    np.save("c.npy", arrays["x"])
    for name in ("a.npz", "b.npz", "c.npy"):
        tries(
            name, 40, measure(name), (train.main, "--data", name, "--res", "8", "--pack", "out.npz")
        )
    np.savez("d.npz", mu=np.zeros(9), sigma=np.eye(9), n=5, features="test_all:Colors")
    tries(
        "d.npz", 60, (fid.main, "d.npz", "--features", "test_all:Colors", "--save-stats", "out.npz")
    )
    errors = {name: len(lines) - lines.count("") for name, lines in outcomes.items()}
    assert sum(errors.values()) < 0.9 * sum(map(len, outcomes.values())) and all(
        errors[name] > 5 for name in ("set.zip", "a.npz", "b.npz", "c.npy", "d.npz")
    ), errors


def test_mutated_checkpoints_give_one_line_or_success(run, outcomes):
    random = np.random.default_rng(0)
    content = content_of(f"{run}/ckpt_0000004.pt")
    os.mkdir("run")
    for i in range(120):
        if i % 3 == 0:
            with open("run/ckpt_0000004.pt", "wb") as file:
                file.write(mutated(content, random))
        else:  # the settings and the names of the tensors
            with (
                zipfile.ZipFile(f"{run}/ckpt_0000004.pt") as good,
                zipfile.ZipFile("run/ckpt_0000004.pt", "w") as bad,
            ):
                for name in good.namelist():
                    data = good.read(name)
                    bad.writestr(name, mutated(data, random) if name.endswith("data.pkl") else data)
        line = outcome(sampling.main, ["run", "--n", "1", "--steps", "1", "--out", "out.npz"])
        assert os.path.exists("out.npz") == (not line), line
        outcomes["sample"].append(line)
        outcomes["train"].append(
            outcome(
                train.main,
                ["--out", "run", "--steps", "5", "--save-every", "1000", "--workers", "0"],
            )
        )
        for file in glob.glob("out.npz") + glob.glob("run/*"):
            os.remove(file)
    assert all(len(set(lines)) > 3 and "" in lines for lines in outcomes.values()), outcomes


def test_values_of_all_kinds_give_one_line_or_success(run, sets, outcomes):
    random = np.random.default_rng(0)
    values = [
        "",
        " ",
        "0",
        "-1",
        "1",
        "2.5",
        "nan",
        "inf",
        "-inf",
        "1e-400",
        "1e400",
        "99999999999999999999",
        "x",
        "é\udcff",
        "a" * 5000,
        "/",
        "..",
        "/dev/null",
        "-",
        "--",
        "[]",
        "null",
        "{}",
        '{"num_heads": 0}',
        '{"base_channels": "8"}',
        '{"channel_multiplier": 3}',
        '{"num_res_blocks": [-1]}',
        '{"dropout": "much"}',
        '{"emb_channels": -4}',
        '{"patching": []}',
        '{"res": 32}',
        '{"checkpoint_resolutions": 8}',
        "shifted:0",
        "shifted:-3",
        "shifted:1e400",
        "interpolated:32",
        "interpolated:nan:64",
        "cosine:",
        ":",
        "os:path",
        "os:getcwd",
        "test_all:Foreign",
        "..:x",
        "meta",
        "cuda:99",
        "star,,3",
        "3,-3",
        str(sets / "real"),
        str(sets / "real.npy"),
        run,
        f"{run}/config.json",
    ]
    commands = [
        (
            train.main,
            [*TINY_RUN, "--steps", "1", "--out", "run"],
            [
                "--data",
                "--res",
                "--model",
                "--model-args",
                "--schedule",
                "--label-drop",
                "--batch",
                "--micro",
                "--lr",
                "--warmup",
                "--decay",
                "--ema",
                "--seed",
                "--out",
                "--device",
                "--log-every",
                "--save-every",
                "--sample-every",
                "--keep",
                "--fid-every",
                "--fid-ref",
                "--fid-images",
                "--fid-features",
                "--pack",
                "--space",
                "--size",
                "--what",
            ],
        ),
        (
            sampling.main,
            [run, "--n", "2", "--steps", "1", "--out", "out.npz"],
            [
                "--n",
                "--batch",
                "--steps",
                "--sampler",
                "--grid",
                "--interpolation",
                "--clip",
                "--guidance",
                "--guidance-interval",
                "--label",
                "--seed",
                "--model",
                "--device",
                "--out",
                "--what",
            ],
        ),
        (
            fid.main,
            [sets / "real", sets / "fake.npz", "--features", "test_all:Colors"],
            [
                "--save-stats",
                "--res",
                "--weights",
                "--features",
                "--batch",
                "--device",
                "--what",
                str(sets / "fake.npz"),
            ],
        ),
    ]
    for i in range(400):
        main, base, options = commands[i % 3]
        option = options[random.integers(len(options))]
        value = values[random.integers(len(values))]
        line = outcome(
            main, [*base, option, *[value] * (2 if option == "--guidance-interval" else 1)]
        )
        outcomes[main.__module__].append(line)
        if line:
            assert not os.path.exists("out.npz"), (option, value, line)
        for path in glob.glob("*"):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    assert all(len(set(lines)) > 20 and "" in lines for lines in outcomes.values()), outcomes


def test_copies_of_checkpoints_and_leftovers_and_what_is_unlinked(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in (
        "ckpt_best.pt",
        "ckpt_0000001_good.pt",
        "ckpt_0000003.pt.part",
        "samples_0000003.png.part",
    ):
        shutil.copy(out / "ckpt_0000004.pt", out / name)
    mapped, save = [], save_checkpoint

    def recorded(*args):
        save(*args)
        mapped.append(
            [line for line in content_of("/proc/self/maps").splitlines() if bytes(out) in line]
        )

    monkeypatch.setattr(train, "save_checkpoint", recorded)
    train.main(["--out", str(out), "--steps", "10", "--save-every", "1", "--keep", "2"])
    assert mapped == [[]] * 4  # the checkpoint that was resumed from is gone, and its space free
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_0000001_good.pt",
        "ckpt_0000009.pt",
        "ckpt_0000010.pt",
        "ckpt_best.pt",
    ] and not list(out.glob("*.part"))


def test_hidden_folders_and_names_of_classes_given_twice(tmp_path):
    for i in range(8):
        (tmp_path / str(i) / ".store" / "horse").mkdir(parents=True)
        photo().save(tmp_path / str(i) / ".store" / "horse" / "a.png")
        for name in ("horse", f"z{i}", f"a{i}"):  # whatever order the disk lists them in
            os.symlink(".store/horse", tmp_path / str(i) / name)
        pictures = fid.ImageReader(tmp_path / str(i))
        assert len(pictures) == 1 and pictures.sources[0][1].split("/")[-2] == f"a{i}"
    np.savez(
        tmp_path / "twice.npz",
        x=np.zeros((4, 8, 8, 3), np.uint8),
        y=np.arange(4),
        classes=["a", "crane", "b", "crane"],
    )
    with pytest.raises(ValueError, match=named("twice.npz", "classes")):
        fid.ImageReader(tmp_path / "twice.npz")


# ------------------------------------------------------------- the commands, as a person types them


def command(*args, cwd, env=None):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=cwd, timeout=300, env=env
    )


def test_schedule_command_draws_the_figure(tmp_path):
    photo((70, 50)).save(tmp_path / "photo.jpg")
    result = command(f"{HERE}/schedule.py", "photo.jpg", cwd=tmp_path)
    assert result.returncode == 0 and "-4.159" in result.stdout, result.stderr
    assert Image.open(tmp_path / "noised.png").size == (5 * 256, 4 * 272)
    result = command(f"{HERE}/schedule.py", "nowhere.jpg", cwd=tmp_path)
    assert (
        result.returncode != 0
        and len(result.stderr.splitlines()) == 1
        and "nowhere.jpg" in result.stderr
    )


@pytest.mark.slow
def test_without_a_compiler_training_goes_on(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    result = command(
        f"{HERE}/train.py",
        "--out",
        ".",
        "--steps",
        "5",
        "--compile",
        cwd=tmp_path,
        env=os.environ | dict(CXX="no-such-compiler"),
    )
    assert (
        result.returncode == 0
        and "no-such-compiler" in result.stderr
        and "step 5/5" in result.stdout
    ), result.stdout + result.stderr


@pytest.mark.parametrize("file, number", [("unet.py", "979.39 M"), ("uvit.py", "533.6")])
def test_table_commands(tmp_path, file, number):
    result = command(f"{HERE}/{file}", cwd=tmp_path)
    assert result.returncode == 0 and number in result.stdout, result.stderr


def bad_commands(run, folder):
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "broken.png").write_bytes(b"not an image")
    (folder / "broken.pt").write_bytes(b"not a checkpoint")
    (folder / "zero.pt").write_bytes(b"")
    torch.save({"other": 1}, folder / "other.pt")
    np.savez(folder / "stats.npz", mu=np.zeros(9), sigma=np.eye(9), features="test_all:Colors")
    np.savez(folder / "other.npz", mu=np.zeros(9), sigma=np.eye(9), features="nowhere:Colors")
    np.savez(folder / "few.npz", mu=np.zeros(3), sigma=np.eye(3), features="test_all:Colors")
    state = load_checkpoint(f"{run}/ckpt_0000006.pt")
    torch.save(
        state | dict(ema={name: value for name, value in list(state["ema"].items())[:-1]}),
        folder / "partial.pt",
    )
    torch.save(
        state | dict(config=state["config"] | dict(model="os:system")), folder / "stranger.pt"
    )
    (folder / "stranger").mkdir()
    shutil.copy(folder / "stranger.pt", folder / "stranger" / "ckpt_0000006.pt")
    return [
        ("train.py --data nowhere", "nowhere"),
        ("train.py --data empty", "empty"),
        ("train.py --model vit", "--model vit"),
        ("train.py --size huge", "--size tiny small base paper text huge"),
        ("train.py --model test_all:Foreign --size huge", "test_all:Foreign --size huge"),
        ("train.py --loss eps", "--loss eps"),
        ("train.py --loss loss:eps", "--loss loss:eps"),
        ("train.py --loss loss:diffusion_loss --space v", "--space --loss"),
        ("train.py --space x", "--space x"),
        ("train.py --res 48", "--res 48"),
        ("train.py --size paper --res 64", "--size paper --res 128 256 512 64"),
        ("train.py --schedule linear", "linear"),
        ("train.py --batch 10 --micro 4", "--batch 10 4"),
        ('train.py --model-args {"depth":3}', "depth"),
        ("train.py --model-args [1]", "--model-args [1]"),
        ("train.py --model-args {bad", "--model-args {bad"),
        ('train.py --model-args {"num_classes":20}', "num_classes"),
        ("train.py --batch 0", "--batch 0"),
        ("train.py --log-every 0", "--log-every 0"),
        ("train.py --fid-every 5", "--fid-every --fid-ref"),
        ("train.py --fid-every 5 --fid-ref zero.pt", "--fid-ref zero.pt"),
        (
            "train.py --fid-every 5 --fid-ref stats.npz --fid-features test_all:Plain",
            "--fid-ref stats.npz test_all:Colors test_all:Plain",
        ),
        ("train.py --fid-every 5 --fid-ref other.npz --fid-features nowhere:Colors", "nowhere"),
        (
            "train.py --fid-every 5 --fid-ref few.npz --fid-features test_all:Colors",
            "--fid-ref few.npz 3 9",
        ),
        ("train.py --fid-every 0", "--fid-every 0"),
        ("train.py --fid-images 1", "--fid-images 1"),
        (
            "train.py --fid-every 5 --fid-ref stats.npz",
            "--fid-ref stats.npz test_all:Colors Inception-2015-12-05",
        ),
        ("train.py --data stats.npz --pack stats.npz", "--pack stats.npz"),
        ("train.py --pack shapes.npz", "--pack --data"),
        ("train.py --data stats.npz --pack stats.npy", "--pack .npz"),
        ("train.py --ema 3", "--ema 3"),
        ("train.py --seed -1", "--seed -1"),
        ("train.py --device abacus", "--device abacus"),
        (f"sample.py {run} --device abacus", "--device abacus"),
        (f"sample.py {run} --seed -1", "--seed"),
        ("sample.py zero.pt", "zero.pt"),
        (f"sample.py {run} --guidance-interval 3 -3", "--guidance-interval"),
        (f"sample.py {run} --out bad/", "--out bad/"),
        (f"sample.py {run} --model unet", f"{run} --model uvit unet"),
        (
            'train.py --model-args {"patching":"conv_4",'
            '"channel_multiplier":[1,1,1,1,1],"num_res_blocks":[1,1,1,1]}',
            "conv_4 64 32x32",
        ),
        ("train.py --stepz 3", "--stepz"),
        (f"train.py --out {run} --model unet", f"{run} --model uvit unet"),
        (f"train.py --out {run} --res 64", f"{run} --out"),
        ("train.py --out stranger", "os:system"),
        ("sample.py nowhere", "nowhere"),
        ("sample.py empty", "empty"),
        ("sample.py broken.pt", "broken.pt"),
        ("sample.py other.pt", "other.pt"),
        ("sample.py partial.pt", "partial.pt"),
        ("sample.py stranger.pt", "os:system"),
        (f"sample.py {run} --label 10", "--label 10"),
        (f"sample.py {run} --label cow", "--label cow"),
        (f"sample.py {run} --sampler euler", "euler"),
        (f"sample.py {run} --out grid.jpg", "grid.jpg"),
        (f"sample.py {run} --n 0", "--n"),
    ]


def test_bad_input_gets_one_clear_line(run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for line, expected in bad_commands(run, tmp_path):
        file, *args = line.split()
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            {"train.py": train, "sample.py": sampling}[file].main(args)
        message = str(error.value).strip().splitlines()[-1]
        assert re.search(named(*expected.split()), message), (line, message)
    assert not os.path.exists("runs")
    for line, expected in (
        ("train.py --data bad --batch 2 --workers 1 --steps 1", "broken.png"),
        (f"sample.py {run} --label 10", "--label"),
        ("train.py --res x", "--res"),
    ):
        file, *args = line.split()
        result = command(
            f"{HERE}/{file}", *args, cwd=tmp_path
        )  # and the commands end with that line and a non-zero status
        assert (
            result.returncode != 0
            and len(result.stderr.strip().splitlines()) == 1
            and expected in result.stderr
        ), result.stderr


# ---------------------------------------------------------------- do the samples show their class?


def trained_judge(batch, sizes):
    """A small classifier, trained for some seconds.

    It maps images (B, 3, 32, 32) in [-1, 1] to logits of attributes of these numbers of values.
    batch(step): images uint8 and the numbers of their attributes, (B, len(sizes)). Returns a
    function from uint8 images to these numbers.
    """
    torch.manual_seed(0)

    def block(cin, cout):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())

    judge = nn.Sequential(
        block(3, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Linear(2048, sum(sizes))
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in range(400):
        x, attributes = batch(step)
        logits = judge(x / 127.5 - 1 + 0.05 * torch.randn(x.shape)).split(sizes, 1)
        loss = sum(F.cross_entropy(each, y) for each, y in zip(logits, attributes.unbind(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        optimizer.step()
    judge.eval().requires_grad_(False)
    return lambda x: torch.stack(
        [each.argmax(1) for each in judge(x / 127.5 - 1).split(sizes, 1)], 1
    )


def shapes_judge():
    """A judge of the class of Shapes, and its accuracy on 4,000 fresh ones."""
    data, others = Shapes(32), load_batch(Shapes(32, first=2**30), range(4000))

    def batch(step):
        x, y = load_batch(data, range(128 * step, 128 * step + 128))
        return x, y[:, None]

    judge = trained_judge(
        batch,
        [10],
    )
    return lambda x: judge(x)[:, 0], (judge(others[0])[:, 0] == others[1]).float().mean().item()


def test_judge_of_a_trained_run():
    judge, accuracy = shapes_judge()
    assert accuracy >= 0.99
    if "RUN" not in os.environ:
        pytest.skip(
            "RUN=runs/shapes-32 judges the samples of that run; the judge itself was tested"
        )
    net, config, schedule = load(os.environ["RUN"])
    net = in_bf16(net, config["bf16"])
    label, by_scale = torch.arange(1024) % 10, {}
    for scale in (1.0, 1.5, 2.0):
        right = 0
        for first in range(0, 1024, 128):
            y = label[first : first + 128]
            x = sample(
                net,
                (len(y), 3, 32, 32),
                schedule,
                sampler="dpmpp",
                steps=64,
                label=y,
                guidance=scale,
                first=first,
            )
            right += (judge(to_uint8(x)) == y).sum().item()
        by_scale[scale] = right / 1024
        print(
            f"judge {100 * accuracy:.1f} % on fresh shapes; 1,024 samples at guidance {scale:g}: "
            f"{100 * by_scale[scale]:.1f} % show their class",
            flush=True,
        )
    assert max(by_scale.values()) >= 0.9


@pytest.mark.slow
def test_judge_of_a_trained_run_of_texts():
    words = [
        ["small", "large"],
        CaptionedShapes.colors,
        CaptionedShapes.classes,
        ["top", "bottom"],
        ["left", "right"],
    ]

    def numbers(texts):
        return torch.tensor(
            [
                [values.index(text.split()[i]) for values, i in zip(words, (1, 2, 3, -2, -1))]
                for text in texts
            ]
        )

    shown, held_out = (
        lambda first, held_out=held_out: CaptionedShapes(
            32, first=first, held_out=held_out, full=True
        )
        for held_out in (False, True)
    )

    def batch(step):  # all colors of all shapes alike, or the one would tell the other
        parts = [(data(n * step), range(n)) for data, n in ((shown, 105), (held_out, 21))]
        return torch.cat([load_batch(data, indices)[0] for data, indices in parts]), numbers(
            sum((data.captions(indices) for data, indices in parts), [])
        )

    judge = trained_judge(batch, list(map(len, words)))
    for data in (shown(2**30), held_out(2**30)):
        answer, expected = judge(load_batch(data, range(2000))[0]), data.captions(range(2000))
        accuracy = (answer == numbers(expected)).float().mean(0)
        assert accuracy.min() >= 0.98, accuracy
    if "TEXT_RUN" not in os.environ:
        pytest.skip(
            "TEXT_RUN=runs/shapes-text-32 judges the samples of that run; "
            "the judge itself was tested"
        )
    net, config, schedule = load(os.environ["TEXT_RUN"])
    net = in_bf16(net, config["bf16"])
    for name, data in ("shown in training", shown(2**30)), ("held out", held_out(2**30)):
        for scale in (1.0, 2.0):
            right = []
            for first in range(0, 500, 125):
                texts = data.captions(range(first, first + 125))
                x = sample(
                    net,
                    (125, 3, 32, 32),
                    schedule,
                    sampler="dpmpp",
                    steps=32,
                    label=torch.from_numpy(byte_tokens(texts, config["model_args"]["text_tokens"])),
                    guidance=scale,
                    first=first,
                )
                right.append(judge(to_uint8(x)) == numbers(texts))
            right = torch.cat(right).float()
            print(
                f"{name}, guidance {scale:g}: "
                + ", ".join(
                    f"{key} {100 * value:.1f} %"
                    for key, value in zip(
                        ("size", "color", "shape", "top or bottom", "left or right"), right.mean(0)
                    )
                )
                + f"; color and shape {100 * right[:, 1:3].amin(1).mean():.1f} %, "
                + f"all {100 * right.amin(1).mean():.1f} %",
                flush=True,
            )
            if name == "held out" and scale == 2.0:
                assert right[:, 1].mean() >= 0.7 and right[:, 2].mean() >= 0.7


def test_yardsticks_of_the_readme(tmp_path, monkeypatch, capsys):
    with open(f"{HERE}/README.md") as file:
        script = re.search(r"```python\n(.*?)```", file.read(), re.S)[1]
    small = (
        script.replace("300", "3").replace("5000", "100").replace("1000", "50")
    )  # steps, other images, images of a bound
    assert small != script
    (tmp_path / "judge.py").write_text(small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def output(*args):
        monkeypatch.setattr(sys, "argv", ["judge.py", *args])
        runpy.run_path("judge.py", run_name="__main__")
        return capsys.readouterr().out

    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output())
    train.main(
        [
            "--res",
            "32",
            "--steps",
            "1",
            "--batch",
            "2",
            "--out",
            "run",
            "--model-args",
            '{"base_channels": 8}',
        ]
    )
    capsys.readouterr()
    of_one = r"[\d.]+ bits/dim\D+50\b.*\b%s\n(logsnr .\d\b\D+[\d.]+\n){8}"
    assert re.fullmatch(
        of_one % "shapes" + of_one % "others.npz", output("run", "shapes", "others.npz")
    )
    with np.load("others.npz") as others:
        np.savez("samples.npz", arr_0=others["x"], y=others["y"])
    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output("samples.npz"))
    for name, width in (("Judge", 256), ("Pooled", 192)):
        network = fid.load_network(f"judge:{name}")
        features = fid.extract(
            network, torch.from_numpy(np.load("others.npz")["x"][:4]).permute(0, 3, 1, 2)
        )[0]
        assert features.shape == (4, width)


# ---------------------------------------------------------------- text to image


TEXT = dict(
    res=(16, 32),
    num_classes=0,
    base_channels=16,
    emb_channels=32,
    channel_multiplier=(1, 2),
    num_res_blocks=(1,),
    num_transformer_blocks=2,
    transformer_dropout=0.0,
    attn_resolutions=(16,),
    text_tokens=6,
)


def text_net(**fields):
    torch.manual_seed(0)
    net = TextUViT(**TEXT | fields).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("text_dim", [0, 5])
def test_padding_of_texts_does_not_count(text_dim):
    net, z = text_net(text_dim=text_dim), torch.randn(1, 3, 16, 32)
    text = torch.randn(1, 6, 5) if text_dim else torch.randint(1, 257, (1, 6))
    text[:, 3:] = 0
    tokens, mask, pooled = net.text(text)
    assert mask.tolist() == [[True] * 4 + [False] * 3 if text_dim else [True, True, False]]
    short = text_net(text_dim=text_dim, text_tokens=3)
    short.load_state_dict(
        {
            name: value[:1] if name == "text.position" else value
            for name, value in net.state_dict().items()
        }
    )
    close = dict(rtol=0, atol=1e-6)
    torch.testing.assert_close(
        net(z, torch.zeros(1), text), short(z, torch.zeros(1), text[:, :3]), **close
    )
    torch.testing.assert_close(
        net(z, torch.zeros(1)), net(z, torch.zeros(1), torch.zeros_like(text))
    )  # None is the empty text
    assert not torch.allclose(net(z, torch.zeros(1)), net(z, torch.zeros(1), text), **close)
    other = text.clone()
    other[:, 2] = 2 * other[:, 2] if text_dim else 1 + other[:, 2] % 256
    assert not torch.allclose(net(z, torch.zeros(1), other), net(z, torch.zeros(1), text), **close)


def test_tokens_of_bytes_are_sums_of_embeddings():
    text, words = Text(10, 0, 8).double(), byte_tokens(["a red red", ""], 10)
    text.transformer, text.norm = torch.nn.ModuleList(), torch.nn.Identity()
    tokens, mask, _ = text(torch.from_numpy(words))
    assert mask.tolist() == [[True] * 4, [True, False, False, False]] and torch.equal(
        tokens[:, 0], text.empty.expand(2, 8)
    )
    expected = text.position.clone()
    for i in range(9):
        five = sum(1009**j * int(words[0, i - j]) for j in range(min(i + 1, 5))) % 4093
        expected[i // 4] += text.encode.weight[words[0, i]] + text.five.weight[five]
    torch.testing.assert_close(tokens[0, 1:], expected)


def test_cross_attention_is_softmax_attention():
    torch.manual_seed(0)
    cross = CrossAttention(8, 5, 2).double()
    torch.nn.init.normal_(cross.out.weight)
    x, text, mask = (
        torch.randn(1, 4, 8).double(),
        torch.randn(1, 3, 5).double(),
        torch.tensor([[True, True, False]]),
    )
    q, (k, v) = cross.q(cross.norm(x))[0], cross.kv(text)[0].chunk(2, 1)
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        scores = cross.norm_q(q[:, i]) @ cross.norm_k(k[:2, i]).T / 2
        heads.append(scores.softmax(1) @ v[:2, i])
    torch.testing.assert_close(cross(x, text, mask)[0], x[0] + cross.out(torch.cat(heads, 1)))


def test_guidance_away_from_a_text():
    net, z, logsnr = text_net(), torch.randn(2, 3, 16, 32), torch.zeros(2)
    text, negative = byte_tokens(["ab", "xyz"], 6), byte_tokens(["no"], 6)
    text, negative = torch.from_numpy(text), torch.from_numpy(negative)
    for given, null in ((None, torch.zeros_like(text)), (negative, negative.expand(2, -1))):
        expected = net(z, logsnr, null) + 2 * (net(z, logsnr, text) - net(z, logsnr, null))
        torch.testing.assert_close(guided(net, 2.0, given)(z, logsnr, text), expected)


def test_upright_images_are_told():
    net, z = text_net(portrait=True), torch.randn(1, 3, 16, 32)
    text = torch.from_numpy(byte_tokens(["ab"], 7))
    upright = text.clone()
    upright[:, -1] = 1
    with torch.no_grad():
        assert not torch.allclose(
            net(z, torch.zeros(1), text), net(z, torch.zeros(1), upright), atol=1e-6
        )
        net.portrait.zero_()
        assert torch.equal(net(z, torch.zeros(1), text), net(z, torch.zeros(1), upright))


def test_text_gradients_reach_all_weights():
    for text_dim in (0, 5):
        net = text_net(text_dim=text_dim, portrait=True)
        text = torch.randn(4, 7, 5) if text_dim else torch.randint(1, 257, (4, 7))
        net(torch.randn(4, 3, 16, 32), torch.randn(4), text).square().mean().backward()
        dead = [
            name
            for name, parameter in net.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        ]
        assert [name for name in dead if "norm_k.bias" not in name] == [], dead


def test_text_recipes():
    def cross(c):
        return (
            (2 * c) + (c * c + c) + (1024 * 2 * c + 2 * c) + 4 * (c // 4) + (c * c + c)
        )  # norm, q, k and v, their norms, out

    text = (
        1024 + (4096 * 1024 + 1024) + 2 * 1024 + (4 * 1024) + (4 * 1024 * 1024 + 1024)
    )  # the empty text, the projection of T5-XXL's 4096 channels, norm, means
    for res, fields in RECIPES["uvit"]["text"].items():
        height, width = pixels(res)
        with torch.device("meta"):
            fields = dict(fields, res=(height, width), num_classes=0)
            net = TextUViT(**fields, text_tokens=128, text_dim=4096)
            assert net(
                torch.empty(1, 3, height, width), torch.empty(1), torch.empty(1, 128, 4096)
            ).shape == (1, 3, height, width)
            numbers = [sum(p.numel() for p in each.parameters()) for each in (net, UViT(**fields))]
        assert numbers[0] - numbers[1] == 36 * cross(2048) + 4 * cross(512) + text
        small = TextUViT(
            **dict(
                fields,
                res=(height, width),
                num_classes=0,
                text_tokens=4,
                text_dim=8,
                base_channels=4,
                emb_channels=8,
                num_transformer_blocks=1,
            )
        )
        small(
            torch.randn(1, 3, height, width), torch.zeros(1), torch.randn(1, 4, 8)
        ).mean().backward()


def test_captioned_shapes_are_what_they_say():
    data = CaptionedShapes(64, full=True)
    (x, tokens), texts = load_batch(data, range(300)), data.captions(range(300))
    assert (
        bytes((tokens[7][tokens[7] > 0] - 1).tolist()).decode() == texts[7] == data.captions([7])[0]
        and max(map(len, texts)) <= 64
    )
    assert torch.equal(data.sample_labels(9)[torch.arange(9)], tokens[:9])
    rgb = {
        "red": (1, 0, 0),
        "magenta": (1, 0, 1),
        "blue": (0, 0, 1),
        "cyan": (0, 1, 1),
        "green": (0, 1, 0),
        "yellow": (1, 1, 0),
    }
    shown, held = set(), set()
    for i in range(300):
        _, size, color, shape, *_, up, right = texts[i].split()
        shown.add((shape, color))
        picture = x[i].float()
        saturation = picture.amax(0) - picture.amin(0)
        inside = saturation > 0.8 * saturation.max()  # the shape is brighter than the ground
        rows, columns = inside.nonzero().float().mean(0)
        assert (rows < 31.5) == (up == "top") and (
            shape == "moon" or (columns > 31.5) == (right == "right")
        ), (i, texts[i])  # the moon's left half is the heavier one
        mean = picture[:, inside].mean(1)
        ranked = max(
            rgb,
            key=lambda name: torch.nn.functional.cosine_similarity(
                mean - mean.mean(), torch.tensor(rgb[name]).float() - sum(rgb[name]) / 3, 0
            ),
        )
        assert ranked == color, (i, texts[i], mean)
    others = CaptionedShapes(64, held_out=True, full=True)
    for partly, fully in zip(
        CaptionedShapes(64).captions(range(300)), texts
    ):  # leaves words out, but for the shape
        assert (
            set(partly.replace(",", "").split()) <= set(fully.replace(",", "").split())
            and fully.split()[3].strip(",") in partly.replace(",", "").split()
        )
    assert (
        0.6
        < np.mean(
            ["top" in text or "bottom" in text for text in CaptionedShapes(64).captions(range(300))]
        )
        < 0.9
    )
    held = {tuple(text.split()[3:1:-1]) for text in others.captions(range(100))}
    assert len(held) == 10 and not held & shown and len(shown) == 50


def picture_folder(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        Image.fromarray(np.full((12, 8 + 8 * (i % 2), 3), 20 * i, np.uint8)).save(
            folder / f"{i}.png"
        )
        if text is not None:
            (folder / f"{i}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_captions_of_folders_zip_files_and_lists(tmp_path):
    texts = [f"number {i} \u00e9" for i in range(4)]
    folder = picture_folder(tmp_path / "folder", texts)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"deep/{file.name}")
    lines = [
        json.dumps(dict(file=name, text=text))
        for name, text in zip(("folder/0.png", "1.png", "2.png", "3.png"), texts)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(reversed(lines)))
    for paths, captions in (
        (folder, None),
        (tmp_path / "a.zip", None),
        (folder, tmp_path / "list.jsonl"),
    ):
        assert read_captions(fid.ImageReader([paths]), captions) == texts


@pytest.mark.parametrize(
    "texts, line, message",
    [
        ([None, "b"], None, "0.png 1 2"),
        (["a", " \n"], None, "1.png"),
        ([b"\xff", "b"], None, "0.txt UTF-8"),
        ([None, None], b'{"file": "0.png", "text": "a"}', "1.png"),
        ([None], b'{"file": "7.png", "text": "a"}', "list.jsonl 1 7.png"),
        ([None], b'{"file": "0.png"}', "list.jsonl 1"),
        ([None], b"\xff", "list.jsonl 1"),
        ([None], b"[]", "list.jsonl 1"),
        ([None], b'{"file": "0.png", "text": null}', "list.jsonl 1"),
        ([None], b'{"file": ["0.png"], "text": "a"}', "list.jsonl 1"),
        (
            [None],
            b'{"file": "0.png", "text": "a"}\n{"file": "0.png", "text": "b"}',
            "list.jsonl 2 0.png",
        ),
        (["a", "b"], b"orphan", "2.txt"),
    ],
)
def test_captions_that_cannot_be(tmp_path, texts, line, message):
    folder, captions = picture_folder(tmp_path / "folder", texts), None
    if line == b"orphan":
        (folder / "2.txt").write_text("alone")
    elif line:
        captions = tmp_path / "list.jsonl"
        captions.write_bytes(line)
    with pytest.raises(ValueError, match=named(*message.split())):
        read_captions(fid.ImageReader([folder]), captions)


def test_embeddings_are_stored_once_and_continued(tmp_path):
    seen = []

    class Encoder:
        length, dim = 2, 3

        def lengths(self, texts):
            return [len(text) for text in texts]

        def __call__(self, texts):
            seen.extend(texts)
            if len(seen) == 192:
                raise KeyboardInterrupt
            return np.array([[[float(text)] * 3] * 2 for text in texts], np.float16)

    texts = [str(i + 1) for i in range(200)]
    with pytest.raises(KeyboardInterrupt):
        cache_embeddings(texts, Encoder, "counting", tmp_path)
    array = cache_embeddings(texts, Encoder, "counting", tmp_path)
    assert (
        array.shape == (200, 2, 3)
        and array[:, 0, 0].tolist() == list(range(1, 201))
        and len(seen) == 192 + 200 - 64
    )
    assert np.array_equal(cache_embeddings(texts, None, "counting", tmp_path), array)


def test_t5(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="T5 takes the transformers library")
    monkeypatch.setattr(
        train,
        "sample_batches",
        lambda *args, **settings: sampling.sample_batches(*args, **settings | dict(steps=2)),
    )
    torch.manual_seed(0)
    transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
    ).save_pretrained(tmp_path / "t5")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    folder = picture_folder(tmp_path / "folder", [f"number {i}" for i in range(4)])
    name, options = (
        str(tmp_path / "t5"),
        [
            "--captions",
            "--res",
            "32",
            "--text-tokens",
            "24",
            "--steps",
            "1",
            "--batch",
            "4",
            "--no-flip",
            "--no-bf16",
        ],
    )
    train.main(
        ["--data", str(folder), "--text-encoder", name, "--out", str(tmp_path / "live"), *options]
    )
    np.save(
        tmp_path / "ready.npy", np.concatenate([T5(name, 24)([f"number {i}"]) for i in range(4)])
    )
    train.main(
        [
            "--data",
            str(folder),
            "--text-encoder",
            str(tmp_path / "ready.npy"),
            "--out",
            str(tmp_path / "ready"),
            *options,
        ]
    )
    live, ready = (load(str(tmp_path / name))[0].state_dict() for name in ("live", "ready"))
    for key in live:
        torch.testing.assert_close(live[key], ready[key], rtol=0, atol=1e-5)
    sampling.main(
        [
            str(tmp_path / "live"),
            "--prompt",
            "number 2",
            "--text-encoder",
            name,
            "--steps",
            "1",
            "--n",
            "1",
            "--out",
            str(tmp_path / "live.npz"),
        ]
    )
    np.save(tmp_path / "prompt.npy", T5(name, 24)(["number 2"]))
    sampling.main(
        [
            str(tmp_path / "live"),
            "--prompts",
            str(tmp_path / "prompt.npy"),
            "--steps",
            "1",
            "--n",
            "1",
            "--out",
            str(tmp_path / "ready.npz"),
        ]
    )
    assert np.array_equal(
        np.load(tmp_path / "live.npz")["arr_0"], np.load(tmp_path / "ready.npz")["arr_0"]
    )
    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path / "bert")
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(
        (tmp_path / "t5" / "config.json").read_text()
    )  # of two layers
    for other in ("bert", "short", "missing"):
        if other != "missing":
            transformers.ByT5Tokenizer().save_pretrained(tmp_path / other)
        with pytest.raises(ValueError, match=named("--text-encoder", tmp_path / other)):
            T5(str(tmp_path / other), 24)
    with pytest.raises(ValueError, match=named(name, "--text-encoder")):
        sampling.main(
            [str(tmp_path / "live"), "--prompt", "number 2", "--out", str(tmp_path / "none.png")]
        )


def test_text_to_image_trains_resumes_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train,
        "sample_batches",
        lambda *args, **settings: sampling.sample_batches(*args, **settings | dict(steps=2)),
    )
    monkeypatch.chdir(tmp_path)
    run, folder = str(tmp_path / "run"), picture_folder(tmp_path / "folder", [None] * 4)
    texts = ["a" * 10_000, "number 1", "number 2", "number 3"]
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps(dict(file=f"{i}.png", text=text)) for i, text in enumerate(texts))
    )
    options = [
        "--captions",
        "list.jsonl",
        "--data",
        str(folder),
        "--res",
        "32x64",
        "--size",
        "tiny",
        "--batch",
        "4",
        "--text-tokens",
        "16",
        "--out",
        run,
    ]
    train.main([*options, "--steps", "1"])
    assert re.search(r"\b1\b\D+\b4\b\D+\b16\b.*--text-tokens", capsys.readouterr().out)
    monkeypatch.chdir(folder)
    train.main(["--out", run, "--steps", "2", "--label-drop", "1"])
    net, config, schedule = load(run)
    assert (
        config["model_args"]["portrait"]
        and config["model_args"]["text_tokens"] == 16
        and Image.open(f"{run}/samples_0000001.png").size[0] == 8 * 130 - 2
    )
    (tmp_path / "prompts.txt").write_text("number 2\n\nnumber 3\n")
    arguments = [
        run,
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--n",
        "3",
        "--guidance",
        "2",
        "--steps",
        "2",
        "--sampler",
        "ddim",
        "--portrait",
        "--no-bf16",
        "--out",
        f"{tmp_path}/out.npz",
    ]
    for negative in ("number 1", ""):
        sampling.main([*arguments, "--negative", negative])

        def tokens(*texts):
            return torch.cat(
                [
                    torch.from_numpy(byte_tokens(texts, 16)),
                    torch.ones(len(texts), 1, dtype=torch.int64),
                ],
                1,
            )  # upright

        x = sample(
            net,
            (3, 3, 32, 64),
            schedule,
            steps=2,
            sampler="ddim",
            label=tokens("number 2", "number 3", "number 2"),
            guidance=2.0,
            null_label=tokens(negative),
        )
        with np.load(tmp_path / "out.npz") as out:
            assert np.array_equal(
                np.rot90(out["arr_0"], 1, (1, 2)), to_uint8(x).permute(0, 2, 3, 1)
            ) and out["prompts"].tolist() == ["number 2", "number 3", "number 2"]

    arrays = dict(
        wide=np.zeros((4, 16, 3), np.float32),
        few=np.zeros((3, 16, 3), np.float32),
        none=np.zeros((0, 16, 3), np.float32),
        flat=np.zeros(4),
    )
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "broken.npy").write_bytes(b"PK broken")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    new = [*options[2:-1], str(tmp_path / "new"), "--captions", str(tmp_path / "list.jsonl")]

    def at(name):
        return str(tmp_path / name)

    for main, args, message in (
        (sampling.main, [run], f"{run} --prompt --prompts"),
        (sampling.main, [run, "--prompt", "a", "--label", "3"], f"{run} --label"),
        (
            sampling.main,
            [run, "--prompts", at("wide.npy")],
            "--prompts wide.npy (16, 0) (16, 3)",
        ),
        (sampling.main, [run, "--prompts", at("bad.txt")], "bad.txt UTF-8"),
        (sampling.main, [run, "--prompts", at("empty.txt")], "empty.txt"),
        (sampling.main, [run, "--prompt", "a", "--negative", "b"], "--negative --guidance"),
        (train.main, [*new, "--text-encoder", at("few.npy")], "few.npy float16 float32 (4,"),
        (train.main, [*new, "--text-encoder", at("none.npy")], "none.npy float16 float32"),
        (train.main, [*new, "--text-encoder", at("flat.npy")], "flat.npy float16 float32"),
        (train.main, [*new, "--text-encoder", at("broken.npy")], "broken.npy"),
        (train.main, [*new, "--flip"], "--flip"),
        (train.main, [*new, "--text-tokens", "0"], "--text-tokens 0"),
        (train.main, [*new, "--pack", "a.npz"], "--pack --captions"),
        (
            train.main,
            [*options[2:-1], at("new"), "--text-encoder", "t5"],
            "--text-encoder --captions",
        ),
        (train.main, ["--size", "text", "--res", "256"], "--size text --captions"),
        (train.main, ["--captions", "--text-encoder", "t5"], "--captions --text-encoder --data"),
        (train.main, ["--out", run, "--text-encoder", at("wide.npy")], f"{run} --out"),
        (train.main, ["--out", run, "--text-tokens", "17"], f"{run} --out"),
    ):
        with pytest.raises(ValueError, match=named(*message.split())):
            main(args)
    train.main([*new, "--text-encoder", at("wide.npy"), "--steps", "1"])
    np.save(tmp_path / "wide.npy", np.zeros((4, 16, 4), np.float32))
    with pytest.raises(ValueError, match=named(at("new"))):
        train.main(["--out", at("new"), "--steps", "2"])


def test_upright_images_are_turned(tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    upright, wide = (
        rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((10, 6, 3), (6, 10, 3))
    )
    sideways = Image.Exif()
    sideways[0x0112] = 6  # a wide image of a camera held upright
    for i, (picture, exif) in enumerate(
        ((upright, Image.Exif()), (wide, Image.Exif()), (wide, sideways))
    ):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png", exif=exif)
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"number {i}")
    data = CaptionedImages([str(tmp_path / "pictures")], (6, 10), False, "", "bytes", 9, "cpu")
    x, tokens = load_batch(data, [0, 1, 2])
    turned = (
        np.rot90(upright),
        wide,
        np.rot90(np.rot90(wide, -1)),
    )  # EXIF turns the last one to the right, and we turn it back
    assert all(np.array_equal(a.permute(1, 2, 0), b) for a, b in zip(x, turned)) and tokens[
        :, -1
    ].tolist() == [1, 0, 1]
    assert data.sample_labels(4)[torch.arange(4)][:, -1].tolist() == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--no-bf16"], ["--bf16", "--fsdp"]])
def test_text_to_image_on_two_ranks(tmp_path, options):
    common = [
        "--captions",
        "--res",
        "32",
        "--size",
        "tiny",
        "--batch",
        "8",
        "--steps",
        "3",
        "--sample-every",
        "1000",
        "--device",
        "cpu",
        *options,
    ]
    with torchrun(f"{HERE}/train.py", *common, "--out", "two", cwd=tmp_path) as process:
        # Only a hang is an error: without bfloat16 in hardware this takes four minutes.
        output, errors = process.communicate(timeout=2400)
    assert process.returncode == 0, errors
    train.main([*common, "--out", str(tmp_path / "one")])
    one, two = (load_checkpoint(str(tmp_path / name))["net"] for name in ("one", "two"))
    assert all(
        "norm_k.bias" in name
        or torch.allclose(
            one[name], two[name], rtol=0, atol=1e-5 if "--no-bf16" in options else 2e-3
        )
        for name in one
    )


def default_options(arguments):
    """The options of pytest that the user did not give: no slow tests, and two processes."""
    options = [] if "-m" in arguments else ["-m", "not slow"]
    # The user may choose the processes. Other processes could neither print (-s) nor debug.
    own = any(re.match(r"-n|-p|-s|--numprocesses|--pdb", argument) for argument in arguments)
    if not own and (os.cpu_count() or 1) >= 2 and importlib.util.find_spec("xdist"):
        options += ["-n", "2"]
    return options


if __name__ == "__main__":
    files = [__file__, f"{HERE}/related/test_related.py", f"{HERE}/tests"]
    common = ["-q", "-p", "no:cacheprovider", *default_options(sys.argv[1:])]
    sys.exit(pytest.main([*files, *common, *sys.argv[1:]]))
