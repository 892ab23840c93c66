"""Tests of support/bench.py."""

import os
import re

import torch

import train
import unet
from support import bench
from support.bench import Stopwatch, training_flops
from tests.helpers import NETS, TINY_RUN, call


def test_bench_counts_and_times_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stopwatch, "steps", 30)
    call(train.main, *TINY_RUN, "--micro 4 --bench")
    speed, mfu = capsys.readouterr().out.splitlines()[2:]
    assert re.fullmatch(
        r"[\d.]+ img/s \([\d.]+[^\d.]+[\d.]+\)\D+[\d.]+ ms\D+8\b\D+"
        r"data [\d.]+ ms\D+forward\+backward [\d.]+ ms\D+optimizer\+EMA [\d.]+ ms",
        speed,
    )
    assert re.match(
        r"MFU [\d.]+ %\D+[\d.]+ GFLOP\D+[\d.]+ TFLOP/s\W+float32\D+1\b\D+[\d.]+ GiB",
        mfu,
    )
    assert os.listdir() == []
    # Backward takes two products for each one of forward, but none for the gradient of the image.
    for net_class, fields in NETS:
        macs = unet.count(net_class, fields)[1]
        assert (
            0.9
            < training_flops(
                dict(model=net_class.__name__.lower(), model_args=fields, res=fields["res"])
            )
            / (6 * macs)
            < 1
        )


def test_stopwatch_counts_each_part_of_every_second_window(monkeypatch):
    seconds = dict(zip(Stopwatch.parts, (1, 10, 100)))  # by a clock that each part moves on
    stopwatch, clock = Stopwatch(torch.device("cpu")), [0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for step in range(Stopwatch.steps):
        for part in (
            "data",
            "forward+backward",
            "data",
            "forward+backward",
            "optimizer+EMA",
        ):  # two micro-steps
            clock[0] += 1000 * (step < 10) + seconds[part]
            stopwatch.tick(part)
    assert stopwatch.windows == [5 * 122] * 5 and stopwatch.seconds == {
        "data": 25 * 2,
        "forward+backward": 25 * 20,
        "optimizer+EMA": 25 * 100,
    }
