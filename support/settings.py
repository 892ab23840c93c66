"""The options of train.py, and the settings of a run that follow from them.

OPTIONS is the one table of options. The parser, the checks of ranges and types, the defaults, and
what a checkpoint stores are made from it. A setting has the name of its option: log_every for
--log-every. The settings of a run are a dict, the `config` that its checkpoints contain.
"""

import argparse
import inspect
import json
import math
import os
import re
import sys
import typing

from support.checkpoint import check_model, net_class
from support.data import ImageData, is_dataset_class
from support.recipes import DERIVED, RECIPES, TRAINING, derive, scaled_sizes
from support.runtime import has_bf16, pixels
from support.sources import split_keys

# ---------------------------------------------------------------- the table of options

RECIPE = object()  # the default of a setting that the recipe, the device or the data decide


class Option(typing.NamedTuple):
    """One option of train.py."""

    name: str
    kind: type  # type of the value; None is also allowed where it is the default
    default: object
    help: str
    low: float  # range of a number, both ends included
    high: float
    stored: bool  # True for a setting of the run, False for what concerns only this process
    parse: dict  # more arguments of ArgumentParser.add_argument


def option(name, kind, default, help, low=-math.inf, high=math.inf, stored=True, **parse):
    """A row of OPTIONS."""
    return Option(name, kind, default, help, low, high, stored, parse)


def resolution(text):
    """The value of --res: 256 as a number, 384x640 as text."""
    return int(text) if text.isdecimal() else text


def json_object(text):
    """The dict that a JSON object describes."""

    def refuse(constant):  # JSON as Python reads it has NaN and Infinity
        raise ValueError(constant)

    try:
        return dict(json.loads(text, parse_constant=refuse))
    except (ValueError, TypeError) as error:
        message = f'{text!r} is not a JSON object such as {{"dropout": 0.1}}'
        raise argparse.ArgumentTypeError(message) from error


OPTIONS = [
    # The data.
    option("data", list, [], "folders, archives, arrays, module:Class (or Shapes)", nargs="+"),
    option("res", (int, str), 32, "size in pixels, or HEIGHTxWIDTH (default 32)", type=resolution),
    option("flip", bool, RECIPE, "random horizontal flips (default: on for image files)"),
    option("skip_bad", bool, False, "print and count unreadable images, and use others instead"),
    option("val", list, [], "held-out images: a share such as 0.02, or paths as --data", nargs="*"),
    option("workers", int, None, "processes per rank that decode images", 0, stored=False),
    option("pack", str, None, "write the images at --res to this .npz, and stop", stored=False),
    # Text to image.
    option("captions", str, None, "train on captions: .txt files or a .jsonl", nargs="?", const=""),
    option("text_encoder", str, "bytes", "bytes (default), a T5, or an .npy of embeddings"),
    option("text_tokens", int, 64, "length of captions; longer ones are truncated (default 64)", 1),
    # The network.
    option("model", str, "uvit", "uvit, unet, or package.module:Class (default uvit)"),
    option("size", str, RECIPE, "tiny, small, base, paper, text (default: small; tiny on a CPU)"),
    option("model_args", dict, RECIPE, "network arguments to override, as JSON", type=json_object),
    option("init", str, None, "start from the weights of this run, checkpoint or exported model"),
    option("init_weights", str, "ema", "which ones (default ema)", choices=["ema", "net"]),
    # The loss.
    option("schedule", str, RECIPE, "cosine, shifted:64, interpolated:32:256, ..."),
    option("space", str, RECIPE, "space in which the loss compares", choices=["eps", "v"]),
    option("multiscale", bool, RECIPE, "multiscale loss (Eq. 7 and 8)"),
    option("loss", str, None, "module:function that replaces loss.diffusion_loss (same arguments)"),
    option("label_drop", float, 0.1, "probability of dropping a label (default 0.1)", 0, 1),
    # The optimizer.
    option("batch", int, RECIPE, "batch size, over all ranks", 1),
    option("micro", int, RECIPE, "micro-batch size per rank (default: the recipe's, or all)", 1),
    option("steps", int, RECIPE, "number of training steps", 1),
    option("lr", float, RECIPE, "learning rate", 0),
    option("warmup", int, RECIPE, "steps of linear warmup", 0),
    option("decay", float, RECIPE, "last fraction of the steps, over which lr decays to 0", 0, 1),
    option("ema", float, RECIPE, "decay of the EMA weights", 0, 1),
    option("seed", int, 0, "seed of all randomness (default 0)", 0),
    # The device.
    option("device", str, None, "cuda or cpu (default: a GPU if there is one)", stored=False),
    option("compile", bool, RECIPE, "torch.compile (default: on a GPU)"),
    option("bf16", bool, RECIPE, "bfloat16 in the network (default: where the device supports it)"),
    option("fsdp", bool, False, "shard weights, gradients and optimizer over the ranks"),
    option("bench", bool, False, "measure throughput and stop", stored=False, action="store_true"),
    # What a run writes.
    option("out", str, None, "folder of the run (default: runs/DATA-RES)", stored=False),
    option("log_every", int, 100, "steps between log lines (default 100)", 1),
    option("sample_every", int, 5000, "steps between sample grids (default 5000)", 1),
    option("save_every", int, 5000, "steps between checkpoints (default 5000)", 1),
    option("keep", int, 3, "number of checkpoints to keep (default 3)", 1),
    option("tensorboard", bool, False, "also write curves and grids for TensorBoard"),
    option("val_every", int, RECIPE, "steps between held-out losses (default: --sample-every)", 1),
    option("val_images", int, 1000, "number of held-out images to measure (default 1,000)", 1),
    option("fid_every", int, None, "steps between FIDs of the EMA weights (default: never)", 1),
    option("fid_ref", str, None, "statistics to compare with, from fid.py --save-stats"),
    option("fid_images", int, 10_000, "samples per FID (default 10,000)", 2),
    option("fid_features", str, None, "module:Class in Inception's place", stored=False),
]  # fmt: skip

