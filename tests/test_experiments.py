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
