"""Tests of related/lit.py."""

import re

import pytest
import torch
import torch.nn.functional as F

import sample as sampling
import train
from loss import diffusion_loss
from related import (
    lit,
)
from schedule import (
    logsnr_schedule_cosine,
)
from support.checkpoint import load
from tests.helpers import TINY_UVIT, call, fill_random, printed_numbers, train_small
from uvit import UViT


@pytest.mark.parametrize("size", ["S", pytest.param("B L XL", marks=pytest.mark.slow)])
def test_lit_costs_what_was_published(monkeypatch, capsys, size):
    expected = {
        "DiT-S": (32.865, 6.06, 31.4, 241.7),
        "LiT-S": (32.925, 5.93, 23.7, 94.8),
        "DiT-B": (130.316, 23.0, 106.4, 657.3),
        "LiT-B": (130.396, 23.1, 92.1, 368.4),
        "DiT-L": (457.841, 80.7, 361.0, 2061.9),
        "LiT-L": (458.000, 80.9, 323.0, 1291.4),
        "DiT-XL": (674.835, 118.6, 524.5, 2909.2),
        "LiT-XL": (675.044, 119.4, 476.7, 1906.3),
    }
    assert list(lit.CONFIGS) == list(expected)
    names = [name for name in lit.CONFIGS if name[4:] in size.split()]
    monkeypatch.setattr(lit, "CONFIGS", {name: lit.CONFIGS[name] for name in names})
    call(lit.main)
    printed = dict(zip(names, printed_numbers(capsys), strict=True))
    for name in names:
        parameters, *gmac = expected[name]
        n, *tokens_and_macs = printed[name]
        assert n / 1e6 == pytest.approx(parameters, abs=6e-4)
        assert tokens_and_macs[-3:] == pytest.approx(gmac, rel=2.5e-3)
    for each in size.split():
        channels, depth, _, heads = lit.SIZES[each]
        more = printed[f"LiT-{each}"][0] - printed[f"DiT-{each}"][0]
        assert more == depth * 26 * channels // heads


def test_linear_attention_equals_its_explicit_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 50, 8).double()
    scores = (q.relu() + 1e-6) @ (k.relu() + 1e-6).mT
    explicit = scores @ v / scores.sum(3, keepdim=True)
    torch.testing.assert_close(lit.linear_attention(q, k, v), explicit, rtol=0, atol=1e-12)
    ones = lit.linear_attention(
        -q.abs(), k, torch.ones_like(v)
    )  # the sum of each row of weights, also where no query is above 0
    assert (ones - 1).abs().max() < 1e-4
    half = torch.full((1, 1, 4096, 4), 30.0, dtype=torch.float16)
    assert lit.linear_attention(half, half, half).isfinite().all()


def test_linear_attention_sees_positions_by_the_convolution_alone():
    torch.manual_seed(0)
    layer, x, shuffled = (
        lit.LinearAttention(24, 2).double(),
        torch.randn(2, 15, 24).double(),
        torch.randperm(15),
    )
    assert layer.dwc.weight.shape == (12, 1, 5, 5)
    assert not torch.allclose(layer(x[:, shuffled], (3, 5)), layer(x, (3, 5))[:, shuffled])
    near = layer.proj(
        layer.kv(x)[:, :, 24:]
    )  # with a kernel of one in its middle, the values themselves
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.bias.zero_()
    without = layer(x, (3, 5))
    torch.testing.assert_close(layer(x[:, shuffled], (3, 5)), without[:, shuffled])
    with torch.no_grad():
        layer.dwc.weight[:, :, 2, 2] = 1
    torch.testing.assert_close(layer(x, (3, 5)), without + near - layer.proj.bias)
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.weight[:, :, 2, 3] = (
            1  # the value of the token to the right, on a grid of 3 rows and 5 columns
        )
    right = F.pad(layer.kv(x)[:, :, 24:].unflatten(1, (3, 5))[:, :, 1:], (0, 0, 0, 1)).flatten(1, 2)
    torch.testing.assert_close(layer(x, (3, 5)), without + layer.proj(right) - layer.proj.bias)


def test_linear_attention_keeps_little_in_memory():
    def kept(kernel, n):
        """The bytes that a layer keeps for its gradient."""
        layer, sizes = lit.LinearAttention(32, 1, kernel), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage()._cdata: x.untyped_storage().nbytes()}) or x,
            lambda x: x,
        ):
            layer(torch.randn(1, n * n, 32), (n, n))
        return sum(sizes.values())

    assert kept(5, 64) / kept(5, 32) <= 5 and kept(0, 64) / kept(0, 32) >= 12


def test_lit_is_the_identity_at_init_and_gradients_reach_every_weight():
    torch.manual_seed(0)
    net, z, logsnr = (
        lit.LiT((8, 12), num_classes=3, channels=16, depth=2),
        torch.randn(2, 3, 8, 12),
        torch.tensor([-4.0, 5.0]),
    )
    h, emb = torch.randn(2, 24, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[0](h, emb, (4, 6)), h) and torch.equal(
        net(z, logsnr), torch.zeros_like(z)
    )
    v = fill_random(net)(z, logsnr, torch.tensor([0, 2]))
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))
    assert v.shape == z.shape and len({tuple(row.tolist()) for row in net.position}) == 24
    v.square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )
    with pytest.raises(ValueError, match=r"\b9x9\b"):
        lit.LiT(9)


