"""Tests of support/finetune.py: train.py --init."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from docs.finetune import NewShapes
from support.checkpoint import export_model, load_checkpoint
from support.data import Shapes, load_batch
from support.finetune import LABEL_NOISE, initialize, resize_position
from support.settings import inherit
from tests.helpers import (
    TINY_UNET,
    TINY_UVIT,
    call,
    fill_random,
    log_lines,
    named,
    no_grid,
    on_ranks,
    resumed_at,
    same_weights,
    short_grid,
    skip_grid,
)
from unet import UNet
from uvit import UViT

STILL = "--steps 1 --batch 4 --lr 0"  # one step that changes no weight

START = """
import torch

class Net(torch.nn.Module):
    def __init__(self, res, num_classes, width=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.shade = torch.nn.Embedding(num_classes + 1, width)

    def forward(self, z, logsnr, label):
        return self.conv(z) + self.shade(label).mean(1)[:, None, None, None]

def loss(net, x, schedule, label, *, t, eps):
    return (net(x, t, label) - x).square().mean((1, 2, 3)), schedule(t)
"""


@pytest.fixture(autouse=True)
def without_grids(monkeypatch):
    no_grid(monkeypatch)


def folders(path, *classes, size=16):
    """A folder of images, two of each class."""
    for i, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for k in range(2):
            image = np.full((size, size, 3), 20 * i + 5 * k, np.uint8)
            Image.fromarray(image).save(path / name / f"{k}.png")
    return path


def source_of(net, classes, **settings):
    """A source as load_source returns it."""
    config = dict(classes=classes, schedule="cosine") | settings
    return dict(weights=net.state_dict(), config=config, step=7)


def load_config(**settings):
    """The settings of a run, as a checkpoint has them."""
    return dict(model="uvit", size="tiny", res=16, schedule="cosine", space="v") | settings


def target(classes, **settings):
    """The settings of a new run that initialize() needs."""
    return dict(classes=classes, schedule="cosine", seed=0) | settings


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("which", ["ema", "net"])
def test_a_run_starts_from_the_weights_of_another(run, tmp_path, capsys, which):
    call(train.main, "--init", run, "--init-weights", which, STILL, "--out", tmp_path / "new")
    source, new = load_checkpoint(run), load_checkpoint(tmp_path / "new")
    for name, weight in source[which].items():
        assert torch.equal(new["net"][name], weight), name
        assert torch.equal(new["ema"][name], weight), name
    # It is a new run: its steps, images and moments begin at zero.
    assert (new["step"], new["images"]) == (1, 4)
    assert all(state["step"] == 1 for state in new["optimizer"]["state"].values())
    assert "100.0 % of the weights start from step 6" in capsys.readouterr().out

    # EMA weights and raw weights of the source differ. Otherwise this test would show nothing.
    assert not torch.equal(source["ema"]["head.conv.weight"], source["net"]["head.conv.weight"])


def test_the_network_and_its_objective_are_inherited(run, tmp_path, capsys):
    old = load_checkpoint(run)["config"]
    call(train.main, "--init", run, STILL, "--out", tmp_path / "same")
    new = load_checkpoint(tmp_path / "same")["config"]
    for name in ("model", "size", "res", "schedule", "space", "multiscale", "loss", "label_drop"):
        assert new[name] == old[name], name
    assert old["model_args"].items() <= new["model_args"].items()
    # The length and speed of the training follow the recipe and the command line.
    assert (new["batch"], new["steps"], new["lr"]) == (4, 1, 0)
    assert "schedule" not in capsys.readouterr().out.split("--init")[1]

    options = "--schedule shifted:32 --space eps --label-drop 0.2"
    call(train.main, "--init", run, options, STILL, "--out", tmp_path / "other")
    new = load_checkpoint(tmp_path / "other")["config"]
    assert (new["schedule"], new["space"], new["label_drop"]) == ("shifted:32", "eps", 0.2)
    assert "another schedule: now shifted:32, before cosine" in capsys.readouterr().out


def test_plain_cosine_is_not_inherited_by_a_larger_resolution():
    source = load_config(model_args=TINY_UVIT)
    options = dict(init="x", out="y")
    for same in ({}, dict(res=16), dict(res="16x16")):
        assert inherit(options | same, source, "x")["schedule"] == "cosine"
    assert inherit(options | dict(schedule="cosine", res=128), source, "x")["schedule"] == "cosine"
    assert "schedule" not in inherit(options | dict(res=128), source, "x")
    shifted = source | dict(schedule="shifted:32")
    assert inherit(options | dict(res=128), shifted, "x")["schedule"] == "shifted:32"


def test_a_model_does_not_choose_the_text_encoder():
    source = load_config(model_args=TINY_UVIT, text_encoder="someone/t5", text_tokens=7)
    options = dict(init="x", out="y", captions="")
    with pytest.raises(ValueError, match=named("--text-encoder", "someone/t5")):
        inherit(options, source, "x")
    settings = inherit(options | dict(text_encoder="someone/t5"), source, "x")
    assert settings["text_tokens"] == 7
    assert "text_encoder" not in inherit(dict(init="x", out="y"), source, "x")


def test_classes_keep_their_embeddings_by_name(run, tmp_path, capsys):
    data = folders(tmp_path / "data", "moon", "tree", "circle", "house")
    call(train.main, "--init", run, "--data", data, STILL, "--out", tmp_path / "new")
    output = capsys.readouterr().out
    assert "2 classes keep their embedding: circle, moon" in output
    assert "2 new classes start at the null label: house, tree" in output

    old = load_checkpoint(run)["ema"]["embedding.label.weight"]
    new = load_checkpoint(tmp_path / "new")
    assert new["config"]["classes"] == ["circle", "house", "moon", "tree"]
    table = new["net"]["embedding.label.weight"]
    assert torch.equal(table[0], old[Shapes.classes.index("circle")])
    assert torch.equal(table[2], old[Shapes.classes.index("moon")])
    assert torch.equal(table[4], old[-1])
    # The new rows are the null label's plus noise, and differ from each other.
    noise = (table[[1, 3]] - old[-1]) / old.std()
    assert noise.std().item() == pytest.approx(LABEL_NOISE, rel=0.5)
    assert not torch.equal(table[1], table[3])


def test_from_labels_to_none_and_back(run, tmp_path, capsys):
    plain = folders(tmp_path / "plain", "all")
    call(train.main, "--init", run, "--data", plain, STILL, "--out", tmp_path / "none")
    none = load_checkpoint(tmp_path / "none")["ema"]["embedding.label.weight"]
    old = load_checkpoint(run)["ema"]["embedding.label.weight"]
    assert torch.equal(none, old[-1:])
    assert "no classes" in capsys.readouterr().out

    data = folders(tmp_path / "data", "circle", "moon")
    call(train.main, "--init", tmp_path / "none", "--data", data, STILL, "--out", tmp_path / "back")
    back = load_checkpoint(tmp_path / "back")["ema"]["embedding.label.weight"]
    assert len(back) == 3 and torch.equal(back[-1:], none)
    assert "2 new classes start at the null label: circle, moon" in capsys.readouterr().out


def test_another_resolution_keeps_the_network(run, tmp_path, capsys):
    old = load_checkpoint(run)
    res = 2 * old["config"]["res"]
    call(train.main, "--init", run, "--res", res, STILL, "--out", tmp_path / "new")
    new = load_checkpoint(tmp_path / "new")
    assert new["config"]["model_args"]["res"] == res
    for name, weight in old["ema"].items():
        if name != "position":
            assert torch.equal(new["net"][name], weight), name
    height = 2 * old["ema"]["position"].shape[1]
    assert new["net"]["position"].shape[1:] == (height, height)
    assert "interpolated position from" in capsys.readouterr().out


def test_a_run_is_resumed_without_its_source(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "source")
    data = folders(tmp_path / "data", "moon", "tree", "circle")
    start = ["--init", tmp_path / "source", "--data", data, "--batch 4 --save-every 2"]
    call(train.main, *start, "--steps 4 --out", tmp_path / "whole")
    call(train.main, *start, "--steps 4 --out", tmp_path / "part")
    (tmp_path / "part/ckpt_0000004.pt").unlink()

    # The same command resumes, and so does --out alone, if the source is gone.
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    call(train.main, *start, "--steps 4 --out", tmp_path / "part")
    output = capsys.readouterr().out
    assert resumed_at(output) == [2] and "start from step" not in output
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    call(train.main, "--out", tmp_path / "part", "--steps 5")
    assert [line["step"] for line in log_lines(tmp_path / "part")][-1] == 5

    # A folder that holds a run does not start from another one.
    for options in (["--init", run], ["--init", tmp_path / "source", "--init-weights net"]):
        with pytest.raises(ValueError, match=named("--init", "part")):
            call(train.main, *options, "--out", tmp_path / "part")


def test_a_run_starts_from_an_exported_model(run, tmp_path):
    export_model(run, str(tmp_path / "model.pt"), "float16")
    call(train.main, "--init", tmp_path / "model.pt", STILL, "--out", tmp_path / "new")
    for name, weight in load_checkpoint(run)["ema"].items():
        assert torch.equal(load_checkpoint(tmp_path / "new")["net"][name], weight.half().float())


def test_captions_start_from_classes(run, tmp_path, monkeypatch, capsys):
    short_grid(monkeypatch)  # with as many images as captions
    call(train.main, "--init", run, "--captions --text-tokens 16", STILL, "--out", tmp_path / "a")
    output = capsys.readouterr().out
    assert "new: " in output and "text" in output
    new = load_checkpoint(tmp_path / "a")
    assert torch.equal(new["net"]["position"], load_checkpoint(run)["ema"]["position"])

    # From captions to captions, the tokens are inherited.
    call(train.main, "--init", tmp_path / "a", "--captions", STILL, "--out", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b")["config"]["text_tokens"] == 16
    assert "100.0 % of the weights" in capsys.readouterr().out


def test_networks_and_losses_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "start_own.py").write_text(START)
    monkeypatch.syspath_prepend(tmp_path)
    own = "--model start_own:Net"
    call(train.main, own, "--loss start_own:loss", STILL, "--out", tmp_path / "a")

    # A label table is found in any network. The code must be named again.
    data = folders(tmp_path / "data", "moon", "tree")
    start = ["--init", tmp_path / "a", "--data", data, STILL, "--out", tmp_path / "b"]
    with pytest.raises(ValueError, match=named("--init", "--model", "start_own:Net")):
        call(train.main, *start)
    with pytest.raises(ValueError, match=named("--loss", "start_own:loss")):
        call(train.main, *start, own)
    call(train.main, *start, own, "--space v")
    old = load_checkpoint(tmp_path / "a")["ema"]
    new = load_checkpoint(tmp_path / "b")["net"]
    assert torch.equal(new["conv.weight"], old["conv.weight"])
    assert torch.equal(new["shade.weight"][0], old["shade.weight"][2])  # moon
    assert torch.equal(new["shade.weight"][2], old["shade.weight"][10])  # the null label


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--fsdp"])
def test_two_ranks_start_from_the_same_weights(run, tmp_path, options):
    data = folders(tmp_path / "data", "moon", "tree")
    line = f"--init {run} --data {data} {STILL} --out new {options}"
    statuses, output, errors = on_ranks(train.main, line, cwd=tmp_path, prepare=skip_grid)
    assert statuses == [0, 0], errors
    assert output.count("start from step") == 1
    call(train.main, "--init", run, "--data", data, STILL, "--out", tmp_path / "one")
    one, new = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "new")
    for name, weight in one["net"].items():
        assert torch.equal(new["net"][name], weight), name
        assert torch.equal(new["ema"][name], weight), name


def test_bad_input(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_model(run, "model.pt")
    for words, line in [
        (["--init", "--out"], f"--init {run}"),
        (["--init-weights", "--init"], "--init-weights net --out new"),
        (["missing"], "--init missing --out new"),
        (["--init", "unet"], f"--init {run} --model unet --out new"),
        (["model.pt", "--init-weights"], "--init model.pt --init-weights net --out new"),
        (["sides"], f"--init {run} --res 18 --out new"),
    ]:
        with pytest.raises(ValueError, match=named(*words)):
            call(train.main, line, STILL)
    with pytest.raises(SystemExit, match=named("--init-weights", "both")):
        call(train.main, f"--init {run} --init-weights both --out new")

    # Settings of a hostile file have checked types, too.
    state = torch.load("model.pt", weights_only=True)
    state["config"]["label_drop"] = "0.1"
    torch.save(state, "bad.pt")
    with pytest.raises(ValueError, match=named("bad.pt", "label_drop")):
        call(train.main, "--init bad.pt --out new")
    for entry, value in (("ema", {"position": 3}), ("config", {"attn_resolutions": "abc"})):
        state = torch.load("model.pt", weights_only=True)
        if entry == "ema":
            state["ema"] = value
        else:
            state["config"]["model_args"] |= value
        torch.save(state, "bad.pt")
        with pytest.raises(ValueError, match=named("bad.pt")):
            call(train.main, "--init bad.pt --out new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- tensors that are adapted


@pytest.mark.parametrize("build, fields", [(UViT, TINY_UVIT), (UNet, TINY_UNET)])
def test_another_network_takes_what_agrees_in_name_and_shape(build, fields):
    # The lowest level is wider, and the level above it has another block.
    more = dict(channel_multiplier=(1, 3), num_res_blocks=(2, *fields["num_res_blocks"][1:]))
    old, new = fill_random(build(**fields)), build(**fields | more)
    before = {name: weight.clone() for name, weight in new.state_dict().items()}
    lines = initialize(new, source_of(old, ["a", "b", "c"]), target(["a", "b", "c"]))
    kept = 0
    for name, weight in new.state_dict().items():
        same = old.state_dict().get(name, torch.zeros(0)).shape == weight.shape
        kept += same
        expected = old.state_dict()[name] if same else before[name]
        assert torch.equal(weight, expected), name
    assert 20 < kept < len(before)
    new_line = next(line for line in lines if line.startswith("new: "))
    dropped = next(line for line in lines if line.startswith("dropped: "))
    assert "down.0.1" in new_line and "down.0.1" not in dropped and "downsample.0.1" in dropped


def test_positions_are_interpolated():
    # Linear functions of the place stay linear, away from the border. Constants stay constant.
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    old = torch.stack([2 * y - 3 * x, torch.full_like(x, 5.0)])
    new = resize_position(old, (16, 12))
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    linear = 2 * ((y + 0.5) / 2 - 0.5) - 3 * ((x + 0.5) / 2 - 0.5)
    assert torch.allclose(new[0, 4:-4, 4:-4], linear[4:-4, 4:-4], atol=1e-5)
    assert torch.allclose(new[1], torch.full_like(new[1], 5.0))
    assert resize_position(old, (8, 6)) is old


def test_a_network_that_shares_nothing_is_refused():
    old = {"other.weight": torch.zeros(3)}
    source = dict(weights=old, config=dict(classes=[], schedule="cosine"), step=1)
    with pytest.raises(ValueError, match=named("--init", "none")):
        initialize(UViT(**TINY_UVIT), source, target(["a", "b", "c"]))


# ---------------------------------------------------------------- docs/finetune.py


def test_new_shapes_have_classes_of_their_own():
    data = NewShapes(16, length=30)
    images, labels = load_batch(data, range(6))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.classes == ["lens", "flower", "hourglass"]
    # Neither the old shapes nor each other: the same index has another image in each dataset.
    old, _ = load_batch(Shapes(16), range(6))
    assert (images.float() - old.float()).abs().flatten(1).mean(1).min() > 1
