"""Tests of exported models: support.checkpoint.export_model and sample.py --export."""

import os
import sys

import numpy as np
import pytest
import torch

import sample as sampling
import train
from support.checkpoint import (
    LOCAL_SETTINGS,
    export_model,
    load,
    load_checkpoint,
    load_model,
)
from support.data import open_dataset
from tests.helpers import call, content_of, mutated, named, no_grid

FORMATS = ["model.pt", "model.safetensors"]


def needs(name):
    """Skip the test if the file format needs a package that is not installed."""
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")


def drawn(checkpoint, *options):
    """The samples of a checkpoint or an exported model."""
    call(sampling.main, checkpoint, "--n 4 --steps 3 --out drawn.npz", *options)
    with np.load("drawn.npz") as samples:
        return samples["arr_0"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_model_equals_its_run(run, tmp_path, monkeypatch, name):
    needs(name)
    monkeypatch.chdir(tmp_path)
    call(sampling.main, run, "--export", name)

    # The EMA weights, bitwise; the settings, except for those that name files of this machine.
    state, model = load_checkpoint(run), load_model(name)
    assert set(model) == {"format", "step", "images", "config", "ema"}
    assert (model["step"], model["images"]) == (state["step"], state["images"])
    assert list(model["ema"]) == list(state["ema"]) or name.endswith(".safetensors")
    for key, weight in state["ema"].items():
        assert torch.equal(model["ema"][key], weight), key
    settings = {k: v for k, v in state["config"].items() if k not in LOCAL_SETTINGS}
    assert model["config"] == settings | dict(data=[])

    # Samples are the same, bitwise, and the file has about a quarter of the checkpoint's size.
    assert np.array_equal(drawn(name), drawn(run))
    weights = sum(weight.numel() for weight in state["ema"].values())
    assert 4 * weights < os.path.getsize(name) < 4 * weights + 400 * len(state["ema"]) + 8000

    # An exported model can be exported again, but is never overwritten.
    call(sampling.main, name, "--export again.pt")
    assert np.array_equal(drawn("again.pt"), drawn(run))
    with pytest.raises(ValueError, match=named(name, "exists")):
        call(sampling.main, run, "--export", name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype, digits", [("float16", 11), ("bfloat16", 8)])
def test_half_precision_is_rounded_once(run, tmp_path, name, dtype, digits):
    needs(name)
    path = str(tmp_path / name)
    call(sampling.main, run, "--export", path, f"--dtype {dtype}")
    stored = load_model(path)["ema"]
    assert {weight.dtype for weight in stored.values()} == {getattr(torch, dtype)}

    # The network computes in float32. Its weights are the stored ones: off by half a unit in the
    # last place at most, or by the smallest number of float16.
    net, *_ = load(path)
    for key, weight in load_checkpoint(run)["ema"].items():
        half = net.state_dict()[key]
        assert half.dtype == torch.float32
        assert torch.equal(half, stored[key].float())
        assert (half - weight).abs().le(weight.abs() * 2.0**-digits + 2.0**-25).all()


def test_float16_that_overflows_is_refused(run, tmp_path):
    path = f"{run}/ckpt_0000006.pt"
    state = torch.load(path, weights_only=True)
    state["ema"]["stem.conv.weight"][0, 0, 0, 0] = 70_000.0
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(ValueError, match=named("large.pt", "stem.conv.weight", "bfloat16")):
        call(sampling.main, tmp_path / "large.pt", "--dtype float16 --export", tmp_path / "m.pt")
    assert os.listdir(tmp_path) == ["large.pt"]

    # bfloat16 has the range of float32. float16 also holds integers: counters keep their type.
    export_model(str(tmp_path / "large.pt"), str(tmp_path / "m.pt"), "bfloat16")
    assert load_model(str(tmp_path / "m.pt"))["ema"]["stem.conv.weight"].max() > 69_000


def test_buffers_of_integers_keep_their_type(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    model = "--model tests.helpers:Foreign"  # its batch norm counts batches
    call(train.main, model, "--steps 2 --batch 4 --out", tmp_path / "run")
    with pytest.raises(ValueError, match=named("--model", "tests.helpers:Foreign")):
        load(str(tmp_path / "run"))
    call(sampling.main, tmp_path / "run", "--dtype float16 --export", tmp_path / "m.pt")

    # To export and to read a file imports no code. To build its network needs --model again.
    weights = load_model(str(tmp_path / "m.pt"))["ema"]
    assert weights["conv.1.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(ValueError, match=named("--model", "tests.helpers:Foreign")):
        load(str(tmp_path / "m.pt"))
    load(str(tmp_path / "m.pt"), model="tests.helpers:Foreign")


def test_the_data_of_an_exported_model_must_be_named(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    np.savez(tmp_path / "secret.npz", x=np.zeros((4, 32, 32, 3), np.uint8))
    call(train.main, "--steps 1 --batch 2 --data", tmp_path / "secret.npz", "--out", tmp_path / "a")
    path = str(tmp_path / "m.pt")
    export_model(str(tmp_path / "a"), path)
    # The file does not name the data. Whoever opens them does not get Shapes instead.
    assert b"secret" not in content_of(path)
    _, config, _ = load(path)
    with pytest.raises(FileNotFoundError, match=named("data of an exported model")):
        open_dataset(config)


def test_images_that_a_run_held_out_stay_unseen(run, tmp_path):
    # A share names no file. Trainings from an exported model need it.
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    state["config"]["val"] = [0.3]
    torch.save(state, tmp_path / "a.pt")
    export_model(str(tmp_path / "a.pt"), str(tmp_path / "m.pt"))
    assert load_model(str(tmp_path / "m.pt"))["config"]["val"] == [0.3]


def test_training_does_not_continue_from_an_exported_model(run, tmp_path):
    (tmp_path / "run").mkdir()
    export_model(run, str(tmp_path / "run/ckpt_0000006.pt"))
    with pytest.raises(ValueError, match=named("ckpt_0000006.pt", "exported", "--init")):
        call(train.main, "--out", tmp_path / "run")


def test_paths_of_captions_are_not_exported(run, tmp_path):
    # The settings of a run on captions, of which a student was distilled.
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    state["config"] |= dict(captions="/home/me/texts.jsonl", text_encoder="/home/me/texts.npy")
    state["config"] |= dict(distilled=dict(teacher="/home/me/runs/a"), val=["/home/me/test"])
    torch.save(state, tmp_path / "a.pt")
    export_model(str(tmp_path / "a.pt"), str(tmp_path / "m.pt"))
    assert b"/home/me" not in content_of(tmp_path / "m.pt")
    config = load_model(str(tmp_path / "m.pt"))["config"]
    assert (config["captions"], config["text_encoder"]) == ("", "texts.npy")


def test_bad_options_of_export(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named("--export", "--steps")):
        call(sampling.main, run, "--export m.pt --steps 4")
    with monkeypatch.context() as ranks:
        ranks.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=named("--export", "torchrun")):
            call(sampling.main, run, "--export m.pt")
    with pytest.raises(ValueError, match=named("--export", "m.bin")):
        call(sampling.main, run, "--export m.bin")
    with pytest.raises(ValueError, match=named("--dtype", "--export")):
        call(sampling.main, run, "--dtype float16")
    with pytest.raises(ValueError, match=named("missing")):
        call(sampling.main, "missing", "--export m.pt")
    with pytest.raises(SystemExit, match=named("--dtype", "int8")):
        call(sampling.main, run, "--dtype int8 --export m.pt")
    assert os.listdir() == []


def test_without_safetensors_the_message_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=named("pip install safetensors")):
        call(sampling.main, run, "--export", path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=named("pip install safetensors")):
        load(str(path))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_models_are_refused_in_one_line(run, tmp_path, name):
    needs(name)
    path = str(tmp_path / name)
    export_model(run, path)
    content = content_of(path)
    random = np.random.default_rng(0)
    refused = 0
    for i in range(60):
        bad = str(tmp_path / f"{i}-{name}")
        with open(bad, "wb") as file:
            file.write(mutated(content, random))
        # A change of weights alone cannot be noticed. Any other error is one line.
        try:
            load(bad)
        except ValueError as error:
            refused += 1
            assert bad in str(error) and "\n" not in str(error)
        os.remove(bad)
    assert refused > 10
