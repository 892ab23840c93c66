"""Tests of support/recipes.py."""

import pytest
import torch

import unet
import uvit
from support.checkpoint import build_net
from support.recipes import RECIPES, TRAINING
from unet import UNet
from uvit import UViT

# The smallest and the largest number of parameters of each size, in millions.
MILLIONS = dict(tiny=(0.8, 4), small=(55, 105), base=(300, 500), paper=(900, 2600))


def resolutions(model, size):
    """The resolutions that have a recipe."""
    if size == "paper":
        return [128, 256, 512]
    # 4 to 16 px are for latents.
    latents = [4, 8, 16] if (model, size) == ("uvit", "tiny") else []
    return [*latents, 32, 64, 128, 256, 512]


def test_there_is_a_recipe_for_each_size_and_resolution():
    # test_text.py tests the recipes of the size "text".
    assert list(RECIPES["uvit"]) == ["tiny", "small", "base", "paper", "text"]
    assert list(RECIPES["unet"]) == ["tiny", "small", "base", "paper"]
    assert set(RECIPES) == {"uvit", "unet"}
    for model in RECIPES:
        for size in MILLIONS:
            assert (model, size) in TRAINING
            assert list(RECIPES[model][size]) == resolutions(model, size)


@pytest.mark.slow
def test_every_recipe_builds_and_has_its_size():
    cases = [
        (model, size, res) for model in RECIPES for size in MILLIONS for res in RECIPES[model][size]
    ]
    for model, size, res in cases:
        fields = RECIPES[model][size][res]
        with torch.device("meta"):
            net = build_net(model, dict(fields, res=res, num_classes=1000))
            v_hat = net(torch.empty(2, 3, res, res), torch.empty(2))
        assert v_hat.shape == (2, 3, res, res)

        # v contains the noise. The stem must be wider than the patches, so that it gets through.
        patch_channels = 3 * unet.PATCHING[fields.get("patching", "none")] ** 2
        assert net.stem.conv.out_channels > patch_channels

        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        smallest, largest = MILLIONS[size]
        assert smallest <= millions <= largest, (model, size, res, millions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, model, res",
    [
        ("U-Net 128", "unet", 128),
        ("U-Net 256", "unet", 256),
        ("U-Net 512 dwt_2", "unet", 512),
        ("U-ViT L 128", "uvit", 128),
        ("U-ViT L 256", "uvit", 256),
        ("U-ViT L 512", "uvit", 512),
    ],
)
def test_paper_recipes_are_the_published_configurations(name, model, res):
    classes = {"unet": (UNet, unet.CONFIGS), "uvit": (UViT, uvit.CONFIGS)}
    net_class, configs = classes[model]
    with torch.device("meta"):
        published = net_class(**configs[name])
        recipe = net_class(**RECIPES[model]["paper"][res], res=res)
    assert [p.shape for p in published.parameters()] == [p.shape for p in recipe.parameters()]
