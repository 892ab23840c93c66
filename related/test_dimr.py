"""Tests of related/dimr.py."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample as sampling
from related import dimr
from schedule import alpha_sigma, logsnr_schedule_cosine
from support.checkpoint import load
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random, named, printed_numbers, train_small

TINY_DIMR = dict(
    res=16,
    num_classes=3,
    branches=[
        dict(channels=16, hidden=32, num_blocks=3, num_heads=2),
        dict(channels=8, hidden=16, num_blocks=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ],
)

# ---------------------------------------------------------------- the configurations

# Parameters of this code, and the published GMAC.
COSTS = {"XL/2R": (505_046_408, 160), "G/2R": (1_056_352_904, 331)}


@pytest.mark.parametrize("name", ["XL/2R", pytest.param("G/2R", marks=pytest.mark.slow)])
def test_dimr_costs_what_was_published(monkeypatch, capsys, name):
    assert list(dimr.CONFIGS) == list(COSTS)
    parameters, gmac = COSTS[name]
    monkeypatch.setattr(dimr, "CONFIGS", {name: dimr.CONFIGS[name]})
    dimr.print_configurations()
    (line,) = printed_numbers(capsys)
    assert line[0] == parameters
    assert line[2] == pytest.approx(gmac, rel=2e-3)


def test_parameters_of_time_dependent_norms():
    config = dimr.CONFIGS["XL/2R"][0]
    with torch.device("meta"):
        nets = [dimr.DiMR(**config), dimr.DiMR(**config, time="none")]
    with_time, without = (sum(p.numel() for p in net.parameters()) for net in nets)

    # A gain or bias of C channels has 4 C parameters instead of C. RMSNorm has a gain only.
    of_rms_norms = 3 * (2 * 39 * 960 + 21 * 480)
    of_layer_norms = 3 * 2 * (960 + 480 + 40 * 960 + 480)
    assert with_time - without == of_rms_norms + of_layer_norms


# ---------------------------------------------------------------- norms that depend on time


def test_time_interpolates_a_parameter():
    # With w > 0, early and late times give p1 and p0.
    parameter = fill_random(dimr.TimeParameter(5, 1.0))
    with torch.no_grad():
        parameter.w.abs_()
    tau = torch.tensor([-1e4, 0.3, 1e4])
    s = torch.sigmoid(parameter.w * 0.3 + parameter.b)
    between = s * parameter.p0 + (1 - s) * parameter.p1
    expected = torch.stack([parameter.p1, between, parameter.p0])
    torch.testing.assert_close(parameter(tau), expected)

    # At initialization it does not depend on time.
    fresh = dimr.TimeParameter(5, 0.5)
    assert torch.equal(fresh(tau), torch.full((3, 5), 0.5))


def test_dimr_ignores_time_while_both_values_are_equal():
    net = fill_random(dimr.DiMR(**TINY_DIMR)).eval()
    z = torch.randn(2, 3, 16, 16)
    levels = torch.tensor([-8.0, 8.0])
    others = torch.tensor([3.0, 1.0])
    assert not torch.allclose(net(z, levels), net(z, others), atol=1e-5)

    for module in net.modules():
        if isinstance(module, dimr.TimeParameter):
            module.p1.data.copy_(module.p0)
    torch.testing.assert_close(net(z, levels), net(z, others))


@pytest.mark.parametrize("time, has_effect", [("ada", True), ("none", False)])
def test_other_time_conditionings_of_dimr(time, has_effect):
    net = dimr.DiMR(**TINY_DIMR, time=time).eval()
    z = torch.randn(2, 3, 16, 16)
    levels = torch.tensor([-8.0, 8.0])
    others = torch.tensor([3.0, 1.0])

    # At initialization time has no effect.
    assert torch.equal(net(z, levels), net(z, others))

    fill_random(net)
    is_equal = torch.equal(net(z, levels), net(z, others))
    assert is_equal != has_effect


# ---------------------------------------------------------------- the network


def test_norms_by_hand():
    tau = torch.tensor([0.3, -1.0]).double()

    # RMSNorm. The code adds 1e-8 to the root mean square.
    norm = fill_random(dimr.Norm(6, "td", rms=True)).double()
    x = torch.randn(2, 5, 6).double()
    expected = norm.gain(tau)[:, None] * x / x.square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x, tau), expected, rtol=1e-6, atol=1e-6)

    # LayerNorm.
    norm = fill_random(dimr.Norm(6, "td")).double()
    centered = x - x.mean(2, keepdim=True)
    std = (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
    expected = norm.gain(tau)[:, None] * centered / std + norm.bias(tau)[:, None]
    torch.testing.assert_close(norm(x, tau), expected)


def test_blocks_of_dimr_by_hand():
    tau = torch.tensor([0.3, -1.0]).double()

    # The gated MLP.
    mlp = fill_random(dimr.GatedMLP(6, 12, "td")).double()
    x = torch.randn(2, 5, 6).double()
    h = mlp.norm(x, tau)
    torch.testing.assert_close(mlp(x, tau), mlp.w2(F.gelu(mlp.w0(h)) * mlp.w1(h)))

    # The ConvNeXt block. Its 7x7 convolution sees x itself, without a norm.
    block = fill_random(dimr.Block(6, 12, "td")).double()
    x = torch.randn(2, 4, 5, 6).double()
    y = x + block.conv(x.movedim(3, 1)).movedim(1, 3)
    torch.testing.assert_close(block(x, tau), y + block.mlp(y, tau))


def test_branch_by_hand():
    # Two blocks, one in the middle, two blocks.
    branch = dimr.Branch((4, 4), 1, 3, 3, "td", 7, channels=6, hidden=8, num_blocks=4)
    branch = fill_random(branch).double()
    tau = torch.tensor([0.3, -1.0]).double()
    z = torch.randn(2, 3, 4, 4).double()
    below = torch.randn(2, 2, 2, 7).double()

    # The features of the coarser branch. F.pixel_shuffle wants the four values of a channel side by
    # side.
    up = branch.expand(branch.norm_below(below, tau)).unflatten(3, (4, 6))
    up = up.transpose(3, 4).flatten(3).movedim(3, 1)  # (B, 24, 2, 2)
    up = F.pixel_shuffle(up, 2).movedim(1, 3)  # (B, 4, 4, 6)

    # The second half of the blocks takes the outputs of the first half, the last one first.
    x0 = branch.patchify(z).movedim(1, 3) + branch.position + branch.norm_expanded(up, tau)
    x1 = branch.first[0](x0, tau)
    x2 = branch.first[1](x1, tau)
    x3 = branch.middle(x2, tau)
    x4 = branch.second[0](branch.merge[0](torch.cat([x3, x2], 3)), tau)
    x5 = branch.second[1](branch.merge[1](torch.cat([x4, x1], 3)), tau)

    output, features = branch(z, tau, None, below)
    torch.testing.assert_close(features, torch.cat([x0, x1, x2, x3, x4, x5], 3))
    torch.testing.assert_close(output, branch.head(branch.norm(x5, tau).movedim(3, 1)))


def test_dimr_in_bfloat16():
    # --fsdp holds the weights in bfloat16.
    net = dimr.DiMR(**TINY_DIMR).bfloat16()
    z = torch.randn(2, 3, 16, 16).bfloat16()
    assert net(z, torch.tensor([-8.0, 8.0])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(branches=[]), r"(?=.*--size\b)(?=.*--model-args\b).*\bbranches\b"),
        (
            dict(branches=[dict(channels=6, hidden=8, num_blocks=1, num_heads=4)]),
            named(6, 4),
        ),
        (dict(TINY_DIMR, res=18), "18x18"),
    ],
)
def test_invalid_fields_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        dimr.DiMR(**dict(res=16) | fields)


@pytest.mark.parametrize("num_branches", [1, 2, 3])
def test_dimr_with_any_number_of_branches(num_branches):
    # The first branch is the transformer. Its label token must be gone before its features are a
    # grid.
    transformer, *convolutions = TINY_DIMR["branches"]
    branches = [transformer, *convolutions[3 - num_branches :]]
    net = fill_random(dimr.DiMR(**dict(TINY_DIMR, res=(16, 32), branches=branches)))
    z = torch.randn(2, 3, 16, 32)

    # The loss asks for all branches. At logsnr 0 the slopes would have no gradient.
    arguments = (z, torch.tensor([-2.0, 3.0]), torch.tensor([0, 2]))
    outputs = net(*arguments, all_branches=True)
    shapes = [tuple(v.shape) for v in outputs]
    assert shapes == [(2, 3, 16 >> k, 32 >> k) for k in range(num_branches)]

    # A caller that does not gets the finest one, in train mode and in eval mode.
    assert torch.equal(net(*arguments), outputs[0])
    torch.testing.assert_close(net.eval()(*arguments), outputs[0])

    # All weights get gradients.
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# ---------------------------------------------------------------- training


def test_pooled_noise_is_white_and_its_v_is_that_of_a_higher_logsnr():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    eps = torch.randn(4, 3, 64, 64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])

    def exact(z, logsnr, label, all_branches):
        """v of the pooled image at three scales, by the definitions of the process."""
        assert all_branches
        alpha, sigma = alpha_sigma(logsnr, like=z)
        outputs = []
        for s in (1, 2, 4):
            # avgpool(z) = alpha x_s + (sigma / s) (s eps_s), and s eps_s is white. Divided by this
            # norm, the squares of the two factors add up to 1.
            x_s = F.avg_pool2d(x, s)
            eps_s = F.avg_pool2d(eps, s)
            norm = (alpha**2 + sigma**2 / s**2).sqrt()
            outputs.append(alpha / norm * s * eps_s - sigma / s / norm * x_s)
        return outputs

    def off_by_a_tenth(*args, **options):
        return [v + 0.1 for v in exact(*args, **options)]

    # The coarser scales weigh less.
    schedule = logsnr_schedule_cosine
    loss, logsnr = dimr.multi_resolution_loss(off_by_a_tenth, x, schedule, t=t, eps=eps)
    expected = torch.full((4,), 0.01 * (1 + 1 / 4 + 1 / 16))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(logsnr, schedule(t))

    # The exact v of every scale has no loss.
    loss, _ = dimr.multi_resolution_loss(exact, x, schedule, t=t, eps=eps)
    assert loss.max() < 1e-8


def test_dimr_slopes_are_not_decayed():
    net = dimr.DiMR(**TINY_DIMR)
    decayed, free = dimr.parameter_groups(net, 0.03)
    assert decayed["weight_decay"] == 0.03
    assert free["weight_decay"] == 0

    # Each parameter is in one group. Only w and b of the time parameters are free.
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert {names[id(p)].rsplit(".", 1)[1] for p in free["params"]} == {"w", "b"}
    for parameter in decayed["params"]:
        assert not names[id(parameter)].endswith((".w", ".b"))


def test_dimr_trains_and_samples_by_the_commands(tmp_path):
    model = "--model related.dimr:DiMR"
    branches = [
        dict(channels=16, hidden=16, num_blocks=1, num_heads=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ]
    run = train_small(tmp_path, model, "--model-args", json.dumps(dict(branches=branches)))
    options = "--n 2 --steps 2 --guidance 2 --out"
    call(sampling.main, run, model, options, tmp_path / "grid.png")
    _, config, _ = load(str(run))
    assert config["loss"] == "related.dimr:multi_resolution_loss"


# ---------------------------------------------------------------- fine detail


@pytest.mark.parametrize("k", [3, 16])
def test_spectrum_of_a_wave(k):
    columns = torch.arange(32).double() * 2 * math.pi / 32
    power = dimr.spectrum((k * columns).cos().expand(1, 3, 32, 32))

    # By Parseval the total power is that of the pixels, the mean of cos^2 times their number. The
    # spectrum divides it by the number of all waves of that length. 16 is the Nyquist frequency,
    # where cos is 1 or -1.
    waves = torch.fft.fftfreq(32) * 32
    radius = torch.hypot(waves[:, None], waves).round()
    num_waves = (radius == k).sum().item()
    expected = torch.zeros(24).double()
    expected[k] = (0.5 if k < 16 else 1.0) * 32**2 / num_waves
    torch.testing.assert_close(power, expected, rtol=0, atol=1e-9)


def test_spectrum_of_noise():
    torch.manual_seed(0)
    noise = torch.randn(400, 3, 32, 32)
    torch.testing.assert_close(dimr.spectrum(noise), torch.ones(24), rtol=0, atol=0.1)

    # Twice the values have four times the power.
    assert dimr.spectrum_error(noise, noise) == 0
    assert dimr.spectrum_error(2 * noise, noise) == pytest.approx(3)


def test_stripes_are_vertical_then_horizontal():
    images, _ = dimr.striped_shapes(40, 16)
    plain, _ = load_batch(Shapes(16), range(40))
    difference = images.int() - plain.int()
    vertical = torch.tensor([-20, 20]).expand(3, 16, 8, 2).flatten(2)
    for i, stripes in ((0, vertical), (10, vertical.mT)):
        # Other pixels may be clamped.
        inside = (plain[i] >= 20) & (plain[i] <= 235)
        assert inside.any()
        assert torch.equal(difference[i][inside], stripes[inside])


def test_spectrum_command(tmp_path, capsys):
    images, _ = dimr.striped_shapes(40, 16)
    images = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", x=images)
    np.savez(tmp_path / "b.npz", x=images)
    np.savez(tmp_path / "wide.npz", x=images[:, :8])

    # Equal images have equal spectra.
    call(dimr.main, tmp_path / "a.npz", tmp_path / "b.npz")
    assert re.search(r"\bb\.npz\b.*\b0\.0 %", capsys.readouterr().out)

    # Images of other sizes are rejected, and one file is not enough. The error is one line.
    with pytest.raises(ValueError, match=r"(?=.*\ba\.npz\b).*\bwide\.npz\b.*\b8\b.{1,3}\b16\b"):
        call(dimr.main, tmp_path / "a.npz", tmp_path / "wide.npz")
    with pytest.raises(SystemExit, match=r"^dimr: .+\Z"):
        call(dimr.main, tmp_path / "a.npz")


def test_stripes_command(tmp_path, monkeypatch):
    # A tenth of the images.
    assert dimr.STRIPED_SHAPES == 20_000
    monkeypatch.setattr(dimr, "STRIPED_SHAPES", 2000)
    path = tmp_path / "stripes.npz"
    call(dimr.main, "--stripes", path)

    images, _ = dimr.striped_shapes(40)
    with np.load(path) as stripes:
        assert stripes["x"].shape == (2000, 32, 32, 3)
        assert np.array_equal(stripes["x"][:40], images.permute(0, 2, 3, 1))
        assert stripes["classes"][3] == "heart"
