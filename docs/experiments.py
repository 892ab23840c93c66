"""Repeat the experiments of experiments.md: one command per finding.

    python -m docs.experiments                   # lists the findings, with their time
    python -m docs.experiments schedule          # trains, samples, measures, prints the table
    python -m docs.experiments schedule --seed 0 # only this seed: run the other one beside it
    python -m docs.experiments schedule --quick  # the same with two steps: does everything run?
    python -m docs.experiments blocks --data cifar10_train.npz cifar10_test.npz  # see docs/cifar.py

A finding compares arms: trainings that differ in one setting. Every training and sampling is a
command that you can run yourself, and is printed. Runs are kept in runs/experiments/. A run that
has ended is not trained again, and an interrupted one is resumed.
"""

import argparse
import json
import os
import shlex
import sys
import time
import typing
from unittest import mock

import numpy as np
import torch

import fid
import sample
import train
from docs.cifar import ResNet56
from docs.colors import color_variances
from docs.judge import (
    ERROR_LEVELS,
    OTHERS,
    Judge,
    Pooled,
    judge_samples,
    judge_texts,
    measure_run,
    train_judge,
    train_text_judge,
)
from support.runtime import run_command, writing

FOLDER = "runs/experiments"

# ---------------------------------------------------------------- the findings


class Finding(typing.NamedTuple):
    """One experiment: arms that are trained, sampled and measured alike."""

    question: str
    time: str  # of all arms and seeds, on one core; "~": estimated
    train: str  # options of train.py for all arms
    arms: dict  # name of an arm: its own options
    sample: str  # options of sample.py for all arms
    measure: str  # "shapes", "cifar", "few" or "texts"
    seeds: tuple = (0, 1)
    guidance: tuple = (1.0,)
    images: int = 0  # train on the first images only; 0: on all


# Most runs see 40,000 images of Shapes, or 32,000 of CIFAR-10.
SHAPES_64 = "--res 64 --size tiny --batch 16 --steps 2500"
SHAPES_128 = "--res 128 --size tiny --batch 16 --steps 2500"
CIFAR = "--res 32 --size tiny --model unet --batch 16"
DPM_32 = "--number 500 --sampler dpmpp --steps 32"
CIFAR_DPM_32 = "--number 1000 --sampler dpmpp --steps 32"


def model_args(**fields):
    """Return the option of train.py that gives the network these arguments, without spaces."""
    return "--model-args " + json.dumps(fields, separators=(",", ":"))


# The texts were measured with the network of an earlier recipe.
EARLIER_NET = model_args(
    base_channels=32,
    channel_multiplier=[1, 4],
    num_res_blocks=[2],
    num_transformer_blocks=4,
    patching="dwt_1",
)
# Without down-sampling, one more level on top of the recipe's.
NO_PATCHING = model_args(
    patching="none", base_channels=16, channel_multiplier=[1, 2, 4, 8], num_res_blocks=[1, 2, 2]
)
DROPOUT = Finding(
    "Does dropout on the small feature maps help, with 1,000 images?",
    "30 min",
    CIFAR + " --steps 3000",
    {
        "none": "",
        "from 16 on": model_args(dropout=0.1, dropout_from_resolution=16),
    },
    CIFAR_DPM_32,
    "cifar",
    seeds=(0,),
    images=1000,
)
# A U-Net without down-sampling of the input: its feature maps have 32, 16 and 8 pixels.
UNET_32 = dict(
    patching="none", base_channels=16, channel_multiplier=[1, 2, 4], num_res_blocks=[1, 2, 2]
)

