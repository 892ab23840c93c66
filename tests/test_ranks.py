"""Tests of training and sampling by several processes, as torchrun starts them."""

import contextlib
import glob
import os
import re
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import fid
import train
from support.checkpoint import load, load_checkpoint
from support.data import Shapes, load_batch
from tests.helpers import (
    HERE,
    KILLED_RUN,
    TINY_RUN,
    Foreign,
    call,
    content_of,
    last_step,
    log_lines,
    named,
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
    """The ids of all processes whose command line contains this text."""
    found = []
    for folder in glob.glob("/proc/[0-9]*"):
        # A process may end meanwhile.
        with contextlib.suppress(OSError):
            if text.encode() in content_of(f"{folder}/cmdline"):
                found.append(int(folder.removeprefix("/proc/")))
    return found


def copy_checkpoint(run, *folders):
    """Copy the run's checkpoint of step 4 into new folders."""
    for folder in folders:
        folder.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", folder)


def grid_of(folder, step):
    """The sample grid of a step, as an array of ints."""
    return np.asarray(Image.open(folder / f"samples_{step:07d}.png")).astype(int)


def without_key_biases(weights):
    """A state dict without the biases of the norms of keys.

    They cancel in the softmax. Their gradients are rounding errors, of which Adam makes whole
    steps.
    """
    return {name: weight for name, weight in weights.items() if "norm_k.bias" not in name}


def assert_close_weights(weights, expected):
    """Assert that two state dicts have the same names, in the same order, and close weights."""
    assert list(weights) == list(expected)
    torch.testing.assert_close(
        without_key_biases(weights), without_key_biases(expected), rtol=0, atol=1e-6
    )


def test_two_ranks_equal_one(run, tmp_path):
    copy_checkpoint(run, tmp_path / "one", tmp_path / "two")

    # One step of 8 images: four micro-batches on one rank, two on each of two ranks.
    call(train.main, "--out", tmp_path / "one", "--steps 5 --micro 2")
    statuses, output, errors = on_ranks(
        train.main, "--out two --steps 5 --micro 2", cwd=tmp_path, prepare=short_grid
    )
    assert statuses == [0, 0], errors
    assert output.count("step 5/5") == 1
    assert resumed_at(output) == [4]

    # Both runs log the same numbers.
    one = log_lines(tmp_path / "one")
    two = log_lines(tmp_path / "two")
    assert len(one) == len(two) == 1
    for key in ("step", "images", "loss", "lr", "grad_norm", "loss_by_logsnr"):
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-5)

    # Both runs draw the same grid.
    assert abs(grid_of(tmp_path / "one", 5) - grid_of(tmp_path / "two", 5)).max() <= 1

    # Loading is strict: it would fail if DDP's prefix "module." were part of the names.
    load(tmp_path / "two")


def report_checksums():
    """Prepare a process: it reports whenever it compares the checksums of a file."""
    skip_grid()
    testzip = zipfile.ZipFile.testzip

    def reported(archive):
        print(f"checked by rank {os.environ['RANK']}")
        return testzip(archive)

    zipfile.ZipFile.testzip = reported


