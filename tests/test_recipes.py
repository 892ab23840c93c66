"""Tests of support/recipes.py."""

import pytest
import torch

import unet
import uvit
from support.checkpoint import build_net, net_class
from support.data import Shapes
from support.recipes import DERIVED, RECIPES, TRAINING, derive, derived_from
from support.runtime import pixels
from support.settings import make_config
from unet import UNet, UNetBlock
from uvit import TransformerBlock, UViT

# The smallest and the largest number of parameters of each size, in millions.
MILLIONS = dict(tiny=(0.8, 4), small=(55, 105), base=(300, 500), paper=(900, 2600))


def resolutions(model, size):
    """The resolutions that have a recipe."""
    if size == "paper":
        return [128, 256, 512]
    # 4 to 16 px are for latents.
    smaller = [4, 8, 16, 28] if (model, size) == ("uvit", "tiny") else []
    return [*smaller, 32, 64, 128, 256, 512]


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


# ---------------------------------------------------------------- other resolutions

SIZES = [28, 40, 48, 96, 192, 384, 1024, "48x64", "96x160"]
CPU = torch.device("cpu")
NETS = [(model, size) for model in RECIPES for size in DERIVED]


def config_of(model, size, res):
    """The settings of a run on Shapes."""
    return make_config(dict(model=model, size=size, res=res), CPU, Shapes(res))


def source(model, size, res):
    """The row from which a recipe is derived: its resolution, and its arguments at that size."""
    row, _ = derive(model, size, *pixels(res), net_class(model))
    return row, config_of(model, size, row)["model_args"]


def special_levels(model, fields):
    """What the options that name feature map sizes do: (attention, dropout) of each level."""
    with torch.device("meta"):
        net = build_net(model, fields | dict(dropout=0.5))
    levels = [next(iter(level)) for level in net.down]
    dropouts = [
        [module.p for module in level.modules() if isinstance(module, torch.nn.Dropout)]
        for level in levels
    ]
    attention = [
        isinstance(level, TransformerBlock)
        or (isinstance(level, UNetBlock) and level.attention is not None)
        for level in levels
    ]
    return attention, dropouts


@pytest.mark.parametrize("model, size", NETS)
def test_sizes_without_a_row_have_a_derived_recipe(model, size):
    for res in SIZES:
        height, width = pixels(res)
        config = config_of(model, size, res)
        fields = config["model_args"]

        # The widths and blocks are those of a row. At 1024 px there is one more level of one block.
        row, of_row = source(model, size, res)
        channels, blocks = list(fields["channel_multiplier"]), list(fields["num_res_blocks"])
        if res == 1024:
            assert channels.pop(0) == channels[0]
            assert blocks.pop(0) == 1
            assert of_row == fields
            row, of_row = 512, config_of(model, size, 512)["model_args"]
        assert channels == of_row["channel_multiplier"]
        assert blocks == of_row["num_res_blocks"]
        for name in ("patching", "base_channels", "num_transformer_blocks", "emb_channels"):
            assert fields.get(name) == of_row.get(name)

        # So are the training settings, apart from the loss and the micro-batch at 1024 px. The
        # schedule follows from the size.
        other = config_of(model, size, row)
        own = {"res", "model_args", "schedule"}
        if res == 1024:
            own |= {"multiscale", "micro"}
        assert {key for key in config if config[key] != other[key]} <= own
        assert config["schedule"] == ("cosine" if height <= 64 else "shifted:64")
        assert config["multiscale"] == (res == 1024)

        # The lowest feature maps are about as large as in the rows, and have the image's shape.
        patching = fields.get("patching", "none")
        levels = unet.grid_sizes((height, width), patching, len(fields["channel_multiplier"]))
        assert 7 <= min(levels[-1]) <= 24, (res, levels)
        assert levels[-1][0] * width == levels[-1][1] * height


@pytest.mark.parametrize(
    "model, size",
    [pytest.param(*net, marks=[] if net[1] == "tiny" else pytest.mark.slow) for net in NETS],
)
def test_every_derived_recipe_builds_and_has_its_size(model, size):
    for res in SIZES:
        fields = config_of(model, size, res)["model_args"]
        with torch.device("meta"):
            net = build_net(model, fields | dict(num_classes=1000))
            z = torch.empty(2, 3, *pixels(res))
            assert net(z, torch.empty(2)).shape == z.shape
        smallest, largest = MILLIONS[size]
        assert smallest <= sum(p.numel() for p in net.parameters()) / 1e6 <= largest


