"""The tests of related/, run by python test_all.py with all others.

Alone: python -m pytest related
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import sample as sampling
import train
from loss import diffusion_loss
from related import (
    common,
    dico,
    diffusion_classifier,
    dimr,
    distill,
    lit,
    ppap,
    ppgn,
    recap,
    sid2,
    tstitch,
    vitok,
)
from sample import ddim_step, guided, sample
from schedule import (
    alpha_sigma,
    diffuse,
    eps_from_v,
    logsnr_schedule_cosine,
    make_schedule,
    x_from_v,
)
from support.checkpoint import build_net, load, load_checkpoint
from support.data import Shapes, image_order, load_batch
from support.runtime import in_bf16
from support.settings import make_config, parse
from support.text import with_text
from unet import PATCHING, count
from uvit import UViT

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are for the CPU
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(
    res=16,
    num_classes=3,
    base_channels=16,
    emb_channels=32,
    channel_multiplier=(1, 2),
    num_res_blocks=(1,),
    num_transformer_blocks=2,
)


@pytest.fixture(autouse=True)
def short_grids(monkeypatch):
    """Grids of trainings in two steps instead of 64: nobody looks at them."""
    monkeypatch.setattr(
        train,
        "sample_batches",
        lambda *args, **settings: sampling.sample_batches(*args, **settings | dict(steps=2)),
    )


def train_tiny(tmp_path, *args):
    train.main(
        [
            "--res",
            "32",
            "--steps",
            "2",
            "--batch",
            "4",
            "--sample-every",
            "1000",
            "--out",
            str(tmp_path / "run"),
            *args,
        ]
    )
    return tmp_path / "run"


# ---------------------------------------------------------------- sid2.py


def test_sid2_costs_what_was_published():
    for size, gmac in (("small", 137), ("flop-heavy", 653)):
        assert count(sid2.ResidualUViT, dict(sid2.ResidualUViT.RECIPES[size][256], res=256))[
            1
        ] / 1e9 == pytest.approx(gmac, rel=0.015)


def test_sid2_is_the_identity_at_first():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(
        **dict(TINY, channel_multiplier=(1, 2, 4), num_res_blocks=(1, 2), attn_resolutions=(8,))
    )
    h, z = torch.randn(2, 16, 16, 16), torch.randn(2, 3, 16, 16)
    emb = net.embedding(torch.tensor([-3.0, 4.0]), torch.tensor([0, 3]))
    assert torch.equal(net.level(0, h, emb), h)
    assert torch.equal(net(z, torch.zeros(2)), torch.zeros_like(z))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert net(z, torch.zeros(2)).std() > 0.01


def test_sid2_gradients_reach_all_weights():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(**TINY)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    net(torch.randn(4, 3, 16, 16), torch.randn(4), torch.arange(4)).square().mean().backward()
    assert all(
        parameter.grad.abs().max() > 0
        for name, parameter in net.named_parameters()
        if "norm_k.bias" not in name
    )


def test_sid2_keeps_no_more_memory_for_the_gradient_than_the_uvit():
    def kept(net_class):
        net, storages = net_class(**dict(TINY, transformer_dropout=0.0)), {}
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = (
                tensor.untyped_storage()
            )  # several tensors may be views of one
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.zeros(8, 3, 16, 16), torch.zeros(8))
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)

    assert 2**20 < kept(sid2.ResidualUViT) < kept(UViT)


def test_sid2_takes_texts():
    torch.manual_seed(0)
    net = with_text(sid2.ResidualUViT)(**dict(TINY, num_classes=0, text_tokens=5))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, texts = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])
    v = net(z, torch.zeros(2), texts)
    assert not torch.allclose(v[:1], net(z[:1], torch.zeros(1)), atol=1e-5) and torch.allclose(
        v[1:], net(z[1:], torch.zeros(1)), atol=1e-5
    )


def test_sigmoid_loss_in_eps_is_that_in_x():
    torch.manual_seed(0)
    x, eps, t, v_hat = (
        torch.randn(8, 3, 4, 4).double(),
        torch.randn(8, 3, 4, 4).double(),
        torch.linspace(0.05, 0.95, 8).double(),
        torch.randn(8, 3, 4, 4).double(),
    )

    def net(z, logsnr, label):
        return v_hat

    for bias in (0.0, -3.0):
        loss, logsnr = sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=bias, t=t, eps=eps)
        x_hat = x_from_v(diffuse(x, eps, logsnr), v_hat, logsnr)
        slope = torch.autograd.grad(
            logsnr_schedule_cosine(u := t.clone().requires_grad_()).sum(), u
        )[0]
        torch.testing.assert_close(
            loss,
            -slope
            * math.exp(bias)
            * torch.sigmoid(logsnr - bias)
            * (x - x_hat).square().mean((1, 2, 3)),
        )


def test_bias_of_the_sigmoid_loss_is_that_of_the_resolution():
    assert [sid2.loss_bias(res) for res in (64, 128, 256, 512, 1024)] == [0, 0, -1, -3, -4]
    net, x, t = lambda z, logsnr, label: 0.3 * z, torch.zeros(1, 1, 256, 512), torch.tensor([0.4])
    ours, other = (
        sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=bias, t=t, eps=x + 1)[0]
        for bias in (None, -1.0)
    )
    assert ours == other > 0


def test_sid2_guides_where_noise_looks_as_it_does_at_64_px():
    for (_, res), settings in sid2.ResidualUViT.TRAINING.items():
        low, high = settings["sampling"]["guidance_interval"]
        assert high - low == pytest.approx(8) and math.exp(low) * (res / 64) ** 2 == pytest.approx(
            math.exp(-3), rel=0.01
        )  # pooled: Eq. 4


def test_sigmoid_loss_does_not_depend_on_the_schedule():
    torch.manual_seed(0)
    n = 20_000
    t = (torch.arange(n).double() + 0.5) / n
    x, eps = torch.randn(2, n, 1, 1, 1).double()

    def net(z, logsnr, label):
        return 0.3 * z

    schedules = (
        lambda t: logsnr_schedule_cosine(t, -10.0, 10.0),
        lambda t: 10 - 20 * t,
        lambda t: 10 - 20 * t**2,
    )
    means = [
        sid2.sigmoid_loss(net, x.sign(), schedule, bias=-1.0, t=t, eps=eps.sign())[0].mean()
        for schedule in schedules
    ]
    assert max(means) / min(means) < 1.01
    plain = [
        diffusion_loss(net, x.sign(), schedule, t=t, eps=eps.sign())[0].mean()
        for schedule in schedules
    ]
    assert max(plain) / min(plain) > 1.1  # of the loss without weights, this is not so


def test_sid2_trains_and_samples_as_its_recipe_says(tmp_path, capsys):
    model_args = (
        '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
        '"num_res_blocks": [1], "num_transformer_blocks": 1}'
    )
    run = str(
        train_tiny(tmp_path, "--model", "related.sid2:ResidualUViT", "--model-args", model_args)
    )
    net, config, schedule = load(run)
    assert (config["loss"], config["schedule"], config["model_args"]["patching"]) == (
        "related.sid2:sigmoid_loss",
        "interpolated:32:32@10",
        "conv_2",
    )
    sampling.main([run, "--n", "2", "--steps", "4", "--guidance", "2", "--out", f"{run}/grid.png"])
    sampling.main(
        [
            run,
            "--n",
            "2",
            "--steps",
            "4",
            "--guidance",
            "2",
            "--guidance-interval",
            "-99",
            "99",
            "--out",
            f"{run}/grid.png",
        ]
    )
    assert (
        parse(["--space", "v"])["loss"] is None
    )  # the loss with that option, whatever the recipe has
    text = capsys.readouterr().out
    assert re.search(r"-1\.61\b.*[^-\d]6\.39\b", text) and re.search(r"-99\b.*[^-\d]99\b", text)
    for options, message in (
        (["--size", "base"], r"--size(?=.*\bbase\b).*tiny, small, flop-heavy"),
        (["--size", "flop-heavy", "--res", "128"], r"--res(?=.*\b128\b).*256, 512"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(
                ["--model", "related.sid2:ResidualUViT", "--out", str(tmp_path / "none"), *options]
            )


def test_every_sid2_recipe_builds_and_trains_as_said():
    for size, by_res in sid2.ResidualUViT.RECIPES.items():
        for res, fields in by_res.items():
            given = dict(model="related.sid2:ResidualUViT", size=size, res=res)
            config = make_config(given, torch.device("cpu"), Shapes(res))
            assert (
                config["loss"] == "related.sid2:sigmoid_loss"
                and make_schedule(config["schedule"], res)(torch.tensor(0.0)) > 9
            )
            with torch.device("meta"):
                net = build_net(config["model"], config["model_args"])
                assert net(torch.empty(2, 3, res, res), torch.empty(2)).shape == (2, 3, res, res)
                assert (
                    net.stem.conv.out_channels > 3 * PATCHING[fields.get("patching", "none")] ** 2
                )


# ---------------------------------------------------------------- distill.py


def test_two_steps_of_the_teacher_are_one_of_the_student():
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


def test_the_ideal_net_of_a_gaussian_is_one():
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


def test_consistent_students_stay_so():
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


SMALL = ["--model-args", '{"base_channels": 8, "num_transformer_blocks": 1}']


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small U-ViT of two steps, not to be changed."""
    return str(train_tiny(tmp_path_factory.mktemp("teacher"), *SMALL))


