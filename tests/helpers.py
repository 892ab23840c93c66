"""What several test files share: tiny networks and runs, commands, and processes."""

import contextlib
import ctypes
import functools
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import fid
import sample as sampling
import train
from schedule import alpha_sigma
from support.checkpoint import load_checkpoint
from support.runtime import run_command
from unet import UNet
from uvit import UViT

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of the project
float64 = torch.float64

# ---------------------------------------------------------------- networks and images

TINY = dict(res=16, num_classes=3, base_channels=16, emb_channels=32, channel_multiplier=(1, 2))
TINY_UVIT = TINY | dict(num_res_blocks=(1,), num_transformer_blocks=2, transformer_dropout=0.0)
TINY_UNET = TINY | dict(num_res_blocks=(1, 1), dropout=0.0, attn_resolutions=(8,))
NETS = [(UViT, TINY_UVIT), (UNet, TINY_UNET)]


def tiny_nets(**fields):
    """A tiny U-ViT and a tiny U-Net, always with the same weights."""
    torch.manual_seed(0)
    return [UViT(**TINY_UVIT | fields), UNet(**TINY_UNET | fields)]


def randomize(net):
    """Fill zero-initialized weights with random numbers, so that every weight has an effect."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def fill_random(net):
    """Fill all weights with random numbers."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def gaussian_net(mean, variance):
    """The exact denoiser of independent Gaussian values; mean and variance broadcast against z."""

    def net(z, logsnr, label=None):
        alpha, sigma = alpha_sigma(logsnr, like=z)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma

    return net


NEEDS_INDUCTOR = [
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.cpu._is_avx512_supported(),
        reason="with ATEN_CPU_CAPABILITY=avx2, inductor mixes instruction sets: NaN",
    ),
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
    ),
]


class Foreign(nn.Module):
    """A network that this project does not know, with a buffer among its weights."""

    def __init__(self, res, num_classes, width=4):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, z, logsnr, label=None):
        level = logsnr[:, None, None, None].expand(-1, 1, *z.shape[2:]) / 15
        return self.conv(torch.cat([z, level], 1))


class Colors(nn.Module):
    """Features and logits of an image that need no weights: moments of its colors."""

    def forward(self, x):
        x = x.double() / 255
        features = torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, ::2, ::2].mean((2, 3))], 1)
        return features, 5 * features[:, :4]


class Plain(Colors):
    """Features without logits, of another shape."""

    def forward(self, x):
        return super().forward(x)[0].float()[:, :, None, None]


class Spatial(Colors):
    """Also spatial features: the four corners of the image, red."""

    def forward(self, x):
        corners = x[:, 0, :: x.shape[2] - 1, :: x.shape[3] - 1].flatten(1).float()
        return *super().forward(x), corners


class Patches(nn.Module):
    """Features (B, 48) that notice where things are: the mean colors of 4 x 4 patches."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x.double(), 4).flatten(1)


def photo(size=(20, 16), seed=0):
    """An image of random pixels. size: (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def covariance(dim, rank, seed):
    """A random covariance matrix (dim, dim) of the given rank."""
    x = np.random.default_rng(seed).standard_normal((dim, rank)) * np.exp(-np.linspace(0, 3, rank))
    return x @ x.T


def mutated(content, random):
    """Bytes with one to three changes: overwritten, deleted, repeated or zeroed parts."""
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at, length = random.integers(len(content) or 1), int(2 ** random.uniform(0, 8))
        kind = random.integers(5)
        if kind == 0:
            content[at : at + 1] = bytes([random.integers(256)])
        elif kind == 1:
            content[at : at + length] = random.bytes(length)
        elif kind == 2:
            del content[at : at + length if random.integers(2) else None]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        else:
            content[at : at + length] = bytes(length)
    return bytes(content)


# ---------------------------------------------------------------- commands in this process


def arguments(*args):
    """The command line: a text that starts with -- is split at spaces, and lists are flattened."""
    line = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            line += arguments(*arg)
        elif isinstance(arg, str) and arg.startswith("--"):
            line += arg.split()
        else:
            line.append(str(arg))
    return line


def call(main, *args):
    """Call the main function of a command, for example call(train.main, "--steps 2 --out", out)."""
    return main(arguments(*args))


def measured(*args):
    """Call fid.main. Returns the lines that it prints, and its progress on stderr."""
    output, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(progress):
        call(fid.main, *args)
    return output.getvalue().splitlines(), progress.getvalue()


def outcome(main, args, seconds=60):
    """Run a command to its end. Returns its error, one line, or "" after success.

    More than one line, or a minute without an end, fails the test.
    """

    def stuck(*_):
        raise AssertionError(f"does not end: {args}")

    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(seconds)
    try:
        run_command(lambda: call(main, args))
        return ""
    except SystemExit as error:
        line = str(error.code)
        is_one_line = isinstance(error.code, str) and len(line.splitlines()) == 1
        assert is_one_line or error.code in (0, 2), (args, error.code)
        return line
    finally:
        signal.alarm(0)


def named(*words):
    """A regular expression for a text that contains all these words, in any order."""
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(word))}(?!\w))" for word in words)


