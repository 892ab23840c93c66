"""The contracts: each file works alone, and so do a bare network and a dataset class."""

import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample as sampling
import train
from support.checkpoint import load_checkpoint
from tests.helpers import FORK_SERVER, HERE, TINY_NET, call, log_lines, no_grid, on_ranks, skip_grid

# ---------------------------------------------------------------- each file works alone

LOSS = """
import torch
from loss import diffusion_loss
from schedule import make_schedule

weight = torch.zeros((), requires_grad=True)

def net(z, logsnr, label):
    return weight * z

loss, logsnr = diffusion_loss(net, torch.ones(4, 3, 8, 8), make_schedule("cosine", 8))
loss.mean().backward()
assert loss.shape == (4,)
assert logsnr.shape == (4,)
assert weight.grad.isfinite()
assert weight.grad != 0
"""
SCHEDULE = """
import torch
from schedule import alpha_sigma, make_schedule

alpha, sigma = alpha_sigma(make_schedule("shifted:64", 128)(torch.tensor([0.1, 0.9])))
assert torch.allclose(alpha**2 + sigma**2, torch.ones(2))
"""
UNET = """
import torch
from unet import UNet

widths = dict(base_channels=8, emb_channels=16, channel_multiplier=(1, 2))
net = UNet(16, 3, num_res_blocks=(1, 1), **widths)
v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3]))
v_hat.sum().backward()
assert v_hat.shape == (2, 3, 16, 16)
"""
UVIT = """
import torch
from uvit import UViT

widths = dict(base_channels=8, emb_channels=16, channel_multiplier=(1, 2))
net = UViT(16, 3, num_res_blocks=(1,), num_transformer_blocks=1, **widths)
v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3]))
v_hat.sum().backward()
assert v_hat.shape == (2, 3, 16, 16)
"""
SAMPLE = """
import torch
from sample import SAMPLERS, sample
from schedule import alpha_sigma, make_schedule

def net(z, logsnr, label=None):
    # The exact prediction if all pixels are 0.5.
    alpha, sigma = alpha_sigma(logsnr, like=z)
    return (alpha * z - 0.5) / sigma

for sampler in SAMPLERS:
    x = sample(net, (2, 3, 8, 8), make_schedule("cosine", 8), steps=8, sampler=sampler)
    assert torch.allclose(x, torch.full_like(x, 0.5), atol=1e-2), sampler
"""
FID = """
import os
import numpy as np
import torch
import fid
from PIL import Image

class Colors(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3)) / 255

random = np.random.default_rng(0)
for name, brightest in (("real", 256), ("fake", 200)):
    os.mkdir(name)
    for i in range(8):
        pixels = random.integers(0, brightest, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}/{i}.png")
assert abs(fid.fid("real", "real", features=Colors())) < 1e-9
assert fid.fid("real", "fake", features=Colors()) > 0.01

# Means 0 and 3, standard deviations 1 and 2: 3^2 + (2 - 1)^2.
assert fid.frechet_distance([0.0], [[1.0]], [3.0], [[4.0]]) == 10.0
"""


@pytest.mark.parametrize(
    "files, script",
    [
        (["schedule"], SCHEDULE),
        (["loss", "schedule"], LOSS),
        (["unet"], UNET),
        (["uvit", "unet"], UVIT),
        (["sample", "schedule"], SAMPLE),
        (["fid"], FID),
    ],
    ids=["schedule", "loss", "unet", "uvit", "sample", "fid"],
)
def test_each_file_works_in_an_empty_folder(tmp_path, files, script):
    for file in files:
        shutil.copy(f"{HERE}/{file}.py", tmp_path)

    # A forked process runs the script. It finds the copies, the installed packages, and no other
    # file of the project.
    folders = ["", HERE, f"{HERE}/tests", f"{HERE}/related"]
    errors = tmp_path / "errors.txt"
    head = f"""
import os, sys
sys.stderr = open({str(errors)!r}, "w")
others = [path for path in sys.path if path not in {folders!r}]
sys.path[:] = [{str(tmp_path)!r}, *others]
assert not {{"schedule", "loss", "unet", "uvit", "sample", "fid", "train"}} & {{*sys.modules}}
os.chdir({str(tmp_path)!r})
"""
    path = tmp_path / "script.py"
    path.write_text(head + script)
    process = FORK_SERVER.Process(target=runpy.run_path, args=(str(path),))
    process.start()
    process.join(300)
    assert process.exitcode == 0, errors.read_text()


# ---------------------------------------------------------------- the network contract