def fill(net):
    """Random weights, as some are 0 at first."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def test_a_student_begins_as_its_teacher_and_learns_the_scale(run):
    net, config, schedule = load(run)
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
def test_students_learn_what_they_are_to(consistency):
    torch.manual_seed(0)
    teacher = torch.nn.Module()
    teacher.forward = lambda z, logsnr, label: (
        gaussian(0.5)(z, logsnr, None) * label[1].reshape(-1, 1, 1, 1)
    )  # the scale matters as it does to guidance
    student = distill.Student(
        "uvit",
        10,
        max_guidance=2.0,
        **{key: value for key, value in TINY.items() if key != "num_classes"},
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


def test_students_are_made_of_nets_whose_conditioning_is_known():
    with pytest.raises(ValueError, match=r"(?=.*related\.sid2:ResidualUViT).*related\.dico:DiCo"):
        distill.Student("related.dico:DiCo", 10, res=32)


def test_distill_command(run, tmp_path, capsys, monkeypatch):
    options = ["--updates", "2", "--batch", "4", "--no-bf16", "--lr", "0.01"]
    distill.main(
        [run, "--steps", "2", "--teacher-steps", "8", "--out", f"{tmp_path}/run", *options]
    )
    distill.main(
        [
            run,
            "--steps",
            "4",
            "--teacher-steps",
            "8",
            "--out",
            f"{tmp_path}/consistent/",
            "--consistency",
            "--max-guidance",
            "2",
            "--seed",
            "1",
            "--device",
            "cpu",
            *options,
        ]
    )
    distill.main(
        [f"{tmp_path}/run-4steps/ckpt_0000002.pt", "--steps", "2", *options]
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
        sampling.main(
            [f"{tmp_path}/{name}", "--n", "2", "--guidance", "2", "--out", f"{tmp_path}/grid.png"]
        )
        printed = capsys.readouterr()
        assert re.search(rf"\bddim\b.*\b{steps}\b.*\bguidance\W+2\b", printed.out)
        assert "--steps" not in printed.err and "--sampler" not in printed.err
        with open(f"{tmp_path}/{name}/config.json") as file:
            assert json.load(file) == load(f"{tmp_path}/{name}")[1]
    sampling.main(
        [f"{tmp_path}/run-4steps", "--n", "2", "--steps", "3", "--out", f"{tmp_path}/grid.png"]
    )
    printed = capsys.readouterr()
    assert "--steps 4" in printed.err and "--sampler ddim" in printed.err
    for args, text in (
        (
            [
                run,
                "--steps",
                "4",
                "--teacher-steps",
                "8",
                "--out",
                f"{tmp_path}/run",
                "--seed",
                "1",
            ],
            re.escape(f"{tmp_path}/run-4steps"),
        ),
        (
            [f"{tmp_path}/run-4steps", "--steps", "8", "--teacher-steps", "16"],
            r"(?=.*--teacher-steps 16\b).*run-4steps\b.*\b4\b",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            distill.main([*args, *options])
    weights = load(f"{tmp_path}/run-2steps")[0].state_dict()
    shutil.rmtree(tmp_path / "run-2steps")  # as if the command had been interrupted there
    written = os.stat(tmp_path / "run-4steps" / "ckpt_0000002.pt").st_mtime_ns
    capsys.readouterr()
    distill.main(
        [run, "--steps", "2", "--teacher-steps", "8", "--out", f"{tmp_path}/run", *options]
    )
    text = capsys.readouterr().out
    assert text.count(f"{tmp_path}/run-4steps") == text.count(f"{tmp_path}/run-2steps") == 1
    assert os.stat(tmp_path / "run-4steps" / "ckpt_0000002.pt").st_mtime_ns == written
    assert re.search(r"\b2/2\b.*\bloss\b", text) and text.count("loss") == 1  # of the 2 steps alone
    assert all(
        torch.equal(weights[key], value)
        for key, value in load(f"{tmp_path}/run-2steps")[0].state_dict().items()
    )
    monkeypatch.chdir(tmp_path / "consistent-4steps")
    distill.main(["ckpt_0000002.pt", "--steps", "2", *options])
    assert os.path.isdir(tmp_path / "consistent-4steps-2steps")


def test_a_student_that_is_lost_is_not_written(run, tmp_path):
    with pytest.raises(ValueError, match=r"(?=.*\b3\b)(?=.*\b4\b).*--lr\b.*\b1e\+38\b"):
        distill.main(
            [
                run,
                "--steps",
                "2",
                "--teacher-steps",
                "8",
                "--updates",
                "3",
                "--batch",
                "2",
                "--lr",
                "1e38",
                "--out",
                str(tmp_path / "run"),
            ]
        )
    assert not os.listdir(tmp_path)


def test_a_teacher_that_does_not_say_how_it_is_sampled(run, tmp_path):
    state = load_checkpoint(run)
    for key in ("sampling", "captions", "text_encoder", "text_tokens"):
        del state["config"][key]  # as of runs before there were such settings
    torch.save(state, tmp_path / "old.pt")
    distill.main(
        [
            str(tmp_path / "old.pt"),
            "--steps",
            "1",
            "--teacher-steps",
            "2",
            "--updates",
            "1",
            "--batch",
            "2",
            "--out",
            str(tmp_path / "new"),
        ]
    )
    assert load(str(tmp_path / "new-1steps"))[1]["sampling"] == dict(sampler="ddim", steps=1)


def test_distill_on_two_ranks_is_as_on_one(run, tmp_path):
    options = [
        run,
        "--steps",
        "4",
        "--teacher-steps",
        "8",
        "--updates",
        "20",
        "--batch",
        "4",
        "--no-bf16",
        "--lr",
        "0.001",
        "--out",
    ]
    distill.main([*options, str(tmp_path / "one")])
    distill.main([*options, str(tmp_path / "other"), "--seed", "1"])
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "related.distill",
            *options,
            str(tmp_path / "two"),
        ],
        cwd=HERE,
        check=True,
        capture_output=True,
        timeout=300,
    )
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
    train_tiny(
        tmp_path,
        "--data",
        str(tmp_path / "plain.npz"),
        "--model",
        "unet",
        "--model-args",
        '{"base_channels": 8}',
        "--out",
        str(tmp_path / "plain"),
    )
    os.remove(tmp_path / "plain.npz")
    options = ["--steps", "1", "--teacher-steps", "2", "--updates", "1", "--batch", "4"]
    with pytest.raises(OSError, match=r"plain\.npz"):
        distill.main([f"{tmp_path}/plain", *options])
    distill.main([f"{tmp_path}/plain", "--data", str(tmp_path / "moved.npz"), *options])
    assert load(f"{tmp_path}/plain-1steps")[0].max_guidance == 1
    sid = str(train_tiny(tmp_path, "--model", "related.sid2:ResidualUViT", *SMALL))
    with pytest.raises(ValueError, match=re.escape(sid)):
        distill.main([sid, "--data", str(tmp_path / "moved.npz"), *options])
    seen = []

    def scales(net, scale, null_label):
        seen.append(scale)
        return guided(net, scale, null_label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "guided", scales)
        distill.main([sid, *options])
    assert (
        seen[0].flatten().tolist() == [1, 1, 1, 1]
        and "guidance_interval" not in load(f"{sid}-1steps")[1]["sampling"]
    )  # logsnr is -10 there: not in its interval
    assert (
        all(1 < scale < 3 for scale in seen[1].flatten()) and len(seen[1].unique()) == 4
    )  # and 0 in the middle, where each image has its own
    train_tiny(tmp_path, "--label-drop", "0", *SMALL, "--out", str(tmp_path / "labels"))
    distill.main([f"{tmp_path}/labels", *options])
    assert load(f"{tmp_path}/labels-1steps")[0].max_guidance == 1  # it has never met the null label


@pytest.mark.parametrize(
    "args, text",
    [
        (["--steps", "3"], r"(?=.*--teacher-steps 64\b)(?=.*2, 4, 8).*--steps 3\b"),
        (["--steps", "64"], r"(?=.*--teacher-steps 64\b)(?=.*2, 4, 8).*--steps 64\b"),
        (
            ["--steps", "8", "--teacher-steps", "8", "--consistency"],
            r"(?=.*--teacher-steps 8\b)(?=.*2, 3, 4).*--steps 8\b",
        ),
        (["--batch", "0"], "--batch"),
        (["--lr", "0"], "--lr"),
        (["--max-guidance", "0.5"], "--max-guidance"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_distill_says_what_cannot_be(run, args, text):
    with pytest.raises(ValueError, match=text):
        distill.main([run, *args])


# ---------------------------------------------------------------- dico.py


def randomized(net):
    torch.manual_seed(1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


TINY_DICO = dict(res=8, num_classes=3, width=16, depth=(2, 1, 1, 1, 2))


def numbers(capsys):
    """All numbers of each printed line that has a colon or a comma, without thousands' commas."""
    return [
        [
            float(number.replace(",", ""))
            for number in re.findall(
                r"(?<![\w/-])\d[\d,]*(?:\.\d+)?(?=[ ,)]|$)", line.replace(", ", " , ")
            )
        ]
        for line in capsys.readouterr().out.splitlines()
    ]


def test_dico_costs_what_was_published(capsys):
    dico.main([])
    parameters, gmac = (
        [33_137_672, 129_992_712, 463_897_992, 701_151_368, 1_037_408_328],
        [4.236, 16.856, 60.169, 87.221, 194.029],
    )
    for line, n, macs in zip(numbers(capsys), parameters, gmac, strict=True):
        assert line[0] == n and line[2] == pytest.approx(macs, rel=1e-3)


def test_dico_is_the_identity_at_first():
    net, z = dico.DiCo(**TINY_DICO), torch.randn(2, 3, 8, 12)
    h, condition = torch.randn(2, 16, 8, 8), torch.randn(2, 16)
    assert torch.equal(net.down1[0](h, condition), h) and torch.equal(
        net(z, torch.zeros(2)), torch.zeros_like(z)
    )
    with pytest.raises(ValueError, match=r"(?=.*\b4\b).*\b10\b"):
        dico.DiCo(10)


