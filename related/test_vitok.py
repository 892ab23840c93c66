"""Tests of related/vitok.py."""

import functools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sample as sampling
import train
from related import (
    distill,
    tstitch,
    vitok,
)
from support.data import Shapes, image_order, load_batch
from tests.helpers import call


def small_vitok(patch=4, channels=5, **others):
    """A net with random weights in every layer, in float64."""
    torch.manual_seed(0)
    net = (
        vitok.ViTok(patch, channels, **dict(encoder=(16, 1, 2), decoder=(32, 2, 4)) | others)
        .double()
        .eval()
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def test_vitok_costs_what_was_published(capsys):
    def parameters(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    def macs(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 2e9

    with torch.device("meta"):
        for decoder, millions, gmac in (("B", 85_698_867, 23.1), ("L", 383_674_899, 101.8)):
            net = vitok.ViTok(16, 16, vitok.SIZES["S"], vitok.SIZES[decoder])
            assert (
                parameters(net.patchify, net.encoder, net.to_latent) == 43_163_960
                and parameters(net.from_latent, net.decoder, net.to_pixels) == millions
            )
            encode = functools.partial(net.encode, torch.empty(1, 3, 256, 256))
            decode = functools.partial(net.decode, torch.empty(1, 16, 16, 16))
            assert macs(encode) == pytest.approx(11.6, rel=0.005)
            assert macs(decode) == pytest.approx(gmac, rel=0.005)
    call(
        vitok.main,
    )
    out = capsys.readouterr().out
    assert re.search(r"\bS-B/16\b.*\b128,862,827\b.*\b129\.0 M\b.*\b34\.76 GMAC\b", out)
    assert re.search(r"\bS-L/16\b.*\b426,838,859\b.*\b426\.8 M\b.*\b113\.40 GMAC\b", out)


def test_vitok_by_hand():
    net, x = small_vitok(decoder=(16, 1, 2)), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    grid = [(row, column) for row in range(2) for column in range(3)]

    # of a head of 8 channels: four complex numbers, two of which turn with the row
    # and two with the column
    def turned(q):
        numbers = torch.complex(q[..., :4], q[..., 4:])
        angles = torch.tensor(
            [[row, row / 100, column, column / 100] for row, column in grid], dtype=torch.float64
        )  # 10000^(-1/2) is 1/100
        return numbers * torch.exp(1j * angles)

    def block_by_hand(block, h):
        u = F.layer_norm(h, (16,), block.norm1.weight, block.norm1.bias)
        q, k, v = (u @ block.qkv.weight.T).reshape(2, 6, 3, 2, 8).unbind(2)
        heads = []
        for i in range(2):
            scores = (turned(q[:, :, i])[:, :, None] * turned(k[:, :, i])[:, None].conj()).real.sum(
                3
            ) / 8**0.5
            heads.append(scores.softmax(2) @ v[:, :, i])
        h = h + block.out(torch.cat(heads, 2))
        u = F.layer_norm(h, (16,), block.norm2.weight, block.norm2.bias)
        assert block.w0.out_features == 42  # int(2.67 x 16)
        a = block.w0(u)
        return h + block.w2(a * torch.sigmoid(a) * block.w1(u))

    patches = torch.stack(
        [
            x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, -1)
            for row, column in grid
        ],
        1,
    )
    h = block_by_hand(
        net.encoder.blocks[0], patches @ net.patchify.weight.flatten(1).T + net.patchify.bias
    )
    mean, logvar = net.to_latent(net.encoder.norm(h)).chunk(2, 2)
    ours = net.encode(x)
    for expected, got in zip((mean, logvar), ours):
        assert got.shape == (2, 5, 2, 3)
        torch.testing.assert_close(got.flatten(2).mT, expected)
    h = net.decoder.norm(block_by_hand(net.decoder.blocks[0], net.from_latent(mean)))
    patches = (
        torch.einsum("btc,cops->btops", h, net.to_pixels.weight) + net.to_pixels.bias[:, None, None]
    )
    expected = torch.cat(
        [torch.cat([patches[:, 3 * row + column] for column in range(3)], 3) for row in range(2)], 2
    )
    torch.testing.assert_close(net.decode(ours[0]), expected)


def test_rotations_depend_on_relative_positions_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    angles = vitok.rope_angles((4, 5), 16).double()
    logits = vitok.rotated(q.expand(20, -1), angles) @ vitok.rotated(k.expand(20, -1), angles).T
    by_difference = {}
    for i in range(20):
        for j in range(20):
            by_difference.setdefault((i // 5 - j // 5, i % 5 - j % 5), []).append(
                logits[i, j].item()
            )
    assert (
        len(by_difference) == 7 * 9
        and max(max(values) - min(values) for values in by_difference.values()) < 1e-6
    )
    assert len({round(values[0], 4) for values in by_difference.values()}) > 55
    assert logits[0, 0].item() == pytest.approx((q @ k).item())


@pytest.mark.parametrize(
    "patch, channels, size", [(2, 4, (8, 8)), (4, 16, (8, 12)), (8, 2, (32, 16))]
)
def test_latent_floats_are_counted(patch, channels, size):
    net = small_vitok(patch, channels)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    mean, logvar = net.encode(x)
    assert (
        mean.shape == logvar.shape == (2, channels, size[0] // patch, size[1] // patch)
        and net.floats(*size) == mean[0].numel()
    )
    assert net.decode(mean).shape == x.shape
    with pytest.raises(ValueError, match=rf"(?=.*\b{patch}\b).*\b{size[0] - 1}x{size[1]}\b"):
        net.encode(x[:, :, :-1])


def test_the_posterior_is_sampled_and_its_variance_is_limited():
    net, x = small_vitok(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    x_hat, mean, logvar = net(x.expand(2, -1, -1, -1))
    assert torch.equal(mean[0], mean[1]) and not torch.allclose(x_hat[0], x_hat[1])
    torch.manual_seed(3)
    x_hat, mean, logvar = net(x)
    torch.manual_seed(3)
    torch.testing.assert_close(
        x_hat, net.decode(mean + logvar.exp().sqrt() * torch.randn_like(mean))
    )
    with torch.no_grad():
        net.to_latent.bias[5:] = torch.tensor([-1e3, 1e3, -1e3, 1e3, 0])
    assert net.encode(x)[1].flatten()[:4].tolist() == [-30, 20, -30, 20]


def test_kl_and_hinge_losses():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, logvar.mul(0.5).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    torch.testing.assert_close(vitok.kl(mean, logvar), expected.flatten(1).mean(1))
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert vitok.discriminator_loss(real, fake).item() == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2)
    )
    x = torch.randn(2, 3, 16, 16)
    assert vitok.Discriminator(8)(x).shape == (2, 1, 4, 4)


def test_psnr_and_ssim():
    x = torch.rand(2, 3, 12, 13, dtype=torch.float64) * 2 - 1
    assert vitok.psnr(x, x + 0.2)[1].item() == pytest.approx(20) and vitok.psnr(x, x + 0.02)[
        0
    ].item() == pytest.approx(40)  # 20 log10(2 / 0.2)
    torch.testing.assert_close(vitok.ssim(x, x), torch.ones(2, dtype=torch.float64))
    a, b = torch.full_like(x, 0.5), torch.full_like(x, -0.25)
    assert vitok.ssim(a, b)[0].item() == pytest.approx(
        (2 * 0.5 * -0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    )
    y, weights = torch.rand_like(x), [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    values = []
    for channel in range(3):
        for top in range(2):
            for left in range(3):
                w = torch.tensor([[p * q for q in weights] for p in weights], dtype=torch.float64)
                w, u, v = (
                    w / w.sum(),
                    x[0, channel, top : top + 11, left : left + 11],
                    y[0, channel, top : top + 11, left : left + 11],
                )
                mu, nu = (w * u).sum(), (w * v).sum()
                spread, other, both = (
                    (w * (u - mu) ** 2).sum(),
                    (w * (v - nu) ** 2).sum(),
                    (w * (u - mu) * (v - nu)).sum(),
                )
                values.append(
                    (2 * mu * nu + 4e-4)
                    * (2 * both + 3.6e-3)
                    / ((mu**2 + nu**2 + 4e-4) * (spread + other + 3.6e-3))
                )
    assert vitok.ssim(x, y)[0].item() == pytest.approx(torch.stack(values).mean().item())


def test_the_second_stage_does_not_change_the_encoder():
    torch.manual_seed(0)
    net, settings = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2)), dict(steps=10, batch=4, lr=1e-2)

    def encoder(net):
        return {
            key: value.clone()
            for key, value in net.state_dict().items()
            if key.startswith(("patchify", "encoder", "to_latent"))
        }

    def others(net):
        return {
            key: value.clone() for key, value in net.state_dict().items() if key not in encoder(net)
        }

    before, decoder = encoder(net), others(net)
    average = vitok.fit(net, Shapes(16), gan=0.5, **settings)
    for after in (net, average):
        assert all(torch.equal(value, before[key]) for key, value in encoder(after).items())
        assert not any(torch.equal(value, decoder[key]) for key, value in others(after).items())
    vitok.fit(net, Shapes(16), **settings)
    assert not any(
        torch.equal(value, before[key]) for key, value in encoder(net).items() if "weight" in key
    )


class Brightness(torch.nn.Module):
    """A discriminator of one weight: how bright images are."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def test_the_second_stage_follows_the_discriminator(monkeypatch):
    critics, losses = [], []
    monkeypatch.setattr(vitok, "Discriminator", lambda: critics.append(Brightness()) or critics[0])
    monkeypatch.setattr(
        vitok,
        "discriminator_loss",
        lambda real, fake, hinge=vitok.discriminator_loss: (
            losses.append((real, fake)) or hinge(real, fake)
        ),
    )
    torch.manual_seed(0)
    net, (x, _) = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2)), load_batch(Shapes(16), range(20))
    x = x / 127.5 - 1
    before = net.decode(net.encode(x)[0]).mean()
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, gan=100.0)
    assert net.decode(net.encode(x)[0]).mean() > before + 0.2  # brighter is what it takes for real
    real, fake = losses[0]
    shown = load_batch(Shapes(16), next(image_order(1_000_000, 0, 8, 0, [range(8)])))[0] / 127.5 - 1
    torch.testing.assert_close(real, shown.mean((1, 2, 3)))  # the weight is 1 at first
    assert (
        fake.mean().item() == pytest.approx(before.item(), abs=0.1) and real.mean() < before - 0.2
    )
    assert critics[0].weight < 1  # as fakes are brighter, and became still brighter


def test_the_weight_of_kl():
    torch.manual_seed(0)
    net = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2))
    x = load_batch(Shapes(16), range(20))[0] / 127.5 - 1
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, beta=100.0)
    assert vitok.kl(*net.encode(x)).mean() < 0.01
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, beta=0.0)
    assert vitok.kl(*net.encode(x)).mean() > 0.1


def test_the_first_stage_learns():
    torch.manual_seed(0)
    net, x = (
        vitok.ViTok(4, 8, (32, 1, 2), (32, 1, 2)),
        load_batch(Shapes(16, first=2**30), range(50))[0] / 127.5 - 1,
    )
    before = vitok.psnr(x, net(x)[0]).mean()
    net = vitok.fit(net, Shapes(16), steps=80, batch=16, lr=3e-3)
    assert vitok.psnr(x, net(x)[0]).mean() > before + 5


def test_vitok_commands(tmp_path, capsys):
    net, latents = str(tmp_path / "net"), str(tmp_path / "latents.npz")
    call(
        vitok.main,
        "train",
        net,
        "--res 16 --patch 2 --channels 3 --encoder 16,1,2 --decoder 16,1,2 --steps 3 --batch 4",
    )
    call(vitok.main, "tune", net, "--steps 2 --batch 4")
    call(vitok.main, "test", net, "--n 20 --out", tmp_path / "grid.png")
    printed = re.search(
        r"E = 192\b[^\d\n]+\b20\b.*PSNR ([\d.]+) dB.*SSIM ([\d.-]+)", capsys.readouterr().out
    )
    trained, saved = vitok.load_vitok(net, "cpu")
    assert Image.open(tmp_path / "grid.png").size == (10 * 18 - 2, 4 * 18 - 2)
    x = load_batch(Shapes(16, first=2**30), range(20))[0] / 127.5 - 1
    y = trained.decode(trained.encode(x)[0]).clamp(-1, 1)
    assert float(printed[1]) == pytest.approx(vitok.psnr(x, y).mean().item(), abs=0.006) and float(
        printed[2]
    ) == pytest.approx(vitok.ssim(x, y).mean().item(), abs=6e-5)

    call(vitok.main, "encode", net, "--n 600 --out", latents)
    with np.load(latents) as arrays:
        z = torch.from_numpy(arrays["z"])
        assert (
            z.shape == (600, 3, 8, 8)
            and arrays["y"].tolist() == [i % 10 for i in range(600)]
            and arrays["classes"].tolist() == Shapes.classes
        )
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)
    call(vitok.main, "decode", net, "--data", latents, "--n 5 --out", tmp_path / "back.npz")
    expected = (
        sampling.to_uint8(trained.decode(z[:5] * saved["std"] + saved["mean"]))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.abs(np.load(tmp_path / "back.npz")["arr_0"].astype(int) - expected).max() <= 1

    run = str(tmp_path / "run")
    call(
        train.main,
        "--data",
        latents,
        "--res 8 --model-args",
        '{"base_channels": 8, "emb_channels": 16}',
        "--steps 2 --batch 4 --out",
        run,
    )
    call(sampling.main, run, "--n 12 --steps 2 --guidance 2 --out", tmp_path / "z.npz")
    call(vitok.main, "decode", net, "--data", tmp_path / "z.npz", "--out", tmp_path / "grid.npz")
    with np.load(tmp_path / "grid.npz") as pictures:
        assert pictures["arr_0"].shape == (12, 16, 16, 3) and pictures["y"].tolist() == [
            *range(10),
            0,
            1,
        ]
    with pytest.raises(ValueError, match=re.escape(run)):
        call(tstitch.main, run, run, "--fraction 0.5")
    with pytest.raises(ValueError, match=re.escape(run)):
        call(distill.main, run, "--steps 8")
    np.savez(
        tmp_path / "pets.npz",
        x=np.zeros((4, 16, 16, 3), np.uint8),
        y=np.arange(4) % 2,
        classes=["cat", "dog"],
    )
    np.savez(tmp_path / "plain.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    call(vitok.main, "encode", net, "--data", tmp_path / "pets.npz", "--out", latents)
    with np.load(latents) as arrays:
        assert (
            arrays["classes"].tolist() == ["cat", "dog"]
            and arrays["y"].tolist() == [0, 1, 0, 1]
            and len(arrays["z"]) == 4
        )
    call(vitok.main, "test", net, "--data", tmp_path / "pets.npz")
    assert re.search(r"E = 192\b[^\d\n]+\b4\b(?!\.)", capsys.readouterr().out)
    call(
        vitok.main,
        "train",
        tmp_path / "plain",
        "--data",
        tmp_path / "plain.npz",
        "--res 8 --encoder 16,1,2 --decoder 16,1,2 --steps 1 --batch 2",
    )
    call(vitok.main, "encode", tmp_path / "plain", "--out", latents)
    assert np.load(latents).files == ["z"] and np.load(latents)["z"].shape == (4, 8, 2, 2)
    with pytest.raises(ValueError, match=r"(?=.*\b11\b).*\b8\b"):
        call(vitok.main, "test", tmp_path / "plain", "--data", tmp_path / "plain.npz")


def test_vitok_names_wrong_options(tmp_path):
    net = str(tmp_path / "net")
    call(
        vitok.main,
        "train",
        net,
        "--res 16 --patch 4 --channels 3 --encoder 16,1,2 --decoder 16,1,2 --steps 1 --batch 2",
    )
    np.savez(tmp_path / "z.npz", z=np.zeros((2, 5, 4, 4), np.float32))
    for args, text in (
        (["train", "x", "--patch 5"], r"(?=.*\b5\b).*\b32x32\b"),
        (["train", "x", "--encoder 30,1,2"], r"(?=.*\b30\b)(?=.*\b2\b).*\b4\b"),
        (["train", "x", "--data", tmp_path / "z.npz"], re.escape(f"{tmp_path}/z.npz")),
        (["train", net], re.escape(net)),
        (["tune", net, "--out", net], re.escape(net)),
        (["encode", net], r"(?=.*\bencode\b)(?=.*\.npz\b).*--out\b"),
        (["encode", net, "--out x.png"], r"(?=.*\bencode\b).*--out\b"),
        (["decode", net], r"(?=.*\bdecode\b).*--out\b"),
        (["test", net, "--out x.npz"], r"(?=.*\btest\b)(?=.*\.png\b).*--out\b"),
        (["decode", net, "--out x.npz"], r"(?=.*\bdecode\b).*--data\b"),
        (
            ["decode", net, "--data", tmp_path / "z.npz", "--out x.npz"],
            r"z\.npz\b(?=.*\b5\b).*\b3\b",
        ),
        (["train", "x", "--lr nan"], "--lr"),
        (["train", "x", "--steps 0"], "--steps"),
        (["test", net, "--n 0"], "--n"),
    ):
        with pytest.raises(ValueError, match=text):
            call(vitok.main, args)
    with pytest.raises(FileNotFoundError):
        call(vitok.main, "test", tmp_path)
    (tmp_path / "vitok.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/vitok.pt")):
        call(vitok.main, "test", tmp_path)
    for args, text in (
        (["train"], r"^vitok: .*\btrain\b.*\Z"),  # one line
        (["train", "x", "--encoder 1,2"], r"--encoder(?=.*S, B, L).*\b1,2\b"),
        (["train", "x", "--encoder 128,2,0"], r"--encoder\b.*\b128,2,0\b"),
        (["train", "x", "--decoder 1,2,a"], r"--decoder\b.*\b1,2,a\b"),
    ):
        with pytest.raises(SystemExit, match=text):
            call(vitok.main, args)
