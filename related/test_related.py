"""The tests of related/, run by python test_all.py with all others; alone: python -m pytest related."""

import argparse
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sample as sampling
import train
from loss import diffusion_loss
from related import distill, sid2
from sample import ddim_step, guided, load, sample
from schedule import alpha_sigma, diffuse, logsnr_schedule_cosine, make_schedule, x_from_v
from unet import PATCHING, count

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(res=16, num_classes=3, base_channels=16, emb_channels=32, channel_multiplier=(1, 2), num_res_blocks=(1,), num_transformer_blocks=2)


def train_tiny(tmp_path, *args):
    train.main(["--res", "32", "--steps", "2", "--batch", "4", "--sample-every", "1000", "--out", str(tmp_path / "run"), *args])
    return tmp_path / "run"


# ---------------------------------------------------------------- sid2.py


def test_sid2_costs_what_was_published():
    for size, gmac in (("small", 137), ("flop-heavy", 653)):
        assert count(sid2.ResidualUViT, dict(sid2.ResidualUViT.RECIPES[size][256], res=256))[1] / 1e9 == pytest.approx(gmac, rel=0.015)


def test_sid2_is_the_identity_at_first():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(**dict(TINY, channel_multiplier=(1, 2, 4), num_res_blocks=(1, 2), attn_resolutions=(8,)))
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
    assert all(parameter.grad.abs().max() > 0 for name, parameter in net.named_parameters() if "norm_k.bias" not in name)


def test_sid2_takes_texts():
    torch.manual_seed(0)
    net = sid2.ResidualUViT(**dict(TINY, num_classes=0, text_tokens=5))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, texts = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])
    v = net(z, torch.zeros(2), texts)
    assert not torch.allclose(v[:1], net(z[:1], torch.zeros(1)), atol=1e-5) and torch.allclose(v[1:], net(z[1:], torch.zeros(1)), atol=1e-5)


def test_sigmoid_loss_in_eps_is_that_in_x():
    torch.manual_seed(0)
    x, eps, t, v_hat = torch.randn(8, 3, 4, 4).double(), torch.randn(8, 3, 4, 4).double(), torch.linspace(0.05, 0.95, 8).double(), torch.randn(8, 3, 4, 4).double()
    net = lambda z, logsnr, label: v_hat
    for bias in (0.0, -3.0):
        loss, logsnr = sid2.sigmoid_loss(net, x, logsnr_schedule_cosine, bias=bias, t=t, eps=eps)
        x_hat = x_from_v(diffuse(x, eps, logsnr), v_hat, logsnr)
        slope = torch.autograd.grad(logsnr_schedule_cosine(u := t.clone().requires_grad_()).sum(), u)[0]
        torch.testing.assert_close(loss, -slope * math.exp(bias) * torch.sigmoid(logsnr - bias) * (x - x_hat).square().mean((1, 2, 3)))


def test_sigmoid_loss_does_not_depend_on_the_schedule():
    torch.manual_seed(0)
    n = 20_000
    t = (torch.arange(n).double() + 0.5) / n
    x, eps = torch.randn(2, n, 1, 1, 1).double()
    net = lambda z, logsnr, label: 0.3 * z
    schedules = (lambda t: logsnr_schedule_cosine(t, -10.0, 10.0), lambda t: 10 - 20 * t, lambda t: 10 - 20 * t**2)
    means = [sid2.sigmoid_loss(net, x.sign(), schedule, bias=-1.0, t=t, eps=eps.sign())[0].mean() for schedule in schedules]
    assert max(means) / min(means) < 1.01
    plain = [diffusion_loss(net, x.sign(), schedule, t=t, eps=eps.sign())[0].mean() for schedule in schedules]
    assert max(plain) / min(plain) > 1.1  # of the loss without weights, this is not so


def test_sid2_trains_and_samples_as_its_recipe_says(tmp_path, capsys):
    model_args = '{"base_channels": 8, "emb_channels": 16, "channel_multiplier": [1, 2], "num_res_blocks": [1], "num_transformer_blocks": 1}'
    run = str(train_tiny(tmp_path, "--model", "related.sid2:ResidualUViT", "--model-args", model_args))
    net, config, schedule = load(run)
    assert (config["loss"], config["schedule"], config["model_args"]["patching"]) == ("related.sid2:sigmoid_loss", "interpolated:32:32@10", "conv_2")
    sampling.main([run, "--n", "2", "--steps", "4", "--guidance", "2", "--out", f"{run}/grid.png"])
    sampling.main([run, "--n", "2", "--steps", "4", "--guidance", "2", "--guidance-interval", "-99", "99", "--out", f"{run}/grid.png"])
    assert train.parse(["--space", "v"])["loss"] is None  # the loss with that option, whatever the recipe has
    assert "logsnr in [-3, 5]" in (text := capsys.readouterr().out) and "logsnr in [-99, 99]" in text
    for options, message in ((["--size", "base"], "tiny, small, flop-heavy, not base"), (["--size", "flop-heavy", "--res", "128"], "256, 512, not 128")):
        with pytest.raises(ValueError, match=message):
            train.main(["--model", "related.sid2:ResidualUViT", "--out", str(tmp_path / "none"), *options])


