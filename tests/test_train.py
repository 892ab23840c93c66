"""Tests of train.py: the training loop, its options, and what it writes."""

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import sample as sampling
import train
from loss import diffusion_loss
from related import ppap, tstitch
from schedule import make_schedule
from support.checkpoint import load, load_checkpoint
from support.data import Shapes, load_batch
from support.settings import make_config
from tests.helpers import (
    HERE,
    TINY_NET,
    TINY_OPTIONS,
    TINY_RUN,
    TINY_UVIT,
    call,
    command,
    content_of,
    full_grid,
    last_step,
    log_lines,
    measured,
    named,
    needs_inductor,
    no_grid,
    on_ranks,
    randomize,
    resumed_at,
    skip_grid,
    use_aot_eager,
)
from uvit import UViT


def test_learning_rate():
    def rate(step, decay):
        return train.learning_rate(step, 2.0, 4, decay, 30)

    assert [rate(step, 0) for step in (0, 1, 3, 4, 29)] == [0.5, 1, 2, 2, 2]
    assert [rate(step, 0.5) for step in (10, 15, 20, 27)] == pytest.approx([2, 2, 4 / 3, 0.4])


def test_ema_update_follows_the_formula():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean += 1
    pairs = zip(ema.parameters(), net.parameters(), strict=True)
    expected = [0.9 * old.detach() + 0.1 * new.detach() for old, new in pairs]
    train.ema_update(ema, net, 0.9)
    for average, value in zip(ema.parameters(), expected, strict=True):
        assert torch.allclose(average, value, atol=1e-7)
    # Buffers are not averaged, but copied.
    assert torch.equal(ema[1].running_mean, torch.ones(2))


def test_a_run_writes_log_samples_and_checkpoints(run):
    assert sorted(os.listdir(run)) == [
        "ckpt_0000004.pt",
        "ckpt_0000006.pt",
        "config.json",
        "log.jsonl",
        "samples_0000006.png",
    ]
    assert json.loads(content_of(f"{run}/config.json"))["classes"] == Shapes.classes

    # The run logs every two steps of 8 images.
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["images"] == 48
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["loss_by_logsnr"]

    # The grid has 6 rows of 10 images of 32 px, with 2 px between them.
    assert Image.open(f"{run}/samples_0000006.png").size == (10 * 34 - 2, 6 * 34 - 2)

    # The network that samples has the EMA weights, which differ from the trained ones.
    net, config, schedule = load(run)
    assert config["steps"] == 6
    assert schedule(torch.tensor(0.5)).abs() < 1e-5
    assert not net.training
    state = torch.load(f"{run}/ckpt_0000006.pt", weights_only=True)
    weights = net.state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, state["ema"][name]), name
    assert any(not torch.equal(weight, state["net"][name]) for name, weight in weights.items())


@pytest.fixture
def precision_of_training():
    """The precision of float32 products that train.py chooses on this CPU."""
    before = torch.get_float32_matmul_precision()
    train.set_float32_precision(torch.device("cpu"))
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(256, 64, 128), (1024, 256, 1024), (4, 64, 32, 64)])
def test_float32_products_have_float32_precision(precision_of_training, shape):
    *batch, m, k, n = shape
    torch.manual_seed(0)
    a = torch.randn(*batch, m, k)
    b = torch.randn(*batch, n, k)
    gradient = torch.randn(*batch, m, n)
    # The product a b^T, and the two products of its backward pass.
    for x, y in ((a, b.mT), (gradient, b), (gradient.mT, a)):
        exact = x.double() @ y.double()
        # The error would be about 1e-3 if the product used bfloat16 or TF32.
        assert (x @ y - exact).norm() < 1e-6 * exact.norm()


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(run, tmp_path, capsys):
    out = tmp_path / "part"
    call(train.main, *TINY_RUN, "--steps 6 --out", out)
    os.remove(out / "ckpt_0000006.pt")

    # The checkpoint stores all settings: --out is enough to resume.
    call(train.main, "--out", out)
    assert resumed_at(capsys.readouterr().out) == [4]
    whole = load_checkpoint(f"{run}/ckpt_0000006.pt")
    part = load_checkpoint(out / "ckpt_0000006.pt")
    for key in ("net", "ema"):
        for name, weight in whole[key].items():
            assert torch.equal(part[key][name], weight), (key, name)


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
    out = tmp_path / "run"
    # Options that choose a network take the place of that of TINY_RUN.
    own_net = any("--model" in option for option in options)
    base = [TINY_OPTIONS] if own_net else TINY_RUN
    every_step = "--steps 2 --sample-every 1 --save-every 1 --keep 1 --out"
    call(train.main, *base, every_step, out, *options)
    assert sorted(os.listdir(out)) == [
        "ckpt_0000002.pt",
        "config.json",
        "log.jsonl",
        "samples_0000001.png",
        "samples_0000002.png",
    ]
    assert math.isfinite(log_lines(out)[0]["loss"])

    # The weights of a compiled network have the names of the network's own weights.
    load(out)

    # Where --compile fails, a warning names it.
    assert "--compile" not in capsys.readouterr().err


