"""Tests of related/diffusion_classifier.py."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from related import common, diffusion_classifier
from related.diffusion_classifier import classify, evaluations, linear_probe, pair_noise, plan
from schedule import diffuse, eps_from_v, logsnr_schedule_cosine
from support.data import Shapes, load_batch
from tests.helpers import (
    TINY_NET,
    TINY_UVIT,
    call,
    gaussian_net,
    named,
    short_grid,
    train_small,
)
from uvit import UViT

# ---------------------------------------------------------------- the stages

FOUR = (20, 50, 100, 500)

# Classes, noise levels after each stage, classes that remain after it, evaluations per image.
PUBLISHED = [
    (101, FOUR, (20, 10, 5, 1), 5570),
    (10, (50, 500), (5, 1), 2750),
    (100, FOUR, (20, 10, 5, 1), 5550),
    (37, (25, 250), (5, 1), 2050),
    (102, FOUR, (20, 10, 5, 1), 5590),
    (10, (100, 500), (5, 1), 3000),
    (1000, (50, 100, 500, 1000), (500, 50, 10, 1), 124_500),
    (113, (50, 100, 500, 1000), (25, 10, 5, 1), 14_400),
]


def test_numbers_of_evaluations_are_those_published():
    for num_classes, numbers, keep, published in PUBLISHED:
        assert evaluations(num_classes, numbers, keep) == published, (num_classes, numbers)


def test_noise_levels_of_the_stages():
    assert [len(new) for new in plan(FOUR)] == [20, 50, 80, 350]

    # The levels of the first stage are evenly spread over the grid. The second adds the others.
    first, second = plan([20, 32])
    assert sorted(first + second) == list(range(32))
    assert len(first) == 20
    assert max(b - a for a, b in zip(first, first[1:])) == 2
    assert first[-1] == 31

    with pytest.raises(ValueError, match=r"\[8, 4\]"):
        plan([8, 4])


# ---------------------------------------------------------------- the classifier

MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.0, 0.0]]).double()
MEANS = MEANS.reshape(4, 2, 1, 1)


def gaussians(z, logsnr, label):
    """The exact net for data of which each class is a Gaussian of standard deviation 0.2."""
    assert not torch.is_grad_enabled()
    return gaussian_net(MEANS.to(z.dtype)[label], 0.04)(z, logsnr)


def recorded(calls):
    """The net gaussians, which also appends its arguments to the list of calls."""

    def net(*args):
        calls.append(args)
        return gaussians(*args)

    return net


def errors_by_hand(x):
    """The mean of (eps - eps_hat)^2 over 32 levels (B, 4), with one noise for all classes."""
    errors = torch.zeros(len(x), 4).double()
    for level in range(32):
        t = torch.full((len(x),), (level + 0.5) / 32).double()
        logsnr = logsnr_schedule_cosine(t)
        eps = pair_noise((2, 1, 1), 0, range(len(x)), level).double()
        z = diffuse(x, eps, logsnr)
        for c in range(4):
            with torch.no_grad():
                v_hat = gaussians(z, logsnr, torch.full((len(x),), c))
            eps_hat = eps_from_v(z, v_hat, logsnr)
            errors[:, c] += (eps - eps_hat).square().mean((1, 2, 3)) / 32
    return errors


def test_diffusion_classifier_of_gaussians_equals_bayes():
    # The best classifier takes the nearest mean. An image is clear if no other mean is about as
    # near.
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = MEANS[y] + 0.2 * torch.randn(400, 2, 1, 1).double()
    distances = (x - MEANS[:, None]).square().sum((2, 3, 4))  # (4, 400)
    bayes = distances.argmin(0)
    nearest = distances.sort(0).values
    clear = nearest[1] - nearest[0] > 0.3
    assert clear.float().mean() > 0.7

    # The classifier finds these classes.
    calls = []
    found, errors = classify(recorded(calls), x, 4, logsnr_schedule_cosine, (32,), (1,))
    assert (found == bayes)[clear].float().mean() >= 0.99
    assert errors.isfinite().all()

    # The errors are those of the definition, and the net is called for all pairs.
    by_hand = errors_by_hand(x)
    torch.testing.assert_close(errors, by_hand)
    assert torch.equal(found, by_hand.argmin(1))
    assert sum(len(z) for z, _, _ in calls) == 400 * evaluations(4, (32,), (1,))
    assert max(label.max() for _, _, label in calls) == 3

    # Neither a stage that drops no class nor the batch size changes the result.
    for options in (dict(numbers=(8, 32), keep=(4, 1)), dict(batch=7)):
        same, same_errors = classify(gaussians, x, 4, logsnr_schedule_cosine, **options)
        assert torch.equal(same, found)
        torch.testing.assert_close(same_errors, errors, rtol=1e-6, atol=1e-9)

    # Another error finds about the same classes.
    other, _ = classify(gaussians, x, 4, logsnr_schedule_cosine, space="v", norm="l1")
    assert (other == bayes)[clear].float().mean() >= 0.99

    # The order of the classes does not matter.
    order = torch.tensor([2, 0, 3, 1])

    def reordered(z, logsnr, label):
        return gaussians(z, logsnr, order[label])

    _, permuted = classify(reordered, x, 4, logsnr_schedule_cosine)
    torch.testing.assert_close(permuted, errors[:, order])

    # Two classes are dropped after 8 levels. This saves evaluations and changes few results.
    calls = []
    pruned, pruned_errors = classify(recorded(calls), x, 4, logsnr_schedule_cosine, (8, 32), (2, 1))
    assert (pruned_errors.isinf().sum(1) == 2).all()
    assert sum(len(z) for z, _, _ in calls) == 400 * (8 * 4 + 24 * 2)
    assert (pruned == found).float().mean() > 0.95

    # An image's noise depends on its number, not on the other images.
    alone, _ = classify(gaussians, x[5:7], 4, logsnr_schedule_cosine, first=5)
    assert torch.equal(alone, found[5:7])


def test_classes_share_noise():
    calls = []
    classify(recorded(calls), MEANS[:2], 4, logsnr_schedule_cosine, (3,), (1,))
    for z, _, label in calls:
        z = z.reshape(2, 4, 2)  # (image, class, value)
        assert torch.equal(z, z[:, :1].expand_as(z))
        assert not torch.equal(z[0], z[1])
        assert label.tolist() == [0, 1, 2, 3] * 2


def test_independent_noise_of_classes():
    calls = []
    classify(recorded(calls), MEANS[:2], 4, logsnr_schedule_cosine, (3,), (1,), shared=False)
    for z, _, _ in calls:
        assert len(z.unique(dim=0)) == 8


def test_noise_depends_on_seed_image_level_and_class():
    noise = []
    for seed, image, level, c in itertools.product((0, 1), (0, 1), (0, 1), (None, 0, 1)):
        classes = None if c is None else [c]
        noise.append(pair_noise((3,), seed, [image], level, classes))
    assert len(torch.cat(noise).unique(dim=0)) == 24


def test_error_of_eps_and_of_x_is_that_of_v_times_a_factor():
    def errors(space):
        x = MEANS[:2]
        return classify(gaussians, x, 4, logsnr_schedule_cosine, (1,), (1,), space=space)[1]

    # The only level is t = 1/2. The factors are alpha^2 and sigma^2.
    logsnr = logsnr_schedule_cosine(torch.tensor(0.5).double())
    for space, factor in (("eps", torch.sigmoid(logsnr)), ("x", torch.sigmoid(-logsnr))):
        torch.testing.assert_close(errors(space), factor * errors("v"), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def run(made_once):
    """The folder of a run of two steps with a tiny network. Tests do not change it."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            short_grid(monkeypatch)
            model_args = json.dumps(dict(TINY_NET, num_res_blocks=[1]))
            train_small(folder, "--model-args", model_args)

    return str(made_once("classifier_run", make) / "run")


