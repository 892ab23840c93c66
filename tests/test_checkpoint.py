"""Tests of support/checkpoint.py: broken, hostile and interrupted files."""

import contextlib
import glob
import io
import os
import pickle
import re
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch

import fid
import sample as sampling
import train
from support.checkpoint import load, load_checkpoint, save_checkpoint
from support.data import open_dataset
from support.settings import DEFAULTS
from tests.helpers import (
    KILLED_RUN,
    Forked,
    call,
    content_of,
    last_step,
    log_lines,
    mutated,
    named,
    no_grid,
    outcome,
    photo,
    resumed_at,
    same_weights,
    wait_for,
)


def test_a_broken_checkpoint_is_skipped(run, tmp_path, monkeypatch, capsys):
    no_grid(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    newest = out / "ckpt_0000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert load_checkpoint(out)["step"] == 4 and "ckpt_0000006.pt" in capsys.readouterr().err
    call(train.main, "--out", out, "--steps 5 --keep 1")
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_0000005.pt",
        "ckpt_0000006.pt",
    ]  # a later one is not counted among the kept
    assert [line["step"] for line in log_lines(out)] == [2, 4, 5]
    call(train.main, "--out", out, "--steps 6 --keep 3")
    assert 4 in resumed_at(capsys.readouterr().out) and load_checkpoint(newest)["step"] == 6
    for path in out.glob("ckpt_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="ckpt_0000005.pt"):
        call(train.main, "--out", out)


def test_moments_of_another_memory_format_are_resumed(run, tmp_path):
    for name, layout in (
        ("plain", torch.contiguous_format),
        ("other", torch.channels_last),
    ):  # as from a CPU, and from a GPU
        (tmp_path / name).mkdir()
        state = torch.load(f"{run}/ckpt_0000004.pt", weights_only=True)
        for moments in state["optimizer"]["state"].values():
            moments.update(
                {
                    key: x.contiguous(memory_format=layout)
                    for key, x in moments.items()
                    if x.ndim == 4
                }
            )
        torch.save(state, tmp_path / name / "ckpt_0000004.pt")
        call(
            train.main,
            "--out",
            tmp_path / name,
            "--steps 5 --model-args",
            '{"checkpoint_resolutions": [8]}',
        )  # may change, too
    plain, other = (load_checkpoint(str(tmp_path / name))["net"] for name in ("plain", "other"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.slow
def test_nothing_is_lost_when_killed_twenty_times_at_random(tmp_path):
    steps, random, parts = 120, np.random.default_rng(0), 0

    def again(out):
        return Forked(train.main, KILLED_RUN, "--steps", steps, "--out", out, cwd=tmp_path)

    process = again("whole")
    process.communicate()
    assert process.poll() == 0
    for kill in range(20):
        before = last_step(tmp_path / "run")
        part = tmp_path / "run" / f"ckpt_{3 * (before // 3 + random.integers(1, 3)):07d}.pt.part"
        process = again("run")
        if kill % 4 == 0:  # as it starts
            time.sleep(random.uniform(0, 2))
        elif kill % 4 == 1:  # some steps later
            wait_for(lambda before=before: last_step(tmp_path / "run") > before, process)
            time.sleep(random.uniform(0, 0.2))
        else:  # while it writes
            wait_for(part.exists, process)
            time.sleep(random.uniform(0, 0.02))
        assert process.poll() is None, process.communicate()
        process.kill()
        output, errors = process.communicate()
        parts += bool(glob.glob(f"{tmp_path}/run/*.part"))
        resumed = resumed_at(output)
        assert not errors and (not output or before - (resumed[0] if resumed else 0) <= 3), (
            kill,
            before,
            output,
            errors,
        )
    process = again("run")
    output, errors = process.communicate()
    assert process.poll() == 0 and not errors and parts >= 3, (parts, errors)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    logs = [
        [
            {key: value for key, value in line.items() if key not in ("img_per_s", "seconds")}
            for line in log_lines(tmp_path / name)
        ]
        for name in ("whole", "run")
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, steps + 1)) and logs[0] == logs[1]
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(tmp_path / "whole"))


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond this size: to the writer the same as a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_good_files(run, sets, tmp_path, monkeypatch, capsys):
    # capsys keeps the output of the command in memory. In a file, it would have the limit, too.
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    shutil.copy(f"{run}/ckpt_0000004.pt", "run")
    good = content_of("run/ckpt_0000004.pt")
    no_grid(monkeypatch)

    # The limits follow from what is written: half of a file, or one byte of the next log line. The
    # log is longer than config.json, so that its limit does not stop config.json.
    config_size = os.path.getsize(f"{run}/config.json")
    log_size = 2 * config_size
    limits = {
        "config.json": config_size // 2,
        "log.jsonl": log_size + 1,
        "ckpt_0000005.pt": len(good) // 2,
    }
    assert log_size < len(good) // 2
    for file, limit in limits.items():
        with (
            contextlib.ExitStack() as stack,
            largest_file(limit),
            pytest.raises(OSError, match=named(f"run/{file}")),
        ):
            if file == "log.jsonl":
                log = stack.enter_context(open("run/log.jsonl", "ab", 0))
                log.write((log_size - log.tell()) * b"\n")
                monkeypatch.setattr(train, "open_log", lambda out, step, log=log: (log, []))
            call(train.main, "--out run --save-every 1 --keep 1")
        assert (
            {"ckpt_0000004.pt", "log.jsonl"}
            <= set(os.listdir("run"))
            <= {"ckpt_0000004.pt", "config.json", "log.jsonl"}
        )
        assert content_of("run/ckpt_0000004.pt") == good
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        no_grid(monkeypatch)

    # With room again, the run continues.
    call(train.main, "--out run --save-every 1 --keep 1")
    assert sorted(os.listdir("run")) == [
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ] and same_weights("run", run)

    # The other files that the commands write, with half the room that the smallest one needs.
    draw = [sampling.main, run, "--n 2 --steps 1 --out"]
    writers = {
        "grid.png": [*draw, "grid.png"],
        "folder/000000.png": [*draw, "folder/"],
        "samples.npz": [*draw, "samples.npz"],
        "packed.npz": [train.main, "--data", sets / "real", "--res 16 --pack packed.npz"],
        "stats.npz": [fid.main, sets / "real", "--features tests.helpers:Colors --save-stats"],
    }
    writers["stats.npz"].append("stats.npz")
    for command in writers.values():
        call(*command)
    limit = min(map(os.path.getsize, writers)) // 2
    for name in glob.glob("*.npz") + glob.glob("*.png") + glob.glob("folder/*"):
        os.remove(name)
    with largest_file(limit):
        for name, command in writers.items():
            with pytest.raises((OSError, ValueError), match=re.escape(name)):
                call(*command)
    assert sorted(os.listdir()) == ["folder", "run"] and os.listdir("folder") == []


def test_a_flipped_bit_in_a_checkpoint_is_found_at_resume(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    content = bytearray((out / "ckpt_0000006.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in the numbers
    (out / "ckpt_0000006.pt").write_bytes(content)
    call(train.main, "--out", out)
    output = capsys.readouterr()
    assert (
        "ckpt_0000006.pt" in output.err and resumed_at(output.out) == [4] and same_weights(out, run)
    )


class Evil:
    """When unpickled, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_untrusted_files_run_no_code_and_write_nothing(run, tmp_path, monkeypatch):
    evil = Evil(str(tmp_path / "owned"))
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    state = load_checkpoint(f"{run}/ckpt_0000004.pt")
    for i, key in enumerate(state):
        torch.save(state | {key: evil}, f"{key}.pt", _use_new_zipfile_serialization=i % 2 == 0)
    with open("plain.pt", "wb") as file:
        pickle.dump(evil, file)
    x = np.zeros((3, 8, 8, 3), np.uint8)
    for name, arrays in dict(
        x=dict(x=np.array([evil] * 3, object)),
        z=dict(z=np.array([evil] * 3, object)),
        y=dict(x=x, y=np.array([evil] * 3, object)),
        mu=dict(mu=np.array([evil], object), sigma=np.eye(1)),
        classes=dict(x=x, y=np.arange(3), classes=np.array([evil] * 3, object)),
    ).items():
        np.savez(f"{name}.npz", **arrays)
    np.save("array.npy", np.array([evil], object), allow_pickle=True)
    picture = io.BytesIO()
    photo().save(picture, "PNG")
    names = [
        "../up.png",
        "a/../../../up.png",
        str(tmp_path / "absolute.png"),
        "..\\up.png",
        "C:\\up.png",
        "link/up.png",
    ]
    for kind, source in (("zip", None), ("pt", f"{run}/ckpt_0000004.pt"), ("npz", "good.npz")):
        np.savez("good.npz", x=x)
        if source:
            shutil.copy(source, f"climbing.{kind}")
        with zipfile.ZipFile(f"climbing.{kind}", "a") as archive:
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, str(tmp_path))
            for name in names:
                archive.writestr(name, picture.getvalue())
    before = sorted(tmp_path.rglob("*"))
    for file in sorted(glob.glob("*")):
        if file.endswith(".pt"):
            with pytest.raises(ValueError, match=file):
                load(file)
            os.mkdir("run")
            shutil.copy(file, "run/ckpt_0000004.pt")
            with pytest.raises(ValueError, match="ckpt_0000004.pt"):
                call(train.main, "--out run")
            shutil.rmtree("run")
        elif file.startswith(("climbing", "good")):
            pictures = fid.ImageReader(file)
            assert len(pictures) == 3 and [pictures[i].shape[2] for i in range(3)] == [
                3,
                3,
                3,
            ]  # of the zip: absolute, C: and link
        elif file == "mu.npz":
            with pytest.raises(ValueError, match=file):
                fid.read_statistics(file)
        elif file == "z.npz":
            with pytest.raises(ValueError, match=file):
                open_dataset(DEFAULTS | dict(data=[file]))
        else:
            with pytest.raises(ValueError, match=file):
                fid.ImageReader(file)
    assert sorted(tmp_path.rglob("*")) == before
    pickle.loads(content_of("plain.pt")).close()
    assert os.path.exists(tmp_path / "owned")  # so it would have worked


def test_mutated_checkpoints_give_one_line_or_success(run, outcomes):
    random = np.random.default_rng(0)
    content = content_of(f"{run}/ckpt_0000004.pt")
    os.mkdir("run")
    for i in range(120):
        if i % 3 == 0:
            with open("run/ckpt_0000004.pt", "wb") as file:
                file.write(mutated(content, random))
        else:  # the settings and the names of the tensors
            with (
                zipfile.ZipFile(f"{run}/ckpt_0000004.pt") as good,
                zipfile.ZipFile("run/ckpt_0000004.pt", "w") as bad,
            ):
                for name in good.namelist():
                    data = good.read(name)
                    bad.writestr(name, mutated(data, random) if name.endswith("data.pkl") else data)
        line = outcome(sampling.main, ["run", "--n 1 --steps 1 --out out.npz"])
        assert os.path.exists("out.npz") == (not line), line
        outcomes["sample"].append(line)
        outcomes["train"].append(
            outcome(
                train.main,
                ["--out run --steps 5 --save-every 1000 --workers 0"],
            )
        )
        for file in glob.glob("out.npz") + glob.glob("run/*"):
            os.remove(file)
    assert all(len(set(lines)) > 3 and "" in lines for lines in outcomes.values()), outcomes


def test_copies_and_leftovers_of_checkpoints_and_freed_space(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in (
        "ckpt_best.pt",
        "ckpt_0000001_good.pt",
        "ckpt_0000003.pt.part",
        "samples_0000003.png.part",
    ):
        shutil.copy(out / "ckpt_0000004.pt", out / name)
    mapped, save = [], save_checkpoint

    def recorded(*args):
        save(*args)
        mapped.append(
            [line for line in content_of("/proc/self/maps").splitlines() if bytes(out) in line]
        )

    monkeypatch.setattr(train, "save_checkpoint", recorded)
    call(train.main, "--out", out, "--steps 10 --save-every 1 --keep 2")
    assert mapped == [[]] * 4  # the checkpoint that was resumed from is gone, and its space free
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_0000001_good.pt",
        "ckpt_0000009.pt",
        "ckpt_0000010.pt",
        "ckpt_best.pt",
    ] and not list(out.glob("*.part"))


def test_a_checkpoint_with_the_old_name_of_the_dataset_is_resumed(run, tmp_path, capsys):
    out = str(tmp_path / "run")
    shutil.copytree(run, out)
    path = f"{out}/ckpt_0000006.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["pictures"] = state["config"].pop("dataset")
    torch.save(state, path)
    call(train.main, "--out", out, "--steps 7")
    resumed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed")]
    assert len(resumed) == 1 and "built-in" not in resumed[0]
    assert load_checkpoint(out)["config"]["dataset"] == "built-in"
