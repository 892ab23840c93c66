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
from tests.helpers import FORK_SERVER, HERE, TINY_NET, call, no_grid, on_ranks, skip_grid

# ---------------------------------------------------------------- each file can be taken away

LOSS = """
import torch
from loss import diffusion_loss
from schedule import make_schedule
weight = torch.zeros((), requires_grad=True)
loss, logsnr = diffusion_loss(
    lambda z, logsnr, label: weight * z, torch.ones(4, 3, 8, 8), make_schedule("cosine", 8)
)
loss.mean().backward()
assert loss.shape == logsnr.shape == (4,) and weight.grad.isfinite() and weight.grad != 0
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
net = UNet(
    16, 3, base_channels=8, emb_channels=16, channel_multiplier=(1, 2), num_res_blocks=(1, 1)
)
v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3]))
v_hat.sum().backward()
assert v_hat.shape == (2, 3, 16, 16)
"""
UVIT = """
import torch
from uvit import UViT
net = UViT(
    16, 3, base_channels=8, emb_channels=16, channel_multiplier=(1, 2), num_res_blocks=(1,),
    num_transformer_blocks=1,
)
v_hat = net(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3]))
v_hat.sum().backward()
assert v_hat.shape == (2, 3, 16, 16)
"""
SAMPLE = """
import torch
from sample import SAMPLERS, sample
from schedule import make_schedule, alpha_sigma
def net(z, logsnr, label=None):  # the best prediction for images that are all 0.5
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
for name in ("real", "fake"):
    os.mkdir(name)
    for i in range(8):
        pixels = random.integers(0, 200 if name == "fake" else 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}/{i}.png")
assert fid.frechet_distance([0.0], [[1.0]], [3.0], [[4.0]]) == 10.0  # 3^2 + (2 - 1)^2
same, other = (fid.fid("real", fake, features=Colors()) for fake in ("real", "fake"))
assert abs(same) < 1e-9 and other > 0.01
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
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_file_works_in_an_empty_folder(tmp_path, files, script):
    for file in files:
        shutil.copy(f"{HERE}/{file}.py", tmp_path)
    # A forked process runs the script. It finds the copies, the installed packages, and no other
    # file of the project.
    head = f"""
