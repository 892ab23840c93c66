"""Tests of related/recap.py."""

import math
import re

import numpy as np
import pytest
import torch

import sample as sampling
from related import (
    recap,
)
from support.data import Shapes, load_batch
from tests.helpers import call, fill_random


def masked_model(**fields):
    torch.manual_seed(0)
    return fill_random(
        recap.MaskedModel(
            **dict(
                dict(
                    vocabulary=5, length=12, num_classes=3, channels=16, num_blocks=3, num_heads=2
                ),
                **fields,
            )
        )
    ).eval()


def test_local_evaluation_equals_the_full_one_for_the_same_tokens():
    model, label = masked_model().double(), torch.tensor([0, 2])
    ids = torch.randint(6, (2, 12))
    logits, cache = model(ids, label)
    group = torch.stack([torch.tensor([7, 0, 3]), torch.tensor([1, 11, 2])])
    others = recap.without(cache, group)
    assert all(k.shape == v.shape == (2, 2, 9, 8) for k, v in others)
    local, kept = model(ids.gather(1, group), label, group, others)
    torch.testing.assert_close(
        local, logits.gather(1, group[:, :, None].expand(-1, -1, 5)), rtol=0, atol=1e-10
    )
    assert kept[0][0].shape[2] == 4  # the group and the class
    assert torch.equal(model(ids, label, torch.arange(12).expand(2, -1))[0], logits)
    changed = ids.gather(1, group)
    changed[:, 1] = (changed[:, 1] + 1) % 5
    assert not torch.allclose(model(changed, label, group, others)[0], local)


def test_decoding_plans_are_those_published():
    for steps in (1, 8, 16, 24, 32, 64):
        plan = recap.decoding_plan(steps, 256)
        assert len(plan) == steps and sum(plan) == 256 and min(plan) >= 1
    assert recap.decoding_plan(4, 256) == [
        8,
        38,
        79,
        131,
    ]  # 256 (1 - (i / 4)^2.5) = 256, 248, 210.7, 131.3, 0, rounded down
    model, label = masked_model(length=256, channels=8, num_blocks=1), torch.tensor([1])
    for steps, whole, local, calls, cost in (
        (32, 12, 1, (22, 10), 22.9),
        (24, 10, 1, (17, 7), 17.9),
        (20, 10, 1, (15, 5), 15.8),
        (16, 8, 1, (12, 4), 12.8),
        (16, 0, 1, (8, 8), 9.0),
    ):
        lengths = []

        def watched(ids, *args, lengths=lengths):
            lengths.append(ids.shape[1])
            return model(ids, *args)

        watched.length, watched.vocabulary = 256, 5
        ids, *counted, queries = recap.decode(watched, label, steps, whole, local)
        assert (
            tuple(counted) == calls
            and (lengths.count(256), len(lengths) - lengths.count(256)) == calls
        )
        assert (
            queries == pytest.approx(cost, abs=0.06)
            and queries == pytest.approx(sum(n + 1 for n in lengths) / 257)
            and ids.max() < 5
        )
        groups = recap.grouped(recap.decoding_plan(steps, 256), whole, local)
        assert [n for n in lengths if n < 256] == [
            sum(group) for group in groups for _ in group[1:]
        ]
    recap.decoding_plan(67, 256)
    for steps in (0, 68, 257):
        with pytest.raises(ValueError, match=rf"(?=.*\b256\b)(?=.*\b1\b)(?=.*\b67\b).*\b{steps}\b"):
            recap.decoding_plan(steps, 256)


