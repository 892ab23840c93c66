"""Released weights: DiT, DiCo and DiMR with the weights that their authors have published.

The released networks predict eps, and some of them a variance, at 1,000 discrete times. `Official`
wraps one of them as a net of this project, v_hat = net(z, logsnr, label): it finds the time of a
logsnr in the authors' schedule, and converts eps to v. `convert` renames the weights of a released
file, checks every name and shape, and writes a model that sample.py and other commands can read.

    python -m related.official              # the released files and their parameters
    python -m related.official convert DiT-XL-2-256x256.pt --out dit.pt
    python sample.py dit.pt --n 8 --label 207 --guidance 4 --steps 249 --out z.npz
    python -m related.official decode z.npz --vae stabilityai/sd-vae-ft-ema --out grid.png
    python -m related.official encode photos/ --res 256 --vae stabilityai/sd-vae-ft-ema --out z.npz

All of these networks work on the latents of Stable Diffusion's autoencoder. `decode` and `encode`
need the package diffusers. Other programs can read and write the latents as well: z.npz holds z,
floats (N, 4, H, W), and for `encode` the labels y.
"""

import argparse
import os
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from related import common, dico, dimr, dit
from sample import to_float, to_uint8
from schedule import alpha_sigma
from support.checkpoint import NO_DATA, write_model
from support.data import Latents, load_batch
from support.runtime import run_command, writing
from train import DEFAULTS

# ---------------------------------------------------------------- the authors' schedules
# Step i from 0 to 999 adds noise of variance beta_i. The share of the signal that is left is
# alpha_bar_i = (1 - beta_0) ... (1 - beta_i), which is alpha^2 of this project.


def linear():
    """log alpha_bar (1000,) float64 of DiT and DiCo: the betas of DDPM (arXiv 2006.11239)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.log1p(-betas).cumsum(0)


def scaled_linear():
    """log alpha_bar (1000,) float64 of DiMR: the betas of Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return torch.log1p(-betas).cumsum(0)


# Between two discrete times, log alpha_bar is linear. DPM-Solver, with which DiMR's authors sample,
# defines the noise between them in this way, too. The alternative is to round to the nearest time,
# which is off by up to half a step.


def logsnr_at(index, table):
    """Return logsnr at times index of any shape, from 0 to 999, not necessarily integers.

    table: log alpha_bar (1000,).
    """
    table = table.to(index.dtype).to(index.device)
    below = index.floor().clamp(0, 998)
    i = below.long()
    value = torch.lerp(table[i], table[i + 1], index - below)
    # logsnr = log(alpha_bar / (1 - alpha_bar)). expm1 is precise at low noise.
    return -torch.log(torch.expm1(-value))


def index_at(logsnr, table):
    """Return the times from 0 to 999 of logsnr (B,): the inverse of logsnr_at.

    Levels outside of the 1,000 times get the first or the last one.
    """
    table = -table.to(logsnr.dtype).to(logsnr.device)  # rising
    value = F.softplus(-logsnr)  # -log alpha^2
    above = torch.searchsorted(table, value).clamp(1, 999)
    fraction = (value - table[above - 1]) / (table[above] - table[above - 1])
    return (above - 1 + fraction).clamp(0, 999)


def linear_schedule(t):
    """logsnr(t) of DiT and DiCo: t = 0 is their time 0, t = 1 is 999. Any shape."""
    return logsnr_at(999 * torch.as_tensor(t), linear())


def scaled_linear_schedule(t):
    """logsnr(t) of DiMR, see linear_schedule."""
    return logsnr_at(999 * torch.as_tensor(t), scaled_linear())


# ---------------------------------------------------------------- names of the weights
# Each function yields pairs of modules: the name in our network, and the name in the authors'.


def dit_modules(net):
    """Yield the pairs of a DiT."""
    yield "patchify", "x_embedder.proj"
    yield "condition.dense1", "t_embedder.mlp.0"
    yield "condition.dense2", "t_embedder.mlp.2"
    yield "condition.label", "y_embedder.embedding_table"
    for i in range(len(net.blocks)):
        yield f"blocks.{i}.modulation", f"blocks.{i}.adaLN_modulation.1"
        yield f"blocks.{i}.attention.qkv", f"blocks.{i}.attn.qkv"
        yield f"blocks.{i}.attention.proj", f"blocks.{i}.attn.proj"
        yield f"blocks.{i}.mlp.0", f"blocks.{i}.mlp.fc1"
        yield f"blocks.{i}.mlp.2", f"blocks.{i}.mlp.fc2"
    yield "modulation", "final_layer.adaLN_modulation.1"
    yield "head", "final_layer.linear"


