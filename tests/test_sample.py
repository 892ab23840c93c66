"""Tests of sample.py: samplers against closed forms, guidance, and the command."""

import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import sample as sampling
from sample import ddim_step, ddpm_step, guided, sample, to_uint8
from schedule import (
    alpha_sigma,
    eps_from_v,
    logsnr_schedule_cosine,
    make_schedule,
    posterior,
)
from support import strip as strip_module
from support.checkpoint import load
from tests.helpers import (
    call,
    float64,
    gaussian_net,
    named,
    on_ranks,
    outcome,
    tiny_nets,
    use_aot_eager,
)

COSINE = make_schedule("cosine", 32)

# ---------------------------------------------------------------- samplers against closed forms


def exact_moments(sampler, interpolation, logsnrs, mean, variance):
    """The exact mean and variance of the samples, if images are a scalar Gaussian.

    The state of a sampler is (z, last x_hat). A step is an affine map of the state, plus noise.
    Every formula is the literal one of the papers, not this project's.
    """
    alpha = np.sqrt(1 / (1 + np.exp(-logsnrs)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnrs)))
    state_mean, state_covariance = np.zeros(2), np.diag([1.0, 0.0])
    steps = len(logsnrs) - 1

    # A quantity is a row that multiplies the state, plus a constant.
    z, last_x = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for i in range(steps):
        a_t, s_t = alpha[i], sigma[i]
        a_s, s_s = alpha[i + 1], sigma[i + 1]
        is_last = i == steps - 1

        # The best prediction: x_hat is the mean of x given z.
        gain = a_t * variance / (a_t**2 * variance + s_t**2)
        x, x_constant = gain * z, mean - gain * a_t * mean

        noise = 0.0
        if sampler == "ddpm":
            # Eq. 3 of the paper, with the variance between its two bounds.
            r = np.exp(logsnrs[i] - logsnrs[i + 1])
            row = r * a_s / a_t * z + (1 - r) * a_s * x
            constant = (1 - r) * a_s * x_constant
            upper, lower = (1 - r) * s_t**2, (1 - r) * s_s**2
            if not is_last:
                noise = upper**interpolation * lower ** (1 - interpolation)
        else:
            # DPM-Solver++(2M) extrapolates x_hat, except in its first and its last step.
            d, d_constant = x, x_constant
            if sampler == "dpmpp" and i > 0 and not is_last:
                h = (logsnrs[i + 1] - logsnrs[i]) / 2
                h_last = (logsnrs[i] - logsnrs[i - 1]) / 2
                d = (1 + h / (2 * h_last)) * x - h / (2 * h_last) * last_x
                d_constant = (1 + h / (2 * h_last)) * x_constant
            # DDIM: z_s = alpha_s x_hat + sigma_s eps_hat.
            row = a_s * d + s_s * (z - a_t * d) / s_t
            constant = a_s * d_constant - s_s * a_t * d_constant / s_t

        step = np.stack([row, x])
        state_mean = step @ state_mean + np.array([constant, x_constant])
        state_covariance = step @ state_covariance @ step.T + np.diag([noise, 0.0])
    return state_mean[0], state_covariance[0, 0]


