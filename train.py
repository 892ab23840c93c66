"""Training simple diffusion (Sec. 2 and appendix): train() and training_step() are the algorithm.

    python train.py                                       # built-in Shapes at 32 px, on a laptop
    python train.py --data cifar10.npz --res 32           # your images: folders, .zip, .npz, .npy
    python train.py --init runs/a --data b/ --out runs/b  # start from the weights of another run
    torchrun --nproc-per-node 8 train.py --data imagenet/train --res 256 --size base

All settings are printed first. Ctrl-C and SIGTERM save a checkpoint and exit. The same command, or
just python train.py --out runs/NAME, resumes from the newest checkpoint, exactly where it stopped
(repeat --model, --loss, --data, --val and --fid-features if they name code of your own).

The file has four parts: the training loop; what it logs, draws and saves; the preparation of a
run; and the command. The options are the table in support/settings.py.
"""

import signal

if __name__ == "__main__":
    # The imports take seconds. Until they are done, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import contextlib
import copy
import dataclasses
import functools
import json
import os
import shlex
import sys
import time
import typing

import numpy as np
import torch
import torch.distributed as dist

import fid
from loss import diffusion_loss
from sample import can_guide, make_grid, mix_seed, sample_batches, to_float
from schedule import make_schedule
from support.bench import Stopwatch, cpu_seconds_per_image
from support.checkpoint import (
    build_net,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    sample_size,
    save_checkpoint,
)
from support.data import (
    ExternalDataset,
    ImageData,
    collate,
    decoding_workers,
    example_noise,
    image_order,
    is_dataset_class,
    open_dataset,
    pack,
)
from support.finetune import initialize, load_source
from support.heldout import HeldOut, log_held_out, open_held_out, split_checksum
from support.recipes import RECIPES, TRAINING, derived_from
from support.runtime import (
    LossLog,
    append_line,
    can_compile,
    catch_signals,
    check_shared_memory,
    duration,
    end_workers,
    full_tensor,
    gather_full,
    ignore_signals,
    import_object,
    in_bf16,
    join_ranks,
    leave_ranks,
    open_log,
    run_command,
    shard,
    shard_like,
    writing,
)
from support.settings import (
    DEFAULTS,
    absolute_paths,
    check_val,
    continue_config,
    default_folder,
    inherit,
    make_config,
    parse,
    share_of,
)
from support.text import check_text_options, open_captioned_dataset

# ---------------------------------------------------------------- the training loop


def learning_rate(step, lr, warmup, decay, steps):
    """Warmup, here linear, then constant, as in the paper. step counts from 0.

    Over the last fraction `decay` of the steps it falls linearly to 0: ours, for short runs.
    """
    warmup_factor = (step + 1) / max(1, warmup)
    decay_factor = (steps - step) / max(1.0, decay * steps)
    return lr * min(1.0, warmup_factor, decay_factor)


@torch.no_grad()
def ema_update(ema_net, net, decay):
    """ema = decay * ema + (1 - decay) * net for every weight; buffers are copied."""
    # lerp(ema, net, 1 - decay) = decay * ema + (1 - decay) * net. All weights in a few kernels: a
    # loop over hundreds of tensors would start one for each.
    torch._foreach_lerp_(list(ema_net.parameters()), list(net.parameters()), 1 - decay)
    for average, buffer in zip(ema_net.buffers(), net.buffers()):
        average.copy_(buffer)


def ema_decay(step, decay):
    """The decay at a step. It is smaller at first, to forget the initial network (ours)."""
    return min(decay, (step + 1) / (step + 10))


def drop_labels(labels, u, config):
    """Replace labels by the null label with probability label_drop.

    Guidance needs an unconditional model: it is the same network, trained on dropped labels.
    labels: (B,), or text tokens (B, ...). u: (B,), uniform in [0, 1). Returns labels like labels.
    """
    # The null label is the number after the last class. Texts have no classes, so theirs is 0:
    # the padding token, that is, the empty text.
    null_labels = torch.full_like(labels, len(config["classes"]))
    if config["model_args"].get("portrait"):
        # The last token says whether the image was rotated. It is not part of the text.
        null_labels[:, -1:] = labels[:, -1:]
    # Each label is dropped independently of the others.
    dropped = (u < config["label_drop"]).reshape(-1, *[1] * (labels.ndim - 1))
    return torch.where(dropped, null_labels, labels)


