"""Sampling from simple diffusion (appendix): DDPM, DDIM, DPM-Solver++(2M), guidance, checkpoints, and the command.

    python sample.py runs/shapes-32 --n 100 --guidance 2 --out grid.png      # a grid of pictures from a run's newest checkpoint
    python sample.py runs/shapes-32 --n 50000 --out samples.npz              # arr_0 uint8 (N, H, W, 3), for fid.py
    torchrun --nproc-per-node 8 sample.py runs/shapes-32 --number 50000 --out samples.npz   # the same, each rank its share

A sampler takes one net, v_hat = net(z, logsnr, label). Whatever changes sampling is a function from nets to such a net:
guided() is one of them. sample() only decides which steps are guided, as that must not wait for a GPU.
"""

import argparse
import contextlib
import datetime
import importlib
import math
import os
import sys
import textwrap
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from schedule import alpha_sigma, make_schedule, posterior, x_from_v
from text import read_prompts
from unet import UNet
from uvit import UViT

SAMPLERS = ("ddpm", "ddim", "dpmpp")


def to_uint8(x):
    """(..., H, W) in [-1, 1] -> uint8, rounded and not truncated; the only place where samples become 8-bit pictures."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(x):
    """uint8 -> float32 in [-1, 1], as nets take it: the inverse of to_uint8. Floats stay as they are: latents, which are no pictures."""
    return x if x.is_floating_point() else x.float() / 127.5 - 1


def ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise=None, interpolation=0.2):
    """A draw from p(z_s | z_t), its log-variance between that of q(z_s | z_t, x) (0) and that of q(z_t | z_s) (1), appendix.

    z, x_hat, noise: (B, ...), and no noise gives the mean, as in the last step; logsnr_t < logsnr_s: (B,) or scalar.
    interpolation: 0.2 in the paper, and 1.0 for MS-COCO.
    """
    mean, logvar_min, logvar_max = posterior(z, x_hat, logsnr_t, logsnr_s)
    if noise is None:
        return mean
    return (
        mean
        + torch.exp(0.5 * (interpolation * logvar_max + (1 - interpolation) * logvar_min)) * noise
    )


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """z_s = alpha_s x_hat + sigma_s eps_hat with eps_hat = (z - alpha_t x_hat) / sigma_t, from the (clipped) x_hat.

    Written with expm1 as the exponential integrator that it is (DPM-Solver++, arXiv 2211.01095, Eq. 9 of order one):
    z_s = (sigma_s / sigma_t) z - alpha_s expm1((logsnr_t - logsnr_s) / 2) x_hat. Shapes as in ddpm_step.
    """
    (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t, like=z), alpha_sigma(logsnr_s, like=z)
    half = 0.5 * (logsnr_t - logsnr_s).reshape(-1, *[1] * (z.ndim - 1))
    return sigma_s / sigma_t * z - alpha_s * torch.expm1(half) * x_hat


def clip_x(x_hat, clip):
    """x_hat to [-1, 1]: "static" clips it (the paper), "dynamic" first divides a picture by its 99.5 % quantile of |x_hat|
    where that exceeds 1 (Imagen, arXiv 2205.11487), None leaves it."""
    if clip == "dynamic":
        limit = x_hat.flatten(1).abs().float().quantile(0.995, 1).clamp(min=1).to(x_hat.dtype)
        x_hat = x_hat / limit.reshape(-1, *[1] * (x_hat.ndim - 1))
    return x_hat if clip is None else x_hat.clamp(-1, 1)


def guided(net, scale, negative=None):
    """Classifier-free guidance as a net: eps_uncond + scale (eps_cond - eps_uncond); scale is the paper's 1 + eta, 1 is off.

    At one z, eps is affine in v, so v is combined alike. Both halves are one batch of twice the size; the unguided one gets the
    null label, net.num_classes, or negative, shaped as one label or text. scale: a number, or one for each picture, (B, 1, 1, 1). A net with a max_guidance (see
    related/distill.py) is told the number instead, as (label, scale). Raises ValueError for a number that it did not learn.
    """
    if not torch.is_tensor(scale) and scale == 1.0:
        return net
    if getattr(net, "max_guidance", None):
        if not 1 <= scale <= net.max_guidance:
            raise ValueError(
                f"this net takes guidance from 1 to {net.max_guidance:g}, not {scale:g}"
            )
        return lambda z, logsnr, label: net(z, logsnr, (label, torch.full_like(logsnr, scale)))

    def guided_net(z, logsnr, label):
        both = torch.cat(
            [
                label,
                torch.full_like(label, net.num_classes)
                if negative is None
                else negative.expand_as(label),
            ]
        )
        cond, uncond = (
            net(torch.cat([z, z]), torch.cat([logsnr, logsnr]), both).to(z.dtype).chunk(2)
        )
        return uncond + scale * (cond - uncond)

    guided_net.num_classes = net.num_classes
    return guided_net


def has_bf16(device):
    """Whether the hardware computes in bfloat16, rather than in float32 on its behalf."""
    return (
        torch.cuda.is_bf16_supported(False)
        if torch.device(device).type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )


def in_bf16(net, enabled=True):
    """The net under bfloat16 autocast, as a net: only the call is, the sampler's and the loss's arithmetic stays in float32."""

    def bf16_net(z, logsnr, label=None):
        with torch.autocast(z.device.type, torch.bfloat16):
            return net(z, logsnr, label).float()

    bf16_net.num_classes, bf16_net.max_guidance = (
        getattr(net, "num_classes", None),
        getattr(net, "max_guidance", None),
    )
    return bf16_net if enabled else net


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
    guidance=1.0,
    guidance_interval=None,
    negative=None,
    interpolation=0.2,
    clip="static",
    seed=0,
    first=0,
    device="cpu",
    dtype=torch.float32,
):
    """Draws pictures from the net: `steps` steps from t = 1 to t = 0, x_hat clipped in each.

    net: in eval mode. shape: (B, C, H, W). label: (B,) int64, a text (see uvit.Text), or None for none. sampler: "ddpm", "ddim" or "dpmpp"; grid: steps uniform in "t"
    (the paper; default of the first two) or in "logsnr" (default of "dpmpp", which shows its second order only there).
    interpolation: see ddpm_step; clip: see clip_x; guidance, negative: see guided. guidance_interval: (low, high) logsnr, outside of which
    the steps are not guided, nor pay for it. Picture i of the batch is number first + i: its noise follows from that and the seed
    alone, for any batch size. No step waits for the device.
    Returns (B, C, H, W), about [-1, 1]. Raises ValueError for an unknown name, and for guidance without labels.
    """
    grid = grid or ("logsnr" if sampler == "dpmpp" else "t")
    if (
        sampler not in SAMPLERS
        or grid not in ("t", "logsnr")
        or clip not in ("static", "dynamic", None)
    ):
        raise ValueError(f"sampler {sampler!r}, grid {grid!r} or clip {clip!r} is not known")
    if guidance != 1.0 and label is None:
        raise ValueError("guidance needs labels: without any there is nothing to guide towards")
    guided_net, (low, high) = (
        guided(net, guidance, negative),
        guidance_interval or (-math.inf, math.inf),
    )
    generators = [
        torch.Generator(device).manual_seed(mix_seed(seed, first + i)) for i in range(shape[0])
    ]
    noise = lambda: torch.stack(
        [torch.randn(shape[1:], generator=g, device=device, dtype=dtype) for g in generators]
    )
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    logsnrs = schedule(u) if grid == "t" else ends[0] + (ends[1] - ends[0]) * u
    nets = [guided_net if low <= logsnr <= high else net for logsnr in logsnrs.tolist()]
    logsnrs = logsnrs.to(device, dtype)

    z = noise()
    for i, (logsnr_t, logsnr_s) in enumerate(zip(logsnrs[:-1], logsnrs[1:])):
        v_hat = nets[i](z, logsnr_t.expand(len(z)), label).to(dtype)
        x_hat = clip_x(x_from_v(z, v_hat, logsnr_t), clip)
        last = i == steps - 1
        if sampler == "ddpm":
            z = ddpm_step(z, x_hat, logsnr_t, logsnr_s, None if last else noise(), interpolation)
        elif (
            sampler == "ddim" or i == 0 or last
        ):  # the last step of 2M: its h jumps on a grid in t, where order two fails
            z = ddim_step(z, x_hat, logsnr_t, logsnr_s)
        else:  # DPM-Solver++(2M): x_hat extrapolated from the last two steps to the middle of this one
            ratio = (logsnr_s - logsnr_t) / (logsnr_t - logsnrs[i - 1])
            z = ddim_step(z, x_hat + 0.5 * ratio * (x_hat - last_x_hat), logsnr_t, logsnr_s)
        last_x_hat = x_hat
    return z


def sample_shared(
    net, size, schedule, label, batch, *, device, gather=True, latents=False, **options
):
    """Draws len(label) pictures in rounds of up to `batch` per rank; picture k is number k, whatever the batch and the ranks.

    size: (C, H, W). label: (N,) int64, or what has a length and gives a tensor for indices (see text.Asked). options, and errors raised: sample's. Yields after each round the number of a picture and,
    from that on, pictures (n, H, W, C) uint8 on the CPU, or latents, float32 as they are: with gather all of the round's, meant for rank 0; without, those that
    this rank drew. With gather every rank must go through all rounds, and their process group have gloo, as join_ranks makes it.
    All rounds are of one size and every rank calls the net equally often: for torch.compile, and for nets split over the ranks.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rounds = -(-len(label) // (world * batch))
    batch = -(-len(label) // (world * rounds))
    for first in range(0, len(label), world * batch):
        pictures = torch.zeros(
            min(world * batch, len(label) - first),
            *size[1:],
            size[0],
            dtype=torch.float32 if latents else torch.uint8,
        )
        own = pictures[rank * batch : (rank + 1) * batch]
        y = label[torch.arange(first + rank * batch, first + (rank + 1) * batch) % len(label)].to(
            device
        )
        x = sample(
            net,
            (batch, *size),
            schedule,
            label=y,
            first=first + rank * batch,
            device=device,
            **options,
        )
        own[:] = (x if latents else to_uint8(x))[: len(own)].permute(0, 2, 3, 1)
        if world > 1 and gather:
            dist.reduce(pictures, 0)  # all but the rank's own are zeros
        yield (first, pictures) if gather else (first + rank * batch, own)


def with_progress(net, calls):
    """The net, as a net that shows on stderr, once a second, how many of `calls` calls are done and how long the others take."""
    done, start, shown = 0, time.time(), 0.0

    def counted_net(z, logsnr, label=None):
        nonlocal done, shown
        v_hat, done, now = net(z, logsnr, label), done + 1, time.time()
        if now - shown >= 1 or done == calls:
            left, shown = round((now - start) * (calls - done) / done), now
            print(
                f"\r{100 * done / calls:3.0f} %, {left // 60}:{left % 60:02} left ",
                end="\n" if done == calls else "",
                file=sys.stderr,
                flush=True,
            )
        return v_hat

    counted_net.num_classes, counted_net.max_guidance = (
        getattr(net, "num_classes", None),
        getattr(net, "max_guidance", None),
    )
    return counted_net


def pixels(res):
    """(height, width) of 256, "384x640" or a pair. Raises ValueError."""
    try:
        height, width = (
            (res, res)
            if isinstance(res, int)
            else map(int, res.split("x") if isinstance(res, str) else res)
        )
        if min(height, width) > 0:
            return height, width
    except (ValueError, TypeError):
        pass
    raise ValueError(f"--res {res} is neither a side in pixels nor HEIGHTxWIDTH")


def drawn_size(config):
    """(C, H, W) of what a run draws, and whether it is latents: runs on latents name their channels, those on pictures do not."""
    channels = config["model_args"].get("in_channels")
    return (channels or 3, *pixels(config["res"])), channels is not None


def mix_seed(*integers):
    """One well mixed 32-bit seed (a CPU generator uses no more) for a tuple of integers >= 0."""
    return int(
        np.random.SeedSequence((*integers, 1)).generate_state(1)[0]
    )  # ends in 1, as numpy ignores zeros at the end


# ---------------------------------------------------------------- nets and checkpoints


def imported(name, otherwise):
    """What package.module:Name stands for. Raises ValueError, saying `otherwise`, if nothing."""
    module, _, name = name.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{otherwise} ({error})") from error


def net_class(model):
    """The class that --model names: "uvit", "unet", or package.module:Class. Raises ValueError for a name that leads to none."""
    return {"uvit": UViT, "unet": UNet}.get(model) or imported(
        model, f"--model {model} is neither uvit, unet nor package.module:Class"
    )


def build_net(model, model_args, device=None):
    """The net of the class that --model names (see net_class), called with model_args.

    On a GPU its weights are in channels_last, as cuDNN likes them; on a CPU norms and small convolutions are slower so.
    Raises ValueError for a name that leads to none, or arguments that the class does not take.
    """
    gpu = device is not None and torch.device(device).type == "cuda"
    try:
        return net_class(model)(**model_args).to(
            device, memory_format=torch.channels_last if gpu else torch.preserve_format
        )
    except ValueError:
        raise  # what our nets say is clear
    except Exception as error:
        raise ValueError(f"--model {model} does not take {model_args}: {error}") from error


def compiles(device):
    """Whether torch.compile works here, for which it takes a C++ compiler, on a GPU Triton and a C compiler; if not, why, on stderr."""
    try:
        torch.compile(torch.sin)(
            torch.zeros(1 + time.time_ns() % 99_991, device=device)
        )  # a size that is not in its cache
        return True
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"--compile does not work here, going on without: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
                file=sys.stderr,
            )
        return False


def join_ranks(name=None):
    """Connects the processes that torchrun started. Returns (rank, world, device), without torchrun (0, 1, device).

    name: of the device, by default a GPU if there is one; under torchrun each rank takes the GPU of its local rank. Tensors travel
    between CPUs over gloo and between GPUs over NCCL. Raises ValueError where there is no such device.
    """
    rank, local_rank, world = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{local_rank}" if world > 1 and name.startswith("cuda") else name
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = (
            True  # all batches have one shape: the fastest convolution is worth looking for
        )
    if world > 1:
        store, count, timeout = (
            None,
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            datetime.timedelta(minutes=30),
        )  # to wait for a checkpoint
        if count != "0" and (
            os.environ["TORCHELASTIC_USE_AGENT_STORE"],
            os.environ["GROUP_WORLD_SIZE"],
        ) == ("True", "1"):
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timeout,
            )
            store = dist.PrefixStore(
                count, store
            )  # without, the new ranks would read in torchrun's store where the dead ones were
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    return rank, world, device


