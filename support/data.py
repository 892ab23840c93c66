"""Datasets, the order of their images, and the noise of each training example.

A dataset is a map-style PyTorch dataset:

    len(dataset)                     the number of images
    dataset[i]                       (image, label): uint8 (H, W, 3), and an integer
    dataset.__getitems__(indices)    (images, labels) of a batch: uint8 (B, H, W, 3), int64 (B,)
    dataset.classes                  the names of the classes; empty if there are no labels

Images already have the resolution of the run. Latents take their place as float32 (B, H, W, C),
and the tokens of captions take the place of labels (see support/text.py).

    from support.data import ImageData, Shapes, load_batch

    images, labels = load_batch(Shapes(64), range(10))    # uint8 (10, 3, 64, 64), int64 (10,)
    dataset = ImageData(["photos/"], 64)                  # folders, .zip, .npz or .npy files

A dataset of your own is any class with these methods; `__getitems__` is optional. The command
`python train.py --data my_module:Gray --res 32` imports this one and creates it as `Gray(32)`:

    import numpy as np

    class Gray:
        classes = ["dark", "bright"]

        def __init__(self, res):
            self.res = res

        def __len__(self):
            return 256

        def __getitem__(self, i):
            return np.full((self.res, self.res, 3), i, np.uint8), i // 128
"""

import bisect
import errno
import hashlib
import math
import operator
import os
import re
import sys
import zipfile

import numpy as np
import torch

from fid import class_names, cpu_cores, one_line, read_ahead
from sample import mix_seed
from support.runtime import import_object, pixels, writing
from support.sources import open_source, split_keys


