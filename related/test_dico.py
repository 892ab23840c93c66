"""Tests of related/dico.py."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from loss import diffusion_loss
from related import (
    dico,
    lit,
)
from schedule import (
    logsnr_schedule_cosine,
)
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random, printed_numbers, train_small

TINY_DICO = dict(res=8, num_classes=3, width=16, depth=(2, 1, 1, 1, 2))


@pytest.mark.parametrize("sizes", [slice(2), pytest.param(slice(2, 5), marks=pytest.mark.slow)])
def test_dico_costs_what_was_published(monkeypatch, capsys, sizes):
    names = list(dico.CONFIGS)[sizes]
    monkeypatch.setattr(dico, "CONFIGS", {name: dico.CONFIGS[name] for name in names})
    call(dico.main)
    parameters = [33_137_672, 129_992_712, 463_897_992, 701_151_368, 1_037_408_328][sizes]
    gmac = [4.236, 16.856, 60.169, 87.221, 194.029][sizes]
    for line, n, macs in zip(printed_numbers(capsys), parameters, gmac, strict=True):
        assert line[0] == n and line[2] == pytest.approx(macs, rel=1e-3)


def test_dico_is_the_identity_at_init():
    net, z = dico.DiCo(**TINY_DICO), torch.randn(2, 3, 8, 12)
    h, condition = torch.randn(2, 16, 8, 8), torch.randn(2, 16)
    assert torch.equal(net.down1[0](h, condition), h) and torch.equal(
        net(z, torch.zeros(2)), torch.zeros_like(z)
    )
    with pytest.raises(ValueError, match=r"(?=.*\b4\b).*\b10\b"):
        dico.DiCo(10)


def norm_by_hand(x, shift, scale):
    """LayerNorm over the last dimension, without weights, and its modulation."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def test_blocks_of_dico_and_lit_by_hand():
    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def dense(conv, h):  # of (B, H, W, C)
        return h @ conv.weight[:, :, 0, 0].T + conv.bias

    block = fill_random(dico.Block(6, 2)).double()
    x, c = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6).double()
    vectors = (F.silu(c) @ block.modulation.weight.T + block.modulation.bias)[:, None, None].chunk(
        6, 3
    )
    h = dense(block.conv1, norm_by_hand(x.movedim(1, 3), vectors[0], vectors[1]))
    padded = F.pad(h, (0, 0, 1, 1, 1, 1))
    h = gelu(
        sum(
            padded[:, i : i + 4, j : j + 5] * block.depthwise.weight[:, 0, i, j]
            for i in range(3)
            for j in range(3)
        )
        + block.depthwise.bias
    )
    h = dense(block.conv3, h * torch.sigmoid(dense(block.attention, h.mean((1, 2), keepdim=True))))
    y = x.movedim(1, 3) + vectors[2] * h
    y = y + vectors[5] * dense(
        block.mlp2, gelu(dense(block.mlp1, norm_by_hand(y, vectors[3], vectors[4])))
    )
    torch.testing.assert_close(block(x, c), y.movedim(3, 1))

    block = fill_random(lit.DiTBlock(8, 2, 3)).double()
    x, emb, grid = torch.randn(2, 12, 8).double(), torch.randn(2, 8).double(), (3, 4)
    vectors = block.modulation(emb)[:, None].chunk(6, 2)
    y = x + vectors[2] * block.attention(norm_by_hand(x, vectors[0], vectors[1]), grid)
    h = block.mlp[0](norm_by_hand(y, vectors[3], vectors[4]))
    h = (
        0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    )  # DiT's GELU is the approximate one
    torch.testing.assert_close(block(x, emb, grid), y + vectors[5] * block.mlp[2](h))


def test_dico_adds_skips_on_the_way_up():
    net, seen = fill_random(dico.DiCo(**TINY_DICO)), []
    for module in (net.down1[-1], net.down2[-1], net.grow2, net.grow1):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    for module in (net.join2, net.join1):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1]))
    h1, h2, up2, join2, up1, join1 = seen
    assert torch.equal(join2, torch.cat([F.pixel_shuffle(up2, 2), h2], 1)) and torch.equal(
        join1, torch.cat([F.pixel_shuffle(up1, 2), h1], 1)
    )