def norm_by_hand(x, shift, scale):
    """LayerNorm over the last dimension, without weights, and its modulation."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def test_blocks_of_dico_and_lit_by_hand():
    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def dense(conv, h):  # of (B, H, W, C)
        return h @ conv.weight[:, :, 0, 0].T + conv.bias

    block = randomized(dico.Block(6, 2)).double()
    x, c = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6).double()
    vectors = (F.silu(c) @ block.modulation.weight.T + block.modulation.bias)[:, None, None].chunk(
        6, 3
    )
    h = dense(block.conv1, norm_by_hand(x.movedim(1, 3), vectors[0], vectors[1]))
    padded = F.pad(h, (0, 0, 1, 1, 1, 1))
    h = gelu(
        sum(
            padded[:, i : i + 4, j : j + 5] * block.depthwise.weight[:, 0, i, j]
            for i in range(3)
            for j in range(3)
        )
        + block.depthwise.bias
    )
    h = dense(block.conv3, h * torch.sigmoid(dense(block.attention, h.mean((1, 2), keepdim=True))))
    y = x.movedim(1, 3) + vectors[2] * h
    y = y + vectors[5] * dense(
        block.mlp2, gelu(dense(block.mlp1, norm_by_hand(y, vectors[3], vectors[4])))
    )
    torch.testing.assert_close(block(x, c), y.movedim(3, 1))

    block = randomized(lit.DiTBlock(8, 2, 3)).double()
    x, emb, grid = torch.randn(2, 12, 8).double(), torch.randn(2, 8).double(), (3, 4)
    vectors = block.modulation(emb)[:, None].chunk(6, 2)
    y = x + vectors[2] * block.attention(norm_by_hand(x, vectors[0], vectors[1]), grid)
    h = block.mlp[0](norm_by_hand(y, vectors[3], vectors[4]))
    h = (
        0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    )  # DiT's GELU is the approximate one
    torch.testing.assert_close(block(x, emb, grid), y + vectors[5] * block.mlp[2](h))


def test_dico_joins_what_goes_up_with_what_went_down():
    net, seen = randomized(dico.DiCo(**TINY_DICO)), []
    for module in (net.down1[-1], net.down2[-1], net.grow2, net.grow1):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    for module in (net.join2, net.join1):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1]))
    h1, h2, up2, join2, up1, join1 = seen
    assert torch.equal(join2, torch.cat([F.pixel_shuffle(up2, 2), h2], 1)) and torch.equal(
        join1, torch.cat([F.pixel_shuffle(up1, 2), h1], 1)
    )


def test_dico_takes_any_size_and_labels_reach_all_of_it():
    net = randomized(dico.DiCo(**TINY_DICO))
    for height, width in ((4, 8), (12, 4)):
        assert net(torch.randn(2, 3, height, width), torch.zeros(2)).shape == (2, 3, height, width)
    z, logsnr = torch.randn(2, 3, 8, 8), torch.tensor([-4.0, 5.0])
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))
    net(z, logsnr, torch.tensor([0, 2])).square().mean().backward()
    for condition in net.conditions:
        assert (condition.label.weight.grad.abs().amax(1) > 0).tolist() == [
            True,
            False,
            True,
            False,
        ]
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )


def test_channel_attention_multiplies_and_nothing_else():
    net, without = (
        randomized(dico.DiCo(**TINY_DICO)),
        dico.DiCo(**TINY_DICO, channel_attention=False),
    )
    without.load_state_dict(
        {name: value for name, value in net.state_dict().items() if ".attention." not in name}
    )
    block, plain, x, condition = (
        net.down1[0],
        without.down1[0],
        torch.randn(2, 16, 8, 8),
        torch.randn(2, 16),
    )
    gates = []
    block.conv3.register_forward_pre_hook(lambda module, args: gates.append(args[0]))
    plain.conv3.register_forward_pre_hook(lambda module, args: gates.append(args[0]))
    block(x, condition), plain(x, condition)
    mean = torch.stack([gates[1][:, :, i, j] for i in range(8) for j in range(8)]).mean(0)
    expected = torch.sigmoid(mean @ block.attention.weight[:, :, 0, 0].T + block.attention.bias)
    torch.testing.assert_close(gates[0], gates[1] * expected[:, :, None, None])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, dico.Block):
                module.attention.weight.zero_()
                module.attention.bias.fill_(50.0)  # sigmoid = 1
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(z, torch.zeros(2)), without(z, torch.zeros(2)))


def learns(net, x, loss=diffusion_loss, steps=300, lr=3e-3):
    """The first and the last loss of so many steps on the same images, with the same noise."""
    torch.manual_seed(0)
    t, eps, label = torch.rand(len(x)), torch.randn_like(x), torch.arange(len(x)) % 10
    optimizer, losses = torch.optim.Adam(net.parameters(), lr), []
    for _ in range(steps):
        losses.append(loss(net, x, logsnr_schedule_cosine, label, t=t, eps=eps)[0].mean())
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0].item(), losses[-1].item()


@pytest.mark.slow
def test_dico_learns_64_images_by_heart():
    x = load_batch(Shapes(8), range(64))[0] / 127.5 - 1
    first, last = learns(
        dico.DiCo(8, num_classes=10, width=16, depth=(1, 1, 1, 1, 1)),
        x,
        loss=functools.partial(diffusion_loss, space="v"),
    )
    assert last < first / 10


def test_channels_that_do_something_are_counted(tmp_path, capsys):
    net, z = dico.DiCo(**TINY_DICO), torch.randn(2, 3, 8, 8)
    for module in net.modules():
        if hasattr(module, "conv3"):
            torch.nn.init.zeros_(module.conv3.weight)
            with torch.no_grad():
                module.conv3.bias.copy_(
                    torch.tensor([1.0, 0.06, 0.04, -1.0]).repeat(len(module.conv3.bias) // 4)
                )
    assert dico.active_channels(net, z, torch.zeros(2)) == 0.5
    dico.print_times(seconds=0.01)
    assert "64x64" in capsys.readouterr().out
    run = train_tiny(
        tmp_path,
        "--model",
        "related.dico:DiCo",
        "--model-args",
        '{"width": 4, "depth": [1, 1, 1, 1, 1]}',
    )
    dico.main([str(run)])
    assert re.search(rf"{re.escape(str(run))}\b.*\b\d+\.\d %", capsys.readouterr().out)
    with pytest.raises(ValueError, match="DiCo"):
        dico.active_channels(torch.nn.Identity(), z, torch.zeros(2))


# ---------------------------------------------------------------- dimr.py


TINY_DIMR = dict(
    res=16,
    num_classes=3,
    branches=[
        dict(channels=16, hidden=32, num_blocks=3, num_heads=2),
        dict(channels=8, hidden=16, num_blocks=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ],
)


def test_dimr_costs_what_was_published(capsys):
    dimr.main([])
    for line, n, gmac in zip(
        numbers(capsys), (505_046_408, 1_056_352_904), (160, 331), strict=True
    ):
        assert line[0] == n and line[2] == pytest.approx(gmac, rel=2e-3)
    plain = count(dimr.DiMR, dict(dimr.CONFIGS["XL/2R"][0], time="none"))[0]
    assert 505_046_408 - plain == 3 * (2 * 39 * 960 + 21 * 480) + 3 * 2 * (
        960 + 480 + 40 * 960 + 480
    )  # of RMSNorms, then of LayerNorms


def test_time_moves_a_parameter_between_two_values():
    parameter = randomized(dimr.TimeParameter(5, 1.0))
    with torch.no_grad():
        parameter.w.abs_()
    tau = torch.tensor([-1e4, 0.3, 1e4])
    s = torch.sigmoid(parameter.w * 0.3 + parameter.b)
    torch.testing.assert_close(
        parameter(tau),
        torch.stack([parameter.p1, s * parameter.p0 + (1 - s) * parameter.p1, parameter.p0]),
    )
    fresh = dimr.TimeParameter(5, 0.5)
    assert torch.equal(fresh(tau), torch.full((3, 5), 0.5))


def test_dimr_does_not_see_time_while_both_values_are_equal():
    net, z = randomized(dimr.DiMR(**TINY_DIMR)).eval(), torch.randn(2, 3, 16, 16)
    assert not torch.allclose(
        net(z, torch.tensor([-8.0, 8.0])), net(z, torch.tensor([3.0, 1.0])), atol=1e-5
    )
    for module in net.modules():
        if isinstance(module, dimr.TimeParameter):
            module.p1.data.copy_(module.p0)
    torch.testing.assert_close(net(z, torch.tensor([-8.0, 8.0])), net(z, torch.tensor([3.0, 1.0])))


def test_blocks_of_dimr_by_hand():
    tau = torch.tensor([0.3, -1.0]).double()
    norm = randomized(dimr.Norm(6, "td", rms=True)).double()
    x = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(
        norm(x, tau),
        norm.gain(tau)[:, None] * x / x.square().mean(2, keepdim=True).sqrt(),
        rtol=1e-6,
        atol=1e-6,
    )
    norm = randomized(dimr.Norm(6, "td")).double()
    centered = x - x.mean(2, keepdim=True)
    torch.testing.assert_close(
        norm(x, tau),
        norm.gain(tau)[:, None] * centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
        + norm.bias(tau)[:, None],
    )
    mlp = randomized(dimr.GatedMLP(6, 12, "td")).double()
    h = mlp.norm(x, tau)
    torch.testing.assert_close(mlp(x, tau), mlp.w2(F.gelu(mlp.w0(h)) * mlp.w1(h)))
    block = randomized(dimr.Block(6, 12, "td")).double()
    x = torch.randn(2, 4, 5, 6).double()
    y = x + block.conv(x.movedim(3, 1)).movedim(1, 3)  # the 7x7 sees x itself, without a norm
    torch.testing.assert_close(block(x, tau), y + block.mlp(y, tau))

    branch = randomized(
        dimr.Branch((4, 4), 1, 3, 3, "td", 7, channels=6, hidden=8, num_blocks=4)
    ).double()  # two blocks, one in the middle, two
    z, below = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 2, 7).double()
    up = F.pixel_shuffle(
        branch.expand(branch.norm_below(below, tau))
        .unflatten(3, (4, 6))
        .transpose(3, 4)
        .flatten(3)
        .movedim(3, 1),
        2,
    ).movedim(1, 3)
    x0 = branch.patchify(z).movedim(1, 3) + branch.position + branch.norm_expanded(up, tau)
    x1 = branch.first[0](x0, tau)
    x2 = branch.first[1](x1, tau)
    x3 = branch.middle(x2, tau)
    x4 = branch.second[0](branch.merge[0](torch.cat([x3, x2], 3)), tau)
    x5 = branch.second[1](branch.merge[1](torch.cat([x4, x1], 3)), tau)
    output, features = branch(z, tau, None, below)
    torch.testing.assert_close(features, torch.cat([x0, x1, x2, x3, x4, x5], 3))
    torch.testing.assert_close(output, branch.head(branch.norm(x5, tau).movedim(3, 1)))


def test_other_ways_of_time_in_dimr():
    z, levels = torch.randn(2, 3, 16, 16), torch.tensor([[-8.0, 8.0], [3.0, 1.0]])
    for time, moves in (("ada", True), ("none", False)):
        net = dimr.DiMR(**TINY_DIMR, time=time).eval()
        assert torch.equal(net(z, levels[0]), net(z, levels[1]))  # at first
        randomized(net)
        assert torch.equal(net(z, levels[0]), net(z, levels[1])) != moves
    net = dimr.DiMR(**TINY_DIMR).bfloat16()  # as --fsdp holds it
    assert net(z.bfloat16(), levels[0]).dtype == torch.bfloat16
    for fields, message in (
        ({"branches": []}, r"(?=.*--size\b)(?=.*--model-args\b).*\bbranches\b"),
        (
            {"branches": [dict(channels=6, hidden=8, num_blocks=1, num_heads=4)]},
            r"(?=.*\b6\b).*\b4\b",
        ),
        (dict(TINY_DIMR, res=24), "24x24"),
    ):
        with pytest.raises(ValueError, match=message):
            dimr.DiMR(**dict(res=16) | fields)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_dimr_of_any_number_of_branches(branches):
    config = dict(TINY_DIMR, res=(16, 32), branches=TINY_DIMR["branches"][-branches:])
    config["branches"][0] = TINY_DIMR["branches"][
        0
    ]  # the transformer, whose label token must be gone before its features are a grid
    net, z = randomized(dimr.DiMR(**config)), torch.randn(2, 3, 16, 32)
    packed = net(
        z, torch.tensor([-2.0, 3.0]), torch.tensor([0, 2])
    )  # at logsnr 0 the slopes have no gradient
    shapes = [(2, 3, 16 >> k, 32 >> k) for k in range(branches)]
    assert [tuple(v.shape) for v in dimr.unpack(packed, 16, 32)] == shapes and net.eval()(
        z, torch.zeros(2)
    ).shape == z.shape
    packed.square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )


def test_pooled_noise_is_white_and_its_v_is_that_of_more_signal():
    torch.manual_seed(0)
    x, eps, t, seen = (
        torch.rand(4, 3, 64, 64) * 2 - 1,
        torch.randn(4, 3, 64, 64),
        torch.tensor([0.1, 0.4, 0.6, 0.9]),
        [],
    )

    def net(z, logsnr, label=None):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        # v of the pooled image, from its pooled z and eps alone, by the definitions of the process
        for s in (1, 2, 4):
            eps_s, x_s = (F.avg_pool2d(each, s) for each in (eps, x))
            # avgpool(z) / norm = (alpha / norm) x_s + (sigma / s / norm) (s eps_s),
            # s eps_s being white
            norm = (alpha**2 + sigma**2 / s**2).sqrt()
            seen.append(alpha / norm * s * eps_s - sigma / s / norm * x_s)
        return torch.cat([v.reshape(4, 3, -1, 64) for v in seen], 2) + 0.1

    loss, logsnr = dimr.multi_resolution_loss(net, x, logsnr_schedule_cosine, t=t, eps=eps)
    torch.testing.assert_close(
        loss, torch.full((4,), 0.01 * (1 + 1 / 4 + 1 / 16)), rtol=1e-3, atol=1e-5
    )
    assert torch.equal(logsnr, logsnr_schedule_cosine(t))
    seen.clear()
    exact, _ = dimr.multi_resolution_loss(
        lambda *args: net(*args)[:, :, :64] - 0.1, x, logsnr_schedule_cosine, t=t, eps=eps
    )
    assert exact.max() < 1e-8  # in eval mode only the finest counts


def test_dimr_slopes_are_not_decayed():
    net = dimr.DiMR(**TINY_DIMR)
    decayed, free = dimr.parameter_groups(net, 0.03)
    names = {id(p): name for name, p in net.named_parameters()}
    assert (
        decayed["weight_decay"] == 0.03
        and free["weight_decay"] == 0
        and len(decayed["params"]) + len(free["params"]) == len(names)
    )
    assert {names[id(p)].rsplit(".", 1)[1] for p in free["params"]} == {"w", "b"} and not any(
        names[id(p)].endswith((".w", ".b")) for p in decayed["params"]
    )


def test_dimr_trains_and_samples_by_the_commands(tmp_path):
    branches = [
        dict(channels=16, hidden=16, num_blocks=1, num_heads=2),
        dict(channels=8, hidden=8, num_blocks=1),
    ]
    run = train_tiny(
        tmp_path,
        "--model",
        "related.dimr:DiMR",
        "--model-args",
        json.dumps(dict(branches=branches)),
    )
    sampling.main(
        [
            str(run),
            "--model",
            "related.dimr:DiMR",
            "--n",
            "2",
            "--steps",
            "2",
            "--guidance",
            "2",
            "--out",
            str(tmp_path / "grid.png"),
        ]
    )
    assert load(run)[1]["loss"] == "related.dimr:multi_resolution_loss"


def test_spectrum_of_waves_and_of_noise(tmp_path, capsys):
    torch.manual_seed(0)
    columns = torch.arange(32).double() * 2 * math.pi / 32
    for k in (3, 16):
        power = dimr.spectrum((k * columns).cos().expand(1, 3, 32, 32))
        ring = (
            torch.hypot(*torch.meshgrid(*2 * [torch.fft.fftfreq(32) * 32], indexing="ij")).round()
            == k
        )
        expected = torch.zeros(24).double()
        expected[k] = (
            (0.5 if k < 16 else 1.0) * 32**2 / ring.sum().item()
        )  # by Parseval, over all waves of that length
        torch.testing.assert_close(power, expected, rtol=0, atol=1e-9)
    noise = torch.randn(400, 3, 32, 32)
    torch.testing.assert_close(dimr.spectrum(noise), torch.ones(24), rtol=0, atol=0.1)
    assert dimr.spectrum_error(noise, noise) == 0 and dimr.spectrum_error(
        2 * noise, noise
    ) == pytest.approx(3)
    x, label = dimr.striped_shapes(40, 16)
    plain = load_batch(Shapes(16), range(40))[0].int()
    for i in (0, 10):
        inside = (plain[i] >= 20) & (plain[i] <= 235)
        sign = torch.tensor([-20, 20]).expand(3, 16, 8, 2).flatten(2)
        assert (
            torch.equal((x[i].int() - plain[i])[inside], (sign if i == 0 else sign.mT)[inside])
            and inside.any()
        )
    for name, pictures in (("a", x), ("b", x), ("wide", x[:, :, :8])):
        np.savez(tmp_path / name, x=pictures.permute(0, 2, 3, 1).numpy())
    dimr.main([f"{tmp_path}/a.npz", f"{tmp_path}/b.npz"])
    assert re.search(r"\bb\.npz\b.*\b0\.0 %", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"(?=.*\ba\.npz\b).*\bwide\.npz\b.*\b8\b.{1,3}\b16\b"):
        dimr.main([f"{tmp_path}/a.npz", f"{tmp_path}/wide.npz"])
    with pytest.raises(SystemExit, match=r"^dimr: .+\Z"):  # one line
        dimr.main([f"{tmp_path}/a.npz"])
    dimr.main(["--stripes", f"{tmp_path}/stripes.npz"])
    with np.load(f"{tmp_path}/stripes.npz") as stripes:
        assert (
            stripes["x"].shape == (20_000, 32, 32, 3)
            and np.array_equal(stripes["x"][:40], dimr.striped_shapes(40)[0].permute(0, 2, 3, 1))
            and stripes["classes"][3] == "heart"
        )


# ---------------------------------------------------------------- lit.py


def test_lit_costs_what_was_published(capsys):
    expected = {
        "DiT-S": (32.865, 6.06, 31.4, 241.7),
        "LiT-S": (32.925, 5.93, 23.7, 94.8),
        "DiT-B": (130.316, 23.0, 106.4, 657.3),
        "LiT-B": (130.396, 23.1, 92.1, 368.4),
        "DiT-L": (457.841, 80.7, 361.0, 2061.9),
        "LiT-L": (458.000, 80.9, 323.0, 1291.4),
        "DiT-XL": (674.835, 118.6, 524.5, 2909.2),
        "LiT-XL": (675.044, 119.4, 476.7, 1906.3),
    }
    lit.main([])
    printed = dict(zip(lit.CONFIGS, numbers(capsys), strict=True))
    for name, (parameters, *gmac) in expected.items():
        n, *tokens_and_macs = printed[name]
        assert n / 1e6 == pytest.approx(parameters, abs=6e-4) and tokens_and_macs[
            -3:
        ] == pytest.approx(gmac, rel=2.5e-3)
    for size, (channels, depth, _, heads) in lit.SIZES.items():
        assert (
            printed[f"LiT-{size}"][0] - printed[f"DiT-{size}"][0] == depth * 26 * channels // heads
        )


def test_linear_attention_is_its_explicit_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 50, 8).double()
    scores = (q.relu() + 1e-6) @ (k.relu() + 1e-6).mT
    explicit = scores @ v / scores.sum(3, keepdim=True)
    torch.testing.assert_close(lit.linear_attention(q, k, v), explicit, rtol=0, atol=1e-12)
    ones = lit.linear_attention(
        -q.abs(), k, torch.ones_like(v)
    )  # the sum of each row of weights, also where no query is above 0
    assert (ones - 1).abs().max() < 1e-4
    half = torch.full((1, 1, 4096, 4), 30.0, dtype=torch.float16)
    assert lit.linear_attention(half, half, half).isfinite().all()


def test_linear_attention_sees_places_by_the_convolution_alone():
    torch.manual_seed(0)
    layer, x, shuffled = (
        lit.LinearAttention(24, 2).double(),
        torch.randn(2, 15, 24).double(),
        torch.randperm(15),
    )
    assert layer.dwc.weight.shape == (12, 1, 5, 5)
    assert not torch.allclose(layer(x[:, shuffled], (3, 5)), layer(x, (3, 5))[:, shuffled])
    near = layer.proj(
        layer.kv(x)[:, :, 24:]
    )  # with a kernel of one in its middle, the values themselves
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.bias.zero_()
    without = layer(x, (3, 5))
    torch.testing.assert_close(layer(x[:, shuffled], (3, 5)), without[:, shuffled])
    with torch.no_grad():
        layer.dwc.weight[:, :, 2, 2] = 1
    torch.testing.assert_close(layer(x, (3, 5)), without + near - layer.proj.bias)
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.weight[:, :, 2, 3] = (
            1  # the value of the token to the right, on a grid of 3 rows and 5 columns
        )
    right = F.pad(layer.kv(x)[:, :, 24:].unflatten(1, (3, 5))[:, :, 1:], (0, 0, 0, 1)).flatten(1, 2)
    torch.testing.assert_close(layer(x, (3, 5)), without + layer.proj(right) - layer.proj.bias)


def test_linear_attention_keeps_little_in_memory():
    def kept(kernel, n):
        """The bytes that a layer keeps for its gradient."""
        layer, sizes = lit.LinearAttention(32, 1, kernel), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage()._cdata: x.untyped_storage().nbytes()}) or x,
            lambda x: x,
        ):
            layer(torch.randn(1, n * n, 32), (n, n))
        return sum(sizes.values())

    assert kept(5, 64) / kept(5, 32) <= 5 and kept(0, 64) / kept(0, 32) >= 12


def test_lit_is_the_identity_at_first_and_gradients_reach_all_of_it():
    torch.manual_seed(0)
    net, z, logsnr = (
        lit.LiT((8, 12), num_classes=3, channels=16, depth=2),
        torch.randn(2, 3, 8, 12),
        torch.tensor([-4.0, 5.0]),
    )
    h, emb = torch.randn(2, 24, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[0](h, emb, (4, 6)), h) and torch.equal(
        net(z, logsnr), torch.zeros_like(z)
    )
    v = randomized(net)(z, logsnr, torch.tensor([0, 2]))
    assert torch.equal(net(z, logsnr), net(z, logsnr, torch.tensor([3, 3])))
    assert v.shape == z.shape and len({tuple(row.tolist()) for row in net.position}) == 24
    v.square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in net.parameters()
    )
    with pytest.raises(ValueError, match=r"\b9x9\b"):
        lit.LiT(9)


def test_conversion_keeps_all_but_attention_bit_for_bit():
    config = dict(
        TINY,
        channel_multiplier=(1, 1, 2),
        num_res_blocks=(1, 1),
        res=(16, 32),
        attn_resolutions=(8,),
    )
    net = randomized(UViT(**config))
    new, own = lit.convert(net, config), net.state_dict()
    products = (".q.", ".kv.", ".proj.", ".dwc.")
    for name, value in new.state_dict().items():
        assert (
            torch.equal(value, own[name])
            if name in own
            else ".attention.attention." in name and any(part in name for part in products)
        ), name
    assert {name for name in own if name not in new.state_dict()} == {
        name
        for name in own
        if any(part in name for part in (".qkv.", ".norm_q.", ".norm_k.", ".attention.out."))
    }
    z = torch.randn(2, 3, 16, 32)
    assert randomized(new)(z, torch.zeros(2), torch.tensor([0, 1])).shape == z.shape
    new = lit.convert(net, config, inherit="all")
    block, old = new.transformer[0].attention.attention, net.transformer[0].attention
    assert torch.equal(
        torch.cat([block.q.weight, block.kv.weight]), old.qkv.weight
    ) and torch.equal(torch.cat([block.q.bias, block.kv.bias]), old.qkv.bias)
    assert torch.equal(block.proj.weight, old.out.weight) and torch.equal(
        block.proj.bias, old.out.bias
    )
    assert not torch.equal(
        lit.convert(net, config, inherit="none").stem.conv.weight, net.stem.conv.weight
    )
    with pytest.raises(ValueError, match=r"\binherit\b.*\bsome\b"):
        lit.convert(net, config, inherit="some")


def test_hybrid_loss_pulls_at_the_student_from_both_sides():
    torch.manual_seed(0)
    x, eps, t, v_student, v_teacher = (
        *torch.randn(2, 4, 3, 8, 8),
        torch.rand(4),
        *torch.randn(2, 4, 3, 8, 8),
    )
    student, teacher = (lambda *args: v_student), (lambda *args: v_teacher)
    plain, logsnr = diffusion_loss(student, x, logsnr_schedule_cosine, space="v", t=t, eps=eps)
    for weight in (0.0, 0.5):
        loss, at = lit.hybrid_loss(
            student, teacher, x, logsnr_schedule_cosine, weight=weight, t=t, eps=eps
        )
        torch.testing.assert_close(
            loss, plain + weight * (v_teacher - v_student).square().mean((1, 2, 3))
        )
        assert torch.equal(at, logsnr)


def test_lit_by_its_commands(tmp_path, capsys):
    model_args = (
        '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
        '"num_res_blocks": [1], "num_transformer_blocks": 1}'
    )
    run, out = str(train_tiny(tmp_path, "--model-args", model_args)), str(tmp_path / "lit")
    lit.main([run, "--steps", "3", "--batch", "4", "--out", out])
    sampling.main(
        [out, "--n", "2", "--steps", "2", "--guidance", "2", "--out", str(tmp_path / "grid.png")]
    )
    assert "step 3/3" in capsys.readouterr().out and load(out)[1]["model_args"]["linear_heads"] == 2
    for options, message in (
        ([run, "--out", out], re.escape(out)),
        ([run, "--out", "x", "--steps", "0"], r"--steps(?=.*\b1\b).*\b0\b"),
        ([out, "--out", "x"], r"(?=.*\buvit\b).*\brelated\.lit:LinearUViT\b"),
        ([run, "--out", f"{tmp_path}/3", "--heads", "3"], r"(?=.*\b16\b).*\b3\b"),
    ):
        with pytest.raises(ValueError, match=message):
            lit.main(options)
    teacher, weights = load(run)[0].state_dict(), []
    for i, options in enumerate(
        (
            [],
            ["--inherit", "all", "--weight", "0"],
            ["--inherit", "none", "--heads", "4", "--seed", "1"],
        )
    ):
        lit.main(
            [
                run,
                "--steps",
                "1",
                "--batch",
                "4",
                "--lr",
                "1e-12",
                "--out",
                f"{tmp_path}/{i}",
                *options,
            ]
        )
        weights.append(load(f"{tmp_path}/{i}")[0].state_dict())
    of_attention = [name for name in weights[0] if ".attention.attention." in name]
    for name in teacher.keys() & weights[0].keys():
        torch.testing.assert_close(weights[0][name], teacher[name], rtol=0, atol=1e-9)
    assert of_attention and not any(
        torch.equal(weights[0][name], weights[1][name])
        for name in of_attention
        if "q.weight" in name
    )
    assert (
        not torch.equal(weights[2]["stem.conv.weight"], teacher["stem.conv.weight"])
        and load(f"{tmp_path}/2")[1]["model_args"]["linear_heads"] == 4
    )
    train.main(["--out", out, "--steps", "4"])  # goes on, without the teacher
    train_tiny(
        tmp_path / "scratch", "--model", "related.lit:LinearUViT", "--model-args", model_args
    )
    capsys.readouterr()
    lit.print_times(seconds=0.01)
    assert "softmax" in capsys.readouterr().out


# ---------------------------------------------------------------- tstitch.py


class Counted:
    """A net that is a number times z, and counts its calls."""

    num_classes = 3

    def __init__(self, factor):
        self.factor, self.levels = factor, []

    def __call__(self, z, logsnr, label=None):
        self.levels.append(logsnr[0].item())
        return self.factor * z


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_stitched_nets_alone_draw_what_they_draw(sampler):
    small, large = Counted(0.3), Counted(-0.2)
    settings = dict(steps=200, sampler=sampler, label=torch.tensor([0, 2]), guidance=2.0)
    for fractions, only in (((0.0, 1.0), large), ((1.0, 0.0), small)):
        stitched = tstitch.stitch([small, large], fractions, logsnr_schedule_cosine)
        assert torch.equal(
            sample(stitched, (2, 3, 4, 4), logsnr_schedule_cosine, **settings),
            sample(only, (2, 3, 4, 4), logsnr_schedule_cosine, **settings),
        )
    both = tstitch.stitch([small, large], (0.5, 0.5), logsnr_schedule_cosine)
    x = sample(both, (2, 3, 4, 4), logsnr_schedule_cosine, **settings)
    assert not any(
        torch.equal(x, sample(net, (2, 3, 4, 4), logsnr_schedule_cosine, **settings))
        for net in (small, large)
    )


def test_stitched_nets_have_their_share_of_the_steps():
    for steps in (10, 20, 50, 100, 250):
        for schedule in (logsnr_schedule_cosine, make_schedule("shifted:16", 64)):
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            for tenths in range(11):
                small, large = Counted(0.0), Counted(0.0)
                stitched = tstitch.stitch([small, large], (tenths / 10, 1 - tenths / 10), schedule)
                for logsnr in schedule(times)[:-1].float():
                    stitched(torch.zeros(1, 1), logsnr[None])
                assert (len(small.levels), len(large.levels)) == (
                    steps * tenths // 10,
                    steps - steps * tenths // 10,
                )
                assert not small.levels or not large.levels or max(small.levels) < min(large.levels)
    small, large = Counted(0.0), Counted(0.0)
    turns = tstitch.interleaved([small, large], 250, logsnr_schedule_cosine)
    levels = logsnr_schedule_cosine(torch.linspace(1, 0, 251, dtype=torch.float64))[:-1].float()
    for logsnr in levels:
        turns(torch.zeros(1, 1), logsnr[None])
    assert small.levels == levels[::2].tolist() and large.levels == levels[1::2].tolist()
    z, logsnr = torch.ones(4, 2), torch.tensor([-9.0, 9.0, -8.0, 8.0])
    assert tstitch.stitch([Counted(1.0), Counted(2.0)], (0.5, 0.5), logsnr_schedule_cosine)(
        z, logsnr
    )[:, 0].tolist() == [1, 2, 1, 2]
    for fractions in ((0.5, 0.6), (-0.5, 1.5), (1.0,), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=re.escape(str(list(fractions)))):
            tstitch.stitch([small, large], fractions, logsnr_schedule_cosine)


def test_fractions_for_a_budget():
    assert (
        len(tstitch.all_fractions(2)) == 11
        and len(set(fractions := tstitch.all_fractions(3))) == 66
    )
    assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in fractions)
    costs, qualities = (1.0, 4.0, 10.0), (0.2, 0.8, 1.0)
    rows = [
        (each, *(sum(f * v for f, v in zip(each, values)) for values in (costs, qualities)))
        for each in fractions
    ]
    best = tstitch.pick(rows, 4.0)
    assert best[0] == (0.0, 1.0, 0.0) and all(row[2] <= best[2] for row in rows if row[1] <= 4.0)
    with pytest.raises(ValueError, match=r"(?=.*\b0\.5\b).*\b1\b"):
        tstitch.pick(rows, 0.5)


def test_tstitch_by_its_command(tmp_path, capsys):
    small, large = (
        train_tiny(
            tmp_path / name,
            "--model-args",
            json.dumps(
                dict(
                    base_channels=width,
                    emb_channels=16,
                    channel_multiplier=[1, 2],
                    num_res_blocks=[1],
                    num_transformer_blocks=1,
                )
            ),
        )
        for name, width in (("small", 8), ("large", 16))
    )
    runs, out = [str(small), str(large)], str(tmp_path / "out.npz")
    tstitch.main(
        [
            *runs,
            "--fraction",
            "0.5",
            "--steps",
            "4",
            "--n",
            "10",
            "--batch",
            "4",
            "--guidance",
            "2",
            "--out",
            out,
        ]
    )
    (a, config, schedule), (b, *_) = map(load, runs)
    nets = [in_bf16(net, config["bf16"]) for net in (a, b)]
    x = sample(
        tstitch.stitch(nets, (0.5, 0.5), schedule),
        (2, 3, 32, 32),
        schedule,
        steps=4,
        sampler="ddim",
        label=torch.tensor([8, 9]),
        guidance=2.0,
        first=8,
    )
    with np.load(out) as written:
        assert np.array_equal(
            written["arr_0"][8:], sampling.to_uint8(x).permute(0, 2, 3, 1)
        ) and written["y"].tolist() == list(range(10))
    tstitch.main(
        [*runs, "--interleave", "--steps", "2", "--n", "10", "--out", str(tmp_path / "grid.png")]
    )
    capsys.readouterr()
    tstitch.main([*runs, "--cosine", "--steps", "3", "--n", "4", "--guidance", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].endswith(" 1.0000")
    other = train_tiny(
        tmp_path / "other", "--model-args", '{"base_channels": 8}', "--schedule", "shifted:16"
    )
    for options, message in (
        (runs, r"(?=.*--interleave\b)(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction", "0.5", "--cosine"], r"(?=.*--cosine\b)(?=.*\b1\b).*--fraction\b"),
        ([*runs, "--fraction", "1.5"], r"\b1\.5\b"),
        (
            [runs[0], str(other), "--fraction", "0.5"],
            rf"(?=.*\bschedule\b).*{re.escape(str(other))}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tstitch.main(options)


# ---------------------------------------------------------------- ppap.py


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 2), (7, 2)])
def test_low_rank_convolution_is_one_with_the_merged_weight(kernel, stride):
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(4, 6, kernel, stride, kernel // 2), torch.randn(2, 4, 14, 14)
    before, weight = conv(x), conv.weight.detach().clone()
    parametrize.register_parametrization(conv, "weight", change := ppap.LowRank(conv.weight, 3))
    assert torch.equal(conv(x), before)
    assert change.a.shape == (3 * kernel, 4 * kernel) and change.b.shape == (6 * kernel, 3 * kernel)
    torch.nn.init.normal_(change.b)
    merged = weight + 8 / 3 * (change.b @ change.a).reshape(6, 4, kernel, kernel)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, merged, conv.bias, stride, kernel // 2), rtol=0, atol=1e-5
    )
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    assert torch.equal(conv.weight, weight)


def test_experts_are_the_classifier_and_little_else():
    torch.manual_seed(0)
    classifier, x = ppap.Classifier(10).eval(), torch.randn(2, 3, 32, 32)
    net = ppap.expert(classifier, rank=2).eval()
    assert torch.equal(net(x), classifier(x))
    names = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    expected = {
        f"body.{i}.{name}"
        for i in (0, 3, 6)
        for name in ("bias", "parametrizations.weight.0.a", "parametrizations.weight.0.b")
    } | {f"body.{i}.{name}" for i in (1, 4, 7) for name in ("weight", "bias")}
    assert names == expected
    low_rank = sum(p.numel() for name, p in net.named_parameters() if "weight.0." in name)
    assert low_rank == sum(2 * 9 * (a + b) for a, b in ((3, 32), (32, 64), (64, 128)))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == low_rank + 3 * (32 + 64 + 128)
    whole = ppap.expert(classifier)  # as the command makes it
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) <= 0.1 * sum(
        p.numel() for p in classifier.parameters()
    )


def test_each_time_has_one_expert():
    times = torch.tensor(
        [0.0, 0.1, 0.19, 0.21, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, 1.0], dtype=torch.float64
    )
    for schedule in (logsnr_schedule_cosine, make_schedule("shifted:16", 64)):
        assert ppap.expert_of(schedule(times), 5, schedule).tolist() == [
            0,
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
            4,
            4,
        ]
        assert ppap.expert_of(schedule(times), 1, schedule).tolist() == [0] * 11
        ends = schedule(
            torch.arange(6, dtype=torch.float64) / 5
        )  # a boundary belongs to the noisier one, t = 1 to the last
        assert ppap.expert_of(ends, 5, schedule).tolist() == [0, 1, 2, 3, 4, 4]


def test_guidance_by_a_classifier_is_that_of_the_exact_posterior():
    """x is one of two Gaussians, with their exact denoiser and classifier.

    Then guidance 1 is the denoiser of the class.
    """
    torch.manual_seed(0)
    means, std = torch.tensor([[1.0, 0.5], [-1.0, 0.2]]).double(), 0.3

    def parts(
        z, logsnr
    ):  # log p(z | class) up to a constant, and x_hat given the class, (B, 2) and (B, 2, 2)
        alpha, sigma = alpha_sigma(logsnr, like=z)
        variance = alpha**2 * std**2 + sigma**2
        away = z[:, None] - alpha[:, None] * means
        return -away.square().sum(2) / (2 * variance), means + (alpha * std**2 / variance)[
            :, None
        ] * away

    def v_of(x_hat, z, logsnr):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return (alpha * z - x_hat) / sigma

    def net(z, logsnr, label=None):
        assert label is None
        log_p, x_hat = parts(z, logsnr)
        return v_of((log_p.softmax(1)[:, :, None] * x_hat).sum(1), z, logsnr)

    logsnr, label = torch.tensor([-3.0, -1.0, 0.5, 2.0]).double(), torch.tensor([0, 1, 1, 0])
    z = torch.randn(4, 2).double()
    experts = []
    for k in range(3):
        experts.append(
            lambda z_k, k=k: parts(
                z_k, logsnr[ppap.expert_of(logsnr, 3, logsnr_schedule_cosine) == k]
            )[0]
        )
    exact = v_of(parts(z, logsnr)[1][torch.arange(4), label], z, logsnr)
    torch.testing.assert_close(
        ppap.guided_by(net, experts, 1.0, logsnr_schedule_cosine)(z, logsnr, label), exact
    )
    torch.testing.assert_close(
        ppap.guided_by(net, experts, 3.0, logsnr_schedule_cosine)(z, logsnr, label),
        net(z, logsnr) + 3 * (exact - net(z, logsnr)),
    )
    assert torch.equal(
        ppap.guided_by(net, experts, 0.0, logsnr_schedule_cosine)(z, logsnr), net(z, logsnr)
    )
    at_one = ppap.guided_by(net, experts, 1.0, logsnr_schedule_cosine)
    with pytest.raises(ValueError, match="label"):
        at_one(z, logsnr)


def test_experts_learn_from_images_alone():
    x = load_batch(Shapes(16), range(64))[0] / 127.5 - 1
    classifier = ppap.trained_classifier(
        Shapes(16), 10, torch.device("cpu"), steps=60, batch=64
    ).requires_grad_(True)
    classifier.zero_grad()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    experts = ppap.transfer(classifier, 2, x, logsnr_schedule_cosine, steps=100, batch=32, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())

    @torch.no_grad()
    def divergence(net, k):
        torch.manual_seed(1)
        z = diffuse(x, torch.randn_like(x), logsnr_schedule_cosine((k + torch.rand(64)) / 2))
        return F.kl_div(
            net(z).log_softmax(1), (classifier(x) / 0.25).softmax(1), reduction="batchmean"
        ).item()

    for k, net in enumerate(
        experts
    ):  # each is better than the classifier, and than the other one, where it was trained
        assert (
            divergence(net, k) < 0.8 * divergence(classifier, k)
            and divergence(net, k) < divergence(experts[1 - k], k)
            and not any(p.requires_grad for p in net.parameters())
        )


def test_ppap_and_ppgn_by_their_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ppap, "trained_classifier", functools.partial(ppap.trained_classifier, steps=3)
    )
    run = str(
        train_tiny(
            tmp_path,
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
            '"num_res_blocks": [1], "num_transformer_blocks": 1}',
        )
    )
    guide, out = str(tmp_path / "guide"), str(tmp_path / "out.npz")
    ppap.main(
        [
            run,
            "--experts",
            "2",
            "--updates",
            "2",
            "--pictures",
            "8",
            "--batch",
            "8",
            "--steps",
            "2",
            "--out",
            guide,
        ]
    )
    text = capsys.readouterr().out
    assert re.search(r"\b2\b.*\b8\b.*\b8\.2 %", text) and text.count("t=0.95") == 2
    drawn = []
    for options in (["--scale", "0"], [], ["--plain", "--batch", "3"]):
        ppap.main([run, "--guide", guide, "--n", "10", "--steps", "3", "--out", out, *options])
        drawn.append(np.load(out)["arr_0"])
    net, config, schedule = load(run)
    unguided = sample(
        in_bf16(net, config["bf16"]),
        (10, 3, 32, 32),
        schedule,
        steps=3,
        sampler="ddim",
        label=torch.full((10,), 10),
    )
    ppap.main([run, "--guide", guide, "--n", "10", "--steps", "3", "--out", out, "--batch", "4"])
    assert (
        np.abs(np.load(out)["arr_0"].astype(int) - drawn[1]).max() <= 1
    )  # the same images, whatever the batch, but for rounding
    assert (
        np.array_equal(drawn[0], sampling.to_uint8(unguided).permute(0, 2, 3, 1))
        and not np.array_equal(drawn[0], drawn[1])
        and not np.array_equal(drawn[1], drawn[2])
    )
    known, label = load_batch(Shapes(32, first=2**30), range(10))
    for options in ([], ["--plain", "--noise", "0.1"]):
        ppgn.main(
            [
                run,
                "--guide",
                guide,
                "--n",
                "10",
                "--chain",
                "3",
                "--inpaint",
                "--out",
                out,
                *options,
            ]
        )
        with np.load(out) as written:
            same = (written["arr_0"] == known.permute(0, 2, 3, 1).numpy()).all((0, 3))
            assert written["y"].tolist() == label.tolist()
        assert (
            same[:8].all()
            and same[24:].all()
            and same[:, :8].all()
            and same[:, 24:].all()
            and not same[8:24, 8:24].any()
        )
    drawn = []
    for options in (
        ["--batch", "3"],
        ["--n", "12"],
        ["--prior", "0"],
        ["--noise", "0"],
        ["--condition", "100"],
        ["--logsnr", "2"],
        ["--seed", "1"],
        ["--plain"],
    ):
        ppgn.main([run, "--guide", guide, "--n", "10", "--chain", "3", "--out", out, *options])
        drawn.append(np.load(out)["arr_0"][:10].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and all(
        (other != drawn[0]).mean() > 0.1 for other in drawn[2:]
    )
    for command, options, message in (
        (ppap.main, ["--guide", guide, "--out", "x"], r"--out x\b"),
        (ppap.main, ["--out", guide, "--updates", "0"], r"--updates(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--chain", "0"], r"--chain(?=.*\b1\b).*\b0\b"),
        (ppgn.main, ["--guide", guide, "--logsnr", "nan"], r"--logsnr\b.*-20\b.*\b20\b"),
        (ppgn.main, ["--guide", guide, "--prior", "-1"], "--prior"),
        (ppgn.main, ["--guide", guide, "--condition", "nan"], "--condition"),
        (ppap.main, ["--out", guide, "--scale", "inf"], "--scale"),
    ):
        with pytest.raises(ValueError, match=message):
            command([run, *options])
    with pytest.raises(FileNotFoundError):
        ppgn.main([run, "--guide", str(tmp_path), "--out", out])
    for content in (b"", b"PK broken", None):
        torch.save(dict(other=1), f"{guide}/experts.pt") if content is None else (
            tmp_path / "guide" / "experts.pt"
        ).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{guide}/experts.pt")):
            ppap.main([run, "--guide", guide, "--out", out])


def test_runs_that_these_commands_do_not_take(tmp_path, monkeypatch):
    fields = dict(
        base_channels=8,
        emb_channels=16,
        channel_multiplier=[1, 2],
        num_res_blocks=[1],
        num_transformer_blocks=1,
    )
    texts = str(train_tiny(tmp_path / "texts", "--model-args", json.dumps(fields), "--captions"))
    plain = str(train_tiny(tmp_path / "plain", "--model-args", json.dumps(fields)))
    distill.main([plain, "--steps", "1", "--teacher-steps", "2", "--updates", "1", "--batch", "4"])
    np.savez(tmp_path / "unlabeled.npz", x=np.zeros((4, 32, 32, 3), np.uint8))
    unlabeled = str(
        train_tiny(
            tmp_path / "unlabeled",
            "--model-args",
            json.dumps(fields),
            "--data",
            str(tmp_path / "unlabeled.npz"),
        )
    )
    reasons = set()
    for run in (texts, f"{plain}-1steps", unlabeled):
        for command, options in (
            (
                tstitch.main,
                [run, "--fraction", "0.5", "--guidance", "2", "--out", str(tmp_path / "g.png")],
            ),
            (ppap.main, ["--out", str(tmp_path / "x")]),
            (ppgn.main, ["--guide", "x", "--out", str(tmp_path / "g.png")]),
            (diffusion_classifier.main, []),
        ):
            with pytest.raises(ValueError, match=re.escape(run)) as error:
                command([run, *options])
            reasons.add(str(error.value).replace(run, "RUN"))
    assert len(reasons) == 3  # of each run another one
    monkeypatch.setenv("WORLD_SIZE", "1")
    tstitch.main(
        [
            unlabeled,
            unlabeled,
            "--fraction",
            "0.5",
            "--steps",
            "2",
            "--n",
            "3",
            "--out",
            str(tmp_path / "new" / "grid.png"),
        ]
    )
    assert os.path.exists(tmp_path / "new" / "grid.png")


# ---------------------------------------------------------------- diffusion_classifier.py


def test_evaluations_are_those_that_were_published():
    four = (20, 50, 100, 500)
    for classes, numbers, keep, calls in (
        (101, four, (20, 10, 5, 1), 5570),
        (10, (50, 500), (5, 1), 2750),
        (100, four, (20, 10, 5, 1), 5550),
        (37, (25, 250), (5, 1), 2050),
        (102, four, (20, 10, 5, 1), 5590),
        (10, (100, 500), (5, 1), 3000),
        (1000, (50, 100, 500, 1000), (500, 50, 10, 1), 124_500),
        (113, (50, 100, 500, 1000), (25, 10, 5, 1), 14_400),
    ):
        assert diffusion_classifier.evaluations(classes, numbers, keep) == calls
    assert [len(new) for new in diffusion_classifier.plan(four)] == [20, 50, 80, 350]
    with pytest.raises(ValueError, match=r"\[8, 4\]"):
        diffusion_classifier.plan([8, 4])
    first, second = diffusion_classifier.plan([20, 32])
    assert (
        sorted(first + second) == list(range(32))
        and len(first) == 20
        and max(b - a for a, b in zip(first, first[1:])) == 2
        and first[-1] == 31
    )  # evenly spread


MEANS = (
    torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.0, 0.0]]).double().reshape(4, 2, 1, 1)
)


def gaussians(z, logsnr, label, calls=None):
    """The exact net for data of which each class is a Gaussian of standard deviation 0.2."""
    assert not torch.is_grad_enabled()
    if calls is not None:
        calls.append((z, logsnr, label))
    alpha, sigma = alpha_sigma(logsnr, like=z)
    mean = MEANS.to(z.dtype)[label]
    x_hat = mean + alpha * 0.04 / (alpha**2 * 0.04 + sigma**2) * (z - alpha * mean)
    return (alpha * z - x_hat) / sigma


def test_diffusion_classifier_of_gaussians_is_that_of_bayes():
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = MEANS[y] + 0.2 * torch.randn(400, 2, 1, 1).double()
    bayes = (x - MEANS[:, None]).square().sum((2, 3, 4)).argmin(0)
    gap = (x - MEANS[:, None]).square().sum((2, 3, 4)).sort(0).values
    clear = gap[1] - gap[0] > 0.3
    calls = []
    found, errors = diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (32,), (1,)
    )
    assert (
        clear.float().mean() > 0.7
        and (found == bayes)[clear].float().mean() >= 0.99
        and errors.isfinite().all()
    )
    by_hand = torch.zeros(400, 4).double()
    for level in range(32):  # eps - eps_hat, summed for one noise for all classes
        logsnr = logsnr_schedule_cosine(torch.full((400,), (level + 0.5) / 32).double())
        eps = diffusion_classifier.pair_noise((2, 1, 1), 0, range(400), level).double()
        z = diffuse(x, eps, logsnr)
        for c in range(4):
            with torch.no_grad():
                eps_hat = eps_from_v(z, gaussians(z, logsnr, torch.full((400,), c)), logsnr)
            by_hand[:, c] += (eps - eps_hat).square().mean((1, 2, 3)) / 32
    torch.testing.assert_close(errors, by_hand)
    assert (
        torch.equal(found, by_hand.argmin(1))
        and sum(len(z) for z, *_ in calls) == 400 * diffusion_classifier.evaluations(4, (32,), (1,))
        and max(label.max() for *_, label in calls) == 3
    )
    for options in (dict(numbers=(8, 32), keep=(4, 1)), dict(batch=7), dict(space="v", norm="l1")):
        other, others = diffusion_classifier.classify(
            gaussians,
            x,
            4,
            logsnr_schedule_cosine,
            **dict(dict(numbers=(32,), keep=(1,)), **options),
        )
        if "space" not in options:
            assert torch.equal(other, found)
            torch.testing.assert_close(others, errors, rtol=1e-6, atol=1e-9)
        else:
            assert (other == bayes)[clear].float().mean() >= 0.99
    order = torch.tensor([2, 0, 3, 1])
    _, permuted = diffusion_classifier.classify(
        lambda z, logsnr, label: gaussians(z, logsnr, order[label]), x, 4, logsnr_schedule_cosine
    )
    torch.testing.assert_close(permuted, errors[:, order])
    calls.clear()
    pruned, few = diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (8, 32), (2, 1)
    )
    assert (
        (few.isinf().sum(1) == 2).all()
        and sum(len(z) for z, *_ in calls) == 400 * (8 * 4 + 24 * 2)
        and (pruned == found).float().mean() > 0.95
    )
    alone, _ = diffusion_classifier.classify(gaussians, x[5:7], 4, logsnr_schedule_cosine, first=5)
    assert torch.equal(alone, found[5:7])


def test_classes_share_noise():
    calls, x = [], MEANS[:2]
    diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls), x, 4, logsnr_schedule_cosine, (3,), (1,)
    )
    for z, _, label in calls:
        z = z.reshape(2, 4, 2)
        assert (
            torch.equal(z, z[:, :1].expand_as(z))
            and not torch.equal(z[0], z[1])
            and label.tolist() == [0, 1, 2, 3] * 2
        )
    calls.clear()
    diffusion_classifier.classify(
        lambda *args: gaussians(*args, calls),
        x,
        4,
        logsnr_schedule_cosine,
        (3,),
        (1,),
        shared=False,
    )
    assert all(len(z.unique(dim=0)) == 8 for z, *_ in calls)
    noise = [
        diffusion_classifier.pair_noise((3,), seed, [number], level, None if c is None else [c])
        for seed in (0, 1)
        for number in (0, 1)
        for level in (0, 1)
        for c in (None, 0, 1)
    ]
    assert len(torch.cat(noise).unique(dim=0)) == 24
    for space, factor in (
        ("eps", lambda logsnr: torch.sigmoid(logsnr)),
        ("x", lambda logsnr: torch.sigmoid(-logsnr)),
    ):
        (_, errors), (_, plain) = (
            diffusion_classifier.classify(
                gaussians, x, 4, logsnr_schedule_cosine, (1,), (1,), space=each
            )
            for each in (space, "v")
        )
        torch.testing.assert_close(
            errors,
            factor(logsnr_schedule_cosine(torch.tensor(0.5).double())) * plain,
            rtol=1e-5,
            atol=0,
        )


def test_diffusion_classifier_by_its_command(tmp_path, capsys, monkeypatch):
    run = str(
        train_tiny(
            tmp_path,
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], '
            '"num_res_blocks": [1], "num_transformer_blocks": 1}',
        )
    )
    capsys.readouterr()
    diffusion_classifier.main([run, "--n", "4", "--times", "1", "2", "--keep", "3", "1"])
    assert re.search(r"\d %.*\b4\b.*\b13\b.*\b35 %", capsys.readouterr().out)
    for options, message in (
        (["--times", "2", "4"], r"(?=.*\b10\b)(?=.*\[1\]).*\b2\b"),
        (["--n", "0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["--keep", "0"], r"(?=.*\b10\b)(?=.*\[0\]).*\b1\b"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion_classifier.main([run, *options])
    x, y = load_batch(Shapes(32, first=2**30), range(60))
    np.savez(
        tmp_path / "data.npz", x=x.permute(0, 2, 3, 1).numpy(), y=y.numpy(), classes=Shapes.classes
    )
    np.savez(tmp_path / "other.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    capsys.readouterr()
    data, seen = ["--data", str(tmp_path / "data.npz"), "--times", "1"], []
    for options in (
        ["--n", "60"],
        ["--n", "100", "--batch", "7"],
        ["--norm", "l1", "--space", "x", "--independent", "--seed", "1"],
    ):
        diffusion_classifier.main([run, *data, *options])
        seen.append(capsys.readouterr().out)
    diffusion_classifier.main([run, "--n", "60", "--times", "1"])
    assert seen[0] == seen[1] == capsys.readouterr().out
    assert re.search(r"\b60\b.*\b10\b", seen[2])
    with pytest.raises(ValueError, match=rf"(?=.*\b0, 1, 2, 3\b).*{re.escape(run)}"):
        diffusion_classifier.main([run, "--data", str(tmp_path / "other.npz")])
    seen = []
    for options in (
        ["--times", "1"],
        ["--times", "1", "--at", "0.5"],
        ["--times", "1", "--at", "0.01"],
    ):  # the middle of one level is t = 1/2
        diffusion_classifier.main([run, "--n", "60", *options])
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1] != seen[2]
    for options in (["--at", "1.5"], ["--probe", "-0.1"]):
        with pytest.raises(ValueError, match=rf"{options[0]}\b.*\b0\b.*\b1\b"):
            diffusion_classifier.main([run, *options])
    seen = []
    monkeypatch.setattr(
        diffusion_classifier,
        "random_indices",
        lambda data, n, seed: common.random_indices(data, min(n, 50), seed),
    )
    monkeypatch.setattr(
        diffusion_classifier, "linear_probe", lambda *args: seen.append(args) or args[1][:20]
    )
    diffusion_classifier.main([run, "--n", "20", "--probe", "0.1", "--batch", "16"])
    assert re.search(r"\d %.*\b20\b.*\b50\b", capsys.readouterr().out)
    ((known, label, new, k),) = seen
    assert (
        known.shape == (50, 16)
        and new.shape == (20, 16)
        and k == 10
        and len(set(label.tolist())) > 5
    )
    assert len(known.unique(dim=0)) == 50


def test_linear_probe():
    torch.manual_seed(0)
    y, centers = torch.arange(300) % 3, 3 * torch.randn(3, 8)
    known, new = centers[y] + torch.randn(2, 300, 8)
    right = (diffusion_classifier.linear_probe(known, y, new, 3) == y).float().mean()
    bayes = (torch.cdist(new, centers).argmin(1) == y).float().mean()  # which is linear, too
    assert right >= bayes - 0.02 and bayes > 0.95
    assert (
        diffusion_classifier.linear_probe(torch.randn(300, 8), y, new, 3) == y
    ).float().mean() < 0.6  # features that say nothing
    net, x = UViT(**TINY).eval(), torch.randn(5, 3, 16, 16)
    found = torch.cat(
        [
            diffusion_classifier.features(
                net, net.transformer[0], x[i : i + 2], 2.0, seed=4, first=i
            )
            for i in (0, 2, 4)
        ]
    )
    level = torch.full((5,), 2.0)
    eps = diffusion_classifier.pair_noise(x.shape[1:], 4, range(5), 0)
    with torch.no_grad():
        h = net.stem(diffuse(x, eps, level))
        emb = net.embedding(level)
        h = net.down[0][0](h, emb)
        h = net.transformer[0](net.downsample[0](h) + net.position, emb)
    torch.testing.assert_close(found, h.mean((2, 3)))
    assert not net.transformer[0]._forward_hooks


# ---------------------------------------------------------------- ppgn.py


def test_a_step_of_the_chain_is_the_formula():
    torch.manual_seed(0)
    h, target, noise = (
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
    )
    prior, log_condition = (lambda h: 0.5 * h - h), (lambda x: -(x - target).square().sum(1))
    d = 0.1 * (-0.5 * h) + 0.2 * (-2) * (2 * h - target) * 2 + 0.3 * noise  # of decode(h) = 2 h

    def step(*eps, **more):
        return ppgn.chain(
            prior, log_condition, h, *eps, 1, noise=lambda: noise, decode=lambda h: 2 * h, **more
        )

    torch.testing.assert_close(step(0.1, 0.2, 0.3), h + d)
    normalized = step(0.1, 0.2, 0.3, lr=0.7)
    torch.testing.assert_close(normalized, h + 0.7 * d / d.abs().mean(1, keepdim=True))
    torch.testing.assert_close(step(1.0, 2.0, 3.0, lr=0.7), normalized)  # only ratios count then
    torch.testing.assert_close(step(0.1, 0.2, 0.3, limits=(0.0, 0.1)), (h + d).clamp(0, 0.1))
    assert (h + d).min() < 0 and (h + d).max() > 0.1
    mask = torch.tensor([1.0, 0.0]).double()
    torch.testing.assert_close(
        step(0.1, 0.2, 0.3, mask=mask, known=target), torch.stack([target[:, 0], (h + d)[:, 1]], 1)
    )
    assert torch.equal(
        ppgn.chain(None, None, h, 0.0, 0.0, 0.0, 0, mask=mask, known=target)[:, 0], target[:, 0]
    )


def test_the_chain_climbs_or_contracts():
    torch.manual_seed(0)
    h, values = torch.randn(4, 3).double(), []

    def log_condition(x):
        return F.logsigmoid(x.sum(1))

    for _ in range(20):
        values.append(log_condition(h).tolist())
        h = ppgn.chain(None, log_condition, h, 0.0, 0.1, 0.0, 1)
    assert all(a <= b for before, after in zip(values, values[1:]) for a, b in zip(before, after))
    h, fixed = torch.randn(4, 3).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    end = ppgn.chain(lambda h: fixed - h, None, h, 0.2, 0.0, 0.0, 7)
    torch.testing.assert_close(end - fixed, 0.8**7 * (h - fixed))
    unit = torch.nn.Linear(3, 5).double()  # a hidden unit, as any function of x
    end = ppgn.chain(None, lambda x: unit(x)[:, 2], h, 0.0, 1.0, 0.0, 2)
    torch.testing.assert_close(end, h + 2 * unit.weight[2])
    decoder = torch.nn.Linear(3, 3, bias=False).double()
    end = ppgn.chain(None, lambda x: unit(x)[:, 2], h, 0.0, 1.0, 0.0, 2, decode=decoder)
    torch.testing.assert_close(end, h + 2 * unit.weight[2] @ decoder.weight)


def test_the_prior_of_a_gaussian_is_its_score():
    mean, variance, logsnr = 0.3, 0.5, 1.2

    def net(z, level, label):
        alpha, sigma = alpha_sigma(level, like=z)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma

    h = torch.linspace(-2, 2, 9).double().reshape(9, 1, 1, 1)
    noise = math.exp(-logsnr)
    torch.testing.assert_close(
        ppgn.prior_from_diffusion(net, logsnr)(h) / noise, -(h - mean) / (variance + noise)
    )
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not ppgn.chain(lambda h: weight * -h, None, h, 0.5, 0.0, 0.0, 3).requires_grad


def test_the_chain_with_exact_gradients_draws_from_the_posterior():
    """Unadjusted Langevin on a mixture of four Gaussians, given one bit about them."""
    torch.manual_seed(0)
    means, variance = (
        torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double(),
        0.2,
    )

    def log_parts(x):
        return -(x[:, None] - means).square().sum(2) / (2 * variance)

    def gradient(f, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(f(x).sum(), x)[0]

    def prior(h):
        return gradient(lambda x: log_parts(x).logsumexp(1), h)

    def condition(x):  # one of the upper two
        return log_parts(x).log_softmax(1)[:, :2].logsumexp(1)

    h = ppgn.chain(prior, condition, torch.randn(5000, 2).double(), 0.01, 0.01, 0.02**0.5, 1000)
    exact = means[torch.randint(2, (200_000,))] + variance**0.5 * torch.randn(200_000, 2).double()
    torch.testing.assert_close(h.mean(0), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(
        h.T.cov(), torch.diag(torch.tensor([1 + variance, variance]).double()), rtol=0, atol=0.05
    )
    assert abs((h[:, 0] > 0).double().mean() - 0.5) < 0.05

    def bins(x):
        return torch.histogramdd(x, 20, range=[-2.5, 2.5, -1.0, 3.0]).hist / len(x)

    assert (bins(h) - bins(exact)).abs().sum() / 2 < 0.1


# ---------------------------------------------------------------- recap.py


def masked_model(**fields):
    torch.manual_seed(0)
    return randomized(
        recap.MaskedModel(
            **dict(
                dict(
                    vocabulary=5, length=12, num_classes=3, channels=16, num_blocks=3, num_heads=2
                ),
                **fields,
            )
        )
    ).eval()


def test_local_evaluation_is_the_whole_one_for_the_same_tokens():
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


def test_decoding_plans_are_those_that_were_published():
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


def test_every_place_is_decoded_once_and_as_by_hand():
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


def test_recap_by_its_commands(tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "out.npz")
    recap.main(["train", run, "--updates", "3", "--batch", "8"])
    with pytest.raises(ValueError, match=re.escape(run)):
        recap.main(["train", run])
    recap.main(
        [
            "sample",
            run,
            "--steps",
            "8",
            "--whole",
            "2",
            "--local",
            "1",
            "--n",
            "10",
            "--batch",
            "4",
            "--out",
            out,
        ]
    )
    assert re.search(r"(?<![\d.])5 .*(?<![\d.])3 ", capsys.readouterr().out)
    palette = torch.load(f"{run}/recap.pt", weights_only=True)["palette"]
    with np.load(out) as written:
        pixels = torch.from_numpy(written["arr_0"])
        assert pixels.shape == (10, 16, 16, 3) and torch.equal(
            recap.images_of(recap.tokens_of(pixels.permute(0, 3, 1, 2), palette), palette), pixels
        )
    recap.main(["real", run, "--n", "5", "--out", out])
    x = load_batch(Shapes(16, first=2**30), range(5))[0].permute(0, 2, 3, 1).float()
    nearest = (x[:, :, :, None] - palette.float()).square().sum(4).argmin(3)
    assert np.array_equal(np.load(out)["arr_0"], palette[nearest])
    capsys.readouterr()
    recap.main(["reuse", run, "--n", "3"])
    pattern = r"\b256\b.*\b16\b.*\bKL\b[^\d\n]+0\.0000\d\b[^\d\n]+\d+\.\d{5}\b"
    assert len(re.findall(pattern, capsys.readouterr().out)) == 3
    (tmp_path / "run" / "recap.pt").write_bytes(b"PK broken")
    for options, message in (
        (["sample", run], re.escape(f"{run}/recap.pt")),
        (["sample", run, "--n", "0"], r"--n\b(?=.*\b1\b).*\b0\b"),
        (["sample", run, "--out", "x"], r"--out x\b"),
    ):
        with pytest.raises(ValueError, match=message):
            recap.main(options)


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


# ---------------------------------------------------------------- vitok.py


def small_vitok(patch=4, channels=5, **others):
    """A net with random weights in every layer, in float64."""
    torch.manual_seed(0)
    net = (
        vitok.ViTok(patch, channels, **dict(encoder=(16, 1, 2), decoder=(32, 2, 4)) | others)
        .double()
        .eval()
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def test_vitok_costs_what_was_published(capsys):
    def parameters(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    def macs(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 2e9

    with torch.device("meta"):
        for decoder, millions, gmac in (("B", 85_698_867, 23.1), ("L", 383_674_899, 101.8)):
            net = vitok.ViTok(16, 16, vitok.SIZES["S"], vitok.SIZES[decoder])
            assert (
                parameters(net.patchify, net.encoder, net.to_latent) == 43_163_960
                and parameters(net.from_latent, net.decoder, net.to_pixels) == millions
            )
            encode = functools.partial(net.encode, torch.empty(1, 3, 256, 256))
            decode = functools.partial(net.decode, torch.empty(1, 16, 16, 16))
            assert macs(encode) == pytest.approx(11.6, rel=0.005)
            assert macs(decode) == pytest.approx(gmac, rel=0.005)
    vitok.main([])
    out = capsys.readouterr().out
    assert re.search(r"\bS-B/16\b.*\b128,862,827\b.*\b129\.0 M\b.*\b34\.76 GMAC\b", out)
    assert re.search(r"\bS-L/16\b.*\b426,838,859\b.*\b426\.8 M\b.*\b113\.40 GMAC\b", out)


def test_vitok_by_hand():
    net, x = small_vitok(decoder=(16, 1, 2)), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    grid = [(row, column) for row in range(2) for column in range(3)]

    # of a head of 8 channels: four complex numbers, two of which turn with the row
    # and two with the column
    def turned(q):
        numbers = torch.complex(q[..., :4], q[..., 4:])
        angles = torch.tensor(
            [[row, row / 100, column, column / 100] for row, column in grid], dtype=torch.float64
        )  # 10000^(-1/2) is 1/100
        return numbers * torch.exp(1j * angles)

    def block_by_hand(block, h):
        u = F.layer_norm(h, (16,), block.norm1.weight, block.norm1.bias)
        q, k, v = (u @ block.qkv.weight.T).reshape(2, 6, 3, 2, 8).unbind(2)
        heads = []
        for i in range(2):
            scores = (turned(q[:, :, i])[:, :, None] * turned(k[:, :, i])[:, None].conj()).real.sum(
                3
            ) / 8**0.5
            heads.append(scores.softmax(2) @ v[:, :, i])
        h = h + block.out(torch.cat(heads, 2))
        u = F.layer_norm(h, (16,), block.norm2.weight, block.norm2.bias)
        assert block.w0.out_features == 42  # int(2.67 x 16)
        a = block.w0(u)
        return h + block.w2(a * torch.sigmoid(a) * block.w1(u))

    patches = torch.stack(
        [
            x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, -1)
            for row, column in grid
        ],
        1,
    )
    h = block_by_hand(
        net.encoder.blocks[0], patches @ net.patchify.weight.flatten(1).T + net.patchify.bias
    )
    mean, logvar = net.to_latent(net.encoder.norm(h)).chunk(2, 2)
    ours = net.encode(x)
    for expected, got in zip((mean, logvar), ours):
        assert got.shape == (2, 5, 2, 3)
        torch.testing.assert_close(got.flatten(2).mT, expected)
    h = net.decoder.norm(block_by_hand(net.decoder.blocks[0], net.from_latent(mean)))
    patches = (
        torch.einsum("btc,cops->btops", h, net.to_pixels.weight) + net.to_pixels.bias[:, None, None]
    )
    expected = torch.cat(
        [torch.cat([patches[:, 3 * row + column] for column in range(3)], 3) for row in range(2)], 2
    )
    torch.testing.assert_close(net.decode(ours[0]), expected)


def test_rotations_show_differences_of_places_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    angles = vitok.rope_angles((4, 5), 16).double()
    logits = vitok.rotated(q.expand(20, -1), angles) @ vitok.rotated(k.expand(20, -1), angles).T
    by_difference = {}
    for i in range(20):
        for j in range(20):
            by_difference.setdefault((i // 5 - j // 5, i % 5 - j % 5), []).append(
                logits[i, j].item()
            )
    assert (
        len(by_difference) == 7 * 9
        and max(max(values) - min(values) for values in by_difference.values()) < 1e-6
    )
    assert len({round(values[0], 4) for values in by_difference.values()}) > 55
    assert logits[0, 0].item() == pytest.approx((q @ k).item())


@pytest.mark.parametrize(
    "patch, channels, size", [(2, 4, (8, 8)), (4, 16, (8, 12)), (8, 2, (32, 16))]
)
def test_latent_floats_are_counted(patch, channels, size):
    net = small_vitok(patch, channels)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    mean, logvar = net.encode(x)
    assert (
        mean.shape == logvar.shape == (2, channels, size[0] // patch, size[1] // patch)
        and net.floats(*size) == mean[0].numel()
    )
    assert net.decode(mean).shape == x.shape
    with pytest.raises(ValueError, match=rf"(?=.*\b{patch}\b).*\b{size[0] - 1}x{size[1]}\b"):
        net.encode(x[:, :, :-1])


def test_the_posterior_is_drawn_from_and_its_variance_is_limited():
    net, x = small_vitok(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    x_hat, mean, logvar = net(x.expand(2, -1, -1, -1))
    assert torch.equal(mean[0], mean[1]) and not torch.allclose(x_hat[0], x_hat[1])
    torch.manual_seed(3)
    x_hat, mean, logvar = net(x)
    torch.manual_seed(3)
    torch.testing.assert_close(
        x_hat, net.decode(mean + logvar.exp().sqrt() * torch.randn_like(mean))
    )
    with torch.no_grad():
        net.to_latent.bias[5:] = torch.tensor([-1e3, 1e3, -1e3, 1e3, 0])
    assert net.encode(x)[1].flatten()[:4].tolist() == [-30, 20, -30, 20]


def test_kl_and_hinge_losses():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, logvar.mul(0.5).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    torch.testing.assert_close(vitok.kl(mean, logvar), expected.flatten(1).mean(1))
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert vitok.discriminator_loss(real, fake).item() == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2)
    )
    x = torch.randn(2, 3, 16, 16)
    assert vitok.Discriminator(8)(x).shape == (2, 1, 4, 4)


def test_psnr_and_ssim():
    x = torch.rand(2, 3, 12, 13, dtype=torch.float64) * 2 - 1
    assert vitok.psnr(x, x + 0.2)[1].item() == pytest.approx(20) and vitok.psnr(x, x + 0.02)[
        0
    ].item() == pytest.approx(40)  # 20 log10(2 / 0.2)
    torch.testing.assert_close(vitok.ssim(x, x), torch.ones(2, dtype=torch.float64))
    a, b = torch.full_like(x, 0.5), torch.full_like(x, -0.25)
    assert vitok.ssim(a, b)[0].item() == pytest.approx(
        (2 * 0.5 * -0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    )
    y, weights = torch.rand_like(x), [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    values = []
    for channel in range(3):
        for top in range(2):
            for left in range(3):
                w = torch.tensor([[p * q for q in weights] for p in weights], dtype=torch.float64)
                w, u, v = (
                    w / w.sum(),
                    x[0, channel, top : top + 11, left : left + 11],
                    y[0, channel, top : top + 11, left : left + 11],
                )
                mu, nu = (w * u).sum(), (w * v).sum()
                spread, other, both = (
                    (w * (u - mu) ** 2).sum(),
                    (w * (v - nu) ** 2).sum(),
                    (w * (u - mu) * (v - nu)).sum(),
                )
                values.append(
                    (2 * mu * nu + 4e-4)
                    * (2 * both + 3.6e-3)
                    / ((mu**2 + nu**2 + 4e-4) * (spread + other + 3.6e-3))
                )
    assert vitok.ssim(x, y)[0].item() == pytest.approx(torch.stack(values).mean().item())


def test_the_second_stage_leaves_the_encoder_as_it_is():
    torch.manual_seed(0)
    net, settings = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2)), dict(steps=10, batch=4, lr=1e-2)

    def encoder(net):
        return {
            key: value.clone()
            for key, value in net.state_dict().items()
            if key.startswith(("patchify", "encoder", "to_latent"))
        }

    def others(net):
        return {
            key: value.clone() for key, value in net.state_dict().items() if key not in encoder(net)
        }

    before, decoder = encoder(net), others(net)
    average = vitok.fit(net, Shapes(16), gan=0.5, **settings)
    for after in (net, average):
        assert all(torch.equal(value, before[key]) for key, value in encoder(after).items())
        assert not any(torch.equal(value, decoder[key]) for key, value in others(after).items())
    vitok.fit(net, Shapes(16), **settings)
    assert not any(
        torch.equal(value, before[key]) for key, value in encoder(net).items() if "weight" in key
    )


class Brightness(torch.nn.Module):
    """A discriminator of one weight: how bright images are."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def test_the_second_stage_follows_the_discriminator(monkeypatch):
    critics, losses = [], []
    monkeypatch.setattr(vitok, "Discriminator", lambda: critics.append(Brightness()) or critics[0])
    monkeypatch.setattr(
        vitok,
        "discriminator_loss",
        lambda real, fake, hinge=vitok.discriminator_loss: (
            losses.append((real, fake)) or hinge(real, fake)
        ),
    )
    torch.manual_seed(0)
    net, (x, _) = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2)), load_batch(Shapes(16), range(20))
    x = x / 127.5 - 1
    before = net.decode(net.encode(x)[0]).mean()
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, gan=100.0)
    assert net.decode(net.encode(x)[0]).mean() > before + 0.2  # brighter is what it takes for real
    real, fake = losses[0]
    shown = load_batch(Shapes(16), next(image_order(1_000_000, 0, 8, 0, [range(8)])))[0] / 127.5 - 1
    torch.testing.assert_close(real, shown.mean((1, 2, 3)))  # the weight is 1 at first
    assert (
        fake.mean().item() == pytest.approx(before.item(), abs=0.1) and real.mean() < before - 0.2
    )
    assert critics[0].weight < 1  # as fakes are brighter, and became still brighter