def training_step(
    model,
    images,
    labels,
    positions,
    *,
    loss_fn,
    schedule,
    seed,
    step,
    dropout_seed=(),
    flip=False,
    condition=None,
    micro_batches=1,
):
    """Run forward and backward on one micro-batch; gradients accumulate in the parameters.

    model: v_hat = model(z, logsnr, label). images: (B, C, H, W) uint8, or float latents. labels:
    (B,), or text (B, ...). positions: where the B examples are in the global batch. condition: maps
    (labels, u), with u uniform in [0, 1), to the label input of the network. micro_batches: number
    per step.
    Returns the loss and the logsnr of each example, (B,) and (B,).
    """
    # Except for dropout, the randomness of an example depends on (seed, step, position) alone. A
    # run is therefore the same on any number of ranks, for any number of micro-batches, and after a
    # restart. One draw gives three uniform numbers: for the label, the flip and the time t.
    u, eps = example_noise(seed, step, positions, images.shape[1:], images.device)
    u_label, u_flip, t = u.unbind(1)  # (B,) each: uniform, and t the time in [0, 1)
    # Only dropout draws from the global generator: its masks depend on the rank, too.
    torch.manual_seed(mix_seed(seed, step, *dropout_seed))

    # Scale 8-bit images to [-1, 1]; latents are unchanged. With flip, mirror half of the images.
    x = to_float(images)
    if flip:
        x = torch.where(u_flip[:, None, None, None] < 0.5, x.flip(3), x)

    # In train(), condition is drop_labels: guidance needs examples without a label.
    if condition:
        labels = condition(labels, u_label)

    # Sec. 2: z_t = alpha_t x + sigma_t eps. Each example has its own t, uniform in [0, 1]. The
    # network predicts v from z_t and logsnr_t. The default loss is the mean squared error in eps
    # or v space, optionally multiscale.
    loss, logsnr = loss_fn(model, x, schedule, labels, t=t, eps=eps)
    # The gradient of the global batch is the mean over its micro-batches. DDP and FSDP then average
    # it over the ranks.
    (loss.mean() / micro_batches).backward()
    return loss.detach(), logsnr


def train(run, batches, finished=()):
    """Train until config["steps"] or a signal. Returns the signal that stopped it, or 0.

    batches: endless iterator over (images, labels), this rank's micro-batches. finished:
    (has_grid, has_val, has_fid) of the step to resume from, see open_run_log.
    """
    config, net = run.config, run.net
    # bfloat16 only inside of the network; the process, the loss and the optimizer use float32.
    call = in_bf16(run.model, config["bf16"])
    micro_batches = run.micro_batches
    compute_gradients = functools.partial(
        training_step,
        call,
        loss_fn=run.loss_fn,
        schedule=run.schedule,
        seed=config["seed"],
        flip=config["flip"],
        condition=functools.partial(drop_labels, config=config),
        micro_batches=len(micro_batches),
    )
    losses = LossLog(run.device)
    tick = run.stopwatch.tick if run.stopwatch else lambda part: None

    # The run may have been interrupted before it had drawn its last grid or measured its last FID.
    stop = observe(run, *finished)
    run.start = run.window = (time.time(), run.step)
    run.elsewhere = 0.0

    while run.step < config["steps"] and not stop:
        # Linear warmup, then constant; the short recipes decay to zero at the end (ours).
        lr = learning_rate(
            run.step, config["lr"], config["warmup"], config["decay"], config["steps"]
        )
        for group in run.optimizer.param_groups:
            group["lr"] = lr

        # One global batch, split over ranks and micro-batches. Gradients add up. DDP exchanges them
        # only after the last micro-batch; FSDP reduces them after each one.
        for i, positions in enumerate(micro_batches):
            images, labels = (part.to(run.device, non_blocking=True) for part in next(batches))
            tick("data")
            if run.ddp:
                run.model.require_backward_grad_sync = i == len(micro_batches) - 1
            loss, logsnr = compute_gradients(
                images, labels, positions, step=run.step, dropout_seed=(run.rank, i)
            )
            tick("forward+backward")
            # These sums stay on the device. Reading them would make every step wait for it.
            losses.add(run.step, loss, logsnr)

        # The paper clips the global gradient norm at 1. grad_norm is the norm before clipping.
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        # The first step after a restart continues with the moments of the checkpoint.
        if run.moments:
            load_moments(run)
        # Adam without weight decay.
        run.optimizer.step()
        # The gradients of DDP are views of the buffers that it exchanges. They are kept: if they
        # were set to None, the next ones would take memory beside these buffers.
        run.optimizer.zero_grad(set_to_none=not run.ddp)

        # Samples are drawn from an exponential moving average of the weights (paper: 0.9999).
        ema_update(run.ema_net, net, ema_decay(run.step, config["ema"]))
        losses.add_grad_norm(run.step, grad_norm)
        run.step += 1
        run.images += config["batch"]
        tick("optimizer+EMA")

        # From here on the run is only observed: nothing below changes a weight. --bench measures
        # the steps alone.
        if run.stopwatch:
            continue

        # Signals are exchanged once per step, so that all ranks stop at the same step.
        stop = stop_signal(run)
        # The last step and a signal always save. What is saved is logged, too.
        saving = stop or is_due(run, "save_every")
        line = None
        if saving or is_due(run, "log_every"):
            # Never replace a good checkpoint by weights with NaN or infinity.
            losses.check_finite(run.step, net, run.folder, run.saved_step)
            line = log_losses(run, losses, lr, grad_norm)
        if saving:
            save(run)
        print_progress(run, line)  # after saving: printing to a closed terminal may fail

        # Sample grids and FIDs take a while, and a signal may interrupt them.
        stop = stop or observe(run)
        # If a signal came meanwhile, this step may not be saved yet.
        if stop and run.saved_step != run.step:
            losses.check_finite(run.step, net, run.folder, run.saved_step)
            save(run)
    return stop


