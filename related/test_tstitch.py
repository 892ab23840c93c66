"""Tests of related/tstitch.py."""

import json
import math
import re

import numpy as np
import pytest
import torch

import fid
import sample as sampling
from related import distill, tstitch
from sample import SAMPLERS, sample, to_uint8
from schedule import logsnr_schedule_cosine, make_schedule
from support.checkpoint import load
from support.runtime import in_bf16
from tests.helpers import (
    TINY_NET,
    Colors,
    Patches,
    call,
    float64,
    short_grid,
    train_small,
)

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


# ---------------------------------------------------------------- the steps


def test_the_linear_schedule_is_that_of_ddpm():
    # The noise of DDPM in 1000 steps, and its continuous limit.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=float64)
    alphas = (1 - betas).cumprod(0)
    exact = (alphas / (1 - alphas)).log()
    t = torch.arange(1, 1001, dtype=float64) / 1000
    torch.testing.assert_close(tstitch.ddpm_linear(t)[50:], exact[50:], rtol=0, atol=0.1)

    # 40 % of its steps end at logsnr -3.6. It is finite and falls.
    assert tstitch.ddpm_linear(torch.tensor(0.6)).item() == pytest.approx(-3.6, abs=0.05)
    levels = tstitch.ddpm_linear(torch.linspace(0, 1, 1001, dtype=float64))
    assert levels[0] == 15
    assert (levels.diff() < 0).all()


def test_steps_spaced_as_in_ddpm_are_shared_by_the_same_rule():
    for tenths in range(11):
        small = Counted(0.0)
        large = Counted(0.0)
        fractions = (tenths / 10, 1 - tenths / 10)
        net = tstitch.stitch([small, large], fractions, tstitch.ddpm_linear)
        call_at_levels(net, 50, tstitch.ddpm_linear)
        assert len(small.levels) == 5 * tenths
        assert len(large.levels) == 50 - 5 * tenths


def test_the_grid_of_nets_with_equal_steps_is_uniform():
    for fractions in ((0.3, 0.7), (0.0, 1.0), (1.0, 0.0), (0.2, 0.5, 0.3)):
        times = tstitch.time_grid(fractions, [None] * len(fractions), 20)
        torch.testing.assert_close(times, torch.linspace(1, 0, 21, dtype=float64))


def test_a_student_draws_its_part_in_its_own_steps():
    # A student of 8 steps draws half of t, then its teacher in steps of 1/64.
    schedule = logsnr_schedule_cosine
    times = tstitch.time_grid((0.5, 0.5), [8, None], 64)
    torch.testing.assert_close(times[:5], 1 - torch.arange(5, dtype=float64) / 8)
    torch.testing.assert_close(times[4:].diff(), torch.full((32,), -1 / 64, dtype=float64))

    # The sampler makes exactly these steps, each by its net.
    student = Counted(0.0)
    teacher = Counted(0.0)
    levels = schedule(times)
    net = tstitch.stitch([student, teacher], (0.5, 0.5), schedule)
    options = dict(steps=len(times) - 1, sampler="ddim", label=torch.tensor([0]))
    sample(net, (1, 3, 4, 4), tstitch.follow(levels), **options)
    assert student.levels == levels[:4].float().tolist()
    assert teacher.levels == levels[4:-1].float().tolist()


def test_a_student_takes_only_steps_that_it_has_learned():
    assert len(tstitch.time_grid((0.25, 0.75), [8, None], 64)) == 2 + 48 + 1
    assert len(tstitch.time_grid((0.0, 1.0), [8, None], 64)) == 64 + 1
    assert len(tstitch.time_grid((0.75, 0.25), [None, 8], 64)) == 48 + 2 + 1
    for fractions, own_steps in (((0.3, 0.7), [8, None]), ((0.3, 0.7), [None, 8])):
        with pytest.raises(ValueError, match=r"--fraction\b.*\b8 steps\b"):
            tstitch.time_grid(fractions, own_steps, 64)


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


