"""ViTok (Hansen-Estruch, Yan, Chung, ..., Chen 2025, arXiv 2501.09755): a transformer autoencoder.

Patches of p x p pixels become tokens. An encoder turns each token into c latent floats, a mean and
a variance, and a decoder turns them back into pixels. The claim: the number E of latent floats, c
times the number of tokens, determines the quality of reconstructions, and not the compute.
Stage 1 trains both halves by MSE and KL; stage 2 trains the decoder alone, with a discriminator.
A diffusion model is then trained on the latents (c, H / p, W / p).

In video, tubelets of q frames of p x p pixels become tokens. Latents are (c, T / q, H / p, W / p).
Our diffusion models are for images. Time is folded into channels for them: (c T / q, H / p, W / p).

    python -m related.vitok                                  # published sizes: parameters and GMAC
    python -m related.vitok train runs/vitok --res 32 --patch 4 --channels 8     # stage 1
    python -m related.vitok tune runs/vitok                                      # stage 2
    python -m related.vitok test runs/vitok --out grid.png   # PSNR, SSIM, pairs of images
    python -m related.vitok encode runs/vitok --n 50000 --out latents.npz
    python train.py --data latents.npz --res 8 --size tiny --out runs/latents
    python sample.py runs/latents --n 60 --out z.npz
    python -m related.vitok decode runs/vitok --data z.npz --out grid.png
    python -m related.vitok train runs/video --frames 8 --tubelet 4    # and so on, for video

From the paper: SwiGLU, rotary positions on two or three axes, the weights of the losses. From the
first author's later code: hidden channels, biases, the mean in KL. Left out: LPIPS, which needs a
network trained on photographs. The small discriminator, which sees single frames, is ours.
"""

import argparse
import copy
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from related import common
from related.common import progress_printer, reading
from related.dit import rope_angles, rotated
from related.reconstruction import Discriminator, discriminator_loss, psnr, ssim
from related.video import fold, frames_of, open_data, unfold, write_pairs
from sample import mix_seed, to_float
from support.data import collate, image_order
from support.runtime import has_bf16, run_command, writing
from support.settings import absolute_paths
from train import ema_update
from unet import attend

# ---------------------------------------------------------------- the network


class Block(nn.Module):
    """A transformer block with rotary positions and a SwiGLU MLP. x: (B, N, C)."""

    def __init__(self, width, num_heads):
        super().__init__()
        hidden = int(2.67 * width)
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.w0 = nn.Linear(width, hidden)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x, angles):
        # Self-attention; queries and keys are rotated by their positions.
        h = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = h.transpose(1, 3).unbind(2)  # (B, heads, N, dim) each
        h = attend(rotated(q, angles), rotated(k, angles), v)
        x = x + self.out(h.transpose(1, 2).flatten(2))

        # The MLP: W2 (SiLU(W0 x) * W1 x).
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w0(h)) * self.w1(h))


class Transformer(nn.Module):
    """Blocks and a final norm, for tokens (B, N, C) on a grid (H, W) or (T, H, W)."""

    def __init__(self, width, depth, num_heads):
        super().__init__()
        if width % num_heads or width // num_heads % 4:
            raise ValueError(
                f"a width of {width} with {num_heads} heads does not work: "
                "width / heads must be a whole number that 4 divides"
            )
        self.dim = width // num_heads  # channels of a head
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, grid):
        # Axial positions: the rotated pairs of channels are split over two axes for images, over
        # three for video.
        angles = rope_angles(grid, self.dim).to(x.device)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}  # width, blocks, heads


