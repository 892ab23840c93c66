"""T-Stitch: trajectory stitching (Pan et al., 2024, arXiv 2402.14167).

A small net draws the first, noisy part of the trajectory and a large net the rest. Nothing is
trained. Early steps decide only what is coarse, and nets of all sizes agree about it; so these
steps go to a net that costs a tenth. Two or more runs are needed, on the same dataset and with the
same schedule. The small ones must be trained well, too.

    python -m related.tstitch runs/small runs/large --fraction 0.4 --out grid.png
    python -m related.tstitch runs/s runs/m runs/l --fraction 0.3 0.3 --guidance 2 --out grid.png
    python -m related.tstitch runs/small runs/large --cosine         # similarity of trajectories

--fraction 0.4 gives the first 40 % of t to the first run.
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
    write_images,
)
from sample import SAMPLERS, sample
from support.runtime import pixels, run_command

# ---------------------------------------------------------------- stitching


def stitch(nets, fractions, schedule):
    """Combine nets to one: net k draws the fraction fractions[k] of t, from t = 1 to 0.

    The paper orders them from small to large. With steps uniform in t, step i of T (from 0) belongs
    to the first net k with i < T (fractions[0] + ... + fractions[k]). Samplers and guidance work as
    usual. The net is chosen by logsnr, and reading it waits for a GPU once per step. Raises
    ValueError for fractions that do not sum to 1.
    """
    valid = all(fraction >= 0 for fraction in fractions) and abs(sum(fractions) - 1) < 1e-6
    if len(nets) != len(fractions) or not valid:
        raise ValueError(
            f"{len(nets)} nets need {len(nets)} fractions, 0 or more, that sum to 1, "
            f"not {list(fractions)}"
        )

    # The logsnr at which each net but the first begins. A step exactly there must not depend on
    # rounding, so the nets begin 1e-5 of t earlier.
    done = torch.tensor(list(itertools.accumulate(fractions[:-1])), dtype=torch.float64)
    begins = schedule((1 - done + 1e-5).clamp(0, 1))  # (K - 1,), rising

    # A net that begins at t = 1 takes all levels from the first on; one at t = 0 takes none.
    begins = torch.where(done > 0, torch.where(done < 1 - 1e-9, begins, math.inf), -math.inf)

    def stitched(z, logsnr, label=None):
        # In sampling, all images of a batch have the same noise level.
        which = torch.bucketize(logsnr.double(), begins.to(logsnr.device), right=True)  # (B,)
        numbers = which.unique().tolist()
        if len(numbers) == 1:
            return nets[numbers[0]](z, logsnr, label)

        # Otherwise each net gets the images of its noise levels.
        v_hat = torch.empty_like(z)
        for k in numbers:
            own = which == k
            own_label = None if label is None else label[own]
            v_hat[own] = nets[k](z[own], logsnr[own], own_label).to(z.dtype)
        return v_hat

    stitched.num_classes = getattr(nets[0], "num_classes", None)
    return stitched


def interleaved(nets, steps, schedule):
    """Alternate between the nets for `steps` steps uniform in t: a baseline for stitch()."""
    # Every step is a range of its own.
    return stitch([nets[i % len(nets)] for i in range(steps)], [1 / steps] * steps, schedule)


# ---------------------------------------------------------------- choosing the fractions


def all_fractions(number, parts=10):
    """Return all fractions of `number` nets in multiples of 1 / parts: 11 for two nets, 66 for 3.

    The paper measures time and quality of each and picks from this table.
    """
    table = []
    for first in itertools.product(range(parts + 1), repeat=number - 1):
        if sum(first) <= parts:
            # The last net takes what the others leave.
            counts = (*first, parts - sum(first))
            table.append(tuple(count / parts for count in counts))
    return table


def pick(table, budget):
    """Return the row with the best quality that costs at most `budget`.

    table: rows (fractions, cost, quality). Raises ValueError if every row costs more.
    """
    affordable = [row for row in table if row[1] <= budget]
    if not affordable:
        cheapest = min(row[1] for row in table)
        raise ValueError(f"no row costs {budget:g} or less: the cheapest costs {cheapest:g}")
    return max(affordable, key=lambda row: row[2])


# ---------------------------------------------------------------- how similar trajectories are


def trajectory(net, shape, schedule, **options):
    """Return all noisy images z of a sampling run and its result: (steps + 1, *shape), on the CPU.

    options: see sample.sample.
    """
    seen = []

    def watched(z, logsnr, label=None):
        # Guidance doubles the batch: its first half is enough.
        seen.append(z[: shape[0]].cpu())
        return net(z, logsnr, label)

    watched.num_classes = getattr(net, "num_classes", None)
    x = sample(watched, shape, schedule, **options)
    return torch.stack([*seen, x.cpu()])


def print_similarity(nets, config, schedule, label, device, settings):
    """Print the cosine similarity of the nets' trajectories from the same noise, step by step.

    The paper finds almost 100 % in the early steps, which is why stitching works.
    """
    shape = (len(label), 3, *pixels(config["res"]))
    label = label.to(device)
    null_label = len(config["classes"])
    first, last = (
        trajectory(
            net, shape, schedule, label=label, null_label=null_label, device=device, **settings
        ).flatten(2)
        for net in (nets[0], nets[-1])
    )  # (steps + 1, N, 3 H W) each
    similarity = torch.cosine_similarity(first, last, dim=2).mean(1)
    for i, value in enumerate(similarity.tolist()):
        print(f"after {i:3d} steps: {value:.4f}")


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        prog="tstitch",
        description="Draw images with runs of several sizes, one after the other.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"tstitch: {message}")
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        help="folders or checkpoints of runs on the same dataset, from small to large",
    )
    add("--fraction", type=float, nargs="*", help="fraction of t for each run except the last")
    add("--interleave", action="store_true", help="baseline: alternate between the runs")
    add(
        "--cosine",
        action="store_true",
        help="only print how similar the trajectories of the first and the last run are",
    )
    add("--n", type=int, default=60, help="number of images (default 60)")
    add("--batch", type=int, default=64, help="batch size (default 64)")
    add("--steps", type=int, default=100, help="sampling steps (default 100)")
    add("--sampler", choices=SAMPLERS, default="ddim")
    add("--guidance", type=float, default=1.0, help="guidance scale (default 1: off)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)

    check_numbers(options, ("n", "batch", "steps"), ("seed",))
    check_out(options.out)
    if not math.isfinite(options.guidance):
        raise ValueError("--guidance must be a finite number")

    # Exactly one way of using the runs, and --fraction with the right number of values.
    has_fractions = options.fraction is not None
    one_way = (options.interleave or options.cosine) + has_fractions == 1
    if not one_way or (has_fractions and len(options.fraction) != len(options.runs) - 1):
        raise ValueError(
            f"{len(options.runs)} runs need one of --fraction with {len(options.runs) - 1} "
            "of them, --interleave, and --cosine"
        )
    return options


def load_runs(options, device):
    """Load the runs. Returns (nets, config, schedule).

    Raises ValueError for runs that differ in resolution, classes or schedule.
    """
    is_guided = options.guidance != 1
    loaded = [
        load_run(path, device, classes=is_guided, null_label=is_guided) for path in options.runs
    ]
    nets = [net for net, _, _ in loaded]
    _, config, schedule = loaded[0]
    for path, (_, other, _) in zip(options.runs, loaded):
        keys = [key for key in ("res", "classes", "schedule") if other[key] != config[key]]
        if keys:
            raise ValueError(
                f"{path} and {options.runs[0]} differ in {' and '.join(keys)}: "
                "they cannot be stitched"
            )
    return nets, config, schedule


def main(argv=None):
    options = parse(argv)
    device = one_process(options.device)
    nets, config, schedule = load_runs(options, device)
    label = labels(config, options.n)

    # Steps are uniform in t, because the fractions are fractions of t.
    settings = dict(
        steps=options.steps,
        sampler=options.sampler,
        grid="t",
        guidance=options.guidance,
        seed=options.seed,
    )
    if options.cosine:
        print_similarity(nets, config, schedule, label, device, settings)
        return

    if options.interleave:
        net = interleaved(nets, options.steps, schedule)
    else:
        # The last run draws what the others leave.
        rest = max(0.0, 1 - sum(options.fraction))
        net = stitch(nets, [*options.fraction, rest], schedule)
    start = time.time()
    images = drawn(net, config, schedule, label, options.batch, device, **settings)
    print(f"{options.n} images in {time.time() - start:.1f} s")
    write_images(options.out, images, label, config["classes"])


if __name__ == "__main__":
    run_command(main)