ELSEWHERE = """
import numpy as np
import torch

class BareNet(torch.nn.Module):
    def __init__(self, res, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 3, 3, padding=1)
        self.shade = torch.nn.Embedding(num_classes + 1, 1)

    def forward(self, z, logsnr, label):
        level = (logsnr / 15)[:, None, None, None].expand(-1, 1, *z.shape[2:])
        return self.conv(torch.cat([z, level], 1)) + self.shade(label)[:, :, None, None]

class Squares:
    classes = ["dark", "light"]

    def __init__(self, res):
        self.res = res

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return np.full((self.res, self.res, 3), 6 * i + 100 * (i % 2), np.uint8), i % 2

class Unlabeled(Squares):
    classes = []

    def __getitem__(self, i):
        return torch.full((self.res, self.res, 3), 10 * i, dtype=torch.uint8), None

class Batches(Squares):
    def __getitems__(self, indices):
        images, labels = zip(*map(self.__getitem__, indices))
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

class Floats(Squares):
    def __getitem__(self, i):
        return np.zeros((self.res, self.res, 3)), 0

class Large(Squares):
    def __getitem__(self, i):
        return np.zeros((self.res + 1, self.res, 3), np.uint8), 0

class WrongLabel(Squares):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], 2
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The folder of a user's module: a network that has only forward(), and datasets."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("elsewhere", None)


SHORT = "--batch 4 --no-bf16 --save-every 2 --log-every 1"


def test_a_net_with_only_forward_trains_with_grids_resumes_and_samples_with_guidance(elsewhere):
    # Train two steps, and resume for two more.
    out = elsewhere / "run"
    model = "--model elsewhere:BareNet"
    options = [model, SHORT, "--sample-every 2 --out", out]
    call(train.main, *options, "--steps 2")
    call(train.main, *options, "--steps 4")
    assert {"samples_0000002.png", "samples_0000004.png"} <= set(os.listdir(out))
    assert [line["step"] for line in log_lines(out)] == [1, 2, 3, 4]

    # Guidance changes the samples.
    samples = {}
    for scale in ("1", "3"):
        path = elsewhere / f"{scale}.npz"
        options = "--steps 3 --n 6 --batch 4 --guidance"
        call(sampling.main, out, model, options, scale, "--out", path)
        samples[scale] = np.load(path)["arr_0"]
    assert samples["1"].shape == (6, 32, 32, 3)
    assert (samples["1"] != samples["3"]).any()


def test_guidance_without_any_null_label_is_refused():
    def net(z, logsnr, label):
        return z

    with pytest.raises(ValueError, match="null_label"):
        sampling.guided(net, 2.0)

    # This net ignores labels, so guidance with a null label changes nothing.
    labels = torch.zeros(2, dtype=torch.int64)
    z, logsnr = torch.ones(2, 3, 4, 4), torch.zeros(2)
    assert torch.equal(sampling.guided(net, 2.0, 7)(z, logsnr, labels), z)


# ---------------------------------------------------------------- the dataset contract

TINY = [SHORT, "--model-args", json.dumps(TINY_NET)]


def weights(out):
    """The weights of a run, a dict."""
    return load_checkpoint(str(out))["net"]


def equal_weights(out, other):
    """True if two runs have the same weights, bitwise."""
    a, b = weights(out), weights(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["Squares", "Batches"])
def test_a_dataset_class_trains_like_the_same_images_in_a_file(elsewhere, monkeypatch, name):
    monkeypatch.chdir(elsewhere)
    no_grid(monkeypatch)
    import elsewhere as module

    # The same images in a file.
    squares = module.Squares(32)
    images, labels = zip(*[squares[i] for i in range(20)])
    np.savez("file.npz", x=np.stack(images), y=np.array(labels), classes=["dark", "light"])

    # Without --out, the run is named after the class. Workers change nothing.
    common = [*TINY, "--no-flip"]
    dataset = f"--data elsewhere:{name}"
    call(train.main, *common, "--steps 4 --data file.npz --out file")
    call(train.main, *common, "--steps 4 --workers 0", dataset)
    call(train.main, *common, "--steps 4 --workers 2 --out two_workers", dataset)
    assert load_checkpoint("file")["config"]["classes"] == ["dark", "light"]
    assert equal_weights("file", f"runs/{name}-32")
    assert equal_weights("file", "two_workers")

    # A run that is resumed after two steps gives the same weights, too.
    common += ["--decay 0", dataset]
    call(train.main, *common, "--steps 2 --out resumed")
    call(train.main, *common, "--steps 4 --out resumed")
    call(train.main, *common, "--steps 4 --out whole")
    assert equal_weights("resumed", "whole")


def test_two_ranks_train_on_a_dataset_class_as_one_does(elsewhere):
    options = [*TINY, "--steps 2 --device cpu --workers 1 --data elsewhere:Squares"]
    statuses, _, errors = on_ranks(
        train.main, *options, "--out two", cwd=elsewhere, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    call(train.main, *options, "--out", elsewhere / "one")

    # The gradient of norm_k.bias is rounding noise, which Adam enlarges.
    one, two = weights(elsewhere / "one"), weights(elsewhere / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5) or "norm_k.bias" in name, name


def test_a_dataset_class_without_labels(elsewhere):
    out = elsewhere / "run"
    call(train.main, *TINY, "--steps 2 --data elsewhere:Unlabeled --out", out)
    assert load_checkpoint(str(out))["config"]["classes"] == []
    assert (out / "samples_0000002.png").exists()


def test_an_existing_file_wins_over_a_dataset_class(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)
    os.mkdir("elsewhere:Squares")
    Image.new("RGB", (32, 32)).save("elsewhere:Squares/black.png")
    call(train.main, *TINY, "--steps 1 --data elsewhere:Squares --out run")
    config = load_checkpoint("run")["config"]
    assert config["classes"] == []
    assert config["data"] == [os.path.abspath("elsewhere:Squares")]


@pytest.mark.parametrize(
    "name", ["Floats", "Large", "WrongLabel", "Missing", "__name__", "Squares:Squares"]
)
def test_invalid_dataset_classes_are_rejected(elsewhere, name):
    with pytest.raises((ValueError, OSError), match=f"elsewhere:{name}"):
        call(train.main, *TINY, "--steps 1 --workers 0 --data", f"elsewhere:{name}")


def test_a_checkpoint_does_not_import_a_dataset_class(elsewhere):
    out = elsewhere / "run"
    data = "--data elsewhere:Squares"
    call(train.main, *TINY, "--steps 2", data, "--out", out)

    # To resume, the command line must name the class again. The checkpoint alone imports nothing.
    sys.modules.pop("elsewhere")
    with pytest.raises(ValueError, match="--data elsewhere:Squares"):
        call(train.main, *TINY, "--steps 3 --out", out)
    assert "elsewhere" not in sys.modules
    call(train.main, *TINY, "--steps 3", data, "--out", out)
    assert load_checkpoint(str(out))["step"] == 3
