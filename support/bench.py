"""Throughput, MFU and memory of a training step: what train.py --bench prints."""

import math
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from support.checkpoint import build_net, sample_size
from support.runtime import in_bf16


class Stopwatch:
    """Measure training steps in windows of 5 steps, after 10 steps of warmup.

    Windows alternate. One measures throughput: it waits for the device only at its end. The next
    measures the parts of a step: it waits for the device after each of them.
    """

    steps = 60
    parts = ("data", "forward+backward", "optimizer+EMA")

    def __init__(self, device):
        self.device = device
        self.step = 0
        self.last = 0.0  # time of the last wait
        self.windows = []  # seconds of each throughput window
        self.seconds = dict.fromkeys(self.parts, 0.0)  # of each part, over all other windows

    def tick(self, part):
        """Note the end of a part. The last part ends the step."""
        measures_parts = self.step // 5 % 2 == 1
        ends_step = part == self.parts[-1]
        ends_window = ends_step and self.step % 5 == 4
        if measures_parts or ends_window:
            # A GPU computes asynchronously. Wait for it before reading the clock.
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()

            # The first 10 steps allocate memory and compile. They do not count.
            if self.step >= 10 and measures_parts:
                self.seconds[part] += now - self.last
            elif self.step >= 10:
                self.windows.append(now - self.last)
            self.last = now
        self.step += ends_step

    def report(self, config, world):
        """Print the median throughput, the time of each part, MFU and peak memory.

        MFU: the counted FLOPs per second as a share of the measured peak of all ranks.
        """
        # The median is robust against a window that other processes slow down.
        batch = config["batch"]
        speeds = sorted(5 * batch / seconds for seconds in self.windows)
        speed = speeds[len(speeds) // 2]
        split_steps = (self.step - 10) // 2  # steps in the windows that measure parts
        parts = ", ".join(
            f"{part} {1e3 * seconds / split_steps:.1f} ms" for part, seconds in self.seconds.items()
        )
        print(
            f"{speed:.1f} img/s ({speeds[0]:.1f} to {speeds[-1]:.1f}), "
            f"{1e3 * batch / speed:.1f} ms per step of {batch}; waiting after each part: {parts}"
        )

        # The peak is measured on this machine, not taken from a data sheet. It needs memory, too.
        memory = peak_memory(self.device)
        flops = training_flops(config)
        peak = matmul_peak(self.device)
        precision = "bfloat16" if self.device.type == "cuda" else "float32"
        print(
            f"MFU {100 * speed * flops / (world * peak):.1f} %: "
            f"{flops / 1e9:.2f} GFLOP per image, "
            f"matmul peak {peak / 1e12:.2f} TFLOP/s ({precision}) on each of {world}; "
            f"peak memory {memory / 2**30:.2f} GiB"
        )


def peak_memory(device):
    """Return the peak memory of this process in bytes: on a GPU its tensors, on a CPU all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()

    # ru_maxrss is in bytes on macOS, and in KiB on Linux.
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def training_flops(config):
    """Count the FLOPs per image of a training step, forward and backward.

    A multiply-accumulate counts as two. The network is on the meta device: nothing is computed.
    """
    # MFU excludes recomputed activations.
    model_args = dict(config["model_args"])
    model_args.pop("checkpoint_resolutions", None)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_net(config["model"], model_args)
        size, _ = sample_size(config)
        # A network may require a label. For a text, None means the empty one.
        is_text = bool(model_args.get("text_tokens"))
        label = None if is_text else torch.zeros(1, dtype=torch.int64)
        net(torch.empty(1, *size), torch.empty(1), label).sum().backward()
    return counter.get_total_flops()


def matmul_peak(device, repeats=10):
    """Measure the FLOP/s of a large matrix product, the best of a number of repeats.

    On a GPU 8192 x 8192 in bfloat16, on a CPU 2048 x 2048 in float32.
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf  # seconds
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def cpu_seconds_per_image(config):
    """Estimate the time of a training step on this CPU in seconds, divided by the batch size.

    A small network is timed, forward and backward. For a large one that would take too long: its
    FLOPs are counted, and networks here reach about half the speed of a matrix product.
    """
    # The estimate changes no random number of the run.
    with torch.random.fork_rng(devices=[]):
        flops = training_flops(config)
        if flops > 2e10:
            return flops / (0.5 * matmul_peak(torch.device("cpu"), repeats=2))

        net = in_bf16(build_net(config["model"], config["model_args"]), config["bf16"])
        z = torch.randn(8, *sample_size(config)[0])
        logsnr, label = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
        # The first time, memory is allocated. The second counts.
        for _ in range(2):
            start = time.perf_counter()
            net(z, logsnr, label).square().mean().backward()
            seconds = time.perf_counter() - start
    return seconds / len(z)
