"""Images in the formats of others, behind one interface. fid.ImageReader reads the plain ones.

    from support.sources import open_source

    source = open_source(["ffhq.zip"])            # folders, .zip, .npz, .npy
    source = open_source(["train.npz:images,labels"])

A source is a sequence of images. The order, the packing and the workers of support/data.py see
nothing else of a format:

    len(source)                     the number of images
    source.read(i, size, turn)      image i as uint8 (H, W, 3), see fid.ImageReader.read
    source.labels, source.classes   int64 (N,) and the names of the classes, or None and None
    source.texts                    the captions that the format itself stores, or None
    source.name(i)                  the name of image i, for messages and for lists of captions
    source.numbers()                uint32 (N,): the checksum of each name, relative to its folder
                                    or archive; without names the row in its file
    source.update(digest)           adds names, labels and samples of the content to a checksum

The other formats: tar files in support/shards.py, Parquet in support/parquet.py.

Reading never runs code of a file, and never writes outside of the folder of the run.
"""

import glob
import json
import os
import re
import zipfile
import zlib

import numpy as np

import fid
from fid import (
    SPLIT_NAMES,
    ImageReader,
    array_labels,
    files_below,
    in_array,
    is_hidden,
    is_image,
    list_images_once,
    list_paths,
    load_arrays,
    on_first_rank,
    one_line,
)


def open_source(paths, captions=False, folder=None):
    """Open the images in paths, which all have one format. Returns a source.

    paths: one path or several, as of --data. captions: True if captions are wanted instead of
    labels. folder: where an index of the files is kept, or None. Under torchrun every rank calls
    it, and rank 0 lists the files. Raises FileNotFoundError or ValueError, with the path.
    """
    paths = list_paths(paths)
    # What a path means follows from its name: nothing is opened yet.
    files, keys = expand(paths)
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(paths)}: {' and '.join(kinds)} cannot be mixed")
    if kinds == ["tar files"]:
        from support.shards import Shards

        return Shards(files, keys, captions, folder)
    if kinds == ["Parquet files"]:
        from support.parquet import Parquet

        return Parquet(files, keys, captions, folder)

    # Folders, archives and arrays. Captions need no labels.
    if captions:
        return Files(paths)
    # A dataset.json changes the labels of folders and archives.
    labeled = on_first_rank(lambda: [path for path in paths if has_label_file(path)])
    if labeled and len(labeled) < len(paths):
        other = next(path for path in paths if path not in labeled)
        raise ValueError(
            f"{labeled[0]} has a {LABEL_FILE}, and {other} has none: all or none must have one"
        )
    return LabeledFiles(paths) if labeled else Files(paths)


# ---------------------------------------------------------------- messages of one line


def printable(text):
    """Return a text without control characters: names in a file can contain anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def reason(error):
    """Return the text of an exception for a message, at most 300 characters."""
    # Pillow names the object that it reads from: <_io.BytesIO object at 0x...>.
    return printable(one_line(error).partition(" <_io")[0][:300])


def short(value):
    """Return the text of a value of a file, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---------------------------------------------------------------- what a path means

KINDS = {".tar": "tar files", ".parquet": "Parquet files"}
WITH_KEYS = (".npz", ".npy", *KINDS)  # endings of files whose name may be followed by keys


def kind_of(file):
    """Return the kind of a file by the end of its name."""
    return KINDS.get(os.path.splitext(file)[1], "folders, zip files and arrays")


def split_keys(path):
    """Split "file.npz:images,labels" into the path and the list of keys; ("file.npz", []) without.

    An existing file of the whole name wins.
    """
    file, colon, keys = path.rpartition(":")
    if not colon or os.path.exists(path) or not file.endswith(WITH_KEYS):
        return path, []
    return file, keys.split(",")


def expand(paths):
    """Return the files that paths mean, and their keys.

    A pattern such as shards/train-{0000..0127}.tar or *.parquet stands for its files, and a folder
    of tar or Parquet files for these. Other paths are returned as they are, with their keys.
    Raises ValueError for a pattern without files, for different keys, and for files of several
    splits, such as train and test.
    """
    files, all_keys = [], []
    for path in paths:
        # found: the tar or Parquet files that the path means. Any other path means itself.
        file, keys = split_keys(path)
        if os.path.isdir(path):
            found = shards_in_folder(path)
        elif file.endswith(tuple(KINDS)) and not os.path.exists(file):
            found = [match for pattern in braces(file) for match in matches(pattern)]
        elif file.endswith(tuple(KINDS)):
            found = [file]
        else:
            found = []
        if found:
            files += found
            all_keys.append(keys)
        else:
            files.append(path)
    if any(keys != all_keys[0] for keys in all_keys):
        raise ValueError(f"{', '.join(paths)}: use the same keys for all files")
    if all_keys:
        check_split_files(files)
    return files, all_keys[0] if all_keys else []


