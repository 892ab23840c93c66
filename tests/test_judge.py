"""Tests of the judges: small classifiers that tell whether samples show their class or their text.

They also judge the samples of a run, which takes minutes:

    RUN=runs/shapes-32 python test_all.py --slow -k judge_of_a_trained_run -s
    TEXT_RUN=runs/shapes-text-32 python test_all.py --slow -k of_texts -s
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
from support.text import (
    CaptionedShapes,
    byte_tokens,
)
from tests.helpers import HERE, call


def trained_judge(batch, sizes):
    """A small classifier, trained for some seconds.

    It maps images (B, 3, 32, 32) in [-1, 1] to logits of attributes of these numbers of values.
    batch(step): images uint8 and the numbers of their attributes, (B, len(sizes)). Returns a
    function from uint8 images to these numbers.
    """
    torch.manual_seed(0)

    def block(cin, cout):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())

    judge = nn.Sequential(
        block(3, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Linear(2048, sum(sizes))
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in range(400):
        x, attributes = batch(step)
        logits = judge(x / 127.5 - 1 + 0.05 * torch.randn(x.shape)).split(sizes, 1)
        loss = sum(F.cross_entropy(each, y) for each, y in zip(logits, attributes.unbind(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        optimizer.step()
    judge.eval().requires_grad_(False)
    return lambda x: torch.stack(
        [each.argmax(1) for each in judge(x / 127.5 - 1).split(sizes, 1)], 1
    )


def shapes_judge():
    """A judge of the class of Shapes, and its accuracy on 4,000 fresh ones."""
    data, others = Shapes(32), load_batch(Shapes(32, first=2**30), range(4000))

    def batch(step):
        x, y = load_batch(data, range(128 * step, 128 * step + 128))
        return x, y[:, None]

    judge = trained_judge(
        batch,
        [10],
    )
    return lambda x: judge(x)[:, 0], (judge(others[0])[:, 0] == others[1]).float().mean().item()


@pytest.mark.slow
def test_judge_of_a_trained_run():
    judge, accuracy = shapes_judge()
    assert accuracy >= 0.99
    if "RUN" not in os.environ:
        pytest.skip(
            "RUN=runs/shapes-32 judges the samples of that run; the judge itself was tested"
        )
    net, config, schedule = load(os.environ["RUN"])
    net = in_bf16(net, config["bf16"])
    label, by_scale = torch.arange(1024) % 10, {}
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


@pytest.mark.slow
def test_judge_of_a_trained_run_of_texts():
    words = [
        ["small", "large"],
        CaptionedShapes.colors,
        CaptionedShapes.classes,
        ["top", "bottom"],
        ["left", "right"],
    ]

    def numbers(texts):
        return torch.tensor(
            [
                [values.index(text.split()[i]) for values, i in zip(words, (1, 2, 3, -2, -1))]
                for text in texts
            ]
        )

    shown, held_out = (
        lambda first, held_out=held_out: CaptionedShapes(
            32, first=first, held_out=held_out, full=True
        )
        for held_out in (False, True)
    )

    def batch(step):  # all colors of all shapes alike, or the one would tell the other
        parts = [(data(n * step), range(n)) for data, n in ((shown, 105), (held_out, 21))]
        return torch.cat([load_batch(data, indices)[0] for data, indices in parts]), numbers(
            sum((data.captions(indices) for data, indices in parts), [])
        )

    judge = trained_judge(batch, list(map(len, words)))
    for data in (shown(2**30), held_out(2**30)):
        answer, expected = judge(load_batch(data, range(2000))[0]), data.captions(range(2000))
        accuracy = (answer == numbers(expected)).float().mean(0)
        assert accuracy.min() >= 0.98, accuracy
    if "TEXT_RUN" not in os.environ:
        pytest.skip(
            "TEXT_RUN=runs/shapes-text-32 judges the samples of that run; "
            "the judge itself was tested"
        )
    net, config, schedule = load(os.environ["TEXT_RUN"])
    net = in_bf16(net, config["bf16"])
    for name, data in ("shown in training", shown(2**30)), ("held out", held_out(2**30)):
        for scale in (1.0, 2.0):
            right = []
            for first in range(0, 500, 125):
                texts = data.captions(range(first, first + 125))
                x = sample(
                    net,
                    (125, 3, 32, 32),
                    schedule,
                    sampler="dpmpp",
                    steps=32,
                    label=torch.from_numpy(byte_tokens(texts, config["model_args"]["text_tokens"])),
                    guidance=scale,
                    first=first,
                )
                right.append(judge(to_uint8(x)) == numbers(texts))
            right = torch.cat(right).float()
            print(
                f"{name}, guidance {scale:g}: "
                + ", ".join(
                    f"{key} {100 * value:.1f} %"
                    for key, value in zip(
                        ("size", "color", "shape", "top or bottom", "left or right"), right.mean(0)
                    )
                )
                + f"; color and shape {100 * right[:, 1:3].amin(1).mean():.1f} %, "
                + f"all {100 * right.amin(1).mean():.1f} %",
                flush=True,
            )
            if name == "held out" and scale == 2.0:
                assert right[:, 1].mean() >= 0.7 and right[:, 2].mean() >= 0.7


def test_the_judge_of_the_readme(tmp_path, monkeypatch, capsys):
    with open(f"{HERE}/README.md") as file:
        script = re.search(r"```python\n(.*?)```", file.read(), re.S)[1]
    small = (
        script.replace("300", "3").replace("5000", "100").replace("1000", "50")
    )  # steps, other images, images of a bound
    assert small != script
    (tmp_path / "judge.py").write_text(small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def output(*args):
        monkeypatch.setattr(sys, "argv", ["judge.py", *args])
        runpy.run_path("judge.py", run_name="__main__")
        return capsys.readouterr().out

    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output())
    call(train.main, "--res 32 --steps 1 --batch 2 --out run --model-args", '{"base_channels": 8}')
    capsys.readouterr()
    of_one = r"[\d.]+ bits/dim\D+50\b.*\b%s\n(logsnr .\d\b\D+[\d.]+\n){8}"
    assert re.fullmatch(
        of_one % "shapes" + of_one % "others.npz", output("run", "shapes", "others.npz")
    )
    with np.load("others.npz") as others:
        np.savez("samples.npz", arr_0=others["x"], y=others["y"])
    assert re.fullmatch(r"[\d.]+ %\D+100\b.*\n", output("samples.npz"))
    for name, width in (("Judge", 256), ("Pooled", 192)):
        network = fid.load_network(f"judge:{name}")
        features = fid.extract(
            network, torch.from_numpy(np.load("others.npz")["x"][:4]).permute(0, 3, 1, 2)
        )[0]
        assert features.shape == (4, width)
