"""Checkpoints: build networks, save atomically, load and validate, decide what may be imported.

A run's checkpoint holds all that training needs. An exported model holds the EMA weights and the
settings: it is what people pass on (export_model). load() reads both for sampling.
"""

import contextlib
import json
import os
import re
import sys
import zipfile

import torch

from fid import one_line
from schedule import make_schedule
from support.runtime import import_object, pixels, writing
from support.text import with_text
from unet import UNet
from uvit import UViT

# The number of the format, stored as "format". Checkpoints of format 1 have no such entry.
# Format 2: the seeds of a GPU's generator have 64 bits instead of 32.
FORMAT = 2

# Settings with another name in old checkpoints: old name -> name.
OLD_NAMES = {"pictures": "dataset"}

# The types of the entries of an exported model, of a checkpoint, of the settings of both, and of
# the settings for sampling.
MODEL_TYPES = dict(config=dict, step=int, images=int, ema=dict)
STATE_TYPES = dict(MODEL_TYPES, net=dict, optimizer=dict)
CONFIG_TYPES = dict(model=str, model_args=dict, classes=list, schedule=str, bf16=bool)
SAMPLING_TYPES = dict(steps=int, sampler=str, guidance_interval=list, early_steps=int)

# ---------------------------------------------------------------- networks


def net_class(model):
    """Return the class that --model names. Raises ValueError if it does not exist.

    model: "uvit", "unet" or package.module:Class.
    """
    own_class = {"uvit": UViT, "unet": UNet}.get(model)
    message = f"--model {model} is neither uvit, unet nor package.module:Class"
    return own_class or import_object(model, message)


def build_net(model, model_args, device=None):
    """Build the network that --model names, with the arguments model_args.

    model: see net_class. If model_args has text_tokens > 0, a U-ViT is the text-conditioned version
    of its class. Raises ValueError for a class that does not exist, or arguments that it
    does not take.
    """
    # cuDNN is faster in channels_last. On a CPU, norms and small convolutions are slower in it.
    is_gpu = device is not None and torch.device(device).type == "cuda"
    memory_format = torch.channels_last if is_gpu else torch.preserve_format
    try:
        build = net_class(model)
        if model_args.get("text_tokens") and issubclass(build, UViT):
            build = with_text(build)
        net = build(**model_args)
    except (ValueError, MemoryError):
        raise  # the messages of our networks are clear
    except Exception as error:
        message = f"--model {model} does not take {model_args}: {one_line(error)}"
        raise ValueError(message) from error
    # Outside of the try: a GPU may lack memory.
    return net.to(device, memory_format=memory_format)


def sample_size(config):
    """Return the size (C, H, W) of a run's samples, and True if they are latents.

    Runs on latents store in_channels, runs on images do not.
    """
    channels = config["model_args"].get("in_channels")
    return (channels or 3, *pixels(config["res"])), channels is not None


# ---------------------------------------------------------------- saving


def list_checkpoints(folder):
    """Return the paths of the checkpoints ckpt_STEP.pt in a run's folder, the newest last."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"ckpt_\d{7,}\.pt", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[5:-3]))]


def save_checkpoint(folder, keep, state):
    """Write folder/ckpt_STEP.pt, then delete all older checkpoints except keep - 1.

    state: a dict of plain tensors, numbers and dicts, see STATE_TYPES; its format is added. Raises
    OSError, for example on a full disk; the older checkpoints then remain.
    """
    path = os.path.join(folder, f"ckpt_{state['step']:07d}.pt")
    with writing(path) as file:
        torch.save(dict(format=FORMAT) | state, file)
        file.flush()
        os.fsync(file.fileno())
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        # The new name must be on the disk, too, before older files are deleted.
        descriptor = os.open(folder, os.O_DIRECTORY)
        # Some network file systems cannot do that.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)
    files = list_checkpoints(folder)
    for file in files[: max(0, files.index(path) + 1 - keep)]:
        # Windows does not delete the file that this process resumed from: it is memory-mapped.
        with contextlib.suppress(PermissionError, FileNotFoundError):
            os.remove(file)


# ---------------------------------------------------------------- loading


class NewerFormat(ValueError):
    """A checkpoint was written by a later version of this project."""


def load_checkpoint(path, check=False):
    """Load a checkpoint of train.py as a dict, see STATE_TYPES. No code of the file is executed.

    path: a checkpoint, or a run's folder, which stands for its newest valid checkpoint. check: read
    the whole file and compare its checksums; otherwise its tensors are memory-mapped and read on
    access. Settings with old names are renamed. Raises ValueError.
    """
    state = load_model(path, check)
    if not has_types(state, STATE_TYPES):
        raise ValueError(
            f"{path} is an exported model, which has no optimizer: "
            "train.py continues a run from its own checkpoints only, or starts from it with --init"
        )
    return state


def load_model(path, check=False):
    """Load a checkpoint or an exported model as a dict, see MODEL_TYPES. No code is executed.

    path: see load_checkpoint, or a file that export_model wrote. Raises ValueError.
    """
    if os.path.isdir(path):
        return load_model(newest_checkpoint(path, check))
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such run, checkpoint or exported model")
    state = read_safetensors(path) if is_safetensors(path) else read_file(path, check)

    # A later version of this project may store other entries, or the same ones differently.
    if isinstance(state, dict) and type(state.get("format")) is int and state["format"] > FORMAT:
        raise NewerFormat(
            f"{path} has format {state['format']}, and this version of the project reads formats "
            f"up to {FORMAT}: use the version that wrote it, or a newer one"
        )
    # Any .pt file can be named here. Check the types before anything uses the entries.
    if not is_model(state):
        raise ValueError(f"{path} is another kind of file, not a checkpoint of train.py")
    config = state["config"]
    for old_name, name in OLD_NAMES.items():
        if old_name in config:
            config[name] = config.pop(old_name)
    if not is_sampling(config.setdefault("sampling", {})):  # old checkpoints have none
        raise ValueError(f"{path}: its settings for sampling are invalid")
    return state


def find_checkpoint(path):
    """Return the path of a checkpoint or exported model; of a run's folder, its newest one."""
    return newest_checkpoint(path) if os.path.isdir(path) else path


