"""Tests of support/parquet.py: Parquet files as the Hugging Face hub stores them."""

import builtins
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re

import numpy as np
import pytest
from PIL import Image

import train
from fid import read_ahead
from support import parquet
from support.data import ImageData, load_batch
from support.sources import open_source
from support.text import read_captions
from tests.helpers import (
    TINY_RUN,
    call,
    log_lines,
    mutated,
    named,
    no_grid,
    on_ranks,
    outcome,
    photo,
    resumed_at,
    skip_grid,
)

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

LABELS = [2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0]
NAMES = ["cat", "dog", "eel"]
TEXTS = [f"a photo of number {i}" for i in range(12)]
PIXELS = np.stack([np.asarray(photo((32, 32), i)) for i in range(12)])


def encoded(image, kind="PNG"):
    """The bytes of an image file."""
    content = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(content, kind)
    return content.getvalue()


PNGS = [encoded(image) for image in PIXELS]
STRUCTS = [dict(bytes=content, path=f"{i}.png") for i, content in enumerate(PNGS)]


def hub(names=NAMES, column="label"):
    """The metadata of a dataset of the hub with these class names."""
    feature = dict(names=names, _type="ClassLabel")
    return json.dumps(dict(info=dict(features={"image": dict(_type="Image"), column: feature})))


def write(path, columns=None, metadata=None, **options):
    """Write columns into a Parquet file. Without columns: a dataset of the hub. Returns the path.

    options: for example row_group_size; 5 by default.
    """
    if columns is None:
        columns, metadata = dict(image=STRUCTS, label=LABELS), metadata or hub()
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata(dict(huggingface=metadata))
    pq.write_table(table, path, **dict(row_group_size=5) | options)
    return str(path)


def refused(path, *words, captions=False):
    """Assert that a file is refused in one line with these words."""
    with pytest.raises(ValueError, match=named(*words)) as error:
        open_source([path], captions)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).count(path.partition(":")[0]) == 1


# ---------------------------------------------------------------- images, labels and texts


@pytest.mark.parametrize("rows", [1, 5, 12, 100])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_images_labels_and_names(tmp_path, rows, compression):
    path = write(tmp_path / "a.parquet", row_group_size=rows, compression=compression)
    data = ImageData([path], 32)
    assert type(data.reader) is parquet.Parquet
    assert data.classes == NAMES
    images, labels = load_batch(data, range(12))
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS)
    assert labels.tolist() == LABELS
    assert data.reader.name(7) == f"{path}, row 7"
    assert data.reader.texts is None

    # Any order, and another size.
    order = np.random.default_rng(0).permutation(12)
    images, labels = load_batch(data, order)
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS[order])
    assert labels.tolist() == [LABELS[i] for i in order]
    assert data.reader.read(3, (8, 16)).shape == (8, 16, 3)


def test_portrait_images_are_turned(tmp_path):
    tall = encoded(photo((20, 30)))
    source = open_source([write(tmp_path / "a.parquet", dict(image=[tall]))])
    assert source.read(0, (20, 30)).shape == (20, 30, 3)
    assert source.read(0, (20, 30), True).shape == (30, 20, 3)


def test_types_of_images_and_labels(tmp_path):
    path = tmp_path / "a.parquet"
    for kind in (pa.binary(), pa.large_binary()):
        source = open_source([write(path, dict(image=pa.array(PNGS, kind), label=LABELS))])
        assert np.array_equal(source.read(8), PIXELS[8])
    # Numbers without names: every number up to the largest is a class.
    for kind in (pa.int8(), pa.uint16(), pa.uint64(), pa.dictionary(pa.int8(), pa.int32())):
        labels = pa.array([5, *LABELS[1:]], kind)
        source = open_source([write(path, dict(image=STRUCTS, label=labels))])
        assert source.labels.tolist() == [5, *LABELS[1:]]
        assert source.labels.dtype == np.int64
        assert source.classes == list("012345")
    # Strings become the sorted class names, also as pandas stores categories.
    names = [NAMES[::-1][label] for label in LABELS]
    categories = pa.array(names).dictionary_encode()
    for column in (pa.array(names), pa.array(names, pa.large_string()), categories):
        for dictionary in (True, False):
            columns = dict(image=PNGS, label=column)
            source = open_source([write(path, columns, use_dictionary=dictionary)])
            assert source.classes == NAMES
            assert [source.classes[label] for label in source.labels] == names