def noise_levels(steps, grid="t"):
    """The logsnr of all steps, (steps + 1,), uniform in t or in logsnr."""
    u = torch.linspace(1, 0, steps + 1, dtype=float64)
    if grid == "t":
        return COSINE(u).numpy()
    first, last = COSINE(torch.tensor([0.0, 1.0], dtype=float64))
    return (first + (last - first) * u).numpy()


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
    # Three channels with different means and variances, and n independent pixels in each.
    n = 20_000
    mean = torch.tensor([0.3, -0.5, 0.0], dtype=float64)
    variance = torch.tensor([0.25, 0.04, 1.0], dtype=float64)
    x = sample(
        gaussian_net(mean[:, None, None], variance[:, None, None]),
        (1, 3, 100, 200),
        COSINE,
        steps=48,
        sampler=sampler,
        grid=grid,
        interpolation=interpolation,
        clip=None,
        dtype=float64,
    )
    pixels = x.flatten(2)[0]
    covariance = torch.cov(pixels)

    # Means and variances may deviate by four standard errors. The channels are independent.
    logsnrs = noise_levels(48, grid)
    expected = [
        exact_moments(sampler, interpolation, logsnrs, *moments)
        for moments in zip(mean.tolist(), variance.tolist())
    ]
    for i, (m, v) in enumerate(expected):
        _, other_v = expected[i - 1]
        assert abs(pixels[i].mean() - m) < 4 * math.sqrt(v / n)
        assert abs(covariance[i, i] - v) < 4 * v * math.sqrt(2 / n)
        assert abs(covariance[i, i - 1]) < 4 * math.sqrt(v * other_v / n)


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
    def error(steps, variance):
        """The relative error of the variance of the samples."""
        logsnrs = noise_levels(steps)
        _, sampled = exact_moments(sampler, interpolation, logsnrs, 0.0, variance)
        return sampled / variance - 1

    for variance, expected in zip((0.25, 0.04), percent):
        assert 100 * error(256, variance) == pytest.approx(expected, abs=0.06)
    assert abs(error(256, 0.25)) < 0.04

    # The samplers are of first order: four times the steps, a quarter of the error.
    assert 3.4 < error(256, 0.25) / error(1024, 0.25) < 4.2


def deterministic_std(sampler, steps, variance=0.25):
    """The standard deviation of a deterministic sampler's output on a Gaussian.

    It is the slope of the output in the initial noise, from two values of it.
    """
    net = gaussian_net(0.0, variance)
    seen = []

    def recorded(z, logsnr, label):
        seen.append(z)
        return net(z, logsnr, label)

    x = sample(
        recorded,
        (1, 1, 1, 2),
        COSINE,
        steps=steps,
        sampler=sampler,
        grid="logsnr",
        clip=None,
        dtype=float64,
    )
    noise = seen[0]
    return ((x[..., 1] - x[..., 0]) / (noise[..., 1] - noise[..., 0])).item()


@pytest.mark.parametrize("sampler, low, high", [("ddim", 1.9, 2.1), ("dpmpp", 3.8, 4.2)])
def test_order_of_convergence(sampler, low, high):
    errors = [abs(deterministic_std(sampler, steps) / 0.5 - 1) for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:]):
        assert low <= coarse / fine <= high, errors


def test_dpmpp_beats_ddim_in_25_steps_on_a_mixture():
    centers = torch.tensor([-0.6, 0.1, 0.7], dtype=float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=float64)
    variance = 0.01

    def net(z, logsnr, label):
        """The exact denoiser of a mixture of three Gaussians."""
        alpha, sigma = alpha_sigma(logsnr, like=z)
        a = alpha[..., None]
        total = (alpha**2 * variance + sigma**2)[..., None]

        # The probability of each Gaussian given z, and the mean of x given both.
        difference = z[..., None] - a * centers
        probabilities = torch.softmax(weights.log() - 0.5 * difference.square() / total, -1)
        means = centers + a * variance / total * difference
        x_hat = (probabilities * means).sum(-1)
        return (alpha * z - x_hat) / sigma

    def draw(sampler, steps):
        options = dict(grid="logsnr", clip=None, dtype=float64)
        return sample(net, (1, 1, 50, 50), COSINE, steps=steps, sampler=sampler, **options)

    exact = draw("dpmpp", 4096)
    ddim_error = (draw("ddim", 25) - exact).square().mean().sqrt()
    dpmpp_error = (draw("dpmpp", 25) - exact).square().mean().sqrt()
    assert dpmpp_error <= 0.5 * ddim_error


def test_the_last_ddpm_step_returns_the_mean():
    z, x_hat = torch.randn(2, 3, 8)
    logsnr_t, logsnr_s = torch.tensor(-1.0), torch.tensor(2.0)
    mean, _, _ = posterior(z, x_hat, logsnr_t, logsnr_s)
    assert torch.equal(ddpm_step(z, x_hat, logsnr_t, logsnr_s), mean)

    # sample_ddpm draws no noise for its last step.
    calls = []

    def draw_noise():
        calls.append(1)
        return torch.randn_like(z)

    def net(z, logsnr):
        return 0 * z

    sampling.sample_ddpm([net] * 3, z, torch.tensor([-5.0, -1.0, 2.0, 5.0]), draw_noise)
    assert len(calls) == 2

    # DDIM ends at x_hat itself when no noise is left.
    no_noise = torch.tensor(60.0)
    assert torch.allclose(ddim_step(z, x_hat, logsnr_t, no_noise), x_hat, atol=1e-6)