# ---------------------------------------------------------------- what the loop observes


def is_due(run, name):
    """True at multiples of a setting such as save_every, and at the last step."""
    every = run.config[name]
    last = run.step >= run.config["steps"]
    return bool(every) and run.step > 0 and (last or run.step % every == 0)


def stop_signal(run):
    """The signal that asked any rank to stop, or 0."""
    # The tensor is on the CPU: no step waits for a GPU.
    number = torch.tensor(max(run.signals, default=0))
    if run.world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def log_losses(run, losses, lr, grad_norm):
    """Write a line to the log: the mean losses since the last one. Returns it as a dict."""
    # losses.read() exchanges the sums of all ranks: in total, and by noise level.
    line = dict(step=run.step, images=run.images, **losses.read())
    line |= dict(lr=lr, grad_norm=float(full_tensor(grad_norm)))

    # The throughput of training since the last line, without the time spent elsewhere: the first
    # step, checkpoints, grids and FIDs. elsewhere is the share of that time.
    now = time.time()
    line["img_per_s"] = images_per_second(run, now)
    line["elsewhere"] = run.elsewhere / (now - run.window[0])
    line["seconds"] = now - run.start[0]

    # --skip-bad: how many images were skipped by any process of any rank.
    unreadable = run.dataset.unreadable
    if run.config["skip_bad"] and unreadable is not None:
        if run.world > 1:
            # Exchange a copy: decoding processes may write to the original at the same time.
            bad = unreadable.clone()
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            unreadable[bad > 0] = 1
        line["skipped"] = unreadable.sum().item()
    run.write(line)
    losses.reset()
    run.window, run.elsewhere = (now, run.step), 0.0
    return line


def images_per_second(run, now):
    """The throughput of training since the last line of the log."""
    then, step = run.window
    return (run.step - step) * run.config["batch"] / (now - then - run.elsewhere)


def print_progress(run, line):
    """Print the time left and the throughput, and the loss if the log has a new line.

    Called after each step. line: what log_losses() returned, or None. Without a line it prints by
    time, so that a slow run is not silent: after 5 seconds, then if nothing was printed for 30.
    This needs no other rank.
    """
    now = time.time()
    start_time, start_step = run.start
    first = run.step == start_step + 1
    if first and line is None:
        # The first step compiles and allocates memory. The throughput leaves it out.
        run.window = (start_time, run.step)
        run.elsewhere = now - start_time

    silent = now - (run.printed or start_time)
    if run.rank != 0 or (line is None and silent < (30 if run.printed else 5)):
        return
    run.printed = now

    # The time left follows from the mean time per step of this process, grids and FIDs included.
    seconds_per_step = (now - start_time) / (run.step - start_step)
    left = (run.config["steps"] - run.step) * seconds_per_step
    parts = [f"step {run.step}/{run.config['steps']}"]
    if line:
        parts += [f"loss {line['loss']:.4f}", f"{line['img_per_s']:.0f} img/s"]
    elif not first:
        parts += [f"{images_per_second(run, now):.0f} img/s"]
    parts += [f"{duration(left)} left"]
    if line and line["elsewhere"] >= 0.05:
        parts += [f"{100 * line['elsewhere']:.0f} % of the time elsewhere"]
    if line and line.get("skipped"):
        parts += [f"{line['skipped']} images skipped"]
    print("  ".join(parts), flush=True)


def save(run):
    """Save a checkpoint. All ranks call it, because sharded weights are gathered; rank 0 writes."""
    begin = time.time()
    # This is all that the next step depends on. No state of a random generator is needed: the
    # randomness of a step follows from the seed and the step.
    state = dict(config=run.config, step=run.step, images=run.images)
    state |= dict(net=run.net.state_dict(), ema=run.ema_net.state_dict())
    state["optimizer"] = run.optimizer.state_dict()
    state = gather_full(state)  # on rank 0
    if run.rank == 0:
        save_checkpoint(run.folder, run.config["keep"], state)
    run.saved_step = run.step
    run.elsewhere += time.time() - begin  # does not count for the throughput


def observe(run, has_grid=False, has_val=False, has_fid=False):
    """Draw a sample grid, and measure the held-out loss and the FID, if they are due.

    has_grid, has_val, has_fid: whether this step already has them. Returns a signal that
    interrupts, or 0.
    """
    if run.stopwatch:
        return 0
    stop, begin = 0, time.time()
    # Latents are not images: there is no grid to look at.
    _, latents = sample_size(run.config)
    if is_due(run, "sample_every") and not has_grid and not latents:
        stop = save_sample_grid(run)
    if run.held_out and is_due(run, "val_every") and not has_val and not stop:
        stop = log_held_out(run, functools.partial(stop_signal, run))
    if is_due(run, "fid_every") and not has_fid and not stop:
        stop = log_fid(run)
    run.elsewhere += time.time() - begin  # does not count for the throughput
    return stop


