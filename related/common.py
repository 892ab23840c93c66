"""Helpers that the commands in related/ share. Not a system of its own.

Options are checked first. A command then loads a run of train.py, reads some of its images, and
draws and writes samples. fit() is the one training loop for small networks: distill, ppap, lit,
recap and mar only say how they compute a gradient. The commands run in one process, except distill.

    python -m related.tstitch --help      # or another file of this folder: the commands themselves
"""

import argparse
import contextlib
import copy
import os
import sys
import time

import numpy as np
import torch

from fid import (
    INCEPTION,
    Statistics,
    extract,
    frechet_distance,
    load_network,
    open_sides,
    side_statistics,
)
from sample import (
    check_guidance,
    has_captions,
    make_grid,
    mix_seed,
    parse_labels,
    sample_batches,
    to_float,
    to_uint8,
)
from support.checkpoint import load, sample_size
from support.data import (
    Latents,
    Shapes,
    image_order,
    load_batch,
    open_dataset,
)
from support.runtime import in_bf16, join_ranks, pixels, writing
from support.text import LazyLabels, read_prompts
from train import DEFAULTS, ema_decay, ema_update, learning_rate

# ---------------------------------------------------------------- options


def check_numbers(options, from_one=(), from_zero=()):
    """Raise ValueError unless the options in from_one are from 1 to 1,000,000,000, others from 0.

    from_one, from_zero: names of integer options.
    """
    for names, low in ((from_one, 1), (from_zero, 0)):
        for name in names:
            value = getattr(options, name)
            if not low <= value <= 10**9:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} must be from {low} to 1,000,000,000, not {value}")


def refuse(options, names, reason):
    """Raise ValueError, which starts with the reason, if one of these options is given."""
    for name in names:
        if getattr(options, name):
            raise ValueError(f"{reason}: omit --{name.replace('_', '-')}")


def one_process(device):
    """Return the device that --device names. Raises ValueError under torchrun."""
    _, world, device = join_ranks(device)
    if world > 1:
        raise ValueError("this command runs in one process: start it without torchrun")
    return device


def check_out(path):
    """Create the folder of an output file. Raises ValueError unless it ends in .png or .npz."""
    if not path.endswith((".png", ".npz")):
        raise ValueError(f"--out {path} must end in .png (a grid) or .npz (samples)")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


# ---------------------------------------------------------------- without arguments


def no_arguments(argv):
    """True for an empty list; None stands for the command line, as in argparse."""
    return not (sys.argv[1:] if argv is None else argv)


def introduce(doc, print_configurations):
    """Print what `python -m related.NAME` without arguments says: the idea, costs, and commands.

    doc: the docstring of the file. Its indented paragraphs are commands, and what follows the first
    of them explains them. print_configurations: prints the published configurations.
    """
    paragraphs = doc.strip().split("\n\n")
    first = next(i for i, text in enumerate(paragraphs) if text.startswith("    python"))
    print("\n\n".join(paragraphs[:first]), end="\n\n")
    print_configurations()
    print("\n" + "\n\n".join(paragraphs[first:]))


# ---------------------------------------------------------------- a run and its images


def load_run(
    path, device, classes=True, null_label=False, texts=False, students=False, latents=False
):
    """Load a run of train.py. Returns (net in the run's precision, config, schedule).

    classes: whether the run must have classes, or texts. null_label: whether it must have learned
    to draw without a label. texts, students, latents: whether the command takes runs on texts,
    distilled students and runs on latents. Raises ValueError for other runs.
    """
    net, config, schedule = load(path, device)
    if has_captions(config) and not texts:
        raise ValueError(f"{path} was trained on texts: this command needs a run on labels")
    if sample_size(config)[1] and not latents:
        raise ValueError(f"{path} was trained on latents: this command needs a run on images")

    # A student has learned neither other step counts nor the null label.
    is_student = bool(getattr(net, "max_guidance", None))
    if is_student and not students:
        raise ValueError(f"{path} is a distilled student: this command needs a run of train.py")
    if classes and not (config["classes"] or has_captions(config)):
        raise ValueError(f"{path} was trained without classes: this command needs them")
    if null_label and not is_student:
        check_guidance(path, config)
    return in_bf16(net, config["bf16"]), config, schedule


