"""The checks of the coursework. Each is worth one point.

docs/coursework.py grade copies this file into a folder that holds the project with one exercise of
a submission, and runs

    python coursework_checks.py EXERCISE SECONDS

with a secret token on its standard input. The process limits its own time and memory, runs the
checks of the exercise, and writes one line for each to its standard output: the token, the number
of the check, True or False, and what is wrong.

A check imports what it tests inside of its body: no code of a submission runs before the token is
read. The checks are identities and closed forms, so another correct solution passes as well. All of
them take about a second.
"""

import math
import os
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

MEMORY = 2**30  # bytes that the checks of an exercise may allocate
float64 = torch.float64


class Check(NamedTuple):
    exercise: int
    name: str
    function: Callable


CHECKS = []


def check(exercise, name):
    """A decorator that adds a function to CHECKS. The function raises if the check fails."""

    def add(function):
        CHECKS.append(Check(exercise, name, function))
        return function

    return add


# ---------------------------------------------------------------- comparing


def expect(actual, expected, tolerance=1e-9):
    """Raise AssertionError unless a tensor has the expected shape and values."""
    # A tensor of a class of its own could claim to equal anything.
    require(type(actual) is torch.Tensor, f"expected a tensor, got {type(actual).__name__}")
    shapes = [tuple(actual.shape), tuple(expected.shape)]
    require(shapes[0] == shapes[1], f"expected shape {shapes[1]}, got {shapes[0]}")
    values = [x.detach().double().flatten().tolist() for x in (actual, expected)]
    for got, wanted in zip(*values):
        # "not <=" is also true for NaN.
        if not abs(got - wanted) <= tolerance:
            digits = 5 if abs(got - wanted) > 1e-3 * abs(wanted) else 10
            raise AssertionError(f"expected {wanted:.{digits}g}, got {got:.{digits}g}")


def require(condition, message):
    """Raise AssertionError with the message unless the condition is true."""
    if condition is not True:
        raise AssertionError(message)


def expect_value_error(function, *args, **options):
    """Raise AssertionError unless the call raises ValueError."""
    try:
        function(*args, **options)
    except ValueError:
        return
    raise AssertionError("expected a ValueError")


def checks_that_fail():
    """Return checks that fail, unless a submission has replaced what compares results."""
    functions = [
        lambda: expect(tensor(1.0), tensor(0.0)),
        lambda: expect(tensor(math.nan), tensor(0.0)),
        lambda: require(False, "must fail"),
        lambda: expect_value_error(tensor, 0.0),
    ]
    return [Check(0, "must fail", function) for function in functions]


# ---------------------------------------------------------------- inputs

# Two noise levels with simple numbers: alpha = 0.8 and sigma = 0.6, and the other way round.
LOW_NOISE = 2 * math.log(0.8 / 0.6)
HIGH_NOISE = 2 * math.log(0.6 / 0.8)


