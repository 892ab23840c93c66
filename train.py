"""Training simple diffusion: the recipes, and the loop, to be read from top to bottom.

    python train.py                                                # shapes at 32 px on a laptop: runs/shapes-32/samples_*.png
    python train.py --data cifar10.npz --res 32                    # your own pictures: folders, .zip, .npz or .npy
    torchrun --nproc-per-node 8 train.py --data imagenet/ --res 256 --size base

What was chosen, every effective setting, is printed first. Ctrl-C and SIGTERM save and exit; the same command again, or just
python train.py --out runs/NAME, resumes from the newest checkpoint as if nothing had happened.
"""

import signal

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C during the imports, which take seconds, leaves no trace

import argparse
import atexit
import contextlib
import copy
import errno
import functools
import glob
import json
import math
import multiprocessing
import os
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from data import ImageData, Shapes, example_noise, open_data, order, pack
from fid import (
    INCEPTION,
    Statistics,
    distance_name,
    extract,
    frechet_distance,
    load_network,
    read_statistics,
)
from loss import diffusion_loss
from sample import (
    build_net,
    check_model,
    compiles,
    drawn_size,
    has_bf16,
    imported,
    in_bf16,
    join_ranks,
    leave_ranks,
    checkpoints,
    load_checkpoint,
    load_weights,
    make_grid,
    mix_seed,
    net_class,
    run_command,
    sample_shared,
    to_float,
    writing,
)
from schedule import make_schedule

# ---------------------------------------------------------------- recipes
# RECIPES[model][size][res] are the fields of the net, TRAINING[model][size] how it is trained. "paper" is what was published
# (appendix); tiny, small and base are ours: base the family that uvit.py counts, small meant for a GPU of 24 GB. The widest maps have
# more channels than patching makes of a picture's pixels (3, 12, 48), as v holds the noise, all of which must get through. "micro",
# the pictures per rank and micro-step, is from counting memory (see the README), not tried on a GPU.

_TINY = dict(emb_channels=128, base_channels=32, num_transformer_blocks=4, transformer_dropout=0.0)
_SMALL = dict(
    emb_channels=512, base_channels=128, num_transformer_blocks=12, transformer_dropout=0.1
)
_BASE = dict(
    emb_channels=1024,
    base_channels=128,
    num_transformer_blocks=16,
    transformer_dropout=0.1,
    attn_resolutions=[32],
)
_TINY_UNET = dict(emb_channels=128, base_channels=32, dropout=0.0, attn_resolutions=[8])
_SMALL_UNET = dict(emb_channels=512, base_channels=64)
_BASE_UNET = dict(emb_channels=1024, base_channels=96)

RECIPES = {
    "uvit": {
        "tiny": {
            4: dict(_TINY, channel_multiplier=[4], num_res_blocks=[]),  # 4 to 16 px are for latents
            8: dict(_TINY, channel_multiplier=[4], num_res_blocks=[]),
            16: dict(_TINY, channel_multiplier=[1, 4], num_res_blocks=[2]),
            32: dict(_TINY, patching="dwt_1", channel_multiplier=[1, 4], num_res_blocks=[2]),
            64: dict(_TINY, patching="dwt_1", channel_multiplier=[1, 2, 4], num_res_blocks=[2, 2]),
            128: dict(
                _TINY,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 2, 4, 8],
                num_res_blocks=[1, 2, 2],
            ),
            256: dict(
                _TINY,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 1, 2, 4, 8],
                num_res_blocks=[1, 1, 2, 2],
            ),
            512: dict(
                _TINY,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 1, 1, 2, 4, 8],
                num_res_blocks=[1, 1, 1, 2, 2],
            ),
        },
        "small": {
            32: dict(_SMALL, channel_multiplier=[1, 4], num_res_blocks=[3]),
            64: dict(_SMALL, channel_multiplier=[1, 2, 4], num_res_blocks=[3, 3]),
            128: dict(
                _SMALL, patching="dwt_1", channel_multiplier=[1, 2, 4], num_res_blocks=[3, 3]
            ),
            256: dict(
                _SMALL, patching="dwt_2", channel_multiplier=[1, 2, 4], num_res_blocks=[3, 3]
            ),
            512: dict(
                _SMALL, patching="dwt_2", channel_multiplier=[1, 1, 2, 4], num_res_blocks=[1, 3, 3]
            ),
        },
        "base": {
            32: dict(
                _BASE,
                base_channels=512,
                channel_multiplier=[1, 2],
                num_res_blocks=[3],
                attn_resolutions=[],
            ),
            64: dict(_BASE, base_channels=256, channel_multiplier=[1, 2, 4], num_res_blocks=[3, 3]),
            128: dict(_BASE, channel_multiplier=[1, 2, 4, 8], num_res_blocks=[3, 3, 3]),
            256: dict(
                _BASE, patching="dwt_1", channel_multiplier=[1, 2, 4, 8], num_res_blocks=[3, 3, 3]
            ),
            512: dict(
                _BASE, patching="dwt_2", channel_multiplier=[1, 2, 4, 8], num_res_blocks=[3, 3, 3]
            ),
        },
        "paper": {  # U-ViT L, the defaults of the class
            128: dict(patching="none"),
            256: dict(patching="dwt_1"),
            512: dict(patching="dwt_2", checkpoint_resolutions=[16]),
        },
        "text": {  # the same with transformer blocks at 32x32, too; train with --captions
            256: dict(patching="dwt_1", attn_resolutions=[32]),
            512: dict(patching="dwt_2", attn_resolutions=[32], checkpoint_resolutions=[32, 16]),
            "384x640": dict(
                patching="dwt_2", attn_resolutions=[24], checkpoint_resolutions=[24, 12]
            ),
        },
    },
    "unet": {
        "tiny": {
            32: dict(
                _TINY_UNET, patching="dwt_1", channel_multiplier=[1, 3], num_res_blocks=[2, 3]
            ),
            64: dict(
                _TINY_UNET, patching="dwt_1", channel_multiplier=[1, 2, 3], num_res_blocks=[1, 2, 2]
            ),
            128: dict(
                _TINY_UNET,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 2, 4, 6],
                num_res_blocks=[1, 1, 2, 2],
            ),
            256: dict(
                _TINY_UNET,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 1, 2, 4, 6],
                num_res_blocks=[1, 1, 1, 2, 2],
            ),
            512: dict(
                _TINY_UNET,
                base_channels=16,
                patching="dwt_1",
                channel_multiplier=[1, 1, 1, 2, 4, 6],
                num_res_blocks=[1, 1, 1, 1, 2, 2],
            ),
        },
        "small": {
            32: dict(_SMALL_UNET, channel_multiplier=[2, 4, 8], num_res_blocks=[3, 4, 2]),
            64: dict(_SMALL_UNET, channel_multiplier=[1, 2, 4, 8], num_res_blocks=[2, 3, 4, 2]),
            128: dict(
                _SMALL_UNET,
                patching="dwt_1",
                channel_multiplier=[1, 2, 4, 8],
                num_res_blocks=[2, 3, 4, 2],
            ),
            256: dict(
                _SMALL_UNET,
                patching="dwt_2",
                channel_multiplier=[1, 2, 4, 8],
                num_res_blocks=[2, 3, 4, 2],
            ),
            512: dict(
                _SMALL_UNET,
                patching="dwt_2",
                channel_multiplier=[1, 1, 2, 4, 8],
                num_res_blocks=[1, 2, 3, 4, 2],
            ),
        },
        "base": {
            32: dict(_BASE_UNET, channel_multiplier=[4, 8, 8], num_res_blocks=[4, 6, 4]),
            64: dict(_BASE_UNET, channel_multiplier=[2, 4, 8, 8], num_res_blocks=[3, 4, 6, 4]),
            128: dict(
                _BASE_UNET, channel_multiplier=[1, 2, 4, 8, 8], num_res_blocks=[3, 4, 4, 6, 4]
            ),
            256: dict(
                _BASE_UNET,
                patching="dwt_1",
                channel_multiplier=[1, 2, 4, 8, 8],
                num_res_blocks=[3, 4, 4, 6, 4],
            ),
            512: dict(
                _BASE_UNET,
                patching="dwt_2",
                channel_multiplier=[2, 3, 4, 8, 8],
                num_res_blocks=[3, 3, 4, 6, 4],
            ),
        },
        "paper": {
            128: dict(channel_multiplier=[1, 2, 4, 8, 8], num_res_blocks=[3, 4, 4, 12, 4]),
            256: dict(channel_multiplier=[1, 1, 2, 4, 8, 8], num_res_blocks=[1, 2, 2, 4, 12, 4]),
            512: dict(
                patching="dwt_2",
                channel_multiplier=[2, 3, 4, 8, 8],
                num_res_blocks=[3, 3, 4, 12, 4],
            ),
        },
    },
}

