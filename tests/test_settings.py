"""Tests of support/settings.py: wrong options and wrong values."""

import glob
import math
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample as sampling
import train
from support import settings
from support.checkpoint import load_checkpoint
from support.data import ImageData, load_batch
from support.runtime import pixels
from tests.helpers import HERE, TINY_RUN, arguments, call, command, named, outcome

# Values that are wrong for most options. The test adds files that exist.
VALUES = [
    # Text and numbers.
    "",
    " ",
    "0",
    "-1",
    "1",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e-400",
    "1e400",
    "99999999999999999999",
    "x",
    "é\udcff",
    "a" * 5000,
    # Files, and what looks like an option.
    "/",
    "..",
    "/dev/null",
    "-",
    "--",
    # JSON, as for --model-args.
    "[]",
    "null",
    "{}",
    '{"num_heads": 0}',
    '{"base_channels": "8"}',
    '{"channel_multiplier": 3}',
    '{"num_res_blocks": [-1]}',
    '{"dropout": "much"}',
    '{"emb_channels": -4}',
    '{"patching": []}',
    '{"res": 32}',
    '{"checkpoint_resolutions": 8}',
    # Schedules.
    "shifted:0",
    "shifted:-3",
    "shifted:1e400",
    "interpolated:32",
    "interpolated:nan:64",
    "cosine:",
    # Python objects.
    ":",
    "os:path",
    "os:getcwd",
    "tests.helpers:Foreign",
    "..:x",
    # Devices and labels.
    "meta",
    "cuda:99",
    "star,,3",
    "3,-3",
]


def test_values_of_all_kinds_give_one_line_or_success(run, sets, outcomes):
    random = np.random.default_rng(0)
    paths = [str(sets / "real"), str(sets / "real.npy"), run, f"{run}/config.json"]
    values = VALUES + paths

    # Of each command: its main function, its arguments, and options to add. --what does not exist.
    # An error in the function of --loss keeps its traceback, because it is the user's own code.
    train_options = [settings.flag(row.name) for row in settings.OPTIONS if row.name != "loss"]
    sample_options = arguments(
        "--n --batch --steps --sampler --grid --interpolation --clip --guidance",
        "--guidance-interval --label --seed --model --device --out --what",
    )
    fid_options = arguments(
        "--save-stats --res --weights --features --batch --device --what", sets / "fake.npz"
    )
    commands = [
        (
            train.main,
            arguments(*TINY_RUN, "--steps 1 --out run"),
            [*train_options, "--what"],
        ),
        (
            sampling.main,
            arguments(run, "--n 2 --steps 1 --out out.npz"),
            sample_options,
        ),
        (
            fid.main,
            arguments(sets / "real", sets / "fake.npz", "--features tests.helpers:Colors"),
            fid_options,
        ),
    ]

    for i in range(400):
        main, base, options = commands[i % 3]
        option = options[random.integers(len(options))]
        value = values[random.integers(len(values))]
        count = 2 if option == "--guidance-interval" else 1
        # outcome fails unless the command succeeds or ends with one line.
        line = outcome(main, [*base, option, *[value] * count])
        outcomes[main.__module__].append(line)
        if line:
            assert not os.path.exists("out.npz"), (option, value, line)
        for path in glob.glob("*"):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)

    # Each command has met many different errors, and has also succeeded.
    for lines in outcomes.values():
        assert len(set(lines)) > 20, outcomes
        assert "" in lines, outcomes


def write_bad_files(run, folder):
    """Write the files that the bad commands name into the folder."""
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "broken.png").write_bytes(b"not an image")
    (folder / "broken.pt").write_bytes(b"not a checkpoint")
    (folder / "zero.pt").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    torch.save({"other": 1}, folder / "other.pt")

    # Statistics of features: one good file, one of features that do not exist, one of too few.
    np.savez(folder / "stats.npz", mu=np.zeros(9), sigma=np.eye(9), features="tests.helpers:Colors")
    np.savez(folder / "other.npz", mu=np.zeros(9), sigma=np.eye(9), features="nowhere:Colors")
    np.savez(folder / "few.npz", mu=np.zeros(3), sigma=np.eye(3), features="tests.helpers:Colors")

    # Checkpoints: one without its last EMA weight, and one that names a function as its network.
    state = load_checkpoint(f"{run}/ckpt_0000006.pt")
    most_weights = dict(list(state["ema"].items())[:-1])
    torch.save(state | dict(ema=most_weights), folder / "partial.pt")
    config = state["config"] | dict(model="os:system")
    torch.save(state | dict(config=config), folder / "stranger.pt")
    (folder / "stranger").mkdir()
    shutil.copy(folder / "stranger.pt", folder / "stranger" / "ckpt_0000006.pt")