def test_one_rank_checks_the_checkpoint_for_all(run, tmp_path):
    copy_checkpoint(run, tmp_path / "run")
    # The newest checkpoint is broken, which a rank that does not check would not see.
    content = bytearray(content_of(f"{run}/ckpt_0000006.pt"))
    content[len(content) // 2] ^= 255
    (tmp_path / "run" / "ckpt_0000006.pt").write_bytes(content)
    statuses, output, errors = on_ranks(
        train.main, "--out run --steps 5", cwd=tmp_path, prepare=report_checksums
    )
    assert statuses == [0, 0], errors
    assert resumed_at(output) == [4]
    assert "checked by rank 0" in output
    assert "checked by rank 1" not in output
    assert errors.count("ckpt_0000006.pt") == 1


def leave_on_rank_1():
    """Prepare a process: rank 1 works in another folder, as on a machine without a shared disk."""
    skip_grid()
    if os.environ["RANK"] == "1":
        os.chdir("elsewhere")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_must_see_the_same_checkpoints(run, tmp_path, rank):
    (tmp_path / "elsewhere").mkdir()
    copy_checkpoint(run, tmp_path / ("run" if rank == 0 else "elsewhere/run"))
    options = [*TINY_RUN, "--out run --steps 5"]
    statuses, _, errors = on_ranks(train.main, options, cwd=tmp_path, prepare=leave_on_rank_1)
    assert statuses[1] > 0
    found = "ckpt_0000004.pt" if rank == 0 else "no checkpoint"
    assert re.search(named("run", "one folder for all", found), errors), errors


def report_gradients():
    """Prepare a process: at the end it prints how many gradients are in DDP's buckets."""
    skip_grid()
    true_train = train.train

    def reported(run, batches, finished):
        buckets = set()

        def hook(group, bucket):
            buckets.add(bucket.buffer().untyped_storage().data_ptr())
            return default_hooks.allreduce_hook(group, bucket)

        run.model.register_comm_hook(None, hook)
        true_train(run, batches, finished)
        storages = [weight.grad.untyped_storage().data_ptr() for weight in run.net.parameters()]
        inside = sum(storage in buckets for storage in storages)
        largest = max(weight.grad.abs().max().item() for weight in run.net.parameters())
        print(f"in buckets: {inside} of {len(storages)}, {largest}")

    train.train = reported


def test_gradients_of_ddp_exist_once(tmp_path):
    # Two micro-batches per rank and step. Buckets change once, after the first step.
    options = [*TINY_RUN, "--micro 2 --steps 2 --out run"]
    statuses, output, errors = on_ranks(train.main, options, cwd=tmp_path, prepare=report_gradients)
    assert statuses == [0, 0], errors
    found = re.findall(r"in buckets: (\d+) of (\d+), (\S+)", output)
    assert len(found) == 2
    for inside, total, largest in found:
        assert int(inside) == int(total) > 20
        assert float(largest) == 0


@pytest.mark.parametrize(
    "option",
    ["--no-fsdp", pytest.param("--fsdp", marks=pytest.mark.slow)],
)
def test_two_ranks_measure_the_held_out_loss_of_one(run, tmp_path, monkeypatch, option):
    # The two ranks share 33 held-out images, also unevenly, before and after a training step.
    images, labels = load_batch(Shapes(32, first=2**30), range(33))
    x = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "test.npz", x=x, y=labels.numpy(), classes=Shapes.classes)
    copy_checkpoint(run, tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)
    options = "--steps 5 --val-every 1 --val"
    call(train.main, "--out", tmp_path / "one", options, tmp_path / "test.npz")
    statuses, output, errors = on_ranks(
        train.main, "--out two", option, options, "test.npz", cwd=tmp_path, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    assert output.count("held-out loss") == 2
    logs = [log_lines(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert list(one) == list(two)
        for key in one.keys() - {"img_per_s", "seconds", "elsewhere"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    assert [("val_loss" in line, "val_bpd" in line) for line in logs[1]] == [
        (True, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.slow
def test_fsdp_on_any_number_of_ranks_equals_one_rank(run, tmp_path):
    copy_checkpoint(run, tmp_path / "one", tmp_path / "split")
    for steps in (5, 7):
        call(train.main, "--out", tmp_path / "one", "--steps", steps, "--save-every 1")

    # Four ranks continue the checkpoint of one process, and two ranks that of four.
    for resumed, steps, ranks, options in (
        (4, 5, 4, "--save-every 1 --fsdp"),
        (5, 7, 2, "--micro 2 --sample-every 1"),
    ):
        statuses, output, errors = on_ranks(
            train.main,
            "--out split --steps",
            steps,
            options,
            cwd=tmp_path,
            world=ranks,
            prepare=short_grid,
        )
        assert statuses == ranks * [0], errors
        assert resumed_at(output) == [resumed]
        # Each rank holds about its share of the parameters.
        percent = int(re.search(r"parameters \((\d+) %", output)[1])
        assert 0.8 < percent * ranks / 100 < 1.3

    # The weights and the moments agree.
    one = load_checkpoint(tmp_path / "one")
    split = load_checkpoint(tmp_path / "split")
    for key in ("net", "ema"):
        assert_close_weights(split[key], one[key])
    moments = one["optimizer"]["state"]
    split_moments = split["optimizer"]["state"]
    for i in moments:
        for key in moments[i]:
            a, b = moments[i][key], split_moments[i][key]
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7), (i, key)

    # The logs and the grids agree.
    logs = log_lines(tmp_path / "one"), log_lines(tmp_path / "split")
    for a, b in zip(*logs, strict=True):
        for key in ("step", "images", "loss", "lr", "grad_norm", "loss_by_logsnr"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert abs(grid_of(tmp_path / "one", 7) - grid_of(tmp_path / "split", 7)).max() <= 1

    # One process continues the checkpoint of two ranks.
    call(train.main, "--out", tmp_path / "split", "--steps 8 --no-fsdp")
    assert load_checkpoint(tmp_path / "split")["step"] == 8


class Recorder(Foreign):
    """A network that writes the labels it is trained with to the file $SEEN."""

    def forward(self, z, logsnr, label=None):
        if self.training:
            with open(os.environ["SEEN"], "a") as file:
                file.write("".join(f"{i}\n" for i in label.tolist()))
        return super().forward(z, logsnr, label)


def list_on_rank_0():
    """Prepare a process: it reports whenever it lists a folder."""
    images_in_folder = fid.images_in_folder

    def reported(folder):
        print(f"listed by rank {os.environ['RANK']}")
        return images_in_folder(folder)

    fid.images_in_folder = reported


def test_one_rank_lists_the_files_for_all(tmp_path):
    for i in range(5):
        photo(seed=i).save(tmp_path / f"{i}.png")
    options = "--features tests.helpers:Colors --save-stats stats.npz"
    command = fid.main, tmp_path, options
    statuses, output, errors = on_ranks(*command, cwd=tmp_path, prepare=list_on_rank_0)
    assert statuses == [0, 0], errors
    assert output.count("listed by rank 0") == 1
    assert "listed by rank 1" not in output
    assert "N = 5" in output

    # Both ranks report the error of the first.
    (tmp_path / "empty").mkdir()
    statuses, _, errors = on_ranks(fid.main, "empty", options, cwd=tmp_path)
    assert min(statuses) > 0
    assert errors.count("empty contains no images") == 2


def test_another_number_of_ranks_continues_with_the_images_not_yet_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    no_grid(monkeypatch)
    np.savez(tmp_path / "data.npz", x=np.zeros((12, 32, 32, 3), np.uint8), y=np.arange(12))
    options = [
        "--data data.npz --label-drop 0 --workers 0 --no-bf16",
        "--model tests.test_ranks:Recorder --out run",
    ]

    # Two steps of 2 images on one rank, then two steps of 4 on two ranks: each of the 12 images
    # once.
    monkeypatch.chdir(tmp_path)
    call(train.main, *options, "--batch 2 --steps 2")
    statuses, _, errors = on_ranks(
        train.main, *options, "--batch 4 --steps 4", cwd=tmp_path, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    seen = map(int, content_of(tmp_path / "seen").split())
    assert sorted(seen) == list(range(12))


def test_a_rank_that_fails_ends_the_others_with_one_clear_line(tmp_path):
    for i in range(8):
        photo((40, 40), i).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"not an image")
    options = [
        *TINY_RUN,
        "--batch 2 --workers 1 --data",
        tmp_path,
        "--out",
        tmp_path / "run",
    ]
    with torchrun(f"{HERE}/train.py", *options, cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode != 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("train.py")]
    assert sum("5.png" in line for line in lines) == 1, errors
    assert not processes_with(str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_all_processes_of_a_run(tmp_path, ranks):
    out = tmp_path / "run"
    np.savez(tmp_path / "data.npz", x=np.zeros((8, 32, 32, 3), np.uint8))
    options = [
        *TINY_RUN,
        "--log-every 1 --steps 1000000 --sample-every 1000000 --save-every 1000000",
        "--data data.npz --workers 1 --out",
        out,
    ]
    launch, number = (start, signal.SIGINT) if ranks == 1 else (torchrun, signal.SIGTERM)
    process = launch(f"{HERE}/train.py", *options, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: last_step(out), process)
        # The processes that read data get the signal, too.
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    finally:
        left = processes_with(str(tmp_path))
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    # The run names the signal and the step, and has saved this step.
    line = re.search(r"(?m)^(?=.*\bSIG\w+).*\bstep (\d+)", output)
    assert line, output + errors
    checkpoint = f"ckpt_{int(line[1]):07d}.pt"
    assert os.listdir(out).count(checkpoint) == 1, output + errors

    # Without torchrun, the exit status is that of the signal, and no traceback is printed.
    if ranks == 1:
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "Traceback" not in errors, errors
    else:
        assert process.returncode == 1, errors
    assert not left


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(tmp_path):
    options = [*KILLED_RUN, "--steps 40 --out"]
    statuses, _, errors = on_ranks(train.main, *options, "whole", cwd=tmp_path)
    assert statuses == [0, 0], errors

    # Kill rank 1 at steps 8 and 19, when the newest checkpoints are those of steps 6 and 18.
    kills = (8, 19)
    with torchrun(f"{HERE}/train.py", *options, "run", cwd=tmp_path, restarts=2) as process:
        for step in kills:
            wait_for(lambda step=step: last_step(tmp_path / "run") >= step, process)
            (rank1,) = [
                pid
                for pid in processes_with("--out\0run")
                if b"\0RANK=1\0" in content_of(f"/proc/{pid}/environ")
            ]
            os.kill(rank1, signal.SIGKILL)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    # Each restart loses at most the 3 steps since the newest checkpoint.
    resumed = resumed_at(output)
    assert len(resumed) == 2, output
    for step, kill in zip(resumed, kills):
        assert step >= kill - 3, output
    assert same_weights(tmp_path / "whole", tmp_path / "run"), output


def compile_without_grids():
    """Prepare a process: compile with aot_eager, and draw no grids."""
    use_aot_eager()
    skip_grid()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--no-fsdp", "--fsdp"])
def test_compiled_training_on_two_ranks_equals_plain_training_on_one(run, tmp_path, option):
    copy_checkpoint(run, tmp_path / "plain", tmp_path / "compiled")
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

    # Where --compile fails, a warning names it.
    assert "--compile" not in errors
    plain = load_checkpoint(tmp_path / "plain")
    compiled = load_checkpoint(tmp_path / "compiled")
    for key in ("net", "ema"):
        assert_close_weights(compiled[key], plain[key])