def test_every_sid2_recipe_builds_and_trains_as_said():
    for size, by_res in sid2.ResidualUViT.RECIPES.items():
        for res, fields in by_res.items():
            given = dict(model="related.sid2:ResidualUViT", size=size, res=res)
            config = train.settings(given, torch.device("cpu"), train.Shapes(res))
            assert config["loss"] == "related.sid2:sigmoid_loss" and make_schedule(config["schedule"], res)(torch.tensor(0.0)) > 9
            with torch.device("meta"):
                net = sampling.build_net(config["model"], config["model_args"])
                assert net(torch.empty(2, 3, res, res), torch.empty(2)).shape == (2, 3, res, res)
                assert net.stem.conv.out_channels > 3 * PATCHING[fields.get("patching", "none")] ** 2


# ---------------------------------------------------------------- distill.py


def test_two_steps_of_the_teacher_are_one_of_the_student():
    torch.manual_seed(0)
    z, schedule = torch.randn(4, 3, 4, 4).double(), logsnr_schedule_cosine
    teacher = lambda z, logsnr, label: torch.tanh(z) * torch.sigmoid(logsnr).reshape(-1, 1, 1, 1)
    times = distill.progressive_times(torch.tensor([0.0, 0.3, 0.6, 0.99]).double(), 4)
    assert [u.tolist() for u in times] == [[0.25, 0.5, 0.75, 1.0], [0.125, 0.375, 0.625, 0.875], [0.0, 0.25, 0.5, 0.75]]
    t, middle, s = map(schedule, times)
    v = distill.progressive_target(teacher, None, z, times, schedule, None)
    once = ddim_step(z, x_from_v(z, v, t), t, s)
    twice = z
    for a, b in ((t, middle), (middle, s)):
        twice = ddim_step(twice, x_from_v(twice, teacher(twice, a, None), a).clamp(-1, 1), a, b)
    torch.testing.assert_close(once, twice)


def gaussian(std):
    """The ideal net of pictures that are N(0, std^2): x_hat = alpha std^2 z / (alpha^2 std^2 + sigma^2)."""
    def net(z, logsnr, label):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return alpha * z * (1 - std**2) * sigma / (alpha**2 * std**2 + sigma**2)  # v = (alpha z - x_hat) / sigma
    return net


def test_the_ideal_net_of_a_gaussian_is_one():
    z, logsnr = torch.randn(5, 1, 1, 1).double(), torch.linspace(-9, 9, 5).double()
    alpha, sigma = alpha_sigma(logsnr, like=z)
    torch.testing.assert_close(x_from_v(z, gaussian(0.1)(z, logsnr, None), logsnr), alpha * 0.01 * z / (alpha**2 * 0.01 + sigma**2))


def test_one_step_student_of_a_gaussian_is_the_product_of_its_teachers_steps():
    schedule, std, z = logsnr_schedule_cosine, 0.1, torch.tensor([[[[0.7]]]]).double()
    u = torch.linspace(1, 0, 257).double()
    teacher, product = gaussian(std), z
    for a, b in zip(u[:-1], u[1:]):
        product = distill.ddim(teacher, product, schedule(a[None]), schedule(b[None]), None)
    n = 128
    while n >= 1:  # every student is linear in z, so that one target for each of its steps is all it can learn
        learned = {}
        for step in range(n):
            times = distill.progressive_times(torch.tensor([(step + 0.5) / n]).double(), n)
            learned[round(schedule(times[0]).item(), 6)] = distill.progressive_target(teacher, None, z, times, schedule, None) / z
        teacher = lambda z, logsnr, label, learned=learned: learned[round(logsnr.item(), 6)] * z
        n //= 2
    ends = schedule(torch.tensor([1.0, 0.0]).double())
    once = distill.ddim(teacher, z, ends[:1], ends[1:], None)
    torch.testing.assert_close(once, product)
    assert (once / z).item() == pytest.approx(std, rel=0.03)  # the flow's end, but for the error of 256 steps


