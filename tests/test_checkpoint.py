"""Tests of support/checkpoint.py: broken, hostile and interrupted files."""

import contextlib
import glob
import io
import os
import pickle
import re
import resource
import shutil
import stat
import time
import zipfile

import numpy as np
import pytest
import torch

import fid
import sample as sampling
import train
from support.checkpoint import (
    FORMAT,
    build_net,
    is_sampling,
    list_checkpoints,
    load,
    load_checkpoint,
    save_checkpoint,
)
from support.data import Shapes, open_dataset
from support.settings import DEFAULTS
from tests.helpers import (
    KILLED_RUN,
    TINY_NET,
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
    assert load_checkpoint(out)["step"] == 4
    assert "ckpt_0000006.pt" in capsys.readouterr().err

    # --keep 1 keeps the checkpoint of step 5. The later one does not count.
    call(train.main, "--out", out, "--steps 5 --keep 1")
    assert resumed_at(capsys.readouterr().out) == [4]
    assert sorted(path.name for path in out.glob("ckpt*")) == ["ckpt_0000005.pt", "ckpt_0000006.pt"]
    assert [line["step"] for line in log_lines(out)] == [2, 4, 5]

    # The next run replaces the broken checkpoint.
    call(train.main, "--out", out, "--steps 6 --keep 3")
    assert resumed_at(capsys.readouterr().out) == [5]
    assert load_checkpoint(newest)["step"] == 6

    # If all checkpoints are broken, training does not start again from step 0.
    for path in out.glob("ckpt_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="ckpt_0000005.pt"):
        call(train.main, "--out", out)


def test_a_newer_format_is_refused(run, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(f"{run}/ckpt_0000004.pt", out)
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    torch.save(state | dict(format=FORMAT + 1), out / "ckpt_0000006.pt")

    # Neither training nor sampling falls back to the older checkpoint, and nothing is written.
    for main, *options in ((train.main, "--out", out, "--steps 8"), (sampling.main, out)):
        with pytest.raises(ValueError, match=named("ckpt_0000006.pt", "format", FORMAT + 1)):
            call(main, *options)
    assert sorted(os.listdir(out)) == ["ckpt_0000004.pt", "ckpt_0000006.pt"]


def test_a_gpu_tells_that_old_seeds_have_changed(capsys):
    config = {"steps": 8, "model": "uvit", "size": "tiny", "fsdp": False}
    run = train.Run(config, "runs/x", 0, 1, torch.device("cuda"), Shapes(32))
    run.net, run.step = torch.nn.Linear(2, 2), 4
    for format, told in ((1, True), (2, False)):
        train.announce(run, dict(format=format))
        assert ("64 bits" in capsys.readouterr().out) == told


def test_moments_of_another_shape_are_refused(run, tmp_path):
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    state["optimizer"]["state"][3]["exp_avg"] = torch.zeros(7)
    torch.save(state, tmp_path / "ckpt_0000006.pt")
    with pytest.raises(ValueError, match=named("optimizer")):
        call(train.main, "--out", tmp_path, "--steps 8")
    assert os.listdir(tmp_path) == ["ckpt_0000006.pt"]


def test_moments_of_another_memory_format_are_resumed(run, tmp_path):
    # A CPU saves contiguous moments, a GPU moments in channels_last.
    for name, layout in (("plain", torch.contiguous_format), ("other", torch.channels_last)):
        out = tmp_path / name
        out.mkdir()
        state = torch.load(f"{run}/ckpt_0000004.pt", weights_only=True)
        for moments in state["optimizer"]["state"].values():
            for key, moment in moments.items():
                if moment.ndim == 4:
                    moments[key] = moment.contiguous(memory_format=layout)
        torch.save(state, out / "ckpt_0000004.pt")

        # checkpoint_resolutions is the one network argument that may change.
        net = ["--model-args", '{"checkpoint_resolutions": [8]}']
        call(train.main, "--out", out, "--steps 5", *net)
    plain = load_checkpoint(tmp_path / "plain")["net"]
    other = load_checkpoint(tmp_path / "other")["net"]
    for name, weight in plain.items():
        assert torch.equal(other[name], weight), name


def log_without_times(out):
    """The lines of a run's log, without the entries that measure time."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("img_per_s", "elsewhere", "seconds")
        }
        for line in log_lines(out)
    ]


@pytest.mark.slow
def test_nothing_is_lost_when_killed_twenty_times_at_random(tmp_path):
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    steps = 160
    random = np.random.default_rng(0)

    def train_in(folder):
        """Start or resume a run in another process."""
        return Forked(train.main, KILLED_RUN, "--steps", steps, "--out", folder, cwd=tmp_path)

    # A run without interruption.
    process = train_in("whole")
    process.communicate()
    assert process.poll() == 0

    # A run that is killed at three kinds of moments.
    parts = 0  # how often a kill left a partially written file
    for kill in range(20):
        before = last_step(out)
        name = f"ckpt_{3 * (before // 3 + random.integers(1, 3)):07d}.pt"
        process = train_in("run")
        if kill % 4 == 0:
            # While it starts.
            time.sleep(random.uniform(0, 0.5))
        elif kill % 4 == 1:
            # Some steps later.
            wait_for(lambda before=before: last_step(out) > before, process)
            time.sleep(random.uniform(0, 0.2))
        else:
            # While it writes one of the next two checkpoints.
            wait_for(lambda name=name: list(out.glob(f"{name}.part")), process)
            time.sleep(random.uniform(0, 0.02))
        assert process.poll() is None, process.communicate()
        process.kill()
        output, errors = process.communicate()
        parts += bool(list(out.glob("*.part")))

        # It had resumed at most the 3 steps of --save-every before its last step. If it was killed
        # before it printed anything, this is unknown. A new run prints, but does not resume.
        assert not errors, (kill, errors)
        if output:
            start = (resumed_at(output) or [0])[0]
            assert before - start <= 3, (kill, before, output)
    assert parts >= 3

    # The last process finishes the run.
    process = train_in("run")
    output, errors = process.communicate()
    assert process.poll() == 0, errors
    assert not errors

    # Both runs end with the same weights, log and files.
    assert same_weights(whole, out)
    log = log_without_times(out)
    assert [line["step"] for line in log] == list(range(1, steps + 1))
    assert log == log_without_times(whole)
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond this size: to the writer the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The next two tests use capsys, which keeps the output of a command in memory. A file for the
# output would have the limit, too.


def test_a_full_disk_keeps_the_last_good_files(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    os.mkdir("run")
    shutil.copy(f"{run}/ckpt_0000004.pt", "run")
    good = content_of("run/ckpt_0000004.pt")

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
        with contextlib.ExitStack() as stack:
            if file == "log.jsonl":
                # The run gets a log with log_size bytes of empty lines.
                log = stack.enter_context(open("run/log.jsonl", "ab", 0))
                log.write((log_size - log.tell()) * b"\n")
                patch = stack.enter_context(monkeypatch.context())
                patch.setattr(train, "open_log", lambda out, step, log=log: (log, []))
            stack.enter_context(largest_file(limit))
            with pytest.raises(OSError, match=named(f"run/{file}")):
                call(train.main, "--out run --save-every 1 --keep 1")
        files = set(os.listdir("run"))
        assert files >= {"ckpt_0000004.pt", "log.jsonl"}
        assert files <= {"ckpt_0000004.pt", "log.jsonl", "config.json"}
        assert content_of("run/ckpt_0000004.pt") == good

    # With room again, the run continues.
    call(train.main, "--out run --save-every 1 --keep 1")
    assert sorted(os.listdir("run")) == [
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ]
    assert same_weights("run", run)


def test_a_full_disk_is_reported_and_leaves_no_partial_files(
    run, sets, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    draw = [sampling.main, run, "--n 2 --steps 1 --out"]
    pack = [train.main, "--data", sets / "real", "--res 16 --pack"]
    save_stats = [fid.main, sets / "real", "--features tests.helpers:Colors --save-stats"]
    writers = {
        "grid.png": [*draw, "grid.png"],
        "folder/000000.png": [*draw, "folder/"],
        "samples.npz": [*draw, "samples.npz"],
        "packed.npz": [*pack, "packed.npz"],
        "stats.npz": [*save_stats, "stats.npz"],
    }

    # With room, all files are written.
    for command in writers.values():
        call(*command)
    limit = min(map(os.path.getsize, writers)) // 2
    for name in glob.glob("*.npz") + glob.glob("*.png") + glob.glob("folder/*"):
        os.remove(name)

    # There is room for half of the smallest file.
    with largest_file(limit):
        for name, command in writers.items():
            with pytest.raises((OSError, ValueError), match=re.escape(name)):
                call(*command)
    assert os.listdir() == ["folder"]
    # The settings of the job fit on the disk. The command continues it when there is room.
    assert os.listdir("folder") == ["job.json"]
    call(*writers["folder/000000.png"])
    assert os.path.exists("folder/000000.png")


def test_a_flipped_bit_in_a_checkpoint_is_found_at_resume(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    path = out / "ckpt_0000006.pt"
    content = bytearray(path.read_bytes())
    # The middle of the file is in the numbers of a tensor.
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    call(train.main, "--out", out)
    output, errors = capsys.readouterr()
    assert "ckpt_0000006.pt" in errors
    assert resumed_at(output) == [4]
    assert same_weights(out, run)


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def write_evil_files(state, evil):
    """Write checkpoints and arrays into this folder that unpickle the object evil."""
    # A checkpoint with evil in the place of one entry, in either format of torch.save.
    for i, key in enumerate(state):
        torch.save(state | {key: evil}, f"{key}.pt", _use_new_zipfile_serialization=i % 2 == 0)
    with open("plain.pt", "wb") as file:
        pickle.dump(evil, file)

    # NumPy pickles arrays of objects.
    x = np.zeros((3, 8, 8, 3), np.uint8)
    three = np.array([evil] * 3, object)
    np.savez("x.npz", x=three)
    np.savez("z.npz", z=three)
    np.savez("y.npz", x=x, y=three)
    np.savez("classes.npz", x=x, y=np.arange(3), classes=three)
    np.savez("mu.npz", mu=np.array([evil], object), sigma=np.eye(1))
    np.save("array.npy", np.array([evil], object), allow_pickle=True)


def add_climbing_names(archive, outside):
    """Add images to a zip archive whose names lead out of the folder it would be unpacked in."""
    image = io.BytesIO()
    photo().save(image, "PNG")
    with zipfile.ZipFile(archive, "a") as file:
        # The mode of a symbolic link; its content is the path that it leads to.
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        file.writestr(link, str(outside))
        for name in (
            "../up.png",
            "a/../../../up.png",
            str(outside / "absolute.png"),
            "..\\up.png",
            "C:\\up.png",
            "link/up.png",
        ):
            file.writestr(name, image.getvalue())


def test_untrusted_files_run_no_code_and_write_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    state = load_checkpoint(f"{run}/ckpt_0000004.pt")
    write_evil_files(state, Evil(str(tmp_path / "owned")))
    np.savez("good.npz", x=np.zeros((3, 8, 8, 3), np.uint8))
    shutil.copy("good.npz", "climbing.npz")
    shutil.copy(f"{run}/ckpt_0000004.pt", "climbing.pt")
    for archive in ("climbing.zip", "climbing.pt", "climbing.npz"):
        add_climbing_names(archive, tmp_path)
    before = sorted(tmp_path.rglob("*"))

    # Checkpoints are rejected, for sampling and for training.
    for file in [*(f"{key}.pt" for key in state), "plain.pt", "climbing.pt"]:
        with pytest.raises(ValueError, match=file):
            load(file)
        os.mkdir("run")
        shutil.copy(file, "run/ckpt_0000004.pt")
        with pytest.raises(ValueError, match="ckpt_0000004.pt"):
            call(train.main, "--out run")
        shutil.rmtree("run")

    # Arrays of objects are rejected.
    for file in ("array.npy", "classes.npz", "x.npz", "y.npz"):
        with pytest.raises(ValueError, match=file):
            fid.ImageReader(file)
    with pytest.raises(ValueError, match="mu.npz"):
        fid.read_statistics("mu.npz")
    with pytest.raises(ValueError, match="z.npz"):
        open_dataset(DEFAULTS | dict(data=["z.npz"]))

    # Images in archives are read, but never unpacked. In climbing.zip, three of the six images are
    # found: names with .. count as hidden files.
    for file in ("good.npz", "climbing.npz", "climbing.zip"):
        images = fid.ImageReader(file)
        assert len(images) == 3
        assert [images[i].shape[2] for i in range(3)] == [3, 3, 3]
    assert sorted(tmp_path.rglob("*")) == before

    # Unpickled without protection, the object does create its file.
    pickle.loads(content_of("plain.pt")).close()
    assert os.path.exists(tmp_path / "owned")


def test_mutated_checkpoints_give_one_line_or_success(run, outcomes):
    random = np.random.default_rng(0)
    source = f"{run}/ckpt_0000004.pt"
    content = content_of(source)
    os.mkdir("run")
    for i in range(120):
        if i % 3 == 0:
            with open("run/ckpt_0000004.pt", "wb") as file:
                file.write(mutated(content, random))
        else:
            # data.pkl holds the settings and the names of the tensors.
            with (
                zipfile.ZipFile(source) as good,
                zipfile.ZipFile("run/ckpt_0000004.pt", "w") as bad,
            ):
                for name in good.namelist():
                    data = good.read(name)
                    bad.writestr(name, mutated(data, random) if name.endswith("data.pkl") else data)

        line = outcome(sampling.main, ["run", "--n 1 --steps 1 --out out.npz"])
        assert os.path.exists("out.npz") == (not line), line
        outcomes["sample"].append(line)

        line = outcome(train.main, ["--out run --steps 5 --save-every 1000 --workers 0"])
        outcomes["train"].append(line)
        for file in glob.glob("out.npz") + glob.glob("run/*"):
            os.remove(file)

    # The changes lead to several errors, and some to none.
    for lines in outcomes.values():
        assert len(set(lines)) > 3, outcomes
        assert "" in lines, outcomes


def test_saving_keeps_copies_deletes_leftovers_and_frees_space(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    copies = ["ckpt_0000001_good.pt", "ckpt_best.pt"]
    leftovers = ["ckpt_0000003.pt.part", "samples_0000003.png.part"]
    for name in copies + leftovers:
        shutil.copy(out / "ckpt_0000004.pt", out / name)
    mapped = []

    def save_and_record(*args):
        """Save a checkpoint, then note which files of the run are still memory-mapped."""
        save_checkpoint(*args)
        maps = content_of("/proc/self/maps").splitlines()
        mapped.append([line for line in maps if bytes(out) in line])

    monkeypatch.setattr(train, "save_checkpoint", save_and_record)
    call(train.main, "--out", out, "--steps 10 --save-every 1 --keep 2")

    # While the checkpoint that the run was resumed from is mapped, its space is not freed.
    assert mapped == [[]] * 4
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_0000001_good.pt",
        "ckpt_0000009.pt",
        "ckpt_0000010.pt",
        "ckpt_best.pt",
    ]
    assert not list(out.glob("*.part"))


def test_only_names_that_training_writes_are_checkpoints(tmp_path):
    for name in ("ckpt_3.pt", "ckpt_0000012.pt", "ckpt_10000000.pt", "ckpt_0000004.pt.part"):
        (tmp_path / name).write_bytes(b"")
    names = [os.path.basename(path) for path in list_checkpoints(str(tmp_path))]
    assert names == ["ckpt_0000012.pt", "ckpt_10000000.pt"]


def test_file_systems_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_checkpoint(str(tmp_path), 1, dict(step=1))
    assert os.listdir(tmp_path) == ["ckpt_0000001.pt"]


def test_a_lack_of_memory_is_no_wrong_argument(monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(torch.OutOfMemoryError):
        build_net("uvit", TINY_NET | dict(res=16, num_classes=0))


def test_a_checkpoint_with_the_old_name_of_the_dataset_is_resumed(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    path = out / "ckpt_0000006.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["pictures"] = state["config"].pop("dataset")
    torch.save(state, path)
    call(train.main, "--out", out, "--steps 7")

    # The line lists the settings that changed: the dataset is not among them.
    resumed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed")]
    assert len(resumed) == 1
    assert "built-in" not in resumed[0]
    assert load_checkpoint(out)["config"]["dataset"] == "built-in"


@pytest.mark.parametrize("name", ["steps", "early_steps"])
def test_settings_for_sampling_have_at_least_one_step(name):
    assert is_sampling({name: 1})
    assert not is_sampling({name: 0})
    assert not is_sampling({name: "16"})
