"""Tests of support/shards.py: images in tar files, their index, and what tar files may contain."""

import io
import json
import os
import re
import resource
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch

import fid
import train
from support import shards
from support.checkpoint import load_checkpoint
from support.data import ImageData, collate, load_batch
from support.sources import open_source
from support.text import CaptionedImages, read_captions
from tests.helpers import (
    SMALL_NET,
    TINY_RUN,
    call,
    content_of,
    growth_of_a_worker,
    log_lines,
    mutated,
    named,
    no_grid,
    on_ranks,
    outcome,
    photo,
    skip_grid,
)


def encoded(seed, kind="PNG", size=(20, 16)):
    """The bytes of an image file of random pixels. WebP is lossless."""
    content = io.BytesIO()
    photo(size, seed).save(content, kind, lossless=True)
    return content.getvalue()


def write_tar(path, members, **options):
    """Write a tar file of pairs (name or tarfile.TarInfo, bytes or text). Returns its path."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(numbers, kind="PNG", labels=True):
    """The members of samples: image i, its label i mod 3, caption and metadata."""
    ending = dict(PNG="png", JPEG="jpg", WEBP="webp")[kind]
    for i in numbers:
        yield f"{i:04}.{ending}", encoded(i, kind)
        yield f"{i:04}.txt", f"image {i}, ä"
        if labels:
            yield f"{i:04}.cls", f"{i % 3}\n"
        label = dict(number=i % 4, name="bcad"[i % 4], text=f"text {i}", width=20)
        yield f"{i:04}.json", json.dumps(label)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two tar files of 12 images with labels, train-0.tar and train-1.tar, in shards/."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("shards")
    write_tar("shards/train-0.tar", samples(range(7)))
    write_tar("shards/train-1.tar", samples(range(7, 12), "WEBP"))
    return tmp_path


# ---------------------------------------------------------------- images, labels, captions


def test_images_and_labels_in_the_order_of_the_files(two):
    for paths in (["shards"], ["shards/train-{0..1}.tar"], ["shards/*.tar"]):
        source = open_source(paths)
        assert len(source) == 12
        assert source.labels.tolist() == [i % 3 for i in range(12)]
        assert source.labels.dtype == np.int64
        assert source.classes == ["0", "1", "2"]
        assert source.texts is None
        for i in range(12):
            assert np.array_equal(source.read(i), photo(seed=i))
        assert source.name(6) == "shards/train-0.tar/0006.png"
        assert source.name(7) == "shards/train-1.tar/0007.webp"
        assert source.name(-1) == "shards/train-1.tar/0011.webp"

    # The order is that of the paths.
    source = open_source(["shards/train-1.tar", "shards/train-0.tar"])
    assert np.array_equal(source.read(0), photo(seed=7))
    assert source.labels.tolist() == [i % 3 for i in [*range(7, 12), *range(7)]]

    # Images are cropped and resized as those of a folder.
    os.mkdir("folder")
    for i in range(4):
        with open(f"folder/{i}.jpg", "wb") as file:
            file.write(encoded(i, "JPEG", (90, 60)))
    write_tar("a.tar", ((f"{i}.JPG", encoded(i, "JPEG", (90, 60))) for i in range(4)))
    source, folder = open_source("a.tar"), open_source("folder")
    assert source.labels is source.classes is None
    for size in (None, (16, 16), (16, 24)):
        for turn in (False, True):
            assert np.array_equal(source.read(2, size, turn), folder.read(2, size, turn))
    assert load_batch(ImageData(["a.tar"], 8), [1])[1].tolist() == [0]


def test_labels_and_captions_of_json(two):
    source = open_source(["shards/*.tar:number"])
    assert source.labels.tolist() == [i % 4 for i in range(12)]
    assert source.classes == ["0", "1", "2", "3"]

    # Names are sorted. The numbers of labels follow from them.
    source = open_source(["shards/*.tar:name"])
    assert source.classes == ["a", "b", "c", "d"]
    assert source.labels.tolist() == [1, 2, 0, 3] * 3

    for path, texts in (
        ("shards/*.tar", [f"image {i}, ä" for i in range(12)]),
        ("shards/*.tar:text", [f"text {i}" for i in range(12)]),
    ):
        source = open_source([path], captions=True)
        assert source.labels is source.classes is None
        assert source.texts == texts
        assert read_captions(source) == texts

    # A list of captions names images by the end of their path.
    with open("captions.jsonl", "w") as file:
        for i in range(12):
            ending = "webp" if i > 6 else "png"
            file.write(json.dumps(dict(file=f"{i:04}.{ending}", text=f"listed {i}")) + "\n")
    assert read_captions(source, "captions.jsonl")[7] == "listed 7"


def test_samples_are_grouped_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The order of the members of a sample is free. Folders count, and dots in them do not.
    members = [
        ("a.cls", "1"),
        ("v1.0/a.cls", "2"),
        ("v1.0/a.PNG", encoded(0)),
        ("./b/a.seg.png", encoded(9)),
        ("b/a.jpeg", encoded(1, "JPEG")),
        ("a.png", encoded(2)),
        ("b/a.cls", "0"),
        ("README", "text"),
        ("notes.md", "text"),
        # Copies that macOS makes, and other hidden members.
        ("._a.png", b"AppleDouble"),
        ("__MACOSX/a.png", b"AppleDouble"),
        ("x/.hidden/a.png", b"text"),
        (".cls", "5"),
    ]
    source = open_source(write_tar("a.tar", members))
    assert [source.name(i) for i in range(len(source))] == [
        "a.tar/v1.0/a.PNG",
        "a.tar/b/a.jpeg",
        "a.tar/a.png",
    ]
    assert source.labels.tolist() == [2, 0, 1]
    assert source.classes == ["0", "1", "2"]
    assert np.array_equal(source.read(2), photo(seed=2))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, format):
    names = [f"{'folder/' * n}{'käse' * 10}{i}" for i, n in enumerate((0, 14, 30))]
    names = names[:2] if format == tarfile.USTAR_FORMAT else [*names, "long" * 300]
    members = []
    for i, name in enumerate(names):
        members += [(f"{name}.png", encoded(i)), (f"{name}.cls", str(i))]
    path = write_tar(tmp_path / "a.tar", members, format=format)
    source = open_source(path)
    assert source.labels.tolist() == list(range(len(names)))
    for i, name in enumerate(names):
        assert np.array_equal(source.read(i), photo(seed=i))
        assert source.name(i) == f"{path}/{name}.png"


REFUSED = {
    # What is wrong: (members, keys, captions, words of the message)
    "one without label": ([*samples([0]), *samples([1], labels=False)], "", False, "0001.png 1 2"),
    "no label of the key": (samples([0]), ":class", False, "0000.png class .json"),
    "text as label": ([("0.png", b""), ("0.cls", "cat")], "", False, "0.cls 999,999 .json"),
    "negative": ([("0.png", b""), ("0.cls", "-1")], "", False, "0.cls number"),
    "too large": ([("0.png", b""), ("0.cls", "1000000")], "", False, "0.cls 999,999"),
    "digits": ([("0.png", b""), ("0.cls", "9" * 5000)], "", False, "0.cls digits"),
    "fraction": ([("0.png", b""), ("0.cls", "1.0")], "", False, "0.cls number"),
    "no text": ([("0.png", b""), ("0.cls", b"\xff\xfe")], "", False, "0.cls"),
    "empty": ([("0.png", b""), ("0.cls", "")], "", False, "0.cls number"),
    "label without image": ([("0.png", b""), ("1.cls", "1")], "", False, "1.cls"),
    "caption without image": ([("0.png", b""), ("1.txt", "1")], "", True, "1.txt"),
    "two images": ([("0.png", b""), ("0.jpg", b"")], "", False, "0.jpg another first dot"),
    "twice": ([("0.png", b""), ("0.png", b"")], "", False, "0.png another"),
    "two labels": ([("0.cls", "1"), ("0.cls", "1"), ("0.png", b"")], "", False, "0.cls another"),
    "huge label": ([("0.png", b""), ("0.cls", " " * 2**20 + "1")], "", False, "0.cls 1,048,576"),
    "huge caption": ([("0.png", b""), ("0.txt", "a" * (2**20 + 1))], "", True, "0.txt 1,048,576"),
    "huge JSON": ([("0.png", b""), ("0.json", " " * 2**24 + "1")], ":a", True, "0.json 16,777,216"),
    "not JSON": ([("0.png", b""), ("0.json", "{")], ":a", False, "0.json"),
    "list": ([("0.png", b""), ("0.json", "[1]")], ":a", False, "0.json object"),
    "deep": ([("0.png", b""), ("0.json", "[" * 10**5)], ":a", False, "0.json"),
    "true": ([("0.png", b""), ("0.json", '{"a": true}')], ":a", False, "0.json name"),
    "half": ([("0.png", b""), ("0.json", '{"a": 0.5}')], ":a", False, "0.json name"),
    "line break": ([("0.png", b""), ("0.json", '{"a": "b\\nc"}')], ":a", False, "0.json name"),
    "number as caption": ([("0.png", b""), ("0.json", '{"a": 1}')], ":a", True, "0.json text"),
    "half a character": ([("0.png", b""), ("0.json", '{"a": "\\ud800"}')], ":a", True, "0.json"),
    "null": ([("0.png", b""), ("0.json", '{"a": null}')], ":a", False, "0.png label"),
    "both": (
        [("0.png", b""), ("0.json", '{"a": 1}'), ("1.png", b""), ("1.json", '{"a": "1"}')],
        ":a",
        False,
        "numbers names",
    ),
    "two keys": (samples([0]), ":number,name", False, "one key"),
    "no image": ([("0.txt", "a"), ("0.mp4", b"")], "", False, "no images .webp"),
    "two dots": ([("0.a.png", b"")], "", False, "no images one dot"),
    "nothing": ([], "", False, "no images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_samples_are_named(tmp_path, case):
    members, keys, captions, words = REFUSED[case]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=named("a.tar", *words.split())) as error:
        open_source([path + keys], captions)
    assert len(str(error.value).splitlines()) == 1


def test_captions_may_be_missing(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples([0]), ("1.png", encoded(1)), ("1.txt", "")])
    source = open_source(path, captions=True)
    assert source.texts == ["image 0, ä", None]
    with pytest.raises(ValueError, match=named("1.png", "caption", "1 of 2")):
        read_captions(source)
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "0000.png", "text": "a"}\n{"file": "1.png", "text": "b"}'
    )
    assert read_captions(source, tmp_path / "captions.jsonl") == ["a", "b"]


# ---------------------------------------------------------------- training


def test_training_on_shards_equals_training_on_their_images(two, monkeypatch):
    no_grid(monkeypatch)
    for i in range(12):
        os.makedirs(f"folder/{i % 3}", exist_ok=True)
        photo(seed=i).save(f"folder/{i % 3}/{i:04}.png")
    call(train.main, "--data shards --res 32 --pack packed.npz")
    with np.load("packed.npz") as packed:
        assert packed["classes"].tolist() == ["0", "1", "2"]
        for i, image in enumerate(packed["x"]):
            assert np.array_equal(image, fid.fit(photo(seed=i), (32, 32)))

    # The same losses and weights from packed images, and from tar files with any number of workers.
    # Flips are random, but they depend on the step and the position.
    options = [*TINY_RUN, "--res 32 --steps 2 --log-every 1"]
    call(train.main, *options, "--workers 0 --data packed.npz --out npz")
    expected = load_checkpoint("npz")
    for workers in (0, 2):
        out = f"tar{workers}"
        call(
            train.main, *options, "--workers", workers, "--data shards/train-{0..1}.tar --out", out
        )
        assert [line["loss"] for line in log_lines(out)] == [
            line["loss"] for line in log_lines("npz")
        ]
        weights = load_checkpoint(out)["net"]
        assert all(torch.equal(weights[key], expected["net"][key]) for key in weights)
    assert load_checkpoint(out)["config"]["classes"] == ["0", "1", "2"]

    # Both runs continue, one of them on two ranks.
    call(train.main, "--out npz --steps 4 --workers 0")
    statuses, _, errors = on_ranks(
        train.main, "--out tar2 --steps 4 --workers 1", cwd=two, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    expected, weights = (load_checkpoint(out)["net"] for out in ("npz", "tar2"))
    # Two steps of Adam change a weight by up to 2e-3.
    assert max((expected[key] - weights[key]).abs().max() for key in weights) < 2e-4
    losses, expected = ([line["loss"] for line in log_lines(out)] for out in ("tar2", "npz"))
    assert len(losses) == 4
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

    # The ranks used the index of the first run.
    assert len([name for name in os.listdir("tar2") if name.startswith("shards-")]) == 1


def test_training_on_captions_of_shards(two, monkeypatch):
    monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)
    os.mkdir("folder")
    for i in range(12):
        photo(seed=i).save(f"folder/{i:04}.png")
        with open(f"folder/{i:04}.txt", "w") as file:
            file.write(f"image {i}, ä")
    batches = []
    for data in ("folder", "shards/*.tar", "shards/*.tar:text"):
        dataset = CaptionedImages([data], 16, False, None, "bytes", 16, "cpu")
        batches.append(load_batch(dataset, range(12)))
    (images, tokens), shard, other = batches
    assert torch.equal(images, shard[0])
    assert torch.equal(tokens, shard[1])
    assert not torch.equal(tokens, other[1])

    options = "--res 32 --steps 2 --batch 4 --log-every 1 --workers 0 --captions"
    for data in ("folder", "shards/*.tar"):
        call(train.main, options, *SMALL_NET, "--data", data, "--out", f"run-{data[:6]}")
    losses = [[line["loss"] for line in log_lines(out)] for out in ("run-folder", "run-shards")]
    assert losses[0] == losses[1]


def test_the_checksum_covers_names_labels_and_sizes(tmp_path):
    members = list(samples(range(3)))
    path = write_tar(tmp_path / "a.tar", members)
    same = write_tar(tmp_path / "b.tar", members, format=tarfile.GNU_FORMAT)
    assert str(ImageData([path], 8)) == str(ImageData([same], 8))
    changes = [
        [("000x.png" if n == "0001.png" else n.replace("0001", "000x"), c) for n, c in members],
        [(n, "2" if n == "0000.cls" else c) for n, c in members],
        [(n, c + b"\0" if n == "0000.png" else c) for n, c in members],
    ]
    texts = {str(ImageData([path], 8))}
    for i, changed in enumerate(changes):
        texts.add(str(ImageData([write_tar(tmp_path / f"{i}.tar", changed)], 8)))
    assert len(texts) == 4


# ---------------------------------------------------------------- the index


def indexes(folder):
    """The names of the indexes in a folder."""
    return sorted(name for name in os.listdir(folder) if name.startswith("shards-"))


@pytest.fixture
def made(monkeypatch):
    """A list to which every index that is made adds its files."""
    made = []
    make_index = shards.make_index

    def counted(files, *args):
        made.append(files)
        return make_index(files, *args)

    monkeypatch.setattr(shards, "make_index", counted)
    return made


def test_the_index_is_kept_and_follows_the_files(two, made):
    first = open_source(["shards"], folder="run")
    again = open_source(["shards"], folder="run")
    assert len(made) == 1
    assert len(indexes("run")) == len(os.listdir("run")) == 1
    assert again.labels.tolist() == first.labels.tolist()
    assert again.classes == first.classes
    assert [again.name(i) for i in range(12)] == [first.name(i) for i in range(12)]
    assert all(np.array_equal(again.read(i), first.read(i)) for i in range(12))

    # Captions, a key, and a part of the files have other indexes.
    for _ in range(2):
        assert open_source(["shards"], captions=True, folder="run").texts[3] == "image 3, ä"
        assert open_source(["shards/*.tar:name"], folder="run").classes == ["a", "b", "c", "d"]
        assert len(open_source(["shards/train-0.tar"], folder="run")) == 7
    assert len(made) == 4
    # Without a folder, none is kept.
    open_source(["shards"])
    assert len(made) == 5

    # A file of the same size that is written later, and open files of the old one.
    before = os.stat("shards/train-0.tar")
    write_tar("shards/train-0.tar", [(f"{i:04}.png", encoded(i)) for i in range(10, 13)])
    with pytest.raises(ValueError, match=named("0010.png", "3 of 8")):  # .cls members are missing
        open_source(["shards"], folder="run")
    write_tar("shards/train-0.tar", samples(range(20, 27)))
    assert os.stat("shards/train-0.tar").st_size == before.st_size
    changed = open_source(["shards"], folder="run")
    assert np.array_equal(changed.read(0), photo(seed=20))
    assert len(made) == 7


def test_a_damaged_index_is_made_again(two, made, capsys):
    open_source(["shards"], folder="run")
    (name,) = indexes("run")
    path = f"run/{name}"
    valid = content_of(path)
    with np.load(path) as stored:
        arrays = dict(stored)
    random = np.random.default_rng(0)
    contents = [valid[:cut] for cut in range(0, len(valid), 97)]
    contents += [mutated(valid, random) for _ in range(60)]
    contents += [b"", b"text", b"\x80\x04N."]
    for change in (
        dict(offsets=arrays["offsets"] + 10**6),
        dict(offsets=-arrays["offsets"]),
        dict(offsets=np.full(12, 2**63 - 1)),
        dict(offsets=arrays["offsets"][:5]),
        dict(sizes=arrays["sizes"] + 10**9),
        dict(sizes=np.full(12, 2**63 - 1)),
        dict(sizes=-arrays["sizes"]),
        dict(counts=arrays["counts"][:1]),
        dict(counts=np.array([12, 12])),
        dict(counts=np.array([-1, 13])),
        dict(labels=arrays["labels"][:3]),
        dict(names_ends=arrays["names_ends"][:3]),
        dict(sizes=np.array(["a"] * 12)),
        dict(sizes=np.array([{}] * 12)),
    ):
        content = io.BytesIO()
        np.savez(content, **arrays | change)
        contents.append(content.getvalue())
    for removed in ("counts", "offsets", "sizes", "names_ends"):
        content = io.BytesIO()
        np.savez(content, **{key: array for key, array in arrays.items() if key != removed})
        contents.append(content.getvalue())

    rebuilt = 0
    for content in contents:
        with open(path, "wb") as file:
            file.write(content)
        made.clear()
        source = open_source(["shards"], folder="run")
        rebuilt += len(made)
        # Bytes that have no meaning may change, such as the time in a zip header.
        assert source.labels.tolist() == [i % 3 for i in range(12)]
        assert np.array_equal(source.read(8), photo(seed=8))
        assert source.name(8) == "shards/train-1.tar/0008.webp"
        if made:
            assert re.search(named(path, "damaged"), capsys.readouterr().err)
            assert len(content_of(path)) == len(valid)
    assert rebuilt > 0.9 * len(contents)


def test_an_index_that_cannot_be_written_leaves_none(two, monkeypatch):
    def full(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.np, "savez", full)
    with pytest.raises(OSError, match=named("run/shards", "No space")):
        open_source(["shards"], folder="run")
    assert os.listdir("run") == []


def test_progress_after_two_seconds(two, monkeypatch, capsys):
    now = iter(range(1000))
    with monkeypatch.context() as patched:
        patched.setattr(fid.time, "time", lambda: 1.5 * next(now))
        open_source(["shards"])
    line = capsys.readouterr().err
    assert re.findall(r"(\d+) images", line)[-1] == "12"
    assert "\r" in line
    open_source(["shards"])
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- memory


def test_a_large_tar_file_takes_little_memory(tmp_path):
    # The content of all images is the same small one.
    image = encoded(0, size=(8, 8))
    n = 4000
    members = []
    for i in range(n):
        members += [(f"{i:08}.png", image), (f"{i:08}.cls", f"{i % 500}")]
    path = write_tar(tmp_path / "a.tar", members, format=tarfile.USTAR_FORMAT)
    source = open_source(path)
    assert len(source.classes) == 500

    # Characters of the name, and 8 bytes each for its end, the offset, the size and the label.
    arrays = (source.offsets, source.sizes, source.labels, source.names.ends)
    size = len(source.names.content) + sum(array.nbytes for array in arrays)
    assert size == n * (len("00000000.png") + 32)

    # A forked worker that reads everything copies almost nothing.
    assert growth_of_a_worker(reads, path) < 1e6


def reads(path):
    """Return functions that read 100 images of a tar file, and all of them."""
    source = open_source(path)

    def read_some():
        for i in range(100):
            source.read(i)

    def read_all():
        for i in range(len(source.sizes)):
            source.read(i)
            source.labels[i]
            source.name(i)

    return read_some, read_all


def test_other_members_take_no_memory(tmp_path):
    # Members and global headers that belong to no sample.
    with open(tmp_path / "a.tar", "wb") as file:
        for i in range(3000):
            file.write(pax({f"key{i}": "x" * 200}, b"g") + header(f"{i:08}.json"))
        file.write(MEMBER + END)
    tracemalloc.start()
    open_source([str(tmp_path / "a.tar")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5e6  # most of it is the end of the file


def test_forked_workers_share_open_files(two):
    # The parent has opened the files: with a shared file position, the workers would mix images.
    data = ImageData(["shards"], 16)
    expected, labels = load_batch(data, range(12))
    loader = torch.utils.data.DataLoader(
        data, 1, num_workers=2, collate_fn=collate, multiprocessing_context="fork"
    )
    for _ in range(3):
        batches = list(loader)
        assert torch.equal(torch.cat([images for images, _ in batches]), expected)
        assert torch.equal(torch.cat([label for _, label in batches]), labels)


# ---------------------------------------------------------------- damaged and hostile files


def test_bad_images_are_named_or_skipped(two, capsys, monkeypatch):
    good = encoded(5)
    members = [
        ("a.png", good),
        ("b.png", good[: len(good) // 2]),
        ("c.jpg", b"text"),
        ("d.png", b""),
        ("e.webp", encoded(6, "WEBP")),
        ("f\nf.png", b"text"),
    ]
    write_tar("bad.tar", members)
    for i, name in ((1, "b.png"), (2, "c.jpg"), (3, "d.png"), (5, "f?f.png")):
        with pytest.raises(ValueError, match=named(f"bad.tar/{name}")) as error:
            load_batch(ImageData(["bad.tar"], 8), [i])
        assert len(str(error.value).splitlines()) == 1
        assert "0x" not in str(error.value)
    data = ImageData(["bad.tar"], 16, skip_bad=True)
    images, _ = load_batch(data, range(6))
    assert torch.equal(images[1], images[4])
    assert torch.equal(images[5], images[0])
    assert data.unreadable.tolist() == [0, 1, 1, 1, 0, 1]
    assert len(capsys.readouterr().err.splitlines()) == 4

    # A file that becomes shorter while it is used.
    data = ImageData(["shards/train-0.tar"], 16)
    load_batch(data, range(7))
    os.truncate("shards/train-0.tar", 2000)
    with pytest.raises(ValueError, match=named("shards/train-0.tar/0005.png", "ends")):
        load_batch(data, [5])


def header(name, size=0, type=b"0", linkname="", **fields):
    """A block of 512 bytes, a header of a tar file with a valid checksum. fields: offset=bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = max(size, 0), type, linkname
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    if size < 0 or size >= 8**11:
        block[124:136] = b"\xff" * 4 + struct.pack(">q", size)
        block[124] = 0xFF if size < 0 else 0x80
        block[125:128] = block[125:128] if size < 0 else bytes(3)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def padded(content):
    """Bytes up to the next multiple of 512."""
    return content + bytes(-len(content) % 512)


