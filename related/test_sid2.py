"""Tests of related/sid2.py."""

import math
import re

import pytest
import torch

import sample as sampling
import train
from loss import diffusion_loss
from related import (
    sid2,
)
from schedule import (
    diffuse,
    logsnr_schedule_cosine,
    make_schedule,
    x_from_v,
)
from support.checkpoint import build_net, load
from support.data import Shapes
from support.settings import make_config, parse
from support.text import with_text
from tests.helpers import TINY_UVIT, call, train_small
from unet import PATCHING, count
from uvit import UViT


@pytest.mark.parametrize(
    "size, gmac", [("small", 137), pytest.param("flop-heavy", 653, marks=pytest.mark.slow)]
)
def test_sid2_costs_what_was_published(size, gmac):
    _, macs, _ = count(sid2.ResidualUViT, sid2.ResidualUViT.RECIPES[size][256] | dict(res=256))
    assert macs / 1e9 == pytest.approx(gmac, rel=0.015)


def test_sid2_is_the_identity_at_init():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(
        **dict(
            TINY_UVIT, channel_multiplier=(1, 2, 4), num_res_blocks=(1, 2), attn_resolutions=(8,)
        )
    )
    h, z = torch.randn(2, 16, 16, 16), torch.randn(2, 3, 16, 16)
    emb = net.embedding(torch.tensor([-3.0, 4.0]), torch.tensor([0, 3]))
    assert torch.equal(net.level(0, h, emb), h)
    assert torch.equal(net(z, torch.zeros(2)), torch.zeros_like(z))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert net(z, torch.zeros(2)).std() > 0.01


def test_sid2_gradients_reach_all_weights():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(**TINY_UVIT)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    net(torch.randn(4, 3, 16, 16), torch.randn(4), torch.arange(4)).square().mean().backward()
    assert all(
        parameter.grad.abs().max() > 0
        for name, parameter in net.named_parameters()
        if "norm_k.bias" not in name
    )


def test_sid2_keeps_no_more_memory_for_the_gradient_than_the_uvit():
    def kept(net_class):
        net, storages = net_class(**dict(TINY_UVIT, transformer_dropout=0.0)), {}
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = (
                tensor.untyped_storage()
            )  # several tensors may be views of one
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.zeros(8, 3, 16, 16), torch.zeros(8))
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)

    assert 2**20 < kept(sid2.ResidualUViT) < kept(UViT)


def test_sid2_takes_texts():
    torch.manual_seed(0)
    net = with_text(sid2.ResidualUViT)(**dict(TINY_UVIT, num_classes=0, text_tokens=5))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, texts = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])
    v = net(z, torch.zeros(2), texts)
    assert not torch.allclose(v[:1], net(z[:1], torch.zeros(1)), atol=1e-5) and torch.allclose(
        v[1:], net(z[1:], torch.zeros(1)), atol=1e-5
    )


def test_sigmoid_loss_in_eps_equals_that_in_x():
    torch.manual_seed(0)
    x, eps, t, v_hat = (
        torch.randn(8, 3, 4, 4).double(),
        torch.randn(8, 3, 4, 4).double(),
        torch.linspace(0.05, 0.95, 8).double(),
        torch.randn(8, 3, 4, 4).double(),
    )

    def net(z, logsnr, label):
        return v_hat

    for bias in (0.0, -3.0):
        loss, logsnr = sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=bias, t=t, eps=eps)
        x_hat = x_from_v(diffuse(x, eps, logsnr), v_hat, logsnr)
        slope = torch.autograd.grad(
            logsnr_schedule_cosine(u := t.clone().requires_grad_()).sum(), u
        )[0]
        torch.testing.assert_close(
            loss,
            -slope
            * math.exp(bias)
            * torch.sigmoid(logsnr - bias)
            * (x - x_hat).square().mean((1, 2, 3)),
        )