def test_dico_takes_any_size_and_labels_reach_every_block():
    net = fill_random(dico.DiCo(**TINY_DICO))
    for height, width in ((4, 8), (12, 4)):
        assert net(torch.randn(2, 3, height, width), torch.zeros(2)).shape == (2, 3, height, width)
    z, logsnr = torch.randn(2, 3, 8, 8), torch.tensor([-4.0, 5.0])
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))
    net(z, logsnr, torch.tensor([0, 2])).square().mean().backward()
    for condition in net.conditions:
        assert (condition.label.weight.grad.abs().amax(1) > 0).tolist() == [
            True,
            False,
            True,
            False,
        ]
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )


def test_channel_attention_multiplies_and_nothing_else():
    net, without = (
        fill_random(dico.DiCo(**TINY_DICO)),
        dico.DiCo(**TINY_DICO, channel_attention=False),
    )
    without.load_state_dict(
        {name: value for name, value in net.state_dict().items() if ".attention." not in name}
    )
    block, plain, x, condition = (
        net.down1[0],
        without.down1[0],
        torch.randn(2, 16, 8, 8),
        torch.randn(2, 16),
    )
    gates = []
    block.conv3.register_forward_pre_hook(lambda module, args: gates.append(args[0]))
    plain.conv3.register_forward_pre_hook(lambda module, args: gates.append(args[0]))
    block(x, condition), plain(x, condition)
    mean = torch.stack([gates[1][:, :, i, j] for i in range(8) for j in range(8)]).mean(0)
    expected = torch.sigmoid(mean @ block.attention.weight[:, :, 0, 0].T + block.attention.bias)
    torch.testing.assert_close(gates[0], gates[1] * expected[:, :, None, None])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, dico.Block):
                module.attention.weight.zero_()
                module.attention.bias.fill_(50.0)  # sigmoid = 1
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(z, torch.zeros(2)), without(z, torch.zeros(2)))


def learns(net, x, loss=diffusion_loss, steps=300, lr=3e-3):
    """The first and the last loss of so many steps on the same images, with the same noise."""
    torch.manual_seed(0)
    t, eps, label = torch.rand(len(x)), torch.randn_like(x), torch.arange(len(x)) % 10
    optimizer, losses = torch.optim.Adam(net.parameters(), lr), []
    for _ in range(steps):
        losses.append(loss(net, x, logsnr_schedule_cosine, label, t=t, eps=eps)[0].mean())
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0].item(), losses[-1].item()


@pytest.mark.slow
def test_dico_memorizes_64_images():
    x = load_batch(Shapes(8), range(64))[0] / 127.5 - 1
    first, last = learns(
        dico.DiCo(8, num_classes=10, width=16, depth=(1, 1, 1, 1, 1)),
        x,
        loss=functools.partial(diffusion_loss, space="v"),
    )
    assert last < first / 10


def test_active_channels_are_counted(tmp_path, capsys):
    net, z = dico.DiCo(**TINY_DICO), torch.randn(2, 3, 8, 8)
    for module in net.modules():
        if hasattr(module, "conv3"):
            torch.nn.init.zeros_(module.conv3.weight)
            with torch.no_grad():
                module.conv3.bias.copy_(
                    torch.tensor([1.0, 0.06, 0.04, -1.0]).repeat(len(module.conv3.bias) // 4)
                )
    assert dico.active_channels(net, z, torch.zeros(2)) == 0.5
    dico.print_times(seconds=0.01)
    assert "64x64" in capsys.readouterr().out
    run = train_small(
        tmp_path, "--model related.dico:DiCo --model-args", '{"width": 4, "depth": [1, 1, 1, 1, 1]}'
    )
    call(dico.main, run)
    assert re.search(rf"{re.escape(str(run))}\b.*\b\d+\.\d %", capsys.readouterr().out)
    with pytest.raises(ValueError, match="DiCo"):
        dico.active_channels(torch.nn.Identity(), z, torch.zeros(2))
