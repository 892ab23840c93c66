"""Tests of support/data.py: datasets, their order, and training on them."""

import os
import re
import shutil
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import sample as sampling
import train
from loss import diffusion_loss
from sample import mix_seed, sample
from support import runtime
from support.bench import training_flops
from support.checkpoint import load, load_checkpoint
from support.data import ImageData, Shapes, example_noise, image_order, load_batch, open_dataset
from support.settings import DEFAULTS
from tests.helpers import (
    HERE,
    TINY_RUN,
    call,
    log_lines,
    measured,
    named,
    no_grid,
    on_ranks,
    outcome,
    photo,
    resumed_at,
    skip_grid,
    torchrun,
)

# ---------------------------------------------------------------- datasets, order and noise


def test_shapes_follow_from_their_index():
    images, labels = load_batch(Shapes(32), range(40))
    assert images.dtype == torch.uint8
    assert images.shape == (40, 3, 32, 32)
    assert labels.tolist() == [i % 10 for i in range(40)]

    # All images differ. An image depends neither on its batch nor on the start of the dataset.
    assert len(torch.unique(images.flatten(1), dim=0)) == 40
    assert torch.equal(images[7:9], load_batch(Shapes(32), [7, 8])[0])
    assert torch.equal(images[30:], load_batch(Shapes(32, first=30), range(10))[0])

    # An index gives the same image at any resolution.
    large, _ = load_batch(Shapes(64), range(40))
    pooled = F.avg_pool2d(large.float(), 2)
    assert (pooled - images.float()).abs().mean() < 4
    assert load_batch(Shapes((32, 48)), range(2))[0].shape == (2, 3, 32, 48)


def test_distances_of_shapes_agree_with_the_images():
    class White(Shapes):
        """White shapes on black, with a texture of one value per image."""

        def _background(self, u, x, y):
            return torch.zeros(len(u), 3, len(y), len(x))

        def _color(self, hue, value, saturation):
            return torch.ones(len(hue), 3, 1, 1)

        def _along(self, u, x, y):
            return torch.zeros(len(u), len(y), len(x))

    data = White((32, 40), first=2**30)
    images, _ = load_batch(data, range(50))
    distance = data.distances(range(50))
    assert distance.shape == (50, 32, 40)

    # The coverage falls from 1 to 0 over one pixel, which is 1/16. The texture adds up to 0.04.
    coverage = (0.5 - 16 * distance).clamp(0, 1)
    assert (images / 255 - coverage[:, None]).abs().max() <= 0.045

    # A distance changes by at most a pixel per pixel. Colors have no effect on it.
    for axis in (1, 2):
        assert distance.diff(dim=axis).abs().max() <= 1.001 / 16
    assert torch.equal(distance, Shapes((32, 40), first=2**30).distances(range(50)))

    # All shapes have an inside and an outside, and an image depends on its index alone.
    assert (distance.amin((1, 2)) < 0).all()
    assert (distance.amax((1, 2)) > 0).all()
    assert torch.equal(distance[7:9], data.distances([7, 8]))


def test_image_data_crops_and_resizes(tmp_path):
    # The central square of 40 pixels is bright, and the sides beyond it are black.
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200
    wide[:, 20:30, 0] = 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "tall.jpg", quality=100)

    data = ImageData([tmp_path], 10)
    images, labels = load_batch(data, [1])
    assert images.shape == (1, 3, 10, 10)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0]
    assert data.classes == []

    # Four pixels become one: column 3 of 10 was columns 22 to 25 of the wide image.
    red, green, _ = images[0]
    assert (green[:, 2:8] == 200).all()
    assert (red[:, 3] - 100.0).abs().max() < 10

    # The tall image is the same, but through JPEG and its draft mode.
    turned = load_batch(data, [0])[0][0].mT
    assert (turned - images[0].float()).abs().mean() < 4


