"""Compare the samplers at equal cost, on a run on the built-in Shapes: a table by network calls.

    python -m docs.samplers assets/shapes32.pt --n 200     # the table of docs/performance.md

A guided step calls the network twice: with the label and without it. N calls are therefore N / 2
guided steps. In an interval of noise levels only some of the steps are guided.

"class shown": the share of samples that show their class. FD: FD-Judge to 5,000 held-out shapes. FD
is biased upward for few samples, so compare it within one table only. Both come from docs/judge.py.
"""

import argparse
import sys
import time

import numpy as np
import torch

import fid
from docs.judge import OTHERS, Judge, share_right
from sample import SAMPLERS, sample, sample_batches
from support.checkpoint import load, sample_size
from support.data import Shapes
from support.runtime import in_bf16, run_command

CALLS = (8, 16, 32, 64, 128, 256)


def count_calls(schedule, **options):
    """Return the calls of the network per image that sample() makes with these options."""
    calls = 0

    def net(z, logsnr, label):
        nonlocal calls
        calls += len(z)  # a guided step has a batch of twice the size
        return torch.zeros_like(z)

    label = torch.zeros(1, dtype=torch.int64)
    sample(net, (1, 1, 1, 1), schedule, label=label, null_label=1, **options)
    return calls


def most_steps(calls, schedule, **options):
    """Return the largest number of steps that makes at most this number of calls, or 0."""
    # With an interval, the number of guided steps does not follow from the number of steps alone.
    fitting = [
        steps
        for steps in range(1, calls + 1)
        if count_calls(schedule, steps=steps, **options) <= calls
    ]
    return max(fitting, default=0)


def load_shapes(path):
    """Return what load returns, for a run on the built-in Shapes. Raises ValueError for others."""
    net, config, schedule = load(path)
    if config["classes"] != Shapes.classes:
        raise ValueError(f"{path} was not trained on the built-in Shapes")
    return net, config, schedule


def draw(run, labels, **options):
    """Draw samples of a run, which is the result of load(). Returns uint8 (N, 3, H, W)."""
    net, config, schedule = run
    rounds = sample_batches(
        in_bf16(net, config["bf16"]),
        sample_size(config)[0],
        schedule,
        labels,
        64,
        device=torch.device("cpu"),
        null_label=len(config["classes"]),
        **options,
    )
    return torch.cat([images for _, images in rounds]).permute(0, 3, 1, 2)


def gaussian(network, images):
    """Return the mean and the covariance of the features of images (N, 3, H, W)."""
    statistics = fid.Statistics()
    for part in images.split(100):
        statistics.update(network(part)[0])
    return statistics.gaussian()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.samplers", description="Compare the samplers.")
    parser.error = lambda message: sys.exit(f"docs.samplers: {message}")
    parser.add_argument("run", help="a run on Shapes")
    parser.add_argument("--n", type=int, default=500, help="samples of each setting (default 500)")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="network calls")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        default=(-1.61, 6.39),
        help="the interval of logsnr for the last rows (default: that of Simpler Diffusion)",
    )
    args = parser.parse_args(argv)

    # The model, the classifier that judges its samples, and the features of held-out shapes.
    run = load_shapes(args.run)
    _, config, schedule = run
    judge = Judge()
    with np.load(OTHERS) as others:
        reference = gaussian(judge, torch.from_numpy(others["x"]).permute(0, 3, 1, 2))
    # All settings draw the same classes from the same noise.
    labels = torch.arange(args.n) % len(config["classes"])
    low, high = args.guidance_interval
    guidances = {
        "no guidance": dict(guidance=1.0),
        "guidance 2": dict(guidance=2.0),
        f"guidance 2, logsnr {low:g} to {high:g}": dict(
            guidance=2.0, guidance_interval=(low, high)
        ),
    }
    print(f"{args.n} samples. Each cell: class shown in %, FD (steps)")
    print("| sampler | guidance | " + " | ".join(f"{calls} calls" for calls in args.calls) + " |")
    print("|---" * (2 + len(args.calls)) + "|", flush=True)
    # One row for each guidance and sampler, one cell for each number of calls.
    for guidance, options in guidances.items():
        for sampler in SAMPLERS:
            cells = []
            for calls in args.calls:
                begin = time.time()
                # The most steps that make at most this number of calls.
                steps = most_steps(calls, schedule, sampler=sampler, **options)
                if not steps:
                    cells.append("-")
                    continue
                images = draw(run, labels, sampler=sampler, steps=steps, **options)
                # The share that show their class, and the Fréchet distance to held-out shapes.
                share = share_right(judge, images, labels)
                distance = fid.frechet_distance(*reference, *gaussian(judge, images))
                cells.append(f"{100 * share:.1f}, {distance:.2f} ({steps})")
                print(
                    f"{sampler}, {guidance}, {calls}: {cells[-1]}, {time.time() - begin:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            print(f"| {sampler} | {guidance} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main)
