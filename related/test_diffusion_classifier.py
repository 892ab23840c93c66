"""Tests of related/diffusion_classifier.py."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from related import common, diffusion_classifier
from related.diffusion_classifier import (
    CONFIGS,
    classify,
    evaluations,
    linear_probe,
    pair_noise,
    plan,
)
from schedule import diffuse, eps_from_v, logsnr_schedule_cosine
from support.data import Shapes, load_batch
from support.text import CaptionedShapes
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


def test_numbers_of_evaluations_are_those_published():
    published = [5570, 2750, 5550, 2050, 5590, 3000, 124_500, 14_400]
    assert [config[3] for config in CONFIGS.values()] == published
    for num_classes, numbers, keep, count in CONFIGS.values():
        assert evaluations(num_classes, numbers, keep)[-1] == count, (num_classes, numbers)


def test_noise_levels_of_the_published_stages():
    # 500 levels are the odd timesteps. The strides of the stages are 25, 10, 5 and 1 of them.
    stages = plan((20, 50, 100, 500))
    assert [len(new) for new in stages] == [20, 50, 80, 350]
    assert stages[0] == list(range(25, 1000, 50))
    assert stages[1] == list(range(11, 1000, 20))
    assert stages[2] == sorted(set(range(5, 1000, 10)) - {*stages[0]})
    assert sorted(itertools.chain(*stages)) == list(range(1, 1000, 2))

    # 1000 levels are all timesteps.
    stages = plan((50, 100, 500, 1000))
    assert [len(new) for new in stages] == [50, 100, 400, 450]
    assert stages[0] == list(range(10, 1000, 20))
    assert stages[1] == list(range(5, 1000, 10))
    assert sorted(itertools.chain(*stages)) == list(range(1000))

    # The networks of DiT-XL/2 are evaluated at 2, 6, ..., 998.
    assert plan((250,)) == [list(range(2, 1000, 4))]


def test_noise_levels_of_stages_that_do_not_divide():
    # By hand. 16 levels are 31 + 62 i. Three of 16 have the stride 5, from i = 2 on.
    first, second = plan((3, 16))
    assert first == [155, 465, 775]
    assert sorted(first + second) == [31 + 62 * i for i in range(16)]

    # 12 levels are 41 + 83 i. Five of 12 have the stride 2, from i = 1 on: the last i is 9, not 11.
    first, second = plan((5, 12))
    assert first == [124, 290, 456, 622, 788]
    assert sorted(first + second) == [41 + 83 * i for i in range(12)]

    # 20 levels are 25 + 50 i. Eight of 20 have the stride 2, from i = 1 on.
    first, second = plan((8, 20))
    assert first == [75, 175, 275, 375, 475, 575, 675, 775]
    assert sorted(first + second) == [25 + 50 * i for i in range(20)]

    for numbers in ([8, 4], [], [0], [4, 1001]):
        with pytest.raises(ValueError, match=re.escape(str(numbers))):
            plan(numbers)


# ---------------------------------------------------------------- the classifier

MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.0, 0.0]]).double()
MEANS = MEANS.reshape(4, 2, 1, 1)
ONE_EACH = torch.arange(4)[:, None]  # one label for each class


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
    """(eps - eps_hat)^2 at 20 levels (B, 4, 20), with one noise for all classes."""
    errors = torch.zeros(len(x), 4, 20).double()
    for level in range(20):
        t = torch.full((len(x),), (level + 0.5) / 20).double()
        logsnr = logsnr_schedule_cosine(t)
        eps = pair_noise((2, 1, 1), 0, range(len(x)), level).double()
        z = diffuse(x, eps, logsnr)
        for c in range(4):
            with torch.no_grad():
                v_hat = gaussians(z, logsnr, torch.full((len(x),), c))
            eps_hat = eps_from_v(z, v_hat, logsnr)
            errors[:, c, level] = (eps - eps_hat).square().mean((1, 2, 3))
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
    found, errors = classify(recorded(calls), x, ONE_EACH, logsnr_schedule_cosine, (20,), (1,))
    assert (found == bayes)[clear].float().mean() >= 0.99
    assert errors.isfinite().all()

    # The errors are those of the definition, and the net is called for all pairs.
    by_hand = errors_by_hand(x)
    torch.testing.assert_close(errors, by_hand)
    assert torch.equal(found, by_hand.mean(2).argmin(1))
    assert sum(len(z) for z, _, _ in calls) == 400 * evaluations(4, (20,), (1,))[-1]
    assert max(label.max() for _, _, label in calls) == 3

    # Neither a stage that drops no class nor the batch size changes the result.
    for options in (dict(numbers=(5, 20), keep=(4, 1)), dict(numbers=(20,), batch=7)):
        same, same_errors = classify(gaussians, x, ONE_EACH, logsnr_schedule_cosine, **options)
        assert torch.equal(same, found)
        order = list(itertools.chain(*plan(options["numbers"])))
        by_level = same_errors[:, :, np.argsort(order)]
        torch.testing.assert_close(by_level, errors, rtol=1e-6, atol=1e-9)

    # Another error finds about the same classes.
    other, _ = classify(gaussians, x, ONE_EACH, logsnr_schedule_cosine, space="v", norm="l1")
    assert (other == bayes)[clear].float().mean() >= 0.99

    # The order of the classes does not matter.
    order = torch.tensor([2, 0, 3, 1])

    def reordered(z, logsnr, label):
        return gaussians(z, logsnr, order[label])

    _, permuted = classify(reordered, x, ONE_EACH, logsnr_schedule_cosine, (20,))
    torch.testing.assert_close(permuted, errors[:, order])

    # Two classes are dropped after 5 levels. This saves evaluations and changes few results.
    calls = []
    stages = dict(numbers=(5, 20), keep=(2, 1))
    pruned, errors = classify(recorded(calls), x, ONE_EACH, logsnr_schedule_cosine, **stages)
    assert errors[:, :, :5].isfinite().all()
    assert (errors[:, :, 5:].isinf().all(2).sum(1) == 2).all()
    assert sum(len(z) for z, _, _ in calls) == 400 * (5 * 4 + 15 * 2)
    assert (pruned == found).float().mean() > 0.95

    # An image's noise depends on its number, not on the other images.
    alone, _ = classify(gaussians, x[5:7], ONE_EACH, logsnr_schedule_cosine, (20,), first=5)
    assert torch.equal(alone, found[5:7])


def test_errors_of_several_prompts_are_averaged():
    # Two labels for each of two classes: the mean of the errors of each label alone.
    x = MEANS[:3] + 0.1
    pairs = torch.tensor([[0, 1], [2, 3]])
    _, errors = classify(gaussians, x, pairs, logsnr_schedule_cosine, (4,), batch=5)
    _, alone = classify(gaussians, x, ONE_EACH, logsnr_schedule_cosine, (4,))
    torch.testing.assert_close(errors, alone.unflatten(1, (2, 2)).mean(2))


def test_classes_share_noise():
    calls = []
    classify(recorded(calls), MEANS[:2], ONE_EACH, logsnr_schedule_cosine, (3,), (1,))
    for z, _, label in calls:
        z = z.reshape(2, 4, 2)  # (image, class, value)
        assert torch.equal(z, z[:, :1].expand_as(z))
        assert not torch.equal(z[0], z[1])
        assert label.tolist() == [0, 1, 2, 3] * 2


def test_independent_noise_of_classes():
    calls = []
    classify(recorded(calls), MEANS[:2], ONE_EACH, logsnr_schedule_cosine, (3,), (1,), shared=False)
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
        return classify(gaussians, x, ONE_EACH, logsnr_schedule_cosine, (1,), (1,), space=space)[1]

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
        ("--times 4 2 --keep 1 1", r"--times\b.*\[4, 2\]"),
        ("--classes star", r"--classes\b"),
        ("--best-prompt", r"--best-prompt\b"),
        ("--shown", r"--shown\b"),
        ("--text-encoder bytes", r"--text-encoder\b"),
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


def test_tables_of_levels_and_of_evaluations(run, output):
    # With one level, all three tables have the same accuracy.
    text = output(run, "--n 20 --times 1")
    share = re.search(r"([\d.]+) % of 20 images", text)[1]
    assert re.search(rf"(?m)^0\.500 +0\.00 +{share} %$", text)
    assert re.search(rf"(?m)^ +10 +1 +{share} %$", text)

    # 8 levels of the first stage have a line each. Means are taken over 1, 2, 4 and 8 of them.
    text = output(run, "--n 20 --times 8 16 --keep 2 1")
    assert len(re.findall(r"(?m)^0\.\d+ ", text)) == 8
    counts = re.findall(r"(?m)^ +(\d+) +(\d+) +[\d.]+ %$", text)
    assert counts == [("10", "1"), ("20", "2"), ("40", "4"), ("80", "8"), ("96", "16")]


def test_without_a_run_the_published_stages_are_printed(output):
    text = output()
    for name, (*_, count) in CONFIGS.items():
        assert re.search(rf"(?m)^{re.escape(name)} .*\b{count:,} \({count:,}\)", text)
    assert "assets/shapes32.pt" in text


# ---------------------------------------------------------------- zero-shot


@pytest.fixture(scope="session")
def text_run(made_once):
    """The folder of a run on captions, with random weights. Tests do not change it."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            short_grid(monkeypatch)
            train_small(folder, "--captions --model-args", json.dumps(dict(TINY_NET)))

    return str(made_once("classifier_text_run", make) / "run")