@pytest.fixture
def output(capsys):
    """A function that calls the command and returns what it prints."""

    def output(*args):
        capsys.readouterr()
        call(diffusion_classifier.main, *args)
        return capsys.readouterr().out

    return output


def test_diffusion_classifier_command(run, output):
    # 10 classes at the first level and 3 at the second: 13 evaluations instead of 20.
    text = output(run, "--n 4 --times 1 2 --keep 3 1")
    assert re.search(r"\d %.*\b4\b.*\b13\b.*\b35 %", text)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--times 2 4", named(10, "[1]", 2)),
        ("--n 0", r"--n\b(?=.*\b1\b).*\b0\b"),
        ("--keep 0", named(10, "[0]", 1)),
        ("--at 1.5", r"--at\b.*\b0\b.*\b1\b"),
        ("--probe -0.1", r"--probe\b.*\b0\b.*\b1\b"),
    ],
)
def test_invalid_options_are_rejected(run, options, message):
    with pytest.raises(ValueError, match=message):
        call(diffusion_classifier.main, run, options)


def test_images_of_a_dataset(run, output, tmp_path):
    # A dataset of the images that the built-in Shapes yield without --data.
    data = tmp_path / "data.npz"
    images, y = load_batch(Shapes(32, first=2**30), range(60))
    images = images.permute(0, 2, 3, 1).numpy()
    np.savez(data, x=images, y=y.numpy(), classes=Shapes.classes)

    # --n is at most the size of the dataset. The batch size changes nothing.
    all_images = output(run, "--data", data, "--times 1 --n 60")
    assert output(run, "--data", data, "--times 1 --n 100 --batch 7") == all_images
    assert output(run, "--n 60 --times 1") == all_images

    # Other options of the error.
    options = "--times 1 --norm l1 --space x --independent --seed 1"
    assert re.search(r"\b60\b.*\b10\b", output(run, "--data", data, options))

    # A dataset with other classes is rejected.
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    with pytest.raises(ValueError, match=rf"(?=.*\b0, 1, 2, 3\b).*{re.escape(run)}"):
        call(diffusion_classifier.main, run, "--data", other)