FINDINGS = {
    "first": Finding(
        "What does the first command of the README reach?",
        "25 min",
        "--res 32 --size tiny",
        {"shapes-32": ""},
        "--number 1024 --sampler dpmpp --steps 64",
        "shapes",
        seeds=(0,),
        guidance=(1.0, 1.5, 2.0),
    ),
    "schedule": Finding(
        "Is a shifted schedule better than cosine at 64 px?",
        "1 h 20 min",
        SHAPES_64,
        {
            "cosine": "--schedule cosine",
            "shifted:32": "--schedule shifted:32",
            "shifted:16": "--schedule shifted:16",
        },
        DPM_32,
        "shapes",
    ),
    "schedule-128": Finding(
        "And at 128 px?",
        "2 h",
        SHAPES_128,
        {
            "cosine": "--schedule cosine",
            "shifted:64": "--schedule shifted:64",
            "shifted:32": "--schedule shifted:32",
        },
        DPM_32,
        "shapes",
    ),
    "downsampling": Finding(
        "What does down-sampling of the input cost?",
        "1 h 30 min",
        SHAPES_64 + " --schedule shifted:32",
        {
            "none": NO_PATCHING,
            "dwt_1": model_args(patching="dwt_1"),
            "conv_2": model_args(patching="conv_2"),
        },
        DPM_32,
        "shapes",
    ),
    "multiscale": Finding(
        "Does the multiscale loss help?",
        "1 h",
        SHAPES_64 + " --schedule shifted:32",
        {"off": "--no-multiscale", "on": "--multiscale"},
        DPM_32,
        "shapes",
    ),
    "guidance": Finding(
        "Does the interpolated schedule tolerate more guidance?",
        "1 h 10 min",
        SHAPES_64,
        {
            "shifted:16": "--schedule shifted:16",
            "interpolated:16:64": "--schedule interpolated:16:64",
        },
        DPM_32,
        "shapes",
        guidance=(1.0, 1.5, 2.0, 3.0),
    ),
    "colors": Finding(
        "What makes the colors of samples vary more?",
        "~4 h",
        "--res 32 --size tiny",
        {
            "recipe": "",
            "EMA 0.99": "--ema 0.99",
            "EMA 0.9995": "--ema 0.9995",
            "multiscale": "--multiscale",
            "four times longer": "--steps 10400",
            "four times longer, multiscale": "--steps 10400 --multiscale",
        },
        DPM_32,
        "shapes",
    ),
    "blocks": Finding(
        "Do more blocks at 16 x 16 help?",
        "1 h",
        CIFAR + " --steps 2000",
        {
            "1+2": model_args(num_res_blocks=[1, 3]),
            "2+3": model_args(num_res_blocks=[2, 3]),
            "4+5": model_args(num_res_blocks=[4, 3]),
            "8+9": model_args(num_res_blocks=[8, 3]),
        },
        CIFAR_DPM_32,
        "cifar",
        seeds=(0,),
    ),
    # Six more blocks on each path cost the same at 32 x 32 as at 16 x 16: half the channels, four
    # times the pixels.
    "blocks-large": Finding(
        "Are more blocks at 32 x 32 worse?",
        "~2 h",
        CIFAR + " --steps 2000",
        {
            "1+2+2": model_args(**UNET_32),
            "7+2+2": model_args(**UNET_32 | dict(num_res_blocks=[7, 2, 2])),
            "1+8+2": model_args(**UNET_32 | dict(num_res_blocks=[1, 8, 2])),
        },
        CIFAR_DPM_32,
        "cifar",
    ),
    "dropout": DROPOUT,
    "dropout-200": DROPOUT._replace(
        question="And with 200 images?",
        time="20 min",
        train=CIFAR + " --steps 2000",
        images=200,
    ),
    "dropout-50": Finding(
        "Where does dropout help a network that memorizes 50 images?",
        "4 h",
        CIFAR + " --steps 2000 --val-every 100 --val-images 500",
        {
            "none": model_args(**UNET_32),
            "from 32 on": model_args(**UNET_32, dropout=0.1, dropout_from_resolution=32),
            "from 16 on": model_args(**UNET_32, dropout=0.1, dropout_from_resolution=16),
            "from 8 on": model_args(**UNET_32, dropout=0.1, dropout_from_resolution=8),
        },
        CIFAR_DPM_32,
        "few",
        images=50,
    ),
    "texts": Finding(
        "Does text to image learn new combinations?",
        "30 min",
        "--res 32 --captions --size tiny --schedule shifted:16 --batch 32 --steps 5800",
        {"shapes-text": "--sample-every 5800 " + EARLIER_NET},
        "",
        "texts",
        seeds=(0,),
    ),
}

# Options that shorten a command to seconds. The last value of an option counts.
QUICK_TRAIN = "--batch 2 --steps 2 --log-every 1 --sample-every 9"
QUICK_SAMPLE = "--number 10 --steps 1"
QUICK_IMAGES = 10  # to measure on

# ---------------------------------------------------------------- commands and distances


def run(module, options):
    """Print and run a command of the project in this process."""
    line = " ".join(shlex.quote(option) for option in options)
    print(f"\n$ python {module.__name__}.py {line}", flush=True)
    module.main(options)


def statistics_of(network, path):
    """Return the fid.Statistics of the images in an .npz, with all features."""
    return fid.measure(fid.ImageReader([path]), network, keep=True)


def first_images(path, n, name):
    """Write the first n images of an .npz to a file of this name. Returns its path."""
    out = f"{FOLDER}/{name}-{n}.npz"
    with np.load(path) as data:
        arrays = {key: data[key][:n] if key in ("x", "y") else data[key] for key in data}
    with writing(out, shared=True) as file:
        np.savez(file, **arrays)
    return out