def pax(records, type=b"x", size=None):
    """An additional header of the PAX format. records: bytes, or pairs of keyword and value."""
    content = records if isinstance(records, bytes) else b""
    for keyword, value in [] if isinstance(records, bytes) else records.items():
        record = f" {keyword}={value}\n".encode()
        length = len(record) + len(str(len(record) + 2))
        content += str(length).encode() + record
    return header("pax", len(content) if size is None else size, type) + padded(content)


END = bytes(1024)
IMAGE = encoded(0, size=(8, 8))
MEMBER = header("a.png", len(IMAGE)) + padded(IMAGE)


def hostile_headers():
    """Contents of tar files that no tool writes, by name. None of them is valid."""
    huge, long = 2**40, "a/" * 4000
    for size in (-1, -512, -1024, -(2**62), huge, 2**62):
        yield f"size {size}", MEMBER + header("b.png", size) + padded(IMAGE) + END
        yield f"size {size} of PAX", MEMBER + header("b", size, b"x") + MEMBER + END
        yield f"size {size} of a global header", MEMBER + header("b", size, b"g") + MEMBER + END
        yield f"size {size} of a sparse member", MEMBER + header("b.png", size, b"S") + END
        yield f"PAX size {size}", MEMBER + pax(dict(size=size)) + MEMBER + END
        yield f"global size {size}", pax(dict(size=size), b"g") + MEMBER + MEMBER + END
        sparse = {"GNU.sparse.size": size, "GNU.sparse.name": "b.png"}
        yield f"sparse size {size}", MEMBER + pax(sparse) + MEMBER + END
        yield f"real size {size}", MEMBER + pax({"GNU.sparse.realsize": size}) + MEMBER + END
        if size != -1:  # less than a block is none
            yield f"size {size} of an unknown type", MEMBER + header("b.png", size, b"Z") + END
            yield f"size {size} of a long name", MEMBER + header("b.png", size, b"L") + MEMBER + END
    yield "PAX records", MEMBER + pax(b"2 " * 7000 + b"=") + END
    yield "PAX chain", MEMBER + pax(dict(path="x")) * 2000 + MEMBER + END
    yield "chain of long names", MEMBER + (header("x", 3, b"L") + padded(b"b\0")) * 2000 + END
    yield "long name", MEMBER + pax(dict(path=long * 4)) + MEMBER + END
    yield "no member after PAX", MEMBER + pax(dict(path="x")) + END
    yield "sparse map", MEMBER + pax({"GNU.sparse.map": "1,2,x"}) + MEMBER + END
    sparse = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0}
    yield "sparse map 1.0", MEMBER + pax(sparse) + MEMBER + END
    yield "sparse image", MEMBER + header("b.png", 0, b"S") + END
    yield "checksum", MEMBER + b"b" + MEMBER[1:] + END
    yield "no checksum", MEMBER + MEMBER[:148] + bytes(8) + MEMBER[156:] + END
    yield "no end", MEMBER
    yield "half an end", MEMBER + bytes(511)
    yield "text behind the end", MEMBER + END + b"text"
    yield "two tar files", (MEMBER + END) * 2
    yield "garbage", np.random.default_rng(0).bytes(5000)
    yield "nothing", b""
    yield "zeros", bytes(10240)
    yield "one byte", b"a"
    yield "text", b"text " * 1000
    yield "image", IMAGE
    yield "zip", b"PK\3\4" + bytes(600)
    yield "gzip", b"\x1f\x8b\x08" + bytes(600)


