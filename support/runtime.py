"""What a command needs around the algorithms: ranks, precision, sharding, signals, files, the log.

The sections: image size and imports by name; ranks; precision and compilation; sharding (FSDP);
signals and worker processes; files; the log; running a command.
"""

import contextlib
import datetime
import errno
import glob
import importlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

# ---------------------------------------------------------------- image size and imports by name


def pixels(res):
    """Return (height, width) for 256, "384x640" or a pair. Raises ValueError."""
    try:
        if isinstance(res, int):
            height, width = res, res
        elif isinstance(res, str):
            height, width = map(int, res.split("x"))
        else:
            height, width = map(int, res)
        if min(height, width) > 0:
            return height, width
    except (ValueError, TypeError):
        pass
    raise ValueError(f"--res {res} is neither a size in pixels nor HEIGHTxWIDTH")


def import_object(name, message):
    """Import `package.module:Name` and return the object.

    Raises ValueError, which starts with message, if it does not exist.
    """
    module, _, name = name.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{message} ({error})") from error


# ---------------------------------------------------------------- ranks


def join_ranks(name=None):
    """Connect the processes that torchrun started. Returns (rank, number of ranks, device).

    name: the device; by default an NVIDIA or AMD GPU if there is one. Without torchrun: (0, 1,
    device). CPU tensors use gloo, GPU tensors NCCL. Raises ValueError if there is no such device.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU per rank
    device = open_device(name)
    if world > 1:
        connect_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, world)
    return rank, world, device


# What to check if ranks do not reach each other.
NETWORK_HINT = (
    "on machines with several network interfaces, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
    "the one that connects them, see docs/training.md"
)


def connect_ranks(backend, rank, world):
    """Create the process group. Raises ValueError if the ranks do not reach each other."""
    # Other ranks wait while rank 0 writes a checkpoint, which can take minutes.
    timeout = datetime.timedelta(minutes=30)
    try:
        dist.init_process_group(
            backend, store=restart_store(timeout), rank=rank, world_size=world, timeout=timeout
        )
    except RuntimeError as error:  # of a store, or of gloo
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the ranks cannot connect ({reason}): {NETWORK_HINT}") from error


def open_device(name):
    """Return the device and prepare it. Raises ValueError if tensors cannot be created there."""
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RuntimeError("gloo does not exchange its tensors: use one process")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "mps":
        print("note: --device mps, an Apple GPU, is untested", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # All batches have one shape, so the search for the fastest convolution pays off.
        torch.backends.cudnn.benchmark = True
    return device


def restart_store(timeout):
    """Return a store for ranks that torchrun has restarted on one machine, else None.

    Restarted ranks share torchrun's store with the ranks that died. A prefix keeps them from
    reading stale keys.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return None
    if (
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True"
        or os.environ["GROUP_WORLD_SIZE"] != "1"
    ):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(restarts, store)


def leave_ranks():
    """Disconnect from the other ranks. Does nothing without them."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # The threads of gloo release their last tensors through the Python interpreter. The
        # process would abort if the interpreter ended before that.
        time.sleep(0.2)


# ---------------------------------------------------------------- precision and compilation


def has_bf16(device):
    """True if the hardware computes in bfloat16, instead of emulating it in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if torch.device(device).type != "cpu":
        return False
    # ATEN_CPU_CAPABILITY=avx2 limits the kernels to AVX2, which lacks bfloat16.
    is_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return is_avx512 and torch.cpu._is_avx512_bf16_supported()


def with_attributes_of(net, function):
    """Give a function that wraps a network those attributes that sample.guided reads."""
    for name in ("num_classes", "max_guidance"):
        setattr(function, name, getattr(net, name, None))
    return function


def in_bf16(net, enabled=True):
    """Wrap a network: it computes under bfloat16 autocast and returns float32.

    The arithmetic of samplers and losses stays outside of autocast, in float32. options: of a
    network that can return several tensors, see related/dit.py.
    """

    def bf16_net(z, logsnr, label=None, **options):
        with torch.autocast(z.device.type, torch.bfloat16):
            output = net(z, logsnr, label, **options)
        if isinstance(output, (tuple, list)):
            return [tensor.float() for tensor in output]
        return output.float()

    return with_attributes_of(net, bf16_net) if enabled else net