# ---------------------------------------------------------------- measurements
# A class for each kind of data. data: the paths of training and test images, or [] for built-in
# data. quick: measure on few images. train_options: options for all trainings.


class MeasureShapes:
    """Measures runs on the built-in Shapes, with the judge."""

    def __init__(self, data, quick):
        if not os.path.exists(OTHERS):
            train_judge()
        self.n_images = QUICK_IMAGES if quick else 1000
        self.bits = {}  # per run: they do not depend on guidance
        others = first_images(OTHERS, QUICK_IMAGES, "others") if quick else OTHERS
        self.networks = {"FD-Judge": Judge(), "FD-Pooled": Pooled()}
        self.real = {name: statistics_of(net, others) for name, net in self.networks.items()}
        with np.load(others) as file:
            self.colors = color_variances(torch.from_numpy(file["x"]).permute(0, 3, 1, 2))
        self.train_options = []

    def measure(self, folder, samples):
        """Return {column: text} for a run and samples of it."""
        row = {"class shown": f"{100 * judge_samples(samples):.1f} %"}
        for name, network in self.networks.items():
            real, fake = self.real[name], statistics_of(network, samples)
            distance = fid.frechet_distance(*real.gaussian(), *fake.gaussian())
            row[name] = f"{distance:.1f}"
            if name == "FD-Judge":
                _, recall = fid.precision_recall(torch.cat(real.kept), torch.cat(fake.kept))
                row["recall"] = f"{recall:.2f}"
        # Variances of colors, as shares of those of real images: see docs/colors.py.
        with np.load(samples) as file:
            variances = color_variances(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))
        for name, fake, real in zip(("mean color", "layout"), variances, self.colors):
            row[name] = f"{fake / real:.2f}"
        if folder not in self.bits:
            self.bits[folder], _ = measure_run(folder, "shapes", self.n_images)
        row["bits/dim"] = f"{self.bits[folder]:.2f}"
        return row


class MeasureCifar:
    """Measures runs on CIFAR-10, with ResNet-56."""

    def __init__(self, data, quick):
        self.network = ResNet56()
        self.paths = dict(zip(("training", "test"), data))
        self.real = {name: statistics_of(self.network, path) for name, path in self.paths.items()}
        self.train_options = ["--data", data[0]]

    def measure(self, folder, samples):
        """Return {column: text} for a run and samples of it."""
        fake = statistics_of(self.network, samples)
        row = {}
        for name, path in self.paths.items():
            distance = fid.frechet_distance(*self.real[name].gaussian(), *fake.gaussian())
            row[f"FD-ResNet56, {name}"] = f"{distance:.1f}"
            bits, _ = measure_run(folder, path)
            row[f"bits/dim, {name}"] = f"{bits:.2f}"
        return row


class MeasureFewImages(MeasureCifar):
    """Measures runs on few images of CIFAR-10: what do they memorize?"""

    def __init__(self, data, quick):
        super().__init__(data, quick)
        self.train_options += ["--val", data[1]]
        with np.load(data[0]) as file:
            self.training = torch.from_numpy(file["x"]).permute(0, 3, 1, 2)

    def measure(self, folder, samples):
        """Return {column: text} for a run and samples of it."""
        # The held-out loss falls at first, and rises once the network memorizes.
        with open(f"{folder}/log.jsonl") as file:
            lines = [json.loads(line) for line in file]
        losses = {line["step"]: line["val_loss_ema"] for line in lines if "val_loss_ema" in line}
        best = min(losses, key=losses.get)
        row = {
            "lowest held-out loss": f"{losses[best]:.4f}",
            "at step": f"{best}",
            "last held-out loss": f"{losses[max(losses)]:.4f}",
        }
        fake = statistics_of(self.network, samples)
        for name, real in self.real.items():
            distance = fid.frechet_distance(*real.gaussian(), *fake.gaussian())
            row[f"FD-ResNet56, {name}"] = f"{distance:.1f}"
        # Where in the noise levels does the network fail on images that it has not seen?
        _, errors = measure_run(folder, self.paths["test"])
        for logsnr in (-4, 0, 4):
            error = errors[ERROR_LEVELS.index(logsnr)]
            row[f"error of v, test, logsnr {logsnr}"] = f"{error:.3f}"
        row["near-copies"] = f"{100 * self.share_of_copies(samples):.0f} %"
        return row

    def share_of_copies(self, samples):
        """Return the share of near-copies among the samples in an .npz, by the rule of fid.py."""
        with np.load(samples) as file:
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        # The nearest training images of each sample, by the distance of their pixels. A near-copy
        # is much closer to its nearest one than to the next ones.
        nearest = fid.NearestImages(lambda x: x)
        nearest.add_samples(torch.arange(len(images)), images, images)
        nearest.finish_samples()
        nearest.add_training(torch.arange(len(self.training)), self.training, self.training)
        nearest.finish()
        return (nearest.ratios() <= fid.NEAR_COPY).float().mean().item()