def open_images(config, device="cpu", import_classes=False):
    """Open the dataset of a run's settings: images, or latents for a run on latents.

    import_classes: whether config["data"] may name a class to import. Only True if the user named
    it in this command: an untrusted checkpoint must not import code. Raises ValueError for the
    other kind of data.
    """
    data = open_dataset(DEFAULTS | config, device, import_classes)
    # Runs on latents, and such datasets, store the number of channels.
    found = data.net_fields.get("in_channels")
    needed = config.get("model_args", {}).get("in_channels")
    if found != needed:
        kinds = [f"latents of {n} channels" if n else "images" for n in (found, needed)]
        raise ValueError(f"{config['data'][0]} holds {kinds[0]}: this command needs {kinds[1]}")
    return data


def check_classes(data, run, config):
    """Raise ValueError unless a dataset has the classes of a run, in the same order.

    If the names of the run's classes are only numbers, as in official.py, the names may differ:
    class k of the dataset is number k. The folders of ImageNet, sorted, are in that order.
    """
    classes = config["classes"]
    if data.classes == classes:
        return
    if len(data.classes) != len(classes) or classes != [str(k) for k in range(len(classes))]:
        raise ValueError(
            f"the dataset has other classes ({', '.join(data.classes[:20])}) than {run} "
            "was trained on"
        )
    print(f"class 0 of {run} is {data.classes[0]}, class {classes[-1]} is {data.classes[-1]}")


def random_indices(data, n, seed=0):
    """Return the indices of n images in random order, of all if the dataset has fewer."""
    n = min(n, len(data))
    return next(image_order(len(data), seed, n, 0, [range(n)]))


