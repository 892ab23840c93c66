"""Tests of related/recap.py."""

import math
import re

import numpy as np
import pytest
import torch

from related import recap
from sample import mix_seed
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random

# The tiny model has 12 tokens of a vocabulary of 5, so its mask token is 5.
MASK = 5
TINY_MODEL = dict(vocabulary=5, length=12, num_classes=3, channels=16, num_blocks=3, num_heads=2)


def masked_model(**fields):
    """A tiny masked model with random weights. Its labels have a large effect."""
    model = fill_random(recap.MaskedModel(**TINY_MODEL | fields)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight.mul_(10)
        model.label.weight.mul_(10)
        model.head.weight.mul_(10)
    return model


class Watched:
    """A masked model that keeps the token ids and the positions of each call."""

    def __init__(self, model):
        self.model = model
        self.length = model.length
        self.num_classes = model.num_classes
        self.vocabulary = model.vocabulary
        self.ids = []
        self.positions = []

    def __call__(self, ids, label, positions=None, cache=None):
        self.ids.append(ids.clone())
        self.positions.append(positions)
        return self.model(ids, label, positions, cache)


def cached_without(cache, positions):
    """The cache of one sequence of 12 tokens without the class (entry 0) and these positions."""
    rest = [1 + i for i in range(12) if i not in positions]
    return [(keys[:, :, rest], values[:, :, rest]) for keys, values in cache]


# ---------------------------------------------------------------- local evaluation


def test_local_evaluation_equals_the_full_one_for_the_same_tokens():
    model = masked_model().double()
    label = torch.tensor([0, 2])
    ids = torch.randint(6, (2, 12))
    logits, cache = model(ids, label)

    # The cache holds the other 9 positions: (B, heads, 9, 8).
    group = torch.tensor([[7, 0, 3], [1, 11, 2]])
    others = recap.without(cache, group)
    for keys, values in others:
        assert keys.shape == (2, 2, 9, 8)
        assert values.shape == (2, 2, 9, 8)

    # With unchanged tokens, the local logits are those of the full evaluation.
    local, kept = model(ids.gather(1, group), label, group, others)
    expected = logits.gather(1, group[:, :, None].expand(-1, -1, 5))
    torch.testing.assert_close(local, expected, rtol=0, atol=1e-10)
    assert kept[0][0].shape[2] == 4  # the group and the class

    # A group of all positions needs no cache.
    everything = torch.arange(12).expand(2, -1)
    assert torch.equal(model(ids, label, everything)[0], logits)

    # Another token changes the local logits.
    changed = ids.gather(1, group)
    changed[:, 1] = (changed[:, 1] + 1) % 5
    assert not torch.allclose(model(changed, label, group, others)[0], local)


def test_errors_of_reuse():
    model = masked_model().double()
    label = torch.tensor([0, 2])
    ids = torch.randint(5, (2, 12))

    # If all positions are in the group, then nothing is cached and the local logits are exact.
    local, stale = recap.reuse_errors(model, ids, label, 12, 12)
    assert abs(local) < 1e-14
    assert stale > 1e-8

    # Otherwise, compute both errors by hand, for one sequence after the other. 7 tokens are masked
    # and 3 of these are decoded together. The first one is decoded already.
    local, stale = recap.reuse_errors(model, ids, label, 7, 3, torch.Generator().manual_seed(1))
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).argsort(1).tolist()
    divergences = []
    for i in range(2):
        group = order[i][:3]
        tokens_before = [MASK if j in order[i][:7] else ids[i, j].item() for j in range(12)]
        tokens_now = list(tokens_before)
        tokens_now[group[0]] = ids[i, group[0]].item()

        own_label = label[i : i + 1]
        old, cache = model(torch.tensor([tokens_before]), own_label)
        new, _ = model(torch.tensor([tokens_now]), own_label)
        cached, _ = model(
            torch.tensor([[tokens_now[j] for j in group]]),
            own_label,
            torch.tensor([group]),
            cached_without(cache, group),
        )

        for n in (1, 2):
            p = new[0, group[n]].softmax(0)
            log_q_local = cached[0, n].log_softmax(0)
            log_q_stale = old[0, group[n]].log_softmax(0)
            kl_local = (p * (p.log() - log_q_local)).sum().item()
            kl_stale = (p * (p.log() - log_q_stale)).sum().item()
            divergences.append([kl_local, kl_stale])
    assert (local, stale) == pytest.approx(np.mean(divergences, 0).tolist())