def odd_headers():
    """Contents of tar files that are unusual and valid. They hold one image, a.png."""
    yield "hard link", MEMBER + header("b.png", 0, b"1", "a.png") + END
    yield "hard link with a size", MEMBER + header("b.png", 2**40, b"1", "a.png") + END
    yield "symbolic link", MEMBER + header("b.png", 0, b"2", "/etc/passwd") + END
    yield "link to itself", MEMBER + header("b.png", 0, b"2", "b.png") + END
    links = header("b.png", 0, b"1", "c.png") + header("c.png", 0, b"1", "b.png")
    yield "cycle of links", MEMBER + links + END
    yield "link, then a file in it", MEMBER + header("b", 0, b"2", "/tmp") + header("b/x.txt") + END
    for type, kind in ((b"3", "device"), (b"4", "block device"), (b"6", "pipe")):
        yield kind, MEMBER + header("b.png", 0, type) + END
    yield "folder", MEMBER + header("b.png", 0, b"5") + END
    yield "parent", MEMBER + header("../../b.png", len(IMAGE)) + padded(IMAGE) + END
    yield "parent within", MEMBER + header("x/../../b.png", len(IMAGE)) + padded(IMAGE) + END
    yield "PAX parent", MEMBER + pax(dict(path="../b.png")) + MEMBER + END
    yield "global comment", pax(dict(comment="x"), b"g") + MEMBER + END
    yield "link by PAX", MEMBER + pax(dict(linkpath="/etc/passwd")) + header("b", 0, b"2") + END
    yield "hidden", MEMBER + header("._a.png", 7) + padded(b"textext") + END
    yield "empty name", MEMBER + header("") + END
    yield "one block as end", MEMBER + END[:512]
    yield "long end", MEMBER + bytes(2**20)