import os, sys
sys.stderr = open({str(tmp_path / "errors.txt")!r}, "w")
others = [p for p in sys.path if p not in {["", HERE, f"{HERE}/tests", f"{HERE}/related"]!r}]
sys.path[:] = [{str(tmp_path)!r}, *others]
assert not {{"schedule", "loss", "unet", "uvit", "sample", "fid", "train"}} & {{*sys.modules}}
os.chdir({str(tmp_path)!r})
"""
    (tmp_path / "script.py").write_text(head + script)
    process = FORK_SERVER.Process(target=runpy.run_path, args=(str(tmp_path / "script.py"),))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "errors.txt").read_text()


# ---------------------------------------------------------------- the network contract


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A module of a user, with a network that has forward() and nothing else, and datasets."""
    (tmp_path / "elsewhere.py").write_text(
        """
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
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("elsewhere", None)


SHORT = "--batch 4 --no-bf16 --save-every 2 --log-every 1"
TINY = [SHORT, "--model-args", json.dumps(TINY_NET)]


def test_a_net_with_only_forward_trains_with_grids_resumes_and_samples_with_guidance(elsewhere):
    out = str(elsewhere / "run")
    model = ["--model elsewhere:BareNet"]
    options = [*model, SHORT, "--sample-every 2 --out", out]
    call(train.main, *options, "--steps 2")
    call(train.main, *options, "--steps 4")
    assert {"samples_0000002.png", "samples_0000004.png"} <= set(os.listdir(out))
    with open(f"{out}/log.jsonl") as log:
        assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]

    short = ["--steps 3 --n 6 --batch 4"]
    results = {}
    for scale in ("1", "3"):
        file = str(elsewhere / f"{scale}.npz")
        call(sampling.main, out, *model, *short, "--guidance", scale, "--out", file)
        results[scale] = np.load(file)["arr_0"]
    assert results["1"].shape == (6, 32, 32, 3)
    assert (results["1"] != results["3"]).any()


def test_guidance_without_any_null_label_is_refused():
    def net(z, logsnr, label):
        return z

    labels = torch.zeros(2, dtype=torch.int64)
    z, logsnr = torch.ones(2, 3, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match="null_label"):
        sampling.guided(net, 2.0)
    assert torch.equal(sampling.guided(net, 2.0, 7)(z, logsnr, labels), z)


# ---------------------------------------------------------------- the dataset contract


def weights(out):
    return load_checkpoint(out)["net"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["Squares", "Batches"])
def test_a_dataset_class_trains_like_the_same_images_in_a_file(elsewhere, monkeypatch, name):
    monkeypatch.chdir(elsewhere)
    import elsewhere as module

    pairs = [module.Squares(32)[i] for i in range(20)]
    images, labels = np.stack([image for image, _ in pairs]), np.array([y for _, y in pairs])
    np.savez("file.npz", x=images, y=labels, classes=["dark", "light"])
    common = [*TINY, "--no-flip"]
    dataset = ["--data", f"elsewhere:{name}"]
    no_grid(monkeypatch)
    call(train.main, *common, "--steps 4 --data file.npz --out file")
    call(train.main, *common, "--steps 4 --workers 0", *dataset)  # into runs/Squares-32
    call(train.main, *common, "--steps 4 --workers 2 --out two_workers", *dataset)
    assert load_checkpoint("file")["config"]["classes"] == ["dark", "light"]
    assert same(weights("file"), weights(f"runs/{name}-32"))
    assert same(weights("file"), weights("two_workers"))

    # Interrupted after two steps and resumed, it is the same again.
    common += ["--decay 0", *dataset]
    call(train.main, *common, "--steps 2 --out resumed")
    call(train.main, *common, "--steps 4 --out resumed")
    call(train.main, *common, "--steps 4 --out whole")
    assert same(weights("resumed"), weights("whole"))


def test_two_ranks_train_on_a_dataset_class_as_one_does(elsewhere):
    common = [*TINY, "--steps 2 --device cpu --workers 1 --data elsewhere:Squares"]
    statuses, _, errors = on_ranks(
        train.main, *common, "--out", "two", cwd=elsewhere, prepare=skip_grid
    )
    assert statuses == [0, 0], errors
    call(train.main, *common, "--out", elsewhere / "one")
    one, two = weights(str(elsewhere / "one")), weights(str(elsewhere / "two"))
    assert all(torch.allclose(one[n], two[n], atol=1e-5) or "norm_k.bias" in n for n in one)


def test_a_dataset_class_without_labels(elsewhere):
    out = str(elsewhere / "run")
    call(train.main, *TINY, "--steps 2 --data elsewhere:Unlabeled --out", out)
    assert load_checkpoint(out)["config"]["classes"] == []
    assert os.path.exists(f"{out}/samples_0000002.png")


def test_an_existing_file_wins_over_a_dataset_class(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)
    os.mkdir("elsewhere:Squares")
    Image.new("RGB", (32, 32)).save("elsewhere:Squares/black.png")
    call(train.main, *TINY, "--steps 1 --data elsewhere:Squares --out run")
    config = load_checkpoint("run")["config"]
    assert config["classes"] == [] and config["data"] == [os.path.abspath("elsewhere:Squares")]


@pytest.mark.parametrize(
    "name", ["Floats", "Large", "WrongLabel", "Missing", "__name__", "Squares:Squares"]
)
def test_a_wrong_dataset_class_is_named(elsewhere, name):
    with pytest.raises((ValueError, OSError), match=f"elsewhere:{name}"):
        call(train.main, *TINY, "--steps 1 --workers 0 --data", f"elsewhere:{name}")


def test_a_checkpoint_does_not_import_a_dataset_class(elsewhere, monkeypatch):
    out = str(elsewhere / "run")
    data = ["--data elsewhere:Squares"]
    call(train.main, *TINY, "--steps 2", *data, "--out", out)
    sys.modules.pop("elsewhere")
    with pytest.raises(ValueError, match="--data elsewhere:Squares"):
        call(train.main, *TINY, "--steps 3 --out", out)
    assert "elsewhere" not in sys.modules
    call(train.main, *TINY, "--steps 3", *data, "--out", out)
    assert load_checkpoint(out)["step"] == 3
