"""Tests of related/ppap.py, and of the command of related/ppgn.py, which uses its classifier."""

import contextlib
import functools
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from related import ppap, ppgn, vitok
from sample import sample, to_uint8
from schedule import alpha_sigma, diffuse, logsnr_schedule_cosine, make_schedule
from support.checkpoint import load
from support.data import Shapes, load_batch
from support.runtime import in_bf16
from tests.helpers import call, float64, short_grid, train_small

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


def test_experts_add_few_parameters_to_the_classifier():
    torch.manual_seed(0)
    classifier = ppap.Classifier(10).eval()
    x = torch.randn(2, 3, 32, 32)

    # At initialization an expert equals the classifier.
    net = ppap.expert(classifier, rank=2).eval()
    assert torch.equal(net(x), classifier(x))

    # An expert trains the low-rank changes and biases of convolutions, and the norms.
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
    low_rank = sum(p.numel() for name, p in net.named_parameters() if "weight.0." in name)
    assert low_rank == sum(2 * 9 * (a + b) for a, b in ((3, 32), (32, 64), (64, 128)))
    assert count_trained(net) == low_rank + 3 * (32 + 64 + 128)

    # With the default rank, that of the command, an expert trains at most a tenth.
    total = sum(parameter.numel() for parameter in classifier.parameters())
    assert count_trained(ppap.expert(classifier)) <= 0.1 * total


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


def test_experts_learn_from_images_alone():
    schedule = logsnr_schedule_cosine
    x = load_batch(Shapes(16), range(64))[0] / 127.5 - 1
    classifier = ppap.trained_classifier(
        Shapes(16), 10, torch.device("cpu"), steps=60, batch=64
    ).requires_grad_(True)
    classifier.zero_grad()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}

    experts = ppap.transfer(classifier, 2, x, schedule, steps=100, batch=32, lr=1e-2)

    # The classifier stays as it is.
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is None, name

    @torch.no_grad()
    def divergence(net, k):
        """KL(classifier(x), net(z)), with z at random noise levels in the range of expert k."""
        torch.manual_seed(1)
        z = diffuse(x, torch.randn_like(x), schedule((k + torch.rand(64)) / 2))
        target = (classifier(x) / 0.25).softmax(1)
        return F.kl_div(net(z).log_softmax(1), target, reduction="batchmean").item()

    # In its range, each expert is better than the classifier and than the other expert.
    for k, net in enumerate(experts):
        assert divergence(net, k) < 0.8 * divergence(classifier, k)
        assert divergence(net, k) < divergence(experts[1 - k], k)
        assert count_trained(net) == 0


# ---------------------------------------------------------------- guidance


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
        """The exact classifier of the images in the range of expert k."""
        own_logsnr = logsnr[ppap.expert_of(logsnr, 3, schedule) == k]
        return lambda own_z: class_logits(own_z, own_logsnr)

    experts = [exact_expert(k) for k in range(3)]
    conditional = v_from_x(denoised(z, logsnr)[torch.arange(4), label], z, logsnr)
    unconditional = net(z, logsnr)

    # Scale 1 is the conditional denoiser, and larger scales extrapolate.
    guided = ppap.guided_by(net, experts, 1.0, schedule)
    torch.testing.assert_close(guided(z, logsnr, label), conditional)
    with pytest.raises(ValueError, match="label"):
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
    """A folder with a run, with a guide for it, and with printed.txt, the output of ppap."""

    def make(folder):
        three_steps = functools.partial(ppap.trained_classifier, steps=3)
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ppap, "trained_classifier", three_steps)
            short_grid(monkeypatch)
            run = train_small(folder, "--model-args", json.dumps(TINY_NET))
            # --pictures is the old name of --images.
            options = "--experts 2 --updates 2 --pictures 8 --batch 8 --steps 2"
            with contextlib.redirect_stdout(printed):
                call(ppap.main, run, options, "--out", folder / "guide")
        (folder / "printed.txt").write_text(printed.getvalue())

    return made_once("ppap", make)


@pytest.fixture
def draw(trained, tmp_path):
    """A function that draws images with ppap.main or ppgn.main, and returns (images, labels)."""

    def call_and_load(main, *options):
        out = tmp_path / "out.npz"
        call(main, trained / "run", "--guide", trained / "guide", "--out", out, *options)
        with np.load(out) as file:
            return file["arr_0"].astype(int), file["y"]

    return call_and_load


def test_ppap_prints_accuracies(trained):
    text = (trained / "printed.txt").read_text()
    # Two experts, 8 images, and the share of trained parameters.
    assert re.search(r"\b2\b.*\b8\b.*\b8\.2 %", text)
    # A line for the classifier and one for the experts.
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
    guide = trained / "guide"
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
    ):
        with pytest.raises(ValueError, match=message):
            call(command, run, options)

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
