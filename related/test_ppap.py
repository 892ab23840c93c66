"""Tests of related/ppap.py."""

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import sample as sampling
from related import (
    ppap,
    ppgn,
)
from sample import sample
from schedule import (
    alpha_sigma,
    diffuse,
    logsnr_schedule_cosine,
    make_schedule,
)
from support.checkpoint import load
from support.data import Shapes, load_batch
from support.runtime import in_bf16
from tests.helpers import call, train_small


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 2), (7, 2)])
def test_low_rank_convolution_equals_one_with_the_merged_weight(kernel, stride):
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(4, 6, kernel, stride, kernel // 2), torch.randn(2, 4, 14, 14)
    before, weight = conv(x), conv.weight.detach().clone()
    parametrize.register_parametrization(conv, "weight", change := ppap.LowRank(conv.weight, 3))
    assert torch.equal(conv(x), before)
    assert change.a.shape == (3 * kernel, 4 * kernel) and change.b.shape == (6 * kernel, 3 * kernel)
    torch.nn.init.normal_(change.b)
    merged = weight + 8 / 3 * (change.b @ change.a).reshape(6, 4, kernel, kernel)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, merged, conv.bias, stride, kernel // 2), rtol=0, atol=1e-5
    )
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    assert torch.equal(conv.weight, weight)


def test_experts_add_few_parameters_to_the_classifier():
    torch.manual_seed(0)
    classifier, x = ppap.Classifier(10).eval(), torch.randn(2, 3, 32, 32)
    net = ppap.expert(classifier, rank=2).eval()
    assert torch.equal(net(x), classifier(x))
    names = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    expected = {
        f"body.{i}.{name}"
        for i in (0, 3, 6)
        for name in ("bias", "parametrizations.weight.0.a", "parametrizations.weight.0.b")
    } | {f"body.{i}.{name}" for i in (1, 4, 7) for name in ("weight", "bias")}
    assert names == expected
    low_rank = sum(p.numel() for name, p in net.named_parameters() if "weight.0." in name)
    assert low_rank == sum(2 * 9 * (a + b) for a, b in ((3, 32), (32, 64), (64, 128)))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == low_rank + 3 * (32 + 64 + 128)
    whole = ppap.expert(classifier)  # as the command makes it
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) <= 0.1 * sum(
        p.numel() for p in classifier.parameters()
    )


def test_each_time_has_one_expert():
    times = torch.tensor(
        [0.0, 0.1, 0.19, 0.21, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, 1.0], dtype=torch.float64
    )
    for schedule in (logsnr_schedule_cosine, make_schedule("shifted:16", 64)):
        assert ppap.expert_of(schedule(times), 5, schedule).tolist() == [
            0,
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
            4,
            4,
        ]
        assert ppap.expert_of(schedule(times), 1, schedule).tolist() == [0] * 11
        ends = schedule(
            torch.arange(6, dtype=torch.float64) / 5
        )  # a boundary belongs to the noisier one, t = 1 to the last
        assert ppap.expert_of(ends, 5, schedule).tolist() == [0, 1, 2, 3, 4, 4]


def test_classifier_guidance_equals_that_of_the_exact_posterior():
    """x is one of two Gaussians, with their exact denoiser and classifier.

    Then guidance 1 is the denoiser of the class.
    """
    torch.manual_seed(0)
    means, std = torch.tensor([[1.0, 0.5], [-1.0, 0.2]]).double(), 0.3

    def parts(
        z, logsnr
    ):  # log p(z | class) up to a constant, and x_hat given the class, (B, 2) and (B, 2, 2)
        alpha, sigma = alpha_sigma(logsnr, like=z)
        variance = alpha**2 * std**2 + sigma**2
        away = z[:, None] - alpha[:, None] * means
        return -away.square().sum(2) / (2 * variance), means + (alpha * std**2 / variance)[
            :, None
        ] * away

    def v_of(x_hat, z, logsnr):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return (alpha * z - x_hat) / sigma

    def net(z, logsnr, label=None):
        assert label is None
        log_p, x_hat = parts(z, logsnr)
        return v_of((log_p.softmax(1)[:, :, None] * x_hat).sum(1), z, logsnr)

    logsnr, label = torch.tensor([-3.0, -1.0, 0.5, 2.0]).double(), torch.tensor([0, 1, 1, 0])
    z = torch.randn(4, 2).double()
    experts = []
    for k in range(3):
        experts.append(
            lambda z_k, k=k: parts(
                z_k, logsnr[ppap.expert_of(logsnr, 3, logsnr_schedule_cosine) == k]
            )[0]
        )
    exact = v_of(parts(z, logsnr)[1][torch.arange(4), label], z, logsnr)
    torch.testing.assert_close(
        ppap.guided_by(net, experts, 1.0, logsnr_schedule_cosine)(z, logsnr, label), exact
    )
    torch.testing.assert_close(
        ppap.guided_by(net, experts, 3.0, logsnr_schedule_cosine)(z, logsnr, label),
        net(z, logsnr) + 3 * (exact - net(z, logsnr)),
    )
    assert torch.equal(
        ppap.guided_by(net, experts, 0.0, logsnr_schedule_cosine)(z, logsnr), net(z, logsnr)
    )
    at_one = ppap.guided_by(net, experts, 1.0, logsnr_schedule_cosine)
    with pytest.raises(ValueError, match="label"):
        at_one(z, logsnr)