# ---------------------------------------------------------------- guidance


class CountingNet(nn.Module):
    """A function of z and the label. It records the batch sizes of its calls."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, logsnr, label):
        self.calls.append(len(z))
        return torch.tanh(z) * (1 + label[:, None, None, None]) / 3


def draw_two(net, **options):
    """Two samples of the classes 0 and 2 in 10 steps."""
    label = torch.tensor([0, 2])
    return sample(net, (2, 3, 4, 4), COSINE, steps=10, label=label, **options)


def test_guidance_doubles_the_batch_unless_its_scale_is_one():
    net = CountingNet()
    assert guided(net, 1.0) is net
    plain = draw_two(net)
    assert torch.equal(draw_two(net, guidance=1.0), plain)
    assert net.calls == [2] * 20

    net.calls.clear()
    assert not torch.equal(draw_two(net, guidance=2.0), plain)
    assert net.calls == [4] * 10

    # Guidance without labels has no direction.
    with pytest.raises(ValueError, match="guidance"):
        sample(net, (2, 3, 4, 4), COSINE, guidance=2.0)


def test_guidance_is_linear_in_eps_and_composes():
    net, label = CountingNet(), torch.tensor([0, 2])
    z, logsnr = torch.randn(2, 3, 4, 4), torch.tensor([0.0, 5.0])
    cond = net(z, logsnr, label)
    uncond = net(z, logsnr, torch.full((2,), 3))

    # The paper's formula with eta = 0.5: (1 + eta) eps_cond - eta eps_uncond.
    eps = eps_from_v(z, guided(net, 1.5)(z, logsnr, label), logsnr)
    expected = 1.5 * eps_from_v(z, cond, logsnr) - 0.5 * eps_from_v(z, uncond, logsnr)
    assert torch.allclose(eps, expected, atol=1e-6)

    # A guided net is a net, which can be guided again.
    twice = guided(guided(net, 1.5), 1.5, net.num_classes)(z, logsnr, label)
    assert torch.allclose(twice, uncond + 2.25 * (cond - uncond), atol=1e-6)


def test_guidance_per_image_is_that_of_each_image():
    def net(z, logsnr, label):
        return z * label.reshape(-1, 1, 1, 1) / 10

    options = dict(steps=2, sampler="ddim", label=torch.tensor([3, 3]), null_label=10)
    scales = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    both = sample(net, (2, 3, 8, 8), logsnr_schedule_cosine, guidance=scales, **options)
    for i, scale in enumerate((1.0, 2.0)):
        one = sample(net, (2, 3, 8, 8), logsnr_schedule_cosine, guidance=scale, **options)
        assert torch.allclose(both[i], one[i], atol=1e-6)
    with pytest.raises(ValueError, match="labels"):
        sample(net, (2, 3, 8, 8), logsnr_schedule_cosine, guidance=scales)


def test_guidance_interval_limits_guidance_to_some_steps():
    net = CountingNet()
    draw_two(net, guidance=2.0, guidance_interval=(-2, 2))
    logsnrs = noise_levels(10)[:-1]
    assert net.calls == [4 if -2 <= logsnr <= 2 else 2 for logsnr in logsnrs]

    # An interval without any step is no guidance. One with all steps is full guidance.
    outside = draw_two(net, guidance=2.0, guidance_interval=(20, 30))
    assert torch.equal(outside, draw_two(net))
    everywhere = draw_two(net, guidance=2.0, guidance_interval=(-20, 20))
    assert torch.equal(everywhere, draw_two(net, guidance=2.0))


# ---------------------------------------------------------------- properties of sample()


class ReadCounter(TorchDispatchMode):
    """Counts the operations that read tensors into Python. A GPU would make the CPU wait there."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        if function in reads:
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_no_step_of_sampling_waits_for_the_device(sampler, clip):
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if clip == "dynamic" and version < (2, 13):
        pytest.skip("on a CPU, quantile() of older torch reads its argument to check it")

    # More steps need no more reads.
    counts = []
    for steps in (3, 9):
        with ReadCounter() as reads:
            sample(
                tiny_nets()[0],
                (2, 3, 16, 16),
                COSINE,
                steps=steps,
                sampler=sampler,
                label=torch.tensor([0, 1]),
                guidance=2.0,
                guidance_interval=(-2, 2),
                clip=clip,
            )
        counts.append(reads.count)
    assert counts[0] == counts[1]

    # The counter does see reads.
    with ReadCounter() as reads:
        assert torch.ones(3).any()
        assert torch.ones(()).item()
    assert reads.count == 2


