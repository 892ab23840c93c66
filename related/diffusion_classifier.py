"""Diffusion Classifier (Li et al., 2023, arXiv 2303.16203): zero-shot classification.

The class of an image is the label that best helps a trained net to denoise it: the denoising error
given c is, up to its sign, a bound on log p(x | c). A label may be a text: a text-to-image net
classifies by prompts such as "a star", also what it was never shown ("zero-shot"). All classes are
compared at the same noise levels with the same noise, because the error depends more on these than
on the class. Classes that fall behind are dropped early. There is no training and there are no
features. For comparison, there is a linear probe on features of the same net, which needs labels.

    python -m related.diffusion_classifier                     # the paper's stages; needs no run
    python -m related.diffusion_classifier assets/shapes32.pt --n 200 --times 32
    python -m related.diffusion_classifier assets/shapes32.pt --n 200 --times 4 32 --keep 3 1
    python -m related.diffusion_classifier runs/text --n 200 --prompt "a {class}"     # zero-shot
    python -m related.diffusion_classifier dit.pt --data z.npz --times 4 32 --keep 50 1   # latents
    python -m related.diffusion_classifier runs/cifar --data cifar10_test.npz --n 1000 --probe 0.2

The third command keeps 3 classes after 4 levels, and decides among them by all 32.
"""

import argparse
import sys
from itertools import accumulate

import torch
import torch.nn.functional as F

from loss import mean_squares
from related.common import (
    check_classes,
    check_numbers,
    introduce,
    load_run,
    one_process,
    open_images,
    random_indices,
    refuse,
    some_images,
    text_labels,
)
from sample import has_captions, mix_seed, to_float
from schedule import alpha_sigma, diffuse, v_from_x_eps
from support.checkpoint import load
from support.data import load_batch
from support.heldout import training_part
from support.runtime import run_command
from support.settings import DEFAULTS
from support.text import CaptionedShapes

# ---------------------------------------------------------------- the stages

T = 1000  # the timesteps of the authors' networks

# The authors' stages: the number of classes, noise levels after each stage, classes that remain
# after it, and evaluations per image. The last come from running their code.
_FOUR = (20, 50, 100, 500)
_LONG = (50, 100, 500, 1000)
CONFIGS = {
    "Food-101": (101, _FOUR, (20, 10, 5, 1), 5570),
    "CIFAR-10": (10, (50, 500), (5, 1), 2750),
    "Aircraft": (100, _FOUR, (20, 10, 5, 1), 5550),
    "Pets": (37, (25, 250), (5, 1), 2050),
    "Flowers": (102, _FOUR, (20, 10, 5, 1), 5590),
    "STL-10": (10, (100, 500), (5, 1), 3000),
    "ImageNet": (1000, _LONG, (500, 50, 10, 1), 124_500),
    "ObjectNet": (113, _LONG, (25, 10, 5, 1), 14_400),
}


def spread(n, k):
    """Return k of the indices from 0 to n - 1 with an even stride, from half a stride on."""
    stride = n // k
    return range(n)[stride // 2 :: stride][:k]


def plan(numbers):
    """Return, for each stage, the noise levels that it adds, as timesteps of 1000.

    As in the authors' code, the grid has numbers[-1] of the timesteps, and stage i takes numbers[i]
    of the grid, both by spread(), without those of earlier stages. A grid that divides 1000 covers
    all of it. Raises ValueError unless numbers rises from 1 or more to at most 1000.
    """
    if not numbers or min(numbers) < 1 or max(numbers) > T or list(numbers) != sorted(numbers):
        raise ValueError(
            f"--times: the numbers of noise levels must rise, from 1 to {T}, not {list(numbers)}"
        )
    grid = spread(T, numbers[-1])
    done, stages = set(), []
    for n in numbers:
        new = [grid[i] for i in spread(len(grid), n) if grid[i] not in done]
        stages.append(new)
        done.update(new)
    return stages


def evaluations(num_classes, numbers, keep):
    """Return the network evaluations per image after each stage, with one prompt per class."""
    # Each stage evaluates its new levels for the classes that remain from the stage before.
    left = (num_classes, *keep)
    return list(accumulate(len(new) * classes for new, classes in zip(plan(numbers), left)))


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
            f"--keep: {len(numbers)} stages need as many falling numbers of classes, "
            f"at most {num_classes}, not {list(keep)}"
        )
    if space not in ("eps", "v", "x") or norm not in ("l2", "l1"):
        raise ValueError(f"space {space!r} or norm {norm!r} is unknown")