def test_all_noise_levels_at_one_t(run, output):
    # The middle of a single level is t = 1/2.
    default = output(run, "--n 60 --times 1")
    assert output(run, "--n 60 --times 1 --at 0.5") == default
    assert output(run, "--n 60 --times 1 --at 0.01") != default


def test_probe_command(run, output, monkeypatch):
    # 50 images instead of 20,000, and no probe.
    seen = []

    def few_indices(data, n, seed):
        return common.random_indices(data, min(n, 50), seed)

    def keep_arguments(*args):
        seen.append(args)
        label = args[1]
        return label[:20]

    monkeypatch.setattr(diffusion_classifier, "random_indices", few_indices)
    monkeypatch.setattr(diffusion_classifier, "linear_probe", keep_arguments)
    text = output(run, "--n 20 --probe 0.1 --batch 16")
    assert re.search(r"\d %.*\b20\b.*\b50\b", text)

    # The features of 50 images to train on and of 20 to classify.
    ((train, label, test, num_classes),) = seen
    assert train.shape == (50, 16)
    assert test.shape == (20, 16)
    assert num_classes == 10
    assert len(set(label.tolist())) > 5
    assert len(train.unique(dim=0)) == 50


# ---------------------------------------------------------------- the linear probe


def test_linear_probe():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    centers = 3 * torch.randn(3, 8)
    train, test = centers[y] + torch.randn(2, 300, 8)

    # The best classifier is linear, too.
    accuracy = (linear_probe(train, y, test, 3) == y).float().mean()
    bayes = (torch.cdist(test, centers).argmin(1) == y).float().mean()
    assert accuracy >= bayes - 0.02
    assert bayes > 0.95

    # Features that say nothing about the class.
    noise = torch.randn(300, 8)
    assert (linear_probe(noise, y, test, 3) == y).float().mean() < 0.6


def test_features_are_means_over_positions():
    torch.manual_seed(0)
    net = UViT(**TINY_UVIT).eval()
    layer = net.transformer[0]
    x = torch.randn(5, 3, 16, 16)

    # Two images at a time.
    parts = []
    for i in (0, 2, 4):
        parts.append(diffusion_classifier.features(net, layer, x[i : i + 2], 2.0, seed=4, first=i))

    # The net up to the layer, for all images at once.
    level = torch.full((5,), 2.0)
    eps = pair_noise(x.shape[1:], 4, range(5), 0)
    with torch.no_grad():
        h = net.stem(diffuse(x, eps, level))
        emb = net.embedding(level)
        h = net.down[0][0](h, emb)
        h = layer(net.downsample[0](h) + net.position, emb)
    torch.testing.assert_close(torch.cat(parts), h.mean((2, 3)))

    # The hook is gone.
    assert not layer._forward_hooks
