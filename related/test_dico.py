"""Tests of related/dico.py."""

import re

import pytest
import torch
import torch.nn.functional as F

from loss import diffusion_loss
from related import dico
from schedule import logsnr_schedule_cosine
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random, named, printed_numbers, train_small
from unet import count

TINY_DICO = dict(res=8, num_classes=3, width=16, depth=(2, 1, 1, 1, 2))

# Parameters and GMAC. The published GMAC are up to 0.4 % larger, see dico.CONFIGS.
COSTS = {
    "S": (33_137_672, 4.236),
    "B": (129_992_712, 16.856),
    "L": (463_897_992, 60.169),
    "XL": (701_151_368, 87.221),
    "H": (1_037_408_328, 194.029),
}


@pytest.mark.parametrize("sizes", ["S B", pytest.param("L XL H", marks=pytest.mark.slow)])
def test_dico_costs_what_was_published(monkeypatch, capsys, sizes):
    assert list(dico.CONFIGS) == list(COSTS)
    names = sizes.split()
    monkeypatch.setattr(dico, "CONFIGS", {name: dico.CONFIGS[name] for name in names})
    dico.print_configurations()
    for name, line in zip(names, printed_numbers(capsys), strict=True):
        parameters, gmac = COSTS[name]
        assert line[0] == parameters
        assert line[2] == pytest.approx(gmac, rel=1e-3)


def test_dico_is_the_identity_at_init():
    net = dico.DiCo(**TINY_DICO)
    z = torch.randn(2, 3, 8, 12)
    h = torch.randn(2, 16, 8, 8)
    condition = torch.randn(2, 16)
    assert torch.equal(net.down1[0](h, condition), h)
    assert torch.equal(net(z, torch.zeros(2)), torch.zeros_like(z))


def test_sides_must_be_divisible_by_4():
    with pytest.raises(ValueError, match=named(4, 10)):
        dico.DiCo(10)


def norm_by_hand(x, shift, scale):
    """LayerNorm over the last dimension, without weights, and its modulation."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def gelu_by_hand(x):
    """The exact GELU."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def dense_by_hand(conv, h):
    """A 1x1 convolution of h (B, H, W, C)."""
    return h @ conv.weight[:, :, 0, 0].T + conv.bias


def depthwise_by_hand(conv, h):
    """A depthwise 3x3 convolution of h (B, H, W, C): nine shifted copies, weighted and added."""
    height, width = h.shape[1:3]
    padded = F.pad(h, (0, 0, 1, 1, 1, 1))
    total = 0
    for i in range(3):
        for j in range(3):
            total = total + padded[:, i : i + height, j : j + width] * conv.weight[:, 0, i, j]
    return total + conv.bias


def test_block_by_hand():
    block = fill_random(dico.Block(6, 2)).double()
    x = torch.randn(2, 6, 4, 5).double()
    condition = torch.randn(2, 6).double()

    # Six vectors (B, 1, 1, C) modulate the block.
    vectors = F.silu(condition) @ block.modulation.weight.T + block.modulation.bias
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:, None, None].chunk(6, 3)

    # The convolution module, with its channel gates.
    y = x.movedim(1, 3)
    h = dense_by_hand(block.conv1, norm_by_hand(y, shift1, scale1))
    h = gelu_by_hand(depthwise_by_hand(block.depthwise, h))
    mean = h.mean((1, 2), keepdim=True)
    h = dense_by_hand(block.conv3, h * torch.sigmoid(dense_by_hand(block.attention, mean)))
    y = y + gate1 * h

    # The MLP.
    h = gelu_by_hand(dense_by_hand(block.mlp1, norm_by_hand(y, shift2, scale2)))
    y = y + gate2 * dense_by_hand(block.mlp2, h)
    torch.testing.assert_close(block(x, condition), y.movedim(3, 1))


def test_dico_adds_skips_on_the_way_up():
    net = fill_random(dico.DiCo(**TINY_DICO))
    seen = []

    def keep_output(module, args, output):
        seen.append(output)

    def keep_input(module, args):
        seen.append(args[0])

    for module in (net.down1[-1], net.down2[-1], net.grow2, net.grow1):
        module.register_forward_hook(keep_output)
    for module in (net.join2, net.join1):
        module.register_forward_pre_hook(keep_input)
    net(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1]))

    # The order is that of the forward pass.
    h1, h2, up2, join2, up1, join1 = seen
    assert torch.equal(join2, torch.cat([F.pixel_shuffle(up2, 2), h2], 1))
    assert torch.equal(join1, torch.cat([F.pixel_shuffle(up1, 2), h1], 1))


def test_dico_takes_any_size():
    net = fill_random(dico.DiCo(**TINY_DICO))
    for height, width in ((4, 8), (12, 4)):
        z = torch.randn(2, 3, height, width)
        assert net(z, torch.zeros(2)).shape == (2, 3, height, width)


