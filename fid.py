"""FID, Inception Score, precision and recall as in the reference implementations, in one file that imports nothing of the project.

    python fid.py cifar10_train.npz cifar10_test.npz            # FID 3.1508 is published for the 50,000 and the 10,000 pictures
    python fid.py photos/ --res 256 --save-stats stats.npz      # the statistics of your pictures once,
    torchrun --nproc-per-node 8 fid.py stats.npz samples.npz    # and then samples against them
    python fid.py photos/ samples/ --features module:Class      # a Fréchet distance in the features of another network

Pictures are folders, .zip, .npz or .npy files (see Pictures); statistics .npz files with mu and sigma.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import os
import stat
import struct
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.linalg.lapack import dpstrf
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ---------------------------------------------------------------- the network: Inception of 2015-12-05, with the weights converted from TensorFlow

WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # what the checksum of that file begins with
INCEPTION = "Inception-2015-12-05"  # what files of statistics call these features


def resize_tf1(x, size=(299, 299)):
    """Bilinear resize of TensorFlow 1, which FID was defined with: (B, C, H, W), any dtype -> (B, C, *size) float32 (float64 stays).

    Output pixel i samples input position i * in / out (no half-pixel offset, no antialiasing); past the last pixel that pixel repeats.
    """
    x = x if x.dtype == torch.float64 else x.float()
    for dim, out in zip((2, 3), size):
        source = torch.arange(out, device=x.device, dtype=torch.float32) * (
            x.shape[dim] / out
        )  # rounded to float32 as there
        low = source.long()
        weight = (source - low).to(x.dtype).reshape(-1, *[1] * (3 - dim))
        x = torch.lerp(
            x.index_select(dim, low),
            x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1)),
            weight,
        )
    return x


@contextlib.contextmanager
def exact_float32():
    """Neither TF32 nor autocast inside, whatever is set outside: FID is defined by a float32 network."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class ConvUnit(nn.Module):
    """Convolution, batch norm and ReLU. A stride of 2 goes without padding, a stride of 1 keeps the size unless told otherwise."""

    def __init__(self, in_channels, channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel, stride, padding if stride == 1 else 0, bias=False
        )
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches, concatenated along channels: chains of ConvUnits, (channels, kernel) or (channels, kernel, stride).

    A list at the end of a chain runs its units on the same input. pool feeds branch_pool; without one, what it gives comes last itself.
    """

    def __init__(self, in_channels, pool, **branches):
        super().__init__()
        self.pool, self.branches = (
            pool,
            {},
        )  # branches: name -> the names of its units, a list for each place in the chain
        for branch, chain in branches.items():
            width, self.branches[branch] = in_channels, []
            for i, units in enumerate(chain, 1):
                units = units if isinstance(units, list) else [units]
                number, letters = (
                    f"_{i}" if len(chain) > 1 else "",
                    "ab" if len(units) > 1 else [""],
                )
                names = [branch + number + letter for letter in letters]
                for name, (channels, *kernel) in zip(names, units):
                    self.add_module(name, ConvUnit(width, channels, *kernel))
                self.branches[branch].append(names)
                width = channels

    def forward(self, x):
        outputs, pooled = [], self.pool(x)
        for branch, chain in self.branches.items():
            ends = [pooled if branch == "branch_pool" else x]
            for names in chain:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs if "branch_pool" in self.branches else [*outputs, pooled], 1)


# This Inception differs from common ones in its pooling: averages leave the padding out, and Mixed_7c takes the maximum.
AVERAGE = functools.partial(
    F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
MAXIMUM = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = functools.partial(F.max_pool2d, kernel_size=3, stride=2)
ROW, COLUMN = (1, 7), (7, 1)


def mixed_35(in_channels, pool_channels):  # on a grid of 35 x 35
    return Mixed(
        in_channels,
        AVERAGE,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pool_channels, 1)],
    )


def mixed_17(c):  # 17 x 17
    return Mixed(
        768,
        AVERAGE,
        branch1x1=[(192, 1)],
        branch7x7=[(c, 1), (c, ROW), (192, COLUMN)],
        branch7x7dbl=[(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)],
        branch_pool=[(192, 1)],
    )


def mixed_8(in_channels, pool):  # 8 x 8
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        in_channels,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), fork],
        branch3x3dbl=[(448, 1), (384, 3), fork],
        branch_pool=[(192, 1)],
    )


class InceptionV3(nn.Module):
    """The Inception that FID is defined with: 1008 classes, 94 convolutions, 472 weights named as in the public conversion.

    Called with gray levels 0 to 255, (B, 3, H, W) of any size and dtype, it gives the pooled features (B, 2048), and
    logits (B, 1008) without bias for the Inception Score; in float32 whatever autocast and TF32 are set to.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            mixed_35(192, 32),
            mixed_35(256, 64),
            mixed_35(288, 64),
        )
        self.Mixed_6a = Mixed(
            288, HALVE, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            mixed_17(128),
            mixed_17(160),
            mixed_17(160),
            mixed_17(192),
        )
        self.Mixed_7a = Mixed(
            768,
            HALVE,
            branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
        )
        self.Mixed_7b, self.Mixed_7c = mixed_8(1280, AVERAGE), mixed_8(2048, MAXIMUM)
        self.fc = nn.Linear(2048, 1008)

    @exact_float32()
    def forward(self, x):
        x = x.to(self.fc.weight.dtype) if x.shape[2:] == (299, 299) else resize_tf1(x)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(
            self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        )  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, features.double() @ self.fc.weight.double().T

    def fold(self):
        """Folds every batch norm into its convolution, in float64: same features, in less time. Returns the net."""
        self.eval().double()
        for unit in self.modules():
            if isinstance(unit, ConvUnit):
                unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()
        return self.float().to(memory_format=torch.channels_last).requires_grad_(False)


