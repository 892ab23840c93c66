"""Tests of related/tstitch.py."""

import json
import math
import re

import numpy as np
import pytest
import torch

import sample as sampling
from related import (
    tstitch,
)
from sample import sample
from schedule import (
    logsnr_schedule_cosine,
    make_schedule,
)
from support.checkpoint import load
from support.runtime import in_bf16
from tests.helpers import call, train_small


class Counted:
    """A net that is a number times z, and counts its calls."""

    num_classes = 3

    def __init__(self, factor):
        self.factor, self.levels = factor, []

    def __call__(self, z, logsnr, label=None):
        self.levels.append(logsnr[0].item())
        return self.factor * z


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_stitching_one_net_equals_sampling_it(sampler):
    small, large = Counted(0.3), Counted(-0.2)
    settings = dict(steps=200, sampler=sampler, label=torch.tensor([0, 2]), guidance=2.0)
    for fractions, only in (((0.0, 1.0), large), ((1.0, 0.0), small)):
        stitched = tstitch.stitch([small, large], fractions, logsnr_schedule_cosine)
        assert torch.equal(
            sample(stitched, (2, 3, 4, 4), logsnr_schedule_cosine, **settings),
            sample(only, (2, 3, 4, 4), logsnr_schedule_cosine, **settings),
        )
    both = tstitch.stitch([small, large], (0.5, 0.5), logsnr_schedule_cosine)
    x = sample(both, (2, 3, 4, 4), logsnr_schedule_cosine, **settings)
    assert not any(
        torch.equal(x, sample(net, (2, 3, 4, 4), logsnr_schedule_cosine, **settings))
        for net in (small, large)
    )


def test_stitched_nets_get_their_share_of_the_steps():
    for steps in (10, 20, 50, 100, 250):
        for schedule in (logsnr_schedule_cosine, make_schedule("shifted:16", 64)):
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            for tenths in range(11):
                small, large = Counted(0.0), Counted(0.0)
                stitched = tstitch.stitch([small, large], (tenths / 10, 1 - tenths / 10), schedule)
                for logsnr in schedule(times)[:-1].float():
                    stitched(torch.zeros(1, 1), logsnr[None])
                assert (len(small.levels), len(large.levels)) == (
                    steps * tenths // 10,
                    steps - steps * tenths // 10,
                )
                assert not small.levels or not large.levels or max(small.levels) < min(large.levels)
    small, large = Counted(0.0), Counted(0.0)
    turns = tstitch.interleaved([small, large], 250, logsnr_schedule_cosine)
    levels = logsnr_schedule_cosine(torch.linspace(1, 0, 251, dtype=torch.float64))[:-1].float()
    for logsnr in levels:
        turns(torch.zeros(1, 1), logsnr[None])
    assert small.levels == levels[::2].tolist() and large.levels == levels[1::2].tolist()
    z, logsnr = torch.ones(4, 2), torch.tensor([-9.0, 9.0, -8.0, 8.0])
    assert tstitch.stitch([Counted(1.0), Counted(2.0)], (0.5, 0.5), logsnr_schedule_cosine)(
        z, logsnr
    )[:, 0].tolist() == [1, 2, 1, 2]
    for fractions in ((0.5, 0.6), (-0.5, 1.5), (1.0,), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=re.escape(str(list(fractions)))):
            tstitch.stitch([small, large], fractions, logsnr_schedule_cosine)


def test_fractions_for_a_budget():
    assert (
        len(tstitch.all_fractions(2)) == 11
        and len(set(fractions := tstitch.all_fractions(3))) == 66
    )
    assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in fractions)
    costs, qualities = (1.0, 4.0, 10.0), (0.2, 0.8, 1.0)
    rows = [
        (each, *(sum(f * v for f, v in zip(each, values)) for values in (costs, qualities)))
        for each in fractions
    ]
    best = tstitch.pick(rows, 4.0)
    assert best[0] == (0.0, 1.0, 0.0) and all(row[2] <= best[2] for row in rows if row[1] <= 4.0)
    with pytest.raises(ValueError, match=r"(?=.*\b0\.5\b).*\b1\b"):
        tstitch.pick(rows, 0.5)


def test_tstitch_command(tmp_path, capsys):
    small, large = (
        train_small(
            tmp_path / name,
            "--model-args",
            json.dumps(
                dict(
                    base_channels=width,
                    emb_channels=16,
                    channel_multiplier=[1, 2],
                    num_res_blocks=[1],
                    num_transformer_blocks=1,
                )
            ),
        )
        for name, width in (("small", 8), ("large", 16))
    )
    runs, out = [str(small), str(large)], str(tmp_path / "out.npz")
    call(tstitch.main, *runs, "--fraction 0.5 --steps 4 --n 10 --batch 4 --guidance 2 --out", out)
    (a, config, schedule), (b, *_) = map(load, runs)
    nets = [in_bf16(net, config["bf16"]) for net in (a, b)]
    x = sample(
        tstitch.stitch(nets, (0.5, 0.5), schedule),
        (2, 3, 32, 32),
        schedule,
        steps=4,
        sampler="ddim",
        label=torch.tensor([8, 9]),
        guidance=2.0,
        first=8,
    )
    with np.load(out) as written:
        assert np.array_equal(
            written["arr_0"][8:], sampling.to_uint8(x).permute(0, 2, 3, 1)
        ) and written["y"].tolist() == list(range(10))
    call(tstitch.main, *runs, "--interleave --steps 2 --n 10 --out", tmp_path / "grid.png")
    capsys.readouterr()
    call(tstitch.main, *runs, "--cosine --steps 3 --n 4 --guidance 2")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].endswith(" 1.0000")
    other = train_small(
        tmp_path / "other", "--model-args", '{"base_channels": 8}', "--schedule shifted:16"
    )
    for options, message in (
        (runs, r"(?=.*--interleave\b)(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 0.5 --cosine"], r"(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 1.5"], r"\b1\.5\b"),
        (
            [runs[0], other, "--fraction 0.5"],
            rf"(?=.*\bschedule\b).*{re.escape(str(other))}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(tstitch.main, options)
