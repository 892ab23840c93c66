"""FID, sFID, Inception Score, precision and recall, equal to the reference implementations.

    python fid.py cifar10_train.npz cifar10_test.npz          # published: FID 3.1508
    python fid.py photos/ --res 256 --save-stats stats.npz    # save the statistics of your images,
    torchrun --nproc-per-node 8 fid.py stats.npz samples.npz  # then compare samples with them
    python fid.py photos/ samples/ --features module:Class    # use the features of another network
    python fid.py photos/ samples/ --nearest grid.png         # copies of training images?

    from fid import fid
    distance = fid("photos/", "samples.npz")

Images are read from folders, .zip, .npz and .npy files (see ImageReader), statistics from .npz
files with mu and sigma. This file imports nothing of the project and can be copied alone. It needs
Python 3.11, torch, numpy, scipy and Pillow. Other programs use fid, measure, frechet_distance,
inception_score, precision_recall, ImageReader and InceptionV3.

Sections: the Inception network; statistics of features and scores; nearest training images;
reading images; from images to statistics to FID; the command.
"""

import argparse
import array
import bisect
import collections
import collections.abc
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import math
import os
import stat
import struct
import sys
import time
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.linalg.lapack import dpstrf
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ------------------------------------------------------------------------ the Inception network

# FID is defined by one network: the Inception of 2015-12-05. Other Inception weights give other
# distances. The project pytorch-fid converted this one from TensorFlow and published the file.
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
SHA256 = "6726825d"  # the first digits of the file's checksum
INCEPTION = "Inception-2015-12-05"  # the name of these features in statistics files


def resize_tf1(x, size=(299, 299)):
    """Resize images as TensorFlow 1 does, bilinearly: (B, C, H, W), any dtype -> (B, C, *size).

    FID is defined with this resize; F.interpolate differs. Returns float32 (float64 for float64).
    """
    # float64 input keeps its precision; uint8 becomes float32.
    x = x if x.dtype == torch.float64 else x.float()

    # Bilinear interpolation is separable: first along the height, then along the width.
    for dim, out in zip((2, 3), size):
        # Output pixel i samples the input at i * in / out, without half-pixel offset and without
        # antialiasing. TensorFlow rounds this position to float32.
        position = torch.arange(out, device=x.device, dtype=torch.float32) * (x.shape[dim] / out)

        # Interpolate linearly between the two neighbors. Past the last pixel, that pixel repeats.
        low = position.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        # The weight of the upper neighbor, shaped to broadcast along dim.
        weight = (position - low).to(x.dtype).reshape(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


@contextlib.contextmanager
def exact_float32():
    """Disable TF32 and autocast inside the block: FID is defined by a float32 network."""
    # Matrix products and convolutions have separate TF32 switches.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.backends.cudnn.flags(
                enabled=True,
                benchmark=torch.backends.cudnn.benchmark,
                deterministic=torch.backends.cudnn.deterministic,
                allow_tf32=False,
            ),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class ConvUnit(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, in_channels, channels, kernel, stride=1, padding="same"):
        super().__init__()
        # Layers with stride 2 have no padding. Batch norm adds the bias.
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches, concatenated along the channels.

    branches: name -> chain of ConvUnits, as (channels, kernel) or (channels, kernel, stride). A
    chain may end in a fork: a list of units that share one input. branch_pool reads pool(x), the
    others read x. Without branch_pool, pool(x) itself is the last part of the output.
    """

    def __init__(self, in_channels, pool, **branches):
        super().__init__()
        self.pool = pool
        self.branches = {}  # branch -> for each position in the chain, the names of its units
        for branch, chain in branches.items():
            width = in_channels
            self.branches[branch] = []
            for i, units in enumerate(chain, 1):
                units = units if isinstance(units, list) else [units]

                # The names of the public weights: branch1x1 for a single unit, branch3x3_1 in a
                # chain, branch3x3_2a and branch3x3_2b in a fork.
                number = f"_{i}" if len(chain) > 1 else ""
                letters = "ab" if len(units) > 1 else [""]
                names = [branch + number + letter for letter in letters]
                for name, (channels, *kernel) in zip(names, units):
                    self.add_module(name, ConvUnit(width, channels, *kernel))

                # The next position of the chain reads the channels of this one.
                self.branches[branch].append(names)
                width = channels

    def forward(self, x):
        outputs = []
        pooled = self.pool(x)
        for branch, chain in self.branches.items():
            # Walk along the chain. Only its last position may be a fork, which has two outputs.
            ends = [pooled if branch == "branch_pool" else x]
            for names in chain:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outputs += ends

        # The blocks that halve the grid pass the pooled input on directly.
        if "branch_pool" not in self.branches:
            outputs.append(pooled)
        return torch.cat(outputs, 1)


# Two pooling layers differ from common Inception-v3 implementations: averages exclude the padding,
# and the last block, Mixed_7c, takes the maximum.
AVERAGE = functools.partial(
    F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
MAXIMUM = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = functools.partial(F.max_pool2d, kernel_size=3, stride=2)

# A 7 x 7 convolution is factored into these two kernels.
ROW = (1, 7)
COLUMN = (7, 1)


def mixed_35(in_channels, pool_channels):
    """Return the block for the 35 x 35 grid: 224 + pool_channels channels out."""
    # 3x3dbl: two 3 x 3 convolutions in a row see as far as one of 5 x 5.
    return Mixed(
        in_channels,
        AVERAGE,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pool_channels, 1)],
    )


def mixed_17(width):
    """Return the block for the 17 x 17 grid: 768 channels in and out, `width` inside."""
    # One factored 7 x 7 convolution, and two of them in a row (7x7dbl).
    return Mixed(
        768,
        AVERAGE,
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), (width, ROW), (192, COLUMN)],
        branch7x7dbl=[(width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
        branch_pool=[(192, 1)],
    )


def mixed_8(in_channels, pool):
    """Return the block for the 8 x 8 grid: 2048 channels out."""
    # A row and a column kernel in parallel, instead of one after the other.
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
    """The Inception network that defines FID: 1008 classes, 94 convolutions.

    net(x): pixel values 0 to 255, (B, 3, H, W), any size and dtype -> pooled features (B, 2048),
    logits (B, 1008), and the spatial features of sFID (B, 2023). The logits omit the bias, as the
    Inception Score requires. Computes in float32 regardless of autocast and TF32. The 472
    state-dict names are those of the public file.
    """

    def __init__(self):
        super().__init__()
        # From 299 x 299 pixels to a 35 x 35 grid.
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padding=0)
        self.Mixed_5b = mixed_35(192, 32)
        self.Mixed_5c = mixed_35(256, 64)
        self.Mixed_5d = mixed_35(288, 64)
        # To a 17 x 17 grid, with 768 channels.
        self.Mixed_6a = Mixed(
            288, HALVE, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]
        )
        self.Mixed_6b = mixed_17(128)
        self.Mixed_6c = mixed_17(160)
        self.Mixed_6d = mixed_17(160)
        self.Mixed_6e = mixed_17(192)
        # To an 8 x 8 grid, with 1280 and then 2048 channels.
        self.Mixed_7a = Mixed(
            768,
            HALVE,
            branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
        )
        self.Mixed_7b = mixed_8(1280, AVERAGE)
        self.Mixed_7c = mixed_8(2048, MAXIMUM)
        # The classifier: its logits give the Inception Score.
        self.fc = nn.Linear(2048, 1008)

    @exact_float32()
    def forward(self, x):
        # The reference resizes first and then scales the pixel values to about [-1, 1).
        x = x if x.shape[2:] == (299, 299) else resize_tf1(x)
        x = (x.to(self.fc.weight.dtype) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)

        # Halve the grid five times, while the channels grow.
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        mixed_6d = self.Mixed_6d(x)  # (B, 768, 17, 17)
        x = self.Mixed_6e(mixed_6d)  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)

        # FID uses the mean over the grid. The Inception Score uses the logits. Its reference leaves
        # the bias out.
        features = x.mean((2, 3))
        logits = features.double() @ self.fc.weight.double().T

        # sFID keeps the grid: 7 of the 192 channels of branch1x1, which come first in the block's
        # output. TensorFlow calls this branch mixed_6/conv, and sorts by row, column and channel.
        spatial = mixed_6d[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        return features, logits, spatial

    def fold(self):
        """Fold every batch norm into its convolution, in place, and return the net. Call it once.

        The features stay the same up to rounding; the net is faster, frozen and in eval mode.
        """
        # In eval mode, batch norm is an affine map, so it merges with the linear map before it.
        # float64 keeps the weights exact up to one rounding.
        self.eval().double()
        for unit in self.modules():
            if isinstance(unit, ConvUnit):
                unit.conv = fuse_conv_bn_eval(unit.conv, unit.bn)
                unit.bn = nn.Identity()
        # Channels-last is the faster memory layout for convolutions.
        return self.float().to(memory_format=torch.channels_last).requires_grad_(False)


def load_inception(path=None):
    """Return the folded InceptionV3 with the public weights.

    path: the weights file; default: torch.hub's cache, with a download if the file is missing.
    Raises ValueError, with the file's name, if it is not the public file or cannot be downloaded,
    and FileNotFoundError if path does not exist.
    """
    # The default file is the one in the cache. It is downloaded once.
    file = path or os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE)
    if not path and not os.path.exists(file):
        folder = os.path.dirname(file)
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS, file, SHA256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot download the network ({error}): put {WEIGHTS} into {folder}, "
                "or pass its path to fid.py with --weights"
            ) from error

    # Other weights give another distance: accept only the file with the known checksum.
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not digest.startswith(SHA256):
        raise ValueError(
            f"{file} is not {WEIGHTS_FILE} (its sha256 begins with {digest[:8]}): download it again"
        )

    # With weights_only, the file cannot run code.
    net = InceptionV3()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.fold()


# ------------------------------------------------------------ statistics of features, and scores


def is_first_rank():
    """True on rank 0, and without ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