@pytest.mark.slow
@needs_inductor
def test_training_compiled_by_inductor_equals_plain_training(tmp_path, capsys):
    net = json.dumps(TINY_NET | dict(num_res_blocks=[1]))
    options = [TINY_OPTIONS, "--steps 2 --log-every 1 --model-args", net]
    call(train.main, *options, "--compile --out", tmp_path / "compiled")
    call(train.main, *options, "--no-compile --out", tmp_path / "plain")
    assert "--compile" not in capsys.readouterr().err

    compiled = log_lines(tmp_path / "compiled")
    plain = log_lines(tmp_path / "plain")
    for a, b in zip(compiled, plain, strict=True):
        assert math.isfinite(a["loss"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def gradients_of_a_step(run, out, options, monkeypatch):
    """Resume the run at step 4 in the folder out, with other options, and train one step.

    Returns the gradients of all weights in one vector.
    """
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def record_and_clip(parameters, limit):
        parameters = list(parameters)
        gradients.extend(parameter.grad.flatten().clone() for parameter in parameters)
        return clip(parameters, limit)

    os.makedirs(out)
    shutil.copy(f"{run}/ckpt_0000004.pt", out)
    with monkeypatch.context() as patch:
        no_grid(patch)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record_and_clip)
        call(train.main, "--out", out, "--steps 5", *options)
    return torch.cat(gradients)


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
    plain = gradients_of_a_step(run, tmp_path / "plain", [], monkeypatch)
    other = gradients_of_a_step(run, tmp_path / "other", options, monkeypatch)
    assert (plain - other).norm() > 1e-3 * plain.norm()


def test_micro_batches_equal_one_batch(run, tmp_path, monkeypatch):
    whole = gradients_of_a_step(run, tmp_path / "whole", [], monkeypatch)
    parts = gradients_of_a_step(run, tmp_path / "parts", ["--micro 2"], monkeypatch)
    assert whole.abs().max() > 0
    assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_dropout_masks_depend_on_step_rank_and_micro_batch(run, tmp_path, monkeypatch):
    # A step of two micro-batches on rank 0 passes these seeds.
    seeds = []
    plain = train.training_step

    def recorded(*args, dropout_seed, **options):
        seeds.append(dropout_seed)
        return plain(*args, dropout_seed=dropout_seed, **options)

    monkeypatch.setattr(train, "training_step", recorded)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    call(train.main, "--out", tmp_path, "--steps 5 --micro 4")
    assert seeds == [(0, 0), (0, 1)]

    # The same micro-batch has the same gradients for equal seeds, and others for other seeds.
    net = UViT(**TINY_UVIT | dict(transformer_dropout=0.5))
    randomize(net)
    images, labels = load_batch(Shapes(16), range(2))

    def gradients(step, dropout_seed):
        net.zero_grad()
        plain(
            net,
            images,
            labels % 3,
            range(2),
            loss_fn=fixed_time_loss,
            schedule=make_schedule("cosine", 16),
            seed=0,
            step=step,
            dropout_seed=dropout_seed,
        )
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    first = gradients(0, (0, 0))
    assert torch.equal(first, gradients(0, (0, 0)))
    for step, seed in ((0, (0, 1)), (0, (1, 0)), (1, (0, 0))):
        assert not torch.allclose(first, gradients(step, seed), rtol=1e-3)


def fixed_time_loss(net, x, schedule, label, *, t, eps):
    """The loss at t = 0.5 with noise of ones, so that only dropout is random."""
    return diffusion_loss(net, x, schedule, label, t=torch.full_like(t, 0.5), eps=0 * eps + 1)


def foreign_loss(net, x, schedule, label=None, *, t=None, eps=None):
    """A loss for --loss: always 7, with gradients of 0. Returns (loss, logsnr)."""
    loss, logsnr = diffusion_loss(net, x, schedule, label, t=t, eps=eps)
    return 0 * loss + 7, logsnr


def test_an_external_net_and_loss_train_resume_and_sample(tmp_path):
    out = tmp_path / "run"
    model = "--model tests.helpers:Foreign"
    loss = "--loss tests.test_train:foreign_loss"
    options = [model, "--batch 4 --save-every 1 --log-every 1 --no-bf16 --out", out]
    call(train.main, *options, loss, "--steps 1 --model-args", '{"width": 8}')

    # A checkpoint imports no code: the command line must name the loss again.
    with pytest.raises(ValueError, match=named("--loss", "tests.test_train:foreign_loss")):
        call(train.main, *options, "--steps 2")
    call(train.main, *options, loss, "--steps 2")
    assert [line["loss"] for line in log_lines(out)] == [7, 7]

    # sample.py draws a row of the grid, in a folder that it creates.
    grid = tmp_path / "new" / "grid.png"
    draw = "--n 2 --steps 2 --sampler dpmpp --device cpu --bf16 --out"
    call(sampling.main, out, model, draw, grid)
    assert Image.open(grid).size == (10 * 34 - 2, 32)

    # The network must be named again, too.
    with pytest.raises(ValueError, match=named("--model", "tests.helpers:Foreign")):
        load(out)

    # Buffers are copied to the EMA network.
    state = load_checkpoint(out / "ckpt_0000002.pt")
    assert torch.equal(state["net"]["conv.1.running_mean"], state["ema"]["conv.1.running_mean"])


def send_signal_at(monkeypatch, name, number, at):
    """Patch the function `name` of train: its call number `at` first sends a signal.

    The process sends the signal to itself. The function then does its work.
    """
    function = getattr(train, name)
    calls = []
    # A scheduler and torchrun may each send a SIGTERM. The second one must not end the process.
    times = 2 if number == signal.SIGTERM else 1

    def signaling(*args, **options):
        calls.append(1)
        if len(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(train, name, signaling)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_after_the_step_and_nothing_is_lost(
    run, tmp_path, monkeypatch, capsys, number
):
    out = tmp_path / "run"
    send_signal_at(monkeypatch, "ema_update", number, at=3)

    # The test may run under nohup, which ignores SIGHUP: set a handler. Training restores it.
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as error:
            call(train.main, *TINY_RUN, "--steps 6 --out", out)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)

    # The run stops after step 3, with the exit status that shells expect.
    assert error.value.code == 128 + number
    output = capsys.readouterr().out
    assert re.search(rf"(?m)^(?=.*{number.name}).*\bstep 3\b", output)
    assert sorted(os.listdir(out)) == ["ckpt_0000003.pt", "config.json", "log.jsonl"]

    # After it was resumed, the run equals an uninterrupted one.
    call(train.main, "--out", out)
    whole = load_checkpoint(run)
    part = load_checkpoint(out)
    assert part["step"] == 6
    for name, weight in whole["ema"].items():
        assert torch.equal(part["ema"][name], weight), name


def test_a_signal_does_not_wait_for_a_grid(tmp_path, monkeypatch):
    out = tmp_path / "run"
    send_signal_at(monkeypatch, "sample_batches", signal.SIGTERM, at=1)
    with pytest.raises(SystemExit):
        call(train.main, *TINY_RUN, "--steps 6 --sample-every 1 --out", out)
    assert sorted(os.listdir(out)) == ["ckpt_0000001.pt", "config.json", "log.jsonl"]
    # The log is empty: its first line would be that of step 2.
    assert last_step(out) == 0

    # The resumed run draws the grid.
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


def test_tensorboard_that_is_not_installed_is_reported(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    # An entry of None makes the import fail.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard"):
        call(train.main, "--out", tmp_path, "--tensorboard")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    no_grid(monkeypatch)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    call(train.main, "--out", tmp_path, "--tensorboard")
    line = log_lines(tmp_path)[0]
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(6, pytest.approx(line["loss"]))]
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
    # The samples of the FID come from the same function as the grid. They need all steps.
    full_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path / "run")
    np.savez(
        tmp_path / "ref.npz",
        mu=np.linspace(0, 1, 9),
        sigma=np.diag(np.linspace(0, 1, 9)),
        features="tests.helpers:Colors",
    )
    features = "tests.helpers:Colors"
    options = [
        "--steps 5 --fid-every 5 --fid-images 9 --fid-ref ref.npz --micro 2 --out run",
        f"--fid-features {features}",
    ]

    # Train one step, without a grid, and measure the FID of 9 samples.
    if ranks == 1:
        monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)
        call(train.main, options)
        output, errors = capsys.readouterr()
    else:
        statuses, output, errors = on_ranks(train.main, *options, cwd=tmp_path, prepare=skip_grid)
        assert statuses == [0, 0], errors
    lines = log_lines("run")
    assert [line["step"] for line in lines] == [5, 5], errors
    assert lines[1]["fid_images"] == 9, errors
    distance = lines[1]["FD-Colors"]
    # The line says which samples these are, and what they are compared with.
    which = rf"9 samples \(numbers 0 to 8 of seed 0, class = number mod {len(Shapes.classes)};"
    assert re.search(rf"FD-Colors {distance:.3f} of {which}.*ref.npz \(N = unknown\)", output)
    assert "sFD-Colors" not in lines[1]

    # sample.py draws the same samples, and fid.py measures the same distance.
    samples = tmp_path / "samples.npz"
    call(sampling.main, "run", "--sampler dpmpp --steps 64 --n 9 --device cpu --out", samples)
    printed, _ = measured(tmp_path / "ref.npz", samples, f"--features {features}")
    assert float(printed[2].split()[1]) == pytest.approx(distance, rel=1e-3)


