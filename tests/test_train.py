"""Tests of train.py: the training loop, its options, and what it writes."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import sample as sampling
import train
from loss import diffusion_loss
from support.checkpoint import load, load_checkpoint
from support.data import Shapes
from tests.helpers import (
    HERE,
    TINY_NET,
    TINY_OPTIONS,
    TINY_RUN,
    call,
    command,
    content_of,
    full_grid,
    last_step,
    log_lines,
    measured,
    named,
    no_grid,
    on_ranks,
    resumed_at,
    skip_grid,
    use_aot_eager,
)


def test_learning_rate():
    def rate(step, decay):
        return train.learning_rate(step, 2.0, 4, decay, 30)

    assert [rate(step, 0) for step in (0, 1, 3, 4, 29)] == [0.5, 1, 2, 2, 2]
    assert [rate(step, 0.5) for step in (10, 15, 20, 27)] == pytest.approx([2, 2, 4 / 3, 0.4])


def test_ema_is_the_formula():
    net, ema = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    net[1].running_mean += 1
    expected = [
        0.9 * e.detach() + 0.1 * n.detach() for e, n in zip(ema.parameters(), net.parameters())
    ]
    train.ema_update(ema, net, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ema.parameters(), expected))
    assert torch.equal(ema[1].running_mean, torch.ones(2))  # what is not a weight is copied


def test_a_run_writes_log_samples_and_checkpoints(run):
    assert sorted(os.listdir(run)) == [
        "ckpt_0000004.pt",
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ]
    assert json.loads(content_of(f"{run}/config.json"))["classes"] == Shapes.classes
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[-1]["images"] == 48
    assert all(
        math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["loss_by_logsnr"]
        for line in lines
    )
    assert Image.open(f"{run}/samples_0000006.png").size == (10 * 34 - 2, 6 * 34 - 2)
    net, config, schedule = load(run)
    assert config["steps"] == 6 and schedule(torch.tensor(0.5)).abs() < 1e-5 and not net.training
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    assert all(torch.equal(value, state["ema"][name]) for name, value in net.state_dict().items())
    assert any(
        not torch.equal(value, state["net"][name]) for name, value in net.state_dict().items()
    )


@pytest.mark.parametrize("shape", [(256, 64, 128), (1024, 256, 1024), (4, 64, 32, 64)])
def test_float32_products_have_float32_precision(run, shape):
    *batch, m, k, n = shape
    torch.manual_seed(0)
    a, b, c = torch.randn(*batch, m, k), torch.randn(*batch, n, k), torch.randn(*batch, m, n)
    for x, y in ((a, b.mT), (c, b), (c.mT, a)):  # a product, and those of its gradients
        exact = x.double() @ y.double()
        assert (
            x @ y - exact
        ).norm() < 1e-6 * exact.norm()  # bf16 and TF32 inside would be off by 1e-3


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(run, tmp_path, capsys):
    out = str(tmp_path / "part")
    call(train.main, *TINY_RUN, "--steps 6 --out", out)
    os.remove(f"{out}/ckpt_0000006.pt")
    call(train.main, "--out", out)  # everything else is in the run
    assert resumed_at(capsys.readouterr().out) == [4]
    whole, part = (load_checkpoint(f"{folder}/ckpt_0000006.pt") for folder in (run, out))
    for key in ("net", "ema"):
        assert all(torch.equal(whole[key][name], part[key][name]) for name in whole[key])


OPTIONS = [
    ["--model unet --space eps --schedule shifted:16"],
    [
        "--res 64 --multiscale --schedule interpolated:16:64 --model-args",
        '{"patching": "dwt_2", "num_transformer_blocks": 1}',
    ],
    ["--micro 4 --decay 0.5 --ema 0.5 --flip --label-drop 1 --seed 3 --size tiny"],
    ["--bf16 --device cpu"],
    ["--compile"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_of_train(tmp_path, monkeypatch, capsys, options):
    use_aot_eager(monkeypatch)
    own_net = any("--model" in str(option) for option in options)
    base = [TINY_OPTIONS] if own_net else TINY_RUN
    call(
        train.main,
        *base,
        "--steps 2 --sample-every 1 --save-every 1 --keep 1 --out",
        tmp_path / "run",
        *options,
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        "ckpt_0000002.pt",
        "config.json",
        "log.jsonl",
        "samples_0000001.png",
        "samples_0000002.png",
    ]
    assert math.isfinite(log_lines(tmp_path / "run")[0]["loss"])
    load(tmp_path / "run")  # compiled or not, the names of the weights are those of the net
    assert "--compile" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.cpu._is_avx512_supported(),
    reason="with ATEN_CPU_CAPABILITY=avx2, inductor mixes instruction sets: the loss is not finite",
)
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_training_compiled_by_inductor_equals_plain_training(tmp_path, capsys):
    net = json.dumps(TINY_NET | dict(num_res_blocks=[1]))
    options = [TINY_OPTIONS, "--steps 2 --log-every 1 --model-args", net]
    for option in ("--compile", "--no-compile"):
        call(train.main, *options, option, "--out", tmp_path / option)
    assert "--compile" not in capsys.readouterr().err
    compiled, plain = (log_lines(tmp_path / option) for option in ("--compile", "--no-compile"))
    for a, b in zip(compiled, plain, strict=True):
        assert math.isfinite(a["loss"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["--flip"],
        ["--label-drop 1"],
        ["--seed 3"],
        ["--space eps"],
        ["--schedule shifted:16"],
    ],
    ids=" ".join,
)
def test_options_reach_the_gradient(run, tmp_path, monkeypatch, options):
    plain, other = (
        gradients_of_a_step(run, tmp_path / name, args, monkeypatch)
        for name, args in (("plain", []), ("other", options))
    )
    assert (plain - other).norm() > 1e-3 * plain.norm()


def foreign_loss(net, x, schedule, label=None, *, t=None, eps=None):
    loss, logsnr = diffusion_loss(net, x, schedule, label, t=t, eps=eps)
    return 0 * loss + 7, logsnr


def test_an_external_net_and_loss_train_resume_and_sample(tmp_path):
    out = str(tmp_path / "run")
    options = [
        "--out",
        out,
        "--model tests.helpers:Foreign --batch 4 --save-every 1 --log-every 1 --no-bf16",
    ]
    call(
        train.main,
        *options,
        "--loss tests.test_train:foreign_loss --model-args",
        '{"width": 8}',
        "--steps 1",
    )
    with pytest.raises(ValueError, match=named("--loss", "tests.test_train:foreign_loss")):
        call(train.main, *options, "--steps 2")
    call(train.main, *options, "--loss tests.test_train:foreign_loss --steps 2")
    assert [line["loss"] for line in log_lines(out)] == [7, 7]
    call(
        sampling.main,
        out,
        "--model tests.helpers:Foreign --n 2 --steps 2 --sampler dpmpp --device cpu --bf16 --out",
        f"{tmp_path}/new/grid.png",
    )
    assert Image.open(tmp_path / "new" / "grid.png").size == (10 * 34 - 2, 32)
    with pytest.raises(ValueError, match=named("--model", "tests.helpers:Foreign")):
        load(out)
    state = load_checkpoint(f"{out}/ckpt_0000002.pt")
    assert torch.equal(state["net"]["conv.1.running_mean"], state["ema"]["conv.1.running_mean"])


def gradients_of_a_step(run, out, options, monkeypatch):
    """The gradients of step 5 of the run, taken in its copy `out` with other options."""
    found = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, limit: clip(
            [found.append(p.grad.clone()) or p for p in parameters], limit
        ),
    )
    no_grid(monkeypatch)
    os.makedirs(out)
    shutil.copy(f"{run}/ckpt_0000004.pt", out)
    call(train.main, "--out", out, "--steps 5", *options)
    return torch.cat([gradient.flatten() for gradient in found])


def test_micro_batches_equal_one_batch(run, tmp_path, monkeypatch):
    whole = gradients_of_a_step(run, tmp_path / "whole", [], monkeypatch)
    parts = gradients_of_a_step(run, tmp_path / "parts", ["--micro 2"], monkeypatch)
    assert whole.abs().max() > 0 and (whole - parts).norm() < 1e-5 * whole.norm()


def stopped(monkeypatch, name, number, call):
    """Lets train's function send this process a signal at its call-th call, then do its work."""
    function, calls = getattr(train, name), []

    def signaling(*args, **options):
        calls.append(1)
        if len(calls) == call:
            for _ in range(2 if number == signal.SIGTERM else 1):  # a scheduler's and torchrun's
                os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(train, name, signaling)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_after_the_step_and_nothing_is_lost(
    run, tmp_path, monkeypatch, capsys, number
):
    out = str(tmp_path / "run")
    stopped(monkeypatch, "ema_update", number, call=3)

    # The test may run under nohup, which ignores SIGHUP.
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as error:
            call(train.main, *TINY_RUN, "--steps 6 --out", out)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert error.value.code == 128 + number
    output = capsys.readouterr().out
    assert re.search(rf"(?m)^(?=.*{number.name}).*\bstep 3\b", output)
    assert sorted(os.listdir(out)) == ["ckpt_0000003.pt", "config.json", "log.jsonl"]
    call(train.main, "--out", out)
    whole, part = (load_checkpoint(folder) for folder in (run, out))
    assert part["step"] == 6 and all(
        torch.equal(whole["ema"][name], part["ema"][name]) for name in whole["ema"]
    )