def test_every_epoch_sees_each_image_once_for_any_split():
    def order(parts, seen, n):
        """The indices in the next n micro-batches, in one list."""
        micro_batches = image_order(10, 5, 6, seen, parts)
        return [index for _ in range(n) for index in next(micro_batches)]

    # Five batches of 6 images are three epochs of 10.
    whole = order([range(6)], 0, 5)
    assert sorted(whole[:10]) == list(range(10))
    assert sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]

    # Older checkpoints resume in this order: the permutation of an epoch has a seed of its own.
    for epoch in range(3):
        generator = torch.Generator().manual_seed(mix_seed(5, epoch))
        permutation = torch.randperm(10, generator=generator).tolist()
        assert whole[10 * epoch : 10 * epoch + 10] == permutation

    # Two micro-batches per batch, and a run resumed after 18 images, see the same order.
    assert order([range(0, 3), range(3, 6)], 0, 10) == whole
    assert order([range(6)], 18, 2) == whole[18:]


def test_example_noise_depends_on_the_position_in_the_batch():
    u, eps = example_noise(0, 3, range(4), (3, 8, 8), "cpu")
    u_of_last, eps_of_last = example_noise(0, 3, range(2, 4), (3, 8, 8), "cpu")
    assert torch.equal(u[2:], u_of_last)
    assert torch.equal(eps[2:], eps_of_last)
    assert len(u.unique()) == 12

    # Another training step has other noise.
    _, eps_of_next_step = example_noise(0, 4, range(4), (3, 8, 8), "cpu")
    assert not torch.equal(eps, eps_of_next_step)


# ---------------------------------------------------------------- latents

LATENT_NET = ["--model-args", '{"base_channels": 8, "emb_channels": 16}']


def write_latents(path, **others):
    """Write 40 random latents of three classes, with other arrays if given. Returns the path."""
    z = 3 * np.random.default_rng(0).standard_normal((40, 5, 8, 8))
    arrays = dict(z=z.astype(np.float32), y=np.arange(40) % 3, classes=["a", "b", "c"])
    np.savez(path, **arrays | others)
    return str(path)


def open_latents(path, res):
    """The dataset of a file of latents."""
    return open_dataset(DEFAULTS | dict(data=[str(path)], res=res))