# The settings with a default of their own. `sampling` has no option: a recipe may set it, for
# example to a guidance interval.
DEFAULTS = {row.name: row.default for row in OPTIONS if row.stored and row.default is not RECIPE}
DEFAULTS["sampling"] = {}
NO_OPTION = dict(sampling=dict, beta2=float)  # settings that only recipes choose


def flag(name):
    """The option of a setting: --log-every for log_every."""
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """The options on the command line, as a dict; the others are missing from it."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train simple diffusion.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"train.py: {message}")
    for row in OPTIONS:
        arguments = dict(row.parse)
        if row.kind is bool:
            arguments.setdefault("action", argparse.BooleanOptionalAction)
        elif row.kind is not list:  # the paths of a list are text, argparse's default
            arguments.setdefault("type", row.kind)
        parser.add_argument(flag(row.name), help=row.help, **arguments)
    given = vars(parser.parse_args(argv))
    check_ranges(given)

    # --space and --multiscale choose diffusion_loss, also where a recipe has another loss.
    if {"space", "multiscale"} & given.keys() and given.setdefault("loss", None):
        raise ValueError("--space and --multiscale belong to the loss that --loss replaces")
    if "init_weights" in given and "init" not in given:
        raise ValueError("--init-weights needs --init")
    # The default name of a folder may be that of the run to start from.
    if "init" in given and "out" not in given:
        raise ValueError("--init needs --out, the folder of the new run")
    return given


# ---------------------------------------------------------------- checks


def check_ranges(settings):
    """Raise ValueError for a number outside of its option's range, NaN and infinity."""
    for row in OPTIONS:
        value = settings.get(row.name)
        if not isinstance(value, (int, float)):
            continue
        if not row.low <= value <= row.high or value == math.inf:
            bounds = f"at least {row.low}" if row.high == math.inf else f"{row.low} to {row.high}"
            raise ValueError(f"{flag(row.name)} must be {bounds}, not {value}")


def check_types(settings, folder):
    """Raise ValueError if settings from a checkpoint, which may be corrupt, have a wrong type."""
    kinds = {row.name: row.kind for row in OPTIONS if row.stored} | NO_OPTION
    optional = {row.name for row in OPTIONS if row.default is None} | {"micro"}
    for name in kinds.keys() & settings.keys():
        value = settings[name]
        allowed = {float: (float, int), (int, str): (int, str)}.get(kinds[name], (kinds[name],))
        if type(value) not in allowed and not (value is None and name in optional):
            raise ValueError(f"{folder}: its checkpoint has an invalid {name}: {value!r}")
    if not all(isinstance(path, str) for path in settings.get("data", ())):
        raise ValueError(f"{folder}: its checkpoint has invalid data: {settings['data']!r}")
    val = settings.get("val", [])
    if share_of(val) is None and not all(isinstance(path, str) for path in val):
        raise ValueError(f"{folder}: its checkpoint has an invalid val: {val!r}")


def share_of(val):
    """Return the share of the training data that the setting val holds out; None if it is paths."""
    return val[0] if len(val) == 1 and isinstance(val[0], float) else None


def check_val(given, stored=None, folder=None):
    """Raise ValueError for options of the held-out loss that contradict each other or a run.

    given: the options on the command line. stored: the settings of the run to resume, if any.
    """
    val = given.get("val", (stored or {}).get("val", []))
    for name in ("val_every", "val_images"):
        if name in given and not val:
            raise ValueError(f"{flag(name)} needs --val, which names the held-out images")
    # Another share would train on images that were held out, or hold out images trained on.
    if stored and share_of(val) != share_of(stored.get("val", [])):
        before = share_of(stored.get("val", []))
        was = "without a share" if before is None else f"with the share {before:g}"
        raise ValueError(
            f"{folder} was trained {was} of held-out images, which --val cannot change later: "
            "choose another --out"
        )


