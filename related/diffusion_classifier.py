"""Diffusion Classifier (Li et al., 2023, arXiv 2303.16203).

The class of an image is the label that best helps a trained net to denoise it: the denoising error
given c is, up to its sign, a bound on log p(x | c). All classes are compared at the same noise
levels with the same noise, because the error depends more on these than on the class. Classes that
fall behind are dropped early. There is no training and there are no features. For comparison, there
is a linear probe on features of the same net, which needs labels.

    python -m related.diffusion_classifier assets/shapes32.pt --n 200 --times 32
    python -m related.diffusion_classifier assets/shapes32.pt --n 200 --times 4 32 --keep 3 1
    python -m related.diffusion_classifier runs/cifar --data cifar10_test.npz --n 1000 --probe 0.2

The first command tries all classes at 32 noise levels. The second one keeps 3 classes after 4
levels and decides among them by all 32. The third one is the probe, on features at t = 0.2.
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
    open_images,
    random_indices,
    some_images,
)
from sample import mix_seed, to_float
from schedule import alpha_sigma, diffuse, v_from_x_eps
from support.checkpoint import load
from support.data import load_batch
from support.runtime import run_command

# ---------------------------------------------------------------- the stages


def plan(numbers):
    """Return, for each stage, the noise levels that it adds, as indices into an even grid.

    The grid has numbers[-1] levels. As in the authors' code, stage i takes numbers[i] of them,
    evenly spread, without those of earlier stages. Raises ValueError unless numbers rises.
    """
    if not numbers or min(numbers) < 1 or list(numbers) != sorted(numbers):
        raise ValueError(f"the numbers of noise levels must rise from 1 on, not {list(numbers)}")
    done, stages = set(), []
    for n in numbers:
        # The middles of n equal parts of the grid.
        spread = [(2 * i + 1) * numbers[-1] // (2 * n) for i in range(n)]
        new = [level for level in spread if level not in done]
        stages.append(new)
        done.update(new)
    return stages


def evaluations(num_classes, numbers, keep):
    """Return the number of network evaluations per image."""
    # Each stage evaluates its new levels for the classes that remain from the stage before.
    return sum(len(new) * classes for new, classes in zip(plan(numbers), (num_classes, *keep)))


def pair_noise(shape, seed, numbers, level, classes=None):
    """Draw noise (B, *shape) on the CPU.

    It depends on the seed, each image's number, the noise level's index and, if given, the class.
    """
    rows = []
    for i, number in enumerate(numbers):
        # 0 means noise for all classes, so class c counts as 1 + c.
        own_class = 0 if classes is None else 1 + int(classes[i])
        generator = torch.Generator().manual_seed(mix_seed(seed, level, int(number), own_class))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


# ---------------------------------------------------------------- the classifier


def check_stages(numbers, keep, num_classes, space, norm):
    """Raise ValueError for arguments that classify() does not support."""
    falling = list(keep) == sorted(keep, reverse=True)
    if len(numbers) != len(keep) or keep[-1] < 1 or not falling or keep[0] > num_classes:
        raise ValueError(
            f"{len(numbers)} stages need as many falling numbers of classes to keep, "
            f"at most {num_classes}, not {list(keep)}"
        )
    if space not in ("eps", "v", "x") or norm not in ("l2", "l1"):
        raise ValueError(f"space {space!r} or norm {norm!r} is unknown")


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
    """Classify images x (B, C, H, W) in [-1, 1] by the denoising errors of a net.

    net: in eval mode, not guided. numbers, keep: noise levels after each stage, and classes that
    remain after it; the levels are t = (k + 1/2) / numbers[-1]. space: of the error, "eps" (the
    paper), "v" or "x". norm: "l2" or "l1". shared: one noise for all classes (False: a baseline).
    first: number of the first image; the seed and the number determine an image's noise. batch:
    pairs of an image and a class per call of the net; it changes nothing else.

    Returns the classes (B,) and the mean errors (B, num_classes), infinite for dropped classes.
    Raises ValueError, see check_stages and plan.
    """
    check_stages(numbers, keep, num_classes, space, norm)
    device = x.device
    image_numbers = torch.arange(first, first + len(x))

    # left: the classes that remain of each image, (B, K). total: the summed errors.
    left = torch.arange(num_classes, device=device).expand(len(x), -1)
    total = torch.zeros(len(x), num_classes, dtype=torch.float64, device=device)
    count, mean = 0, None

    for levels, k in zip(plan(numbers), keep):
        for level in levels:
            # Levels are evenly spaced, not random. All images and classes share this one.
            middle = (level + 0.5) / numbers[-1]
            t = torch.full((len(x),), middle, dtype=torch.float64, device=device)
            logsnr = schedule(t).to(x.dtype)  # (B,)

            # The same noise for all classes of an image: what makes an error large or small, apart
            # from the class, cancels in their comparison.
            eps = pair_noise(x.shape[1:], seed, image_numbers, level).to(x) if shared else None

            # All pairs of an image and one of its remaining classes, `batch` at a time.
            for i in range(0, left.numel(), batch):
                pair = torch.arange(i, min(i + batch, left.numel()), device=device)
                image, label = pair // left.shape[1], left.flatten()[pair]
                if shared:
                    pair_eps = eps[image]
                else:
                    pair_eps = pair_noise(
                        x.shape[1:], seed, image_numbers[image.cpu()], level, label.cpu()
                    ).to(x)
                total[image, label] += denoising_error(
                    net, x[image], logsnr[image], pair_eps, label, space, norm
                ).double()

        # Keep the k classes with the smallest mean error over all levels so far.
        count += len(levels)
        mean = torch.full_like(total, torch.inf).scatter(1, left, total.gather(1, left) / count)
        left = mean.argsort(1)[:, :k]
    return left[:, 0], mean


def denoising_error(net, x, logsnr, eps, label, space, norm):
    """Return the denoising error of images x (B, C, H, W) given labels (B,), as (B,)."""
    # Noise the image, z = alpha x + sigma eps, and let the net denoise it with this label.
    v_hat = net(diffuse(x, eps, logsnr), logsnr, label)

    # At one z, eps - eps_hat = alpha (v - v_hat) and x - x_hat = -sigma (v - v_hat); see loss.py.
    alpha, sigma = alpha_sigma(logsnr[:1], like=x)
    factor = {"v": 1.0, "eps": alpha, "x": sigma}[space]
    error = factor * (v_from_x_eps(x, eps, logsnr) - v_hat.to(x.dtype))
    return mean_squares(error) if norm == "l2" else error.abs().mean((1, 2, 3))


# ---------------------------------------------------------------- a baseline: the linear probe


@torch.no_grad()
def features(net, layer, x, logsnr, seed=0, first=0):
    """Return the outputs (B, channels) of a layer of the net, averaged over positions.

    x: images (B, C, H, W), noised to logsnr, without labels. first: number of the first image; the
    seed and the number determine an image's noise.
    """
    # The hook averages the layer's output over positions: (B, C, H, W) -> (B, C).
    outputs = []

    def keep_output(module, args, out):
        outputs.append(out.float().mean((2, 3)))

    hook = layer.register_forward_hook(keep_output)
    # The net gets no label: a feature must not contain the class that the probe looks for.
    level = torch.full((len(x),), float(logsnr), device=x.device)
    eps = pair_noise(x.shape[1:], seed, range(first, first + len(x)), 0).to(x)
    net(diffuse(x, eps, level), level)
    hook.remove()
    return outputs[0]


def linear_probe(train, label, test, num_classes, decay=1e-3):
    """Fit logistic regression to features train (N, D) with labels (N,), and classify test (M, D).

    Returns classes (M,).
    """
    # Normalize every feature by the training features.
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std

    # The problem is convex: L-BFGS on all features finds its minimum.
    layer = torch.nn.Linear(train.shape[1], num_classes, device=train.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), label) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer(test).argmax(1)


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        prog="diffusion_classifier",
        description="Classify images by a run of train.py.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"diffusion_classifier: {message}")
    add = parser.add_argument
    add("run", help="folder or checkpoint of a run with classes")
    add(
        "--data",
        nargs="+",
        help="labeled images that the run was not trained on (for built-in Shapes: new ones)",
    )
    add(
        "--n",
        type=int,
        default=200,
        help="number of images, evenly spread over the data (default 200)",
    )
    add("--times", type=int, nargs="+", default=[32], help="noise levels after each stage")
    add(
        "--keep",
        type=int,
        nargs="+",
        default=[1],
        help="classes that remain after each stage; 1 after the last",
    )
    add("--space", choices=["eps", "v", "x"], default="eps", help="space of the error")
    add("--norm", choices=["l2", "l1"], default="l2", help="norm of the error")
    add("--independent", action="store_true", help="baseline: other noise for each class")
    add(
        "--at",
        type=float,
        metavar="T",
        help="put all noise levels at this t (with --times 4: four noises)",
    )
    add(
        "--probe",
        type=float,
        metavar="T",
        help="baseline: a linear probe on features at this t, trained on up to 20,000 images of "
        "the run's dataset",
    )
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=256, help="batch size (default 256)")
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    options = parser.parse_args(argv)
    check_numbers(options, ("n", "batch"), ("seed",))
    if not all(t is None or 0 <= t <= 1 for t in (options.probe, options.at)):
        raise ValueError("--probe and --at must be a t from 0 to 1")
    return options


def open_test_images(options, config, device):
    """Return the images (N, C, H, W) in [-1, 1] to classify and their true classes (N,).

    Raises ValueError for a dataset with other classes, and without --data where it is needed.
    """
    # Training images would be too easy. Without a dataset, the built-in Shapes draw new ones.
    if options.data:
        data = open_images(dict(config, data=options.data), import_classes=True)
        if data.classes != config["classes"]:
            raise ValueError(
                f"the dataset has other classes ({', '.join(data.classes[:20])}) than "
                f"{options.run} was trained on"
            )
        config = dict(config, data=options.data)
    elif config["data"]:
        raise ValueError("--data is missing: it names images that the run was not trained on")
    return some_images(config, options.n, device, import_classes=bool(options.data))


def probe(options, config, schedule, x, y, device):
    """Print the accuracy of the linear probe on images x (N, C, H, W) of classes y (N,)."""
    # The features are those of the middle transformer block. The net runs in float32.
    net, _, _ = load(options.run, device)

    # A dataset class is imported only if --data names the same one.
    data = open_images(config, device, import_classes=options.data == config["data"])
    if not hasattr(net, "transformer"):
        raise ValueError(
            f"{options.run} is a run of {config['model']}: --probe needs a net with a transformer"
        )
    layer = net.transformer[len(net.transformer) // 2]
    logsnr = schedule(torch.tensor(options.probe, dtype=torch.float64))

    # Training features: images of the run's own dataset, with noise of another seed.
    known, known_labels = [], []
    chosen = random_indices(data, 20_000, options.seed)
    for i in range(0, len(chosen), options.batch):
        images, label = load_batch(data, chosen[i : i + options.batch])
        images = to_float(images.to(device))
        known.append(features(net, layer, images, logsnr, options.seed + 1, first=i))
        known_labels.append(label.to(device))

    new = [
        features(net, layer, x[i : i + options.batch], logsnr, options.seed, first=i)
        for i in range(0, len(x), options.batch)
    ]
    num_classes = len(config["classes"])
    found = linear_probe(torch.cat(known), torch.cat(known_labels), torch.cat(new), num_classes)
    print(
        f"{percent((found == y).sum().item(), len(x))} % of {len(x)} images are classified right "
        f"by a linear probe, trained on {len(chosen)} labels"
    )


def percent(right, n):
    """Format right / n as a percentage with one digit."""
    return f"{100 * right / n:.1f}"


def classify_all(options, net, num_classes, schedule, x, y):
    """Print the accuracy of the net as a classifier on images x (N, C, H, W) of classes y (N,)."""
    levels = schedule
    if options.at is not None:

        def levels(t):
            return schedule(torch.full_like(t, options.at))

    # 50 images at a time: classify() holds their noise and errors for all classes.
    right = 0
    for i in range(0, len(x), 50):
        found, _ = classify(
            net,
            x[i : i + 50],
            num_classes,
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

    # The accuracy, and the evaluations compared with all classes at all levels.
    calls = evaluations(num_classes, options.times, options.keep)
    text = f"{percent(right, len(x))} % of {len(x)} images are classified right, "
    text += f"with {calls} evaluations each"
    if len(options.times) > 1:
        text += f", {100 - 100 * calls / num_classes / options.times[-1]:.0f} % saved"
    print(text)


def main(argv=None):
    options = parse(argv)
    device = one_process(options.device)
    net, config, schedule = load_run(options.run, device)
    x, y = open_test_images(options, config, device)
    if options.probe is not None:
        probe(options, config, schedule, x, y, device)
    else:
        classify_all(options, net, len(config["classes"]), schedule, x, y)


if __name__ == "__main__":
    run_command(main)