@torch.no_grad()
def classify(
    net,
    x,
    labels,
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

    net: in eval mode, not guided. labels: (K, R, ...), for each of K classes R labels of the net,
    such as prompts, whose errors are averaged. numbers, keep: noise levels after each stage, and
    classes that remain after it; see plan. space: of the error, "eps" (the paper), "v" or "x".
    norm: "l2" or "l1". shared: one noise for all classes (False: a baseline). first: number of the
    first image; the seed and the number determine an image's noise. batch: evaluations per call of
    the net; it changes nothing else.

    Returns the classes (B,) and the errors (B, K, levels), with the levels in the order of plan,
    infinite after a class was dropped. Raises ValueError, see check_stages and plan.
    """
    num_classes, num_prompts = labels.shape[:2]
    check_stages(numbers, keep, num_classes, space, norm)
    stages = plan(numbers)
    image_numbers = torch.arange(first, first + len(x))

    # left: the classes that remain of each image, (B, K).
    left = torch.arange(num_classes, device=x.device).expand(len(x), -1)
    errors = x.new_full((len(x), num_classes, sum(map(len, stages))), torch.inf)
    done = 0
    for levels, k in zip(stages, keep):
        for level in levels:
            # Levels are evenly spaced, not random. All images and classes share this one.
            t = torch.full((len(x),), level / T, dtype=torch.float64, device=x.device)
            logsnr = schedule(t).to(x.dtype)  # (B,)

            # The same noise for all classes of an image: what makes an error large or small, apart
            # from the class, cancels in their comparison. Its number is that of the level.
            number = level // (T // numbers[-1])
            eps = pair_noise(x.shape[1:], seed, image_numbers, number).to(x) if shared else None

            # All triples of an image, a class that remains and a prompt, `batch` at a time.
            errors[:, :, done].scatter_(1, left, 0)
            triples = left.numel() * num_prompts
            for i in range(0, triples, batch):
                triple = torch.arange(i, min(i + batch, triples), device=x.device)
                pair, prompt = triple // num_prompts, triple % num_prompts
                image, c = pair // left.shape[1], left.flatten()[pair]
                if shared:
                    pair_eps = eps[image]
                else:
                    own = image_numbers[image.cpu()]
                    pair_eps = pair_noise(x.shape[1:], seed, own, number, c.cpu()).to(x)
                error = denoising_error(
                    net, x[image], logsnr[image], pair_eps, labels[c, prompt], space, norm
                )
                # The mean over the prompts of a class.
                errors[:, :, done].index_put_((image, c), error / num_prompts, accumulate=True)
            done += 1

        # Keep the k classes with the smallest mean error over all levels so far.
        left = errors[:, :, :done].double().mean(2).argsort(1)[:, :k]
    return left[:, 0], errors


def denoising_error(net, x, logsnr, eps, label, space, norm):
    """Return the denoising error of images x (B, C, H, W) given labels (B, ...), as (B,)."""
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
    hook = layer.register_forward_hook(
        lambda module, args, out: outputs.append(out.float().mean((2, 3)))
    )
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


# ---------------------------------------------------------------- zero-shot: prompts

# For the captioned Shapes. A size that the prompt names wrongly costs all classes the same.
TEMPLATES = ["a {class}", "a small {class}", "a large {class}"]


def encode_prompts(options, config, classes, device):
    """Return the tokens (K, R, ...) of R prompts for each class. Raises ValueError."""
    templates = options.prompt or TEMPLATES
    texts = [template.replace("{class}", name) for name in classes for template in templates]
    given = dict(prompt=texts, text_encoder=options.text_encoder)
    _, tokens, _ = text_labels(options.run, config, len(texts), device, **given)
    return tokens[range(len(texts))].unflatten(0, (len(classes), -1)).to(device)


def captioned_images(res, n, classes, held_out, device):
    """Return n captioned Shapes in [-1, 1] and the numbers (n,) of the classes in their captions.

    classes: words of captions, such as "star" or "red". held_out: take combinations of color and
    shape that no training shows. Raises ValueError if a caption has none of the words.
    """
    data = CaptionedShapes(res, device, first=2**30, held_out=held_out, full=True)
    images, _ = load_batch(data, range(n))
    y = []
    for text in data.captions(range(n)):
        # "a small red star on blue and green, top left": the first color is that of the shape.
        named = [word for word in text.replace(",", "").split() if word in classes]
        if not named:
            raise ValueError(f"--classes: no class is a word of the caption {text!r}")
        y.append(classes.index(named[0]))
    return to_float(images), torch.tensor(y, device=device)


# ---------------------------------------------------------------- the command


def parse(argv):
    """Read and check the command line. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        prog="diffusion_classifier",
        description="Classify images by a run of train.py, on labels or on texts.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"diffusion_classifier: {message}")
    add = parser.add_argument
    add("run", nargs="?", help="folder or checkpoint; without it, print the published stages")
    add("--data", nargs="+", help="labeled images, not those of the training (Shapes: new ones)")
    add("--n", type=int, default=200, help="images, evenly spread over the data (default 200)")
    add("--times", type=int, nargs="+", default=[32], help="noise levels after each stage")
    add("--keep", type=int, nargs="+", default=[1], help="classes that remain after each stage")
    add("--space", choices=["eps", "v", "x"], default="eps", help="space of the error")
    add("--norm", choices=["l2", "l1"], default="l2", help="norm of the error")
    add("--independent", action="store_true", help="baseline: other noise for each class")
    prompt_help = "texts with {class}, whose errors are averaged (default: ours for Shapes)"
    add("--prompt", nargs="+", metavar="TEXT", help=prompt_help)
    best_help = "the class of the best single prompt, as the authors do, instead of averages"
    add("--best-prompt", action="store_true", help=best_help)
    classes_help = "names of the classes in prompts (default: those of the data, or the ten shapes)"
    add("--classes", nargs="+", metavar="NAME", help=classes_help)
    shown_help = "captioned Shapes: combinations that training shows, instead of held-out ones"
    add("--shown", action="store_true", help=shown_help)
    add("--text-encoder", metavar="NAME", help="the T5 of the training; required again")
    probe_help = "baseline: a linear probe on features at this t, of up to 20,000 training images"
    add("--probe", type=float, metavar="T", help=probe_help)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=256, help="batch size (default 256)")
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    options = parser.parse_args(argv)
    check_numbers(options, ("n", "batch"), ("seed",))
    if options.probe is not None and not 0 <= options.probe <= 1:
        raise ValueError("--probe must be a t from 0 to 1")
    for text in options.prompt or []:
        if "{class}" not in text:
            raise ValueError(f"--prompt {text!r} does not contain {{class}}")
    return options