def test_a_signal_does_not_wait_for_a_grid(tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped(monkeypatch, "sample_batches", signal.SIGTERM, call=1)
    with pytest.raises(SystemExit):
        call(train.main, *TINY_RUN, "--steps 6 --sample-every 1 --out", out)
    assert (
        sorted(os.listdir(out)) == ["ckpt_0000001.pt", "config.json", "log.jsonl"]
        and last_step(out) == 0
    )  # the first line is that of step 2
    no_grid(monkeypatch)
    call(train.main, "--out", out, "--steps 1")
    assert sorted(os.listdir(out)) == [
        "ckpt_0000001.pt",
        "config.json",
        "log.jsonl",
        "samples_0000001.png",
    ]


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with pytest.raises(ValueError, match=named("step 6", "ckpt_0000004.pt")):
        call(train.main, "--out", tmp_path, "--lr 1e30 --steps 8")
    assert [path.name for path in tmp_path.glob("ckpt*")] == ["ckpt_0000004.pt"]


def test_tensorboard(run, tmp_path, monkeypatch):
    no_grid(monkeypatch)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it was not installed
        with pytest.raises(ValueError, match="--tensorboard"):
            call(train.main, "--out", tmp_path, "--tensorboard")
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip(
            "what it writes is read back where tensorboard is installed; "
            "the message without it was tested"
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call(train.main, "--out", tmp_path, "--tensorboard")
    events = EventAccumulator(str(tmp_path)).Reload()
    line = log_lines(tmp_path)[0]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (6, pytest.approx(line["loss"]))
    ]
    assert [event.step for event in events.Images("samples")] == [6]


def test_a_run_with_other_classes_is_not_resumed(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    with pytest.raises(ValueError, match=named(tmp_path, Shapes.classes[0])):
        call(train.main, "--out", tmp_path, "--data", tmp_path / "data.npz")


@pytest.mark.parametrize("ranks", [1, 2])
def test_fid_in_the_loop_equals_that_of_the_samples(
    run, sets, tmp_path, monkeypatch, capsys, ranks
):
    full_grid(monkeypatch)  # it is the function that draws for the FID, too
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / "run")
    np.savez(
        tmp_path / "ref.npz",
        mu=np.linspace(0, 1, 9),
        sigma=np.diag(np.linspace(0, 1, 9)),
        features="tests.helpers:Colors",
    )
    options = [
        "--steps 5 --fid-every 5 --fid-images 9 --fid-ref ref.npz",
        "--fid-features tests.helpers:Colors --micro 2 --out run",
    ]
    if ranks == 1:
        monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)
        call(train.main, options)
        output, errors = capsys.readouterr()
    else:
        statuses, output, errors = on_ranks(train.main, *options, cwd=tmp_path, prepare=skip_grid)
        assert statuses == [0, 0], errors
    lines = log_lines("run")
    assert [line["step"] for line in lines] == [5, 5] and lines[1]["fid_images"] == 9, errors
    assert re.search(rf"FD-Colors {lines[1]['FD-Colors']:.3f}\D+9\b", output)
    samples = ["--sampler dpmpp --steps 64 --n 9 --device cpu --out", tmp_path / "samples.npz"]
    call(sampling.main, tmp_path / "run", *samples)
    found, _ = measured(
        tmp_path / "ref.npz", tmp_path / "samples.npz", "--features tests.helpers:Colors"
    )
    assert float(found[2].split()[1]) == pytest.approx(lines[1]["FD-Colors"], rel=1e-3)


