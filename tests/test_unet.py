"""Tests of unet.py: the wavelet, the blocks, and what both networks have in common."""

import re

import pytest
import torch
import torch.nn as nn

import unet
from loss import diffusion_loss
from schedule import (
    make_schedule,
)
from support.data import Shapes, load_batch
from tests.helpers import (
    HERE,
    NETS,
    TINY_UNET,
    TINY_UVIT,
    command,
    float64,
    named,
    randomize,
    tiny_nets,
)
from unet import UNet, dwt53, idwt53
from uvit import UViT


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


def test_wavelet_equals_the_scalar_loop():
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


@pytest.mark.parametrize("net_class, fields", NETS)
@pytest.mark.parametrize("patching", list(unet.PATCHING))
def test_output_is_zero_at_init_and_labels_matter_after_training(net_class, fields, patching):
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


@pytest.mark.parametrize("net_class, fields", NETS)
def test_checkpointing_keeps_fewer_activations_and_the_same_gradients(net_class, fields):
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


PUBLISHED = {
    "U-Net 128": (979.4, 289.0),
    "U-Net 256": (973.2, 318.9),
    "U-Net 512 none": (974.9, 554.3),
    "U-Net 512 dwt_1": (980.2, 432.2),
    "U-Net 512 conv_2": (980.2, 432.2),
    "U-Net 512 dwt_2": (996.7, 427.3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_configurations(name):
    with torch.device("meta"):
        net = UNet(**unet.CONFIGS[name])
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name][0], rel=0.01)


QUICK = ("U-Net 128",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_cost_of_published_configurations(name, capsys):
    unet.print_table(UNet, {name: unet.CONFIGS[name]})
    line = re.search(rf"{name} +([\d.]+) M +([\d.]+) ", capsys.readouterr().out)
    assert float(line[1]) == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert float(line[2]) == pytest.approx(PUBLISHED[name][1], rel=0.01)


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


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_overfits_eight_images_in_every_bin_of_logsnr(index):
    torch.manual_seed(0)
    net = tiny_nets()[index]
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
    for _ in range(120):
        optimizer.zero_grad()
        diffusion_loss(net, x.repeat(4, 1, 1, 1), schedule, label.repeat(4), space="v")[
            0
        ].mean().backward()
        optimizer.step()
    after = by_bin()
    assert (after < 0.7 * before).all() and after.mean() < 0.4 * before.mean(), (before, after)


@pytest.mark.slow
def test_table_command(tmp_path):
    result = command(f"{HERE}/unet.py", cwd=tmp_path)
    assert result.returncode == 0 and "979.39 M" in result.stdout, result.stderr