def check_text_options(options, config):
    """Raise ValueError for options that a run on labels, or on texts, does not take."""
    if not has_captions(config):
        names = ("prompt", "best_prompt", "classes", "shown", "text_encoder")
        refuse(options, names, f"{options.run} was trained without texts")
    elif options.probe is not None:
        raise ValueError(f"{options.run} was trained on texts: omit --probe")
    elif options.data and (options.shown or not options.prompt):
        raise ValueError("--data needs --prompt, and no --shown: ours are for the built-in Shapes")


def open_test_images(options, config, device):
    """Return images (N, C, H, W) in [-1, 1], their true classes (N,) and the names of all classes.

    Raises ValueError for a dataset with other classes, and without --data where it is needed.
    """
    if config["data"] and not options.data:
        raise ValueError("--data is missing: it names images that the run was not trained on")
    is_text = has_captions(config)
    if is_text and not options.data:
        classes = options.classes or CaptionedShapes(config["res"]).shapes
        images = captioned_images(config["res"], options.n, classes, not options.shown, device)
        return *images, classes

    # Training images would be too easy. Without a dataset, the built-in Shapes draw new ones.
    classes, data = config["classes"], None
    if options.data:
        # The images of a text run are labeled here: their classes are names for the prompts.
        config = dict(config, data=options.data, captions=None, text_encoder="bytes")
        data = open_images(config, import_classes=True)
        if not is_text:
            check_classes(data, options.run, config)
        classes = options.classes or data.classes
        if not classes or len(classes) != len(data.classes):
            raise ValueError(f"--classes: the dataset has {len(data.classes)} classes, name each")
    return *some_images(config, options.n, device, data), classes


def probe(options, config, schedule, x, y, device):
    """Print the accuracy of the linear probe on images x (N, C, H, W) of classes y (N,)."""
    # The features are those of the middle transformer block. The net runs in float32.
    net, _, _ = load(options.run, device)
    if not hasattr(net, "transformer"):
        raise ValueError(
            f"{options.run} is a run of {config['model']}: --probe needs a net with a transformer"
        )
    layer = net.transformer[len(net.transformer) // 2]
    # A dataset class is imported only if --data names the same one.
    data = open_images(config, device, import_classes=options.data == config["data"])
    logsnr = schedule(torch.tensor(options.probe, dtype=torch.float64))

    # Training features: images of the run's own dataset, with noise of another seed.
    known, known_labels = [], []
    data = training_part(DEFAULTS | config, data)  # held-out images stay unseen
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
        f"{percent(found, y)} of {len(x)} images are classified right "
        f"by a linear probe, trained on {len(chosen)} labels"
    )


