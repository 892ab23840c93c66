"""The held-out loss: images that a run never trains on, and its loss on them.

    python train.py --data photos/ --val 0.02      # hold out about 2 % of the images
    python train.py --data train/ --val test/      # other images, in any format of --data

A loss on the training images falls also while a network memorizes them. The held-out loss rises
then. It is measured on the same images with the same noise each time, so two values differ only by
the weights.

The sections: which images are held out; opening them; the loss; bits per dimension.
"""

import contextlib
import copy
import dataclasses
import math
import os
import pathlib
import zlib

import numpy as np
import torch
import torch.distributed as dist

from fid import read_ahead
from loss import elbo_bpd
from sample import mix_seed, to_float
from support.checkpoint import sample_size
from support.data import ImageData, decoding_workers, example_noise, load_batch, open_dataset
from support.runtime import LossLog, in_bf16
from support.settings import share_of
from support.sources import expand, split_keys
from support.text import open_captioned_dataset

# ---------------------------------------------------------------- which images are held out


def image_hashes(dataset):
    """Return a hash of each image's name or row, uint32 (N,), evenly distributed.

    Images that are not read from files have their index in the dataset.
    """
    if hasattr(dataset, "reader"):  # see support/sources.py
        h = dataset.reader.numbers()
    else:
        h = np.arange(len(dataset), dtype=np.uint32)
    # The integer hash of Shapes, "lowbias32" (C. Wellons). It would leave 0 as it is.
    h += 0x9E3779B9
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h ^= h >> shift
        h *= factor
    return h


def split(hashes, share):
    """Split images by their hashes (N,).

    The split depends neither on the seed nor on the ranks. A larger share holds out the same images
    and more. Returns two sorted arrays of indices: the images to train on, and those held out.
    Raises ValueError if one of them is empty.
    """
    is_held_out = hashes < share * 2**32
    kept, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if not len(held_out) or not len(kept):
        found = "all" if len(held_out) else "none"
        raise ValueError(
            f"--val {share:g} holds out {found} of the {len(hashes)} images: use another share, "
            "or name other images"
        )
    return kept, held_out


def split_checksum(dataset):
    """Return a checksum of the hashes, which decide what a share of the dataset holds out."""
    return f"{zlib.crc32(image_hashes(dataset).tobytes()):08x}"


class Part:
    """The images of a dataset at these sorted indices: all that a DataLoader needs."""

    def __init__(self, dataset, indices):
        self.dataset = restrict(dataset, indices)
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, indices):
        """Return a batch as the dataset does."""
        return self.dataset.__getitems__(self.indices[indices].tolist())


def restrict(dataset, indices):
    """Return the dataset, with unreadable images replaced only by those at these indices."""
    dataset = copy.copy(dataset)
    dataset.substitutes = indices
    return dataset


def training_part(config, dataset):
    """Return the images of a dataset that a run with these settings trains on.

    Those that its --val holds out as a share are missing. Other code that trains on the images of a
    run needs this, so that the run's held-out images stay unseen.
    """
    share = share_of(config["val"])
    return dataset if share is None else Part(dataset, split(image_hashes(dataset), share)[0])


# ---------------------------------------------------------------- opening them


@dataclasses.dataclass
class HeldOut:
    """The held-out images of a run.

    Image k below is number k of the images that are measured.
    """

    dataset: object  # contains the held-out images
    indices: np.ndarray  # (n,) in dataset, of the measured images, in the order of their hashes
    count: int  # number of all held-out images
    training_set: object  # the images to train on
    class_numbers: torch.Tensor = None  # maps labels of dataset to training labels; None if equal

    def __str__(self):
        return f"held out: {self.count:,} images; the loss of {len(self.indices):,} of them"

    def load(self, numbers):
        """Return images k (B, C, H, W) for these numbers k, and their labels as in training."""
        images, labels = load_batch(self.dataset, self.indices[numbers].tolist())
        return images, labels if self.class_numbers is None else self.class_numbers[labels]