class Dataset:
    """Base class of the datasets of this project: a map-style dataset, plus what training needs.

    A subclass sets `size`, (height, width), and defines `__len__`, `__getitems__` and `__str__`.
    str(dataset) identifies the data: a resumed run compares it to find out if the data changed.
    """

    classes = []  # names of the classes; empty if there are no labels
    net_fields = {}  # arguments of the network that follow from the data
    rotate = False  # True if portrait images are rotated to fit a landscape size
    substitutes = None  # sorted indices of the images that may replace unreadable ones; None: all
    unreadable = torch.zeros(0, dtype=torch.uint8)  # 1 for each image that was skipped

    def __getitem__(self, index):
        """Return one image (H, W, C) and its label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def sample_labels(self, n):
        """Return labels (n,) for n samples; all classes are equally frequent."""
        return torch.arange(n) % max(1, len(self.classes))


# ---------------------------------------------------------------- the built-in dataset


class Shapes(Dataset):
    """Ten classes of shapes on a smooth background with a fine texture, at any resolution.

    An image depends on its index alone, on any device: position, size, tilt, colors and texture
    are hashes of the index, and the class is index mod 10. Shapes are drawn from signed distances.

    res: side in pixels, or (height, width). length: number of images. first: the index of image 0;
    training never uses images from 2^30 on, so evaluation takes first=2**30.
    """

    classes = [
        "circle",
        "ring",
        "moon",
        "heart",
        "square",
        "diamond",
        "triangle",
        "star",
        "cross",
        "arrow",
    ]

    def __init__(self, res, device="cpu", length=1_000_000, first=0):
        self.size = pixels(res)
        self.device = device
        self.length = length
        self.first = first

    def __len__(self):
        return self.length

    def __str__(self):
        return "built-in"

    def __getitems__(self, indices):
        """Draw the images (B, H, W, 3) uint8 at these indices. Returns them and labels (B,)."""
        u, label, x, y, pixel = self._coordinates(indices)
        return self._paint(u, label, x, y, pixel), label

    def _paint(self, u, label, x, y, pixel):
        """Return the images (B, H, W, 3) uint8 of these random numbers and labels."""
        # Paint the shape over the background, then add a wave of low contrast as texture.
        inside, color = self._shape(u, label, x, y, pixel)
        image = torch.lerp(self._background(u, x, y), color, inside)
        waves = 3.5 * self._along(u[:, 13], x, y) + u[:, 14]
        image = image + 0.04 * torch.sin(6.2832 * waves)[:, None]

        image = (255 * image.clamp(0, 1)).round().to(torch.uint8)  # (B, 3, H, W)
        return image.permute(0, 2, 3, 1)

    def distances(self, indices):
        """Return the signed distance of each pixel to the shape of its image, (B, H, W).

        It is negative inside the shape. The shorter side of an image is 2. The shape covers more
        than half of a pixel exactly where the distance is negative.
        """
        u, label, x, y, _ = self._coordinates(indices)
        return self._distance(u, label, x, y)[:, 0]

    def _coordinates(self, indices):
        """Return the random numbers u (B, 16, 1, 1), labels (B,), pixels x and y, and their size.

        The shorter side spans -1 to 1; x points right and y points up.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        indices = indices.to(self.device, non_blocking=True) + self.first
        label = indices % len(type(self).classes)  # an instance with captions has no classes

        # Everything random about an image: 16 numbers, with two axes to broadcast over pixels.
        u = self._uniform(indices, 16)[:, :, None, None]

        height, width = self.size
        pixel = 2 / min(self.size)
        y = (torch.arange(height, device=self.device) - (height - 1) / 2)[:, None] * -pixel
        x = (torch.arange(width, device=self.device) - (width - 1) / 2) * pixel
        return u, label, x, y, pixel

    def _shape(self, u, label, x, y, pixel):
        """Return the coverage of each pixel (B, 1, H, W) in [0, 1], and the color (B, 3, 1, 1)."""
        hue = self._attributes(u, label[:, None, None])[3]
        # Anti-aliasing: the coverage falls from 1 to 0 over one pixel across the edge.
        inside = (0.5 - self._distance(u, label, x, y) / pixel).clamp(0, 1)
        return inside, self._color(hue, 0.75 + 0.25 * u[:, 5], 0.6 + 0.4 * u[:, 6])

    def _distance(self, u, label, x, y):
        """Return the signed distance of each pixel to the shape of its label, (B, 1, H, W)."""
        radius, right, up, _ = self._attributes(u, label[:, None, None])

        # Transform the pixels to the frame of the shape: centered, rotated and of radius 1.
        tilt = self._tilt(u)
        dx, dy = x - right, y - up
        distances = self._distances(
            (dx * tilt.cos() + dy * tilt.sin()) / radius,
            (dy * tilt.cos() - dx * tilt.sin()) / radius,
        )

        # Select the distance to the shape of the label, and scale it back to the image.
        rows = torch.arange(len(label), device=self.device)
        return distances[rows, label][:, None] * radius[:, None]

    def _background(self, u, x, y):
        """Return a linear blend of two dark colors in a random direction, (B, 3, H, W)."""
        ramp = 0.5 + 0.35 * self._along(u[:, 7], x, y)[:, None]
        one = self._color(u[:, 8], 0.15 + 0.25 * u[:, 9], u[:, 10])
        other = self._color(u[:, 11], 0.15 + 0.25 * u[:, 12], u[:, 10])
        return torch.lerp(one, other, ramp)

    @staticmethod
    def _attributes(u, label):
        """Return radius, center (right, up) and hue of the shapes, each (B, 1, 1).

        u: (B, 16, 1, 1) in [0, 1); label: (B, 1, 1). CaptionedShapes overrides this method.
        """
        radius = 0.6 + 0.25 * u[:, 0]
        # Small shapes may move further from the center than large ones.
        room = 0.6 * (0.9 - radius)
        return radius, room * (2 * u[:, 2] - 1), room * (2 * u[:, 3] - 1), u[:, 4]

    @staticmethod
    def _tilt(u):
        """Return the angle (B, 1, 1) in radians by which the shapes are turned counterclockwise."""
        return 0.3 * (u[:, 1] - 0.5)

    @staticmethod
    def _uniform(indices, n):
        """Return n numbers in [0, 1) for each index, (B, n), the same on every device."""
        h = indices[:, None] * n + torch.arange(n, device=indices.device)
        # The integer hash "lowbias32" (C. Wellons): xor-shifts alternate with multiplications.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        # The upper 24 bits fit into a float32 exactly.
        return (h >> 8).float() / 2**24

    @staticmethod
    def _along(u, x, y):
        """Return the coordinate along the direction 2 pi u: u (B, 1, 1) -> (B, H, W)."""
        return x * (6.2832 * u).cos() + y * (6.2832 * u).sin()

    @staticmethod
    def _color(hue, value, saturation):
        """Return RGB (B, 3, 1, 1) for numbers (B, 1, 1) in [0, 1]."""
        # Red, green and blue are cosines of the hue, a third of the circle apart.
        phase = hue[:, None] + torch.arange(3, device=hue.device)[:, None, None] / 3
        return value[:, None] * (1 - saturation[:, None] * (0.5 - 0.5 * torch.cos(6.2832 * phase)))

    @staticmethod
    def _distances(x, y):
        """Return the signed distances, negative inside, of points to all shapes of about radius 1.

        x, y: (B, H, W). Returns (B, 10, H, W). The intersection of two shapes is the maximum of
        their distances, and the union is the minimum.
        """
        ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
        circle = r - 0.85
        ring = (r - 0.7).abs() - 0.18

        # A disk without a smaller disk on its upper right.
        moon = torch.maximum(r - 0.9, 0.75 - torch.hypot(x - 0.45, y - 0.1))

        # A square that rests on its corner, and a disk on each of its two upper edges.
        corner = (ax + (y + 0.1).abs() - 0.75) / 2**0.5
        disks = torch.hypot(ax - 0.375, y - 0.275) - 0.75 / 2**0.5
        heart = torch.minimum(corner, disks)

        square = torch.maximum(ax, ay) - 0.72
        diamond = (ax / 0.6 + ay - 1) / math.hypot(1 / 0.6, 1)

        # Two sides with slopes of 60 degrees, and the base.
        triangle = torch.maximum(ax * 0.75**0.5 + (y + 0.1) * 0.5, -(y + 0.1)) - 0.52

        # The star has five equal sectors. Fold them into one; its angle is 0 at the notch between
        # two tips and +-36 degrees at the tips. One straight edge leads from notch to tip.
        angle = torch.remainder(torch.atan2(x, y), 0.4 * math.pi) - 0.2 * math.pi
        tip_x, tip_y, notch = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi), 0.42
        across = tip_y * (r * angle.cos() - notch) - (tip_x - notch) * r * angle.sin().abs()
        star = across / math.hypot(tip_y, tip_x - notch)

        # A vertical and a horizontal bar.
        vertical = torch.maximum(ax - 0.28, ay - 0.85)
        horizontal = torch.maximum(ax - 0.85, ay - 0.28)
        cross = torch.minimum(vertical, horizontal)

        # A triangle that points right, and a bar as its shaft.
        head = torch.maximum((ay + x - 0.95) / 2**0.5, 0.2 - x)
        shaft = torch.maximum((x + 0.35).abs() - 0.58, ay - 0.25)
        arrow = torch.minimum(head, shaft)

        shapes = [circle, ring, moon, heart, square, diamond, triangle, star, cross, arrow]
        return torch.stack(shapes, 1)