# ---------------------------------------------------------------- files and folders


def absolute_paths(given):
    """Make the paths absolute, in place: a run can then be resumed from any folder.

    A share in val becomes a number. Raises ValueError for what --data and --val do not accept.
    """
    for name in {"data", "val"} & given.keys():
        if name == "val" and (share := read_share(given["val"])) is not None:
            given["val"] = [share]
            continue
        if not all(given[name]):
            raise ValueError(f"{flag(name)}: a path is empty")
        classes = [path for path in given[name] if is_dataset_class(path)]
        if classes and (len(given[name]) > 1 or "captions" in given):
            raise ValueError(f"{flag(name)} {classes[0]}: use it alone and without --captions")
        given[name] = classes or [os.path.abspath(path) for path in given[name]]
    for key in ("init", "fid_ref"):
        if key in given:
            given[key] = os.path.abspath(given[key])
    for key in ("captions", "text_encoder"):  # these may also be a name, or empty
        if os.path.exists(given.get(key, "")):
            given[key] = os.path.abspath(given[key])


def read_share(val):
    """Return the share that --val gives as a number; None for paths. An existing file wins.

    Raises ValueError for a number that is not a share.
    """
    try:
        (text,) = val
        share = float(text)
    except ValueError:
        return None
    if os.path.exists(text):
        return None
    if not 0 < share < 1:
        raise ValueError(f"--val {text}: a share must be above 0 and below 1, such as 0.02")
    return share


def default_folder(given):
    """runs/DATA-RES, for example runs/shapes-32."""
    name = "shapes"
    if "data" in given:
        path = given["data"][0]
        if is_dataset_class(path):
            name = path.rpartition(":")[2]
        else:
            name = os.path.splitext(os.path.basename(split_keys(path)[0]))[0]
            # Of shards/train-{0000..0127}.tar: train-0000..0127
            name = re.sub(r"[*?{}\[\]]+", "", name)
    text = "text-" if "captions" in given else ""
    return f"runs/{name}-{text}{given.get('res', DEFAULTS['res'])}"


# ---------------------------------------------------------------- the settings of a run


def choose_recipe(given, device, dataset):
    """Look up the recipe: (size, arguments of the network, training settings).

    A network class from elsewhere may have RECIPES[size][res], and TRAINING[size, res], which
    overrides that of uvit. Raises ValueError for a size or resolution without a recipe.
    """
    model, res = given.get("model", DEFAULTS["model"]), given.get("res", DEFAULTS["res"])
    size = given.get("size", "small" if device.type == "cuda" else "tiny")
    network = net_class(model)

    # A network without recipes has its own default arguments. Its size only chooses the training.
    recipes = RECIPES.get(model) or getattr(network, "RECIPES", {})
    sizes = recipes or RECIPES["unet"]
    if size not in sizes:
        raise ValueError(f"--model {model} has --size {', '.join(sizes)}, not {size}")

    # A non-square resolution without a recipe uses the recipe of its shorter side. For other sides,
    # a recipe is derived.
    by_res = recipes.get(size, {})
    key = res if res in by_res else min(dataset.size)
    net_args = by_res.get(key, {})
    if model in RECIPES and size in DERIVED:
        own_levels = {"channel_multiplier", "patching"} & given.get("model_args", {}).keys()
        key, net_args = derive(model, size, *dataset.size, network, bool(own_levels))
    elif recipes and key not in by_res:
        known = ", ".join(map(str, by_res))
        hint = ": use --size base" if model in RECIPES else ""
        raise ValueError(
            f"--model {model} --size {size} has recipes for --res {known}, not {res}{hint}"
        )
    if size == "text" and "text_tokens" not in dataset.net_fields:
        raise ValueError("--size text needs --captions")

    # More specific rows override more general ones.
    training = TRAINING.get(("uvit", size), TRAINING["uvit", "base"])
    training = training | TRAINING.get((model, size), {}) | TRAINING.get((model, size, key), {})
    training |= getattr(network, "TRAINING", {}).get((size, key), {})
    return size, net_args, training


