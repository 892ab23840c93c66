"""Tests of related/distill.py."""

import argparse
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn

import sample as sampling
from related import distill
from sample import ddim_step, guided
from schedule import alpha_sigma, logsnr_schedule_cosine, x_from_v
from support.checkpoint import build_net, load, load_checkpoint, newest_checkpoint
from support.data import Shapes
from support.runtime import in_bf16
from tests.helpers import (
    SMALL_NET,
    TINY_UVIT,
    call,
    content_of,
    fill_random,
    gaussian_net,
    named,
    on_ranks,
    train_small,
)

# ---------------------------------------------------------------- the targets


def test_two_teacher_steps_equal_one_student_step():
    torch.manual_seed(0)
    z = torch.randn(4, 3, 4, 4).double()
    schedule = logsnr_schedule_cosine

    def teacher(z, logsnr, label):
        return torch.tanh(z) * torch.sigmoid(logsnr).reshape(-1, 1, 1, 1)

    # The begin, the middle and the end of the student's step.
    times = distill.progressive_times(torch.tensor([0.0, 0.3, 0.6, 0.99]).double(), 4)
    assert [u.tolist() for u in times] == [
        [0.25, 0.5, 0.75, 1.0],
        [0.125, 0.375, 0.625, 0.875],
        [0.0, 0.25, 0.5, 0.75],
    ]

    # One step of a student that has learned its target.
    t, middle, s = map(schedule, times)
    v = distill.progressive_target(teacher, None, z, times, schedule, None)
    once = ddim_step(z, x_from_v(z, v, t), t, s)

    # Two steps of the teacher.
    twice = z
    for a, b in ((t, middle), (middle, s)):
        x_hat = x_from_v(twice, teacher(twice, a, None), a).clamp(-1, 1)
        twice = ddim_step(twice, x_hat, a, b)
    torch.testing.assert_close(once, twice)


def gaussian(std):
    """The ideal net of images that are N(0, std^2)."""
    return gaussian_net(0.0, std**2)


def test_the_exact_net_of_a_gaussian():
    z = torch.randn(5, 1, 1, 1).double()
    logsnr = torch.linspace(-9, 9, 5).double()
    alpha, sigma = alpha_sigma(logsnr, like=z)
    x_hat = x_from_v(z, gaussian(0.1)(z, logsnr, None), logsnr)
    torch.testing.assert_close(x_hat, alpha * 0.01 * z / (alpha**2 * 0.01 + sigma**2))


def test_one_step_student_of_a_gaussian_is_the_product_of_its_teachers_steps():
    schedule = logsnr_schedule_cosine
    std = 0.1
    z = torch.tensor([[[[0.7]]]]).double()

    # The first teacher makes 256 steps.
    teacher = gaussian(std)
    u = torch.linspace(1, 0, 257).double()
    product = z
    for a, b in zip(u[:-1], u[1:]):
        product = distill.ddim(teacher, product, schedule(a[None]), schedule(b[None]), None)

    # Students of 128, 64, ..., 1 steps. Every student is linear in z. So one target for each of its
    # steps is all that it can learn.
    for n in (128, 64, 32, 16, 8, 4, 2, 1):
        learned = {}  # v_hat / z at the begin of each step
        for step in range(n):
            times = distill.progressive_times(torch.tensor([(step + 0.5) / n]).double(), n)
            v_hat = distill.progressive_target(teacher, None, z, times, schedule, None)
            learned[round(schedule(times[0]).item(), 6)] = v_hat / z

        def teacher(z, logsnr, label, learned=learned):
            return learned[round(logsnr.item(), 6)] * z

    ends = schedule(torch.tensor([1.0, 0.0]).double())
    once = distill.ddim(teacher, z, ends[:1], ends[1:], None)
    torch.testing.assert_close(once, product)

    # The exact flow multiplies z by std. 256 steps have a small error.
    assert (once / z).item() == pytest.approx(std, rel=0.03)


