"""Tests of related/official.py."""

import argparse
import hashlib
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample as sampling
from related import diffusion_classifier, dit, lit, official, tstitch
from related.diffusion_classifier import classify
from sample import sample
from schedule import alpha_sigma, eps_from_v, posterior
from support.checkpoint import find_schedule, load, load_model
from tests.helpers import HERE, call, fill_random, float64, gaussian_net, outcome

# A tiny network of each family, with 1,000 classes like the released ones.
BRANCHES = [
    dict(channels=8, hidden=8, num_blocks=2, num_heads=2),
    dict(channels=4, hidden=8, num_blocks=3),
]
TINY = {
    "DiT": dict(channels=16, depth=2, num_heads=2),
    "DiCo": dict(width=4, depth=[1, 1, 1, 1, 2]),
    "DiMR": dict(branches=BRANCHES),
}
TINY = {
    family: dict(fields, family=family, res=8, num_classes=1000, in_channels=4)
    for family, fields in TINY.items()
}


def tiny(family, **fields):
    """A tiny Official with random weights, in eval mode, without gradients."""
    return fill_random(official.Official(**TINY[family] | fields)).eval().requires_grad_(False)


def released(net):
    """The state dict that the authors would have stored for an Official."""
    state = {}
    for ours, theirs in official.weight_names(net):
        value = net.get_parameter(ours).data
        if ours.endswith(".position"):
            value = value.flatten(0, 1)
        if theirs.endswith("nodecay_weight"):
            value = value - 1
        state[theirs] = value.clone()
    if net.family == "DiT":
        state["pos_embed"] = net.net.position[None].clone()
    return state


# ---------------------------------------------------------------- the schedules

BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
}


@pytest.mark.parametrize("name", BETAS)
def test_schedule_is_that_of_the_authors(name):
    alphas_cumprod = np.cumprod(1 - BETAS[name])
    schedule = find_schedule(f"related.official:{name}_schedule", 32)
    times = torch.arange(1000, dtype=float64)
    logsnr = schedule(times / 999)
    expected = np.log(alphas_cumprod / (1 - alphas_cumprod))
    np.testing.assert_allclose(logsnr, expected, rtol=0, atol=1e-9)

    # The inverse is exact at the 1,000 times, and nearly so in float32.
    table = official.log_alpha_bar(name)
    assert (official.index_at(logsnr, table) - times).abs().max() < 1e-8
    assert (official.index_at(logsnr.float(), table) - times).abs().max() < 2e-4

    # A number, and levels outside of the table.
    assert schedule(0.5).shape == ()
    ends = official.index_at(torch.tensor([30.0, -30.0]), table)
    assert ends.tolist() == [0, 999]


@pytest.mark.parametrize("name", BETAS)
def test_times_between_the_discrete_ones(name):
    table = official.log_alpha_bar(name)
    times = torch.linspace(0, 999, 99_901, dtype=float64)
    logsnr = official.logsnr_at(times, table)
    assert (logsnr.diff() < 0).all()

    # log alpha is linear between two times, as in DPM-Solver. The inverse is exact there, too.
    log_alpha_bar = F.logsigmoid(logsnr)
    expected = np.interp(times, np.arange(1000), table)
    np.testing.assert_allclose(log_alpha_bar, expected, rtol=1e-9)
    assert (official.index_at(logsnr, table) - times).abs().max() < 1e-8

    # Another convention, logsnr linear between two times, differs by up to 0.1 of a step between
    # the first two times and by less than 0.01 after time 20.
    grid = official.logsnr_at(torch.arange(1000, dtype=float64), table)
    other = 999 - np.interp(logsnr, grid.flip(0), np.arange(1000))
    difference = np.abs(other - times.numpy())
    assert difference.max() < 0.11
    assert difference[times >= 20].max() < 0.01


# ---------------------------------------------------------------- names and shapes

# The state dicts of the authors' networks: entries, numbers in them, and the first digits of the
# SHA-256 of their sorted lines "name AxBxC".
RECORDED = {
    "DiT-XL-2-256x256.pt": (292, 675_129_632, "47dfde881475dc13"),
    "DiT-XL-2-512x512.pt": (292, 676_014_368, "d5dedf46d458df15"),
    "dit_s_256.pt": (132, 32_963_360, "2f6cda2d3a7edd6e"),
    "dit_b_256.pt": (132, 130_512_416, "92a773fb4646389d"),
    "DiCo-S-400K-256x256.pt": (323, 33_137_672, "0b9c3ddf6da4bdc2"),
    "DiCo-B-400K-256x256.pt": (323, 129_992_712, "7e6936b319ce6682"),
    "DiCo-L-400K-256x256.pt": (631, 463_897_992, "65eab82f5834dac6"),
    "DiCo-XL-400K-256x256.pt": (673, 701_151_368, "58455f958eb7b54c"),
    "DiCo-XL-3750K-256x256.pt": (673, 701_151_368, "58455f958eb7b54c"),
    "DiMR-XL_2R_800epochs.pth": (1018, 505_046_408, "6ba4436c672367d7"),
    "DiMR-G_2R_800epochs.pth": (1446, 1_056_352_904, "be78f8b1d76837e5"),
}