def bad_commands(run):
    """Pairs of a command line and words that its error message contains."""
    deep_net = '"channel_multiplier":[1,1,1,1,1],"num_res_blocks":[1,1,1,1]'
    return [
        # Data.
        ("train.py --data nowhere", "nowhere"),
        ("train.py --data empty", "empty"),
        ("train.py --data stats.npz --pack stats.npz", "--pack stats.npz"),
        ("train.py --pack shapes.npz", "--pack --data"),
        ("train.py --data stats.npz --pack stats.npy", "--pack .npz"),
        ("train.py --data socket", "socket"),
        # Networks.
        ("train.py --model vit", "--model vit"),
        ("train.py --size huge", "--size tiny small base paper text huge"),
        ("train.py --model tests.helpers:Foreign --size huge", "tests.helpers:Foreign --size huge"),
        ("train.py --res 30", "--res 30 28 32"),
        ("train.py --res 17", "--res 17 16 18"),
        ("train.py --res 250x333", "--res 250x333 224x320 256x320"),
        ("train.py --size paper --res 96", "--size paper --res 128 256 512 96"),
        ("train.py --size paper --res 64", "--size paper --res 128 256 512 64"),
        ('train.py --model-args {"depth":3}', "depth"),
        ("train.py --model-args [1]", "--model-args [1]"),
        ("train.py --model-args {bad", "--model-args {bad"),
        ('train.py --model-args {"dropout":NaN}', "--model-args NaN"),
        ('train.py --model-args {"num_classes":20}', "num_classes"),
        (
            'train.py --model-args {"patching":"conv_4",' + deep_net + "}",
            "conv_4 64 32x32",
        ),
        # Losses and schedules.
        ("train.py --loss eps", "--loss eps"),
        ("train.py --loss loss:eps", "--loss loss:eps"),
        ("train.py --loss loss:diffusion_loss --space v", "--space --loss"),
        ("train.py --space x", "--space x"),
        ("train.py --schedule linear", "linear"),
        # Schedules whose noise does not grow with t, or is less at a higher resolution.
        ("train.py --schedule cosine@0", "cosine@0"),
        ("train.py --schedule cosine@-5", "cosine@-5"),
        ("train.py --schedule interpolated:256:32", "interpolated:256:32"),
        ("train.py --schedule shifted:64 --res 32", "shifted:64 32"),
        # Numbers and devices.
        ("train.py --batch 10 --micro 4", "--batch 10 4"),
        ("train.py --batch 0", "--batch 0"),
        ("train.py --res 0", "--res 0"),
        ("train.py --res 0x32", "--res 0x32"),
        ("train.py --steps -1", "--steps -1"),
        ("train.py --lr nan", "--lr nan"),
        ("train.py --lr inf", "--lr inf"),
        ("train.py --label-drop nan", "--label-drop nan"),
        ("train.py --log-every 0", "--log-every 0"),
        ("train.py --ema 3", "--ema 3"),
        ("train.py --seed -1", "--seed -1"),
        ("train.py --device abacus", "--device abacus"),
        ("train.py --stepz 3", "--stepz"),
        # FIDs.
        ("train.py --fid-every 0", "--fid-every 0"),
        ("train.py --fid-images 1", "--fid-images 1"),
        ("train.py --fid-every 5", "--fid-every --fid-ref"),
        ("train.py --fid-every 5 --fid-ref zero.pt", "--fid-ref zero.pt"),
        (
            "train.py --fid-every 5 --fid-ref stats.npz --fid-features tests.helpers:Plain",
            "--fid-ref stats.npz tests.helpers:Colors tests.helpers:Plain",
        ),
        ("train.py --fid-every 5 --fid-ref other.npz --fid-features nowhere:Colors", "nowhere"),
        (
            "train.py --fid-every 5 --fid-ref few.npz --fid-features tests.helpers:Colors",
            "--fid-ref few.npz 3 9",
        ),
        (
            "train.py --fid-every 5 --fid-ref stats.npz",
            "--fid-ref stats.npz tests.helpers:Colors Inception-2015-12-05",
        ),
        # Runs that cannot be resumed.
        (f"train.py --out {run} --model unet", f"{run} --model uvit unet"),
        (f"train.py --out {run} --res 64", f"{run} --out"),
        ("train.py --out stranger", "os:system"),
        # Checkpoints.
        ("sample.py nowhere", "nowhere"),
        ("sample.py empty", "empty"),
        ("sample.py zero.pt", "zero.pt"),
        ("sample.py broken.pt", "broken.pt"),
        ("sample.py other.pt", "other.pt"),
        ("sample.py partial.pt", "partial.pt"),
        ("sample.py stranger.pt", "os:system"),
        # Options of sampling.
        (f"sample.py {run} --model unet", f"{run} --model uvit unet"),
        (f"sample.py {run} --device abacus", "--device abacus"),
        (f"sample.py {run} --seed -1", "--seed"),
        (f"sample.py {run} --n 0", "--n"),
        (f"sample.py {run} --steps -1", "--steps"),
        (f"sample.py {run} --guidance nan", "--guidance"),
        (f"sample.py {run} --guidance-interval nan 3", "--guidance-interval"),
        (f"sample.py {run} --interpolation nan", "--interpolation"),
        (f"sample.py {run} --guidance-interval 3 -3", "--guidance-interval"),
        (f"sample.py {run} --label 10", "--label 10"),
        (f"sample.py {run} --label cow", "--label cow"),
        (f"sample.py {run} --sampler euler", "euler"),
        (f"sample.py {run} --out bad/", "--out bad/"),
        (f"sample.py {run} --out grid.jpg", "grid.jpg"),
    ]