def test_consistent_students_stay_so():
    schedule, std, steps, teacher_steps = logsnr_schedule_cosine, 0.1, 4, 512
    u = ((torch.arange(64) + 0.5) / 64).double()
    times = distill.consistency_times(u, steps, teacher_steps)
    assert all(((times[0] - times[1]) * teacher_steps - 1).abs() < 1e-9)
    assert all(times[2] <= times[1]) and all(times[0] - times[2] <= 1 / steps + 1e-9) and set((times[2] * steps).tolist()) == {0.0, 1.0, 2.0, 3.0}
    width = lambda logsnr: (torch.sigmoid(logsnr) * std**2 + torch.sigmoid(-logsnr)).sqrt().reshape(-1, 1, 1, 1)  # of z: the flow keeps z / width
    t, end = schedule(times[0]), schedule(times[2])

    def student(z, logsnr, label):  # the exact way to the end of the segment
        return distill.v_between(z, z * width(end) / width(logsnr), logsnr, end)

    def reached(teacher):
        z = width(t)
        return ddim_step(z, x_from_v(z, distill.consistency_target(teacher, student, z, times, schedule, None), t), t, end) / width(end)

    torch.testing.assert_close(reached(gaussian(std)), torch.ones(64, 1, 1, 1).double(), rtol=0, atol=2e-3)  # what it knows already is what it is to learn
    assert (reached(gaussian(5 * std)) - 1).abs().max() > 0.01  # of another teacher it would learn something else


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
    student = sampling.build_net("related.distill:Student", dict(config["model_args"], model="uvit", max_guidance=3.0))
    student.copy_from(net)
    student.eval()
    z, logsnr, label = torch.randn(4, 3, 32, 32), torch.linspace(-5, 5, 4), torch.arange(4)
    for given in (label, (label, torch.linspace(1, 3, 4))):
        torch.testing.assert_close(student(z, logsnr, given), net(z, logsnr, label))
    fill(student)
    torch.testing.assert_close(student(z, logsnr, label), student(z, logsnr, (label, torch.ones(4))))
    at_two = guided(sampling.in_bf16(student, True), 2.0)(z, logsnr, label)
    torch.testing.assert_close(at_two, sampling.in_bf16(student)(z, logsnr, (label, torch.full((4,), 2.0))))
    assert not torch.allclose(at_two, student(z, logsnr, label), atol=0.02)
    for scale in (0.5, 3.1):
        with pytest.raises(ValueError, match="from 1 to 3"):
            guided(student, scale)


def test_guidance_by_a_scale_for_each_picture():
    net = lambda z, logsnr, label: z * (1 + label.reshape(-1, 1, 1, 1))
    net.num_classes = 3
    z, logsnr, label, scales = torch.randn(3, 3, 2, 2), torch.zeros(3), torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.5, 3.0])
    together = guided(net, scales.reshape(-1, 1, 1, 1))(z, logsnr, label)
    for i in range(3):
        torch.testing.assert_close(together[i:i + 1], guided(net, scales[i].item())(z[i:i + 1], logsnr[:1], label[i:i + 1]))


