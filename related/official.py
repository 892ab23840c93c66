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
import re
import sys
import zipfile
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from related import common, dico, dimr, dit, lit
from related.official_names import DICO_NAMES, DIMR_NAMES, DIT_NAMES, block_numbers
from schedule import alpha_sigma
from support.checkpoint import NO_DATA, write_model
from support.runtime import run_command
from train import DEFAULTS

# ---------------------------------------------------------------- the authors' schedules
# Step i from 0 to 999 adds noise of variance beta_i. The share of the signal that is left is
# alpha_bar_i = (1 - beta_0) ... (1 - beta_i), which is alpha^2 of this project.

# DiT and DiCo have the betas of DDPM (arXiv 2006.11239), DiMR has those of Stable Diffusion.
BETAS = dict(
    linear=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
    scaled_linear=torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square(),
)


def log_alpha_bar(name):
    """Return log alpha_bar (1000,) float64 for the name of the betas."""
    return torch.log1p(-BETAS[name]).cumsum(0)


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
    return logsnr_at(999 * torch.as_tensor(t), log_alpha_bar("linear"))


def scaled_linear_schedule(t):
    """logsnr(t) of DiMR, see linear_schedule."""
    return logsnr_at(999 * torch.as_tensor(t), log_alpha_bar("scaled_linear"))


# ---------------------------------------------------------------- the network


class Family(NamedTuple):
    """What the released networks of one paper have in common."""

    network: type
    schedule: str  # a name of BETAS
    names: dict  # of the weights: a table of official_names.py
    variance: dict  # arguments that make the network predict a variance, too


FAMILIES = {
    "DiT": Family(dit.DiT, "linear", DIT_NAMES, dict(learned_variance=True)),
    "DiCo": Family(dico.DiCo, "linear", DICO_NAMES, dict(out_channels=8)),
    "DiMR": Family(dimr.DiMR, "scaled_linear", DIMR_NAMES, {}),
    # Not released: what lit.py makes of a DiT.
    "LiT": Family(lit.LiT, "linear", {}, dict(learned_variance=True)),
}


class Official(nn.Module):
    """A released network as v_hat = net(z, logsnr, label), on latents of 4 channels.

    family: a key of FAMILIES. res: side of the latents. fields: the other arguments of the
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
        table = log_alpha_bar(FAMILIES[family].schedule)
        self.register_buffer("table", table, persistent=False)

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


def weight_names(net):
    """Yield the name of each weight of an Official, and the authors' name of it."""
    names = FAMILIES[net.family].names
    if net.family == "DiMR":
        names = block_numbers(net.net) | names
    for ours, _ in net.net.named_parameters():
        theirs = ours
        for pattern, replacement in names.items():
            theirs = re.sub(pattern, replacement, theirs)
        yield f"net.{ours}", theirs


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
    # A latent stands for 8 x 8 pixels.
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
        # The training checkpoints of DiT and DiCo also contain their options, a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can raise any exception
        raise ValueError(
            f"{path} is damaged, or contains more than weights ({type(error).__name__})"
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
    names = dict(weight_names(net))
    # The fixed positions of DiT are stored, too.
    is_dit = net.family == "DiT"
    needed = {*names.values(), "pos_embed"} if is_dit else {*names.values()}
    for name in sorted(needed ^ state.keys(), key=str):
        problem = "unknown" if name in state else "missing"
        raise ValueError(f"{path}: {name} is {problem}, so it is no {net.family} of this size")

    weights = {}
    for ours, theirs in names.items():
        wanted, value = net.get_parameter(ours), state[theirs]
        # DiMR numbers its positions, we have a grid (H, W, C).
        shape = wanted.flatten(0, 1).shape if ours.endswith(".position") else wanted.shape
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(
                f"{path}: {theirs} is {value.dtype} {tuple(value.shape)}, "
                f"and this size of {net.family} needs floats {tuple(shape)}"
            )
        if theirs.endswith(".nodecay_weight"):
            value = value.float() + 1  # DiMR stores w - 1
        weights[ours] = value.float().reshape(wanted.shape).contiguous()

    if is_dit:
        position = dit.sine_positions(net.net.grid, net.net.position.shape[1])[None]
        stored = state["pos_embed"]
        if stored.shape != position.shape or not (stored - position).abs().max() < 1e-5:
            raise ValueError(f"{path}: pos_embed is not the sines and cosines of this size")
    return weights


def write_official(path, weights, model_args, step=0, images=0):
    """Write an Official as an exported model, for sample.py and others.

    path: a name that ends in .pt or .safetensors. weights: see convert. model_args: of Official.
    """
    config = DEFAULTS | dict(
        data=[NO_DATA],
        # The classes of ImageNet by number: their names are long, and some are not unique.
        classes=[str(i) for i in range(model_args["num_classes"])],
        res=model_args["res"],
        model="related.official:Official",
        model_args=model_args,
        schedule=f"related.official:{FAMILIES[model_args['family']].schedule}_schedule",
        # The authors train with the error of eps. Latents cannot be mirrored.
        space="eps",
        flip=False,
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

        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:  # diffusers raises errors of many kinds, on several lines
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--vae {name} cannot be loaded (pip install diffusers): {line}"
        ) from error


def encode(options, device):
    """Write the latents of a dataset as an .npz that train.py can read."""
    if options.res % 8:
        raise ValueError(f"--res {options.res} must be divisible by 8")
    vae = load_autoencoder(options.vae, device)
    config = dict(data=options.files, res=options.res)
    data = common.open_images(config, device, import_classes=True)

    def distribution(x):
        latent = vae.encode(x).latent_dist
        return SCALE * latent.mean, SCALE * latent.std

    indices = range(len(data))
    z, label = common.draw_latents(distribution, data, indices, options.batch, options.seed, device)
    common.write_latents(options.out, z, label, data.classes)


def decode(options, device):
    """Write the images of latents that sample.py or `encode` wrote."""
    vae = load_autoencoder(options.vae, device)

    def images_of(z):
        return vae.decode(z.to(device) / SCALE).sample

    common.decode_latents(options.files[0], 4, images_of, options.batch, options.out)


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
    several = options.what == "encode"
    if not options.files or (len(options.files) > 1 and not several):
        raise ValueError(f"{options.what} needs {'images' if several else 'one file'}")
    if not options.out or not options.out.endswith(ending):
        raise ValueError(f"{options.what} needs --out, a file that ends in {' or '.join(ending)}")
    if options.what != "convert" and not options.vae:
        raise ValueError(f"{options.what} needs --vae, such as stabilityai/sd-vae-ft-ema")
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)


def convert_command(options):
    """Convert one released file. Raises ValueError."""
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