@pytest.mark.parametrize("model, size", NETS)
def test_derived_recipes_have_attention_and_dropout_on_the_levels_of_the_row(model, size):
    for res in (28, 48, 96, "96x160"):
        _, of_row = source(model, size, res)
        fields = config_of(model, size, res)["model_args"]
        assert special_levels(model, fields) == special_levels(model, of_row), res


def test_the_32x32_maps_of_base_become_24x24_at_96_px():
    assert RECIPES["uvit"]["base"][128]["attn_resolutions"] == [32]
    row, fields = derive("uvit", "base", 96, 96, UViT)
    assert row == 128
    assert fields["attn_resolutions"] == [24]
    # 16x16 and 8x8 in the published U-Net, whose dropout is at 16x16 and below.
    row, fields = derive("unet", "base", 48, 48, UNet)
    assert row == 32
    assert fields["attn_resolutions"] == [24, 12]
    assert fields["dropout_from_resolution"] == 24


def test_resolutions_with_a_row_have_exactly_that_recipe():
    for model, sizes in RECIPES.items():
        for size, rows in sizes.items():
            for res, fields in rows.items():
                dataset = Shapes(res)
                dataset.net_fields = dict(text_tokens=8) if size == "text" else {}
                config = make_config(dict(model=model, size=size, res=res), CPU, dataset)
                side = res if isinstance(res, int) else list(pixels(res))
                fixed = dict(res=side, num_classes=10) | dataset.net_fields
                assert config["model_args"] == fields | fixed
                training = TRAINING[model, size] | TRAINING.get((model, size, res), {})
                assert {key: config[key] for key in training} == training
                assert derived_from(model, size, min(dataset.size)) == ""
            # The recipe of the shorter side is the same at a non-square resolution.
            if size in DERIVED:
                config = config_of(model, size, "64x96")
                fixed = dict(res=[64, 96], num_classes=10)
                assert config["model_args"] == rows[64] | fixed


@pytest.mark.parametrize(
    "model, size, res, nearest",
    [
        ("uvit", "tiny", 30, "28 and 32"),
        ("uvit", "tiny", 17, "16 and 18"),
        ("uvit", "tiny", "250x333", "224x320 and 256x320"),
        ("uvit", "tiny", "333x250", "320x224 and 320x256"),
        ("uvit", "tiny", "64x90", "56x88 and 64x88"),
        ("uvit", "small", 17, "24 and 26"),
        ("uvit", "small", 50, "48 and 52"),
        ("unet", "small", 30, "28 and 32"),
        ("unet", "base", 100, "96 and 104"),
        ("uvit", "small", 10**20, "1472 and 1536"),
    ],
)
def test_sizes_that_no_recipe_fits_name_the_nearest_two(model, size, res, nearest):
    with pytest.raises(ValueError, match=f"--size {size} .*--res {res}.* {nearest}$") as error:
        config_of(model, size, res)
    assert "\n" not in str(error.value)
    # Both work.
    for other in nearest.split(" and "):
        config_of(model, size, int(other) if other.isdecimal() else other)
    # With levels of one's own, the network decides.
    levels = dict(channel_multiplier=[1], num_res_blocks=[] if model == "uvit" else [1])
    if max(pixels(res)) < 1000 and min(pixels(res)) > 24:
        given = dict(model=model, size=size, res=res, model_args=dict(levels, patching="none"))
        with torch.device("meta"):
            build_net(model, make_config(given, CPU, Shapes(res))["model_args"])


def test_published_recipes_are_not_derived():
    for model in RECIPES:
        with pytest.raises(ValueError, match="--size paper .*128, 256, 512, not 96.*--size base"):
            config_of(model, "paper", 96)
    # A network of one's own with recipes has those alone.
    assert derived_from("related.sid2:ResidualUViT", "tiny", 48) == ""


def test_the_line_on_derived_recipes_names_the_row():
    assert "48 px: derived from that for 28 px" in derived_from("uvit", "tiny", 48)
    assert "96 px: derived from that for 128 px" in derived_from("uvit", "base", 96)
    assert "1024 px: extrapolated from that for 512 px" in derived_from("unet", "base", 1024)