def shards_in_folder(folder):
    """Return the tar or Parquet files directly in a folder; [] if it also holds images."""
    found = []
    for entry in os.scandir(folder):
        # One image is enough to tell, so a large folder of images is not listed here.
        if is_image(entry.name):
            return []
        if entry.name.endswith(tuple(KINDS)) and not is_hidden(entry.name):
            found.append(os.path.join(folder, entry.name))
    # Images in subfolders count, too: the tar file may be the one that they were unpacked from.
    if found and any(is_image(os.path.relpath(file, folder)) for file in files_below(folder)):
        return []
    return sorted(found)


def matches(pattern):
    """Return the sorted files that match a pattern with *, ? or []. Raises FileNotFoundError."""
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{pattern}: there is no such file")
    return found


def braces(pattern):
    """Return the patterns that a shell makes of {00..12} and {a,b} in a pattern.

    Raises ValueError for more than a million.
    """
    # The first braces: two numbers, or words with commas between them.
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        if abs(int(last) - int(first)) >= 1_000_000:
            raise ValueError(f"{pattern} stands for more than a million files")
        # A leading zero pads all numbers to the same width.
        width = len(first) if first.startswith("0") else 0
        words = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    else:
        words = words.split(",")
    # Later braces are expanded in each of the results.
    parts = [pattern[: match.start()] + word + pattern[match.end() :] for word in words]
    return [result for part in parts for result in braces(part)]


def check_split_files(files):
    """Raise ValueError if file names, such as train-00000.parquet, belong to several splits."""
    # The words of a name, such as train and parquet, without numbers and punctuation.
    first = {}  # split -> a file of it
    for file in files:
        for word in re.split(r"[^a-z]+", os.path.basename(file).lower()):
            if word in SPLIT_NAMES:
                first.setdefault(word, file)
    if len(first) > 1:
        split = next((word for word in first if word.startswith("train")), min(first))
        folder, ending = os.path.dirname(first[split]), os.path.splitext(first[split])[1]
        name = os.path.join(folder, f"{split}*{ending}")
        raise ValueError(f"the files are of the splits {', '.join(sorted(first))}: use {name}")


# ---------------------------------------------------------------- files and arrays of fid.py


def checksums(names):
    """Return the CRC-32 of each string in a fid.StringArray, uint32 (N,)."""

    def each():
        # The strings in the array need not be decoded.
        start = 0
        for end in names.ends:
            yield zlib.crc32(names.content[start:end])
            start = end

    return np.fromiter(each(), np.uint32, len(names))


class Files(ImageReader):
    """Folders, zip files and arrays, as fid.py reads them."""

    texts = None

    def __init__(self, paths):
        super().__init__(paths, list_images_once)

    def open_path(self, path):
        """Also open arrays of other layouts and names, see open_arrays."""
        file, keys = split_keys(path)
        refuse_pickles(path)
        if file.endswith((".npz", ".npy")) and os.path.isfile(file):
            return open_arrays(file, keys)
        return super().open_path(path)

    def numbers(self):
        """Return a number for each image that depends on it alone, uint32 (N,)."""
        parts = [
            np.arange(len(where), dtype=np.uint32) if names is None else checksums(names)
            for where, names in self.sources.parts
        ]
        return np.concatenate(parts)

    def name(self, i):
        """Return the path of image i; in an array, its row."""
        where, name = self.sources[i]
        if in_array(where):
            return f"row {name}"
        return os.path.join(where or "", name)

    def update(self, digest):
        """Add the names and labels of all images, and the sizes or pixels of about a thousand."""
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        every = 1 + len(self) // 1000
        for i, (where, name) in enumerate(self.sources):
            # A source is (array, row), (zip file, name) or (None, file).
            if not in_array(where):
                digest.update(os.path.basename(name).encode(errors="surrogateescape"))
            if i % every == 0 and in_array(where):
                digest.update(where[name].tobytes())
            elif i % every == 0:
                digest.update(b"%d" % os.lstat(where or name).st_size)


CIFAR_FILES = ("data_batch_1", "batches.meta")  # of the version that is pickled