def open_held_out(config, dataset, device, import_classes, folder):
    """Open the images that --val names or holds out. Returns a HeldOut, or None without --val.

    config: the settings of the run. dataset: the training data. import_classes, folder: see
    open_dataset. Raises ValueError and OSError, in one line.
    """
    if not config["val"]:
        return None
    share = share_of(config["val"])
    if share is None:
        images, training_set = open_images(config, dataset, device, import_classes, folder), dataset
        hashes, held_out = image_hashes(images), np.arange(len(images))
        class_numbers = match_classes(images.classes, dataset.classes, config["val"][0])
    else:
        hashes, class_numbers = image_hashes(dataset), None
        kept, held_out = split(hashes, share)
        images, training_set = restrict(dataset, held_out), Part(dataset, kept)

    # Sorted by their hashes, the images are in an order that is random, but always the same.
    order = np.argsort(hashes[held_out], kind="stable")[: config["val_images"]]
    return HeldOut(images, held_out[order], len(held_out), training_set, class_numbers)


def open_images(config, dataset, device, import_classes, folder):
    """Open the images in the paths of --val. Raises ValueError if they do not suit the run."""
    name = f"--val {config['val'][0]}"
    check_overlap(config["val"], config["data"])
    settings = config | dict(data=config["val"])
    if config["captions"] is None:
        images = open_dataset(settings, device, import_classes, folder, "--val")
    elif config["captions"] or config["text_encoder"].endswith(".npy"):
        # A list of captions or of embeddings belongs to the training images.
        raise ValueError(
            f"{name}: --captions FILE and --text-encoder FILE.npy describe the training images "
            "only: hold out a share of them, such as --val 0.02"
        )
    else:
        images = open_captioned_dataset(settings, device, folder)

    # Latents and captions have to be like those of the training data.
    found, needed = (dict(portrait=False) | part.net_fields for part in (images, dataset))
    if found != needed:
        raise ValueError(
            f"{name}: the training data have other latents, images or captions "
            f"({dataset.net_fields or 'images'}, not {images.net_fields or 'images'})"
        )
    return images


def check_overlap(val, data):
    """Raise ValueError if a path of --val is a path of --data, or is inside of one, or contains it.

    Copies of files and hard links are not noticed.
    """
    held_out, trained = places(val), places(data)
    for place in held_out:
        if {place, *map(str, pathlib.PurePath(place).parents)} & trained:
            raise ValueError(f"--val {place}: --data contains images of it, too")
    for place in trained:
        for parent in map(str, pathlib.PurePath(place).parents):
            if parent in held_out:
                raise ValueError(f"--val {parent}: --data contains images of it, too")


def places(paths):
    """Return the set of real paths of all files and folders that paths stand for.

    An array is a place inside of its .npz file: other arrays may hold other images.
    """
    found = set()
    for path in expand(paths)[0]:
        file, keys = split_keys(path)
        place = os.path.realpath(file)
        if file.endswith(".npz"):
            # Without keys, the images are x or arr_0.
            key = keys[0] if keys else "x"
            place = os.path.join(place, "x" if key == "arr_0" else key)
        found.add(place)
    return found


def match_classes(found, classes, path):
    """Return the number in `classes` of each class in `found`, (len(found),); None if all agree.

    The names of classes decide. Raises ValueError, with the name, for an unknown class.
    """
    if found == classes:
        return None
    # Training without labels ignores these.
    if not classes:
        return torch.zeros(len(found), dtype=torch.int64)
    if not found:
        raise ValueError(
            f"--val {path}: the images have no labels, and those of the training data have"
        )
    for name in found:
        if name not in classes:
            known = ", ".join(classes[:20])
            raise ValueError(f"--val {path}: the training data have no class {name}, only {known}")
    return torch.tensor([classes.index(name) for name in found])


# ---------------------------------------------------------------- the loss

GOLDEN_RATIO = (5**0.5 - 1) / 2


def fixed_times(numbers):
    """Return the time t of each held-out image k, float32 (B,) in [0, 1].

    Multiples of the golden ratio, modulo 1: evenly spread for the first n images, for every n, and
    independent of what they show, because their order is random.
    """
    return torch.tensor([(k + 0.5) * GOLDEN_RATIO % 1 for k in numbers.tolist()])