def save_sample_grid(run):
    """Draw samples_STEP.png from the EMA weights, guided if possible. Returns as observe does."""
    config, dataset = run.config, run.dataset
    # Six rows. Each column shows one class; without classes, columns have no meaning.
    columns = min(len(dataset.classes), 10) or 8
    captioned = config["captions"] is not None
    if dataset.classes:
        labels = torch.arange(6 * columns) % columns
    else:
        labels = dataset.sample_labels(6 * columns)
    # Without dropped labels, the network has not learned the unconditional half of guidance.
    guidance = 2.0 if can_guide(config) else 1.0

    # DPM-Solver++ in 64 steps: fast, and close to the paper's sampler. All ranks share the work. A
    # short recipe may take fewer steps for all grids but the last.
    last = run.step >= config["steps"]
    steps = 64 if last else config["sampling"].get("early_steps", 64)
    rounds = sample_batches(
        in_bf16(run.ema_net, config["bf16"]),
        sample_size(config)[0],
        run.schedule,
        labels,
        16,
        device=run.device,
        steps=steps,
        sampler="dpmpp",
        guidance=guidance,
        null_label=len(dataset.classes),
        guidance_interval=config["sampling"].get("guidance_interval"),
    )
    parts = []
    for _, images in rounds:
        parts.append(images)
        # A signal does not wait for the whole grid.
        if stop := stop_signal(run):
            return stop
    if run.rank == 0:
        path = f"{run.folder}/samples_{run.step:07d}.png"
        texts = dataset.captions(range(6 * columns)) if captioned else None
        grid = make_grid(torch.cat(parts).numpy(), columns, texts=texts)
        with writing(path) as file:
            grid.save(file, "PNG")
        names = ", ".join(dataset.classes[:columns]) or ("captions" if texts else "no classes")
        print(
            f"wrote {path} (open it in an image viewer): guidance {guidance:g}, columns: {names}",
            flush=True,
        )
        if run.tensorboard:
            run.tensorboard.add_image("samples", np.asarray(grid), run.step, dataformats="HWC")
    return 0


def log_fid(run):
    """Log the FID of the EMA weights against --fid-ref. Returns as observe does."""
    config = run.config
    statistics = fid.Statistics()
    # Samples without guidance, evenly over all classes.
    rounds = sample_batches(
        in_bf16(run.ema_net, config["bf16"]),
        sample_size(config)[0],
        run.schedule,
        run.dataset.sample_labels(config["fid_images"]),
        run.micro_batch,
        device=run.device,
        gather=False,  # each rank measures its own samples
        steps=64,
        sampler="dpmpp",
    )
    stop = 0
    for _, images in rounds:
        if len(images):
            x = images.permute(0, 3, 1, 2).to(fid_device(run.device))
            features, logits, spatial = fid.extract(run.features, x, spatial=True)
            statistics.update(features, logits, spatial=spatial)
        if stop := stop_signal(run):
            break
    # Every rank measured its own samples. Their sums give one Gaussian.
    statistics.all_reduce()
    if not stop and run.rank == 0:
        reference = run.reference
        name = fid.distance_name(reference["features"])
        distance, spatial = fid.distances(reference, statistics.summary())
        # sFID needs a reference with spatial features.
        results = {name: distance} if spatial is None else {name: distance, f"s{name}": spatial}
        line = {"step": run.step, "images": run.images} | results
        run.write(line | dict(fid_images=config["fid_images"]))
        values = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
        print(f"step {run.step}/{config['steps']}  {values} of {fid_samples(run)}", flush=True)
    return stop


def fid_samples(run):
    """Describe the samples that log_fid measures, and the reference."""
    n, classes = run.config["fid_images"], len(run.dataset.classes)
    if run.config["captions"] is not None:
        labels = "captions in the order of the dataset"
    else:
        labels = f"class = number mod {classes}" if classes else "no classes"
    return (
        f"{n} samples (numbers 0 to {n - 1} of seed 0, {labels}; 64 steps without guidance) "
        f"against {run.config['fid_ref']} (N = {run.reference['n'] or 'unknown'})"
    )


# ---------------------------------------------------------------- preparing a run


