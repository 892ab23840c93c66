"""Tests of related/mar.py."""

import math
import re

import numpy as np
import pytest
import torch

from related import mar
from sample import ddpm_step, mix_seed
from schedule import logsnr_schedule_cosine, x_from_v
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random, gaussian_net

# The tiny model has 12 tokens and 2 tokens of buffer. Its null label is 3.
TINY_MODEL = dict(
    length=12, num_classes=3, num_buffer=2, channels=16, num_blocks=2, num_heads=2, width=16
)


def tiny_model():
    """A tiny model with random weights. Labels and attention have a large effect."""
    model = fill_random(mar.MAR(**TINY_MODEL)).eval()
    with torch.no_grad():
        for block in [*model.encoder, *model.decoder]:
            block.qkv.weight.mul_(10)
            block.out.weight.mul_(10)
            block.norm1.weight.fill_(1)
        model.label.weight.mul_(10)
        model.norm.weight.fill_(1)
        model.encoder_norm.weight.fill_(1)
        model.decoder_norm.weight.fill_(1)
    return model.requires_grad_(False)


class Watched:
    """A model that keeps the arguments of each call. Its z are zero."""

    length, num_buffer, num_classes = 64, 2, 3

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, positions, label, cache=None):
        self.calls.append((tokens.clone(), positions, cache))
        own = torch.zeros(len(tokens), 1, self.num_buffer + positions.shape[1], 1)
        return torch.zeros(*positions.shape, 4), ([(own, own)], [(own, own)])

    def head(self, x, logsnr, z):
        return torch.zeros_like(x)


def test_tokens_are_patches():
    images = torch.rand(2, 3, 16, 16)
    tokens = mar.tokens_of(images)
    assert tokens.shape == (2, 64, 12)
    assert torch.equal(mar.images_of(tokens), images)

    # Token 10 is the patch in row 1 and column 2.
    patch = images[1, :, 2:4, 4:6].flatten()
    assert torch.equal(tokens[1, 10].sort().values, patch.sort().values)


# ---------------------------------------------------------------- local evaluation


def test_local_evaluation_equals_the_whole_one_for_the_same_tokens():
    model = tiny_model().double()
    label = torch.tensor([0, 2])
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    tokens = torch.randn(2, 5, 12).double()
    z, cache = model(tokens, order, label)

    # A group of masked tokens: the encoder computes nothing.
    context = mar.context_of(cache, 2 + 5, 2 + 9)
    assert context[0][0][0].shape[2] == 2 + 5
    assert context[1][0][0].shape[2] == 2 + 8
    local, _ = model(tokens[:, :0], order[:, 5:9], label, context)
    torch.testing.assert_close(local, z[:, 5:9], rtol=0, atol=1e-10)

    # A group of two known and four masked tokens. Its known tokens leave the encoder's cache, too.
    _, decoder = mar.context_of(cache, 2 + 3, 2 + 9)
    encoder = [(keys[:, :, : 2 + 3], values[:, :, : 2 + 3]) for keys, values in cache[0]]
    local, own = model(tokens[:, 3:], order[:, 3:9], label, (encoder, decoder))
    torch.testing.assert_close(local, z[:, 3:9], rtol=0, atol=1e-10)
    # The buffer is not computed again.
    assert (own[0][0][0].shape[2], own[1][0][0].shape[2]) == (2, 6)

    # Another known token changes z of the others.
    changed, _ = model(tokens[:, 3:] + 1, order[:, 3:9], label, (encoder, decoder))
    assert not torch.allclose(changed[:, 2:], local[:, 2:], atol=1e-3)


# ---------------------------------------------------------------- generation


