"""Tests of support/bench.py."""

import os
import re

import pytest
import torch

import train
import unet
from support import bench
from support.bench import Stopwatch, training_flops
from tests.helpers import NETS, TINY_NET, TINY_RUN, call


def test_bench_prints_speed_and_mfu_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stopwatch, "steps", 30)
    call(train.main, *TINY_RUN, "--micro 4 --bench")
    # The first two lines name the network and list all settings.
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


@pytest.mark.parametrize("net_class, fields", NETS)
def test_training_takes_almost_three_times_the_flops_of_forward(net_class, fields):
    config = dict(model=net_class.__name__.lower(), model_args=fields, res=fields["res"])
    macs = unet.count(net_class, fields)[1]
    # A multiply-accumulate counts as two FLOPs. Backward takes two products for each one of
    # forward, but none for the gradient of the image.
    assert 0.9 < training_flops(config) / (6 * macs) < 1


def test_stopwatch_counts_each_part_of_every_second_window(monkeypatch):
    stopwatch = Stopwatch(torch.device("cpu"))
    now = 0
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)

    # Each part takes a fixed time. A step has two micro-batches: 2 x (1 + 10) + 100 seconds. The
    # 10 steps of warmup take longer.
    seconds = dict(zip(Stopwatch.parts, (1, 10, 100)))
    for step in range(Stopwatch.steps):
        for part in ("data", "forward+backward", "data", "forward+backward", "optimizer+EMA"):
            now += seconds[part]
            if step < 10:
                now += 1000
            stopwatch.tick(part)

    # After warmup, 5 windows of 5 steps measure throughput, and 5 others measure the parts.
    assert stopwatch.windows == [5 * 122] * 5
    assert stopwatch.seconds == {
        "data": 25 * 2,
        "forward+backward": 25 * 20,
        "optimizer+EMA": 25 * 100,
    }


def test_the_estimate_of_a_small_network_is_timed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model_args = dict(TINY_NET, res=32, num_classes=10)
    config = dict(model="uvit", res=32, model_args=model_args, bf16=False)
    assert 0 < bench.cpu_seconds_per_image(config) < 10
    # A run draws the same random numbers with and without the estimate.
    assert torch.equal(torch.get_rng_state(), state)


def test_the_estimate_of_a_large_network_counts_flops(monkeypatch):
    monkeypatch.setattr(bench, "training_flops", lambda config: 1e12)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, repeats: 1e11)
    assert bench.cpu_seconds_per_image({}) == pytest.approx(20)
