"""Tests of related/distill.py."""

import argparse
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

import sample as sampling
from related import (
    distill,
)
from sample import ddim_step, guided
from schedule import (
    alpha_sigma,
    logsnr_schedule_cosine,
    x_from_v,
)
from support.checkpoint import build_net, load, load_checkpoint
from support.data import Shapes
from support.runtime import in_bf16
from tests.helpers import SMALL_NET, TINY_UVIT, call, on_ranks, train_small

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_two_teacher_steps_equal_one_student_step():
    torch.manual_seed(0)
    z, schedule = torch.randn(4, 3, 4, 4).double(), logsnr_schedule_cosine

    def teacher(z, logsnr, label):
        return torch.tanh(z) * torch.sigmoid(logsnr).reshape(-1, 1, 1, 1)

    times = distill.progressive_times(torch.tensor([0.0, 0.3, 0.6, 0.99]).double(), 4)
    assert [u.tolist() for u in times] == [
        [0.25, 0.5, 0.75, 1.0],
        [0.125, 0.375, 0.625, 0.875],
        [0.0, 0.25, 0.5, 0.75],
    ]
    t, middle, s = map(schedule, times)
    v = distill.progressive_target(teacher, None, z, times, schedule, None)
    once = ddim_step(z, x_from_v(z, v, t), t, s)
    twice = z
    for a, b in ((t, middle), (middle, s)):
        twice = ddim_step(twice, x_from_v(twice, teacher(twice, a, None), a).clamp(-1, 1), a, b)
    torch.testing.assert_close(once, twice)


def gaussian(std):
    """The ideal net of images that are N(0, std^2).

    x_hat = alpha std^2 z / (alpha^2 std^2 + sigma^2)
    """

    def net(z, logsnr, label):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return (
            alpha * z * (1 - std**2) * sigma / (alpha**2 * std**2 + sigma**2)
        )  # v = (alpha z - x_hat) / sigma

    return net


def test_the_exact_net_of_a_gaussian():
    z, logsnr = torch.randn(5, 1, 1, 1).double(), torch.linspace(-9, 9, 5).double()
    alpha, sigma = alpha_sigma(logsnr, like=z)
    torch.testing.assert_close(
        x_from_v(z, gaussian(0.1)(z, logsnr, None), logsnr),
        alpha * 0.01 * z / (alpha**2 * 0.01 + sigma**2),
    )


def test_one_step_student_of_a_gaussian_is_the_product_of_its_teachers_steps():
    schedule, std, z = logsnr_schedule_cosine, 0.1, torch.tensor([[[[0.7]]]]).double()
    u = torch.linspace(1, 0, 257).double()
    teacher, product = gaussian(std), z
    for a, b in zip(u[:-1], u[1:]):
        product = distill.ddim(teacher, product, schedule(a[None]), schedule(b[None]), None)
    n = 128
    while (
        n >= 1
    ):  # every student is linear in z, so that one target for each of its steps is all it can learn
        learned = {}
        for step in range(n):
            times = distill.progressive_times(torch.tensor([(step + 0.5) / n]).double(), n)
            learned[round(schedule(times[0]).item(), 6)] = (
                distill.progressive_target(teacher, None, z, times, schedule, None) / z
            )

        def teacher(z, logsnr, label, learned=learned):
            return learned[round(logsnr.item(), 6)] * z

        n //= 2
    ends = schedule(torch.tensor([1.0, 0.0]).double())
    once = distill.ddim(teacher, z, ends[:1], ends[1:], None)
    torch.testing.assert_close(once, product)
    assert (once / z).item() == pytest.approx(
        std, rel=0.03
    )  # the flow's end, but for the error of 256 steps


