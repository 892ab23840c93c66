"""Tests of related/ppap.py, and of the command of related/ppgn.py, which uses its classifier."""

import contextlib
import functools
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parametrize

from related import guides, ppap, ppgn, vitok
from sample import sample, to_uint8
from schedule import alpha_sigma, diffuse, logsnr_schedule_cosine, make_schedule
from support.checkpoint import load
from support.data import Shapes, load_batch
from support.runtime import in_bf16
from tests.helpers import SMALL_NET, call, float64, short_grid, train_small

# ---------------------------------------------------------------- experts


def count_trained(net):
    """The number of parameters of a network that are trained."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 2), (7, 2)])
def test_low_rank_convolution_equals_one_with_the_merged_weight(kernel, stride):
    torch.manual_seed(0)
    padding = kernel // 2
    conv = torch.nn.Conv2d(4, 6, kernel, stride, padding)
    x = torch.randn(2, 4, 14, 14)
    output = conv(x)
    weight = conv.weight.detach().clone()

    # The change is zero at initialization.
    change = ppap.LowRank(conv.weight, 3)
    parametrize.register_parametrization(conv, "weight", change)
    assert torch.equal(conv(x), output)
    assert change.a.shape == (3 * kernel, 4 * kernel)
    assert change.b.shape == (6 * kernel, 3 * kernel)

    # With alpha = 8 and rank 3, the weight is W + 8/3 B A.
    torch.nn.init.normal_(change.b)
    merged = weight + 8 / 3 * (change.b @ change.a).reshape(6, 4, kernel, kernel)
    expected = F.conv2d(x, merged, conv.bias, stride, padding)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)

    # The original weight has not changed.
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    assert torch.equal(conv.weight, weight)


@pytest.mark.parametrize("name", guides.TASKS)
def test_a_new_expert_equals_the_clean_network(name):
    torch.manual_seed(0)
    net = guides.TASKS[name].make(10).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ppap.expert(net).eval()(x), net(x))


def test_experts_train_low_rank_changes_biases_and_norms():
    torch.manual_seed(0)
    classifier = guides.Classifier(10)
    net = ppap.expert(classifier, rank=2)
    expected = set()
    for conv in (0, 3, 6):
        expected.add(f"body.{conv}.bias")
        expected.add(f"body.{conv}.parametrizations.weight.0.a")
        expected.add(f"body.{conv}.parametrizations.weight.0.b")
    for norm in (1, 4, 7):
        expected.add(f"body.{norm}.weight")
        expected.add(f"body.{norm}.bias")
    names = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert names == expected

    # A change of rank 2 of a 3x3 convolution has 2 * 9 parameters per channel of each side.
    # A unit also trains the bias of its convolution, and the weight and bias of its norm.
    assert count_low_rank(net) == sum(2 * 9 * (a + b) for a, b in ((3, 32), (32, 64), (64, 128)))
    assert count_trained(net) == count_low_rank(net) + 3 * (32 + 64 + 128)

    # The default is the authors': rank 16, and alpha / rank is one half.
    net = ppap.expert(classifier)
    assert count_low_rank(net) == sum(16 * 9 * (a + b) for a, b in ((3, 32), (32, 64), (64, 128)))
    assert net.body[0].parametrizations.weight[0].factor == 0.5


def count_low_rank(net):
    """The number of parameters of the low-rank changes."""
    return sum(p.numel() for name, p in net.named_parameters() if ".weight.0." in name)


def resnet50():
    """The layers of ResNet-50, with the names of torchvision. It only has parameters."""

    def norm(channels):
        return torch.nn.BatchNorm2d(channels)

    def conv(channels, next_channels, kernel):
        return torch.nn.Conv2d(channels, next_channels, kernel, bias=False)

    layers, channels = dict(conv1=conv(3, 64, 7), bn1=norm(64)), 64
    for i, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        blocks = []
        for block in range(count):
            parts = dict(conv1=conv(channels, width, 1), bn1=norm(width))
            parts |= dict(conv2=conv(width, width, 3), bn2=norm(width))
            parts |= dict(conv3=conv(width, 4 * width, 1), bn3=norm(4 * width))
            if block == 0:
                shortcut = [conv(channels, 4 * width, 1), norm(4 * width)]
                parts["downsample"] = torch.nn.Sequential(*shortcut)
            blocks.append(torch.nn.ModuleDict(parts))
            channels = 4 * width
        layers[f"layer{i + 1}"] = torch.nn.Sequential(*blocks)
    return torch.nn.ModuleDict(layers | dict(fc=torch.nn.Linear(2048, 1000)))


def deit_small():
    """The layers of DeiT-S with a bias, with the names of timm."""
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    blocks = []
    for _ in range(12):
        attn = torch.nn.ModuleDict(dict(qkv=linear(384, 1152), proj=linear(384, 384)))
        mlp = torch.nn.ModuleDict(dict(fc1=linear(384, 1536), fc2=linear(1536, 384)))
        parts = dict(norm1=norm(384), attn=attn, norm2=norm(384), mlp=mlp)
        blocks.append(torch.nn.ModuleDict(parts))
    embed = torch.nn.ModuleDict(dict(proj=torch.nn.Conv2d(3, 384, 16, 16)))
    layers = dict(patch_embed=embed, blocks=torch.nn.Sequential(*blocks), norm=norm(384))
    return torch.nn.ModuleDict(layers | dict(head=linear(384, 1000)))


def test_published_classifiers_have_the_counts_of_the_authors():
    with torch.device("meta"):
        net = resnet50()
        assert sum(p.numel() for p in net.parameters()) == 25_557_032
        one = ppap.expert(net)
        assert count_low_rank(one) == 1_410_352
        # Without biases of convolutions, the rest are gains and biases of batch norms.
        assert count_trained(one) - count_low_rank(one) == 53_120
        for rank in (8, 16):
            one = ppap.expert(net, rank)
            low_rank, norms = ppap.resnet50_weights(rank)
            assert (count_low_rank(one), count_trained(one)) == (low_rank, low_rank + norms)

        # DeiT-S: queries, keys, values and projections of 12 blocks.
        one = ppap.expert(deit_small())
        assert count_low_rank(one) == 12 * 16 * (384 + 1152 + 384 + 384) == 442_368

        # All biases but the last layer's are trained, and no gain of a layer norm.
        for name, parameter in one.named_parameters():
            changed = ".weight.0." in name
            is_bias = name.endswith("bias") and not name.startswith("head")
            assert parameter.requires_grad == (changed or is_bias), name


def test_each_time_has_one_expert():
    times = [0.0, 0.1, 0.19, 0.21, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, 1.0]
    times = torch.tensor(times, dtype=float64)
    boundaries = torch.arange(6, dtype=float64) / 5
    for schedule in (logsnr_schedule_cosine, make_schedule("shifted:16", 64)):
        experts = ppap.expert_of(schedule(times), 5, schedule)
        assert experts.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert ppap.expert_of(schedule(times), 1, schedule).tolist() == [0] * 11

        # A boundary belongs to the noisier expert, and t = 1 to the last one.
        experts = ppap.expert_of(schedule(boundaries), 5, schedule)
        assert experts.tolist() == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("name", guides.TASKS)
def test_experts_learn_from_images_alone(name):
    schedule, task = logsnr_schedule_cosine, guides.TASKS[name]
    x = load_batch(Shapes(16), range(64))[0] / 127.5 - 1
    teacher = guides.trained_net(
        task, Shapes(16), 10, torch.device("cpu"), steps=40, batch=64
    ).requires_grad_(True)
    teacher.zero_grad()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    experts = ppap.transfer(task, teacher, 2, x, schedule, steps=60, batch=32, lr=1e-2, rank=3)

    # The clean network stays as it is.
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, parameter in teacher.named_parameters():
        assert parameter.grad is None, key

    @torch.no_grad()
    def divergence(net, k):
        """The loss between teacher(x) and net(z), with z at random levels in the range of k.

        That of a network that says what the teacher says is subtracted.
        """
        torch.manual_seed(1)
        z = diffuse(x, torch.randn_like(x), schedule((k + torch.rand(64)) / 2))
        target = task.teach(teacher(x), 0.25)
        least = 0 if name == "depth" else task.loss((target + 1e-30).log(), target)
        return (task.loss(net(z), target) - least).mean().item()

    # In its range, each expert is better than the teacher and than the other expert.
    for k, net in enumerate(experts):
        assert 0 < divergence(net, k) < 0.8 * divergence(teacher, k)
        assert divergence(net, k) < divergence(experts[1 - k], k)
        assert count_trained(net) == 0


def test_half_of_the_images_are_flipped_for_the_experts(monkeypatch):
    seen = []

    def recording(x, eps, logsnr):
        seen.append(x)
        return diffuse(x, eps, logsnr)

    # Images with a bright left half.
    x = torch.zeros(4, 3, 16, 16)
    x[..., :8] = 1
    monkeypatch.setattr(ppap, "diffuse", recording)
    teacher = guides.Classifier(10).eval()
    ppap.transfer(guides.TASKS["class"], teacher, 1, x, logsnr_schedule_cosine, steps=10, batch=32)
    seen = torch.cat(seen)
    flipped = seen[:, 0, 0, 0] == 0
    assert torch.equal(seen[flipped], x[:1].flip(3).expand(flipped.sum(), -1, -1, -1))
    assert torch.equal(seen[~flipped], x[:1].expand((~flipped).sum(), -1, -1, -1))
    assert 0.4 < flipped.float().mean() < 0.6


# ---------------------------------------------------------------- guides


def test_losses_and_scores_in_closed_form():
    classes, depth, segmentation = (
        guides.TASKS[name] for name in ("class", "depth", "segmentation")
    )
    # Equal logits: log K per image, or per pixel.
    log2 = math.log(2)
    loss = classes.loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(loss, torch.full((3,), log2))
    mask = torch.zeros(2, 4, 4, dtype=torch.int64)
    mask[:, :2] = 1
    loss = segmentation.loss(torch.zeros(2, 2, 4, 4), mask)
    torch.testing.assert_close(loss, torch.full((2,), 16 * log2))

    # A constant error of 0.5 of the distance.
    distance = torch.randn(2, 4, 4)
    assert torch.equal(depth.loss(distance[:, None], distance), torch.zeros(2))
    torch.testing.assert_close(depth.loss(distance[:, None] - 0.5, distance), torch.full((2,), 4.0))
    torch.testing.assert_close(
        depth.score(distance[:, None] - 0.5, distance), torch.full((2,), 0.5)
    )

    # Masks of 8 pixels: equal, with 4 pixels in common, and disjoint.
    def logits(rows):
        found = torch.zeros(1, 4, 4)
        found[:, rows] = 1
        return torch.stack([-found, found], 1)

    for rows, value in ((slice(0, 2), 1), (slice(1, 3), 4 / 12), (slice(2, 4), 0)):
        score = segmentation.score(logits(rows), mask[:1])
        torch.testing.assert_close(score, torch.tensor([float(value)]))
    assert classes.score(torch.eye(3), torch.tensor([0, 2, 2])).tolist() == [1, 0, 1]

    # The truth of Shapes. What covers more than half of a pixel is in the mask.
    images, target = guides.load_examples(segmentation, Shapes(32), range(20))
    assert torch.equal(images, load_batch(Shapes(32), range(20))[0])
    assert torch.equal(target, (Shapes(32).distances(range(20)) < 0).long())
    assert guides.load_examples(classes, Shapes(32), range(20))[1].tolist() == 2 * list(range(10))


def test_guides_change_eps_by_the_gradient_of_their_loss():
    """Linear networks, whose gradients are known."""
    torch.manual_seed(0)
    schedule = logsnr_schedule_cosine
    z = torch.randn(3, 3, 4, 4, dtype=float64)
    logsnr = torch.tensor([-3.0, 0.0, 2.0], dtype=float64)
    weight = torch.randn(2, 3, dtype=float64)

    def pixelwise(z):
        return torch.einsum("kc,bchw->bkhw", weight, z)

    def pooled(z):
        return pixelwise(z).mean((2, 3))

    def first(z):
        return pixelwise(z)[:, :1]

    def one_hot(target):
        return F.one_hot(target, 2).to(float64)

    mask, label = torch.randint(2, (3, 4, 4)), torch.tensor([0, 1, 1])
    distance = torch.randn(3, 4, 4, dtype=float64)

    # Cross-entropy: the probabilities minus the truth, times the weight. Of a mean over 16 pixels,
    # each pixel has a sixteenth.
    gradients = {}
    error = pixelwise(z).softmax(1) - one_hot(mask).movedim(3, 1)
    gradients["segmentation"] = (pixelwise, mask, torch.einsum("kc,bkhw->bchw", weight, error))
    error = (pooled(z).softmax(1) - one_hot(label)) @ weight / 16
    gradients["class"] = (pooled, label, error[:, :, None, None].expand_as(z))

    # The square: twice the error, times the weight.
    error = 2 * (first(z) - distance[:, None]) * weight[0, :, None, None]
    gradients["depth"] = (first, distance, error)

    def net(z, logsnr, label=None):
        assert label is None
        return 0.3 * z

    def eps_of(v, z):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return alpha * v + sigma * z

    assert gradients.keys() == guides.TASKS.keys()
    for name, (predict, target, gradient) in gradients.items():
        loss = guides.loss_of(guides.TASKS[name], predict)
        # Two ranges of t with the same guide.
        guided = ppap.guided_by(net, [loss, loss], 0.7, schedule)(z, logsnr, target)
        _, sigma = alpha_sigma(logsnr, like=z)
        # z and eps determine x; so does v: x = alpha z - sigma v, and eps = sigma z + alpha v.
        expected = eps_of(0.3 * z, z) + 0.7 * sigma * gradient
        torch.testing.assert_close(eps_of(guided, z), expected)


def test_classifier_guidance_equals_that_of_the_exact_posterior():
    """x is one of two Gaussians, with their exact denoiser and classifier.

    Then guidance 1 is the denoiser of the class.
    """
    torch.manual_seed(0)
    schedule = logsnr_schedule_cosine
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.2]]).double()
    std = 0.3

    def class_logits(z, logsnr):
        """log p(z | class) up to a constant, (B, 2)."""
        alpha, sigma = alpha_sigma(logsnr, like=z)
        difference = z[:, None] - alpha[:, None] * means
        return -difference.square().sum(2) / (2 * (alpha**2 * std**2 + sigma**2))

    def denoised(z, logsnr):
        """x_hat for each class, (B, 2, 2)."""
        alpha, sigma = alpha_sigma(logsnr, like=z)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return means + gain[:, None] * (z[:, None] - alpha[:, None] * means)

    def v_from_x(x_hat, z, logsnr):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return (alpha * z - x_hat) / sigma

    def net(z, logsnr, label=None):
        """The exact denoiser without a label."""
        assert label is None
        p = class_logits(z, logsnr).softmax(1)
        return v_from_x((p[:, :, None] * denoised(z, logsnr)).sum(1), z, logsnr)

    logsnr = torch.tensor([-3.0, -1.0, 0.5, 2.0]).double()
    label = torch.tensor([0, 1, 1, 0])
    z = torch.randn(4, 2).double()

    def exact_expert(k):
        """The loss of the exact classifier of the images in the range of expert k."""
        own_logsnr = logsnr[ppap.expert_of(logsnr, 3, schedule) == k]
        return guides.loss_of(guides.TASKS["class"], lambda own_z: class_logits(own_z, own_logsnr))

    experts = [exact_expert(k) for k in range(3)]
    conditional = v_from_x(denoised(z, logsnr)[torch.arange(4), label], z, logsnr)
    unconditional = net(z, logsnr)

    # Scale 1 is the conditional denoiser, and larger scales extrapolate.
    guided = ppap.guided_by(net, experts, 1.0, schedule)
    torch.testing.assert_close(guided(z, logsnr, label), conditional)
    with pytest.raises(ValueError, match="target"):
        guided(z, logsnr)
    guided = ppap.guided_by(net, experts, 3.0, schedule)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(guided(z, logsnr, label), expected)

    # Scale 0 needs no label.
    guided = ppap.guided_by(net, experts, 0.0, schedule)
    assert torch.equal(guided(z, logsnr), unconditional)


# ---------------------------------------------------------------- the commands of ppap and ppgn

TINY_NET = dict(
    base_channels=8,
    emb_channels=16,
    channel_multiplier=[1, 2],
    num_res_blocks=[1],
    num_transformer_blocks=1,
)


@pytest.fixture(scope="session")
def trained(made_once):
    """A folder with a run and a guide of each task, with printed.txt, the output of ppap."""

    def make(folder):
        three_steps = functools.partial(guides.trained_net, steps=3)

        def few_held_out(task, config, n, device):
            return guides.held_out(task, config, 20, device)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ppap, "trained_net", three_steps)
            monkeypatch.setattr(ppap, "held_out", few_held_out)
            short_grid(monkeypatch)
            run = train_small(folder, "--model-args", json.dumps(TINY_NET))
            for task in guides.TASKS:
                printed = io.StringIO()
                # --pictures is the old name of --images.
                options = "--experts 2 --updates 2 --pictures 8 --batch 8 --steps 2 --rank 3"
                with contextlib.redirect_stdout(printed):
                    call(ppap.main, run, options, "--task", task, "--out", folder / task)
                (folder / task / "printed.txt").write_text(printed.getvalue())

    return made_once("ppap", make)


@pytest.fixture
def draw(trained, tmp_path):
    """A function that draws images with ppap.main or ppgn.main, and returns (images, labels)."""

    def call_and_load(main, *options):
        out = tmp_path / "out.npz"
        call(main, trained / "run", "--guide", trained / "class", "--out", out, *options)
        with np.load(out) as file:
            return file["arr_0"].astype(int), file["y"]

    return call_and_load


@pytest.mark.parametrize("task, share", [("class", 8.2), ("depth", 8.6), ("segmentation", 8.6)])
def test_ppap_prints_scores(trained, task, share):
    text = (trained / task / "printed.txt").read_text()
    # Two experts, 8 images, the share of trained parameters, and what is measured.
    found = re.search(r"^2 experts.* 8 samples.* ([\d.]+) %.*; (.*):$", text, re.M)
    assert float(found[1]) == share
    assert found[2] == guides.TASKS[task].measure
    # A line for the clean network and one for the experts.
    assert text.count("t=0.95") == 2


def test_ppap_draws_guided_images(trained, draw):
    options = "--n 10 --steps 3"
    unguided, _ = draw(ppap.main, options, "--scale 0")
    guided, _ = draw(ppap.main, options)
    plain, _ = draw(ppap.main, options, "--plain --batch 3")

    # The batch size changes images by rounding only.
    in_batches, _ = draw(ppap.main, options, "--batch 4")
    assert np.abs(in_batches - guided).max() <= 1

    # Scale 0 samples with the null label, which is 10.
    net, config, schedule = load(str(trained / "run"))
    expected = sample(
        in_bf16(net, config["bf16"]),
        (10, 3, 32, 32),
        schedule,
        steps=3,
        sampler="ddim",
        label=torch.full((10,), 10),
    )
    assert np.array_equal(unguided, to_uint8(expected).permute(0, 2, 3, 1))

    # The guide has an effect, and so have its experts: more than rounding.
    assert not np.array_equal(unguided, guided)
    assert np.abs(guided - plain).max() > 1


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_ppap_guides_to_the_maps_of_new_shapes(task, trained, tmp_path, capsys):
    command = [ppap.main, trained / "run", "--guide", trained / task, "--n 10 --steps 2"]
    command += ["--judge", trained / task]
    call(*command, "--out", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        images, target = file["arr_0"], torch.tensor(file["y"])
    distance = Shapes(32, first=2**30).distances(range(10))
    assert torch.equal(target, distance if task == "depth" else (distance < 0).long())

    # The targets have an effect: with others, the images are others.
    call(*command, "--scale 0 --out", tmp_path / "others.npz")
    with np.load(tmp_path / "others.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - images).max() > 1

    # The judge's score of the samples, and that of real images.
    judge = ppap.load_guide(trained / task, "cpu", 10).net
    real, _ = load_batch(Shapes(32, first=2**30), range(10))
    scores = [
        guides.TASKS[task].score(judge(x / 127.5 - 1), target).mean().item()
        for x in (torch.tensor(images).movedim(3, 1), real)
    ]
    printed = re.search(r": ([\d.]+); of real images: ([\d.]+)", capsys.readouterr().out)
    assert [float(value) for value in printed.groups()] == pytest.approx(scores, abs=1e-4)

    # A grid has each map, bright inside the shape, above its image. The gap is 2 pixels.
    call(*command, "--out", tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (64, 10 * 34 - 2, 3)
    for k in range(10):
        tile = grid[:, 34 * k : 34 * k + 32]
        assert np.array_equal(tile[32:], images[k])
        assert np.array_equal(tile[:32, :, 0] > 127.5, distance[k] < 0)

    # A figure: two rows of samples for the same maps, enlarged, to the right of their names.
    figure = tmp_path / "figure.png"
    call(guides.main, tmp_path / "out.npz", tmp_path / "others.npz", figure)
    figure = np.asarray(Image.open(figure))
    assert figure.shape == (3 * (64 + 4) - 4, 104 + 2 * (10 * 34 - 2), 3)
    for row, tiles in ((0, grid[:32]), (1, grid[32:])):
        large = tiles.repeat(2, 0).repeat(2, 1)
        assert np.array_equal(figure[68 * row : 68 * row + 64, 104:], large)


def test_a_figure_needs_samples_for_maps(tmp_path):
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=np.zeros((2, 8, 8, 3), np.uint8), y=np.arange(2))
    for arguments in ([samples, tmp_path / "figure.png"], [samples], []):
        with pytest.raises(ValueError, match="samples.npz|SAMPLES.npz"):
            call(guides.main, *arguments)


def test_ppgn_inpaints_the_middle_of_images(draw):
    known, label = load_batch(Shapes(32, first=2**30), range(10))
    known = known.permute(0, 2, 3, 1).numpy()
    for options in ([], ["--plain --noise 0.1"]):
        images, y = draw(ppgn.main, "--n 10 --chain 3 --inpaint", *options)
        assert y.tolist() == label.tolist()

        # A pixel is the same if it is so in all images and colors. The border stays.
        same = (images == known).all((0, 3))
        assert same[:8].all()
        assert same[24:].all()
        assert same[:, :8].all()
        assert same[:, 24:].all()
        assert not same[8:24, 8:24].any()


def test_ppgn_options_have_an_effect(draw):
    images, _ = draw(ppgn.main, "--n 10 --chain 3 --batch 3")

    # The batch size and the number of images change images by rounding only.
    more, _ = draw(ppgn.main, "--chain 3 --n 12")
    assert np.abs(images - more[:10]).max() <= 1

    options = ("--prior 0", "--noise 0", "--condition 100", "--logsnr 2", "--seed 1", "--plain")
    for option in options:
        others, _ = draw(ppgn.main, "--n 10 --chain 3", option)
        assert (others != images).mean() > 0.1, option


def test_ppgn_in_the_latents_of_an_autoencoder(draw, tmp_path, capsys):
    # Patches of 8 pixels: 4 x 4 latents of 2 floats.
    sizes = dict(patch=8, channels=2, encoder=(16, 1, 2), decoder=(16, 1, 2))
    torch.manual_seed(0)
    net = vitok.ViTok(**sizes)
    vitok.save_vitok(tmp_path / "vitok", dict(net=sizes, weights=net.state_dict()))
    joint = ["--n 20 --chain 2 --joint", tmp_path / "vitok"]
    images, y = draw(ppgn.main, joint)
    printed = capsys.readouterr().out
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    distance = ppgn.distance_within(x, torch.from_numpy(y))
    assert f"one class: {distance:.3f}" in printed

    # Each option has an effect, but the batch size does not.
    for option in ("--prior 0", "--condition 0", "--noise 0.1", "--lr 1", "--batch 7"):
        others, _ = draw(ppgn.main, joint, option)
        assert np.array_equal(others, images) == (option == "--batch 7"), option

    # Inpainting by the gradient of the context. The border is pasted at the end.
    known, _ = load_batch(Shapes(32, first=2**30), range(10))
    known = known.permute(0, 2, 3, 1).numpy()
    joint[0] = "--n 10 --chain 2 --inpaint --joint"
    weak, _ = draw(ppgn.main, joint, "--context 0")
    strong, _ = draw(ppgn.main, joint, "--context 1")
    same = (strong == known).all((0, 3))
    assert same.sum() == 32 * 32 - 16 * 16
    assert not np.array_equal(weak, strong)


def test_invalid_options_of_ppap_and_ppgn_are_rejected(trained, tmp_path):
    run = trained / "run"
    guide, depth, out = trained / "class", trained / "depth", tmp_path / "out.npz"
    for command, options, message in (
        (ppap.main, ["--guide", guide, "--out x"], r"--out x\b"),
        (ppap.main, ["--out", guide, "--updates 0"], r"--updates(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--chain 0"], r"--chain(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--logsnr nan"], r"--logsnr\b.*-20\b.*\b20\b"),
        (ppgn.main, ["--guide", guide, "--prior -1"], "--prior"),
        (ppgn.main, ["--guide", guide, "--condition nan"], "--condition"),
        (ppgn.main, ["--guide", guide, "--plain --joint x"], "--joint and --plain"),
        (ppgn.main, ["--guide", guide, "--inpaint --joint x"], "--context"),
        (ppgn.main, ["--guide", guide, "--context 1"], "--inpaint"),
        (ppap.main, ["--out", guide, "--scale inf"], "--scale"),
        (ppap.main, ["--out", guide, "--judge", guide], "--judge.*--guide"),
        (ppap.main, ["--guide", guide, "--judge", depth, "--out", out], "--judge.*depth"),
        (ppgn.main, ["--guide", depth, "--out", out], "--guide.*depth"),
    ):
        with pytest.raises(ValueError, match=message):
            call(command, run, options)

    # A task is one of three.
    with pytest.raises(SystemExit, match="--task"):
        call(ppap.main, run, "--task other --out", guide)

    # Only the built-in Shapes have exact maps.
    guides.check_task("--task class", "class", dict(data=["images.zip"]))
    guides.check_task("--task depth", "depth", dict(data=[]))
    with pytest.raises(ValueError, match="--task depth.*images.zip"):
        guides.check_task("--task depth", "depth", dict(data=["images.zip"]))

    # A folder without a guide.
    with pytest.raises(FileNotFoundError):
        call(ppgn.main, run, "--guide", tmp_path, "--out", tmp_path / "out.npz")


def test_files_that_are_no_guides_are_rejected(trained, tmp_path):
    other = io.BytesIO()
    torch.save(dict(other=1), other)
    path = tmp_path / "experts.pt"
    for content in (b"", b"PK broken", other.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            call(ppap.main, trained / "run", "--guide", tmp_path, "--out", tmp_path / "out.npz")


def test_experts_are_built_on_the_device_of_their_network():
    experts = ppap.expert(guides.Classifier(10).to("meta"), 4)
    assert all(parameter.device.type == "meta" for parameter in experts.parameters())


def test_runs_that_cannot_draw_without_a_label_are_refused(tmp_path):
    run = train_small(tmp_path, "--label-drop 0", *SMALL_NET)
    for module in (ppap, ppgn):
        with pytest.raises(ValueError, match="--label-drop 0"):
            call(module.main, run, "--guide guide --out", tmp_path / "grid.png")
    with pytest.raises(ValueError, match="--label-drop 0"):
        call(ppap.main, run, "--out", tmp_path / "guide")
