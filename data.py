"""The pictures: the built-in shapes, your own ones, which of them comes when, and the noise that each one gets.

data[indices] -> pictures uint8 (B, 3, H, W), or latents float32 (B, C, H, W); labels int64 (B,), or tokens of texts (see uvit.Text);
len(data); data.size, (H, W); data.classes, the names; data.examples(n), labels for n samples; str(data), what tells it from other data.

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
from sample import mix_seed, pixels, writing
from text import (
    Asked,
    as_label,
    byte_lengths,
    byte_tokens,
    encoder,
    read_captions,
    store,
    stored,
    tell_cut,
)


class Shapes:
    """Ten classes of shapes on a smooth background with a fine texture, drawn from signed distances at any resolution.

    A picture follows from its index alone, on any device: place, size, tilt, colors and texture are hashes of it, and the
    class is index mod 10. first: the index of picture 0; pictures from 2^30 on are never trained on.
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
        self.device, self.length, self.first = device, length, first

    def __len__(self):
        return self.length

    def __str__(self):
        return "built-in"

    def examples(self, n):
        """Labels (n,) for n samples, all classes alike."""
        return torch.arange(n) % 10

    def __getitem__(self, indices):
        """The pictures of these numbers, and their labels."""
        indices = (
            torch.as_tensor(indices, dtype=torch.int64).to(self.device, non_blocking=True)
            + self.first
        )
        label = indices % 10
        u = self._uniform(indices, 16)[:, :, None, None]  # (B, 16, 1, 1)
        pixel = 2 / min(self.size)  # the shorter side reaches from -1 to 1
        y = (torch.arange(self.size[0], device=self.device) - (self.size[0] - 1) / 2)[
            :, None
        ] * -pixel
        x = (torch.arange(self.size[1], device=self.device) - (self.size[1] - 1) / 2) * pixel

        radius, right, up, hue = self._attributes(u, label[:, None, None])
        tilt = 0.3 * (u[:, 1] - 0.5)
        dx, dy = x - right, y - up
        distances = self._distances(
            (dx * tilt.cos() + dy * tilt.sin()) / radius,
            (dy * tilt.cos() - dx * tilt.sin()) / radius,
        )
        distance = distances[torch.arange(len(indices), device=self.device), label][
            :, None
        ]  # (B, 1, H, W)
        inside = (0.5 - distance * radius[:, None] / pixel).clamp(0, 1)  # an edge one pixel wide

        color = self._color(hue, 0.75 + 0.25 * u[:, 5], 0.6 + 0.4 * u[:, 6])
        ramp = 0.5 + 0.35 * (x * (6.2832 * u[:, 7]).cos() + y * (6.2832 * u[:, 7]).sin())[:, None]
        ground = torch.lerp(
            self._color(u[:, 8], 0.15 + 0.25 * u[:, 9], u[:, 10]),
            self._color(u[:, 11], 0.15 + 0.25 * u[:, 12], u[:, 10]),
            ramp,
        )
        waves = 3.5 * (x * (6.2832 * u[:, 13]).cos() + y * (6.2832 * u[:, 13]).sin()) + u[:, 14]
        picture = torch.lerp(ground, color, inside) + 0.04 * torch.sin(6.2832 * waves)[:, None]
        return (255 * picture.clamp(0, 1)).round().to(torch.uint8), label

    @staticmethod
    def _attributes(u, label):
        """Radius, the center's place to the right and up, hue, from numbers (B, 16, 1, 1) in [0, 1) and the label (B, 1, 1); each (B, 1, 1)."""
        radius = 0.6 + 0.25 * u[:, 0]
        room = 0.6 * (0.9 - radius)
        return radius, room * (2 * u[:, 2] - 1), room * (2 * u[:, 3] - 1), u[:, 4]

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
        heart = torch.minimum(
            (ax + (y + 0.1).abs() - 0.75) / 2**0.5,
            torch.hypot(ax - 0.375, y - 0.275) - 0.75 / 2**0.5,
        )
        square = torch.maximum(ax, ay) - 0.72
        diamond = (ax / 0.6 + ay - 1) / math.hypot(1 / 0.6, 1)
        triangle = torch.maximum(ax * 0.75**0.5 + (y + 0.1) * 0.5, -(y + 0.1)) - 0.52
        angle = (
            torch.remainder(torch.atan2(x, y), 0.4 * math.pi) - 0.2 * math.pi
        )  # 0 halfway between two points of the star
        point_x, point_y, notch = math.sin(0.2 * math.pi), math.cos(0.2 * math.pi), 0.42
        star = (
            point_x * (r * angle.cos() - notch) - (point_y - notch) * r * angle.sin().abs()
        ) / math.hypot(point_x, point_y - notch)
        cross = torch.minimum(
            torch.maximum(ax - 0.28, ay - 0.85), torch.maximum(ax - 0.85, ay - 0.28)
        )
        arrow = torch.minimum(
            torch.maximum((ay + x - 0.95) / 2**0.5, 0.2 - x),
            torch.maximum((x + 0.35).abs() - 0.58, ay - 0.25),
        )
        return torch.stack(
            [
                r - 0.85,
                (r - 0.7).abs() - 0.18,
                moon,
                heart,
                square,
                diamond,
                triangle,
                star,
                cross,
                arrow,
            ],
            1,
        )