def test_bias_of_the_sigmoid_loss_follows_the_resolution():
    assert [sid2.loss_bias(res) for res in (64, 128, 256, 512, 1024)] == [0, 0, -1, -3, -4]
    net, x, t = lambda z, logsnr, label: 0.3 * z, torch.zeros(1, 1, 256, 512), torch.tensor([0.4])
    ours, other = (
        sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=bias, t=t, eps=x + 1)[0]
        for bias in (None, -1.0)
    )
    assert ours == other > 0


def test_sid2_guidance_interval_is_shifted_with_the_resolution():
    for (_, res), settings in sid2.ResidualUViT.TRAINING.items():
        low, high = settings["sampling"]["guidance_interval"]
        assert high - low == pytest.approx(8) and math.exp(low) * (res / 64) ** 2 == pytest.approx(
            math.exp(-3), rel=0.01
        )  # pooled: Eq. 4


def test_sigmoid_loss_does_not_depend_on_the_schedule():
    torch.manual_seed(0)
    n = 20_000
    t = (torch.arange(n).double() + 0.5) / n
    x, eps = torch.randn(2, n, 1, 1, 1).double()

    def net(z, logsnr, label):
        return 0.3 * z

    schedules = (
        lambda t: logsnr_schedule_cosine(t, -10.0, 10.0),
        lambda t: 10 - 20 * t,
        lambda t: 10 - 20 * t**2,
    )
    means = [
        sid2.sigmoid_loss(net, x.sign(), schedule, bias=-1.0, t=t, eps=eps.sign())[0].mean()
        for schedule in schedules
    ]
    assert max(means) / min(means) < 1.01
    plain = [
        diffusion_loss(net, x.sign(), schedule, t=t, eps=eps.sign())[0].mean()
        for schedule in schedules
    ]
    assert max(plain) / min(plain) > 1.1  # of the loss without weights, this is not so


def test_sid2_trains_and_samples_as_its_recipe_says(tmp_path, capsys):
    model_args = (
        '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
        '"num_res_blocks": [1], "num_transformer_blocks": 1}'
    )
    run = str(train_small(tmp_path, "--model related.sid2:ResidualUViT --model-args", model_args))
    net, config, schedule = load(run)
    assert (config["loss"], config["schedule"], config["model_args"]["patching"]) == (
        "related.sid2:sigmoid_loss",
        "interpolated:32:32@10",
        "conv_2",
    )
    call(sampling.main, run, "--n 2 --steps 4 --guidance 2 --out", f"{run}/grid.png")
    call(
        sampling.main,
        run,
        "--n 2 --steps 4 --guidance 2 --guidance-interval -99 99 --out",
        f"{run}/grid.png",
    )
    assert (
        parse(["--space", "v"])["loss"] is None
    )  # the loss with that option, whatever the recipe has
    text = capsys.readouterr().out
    assert re.search(r"-1\.61\b.*[^-\d]6\.39\b", text) and re.search(r"-99\b.*[^-\d]99\b", text)
    for options, message in (
        (["--size base"], r"--size(?=.*\bbase\b).*tiny, small, flop-heavy"),
        (["--size flop-heavy --res 128"], r"--res(?=.*\b128\b).*256, 512"),
    ):
        with pytest.raises(ValueError, match=message):
            call(train.main, "--model related.sid2:ResidualUViT --out", tmp_path / "none", *options)


def test_every_sid2_recipe_builds_and_trains():
    for size, by_res in sid2.ResidualUViT.RECIPES.items():
        for res, fields in by_res.items():
            given = dict(model="related.sid2:ResidualUViT", size=size, res=res)
            config = make_config(given, torch.device("cpu"), Shapes(res))
            assert (
                config["loss"] == "related.sid2:sigmoid_loss"
                and make_schedule(config["schedule"], res)(torch.tensor(0.0)) > 9
            )
            with torch.device("meta"):
                net = build_net(config["model"], config["model_args"])
                assert net(torch.empty(2, 3, res, res), torch.empty(2)).shape == (2, 3, res, res)
                assert (
                    net.stem.conv.out_channels > 3 * PATCHING[fields.get("patching", "none")] ** 2
                )