def tensor(*values):
    """A float64 tensor: a scalar for one number, and otherwise one axis."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=float64)


def random(*shape):
    """The same standard normal numbers on each call, float64."""
    return torch.randn(*shape, dtype=float64, generator=torch.Generator().manual_seed(0))


def batch_of_two_levels():
    """Return x, eps (2, 2, 2, 2) and logsnr (2,): one image at low and one at high noise.

    All axes have the same length. A logsnr that is not reshaped then broadcasts along the wrong
    axis without an error.
    """
    x, eps = random(2, 2, 2, 2, 2)
    return x, eps, tensor(LOW_NOISE, HIGH_NOISE)


def alpha_sigma_numbers(logsnr):
    """alpha and sigma as Python floats, from alpha^2 + sigma^2 = 1 and alpha / sigma."""
    ratio = math.exp(logsnr / 2)
    return ratio / math.hypot(1, ratio), 1 / math.hypot(1, ratio)


def constant_images(value, side=8, batch=2):
    """Images (batch, 3, side, side) of one value, float64."""
    return torch.full((batch, 3, side, side), value, dtype=float64)


# ---------------------------------------------------------------- 1: the cosine schedule


@check(1, "values at t = 0, 0.1, 0.25, 0.5, 0.75, 0.9, 1")
def cosine_values():
    from schedule import logsnr_schedule_cosine

    t = tensor(0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    # Without truncation the second value is 3.686.
    expect(
        logsnr_schedule_cosine(t),
        tensor(15, 3.6797, 1.7612, 0, -1.7612, -3.6797, -15),
        tolerance=5e-4,
    )


@check(1, "the limits are reached at t = 0 and t = 1")
def cosine_limits():
    from schedule import logsnr_schedule_cosine

    t = tensor(0, 1)
    expect(logsnr_schedule_cosine(t), tensor(15, -15), 1e-6)
    expect(logsnr_schedule_cosine(t, logsnr_min=-8, logsnr_max=12), tensor(12, -8), 1e-6)


@check(1, "the schedule falls, and is symmetric about t = 0.5")
def cosine_falls():
    from schedule import logsnr_schedule_cosine

    t = torch.linspace(0, 1, 1001, dtype=float64)
    logsnr = logsnr_schedule_cosine(t)
    require((logsnr.diff() < 0).all().item(), "logsnr rises")
    expect(logsnr, -logsnr_schedule_cosine(1 - t), 1e-6)


@check(1, "numbers and tensors of any shape; float64 stays float64")
def cosine_types():
    from schedule import logsnr_schedule_cosine

    expect(logsnr_schedule_cosine(0.5), torch.tensor(0.0), 1e-5)
    expect(logsnr_schedule_cosine(torch.full((2, 3), 0.5)), torch.zeros(2, 3), 1e-5)
    for dtype in (torch.float32, float64):
        logsnr = logsnr_schedule_cosine(torch.tensor([0.3], dtype=dtype))
        require(logsnr.dtype == dtype, f"{dtype} becomes {logsnr.dtype}")


@check(1, "the gradient flows to t")
def cosine_gradient():
    from schedule import logsnr_schedule_cosine

    t = tensor(0.5).requires_grad_()
    logsnr_schedule_cosine(t).backward()
    # -2 log tan(angle) has slope -4 at the angle pi / 4. The angles span t_max - t_min.
    span = math.atan(math.exp(7.5)) - math.atan(math.exp(-7.5))
    expect(t.grad, tensor(-4 * span), 1e-6)


# ---------------------------------------------------------------- 2: the shift


@check(2, "at t = 0.5, logsnr is that of the shift alone")
def shift_at_half_time():
    from schedule import logsnr_schedule_cosine_shifted

    for image_d, noise_d, expected in ((256, 64, -2.772589), (512, 32, -5.545177)):
        logsnr = logsnr_schedule_cosine_shifted(tensor(0.5), image_d, noise_d)
        expect(logsnr, tensor(expected), 1e-5)


@check(2, "without a change of size, it is the cosine schedule")
def shift_to_the_same_size():
    from schedule import logsnr_schedule_cosine, logsnr_schedule_cosine_shifted

    t = torch.linspace(0, 1, 11, dtype=float64)
    expect(logsnr_schedule_cosine_shifted(t, 64, 64), logsnr_schedule_cosine(t), 1e-9)
    limits = dict(logsnr_min=-8, logsnr_max=12)
    shifted = logsnr_schedule_cosine_shifted(t, 64, 64, **limits)
    expect(shifted, logsnr_schedule_cosine(t, **limits), 1e-9)


@check(2, "the shift is added after truncation: the limits move, too")
def shift_moves_the_limits():
    from schedule import logsnr_schedule_cosine_shifted

    t = tensor(0, 0.1, 1)
    # The middle value is 3.6797 - 2.7726. A shift before truncation gives another one.
    expect(logsnr_schedule_cosine_shifted(t, 256, 64), tensor(12.2274, 0.9072, -17.7726), 1e-3)


@check(2, "averaged noise has the SNR of the reference schedule (Eq. 4)")
def shift_as_measured():
    from schedule import diffuse, logsnr_schedule_cosine, logsnr_schedule_cosine_shifted

    for t in (tensor(0.2), tensor(0.6)):
        logsnr = logsnr_schedule_cosine_shifted(t, 128, 32).reshape(1)
        # A white image plus noise, averaged over 4 x 4 pixels. 16 x 32 x 32 averages give its
        # SNR to about 1 %.
        x = torch.ones(1, 16, 128, 128, dtype=float64)
        pooled = F.avg_pool2d(diffuse(x, random(1, 16, 128, 128), logsnr), 4)
        measured = (pooled.mean().square() / pooled.var()).log()
        expect(measured, logsnr_schedule_cosine(t), 0.1)


@check(2, "numbers, tensors of any shape, and gradients")
def shift_types():
    from schedule import logsnr_schedule_cosine_shifted

    expect(logsnr_schedule_cosine_shifted(0.5, 64, 64), torch.tensor(0.0), 1e-5)
    t = torch.full((2, 3), 0.5, dtype=float64, requires_grad=True)
    logsnr_schedule_cosine_shifted(t, 256, 64).sum().backward()
    expect(t.grad, torch.full((2, 3), -6.2788, dtype=float64), 1e-3)


# ---------------------------------------------------------------- 3: diffuse and v


@check(3, "alpha_sigma: values, alpha^2 + sigma^2 = 1, alpha^2 / sigma^2 = SNR")
def alpha_sigma_values():
    from schedule import alpha_sigma

    alpha, sigma = alpha_sigma(tensor(LOW_NOISE, HIGH_NOISE))
    expect(alpha, tensor(0.8, 0.6))
    expect(sigma, tensor(0.6, 0.8))
    logsnr = torch.linspace(-20, 20, 41, dtype=float64)
    alpha, sigma = alpha_sigma(logsnr)
    expect(alpha.square() + sigma.square(), torch.ones(41))
    expect(2 * (alpha.log() - sigma.log()), logsnr, 1e-6)


@check(3, "alpha_sigma: precise in float32 when nearly no noise, or nearly no signal, is left")
def alpha_sigma_precision():
    from schedule import alpha_sigma

    for logsnr in (20.0, -20.0):
        alpha, sigma = alpha_sigma(torch.tensor(logsnr))
        # The smaller one is exp(-10). The root of 1 minus the square of the other would be 0.
        smaller = sigma if logsnr > 0 else alpha
        expect(smaller * math.exp(10), torch.tensor(1.0), 1e-4)


@check(3, "alpha_sigma: broadcasts against like")
def alpha_sigma_broadcasts():
    from schedule import alpha_sigma

    for scale, expected in zip(
        alpha_sigma(tensor(LOW_NOISE, HIGH_NOISE), like=torch.zeros(2, 3, 4, 5)),
        (tensor(0.8, 0.6), tensor(0.6, 0.8)),
    ):
        expect(scale, expected.reshape(2, 1, 1, 1))
    alpha, _ = alpha_sigma(tensor(LOW_NOISE), like=torch.zeros(2, 3))
    expect(alpha, tensor(0.8).reshape(1, 1))


@check(3, "diffuse")
def diffuse_values():
    from schedule import diffuse

    x, eps, logsnr = batch_of_two_levels()
    expected = torch.stack([0.8 * x[0] + 0.6 * eps[0], 0.6 * x[1] + 0.8 * eps[1]])
    expect(diffuse(x, eps, logsnr), expected)


@check(3, "v_from_x_eps")
def v_values():
    from schedule import v_from_x_eps

    x, eps, logsnr = batch_of_two_levels()
    expected = torch.stack([0.8 * eps[0] - 0.6 * x[0], 0.6 * eps[1] - 0.8 * x[1]])
    expect(v_from_x_eps(x, eps, logsnr), expected)


def z_and_v(x, eps):
    """z and v of batch_of_two_levels, computed by hand."""
    z = torch.stack([0.8 * x[0] + 0.6 * eps[0], 0.6 * x[1] + 0.8 * eps[1]])
    v = torch.stack([0.8 * eps[0] - 0.6 * x[0], 0.6 * eps[1] - 0.8 * x[1]])
    return z, v


@check(3, "x_from_v recovers x")
def x_is_recovered():
    from schedule import x_from_v

    x, eps, logsnr = batch_of_two_levels()
    expect(x_from_v(*z_and_v(x, eps), logsnr), x)


@check(3, "eps_from_v recovers eps")
def eps_is_recovered():
    from schedule import eps_from_v

    x, eps, logsnr = batch_of_two_levels()
    expect(eps_from_v(*z_and_v(x, eps), logsnr), eps)


# ---------------------------------------------------------------- 4: the loss


def loss_of(v_hat, x, eps, **options):
    """diffusion_loss at alpha = 0.8 and sigma = 0.6, for a net with a constant output."""
    from loss import diffusion_loss

    def net(z, logsnr, label):
        return torch.full_like(z, v_hat)

    def schedule(t):
        return torch.full_like(t, LOW_NOISE)

    t = torch.full((len(x),), 0.3, dtype=float64)
    loss, _ = diffusion_loss(net, x, schedule, t=t, eps=eps, **options)
    return loss


@check(4, "a perfect net has loss 0 in both spaces")
def loss_of_a_perfect_net():
    x, eps = constant_images(0.5), constant_images(1.5)
    for space in ("eps", "v"):
        expect(loss_of(0.8 * 1.5 - 0.6 * 0.5, x, eps, space=space), tensor(0, 0))


@check(4, "the eps loss is the mean of (eps - eps_hat)^2, with eps_hat from v_hat")
def loss_in_eps_space():
    zero, one = constant_images(0.0), constant_images(1.0)
    # x = 1, eps = 0: z = 0.8, and eps_hat = 0.6 z + 0.8 v_hat.
    expect(loss_of(0.0, one, zero), tensor(0.48**2, 0.48**2))
    expect(loss_of(1.0, one, zero), tensor(1.28**2, 1.28**2))
    # x = 0, eps = 1: z = 0.6, and eps_hat = 0.36 + 0.8 v_hat.
    expect(loss_of(0.0, zero, one), tensor(0.64**2, 0.64**2))


@check(4, "the v loss is the mean of (v - v_hat)^2")
def loss_in_v_space():
    zero, one = constant_images(0.0), constant_images(1.0)
    expect(loss_of(0.0, one, zero, space="v"), tensor(0.36, 0.36))
    expect(loss_of(1.0, zero, one, space="v"), tensor(0.04, 0.04))


@check(4, "multiscale is passed on")
def loss_at_several_scales():
    # At 64 pixels, a constant error counts once at 64 and twice at 32.
    x, eps = constant_images(1.0, side=64), constant_images(0.0, side=64)
    expect(loss_of(0.0, x, eps, multiscale=True), tensor(3 * 0.48**2, 3 * 0.48**2))
    expect(loss_of(0.0, x, eps, multiscale=True, space="v"), tensor(3 * 0.36, 3 * 0.36))


@check(4, "the net sees z, the noise level and the label of each image")
def loss_calls_the_net():
    from loss import diffusion_loss

    x, eps, logsnr = batch_of_two_levels()
    t = tensor(0.25, 0.75)
    label = torch.tensor([3, 5])
    calls = []

    def net(z, logsnr, label):
        calls.append((z, logsnr, label))
        return torch.zeros_like(z)

    def schedule(t):
        return LOW_NOISE + (t - 0.25) / 0.5 * (HIGH_NOISE - LOW_NOISE)

    loss, returned = diffusion_loss(net, x, schedule, label, space="v", t=t, eps=eps)
    z, v = z_and_v(x, eps)
    expect(calls[0][0], z)
    expect(calls[0][1], logsnr)
    expect(calls[0][2], label)
    expect(returned, logsnr)
    expect(loss, v.square().mean((1, 2, 3)))


@check(4, "by default, each image has its own t and eps")
def loss_draws_noise():
    from loss import diffusion_loss

    torch.manual_seed(0)
    levels = []

    def net(z, logsnr, label):
        levels.append(logsnr)
        # z is pure noise times sigma. This returns v = alpha eps.
        return z / torch.exp(-logsnr / 2).reshape(-1, 1, 1, 1) + 1

    x = torch.zeros(512, 3, 4, 4)
    loss, logsnr = diffusion_loss(net, x, lambda t: 10 * (0.5 - t), None, space="v")
    expect(loss, torch.ones(512), 1e-3)
    t = 0.5 - logsnr / 10
    require((t.min() >= 0).item() and (t.max() <= 1).item(), "t is outside of [0, 1]")
    # Uniform numbers have mean 1/2 and variance 1/12. The images differ in t.
    expect(t.mean(), torch.tensor(0.5), 0.06)
    expect(t.var(), torch.tensor(1 / 12), 0.02)

    # A net that returns 0 has the loss v^2 = alpha^2 eps^2, which is normal noise.
    loss, _ = diffusion_loss(
        lambda z, logsnr, label: torch.zeros_like(z), x, lambda t: 0 * t, space="v"
    )
    expect(loss.mean(), torch.tensor(0.5), 0.05)
    # The mean of 48 squares of normal numbers has the variance 2 / 48; alpha^2 is 1 / 2. Noise that
    # images, channels or pixels share would give another one.
    expect(loss.var(), torch.tensor(0.25 * 2 / 48), 0.003)

    # Another call draws other times.
    _, other = diffusion_loss(
        lambda z, logsnr, label: torch.zeros_like(z), x, lambda t: 10 * (0.5 - t), space="v"
    )
    require(not torch.equal(logsnr, other), "t is the same in every call")


@check(4, "the gradient flows to the net; other spaces raise ValueError")
def loss_gradient():
    from loss import diffusion_loss

    weight = tensor(0.0).requires_grad_()
    x, eps, t = constant_images(1.0), constant_images(0.0), tensor(0.3, 0.3)

    def net(z, logsnr, label):
        return weight.expand_as(z)

    def schedule(t):
        return torch.full_like(t, LOW_NOISE)

    loss, _ = diffusion_loss(net, x, schedule, t=t, eps=eps)
    loss.mean().backward()
    # The derivative of (0.48 + 0.8 weight)^2 at 0.
    expect(weight.grad, tensor(2 * 0.48 * 0.8))
    expect_value_error(diffusion_loss, net, x, schedule, space="x", t=t, eps=eps)


# ---------------------------------------------------------------- 5: the multiscale loss


@check(5, "a constant error counts at every scale, with weight d / s")
def multiscale_weights():
    from loss import multiscale_mean_squares

    for side, weights in ((32, 1), (64, 1 + 2), (128, 1 + 2 + 4)):
        error = constant_images(0.5, side)
        expect(multiscale_mean_squares(error), tensor(0.25 * weights, 0.25 * weights))


def checkerboard(side, size):
    """An image (1, 1, side, side) of squares of size x size pixels, alternately 1 and -1."""
    rows = torch.arange(side) // size
    sign = 1 - 2 * ((rows[:, None] + rows) % 2)
    return sign.to(float64)[None, None]


@check(5, "a checkerboard counts only at the scales that resolve it")
def multiscale_pools():
    from loss import multiscale_mean_squares

    for size, expected in ((1, 1), (2, 1 + 2), (4, 1 + 2 + 4)):
        error = checkerboard(128, size)
        expect(multiscale_mean_squares(error), torch.full((1,), float(expected)))


@check(5, "for other shapes, the shorter side counts")
def multiscale_shapes():
    from loss import multiscale_mean_squares

    for height, width in ((64, 96), (96, 64), (64, 128)):
        error = torch.ones(1, 3, height, width, dtype=float64)
        expect(multiscale_mean_squares(error), torch.full((1,), 3.0))

    # Each mean is over a square of pixels: those of a fine checkerboard vanish.
    error = torch.cat([checkerboard(64, 1), checkerboard(64, 1)[..., :32]], 3)
    expect(multiscale_mean_squares(error), torch.full((1,), 1.0))


@check(5, "one loss for each image, with a gradient")
def multiscale_batch():
    from loss import multiscale_mean_squares

    error = torch.stack([torch.full((2, 64, 64), value, dtype=float64) for value in (0, 1, 3)])
    error.requires_grad_()
    loss = multiscale_mean_squares(error)
    expect(loss, tensor(0, 3, 27))
    loss.sum().backward()
    # 3 * 2 * error, spread over the pixels of an image.
    expect(error.grad * error[0].numel(), 6 * error.detach())


@check(5, "sides that cannot be pooled, or below 32, raise ValueError")
def multiscale_errors():
    from loss import multiscale_mean_squares

    for height, width in ((65, 65), (64, 97), (31, 31), (16, 64), (128, 130)):
        expect_value_error(multiscale_mean_squares, torch.zeros(1, 3, height, width))


# ---------------------------------------------------------------- 6: the posterior


def bayes(z, x, logsnr_t, logsnr_s):
    """Return the mean and variance of q(z_s | z_t, x), and the variance of q(z_t | z_s).

    Python floats, by Bayes' rule: the product of q(z_s | x) and q(z_t | z_s), two Gaussians in z_s.
    """
    alpha_t, sigma_t = alpha_sigma_numbers(logsnr_t)
    alpha_s, sigma_s = alpha_sigma_numbers(logsnr_s)
    alpha_ts = alpha_t / alpha_s
    variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    precision = 1 / sigma_s**2 + alpha_ts**2 / variance_ts
    mean = (alpha_s * x / sigma_s**2 + alpha_ts * z / variance_ts) / precision
    return mean, 1 / precision, variance_ts


# Some pairs of noise levels: large and small steps, at high and low noise.
STEPS = [(-3.0, 2.0), (-10.0, -9.0), (0.0, 0.2), (4.0, 9.0)]


def posterior_numbers(z, x, logsnr_t, logsnr_s):
    """posterior() for one pixel: three scalar tensors."""
    from schedule import posterior

    levels = [tensor(logsnr).reshape(1) for logsnr in (logsnr_t, logsnr_s)]
    pixels = [tensor(value).reshape(1, 1, 1, 1) for value in (z, x)]
    return [result.reshape(()) for result in posterior(*pixels, *levels)]


@check(6, "the mean, as Bayes' rule gives it")
def posterior_mean():
    for logsnr_t, logsnr_s in STEPS:
        for z, x in ((1.0, 0.0), (0.0, 1.0), (-0.7, 0.4)):
            mean, _, _ = posterior_numbers(z, x, logsnr_t, logsnr_s)
            expect(mean, tensor(bayes(z, x, logsnr_t, logsnr_s)[0]), 1e-6)


@check(6, "the lower log-variance, that of q(z_s | z_t, x)")
def posterior_lower_bound():
    for logsnr_t, logsnr_s in STEPS:
        _, log_var_min, _ = posterior_numbers(0.3, 0.5, logsnr_t, logsnr_s)
        expect(log_var_min, tensor(bayes(0.3, 0.5, logsnr_t, logsnr_s)[1]).log(), 1e-6)


@check(6, "the upper log-variance, that of q(z_t | z_s)")
def posterior_upper_bound():
    for logsnr_t, logsnr_s in STEPS:
        _, _, log_var_max = posterior_numbers(0.3, 0.5, logsnr_t, logsnr_s)
        expect(log_var_max, tensor(bayes(0.3, 0.5, logsnr_t, logsnr_s)[2]).log(), 1e-6)


@check(6, "averaged over z_t, it is q(z_s | x)")
def posterior_marginal():
    for logsnr_t, logsnr_s in STEPS:
        # The mean is linear: a z + b x.
        a, log_var_min, _ = posterior_numbers(1.0, 0.0, logsnr_t, logsnr_s)
        b, _, _ = posterior_numbers(0.0, 1.0, logsnr_t, logsnr_s)
        alpha_t, sigma_t = alpha_sigma_numbers(logsnr_t)
        alpha_s, sigma_s = alpha_sigma_numbers(logsnr_s)
        expect(a * alpha_t + b, tensor(alpha_s), 1e-6)
        expect(a**2 * sigma_t**2 + log_var_min.exp(), tensor(sigma_s**2), 1e-6)


@check(6, "each image has its own noise levels")
def posterior_batch():
    from schedule import posterior

    z, x, logsnr_t = batch_of_two_levels()
    logsnr_s = logsnr_t + tensor(1.0, 3.0)
    mean, log_var_min, log_var_max = posterior(z, x, logsnr_t, logsnr_s)
    for i, levels in enumerate(zip(logsnr_t.tolist(), logsnr_s.tolist())):
        by_hand = [bayes(*pair, *levels)[0] for pair in zip(*(y[i].flatten() for y in (z, x)))]
        expect(mean[i].flatten(), tensor(*by_hand), 1e-6)
        _, smaller, larger = bayes(0.0, 0.0, *levels)
        expect(log_var_min.flatten()[i], tensor(smaller).log(), 1e-6)
        expect(log_var_max.flatten()[i], tensor(larger).log(), 1e-6)


@check(6, "precise in float32 for small steps, and finite for large ones")
def posterior_precision():
    from schedule import posterior

    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    # A step of 1e-6 in logsnr at alpha = sigma. 1 - exp(-1e-6) in float32 is 5 % off.
    _, log_var_min, _ = posterior(zero, one, torch.zeros(1), torch.full((1,), 1e-6))
    expect(log_var_min.reshape(1), torch.tensor([math.log(1e-6) - math.log(2)]), 1e-2)
    results = posterior(one, one, torch.full((1,), -20.0), torch.full((1,), 15.0))
    require(all(result.isfinite().all().item() for result in results), "not finite")


# ---------------------------------------------------------------- 7: a step of DDPM


def ddpm_numbers(z, x_hat, noise, **options):
    """ddpm_step() for one pixel, from high to low noise. Returns a scalar tensor."""
    from sample import ddpm_step

    pixels = [None if y is None else tensor(y).reshape(1, 1, 1, 1) for y in (z, x_hat, noise)]
    levels = tensor(HIGH_NOISE).reshape(1), tensor(LOW_NOISE).reshape(1)
    return ddpm_step(*pixels[:2], *levels, pixels[2], **options).reshape(())


@check(7, "without noise, the mean")
def ddpm_mean():
    for z, x_hat in ((1.0, 0.0), (0.0, 1.0), (-0.7, 0.4)):
        mean, _, _ = bayes(z, x_hat, HIGH_NOISE, LOW_NOISE)
        expect(ddpm_numbers(z, x_hat, None), tensor(mean), 1e-6)


@check(7, "interpolation 0 and 1 give the two bounds of the variance")
def ddpm_bounds():
    mean, smaller, larger = bayes(0.3, 0.5, HIGH_NOISE, LOW_NOISE)
    for interpolation, variance in ((0.0, smaller), (1.0, larger)):
        for noise in (1.0, -2.0):
            z_s = ddpm_numbers(0.3, 0.5, noise, interpolation=interpolation)
            expect(z_s, tensor(mean + noise * variance**0.5), 1e-6)


@check(7, "between them, logarithms are interpolated; the default is 0.2")
def ddpm_interpolation():
    mean, smaller, larger = bayes(0.3, 0.5, HIGH_NOISE, LOW_NOISE)
    half = (smaller * larger) ** 0.25  # the standard deviation
    expect(ddpm_numbers(0.3, 0.5, 1.0, interpolation=0.5), tensor(mean + half), 1e-6)
    fifth = (smaller**0.8 * larger**0.2) ** 0.5
    expect(ddpm_numbers(0.3, 0.5, 1.0), tensor(mean + fifth), 1e-6)


@check(7, "with the true x, z_s has the distribution q(z_s | x)")
def ddpm_marginal():
    # The step is linear: a z + b x + c noise. z_t has the mean alpha_t x and variance sigma_t^2.
    coefficients = [
        ddpm_numbers(*inputs, interpolation=0.0) for inputs in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    a, b, c = (coefficient.item() for coefficient in coefficients)
    expect(tensor(a * 0.6 + b), tensor(0.8), 1e-6)
    expect(tensor(a**2 * 0.8**2 + c**2), tensor(0.6**2), 1e-6)


# ---------------------------------------------------------------- 8: a step of DDIM


@check(8, "with the true x, the same eps at the lower noise level")
def ddim_pair():
    from sample import ddim_step

    x, eps = random(2, 2, 3, 4, 4)
    levels = torch.full((2,), HIGH_NOISE, dtype=float64), torch.full((2,), LOW_NOISE, dtype=float64)
    z_s = ddim_step(0.6 * x + 0.8 * eps, x, *levels)
    expect(z_s, 0.8 * x + 0.6 * eps, 1e-6)


@check(8, "each image has its own noise levels; scalars hold for all")
def ddim_levels():
    from sample import ddim_step

    x, eps, logsnr_t = batch_of_two_levels()
    z, _ = z_and_v(x, eps)
    expected = torch.stack([0.6 * x[0] + 0.8 * eps[0], 0.8 * x[1] + 0.6 * eps[1]])
    expect(ddim_step(z, x, logsnr_t, logsnr_t.flip(0)), expected, 1e-6)
    z_s = ddim_step(0.6 * x + 0.8 * eps, x, tensor(HIGH_NOISE), tensor(LOW_NOISE))
    expect(z_s, 0.8 * x + 0.6 * eps, 1e-6)


@check(8, "a step of length zero changes nothing")
def ddim_at_rest():
    from sample import ddim_step

    z, x_hat = random(2, 2, 3, 4, 4)
    levels = torch.full((2,), HIGH_NOISE, dtype=float64)
    expect(ddim_step(z, x_hat, levels, levels), z, 1e-6)


@check(8, "with the same x_hat, two steps equal one")
def ddim_two_steps():
    from sample import ddim_step

    z, x_hat = random(2, 2, 3, 4, 4)
    levels = [torch.full((2,), logsnr, dtype=float64) for logsnr in (-2.0, 0.5, 3.0)]
    middle = ddim_step(z, x_hat, levels[0], levels[1])
    two = ddim_step(middle, x_hat, levels[1], levels[2])
    expect(two, ddim_step(z, x_hat, levels[0], levels[2]), 1e-6)


@check(8, "a step to no noise returns x_hat")
def ddim_to_the_end():
    from sample import ddim_step

    z, x_hat = random(2, 2, 3, 4, 4)
    levels = torch.zeros(2, dtype=float64), torch.full((2,), 40.0, dtype=float64)
    expect(ddim_step(z, x_hat, *levels), x_hat, 1e-6)


# ---------------------------------------------------------------- 9: guidance


def guided_result(scale, label=(2, 4), null_label=0):
    """Return z, logsnr and the guided prediction of a net with v_hat = (1 + label) z + logsnr."""
    from sample import guided

    def net(z, logsnr, label):
        label = label.reshape(len(z), -1).sum(1)
        return (1 + label).reshape(-1, 1, 1, 1) * z + logsnr.reshape(-1, 1, 1, 1)

    z, logsnr = random(2, 3, 4, 4), tensor(LOW_NOISE, HIGH_NOISE)
    v_hat = guided(net, scale, null_label)(z, logsnr, torch.tensor(label))
    return z, logsnr.reshape(2, 1, 1, 1), v_hat


# In what follows, the labels are 2 and 4 and the null label is 0: v_cond = (1 + label) z + logsnr,
# and v_uncond = z + logsnr.
LABELS = torch.tensor([2.0, 4.0]).reshape(2, 1, 1, 1)


@check(9, "scale 1 (eta = 0) is the conditional prediction")
def guidance_off():
    z, logsnr, v_hat = guided_result(torch.ones(2, 1, 1, 1, dtype=float64))
    expect(v_hat, (1 + LABELS) * z + logsnr)


@check(9, "scale 0 (eta = -1) is the unconditional prediction")
def guidance_reversed():
    z, logsnr, v_hat = guided_result(0.0)
    expect(v_hat, z + logsnr)


@check(9, "scale 3 (eta = 2) is 3 v_cond - 2 v_uncond")
def guidance_extrapolates():
    z, logsnr, v_hat = guided_result(3.0)
    expect(v_hat, (1 + 3 * LABELS) * z + logsnr)


@check(9, "each image can have its own scale")
def guidance_per_image():
    z, logsnr, v_hat = guided_result(tensor(1.5, 3.0).reshape(2, 1, 1, 1))
    expected = [(1 + 1.5 * 2) * z[0] + logsnr[0], (1 + 3 * 4) * z[1] + logsnr[1]]
    expect(v_hat, torch.stack(expected))


@check(9, "the null label can be a text: a tensor like one label")
def guidance_with_texts():
    texts = ((1, 0, 1), (4, 0, 0))  # the sums are the labels 2 and 4
    z, logsnr, v_hat = guided_result(3.0, texts, torch.tensor([0, 1, 0]))
    # v_uncond = 2 z + logsnr.
    expect(v_hat, (2 + 3 * (LABELS - 1)) * z + logsnr)


# ---------------------------------------------------------------- 10: the 5/3 wavelet


@check(10, "an impulse gives the taps -1/8, 1/4, 3/4 and -1/2, 1")
def wavelet_taps():
    from unet import _lift

    x = torch.eye(16, dtype=float64)
    smooth, detail = _lift(x)
    # Of an impulse at an even place, and at an odd one.
    expect(smooth[8], tensor(0, 0, 0, -1 / 8, 3 / 4, -1 / 8, 0, 0))
    expect(detail[8], tensor(0, 0, 0, -1 / 2, -1 / 2, 0, 0, 0))
    expect(smooth[9], tensor(0, 0, 0, 0, 1 / 4, 1 / 4, 0, 0))
    expect(detail[9], tensor(0, 0, 0, 0, 1, 0, 0, 0))


@check(10, "details of a ramp are 0, except where the signal is mirrored")
def wavelet_of_a_ramp():
    from unet import _lift

    smooth, detail = _lift(torch.arange(8.0, dtype=float64))
    # 6 follows on 7. Zeros, or the start of the signal, would give a detail of 4.
    expect(detail, tensor(0, 0, 0, 1))
    expect(smooth, tensor(0, 2, 4, 6.25))


@check(10, "the first detail is mirrored, too")
def wavelet_at_the_start():
    from unet import _lift

    smooth, _ = _lift(tensor(0, 1, 0, 0, 0, 0))
    expect(smooth, tensor(1 / 2, 1 / 4, 0))
    smooth, detail = _lift(tensor(2, 5))
    expect(smooth, torch.tensor([3.5]))
    expect(detail, torch.tensor([3.0]))


@check(10, "the inverse of impulses")
def wavelet_synthesis():
    from unet import _unlift

    one = torch.zeros(2, 4, dtype=float64)
    one[0, 2] = 1
    zero = torch.zeros(2, 4, dtype=float64)
    expect(_unlift(one, zero)[0], tensor(0, 0, 0, 1 / 2, 1, 1 / 2, 0, 0))
    expect(_unlift(zero, one)[0], tensor(0, 0, 0, -1 / 8, -1 / 4, 3 / 4, -1 / 4, -1 / 4))


@check(10, "the inverse of the wavelet is the signal")
def wavelet_inverse():
    from unet import _lift, _unlift

    for length in (2, 4, 10):
        x = random(2, 3, length)
        expect(_unlift(*_lift(x)), x, 1e-9)


@check(10, "images: bands of a constant image, and the inverse of two levels")
def wavelet_of_images():
    from unet import dwt53, idwt53

    bands = dwt53(constant_images(0.7, batch=1))
    expect(bands[:, :3], torch.full((1, 3, 4, 4), 0.7, dtype=float64))
    expect(bands[:, 3:], torch.zeros(1, 9, 4, 4))
    x = random(2, 3, 8, 12)
    expect(idwt53(dwt53(x, 2), 2), x, 1e-9)


# ---------------------------------------------------------------- 11: FiLM in the ResBlock


def identity_block(film_bias=0.0, film_weight=0.0, **options):
    """A ResBlock of 4 channels whose two convolutions return their input."""
    from unet import ResBlock

    block = ResBlock(4, 4, **options).double()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            nn.init.dirac_(conv.weight)
            conv.bias.zero_()
        block.film.weight.copy_(torch.as_tensor(film_weight))
        block.film.bias.copy_(torch.as_tensor(film_bias))
    return block


def normalize(x):
    """GroupNorm of 4 channels in one group, by its definition. x: (B, 4, H, W)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