def dico_modules(net):
    """Yield the pairs of a DiCo."""
    yield "stem", "x_embedder.proj"
    for i in range(3):
        yield f"conditions.{i}.dense1", f"t_embedder_{i + 1}.mlp.0"
        yield f"conditions.{i}.dense2", f"t_embedder_{i + 1}.mlp.2"
        yield f"conditions.{i}.label", f"y_embedder.embedding_table_{i}"
    levels = dict(down1="encoder_level_1", down2="encoder_level_2", middle="latent")
    levels |= dict(up2="decoder_level_2", up1="decoder_level_1")
    layers = dict(modulation="adaLN_modulation.1", conv1="conv1", depthwise="conv2", conv3="conv3")
    layers |= dict(attention="ca.1", mlp1="conv4", mlp2="conv5")
    for level, their_level in levels.items():
        for i in range(len(getattr(net, level))):
            for layer, their_layer in layers.items():
                yield f"{level}.{i}.{layer}", f"{their_level}.{i}.{their_layer}"
    yield "shrink1", "down1_2.body.0"
    yield "shrink2", "down2_3.body.0"
    yield "grow2", "up3_2.body.0"
    yield "grow1", "up2_1.body.0"
    yield "join2", "reduce_chan_level2"
    yield "join1", "reduce_chan_level1"
    yield "modulation", "final_layer.adaLN_modulation.1"
    yield "head", "final_layer.out_proj"


def dimr_modules(net):
    """Yield the pairs of a DiMR. The norms have a gain and a bias that depend on time."""
    for i, branch in enumerate(net.branches):
        ours, theirs = f"branches.{i}", f"stages.{i}"
        yield f"{ours}.patchify", f"{theirs}.input_layer.1"
        yield ours, f"{theirs}.input_layer.3.position_embeddings"
        if branch.label is not None:
            yield f"{ours}.label", f"{theirs}.class_embeds"

        # The features of the coarser branch, and the prediction.
        norms = dict(norm="output_layer.0")
        if i > 0:
            yield f"{ours}.expand", f"{theirs}.upsample.1.kernel"
            norms |= dict(norm_below="upsample.0", norm_expanded="upsample.2")
        for norm, their_norm in norms.items():
            yield f"{ours}.{norm}.gain", f"{theirs}.{their_norm}.weight"
            yield f"{ours}.{norm}.bias", f"{theirs}.{their_norm}.bias"
        yield f"{ours}.head", f"{theirs}.output_layer.2"

        # The authors number all blocks of a branch, we number the halves.
        half = len(branch.first)
        blocks = [f"first.{k}" for k in range(half)]
        blocks += ["middle", *(f"second.{k}" for k in range(half))]
        for k, block in enumerate(blocks):
            yield from dimr_block(f"{ours}.{block}", f"{theirs}.blocks.{k}", branch.label)
        for k in range(half):
            yield f"{ours}.merge.{k}", f"{theirs}.skip_denses.{k}"


def dimr_block(ours, theirs, is_transformer):
    """Yield the pairs of one block of a DiMR."""
    if is_transformer is not None:
        yield f"{ours}.attention.norm.gain", f"{theirs}.block1.norm.scale"
        yield f"{ours}.attention.qkv", f"{theirs}.block1.query_key_value"
        yield f"{ours}.attention.out", f"{theirs}.block1.dense"
    else:
        yield f"{ours}.conv", f"{theirs}.block1.1"
    yield f"{ours}.mlp.norm.gain", f"{theirs}.block2.norm.scale"
    for layer in ("w0", "w1", "w2"):
        yield f"{ours}.mlp.{layer}", f"{theirs}.block2.{layer}"


# Weights of a module with another name: those of dimr.TimeParameter, and the positions of DiMR.
LEAVES = dict(p0="param0", p1="param1", w="nodecay_weight", b="nodecay_bias", position="weight")


def weight_names(net):
    """Yield the name of each weight of an Official, and the authors' name of it."""
    for ours, theirs in FAMILIES[net.family].modules(net.net):
        for leaf, _ in net.net.get_submodule(ours).named_parameters(recurse=False):
            yield f"net.{ours}.{leaf}", f"{theirs}.{LEAVES.get(leaf, leaf)}"


# ---------------------------------------------------------------- the network


class Family(NamedTuple):
    """What the released networks of one paper have in common."""

    network: type
    table: object  # function returning log alpha_bar; with "_schedule", the name of the schedule
    modules: object  # function yielding the pairs of names
    variance: dict  # arguments that make the network predict a variance, too