SPLITS = 10  # the number of parts that the Inception Score averages over


class Statistics:
    """Running sums over the features and the class probabilities of images.

    Batches may arrive in any order, and sums of parts and ranks can be added. The sums are float64
    on the device of the features. Their size is independent of the number of images.

    moments: sum of [1, f]^T [1, f], (1 + D, 1 + D). It holds the count, sum f and sum f f^T.
    spatial: the same sum over the spatial features of sFID, (1 + S, 1 + S).
    scores: for each split the count, sum_x sum_k p_k log p_k, and sum_x p, (SPLITS, 2 + K).
    kept: with keep, the list of all features on the CPU (precision and recall need them).
    """

    def __init__(self, keep=False):
        # Zero is a scalar until the first update, because D, S and K are unknown.
        self.moments = torch.zeros((), dtype=torch.float64)
        self.spatial = torch.zeros((), dtype=torch.float64)
        self.scores = torch.zeros((), dtype=torch.float64)
        self.kept = [] if keep else None

    def update(self, features, logits=None, splits=None, spatial=None):
        """Add a batch: what extract returns, and the split of each image, see score_splits.

        features: (B, D). logits: (B, K) or None. splits: (B,) int64, or None if all images count
        for split 0. spatial: (B, S) or None.
        """
        self.moments = self.moments + moments_of(features)
        if spatial is not None:
            self.spatial = self.spatial + moments_of(spatial)

        # Precision and recall compare single images, so they need every feature vector.
        if self.kept is not None:
            self.kept.append(features.float().cpu())
        if logits is None:
            return

        # The Inception Score needs the negative entropy of p(y|x) and the mean of p(y|x).
        log_p = logits.double().log_softmax(1)
        count = torch.ones_like(log_p[:, :1])
        negative_entropy = (log_p.exp() * log_p).sum(1, keepdim=True)
        rows = torch.cat([count, negative_entropy, log_p.exp()], 1)  # (B, 2 + K)

        # Add each row to the sums of its split.
        if splits is None:
            splits = torch.zeros(len(rows), dtype=torch.int64)
        splits = splits.to(rows.device, non_blocking=True)
        sums = rows.new_zeros(SPLITS, rows.shape[1]).index_add_(0, splits, rows)
        self.scores = self.scores + sums

    def merge(self, other):
        """Add the sums of other images. Either both or none of the two keep features."""
        self.moments = self.moments + other.moments
        self.spatial = self.spatial + other.spatial
        self.scores = self.scores + other.scores
        if self.kept is not None:
            self.kept += other.kept

    def all_reduce(self):
        """Add the sums of all ranks on every rank; gather kept features on rank 0.

        Does nothing outside of torchrun. Call it once, after the last update.
        """
        if not dist.is_initialized():
            return

        # A rank without images still holds scalars: expand them to the shapes of the others.
        parts = [self.moments.cpu(), self.spatial.cpu(), self.scores.cpu()]
        shapes = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, [part.shape for part in parts])
        largest = [max(rank_shapes) for rank_shapes in zip(*shapes)]
        parts = [part.expand(shape).contiguous() for part, shape in zip(parts, largest)]

        # Every rank gets the same sums, hence the same distance and score.
        for part in parts:
            dist.all_reduce(part)
        self.moments, self.spatial, self.scores = parts

        # Features are large: only rank 0 gets them.
        if self.kept is not None:
            gathered = [None] * len(shapes)
            dist.gather_object(self.kept, gathered if is_first_rank() else None)
            self.kept = [features for part in gathered if part for features in part]

    @property
    def n(self):
        """The number of images."""
        return round(self.moments[0, 0].item()) if self.moments.ndim else 0

    def gaussian(self):
        """Return the mean (D,) and covariance (D, D), divided by N - 1, as float64 arrays.

        Raises ValueError for fewer than 2 images, NaN and infinity.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 images or more, not {self.n}")
        return gaussian_from(self.moments)

    def spatial_gaussian(self):
        """Return what gaussian() returns, for the spatial features of sFID. (None, None) without.

        Raises ValueError for NaN and infinity.
        """
        return gaussian_from(self.spatial) if self.spatial.ndim else (None, None)

    def summary(self):
        """Return the Gaussians and the number of images, a dict as from read_statistics."""
        mu, sigma = self.gaussian()
        mu_s, sigma_s = self.spatial_gaussian()
        return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=self.n)

    def inception_score(self):
        """Return mean and standard deviation of the score over the splits; None without logits.

        The score of a split is exp(E_x KL(p(y|x) || p(y))), arXiv 1606.03498.
        """
        if not self.scores.ndim:
            return None
        # With fewer images than splits, some splits are empty.
        filled = self.scores[self.scores[:, 0] > 0]
        n, negative_entropy, p = filled.split([1, 1, filled.shape[1] - 2], 1)

        # E_x KL = E_x sum_k p(k|x) log p(k|x) - sum_k p(k) log p(k), with p(k) = E_x p(k|x).
        kl = negative_entropy / n - torch.xlogy(p / n, p / n).sum(1, keepdim=True)

        # The paper reports mean and standard deviation over the splits.
        score = kl.exp()
        return score.mean().item(), score.std(correction=0).item()


def moments_of(features):
    """Return the sum of [1, f]^T [1, f] over feature vectors (B, D): (1 + D, 1 + D), float64."""
    # A constant 1 in front of each feature vector makes one product yield all three sums.
    one_f = F.pad(features.double(), (1, 0), value=1.0)  # (B, 1 + D)
    return one_f.T @ one_f


def gaussian_from(moments):
    """Return the mean (D,) and unbiased covariance (D, D) from sums (see moments_of), as arrays."""
    # The first row of the moments holds N and sum f. The block below holds sum f f^T.
    moments = moments.cpu().numpy()
    n = moments[0, 0]
    mu = moments[0, 1:] / n
    # The unbiased covariance: (sum f f^T - N mu mu^T) / (N - 1).
    sigma = (moments[1:, 1:] - n * np.outer(mu, mu)) / (n - 1)
    return check_gaussian(mu, sigma)


def score_splits(n):
    """Return the Inception Score split of each of n images, (n,) int64.

    The splits are consecutive parts of RandomState(2020).permutation(n), as in torch-fidelity.
    The shuffle matters for images sorted by class: a split of few classes scores too low.
    """
    # Image permutation[j] belongs to split j * SPLITS / n, with the rounding of torch-fidelity.
    splits = torch.empty(n, dtype=torch.int64)
    splits[np.random.RandomState(2020).permutation(n)] = ((torch.arange(n) + 1) * SPLITS - 1) // n
    return splits


def inception_score(logits):
    """Return the Inception Score of logits (N, K): mean and standard deviation over SPLITS splits.

    See arXiv 1606.03498 for the score and score_splits for the order.
    """
    # The same sums as for the FID, without features.
    statistics = Statistics()
    no_features = logits[:, :0]
    statistics.update(no_features, logits, score_splits(len(logits)))
    return statistics.inception_score()


def check_gaussian(mu, sigma, suffix=""):
    """Return mean (D,) and covariance (D, D) as float64 arrays.

    suffix: "_s" if they are called mu_s and sigma_s. Raises ValueError for other shapes, NaN and
    infinity.
    """
    mu = np.asarray(mu, dtype=np.float64)
    sigma = np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(
            f"mu{suffix} {mu.shape} and sigma{suffix} {sigma.shape} must be (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("the features or their statistics contain NaN or infinity")
    return mu, sigma


def factor_covariance(sigma):
    """Return F (D, rank) with sigma = F F^T, by the Cholesky decomposition with pivoting."""
    # LAPACK stops at the numerical rank, so singular covariances need no jitter.
    lower, pivot, rank, _ = dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    # Undo the permutation of the pivots, which count from 1.
    factor[pivot - 1] = np.tril(lower)[:, :rank]
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) in float64.

    This is the FID if the features are Inception's (arXiv 1706.08500, Eq. 6). mu: (D,).
    sigma: (D, D) covariances of any rank. Raises ValueError for other shapes, NaN and infinity.
    """
    mu1, sigma1 = check_gaussian(mu1, sigma1)
    mu2, sigma2 = check_gaussian(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"{len(mu1)} and {len(mu2)} features come from different networks")

    # tr (sigma1 sigma2)^(1/2) is the sum of the roots of the eigenvalues of sigma1 sigma2. Let
    # sigma = F F^T and M = F1^T F2. Then M M^T has the same eigenvalues, except for zeros. Their
    # roots are the singular values of M. So singular covariances are no problem, and it is faster
    # than scipy.linalg.sqrtm.
    product = factor_covariance(sigma1).T @ factor_covariance(sigma2)  # (rank1, rank2)
    root = np.linalg.svd(product, compute_uv=False).sum()

    # Eq. 6. Rounding can make the distance slightly negative: clip at 0.
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(0.0, float(distance))