def test_an_image_does_not_depend_on_its_batch():
    net = CountingNet()

    def draw(first, n):
        return draw_numbers(range(first, first + n))

    def draw_numbers(numbers):
        label = torch.tensor(numbers) % 3
        shape = (len(numbers), 3, 4, 4)
        return sample(net, shape, COSINE, steps=5, label=label, seed=7, numbers=numbers)

    assert torch.equal(draw(0, 6), torch.cat([draw(0, 1), draw(1, 3), draw(4, 2)]))
    assert not torch.equal(draw(0, 1), draw(3, 1))
    assert torch.equal(draw_numbers([5, 0, 3]), draw(0, 6)[[5, 0, 3]])

    # By default they are the first images.
    assert torch.equal(draw_two(net, seed=7), draw_two(net, seed=7, numbers=[0, 1]))


def test_a_list_of_numbers_is_drawn_in_full_batches():
    net = CountingNet()
    options = dict(device=torch.device("cpu"), steps=5, seed=7)

    def draw(batch, numbers=None):
        """All rounds of samples for three classes. Returns numbers and samples."""
        label = torch.arange(3).repeat(3) if numbers is None else torch.arange(3)
        rounds = sampling.sample_batches(
            net, (3, 4, 4), COSINE, label, batch, numbers=numbers, **options
        )
        parts, samples = zip(*rounds)
        return [k for part in parts for k in part], torch.cat(samples)

    # Without a list, nine images are spread evenly over three rounds.
    numbers, samples = draw(4)
    assert numbers == list(range(9))
    assert net.calls == 15 * [3]

    # With a list, every batch is full. The label follows from the number, not from the position.
    net.calls.clear()
    numbers, some = draw(4, [8, 1, 3, 4, 6])
    assert numbers == [8, 1, 3, 4, 6]
    assert torch.equal(some, samples[numbers])
    assert net.calls == 10 * [4]
    assert draw(4, range(7, 9))[0] == [7, 8]
    assert not list(sampling.sample_batches(net, (3, 4, 4), COSINE, [0], 4, numbers=[], **options))


def test_clipping():
    x = torch.tensor([[-3.0, 0.5, 2.0, 1.0]])
    assert sampling.clip_x(x, "static").tolist() == [[-1, 0.5, 1, 1]]
    assert torch.equal(sampling.clip_x(x, None), x)

    # Dynamic clipping divides by a quantile of the magnitudes, but not inside the range.
    limit = torch.tensor([0.5, 1.0, 2.0, 3.0]).quantile(0.995).item()
    assert torch.allclose(sampling.clip_x(x, "dynamic"), (x / limit).clamp(-1, 1))
    assert torch.equal(sampling.clip_x(x / 4, "dynamic"), x / 4)


def test_rounding():
    # All 256 levels survive the conversion to floats and back. Floats are not converted.
    levels = torch.arange(256)
    images = levels.to(torch.uint8)
    assert torch.equal(to_uint8(levels / 127.5 - 1), images)
    assert torch.equal(to_uint8(sampling.to_float(images)), images)
    x = torch.tensor([[-3.0, 0.5, 2.0, 1.0]])
    assert sampling.to_float(x) is x

    # Values are rounded to the nearest level, and clipped to the range.
    values = torch.tensor([-2.0, -0.9930, 2.0, (200.4 / 127.5) - 1, (200.6 / 127.5) - 1])
    assert to_uint8(values).tolist() == [0, 1, 255, 200, 201]