def load_inception(path=None):
    """The folded InceptionV3 with the public weights: from the file path, else torch.hub's cache, else downloaded to there.

    Raises ValueError, naming the file, if it is not the public one, or telling what to put where if it cannot be downloaded.
    """
    file = path or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS))
    if not path and not os.path.exists(file):
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS, file, SHA256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot download the network ({error}): put {WEIGHTS} into {os.path.dirname(file)}, or name it by --weights of fid.py"
            ) from error
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not digest.startswith(SHA256):
        raise ValueError(
            f"{file} is not {os.path.basename(WEIGHTS)} (its sha256 begins with {digest[:8]}): download that again"
        )
    net = InceptionV3()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.fold()


# ---------------------------------------------------------------- statistics of features, and what follows from them

SPLITS = 10  # of the Inception Score


class Statistics:
    """Sums over features, and over class probabilities for the Inception Score: any batches, in any order, merged over parts and ranks.

    Float64 on the features' device; their memory does not depend on the number of pictures, unless keep is set, which keeps the features, too.
    """

    def __init__(self, keep=False):
        self.moments = self.scores = torch.zeros(
            (), dtype=torch.float64
        )  # moments: sum of [1, f]^T [1, f], (1 + D, 1 + D); scores: see update
        self.kept = [] if keep else None

    def update(self, features, logits=None, splits=None):
        """Adds pictures: features (B, D), logits (B, K) or None, splits (B,) as is_splits numbers them (default: all in one).

        scores: for each split the number of pictures, the sum of sum_k p_k log p_k, and the sum of p, (SPLITS, 2 + K).
        """
        one_f = F.pad(features.double(), (1, 0), value=1.0)
        self.moments = self.moments + one_f.T @ one_f
        if self.kept is not None:
            self.kept.append(features.float().cpu())
        if logits is not None:
            log_p = logits.double().log_softmax(1)
            rows = torch.cat(
                [
                    torch.ones_like(log_p[:, :1]),
                    (log_p.exp() * log_p).sum(1, keepdim=True),
                    log_p.exp(),
                ],
                1,
            )
            splits = torch.zeros(len(rows), dtype=torch.int64) if splits is None else splits
            self.scores = self.scores + rows.new_zeros(SPLITS, rows.shape[1]).index_add_(
                0, splits.to(rows.device, non_blocking=True), rows
            )

    def merge(self, other):
        """Adds the sums of other pictures."""
        self.moments, self.scores = self.moments + other.moments, self.scores + other.scores
        if self.kept is not None:
            self.kept += other.kept

    def all_reduce(self):
        """Adds the sums of all ranks, on each of them; kept features come to rank 0. Without ranks nothing changes. No update may follow."""
        if not dist.is_initialized():
            return
        parts = [self.moments.cpu(), self.scores.cpu()]
        shapes = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, [part.shape for part in parts])
        parts = [
            part.expand(max(shape)).contiguous() for part, shape in zip(parts, zip(*shapes))
        ]  # a rank without pictures has the number 0
        for part in parts:
            dist.all_reduce(part)
        self.moments, self.scores = parts
        if self.kept is not None:
            gathered = [None] * len(shapes)
            dist.gather_object(self.kept, gathered if dist.get_rank() == 0 else None)
            self.kept = [features for part in gathered if part for features in part]

    @property
    def n(self):
        """The number of pictures."""
        return round(self.moments[0, 0].item()) if self.moments.ndim else 0

    def gaussian(self):
        """Mean (D,) and covariance (D, D), over N - 1, in float64. Raises ValueError for fewer than 2 pictures, NaN and infinity."""
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 pictures or more, not {self.n}")
        moments = self.moments.cpu().numpy()
        mu = moments[0, 1:] / self.n
        return check_gaussian(mu, (moments[1:, 1:] - self.n * np.outer(mu, mu)) / (self.n - 1))

    def inception_score(self):
        """Mean and standard deviation of exp(E KL(p(y|x) || p(y))) over the splits, or None without logits."""
        if not self.scores.ndim:
            return None
        n, entropy, p = self.scores[self.scores[:, 0] > 0].split(
            [1, 1, self.scores.shape[1] - 2], 1
        )
        score = (entropy / n - torch.xlogy(p / n, p / n).sum(1, keepdim=True)).exp()
        return score.mean().item(), score.std(correction=0).item()