class ViTok(nn.Module):
    """The autoencoder, for images or clips of any size that the patches divide.

    patch: p. channels: c. encoder, decoder: (width, blocks, heads) each. tubelet: q, the number of
    frames of a patch of video, or 0 for images.
    """

    def __init__(self, patch=16, channels=16, encoder=SIZES["S"], decoder=SIZES["B"], tubelet=0):
        super().__init__()
        self.channels = channels
        self.tubelet = tubelet
        # The sides of a patch. For video, it is a tubelet of q frames.
        self.sides = (tubelet, patch, patch) if tubelet else (patch, patch)
        conv = nn.Conv3d if tubelet else nn.Conv2d
        transposed = nn.ConvTranspose3d if tubelet else nn.ConvTranspose2d

        self.patchify = conv(3, encoder[0], self.sides, self.sides)
        self.encoder = Transformer(*encoder)
        self.to_latent = nn.Linear(encoder[0], 2 * channels)
        self.from_latent = nn.Linear(channels, decoder[0])
        self.decoder = Transformer(*decoder)
        self.to_pixels = transposed(decoder[0], 3, self.sides, self.sides)

    def floats(self, *size):
        """Return E, the number of latent floats. size: H, W of an image or T, H, W of a clip."""
        return self.channels * math.prod(n // side for n, side in zip(size, self.sides))

    def encode(self, x):
        """Return mean and log-variance of the latents, (B, c, H / p, W / p) each.

        x: (B, 3, H, W) in [-1, 1]. For video it is (B, 3, T, H, W), and the latents are (B, c,
        T / q, H / p, W / p). Raises ValueError for another shape, or sides that p or q do not
        divide.
        """
        size = x.shape[2:]
        if len(size) != len(self.sides):
            kind = "clips (3, T, H, W)" if self.tubelet else "images (3, H, W)"
            raise ValueError(f"the autoencoder takes {kind}, not {tuple(x.shape[1:])}")
        if any(n % side for n, side in zip(size, self.sides)):
            raise ValueError(
                f"patches of {' x '.join(map(str, self.sides))} do not divide "
                f"{'x'.join(map(str, size))} pixels"
            )
        # Patches become tokens, and each token becomes c means and c log-variances.
        h = self.patchify(x)  # (B, C, H / p, W / p)
        grid = h.shape[2:]
        h = self.to_latent(self.encoder(h.flatten(2).mT, grid))  # (B, N, 2 c)
        mean, logvar = h.mT.unflatten(2, grid).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """Return images (B, 3, h p, w p), about [-1, 1]. latent: (B, c, h, w).

        For video, latents (B, c, t, h, w) become clips (B, 3, t q, h p, w p).
        """
        # The mirror image of encode: each token becomes a patch.
        grid = latent.shape[2:]
        h = self.decoder(self.from_latent(latent.flatten(2).mT), grid)  # (B, h w, C)
        return self.to_pixels(h.mT.unflatten(2, grid))

    def forward(self, x):
        """Return a reconstruction from sampled latents, their mean and their log-variance."""
        mean, logvar = self.encode(x)
        # The reparameterization trick: gradients pass through the draw.
        latent = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return self.decode(latent), mean, logvar


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over all floats. Returns (B,)."""
    # The first author's code averages, and does not add. A weight of 1e-3 is therefore tiny.
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


# ---------------------------------------------------------------- training


def fit(net, data, *, steps, batch, lr, beta=1e-3, gan=0.0, seed=0, device="cpu"):
    """Train a ViTok in place on images or clips. Return a copy with EMA weights, in eval mode.

    beta: the weight of KL. gan: 0 for stage 1; otherwise stage 2, with this weight of the
    discriminator, in which the encoder stays as it is.
    """
    # common.fit does not fit: a second optimizer, and a cosine schedule.
    torch.manual_seed(mix_seed(seed, 0))
    critic = Discriminator().to(device) if gan else None
    net.train().requires_grad_(True)
    if gan:
        for part in (net.patchify, net.encoder, net.to_latent):
            part.requires_grad_(False)
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)

    # AdamW as in the paper. The discriminator has a fifth of the learning rate, constant.
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    if gan:
        critic_adam = torch.optim.AdamW(
            critic.parameters(), 0.2 * lr, betas=(0.0, 0.99), fused=True
        )
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bf16(device))
    order = image_order(len(data), seed, batch, 0, [range(batch)])
    batches = iter(torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=collate))
    images_per_step = batch * getattr(data, "frames", 1)
    report = progress_printer(steps, images_per_step, "mse {:.5f}  KL {:.3f}")
    for step in range(steps):
        # Linear warmup over 100 steps, and a cosine to 0 over all.
        decay = 1 + math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * decay

        # L = MSE + beta KL. The reconstruction is that of a random draw of the latents.
        images, _ = next(batches)
        x = to_float(images.to(device))  # (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1]
        with autocast:
            x_hat, mean, logvar = net(x)
        x_hat = x_hat.float()
        mse = (x_hat - x).square().mean()
        divergence = kl(mean.float(), logvar.float()).mean()
        loss = mse + beta * divergence

        # Stage 2: reconstructions should look real to the discriminator. The weight of this term
        # rises over the first quarter of the steps.
        if gan:
            critic.requires_grad_(False)
            rise = min(1, (step + 1) / (0.25 * steps))
            loss = loss - gan * rise * critic(frames_of(x_hat)).mean()

        # The gradient norm is clipped at 1, as in the paper.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

        # The discriminator learns to tell images from these reconstructions.
        if gan:
            critic.requires_grad_(True)
            critic_adam.zero_grad()
            fake = critic(frames_of(x_hat.detach()))
            discriminator_loss(critic(frames_of(x)), fake).backward()
            critic_adam.step()
        ema_update(ema_net, net, min(0.998, (step + 1) / (step + 10)))
        report(step, mse, divergence)
    return ema_net


@torch.no_grad()
def latents_of(net, data, indices, batch, seed, device):
    """Sample the latents (N, c, ...) of the images at these indices. Also returns labels (N,)."""

    def distribution(x):
        mean, logvar = net.encode(x)
        return mean, torch.exp(0.5 * logvar)

    return common.draw_latents(distribution, data, indices, batch, seed, device)


# ---------------------------------------------------------------- files


def load_vitok(run, device):
    """Return the net, in eval mode, and the saved dict. run: a folder that train or tune wrote.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    path = os.path.join(run, "vitok.pt")
    with reading(path, "related.vitok"):
        saved = torch.load(path, map_location=device, weights_only=True)
        net = ViTok(**saved["net"]).to(device)
        net.load_state_dict(saved["weights"])
    return net.eval().requires_grad_(False), saved


def save_vitok(run, saved):
    """Write RUN/vitok.pt."""
    os.makedirs(run, exist_ok=True)
    with writing(f"{run}/vitok.pt") as file:
        torch.save(saved, file)
    print(f"wrote {run}/vitok.pt")


# ---------------------------------------------------------------- the five commands


def train(options, config, folder, device):
    """Stage 1: train a new autoencoder."""
    names = ("patch", "channels", "encoder", "decoder", "tubelet")
    fields = {name: getattr(options, name) for name in names}
    torch.manual_seed(options.seed)
    net = ViTok(**fields).to(device)
    data = open_data(config, device, import_classes=bool(options.data))
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    size, kind = (options.res, options.res), "images"
    if options.frames:
        size, kind = (options.frames, *size), "clips"
    print(f"{millions:.2f} M parameters, E = {net.floats(*size)}, {len(data)} {kind}")
    settings = dict(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    net = fit(net, data, beta=options.beta, device=device, **settings)

    # The latents are standardized per channel when they are written: mean 0, variance 1.
    indices = common.random_indices(data, 1000, options.seed)
    z, _ = latents_of(net, data, indices, options.batch, options.seed, device)
    std, mean = torch.std_mean(
        z, (0, *range(2, z.ndim)), keepdim=True
    )  # (1, c, 1, 1), clips (1, c, 1, 1, 1)
    weights = net.state_dict()
    save_vitok(folder, dict(net=fields, config=config, mean=mean[0], std=std[0], weights=weights))


def tune(options, config, folder, device, net, saved):
    """Stage 2: train the decoder with a discriminator."""
    data = open_data(config, device, import_classes=bool(options.data))
    settings = dict(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    net = fit(net, data, gan=options.gan, device=device, **settings)
    save_vitok(folder, saved | dict(weights=net.state_dict()))


def test(options, config, device, net):
    """Print PSNR and SSIM of images or frames. --out: images or clips above reconstructions."""
    if config["data"] and not options.data:
        raise ValueError("test needs --data: images that the training has not seen")
    n = options.n or 1000
    data = None
    if net.tubelet or options.data:
        data = open_data(config, device, held_out=n, import_classes=bool(options.data))
    x, _ = common.some_images(config, n, device, data)
    # Reconstruct from the mean of the latents, without noise.
    y = torch.cat([net.decode(net.encode(part)[0]) for part in x.split(options.batch)])
    y = y.clamp(-1, 1)
    kind = "clips" if net.tubelet else "images"
    frames = frames_of(x), frames_of(y)
    print(
        f"E = {net.floats(*x.shape[2:])}, {len(x)} {kind}: "
        f"PSNR {psnr(*frames).mean():.2f} dB, SSIM {ssim(*frames).mean():.4f}"
    )
    if options.out:
        write_pairs(options.out, x, y)


def encode(options, config, device, net, saved):
    """Write the standardized latents of a dataset, with labels and classes if it has any."""
    data = open_data(config, device, import_classes=bool(options.data))
    n = options.n or (len(data) if config["data"] else 50_000)
    indices = range(min(n, len(data)))
    z, label = latents_of(net, data, indices, options.batch, options.seed, device)
    # train.py expects latents of mean 0 and variance 1.
    z = (z - saved["mean"].cpu()) / saved["std"].cpu()
    common.write_latents(options.out, fold(z), label, data.classes)
    # The smallest U-ViT is for 4 x 4.
    if z.shape[-1] >= 4:
        print(f"train with --data {options.out} --res {z.shape[-1]} --size tiny")


def decode(options, device, net, saved):
    """Write the images of latents that `encode` or sample.py wrote."""
    if len(options.data) != 1:
        raise ValueError("decode needs --data latents.npz: one file")

    # The latents of a clip have c channels for each of its T / q times.
    times = saved["config"]["frames"] // net.tubelet if net.tubelet else 0

    def images_of(z):
        return net.decode(unfold(z.to(device), times) * saved["std"] + saved["mean"])

    path, channels = options.data[0], net.channels * max(1, times)
    common.decode_latents(path, channels, images_of, options.batch, options.out, options.n)


# ---------------------------------------------------------------- the command line


def print_sizes():
    """Print parameters, multiply-accumulates and E of the published sizes, all with c = 16."""
    # Name, q, p, size of the input, and what the paper reports. rFVD is quoted, not measured.
    sizes = (
        ("S-B/16", 0, 16, (256, 256), "129.0 M, 34.8 GMAC"),
        ("S-L/16", 0, 16, (256, 256), "426.8 M, 113.4 GMAC"),
        ("S-B/4x8", 4, 8, (16, 128, 128), "rFVD 8.04"),
        ("S-B/8x8", 8, 8, (16, 128, 128), "rFVD 20.05"),
        ("S-B/4x16", 4, 16, (16, 128, 128), "rFVD 53.98"),
    )
    for name, tubelet, patch, size, published in sizes:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = ViTok(patch, 16, SIZES[name[0]], SIZES[name[2]], tubelet)
            net(torch.empty(1, 3, *size))
        parameters = sum(p.numel() for p in net.parameters())
        gmac = counter.get_total_flops() / 2e9
        print(
            f"{name}: {parameters:,} parameters, {gmac:.2f} GMAC at {'x'.join(map(str, size))}, "
            f"E = {net.floats(*size)} (published {published})"
        )


def size_of(text):
    """Return (width, blocks, heads) for a name in SIZES, or for numbers such as 128,4,4."""
    try:
        width, blocks, heads = SIZES[text] if text in SIZES else map(int, text.split(","))
        if min(width, blocks, heads) < 1:
            raise ValueError("below 1")
        return width, blocks, heads
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(SIZES)}, or WIDTH,BLOCKS,HEADS, not {text}"
        ) from error


def make_parser():
    parser = argparse.ArgumentParser(
        prog="vitok", description="Train and use a transformer autoencoder.", allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"vitok: {message}")
    add = parser.add_argument
    commands = ["train", "tune", "test", "encode", "decode"]
    add("what", nargs="?", choices=commands, help="without it, print the published sizes")
    add("run", nargs="?", help="the folder of the autoencoder")
    add("--data", nargs="+", default=[], help="images, see train.py; decode: latents.npz")
    add("--res", type=int, default=32, help="train: side of the images, which are square")
    add("--patch", type=int, default=4, help="train: p")
    add("--channels", type=int, default=8, help="train: c")
    add("--frames", type=int, default=0, help="train on moving shapes: frames per clip, T")
    add("--tubelet", type=int, default=0, help="with --frames: frames per patch, q")
    size = "train: S, B, L or WIDTH,BLOCKS,HEADS"
    add("--encoder", type=size_of, default=(128, 2, 4), help=f"{size} (default 128,2,4)")
    add("--decoder", type=size_of, default=(128, 4, 4), help=f"{size} (default 128,4,4)")
    add("--beta", type=float, default=1e-3, help="train: weight of KL")
    add("--gan", type=float, default=0.05, help="tune: weight of the discriminator (the paper's)")
    add("--steps", type=int, help="training steps (default: train 1000, tune 500)")
    add("--batch", type=int, default=32)
    add("--lr", type=float, help="learning rate (default: train 1e-3, tune 2e-4)")
    add("--n", type=int, help="images: test 1000, encode all (Shapes: 50,000), decode all")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    out = "test: .png; encode: .npz; decode: .png or .npz; tune: a folder (default RUN-tuned)"
    add("--out", help=out)
    return parser


def check_options(options):
    """Fill in the defaults of training and check all options. Raises ValueError."""
    what = options.what
    if options.steps is None:
        options.steps = 500 if what == "tune" else 1000
    if options.lr is None:
        options.lr = 2e-4 if what == "tune" else 1e-3
    at_least_one = ("res", "patch", "channels", "steps", "batch")
    common.check_numbers(options, at_least_one, ("frames", "tubelet", "seed"))
    if bool(options.frames) != bool(options.tubelet):
        raise ValueError("--frames and --tubelet are for video: give both or none")
    positive = 0 < options.lr < math.inf and 0 < options.gan < math.inf
    if not positive or (options.n is not None and options.n < 1):
        raise ValueError("--lr, --gan and --n must be above 0")
    if not 0 <= options.beta < math.inf:
        raise ValueError("--beta must be 0 or more")

    ending = dict(test=".png", encode=".npz").get(what, "")
    missing = what in ("encode", "decode") and options.out is None
    if missing or (options.out and not options.out.endswith(ending)):
        raise ValueError(f"{what} needs --out, a file that ends in {ending or '.png or .npz'}")


def main(argv=None):
    """Parse the options and run the command."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.what is None:
        return common.introduce(__doc__, print_sizes)
    if options.run is None:
        parser.error(f"{options.what} needs the folder of a run")
    check_options(options)

    # A training never overwrites an autoencoder.
    training = options.what in ("train", "tune")
    folder = options.run
    if options.what == "tune":
        folder = options.out or f"{options.run.rstrip('/')}-tuned"
    if training and os.path.exists(f"{folder}/vitok.pt"):
        raise ValueError(f"{folder} holds an autoencoder: choose another folder, or delete it")
    if options.out and not training:
        common.check_out(options.out)

    device = common.one_process(options.device)
    given = dict(data=options.data)
    absolute_paths(given)
    config = given | dict(res=options.res, frames=options.frames)
    if options.what == "train":
        return train(options, config, folder, device)

    # The other commands use the data of the training, unless --data names other images.
    net, saved = load_vitok(options.run, device)
    config = saved["config"] | (given if options.data else {})
    if options.what == "tune":
        tune(options, config, folder, device, net, saved)
    elif options.what == "test":
        test(options, config, device, net)
    elif options.what == "encode":
        encode(options, config, device, net, saved)
    else:
        decode(options, device, net, saved)


if __name__ == "__main__":
    run_command(main)