@pytest.mark.parametrize("option", [dict(sampler="euler"), dict(grid="sigma"), dict(clip="tanh")])
def test_unknown_names_are_rejected(option):
    with pytest.raises(ValueError, match=named(*option.values())):
        sample(CountingNet(), (1, 3, 4, 4), COSINE, **option)


def test_seeds_differ():
    tuples = [(), (0,), (0, 0), (0, 0, 0), (5,), (5, 0), (0, 5), (0, 5, 0), (1, 5), (5, 1)]
    assert len({sampling.mix_seed(*integers) for integers in tuples}) == len(tuples)

    # 100,000 examples (seed, step, position): with 32 bits, two of them would share their noise
    # with a probability of 69 %.
    triples = itertools.product((0, 1), range(500), range(100))
    assert len({sampling.mix_seed(*triple) for triple in triples}) == 100_000

    # The lower half, which the generator of a CPU uses, is that of 32-bit seeds.
    words = np.random.SeedSequence((5, 7, 9, 1)).generate_state(1)
    assert sampling.mix_seed(5, 7, 9) % 2**32 == words[0]


# ---------------------------------------------------------------- the command


def test_two_ranks_sample_the_same_as_one(run, tmp_path):
    options = "--number 7 --batch 2 --steps 3 --no-bf16 --device cpu"
    call(sampling.main, run, options, "--out", tmp_path / "one.npz")
    for out in ("two.npz", "two/"):
        statuses, output, errors = on_ranks(sampling.main, run, options, "--out", out, cwd=tmp_path)
        assert statuses == [0, 0], errors
        # Only one rank reports that it wrote 7 images.
        assert len(re.findall(rf"(?m)^wrote 7 .*{out}", output)) == 1
        assert "100 %" in errors

    # A pixel may be rounded to the next level.
    one = np.load(tmp_path / "one.npz")
    two = np.load(tmp_path / "two.npz")
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert np.array_equal(one["y"], two["y"])

    # The folder holds the same images as the file.
    images = fid.ImageReader(tmp_path / "two")
    assert len(images) == 7
    for image, expected in zip(images, two["arr_0"], strict=True):
        assert np.array_equal(image, expected)


def test_compiled_sampling_draws_the_same_images(run, tmp_path, monkeypatch):
    use_aot_eager(monkeypatch)
    options = "--n 3 --batch 2 --steps 2 --no-bf16"
    call(sampling.main, run, options, "--no-compile --out", tmp_path / "plain.npz")
    call(sampling.main, run, options, "--compile --out", tmp_path / "compiled.npz")
    plain = np.load(tmp_path / "plain.npz")["arr_0"].astype(int)
    compiled = np.load(tmp_path / "compiled.npz")["arr_0"].astype(int)
    assert len(plain) == 3
    assert abs(plain - compiled).max() <= 1


def test_compilation_must_pay_off():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    # 256 steps of one batch of 64 images, and of 12 batches.
    assert not sampling.wants_compile(None, gpu, 256)
    assert sampling.wants_compile(None, gpu, 12 * 256)
    assert not sampling.wants_compile(None, cpu, 10**6)
    for option in (True, False):
        for device in (gpu, cpu):
            assert sampling.wants_compile(option, device, 5000) == option


FIVE = "--n 5 --batch 2 --steps 3 --label star,3 --guidance 1.5 --guidance-interval -3 3 --no-bf16"
DDIM = "--sampler ddim --grid logsnr --clip dynamic --seed 4"


def test_the_command_draws_a_grid(run, tmp_path):
    call(sampling.main, run, FIVE, DDIM, "--out", tmp_path / "grid.png")
    # Two columns and three rows of 32 pixels, with gaps of 2.
    assert Image.open(tmp_path / "grid.png").size == (2 * 34 - 2, 3 * 34 - 2)


