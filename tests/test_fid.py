"""Tests of fid.py: reading images, the network, statistics, and the command."""

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
from docs.cifar import WEIGHTS, ResNet56
from support.data import ImageData, load_batch
from tests.helpers import (
    HERE,
    Colors,
    command,
    content_of,
    covariance,
    float64,
    growth_of_a_worker,
    measured,
    mutated,
    named,
    on_ranks,
    outcome,
    photo,
    torchrun,
)

# ---------------------------------------------------------------- reading images


def test_reading_folders_and_zips(tmp_path):
    # The class of an image is its folder below set/train.
    train_folder = tmp_path / "set" / "train"
    for seed, name in enumerate(("cats/a.png", "cats/c.bmp", "dogs/deep/b.png")):
        path = train_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed=seed).save(path)
    (train_folder / "notes.txt").write_text("not an image")
    images = fid.ImageReader(tmp_path / "set")
    assert images.classes == ["cats", "dogs"]
    assert images.labels.tolist() == [0, 0, 1]
    assert len(images) == 3
    for i in range(3):
        assert np.array_equal(images[i], np.asarray(photo(seed=i)))

    # One dataset in two archives.
    for part, names in (("1", ("cats/a.png",)), ("2", ("cats/c.bmp", "dogs/deep/b.png"))):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for name in names:
                file.write(train_folder / name, f"root/{name}")
    zipped = fid.ImageReader([tmp_path / "1.zip", tmp_path / "2.zip"])
    assert zipped.classes == images.classes
    assert zipped.labels.tolist() == [0, 0, 1]
    for i in range(3):
        assert np.array_equal(zipped[i], images[i])

    # A folder without subfolders has no labels.
    flat = fid.ImageReader(train_folder / "cats")
    assert flat.labels is None
    assert flat.classes is None
    assert len(flat) == 2


# Five images of random pixels, as arrays store them.
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)


def write_labeled(path):
    """Write PIXELS to an .npz file, with labels of three classes."""
    np.savez(path, x=PIXELS, y=np.array([0, 1, 1, 0, 2]), classes=np.array(["a", "b", "c"]))


def test_reading_arrays(tmp_path):
    write_labeled(tmp_path / "a.npz")
    labeled = fid.ImageReader(tmp_path / "a.npz")
    assert labeled.classes == ["a", "b", "c"]
    assert labeled.labels.tolist() == [0, 1, 1, 0, 2]
    for i in range(5):
        assert np.array_equal(labeled[i], PIXELS[i])
    assert isinstance(labeled.sources[0][0], np.memmap)

    # The one channel of gray images is repeated.
    np.save(tmp_path / "b.npy", PIXELS[..., :1])
    plain = fid.ImageReader([tmp_path / "b.npy"])
    assert plain.labels is None
    assert np.array_equal(plain[3], PIXELS[3, :, :, :1].repeat(3, 2))
    assert isinstance(plain.sources[0][0], np.memmap)


@pytest.mark.parametrize("save, order", [(np.savez_compressed, "C"), (np.savez, "F")])
def test_arrays_that_cannot_be_mapped_are_loaded(save, order, tmp_path):
    save(tmp_path / "e.npz", arr_0=np.asarray(PIXELS, order=order), other=PIXELS)
    images = fid.ImageReader(tmp_path / "e.npz")
    assert not isinstance(images.sources[0][0], np.memmap)
    for i in range(5):
        assert np.array_equal(images[i], PIXELS[i])


def test_labels_of_several_arrays(tmp_path):
    # The names of the classes decide, not their numbers.
    write_labeled(tmp_path / "a.npz")
    y = np.array([0, 1, 0, 1, 0])
    np.savez(tmp_path / "c.npz", arr_0=PIXELS, y=y, classes=np.array(["c", "d"]))
    both = fid.ImageReader([tmp_path / "a.npz", tmp_path / "c.npz"])
    assert both.classes == ["a", "b", "c", "d"]
    assert both.labels.tolist() == [0, 1, 1, 0, 2] + [2, 3, 2, 3, 2]

    # Without names, all numbers up to the largest are classes.
    np.savez(tmp_path / "d.npz", x=PIXELS, y=np.array([0, 3, 0, 1, 0]))
    assert fid.ImageReader(tmp_path / "d.npz").classes == ["0", "1", "2", "3"]

    # Files with and without labels, or with and without names, do not mix.
    np.save(tmp_path / "b.npy", PIXELS[..., :1])
    for other in ("b.npy", "d.npz"):
        with pytest.raises(ValueError, match=named("y", "classes")):
            fid.ImageReader([tmp_path / "a.npz", tmp_path / other])


def test_images_of_every_mode_become_rgb_as_viewers_show_them(tmp_path):
    rgb = photo()

    # The camera was turned: viewers rotate the image by 90 degrees clockwise.
    turned = rgb.getexif()
    turned[0x0112] = 6
    rgb.save(tmp_path / "exif.png", exif=turned)

    gradient = np.linspace(0, 65535, 320).reshape(16, 20).astype(np.uint16)
    Image.fromarray(gradient).save(tmp_path / "16bit.png")
    gray = rgb.convert("L")
    gray.save(tmp_path / "gray.png")
    palette = rgb.quantize(16)
    palette.save(tmp_path / "palette.png")
    cmyk = rgb.convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tiff")
    later_frames = [Image.new("P", rgb.size)] * 3
    palette.save(tmp_path / "animated.gif", save_all=True, append_images=later_frames)

    # A transparent image, and black that is half transparent.
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 0))
    alpha.save(tmp_path / "alpha.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")

    images = fid.ImageReader(tmp_path)
    read = {name: images[i] for i, name in enumerate(sorted(os.listdir(tmp_path)))}
    for name, image in read.items():
        assert image.dtype == np.uint8, name
        assert image.shape[2] == 3, name
    assert np.array_equal(read["exif.png"], np.rot90(np.asarray(rgb), -1))
    assert np.array_equal(read["16bit.png"][..., 0], (gradient / 257).round())
    assert np.array_equal(read["gray.png"][..., 1], np.asarray(gray))
    assert np.array_equal(read["palette.png"], np.asarray(palette.convert("RGB")))
    assert np.array_equal(read["cmyk.tiff"], np.asarray(cmyk.convert("RGB")))

    # Of an animation, the first frame is read.
    assert np.array_equal(read["animated.gif"], np.asarray(palette.convert("RGB")))

    # The background of transparent images is white.
    assert (read["alpha.png"] == 255).all()
    assert (abs(read["half.png"].astype(int) - 127) <= 1).all()


def test_unreadable_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"text, not an image")
    (tmp_path / "bad.zip").write_bytes(b"text, not an archive")
    np.savez(tmp_path / "float.npz", x=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "labels.npz", x=images, y=np.array([0, 5]), classes=np.array(["a"]))
    photo().save(tmp_path / ".hidden.png")

    # A zip archive without files consists of its end record.
    (tmp_path / "hollow.zip").write_bytes(b"PK\5\6" + bytes(18))

    for name, words in (
        ("nowhere", "nowhere"),
        ("empty", "empty"),
        ("bad.zip", "bad.zip"),
        ("float.npz", "float64"),
        ("objects.npz", "objects.npz"),
        ("labels.npz", "labels.npz y"),
        ("hollow.zip", "hollow.zip"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named(*words.split())):
            fid.ImageReader(tmp_path / name)
    with pytest.raises(ValueError, match="broken.png"):
        fid.ImageReader(tmp_path / "bad")[0]


def test_broken_and_hidden_images(tmp_path, monkeypatch):
    started = []

    def ghostscript(*args, **options):
        started.append(args)
        return photo().im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)

    # An EPS file with another extension, an empty file, and damaged metadata.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\n"
    (tmp_path / "program.png").write_bytes(eps)
    (tmp_path / "zero.png").write_bytes(b"")
    photo().save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*")

    # Pillow rejects images of more than twice MAX_IMAGE_PIXELS: here, 99 x 99 pixels.
    photo((99, 99)).save(tmp_path / "large.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)

    # A file that was not copied to its end.
    photo((40, 40)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])

    # The only readable image.
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "readable.gif")

    # Hidden files and folders are not listed.
    names = sorted(os.listdir(tmp_path))
    for hidden in (".hidden.png", ".folder/a.png", "__MACOSX/._a.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / hidden)
    images = fid.ImageReader(tmp_path)
    assert [os.path.basename(file) for _, file in images.sources] == names

    # The errors name the file and a reason. EPS does not start Ghostscript.
    for i, name in enumerate(names):
        if name == "readable.gif":
            assert images[i].shape == (1, 1, 3)
        else:
            with pytest.raises(ValueError, match=rf"{re.escape(name)}\W+\w"):
                images[i]
    assert not started


def test_a_replaced_zip_file_is_read_again(tmp_path):
    path = tmp_path / "samples.zip"
    images = []
    for seed in range(2):
        photo((16, 20), seed).save(tmp_path / "image.png")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "image.png", "image.png")
        images.append(fid.ImageReader(path)[0])
        assert np.array_equal(images[seed], np.array(photo((16, 20), seed)))
    assert not np.array_equal(*images)