@pytest.mark.parametrize("consistency", [False, True])
def test_students_learn_what_they_are_to(consistency):
    torch.manual_seed(0)
    teacher = torch.nn.Module()
    teacher.forward = lambda z, logsnr, label: gaussian(0.5)(z, logsnr, None) * label[1].reshape(-1, 1, 1, 1)  # the scale matters as it does to guidance
    student = distill.Student("uvit", 10, max_guidance=2.0, **{key: value for key, value in TINY.items() if key != "num_classes"}).eval()
    options = argparse.Namespace(batch=8, updates=100, seed=0, lr=3e-3, consistency=consistency, teacher_steps=8, bf16=False, flip=True)
    losses = []
    average = distill.distill(teacher, student, train.Shapes(16), logsnr_schedule_cosine, 4, options, lambda update, loss: losses.append(loss.item()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    z, logsnr, label = torch.randn(8, 3, 16, 16), torch.full((8,), -2.0), torch.zeros(8, dtype=torch.int64)
    ratio = [average(z, logsnr, (label, torch.full((8,), scale))).norm() for scale in (1.0, 2.0)]
    assert ratio[1] > 1.2 * ratio[0]


def test_distill_command(run, tmp_path, capsys):
    options = ["--updates", "2", "--batch", "4", "--no-bf16", "--lr", "0.01"]
    distill.main([run, "--steps", "2", "--teacher-steps", "8", "--out", f"{tmp_path}/run", *options])
    distill.main([run, "--steps", "4", "--teacher-steps", "8", "--out", f"{tmp_path}/consistent/", "--consistency", "--max-guidance", "2", "--seed", "1", "--device", "cpu", *options])
    distill.main([f"{tmp_path}/run-4steps/ckpt_0000002.pt", "--steps", "2", *options])  # a student as the teacher
    for name, steps in (("run-4steps", 4), ("run-2steps", 2), ("consistent-4steps", 4), ("run-4steps-2steps", 2)):
        net = load(f"{tmp_path}/{name}")[0]
        assert net.max_guidance == (2 if "consistent" in name else 3) and net.net.embedding.scale[2].weight.abs().max() > 0
        sampling.main([f"{tmp_path}/{name}", "--n", "2", "--guidance", "2", "--out", f"{tmp_path}/grid.png"])
        assert f"ddim, {steps} steps, guidance 2" in capsys.readouterr().out
    for args, text in (([run, "--steps", "4", "--teacher-steps", "8", "--out", f"{tmp_path}/run"], "run-4steps holds a run"), ([f"{tmp_path}/run-4steps", "--steps", "8", "--teacher-steps", "16"], "student of 4 steps")):
        with pytest.raises(ValueError, match=text):
            distill.main([*args, *options])


def test_a_teacher_that_does_not_say_how_it_is_sampled(run, tmp_path):
    state = sampling.load_checkpoint(run)
    for key in ("sampling", "captions", "text_encoder", "text_tokens"):
        del state["config"][key]  # as of runs before there were such settings
    torch.save(state, tmp_path / "old.pt")
    distill.main([str(tmp_path / "old.pt"), "--steps", "1", "--teacher-steps", "2", "--updates", "1", "--batch", "2", "--out", str(tmp_path / "new")])
    assert load(str(tmp_path / "new-1steps"))[1]["sampling"] == dict(sampler="ddim", steps=1)


def test_distill_on_two_ranks_is_as_on_one(run, tmp_path):
    options = [run, "--steps", "4", "--teacher-steps", "8", "--updates", "20", "--batch", "4", "--no-bf16", "--lr", "0.001", "--out"]
    distill.main([*options, str(tmp_path / "one")])
    distill.main([*options, str(tmp_path / "other"), "--seed", "1"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "related.distill", *options, str(tmp_path / "two")],
                   cwd=HERE, check=True, capture_output=True, timeout=300)
    one, other, two = (torch.cat([value.flatten() for key, value in load(str(tmp_path / f"{name}-4steps"))[0].state_dict().items() if "norm_k.bias" not in key])
                       for name in ("one", "other", "two"))  # of norm_k.bias the gradient is rounding alone
    assert (two - one).abs().max() < 0.1 * (other - one).abs().max()


def test_distill_other_nets_and_pictures(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "plain.npz", x=x)  # no labels
    np.savez(tmp_path / "moved.npz", x=x)
    train_tiny(tmp_path, "--data", str(tmp_path / "plain.npz"), "--model", "unet", "--model-args", '{"base_channels": 8}', "--out", str(tmp_path / "plain"))
    os.remove(tmp_path / "plain.npz")
    options = ["--steps", "1", "--teacher-steps", "2", "--updates", "1", "--batch", "4"]
    with pytest.raises(OSError, match="plain.npz"):
        distill.main([f"{tmp_path}/plain", *options])
    distill.main([f"{tmp_path}/plain", "--data", str(tmp_path / "moved.npz"), *options])
    assert load(f"{tmp_path}/plain-1steps")[0].max_guidance == 1
    sid = str(train_tiny(tmp_path, "--model", "related.sid2:ResidualUViT", *SMALL))
    with pytest.raises(ValueError, match="other classes"):
        distill.main([sid, "--data", str(tmp_path / "moved.npz"), *options])
    seen = []
    scales = lambda net, scale: seen.append(scale) or guided(net, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "guided", scales)
        distill.main([sid, *options])
    assert seen[0].flatten().tolist() == [1, 1, 1, 1] and "guidance_interval" not in load(f"{sid}-1steps")[1]["sampling"]  # logsnr is -10 there: not in its interval


@pytest.mark.parametrize("args, text", [(["--steps", "3"], "times 2, 4, 8"), (["--steps", "64"], "times 2, 4, 8"), (["--steps", "8", "--teacher-steps", "8", "--consistency"], "times 2, 3, 4"),
                                        (["--batch", "0"], "--batch"), (["--lr", "0"], "--lr"), (["--max-guidance", "0.5"], "--max-guidance"), (["--device", "abacus"], "--device abacus")])
def test_distill_says_what_cannot_be(run, args, text):
    with pytest.raises(ValueError, match=text):
        distill.main([run, *args])
