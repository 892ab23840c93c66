"""T-Stitch: trajectory stitching (Pan et al., 2024, arXiv 2402.14167).

A small net draws the first, noisy part of the trajectory and a large net the rest. Nothing is
trained. Early steps decide only what is coarse, and nets of all sizes agree about it; so these
steps go to a net that costs a tenth. Two or more runs are needed, on the same dataset and with the
same schedule. The small ones must be trained well, too. A distilled student (related/distill.py)
is also a cheap net: it draws its part in its own long steps, and its teacher the rest.

    python -m related.tstitch                                # the paper's pairs; needs no run
    python -m related.tstitch runs/small runs/large --fraction 0.4 --out grid.png
    python -m related.tstitch runs/s runs/m runs/l --fraction 0.3 0.3 --guidance 2 --out grid.png
    python -m related.tstitch runs/teacher-8steps runs/teacher --fraction 0.5 --steps 64
    python -m related.tstitch runs/small-text runs/text --fraction 0.4 --prompt "a red star"
    python -m related.tstitch dit-s.pt dit-xl.pt --fraction 0.4 --label 207 --guidance 4 --out z.npz
    python -m related.tstitch runs/small runs/large --cosine         # similarity of trajectories
    python -m related.tstitch runs/small runs/large --table runs/table.jsonl --budget 60 \\
        --reference runs/others.npz --features docs.judge:Judge      # the best within 60 seconds

--fraction 0.4 gives the first 40 % of t to the first run. --table measures time and quality of all
fractions, and --budget picks the best row that is fast enough.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from typing import NamedTuple

import torch

from fid import INCEPTION, distance_name
from related.common import (
    add_text_options,
    check_numbers,
    check_out,
    introduce,
    load_run,
    one_process,
    open_reference,
    quality,
    reading,
    refuse,
    text_labels,
    write_images,
)
from sample import SAMPLERS, guided, has_captions, parse_labels, sample, sample_batches
from support.checkpoint import sample_size
from support.runtime import run_command

# The paper's nets: millions of parameters, GFLOPs per step, seconds for 8 images, FID of 5,000.
PUBLISHED_NETS = {
    "DiT-S": (33.0, 5.5, 1.6, 33.46),
    "DiT-B": (130.5, 21.8, 4.0, 12.30),
    "DiT-XL": (675.1, 114.5, 16.5, 9.20),
}
# Its pairs: seconds and FID, for 0, 10, ..., 100 % of the steps by the small net.
PUBLISHED_PAIRS = {
    "LDM-S, LDM": (
        (7.1, 6.7, 6.2, 5.8, 5.3, 4.9, 4.5, 4.1, 3.6, 3.1, 2.9),
        (20.11, 19.54, 18.74, 18.64, 18.60, 19.33, 21.81, 26.03, 30.41, 35.24, 40.92),
    ),
    "DiT-S, U-ViT-H": (
        (15.90, 13.21, 11.91, 10.61, 9.42, 7.92, 6.57, 5.23, 3.84, 2.50, 1.40),
        (15.04, 13.68, 12.44, 12.76, 14.19, 17.6, 29.4, 53.75, 74.14, 84.33, 121.95),
    ),
}

# ---------------------------------------------------------------- stitching


def stitch(nets, fractions, schedule):
    """Combine nets to one: net k draws the fraction fractions[k] of t, from t = 1 to 0.

    The paper orders them from small to large. With steps uniform in t, step i of T (from 0) belongs
    to the first net k with i < T (fractions[0] + ... + fractions[k]). Samplers and guidance work as
    usual. The net is chosen by logsnr, and reading it waits for a GPU at each step. Raises
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
        # Each net gets the images of its noise levels. In sampling, a batch has one level.
        which = torch.bucketize(logsnr.double(), begins.to(logsnr.device), right=True)  # (B,)
        v_hat = torch.empty_like(z)
        for k in which.unique().tolist():
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


# ---------------------------------------------------------------- the steps