def can_compile(device):
    """True if torch.compile works on the device. Otherwise rank 0 prints the reason to stderr.

    It needs a C++ compiler on a CPU, and Triton and a C compiler on a GPU.
    """
    size = 1 + time.time_ns() % 99_991  # a new size, so that no cached result hides a failure
    try:
        torch.compile(torch.sin)(torch.zeros(size, device=device))
        return True
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"--compile does not work, continuing without it: {reason}", file=sys.stderr)
        return False


# ---------------------------------------------------------------- sharding (FSDP)


def shard(net, device, bf16, compiled):
    """Shard the weights of a network over the ranks, in place, with fully_shard.

    Gradients, Adam moments and EMA weights are then sharded, too. Each module in a ModuleList is a
    unit: it is gathered only while it computes, in bfloat16 with bf16. The rest of the network is
    one more unit, in float32. compiled: compile each unit separately.
    """
    # This import takes a second. Only sharded runs pay for it.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP warns of in-place changes to the output of a unit. The networks make none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    if compiled:
        # A U-Net has more than 8 kinds of units, which is the default limit.
        torch._dynamo.config.recompile_limit = 64
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in reversed(list(net.modules())):  # inner modules first
        if not isinstance(module, torch.nn.ModuleList):
            continue
        for unit in module:
            # TransformerEncoderLayer does not support float32 inputs with bfloat16 weights.
            if isinstance(unit, (torch.nn.ModuleList, torch.nn.TransformerEncoderLayer)):
                continue
            if compiled:
                unit.compile(dynamic=False)
            fully_shard(unit, mesh=mesh, mp_policy=policy)

    # The EMA network has no backward pass. By default its root unit would stay gathered.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def shard_like(weight, tensor):
    """Return a tensor of a weight's shape in the weight's layout, which the fused Adam expects.

    If the weight is sharded, the result is this rank's shard. Scalars are cloned.
    """
    if tensor.ndim == 0:
        return tensor.clone()
    if not hasattr(weight, "full_tensor"):
        return torch.empty_like(weight).copy_(tensor)
    return dist.tensor.distribute_tensor(
        tensor.to(weight.device).contiguous(),
        weight.device_mesh,
        weight.placements,
        src_data_rank=None,
    )


def full_tensor(tensor):
    """Gather a sharded tensor (a DTensor); every rank must call it. Other tensors are returned."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_full(state):
    """Gather a sharded state dict to full tensors on rank 0. Every rank must call it.

    A checkpoint of full tensors can be loaded on any number of ranks. Other ranks get None.
    """
    if isinstance(state, dict):
        return {key: gather_full(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


# ---------------------------------------------------------------- signals and worker processes


@contextlib.contextmanager
def catch_signals():
    """Catch SIGINT, SIGTERM and SIGHUP: yield a list to which received signals are appended.

    The training loop reads the list, saves a checkpoint and exits. A second Ctrl-C ends the process
    immediately. A second SIGTERM does not: a scheduler and torchrun may each send one.
    """
    received = []

    def receive(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    # SIGHUP means that the terminal was closed. nohup ignores it, and so does a run under nohup.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """Make a worker process that decodes images ignore SIGINT, SIGTERM and SIGHUP.

    Signals reach the whole process group, but the last training step still needs its images.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def check_shared_memory(needed):
    """Raise ValueError if /dev/shm has less free space than needed, in bytes.

    Worker processes hand their batches over in shared memory. If it is full, a bus error kills
    them.
    """
    if not os.path.isdir("/dev/shm"):  # other systems than Linux have none
        return
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise ValueError(
            f"the worker processes need {needed / 1e6:.0f} MB of shared memory, and /dev/shm has "
            f"{free / 1e6:.0f} MB: start the container with --ipc=host or a larger --shm-size, "
            "or use fewer --workers"
        )


