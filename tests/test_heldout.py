"""Tests of support/heldout.py: which images are held out, and the loss on them."""

import contextlib
import json
import math
import os
import shutil
import signal
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn

import train
from loss import diffusion_loss, elbo_bpd
from sample import mix_seed, to_float
from schedule import logsnr_schedule_cosine
from support import heldout
from support.checkpoint import build_net, load_checkpoint
from support.data import ImageData, Shapes, load_batch
from support.heldout import fixed_times, image_hashes, split
from support.settings import make_config
from support.text import CaptionedShapes
from tests.helpers import (
    TINY_RUN,
    Foreign,
    call,
    content_of,
    log_lines,
    named,
    on_ranks,
    outcome,
    photo,
    same_weights,
    skip_grid,
)

# The keys of a line of the log. The last line also has val_bpd.
KEYS = [
    "step",
    "images",
    "val_loss",
    "val_loss_ema",
    "val_loss_by_logsnr",
    "val_loss_ema_by_logsnr",
    "val_images",
]


def val_lines(out):
    """The lines of a run's log that have a held-out loss."""
    return [line for line in log_lines(out) if "val_loss" in line]


@pytest.fixture
def no_grids(monkeypatch):
    """Training draws no sample grids."""
    monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)


# ---------------------------------------------------------------- which images are held out


def held_out_rows(n):
    """The indices that a share of 0.3 holds out of n images without names."""
    return split(image_hashes(Shapes(8, length=n)), 0.3)[1]


def held_out_names(paths, share=0.3):
    """The base names of the images that a share of these folders or archives holds out."""
    data = ImageData([str(path) for path in paths], 8)
    _, indices = split(image_hashes(data), share)
    return {os.path.basename(data.reader.name(i)) for i in indices.tolist()}


def write_photos(folder, numbers):
    """Write small images NUMBER.png into two subfolders."""
    for i in numbers:
        path = folder / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo((8, 8), i).save(path)


def test_the_split_follows_from_the_name_alone(tmp_path):
    write_photos(tmp_path / "photos", range(60))
    names = held_out_names([tmp_path / "photos"])
    assert 6 < len(names) < 30

    # The folder in another place, and packed into an archive.
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere" / "moved")
    assert held_out_names([tmp_path / "elsewhere" / "moved"]) == names
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for path in (tmp_path / "photos").rglob("*.png"):
            file.write(path, path.relative_to(tmp_path / "photos"))
    assert held_out_names([tmp_path / "photos.zip"]) == names

    # More images, in this folder and in a second one, do not move the others.
    write_photos(tmp_path / "photos", range(100, 140))
    write_photos(tmp_path / "others", range(200, 220))
    more = held_out_names([tmp_path / "others", tmp_path / "photos"])
    assert {name for name in more if name < "060"} == names
    assert len(more) > len(names)

    # The split of a larger share contains that of a smaller one.
    nested = [held_out_names([tmp_path / "photos"], share) for share in (0.1, 0.2, 0.5, 0.9)]
    for smaller, larger in zip(nested, nested[1:]):
        assert smaller < larger


def test_images_without_names_are_split_by_row(tmp_path):
    x = np.zeros((50, 8, 8, 3), np.uint8)
    for name, n in (("one", 50), ("more", 40)):
        np.savez(tmp_path / f"{name}.npz", x=x[:n])
    one = ImageData([str(tmp_path / "one.npz")], 8)
    _, held_out = split(image_hashes(one), 0.3)
    assert np.array_equal(held_out, held_out_rows(50))

    # Rows are counted in each file: a second file does not move those of the first.
    both = ImageData([str(tmp_path / name) for name in ("more.npz", "one.npz")], 8)
    _, indices = split(image_hashes(both), 0.3)
    assert np.array_equal(indices[indices >= 40] - 40, held_out)
    assert np.array_equal(indices[indices < 40], held_out[held_out < 40])