# ---------------------------------------------------------------- decoding


def test_decoding_plans_decode_each_token_once():
    for steps in (1, 8, 16, 24, 32, 64):
        plan = recap.decoding_plan(steps, 256)
        assert len(plan) == steps
        assert sum(plan) == 256
        assert min(plan) >= 1

    # The differences of 256 (1 - (i / 4)^2.5), rounded down: 256, 248, 210, 131, 0.
    assert recap.decoding_plan(4, 256) == [8, 38, 79, 131]


def test_too_many_or_too_few_decoding_steps_are_rejected():
    recap.decoding_plan(67, 256)
    for steps in (0, 68, 257):
        message = rf"(?=.*\b256\b)(?=.*\b1\b)(?=.*\b67\b).*\b{steps}\b"
        with pytest.raises(ValueError, match=message):
            recap.decoding_plan(steps, 256)


@pytest.mark.parametrize(
    "steps, whole, local, calls, cost",
    [
        (32, 12, 1, (22, 10), 22.9),
        (24, 10, 1, (17, 7), 17.9),
        (20, 10, 1, (15, 5), 15.8),
        (16, 8, 1, (12, 4), 12.8),
        (16, 0, 1, (8, 8), 9.0),
    ],
)
def test_decoding_costs_what_was_published(steps, whole, local, calls, cost):
    """calls: the numbers of whole and of local evaluations."""
    model = Watched(masked_model(length=256, channels=8, num_blocks=1))
    ids, *counted, queries = recap.decode(model, torch.tensor([1]), steps, whole, local)
    assert ids.max() < MASK
    lengths = [given.shape[1] for given in model.ids]
    local_lengths = [n for n in lengths if n < 256]

    # The numbers that decode returns are those of its calls.
    assert tuple(counted) == calls
    assert (lengths.count(256), len(local_lengths)) == calls

    # The cost counts all tokens of the calls, each with the class token.
    assert queries == pytest.approx(cost, abs=0.06)
    assert queries == pytest.approx(sum(n + 1 for n in lengths) / 257)

    # A local evaluation computes all tokens of its group.
    expected = []
    for group in recap.grouped(recap.decoding_plan(steps, 256), whole, local):
        expected += [sum(group)] * (len(group) - 1)
    assert local_lengths == expected


def test_every_position_is_decoded_once():
    model = Watched(masked_model())
    label = torch.tensor([0, 1, 2])
    options = dict(confidence=0.0, temperature=1.0)
    ids, *_ = recap.decode(model, label, 4, **options)

    # Each step decodes as many masked tokens as planned, and changes no others.
    states = [*model.ids, ids]
    for before, after, n in zip(states, states[1:], recap.decoding_plan(4, 12)):
        masked = before == MASK
        assert torch.equal(after[~masked], before[~masked])
        assert ((after != MASK) & masked).sum(1).tolist() == [n] * 3

    # A sequence depends on its number, not on the others in the batch.
    alone, *_ = recap.decode(model, label[1:2], 4, **options, first=1)
    assert torch.equal(alone, ids[1:2])


def test_sharp_logits_decode_the_surest_positions_first():
    # With logits this large, the random draws have no effect: each step takes the positions of
    # highest confidence, and of each the likeliest token.
    model = masked_model()
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    label = torch.tensor([0, 1, 2])
    ids, *_ = recap.decode(model, label, 4, confidence=0.0)

    expected = torch.full((3, 12), MASK)
    for n in recap.decoding_plan(4, 12):
        logits, _ = model(expected, label)
        decoded = expected != MASK
        assert torch.equal(ids[decoded], expected[decoded])
        for i in range(3):
            log_p = logits[i].log_softmax(1).max(1).values
            likeliest = logits[i].argmax(1)
            free = [j for j in range(12) if expected[i, j] == MASK]
            assert sum(ids[i, j] == likeliest[j] for j in free) >= n
            surest = sorted(free, key=lambda j, log_p=log_p: -log_p[j])[:n]
            expected[i, surest] = likeliest[surest]
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("guidance", [(1, 1), (1, 4)])
@pytest.mark.parametrize("whole, local", [(0, 0), (1, 1), (0, 2)])
def test_decoding_by_hand_with_all_its_draws(whole, local, guidance):
    model = masked_model()
    given = (5, whole, local)
    options = dict(temperature=0.4, confidence=3.0, guidance=guidance)
    ids, *_ = recap.decode(model, torch.ones(8).long(), *given, **options, seed=7, first=2)
    assert ids.tolist() == [decoded_by_hand(model, i, *given, **options) for i in range(2, 10)]