@dataclasses.dataclass
class Run:
    """A training run: what the loop reads, and what it changes."""

    config: dict
    folder: str
    rank: int
    world: int
    device: torch.device
    dataset: object
    schedule: typing.Callable = None
    loss_fn: typing.Callable = None
    net: torch.nn.Module = None  # the raw network, which is saved
    model: torch.nn.Module = None  # the same weights, compiled and wrapped for the ranks
    ema_net: torch.nn.Module = None  # the averaged weights, which are sampled
    optimizer: torch.optim.Optimizer = None
    moments: dict = None  # the optimizer's state in the checkpoint, until the first step
    step: int = 0
    images: int = 0
    saved_step: int = 0  # the step of the newest checkpoint
    log: object = None  # log.jsonl, on rank 0
    tensorboard: object = None  # its writer, on rank 0
    reference: dict = None  # of --fid-ref
    features: torch.nn.Module = None  # the network behind the FID
    held_out: HeldOut = None  # the images of --val
    stopwatch: Stopwatch = None  # of --bench
    signals: list = ()  # received SIGINT, SIGTERM and SIGHUP
    start: tuple = None  # (time, step) when this process began to train
    window: tuple = None  # (time, step) of the last line of the log
    elsewhere: float = 0.0  # seconds since then that were not spent on training
    printed: float = None  # time of the last line of progress

    @property
    def sharded(self):
        """Whether every rank holds only its part of the weights."""
        return self.config["fsdp"] and self.world > 1

    @property
    def ddp(self):
        """Whether every rank holds all weights, and DDP averages the gradients."""
        return self.world > 1 and not self.sharded

    @property
    def micro_batch(self):
        """Number of images per rank and micro-batch."""
        share = self.config["batch"] // self.world
        return max(1, min(self.config["micro"] or share, share))

    @property
    def micro_batches(self):
        """The positions of this rank's micro-batches in the global batch, one range for each."""
        size, count = self.micro_batch, self.config["batch"] // (self.world * self.micro_batch)
        starts = [(i * self.world + self.rank) * size for i in range(count)]
        return [range(start, start + size) for start in starts]

    def write(self, line):
        """Append a line to the log and show all its numbers in TensorBoard, both on rank 0."""
        if self.rank != 0:
            return
        append_line(self.log, line)
        if not self.tensorboard:
            return
        for key, value in line.items():
            # A loss by noise level is a dict of numbers.
            is_table = isinstance(value, dict)
            numbers = {f"{key}/{k}": v for k, v in value.items()} if is_table else {key: value}
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, self.step)


def prepare(given):
    """Everything before the first step: settings, data, networks, optimizer, and the log.

    given: the options, see parse. Returns (run, finished): a Run at the step to resume from, and
    the result of open_run_log. Raises ValueError.
    """
    # The ranks and their devices. --device, --bench, --fid-features and --workers concern this
    # process only and are not stored.
    rank, world, device = join_ranks(given.pop("device", None))
    set_float32_precision(device)
    bench = given.pop("bench", False)
    fid_features = given.pop("fid_features", None)

    # The folder, and in it the checkpoint to resume from.
    absolute_paths(given)
    own_folder = default_folder(given)
    folder = given.pop("out", own_folder)
    given.pop("workers", None)
    if bench:
        given["steps"] = Stopwatch.steps
    files = list_checkpoints(folder) if os.path.isdir(folder) and not bench else []
    resumed = load_resumed(folder, files)
    # Or the run that a new one starts from. A resumed run no longer needs it.
    source = None
    if "init" in given and not resumed:
        source = load_source(given["init"], given.get("init_weights", "ema"), given.get("model"))
        given = inherit(given, source["config"], given["init"])

    # The data, and all settings. Given options override stored ones. A dataset class is imported
    # only if the command line names it, never because a checkpoint does.
    import_classes, import_val = "data" in given, "val" in given
    if resumed:
        given = continue_config(given, resumed["config"], folder, folder == own_folder)
    else:
        check_val(given)
    index_folder = None if bench else folder
    dataset = open_run_dataset(DEFAULTS | given, device, import_classes, index_folder)
    if resumed:
        check_same_data(dataset, resumed["config"], folder)
    config = make_config(given, device, dataset)
    # Also store whatever else can affect results, so that a resumed run can report changes.
    config |= dict(dataset=str(dataset), torch=str(torch.__version__))
    config |= dict(ranks=world, threads=torch.get_num_threads())
    if share_of(config["val"]) is not None:
        config["split"] = split_checksum(dataset)

    # What the loop calls. Wrong options are reported before anything is written.
    run = Run(config, folder, rank, world, device, dataset)
    run.stopwatch = Stopwatch(device) if bench else None
    run.held_out = open_held_out(config, dataset, device, import_val, index_folder)
    run.schedule = make_schedule(config["schedule"], min(dataset.size))
    run.loss_fn = choose_loss(config)
    writer = tensorboard_writer() if config["tensorboard"] else None
    if config["fid_every"]:
        run.reference, run.features = fid_reference(run, fid_features)
    if config["batch"] % (world * run.micro_batch):
        raise ValueError(
            f"--batch {config['batch']} is not divisible by {world} ranks "
            f"x micro-batches of {run.micro_batch}"
        )

    # The networks and the optimizer, then the log.
    previous = resumed["config"] | dict(format=resumed.get("format", 1)) if resumed else None
    origin = build(run, resumed, source)
    # Free the memory-mapped files. run.moments keeps the optimizer's state until the first step.
    del resumed, source
    finished = open_run_log(run, files)
    if rank == 0:
        if writer and not bench:
            run.tensorboard = writer(folder, purge_step=run.step + 1)
        announce(run, previous)
        for line in origin:
            print(f"--init {config['init']}: {line}")
    return run, finished


def load_resumed(folder, files):
    """Load the checkpoint to resume from, or return None if there is none.

    files: the checkpoints in the folder. Rank 0 reads the whole newest file, which may have 39 GB,
    to compare its checksums. The other ranks load the same file without that.
    """

    def newest():
        return os.path.basename(newest_checkpoint(folder, check=True)) if files else None

    name = fid.on_first_rank(newest)
    if name is None and not files:
        return None
    path = os.path.join(folder, name or "")
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} must be one folder for all ranks: rank 0 found {name or 'no checkpoint'}"
        )
    return load_checkpoint(path)