def test_the_command_writes_an_npz_file(run, tmp_path):
    call(sampling.main, run, FIVE, DDIM, "--out", tmp_path / "samples.npz")
    data = np.load(tmp_path / "samples.npz")
    assert data["arr_0"].shape == (5, 32, 32, 3)
    assert data["arr_0"].dtype == np.uint8
    assert data["y"].tolist() == [7, 3, 7, 3, 7]


def test_the_command_writes_a_folder(run, tmp_path):
    call(sampling.main, run, FIVE, DDIM, "--out", f"{tmp_path}/folder/")
    paths = [tmp_path / "folder" / f"{i:06d}.png" for i in range(5)]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])

    # A checkpoint is the same as its run, with any batch size.
    ddpm = "--sampler ddpm --interpolation 1"
    checkpoint = f"{run}/ckpt_0000006.pt"
    call(sampling.main, checkpoint, FIVE, ddpm, "--batch 5 --out", tmp_path / "a.npz")
    call(sampling.main, run, FIVE, ddpm, "--batch 3 --out", tmp_path / "b.npz")
    a = np.load(tmp_path / "a.npz")["arr_0"]
    b = np.load(tmp_path / "b.npz")["arr_0"]
    assert abs(a.astype(int) - b).max() <= 1

    # --interpolation changes the images, and so does the sampler.
    call(sampling.main, run, FIVE, "--sampler ddpm --batch 3 --out", tmp_path / "c.npz")
    c = np.load(tmp_path / "c.npz")["arr_0"]
    assert abs(a.astype(int) - c).max() > 1
    assert abs(a.astype(int) - images).max() > 1


# ---------------------------------------------------------------- denoising strips


def test_recording_changes_no_sample(run):
    net, config, schedule = load(run)
    label = torch.tensor([7, 1, 7])
    options = dict(label=label, guidance=2.0, null_label=10, guidance_interval=(-3, 3), seed=5)
    for sampler, steps in itertools.product(sampling.SAMPLERS, (1, 8, 20)):
        options |= dict(sampler=sampler, steps=steps)
        samples, records = strip_module.record_steps(net, (3, 3, 32, 32), schedule, **options)
        assert torch.equal(samples, sample(net, (3, 3, 32, 32), schedule, **options))
        assert list(records) == strip_module.choose_steps(steps)

        # The first z is pure noise, at t = 1. The last prediction is the sample.
        logsnr, z, x_hat = records[0]
        assert logsnr == pytest.approx(schedule(torch.tensor(1.0)).item(), abs=0.01)
        assert z.std().item() == pytest.approx(1, abs=0.1)
        assert max(x_hat.abs().max() for _, _, x_hat in records.values()) <= 1
        if steps > 1:
            torch.testing.assert_close(records[steps - 1][2], samples, atol=0.02, rtol=0)


def test_records_are_z_and_x_hat_of_the_process():
    # For images that are 0.5 everywhere, the exact net predicts 0.5 at every step. DDIM keeps the
    # noise, so z_t = 0.5 alpha_t + sigma_t eps with one eps.
    net = gaussian_net(0.5, 1e-9)
    options = dict(steps=12, sampler="ddim", dtype=float64)
    _, records = strip_module.record_steps(net, (1, 3, 4, 4), COSINE, **options)
    _, first, _ = records[0]
    for logsnr, z, x_hat in records.values():
        alpha, sigma = alpha_sigma(torch.tensor(logsnr, dtype=float64))
        torch.testing.assert_close(x_hat, torch.full_like(z, 0.5), atol=1e-6, rtol=0)
        start = alpha_sigma(torch.tensor(records[0][0], dtype=float64))
        eps = (first - 0.5 * start[0]) / start[1]
        torch.testing.assert_close(z, 0.5 * alpha + sigma * eps, atol=1e-6, rtol=0)


def test_steps_of_a_strip_are_evenly_spaced():
    assert strip_module.choose_steps(256, 9) == [0, 32, 64, 96, 128, 159, 191, 223, 255]
    assert strip_module.choose_steps(3, 9) == [0, 1, 2]
    assert strip_module.choose_steps(1, 9) == [0]