def decoded_by_hand(model, number, steps, whole, local, temperature, confidence, guidance):
    """The tokens of sequence `number` of class 1."""
    generator = torch.Generator().manual_seed(mix_seed(7, number))

    def gumbel(*shape):
        return -(-torch.rand(shape, generator=generator).log()).log()

    def evaluate(step, tokens, positions=None, caches=(None, None)):
        # One evaluation for the class, and one for the null label, 3. The guidance scale is
        # linear in the step.
        given = torch.tensor([tokens])
        results = []
        for label, cache in zip((1, 3), caches):
            results.append(model(given, torch.tensor([label]), positions, cache))
        (cond, cache), (uncond, null_cache) = results
        scale = guidance[0] + (guidance[1] - guidance[0]) * step / (steps - 1)
        return (uncond + scale * (cond - uncond))[0], (cache, null_cache)

    tokens = [MASK] * 12
    plan = recap.decoding_plan(steps, 12)
    groups = whole + math.ceil((steps - whole) / (1 + local))
    step = 0
    while step < steps:
        # The first steps are alone. After them, each group has a whole step and local ones.
        if step < whole:
            together = plan[step : step + 1]
            number = step
        else:
            together = plan[step : step + 1 + local]
            number = whole + (step - whole) // (1 + local)

        # The confidence of a masked position is the log probability of a random token, with noise.
        logits, caches = evaluate(step, tokens)
        drawn = (logits + gumbel(12, 5)).argmax(1).tolist()
        noise = (confidence * (1 - (number + 1) / groups) * gumbel(12)).tolist()
        confidences = {}
        for i in range(12):
            if tokens[i] == MASK:
                confidences[i] = logits[i].log_softmax(0)[drawn[i]].item() + noise[i]
        chosen = sorted(confidences, key=lambda i, sure=confidences: -sure[i])[: sum(together)]

        # A step that is alone keeps these tokens.
        if len(together) == 1:
            for i in chosen:
                tokens[i] = drawn[i]
            step += 1
            continue

        contexts = [cached_without(cache, chosen) for cache in caches]
        logits = logits[chosen]
        waiting = list(chosen)
        for j, n in enumerate(together):
            # Local evaluations see the tokens of the group that are decoded so far.
            if j:
                group = [tokens[i] for i in chosen]
                logits, _ = evaluate(step, group, torch.tensor([chosen]), contexts)

            # Draw the next n tokens of the group.
            now = 1 - (1 - temperature) * math.sqrt(step / (steps - 1))
            next_logits = logits[-len(waiting) :][:n]
            for token in (next_logits / now + gumbel(n, 5)).argmax(1).tolist():
                tokens[waiting.pop(0)] = token
            step += 1
    return tokens


def test_whole_steps_keep_the_tokens_whose_confidence_was_judged():
    # So the temperature plays no part, and a step draws once per position.
    model = masked_model()
    label = torch.tensor([0, 1, 2])
    cold, *_ = recap.decode(model, label, 4, temperature=0.01)
    warm, *_ = recap.decode(model, label, 4, temperature=1.0)
    assert torch.equal(cold, warm)

    # With local steps it does.
    cold, *_ = recap.decode(model, label, 4, 0, 1, temperature=0.01)
    warm, *_ = recap.decode(model, label, 4, 0, 1, temperature=1.0)
    assert not torch.equal(cold, warm)


def test_guidance_doubles_the_batch_and_makes_no_more_calls():
    model = Watched(masked_model())
    label = torch.tensor([0, 1])
    plain = recap.decode(model, label, 6, 2, 1)
    calls = [len(given) for given in model.ids]
    model.ids.clear()
    guided = recap.decode(model, label, 6, 2, 1, guidance=(1, 4))
    assert [len(given) for given in model.ids] == [2 * n for n in calls]
    assert guided[1:3] == plain[1:3]
    assert guided[3] == pytest.approx(2 * plain[3])
    assert not torch.equal(guided[0], plain[0])