def test_labels_reach_every_block():
    net = fill_random(dico.DiCo(**TINY_DICO))
    z = torch.randn(2, 3, 8, 8)
    logsnr = torch.tensor([-4.0, 5.0])

    # No label is the null label, number 3.
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))

    # Only the labels of the batch get gradients.
    net(z, logsnr, torch.tensor([0, 2])).square().mean().backward()
    for condition in net.conditions:
        gradients = condition.label.weight.grad.abs().amax(1)
        assert (gradients > 0).tolist() == [True, False, True, False]

    # All weights get gradients.
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_channel_attention_multiplies_and_nothing_else():
    # The same weights with and without channel attention.
    net = fill_random(dico.DiCo(**TINY_DICO))
    without = dico.DiCo(**TINY_DICO, channel_attention=False)
    weights = net.state_dict()
    without.load_state_dict({name: weights[name] for name in weights if ".attention." not in name})

    # The input of conv3 is the result of the channel attention.
    block = net.down1[0]
    plain = without.down1[0]
    x = torch.randn(2, 16, 8, 8)
    condition = torch.randn(2, 16)
    seen = []

    def keep_input(module, args):
        seen.append(args[0])

    block.conv3.register_forward_pre_hook(keep_input)
    plain.conv3.register_forward_pre_hook(keep_input)
    block(x, condition)
    plain(x, condition)

    # It is a product with gates, which depend on the means over all positions.
    gated, h = seen[0], seen[1]
    mean = torch.stack([h[:, :, i, j] for i in range(8) for j in range(8)]).mean(0)
    gates = torch.sigmoid(mean @ block.attention.weight[:, :, 0, 0].T + block.attention.bias)
    torch.testing.assert_close(gated, h * gates[:, :, None, None])

    # With gates of 1 the two nets are equal: sigmoid(50) = 1.
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, dico.Block):
                module.attention.weight.zero_()
                module.attention.bias.fill_(50.0)
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(z, torch.zeros(2)), without(z, torch.zeros(2)))


def memorize(net, x, steps=300, lr=3e-3):
    """Train on the same images with the same noise. Returns the first and the last loss."""
    torch.manual_seed(0)
    t = torch.rand(len(x))
    eps = torch.randn_like(x)
    label = torch.arange(len(x)) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss, _ = diffusion_loss(net, x, logsnr_schedule_cosine, label, space="v", t=t, eps=eps)
        loss = loss.mean()
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


@pytest.mark.slow
def test_dico_memorizes_64_images():
    images, _ = load_batch(Shapes(8), range(64))
    net = dico.DiCo(8, num_classes=10, width=16, depth=(1, 1, 1, 1, 1))
    first, last = memorize(net, images / 127.5 - 1)
    assert last < first / 10


def test_active_channels_are_counted():
    net = dico.DiCo(**TINY_DICO)
    z = torch.randn(2, 3, 8, 8)

    # The mean of each channel is its bias. 1 and 0.06 are active: above 0.05 of the largest mean.
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "conv3"):
                module.conv3.weight.zero_()
                means = torch.tensor([1.0, 0.06, 0.04, -1.0])
                module.conv3.bias.copy_(means.repeat(len(module.conv3.bias) // 4))
    assert dico.active_channels(net, z, torch.zeros(2)) == 0.5

    with pytest.raises(ValueError, match="DiCo"):
        dico.active_channels(torch.nn.Identity(), z, torch.zeros(2))


def test_networks_of_equal_size_are_timed(capsys, monkeypatch):
    # The published sizes S, and a U-ViT within 1 % of their parameters.
    counts = {
        name: count(network, fields | dict(res=32))[0]
        for name, (network, fields) in dico.NETWORKS.items()
    }
    assert counts["DiCo"] == 33_137_672
    assert counts["DiT"] == 32_865_056
    assert all(abs(n / counts["DiCo"] - 1) < 0.01 for n in counts.values())

    # Two small ones print a line each.
    small = dict(res=8, in_channels=4, channels=16, depth=1, num_heads=2)
    monkeypatch.setattr(dico, "NETWORKS", {"DiT": (dico.DiT, small), "LiT": (dico.LiT, small)})
    call(dico.main, "--speed 4")
    printed = capsys.readouterr().out
    assert "4x4 tokens" in printed
    assert re.search(r"DiT .*\(1\.00 times as fast as DiT\).*\(1\.00 times\)", printed)
    assert re.search(r"LiT .*GMAC, forward +\d", printed)

    with pytest.raises(SystemExit, match="--speed"):
        call(dico.main, "--speed 2")


def test_active_channels_of_a_run_are_printed(tmp_path, capsys):
    model_args = '{"width": 4, "depth": [1, 1, 1, 1, 1]}'
    run = train_small(tmp_path, "--model related.dico:DiCo --model-args", model_args)
    call(dico.main, run)
    assert re.search(rf"{re.escape(str(run))}\b.*\b\d+\.\d %", capsys.readouterr().out)