def ddpm_linear(t):
    """The logsnr of DDPM's linear schedule, for t in [0, 1], at most 15.

    The paper's nets have it: alpha^2 = exp(-9.95 t^2 - 0.1 t) for betas from 1e-4 to 0.02.
    """
    t = torch.as_tensor(t)
    return -torch.log(torch.expm1(9.95 * t**2 + 0.1 * t)).clamp(min=-15.0)


def time_grid(fractions, own_steps, steps):
    """Return the times from 1 to 0, float64, if each net draws its fraction in its step length.

    own_steps: for each net the steps that a student has learned, for t from 1 to 0, or None: then
    `steps` of them. Raises ValueError where a student would need other steps than it has learned.
    """
    times, done = [1.0], 0.0
    for fraction, n in zip(fractions, own_steps):
        ends = (done, done + fraction)
        if n and fraction > 0 and any(abs(n * end - round(n * end)) > 1e-6 for end in ends):
            raise ValueError(
                f"--fraction, --parts: a student of {n} steps draws multiples of 1/{n} of t, "
                "not the part from {:g} to {:g}".format(*ends)
            )
        # At least one step for a net that draws anything.
        count = max(1, round(fraction * (n or steps))) if fraction > 0 else 0
        times += [1 - done - fraction * (i + 1) / count for i in range(count)]
        done += fraction
    times[-1] = 0.0
    return torch.tensor(times, dtype=torch.float64)


def follow(logsnrs):
    """Return the schedule whose steps, uniform in t, have these logsnr (steps + 1,), rising."""
    return lambda t: logsnrs[((1 - t) * (len(logsnrs) - 1)).round().long()]


# ---------------------------------------------------------------- choosing the fractions


def all_fractions(number, parts=10):
    """Return all fractions of `number` nets in multiples of 1 / parts: 11 for two nets, 66 for 3.

    The paper measures time and quality of each and picks from this table.
    """
    counts = itertools.product(range(parts + 1), repeat=number)
    return [tuple(n / parts for n in row) for row in counts if sum(row) == parts]


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


def print_similarity(runs, label, steps, device):
    """Print the cosine similarity of the nets' trajectories from the same noise, step by step.

    The paper finds almost 100 % in the early steps, which is why stitching works.
    """
    shape = (len(label), *runs.size)
    settings = dict(runs.settings, steps=steps, device=device)
    settings["label"] = label[torch.arange(len(label))].to(device)

    def trajectory(net):
        # All noisy images z of a sampling run, and its result: (steps + 1, N, C H W).
        seen = []
        observe = dict(observe=lambda step, z, logsnr, v_hat: seen.append(z.cpu()))
        x = sample(net, shape, runs.schedule, **settings, **observe)
        return torch.stack([*seen, x.cpu()]).flatten(2)

    first, last = trajectory(runs.nets[0]), trajectory(runs.nets[-1])
    similarity = torch.cosine_similarity(first, last, dim=2).mean(1)
    for i, value in enumerate(similarity.tolist()):
        print(f"after {i:3d} steps: {value:.4f}")


# ---------------------------------------------------------------- the runs


class Runs(NamedTuple):
    """The runs of the command, from small to large, on one dataset and with one schedule."""

    nets: list  # v_hat = net(z, logsnr, label), guided
    own_steps: list  # the number of steps of each student, None for other runs
    config: dict  # the settings of the first run
    schedule: object
    size: tuple  # (C, H, W) of a sample
    latents: bool  # whether the samples are latents
    settings: dict  # of sampling: options of sample.sample


def guided_run(net, config, scale, null_label):
    """Guide a net as its run is sampled: in the interval of logsnr that the run names, if any.

    As in the paper, guidance is inside of each net. A student takes the scale as an input.
    """
    guided_net = guided(net, scale, null_label)
    if "guidance_interval" not in config["sampling"]:
        return guided_net
    low, high = config["sampling"]["guidance_interval"]

    def in_interval(z, logsnr, label=None):
        # In sampling, all images of a batch have the same noise level.
        return (guided_net if low <= logsnr[0] <= high else net)(z, logsnr, label)

    return in_interval