def kth_distance(x, k, block):
    """Return the distance of each row of x (N, D) to its k-th nearest neighbor in x, (N,)."""
    # Each row is its own nearest neighbor, hence k + 1. Blocks limit the memory.
    parts = [torch.cdist(part, x).kthvalue(k + 1, 1).values for part in x.split(block)]
    return torch.cat(parts)


def covered_share(x, centers, radius, block):
    """Return the share of rows of x (N, D) within `radius` (M,) of any of the centers (M, D)."""
    # Eq. 1: a sample counts if it is in at least one ball.
    parts = [(torch.cdist(part, centers) <= radius).any(1) for part in x.split(block)]
    return torch.cat(parts).double().mean().item()


@exact_float32()
def precision_recall(real, fake, k=3, block=1024):
    """Return improved precision and recall (arXiv 1904.06991, Eq. 1-2), both in [0, 1].

    real: (N, D) and fake: (M, D) features, on one device. block: the number of rows of a distance
    matrix, which has block x max(N, M) entries. Raises ValueError unless both have more than k
    rows, and for NaN and infinity.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images on both sides, "
            f"not {len(real)} and {len(fake)}"
        )
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("the features contain NaN or infinity")
    # A large mean of the features would cancel in float32. Distances do not depend on it.
    center = real.mean(0)
    real, fake = real - center, fake - center

    # The paper describes a set by balls around its samples. The radius of a ball is the distance to
    # the k-th neighbor in the set. Precision: the share of fake samples in the balls of real ones.
    precision = covered_share(fake, real, kth_distance(real, k, block), block)
    # Recall: the share of real samples in the balls of fake ones.
    recall = covered_share(real, fake, kth_distance(fake, k, block), block)
    return precision, recall


# ----------------------------------------------------------- the nearest training images of samples

# A sample is a near-copy if its distance to the nearest training image is at most a third of the
# mean distance to the next n ones. With n = 1, this is the rule of Yoon et al.
# (openreview.net/forum?id=shciCbSk9h) and Gu et al. (arXiv 2310.02664), under which a duplicate
# in the training set hides a copy. Carlini et al. (arXiv 2301.13188) compare with the mean over 50
# neighbors, which is robust to duplicates. But in a small training set, 50 neighbors include
# images of other kinds, and the ratio is small without a copy. So n is 5 % of the training set,
# between 1 and 50.
NEAR_COPY = 1 / 3
NEXT_NEIGHBORS = 50

GRID_ROWS = 16  # samples in the grid of --nearest
GRID_NEIGHBORS = 5  # training images next to each


class NearestImages:
    """The k nearest training images of each sample, in Euclidean distance.

    Add all samples, call finish_samples, add the training images in any order, and call finish.
    Each rank adds its share. Every sample is compared with the training images of all ranks.

    A mirrored copy is a copy, too: the distance is that of the sample or of its mirror image, the
    smaller one. Memory holds both versions of the samples and their neighbors, so it does not grow
    with the training set.

    vectors_of: function from images (B, 3, H, W) to what is compared, (B, ...): features or pixels.
    device: where to compare.

    After finish, rank 0 has numbers: (n,), those of the samples; distances: (n, k) ascending;
    nearest: (n, k), the numbers of the training images; training_count. k is smaller if there are
    fewer training images.
    """

    def __init__(self, vectors_of, device="cpu", k=1 + NEXT_NEIGHBORS):
        self.vectors_of = vectors_of
        self.device = device
        self.k = k
        self.samples = []  # batches of (numbers, vectors, mirrored vectors)
        self.pending = []  # batches of training images not yet compared: (numbers, vectors)
        self.training_count = 0

    def add_samples(self, numbers, x, vectors):
        """Add samples: numbers (B,), images x (B, 3, H, W), and what vectors_of(x) returns."""
        self.samples.append((numbers, vectors, self.vectors_of(x.flip(3))))

    def finish_samples(self):
        """Collect the samples of all ranks on every rank, in the order of their numbers.

        Raises ValueError if there are none, or if their shapes differ.
        """
        parts = [tuple(part.cpu() for part in batch) for batch in self.samples]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        if not parts:
            raise ValueError("--nearest needs samples, and none of them is readable")
        self.samples = []

        # Pixels can only be compared if all images have one shape.
        for _, vectors, _ in parts:
            check_same_shape(vectors, parts[0][1])
        numbers, original, mirrored = (torch.cat(part) for part in zip(*parts))
        order = numbers.argsort()
        self.numbers = numbers[order]
        self.original = original[order].to(self.device)
        self.mirrored = mirrored[order].to(self.device)

        # No neighbor is known yet: their distances are infinite.
        shape = (len(numbers), self.k)
        self.distances = torch.full(shape, math.inf, dtype=torch.float64, device=self.device)
        self.nearest = torch.full(shape, -1, device=self.device)

        # Compare blocks of at most 2^22 numbers: 32 MB in float64.
        self.block = max(1, 2**22 // self.original[0].numel())

    def add_training(self, numbers, x, vectors):
        """Add training images: numbers (B,) and what vectors_of(x) returns.

        x is not used. It is there because add_samples takes it.
        """
        check_same_shape(vectors, self.original)
        self.pending.append((numbers.to(self.device), vectors))
        self.training_count += len(numbers)
        if sum(len(numbers) for numbers, _ in self.pending) >= self.block:
            self._compare()

    def _compare(self):
        """Compare the pending training images with all samples, and keep the k nearest."""
        if not self.pending:
            return
        numbers, y = (torch.cat(part) for part in zip(*self.pending))
        self.pending = []
        # Matrix products are the fastest way to many distances. In float64, the cancellation in
        # |x|^2 - 2 x y + |y|^2 only matters for equal vectors: see ratios.
        y = y.flatten(1).double()
        for start in range(0, len(self.numbers), self.block):
            rows = slice(start, start + self.block)
            distances = [
                torch.cdist(x[rows].flatten(1).double(), y, compute_mode="use_mm_for_euclid_dist")
                for x in (self.original, self.mirrored)
            ]
            distances = torch.minimum(*distances)  # (rows, len(y))
            self._keep_nearest(rows, distances, numbers.expand_as(distances))

    def _keep_nearest(self, rows, distances, numbers):
        """Merge (rows, m) distances and numbers of training images into the k nearest so far."""
        distances = torch.cat([self.distances[rows], distances], 1)
        numbers = torch.cat([self.nearest[rows], numbers], 1)
        self.distances[rows], best = distances.topk(self.k, largest=False)
        self.nearest[rows] = numbers.gather(1, best)

    def finish(self):
        """Merge the neighbors of all ranks on rank 0. Raises ValueError for too few images."""
        self._compare()
        self.distances, self.nearest = self.distances.cpu(), self.nearest.cpu()
        if dist.is_initialized():
            part = (self.distances, self.nearest, self.training_count)
            parts = [None] * dist.get_world_size() if is_first_rank() else None
            dist.gather_object(part, parts)
            for distances, nearest, count in (parts or [])[1:]:
                self._keep_nearest(slice(None), distances, nearest)
                self.training_count += count
        # The distance to the nearest image is compared with that to others.
        if self.training_count < 2 and is_first_rank():
            raise ValueError(
                f"--nearest needs 2 training images or more, not {self.training_count}"
            )
        self.distances = self.distances[:, : self.training_count]
        self.nearest = self.nearest[:, : self.training_count]

    def next_neighbors(self):
        """Return over how many of the next neighbors the rule for near-copies averages."""
        return max(1, min(self.k - 1, self.training_count // 20))  # 5 %

    def ratios(self):
        """Return for each sample the distance to its nearest, over the mean of the next ones."""
        # Equal vectors are a rounding error apart: count that as 0.
        norm = self.original.flatten(1).double().norm(dim=1, keepdim=True).cpu()
        distances = self.distances.masked_fill(self.distances < 1e-5 * norm, 0)

        # If the sample and all of these neighbors are equal, the ratio is 0 / 0.
        mean = distances[:, 1 : 1 + self.next_neighbors()].mean(1)
        return (distances[:, 0] / mean).nan_to_num(0)


def check_same_shape(a, b):
    """Raise ValueError if the vectors of two batches differ in shape."""
    if a.shape[1:] != b.shape[1:]:
        shapes = " and ".join("x".join(map(str, x.shape[1:])) for x in (a, b))
        raise ValueError(f"--nearest-in pixels needs images of one shape, not {shapes}: see --res")


def neighbor_grid(rows, marked, gap=6):
    """Return a PIL image: in each row a sample, then its nearest training images, on white.

    rows: lists of images (H, W, 3) uint8, of any shape. All are shown in the shape of the first
    one, whose longer side gets 64 to 256 pixels. marked: for each row, whether to frame the sample
    in red.
    """
    # Enlarge small images by a whole factor, which keeps their pixels visible; shrink large ones.
    height, width = rows[0][0].shape[:2]
    shrink = min(1, 256 / max(height, width))
    height, width = max(1, round(shrink * height)), max(1, round(shrink * width))
    scale = -(-64 // max(height, width))  # 64 / side, rounded up
    rows = [[fit(image, (height, width)) for image in row] for row in rows]
    height, width = scale * height, scale * width

    # A wider gap separates the sample from the training images.
    columns = max(map(len, rows))
    shape = (gap + len(rows) * (height + gap), 4 * gap + columns * (width + gap), 3)
    grid = np.full(shape, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if marked[i]:
            grid[top - 2 : top + height + 2, gap - 2 : gap + width + 2] = (220, 0, 0)
        for j, image in enumerate(row):
            left = gap + j * (width + gap) + (3 * gap if j else 0)
            image = image.repeat(scale, 0).repeat(scale, 1)
            grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


# -------------------------------------------- reading images: folders, zip files and array files

# Formats that Pillow decodes by itself. EPS, for example, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
EXTENSIONS = {end for end, name in Image.registered_extensions().items() if name in FORMATS}


def cpu_cores():
    """Return the number of CPU cores that this process may use.

    The affinity of the process and the quota of its container can be below the machine's number.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1  # macOS and Windows have neither
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(folder="/sys/fs/cgroup"):
    """Return the CPU time that the container may use per unit of time, or infinity.

    Version 2 of control groups has one file, "quota period" or "max period". Version 1 has two.
    """
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            texts = []
            for name in names:
                with open(os.path.join(folder, name)) as file:
                    texts += file.read().split()
            quota, period = texts
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return math.inf