def test_held_out_captions_name_the_classes_of_their_images():
    shapes = Shapes.classes
    held_out = diffusion_classifier.captioned_images(32, 60, shapes, True, "cpu")
    shown = diffusion_classifier.captioned_images(32, 60, shapes, False, "cpu")
    assert held_out[0].shape == (60, 3, 32, 32)
    label = [(2**30 + i) % 10 for i in range(60)]
    assert held_out[1].tolist() == shown[1].tolist() == label

    # The color of a held-out shape is -label mod 6. It is another one in training.
    colors = CaptionedShapes.colors
    _, color = diffusion_classifier.captioned_images(32, 60, colors, True, "cpu")
    assert color.tolist() == [-i % 6 for i in label]
    _, color = diffusion_classifier.captioned_images(32, 60, colors, False, "cpu")
    assert all(c != -i % 6 for i, c in zip(label, color.tolist()))

    with pytest.raises(ValueError, match=r"--classes\b"):
        diffusion_classifier.captioned_images(32, 1, ["plum"], True, "cpu")


def test_the_command_classifies_by_prompts(text_run, output, monkeypatch):
    # What the network is told and shown, instead of a network.
    seen = []

    def record(net, x, labels, *args, **options):
        seen.append((x, labels))
        return classify(net, x, labels, *args, **options)

    monkeypatch.setattr(diffusion_classifier, "classify", record)
    options = ["--n 2 --times 1 --prompt", "a {class}", "one {class}"]
    text = output(text_run, options)
    assert "with 20 evaluations each" in text
    x, labels = seen[-1]
    assert labels.shape == (10, 2, 64)
    assert labels[3, 1, :9].tolist() == [1 + byte for byte in b"one heart"]
    held_out, _ = diffusion_classifier.captioned_images(32, 2, Shapes.classes, True, "cpu")
    assert torch.equal(x, held_out)

    # The best of all prompts instead: 20 candidates, each with one prompt.
    assert "with 20 evaluations each" in output(text_run, options, "--best-prompt")
    assert torch.equal(seen[-1][1], labels.reshape(20, 1, 64))

    # Other classes, the default prompts, and combinations that training shows.
    output(text_run, "--n 2 --times 1 --shown --classes red magenta blue cyan green yellow")
    assert seen[-1][1].shape == (6, 3, 64)
    assert not torch.equal(seen[-1][0], held_out)


def test_the_command_classifies_labeled_images_by_prompts(text_run, output, tmp_path):
    data = tmp_path / "data.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(data, x=images, y=np.arange(6) % 2, classes=["star", "ring"])
    options = ["--times 1 --text-encoder bytes --prompt", "a {class}", "--data", data]
    assert "with 2 evaluations each" in output(text_run, options)
    assert "with 2 evaluations each" in output(text_run, options, "--classes sun moon")
    for extra, message in (
        (["--classes sun"], r"--classes\b.*\b2\b"),
        (["--shown"], r"--data\b.*--shown\b"),
        (["--probe 0.1"], r"--probe\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(diffusion_classifier.main, text_run, options, extra)
    with pytest.raises(ValueError, match=r"--prompt\b"):
        call(diffusion_classifier.main, text_run, "--data", data)
    with pytest.raises(ValueError, match=r"--prompt\b"):
        call(diffusion_classifier.main, text_run, ["--prompt", "a star"])


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