_OURS = dict(
    space="v", decay=0.0, beta2=0.99, ema=0.9999, multiscale=False
)  # the v loss: short runs with eps sample badly
TRAINING = {
    ("uvit", "tiny"): dict(
        _OURS,
        batch=64,
        steps=4000,
        lr=2e-3,
        warmup=200,
        decay=0.33,
        ema=0.998,
        sample_every=1500,
        save_every=1500,
    ),
    ("unet", "tiny"): dict(
        _OURS,
        batch=64,
        steps=4000,
        lr=2e-3,
        warmup=200,
        decay=0.33,
        ema=0.998,
        sample_every=1500,
        save_every=1500,
    ),
    ("uvit", "small"): dict(
        _OURS, batch=256, steps=200_000, lr=2e-4, warmup=1000, ema=0.9995, micro=32
    ),
    ("unet", "small"): dict(
        _OURS, batch=256, steps=200_000, lr=2e-4, warmup=1000, ema=0.9995, micro=32
    ),
    ("uvit", "base"): dict(_OURS, batch=1024, steps=500_000, lr=1e-4, warmup=10_000, micro=32),
    ("unet", "base"): dict(_OURS, batch=512, steps=1_000_000, lr=1e-4, warmup=10_000, micro=32),
    ("uvit", "paper"): dict(_OURS, batch=2048, steps=500_000, lr=1e-4, warmup=10_000, micro=16),
    ("unet", "paper"): dict(
        _OURS, batch=512, steps=2_000_000, lr=5e-5, warmup=10_000, space="eps", micro=16
    ),
    ("uvit", "text"): dict(
        _OURS,
        batch=2048,
        steps=700_000,
        lr=1e-4,
        warmup=10_000,
        micro=16,
        multiscale=True,
        schedule="interpolated:32:256",
    ),
    ("unet", "paper", 128): dict(steps=1_500_000, beta2=0.999),
    ("unet", "paper", 512): dict(multiscale=True),
    ("uvit", "paper", 512): dict(multiscale=True, micro=32),
}

# ---------------------------------------------------------------- averages, checkpoints and the log