def test_plans_generate_each_token_once():
    for steps in range(1, 65):
        plan = mar.cosine_plan(steps, 64)
        assert len(plan) == steps
        assert sum(plan) == 64
        assert min(plan) >= 1
    # The differences of 64 cos(pi i / 6), rounded down: 64, 55, 32, 0.
    assert mar.cosine_plan(3, 64) == [9, 23, 32]
    for steps in (0, 65):
        with pytest.raises(ValueError, match=rf"\b64\b.*\b{steps}\b"):
            mar.cosine_plan(steps, 64)


@pytest.mark.parametrize("steps, whole, local, counts", [(16, 8, 1, (12, 4)), (9, 2, 2, (5, 4))])
def test_every_position_is_written_once(steps, whole, local, counts):
    model = Watched()
    label = torch.tensor([0, 1])
    options = dict(head_steps=4, local_head_steps=2)
    tokens, *counted = mar.generate(model, label, steps, whole, local, **options)
    assert tuple(counted[:2]) == counts
    assert len(model.calls) == steps

    # Whole evaluations see all positions, local ones only their group.
    plan = mar.cosine_plan(steps, 64)
    order = model.calls[0][1]
    before = tokens[:, :0]
    done = head_steps = 0
    for (known, positions, cache), n in zip(model.calls, plan):
        if cache is None:
            before = known
            start = done
            assert torch.equal(positions, order)
            assert order.sort(1).values.tolist() == [list(range(64))] * 2
            head_steps += 4 * n
        else:
            m = positions.shape[1]
            assert torch.equal(positions, order[:, start : start + m])
            assert cache[1][0][0].shape[2] == 2 + 64 - m
            known = torch.cat([before, known], 1)
            head_steps += 2 * n

        # The tokens that are known now are those of the result.
        assert known.shape[1] == done
        assert torch.equal(known, tokens.gather(1, order[:, :done, None].expand(-1, -1, 12)))
        done += n
    assert done == 64
    assert counted[2] == pytest.approx(head_steps / 64)


@pytest.mark.parametrize("guidance", [(1, 1), (1, 4)])
@pytest.mark.parametrize("whole, local", [(0, 0), (1, 1), (0, 2)])
def test_generation_by_hand_with_all_its_draws(whole, local, guidance):
    model = tiny_model()
    options = dict(head_steps=4, local_head_steps=3, temperature=0.7, guidance=guidance)
    given = (5, whole, local)
    tokens, *_ = mar.generate(model, torch.ones(3).long(), *given, **options, seed=7, first=2)
    for i in range(3):
        expected = generated_by_hand(model, 2 + i, *given, **options)
        torch.testing.assert_close(tokens[i], expected, rtol=0, atol=2e-3)


def generated_by_hand(
    model, number, steps, whole, local, head_steps, local_head_steps, temperature, guidance
):
    """The tokens (12, 12) of sequence `number` of class 1, one token after the other."""
    generator = torch.Generator().manual_seed(mix_seed(7, number))
    order = torch.randn(12, generator=generator).argsort().tolist()
    image = torch.zeros(12, 12)
    plan = mar.cosine_plan(steps, 12)
    known = []
    context = None

    for step, n in enumerate(plan):
        is_local = step > whole and (step - whole) % (1 + local) > 0
        if not is_local:
            # All positions, the known ones first. The others are in their natural order here.
            rest = sorted(set(range(12)) - set(known))
            positions, visible, caches = known + rest, list(known), [None, None]
        else:
            # The group: all steps since the last whole one. The cache has all other positions.
            first = step - (step - whole) % (1 + local)
            before = sum(plan[:first])
            positions = order[before : sum(plan[: first + 1 + local])]
            visible = known[before:]
            caches = []
            for cache, at in context:
                kept = [0, 1] + [
                    2 + i for i, position in enumerate(at) if position not in positions
                ]
                decoder = [(keys[:, :, kept], values[:, :, kept]) for keys, values in cache[1]]
                caches.append((cache[0], decoder))

        # Evaluate for the class 1, and for the null label 3.
        given = image[visible][None], torch.tensor([positions])
        (z, own), (z_null, own_null) = (
            model(*given, torch.tensor([label]), cache) for label, cache in zip((1, 3), caches)
        )
        if not is_local:
            context = [(own, positions), (own_null, positions)]

        # The scale is linear in the number of tokens after this step.
        scale = guidance[0] + (guidance[1] - guidance[0]) * (len(known) + n) / 12
        now = local_head_steps if is_local else head_steps
        draws = torch.randn(now, n, 12, generator=generator)
        for j, position in enumerate(order[len(known) : len(known) + n]):
            at = positions.index(position)
            conditions = z[0, at], z_null[0, at]
            image[position] = token_by_hand(model, conditions, draws[:, j], scale, temperature)
        known += order[len(known) : len(known) + n]
    return image


