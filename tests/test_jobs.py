"""Tests of sampling as a job: folders that are continued, and packed into one file."""

import json
import os
import random
import re
import shlex
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample as sampling
import train
from support import jobs
from support import strip as strip_module
from support.checkpoint import FORMAT, build_net
from tests.helpers import (
    TINY_RUN,
    Forked,
    call,
    content_of,
    measured,
    named,
    on_ranks,
    outcome,
    photo,
    private_memory,
    randomize,
    start_ranks,
    wait_for,
)

DRAW = "--batch 2 --steps 2 --no-bf16"


def images_of(folder):
    """The bytes of all images in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def names(*numbers):
    """The names of the images with these numbers."""
    return [f"{number:06d}.png" for number in numbers]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a job of eight images that nothing has disturbed. Tests copy it."""
    folder = tmp_path_factory.mktemp("whole")
    call(sampling.main, run, DRAW, "--n 8 --out", f"{folder}/")
    return folder


@pytest.fixture
def job(whole, tmp_path):
    """A copy of the folder `whole`."""
    return shutil.copytree(whole, tmp_path / "job")


# ---------------------------------------------------------------- continuing


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_job_that_is_killed_ten_times_draws_the_same_images(run, tmp_path, world):
    options = "--number 90 --batch 2 --steps 8 --no-bf16 --device cpu"
    call(sampling.main, run, options, "--out", f"{tmp_path}/whole/")
    expected = images_of(tmp_path / "whole")
    assert len(expected) == 90

    # Kill all ranks at a random moment of a round, after a few more images.
    folder = tmp_path / "killed"
    seconds = random.Random(world)
    for i in range(10):
        ranks = start_ranks(sampling.main, run, options, "--out killed/", cwd=tmp_path, world=world)
        few = 5 * (i + 1)
        wait_for(lambda few=few: len(list(folder.glob("*.png"))) >= few, ranks[0], 60)
        time.sleep(seconds.uniform(0, 0.1))
        for rank in ranks:
            assert rank.poll() is None, rank.communicate()
            rank.kill()
        for rank in ranks:
            rank.communicate()
    kept = images_of(folder)
    assert 50 <= len(kept) < 90

    # The last command draws the missing ones only, on another number of ranks.
    statuses, output, errors = on_ranks(
        sampling.main, run, options, "--out killed/", cwd=tmp_path, world=3 - world
    )
    assert set(statuses) == {0}, errors
    there, missing = re.search(r"killed/: (\d+) of 90 images .* (\d+) are missing", output).groups()
    assert int(there) <= len(kept)
    assert int(there) + int(missing) == 90
    assert images_of(folder) == expected
    assert sorted(os.listdir(folder)) == sorted([*expected, "job.json"])


