"""Tests of related/vitok.py."""

import functools
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sample as sampling
import train
from related import ppap, ppgn, vitok
from support.data import Shapes, image_order, load_batch
from tests.helpers import call, float64

# ---------------------------------------------------------------- the network


def small_vitok(patch=4, channels=5, **fields):
    """A net with random weights in every layer, in float64."""
    torch.manual_seed(0)
    fields = dict(encoder=(16, 1, 2), decoder=(32, 2, 4)) | fields
    net = vitok.ViTok(patch, channels, **fields).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def test_vitok_costs_what_was_published():
    def count_parameters(*parts):
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def count_gmac(function):
        """The multiply-accumulates of a call, in billions."""
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 2e9

    for decoder, parameters, gmac in (("B", 85_698_867, 23.1), ("L", 383_674_899, 101.8)):
        with torch.device("meta"):
            net = vitok.ViTok(16, 16, vitok.SIZES["S"], vitok.SIZES[decoder])
            encode = functools.partial(net.encode, torch.empty(1, 3, 256, 256))
            decode = functools.partial(net.decode, torch.empty(1, 16, 16, 16))
            assert count_parameters(net.patchify, net.encoder, net.to_latent) == 43_163_960
            assert count_parameters(net.from_latent, net.decoder, net.to_pixels) == parameters
            assert count_gmac(encode) == pytest.approx(11.6, rel=0.005)
            assert count_gmac(decode) == pytest.approx(gmac, rel=0.005)


def test_vitok_prints_the_published_sizes(capsys):
    call(vitok.main)
    text = capsys.readouterr().out
    assert re.search(r"\bS-B/16\b.*\b128,862,827\b.*\b34\.76 GMAC\b.*\b129\.0 M\b", text)
    assert re.search(r"\bS-L/16\b.*\b426,838,859\b.*\b113\.40 GMAC\b.*\b426\.8 M\b", text)

    # Video: 16 frames of 128 px are 1024, 512 or 256 tokens of 16 floats.
    assert re.search(r"S-B/4x8\b.*\b128,862,827\b.*\b160\.78 GMAC\b.*\b16384\b.*\b8\.04\b", text)
    assert re.search(r"S-B/8x8\b.*\b130,042,475\b.*\b73\.75 GMAC\b.*\b8192\b.*\b20\.05\b", text)
    assert re.search(r"S-B/4x16\b.*\b132,401,771\b.*\b35\.67 GMAC\b.*\b4096\b.*\b53\.98\b", text)


def test_vitok_by_hand():
    net = small_vitok(decoder=(16, 1, 2))
    x = torch.randn(2, 3, 8, 12, dtype=float64)

    # Six patches of 4x4 pixels, in 2 rows and 3 columns.
    grid = [(row, column) for row in range(2) for column in range(3)]

    # A head has 8 channels, which are four complex numbers. Two are rotated with the row and two
    # with the column, at the frequencies 1 and 10000^(-1/2), which is 1/100.
    angles = [[row, row / 100, column, column / 100] for row, column in grid]
    angles = torch.tensor(angles, dtype=float64)

    def rotated(q):
        return torch.complex(q[..., :4], q[..., 4:]) * torch.exp(1j * angles)

    def block_by_hand(block, h):
        # Attention, one head after the other: q, k, v have the shape (B, 6, heads, 8).
        u = F.layer_norm(h, (16,), block.norm1.weight, block.norm1.bias)
        q, k, v = (u @ block.qkv.weight.T).reshape(2, 6, 3, 2, 8).unbind(2)
        heads = []
        for i in range(2):
            queries = rotated(q[:, :, i])
            keys = rotated(k[:, :, i])
            products = (queries[:, :, None] * keys[:, None].conj()).real.sum(3)
            heads.append((products / 8**0.5).softmax(2) @ v[:, :, i])
        h = h + block.out(torch.cat(heads, 2))

        # SwiGLU, with int(2.67 * 16) = 42 hidden channels.
        assert block.w0.out_features == 42
        u = F.layer_norm(h, (16,), block.norm2.weight, block.norm2.bias)
        a = block.w0(u)
        return h + block.w2(a * torch.sigmoid(a) * block.w1(u))

    # The encoder.
    patches = []
    for row, column in grid:
        patch = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        patches.append(patch.reshape(2, -1))
    patches = torch.stack(patches, 1)
    tokens = patches @ net.patchify.weight.flatten(1).T + net.patchify.bias
    h = block_by_hand(net.encoder.blocks[0], tokens)
    mean, logvar = net.to_latent(net.encoder.norm(h)).chunk(2, 2)
    encoded = net.encode(x)
    for expected, latents in zip((mean, logvar), encoded):
        assert latents.shape == (2, 5, 2, 3)
        torch.testing.assert_close(latents.flatten(2).mT, expected)

    # The decoder.
    h = net.decoder.norm(block_by_hand(net.decoder.blocks[0], net.from_latent(mean)))
    patches = torch.einsum("btc,cops->btops", h, net.to_pixels.weight)
    patches = patches + net.to_pixels.bias[:, None, None]
    rows = []
    for row in range(2):
        rows.append(torch.cat([patches[:, 3 * row + column] for column in range(3)], 3))
    torch.testing.assert_close(net.decode(encoded[0]), torch.cat(rows, 2))


