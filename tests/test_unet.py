"""Tests of unet.py: the wavelet, the blocks, and what both networks have in common."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
from loss import diffusion_loss
from schedule import make_schedule
from support.data import Shapes, load_batch
from tests.helpers import (
    HERE,
    NEEDS_INDUCTOR,
    NETS,
    TINY_UNET,
    TINY_UVIT,
    command,
    float64,
    named,
    randomize,
    tiny_nets,
)
from unet import UNet, dwt53, group_norm_float32, idwt53
from uvit import UViT

# ---------------------------------------------------------------- group norm on a GPU


@pytest.mark.parametrize(
    "backend",
    ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, *NEEDS_INDUCTOR])],
)
@pytest.mark.parametrize("channels_per_group", [4, 8, 16])
def test_group_norm_of_bfloat16_in_channels_last(backend, channels_per_group):
    """The branch that only GPUs take, forward and backward, equals float64 but for rounding."""
    groups = 32
    channels = groups * channels_per_group
    x = (2 * torch.randn(2, channels, 8, 8) + 3).to(memory_format=torch.channels_last)
    x, gradient = x.bfloat16(), torch.randn(2, channels, 8, 8).bfloat16()
    weight, bias = torch.randn(channels), torch.randn(channels)

    def results(norm, *inputs):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = norm(inputs[0], groups, inputs[1], inputs[2], 1e-5)
        output.backward(gradient.to(output.dtype))
        return [output.detach(), *(tensor.grad for tensor in inputs)]

    torch._dynamo.reset()
    norm = torch.compile(group_norm_float32, backend=backend, dynamic=False)
    expected = results(F.group_norm, x.double(), weight.double(), bias.double())
    found = results(norm, x, weight, bias)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert found[0].is_contiguous(memory_format=torch.channels_last)

    # The output and the gradient of x are rounded to 8 bits. Weight and bias have float32 sums.
    for tensor, exact, rounding in zip(found, expected, (2**-8, 2**-8, 1e-5, 1e-5)):
        error = (tensor.double() - exact).abs().max()
        assert error <= rounding * exact.abs().max()


# ---------------------------------------------------------------- the wavelet


def lift_by_hand(row):
    """The 5/3 wavelet of one row, an index at a time, straight from its definition.

    Returns the smooth half and the detail half.
    """
    n = len(row)

    def at(i):
        """The value at index i. The row continues as its mirror image beyond its ends."""
        if i < 0:
            i = -i
        elif i >= n:
            i = 2 * (n - 1) - i
        return row[i]

    # Detail -1 is needed for the first smooth value.
    detail = {i: at(2 * i + 1) - (at(2 * i) + at(2 * i + 2)) / 2 for i in range(-1, n // 2)}
    smooth = [at(2 * i) + (detail[i - 1] + detail[i]) / 4 for i in range(n // 2)]
    return smooth, [detail[i] for i in range(n // 2)]


def test_wavelet_equals_the_scalar_loop():
    x = torch.randn(1, 1, 6, 8, dtype=float64)

    # Smooth and detail along the width, then both along the height of each half.
    halves = zip(*[lift_by_hand(row) for row in x[0, 0].tolist()])
    bands = []
    for half in halves:
        columns = zip(*half)
        for band in zip(*[lift_by_hand(column) for column in columns]):
            bands.append(torch.tensor(band, dtype=float64).T)
    assert torch.allclose(dwt53(x)[0], torch.stack(bands), atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_inverse_channels_and_constants(levels):
    x = torch.randn(2, 3, 24, 16)
    y = dwt53(x, levels)
    assert y.shape == (2, 3 * 4**levels, 24 // 2**levels, 16 // 2**levels)
    assert (idwt53(y, levels) - x).abs().max() < 1e-6

    # A constant image has the same constant as its smooth band, and no detail.
    constant = dwt53(torch.full((1, 3, 16, 16), 0.7), levels)
    assert torch.allclose(constant[:, :3], torch.tensor(0.7))
    assert (constant[:, 3:] == 0).all()

    # A side must be divisible by 2^levels.
    side = 2**levels + 1
    with pytest.raises(ValueError, match=rf"\b{side}\D+16\b"):
        dwt53(torch.randn(1, 3, side, 16), levels)


# ---------------------------------------------------------------- both networks


@pytest.mark.parametrize("net_class, fields", NETS)
@pytest.mark.parametrize("patching", list(unet.PATCHING))
def test_output_is_zero_at_init_and_labels_matter_after_training(net_class, fields, patching):
    torch.manual_seed(0)
    net = net_class(**fields | dict(res=(32, 16), patching=patching, channel_multiplier=(1, 2)))
    z = torch.randn(4, 3, 32, 16)
    logsnr = torch.tensor([-5.0, 0, 3, 9])
    label = torch.tensor([0, 1, 2, 3])
    for y in (label, None):
        v_hat = net(z, logsnr, y)
        assert v_hat.shape == z.shape
        assert not v_hat.any()

    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(z, logsnr, label) - z).square().mean().backward()
        optimizer.step()

    # A class differs from no label. The null label, which is num_classes, does not.
    zeros = torch.zeros(4, dtype=torch.int64)
    null_labels = torch.full((4,), 3)
    assert (net(z, logsnr, zeros) - net(z, logsnr)).abs().max() > 1e-4
    assert torch.equal(net(z, logsnr, null_labels), net(z, logsnr))


# Attention in a convolutional level of a U-ViT.
UVIT_WITH_ATTENTION = TINY_UVIT | dict(
    channel_multiplier=(1, 2, 2), num_res_blocks=(1, 1), attn_resolutions=(8,)
)


@pytest.mark.parametrize("net_class, fields", [*NETS, (UViT, UVIT_WITH_ATTENTION)])
def test_gradients_reach_every_weight(net_class, fields):
    torch.manual_seed(0)
    net = randomize(net_class(**fields))
    z, logsnr, label = torch.randn(4, 3, 16, 16), torch.tensor([-5.0, 0, 3, 9]), torch.arange(4)
    net(z, logsnr, label).square().mean().backward()

    # The bias of norm_k adds the same number to all logits of a query, which softmax ignores.
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9 or "norm_k.bias" in name, name

    # The FiLM layers are among the weights.
    films = [name for name, _ in net.named_parameters() if "film" in name]
    assert len(films) >= 8


def forward_and_backward(net):
    """The number of values kept for the backward pass, and [output, gradients of all weights]."""
    saved = {}

    def save(x):
        saved[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2))
    v_hat.square().mean().backward()
    return sum(saved.values()), [v_hat, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("net_class, fields", NETS)
def test_checkpointing_keeps_fewer_activations_and_the_same_gradients(net_class, fields):
    kept, results = [], []
    for sizes in ((), (16,), (8,), (16, 8)):
        torch.manual_seed(0)
        net = randomize(net_class(**fields | dict(dropout=0.3), checkpoint_resolutions=sizes))
        count, result = forward_and_backward(net)
        kept.append(count)
        results.append(result)

    # The results are equal bitwise: a recomputed block draws the same dropout.
    for result in results[1:]:
        for expected, value in zip(results[0], result):
            assert torch.equal(expected, value)

    # Each resolution that is checkpointed saves memory.
    none, at_16, at_8, at_both = kept
    assert none > at_16 > at_both
    assert none > at_8 > at_both


def test_channels_last_changes_no_result():
    for net in map(randomize, tiny_nets()):
        z, logsnr = torch.randn(2, 3, 16, 16), torch.zeros(2)
        expected = net(z, logsnr)
        v_hat = net.to(memory_format=torch.channels_last)(z, logsnr)
        assert torch.allclose(expected, v_hat, atol=1e-5)


def dropout_rates(blocks):
    """The set of the rates of all dropout layers in a module."""
    return {module.p for module in blocks.modules() if isinstance(module, nn.Dropout)}


def test_dropout_acts_only_where_configured():
    # The U-Net has dropout at resolutions up to 16.
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
    assert [dropout_rates(level) for level in net.down] == [{0.0}, {0.3}, {0.3}]
    assert [dropout_rates(level) for level in net.up] == [{0.0}, {0.3}, {0.3}]
    assert dropout_rates(net.middle) == {0.3}

    # The U-ViT has a rate of its own for the transformer.
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
    assert dropout_rates(net.down[0]) == {0.0}
    assert dropout_rates(net.down[1]) == {0.3}
    assert dropout_rates(net.transformer) == {0.2}

    # Dropout makes outputs random in training, and never in evaluation.
    z, logsnr = torch.ones(1, 3, 16, 16), torch.zeros(1)
    for dropout in (0.0, 0.5):
        net = randomize(UNet(**TINY_UNET | dict(dropout=dropout))).train()
        assert torch.equal(net(z, logsnr), net(z, logsnr)) == (dropout == 0)
        net.eval()
        assert torch.equal(net(z, logsnr), net(z, logsnr))


def test_nets_reject_wrong_arguments():
    for net_class, fields in NETS:
        with pytest.raises(ValueError, match=r"\b15\D?15\b"):
            net_class(**fields | dict(res=15))
        with pytest.raises(ValueError, match=named("patching", "dwt_3")):
            net_class(**fields | dict(patching="dwt_3"))
        with pytest.raises(ValueError, match="num_res_blocks"):
            net_class(**fields | dict(num_res_blocks=(1, 1, 1)))
        with pytest.raises(ValueError, match=r"\b5\b"):
            net_class(**fields | dict(num_heads=5))


def uniform_schedule(low, high):
    """A schedule whose logsnr is uniform in [low, high)."""
    return lambda t: low + (high - low) * t


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_overfits_eight_images_in_every_bin_of_logsnr(index):
    torch.manual_seed(0)
    net = tiny_nets()[index]
    images, label = load_batch(Shapes(16), range(8))
    x = images.float() / 127.5 - 1
    label = label % 3

    def loss(copies, schedule):
        batch = x.repeat(copies, 1, 1, 1)
        losses, _ = diffusion_loss(net, batch, schedule, label.repeat(copies), space="v")
        return losses.mean()

    @torch.no_grad()
    def loss_by_bin():
        """The mean loss in each of six bins of logsnr, two wide."""
        torch.manual_seed(1)
        return torch.stack([loss(8, uniform_schedule(low, low + 2)) for low in range(-6, 6, 2)])

    before = loss_by_bin()
    schedule = make_schedule("cosine", 16)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss(4, schedule).backward()
        optimizer.step()
    after = loss_by_bin()
    assert (after < 0.7 * before).all(), (before, after)
    assert after.mean() < 0.4 * before.mean(), (before, after)


# ---------------------------------------------------------------- published configurations

# Name -> (millions of parameters, GMAC per image).
PUBLISHED = {
    "U-Net 128": (979.4, 289.0),
    "U-Net 256": (973.2, 318.9),
    "U-Net 512 none": (974.9, 554.3),
    "U-Net 512 dwt_1": (980.2, 432.2),
    "U-Net 512 conv_2": (980.2, 432.2),
    "U-Net 512 dwt_2": (996.7, 427.3),
}
QUICK = ("U-Net 128",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_configurations(name):
    with torch.device("meta"):
        net = UNet(**unet.CONFIGS[name])
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name][0], rel=0.01)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_cost_of_published_configurations(name, capsys):
    unet.print_table(UNet, {name: unet.CONFIGS[name]})
    line = re.search(rf"{name} +([\d.]+) M +([\d.]+) ", capsys.readouterr().out)
    assert float(line[1]) == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert float(line[2]) == pytest.approx(PUBLISHED[name][1], rel=0.01)


@pytest.mark.slow
def test_table_command(tmp_path):
    result = command(f"{HERE}/unet.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "979.39 M" in result.stdout, result.stderr
