"""Images in Parquet files, as the Hugging Face hub stores them. Needs pyarrow.

    from support.sources import open_source

    source = open_source(["data/train-*.parquet"])                  # columns image and label
    source = open_source(["data/train-*.parquet"], captions=True)   # columns image and text
    source = open_source(["train.parquet:img,fine_label"])          # columns of other names
    source = open_source(["train.parquet:image"])                   # images without labels

The images are encoded: structs of bytes and path, or the bytes alone. Labels are integers or
strings. The metadata of the hub names the classes of integers. Without it, a class is named by its
number. The classes of strings are the sorted strings.

pyarrow has no access to single rows. It reads whole row groups, at about 1 ms per MB, and in random
order almost every image needs another one. The image datasets of the hub have row groups of 100
rows; other files often have a single one. Images per second on one core, JPEGs of 61 KB at 256 px:

    files in a folder, or Parquet in sequence     155
    random order, row groups of 10 rows           139
    random order, row groups of 100 rows           71
    random order, row groups of 1000 rows          15

Training needs random order. So train on the .npz that --pack writes, which reads in sequence, or
write the files with row_group_size=10. A line at the start recommends it where it matters. Datasets
smaller than CACHED_BYTES are read once.
"""

import bisect
import collections
import functools
import io
import json
import os
import threading

import numpy as np

from fid import MOST_CLASSES, StringArray, decode, on_first_rank
from support.sources import reason

# Bounds on what a file makes a process hold. A small file can declare, or expand to, any size.
# Reading a row group takes three times its size for a moment. A damaged file can make that 6 GB,
# because a compressed page may declare 2 GiB.
LARGEST_GROUP = 2**30  # bytes of the rows, of the images, or of the texts, of one row group
ROWS_PER_BYTE = 64  # of a file: real datasets have less than one

# Each process keeps the row groups that it used last, up to this many bytes, or one larger one.
CACHED_BYTES = 2**28
SLOW_GROUP = 2**22  # bytes: a larger row group takes longer to read than an image to decode


class Parquet:
    """The images of Parquet files, a source as support/sources.py describes it.

    The order is that of the files, and of their rows. Rows count from 0 in each file.

    files: paths of Parquet files with the same columns. keys: names of columns, [], [IMAGE],
    [IMAGE, LABEL] or, with captions, [IMAGE, TEXT]. captions: True for captions, False for labels.
    folder: unused, because no index is needed. Under torchrun every rank calls it, and rank 0 reads
    labels and texts.
    Raises ValueError, in one line that names the file, if pyarrow is missing, if a file is damaged,
    if a row has no label or text, or if the columns are ambiguous.
    """

    def __init__(self, files, keys, captions=False, folder=None):
        # Another source may have read these files before they were changed.
        open_file.cache_clear()
        kept_groups.cache_clear()
        self.files = files
        self.leaf, groups, values, self.classes = on_first_rank(read_index, files, keys, captions)
        # For each row group of all files: the number of its file, its number in this file, the
        # bytes of its rows, and the number of images up to its end.
        self.file_numbers, self.group_numbers, self.sizes, rows = groups
        self.ends = rows.cumsum()
        last_groups = self.file_numbers.searchsorted(range(len(files)), side="right") - 1
        self.file_ends = self.ends[last_groups].tolist()  # the images up to the end of each file
        self.labels, self.texts = (None, values) if captions else (values, None)

    def __len__(self):
        return int(self.ends[-1])

    def numbers(self):
        """Return the row of each image in its file, uint32 (N,)."""
        counts = np.diff(self.file_ends, prepend=0)
        return np.concatenate([np.arange(n, dtype=np.uint32) for n in counts])

    def name(self, i):
        """Return "file.parquet, row N" for image i."""
        number = bisect.bisect_right(self.file_ends, i)
        first = self.file_ends[number - 1] if number else 0
        return f"{self.files[number]}, row {i - first}"

    def read(self, i, size=None, turn=False):
        """Return image i, (H, W, 3) uint8. size, turn: see fid.ImageReader.read.

        Raises ValueError, with the image's name, if there is no image, or if it is unreadable.
        """
        group = self.ends.searchsorted(i, side="right")
        try:
            path = self.files[self.file_numbers[group]]
            images = load_group(path, int(self.group_numbers[group]), self.leaf)
            # Count from the end of the row group, whose declared length may be wrong.
            rows = self.ends[group] - (self.ends[group - 1] if group else 0)
            if len(images) != rows:
                raise ValueError(f"its row group holds {len(images)} images instead of {rows}")
            image = images[i - self.ends[group]]
            if image is None:
                raise ValueError("the row holds no bytes of an image")
            return decode(io.BytesIO(image), size, turn)
        except MemoryError:
            raise
        except Exception as error:  # a corrupt file can raise anything
            raise ValueError(f"cannot read image {self.name(i)}: {reason(error)}") from error

    def update(self, digest):
        """Add the number of rows and the bytes of each row group, and all labels."""
        for array in (self.ends, self.sizes, self.labels):
            digest.update(b"" if array is None else array.tobytes())


