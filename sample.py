"""Sampling: DDPM and guidance as in the appendix, DDIM, and DPM-Solver++(2M).

    python sample.py runs/shapes-32 --n 100 --guidance 2 --out grid.png   # a grid of samples
    python sample.py runs/shapes-32 --n 50000 --out samples.npz           # arr_0 uint8, for fid.py
    python sample.py runs/shapes-32 --n 50000 --out samples/              # can be continued
    python sample.py samples/ --out samples.npz                           # packs the folder
    python sample.py runs/shapes-32 --strip --out strip.png               # from noise to image
    torchrun --nproc-per-node 8 sample.py runs/shapes-32 --number 50000 --out samples/
    python sample.py runs/shapes-32 --export model.pt --dtype float16     # a model to pass on

Each sampler is a loop of its own. It takes a list of nets, one per step. Each net is bound to its
label and guidance: v_hat = net(z, logsnr). Guidance wraps a net in another net, so the samplers
need no code for it. sample() makes the list of nets and the noise.

The samplers need torch, numpy, pillow and schedule.py. The command at the end needs support/.
"""

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from schedule import alpha_sigma, posterior, x_from_v

# ---------------------------------------------------------------- images and floats


def to_uint8(x):
    """Turn samples (..., H, W) in [-1, 1] into 8-bit images: rounded, not truncated."""
    # 127.5 x + 127.5 is the brightness. The other 0.5 rounds it, because uint8 truncates.
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images):
    """Turn 8-bit images into float32 in [-1, 1], the inverse of to_uint8. Floats are unchanged."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


# ---------------------------------------------------------------- one step


def clip_x(x_hat, clip):
    """Clip the predicted image x_hat (B, ...) to [-1, 1], the range of images.

    clip: "static" clips, as the paper does. "dynamic" first divides each image by its 99.5 %
    quantile of |x_hat| where that exceeds 1 (Imagen, arXiv 2205.11487). None changes nothing.
    """
    if clip is None:
        return x_hat
    if clip == "dynamic":
        # Guidance pushes many pixels beyond the range. Rescaling keeps their contrast.
        quantile = x_hat.flatten(1).abs().float().quantile(0.995, 1)  # (B,)
        limit = quantile.clamp(min=1).to(x_hat.dtype)
        x_hat = x_hat / limit.reshape(-1, *[1] * (x_hat.ndim - 1))
    return x_hat.clamp(-1, 1)


def ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise=None, interpolation=0.2):
    """One step of ancestral sampling, from z_t to z_s with s < t (appendix, "Sampler").

    z, x_hat, noise: (B, ...). logsnr_t < logsnr_s: (B,) or scalar. Without noise, the mean is
    returned. interpolation: 0.2 in the paper, 1.0 for MS-COCO. Returns z_s (B, ...).
    """
    # Eq. 3: the mean of q(z_s | z_t, x_hat), and the two bounds of the reverse variance.
    mean, log_var_min, log_var_max = posterior(z, x_hat, logsnr_t, logsnr_s)
    if noise is None:  # the last step returns the mean
        return mean
    # The paper interpolates between the bounds in log space, with 0.2 on ImageNet.
    log_var = interpolation * log_var_max + (1 - interpolation) * log_var_min
    return mean + torch.exp(0.5 * log_var) * noise


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """One deterministic step: z_s = alpha_s x_hat + sigma_s eps_hat. Shapes: see ddpm_step.

    eps_hat = (z - alpha_t x_hat) / sigma_t uses the clipped x_hat. Substituting it gives
    z_s = (sigma_s / sigma_t) z - alpha_s expm1((logsnr_t - logsnr_s) / 2) x_hat, the first-order
    exponential integrator of DPM-Solver++ (arXiv 2211.01095, Eq. 9).
    """
    _, sigma_t = alpha_sigma(logsnr_t, like=z)
    alpha_s, sigma_s = alpha_sigma(logsnr_s, like=z)

    # expm1 avoids the cancellation in exp(half) - 1 when the step is small.
    half = 0.5 * (logsnr_t - logsnr_s).reshape(-1, *[1] * (z.ndim - 1))
    return sigma_s / sigma_t * z - alpha_s * torch.expm1(half) * x_hat


# ---------------------------------------------------------------- the samplers
# nets: one per step, v_hat = net(z, logsnr). z: (B, C, H, W), standard normal. logsnrs:
# (len(nets) + 1,), rising: the noise levels before the first step, between steps, and at the end.


def predict_x(net, z, logsnr, clip):
    """Predict the clean image, clipped. logsnr: scalar tensor. Returns x_hat (B, C, H, W)."""
    # (z, v) is a rotation of (x, eps), so no division is needed.
    v_hat = net(z, logsnr.expand(len(z)))
    return clip_x(x_from_v(z, v_hat, logsnr), clip)


def sample_ddpm(nets, z, logsnrs, draw_noise, *, interpolation=0.2, clip="static"):
    """Walk from pure noise z_1 to an image by ancestral sampling, the paper's sampler.

    draw_noise: function that returns standard normal noise (B, C, H, W). Returns (B, C, H, W).
    """
    for i, net in enumerate(nets):
        logsnr_t, logsnr_s = logsnrs[i], logsnrs[i + 1]  # s < t: z_s is less noisy than z_t

        # Predict the clean image and clip it to the range of images.
        x_hat = predict_x(net, z, logsnr_t, clip)

        # Draw z_s from q(z_s | z_t, x_hat). The last step takes the mean: it adds no noise.
        noise = draw_noise() if i < len(nets) - 1 else None
        z = ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise, interpolation)
    return z


def sample_ddim(nets, z, logsnrs, *, clip="static"):
    """Walk from z_1 to an image deterministically (DDIM, arXiv 2010.02502).

    Returns (B, C, H, W).
    """
    for i, net in enumerate(nets):
        # Predict the clean image, as sample_ddpm does.
        x_hat = predict_x(net, z, logsnrs[i], clip)

        # Reuse the predicted noise, scaled to the lower noise level. No new noise is drawn.
        z = ddim_step(z, x_hat, logsnrs[i], logsnrs[i + 1])
    return z


def sample_dpmpp(nets, z, logsnrs, *, clip="static"):
    """Walk from z_1 to an image by DPM-Solver++(2M) (arXiv 2211.01095), a second-order DDIM.

    A step of DDIM treats x_hat as constant. Here the last two predictions give its slope in logsnr,
    without another call of the net. Returns (B, C, H, W).
    """
    last_x_hat = None
    for i, net in enumerate(nets):
        logsnr_t, logsnr_s = logsnrs[i], logsnrs[i + 1]
        x_hat = predict_x(net, z, logsnr_t, clip)

        # Extrapolate x_hat from the last two steps to the middle of this one. The first step has
        # no predecessor. The last one stays first-order: on a grid uniform in t its logsnr
        # interval is 3 to 8 times as long as the one before it (for 512 to 8 steps), and
        # extrapolation would overshoot.
        x_middle = x_hat
        if 0 < i < len(nets) - 1:
            ratio = (logsnr_s - logsnr_t) / (logsnr_t - logsnrs[i - 1])
            x_middle = x_hat + 0.5 * ratio * (x_hat - last_x_hat)

        # Then step as DDIM does, with the extrapolated image.
        z = ddim_step(z, x_middle, logsnr_t, logsnr_s)
        last_x_hat = x_hat
    return z


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpmpp": sample_dpmpp}

# ---------------------------------------------------------------- guidance and noise


def guided(net, scale, null_label=None):
    """Classifier-free guidance as a net: eps_uncond + scale (eps_cond - eps_uncond).

    scale: the paper's 1 + eta, so 1 is off. A number, or one per image (B, 1, 1, 1).
    null_label: the label of the unconditional half. A class number, or a tensor shaped like one
    label or text, such as a negative prompt. The default is net.num_classes, if the net has it.

    A distilled net has `max_guidance` (related/distill.py). It takes the scale itself, as the label
    (label, scale). Raises ValueError for a scale that it did not learn, and without a null label.
    """
    # Scale 1 is the conditional prediction. It needs no second half.
    if not torch.is_tensor(scale) and scale == 1.0:
        return net

    # A distilled net guides itself.
    max_guidance = getattr(net, "max_guidance", None)
    if max_guidance:
        if not 1 <= scale <= max_guidance:
            raise ValueError(f"this net takes guidance from 1 to {max_guidance:g}, not {scale:g}")
        return lambda z, logsnr, label: net(z, logsnr, (label, torch.full_like(logsnr, scale)))

    if null_label is None:
        null_label = getattr(net, "num_classes", None)
        if null_label is None:
            raise ValueError("guidance needs null_label: the net has no num_classes")

    def guided_net(z, logsnr, label):
        # One batch of twice the size: first with the labels, then with the null label.
        if torch.is_tensor(null_label):
            null_labels = null_label.expand_as(label)
        else:
            null_labels = torch.full_like(label, null_label)
        both = net(torch.cat([z, z]), torch.cat([logsnr, logsnr]), torch.cat([label, null_labels]))
        cond, uncond = both.to(z.dtype).chunk(2)

        # The paper combines eps. For a given z, eps is affine in v, so v is combined likewise.
        return uncond + scale * (cond - uncond)

    return guided_net


def mix_seed(*integers):
    """Mix integers >= 0 into one seed of 64 bits.

    The generator of a GPU uses all of them, that of a CPU the lower 32. So on a CPU, in a run of
    4,000 steps of 64 images, 0.006 % of the examples have the noise of another one.
    """
    sequence = np.random.SeedSequence((*integers, 1))  # the 1, because numpy ignores trailing zeros
    return int(sequence.generate_state(1, np.uint64)[0])


def noise_source(seed, numbers, shape, device, dtype):
    """Return a function that draws noise (B, C, H, W) for the images with these numbers (B,).

    shape: (C, H, W). The noise of image k depends on (seed, k) alone.
    """
    # One generator per image: an image then does not depend on the batch around it.
    generators = [torch.Generator(device).manual_seed(mix_seed(seed, int(k))) for k in numbers]

    def draw_noise():
        rows = [
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for generator in generators
        ]
        return torch.stack(rows)

    return draw_noise


# ---------------------------------------------------------------- whole batches


def default_grid(sampler):
    """Return the grid of a sampler: DPM-Solver++ is of second order only on "logsnr"."""
    return "logsnr" if sampler == "dpmpp" else "t"


@torch.no_grad()
def sample(
    net,
    shape,
    schedule,
    *,
    steps=256,
    sampler="ddpm",
    grid=None,
    label=None,
    null_label=None,
    guidance=1.0,
    guidance_interval=None,
    interpolation=0.2,
    clip="static",
    seed=0,
    numbers=None,
    device="cpu",
    dtype=torch.float32,
    observe=None,
):
    """Draw a batch of samples in `steps` steps from t = 1 to t = 0.

    net: v_hat = net(z, logsnr, label), in eval mode. shape: (B, C, H, W). label: (B,) int64, text
    (see support/text.py), or None. sampler: "ddpm", "ddim" or "dpmpp". grid: "t" for steps uniform
    in t, the default of "ddpm" and "ddim"; "logsnr" for steps uniform in logsnr, the default of
    "dpmpp", which is of second order only there. guidance, null_label: see guided.
    guidance_interval: (low, high) in logsnr. Outside of it, steps are not guided and need no second
    half. interpolation: see ddpm_step. clip: see clip_x. numbers: the numbers of the images, B
    integers (default: 0 to B - 1). The noise of an image depends on its number and the seed alone.
    observe: a function (step, z, logsnr, v_hat) to call at each step, from step 0 at t = 1.

    Returns (B, C, H, W), about [-1, 1]. Raises ValueError for unknown names, and for guidance
    without labels.
    """
    # A wrong name must not fall back to a default without notice.
    grid = grid or default_grid(sampler)
    if sampler not in SAMPLERS or grid not in ("t", "logsnr"):
        raise ValueError(f"unknown sampler {sampler!r} or grid {grid!r}")
    if clip not in ("static", "dynamic", None):
        raise ValueError(f"clip must be static, dynamic or None, not {clip!r}")
    if label is None and (torch.is_tensor(guidance) or guidance != 1.0):
        raise ValueError("guidance needs labels: without them it has no direction")

    # The noise levels of the steps, in float64 on the CPU: steps + 1 of them, from t = 1 to t = 0.
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if grid == "t":
        logsnrs = schedule(u)
    else:
        logsnr_max, logsnr_min = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
        logsnrs = logsnr_max + (logsnr_min - logsnr_max) * u

    # One net per step, bound to its label. It is guided if its noise level is in the interval.
    # Python numbers decide that: reading a GPU tensor would make every step wait for the device.
    def bind(net):
        return lambda z, logsnr: net(z, logsnr, label).to(dtype)

    low, high = guidance_interval or (-math.inf, math.inf)
    plain_net, guided_net = bind(net), bind(guided(net, guidance, null_label))
    nets = [guided_net if low <= logsnr <= high else plain_net for logsnr in logsnrs.tolist()[:-1]]
    logsnrs = logsnrs.to(dtype).to(device)  # Apple's GPUs have no float64

    if observe:
        nets = [observed(net, step, observe) for step, net in enumerate(nets)]

    # Start from z_1, which is pure noise. Only DDPM draws more noise on its way.
    numbers = range(shape[0]) if numbers is None else numbers
    draw_noise = noise_source(seed, numbers, shape[1:], device, dtype)
    z = draw_noise()
    if sampler == "ddpm":
        return sample_ddpm(nets, z, logsnrs, draw_noise, interpolation=interpolation, clip=clip)
    return SAMPLERS[sampler](nets, z, logsnrs, clip=clip)


def observed(net, step, observe):
    """Wrap the net of a step: it calls observe(step, z, logsnr, v_hat), and returns v_hat."""

    def observed_net(z, logsnr):
        v_hat = net(z, logsnr)
        observe(step, z, logsnr, v_hat)
        return v_hat

    return observed_net


def sample_batches(
    net,
    size,
    schedule,
    label,
    batch,
    *,
    device,
    numbers=None,
    gather=True,
    latents=False,
    **options,
):
    """Draw samples in rounds of up to `batch` per rank.

    size: (C, H, W). label: (L,) int64, or a sequence that returns a tensor for indices (LazyLabels
    in support/text.py); image k takes label k mod L. numbers: a sequence of the numbers of the
    images to draw (default: 0 to L - 1). options, and errors raised: see sample. Image k is the
    same for any list, batch size and number of ranks. In float32 this is exact only among batches
    of one size. So with numbers every batch has `batch` images, also if few are missing.

    Yields after each round (numbers of its images, samples (n, H, W, C) on the CPU), uint8, or
    float32 with latents. With gather, rank 0 receives the samples of all ranks. Every rank must
    then consume all rounds, and the process group needs gloo (see join_ranks). Without gather, each
    rank yields its own samples.
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()

    # torch.compile and sharded networks need batches of one size, and equally many calls of the
    # net on every rank. Without a list, the samples are spread evenly over the rounds.
    if numbers is None:
        numbers = range(len(label))
        rounds = -(-len(numbers) // (world * batch))
        batch = -(-len(numbers) // (world * rounds))
    dtype = torch.float32 if latents else torch.uint8
    for start in range(0, len(numbers), world * batch):
        part = numbers[start : start + world * batch]
        samples = torch.zeros(len(part), *size[1:], size[0], dtype=dtype)  # (n, H, W, C)
        own = samples[rank * batch : (rank + 1) * batch]  # a view of this rank's part

        # Every rank draws a full batch. The last round wraps around and drops the surplus.
        first = start + rank * batch
        mine = [numbers[i % len(numbers)] for i in range(first, first + batch)]
        y = label[torch.tensor(mine) % len(label)].to(device)
        x = sample(net, (batch, *size), schedule, label=y, numbers=mine, device=device, **options)
        x = x if latents else to_uint8(x)  # (batch, C, H, W)
        own[:] = x[: len(own)].permute(0, 2, 3, 1)

        # The sum over ranks gathers the samples: the other parts of each rank are zeros.
        if world > 1 and gather:
            dist.reduce(samples, 0)
        yield (part, samples) if gather else (mine[: len(own)], own)


# ---------------------------------------------------------------- grids


def make_grid(images, columns, gap=2, texts=None):
    """Arrange images (N, H, W, 3) uint8 in rows of `columns`, on white. Returns a PIL image.

    gap: pixels between images. texts: captions to write below the images. Small images are then
    enlarged, so that the captions are legible.
    """
    # With captions: up to 4 lines, below images at least 128 pixels wide.
    n, height, width, _ = images.shape
    lines, scale = (4, -(-128 // width)) if texts else (0, 1)
    height, width = height * scale, width * scale
    row_height, column_width = height + 12 * lines + gap, width + gap  # 12 pixels per line of text
    rows = -(-n // columns)

    # The last row may be incomplete. The gap is between images, not around them.
    grid = Image.new("RGB", (columns * column_width - gap, rows * row_height - gap), "white")
    for i, image in enumerate(images):
        left, top = i % columns * column_width, i // columns * row_height
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left, top))
        if texts:
            # A character is 6 pixels wide. The built-in font has Latin-1 characters only.
            text = "\n".join(textwrap.wrap(texts[i], width // 6)[:lines])
            text = text.encode("latin-1", "replace").decode("latin-1")
            ImageDraw.Draw(grid).multiline_text((left + 1, top + height), text, "black", spacing=1)
    return grid


# ---------------------------------------------------------------- the command: its options


def make_parser():
    """The parser of the options."""
    parser = argparse.ArgumentParser(
        description="Sample from a run or a checkpoint of train.py, or pack a folder of samples.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"sample.py: {message}")
    add = parser.add_argument
    switch = dict(action=argparse.BooleanOptionalAction)

    # What to draw. torchrun takes --n for one of its own options, so there it is --number.
    checkpoint_help = (
        "a run's folder, a checkpoint, an exported model, or folder/ of samples to pack"
    )
    add("checkpoint", help=checkpoint_help)
    n_help = "number of samples (default 64, or one per prompt); with torchrun use --number"
    add("--n", "--number", type=int, help=n_help)
    add("--first", type=int, help="number of the first image (default 0)")
    add("--batch", type=int, default=64, help="batch size (default 64); does not change samples")
    add("--seed", type=int, default=0, help="seed of the noise (default 0)")
    add("--label", help="classes to cycle through: 3 or star,heart (default: all)")
    add("--prompt", nargs="+", metavar="TEXT", help="texts to cycle through, for runs on captions")
    prompts_help = "prompts from a text file, one per line, or their embeddings from an .npy"
    add("--prompts", metavar="FILE", help=prompts_help)
    add("--negative", metavar="TEXT", help="negative prompt for guidance (default: empty text)")
    add("--text-encoder", metavar="NAME", help="the T5 of the training; required again")
    add("--portrait", action="store_true", help="draw portrait images, if the run supports them")

    # How to draw it.
    add("--steps", type=int, help="number of steps (default: as the run says, or 256)")
    add("--sampler", choices=SAMPLERS, help="default: as the run says, or ddpm")
    grid_help = "steps uniform in t (default of ddpm, ddim) or in logsnr (default of dpmpp)"
    add("--grid", choices=["t", "logsnr"], help=grid_help)
    interpolation_help = "between the bounds of the log-variance of ddpm (default 0.2)"
    add("--interpolation", type=float, default=0.2, help=interpolation_help)
    clip_help = "how to clip x_hat (default: static for images, none for latents)"
    add("--clip", choices=["static", "dynamic"], help=clip_help)
    add("--guidance", type=float, default=1.0, help="scale 1 + eta of guidance (default 1: off)")
    interval_help = "guide between these logsnr only (default: as the run says; -99 99 is all)"
    interval = dict(type=float, nargs=2, metavar=("LO", "HI"))
    add("--guidance-interval", help=interval_help, **interval)

    # Where, and with what.
    add("--model", help="package.module:Class, for a network that is neither uvit nor unet")
    add("--bf16", help="bfloat16 in the network (default: as in training)", **switch)
    add("--compile", help="torch.compile (default: on a GPU, for 3,000 or more calls)", **switch)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    out_help = "grid.png, folder/ or samples.npz (default grid.png); a folder is continued"
    add("--out", default="grid.png", help=out_help)
    strip_help = "draw z_t and x_hat of a few samples (default 4), from noise to image"
    add("--strip", action="store_true", help=strip_help)

    # Pass the model on, instead of drawing samples.
    add("--export", metavar="FILE", help="write the EMA weights to this .pt or .safetensors")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the exported weights (default float32)",
    )
    return parser


def check_options(args):
    """Check the options, and create the folder of --out. Raises ValueError."""
    numbers = (args.n, args.batch, args.steps)
    if not all(number is None or 1 <= number <= 10**9 for number in numbers) or args.seed < 0:
        raise ValueError(
            "--n, --batch and --steps must be from 1 to 1,000,000,000, and --seed at least 0"
        )
    if not 0 <= args.first <= 10**9:
        raise ValueError("--first must be from 0 to 1,000,000,000")
    if not (math.isfinite(args.guidance) and math.isfinite(args.interpolation)):
        raise ValueError("--guidance and --interpolation must be finite numbers")
    if not args.out.endswith((".png", ".npz", "/")):
        raise ValueError(f"--out {args.out} must be like grid.png, folder/ or samples.npz")
    if args.strip:
        check_strip(args)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.out.endswith("/"):
        from support.jobs import check_folder

        check_folder(args.out)


def check_strip(args):
    """Raise ValueError for options that --strip does not take."""
    if not args.out.endswith(".png"):
        raise ValueError(f"--strip draws an image: --out {args.out} must end with .png")
    if (args.n or 4) > args.batch:
        raise ValueError(f"--strip draws one batch: --n {args.n or 4} exceeds --batch {args.batch}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--strip draws one batch, in one process: omit torchrun")


def check_run(args, config, latents):
    """Raise ValueError for options that the run does not support.

    config: the settings of the run. latents: True if it draws latents.
    """
    run = args.checkpoint
    if latents and not args.out.endswith(".npz"):
        raise ValueError(f"{run} draws latents, not images: use --out samples.npz")
    if latents and args.clip:
        raise ValueError(f"{run} draws latents, which have no fixed range: omit --clip")

    if args.guidance != 1.0 or args.negative:
        check_guidance(run, config)

    # Runs on captions need prompts. Other runs take none of the options for texts.
    text_options = [args.prompt, args.prompts, args.negative, args.text_encoder, args.portrait]
    names = ["--prompt", "--prompts", "--negative", "--text-encoder", "--portrait"]
    if has_captions(config):
        if args.label or not (args.prompt or args.prompts):
            raise ValueError(
                f"{run} was trained on texts: use --prompt or --prompts, and omit --label"
            )
        return
    for name, value in zip(names, text_options):
        if value:
            raise ValueError(f"{run} was trained without texts: omit {name}")

    if args.label and not config["classes"]:
        raise ValueError(f"{run} was trained without labels: omit --label")


def has_captions(config):
    """True for a run of a text-to-image network."""
    return config["model_args"].get("text_tokens", 0) > 0


def can_guide(config):
    """True if a run can be guided: it has labels or texts, and training dropped some of them.

    config: the settings of the run.
    """
    has_labels = bool(config["classes"]) or has_captions(config)
    return has_labels and config.get("label_drop", 0.1) > 0


def check_guidance(run, config):
    """Raise ValueError, which names the run, if it cannot be guided."""
    if can_guide(config):
        return
    if config["classes"] or has_captions(config):
        reason = "with --label-drop 0, so it has not learned to draw without a label"
    else:
        reason = "without labels"
    raise ValueError(f"{run} was trained {reason}: omit --guidance")


def parse_labels(text, classes, n=None):
    """Return n labels (n,) that cycle through the classes in text, or through all without text.

    text: names or numbers of classes, separated by commas. Without n, return one cycle. Raises
    ValueError for an unknown class.
    """
    # Without text, the words are the numbers of all classes.
    words = map(str, range(len(classes)))
    if text:
        words = [word.strip() for word in text.split(",")]
    numbers = []
    for word in words:
        # A name wins over a number: a class can have the name "3".
        if word in classes:
            numbers.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            numbers.append(int(word))
        else:
            raise ValueError(
                f"--label {word!r} is none of the {len(classes)} classes, "
                f"0 to {len(classes) - 1}: {', '.join(classes[:20])}"
            )
    # A network without classes takes the label 0, which is its null label.
    cycle = torch.tensor(numbers or [0])
    return cycle if n is None else cycle.repeat(n)[:n]


def choose_labels(args, config, device):
    """Return (texts, labels, null_label) of one cycle: image k takes entry k mod its length.

    The texts are None for a run on classes, and for embeddings.
    """
    if has_captions(config):
        from support.text import read_prompts

        return read_prompts(args, config, device)
    classes = config["classes"]
    return None, parse_labels(args.label, classes), len(classes)


def choose_numbers(args, config, labels):
    """Return the numbers of the images to draw, a range."""
    n = len(labels) if has_captions(config) else 64
    if args.strip:
        n = 4
    return range(args.first, args.first + (args.n or n))


def choose_options(args, config, latents):
    """Return the options of sample(), as a dict. Raises ValueError for an empty interval."""
    # A run may store how it is best sampled: a distilled student has learned certain steps only.
    own = config["sampling"]
    interval = args.guidance_interval or own.get("guidance_interval")
    if interval and not interval[0] < interval[1]:
        raise ValueError("--guidance-interval LO HI needs LO < HI")
    sampler = args.sampler or own.get("sampler", "ddpm")
    return dict(
        steps=args.steps or own.get("steps", 256),
        sampler=sampler,
        grid=args.grid or default_grid(sampler),
        guidance=args.guidance,
        guidance_interval=interval,
        interpolation=args.interpolation,
        clip=args.clip or (None if latents else "static"),
        seed=args.seed,
    )


# ---------------------------------------------------------------- the command: drawing and writing


# Compiling a large network takes a minute or two. Fewer calls do not win that back.
COMPILE_CALLS = 3000


def wants_compile(option, device, calls):
    """Whether to compile: as --compile says, by default on a GPU for COMPILE_CALLS or more calls.

    calls: the number of calls of the network on each rank.
    """
    if option is not None:
        return option
    return device.type == "cuda" and calls >= COMPILE_CALLS


def prepare_net(net, args, config, compiled):
    """Return the network, compiled, and in bfloat16 if the options or the run's settings say so."""
    from support.runtime import in_bf16

    # All batches have one size (see sample_batches). Guided ones have twice that: at most two
    # compilations.
    if compiled:
        net = torch.compile(net, dynamic=False)
    return in_bf16(net, wants_bf16(args, config))


def wants_bf16(args, config):
    """True if the options, or else the run's settings, ask for bfloat16."""
    return config["bf16"] if args.bf16 is None else args.bf16


def announce(args, config, options, calls, compiled):
    """Print what will be drawn, and a note if the run is made for another sampler.

    calls: number of calls of the network on each rank. compiled: True if it is compiled.
    """
    # Steps that a distilled student was not trained for give poor samples, but are allowed.
    own, steps, sampler = config["sampling"], options["steps"], options["sampler"]
    own_steps, own_sampler = own.get("steps", steps), own.get("sampler", sampler)
    if (steps, sampler) != (own_steps, own_sampler):
        note = f"note: {args.checkpoint} is made for --steps {own_steps} --sampler {own_sampler}"
        print(note, file=sys.stderr)

    # The settings that change the samples.
    where = ""
    if options["guidance_interval"] and args.guidance != 1:
        where = " for logsnr in [{:g}, {:g}]".format(*options["guidance_interval"])
    where += f"; {calls:,} calls of the network" + (", compiled" if compiled else "")
    print(
        f"{args.checkpoint}: {config['model']}, {config['res']} px, {config['schedule']}; "
        f"{sampler}, {steps} steps, guidance {args.guidance:g}{where}"
    )


class Plan(NamedTuple):
    """What the command draws, and how."""

    args: argparse.Namespace
    config: dict  # the settings of the run
    size: tuple  # (C, H, W)
    latents: bool
    texts: list | None  # one cycle of prompts: image k takes prompt k mod their number
    labels: torch.Tensor  # one cycle of labels, or a sequence of them
    options: dict  # of sample()
    numbers: Sequence  # of the images that are drawn

    def names(self):
        """The prompt or the class of each image; "" without."""
        classes = self.config["classes"]
        if self.texts:
            return [self.texts[k % len(self.texts)] for k in self.numbers]
        if has_captions(self.config) or not classes:
            return [""] * len(self.numbers)
        labels = self.labels.tolist()
        return [classes[labels[k % len(labels)]] for k in self.numbers]


def draw_samples(plan, net, schedule, batch):
    """Draw the samples, and write them to --out. Every rank must call it."""
    from support.jobs import write_folder

    # Memory for all samples, on rank 0. A folder needs none: each rank writes its own images.
    args, size, numbers = plan.args, plan.size, plan.numbers
    writes_folder = args.out.endswith("/")
    height, width = size[:0:-1] if args.portrait else size[1:]
    samples = None
    if not writes_folder and not (dist.is_initialized() and dist.get_rank()):
        shape = (len(numbers), height, width, size[0])
        samples = np.empty(shape, np.float32 if plan.latents else np.uint8)

    # Rounds of samples are drawn on access: each is written or stored before the next begins.
    rounds = sample_batches(
        net,
        size,
        schedule,
        plan.labels,
        batch,
        numbers=numbers,
        gather=not writes_folder,
        latents=plan.latents,
        **plan.options,
    )
    if args.portrait:
        # Training rotates portrait images to the left. Rotate samples back to the right.
        rounds = ((part, x.rot90(-1, (1, 2))) for part, x in rounds)
    if writes_folder:
        write_folder(rounds, args.out)
        return
    # Rank 0 receives the rounds in the order of the numbers.
    done = 0
    for part, x in rounds:
        if samples is not None:
            samples[done : done + len(part)] = x.numpy()
        done += len(part)
    if samples is not None:
        write_file(plan, samples)


def write_file(plan, samples):
    """Write the samples (N, H, W, C) to an .npz, or a grid of them to a .png."""
    from support.jobs import label_arrays
    from support.runtime import writing

    path, classes = plan.args.out, plan.config["classes"]
    if path.endswith(".png"):
        # One column per class, if all classes take turns and there are few. Else a square.
        columns = max(1, round(len(samples) ** 0.5))
        if 2 <= len(classes) <= 16 and not plan.args.label:
            columns = len(classes)
        texts = plan.names() if plan.texts else None
        with writing(path) as file:
            make_grid(samples, columns, texts=texts).save(file, "PNG")
        return

    # An .npz of images has the layout of OpenAI's evaluator, with labels or prompts added.
    labels = plan.labels if classes else None
    arrays = label_arrays(plan.numbers, labels, plan.texts)
    if not plan.latents:
        arrays = dict(arr_0=samples) | arrays
    else:
        # An .npz of latents has the layout that train.py --data reads.
        arrays = (arrays | dict(classes=classes)) if classes else {}
        arrays = dict(z=samples.transpose(0, 3, 1, 2)) | arrays
    with writing(path) as file:
        np.savez(file, **arrays)


def export(checkpoint, export=None, dtype="float32", **others):
    """--export: write the EMA weights and the settings of a run to one file, and print its size.

    others: other options of the command, which have no effect here. Raises ValueError for them.
    """
    from support.checkpoint import export_model
    from support.settings import flag

    path = export
    if not path:
        raise ValueError("--dtype needs --export: samples are drawn in float32 or bfloat16, --bf16")
    if not path.endswith((".pt", ".safetensors")):
        raise ValueError(f"--export {path} must end in .pt or .safetensors")
    if others:
        raise ValueError(f"--export {path} draws no samples: omit {flag(next(iter(others)))}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--export {path} is written by one process: omit torchrun")
    if os.path.exists(path):
        raise ValueError(f"--export {path} already exists: choose another name, or delete it")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    weights = export_model(checkpoint, path, dtype)
    print(
        f"wrote {path}: {weights / 1e6:.2f} M weights in {dtype}, "
        f"{os.path.getsize(path) / 1e6:.1f} MB. Sample from it: python sample.py {path}"
    )


def main(argv=None):
    from fid import on_first_rank
    from support.checkpoint import find_checkpoint, load, sample_size
    from support.jobs import given_options, is_job, open_job, pack_folder
    from support.runtime import can_compile, join_ranks, leave_ranks, with_progress

    parser = make_parser()
    args = parser.parse_args(argv)
    # Two uses of the command draw nothing: to pack a folder of samples, and to export a model.
    if is_job(args.checkpoint):
        pack_folder(**given_options(args, parser))
        return
    if args.export or args.dtype:
        export(**given_options(args, parser))
        return
    args.first = args.first or 0
    check_options(args)

    # The trained network, with its EMA weights. All ranks load the same checkpoint, although a
    # training may write a new one meanwhile.
    rank, world, device = join_ranks(args.device)
    path = on_first_rank(find_checkpoint, args.checkpoint)
    net, config, schedule = load(path, device, args.model)
    size, latents = sample_size(config)
    check_run(args, config, latents)

    # What to draw, and how.
    texts, labels, null_label = choose_labels(args, config, device)
    options = choose_options(args, config, latents) | dict(device=device, null_label=null_label)
    numbers = choose_numbers(args, config, labels)
    plan = Plan(args, config, size, latents, texts, labels, options, numbers)
    # All batches have one size, on which the last bits of an image depend.
    batch = min(args.batch, -(-len(numbers) // world))
    if args.out.endswith(".png"):
        # A grid is only looked at: spread its images evenly, so that no surplus is drawn.
        batch = -(-len(numbers) // (world * -(-len(numbers) // (world * batch))))
    if args.out.endswith("/"):
        # The missing images of the folder. Their batches have the size that those of all have.
        command = given_options(args, parser) | dict(checkpoint=path)
        plan = plan._replace(numbers=on_first_rank(open_job, plan, path, net, command))

    # The number of calls decides about compilation, and is the length of the progress bar.
    calls = options["steps"] * -(-len(plan.numbers) // (world * batch))  # on each rank
    compiled = wants_compile(args.compile, device, calls) and can_compile(device)
    net = prepare_net(net, args, config, compiled)
    if rank == 0:
        announce(args, config, options, calls, compiled)
        net = with_progress(net, calls)
    if args.strip:
        from support.strip import draw_strip

        draw_strip(plan, net, schedule)
    else:
        draw_samples(plan, net, schedule, batch)

    # Every rank has finished before rank 0 reports success.
    if world > 1:
        dist.barrier()
    if rank == 0:
        kind = "latents" if latents else "images"
        print(f"wrote {'a strip of ' * args.strip}{len(plan.numbers)} {kind} to {args.out}")
    leave_ranks()


if __name__ == "__main__":
    from support.runtime import run_command

    run_command(main)