def percent(found, y):
    """Return the share of classes found (N,) that are those of y (N,), as a percentage."""
    return f"{100 * (found == y).double().mean().item():.1f} %"


def classify_all(options, net, labels, schedule, x, y):
    """Print the accuracy of the net as a classifier on images x (N, C, H, W) of classes y (N,).

    labels: (K, R, ...), see classify.
    """
    # As the authors do: every prompt competes, and the best one has the class.
    classes = torch.arange(len(labels), device=x.device)  # of each candidate
    if options.best_prompt:
        classes = classes.repeat_interleave(labels.shape[1])
        labels = labels.flatten(0, 1)[:, None]
    per_level = labels.shape[0] * labels.shape[1]

    # 50 images at a time: classify() holds their noise and their errors.
    stages = plan(options.times)
    ends = list(accumulate(map(len, stages)))  # the number of levels after each stage
    settings = {key: getattr(options, key) for key in ("space", "norm", "seed", "batch")}
    all_errors, after_stage = [], []
    for i in range(0, len(x), 50):
        _, errors = classify(
            net,
            x[i : i + 50],
            labels,
            schedule,
            options.times,
            options.keep,
            shared=not options.independent,
            first=i,
            **settings,
        )
        # All candidates have errors in the first stage. Later ones only add to the decision.
        all_errors.append(errors[:, :, : ends[0]])
        means = [errors[:, :, :end].double().mean(2) for end in ends]
        after_stage.append(torch.stack([mean.argmin(1) for mean in means]))
    errors = torch.cat(all_errors)

    # Table 1: every noise level of the first stage alone.
    print("   t   logsnr   right, by this level alone")
    for i, level in enumerate(stages[0]):
        logsnr = schedule(torch.tensor(level / T, dtype=torch.float64)).item()
        found = classes[errors[:, :, i].argmin(1)]
        print(f"{level / T:5.3f} {logsnr:7.2f} {percent(found, y):>8s}")

    # Table 2: 1, 2, 4, ... levels, evenly spread over those of the first stage, then the stages.
    print("evaluations   levels   right, by the mean error")
    k = 1
    while k < ends[0]:
        mean = errors[:, :, list(spread(ends[0], k))].double().mean(2)
        print(f"{k * per_level:11d} {k:8d} {percent(classes[mean.argmin(1)], y):>8s}")
        k *= 2
    counts = evaluations(len(labels), options.times, options.keep)
    for end, count, found in zip(ends, counts, torch.cat(after_stage, 1)):
        calls, right = count * labels.shape[1], percent(classes[found], y)
        print(f"{calls:11d} {end:8d} {right:>8s}")
    text = f"{right} of {len(x)} images are classified right, with {calls} evaluations each"
    if len(stages) > 1:
        text += f", {100 - 100 * calls / per_level / ends[-1]:.0f} % saved"
    print(text)


def print_published():
    """Print the stages of the authors' code, with our counts of the evaluations."""
    print("            classes  levels after each stage  keep         evaluations (theirs)  saved")
    for name, (num_classes, numbers, keep, published) in CONFIGS.items():
        count = evaluations(num_classes, numbers, keep)[-1]
        saved = 100 - 100 * count / num_classes / numbers[-1]
        stages, kept = (" ".join(map(str, values)) for values in (numbers, keep))
        counts = f"{count:,} ({published:,})"
        print(f"{name:10s} {num_classes:8d}  {stages:24s} {kept:12s} {counts:>20s} {saved:5.1f} %")


def main(argv=None):
    options = parse(argv)
    if not options.run:
        return introduce(__doc__, print_published)
    device = one_process(options.device)
    net, config, schedule = load_run(options.run, device, texts=True, latents=True)
    check_text_options(options, config)
    x, y, classes = open_test_images(options, config, device)
    if options.probe is not None:
        return probe(options, config, schedule, x, y, device)
    labels = torch.arange(len(classes), device=device)[:, None]
    if has_captions(config):
        labels = encode_prompts(options, config, classes, device)
    classify_all(options, net, labels, schedule, x, y)


if __name__ == "__main__":
    run_command(main)