def test_a_loss_that_is_not_finite_is_located(run, tmp_path, monkeypatch):
    plain = train.diffusion_loss

    def infected(*args, t, **options):
        loss, logsnr = plain(
            *args,
            t=torch.where(
                torch.arange(len(t)) < 2, torch.tensor([0.5, 0.9]).repeat(len(t))[: len(t)], t
            ),
            **options,
        )  # logsnr 0 and -3.7
        calls.append(1)
        return torch.where(
            torch.arange(len(t)) < 2, loss * (value if len(calls) == 2 else 1), loss
        ), logsnr

    monkeypatch.setattr(train, "diffusion_loss", infected)
    for value in (math.nan, math.inf):
        calls = []
        out = tmp_path / str(value)
        out.mkdir()
        shutil.copy(f"{run}/ckpt_0000004.pt", out)
        with pytest.raises(ValueError) as error:
            call(train.main, "--out", out, "--steps 12 --log-every 5 --save-every 7")
        message, _, rest = str(error.value).partition(f"{out}/ckpt_0000004.pt")
        assert re.search(named("step", "logsnr", "gradient"), message) and not rest
        assert [int(x) for x in re.findall(r"-?\d+", message)] == [6, -4, -2, 0, 2]
        assert [path.name for path in out.glob("ckpt*")] == ["ckpt_0000004.pt"] and last_step(
            out
        ) == 5