def load_runs(options, device):
    """Load the runs. Returns (runs, texts, label of each image, a sequence or a tensor).

    texts: the prompt of each image, or None. Raises ValueError for runs that differ in resolution,
    channels, classes, schedule or text encoder, and for prompts without a run on texts.
    """
    is_guided = options.guidance != 1
    kinds = dict(texts=True, students=True, latents=True, classes=is_guided, null_label=is_guided)
    loaded = [load_run(path, device, **kinds) for path in options.runs]
    first, (_, config, schedule) = options.runs[0], loaded[0]
    for path, (_, other, _) in zip(options.runs, loaded):
        keys = ("res", "in_channels", "classes", "schedule")
        keys += ("captions", "text_encoder", "text_tokens")
        settings, expected = other | other["model_args"], config | config["model_args"]
        keys = [key for key in keys if settings.get(key) != expected.get(key)]
        if keys:
            raise ValueError(
                f"{path} and {first} differ in {' and '.join(keys)}: they cannot be stitched"
            )
    size, latents = sample_size(config)
    if latents and options.table:
        raise ValueError(f"{first} draws latents: --table measures the distance of images")
    if latents and not options.cosine and not options.out.endswith(".npz"):
        raise ValueError(f"{first} draws latents, not images: use --out samples.npz")

    # Image k shows class k, or prompt k, of those that it cycles through.
    keys = ("prompt", "prompts", "negative", "text_encoder")
    if has_captions(config):
        if options.label or not (options.prompt or options.prompts):
            raise ValueError(f"{first} was trained on texts: use --prompt or --prompts, no --label")
        given = {key: getattr(options, key) for key in (*keys, "guidance")}
        texts, label, null_label = text_labels(first, config, options.n, device, **given)
    else:
        refuse(options, keys, f"{first} was trained without texts")
        texts, null_label = None, len(config["classes"])
        label = parse_labels(options.label, config["classes"], options.n)

    nets, own_steps = [], []
    for path, (net, run_config, _) in zip(options.runs, loaded):
        largest = getattr(net, "max_guidance", None)
        if largest and not 1 <= options.guidance <= largest:
            raise ValueError(f"--guidance: {path} takes 1 to {largest:g}, not {options.guidance:g}")
        nets.append(guided_run(net, run_config, options.guidance, null_label))
        own_steps.append(run_config["sampling"]["steps"] if largest else None)
    if any(own_steps) and (options.interleave or options.cosine or options.spacing != "t"):
        raise ValueError("a student has its own steps: omit --interleave, --cosine and --spacing")
    # Steps are uniform in t, because the fractions are fractions of t. Latents have no fixed range.
    settings = dict(sampler=options.sampler, grid="t", seed=options.seed)
    settings["clip"] = None if latents else "static"
    return Runs(nets, own_steps, config, schedule, size, latents, settings), texts, label


# ---------------------------------------------------------------- drawing and measuring


def draw(runs, fractions, label, options, device):
    """Draw an image for each label. Returns images (N, H, W, C) on the CPU, and seconds.

    The images are uint8, or float latents. fractions: of t for each run, or None to interleave
    them. On a CPU the seconds are processor time per thread, which other programs disturb little.
    They are those of the fastest batch, times the number of batches.
    """
    schedule = ddpm_linear if options.spacing == "ddpm" else runs.schedule
    steps = options.steps
    if fractions is None:
        net = interleaved(runs.nets, steps, schedule)
    else:
        net = stitch(runs.nets, fractions, schedule)
    if any(runs.own_steps):
        # Each net keeps its own step length: long for a student, short for its teacher.
        times = time_grid(fractions, runs.own_steps, steps)
        schedule, steps = follow(runs.schedule(times)), len(times) - 1

    settings = dict(runs.settings, steps=steps, latents=runs.latents, device=device)
    rounds = sample_batches(net, runs.size, schedule, label, options.batch, **settings)
    is_cpu = device.type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    images, times = [], [clock()]
    for _, part in rounds:  # which the device has finished
        images.append(part)
        times.append(clock())
    fastest = min(end - start for start, end in zip(times, times[1:]))
    return torch.cat(images), fastest * len(images) / (torch.get_num_threads() if is_cpu else 1)


