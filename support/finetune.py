"""Start training from a trained network: what train.py --init does with its weights.

The new run may have other classes, another resolution, or a network of another size. A tensor that
has the same name and shape in both networks is copied. Two kinds of tensors are adapted:

- Label tables. The rows of classes with the same name are copied. A new class starts at the null
  label's row plus noise.
- Position embeddings are interpolated to the new size of the feature map.

All other tensors keep their random initialization. For another resolution, the same network starts
with a much lower loss than one with another level: docs/training.md has the numbers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import fid
from support.checkpoint import check_model, find_checkpoint, load_model

# The noise of a new class's row, in standard deviations of the table: new rows are as different as
# trained ones. With a tenth of it, three new shapes took twice as many steps.
LABEL_NOISE = 1.0


def load_source(path, which="ema", model=None):
    """Load what --init names: a run, a checkpoint or an exported model. See load_model.

    which: "ema" or "net", the weights to start from. They are the entry "weights" of the result.
    model: the option --model, or None. Every rank must call it. Raises ValueError.
    """
    # All ranks load the same checkpoint, although that run may save a new one meanwhile.
    source = load_model(fid.on_first_rank(find_checkpoint, path))
    check_model(f"--init {path}", source["config"], model)
    if which not in source:
        raise ValueError(
            f"--init {path} is an exported model, which has the EMA weights only: "
            "omit --init-weights net"
        )
    weights = source[which]
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"--init {path}: its weights are not tensors")
    return source | dict(weights=weights)


@torch.no_grad()
def initialize(net, source, config):
    """Copy and adapt the weights of a source, see load_source, into a new network.

    config: the settings of the new run. Returns lines that tell what was adapted, what is new and
    what was dropped. Raises ValueError if no weight fits.
    """
    own = net.state_dict()
    weights = source["weights"]
    tables = label_tables(net, len(config["classes"]))
    classes = config["classes"], source["config"]["classes"]
    lines = []
    copied = {}
    for name in own.keys() & weights.keys():
        new, old = own[name], weights[name].to(own[name].dtype)
        # Label tables: match the rows by the names of the classes.
        if name in tables and old.shape == (len(classes[1]) + 1, *new.shape[1:]):
            copied[name] = new_label_table(old, *classes, config["seed"])
        # Position embeddings: resize the map.
        elif name.endswith("position") and old.ndim == new.ndim == 3 and len(old) == len(new):
            copied[name] = resize_position(old, new.shape[1:])
            if old.shape != new.shape:
                lines.append(f"interpolated {name} from {sides(old)} to {sides(new)}")
        # Anything else must have the same shape.
        elif old.shape == new.shape:
            copied[name] = old
    if not copied:
        raise ValueError("--init: none of its weights fit this network: compare the --model-args")
    net.load_state_dict(own | copied)

    # Tell what happened: a network that is mostly new learns almost from scratch.
    share = sum(own[name].numel() for name in copied) / sum(w.numel() for w in own.values())
    lines = [
        f"{100 * share:.1f} % of the weights start from step {source['step']}",
        *class_lines(*classes),
        *lines,
        *list_modules("new", own.keys() - copied.keys()),
        *list_modules("dropped", weights.keys() - copied.keys()),
    ]
    if config["schedule"] != source["config"]["schedule"]:
        schedules = f"now {config['schedule']}, before {source['config']['schedule']}"
        lines.append(f"another schedule: {schedules}")
    return lines


# ---------------------------------------------------------------- tensors that are adapted


def label_tables(net, num_classes):
    """Return the names of the embeddings of class labels: one row per class, and the null label."""
    return {
        f"{name}.weight"
        for name, module in net.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == num_classes + 1
    }


def new_label_table(old, classes, old_classes, seed):
    """Return the label table for other classes, (len(classes) + 1, C).

    old: the table of old_classes. Both end with the row of the null label.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(classes) + 1, *old.shape[1:], generator=generator)
    null_row = old[-1]
    # Without noise, all new classes would start from the same embedding.
    new = null_row + LABEL_NOISE * old.std() * noise.to(old)
    new[-1] = null_row
    for i, name in enumerate(classes):
        if name in old_classes:
            new[i] = old[old_classes.index(name)]
    return new


def resize_position(old, size):
    """Interpolate position embeddings (C, H, W) to another (height, width)."""
    if old.shape[1:] == size:
        return old
    # align_corners=False: the outer edges of the image stay in place, not the centers of the corner
    # pixels.
    new = F.interpolate(old[None].float(), tuple(size), mode="bilinear", antialias=True)
    return new[0].to(old.dtype)


# ---------------------------------------------------------------- what is printed


def sides(weight):
    """The height and width of position embeddings (C, H, W), as text."""
    return f"{weight.shape[1]}x{weight.shape[2]}"


def class_lines(classes, old_classes):
    """Tell which classes are known and which are new, in at most two lines."""
    if classes == old_classes:
        return []
    known = [name for name in classes if name in old_classes]
    new = [name for name in classes if name not in old_classes]
    lines = []
    if known:
        lines.append(f"{len(known)} classes keep their embedding: {shortened(known)}")
    if new:
        lines.append(f"{len(new)} new classes start at the null label: {shortened(new)}")
    return lines or ["the new run has no classes: it starts from the null label"]


def list_modules(kind, names):
    """Tell which modules are new, or dropped, in at most one line. names: those of weights."""
    # The block is enough: down.0.1 for down.0.1.conv1.weight.
    modules = sorted({".".join(name.split(".")[:-1][:3]) or name for name in names})
    return [f"{kind}: {shortened(modules)}"] if modules else []


def shortened(names):
    """Join names; of many, name the first ten."""
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + rest