def newest_checkpoint(folder, check=False):
    """Return the path of the newest valid checkpoint in a run's folder. Rank 0 prints invalid ones.

    A checkpoint of a newer format is valid, but not for this version: it raises NewerFormat.
    check: see load_checkpoint. Raises ValueError if no checkpoint is valid.
    """
    files = list_checkpoints(folder)
    if not files:
        raise ValueError(f"{folder}: no checkpoint there")
    # Fall back to older files, newest first. The error of the oldest one is not caught.
    for file in files[:0:-1]:
        try:
            load_checkpoint(file, check)
            return file
        except NewerFormat:
            raise
        except ValueError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"{error}; using the previous one", file=sys.stderr)
    load_checkpoint(files[0], check)
    return files[0]


def read_file(path, check):
    """Read what torch.save wrote. Raises ValueError for an incomplete or corrupt file."""
    # weights_only refuses every object that is not a tensor, number, string or container.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            if check and archive.testzip():
                raise ValueError("checksum")
    except Exception as error:  # a corrupt file can raise any exception
        raise ValueError(f"{path} is not a complete checkpoint ({type(error).__name__})") from error
    return state


def has_types(values, types):
    """True if values is a dict whose entries have exactly these types; it may have more entries."""
    if not isinstance(values, dict):
        return False
    return all(type(values.get(key)) is kind for key, kind in types.items())


def is_model(state):
    """True if a loaded file has the entries of an exported model, and its settings agree.

    A checkpoint has these entries, too.
    """
    if not has_types(state, MODEL_TYPES) or not has_types(state["config"], CONFIG_TYPES):
        return False
    config, model_args = state["config"], state["config"]["model_args"]
    if model_args.get("num_classes") != len(config["classes"]):
        return False
    # The resolution is stored twice: 384x640 for the data, [384, 640] for the network.
    try:
        return pixels(config.get("res")) == pixels(model_args.get("res"))
    except ValueError:
        return False


def is_sampling(sampling):
    """True if the settings for sampling are valid. A run may have any part of SAMPLING_TYPES."""
    if not isinstance(sampling, dict):
        return False
    if not has_types(sampling, {key: SAMPLING_TYPES.get(key) for key in sampling}):
        return False
    if min(sampling.get("steps", 1), sampling.get("early_steps", 1)) < 1:
        return False
    ends = sampling.get("guidance_interval", [0.0, 0.0])
    return [type(end) for end in ends] == [float, float]


def check_model(path, config, model):
    """Raise ValueError unless the class of a checkpoint's network may be imported.

    model: the option --model, or None. Without it only classes of this project are imported, so
    that an untrusted checkpoint cannot import code.
    """
    trained = config["model"]
    is_ours = trained in ("uvit", "unet") or trained.startswith("related.")
    if model is None and not is_ours:
        raise ValueError(
            f"{path} was trained with --model {trained}: repeat that option to import it"
        )
    if model is not None and model != trained:
        raise ValueError(f"{path} was trained with --model {trained}, not {model}")


def load_weights(path, net, weights):
    """Load the state dict of checkpoint path. Raises ValueError if it does not fit the network."""
    try:
        net.load_state_dict(weights)
    except Exception as error:  # the dict of an untrusted checkpoint can raise any exception
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{path} does not fit its own network: {reason}") from error