def read_table(path, settings):
    """Return the rows of a table that an earlier command has measured, {fractions: row}.

    The first line of the file is its settings. Raises ValueError if they are not these.
    """
    if not os.path.exists(path):
        return {}
    with reading(path, "related.tstitch --table"), open(path) as file:
        first, *rows = map(json.loads, file)
        table = {tuple(row["fractions"]): row for row in rows}
    names = [key for key in settings if first.get(key) != settings[key]]
    if names:
        raise ValueError(
            f"--table {path} was measured with other settings ({', '.join(names)}): "
            "choose another file, or delete it"
        )
    return table


def fill_table(runs, label, options, device):
    """Measure time and quality of all fractions, print and write a row for each, and pick one.

    Rows that are in the file already are not measured again.
    """
    keys = ("runs", "n", "batch", "steps", "sampler", "guidance", "seed", "spacing")
    keys += ("label", "prompt", "prompts", "negative", "features", "reference")
    settings = {key: getattr(options, key) for key in keys}
    table = read_table(options.table, settings)
    grid = all_fractions(len(runs.nets), options.parts)
    for fractions in grid:
        time_grid(fractions, runs.own_steps, options.steps)  # an error comes before the work
    if not table.keys() >= set(grid):
        reference = open_reference(options.reference, options.features, device)

    schedule = ddpm_linear if options.spacing == "ddpm" else runs.schedule
    is_labeled = bool(runs.config["classes"])
    name = distance_name(options.features or INCEPTION)
    print(f"fractions{'':12s} logsnr of the last switch   seconds  {name:>10s}  class shown")
    with open(options.table, "a") as file:
        if not file.tell():
            file.write(json.dumps(settings) + "\n")
            file.flush()
        for fractions in grid:
            if fractions not in table:
                images, seconds = draw(runs, fractions, label, options, device)
                distance, share = quality(images, label if is_labeled else None, reference, device)
                row = dict(fractions=fractions, seconds=seconds, distance=distance, share=share)
                table[fractions] = row
                file.write(json.dumps(row) + "\n")
                file.flush()

            # Where the last net takes over: the early steps are those below this logsnr.
            row = table[fractions]
            switch = torch.tensor(fractions[-1], dtype=torch.float64)
            shown = "" if row["share"] is None else f"{100 * row['share']:.1f} %"
            print(
                f"{' '.join(f'{fraction:.3g}' for fraction in fractions):21s} "
                f"{schedule(switch).item():25.2f} {row['seconds']:9.1f} "
                f"{row['distance']:11.2f} {shown:>12s}",
                flush=True,
            )
    if options.budget is not None:
        # The paper's rule: of the rows within the budget, the best one.
        rows = [(key, table[key]["seconds"], -table[key]["distance"]) for key in grid]
        fractions, seconds, _ = pick(rows, options.budget)
        shares = " ".join(f"{fraction:.3g}" for fraction in fractions[:-1])
        print(f"best within {options.budget:g} s: --fraction {shares}, {seconds:.1f} s")


