"""Images in tar files, as WebDataset stores them, with random access.

    from support.sources import open_source

    source = open_source(["shards/train-{0000..0127}.tar"])      # labels in .cls, if there are any
    source = open_source(["shards/*.tar"], captions=True)        # captions in .txt
    source = open_source(["shards/*.tar:label"])                 # labels in .json, with this key

A sample is a few members that share a name up to the first dot, such as 0001.jpg and 0001.cls. The
folder of a member is a part of this name.

WebDataset reads tar files from start to end and shuffles within a buffer. Here, an index holds the
position of every image. So the order is that of every other source: the same for any number of
ranks and workers, and after a restart.

Nothing is unpacked and no link is followed: the name of a member serves as a name only.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import stat
import sys
import tarfile

import numpy as np

from fid import MOST_CLASSES, ImageCounter, StringArray, decode, is_hidden, on_first_rank
from support.runtime import writing
from support.sources import checksums, printable, reason

IMAGES = ("jpg", "jpeg", "png", "webp")

# A header can declare any size. At most this many bytes of a member are read into memory.
LARGEST_IMAGE = 2**29
LARGEST_VALUE = dict(cls=2**20, txt=2**20, json=2**24)
LARGEST_HEADER = 2**14  # all headers of one member: long names take additional ones


class Shards:
    """The images of tar files: a source, see support/sources.py.

    The order is that of the files, and of the images within each file. Hidden members are ignored,
    and everything that is not a regular file, such as links.

    files: paths of tar files. keys: one key of the .json members, for the labels or the captions;
    or [] for labels in .cls and captions in .txt members. captions: True for captions, False for
    labels. folder: where the index is kept, or None. Under torchrun every rank creates it, and
    rank 0 reads the files. Raises ValueError or OSError, with the file, if a file is damaged, and
    ValueError if only some of the images have a label.
    """

    def __init__(self, files, keys, captions, folder):
        if len(keys) > 1:
            raise ValueError(f"{files[0]}: name one key of the .json members, not {len(keys)}")
        # What follows is small, and forked workers share it: the content stays in the files.
        index, self.version = on_first_rank(open_index, files, keys, captions, folder)
        self.files = files
        self.ends = index["counts"].cumsum()  # (files,): the number of images up to each end
        self.offsets, self.sizes = index["offsets"], index["sizes"]  # (N,) bytes
        self.names = string_array(index, "names")
        self.captions = string_array(index, "texts") if captions else None
        self.labels = index.get("labels")
        self.classes = None if self.labels is None else list(string_array(index, "classes"))

    def __len__(self):
        return len(self.offsets)

    @property
    def texts(self):
        """A list of the captions, with None for images without; None if labels are wanted."""
        return None if self.captions is None else [text or None for text in self.captions]

    def _file(self, i):
        """Return the path of the tar file of image i."""
        return self.files[np.searchsorted(self.ends, range(len(self))[i], side="right")]

    def numbers(self):
        """Return the checksum of each name inside of its tar file, uint32 (N,)."""
        return checksums(self.names)

    def name(self, i):
        """Return the name of image i, file.tar/member."""
        return f"{self._file(i)}/{self.names[i]}"

    def read(self, i, size=None, turn=False):
        """Return image i, (H, W, 3) uint8. size, turn: see fid.ImageReader.read.

        Raises ValueError, with the image's name, if the image is unreadable.
        """
        try:
            if self.sizes[i] > LARGEST_IMAGE:
                raise ValueError(f"it is larger than {LARGEST_IMAGE:,} bytes")
            file = open_file(self._file(i), self.version)
            content = read_at(file, self.offsets[i], self.sizes[i])
            return decode(io.BytesIO(content), size, turn)
        except MemoryError:
            raise
        except Exception as error:  # a corrupt image can raise anything
            name = printable(self.name(i))
            raise ValueError(f"cannot read image {name}: {reason(error)}") from error

    def update(self, digest):
        """Add the names, sizes and labels of all images."""
        digest.update(self.names.content)
        for array in (self.names.ends, self.sizes, self.labels):
            digest.update(b"" if array is None else array.tobytes())


@functools.lru_cache(maxsize=128)
def open_file(path, version):
    """Open a tar file, once per process and version of the index."""
    return open(path, "rb", buffering=0)


def read_at(file, offset, size):
    """Return `size` bytes of a file from an offset. Raises ValueError if there are fewer."""
    # pread uses no file position, so threads and forked workers may share the file. In a file that
    # was truncated later, it reads fewer bytes. A memory map would crash the process.
    content = os.pread(file.fileno(), size, offset)
    if len(content) < size:
        raise ValueError("the tar file ends before it")
    return content


# ---------------------------------------------------------------- the index


def open_index(files, keys, captions, folder):
    """Return the index of tar files, a dict of arrays, and its version, a checksum.

    The index is read from the folder. It is made if it is missing or damaged.
    """
    # The name of the index depends on everything that its content depends on.
    identity = [1, keys, captions]
    sizes = []
    for file in files:
        state = os.stat(file)
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would block forever
            raise ValueError(f"{file} is not a file")
        identity += [os.path.abspath(file), state.st_size, state.st_mtime_ns]
        sizes.append(state.st_size)
    version = hashlib.sha256(ascii(identity).encode()).hexdigest()[:16]

    # A kept index is checked again: a disk or a person may have changed it.
    path = os.path.join(folder, f"shards-{version}.npz") if folder else None
    if path and os.path.exists(path):
        try:
            with np.load(path, allow_pickle=False) as stored:
                index = dict(stored)
            check_index(index, captions, np.array(sizes))
            return index, version
        except Exception as error:  # a damaged file can raise anything
            print(f"{path} is damaged and made again ({reason(error)})", file=sys.stderr)
    # Otherwise read the headers of all files, and keep the result if there is a folder.
    index = make_index(files, keys, captions)
    if path:
        os.makedirs(folder, exist_ok=True)
        with writing(path) as file:
            np.savez(file, **index)
    return index, version


def check_index(index, captions, file_sizes):
    """Raise ValueError or KeyError unless the index is complete and its images lie in the files."""
    # An offset outside of its file would read something else, or nothing.
    counts, offsets, sizes = index["counts"], index["offsets"], index["sizes"]
    ends = np.repeat(file_sizes, counts)  # for each image, the size of its file
    values = index["texts_ends"] if captions else index.get("labels", sizes)
    one_each = [offsets, ends, values, index["names_ends"]]
    fits = len(counts) == len(file_sizes) and all(a.shape == sizes.shape for a in one_each)
    if not fits or min(offsets.min(), sizes.min(), (ends - sizes - offsets).min()) < 0:
        raise ValueError("it does not describe these files")


def pack_strings(name, strings):
    """Return the arrays that store strings in an index."""
    strings = StringArray(strings)
    return {name: np.frombuffer(strings.content, np.uint8), f"{name}_ends": strings.ends}


def string_array(index, name):
    """Return the StringArray that pack_strings stored."""
    strings = StringArray([])
    strings.content, strings.ends = index[name].tobytes(), index[f"{name}_ends"]
    return strings


def make_index(files, keys, captions):
    """Read all headers, and the labels or captions. Returns a dict of arrays."""
    # One file after the other, then all of them as a few arrays.
    counter = ImageCounter()
    parts = [index_file(file, keys, captions, counter) for file in files]
    counter.end()
    offsets, sizes, names, values = zip(*parts)
    values = StringArray(itertools.chain(*values))
    index = dict(
        counts=np.array([len(part) for part in offsets]),
        offsets=np.concatenate(offsets),
        sizes=np.concatenate(sizes),
        **pack_strings("names", itertools.chain(*names)),
    )
    if captions:
        return index | pack_strings("texts", values)

    # All images have a label, or none has one.
    missing = np.diff(values.ends, prepend=0) == 0
    if missing.all() and not keys:
        return index
    if missing.any():
        images = [f"{file}/{name}" for file, part in zip(files, names) for name in part]
        where = f"with the key {keys[0]} in .json" if keys else "in .cls"
        raise ValueError(
            f"{printable(images[missing.argmax()])} has no label {where}: {missing.sum()} of "
            f"{len(images)} images have no label"
        )

    # Labels are stored as JSON. Numbers without names: every number up to the largest is a class.
    labels = {value: json.loads(value) for value in set(values)}
    if len(set(map(type, labels.values()))) > 1:
        raise ValueError(f"{files[0]}: use either numbers or names as labels, not both")
    # Names are sorted, so that their numbers do not depend on the order of the images.
    classes = sorted(labels.values())
    if isinstance(classes[0], int):
        classes = range(classes[-1] + 1)
    number = {name: i for i, name in enumerate(classes)}
    index["labels"] = np.fromiter((number[labels[value]] for value in values), np.int64)
    return index | pack_strings("classes", map(str, classes))


def index_file(path, keys, captions, counter):
    """Return offsets (N,), sizes (N,), names and values of the images in a tar file, in order.

    A value is a caption, or the JSON of a label, or "".
    """
    ending = "json" if keys else "txt" if captions else "cls"  # of the members with values
    endings = {*IMAGES, ending}
    images = {}  # name of the sample -> (offset, size, name of the member)
    values = {}  # name of the sample -> value
    with open(path, "rb", buffering=0) as file:
        for member in members(file, path):
            # The name of a sample ends at the first dot behind the folder.
            folder, slash, base = member.name.rpartition("/")
            stem, _, end = base.partition(".")
            sample, end = folder + slash + stem, end.lower()
            if end not in endings or not member.isreg():
                continue
            if any(map(is_hidden, member.name.split("/"))):
                continue
            try:
                if member.issparse():
                    raise ValueError("make the tar file without --sparse")
                if sample in (images if end in IMAGES else values):
                    raise ValueError("another member has the same name up to the first dot")
                if end in IMAGES:
                    images[sample] = (member.offset_data, member.size, member.name)
                    counter.add(path)
                else:
                    values[sample] = read_value(file, member, end, keys, captions)
            except Exception as error:  # a corrupt member can raise anything
                line = f"{path}/{member.name}: {reason(error)}"
                raise ValueError(printable(line)) from error

    # A value without an image may belong to an image of another name.
    for sample, value in values.items():
        if value and sample not in images:
            line = f"{path}/{sample}.{ending} has no image of this name, .{', .'.join(IMAGES)}"
            raise ValueError(printable(line))
    if not images:
        raise ValueError(
            f"{path} contains no images: their names must be like 0001.jpg, with one dot, and end "
            f"with .{', .'.join(IMAGES)}"
        )
    # In the order of the images. One without a value gets an empty one.
    offsets, sizes, names = zip(*images.values())
    texts = (values.get(sample, "") for sample in images)
    return np.array(offsets), np.array(sizes), StringArray(names), StringArray(texts)


def read_value(file, member, ending, keys, captions):
    """Return the caption or the JSON of the label in a member; "" if .json has none.

    Raises ValueError if it is neither.
    """
    if member.size > LARGEST_VALUE[ending]:
        raise ValueError(f"it is larger than {LARGEST_VALUE[ending]:,} bytes")
    content = read_at(file, member.offset_data, member.size)
    if ending == "json":
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        value = fields.get(keys[0])
        if value is None:
            return ""
    else:
        value = content.decode("utf-8-sig")

    if captions:
        if not isinstance(value, str):
            raise ValueError(f"{keys[0]} is not a text")
        value.encode()  # JSON may contain half of a character, which UTF-8 cannot store
        return value
    # A label is a number. In .json, it may also be a name.
    if ending == "cls" and value.strip().isdecimal():
        value = int(value)
    if type(value) is int and 0 <= value < MOST_CLASSES:
        return str(value)
    if ending == "json" and isinstance(value, str) and value.isprintable():
        return value and json.dumps(value)
    kinds = " or a name" if ending == "json" else "; store names in .json"
    raise ValueError(f"a label must be a number from 0 to {MOST_CLASSES - 1:,}{kinds}")


# ---------------------------------------------------------------- headers


class HeaderReader(io.BufferedReader):
    """A file of which at most `left` more bytes are read. Raises ValueError beyond that.

    The module tarfile reads long names of any size that a header declares.
    """

    left = LARGEST_HEADER

    def read(self, size=-1):
        self.left -= size
        if size < 0 or self.left < 0:
            raise ValueError("a header is too large")
        return super().read(size)


def members(raw, path):
    """Yield the tarfile.TarInfo of each member of an open file. path: for messages.

    Raises ValueError if the file is damaged or incomplete.
    """
    try:
        file = HeaderReader(raw)
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
        while member := tar.next():
            # The content must end before the next header, also if the header lies. A negative size
            # would lead back to an earlier header, and to an endless loop.
            size = member.size if member.isreg() and not member.issparse() else 0
            if size < 0 or not member.offset_data <= member.offset_data + size <= tar.offset:
                raise ValueError("a header declares a wrong size")
            yield member
            # Forget what tarfile collects: all members, and all global headers.
            tar.members.clear()
            tar.pax_headers.clear()
            file.left = LARGEST_HEADER

        # tarfile also stops, without an error, at a damaged header and at the end of a truncated
        # file. Only a block of zeros is the end of an archive. More zeros may follow it.
        end = os.pread(raw.fileno(), 2**20, tar.offset)
        if len(end) < tarfile.BLOCKSIZE or any(end[: tarfile.BLOCKSIZE]):
            raise ValueError(f"there is no valid header at byte {tar.offset:,}")
        if any(end):
            raise ValueError("data follows its end: tar files cannot be concatenated")
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(
            f"{path} is not a complete tar file ({reason(error)}): download or make it again, "
            "without compression"
        ) from error