def test_tar_and_parquet_files_are_split(tmp_path):
    from tests.test_shards import encoded, write_tar

    # Members have names. They decide, not the file.
    members = [(f"{i:03}.png", encoded(i)) for i in range(40)]
    write_tar(tmp_path / "all.tar", members)
    write_tar(tmp_path / "0.tar", members[:15])
    write_tar(tmp_path / "1.tar", members[15:])
    names = held_out_names([tmp_path / "all.tar"])
    assert names
    assert held_out_names([tmp_path / "0.tar", tmp_path / "1.tar"]) == names

    # The rows of Parquet files have none.
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    for i in range(2):
        table = pyarrow.table(dict(image=[encoded(i)] * 30))
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet")
    data = ImageData([str(tmp_path / f"{i}.parquet") for i in range(2)], 8)
    rows = held_out_rows(30)
    assert np.array_equal(split(image_hashes(data), 0.3)[1], [*rows, *(rows + 30)])


@pytest.mark.parametrize("dataset", [Shapes(8), CaptionedShapes(8)])
def test_a_share_is_about_that_share_and_random(dataset):
    n = len(dataset)
    kept, held_out = split(image_hashes(dataset), 0.02)
    assert kept.nbytes + held_out.nbytes == 8 * n
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(n))
    # Five standard deviations of independent draws.
    assert abs(len(held_out) - 0.02 * n) < 5 * math.sqrt(0.02 * n)
    # Neither neighbors nor classes, which are indices modulo 10, are related.
    assert abs((np.diff(held_out) == 1).mean() - 0.02) < 0.005
    assert np.bincount(held_out % 10).max() < 1.15 * len(held_out) / 10
    # Index 0 is not special.
    assert 0 not in split(image_hashes(dataset), 1e-5)[1]


class Seen(Foreign):
    """A network that writes the labels that it trains on into $SEEN, and others into $EVALUATED."""

    def forward(self, z, logsnr, label=None):
        with open(os.environ["SEEN" if self.training else "EVALUATED"], "a") as file:
            file.write("".join(f"{i}\n" for i in label.tolist()))
        return super().forward(z, logsnr, label)


def seen(path):
    """The labels in a file of Seen, a set."""
    return {int(label) for label in content_of(path).split()}