# How often each kind of name occurs, for one file of each family. # stands for numbers, and
# {x,y} for several names.
PATTERNS = {
    "DiT-XL-2-256x256.pt": """
        pos_embed 1
        x_embedder.proj.{weight,bias} 1
        t_embedder.mlp.#.{weight,bias} 2
        y_embedder.embedding_table.weight 1
        blocks.#.adaLN_modulation.#.{weight,bias} 28
        blocks.#.attn.{qkv,proj}.{weight,bias} 28
        blocks.#.mlp.{fc1,fc2}.{weight,bias} 28
        final_layer.adaLN_modulation.#.{weight,bias} 1
        final_layer.linear.{weight,bias} 1""",
    "DiCo-XL-400K-256x256.pt": """
        x_embedder.proj.{weight,bias} 1
        {t_embedder_1,t_embedder_2,t_embedder_3}.mlp.#.{weight,bias} 2
        y_embedder.{embedding_table_0,embedding_table_1,embedding_table_2}.weight 1
        {encoder_level_1,encoder_level_2}.#.{conv1,conv2,conv3,conv4,conv5}.{weight,bias} 9
        {encoder_level_1,encoder_level_2}.#.{ca,adaLN_modulation}.#.{weight,bias} 9
        {decoder_level_1,decoder_level_2}.#.{conv1,conv2,conv3,conv4,conv5}.{weight,bias} 9
        {decoder_level_1,decoder_level_2}.#.{ca,adaLN_modulation}.#.{weight,bias} 9
        latent.#.{conv1,conv2,conv3,conv4,conv5}.{weight,bias} 10
        latent.#.{ca,adaLN_modulation}.#.{weight,bias} 10
        {down1_2,down2_3,up3_2,up2_1}.body.#.weight 1
        {reduce_chan_level1,reduce_chan_level2}.{weight,bias} 1
        final_layer.adaLN_modulation.#.{weight,bias} 1
        final_layer.out_proj.{weight,bias} 1""",
    "DiMR-XL_2R_800epochs.pth": """
        stages.#.input_layer.#.{weight,bias} 2
        stages.#.input_layer.#.position_embeddings.weight 2
        stages.#.class_embeds.weight 1
        stages.#.blocks.#.block1.norm.scale.{param0,param1,nodecay_weight,nodecay_bias} 39
        stages.#.blocks.#.block1.query_key_value.weight 39
        stages.#.blocks.#.block1.dense.{weight,bias} 39
        stages.#.blocks.#.block1.#.{weight,bias} 21
        stages.#.blocks.#.block2.norm.scale.{param0,param1,nodecay_weight,nodecay_bias} 60
        stages.#.blocks.#.block2.{w0,w1,w2}.{weight,bias} 60
        stages.#.skip_denses.#.{weight,bias} 29
        stages.#.upsample.#.kernel.{weight,bias} 1
        stages.#.upsample.#.{weight,bias}.{param0,param1,nodecay_weight,nodecay_bias} 2
        stages.#.output_layer.#.{weight,bias}.{param0,param1,nodecay_weight,nodecay_bias} 2
        stages.#.output_layer.#.{weight,bias} 2""",
}


def expand(pattern):
    """All names of a pattern with {x,y}."""
    match = re.search(r"{(.*?)}", pattern)
    if not match:
        return [pattern]
    words = match[1].split(",")
    return [n for word in words for n in expand(pattern.replace(match[0], word, 1))]


def shapes_of(file):
    """The names and shapes that a released file must have."""
    net = official.on_meta(official.arguments(official.RELEASES[file]))
    names = dict(official.weight_names(net))

    # Each weight of ours occurs once, and so does each of theirs.
    assert len(list(official.weight_names(net))) == len(names) == len(set(names.values()))
    assert names.keys() == net.state_dict().keys()
    return {name: tuple(value.shape) for name, value in released(net).items()}


