"""Tests of related/dit.py."""

import itertools
import json
import math

import pytest
import torch

import train
from related import dit
from related.dit import rope_angles, rotated
from schedule import logsnr_schedule_cosine, posterior, v_from_x_eps
from tests.helpers import call, fill_random, float64, printed_numbers, train_small

# The parameters, counted without the fixed positions.
PARAMETERS = {"S": 32_865_056, "B": 130_315_808, "L": 457_840_672, "XL": 674_834_720}


def test_dit_costs_what_was_published(capsys):
    dit.print_configurations()
    for size, numbers in zip(PARAMETERS, printed_numbers(capsys), strict=True):
        *_, published, published_gmac = dit.SIZES[size]
        parameters, gmac = (next(n for n in numbers if n > 1e6), numbers[-2])
        assert parameters == PARAMETERS[size]
        # The paper rounds to millions, and counts 33 M for S.
        assert parameters / 1e6 == pytest.approx(published, abs=0.51)
        assert gmac == pytest.approx(published_gmac, rel=1e-3)


def norm_by_hand(x, shift, scale):
    """LayerNorm over the last dimension, without weights, and its modulation."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def test_block_by_hand():
    block = fill_random(dit.DiTBlock(8, dit.Attention(8, 2))).double()
    x = torch.randn(2, 12, 8).double()
    condition = torch.randn(2, 8).double()
    grid = (3, 4)

    # Six vectors (B, 1, C) modulate the block.
    silu = condition * torch.sigmoid(condition)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(silu)[:, None].chunk(6, 2)

    # Attention with two heads of four channels.
    h = norm_by_hand(x, shift1, scale1)
    q, k, v = block.attention.qkv(h).chunk(3, 2)
    heads = []
    for first in (0, 4):
        own = slice(first, first + 4)
        weights = torch.softmax(q[:, :, own] @ k[:, :, own].mT / 2, 2)
        heads.append(weights @ v[:, :, own])
    y = x + gate1 * block.attention.proj(torch.cat(heads, 2))

    # DiT's GELU is the approximate one.
    h = block.mlp[0](norm_by_hand(y, shift2, scale2))
    h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(block(x, condition, grid), y + gate2 * block.mlp[2](h))


def test_time_and_its_features():
    # logsnr 20 is time 0, and -20 is time 999.
    time = dit.time_of(torch.tensor([20.0, 0.0, -20.0]).double())
    assert time.tolist() == [0.0, 499.5, 999.0]

    # The cosines come first. The frequencies are 10000^(-i / 128).
    features = dit.time_features(time)
    for i in (0, 1, 64, 127):
        angle = 499.5 * 10000 ** (-i / 128)
        assert features[1, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert features[1, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_dit_is_the_identity_at_init_and_gradients_reach_every_weight():
    torch.manual_seed(0)
    net = dit.DiT((8, 12), num_classes=3, channels=16, depth=2, num_heads=2)
    z = torch.randn(2, 3, 8, 12)
    logsnr = torch.tensor([-4.0, 5.0])

    # At initialization a block is the identity, and v_hat is 0.
    h = torch.randn(2, 24, 16)
    assert torch.equal(net.blocks[0](h, torch.randn(2, 16), (4, 6)), h)
    assert torch.equal(net(z, logsnr), torch.zeros_like(z))

    # All tokens have different positions.
    assert len({tuple(row.tolist()) for row in net.position}) == 24

    # No label is the null label, number 3.
    v_hat = fill_random(net)(z, logsnr, torch.tensor([0, 2]))
    assert v_hat.shape == z.shape
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))

    # All weights get gradients.
    v_hat.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_tokens_become_the_pixels_of_their_patch():
    # A network without blocks, whose head has only biases: number (row, column, channel) of each.
    net = dit.DiT((8, 4), channels=16, depth=0, patch=4, learned_variance=True)
    with torch.no_grad():
        net.head.bias.copy_(torch.arange(4 * 4 * 6))
    out = net.at_time(torch.randn(1, 3, 8, 4), torch.zeros(1))
    row, column, channel = 6, 3, 5
    assert out.shape == (1, 6, 8, 4)
    assert out[0, channel, row, column] == ((row % 4) * 4 + column) * 6 + channel

    # v_hat is the first half; the other half, from -1 to 1, becomes a fraction from 0 to 1.
    z, logsnr = torch.randn(1, 3, 8, 4), torch.zeros(1)
    v_hat, fraction = net(z, logsnr, variance=True)
    assert torch.equal(v_hat, out[:, :3])
    assert torch.equal(net(z, logsnr), out[:, :3])
    torch.testing.assert_close(fraction, (out[:, 3:] + 1) / 2)


def test_bad_sizes_are_rejected():
    for args, message in (
        (dict(res=9), r"\b9x9\b.*\b2\b"),
        (dict(res=8, channels=18), r"\b18\b"),
        (dict(res=8, channels=16, num_heads=3), r"\b16\b.*\b3\b"),
    ):
        with pytest.raises(ValueError, match=message):
            dit.DiT(**args)


# ---------------------------------------------------------------- learned variances


def test_variance_bits_in_closed_form():
    torch.manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 8).double()
    logsnr_t = torch.tensor([-5.0, -1.0, 0.5, 8.0]).double()
    logsnr_s = logsnr_t + torch.tensor([0.01, 0.1, 1.0, 3.0]).double()
    alpha = torch.sigmoid(logsnr_t).sqrt()[:, None, None, None]
    sigma = torch.sigmoid(-logsnr_t).sqrt()[:, None, None, None]
    z = alpha * x + sigma * eps
    v = v_from_x_eps(x, eps, logsnr_t)
    zeros = torch.zeros_like(x)

    # The true image and the lower bound of the variance: this is the true posterior.
    bits = dit.variance_bits(z, x, v, zeros, logsnr_t, logsnr_s)
    torch.testing.assert_close(bits, torch.zeros(4).double(), rtol=0, atol=1e-10)

    # Otherwise it is the KL divergence that torch.distributions computes.
    fraction = torch.rand_like(x) * 2 - 0.5
    v_hat = v + 0.1 * torch.randn_like(v)
    mean, low, high = posterior(z, x, logsnr_t, logsnr_s)
    mean_hat, _, _ = posterior(z, alpha * z - sigma * v_hat, logsnr_t, logsnr_s)
    log_var = low + fraction * (high - low)
    normal = torch.distributions.Normal
    truth = normal(mean, (0.5 * low).exp().expand_as(mean))
    kl = torch.distributions.kl_divergence(truth, normal(mean_hat, (0.5 * log_var).exp()))
    bits = dit.variance_bits(z, x, v_hat, fraction, logsnr_t, logsnr_s)
    torch.testing.assert_close(bits, kl.mean((1, 2, 3)) / math.log(2))


def test_best_variance_includes_the_error_of_the_mean():
    # The bound is smallest where the variance is that of the posterior plus the squared error.
    torch.manual_seed(0)
    x, eps = torch.randn(2, 1, 1, 64, 64).double()
    logsnr_t, logsnr_s = torch.tensor([0.0]).double(), torch.tensor([0.4]).double()
    z = (x + eps) / math.sqrt(2)
    v_hat = v_from_x_eps(x, eps, logsnr_t) + 0.5
    mean, low, high = posterior(z, x, logsnr_t, logsnr_s)
    mean_hat, _, _ = posterior(z, (z - v_hat) / math.sqrt(2), logsnr_t, logsnr_s)
    best = (low.exp() + (mean - mean_hat).square()).log()
    fraction = ((best - low) / (high - low)).requires_grad_()
    dit.variance_bits(z, x, v_hat, fraction, logsnr_t, logsnr_s).sum().backward()
    assert fraction.grad.abs().max() < 1e-12


def test_learned_variance_loss_trains_the_mean_by_the_v_loss_alone():
    torch.manual_seed(0)
    x, eps = torch.randn(2, 3, 3, 8, 8)
    t = torch.tensor([0.0, 0.3, 1.0])
    v_hat = torch.randn_like(x).requires_grad_()
    fraction = torch.rand_like(x).requires_grad_()

    def net(z, logsnr, label, variance):
        return v_hat, fraction

    loss, logsnr = dit.learned_variance_loss(net, x, logsnr_schedule_cosine, t=t, eps=eps)
    assert loss.isfinite().all()
    v = v_from_x_eps(x, eps, logsnr)
    v_gradient, fraction_gradient = torch.autograd.grad(loss.sum(), [v_hat, fraction])
    torch.testing.assert_close(v_gradient, 2 * (v_hat - v).detach() / x[0].numel())
    assert fraction_gradient.abs().min() > 0


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_dit_trains_with_a_learned_variance(tmp_path, precision):
    args = json.dumps(dict(channels=16, depth=1, num_heads=2, learned_variance=True))
    train_small(
        tmp_path,
        "--model related.dit:DiT --loss related.dit:learned_variance_loss",
        precision,
        "--model-args",
        args,
    )
    call(train.main, "--out", tmp_path / "run", "--steps 3")


def test_angles_are_split_evenly_over_three_axes():
    # 64 channels are 32 pairs: 11 for the time, 11 for the row, 10 for the column.
    angles = rope_angles((2, 3, 4), 64)
    assert angles.shape == (24, 32)
    for i, position in enumerate(itertools.product(range(2), range(3), range(4))):
        parts = []
        for coordinate, n in zip(position, (11, 11, 10)):
            parts += [coordinate * 10000 ** (-j / n) for j in range(n)]
        torch.testing.assert_close(angles[i], torch.tensor(parts))

    # At time 0, rows and columns have the angles of images with as many pairs each.
    angles = rope_angles((1, 3, 4), 48)
    assert torch.equal(angles[:, :8], torch.zeros(12, 8))
    torch.testing.assert_close(angles[:, 8:], rope_angles((3, 4), 32))

    with pytest.raises(ValueError, match=r"\b4\b.*\b3 axes\b"):
        rope_angles((2, 2, 2), 4)


def test_logits_depend_on_relative_positions_in_three_axes():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=float64)

    # The same query and key at all positions of a grid.
    grid = (3, 2, 4)
    positions = list(itertools.product(*map(range, grid)))
    angles = rope_angles(grid, 16).double()
    queries = rotated(q.expand(len(positions), -1), angles)
    keys = rotated(k.expand(len(positions), -1), angles)
    logits = queries @ keys.T
    by_difference = {}
    for i, a in enumerate(positions):
        for j, b in enumerate(positions):
            difference = tuple(m - n for m, n in zip(a, b))
            by_difference.setdefault(difference, []).append(logits[i, j].item())

    # Equal differences have equal logits, and most others do not.
    assert len(by_difference) == 5 * 3 * 7
    for values in by_difference.values():
        assert max(values) - min(values) < 1e-6
    assert len({round(values[0], 4) for values in by_difference.values()}) > 95