def is_splits(n):
    """The number (n,) of the split that each of n pictures belongs to in the Inception Score.

    Splits are consecutive parts of the order RandomState(2020).permutation(n), which is torch-fidelity's: pictures sorted by class do no harm.
    """
    numbers = torch.empty(n, dtype=torch.int64)
    numbers[np.random.RandomState(2020).permutation(n)] = ((torch.arange(n) + 1) * SPLITS - 1) // n
    return numbers


def inception_score(logits):
    """The Inception Score (arXiv 1606.03498) of logits (N, K): mean and standard deviation over SPLITS splits, see is_splits."""
    statistics = Statistics()
    statistics.update(
        logits[:, :0], logits, is_splits(len(logits))
    )  # no features: only the score is wanted
    return statistics.inception_score()


def check_gaussian(mu, sigma):
    """Mean (D,) and covariance (D, D) as float64 arrays. Raises ValueError for other shapes, NaN and infinity."""
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are no mean and covariance")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("there is NaN or infinity in the features or their statistics")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the FID (arXiv 1706.08500, Eq. 6) of Inception features; float64.

    mu: (D,). sigma: (D, D) covariances, of any rank. Raises ValueError for other shapes, NaN and infinity.
    With sigma = F F^T the trace of the root is that of (M M^T)^(1/2) for M = F1^T F2: real, and exact for singular covariances,
    as F has no more columns than their rank; ten times faster than scipy.linalg.sqrtm.
    """
    (mu1, sigma1), (mu2, sigma2) = check_gaussian(mu1, sigma1), check_gaussian(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"{len(mu1)} and {len(mu2)} features are not of the same network")

    def factor(sigma):
        lower, pivot, rank, _ = dpstrf(sigma, lower=1)  # Cholesky's with pivoting ends at the rank
        result = np.zeros((len(sigma), rank))
        result[pivot - 1] = np.tril(lower)[:, :rank]
        return result

    product = factor(sigma1).T @ factor(sigma2)
    product = product if len(product) <= product.shape[1] else product.T
    root = np.sqrt(np.linalg.eigvalsh(product @ product.T).clip(min=0)).sum()
    return max(
        0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)
    )


@exact_float32()
def precision_recall(real, fake, k=3, block=1024):
    """Improved precision and recall (arXiv 1904.06991, Eq. 1-2): the shares of fake pictures near real ones, and of real near fake ones.

    real (N, D), fake (M, D): features. Near is within the distance of a picture of the other set to its k-th neighbor in that set.
    Raises ValueError where a set has no k neighbors.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} pictures on both sides, not {len(real)} and {len(fake)}"
        )

    def radii(x):
        return torch.cat(
            [torch.cdist(part, x).kthvalue(k + 1, 1).values for part in x.split(block)]
        )  # the nearest is the picture itself

    def covered(x, centers, radius):
        return (
            torch.cat([(torch.cdist(part, centers) <= radius).any(1) for part in x.split(block)])
            .double()
            .mean()
            .item()
        )

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