@pytest.mark.parametrize("file", official.RELEASES)
def test_names_and_shapes_are_those_of_the_authors(file):
    shapes = shapes_of(file)
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    numbers = sum(np.prod(shape, dtype=int) for shape in shapes.values())
    assert (len(shapes), numbers, digest) == RECORDED[file]


@pytest.mark.parametrize("file", PATTERNS)
def test_patterns_of_names(file):
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in shapes_of(file))
    expected = {}
    for line in PATTERNS[file].split("\n")[1:]:
        pattern, count = line.split()
        expected |= {name: int(count) for name in expand(pattern)}
    assert counts == expected


@pytest.mark.parametrize("family", TINY)
def test_conversion_uses_every_entry_once(family):
    net = tiny(family)
    weights = official.convert("file.pt", released(net), TINY[family])
    assert weights.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(weights[name], value)

    # bfloat16 becomes float32.
    half = {name: value.bfloat16() for name, value in released(net).items() if name != "pos_embed"}
    half |= {name: value for name, value in released(net).items() if name == "pos_embed"}
    weights = official.convert("file.pt", half, TINY[family])
    assert {value.dtype for value in weights.values()} == {torch.float32}


# ---------------------------------------------------------------- the adapter


def exact_eps(net, mean, variance):
    """Replace the network of an Official by the exact eps of Gaussian data at integer times."""
    table = official.log_alpha_bar(official.FAMILIES[net.family].schedule)

    def eps(z, time):
        times = time.round().long()
        assert (time - times).abs().max() < 2e-4
        alphas_cumprod = table.exp()[times].reshape(-1, 1, 1, 1)
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return sigma * (z - alpha * mean) / (alpha**2 * variance + sigma**2)

    def at_time(z, time, label):
        return torch.cat([eps(z, time), torch.full_like(z, 0.5)], 1)

    def branches_at(z, tau, label):
        # DiMR's time n = 1 to 1000 becomes (8 n / 1000 - 4) / 4.
        return [eps(z, 125 * (4 * tau + 4) - 1)]

    net.net.at_time, net.net.branches_at = at_time, branches_at
    return net


@pytest.mark.parametrize("family", TINY)
def test_exact_eps_becomes_exact_v(family):
    net = exact_eps(tiny(family).double(), 0.3, 0.5)
    schedule = getattr(official, f"{official.FAMILIES[family].schedule}_schedule")
    times = torch.tensor([0, 1, 500, 998, 999])
    logsnr = schedule(times.double() / 999)
    z = torch.randn(5, 4, 8, 8, dtype=float64)
    v = gaussian_net(0.3, 0.5)(z, logsnr)
    torch.testing.assert_close(net(z, logsnr), v, rtol=1e-9, atol=1e-9)

    # In float32, alpha = 0.006 at time 999 enlarges the rounding of eps.
    v_hat = net(z.float(), logsnr.float())
    assert v_hat.dtype == torch.float32
    torch.testing.assert_close(v_hat.double(), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["DiT", "DiCo"])
def test_variance_is_that_of_the_authors(family):
    net = tiny(family).double()
    t, s = 700, 640  # a step of their respaced process
    logsnr_t, logsnr_s = official.linear_schedule(torch.tensor([[t], [s]], dtype=float64) / 999)
    z = torch.randn(1, 4, 8, 8, dtype=float64)
    v_hat, fraction = net(z, logsnr_t, variance=True)
    assert torch.equal(v_hat, net(z, logsnr_t))

    # Their log-variance: between that of the posterior and log beta of the step.
    alphas_cumprod = np.cumprod(1 - BETAS["linear"])
    beta = 1 - alphas_cumprod[t] / alphas_cumprod[s]
    low = np.log(beta * (1 - alphas_cumprod[s]) / (1 - alphas_cumprod[t]))
    out = net.net.at_time(z, torch.tensor([t], dtype=float64))[:, 4:]
    theirs = (out + 1) / 2 * np.log(beta) + (1 - (out + 1) / 2) * low

    _, log_var_min, log_var_max = posterior(z, z, logsnr_t, logsnr_s)
    ours = fraction * log_var_max + (1 - fraction) * log_var_min
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ddim_is_that_of_the_authors(family, guidance):
    net = tiny(family).double()
    name = official.FAMILIES[family].schedule
    label = torch.tensor([3, 998])
    seen = []
    x = sample(
        net,
        (2, 4, 8, 8),
        getattr(official, f"{name}_schedule"),
        steps=27,
        sampler="ddim",
        label=label,
        null_label=1000,
        guidance=guidance,
        clip=None,
        dtype=float64,
        observe=lambda step, z, logsnr, v_hat: seen.append(z),
    )

    def eps_at(z, time, label):
        times = torch.full((len(z),), time, dtype=float64)
        if family == "DiMR":
            return net.net.branches_at(z, (8 * (times + 1) / 1000 - 4) / 4, label)[0]
        return net.net.at_time(z, times, label)[:, :4]

    # DDIM with eta = 0 on every 37th time: 999, 962, ..., 0.
    alphas_cumprod = np.cumprod(1 - BETAS[name])
    z = seen[0]
    for time in range(999, 0, -37):
        cond, uncond = eps_at(z, time, label), eps_at(z, time, torch.full_like(label, 1000))
        eps = uncond + guidance * (cond - uncond)
        now, then = alphas_cumprod[time], alphas_cumprod[time - 37]
        pred_xstart = (z - (1 - now) ** 0.5 * eps) / now**0.5
        z = then**0.5 * pred_xstart + (1 - then) ** 0.5 * eps
    assert z.std() > 0.1
    torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-6)