def test_sfid_in_the_loop_equals_that_of_the_samples(run, tmp_path, monkeypatch, capsys):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    # The samples are random pixels, in rounds of up to 4.
    pixels = torch.randint(0, 256, (60, 32, 32, 3), dtype=torch.uint8)

    def draw(*args, **options):
        return [(i, pixels[i : i + 4][: len(args[3]) - i]) for i in range(0, len(args[3]), 4)]

    monkeypatch.setattr(train, "sample_batches", draw)
    # A Gaussian of each kind of features: 9 moments of colors, and 4 corners.
    gaussian = dict(mu=np.zeros(9), sigma=np.eye(9), n=123, features="tests.helpers:Spatial")
    spatial = dict(mu_s=np.full(4, 100.0), sigma_s=100 * np.eye(4))
    np.savez(tmp_path / "ref.npz", **gaussian, **spatial)
    options = "--steps 5 --fid-every 5 --fid-images 7 --fid-features tests.helpers:Spatial"
    call(train.main, options, "--out", tmp_path, "--fid-ref", tmp_path / "ref.npz")
    values = log_lines(tmp_path)[-1]

    # fid.py gives the same for the same images.
    np.savez(tmp_path / "samples.npz", arr_0=pixels[:7].numpy())
    features = "--features tests.helpers:Spatial"
    printed, _ = measured(tmp_path / "ref.npz", tmp_path / "samples.npz", features)
    assert printed[2].startswith(f"FD-Spatial {values['FD-Spatial']:.4f} ")
    assert printed[3].startswith(f"sFD-Spatial {values['sFD-Spatial']:.4f} ")
    assert values["sFD-Spatial"] > 1
    text = "FD-Spatial {FD-Spatial:.3f}, sFD-Spatial {sFD-Spatial:.3f} of 7 samples "
    output = capsys.readouterr().out
    assert text.format_map(values) in output
    assert "N = 123" in output

    # Spatial statistics of another network are refused.
    np.savez(tmp_path / "other.npz", **gaussian, mu_s=np.zeros(3), sigma_s=np.eye(3))
    with pytest.raises(ValueError, match=named("--fid-ref", "other.npz", "mu_s", 3, 4)):
        call(train.main, options, "--out", tmp_path / "new", "--fid-ref", tmp_path / "other.npz")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_located(run, tmp_path, monkeypatch, value):
    compute_loss = train.diffusion_loss
    calls = []

    def infected_loss(*args, t, **options):
        """The loss, multiplied by value in the second call for the first two examples."""
        is_infected = torch.arange(len(t)) < 2
        # These times have logsnr 0 and -3.7.
        times = torch.tensor([0.5, 0.9]).repeat(len(t))[: len(t)]
        loss, logsnr = compute_loss(*args, t=torch.where(is_infected, times, t), **options)
        calls.append(1)
        factor = value if len(calls) == 2 else 1
        return torch.where(is_infected, loss * factor, loss), logsnr

    monkeypatch.setattr(train, "diffusion_loss", infected_loss)
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    with pytest.raises(ValueError) as error:
        call(train.main, "--out", tmp_path, "--steps 12 --log-every 5 --save-every 7")

    # The message ends with the last good checkpoint.
    message, _, rest = str(error.value).partition(f"{tmp_path}/ckpt_0000004.pt")
    assert re.search(named("step", "logsnr", "gradient"), message)
    assert not rest
    # It names step 6, and the bins of logsnr from -4 to -2 and from 0 to 2.
    assert [int(x) for x in re.findall(r"-?\d+", message)] == [6, -4, -2, 0, 2]
    assert [path.name for path in tmp_path.glob("ckpt*")] == ["ckpt_0000004.pt"]
    assert last_step(tmp_path) == 5


