"""Tests of the judges: small classifiers that tell whether samples show their class or their text.

They also judge the samples of a run, which takes minutes:

    RUN=runs/shapes-32 python test_all.py --slow -k judge_of_classes -s
    TEXT_RUN=runs/shapes-text-32 python test_all.py --slow -k judge_of_texts -s
"""

import os
import re
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fid
import train
from sample import sample, to_uint8
from support.checkpoint import load
from support.data import Shapes, load_batch
from support.runtime import in_bf16
from support.text import CaptionedShapes, byte_tokens
from tests.helpers import HERE, call


def trained_judge(batch, sizes):
    """Train a small classifier of 32 x 32 images for some seconds.

    sizes: the number of values of each attribute that it recognizes. batch(step): a batch of images
    (B, 3, 32, 32) uint8 and their attributes (B, len(sizes)), numbered from 0.
    Returns a function from such images to their attributes.
    """
    torch.manual_seed(0)

    def block(cin, cout):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())

    judge = nn.Sequential(
        block(3, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Linear(2048, sum(sizes))
    )
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in range(400):
        images, attributes = batch(step)
        x = images / 127.5 - 1
        logits = judge(x + 0.05 * torch.randn(x.shape)).split(sizes, 1)
        loss = sum(F.cross_entropy(each, y) for each, y in zip(logits, attributes.unbind(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        optimizer.step()
    judge.eval().requires_grad_(False)

    def predict(images):
        logits = judge(images / 127.5 - 1).split(sizes, 1)
        return torch.stack([each.argmax(1) for each in logits], 1)

    return predict


def shapes_judge():
    """Train a judge of the classes of Shapes.

    Returns a function from uint8 images to classes, and its accuracy on 4,000 images that it was
    not trained on.
    """
    data = Shapes(32)
    images, labels = load_batch(Shapes(32, first=2**30), range(4000))

    def batch(step):
        x, y = load_batch(data, range(128 * step, 128 * step + 128))
        return x, y[:, None]

    judge = trained_judge(batch, [10])

    def predict(images):
        return judge(images)[:, 0]

    return predict, (predict(images) == labels).float().mean().item()


@pytest.mark.slow
def test_judge_of_classes_in_a_trained_run():
    judge, accuracy = shapes_judge()
    assert accuracy >= 0.99
    if "RUN" not in os.environ:
        pytest.skip(
            "RUN=runs/shapes-32 judges the samples of that run; the judge itself was tested"
        )

    # The share of 1,024 samples that the judge assigns to their class, per guidance scale.
    net, config, schedule = load(os.environ["RUN"])
    net = in_bf16(net, config["bf16"])
    label = torch.arange(1024) % 10
    by_scale = {}
    for scale in (1.0, 1.5, 2.0):
        right = 0
        for first in range(0, 1024, 128):
            y = label[first : first + 128]
            x = sample(
                net,
                (len(y), 3, 32, 32),
                schedule,
                sampler="dpmpp",
                steps=64,
                label=y,
                guidance=scale,
                first=first,
            )
            right += (judge(to_uint8(x)) == y).sum().item()
        by_scale[scale] = right / 1024
        print(
            f"judge {100 * accuracy:.1f} % on fresh shapes; 1,024 samples at guidance {scale:g}: "
            f"{100 * by_scale[scale]:.1f} % show their class",
            flush=True,
        )
    assert max(by_scale.values()) >= 0.9


# The attributes of a caption such as "a small red star on blue and green, top left": the name of
# each, the position of its word, and all its words.
ATTRIBUTES = [
    ("size", 1, ["small", "large"]),
    ("color", 2, CaptionedShapes.colors),
    ("shape", 3, CaptionedShapes.classes),
    ("top or bottom", -2, ["top", "bottom"]),
    ("left or right", -1, ["left", "right"]),
]


def attributes_of(texts):
    """The attributes of captions, (len(texts), 5), each as an index into its words."""
    rows = []
    for text in texts:
        words = text.split()
        rows.append([values.index(words[i]) for _, i, values in ATTRIBUTES])
    return torch.tensor(rows)


def captioned_shapes(held_out, first):
    """CaptionedShapes with full captions: those shown in training, or those held out."""
    return CaptionedShapes(32, first=first, held_out=held_out, full=True)


def captioned_batch(step):
    """A batch for trained_judge.

    Every shape has five colors that are shown and one that is held out. In a batch of 105 and 21,
    all of them are equally frequent. Otherwise the judge would infer the color from the shape.
    """
    images = []
    texts = []
    for held_out, n in ((False, 105), (True, 21)):
        data = captioned_shapes(held_out, first=n * step)
        images.append(load_batch(data, range(n))[0])
        texts += data.captions(range(n))
    return torch.cat(images), attributes_of(texts)


@pytest.mark.slow
def test_judge_of_texts_in_a_trained_run():
    judge = trained_judge(captioned_batch, [len(values) for _, _, values in ATTRIBUTES])
    shown = captioned_shapes(held_out=False, first=2**30)
    held_out = captioned_shapes(held_out=True, first=2**30)
    for data in (shown, held_out):
        predicted = judge(load_batch(data, range(2000))[0])
        expected = attributes_of(data.captions(range(2000)))
        accuracy = (predicted == expected).float().mean(0)
        assert accuracy.min() >= 0.98, accuracy
    if "TEXT_RUN" not in os.environ:
        pytest.skip(
            "TEXT_RUN=runs/shapes-text-32 judges the samples of that run; "
            "the judge itself was tested"
        )

    # The share of 500 samples that have each attribute of their text, per guidance scale.
    net, config, schedule = load(os.environ["TEXT_RUN"])
    net = in_bf16(net, config["bf16"])
    for name, data in ("shown in training", shown), ("held out", held_out):
        for scale in (1.0, 2.0):
            parts = []
            for first in range(0, 500, 125):
                texts = data.captions(range(first, first + 125))
                tokens = byte_tokens(texts, config["model_args"]["text_tokens"])
                x = sample(
                    net,
                    (125, 3, 32, 32),
                    schedule,
                    sampler="dpmpp",
                    steps=32,
                    label=torch.from_numpy(tokens),
                    guidance=scale,
                    first=first,
                )
                parts.append(judge(to_uint8(x)) == attributes_of(texts))
            right = torch.cat(parts).float()
            shares = [
                f"{attribute} {100 * share:.1f} %"
                for (attribute, _, _), share in zip(ATTRIBUTES, right.mean(0))
            ]
            color_and_shape = 100 * right[:, 1:3].amin(1).mean()
            print(
                f"{name}, guidance {scale:g}: {', '.join(shares)}; "
                f"color and shape {color_and_shape:.1f} %, all {100 * right.amin(1).mean():.1f} %",
                flush=True,
            )
            if name == "held out" and scale == 2.0:
                assert right[:, 1].mean() >= 0.7
                assert right[:, 2].mean() >= 0.7


def test_the_judge_of_the_readme(tmp_path, monkeypatch, capsys):
    with open(f"{HERE}/README.md") as file:
        script = re.search(r"```python\n(.*?)```", file.read(), re.S)[1]

    # Fewer training steps, fewer other images, and fewer images per bound.
    small = script.replace("300", "3").replace("5000", "100").replace("1000", "50")
    assert small != script
    (tmp_path / "judge.py").write_text(small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def output(*args):
        monkeypatch.setattr(sys, "argv", ["judge.py", *args])
        runpy.run_path("judge.py", run_name="__main__")
        return capsys.readouterr().out

    # Without arguments it trains the judge and prints its accuracy on the other images.
    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output())

    # With a run and datasets it prints the bound and the error of v at eight noise levels for each.
    call(train.main, "--res 32 --steps 1 --batch 2 --out run --model-args", '{"base_channels": 8}')
    capsys.readouterr()
    bound = r"[\d.]+ bits/dim\D+50\b.*\b%s\n(logsnr .\d\b\D+[\d.]+\n){8}"
    expected = bound % "shapes" + bound % "others.npz"
    assert re.fullmatch(expected, output("run", "shapes", "others.npz"))

    # With samples it prints the share that shows its class.
    with np.load("others.npz") as others:
        np.savez("samples.npz", arr_0=others["x"], y=others["y"])
    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output("samples.npz"))

    # Both of its networks give features for fid.py.
    with np.load("others.npz") as others:
        x = torch.from_numpy(others["x"][:4]).permute(0, 3, 1, 2)
    for name, width in (("Judge", 256), ("Pooled", 192)):
        network = fid.load_network(f"judge:{name}")
        features, _ = fid.extract(network, x)
        assert features.shape == (4, width)