def open_run_dataset(config, device, import_classes, folder):
    """The dataset that the settings name. Raises ValueError and OSError as the datasets do.

    folder: of the run, where an index of the data may be kept.
    """
    check_text_options(config)
    if config["captions"] is not None:
        return open_captioned_dataset(config, device, folder)
    return open_dataset(config, device, import_classes, folder)


def check_same_data(dataset, stored, folder):
    """Raise ValueError if a resumed run would continue with other classes, captions or latents."""
    # A share is split by names or rows. In other data, images that were held out could be used.
    if share_of(stored.get("val", [])) is not None:
        if str(dataset) != stored["dataset"]:
            raise ValueError(
                f"{folder} holds out a share of its data, {stored['dataset']}, and these are "
                f"others, {dataset}: choose another --out"
            )
        # The same images in other folders or files are split in another way.
        if "split" in stored and split_checksum(dataset) != stored["split"]:
            raise ValueError(
                f"{folder} holds out a share of its data, and --data names their folders or files "
                "in another way: repeat --data of the run, or choose another --out"
            )
    # The network was built for these captions or latents, and its label embeddings are ordered
    # like these classes.
    if not dataset.net_fields.items() <= stored["model_args"].items():
        raise ValueError(
            f"{folder} holds a run with other text embeddings or latents ({dataset.net_fields}): "
            "choose another --out, or delete it"
        )
    if dataset.classes != stored["classes"]:
        raise ValueError(
            f"{folder} holds a run with other classes ({', '.join(stored['classes'][:20])}): "
            "choose another --out, or delete it"
        )


def set_float32_precision(device):
    """Choose the precision of float32 matrix products, for operations not in bfloat16."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    elif torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        # Without AMX, "medium" still computes in float32, but with oneDNN, which takes half as
        # long as MKL on AMD.
        torch.set_float32_matmul_precision("medium")


def choose_loss(config):
    """The function of --loss, or loss.diffusion_loss with --space and --multiscale."""
    if config["loss"]:
        name = config["loss"]
        return import_object(name, f"--loss {name} is not package.module:function")
    return functools.partial(diffusion_loss, space=config["space"], multiscale=config["multiscale"])


def tensorboard_writer():
    """The class SummaryWriter. Raises ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs: pip install tensorboard") from error
    return SummaryWriter


def fid_device(device):
    """The device for FID, which computes in float64: Apple's GPUs cannot."""
    return torch.device("cpu") if device.type == "mps" else device


def fid_reference(run, features):
    """The statistics of --fid-ref, and the network of their features.

    features: None for Inception, or package.module:Class. Raises ValueError if they do not match.
    """
    path = run.config["fid_ref"]
    reference = fid.read_statistics(path or "")
    if not reference:
        raise ValueError(f"--fid-every needs --fid-ref, an .npz with mu and sigma, not {path}")
    wanted = features or fid.INCEPTION
    # Statistics of other features cannot be compared.
    if reference["features"] != wanted:
        raise ValueError(
            f"--fid-ref {path} holds features of {reference['features']}, not of {wanted}: "
            "see --fid-features"
        )
    # One blank image tells how many features the network has.
    device = fid_device(run.device)
    network = fid.load_network(features).to(device)
    blank = torch.zeros(1, 3, *run.dataset.size, dtype=torch.uint8, device=device)
    features, _, spatial = fid.extract(network, blank, spatial=True)
    for key, found in (("mu", features), ("mu_s", spatial)):
        if found is None or reference[key] is None:
            continue
        count, width = len(reference[key]), found.shape[1]
        if count != width:
            raise ValueError(f"--fid-ref {path} holds {count} features in {key}, not {width}")
    return reference, network


def build(run, resumed=None, source=None):
    """Create the networks and the optimizer, and load the checkpoint, or the weights of --init.

    resumed: the checkpoint, or None. source: see load_source, or None. Returns lines that tell what
    of the source was used.
    """
    config, device = run.config, run.device
    compiled = config["compile"] and can_compile(device)
    # The same seed on every rank: all start from the same weights.
    torch.manual_seed(config["seed"])
    net = build_net(
        config["model"],
        config["model_args"],
        "cpu" if run.sharded else device,  # fully_shard does not support channels_last
    )
    origin = initialize(net, source, config) if source else []
    # The average starts from the initial weights. It never computes gradients.
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)
    if resumed:
        load_weights(run.folder, net, resumed["net"])
        load_weights(run.folder, ema_net, resumed["ema"])
        run.step = run.saved_step = resumed["step"]
        run.images = resumed["images"]
    # FSDP: every rank keeps its shard of both networks, hence of gradients and optimizer state.
    if run.sharded:
        shard(net, device, config["bf16"], compiled)
        shard(ema_net, device, config["bf16"], compiled=False)

    # The paper: Adam, eps 1e-12, no weight decay, beta2 0.99 (U-Net 128: 0.999).
    # It is created after sharding, because its moments have the layout of the weights.
    optimizer = torch.optim.Adam(
        net.parameters(),
        config["lr"],
        betas=(0.9, config["beta2"]),
        eps=1e-12,
        fused=device.type in ("cpu", "cuda"),  # one kernel for all weights
    )
    # The model that is trained: the network, wrapped for several ranks and compiled.
    model = net
    if run.ddp:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not run.sharded and compiled:
        # Compiled outside of DDP, the graph is split at DDP's buckets: gradients are exchanged
        # while the backward pass still runs.
        model = torch.compile(model, dynamic=False)
    run.net, run.model, run.ema_net, run.optimizer = net, model, ema_net, optimizer
    if resumed:
        check_moments(run, resumed["optimizer"])
        run.moments = resumed["optimizer"]
    return origin