def token_by_hand(model, conditions, draws, scale, temperature):
    """One token (12,) by DDPM. conditions: z and z of the null label. draws: (steps, 12)."""
    logsnrs = logsnr_schedule_cosine(torch.linspace(1, 0, len(draws) + 1))
    x = draws[0][None, :, None, None]
    for i in range(len(draws)):
        cond, uncond = (model.head(x, logsnrs[i : i + 1], z[None]) for z in conditions)
        v_hat = uncond + scale * (cond - uncond)
        x_hat = x_from_v(x, v_hat, logsnrs[i]).clamp(-1, 1)
        noise = None
        if i < len(draws) - 1:
            noise = temperature * draws[i + 1][None, :, None, None]
        x = ddpm_step(x, x_hat, logsnrs[i], logsnrs[i + 1], noise)
    return x.flatten()


def test_an_image_depends_on_its_number_alone():
    model = tiny_model()
    label = torch.tensor([1, 1, 1])
    options = dict(head_steps=3, guidance=(1, 3), seed=5)
    together, *_ = mar.generate(model, label, 6, 2, 1, **options)
    alone, *_ = mar.generate(model, label[2:], 6, 2, 1, **options, first=2)
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=0.1)


def test_head_draws_the_gaussian_that_z_describes():
    # z is the mean of a token. The exact denoiser then draws mean and standard deviation.
    mean = torch.randn(1, 2, 12)
    std = 0.5

    def head(x, logsnr, z):
        return gaussian_net(z[:, :, None, None], std**2)(x, logsnr)

    noise = mar.noise_by_number(0, range(1000), "cpu")
    z = mean.expand(1000, -1, -1)
    tokens = mar.draw_tokens(head, z, None, noise, 200, clip=None)
    torch.testing.assert_close(tokens.mean(0), mean[0], rtol=0, atol=0.08)
    assert tokens.std(0).mean().item() == pytest.approx(std, rel=0.03)

    # Guidance moves the mean away from that of the null label.
    null = torch.zeros_like(z)
    tokens = mar.draw_tokens(head, z, null, noise, 200, scale=3.0, clip=None)
    torch.testing.assert_close(tokens.mean(0), 3 * mean[0], rtol=0, atol=0.08)

    # A lower temperature draws a narrower distribution.
    tokens = mar.draw_tokens(head, z, None, noise, 200, temperature=0.5, clip=None)
    assert tokens.std(0).mean().item() < 0.7 * std


# ---------------------------------------------------------------- training