def test_the_largest_gradient_is_logged(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000004.pt", tmp_path)
    no_grid(monkeypatch)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_with_spike(*args):
        """Clip. Returns the norm, which is 7 times as large in the second call."""
        factor = 7 if len(norms) == 1 else 1
        norms.append(factor * clip(*args))
        return norms[-1]

    # Six steps: 5 and 6, then 7 to 9, then 10 are logged together.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_with_spike)
    call(train.main, "--out", tmp_path, "--steps 10 --log-every 3 --save-every 100")
    lines = log_lines(tmp_path)
    norms = [norm.item() for norm in norms]
    assert [line["grad_norm"] for line in lines] == [norms[1], norms[4], norms[5]]
    largest = [max(norms[0:2]), max(norms[2:5]), norms[5]]
    assert [line["max_grad_norm"] for line in lines] == largest


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


def test_a_run_without_dropped_labels_is_not_guided(run, tmp_path, monkeypatch, capsys):
    drawn = []

    def record(*args, **options):
        drawn.append(options["guidance"])
        labels = args[3]
        return [(0, torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8))]

    # Neither the grid of a run on classes nor that of a run on captions.
    monkeypatch.setattr(train, "sample_batches", record)
    options = [*TINY_RUN, "--label-drop 0 --steps 1 --out"]
    call(train.main, *options, tmp_path / "run")
    call(train.main, *options, tmp_path / "text", "--captions")
    assert drawn == [1.0, 1.0]
    assert "guidance 1," in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["config"]["label_drop"] == 0

    # Other commands refuse guidance, and name the reason.
    out = ["--n 2 --steps 2 --out", tmp_path / "grid.png"]
    call(sampling.main, tmp_path / "run", *out)
    for main, options in (
        (sampling.main, [tmp_path / "run", "--guidance 2", *out]),
        (sampling.main, [tmp_path / "text", "--prompt star --guidance 2", *out]),
        (sampling.main, [tmp_path / "text", "--prompt star --negative ring", *out]),
        (tstitch.main, [*2 * [tmp_path / "run"], "--fraction 0.5 --guidance 2", *out]),
        (ppap.main, [tmp_path / "run", "--out", tmp_path / "guide.pt"]),
    ):
        with pytest.raises(ValueError, match=named("--label-drop 0", "--guidance")):
            call(main, *options)


