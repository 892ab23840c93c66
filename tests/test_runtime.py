"""Tests of support/runtime.py: locks, signals and the log."""

import os
import shutil
import signal
import time

import pytest
import torch

import train
from support.runtime import has_bf16
from tests.helpers import (
    HERE,
    TINY_OPTIONS,
    TINY_RUN,
    call,
    content_of,
    last_step,
    log_lines,
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


@pytest.mark.slow
def test_a_second_process_is_rejected_and_a_second_ctrl_c_stops_at_once(tmp_path):
    options = [
        f"{HERE}/train.py",
        TINY_OPTIONS,
        "--batch 512 --steps 1000000 --log-every 1 --sample-every 1000000",
        "--save-every 1000000 --out",
        tmp_path / "run",
    ]
    with start(*options, cwd=tmp_path) as process:  # of seconds per step
        wait_for(lambda: last_step(tmp_path / "run"), process)
        log = content_of(tmp_path / "run" / "log.jsonl")
        second = outcome(train.main, [*TINY_RUN, "--steps 2 --out", tmp_path / "run"])
        assert str(tmp_path / "run") in second
        assert content_of(tmp_path / "run" / "log.jsonl").startswith(log)
        step = last_step(tmp_path / "run")
        wait_for(
            lambda: last_step(tmp_path / "run") > step, process
        )  # or the step could end, and be saved, between the two
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, errors = process.communicate(timeout=20)
    assert (
        process.returncode == -signal.SIGINT
        and not errors
        and not list((tmp_path / "run").glob("ckpt*"))
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    root = os.geteuid() == 0
    out = "/sys/run" if root else str(tmp_path / "run")  # where not even root can write
    os.chmod(tmp_path, 0o555)
    with pytest.raises(OSError, match=out):
        call(train.main, *TINY_RUN, "--steps 2 --out", out)
    os.chmod(tmp_path, 0o755)


def test_a_log_with_an_incomplete_line_is_truncated_and_continued(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    for i, rest in enumerate(
        (b'{"step": 6, "lo', b"\0" * 100, b'{"step": 6}', b"\xff\xfe\n", b"[1]\n")
    ):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", out)
        lines = content_of(f"{run}/log.jsonl").splitlines(True)
        (out / "log.jsonl").write_bytes(b"".join(lines[:2]) + rest)
        call(train.main, "--out", out)
        assert [line["step"] for line in log_lines(out)] == [2, 4, 6]