@check(11, "a new block is the identity")
def block_at_initialization():
    from unet import ResBlock

    x = random(2, 8, 6, 6)
    expect(ResBlock(8, 4).double()(x, random(2, 4)), x)


@check(11, "scale 0 and shift 0 keep the normalized features: the factor is 1 + scale")
def film_at_zero():
    x, emb = random(2, 4, 6, 6), random(2, 4)
    h = normalize(F.silu(normalize(x)))
    expect(identity_block()(x, emb), x + F.silu(h), 1e-6)


@check(11, "the first half of film(emb) is the scale, the second half the shift")
def film_scales_and_shifts():
    x, emb = random(2, 4, 6, 6), random(2, 4)
    scale, shift = tensor(1.0, -0.5, 0.0, 2.0), tensor(0.1, 0.2, -3.0, 0.0)
    block = identity_block(film_bias=torch.cat([scale, shift]))
    h = normalize(F.silu(normalize(x)))
    h = h * (1 + scale.reshape(1, 4, 1, 1)) + shift.reshape(1, 4, 1, 1)
    expect(block(x, emb), x + F.silu(h), 1e-6)


@check(11, "each image and channel has its own scale and shift, and gradients flow to emb")
def film_per_image():
    # All axes have length 4: a scale that is not reshaped broadcasts without an error.
    x, emb = random(4, 4, 4, 4), random(4, 4).requires_grad_()
    weight = random(8, 4)
    scale, shift = (emb.detach() @ weight.T).reshape(4, 8, 1, 1).split(4, 1)
    h = normalize(F.silu(normalize(x))) * (1 + scale) + shift
    result = identity_block(film_weight=weight)(x, emb)
    expect(result, x + F.silu(h), 1e-6)
    result.square().sum().backward()
    require(emb.grad is not None and emb.grad.any().item(), "no gradient")