class MeasureTexts:
    """Measures a run on captions, with the judge of texts. It draws its own samples."""

    def __init__(self, data, quick):
        self.n_samples = QUICK_IMAGES if quick else 500
        self.judge = train_text_judge(steps=2 if quick else 400)
        self.train_options = []

    def measure(self, folder, samples):
        """Return {column: text} for a run. samples is None."""
        row = {}
        by_text = judge_texts(folder, self.n_samples, self.judge)
        for (held_out, guidance), shares in by_text.items():
            name = "held-out colors" if held_out else "colors of training"
            row[f"shape, {name}, guidance {guidance:g}"] = f"{100 * shares[2]:.1f} %"
        return row


MEASURES = dict(shapes=MeasureShapes, cifar=MeasureCifar, few=MeasureFewImages, texts=MeasureTexts)

# ---------------------------------------------------------------- one finding


def repeat(name, data, quick=False, only_seed=None):
    """Train, sample and measure all arms of a finding. Returns the rows of its table.

    only_seed: the only one to run; None for all seeds of the finding.
    """
    finding = FINDINGS[name]
    if only_seed is not None:
        finding = finding._replace(seeds=(only_seed,))
    os.makedirs(FOLDER, exist_ok=True)
    if finding.measure in ("cifar", "few") and not data:
        raise ValueError(f"{name} needs --data cifar10_train.npz cifar10_test.npz")

    # Some findings train on the first images only. What is trained on is also measured.
    if quick:
        names = ("quick-training", "quick-test")
        data = [first_images(path, QUICK_IMAGES, name) for path, name in zip(data, names)]
    elif finding.images and data:
        data = [first_images(data[0], finding.images, f"first-{finding.images}"), data[1]]
    meter = MEASURES[finding.measure](data, quick)

    rows = []
    for arm, options in finding.arms.items():
        for seed in finding.seeds[:1] if quick else finding.seeds:
            # Train. A run that has ended is only read.
            folder = f"{FOLDER}/{'quick-' if quick else ''}{name}-{arm}-{seed}"
            folder = folder.replace(":", "").replace(" ", "-")
            line = f"{finding.train} {options} --seed {seed}".split()
            line += meter.train_options + ["--out", folder]
            run(train, line + (QUICK_TRAIN.split() if quick else []))

            # Sample at each scale of guidance, and measure. The samples of an arm start from the
            # same noise as those of the others: they have the same seed.
            for guidance in finding.guidance:
                samples = None
                if finding.sample:
                    samples = f"{folder}/guidance{guidance:g}.npz"
                    line = [folder, *finding.sample.split(), "--guidance", f"{guidance:g}"]
                    line += ["--out", samples]
                    run(sample, line + (QUICK_SAMPLE.split() if quick else []))
                row = {"arm": arm, "seed": str(seed), "guidance": f"{guidance:g}"}
                rows.append(row | meter.measure(folder, samples))
    return rows


def table(rows):
    """Return rows, dicts with the same keys, as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [list(row.values()) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.experiments", description="Repeat a finding.")
    parser.error = lambda message: sys.exit(f"docs.experiments: {message}")
    parser.add_argument("finding", nargs="?", help="without it, all findings are listed")
    data_help = "the training and the test images of CIFAR-10, see docs/cifar.py"
    parser.add_argument("--data", nargs=2, default=[], metavar=("TRAIN", "TEST"), help=data_help)
    parser.add_argument("--seed", type=int, help="only this seed, to run two of them in parallel")
    parser.add_argument("--quick", action="store_true", help="two steps each: does it run?")
    args = parser.parse_args(argv)
    if args.finding is None:
        for name, finding in FINDINGS.items():
            print(f"{name:14s} {finding.time:12s} {finding.question}")
        return
    if args.finding not in FINDINGS:
        raise ValueError(f"{args.finding}: no such finding; there are {', '.join(FINDINGS)}")
    start = time.time()
    if args.quick:
        # The grid at the end of a run takes longer than everything else here.
        with mock.patch.object(train, "save_sample_grid", lambda run: 0):
            rows = repeat(args.finding, args.data, quick=True, only_seed=args.seed)
    else:
        rows = repeat(args.finding, args.data, only_seed=args.seed)
    minutes = (time.time() - start) / 60
    print(f"\n{FINDINGS[args.finding].question} ({minutes:.0f} min)\n\n{table(rows)}")


if __name__ == "__main__":
    run_command(main)
