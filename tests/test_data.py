"""Tests of support/data.py: datasets, their order, and training on them."""

import os
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import sample as sampling
import train
from sample import sample
from support.bench import training_flops
from support.checkpoint import load, load_checkpoint
from support.data import ImageData, Shapes, example_noise, image_order, load_batch, open_dataset
from support.settings import DEFAULTS
from tests.helpers import (
    HERE,
    TINY_RUN,
    call,
    log_lines,
    measured,
    named,
    no_grid,
    on_ranks,
    photo,
    resumed_at,
    skip_grid,
    torchrun,
)


def test_shapes_follow_from_their_index():
    small, large = Shapes(32), Shapes(64)
    x, label = load_batch(small, range(40))
    assert (
        x.dtype == torch.uint8
        and x.shape == (40, 3, 32, 32)
        and label.tolist() == [i % 10 for i in range(40)]
    )
    assert torch.equal(x[7:9], load_batch(small, [7, 8])[0])  # whatever the batch
    assert torch.equal(load_batch(Shapes(32, first=30), range(10))[0], x[30:])
    assert len(torch.unique(x.flatten(1), dim=0)) == 40
    pooled = F.avg_pool2d(
        load_batch(large, range(40))[0].float(), 2
    )  # the same image at any resolution
    assert (pooled - x.float()).abs().mean() < 4
    assert load_batch(Shapes((32, 48)), range(2))[0].shape == (2, 3, 32, 48)


def test_image_data_crops_and_resizes(tmp_path):
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200  # the central square
    wide[:, 20:30, 0] = 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "tall.jpg", quality=100)
    data = ImageData([tmp_path], 10)
    x, label = load_batch(data, [1])
    assert (
        x.shape == (1, 3, 10, 10)
        and x.dtype == torch.uint8
        and label.tolist() == [0]
        and data.classes == []
    )
    assert (x[0, 1, :, 2:8] == 200).all() and (
        x[0, 0, :, 3] - 100.0
    ).abs().max() < 10  # column 3 of 10 was 22 to 26
    turned = load_batch(data, [0])[0][0].mT  # the tall one, through JPEG and its draft mode
    assert (turned - x[0].float()).abs().mean() < 4


def test_every_epoch_sees_each_image_once_for_any_split():
    parts = [range(0, 3), range(3, 6)]

    def seen(parts, images, n):
        stream = image_order(10, 5, 6, images, parts)
        return [next(stream) for _ in range(n)]

    whole = sum(seen([range(6)], 0, 5), [])
    assert (
        sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10)) and whole[:10] != whole[10:20]
    )
    assert sum(seen(parts, 0, 10), []) == whole
    assert sum(seen([range(6)], 18, 2), []) == whole[18:]  # resumed after 18


def test_example_noise_depends_on_the_position_in_the_batch():
    u, eps = example_noise(0, 3, range(4), (3, 8, 8), "cpu")
    u2, eps2 = example_noise(0, 3, range(2, 4), (3, 8, 8), "cpu")
    assert torch.equal(u[2:], u2) and torch.equal(eps[2:], eps2) and len(u.unique()) == 12
    assert not torch.equal(eps, example_noise(0, 4, range(4), (3, 8, 8), "cpu")[1])


@pytest.mark.slow
def test_two_ranks_train_on_latents_and_sample_them_as_one_does(tmp_path):
    path = write_latents(tmp_path / "latents.npz")
    options = [
        "--data",
        path,
        "--res 8 --model-args",
        '{"base_channels": 8, "emb_channels": 16}',
        "--steps 2 --batch 4 --no-bf16 --device cpu",
    ]
    call(train.main, *options, "--out", f"{tmp_path}/one")
    for out, extra in (("two", []), ("split", ["--fsdp"])):
        statuses, _, errors = on_ranks(train.main, *options, *extra, "--out", out, cwd=tmp_path)
        assert statuses == [0, 0], errors
        one, two = (load_checkpoint(f"{tmp_path}/{name}")["net"] for name in ("one", out))
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-3
    options = ["--number 7 --batch 2 --steps 3 --no-bf16 --device cpu"]
    call(sampling.main, f"{tmp_path}/one", *options, "--out", f"{tmp_path}/one.npz")
    with torchrun(
        f"{HERE}/sample.py", f"{tmp_path}/one", *options, "--out two.npz", cwd=tmp_path
    ) as process:
        assert process.wait(300) == 0
    one, two = (np.load(f"{tmp_path}/{name}.npz") for name in ("one", "two"))
    np.testing.assert_allclose(one["z"], two["z"], atol=1e-4)
    assert one["y"].tolist() == two["y"].tolist() and np.abs(one["z"]).max() > 1