def test_the_weight_of_kl():
    torch.manual_seed(0)
    net = vitok.ViTok(4, 4, (16, 1, 2), (16, 1, 2))
    x = load_batch(Shapes(16), range(20))[0] / 127.5 - 1
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, beta=100.0)
    assert vitok.kl(*net.encode(x)).mean() < 0.01
    vitok.fit(net, Shapes(16), steps=60, batch=8, lr=1e-2, beta=0.0)
    assert vitok.kl(*net.encode(x)).mean() > 0.1


def test_the_first_stage_learns():
    torch.manual_seed(0)
    net, x = (
        vitok.ViTok(4, 8, (32, 1, 2), (32, 1, 2)),
        load_batch(Shapes(16, first=2**30), range(50))[0] / 127.5 - 1,
    )
    before = vitok.psnr(x, net(x)[0]).mean()
    net = vitok.fit(net, Shapes(16), steps=80, batch=16, lr=3e-3)
    assert vitok.psnr(x, net(x)[0]).mean() > before + 5


def test_vitok_by_its_commands(tmp_path, capsys):
    net, latents = str(tmp_path / "net"), str(tmp_path / "latents.npz")
    vitok.main(
        [
            "train",
            net,
            "--res",
            "16",
            "--patch",
            "2",
            "--channels",
            "3",
            "--encoder",
            "16,1,2",
            "--decoder",
            "16,1,2",
            "--steps",
            "3",
            "--batch",
            "4",
        ]
    )
    vitok.main(["tune", net, "--steps", "2", "--batch", "4"])
    vitok.main(["test", net, "--n", "20", "--out", str(tmp_path / "grid.png")])
    printed = re.search(
        r"E = 192\b[^\d\n]+\b20\b.*PSNR ([\d.]+) dB.*SSIM ([\d.-]+)", capsys.readouterr().out
    )
    trained, saved = vitok.load_vitok(net, "cpu")
    assert Image.open(tmp_path / "grid.png").size == (10 * 18 - 2, 4 * 18 - 2)
    x = load_batch(Shapes(16, first=2**30), range(20))[0] / 127.5 - 1
    y = trained.decode(trained.encode(x)[0]).clamp(-1, 1)
    assert float(printed[1]) == pytest.approx(vitok.psnr(x, y).mean().item(), abs=0.006) and float(
        printed[2]
    ) == pytest.approx(vitok.ssim(x, y).mean().item(), abs=6e-5)

    vitok.main(["encode", net, "--n", "600", "--out", latents])
    with np.load(latents) as arrays:
        z = torch.from_numpy(arrays["z"])
        assert (
            z.shape == (600, 3, 8, 8)
            and arrays["y"].tolist() == [i % 10 for i in range(600)]
            and arrays["classes"].tolist() == Shapes.classes
        )
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)
    vitok.main(["decode", net, "--data", latents, "--n", "5", "--out", str(tmp_path / "back.npz")])
    expected = (
        sampling.to_uint8(trained.decode(z[:5] * saved["std"] + saved["mean"]))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.abs(np.load(tmp_path / "back.npz")["arr_0"].astype(int) - expected).max() <= 1

    run = str(tmp_path / "run")
    train.main(
        [
            "--data",
            latents,
            "--res",
            "8",
            "--model-args",
            '{"base_channels": 8, "emb_channels": 16}',
            "--steps",
            "2",
            "--batch",
            "4",
            "--out",
            run,
        ]
    )
    sampling.main(
        [run, "--n", "12", "--steps", "2", "--guidance", "2", "--out", str(tmp_path / "z.npz")]
    )
    vitok.main(
        ["decode", net, "--data", str(tmp_path / "z.npz"), "--out", str(tmp_path / "grid.npz")]
    )
    with np.load(tmp_path / "grid.npz") as pictures:
        assert pictures["arr_0"].shape == (12, 16, 16, 3) and pictures["y"].tolist() == [
            *range(10),
            0,
            1,
        ]
    with pytest.raises(ValueError, match=re.escape(run)):
        tstitch.main([run, run, "--fraction", "0.5"])
    with pytest.raises(ValueError, match=re.escape(run)):
        distill.main([run, "--steps", "8"])
    np.savez(
        tmp_path / "pets.npz",
        x=np.zeros((4, 16, 16, 3), np.uint8),
        y=np.arange(4) % 2,
        classes=["cat", "dog"],
    )
    np.savez(tmp_path / "plain.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    vitok.main(["encode", net, "--data", str(tmp_path / "pets.npz"), "--out", latents])
    with np.load(latents) as arrays:
        assert (
            arrays["classes"].tolist() == ["cat", "dog"]
            and arrays["y"].tolist() == [0, 1, 0, 1]
            and len(arrays["z"]) == 4
        )
    vitok.main(["test", net, "--data", str(tmp_path / "pets.npz")])
    assert re.search(r"E = 192\b[^\d\n]+\b4\b(?!\.)", capsys.readouterr().out)
    vitok.main(
        [
            "train",
            str(tmp_path / "plain"),
            "--data",
            str(tmp_path / "plain.npz"),
            "--res",
            "8",
            "--encoder",
            "16,1,2",
            "--decoder",
            "16,1,2",
            "--steps",
            "1",
            "--batch",
            "2",
        ]
    )
    vitok.main(["encode", str(tmp_path / "plain"), "--out", latents])
    assert np.load(latents).files == ["z"] and np.load(latents)["z"].shape == (4, 8, 2, 2)
    with pytest.raises(ValueError, match=r"(?=.*\b11\b).*\b8\b"):
        vitok.main(["test", str(tmp_path / "plain"), "--data", str(tmp_path / "plain.npz")])


def test_what_vitok_says_of_wrong_options(tmp_path):
    net = str(tmp_path / "net")
    vitok.main(
        [
            "train",
            net,
            "--res",
            "16",
            "--patch",
            "4",
            "--channels",
            "3",
            "--encoder",
            "16,1,2",
            "--decoder",
            "16,1,2",
            "--steps",
            "1",
            "--batch",
            "2",
        ]
    )
    np.savez(tmp_path / "z.npz", z=np.zeros((2, 5, 4, 4), np.float32))
    for args, text in (
        (["train", "x", "--patch", "5"], r"(?=.*\b5\b).*\b32x32\b"),
        (["train", "x", "--encoder", "30,1,2"], r"(?=.*\b30\b)(?=.*\b2\b).*\b4\b"),
        (["train", "x", "--data", str(tmp_path / "z.npz")], re.escape(f"{tmp_path}/z.npz")),
        (["train", net], re.escape(net)),
        (["tune", net, "--out", net], re.escape(net)),
        (["encode", net], r"(?=.*\bencode\b)(?=.*\.npz\b).*--out\b"),
        (["encode", net, "--out", "x.png"], r"(?=.*\bencode\b).*--out\b"),
        (["decode", net], r"(?=.*\bdecode\b).*--out\b"),
        (["test", net, "--out", "x.npz"], r"(?=.*\btest\b)(?=.*\.png\b).*--out\b"),
        (["decode", net, "--out", "x.npz"], r"(?=.*\bdecode\b).*--data\b"),
        (
            ["decode", net, "--data", str(tmp_path / "z.npz"), "--out", "x.npz"],
            r"z\.npz\b(?=.*\b5\b).*\b3\b",
        ),
        (["train", "x", "--lr", "nan"], "--lr"),
        (["train", "x", "--steps", "0"], "--steps"),
        (["test", net, "--n", "0"], "--n"),
    ):
        with pytest.raises(ValueError, match=text):
            vitok.main(args)
    with pytest.raises(FileNotFoundError):
        vitok.main(["test", str(tmp_path)])
    (tmp_path / "vitok.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/vitok.pt")):
        vitok.main(["test", str(tmp_path)])
    for args, text in (
        (["train"], r"^vitok: .*\btrain\b.*\Z"),  # one line
        (["train", "x", "--encoder", "1,2"], r"--encoder(?=.*S, B, L).*\b1,2\b"),
        (["train", "x", "--encoder", "128,2,0"], r"--encoder\b.*\b128,2,0\b"),
        (["train", "x", "--decoder", "1,2,a"], r"--decoder\b.*\b1,2,a\b"),
    ):
        with pytest.raises(SystemExit, match=text):
            vitok.main(args)