# ---------------------------------------------------------------- image files and latents


class ImageData(Dataset):
    """Images from files, cropped to the center, and resized with antialiasing.

    paths: folders and files of the formats of support/sources.py. res: side in pixels, or (height,
    width). captions, folder: see open_source. skip_bad: report an unreadable image on stderr once,
    mark it in `unreadable`, and use the next image in its place; without it, such an image raises
    ValueError.
    Raises the errors of open_source.
    """

    def __init__(self, paths, res, skip_bad=False, captions=False, folder=None):
        self.reader = open_source(paths, captions, folder)
        self.skip_bad = skip_bad
        self.size = pixels(res)
        self.classes = self.reader.classes or []
        # Shared memory: the workers that decode images mark them for all processes.
        self.unreadable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self):
        return len(self.reader)

    def __getitems__(self, indices):
        """Return the images (B, H, W, 3) uint8 at these indices, and their labels."""
        indices, images = zip(*map(self._read, indices))
        # With self.rotate, the reader returns portrait images as (W, H, 3).
        portrait = [image.shape[:2] != self.size for image in images]
        images = [np.rot90(image) if turn else image for image, turn in zip(images, portrait)]
        return torch.from_numpy(np.stack(images)), self._labels(np.asarray(indices), portrait)

    def _labels(self, indices, portrait):
        """Return the labels (B,) at these indices. CaptionedImages overrides this method."""
        if self.reader.labels is None:
            return torch.zeros(len(indices), dtype=torch.int64)
        return torch.from_numpy(self.reader.labels[indices])

    def _read(self, index):
        """Return (index, image) of the first readable image at or after this index."""
        for i in self._with_substitutes(index):
            if self.unreadable[i]:
                continue
            try:
                return i, self.reader.read(i, self.size, self.rotate)
            except ValueError as error:
                # Skip missing, forbidden and damaged files. Any other fault of the disk may be
                # temporary and affect all files, so it ends the run.
                fault = getattr(error.__cause__, "errno", None)
                damaged = fault in (None, errno.ENOENT, errno.EACCES, errno.ELOOP)
                if not self.skip_bad or not damaged:
                    raise
                # Another process may have reported the image in the meantime.
                if not self.unreadable[i]:
                    self.unreadable[i] = 1
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise ValueError("none of the images can be read")

    def _with_substitutes(self, index):
        """Yield an index, then those of the images that replace this one if it is unreadable."""
        yield index
        # If images are held out, none of them may take the place of a training image.
        others = range(len(self)) if self.substitutes is None else self.substitutes
        first = bisect.bisect_right(others, index)
        for i in range(first, first + len(others)):
            yield int(others[i % len(others)])

    def __str__(self):
        """Return the number of images and a checksum.

        The checksum covers the names of all files, without their folders, and all labels. For about
        a thousand images it also covers the pixels of arrays, or the sizes of files, because
        reading files takes long.
        """
        digest = hashlib.sha256(repr((len(self), self.classes)).encode())
        self.reader.update(digest)
        return f"{len(self)} ({digest.hexdigest()[:8]})"