class CaptionedShapes(Shapes):
    """Smaller shapes in six colors, in one of the four corners, and instead of labels texts such as "a small red star on blue and green, top left".

    As in captions by people, an eighth each say nothing of size, color, ground or place; with full all is said. Of each shape one color is
    held out: never shown, or with held_out always. data[indices] -> pictures, byte_tokens of the texts.
    """

    colors = ["red", "magenta", "blue", "cyan", "green", "yellow"]

    def __init__(
        self, res, device="cpu", length=1_000_000, first=0, held_out=False, full=False, tokens=64
    ):
        super().__init__(res, device, length, first)
        self.held_out, self.full, self.shapes, self.classes, self.fields = (
            held_out,
            full,
            self.classes,
            [],
            dict(text_tokens=tokens, text_dim=0),
        )

    def __str__(self):
        return "built-in with captions"

    def __getitem__(self, indices):
        return super().__getitem__(indices)[0], self._tokens(indices).to(self.device)

    def examples(self, n):
        """The tokens of the first n captions, made when asked for: [indices] -> (B, N)."""
        return Asked(n, self._tokens)

    def _tokens(self, indices):
        return as_label(byte_tokens(self.captions(indices), self.fields["text_tokens"]))

    def captions(self, indices):
        """The texts of the pictures of these numbers."""
        indices = torch.as_tensor(indices, dtype=torch.int64) + self.first
        u, label = self._uniform(indices, 16)[:, :, None, None], indices % 10
        radius, right, up, hue = self._attributes(u, label[:, None, None])
        name = lambda hue: (6 * hue).round().long().remainder(6)
        said = torch.stack(
            [torch.floor(u[:, 15, 0] * 8**i) % 8 >= (0 if self.full else 1) for i in (1, 2, 3, 4)],
            2,
        )[:, 0].tolist()  # by digits in base 8
        numbers = torch.stack(
            [
                radius > 0.58,
                name(hue),
                label[:, None, None],
                name(u[:, 8]),
                name(u[:, 11]),
                up > 0,
                right > 0,
            ],
            1,
        ).flatten(1)
        texts = []
        for (size, hue, ground, place), (large, color, shape, one, other, top, rightmost) in zip(
            said, numbers.tolist()
        ):
            text = (
                ["a"]
                + ["large" if large else "small"] * size
                + [self.colors[color]] * hue
                + [self.shapes[shape]]
            )
            text += [
                "on",
                *" and ".join(dict.fromkeys([self.colors[one], self.colors[other]])).split(),
            ] * ground
            texts.append(
                " ".join(text)
                + f", {'top' if top else 'bottom'} {'right' if rightmost else 'left'}" * place
            )
        return texts

    def _attributes(self, u, label):
        radius = torch.where(u[:, 0] < 0.5, 0.48, 0.62) + 0.08 * torch.remainder(2 * u[:, 0], 1)
        away = lambda v: (
            (0.9 - radius) * (0.6 * v.sign() + 0.4 * v)
        )  # from the middle, for v in [-1, 1)
        color = -label % 6 if self.held_out else (torch.floor(5 * u[:, 4]) + 1 - label) % 6
        return (
            radius,
            away(2 * u[:, 2] - 1),
            away(2 * u[:, 3] - 1),
            (color + 0.4 * (u[:, 5] - 0.5)) / 6,
        )


