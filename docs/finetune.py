"""Fine-tune a model of ten shapes to three new ones, and compare with training from scratch.

    python train.py --data docs.finetune:NewShapes --out runs/scratch
    python train.py --data docs.finetune:NewShapes --out runs/new --init assets/shapes32.pt
    python -m docs.finetune runs/scratch runs/new      # the share of samples that show their class

NewShapes draws the three classes. A classifier of all thirteen shapes judges the samples: a sample
that still shows one of the old shapes is wrong.
"""

import argparse
import math
import sys

import torch
import torch.nn as nn

from docs.judge import Judge, fit_judge, share_right
from docs.samplers import draw
from support.checkpoint import load
from support.data import Shapes, load_batch
from support.runtime import run_command


class NewShapes(Shapes):
    """Three shapes that Shapes does not have, with the same backgrounds, colors and textures."""

    classes = ["lens", "flower", "hourglass"]

    @staticmethod
    def _distances(x, y):
        """Return signed distances, negative inside, to all shapes: (B, H, W) -> (B, 3, H, W)."""
        ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)

        # The intersection of two disks.
        lens = torch.hypot(ax + 0.7, y) - 1.15

        # A circle whose radius has five waves. The factor keeps the slope of the distance near 1.
        flower = 0.7 * (r - 0.65 - 0.22 * torch.cos(5 * torch.atan2(x, y)))

        # Two triangles that meet in the middle, cut at the top and the bottom.
        sides = (ax - 0.8 * ay - 0.06) / math.hypot(1, 0.8)
        hourglass = torch.maximum(sides, ay - 0.8)
        return torch.stack([lens, flower, hourglass], 1)


def thirteen_shapes(n, first):
    """Return images (n, 3, 32, 32) uint8, and their labels (n,): 0 to 9 old shapes, 10 to 12 new.

    n: a multiple of 13. first: a round is one image of each class; skip this number of them.
    """
    # The class of an image is its number modulo the number of classes.
    rounds = range(first, first + n // 13)
    old = load_batch(Shapes(32), [10 * k + i for k in rounds for i in range(10)])
    new = load_batch(NewShapes(32), [3 * k + i for k in rounds for i in range(3)])
    return torch.cat([old[0], new[0]]), torch.cat([old[1], 10 + new[1]])


def train_judge_of_thirteen(steps=300):
    """Return a classifier of thirteen shapes, and its accuracy on held-out ones, from 0 to 1."""
    torch.manual_seed(0)
    # The judge of docs/judge.py, with three more outputs.
    judge = Judge(trained=False)
    judge.head = nn.Linear(judge.head.in_features, 13)
    batches = (thirteen_shapes(65, first=5 * step) for step in range(steps))
    fit_judge(judge, batches, steps)
    judge.eval().requires_grad_(False)
    # Training used the rounds below 5 * steps = 1,500.
    return judge, share_right(judge, *thirteen_shapes(1300, first=10_000))


def class_shown(judge, run, n, guidance):
    """Return the share of n samples of a run, see load, that show their class, from 0 to 1."""
    labels = torch.arange(n) % len(NewShapes.classes)
    images = draw(run, labels, steps=32, sampler="dpmpp", guidance=guidance)
    # The new classes follow the ten old ones.
    return share_right(judge, images, 10 + labels)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.finetune", description="Judge runs on NewShapes.")
    parser.error = lambda message: sys.exit(f"docs.finetune: {message}")
    parser.add_argument("runs", nargs="+", help="runs on --data docs.finetune:NewShapes")
    parser.add_argument("--n", type=int, default=300, help="samples of each run (default 300)")
    args = parser.parse_args(argv)
    judge, accuracy = train_judge_of_thirteen()
    print(f"the judge classifies {100 * accuracy:.1f} % of 1,300 held-out images correctly")
    for path in args.runs:
        run = load(path)
        if run[1]["classes"] != NewShapes.classes:
            raise ValueError(f"{path} was not trained on --data docs.finetune:NewShapes")
        shares = [100 * class_shown(judge, run, args.n, guidance) for guidance in (1.0, 2.0)]
        print(f"{path}: class shown {shares[0]:.1f} %, at guidance 2 {shares[1]:.1f} %", flush=True)


if __name__ == "__main__":
    run_command(main)