def test_eps_of_v_is_the_output_also_between_the_times():
    net = tiny("DiT").double()
    logsnr = torch.tensor([8.9, 0.123, -9.99], dtype=float64)
    z = torch.randn(3, 4, 8, 8, dtype=float64)
    index = official.index_at(logsnr, official.log_alpha_bar("linear"))
    eps = net.net.at_time(z, index)[:, :4]
    torch.testing.assert_close(eps_from_v(z, net(z, logsnr), logsnr), eps)
    assert (index != index.round()).all()


# ---------------------------------------------------------------- models that others can read


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_converted_model_is_loaded_and_sampled(family, ending, tmp_path, capsys):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    net = tiny(family)
    path = str(tmp_path / f"model.{ending}")
    weights = official.convert("file.pt", released(net), TINY[family])
    official.write_official(path, weights, TINY[family], step=7, images=70)
    state = load_model(path)
    assert (state["step"], state["images"]) == (7, 70)

    loaded, config, schedule = load(path)
    name = official.FAMILIES[family].schedule
    assert schedule is getattr(official, f"{name}_schedule")
    assert len(config["classes"]) == 1000
    z = torch.randn(2, 4, 8, 8)
    logsnr = torch.tensor([-3.0, 3.0])
    label = torch.tensor([1, 1000])
    torch.testing.assert_close(loaded(z, logsnr, label), net(z, logsnr, label))
    assert torch.equal(loaded(z, logsnr), loaded(z, logsnr, torch.tensor([1000, 1000])))

    # The command draws latents.
    out = tmp_path / "z.npz"
    options = "--n 3 --label 207,88 --steps 2 --guidance 2 --out"
    call(sampling.main, path, options, out)
    assert f"{name}_schedule" in capsys.readouterr().out
    with np.load(out) as arrays:
        assert arrays["z"].shape == (3, 4, 8, 8)
        assert np.isfinite(arrays["z"]).all()
        assert arrays["y"].tolist() == [207, 88, 207]


def test_stitching_and_classifying_with_converted_models():
    # The small one draws the first half, the large one the second.
    small, large = tiny("DiT"), tiny("DiCo")
    label = torch.tensor([207, 88])
    options = dict(steps=4, sampler="ddim", label=label, null_label=1000, clip=None)

    def draw(net):
        return sample(net, (2, 4, 8, 8), official.linear_schedule, **options)

    nets = [small, large]
    both = draw(tstitch.stitch(nets, (0.5, 0.5), official.linear_schedule))
    assert both.isfinite().all()
    assert not torch.equal(both, draw(large))
    assert torch.equal(
        draw(tstitch.stitch(nets, (0.0, 1.0), official.linear_schedule)), draw(large)
    )

    # Latents of exact Gaussian classes: eps of class c is that of the mean c.
    net = tiny("DiT")

    def at_time(z, time, label):
        mean = label.reshape(-1, 1, 1, 1).to(z.dtype)
        alpha, sigma = alpha_sigma(
            official.logsnr_at(time, official.log_alpha_bar("linear")), like=z
        )
        eps = sigma * (z - alpha * mean) / (0.01 * alpha**2 + sigma**2)
        return torch.cat([eps, eps], 1)

    net.net.at_time = at_time
    x = torch.tensor([0.0, 2.0, 1.0]).reshape(-1, 1, 1, 1) + 0.1 * torch.randn(3, 4, 8, 8)
    labels = torch.arange(3)[:, None]  # one label for each class
    found, _ = classify(net, x, labels, official.linear_schedule, numbers=(4,))
    assert found.tolist() == [0, 2, 1]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """In an empty folder: dit.pt, dico.pt and other.pt, tiny models, and z.npz, six latents."""
    monkeypatch.chdir(tmp_path)
    for name, family, num_classes in (
        ("dit", "DiT", 1000),
        ("dico", "DiCo", 1000),
        ("other", "DiT", 3),
    ):
        weights = dict(tiny(family, num_classes=num_classes).state_dict())
        fields = dict(TINY[family], num_classes=num_classes)
        official.write_official(f"{name}.pt", weights, fields)
    z = np.random.default_rng(0).normal(size=(6, 4, 8, 8)).astype(np.float32)
    np.savez("z.npz", z=z, y=np.arange(6) * 7, classes=[f"n{k:08d}" for k in range(1000)])


