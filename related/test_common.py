"""Tests of related/common.py: which runs the commands accept."""

import json
import os
import re

import numpy as np
import pytest

from related import diffusion_classifier, distill, ppap, ppgn, tstitch
from tests.helpers import TINY_NET, call, train_small

MODEL = ["--model-args", json.dumps(dict(TINY_NET, num_res_blocks=[1]))]


def test_unsuitable_runs_are_rejected(tmp_path, monkeypatch):
    # Three unsuitable runs: on texts, a distilled student, and without labels.
    texts = train_small(tmp_path / "texts", MODEL, "--captions")

    teacher = train_small(tmp_path / "labels", MODEL)
    call(distill.main, teacher, "--steps 1 --teacher-steps 2 --updates 1 --batch 4")
    student = f"{teacher}-1steps"

    data = tmp_path / "unlabeled.npz"
    np.savez(data, x=np.zeros((4, 32, 32, 3), np.uint8))
    unlabeled = train_small(tmp_path / "unlabeled", MODEL, "--data", data)

    # The error of every command names the run.
    reasons = set()
    for run in map(str, (texts, student, unlabeled)):
        for command in (
            (tstitch.main, run, run, "--fraction 0.5 --guidance 2 --out", tmp_path / "grid.png"),
            (ppap.main, run, "--out", tmp_path / "experts"),
            (ppgn.main, run, "--guide x --out", tmp_path / "grid.png"),
            (diffusion_classifier.main, run),
        ):
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