def find_schedule(spec, image_d):
    """Return the schedule t -> logsnr that the settings of a run name. Raises ValueError.

    spec, image_d: see schedule.make_schedule. spec may also name a schedule of related/, as
    "related.module:name_schedule". Nothing else is imported: the checkpoint may be untrusted.
    """
    if not spec.startswith("related."):
        return make_schedule(spec, image_d)
    message = f"schedule {spec!r} is none of related/"
    if not re.fullmatch(r"related\.\w+:\w+_schedule", spec):
        raise ValueError(message)
    return import_object(spec, message)


def load(path, device="cpu", model=None):
    """Load a trained network for sampling. Returns (net, config, schedule).

    path: a run's folder, a checkpoint or an exported model, see load_model. model:
    package.module:Class, which must be repeated for a network from elsewhere. The network is in
    eval mode and has the EMA weights, in float32. config: the settings of the run. Raises
    ValueError.
    """
    state = load_model(path)
    config = state["config"]
    check_model(path, config, model)
    net = build_net(config["model"], config["model_args"], device)
    load_weights(path, net, state["ema"])
    schedule = find_schedule(config["schedule"], min(pixels(config["res"])))
    return net.eval().requires_grad_(False), config, schedule


# ---------------------------------------------------------------- exported models

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)

# Settings that name files of the machine that trained. An exported model does not contain them. If
# its data were files, NO_DATA takes their place: whoever opens it gets an error that says why.
LOCAL_SETTINGS = {"data", "val", "fid_ref", "init", "distilled"}
NO_DATA = "the data of an exported model"


def is_safetensors(path):
    """True for the file name of the format safetensors."""
    return os.fspath(path).endswith(".safetensors")


def safetensors():
    """The package safetensors, which is optional. Raises ValueError if it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            "files that end in .safetensors need: pip install safetensors; "
            "a name that ends in .pt needs nothing"
        ) from error
    return safetensors


def read_safetensors(path):
    """Read an exported model in the format safetensors, as a dict. Raises ValueError."""
    package = safetensors()
    try:
        with package.safe_open(path, "pt") as file:
            # The metadata are strings: here one number, or one JSON object, each.
            state = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
            names = list(file.keys())
            return state | dict(ema={name: file.get_tensor(name) for name in names})
    except Exception as error:  # a corrupt file can raise any exception
        raise ValueError(f"{path} is not a complete file ({type(error).__name__})") from error


def export_model(source, path, dtype="float32"):
    """Write the EMA weights and the settings of a run to one file, without the optimizer.

    source: see load_model. path: a name that ends in .pt, or in .safetensors, which needs the
    package of that name. dtype: of the weights, see DTYPES. Returns the number of weights. Raises
    ValueError if a weight exceeds the range of the dtype, and OSError if path cannot be written.
    """
    state = load_model(source)
    weights = {name: convert(source, name, w, dtype) for name, w in state["ema"].items()}
    config = public_settings(state["config"])
    write_model(path, weights, step=state["step"], images=state["images"], config=config)
    return sum(weight.numel() for weight in weights.values())


def write_model(path, weights, *, step, images, config):
    """Write an exported model. path: see export_model. weights: a dict of contiguous tensors.

    Raises OSError.
    """
    entries = dict(format=FORMAT, step=step, images=images, config=config)
    with writing(path) as file:
        if is_safetensors(path):
            metadata = {key: json.dumps(value) for key, value in entries.items()}
            safetensors().torch.save_file(weights, file.name, metadata)  # opens the file again
        else:
            torch.save(entries | dict(ema=weights), file)


def public_settings(config):
    """Return the settings of a run without paths of the machine that trained it."""
    public = {key: value for key, value in config.items() if key not in LOCAL_SETTINGS}
    public["data"] = [NO_DATA] if config.get("data") else []
    # A share names no file. Whoever trains on these images must not use those that it holds out.
    val = config.get("val", [])
    if len(val) == 1 and isinstance(val[0], float):
        public["val"] = val
    # That there are captions matters, and which encoder, but not in which folder they are.
    if config.get("captions"):
        public["captions"] = ""
    if os.path.isabs(config.get("text_encoder", "")):
        public["text_encoder"] = os.path.basename(config["text_encoder"])
    return public


def convert(source, name, weight, dtype):
    """Return a weight in another dtype, as a tensor of its own. Raises ValueError if it overflows.

    Tensors of integers keep their dtype.
    """
    if not weight.is_floating_point():
        return weight.clone()
    converted = weight.to(DTYPES[dtype], copy=True).contiguous()
    # float16 ends at 65504. Larger weights would become infinity.
    if not torch.equal(converted.isfinite(), weight.isfinite()):
        raise ValueError(
            f"{source}: {name} has weights of up to {weight.abs().max():.3g}, and float16 ends at "
            "65504: choose --dtype bfloat16 or float32"
        )
    return converted