def test_every_position_is_decoded_once_and_as_by_hand():
    model, label = masked_model(), torch.tensor([0, 1, 2])
    seen = []

    def watched(ids, *args):
        seen.append(ids.clone())
        return model(ids, *args)

    watched.length, watched.vocabulary = 12, 5
    ids, *_ = recap.decode(watched, label, 4, confidence=0.0, temperature=1.0)
    for before, after, n in zip(seen, [*seen[1:], ids], recap.decoding_plan(4, 12)):
        new = before == 5
        assert (
            torch.equal(after[~new], before[~new])
            and ((after != 5) & new).sum(1).tolist() == [n] * 3
        )
    alone, *_ = recap.decode(model, label[1:2], 4, confidence=0.0, temperature=1.0, first=1)
    assert torch.equal(alone, ids[1:2])
    sharp = masked_model()
    with torch.no_grad():
        sharp.head.weight.mul_(
            1e4
        )  # as good as without randomness: the surest places first, of each the likeliest token
    ids, expected = recap.decode(sharp, label, 4, confidence=0.0)[0], torch.full((3, 12), 5)
    for n in recap.decoding_plan(4, 12):
        logits = sharp(expected, label)[0]
        assert torch.equal(ids[expected != 5], expected[expected != 5])
        for i in range(3):
            free = [j for j in range(12) if expected[i, j] == 5]
            newly = [j for j in free if ids[i, j] == logits[i, j].argmax()]
            assert len(newly) >= n
            best = sorted(free, key=lambda j: -logits[i, j].log_softmax(0).max())[:n]
            expected[i, best] = logits[i, best].argmax(1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("whole, local", [(0, 0), (1, 1), (0, 2)])
def test_decoding_by_hand_with_all_its_draws(whole, local):
    model, steps, temperature, confidence = masked_model(), 5, 0.4, 3.0
    ids, *_ = recap.decode(
        model,
        torch.tensor([1]),
        steps,
        whole,
        local,
        temperature=temperature,
        confidence=confidence,
        seed=7,
        first=2,
    )
    generator, label = torch.Generator().manual_seed(sampling.mix_seed(7, 2)), torch.tensor([1])

    def gumbel(*shape):
        return -(-torch.rand(shape, generator=generator).log()).log()

    tokens, step, plan = [5] * 12, 0, recap.decoding_plan(steps, 12)
    while step < steps:
        together = plan[step : step + 1] if step < whole else plan[step : step + 1 + local]
        groups = whole + math.ceil((steps - whole) / (1 + local))
        number = step if step < whole else whole + (step - whole) // (1 + local)
        logits, cache = model(torch.tensor([tokens]), label)
        guess = (logits[0] + gumbel(12, 5)).argmax(1).tolist()
        noise = (confidence * (1 - (number + 1) / groups) * gumbel(12)).tolist()
        sure = {
            i: logits[0, i].log_softmax(0)[guess[i]].item() + noise[i]
            for i in range(12)
            if tokens[i] == 5
        }
        chosen = sorted(sure, key=lambda i: -sure[i])[: sum(together)]
        rest = [1 + i for i in range(12) if i not in chosen]
        kept = [(k[:, :, rest], v[:, :, rest]) for k, v in cache]
        logits, waiting = logits[:, chosen], list(chosen)
        for j, n in enumerate(together):
            if j:
                logits, _ = model(
                    torch.tensor([[tokens[i] for i in chosen]]), label, torch.tensor([chosen]), kept
                )
            now = 1 - (1 - temperature) * math.sqrt(step / (steps - 1))
            drawn = (logits[0, -len(waiting) :][:n] / now + gumbel(n, 5)).argmax(1).tolist()
            for token in drawn:
                tokens[waiting.pop(0)] = token
            step += 1
    assert ids.tolist() == [tokens]


def test_errors_of_reuse():
    model, label = masked_model().double(), torch.tensor([0, 2])
    ids = torch.randint(5, (2, 12))
    local, stale = recap.reuse_errors(
        model, ids, label, 12, 12
    )  # all are the group: nothing is cached
    assert abs(local) < 1e-14 and stale > 1e-8
    local, stale = recap.reuse_errors(model, ids, label, 7, 3, torch.Generator().manual_seed(1))
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).argsort(1).tolist()
    expected = []
    for i in range(2):
        before = [5 if j in order[i][:7] else ids[i, j].item() for j in range(12)]
        now = list(before)
        now[order[i][0]] = ids[i, order[i][0]].item()
        (old, cache), new = (
            model(torch.tensor([before]), label[i : i + 1]),
            model(torch.tensor([now]), label[i : i + 1])[0],
        )
        rest = [1 + j for j in range(12) if j not in order[i][:3]]
        fresh = model(
            torch.tensor([[now[j] for j in order[i][:3]]]),
            label[i : i + 1],
            torch.tensor([order[i][:3]]),
            [(k[:, :, rest], v[:, :, rest]) for k, v in cache],
        )[0]
        for n in (1, 2):
            p = new[0, order[i][n]].softmax(0)
            expected.append(
                [
                    (p * (p.log() - q.log_softmax(0))).sum().item()
                    for q in (fresh[0, n], old[0, order[i][n]])
                ]
            )
    assert (local, stale) == pytest.approx(np.mean(expected, 0).tolist())