def test_held_out_images_are_never_trained_on(tmp_path, monkeypatch, no_grids):
    # Sixty images, each with its number as its label.
    monkeypatch.chdir(tmp_path)
    for name in ("seen", "evaluated"):
        monkeypatch.setenv(name.upper(), str(tmp_path / name))
    np.savez("data.npz", x=np.zeros((60, 8, 8, 3), np.uint8), y=np.arange(60))
    kept, held_out = split(image_hashes(ImageData(["data.npz"], 8)), 0.3)
    options = [
        "--data data.npz --res 8 --label-drop 0 --workers 0 --no-bf16 --batch 8 --out run",
        "--model tests.test_heldout:Seen",
    ]

    # One process sees all other images, and then two ranks, with another seed, do.
    call(train.main, *options, "--val 0.3 --val-every 3 --val-images 100 --steps 12")
    assert seen("seen") == set(kept.tolist())
    assert seen("evaluated") == set(held_out.tolist())
    os.remove("seen")
    statuses, output, errors = on_ranks(
        train.main, *options, "--steps 26 --seed 5", cwd=tmp_path, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    assert "resumed at step 12" in output
    assert seen("seen") == set(kept.tolist())
    assert seen("evaluated") == set(held_out.tolist())


def test_a_held_out_image_does_not_replace_an_unreadable_one(tmp_path):
    # Every other part of the data is unreadable.
    write_photos(tmp_path, range(40))
    data = ImageData([str(tmp_path)], 8, skip_bad=True)
    kept, held_out = split(image_hashes(data), 0.4)
    for i in [*kept[1::2], *held_out[::2]]:
        with open(data.reader.name(i), "wb") as file:
            file.write(b"no image")
    for indices, good in ((kept, kept[::2]), (held_out, held_out[1::2])):
        part = heldout.Part(data, indices)
        images, _ = part.__getitems__(list(range(len(part))))
        expected = {data.reader.read(i, (8, 8)).tobytes() for i in good}
        assert {image.numpy().tobytes() for image in images} == expected

    # Without a split, any image may replace another one, as before.
    images, _ = data.__getitems__(list(range(40)))
    assert len({image.numpy().tobytes() for image in images}) == len(kept[::2]) + len(
        held_out[1::2]
    )


# ---------------------------------------------------------------- the loss


@pytest.fixture(scope="session")
def shapes_file(tmp_path_factory):
    """An npz of 30 shapes that training never uses, with the classes in reversed order."""
    path = tmp_path_factory.mktemp("shapes") / "held-out.npz"
    images, labels = load_batch(Shapes(32, first=2**30), range(30))
    np.savez(
        path,
        x=images.permute(0, 2, 3, 1).numpy(),
        y=9 - labels.numpy(),
        classes=Shapes.classes[::-1],
    )
    return str(path)


def test_times_are_evenly_spread_for_any_number_of_images():
    times = fixed_times(np.arange(1000)).double().numpy()
    assert np.array_equal(fixed_times(np.array([7, 3])).double().numpy(), times[[7, 3]])
    for n in (1, 10, 37, 1000):
        ends = np.concatenate([[0], np.sort(times[:n]), [1]])
        assert ends[1] >= 0 and ends[-2] < 1
        # Uniform random times would have gaps of log(n) / n.
        assert np.diff(ends).max() < 2.5 / n
        assert abs(times[:n].mean() - 0.5) < 1 / n


def test_the_loss_equals_that_of_single_images(run, shapes_file, tmp_path, no_grids, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    # A path may be added to a finished run. It has reached its last step.
    call(train.main, "--out", out, "--val", shapes_file, "--val-images 20 --batch 6 --micro 3")
    (line,) = val_lines(out)
    assert list(line) == [*KEYS, "val_bpd"]
    assert (line["step"], line["images"], line["val_images"]) == (6, 48, 20)

    # The same images in the same order, one by one, with their true labels.
    state = load_checkpoint(out)
    config = state["config"]
    order = np.argsort(image_hashes(Shapes(32, length=30)), kind="stable")[:20]
    images, labels = load_batch(Shapes(32, first=2**30), order.tolist())
    for key, weights in (("val_loss", state["net"]), ("val_loss_ema", state["ema"])):
        net = build_net(config["model"], config["model_args"]).eval()
        net.load_state_dict(weights)
        bins = {}
        losses = []
        for k in range(20):
            generator = torch.Generator().manual_seed(mix_seed(0, 0, k))
            torch.rand(3, generator=generator)
            eps = torch.randn(1, 3, 32, 32, generator=generator)
            t = torch.tensor([(k + 0.5) * 0.6180339887498949 % 1])
            x, label = to_float(images[k : k + 1]), labels[k : k + 1]
            with torch.no_grad():
                loss, logsnr = diffusion_loss(
                    net, x, logsnr_schedule_cosine, label, space="v", t=t, eps=eps
                )
            losses.append(loss.item())
            bins.setdefault(str(2 * math.floor(logsnr.item() / 2)), []).append(loss.item())
        assert line[key] == pytest.approx(np.mean(losses), rel=1e-5)
        means = {name: np.mean(bins[name]) for name in bins}
        assert line[f"{key}_by_logsnr"] == pytest.approx(means, rel=1e-5)

    # The bits per dimension of the EMA weights, in two groups of 16: the second starts again.
    def schedule(t):
        return logsnr_schedule_cosine(t).clamp(max=10)

    bits = []
    for numbers, n in (([*range(16)], 16), ([*range(16, 20), *range(12)], 4)):
        torch.manual_seed(mix_seed(0, numbers[0]))
        bits.append(
            elbo_bpd(net, to_float(images[numbers]), schedule, labels[numbers], draws=4)[:n]
        )
    assert line["val_bpd"] == pytest.approx(torch.cat(bits).mean().item(), rel=1e-5)
    # Other noise gives nearly the same.
    other = elbo_bpd(net, to_float(images), lambda t: 10 - 25 * t, labels, draws=16)
    assert line["val_bpd"] == pytest.approx(other.mean().item(), rel=0.02)
    printed = capsys.readouterr().out
    assert (
        f"step 6/6  held-out loss {line['val_loss']:.4f}, of the EMA weights "
        f"{line['val_loss_ema']:.4f}, {line['val_bpd']:.3f} bits/dim (20 images)" in printed
    )


def test_training_is_the_same_with_and_without(run, shapes_file, tmp_path, no_grids, capsys):
    out = tmp_path / "run"
    options = ["--val-every 2 --val", shapes_file, "--steps 6 --out", out]
    call(train.main, *TINY_RUN, *options)
    lines = val_lines(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert ["val_bpd" in line for line in lines] == [False, False, True]
    assert same_weights(f"{run}/ckpt_0000006.pt", out / "ckpt_0000006.pt")
    # Evaluations differ by the weights, which move from step to step.
    assert len({line["val_loss"] for line in lines}) == 3

    # A step that is in the log is not measured again, and without --val none is.
    capsys.readouterr()
    call(train.main, "--out", out)
    assert "held-out loss" not in capsys.readouterr().out
    call(train.main, "--out", out, "--val --steps 7")
    assert len(val_lines(out)) == 3
    assert load_checkpoint(out)["config"]["val"] == []


def test_every_module_has_its_mode_again():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    net[1].eval()
    with heldout.evaluation(net):
        assert not any(module.training for module in net.modules())
        assert not net[1][1](torch.ones(1)).requires_grad
    assert [module.training for module in net.modules()] == [True, True, False, False, False]
    with contextlib.suppress(KeyError), heldout.evaluation(net):
        raise KeyError
    assert net[0].training


@pytest.mark.parametrize("name", ["fixed_times", "elbo_bpd"])
def test_a_signal_does_not_wait_for_the_loss(
    run, shapes_file, tmp_path, monkeypatch, no_grids, name
):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    function = getattr(heldout, name)
    calls = []

    def signaling(*args, **options):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    monkeypatch.setattr(heldout, name, signaling)
    options = ["--out", tmp_path, "--steps 5 --val", shapes_file]
    with pytest.raises(SystemExit):
        call(train.main, options)
    assert len(calls) == 1
    assert not val_lines(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 5

    # The resumed run measures it.
    monkeypatch.setattr(heldout, name, function)
    call(train.main, options)
    assert [line["step"] for line in val_lines(tmp_path)] == [5]


def test_its_time_counts_as_elsewhere(monkeypatch):
    clock = [0.0]

    def slow(run, interrupted):
        clock[0] += 8
        return 15

    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(train, "log_held_out", slow)
    monkeypatch.setattr(train, "is_due", lambda run, name: name == "val_every")
    config = dict(model_args={}, res=32)
    run = train.Run(config, "", 0, 1, torch.device("cpu"), Shapes(32), held_out=True)
    assert train.observe(run) == 15
    assert train.observe(run, has_val=True) == 0
    assert run.elsewhere == 8


def test_tensorboard_shows_the_whole_log(run, shapes_file, tmp_path, monkeypatch, no_grids):
    shown = {}

    class Writer:
        def __init__(self, folder, purge_step):
            pass

        def add_scalar(self, name, value, step):
            shown[name, step] = value

        def close(self):
            shown["closed"] = True

    monkeypatch.setattr(train, "tensorboard_writer", lambda: Writer)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    call(train.main, "--out", tmp_path, "--tensorboard --val", shapes_file)
    expected = {"closed": True}
    for line in log_lines(tmp_path):
        for key, value in line.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for k, number in numbers.items():
                expected[f"{key}/{k}".strip("/"), line["step"]] = number
    assert shown == expected
    names = {name for name, *_ in shown}
    assert {"lr", "grad_norm", "loss_by_logsnr/0", "val_loss_ema", "val_bpd"} <= names


# ---------------------------------------------------------------- kinds of data

FOREIGN = "--model tests.helpers:Foreign --res 8 --batch 4 --steps 2 --no-bf16 --out run"


@pytest.fixture
def folder(tmp_path, monkeypatch, no_grids):
    """An empty folder, in which the test works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_as_held_out_images(folder):
    write_photos(folder / "train", range(12))
    write_photos(folder / "test", range(20, 26))
    # A class that the held-out images lack.
    (folder / "train" / "c").mkdir()
    photo((8, 8), 50).save(folder / "train" / "c" / "c.png")
    call(train.main, FOREIGN, "--data train --workers 1 --val test")
    (line,) = val_lines("run")
    assert line["val_images"] == 6
    config = load_checkpoint("run")["config"]
    assert config["val"] == [str(folder / "test")]
    assert (config["val_every"], config["val_images"]) == (config["sample_every"], 1000)

    # Held-out images that are labeled by other names.
    os.rename("test/a", "test/d")
    with pytest.raises(ValueError, match=named("--val", folder / "test", "class", "d")):
        call(train.main, FOREIGN, "--data train")
    # Held-out images without labels, and training images without.
    os.rename("test/b/021.png", "test/021.png")
    with pytest.raises(ValueError, match=named("--val", folder / "test", "labels")):
        call(train.main, FOREIGN, "--data train")
    os.rename("train/c/c.png", "train/c.png")
    shutil.rmtree("run")
    call(train.main, FOREIGN, "--data train --workers 0 --val test")


def test_a_number_is_a_path_if_there_is_such_a_file(folder):
    write_photos(folder / "0.02", range(3))
    call(train.main, FOREIGN, "--data 0.02 --val-images 5 --val 0.5")
    assert load_checkpoint("run")["config"]["val"] == [0.5]
    with pytest.raises(ValueError, match=named("run", "--val", "--out")):
        call(train.main, FOREIGN, "--val 0.02")
    with pytest.raises(ValueError, match=named("--val", folder / "0.02", "--data")):
        call(train.main, FOREIGN, "--data 0.02 --val 0.02 --out other")


def test_a_dataset_class_as_held_out_images(folder):
    name = "tests.test_heldout:Pairs"
    call(train.main, FOREIGN, "--val", name)
    (line,) = val_lines("run")
    assert line["val_images"] == 20
    # A checkpoint does not import it.
    with pytest.raises(ValueError, match=named("--val", name)):
        call(train.main, FOREIGN)
    call(train.main, FOREIGN, "--val", name)
    # Its messages name the option.
    with pytest.raises(ValueError, match=named("--val", "tests.test_heldout:None")):
        call(train.main, FOREIGN, "--val tests.test_heldout:None")

    # And a share of such a dataset.
    call(train.main, FOREIGN, "--data", name, "--workers 0 --val 0.3 --out other")
    assert val_lines("other")[0]["val_images"] == len(
        split(image_hashes(Shapes(8, length=20)), 0.3)[1]
    )


class Pairs:
    """A dataset class with two of the classes of Shapes, in another order."""

    classes = ["moon", "circle"]

    def __init__(self, res):
        self.res = res

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return np.full((self.res, self.res, 3), 9 * i, np.uint8), i % 2


def test_held_out_latents(folder):
    z = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    labels = dict(y=np.arange(40) % 2, classes=["a", "b"])
    np.savez("train.npz", z=z, **labels)
    np.savez("test.npz", z=z[:9], y=np.arange(9) % 2, classes=["b", "a"])
    np.savez("images.npz", x=np.zeros((9, 8, 8, 3), np.uint8), y=labels["y"][:9])
    np.savez(
        "wide.npz", z=np.zeros((9, 4, 8, 8), np.float32), y=labels["y"][:9], classes=["a", "b"]
    )
    latents = FOREIGN.replace("tests.helpers:Foreign", "tests.test_heldout:OnLatents")
    for val, n in (
        ("0.3", len(held_out_rows(40))),
        ("test.npz", 9),
    ):
        call(train.main, latents, "--data train.npz --workers 0 --val", val, "--out", f"run-{n}")
        (line,) = val_lines(f"run-{n}")
        assert list(line) == KEYS  # without val_bpd
        assert line["val_images"] == n
    for val in ("images.npz", "wide.npz"):
        with pytest.raises(ValueError, match=named("--val", folder / val, "latents")):
            call(train.main, latents, "--data train.npz --val", val)


class OnLatents(Foreign):
    """A network for latents of three channels."""

    def __init__(self, res, num_classes, in_channels):
        super().__init__(res, num_classes)


def test_held_out_captions(folder):
    text = [*TINY_RUN, "--captions --steps 2 --out"]
    call(train.main, *text, "share", "--val 0.01 --val-images 9")
    assert val_lines("share")[0]["val_images"] == 9

    # Files next to images. A list of captions names the training images only.
    for name, numbers in (("train", range(9)), ("test", range(20, 25))):
        write_photos(folder / name, numbers)
        for path in (folder / name).rglob("*.png"):
            path.with_suffix(".txt").write_text(f"photo {path.stem}")
    call(train.main, *text, "files", "--data train --workers 0 --val test")
    assert val_lines("files")[0]["val_images"] == 5
    with open("list.jsonl", "w") as file:
        for path in (folder / "train").rglob("*.png"):
            file.write(json.dumps(dict(file=path.name, text="a photo")) + "\n")
    for path in (folder / "train").rglob("*.txt"):
        path.unlink()
    options = "--data train --workers 0 --captions list.jsonl --steps 1 --out list"
    with pytest.raises(ValueError, match=named("--val", folder / "test", "--captions")):
        call(train.main, *TINY_RUN, options, "--val test")
    call(train.main, *TINY_RUN, options, "--val 0.3")


# ---------------------------------------------------------------- bad input


def test_bad_values_get_one_line(folder):
    write_photos(folder / "photos", range(5))
    os.mkdir("empty")
    np.savez("set.npz", x=np.zeros((6, 8, 8, 3), np.uint8), x_test=np.zeros((4, 8, 8, 3), np.uint8))
    os.symlink("photos", "link")
    data = "--data photos"
    cases = [
        ("--val 0", "--val 0"),
        ("--val 1", "--val 1"),
        ("--val 1.5", "--val 1.5"),
        ("--val -0.1", "--val -0.1"),
        ("--val nan", "--val nan"),
        ("--val nowhere", "nowhere"),
        ("--val 0.1 0.2", "0.1"),
        ("--val empty", "empty"),
        ("--val photos", f"--val {folder}/photos"),
        # Parts of five images.
        (f"{data} --val 0.0001", "--val 0.0001 none 5"),
        (f"{data} --val 0.9999", "--val 0.9999 all 5"),
        # Options of the held-out loss alone.
        ("--val-every 5", "--val-every --val"),
        ("--val-images 5", "--val-images --val"),
        ("--val-every 0 --val 0.1", "--val-every 0"),
        ("--val-images 0 --val 0.1", "--val-images 0"),
        # The same images, seen from either side.
        (f"{data} --val photos", f"--val --data {folder}/photos"),
        (f"{data} --val empty photos/a", f"--val --data {folder}/photos/a"),
        (f"{data} --val link/b", f"--val --data {folder}/photos/b"),
        ("--data photos/a --val photos", f"--val --data {folder}/photos"),
        ("--data set.npz --val set.npz:x", "--val --data set.npz"),
        ("--data tests.test_heldout:Pairs --val tests.test_heldout:Pairs", "--val --data"),
        ("--val tests.test_heldout:Pairs photos", "--val tests.test_heldout:Pairs"),
    ]
    for options, words in cases:
        line = outcome(train.main, ["--res 8 --size tiny --model tests.helpers:Foreign", options])
        for word in words.split():
            assert word in line, (options, line)
    assert not os.path.exists("runs")

    # Two arrays of one file are different images.
    call(train.main, FOREIGN, "--data set.npz --workers 0 --val set.npz:x_test")
    assert val_lines("run")[0]["val_images"] == 4


def test_a_share_cannot_be_changed_later(run, shapes_file, tmp_path, no_grids):
    # A run without a share has trained on all images.
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with pytest.raises(ValueError, match=named(tmp_path, "--val", "--out")):
        call(train.main, "--out", tmp_path, "--val 0.02")

    # A run with one must not train on these.
    out = tmp_path / "share"
    call(train.main, *TINY_RUN, "--val 0.02 --val-images 3 --steps 1 --out", out)
    for val in ("--val 0.03", "--val", f"--val {shapes_file}"):
        with pytest.raises(ValueError, match=named(out, "0.02", "--val", "--out")):
            call(train.main, "--out", out, val)
    call(train.main, "--out", out, "--val .02 --val-images 4 --val-every 1 --steps 2")
    assert [line["val_images"] for line in val_lines(out)] == [3, 4]

    # Of other data, other images are held out.
    with pytest.raises(ValueError, match=named(out, "share", "--out")):
        call(train.main, "--out", out, "--steps 3 --data", shapes_file)

    # The same images, named by a folder below: their names, and so the split, differ.
    images = tmp_path / "images"
    (images / "all").mkdir(parents=True)
    for i in range(30):
        photo((8, 8), i).save(images / "all" / f"{i}.png")
    below = tmp_path / "below"
    call(train.main, *TINY_RUN, "--val 0.3 --steps 1 --data", images, "--out", below)
    with pytest.raises(ValueError, match=named(below, "--data", "--out")):
        call(train.main, "--out", below, "--steps 2 --data", images / "all")

    # A corrupt checkpoint.
    for val in ([1], [None, "x"], [0.1, 0.2]):
        with pytest.raises(ValueError, match="val"):
            train.continue_config({}, load_checkpoint(out)["config"] | dict(val=val), "x", False)


# ---------------------------------------------------------------- a GPU


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_gpu_is_waited_for_at_the_end_only():
    from tests.test_fake_cuda import CUDA, NETS, fake_gpu

    dataset = Shapes(32, "cuda")
    given = dict(model="uvit", model_args=NETS["uvit"], size="tiny", compile=False, res=32)
    given |= dict(steps=2, batch=4, val=[0.02], val_images=10)
    with fake_gpu() as waits:
        config = make_config(given, CUDA, dataset)
        run = train.Run(config, "", 0, 1, CUDA, dataset, step=2)
        run.schedule = train.make_schedule(config["schedule"], 32)
        run.loss_fn = train.choose_loss(config)
        run.held_out = heldout.open_held_out(config, dataset, CUDA, False, None)
        train.build(run, None)
        waits.clear()
        logs, stop = heldout.measure_losses(run, lambda: 0)
        assert not waits and not stop
        for log in logs:
            assert log.bins.device == CUDA

        # The bound on the likelihood waits twice per group, and there is one. The sums that are
        # read at the end are zeros here.
        with contextlib.suppress(ZeroDivisionError):
            heldout.measure_bits(run, lambda: 0)
        assert waits == [
            "elbo_bpd: _to_copy",
            "_prior_nats: _local_scalar_dense",
            "measure_bits: _to_copy",
        ]