def check_moments(run, state):
    """Raise ValueError unless the moments in a checkpoint have the shapes of the weights."""
    weights = list(run.net.parameters())
    try:
        fits = all(
            value.ndim == 0 or value.shape == weights[i].shape
            for i, entry in state["state"].items()
            for value in entry.values()
        )
    except Exception:  # the dict of an untrusted checkpoint can raise any exception
        fits = False
    if not fits:
        raise ValueError(
            f"{run.folder}: the newest checkpoint's optimizer does not fit its network"
        )


def load_moments(run):
    """Load the optimizer of the checkpoint, its tensors laid out or sharded like the weights.

    Called after the first backward pass. During it, DDP holds the gradients twice, and there would
    be no memory for the moments.
    """
    try:
        # A checkpoint holds whole tensors, whatever the number of ranks that saved it.
        weights = list(run.net.parameters())
        moments = {
            i: {key: shard_like(weights[i], value) for key, value in entry.items()}
            for i, entry in run.moments["state"].items()
        }
        # The settings, such as the learning rate of this step, are those of the run.
        settings = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict(dict(state=moments, param_groups=settings))
    except Exception as error:
        raise ValueError(
            f"{run.folder}: the newest checkpoint's optimizer does not fit its network ({error})"
        ) from error
    run.moments = None


def open_run_log(run, files):
    """Open the log on rank 0, write config.json, and check that all ranks resume at the same step.

    files: the checkpoints found before. Returns (has_grid, has_val, has_fid): whether the step to
    resume from already has its sample grid, its held-out loss and its FID. Raises ValueError.
    """
    has_grid = has_val = has_fid = False
    if run.rank == 0 and not run.stopwatch:
        # open_log locks the folder, and truncates the log at the step to resume from.
        run.log, lines = open_log(run.folder, run.step)
        # Between the search for checkpoints and this lock, another process may have saved one.
        if list_checkpoints(run.folder) != files:
            raise ValueError(f"{run.folder}: another process has just saved there: start again")
        # What the interrupted process has finished is not done again.
        has_grid = os.path.exists(f"{run.folder}/samples_{run.step:07d}.png")
        has_val = any(line["step"] == run.step and "val_loss" in line for line in lines)
        has_fid = any(line["step"] == run.step and "fid_images" in line for line in lines)
        with writing(f"{run.folder}/config.json") as file:
            file.write(json.dumps(run.config, indent=1).encode())
    # Only rank 0 has looked. Ranks on different machines must see the same folder.
    if run.world > 1:
        states = [None] * run.world
        dist.all_gather_object(states, (run.step, has_grid, has_val, has_fid))
        steps = [step for step, *_ in states]
        if len(set(steps)) > 1:
            raise ValueError(
                f"the ranks would resume at steps {steps}: {run.folder} must be one folder for all"
            )
        _, has_grid, has_val, has_fid = states[0]
    return has_grid, has_val, has_fid


def announce(run, previous):
    """Print the network, all settings, and which of them changed since the run was saved.

    previous: the settings of the checkpoint, with its format, or None for a new run.
    """
    config = run.config
    parameters = sum(p.numel() for p in run.net.parameters())
    own = ""
    if run.sharded:
        local = sum(p.to_local().numel() for p in run.net.parameters())
        own = f" ({100 * local / parameters:.0f} % on this rank)"
    print(
        f"{run.folder}: {config['model']} with {parameters / 1e6:.2f} M parameters{own}, "
        f"{len(run.dataset)} images in {len(run.dataset.classes)} classes, "
        f"{run.world} x {run.device.type}"
    )
    if run.held_out:
        print(f"{run.held_out} is measured every {config['val_every']} steps")
    print(" ".join(f"{key}={value}" for key, value in config.items() if key != "classes"))
    if note := derived_from(config["model"], config["size"], min(run.dataset.size)):
        print(note)
    gpus = torch.cuda.device_count() if run.device.type == "cuda" else 0
    if gpus > 1 and run.world == 1:
        command = shlex.join(sys.argv)
        print(f"this uses one of {gpus} GPUs; all: torchrun --nproc-per-node {gpus} {command}")
    if run.device.type == "cpu" and not run.stopwatch:
        announce_time(run)
    # Settings, data and software that differ from those of the checkpoint.
    if previous:
        changes = "".join(
            f", {key} {previous[key]} now {value}"
            for key, value in config.items()
            if value != previous.get(key, value) and key != "model_args"
        )
        print(f"resumed at step {run.step}{changes}")
        if run.device.type == "cuda" and previous["format"] < 2:
            print("from here on the noise has other seeds: they have 64 bits now, not 32")
    if run.step >= config["steps"]:
        print(
            f"{run.folder} has reached step {run.step} of --steps {config['steps']}: "
            "raise --steps, or choose another --out"
        )


