"""Tests of related/sid2.py."""

import json
import math
import re

import pytest
import torch

import sample as sampling
import train
from loss import diffusion_loss
from related import sid2
from schedule import diffuse, logsnr_schedule_cosine, make_schedule, x_from_v
from support.checkpoint import build_net, load
from support.data import Shapes
from support.settings import make_config, parse
from support.text import with_text
from tests.helpers import TINY_UVIT, call, fill_random, train_small
from unet import PATCHING, count
from uvit import UViT

# ---------------------------------------------------------------- the Residual U-ViT


@pytest.mark.parametrize(
    "size, gmac", [("small", 137), pytest.param("flop-heavy", 653, marks=pytest.mark.slow)]
)
def test_sid2_costs_what_was_published(size, gmac):
    by_res = sid2.ResidualUViT.RECIPES[size]
    costs = {res: count(sid2.ResidualUViT, by_res[res] | dict(res=res)) for res in by_res}
    assert costs[256][1] / 1e9 == pytest.approx(gmac, rel=0.015)

    # Parameters, GMAC and activations are nearly the same at the other resolutions.
    for cost in costs.values():
        assert cost == pytest.approx(costs[256], rel=0.002)


def test_sid2_is_the_identity_at_init():
    torch.manual_seed(0)
    two_levels = dict(channel_multiplier=(1, 2, 4), num_res_blocks=(1, 2), attn_resolutions=(8,))
    net = sid2.ResidualUViT(**TINY_UVIT | two_levels)
    h = torch.randn(2, 16, 16, 16)
    z = torch.randn(2, 3, 16, 16)
    emb = net.embedding(torch.tensor([-3.0, 4.0]), torch.tensor([0, 3]))

    # All levels together are the identity. The head returns zeros.
    assert torch.equal(net.level(0, h, emb), h)
    assert torch.equal(net(z, torch.zeros(2)), torch.zeros_like(z))

    # With other weights the output is not zero.
    fill_random(net)
    assert net(z, torch.zeros(2)).std() > 0.01


def test_the_transformer_alone_knows_positions():
    torch.manual_seed(0)
    options = dict(channel_multiplier=(2,), num_res_blocks=(), attn_resolutions=(4,))
    net = sid2.ResidualUViT(**TINY_UVIT | options | dict(res=8, patching="conv_2"))
    fill_random(net)
    z, logsnr = torch.randn(1, 3, 8, 8), torch.zeros(1)
    rolled = net(z.roll(2, 3), logsnr, torch.zeros(1).long())
    assert (net(z, logsnr, torch.zeros(1).long()).roll(2, 3) - rolled).abs().max() > 1e-3


def test_sid2_gradients_reach_all_weights():
    net = fill_random(sid2.ResidualUViT(**TINY_UVIT))
    v = net(torch.randn(4, 3, 16, 16), torch.randn(4), torch.arange(4))
    v.square().mean().backward()
    for name, parameter in net.named_parameters():
        # The bias of keys has no gradient: it changes all logits of a query by the same number.
        if "norm_k.bias" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_sid2_keeps_no_more_memory_for_the_gradient_than_the_uvit():
    def kept_bytes(net_class):
        """The memory that the backward pass of a network needs, without its weights."""
        net = net_class(**TINY_UVIT)
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        storages = {}

        def pack(tensor):
            # Several tensors may be views of one storage.
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                # Keep the storage, so that no other one gets its address.
                storages[storage._cdata] = storage
            return tensor

        def unpack(tensor):
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            net(torch.zeros(8, 3, 16, 16), torch.zeros(8))
        return sum(storage.nbytes() for storage in storages.values())

    residual = kept_bytes(sid2.ResidualUViT)
    assert residual > 2**20
    assert residual < kept_bytes(UViT)


def test_sid2_takes_texts():
    fields = TINY_UVIT | dict(num_classes=0, text_tokens=5)
    net = fill_random(with_text(sid2.ResidualUViT)(**fields))
    z = torch.randn(2, 3, 16, 16)
    texts = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])
    v = net(z, torch.zeros(2), texts)

    # A text changes the output. The empty text is the same as none.
    assert not torch.allclose(v[:1], net(z[:1], torch.zeros(1)), atol=1e-5)
    assert torch.allclose(v[1:], net(z[1:], torch.zeros(1)), atol=1e-5)


# ---------------------------------------------------------------- the sigmoid loss


def test_sigmoid_loss_in_eps_equals_that_in_x():
    torch.manual_seed(0)
    schedule = logsnr_schedule_cosine
    x = torch.randn(8, 3, 4, 4).double()
    eps = torch.randn(8, 3, 4, 4).double()
    t = torch.linspace(0.05, 0.95, 8).double()
    v_hat = torch.randn(8, 3, 4, 4).double()

    def net(z, logsnr, label):
        return v_hat

    # dlogsnr/dt, by autograd.
    u = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule(u).sum(), u)

    # In x, the weight is -dlogsnr/dt e^b sigmoid(logsnr - b).
    for bias in (0.0, -3.0):
        loss, logsnr = sid2.sigmoid_loss(net, x, schedule, bias=bias, t=t, eps=eps)
        x_hat = x_from_v(diffuse(x, eps, logsnr), v_hat, logsnr)
        weight = -slope * math.exp(bias) * torch.sigmoid(logsnr - bias)
        torch.testing.assert_close(loss, weight * (x - x_hat).square().mean((1, 2, 3)))