# ---------------------------------------------------------------- reading pictures: folders, zip files and arrays, as RGB uint8

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "TGA",
)  # none that starts another program, as EPS does
EXTENSIONS = {
    extension for extension, name in Image.registered_extensions().items() if name in FORMATS
}


def is_hidden(part):
    """Whether a folder or file of this name is not for people: hidden, or a system's own."""
    return part.startswith(".") and part != "." or part in ("__MACOSX", "lost+found")


def is_picture(name):
    """Whether a file name, with folders before it, is that of a picture, and neither it nor a folder is hidden."""
    return (
        not any(map(is_hidden, name.split("/"))) and os.path.splitext(name.lower())[1] in EXTENSIONS
    )


def to_rgb(image):
    """A PIL image of any mode as RGB, as a person would see it: turned as EXIF says, transparent parts white, 16 bits to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def files_below(folder):
    """The files in a folder and its visible subfolders, each of which is entered once, though links may lead there again. Raises OSError."""

    def stop(error):
        raise error

    entered = set()
    for folder, subfolders, files in os.walk(folder, onerror=stop, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        identity = os.stat(folder)[1:3]  # inode and device
        if identity in entered:
            subfolders.clear()
        else:
            entered.add(identity)
            yield from (os.path.join(folder, file) for file in files)


class Pictures:
    """All pictures below some paths, in the order of the paths and then of the names, as RGB uint8.

    paths: folders (nested), .zip files, .npz (x or arr_0, with y and classes if labeled) or .npy files, uint8 NHWC.
    labels: int64 array (N,), or None. classes: their names. In folders and zip files a picture's class is its first folder
    below the folders that all of them share; a picture outside of any such folder means that there are no labels.
    Hidden files are passed over. Raises FileNotFoundError or ValueError, naming the path, when there is nothing to read.
    """

    def __init__(self, paths):
        self.sources, self.labels, self.classes = (
            [],
            None,
            None,
        )  # sources: (array, row), (zip path, name) or (None, file)
        names, labels, classes = (
            [],
            [],
            [],
        )  # names: of files; labels: names of classes, or their numbers where they have none
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            path = os.fspath(path)
            found = len(self.sources)
            if os.path.isdir(path):
                files = sorted(
                    filter(
                        is_picture,
                        (
                            os.path.relpath(file, path).replace(os.sep, "/")
                            for file in files_below(path)
                        ),
                    )
                )
                names += files
                self.sources += [(None, os.path.join(path, file)) for file in files]
            elif not os.path.isfile(path):
                raise FileNotFoundError(f"{path}: no such file or folder")
            elif path.endswith((".npz", ".npy")):
                array, array_labels, array_classes = read_arrays(path)
                labels += array_labels
                classes += [name for name in array_classes if name not in classes]
                self.sources += [(array, i) for i in range(len(array))]
            else:
                try:
                    files = sorted(filter(is_picture, zipfile.ZipFile(path).namelist()))
                except Exception as error:  # whatever a broken file makes of the reader
                    raise ValueError(
                        f"{path}: neither a folder nor a whole zip, npz or npy file ({str(error) or type(error).__name__})"
                    ) from error
                names += files
                self.sources += [(path, file) for file in files]
            if len(self.sources) == found:
                raise ValueError(f"{path}: no pictures in it ({', '.join(FORMATS)})")

        if names and len(names) < len(self.sources):
            raise ValueError(
                "pictures come either from folders and zip files or from npz and npy files, not from both"
            )
        if labels and (
            len(labels) < len(self.sources) or len({type(label) for label in labels}) > 1
        ):
            raise ValueError(
                "of several npz files either all or none have y, and either all or none have classes"
            )
        if names:
            folders = [name.split("/")[:-1] for name in names]
            shared = os.path.commonprefix(folders)  # works on lists of folders, too
            if min(len(folder) for folder in folders) > len(shared):
                labels = [folder[len(shared)] for folder in folders]
                classes = sorted(set(labels))
        if labels:
            number = {name: i for i, name in enumerate(classes)} or {
                i: i for i in range(max(labels) + 1)
            }
            self.labels = np.array([number[label] for label in labels], dtype=np.int64)
            self.classes = [str(name) for name in number]

    def __len__(self):
        return len(self.sources)

    def read(self, i, size=None, turn=False):
        """Picture i as (H, W, 3) uint8. size: (height, width) to crop it to, centered and as large as it fits, and resize it to;
        turn: or (width, height), if it is higher than wide.

        Raises ValueError with the picture's name when it cannot be read.
        """
        where, name = self.sources[i]
        if isinstance(where, np.ndarray):
            picture = np.broadcast_to(where[name], (*where.shape[1:3], 3))
            return (
                picture
                if size in (None, picture.shape[:2])
                else self._fit(Image.fromarray(picture), size)
            )
        try:
            if not where and not stat.S_ISREG(os.stat(name).st_mode):
                raise ValueError("no regular file")  # a pipe would never end
            with Image.open(
                _archive(where, os.getpid()).open(name) if where else name, formats=FORMATS
            ) as image:
                if size and image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1:
                    image.draft(
                        "RGB", (2 * size[1], 2 * size[0])
                    )  # decodes at 1/2, 1/4 or 1/8, but twice as large as needed: faster
                image = to_rgb(image)
                return self._fit(image, size[::-1] if turn and image.height > image.width else size)
        except MemoryError:
            raise
        except Exception as error:  # whatever a broken file makes of the reader
            raise ValueError(
                f"cannot read picture {name}{f' in {where}' if where else ''}: {str(error) or type(error).__name__}"
            ) from error

    __getitem__ = read

    @staticmethod
    def _fit(image, size):
        return np.asarray(
            ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC) if size else image
        )  # with antialiasing


def read_arrays(path):
    """(N, H, W, C) uint8, C 1 or 3, of an .npz or .npy file, its N labels or [], and its class names or [].

    A label is the name of a class where there are names, else its number. Pictures are memory mapped, in an .npz unless it is compressed.
    Raises ValueError; runs no pickled code.
    """
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        data = {"arr_0": data} if isinstance(data, np.ndarray) else data
        key = next((key for key in ("x", "arr_0") if key in data), None)
        if key is None:
            raise ValueError(f"neither x nor arr_0 is in it, only {', '.join(data) or 'nothing'}")
        x = data[key] if isinstance(data, dict) else map_member(path, key + ".npy")
        x = data[key] if x is None else x
        y = data["y"] if "y" in data else None
        classes = [str(name) for name in data["classes"]] if "classes" in data else []
        if len(set(classes)) < len(classes):
            raise ValueError("two of its classes have one name")
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: x or arr_0 must be uint8 (N, H, W, 3), not {x.dtype} {x.shape}")
    if y is None:
        return x, [], []
    if (
        y.shape != (len(x),)
        or y.dtype.kind not in "iu"
        or y.min() < 0
        or classes
        and y.max() >= len(classes)
    ):
        raise ValueError(
            f"{path}: y must number a class of each of the {len(x)} pictures, {len(classes) or 'none'} being named"
        )
    return x, [classes[i] for i in y] if classes else y.tolist(), classes


def map_member(path, name):
    """The array `name` of an .npz file, memory mapped, or None where that cannot be: compressed, not uint8, or in Fortran's order."""
    with zipfile.ZipFile(path) as archive, archive.open(name) as member, open(path, "rb") as file:
        info, version = archive.getinfo(name), np.lib.format.read_magic(member)
        shape, fortran, dtype = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )(member)
        if info.compress_type != zipfile.ZIP_STORED or dtype != np.uint8 or fortran:
            return None
        file.seek(info.header_offset)
        lengths = struct.unpack(
            "<26x2H", file.read(30)
        )  # of the name and the extra field, which the local header ends with
        return np.memmap(
            path, dtype, "r", info.header_offset + 30 + sum(lengths) + member.tell(), shape
        )