def test_consistent_students_stay_consistent():
    schedule, std, steps, teacher_steps = logsnr_schedule_cosine, 0.1, 4, 512
    u = ((torch.arange(64) + 0.5) / 64).double()
    times = distill.consistency_times(u, steps, teacher_steps)
    assert all(((times[0] - times[1]) * teacher_steps - 1).abs() < 1e-9)
    assert (
        all(times[2] <= times[1])
        and all(times[0] - times[2] <= 1 / steps + 1e-9)
        and set((times[2] * steps).tolist()) == {0.0, 1.0, 2.0, 3.0}
    )

    def width(logsnr):  # of z: the flow keeps z / width
        return (torch.sigmoid(logsnr) * std**2 + torch.sigmoid(-logsnr)).sqrt().reshape(-1, 1, 1, 1)

    t, end = schedule(times[0]), schedule(times[2])

    def student(
        z, logsnr, label
    ):  # the exact way to the end of the segment; 0 / 0 at the end itself, where any v will do
        return distill.v_between(z, z * width(end) / width(logsnr), logsnr, end).nan_to_num()

    def reached(teacher):
        z = width(t)
        return ddim_step(
            z,
            x_from_v(z, distill.consistency_target(teacher, student, z, times, schedule, None), t),
            t,
            end,
        ) / width(end)

    torch.testing.assert_close(
        reached(gaussian(std)), torch.ones(64, 1, 1, 1).double(), rtol=0, atol=2e-3
    )  # what it knows already is what it is to learn
    assert (
        reached(gaussian(5 * std)) - 1
    ).abs().max() > 0.01  # of another teacher it would learn something else


