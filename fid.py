"""Reading pictures for training and evaluation: folders, zip files and arrays, as RGB uint8. Imports nothing of the project.

    pictures = Pictures(["train.zip", "more/"])     # nested folders, class folders, .zip, .npz and .npy
    pictures[0]                                     # (H, W, 3) uint8;  pictures.labels[0], pictures.classes
"""

import os
import threading
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile,
              Image.DecompressionBombError)  # what Pillow, numpy and zipfile make of broken files, encrypted ones among them


def is_picture(name):
    """Whether a file name, which may have folders before it, is that of a picture and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.rpartition("/")[2].startswith(".")


def to_rgb(image):
    """A PIL image of any mode as RGB, as a person would see it: turned as EXIF says, transparent parts white, 16 bits to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Pictures:
    """All pictures below some paths, in the order of the paths and then of the names, as RGB uint8.

    paths: folders (nested), .zip files, .npz (x or arr_0, with y and classes if labeled) or .npy files, uint8 NHWC.
    labels: int64 array (N,), or None. classes: their names. In folders and zip files a picture's class is its first folder
    below the folders that all of them share; a picture outside of any such folder means that there are no labels.
    Hidden files are passed over. Raises FileNotFoundError or ValueError, naming the path, when there is nothing to read.
    """

    def __init__(self, paths):
        self.sources, self.labels, self.classes = [], None, None  # sources: (array, row), (zip path, name) or (None, file)
        names, labels, classes = [], [], []  # names: of files; labels: names of classes, or their numbers where they have none
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            path = os.fspath(path)
            found = len(self.sources)
            if os.path.isdir(path):
                files = sorted(os.path.relpath(os.path.join(folder, file), path).replace(os.sep, "/")
                               for folder, _, files in os.walk(path, followlinks=True) for file in files if is_picture(file))
                names += files
                self.sources += [(None, os.path.join(path, file)) for file in files]
            elif not os.path.isfile(path):
                raise FileNotFoundError(f"{path}: no such file or folder")
            elif path.endswith((".npz", ".npy")):
                array, array_labels, array_classes = read_arrays(path)
                labels += array_labels
                classes += [name for name in array_classes if name not in classes]
                self.sources += [(array, i) for i in range(len(array))]
            elif zipfile.is_zipfile(path):
                files = sorted(name for name in zipfile.ZipFile(path).namelist() if is_picture(name) and not name.startswith("__MACOSX/"))
                names += files
                self.sources += [(path, file) for file in files]
            else:
                raise ValueError(f"{path}: neither a folder nor a zip, npz or npy file")
            if len(self.sources) == found:
                raise ValueError(f"{path}: no pictures in it ({', '.join(EXTENSIONS)})")

        if names and len(names) < len(self.sources):
            raise ValueError("pictures come either from folders and zip files or from npz and npy files, not from both")
        if labels and (len(labels) < len(self.sources) or len({type(label) for label in labels}) > 1):
            raise ValueError("of several npz files either all or none have y, and either all or none have classes")
        if names:
            folders = [name.split("/")[:-1] for name in names]
            shared = os.path.commonprefix(folders)  # works on lists of folders, too
            if min(len(folder) for folder in folders) > len(shared):
                labels = [folder[len(shared)] for folder in folders]
                classes = sorted(set(labels))
        if labels:
            number = {name: i for i, name in enumerate(classes)} or {i: i for i in range(max(labels) + 1)}
            self.labels = np.array([number[label] for label in labels], dtype=np.int64)
            self.classes = [str(name) for name in number]

    def __len__(self):
        return len(self.sources)

    def open(self, i, draft=None):
        """Picture i as a PIL image, RGB. draft: (width, height) that a JPEG may be decoded down to, if not below; faster.

        Raises ValueError with the picture's name when it cannot be read.
        """
        where, name = self.sources[i]
        try:
            if isinstance(where, np.ndarray):
                return Image.fromarray(self[i])
            with Image.open(_archive(where).open(name) if where else name) as image:
                if draft and image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1:
                    image.draft("RGB", draft)
                return to_rgb(image)
        except UNREADABLE as error:
            raise ValueError(f"cannot read picture {name}{f' in {where}' if where else ''}: {error}") from error

    def __getitem__(self, i):
        """Picture i as (H, W, 3) uint8."""
        where, row = self.sources[i]
        if isinstance(where, np.ndarray):
            return np.broadcast_to(where[row], (*where.shape[1:3], 3))
        return np.asarray(self.open(i))


def read_arrays(path):
    """(N, H, W, C) uint8, C 1 or 3, of an .npz or (memory mapped) .npy file, its N labels or [], and its class names or [].

    A label is the name of a class where there are names, else its number. Raises ValueError; runs no pickled code.
    """
    try:
        data = np.load(path, mmap_mode="r" if path.endswith(".npy") else None, allow_pickle=False)
        data = {"arr_0": data} if isinstance(data, np.ndarray) else data
        x = next((data[key] for key in ("x", "arr_0") if key in data), np.zeros(0))
        y = data["y"] if "y" in data else None
        classes = [str(name) for name in data["classes"]] if "classes" in data else []
    except UNREADABLE as error:
        raise ValueError(f"{path}: {error}") from error
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: x or arr_0 must be uint8 (N, H, W, 3), not {x.dtype} {x.shape}")
    if y is None:
        return x, [], []
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0 or classes and y.max() >= len(classes):
        raise ValueError(f"{path}: y must number a class of each of the {len(x)} pictures, {len(classes) or 'none'} being named")
    return x, [classes[i] for i in y] if classes else y.tolist(), classes


_archives = {}


def _archive(path):
    """A zip file, opened once per process and thread, as their reads would move one another's position."""
    key = path, os.getpid(), threading.get_ident()
    if key not in _archives:
        _archives[key] = zipfile.ZipFile(path)
    return _archives[key]
