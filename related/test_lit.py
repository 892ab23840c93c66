"""Tests of related/lit.py."""

import contextlib
import json
import re
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

import sample as sampling
import train
from loss import diffusion_loss
from related import dit, lit
from schedule import logsnr_schedule_cosine
from support.checkpoint import load
from tests.helpers import (
    TINY_NET,
    TINY_UVIT,
    call,
    fill_random,
    named,
    printed_numbers,
    short_grid,
    train_small,
)
from unet import count
from uvit import UViT

# Parameters in millions, and GMAC at 256 and 4096 tokens.
COSTS = {
    "DiT-S": (32.865, 6.06, 241.7),
    "LiT-S": (32.925, 5.93, 94.8),
    "DiT-B": (130.316, 23.0, 657.3),
    "LiT-B": (130.396, 23.1, 368.4),
    "DiT-L": (457.841, 80.7, 2061.9),
    "LiT-L": (458.000, 80.9, 1291.4),
    "DiT-XL": (674.835, 118.6, 2909.2),
    "LiT-XL": (675.044, 119.4, 1906.3),
}


def test_lit_costs_what_was_published(capsys):
    lit.print_configurations()
    printed = dict(zip(COSTS, printed_numbers(capsys), strict=True))

    # The last two numbers of a line are the GMAC.
    for name in COSTS:
        parameters, *gmac = COSTS[name]
        assert printed[name][0] / 1e6 == pytest.approx(parameters, abs=6e-4)
        assert printed[name][-2:] == pytest.approx(gmac, rel=2.5e-3)

    # LiT adds one 5x5 convolution with biases per block, for the channels of one head.
    for size in dit.SIZES:
        channels, depth, *_ = dit.SIZES[size]
        more = printed[f"LiT-{size}"][0] - printed[f"DiT-{size}"][0]
        assert more == depth * 26 * channels // lit.HEADS[size]


@pytest.mark.parametrize("name", ["DiT-S", "LiT-S"])
def test_costs_of_one_and_two_blocks_tell_those_of_all(name):
    network, config = lit.CONFIGS[name]
    assert dit.count_by_depth(network, config) == list(count(network, config))


# ---------------------------------------------------------------- linear attention


def test_linear_attention_equals_its_explicit_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 50, 8).double()
    weights = (q.relu() + 1e-6) @ (k.relu() + 1e-6).mT
    explicit = weights @ v / weights.sum(3, keepdim=True)
    torch.testing.assert_close(lit.linear_attention(q, k, v), explicit, rtol=0, atol=1e-12)

    # Each row of weights has the sum 1, also where no query is above 0.
    sums = lit.linear_attention(-q.abs(), k, torch.ones_like(v))
    assert (sums - 1).abs().max() < 1e-4

    # Large values of many tokens do not overflow in float16.
    half = torch.full((1, 1, 4096, 4), 30.0, dtype=torch.float16)
    assert lit.linear_attention(half, half, half).isfinite().all()


def test_linear_attention_sees_positions_by_the_convolution_alone():
    torch.manual_seed(0)
    layer = lit.LinearAttention(24, 2).double()
    x = torch.randn(2, 15, 24).double()
    shuffled = torch.randperm(15)
    grid = (3, 5)  # rows, columns
    v = layer.kv(x)[:, :, 24:]

    # With the convolution the order of the tokens matters.
    assert layer.dwc.weight.shape == (12, 1, 5, 5)
    assert not torch.allclose(layer(x[:, shuffled], grid), layer(x, grid)[:, shuffled])

    # Without it, the order does not matter.
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.bias.zero_()
    without = layer(x, grid)
    torch.testing.assert_close(layer(x[:, shuffled], grid), without[:, shuffled])

    # A kernel with a one in its middle adds the values themselves.
    with torch.no_grad():
        layer.dwc.weight[:, :, 2, 2] = 1
    torch.testing.assert_close(layer(x, grid), without + layer.proj(v) - layer.proj.bias)

    # A kernel with a one to the right of its middle adds the value of the token to the right.
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.weight[:, :, 2, 3] = 1
    right = v.unflatten(1, grid)[:, :, 1:]
    right = F.pad(right, (0, 0, 0, 1)).flatten(1, 2)
    torch.testing.assert_close(layer(x, grid), without + layer.proj(right) - layer.proj.bias)


def test_linear_attention_keeps_little_in_memory():
    def saved_bytes(kind, side):
        """The bytes that a layer keeps for its gradient, for side x side tokens."""
        layer = kind(32, 1)
        sizes = {}  # of each storage

        def pack(x):
            storage = x.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            return x

        def unpack(x):
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            layer(torch.randn(1, side**2, 32), (side, side))
        return sum(sizes.values())

    # Four times as many tokens: about four times the memory, and with softmax about 16 times.
    assert saved_bytes(lit.LinearAttention, 64) / saved_bytes(lit.LinearAttention, 32) <= 5
    assert saved_bytes(dit.Attention, 64) / saved_bytes(dit.Attention, 32) >= 12


