"""The guides of PPAP: what a network says of an image, and how far that is from a target.

A guide is one callable, loss(x, target) -> (B,). Here x is an image or a noisy image z. There are
three tasks: the class of an image, the signed distance of each pixel to the shape (the depth map of
the built-in Shapes), and the mask of the shape (a segmentation into two classes). A loss is minus
log p(target | x) up to a constant, if pixels are independent: it is a sum over pixels.

    python -m related.guides clean.npz five-experts.npz figure.png

The command compares samples of related.ppap for the same maps, a row for each file.
"""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from related.common import fit, reading, some_images
from sample import make_grid, mix_seed, to_float, to_uint8
from support.data import Shapes, load_batch
from support.runtime import run_command, writing

# ---------------------------------------------------------------- networks


def unit(channels, next_channels, stride=2):
    """A convolution, by default to half the resolution, as a list of layers."""
    conv = nn.Conv2d(channels, next_channels, 3, stride, padding=1)
    return [conv, nn.BatchNorm2d(next_channels), nn.ReLU()]


class Classifier(nn.Module):
    """A small classifier to guide with. x: (B, 3, H, W) in [-1, 1]. Returns logits (B, classes)."""

    def __init__(self, num_classes):
        super().__init__()
        # The pooling to 4 x 4 makes the head independent of the resolution.
        self.body = nn.Sequential(
            *unit(3, 32), *unit(32, 64), *unit(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.head = nn.Linear(16 * 128, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


class PixelNet(nn.Module):
    """A small U-shaped network. x: (B, 3, H, W) in [-1, 1]. Returns maps (B, channels, H, W)."""

    def __init__(self, channels):
        super().__init__()
        # Down: the convolutions of the classifier.
        self.down = nn.ModuleList(
            nn.Sequential(*unit(*sizes)) for sizes in ((3, 32), (32, 64), (64, 128))
        )
        # Up to half the resolution: each convolution also reads the features of its resolution.
        self.up = nn.ModuleList(
            nn.Sequential(*unit(*sizes, stride=1)) for sizes in ((128 + 64, 64), (64 + 32, 32))
        )
        # The four pixels below each position.
        self.head = nn.Conv2d(32, 4 * channels, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        features = []
        for down in self.down:
            x = down(x)
            features.append(x)
        x = features.pop()
        for up in self.up:
            skip = features.pop()
            x = F.interpolate(x, size=skip.shape[2:])  # nearest neighbor
            x = up(torch.cat([x, skip], 1))
        # Odd sides are one pixel too long.
        return F.pixel_shuffle(self.head(x), 2)[:, :, :height, :width]


# ---------------------------------------------------------------- losses and scores


def cross_entropy(output, target):
    """The cross-entropy of each image (B,), summed over pixels if there are any.

    output: logits (B, K, ...). target: classes (B, ...) int64, or probabilities (B, K, ...).
    """
    loss = F.cross_entropy(output, target, reduction="none")
    return loss.reshape(len(output), -1).sum(1)


def squared_error(output, target):
    """The squared error of each image (B,), summed over pixels. output: (B, 1, H, W)."""
    return (output[:, 0] - target).square().flatten(1).sum(1)


def is_right(output, target):
    """1 for each image whose largest logit is the target, else 0."""
    return (output.argmax(1) == target).float()


def absolute_error(output, target):
    """The mean absolute error of each image (B,). output: (B, 1, H, W)."""
    return (output[:, 0] - target).abs().flatten(1).mean(1)


def overlap(output, target):
    """Intersection over union of the predicted and the true mask of each image (B,)."""
    found, mask = output.argmax(1).bool(), target.bool()
    both, either = (found & mask).flatten(1).sum(1), (found | mask).flatten(1).sum(1)
    return both / either.clamp(min=1)


# ---------------------------------------------------------------- the three tasks


def sharpened(output, temperature):
    """The teacher's probabilities. A temperature below 1 sharpens them."""
    return (output / temperature).softmax(1)


class Task(NamedTuple):
    """One kind of guide."""

    make: Callable  # number of classes of the run -> network for clean images
    truth: Callable  # (labels (B,), signed distances (B, H, W) or None) -> targets
    loss: Callable  # (output, targets) -> (B,)
    teach: Callable  # (output of the teacher, temperature) -> targets for an expert
    score: Callable  # (output, targets) -> (B,)
    measure: str  # the name of the score
    shade: Callable | None  # targets -> brightness (B, H, W) in [0, 1], to look at


TASKS = {
    "class": Task(
        Classifier, lambda label, _: label, cross_entropy, sharpened, is_right, "accuracy", None
    ),
    "depth": Task(
        lambda classes: PixelNet(1),
        lambda label, distance: distance,
        squared_error,
        lambda output, temperature: output[:, 0],
        absolute_error,
        "mean absolute error of the distance",
        lambda distance: 0.5 - 0.5 * distance.clamp(-1, 1),
    ),
    "segmentation": Task(
        lambda classes: PixelNet(2),
        lambda label, distance: (distance < 0).long(),
        cross_entropy,
        sharpened,
        overlap,
        "IoU",
        lambda mask: mask.float(),
    ),
}


def loss_of(task, net):
    """Return the guide of a network, loss(x, target) -> (B,)."""
    return lambda x, target: task.loss(net(x), target)


def load_examples(task, data, indices):
    """Return the images (B, 3, H, W) uint8 of a dataset at some indices, and their targets."""
    # data: built-in Shapes, unless the task is to find the class.
    images, label = load_batch(data, indices)
    distance = None if task is TASKS["class"] else data.distances(indices)
    return images, task.truth(label, distance)


def held_out(task, config, n, device):
    """Return n images (n, 3, H, W) in [-1, 1] that no guide has seen, and their targets."""
    if task is TASKS["class"]:
        return some_images(config, n, device)
    images, target = load_examples(task, Shapes(config["res"], device, first=2**30), range(n))
    return to_float(images), target


def check_task(option, task, config):
    """Raise ValueError, which names the option, for a task whose truth the dataset lacks."""
    if task != "class" and config["data"]:
        raise ValueError(
            f"{option}: only the built-in Shapes have {task}, the run is on {config['data'][0]}"
        )


# ---------------------------------------------------------------- training

# The learning rate falls linearly to zero, without warmup. No average: the last weights count.
# Gradients are not clipped, and Adam's other settings are PyTorch's defaults.
TRAINING = dict(warmup=0, decay=1.0, ema=0.0, betas=(0.9, 0.999), eps=1e-8, clip=None)


def trained_net(task, data, num_classes, device, steps=400, batch=128, seed=0):
    """Train the network of a task on clean images and their targets. Returns it in eval mode."""
    torch.manual_seed(mix_seed(seed, 0))
    net = task.make(num_classes).to(device).train()

    def gradients(step):
        # A random batch of clean images: this network never sees noise.
        indices = torch.randint(len(data), (batch,)).tolist()
        images, target = load_examples(task, data, indices)
        output = net(to_float(images.to(device)))
        loss = task.loss(output, target.to(device)).mean()
        loss.backward()
        return loss.detach()

    return fit(net, gradients, steps=steps, lr=2e-3, **TRAINING)


# ---------------------------------------------------------------- a figure


def comparison(paths, columns=10, scale=2):
    """Compare samples for maps: a row of maps, and a row for each file. Returns a PIL image.

    paths: .npz files of related.ppap for depth or segmentation. A row has the name of its file. A
    file with other maps than the one before it begins a new row of maps.
    """
    rows, last = [], None
    for path in paths:
        with reading(path, "related.ppap"), np.load(path) as file:
            images, target = file["arr_0"][:columns], torch.tensor(file["y"][:columns])
        if target.ndim != 3:
            raise ValueError(f"{path} has no maps: use samples of --task depth or segmentation")
        if last is None or not torch.equal(target, last):
            # Distances are real numbers, masks are integers.
            task, name = "segmentation", "target mask"
            if target.is_floating_point():
                task, name = "depth", "target depth"
            maps = to_uint8(2 * TASKS[task].shade(target) - 1)
            rows.append((name, maps[..., None].expand(-1, -1, -1, 3).numpy()))
            last = target
        rows.append((os.path.basename(path).removesuffix(".npz").replace("-", " "), images))

    # The names of the rows are on the left.
    grids = [make_grid(images, columns) for _, images in rows]
    left, width, height = 104, scale * grids[0].width, scale * grids[0].height
    figure = Image.new("RGB", (left + width, len(rows) * (height + 4) - 4), "white")
    draw = ImageDraw.Draw(figure)
    for i, ((name, _), grid) in enumerate(zip(rows, grids)):
        top = i * (height + 4)
        draw.text((4, top + height // 2 - 8), name, "black", ImageFont.load_default(14))
        figure.paste(grid.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return figure


def main(argv=None):
    *paths, out = (sys.argv[1:] if argv is None else argv) or [""]
    if not paths or not out.endswith(".png"):
        raise ValueError("use: python -m related.guides SAMPLES.npz ... FIGURE.png")
    figure = comparison(paths)
    with writing(out) as file:
        figure.save(file, "PNG", optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
