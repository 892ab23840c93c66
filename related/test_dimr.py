"""Tests of related/dimr.py."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample as sampling
from related import (
    dimr,
)
from schedule import (
    alpha_sigma,
    logsnr_schedule_cosine,
)
from support.checkpoint import load
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random, printed_numbers, train_small

TINY_DIMR = dict(
    res=16,
    num_classes=3,
    branches=[
        dict(channels=16, hidden=32, num_blocks=3, num_heads=2),
        dict(channels=8, hidden=16, num_blocks=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ],
)


PUBLISHED = {"XL/2R": (505_046_408, 160), "XL/3R": (1_056_352_904, 331)}


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_dimr_costs_what_was_published(monkeypatch, capsys, index):
    name = list(dimr.CONFIGS)[index]
    parameters, gmac = list(PUBLISHED.values())[index]
    monkeypatch.setattr(dimr, "CONFIGS", {name: dimr.CONFIGS[name]})
    call(dimr.main)
    (line,) = printed_numbers(capsys)
    assert line[0] == parameters
    assert line[2] == pytest.approx(gmac, rel=2e-3)


def test_parameters_of_time_dependent_norms():
    config = dimr.CONFIGS["XL/2R"][0]
    with torch.device("meta"):
        nets = dimr.DiMR(**config), dimr.DiMR(**dict(config, time="none"))
    with_time, plain = (sum(p.numel() for p in net.parameters()) for net in nets)
    # Of the RMSNorms, then of the LayerNorms.
    of_rms_norms = 3 * (2 * 39 * 960 + 21 * 480)
    of_layer_norms = 3 * 2 * (960 + 480 + 40 * 960 + 480)
    assert with_time - plain == of_rms_norms + of_layer_norms


def test_time_interpolates_a_parameter():
    parameter = fill_random(dimr.TimeParameter(5, 1.0))
    with torch.no_grad():
        parameter.w.abs_()
    tau = torch.tensor([-1e4, 0.3, 1e4])
    s = torch.sigmoid(parameter.w * 0.3 + parameter.b)
    torch.testing.assert_close(
        parameter(tau),
        torch.stack([parameter.p1, s * parameter.p0 + (1 - s) * parameter.p1, parameter.p0]),
    )
    fresh = dimr.TimeParameter(5, 0.5)
    assert torch.equal(fresh(tau), torch.full((3, 5), 0.5))


def test_dimr_ignores_time_while_both_values_are_equal():
    net, z = fill_random(dimr.DiMR(**TINY_DIMR)).eval(), torch.randn(2, 3, 16, 16)
    assert not torch.allclose(
        net(z, torch.tensor([-8.0, 8.0])), net(z, torch.tensor([3.0, 1.0])), atol=1e-5
    )
    for module in net.modules():
        if isinstance(module, dimr.TimeParameter):
            module.p1.data.copy_(module.p0)
    torch.testing.assert_close(net(z, torch.tensor([-8.0, 8.0])), net(z, torch.tensor([3.0, 1.0])))


def test_blocks_of_dimr_by_hand():
    tau = torch.tensor([0.3, -1.0]).double()
    norm = fill_random(dimr.Norm(6, "td", rms=True)).double()
    x = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(
        norm(x, tau),
        norm.gain(tau)[:, None] * x / x.square().mean(2, keepdim=True).sqrt(),
        rtol=1e-6,
        atol=1e-6,
    )
    norm = fill_random(dimr.Norm(6, "td")).double()
    centered = x - x.mean(2, keepdim=True)
    torch.testing.assert_close(
        norm(x, tau),
        norm.gain(tau)[:, None] * centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
        + norm.bias(tau)[:, None],
    )
    mlp = fill_random(dimr.GatedMLP(6, 12, "td")).double()
    h = mlp.norm(x, tau)
    torch.testing.assert_close(mlp(x, tau), mlp.w2(F.gelu(mlp.w0(h)) * mlp.w1(h)))
    block = fill_random(dimr.Block(6, 12, "td")).double()
    x = torch.randn(2, 4, 5, 6).double()
    y = x + block.conv(x.movedim(3, 1)).movedim(1, 3)  # the 7x7 sees x itself, without a norm
    torch.testing.assert_close(block(x, tau), y + block.mlp(y, tau))

    branch = fill_random(
        dimr.Branch((4, 4), 1, 3, 3, "td", 7, channels=6, hidden=8, num_blocks=4)
    ).double()  # two blocks, one in the middle, two
    z, below = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 2, 7).double()
    up = F.pixel_shuffle(
        branch.expand(branch.norm_below(below, tau))
        .unflatten(3, (4, 6))
        .transpose(3, 4)
        .flatten(3)
        .movedim(3, 1),
        2,
    ).movedim(1, 3)
    x0 = branch.patchify(z).movedim(1, 3) + branch.position + branch.norm_expanded(up, tau)
    x1 = branch.first[0](x0, tau)
    x2 = branch.first[1](x1, tau)
    x3 = branch.middle(x2, tau)
    x4 = branch.second[0](branch.merge[0](torch.cat([x3, x2], 3)), tau)
    x5 = branch.second[1](branch.merge[1](torch.cat([x4, x1], 3)), tau)
    output, features = branch(z, tau, None, below)
    torch.testing.assert_close(features, torch.cat([x0, x1, x2, x3, x4, x5], 3))
    torch.testing.assert_close(output, branch.head(branch.norm(x5, tau).movedim(3, 1)))


def test_other_time_conditionings_of_dimr():
    z, levels = torch.randn(2, 3, 16, 16), torch.tensor([[-8.0, 8.0], [3.0, 1.0]])
    for time, moves in (("ada", True), ("none", False)):
        net = dimr.DiMR(**TINY_DIMR, time=time).eval()
        assert torch.equal(net(z, levels[0]), net(z, levels[1]))  # at first
        fill_random(net)
        assert torch.equal(net(z, levels[0]), net(z, levels[1])) != moves
    net = dimr.DiMR(**TINY_DIMR).bfloat16()  # as --fsdp holds it
    assert net(z.bfloat16(), levels[0]).dtype == torch.bfloat16
    for fields, message in (
        ({"branches": []}, r"(?=.*--size\b)(?=.*--model-args\b).*\bbranches\b"),
        (
            {"branches": [dict(channels=6, hidden=8, num_blocks=1, num_heads=4)]},
            r"(?=.*\b6\b).*\b4\b",
        ),
        (dict(TINY_DIMR, res=24), "24x24"),
    ):
        with pytest.raises(ValueError, match=message):
            dimr.DiMR(**dict(res=16) | fields)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_dimr_with_any_number_of_branches(branches):
    config = dict(TINY_DIMR, res=(16, 32), branches=TINY_DIMR["branches"][-branches:])
    config["branches"][0] = TINY_DIMR["branches"][
        0
    ]  # the transformer, whose label token must be gone before its features are a grid
    net, z = fill_random(dimr.DiMR(**config)), torch.randn(2, 3, 16, 32)
    packed = net(
        z, torch.tensor([-2.0, 3.0]), torch.tensor([0, 2])
    )  # at logsnr 0 the slopes have no gradient
    shapes = [(2, 3, 16 >> k, 32 >> k) for k in range(branches)]
    assert [tuple(v.shape) for v in dimr.unpack(packed, 16, 32)] == shapes and net.eval()(
        z, torch.zeros(2)
    ).shape == z.shape
    packed.square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )


def test_pooled_noise_is_white_and_its_v_is_that_of_a_higher_logsnr():
    torch.manual_seed(0)
    x, eps, t, seen = (
        torch.rand(4, 3, 64, 64) * 2 - 1,
        torch.randn(4, 3, 64, 64),
        torch.tensor([0.1, 0.4, 0.6, 0.9]),
        [],
    )

    def net(z, logsnr, label=None):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        # v of the pooled image, from its pooled z and eps alone, by the definitions of the process
        for s in (1, 2, 4):
            eps_s, x_s = (F.avg_pool2d(each, s) for each in (eps, x))
            # avgpool(z) / norm = (alpha / norm) x_s + (sigma / s / norm) (s eps_s),
            # s eps_s being white
            norm = (alpha**2 + sigma**2 / s**2).sqrt()
            seen.append(alpha / norm * s * eps_s - sigma / s / norm * x_s)
        return torch.cat([v.reshape(4, 3, -1, 64) for v in seen], 2) + 0.1

    loss, logsnr = dimr.multi_resolution_loss(net, x, logsnr_schedule_cosine, t=t, eps=eps)
    torch.testing.assert_close(
        loss, torch.full((4,), 0.01 * (1 + 1 / 4 + 1 / 16)), rtol=1e-3, atol=1e-5
    )
    assert torch.equal(logsnr, logsnr_schedule_cosine(t))
    seen.clear()
    exact, _ = dimr.multi_resolution_loss(
        lambda *args: net(*args)[:, :, :64] - 0.1, x, logsnr_schedule_cosine, t=t, eps=eps
    )
    assert exact.max() < 1e-8  # in eval mode only the finest counts


def test_dimr_slopes_are_not_decayed():
    net = dimr.DiMR(**TINY_DIMR)
    decayed, free = dimr.parameter_groups(net, 0.03)
    names = {id(p): name for name, p in net.named_parameters()}
    assert (
        decayed["weight_decay"] == 0.03
        and free["weight_decay"] == 0
        and len(decayed["params"]) + len(free["params"]) == len(names)
    )
    assert {names[id(p)].rsplit(".", 1)[1] for p in free["params"]} == {"w", "b"} and not any(
        names[id(p)].endswith((".w", ".b")) for p in decayed["params"]
    )


def test_dimr_trains_and_samples_by_the_commands(tmp_path):
    branches = [
        dict(channels=16, hidden=16, num_blocks=1, num_heads=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ]
    run = train_small(
        tmp_path, "--model related.dimr:DiMR --model-args", json.dumps(dict(branches=branches))
    )
    call(
        sampling.main,
        run,
        "--model related.dimr:DiMR --n 2 --steps 2 --guidance 2 --out",
        tmp_path / "grid.png",
    )
    assert load(run)[1]["loss"] == "related.dimr:multi_resolution_loss"


def test_spectrum_of_waves_and_of_noise(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    columns = torch.arange(32).double() * 2 * math.pi / 32
    for k in (3, 16):
        power = dimr.spectrum((k * columns).cos().expand(1, 3, 32, 32))
        ring = (
            torch.hypot(*torch.meshgrid(*2 * [torch.fft.fftfreq(32) * 32], indexing="ij")).round()
            == k
        )
        expected = torch.zeros(24).double()
        expected[k] = (
            (0.5 if k < 16 else 1.0) * 32**2 / ring.sum().item()
        )  # by Parseval, over all waves of that length
        torch.testing.assert_close(power, expected, rtol=0, atol=1e-9)
    noise = torch.randn(400, 3, 32, 32)
    torch.testing.assert_close(dimr.spectrum(noise), torch.ones(24), rtol=0, atol=0.1)
    assert dimr.spectrum_error(noise, noise) == 0 and dimr.spectrum_error(
        2 * noise, noise
    ) == pytest.approx(3)
    x, label = dimr.striped_shapes(40, 16)
    plain = load_batch(Shapes(16), range(40))[0].int()
    for i in (0, 10):
        inside = (plain[i] >= 20) & (plain[i] <= 235)
        sign = torch.tensor([-20, 20]).expand(3, 16, 8, 2).flatten(2)
        assert (
            torch.equal((x[i].int() - plain[i])[inside], (sign if i == 0 else sign.mT)[inside])
            and inside.any()
        )
    for name, pictures in (("a", x), ("b", x), ("wide", x[:, :, :8])):
        np.savez(tmp_path / name, x=pictures.permute(0, 2, 3, 1).numpy())
    call(dimr.main, f"{tmp_path}/a.npz", f"{tmp_path}/b.npz")
    assert re.search(r"\bb\.npz\b.*\b0\.0 %", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"(?=.*\ba\.npz\b).*\bwide\.npz\b.*\b8\b.{1,3}\b16\b"):
        call(dimr.main, f"{tmp_path}/a.npz", f"{tmp_path}/wide.npz")
    with pytest.raises(SystemExit, match=r"^dimr: .+\Z"):  # one line
        call(dimr.main, f"{tmp_path}/a.npz")
    assert dimr.STRIPED_SHAPES == 20_000
    monkeypatch.setattr(dimr, "STRIPED_SHAPES", 2000)
    call(dimr.main, "--stripes", f"{tmp_path}/stripes.npz")
    with np.load(f"{tmp_path}/stripes.npz") as stripes:
        assert (
            stripes["x"].shape == (2000, 32, 32, 3)
            and np.array_equal(stripes["x"][:40], dimr.striped_shapes(40)[0].permute(0, 2, 3, 1))
            and stripes["classes"][3] == "heart"
        )
