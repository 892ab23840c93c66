"""Diffusion Classifier (arXiv 2303.16203): the class of a picture is the one whose label helps a trained net most to denoise it.

log p(x | c) is bounded by minus the denoising error given c. All classes are tried at the same noise levels with the same noise, as the error
says more about these than about the class; and classes that fall behind are given up early. No training, no features; a linear
probe on features of the same net, with labels, is there to compare with.

    python -m related.diffusion_classifier runs/shapes-32 --n 200 --times 32                      # all classes at 32 noise levels
    python -m related.diffusion_classifier runs/shapes-32 --n 200 --times 4 32 --keep 3 1         # of 4 levels keep 3 classes, then decide by 32
    python -m related.diffusion_classifier runs/cifar --data cifar10_test.npz --n 1000 --times 4 16 --keep 5 1
    python -m related.diffusion_classifier runs/cifar --data cifar10_test.npz --n 1000 --probe 0.2                  # linear, of features at t = 0.2
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from loss import mean_squares
from related.common import (
    check_numbers,
    load_run,
    one_process,
    open_pictures,
    some_of,
    some_pictures,
)
from sample import load, mix_seed, run_command, to_float
from schedule import alpha_sigma, diffuse, v_from_x_eps


def plan(numbers):
    """For each stage the numbers of the noise levels that it adds, of an even grid of numbers[-1]: as in the authors' code stage i goes through
    numbers[i] of them, evenly spread, and takes those that are new. Raises ValueError."""
    if not numbers or min(numbers) < 1 or list(numbers) != sorted(numbers):
        raise ValueError(f"numbers of noise levels must be rising from 1 on, not {list(numbers)}")
    done, stages = set(), []
    for n in numbers:
        stages.append(
            [k for k in ((2 * i + 1) * numbers[-1] // (2 * n) for i in range(n)) if k not in done]
        )
        done.update(stages[-1])
    return stages


def evaluations(num_classes, numbers, keep):
    """How often the net is called for one picture."""
    return sum(len(new) * classes for new, classes in zip(plan(numbers), (num_classes, *keep)))


def pair_noise(shape, seed, numbers, level, classes=None):
    """Noise (B, *shape) on the CPU that follows from the seed, the number of each picture, the noise level's and, if given, the class's alone."""
    seeds = [
        mix_seed(seed, level, int(number), 0 if classes is None else 1 + int(classes[i]))
        for i, number in enumerate(numbers)
    ]
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(each)) for each in seeds]
    )


@torch.no_grad()
def classify(
    net,
    x,
    num_classes,
    schedule,
    numbers=(32,),
    keep=(1,),
    *,
    space="eps",
    norm="l2",
    shared=True,
    seed=0,
    first=0,
    batch=256,
):
    """The classes (B,) of pictures, and the mean errors (B, num_classes) that decided, infinite for classes that were given up.

    net: in eval mode, and not guided. x: (B, C, H, W) in [-1, 1]. numbers, keep: noise levels and classes that are left after each stage, of levels
    t = (k + 1/2) / numbers[-1]. space: of the error, "eps" (the paper), "v" or "x", norm: "l2" or "l1". shared: one noise for all classes; False is
    for comparison. first: number of the first picture; seed. batch: pictures times classes at a time, which changes nothing else. Raises ValueError.
    """
    if (
        len(numbers) != len(keep)
        or keep[-1] < 1
        or list(keep) != sorted(keep, reverse=True)
        or keep[0] > num_classes
    ):
        raise ValueError(
            f"{len(numbers)} stages keep as many falling numbers of at most {num_classes} classes, not {list(keep)}"
        )
    if space not in ("eps", "v", "x") or norm not in ("l2", "l1"):
        raise ValueError(f"space {space!r} or norm {norm!r} is not known")
    device, numbered = x.device, torch.arange(first, first + len(x))
    left = torch.arange(num_classes, device=device).expand(len(x), -1)  # (B, classes that are left)
    total, count, result = (
        torch.zeros(len(x), num_classes, dtype=torch.float64, device=device),
        0,
        None,
    )
    for new, k in zip(plan(numbers), keep):
        for level in new:
            t = torch.full(
                (len(x),), (level + 0.5) / numbers[-1], dtype=torch.float64, device=device
            )
            logsnr = schedule(t).to(x.dtype)
            factor = {
                "v": 1.0,
                "eps": alpha_sigma(logsnr[:1], like=x)[0],
                "x": alpha_sigma(logsnr[:1], like=x)[1],
            }[space]  # see loss.py
            eps = pair_noise(x.shape[1:], seed, numbered, level).to(x) if shared else None
            for i in range(0, left.numel(), batch):
                pair = torch.arange(i, min(i + batch, left.numel()), device=device)
                picture, label = pair // left.shape[1], left.flatten()[pair]
                e = (
                    eps[picture]
                    if shared
                    else pair_noise(
                        x.shape[1:], seed, numbered[picture.cpu()], level, label.cpu()
                    ).to(x)
                )
                v_hat = net(diffuse(x[picture], e, logsnr[picture]), logsnr[picture], label)
                error = factor * (v_from_x_eps(x[picture], e, logsnr[picture]) - v_hat.to(x.dtype))
                total[picture, label] += (
                    mean_squares(error) if norm == "l2" else error.abs().mean((1, 2, 3))
                ).double()
        count += len(new)
        result = torch.full_like(total, torch.inf).scatter(1, left, total.gather(1, left) / count)
        left = result.argsort(1)[:, :k]
    return left[:, 0], result


# ---------------------------------------------------------------- for comparison: a linear probe, which needs labels


@torch.no_grad()
def features(net, layer, x, logsnr, seed=0, first=0):
    """The mean over places of what a layer of the net makes of pictures (B, C, H, W) at one noise level, without a label. first: the number of
    the first one, from which and the seed noise follows. Returns (B, channels)."""
    kept, hook = (
        [],
        layer.register_forward_hook(
            lambda module, args, out: kept.append(out.float().mean((2, 3)))
        ),
    )
    level = torch.full((len(x),), float(logsnr), device=x.device)
    net(
        diffuse(x, pair_noise(x.shape[1:], seed, range(first, first + len(x)), 0).to(x), level),
        level,
    )
    hook.remove()
    return kept[0]


def linear_probe(train, label, test, num_classes, decay=1e-3):
    """The classes (M,) of features (M, D) by logistic regression on features (N, D) with labels (N,)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((each - mean) / std for each in (train, test))
    layer = torch.nn.Linear(train.shape[1], num_classes, device=train.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), label) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer(test).argmax(1)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="diffusion_classifier",
        description="Classify pictures by a run of train.py.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"diffusion_classifier: {message}")
    parser.add_argument("run", help="a run's folder or a checkpoint, with classes")
    parser.add_argument(
        "--data",
        nargs="+",
        help="labeled pictures, other than those of the training (of a run on the built-in shapes: new ones)",
    )
    parser.add_argument(
        "--n", type=int, default=200, help="pictures, evenly spread over the data (default 200)"
    )
    parser.add_argument(
        "--times", type=int, nargs="+", default=[32], help="noise levels of each stage"
    )
    parser.add_argument(
        "--keep",
        type=int,
        nargs="+",
        default=[1],
        help="classes that are left after each stage, 1 after the last",
    )
    parser.add_argument("--space", choices=["eps", "v", "x"], default="eps")
    parser.add_argument("--norm", choices=["l2", "l1"], default="l2")
    parser.add_argument(
        "--independent", action="store_true", help="other noise for each class, for comparison"
    )
    parser.add_argument(
        "--at",
        type=float,
        metavar="T",
        help="all noise levels at this t (with --times 4: four noises)",
    )
    parser.add_argument(
        "--probe",
        type=float,
        metavar="T",
        help="for comparison: a linear probe on features at this t, trained on up to 20,000 of the run's pictures",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    options = parser.parse_args(argv)
    check_numbers(options, ("n", "batch"), ("seed",))
    device = one_process(options.device)
    net, config, schedule = load_run(options.run, device)
    trained_on = dict(config)
    if not all(t is None or 0 <= t <= 1 for t in (options.probe, options.at)):
        raise ValueError("--probe and --at take a t from 0 to 1")
    if config["data"] and not options.data:
        raise ValueError("--data is missing: pictures other than those of the training")
    if options.data:
        config["data"] = options.data
        data = open_pictures(config)
        if data.classes != config["classes"]:
            raise ValueError(
                f"the pictures have other classes ({', '.join(data.classes[:20])}) than those {options.run} was trained on"
            )
        options.n = min(options.n, len(data))
    k, right, (x, y) = len(config["classes"]), 0, some_pictures(config, options.n, device)
    if options.probe is not None:
        float_net, data = load(options.run, device)[0], open_pictures(trained_on, device)
        if not hasattr(float_net, "transformer"):
            raise ValueError(
                f"{options.run} is a run of {config['model']}: --probe takes a net with a transformer"
            )
        layer, logsnr, known, known_labels = (
            float_net.transformer[len(float_net.transformer) // 2],
            schedule(torch.tensor(options.probe, dtype=torch.float64)),
            [],
            [],
        )
        chosen = some_of(data, 20_000, options.seed)
        for i in range(0, len(chosen), options.batch):
            pictures, label = data[chosen[i : i + options.batch]]
            known.append(
                features(
                    float_net,
                    layer,
                    to_float(pictures.to(device)),
                    logsnr,
                    options.seed + 1,
                    first=i,
                )
            )
            known_labels.append(label.to(device))
        new = torch.cat(
            [
                features(float_net, layer, x[i : i + options.batch], logsnr, options.seed, first=i)
                for i in range(0, options.n, options.batch)
            ]
        )
        right = (linear_probe(torch.cat(known), torch.cat(known_labels), new, k) == y).sum().item()
        return print(
            f"{100 * right / options.n:.1f} % of {options.n} pictures by a linear probe, trained on {len(chosen)} labels"
        )
    levels = schedule if options.at is None else lambda t: schedule(torch.full_like(t, options.at))
    for i in range(0, options.n, 50):
        found, _ = classify(
            net,
            x[i : i + 50],
            k,
            levels,
            options.times,
            options.keep,
            space=options.space,
            norm=options.norm,
            shared=not options.independent,
            seed=options.seed,
            first=i,
            batch=options.batch,
        )
        right += (found == y[i : i + 50]).sum().item()
    calls = evaluations(k, options.times, options.keep)
    print(
        f"{100 * right / options.n:.1f} % of {options.n} pictures, {calls} evaluations each"
        + (
            f", {100 - 100 * calls / k / options.times[-1]:.0f} % saved"
            if len(options.times) > 1
            else ""
        )
    )


if __name__ == "__main__":
    run_command(main)
