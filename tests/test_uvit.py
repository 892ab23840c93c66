"""Tests of uvit.py: position embeddings, and the published configurations."""

import re

import pytest
import torch

import unet
import uvit
from tests.helpers import HERE, command, randomize, tiny_nets
from uvit import UViT

# Parameters in millions, GMAC, and the tolerance of the GMAC. The paper's authors published the
# family of 64 and 128 px. U-ViT L is quoted elsewhere.
PUBLISHED = {
    "family 64": (394.19, 109.2, 0.003),
    "family 64 wide": (1243.2, 419.2, 0.003),
    "family 128": (397.59, 138.5, 0.003),
    "family 128 wide": (1253.7, 536.4, 0.003),
    "U-ViT L 128": (2455, 533.3, 0.003),
    "U-ViT L 256": (2455, 555, 0.05),
    "U-ViT L 512": (2455, 535.0, 0.003),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_configurations(name):
    with torch.device("meta"):
        net = UViT(**uvit.CONFIGS[name])
    millions, _, tolerance = PUBLISHED[name]
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=min(tolerance, 0.01))


QUICK = ("family 64", "U-ViT L 128")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_cost_of_published_configurations(name, capsys):
    unet.print_table(UViT, {name: uvit.CONFIGS[name]})
    line = re.search(rf"{name} +([\d.]+) M +([\d.]+) ", capsys.readouterr().out)
    millions, gmac, tolerance = PUBLISHED[name]
    assert float(line[1]) == pytest.approx(millions, rel=min(tolerance, 0.01))
    assert float(line[2]) == pytest.approx(gmac, rel=tolerance)


@pytest.mark.slow
def test_table_command(tmp_path):
    result = command(f"{HERE}/uvit.py", cwd=tmp_path)
    assert result.returncode == 0 and "533.6" in result.stdout, result.stderr


def test_position_of_a_token_matters():
    net = randomize(tiny_nets()[0])
    z, logsnr = torch.randn(1, 3, 16, 16), torch.zeros(1)
    before = net(z, logsnr)
    net.position.data = net.position.data.flip(2)
    assert (net(z, logsnr) - before).abs().max() > 1e-5