def resumed_at(output):
    """The steps at which printed lines say that a run was resumed."""
    return [int(step) for step in re.findall(r"(?mi)^resum.*?\bstep (\d+)", output)]


def printed_numbers(capsys):
    """The numbers in each printed line, as floats; 12,345 is one number."""
    number = r"(?<![\w/-])\d[\d,]*(?:\.\d+)?(?=[ ,)]|$)"
    lines = capsys.readouterr().out.splitlines()
    return [
        [float(found.replace(",", "")) for found in re.findall(number, line.replace(", ", " , "))]
        for line in lines
    ]


def content_of(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


# ---------------------------------------------------------------- tiny runs

TINY_NET = dict(
    base_channels=8,
    emb_channels=16,
    channel_multiplier=[1, 2],
    num_res_blocks=[2],
    num_transformer_blocks=1,
    patching="dwt_1",
)
TINY_OPTIONS = "--batch 8 --log-every 2 --save-every 4 --no-bf16 --lr 1e-3 --warmup 2"
TINY_RUN = [TINY_OPTIONS, "--model-args", json.dumps(TINY_NET)]

# A larger network, whose checkpoints take a while to write.
KILLED_NET = TINY_NET | dict(
    base_channels=16, emb_channels=512, channel_multiplier=[1, 4], num_transformer_blocks=4
)
KILLED_RUN = [
    TINY_OPTIONS,
    "--log-every 1 --save-every 3 --keep 2 --sample-every 1000000",
    "--model-args",
    json.dumps(KILLED_NET),
]


# What related/ needs: the recipe's network at 32 px, with fewer channels and blocks.
SMALL_NET = ["--model-args", '{"base_channels": 8, "num_transformer_blocks": 1}']


def train_small(folder, *options):
    """Train two steps of 4 images into folder/run, without a grid. Returns the run's folder."""
    out = folder / "run"
    call(train.main, "--res 32 --steps 2 --batch 4 --sample-every 1000 --out", out, *options)
    return out


def no_grid(monkeypatch):
    """Make training draw empty sample grids, which saves time."""
    grid = torch.zeros(60, 8, 8, 3, dtype=torch.uint8)
    monkeypatch.setattr(train, "sample_batches", lambda *args, **options: [(0, grid)])


def sample_in_two_steps(*args, **options):
    """sample.sample_batches in 2 steps instead of 64."""
    return sampling.sample_batches(*args, **options | dict(steps=2))


def short_grid(monkeypatch=None):
    """Make training draw sample grids in 2 steps. Without monkeypatch, until the process ends."""
    if monkeypatch:
        monkeypatch.setattr(train, "sample_batches", sample_in_two_steps)
    else:
        train.sample_batches = sample_in_two_steps


def skip_grid():
    """Make training draw no sample grids, until the process ends."""
    train.save_sample_grid = lambda run: 0


def needs_inductor(test):
    """Mark a test that generates code with inductor."""
    for mark in NEEDS_INDUCTOR:
        test = mark(test)
    return test


def use_aot_eager(monkeypatch=None):
    """Make --compile use the backend aot_eager. Without monkeypatch, until the process ends.

    It traces forward and backward as inductor does, but generates no code: seconds, not minutes.
    """
    compile = functools.partial(torch.compile, backend="aot_eager")
    if monkeypatch:
        monkeypatch.setattr(torch, "compile", compile)
    else:
        torch.compile = compile


def full_grid(monkeypatch):
    """Undo short_grid: training draws its sample grids in 64 steps, as it does for users."""
    monkeypatch.setattr(train, "sample_batches", sampling.sample_batches)


def log_lines(out):
    """The lines of a run's log, parsed."""
    with open(f"{out}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def last_step(out):
    """The last step in a run's log; 0 without a log."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads(content_of(f"{out}/log.jsonl").splitlines()[-1])["step"]
    return 0


def same_weights(a, b):
    """True if two checkpoints hold the same step, weights, EMA weights and moments, bitwise."""
    a, b = (load_checkpoint(str(path)) for path in (a, b))

    def tensors(state):
        moments = state["optimizer"]["state"].values()
        return [
            *state["net"].values(),
            *state["ema"].values(),
            *(x for moment in moments for x in moment.values()),
        ]

    pairs = zip(tensors(a), tensors(b), strict=True)
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- other processes


def command(*args, cwd, env=None):
    """Run a script to its end in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments(*args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=env,
    )


def start(*args, cwd, **options):
    """Start a script in a process of its own. The caller ends it."""
    return subprocess.Popen(
        [sys.executable, *arguments(*args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def torchrun(*args, cwd, ranks=2, restarts=0, **options):
    """Start a script with torchrun, on several ranks."""
    launcher = f"--standalone --nproc-per-node {ranks} --max-restarts {restarts}"
    return start("-m", "torch.distributed.run", launcher, *args, cwd=cwd, **options)


# Processes are forked from a server that has imported the packages already. A new interpreter takes
# seconds for that.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "torch._dynamo", "scipy.linalg", "PIL.Image"]
)


def private_memory():
    """The memory of this process that it shares with no other, in bytes (Linux)."""
    text = content_of("/proc/self/smaps_rollup").decode()
    return 1024 * sum(int(size) for size in re.findall(r"Private_\w+:\s+(\d+) kB", text))


def growth_of_a_worker(make, *arguments):
    """Return by how many bytes a forked worker grows in work(); before, work = make(*arguments).

    Only memory that the worker does not share with its parent counts. The parent is a new process,
    which calls make(). The process of the tests would not do: its memory is full of small gaps. A
    worker that fills some of them for a moment copies their pages, which proves nothing.
    """
    receiver, sender = multiprocessing.Pipe(False)
    parent = FORK_SERVER.Process(target=_measure_workers, args=(sender, make, arguments))
    parent.start()
    assert receiver.poll(120)
    growths = receiver.recv()
    parent.join()
    # The smaller growth of two workers counts: other things in the process can only add to it.
    return min(growths)


def _measure_workers(sender, make, arguments):
    """Send how many bytes each of two forked workers grows."""
    # New memory comes in pages of 4 kB. A huge page would count as 2 MB, however little of it is
    # used. 41 is PR_SET_THP_DISABLE of linux/prctl.h.
    assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
    before, work = make(*arguments)
    # The garbage collector would write into every object, and so copy it.
    gc.collect()
    gc.freeze()

    def measure(result):
        before()
        start = private_memory()
        work()
        result.send(private_memory() - start)

    growths = []
    for _ in range(2):
        receiver, result = multiprocessing.Pipe(False)
        worker = multiprocessing.get_context("fork").Process(target=measure, args=(result,))
        worker.start()
        growths.append(receiver.recv())
        worker.join()
    sender.send(growths)


class Forked:
    """A command in a process forked from the server. It has the methods of subprocess.Popen."""

    def __init__(self, main, *args, cwd, env=None, prepare=None):
        self.folder = tempfile.TemporaryDirectory()  # of what the process prints
        self.files = [f"{self.folder.name}/{name}" for name in ("output", "errors")]
        for path in self.files:
            open(path, "wb").close()
        job = (main, arguments(args), str(cwd), dict(env or os.environ), self.files, prepare)
        self.process = FORK_SERVER.Process(target=_run_forked, args=job)
        self.process.start()

    def poll(self):
        """The exit status, or None while the process runs."""
        return self.process.exitcode

    def kill(self):
        """Kill the process with SIGKILL."""
        self.process.kill()

    def communicate(self, timeout=300):
        """Wait for the end, and kill the process after the timeout. Returns (output, errors)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return tuple(content_of(path).decode() for path in self.files)


def _run_forked(main, line, cwd, environment, files, prepare):
    """What the process of a Forked does."""
    for number, path in zip((1, 2), files):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if prepare:
        prepare()
    run_command(lambda: main(line))


def start_ranks(main, *args, cwd, world=2, prepare=None):
    """Start a command on several ranks, with the environment variables that torchrun sets.

    prepare: a function to call in each process first. Returns a Forked for each rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    ranks = []
    for rank in map(str, range(world)):
        env = os.environ | rendezvous | dict(RANK=rank, LOCAL_RANK=rank)
        ranks.append(Forked(main, *args, cwd=cwd, env=env, prepare=prepare))
    return ranks


def on_ranks(main, *args, cwd, world=2, prepare=None, timeout=300):
    """Run a command on several ranks, see start_ranks. Returns (exit statuses, output, errors).

    A rank that does not end within the timeout is killed.
    """
    ranks = start_ranks(main, *args, cwd=cwd, world=world, prepare=prepare)
    end = time.time() + timeout
    printed = [process.communicate(max(0, end - time.time())) for process in ranks]
    output, errors = map("".join, zip(*printed))
    return [process.poll() for process in ranks], output, errors


def wait_for(condition, process, seconds=300):
    """Wait until the condition holds, the process ends, or the time is over."""
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.0005)