def fill(net):
    """Random weights, as some are 0 at first."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def test_a_student_starts_as_its_teacher_and_learns_the_scale(small_run):
    net, config, schedule = load(small_run)
    student = build_net(
        "related.distill:Student", dict(config["model_args"], model="uvit", max_guidance=3.0)
    )
    student.copy_from(net)
    student.eval()
    z, logsnr, label = torch.randn(4, 3, 32, 32), torch.linspace(-5, 5, 4), torch.arange(4)
    for given in (label, (label, torch.linspace(1, 3, 4))):
        torch.testing.assert_close(student(z, logsnr, given), net(z, logsnr, label))
    fill(student)
    torch.testing.assert_close(
        student(z, logsnr, label), student(z, logsnr, (label, torch.ones(4)))
    )
    at_two = guided(in_bf16(student, True), 2.0)(z, logsnr, label)
    torch.testing.assert_close(at_two, in_bf16(student)(z, logsnr, (label, torch.full((4,), 2.0))))
    assert not torch.allclose(at_two, student(z, logsnr, label), atol=0.02)
    for scale in (0.5, 3.1):
        with pytest.raises(ValueError) as error:
            guided(student, scale)
        assert {"1", "3", f"{scale}"} <= set(re.findall(r"\d+(?:\.\d+)?", str(error.value)))


def test_guidance_by_a_scale_for_each_image():
    def net(z, logsnr, label):
        return z * (1 + label.reshape(-1, 1, 1, 1))

    net.num_classes = 3
    z, logsnr, label, scales = (
        torch.randn(3, 3, 2, 2),
        torch.zeros(3),
        torch.tensor([0, 1, 2]),
        torch.tensor([1.0, 1.5, 3.0]),
    )
    together = guided(net, scales.reshape(-1, 1, 1, 1))(z, logsnr, label)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1],
            guided(net, scales[i].item())(z[i : i + 1], logsnr[:1], label[i : i + 1]),
        )


@pytest.mark.parametrize("consistency", [False, True])
def test_students_learn_their_targets(consistency):
    torch.manual_seed(0)
    teacher = torch.nn.Module()
    teacher.forward = lambda z, logsnr, label: (
        gaussian(0.5)(z, logsnr, None) * label[1].reshape(-1, 1, 1, 1)
    )  # the scale matters as it does to guidance
    student = distill.Student(
        "uvit",
        10,
        max_guidance=2.0,
        **{key: value for key, value in TINY_UVIT.items() if key != "num_classes"},
    ).eval()
    options = argparse.Namespace(
        batch=8,
        updates=100,
        seed=0,
        lr=3e-3,
        consistency=consistency,
        teacher_steps=8,
        bf16=False,
        flip=True,
    )
    losses = []
    average = distill.distill(
        teacher,
        student,
        Shapes(16),
        logsnr_schedule_cosine,
        4,
        options,
        lambda update, loss: losses.append(loss.item()),
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    z, logsnr, label = (
        torch.randn(8, 3, 16, 16),
        torch.full((8,), -2.0),
        torch.zeros(8, dtype=torch.int64),
    )
    ratio = [average(z, logsnr, (label, torch.full((8,), scale))).norm() for scale in (1.0, 2.0)]
    assert ratio[1] > 1.2 * ratio[0]


def test_students_need_a_net_with_a_known_embedding():
    with pytest.raises(ValueError, match=r"(?=.*related\.sid2:ResidualUViT).*related\.dico:DiCo"):
        distill.Student("related.dico:DiCo", 10, res=32)


def test_distill_command(small_run, tmp_path, capsys, monkeypatch):
    options = ["--updates 2 --batch 4 --no-bf16 --lr 0.01"]
    call(distill.main, small_run, "--steps 2 --teacher-steps 8 --out", f"{tmp_path}/run", *options)
    call(
        distill.main,
        small_run,
        "--steps 4 --teacher-steps 8 --out",
        f"{tmp_path}/consistent/",
        "--consistency --max-guidance 2 --seed 1 --device cpu",
        *options,
    )
    call(
        distill.main, f"{tmp_path}/run-4steps/ckpt_0000002.pt", "--steps 2", *options
    )  # a student as the teacher
    for name, steps in (
        ("run-4steps", 4),
        ("run-2steps", 2),
        ("consistent-4steps", 4),
        ("run-4steps-2steps", 2),
    ):
        net = load(f"{tmp_path}/{name}")[0]
        assert (
            net.max_guidance == (2 if "consistent" in name else 3)
            and net.net.embedding.scale[2].weight.abs().max() > 0
        )
        call(
            sampling.main, f"{tmp_path}/{name}", "--n 2 --guidance 2 --out", f"{tmp_path}/grid.png"
        )
        printed = capsys.readouterr()
        assert re.search(rf"\bddim\b.*\b{steps}\b.*\bguidance\W+2\b", printed.out)
        assert "--steps" not in printed.err and "--sampler" not in printed.err
        with open(f"{tmp_path}/{name}/config.json") as file:
            assert json.load(file) == load(f"{tmp_path}/{name}")[1]
    call(sampling.main, f"{tmp_path}/run-4steps", "--n 2 --steps 3 --out", f"{tmp_path}/grid.png")
    printed = capsys.readouterr()
    assert "--steps 4" in printed.err and "--sampler ddim" in printed.err
    for args, text in (
        (
            [small_run, "--steps 4 --teacher-steps 8 --out", f"{tmp_path}/run", "--seed 1"],
            re.escape(f"{tmp_path}/run-4steps"),
        ),
        (
            [f"{tmp_path}/run-4steps", "--steps 8 --teacher-steps 16"],
            r"(?=.*--teacher-steps 16\b).*run-4steps\b.*\b4\b",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call(distill.main, *args, *options)
    weights = load(f"{tmp_path}/run-2steps")[0].state_dict()
    shutil.rmtree(tmp_path / "run-2steps")  # as if the command had been interrupted there
    written = os.stat(tmp_path / "run-4steps" / "ckpt_0000002.pt").st_mtime_ns
    capsys.readouterr()
    call(distill.main, small_run, "--steps 2 --teacher-steps 8 --out", f"{tmp_path}/run", *options)
    text = capsys.readouterr().out
    assert text.count(f"{tmp_path}/run-4steps") == text.count(f"{tmp_path}/run-2steps") == 1
    assert os.stat(tmp_path / "run-4steps" / "ckpt_0000002.pt").st_mtime_ns == written
    assert re.search(r"\b2/2\b.*\bloss\b", text) and text.count("loss") == 1  # of the 2 steps alone
    assert all(
        torch.equal(weights[key], value)
        for key, value in load(f"{tmp_path}/run-2steps")[0].state_dict().items()
    )
    monkeypatch.chdir(tmp_path / "consistent-4steps")
    call(distill.main, "ckpt_0000002.pt", "--steps 2", *options)
    assert os.path.isdir(tmp_path / "consistent-4steps-2steps")


def test_a_diverged_student_is_not_written(small_run, tmp_path):
    with pytest.raises(ValueError, match=r"(?=.*\b3\b)(?=.*\b4\b).*--lr\b.*\b1e\+38\b"):
        call(
            distill.main,
            small_run,
            "--steps 2 --teacher-steps 8 --updates 3 --batch 2 --lr 1e38 --out",
            tmp_path / "run",
        )
    assert not os.listdir(tmp_path)


def test_a_teacher_without_sampling_settings(small_run, tmp_path):
    state = load_checkpoint(small_run)
    for key in ("sampling", "captions", "text_encoder", "text_tokens"):
        del state["config"][key]  # as of runs before there were such settings
    torch.save(state, tmp_path / "old.pt")
    call(
        distill.main,
        tmp_path / "old.pt",
        "--steps 1 --teacher-steps 2 --updates 1 --batch 2 --out",
        tmp_path / "new",
    )
    assert load(str(tmp_path / "new-1steps"))[1]["sampling"] == dict(sampler="ddim", steps=1)


def test_distill_on_two_ranks_equals_one(small_run, tmp_path):
    options = [
        small_run,
        "--steps 4 --teacher-steps 8 --updates 20 --batch 4 --no-bf16 --lr 0.001 --out",
    ]
    call(distill.main, *options, tmp_path / "one")
    call(distill.main, *options, tmp_path / "other", "--seed 1")
    statuses, _, errors = on_ranks(distill.main, *options, tmp_path / "two", cwd=tmp_path)
    assert statuses == [0, 0], errors
    one, other, two = (
        torch.cat(
            [
                value.flatten()
                for key, value in load(str(tmp_path / f"{name}-4steps"))[0].state_dict().items()
                if "norm_k.bias" not in key
            ]
        )
        for name in ("one", "other", "two")
    )  # of norm_k.bias the gradient is rounding alone
    assert (two - one).abs().max() < 0.1 * (other - one).abs().max()


def test_distill_other_nets_and_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "plain.npz", x=x)  # no labels
    np.savez(tmp_path / "moved.npz", x=x)
    train_small(
        tmp_path,
        "--data",
        tmp_path / "plain.npz",
        "--model unet --model-args",
        '{"base_channels": 8}',
        "--out",
        tmp_path / "plain",
    )
    os.remove(tmp_path / "plain.npz")
    options = ["--steps 1 --teacher-steps 2 --updates 1 --batch 4"]
    with pytest.raises(OSError, match=r"plain\.npz"):
        call(distill.main, f"{tmp_path}/plain", *options)
    call(distill.main, f"{tmp_path}/plain", "--data", tmp_path / "moved.npz", *options)
    assert load(f"{tmp_path}/plain-1steps")[0].max_guidance == 1
    sid = str(train_small(tmp_path, "--model related.sid2:ResidualUViT", *SMALL_NET))
    with pytest.raises(ValueError, match=re.escape(sid)):
        call(distill.main, sid, "--data", tmp_path / "moved.npz", *options)
    seen = []

    def scales(net, scale, null_label):
        seen.append(scale)
        return guided(net, scale, null_label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "guided", scales)
        call(distill.main, sid, *options)
    assert (
        seen[0].flatten().tolist() == [1, 1, 1, 1]
        and "guidance_interval" not in load(f"{sid}-1steps")[1]["sampling"]
    )  # logsnr is -10 there: not in its interval
    assert (
        all(1 < scale < 3 for scale in seen[1].flatten()) and len(seen[1].unique()) == 4
    )  # and 0 in the middle, where each image has its own
    train_small(tmp_path, "--label-drop 0", *SMALL_NET, "--out", tmp_path / "labels")
    call(distill.main, f"{tmp_path}/labels", *options)
    assert load(f"{tmp_path}/labels-1steps")[0].max_guidance == 1  # it has never met the null label


@pytest.mark.parametrize(
    "args, text",
    [
        (["--steps 3"], r"(?=.*--teacher-steps 64\b)(?=.*2, 4, 8).*--steps 3\b"),
        (["--steps 64"], r"(?=.*--teacher-steps 64\b)(?=.*2, 4, 8).*--steps 64\b"),
        (
            ["--steps 8 --teacher-steps 8 --consistency"],
            r"(?=.*--teacher-steps 8\b)(?=.*2, 3, 4).*--steps 8\b",
        ),
        (["--batch 0"], "--batch"),
        (["--lr 0"], "--lr"),
        (["--max-guidance 0.5"], "--max-guidance"),
        (["--device abacus"], "--device abacus"),
    ],
)
def test_distill_names_wrong_input(small_run, args, text):
    with pytest.raises(ValueError, match=text):
        call(distill.main, small_run, *args)