def make_config(given, device, dataset):
    """All settings of a run: defaults, then the recipe, then the given options.

    Raises ValueError for settings that contradict each other or the data.
    """
    size, recipe, training = choose_recipe(given, device, dataset)
    automatic = dict(
        size=size,
        schedule="cosine" if min(dataset.size) <= 64 else "shifted:64",
        flip=type(dataset) is ImageData,
        micro=None,
        compile=device.type == "cuda",
        bf16=has_bf16(device),
    )

    # These arguments of the network follow from the data. --model-args may only repeat them.
    res = given.get("res", DEFAULTS["res"])
    fixed = dict(res=res if isinstance(res, int) else list(dataset.size))
    fixed |= dict(num_classes=len(dataset.classes)) | dataset.net_fields  # of captions, of latents
    net_args = given.get("model_args", {})
    for key, value in (dict(in_channels=None) | fixed).items():
        if net_args.get(key, value) != value:
            raise ValueError(f"--model-args: {key} follows from the data and the other options")

    if given.get("flip") and dataset.rotate:
        raise ValueError("--flip: the dataset rotates images, and a flip would turn them over")
    if "in_channels" in fixed and (given.get("flip") or given.get("fid_every")):
        raise ValueError("--flip and --fid-every need images, and the data are latents")

    config = DEFAULTS | automatic | training | given
    config |= dict(model_args=recipe | fixed | net_args, classes=dataset.classes)
    config.setdefault("val_every", config["sample_every"])
    check_ranges(config)
    return config


# The settings that a new run takes from the run it starts from: the network, and what it predicts.
INHERITED = ("model", "size", "res", "schedule", "space", "multiscale", "loss", "label_drop")


def inherit(given, source, path):
    """The options of a new run that starts from another one: --init.

    source: the settings of that run. path: its name, for messages. Its network is kept unless
    --size is given. The data, and how long and how fast to train, are not inherited. Raises
    ValueError for invalid settings, and for a loss that must be named again.
    """
    check_types(source, path)
    check_loss(path, source, given)
    settings = {name: source[name] for name in INHERITED if name in source}
    if "captions" in given:
        # The file of a model does not decide which encoder is downloaded, or which file is read.
        encoder = source.get("text_encoder", "bytes")
        if encoder != "bytes" and "text_encoder" not in given:
            raise ValueError(
                f"{path} was trained with --text-encoder {encoder}: repeat that option"
            )
        settings["text_tokens"] = source.get("text_tokens", DEFAULTS["text_tokens"])
    settings |= given
    # A larger image needs more noise: the default of its resolution replaces plain cosine.
    size = pixels(settings["res"])
    keeps_size = size == pixels(source["res"])
    if settings["schedule"] == "cosine" and "schedule" not in given and not keeps_size:
        del settings["schedule"]
    if "size" not in given:
        own = own_arguments(source, size, path)
        settings["model_args"] = own | given.get("model_args", {})
    return settings


def own_arguments(source, size, path):
    """All arguments of a network, for another (height, width), without those that the data decide.

    source: the settings of its run. path: its name, for messages. Raises ValueError.
    """
    parameters = inspect.signature(net_class(source["model"])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    fields = defaults | source["model_args"]
    for name in ("res", "num_classes", "in_channels", "text_tokens", "text_dim", "portrait"):
        fields.pop(name, None)
    # Scale options that name feature map sizes, so that they select the same levels.
    try:
        return fields | scaled_sizes(fields, min(size), min(pixels(source["res"])))
    except TypeError as error:
        raise ValueError(f"{path}: the arguments of its network are invalid") from error


def check_loss(path, stored, given):
    """Raise ValueError if the loss in a checkpoint must be named again, to be imported."""
    loss = stored.get("loss")
    if loss and "loss" not in given and not loss.startswith("related."):
        raise ValueError(f"{path} was trained with --loss {loss}: repeat that option to import it")


def continue_config(given, stored, folder, is_default_folder):
    """The settings of a resumed run: the given options override the stored ones.

    stored: the settings in the newest checkpoint. is_default_folder: True if the folder's name
    follows from the data. Raises ValueError for changes that need a new run, and for a network or
    loss that must be named again, so that an untrusted checkpoint cannot import code.
    """
    check_types(stored, folder)
    check_val(given, stored, folder)
    check_model(folder, stored, given.get("model"))
    check_loss(folder, stored, given)

    def without_recomputation(model_args):
        """Recomputing activations saves memory and changes no result."""
        return {k: value for k, value in model_args.items() if k != "checkpoint_resolutions"}

    model_args = stored["model_args"] | given.get("model_args", {})
    same_net = without_recomputation(model_args) == without_recomputation(stored["model_args"])
    fixed = {"res", "size", "captions", "text_encoder", "text_tokens", "init", "init_weights"}
    if is_default_folder:  # the name of other data has led to this folder
        fixed.add("data")
    changed = sorted(name for name in fixed & given.keys() if given[name] != stored.get(name))
    if changed or not same_net:
        options = ", ".join(map(flag, changed)) or "--model-args"
        raise ValueError(
            f"{folder} holds a run with another {options}: choose another --out, or delete it"
        )
    return stored | given | dict(model_args=model_args)