def test_columns_are_chosen_by_name_or_by_default(tmp_path):
    path = write(tmp_path / "a.parquet", dict(img=PNGS, label=LABELS, id=LABELS[::-1]))
    assert open_source([path]).labels.tolist() == LABELS
    assert open_source([f"{path}:img,id"]).labels.tolist() == LABELS[::-1]
    assert open_source([f"{path}:img"]).labels is None
    refused(f"{path}:img,ids", "columns", "img", "label", "id")
    refused(f"{path}:image", "columns", "img", "label", "id")
    refused(f"{path}:img,id,label", "columns", "img", "label", "id")
    refused(path, "columns", "FILE:image,text", "img", captions=True)

    # No default without the column label, or with two candidates.
    refused(write(path, dict(img=PNGS, fine=LABELS, coarse=LABELS)), "fine", "coarse")
    refused(write(path, dict(img=PNGS, image=PNGS, label=LABELS)), "img", "image")
    columns = dict(image=PNGS, text=TEXTS, caption=TEXTS)
    refused(write(path, columns), "text", "caption", captions=True)
    assert open_source([write(path, dict(image=PNGS))]).labels is None

    # The class names are those of the column.
    columns = dict(image=PNGS, fine=LABELS, coarse=LABELS)
    write(path, columns, hub(column="coarse"))
    assert open_source([f"{path}:image,coarse"]).classes == NAMES
    assert open_source([f"{path}:image,fine"]).classes == ["0", "1", "2"]


def test_captions(tmp_path):
    path = write(tmp_path / "a.parquet", dict(image=STRUCTS, text=TEXTS, label=LABELS))
    source = open_source([path], captions=True)
    assert read_captions(source) == list(source.texts) == TEXTS
    assert source.labels is None
    assert source.classes is None
    assert open_source([path]).labels.tolist() == LABELS
    path = write(tmp_path / "b.parquet", dict(photo=PNGS, caption=TEXTS[::-1]))
    assert list(open_source([f"{path}:photo"], captions=True).texts) == TEXTS[::-1]
    assert list(open_source([f"{path}:photo,caption"], captions=True).texts) == TEXTS[::-1]

    refused(f"{write(path, dict(image=PNGS, text=LABELS))}:image,text", "int64", captions=True)
    refused(write(path, dict(image=PNGS, text=[*TEXTS[:-1], None])), "row 11", captions=True)
    write(path, dict(image=PNGS, text=[*TEXTS[:-1], " "]))
    with pytest.raises(ValueError, match=named(f"{path}, row 11", "empty")):
        read_captions(open_source([path], captions=True))


def split(folder, name="train-{}.parquet"):
    """Write the dataset into three files of 4, 1 and 7 rows. Returns their paths."""
    paths = []
    for k, (start, end) in enumerate([(0, 4), (4, 5), (5, 12)]):
        columns = dict(image=STRUCTS[start:end], label=LABELS[start:end], text=TEXTS[start:end])
        paths.append(write(folder / name.format(k), columns, hub(), row_group_size=3))
    return paths


def test_several_files(tmp_path):
    paths = split(tmp_path)
    for names in (paths, [f"{tmp_path}/train-*.parquet"], [f"{tmp_path}/train-{{0..2}}.parquet"]):
        source = open_source(names)
        assert source.labels.tolist() == LABELS
        assert all(np.array_equal(source.read(i), PIXELS[i]) for i in range(12))
    assert len(open_source([str(tmp_path)])) == 12
    assert source.name(3) == f"{paths[0]}, row 3"
    assert source.name(4) == f"{paths[1]}, row 0"
    assert source.name(11) == f"{paths[2]}, row 6"
    assert list(open_source(paths, captions=True).texts) == TEXTS

    # The order given, and keys for all.
    source = open_source([paths[2], paths[0]])
    assert source.labels.tolist() == LABELS[5:] + LABELS[:4]
    assert np.array_equal(source.read(7), PIXELS[0])
    assert open_source([f"{tmp_path}/train-*.parquet:image"]).labels is None

    # Files of different splits, classes or columns.
    split(tmp_path, "test-{}.parquet")
    with pytest.raises(ValueError, match=named("test", "train", "train*.parquet")):
        open_source([str(tmp_path)])
    other = str(tmp_path / "other.parquet")
    write(other, metadata=hub(["cat", "eel", "dog"]))
    with pytest.raises(ValueError, match=named(other, "classes")):
        open_source([paths[0], other])
    write(other, dict(image=STRUCTS, label=["cat"] * 12))
    with pytest.raises(ValueError, match=named(other, "types")):
        open_source([paths[0], other])
    write(other, dict(image=PNGS))
    with pytest.raises(ValueError, match=named(other, "columns", "image")):
        open_source([paths[0], other])

    # Strings: a name that occurs in several files is one class.
    names = [
        write(tmp_path / f"{k}.parquet", dict(image=PNGS[:2], label=v))
        for k, v in enumerate((["eel", "cat"], ["dog", "cat"]))
    ]
    source = open_source(names)
    assert source.classes == NAMES
    assert source.labels.tolist() == [2, 0, 1, 0]


