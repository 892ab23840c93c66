"""The pictures: the built-in shapes, your own ones, which of them comes when, and the noise that each one gets.

data[indices] -> pictures uint8 (B, 3, H, W), labels int64 (B,); len(data); data.size, (H, W); data.classes, the names; str(data),
what tells it from other data.

    from data import ImageData, Shapes
    x, y = Shapes(64)[range(10)]                                   # on any device, at any resolution, from a picture's number alone
    x, y = ImageData(["photos/"], 64)[range(10)]                   # folders, .zip, .npz or .npy
"""

import errno
import hashlib
import math
import os
import sys
import zipfile

import numpy as np
import torch

from fid import Pictures, ahead
from sample import mix_seed, writing


class Shapes:
    """Ten classes of shapes on a smooth background with a fine texture, drawn from signed distances at any resolution.

    A picture follows from its index alone, on any device: place, size, tilt, colors and texture are hashes of it, and the
    class is index mod 10. first: the index of picture 0; pictures from 2^30 on are never trained on.
    """

    classes = ["circle", "ring", "moon", "heart", "square", "diamond", "triangle", "star", "cross", "arrow"]

    def __init__(self, res, device="cpu", length=1_000_000, first=0):
        self.size = (res, res) if isinstance(res, int) else tuple(res)
        self.device, self.length, self.first = device, length, first

    def __len__(self):
        return self.length

    def __str__(self):
        return "built-in"

    def __getitem__(self, indices):
        indices = torch.as_tensor(indices, dtype=torch.int64).to(self.device, non_blocking=True) + self.first
        label = indices % 10
        u = self._uniform(indices, 16)[:, :, None, None]  # (B, 16, 1, 1)
        pixel = 2 / min(self.size)  # the shorter side reaches from -1 to 1
        y = (torch.arange(self.size[0], device=self.device) - (self.size[0] - 1) / 2)[:, None] * -pixel
        x = (torch.arange(self.size[1], device=self.device) - (self.size[1] - 1) / 2) * pixel

        radius, tilt = 0.6 + 0.25 * u[:, 0], 0.3 * (u[:, 1] - 0.5)
        room = 0.6 * (0.9 - radius)
        dx, dy = x - room * (2 * u[:, 2] - 1), y - room * (2 * u[:, 3] - 1)
        distances = self._distances((dx * tilt.cos() + dy * tilt.sin()) / radius, (dy * tilt.cos() - dx * tilt.sin()) / radius)
        distance = distances[torch.arange(len(indices), device=self.device), label][:, None]  # (B, 1, H, W)
        inside = (0.5 - distance * radius[:, None] / pixel).clamp(0, 1)  # an edge one pixel wide

        color = self._color(u[:, 4], 0.75 + 0.25 * u[:, 5], 0.6 + 0.4 * u[:, 6])
        ramp = 0.5 + 0.35 * (x * (6.2832 * u[:, 7]).cos() + y * (6.2832 * u[:, 7]).sin())[:, None]
        ground = torch.lerp(self._color(u[:, 8], 0.15 + 0.25 * u[:, 9], u[:, 10]), self._color(u[:, 11], 0.15 + 0.25 * u[:, 12], u[:, 10]), ramp)
        waves = 3.5 * (x * (6.2832 * u[:, 13]).cos() + y * (6.2832 * u[:, 13]).sin()) + u[:, 14]
        picture = torch.lerp(ground, color, inside) + 0.04 * torch.sin(6.2832 * waves)[:, None]
        return (255 * picture.clamp(0, 1)).round().to(torch.uint8), label

    @staticmethod
    def _uniform(indices, n):
        """n numbers in [0, 1) for each index, by an integer hash: the same on every device."""
        h = indices[:, None] * n + torch.arange(n, device=indices.device)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        return (h >> 8).float() / 2**24

    @staticmethod
    def _color(hue, value, saturation):
        """RGB (B, 3, 1, 1) from numbers (B, 1, 1) in [0, 1]."""
        phase = hue[:, None] + torch.arange(3, device=hue.device)[:, None, None] / 3
        return value[:, None] * (1 - saturation[:, None] * (0.5 - 0.5 * torch.cos(6.2832 * phase)))

    @staticmethod
    def _distances(x, y):
        """The signed distance (negative inside) of points (B, H, W) to each shape of about radius 1. Returns (B, 10, H, W)."""
        ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
        moon = torch.maximum(r - 0.9, 0.75 - torch.hypot(x - 0.45, y - 0.1))
        heart = torch.minimum((ax + (y + 0.1).abs() - 0.75) / 2**0.5, torch.hypot(ax - 0.375, y - 0.275) - 0.75 / 2**0.5)
        square = torch.maximum(ax, ay) - 0.72
        diamond = (ax / 0.6 + ay - 1) / math.hypot(1 / 0.6, 1)
        triangle = torch.maximum(ax * 0.75**0.5 + (y + 0.1) * 0.5, -(y + 0.1)) - 0.52
        angle = torch.remainder(torch.atan2(x, y), 0.4 * math.pi) - 0.2 * math.pi  # 0 halfway between two points of the star
        point_x, point_y, notch = math.sin(0.2 * math.pi), math.cos(0.2 * math.pi), 0.42
        star = (point_x * (r * angle.cos() - notch) - (point_y - notch) * r * angle.sin().abs()) / math.hypot(point_x, point_y - notch)
        cross = torch.minimum(torch.maximum(ax - 0.28, ay - 0.85), torch.maximum(ax - 0.85, ay - 0.28))
        arrow = torch.minimum(torch.maximum((ay + x - 0.95) / 2**0.5, 0.2 - x), torch.maximum((x + 0.35).abs() - 0.58, ay - 0.25))
        return torch.stack([r - 0.85, (r - 0.7).abs() - 0.18, moon, heart, square, diamond, triangle, star, cross, arrow], 1)


