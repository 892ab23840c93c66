"""Tests of related/diffusion_classifier.py."""

import re

import numpy as np
import pytest
import torch

from related import (
    common,
    diffusion_classifier,
)
from schedule import (
    alpha_sigma,
    diffuse,
    eps_from_v,
    logsnr_schedule_cosine,
)
from support.data import Shapes, load_batch
from tests.helpers import TINY_UVIT, call, train_small
from uvit import UViT


def test_numbers_of_evaluations_are_those_published():
    four = (20, 50, 100, 500)
    for classes, numbers, keep, calls in (
        (101, four, (20, 10, 5, 1), 5570),
        (10, (50, 500), (5, 1), 2750),
        (100, four, (20, 10, 5, 1), 5550),
        (37, (25, 250), (5, 1), 2050),
        (102, four, (20, 10, 5, 1), 5590),
        (10, (100, 500), (5, 1), 3000),
        (1000, (50, 100, 500, 1000), (500, 50, 10, 1), 124_500),
        (113, (50, 100, 500, 1000), (25, 10, 5, 1), 14_400),
    ):
        assert diffusion_classifier.evaluations(classes, numbers, keep) == calls
    assert [len(new) for new in diffusion_classifier.plan(four)] == [20, 50, 80, 350]
    with pytest.raises(ValueError, match=r"\[8, 4\]"):
        diffusion_classifier.plan([8, 4])
    first, second = diffusion_classifier.plan([20, 32])
    assert (
        sorted(first + second) == list(range(32))
        and len(first) == 20
        and max(b - a for a, b in zip(first, first[1:])) == 2
        and first[-1] == 31
    )  # evenly spread


MEANS = (
    torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.0, 0.0]]).double().reshape(4, 2, 1, 1)
)


def gaussians(z, logsnr, label, calls=None):
    """The exact net for data of which each class is a Gaussian of standard deviation 0.2."""
    assert not torch.is_grad_enabled()
    if calls is not None:
        calls.append((z, logsnr, label))
    alpha, sigma = alpha_sigma(logsnr, like=z)
    mean = MEANS.to(z.dtype)[label]
    x_hat = mean + alpha * 0.04 / (alpha**2 * 0.04 + sigma**2) * (z - alpha * mean)
    return (alpha * z - x_hat) / sigma


def test_diffusion_classifier_of_gaussians_equals_bayes():
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = MEANS[y] + 0.2 * torch.randn(400, 2, 1, 1).double()
    bayes = (x - MEANS[:, None]).square().sum((2, 3, 4)).argmin(0)
    gap = (x - MEANS[:, None]).square().sum((2, 3, 4)).sort(0).values
    clear = gap[1] - gap[0] > 0.3
    calls = []
    found, errors = diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (32,), (1,)
    )
    assert (
        clear.float().mean() > 0.7
        and (found == bayes)[clear].float().mean() >= 0.99
        and errors.isfinite().all()
    )
    by_hand = torch.zeros(400, 4).double()
    for level in range(32):  # eps - eps_hat, summed for one noise for all classes
        logsnr = logsnr_schedule_cosine(torch.full((400,), (level + 0.5) / 32).double())
        eps = diffusion_classifier.pair_noise((2, 1, 1), 0, range(400), level).double()
        z = diffuse(x, eps, logsnr)
        for c in range(4):
            with torch.no_grad():
                eps_hat = eps_from_v(z, gaussians(z, logsnr, torch.full((400,), c)), logsnr)
            by_hand[:, c] += (eps - eps_hat).square().mean((1, 2, 3)) / 32
    torch.testing.assert_close(errors, by_hand)
    assert (
        torch.equal(found, by_hand.argmin(1))
        and sum(len(z) for z, *_ in calls) == 400 * diffusion_classifier.evaluations(4, (32,), (1,))
        and max(label.max() for *_, label in calls) == 3
    )
    for options in (dict(numbers=(8, 32), keep=(4, 1)), dict(batch=7), dict(space="v", norm="l1")):
        other, others = diffusion_classifier.classify(
            gaussians,
            x,
            4,
            logsnr_schedule_cosine,
            **dict(dict(numbers=(32,), keep=(1,)), **options),
        )
        if "space" not in options:
            assert torch.equal(other, found)
            torch.testing.assert_close(others, errors, rtol=1e-6, atol=1e-9)
        else:
            assert (other == bayes)[clear].float().mean() >= 0.99
    order = torch.tensor([2, 0, 3, 1])
    _, permuted = diffusion_classifier.classify(
        lambda z, logsnr, label: gaussians(z, logsnr, order[label]), x, 4, logsnr_schedule_cosine
    )
    torch.testing.assert_close(permuted, errors[:, order])
    calls.clear()
    pruned, few = diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (8, 32), (2, 1)
    )
    assert (
        (few.isinf().sum(1) == 2).all()
        and sum(len(z) for z, *_ in calls) == 400 * (8 * 4 + 24 * 2)
        and (pruned == found).float().mean() > 0.95
    )
    alone, _ = diffusion_classifier.classify(gaussians, x[5:7], 4, logsnr_schedule_cosine, first=5)
    assert torch.equal(alone, found[5:7])