# ---------------------------------------------------------------- row groups


@functools.lru_cache(maxsize=32)
def open_file(path, process, strings=None):
    """Open a Parquet file once per process, because forked workers must not share it.

    strings: a column of strings that is read as indices into its distinct values, or None.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs: pip install pyarrow") from error
    # Older versions could run code of a file (CVE-2023-47248).
    if int(pyarrow.__version__.split(".")[0]) < 15:
        raise ValueError(f"{path} needs: pip install 'pyarrow>=15'")
    if not os.path.isfile(path):  # opening a pipe would block forever
        raise ValueError(f"{path} is not a file")
    return pyarrow.parquet.ParquetFile(path, read_dictionary=[strings] if strings else None)


@functools.cache
def kept_groups(process):
    """Return a lock, and the row groups that this process keeps: {key: (images, bytes)}."""
    return threading.Lock(), collections.OrderedDict()


def load_group(path, group, leaf):
    """Return the encoded images of a row group, see read_group, from memory if it is kept."""
    lock, kept = kept_groups(os.getpid())
    key = path, group, leaf
    with lock:  # the threads of --pack need the same row groups
        if key not in kept:
            kept[key] = read_group(path, group, leaf)
            # Drop the row groups that were not used for the longest time.
            while len(kept) > 1 and sum(size for _, size in kept.values()) > CACHED_BYTES:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key][0]


def read_group(path, group, leaf):
    """Return the encoded images of a row group, a list of bytes or None, and their size in bytes.

    leaf: the column of bytes, such as image.bytes. Raises ValueError if they exceed LARGEST_GROUP.
    """
    images, size = [], 0
    file = open_file(path, os.getpid())
    try:
        # Row by row, which is as fast as all at once. A small row group can hold one large image
        # and a million references to it: stop before it fills the memory.
        for batch in file.iter_batches(1, [group], [leaf], use_threads=False):
            for image in batch.column(0).to_pylist():
                image = image["bytes"] if isinstance(image, dict) else image
                images.append(image)
                size += 64 + len(image or b"")  # a Python object takes about 64 bytes
            if size > LARGEST_GROUP:
                raise ValueError(f"its row group expands to more than {LARGEST_GROUP:,} bytes")
    except MemoryError as error:  # the size that the file declares
        raise ValueError("its row group does not fit into memory") from error
    return images, size


# ---------------------------------------------------------------- labels, texts and classes


def read_index(files, keys, captions):
    """Read everything but the images.

    Returns the leaf column of the images, an int64 array (4, groups) of all row groups, the labels
    or texts (N,) or None, and the class names or None.
    """
    parts, kinds, groups = [], [], []
    for number, path in enumerate(files):
        try:
            # The columns of the first file are those of all files.
            keys, leaf, rows, sizes, values, names = read_file(path, keys, captions)
        except Exception as error:  # a corrupt file can raise anything
            text = reason(error)
            raise ValueError(text if path in text else f"{path}: {text}") from error
        groups += zip([number] * len(rows), range(len(rows)), sizes, rows)
        parts.append(values)
        kinds.append((leaf, type(values), names))
        if kinds[number] != kinds[0]:
            raise ValueError(f"{path} has columns of other types or other classes than {files[0]}")
    groups = np.array(groups, dtype=np.int64).T
    recommend(files, groups, captions)

    if values is None:
        return leaf, groups, None, None
    if captions:
        return leaf, groups, StringArray(text for part in parts for text in part), None
    if isinstance(values, StringArray):
        names = sorted({name for part in parts for name in part})
        number = {name: i for i, name in enumerate(names)}
        parts = [np.array([number[name] for name in part], dtype=np.int64) for part in parts]
    labels = np.concatenate(parts)
    return leaf, groups, labels, names or [str(i) for i in range(labels.max() + 1)]


def recommend(files, groups, captions):
    """Print a line if reading in random order is slow."""
    _, _, sizes, rows = groups
    # A random image is in a large row group more often than in a small one.
    size = np.average(sizes, weights=rows)
    if sizes.sum() > CACHED_BYTES and size > SLOW_GROUP:
        # --pack does not keep captions.
        remedy = "write the files with row_group_size=10" if captions else "use --pack once"
        print(
            f"{files[0]}: random order is slow, because pyarrow reads a row group of "
            f"{size / 1e6:.0f} MB for each image: {remedy}",
            flush=True,
        )


def read_file(path, keys, captions):
    """Read the numbers of a file, and its labels or texts.

    Returns the names of the columns, the leaf column with the bytes of the images, the number of
    rows of each row group and their bytes, the labels (N,) int64 or a StringArray of strings or
    None, and the names of the classes or None. Raises ValueError.
    """
    file = open_file(path, os.getpid())
    import pyarrow.types as types

    schema, metadata = file.schema_arrow, file.metadata
    keys = find_columns(schema.names, keys, captions)

    # The images: structs with bytes, or the bytes alone.
    leaf, kind = keys[0], schema.field(keys[0]).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        leaf, kind = f"{leaf}.bytes", kind.field("bytes").type
    if str(kind) not in ("binary", "large_binary", "binary_view"):
        raise ValueError(f"{keys[0]} holds {kind}, not encoded images: structs of bytes, or bytes")

    # Numbers that no dataset has would only fail later, and take much memory before. The sizes are
    # those of whole rows: pyarrow aborts the process if it reads damaged metadata of a column.
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    sizes = [group.total_byte_size for group in groups]
    if not any(rows):
        raise ValueError("it contains no images")
    if min(rows + sizes) < 0 or sum(rows) > ROWS_PER_BYTE * os.path.getsize(path):
        raise ValueError(f"it declares {sum(rows):,} rows in {sum(sizes):,} bytes")
    if max(sizes) > LARGEST_GROUP:
        raise ValueError(
            f"a row group has {max(sizes):,} bytes, more than {LARGEST_GROUP:,}: write the file "
            "with row_group_size=100"
        )
    if len(keys) == 1:
        return keys, leaf, rows, sizes, None, None

    # The labels or texts.
    kind = schema.field(keys[1]).type
    strings = kind.value_type if types.is_dictionary(kind) else kind
    if str(strings) in ("string", "large_string", "string_view"):
        return keys, leaf, rows, sizes, StringArray(read_strings(path, keys[1], rows)), None
    if captions or not types.is_integer(kind):
        wanted = "texts" if captions else "integers or strings"
        raise ValueError(f"{keys[1]} holds {kind}, not {wanted}")
    names = class_names(schema.metadata or {}, keys[1])
    return keys, leaf, rows, sizes, read_numbers(path, keys[1], rows, names), names


def find_columns(names, keys, captions):
    """Return the names of the columns to read, [IMAGE, LABEL or TEXT] or [IMAGE].

    names: of all columns. Raises ValueError, with these names, if that is ambiguous.
    """
    image = keys[:1] or [name for name in ("image", "img") if name in names]
    # One key, or a file with nothing but images, means images without labels.
    unlabeled = not captions and (len(keys) == 1 or len(names) == 1)
    defaults = ("text", "caption") if captions else () if unlabeled else ("label",)
    value = keys[1:] or [name for name in defaults if name in names]
    found = [*image, *value]
    if len(image) != 1 or len(value) != 1 - unlabeled or any(names.count(n) != 1 for n in found):
        example = "image,text" if captions else "image,label, or FILE:image without labels"
        raise ValueError(f"name the columns, such as FILE:{example}, out of {', '.join(names)}")
    return found


def read_columns(path, name, rows, strings=False):
    """Yield a column of each row group, without nulls. rows: the declared number of rows of each.

    Raises ValueError, naming the row, for a null.
    """
    file = open_file(path, os.getpid(), name if strings else None)
    first = 0
    for group, length in enumerate(rows):
        column = file.read_row_group(group, columns=[name], use_threads=False).column(0)
        if len(column) != length:
            raise ValueError(f"row group {group} holds {len(column)} rows instead of {length}")
        if column.null_count:
            raise ValueError(f"row {first + column.is_null().to_numpy().argmax()} has no {name}")
        yield column
        first += length


def read_numbers(path, name, rows, names):
    """Return a column of class numbers, int64 (N,). names: of the classes, or None."""
    columns = [column.to_numpy() for column in read_columns(path, name, rows)]
    numbers = np.concatenate(columns).astype(np.int64)
    classes = len(names) if names else MOST_CLASSES
    outside = (numbers < 0) | (numbers >= classes)
    if outside.any():
        row = outside.argmax()
        raise ValueError(
            f"row {row} has the {name} {numbers[row]}, not one from 0 to {classes - 1}"
        )
    return numbers


def read_strings(path, name, rows):
    """Yield the strings of a column."""
    for column in read_columns(path, name, rows, strings=True):
        for chunk in column.chunks:
            # A million rows can be references to one long string: count before copying it.
            texts, numbers = chunk.dictionary.to_pylist(), chunk.indices.to_numpy()
            lengths = np.array([len(text) for text in texts], dtype=np.int64)
            if lengths[numbers].sum() > LARGEST_GROUP:
                raise ValueError(f"a row group of {name} exceeds {LARGEST_GROUP:,} characters")
            yield from (texts[k] for k in numbers.tolist())


def class_names(metadata, column):
    """Return the class names of a column in the metadata of the hub; None if there are none.

    Raises ValueError if the metadata is damaged.
    """
    if b"huggingface" not in metadata:
        return None
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"].get(column, {})
        names = feature.get("names")
        if names is None:
            return None
        is_list = isinstance(names, list) and len(names) > 0
        if not is_list or not all(isinstance(name, str) for name in names):
            raise ValueError("the class names are not a list of strings")
        if len(set(names)) < len(names):
            raise ValueError("two classes have the same name")
        return names
    except Exception as error:  # JSON of any content
        raise ValueError(f"the metadata huggingface is damaged ({reason(error)})") from error
