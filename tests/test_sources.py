"""Tests of support/sources.py: the formats of others, and what their files may contain."""

import io
import json
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import train
from support.data import ImageData, is_dataset_class, load_batch
from support.settings import default_folder
from support.sources import braces, expand, open_source, split_keys
from tests.helpers import TINY_RUN, call, log_lines, named, no_grid, outcome, photo

# ---------------------------------------------------------------- dataset.json of EDM and StyleGAN

NAMES = [f"{i // 4:05}/img{i:08}.png" for i in range(8)]
LABELS = [6, 2, 0, 6, 1, 2, 2, 0]
PAIRS = [[name, label] for name, label in zip(NAMES, LABELS)]


def write_edm(root, content, names=NAMES):
    """Write images and a dataset.json as the dataset tool does. content: JSON, text or bytes."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo((8, 8), i).save(path)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    (root / "dataset.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def zipped(root):
    """Put a folder into a zip file, without compression as the dataset tool does."""
    with zipfile.ZipFile(f"{root}.zip", "w") as archive:
        for path in sorted(os.path.join(d, f) for d, _, files in os.walk(root) for f in files):
            archive.write(path, os.path.relpath(path, root))
    return f"{root}.zip"


def test_labels_are_those_of_the_label_file(tmp_path):
    folder = write_edm(tmp_path / "set", dict(labels=PAIRS[::-1]))
    for path in (folder, zipped(folder)):
        data = ImageData([path], 8)
        assert data.classes == [str(i) for i in range(7)]
        images, labels = load_batch(data, range(8))
        assert labels.tolist() == LABELS
        for i, image in enumerate(images):
            assert np.array_equal(image.permute(1, 2, 0), photo((8, 8), i))
    # Windows writes other separators. Without labels, the folders do not become classes.
    backslashes = [[name.replace("/", "\\"), label] for name, label in PAIRS]
    write_edm(tmp_path / "set", dict(labels=backslashes))
    assert open_source(folder).labels.tolist() == LABELS
    write_edm(tmp_path / "set", dict(labels=None))
    assert open_source(folder).labels is None
    assert open_source(folder).classes is None

    # Two archives with numbers share their classes.
    write_edm(tmp_path / "set", dict(labels=PAIRS))
    write_edm(tmp_path / "other", dict(labels=[["a.png", 9]]), ["a.png"])
    both = open_source([folder, str(tmp_path / "other")])
    assert both.labels.tolist() == [*LABELS, 9]
    assert len(both.classes) == 10


def test_training_and_packing_use_the_label_file(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    zipped(write_edm(tmp_path / "set", dict(labels=PAIRS)))
    call(train.main, "--data set.zip --res 8 --pack packed.npz")
    with np.load("packed.npz") as packed:
        assert packed["y"].tolist() == LABELS

    # The same losses as with packed images.
    options = [*TINY_RUN, "--res 32 --steps 2 --workers 0 --no-flip"]
    call(train.main, *options, "--data set.zip --out one")
    call(train.main, "--data set.zip --res 32 --pack packed32.npz")
    call(train.main, *options, "--data packed32.npz --out two")
    one, two = log_lines("one"), log_lines("two")
    assert [line["loss"] for line in one] == [line["loss"] for line in two] != []


REFUSED = {
    "missing image": (dict(labels=PAIRS[:-1]), "no label for 00001/img00000007.png"),
    "unknown image": (dict(labels=[*PAIRS, ["x.png", 1]]), "x.png no such image"),
    "twice": (dict(labels=[*PAIRS, PAIRS[3]]), "00000/img00000003.png twice"),
    "one-hot": (dict(labels=[[name, [0, 1]] for name in NAMES]), "vectors integers"),
    "float": (dict(labels=[[name, 0.5] for name in NAMES]), "fractions integers"),
    "negative": (dict(labels=[[name, -1] for name in NAMES]), "-1 not a class number"),
    "huge": (dict(labels=[[name, 10**9] for name in NAMES]), "1000000000 not a class number"),
    "text": (dict(labels=[[name, "cat"] for name in NAMES]), "cat not a class number"),
    "dict": (dict(labels=dict(PAIRS)), "must be a list of pairs"),
    "empty": (dict(labels=[]), "must be a list of pairs"),
    "no labels": (dict(label=PAIRS), "dataset.json"),
    "list": (PAIRS, "dataset.json"),
    "not JSON": ("labels: 3", "dataset.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_label_file_that_does_not_fit_is_refused(tmp_path, case):
    content, words = REFUSED[case]
    folder = write_edm(tmp_path / "set", content)
    for path in (folder, zipped(folder)):
        with pytest.raises(ValueError, match=named("dataset.json", *words.split())) as error:
            open_source([path])
        assert "\n" not in str(error.value)


def test_sources_with_and_without_a_label_file_do_not_mix(tmp_path):
    labeled = write_edm(tmp_path / "set", dict(labels=PAIRS))
    null = write_edm(tmp_path / "null", dict(labels=None))
    (tmp_path / "plain").mkdir()
    photo().save(tmp_path / "plain" / "a.png")
    for other in (null, str(tmp_path / "plain")):
        with pytest.raises(ValueError, match=named(other)):
            open_source([labeled, other])


def hostile_label_files(random):
    """Contents of a dataset.json that no tool writes."""
    values = [None, True, 1, -1, 0.5, 1e400, "x", "", [], {}, [[]], [None], [[1, 2]], 2**70]
    for value in values:
        yield json.dumps(value)
        yield json.dumps(dict(labels=value))
        yield json.dumps(dict(labels=[[NAMES[0], value], *PAIRS[1:]]))
        yield json.dumps(dict(labels=[[value, 1], *PAIRS[1:]]))
        yield json.dumps(dict(labels=[value, *PAIRS[1:]]))
    valid = json.dumps(dict(labels=PAIRS)).encode()
    for cut in range(0, len(valid), 11):
        yield valid[:cut]
    for _ in range(40):
        content = bytearray(valid)
        for place in random.integers(len(content), size=3):
            content[place] = random.integers(256)
        yield bytes(content)
    yield "[" * 100_000  # deeper than the parser goes
    yield b"\xff\xfe" + valid
    yield json.dumps(dict(labels=[["../../etc/passwd", 1], ["/etc/passwd", 2]]))


def test_hostile_label_files_give_one_line(tmp_path, outcomes):
    folder = write_edm(tmp_path / "set", dict(labels=PAIRS))
    lines = []
    for content in hostile_label_files(np.random.default_rng(0)):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "set" / "dataset.json").write_bytes(content)
        try:
            source = open_source([folder])
            assert source.labels is None or len(source.labels) == 8
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            lines.append(str(error))
    assert len(lines) > 100
    assert len(set(lines)) > 30


def test_a_label_file_that_expands_without_end_is_refused(tmp_path, outcomes):
    # 1 GiB of spaces in about 1 MB.
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("dataset.json", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(b" " * 2**24)
        content = io.BytesIO()
        photo().save(content, "PNG")
        archive.writestr("a.png", content.getvalue())
    with pytest.raises(ValueError, match=named("dataset.json", "larger")):
        open_source([str(tmp_path / "bomb.zip")])


# ---------------------------------------------------------------- arrays

BYTES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), np.uint8)
FIRST = BYTES.transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (BYTES, None),
        (FIRST, "channels first"),
        ((BYTES / 255).astype(np.float32), "float32 from 0 to 1"),
        ((FIRST / 127.5 - 1).astype(np.float64), "float64 from -1 to 1 channels first"),
        (BYTES.astype(np.int64), "int64 from 0 to 255"),
        ((BYTES / 255).astype(np.float16), "float16 from 0 to 1"),
    ],
)
@pytest.mark.parametrize("ending", [".npz", ".npy"])
def test_arrays_of_other_layouts_are_converted(tmp_path, capsys, array, said, ending):
    path = str(tmp_path / f"images{ending}")
    if ending == ".npz":
        np.savez(path, x=array, y=np.arange(6)[:, None] % 2)
    else:
        np.save(path, array)
    data = ImageData([path], (8, 10))
    printed = capsys.readouterr().out
    assert bool(printed) == bool(said)
    if said:
        assert re.search(named(path, *said.split()), printed)
    images, labels = load_batch(data, range(6))
    tolerance = 1 if array.dtype == np.float16 else 0
    assert abs(images.permute(0, 2, 3, 1).numpy().astype(int) - BYTES).max() <= tolerance
    assert labels.tolist() == ([0, 1] * 3 if ending == ".npz" else [0] * 6)
    assert str(data)

    # Gray images, with the channel in front or without one.
    if array is BYTES:
        for gray in (BYTES[..., 0], BYTES[..., :1].transpose(0, 3, 1, 2)):
            np.save(tmp_path / "gray.npy", gray)
            image = open_source([str(tmp_path / "gray.npy")]).read(2)
            assert np.array_equal(image, BYTES[2, :, :, :1].repeat(3, 2))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (BYTES.astype(np.float32), "0 255 x.round().clip(0, 255).astype(np.uint8)"),
        (BYTES.astype(np.uint16) * 257, "uint16 (x / 257).round().astype(np.uint8)"),
        (BYTES // 128, None),
        ((BYTES // 128).astype(np.int32), "int32 from 0 to 1"),
        (np.zeros((6, 8, 10, 3), np.float32), "from 0 to 0"),
        (np.full((6, 8, 10, 3), np.nan, np.float32), "NaN"),
        (BYTES > 5, "bool"),
        (BYTES.astype(complex), "complex128"),
        (np.zeros((6, 8, 10, 4), np.uint8), "x[..., :3]"),
        (np.zeros((6, 8), np.uint8), "(6, 8)"),
        (np.zeros((0, 8, 10, 3), np.uint8), "(0, 8, 10, 3)"),
        (np.array(["a", "b"]), "(2,)"),
        (np.array([{}, {}]), "objects"),
    ],
)
def test_ambiguous_arrays_are_refused_with_a_remedy(tmp_path, array, words):
    path = str(tmp_path / "images.npy")
    np.save(path, array)
    if words is None:  # bytes may be dark
        assert len(open_source([path])) == 6
        return
    with pytest.raises(ValueError) as error:
        open_source([path])
    message = str(error.value)
    assert path in message
    assert words in message or re.search(named(*words.split()), message), message
    assert "\n" not in message


def test_one_hot_labels_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=BYTES, y=np.eye(6))
    with pytest.raises(ValueError, match=named("one-hot", "y.argmax(1)")):
        open_source([str(tmp_path / "a.npz")])


def test_arrays_of_other_names(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x_train=BYTES, y_train=np.arange(6) % 3, x_test=BYTES[:2])
    with pytest.raises(ValueError, match=named("x_train", "y_train", "x_test", "set.npz:x_train")):
        open_source(["set.npz"])
    source = open_source(["set.npz:x_train,y_train"])
    assert source.labels.tolist() == [0, 1, 2] * 2
    assert open_source(["set.npz:x_test"]).labels is None
    with pytest.raises(ValueError, match=named("x_tests", "x_train")):
        open_source(["set.npz:x_tests"])
    with pytest.raises(ValueError, match=named("labels", "x_train")):
        open_source(["set.npz:x_train,labels"])

    # A run, its default folder, and its resumption.
    options = [*TINY_RUN, "--res 32 --workers 0 --data set.npz:x_train,y_train"]
    call(train.main, *options, "--steps 1")
    call(train.main, *options, "--steps 2")
    assert [line["step"] for line in log_lines("runs/set-32")] == [1, 2]


def test_an_existing_file_wins_over_the_part_behind_the_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x=BYTES)
    assert split_keys("set.npz:x") == ("set.npz", ["x"])
    assert not is_dataset_class("set.npz:x")
    assert is_dataset_class("package.module:Class")
    shutil.copy("set.npz", "set.npz:x")
    assert split_keys("set.npz:x") == ("set.npz:x", [])
    assert not is_dataset_class("set.npz:x")


def test_pickled_batches_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"\x80\x02}q\x01.")
    (folder / "batches.meta").write_bytes(b"\x80\x02}q\x01.")
    for path in (folder, folder / "data_batch_1"):
        with pytest.raises(ValueError, match=named("binary version", "docs.cifar")):
            open_source([str(path)])


def test_hostile_array_files_give_one_line(tmp_path, outcomes):
    random = np.random.default_rng(1)
    np.savez("a.npz", x=FIRST, y=np.arange(6), classes=list("abcdef"))
    np.save("a.npy", (BYTES / 255).astype(np.float32))
    errors = 0
    for name in ("a.npz", "a.npy"):
        with open(name, "rb") as file:
            valid = file.read()
        # Cut at every structural place of the beginning and the end, and change bytes.
        cuts = [*range(0, 160, 8), *range(len(valid) - 200, len(valid), 10)]
        contents = [valid[:cut] for cut in cuts]
        for _ in range(60):
            content = bytearray(valid)
            for place in random.integers(140, size=2):
                content[place] = random.integers(256)
            contents.append(bytes(content))
        for content in contents:
            with open(f"bad-{name}", "wb") as file:
                file.write(content)
            line = outcome(train.main, [*TINY_RUN, f"--data bad-{name} --pack out.npz --res 8"])
            errors += bool(line)
            if os.path.exists("out.npz"):
                os.remove("out.npz")
    assert errors > 100


# ---------------------------------------------------------------- patterns


def test_patterns_and_folders_stand_for_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("shards")
    names = [f"shards/train-{i:04}.tar" for i in range(12)]
    for name in names:
        open(name, "wb").close()
    for pattern in ("shards/train-{0000..0011}.tar", "shards/train-*.tar", "shards"):
        assert expand([pattern]) == (names, [])
    assert expand(["shards/train-{0002..0003}.tar:label"]) == (names[2:4], ["label"])
    assert expand(["shards/train-{0001,0005}.tar"]) == ([names[1], names[5]], [])
    assert expand(names[:2]) == (names[:2], [])
    assert braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert braces("{8..11}") == ["8", "9", "10", "11"]

    # Shards of two splits, and patterns without files or with too many.
    open("shards/val-0000.tar", "wb").close()
    with pytest.raises(ValueError, match=named("train", "val", "shards/train*.tar")):
        expand(["shards"])
    with pytest.raises(FileNotFoundError, match="test"):
        expand(["shards/test-*.tar"])
    with pytest.raises(FileNotFoundError, match="train-0012"):
        expand(["shards/train-{0010..0013}.tar"])
    with pytest.raises(ValueError, match="million"):
        expand(["shards/{0..99999999}.tar"])
    with pytest.raises(ValueError, match="same keys"):
        expand([f"{names[0]}:a", f"{names[1]}:b"])

    # A folder of images with a tar file beside them is a folder of images.
    Image.new("RGB", (8, 8)).save("shards/a.png")
    assert len(open_source("shards")) == 1
    with pytest.raises(ValueError, match="mixed"):
        open_source(["shards", names[0]])
    assert (
        default_folder(dict(data=["shards/train-{0000..0127}.tar"])) == "runs/train-0000..0127-32"
    )


def test_an_archive_beside_the_folders_that_it_held_is_ignored(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        photo((8, 8), len(name)).save(tmp_path / name / "0.png")
    (tmp_path / "flowers.tar").write_bytes(b"the download")
    assert ImageData([tmp_path], 8).classes == ["cat", "dog"]


def test_captions_need_no_label_file(tmp_path):
    # Vectors are no labels, but captions do not use them.
    root = write_edm(tmp_path / "edm", {"labels": [[name, [0.5, 0.5]] for name in NAMES]})
    with pytest.raises(ValueError, match="not classes"):
        open_source([root])
    assert len(open_source([root], captions=True)) == len(NAMES)


def test_a_third_key_of_an_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    with pytest.raises(ValueError, match=named("a.npz", "images, labels, more")):
        open_source([f"{tmp_path}/a.npz:images,labels,more"])


def test_class_names_may_be_bytes(tmp_path):
    x = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(2), classes=np.array([b"cat", b"dog"]))
    assert open_source([tmp_path / "a.npz"]).classes == ["cat", "dog"]