@torch.no_grad()
def ema_update(ema, net, decay):
    """Every weight of ema: decay * ema + (1 - decay) * net, all in a few kernels; buffers, if a net has any, are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), net.buffers()):
        average.copy_(buffer)


def save_checkpoint(out, keep, state):
    """Writes out/ckpt_STEP.pt, and when it is whole and on the disk deletes all older ones but keep - 1.

    state: config, step, images, net, ema, optimizer; plain tensors, numbers and dicts. Raises OSError, for example on a full disk.
    """
    path = os.path.join(out, f"ckpt_{state['step']:07d}.pt")
    with writing(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        folder = os.open(out, os.O_DIRECTORY)
        os.fsync(folder)  # the renaming, too
        os.close(folder)
    files = checkpoints(out)
    for file in files[: max(0, files.index(path) + 1 - keep)]:
        with contextlib.suppress(
            PermissionError, FileNotFoundError
        ):  # Windows keeps the one that this process resumed from
            os.remove(file)


def open_log(out, step):
    """The run's log.jsonl, unbuffered, and the lines it has up to the step, parsed; later ones are cut off, as they come again.

    While it is open, it is locked against other processes; the lock ends with its process, however that does. What half-written
    files such an end has left are removed. Raises ValueError where another process has the lock, or has saved since the step.
    """
    os.makedirs(out, exist_ok=True)
    log, lines, at, end = open(f"{out}/log.jsonl", "a+b", buffering=0), [], 0, 0
    try:
        import fcntl  # not on Windows, where nothing is locked

        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"{out}: another process is training there (or, on a network disk, has died with its machine: then try again in some minutes)"
        ) from error
    except (ImportError, OSError):  # a disk without locks
        pass
    for part in glob.glob(f"{glob.escape(out)}/*.part"):
        os.remove(part)
    log.seek(0)
    for line in log.read().splitlines(True):
        at += len(line)
        with contextlib.suppress(
            ValueError, TypeError, KeyError
        ):  # of half a line, where a machine died
            if line.endswith(b"\n") and (parsed := json.loads(line))["step"] <= step:
                lines.append(parsed)
                end = at
    log.truncate(end)
    return log, lines


def add_line(log, line):
    """Appends a dict to the log as a line of JSON. Raises OSError, naming the log, on a full disk."""
    text = json.dumps(line).encode() + b"\n"
    try:
        if log.write(text) < len(text):
            raise OSError(errno.ENOSPC, "the disk is full")
    except OSError as error:
        raise OSError(f"cannot write {log.name}: {error.strerror}") from error


@torch.no_grad()
def check_finite(failed, step, net, out, saved):
    """Raises ValueError on every rank if a loss or gradient was not finite, or the weights are not now, saying at which step, and where.

    failed: (19,), the first such step of each bin of logsnr and of the gradient, or infinity. saved: the step of the last
    checkpoint in the folder out, 0 without one.
    """
    if dist.is_initialized():
        dist.all_reduce(failed, dist.ReduceOp.MIN)
    failed, weights = failed.tolist(), torch.nn.utils.get_total_norm(net.parameters())
    first = min(failed)
    weights = weights.full_tensor() if hasattr(weights, "full_tensor") else weights
    where = [
        f"the loss at logsnr {2 * i - 20} to {2 * i - 18}" if i < 18 else "the gradient"
        for i, at in enumerate(failed)
        if at == first < math.inf
    ]
    if where or not weights.isfinite():
        raise ValueError(
            f"not finite at step {min(first, step):.0f}: {', '.join(where or ['the weights'])}; "
            + (
                f"the last good checkpoint is {out}/ckpt_{saved:07d}.pt"
                if saved
                else "there is no checkpoint yet"
            )
        )


# ---------------------------------------------------------------- --fsdp


def shard(net, device, bf16, compiled):
    """Splits a net's weights over the ranks, in place (fully_shard), and with them gradients, moments and averages.

    Whatever stands in a ModuleList is a unit, put together only while it computes, with bf16 in bfloat16; the rest is one more, in
    float32. compiled: each unit by itself.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
    )  # takes a second, which others need not wait

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module"
    )  # it warns of in-place changes of a unit's output; there are none
    if compiled:
        torch._dynamo.config.recompile_limit = (
            64  # a U-Net has more than the usual 8 kinds of units
        )
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in reversed(list(net.modules())):  # the inner ones first
        for unit in module if isinstance(module, torch.nn.ModuleList) else ():
            if not isinstance(
                unit, (torch.nn.ModuleList, torch.nn.TransformerEncoderLayer)
            ):  # the latter takes no float32 in bfloat16
                if compiled:
                    unit.compile(dynamic=False)
                fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(
        net, mesh=mesh, reshard_after_forward=True
    )  # else the averages, which have no backward pass, would stay whole


def split_like(weight, tensor):
    """A tensor of a weight's shape on its device and in its layout, which the fused optimizer expects; if that is split, this rank's part."""
    if tensor.ndim == 0:
        return tensor.clone()
    if not hasattr(weight, "full_tensor"):
        return torch.empty_like(weight).copy_(tensor)
    return dist.tensor.distribute_tensor(
        tensor.to(weight.device).contiguous(),
        weight.device_mesh,
        weight.placements,
        src_data_rank=None,
    )


