"""T-Stitch (arXiv 2402.14167): a small net draws the first, noisy part of the trajectory and a large one the rest, without any training.

Early steps decide coarse things, about which nets of all sizes agree; so they are left to a net that costs a tenth. Needs two or more nets of
the same pictures and the same schedule, of which the small ones are trained well, too.

    python -m related.tstitch runs/small runs/large --fraction 0.4 --out grid.png        # runs/small for the first 40 % of t
    python -m related.tstitch runs/s runs/m runs/l --fraction 0.3 0.3 --guidance 2 --n 500 --out samples.npz
    python -m related.tstitch runs/small runs/large --cosine                             # how alike their trajectories are, step by step
"""

import argparse
import itertools
import math
import sys
import time

import torch

from related.common import (
    check_numbers,
    check_out,
    drawn,
    labels,
    load_run,
    one_process,
    write_pictures,
)
from sample import SAMPLERS, pixels, run_command, sample


def stitch(nets, fractions, schedule):
    """The nets one after the other, as one net: net k draws the share fractions[k] of t from 1 to 0, small ones first.

    With steps uniform in t, step i of T (from 0) is that of the first net k with i < T (fractions[0] + ... + fractions[k]). Anything else about a
    sampler may be as usual, guidance, too. A net is chosen by logsnr, for which a GPU is waited for once a step. Raises ValueError.
    """
    if len(nets) != len(fractions) or not (
        all(fraction >= 0 for fraction in fractions) and abs(sum(fractions) - 1) < 1e-6
    ):
        raise ValueError(
            f"{len(nets)} nets take as many fractions from 0 on, the sum of which is 1, not {list(fractions)}"
        )
    done = torch.tensor(list(itertools.accumulate(fractions[:-1])), dtype=torch.float64)
    begins = schedule(
        (1 - done + 1e-5).clamp(0, 1)
    )  # a hundred-thousandth earlier, or rounding would decide
    begins = torch.where(done > 0, torch.where(done < 1 - 1e-9, begins, math.inf), -math.inf)

    def stitched(z, logsnr, label=None):
        which = torch.bucketize(
            logsnr.double(), begins.to(logsnr.device), right=True
        )  # (B,), all alike in sampling
        numbers = which.unique().tolist()
        if len(numbers) == 1:
            return nets[numbers[0]](z, logsnr, label)
        v_hat = torch.empty_like(z)
        for k in numbers:
            own = which == k
            v_hat[own] = nets[k](z[own], logsnr[own], None if label is None else label[own]).to(
                z.dtype
            )
        return v_hat

    stitched.num_classes = nets[0].num_classes
    return stitched


def interleaved(nets, steps, schedule):
    """For comparison: the nets in turns, step by step, for so many steps uniform in t."""
    return stitch([nets[i % len(nets)] for i in range(steps)], [1 / steps] * steps, schedule)


def all_fractions(number, parts=10):
    """All fractions of so many nets that are multiples of 1 / parts: 11 of two nets, 66 of three."""
    counts = itertools.product(range(parts + 1), repeat=number - 1)
    return [
        tuple(n / parts for n in (*first, parts - sum(first)))
        for first in counts
        if sum(first) <= parts
    ]


def pick(table, budget):
    """Of rows (fractions, cost, quality), measured for all_fractions, the one with the best quality that costs at most the budget. Raises ValueError if none does."""
    affordable = [row for row in table if row[1] <= budget]
    if not affordable:
        raise ValueError(
            f"nothing costs {budget:g} or less: the cheapest is {min(row[1] for row in table):g}"
        )
    return max(affordable, key=lambda row: row[2])


def trajectory(net, shape, schedule, **options):
    """The noisy pictures z that a sampler shows the net, one after the other, and what it returns at last: (steps + 1, *shape), on the CPU. options: see sample."""
    seen = []

    def watched(z, logsnr, label=None):
        seen.append(z[: shape[0]].cpu())  # guidance shows it each picture twice
        return net(z, logsnr, label)

    watched.num_classes = net.num_classes
    x = sample(watched, shape, schedule, **options)
    return torch.stack([*seen, x.cpu()])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="tstitch",
        description="Draw pictures with nets of several sizes, one after the other.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"tstitch: {message}")
    parser.add_argument(
        "runs",
        nargs="+",
        help="folders or checkpoints of runs on the same pictures, from small to large",
    )
    parser.add_argument("--fraction", type=float, nargs="*", help="of t, for each run but the last")
    parser.add_argument(
        "--interleave", action="store_true", help="the runs in turns, step by step, instead"
    )
    parser.add_argument(
        "--cosine",
        action="store_true",
        help="only print how alike the trajectories of the first and the last run are",
    )
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)
    check_numbers(options, ("n", "batch", "steps"), ("seed",))
    check_out(options.out)
    if not math.isfinite(options.guidance):
        raise ValueError("--guidance takes a finite number")
    if (
        (options.interleave or options.cosine) + (options.fraction is not None) != 1
        or options.fraction is not None
        and len(options.fraction) != len(options.runs) - 1
    ):
        raise ValueError(
            f"{len(options.runs)} runs take either --fraction with {len(options.runs) - 1} of them, or --interleave, or --cosine"
        )
    device = one_process(options.device)
    loaded = [load_run(path, device, classes=options.guidance != 1) for path in options.runs]
    nets, (_, config, schedule) = [net for net, *_ in loaded], loaded[0]
    for path, (_, other, _) in zip(options.runs, loaded):
        if different := [
            key for key in ("res", "classes", "schedule") if other[key] != config[key]
        ]:
            raise ValueError(
                f"{path} and {options.runs[0]} have another {' and another '.join(different)}: they cannot be stitched"
            )
    settings = dict(
        steps=options.steps,
        sampler=options.sampler,
        grid="t",
        guidance=options.guidance,
        seed=options.seed,
    )
    label = labels(config, options.n)
    if options.cosine:
        shape = (options.n, 3, *pixels(config["res"]))
        first, last = (
            trajectory(
                net, shape, schedule, label=label.to(device), device=device, **settings
            ).flatten(2)
            for net in (nets[0], nets[-1])
        )
        for i, value in enumerate(torch.cosine_similarity(first, last, dim=2).mean(1).tolist()):
            print(f"after {i:3d} steps: {value:.4f}")
        return
    net = (
        interleaved(nets, options.steps, schedule)
        if options.interleave
        else stitch(nets, [*options.fraction, max(0.0, 1 - sum(options.fraction))], schedule)
    )
    begun = time.time()
    pictures = drawn(net, config, schedule, label, options.batch, device, **settings)
    print(f"{options.n} pictures in {time.time() - begun:.1f} s")
    write_pictures(options.out, pictures, label, config["classes"])


if __name__ == "__main__":
    run_command(main)