def test_conversion_keeps_all_but_attention_bitwise():
    config = dict(
        TINY_UVIT,
        channel_multiplier=(1, 1, 2),
        num_res_blocks=(1, 1),
        res=(16, 32),
        attn_resolutions=(8,),
    )
    net = fill_random(UViT(**config))
    new, own = lit.convert(net, config), net.state_dict()
    products = (".q.", ".kv.", ".proj.", ".dwc.")
    for name, value in new.state_dict().items():
        assert (
            torch.equal(value, own[name])
            if name in own
            else ".attention.attention." in name and any(part in name for part in products)
        ), name
    assert {name for name in own if name not in new.state_dict()} == {
        name
        for name in own
        if any(part in name for part in (".qkv.", ".norm_q.", ".norm_k.", ".attention.out."))
    }
    z = torch.randn(2, 3, 16, 32)
    assert fill_random(new)(z, torch.zeros(2), torch.tensor([0, 1])).shape == z.shape
    new = lit.convert(net, config, inherit="all")
    block, old = new.transformer[0].attention.attention, net.transformer[0].attention
    assert torch.equal(
        torch.cat([block.q.weight, block.kv.weight]), old.qkv.weight
    ) and torch.equal(torch.cat([block.q.bias, block.kv.bias]), old.qkv.bias)
    assert torch.equal(block.proj.weight, old.out.weight) and torch.equal(
        block.proj.bias, old.out.bias
    )
    assert not torch.equal(
        lit.convert(net, config, inherit="none").stem.conv.weight, net.stem.conv.weight
    )
    with pytest.raises(ValueError, match=r"\binherit\b.*\bsome\b"):
        lit.convert(net, config, inherit="some")


def test_hybrid_loss_has_two_terms():
    torch.manual_seed(0)
    x, eps, t, v_student, v_teacher = (
        *torch.randn(2, 4, 3, 8, 8),
        torch.rand(4),
        *torch.randn(2, 4, 3, 8, 8),
    )
    student, teacher = (lambda *args: v_student), (lambda *args: v_teacher)
    plain, logsnr = diffusion_loss(student, x, logsnr_schedule_cosine, space="v", t=t, eps=eps)
    for weight in (0.0, 0.5):
        loss, at = lit.hybrid_loss(
            student, teacher, x, logsnr_schedule_cosine, weight=weight, t=t, eps=eps
        )
        torch.testing.assert_close(
            loss, plain + weight * (v_teacher - v_student).square().mean((1, 2, 3))
        )
        assert torch.equal(at, logsnr)


def test_lit_commands(tmp_path, capsys):
    model_args = (
        '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
        '"num_res_blocks": [1], "num_transformer_blocks": 1}'
    )
    run, out = str(train_small(tmp_path, "--model-args", model_args)), str(tmp_path / "lit")
    call(lit.main, run, "--steps 3 --batch 4 --out", out)
    call(sampling.main, out, "--n 2 --steps 2 --guidance 2 --out", tmp_path / "grid.png")
    assert "step 3/3" in capsys.readouterr().out and load(out)[1]["model_args"]["linear_heads"] == 2
    for options, message in (
        ([run, "--out", out], re.escape(out)),
        ([run, "--out x --steps 0"], r"--steps(?=.*\b1\b).*\b0\b"),
        ([out, "--out x"], r"(?=.*\buvit\b).*\brelated\.lit:LinearUViT\b"),
        ([run, "--out", f"{tmp_path}/3", "--heads 3"], r"(?=.*\b16\b).*\b3\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(lit.main, options)
    teacher, weights = load(run)[0].state_dict(), []
    for i, options in enumerate(
        (
            [],
            ["--inherit all --weight 0"],
            ["--inherit none --heads 4 --seed 1"],
        )
    ):
        call(lit.main, run, "--steps 1 --batch 4 --lr 1e-12 --out", f"{tmp_path}/{i}", *options)
        weights.append(load(f"{tmp_path}/{i}")[0].state_dict())
    of_attention = [name for name in weights[0] if ".attention.attention." in name]
    for name in teacher.keys() & weights[0].keys():
        torch.testing.assert_close(weights[0][name], teacher[name], rtol=0, atol=1e-9)
    assert of_attention and not any(
        torch.equal(weights[0][name], weights[1][name])
        for name in of_attention
        if "q.weight" in name
    )
    assert (
        not torch.equal(weights[2]["stem.conv.weight"], teacher["stem.conv.weight"])
        and load(f"{tmp_path}/2")[1]["model_args"]["linear_heads"] == 4
    )
    call(train.main, "--out", out, "--steps 4")  # goes on, without the teacher
    train_small(tmp_path / "scratch", "--model related.lit:LinearUViT --model-args", model_args)
    capsys.readouterr()
    lit.print_times(seconds=0.01)
    assert "softmax" in capsys.readouterr().out