def check_opens(path):
    """Open a tar file in all ways and read its images. Returns the lines of the errors."""
    lines = []
    for keys, captions in (("", False), ("", True), (":name", False), (":name", True)):
        try:
            source = open_source([path + keys], captions, "index")
        except (ValueError, OSError) as error:
            lines.append(str(error))
            continue
        for i in range(len(source)):
            try:
                assert source.read(i, (8, 8)).shape == (8, 8, 3)
            except ValueError as error:
                lines.append(str(error))
    for line in lines:
        assert len(line.splitlines()) == 1
        assert os.path.basename(path) in line
    return lines


@pytest.fixture
def limited(outcomes, tmp_path):
    """The fixture outcomes, with 1 GiB of memory more than this process uses, in an empty folder.

    Nothing may be written outside of the folder work/index.
    """
    used = 1024 * int(re.search(rb"VmSize:\s+(\d+)", content_of("/proc/self/status"))[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.getrlimit(9)[1]))
    os.makedirs("work/index")
    os.chdir("work")
    yield outcomes
    assert os.listdir(tmp_path) == ["work"]


HOSTILE, ODD = dict(hostile_headers()), dict(odd_headers())


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_give_one_line(limited, case):
    with open("bad.tar", "wb") as file:
        file.write(HOSTILE[case])
    assert len(check_opens("bad.tar")) == 4
    line = outcome(train.main, ["--data bad.tar --res 8 --pack out.npz"], 20)
    assert "bad.tar" in line
    assert sorted(os.listdir()) == ["bad.tar", "index"]
    assert os.listdir("index") == []