def test_training_on_own_images(tmp_path):
    for i in range(6):
        folder = tmp_path / "my set" / ("sun" if i % 2 else "moon")
        folder.mkdir(parents=True, exist_ok=True)
        photo((50, 40), i).save(folder / f"{i}.jpg")
    out = str(tmp_path / "run")
    call(train.main, *TINY_RUN, "--steps 2 --data", tmp_path / "my set", "--workers 1 --out", out)
    assert load(out)[1]["classes"] == ["moon", "sun"]


def write_latents(path, **others):
    generator = np.random.default_rng(0)
    np.savez(
        path,
        **dict(
            z=3 * generator.standard_normal((40, 5, 8, 8)).astype(np.float32),
            y=np.arange(40) % 3,
            classes=["a", "b", "c"],
        )
        | others,
    )
    return str(path)


def test_latents_are_trained_on_and_sampled_unchanged(tmp_path, monkeypatch, capsys):
    path, out, seen, loss = (
        write_latents(tmp_path / "latents.npz"),
        tmp_path / "run",
        [],
        train.diffusion_loss,
    )
    monkeypatch.setattr(
        train,
        "diffusion_loss",
        lambda net, x, schedule, label, **options: (
            seen.append((x, label)) or loss(net, x, schedule, label, **options)
        ),
    )
    call(
        train.main,
        "--data",
        path,
        "--res 8 --model-args",
        '{"base_channels": 8, "emb_channels": 16}',
        "--steps 3 --batch 4 --label-drop 0 --sample-every 1 --workers 0 --out",
        out,
    )
    z, y = np.load(path)["z"], np.load(path)["y"]
    (shown, label), order = seen[0], image_order(40, 0, 4, 0, [range(4)])
    first = next(order)
    assert torch.equal(shown, torch.from_numpy(z[first])) and label.tolist() == y[first].tolist()
    net, config, schedule = load(out)
    assert (
        config["model_args"]["in_channels"] == net.head.conv.out_channels == 5
        and config["flip"] is False
        and config["classes"] == ["a", "b", "c"]
    )
    assert not list(out.glob("*.png")) and training_flops(config) > 0
    call(sampling.main, out, "--n 7 --batch 3 --steps 3 --no-bf16 --out", tmp_path / "z.npz")
    with np.load(tmp_path / "z.npz") as drawn:
        expected = sample(
            net, (7, 5, 8, 8), schedule, steps=3, label=torch.arange(7) % 3, clip=None
        ).numpy()
        np.testing.assert_allclose(drawn["z"], expected, atol=1e-5)
        assert (
            drawn["z"].dtype == np.float32
            and np.abs(drawn["z"]).max() > 1
            and drawn["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        )
    again = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "z.npz")], res=8))
    assert (
        len(again) == 7
        and again.classes == ["a", "b", "c"]
        and again.size == (8, 8)
        and str(again) != str(open_dataset(DEFAULTS | dict(data=[path], res=8)))
    )
    call(train.main, "--out", out, "--steps 4")
    assert resumed_at(capsys.readouterr().out) == [3]
    for args, text in (
        (["--out grid.png"], f"{out} --out"),
        (["--out z.npz --clip static"], f"{out} --clip"),
    ):
        with pytest.raises(ValueError, match=named(*text.split())):
            call(sampling.main, out, *args)
    for model_args in ('{"in_channels": 3}', '{"in_channels": 5}'):
        with pytest.raises(ValueError, match="in_channels"):
            call(train.main, "--model-args", model_args, "--steps 1 --out", tmp_path / "none")
    for args, text in (
        (["--res 16"], "latents.npz 8x8 --res 16"),
        (["--res 8 --flip"], "--flip"),
        (["--res 8 --fid-every 1"], "--fid-every"),
        (["--res 8 --model-args", '{"in_channels": 3}'], "in_channels"),
    ):
        with pytest.raises(ValueError, match=named(*text.split())):
            call(train.main, "--data", path, "--out", tmp_path / "none", *args)
    other = write_latents(tmp_path / "other.npz", z=np.zeros((40, 6, 8, 8), np.float32))
    with pytest.raises(ValueError, match=named(out)):
        call(train.main, "--data", other, "--out", out)


