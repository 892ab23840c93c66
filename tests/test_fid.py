"""Tests of fid.py: reading images, the network, statistics, and the command."""

import contextlib
import copy
import glob
import hashlib
import math
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image

import fid
import train
from support.data import ImageData, load_batch
from tests.helpers import (
    HERE,
    Colors,
    command,
    content_of,
    covariance,
    float64,
    measured,
    mutated,
    named,
    on_ranks,
    outcome,
    photo,
    torchrun,
)


def test_reading_folders_and_zips(tmp_path):
    for name in ("cats/a.png", "dogs/deep/b.png", "cats/c.bmp"):
        path = tmp_path / "set" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed=len(name)).save(path)
    (tmp_path / "set" / "train" / "notes.txt").write_text("not an image")
    pictures = fid.ImageReader(tmp_path / "set")
    assert (
        pictures.classes == ["cats", "dogs"]
        and pictures.labels.tolist() == [0, 0, 1]
        and len(pictures) == 3
    )
    assert np.array_equal(pictures[0], np.asarray(photo(seed=10)))
    for part, names in (("1", ("cats/a.png",)), ("2", ("cats/c.bmp", "dogs/deep/b.png"))):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for name in names:
                file.write(tmp_path / "set" / "train" / name, f"root/{name}")
    zipped = fid.ImageReader(
        [tmp_path / "1.zip", tmp_path / "2.zip"]
    )  # one data set in several archives
    assert zipped.classes == pictures.classes and zipped.labels.tolist() == [0, 0, 1]
    assert all(np.array_equal(zipped[i], pictures[i]) for i in range(3))
    flat = fid.ImageReader(tmp_path / "set" / "train" / "cats")
    assert flat.labels is None and flat.classes is None and len(flat) == 2


def test_reading_arrays(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", x=x, y=np.array([0, 1, 1, 0, 2]), classes=np.array(["a", "b", "c"])
    )
    np.save(tmp_path / "b.npy", x[..., :1])
    labeled, plain = fid.ImageReader(tmp_path / "a.npz"), fid.ImageReader([tmp_path / "b.npy"])
    assert labeled.classes == ["a", "b", "c"] and labeled.labels.tolist() == [0, 1, 1, 0, 2]
    assert all(np.array_equal(labeled[i], x[i]) for i in range(5))
    assert plain.labels is None and np.array_equal(plain[3], x[3, :, :, :1].repeat(3, 2))
    assert isinstance(plain.sources[0][0], np.memmap) and isinstance(
        labeled.sources[0][0], np.memmap
    )
    for save, dtype in ((np.savez_compressed, "C"), (np.savez, "F")):  # these cannot be mapped
        save(tmp_path / "e.npz", arr_0=np.asarray(x, order=dtype), other=x)
        other = fid.ImageReader(tmp_path / "e.npz")
        assert not isinstance(other.sources[0][0], np.memmap) and all(
            np.array_equal(other[i], x[i]) for i in range(5)
        )
    np.savez(tmp_path / "c.npz", arr_0=x, y=np.array([0, 1, 0, 1, 0]), classes=np.array(["c", "d"]))
    both = fid.ImageReader(
        [tmp_path / "a.npz", tmp_path / "c.npz"]
    )  # labels go by the names of the classes
    assert both.classes == ["a", "b", "c", "d"] and both.labels.tolist() == [
        0,
        1,
        1,
        0,
        2,
        2,
        3,
        2,
        3,
        2,
    ]
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 3, 0, 1, 0]))
    assert fid.ImageReader(tmp_path / "d.npz").classes == ["0", "1", "2", "3"]
    for other in ("b.npy", "d.npz"):
        with pytest.raises(ValueError, match=named("y", "classes")):
            fid.ImageReader([tmp_path / "a.npz", tmp_path / other])


def test_images_of_every_mode_become_rgb_as_viewers_show_them(tmp_path):
    rgb = photo()
    gradient = np.linspace(0, 65535, 320).reshape(16, 20).astype(np.uint16)
    turned = rgb.getexif()
    turned[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    rgb.save(tmp_path / "exif.png", exif=turned)
    Image.fromarray(gradient).save(tmp_path / "16bit.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.quantize(16).save(tmp_path / "palette.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tiff")
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 0))
    alpha.save(tmp_path / "alpha.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    rgb.quantize(16).save(
        tmp_path / "animated.gif", save_all=True, append_images=[Image.new("P", rgb.size)] * 3
    )
    read = {
        name: fid.ImageReader(tmp_path)[i] for i, name in enumerate(sorted(os.listdir(tmp_path)))
    }
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in read.values())
    assert np.array_equal(read["exif.png"], np.rot90(np.asarray(rgb), -1))
    assert np.array_equal(read["16bit.png"][..., 0], (gradient / 257).round())
    assert np.array_equal(read["grey.png"][..., 1], np.asarray(rgb.convert("L")))
    assert np.array_equal(
        read["animated.gif"], np.asarray(rgb.quantize(16).convert("RGB"))
    )  # its first image
    assert np.array_equal(read["palette.png"], np.asarray(rgb.quantize(16).convert("RGB")))
    assert np.array_equal(read["cmyk.tiff"], np.asarray(rgb.convert("CMYK").convert("RGB")))
    assert (read["alpha.png"] == 255).all() and (abs(read["half.png"].astype(int) - 127) <= 1).all()