@functools.cache
def _archive(path, process):
    """A zip file, opened once in each process: threads may share it, but processes would move one another's position."""
    return zipfile.ZipFile(path)


# ---------------------------------------------------------------- the command


@torch.no_grad()
@exact_float32()
def extract(net, x):
    """Features (B, D), and logits (B, K) or None, of pictures x (B, 3, H, W) uint8 on the net's device.

    net: InceptionV3, or any module from x to features (B, D, 1...), or to a pair of features and logits.
    """
    few = (
        isinstance(net, InceptionV3) and x.device.type == "cpu"
    )  # what 4 pictures per thread need stays in the caches: 20 % faster
    outputs = [
        output if isinstance(output, tuple) else (output, None)
        for output in map(net, x.split(4 * torch.get_num_threads() if few else len(x)))
    ]
    features, logits = zip(*outputs)
    return torch.cat(features).flatten(1), None if logits[0] is None else torch.cat(logits)


def ahead(function, jobs, workers, progress=False):
    """function(job) for each job, a list or range of pictures, in order, by threads that stay `workers` jobs ahead; progress: show it on stderr."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(workers), collections.deque()
    total, done, start, shown = sum(map(len, jobs)), 0, time.time(), 0.0
    try:
        for i in range(len(jobs) + workers):
            if i < len(jobs):
                waiting.append(pool.submit(function, jobs[i]))
            if i < workers:
                continue
            yield waiting.popleft().result()
            done, now = done + len(jobs[i - workers]), time.time()
            if progress and (now - shown >= 1 or done == total):
                shown, end = now, "\n" if done == total else ""
                print(
                    f"\r{done} of {total} pictures, {done / (now - start):.0f} per second ",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        pool.shutdown(cancel_futures=True)


def measure(
    pictures, net, *, device="cpu", batch=64, size=None, skip_bad=False, keep=False, progress=False
):
    """The Statistics of pictures in the features of net (see extract), on every rank; each does its share, and threads read ahead of it.

    pictures: Pictures, or any sequence that has read(i, size). size: see Pictures.read. skip_bad: name unreadable pictures on stderr
    and go on, rather than raise ValueError. keep: see Statistics. progress: show this rank's on stderr.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices, splits = range(rank, len(pictures), world), is_splits(len(pictures))

    def read(job):
        """Pictures by size, as [[(index, (3, H, W)), ...], ...]; for Inception mixed sizes become one, that of its input."""
        groups = collections.defaultdict(list)
        for i in job:
            try:
                picture = torch.tensor(pictures.read(i, size)).permute(2, 0, 1)
                groups[picture.shape].append((i, picture))
            except ValueError as error:
                if not skip_bad:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
        if len(groups) > 1 and isinstance(net, InceptionV3):
            return [
                [
                    (i, resize_tf1(picture[None])[0])
                    for group in groups.values()
                    for i, picture in group
                ]
            ]
        return groups.values()

    statistics, jobs = (
        Statistics(keep),
        [indices[i : i + batch] for i in range(0, len(indices), batch)],
    )
    for groups in ahead(read, jobs, min(8, os.cpu_count() or 1), progress):
        for group in groups:
            x = torch.stack([picture for _, picture in group])
            x = (
                x.pin_memory().to(device, non_blocking=True)
                if torch.device(device).type == "cuda"
                else x
            )
            statistics.update(*extract(net, x), splits[[i for i, _ in group]])
    statistics.all_reduce()
    return statistics