def test_guidance_keeps_the_flag_of_portrait_images():
    # The last token of a text says whether the image is rotated. The empty text keeps it.
    seen = []

    def net(z, logsnr, label):
        seen.append(label)
        return z

    config = dict(classes=[], sampling={}, model_args=dict(text_tokens=3, portrait=True))
    teacher = distill.guided_teacher(net, config, 3.0)
    label = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 1]])
    teacher(torch.zeros(2, 3, 4, 4), torch.zeros(2), (label, torch.full((2,), 3.0)))
    assert seen[0].tolist() == [*label.tolist(), [0, 0, 0, 0], [0, 0, 0, 1]]


def test_consistent_students_stay_consistent():
    schedule = logsnr_schedule_cosine
    std = 0.1
    steps = 4
    teacher_steps = 512

    # A teacher step leads from t to the middle. The student jumps from there to the end of its
    # segment, which is one of four.
    u = ((torch.arange(64) + 0.5) / 64).double()
    times = distill.consistency_times(u, steps, teacher_steps)
    t, middle, end = times
    assert (((t - middle) * teacher_steps - 1).abs() < 1e-9).all()
    assert (end <= middle).all()
    assert (t - end <= 1 / steps + 1e-9).all()
    assert set((end * steps).tolist()) == {0.0, 1.0, 2.0, 3.0}

    def width(logsnr):
        """The standard deviation of z. The exact flow keeps z / width."""
        variance = torch.sigmoid(logsnr) * std**2 + torch.sigmoid(-logsnr)
        return variance.sqrt().reshape(-1, 1, 1, 1)

    logsnr_t = schedule(t)
    logsnr_end = schedule(end)

    def student(z, logsnr, label):
        """The exact way to the end. At the end itself it is 0 / 0, where any v will do."""
        z_end = z * width(logsnr_end) / width(logsnr)
        return distill.v_between(z, z_end, logsnr, logsnr_end).nan_to_num()

    def reached(teacher):
        """z / width at the end, which a student of this teacher learns to reach from 1 at t."""
        z = width(logsnr_t)
        v = distill.consistency_target(teacher, student, z, times, schedule, None)
        z_end = ddim_step(z, x_from_v(z, v, logsnr_t), logsnr_t, logsnr_end)
        return z_end / width(logsnr_end)

    # The student is to learn what it knows already.
    ones = torch.ones(64, 1, 1, 1).double()
    torch.testing.assert_close(reached(gaussian(std)), ones, rtol=0, atol=2e-3)

    # With another teacher it would learn something else.
    assert (reached(gaussian(5 * std)) - 1).abs().max() > 0.01


# ---------------------------------------------------------------- the student


def test_a_student_starts_as_its_teacher_and_learns_the_scale(small_run):
    net, config, _ = load(small_run)
    model_args = dict(config["model_args"], model="uvit", max_guidance=3.0)
    student = build_net("related.distill:Student", model_args)
    student.copy_from(net)
    student.eval()

    # At first the scale has no effect.
    z = torch.randn(4, 3, 32, 32)
    logsnr = torch.linspace(-5, 5, 4)
    label = torch.arange(4)
    expected = net(z, logsnr, label)
    torch.testing.assert_close(student(z, logsnr, label), expected)
    torch.testing.assert_close(student(z, logsnr, (label, torch.linspace(1, 3, 4))), expected)

    # With larger weights the effect of the scale is clear. A label alone means scale 1.
    fill_random(student)
    with torch.no_grad():
        for parameter in student.net.embedding.scale.parameters():
            parameter.mul_(3)
    at_one = student(z, logsnr, label)
    torch.testing.assert_close(at_one, student(z, logsnr, (label, torch.ones(4))))

    # guided() passes the scale to the student, also in bfloat16.
    at_two = guided(in_bf16(student, True), 2.0)(z, logsnr, label)
    expected = in_bf16(student)(z, logsnr, (label, torch.full((4,), 2.0)))
    torch.testing.assert_close(at_two, expected)
    assert not torch.allclose(at_two, at_one, atol=0.02)

    # The student knows the scales from 1 to 3 only.
    for scale in (0.5, 3.1):
        with pytest.raises(ValueError) as error:
            guided(student, scale)
        numbers = set(re.findall(r"\d+(?:\.\d+)?", str(error.value)))
        assert {"1", "3", f"{scale}"} <= numbers