def end_workers():
    """Kill the worker processes that an error has left running. They ignore SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        # Otherwise PyTorch reports the end of a worker as another error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path, shared=False):
    """Open a binary file for writing. It replaces path only when it is complete.

    shared: True if other processes may write the same file at the same time.
    After an error the old content of path remains. Raises OSError, which names path.
    """
    # A part of a killed process is overwritten by the next one, unless each has its own.
    part = f"{path}.{os.getpid()}.part" if shared else f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError of its file into a RuntimeError. Find the original.
        while not isinstance(error, OSError):
            if error is None:
                raise
            error = error.__context__
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


# ---------------------------------------------------------------- the log


def open_log(folder, step):
    """Open log.jsonl of a run, and truncate it at a step. Returns (log, lines up to the step).

    folder: the folder of the run. step: where the run resumes; later steps are repeated. The log is
    unbuffered. It is locked until its process ends. Incomplete files of a killed process are
    deleted. Raises ValueError if another process holds the lock.
    """
    os.makedirs(folder, exist_ok=True)
    log = io.FileIO(f"{folder}/log.jsonl", "a+")
    lock(log, folder)
    for part in glob.glob(f"{glob.escape(folder)}/*.part"):
        os.remove(part)

    lines = []
    position = 0  # after the current line
    end = 0  # after the last line to keep
    log.seek(0)
    for text in log.read().splitlines(True):
        position += len(text)
        # If the machine crashed, a line may be incomplete. Such lines are skipped.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if text.endswith(b"\n") and line["step"] <= step:
                lines.append(line)
                end = position
    log.truncate(end)
    return log, lines


def lock(file, folder):
    """Lock an open file against other processes. Raises ValueError if it is locked already."""
    try:
        import fcntl  # does not exist on Windows, where nothing is locked

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"{folder}: another process is training there. If its machine has crashed, a network "
            "file system may hold the lock for some minutes: then try again later"
        ) from error
    except (ImportError, OSError):  # the file system does not support locks
        pass


def append_line(log, line):
    """Append a dict to the log as a line of JSON. Raises OSError, which names the log."""
    text = json.dumps(line).encode() + b"\n"
    try:
        if log.write(text) < len(text):
            raise OSError(errno.ENOSPC, "the disk is full")
    except OSError as error:
        raise OSError(f"cannot write {log.name}: {error.strerror}") from error


class LossLog:
    """Loss by noise level and gradient norm since the last line of the log.

    The losses are sorted into 18 bins of logsnr, each of width 2, from -20 to 16. The log also
    remembers the first step at which a loss or a gradient was not finite. It accumulates on the
    device. Only check_finite and read wait for the device, and every rank must call them.
    """

    BINS = 18

    def __init__(self, device):
        self.bins = torch.zeros(2, self.BINS, device=device)  # sums and counts of the loss
        self.largest_norm = torch.zeros((), device=device)
        # By bin, the first step with a loss that is not finite; at the end, with such a gradient.
        self.failed = torch.full((self.BINS + 1,), math.inf, device=device)

    def add(self, step, loss, logsnr):
        """Add a micro-batch of training step `step`, which counts from 0.

        loss, logsnr: (B,), without gradients.
        """
        where = ((logsnr + 20) / 2).long().clamp(0, self.BINS - 1)  # (B,)
        self.bins.index_add_(1, where, torch.stack([loss, torch.ones_like(loss)]))
        failed = torch.where(loss.isfinite(), math.inf, step + 1.0)  # (B,)
        self.failed.scatter_reduce_(0, where, failed, "amin")

    def add_grad_norm(self, step, norm):
        """Add the gradient norm of training step `step`. norm: scalar, before clipping."""
        norm = full_tensor(norm)
        self.largest_norm = torch.maximum(self.largest_norm, norm)
        failed = self.failed[-1].clamp(max=step + 1.0)
        self.failed[-1] = torch.where(norm.isfinite(), self.failed[-1], failed)

    @torch.no_grad()
    def check_finite(self, step, net, folder, saved_step):
        """Raise ValueError on every rank if a loss, a gradient or a weight was not finite.

        step: number of finished steps. net: the network; its weights are checked as they are.
        saved_step: step of the last checkpoint in folder, or 0. The error names the step, the bin
        and the last good checkpoint.
        """
        if dist.is_initialized():
            dist.all_reduce(self.failed, dist.ReduceOp.MIN)
        failed = self.failed.tolist()
        weights_norm = full_tensor(torch.nn.utils.get_total_norm(net.parameters()))
        first = min(failed)
        if first == math.inf and weights_norm.isfinite():
            return

        places = []
        for i, failed_step in enumerate(failed):
            if failed_step == first < math.inf:
                name = f"the loss at logsnr {2 * i - 20} to {2 * i - 18}"
                places.append(name if i < self.BINS else "the gradient")
        if saved_step:
            advice = f"the last good checkpoint is {folder}/ckpt_{saved_step:07d}.pt"
        else:
            advice = "there is no checkpoint yet"
        places = ", ".join(places or ["the weights"])
        raise ValueError(f"not finite at step {min(first, step):.0f}: {places}; {advice}")

    def read(self):
        """Return a dict for the log: loss, max_grad_norm, and loss_by_logsnr.

        loss: the mean since the last reset, over all ranks. loss_by_logsnr: the mean of each bin
        that is not empty, by the lower end of the bin.
        """
        bins = self.bins.clone()
        if dist.is_initialized():
            dist.all_reduce(bins)
        sums, counts = bins.tolist()
        means = {2 * i - 20: s / n for i, (s, n) in enumerate(zip(sums, counts)) if n}
        return dict(
            loss=sum(sums) / sum(counts),
            max_grad_norm=self.largest_norm.item(),
            loss_by_logsnr=means,
        )

    def reset(self):
        """Start again after a line of the log. Failed steps are kept."""
        self.bins.zero_()
        self.largest_norm.zero_()


# ---------------------------------------------------------------- running a command

# The RuntimeErrors that a user can fix. All others are bugs and keep their traceback.
USER_ERRORS = ("DataLoader worker", "out of memory", "allocate memory")


def run_command(main):
    """Call main. Errors that the user can fix become one line on stderr and a non-zero exit code.

    python -X dev shows the traceback instead.
    """
    rank, name = os.environ.get("RANK", "0"), os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as head, has ended. Python still flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # The message of a worker process contains a traceback: its last line is the error.
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        is_runtime_error = isinstance(error, RuntimeError)
        is_bug = is_runtime_error and not any(text in message for text in USER_ERRORS)
        if is_runtime_error and "gloo" in message:
            message = f"another rank has stopped or cannot be reached ({message}); {NETWORK_HINT}"
        elif is_bug or sys.flags.dev_mode:
            raise
        sys.exit(f"{name}: {message}" if rank == "0" else f"{name}, rank {rank}: {message}")
    except KeyboardInterrupt:
        sys.exit(130)


def duration(seconds):
    """5:07 for minutes and seconds; from an hour on, 2 h 05 min; from two days on, 3 days."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24:,} days"


def with_progress(net, calls):
    """Wrap a network: show on stderr, once a second, the progress and the time left.

    calls: the number of calls of the network until it is finished.
    """
    done = 0
    start = time.time()
    shown = 0.0  # time of the last output

    def counted_net(z, logsnr, label=None):
        nonlocal done, shown
        v_hat = net(z, logsnr, label)
        done += 1
        now = time.time()
        if now - shown >= 1 or done == calls:
            shown = now
            left = (now - start) * (calls - done) / done
            print(
                f"\r{100 * done / calls:3.0f} %, {duration(left)} left ",
                end="\n" if done == calls else "",
                file=sys.stderr,
                flush=True,
            )
        return v_hat

    return with_attributes_of(net, counted_net)