def test_early_grids_take_the_steps_of_the_recipe(run, tmp_path, monkeypatch):
    shutil.copy(f"{run}/ckpt_0000006.pt", tmp_path)
    drawn = []

    def record(*args, **options):
        drawn.append(options["steps"])
        return [(0, torch.zeros(60, 8, 8, 3, dtype=torch.uint8))]

    monkeypatch.setattr(train, "sample_batches", record)
    continue_config = train.continue_config

    def with_early_steps(*args):
        return continue_config(*args) | dict(sampling=dict(early_steps=16))

    monkeypatch.setattr(train, "continue_config", with_early_steps)
    call(train.main, "--steps 9 --sample-every 2 --out", tmp_path)
    # The grids of steps 6 and 8, then that of step 9, the last.
    assert drawn == [16, 16, 64]


@pytest.fixture
def fake_clock(monkeypatch):
    """A list with the time in seconds, which only training steps and what a test adds advance."""
    clock = [1000.0]
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: clock[0]))
    return clock


def takes(seconds, clock, monkeypatch, name):
    """Make a function of train.py take a number of seconds, or what seconds(call number) says."""
    function = getattr(train, name)
    calls = itertools.count()

    def slow_function(*args, **options):
        clock[0] += seconds(next(calls)) if callable(seconds) else seconds
        return function(*args, **options)

    monkeypatch.setattr(train, name, slow_function)


