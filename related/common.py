"""What the commands of related/ share: one process, a run of classes, pictures that are drawn in batches and written."""

import os

import numpy as np
import torch

from data import Shapes, holds_latents, open_data, order
from sample import (
    drawn_size,
    in_bf16,
    join_ranks,
    load,
    make_grid,
    mix_seed,
    parse_labels,
    pixels,
    sample_shared,
    to_float,
    writing,
)
from train import DEFAULTS


def check_numbers(options, from_one=(), from_zero=()):
    """Raises ValueError for options that are not whole numbers from 1, or from 0, to 1,000,000,000."""
    for names, low in ((from_one, 1), (from_zero, 0)):
        for name in names:
            if not low <= getattr(options, name) <= 10**9:
                raise ValueError(
                    f"--{name.replace('_', '-')} goes from {low} to 1,000,000,000, not {getattr(options, name)}"
                )


def one_process(device):
    """The device that --device names. Raises ValueError under torchrun."""
    _, world, device = join_ranks(device)
    if world > 1:
        raise ValueError("this command takes one process")
    return device


def load_run(path, device, classes=True):
    """(net in the run's precision, config, schedule) of a run of train.py. Raises ValueError for runs on texts or latents, for students of few
    steps, and with classes for runs without any."""
    net, config, schedule = load(path, device)
    if config.get("captions") is not None:
        raise ValueError(f"{path} was trained on texts: this command is for labels")
    if drawn_size(config)[1]:
        raise ValueError(f"{path} was trained on latents: this command is for pictures")
    if getattr(net, "max_guidance", None):
        raise ValueError(
            f"{path} is a student: it draws in its own steps, and has learned nothing without a label"
        )
    if classes and not config["classes"]:
        raise ValueError(f"{path} was trained without classes")
    return in_bf16(net, config["bf16"]), config, schedule


def open_pictures(config, device="cpu"):
    """open_data with the defaults of a run. Raises ValueError where the data are latents."""
    if any(map(holds_latents, config["data"])):
        raise ValueError(f"{config['data'][0]} holds latents: this command takes pictures")
    return open_data(DEFAULTS | config, device)


def some_of(data, n, seed=0):
    """The numbers of n of the pictures of a data set, or of all if it has no more, in a random order."""
    return next(order(len(data), seed, min(n, len(data)), 0, [range(min(n, len(data)))]))


def some_pictures(config, n, device):
    """n pictures (n, 3, H, W) in [-1, 1], and labels, evenly spread over those of a run, or all if it has fewer; of the built-in shapes new ones."""
    if not config["data"]:
        x, label = Shapes(config["res"], device, first=2**30)[range(n)]
    else:
        data = open_pictures(config, device)
        n = min(n, len(data))
        x, label = data[[i * len(data) // n for i in range(n)]]
    return to_float(x.to(device)), label.to(device)


def drawn(net, config, schedule, label, batch, device, **options):
    """Pictures (N, H, W, 3) uint8 on the CPU, for labels (N,); picture k is number k, whatever the batch. options: of sample.sample."""
    rounds = sample_shared(
        net, (3, *pixels(config["res"])), schedule, label, batch, device=device, **options
    )
    return torch.cat([pictures for _, pictures in rounds])


def check_out(path):
    """Raises ValueError for what is neither grid.png nor samples.npz, and makes its folder."""
    if not path.endswith((".png", ".npz")):
        raise ValueError(f"--out {path} is neither grid.png nor samples.npz")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def write_pictures(path, pictures, label, classes):
    """As sample.py does: .npz with arr_0 and y, or a grid with a column per class. pictures: (N, H, W, 3) uint8."""
    with writing(path) as file:
        if path.endswith(".npz"):
            np.savez(file, arr_0=pictures.numpy(), y=label.cpu().numpy())
        else:
            columns = (
                len(classes) if 2 <= len(classes) <= 16 else max(1, round(len(pictures) ** 0.5))
            )
            make_grid(pictures.numpy(), columns).save(file, "PNG")
    print(f"wrote {len(pictures)} pictures to {path}")


def labels(config, n):
    """(n,) through all classes, or of zeros without any."""
    return parse_labels(None, config["classes"], n)


def noise_of(seed, numbers, shape, device):
    """A function that returns noise (B, *shape), anew with each call, of which that of each picture follows from seed and its number alone."""
    generators = [
        torch.Generator(device).manual_seed(mix_seed(seed, int(number))) for number in numbers
    ]
    return lambda: torch.stack(
        [torch.randn(shape, generator=generator, device=device) for generator in generators]
    )