def test_incomplete_images_are_drawn_again(run, whole, job, capsys):
    content = (whole / "000002.png").read_bytes()
    (job / "000001.png").write_bytes(b"")
    (job / "000002.png").write_bytes(content[:-1])
    (job / "000003.png").write_bytes(content[: len(content) // 2])
    (job / "000004.png").write_bytes(bytes(len(content)))
    (job / "000005.png").write_bytes(content[:-12] + bytes(12))
    (job / "000006.png").unlink()
    (job / "000006.png.part").write_bytes(content[:99])
    before = {name: os.stat(job / name).st_mtime_ns for name in names(0, 7)}
    call(sampling.main, run, DRAW, "--n 8 --out", f"{job}/")
    assert f"{job}/: 2 of 8 images are there, 6 are missing" in capsys.readouterr().out
    assert images_of(job) == images_of(whole)

    # What is whole stays. A second command has nothing to do.
    call(sampling.main, run, DRAW, "--n 8 --out", f"{job}/")
    output = capsys.readouterr().out
    assert f"{job}/: 8 of 8 images are there, 0 are missing" in output
    assert "wrote 0 images" in output
    for name, time_written in before.items():
        assert os.stat(job / name).st_mtime_ns == time_written


def test_batches_have_one_size_whatever_is_missing(run, job, monkeypatch):
    sizes = []
    draw = sampling.sample

    def recorded(net, shape, *args, **options):
        sizes.append(shape[0])
        return draw(net, shape, *args, **options)

    monkeypatch.setattr(sampling, "sample", recorded)
    for number in (1, 4, 7):
        (job / names(number)[0]).unlink()
    call(sampling.main, run, DRAW, "--n 8 --out", f"{job}/")
    call(sampling.main, run, DRAW, "--n 9 --out", f"{job}/")
    assert sizes == [2, 2, 2]


def test_a_job_grows(run, whole, tmp_path):
    # First images 2 to 4, then 0 and 1, then all up to 7: the numbers and labels stay the same.
    out = ["--out", f"{tmp_path}/grown/"]
    for numbers in ("--first 2 --n 3", "--n 2", "--n 8"):
        call(sampling.main, run, DRAW, numbers, *out)
    assert images_of(tmp_path / "grown") == images_of(whole)
    record = json.loads(content_of(tmp_path / "grown/job.json"))
    assert (record["first"], record["n"]) == (0, 8)

    # A smaller --n is the same job, too.
    call(sampling.main, run, DRAW, "--n 1", *out)
    assert images_of(tmp_path / "grown") == images_of(whole)


def test_two_processes_share_a_folder(run, whole, tmp_path):
    # They start at the same time, without torchrun. The last one draws what the others draw, too.
    parts = ("--n 4", "--first 4 --n 4", "--first 2 --n 4")
    processes = [
        Forked(sampling.main, run, DRAW, part, "--out shared/", cwd=tmp_path) for part in parts
    ]
    for process in processes:
        _, errors = process.communicate(60)
        assert process.poll() == 0, errors
    assert images_of(tmp_path / "shared") == images_of(whole)
    assert sorted(os.listdir(tmp_path / "shared")) == [*names(*range(8)), "job.json"]


def test_first_shifts_images_and_labels(run, whole, tmp_path):
    options = [DRAW, "--first 3 --n 5 --out"]
    call(sampling.main, run, *options, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["y"].tolist() == [3, 4, 5, 6, 7]
        for number, image in zip(range(3, 8), samples["arr_0"]):
            assert np.array_equal(image, Image.open(whole / names(number)[0]))
    call(sampling.main, run, *options, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for i in range(5):
        image = grid[:32, 34 * i : 34 * i + 32]
        assert np.array_equal(image, Image.open(whole / names(3 + i)[0]))
    assert "--first" in outcome(sampling.main, [run, "--first -1"])


# ---------------------------------------------------------------- settings


def assert_refused(folder, words, *line):
    """Assert that a command names these words in its one-line error, and changes no file."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    message = outcome(sampling.main, [*line, "--n 9 --out", f"{folder}/"])
    assert re.search(named(folder, *words.split()), message), message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


OTHERS = [
    ("steps 2 3", "--steps 3"),
    ("sampler ddpm ddim", "--sampler ddim"),
    ("grid t logsnr", "--grid logsnr"),
    ("guidance 1.0 2.0", "--guidance 2"),
    ("guidance_interval None", "--guidance-interval -3 3"),
    ("interpolation 0.2 0.5", "--interpolation 0.5"),
    ("clip static dynamic", "--clip dynamic"),
    ("seed 0 1", "--seed 1"),
    ("labels", "--label star"),
    ("bf16 False True", "--bf16"),
]


@pytest.mark.parametrize("words, option", OTHERS, ids=[words.split()[0] for words, _ in OTHERS])
def test_another_job_is_refused(run, job, words, option):
    assert_refused(job, words, run, DRAW, option)


def test_other_weights_are_refused(run, job, tmp_path):
    assert_refused(job, "step 6 4", f"{run}/ckpt_0000004.pt", DRAW)

    # Other weights at the same step; and another schedule with the same weights.
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    path = tmp_path / "ckpt_0000006.pt"
    schedule = state["config"] | dict(schedule="shifted:16")
    torch.save(state | dict(config=schedule), path)
    assert_refused(job, "schedule cosine shifted:16", path, DRAW)
    state["ema"][min(state["ema"])] += 1e-3
    torch.save(state, path)
    assert_refused(job, "weights", path, DRAW)


def test_every_recorded_setting_is_compared(run, job):
    record = jobs.read_job(job)
    settings = {key: value for key, value in record.items() if key not in jobs.RECORDS}
    assert len(settings) >= 17
    jobs.compare_job(job, record, settings)
    for key in settings:
        with pytest.raises(ValueError, match=named(key, "other")):
            jobs.compare_job(job, record | {key: "other"}, settings)
        with pytest.raises(ValueError, match=named(key)):
            jobs.compare_job(job, {k: x for k, x in record.items() if k != key}, settings)
    with pytest.raises(ValueError, match="future"):
        jobs.compare_job(job, record | dict(future=None), settings)

    # A GPU draws other noise.
    (job / "job.json").write_text(json.dumps(record | dict(device="cuda")))
    assert_refused(job, "device cuda cpu", run, DRAW)

    # The batch size is not a setting, and neither is the name of the same checkpoint.
    (job / "job.json").write_text(json.dumps(record))
    call(sampling.main, f"{run}/ckpt_0000006.pt", DRAW, "--batch 3 --n 8 --out", f"{job}/")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A checkpoint of an untrained network for captions of 8 bytes, also of portrait images."""
    folder = tmp_path_factory.mktemp("text")
    widths = dict(base_channels=8, emb_channels=16, channel_multiplier=(1, 2))
    blocks = dict(num_res_blocks=(1,), num_transformer_blocks=1)
    texts = dict(text_tokens=8, text_dim=0, portrait=True)
    for name, dim in (("bytes", 0), ("embeddings", 3)):
        model_args = dict(res=(16, 32), num_classes=0) | widths | blocks | texts
        model_args |= dict(text_dim=dim)
        torch.manual_seed(0)
        weights = dict(randomize(build_net("uvit", model_args)).state_dict())
        config = dict(model="uvit", model_args=model_args, classes=[], schedule="cosine")
        config |= dict(bf16=False, res="16x32", sampling={})
        state = dict(format=FORMAT, config=config, step=1, images=1, net=weights, ema=weights)
        torch.save(state | dict(optimizer={}), folder / f"{name}.pt")
    return folder


PROMPTS = ["--prompt", "a ring", "a star", "--guidance 2"]


def test_another_job_with_texts_is_refused(text_run, tmp_path):
    path, folder = text_run / "bytes.pt", tmp_path / "job"
    call(sampling.main, path, DRAW, *PROMPTS, "--n 3 --out", f"{folder}/")
    guided = "--guidance 2"
    assert_refused(folder, "prompts", path, DRAW, "--prompt", "a ring", "a moon", guided)
    assert_refused(folder, "negative None dark", path, DRAW, *PROMPTS, "--negative dark")
    assert_refused(folder, "portrait False True", path, DRAW, *PROMPTS, "--portrait")
    encoder = "text_encoder None bytes"
    assert_refused(folder, encoder, path, DRAW, *PROMPTS, "--text-encoder bytes")

    # Image k takes prompt k mod 2, also in a file of prompts with the same lines.
    (tmp_path / "prompts.txt").write_text("a ring\na star\n")
    prompts = ["--prompts", tmp_path / "prompts.txt", guided]
    call(sampling.main, path, DRAW, *prompts, "--n 5 --out", f"{folder}/")
    call(sampling.main, path, DRAW, *prompts, "--first 1 --out", tmp_path / "two.npz")
    with np.load(tmp_path / "two.npz") as two:
        assert two["prompts"].tolist() == ["a star", "a ring"]
        assert np.array_equal(two["arr_0"][1], Image.open(folder / "000002.png"))

    # Embeddings are compared by a checksum.
    path, folder = text_run / "embeddings.pt", tmp_path / "embedded"
    array = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    for name, values in (("one.npy", array), ("other.npy", array + 0.1)):
        np.save(tmp_path / name, values)
    call(sampling.main, path, DRAW, "--prompts", tmp_path / "one.npy", "--out", f"{folder}/")
    assert_refused(folder, "embeddings", path, DRAW, "--prompts", tmp_path / "other.npy")
    assert len(images_of(folder)) == 2


# ---------------------------------------------------------------- files of a folder


def test_a_folder_without_a_job_is_refused(run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo().save(folder / "000000.png")
    assert_refused(folder, "job.json", run, DRAW)

    # A process that was killed at its start leaves no obstacle.
    (folder / "000000.png").unlink()
    (folder / "job.json.machine.77").write_bytes(b"{")
    call(sampling.main, run, DRAW, "--n 1 --out", f"{folder}/")
    assert (folder / "000000.png").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"{", b'{"command": "a", "first": 0, "n": "2"}']
)
def test_a_job_file_of_another_program_is_refused(run, tmp_path, content):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "job.json").write_bytes(content)
    assert_refused(folder, "job.json", run, DRAW)
    assert "job.json" in outcome(sampling.main, [folder, "--out", f"{tmp_path}/out.npz"])
    assert not (tmp_path / "out.npz").exists()


def test_job_files_are_not_replaced(tmp_path, monkeypatch):
    # Another process has written job.json since this one looked.
    folder = str(tmp_path)
    jobs.write_job(folder, dict(command="one", first=0, n=1), replace=False)
    jobs.write_job(folder, dict(command="two", first=0, n=1), replace=False)
    assert jobs.read_job(folder)["command"] == "one"
    jobs.write_job(folder, dict(command="one", first=0, n=2), replace=True)
    assert jobs.read_job(folder)["n"] == 2
    assert os.listdir(folder) == ["job.json"]

    # A file system without links.
    def link(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    jobs.write_job(folder, dict(command="two", first=0, n=1), replace=False)
    assert jobs.read_job(folder)["command"] == "one"
    os.remove(tmp_path / "job.json")
    jobs.write_job(folder, dict(command="two", first=0, n=1), replace=False)
    assert jobs.read_job(folder)["command"] == "two"
    assert os.listdir(folder) == ["job.json"]


def test_an_image_that_another_process_has_renamed_first(tmp_path, monkeypatch):
    image = np.zeros((1, 4, 4, 3), np.uint8)
    rename = os.replace

    def twice(part, path):
        rename(part, path)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "replace", twice)
    jobs.write_folder([([3], torch.from_numpy(image))], tmp_path)
    assert jobs.missing_images(tmp_path, range(5)) == [0, 1, 2, 4]

    # Any other error of the disk is reported.
    def full(part, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="000004.png"):
        jobs.write_folder([([4], torch.from_numpy(image))], tmp_path)


def test_other_commands_read_the_folder(job, tmp_path):
    (job / "000001.png.part").write_bytes(b"part")
    assert len(fid.ImageReader(job)) == 8
    options = "--features tests.helpers:Colors"
    lines, _ = measured(job, job, options)
    assert "8" in lines[0]
    run = ["--data", job, "--batch 4 --steps 1 --workers 0 --out", tmp_path / "run"]
    call(train.main, *TINY_RUN, *run)
    packed = ["--data", job, "--res 32 --pack", tmp_path / "packed.npz"]
    call(train.main, *packed)
    assert len(np.load(tmp_path / "packed.npz")["x"]) == 8


# ---------------------------------------------------------------- packing


def assert_equal_arrays(path, expected):
    """Assert that two .npz files hold the same arrays."""
    with np.load(path) as one, np.load(expected) as other:
        assert sorted(one) == sorted(other)
        for name in other:
            assert one[name].dtype == other[name].dtype
            assert np.array_equal(one[name], other[name])


def test_a_packed_folder_equals_the_direct_file(run, job, tmp_path, capsys):
    call(sampling.main, run, DRAW, "--n 8 --out", tmp_path / "direct.npz")
    capsys.readouterr()
    call(sampling.main, f"{job}/", "--out", tmp_path / "new/packed.npz")
    assert f"wrote 8 images to {tmp_path}/new/packed.npz" in capsys.readouterr().out
    assert_equal_arrays(tmp_path / "new/packed.npz", tmp_path / "direct.npz")

    # A part of it, without the slash.
    call(sampling.main, run, DRAW, "--first 2 --n 4 --out", tmp_path / "direct.npz")
    call(sampling.main, job, "--first 2 --n 4 --out", tmp_path / "packed.npz")
    assert_equal_arrays(tmp_path / "packed.npz", tmp_path / "direct.npz")


def test_packing_from_zero_differs_from_packing_what_is_there(run, tmp_path):
    call(sampling.main, run, DRAW, "--first 2 --n 3 --out", f"{tmp_path}/samples/")
    call(sampling.main, f"{tmp_path}/samples/", "--n 3 --out", tmp_path / "packed.npz")
    with pytest.raises(ValueError, match=named("2 of 3", "missing")):
        call(sampling.main, f"{tmp_path}/samples/", "--first 0 --n 3 --out", tmp_path / "no.npz")


def test_hidden_files_do_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"")
    jobs.check_folder(str(tmp_path))
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not empty"):
        jobs.check_folder(str(tmp_path))


def test_a_packed_folder_has_its_prompts(text_run, tmp_path):
    array = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", array)
    embedded = ["--prompts", tmp_path / "embeddings.npy"]
    for name, prompts in (("bytes", PROMPTS), ("embeddings", embedded)):
        line = [text_run / f"{name}.pt", DRAW, *prompts, "--portrait --n 3 --out"]
        call(sampling.main, *line, tmp_path / "direct.npz")
        call(sampling.main, *line, f"{tmp_path}/{name}/")
        call(sampling.main, f"{tmp_path}/{name}", "--out", tmp_path / "packed.npz")
        assert_equal_arrays(tmp_path / "packed.npz", tmp_path / "direct.npz")
        with np.load(tmp_path / "packed.npz") as packed:
            assert packed["arr_0"].shape == (3, 32, 16, 3)
            assert ("prompts" in packed) == (name == "bytes")


def test_a_strip_of_portrait_images(text_run, tmp_path):
    line = [text_run / "bytes.pt", "--steps 3 --no-bf16 --n 2 --portrait", *PROMPTS, "--out"]
    call(sampling.main, *line, tmp_path / "samples.npz", "--sampler ddim")
    call(sampling.main, *line, tmp_path / "strip.png", "--sampler ddim --strip")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_0"].shape == (2, 32, 16, 3)

        # The last x_hat is about the sample.
        scale = -(-strip_module.TILE // 16)
        left = strip_module.LEFT + 2 * (16 * scale + 8)
        top = strip_module.TOP + 32 * scale + 8
        shown = strip[top : top + 32 * scale : scale, left : left + 16 * scale : scale]
        assert abs(shown.astype(int) - samples["arr_0"][0]).max() <= 2


def test_packing_finds_images_beyond_the_recorded_range(job, tmp_path):
    # Of two processes that extended the range at the same moment, job.json may record one.
    folder = shutil.copytree(job, tmp_path / "samples")
    record = jobs.read_job(folder)
    end = record["first"] + record["n"]
    shutil.copy(jobs.image_path(folder, end - 1), jobs.image_path(folder, end + 1))
    with pytest.raises(ValueError, match=named("1 of", end + 2 - record["first"], "missing")):
        jobs.choose_range(f"{folder}/", record, None, None)
    assert jobs.choose_range(f"{folder}/", record, record["n"], record["first"])[-1] == end - 1


def test_packing_names_the_command_that_draws_missing_images(run, job, tmp_path):
    # The job was continued for 12 images, but was killed.
    call(sampling.main, run, DRAW, "--n 12 --out", f"{job}/")
    for number in (3, 10, 11):
        (job / names(number)[0]).unlink()
    pack = [job, "--out", tmp_path / "packed.npz"]
    message = outcome(sampling.main, pack)
    assert re.search(named(f"{job}/", "3 of 12"), message)
    assert not (tmp_path / "packed.npz").exists()

    # The command at its end draws them.
    words = shlex.split(message.partition("draws them: ")[2])
    assert words[:2] == ["python", "sample.py"]
    sampling.main(words[2:])
    call(sampling.main, *pack)
    call(sampling.main, run, DRAW, "--n 12 --out", tmp_path / "direct.npz")
    assert_equal_arrays(tmp_path / "packed.npz", tmp_path / "direct.npz")

    # Images that no command has asked for are missing, too.
    assert re.search("2 of 5.*--first 9 --n 5", outcome(sampling.main, [*pack, "--first 9 --n 5"]))


def test_the_recorded_command_repeats_every_option(run, text_run, tmp_path):
    options = (
        "--steps 3 --sampler ddim --grid logsnr --interpolation 0.3 --clip dynamic --guidance 1.5 "
        "--guidance-interval -3 3 --no-bf16 --seed 2 --no-compile --device cpu --batch 2"
    )
    portrait = ["--portrait", "--negative", "a 'dark' one"]
    for line in ([run, options, "--label star,3"], [text_run / "bytes.pt", options, *PROMPTS]):
        line += portrait if "--prompt" in line else []
        folder = tmp_path / f"job {len(line)}"
        call(sampling.main, *line, "--n 2 --out", f"{folder}/")
        expected = images_of(folder)
        (folder / "000001.png").unlink()
        message = outcome(sampling.main, [folder, "--out", f"{tmp_path}/out.npz"])
        sampling.main(shlex.split(message.partition("draws them: ")[2])[2:])
        assert images_of(folder) == expected


def test_packing_refuses_what_it_cannot_do(job, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    for line, words in (
        (["--out", out, "--steps 3"], "--steps"),
        (["--out", out, "--guidance-interval 1 2"], "--guidance-interval"),
        (["--out", tmp_path / "grid.png"], "--out samples.npz"),
        ([], "--out samples.npz"),
        (["--strip --out", tmp_path / "strip.png"], "--strip"),
        (["--first -1 --out", out], "--first"),
        (["--n 0 --out", out], "--n"),
        (["--first 8 --out", out], "--first"),
    ):
        message = outcome(sampling.main, [job, *line])
        assert re.search(named(f"{job}/", *words.split()), message), message

    # An image that is damaged inside, and one of another size.
    content = bytearray((job / "000005.png").read_bytes())
    content[len(content) // 2] ^= 255
    (job / "000005.png").write_bytes(content)
    assert "000005.png" in outcome(sampling.main, [job, "--out", out])
    photo((20, 16)).save(job / "000005.png")
    assert "000005.png" in outcome(sampling.main, [job, "--out", out])

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in outcome(sampling.main, [job, "--out", out])
    assert not list(tmp_path.glob("out.npz*"))


def test_packing_needs_no_memory_for_the_images(job, tmp_path, monkeypatch):
    # 3,000 images of 64 px are 37 MB.
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(8):
        photo((64, 64), number).save(folder / names(number)[0])
    for number in range(8, 3000):
        os.link(folder / names(number % 8)[0], folder / names(number)[0])
    record = json.loads(content_of(job / "job.json"))
    (folder / "job.json").write_text(json.dumps(record | dict(first=0, n=3000)))

    used = []  # memory whenever a part of the images is written
    write_images = jobs.write_images

    def watched(archive, name, shape, batches):
        parts = (used.append(private_memory()) or images for images in batches)
        write_images(archive, name, shape, parts)

    monkeypatch.setattr(jobs, "write_images", watched)
    largest = []
    for n in (256, 3000):
        call(sampling.main, folder, f"--n {n} --out", tmp_path / "packed.npz")
        largest.append(max(used))
    assert len(used) == 4 + 47
    assert largest[1] - largest[0] < 12e6
    with np.load(tmp_path / "packed.npz") as packed:
        assert packed["arr_0"].shape == (3000, 64, 64, 3)
        assert np.array_equal(packed["arr_0"][2999], photo((64, 64), 2999 % 8))