@pytest.mark.slow
def test_two_ranks_train_on_latents_and_sample_them_as_one_does(tmp_path):
    path = write_latents(tmp_path / "latents.npz")
    options = ["--data", path, "--res 8 --steps 2 --batch 4 --no-bf16 --device cpu", *LATENT_NET]

    # Training gives the same weights on one rank, on two, and with FSDP.
    call(train.main, *options, "--out", tmp_path / "one")
    expected = load_checkpoint(f"{tmp_path}/one")["net"]
    for out, extra in (("two", []), ("split", ["--fsdp"])):
        statuses, _, errors = on_ranks(train.main, *options, *extra, "--out", out, cwd=tmp_path)
        assert statuses == [0, 0], errors
        weights = load_checkpoint(f"{tmp_path}/{out}")["net"]
        assert max((expected[key] - weights[key]).abs().max() for key in expected) < 1e-3

    # Sampling gives the same latents on one rank and on two.
    options = "--number 7 --batch 2 --steps 3 --no-bf16 --device cpu"
    run = tmp_path / "one"
    call(sampling.main, run, options, "--out", tmp_path / "one.npz")
    script = f"{HERE}/sample.py"
    with torchrun(script, run, options, "--out two.npz", cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    one = np.load(tmp_path / "one.npz")
    two = np.load(tmp_path / "two.npz")
    np.testing.assert_allclose(one["z"], two["z"], atol=1e-4)
    assert one["y"].tolist() == two["y"].tolist()
    assert np.abs(one["z"]).max() > 1


def test_latents_are_trained_on_and_sampled_unchanged(tmp_path, monkeypatch, capsys):
    path = write_latents(tmp_path / "latents.npz")
    out = tmp_path / "run"
    shown = []

    def recorded_loss(net, x, schedule, label, **options):
        shown.append((x, label))
        return diffusion_loss(net, x, schedule, label, **options)

    # The first training step sees the latents of the file, neither scaled nor flipped.
    monkeypatch.setattr(train, "diffusion_loss", recorded_loss)
    options = "--res 8 --steps 3 --batch 4 --label-drop 0 --sample-every 1 --workers 0"
    call(train.main, "--data", path, options, *LATENT_NET, "--out", out)
    z, y = np.load(path)["z"], np.load(path)["y"]
    first = next(image_order(40, 0, 4, 0, [range(4)]))
    x, label = shown[0]
    assert torch.equal(x, torch.from_numpy(z[first]))
    assert label.tolist() == y[first].tolist()

    # The network has the channels of the latents. There are no sample grids.
    net, config, schedule = load(out)
    assert config["model_args"]["in_channels"] == 5
    assert net.head.conv.out_channels == 5
    assert config["flip"] is False
    assert config["classes"] == ["a", "b", "c"]
    assert not list(out.glob("*.png"))
    assert training_flops(config) > 0

    # Sampling draws latents, without clipping.
    call(sampling.main, out, "--n 7 --batch 3 --steps 3 --no-bf16 --out", tmp_path / "z.npz")
    label = torch.arange(7) % 3
    expected = sample(net, (7, 5, 8, 8), schedule, steps=3, label=label, clip=None).numpy()
    with np.load(tmp_path / "z.npz") as drawn:
        np.testing.assert_allclose(drawn["z"], expected, atol=1e-5)
        assert drawn["z"].dtype == np.float32
        assert np.abs(drawn["z"]).max() > 1
        assert drawn["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]

    # The file of samples is a dataset again, and another one.
    again = open_latents(tmp_path / "z.npz", 8)
    assert len(again) == 7
    assert again.classes == ["a", "b", "c"]
    assert again.size == (8, 8)
    assert str(again) != str(open_latents(path, 8))

    # The run can be resumed.
    call(train.main, "--out", out, "--steps 4")
    assert resumed_at(capsys.readouterr().out) == [3]

    # Latents are no images: they cannot be drawn as a grid, and have no range to clip to.
    with pytest.raises(ValueError, match=named(out, "--out")):
        call(sampling.main, out, "--out grid.png")
    with pytest.raises(ValueError, match=named(out, "--clip")):
        call(sampling.main, out, "--out z.npz --clip static")

    # The run cannot be resumed on latents with another number of channels.
    other = write_latents(tmp_path / "other.npz", z=np.zeros((40, 6, 8, 8), np.float32))
    with pytest.raises(ValueError, match=named(out)):
        call(train.main, "--data", other, "--out", out)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--res 16"], "latents.npz 8x8 --res 16"),
        (["--res 8 --flip"], "--flip"),
        (["--res 8 --fid-every 1"], "--fid-every"),
        (["--res 8 --model-args", '{"in_channels": 3}'], "in_channels"),
    ],
)
def test_training_on_latents_rejects_options_for_images(tmp_path, options, message):
    path = write_latents(tmp_path / "latents.npz")
    with pytest.raises(ValueError, match=named(*message.split())):
        call(train.main, "--data", path, "--out", tmp_path / "none", *options)


@pytest.mark.parametrize("channels", [3, 5])
def test_training_on_images_rejects_a_number_of_channels(tmp_path, channels):
    model_args = f'{{"in_channels": {channels}}}'
    with pytest.raises(ValueError, match="in_channels"):
        call(train.main, "--model-args", model_args, "--steps 1 --out", tmp_path / "none")