def test_guidance_by_a_scale_for_each_image():
    def net(z, logsnr, label):
        return z * (1 + label.reshape(-1, 1, 1, 1))

    net.num_classes = 3
    z = torch.randn(3, 3, 2, 2)
    logsnr = torch.zeros(3)
    label = torch.tensor([0, 1, 2])
    scales = torch.tensor([1.0, 1.5, 3.0])
    together = guided(net, scales.reshape(-1, 1, 1, 1))(z, logsnr, label)
    for i in range(3):
        one = slice(i, i + 1)
        alone = guided(net, scales[i].item())(z[one], logsnr[:1], label[one])
        torch.testing.assert_close(together[one], alone)


class ScaledGaussian(nn.Module):
    """The net of a Gaussian, times the scale. So the scale has an effect, as in guidance."""

    def forward(self, z, logsnr, label):
        _, scale = label
        return gaussian(0.5)(z, logsnr) * scale.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("consistency", [False, True])
def test_students_learn_their_targets(consistency):
    torch.manual_seed(0)
    fields = dict(TINY_UVIT, num_classes=10)
    student = distill.Student("uvit", max_guidance=2.0, **fields).eval()
    options = argparse.Namespace(
        batch=8,
        updates=100,
        seed=0,
        lr=3e-3,
        consistency=consistency,
        teacher_steps=8,
        bf16=False,
        flip=True,
        clip="static",
    )
    losses = []

    def report(update, loss):
        losses.append(loss.item())

    average = distill.distill(
        ScaledGaussian(), student, Shapes(16), logsnr_schedule_cosine, 4, options, report
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    # The student has learned that the scale matters.
    z = torch.randn(8, 3, 16, 16)
    logsnr = torch.full((8,), -2.0)
    label = torch.zeros(8, dtype=torch.int64)
    at_one = average(z, logsnr, (label, torch.full((8,), 1.0))).norm()
    at_two = average(z, logsnr, (label, torch.full((8,), 2.0))).norm()
    assert at_two > 1.2 * at_one


def test_students_need_a_net_with_a_known_embedding():
    with pytest.raises(ValueError, match=r"(?=.*related\.sid2:ResidualUViT).*related\.dico:DiCo"):
        distill.Student("related.dico:DiCo", 10, res=32)


# ---------------------------------------------------------------- the command


def test_distill_command(small_run, tmp_path, capsys, monkeypatch):
    options = "--updates 2 --batch 4 --no-bf16 --lr 0.01"
    four = tmp_path / "run-4steps"
    two = tmp_path / "run-2steps"
    consistent = tmp_path / "consistent-4steps"

    # Progressive distillation and consistency.
    progressive = ["--teacher-steps 8 --out", tmp_path / "run"]
    call(distill.main, small_run, "--steps 2", progressive, options)
    call(
        distill.main,
        small_run,
        "--steps 4 --teacher-steps 8 --out",
        f"{tmp_path}/consistent/",
        "--consistency --max-guidance 2 --seed 1 --device cpu",
        options,
    )

    # sample.py takes sampler and steps from the student's settings, without a warning.
    grid = tmp_path / "grid.png"
    for out, steps in ((four, 4), (two, 2), (consistent, 4)):
        net, config, _ = load(str(out))
        assert net.max_guidance == (2 if out == consistent else 3)
        assert net.net.embedding.scale[2].weight.abs().max() > 0
        assert json.loads(content_of(out / "config.json")) == config

        call(sampling.main, out, "--n 2 --guidance 2 --out", grid)
        printed = capsys.readouterr()
        assert re.search(rf"\bddim\b.*\b{steps}\b.*\bguidance\W+2\b", printed.out)
        assert "--steps" not in printed.err
        assert "--sampler" not in printed.err

    # Another number of steps is possible, with a warning.
    call(sampling.main, four, "--n 2 --steps 3 --out", grid)
    printed = capsys.readouterr()
    assert "--steps 4" in printed.err
    assert "--sampler ddim" in printed.err

    # A folder that holds a student with other settings, and a student as the teacher.
    with pytest.raises(ValueError, match=re.escape(str(four))):
        call(distill.main, small_run, "--steps 4", progressive, "--seed 1", options)
    with pytest.raises(ValueError, match=r"run-4steps\b.*\bstudent\b.*--steps\b"):
        call(distill.main, four, "--steps 2", options)

    # Delete the second stage, as if the command had been interrupted there.
    weights = load(str(two))[0].state_dict()
    shutil.rmtree(two)
    written = os.stat(four / "ckpt_0000002.pt").st_mtime_ns
    capsys.readouterr()
    call(distill.main, small_run, "--steps 2", progressive, options)

    # The same command trains this stage alone, with the same result.
    text = capsys.readouterr().out
    assert text.count(str(four)) == 1
    assert text.count(str(two)) == 1
    assert re.search(r"\b2/2\b.*\bloss\b", text)
    assert text.count("loss") == 1
    assert os.stat(four / "ckpt_0000002.pt").st_mtime_ns == written
    for name, value in load(str(two))[0].state_dict().items():
        assert torch.equal(weights[name], value), name

    # The teacher is a checkpoint in the current folder. The student goes beside this folder.
    run = shutil.copytree(small_run, tmp_path / "copy")
    monkeypatch.chdir(run)
    call(
        distill.main,
        os.path.basename(newest_checkpoint(".")),
        "--steps 2 --teacher-steps 4",
        options,
    )
    assert os.path.isdir(tmp_path / "copy-2steps")


def test_a_diverged_student_is_not_written(small_run, tmp_path):
    options = "--steps 2 --teacher-steps 8 --updates 3 --batch 2 --lr 1e38 --out"
    with pytest.raises(ValueError, match=r"(?=.*\b3\b)(?=.*\b4\b).*--lr\b.*\b1e\+38\b"):
        call(distill.main, small_run, options, tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_a_teacher_without_sampling_settings(small_run, tmp_path):
    # Old checkpoints do not have these settings.
    state = load_checkpoint(small_run)
    for key in ("sampling", "captions", "text_encoder", "text_tokens"):
        del state["config"][key]
    torch.save(state, tmp_path / "old.pt")

    options = "--steps 1 --teacher-steps 2 --updates 1 --batch 2 --out"
    call(distill.main, tmp_path / "old.pt", options, tmp_path / "new")
    _, config, _ = load(str(tmp_path / "new-1steps"))
    assert config["sampling"] == dict(sampler="ddim", steps=1)


def test_distill_on_two_ranks_equals_one(small_run, tmp_path):
    options = "--steps 4 --teacher-steps 8 --updates 20 --batch 4 --no-bf16 --lr 0.001 --out"
    args = [small_run, options]
    call(distill.main, args, tmp_path / "one")
    call(distill.main, args, tmp_path / "other", "--seed 1")
    statuses, _, errors = on_ranks(distill.main, args, tmp_path / "two", cwd=tmp_path)
    assert statuses == [0, 0], errors

    def weights(name):
        """All weights of a student, but norm_k.bias, whose gradient is only rounding."""
        state = load(str(tmp_path / f"{name}-4steps"))[0].state_dict()
        parts = [value.flatten() for key, value in state.items() if "norm_k.bias" not in key]
        return torch.cat(parts)

    # The difference is small, compared with that of another seed.
    one = weights("one")
    difference = (weights("two") - one).abs().max()
    of_another_seed = (weights("other") - one).abs().max()
    assert difference < 0.1 * of_another_seed


QUICK = "--steps 1 --teacher-steps 2 --updates 1 --batch 4"


def test_students_of_a_run_on_texts(tmp_path):
    run = train_small(tmp_path, "--captions --text-tokens 16", SMALL_NET)
    net, config, _ = load(run)

    # The student starts as its teacher. At first the scale has no effect, then it has.
    options = argparse.Namespace(max_guidance=3.0)
    teacher, student = distill.make_student(net, config, options, "cpu")
    z = torch.randn(2, 3, 32, 32)
    logsnr = torch.tensor([-3.0, 2.0])
    text = torch.randint(1, 257, (2, 16))
    scale = torch.tensor([1.0, 3.0])
    student.eval()
    torch.testing.assert_close(student(z, logsnr, text), net(z, logsnr, text))
    torch.testing.assert_close(student(z, logsnr, (text, scale)), net(z, logsnr, text))
    fill_random(student)
    other = student(z, logsnr, (text, scale)) - student(z, logsnr, text)
    assert other[0].abs().max() == 0
    assert other[1].abs().max() > 1e-4

    # The teacher is guided away from the empty text.
    fill_random(net)
    empty = net(z, logsnr, torch.zeros_like(text))
    expected = empty + scale.reshape(-1, 1, 1, 1) * (net(z, logsnr, text) - empty)
    torch.testing.assert_close(teacher(z, logsnr, (text, scale)), expected)

    # The command, and samples of its student.
    call(distill.main, run, QUICK)
    out = tmp_path / "samples.npz"
    options = ["--n 2 --guidance 2 --prompt", "a red star", "--out", out]
    call(sampling.main, f"{run}-1steps", options)
    with np.load(out) as written:
        assert written["arr_0"].shape == (2, 32, 32, 3)


def test_students_of_a_run_on_latents(tmp_path, monkeypatch):
    z = 3 * np.random.default_rng(0).standard_normal((8, 5, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "z.npz", z=z)
    model = ["--model unet --model-args", '{"base_channels": 8}']
    run = train_small(tmp_path, "--data", tmp_path / "z.npz", model)

    clips = set()

    def keep_clip(x, clip):
        clips.add(clip)
        return sampling.clip_x(x, clip)

    monkeypatch.setattr(distill, "clip_x", keep_clip)
    call(distill.main, run, QUICK)

    # Latents have no fixed range.
    assert clips == {None}
    out = tmp_path / "samples.npz"
    call(sampling.main, f"{run}-1steps", "--n 2 --out", out)
    with np.load(out) as written:
        assert written["z"].shape == (2, 5, 32, 32)


def test_images_that_have_moved(tmp_path):
    # A U-Net on images without labels.
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    data = tmp_path / "plain.npz"
    np.savez(data, x=x)
    model = ["--model unet --model-args", '{"base_channels": 8}']
    run = train_small(tmp_path, "--data", data, model)

    moved = tmp_path / "moved.npz"
    os.rename(data, moved)
    with pytest.raises(OSError, match=r"plain\.npz"):
        call(distill.main, run, QUICK)
    call(distill.main, run, "--data", moved, QUICK)

    # Without labels there is no guidance.
    assert load(f"{run}-1steps")[0].max_guidance == 1


def test_guidance_interval_of_the_teacher(tmp_path, monkeypatch):
    run = train_small(tmp_path, "--model related.sid2:ResidualUViT", SMALL_NET)

    # A dataset without the run's classes is rejected.
    data = tmp_path / "unlabeled.npz"
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(data, x=x)
    with pytest.raises(ValueError, match=re.escape(str(run))):
        call(distill.main, run, "--data", data, QUICK)

    scales = []

    def keep_scale(net, scale, null_label):
        scales.append(scale)
        return guided(net, scale, null_label)

    monkeypatch.setattr(distill, "guided", keep_scale)
    call(distill.main, run, QUICK)

    # The teacher's first step begins at logsnr -10, which is not in the interval.
    assert scales[0].flatten().tolist() == [1, 1, 1, 1]

    # The second begins at logsnr 0, where each image has its own scale.
    assert ((scales[1] > 1) & (scales[1] < 3)).all()
    assert len(scales[1].unique()) == 4

    # The student has learned the interval. Sampling needs none.
    assert "guidance_interval" not in load(f"{run}-1steps")[1]["sampling"]


def test_no_guidance_of_a_run_without_label_drop(tmp_path):
    # The net has never seen the null label.
    run = train_small(tmp_path, "--label-drop 0", SMALL_NET)
    call(distill.main, run, QUICK)
    assert load(f"{run}-1steps")[0].max_guidance == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 3", named("--teacher-steps 64", "2, 4, 8", "--steps 3")),
        ("--steps 64", named("--teacher-steps 64", "2, 4, 8", "--steps 64")),
        (
            "--steps 8 --teacher-steps 8 --consistency",
            named("--teacher-steps 8", "2, 3, 4", "--steps 8"),
        ),
        ("--batch 0", "--batch"),
        ("--lr 0", "--lr"),
        ("--max-guidance 0.5", "--max-guidance"),
        ("--device abacus", "--device abacus"),
    ],
)
def test_invalid_options_are_rejected(small_run, options, message):
    with pytest.raises(ValueError, match=message):
        call(distill.main, small_run, options)