def test_bad_input_gets_one_clear_line(run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    mains = {"train.py": train.main, "sample.py": sampling.main}
    write_bad_files(run, tmp_path)
    for line, words in bad_commands(run):
        file, *args = line.split()
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            call(mains[file], args)
        message = str(error.value).strip().splitlines()[-1]
        assert re.search(named(*words.split()), message), (line, message)
    assert not os.path.exists("runs")

    # The commands end with one line on stderr and a status that is not zero.
    assert "--label" in outcome(sampling.main, [run, "--label 10"])
    assert "--res" in outcome(train.main, ["--res x"])
    result = command(f"{HERE}/train.py", "--data bad --batch 2 --workers 1 --steps 1", cwd=tmp_path)
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1
    assert "broken.png" in result.stderr


RANGES = [row for row in settings.OPTIONS if row.kind in (int, float)]


@pytest.mark.parametrize("row", RANGES, ids=lambda row: row.name)
def test_numbers_outside_of_their_range_are_rejected(row):
    # Every number has a lower end of its range. Some have an upper end.
    assert row.low > -math.inf
    step = 1 if row.kind is int else 0.001
    ends = [row.low]
    outside = [row.low - step]
    if row.high < math.inf:
        ends.append(row.high)
        outside.append(row.high + step)
    if row.kind is float:
        outside += [math.nan, math.inf]

    flag = settings.flag(row.name)
    for value in outside:
        with pytest.raises(ValueError, match=flag):
            settings.parse([flag, str(value)])
    for value in ends:
        assert settings.parse([flag, str(row.kind(value))]) == {row.name: value}
    with pytest.raises(SystemExit, match=flag):
        settings.parse([flag, "many"])


def test_a_checkpoint_stores_the_settings_of_the_run_and_no_others(tmp_path):
    out = tmp_path / "run"
    call(train.main, *TINY_RUN, "--steps 1 --out", out)
    config = load_checkpoint(out)["config"]
    for row in settings.OPTIONS:
        assert (row.name in config) == row.stored, row.name

    # Their types are valid. A set is of no valid type.
    settings.check_types(config, out)
    for row in settings.OPTIONS:
        if row.stored:
            with pytest.raises(ValueError, match=row.name):
                settings.check_types(config | {row.name: {1, 2}}, out)


@pytest.mark.parametrize("res", ["36", "48x64"])
def test_any_size_that_the_levels_divide_trains_and_samples(res, tmp_path, capsys):
    height, width = pixels(int(res) if res.isdecimal() else res)

    # The derived recipe itself, on Shapes.
    out = tmp_path / "derived"
    options = "--model unet --size tiny --batch 4 --steps 1 --no-bf16 --res"
    call(train.main, options, res, "--out", out)
    assert f"no recipe for {height} px: derived from that for 32 px" in capsys.readouterr().out
    call(sampling.main, out, "--n 2 --steps 1 --out", tmp_path / "samples.npz")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, height, width, 3)

    # Image files, and a tiny network with levels of its own.
    images = np.random.default_rng(0).integers(0, 256, (6, height, width, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"photos/{i}.png")
    line = ["--data", tmp_path / "photos", "--res", res]
    call(train.main, *TINY_RUN, *line, "--size tiny --batch 4 --steps 1 --out", tmp_path / "own")
    assert load_checkpoint(tmp_path / "own")["step"] == 1


@pytest.mark.parametrize("res", [28, "48x64"])
def test_images_of_the_size_of_the_run_are_not_resampled(res, tmp_path):
    height, width = pixels(res)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    expected = {}
    for name in ("a.png", "b.jpg", "c.bmp"):
        Image.fromarray(noise).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            expected[name] = np.asarray(image)
    images, _ = load_batch(ImageData([str(tmp_path)], res), range(3))
    for image, pixels_of_file in zip(images, expected.values()):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels_of_file)
    assert np.array_equal(expected["a.png"], noise)


def test_an_empty_path_is_refused(tmp_path, monkeypatch):
    # As in --data "$UNSET": it would mean the current folder.
    monkeypatch.chdir(tmp_path)
    for name in ("--data", "--val"):
        with pytest.raises(ValueError, match=f"{name}: a path is empty"):
            train.main([name, "", "--out", "run"])