def one_line(error):
    """Return the text of an exception in one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def list_paths(paths):
    """Return one path, or several, as a list of strings."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return [os.fspath(path) for path in paths]


def is_hidden(part):
    """True for hidden and operating-system files and folders, such as `.DS_Store`."""
    return (part.startswith(".") and part != ".") or part in ("__MACOSX", "lost+found")


def is_image(name):
    """True for the path of an image file, unless the file or a folder in the path is hidden."""
    # Archives made on macOS contain hidden copies, such as __MACOSX/._1.png.
    if any(is_hidden(part) for part in name.split("/")):
        return False
    return os.path.splitext(name.lower())[1] in EXTENSIONS


def to_rgb(image):
    """Convert a PIL image of any mode to RGB as viewers show it."""
    # Apply the rotation that the camera stored.
    image = ImageOps.exif_transpose(image)
    # Scale 16-bit gray to 8 bits. Pillow's own conversion clips at 255.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    # Show transparent images on white.
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def files_below(folder):
    """Yield the files in a folder and its visible subfolders. Follows links; raises OSError."""

    def stop(error):
        raise error

    # Links can form cycles: enter each folder only once.
    entered = set()
    for parent, subfolders, files in os.walk(folder, onerror=stop, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        identity = os.stat(parent)[1:3]  # inode and device
        if identity in entered:
            subfolders.clear()
            continue
        entered.add(identity)

        # The caller sorts the files.
        for file in files:
            yield os.path.join(parent, file)


def fit(image, size=None):
    """Crop the center of an image (H, W, 3) and resize it, bicubic with antialiasing.

    size: (height, width), or None for the image as it is. Returns uint8 (height, width, 3).
    """
    image = np.asarray(image)
    if size in (None, image.shape[:2]):
        return image
    resized = ImageOps.fit(Image.fromarray(image), size[::-1], method=Image.Resampling.BICUBIC)
    return np.asarray(resized)


def decode(file, size=None, turn=False):
    """Decode an image file, a path or a file object. size, turn: see ImageReader.read.

    Returns uint8 (H, W, 3). A corrupt file can raise any exception.
    """
    with Image.open(file, formats=FORMATS) as image:
        # JPEG can decode at 1/2, 1/4 or 1/8, which is faster. Stay at or above twice the needed
        # size. A rotation (tag 0x0112) swaps height and width: decode those images in full.
        if size and image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1:
            image.draft("RGB", (2 * size[1], 2 * size[0]))
        image = to_rgb(image)

        # to_rgb may rotate the image, so compare height and width after it.
        portrait = image.height > image.width
        return fit(image, size[::-1] if turn and portrait else size)


class StringArray(collections.abc.Sequence):
    """A sequence of strings in one bytes object, with an array of their ends.

    A list would take three times the memory. Each worker process would also copy it: reading a
    string changes its reference count, and then the system copies its page of memory.
    """

    def __init__(self, strings):
        content = bytearray()
        ends = array.array("q")
        for string in strings:
            # File names may be invalid text. surrogatepass encodes every Python string.
            content += string.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        self.content = bytes(content)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]  # negative numbers count from the end
        start = self.ends[i - 1] if i else 0
        return self.content[start : self.ends[i]].decode("utf-8", "surrogatepass")


class ImageCounter:
    """Counts images while files are listed, on stderr: once per second, after two seconds.

    Large folders on slow disks take minutes.
    """

    def __init__(self):
        self.count = 0
        self.start = self.shown = time.time()

    def add(self, place):
        """Count an image. place: the folder or file that it is in."""
        self.count += 1
        now = time.time()
        if now - self.start > 2 and now - self.shown > 1:
            self.shown = now
            print(f"\r{self.count} images up to {place} ", end="", file=sys.stderr, flush=True)

    def end(self):
        """End the line, if there is one."""
        if self.shown > self.start:
            print(f"\r{self.count} images listed", file=sys.stderr, flush=True)


def images_in_folder(folder):
    """Return the sorted image paths in a folder, relative to it, with forward slashes."""
    names = []
    counter = ImageCounter()
    prefix = os.path.join(folder, "")
    for file in files_below(folder):
        name = file.removeprefix(prefix).replace(os.sep, "/")
        if is_image(name):
            names.append(name)
            counter.add(folder)
    counter.end()
    return sorted(names)


def images_in_zip(path):
    """Return the sorted image paths in a zip file. Raises ValueError, with the file's name."""
    try:
        return sorted(name for name in zipfile.ZipFile(path).namelist() if is_image(name))
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(
            f"{path} is not a folder and not a valid zip, npz or npy file ({one_line(error)})"
        ) from error


def list_images(path):
    """Return the names of all images in a folder or a zip file, relative to it: a StringArray.

    Raises ValueError if there are none, or if they are split into training and test images.
    """
    names = images_in_folder(path) if os.path.isdir(path) else images_in_zip(path)
    if not names:
        raise ValueError(f"{path} contains no images ({', '.join(FORMATS)})")
    check_splits(path, {folder_of(name) for name in names})
    return StringArray(names)


def folder_of(name):
    """Return the folder of an image path. Equal folders are one object, to save memory."""
    return sys.intern(name.rpartition("/")[0])