# ---------------------------------------------------------------- the paper's network


def test_lit_is_dit_with_another_attention():
    torch.manual_seed(0)
    net = lit.LiT((8, 12), num_classes=3, channels=16, depth=2, learned_variance=True)
    z = torch.randn(2, 3, 8, 12)
    logsnr = torch.tensor([-4.0, 5.0])

    # At initialization v_hat is 0.
    assert torch.equal(net(z, logsnr), torch.zeros_like(z))

    # All weights get gradients.
    v_hat, fraction = fill_random(net)(z, logsnr, torch.tensor([0, 2]), variance=True)
    (v_hat.square().mean() + fraction.square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name

    # Without the convolution, no weight of it is there.
    plain = lit.LiT(8, channels=16, depth=1, kernel=0)
    assert not any("dwc" in name for name in plain.state_dict())


# ---------------------------------------------------------------- conversion and distillation

# With attention on two levels, and not square.
UVIT = dict(
    TINY_UVIT,
    channel_multiplier=(1, 1, 2),
    num_res_blocks=(1, 1),
    res=(16, 32),
    attn_resolutions=(8,),
)


def test_conversion_keeps_all_but_attention_bitwise():
    net = fill_random(UViT(**UVIT))
    new = lit.convert(net, "uvit", UVIT)
    old_weights = net.state_dict()
    new_weights = new.state_dict()

    # Weights of the same name are equal. The others are those of linear attention.
    for name, value in new_weights.items():
        if name in old_weights:
            assert torch.equal(value, old_weights[name]), name
        else:
            assert ".attention.attention." in name
            assert re.search(r"\.(q|kv|proj|dwc)\.", name), name

    # The weights that are gone are those of softmax attention.
    softmax = (".qkv.", ".norm_q.", ".norm_k.", ".attention.out.")
    gone = {name for name in old_weights if name not in new_weights}
    assert gone == {name for name in old_weights if any(part in name for part in softmax)}

    z = torch.randn(2, 3, 16, 32)
    assert fill_random(new)(z, torch.zeros(2), torch.tensor([0, 1])).shape == z.shape


def test_conversion_inherits_all_or_none():
    net = fill_random(UViT(**UVIT))

    # All: also the linear layers of attention.
    old = net.transformer[0].attention
    new = lit.convert(net, "uvit", UVIT, inherit="all").transformer[0].attention.attention
    assert torch.equal(torch.cat([new.q.weight, new.kv.weight]), old.qkv.weight)
    assert torch.equal(torch.cat([new.q.bias, new.kv.bias]), old.qkv.bias)
    assert torch.equal(new.proj.weight, old.out.weight)
    assert torch.equal(new.proj.bias, old.out.bias)

    # None: not even the first convolution.
    new = lit.convert(net, "uvit", UVIT, inherit="none")
    assert not torch.equal(new.stem.conv.weight, net.stem.conv.weight)

    with pytest.raises(ValueError, match=r"\binherit\b.*\bsome\b"):
        lit.convert(net, "uvit", UVIT, inherit="some")


DIT = dict(res=(8, 12), num_classes=3, channels=16, depth=2, num_heads=4, learned_variance=True)


def test_conversion_of_a_dit():
    net = fill_random(dit.DiT(**DIT))
    old = net.state_dict()

    # "proj" is a layer of both kinds of attention. It is not inherited.
    new = lit.convert(net, "related.dit:DiT", DIT)
    assert isinstance(new, lit.LiT)
    for name, value in new.state_dict().items():
        if ".attention." not in name:
            assert torch.equal(value, old[name]), name
    assert not torch.equal(
        new.blocks[0].attention.proj.weight, old["blocks.0.attention.proj.weight"]
    )

    # All: also the linear layers of attention.
    new = lit.convert(net, "related.dit:DiT", DIT, kernel=0, inherit="all")
    attention = new.blocks[1].attention
    assert attention.dwc is None
    weights = torch.cat([attention.q.weight, attention.kv.weight])
    assert torch.equal(weights, old["blocks.1.attention.qkv.weight"])
    assert torch.equal(attention.proj.weight, old["blocks.1.attention.proj.weight"])


def test_hybrid_loss_has_two_terms():
    torch.manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 8)
    t = torch.rand(4)
    v_student, v_teacher = torch.randn(2, 4, 3, 8, 8)

    def student(*args):
        return v_student

    def teacher(*args):
        return v_teacher

    schedule = logsnr_schedule_cosine
    plain, expected_logsnr = diffusion_loss(student, x, schedule, space="v", t=t, eps=eps)
    difference = (v_teacher - v_student).square().mean((1, 2, 3))
    for weight in (0.0, 0.5):
        loss, logsnr = lit.hybrid_loss(student, teacher, x, schedule, weight=weight, t=t, eps=eps)
        torch.testing.assert_close(loss, plain + weight * difference)
        assert torch.equal(logsnr, expected_logsnr)

    # In eps space both terms have the factor alpha^2.
    options = dict(weight=0.5, space="eps", t=t, eps=eps)
    loss, _ = lit.hybrid_loss(student, teacher, x, schedule, **options)
    alpha_squared = torch.sigmoid(expected_logsnr)
    torch.testing.assert_close(loss, alpha_squared * (plain + 0.5 * difference))