def test_rotations_depend_on_relative_positions_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=float64)

    # The same query and key at all positions of a 4x5 grid.
    angles = vitok.rope_angles((4, 5), 16).double()
    logits = vitok.rotated(q.expand(20, -1), angles) @ vitok.rotated(k.expand(20, -1), angles).T
    by_difference = {}
    for i in range(20):
        for j in range(20):
            difference = (i // 5 - j // 5, i % 5 - j % 5)
            by_difference.setdefault(difference, []).append(logits[i, j].item())

    # Equal differences have equal logits, and most others do not.
    assert len(by_difference) == 7 * 9
    for values in by_difference.values():
        assert max(values) - min(values) < 1e-6
    assert len({round(values[0], 4) for values in by_difference.values()}) > 55

    # The same position: no rotation.
    assert logits[0, 0].item() == pytest.approx((q @ k).item())


@pytest.mark.parametrize(
    "patch, channels, size", [(2, 4, (8, 8)), (4, 16, (8, 12)), (8, 2, (32, 16))]
)
def test_latent_floats_are_counted(patch, channels, size):
    net = small_vitok(patch, channels)
    height, width = size
    x = torch.randn(2, 3, height, width, dtype=float64)
    mean, logvar = net.encode(x)
    assert mean.shape == (2, channels, height // patch, width // patch)
    assert logvar.shape == mean.shape
    assert net.floats(height, width) == mean[0].numel()
    assert net.decode(mean).shape == x.shape

    # The height must be a multiple of the patch.
    with pytest.raises(ValueError, match=rf"(?=.*\b{patch}\b).*\b{height - 1}x{width}\b"):
        net.encode(x[:, :, :-1])


def test_the_posterior_is_sampled_and_its_variance_is_limited():
    net = small_vitok()
    x = torch.randn(1, 3, 4, 4, dtype=float64)

    # The same image twice has the same mean, but two draws.
    x_hat, mean, logvar = net(x.expand(2, -1, -1, -1))
    assert torch.equal(mean[0], mean[1])
    assert not torch.allclose(x_hat[0], x_hat[1])

    # The draw has the standard deviation exp(logvar / 2).
    torch.manual_seed(3)
    x_hat, mean, logvar = net(x)
    torch.manual_seed(3)
    expected = net.decode(mean + logvar.exp().sqrt() * torch.randn_like(mean))
    torch.testing.assert_close(x_hat, expected)

    # The log-variance is clipped to -30 and 20.
    with torch.no_grad():
        net.to_latent.bias[5:] = torch.tensor([-1e3, 1e3, -1e3, 1e3, 0])
    _, logvar = net.encode(x)
    assert logvar.flatten()[:4].tolist() == [-30, 20, -30, 20]


# ---------------------------------------------------------------- losses and metrics


def test_kl_and_hinge_losses():
    torch.manual_seed(0)

    # KL is averaged over all latent floats.
    mean, logvar = torch.randn(2, 3, 4, 2, 2, dtype=float64)
    posterior = torch.distributions.Normal(mean, logvar.mul(0.5).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).flatten(1).mean(1)
    torch.testing.assert_close(vitok.kl(mean, logvar), expected)

    # Real logits below 1 and fake logits above -1 cost their distance.
    real = torch.tensor([2.0, 0.5, -1.0])
    fake = torch.tensor([-2.0, 0.5])
    expected = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2)
    assert vitok.discriminator_loss(real, fake).item() == pytest.approx(expected)

    # The discriminator has one logit per patch.
    x = torch.randn(2, 3, 16, 16)
    assert vitok.Discriminator(8)(x).shape == (2, 1, 4, 4)


# ---------------------------------------------------------------- training


def tiny_vitok():
    """A net for training, in float32, always with the same weights."""
    torch.manual_seed(0)
    return vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2))