def refuse_pickles(path):
    """Raise ValueError for the pickled batches of CIFAR: unpickling may run code."""
    is_batch = False
    if os.path.isdir(path):
        is_batch = any(os.path.isfile(os.path.join(path, name)) for name in CIFAR_FILES)
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            start = file.read(2)
        # Every pickle since protocol 2 begins with the byte 128 and the number of the protocol.
        is_batch = len(start) == 2 and start[0] == 0x80 and start[1] in (2, 3, 4, 5)
    if is_batch:
        raise ValueError(
            f"{path} is pickled, which may run code: download the binary version of CIFAR-10, and "
            "convert it with python -m docs.cifar"
        )


# ---------------------------------------------------------------- arrays


def open_arrays(path, keys=()):
    """Open the images of an .npz or .npy file: arrays of bytes or floats, channels first or last.

    keys: the names of the images, and of the labels if there are any. Without keys, the images are
    x or arr_0, and the labels are y. Returns images (N, H, W, C), converted to uint8 on access,
    labels and class names, see fid.read_arrays. Raises ValueError for what is ambiguous.
    """
    if len(keys) > 2:
        raise ValueError(f"{path}: name the images and the labels, not {', '.join(keys)}")
    # Of other names nobody can tell which are the images.
    if not keys:
        stored = array_names(path)
        if stored is not None and not {"x", "arr_0"} & set(stored):
            raise ValueError(
                f"{path} holds {', '.join(stored) or 'nothing'}: name the images and the labels, "
                f"such as {path}:{stored[0] if stored else 'images'},labels"
            )
    # The images, mapped from the file, and how to turn them into bytes.
    images, labels, classes = load_arrays(path, keys)
    images = images[..., None] if images.ndim == 3 else images  # gray
    convert = on_first_rank(find_conversion, path, images)
    # One column of labels is as good as none.
    if labels is not None and labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels is not None and labels.ndim == 2:
        raise ValueError(
            f"{path}: the labels have the shape {labels.shape}, not {(len(images),)}: if they are "
            "one-hot, store y.argmax(1)"
        )
    labels = array_labels(path, len(images), labels, classes)
    return Converted(images, *convert) if convert else images, labels, classes


class Converted:
    """Images (N, H, W, C) in uint8, computed on access from an array of another layout.

    channels_first: True if the array is (N, C, H, W). scale, offset: brightness is scale * value +
    offset, from 0 to 255.
    """

    def __init__(self, array, channels_first, scale, offset):
        self.array = array
        self.channels_first = channels_first
        self.scale = scale
        self.offset = offset
        n, *sides = array.shape
        self.shape = (n, *sides[1:], sides[0]) if channels_first else array.shape

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        image = self.array[i]
        if self.scale != 1:
            image = (self.scale * image.astype(np.float64) + self.offset).round().clip(0, 255)
        image = image.astype(np.uint8)
        return image.transpose(1, 2, 0) if self.channels_first else image


def find_conversion(path, images):
    """Find out how an array stores images. Returns the arguments of Converted, or None for uint8.

    Shape and range decide. Prints what is converted. Raises ValueError for an array that could mean
    several things, with a line of NumPy that makes it clear.
    """
    # The shape must have one axis of channels, gray or color.
    kind, shape = images.dtype, images.shape
    if images.ndim != 4 or not {1, 3} & {shape[1], shape[-1]} or min(shape) < 1:
        raise ValueError(
            f"{path}: images of the shape {shape} are neither (N, H, W, 3) nor (N, 3, H, W); of "
            "images with transparency, store x[..., :3]"
        )
    # No image is 1 or 3 pixels wide: a last axis of this size holds the channels.
    channels_first = shape[-1] not in (1, 3)
    if kind == np.uint8:
        if not channels_first:
            return None
        scale, offset, values = 1, 0, "bytes"
    else:
        scale, offset, values = find_range(path, images)
    order = ", channels first" if channels_first else ""
    print(f"{path}: {values}{order}: converted to bytes", flush=True)
    return channels_first, scale, offset