def test_classes_share_noise():
    calls, x = [], MEANS[:2]
    diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (3,), (1,)
    )
    for z, _, label in calls:
        z = z.reshape(2, 4, 2)
        assert (
            torch.equal(z, z[:, :1].expand_as(z))
            and not torch.equal(z[0], z[1])
            and label.tolist() == [0, 1, 2, 3] * 2
        )
    calls.clear()
    diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls),
        x,
        4,
        logsnr_schedule_cosine,
        (3,),
        (1,),
        shared=False,
    )
    assert all(len(z.unique(dim=0)) == 8 for z, *_ in calls)
    noise = [
        diffusion_classifier.pair_noise((3,), seed, [number], level, None if c is None else [c])
        for seed in (0, 1)
        for number in (0, 1)
        for level in (0, 1)
        for c in (None, 0, 1)
    ]
    assert len(torch.cat(noise).unique(dim=0)) == 24
    for space, factor in (
        ("eps", lambda logsnr: torch.sigmoid(logsnr)),
        ("x", lambda logsnr: torch.sigmoid(-logsnr)),
    ):
        (_, errors), (_, plain) = (
            diffusion_classifier.classify(
                gaussians, x, 4, logsnr_schedule_cosine, (1,), (1,), space=each
            )
            for each in (space, "v")
        )
        torch.testing.assert_close(
            errors,
            factor(logsnr_schedule_cosine(torch.tensor(0.5).double())) * plain,
            rtol=1e-5,
            atol=0,
        )


def test_diffusion_classifier_command(tmp_path, capsys, monkeypatch):
    run = str(
        train_small(
            tmp_path,
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
            '"num_res_blocks": [1], "num_transformer_blocks": 1}',
        )
    )
    capsys.readouterr()
    call(diffusion_classifier.main, run, "--n 4 --times 1 2 --keep 3 1")
    assert re.search(r"\d %.*\b4\b.*\b13\b.*\b35 %", capsys.readouterr().out)
    for options, message in (
        (["--times 2 4"], r"(?=.*\b10\b)(?=.*\[1\]).*\b2\b"),
        (["--n 0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["--keep 0"], r"(?=.*\b10\b)(?=.*\[0\]).*\b1\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(diffusion_classifier.main, run, *options)
    x, y = load_batch(Shapes(32, first=2**30), range(60))
    np.savez(
        tmp_path / "data.npz", x=x.permute(0, 2, 3, 1).numpy(), y=y.numpy(), classes=Shapes.classes
    )
    np.savez(tmp_path / "other.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    capsys.readouterr()
    data, seen = ["--data", tmp_path / "data.npz", "--times 1"], []
    for options in (
        ["--n 60"],
        ["--n 100 --batch 7"],
        ["--norm l1 --space x --independent --seed 1"],
    ):
        call(diffusion_classifier.main, run, *data, *options)
        seen.append(capsys.readouterr().out)
    call(diffusion_classifier.main, run, "--n 60 --times 1")
    assert seen[0] == seen[1] == capsys.readouterr().out
    assert re.search(r"\b60\b.*\b10\b", seen[2])
    with pytest.raises(ValueError, match=rf"(?=.*\b0, 1, 2, 3\b).*{re.escape(run)}"):
        call(diffusion_classifier.main, run, "--data", tmp_path / "other.npz")
    seen = []
    for options in (
        ["--times 1"],
        ["--times 1 --at 0.5"],
        ["--times 1 --at 0.01"],
    ):  # the middle of one level is t = 1/2
        call(diffusion_classifier.main, run, "--n 60", *options)
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1] != seen[2]
    for option, value in (("--at", 1.5), ("--probe", -0.1)):
        with pytest.raises(ValueError, match=rf"{option}\b.*\b0\b.*\b1\b"):
            call(diffusion_classifier.main, run, option, value)
    seen = []
    monkeypatch.setattr(
        diffusion_classifier,
        "random_indices",
        lambda data, n, seed: common.random_indices(data, min(n, 50), seed),
    )
    monkeypatch.setattr(
        diffusion_classifier, "linear_probe", lambda *args: seen.append(args) or args[1][:20]
    )
    call(diffusion_classifier.main, run, "--n 20 --probe 0.1 --batch 16")
    assert re.search(r"\d %.*\b20\b.*\b50\b", capsys.readouterr().out)
    ((known, label, new, k),) = seen
    assert (
        known.shape == (50, 16)
        and new.shape == (20, 16)
        and k == 10
        and len(set(label.tolist())) > 5
    )
    assert len(known.unique(dim=0)) == 50


def test_linear_probe():
    torch.manual_seed(0)
    y, centers = torch.arange(300) % 3, 3 * torch.randn(3, 8)
    known, new = centers[y] + torch.randn(2, 300, 8)
    right = (diffusion_classifier.linear_probe(known, y, new, 3) == y).float().mean()
    bayes = (torch.cdist(new, centers).argmin(1) == y).float().mean()  # which is linear, too
    assert right >= bayes - 0.02 and bayes > 0.95
    assert (
        diffusion_classifier.linear_probe(torch.randn(300, 8), y, new, 3) == y
    ).float().mean() < 0.6  # features that say nothing
    net, x = UViT(**TINY_UVIT).eval(), torch.randn(5, 3, 16, 16)
    found = torch.cat(
        [
            diffusion_classifier.features(
                net, net.transformer[0], x[i : i + 2], 2.0, seed=4, first=i
            )
            for i in (0, 2, 4)
        ]
    )
    level = torch.full((5,), 2.0)
    eps = diffusion_classifier.pair_noise(x.shape[1:], 4, range(5), 0)
    with torch.no_grad():
        h = net.stem(diffuse(x, eps, level))
        emb = net.embedding(level)
        h = net.down[0][0](h, emb)
        h = net.transformer[0](net.downsample[0](h) + net.position, emb)
    torch.testing.assert_close(found, h.mean((2, 3)))
    assert not net.transformer[0]._forward_hooks