def split_folders(folders):
    """Return {folder: its parts} for folder paths, and the number of parts that all share.

    For train/cat and train/dog, the shared part is ["train"].
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    return parts, len(os.path.commonprefix(list(parts.values())))  # it also accepts lists


# Folders of these names are splits of a dataset. They are not classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def check_splits(path, folders):
    """Raise ValueError if the images in path are split into folders such as train and val.

    They would become classes, and test images would be mixed with training images. If there are
    other images beside them, a note on stderr tells it. folders: those of the images.
    """
    parts, shared = split_folders(folders)
    # The first folders below the shared ones. Images without such a folder have None.
    first = {folder[shared] if len(folder) > shared else None for folder in parts.values()}
    splits = sorted(name for name in first - {None} if name.lower() in SPLIT_NAMES)
    if len(splits) < 2:
        return
    found = f"{path} contains the splits {', '.join(splits)}"
    if len(splits) < len(first):
        print(f"note: {found} and other images: all of them are read", file=sys.stderr)
        return
    if not os.path.isdir(path):
        raise ValueError(f"{found}: make one archive for each, or unpack it and name one folder")
    training = [name for name in splits if name.lower().startswith("train")]
    chosen = [*next(iter(parts.values()))[:shared], (training or splits)[0]]
    raise ValueError(f"{found}: choose one, such as {os.path.join(path, *chosen)}")


def labels_from_folders(folders):
    """Return the class name of each image and the sorted class names; ([], []) without.

    The class of an image is its first folder below the folders that all images share. If one
    image has no such folder, there are no labels. folders: one for each image.
    """
    parts, shared = split_folders(folders)
    if min(map(len, parts.values())) <= shared:
        return [], []
    labels = [parts[folder][shared] for folder in folders]
    return labels, sorted(set(labels))


MOST_CLASSES = 1_000_000  # a larger class number is a mistake in the file


def in_array(where):
    """True if the first part of a source (see ImagePlaces) is an array: no path, and not None."""
    return where is not None and not isinstance(where, str)


class ImagePlaces(collections.abc.Sequence):
    """Where each image is: (array, row), (zip path, member name) or (None, file path).

    The tuples are made on access: a list of a million of them would be large.
    """

    def __init__(self):
        self.parts = []  # (array, None), or (folder or zip file, names)
        self.ends = []  # the number of images up to the end of each part

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        i = range(len(self))[i]  # negative numbers count from the end
        # The part that holds image i, and the row of the image in this part.
        part = bisect.bisect_right(self.ends, i)
        where, names = self.parts[part]
        row = i - (self.ends[part - 1] if part else 0)
        return self._source(where, row if names is None else names[row])

    def __iter__(self):
        for where, names in self.parts:
            for name in range(len(where)) if names is None else names:
                yield self._source(where, name)

    @staticmethod
    def _source(where, name):
        # Folders end with a separator.
        if isinstance(where, str) and where.endswith(os.sep):
            return None, where + name
        return where, name

    def add(self, where, names=None):
        """Add images: the rows of an array, or those with these names in a folder or zip file."""
        if names is not None and os.path.isdir(where):
            where = os.path.join(where, "")
        self.parts.append((where, names))
        self.ends.append(len(self) + len(where if names is None else names))


@functools.lru_cache(256)
def _archive(path, process, version):
    """Open a zip file once per process, and again when another file has taken its place.

    Threads can share the file object. Processes cannot, because they share its file position.
    version: see file_version.
    """
    return zipfile.ZipFile(path)


def file_version(path):
    """Return what changes if a file is replaced or written again."""
    info = os.stat(path)
    return info.st_ino, info.st_mtime_ns, info.st_size


class ImageReader:
    """A sequence of all images in the given paths, as RGB uint8.

    The order is that of the paths, and of the sorted names within a path.

    paths: one or several folders (searched recursively) and .zip files, or .npz files (x or arr_0,
    with y and classes if labeled) and .npy files, all uint8 NHWC. Hidden files are ignored.
    labels: int64 array (N,), or None. They come from y in arrays, and otherwise from the folders
    (see labels_from_folders). classes: list of class names, or None.
    sources: per image (array, row), (zip path, member name) or (None, file path), see ImagePlaces.
    list_images: the function that lists the images of a folder or zip file.
    Raises FileNotFoundError or ValueError, with the path, if there is nothing to read, and
    ValueError for a folder of splits (see check_splits).
    """

    def __init__(self, paths, list_images=list_images):
        self.list_images = list_images
        self.sources = ImagePlaces()
        self.labels = None
        self.classes = None
        names = []  # for each folder and zip file, the relative paths of its images
        labels = []  # class names, or class numbers if the array file has no names
        classes = []  # class names
        paths = list_paths(paths)
        if not paths:
            raise ValueError("there are no paths to read images from")
        for path in paths:
            images, own_labels, own_classes = self.open_path(path)
            if not len(images):
                raise ValueError(f"{path} contains no images")
            if isinstance(images, StringArray):
                names.append(images)
                self.sources.add(path, images)
                continue
            # A class name that occurs in several files is one class.
            labels += own_labels
            classes += [name for name in own_classes if name not in classes]
            self.sources.add(images)

        # Folder names label files, y labels arrays: a mixture has no consistent labels.
        if names and sum(map(len, names)) < len(self.sources):
            raise ValueError("cannot mix folders and zip files with npz and npy files")
        # Class names (str) and class numbers (int) do not mix, either.
        kinds = {type(label) for label in labels}
        if labels and (len(labels) < len(self.sources) or len(kinds) > 1):
            raise ValueError(
                "of several npz files, either all or none must have y, "
                "and either all or none must have classes"
            )
        if names:
            folders = [folder_of(name) for part in names for name in part]
            labels, classes = labels_from_folders(folders)
        if labels:
            self._number_labels(labels, classes)

    def open_path(self, path):
        """Return images, labels and class names of an array file; of others, names, [] and []."""
        if path.endswith((".npz", ".npy")) and os.path.isfile(path):
            return read_arrays(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is neither a file nor a folder")
        # Any file that does not hold arrays must be a zip file.
        return self.list_images(path), [], []

    def _number_labels(self, labels, classes):
        """Set self.labels and self.classes from names, or from numbers if classes is empty."""
        # Numbers without names: every number up to the largest is a class.
        if not classes and max(labels) >= MOST_CLASSES:
            raise ValueError(f"class number {max(labels)} is not below {MOST_CLASSES:,}")
        classes = classes or range(max(labels) + 1)
        number = {name: i for i, name in enumerate(classes)}
        self.labels = np.array([number[label] for label in labels], dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def __len__(self):
        return len(self.sources)

    def read(self, i, size=None, turn=False):
        """Return image i, (H, W, 3) uint8.

        size: (height, width). The largest centered crop of this shape is resized to it.
        turn: read portrait images as (width, height) instead.
        Raises ValueError, with the image's name, if the image is unreadable.
        """
        where, name = self.sources[i]
        if in_array(where):
            # Arrays need no decoding. Gray images have one channel: repeat it.
            image = np.broadcast_to(where[name], (*where.shape[1:3], 3))
            return fit(image, size)
        try:
            if where:
                archive = _archive(where, os.getpid(), file_version(where))
                return decode(archive.open(name), size, turn)
            # Reading a pipe would block forever.
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise ValueError("not a regular file")
            return decode(name, size, turn)
        except MemoryError:
            raise
        except Exception as error:  # a corrupt file can raise anything
            archive = f" in {where}" if where else ""
            raise ValueError(f"cannot read image {name}{archive}: {one_line(error)}") from error

    __getitem__ = read

    def name(self, i):
        """Return the name of image i for messages: its path, or its number in an array."""
        where, name = self.sources[i]
        if in_array(where):
            return f"image {i}"
        return f"{name} in {where}" if where else name


def on_first_rank(function, *args):
    """Call a function on rank 0, and return its result, or raise its error, on every rank.

    Every rank must call it. Without ranks it calls the function. It passes on ValueError and
    OSError. After any other error of rank 0, the other ranks stop when rank 0 has ended.
    """
    if not dist.is_initialized():
        return function(*args)
    result = [None]
    if is_first_rank():
        try:
            result = [function(*args)]
        except (ValueError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result, 0, device=torch.device("cpu"))
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def list_images_once(path):
    """Return what list_images does. Under torchrun every rank calls it, and rank 0 lists."""
    return on_first_rank(list_images, path)


def open_images(paths):
    """Return an ImageReader. Under torchrun every rank calls it, and rank 0 lists the files."""
    return ImageReader(paths, list_images_once)


def read_arrays(path):
    """Read an .npz (x or arr_0, y, classes) or .npy file: return images, labels, class names.

    images: (N, H, W, C) uint8, C 1 or 3, memory mapped unless the .npz is compressed.
    labels: N class names, or N numbers if the file has no names, or [] without y. classes may
    be [], too. Raises ValueError; runs no pickled code.
    """
    x, y, classes = load_arrays(path)
    # Gray images may lack the channel axis.
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: x or arr_0 must be uint8 (N, H, W, 3), not {x.dtype} {x.shape}")
    return x, array_labels(path, len(x), y, classes), classes


def load_arrays(path, keys=()):
    """Return images and labels of an .npz or .npy file as they are stored, and the class names.

    keys: the names of the images, and of the labels. By default x or arr_0, and y, classes. Labels
    may be None, and class names []. Raises ValueError; runs no pickled code.
    """
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        data = {"arr_0": data} if isinstance(data, np.ndarray) else data
        image_keys = keys[:1] or ("x", "arr_0")
        label_key = keys[1] if len(keys) > 1 else "y"
        key = next((key for key in image_keys if key in data), None)
        if key is None or (len(keys) > 1 and label_key not in data):
            wanted = " or ".join(image_keys) if key is None else label_key
            raise ValueError(f"it does not contain {wanted}, only {', '.join(data) or 'nothing'}")

        # np.load maps .npy files, but loads members of an .npz file into memory. Map them, too.
        x = data[key] if isinstance(data, dict) else map_member(path, key + ".npy")
        x = data[key] if x is None else x

        # Labels and class names are optional.
        y = data.get(label_key)
        classes = class_names(data)
        if len(set(classes)) < len(classes):
            raise ValueError("two of its classes have the same name")
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"{path}: {one_line(error)}") from error
    return x, y, classes


def class_names(arrays):
    """Return the array `classes` of an .npz as a list of strings; [] if there is none."""
    names = arrays.get("classes", [])
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def array_labels(path, n, y, classes):
    """Return the labels of n images: class names, or numbers if there are no names, or [].

    y: class numbers (N,), counted from 0, or None. Raises ValueError for anything else.
    """
    if y is None:
        return []
    # Return names where there are any: files may number the same classes differently.
    whole_numbers = y.shape == (n,) and y.dtype.kind in "iu"
    if not whole_numbers or y.min() < 0 or (classes and y.max() >= len(classes)):
        raise ValueError(
            f"{path}: y must hold one class number for each of the {n} images; "
            f"the file names {len(classes) or 'no'} classes"
        )
    return [classes[i] for i in y] if classes else y.tolist()


def map_member(path, name):
    """Memory map the array `name` of an .npz file.

    Returns None if that is impossible: compressed, objects, or in Fortran order.
    """
    with zipfile.ZipFile(path) as archive, archive.open(name) as member, open(path, "rb") as file:
        # The member begins with the npy header, in one of two versions: shape, order and dtype.
        info = archive.getinfo(name)
        read_header = np.lib.format.read_array_header_2_0
        if np.lib.format.read_magic(member) == (1, 0):
            read_header = np.lib.format.read_array_header_1_0
        shape, fortran, dtype = read_header(member)
        if info.compress_type != zipfile.ZIP_STORED or dtype.hasobject or fortran:
            return None

        # The data follows three headers: 30 bytes of zip, the name and the extra field, and npy.
        file.seek(info.header_offset)
        lengths = struct.unpack("<26x2H", file.read(30))  # of the name and the extra field
        offset = info.header_offset + 30 + sum(lengths) + member.tell()
        return np.memmap(path, dtype, "r", offset, shape)


# -------------------------------------------------------------- from images to statistics to FID


@torch.no_grad()
@exact_float32()
def extract(net, x, spatial=False):
    """Return the features (B, D) and the logits (B, K) of images x.

    net: InceptionV3, or any module on x's device from x to features (B, D) or (B, D, 1, 1), or to a
    tuple of features, logits and spatial features. x: (B, 3, H, W), uint8 or float32 in [0, 255].
    spatial: also return the spatial features of sFID (B, S). Logits and spatial features are None
    if net does not return them.
    """
    # On the CPU, the activations of 4 images per thread fit in the caches: 20 % faster.
    chunk = len(x)
    if isinstance(net, InceptionV3) and x.device.type == "cpu":
        chunk = 4 * torch.get_num_threads()

    # A network may return its features alone, or None in place of the logits.
    outputs = []
    for part in x.split(chunk):
        output = net(part)
        output = output if isinstance(output, tuple) else (output,)
        outputs.append([*output, None, None][:3])
    features, *others = (None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs))
    return features.flatten(1), *others[: 2 if spatial else 1]


def read_ahead(function, jobs, workers, progress=False):
    """Yield function(job) for each job, in order. Threads work up to `workers` jobs ahead.

    jobs: list of lists (or ranges) of images. progress: show the images per second on stderr.
    """
    # Threads suffice: Pillow and NumPy release the interpreter lock while they decode and copy.
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    waiting = collections.deque()
    total = sum(len(job) for job in jobs)
    done = 0
    start = time.time()
    shown = 0.0
    try:
        for i in range(len(jobs) + workers):
            # Turn i starts job i and collects job i - workers.
            if i < len(jobs):
                waiting.append(pool.submit(function, jobs[i]))
            if i < workers:
                continue
            yield waiting.popleft().result()

            # Report once per second, and at the end.
            done += len(jobs[i - workers])
            now = time.time()
            if progress and (now - shown >= 1 or done == total):
                shown = now
                line = f"\r{done} of {total} images, {done / (now - start):.0f} per second "
                end = "\n" if done == total else ""
                print(line, end=end, file=sys.stderr, flush=True)
    finally:
        # After an error, or if the caller stops early, drop the jobs that have not started.
        pool.shutdown(cancel_futures=True)


def read_groups(images, indices, size, skip_bad, one_size):
    """Read images and group them by shape: return lists of (index, (3, H, W) uint8 tensor).

    skip_bad: report unreadable images on stderr instead of raising ValueError.
    one_size: resize images of several shapes to Inception's input and return one group, float32.
    """
    groups = collections.defaultdict(list)
    for i in indices:
        try:
            image = torch.tensor(images.read(i, size)).permute(2, 0, 1)
            groups[image.shape].append((i, image))
        except ValueError as error:
            if not skip_bad:
                raise
            print(f"skipped: {error}", file=sys.stderr)

    # Inception resizes its input anyway, so resizing here changes nothing but the batching.
    groups = list(groups.values())
    if len(groups) > 1 and one_size:
        return [[(i, resize_tf1(image[None])[0]) for group in groups for i, image in group]]
    return groups


def image_batches(images, *, device, batch, size, skip_bad, one_size, progress):
    """Yield this rank's share of images in batches: numbers (B,), and (B, 3, H, W).

    The images are uint8, or float32 if one_size resized them. See measure and read_groups for the
    arguments.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1

    # Each rank takes every world-th image.
    indices = range(rank, len(images), world)
    jobs = [indices[i : i + batch] for i in range(0, len(indices), batch)]

    def read(job):
        return read_groups(images, job, size, skip_bad, one_size)

    # Threads read and decode ahead of the network. The images of a batch have one shape.
    for groups in read_ahead(read, jobs, min(8, cpu_cores()), progress):
        for group in groups:
            x = torch.stack([image for _, image in group])
            if torch.device(device).type == "cuda":
                x = x.pin_memory().to(device, non_blocking=True)
            yield torch.tensor([i for i, _ in group]), x