def test_local_steps_follow_the_group():
    """Each local step sees the group's tokens decoded so far, and no other call is made."""
    model, label, seen = masked_model(), torch.tensor([0]), []

    def watched(ids, label, positions=None, cache=None):
        seen.append((ids.clone(), positions))
        return model(ids, label, positions, cache)

    watched.length, watched.vocabulary = 12, 5
    final, whole, local, _ = recap.decode(watched, label, 6, 2, 1)
    assert (whole, local) == (4, 2) and [positions is None for _, positions in seen] == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]
    plan = recap.decoding_plan(6, 12)
    ids, positions = seen[3]
    assert (
        ids.shape[1] == plan[2] + plan[3]
        and (ids != 5).sum() == plan[2]
        and (ids[:, : plan[2]] == final.gather(1, positions)[:, : plan[2]]).all()
    )
    assert (seen[2][0].gather(1, positions) == 5).all() and torch.equal(
        seen[4][0].gather(1, positions), final.gather(1, positions)
    )


def test_recap_commands(tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "out.npz")
    call(recap.main, "train", run, "--updates 3 --batch 8")
    with pytest.raises(ValueError, match=re.escape(run)):
        call(recap.main, "train", run)
    call(recap.main, "sample", run, "--steps 8 --whole 2 --local 1 --n 10 --batch 4 --out", out)
    assert re.search(r"(?<![\d.])5 .*(?<![\d.])3 ", capsys.readouterr().out)
    palette = torch.load(f"{run}/recap.pt", weights_only=True)["palette"]
    with np.load(out) as written:
        pixels = torch.from_numpy(written["arr_0"])
        assert pixels.shape == (10, 16, 16, 3) and torch.equal(
            recap.images_of(recap.tokens_of(pixels.permute(0, 3, 1, 2), palette), palette), pixels
        )
    call(recap.main, "real", run, "--n 5 --out", out)
    x = load_batch(Shapes(16, first=2**30), range(5))[0].permute(0, 2, 3, 1).float()
    nearest = (x[:, :, :, None] - palette.float()).square().sum(4).argmin(3)
    assert np.array_equal(np.load(out)["arr_0"], palette[nearest])
    capsys.readouterr()
    call(recap.main, "reuse", run, "--n 3")
    pattern = r"\b256\b.*\b16\b.*\bKL\b[^\d\n]+0\.0000\d\b[^\d\n]+\d+\.\d{5}\b"
    assert len(re.findall(pattern, capsys.readouterr().out)) == 3
    (tmp_path / "run" / "recap.pt").write_bytes(b"PK broken")
    for options, message in (
        (["sample", run], re.escape(f"{run}/recap.pt")),
        (["sample", run, "--n 0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["sample", run, "--out x"], r"--out x\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(recap.main, options)


def test_masked_loss_of_a_uniform_model():
    model = masked_model()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert recap.masked_loss(
        model, torch.randint(5, (4, 12)), torch.tensor([0, 1, 2, 0])
    ).item() == pytest.approx(math.log(5))
    shares, ids = [], torch.randint(5, (1000, 12))

    def watched(given, label):
        shares.append((given == 5).float().mean(1))
        assert torch.equal(given[given != 5], ids[given != 5])
        return torch.zeros(*given.shape, 5), None

    watched.vocabulary = 5
    recap.masked_loss(watched, ids, torch.zeros(1000, dtype=torch.int64))
    assert shares[0].min() > 0 and shares[0].mean().item() == pytest.approx(
        2 / math.pi + 0.5 / 12, abs=0.03
    )  # the mean of the cosine, and of rounding up