def images_of_shapes(first, n):
    """The images of n built-in shapes, in [-1, 1]."""
    images, _ = load_batch(Shapes(16, first=first), range(n))
    return images / 127.5 - 1


def test_the_second_stage_does_not_change_the_encoder():
    net = tiny_vitok()
    settings = dict(steps=10, batch=4, lr=1e-2)

    def split_state(net):
        """Copies of the weights of the encoder, and of all others."""
        encoder, others = {}, {}
        for key, value in net.state_dict().items():
            if key.startswith(("patchify", "encoder", "to_latent")):
                encoder[key] = value.clone()
            else:
                others[key] = value.clone()
        return encoder, others

    encoder, others = split_state(net)
    average = vitok.fit(net, Shapes(16), gan=0.5, **settings)
    for trained in (net, average):
        new_encoder, new_others = split_state(trained)
        for key, value in new_encoder.items():
            assert torch.equal(value, encoder[key]), key
        for key, value in new_others.items():
            assert not torch.equal(value, others[key]), key

    # The first stage changes the encoder, also after the second one.
    vitok.fit(net, Shapes(16), **settings)
    new_encoder, _ = split_state(net)
    for key, value in new_encoder.items():
        if "weight" in key:
            assert not torch.equal(value, encoder[key]), key


class Brightness(torch.nn.Module):
    """A discriminator of one weight, which is 1 at first: its logit is the brightness."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def test_the_second_stage_follows_the_discriminator(monkeypatch):
    critic = Brightness()
    logits = []
    hinge_loss = vitok.discriminator_loss

    def watched_loss(real, fake):
        logits.append((real, fake))
        return hinge_loss(real, fake)

    monkeypatch.setattr(vitok, "Discriminator", lambda: critic)
    monkeypatch.setattr(vitok, "discriminator_loss", watched_loss)

    net = tiny_vitok()
    x = images_of_shapes(0, 20)
    before = net.decode(net.encode(x)[0]).mean()
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, gan=100.0)

    # Brighter images look real to this discriminator, so reconstructions become brighter.
    assert net.decode(net.encode(x)[0]).mean() > before + 0.2

    # Its first inputs are the images of the first batch and their reconstructions.
    real, fake = logits[0]
    indices = next(image_order(1_000_000, 0, 8, 0, [range(8)]))
    images, _ = load_batch(Shapes(16), indices)
    torch.testing.assert_close(real, (images / 127.5 - 1).mean((1, 2, 3)))
    assert fake.mean().item() == pytest.approx(before.item(), abs=0.1)
    assert real.mean() < before - 0.2

    # Reconstructions are brighter than images from the start, so its weight falls.
    assert critic.weight < 1


def test_the_weight_of_kl():
    net = tiny_vitok()
    x = images_of_shapes(0, 20)
    settings = dict(steps=60, batch=8, lr=1e-2)
    vitok.fit(net, Shapes(16), beta=100.0, **settings)
    assert vitok.kl(*net.encode(x)).mean() < 0.01
    vitok.fit(net, Shapes(16), beta=0.0, **settings)
    assert vitok.kl(*net.encode(x)).mean() > 0.1


def test_the_first_stage_learns():
    torch.manual_seed(0)
    net = vitok.ViTok(4, 8, (32, 1, 2), (32, 1, 2))
    x = images_of_shapes(2**30, 50)
    before = vitok.psnr(x, net(x)[0]).mean()
    net = vitok.fit(net, Shapes(16), steps=80, batch=16, lr=3e-3)
    assert vitok.psnr(x, net(x)[0]).mean() > before + 5


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="session")
def trained(made_once):
    """A folder with an autoencoder, net, and the latents of 600 images, latents.npz."""

    def make(folder):
        net = folder / "net"
        options = "--res 16 --patch 2 --channels 3 --encoder 16,1,2 --decoder 16,1,2"
        call(vitok.main, "train", net, options, "--steps 3 --batch 4")
        call(vitok.main, "encode", net, "--n 600 --out", folder / "latents.npz")

    return made_once("vitok", make)


def test_tune_writes_another_autoencoder(trained, tmp_path):
    net = tmp_path / "net"
    shutil.copytree(trained / "net", net)
    call(vitok.main, "tune", net, "--steps 2 --batch 4")

    # By default, it is written beside the first one. Only the decoder has changed.
    before, _ = vitok.load_vitok(net, "cpu")
    after, _ = vitok.load_vitok(tmp_path / "net-tuned", "cpu")
    assert torch.equal(after.to_latent.weight, before.to_latent.weight)
    assert not torch.equal(after.to_pixels.weight, before.to_pixels.weight)


def test_vitok_prints_psnr_and_ssim(trained, tmp_path, capsys):
    call(vitok.main, "test", trained / "net", "--n 20 --out", tmp_path / "grid.png")
    pattern = r"E = 192\b[^\d\n]+\b20\b.*PSNR ([\d.]+) dB.*SSIM ([\d.-]+)"
    printed = re.search(pattern, capsys.readouterr().out)

    # Reconstructions are those of the mean of the latents.
    net, _ = vitok.load_vitok(trained / "net", "cpu")
    x = images_of_shapes(2**30, 20)
    y = net.decode(net.encode(x)[0]).clamp(-1, 1)
    assert float(printed[1]) == pytest.approx(vitok.psnr(x, y).mean().item(), abs=0.006)
    assert float(printed[2]) == pytest.approx(vitok.ssim(x, y).mean().item(), abs=6e-5)

    # The grid has two rows of images and two of reconstructions, 10 each, 2 pixels apart.
    assert Image.open(tmp_path / "grid.png").size == (10 * 18 - 2, 4 * 18 - 2)


def test_latents_are_standardized_and_decoded(trained, tmp_path):
    latents = trained / "latents.npz"
    with np.load(latents) as arrays:
        z = torch.from_numpy(arrays["z"])
        assert z.shape == (600, 3, 8, 8)
        assert arrays["y"].tolist() == [i % 10 for i in range(600)]
        assert arrays["classes"].tolist() == Shapes.classes
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)

    # Decoding undoes the standardization.
    out = tmp_path / "decoded.npz"
    call(vitok.main, "decode", trained / "net", "--data", latents, "--n 5 --out", out)
    net, saved = vitok.load_vitok(trained / "net", "cpu")
    x = net.decode(z[:5] * saved["std"] + saved["mean"])
    expected = sampling.to_uint8(x).permute(0, 2, 3, 1).numpy()
    with np.load(out) as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - expected).max() <= 1


def test_a_diffusion_model_is_trained_on_latents(trained, tmp_path):
    # Train on latents, draw latents, and decode them to images.
    run = tmp_path / "run"
    samples = tmp_path / "samples.npz"
    out = tmp_path / "images.npz"
    model_args = '{"base_channels": 8, "emb_channels": 16}'
    options = ["--res 8 --steps 2 --batch 4 --model-args", model_args]
    call(train.main, "--data", trained / "latents.npz", *options, "--out", run)
    call(sampling.main, run, "--n 12 --steps 2 --guidance 2 --out", samples)
    call(vitok.main, "decode", trained / "net", "--data", samples, "--out", out)
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (12, 16, 16, 3)
        assert arrays["y"].tolist() == [*range(10), 0, 1]

    # Commands for runs on images reject this run.
    for command in (ppap.main, ppgn.main):
        with pytest.raises(ValueError, match=re.escape(str(run))):
            call(command, run, "--guide x --out", tmp_path / "grid.png")


def test_vitok_uses_other_images_with_their_classes(trained, tmp_path, capsys):
    data = tmp_path / "pets.npz"
    images = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(data, x=images, y=np.arange(4) % 2, classes=["cat", "dog"])

    latents = tmp_path / "latents.npz"
    call(vitok.main, "encode", trained / "net", "--data", data, "--out", latents)
    with np.load(latents) as arrays:
        assert arrays["classes"].tolist() == ["cat", "dog"]
        assert arrays["y"].tolist() == [0, 1, 0, 1]
        assert len(arrays["z"]) == 4

    # It prints the number of these images.
    call(vitok.main, "test", trained / "net", "--data", data)
    assert re.search(r"E = 192\b[^\d\n]+\b4\b(?!\.)", capsys.readouterr().out)


def test_vitok_trains_on_images_without_labels(tmp_path):
    data = tmp_path / "plain.npz"
    np.savez(data, x=np.zeros((4, 8, 8, 3), np.uint8))
    net = tmp_path / "net"
    options = "--res 8 --encoder 16,1,2 --decoder 16,1,2 --steps 1 --batch 2"
    call(vitok.main, "train", net, "--data", data, options)

    # By default, it encodes the dataset of the training.
    latents = tmp_path / "latents.npz"
    call(vitok.main, "encode", net, "--out", latents)
    with np.load(latents) as arrays:
        assert arrays.files == ["z"]
        assert arrays["z"].shape == (4, 8, 2, 2)

    # SSIM needs 11x11 pixels.
    with pytest.raises(ValueError, match=r"(?=.*\b11\b).*\b8\b"):
        call(vitok.main, "test", net, "--data", data)


def test_invalid_options_are_rejected(trained, tmp_path):
    net = str(trained / "net")
    latents = tmp_path / "z.npz"
    np.savez(latents, z=np.zeros((2, 5, 4, 4), np.float32))
    for args, message in (
        (["train", "x", "--patch 5"], r"(?=.*\b5\b).*\b32x32\b"),
        (["train", "x", "--encoder 30,1,2"], r"(?=.*\b30\b)(?=.*\b2\b).*\b4\b"),
        (["train", "x", "--data", latents], re.escape(str(latents))),
        (["train", net], re.escape(net)),
        (["tune", net, "--out", net], re.escape(net)),
        (["encode", net], r"(?=.*\bencode\b)(?=.*\.npz\b).*--out\b"),
        (["encode", net, "--out x.png"], r"(?=.*\bencode\b).*--out\b"),
        (["decode", net], r"(?=.*\bdecode\b).*--out\b"),
        (["test", net, "--out x.npz"], r"(?=.*\btest\b)(?=.*\.png\b).*--out\b"),
        (["decode", net, "--out x.npz"], r"(?=.*\bdecode\b).*--data\b"),
        # The latents have 5 channels, but the network has 3.
        (["decode", net, "--data", latents, "--out x.npz"], r"z\.npz\b(?=.*\b5\b).*\b3\b"),
        (["train", "x", "--lr nan"], "--lr"),
        (["train", "x", "--steps 0"], "--steps"),
        (["test", net, "--n 0"], "--n"),
    ):
        with pytest.raises(ValueError, match=message):
            call(vitok.main, args)


def test_wrong_usage_ends_with_one_line():
    for args, message in (
        # The dot matches no line break.
        (["train"], r"^vitok: .*\btrain\b.*\Z"),
        (["train", "x", "--encoder 1,2"], r"--encoder(?=.*S, B, L).*\b1,2\b"),
        (["train", "x", "--encoder 128,2,0"], r"--encoder\b.*\b128,2,0\b"),
        (["train", "x", "--decoder 1,2,a"], r"--decoder\b.*\b1,2,a\b"),
    ):
        with pytest.raises(SystemExit, match=message):
            call(vitok.main, args)


def test_missing_and_broken_autoencoders_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError):
        call(vitok.main, "test", tmp_path)
    path = tmp_path / "vitok.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        call(vitok.main, "test", tmp_path)