def test_no_paths_are_an_error():
    for function in (fid.ImageReader, lambda paths: fid.fid(paths, paths)):
        with pytest.raises(ValueError, match="no paths"):
            function([])


def test_cyclic_links_are_followed_once(tmp_path):
    photo().save(tmp_path / "a.png")

    # Two links to the folder that contains them: 2^40 paths, if all were followed.
    for name in ("x", "y"):
        os.symlink(tmp_path, tmp_path / name)
    assert len(fid.ImageReader(tmp_path)) == 1


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    # The superuser may enter every folder, so os.walk is replaced.
    def closed(path, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "closed"))

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="closed"):
        patch.setattr(fid.os, "walk", closed)
        fid.ImageReader(tmp_path)


def test_links_to_the_same_hidden_folder_count_once(tmp_path):
    # The first name counts, in whatever order the disk lists them.
    for i in range(8):
        folder = tmp_path / str(i)
        (folder / ".store" / "horse").mkdir(parents=True)
        photo().save(folder / ".store" / "horse" / "a.png")
        for name in ("horse", f"z{i}", f"a{i}"):
            os.symlink(".store/horse", folder / name)
        images = fid.ImageReader(folder)
        assert len(images) == 1
        assert images.sources[0][1].split("/")[-2] == f"a{i}"


def folders_with(root, *folders):
    """Make folders, each with one image."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        photo(seed=i).save(root / folder / f"{i}.png")


@pytest.mark.parametrize(
    ("folders", "chosen"),
    [
        (["train/cat", "train/dog", "val/cat", "val/dog"], "train"),
        (["Training/cat", "Test/cat"], "Training"),
        # The test images of ImageNet have no class folders.
        (["data/train/cat", "data/train/dog", "data/validation", "data/test"], "data/train"),
        (["valid", "test"], "test"),
    ],
)
def test_splits_are_not_classes(tmp_path, folders, chosen):
    root = tmp_path / "imagenet"
    folders_with(root, *folders)
    with pytest.raises(ValueError, match=named(f"{root}/{chosen}")) as error:
        fid.ImageReader(root)
    assert "\n" not in str(error.value)

    # The same in an archive, which has no folder to name.
    shutil.make_archive(root, "zip", root)
    with pytest.raises(ValueError, match=named("imagenet.zip", os.path.basename(chosen))):
        fid.ImageReader(f"{root}.zip")

    # A named folder is accepted, and so are several.
    assert len(fid.ImageReader(root / chosen)) >= 1
    assert len(fid.ImageReader([root / folder for folder in folders])) == len(folders)


def test_classes_may_have_the_name_of_a_split(tmp_path, capsys):
    # A locomotive, and one split alone.
    folders_with(tmp_path / "vehicles", "train", "car", "bus")
    assert fid.ImageReader(tmp_path / "vehicles").classes == ["bus", "car", "train"]
    folders_with(tmp_path / "one", "train/cat", "train/dog")
    assert fid.ImageReader(tmp_path / "one").classes == ["cat", "dog"]
    assert not capsys.readouterr().err

    # Splits beside other images are read, with a note.
    folders_with(tmp_path / "mixed", "train", "val", ".", "more")
    assert len(fid.ImageReader(tmp_path / "mixed")) == 4
    assert re.search(named("note", "mixed", "train", "val"), capsys.readouterr().err)


def test_the_command_refuses_splits(tmp_path, outcomes):
    folders_with(tmp_path / "imagenet", "train/cat", "val/cat")
    line = outcome(fid.main, ["imagenet", "--features tests.helpers:Colors --save-stats stats.npz"])
    assert re.search(named("imagenet/train"), line)
    assert not os.path.exists("stats.npz")


# Names as in ImageNet. No such files exist: they are listed and never read.
def many_names():
    return [f"n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(300_000)]


def many_images(folder):
    """A reader of these images."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fid, "images_in_folder", lambda folder: sorted(many_names()))
        return fid.ImageReader(folder)


def lookups(folder):
    """Return functions that look up one of these images, and all of them."""
    images = many_images(folder)

    def look_up():
        for i in range(len(images)):
            images.sources[i]

    return lambda: images.sources[0], look_up


def test_a_large_folder_takes_little_memory(tmp_path):
    names = many_names()
    images = many_images(tmp_path)
    assert len(images) == 300_000
    assert len(images.classes) == 1000
    assert images.sources[299_999] == (None, f"{tmp_path}/{max(names)}")
    assert [name for _, name in images.sources][-1] == f"{tmp_path}/{max(names)}"

    # Characters, and 8 bytes for the end of each name. The label takes 8 more.
    ((_, listed),) = images.sources.parts
    size = len(listed.content) + listed.ends.nbytes
    assert size <= sum(map(len, names)) + 8 * len(names)

    # A forked worker that looks up all of them copies almost nothing.
    assert growth_of_a_worker(lookups, tmp_path) < 4e6


def test_string_arrays_equal_lists():
    strings = ["", "a", "käse", "\udc80invalid", "\ud800", "日本", ""]
    texts = fid.StringArray(strings)
    assert list(texts) == strings
    assert texts[-2] == "日本"
    assert texts[1:3] == strings[1:3]
    assert pickle.loads(pickle.dumps(texts))[3] == strings[3]
    assert list(fid.StringArray([])) == []
    with pytest.raises(IndexError):
        texts[7]


def test_cores_of_affinity_and_container(tmp_path, monkeypatch):
    # Version 2 of control groups, then version 1.
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert fid.cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert fid.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    assert fid.cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert fid.cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    assert fid.cpu_quota(tmp_path) == 4.0

    # The smaller of the two counts. A part of a core is one more thread.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for quota, cores in ((math.inf, 6), (1.5, 2), (4.0, 4), (0.5, 1), (16.0, 6)):
        monkeypatch.setattr(fid, "cpu_quota", lambda quota=quota: quota)
        assert fid.cpu_cores() == cores