class Latents(Dataset):
    """Latents of an autoencoder, trained on as they are; related/vitok.py writes such a file.

    path: an .npz with z, floats (N, C, H, W); with labels also y, integers (N,), and classes, the
    names. res: the expected side or (height, width) of the latents, or None to accept any.
    Raises ValueError if the file is damaged or holds something else.
    """

    def __init__(self, path, res=None):
        try:
            self.z, self.labels, self.classes = self._load(path)
        except Exception as error:  # np.load raises many types for a damaged file
            raise ValueError(
                f"{path}: z must be floats (N, C, H, W), with y (N,) and classes if labeled "
                f"({one_line(error)})"
            ) from error
        self.size = self.z.shape[2:]
        self.net_fields = dict(in_channels=self.z.shape[1])
        if res is not None and pixels(res) != self.size:
            height, width = self.size
            raise ValueError(f"{path} holds latents of {height}x{width}, not --res {res}")

    @staticmethod
    def _load(path):
        """Return z, labels (N,) and class names, checked."""
        with np.load(path, allow_pickle=False) as arrays:
            z = arrays["z"]
            labels, classes = np.zeros(len(z), np.int64), []
            if "y" in arrays:
                labels, classes = arrays["y"], class_names(arrays)
        if z.dtype.kind != "f" or z.ndim != 4 or not z.size:
            raise ValueError(f"z is {z.dtype} {z.shape}")
        if labels.dtype.kind not in "iu" or labels.shape != z.shape[:1]:
            raise ValueError(f"z is {z.dtype} {z.shape}, y is {labels.dtype} {labels.shape}")
        if not 0 <= labels.min() <= labels.max() < max(1, len(classes)):
            raise ValueError(
                f"y must be from 0 to {max(0, len(classes) - 1)}, the number of a class"
            )
        return z, labels, classes

    def __len__(self):
        return len(self.z)

    def __getitems__(self, indices):
        """Return the latents (B, H, W, C) float32 at these indices, and their labels (B,)."""
        indices = np.asarray(indices)
        z = torch.from_numpy(self.z[indices].astype(np.float32))
        labels = torch.from_numpy(self.labels[indices].astype(np.int64))
        return z.permute(0, 2, 3, 1), labels

    def __str__(self):
        """Return their number and a checksum of all labels and of about a thousand latents."""
        digest = hashlib.sha256(repr((self.z.shape, self.classes)).encode())
        digest.update(self.labels.tobytes())
        digest.update(self.z[:: 1 + len(self) // 1000].tobytes())
        return f"{len(self)} latents ({digest.hexdigest()[:8]})"


def is_latents_file(path):
    """Return True if path is an .npz with an array z, the format of Latents."""
    if not path.endswith(".npz"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "z.npy" in archive.namelist()
    except Exception:  # ImageReader reports a damaged file
        return False


# ---------------------------------------------------------------- datasets from outside


class ExternalDataset(Dataset):
    """A dataset class from outside of this project: package.module:Class, created as Class(res).

    The top of this file states what the class needs. An image may be an array, a CPU tensor or a
    PIL image; a label may be None if there are no classes. The method __getitems__(indices) is
    optional and returns a list of pairs (image, label), or a tuple (images, labels) of arrays.

    res: the value of --res, an integer or "HEIGHTxWIDTH". option: that named the class, for
    messages. Every batch is checked.
    Raises ValueError if the class cannot be created or breaks the contract.
    """

    def __init__(self, name, res, option="--data"):
        self.name = f"{option} {name}"
        self.size = pixels(res)
        try:
            create = import_object(name, "not a file or package.module:Class")
            self.dataset = create(res)
            self.length = len(self.dataset)
            classes = getattr(self.dataset, "classes", None)
            self.classes = [] if classes is None else [str(c) for c in classes]
        except Exception as error:  # code from outside may raise anything
            raise ValueError(
                f"cannot create {self.name} with --res {res}: {one_line(error)}"
            ) from error
        if self.length < 1:
            raise ValueError(f"{self.name}: the dataset is empty")

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        """Return the images (B, H, W, 3) uint8 at these indices, and their labels (B,)."""
        batch = read_items(self.dataset, indices)
        try:
            images, labels = to_batch(batch)
        except Exception as error:
            raise ValueError(
                f"{self.name}: a batch must be a list of pairs (image, label) or a tuple "
                f"(images, labels), with images of one size and integer labels: {one_line(error)}"
            ) from error
        self._check(images, labels, len(indices))
        return images, labels.long()

    def _check(self, images, labels, n):
        """Raise ValueError unless these are n images of the right type and size, and n labels."""
        expected = (n, *self.size, 3)
        images_fit = images.dtype == torch.uint8 and images.shape == expected
        labels_fit = not labels.is_floating_point() and labels.shape == (n,)
        if not images_fit or not labels_fit:
            raise ValueError(
                f"{self.name}: a batch of {n} needs images uint8 {expected} and integer "
                f"labels ({n},), not {images.dtype} {tuple(images.shape)} and {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        highest = max(0, len(self.classes) - 1)
        outside = labels[(labels < 0) | (labels > highest)]
        if len(outside):
            raise ValueError(
                f"{self.name}: label {outside[0]} is not from 0 to {highest}; "
                f"the dataset has {len(self.classes)} classes"
            )

    def __str__(self):
        """Return the number of images and a checksum of up to eight of them, evenly spread."""
        n = min(8, len(self))
        images, labels = self.__getitems__([i * len(self) // n for i in range(n)])
        digest = hashlib.sha256(repr((len(self), self.classes, labels.tolist())).encode())
        digest.update(images.cpu().contiguous().numpy().tobytes())
        return f"{len(self)} ({digest.hexdigest()[:8]})"


def is_dataset_class(path):
    """Return True if --data means package.module:Class. An existing file of that name wins."""
    is_name = bool(re.fullmatch(r"[\w.]+:\w+", path)) and not os.path.exists(path)
    return is_name and not split_keys(path)[1]  # but file.npz:images names arrays


# ---------------------------------------------------------------- batches


def read_items(dataset, indices):
    """Return a batch as the dataset stores it: by __getitems__ if it has this method."""
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


def to_batch(batch):
    """Return tensors (B, H, W, C) and (B,) of a tuple (images, labels) or a list of pairs.

    A missing label, None, becomes 0. Raises TypeError or ValueError for anything else.
    """
    if isinstance(batch, tuple):
        # The type decides, not the length: a list of two pairs has two entries as well.
        images, labels = batch
        images = torch.as_tensor(images)
        if labels is None:
            return images, torch.zeros(len(images), dtype=torch.int64)
        return images, torch.as_tensor(labels)
    images, labels = zip(*batch)
    # np.array reads arrays and PIL images; the copy is writable, as tensors should be.
    images = [
        image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
        for image in images
    ]
    # operator.index accepts integers of any library, and rejects 0.5.
    labels = [0 if label is None else operator.index(label) for label in labels]
    return torch.stack(images), torch.tensor(labels)


def collate(batch):
    """Turn a batch of a dataset into images (B, C, H, W) and labels (B,): a view, not a copy.

    batch: (images (B, H, W, C), labels (B,)), or a list of pairs (image, label). Clips of video
    (B, T, H, W, C) become (B, C, T, H, W). It serves as the `collate_fn` of a DataLoader.
    """
    images, labels = to_batch(batch)
    return images.movedim(-1, 1), labels


def load_batch(dataset, indices):
    """Return the images (B, C, H, W) and labels (B,) of any map-style dataset at these indices."""
    return collate(read_items(dataset, indices))


def decoding_workers():
    """Return how many processes or threads of this rank decode images by default: at most 8.

    There are not more than cores, over all ranks of the machine. May be 0.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cpu_cores() // local_ranks)


def open_dataset(config, device="cpu", import_classes=False, folder=None, option="--data"):
    """Open the dataset that the settings of a run name: `data`, `res` and `skip_bad`.

    Without data, it is Shapes. import_classes: permit `data` to name a class to import; must be
    False if the settings are from a checkpoint of unknown origin. folder: see open_source. option:
    that named the data, for messages. Raises the errors of the classes.
    """
    paths, res = config["data"], config["res"]
    if config["skip_bad"] and (not paths or len(paths) == 1 and is_latents_file(paths[0])):
        raise ValueError(f"--skip-bad works with image files: {option} names none")
    if not paths:
        return Shapes(res, device)
    if len(paths) == 1 and is_dataset_class(paths[0]):
        if not import_classes:
            raise ValueError(f"the data is {paths[0]}: repeat {option} {paths[0]} to import it")
        if config["skip_bad"]:
            raise ValueError(f"--skip-bad works with image files, not with {option} {paths[0]}")
        return ExternalDataset(paths[0], res, option)
    if len(paths) == 1 and is_latents_file(paths[0]):
        return Latents(paths[0], res)
    return ImageData(paths, res, config["skip_bad"], folder=folder)


# ---------------------------------------------------------------- packing


def pack(data, path, workers):
    """Write all images of a dataset, at its size, with labels and classes, into one .npz.

    data: an ImageData or ExternalDataset. Later runs map the file into memory instead of decoding
    images. With skip_bad, an unreadable image is replaced by the next one and its label. workers:
    number of decoding threads.
    Raises ValueError if an image cannot be read, and OSError if the file cannot be written.
    """
    labels = []
    # A user's dataset class may not be thread-safe.
    workers = workers if isinstance(data, ImageData) else 1

    def read():
        jobs = [range(i, min(i + 64, len(data))) for i in range(0, len(data), 64)]
        for images, label in read_ahead(data.__getitems__, jobs, workers, progress=True):
            labels.append(label.numpy())
            yield images.numpy()

    with writing(path) as target, zipfile.ZipFile(target, "w") as archive:
        write_images(archive, "x", (len(data), *data.size, 3), read())
        if data.classes:
            write_array(archive, "y", np.concatenate(labels))
            write_array(archive, "classes", np.array(data.classes))
    height, width = data.size
    res = f"{height}" if height == width else f"{height}x{width}"
    print(
        f"wrote {len(data)} images of {height} x {width} in {len(data.classes)} classes to {path}: "
        f"train with --data {path} --res {res}"
    )


def write_images(archive, name, shape, batches):
    """Add an array of images, uint8, to an open .npz archive in parts: it need not fit in memory.

    shape: (N, H, W, C). batches: an iterable of arrays (B, H, W, C), N images in all.
    """
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        for images in batches:
            file.write(images.tobytes())


def write_array(archive, name, array):
    """Add an array to an open .npz archive."""
    with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


# ---------------------------------------------------------------- order and noise


def image_order(length, seed, batch_size, seen, parts):
    """Yield the indices of the images that this rank trains on, forever: a list per micro-batch.

    length: size of the dataset. batch_size: images per training step, over all ranks. seen: number
    of images that training has seen before. parts: for each micro-batch of this rank, the range of
    its positions in the global batch.
    """
    epoch, permutation = None, None
    while True:
        for part in parts:
            indices = []
            # Count images, not steps. Image n of the training is entry n mod length of the
            # permutation of its epoch. So every epoch uses each image once, for any number of
            # ranks and micro-batches, and a run may resume anywhere, with any batch size.
            for n in range(seen + part.start, seen + part.stop):
                # A new epoch: its permutation depends on (seed, epoch) alone.
                if n // length != epoch:
                    epoch = n // length
                    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
                    permutation = torch.randperm(length, generator=generator)
                indices.append(permutation[n % length].item())
            yield indices
        seen += batch_size


def example_noise(seed, step, positions, shape, device):
    """Draw the random numbers of the examples at these positions of a global batch.

    shape: (C, H, W). Returns three uniform numbers per example, u (B, 3) in [0, 1), and the
    noise eps (B, C, H, W), standard normal.
    """
    generator = torch.Generator(device)
    u = torch.empty(len(positions), 3, device=device)
    eps = torch.empty(len(positions), *shape, device=device)
    for i, position in enumerate(positions):
        # Each example has a seed of its own, from (seed, step, position). So the noise is the same
        # for any number of ranks and micro-batches, and after a restart.
        generator.manual_seed(mix_seed(seed, step, position))
        u[i].uniform_(generator=generator)
        eps[i].normal_(generator=generator)
    return u, eps