def leave_ranks():
    """Ends what join_ranks began, if anything."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(
            0.2
        )  # gloo's threads drop their last tensors, for which they need Python: after its end they would abort


@contextlib.contextmanager
def writing(path):
    """A binary file to write into, that takes the place of path when it is whole; an error leaves what was there before.

    Raises OSError, naming the path, when something cannot be written.
    """
    try:
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:
        while not isinstance(
            error, OSError
        ):  # torch.save turns that of its file into a RuntimeError
            if error is None:
                raise
            error = error.__context__
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.part")


def checkpoints(run):
    """The checkpoints ckpt_STEP.pt in a run's folder, the newest last; of copies with other names it knows nothing."""
    steps = sorted(
        int(name[5:-3])
        for name in os.listdir(run)
        if name.startswith("ckpt_") and name.endswith(".pt") and name[5:-3].isdecimal()
    )
    return [os.path.join(run, f"ckpt_{step:07d}.pt") for step in steps]


def load_checkpoint(path, check=False):
    """The dict that train.py saved, its tensors mapped from the file: config, step, images, net, ema, optimizer.

    path: a checkpoint, or a run's folder, whose newest checkpoint is taken; a broken one is named on stderr and passed over.
    check: also compare all checksums, for which the whole file is read. Runs no code from the file. Raises ValueError.
    """
    if os.path.isdir(path):
        files = checkpoints(path)
        if not files:
            raise ValueError(f"{path}: no checkpoint there")
        for file in files[:0:-1]:
            try:
                return load_checkpoint(file, check)
            except ValueError as error:
                if os.environ.get("RANK", "0") == "0":
                    print(f"{error}; taking the one before it", file=sys.stderr)
        return load_checkpoint(files[0], check)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such run or checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            broken = check and archive.testzip()
        if broken:
            raise ValueError("checksum")
    except Exception as error:  # whatever a file that is no checkpoint makes of the reader
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from error
    fits = lambda values, kinds: (
        isinstance(values, dict)
        and all(type(values.get(key)) is kind for key, kind in kinds.items())
    )
    whole = fits(
        state, dict(config=dict, step=int, images=int, net=dict, ema=dict, optimizer=dict)
    ) and fits(
        config := state["config"],
        dict(model=str, model_args=dict, classes=list, schedule=str, bf16=bool),
    )
    try:
        whole = (
            whole
            and config["model_args"].get("num_classes") == len(config["classes"])
            and pixels(config.get("res")) == pixels(config["model_args"].get("res"))
        )
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{path} is a file of another kind, not a checkpoint of train.py")
    own = state["config"].setdefault(
        "sampling", {}
    )  # of runs that say how they are to be sampled; older ones do not
    if (
        not isinstance(own, dict)
        or not fits(
            own, {key: dict(steps=int, sampler=str, guidance_interval=list).get(key) for key in own}
        )
        or (
            [type(end) for end in own.get("guidance_interval", [0.0, 0.0])] != [float, float]
            or own.get("steps", 1) < 1
        )
    ):
        raise ValueError(f"{path}: the settings for sampling are not those of a run")
    return state


