"""Tests of docs/samplers.py: the comparison of samplers at equal cost."""

import numpy as np
import pytest
import torch

import train
from docs import colors, judge, samplers
from schedule import logsnr_schedule_cosine
from tests.helpers import SMALL_NET, call


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_guided_steps_call_the_network_twice(sampler):
    def count(**options):
        return samplers.count_calls(logsnr_schedule_cosine, sampler=sampler, steps=6, **options)

    assert count() == 6
    assert count(guidance=2.0) == 12
    # An interval that contains no step, and one that contains all.
    assert count(guidance=2.0, guidance_interval=(98, 99)) == 6
    assert count(guidance=2.0, guidance_interval=(-99, 99)) == 12


def test_most_steps_of_a_number_of_calls():
    def most(calls, **options):
        return samplers.most_steps(calls, logsnr_schedule_cosine, sampler="ddim", **options)

    assert [most(calls) for calls in (1, 2, 9)] == [1, 2, 9]
    assert [most(calls, guidance=2.0) for calls in (1, 2, 9)] == [0, 1, 4]

    # In an interval, the number lies between those of all steps and of none.
    interval = dict(guidance=2.0, guidance_interval=(-2.0, 2.0))
    assert 9 // 2 < most(9, **interval) < 9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an untrained judge and 20 shapes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    torch.save(judge.Judge(trained=False).state_dict(), judge.WEIGHTS)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(judge.OTHERS, x=images, y=np.arange(20) % 10)
    return tmp_path


def test_command_prints_a_cell_for_each_number_of_calls(small_run, folder, capsys):
    call(samplers.main, small_run, "--n 10 --calls 1 4")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == 3 * ["| ddpm", "| ddim", "| dpmpp"]
    cells = [row.strip("| ").split(" | ")[2:] for row in rows]
    # Without guidance the calls are the steps. One call does not suffice for a guided step.
    for few, more in cells[:3]:
        assert (few[-3:], more[-3:]) == ("(1)", "(4)")
    for few, more in cells[3:6]:
        assert (few, more[-3:]) == ("-", "(2)")


def test_runs_on_other_images_are_refused(sets, folder):
    call(
        train.main, "--data", sets / "real.npz", "--res 32 --steps 1 --batch 2 --out run", SMALL_NET
    )
    for module in (samplers, colors):
        with pytest.raises(ValueError, match="run was not trained on the built-in Shapes"):
            call(module.main, "run")