def find_range(path, images):
    """Return scale and offset that turn values of an array into 0 to 255, and a description."""
    if images.dtype.kind not in "fiu":
        raise ValueError(f"{path}: images of the type {images.dtype} are not supported")
    # All images, in parts: they need not fit into memory.
    low, high = np.inf, -np.inf
    for start in range(0, len(images), 256):
        part = np.asarray(images[start : start + 256])
        low, high = np.minimum(low, part.min()), np.maximum(high, part.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{path}: the images contain NaN or infinity")

    # Zeros alone, or integers 0 and 1, could be black images or masks: they are refused.
    values = f"{images.dtype} from {low:g} to {high:g}"
    if images.dtype.kind == "f":
        if 0 <= low < high <= 1:
            return 255, 0, values
        if -1 <= low < 0 < high <= 1:
            return 127.5, 127.5, values
    elif low >= 0 and 1 < high <= 255:
        return 1, 0, values
    raise ValueError(
        f"{path}: {values} is neither 0 to 1, -1 to 1 nor bytes: store them as bytes, for example "
        "x.round().clip(0, 255).astype(np.uint8), or (x / 257).round().astype(np.uint8) for 16 bits"
    )


def array_names(path):
    """Return the names of the arrays in an .npz file; None for an .npy file or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays)
    except Exception:  # fid.read_arrays reports it
        return None


# ---------------------------------------------------------------- dataset.json of EDM and StyleGAN

LABEL_FILE = "dataset.json"
LARGEST_LABEL_FILE = 2**28  # bytes: five million images. A small zip file may hold a huge one.


def has_label_file(path):
    """Return True if a folder or zip file has a dataset.json at its root."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, LABEL_FILE))
    try:
        with zipfile.ZipFile(path) as archive:
            return LABEL_FILE in archive.NameToInfo
    except Exception:  # the reader of other formats reports a damaged file
        return False


class LabeledFiles(Files):
    """Folders or zip files of the dataset tool of EDM and StyleGAN, labeled by their dataset.json.

    The folders inside mean nothing. The file is {"labels": [["00000/img00000000.png", 6], ...]}, or
    {"labels": null} for images without labels. Classes are named by their numbers.
    Raises ValueError, with the first bad name, unless the file lists exactly the images.
    """

    def __init__(self, paths):
        # The images are listed as always, but the labels of their folders are dropped.
        super().__init__(paths)
        self.labels = self.classes = None
        parts = [
            on_first_rank(read_label_file, path, names)
            for path, (_, names) in zip(paths, self.sources.parts)
        ]
        # A label for every image, or for none.
        missing = [path for path, part in zip(paths, parts) if part is None]
        if missing and len(missing) < len(parts):
            raise ValueError(f"{missing[0]} has no labels, and another path has: use one of them")
        if not missing:
            self._number_labels(np.concatenate(parts).tolist(), [])


def read_label_file(path, names):
    """Return the labels (N,) of these images in the dataset.json of path; None if it has none."""
    where = os.path.join(path, LABEL_FILE)
    entries = load_label_file(path, where)
    if entries is None:
        return None

    # Pairs of a name and a number. Anything else is another use of the file.
    labels = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{where}: {short(entry)} is not a pair of a name and a label")
        name, label = entry[0].replace("\\", "/"), entry[1]
        if isinstance(label, (list, float)):
            raise ValueError(
                f"{where}: the label of {name} is {short(label)}: vectors and fractions are not "
                "classes; write integers"
            )
        if type(label) is not int or not 0 <= label < fid.MOST_CLASSES:
            raise ValueError(f"{where}: the label of {name} is {short(label)}, not a class number")
        if name in labels:
            raise ValueError(f"{where} lists {name} twice")
        labels[name] = label

    # Exactly the images, so that no image is trained on with a wrong or a missing label.
    for name in names:
        if name not in labels:
            raise ValueError(f"{where} has no label for {name}")
    if len(labels) > len(names):
        known = set(names)
        name = next(name for name in labels if name not in known)
        raise ValueError(f"{where} lists {name}, and there is no such image")
    return np.array([labels[name] for name in names], dtype=np.int64)


def load_label_file(path, where):
    """Return the value of "labels" in the dataset.json of path: a list that is not empty, or None.

    where: the name of the file, for messages.
    """
    # Read one byte more than is allowed, whatever size the file or the archive declares.
    try:
        if os.path.isdir(path):
            with open(where, "rb") as file:
                content = file.read(LARGEST_LABEL_FILE + 1)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(LABEL_FILE) as file:
                content = file.read(LARGEST_LABEL_FILE + 1)
        if len(content) > LARGEST_LABEL_FILE:
            raise ValueError(f"it is larger than {LARGEST_LABEL_FILE:,} bytes")
        entries = json.loads(content)["labels"]
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f'{where} is not {{"labels": [...]}} ({one_line(error)})') from error
    if entries is not None and (not isinstance(entries, list) or not entries):
        raise ValueError(f"{where}: labels must be a list of pairs, or null, not {short(entries)}")
    return entries