def test_latents_without_labels_and_in_half_precision(tmp_path):
    np.savez(tmp_path / "z.npz", z=np.ones((4, 2, 8, 16), np.float16))
    data = open_latents(tmp_path / "z.npz", "8x16")
    z, y = load_batch(data, [0, 3])
    assert z.dtype == torch.float32
    assert z.shape == (2, 2, 8, 16)
    assert y.tolist() == [0, 0]
    assert data.classes == []

    # Samples have no labels either.
    run = tmp_path / "run"
    options = "--res 8x16 --steps 1 --batch 2"
    call(train.main, "--data", tmp_path / "z.npz", options, *LATENT_NET, "--out", run)
    call(sampling.main, run, "--n 3 --steps 1 --out", tmp_path / "drawn.npz")
    assert np.load(tmp_path / "drawn.npz").files == ["z"]
    drawn = open_latents(tmp_path / "drawn.npz", "8x16")
    assert load_batch(drawn, [2])[0].shape == (1, 2, 8, 16)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(z=np.zeros((40, 5, 8, 8), np.uint8)),
        dict(z=np.zeros((40, 8, 8), np.float32)),
        dict(z=np.zeros((0, 5, 8, 8), np.float32)),
        dict(y=np.arange(3)),
        dict(y=np.arange(40)),
        dict(y=np.zeros(40)),
        dict(y=np.arange(40) % 3, classes=[]),
    ],
)
def test_invalid_latents_are_rejected(tmp_path, arrays):
    path = write_latents(tmp_path / "latents.npz", **arrays)
    with pytest.raises(ValueError, match=named("latents.npz", "z")):
        open_latents(path, 8)


# ---------------------------------------------------------------- image files


def test_training_on_own_images(tmp_path):
    for i in range(6):
        folder = tmp_path / "my set" / ("sun" if i % 2 else "moon")
        folder.mkdir(parents=True, exist_ok=True)
        photo((50, 40), i).save(folder / f"{i}.jpg")
    out = tmp_path / "run"
    call(train.main, *TINY_RUN, "--steps 2 --data", tmp_path / "my set", "--workers 1 --out", out)
    assert load(out)[1]["classes"] == ["moon", "sun"]


