"""Tests of related/common.py: which runs the commands accept."""

import importlib
import json
import os
import re

import numpy as np
import pytest
import torch

import sample as sampling
from related import common, diffusion_classifier, distill, lit, ppap, ppgn, tstitch, vitok
from support.data import load_batch, open_dataset
from support.heldout import Part, image_hashes, split
from support.settings import DEFAULTS
from tests.helpers import HERE, TINY_NET, call, train_small

MODEL = ["--model-args", json.dumps(dict(TINY_NET, num_res_blocks=[1]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "dico",
        "diffusion_classifier",
        "dimr",
        "distill",
        "dit",
        "lit",
        "mar",
        "official",
        "ppap",
        "ppgn",
        "recap",
        "sid2",
        "tstitch",
        "vitok",
    ],
)
def test_without_arguments(name, capsys):
    # The idea, the configurations, and a command to go on with.
    module = importlib.import_module(f"related.{name}")
    call(module.main)
    printed = capsys.readouterr().out
    title, *paragraphs = module.__doc__.strip().split("\n\n")
    assert printed.startswith(title)
    commands = next(text for text in paragraphs if text.startswith("    "))
    assert printed.index(commands) > printed.index(paragraphs[0])
    assert len(printed) > len(module.__doc__) + 100


def test_unsuitable_runs_are_rejected(tmp_path, monkeypatch):
    # Three runs that are unsuitable for most commands: on texts, a distilled student, and without
    # labels. T-Stitch takes the first two, Diffusion Classifier the first.
    texts = train_small(tmp_path / "texts", MODEL, "--captions")

    teacher = train_small(tmp_path / "labels", MODEL)
    call(distill.main, teacher, "--steps 1 --teacher-steps 2 --updates 1 --batch 4")
    student = f"{teacher}-1steps"

    data = tmp_path / "unlabeled.npz"
    np.savez(data, x=np.zeros((4, 32, 32, 3), np.uint8))
    unlabeled = train_small(tmp_path / "unlabeled", MODEL, "--data", data)

    # The error of every command names the run.
    takes = {
        str(texts): (diffusion_classifier.main, tstitch.main),
        student: (tstitch.main,),
    }
    reasons = set()
    for run in map(str, (texts, student, unlabeled)):
        for command in (
            (tstitch.main, run, run, "--fraction 0.5 --guidance 2 --out", tmp_path / "grid.png"),
            (ppap.main, run, "--out", tmp_path / "experts"),
            (ppgn.main, run, "--guide x --out", tmp_path / "grid.png"),
            (diffusion_classifier.main, run),
        ):
            # Two commands take some of these runs.
            if command[0] in takes.get(run, ()):
                continue
            with pytest.raises(ValueError, match=re.escape(run)) as error:
                call(*command)
            reasons.add(str(error.value).replace(run, "RUN"))

    # Each run has its own reason, the same for all commands.
    assert len(reasons) == 3

    # Without guidance tstitch needs no labels. It makes the folder of its output. One process
    # under torchrun is like a process without torchrun.
    monkeypatch.setenv("WORLD_SIZE", "1")
    grid = tmp_path / "new" / "grid.png"
    call(tstitch.main, unlabeled, unlabeled, "--fraction 0.5 --steps 2 --n 3 --out", grid)
    assert os.path.exists(grid)


@pytest.mark.slow
def test_commands_run_on_the_model_in_assets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = f"{HERE}/assets/shapes32.pt"
    call(diffusion_classifier.main, model, "--n 20 --times 4")
    share = re.search(r"([\d.]+) % of 20 images are classified right", capsys.readouterr().out)
    assert float(share[1]) >= 80

    # An exported model has no folder: its student goes to runs/.
    call(distill.main, model, "--steps 32 --updates 1 --batch 4")
    call(sampling.main, "runs/shapes32-32steps", "--n 1 --guidance 2")
    call(lit.main, model, "--steps 1 --batch 4 --out runs/lit")
    call(sampling.main, "runs/lit", "--n 1 --steps 2")
    call(tstitch.main, model, model, "--fraction 0.5 --steps 2 --n 1 --out grid.png")
    assert sorted(os.listdir("runs")) == ["lit", "shapes32-32steps"]


def test_images_that_a_run_holds_out_stay_unseen(tmp_path, monkeypatch):
    # Image i has the value i everywhere.
    x = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    path = tmp_path / "x.npz"
    np.savez(path, x=x, y=np.arange(40) % 2)
    run = train_small(tmp_path, "--val 0.5 --data", path, MODEL)
    data = open_dataset(DEFAULTS | dict(data=[str(path)], res=32))
    kept, held_out = split(image_hashes(data), 0.5)
    assert len(held_out) > 10

    # The function of each command that trains gets the other images.
    class Stop(Exception):
        pass

    def watch(*args, **options):
        (data,) = (value for value in args if isinstance(value, Part))
        images, _ = load_batch(data, range(len(data)))
        assert sorted(images[:, 0, 0, 0].tolist()) == kept.tolist()
        raise Stop

    for module, name in ((distill, "train_stages"), (lit, "distill"), (ppap, "trained_net")):
        monkeypatch.setattr(module, name, watch)
        with pytest.raises(Stop):
            call(module.main, run, "--out", tmp_path / "out")


def test_damaged_files_are_named_and_errors_of_the_system_pass(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"no weights")
    match = "net.pt was not written by related.x"
    with pytest.raises(ValueError, match=match), common.reading(path, "related.x"):
        torch.load(path)
    for error in (FileNotFoundError, PermissionError):
        with pytest.raises(error), common.reading(path, "related.x"):
            raise error(path)


class GrayImages:
    """A dataset class of a user."""

    classes = ["dark", "bright"]

    def __init__(self, res):
        self.res = res

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.full((self.res, self.res, 3), 50 + 100 * (i % 2), dtype=torch.uint8), i % 2


def test_a_dataset_class_may_be_named_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "--data related.test_common:GrayImages"
    call(
        vitok.main, f"train auto --res 16 --patch 8 --channels 2 --steps 1 --batch 2 {data}".split()
    )
    call(vitok.main, f"test auto --n 4 --out pairs.png {data}".split())
    call(vitok.main, f"encode auto --n 4 --out latents.npz {data}".split())
    run = train_small(tmp_path, data, *MODEL)
    call(lit.main, run, f"--steps 1 --batch 2 --out lit {data}")

    # A file does not decide which code is imported.
    for line in ("encode auto --n 4 --out again.npz", "tune auto --steps 1"):
        with pytest.raises(ValueError, match="repeat --data"):
            call(vitok.main, line.split())
