"""Tests of sample.py: samplers against closed forms, guidance, and the command."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import sample as sampling
from sample import ddim_step, ddpm_step, guided, sample, to_uint8
from schedule import (
    alpha_sigma,
    eps_from_v,
    make_schedule,
    posterior,
)
from tests.helpers import call, float64, gaussian_net, named, on_ranks, tiny_nets, use_aot_eager


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


def test_the_last_ddpm_step_returns_the_mean():
    z, x = torch.randn(2, 3, 8)
    mean = posterior(z, x, torch.tensor(-1.0), torch.tensor(2.0))[0]
    assert torch.equal(ddpm_step(z, x, torch.tensor(-1.0), torch.tensor(2.0)), mean)
    assert torch.allclose(
        ddim_step(z, x, torch.tensor(-1.0), torch.tensor(60.0)), x, atol=1e-6
    )  # no noise left: x itself


def test_seeds_differ():
    tuples = [(), (0,), (0, 0), (0, 0, 0), (5,), (5, 0), (0, 5), (0, 5, 0), (1, 5), (5, 1)]
    assert len({sampling.mix_seed(*integers) for integers in tuples}) == len(tuples)


def test_two_ranks_sample_the_same_as_one(run, tmp_path):
    options = ["--number 7 --batch 2 --steps 3 --no-bf16 --device cpu"]
    call(sampling.main, run, *options, "--out", f"{tmp_path}/one.npz")
    for out in ("two.npz", "two/"):
        statuses, output, errors = on_ranks(
            sampling.main, run, *options, "--out", out, cwd=tmp_path
        )
        assert statuses == [0, 0], errors
        assert len(re.findall(rf"(?m)^(?=.*\b7\b).*{out}", output)) == 1
        assert "100 %" in errors
    one, two = (np.load(f"{tmp_path}/{name}.npz") for name in ("one", "two"))
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and np.array_equal(
        one["y"], two["y"]
    )
    pictures = fid.ImageReader(tmp_path / "two")
    assert len(pictures) == 7 and all(
        np.array_equal(pictures[i], two["arr_0"][i]) for i in range(7)
    )


def test_compiled_sampling_draws_the_same_images(run, tmp_path, monkeypatch):
    use_aot_eager(monkeypatch)
    for name, option in (("plain", "--no-compile"), ("compiled", "--compile")):
        call(
            sampling.main,
            run,
            "--n 3 --batch 2 --steps 2 --no-bf16",
            option,
            "--out",
            f"{tmp_path}/{name}.npz",
        )
    plain, compiled = (
        np.load(f"{tmp_path}/{name}.npz")["arr_0"].astype(int) for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and abs(plain - compiled).max() <= 1


@pytest.mark.parametrize("out", ["grid.png", "folder/", "samples.npz"])
def test_sampling_command(run, tmp_path, out):
    out = f"{tmp_path}/{out}"
    options = [
        "--n 5 --batch 2 --steps 3 --label star,3 --guidance 1.5 --guidance-interval -3 3 --no-bf16"
    ]
    call(
        sampling.main,
        run,
        *options,
        "--sampler ddim --grid logsnr --clip dynamic --seed 4 --out",
        out,
    )
    if out.endswith(".png"):
        assert Image.open(out).size == (2 * 34 - 2, 3 * 34 - 2)
    elif out.endswith("/"):
        pictures = np.stack([np.asarray(Image.open(f"{out}{i:06d}.png")) for i in range(5)])
        call(
            sampling.main,
            f"{run}/ckpt_0000006.pt",
            *options,
            "--batch 5 --sampler ddpm --interpolation 1 --out",
            f"{tmp_path}/a.npz",
        )
        call(
            sampling.main,
            run,
            *options,
            "--batch 3 --sampler ddpm --interpolation 1 --out",
            f"{tmp_path}/b.npz",
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