def whole(state):
    """A state dict with its tensors put together on rank 0, for a checkpoint that any number of ranks can read; all must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()  # of a DTensor, which fully_shard makes of every weight
    return tensor.cpu() if dist.get_rank() == 0 else None


# ---------------------------------------------------------------- --bench


class Stopwatch:
    """What --bench measures: after 10 steps to warm up, windows of 5 steps; every second one waits for the device after each part of a step."""

    steps, parts = 60, ("data", "forward+backward", "optimizer+EMA")

    def __init__(self, device):
        self.device, self.step, self.last = device, 0, 0.0
        self.windows, self.seconds = (
            [],
            dict.fromkeys(self.parts, 0.0),
        )  # seconds of each whole window, and of the parts of all others

    def tick(self, part):
        """To be called after each part of a step."""
        split, ends = self.step // 5 % 2, part == self.parts[-1]
        if split or ends and self.step % 5 == 4:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.step >= 10 and split:
                self.seconds[part] += now - self.last
            elif self.step >= 10:
                self.windows.append(now - self.last)
            self.last = now
        self.step += ends

    def report(self, config, world):
        """Prints pictures per second (the median of the windows), the parts of a step, the share of the measured peak (MFU), and memory."""
        speeds = sorted(5 * config["batch"] / seconds for seconds in self.windows)
        speed, flops, peak, split_steps = (
            speeds[len(speeds) // 2],
            training_flops(config),
            matmul_peak(self.device),
            (self.step - 10) // 2,
        )
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            import resource  # there is none on Windows

            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{speed:.1f} img/s ({speeds[0]:.1f} to {speeds[-1]:.1f}), {1e3 * config['batch'] / speed:.1f} ms per step of {config['batch']}; waiting after each part: "
            + ", ".join(
                f"{part} {1e3 * seconds / split_steps:.1f} ms"
                for part, seconds in self.seconds.items()
            )
        )
        print(
            f"MFU {100 * speed * flops / (world * peak):.1f} %: {flops / 1e9:.2f} GFLOP per picture, matmul peak {peak / 1e12:.2f} TFLOP/s "
            f"({'bfloat16' if self.device.type == 'cuda' else 'float32'}) on each of {world}; peak memory {memory / 2**30:.2f} GiB"
        )


def training_flops(config):
    """FLOPs per picture of a training step, forward and backward, counted on the meta device; two for each multiply-accumulate."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        args = {
            key: value
            for key, value in config["model_args"].items()
            if key != "checkpoint_resolutions"
        }  # what is repeated does not count
        net, x = build_net(config["model"], args), torch.empty(1, *drawn_size(config)[0])
        net(x, torch.empty(1)).sum().backward()
    return counter.get_total_flops()


def matmul_peak(device):
    """The FLOP/s that a large product reaches, the best of ten: 8192^3 in bfloat16 on a GPU, 2048^3 in float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ---------------------------------------------------------------- signals


@contextlib.contextmanager
def noted_signals():
    """Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed are only noted, in the list that it gives, for the loop to save and exit.

    A second Ctrl-C ends at once. A second SIGTERM does not: of schedulers and torchrun, either may send one.
    """
    noted = []

    def note(number, frame):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    hangup = (
        [signal.SIGHUP]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        else []
    )  # nohup ignores it
    handlers = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, *hangup)
    }
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """For the processes that decode pictures: signals come to a whole group, and the step that is to be finished needs them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def end_workers():
    """Ends these processes at exit, if an error has left them behind: they would ignore the polite way."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # or their end would be reported as another error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ---------------------------------------------------------------- the command

DEFAULTS = dict(
    res=32,
    model="uvit",
    data=[],
    label_drop=0.1,
    seed=0,
    log_every=100,
    sample_every=5000,
    save_every=5000,
    keep=3,
    skip_bad=False,
    tensorboard=False,
    fsdp=False,
    loss=None,
    sampling={},
    captions=None,
    text_encoder="bytes",
    text_tokens=64,
    fid_every=None,
    fid_ref=None,
    fid_images=10_000,
)


def json_object(text):
    """The dict that a JSON object stands for."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a JSON object such as {{"dropout": 0.1}}'
        ) from error