def test_unreadable_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"text, not an image")
    (tmp_path / "bad.zip").write_bytes(b"text, not an archive")
    np.savez(tmp_path / "float.npz", x=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    np.savez(
        tmp_path / "labels.npz",
        x=np.zeros((2, 4, 4, 3), np.uint8),
        y=np.array([0, 5]),
        classes=np.array(["a"]),
    )
    photo().save(tmp_path / ".hidden.png")
    (tmp_path / "hollow.zip").write_bytes(b"PK\5\6" + bytes(18))  # an archive of no files
    for name, message in (
        ("nowhere", "nowhere"),
        ("empty", "empty"),
        ("bad.zip", "bad.zip"),
        ("float.npz", "float64"),
        ("objects.npz", "objects.npz"),
        ("labels.npz", "labels.npz y"),
        ("hollow.zip", "hollow.zip"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named(*message.split())):
            fid.ImageReader(tmp_path / name)
    with pytest.raises(ValueError, match="broken.png"):
        fid.ImageReader(tmp_path / "bad")[0]


def test_broken_and_hidden_images(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args) or photo().im
    )
    for name, content in (
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\n"),
        ("zero.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
    photo().save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*")
    photo((99, 99)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "large.gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # 99 x 99 are more than twice as many
    names = sorted(os.listdir(tmp_path))
    for hidden in (".hidden.png", ".folder/a.png", "__MACOSX/._a.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / hidden)
    pictures = fid.ImageReader(tmp_path)
    assert [os.path.basename(file) for _, file in pictures.sources] == names
    for i, name in enumerate(names):
        if name == "large.gif":
            assert pictures[i].shape == (1, 1, 3)
        else:
            with pytest.raises(ValueError, match=rf"{re.escape(name)}\W+\w"):
                pictures[i]
    assert not started


@pytest.fixture(scope="session")
def inception():
    """Inception with random weights and norms that keep the signal at a size of about 1."""
    torch.manual_seed(0)
    net = fid.InceptionV3().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=(1.6 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1)
            module.running_mean.normal_(std=0.1)
            module.weight.uniform_(0.75, 1.25)
    return net


def public_weights(net):
    """The state of the net as the public file holds it, which does not count batches."""
    return {
        name: value
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def test_inception_has_the_keys_and_shapes_of_the_public_weights(inception):
    state = public_weights(inception)
    lines = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in state.items()))
    assert len(state) == 472 and sum(p.numel() for p in inception.parameters()) == 23_850_960
    assert tuple(state["Mixed_7c.branch3x3_2a.conv.weight"].shape) == (384, 384, 1, 3) and tuple(
        state["fc.weight"].shape
    ) == (1008, 2048)
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
    )  # that of pytorch-fid 0.3.0's network


def inception_by_hand(state, x):
    """Features of (B, 3, 299, 299) in [-1, 1] from the public weights, layer by layer."""

    def conv(x, name, stride=1, valid=False):
        weight = state[f"{name}.conv.weight"]
        padding = (0, 0) if valid or stride == 2 else (weight.shape[2] // 2, weight.shape[3] // 2)
        norm = [
            state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(F.conv2d(x, weight, None, stride, padding), *norm, eps=1e-3).relu()

    def chain(x, block, *names, stride=1):
        for name in names:
            x = conv(x, f"Mixed_{block}.{name}", stride if name == names[-1] else 1)
        return x

    def average(x):  # windows at the border are smaller
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", valid=True)
    x = F.max_pool2d(x, 3, 2)
    for block in ("5b", "5c", "5d"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch5x5_1", "branch5x5_2"),
                chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                chain(average(x), block, "branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, "6a", "branch3x3", stride=2),
            chain(x, "6a", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", stride=2),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block in ("6b", "6c", "6d", "6e"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                chain(x, block, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                chain(average(x), block, "branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, "7a", "branch3x3_1", "branch3x3_2", stride=2),
            chain(x, "7a", *(f"branch7x7x3_{i}" for i in range(1, 5)), stride=2),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block, pool in (("7b", average), ("7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single, double = (
            chain(x, block, "branch3x3_1"),
            chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2"),
        )
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(single, block, "branch3x3_2a"),
                chain(single, block, "branch3x3_2b"),
                chain(double, block, "branch3x3dbl_3a"),
                chain(double, block, "branch3x3dbl_3b"),
                chain(pool(x), block, "branch_pool"),
            ],
            1,
        )
    return x.mean((2, 3))


def test_inception_equals_the_network_written_by_hand(inception):
    x = torch.randint(
        0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = inception_by_hand(public_weights(inception), (x.float() - 128) / 128)
    features, logits = inception(x)
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert (logits - expected @ inception.fc.weight.T).norm() < 1e-5 * logits.norm()


def pooled_by_hand(x, padding, stride, pool):
    """pool over the 3 x 3 windows of (C, H, W), each without what lies outside of the image."""
    height, width = x.shape[1:]
    rows, columns = (range(-padding, size + padding - 2, stride) for size in (height, width))
    return torch.stack(
        [
            torch.stack(
                [pool(x[:, max(i, 0) : i + 3, max(j, 0) : j + 3].flatten(1)) for j in columns], 1
            )
            for i in rows
        ],
        1,
    )


@pytest.mark.parametrize(
    "name, padding, stride, pool",
    [
        *(
            (f"Mixed_{block}", 1, 1, lambda window: window.mean(1))
            for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")
        ),
        ("Mixed_7c", 1, 1, lambda window: window.amax(1)),
        ("Mixed_6a", 0, 2, lambda window: window.amax(1)),
        ("Mixed_7a", 0, 2, lambda window: window.amax(1)),
    ],
)
def test_pooling_of_inception(inception, name, padding, stride, pool):
    block, seen = getattr(inception, name), []
    channels = (
        block.branch3x3
        if name == "Mixed_6a"
        else block.branch3x3_1
        if name == "Mixed_7a"
        else block.branch1x1
    ).conv.in_channels
    x = (
        torch.randn(1, channels, 7, 5) - 1
    )  # below zero mostly: padding with zeros would show in a maximum, too
    with contextlib.ExitStack() as stack:
        if stride == 1:
            stack.callback(
                block.branch_pool.register_forward_pre_hook(
                    lambda module, inputs: seen.append(inputs[0])
                ).remove
            )
        output = block(x)
    expected = pooled_by_hand(x[0], padding, stride, pool)
    assert torch.allclose(seen[0][0] if stride == 1 else output[0, -channels:], expected, atol=1e-6)


def resized_by_loop(picture, out=299):
    """TensorFlow 1's bilinear resize of (H, W), pixel by pixel; coordinates in float32 as there."""
    result = np.zeros((out, out))
    scale = [np.float32(size) / np.float32(out) for size in picture.shape]
    for i in range(out):
        y = np.float32(i) * scale[0]
        top, bottom = int(y), min(int(y) + 1, picture.shape[0] - 1)
        for j in range(out):
            x = np.float32(j) * scale[1]
            left, right = int(x), min(int(x) + 1, picture.shape[1] - 1)
            upper, lower = (
                picture[row, left] + (picture[row, right] - picture[row, left]) * float(x - left)
                for row in (top, bottom)
            )
            result[i, j] = upper + (lower - upper) * float(y - top)
    return result


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (299, 299), (512, 512), (48, 300)])
def test_resize_equals_tensorflow(size):
    picture = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(picture)[None, None])[0, 0]
    assert (
        resized.dtype == torch.float32
        and np.abs(resized.numpy() - resized_by_loop(picture.astype(float))).max() < 1e-4
    )


def test_inception_folded_in_float32_equals_float64(inception):
    x = torch.randint(
        0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    folded = copy.deepcopy(inception).fold()
    with torch.no_grad():
        features, logits = copy.deepcopy(inception).double()(x.double())

        def off(a, b):
            return ((a - b).norm() / b.norm()).item()

        assert (
            features.dtype == float64
            and features.shape == (2, 2048)
            and logits.shape == (2, 1008)
            and features.std(0).mean() > 1e-3
        )
        for net in (inception, folded):
            assert off(net(x)[0], features) < 2e-6 and off(net(x)[1], logits) < 2e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert off(folded(x)[0], features) < 2e-6
        alone = torch.cat([folded(x[i : i + 1])[0] for i in range(2)])
        assert (
            off(alone, folded(x)[0]) < 1e-5
            and (alone - folded(x)[0]).abs().max() < 1e-5 * alone.abs().max()
        )
        many = x.repeat(1 + 2 * torch.get_num_threads(), 1, 1, 1)  # more than are computed at once
        assert off(folded(many)[0], alone.repeat(len(many) // 2, 1)) < 1e-5
        assert torch.allclose(features @ inception.fc.weight.double().T, logits)  # without the bias
    assert folded.state_dict().keys() != inception.state_dict().keys() and not any(
        p.requires_grad for p in folded.parameters()
    )


def test_other_weights_are_rejected_by_name(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(public_weights(inception), tmp_path / "right.pth")
    with open(tmp_path / "right.pth", "rb") as file:
        whole = file.read()
    (tmp_path / "truncated.pth").write_bytes(whole[:-1000])
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    public, digest = "pt_inception-2015-12-05-6726825d.pth", hashlib.sha256(whole).hexdigest()[:8]
    with pytest.raises(ValueError, match=named("right.pth", public, digest)):
        fid.load_inception(tmp_path / "right.pth")
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(whole).hexdigest()[:8])
    net = fid.load_inception(str(tmp_path / "right.pth"))
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.allclose(net(x)[0], inception(x)[0], rtol=1e-4, atol=1e-5)
    for name in ("truncated.pth", "code.pth"):
        with pytest.raises(ValueError, match=named(name, public)):
            fid.load_inception(tmp_path / name)
    monkeypatch.setattr(
        fid, "SHA256", ""
    )  # what is left then: no code is run, and every weight has its place
    with pytest.raises(pickle.UnpicklingError):
        fid.load_inception(tmp_path / "code.pth")
    torch.save(public_weights(inception) | dict(extra=torch.zeros(1)), tmp_path / "more.pth")
    with pytest.raises(RuntimeError, match="extra"):
        fid.load_inception(tmp_path / "more.pth")
    assert not os.path.exists("malicious")
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(whole).hexdigest()[:8])

    def no_network(url, file, prefix, progress):
        raise OSError("no network")

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError) as error:
        fid.load_inception()
    assert (
        fid.WEIGHTS in str(error.value)
        and str(tmp_path / "hub" / "checkpoints") in str(error.value)
        and "\n" not in str(error.value)
    )

    def download(url, file, prefix, progress):
        assert url == fid.WEIGHTS and prefix == fid.SHA256
        shutil.copy(tmp_path / "right.pth", file)

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", download)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])
    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])  # from the cache


class Malicious:
    def __reduce__(self):
        return open, ("malicious", "w")


def test_statistics_equal_numpy_for_any_batch_size():
    generator = torch.Generator().manual_seed(0)
    features, logits = (
        3 + torch.randn(103, 7, generator=generator) @ torch.randn(7, 7, generator=generator),
        torch.randn(103, 5, generator=generator),
    )
    splits, found = fid.is_splits(103), []
    for sizes in ((103,), (50, 53), (1,) * 103):
        statistics, other = fid.Statistics(), fid.Statistics()
        for i, rows in enumerate(torch.arange(103).split(sizes)):
            (other if i % 3 else statistics).update(features[rows], logits[rows], splits[rows])
        statistics.merge(other)
        found.append((*statistics.gaussian(), statistics.n, *statistics.inception_score()))
    x = features.double().numpy()
    for mu, sigma, n, *score in found:
        assert (
            n == 103
            and np.abs(mu - x.mean(0)).max() < 1e-12
            and np.abs(sigma - np.cov(x, rowvar=False)).max() < 1e-11
        )
        assert score == pytest.approx(fid.inception_score(logits), rel=1e-12)
    statistics = fid.Statistics()
    statistics.update(features[:1])
    with pytest.raises(ValueError, match=r"\b1\b"):
        statistics.gaussian()
    statistics.update(features * math.nan)
    with pytest.raises(ValueError, match="NaN"):
        statistics.gaussian()


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    mu, delta, (q, _) = (
        rng.standard_normal(30),
        rng.standard_normal(30),
        np.linalg.qr(rng.standard_normal((30, 30))),
    )
    for rank in (30, 11, 0):
        sigma = covariance(30, rank, 1)
        assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(
            0, abs=1e-12 * (1 + np.trace(sigma))
        )
        assert fid.frechet_distance(mu, sigma, mu + delta, sigma) == pytest.approx(
            delta @ delta, rel=1e-12
        )
        assert fid.frechet_distance(mu, sigma, mu, 0 * sigma) == pytest.approx(
            np.trace(sigma), rel=1e-12
        )
        a, b = rng.uniform(0, 2, 30), rng.uniform(0, 2, 30)
        a[rank:], b[: 30 - rank] = (
            0,
            0,
        )  # covariances that commute: sum (sqrt a - sqrt b)^2, also where both are singular in part
        expected = ((a**0.5 - b**0.5) ** 2).sum()
        assert fid.frechet_distance(mu, q * a @ q.T, mu, q * b @ q.T) == pytest.approx(
            expected, rel=1e-6
        )
    for bad in (
        (mu[:3], sigma, mu, sigma),
        (mu[:3], sigma[:3, :3], mu, sigma),
        (mu * math.nan, sigma, mu, sigma),
        (mu, sigma, mu, sigma + math.inf),
    ):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


@pytest.mark.parametrize(
    "ranks",
    [(60, 60, 60), (60, 60, 20), (60, 20, 60), (60, 20, 35), (200, 150, 200), (200, 70, 130)],
)  # 200: Cholesky's in blocks
def test_frechet_distance_equals_sqrtm(ranks):
    dim, *ranks = ranks
    a, b = (covariance(dim, rank, seed) for seed, rank in enumerate(ranks))
    distance = fid.frechet_distance(np.zeros(dim), a, np.ones(dim), b)
    root = scipy.linalg.sqrtm(a @ b)  # complex by rounding where a covariance is singular
    assert isinstance(distance, float) and distance == pytest.approx(
        dim + np.trace(a) + np.trace(b) - 2 * np.trace(root).real, rel=1e-6
    )
    assert distance == fid.frechet_distance(torch.zeros(dim), torch.from_numpy(a), np.ones(dim), b)


def test_inception_score_of_known_distributions():
    assert fid.inception_score(torch.randn(1, 9).repeat(200, 1)) == pytest.approx(
        (1, 0), abs=1e-9
    )  # no image tells anything
    label, split = torch.arange(1000) % 5, fid.is_splits(1000)
    shares = (
        torch.stack([label[split == i].bincount(minlength=5) for i in range(10)]) / 100
    )  # five classes, each sure: exp of the entropy of the shares
    scores = torch.exp(-torch.xlogy(shares, shares).sum(1))
    assert (
        fid.inception_score(1e4 * torch.eye(5)[label])
        == pytest.approx((scores.mean().item(), scores.std(correction=0).item()), rel=1e-5)
        and scores.mean() > 4.9
    )
    logits, scores = torch.randn(105, 6, generator=torch.Generator().manual_seed(0)), []
    for i in range(10):  # as the definition goes
        p = (
            logits.double()
            .softmax(1)
            .numpy()[np.random.RandomState(2020).permutation(105)][
                i * 105 // 10 : (i + 1) * 105 // 10
            ]
        )
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert fid.inception_score(logits) == pytest.approx(
        (np.mean(scores), np.std(scores)), rel=1e-12
    )
    assert fid.inception_score(logits + 1000) == pytest.approx(
        fid.inception_score(logits), rel=1e-4
    )  # stable


def test_precision_and_recall_of_known_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    inner = torch.cartesian_prod(torch.arange(2.0, 7), torch.arange(2.0, 7)) + 0.25
    assert fid.precision_recall(grid, grid) == (1, 1) and fid.precision_recall(
        grid, grid + 100
    ) == (0, 0)
    # Third neighbors of a square grid are at 1, at the corners at sqrt 2: the inner set lies in the
    # outer one, and covers what is within.
    covered = (torch.cdist(grid, inner) <= torch.cdist(inner, inner).sort(1).values[:, 3]).any(1)
    assert (
        fid.precision_recall(grid, inner, block=7) == (1, covered.double().mean().item())
        and 0.25 <= covered.double().mean() < 0.5
    )
    assert fid.precision_recall(inner, grid, block=1000)[::-1] == fid.precision_recall(grid, inner)
    line = torch.tensor([[0.0], [1], [3], [6], [10]])  # to the third neighbors: 6, 5, 3, 5, 9
    assert fid.precision_recall(line, torch.tensor([[-6.0], [-6.5], [19], [19.5]])) == (0.5, 1)
    with pytest.raises(ValueError, match=r"\b100\b.*\b3\b"):
        fid.precision_recall(grid, grid[:3])


def test_fid_command_on_every_kind_of_data(sets, tmp_path):
    x, y = np.load(sets / "real.npy"), np.load(sets / "fake.npz")["arr_0"]
    features = [Colors()(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in (x, y)]
    gaussians = [(f.numpy().mean(0), np.cov(f.numpy(), rowvar=False)) for f, _ in features]
    distance = fid.frechet_distance(*gaussians[0], *gaussians[1])
    for real in ("real", "real.zip", "real.npz", "real.npy"):
        lines, progress = measured(
            sets / real,
            sets / "fake.npz",
            "--features tests.helpers:Colors --pr --batch 7 --save-stats",
            tmp_path / f"{real}.stats.npz",
        )
        assert f"{real}.stats.npz" in lines.pop(1)
        for line, path, n in ((lines[0], sets / real, 40), (lines[1], sets / "fake.npz", 30)):
            assert line.startswith(f"{path}: ") and line.endswith(f"N = {n}")
        assert re.search(r"\b40\b\D+\b40\b", progress)
        assert lines[2].startswith(f"FD-Colors {distance:.4f} ")
        assert re.search(named(sets / "fake.npz", sets / real), lines[2]) and "10,000" in lines[3]
        score = fid.inception_score(features[1][1])
        assert re.match(r"IS-Colors {:.4f}\D+{:.4f}\b".format(*score), lines[4])
        pair = fid.precision_recall(features[0][0].float(), features[1][0].float())
        assert re.match(r"precision {:.4f}\D+recall {:.4f}\D+3\D+40\D+30\b".format(*pair), lines[5])
        with np.load(tmp_path / f"{real}.stats.npz") as data:
            assert (
                np.abs(data["mu"] - gaussians[0][0]).max() < 1e-9
                and np.abs(data["sigma"] - gaussians[0][1]).max() < 1e-9
                and data["n"] == 40
            )
    assert measured(
        tmp_path / "real.stats.npz", sets / "fake.npz", "--features tests.helpers:Colors"
    )[0][1:3] == [
        lines[1],
        lines[2].replace(str(sets / "real.npy"), str(tmp_path / "real.stats.npz")),
    ]
    lines, _ = measured(
        tmp_path / "real.stats.npz", tmp_path / "real.zip.stats.npz"
    )  # needs no network, and knows which it was
    assert (
        lines[2].startswith("FD-Colors 0.0000")
        and re.search(named("Inception", tmp_path / "real.zip.stats.npz"), lines[4])
        and len(lines) == 5
    )
    lines, _ = measured(sets / "real", sets / "fake.npz", "--features tests.helpers:Plain")
    assert lines[2].startswith(f"FD-Plain {distance:.4f}") and len(lines) == 4
    only, _ = measured(
        sets / "real", "--features tests.helpers:Plain --save-stats", tmp_path / "only.npz"
    )
    assert len(only) == 2 and "only.npz" in only[1]


def test_fid_reads_published_statistics_and_prefers_them(sets, tmp_path, inception, monkeypatch):
    torch.save(public_weights(inception), tmp_path / "weights.pth")
    monkeypatch.setattr(fid, "SHA256", "")
    weights = ["--weights", tmp_path / "weights.pth"]
    small = tmp_path / "small.npz"
    np.savez(small, arr_0=np.load(sets / "fake.npz")["arr_0"][:5])
    np.savez(
        tmp_path / "other.npz",
        mu=np.zeros(2048),
        sigma=np.zeros((2048, 2048)),
        arr_0=np.load(sets / "real.npz")["arr_0"][:6],
    )
    lines, _ = measured(tmp_path / "other.npz", small, *weights, "--pr --selftest")
    features = fid.extract(
        fid.load_inception(tmp_path / "weights.pth"),
        torch.from_numpy(np.load(small)["arr_0"]).permute(0, 3, 1, 2),
    )[0].double()
    expected = (features.mean(0) ** 2).sum() + features.var(
        0
    ).sum()  # against a point at the origin
    assert re.match(rf"{tmp_path / 'other.npz'}: .*\bmu\b.*\bsigma\b.*N = \D+$", lines[0])
    assert lines[2].startswith("FID ") and float(lines[2].split()[1]) == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert (
        "3.1508" in lines[3]
        and lines[5].startswith("Inception Score 1.0")
        and re.search(r"\b6\b\D+\b5\b", lines[6])
    )
    (tmp_path / "mixed").mkdir()
    for i, size in enumerate(((20, 16), (16, 20), (20, 16))):
        photo(size, i).save(tmp_path / "mixed" / f"{i}.png")
    np.savez(tmp_path / "alike.npz", arr_0=np.stack([photo((20, 16), i) for i in (0, 2)]))
    statistics = [
        fid.measure(
            fid.ImageReader(tmp_path / name),
            fid.load_inception(tmp_path / "weights.pth"),
            keep=True,
        )
        for name in ("mixed", "alike.npz")
    ]
    mixed, alike = (torch.cat(part.kept) for part in statistics)
    order = torch.cdist(alike, mixed).argmin(1)
    assert (mixed[order] - alike).norm() < 1e-5 * alike.norm() and torch.cdist(
        mixed, mixed
    ).fill_diagonal_(1).min() > 1e-2
    mixed, alike = (
        fid.measure(fid.ImageReader(tmp_path / name), Colors()).moments
        for name in ("mixed", "alike.npz")
    )  # other networks get them as they are
    other = fid.Statistics()
    other.update(Colors()(torch.from_numpy(np.array(photo((16, 20), 1))).permute(2, 0, 1)[None])[0])
    assert torch.allclose(mixed, alike + other.moments)


def test_fid_of_images_resized_as_for_training(sets, tmp_path):
    options = ["--features tests.helpers:Colors --save-stats"]
    measured(sets / "real", "--res 8", *options, tmp_path / "a.npz")
    x, _ = load_batch(ImageData([sets / "real"], 8), range(40))
    np.savez(tmp_path / "small.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    measured(tmp_path / "small.npz", *options, tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert all(np.abs(a[key] - b[key]).max() < 1e-12 for key in ("mu", "sigma", "n"))


def test_bad_images_stop_fid_or_are_skipped_and_counted(sets, tmp_path):
    shutil.copytree(sets / "real", tmp_path / "real")
    (tmp_path / "real" / "broken.png").write_bytes(b"text, not an image")
    (tmp_path / "real" / "empty.jpg").write_bytes(b"")
    options = ["--features tests.helpers:Colors --batch 9"]
    with pytest.raises(ValueError, match="broken.png"):
        measured(tmp_path / "real", sets / "fake.npz", *options)
    lines, progress = measured(tmp_path / "real", sets / "fake.npz", *options, "--skip-bad")
    assert (
        re.search(r"N = 40\D+2\b", lines[0])
        and "broken.png" in progress
        and "empty.jpg" in progress
    )
    assert (
        lines[2].split()[1] == measured(sets / "real", sets / "fake.npz", *options)[0][2].split()[1]
    )


def test_bad_input_of_fid(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, math.nan), sigma=np.eye(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(
        tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3), features="tests.helpers:Colors"
    )
    np.savez(tmp_path / "pickled.npz", mu=np.array([Malicious()], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 and no archive")
    np.savez(tmp_path / "keys.npz", other=np.zeros(1))
    np.savez(
        tmp_path / "both.npz",
        mu=np.zeros(3),
        sigma=np.eye(3),
        arr_0=np.zeros((2, 8, 8, 3), np.uint8),
    )
    real, colors = str(sets / "real.npz"), ["--features tests.helpers:Colors"]
    for args, expected in (
        ([tmp_path / "nan.npz", real], "nan.npz NaN"),
        ([tmp_path / "shape.npz", real], "shape.npz mu (3,)"),
        (
            [tmp_path / "three.npz", real],
            "three.npz tests.helpers:Colors Inception-2015-12-05",
        ),
        ([tmp_path / "pickled.npz", real], "pickled.npz"),
        ([tmp_path / "three.npz", real, "--pr", *colors], "--pr three.npz"),
        ([tmp_path / "three.npz", real, *colors], "3 9"),
        (
            [tmp_path / "one.npz", real, *colors],
            "one.npz 1",
        ),
        ([tmp_path / "broken.npz", real, *colors], "broken.npz"),
        ([tmp_path / "nowhere", real, *colors], "nowhere"),
        ([real], "--save-stats"),
        ([real, real, "--features tests.helpers:None"], "tests.helpers:None"),
        ([real, real, "--features nowhere:Net"], "nowhere"),
        ([real, tmp_path / "nowhere"], "nowhere"),
        ([real, real, "--batch 0"], "--batch"),
        ([real, "--save-stats stats"], "--save-stats stats .npz"),
        ([real, "--save-stats", real], "--save-stats real.npz"),
        ([real, "--save-stats", tmp_path / "both.npz"], "--save-stats both.npz"),
        ([real, "--save-stats nowhere/stats.npz"], "nowhere/stats.npz"),
        ([tmp_path / "keys.npz", real], "keys.npz other"),
        ([real, real, "--selftest", *colors], "--selftest"),
        ([real, real, "--weights", tmp_path / "nowhere.pth"], "nowhere.pth"),
        ([real, real, "--weights", real], "real.npz pt_inception-2015-12-05-6726825d.pth"),
        ([real, real, "--device cuda"], "--device cuda"),
        ([real, real, "--sigma"], "--sigma"),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            measured(*args)
        assert re.search(named(*expected.split()), str(error.value)), args
    assert not os.path.exists("malicious")
    for args, expected in (
        ([tmp_path / "nan.npz", real], "fid.py nan.npz"),
        ([real, real, "--batch x"], "--batch"),
    ):
        result = command(f"{HERE}/fid.py", *args, cwd=tmp_path)
        assert (
            result.returncode != 0
            and len(result.stderr.strip().splitlines()) == 1
            and re.search(named(*expected.split()), result.stderr)
        ), result.stderr


class ResNet56(nn.Module):
    """The 64 features of a CIFAR-10 classifier (arXiv 1512.03385, shortcuts A).

    The weights are those in ../shared/data; it is called as fid.InceptionV3 is.
    """

    weights = os.path.join(HERE, "..", "shared", "data", "resnet56-4bfd9763.th")

    def __init__(self):
        super().__init__()
        state = torch.load(self.weights, map_location="cpu", weights_only=True)["state_dict"]
        self.state = {name.removeprefix("module."): value for name, value in state.items()}

    def conv(self, x, name, number, stride=1):
        norm = [
            self.state[f"{name}bn{number}.{key}"]
            for key in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(
            F.conv2d(x, self.state[f"{name}conv{number}.weight"], None, stride, 1), *norm
        )

    def forward(self, x):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        x = self.conv(
            ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last), "", 1
        ).relu()
        for layer in (1, 2, 3):
            for block in range(9):
                name, stride = f"layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1
                shortcut = (
                    F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                    if stride == 2
                    else x
                )
                x = (self.conv(self.conv(x, name, 1, stride).relu(), name, 2) + shortcut).relu()
        features = x.mean((2, 3))
        return features, F.linear(features, self.state["linear.weight"], self.state["linear.bias"])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists(ResNet56.weights),
    reason="the weights of ResNet-56 are not in ../shared/data",
)
def test_distance_in_features_of_resnet56_rises_with_noise(tmp_path):
    folder, n = os.path.dirname(ResNet56.weights), 1000
    test, labels = (np.load(f"{folder}/cifar10_test.npz")[key][:n] for key in ("x", "y"))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", arr_0=test)
    measured(
        tmp_path / "test.npz",
        "--features tests.test_fid:ResNet56 --save-stats",
        tmp_path / "stats.npz",
        "--batch 200",
    )
    np.savez(tmp_path / "train.npz", arr_0=np.load(f"{folder}/cifar10_train_0of3.npz")["x"][:n])
    for std in (5, 10, 20):
        np.savez(
            tmp_path / f"{std}.npz",
            arr_0=(test + std * rng.standard_normal(test.shape))
            .round()
            .clip(0, 255)
            .astype(np.uint8),
        )
    found = []
    for name in ("train", "5", "10", "20"):
        lines, _ = measured(
            tmp_path / "stats.npz",
            tmp_path / f"{name}.npz",
            "--features tests.test_fid:ResNet56 --batch 200",
        )
        assert lines[2].startswith("FD-ResNet56 ") and lines[4].startswith("IS-ResNet56 ")
        found.append(float(lines[2].split()[1]))
    print(
        f"FD-ResNet56 of 1,000 test images: against 1,000 training ones {found[0]}, "
        f"against themselves with noise of 5, 10, 20 gray levels {found[1:]}"
    )
    assert 0 < found[0] < found[1] < found[2] < found[3]
    with torch.no_grad():
        logits = ResNet56()(torch.from_numpy(test[:500]).permute(0, 3, 1, 2))[1]
    assert (
        logits.argmax(1).numpy() == labels[:500]
    ).mean() > 0.9  # it is the network that it should be


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one(sets, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("0", "2"):  # the first of two ranks gets no image of this folder
        (tmp_path / "bad" / f"{name}.png").write_bytes(b"not an image")
    for name in ("1", "3"):
        photo(seed=int(name)).save(tmp_path / "bad" / f"{name}.png")
    for real in (sets / "real", tmp_path / "bad"):
        options = [
            real,
            sets / "fake.npz",
            "--features tests.helpers:Colors --batch 4 --skip-bad --device cpu",
        ]
        options += ["--pr"] if real.name == "real" else []
        lines, _ = measured(*options, "--save-stats", f"{tmp_path}/one.npz")
        statuses, output, errors = on_ranks(
            fid.main, *options, "--save-stats two.npz", cwd=tmp_path
        )
        assert statuses == [0, 0], errors
        assert len(lines) == len(output.splitlines())
        assert [line for line in output.splitlines() if "two.npz" not in line] == [
            line for line in lines if "one.npz" not in line
        ]
        one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
        assert all(np.abs(one[key] - two[key]).max() < 1e-9 for key in ("mu", "sigma", "n"))
    offline = os.environ | dict(TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")
    for options, expected in (
        (["--features tests.helpers:Colors"], f"{tmp_path}/bad/"),
        ([], fid.WEIGHTS),
    ):
        with torchrun(
            f"{HERE}/fid.py",
            tmp_path / "bad",
            sets / "fake.npz",
            *options,
            cwd=tmp_path,
            env=offline,
        ) as process:
            _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.splitlines() if line.startswith("fid.py")]
        assert (
            process.returncode != 0
            and sum(expected in line for line in lines) == 1
            and len(lines) <= 2
        ), errors


def test_cyclic_links_and_unreadable_folders(tmp_path):
    photo().save(tmp_path / "a.png")
    for name in ("x", "y"):
        os.symlink(tmp_path, tmp_path / name)  # 2^40 paths, if followed
    assert len(fid.ImageReader(tmp_path)) == 1

    def closed(path, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "closed"))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PermissionError, match="closed"):
        patch.setattr(fid.os, "walk", closed)  # root may enter all
        fid.ImageReader(tmp_path)


def test_mutated_images_and_arrays_give_one_line_or_success(sets, outcomes):
    random = np.random.default_rng(0)

    def tries(name, number, *commands):
        content = content_of(name)
        for i in range(number + 1):
            with open(name, "wb") as file:
                file.write(mutated(content, random) if i else content)
            fid._archive.cache_clear()
            for main, *args in commands:
                line = outcome(main, args)
                outcomes[name].append(line)
                assert os.path.exists("out.npz") == (not line) and (i or not line), (name, i, line)
                for file in glob.glob("out.npz*"):
                    os.remove(file)

    def measure(data):
        return (
            fid.main,
            data,
            "--features",
            "tests.helpers:Colors",
            "--save-stats",
            "out.npz",
            "--device",
            "cpu",
        )

    os.mkdir("one")
    photo().save("one/a.png")
    for extension in ("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm", "tga", "jp2", "avif"):
        name = f"one/b.{extension}"
        photo((40, 30)).save(name)
        tries(
            name,
            20,
            measure("one"),
            (train.main, "--data", "one", "--res", "8", "--skip-bad", "--pack", "out.npz"),
        )
        os.remove(name)
    with zipfile.ZipFile("set.zip", "w") as archive:
        for i in range(3):
            archive.write(
                "one/a.png", f"{i % 2}/{i}.png", zipfile.ZIP_DEFLATED if i else zipfile.ZIP_STORED
            )
    tries("set.zip", 80, measure("set.zip"))
    arrays = dict(
        x=np.asarray(photo((32, 32)))[None].repeat(5, 0),
        y=np.arange(5),
        classes=["a", "b", "c", "d", "e"],
    )
    np.savez("a.npz", **arrays)
    np.savez_compressed("b.npz", **arrays)
    np.save("c.npy", arrays["x"])
    for name in ("a.npz", "b.npz", "c.npy"):
        tries(
            name, 40, measure(name), (train.main, "--data", name, "--res", "8", "--pack", "out.npz")
        )
    np.savez("d.npz", mu=np.zeros(9), sigma=np.eye(9), n=5, features="tests.helpers:Colors")
    tries(
        "d.npz",
        60,
        (fid.main, "d.npz", "--features", "tests.helpers:Colors", "--save-stats", "out.npz"),
    )
    errors = {name: len(lines) - lines.count("") for name, lines in outcomes.items()}
    assert sum(errors.values()) < 0.9 * sum(map(len, outcomes.values())) and all(
        errors[name] > 5 for name in ("set.zip", "a.npz", "b.npz", "c.npy", "d.npz")
    ), errors


def test_hidden_folders_and_duplicate_class_names(tmp_path):
    for i in range(8):
        (tmp_path / str(i) / ".store" / "horse").mkdir(parents=True)
        photo().save(tmp_path / str(i) / ".store" / "horse" / "a.png")
        for name in ("horse", f"z{i}", f"a{i}"):  # whatever order the disk lists them in
            os.symlink(".store/horse", tmp_path / str(i) / name)
        pictures = fid.ImageReader(tmp_path / str(i))
        assert len(pictures) == 1 and pictures.sources[0][1].split("/")[-2] == f"a{i}"
    np.savez(
        tmp_path / "twice.npz",
        x=np.zeros((4, 8, 8, 3), np.uint8),
        y=np.arange(4),
        classes=["a", "crane", "b", "crane"],
    )
    with pytest.raises(ValueError, match=named("twice.npz", "classes")):
        fid.ImageReader(tmp_path / "twice.npz")