FAMILIES = {
    "DiT": Family(dit.DiT, linear, dit_modules, dict(learned_variance=True)),
    "DiCo": Family(dico.DiCo, linear, dico_modules, dict(out_channels=8)),
    "DiMR": Family(dimr.DiMR, scaled_linear, dimr_modules, {}),
}


class Official(nn.Module):
    """A released network as v_hat = net(z, logsnr, label), on latents of 4 channels.

    family: "DiT", "DiCo" or "DiMR". res: side of the latents. fields: the other arguments of the
    network's class. Raises ValueError for another family.
    """

    def __init__(self, family, res, num_classes=1000, in_channels=4, **fields):
        super().__init__()
        if family not in FAMILIES or in_channels != 4:
            raise ValueError(f"{family} on {in_channels} channels is no {', '.join(FAMILIES)} on 4")
        self.family = family
        self.num_classes = num_classes
        fields |= FAMILIES[family].variance
        self.net = FAMILIES[family].network(res, num_classes, in_channels=in_channels, **fields)
        # The same for every call: on a GPU it is copied once.
        self.register_buffer("table", FAMILIES[family].table(), persistent=False)

    def forward(self, z, logsnr, label=None, variance=False):
        """z: (B, 4, H, W). logsnr: (B,). label: (B,) int64 or None. Returns v_hat like z.

        variance: also return the predicted variance, as dit.DiT does. Raises ValueError for DiMR,
        which does not predict one.
        """
        family = FAMILIES[self.family]
        if variance and not family.variance:
            raise ValueError(f"{self.family} predicts no variance")

        # The authors' network at their time. Its first outputs are eps.
        index = index_at(logsnr, self.table)
        if self.family == "DiMR":
            # DiMR counts times from 1 to 1000, and scales them to tau from -1 to 1.
            out = self.net.branches_at(z, (index + 1) / 500 - 1, label)[0]
        else:
            out = self.net.at_time(z, index, label)
        out = out.to(z.dtype)

        # z = alpha x + sigma eps and v = alpha eps - sigma x give v = (eps - sigma z) / alpha. At
        # time 999 alpha is 0.006 (DiMR: 0.07). There, small errors of eps are large errors of v.
        alpha, sigma = alpha_sigma(logsnr, like=z)
        v_hat = (out[:, :4] - sigma * z) / alpha
        if not variance:
            return v_hat
        # The networks predict from -1 to 1: from the lower bound of the variance to the upper.
        return v_hat, (out[:, 4:] + 1) / 2


def on_meta(model_args):
    """Build an Official without memory for its weights."""
    with torch.device("meta"):
        return Official(**model_args)


# ---------------------------------------------------------------- the released files


class Release(NamedTuple):
    """One released file."""

    family: str
    size: str
    published: str  # the parameters that the authors report
    steps: int  # training steps
    source: str  # where to find it
    pixels: int = 256  # the side of the images


_DIT = "dl.fbaipublicfiles.com/DiT/models"
_DICO = "huggingface.co/shallowdream204/DiCo"
_DIMR = "huggingface.co/QHL067/DiMR"
_TSTITCH = "github.com/NVlabs/T-Stitch"
RELEASES = {
    "DiT-XL-2-256x256.pt": Release("DiT", "XL", "675 M", 7_000_000, _DIT),
    "DiT-XL-2-512x512.pt": Release("DiT", "XL", "675 M", 3_000_000, _DIT, pixels=512),
    "dit_s_256.pt": Release("DiT", "S", "33 M", 5_000_000, _TSTITCH),
    "dit_b_256.pt": Release("DiT", "B", "131 M", 1_600_000, _TSTITCH),
    "DiCo-S-400K-256x256.pt": Release("DiCo", "S", "33.1 M", 400_000, _DICO),
    "DiCo-B-400K-256x256.pt": Release("DiCo", "B", "130.0 M", 400_000, _DICO),
    "DiCo-L-400K-256x256.pt": Release("DiCo", "L", "463.9 M", 400_000, _DICO),
    "DiCo-XL-400K-256x256.pt": Release("DiCo", "XL", "701.2 M", 400_000, _DICO),
    "DiCo-XL-3750K-256x256.pt": Release("DiCo", "XL", "701.2 M", 3_750_000, _DICO),
    "DiMR-XL_2R_800epochs.pth": Release("DiMR", "XL/2R", "505 M", 1_000_000, _DIMR),
    "DiMR-G_2R_800epochs.pth": Release("DiMR", "G/2R", "1.06 B", 1_000_000, _DIMR),
}