def parse(argv=None):
    """The options that were given, as a dict; what was not given is the recipe's or the resumed run's."""
    parser = argparse.ArgumentParser(
        description="Train simple diffusion.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"train.py: {message}")
    switch = dict(action=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--data", nargs="+", help="folders, .zip, .npz or .npy files (default: built-in shapes)"
    )
    parser.add_argument(
        "--res",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="side of the pictures in pixels, or HEIGHTxWIDTH",
    )
    parser.add_argument(
        "--bench",
        action="store_true",
        help="time some steps, print speed, MFU and memory, and stop; writes nothing",
    )
    parser.add_argument(
        "--pack",
        metavar="NPZ",
        help="write the pictures at --res into this file, to be the --data of later runs, and stop",
    )
    parser.add_argument("--model", help="uvit, unet, or package.module:Class")
    parser.add_argument(
        "--model-args", type=json_object, help="fields of the net to override, as JSON"
    )
    parser.add_argument(
        "--size", help="tiny, small, base or paper (default: tiny without a GPU, small with one)"
    )
    parser.add_argument("--schedule", help="cosine, shifted:64, interpolated:32:256, ...")
    parser.add_argument("--space", choices=["eps", "v"], help="space of the loss")
    parser.add_argument("--multiscale", help="multiscale loss", **switch)
    parser.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="another loss, called as loss.diffusion_loss is (default: that one)",
    )
    parser.add_argument(
        "--captions",
        nargs="?",
        const="",
        metavar="JSONL",
        help="texts instead of labels: name.txt beside name.jpg, lines of {file, text}, or those of the shapes",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="bytes (default), a T5 of transformers, or an .npy of embeddings, one row for each picture",
    )
    parser.add_argument(
        "--text-tokens", type=int, help="length of the texts; longer ones are cut (default 64)"
    )
    parser.add_argument(
        "--label-drop",
        type=float,
        help="share of the labels or texts that are dropped, for guidance",
    )
    parser.add_argument(
        "--flip",
        help="random horizontal flips (default: of your pictures, not of shapes)",
        **switch,
    )
    parser.add_argument("--batch", type=int, help="pictures per step, over all ranks")
    parser.add_argument(
        "--micro", type=int, help="pictures per rank and micro-step (default: one micro-step)"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup", type=int, help="steps over which lr rises")
    parser.add_argument(
        "--decay",
        type=float,
        help="share of the steps, at the end, over which lr falls to 0 (the paper: 0)",
    )
    parser.add_argument("--ema", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", help="the run's folder (default: runs/DATA-RES)")
    parser.add_argument("--compile", help="torch.compile (default: on a GPU)", **switch)
    parser.add_argument(
        "--bf16", help="bfloat16 in the net (default: where the hardware has it)", **switch
    )
    parser.add_argument(
        "--fsdp",
        help="split weights, gradients and moments over the ranks, for nets that do not fit one",
        **switch,
    )
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--skip-bad",
        help="name pictures that cannot be read, count them, and take the next ones instead",
        **switch,
    )
    parser.add_argument("--workers", type=int, help="processes per rank that decode pictures")
    for name in ("log", "sample", "save"):
        parser.add_argument(f"--{name}-every", type=int, metavar="STEPS")
    parser.add_argument("--keep", type=int, help="checkpoints to keep")
    parser.add_argument(
        "--fid-every",
        type=int,
        metavar="STEPS",
        help="FID of averaged weights against --fid-ref (default: never)",
    )
    parser.add_argument(
        "--fid-ref", metavar="NPZ", help="mu and sigma, as fid.py --save-stats writes them"
    )
    parser.add_argument("--fid-images", type=int, help="samples for it (default 10,000)")
    parser.add_argument(
        "--fid-features",
        metavar="MODULE:CLASS",
        help="as --features of fid.py; is not saved with the run",
    )
    parser.add_argument(
        "--tensorboard",
        help="curves and grids for TensorBoard, in the run's folder (pip install tensorboard)",
        **switch,
    )
    given = vars(parser.parse_args(argv))
    if {"space", "multiscale"} & given.keys() and given.setdefault("loss", None):
        raise ValueError("--space and --multiscale are options of the loss that --loss replaces")
    return given


def settings(given, device, data):
    """All effective settings: defaults, then the recipe's, then the given ones. Raises ValueError for what cannot be."""
    model, res = given.get("model", DEFAULTS["model"]), given.get("res", DEFAULTS["res"])
    size = given.get("size", "small" if device.type == "cuda" else "tiny")
    own = net_class(
        model
    )  # of another module: it may have RECIPES[size][res], and TRAINING[size, res] over those of uvit
    sizes = RECIPES.get(model) or getattr(own, "RECIPES", {})
    if size not in (sizes or RECIPES["unet"]):
        raise ValueError(
            f"--model {model} has --size {', '.join(sizes or RECIPES['unet'])}, not {size}"
        )
    recipes = sizes.get(size, {})
    key = (
        res if res in recipes else min(data.size)
    )  # of the shorter side, if there is none of this format
    if sizes and key not in recipes:
        raise ValueError(
            f"--model {model} --size {size} has recipes for --res {', '.join(map(str, recipes))}, not {res}"
        )
    if size == "text" and "text_tokens" not in getattr(data, "fields", {}):
        raise ValueError("--size text takes --captions")
    if given.get("flip") and getattr(data, "turn", False):
        raise ValueError(
            "--flip takes no pictures that are turned, as upright ones with captions are: it would put them upside down"
        )
    automatic = dict(
        size=size,
        schedule="cosine" if min(data.size) <= 64 else "shifted:64",
        flip=type(data) is ImageData,
        micro=None,
        compile=device.type == "cuda",
        bf16=has_bf16(device),
    )
    training = (
        TRAINING.get(("uvit", size), TRAINING["uvit", "base"])
        | TRAINING.get((model, size), {})
        | TRAINING.get((model, size, key), {})
        | getattr(own, "TRAINING", {}).get((size, key), {})
    )
    fixed = dict(
        res=res if isinstance(res, int) else list(data.size), num_classes=len(data.classes)
    ) | getattr(data, "fields", {})  # of texts or latents
    if "in_channels" in fixed and (given.get("flip") or given.get("fid_every")):
        raise ValueError("latents are no pictures: they take neither --flip nor --fid-every")
    net_args = given.get("model_args", {})
    if any(
        net_args.get(key, value) != value for key, value in (dict(in_channels=None) | fixed).items()
    ):
        raise ValueError(
            "--model-args: res, num_classes, in_channels, text_tokens and text_dim follow from the other options and the data"
        )
    config = (
        DEFAULTS
        | automatic
        | training
        | given
        | dict(model_args=recipes.get(key, {}) | fixed | net_args, classes=data.classes)
    )
    for key, low, high in (
        ("batch", 1, math.inf),
        ("micro", 1, math.inf),
        ("steps", 1, math.inf),
        ("log_every", 1, math.inf),
        ("sample_every", 1, math.inf),
        ("save_every", 1, math.inf),
        ("keep", 1, math.inf),
        ("fid_every", 1, math.inf),
        ("fid_images", 2, math.inf),
        ("seed", 0, math.inf),
        ("lr", 0, math.inf),
        ("warmup", 0, math.inf),
        ("decay", 0, 1),
        ("ema", 0, 1),
        ("label_drop", 0, 1),
    ):
        if config[key] is not None and not (
            isinstance(config[key], (int, float)) and low <= config[key] <= high
        ):
            raise ValueError(
                f"--{key.replace('_', '-')} {config[key]} is not between {low} and {high}"
            )
    return config


def learning_rate(step, lr, warmup, decay, steps):
    """Rises over the warm-up steps, stays, and falls linearly over the last share `decay` of the steps."""
    return lr * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def main(argv=None):
    given = parse(argv)
    if "pack" in given:
        if "captions" in given:
            raise ValueError(
                "--pack takes no --captions: they are found by the names of the pictures, which it does not keep"
            )
        if "data" not in given or not given["pack"].endswith(".npz"):
            raise ValueError("--pack takes --data, and the name of an .npz to write")
        if os.path.exists(given["pack"]):
            raise ValueError(
                f"--pack {given['pack']} is there already: choose another name, or delete it"
            )
        if os.environ.get("RANK", "0") == "0":
            pack(
                ImageData(given["data"], given.get("res", DEFAULTS["res"]), given.get("skip_bad")),
                given["pack"],
                given.get("workers") or os.cpu_count() or 1,
            )
    elif "bench" in given:
        run(given, None)
    else:
        with contextlib.ExitStack() as stack:
            run(given, stack)


def continued(given, before, out, own_out):
    """The options of a resumed run: the given ones, over those before, from its newest checkpoint.

    own_out: the folder that the data's name leads to. Raises ValueError for what only a new run can have.
    """
    check_model(out, before, given.get("model"))
    kinds = {
        key: (type(value),) for key, value in (DEFAULTS | TRAINING["uvit", "tiny"]).items()
    } | dict(
        micro=(int, type(None)),
        fid_every=(int, type(None)),
        fid_ref=(str, type(None)),
        loss=(str, type(None)),
        res=(int, str),
        captions=(str, type(None)),
    )
    if not all(
        type(value) in kinds.get(key, (type(value),)) for key, value in before.items()
    ) or not all(isinstance(path, str) for path in before.get("data", ())):
        raise ValueError(f"{out}: the settings in its newest checkpoint are not those of a run")
    if "loss" not in given and before.get("loss") and not before["loss"].startswith("related."):
        raise ValueError(
            f"{out} was trained with --loss {before['loss']}: repeat that option to import it"
        )
    changed = {key for key, value in given.items() if value != before.get(key)}
    model_args = before["model_args"] | given.get("model_args", {})
    same = lambda args: {
        key: value for key, value in args.items() if key != "checkpoint_resolutions"
    }  # that changes no result
    if (
        same(model_args) != same(before["model_args"])
        or {"res", "size", "captions", "text_encoder", "text_tokens"} & changed
        or "data" in changed
        and out == own_out
    ):
        raise ValueError(
            f"{out} holds a run with another net or other data: choose another --out, or delete it"
        )
    return before | given | dict(model_args=model_args)


def fid_reference(path, features, size, device):
    """The statistics (see fid.read_statistics) that --fid-ref names, and the network of their features. Raises ValueError if these are others."""
    reference = read_statistics(path or "")
    if not reference:
        raise ValueError(f"--fid-every needs --fid-ref, an .npz with mu and sigma, not {path}")
    if reference["features"] != (features or INCEPTION):
        raise ValueError(
            f"--fid-ref {path} holds features of {reference['features']}, not of {features or INCEPTION}: see --fid-features"
        )
    network = load_network(features).to(device)
    width = extract(network, torch.zeros(1, 3, *size, dtype=torch.uint8, device=device))[0].shape[1]
    if len(reference["mu"]) != width:
        raise ValueError(f"--fid-ref {path} holds {len(reference['mu'])} features, not {width}")
    return reference, network


def run(given, stack):
    """A training, from the given options to the last grid. stack: holds noted_signals until its end, or None to note none."""
    rank, world, device = join_ranks(given.pop("device", None))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16
    elif torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision(
            "medium"
        )  # without AMX still float32, but by oneDNN, on AMD in half of MKL's time

    # The run: its folder, the checkpoint to resume from, the data and the settings.
    if "data" in given:
        given["data"] = [
            os.path.abspath(path) for path in given["data"]
        ]  # to resume from any folder
    if "fid_ref" in given:
        given["fid_ref"] = os.path.abspath(given["fid_ref"])
    for key in ("captions", "text_encoder"):
        if os.path.exists(given.get(key, "")):
            given[key] = os.path.abspath(given[key])
    name = os.path.splitext(os.path.basename(given["data"][0]))[0] if "data" in given else "shapes"
    own_out = (
        f"runs/{name}-{'text-' if 'captions' in given else ''}{given.get('res', DEFAULTS['res'])}"
    )
    out, workers, fid_features = (
        given.pop("out", own_out),
        given.pop("workers", None),
        given.pop("fid_features", None),
    )
    stopwatch = Stopwatch(device) if given.pop("bench", False) else None
    if stopwatch:
        given["steps"] = stopwatch.steps
    tick = stopwatch.tick if stopwatch else lambda part: None
    files = checkpoints(out) if os.path.isdir(out) and not stopwatch else []
    resumed = load_checkpoint(out, check=True) if files else None
    before = resumed["config"] if resumed else None
    if before:
        given = continued(given, before, out, own_out)
    data = open_data(DEFAULTS | given, device)
    if before and not getattr(data, "fields", {}).items() <= before["model_args"].items():
        raise ValueError(
            f"{out} holds a run with other embeddings of texts, or other latents: choose another --out, or delete it"
        )
    if before and data.classes != before["classes"]:
        raise ValueError(
            f"{out} holds a run with other classes ({', '.join(before['classes'][:20])}): choose another --out, or delete it"
        )
    config = settings(given, device, data) | dict(
        pictures=str(data),
        torch=str(torch.__version__),
        ranks=world,
        threads=torch.get_num_threads(),
    )
    if config["tensorboard"]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs: pip install tensorboard") from error
    if config["fid_every"]:
        reference, features = fid_reference(config["fid_ref"], fid_features, data.size, device)
        distance = distance_name(reference["features"])
    batch = config["batch"]
    micro = max(1, min(config["micro"] or batch, batch // world))
    if batch % (world * micro):
        raise ValueError(
            f"--batch {batch} is not divisible by {world} ranks x micro-steps of {micro}"
        )
    micro_steps = batch // (world * micro)
    schedule = make_schedule(config["schedule"], min(data.size))
    if config["loss"]:
        loss_function = imported(
            config["loss"], f"--loss {config['loss']} is not package.module:function"
        )
    else:
        loss_function = functools.partial(
            diffusion_loss, space=config["space"], multiscale=config["multiscale"]
        )

    # Two names: net is what is saved, averaged and sampled; model is the same weights compiled and wrapped for training.
    torch.manual_seed(config["seed"])
    sharded, compiled = config["fsdp"] and world > 1, config["compile"] and compiles(device)
    signals = (
        stack.enter_context(noted_signals()) if stack else []
    )  # not before, when there is nothing to save
    net = build_net(
        config["model"], config["model_args"], "cpu" if sharded else device
    )  # fully_shard takes no channels_last
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    step = images = 0
    if resumed:
        load_weights(out, net, resumed["net"])
        load_weights(out, ema, resumed["ema"])
        step, images = resumed["step"], resumed["images"]
    if sharded:
        shard(net, device, config["bf16"], compiled)
        shard(ema, device, config["bf16"], compiled=False)
    optimizer = torch.optim.Adam(
        net.parameters(), config["lr"], betas=(0.9, config["beta2"]), eps=1e-12, fused=True
    )
    if resumed:
        try:
            weights, moments = list(net.parameters()), resumed["optimizer"]["state"]
            moments = {
                i: {key: split_like(weights[i], value) for key, value in state.items()}
                for i, state in moments.items()
            }
            optimizer.load_state_dict(resumed["optimizer"] | dict(state=moments))
        except Exception as error:
            raise ValueError(
                f"{out}: the newest checkpoint's optimizer does not fit its net ({error})"
            ) from error
        del (
            resumed,
            moments,
        )  # or the file would stay mapped, and take up its space after it was removed
    log, drawn, measured = (
        None,
        False,
        False,
    )  # the last two: whether the step resumed from has its grid and its FID
    if rank == 0 and not stopwatch:
        log, lines = open_log(out, step)
        if checkpoints(out) != files:
            raise ValueError(f"{out}: another process has just saved there: start again")
        drawn, measured = (
            os.path.exists(f"{out}/samples_{step:07d}.png"),
            any(line["step"] == step and "fid_images" in line for line in lines),
        )
        with writing(f"{out}/config.json") as file:
            file.write(json.dumps(config, indent=1).encode())
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, (step, drawn, measured))
        steps, (_, drawn, measured) = [state[0] for state in states], states[0]
        if len(set(steps)) > 1:
            raise ValueError(
                f"the ranks would resume at steps {steps}: {out} must be one folder for all of them"
            )
    model = net
    if not sharded:
        model = (
            torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            if world > 1
            else model
        )
        model = (
            torch.compile(model, dynamic=False) if compiled else model
        )  # around DDP, to split the graph at its buckets
    call = in_bf16(model, config["bf16"])

    curves = None
    if rank == 0:
        if config["tensorboard"] and not stopwatch:
            curves = SummaryWriter(out, purge_step=step + 1)
        parameters = sum(p.numel() for p in net.parameters())
        own = (
            f" ({100 * sum(p.to_local().numel() for p in net.parameters()) / parameters:.0f} % on this rank)"
            if sharded
            else ""
        )
        print(
            f"{out}: {config['model']} with {parameters / 1e6:.2f} M parameters{own}, {len(data)} pictures in {len(data.classes)} classes, {world} x {device.type}"
        )
        print(" ".join(f"{key}={value}" for key, value in config.items() if key != "classes"))
        if before:
            changes = {
                key: value
                for key, value in config.items()
                if value != before.get(key, value) and key != "model_args"
            }
            print(
                f"resumed at step {step}"
                + "".join(f", {key} {before[key]} now {value}" for key, value in changes.items())
            )
        if step >= config["steps"]:
            print(
                f"{out} is at step {step} of --steps {config['steps']}: raise that, or choose another --out"
            )

    # The order of the pictures follows from the seed and how many were seen, each one's noise from the seed, the step and its place.
    parts = [
        range((m * world + rank) * micro, (m * world + rank + 1) * micro)
        for m in range(micro_steps)
    ]
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = workers if config["data"] else 0  # Shapes are drawn on the device
    atexit.register(end_workers)
    fork = (
        "fork" if workers and sys.platform == "linux" else None
    )  # shares memory maps, where other ways would copy them
    loader = iter(
        torch.utils.data.DataLoader(
            data,
            sampler=order(len(data), config["seed"], batch, images, parts),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            multiprocessing_context=fork,
            pin_memory=device.type == "cuda" and bool(config["data"]),
        )
    )
    bins = torch.zeros(
        2, 18, device=device
    )  # sums and counts of the loss by logsnr, from -20 in bins of width 2
    failed = torch.full(
        (19,), math.inf, device=device
    )  # the first step at which a bin's loss, and at the end the gradient, was not finite
    largest_norm = torch.zeros(
        (), device=device
    )  # of the gradient before it is clipped, since the last line of the log

    def stop_signal():
        """The signal that asked any of the ranks to stop, or 0; on the CPU, so that nobody waits for a GPU."""
        number = torch.tensor(max(signals, default=0))
        if world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def save():
        nonlocal saved
        state = whole(
            dict(
                config=config,
                step=step,
                images=images,
                net=net.state_dict(),
                ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
            )
        )
        if rank == 0:
            save_checkpoint(out, config["keep"], state)
        saved = step

    average, (size, latents) = in_bf16(ema, config["bf16"]), drawn_size(config)
    start = window = time.time()
    first_step = window_step = saved = step
    stop, skip_bad = 0, config["skip_bad"] and bool(config["data"])
    while True:
        last = step >= config["steps"]
        due = lambda every, done: (
            every
            and step
            and not done
            and not stop
            and not stopwatch
            and (last or step % every == 0)
        )
        if due(config["sample_every"], drawn or latents):  # of latents there is nothing to be seen
            columns, begun, pictures = min(len(data.classes), 10) or 8, time.time(), []
            label = (
                torch.arange(6 * columns) % columns if data.classes else data.examples(6 * columns)
            )
            guidance, texts = 2.0 if data.classes or config["captions"] is not None else 1.0, None
            if config["captions"] is not None:
                texts = data.captions(range(6 * columns))
            for _, x in sample_shared(
                average,
                size,
                schedule,
                label,
                16,
                device=device,
                steps=64,
                sampler="dpmpp",
                guidance=guidance,
                guidance_interval=config["sampling"].get("guidance_interval"),
            ):
                pictures.append(x)
                if stop := stop_signal():
                    break
            if not stop and rank == 0:
                path, grid = (
                    f"{out}/samples_{step:07d}.png",
                    make_grid(torch.cat(pictures).numpy(), columns, texts=texts),
                )
                with writing(path) as file:
                    grid.save(file, "PNG")
                print(
                    f"wrote {path}: guidance {guidance:g}, columns "
                    + ", ".join(
                        data.classes[:columns] or ["of texts" if texts else "without classes"]
                    ),
                    flush=True,
                )
                if curves:
                    curves.add_image("samples", np.asarray(grid), step, dataformats="HWC")
            window += time.time() - begun  # sampling does not count as training time

        if due(config["fid_every"], measured):
            statistics, begun = Statistics(), time.time()
            label = data.examples(config["fid_images"])
            for _, x in sample_shared(
                average,
                size,
                schedule,
                label,
                micro,
                device=device,
                gather=False,
                steps=64,
                sampler="dpmpp",
            ):
                if len(x):
                    statistics.update(*extract(features, x.permute(0, 3, 1, 2).to(device)))
                if stop := stop_signal():
                    break
            statistics.all_reduce()
            if not stop and rank == 0:
                value = frechet_distance(
                    reference["mu"], reference["sigma"], *statistics.gaussian()
                )
                add_line(
                    log,
                    {
                        "step": step,
                        "images": images,
                        distance: value,
                        "fid_images": config["fid_images"],
                    },
                )
                print(
                    f"step {step}/{config['steps']}  {distance} {value:.3f} of {config['fid_images']} samples, 64 steps without guidance",
                    flush=True,
                )
                if curves:
                    curves.add_scalar(distance, value, step)
            window += time.time() - begun

        if stop and saved != step:
            check_finite(failed, step, net, out, saved)
            save()
        if last or stop:
            break
        drawn = measured = False
        lr = learning_rate(step, config["lr"], config["warmup"], config["decay"], config["steps"])
        for group in optimizer.param_groups:
            group["lr"] = lr

        for m, part in enumerate(parts):
            torch.manual_seed(mix_seed(config["seed"], step, rank, m))  # dropout's
            x, label = (tensor.to(device, non_blocking=True) for tensor in next(loader))
            tick("data")
            x = to_float(x)
            u, eps = example_noise(config["seed"], step, part, x.shape[1:], device)
            dropped = (u[:, 0] < config["label_drop"]).reshape(-1, *[1] * (label.ndim - 1))
            nothing = torch.full_like(label, len(data.classes))
            if config["model_args"].get("portrait"):
                nothing[:, -1:] = label[:, -1:]  # what it looks like is not part of the text
            label = torch.where(dropped, nothing, label)
            if config["flip"]:
                x = torch.where(u[:, 1, None, None, None] < 0.5, x.flip(3), x)
            if world > 1 and not sharded:
                model.require_backward_grad_sync = (
                    m == micro_steps - 1
                )  # ranks exchange gradients once a step
            loss, logsnr = loss_function(call, x, schedule, label, t=u[:, 2], eps=eps)
            (loss.mean() / micro_steps).backward()
            tick("forward+backward")
            where = ((logsnr + 20) / 2).long().clamp(0, 17)
            bins.index_add_(1, where, torch.stack([loss.detach(), torch.ones_like(loss)]))
            failed.scatter_reduce_(
                0, where, torch.where(loss.detach().isfinite(), math.inf, step + 1.0), "amin"
            )

        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        norm = norm.full_tensor() if sharded else norm
        largest_norm = torch.maximum(largest_norm, norm)
        failed[18] = torch.where(norm.isfinite(), failed[18], failed[18].clamp(max=step + 1.0))
        optimizer.step()
        optimizer.zero_grad()
        ema_update(
            ema, net, min(config["ema"], (step + 1) / (step + 10))
        )  # averages less at first, to forget the initial net
        tick("optimizer+EMA")
        step, images = step + 1, images + batch
        if stopwatch:
            if step == stopwatch.steps and rank == 0:
                stopwatch.report(config, world)
            continue

        stop = stop_signal()
        saving = step == config["steps"] or stop or step % config["save_every"] == 0
        logged = saving or step % config["log_every"] == 0
        if logged:
            check_finite(failed, step, net, out, saved)
            if world > 1:
                dist.all_reduce(bins)
                if skip_bad:
                    bad = data.bad.clone()  # to which others write meanwhile
                    dist.all_reduce(bad, dist.ReduceOp.MAX)
                    data.bad[bad > 0] = 1
            (sums, counts), now = bins.tolist(), time.time()
            speed = (step - window_step) * batch / (now - window)
            line = dict(
                step=step,
                images=images,
                loss=sum(sums) / sum(counts),
                lr=lr,
                grad_norm=norm.item(),
                max_grad_norm=largest_norm.item(),
                img_per_s=speed,
                seconds=now - start,
                loss_by_logsnr={
                    2 * i - 20: s / n for i, (s, n) in enumerate(zip(sums, counts)) if n
                },
            )
            if skip_bad:
                line["skipped"] = data.bad.sum().item()
            if rank == 0:
                add_line(log, line)
                for key in ("loss", "lr", "grad_norm", "img_per_s") if curves else ():
                    curves.add_scalar(key, line[key], step)
            bins.zero_()
            largest_norm.zero_()
            window, window_step = now, step

        if saving:
            save()
        if logged and rank == 0:  # after saving, as nobody may be there to read it
            left = round((config["steps"] - step) * (now - start) / (step - first_step))
            skipped = f"  {line['skipped']} pictures skipped" if line.get("skipped") else ""
            print(
                f"step {step}/{config['steps']}  loss {line['loss']:.4f}  {speed:.0f} img/s  {left // 60}:{left % 60:02} left{skipped}",
                flush=True,
            )

    if curves:
        curves.close()
    if log:
        log.close()
    leave_ranks()
    if stop:
        if rank == 0:
            print(
                f"stopped by {signal.Signals(stop).name}, saved at step {step}: the same command resumes there"
            )
        sys.exit(128 + stop)  # the exit status that shells and schedulers expect


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command(main)