def announce_time(run):
    """On a CPU, estimate the time of a run of more than an hour, and of the smallest recipe.

    The first step alone may take hours. The estimates take seconds.
    """
    config = run.config
    model, size = config["model"], config["size"]
    recipes = RECIPES.get(model, {}).get(size, {})
    if config["captions"] is not None or not recipes:
        return
    # Short runs of small networks, such as those of the tests, need no estimate.
    images = (config["steps"] - run.step) * config["batch"]
    if images * sum(p.numel() for p in run.net.parameters()) < 1e10:
        return
    left = images * cpu_seconds_per_image(config)
    if left < 3600:
        return
    print(f"on this CPU the run takes roughly {duration(left)}", flush=True)

    # The smallest recipe for images; smaller ones are for latents.
    res = min(res for res in recipes if isinstance(res, int) and res >= 32)
    if res < min(run.dataset.size) and "in_channels" not in config["model_args"]:
        training = TRAINING[model, size] | TRAINING.get((model, size, res), {})
        model_args = recipes[res] | dict(res=res, num_classes=config["model_args"]["num_classes"])
        seconds = cpu_seconds_per_image(config | dict(res=res, model_args=model_args))
        seconds *= training["steps"] * training["batch"]
        print(f"the recipe of --size {size} --res {res} takes roughly {duration(seconds)}")


PREFETCH = 2  # micro-batches that each decoding process prepares ahead


def batch_bytes(run):
    """The size of a micro-batch of this rank in bytes: images or latents, and labels."""
    (channels, height, width), latents = sample_size(run.config)
    image = channels * height * width * (4 if latents else 1)
    text = run.dataset.net_fields
    dim = text.get("text_dim", 0)
    label = text.get("text_tokens", 1) * (4 * dim if dim else 8)  # float32, or int64
    return run.micro_batch * (image + label)


def make_batches(run, workers):
    """An endless iterator over this rank's micro-batches: (images, labels).

    images: (B, C, H, W), uint8 or float latents. labels: (B,), or text (B, ...).
    The seed and the number of images seen determine the order of the dataset, so that a resumed run
    continues where it left off in the dataset. workers: decoding processes, or None for a default.
    """
    # At most 8 decoding processes per rank, and not more than there are cores.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if workers is None:
        workers = decoding_workers()
    # Shapes are drawn on the device, without processes.
    has_files = bool(run.config["data"])
    workers = workers if has_files else 0
    check_shared_memory(batch_bytes(run) * PREFETCH * workers * local_ranks)
    # Decoding processes ignore signals, so that the current step can finish. They end at exit.
    atexit.register(end_workers)
    # Held-out images are not among them.
    dataset = run.held_out.training_set if run.held_out else run.dataset
    order = image_order(
        len(dataset), run.config["seed"], run.config["batch"], run.images, run.micro_batches
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=ignore_signals,
        # fork shares memory-mapped arrays; other start methods would copy them.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=run.device.type == "cuda" and has_files,
    )
    return iter(loader)


# ---------------------------------------------------------------- the command


def pack_images(given):
    """--pack: write the images of --data at --res into one .npz."""
    path = given["pack"]
    if "captions" in given:
        raise ValueError("--pack does not keep file names, which --captions needs")
    if "data" not in given or not path.endswith(".npz"):
        raise ValueError("--pack needs --data, and a file name that ends in .npz")
    if os.path.exists(path):
        raise ValueError(f"--pack {path} already exists: choose another name, or delete it")
    # One process reads all images, in threads; other ranks have nothing to do.
    if os.environ.get("RANK", "0") == "0":
        data, res = given["data"], given.get("res", DEFAULTS["res"])
        if len(data) == 1 and is_dataset_class(data[0]):
            dataset = ExternalDataset(data[0], res)
        else:
            dataset = ImageData(data, res, given.get("skip_bad"))
        pack(dataset, path, max(1, given.get("workers", fid.cpu_cores())))


def main(argv=None):
    given = parse(argv)
    if "pack" in given:
        return pack_images(given)

    workers = given.get("workers")
    run, finished = prepare(given)
    # From here on signals do not end the process: they ask the loop to save and stop. A benchmark
    # has nothing to save.
    with contextlib.nullcontext(()) if run.stopwatch else catch_signals() as run.signals:
        stop = train(run, make_batches(run, workers), finished)

    if run.stopwatch and run.rank == 0:
        run.stopwatch.report(run.config, run.world)
    if run.tensorboard:
        run.tensorboard.close()
    if run.log:
        run.log.close()
    leave_ranks()
    if stop:
        if run.rank == 0:
            name = signal.Signals(stop).name
            print(f"stopped by {name}, saved at step {run.step}: the same command resumes there")
        sys.exit(128 + stop)  # the exit status that shells and schedulers expect


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command(main)