def arguments(release):
    """Return the arguments of Official for a released file, as a dict."""
    if release.family == "DiT":
        fields = dit.CONFIGS[release.size]
    else:
        fields = (dico if release.family == "DiCo" else dimr).CONFIGS[release.size][0]
    # Official adds the arguments for the variance itself. A latent stands for 8 x 8 pixels.
    own = FAMILIES[release.family].variance
    fields = {key: value for key, value in fields.items() if key not in own}
    return fields | dict(family=release.family, num_classes=1000, res=release.pixels // 8)


# ---------------------------------------------------------------- conversion


def read_released(path):
    """Return the state dict of a released file: its EMA weights. Raises ValueError.

    Nothing in the file is executed. Releases are a plain state dict, or a checkpoint of the
    authors' training with the EMA weights under "ema".
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        is_zip = zipfile.is_zipfile(path)  # older files cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can raise any exception
        # The training checkpoints of DiT and DiCo also contain an argparse.Namespace.
        raise ValueError(
            f"{path} is damaged, or contains more than tensors ({type(error).__name__}). If it is "
            "a training checkpoint of the authors, extract its weights first: import argparse, "
            "torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
            f"torch.save(torch.load({path!r})['ema'], 'ema.pt')"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} holds neither a state dict nor one under the name ema")
    return state


def convert(path, state, model_args):
    """Return the weights of an Official, as a state dict, from the authors' state dict.

    path: for messages. state: see read_released. model_args: the arguments of Official. Each entry
    is used exactly once. Raises ValueError, which names the first one that is missing, unknown, or
    of another shape.
    """
    net = on_meta(model_args)
    state = dict(state)
    weights = {}

    def take(name, shape):
        if name not in state:
            raise ValueError(f"{path}: {name} is missing, so it is no {net.family} of this size")
        value = state.pop(name)
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {value.dtype} {tuple(value.shape)}, "
                f"and this size of {net.family} needs floats {tuple(shape)}"
            )
        return value.float()

    for ours, theirs in weight_names(net):
        wanted = net.get_parameter(ours)
        is_position = ours.endswith(".position")
        # DiMR numbers its positions, we have a grid (H, W, C).
        value = take(theirs, wanted.flatten(0, 1).shape if is_position else wanted.shape)
        if theirs.endswith(".nodecay_weight"):
            value = value + 1  # DiMR stores w - 1
        weights[ours] = value.reshape(wanted.shape).contiguous()

    # The fixed positions of DiT are stored, too.
    if net.family == "DiT":
        position = dit.sine_positions(net.net.grid, net.net.position.shape[1])
        error = (take("pos_embed", (1, *position.shape)) - position).abs().max()
        if not error < 1e-5:
            raise ValueError(f"{path}: pos_embed is off by {error:.1g} from sines and cosines")

    for name in state:
        raise ValueError(f"{path}: {name} is unknown, so it is no {net.family} of this size")
    return weights


def write_official(path, weights, model_args, step=0, images=0):
    """Write an Official as an exported model, for sample.py and others.

    path: a name that ends in .pt or .safetensors. weights: see convert. model_args: of Official.
    """
    table = FAMILIES[model_args["family"]].table
    config = DEFAULTS | dict(
        data=[NO_DATA],
        # The classes of ImageNet by number: their names are long, and some are not unique.
        classes=[str(i) for i in range(model_args["num_classes"])],
        res=model_args["res"],
        model="related.official:Official",
        model_args=model_args,
        schedule=f"related.official:{table.__name__}_schedule",
        bf16=False,
    )
    write_model(path, weights, step=step, images=images, config=config)


# ---------------------------------------------------------------- latents

SCALE = 0.18215  # of the latents; it makes their variance about 1


def load_autoencoder(name, device):
    """Return Stable Diffusion's autoencoder from diffusers. Raises ValueError.

    name: of a model on huggingface.co, or a folder.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("--vae needs: pip install diffusers") from error
    try:
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:  # diffusers raises errors of many kinds, on several lines
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--vae {name} cannot be loaded: {line}") from error


def encode(options, device):
    """Write the latents of a dataset as an .npz that train.py can read."""
    if options.res % 8:
        raise ValueError(f"--res {options.res} must be divisible by 8")
    vae = load_autoencoder(options.vae, device)
    config = dict(data=options.files, res=options.res)
    data = common.open_images(config, device, import_classes=True)
    latents, labels = [], []
    for first in range(0, len(data), options.batch):
        numbers = range(first, min(first + options.batch, len(data)))
        images, label = load_batch(data, numbers)
        latent = vae.encode(to_float(images.to(device))).latent_dist
        # The noise of an image depends on the seed and its number alone.
        noise = common.noise_by_number(options.seed, numbers, latent.mean.shape[1:], device)()
        latents.append((SCALE * (latent.mean + latent.std * noise)).cpu())
        labels.append(label.cpu())
    z = torch.cat(latents)
    arrays = dict(z=z.numpy())
    if data.classes:
        arrays |= dict(y=torch.cat(labels).numpy(), classes=data.classes)
    with writing(options.out) as file:
        np.savez(file, **arrays)
    print(f"wrote {len(z)} latents {tuple(z.shape[1:])} to {options.out}")


def decode(options, device):
    """Write the images of latents that sample.py or `encode` wrote."""
    if len(options.files) != 1:
        raise ValueError("decode needs one file of latents")
    data = Latents(options.files[0])
    z, label = load_batch(data, range(len(data)))
    if z.shape[1] != 4:
        raise ValueError(f"{options.files[0]} holds latents with {z.shape[1]} channels, not 4")
    vae = load_autoencoder(options.vae, device)
    images = []
    for part in z.split(options.batch):
        x = vae.decode(part.to(device) / SCALE).sample
        images.append(to_uint8(x).permute(0, 2, 3, 1).cpu())  # (B, H, W, 3)
    common.write_images(options.out, torch.cat(images), label, data.classes)


# ---------------------------------------------------------------- the command


def print_releases():
    """Print the released files, their parameters and those that the authors report."""
    for file, release in RELEASES.items():
        net = on_meta(arguments(release))
        parameters = sum(p.numel() for p in net.parameters())
        print(
            f"{file:24s}  {release.family + '-' + release.size:10s} {release.pixels} px, "
            f"{parameters:13,d} parameters ({release.published} published), {release.source}"
        )


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="official",
        description="Convert released weights, and encode and decode their latents.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"official: {message}")
    add = parser.add_argument
    commands = ["convert", "encode", "decode"]
    add("what", nargs="?", choices=commands, help="without it, list the released files")
    add("files", nargs="*", help="convert: a released file; encode: images; decode: latents.npz")
    add("--out", help="convert: .pt or .safetensors; encode: .npz; decode: .png or .npz")
    release_help = "convert: the released file that this one is, if its name is another"
    add("--release", choices=RELEASES, metavar="NAME", help=release_help)
    add("--vae", metavar="NAME", help="the autoencoder: stabilityai/sd-vae-ft-ema, or a folder")
    add("--res", type=int, default=256, help="encode: side of the images (default 256)")
    add("--batch", type=int, default=8, help="encode, decode: batch size (default 8)")
    add("--seed", type=int, default=0, help="encode: seed of the noise")
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    return parser


def check_options(options):
    """Check the options. Raises ValueError."""
    common.check_numbers(options, ("res", "batch"), ("seed",))
    endings = dict(convert=(".pt", ".safetensors"), encode=(".npz",), decode=(".png", ".npz"))
    ending = endings[options.what]
    if not options.files:
        raise ValueError(f"{options.what} needs a file")
    if not options.out or not options.out.endswith(ending):
        raise ValueError(f"{options.what} needs --out, a file that ends in {' or '.join(ending)}")
    if options.what != "convert" and not options.vae:
        raise ValueError(f"{options.what} needs --vae, such as stabilityai/sd-vae-ft-ema")
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)


def convert_command(options):
    """Convert one released file. Raises ValueError."""
    if len(options.files) != 1:
        raise ValueError("convert needs one file")
    path = options.files[0]
    name = options.release or os.path.basename(path)
    if name not in RELEASES:
        raise ValueError(
            f"{path} is no name of a release: add --release, as in {', '.join(RELEASES)}"
        )
    if os.path.exists(options.out):
        raise ValueError(f"--out {options.out} already exists: choose another name, or delete it")
    release = RELEASES[name]
    model_args = arguments(release)
    weights = convert(path, read_released(path), model_args)
    images = release.steps * (1024 if release.family == "DiMR" else 256)
    write_official(options.out, weights, model_args, release.steps, images)
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"wrote {options.out}: {parameters:,} parameters. Sample: python sample.py {options.out}")


@torch.no_grad()
def main(argv=None):
    """Parse the options and run the command."""
    options = make_parser().parse_args(argv)
    if options.what is None:
        return common.introduce(__doc__, print_releases)
    check_options(options)
    if options.what == "convert":
        return convert_command(options)
    device = common.one_process(options.device)
    if options.what == "encode":
        encode(options, device)
    else:
        decode(options, device)


if __name__ == "__main__":
    run_command(main)