def test_hybrid_loss_with_variances_has_four_terms():
    torch.manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([0.0, 0.2, 0.6, 1.0])
    v_student, s_student, v_teacher, s_teacher = torch.randn(4, 4, 3, 8, 8)

    def student(*args, variance):
        return v_student, s_student

    def teacher(*args, variance):
        return v_teacher, s_teacher

    # The student's own loss is that of dit.py.
    schedule = logsnr_schedule_cosine
    own, expected_logsnr = dit.learned_variance_loss(student, x, schedule, t=t, eps=eps)
    v_term = (v_teacher - v_student).square().mean((1, 2, 3))
    s_term = 4 * (s_teacher - s_student).square().mean((1, 2, 3))
    loss, logsnr = lit.hybrid_loss(
        student, teacher, x, schedule, weight=0.5, variance_weight=0.05, t=t, eps=eps
    )
    torch.testing.assert_close(loss, own + 0.5 * v_term + 0.05 * s_term)
    assert torch.equal(logsnr, expected_logsnr)


# ---------------------------------------------------------------- the commands

MODEL_ARGS = json.dumps(dict(TINY_NET, num_res_blocks=[1]))


@pytest.fixture(scope="session")
def run(made_once):
    """The folder of a run of two steps with a tiny network. Tests do not change it."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            short_grid(monkeypatch)
            train_small(folder, "--model-args", MODEL_ARGS)

    return str(made_once("lit_run", make) / "run")


def test_lit_commands(run, tmp_path, capsys):
    # The student is a run, which sample.py knows.
    out = str(tmp_path / "lit")
    call(lit.main, run, "--steps 3 --batch 4 --out", out)
    call(sampling.main, out, "--n 2 --steps 2 --guidance 2 --out", tmp_path / "grid.png")
    assert "step 3/3" in capsys.readouterr().out
    _, config, _ = load(out)
    assert config["model_args"]["linear_heads"] == 2

    # An --out that holds a run, no steps, a run of another model, and too many heads.
    for args, message in (
        ([run, "--out", out], re.escape(out)),
        ([run, "--out x --steps 0"], r"--steps(?=.*\b1\b).*\b0\b"),
        ([out, "--out x"], named("uvit", "related.lit:LinearUViT")),
        ([run, "--out", tmp_path / "heads", "--heads 3"], named(16, 3)),
    ):
        with pytest.raises(ValueError, match=message):
            call(lit.main, args)

    # train.py continues the run, without the teacher.
    call(train.main, "--out", out, "--steps 4")


def test_lit_as_a_module(run, tmp_path, monkeypatch):
    # python -m related.lit: the module is then __main__, and its classes differ from those of
    # related.lit.
    out = str(tmp_path / "lit")
    command = ["lit", run, "--steps", "1", "--batch", "4", "--inherit", "all", "--out", out]
    monkeypatch.setattr(sys, "argv", command)
    with contextlib.suppress(SystemExit):
        runpy.run_module("related.lit", run_name="__main__")
    assert load(out)[1]["model"] == "related.lit:LinearUViT"


def test_weights_that_lit_inherits(run, tmp_path):
    def converted(name, *options):
        """The weights and the settings of a student, one tiny step after its start."""
        out = str(tmp_path / name)
        call(lit.main, run, "--steps 1 --batch 4 --lr 1e-12 --out", out, *options)
        net, config, _ = load(out)
        return net.state_dict(), config

    teacher = load(run)[0].state_dict()
    others, _ = converted("others")
    all_weights, _ = converted("all", "--inherit all --weight 0")
    none, config = converted("none", "--inherit none --heads 4 --seed 1")

    # By default all weights but those of attention.
    for name in teacher.keys() & others.keys():
        torch.testing.assert_close(others[name], teacher[name], rtol=0, atol=1e-9)
    queries = [name for name in others if name.endswith(".attention.attention.q.weight")]
    assert queries
    for name in queries:
        assert not torch.equal(others[name], all_weights[name])

    assert not torch.equal(none["stem.conv.weight"], teacher["stem.conv.weight"])
    assert config["model_args"]["linear_heads"] == 4


def test_linear_uvit_trains_from_scratch(tmp_path):
    train_small(tmp_path, "--model related.lit:LinearUViT --model-args", MODEL_ARGS)


def test_times_are_printed(capsys):
    lit.print_times(seconds=0.01)
    assert "softmax" in capsys.readouterr().out