def check_model(path, config, model):
    """Raises ValueError if a checkpoint's config names a class that --model did not, so that a stranger's imports nothing."""
    if (
        model is None
        and config["model"] not in ("uvit", "unet")
        and not config["model"].startswith("related.")
    ):
        raise ValueError(
            f"{path} was trained with --model {config['model']}: repeat that option to import it"
        )
    if model is not None and model != config["model"]:
        raise ValueError(f"{path} was trained with --model {config['model']}, not {model}")


def load(path, device="cpu", model=None):
    """A trained net for sampling: (net with the averaged weights, in eval mode; its config; its schedule).

    path: a run's folder (its newest checkpoint) or a checkpoint. model: package.module:Class, to be repeated for a net that
    is neither uvit, unet nor of related/. Raises ValueError.
    """
    state = load_checkpoint(path)
    config = state["config"]
    check_model(path, config, model)
    net = build_net(config["model"], config["model_args"], device)
    load_weights(path, net, state["ema"])
    return (
        net.eval().requires_grad_(False),
        config,
        make_schedule(config["schedule"], min(pixels(config["res"]))),
    )


def load_weights(path, net, weights):
    """Copies weights from the checkpoint path into the net. Raises ValueError where they are not those of such a net."""
    try:
        net.load_state_dict(weights)
    except Exception as error:  # strangers' dicts hold anything
        raise ValueError(
            f"{path} does not fit its own net: {(str(error).splitlines() or [type(error).__name__])[-1].strip()}"
        ) from error