def test_without_runs_the_published_pairs_are_printed(capsys):
    call(tstitch.main)
    text = capsys.readouterr().out
    for parameters, gflops, seconds, score in tstitch.PUBLISHED_NETS.values():
        pattern = rf"\b{parameters} M +{gflops} +{seconds} +{score:.2f}\b"
        assert re.search(pattern, text)
    assert re.search(r"\b11\b.*\b11\b.*\b66\b.*\b66\b", text)

    # The times of the paper are about a straight line.
    for seconds, _ in tstitch.PUBLISHED_PAIRS.values():
        line = np.linspace(seconds[0], seconds[-1], 11)
        assert np.corrcoef(line, seconds)[0, 1] ** 2 > 0.98


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """The path of 40 real images. The features are moments of their colors."""
    path = tmp_path / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(path, arr_0=images)
    return path


def table_of(path):
    """The rows of a table."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_the_table_and_the_choice_within_a_budget(runs, reference, tmp_path, capsys):
    out = tmp_path / "table.jsonl"
    features = f"{Colors.__module__}:{Colors.__qualname__}"
    options = f"--table {out} --parts 2 --n 20 --steps 2 --features {features}"
    command = [*runs, options, "--reference", reference]
    call(tstitch.main, command)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    rows = table_of(out)
    assert [row["fractions"] for row in rows] == [[0, 1], [0.5, 0.5], [1, 0]]

    # The distance is that of fid.py, for the samples of --fraction.
    samples = tmp_path / "samples.npz"
    call(tstitch.main, *runs, "--fraction 0.5 --n 20 --steps 2 --out", samples)
    expected = fid.fid(str(reference), str(samples), features=features, device="cpu")
    assert rows[1]["distance"] == pytest.approx(expected, rel=1e-6)
    assert re.search(rf"^0\.5 0\.5 +0\.00 .* {rows[1]['distance']:.2f} ", lines[2])
    assert 0 <= rows[1]["share"] <= 1

    # An interrupted table is continued. The budget is answered by the best row within it.
    text = out.read_text()
    out.write_text("".join(text.splitlines(keepends=True)[:3]))
    fakes = [(1.0, 5.0), (2.0, 3.0)]
    kept = [dict(row, seconds=s, distance=d) for row, (s, d) in zip(rows, fakes)]
    content = [text.splitlines()[0], *map(json.dumps, kept)]
    out.write_text("\n".join(content) + "\n")
    capsys.readouterr()
    call(tstitch.main, command, "--budget 1.5")
    assert "--fraction" in capsys.readouterr().out.splitlines()[-1]
    assert len(table_of(out)) == 3
    assert table_of(out)[:2] == kept

    # A table that was interrupted before its first row.
    out.write_text(content[0] + "\n")
    call(tstitch.main, command)
    assert len(table_of(out)) == 3

    # Other settings, and a budget that is too small.
    with pytest.raises(ValueError, match=r"--table\b.*\bseed\b"):
        call(tstitch.main, command, "--seed 1")
    with pytest.raises(ValueError, match=r"\b1e-06\b"):
        call(tstitch.main, command, "--budget 1e-6")


def test_the_table_of_three_nets(runs, reference, tmp_path, capsys):
    out = tmp_path / "table.jsonl"
    options = f"--table {out} --parts 1 --n 4 --steps 2 --spacing ddpm --features"
    features = f"{Patches.__module__}:{Patches.__qualname__}"
    command = [runs[0], runs[1], runs[0], options, features, "--reference", reference]
    call(tstitch.main, command)
    assert [row["fractions"] for row in table_of(out)] == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    # Features without logits tell nothing about classes.
    assert [row["share"] for row in table_of(out)] == [None] * 3


def test_the_command_stitches_text_runs(tmp_path):
    model = ["--model-args", json.dumps(TINY_NET)]
    run = train_small(tmp_path, "--captions", model)
    out = tmp_path / "out.npz"
    prompts = ["a red star", "a small blue ring, top left"]
    options = "--n 3 --steps 2 --guidance 2 --negative ring"
    call(tstitch.main, run, run, options, "--fraction 0.5 --out", out, ["--prompt", *prompts])
    with np.load(out) as written:
        assert written["prompts"].tolist() == [*prompts, prompts[0]]
        images = written["arr_0"]

    # The same as sample.py draws from one run.
    other = tmp_path / "other.npz"
    options += " --sampler ddim"
    call(sampling.main, run, options, "--out", other, ["--prompt", *prompts])
    with np.load(other) as expected:
        assert np.array_equal(images, expected["arr_0"])

    # A grid, from a file of prompts.
    file = tmp_path / "prompts.txt"
    file.write_text("a star\n")
    grid = tmp_path / "grid.png"
    command = [run, run, "--steps 2 --n 2 --text-encoder bytes --prompts", file]
    call(tstitch.main, command, "--interleave --out", grid)
    assert grid.exists()
    call(tstitch.main, command, "--cosine")
    with pytest.raises(ValueError, match=r"--prompt\b"):
        call(tstitch.main, run, run, "--fraction 0.5")


def test_the_command_stitches_a_student_and_its_teacher(runs, tmp_path):
    teacher = runs[0]
    options = "--steps 4 --teacher-steps 8 --updates 1 --batch 4 --max-guidance 2 --out"
    call(distill.main, teacher, options, tmp_path / "student")
    student = f"{tmp_path / 'student'}-4steps"
    out = tmp_path / "out.npz"
    options = "--n 2 --guidance 1.5 --steps 8 --out"
    command = [student, teacher, options, out]

    # All of t by the student is what sample.py draws from it.
    call(tstitch.main, command, "--fraction 1")
    alone = tmp_path / "alone.npz"
    call(sampling.main, student, "--n 2 --guidance 1.5 --out", alone)
    with np.load(out) as drawn, np.load(alone) as expected:
        assert np.array_equal(drawn["arr_0"], expected["arr_0"])

    # None of it is what the teacher draws.
    call(tstitch.main, command, "--fraction 0")
    call(sampling.main, teacher, "--n 2 --sampler ddim --steps 8 --guidance 1.5 --out", alone)
    with np.load(out) as drawn, np.load(alone) as expected:
        assert np.array_equal(drawn["arr_0"], expected["arr_0"])
    call(tstitch.main, command, "--fraction 0.5")

    for extra, message in (
        ("--fraction 0.4", r"--fraction\b.*\b4 steps\b"),
        ("--fraction 0.5 --guidance 3", r"--guidance\b.*\b2\b"),
        ("--fraction 0.5 --spacing ddpm", r"--spacing\b"),
        ("--interleave", r"--interleave\b"),
        ("--cosine", r"--cosine\b"),
        ("--table x --reference y --parts 10", r"--parts\b.*\b4 steps\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tstitch.main, command, extra)


def test_a_net_is_guided_in_the_interval_of_its_run():
    def net(z, logsnr, label=None):
        return z * label.reshape(-1, 1)

    config = dict(sampling=dict(guidance_interval=[-1.0, 1.0]))
    guided_net = tstitch.guided_run(net, config, 2.0, 0)
    z, label = torch.ones(1, 1), torch.tensor([3])
    assert guided_net(z, torch.tensor([0.0]), label).item() == 6
    assert guided_net(z, torch.tensor([2.0]), label).item() == 3
    everywhere = tstitch.guided_run(net, dict(sampling={}), 2.0, 0)
    assert everywhere(z, torch.tensor([2.0]), label).item() == 6


def test_invalid_options_and_runs_are_rejected(runs, tmp_path):
    other = train_small(tmp_path, "--model-args", '{"base_channels": 8}', "--schedule shifted:16")
    for options, message in (
        (runs, r"(?=.*--interleave\b)(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 0.5 --cosine"], r"(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction 1.5"], r"\b1\.5\b"),
        ([*runs, "--table x.jsonl"], r"--table\b.*--reference\b"),
        ([*runs, "--fraction 0.5 --budget 3"], r"--budget\b.*--table\b"),
        ([*runs, "--table x.jsonl --reference y --budget 0"], r"--budget\b.*\b0\b"),
        ([*runs, "--table x.jsonl --reference y --parts 0"], r"--parts\b.*\b0\b"),
        ([*runs, "--fraction 0.5 --prompt star"], r"--prompt\b"),
        ([runs[0], other, "--fraction 0.5"], rf"(?=.*\bschedule\b).*{re.escape(str(other))}"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tstitch.main, options)