@check(11, "a skip is normalized and added, and the sum divided by sqrt(2)")
def block_with_skip():
    x, skip = random(2, 2, 4, 6, 6)
    # Each norm has another weight, so that none can take the place of another.
    block = identity_block(skip=True)
    for norm, weight in ((block.norm1, 2.0), (block.norm_skip, 3.0), (block.norm2, 0.5)):
        nn.init.constant_(norm.weight, weight)
    h = (2 * normalize(x) + 3 * normalize(skip)) / math.sqrt(2)
    expected = x + F.silu(0.5 * normalize(F.silu(h)))
    expect(block(x, random(2, 4), skip), expected, 1e-6)


@check(11, "dropout comes right before the last convolution")
def block_with_dropout():
    # Dropout of all features leaves the bias of the last convolution alone.
    block = identity_block(dropout=1.0, film_bias=tensor(*range(8))).train()
    nn.init.constant_(block.conv2.bias, 0.25)
    x = random(2, 4, 6, 6)
    expect(block(x, random(2, 4)), x + 0.25)

    # Half of the features are dropped in training, after SiLU, and the others doubled.
    torch.manual_seed(0)
    block = identity_block(dropout=0.5)
    full = F.silu(normalize(F.silu(normalize(x))))
    expect(block.eval()(x, random(2, 4)), x + full, 1e-6)
    kept = block.train()(x, random(2, 4)) - x
    dropped = kept.abs() < 1e-9
    expect(kept, torch.where(dropped, 0 * full, 2 * full), 1e-6)
    require(0.3 < dropped.double().mean().item() < 0.7, "not half of the features are dropped")