def test_local_steps_follow_the_group():
    """Each local step sees the group's tokens decoded so far, and no other call is made."""
    model = Watched(masked_model())
    final, whole, local, _ = recap.decode(model, torch.tensor([0]), 6, 2, 1)
    assert (whole, local) == (4, 2)
    is_whole = [positions is None for positions in model.positions]
    assert is_whole == [True, True, True, False, True, False]

    # Call 3 is the local step of steps 2 and 3. It sees the tokens of step 2, and masks.
    plan = recap.decoding_plan(6, 12)
    ids = model.ids[3]
    positions = model.positions[3]
    decoded = final.gather(1, positions)
    n = plan[2]
    assert ids.shape[1] == plan[2] + plan[3]
    assert (ids != MASK).sum() == n
    assert torch.equal(ids[:, :n], decoded[:, :n])

    # The whole evaluation before it sees masks at these positions, the one after it tokens.
    assert (model.ids[2].gather(1, positions) == MASK).all()
    assert torch.equal(model.ids[4].gather(1, positions), decoded)


# ---------------------------------------------------------------- training


def test_masked_loss_of_a_uniform_model():
    model = masked_model()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    ids = torch.randint(5, (4, 12))
    loss = recap.masked_loss(model, ids, torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(5))


def test_masked_loss_masks_a_random_share_of_tokens():
    torch.manual_seed(0)
    ids = torch.randint(5, (1000, 12))
    inputs = []

    def model(given, label):
        inputs.append(given)
        return torch.zeros(*given.shape, 5), None

    model.vocabulary = 5
    recap.masked_loss(model, ids, torch.zeros(1000, dtype=torch.int64))
    (given,) = inputs
    masked = given == MASK
    assert torch.equal(given[~masked], ids[~masked])

    # The mean of cos(pi u / 2) is 2 / pi. Rounding up to whole tokens adds half a token.
    shares = masked.float().mean(1)
    assert shares.min() > 0
    assert shares.mean().item() == pytest.approx(2 / math.pi + 0.5 / 12, abs=0.03)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def trained(made_once):
    """The folder of a model after three updates."""

    def make(folder):
        call(recap.main, "train", folder, "--updates 3 --batch 8")

    return made_once("recap", make)


@pytest.fixture
def palette(trained):
    """The colors of this model, (16, 3)."""
    return torch.load(trained / "recap.pt", weights_only=True)["palette"]


def test_training_does_not_overwrite_a_model(trained):
    with pytest.raises(ValueError, match=re.escape(str(trained))):
        call(recap.main, "train", trained)


def test_recap_draws_images_in_the_palette(trained, palette, tmp_path, capsys):
    out = tmp_path / "out.npz"
    options = "--steps 8 --whole 2 --local 1 --n 10 --batch 4"
    call(recap.main, "sample", trained, options, "--out", out)
    # It prints 5 whole evaluations and 3 local ones.
    assert re.search(r"(?<![\d.])5 .*(?<![\d.])3 ", capsys.readouterr().out)

    with np.load(out) as written:
        images = torch.from_numpy(written["arr_0"])
    assert images.shape == (10, 16, 16, 3)
    tokens = recap.tokens_of(images.permute(0, 3, 1, 2), palette)
    assert torch.equal(recap.images_of(tokens, palette), images)


def test_recap_writes_shapes_in_the_nearest_colors(trained, palette, tmp_path):
    out = tmp_path / "out.npz"
    call(recap.main, "real", trained, "--n 5 --out", out)
    images, _ = load_batch(Shapes(16, first=2**30), range(5))
    images = images.permute(0, 2, 3, 1).float()
    distances = (images[:, :, :, None] - palette.float()).square().sum(4)
    with np.load(out) as written:
        assert np.array_equal(written["arr_0"], palette[distances.argmin(3)])


def test_recap_prints_the_errors_of_reuse(trained, capsys):
    call(recap.main, "reuse", trained, "--n 3")
    pattern = r"\b256\b.*\b16\b.*\bKL\b[^\d\n]+0\.0000\d\b[^\d\n]+\d+\.\d{5}\b"
    assert len(re.findall(pattern, capsys.readouterr().out)) == 3


def test_broken_models_and_invalid_options_are_rejected(tmp_path):
    path = tmp_path / "recap.pt"
    path.write_bytes(b"PK broken")
    for options, message in (
        ([], re.escape(str(path))),
        (["--n 0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["--out x"], r"--out x\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(recap.main, "sample", tmp_path, *options)