# The share of masked tokens follows the lower half of a normal distribution, truncated. Its mean is
# 1 - 0.2 (1 - exp(-x^2)) / erf(x), where 0.2 = 0.25 sqrt(2 / pi) and x = d / (0.25 sqrt(2)) for the
# largest distance d from 1. A uniform share would have means of 0.85 and 0.55.
@pytest.mark.parametrize(("least", "mean", "tolerance"), [(0.7, 0.867, 0.008), (0.1, 0.801, 0.015)])
def test_loss_counts_masked_tokens_only(least, mean, tolerance, monkeypatch):
    # A model that keeps its input, and a head that keeps its targets.
    seen = {}

    def diffusion_loss(head, x, schedule, z, **options):
        seen.update(x=x, z=z)
        return x.square().mean((1, 2, 3)), None

    def model(tokens, positions, label):
        seen.update(tokens=tokens, positions=positions)
        return positions[:, :, None].float(), None

    model.length, model.head = 64, None
    monkeypatch.setattr(mar, "diffusion_loss", diffusion_loss)
    tokens = torch.randn(2, 64, 12)
    counts = []
    torch.manual_seed(0)
    for _ in range(1000):
        mar.mar_loss(model, tokens, torch.zeros(2).long(), least, repeats=3)
        known = seen["tokens"].shape[1]
        counts.append(64 - known)
        positions = seen["positions"]
        # The model sees the first tokens of the order. The loss has all others, three times.
        index = positions[:, :, None].expand(-1, -1, 12)
        in_order = tokens.gather(1, index)
        assert torch.equal(seen["tokens"], in_order[:, :known])
        assert torch.equal(seen["x"][:, :, 0, 0], in_order[:, known:].flatten(0, 1).repeat(3, 1))
        # z and target belong to the same position.
        assert torch.equal(seen["z"][:, 0], positions[:, known:].flatten().repeat(3).float())

    # Rounding up adds half a token.
    assert math.ceil(64 * least) <= min(counts) < 64 * least + 10
    assert max(counts) == 64
    assert np.mean(counts) / 64 == pytest.approx(mean + 0.5 / 64, abs=tolerance)


def test_gradients_reach_encoder_decoder_and_head():
    torch.manual_seed(0)
    model = tiny_model().requires_grad_(True)
    mar.mar_loss(model, torch.randn(8, 12, 12), torch.zeros(8).long()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def trained(made_once):
    """The folder of a model after two updates."""

    def make(folder):
        call(mar.main, "train", folder, "--updates 2 --batch 4")

    return made_once("mar", make)


def test_commands(trained, tmp_path, capsys):
    with pytest.raises(ValueError, match=re.escape(str(trained))):
        call(mar.main, "train", trained)

    out = tmp_path / "out.npz"
    options = "--steps 4 --whole 2 --local 1 --head-steps 4 --local-head-steps 2 --guidance 1 3"
    call(mar.main, "sample", trained, options, "--n 11 --batch 4 --out", out)
    # 3 whole evaluations and 1 local one. The last step has 25 of 64 tokens.
    n = mar.cosine_plan(4, 64)[3]
    steps = f"{(4 * (64 - n) + 2 * n) / 64:.1f}"
    assert re.search(rf"\b3 whole .*\b1 local .*\b{steps} ", capsys.readouterr().out)
    with np.load(out) as written:
        assert written["arr_0"].shape == (11, 16, 16, 3)
        assert written["y"].tolist() == [*range(10), 0]

    call(mar.main, "real", "--n 5 --out", out)
    images, _ = load_batch(Shapes(16, first=2**30), range(5))
    with np.load(out) as written:
        assert np.array_equal(written["arr_0"], images.permute(0, 2, 3, 1))


def test_released_settings_are_three_quarters_whole(capsys):
    mar.main([])
    text = capsys.readouterr().out
    for steps in (96, 84, 56, 36, 128, 48):
        pattern = rf"\b{steps} steps.*\b{steps * 3 // 4} whole and {steps // 4} local\b"
        assert re.search(pattern, text)


def test_broken_models_and_invalid_options_are_rejected(tmp_path):
    path = tmp_path / "mar.pt"
    path.write_bytes(b"PK broken")
    for options, message in (
        ([], re.escape(str(path))),
        (["--n 0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["--out x"], r"--out x\b"),
        (["--local-head-steps 0"], r"--local-head-steps\b.*\b0\b"),
        (["--guidance 0.5 3"], r"--guidance\b"),
        (["--temperature -1"], r"--temperature\b"),
        (["--least-masked 1"], r"--least-masked\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(mar.main, "sample", tmp_path, *options)
