"""Tests of related/tstitch.py."""

import json
import math
import re

import numpy as np
import pytest
import torch

from related import tstitch
from sample import SAMPLERS, sample, to_uint8
from schedule import logsnr_schedule_cosine, make_schedule
from support.checkpoint import load
from support.runtime import in_bf16
from tests.helpers import call, float64, short_grid, train_small

# ---------------------------------------------------------------- stitching


class Counted:
    """A net that returns a number times z, and keeps the logsnr of each call."""

    num_classes = 3

    def __init__(self, factor):
        self.factor = factor
        self.levels = []

    def __call__(self, z, logsnr, label=None):
        self.levels.append(logsnr[0].item())
        return self.factor * z


def call_at_levels(net, steps, schedule):
    """Call a net at the noise levels of sampling. Returns the levels, from t = 1 on."""
    times = torch.linspace(1, 0, steps + 1, dtype=float64)
    levels = schedule(times)[:-1].float()
    for logsnr in levels:
        net(torch.zeros(1, 1), logsnr[None])
    return levels


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stitching_one_net_equals_sampling_it(sampler):
    schedule = logsnr_schedule_cosine
    small = Counted(0.3)
    large = Counted(-0.2)

    def draw(net):
        label = torch.tensor([0, 2])
        options = dict(steps=200, sampler=sampler, label=label, guidance=2.0)
        return sample(net, (2, 3, 4, 4), schedule, **options)

    # The whole range for one net.
    by_small = draw(small)
    by_large = draw(large)
    assert torch.equal(draw(tstitch.stitch([small, large], (0.0, 1.0), schedule)), by_large)
    assert torch.equal(draw(tstitch.stitch([small, large], (1.0, 0.0), schedule)), by_small)

    # Half of the range for each.
    by_both = draw(tstitch.stitch([small, large], (0.5, 0.5), schedule))
    assert not torch.equal(by_both, by_small)
    assert not torch.equal(by_both, by_large)


@pytest.mark.parametrize("schedule", [logsnr_schedule_cosine, make_schedule("shifted:16", 64)])
def test_stitched_nets_get_their_share_of_the_steps(schedule):
    for steps in (10, 20, 50, 100, 250):
        for tenths in range(11):
            small = Counted(0.0)
            large = Counted(0.0)
            fractions = (tenths / 10, 1 - tenths / 10)
            call_at_levels(tstitch.stitch([small, large], fractions, schedule), steps, schedule)
            assert len(small.levels) == steps * tenths // 10
            assert len(large.levels) == steps - steps * tenths // 10

            # The small net draws the noisier part.
            if small.levels and large.levels:
                assert max(small.levels) < min(large.levels)


def test_interleaved_nets_take_turns():
    small = Counted(0.0)
    large = Counted(0.0)
    net = tstitch.interleaved([small, large], 250, logsnr_schedule_cosine)
    levels = call_at_levels(net, 250, logsnr_schedule_cosine)
    assert small.levels == levels[::2].tolist()
    assert large.levels == levels[1::2].tolist()


def test_a_batch_may_have_several_noise_levels():
    nets = [Counted(1.0), Counted(2.0)]
    stitched = tstitch.stitch(nets, (0.5, 0.5), logsnr_schedule_cosine)
    v = stitched(torch.ones(4, 2), torch.tensor([-9.0, 9.0, -8.0, 8.0]))
    assert v[:, 0].tolist() == [1, 2, 1, 2]


def test_fractions_that_do_not_sum_to_one_are_rejected():
    nets = [Counted(0.0), Counted(0.0)]
    for fractions in ((0.5, 0.6), (-0.5, 1.5), (1.0,), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=re.escape(str(list(fractions)))):
            tstitch.stitch(nets, fractions, logsnr_schedule_cosine)


def test_fractions_for_a_budget():
    # In tenths, two nets have 11 fractions and three nets have 66.
    assert len(tstitch.all_fractions(2)) == 11
    table = tstitch.all_fractions(3)
    assert len(set(table)) == 66
    for fractions in table:
        assert sum(fractions) == pytest.approx(1)
        assert min(fractions) >= 0

    # The middle net alone has the best quality at its cost.
    rows = []
    for fractions in table:
        cost = np.dot(fractions, (1.0, 4.0, 10.0))
        quality = np.dot(fractions, (0.2, 0.8, 1.0))
        rows.append((fractions, cost, quality))
    best = tstitch.pick(rows, 4.0)
    assert best[0] == (0.0, 1.0, 0.0)
    for _, cost, quality in rows:
        if cost <= 4.0:
            assert quality <= best[2]

    # No row is as cheap as 0.5; the cheapest costs 1.
    with pytest.raises(ValueError, match=r"(?=.*\b0\.5\b).*\b1\b"):
        tstitch.pick(rows, 0.5)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def runs(made_once):
    """The folders of a small and a larger run."""

    def make(folder):
        for name, width in (("small", 8), ("large", 16)):
            fields = dict(
                base_channels=width,
                emb_channels=16,
                channel_multiplier=[1, 2],
                num_res_blocks=[1],
                num_transformer_blocks=1,
            )
            with pytest.MonkeyPatch.context() as monkeypatch:
                short_grid(monkeypatch)
                train_small(folder / name, "--model-args", json.dumps(fields))

    folder = made_once("tstitch", make)
    return [str(folder / "small" / "run"), str(folder / "large" / "run")]


def test_the_command_stitches_runs(runs, tmp_path):
    out = tmp_path / "out.npz"
    options = "--fraction 0.5 --steps 4 --n 10 --batch 4 --guidance 2"
    call(tstitch.main, *runs, options, "--out", out)

    # The last batch holds images 8 and 9.
    (small, config, schedule), (large, *_) = map(load, runs)
    nets = [in_bf16(net, config["bf16"]) for net in (small, large)]
    expected = sample(
        tstitch.stitch(nets, (0.5, 0.5), schedule),
        (2, 3, 32, 32),
        schedule,
        steps=4,
        sampler="ddim",
        label=torch.tensor([8, 9]),
        guidance=2.0,
        numbers=[8, 9],
    )
    with np.load(out) as written:
        assert np.array_equal(written["arr_0"][8:], to_uint8(expected).permute(0, 2, 3, 1))
        assert written["y"].tolist() == list(range(10))


def test_the_command_interleaves_runs(runs, tmp_path):
    out = tmp_path / "grid.png"
    call(tstitch.main, *runs, "--interleave --steps 2 --n 10 --out", out)
    assert out.exists()


def test_the_command_prints_the_similarity_of_trajectories(runs, capsys):
    call(tstitch.main, *runs, "--cosine --steps 3 --n 4 --guidance 2")
    # A line for the noise, which is the same for both runs, and one for each step.
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith(" 1.0000")


def test_invalid_options_and_runs_are_rejected(runs, tmp_path):
    other = train_small(tmp_path, "--model-args", '{"base_channels": 8}', "--schedule shifted:16")
    for options, message in (
        (runs, r"(?=.*--interleave\b)(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 0.5 --cosine"], r"(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 1.5"], r"\b1\.5\b"),
        ([runs[0], other, "--fraction 0.5"], rf"(?=.*\bschedule\b).*{re.escape(str(other))}"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tstitch.main, options)