def test_tstitch_command_draws_latents(models, capsys):
    call(
        tstitch.main,
        *["dit.pt", "dico.pt"],
        "--fraction 0.5 --steps 4 --n 5 --batch 4 --label 207,88 --guidance 2 --out z2.npz",
    )
    nets = [load("dit.pt")[0], load("dico.pt")[0]]
    expected = sample(
        tstitch.stitch(nets, (0.5, 0.5), official.linear_schedule),
        (2, 4, 8, 8),
        official.linear_schedule,
        steps=4,
        sampler="ddim",
        label=torch.tensor([207, 88]),
        guidance=2.0,
        null_label=1000,
        clip=None,
    )
    with np.load("z2.npz") as arrays:
        np.testing.assert_allclose(arrays["z"][:2], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(arrays["z"]).max() > 1.5  # not clipped
        assert arrays["y"].tolist() == [207, 88, 207, 88, 207]
        stitched = {name: arrays[name] for name in arrays.files}

    # One model alone: the same file as that of sample.py.
    call(tstitch.main, ["dit.pt", "dico.pt"], "--fraction 1 --steps 4 --n 3 --out one.npz")
    call(sampling.main, "dit.pt", "--steps 4 --sampler ddim --n 3 --out alone.npz")
    with np.load("one.npz") as ours, np.load("alone.npz") as theirs:
        assert set(ours.files) == set(theirs.files) == set(stitched)
        for name in ours.files:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])

    # Trajectories are those of latents, too.
    capsys.readouterr()
    call(tstitch.main, ["dit.pt", "dico.pt"], "--cosine --steps 2 --n 2")
    assert len(capsys.readouterr().out.splitlines()) == 3

    for args, message in (
        ("dit.pt dico.pt --fraction 0.5", r"dit\.pt draws latents.*--out samples\.npz"),
        ("dit.pt dico.pt --table t --reference r", r"dit\.pt draws latents: --table"),
        ("dit.pt other.pt --fraction 0.5 --out a.npz", r"other\.pt and dit\.pt differ in classes"),
        ("dit.pt dico.pt --fraction 1 --label x --out a.npz", r"--label 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tstitch.main, args.split())


def test_classifier_command_takes_latents(models, capsys, monkeypatch):
    # The exact eps of Gaussian classes with random means, and latents of six of the classes.
    means = torch.randn(1000, 4, 1, 1, generator=torch.Generator().manual_seed(0))

    def at_time(net, z, time, label):
        logsnr = official.logsnr_at(time, official.log_alpha_bar("linear"))
        alpha, sigma = alpha_sigma(logsnr, like=z)
        eps = sigma * (z - alpha * means[label]) / (0.01 * alpha**2 + sigma**2)
        return torch.cat([eps, eps], 1)

    monkeypatch.setattr(dit.DiT, "at_time", at_time)
    with np.load("z.npz") as arrays:
        arrays = dict(arrays)
    z = means[arrays["y"]].numpy() + 0.1 * arrays["z"]
    np.savez("z.npz", **arrays | dict(z=z))
    call(diffusion_classifier.main, "dit.pt", "--data z.npz --n 6 --times 2 4 --keep 20 1")
    printed = capsys.readouterr().out
    assert "class 0 of dit.pt is n00000000, class 999 is n00000999" in printed
    assert "100.0 % of 6 images are classified right, with 2040 evaluations each" in printed

    # Other numbers of classes, latents of another size, and images.
    named = dict(z=z, y=np.arange(6) % 3)
    np.savez("three.npz", classes=["c", "b", "a"], **named)
    np.savez("plain.npz", z=z)
    np.savez("wide.npz", z=np.zeros((2, 16, 8, 8), np.float32))
    np.savez("small.npz", z=np.zeros((2, 4, 4, 4), np.float32))
    np.savez("images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    for run, data, message in (
        ("other.pt", "z.npz", "the dataset has other classes.*other.pt"),
        ("dit.pt", "three.npz", "the dataset has other classes.*dit.pt"),
        ("dit.pt", "plain.npz", "the dataset has other classes.*dit.pt"),
        ("dit.pt", "wide.npz", "wide.npz holds latents of 16 channels: .* latents of 4 channels"),
        ("dit.pt", "small.npz", "small.npz holds latents of 4x4"),
        ("dit.pt", "images.npz", "images.npz holds images: .* latents of 4 channels"),
        (f"{HERE}/assets/shapes32.pt", "small.npz", "small.npz holds latents"),
    ):
        with pytest.raises(ValueError, match=message):
            call(diffusion_classifier.main, run, "--data", data)
    with pytest.raises(ValueError, match="--data is missing"):
        call(diffusion_classifier.main, "dit.pt")
    with pytest.raises(ValueError, match="--probe needs a net with a transformer"):
        call(diffusion_classifier.main, "dit.pt", "--data z.npz --probe 0.1")
    call(diffusion_classifier.main, "other.pt", "--data three.npz --n 1 --times 1")


def test_lit_inherits_from_a_converted_dit():
    net = tiny("DiT")
    student = lit.convert(net, "related.official:Official", TINY["DiT"], linear_heads=4)
    assert (student.family, student.net.blocks[0].attention.num_heads) == ("LiT", 4)
    for name, value in student.state_dict().items():
        if ".attention." not in name:
            assert torch.equal(value, net.state_dict()[name]), name
    everything = lit.convert(net, "related.official:Official", TINY["DiT"], inherit="all")
    attention, old = everything.net.blocks[1].attention, net.net.blocks[1].attention
    assert torch.equal(torch.cat([attention.q.weight, attention.kv.weight]), old.qkv.weight)


def test_hybrid_loss_of_official_networks_is_that_of_their_outputs():
    # Both networks predict eps, and the variance between -1 and 1, at the authors' times.
    teacher = tiny("DiT").double()
    student = lit.convert(teacher, "related.official:Official", TINY["DiT"]).double()
    x, eps = torch.randn(2, 3, 4, 8, 8, dtype=float64)
    t = torch.tensor([100, 500, 999], dtype=float64) / 999
    label = torch.tensor([1, 2, 1000])
    schedule = official.linear_schedule

    def loss(weight, variance_weight):
        weights = dict(weight=weight, variance_weight=variance_weight)
        arguments = dict(space="eps", t=t, eps=eps, **weights)
        return lit.hybrid_loss(student, teacher, x, schedule, label, **arguments)[0]

    alpha, sigma = alpha_sigma(schedule(t), like=x)
    z = alpha * x + sigma * eps
    ours, theirs = (net.net.at_time(z, 999 * t, label) for net in (student, teacher))
    difference = (theirs - ours).square()
    eps_term, variance_term = (part.mean((1, 2, 3)) for part in difference.chunk(2, 1))
    own = loss(0.0, 0.0)
    torch.testing.assert_close(loss(0.5, 0.0) - own, 0.5 * eps_term, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(loss(0.0, 0.1) - own, 0.1 * variance_term, rtol=1e-4, atol=1e-9)

    # The student's own loss contains the error of eps.
    assert (own >= (ours[:, :4] - eps).square().mean((1, 2, 3)) - 1e-9).all()


def test_lit_command_takes_latents(models, capsys):
    options = "--data z.npz --steps 30 --batch 4 --lr 1e-3 --heads 4 --out lit"
    call(lit.main, "dit.pt", options)
    assert "step 30/30" in capsys.readouterr().out

    # The new run is an Official with another attention. Others sample, stitch and classify with it.
    net, config, schedule = load("lit")
    assert net.family == "LiT"
    assert schedule is official.linear_schedule
    assert config["model_args"] == dict(TINY["DiT"], family="LiT", num_heads=4, kernel=5)
    call(sampling.main, "lit", "--n 2 --steps 2 --guidance 2 --label 7 --out z2.npz")
    with np.load("z2.npz") as arrays:
        assert np.isfinite(arrays["z"]).all()
    call(tstitch.main, ["lit", "dit.pt"], "--fraction 0.5 --n 2 --steps 2 --out z3.npz")
    call(diffusion_classifier.main, "lit", "--data z.npz --n 1 --times 1")

    for args, message in (
        (["dico.pt", "--data z.npz --out x"], "dico.pt .* can be converted"),
        (["lit", "--data z.npz --out x"], "lit .* can be converted"),
        (["dit.pt", "--out x"], "the data of an exported model"),
        (["other.pt", "--data z.npz --out x"], "the dataset has other classes.*other.pt"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call(lit.main, args)


@pytest.fixture
def tiny_release(monkeypatch):
    """A tiny DiT among the released files, under the name tiny.pt. Its state dict."""
    fields = dict(in_channels=4, channels=16, depth=2, num_heads=2, learned_variance=True)
    monkeypatch.setitem(dit.CONFIGS, "tiny", fields)
    release = official.Release("DiT", "tiny", "none", 10, "nowhere", pixels=64)
    monkeypatch.setitem(official.RELEASES, "tiny.pt", release)
    return released(tiny("DiT"))


def test_command_converts(tiny_release, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_release, "tiny.pt")
    call(official.main, ["convert", "tiny.pt"], "--out a.pt")
    assert "python sample.py a.pt" in capsys.readouterr().out
    net, config, _ = load("a.pt")
    assert config["res"] == 8
    state = load_model("a.pt")
    assert (state["step"], state["images"]) == (10, 2560)

    # A training checkpoint, a file of the old format of PyTorch, and another name.
    checkpoint = dict(model={}, ema=tiny_release, args=argparse.Namespace(lr=1))
    torch.save(checkpoint, "b.pt", _use_new_zipfile_serialization=False)
    call(official.main, ["convert", "b.pt"], "--release tiny.pt --out c.pt")
    for name, value in load("c.pt")[0].state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_command_lists_the_released_files(capsys):
    call(official.main)
    lines = [line for line in capsys.readouterr().out.splitlines() if "published)" in line]
    assert len(lines) == len(official.RELEASES) == len(RECORDED)
    for line, (file, release) in zip(lines, official.RELEASES.items()):
        assert line.startswith(file)
        _, numbers, _ = RECORDED[file]
        parameters = int(re.search(r"([\d,]+) parameters", line)[1].replace(",", ""))
        # The state dicts of DiT also contain the fixed positions.
        if release.family == "DiT":
            numbers -= (release.pixels // 16) ** 2 * dit.CONFIGS[release.size]["channels"]
        assert parameters == numbers


# ---------------------------------------------------------------- latents


class StubAutoencoder(torch.nn.Module):
    """An autoencoder with the interface of diffusers: pooled colors and their mean."""

    @classmethod
    def from_pretrained(cls, name):
        if name != "stub":
            raise OSError(f"{name} is unknown\nsecond line")
        return cls()

    def encode(self, x):
        pooled = F.avg_pool2d(x, 8)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)
        return types.SimpleNamespace(
            latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.01))
        )

    def decode(self, z):
        return types.SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=8))


@pytest.fixture
def diffusers(monkeypatch):
    """A module diffusers with StubAutoencoder."""
    module = types.SimpleNamespace(AutoencoderKL=StubAutoencoder)
    monkeypatch.setitem(sys.modules, "diffusers", module)


def test_latents_in_both_directions(diffusers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.full((5, 16, 16, 3), 200, np.uint8)
    images[:, :8] = 40
    np.savez("images.npz", arr_0=images, y=np.arange(5) % 2, classes=["a", "b"])
    call(official.main, ["encode", "images.npz"], "--vae stub --res 16 --out z.npz --batch 2")
    with np.load("z.npz") as arrays:
        z = arrays["z"]
        assert z.shape == (5, 4, 2, 2)
        assert arrays["y"].tolist() == [0, 1, 0, 1, 0]
    # The scale, and noise that differs between images.
    expected = 0.18215 * (200 / 127.5 - 1)
    assert z[:, :, 1].mean() == pytest.approx(expected, abs=1e-3)
    assert z[:, 0, 1, 1].std() > 1e-4

    # It does not depend on the batch size.
    call(official.main, ["encode", "images.npz"], "--vae stub --res 16 --out again.npz")
    with np.load("again.npz") as arrays:
        np.testing.assert_allclose(arrays["z"], z, atol=1e-6)

    call(official.main, ["decode", "z.npz"], "--vae stub --out samples.npz --batch 2")
    with np.load("samples.npz") as arrays:
        decoded = arrays["arr_0"]
        assert arrays["y"].tolist() == [0, 1, 0, 1, 0]
    assert decoded.shape == images.shape
    assert np.abs(decoded.astype(int) - images).max() < 10


# ---------------------------------------------------------------- refusals


def refusal(*args):
    """The error of official.main, one line."""
    with pytest.raises(ValueError) as error:
        call(official.main, *args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", TINY)
def test_wrong_state_dicts_are_refused(family):
    state = released(tiny(family))
    name = list(state)[len(state) // 2]

    def message(**changes):
        changed = {key: value for key, value in (state | changes).items() if value is not None}
        with pytest.raises(ValueError) as error:
            official.convert("file.pt", changed, TINY[family])
        assert "\n" not in str(error.value)
        assert "file.pt" in str(error.value)
        return str(error.value)

    assert f"{name} is missing" in message(**{name: None})
    assert "other.weight is unknown" in message(**{"other.weight": torch.zeros(1)})
    assert f"{name} is torch.float32 (1, 2, 3)" in message(**{name: torch.zeros(1, 2, 3)})
    integers = state[name].long()
    assert f"{name} is torch.int64" in message(**{name: integers})
    if family == "DiT":
        wrong = state["pos_embed"] + 1e-3
        assert "pos_embed is not the sines" in message(pos_embed=wrong)
        assert "pos_embed is not the sines" in message(pos_embed=wrong[:, :3])
        assert "pos_embed" in message(pos_embed=wrong * float("nan"))


def test_wrong_files_are_refused(tiny_release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ["--release tiny.pt --out out.pt"]
    assert "no such file" in refusal("convert", "nothing.pt", *out)
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt is damaged" in refusal("convert", "text.pt", *out)
    torch.save([1, 2], "list.pt")
    assert "neither a state dict" in refusal("convert", "list.pt", *out)
    torch.save(dict(model=tiny_release, step=3), "other.pt")
    assert "neither a state dict" in refusal("convert", "other.pt", *out)

    torch.save(dict(ema=tiny_release, more=np.float64(1)), "more.pt")
    assert "more.pt is damaged, or contains more than weights" in refusal(
        "convert", "more.pt", *out
    )

    torch.save(tiny_release, "ema.pt")
    call(official.main, ["convert", "ema.pt"], *out)

    # The options.
    assert "already exists" in refusal("convert", "ema.pt", *out)
    assert "add --release" in refusal("convert", "ema.pt", "--out new.pt")
    assert "one file" in refusal("convert", "ema.pt", "ema.pt", "--out new.pt")
    assert "one file" in refusal("convert", "--out new.pt")
    assert "needs images" in refusal("encode", "--vae stub --out new.npz")
    assert ".pt or .safetensors" in refusal("convert", "ema.pt", "--out new.bin")
    assert "needs --out" in refusal("decode", "z.npz", "--vae stub")
    assert "needs --vae" in refusal("decode", "z.npz", "--out samples.npz")
    assert "--batch" in refusal("convert", "ema.pt", "--batch 0 --out new.pt")
    assert "--release" in outcome(official.main, ["convert", "a.pt", "--release", "b"])
    assert "official:" in outcome(official.main, ["train"])


def test_wrong_latents_are_refused(diffusers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("z.npz", z=np.zeros((2, 3, 4, 4), np.float32))
    to = ["--vae stub --out samples.npz"]
    assert "3 channels, but the network has 4" in refusal("decode", "z.npz", *to)
    assert "one file" in refusal("decode", "z.npz", "z.npz", *to)
    assert "divisible by 8" in refusal("encode", "z.npz", *to, "--res 20")
    assert "z.npz holds latents" in refusal("encode", "z.npz", *to)
    text = refusal("encode", "z.npz", "--vae unknown --out z2.npz")
    assert re.fullmatch(r"--vae unknown cannot be loaded \(.*\): unknown is unknown", text)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refusal("encode", "z.npz", *to)


def test_wrong_networks_and_schedules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DiX"):
        official.Official("DiX", 8)
    with pytest.raises(ValueError, match="3 channels"):
        official.Official("DiT", 8, in_channels=3)
    with pytest.raises(ValueError, match="predicts no variance"):
        tiny("DiMR")(torch.zeros(1, 4, 8, 8), torch.zeros(1), variance=True)

    names = [
        "official:other_schedule",
        "official:main",
        "nothing:x_schedule",
        "common:os.x_schedule",
    ]
    for name in names:
        with pytest.raises(ValueError, match=f"related.{name}"):
            find_schedule(f"related.{name}", 32)
    with pytest.raises(ValueError, match="official"):
        find_schedule("support.official:linear_schedule", 32)