# ---------------------------------------------------------------- 12: the EMA


def net_of(value):
    """A linear layer and a BatchNorm, float64, whose weights all have one value."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def expect_weights(net, value):
    for parameter in net.parameters():
        expect(parameter.detach(), torch.full(parameter.shape, value, dtype=float64))


@check(12, "decay 0.9: nine tenths are old, one tenth is new")
def ema_of_one_step():
    from train import ema_update

    ema_net = net_of(1.0)
    ema_update(ema_net, net_of(3.0), 0.9)
    expect_weights(ema_net, 1.2)


@check(12, "decay 1 keeps the average, decay 0 takes the network")
def ema_at_the_ends():
    from train import ema_update

    for decay, expected in ((1.0, 1.0), (0.0, 3.0)):
        ema_net = net_of(1.0)
        ema_update(ema_net, net_of(3.0), decay)
        expect_weights(ema_net, expected)


@check(12, "after n steps, the share decay^n of the start is left")
def ema_of_many_steps():
    from train import ema_update

    ema_net, net = net_of(1.0), net_of(0.0)
    for _ in range(20):
        ema_update(ema_net, net, 0.9)
    expect_weights(ema_net, 0.9**20)


@check(12, "the network itself does not change, and the average is updated in place")
def ema_leaves_the_net():
    from train import ema_update

    ema_net, net = net_of(1.0), net_of(3.0)
    before = list(ema_net.parameters())
    ema_update(ema_net, net, 0.9)
    expect_weights(net, 3.0)
    for parameter, same in zip(ema_net.parameters(), before):
        require(parameter is same, "a parameter was replaced")
        require(parameter.grad_fn is None, "gradients were recorded")
    # An average that shares memory with the network would follow its next change.
    ema_update(ema_net, net, 0.0)
    nn.init.zeros_(net[0].weight)
    expect_weights(ema_net, 3.0)


@check(12, "buffers are copied")
def ema_of_buffers():
    from train import ema_update

    ema_net, net = net_of(1.0), net_of(3.0)
    net[1].running_mean.fill_(5.0)
    net[1].num_batches_tracked.fill_(7)
    ema_update(ema_net, net, 0.9)
    expect(ema_net[1].running_mean, tensor(5, 5))
    expect(ema_net[1].num_batches_tracked, torch.tensor(7))


# ---------------------------------------------------------------- the process that runs them


def limit_resources(seconds):
    """Limit the time, memory, files and processes of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        # The time and memory of the imports so far come on top.
        "RLIMIT_CPU": int(sum(os.times()[:2])) + seconds,
        "RLIMIT_AS": virtual_memory() + MEMORY if virtual_memory() else None,
        "RLIMIT_FSIZE": 2**20,  # bytes of a written file
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # no further process and no thread; root is exempt
    }
    for name, limit in limits.items():
        kind = getattr(resource, name, None)
        if kind is None or limit is None:
            continue
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # a lower limit is in force, or the system has none
            continue


def virtual_memory():
    """The address space of this process in bytes, or None where /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def run(check):
    """Run a check. Returns True or False, and what is wrong."""
    try:
        check.function()
    except AssertionError as error:
        return False, str(error) or "AssertionError"
    except BaseException as error:  # also SystemExit, which a submission may raise
        return False, f"{type(error).__name__}: {error}"
    return True, ""


def main():
    exercise, seconds = int(sys.argv[1]), int(sys.argv[2])
    token = sys.stdin.readline().strip()

    # Keep the standard output for the report. What the submission prints goes nowhere.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    # One gradient starts all threads that autograd needs. Afterwards none can be started.
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()
    limit_resources(seconds)

    # A submission that imports __main__, to change the checks, finds an empty module.
    sys.modules["__main__"] = types.ModuleType("__main__")

    # The loop calls nothing that a submission could replace without also passing the decoys.
    checks = [check for check in CHECKS if check.exercise == exercise]
    decoys = checks_that_fail()
    for number, check in enumerate(checks):
        passed, message = run(check)
        for decoy in decoys:
            if run(decoy)[0]:
                passed, message = False, "the submission changes how results are compared"
        report.write(f"{token} {number} {passed} {message:.200}\n")
        report.flush()


if __name__ == "__main__":
    main()