@pytest.mark.parametrize("case", ODD)
def test_only_regular_members_count(limited, case):
    with open("odd.tar", "wb") as file:
        file.write(ODD[case])
    source = open_source(["odd.tar"])
    assert [source.name(i) for i in range(len(source))] == ["odd.tar/a.png"]
    assert np.array_equal(source.read(0), photo((8, 8)))
    assert os.listdir() == ["odd.tar"] or sorted(os.listdir()) == ["index", "odd.tar"]


def test_absolute_names_are_only_names(limited):
    path = f"{os.getcwd()}/outside.png"
    with open("odd.tar", "wb") as file:
        file.write(header(path, len(IMAGE)) + padded(IMAGE) + END)
    source = open_source(["odd.tar"])
    assert np.array_equal(source.read(0), photo((8, 8)))
    assert source.name(0) == f"odd.tar/{path}"
    assert not os.path.exists(path)


def test_truncated_files_give_one_line(limited):
    valid = content_of(write_tar("valid.tar", samples(range(2)), format=tarfile.PAX_FORMAT))
    end = len(valid.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    cuts = {*range(0, end, 128), *range(1, end, 509), *range(511, end, 512), end, end + 511}
    for cut in sorted(cuts):
        with open("bad.tar", "wb") as file:
            file.write(valid[:cut])
        lines = check_opens("bad.tar")
        assert len(lines) == 4, cut
        assert all("complete" in line or "ends" in line for line in lines)
    assert len(cuts) > 80


def test_changed_files_give_one_line(limited):
    valid = content_of(write_tar("valid.tar", samples(range(2)), format=tarfile.PAX_FORMAT))
    random = np.random.default_rng(0)
    failed = 0
    for _ in range(150):
        with open("bad.tar", "wb") as file:
            file.write(mutated(valid, random))
        failed += bool(check_opens("bad.tar"))
    assert failed > 50

    # Single fields of a header, with a valid checksum.
    start = valid.index(b"0001.png")
    for _ in range(150):
        content = bytearray(valid)
        at = start + random.integers(0, 512)
        content[at : at + 8] = random.bytes(8)
        content[start + 148 : start + 156] = b"        "
        checksum = sum(content[start : start + 512])
        content[start + 148 : start + 156] = b"%06o\0 " % checksum
        with open("bad.tar", "wb") as file:
            file.write(content)
        check_opens("bad.tar")


def test_a_huge_image_takes_no_memory(limited):
    # A sparse file of 2 GiB, whose only member has almost this size.
    with open("huge.tar", "wb") as file:
        file.write(MEMBER + header("b.png", 2**31))
        file.truncate(len(MEMBER) + 512 + 2**31 + 1024)
    source = open_source(["huge.tar"])
    with pytest.raises(ValueError, match=named("huge.tar/b.png", "536,870,912")):
        source.read(1)
    assert np.array_equal(source.read(0), photo((8, 8)))

    # A header that declares as much for a name.
    for type in (b"L", b"K", b"x", b"g", b"X"):
        with open("huge.tar", "wb") as file:
            file.write(MEMBER + header("b.png", 2**31, type))
            file.truncate(len(MEMBER) + 512 + 2**31 + 1024)
        with pytest.raises(ValueError, match=named("huge.tar", "too large")):
            open_source(["huge.tar"])


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="a.tar"):
        open_source([str(tmp_path / "a.tar")])
    os.mkdir(tmp_path / "b.tar")
    with pytest.raises(ValueError, match="b.tar"):
        open_source([str(tmp_path / "b.tar")])
    with pytest.raises(FileNotFoundError, match="c.tar"):
        open_source([str(tmp_path / "c.tar")])