def make_grid(pictures, columns, gap=2, texts=None):
    """Pictures (N, H, W, 3) uint8 as one PIL image, row by row, `columns` in a row, on white; gap: pixels between them.

    texts: to be written below them; small pictures are then shown enlarged.
    """
    n, height, width, _ = pictures.shape
    lines, scale = (4, -(-128 // width)) if texts else (0, 1)
    height, width = height * scale, width * scale
    grid = Image.new(
        "RGB",
        (columns * (width + gap) - gap, -(-n // columns) * (height + 12 * lines + gap) - gap),
        "white",
    )
    for i, picture in enumerate(pictures):
        left, top = i % columns * (width + gap), i // columns * (height + 12 * lines + gap)
        grid.paste(
            Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        if texts:
            text = "\n".join(textwrap.wrap(texts[i], width // 6)[:lines])
            ImageDraw.Draw(grid).multiline_text(
                (left + 1, top + height),
                text.encode("latin-1", "replace").decode("latin-1"),
                "black",
                spacing=1,
            )
    return grid


# ---------------------------------------------------------------- the command


def parse_labels(text, classes, n):
    """Labels (n,) cycling through those that text names, by number or class, comma-separated; through all without text."""
    numbers = []
    for word in (
        [word.strip() for word in text.split(",")] if text else map(str, range(len(classes)))
    ):
        if word in classes:
            numbers.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            numbers.append(int(word))
        else:
            raise ValueError(
                f"--label {word!r} is none of the {len(classes)} classes 0 to {len(classes) - 1}: {', '.join(classes[:20])}"
            )
    return torch.tensor(numbers or [0]).repeat(n)[:n]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Sample from a run or a checkpoint of train.py.", allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"sample.py: {message}")
    parser.add_argument("checkpoint", help="a run's folder, or a checkpoint")
    parser.add_argument(
        "--n",
        "--number",
        type=int,
        help="number of pictures (default 64, or one for each prompt); under torchrun only --number, as it claims --n",
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="pictures at a time (default 64); changes no picture"
    )
    parser.add_argument("--steps", type=int, help="default: the run's, or 256")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the run's, or ddpm")
    parser.add_argument(
        "--grid",
        choices=["t", "logsnr"],
        help="steps uniform in t (default) or in logsnr (default of dpmpp)",
    )
    parser.add_argument(
        "--interpolation", type=float, default=0.2, help="of the DDPM log-variance (default 0.2)"
    )
    parser.add_argument(
        "--clip",
        choices=["static", "dynamic"],
        help="of x_hat in each step (default: static, and none of latents)",
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="guidance scale 1 + eta (default 1: off)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide only between these logsnr (default: the run's, or all; -99 99 is all)",
    )
    parser.add_argument(
        "--label",
        help="classes to cycle through, by name or number: 3 or star,heart (default: all)",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="texts to cycle through, for a run with --captions",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="the same from a file, one a line, or from an .npy with their embeddings",
    )
    parser.add_argument(
        "--negative", metavar="TEXT", help="what guidance leads away from (default: the empty text)"
    )
    parser.add_argument(
        "--text-encoder", metavar="NAME", help="the T5 of the training, to be repeated"
    )
    parser.add_argument(
        "--portrait", action="store_true", help="of a net for landscape pictures: upright ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", help="package.module:Class, only for a net that is neither uvit nor unet"
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 in the net (default: as in training)",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)"
    )
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--out", default="grid.png", help="grid.png, folder/ or samples.npz (default grid.png)"
    )
    args = parser.parse_args(argv)
    if (
        not all(
            1 <= number <= 10**9
            for number in (
                64 if args.n is None else args.n,
                args.batch,
                1 if args.steps is None else args.steps,
            )
        )
        or args.seed < 0
    ):
        raise ValueError("--n, --batch and --steps go from 1 to 1,000,000,000, --seed from 0")
    if not (math.isfinite(args.guidance) and math.isfinite(args.interpolation)):
        raise ValueError("--guidance and --interpolation take finite numbers")
    if not args.out.endswith((".png", ".npz", "/")):
        raise ValueError(f"--out {args.out} is none of grid.png, folder/ and samples.npz")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.out.endswith("/") and os.listdir(args.out):
        raise ValueError(
            f"--out {args.out} is not empty: its pictures would be counted with the new ones"
        )

    rank, world, device = join_ranks(args.device)
    net, config, schedule = load(args.checkpoint, device, args.model)
    classes, (size, latents) = config["classes"], drawn_size(config)
    if latents and not args.out.endswith(".npz"):
        raise ValueError(f"{args.checkpoint} draws latents, no pictures: --out samples.npz")
    if latents and args.clip:
        raise ValueError(
            f"{args.checkpoint} draws latents, which have no limits: it takes no --clip"
        )
    prompts, negative, captioned = None, None, config["model_args"].get("text_tokens", 0) > 0
    of_texts = [
        f"--{name.replace('_', '-')}"
        for name in ("prompt", "prompts", "negative", "text_encoder", "portrait")
        if getattr(args, name)
    ]
    if captioned and (args.label or not (args.prompt or args.prompts)):
        raise ValueError(
            f"{args.checkpoint} was trained on texts: it needs --prompt or --prompts, and no --label"
        )
    if not captioned and of_texts:
        raise ValueError(f"{args.checkpoint} was trained without texts: it takes no {of_texts[0]}")
    if not captioned and not classes and (args.label or args.guidance != 1.0):
        raise ValueError(
            f"{args.checkpoint} was trained without labels: it takes neither --label nor --guidance"
        )
    if captioned:
        prompts, label, negative = read_prompts(args, config, device)
        args.n = len(label)
    else:
        args.n = args.n or 64
        label = parse_labels(args.label, classes, args.n)
    own = config["sampling"]  # a student's steps, for example
    steps, sampler, interval = (
        args.steps or own.get("steps", 256),
        args.sampler or own.get("sampler", "ddpm"),
        args.guidance_interval or own.get("guidance_interval"),
    )
    if rank == 0 and (steps, sampler) != (own.get("steps", steps), own.get("sampler", sampler)):
        print(
            f"note: {args.checkpoint} is made for --steps {own.get('steps', steps)} --sampler {own.get('sampler', sampler)}",
            file=sys.stderr,
        )
    if interval and not interval[0] < interval[1]:
        raise ValueError("--guidance-interval LO HI needs LO < HI")
    if (device.type == "cuda" if args.compile is None else args.compile) and compiles(device):
        net = torch.compile(net, dynamic=False)
    net = in_bf16(net, config["bf16"] if args.bf16 is None else args.bf16)
    if rank == 0:
        print(
            f"{args.checkpoint}: {config['model']}, {config['res']} px, {config['schedule']}; {sampler}, {steps} steps, guidance {args.guidance:g}"
            + (
                " for logsnr in [{:g}, {:g}]".format(*interval)
                if interval and args.guidance != 1
                else ""
            )
        )
        net = with_progress(net, steps * -(-args.n // (world * args.batch)))

    folder = args.out.endswith("/")
    height, width = size[:0:-1] if args.portrait else size[1:]
    pictures = (
        np.empty((args.n, height, width, size[0]), np.float32 if latents else np.uint8)
        if rank == 0 and not folder
        else None
    )
    for first, x in sample_shared(
        net,
        size,
        schedule,
        label,
        args.batch,
        device=device,
        gather=not folder,
        latents=latents,
        steps=steps,
        sampler=sampler,
        grid=args.grid,
        guidance=args.guidance,
        guidance_interval=interval,
        negative=negative,
        interpolation=args.interpolation,
        clip=args.clip or (None if latents else "static"),
        seed=args.seed,
    ):
        x = x.rot90(-1, (1, 2)) if args.portrait else x  # as training has turned them to the left
        if folder:
            for i, picture in enumerate(x.numpy(), first):
                with writing(f"{args.out}{i:06d}.png") as file:
                    Image.fromarray(picture).save(file, "PNG")
        elif rank == 0:
            pictures[first : first + len(x)] = x.numpy()
    if world > 1:
        dist.barrier()
    if rank == 0:
        if not folder:
            arrays = (
                dict(prompts=np.array(prompts))
                if prompts
                else {}
                if captioned
                else dict(y=label.numpy())
            )
            if latents:
                arrays = dict(z=pictures.transpose(0, 3, 1, 2)) | (
                    arrays | dict(classes=classes) if classes else {}
                )
            with writing(args.out) as file:
                if args.out.endswith(".npz"):
                    np.savez(file, **(arrays if latents else dict(arr_0=pictures) | arrays))
                else:
                    columns = (
                        len(classes)
                        if 2 <= len(classes) <= 16 and not args.label
                        else max(1, round(args.n**0.5))
                    )
                    make_grid(pictures, columns, texts=prompts).save(file, "PNG")
        print(f"wrote {args.n} {'latents' if latents else 'pictures'} to {args.out}")
    leave_ranks()


def run_command(main):
    """Calls main, and turns errors that the user can fix into one line and a non-zero exit; python -X dev shows the trace."""
    rank, name = os.environ.get("RANK", "0"), os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what is no text
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of head, for example
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where Python writes what is left
        sys.exit(128 + 13)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[
            -1
        ]  # a worker's message ends a trace
        if isinstance(error, RuntimeError) and "gloo" in message:
            message = f"another rank has stopped, or cannot be reached ({message})"
        elif (
            sys.flags.dev_mode
            or isinstance(error, RuntimeError)
            and not any(
                text in message
                for text in ("DataLoader worker", "out of memory", "allocate memory")
            )
        ):
            raise
        sys.exit(f"{name}: {message}" if rank == "0" else f"{name}, rank {rank}: {message}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
