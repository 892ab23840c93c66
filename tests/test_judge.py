"""Tests of docs/judge.py: classifiers that tell whether samples show their class or their text."""

import os
import re
from functools import partial

import numpy as np
import pytest
import torch

import fid
import sample as sampling
import train
from docs import judge
from related import distill
from support.data import Shapes, load_batch
from tests.helpers import HERE, SMALL_NET, call


def test_judge_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    # The first use trains the judge, shortened here, and keeps it and the held-out shapes.
    monkeypatch.setattr(judge, "train_judge", partial(judge.train_judge, steps=3, held_out=100))
    judge.main([])
    assert re.fullmatch(r"trained the judge: [\d.]+ % of 100 .*\n", capsys.readouterr().out)
    with np.load("runs/others.npz") as others:
        images, labels = others["x"], others["y"]
    expected, expected_labels = load_batch(Shapes(32, first=judge.HELD_OUT), range(100))
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), expected)
    assert torch.equal(torch.from_numpy(labels), expected_labels)

    # Samples: the share is that of the logits of the stored classifier.
    np.savez("samples.npz", arr_0=images, y=labels)
    network = judge.Judge()
    with torch.no_grad():
        right = (network(expected)[1].argmax(1) == expected_labels).float().mean().item()
    assert judge.judge_samples("samples.npz") == pytest.approx(right)
    judge.main(["samples.npz"])
    assert f"{100 * right:.1f} % of 100 samples" in capsys.readouterr().out

    # A run: bits/dim and eight errors, for held-out shapes and for a file.
    call(train.main, "--res 32 --steps 1 --batch 2 --out run --model-args", '{"base_channels": 8}')
    capsys.readouterr()
    monkeypatch.setattr(judge, "measure_run", partial(judge.measure_run, images=50, bounds=50))
    judge.main(["run", "shapes", "runs/others.npz"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 9
    for i, name in ((0, "shapes"), (9, "runs/others.npz")):
        assert re.fullmatch(rf"[\d.]+ bits/dim of 50 images of {name}", lines[i])
        assert lines[i + 1].startswith("logsnr -8: ")
        assert lines[i + 8].startswith("logsnr  6: ")
    assert lines[:9] == [line.replace("runs/others.npz", "shapes") for line in lines[9:]]

    # Both of its networks give features for fid.py.
    for name, width in (("Judge", 256), ("Pooled", 192)):
        features, _ = fid.extract(fid.load_network(f"docs.judge:{name}"), expected[:4])
        assert features.shape == (4, width)

    # Bad input gets a line that names it.
    with pytest.raises(ValueError, match="run: name images"):
        judge.main(["run"])
    with pytest.raises(ValueError, match="run .* --captions"):
        judge.judge_texts("run", judge=network)
    np.savez("unlabeled.npz", arr_0=images)
    with pytest.raises(ValueError, match="unlabeled.npz .* labels"):
        judge.main(["unlabeled.npz"])
    with pytest.raises(ValueError, match="--texts needs a run"):
        judge.main(["--texts"])
    for options in (["samples.npz"], [], ["--texts", "run"]):
        with pytest.raises(ValueError, match="--model needs a run"):
            judge.main([*options, "--model", "mynet:Net"])


def test_judge_weights_are_read_not_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("runs")
    network = judge.Judge(trained=False)
    torch.save(network.state_dict(), judge.WEIGHTS)
    monkeypatch.setattr(judge, "train_judge", None)
    for name, value in judge.Judge().state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_texts_are_judged_with_the_steps_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(
        train.main, "--res 32 --captions --steps 1 --batch 2 --out run --sample-every 9", SMALL_NET
    )
    call(distill.main, "run", "--steps 4 --teacher-steps 8 --updates 1 --batch 2")
    monkeypatch.setattr(judge, "train_text_judge", lambda: lambda x: torch.zeros(len(x), 5))
    drawn = []

    def draw(net, size, schedule, labels, batch, **options):
        drawn.append((options["sampler"], options["steps"]))
        return [(0, torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8))]

    monkeypatch.setattr(judge, "sample_batches", draw)
    call(judge.main, "--texts run")
    call(judge.main, "--texts run --steps 8")
    call(judge.main, "--texts run-4steps")
    assert drawn == 4 * [("dpmpp", 32)] + 4 * [("ddim", 8)] + 4 * [("ddim", 4)]

    for options in ("--texts run --steps 0", "--steps 8 samples.npz"):
        with pytest.raises(ValueError, match="--steps .*--texts"):
            call(judge.main, options)


def test_only_runs_on_the_built_in_captions_are_judged_by_texts(tmp_path, monkeypatch):
    for own in (dict(res=64), dict(data=["photos/"]), dict(text_encoder="someone/t5")):
        config = dict(captions="", res=32, data=[], text_encoder="bytes") | own
        monkeypatch.setattr(judge, "load", lambda folder, config=config: (None, config, None))
        with pytest.raises(ValueError, match="run: --texts needs"):
            judge.judge_texts("run")


@pytest.mark.slow
def test_judge_knows_the_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert judge.train_judge() >= 0.99

    # It names the samples of the model in assets, too.
    draw = "--n 200 --guidance 2 --sampler dpmpp --steps 16 --out samples.npz"
    call(sampling.main, f"{HERE}/assets/shapes32.pt", draw)
    assert judge.judge_samples("samples.npz") >= 0.96


@pytest.mark.slow
def test_judge_knows_the_texts(tmp_path, monkeypatch, capsys):
    predict = judge.train_text_judge()
    for held_out in (False, True):
        data = judge.captioned_shapes(held_out)
        predicted = predict(load_batch(data, range(2000))[0])
        expected = judge.attributes_of(data.captions(range(2000)))
        accuracy = (predicted == expected).float().mean(0)
        assert accuracy.min() >= 0.98, accuracy

    # A run after one step draws noise, which shows no shape of its text.
    monkeypatch.chdir(tmp_path)
    call(train.main, "--res 32 --captions --steps 1 --batch 2 --out run --sample-every 9")
    capsys.readouterr()
    shares = judge.judge_texts("run", samples=20, judge=predict)
    assert len(capsys.readouterr().out.splitlines()) == len(shares) == 4
    for share in shares.values():
        assert share.shape == (5,)
        assert share[2] < 0.5