def strip_tile(strip, column, top, side):
    """A tile of a strip of images that are 32 pixels wide, as an array of its pixels."""
    left = strip_module.LEFT + column * (side + 8)
    return np.asarray(strip.crop((left, top, left + side, top + side)))[
        :: side // 32, :: side // 32
    ]


def test_the_command_draws_a_strip(run, tmp_path, capsys):
    options = "--first 3 --steps 12 --guidance 1.5 --no-bf16 --seed 4"
    call(sampling.main, run, options, "--strip --n 2 --out", tmp_path / "strip.png")
    assert "strip of 2 images" in capsys.readouterr().out
    strip = Image.open(tmp_path / "strip.png")
    side, top = 160, strip_module.TOP
    pair = 2 * (side + 8) + 16
    assert strip.size == (strip_module.LEFT + 9 * (side + 8) - 8, top + 2 * pair - 24)

    # The tiles are z_t and x_hat of the samples with these numbers.
    net, _, schedule = load(run)
    _, records = strip_module.record_steps(
        net,
        (2, 3, 32, 32),
        schedule,
        steps=12,
        guidance=1.5,
        label=torch.tensor([3, 4]),
        null_label=10,
        numbers=[3, 4],
        seed=4,
    )
    for column, (_, z, x_hat) in enumerate(records.values()):
        for i in range(2):
            shown = strip_tile(strip, column, top + i * pair, side)
            assert np.array_equal(shown, to_uint8(z[i]).permute(1, 2, 0))
            shown = strip_tile(strip, column, top + i * pair + side + 8, side)
            assert np.array_equal(shown, to_uint8(x_hat[i]).permute(1, 2, 0))

    # Four samples by default.
    call(sampling.main, run, "--steps 1 --strip --out", tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").height == top + 4 * pair - 24


@pytest.mark.parametrize("width", [16, 28, 64, 96, 128, 200])
def test_texts_of_a_strip_do_not_overlap(width, monkeypatch):
    z = torch.zeros(2, 3, width, width)
    records = {0: (-15.0, z, z), 9: (-4.0, z, z)}
    boxes = []
    draw = ImageDraw.ImageDraw.text

    def recorded(self, xy, text, fill, font, anchor=None, spacing=4, *args, **options):
        boxes.append(self.multiline_textbbox(xy, text, font, anchor, spacing))
        draw(self, xy, text, fill, font, anchor, spacing, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    for names in (["star", ""], ["a long\nprompt of two lines", 60 * "words "]):
        boxes.clear()
        strip = strip_module.make_strip(records, names, 10)
        assert len(boxes) == 2 + 3 * 2
        for one, other in itertools.combinations(boxes, 2):
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1], (one, other)
        # All of them are inside, and none covers a tile.
        drawn = np.asarray(strip)
        assert all(box[0] >= 0 and box[2] <= strip.width for box in boxes)
        tiles = 2 * 2 * 2 * (-(-strip_module.TILE // width) * width) ** 2
        assert (drawn == 128).all(2).sum() >= tiles


def test_strips_refuse_what_they_cannot_draw(run, tmp_path, monkeypatch):
    png = ["--out", tmp_path / "strip.png"]
    for line, name in (
        (["--out", tmp_path / "strip.npz"], "--out"),
        (["--out", f"{tmp_path}/strip/"], "--out"),
        ([*png, "--n 65"], "--n 65"),
        ([*png, "--n 3 --batch 2"], "--batch 2"),
    ):
        assert name in outcome(sampling.main, [run, "--strip", *line])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in outcome(sampling.main, [run, "--strip", *png])
    assert not os.listdir(tmp_path)


def test_a_grid_draws_no_surplus(run, tmp_path, monkeypatch):
    sizes = []

    def count(net, shape, *args, **options):
        sizes.append(shape[0])
        return torch.zeros(shape)

    monkeypatch.setattr(sampling, "sample", count)
    call(sampling.main, run, "--n 9 --batch 8 --steps 1 --out", tmp_path / "grid.png")
    assert sizes == [5, 5]
    sizes.clear()
    # In a folder, a batch has the same size however many images are missing.
    call(sampling.main, run, "--n 9 --batch 8 --steps 1 --out", f"{tmp_path}/folder/")
    assert sizes == [8, 8]