def measure(
    images,
    net,
    *,
    device="cpu",
    batch=64,
    size=None,
    skip_bad=False,
    keep=False,
    progress=False,
    visit=None,
):
    """Return the Statistics of images in the features of net (see extract), on every rank.

    images: ImageReader, or any sequence with read(i, size). size: (height, width), see
    ImageReader.read. skip_bad: report unreadable images on stderr and continue, instead of raising
    ValueError. keep: keep the features. progress: show this rank's progress on stderr. visit:
    function to call with each batch of this rank: numbers (B,), images, and features (B, D).
    """
    # Networks other than Inception get images as they are, one batch per shape. So does visit,
    # which may flip them: TensorFlow's resize of a flipped image is not the flipped resized one.
    options = dict(device=device, batch=batch, size=size, skip_bad=skip_bad, progress=progress)
    options["one_size"] = isinstance(net, InceptionV3) and visit is None

    # The split of an image depends on its number alone, so the score is independent of the number
    # of ranks.
    splits = score_splits(len(images))
    statistics = Statistics(keep)
    for numbers, x in image_batches(images, **options):
        # Features go straight into the sums, so memory does not grow with the dataset.
        features, logits, spatial = extract(net, x, spatial=True)
        statistics.update(features, logits, splits[numbers], spatial)
        if visit:
            visit(numbers, x, features)

    # Add up the shares of all ranks.
    statistics.all_reduce()
    return statistics


def read_statistics(path):
    """Read an .npz file with mu and sigma; return None for any other file.

    Returns a dict: mu (D,), sigma (D, D), mu_s and sigma_s (those of the spatial features, or
    None), n (number of images, or None), features (the name of the network, INCEPTION unless
    stored) and has_images (the file also contains x or arr_0). Raises ValueError; runs no pickled
    code.
    """
    if not path.endswith(".npz") or not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            if not {"mu", "sigma"} <= set(data):
                return None
            mu, sigma = check_gaussian(data["mu"], data["sigma"])
            mu_s, sigma_s = None, None
            if {"mu_s", "sigma_s"} & set(data):
                mu_s, sigma_s = check_gaussian(data["mu_s"], data["sigma_s"], "_s")

            # Published files hold mu and sigma alone, or mu_s and sigma_s, too, as those of ADM
            # (arXiv 2105.05233). Then the features are Inception's.
            return dict(
                mu=mu,
                sigma=sigma,
                mu_s=mu_s,
                sigma_s=sigma_s,
                n=int(data["n"]) if "n" in data else None,
                has_images="arr_0" in data or "x" in data,
                features=str(data["features"]) if "features" in data else INCEPTION,
            )
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"{path}: {one_line(error)}") from error