def test_duplicate_class_names_are_rejected(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    classes = ["a", "crane", "b", "crane"]
    np.savez(tmp_path / "twice.npz", x=images, y=np.arange(4), classes=classes)
    with pytest.raises(ValueError, match=named("twice.npz", "classes")):
        fid.ImageReader(tmp_path / "twice.npz")


# ---------------------------------------------------------------- the Inception network


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


@pytest.fixture(scope="session")
def folded(inception):
    """The same network with folded norms, as load_inception returns it."""
    return copy.deepcopy(inception).fold()


def public_weights(net):
    """The state of the net as in the public file, which does not count batches."""
    return {
        name: value
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def relative_error(a, b):
    """The norm of a - b, relative to that of b."""
    return ((a - b).norm() / b.norm()).item()


def test_inception_has_the_keys_and_shapes_of_the_public_weights(inception):
    state = public_weights(inception)
    assert len(state) == 472
    assert sum(p.numel() for p in inception.parameters()) == 23_850_960
    assert tuple(state["Mixed_7c.branch3x3_2a.conv.weight"].shape) == (384, 384, 1, 3)
    assert tuple(state["fc.weight"].shape) == (1008, 2048)

    # The same digest as for the network of pytorch-fid 0.3.0.
    lines = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in state.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"


def inception_by_hand(state, x):
    """Features of (B, 3, 299, 299) in [-1, 1] from the public weights, layer by layer.

    Returns the pooled ones (B, 2048) and the grid of those of sFID (B, 7, 17, 17).
    """

    def conv(x, name, stride=1, valid=False):
        weight = state[f"{name}.conv.weight"]
        padding = (0, 0) if valid or stride == 2 else (weight.shape[2] // 2, weight.shape[3] // 2)
        x = F.conv2d(x, weight, None, stride, padding)
        keys = ("running_mean", "running_var", "weight", "bias")
        norm = [state[f"{name}.bn.{key}"] for key in keys]
        return F.batch_norm(x, *norm, eps=1e-3).relu()

    def chain(x, block, *names, stride=1):
        for name in names:
            x = conv(x, f"Mixed_{block}.{name}", stride if name == names[-1] else 1)
        return x

    def average(x):
        # At the border, the windows are smaller: divide by the share of ones in each.
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def maximum(x):
        return F.max_pool2d(x, 3, 1, 1)

    # To a 35 x 35 grid.
    x = conv(x, "Conv2d_1a_3x3", 2)
    x = conv(x, "Conv2d_2a_3x3", valid=True)
    x = conv(x, "Conv2d_2b_3x3")
    x = F.max_pool2d(x, 3, 2)
    x = conv(x, "Conv2d_3b_1x1")
    x = conv(x, "Conv2d_4a_3x3", valid=True)
    x = F.max_pool2d(x, 3, 2)
    for block in ("5b", "5c", "5d"):
        branches = [
            chain(x, block, "branch1x1"),
            chain(x, block, "branch5x5_1", "branch5x5_2"),
            chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            chain(average(x), block, "branch_pool"),
        ]
        x = torch.cat(branches, 1)

    # To a 17 x 17 grid.
    branches = [
        chain(x, "6a", "branch3x3", stride=2),
        chain(x, "6a", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", stride=2),
        F.max_pool2d(x, 3, 2),
    ]
    x = torch.cat(branches, 1)
    for block in ("6b", "6c", "6d", "6e"):
        branches = [
            chain(x, block, "branch1x1"),
            chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
            chain(x, block, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            chain(average(x), block, "branch_pool"),
        ]
        if block == "6d":
            grid = branches[0][:, :7]
        x = torch.cat(branches, 1)

    # To an 8 x 8 grid.
    branches = [
        chain(x, "7a", "branch3x3_1", "branch3x3_2", stride=2),
        chain(x, "7a", *(f"branch7x7x3_{i}" for i in range(1, 5)), stride=2),
        F.max_pool2d(x, 3, 2),
    ]
    x = torch.cat(branches, 1)
    for block, pool in (("7b", average), ("7c", maximum)):
        single = chain(x, block, "branch3x3_1")
        double = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = [
            chain(x, block, "branch1x1"),
            chain(single, block, "branch3x3_2a"),
            chain(single, block, "branch3x3_2b"),
            chain(double, block, "branch3x3dbl_3a"),
            chain(double, block, "branch3x3dbl_3b"),
            chain(pool(x), block, "branch_pool"),
        ]
        x = torch.cat(branches, 1)
    return x.mean((2, 3)), grid


def test_inception_equals_the_network_written_by_hand(inception):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=generator)
    expected, grid = inception_by_hand(public_weights(inception), (x.float() - 128) / 128)
    features, logits, spatial = inception(x)
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert (logits - expected @ inception.fc.weight.T).norm() < 1e-5 * logits.norm()

    # The spatial features are in TensorFlow's order: row, column, channel.
    assert spatial.shape == (1, 2023)
    for row, column, channel in ((0, 0, 3), (2, 16, 0), (16, 5, 6)):
        number = (row * 17 + column) * 7 + channel
        expected = grid[0, channel, row, column].item()
        assert spatial[0, number].item() == pytest.approx(expected, abs=1e-4)
    assert relative_error(spatial[0].sort().values, grid.flatten().sort().values) < 1e-5
    assert grid.std() > 0.1


def pooled_by_hand(x, padding, stride, pool):
    """x (C, H, W), pooled over 3 x 3 windows. Pixels outside of the image do not count.

    pool(window, dim): torch.mean or torch.amax.
    """
    height, width = x.shape[1:]
    rows = []
    for i in range(-padding, height + padding - 2, stride):
        row = []
        for j in range(-padding, width + padding - 2, stride):
            window = x[:, max(i, 0) : i + 3, max(j, 0) : j + 3]
            row.append(pool(window.flatten(1), 1))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    "name, padding, stride, pool",
    [
        ("Mixed_5b", 1, 1, torch.mean),
        ("Mixed_5c", 1, 1, torch.mean),
        ("Mixed_5d", 1, 1, torch.mean),
        ("Mixed_6b", 1, 1, torch.mean),
        ("Mixed_6c", 1, 1, torch.mean),
        ("Mixed_6d", 1, 1, torch.mean),
        ("Mixed_6e", 1, 1, torch.mean),
        ("Mixed_7b", 1, 1, torch.mean),
        ("Mixed_7c", 1, 1, torch.amax),
        ("Mixed_6a", 0, 2, torch.amax),
        ("Mixed_7a", 0, 2, torch.amax),
    ],
)
def test_pooling_of_inception(inception, name, padding, stride, pool):
    block = getattr(inception, name)
    first_branch = {"Mixed_6a": "branch3x3", "Mixed_7a": "branch3x3_1"}.get(name, "branch1x1")
    channels = getattr(block, first_branch).conv.in_channels

    # Most values are negative, so that zeros as padding would change a maximum, too.
    x = torch.randn(1, channels, 7, 5) - 1
    expected = pooled_by_hand(x[0], padding, stride, pool)

    # A block with stride 1 pools the input of branch_pool. One with stride 2 puts the pooled input
    # at the end of its output.
    if stride == 1:
        seen = []

        def keep_input(module, inputs):
            seen.append(inputs[0])

        with block.branch_pool.register_forward_pre_hook(keep_input):
            block(x)
        pooled = seen[0][0]
    else:
        pooled = block(x)[0, -channels:]
    assert torch.allclose(pooled, expected, atol=1e-6)


def resized_by_loop(image, out=299):
    """TensorFlow 1's bilinear resize of (H, W), pixel by pixel; coordinates in float32 as there."""
    height, width = image.shape
    result = np.zeros((out, out))
    scale_y = np.float32(height) / np.float32(out)
    scale_x = np.float32(width) / np.float32(out)
    for i in range(out):
        y = np.float32(i) * scale_y
        top = int(y)
        bottom = min(top + 1, height - 1)
        for j in range(out):
            x = np.float32(j) * scale_x
            left = int(x)
            right = min(left + 1, width - 1)
            weight = float(x - left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * weight
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * weight
            result[i, j] = upper + (lower - upper) * float(y - top)
    return result


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (299, 299), (512, 512), (48, 300)])
def test_resize_equals_tensorflow(size):
    image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(image)[None, None])[0, 0]
    assert resized.dtype == torch.float32
    assert np.abs(resized.numpy() - resized_by_loop(image.astype(float))).max() < 1e-4


@torch.no_grad()
def test_inception_folded_in_float32_equals_float64(inception, folded):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=generator)
    features, logits, spatial = copy.deepcopy(inception).double()(x.double())
    assert features.dtype == float64
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)

    # The random weights give the two images different features.
    assert features.std(0).mean() > 1e-3

    # The logits have no bias.
    assert torch.allclose(features @ inception.fc.weight.double().T, logits)

    # Folding changes the features only by rounding, and autocast does not change them.
    for net in (inception, folded):
        net_features, net_logits, net_spatial = net(x)
        assert relative_error(net_features, features) < 2e-6
        assert relative_error(net_logits, logits) < 2e-6
        assert relative_error(net_spatial, spatial) < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        autocast_features, _, autocast_spatial = folded(x)
    assert relative_error(autocast_features, features) < 2e-6
    assert relative_error(autocast_spatial, spatial) < 2e-6

    # Images in float64 need no resize, or one in float64.
    for images in (x[:1], fid.resize_tf1(x[:1])):
        features, _, _ = folded(images)
        assert relative_error(folded(images.double())[0], features) < 1e-5

    # Features do not depend on the batch.
    together, _, _ = folded(x)
    alone = torch.cat([folded(x[i : i + 1])[0] for i in range(2)])
    assert relative_error(alone, together) < 1e-5
    assert (alone - together).abs().max() < 1e-5 * alone.abs().max()

    # extract() splits batches of more than 4 images per thread.
    many = x.repeat(1 + 2 * torch.get_num_threads(), 1, 1, 1)
    features, _, spatial = fid.extract(folded, many, spatial=True)
    assert relative_error(features, alone.repeat(len(many) // 2, 1)) < 1e-5
    assert relative_error(spatial, folded(x)[2].repeat(len(many) // 2, 1)) < 1e-5

    # The norms are gone, and the weights are frozen.
    assert folded.state_dict().keys() != inception.state_dict().keys()
    trained = copy.deepcopy(inception).requires_grad_(True)
    assert not any(p.requires_grad for p in trained.fold().parameters())


class Malicious:
    """An object that creates the file `malicious` when it is unpickled."""

    def __reduce__(self):
        return open, ("malicious", "w")


def test_other_weights_are_rejected_by_name(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    public = "pt_inception-2015-12-05-6726825d.pth"
    right = tmp_path / "right.pth"
    torch.save(public_weights(inception), right)
    content = content_of(right)
    digest = hashlib.sha256(content).hexdigest()[:8]
    (tmp_path / "truncated.pth").write_bytes(content[:-1000])
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))

    # The checksum is not that of the public file.
    with pytest.raises(ValueError, match=named("right.pth", public, digest)):
        fid.load_inception(right)

    # With the checksum of right.pth, this file is accepted, and no other one.
    monkeypatch.setattr(fid, "SHA256", digest)
    net = fid.load_inception(str(right))
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.allclose(net(x)[0], inception(x)[0], rtol=1e-4, atol=1e-5)
    for name in ("truncated.pth", "code.pth"):
        with pytest.raises(ValueError, match=named(name, public)):
            fid.load_inception(tmp_path / name)

    # Without a checksum, still no code is run, and the weights must fit the network.
    monkeypatch.setattr(fid, "SHA256", "")
    with pytest.raises(pickle.UnpicklingError):
        fid.load_inception(tmp_path / "code.pth")
    torch.save(public_weights(inception) | dict(extra=torch.zeros(1)), tmp_path / "more.pth")
    with pytest.raises(RuntimeError, match="extra"):
        fid.load_inception(tmp_path / "more.pth")
    assert not os.path.exists("malicious")

    # Without a network connection, the error says which file to put where, in one line.
    monkeypatch.setattr(fid, "SHA256", digest)

    def no_network(url, file, prefix, progress):
        raise OSError("no network")

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError) as error:
        fid.load_inception()
    message = str(error.value)
    assert fid.WEIGHTS in message
    assert str(tmp_path / "hub" / "checkpoints") in message
    assert "\n" not in message

    # The file is downloaded once. Then it is read from the cache.
    def download(url, file, prefix, progress):
        assert url == fid.WEIGHTS
        assert prefix == fid.SHA256
        shutil.copy(right, file)

    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", download)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])
    monkeypatch.setattr(fid.torch.hub, "download_url_to_file", no_network)
    assert torch.equal(fid.load_inception()(x)[0], net(x)[0])


# ---------------------------------------------------------------- statistics and scores


def random_features(n):
    """Random features (n, 7), correlated and not centered, and logits (n, 5)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    logits = torch.randn(n, 5, generator=generator)
    return 3 + features, logits


def test_statistics_equal_numpy_for_any_batch_size():
    features, logits = random_features(103)
    splits = fid.score_splits(103)
    x = features.double().numpy()
    # Spatial features have a width of their own.
    spatial = 2 + logits[:, :3] * features[:, :3]
    for sizes in ((103,), (50, 53), (1,) * 103):
        # Every third batch goes into one of two sums, the others into the other one.
        statistics = fid.Statistics()
        other = fid.Statistics()
        for i, rows in enumerate(torch.arange(103).split(sizes)):
            part = other if i % 3 else statistics
            part.update(features[rows], logits[rows], splits[rows], spatial[rows])
        statistics.merge(other)

        mu, sigma = statistics.gaussian()
        assert statistics.n == 103
        assert np.abs(mu - x.mean(0)).max() < 1e-12
        assert np.abs(sigma - np.cov(x, rowvar=False)).max() < 1e-11
        mu, sigma = statistics.spatial_gaussian()
        assert np.abs(mu - spatial.double().numpy().mean(0)).max() < 1e-12
        assert np.abs(sigma - np.cov(spatial.double().numpy(), rowvar=False)).max() < 1e-11
        expected = fid.inception_score(logits)
        assert statistics.inception_score() == pytest.approx(expected, rel=1e-12)


def test_exact_float32_keeps_the_settings_of_cudnn(monkeypatch):
    flags = torch.backends.cudnn
    for value in (True, False):
        monkeypatch.setattr(flags, "deterministic", value)
        monkeypatch.setattr(flags, "benchmark", value)
        with fid.exact_float32():
            assert (flags.deterministic, flags.benchmark, flags.allow_tf32) == (value, value, False)


def test_statistics_of_one_image_or_of_nan_are_rejected():
    features, _ = random_features(103)
    statistics = fid.Statistics()
    statistics.update(features[:1])
    with pytest.raises(ValueError, match=r"\b1\b"):
        statistics.gaussian()
    assert statistics.spatial_gaussian() == (None, None)
    statistics.update(features * math.nan)
    with pytest.raises(ValueError, match="NaN"):
        statistics.gaussian()


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal(30)
    delta = rng.standard_normal(30)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    for rank in (30, 11, 0):
        # The same Gaussian, one that is shifted, and a point.
        sigma = covariance(30, rank, 1)
        trace = np.trace(sigma)
        same = fid.frechet_distance(mu, sigma, mu, sigma)
        shifted = fid.frechet_distance(mu, sigma, mu + delta, sigma)
        point = fid.frechet_distance(mu, sigma, mu, 0 * sigma)
        assert same == pytest.approx(0, abs=1e-12 * (1 + trace))
        assert shifted == pytest.approx(delta @ delta, rel=1e-12)
        assert point == pytest.approx(trace, rel=1e-12)

        # Covariances that commute: sum (sqrt a - sqrt b)^2, also if both are partly singular.
        a = rng.uniform(0, 2, 30)
        b = rng.uniform(0, 2, 30)
        a[rank:] = 0
        b[: 30 - rank] = 0
        expected = ((a**0.5 - b**0.5) ** 2).sum()
        distance = fid.frechet_distance(mu, q * a @ q.T, mu, q * b @ q.T)
        assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_rejects_other_shapes_and_numbers_that_are_not_finite():
    mu = np.random.default_rng(0).standard_normal(30)
    sigma = covariance(30, 0, 1)
    for wrong in (
        (mu[:3], sigma, mu, sigma),
        (mu[:3], sigma[:3, :3], mu, sigma),
        (mu * math.nan, sigma, mu, sigma),
        (mu, sigma, mu, sigma + math.inf),
    ):
        with pytest.raises(ValueError):
            fid.frechet_distance(*wrong)


# LAPACK factors the matrices of 200 dimensions in blocks.
@pytest.mark.parametrize(
    "dim, rank_a, rank_b",
    [(60, 60, 60), (60, 60, 20), (60, 20, 60), (60, 20, 35), (200, 150, 200), (200, 70, 130)],
)
def test_frechet_distance_equals_sqrtm(dim, rank_a, rank_b):
    a = covariance(dim, rank_a, 0)
    b = covariance(dim, rank_b, 1)
    distance = fid.frechet_distance(np.zeros(dim), a, np.ones(dim), b)

    # For singular covariances, rounding makes the root complex.
    root = scipy.linalg.sqrtm(a @ b)
    expected = dim + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    assert isinstance(distance, float)
    assert distance == pytest.approx(expected, rel=1e-6)

    # Tensors are accepted, too.
    assert distance == fid.frechet_distance(torch.zeros(dim), torch.from_numpy(a), np.ones(dim), b)


def test_inception_score_of_known_distributions():
    # All images have the same probabilities: the score is 1.
    score = fid.inception_score(torch.randn(1, 9).repeat(200, 1))
    assert score == pytest.approx((1, 0), abs=1e-9)

    # Every image certainly has one of five classes: the score of a split is exp of the entropy of
    # the class frequencies.
    label = torch.arange(1000) % 5
    split = fid.score_splits(1000)
    counts = torch.stack([label[split == i].bincount(minlength=5) for i in range(10)])
    frequencies = counts / 100
    scores = torch.exp(-torch.xlogy(frequencies, frequencies).sum(1))
    expected = (scores.mean().item(), scores.std(correction=0).item())
    assert fid.inception_score(1e4 * torch.eye(5)[label]) == pytest.approx(expected, rel=1e-5)
    assert scores.mean() > 4.9


def test_inception_score_equals_its_definition():
    logits = torch.randn(105, 6, generator=torch.Generator().manual_seed(0))
    order = np.random.RandomState(2020).permutation(105)
    probabilities = logits.double().softmax(1).numpy()[order]
    scores = []
    for i in range(10):
        p = probabilities[i * 105 // 10 : (i + 1) * 105 // 10]
        divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    expected = (np.mean(scores), np.std(scores))
    assert fid.inception_score(logits) == pytest.approx(expected, rel=1e-12)

    # Few images score too low on average: 10 splits of 5, 50 and 500.
    generator = torch.Generator().manual_seed(0)
    scores = [
        fid.inception_score(2 * torch.randn(n, 10, generator=generator))[0]
        for n in (50, 500, 5_000)
    ]
    assert scores[0] < 0.9 * scores[1]
    assert scores[1] < scores[2]

    # Large logits do not overflow.
    shifted = fid.inception_score(logits + 1000)
    assert shifted == pytest.approx(fid.inception_score(logits), rel=1e-4)


def test_precision_and_recall_of_known_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    inner = torch.cartesian_prod(torch.arange(2.0, 7), torch.arange(2.0, 7)) + 0.25
    assert fid.precision_recall(grid, grid) == (1, 1)
    assert fid.precision_recall(grid, grid + 100) == (0, 0)

    # In a square grid, the third neighbor is at distance 1, or sqrt 2 at the corners. The inner set
    # is inside the grid, and covers the points of the grid near it.
    radius = torch.cdist(inner, inner).sort(1).values[:, 3]
    covered = (torch.cdist(grid, inner) <= radius).any(1).double().mean()
    assert fid.precision_recall(grid, inner, block=7) == (1, covered.item())
    assert 0.25 <= covered < 0.5

    # Swapped sets swap precision and recall. The size of the blocks has no effect.
    swapped = fid.precision_recall(inner, grid, block=1000)
    assert swapped[::-1] == fid.precision_recall(grid, inner)

    # The distances to the third neighbors are 6, 5, 3, 5, 9. The points -6 and 19 are exactly at
    # the distances of 0 and 10.
    line = torch.tensor([[0.0], [1], [3], [6], [10]])
    points = torch.tensor([[-6.0], [-6.5], [19], [19.5]])
    assert fid.precision_recall(line, points) == (0.5, 1)

    # A common offset changes nothing, although its square is large.
    real, fake = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(0))
    expected = fid.precision_recall(real, fake)
    assert fid.precision_recall(real + 1e4, fake + 1e4) == pytest.approx(expected, abs=0.02)

    with pytest.raises(ValueError, match=r"\b100\b.*\b3\b"):
        fid.precision_recall(grid, grid[:3])
    with pytest.raises(ValueError, match="NaN"):
        fid.precision_recall(grid, grid * math.nan)


# ---------------------------------------------------------------- the command


def to_tensor(images):
    """Images (N, H, W, 3), an array, as a tensor (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def gaussian_of(features):
    """The mean and the covariance of features (N, D), as arrays."""
    x = features.numpy()
    return x.mean(0), np.cov(x, rowvar=False)


def features_of_sets(sets):
    """Features and logits of the real and of the fake images by Colors, as two pairs."""
    real = np.load(sets / "real.npy")
    fake = np.load(sets / "fake.npz")["arr_0"]
    return Colors()(to_tensor(real)), Colors()(to_tensor(fake))


def test_fid_command_on_every_kind_of_data(sets, tmp_path):
    fake = sets / "fake.npz"
    (real_features, _), (fake_features, fake_logits) = features_of_sets(sets)
    mu, sigma = gaussian_of(real_features)
    distance = fid.frechet_distance(mu, sigma, *gaussian_of(fake_features))
    score = fid.inception_score(fake_logits)
    precision_recall = fid.precision_recall(real_features.float(), fake_features.float())

    for name in ("real", "real.zip", "real.npz", "real.npy"):
        real = sets / name
        stats = tmp_path / f"{name}.stats.npz"
        options = "--features tests.helpers:Colors --pr --batch 7 --save-stats"
        lines, progress = measured(real, fake, options, stats)
        assert re.search(r"\b40\b\D+\b40\b", progress)

        # The second line names the file of statistics.
        saved = lines.pop(1)
        assert f"{name}.stats.npz" in saved
        with np.load(stats) as data:
            assert np.abs(data["mu"] - mu).max() < 1e-9
            assert np.abs(data["sigma"] - sigma).max() < 1e-9
            assert data["n"] == 40

        # Both sides with their number of images.
        assert lines[0].startswith(f"{real}: all images")
        assert lines[0].endswith("N = 40")
        assert lines[1].startswith(f"{fake}: ")
        assert lines[1].endswith("N = 30")

        # The distance, a note on few images, and the scores.
        assert lines[2].startswith(f"FD-Colors {distance:.4f} ")
        assert re.search(named(fake, real), lines[2])
        assert "10,000" in lines[3]
        assert re.match(r"IS-Colors {:.4f}\D+{:.4f}\b".format(*score), lines[4])
        assert "5,000" in lines[5]
        pattern = r"precision {:.4f}\D+recall {:.4f}\D+3\D+40\D+30\b"
        assert re.match(pattern.format(*precision_recall), lines[6])

    # Saved statistics give the same lines as their images (of real.npy, the last ones measured).
    stats = tmp_path / "real.stats.npz"
    from_stats, _ = measured(stats, fake, "--features tests.helpers:Colors")
    assert from_stats[1:3] == [lines[1], lines[2].replace(str(sets / "real.npy"), str(stats))]

    # Two files of statistics need no network. They store which one it was.
    other_stats = tmp_path / "real.zip.stats.npz"
    lines, _ = measured(stats, other_stats)
    assert lines[2].startswith("FD-Colors 0.0000")
    assert re.search(named("Inception", other_stats), lines[4])
    assert len(lines) == 5


def test_fid_command_with_features_without_logits(sets, tmp_path):
    (real, _), (fake, _) = features_of_sets(sets)
    distance = fid.frechet_distance(*gaussian_of(real), *gaussian_of(fake))
    plain = "--features tests.helpers:Plain"
    lines, _ = measured(sets / "real", sets / "fake.npz", plain)
    assert lines[2].startswith(f"FD-Plain {distance:.4f}")
    assert len(lines) == 4

    # Statistics of one side alone.
    lines, _ = measured(sets / "real", plain, "--save-stats", tmp_path / "only.npz")
    assert len(lines) == 2
    assert "only.npz" in lines[1]


def test_fid_reads_published_statistics_and_prefers_them(sets, tmp_path, inception, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save(public_weights(inception), weights)
    monkeypatch.setattr(fid, "SHA256", "")

    # A file with the statistics of a point at the origin, and images.
    both = tmp_path / "both.npz"
    images = np.load(sets / "real.npz")["arr_0"][:6]
    np.savez(both, mu=np.zeros(2048), sigma=np.zeros((2048, 2048)), arr_0=images)
    small = tmp_path / "small.npz"
    np.savez(small, arr_0=np.load(sets / "fake.npz")["arr_0"][:5])
    lines, _ = measured(both, small, "--weights", weights, "--pr --selftest")

    # The distance is that to the point, not to the images.
    assert re.match(rf"{both}: .*\bmu\b.*\bsigma\b.*N = \D+$", lines[0])
    small_images = to_tensor(np.load(small)["arr_0"])
    features, _ = fid.extract(fid.load_inception(weights), small_images)
    features = features.double()
    expected = (features.mean(0) ** 2).sum() + features.var(0).sum()
    assert lines[2].startswith("FID ")
    assert float(lines[2].split()[1]) == pytest.approx(expected.item(), rel=1e-5)

    # --selftest prints the published distance. Precision and recall are those of the images.
    assert "3.1508" in lines[3]
    assert lines[5].startswith("Inception Score 1.0")
    assert re.search(r"\b6\b\D+\b5\b", lines[7])

    # The file has no spatial statistics, so there is no sFID.
    assert not any(line.startswith("sFID") for line in lines)

    # Without --pr, the images are not read. The Inception Score says so.
    lines, _ = measured(small, both, "--weights", weights)
    assert any("no Inception Score" in line and "mu and sigma" in line for line in lines)


def test_sfid_equals_its_formula(sets, tmp_path, folded, monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda weights: folded)
    sides = [tmp_path / "real.npz", tmp_path / "fake.npz"]
    means = []
    roots = []
    for path, n in zip(sides, (3, 2)):
        images = np.load(sets / path.name)["arr_0"][:n]
        np.savez(path, arr_0=images)
        spatial = folded(to_tensor(images))[2].double()
        means.append(spatial.mean(0).numpy())
        roots.append((spatial - spatial.mean(0)).numpy() / (n - 1) ** 0.5)

    # With covariances X^T X and Y^T Y, the trace of the root of their product is the sum of the
    # singular values of X Y^T.
    x, y = roots
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    difference = ((means[0] - means[1]) ** 2).sum()
    expected = difference + (x**2).sum() + (y**2).sum() - 2 * root

    stats = tmp_path / "stats.npz"
    lines, _ = measured(sides, "--save-stats", stats)
    assert lines[1].startswith("wrote mu, sigma, mu_s, sigma_s and n")
    assert lines[3].startswith("FID ")
    assert lines[4].startswith("sFID ")
    assert float(lines[4].split()[1]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01

    # The statistics are stored, and give the same distance as the images.
    with np.load(stats) as data:
        saved = dict(data)
    assert np.abs(saved["mu_s"] - means[0]).max() < 1e-5
    assert np.abs(saved["sigma_s"] - x.T @ x).max() < 1e-4
    others = dict(mu=saved["mu"], sigma=saved["sigma"])
    np.savez(sides[1], mu_s=means[1], sigma_s=y.T @ y, **others)
    lines, _ = measured(stats, sides[1])
    assert lines[2].startswith("FID 0.0000 ")
    assert float(lines[3].split()[1]) == pytest.approx(expected, rel=1e-4)

    # Files without them give no sFID.
    np.savez(sides[1], **others)
    lines, _ = measured(stats, sides[1])
    assert lines[2].startswith("FID 0.0000 ")
    assert not any(line.startswith("sFID") for line in lines)


@pytest.fixture
def mixed_sizes(tmp_path):
    """Three images of two sizes in a folder, and the two of the same size as an npz file."""
    sizes = ((20, 16), (16, 20), (20, 16))
    (tmp_path / "mixed").mkdir()
    for i, size in enumerate(sizes):
        photo(size, i).save(tmp_path / "mixed" / f"{i}.png")
    np.savez(tmp_path / "alike.npz", arr_0=np.stack([photo(sizes[i], i) for i in (0, 2)]))
    return fid.ImageReader(tmp_path / "mixed"), fid.ImageReader(tmp_path / "alike.npz")


def test_inception_features_of_images_of_several_sizes(mixed_sizes, folded):
    mixed, alike = (torch.cat(fid.measure(x, folded, keep=True).kept) for x in mixed_sizes)
    nearest = torch.cdist(alike, mixed).argmin(1)
    assert relative_error(mixed[nearest], alike) < 1e-5

    # The features of the three images differ.
    assert torch.cdist(mixed, mixed).fill_diagonal_(1).min() > 1e-2


def test_visit_gets_images_as_they_are(mixed_sizes, folded):
    # A resized image must not be flipped: TensorFlow's resize is not symmetric.
    images, _ = mixed_sizes
    visited = {}

    def visit(numbers, x, features):
        visited.update(zip(numbers.tolist(), x))

    fid.measure(images, folded, visit=visit)
    for i in range(3):
        assert torch.equal(visited[i], to_tensor(images[i][None].copy())[0])


def test_networks_other_than_inception_get_images_as_they_are(mixed_sizes):
    mixed, alike = (fid.measure(images, Colors()).moments for images in mixed_sizes)
    other = fid.Statistics()
    features, _ = Colors()(to_tensor(np.array(photo((16, 20), 1))[None]))
    other.update(features)
    assert torch.allclose(mixed, alike + other.moments)


def test_fid_of_images_resized_as_for_training(sets, tmp_path):
    options = "--features tests.helpers:Colors --save-stats"
    measured(sets / "real", "--res 8", options, tmp_path / "a.npz")
    x, _ = load_batch(ImageData([sets / "real"], 8), range(40))
    np.savez(tmp_path / "small.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    measured(tmp_path / "small.npz", options, tmp_path / "b.npz")
    a = np.load(tmp_path / "a.npz")
    b = np.load(tmp_path / "b.npz")
    for key in ("mu", "sigma", "n"):
        assert np.abs(a[key] - b[key]).max() < 1e-12, key


def test_bad_images_stop_fid_or_are_skipped_and_counted(sets, tmp_path):
    bad = tmp_path / "real"
    shutil.copytree(sets / "real", bad)
    (bad / "broken.png").write_bytes(b"text, not an image")
    (bad / "empty.jpg").write_bytes(b"")
    options = "--features tests.helpers:Colors --batch 9"
    with pytest.raises(ValueError, match="broken.png"):
        measured(bad, sets / "fake.npz", options)
    lines, progress = measured(bad, sets / "fake.npz", options, "--skip-bad")
    assert re.search(r"N = 40 of 42\D+2 unreadable", lines[0])
    assert "broken.png" in progress
    assert "empty.jpg" in progress

    # The distance is that without the bad images.
    expected, _ = measured(sets / "real", sets / "fake.npz", options)
    assert lines[2].split()[1] == expected[2].split()[1]


def test_bad_input_of_fid(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    # Statistics with NaN, of shapes that do not fit, of another network, and with code.
    nan = tmp_path / "nan.npz"
    np.savez(nan, mu=np.full(3, math.nan), sigma=np.eye(3))
    shape = tmp_path / "shape.npz"
    np.savez(shape, mu=np.zeros(3), sigma=np.eye(4))
    three = tmp_path / "three.npz"
    np.savez(three, mu=np.zeros(3), sigma=np.eye(3), features="tests.helpers:Colors")
    half = tmp_path / "half.npz"
    np.savez(half, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2))
    spatial = tmp_path / "spatial.npz"
    np.savez(spatial, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(3))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, mu=np.array([Malicious()], dtype=object), sigma=np.eye(1))

    # A single image, a damaged archive, arrays of other names, and statistics with images.
    one = tmp_path / "one.npz"
    np.savez(one, arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\3\4 and no archive")
    keys = tmp_path / "keys.npz"
    np.savez(keys, other=np.zeros(1))
    both = tmp_path / "both.npz"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(both, mu=np.zeros(3), sigma=np.eye(3), arr_0=images)

    # The error names these words.
    real = sets / "real.npz"
    nowhere = tmp_path / "nowhere"
    colors = "--features tests.helpers:Colors"
    for args, words in (
        ([nan, real], "nan.npz NaN"),
        ([shape, real], "shape.npz mu (3,)"),
        ([half, real], "half.npz sigma_s"),
        ([spatial, real], "spatial.npz mu_s sigma_s (2,) (3, 3)"),
        ([three, real], "three.npz tests.helpers:Colors Inception-2015-12-05"),
        ([pickled, real], "pickled.npz"),
        ([three, real, "--pr", colors], "--pr three.npz"),
        ([three, real, colors], "3 9"),
        ([one, real, colors], "one.npz 1"),
        ([broken, real, colors], "broken.npz"),
        ([nowhere, real, colors], "nowhere"),
        ([real], "--save-stats"),
        ([real, real, "--features tests.helpers:None"], "tests.helpers:None"),
        ([real, real, "--features nowhere:Net"], "nowhere"),
        ([real, nowhere], "nowhere"),
        ([real, real, "--batch 0"], "--batch"),
        ([real, "--save-stats stats"], "--save-stats stats .npz"),
        ([real, "--save-stats", real], "--save-stats real.npz"),
        ([real, "--save-stats", both], "--save-stats both.npz"),
        ([real, "--save-stats nowhere/stats.npz"], "nowhere/stats.npz"),
        ([keys, real], "keys.npz other"),
        ([real, real, "--selftest", colors], "--selftest"),
        ([real, real, "--weights", tmp_path / "nowhere.pth"], "nowhere.pth"),
        ([real, real, "--weights", real], "real.npz pt_inception-2015-12-05-6726825d.pth"),
        ([real, real, "--device cuda"], "--device cuda"),
        ([real, real, "--sigma"], "--sigma"),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            measured(*args)
        assert re.search(named(*words.split()), str(error.value)), args
    assert not os.path.exists("malicious")


def test_errors_of_the_fid_command_are_one_line(sets, tmp_path):
    real = sets / "real.npz"
    nan = tmp_path / "nan.npz"
    np.savez(nan, mu=np.full(3, math.nan), sigma=np.eye(3))
    for args, words in (([nan, real], "fid.py nan.npz"), ([real, real, "--batch x"], "--batch")):
        result = command(f"{HERE}/fid.py", *args, cwd=tmp_path)
        assert result.returncode != 0, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert re.search(named(*words.split()), result.stderr), result.stderr


def test_a_lack_of_memory_is_one_line(monkeypatch):
    # Errors of CUDA have several lines. Other RuntimeErrors are bugs and keep their traceback.
    for message, expected in (
        ("CUDA error: out of memory\nCUDA kernel errors\nCompile with", SystemExit),
        ("[enforce fail] cannot allocate memory: you tried", SystemExit),
        ("shapes do not match\nat line 3", RuntimeError),
    ):

        def main(message=message):
            raise RuntimeError(message)

        monkeypatch.setattr(fid, "main", main)
        with pytest.raises(expected, match=re.escape(message.splitlines()[0])):
            fid.run()


SHARED_DATA = os.path.join(os.path.dirname(HERE), "shared", "data")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists(f"{SHARED_DATA}/{WEIGHTS}"),
    reason="the weights of ResNet-56 are not in ../shared/data",
)
def test_distance_in_features_of_resnet56_rises_with_noise(tmp_path, monkeypatch):
    folder = SHARED_DATA
    monkeypatch.chdir(tmp_path)
    os.symlink(f"{folder}/{WEIGHTS}", WEIGHTS)  # where ResNet56 looks for it
    with np.load(f"{folder}/cifar10_test.npz") as data:
        images = data["x"][:1000]
        labels = data["y"][:1000]

    # The network classifies its test images, so it is the one that it should be.
    with torch.no_grad():
        _, logits = ResNet56()(to_tensor(images[:500]))
    assert (logits.argmax(1).numpy() == labels[:500]).mean() > 0.9

    # The test images against training images, and against themselves with noise.
    options = "--features docs.cifar:ResNet56 --batch 200"
    np.savez(tmp_path / "test.npz", arr_0=images)
    measured(tmp_path / "test.npz", options, "--save-stats", tmp_path / "stats.npz")
    others = {"train": np.load(f"{folder}/cifar10_train_0of3.npz")["x"][:1000]}
    rng = np.random.default_rng(0)
    for std in (5, 10, 20):
        noisy = images + std * rng.standard_normal(images.shape)
        others[std] = noisy.round().clip(0, 255).astype(np.uint8)
    distances = []
    for name, other in others.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=other)
        lines, _ = measured(tmp_path / "stats.npz", tmp_path / f"{name}.npz", options)
        assert lines[2].startswith("FD-ResNet56 ")
        assert lines[4].startswith("IS-ResNet56 ")
        distances.append(float(lines[2].split()[1]))
    print(
        f"FD-ResNet56 of 1,000 test images: against 1,000 training images {distances[0]}, "
        f"against themselves with noise of 5, 10, 20 gray levels {distances[1:]}"
    )
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3]


@pytest.fixture
def bad_folder(tmp_path):
    """A folder of four images. The first of two ranks gets two of them, which are unreadable."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for i in (0, 2):
        (folder / f"{i}.png").write_bytes(b"not an image")
    for i in (1, 3):
        photo(seed=i).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one(sets, bad_folder, tmp_path):
    for real, pr in ((sets / "real", ["--pr"]), (bad_folder, [])):
        colors = "--features tests.helpers:Spatial --batch 4 --skip-bad --device cpu"
        options = [real, sets / "fake.npz", colors, *pr, "--save-stats"]
        lines, _ = measured(*options, tmp_path / "one.npz")
        statuses, output, errors = on_ranks(fid.main, *options, "two.npz", cwd=tmp_path)
        assert statuses == [0, 0], errors

        # The lines differ only in the name of the file of statistics.
        rank_lines = output.splitlines()
        assert len(lines) == len(rank_lines)
        assert [line for line in rank_lines if "two.npz" not in line] == [
            line for line in lines if "one.npz" not in line
        ]
        one = np.load(tmp_path / "one.npz")
        two = np.load(tmp_path / "two.npz")
        for key in ("mu", "sigma", "mu_s", "sigma_s", "n"):
            assert np.abs(one[key] - two[key]).max() < 1e-9, key
        assert any(line.startswith("sFD-Spatial") for line in lines)


@pytest.mark.slow
def test_an_error_on_two_ranks_is_reported_once(sets, bad_folder, tmp_path):
    # The second error is that of a download without a network connection.
    offline = os.environ | dict(TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")
    for options, expected in (
        (["--features tests.helpers:Colors"], f"{bad_folder}/"),
        ([], fid.WEIGHTS),
    ):
        args = [bad_folder, sets / "fake.npz", *options]
        with torchrun(f"{HERE}/fid.py", *args, cwd=tmp_path, env=offline) as process:
            _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.splitlines() if line.startswith("fid.py")]
        assert process.returncode != 0, errors
        assert sum(expected in line for line in lines) == 1, errors
        assert len(lines) <= 2, errors


# ---------------------------------------------------------------- nearest training images


def nearest_of(samples, mirrored, training, *, k=51, block=None, sizes=None):
    """NearestImages of vectors (n, D), added in batches of these sizes in a random order."""
    nearest = fid.NearestImages(lambda x: mirrored[x.flatten().long()], k=k)
    # The image of a sample holds its number, which is its own mirror image.
    numbers = torch.arange(len(samples))
    for rows in numbers.flip(0).split(4):
        nearest.add_samples(rows, rows[:, None, None, None].float(), samples[rows])
    nearest.finish_samples()
    nearest.block = block or nearest.block
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    for rows in order.split(sizes or 64):
        nearest.add_training(rows, None, training[rows])
    nearest.finish()
    return nearest


@pytest.mark.parametrize("block, sizes", [(1, 7), (10, 3), (1000, 64)])
def test_neighbors_equal_those_of_all_distances(block, sizes):
    generator = torch.Generator().manual_seed(0)
    samples, mirrored = torch.randn(2, 30, 5, generator=generator)
    training = torch.randn(200, 5, generator=generator)
    nearest = nearest_of(samples, mirrored, training, block=block, sizes=sizes)

    # The distance of a sample is the smaller one of itself and its mirror image.
    x, flipped, y = samples.double(), mirrored.double(), training.double()
    direct = (x[:, None] - y).norm(dim=2)
    distances = torch.minimum(direct, (flipped[:, None] - y).norm(dim=2))
    expected = distances.sort(1)
    assert nearest.training_count == 200
    assert torch.equal(nearest.numbers, torch.arange(30))
    assert torch.allclose(nearest.distances, expected.values[:, :51])
    assert torch.equal(nearest.nearest, expected.indices[:, :51])
    # 5 % of 200 training images.
    mean = expected.values[:, 1:11].mean(1)
    assert torch.allclose(nearest.ratios(), expected.values[:, 0] / mean)
    assert (distances < direct).any()

    # Only the samples and their neighbors are kept.
    assert not nearest.pending
    sizes = [x.numel() for x in vars(nearest).values() if isinstance(x, torch.Tensor)]
    assert max(sizes) == 30 * 51


def test_ratio_closed_forms():
    # On a line: the nearest image at distance 1, the next one at 4; with 40 images two next ones.
    origin = torch.zeros(1, 1)
    for n, expected in ((2, 1 / 4), (39, 1 / 4), (40, 1 / 6)):
        training = torch.tensor([1.0, 4, 8, *[100.0] * 40][:n])[:, None]
        nearest = nearest_of(origin, origin, training)
        assert nearest.ratios().item() == pytest.approx(expected)
        assert nearest.distances.shape == (1, n)

    # From 1,000 training images on, 50 next ones; duplicates of the copied image count little.
    training = torch.tensor([1.0] * 6 + [10.0] * 2000)[:, None]
    nearest = nearest_of(origin, origin, training)
    assert nearest.next_neighbors() == 50
    assert nearest.ratios().item() == pytest.approx(1 / ((5 + 45 * 10) / 50))

    # If the whole training set is one image, its copies have ratio 0. Equal vectors are only equal
    # up to rounding.
    assert nearest_of(origin, origin, torch.zeros(60, 1)).ratios().item() == 0
    vector, *others = torch.rand(19, 2048, generator=torch.Generator().manual_seed(0))
    copies = vector.expand(60, 2048)
    assert nearest_of(vector[None], vector[None], copies).ratios().item() == 0

    # The same for a training set with two of them.
    training = torch.stack([vector, vector, *others])
    assert nearest_of(vector[None], vector[None], training).ratios().item() == 0

    # Vectors far from the origin: their squares would cancel in float32.
    far = torch.full((1, 4), 4096.0)
    training = far + torch.tensor([0.5, -8.0, 16.0])[:, None]
    nearest = nearest_of(far, far, training)
    assert nearest.distances[0].tolist() == pytest.approx([1, 16, 32], rel=1e-6)

    with pytest.raises(ValueError, match=r"--nearest .*\b2\b.*\b1\b"):
        nearest_of(origin, origin, origin)


def near_copies(lines):
    """The number of near-copies that the command prints, the samples, and the training images."""
    (line,) = [line for line in lines if line.startswith("near-copies ")]
    return [int(x) for x in re.findall(r"(?<![\d.])\d+(?![\d.%])", line)]


@pytest.fixture
def copied(tmp_path):
    """120 training images, and a function that writes samples: altered copies, and others.

    The training images are smooth: nearby pixels are alike, as in photographs.
    """
    rng = np.random.default_rng(0)

    def smooth(n):
        coarse = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
        images = [Image.fromarray(x).resize((16, 16), Image.Resampling.BICUBIC) for x in coarse]
        return np.stack([np.asarray(x) for x in images])

    training = smooth(120)
    np.savez(tmp_path / "train.npz", arr_0=training)
    others = smooth(12)

    def write(*copies):
        np.savez(tmp_path / "samples.npz", arr_0=np.stack([*others, *copies]))
        return tmp_path / "train.npz", tmp_path / "samples.npz"

    return training, write


IN_FEATURES = "--features tests.helpers:Patches"
IN_PIXELS = "--nearest-in pixels"


@pytest.mark.parametrize("space", [IN_FEATURES, IN_PIXELS])
def test_planted_copies_are_found(copied, tmp_path, space):
    training, write = copied
    noise = np.random.default_rng(1).normal(0, 6, training[2].shape)
    noisy = (training[2] + noise).round().clip(0, 255).astype(np.uint8)
    kinds = {"exact": training[0], "mirrored": training[1][:, ::-1], "noisy": noisy}
    grid = tmp_path / "grid.png"

    # None, each kind alone, and all three.
    lines, _ = measured(*write(), "--nearest", grid, space)
    assert near_copies(lines) == [0, 12, 120]
    for i, kind in enumerate(kinds.values()):
        lines, _ = measured(*write(kind), "--nearest", grid, space)
        assert near_copies(lines) == [1, 13, 120], (space, i)
        assert any(line.startswith(f"  image 12 is near image {i}:") for line in lines)
    lines, _ = measured(*write(*kinds.values()), "--nearest", grid, space)
    assert near_copies(lines) == [3, 15, 120]
    assert "near-copies 20.00%" in "\n".join(lines)
    assert "next 6" in "\n".join(lines)
    assert re.search(named(grid, 15, 5), lines[-1])

    # Pixels need no network, and give no distance.
    assert any(line.startswith("FD-Patches") for line in lines) == (space == IN_FEATURES)


def test_scores_are_those_of_a_command_without_nearest(copied, tmp_path):
    sides = copied[1](copied[0][5])
    options = [IN_FEATURES, "--pr --batch 5"]
    plain, _ = measured(sides, options, "--save-stats", tmp_path / "a.npz")
    options += ["--nearest", tmp_path / "grid.png", "--save-stats", tmp_path / "b.npz"]
    lines, _ = measured(sides, options)
    assert plain[3:] == lines[3:-4]
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert np.abs(a["sigma"] - b["sigma"]).max() < 1e-12


def test_nearest_grid_shows_the_samples_and_their_neighbors(copied, tmp_path):
    training, write = copied
    real, fake = write(training[7][:, ::-1], training[3])
    measured(real, fake, "--nearest", tmp_path / "grid.png", IN_PIXELS)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))

    # 14 samples of 16 pixels, enlarged 4 times, with 5 neighbors each.
    assert grid.shape == (6 + 14 * 70, 24 + 6 * 70, 3)

    def cell(row, column):
        left = 6 + 70 * column + (18 if column else 0)
        return grid[6 + 70 * row : 70 + 70 * row, left : left + 64][::4, ::4]

    # Copies come first, in a red frame; a mirrored copy is next to the image as it is.
    assert np.array_equal(cell(0, 0), training[7][:, ::-1])
    assert np.array_equal(cell(0, 1), training[7])
    assert np.array_equal(cell(1, 0), training[3])
    assert np.array_equal(cell(1, 1), training[3])
    frames = [grid[6 + 70 * row + 30, 4].tolist() for row in range(14)]
    assert frames == 2 * [[220, 0, 0]] + 12 * [[255, 255, 255]]

    # The other rows: the nearest training images by all distances.
    samples = np.load(fake)["arr_0"].astype(float)
    flat = training.reshape(120, -1).astype(float)
    row = next(i for i in range(12) if np.array_equal(cell(2, 0), samples[i]))
    both = [samples[row].reshape(-1), samples[row][:, ::-1].reshape(-1)]
    distances = np.minimum(*(np.linalg.norm(flat - x, axis=1) for x in both))
    for column, i in enumerate(distances.argsort()[:5], 1):
        assert np.array_equal(cell(2, column), training[i]), column


def test_nearest_grid_of_images_of_any_size():
    # Large images are shrunk to 256 pixels, tiny ones enlarged to 64 or more.
    large = np.zeros((100, 1024, 3), np.uint8)
    grid = fid.neighbor_grid([[large, large[:, :50]]], [True])
    assert grid.size == (24 + 2 * 262, 12 + 25)
    tiny = np.zeros((1, 3, 3), np.uint8)
    assert fid.neighbor_grid([[tiny], [large]], [False, False]).size == (24 + 72, 6 + 2 * 28)


def test_nearest_reads_folders_of_several_sizes(tmp_path):
    # Features of the network, or pixels with --res. The near-copy and its image are named.
    for folder in ("train", "samples"):
        (tmp_path / folder).mkdir()
    for i in range(30):
        photo((20, 16) if i % 2 else (16, 20), i).save(tmp_path / "train" / f"{i:02}.png")
    for i in (3, 100, 101):
        photo((20, 16), i).save(tmp_path / "samples" / f"{i}.png")
    (tmp_path / "samples" / "bad.png").write_bytes(b"text")
    sides = [tmp_path / "train", tmp_path / "samples"]
    for options in (IN_FEATURES, f"{IN_PIXELS} --res 16x20"):
        lines, _ = measured(*sides, "--nearest", tmp_path / "grid.png", options, "--skip-bad")
        assert near_copies(lines) == [1, 3, 30]
        assert any(re.search(named("samples/3.png", "train/03.png"), line) for line in lines)
        assert any("samples: images, N = 3 of 4, 1 unreadable" in line for line in lines)


def test_bad_input_of_nearest(copied, tmp_path):
    real, fake = copied[1]()
    moments = dict(mu=np.zeros(48), sigma=np.eye(48))
    np.savez(tmp_path / "mu.npz", features="tests.helpers:Patches", **moments)
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((3, 16, 32, 3), np.uint8))
    mu, one, wide = (tmp_path / f"{name}.npz" for name in ("mu", "one", "wide"))
    folder = tmp_path / "folder"
    folder.mkdir()
    photo().save(folder / "a.png")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"text")
    grid = ["--nearest", tmp_path / "grid.png"]

    # The error names these words. Nothing is written.
    for args, words in (
        ([mu, fake, grid, IN_FEATURES], "--nearest mu.npz"),
        ([real, mu, grid, IN_FEATURES], "--nearest mu.npz"),
        ([real, grid], "FAKE"),
        ([real, "--save-stats stats.npz", grid], "--nearest FAKE"),
        ([real, fake, IN_PIXELS], "--nearest-in --nearest"),
        ([real, fake, grid, "--nearest-in latents"], "--nearest-in"),
        ([real, fake, grid, IN_PIXELS, "--pr"], "--nearest-in --pr"),
        ([real, fake, grid, IN_PIXELS, IN_FEATURES], "--nearest-in --features"),
        ([real, fake, grid, IN_PIXELS, "--weights a.pth"], "--nearest-in --weights"),
        ([real, fake, grid, IN_PIXELS, "--save-stats a.npz"], "--nearest-in --save-stats"),
        ([real, fake, grid, IN_PIXELS, "--selftest"], "--nearest-in --selftest"),
        ([real, fake, IN_PIXELS, "--nearest grid.jpg"], "--nearest grid.jpg .png"),
        ([real, fake, IN_PIXELS, "--nearest nowhere/grid.png"], "--nearest nowhere/grid.png"),
        ([real, folder, IN_PIXELS, "--nearest", folder / "g.png"], "--nearest folder"),
        ([real, wide, grid, IN_PIXELS], "--nearest-in --res 3x16x16 3x16x32"),
        ([one, fake, grid, IN_PIXELS], "--nearest 2 1"),
        ([real, broken, grid, IN_PIXELS], "a.png"),
        ([real, broken, grid, IN_PIXELS, "--skip-bad"], "--nearest readable"),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            measured(*args)
        message = str(error.value)
        assert re.search(named(*words.split()), message), (args, message)
        assert "\n" not in message
    assert not glob.glob(str(tmp_path / "**" / "g*.png"), recursive=True)
    assert not os.path.exists("stats.npz")

    # A folder at the place of the grid.
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(ValueError, match="cannot write .*grid.png"):
        measured(real, fake, grid, IN_PIXELS)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("space", [IN_FEATURES, IN_PIXELS])
def test_two_ranks_find_the_same_neighbors_as_one(copied, tmp_path, space):
    training, write = copied
    sides = write(training[4], training[9][:, ::-1])
    options = [*sides, space, "--batch 7 --device cpu --nearest"]
    lines, _ = measured(*options, tmp_path / "one.png")
    statuses, output, errors = on_ranks(fid.main, *options, "two.png", cwd=tmp_path)
    assert statuses == [0, 0], errors
    assert near_copies(lines) == [2, 14, 120]
    assert output.splitlines()[:-1] == lines[:-1]
    assert content_of(tmp_path / "one.png") == content_of(tmp_path / "two.png")

    # One rank has no sample, and both report too few training images once.
    np.savez(tmp_path / "one.npz", arr_0=training[:1])
    options = [sides[0], tmp_path / "one.npz", IN_PIXELS, "--device cpu --nearest a.png"]
    statuses, output, errors = on_ranks(fid.main, *options, cwd=tmp_path)
    assert statuses == [0, 0], errors
    assert near_copies(output.splitlines()) == [1, 1, 120]
    options[:2] = options[1], options[0]
    statuses, _, errors = on_ranks(fid.main, *options, cwd=tmp_path)
    assert any(statuses)
    assert errors.count("--nearest needs 2 training images") == 1


def test_mutated_images_and_arrays_give_one_line_or_success(sets, outcomes):
    random = np.random.default_rng(0)

    def measure(data):
        colors = "--features tests.helpers:Colors --save-stats out.npz --device cpu"
        return fid.main, data, colors

    def pack(data, *options):
        return train.main, "--data", data, "--res 8 --pack out.npz", *options

    def run_mutated(name, number, *commands):
        """Run commands on a file as it is, and on a number of mutations of it."""
        content = content_of(name)
        for i in range(number + 1):
            with open(name, "wb") as file:
                file.write(mutated(content, random) if i else content)
            for main, *args in commands:
                error = outcome(main, args)
                outcomes[name].append(error)

                # A command writes its output if and only if it succeeds.
                assert os.path.exists("out.npz") == (error == ""), (name, i, error)
                if i == 0:
                    assert error == "", (name, error)
                for path in glob.glob("out.npz*"):
                    os.remove(path)

    # Images of every format, next to a good one.
    os.mkdir("one")
    photo().save("one/a.png")
    for extension in ("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm", "tga", "jp2", "avif"):
        name = f"one/b.{extension}"
        photo((40, 30)).save(name)
        run_mutated(name, 20, measure("one"), pack("one", "--skip-bad"))
        os.remove(name)

    # A zip archive with stored and compressed members.
    with zipfile.ZipFile("set.zip", "w") as archive:
        for i in range(3):
            compression = zipfile.ZIP_DEFLATED if i else zipfile.ZIP_STORED
            archive.write("one/a.png", f"{i % 2}/{i}.png", compression)
    run_mutated("set.zip", 80, measure("set.zip"))

    # Array files.
    x = np.asarray(photo((32, 32)))[None].repeat(5, 0)
    labels = dict(y=np.arange(5), classes=["a", "b", "c", "d", "e"])
    np.savez("a.npz", x=x, **labels)
    np.savez_compressed("b.npz", x=x, **labels)
    np.save("c.npy", x)
    for name in ("a.npz", "b.npz", "c.npy"):
        run_mutated(name, 40, measure(name), pack(name))

    # Statistics.
    np.savez("d.npz", mu=np.zeros(9), sigma=np.eye(9), n=5, features="tests.helpers:Colors")
    run_mutated("d.npz", 60, measure("d.npz"))

    # Some mutations succeed, and some of each file fail.
    errors = {name: len(lines) - lines.count("") for name, lines in outcomes.items()}
    total = sum(len(lines) for lines in outcomes.values())
    assert sum(errors.values()) < 0.9 * total, errors
    for name in ("set.zip", "a.npz", "b.npz", "c.npy", "d.npz"):
        assert errors[name] > 5, errors


def test_a_network_may_return_none_for_its_logits():
    x = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    net = torch.nn.Identity()
    net.forward = lambda x: (x.flatten(1).float(), None)
    features, logits, spatial = fid.extract(net, x, spatial=True)
    assert features.shape == (5, 48) and logits is None and spatial is None
    assert fid.extract(net, x)[1] is None