def read_statistics(path):
    """The mu, sigma, n and features (the name of the network) of an .npz with mu and sigma, as a dict; None for other files.

    n is None and features Inception's where the file does not tell; pictures: whether it also has some. Raises ValueError; runs no pickled code.
    """
    if not path.endswith(".npz") or not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            if not {"mu", "sigma"} <= set(data):
                return None
            mu, sigma = check_gaussian(data["mu"], data["sigma"])
            return dict(
                mu=mu,
                sigma=sigma,
                n=int(data["n"]) if "n" in data else None,
                pictures="arr_0" in data or "x" in data,
                features=str(data["features"]) if "features" in data else INCEPTION,
            )
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def load_network(features=None, weights=None):
    """The network to measure with, in eval mode: InceptionV3 (see load_inception), or an instance of features, package.module:Class.

    Raises ValueError. Of the ranks on a machine the first one goes ahead, as it may have to download the weights.
    """
    if features:
        module, _, name = features.partition(":")
        try:
            return getattr(importlib.import_module(module), name)().eval()
        except Exception as error:  # a class of anybody's
            raise ValueError(
                f"features {features} are not package.module:Class ({str(error) or type(error).__name__})"
            ) from error
    ranks, first = dist.is_initialized(), os.environ.get("LOCAL_RANK", "0") == "0"
    if ranks and not first:
        dist.barrier()
    net = load_inception(weights)
    if ranks and first:
        dist.barrier()
    return net


