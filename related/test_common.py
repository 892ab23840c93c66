"""Tests of related/common.py: which runs the commands accept."""

import json
import os
import re

import numpy as np
import pytest

from related import (
    diffusion_classifier,
    distill,
    ppap,
    ppgn,
    tstitch,
)
from tests.helpers import call, train_small


def test_unsuitable_runs_are_rejected(tmp_path, monkeypatch):
    fields = dict(
        base_channels=8,
        emb_channels=16,
        channel_multiplier=[1, 2],
        num_res_blocks=[1],
        num_transformer_blocks=1,
    )
    texts = str(train_small(tmp_path / "texts", "--model-args", json.dumps(fields), "--captions"))
    plain = str(train_small(tmp_path / "plain", "--model-args", json.dumps(fields)))
    call(distill.main, plain, "--steps 1 --teacher-steps 2 --updates 1 --batch 4")
    np.savez(tmp_path / "unlabeled.npz", x=np.zeros((4, 32, 32, 3), np.uint8))
    unlabeled = str(
        train_small(
            tmp_path / "unlabeled",
            "--model-args",
            json.dumps(fields),
            "--data",
            tmp_path / "unlabeled.npz",
        )
    )
    reasons = set()
    for run in (texts, f"{plain}-1steps", unlabeled):
        for command, options in (
            (
                tstitch.main,
                [run, "--fraction 0.5 --guidance 2 --out", tmp_path / "g.png"],
            ),
            (ppap.main, ["--out", tmp_path / "x"]),
            (ppgn.main, ["--guide x --out", tmp_path / "g.png"]),
            (diffusion_classifier.main, []),
        ):
            with pytest.raises(ValueError, match=re.escape(run)) as error:
                call(command, run, options)
            reasons.add(str(error.value).replace(run, "RUN"))
    assert len(reasons) == 3  # of each run another one
    monkeypatch.setenv("WORLD_SIZE", "1")
    call(
        tstitch.main,
        unlabeled,
        unlabeled,
        "--fraction 0.5 --steps 2 --n 3 --out",
        tmp_path / "new" / "grid.png",
    )
    assert os.path.exists(tmp_path / "new" / "grid.png")