def write_statistics(path, summary, features):
    """Write a dict as read_statistics returns it, and the name of the features, to an .npz file.

    Raises ValueError.
    """
    arrays = {key: summary[key] for key in ("mu", "sigma", "mu_s", "sigma_s", "n")}
    arrays = {key: value for key, value in arrays.items() if value is not None}
    arrays["features"] = features
    write_file(path, lambda file: np.savez(file, **arrays))


def write_file(path, write):
    """Call write(file), and rename the file to path when it is complete. Raises ValueError."""
    # Write under another name first, so that a full disk never leaves half a file.
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def load_network(features=None, weights=None):
    """Return the feature network, in eval mode.

    features: None for Inception (see load_inception for weights), "package.module:Class" (a class
    without arguments), or an nn.Module. Raises ValueError. All ranks must call it.
    """
    # A module is used as it is; a name is imported.
    if isinstance(features, nn.Module):
        return features.eval()
    if features:
        module, _, name = features.partition(":")
        try:
            return getattr(importlib.import_module(module), name)().eval()
        except Exception as error:  # the imported code can raise anything
            raise ValueError(
                f"cannot load features {features} as package.module:Class ({one_line(error)})"
            ) from error

    # The first rank of a machine may have to download the weights; the others wait for it.
    ranks = dist.is_initialized()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if ranks and not first:
        dist.barrier()
    net = load_inception(weights)
    if ranks and first:
        dist.barrier()
    return net


def distance_name(features):
    """Return FID for INCEPTION, and FD-Class for features package.module:Class.

    With an s in front it is the name of the distance between spatial features.
    """
    return "FID" if features == INCEPTION else f"FD-{features.rpartition(':')[2]}"


class Side(typing.NamedTuple):
    """One side of a comparison. At least one of summary and images is present."""

    path: str  # for messages
    summary: dict | None  # from a file, see read_statistics
    images: ImageReader | None  # None if summary suffices


def open_sides(paths, features=None, needs_images=None):
    """Open paths, or lists of paths. Return a Side for each, and the name of the features.

    features: None, "package.module:Class" or an nn.Module. needs_images: the option that needs the
    images of statistics files, too, or None. Raises FileNotFoundError or ValueError, with the path.
    """
    # mu and sigma in a file win over its images: published statistics are never recomputed.
    paths = [list_paths(part) for part in paths]
    summaries = [read_statistics(part[0]) if len(part) == 1 else None for part in paths]

    # Two statistics files know their own features. Otherwise the default is Inception.
    if isinstance(features, InceptionV3):
        name = INCEPTION
    elif isinstance(features, nn.Module):
        name = f"{type(features).__module__}:{type(features).__qualname__}"
    elif all(summaries) and not features:
        name = summaries[0]["features"]
    else:
        name = features or INCEPTION

    # A distance compares features of one network.
    for part, summary in zip(paths, summaries):
        if summary and summary["features"] != name:
            raise ValueError(
                f"{part[0]} holds statistics of {summary['features']}, not of {name}: "
                "see --features"
            )
        if summary and needs_images and not summary["has_images"]:
            raise ValueError(
                f"{needs_images} needs images, and {part[0]} contains only mu and sigma"
            )

    # Open everything before the slow part, so that a wrong path fails at once.
    sides = []
    for part, summary in zip(paths, summaries):
        images = open_images(part) if needs_images or not summary else None
        sides.append(Side(", ".join(part), summary, images))
    return sides, name


def network_for(sides, features, weights, device):
    """Load the network onto the device; None if all sides are statistics files."""
    if all(side.images is None for side in sides):
        return None
    return load_network(features, weights).to(device)


def side_statistics(side, net, **options):
    """Turn a Side into statistics. options: see measure.

    Returns a dict with mu, sigma, mu_s, sigma_s and n (see read_statistics), and the measured
    Statistics (None without images).
    """
    measured = None if side.images is None else measure(side.images, net, **options)
    if side.summary:
        return side.summary, measured

    # Name the path in the error, because the Statistics do not know it.
    try:
        return measured.summary(), measured
    except ValueError as error:
        raise ValueError(f"{side.path}: {error}") from error


def distances(real, fake):
    """Return the Fréchet distance of two dicts (see read_statistics), and the spatial one.

    The second one is sFID in the features of Inception: see InceptionV3 for what it compares. It is
    None unless both have mu_s and sigma_s.
    """
    distance = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    if real["mu_s"] is None or fake["mu_s"] is None:
        return distance, None
    spatial = frechet_distance(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
    return distance, spatial


def fid(
    real, fake, *, features=None, weights=None, device=None, batch=64, size=None, skip_bad=False
):
    """Return the Fréchet distance between two sets. With the default features it is the FID.

    real, fake: a path or a list of paths, see ImageReader, or an .npz with mu and sigma.
    features: None for Inception, "package.module:Class", or an nn.Module, which is put into eval
        mode and moved to device. See extract for its input and output.
    weights: the file of Inception's weights, see load_inception.
    device: default a GPU if there is one. batch: batch size.
    size: (height, width), the shape to which images are cropped and resized first.
    skip_bad: skip unreadable images and report them on stderr.

    Under torchrun, join a process group with gloo first (see start_ranks), and call it on every
    rank. Each one measures its share; all return the same number. Raises FileNotFoundError or
    ValueError, with the path.
    """
    # Open both sides, and load the network if one of them has images to measure.
    sides, _ = open_sides([real, fake], features)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = network_for(sides, features, weights, device)

    # Summarize each side by the mean and covariance of its features, and compare these Gaussians.
    options = dict(device=device, batch=batch, size=size, skip_bad=skip_bad)
    real, fake = (side_statistics(side, net, **options)[0] for side in sides)
    return frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])


# ------------------------------------------------------------------------------------ the command


def resolution(text):
    """Parse --res: "256" -> (256, 256), "HEIGHTxWIDTH" -> (height, width). Raises ValueError."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError("needs a side length, or HEIGHTxWIDTH, of 1 or more")
    return sides[0], sides[-1]


def parse_options(argv=None):
    """Parse the command line. Raises ValueError or exits with one line that names the option."""
    parser = argparse.ArgumentParser(
        description="FID and sFID of FAKE against REAL, and the Inception Score of FAKE.",
        allow_abbrev=False,
    )

    def stop(message):
        sys.exit(f"fid.py: {message}")

    # Errors are one line, without argparse's usage message.
    parser.error = stop
    add = parser.add_argument
    add("real", help="folder, .zip, .npz or .npy with images, or .npz with mu and sigma")
    add("fake", nargs="?", help="the same; optional with --save-stats")
    add("--save-stats", metavar="NPZ", help="write the statistics of REAL to this file")
    add("--pr", action="store_true", help="also precision and recall, k = 3; keeps all features")
    add(
        "--nearest",
        metavar="PNG",
        help="share of near-copies of REAL in FAKE; writes a grid of samples and their nearest "
        "images of REAL",
    )
    add(
        "--nearest-in",
        choices=["features", "pixels"],
        default="features",
        help="what --nearest compares; pixels need no network (default: features)",
    )
    add("--res", type=resolution, help="crop and resize images to this side, or to HEIGHTxWIDTH")
    add("--weights", metavar="PTH", help=f"{WEIGHTS_FILE}; default: torch.hub's cache")
    add(
        "--features",
        metavar="MODULE:CLASS",
        help="another network: a class without arguments, in a file next to fid.py or on "
        "PYTHONPATH, from uint8 (B, 3, H, W) to features (B, D), or to features and logits",
    )
    add("--batch", type=int, default=64, help="batch size per rank (default: 64)")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--skip-bad", action="store_true", help="report, count and skip unreadable images")
    add("--selftest", action="store_true", help="also print published values for CIFAR-10")
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args):
    """Raise ValueError, with the option's name, for options that do not fit together."""
    if not args.fake and not args.save_stats:
        raise ValueError("pass REAL and FAKE, or REAL and --save-stats")
    if args.features and (args.weights or args.selftest):
        raise ValueError("--weights and --selftest need Inception: drop them, or drop --features")
    if args.batch < 1:
        raise ValueError(f"--batch must be 1 or more, not {args.batch}")
    check_nearest(args)
    if not args.save_stats:
        return

    path = args.save_stats
    if not path.endswith(".npz") or not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"--save-stats {path} must end in .npz, and its folder must exist")
    # Overwrite old statistics, but never a file of images.
    if os.path.exists(path):
        old = read_statistics(path)
        if old is None or old["has_images"]:
            raise ValueError(
                f"--save-stats {path} exists and contains images or something else: "
                "choose another name"
            )