def test_experts_learn_from_images_alone():
    x = load_batch(Shapes(16), range(64))[0] / 127.5 - 1
    classifier = ppap.trained_classifier(
        Shapes(16), 10, torch.device("cpu"), steps=60, batch=64
    ).requires_grad_(True)
    classifier.zero_grad()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    experts = ppap.transfer(classifier, 2, x, logsnr_schedule_cosine, steps=100, batch=32, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())

    @torch.no_grad()
    def divergence(net, k):
        torch.manual_seed(1)
        z = diffuse(x, torch.randn_like(x), logsnr_schedule_cosine((k + torch.rand(64)) / 2))
        return F.kl_div(
            net(z).log_softmax(1), (classifier(x) / 0.25).softmax(1), reduction="batchmean"
        ).item()

    for k, net in enumerate(
        experts
    ):  # each is better than the classifier, and than the other one, where it was trained
        assert (
            divergence(net, k) < 0.8 * divergence(classifier, k)
            and divergence(net, k) < divergence(experts[1 - k], k)
            and not any(p.requires_grad for p in net.parameters())
        )


def test_ppap_and_ppgn_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ppap, "trained_classifier", functools.partial(ppap.trained_classifier, steps=3)
    )
    run = str(
        train_small(
            tmp_path,
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
            '"num_res_blocks": [1], "num_transformer_blocks": 1}',
        )
    )
    guide, out = str(tmp_path / "guide"), str(tmp_path / "out.npz")
    call(ppap.main, run, "--experts 2 --updates 2 --pictures 8 --batch 8 --steps 2 --out", guide)
    text = capsys.readouterr().out
    assert re.search(r"\b2\b.*\b8\b.*\b8\.2 %", text) and text.count("t=0.95") == 2
    drawn = []
    for options in (["--scale 0"], [], ["--plain --batch 3"]):
        call(ppap.main, run, "--guide", guide, "--n 10 --steps 3 --out", out, *options)
        drawn.append(np.load(out)["arr_0"])
    net, config, schedule = load(run)
    unguided = sample(
        in_bf16(net, config["bf16"]),
        (10, 3, 32, 32),
        schedule,
        steps=3,
        sampler="ddim",
        label=torch.full((10,), 10),
    )
    call(ppap.main, run, "--guide", guide, "--n 10 --steps 3 --out", out, "--batch 4")
    assert (
        np.abs(np.load(out)["arr_0"].astype(int) - drawn[1]).max() <= 1
    )  # the same images, whatever the batch, but for rounding
    assert (
        np.array_equal(drawn[0], sampling.to_uint8(unguided).permute(0, 2, 3, 1))
        and not np.array_equal(drawn[0], drawn[1])
        and not np.array_equal(drawn[1], drawn[2])
    )
    known, label = load_batch(Shapes(32, first=2**30), range(10))
    for options in ([], ["--plain --noise 0.1"]):
        call(ppgn.main, run, "--guide", guide, "--n 10 --chain 3 --inpaint --out", out, *options)
        with np.load(out) as written:
            same = (written["arr_0"] == known.permute(0, 2, 3, 1).numpy()).all((0, 3))
            assert written["y"].tolist() == label.tolist()
        assert (
            same[:8].all()
            and same[24:].all()
            and same[:, :8].all()
            and same[:, 24:].all()
            and not same[8:24, 8:24].any()
        )
    drawn = []
    for options in (
        ["--batch 3"],
        ["--n 12"],
        ["--prior 0"],
        ["--noise 0"],
        ["--condition 100"],
        ["--logsnr 2"],
        ["--seed 1"],
        ["--plain"],
    ):
        call(ppgn.main, run, "--guide", guide, "--n 10 --chain 3 --out", out, *options)
        drawn.append(np.load(out)["arr_0"][:10].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and all(
        (other != drawn[0]).mean() > 0.1 for other in drawn[2:]
    )
    for command, options, message in (
        (ppap.main, ["--guide", guide, "--out x"], r"--out x\b"),
        (ppap.main, ["--out", guide, "--updates 0"], r"--updates(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--chain 0"], r"--chain(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--logsnr nan"], r"--logsnr\b.*-20\b.*\b20\b"),
        (ppgn.main, ["--guide", guide, "--prior -1"], "--prior"),
        (ppgn.main, ["--guide", guide, "--condition nan"], "--condition"),
        (ppap.main, ["--out", guide, "--scale inf"], "--scale"),
    ):
        with pytest.raises(ValueError, match=message):
            call(command, run, options)
    with pytest.raises(FileNotFoundError):
        call(ppgn.main, run, "--guide", tmp_path, "--out", out)
    for content in (b"", b"PK broken", None):
        torch.save(dict(other=1), f"{guide}/experts.pt") if content is None else (
            tmp_path / "guide" / "experts.pt"
        ).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{guide}/experts.pt")):
            call(ppap.main, run, "--guide", guide, "--out", out)