def test_bias_of_the_sigmoid_loss_follows_the_resolution():
    assert [sid2.loss_bias(res) for res in (64, 128, 256, 512, 1024)] == [0, 0, -1, -3, -4]

    def net(z, logsnr, label):
        return 0.3 * z

    # By default, the bias is that of the shorter side, 256.
    x = torch.zeros(1, 1, 256, 512)
    options = dict(t=torch.tensor([0.4]), eps=x + 1)
    default, _ = sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=None, **options)
    expected, _ = sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=-1.0, **options)
    assert default == expected
    assert expected > 0


def test_sigmoid_loss_does_not_depend_on_the_schedule():
    torch.manual_seed(0)
    n = 20_000
    t = (torch.arange(n).double() + 0.5) / n
    x, eps = torch.randn(2, n, 1, 1, 1).double().sign()

    def net(z, logsnr, label):
        return 0.3 * z

    def cosine(t):
        return logsnr_schedule_cosine(t, -10.0, 10.0)

    def linear(t):
        return 10 - 20 * t

    def quadratic(t):
        return 10 - 20 * t**2

    schedules = (cosine, linear, quadratic)
    sigmoid_means = []
    plain_means = []
    for schedule in schedules:
        loss, _ = sid2.sigmoid_loss(net, x, schedule, bias=-1.0, t=t, eps=eps)
        sigmoid_means.append(loss.mean())
        loss, _ = diffusion_loss(net, x, schedule, t=t, eps=eps)
        plain_means.append(loss.mean())
    assert max(sigmoid_means) / min(sigmoid_means) < 1.01

    # The loss without weights depends on the schedule.
    assert max(plain_means) / min(plain_means) > 1.1


# ---------------------------------------------------------------- recipes


def test_sid2_guidance_interval_is_shifted_with_the_resolution():
    # Eq. 4: an image that is pooled to 64 px has (res / 64)^2 times the signal-to-noise ratio.
    # There the interval is -3 to 5.
    for (_, res), settings in sid2.ResidualUViT.TRAINING.items():
        low, high = settings["sampling"]["guidance_interval"]
        assert high - low == pytest.approx(8)
        assert math.exp(low) * (res / 64) ** 2 == pytest.approx(math.exp(-3), rel=0.01)


def test_sid2_trains_and_samples_as_its_recipe_says(tmp_path, capsys):
    model_args = dict(
        base_channels=8,
        emb_channels=16,
        channel_multiplier=[1, 2],
        num_res_blocks=[1],
        num_transformer_blocks=1,
    )
    run = train_small(
        tmp_path, "--model related.sid2:ResidualUViT --model-args", json.dumps(model_args)
    )
    _, config, _ = load(str(run))
    assert config["loss"] == "related.sid2:sigmoid_loss"
    assert config["schedule"] == "interpolated:32:32@10"
    assert config["model_args"]["patching"] == "conv_2"

    # Sampling prints the guidance interval: that of the recipe, or that of the command line.
    options = ["--n 2 --steps 4 --guidance 2 --out", tmp_path / "grid.png"]
    call(sampling.main, run, *options)
    call(sampling.main, run, *options, "--guidance-interval -99 99")
    text = capsys.readouterr().out
    assert re.search(r"-1\.61\b.*[^-\d]6\.39\b", text)
    assert re.search(r"-99\b.*[^-\d]99\b", text)


def test_space_replaces_the_loss_of_a_recipe():
    # None is diffusion_loss. A given value takes precedence over that of any recipe.
    assert parse(["--space", "v"])["loss"] is None


def test_sizes_and_resolutions_without_a_recipe_are_rejected(tmp_path):
    for options, message in (
        ("--size base", r"--size(?=.*\bbase\b).*tiny, small, flop-heavy"),
        ("--size flop-heavy --res 128", r"--res(?=.*\b128\b).*256, 512"),
    ):
        with pytest.raises(ValueError, match=message):
            call(train.main, "--model related.sid2:ResidualUViT --out", tmp_path / "none", options)


def test_every_sid2_recipe_builds_and_trains():
    for size, by_res in sid2.ResidualUViT.RECIPES.items():
        for res, fields in by_res.items():
            given = dict(model="related.sid2:ResidualUViT", size=size, res=res)
            config = make_config(given, torch.device("cpu"), Shapes(res))
            assert config["loss"] == "related.sid2:sigmoid_loss"
            schedule = make_schedule(config["schedule"], res)
            assert schedule(torch.tensor(0.0)) > 9

            with torch.device("meta"):
                net = build_net(config["model"], config["model_args"])
                v = net(torch.empty(2, 3, res, res), torch.empty(2))
            assert v.shape == (2, 3, res, res)

            # The stem has more channels than a patch has values.
            patch = PATCHING[fields.get("patching", "none")]
            assert net.stem.conv.out_channels > 3 * patch**2