def some_images(config, n, device, data=None):
    """Return n images (n, 3, H, W) in [-1, 1] and their labels (n,), evenly spread over a dataset.

    data: the dataset, by default that of a run's settings. A dataset with fewer images returns all.
    Built-in Shapes return images that no run trains on. Latents (n, C, H, W) are returned as they
    are.
    """
    if data is None and config["data"]:
        data = open_images(config, device)
    if data is None:
        # Training uses the indices below 2^30.
        data, indices = Shapes(config["res"], device, first=2**30), range(n)
    else:
        n = min(n, len(data))
        indices = [i * len(data) // n for i in range(n)]
    images, label = load_batch(data, indices)
    return to_float(images.to(device)), label.to(device)


# ---------------------------------------------------------------- samples


def labels(config, n):
    """Return n labels (n,) that cycle through all classes; zeros without classes."""
    return parse_labels(None, config["classes"], n)


def add_text_options(add):
    """Add the options of sample.py for texts to a parser. add: its add_argument."""
    add("--prompt", nargs="+", metavar="TEXT", help="texts to cycle through, for runs on captions")
    prompts_help = "prompts from a text file, one per line, or their embeddings from an .npy"
    add("--prompts", metavar="FILE", help=prompts_help)
    add("--negative", metavar="TEXT", help="negative prompt for guidance (default: empty text)")
    add("--text-encoder", metavar="NAME", help="the T5 of the training; required again")


def text_labels(run, config, n, device, **options):
    """Return (texts, labels, null_label) of n images, which cycle through the prompts.

    options: those of sample.py for texts: prompt, prompts, negative, text_encoder and guidance. The
    texts are None for embeddings. Raises ValueError for options that do not fit the run.
    """
    defaults = dict(prompt=None, prompts=None, negative=None, guidance=1.0, text_encoder=None)
    args = argparse.Namespace(**defaults | options, checkpoint=run, portrait=False)
    texts, tokens, null_label = read_prompts(args, config, device)

    def encoded(indices):
        return tokens[[int(k) % len(tokens) for k in indices]]

    return texts and [texts[k % len(texts)] for k in range(n)], LazyLabels(n, encoded), null_label


def drawn(net, config, schedule, label, batch, device, **options):
    """Draw one sample per label (N,). Returns images (N, H, W, 3) uint8 on the CPU.

    Sample k depends on the seed and its number k, not on the batch size. options: see
    sample.sample.
    """
    rounds = sample_batches(
        net,
        (3, *pixels(config["res"])),
        schedule,
        label,
        batch,
        device=device,
        null_label=len(config["classes"]),
        **options,
    )
    return torch.cat([images for _, images in rounds])


def write_images(path, images, label, classes, texts=None):
    """Write images (N, H, W, 3) uint8 as sample.py does: .npz with arr_0 and y, or a grid.

    Float latents (N, H, W, C) go to write_latents. The grid has a column per class. Without
    classes, or with many, it is about square. Each of the clips (N, T, H, W, 3) is a row of frames.
    texts: the prompts, one per image, which then replace y and are written below the images of a
    grid.
    """
    if images.is_floating_point():
        return write_latents(path, images.permute(0, 3, 1, 2), label, classes)
    is_video = images.ndim == 5
    with writing(path) as file:
        if path.endswith(".npz"):
            # Embeddings of texts have neither prompts nor class numbers.
            names = {}
            if texts:
                names = dict(prompts=np.array(texts))
            elif torch.is_tensor(label):
                names = dict(y=label.cpu().numpy())
            np.savez(file, arr_0=images.numpy(), **names)
        else:
            columns = max(1, round(len(images) ** 0.5))
            if is_video:
                columns = images.shape[1]
            elif 2 <= len(classes) <= 16:
                columns = len(classes)
            shown = images.flatten(0, -4).numpy()  # (N, H, W, 3), or (N T, H, W, 3)
            make_grid(shown, columns, texts=texts).save(file, "PNG")
    print(f"wrote {len(images)} {'clips' if is_video else 'images'} to {path}")


def draw_latents(distribution, data, indices, batch, seed, device):
    """Draw the latents (N, C, ...) of the images at these indices. Also returns labels (N,).

    distribution: maps images (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1] to mean and standard
    deviation of the latents.
    """
    latents, labels = [], []
    for i in range(0, len(indices), batch):
        images, label = load_batch(data, indices[i : i + batch])
        mean, std = distribution(to_float(images.to(device)))
        # The noise depends on the seed and on the position in `indices`, not on the batch size.
        noise = noise_by_number(seed, range(i, i + len(mean)), device)(*mean.shape[1:])
        latents.append((mean + std * noise).cpu())
        labels.append(label.cpu())
    return torch.cat(latents), torch.cat(labels)


def write_latents(path, z, label, classes):
    """Write latents z (N, C, H, W) as sample.py does: an .npz that train.py can read.

    label: (N,), which is only written if there are classes.
    """
    arrays = dict(y=label.cpu().numpy(), classes=classes) if classes else {}
    with writing(path) as file:
        np.savez(file, z=z.cpu().numpy(), **arrays)
    print(f"wrote {len(z)} latents {tuple(z.shape[1:])} to {path}")


def decode_latents(path, channels, decode, batch, out, n=None):
    """Write the images of the latents that sample.py or write_latents wrote.

    path: the file of latents. decode: function from latents (B, channels, H, W) to images (B, 3, H,
    W) or clips (B, 3, T, H, W) in [-1, 1]. batch: B. out: the .png or .npz to write, see
    write_images. n: decode only the first n. Raises ValueError for latents with other channels.
    """
    data = Latents(path)
    z, label = load_batch(data, range(len(data))[:n])
    if z.shape[1] != channels:
        raise ValueError(
            f"{path} holds latents with {z.shape[1]} channels, but the network has {channels}"
        )
    images = [to_uint8(decode(part)).cpu() for part in z.split(batch)]
    write_images(out, torch.cat(images).movedim(1, -1), label, data.classes)


def open_reference(path, features, device):
    """Return (feature network, mean, covariance) of real images.

    path, features, and the errors raised: see fid.fid.
    """
    sides, name = open_sides([path], features)
    if name != (features or INCEPTION):
        raise ValueError(f"{path} holds statistics of {name}: add --features {name}")
    net = load_network(features).to(device)
    summary, _ = side_statistics(sides[0], net, device=device, batch=64)
    return net, summary["mu"], summary["sigma"]


@torch.no_grad()
def quality(images, label, reference, device):
    """Return the Fréchet distance of images (N, H, W, 3) to a reference, and the share of classes.

    label: (N,) or None. reference: see open_reference. The share is that of images whose largest
    logit of the feature network is their label; None without labels or logits.
    """
    net, mu, sigma = reference
    statistics = Statistics()
    right = []  # for each image, whether it shows its class
    for i in range(0, len(images), 50):
        features, logits = extract(net, images[i : i + 50].permute(0, 3, 1, 2).to(device))
        statistics.update(features)
        if label is not None and logits is not None:
            right.append(logits.argmax(1).cpu() == label[i : i + 50])
    share = torch.cat(right).double().mean().item() if right else None
    return frechet_distance(mu, sigma, *statistics.gaussian()), share


def noise_by_number(seed, numbers, device, draw=torch.randn):
    """Return a function noise(*shape) that draws new noise (B, *shape) at each call.

    The noise of an image depends on the seed and its number, so not on the batch size. numbers:
    those of the B images. draw: torch.randn or torch.rand.
    """
    generators = [
        torch.Generator(device).manual_seed(mix_seed(seed, int(number))) for number in numbers
    ]

    def noise(*shape):
        rows = [draw(shape, generator=generator, device=device) for generator in generators]
        return torch.stack(rows)

    return noise


# ---------------------------------------------------------------- training


def fit(
    net,
    gradients,
    *,
    steps,
    lr,
    warmup=50,
    decay=0.5,
    ema=0.99,
    betas=(0.9, 0.99),
    eps=1e-12,
    weight_decay=0.0,
    clip=1.0,
    optimizer=None,
    report=None,
):
    """Train net in place. Return a copy with EMA weights, in eval mode, without gradients.

    gradients(step): computes the gradients of one step by backward() and returns the loss, a
    scalar tensor. report(step, loss) is called after each step; an error it raises ends training.
    clip: the largest norm of the gradients, or None. optimizer: one over net's parameters, for a
    caller that saves its state; it replaces betas, eps and weight_decay.
    warmup, decay: see train.learning_rate. ema: the largest EMA decay; 0 returns the last weights.
    Parameters that do not require gradients stay as they are. The train or eval mode of net stays.
    """
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)

    # Adam. With weight_decay it is AdamW: the decay acts on the weights, not on the gradients.
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            net.parameters(), lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
    for step in range(steps):
        # Linear warmup, then constant, then a linear decay to zero.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, warmup, decay, steps)

        # The gradients of one batch. Under torchrun, DDP averages them over the ranks.
        loss = gradients(step)

        # By default the global gradient norm is clipped at 1, as in train.py.
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

        # Sums over all weights show NaN and infinity. They cost little if they are rare.
        due = (step + 1) % 100 == 0 or step + 1 == steps
        if due and not torch.nn.utils.get_total_norm(net.parameters()).isfinite():
            raise ValueError(
                f"the weights are not finite after {step + 1} steps: try a smaller --lr than {lr:g}"
            )

        # The decay is smaller at first, so that the average forgets the initial weights.
        ema_update(ema_net, net, ema_decay(step, ema))

        if report is not None:
            report(step, loss)
    return ema_net


def progress_printer(steps, batch, line, unit="step"):
    """Return report(step, *values), which prints every 100 steps and at the last one.

    line: a format string for the values, which are scalar tensors.
    """
    start = time.time()

    def report(step, *values):
        done = step + 1
        if done % 100 == 0 or done == steps:
            text = line.format(*(value.item() for value in values))
            images_per_second = done * batch / (time.time() - start)
            print(f"{unit} {done}/{steps}  {text}  {images_per_second:.0f} img/s", flush=True)

    return report


# ---------------------------------------------------------------- files and time


@contextlib.contextmanager
def reading(path, command):
    """Raise ValueError, which names path and command, if the file is damaged or another one.

    command: the one that should have written the file. Errors of the system, such as missing
    permissions, pass through.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"{path} was not written by {command} ({type(error).__name__})") from error


@torch.no_grad()
def milliseconds(net, *args, seconds):
    """Return the median time of net(*args) on one CPU thread. seconds: how long to measure."""
    from torch.utils.benchmark import Timer  # its import takes a fifth of a second

    timer = Timer("net(*args)", globals=dict(net=net, args=args), num_threads=1)
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median
