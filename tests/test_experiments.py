"""Tests of docs/experiments.py and docs/cifar.py."""

import os
import re

import numpy as np
import pytest
import torch

from docs import cifar, experiments, judge

CLASSES = [f"class{i}" for i in range(10)]


def binary_cifar(folder, records=20):
    """Write random data in the format of CIFAR-10's binary version. Returns the labels and planes.

    planes: (6 files, records, 3, 32, 32).
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, (6, records, 1), dtype=np.uint8)
    planes = random.integers(0, 256, (6, records, 3, 32, 32), dtype=np.uint8)
    names = [name for names in cifar.FILES.values() for name in names]
    for name, label, image in zip(names, labels, planes):
        np.concatenate([label, image.reshape(records, -1)], 1).tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    return labels[:, :, 0], planes


def test_conversion_of_cifar(tmp_path):
    labels, planes = binary_cifar(tmp_path / "bin")
    cifar.main([str(tmp_path / "bin"), "--out", str(tmp_path)])
    for name, parts in (("train", slice(0, 5)), ("test", slice(5, 6))):
        with np.load(tmp_path / f"cifar10_{name}.npz") as data:
            assert data["classes"].tolist() == CLASSES
            assert (data["y"] == labels[parts].reshape(-1)).all()
            expected = planes[parts].transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
            assert (data["x"] == expected).all()

    # A truncated file, and one of another format.
    for content in (b"\0" * 3000, b"\377" * 3073):
        (tmp_path / "bin" / "test_batch.bin").write_bytes(content)
        with pytest.raises(ValueError, match="test_batch.bin .* binary version"):
            cifar.main([str(tmp_path / "bin"), "--out", str(tmp_path)])


def test_resnet56_says_where_its_weights_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="resnet56.* docs/cifar.py"):
        cifar.ResNet56()


def test_resnet56_moves_to_a_device_with_its_weights(tmp_path, monkeypatch):
    # Random weights with the names of the public file, as DataParallel saves them.
    def weights(name, channels, cin):
        yield f"module.{name[0]}.weight", torch.randn(channels, cin, 3, 3)
        for key in ("running_mean", "running_var", "weight", "bias"):
            yield f"module.{name[1]}.{key}", torch.rand(channels)

    state = dict(weights(("conv1", "bn1"), 16, 3))
    for layer, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(9):
            cin = channels // 2 if layer > 1 and block == 0 else channels
            prefix = f"layer{layer}.{block}."
            state |= dict(weights((prefix + "conv1", prefix + "bn1"), channels, cin))
            state |= dict(weights((prefix + "conv2", prefix + "bn2"), channels, channels))
    state |= {"module.linear.weight": torch.randn(10, 64), "module.linear.bias": torch.randn(10)}
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=state), cifar.WEIGHTS)

    network = cifar.ResNet56().to("meta")
    features, logits = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta"))
    assert (features.shape, logits.shape) == ((2, 64), (2, 10))


def test_first_images_keeps_files_of_one_name_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(experiments.FOLDER)
    paths = []
    for i, name in enumerate(("a", "b")):
        os.mkdir(name)
        x = np.full((5, 32, 32, 3), i, np.uint8)
        np.savez(f"{name}/images.npz", x=x, y=np.arange(5), classes=np.array(CLASSES))
        paths.append(experiments.first_images(f"{name}/images.npz", 2, name))
    for i, path in enumerate(paths):
        with np.load(path) as data:
            assert data["x"].shape == (2, 32, 32, 3)
            assert (data["x"] == i).all()
            assert data["y"].tolist() == [0, 1]
            assert data["classes"].tolist() == CLASSES


def test_table():
    rows = [{"arm": "a", "x": "1"}, {"arm": "b", "x": "2"}]
    assert experiments.table(rows) == "| arm | x |\n| --- | --- |\n| a | 1 |\n| b | 2 |"


def test_list_of_findings_and_errors(capsys):
    experiments.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(experiments.FINDINGS)
    with pytest.raises(ValueError, match="nonsense: no such finding"):
        experiments.main(["nonsense"])
    with pytest.raises(ValueError, match="--data cifar10_train.npz"):
        experiments.main(["blocks", "--quick"])


class RandomFeatures(torch.nn.Module):
    """Stands for ResNet-56, whose weights a machine may not have."""

    def forward(self, images):
        return images.float().mean((2, 3)) / 255, None


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.FINDINGS)
def test_quick_runs_of_all_findings(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "ResNet56", RandomFeatures)
    os.mkdir("runs")
    network = judge.Judge(trained=False)
    torch.save(network.state_dict(), judge.WEIGHTS)
    images = np.random.default_rng(0).integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % 10
    np.savez(judge.OTHERS, x=images[:40], y=labels[:40])
    np.savez("train.npz", x=images, y=labels, classes=np.array(CLASSES))
    np.savez("test.npz", x=images[:40], y=labels[:40], classes=np.array(CLASSES))

    experiments.main([name, "--quick", "--seed", "7", "--data", "train.npz", "test.npz"])
    output = capsys.readouterr().out
    finding = experiments.FINDINGS[name]
    rows = [line for line in output.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(finding.arms) * len(finding.guidance)
    for arm in finding.arms:
        assert sum(row.startswith(f"| {arm} |") for row in rows) == len(finding.guidance)
    assert len(re.findall(r"^\$ python train.py.* --seed 7 ", output, re.M)) == len(finding.arms)