def test_packed_images_equal_those_of_the_folder(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for data, out in ((sets / "real", "labeled.npz"), (sets / "real.npy", "plain.npz")):
        call(train.main, "--data", data, "--res 8 --pack", out)
        assert re.search(named(40, out), capsys.readouterr().out)

        # The packed file holds the same images, labels and classes. It is mapped, not read.
        original, packed = ImageData([data], 8), ImageData([tmp_path / out], 8)
        images, labels = load_batch(original, range(40))
        packed_images, packed_labels = load_batch(packed, range(40))
        assert torch.equal(images, packed_images)
        assert torch.equal(labels, packed_labels)
        assert original.classes == packed.classes
        assert isinstance(packed.reader.sources[0][0], np.memmap)

        # NumPy can read the file without pickle.
        with np.load(out, allow_pickle=False) as arrays:
            assert arrays["x"].shape == (40, 8, 8, 3)
            assert ("y" in arrays) == (out == "labeled.npz")

    # A damaged image is an error, and leaves no file behind.
    shutil.copytree(sets / "real", tmp_path / "bad")
    (tmp_path / "bad" / "0" / "broken.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="broken.png"):
        call(train.main, "--data bad --res 8 --pack bad.npz")
    assert sorted(os.listdir()) == ["bad", "labeled.npz", "plain.npz"]

    # Training resizes packed images of another size.
    call(train.main, *TINY_RUN, "--steps 1 --data plain.npz --res 32 --out run")


def test_spaces_and_unicode_in_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    original, packed = "my images [ä] 図", "packed ü.npz"
    for i in range(6):
        folder = tmp_path / original / ("Möwe *" if i % 2 else "猫 ?")
        folder.mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(folder / f"image {i} é.png")
    call(train.main, "--data", original, "--res 32 --pack", packed)

    for data in (original, packed):
        # Train one step, and resume for another.
        run = f"run [1] {data}"
        for steps in ("1", "2"):
            options = ["--data", data, "--workers 0 --steps", steps, "--out", run]
            call(train.main, *TINY_RUN, *options)
        assert resumed_at(capsys.readouterr().out) == [1]

        # Sample one class into a folder.
        options = ["--n 4 --steps 1 --label", "Möwe *", "--out", "samples ñ/"]
        call(sampling.main, run, *options)
        assert len(fid.ImageReader(tmp_path / "samples ñ")) == 4

        # Compare the folder with the dataset.
        options = "--features tests.helpers:Colors --res 32 --save-stats"
        lines, _ = measured(data, "samples ñ", options, "stats ß.npz")
        assert lines[0].startswith(f"{data}: ")
        assert lines[0].endswith("N = 6")
        shutil.rmtree("samples ñ")
        os.remove("stats ß.npz")


# ---------------------------------------------------------------- images that cannot be read


def write_bad_images(folder):
    """Write 5 readable images and 6 that are not. Returns the names of the 6, sorted."""
    folder.mkdir()
    for i in range(5):
        photo((40, 40), i).save(folder / f"good{i}.png")

    # Truncated, empty, and not an image.
    photo((99, 99)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"text")

    # A header that promises 40,000 x 40,000 pixels, with a valid checksum.
    Image.new("1", (8, 8)).save(folder / "bomb.png")
    content = bytearray((folder / "bomb.png").read_bytes())
    content[16:24] = (40000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(content)

    # Reading a pipe without a writer never ends. The link leads nowhere.
    os.mkfifo(folder / "pipe.png")
    os.symlink("nowhere.png", folder / "link.png")
    return ["bomb.png", "cut.jpg", "link.png", "pipe.png", "text.png", "zero.png"]


def image_names(text):
    """The first name of an image in each line, sorted."""
    found = [re.search(r"\w+\.(png|jpg)\b", line) for line in text.splitlines()]
    return sorted(name[0] for name in found if name)


def test_bad_images_stop_training_or_are_named_once_and_counted(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "data"
    bad = write_bad_images(folder)
    no_grid(monkeypatch)

    # By default a bad image ends the run.
    options = [*TINY_RUN, "--data", folder, "--out", tmp_path / "run", "--steps 5"]
    with pytest.raises(ValueError, match="|".join(map(re.escape, bad))):
        call(train.main, *options, "--workers 0")
    capfd.readouterr()

    # With --skip-bad, two workers name each bad image once in almost four epochs.
    call(train.main, *options, "--skip-bad --workers 2")
    output, errors = capfd.readouterr()
    assert image_names(errors) == bad, errors

    # The run counts them, on the line before the last, and in its log.
    assert "step 5/5" in output
    assert re.search(r"\b6\b\D*$", output.splitlines()[-2])
    assert log_lines(tmp_path / "run")[-1]["skipped"] == 6

    # The next readable image takes the place of a bad one: good0 that of bomb, by way of cut.
    data = ImageData([folder], 8, skip_bad=True)
    images, _ = load_batch(data, range(11))
    good0 = fid.ImageReader(folder).read(2, (8, 8))
    assert torch.equal(images[0], torch.from_numpy(good0.copy()).permute(2, 0, 1))

    # Packing replaces bad images in the same way.
    path = tmp_path / "packed.npz"
    call(train.main, "--data", folder, "--res 8 --skip-bad --pack", path)
    assert np.array_equal(np.load(path)["x"], images.permute(0, 2, 3, 1))

    # If no image can be read, the error does not blame a single one.
    for good in folder.glob("good*"):
        good.unlink()
    data = ImageData([folder], 8, skip_bad=True)
    with pytest.raises(ValueError) as error:
        load_batch(data, [3])
    assert not any(name in str(error.value) for name in bad)


def test_two_ranks_name_and_count_bad_images_together(tmp_path):
    bad = write_bad_images(tmp_path / "data")
    options = "--steps 8 --log-every 1 --data data --skip-bad --workers 1 --sample-every 1000"
    statuses, _, errors = on_ranks(
        train.main, *TINY_RUN, options, "--out run", cwd=tmp_path, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    assert log_lines(tmp_path / "run")[-1]["skipped"] == len(bad)
    assert set(image_names(errors)) == set(bad)


# ---------------------------------------------------------------- changes between two runs


class Unsafe:
    """A dataset class that must not be called by two threads at once."""

    def __init__(self, res):
        self.calls = 0

    def __len__(self):
        return 200

    def __getitem__(self, i):
        self.calls += 1
        assert self.calls == 1
        time.sleep(1e-4)  # lets other threads run
        self.calls -= 1
        return torch.full((8, 8, 3), i, dtype=torch.uint8), 0


def test_packing_calls_a_dataset_class_from_one_thread(tmp_path):
    call(train.main, "--data tests.test_data:Unsafe --res 8 --workers 8 --pack", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as packed:
        assert (packed["x"][:, 0, 0, 0] == np.arange(200)).all()


def test_skip_bad_needs_image_files(tmp_path):
    np.savez(tmp_path / "z.npz", z=np.zeros((2, 4, 8, 8), np.float32))
    for data in ([], ["--data", tmp_path / "z.npz"]):
        with pytest.raises(ValueError, match="--skip-bad"):
            call(train.main, "--res 8 --skip-bad --steps 1 --out", tmp_path / "run", *data)


def test_splits_are_refused_for_training_and_packing(tmp_path, outcomes):
    for i, folder in enumerate(("train/cat", "train/dog", "val/cat")):
        path = tmp_path / "imagenet" / folder
        path.mkdir(parents=True)
        photo((40, 40), i).save(path / f"{i}.png")
    for options in ("--out run", "--pack packed.npz"):
        line = outcome(train.main, f"--data imagenet --res 32 --steps 1 {options}")
        assert re.search(named("imagenet/train"), line), line
    assert os.listdir() == ["imagenet"]
    assert outcome(train.main, "--data imagenet/train --res 32 --pack packed.npz") == ""


def test_too_little_shared_memory_is_an_error(tmp_path, monkeypatch, outcomes):
    np.savez("data.npz", x=np.zeros((8, 32, 32, 3), np.uint8))
    options = [*TINY_RUN, "--data data.npz --steps 1 --out run --workers"]

    # Two workers prepare two batches of 8 images each: 4 (8 x 3072 + 8 x 8) bytes.
    needed = 4 * 8 * (3 * 32 * 32 + 8)
    for free, workers, fits in ((needed, 2, True), (needed - 1, 2, False), (0, 0, True)):
        shutil.rmtree("run", ignore_errors=True)
        usage = shutil._ntuple_diskusage(1, 1, free)
        monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path, usage=usage: usage)
        line = outcome(train.main, [*options, workers])
        assert bool(line) != fits, line
        if not fits:
            assert re.search(named("/dev/shm", "--shm-size", "--ipc=host", "--workers"), line)


def test_resume_reports_changed_data_and_software(tmp_path, monkeypatch, capsys):
    no_grid(monkeypatch)
    folder, file = tmp_path / "data", tmp_path / "data.npz"

    def write_file(value, labels):
        images = np.full((6, 32, 32, 3), value, np.uint8)
        np.savez(file, x=images, y=labels, classes=["a", "b"])

    for i in range(6):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(path)
    write_file(0, np.arange(6) % 2)

    changes = {
        folder: [
            # Another size of an image, another class of it, and one image more.
            lambda: photo((50, 40)).save(folder / "a" / "0.png"),
            lambda: os.rename(folder / "a" / "0.png", folder / "b" / "0.png"),
            lambda: photo().save(folder / "a" / "new.png"),
        ],
        file: [
            # Other pixels, and other labels.
            lambda: write_file(1, np.arange(6) % 2),
            lambda: write_file(1, np.arange(6) // 3),
        ],
    }
    for data, todo in changes.items():
        out = tmp_path / f"run {data.name}"
        options = ["--data", data, "--workers 0 --out", out]
        call(train.main, *TINY_RUN, *options, "--steps 1")
        for step, change in enumerate(todo, 1):
            # The line of a resumed run says that the data changed if it did, and only then.
            for changed in (False, True):
                if changed:
                    change()
                capsys.readouterr()
                call(train.main, *options, "--steps", step + changed)
                output = capsys.readouterr().out
                (line,) = [line for line in output.splitlines() if resumed_at(line)]
                report = re.search(r"\d+ \(\w{8}\)\D+\d+ \(\w{8}\)", line)
                assert bool(report) == changed, line

    # Another version of torch is reported, too.
    before = load_checkpoint(out)["config"]["torch"]
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    call(train.main, *options)
    assert re.search(rf"torch {re.escape(before)}\D+2\.0\.0", capsys.readouterr().out)
