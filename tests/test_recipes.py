"""Tests of support/recipes.py."""

import pytest
import torch

import unet
import uvit
from support.checkpoint import build_net
from support.recipes import RECIPES, TRAINING
from unet import UNet
from uvit import UViT


@pytest.mark.slow
def test_every_recipe_builds_and_has_its_size():
    limits = dict(tiny=(1, 4), small=(55, 105), base=(300, 500), paper=(900, 2600))
    for model, sizes in RECIPES.items():
        assert list(sizes) == ["tiny", "small", "base", "paper"] + ["text"] * (model == "uvit")
        for size, by_res in sizes.items():
            if size == "text":
                continue  # see test_text_recipes
            assert (model, size) in TRAINING and list(by_res) == (
                [128, 256, 512]
                if size == "paper"
                else [4, 8, 16] * ((model, size) == ("uvit", "tiny")) + [32, 64, 128, 256, 512]
            )
            for res, fields in by_res.items():
                with torch.device("meta"):
                    net = build_net(model, dict(fields, res=res, num_classes=1000))
                    assert net(torch.empty(2, 3, res, res), torch.empty(2)).shape == (
                        2,
                        3,
                        res,
                        res,
                    )
                assert (
                    net.stem.conv.out_channels
                    > 3 * unet.PATCHING[fields.get("patching", "none")] ** 2
                )  # v holds the noise, which must get through
                millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
                assert limits[size][0] <= millions <= limits[size][1], (model, size, res, millions)
    for name, model, res in (
        ("U-Net 128", "unet", 128),
        ("U-Net 256", "unet", 256),
        ("U-Net 512 dwt_2", "unet", 512),
        ("U-ViT L 128", "uvit", 128),
        ("U-ViT L 256", "uvit", 256),
        ("U-ViT L 512", "uvit", 512),
    ):
        net_class, config = {"unet": (UNet, unet.CONFIGS), "uvit": (UViT, uvit.CONFIGS)}[model]
        with torch.device("meta"):
            published, ours = (
                net_class(**config[name]),
                net_class(**RECIPES[model]["paper"][res], res=res),
            )
        assert [p.shape for p in published.parameters()] == [p.shape for p in ours.parameters()]