def print_published():
    """Print the paper's nets and pairs, with our counts and our model of the time."""
    print("net       parameters  GFLOPs per step  seconds  FID")
    for name, (parameters, gflops, seconds, score) in PUBLISHED_NETS.items():
        print(f"{name:8s} {parameters:9.1f} M {gflops:16.1f} {seconds:8.1f} {score:6.2f}")
    counts = [len(all_fractions(number)) for number in (2, 3)]
    print("\nfractions in tenths: two nets {} (published: 11), three {} (66)".format(*counts))
    for name, (seconds, scores) in PUBLISHED_PAIRS.items():
        # Our model of the time: a step costs what its net costs.
        line = [seconds[0] + (seconds[-1] - seconds[0]) * i / 10 for i in range(11)]
        rows = list(zip(range(11), seconds, [-score for score in scores]))
        best, _, _ = pick(rows, 0.75 * line[0])
        print(f"\n{name}: the best FID within 75 % of the time is that of {10 * best} %")
        titles = ("% by the small net", "s, straight line", "s, published", "FID, published")
        for title, values in zip(titles, (range(0, 101, 10), line, seconds, scores)):
            print(f"{title:18s}" + "".join(f"{value:8.4g}" for value in values))


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
    add("runs", nargs="*", help="runs on one dataset, from small to large; without, the paper's")

    # What to do with the runs.
    add("--fraction", type=float, nargs="*", help="fraction of t for each run except the last")
    add("--interleave", action="store_true", help="baseline: alternate between the runs")
    add("--cosine", action="store_true", help="similarity of trajectories, first and last run")
    add("--table", metavar="FILE", help="measure all fractions into this .jsonl, or continue it")
    parts_help = "--table: fractions are multiples of 1 / PARTS (default 10)"
    add("--parts", type=int, help=parts_help)
    add("--budget", type=float, metavar="SECONDS", help="--table: pick the best row within them")
    add("--reference", metavar="REAL", help="--table: real images or statistics, see fid.py")
    add("--features", metavar="NAME", help="--table: package.module:Class, see fid.py")

    # What to draw, and how.
    add("--n", type=int, help="number of images (default 60, with --table 500)")
    add("--label", help="classes to cycle through: 3 or star,heart (default: all)")
    add_text_options(add)
    add("--batch", type=int, default=64, help="batch size (default 64)")
    steps_help = "sampling steps for all of t (default 100); students keep their own"
    add("--steps", type=int, default=100, help=steps_help)
    spacing_help = "steps uniform in t (default), or in the t of DDPM's linear schedule"
    add("--spacing", choices=["t", "ddpm"], default="t", help=spacing_help)
    add("--sampler", choices=SAMPLERS, default="ddim")
    add("--guidance", type=float, default=1.0, help="guidance scale (default 1: off)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)
    if options.n is None:
        options.n = 500 if options.table else 60
    if options.runs:
        check_use(options)
    options.parts = 10 if options.parts is None else options.parts
    check_numbers(options, ("n", "batch", "steps", "parts"), ("seed",))
    return options


def check_use(options):
    """Raise ValueError unless the options name one way of using the runs."""
    if not math.isfinite(options.guidance):
        raise ValueError("--guidance must be a finite number")
    check_out(options.out)

    # Exactly one way of using the runs, and --fraction with the right number of values.
    has_fractions = options.fraction is not None
    one_way = options.interleave + options.cosine + bool(options.table) + has_fractions == 1
    if not one_way or (has_fractions and len(options.fraction) != len(options.runs) - 1):
        raise ValueError(
            f"{len(options.runs)} runs need one of --fraction with {len(options.runs) - 1} "
            "of them, --interleave, --cosine, and --table"
        )
    if options.table and not options.reference:
        raise ValueError("--table needs --reference: real images, or their statistics")
    for name in ("budget", "reference", "features", "parts"):
        if getattr(options, name) is not None and not options.table:
            raise ValueError(f"--{name} needs --table FILE")
    if options.cosine and options.spacing == "ddpm":
        raise ValueError("--cosine compares the steps of the runs themselves: omit --spacing ddpm")
    if options.cosine and options.n > options.batch:
        raise ValueError(
            f"--cosine takes one batch: --n {options.n} exceeds --batch {options.batch}"
        )
    if options.budget is not None and not 0 < options.budget < math.inf:
        raise ValueError(f"--budget must be above 0 and finite, not {options.budget:g}")


def main(argv=None):
    options = parse(argv)
    if not options.runs:
        return introduce(__doc__, print_published)
    device = one_process(options.device)
    runs, texts, label = load_runs(options, device)
    if options.cosine:
        return print_similarity(runs, label, options.steps, device)
    if options.table:
        return fill_table(runs, label, options, device)

    fractions = None
    if not options.interleave:
        # The last run draws what the others leave.
        fractions = [*options.fraction, max(0.0, 1 - sum(options.fraction))]
    images, seconds = draw(runs, fractions, label, options, device)
    print(f"{options.n} images in {seconds:.1f} s")
    write_images(options.out, images, label, runs.config["classes"], texts)


if __name__ == "__main__":
    run_command(main)
