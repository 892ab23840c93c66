"""Judge the samples of networks that were trained on the built-in Shapes.

A small classifier says which shape an image shows. Its features give a Fréchet distance, FD-Judge:
FID needs photographs, and Shapes are not photographs.

    python -m docs.judge                        # train the classifier: half a minute
    python -m docs.judge samples.npz            # the share of samples that show their class
    python -m docs.judge runs/NAME shapes       # bits/dim and the error of v on held-out shapes
    python -m docs.judge runs/NAME test.npz     # the same on the images of a file
    python -m docs.judge runs/NAME shapes --model mynet:Net     # a run of a network of yours
    python -m docs.judge --texts runs/NAME      # the share of samples that show their text
    python -m docs.judge --texts runs/NAME --steps 8            # the same with 8 steps of DDIM
    python fid.py runs/others.npz samples.npz --features docs.judge:Judge

The first command writes runs/judge.pt, the classifier, and runs/others.npz, 5,000 held-out shapes.
The other commands train the classifier first if runs/judge.pt does not exist.
"""

import argparse
import math
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import diffusion_loss, elbo_bpd
from sample import can_guide, sample_batches, to_float
from schedule import logsnr_schedule_cosine
from support.checkpoint import load
from support.data import ImageData, Shapes, load_batch
from support.runtime import in_bf16, run_command, writing
from support.text import CaptionedShapes, byte_tokens

WEIGHTS = "runs/judge.pt"
OTHERS = "runs/others.npz"
HELD_OUT = 2**30  # training uses the shapes with smaller numbers
ERROR_LEVELS = range(-8, 7, 2)  # the logsnr at which measure_run measures the error of v

# ---------------------------------------------------------------- the class of a shape


class Judge(nn.Module):
    """A classifier of the ten shapes, for images of any size.

    trained: load WEIGHTS. If they do not exist, train first and write them. Otherwise the weights
    are random.
    Call: uint8 images (B, 3, H, W) -> features (B, 256) and logits (B, 10), as fid.py expects.
    """

    def __init__(self, trained=True):
        super().__init__()
        # Four levels of two convolutions: 32 x 32 pixels become 2 x 2 with 256 channels.
        layers = []
        for cin, cout in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [*self.unit(cin, cout, stride=2), *self.unit(cout, cout, stride=1)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(256, 10)
        if trained:
            if not os.path.exists(WEIGHTS):
                train_judge()
            self.load_state_dict(torch.load(WEIGHTS, weights_only=True))
            self.eval().requires_grad_(False)

    @staticmethod
    def unit(cin, cout, stride):
        conv = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        return conv, nn.BatchNorm2d(cout), nn.ReLU()

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.float(), 32) / 127.5 - 1
        features = self.body(x)
        return features, self.head(features)