def test_latents_without_labels_and_in_half_precision(tmp_path):
    np.savez(tmp_path / "z.npz", z=np.ones((4, 2, 8, 16), np.float16))
    data = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "z.npz")], res="8x16"))
    z, y = load_batch(data, [0, 3])
    assert (
        z.dtype == torch.float32
        and z.shape == (2, 2, 8, 16)
        and y.tolist() == [0, 0]
        and data.classes == []
    )
    call(
        train.main,
        "--data",
        tmp_path / "z.npz",
        "--res 8x16 --model-args",
        '{"base_channels": 8, "emb_channels": 16}',
        "--steps 1 --batch 2 --out",
        tmp_path / "run",
    )
    call(sampling.main, tmp_path / "run", "--n 3 --steps 1 --out", tmp_path / "drawn.npz")
    drawn = open_dataset(DEFAULTS | dict(data=[str(tmp_path / "drawn.npz")], res="8x16"))
    assert np.load(tmp_path / "drawn.npz").files == ["z"]
    assert load_batch(drawn, [2])[0].shape == (1, 2, 8, 16)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(z=np.zeros((40, 5, 8, 8), np.uint8)),
        dict(z=np.zeros((40, 8, 8), np.float32)),
        dict(z=np.zeros((0, 5, 8, 8), np.float32)),
        dict(y=np.arange(3)),
        dict(y=np.arange(40)),
        dict(y=np.zeros(40)),
        dict(y=np.arange(40) % 3, classes=[]),
    ],
)
def test_invalid_latents_are_rejected(tmp_path, arrays):
    with pytest.raises(ValueError, match=named("latents.npz", "z")):
        open_dataset(
            DEFAULTS | dict(data=[write_latents(tmp_path / "latents.npz", **arrays)], res=8)
        )