def distance_name(features):
    """What the distance in these features, INCEPTION or package.module:Class, is called: FID is that of Inception only."""
    return "FID" if features == INCEPTION else f"FD-{features.rpartition(':')[2]}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="FID and Inception Score of FAKE against REAL.", allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"fid.py: {message}")
    parser.add_argument(
        "real", help="a folder, .zip, .npz or .npy of pictures, or an .npz with mu and sigma"
    )
    parser.add_argument("fake", nargs="?", help="likewise; without it only --save-stats is done")
    parser.add_argument("--save-stats", metavar="NPZ", help="write mu, sigma and n of REAL")
    parser.add_argument(
        "--pr",
        action="store_true",
        help="also precision and recall, k = 3; keeps all features in memory",
    )
    parser.add_argument(
        "--res",
        type=lambda text: [int(side) for side in text.split("x")],
        help="first crop the pictures to centered squares and resize them to this side, or to HEIGHTxWIDTH",
    )
    parser.add_argument(
        "--weights",
        metavar="PTH",
        help=f"{os.path.basename(WEIGHTS)}, if it is not in torch.hub's cache",
    )
    parser.add_argument(
        "--features",
        metavar="MODULE:CLASS",
        help="another network, a class built without arguments, in a file next to fid.py "
        "or on PYTHONPATH: uint8 (B, 3, H, W) to features (B, D), or to a pair of features and logits",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="name pictures that cannot be read, count them, and go on",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also print the published values, for CIFAR-10's training and test pictures",
    )
    args = parser.parse_args(argv)
    if not (args.fake or args.save_stats) or args.features and (args.weights or args.selftest):
        raise ValueError(
            "give REAL and FAKE, or REAL and --save-stats; --features excludes --weights and --selftest, which are for Inception"
        )
    if args.batch < 1 or args.res is not None and (len(args.res) > 2 or min(args.res) < 1):
        raise ValueError("--batch and --res start at 1")
    if args.save_stats and not (
        args.save_stats.endswith(".npz") and os.path.isdir(os.path.dirname(args.save_stats) or ".")
    ):
        raise ValueError(f"--save-stats {args.save_stats} must end in .npz, and its folder exist")
    if (
        args.save_stats
        and os.path.exists(args.save_stats)
        and (read_statistics(args.save_stats) or {"pictures": True})["pictures"]
    ):
        raise ValueError(
            f"--save-stats {args.save_stats} is there already, and holds pictures or something else: choose another name"
        )

    rank, local_rank, world = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if world > 1:
        dist.init_process_group("gloo")  # only sums travel, between the CPUs

    paths = [path for path in (args.real, args.fake) if path]
    sides = [read_statistics(path) for path in paths]
    name = sides[0]["features"] if all(sides) and not args.features else args.features or INCEPTION
    for path, side in zip(paths, sides):
        if side and side["features"] != name:
            raise ValueError(
                f"{path} holds statistics of {side['features']}, not of {name}: see --features"
            )
        if side and args.pr and not side["pictures"]:
            raise ValueError(f"--pr needs pictures, and {path} holds only mu and sigma")
    pictures = [
        None if side and not args.pr else Pictures(path) for path, side in zip(paths, sides)
    ]
    net = load_network(args.features, args.weights).to(device) if any(pictures) else None

    measured = [None, None]
    for i, path in enumerate(paths):
        if pictures[i]:
            measured[i] = measure(
                pictures[i],
                net,
                device=device,
                batch=args.batch,
                size=(args.res[0], args.res[-1]) if args.res else None,
                skip_bad=args.skip_bad,
                keep=args.pr,
                progress=rank == 0,
            )
        kind, skipped = (
            ("mu and sigma", 0) if sides[i] else ("pictures", len(pictures[i]) - measured[i].n)
        )
        if not sides[i]:
            try:
                mu, sigma = measured[i].gaussian()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            sides[i] = dict(mu=mu, sigma=sigma, n=measured[i].n)
        if rank == 0:
            print(
                f"{path}: {kind}, N = {sides[i]['n'] or 'unknown'}"
                + (f", {skipped} skipped" if skipped else "")
            )
        if rank == 0 and args.save_stats and i == 0:
            try:
                with open(f"{args.save_stats}.part", "wb") as file:
                    np.savez(
                        file,
                        mu=sides[0]["mu"],
                        sigma=sides[0]["sigma"],
                        features=name,
                        **({"n": sides[0]["n"]} if sides[0]["n"] else {}),
                    )
                os.replace(f"{args.save_stats}.part", args.save_stats)
            except OSError as error:  # a full disk, for example
                with contextlib.suppress(OSError):
                    os.remove(f"{args.save_stats}.part")
                raise ValueError(f"cannot write {args.save_stats}: {error.strerror}") from error
            print(f"wrote mu, sigma and n to {args.save_stats}")

    if rank == 0 and args.fake:
        (real, fake), score = sides, measured[1] and measured[1].inception_score()
        distance = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        print(f"{distance_name(name)} {distance:.4f} of {args.fake} against {args.real}")
        if args.selftest:
            print(
                "FID 3.1508 is published for CIFAR-10's 10,000 test against its 50,000 training pictures (3.1517 to 3.1525 in PyTorch)"
            )
        if min(side["n"] or 10_000 for side in sides) < 10_000:
            print(
                "note: under 10,000 pictures this distance comes out too large; compare only at equal numbers"
            )
        if score:
            title = "Inception Score" if name == INCEPTION else f"IS-{name.rpartition(':')[2]}"
            print(
                f"{title} {score[0]:.4f} +- {score[1]:.4f} of {args.fake}, {SPLITS} splits in a fixed random order"
            )
        elif not measured[1]:
            print(f"no Inception Score: {args.fake} has no pictures")
        if args.pr:
            kept = [torch.cat(side.kept).to(device) for side in measured]
            print(
                f"precision {{:.4f}}, recall {{:.4f}}, k = 3, {len(kept[0])} real and {len(kept[1])} fake pictures".format(
                    *precision_recall(*kept)
                )
            )
    if world > 1:
        dist.destroy_process_group()
        time.sleep(
            0.2
        )  # gloo's threads drop their last tensors, for which they need Python: after its end they would abort


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what is no text
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        if isinstance(error, RuntimeError) and "gloo" in message:
            message = "another rank has stopped"
        elif (
            sys.flags.dev_mode
            or isinstance(error, RuntimeError)
            and not ("out of memory" in message or "allocate memory" in message)
        ):
            raise
        sys.exit(f"fid.py: {message}")
    except KeyboardInterrupt:
        sys.exit(130)