@contextlib.contextmanager
def evaluation(net):
    """Switch dropout off and compute no gradients. Afterwards every module is as it was."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        # FSDP compiles units of the network for training. They are not compiled once more.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def rounds(run, size):
    """Yield this rank's batches of held-out images: (numbers k, how many count, x, labels).

    size: images per batch. Every rank yields equally many batches, all of this size, because
    sharded networks need that. The last batches are filled up with the first images, which do not
    count again.
    """
    held_out, n = run.held_out, len(run.held_out.indices)
    starts = range(run.rank * size, n + run.rank * size, run.world * size)
    jobs = [np.arange(start, start + size) % n for start in starts]
    # Images are decoded in threads. A user's dataset class may not be thread-safe.
    if isinstance(held_out.dataset, ImageData):
        batches = read_ahead(held_out.load, jobs, max(1, decoding_workers()))
    else:
        batches = map(held_out.load, jobs)
    for start, numbers, (images, labels) in zip(starts, jobs, batches):
        x = to_float(images.to(run.device, non_blocking=True))
        yield numbers, min(size, max(0, n - start)), x, labels.to(run.device, non_blocking=True)


def measure_losses(run, interrupted):
    """Return the LossLogs of the network and of its EMA weights, and a signal that interrupted.

    interrupted: see log_held_out. Labels are not dropped, and images are not flipped.
    """
    nets = [in_bf16(net, run.config["bf16"]) for net in (run.net, run.ema_net)]
    logs = [LossLog(run.device) for _ in nets]
    # Small numbers of images are spread over the ranks.
    size = min(run.micro_batch, math.ceil(len(run.held_out.indices) / run.world))
    with evaluation(run.net):
        for numbers, count, x, labels in rounds(run, size):
            # The noise of image k depends on k alone, also not on the seed of the run.
            t = fixed_times(numbers).to(run.device, non_blocking=True)
            _, eps = example_noise(0, 0, numbers.tolist(), x.shape[1:], run.device)
            for net, log in zip(nets, logs):
                loss, logsnr = run.loss_fn(net, x, run.schedule, labels, t=t, eps=eps)
                log.add(run.step, loss[:count], logsnr[:count])
            # A signal does not wait for all images.
            if stop := interrupted():
                return logs, stop
    return logs, 0


def log_held_out(run, interrupted):
    """Measure the held-out loss, at the end also bits/dim, and log it. Returns a signal, or 0.

    run: see train.Run. interrupted: a function that returns a signal that came meanwhile, or 0.
    Every rank calls it equally often. After a signal nothing is logged.
    """
    (log, ema_log), stop = measure_losses(run, interrupted)
    if stop:
        return stop
    # The ranks add their sums. Reading them waits for the GPU.
    raw, ema = log.read(), ema_log.read()
    line = dict(step=run.step, images=run.images)
    line |= dict(val_loss=raw["loss"], val_loss_ema=ema["loss"])
    line["val_loss_by_logsnr"] = raw["loss_by_logsnr"]
    line["val_loss_ema_by_logsnr"] = ema["loss_by_logsnr"]
    line["val_images"] = len(run.held_out.indices)

    # Bits per dimension take longer, and exist for images with 256 levels only.
    last = run.step >= run.config["steps"]
    _, latents = sample_size(run.config)
    bits = ""
    if last and not latents:
        line["val_bpd"], stop = measure_bits(run, interrupted)
        if stop:
            return stop
        bits = f", {line['val_bpd']:.3f} bits/dim"

    run.write(line)
    if run.rank == 0:
        print(
            f"step {run.step}/{run.config['steps']}  held-out loss {line['val_loss']:.4f}, "
            f"of the EMA weights {line['val_loss_ema']:.4f}{bits} ({line['val_images']:,} images)",
            flush=True,
        )
    return 0


# ---------------------------------------------------------------- bits per dimension

GROUP = 16  # images per call of elbo_bpd: the noise depends on it, so it is the same for all runs
DRAWS = 4  # noise levels per image


def measure_bits(run, interrupted):
    """Return the bits per dimension of the EMA weights, and a signal that interrupted, or 0."""

    # As docs/judge.py does, up to logsnr 10: the bound holds for any upper limit. Near 10 it is
    # tight for networks that do not resolve all 256 levels.
    def schedule(t):
        return run.schedule(t).clamp(max=10.0)

    net = in_bf16(run.ema_net, run.config["bf16"])
    sums = torch.zeros(2, device=run.device)  # (2,): the sum of bits/dim, and the number of images
    for numbers, count, x, labels in rounds(run, GROUP):
        # The noise of a group follows from its first image, and from the layout in memory. Training
        # seeds the generator again before each micro-batch.
        torch.manual_seed(mix_seed(0, int(numbers[0])))
        bits = elbo_bpd(net, x.contiguous(), schedule, labels, draws=DRAWS)
        sums[0] += bits[:count].sum()
        sums[1] += count
        if stop := interrupted():
            return None, stop
    if run.world > 1:
        dist.all_reduce(sums)
    total, n = sums.tolist()
    return total / n, 0
