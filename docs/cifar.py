"""CIFAR-10 for the experiments: convert it, and judge samples by a classifier of it.

    python -m docs.cifar cifar-10-batches-bin/      # writes cifar10_train.npz, cifar10_test.npz
    python fid.py cifar10_test.npz samples.npz --features docs.cifar:ResNet56

The binary version is cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html. The
classifier is the ResNet-56 of https://github.com/akamaster/pytorch_resnet_cifar10 (BSD license):
put its file resnet56-4bfd9763.th into the folder in which the command runs. Distances in its
features are called FD-ResNet56. They are not FID, and only comparable with each other.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.runtime import run_command, writing

WEIGHTS = "resnet56-4bfd9763.th"
FILES = {
    "cifar10_train.npz": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "cifar10_test.npz": ["test_batch.bin"],
}


def read_batch(path):
    """Return the images (N, 32, 32, 3) uint8 and labels (N,) of a file of the binary version.

    Raises ValueError for a file of another format.
    """
    content = np.fromfile(path, dtype=np.uint8)
    # A record is the label, then the red, the green and the blue plane.
    size = 1 + 3 * 32 * 32
    if len(content) == 0 or len(content) % size:
        raise ValueError(f"{path} is not a file of CIFAR-10's binary version: records of {size}")
    records = content.reshape(-1, size)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ValueError(f"{path} is not a file of CIFAR-10's binary version: label {labels.max()}")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, labels


def convert(folder, out="."):
    """Write FILES, as train.py reads them, from the binary version of CIFAR-10 in a folder.

    Raises FileNotFoundError for a missing file, and ValueError for one of another format.
    """
    # The names of the classes, one a line, in the order of their labels.
    with open(os.path.join(folder, "batches.meta.txt")) as file:
        classes = file.read().split()
    for name, parts in FILES.items():
        batches = [read_batch(os.path.join(folder, part)) for part in parts]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        path = os.path.join(out, name)
        with writing(path) as file:
            np.savez(file, x=images, y=labels, classes=np.array(classes))
        print(f"wrote {len(images)} images to {path}")


class ResNet56(nn.Module):
    """The 64 features of a CIFAR-10 classifier (arXiv 1512.03385, shortcuts A), from WEIGHTS.

    Call: uint8 images (B, 3, 32, 32) -> features (B, 64) and logits (B, 10), as fid.py expects.
    Raises FileNotFoundError without the weights.
    """

    def __init__(self, path=WEIGHTS):
        super().__init__()
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: docs/cifar.py says where to find it")
        # The weights were saved from DataParallel, which puts "module." before each name. Buffers
        # follow the module to a GPU. Their names have no dots.
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name, value in state.items():
            self.register_buffer(name.removeprefix("module.").replace(".", "_"), value)
        # The mean and standard deviation of ImageNet's colors, with which it was trained.
        colors = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("colors", colors[:, :, None, None])

    def conv(self, x, prefix, number, stride=1):
        """3 x 3 convolution and batch norm: (B, C, H, W) -> (B, C', H / stride, W / stride)."""
        x = F.conv2d(x, getattr(self, f"{prefix}conv{number}_weight"), None, stride, 1)
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *[getattr(self, f"{prefix}bn{number}_{key}") for key in keys])

    def block(self, x, prefix, stride):
        """A residual block. With stride 2 it halves the grid and doubles the channels."""
        shortcut = x
        if stride == 2:
            # Every second pixel, and zeros for the new channels.
            half = x.shape[1] // 2
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        x = self.conv(x, prefix, 1, stride).relu()
        return (self.conv(x, prefix, 2) + shortcut).relu()

    def forward(self, images):
        mean, std = self.colors
        x = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        x = self.conv(x, "", 1).relu()

        # Three groups of nine blocks, at 32, 16 and 8 px.
        for layer in (1, 2, 3):
            for block in range(9):
                stride = 2 if layer > 1 and block == 0 else 1
                x = self.block(x, f"layer{layer}_{block}_", stride)
        features = x.mean((2, 3))
        return features, F.linear(features, self.linear_weight, self.linear_bias)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.cifar", description="Convert CIFAR-10 to .npz.")
    parser.error = lambda message: sys.exit(f"docs.cifar: {message}")
    parser.add_argument("folder", help="the folder cifar-10-batches-bin of the binary version")
    parser.add_argument("--out", default=".", help="where to write the .npz files")
    args = parser.parse_args(argv)
    convert(args.folder, args.out)


if __name__ == "__main__":
    run_command(main)