def test_missing_images_and_labels(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    images = [*STRUCTS[:5], None, dict(bytes=None, path="6.png"), dict(bytes=b"?", path=None)]
    source = open_source([write(path, dict(image=images, label=LABELS[:8]), hub())])
    for i in (5, 6, 7):
        with pytest.raises(ValueError, match=named(path, f"row {i}")) as error:
            source.read(i)
        assert len(str(error.value).splitlines()) == 1
        assert "0x" not in str(error.value)

    # --skip-bad uses the next image that is readable.
    data = ImageData([str(path)], 32, skip_bad=True)
    images, labels = load_batch(data, [4, 5, 6, 7])
    assert labels.tolist() == [LABELS[i] for i in (4, 0, 0, 0)]
    assert np.array_equal(images[1].permute(1, 2, 0), PIXELS[0])
    assert len(capsys.readouterr().err.splitlines()) == 3

    labels = [*LABELS[:7], None, *LABELS[8:]]
    refused(write(path, dict(image=STRUCTS, label=labels), hub()), "row 7", "label")
    labels = [*LABELS[:7], -1, *LABELS[8:]]
    refused(write(path, dict(image=STRUCTS, label=labels), hub()), "row 7", "-1")
    refused(write(path, metadata=hub(NAMES[:2])), "row 0", "2", "label")


def test_the_checksum_covers_rows_labels_and_sizes(tmp_path):
    def checksum(columns, **options):
        source = open_source([write(tmp_path / "a.parquet", columns, **options)])
        digest = hashlib.sha256()
        source.update(digest)
        return digest.hexdigest()

    one = checksum(dict(image=STRUCTS, label=LABELS))
    assert checksum(dict(image=STRUCTS, label=LABELS)) == one
    assert checksum(dict(image=STRUCTS, label=LABELS[::-1])) != one
    assert checksum(dict(image=[STRUCTS[0], *STRUCTS[:-1]], label=LABELS)) != one
    assert checksum(dict(image=STRUCTS[:-1], label=LABELS[:-1])) != one


def test_pyarrow_is_needed_only_for_parquet_files(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    load = builtins.__import__

    def without_pyarrow(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    refused(path, "pip install pyarrow")
    monkeypatch.setattr(builtins, "__import__", load)
    monkeypatch.setattr(pa, "__version__", "14.0.0")
    refused(path, "pip install 'pyarrow>=15'")


# ---------------------------------------------------------------- what a process keeps


def count_reads(monkeypatch):
    """Return a list that grows by (path, group) for each row group that is read."""
    read, reads = parquet.read_group, []

    def counted(path, group, leaf):
        reads.append((path, group))
        return read(path, group, leaf)

    monkeypatch.setattr(parquet, "read_group", counted)
    return reads


def kept_bytes():
    """Return the sizes of the row groups that this process keeps."""
    return [size for _, size in parquet.kept_groups(os.getpid())[1].values()]


def test_the_memory_of_row_groups_is_bounded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", row_group_size=2)
    reads = count_reads(monkeypatch)
    source = open_source([path])
    for i in (*range(12), *range(12)):
        source.read(i)
    assert len(reads) == 6  # all of them fit
    sizes = kept_bytes()
    assert sum(map(len, PNGS)) < sum(sizes) < sum(map(len, PNGS)) + 12 * 100

    # Two of six fit: the ones that were used last.
    monkeypatch.setattr(parquet, "CACHED_BYTES", 5 * max(map(len, PNGS)))
    source = open_source([path])
    assert not kept_bytes()
    for i in np.random.default_rng(0).integers(12, size=100):
        assert np.array_equal(source.read(int(i)), PIXELS[i])
        assert sum(kept_bytes()) <= parquet.CACHED_BYTES
    assert len(kept_bytes()) == 2
    reads.clear()
    for i in (0, 2, 1, 4, 0, 2):
        source.read(i)
    assert [group for _, group in reads][-2:] == [2, 1]  # row 0 has stayed

    # One larger row group is kept, so that sequential reading does not repeat it.
    monkeypatch.setattr(parquet, "CACHED_BYTES", 1)
    source = open_source([path])
    reads.clear()
    for i in range(12):
        source.read(i)
        assert len(kept_bytes()) == 1
    assert len(reads) == 6


def test_threads_read_each_row_group_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", row_group_size=3)
    reads = count_reads(monkeypatch)
    data = ImageData([path], 32)
    jobs = [[i] for i in range(12)] * 4
    batches = list(read_ahead(data.__getitems__, jobs, 8))
    for [i], (images, _) in zip(jobs, batches):
        assert np.array_equal(images[0], PIXELS[i])
    assert sorted(reads) == [(path, group) for group in range(4)]


def test_forked_workers_open_files_of_their_own(tmp_path):
    source = open_source([write(tmp_path / "a.parquet")])
    source.read(0)
    inherited = parquet.open_file(source.files[0], os.getpid())

    def read(results):
        source.read(0)
        own = parquet.open_file(source.files[0], os.getpid())
        results.put((own is inherited, len(kept_bytes())))

    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=read, args=[results])
    process.start()
    assert results.get(timeout=60) == (False, 1)
    process.join()


def test_slow_random_order_is_announced(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.parquet", dict(image=STRUCTS, label=LABELS, text=TEXTS))
    open_source([path])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(parquet, "CACHED_BYTES", 20_000)
    open_source([path])
    assert capsys.readouterr().out == ""  # the row groups are small
    monkeypatch.setattr(parquet, "SLOW_GROUP", 10_000)
    open_source([path])
    assert re.search(named(path, "--pack"), capsys.readouterr().out)
    open_source([path], captions=True)
    line = capsys.readouterr().out
    assert re.search(named(path, "row_group_size"), line)
    assert len(line.splitlines()) == 1


# ---------------------------------------------------------------- training


def test_training_equals_that_on_an_array(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    split(tmp_path)
    np.savez("set.npz", x=PIXELS, y=LABELS, classes=NAMES)
    options = [*TINY_RUN, "--res 32 --steps 2"]
    call(train.main, options, "--data set.npz --workers 0 --out array")
    call(train.main, options, "--data train-*.parquet --workers 0 --out zero")
    call(train.main, options, "--data train-*.parquet --workers 2 --out two")
    losses = [[line["loss"] for line in log_lines(out)] for out in ("array", "zero", "two")]
    assert losses[0] == losses[1] == losses[2] != []


def test_packing_writes_the_same_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split(tmp_path)
    call(train.main, "--data train-*.parquet --res 32 --pack packed.npz")
    with np.load("packed.npz") as packed:
        assert np.array_equal(packed["x"], PIXELS)
        assert packed["y"].tolist() == LABELS
        assert packed["classes"].tolist() == NAMES


def test_training_with_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("set.parquet", dict(image=STRUCTS, caption=TEXTS))
    options = "--captions --res 32 --text-tokens 24 --batch 4 --workers 0"
    call(train.main, "--data set.parquet", options, "--steps 1")
    call(train.main, "--data set.parquet:image,caption", options, "--steps 2 --out other")
    assert log_lines("other")[-1]["step"] == 2
    assert os.path.isdir("runs/set-text-32")


def report_reads():
    """Prepare a process: it reports which rank reads labels."""
    skip_grid()
    read = parquet.read_index

    @functools.wraps(read)
    def reported(*args):
        print(f"read by rank {os.environ['RANK']}")
        return read(*args)

    parquet.read_index = reported


def test_two_ranks_resume(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    split(tmp_path)
    options = [*TINY_RUN, "--data train-*.parquet --res 32 --log-every 1"]
    call(train.main, options, "--steps 3 --workers 0 --out one")
    for steps, workers in ((1, 0), (3, 1)):
        more = f"--steps {steps} --workers {workers} --out two"
        statuses, output, errors = on_ranks(
            train.main, options, more, cwd=tmp_path, prepare=report_reads
        )
        assert statuses == [0, 0], errors
        assert output.count("read by rank 0") == 1
        assert "read by rank 1" not in output
    assert resumed_at(output) == [1]
    one, two = ([line["loss"] for line in log_lines(out)] for out in ("one", "two"))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)


def test_an_error_ends_all_ranks(tmp_path):
    write(tmp_path / "a.parquet", dict(image=STRUCTS, label=[*LABELS[:-1], None]))
    options = [*TINY_RUN, "--data a.parquet --res 32 --steps 1 --out run"]
    statuses, _, errors = on_ranks(train.main, options, cwd=tmp_path, prepare=skip_grid)
    assert 0 not in statuses
    assert "a.parquet: row 11 has no label" in errors


# ---------------------------------------------------------------- damaged and hostile files


def varint(number):
    """The bytes of a non-negative integer in the footer of a Parquet file."""
    number *= 2  # of the integers with a sign, these are the even ones
    content = bytearray()
    while number > 127:
        content.append(number % 128 + 128)
        number //= 128
    return bytes([*content, number])


def with_footer(content, old, new):
    """Replace bytes in the footer of a Parquet file, everywhere, and correct its length."""
    length = int.from_bytes(content[-8:-4], "little")
    start, footer = content[: -8 - length], content[-8 - length : -8]
    assert old in footer
    footer = footer.replace(old, new)
    return start + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def hostile_tables():
    """Yield name, columns, metadata and options of valid files that are no datasets."""
    image, label = dict(image=STRUCTS), dict(label=LABELS)
    both = image | label
    yield "no rows", dict(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), None, {}
    yield "no columns", {}, None, {}
    metadata = [
        "",
        "no JSON",
        "[" * 100_000,
        "3",
        "null",
        "[]",
        "{}",
        '{"info": 1}',
        '{"info": {"features": []}}',
        '{"info": {"features": {"label": 7}}}',
        hub("eel"),
        hub([]),
        hub([1, 2, 3]),
        hub([["cat"], "dog", "eel"]),
        hub(dict(cat=0)),
        hub(["cat", "cat", "eel"]),
        hub(["cat"]),
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    for text in metadata:
        yield f"metadata {text[:50]!r}", both, text, {}
    numbers = [0] * 11
    labels = [
        pa.array([*numbers, -1]),
        pa.array([*numbers, 10**9]),
        pa.array([*numbers, 2**64 - 1], pa.uint64()),
        pa.array([0.5] * 12),
        pa.array([True] * 12),
        pa.array([None] * 12),
        pa.array([*numbers, None], pa.int64()),
        pa.array([[1]] * 12),
        pa.array([dict(a=1)] * 12),
        pa.array([b"\xff"] * 12),
        pa.array([0] * 12, pa.timestamp("ms")),
        pa.array([["cat"]] * 12),
    ]
    for column in labels:
        yield f"labels {column.type}", image | dict(label=column), None, {}
    bad_text = pa.array([b"\xff\xfe"] * 12).view(pa.string())
    yield "labels not UTF-8", image | dict(label=bad_text), None, {}
    images = [
        pa.array(LABELS),
        pa.array(TEXTS),
        pa.array([PNGS] * 12),
        pa.array([[row] for row in STRUCTS]),
        pa.array([dict(path="a.png")] * 12),
        pa.array([dict(bytes="text", path="a.png")] * 12),
        pa.array([dict(bytes=dict(bytes=b"1"))] * 12),
        pa.array([dict(bytes=[b"1"])] * 12),
        pa.array([None] * 12),
        pa.array(PNGS).dictionary_encode(),
        pa.array([None] * 12, pa.binary()),
        pa.array([b""] * 12),
        pa.array([b"\xff\xd8\xff"] * 12),
        pa.array([content[:-40] for content in PNGS]),
        pa.array([PNGS[0][:16] + (2**31 - 1).to_bytes(4, "big") * 2 + PNGS[0][24:]] * 12),
    ]
    for column in images:
        yield f"images {column.type}", label | dict(image=column), None, {}
    yield "a column with a line break", {"a\nb": PNGS, "c": PNGS}, None, {}
    yield (
        "two columns of one name",
        pa.table([PNGS, PNGS, LABELS], ["image", "image", "label"]),
        None,
        {},
    )


def hostile_bytes(random):
    """Yield name and content of damaged files, and of files that declare wrong numbers."""
    file = io.BytesIO()
    write(file, row_group_size=6)
    valid = file.getvalue()
    footer = len(valid) - 8 - int.from_bytes(valid[-8:-4], "little")

    for cut in (0, 1, 4, 8, 100, len(valid) // 2, footer, footer + 50, *range(-40, 0, 4)):
        yield f"cut at {cut}", valid[:cut]
    for name, start, end in (("pages", 4, footer), ("footer", footer, len(valid))):
        for k in range(60):
            content = mutated(valid[start:end], random)
            yield f"mutated {name} {k}", valid[:start] + content + valid[end:]
        for k in range(60):
            content = bytearray(valid)
            for place in random.integers(start, end, size=3):
                content[place] = random.integers(256)
            yield f"changed {name} {k}", bytes(content)
    # Rows, in row groups and in all; sizes of the column.
    sizes = pq.ParquetFile(file).metadata.row_group(0)
    image = sizes.column(0)
    numbers = (
        6,
        12,
        image.total_uncompressed_size,
        image.total_compressed_size,
        sizes.total_byte_size,
    )
    for old in numbers:
        for new in (0, 1, 5, 7, 1000, 2**31 - 1, 2**31, 2**40, 2**62):
            yield f"{old} in the footer is {new}", with_footer(valid, varint(old), varint(new))
    yield "length of the footer", valid[:-8] + b"\xff\xff\xff\x7fPAR1"
    yield "encrypted", b"PARE" + valid[4:-4] + b"PARE"


def attempt(path, errors, captions=False):
    """Open a file and read all images. Appends the errors, and checks that each has one line."""
    try:
        source = open_source([path], captions)
        assert len(source) < 10**7
        assert source.labels is None or source.labels.max() < len(source.classes)
        source.update(hashlib.sha256())
    except (ValueError, OSError) as error:
        errors.append(str(error))
        return
    for i in [*range(min(len(source), 12)), len(source) - 1]:
        try:
            assert source.read(i, (16, 16)).shape == (16, 16, 3)
        except ValueError as error:
            assert f"row {i}" in str(error)
            errors.append(str(error))


def test_hostile_tables_give_one_line(tmp_path, outcomes):
    cases, errors = list(hostile_tables()), []
    path = "bad.parquet"
    for name, columns, metadata, options in cases:
        write(path, columns, metadata, **options)
        before = len(errors)
        attempt(path, errors)
        assert len(errors) > before, name
        line = outcome(train.main, [f"--data {path} --pack out.npz --res 8"])
        assert line.splitlines() == [line], name
        assert path in line, (name, line)
    assert len(cases) > 45
    for error in errors:
        assert len(error.splitlines()) == 1
        assert "bad.parquet" in error
        assert len(error) < 500


def test_hostile_bytes_give_one_line(tmp_path, outcomes):
    errors = []
    cases = list(hostile_bytes(np.random.default_rng(0)))
    for _, content in cases:
        with open("bad.parquet", "wb") as file:
            file.write(content)
        attempt("bad.parquet", errors)
    assert len(cases) > 250
    assert len(errors) > 300
    for error in errors:
        assert len(error.splitlines()) == 1
        assert "bad.parquet" in error
        assert len(error) < 500


def test_small_files_that_expand_without_end(tmp_path, outcomes):
    # Ten thousand rows refer to one image of 1 MiB. The file is as large as the image.
    rows = np.zeros(10_000, np.int32)
    image = PNGS[0] + bytes(2**20)
    options = dict(row_group_size=10_000, store_schema=False)
    columns = dict(image=pa.DictionaryArray.from_arrays(rows, [image]))
    write("a.parquet", columns, compression="zstd", **options)
    assert os.path.getsize("a.parquet") < 10_000
    source = open_source(["a.parquet"])
    with pytest.raises(ValueError, match=named("a.parquet, row 5", "expands", "1,073,741,824")):
        source.read(5)
    assert kept_bytes() == []

    # The same with texts, and with labels.
    for name in ("text", "label"):
        values = pa.DictionaryArray.from_arrays(rows, ["x" * 2**20])
        write("a.parquet", {"image": [PNGS[0]] * 10_000, name: values}, **options)
        refused("a.parquet", name, "1,073,741,824", captions=name == "text")


def test_row_groups_larger_than_the_bound_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", row_group_size=12)
    size = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    content = with_footer((tmp_path / "a.parquet").read_bytes(), varint(size), varint(2**30 + 1))
    (tmp_path / "a.parquet").write_bytes(content)
    refused(path, "1,073,741,825", "1,073,741,824", "row_group_size=100")


def test_special_files_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.parquet")
    refused(str(tmp_path / "a.parquet"), "not a file")
    with pytest.raises(FileNotFoundError, match="missing.parquet"):
        open_source([str(tmp_path / "missing.parquet")])