def check_nearest(args):
    """Raise ValueError for options that do not fit to --nearest."""
    if not args.nearest:
        if args.nearest_in != "features":
            raise ValueError(f"--nearest-in {args.nearest_in} needs --nearest")
        return
    if not args.fake:
        raise ValueError("--nearest needs FAKE, whose images it compares with those of REAL")
    if args.nearest_in == "pixels":
        for name in ("features", "weights", "save_stats", "pr", "selftest"):
            if getattr(args, name):
                option = name.replace("_", "-")
                raise ValueError(f"--nearest-in pixels uses no network: drop --{option}")

    # A grid in a folder of images would be one of them for the next command.
    path = os.path.abspath(args.nearest)
    if not path.endswith(".png") or not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"--nearest {args.nearest} must end in .png, and its folder must exist")
    for folder in (args.real, args.fake):
        if os.path.isdir(folder) and path.startswith(os.path.join(os.path.abspath(folder), "")):
            raise ValueError(f"--nearest {args.nearest} is in {folder}: choose another folder")


def start_ranks(device=None):
    """Join the ranks of torchrun. Return the device ("cuda" or "cpu"), the rank, and the world."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if world > 1:
        # Ranks exchange sums, and features with --pr, between CPUs. gloo suffices.
        dist.init_process_group("gloo")
    return device, rank, world


def leave_ranks():
    """Leave the process group of torchrun."""
    dist.destroy_process_group()
    # gloo's threads release their last tensors, for which they need a live Python interpreter.
    time.sleep(0.2)


def count_line(side, n):
    """Return the line that names a side, which of its images count, and their number n."""
    # N is the number of images behind the statistics; files from other tools may not state it.
    if side.summary:
        return f"{side.path}: mu and sigma, N = {side.summary['n'] or 'unknown'}"
    # With --skip-bad, N is smaller than the number of images.
    total = len(side.images)
    if n < total:
        return f"{side.path}: images, N = {n} of {total}, {total - n} unreadable ones skipped"
    return f"{side.path}: all images, N = {n}"


def print_scores(args, name, real, fake, device):
    """Print the distance, the Inception Score, and precision and recall with --pr.

    name: the features' name. real, fake: pairs from side_statistics.
    """
    (real, real_measured), (fake, fake_measured) = real, fake
    distance, spatial = distances(real, fake)
    print(f"{distance_name(name)} {distance:.4f} of {args.fake} against {args.real}")
    if spatial is not None:
        print(f"s{distance_name(name)} {spatial:.4f} of their spatial features")
    if args.selftest:
        print(
            "FID 3.1508 is published for the 10,000 test images of CIFAR-10 "
            "against its 50,000 training images (3.1517 to 3.1525 in PyTorch)"
        )

    # The covariance of few samples is noisy, and this noise adds to the distance. An unknown number
    # of images counts as enough.
    if min(real["n"] or 10_000, fake["n"] or 10_000) < 10_000:
        print(
            "note: Fréchet distances are biased upward under 10,000 images; "
            "compare only runs with equal sample counts"
        )

    # The Inception Score describes the fake images alone, and needs a network with logits.
    if fake_measured is None:
        print(f"no Inception Score: it needs images, and {args.fake} was read as mu and sigma")
    elif score := fake_measured.inception_score():
        title = "Inception Score" if name == INCEPTION else f"IS-{name.rpartition(':')[2]}"
        print(
            f"{title} {score[0]:.4f} +- {score[1]:.4f} of {args.fake}, "
            f"{SPLITS} splits in a fixed random order"
        )
        # The entropy of the mean of few probabilities is too small (arXiv 1911.07023).
        if fake_measured.n < 5_000:
            print("note: this score is biased downward under 5,000 images")

    # Rank 0 holds the features of all ranks.
    if args.pr:
        real_features = torch.cat(real_measured.kept).to(device)
        fake_features = torch.cat(fake_measured.kept).to(device)
        precision, recall = precision_recall(real_features, fake_features)
        print(
            f"precision {precision:.4f}, recall {recall:.4f}, k = 3, "
            f"{len(real_features)} real and {len(fake_features)} fake images"
        )


def print_nearest(args, nearest, real, fake, where):
    """Print the share of near-copies, and write the grid of --nearest.

    nearest: NearestImages of all ranks. real, fake: ImageReaders. where: what was compared.
    """
    ratios = nearest.ratios()
    copies = ratios <= NEAR_COPY
    print(
        f"near-copies {copies.double().mean():.2%}: {copies.sum()} of {len(copies)} samples, "
        f"compared with {nearest.training_count} training images in {where}, also mirrored"
    )
    print(
        "a near-copy: the distance to its nearest training image is at most 1/3 of the mean "
        f"distance to the next {nearest.next_neighbors()}"
    )

    # The samples that are closest to a training image come first, relative to its neighbors.
    rows = []
    marked = []
    for i in ratios.argsort(stable=True)[:GRID_ROWS].tolist():
        sample = nearest.numbers[i].item()
        neighbors = nearest.nearest[i, :GRID_NEIGHBORS].tolist()
        images = [fake.read(sample, args.res)] + [real.read(j, args.res) for j in neighbors]
        rows.append(images)
        marked.append(copies[i].item())
        if marked[-1]:
            name = real.name(neighbors[0])
            print(f"  {fake.name(sample)} is near {name}: ratio {ratios[i]:.3f}")
    grid = neighbor_grid(rows, marked)
    write_file(args.nearest, lambda file: grid.save(file, "PNG"))
    print(
        f"wrote {args.nearest}: the {len(rows)} samples with the smallest ratio, near-copies in "
        f"a red frame, each before its {len(rows[0]) - 1} nearest training images"
    )


def nearest_in_pixels(args, sides, options):
    """Compare the pixels of two sides: the command with --nearest-in pixels."""
    nearest = NearestImages(lambda x: x, options["device"])
    real, fake = sides
    options = options | dict(one_size=False)
    for numbers, x in image_batches(fake.images, **options):
        nearest.add_samples(numbers, x, x)
    nearest.finish_samples()
    for numbers, x in image_batches(real.images, **options):
        nearest.add_training(numbers, x, x)
    nearest.finish()
    if is_first_rank():
        # Statistics in the files are not used: name the images.
        print(count_line(real._replace(summary=None), nearest.training_count))
        print(count_line(fake._replace(summary=None), len(nearest.numbers)))
        print_nearest(args, nearest, real.images, fake.images, "pixels")


def main(argv=None):
    """Run the command. Raises ValueError or OSError for bad input."""
    args = parse_options(argv)
    device, rank, world = start_ranks(args.device)

    # Open everything before the slow part.
    paths = [path for path in (args.real, args.fake) if path]
    needs_images = "--nearest" if args.nearest else "--pr" if args.pr else None
    sides, name = open_sides(paths, args.features, needs_images)
    options = dict(
        device=device,
        batch=args.batch,
        size=args.res,
        skip_bad=args.skip_bad,
        progress=rank == 0,
    )
    if args.nearest_in == "pixels":
        nearest_in_pixels(args, sides, options)
    else:
        measure_and_print(args, sides, name, options)
    if world > 1:
        leave_ranks()


REAL, FAKE = 0, 1  # the two sides of a comparison


def measure_and_print(args, sides, name, options):
    """Measure both sides, save the statistics of REAL, and print the scores of FAKE.

    sides: of REAL, and of FAKE if there is one. name: the features' name. options: see measure.
    """
    # Load the network if one side has images to measure.
    net = network_for(sides, args.features, args.weights, options["device"])

    # --nearest compares each training image with all samples, so it needs FAKE first.
    order = range(len(sides))
    visits = [None, None]  # functions that see every batch of a side
    if args.nearest:
        nearest = NearestImages(lambda x: extract(net, x)[0], options["device"])
        order = [FAKE, REAL]
        visits = [nearest.add_training, nearest.add_samples]

    results = {}
    for i in order:
        results[i] = side_statistics(sides[i], net, keep=args.pr, visit=visits[i], **options)
        summary, _ = results[i]
        if args.nearest and i == FAKE:
            nearest.finish_samples()
        if is_first_rank():
            print(count_line(sides[i], summary["n"]))
            if args.save_stats and i == REAL:
                write_statistics(args.save_stats, summary, name)
                spatial = ", mu_s, sigma_s" if summary["mu_s"] is not None else ""
                print(f"wrote mu, sigma{spatial} and n to {args.save_stats}")
    if args.nearest:
        nearest.finish()

    # Without FAKE, there is nothing to compare.
    if is_first_rank() and args.fake:
        print_scores(args, name, results[REAL], results[FAKE], options["device"])
        if args.nearest:
            real, fake = (side.images for side in sides)
            print_nearest(args, nearest, real, fake, f"features of {name}")


def run():
    """Run main and turn expected errors into one line and an exit code."""
    # File names may contain bytes that are not valid text.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_runtime = isinstance(error, RuntimeError)
        # If one rank stops, gloo fails on the others. The first one reports the reason.
        if is_runtime and "gloo" in str(error):
            sys.exit("fid.py: another rank has stopped")
        # Other runtime errors are bugs and keep their traceback, except for a lack of memory.
        reasons = [line for line in lines if "out of memory" in line or "allocate memory" in line]
        if sys.flags.dev_mode or (is_runtime and not reasons):
            raise
        sys.exit(f"fid.py: {(reasons or lines)[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
