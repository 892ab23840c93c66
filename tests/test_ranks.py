"""Tests of training and sampling by several processes, as torchrun starts them."""

import contextlib
import glob
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import train
from support.checkpoint import load, load_checkpoint
from tests.helpers import (
    HERE,
    KILLED_RUN,
    TINY_RUN,
    Foreign,
    call,
    content_of,
    last_step,
    log_lines,
    no_grid,
    on_ranks,
    photo,
    resumed_at,
    same_weights,
    short_grid,
    skip_grid,
    start,
    torchrun,
    use_aot_eager,
    wait_for,
)


def processes_with(text):
    """The ids of all processes whose command line has this text in it."""
    found = []
    for folder in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            found += [int(folder[6:])] if text.encode() in content_of(f"{folder}/cmdline") else []
    return found


def test_two_ranks_equal_one(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / name)
    call(train.main, "--out", tmp_path / "one", "--steps 5 --micro 2")
    statuses, output, errors = on_ranks(
        train.main, "--out two --steps 5 --micro 2", cwd=tmp_path, prepare=short_grid
    )
    assert statuses == [0, 0], errors
    assert output.count("step 5/5") == 1
    assert resumed_at(output) == [4]
    one, two = (log_lines(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 1
    for key in (
        "step",
        "images",
        "loss",
        "lr",
        "grad_norm",
        "loss_by_logsnr",
    ):  # by four micro-steps on one rank, and two on each of two
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-5)
    grids = [
        np.asarray(Image.open(tmp_path / name / "samples_0000005.png")).astype(int)
        for name in ("one", "two")
    ]
    assert abs(grids[0] - grids[1]).max() <= 1
    load(tmp_path / "two")  # strictly, so there is no "module." before the names


@pytest.mark.slow
def test_fsdp_on_any_number_of_ranks_equals_one_rank(run, tmp_path):
    for name in ("one", "split"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / name)
    for steps in (5, 7):
        call(train.main, "--out", tmp_path / "one", "--steps", steps, "--save-every 1")
    for steps, ranks, options in (
        (5, 4, ["--save-every 1 --fsdp"]),
        (7, 2, ["--micro 2 --sample-every 1"]),
    ):  # resumed from one process, then from 4
        statuses, output, errors = on_ranks(
            train.main,
            "--out split --steps",
            steps,
            *options,
            cwd=tmp_path,
            world=ranks,
            prepare=short_grid,
        )
        assert statuses == ranks * [0], errors
        assert resumed_at(output) == [4 if steps == 5 else 5]
        assert 0.8 < int(re.search(r"parameters \((\d+) %", output)[1]) * ranks / 100 < 1.3
    one, split = (load_checkpoint(str(tmp_path / name)) for name in ("one", "split"))
    for key in ("net", "ema"):
        assert list(one[key]) == list(split[key])
        # Keys' biases cancel in the softmax: their gradient is rounding alone, of which Adam makes
        # whole steps.
        for name in one[key]:
            assert "norm_k.bias" in name or torch.allclose(
                one[key][name], split[key][name], rtol=0, atol=1e-6
            ), name
    moments, split_moments = one["optimizer"]["state"], split["optimizer"]["state"]
    assert all(
        torch.allclose(moments[i][key], split_moments[i][key], rtol=1e-4, atol=1e-7)
        for i in moments
        for key in moments[i]
    )
    one, split = (log_lines(tmp_path / name) for name in ("one", "split"))
    for key in ("step", "images", "loss", "lr", "grad_norm", "loss_by_logsnr"):
        assert all(
            a[key] == pytest.approx(b[key], rel=1e-4) for a, b in zip(one, split, strict=True)
        )
    grids = [
        np.asarray(Image.open(tmp_path / name / "samples_0000007.png")).astype(int)
        for name in ("one", "split")
    ]
    assert abs(grids[0] - grids[1]).max() <= 1
    call(
        train.main, "--out", tmp_path / "split", "--steps 8 --no-fsdp"
    )  # and a checkpoint of 2 by one process
    assert load_checkpoint(str(tmp_path / "split"))["step"] == 8


class Recorder(Foreign):
    """A net that notes the labels it is trained with."""

    def forward(self, z, logsnr, label=None):
        if self.training:
            with open(os.environ["SEEN"], "a") as file:
                file.write("".join(f"{i}\n" for i in label.tolist()))
        return super().forward(z, logsnr, label)


def test_another_number_of_ranks_continues_with_the_images_not_yet_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    no_grid(monkeypatch)
    np.savez(tmp_path / "data.npz", x=np.zeros((12, 32, 32, 3), np.uint8), y=np.arange(12))
    options = [
        "--data",
        tmp_path / "data.npz",
        "--label-drop 0 --workers 0 --no-bf16 --model tests.test_ranks:Recorder --out",
        tmp_path / "run",
    ]
    call(train.main, *options, "--batch 2 --steps 2")
    statuses, _, errors = on_ranks(
        train.main, *options, "--batch 4 --steps 4", cwd=tmp_path, prepare=skip_grid
    )
    assert statuses == [0, 0], errors

    # 2 x 2 images on one rank, then 2 x 4 on two: each of the 12 images once.
    assert sorted(map(int, content_of(tmp_path / "seen").split())) == list(range(12))


def test_a_rank_that_fails_ends_the_others_with_one_clear_line(tmp_path):
    for i in range(8):
        photo((40, 40), i).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"not an image")
    with torchrun(
        f"{HERE}/train.py",
        *TINY_RUN,
        "--data",
        tmp_path,
        "--batch 2 --workers 1 --out",
        tmp_path / "run",
        cwd=tmp_path,
    ) as process:
        _, errors = process.communicate(timeout=100)
    lines = [
        line for line in errors.splitlines() if line.startswith("train.py") and "5.png" in line
    ]
    assert process.returncode != 0 and len(lines) == 1, errors
    assert not processes_with(str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_all_processes_of_a_run(tmp_path, ranks):
    np.savez(tmp_path / "data.npz", x=np.zeros((8, 32, 32, 3), np.uint8))
    options = [
        *TINY_RUN,
        "--log-every 1 --steps 1000000 --sample-every 1000000 --save-every 1000000",
        "--data data.npz --workers 1 --out",
        tmp_path / "run",
    ]
    process = (torchrun if ranks == 2 else start)(
        f"{HERE}/train.py", *options, cwd=tmp_path, start_new_session=True
    )
    try:
        wait_for(lambda: last_step(tmp_path / "run"), process)
        os.killpg(
            process.pid, signal.SIGTERM if ranks == 2 else signal.SIGINT
        )  # the processes that read data get it, too
        output, errors = process.communicate(timeout=60)
    finally:
        left = processes_with(str(tmp_path))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    line = re.search(r"(?m)^(?=.*\bSIG\w+).*\bstep (\d+)", output)
    assert line and os.listdir(tmp_path / "run").count(f"ckpt_{int(line[1]):07d}.pt") == 1, (
        output + errors
    )
    assert process.returncode == (128 + signal.SIGINT if ranks == 1 else 1) and (
        ranks == 2 or "Traceback" not in errors
    ), errors
    assert not left


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(tmp_path):
    options = [*KILLED_RUN, "--steps 40 --out"]
    statuses, _, errors = on_ranks(train.main, *options, "whole", cwd=tmp_path)
    assert statuses == [0, 0], errors
    script = f"{HERE}/train.py"
    with torchrun(script, *options, "run", cwd=tmp_path, restarts=2) as process:
        for step in (8, 19):  # the newest checkpoints are those of steps 6 and 18
            wait_for(lambda step=step: last_step(tmp_path / "run") >= step, process)
            (rank1,) = [
                pid
                for pid in processes_with("--out\0run")
                if b"\0RANK=1\0" in content_of(f"/proc/{pid}/environ")
            ]
            os.kill(rank1, signal.SIGKILL)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    resumed = resumed_at(output)
    assert (
        len(resumed) == 2
        and resumed[0] >= 8 - 3
        and resumed[1] >= 19 - 3
        and same_weights(tmp_path / "whole", tmp_path / "run")
    ), output


def compile_without_grids():
    use_aot_eager()
    skip_grid()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--no-fsdp", "--fsdp"])
def test_compiled_training_on_two_ranks_equals_plain_training_on_one(run, tmp_path, option):
    for name in ("plain", "compiled"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / name)
    call(train.main, "--out", tmp_path / "plain", "--steps 6 --save-every 1")
    statuses, output, errors = on_ranks(
        train.main,
        "--out compiled --steps 6 --save-every 1 --compile",
        option,
        cwd=tmp_path,
        prepare=compile_without_grids,
    )
    assert statuses == [0, 0], errors
    assert resumed_at(output) == [4]
    assert "--compile" not in errors
    plain, compiled = (load_checkpoint(str(tmp_path / name)) for name in ("plain", "compiled"))
    for key in ("net", "ema"):
        assert list(plain[key]) == list(compiled[key])
        for name, weight in plain[key].items():
            # The gradient of norm_k.bias is rounding alone, of which Adam makes whole steps.
            if "norm_k.bias" not in name:
                torch.testing.assert_close(compiled[key][name], weight, rtol=0, atol=1e-6)