class ImageData:
    """Your pictures (see fid.Pictures): the largest centered crop of the right shape, resized with antialiasing.

    paths: folders, .zip, .npz or .npy files. res: side in pixels, or (height, width). skip_bad: name a picture that cannot be read
    on stderr, once, mark it in `bad`, and take the next one in its place, rather than raise ValueError. Raises as Pictures does.
    """

    turn = False

    def __init__(self, paths, res, skip_bad=False):
        self.pictures, self.skip_bad = Pictures(paths), skip_bad
        self.size = pixels(res)
        self.classes = self.pictures.classes or []
        self.bad = torch.zeros(
            len(self), dtype=torch.uint8
        ).share_memory_()  # with the processes that decode

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, indices):
        indices, images = zip(*map(self._readable, indices))
        upright = [image.shape[:2] != self.size for image in images]  # only with self.turn
        images = [np.rot90(image) if turned else image for image, turned in zip(images, upright)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self._labels(
            np.asarray(indices), upright
        )

    def _labels(self, indices, upright):
        return torch.from_numpy(
            np.zeros(len(indices), np.int64)
            if self.pictures.labels is None
            else self.pictures.labels[indices]
        )

    def examples(self, n):
        """Labels (n,) for n samples, all classes alike."""
        return torch.arange(n) % max(1, len(self.classes))

    def _readable(self, i):
        """The first picture from number i on that is not bad: its number and itself."""
        for i in range(i, i + len(self)):
            i %= len(self)
            try:
                if not self.bad[i]:
                    return i, self.pictures.read(i, self.size, self.turn)
            except ValueError as error:
                fault = getattr(error.__cause__, "errno", None)  # of a disk, rather than Pillow's
                if not self.skip_bad or fault not in (
                    None,
                    errno.ENOENT,
                    errno.EACCES,
                    errno.ELOOP,
                ):
                    raise
                if not self.bad[i]:  # another process may have met it meanwhile
                    self.bad[i] = 1
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise ValueError("none of the pictures can be read")

    def __str__(self):
        """The number of pictures and a checksum: of all names and labels, and of a thousand the content, or for files, as reading takes long, the size."""
        labels = self.pictures.labels
        digest = hashlib.sha256(
            repr((len(self), self.classes)).encode() + (b"" if labels is None else labels.tobytes())
        )
        for i, (where, name) in enumerate(self.pictures.sources):
            array, some = isinstance(where, np.ndarray), i % (1 + len(self) // 1000) == 0
            digest.update(b"" if array else os.path.basename(name).encode(errors="surrogateescape"))
            digest.update(
                b""
                if not some
                else where[name].tobytes()
                if array
                else b"%d" % os.lstat(where or name).st_size
            )
        return f"{len(self)} ({digest.hexdigest()[:8]})"


class CaptionedImages(ImageData):
    """Your pictures with the tokens of their captions instead of labels.

    captions, text_encoder, tokens: see train.py; "bytes", a T5, or an .npy file of embeddings in the order of the pictures: of the paths, and
    in each of the names. With a size that is wider than high, upright pictures are turned to the left, and their tokens end with a row of ones.
    Raises as ImageData and text.read_captions do. One rank computes embeddings, once; others wait for it.
    """

    def __init__(self, paths, res, skip_bad, captions, text_encoder, tokens, device):
        super().__init__(paths, res, skip_bad)
        self.classes = []
        self.turn = self.size[0] < self.size[1]
        self.texts = read_captions(self.pictures, captions)
        self.tokens, length, dim = None, tokens, 0  # of bytes they are made when a picture is read
        if text_encoder != "bytes":
            folder = (
                paths[0] if os.path.isdir(paths[0]) else os.path.dirname(os.path.abspath(paths[0]))
            )
            self.tokens = (
                stored(text_encoder, len(self))
                if text_encoder.endswith(".npy")
                else (
                    store(
                        self.texts,
                        lambda: encoder(text_encoder, tokens, device),
                        f"{text_encoder} {tokens}",
                        folder,
                    )
                )
            )
            length, dim = self.tokens.shape[1:]
        else:
            tell_cut(self.texts, byte_lengths, tokens)
        self.fields = dict(text_tokens=length, text_dim=dim, portrait=self.turn)

    def _labels(self, indices, upright):
        """Tokens (B, N) int64 or (B, N, D) float32, one row longer with self.turn."""
        tokens = (
            byte_tokens(self.captions(indices), self.fields["text_tokens"])
            if self.tokens is None
            else self.tokens[indices]
        )
        return as_label(tokens, upright if self.turn else None)

    def examples(self, n):
        """The same of n captions, as of pictures that are not upright."""
        return Asked(
            n, lambda indices: self._labels(np.asarray(indices) % len(self), [False] * len(indices))
        )

    def captions(self, indices):
        """The texts of the pictures of these numbers."""
        return [self.texts[i % len(self)] for i in indices]

    def __str__(self):
        return f"{super().__str__()} with captions ({hashlib.sha256(repr(self.texts).encode()).hexdigest()[:8]})"


class Latents(ImageData):
    """What an auto-encoder made of pictures, to be trained on as it is: z, floats (N, C, H, W), of an .npz, with y and classes if labeled.

    path: as related/vitok.py writes it. res: what size is expected. data[indices] -> float32 (B, C, H, W), labels. Raises ValueError.
    """

    def __init__(self, path, res=None):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.z, self.labels = (
                    arrays["z"],
                    arrays["y"] if "y" in arrays else np.zeros(len(arrays["z"]), np.int64),
                )
                self.classes = [str(name) for name in arrays["classes"]] if "y" in arrays else []
            if (
                self.z.dtype.kind != "f"
                or self.z.ndim != 4
                or not self.z.size
                or self.labels.shape != self.z.shape[:1]
                or self.labels.dtype.kind not in "iu"
            ):
                raise ValueError(f"{self.z.dtype} {self.z.shape} with labels {self.labels.shape}")
            if not 0 <= self.labels.min() <= self.labels.max() < max(1, len(self.classes)):
                raise ValueError(f"y must number its {len(self.classes)} classes")
        except Exception as error:  # whatever a broken file makes of the reader
            raise ValueError(
                f"{path}: z must be floats (N, C, H, W), with y (N,) and classes if labeled ({str(error) or type(error).__name__})"
            ) from error
        self.size, self.fields, self.bad = (
            self.z.shape[2:],
            dict(in_channels=self.z.shape[1]),
            torch.zeros(0),
        )  # none are bad
        if res is not None and pixels(res) != self.size:
            raise ValueError(
                f"{path} holds latents of {self.size[0]}x{self.size[1]}, not --res {res}"
            )

    def __len__(self):
        return len(self.z)

    def __getitem__(self, indices):
        indices = np.asarray(indices)
        return torch.from_numpy(self.z[indices].astype(np.float32)), torch.from_numpy(
            self.labels[indices].astype(np.int64)
        )

    def __str__(self):
        digest = hashlib.sha256(
            repr((self.z.shape, self.classes)).encode()
            + self.labels.tobytes()
            + self.z[:: 1 + len(self) // 1000].tobytes()
        )
        return f"{len(self)} latents ({digest.hexdigest()[:8]})"


def holds_latents(path):
    """Whether a file is an .npz with an array z, as Latents reads it."""
    try:
        return path.endswith(".npz") and "z.npy" in zipfile.ZipFile(path).namelist()
    except Exception:  # whatever is wrong with it, Pictures says it
        return False


def open_data(config, device="cpu"):
    """The pictures that the settings of a run name: `data`, `res`, `skip_bad`, `captions`, `text_encoder`, `text_tokens`. Raises as these classes do."""
    if config["text_tokens"] < 1:
        raise ValueError(f"--text-tokens is {config['text_tokens']}, which must be from 1 on")
    if config["captions"] is None:
        if config["text_encoder"] != "bytes":
            raise ValueError("--text-encoder takes --captions")
        if len(config["data"]) == 1 and holds_latents(config["data"][0]):
            return Latents(config["data"][0], config["res"])
        return (
            ImageData(config["data"], config["res"], config["skip_bad"])
            if config["data"]
            else Shapes(config["res"], device)
        )
    if not config["data"]:
        if config["captions"] or config["text_encoder"] != "bytes":
            raise ValueError(
                "the captions of the built-in shapes are read as bytes: --captions FILE and --text-encoder take --data"
            )
        return CaptionedShapes(config["res"], device, tokens=config["text_tokens"])
    return CaptionedImages(
        config["data"],
        config["res"],
        config["skip_bad"],
        config["captions"],
        config["text_encoder"],
        config["text_tokens"],
        device,
    )


def pack(data, path, workers):
    """Writes all pictures of an ImageData, at its size, with labels and classes into one .npz, which later runs map instead of decoding.

    A skipped picture's place has the next one, with its own label. Raises ValueError for a picture that cannot be read, and OSError.
    """
    length, labels = len(data), []
    with writing(path) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open(
            "x.npy", "w", force_zip64=True
        ) as file:  # as np.savez does it, but never with all pictures in memory
            np.lib.format.write_array_header_1_0(
                file, dict(descr="|u1", fortran_order=False, shape=(length, *data.size, 3))
            )
            for x, label in ahead(
                data.__getitem__,
                [range(i, min(i + 64, length)) for i in range(0, length, 64)],
                workers,
                progress=True,
            ):
                file.write(x.permute(0, 2, 3, 1).numpy().tobytes())
                labels.append(label.numpy())
        for name, array in (
            (("y", np.concatenate(labels)), ("classes", np.array(data.classes)))
            if data.classes
            else ()
        ):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    print(
        f"wrote {length} pictures of {data.size[0]} x {data.size[1]} in {len(data.classes)} classes to {path}: train with --data {path} --res {data.size[0]}"
        + f"x{data.size[1]}" * (data.size[0] != data.size[1])
    )


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
                    permutation = torch.randperm(
                        length, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))
                    ).tolist()
                indices.append(permutation[n % length])
            yield indices
        images += batch


def example_noise(seed, step, positions, shape, device):
    """The randomness of the examples at these positions of the global batch of a step: uniforms (B, 3) and eps (B, *shape)."""
    generator = torch.Generator(device)
    u, eps = (
        torch.empty(len(positions), 3, device=device),
        torch.empty(len(positions), *shape, device=device),
    )
    for i, position in enumerate(positions):
        generator.manual_seed(mix_seed(seed, step, position))
        u[i].uniform_(generator=generator)
        eps[i].normal_(generator=generator)
    return u, eps