def test_the_largest_gradient_is_logged(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    no_grid(monkeypatch)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args: norms.append(clip(*args) * (7 if len(norms) == 1 else 1)) or norms[-1],
    )  # a spike
    call(train.main, "--out", tmp_path, "--steps 10 --log-every 3 --save-every 100")
    lines = log_lines(tmp_path)
    assert [line["grad_norm"] for line in lines] == [norms[i].item() for i in (1, 4, 5)]
    assert [line["max_grad_norm"] for line in lines] == [
        max(norms[i].item() for i in steps) for steps in ((0, 1), (2, 3, 4), (5,))
    ]


def test_a_sample_grid_takes_64_guided_steps(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000006.pt", tmp_path)
    drawn = []
    draw = train.sample_batches

    def record(*args, **options):
        drawn.append(options)
        return draw(*args, **options)

    monkeypatch.setattr(train, "sample_batches", record)
    call(train.main, "--out", tmp_path)
    (options,) = drawn
    assert (options["steps"], options["sampler"], options["guidance"]) == (64, "dpmpp", 2.0)


def test_a_missing_grid_is_drawn_at_resume(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = (out / "samples_0000006.png").read_bytes()
    call(train.main, "--out", out)
    assert "samples_0000006.png" not in capsys.readouterr().out
    os.remove(out / "samples_0000006.png")
    call(train.main, "--out", out)
    assert (out / "samples_0000006.png").read_bytes() == before


@pytest.mark.slow
def test_training_continues_without_a_compiler(run, tmp_path):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    result = command(
        f"{HERE}/train.py",
        "--out . --steps 5 --compile",
        cwd=tmp_path,
        env=os.environ | dict(CXX="no-such-compiler"),
    )
    assert (
        result.returncode == 0
        and "no-such-compiler" in result.stderr
        and "step 5/5" in result.stdout
    ), result.stdout + result.stderr