def test_packed_images_equal_those_of_the_folder(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for data, out in ((sets / "real", "labeled.npz"), (sets / "real.npy", "plain.npz")):
        call(train.main, "--data", data, "--res 8 --pack", out)
        assert re.search(named(40, out), capsys.readouterr().out)
        folder, packed = ImageData([data], 8), ImageData([tmp_path / out], 8)
        assert (
            all(map(torch.equal, load_batch(folder, range(40)), load_batch(packed, range(40))))
            and folder.classes == packed.classes
        )
        assert isinstance(packed.reader.sources[0][0], np.memmap)
        with np.load(out, allow_pickle=False) as data:  # and numpy can read it
            assert data["x"].shape == (40, 8, 8, 3) and ("y" in data) == (out == "labeled.npz")
    shutil.copytree(sets / "real", tmp_path / "bad")
    (tmp_path / "bad" / "0" / "broken.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="broken.png"):
        call(train.main, "--data bad --res 8 --pack bad.npz")
    assert sorted(os.listdir()) == ["bad", "labeled.npz", "plain.npz"]
    call(
        train.main, *TINY_RUN, "--steps 1 --data plain.npz --res 32 --out run"
    )  # another size still works


def test_spaces_and_unicode_in_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    for i in range(6):
        folder = tmp_path / "meine Bilder [ä] 図" / ("Möwe *" if i % 2 else "猫 ?")
        folder.mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(folder / f"Bild {i} é.png")
    call(train.main, "--data", "meine Bilder [ä] 図", "--res 32 --pack", "gepackt ü.npz")
    for data in ("meine Bilder [ä] 図", "gepackt ü.npz"):
        for steps in ("1", "2"):
            call(
                train.main,
                *TINY_RUN,
                "--data",
                data,
                "--workers 0 --steps",
                steps,
                "--out",
                f"Lauf [1] {data}",
            )
        assert resumed_at(capsys.readouterr().out) == [1]
        call(
            sampling.main,
            f"Lauf [1] {data}",
            "--n 4 --steps 1 --label",
            "Möwe *",
            "--out",
            "Gitter ñ/",
        )
        assert len(fid.ImageReader(tmp_path / "Gitter ñ")) == 4
        lines, _ = measured(
            data, "Gitter ñ", "--features tests.helpers:Colors --res 32 --save-stats Maße.npz"
        )
        assert lines[0].startswith(f"{data}: ") and lines[0].endswith("N = 6")
        shutil.rmtree("Gitter ñ")
        os.remove("Maße.npz")


def bad_pictures(folder):
    """Writes 5 readable images and 6 that are not."""
    folder.mkdir()
    for i in range(5):
        photo((40, 40), i).save(folder / f"good{i}.png")
    photo((99, 99)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"text")
    bomb = Image.new("1", (8, 8))
    bomb.save(folder / "bomb.png")
    content = bytearray((folder / "bomb.png").read_bytes())
    content[16:24] = (40000).to_bytes(4, "big") * 2  # in the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(content)
    os.mkfifo(folder / "pipe.png")  # would never end
    os.symlink("nowhere.png", folder / "link.png")
    return ["bomb.png", "cut.jpg", "link.png", "pipe.png", "text.png", "zero.png"]


def test_bad_images_stop_training_or_are_named_once_and_counted(tmp_path, monkeypatch, capfd):
    bad = bad_pictures(tmp_path / "data")
    no_grid(monkeypatch)
    options = [*TINY_RUN, "--data", tmp_path / "data", "--out", tmp_path / "run", "--steps 5"]
    with pytest.raises(ValueError, match="|".join(map(re.escape, bad))):
        call(train.main, *options, "--workers 0")
    capfd.readouterr()
    call(train.main, *options, "--skip-bad --workers 2")  # almost four epochs, by two processes
    output, errors = capfd.readouterr()
    assert (
        sorted(
            name[0]
            for line in errors.splitlines()
            if (name := re.search(r"\w+\.(png|jpg)\b", line))
        )
        == bad
    ), errors
    assert (
        "step 5/5" in output
        and re.search(r"\b6\b\D*$", output.splitlines()[-2])
        and log_lines(tmp_path / "run")[-1]["skipped"] == 6
    )
    data = ImageData([tmp_path / "data"], 8, skip_bad=True)
    plain = fid.ImageReader(tmp_path / "data")
    assert torch.equal(
        load_batch(data, range(11))[0][0],
        torch.from_numpy(plain.read(2, (8, 8)).copy()).permute(2, 0, 1),
    )  # bomb, cut -> good0
    call(
        train.main,
        "--data",
        tmp_path / "data",
        "--res 8 --skip-bad --pack",
        tmp_path / "packed.npz",
    )
    assert np.array_equal(
        np.load(tmp_path / "packed.npz")["x"], load_batch(data, range(11))[0].permute(0, 2, 3, 1)
    )
    for path in (tmp_path / "data").glob("good*"):
        path.unlink()
    data = ImageData([tmp_path / "data"], 8, skip_bad=True)
    with pytest.raises(ValueError) as error:
        load_batch(data, [3])
    assert not any(name in str(error.value) for name in bad)  # not that of a single image


def test_two_ranks_name_and_count_bad_images_together(tmp_path):
    bad = bad_pictures(tmp_path / "data")
    options = [
        *TINY_RUN,
        "--steps 8 --log-every 1 --data data --skip-bad --workers 1 --out run --sample-every 1000",
    ]
    statuses, _, errors = on_ranks(train.main, *options, cwd=tmp_path, prepare=skip_grid)
    assert statuses == [0, 0], errors
    assert log_lines(tmp_path / "run")[-1]["skipped"] == len(bad)
    assert {
        name[0] for line in errors.splitlines() if (name := re.search(r"\w+\.(png|jpg)\b", line))
    } == set(bad)


def test_resume_reports_changed_data_and_software(tmp_path, monkeypatch, capsys):
    no_grid(monkeypatch)
    for i in range(6):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo((40, 40), i).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    np.savez(
        tmp_path / "data.npz",
        x=np.zeros((6, 32, 32, 3), np.uint8),
        y=np.arange(6) % 2,
        classes=["a", "b"],
    )
    changes = {
        "data": [
            lambda: photo((50, 40)).save(tmp_path / "data" / "a" / "0.png"),
            lambda: os.rename(tmp_path / "data" / "a" / "0.png", tmp_path / "data" / "b" / "0.png"),
            lambda: photo().save(tmp_path / "data" / "a" / "new.png"),
        ],
        "data.npz": [
            lambda: np.savez(
                tmp_path / "data.npz",
                x=np.ones((6, 32, 32, 3), np.uint8),
                y=np.arange(6) % 2,
                classes=["a", "b"],
            ),
            lambda: np.savez(
                tmp_path / "data.npz",
                x=np.ones((6, 32, 32, 3), np.uint8),
                y=np.arange(6) // 3,
                classes=["a", "b"],
            ),
        ],
    }
    for data, todo in changes.items():
        options = ["--data", tmp_path / data, "--workers 0 --out", tmp_path / f"run {data}"]
        call(train.main, *TINY_RUN, *options, "--steps 1")
        for step, change in enumerate(todo, 1):
            for steps in (step, step + 1):  # not changed, and changed
                if steps > step:
                    change()
                capsys.readouterr()
                call(train.main, *options, "--steps", steps)
                (line,) = [
                    line for line in capsys.readouterr().out.splitlines() if resumed_at(line)
                ]
                assert bool(re.search(r"\d+ \(\w{8}\)\D+\d+ \(\w{8}\)", line)) == (steps > step), (
                    line
                )
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    call(train.main, options)
    before = load_checkpoint(str(tmp_path / "run data.npz"))["config"]["torch"]
    assert re.search(rf"torch {re.escape(before)}\D+2\.0\.0", capsys.readouterr().out)
