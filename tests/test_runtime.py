"""Tests of support/runtime.py: locks, signals and the log."""

import os
import shutil
import signal
import time
import types

import pytest
import torch

import train
from support.runtime import duration, has_bf16, join_ranks, run_command, writing
from tests.helpers import (
    HERE,
    TINY_OPTIONS,
    TINY_RUN,
    call,
    content_of,
    last_step,
    log_lines,
    named,
    no_grid,
    outcome,
    start,
    wait_for,
)


@pytest.mark.parametrize(
    "capability, hardware, expected",
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)],
)
def test_bf16_needs_hardware_and_kernels_that_use_it(monkeypatch, capability, hardware, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    assert has_bf16("cpu") == expected


def test_an_apple_gpu_is_never_chosen_and_is_called_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert join_ranks() == (0, 1, torch.device("cpu"))
    assert not capsys.readouterr().err

    # This machine has none: tensors are created elsewhere, and the device is that of their name.
    def empty(size, device):
        return types.SimpleNamespace(device=torch.device(device))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        assert join_ranks("mps") == (0, 1, torch.device("mps"))
        assert "untested" in capsys.readouterr().err
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=named("--device mps")):
            join_ranks("mps")
    with pytest.raises(ValueError, match=named("--device mps")):
        join_ranks("mps")

    # It has no float64 and no bfloat16 of its own.
    assert train.fid_device(torch.device("mps")) == torch.device("cpu")
    assert train.fid_device(torch.device("cuda")) == torch.device("cuda")
    assert not has_bf16("mps")


def test_ranks_that_do_not_connect_name_the_network_interface(monkeypatch):
    def fail(*args, **options):
        raise torch.distributed.DistNetworkError("no route to host\nC++ stack trace:")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(ValueError, match=named("no route to host", "GLOO_SOCKET_IFNAME")) as error:
        join_ranks("cpu")
    assert "\n" not in str(error.value)

    # The same if the connection breaks later.
    def break_off():
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")

    with pytest.raises(SystemExit, match=named("another rank", "GLOO_SOCKET_IFNAME")):
        run_command(break_off)


@pytest.mark.slow
def test_a_second_process_is_rejected_and_a_second_ctrl_c_stops_at_once(tmp_path):
    out = tmp_path / "run"
    # A step of 512 images takes seconds.
    options = [
        f"{HERE}/train.py",
        TINY_OPTIONS,
        "--batch 512 --steps 1000000 --log-every 1 --sample-every 1000000",
        "--save-every 1000000 --out",
        out,
    ]
    with start(*options, cwd=tmp_path) as process:
        wait_for(lambda: last_step(out), process)

        # Training in the same folder is rejected, and does not change the log.
        log = content_of(out / "log.jsonl")
        error = outcome(train.main, [*TINY_RUN, "--steps 2 --out", out])
        assert str(out) in error
        assert content_of(out / "log.jsonl").startswith(log)

        # Send Ctrl-C twice within one step, which has just begun. If the step ended between the
        # two, it would be saved.
        step = last_step(out)
        wait_for(lambda: last_step(out) > step, process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert not errors
    assert not list(out.glob("ckpt*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    # Root can write to any folder, but not to /sys.
    is_root = os.geteuid() == 0
    out = "/sys/run" if is_root else str(tmp_path / "run")
    os.chmod(tmp_path, 0o555)
    with pytest.raises(OSError, match=out):
        call(train.main, *TINY_RUN, "--steps 2 --out", out)
    os.chmod(tmp_path, 0o755)


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    # Both are open at once, as two processes that write the same file.
    path = tmp_path / "file"
    with writing(path, shared=True) as first:
        first.write(b"first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with writing(path, shared=True) as second:
                second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


# What a crash may leave after the last complete line of a log that is resumed at step 4.
RESTS = [b'{"step": 6, "lo', b"\0" * 100, b'{"step": 6}', b"\xff\xfe\n", b"[1]\n"]


def test_a_log_with_an_incomplete_line_is_truncated_and_continued(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    lines = content_of(f"{run}/log.jsonl").splitlines(keepends=True)
    for i, rest in enumerate(RESTS):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", out)
        (out / "log.jsonl").write_bytes(b"".join(lines[:2]) + rest)
        call(train.main, "--out", out)
        assert [line["step"] for line in log_lines(out)] == [2, 4, 6]


def test_duration():
    assert duration(307.4) == "5:07"
    assert duration(3599.6) == "1 h 00 min"
    assert duration(72_300) == "20 h 05 min"
    assert duration(3600 * 24 * 1234.5) == "1,234 days"