def progress_lines(capsys):
    """The lines of progress that were printed since the last call."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_throughput_leaves_out_the_first_step_grids_and_checkpoints(
    tmp_path, monkeypatch, capsys, fake_clock
):
    no_grid(monkeypatch)
    takes(lambda i: 100 if i == 0 else 2, fake_clock, monkeypatch, "training_step")
    takes(8, fake_clock, monkeypatch, "save_checkpoint")
    takes(4, fake_clock, monkeypatch, "make_grid")
    options = "--steps 9 --log-every 3 --save-every 3 --sample-every 3 --batch 8 --micro 8"
    call(train.main, TINY_RUN, options, "--out", tmp_path)

    # Steps of 8 images take 2 seconds, after a first one of 100.
    lines = log_lines(tmp_path)
    assert [line["img_per_s"] for line in lines] == [4.0, 4.0, 4.0]
    # Three steps take 6 seconds, and the checkpoint and the grid of the last line 12.
    assert [line["elsewhere"] for line in lines] == [100 / 104, 12 / 18, 12 / 18]
    printed = progress_lines(capsys)
    assert "4 img/s" in printed[1]
    assert "67 % of the time elsewhere" in printed[2]


def fake_step(model, images, *args, **options):
    """In place of train.training_step, without computing: zero losses and gradients."""
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return torch.zeros(len(images)), torch.zeros(len(images))


@pytest.mark.parametrize(
    "seconds, expected",
    [
        # Steps of 1 second: after 5 seconds, then every 30.
        (1, [5, 35, 65, 90]),
        # Steps of 2 minutes: a line after each of them.
        (120, list(range(1, 91))),
    ],
)
def test_progress_is_printed_by_time(tmp_path, monkeypatch, capsys, fake_clock, seconds, expected):
    skip = dict(save_sample_grid=lambda run: 0, training_step=fake_step)
    for name, function in skip.items():
        monkeypatch.setattr(train, name, function)
    takes(seconds, fake_clock, monkeypatch, "training_step")
    call(train.main, TINY_RUN, "--steps 90 --log-every 90 --save-every 90 --out", tmp_path)
    printed = progress_lines(capsys)
    assert [int(line.split("/")[0].removeprefix("step ")) for line in printed] == expected
    # Only lines of the log have a loss; the time left is in all of them.
    assert ["loss" in line for line in printed] == [False] * (len(printed) - 1) + [True]
    if seconds == 1:
        assert printed[0] == "step 5/90  8 img/s  1:25 left"
    else:
        # After one step there is no throughput yet.
        assert printed[0] == "step 1/90  2 h 58 min left"


@pytest.mark.parametrize("gpus, world, hint", [(8, 1, True), (8, 2, False), (1, 1, False)])
def test_a_run_on_one_of_several_gpus_says_how_to_use_all(monkeypatch, capsys, gpus, world, hint):
    config = dict(model="uvit", size="tiny", steps=10, classes=Shapes.classes, fsdp=False)
    run = train.Run(config, "runs/x", 0, world, torch.device("cuda"), Shapes(32))
    run.net = nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", ["train.py", "--res", "256", "--data", "my images"])
    train.announce(run, None)
    expected = "torchrun --nproc-per-node 8 train.py --res 256 --data 'my images'"
    assert (expected in capsys.readouterr().out) == hint


def announced_time(given, seconds_per_image, monkeypatch, capsys):
    """What announce_time prints if an image takes seconds_per_image(res)."""

    def estimate(config):
        assert config["model_args"]["num_classes"] == 10
        return seconds_per_image(config["model_args"]["res"])

    monkeypatch.setattr(train, "cpu_seconds_per_image", estimate)
    device = torch.device("cpu")
    dataset = Shapes(given["res"])
    config = make_config(given, device, dataset)
    run = train.Run(config, "runs/x", 0, 1, device, dataset)
    run.net = nn.Linear(4000, 4000)
    train.announce_time(run)
    return capsys.readouterr().out


def test_a_long_run_on_a_cpu_says_what_a_smaller_res_takes(monkeypatch, capsys):
    given = dict(res=256, steps=100, batch=10)
    text = announced_time(given, lambda res: res / 10, monkeypatch, capsys)
    # 1,000 images of 25.6 seconds, and 41,600 of 3.2.
    assert text == (
        "on this CPU the run takes roughly 7 h 06 min\n"
        "the recipe of --size tiny --res 32 takes roughly 36 h 58 min\n"
    )
    # A run of less than an hour says nothing: its progress soon tells.
    assert not announced_time(given, lambda res: res / 100, monkeypatch, capsys)


def test_a_missing_grid_is_drawn_at_resume(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = (out / "samples_0000006.png").read_bytes()

    # A grid that exists is not drawn again.
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
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    assert "no-such-compiler" in result.stderr, printed
    assert "step 5/5" in result.stdout, printed