class Pooled(nn.Module):
    """Pixels pooled to 8 x 8, (B, 192): features of the coarse layout of colors alone."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1)


def fit_judge(judge, batches, steps):
    """Train a Judge in place.

    batches: as many as steps, each of images (B, 3, H, W) uint8 and labels (B,) int64.
    """
    # The learning rate rises to 4e-3, and then falls to almost 0.
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for images, labels in batches:
        # Noise of up to 30 gray levels: grain in a sample must not hide its shape from the judge.
        noise = 30 * torch.rand(len(images), 1, 1, 1) * torch.randn(images.shape)
        _, logits = judge(images + noise)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_judge(steps=300, held_out=5000):
    """Train a Judge. Write WEIGHTS and OTHERS. Return its accuracy on OTHERS, from 0 to 1."""
    data = Shapes(32)
    torch.manual_seed(0)
    judge = Judge(trained=False)
    batches = (load_batch(data, torch.randint(len(data), (64,))) for _ in range(steps))
    fit_judge(judge, batches, steps)

    # WEIGHTS are written last. If they exist, OTHERS exist, too, even after an interruption.
    os.makedirs(os.path.dirname(WEIGHTS), exist_ok=True)
    images, labels = load_batch(Shapes(32, first=HELD_OUT, length=held_out), range(held_out))
    with writing(OTHERS, shared=True) as file:
        np.savez(file, x=images.permute(0, 2, 3, 1).numpy(), y=labels.numpy())
    with writing(WEIGHTS, shared=True) as file:
        torch.save(judge.state_dict(), file)
    # Shapes that the judge was not trained on.
    accuracy = share_right(judge.eval(), images, labels)
    print(f"trained the judge: {100 * accuracy:.2f} % of {held_out} held-out shapes are right")
    return accuracy


@torch.no_grad()
def share_right(judge, images, labels):
    """Return the share of images (N, 3, H, W) that the judge assigns to their labels (N,)."""
    right = 0
    for first in range(0, len(images), 50):
        _, logits = judge(images[first : first + 50])
        right += (logits.argmax(1) == labels[first : first + 50]).sum().item()
    return right / len(images)


def judge_samples(path):
    """Print and return the share of samples that show their class, from 0 to 1.

    path: an .npz of sample.py, with arr_0 (N, H, W, 3) uint8 and y (N,). Raises ValueError for a
    file without labels.
    """
    with np.load(path) as samples:
        if not {"arr_0", "y"} <= samples.keys():
            raise ValueError(f"{path} has no samples with labels: write it with sample.py --out")
        images = torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(samples["y"])
    share = share_right(Judge(), images, labels)
    print(f"{100 * share:.1f} % of {len(images)} samples show their class")
    return share


# ---------------------------------------------------------------- likelihood and the error of v


@torch.no_grad()
def measure_run(folder, data, images=1000, bounds=200, model=None):
    """Print and return bits/dim of a run on held-out images, and its error of v per noise level.

    data: "shapes", or a folder or file of images. images: how many of them, from the first one on.
    bounds: the same for bits/dim, in batches of 50. model: see support.checkpoint.load. Returns a
    float, and a list of errors, one for each of ERROR_LEVELS. Raises what load and ImageData raise.
    """
    net, config, _ = load(folder, model=model)
    if data == "shapes":
        dataset = Shapes(config["res"], first=HELD_OUT)
    else:
        dataset = ImageData([data], config["res"])
    # All networks are measured on the same images, with the same noise. Noise is drawn in the order
    # of the memory, so the images are made contiguous.
    count = min(images, len(dataset))
    batches = []
    for first in range(0, count, 50):
        x, y = load_batch(dataset, range(first, min(first + 50, count)))
        batches.append((to_float(x).contiguous(), y))

    # The bound up to logsnr 10: the same limits for all networks, so that they can be compared.
    torch.manual_seed(0)
    bits = [
        elbo_bpd(net, x, lambda t: logsnr_schedule_cosine(t, -15.0, 10.0), y, draws=4)
        for x, y in batches[: math.ceil(bounds / 50)]
    ]
    bits = torch.cat(bits)
    print(f"{bits.mean():.3f} bits/dim of {len(bits)} images of {data}")

    # The error at single noise levels tells where a network is good: at high noise (-8) it decides
    # what the image shows, at low noise (6) it draws the fine detail.
    errors = []
    for logsnr in ERROR_LEVELS:
        losses = [
            diffusion_loss(net, x, constant_schedule(logsnr), y, space="v")[0] for x, y in batches
        ]
        errors.append(torch.cat(losses).mean().item())
        print(f"logsnr {logsnr:2d}: mean squared error of v {errors[-1]:.5f}")
    return bits.mean().item(), errors


def constant_schedule(logsnr):
    """A schedule that has the same noise level at all times."""
    return lambda t: torch.full_like(t, logsnr)


# ---------------------------------------------------------------- the text of a shape

# The attributes of a caption such as "a small red star on blue and green, top left": the name of
# each, the position of its word, and all its words.
ATTRIBUTES = [
    ("size", 1, ["small", "large"]),
    ("color", 2, CaptionedShapes.colors),
    ("shape", 3, CaptionedShapes.classes),
    ("top or bottom", -2, ["top", "bottom"]),
    ("left or right", -1, ["left", "right"]),
]
SIZES = [len(words) for _, _, words in ATTRIBUTES]


def attributes_of(texts):
    """The attributes of captions, (len(texts), 5), each as an index into its words."""
    rows = []
    for text in texts:
        words = text.split()
        rows.append([values.index(words[i]) for _, i, values in ATTRIBUTES])
    return torch.tensor(rows)


def captioned_shapes(held_out, first=HELD_OUT):
    """CaptionedShapes with full captions: those shown in training, or those held out."""
    return CaptionedShapes(32, first=first, held_out=held_out, full=True)


def captioned_batch(step):
    """A batch of images and attributes to train the judge of texts.

    Every shape has five colors that are shown in training and one that is held out. In a batch of
    105 and 21, all six are equally frequent on average. Otherwise the judge would infer the color
    from the shape.
    """
    images = []
    texts = []
    for held_out, n in ((False, 105), (True, 21)):
        data = captioned_shapes(held_out, first=n * step)  # new images at every step
        images.append(load_batch(data, range(n))[0])
        texts += data.captions(range(n))
    return torch.cat(images), attributes_of(texts)


def train_text_judge(steps=400):
    """Train a classifier of the attributes of 32 x 32 images for some seconds.

    Returns a function from uint8 images (B, 3, 32, 32) to their attributes (B, 5).
    """
    torch.manual_seed(0)

    def block(cin, cout):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())

    judge = nn.Sequential(
        block(3, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Linear(2048, sum(SIZES))
    )
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in range(steps):
        # One classification per attribute, with a share of the outputs each. A little noise keeps
        # the judge from relying on clean pixels.
        images, attributes = captioned_batch(step)
        x = to_float(images)
        logits = judge(x + 0.05 * torch.randn(x.shape)).split(SIZES, 1)
        loss = sum(F.cross_entropy(each, y) for each, y in zip(logits, attributes.unbind(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
    judge.eval().requires_grad_(False)

    def predict(images):
        logits = judge(to_float(images)).split(SIZES, 1)
        return torch.stack([each.argmax(1) for each in logits], 1)

    return predict


def judge_texts(folder, samples=500, judge=None, steps=None):
    """Print and return the share of a run's samples that show each attribute of their text.

    steps: of DDIM. By default a distilled run takes the steps that it was trained for, and other
    runs take 32 steps of DPM-Solver++. Returns {(held_out, guidance): shares (5,)}. Raises
    ValueError for a run that was not trained on the built-in captions at 32 px.
    """
    net, config, schedule = load(folder)
    if config.get("captions") is None:
        raise ValueError(f"{folder} was not trained on texts: train with --captions")
    if config["res"] != 32 or config.get("data") or config.get("text_encoder", "bytes") != "bytes":
        raise ValueError(f"{folder}: --texts needs a run on the built-in captions with --res 32")
    net = in_bf16(net, config["bf16"])
    judge = judge or train_text_judge()
    if getattr(net, "max_guidance", None):
        steps = steps or config["sampling"]["steps"]
    sampling = dict(sampler="ddim", steps=steps) if steps else dict(sampler="dpmpp", steps=32)
    shares = {}
    for held_out in (False, True):
        texts = captioned_shapes(held_out).captions(range(samples))
        tokens = byte_tokens(texts, config["model_args"]["text_tokens"])
        for guidance in (1.0, 2.0) if can_guide(config) else (1.0,):
            rounds = sample_batches(
                net,
                (3, 32, 32),
                schedule,
                torch.from_numpy(tokens),
                125,
                device=torch.device("cpu"),
                guidance=guidance,
                **sampling,
            )
            images = torch.cat([images for _, images in rounds]).permute(0, 3, 1, 2)

            # A sample is right in an attribute if the judge finds what the caption says.
            right = (judge(images) == attributes_of(texts)).float()  # (samples, 5)
            shares[held_out, guidance] = right.mean(0)
            both = right[:, 1:3].amin(1).mean()
            columns = [f"{row[0]} {100 * s:.1f} %" for row, s in zip(ATTRIBUTES, right.mean(0))]
            print(
                f"{'held out' if held_out else 'shown in training'}, guidance {guidance:g}: "
                f"{', '.join(columns)}; color and shape {100 * both:.1f} %",
                flush=True,
            )
    return shares


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="docs.judge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"docs.judge: {message}")
    parser.add_argument("paths", nargs="*", help="samples.npz, or a run and images")
    parser.add_argument("--texts", action="store_true", help="judge runs that have captions")
    parser.add_argument("--steps", type=int, help="--texts: DDIM steps")
    parser.add_argument("--model", help="package.module:Class, for a network of yours")
    args = parser.parse_args(argv)
    if args.steps is not None and (args.steps < 1 or not args.texts):
        raise ValueError("--steps must be 1 or more, and needs --texts")
    if args.texts and not args.paths:
        raise ValueError("--texts needs a run")
    if args.model and (args.texts or not args.paths or args.paths[0].endswith(".npz")):
        raise ValueError("--model needs a run and images, for example shapes")
    if not args.paths:
        train_judge()
    elif args.texts:
        judge = train_text_judge()
        for folder in args.paths:
            judge_texts(folder, judge=judge, steps=args.steps)
    elif args.paths[0].endswith(".npz"):
        for path in args.paths:
            judge_samples(path)
    elif len(args.paths) == 1:
        raise ValueError(f"{args.paths[0]}: name images too, for example shapes")
    else:
        for data in args.paths[1:]:
            measure_run(args.paths[0], data, model=args.model)


if __name__ == "__main__":
    run_command(main)