class ImageData:
    """Your pictures (see fid.Pictures): the largest centered crop of the right shape, resized with antialiasing.

    paths: folders, .zip, .npz or .npy files. res: side in pixels, or (height, width). skip_bad: name a picture that cannot be read
    on stderr, once, mark it in `bad`, and take the next one in its place, rather than raise ValueError. Raises as Pictures does.
    """

    def __init__(self, paths, res, skip_bad=False):
        self.pictures, self.skip_bad = Pictures(paths), skip_bad
        self.size = (res, res) if isinstance(res, int) else tuple(res)
        self.classes = self.pictures.classes or []
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()  # with the processes that decode

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, indices):
        indices, images = zip(*map(self._readable, indices))
        labels = np.zeros(len(images), np.int64) if self.pictures.labels is None else self.pictures.labels[np.asarray(indices)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(labels)

    def _readable(self, i):
        """The first picture from number i on that is not bad: its number and itself."""
        for i in range(i, i + len(self)):
            i %= len(self)
            try:
                if not self.bad[i]:
                    return i, self.pictures.read(i, self.size)
            except ValueError as error:
                fault = getattr(error.__cause__, "errno", None)  # of a disk, rather than Pillow's
                if not self.skip_bad or fault not in (None, errno.ENOENT, errno.EACCES, errno.ELOOP):
                    raise
                if not self.bad[i]:  # another process may have met it meanwhile
                    self.bad[i] = 1
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise ValueError("none of the pictures can be read")

    def __str__(self):
        """The number of pictures and a checksum: of all names and labels, and of a thousand the content, or for files, as reading takes long, the size."""
        labels = self.pictures.labels
        digest = hashlib.sha256(repr((len(self), self.classes)).encode() + (b"" if labels is None else labels.tobytes()))
        for i, (where, name) in enumerate(self.pictures.sources):
            array, some = isinstance(where, np.ndarray), i % (1 + len(self) // 1000) == 0
            digest.update(b"" if array else os.path.basename(name).encode(errors="surrogateescape"))
            digest.update(b"" if not some else where[name].tobytes() if array else b"%d" % os.lstat(where or name).st_size)
        return f"{len(self)} ({digest.hexdigest()[:8]})"


def pack(data, path, workers):
    """Writes all pictures of an ImageData, at its size, with labels and classes into one .npz, which later runs map instead of decoding.

    A skipped picture's place has the next one, with its own label. Raises ValueError for a picture that cannot be read, and OSError.
    """
    length, labels = len(data), []
    with writing(path) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:  # as np.savez does it, but never with all pictures in memory
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(length, *data.size, 3)))
            for x, label in ahead(data.__getitem__, [range(i, min(i + 64, length)) for i in range(0, length, 64)], workers, progress=True):
                file.write(x.permute(0, 2, 3, 1).numpy().tobytes())
                labels.append(label.numpy())
        for name, array in (("y", np.concatenate(labels)), ("classes", np.array(data.classes))) if data.classes else ():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    print(f"wrote {length} pictures of {data.size[0]} x {data.size[1]} in {len(data.classes)} classes to {path}: train with --data {path} --res {data.size[0]}")


def order(length, seed, batch, images, parts):
    """The pictures of this rank after the first `images`, forever: a list of indices for each micro-step.

    parts: a micro-step's positions in the global batch, a range for each. Images are counted: number n of the whole training is
    entry n mod length of the permutation of (seed, n div length), so every epoch sees each picture once, however many ranks and
    micro-steps there are, and wherever training resumes, with any batch.
    """
    epoch, permutation = None, None
    while True:
        for part in parts:
            indices = []
            for n in range(images + part.start, images + part.stop):
                if n // length != epoch:
                    epoch = n // length
                    permutation = torch.randperm(length, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))).tolist()
                indices.append(permutation[n % length])
            yield indices
        images += batch


def example_noise(seed, step, positions, shape, device):
    """The randomness of the examples at these positions of the global batch of a step: uniforms (B, 3) and eps (B, *shape)."""
    generator = torch.Generator(device)
    u, eps = torch.empty(len(positions), 3, device=device), torch.empty(len(positions), *shape, device=device)
    for i, position in enumerate(positions):
        generator.manual_seed(mix_seed(seed, step, position))
        u[i].uniform_(generator=generator)
        eps[i].normal_(generator=generator)
    return u, eps
