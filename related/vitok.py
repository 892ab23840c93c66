"""ViTok (arXiv 2501.09755): an auto-encoder of two transformers. Its claim: the number of latent floats E decides how good reconstructions are, not the compute.

Patches of p x p pixels are tokens; an encoder makes c floats of each (their mean and variance), a decoder pixels of these: E is c times the number of tokens.
Stage 1 trains both by MSE and KL; stage 2 the decoder alone, with a discriminator. A diffusion model is then trained on the latents, (c, H / p, W / p), by the
usual commands.

    python -m related.vitok                                                                    # S-B/16, S-L/16: parameters and GMAC
    python -m related.vitok train runs/vitok --res 32 --patch 4 --channels 8                   # stage 1, on the built-in shapes
    python -m related.vitok tune runs/vitok                                                    # stage 2
    python -m related.vitok test runs/vitok --out grid.png                                     # PSNR, SSIM; pictures, and below each its reconstruction
    python -m related.vitok encode runs/vitok --n 50000 --out latents.npz                      # each channel of mean 0 and variance 1
    python train.py --data latents.npz --res 8 --size tiny --out runs/latents && python sample.py runs/latents --n 60 --out z.npz
    python -m related.vitok decode runs/vitok --data z.npz --out grid.png

Of the paper: SwiGLU, rotary positions by row and column (its video has a third axis), the losses' weights. From a port (the authors' own code was never
published): hidden channels, biases, the mean in KL. Left out is LPIPS, which needs a network trained on photographs; the small discriminator is ours.
"""

import argparse
import copy
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import Latents, order
from related.common import (
    check_numbers,
    check_out,
    noise_of,
    one_process,
    open_pictures,
    some_of,
    some_pictures,
    write_pictures,
)
from sample import has_bf16, make_grid, mix_seed, run_command, to_float, to_uint8, writing
from train import ema_update
from unet import attend

# ---------------------------------------------------------------- the net


def rotated(x, angles):
    """Rotary position embedding: pairs (first and second half) of x (..., N, dim) turned by angles (N, dim / 2)."""
    a, b = x.chunk(2, -1)
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_angles(grid, dim):
    """Angles (H W, dim / 2): a half of the pairs turns with the row, the other with the column, so that attention sees differences of places alone."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)
    return torch.cat(
        [rows[:, None].expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)], 2
    ).flatten(0, 1)


class Block(nn.Module):
    """x + Attention(norm x), x + MLP(norm x), the MLP gated: W2 (SiLU(W0 x) * W1 x). x: (B, N, C)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        hidden = int(2.67 * channels)
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = (
            nn.Linear(channels, 3 * channels, bias=False),
            nn.Linear(channels, channels),
        )
        self.w0, self.w1, self.w2 = (
            nn.Linear(channels, hidden),
            nn.Linear(channels, hidden),
            nn.Linear(hidden, channels),
        )

    def forward(self, x, angles):
        q, k, v = (
            each.transpose(1, 2)
            for each in self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        )  # (B, heads, N, dim)
        h = attend(rotated(q, angles), rotated(k, angles), v)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w0(h)) * self.w1(h))


class Transformer(nn.Module):
    """Blocks and a norm of tokens (B, N, C) on a grid (H, W)."""

    def __init__(self, channels, depth, num_heads):
        super().__init__()
        if channels % num_heads or channels // num_heads % 4:
            raise ValueError(
                f"{channels} channels in {num_heads} heads: the channels of a head must be divisible by 4"
            )
        self.dim = channels // num_heads
        self.blocks, self.norm = (
            nn.ModuleList(Block(channels, num_heads) for _ in range(depth)),
            nn.LayerNorm(channels),
        )

    def forward(self, x, grid):
        angles = rope_angles(grid, self.dim).to(x.device)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}  # width, blocks, heads


class ViTok(nn.Module):
    """patch: p; channels: c; encoder, decoder: (width, blocks, heads) each. Takes pictures of any size that p divides."""

    def __init__(self, patch=16, channels=16, encoder=SIZES["S"], decoder=SIZES["B"]):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.patchify, self.encoder, self.to_latent = (
            nn.Conv2d(3, encoder[0], patch, patch),
            Transformer(*encoder),
            nn.Linear(encoder[0], 2 * channels),
        )
        self.from_latent, self.decoder, self.to_pixels = (
            nn.Linear(channels, decoder[0]),
            Transformer(*decoder),
            nn.ConvTranspose2d(decoder[0], 3, patch, patch),
        )

    def floats(self, height, width):
        """E, the number of latent floats of a picture."""
        return self.channels * (height // self.patch) * (width // self.patch)

    def encode(self, x):
        """x: (B, 3, H, W) in [-1, 1]. Returns mean and log-variance of the latents, (B, c, H / p, W / p) each. Raises ValueError."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"patches of {self.patch} do not divide {x.shape[2]}x{x.shape[3]} pixels"
            )
        h = self.patchify(x)
        grid = h.shape[2:]
        mean, logvar = (
            self.to_latent(self.encoder(h.flatten(2).mT, grid)).mT.unflatten(2, grid).chunk(2, 1)
        )
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """(B, c, h, w) -> (B, 3, h p, w p), about [-1, 1]."""
        grid = latent.shape[2:]
        h = self.decoder(self.from_latent(latent.flatten(2).mT), grid)
        return self.to_pixels(h.mT.unflatten(2, grid))

    def forward(self, x):
        """Reconstruction from a draw of the latents, and their mean and log-variance."""
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)), mean, logvar


# ---------------------------------------------------------------- losses, yardsticks, training


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over all floats, as in the port of the code: a weight of 1e-3 is tiny. Returns (B,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class Discriminator(nn.Module):
    """Whether pictures (B, 3, H, W) are real: a logit for each of some overlapping parts, (B, 1, h, w). The paper's is StyleGAN's, this one is small."""

    def __init__(self, width=64):
        super().__init__()
        unit = lambda a, b, stride: [
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 3 + (stride > 1), stride, 1)),
            nn.LeakyReLU(0.2),
        ]
        self.body = nn.Sequential(
            *unit(3, width, 1),
            *unit(width, width, 2),
            *unit(width, 2 * width, 2),
            *unit(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, 1, 1),
        )

    def forward(self, x):
        return self.body(x)


def discriminator_loss(real, fake):
    """The hinge loss of logits of real and of reconstructed pictures: (relu(1 - real) + relu(1 + fake)) / 2, the mean."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of pictures (B, C, H, W) in [-1, 1]. Returns (B,)."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of pictures (B, C, H, W) in [-1, 1]: windows of 11 x 11 with Gaussian weights, K1 = .01, K2 = .03. Returns (B,). Raises ValueError."""
    if min(x.shape[2:]) < 11:
        raise ValueError(
            f"SSIM takes pictures of at least 11 x 11 pixels, not {tuple(x.shape[2:])}"
        )
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=x.dtype, device=x.device) / 1.5).square())
    window = (line[:, None] * line / line.sum().square()).expand(x.shape[1], 1, -1, -1)
    mean = lambda a: F.conv2d(a, window, groups=x.shape[1])
    c1, c2, mx, my = (0.01 * 2) ** 2, (0.03 * 2) ** 2, mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return (
        ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))
        .flatten(1)
        .mean(1)
    )


def fit(net, data, *, steps, batch, lr, beta=1e-3, gan=0.0, seed=0, device="cpu"):
    """Trains in place, and returns the averaged net. Stage 1 without gan; with, stage 2: the decoder alone, a discriminator's verdict with that weight.

    AdamW, (0.9, 0.95), weight decay 1e-4, the learning rate rising over 100 steps and falling as a cosine; the discriminator's is a fifth, constant.
    """
    torch.manual_seed(mix_seed(seed, 0))
    critic = Discriminator().to(device) if gan else None
    net.train().requires_grad_(True)
    for part in (net.patchify, net.encoder, net.to_latent) if gan else ():
        part.requires_grad_(False)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad],
        lr,
        betas=(0.9, 0.95),
        weight_decay=1e-4,
        fused=True,
    )
    critics = (
        torch.optim.AdamW(critic.parameters(), 0.2 * lr, betas=(0.0, 0.99), fused=True)
        if critic
        else None
    )
    loader, begun = (
        iter(
            torch.utils.data.DataLoader(
                data, sampler=order(len(data), seed, batch, 0, [range(batch)]), batch_size=None
            )
        ),
        time.time(),
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        x = to_float(next(loader)[0].to(device))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bf16(device)):
            x_hat, mean, logvar = net(x)
        x_hat = x_hat.float()
        mse, divergence = (x_hat - x).square().mean(), kl(mean.float(), logvar.float()).mean()
        loss = mse + beta * divergence
        if critic:
            critic.requires_grad_(False)
            loss = loss - gan * min(1, (step + 1) / (0.25 * steps)) * critic(x_hat).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if critic:
            critic.requires_grad_(True)
            critics.zero_grad()
            discriminator_loss(critic(x), critic(x_hat.detach())).backward()
            critics.step()
        ema_update(average, net, min(0.998, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"step {step + 1}/{steps}  mse {mse.item():.5f}  KL {divergence.item():.3f}  {(step + 1) * batch / (time.time() - begun):.0f} img/s",
                flush=True,
            )
    return average


@torch.no_grad()
def latents_of(net, data, numbers, batch, seed, device):
    """A draw of the latents (N, c, h, w) of these of the pictures, and their labels, on the CPU; noise follows from the seed and the place in numbers."""
    z, labels = [], []
    for i in range(0, len(numbers), batch):
        x, label = data[numbers[i : i + batch]]
        mean, logvar = net.encode(to_float(x.to(device)))
        z.append(
            (
                mean
                + torch.exp(0.5 * logvar)
                * noise_of(seed, range(i, i + len(x)), mean.shape[1:], device)()
            ).cpu()
        )
        labels.append(label.cpu())
    return torch.cat(z), torch.cat(labels)


# ---------------------------------------------------------------- the command


def load_vitok(run, device):
    """(net in eval mode, what else is saved: config, mean, std) of a folder that `train` wrote. Raises ValueError."""
    path = os.path.join(run, "vitok.pt")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        net = ViTok(**saved["net"]).to(device)
        net.load_state_dict(saved["weights"])
        return net.eval().requires_grad_(False), saved
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(
            f"{path} was not written by related.vitok ({type(error).__name__})"
        ) from error


def save_vitok(run, saved):
    os.makedirs(run, exist_ok=True)
    with writing(f"{run}/vitok.pt") as file:
        torch.save(saved, file)
    print(f"wrote {run}/vitok.pt")


def size_of(text):
    """(width, blocks, heads) of a name in SIZES, or of three numbers such as 128,4,4."""
    try:
        width, blocks, heads = SIZES[text] if text in SIZES else map(int, text.split(","))
        if min(width, blocks, heads) < 1:
            raise ValueError("below 1")
        return width, blocks, heads
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(SIZES)}, nor WIDTH,BLOCKS,HEADS"
        ) from error


def print_sizes():
    for name, (parameters, macs) in {"S-B": (129.0, 34.8), "S-L": (426.8, 113.4)}.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = ViTok(16, 16, SIZES[name[0]], SIZES[name[2]])
            net(torch.empty(1, 3, 256, 256))
        print(
            f"{name}/16: {sum(p.numel() for p in net.parameters()):,} parameters (published {parameters} M), {counter.get_total_flops() / 2e9:.2f} GMAC at 256 px (published {macs})"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="vitok",
        description="Train and use an auto-encoder of two transformers.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"vitok: {message}")
    parser.add_argument(
        "what",
        nargs="?",
        choices=["train", "tune", "test", "encode", "decode"],
        help="without: the published sizes",
    )
    parser.add_argument("run", nargs="?", help="a folder")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        help="pictures, as of train.py (default: the built-in shapes); decode: latents.npz",
    )
    parser.add_argument(
        "--res", type=int, default=32, help="train: side of the pictures, which are square here"
    )
    parser.add_argument("--patch", type=int, default=4, help="train: p")
    parser.add_argument("--channels", type=int, default=8, help="train: c")
    parser.add_argument(
        "--encoder",
        type=size_of,
        default=(128, 2, 4),
        help="train: S, B, L or WIDTH,BLOCKS,HEADS (default 128,2,4)",
    )
    parser.add_argument(
        "--decoder", type=size_of, default=(128, 4, 4), help="the same (default 128,4,4)"
    )
    parser.add_argument("--beta", type=float, default=1e-3, help="train: weight of KL")
    parser.add_argument(
        "--gan",
        type=float,
        default=0.05,
        help="tune: weight of the discriminator's verdict (the paper's best)",
    )
    parser.add_argument("--steps", type=int, help="of training: train 1000, tune 500")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, help="of training: train 1e-3, tune 2e-4")
    parser.add_argument(
        "--n", type=int, help="pictures: test 1000, encode all, or 50,000 shapes, decode all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--out",
        help="test: grid.png, encode: latents.npz, decode: grid.png or samples.npz, tune: another folder (default: RUN-tuned)",
    )
    options = parser.parse_args(argv)
    if options.what is None:
        return print_sizes()
    if options.run is None:
        parser.error(f"{options.what} takes a run's folder")
    steps, lr = (500, 2e-4) if options.what == "tune" else (1000, 1e-3)
    options.steps, options.lr = (
        steps if options.steps is None else options.steps,
        lr if options.lr is None else options.lr,
    )
    check_numbers(options, ("res", "patch", "channels", "steps", "batch"), ("seed",))
    if (
        not (
            0 < options.lr < math.inf
            and 0 <= options.beta < math.inf
            and 0 < options.gan < math.inf
        )
        or options.n is not None
        and options.n < 1
    ):
        raise ValueError("--lr, --gan and --n are above 0, --beta from 0 on")
    ending = dict(test=".png", encode=".npz").get(options.what, "")
    if (
        options.out is None
        and options.what in ("encode", "decode")
        or options.out
        and not options.out.endswith(ending)
    ):
        raise ValueError(
            f"{options.what} takes --out, the name of {'an' if ending == '.npz' else 'a'} {ending or '.png or .npz'} file"
        )
    folder = (
        options.run
        if options.what == "train"
        else options.out or f"{options.run.rstrip('/')}-tuned"
    )
    if options.what in ("train", "tune") and os.path.exists(f"{folder}/vitok.pt"):
        raise ValueError(f"{folder} holds a net: choose another folder, or delete it")
    if options.what not in ("train", "tune") and options.out:
        check_out(options.out)
    device, config = (
        one_process(options.device),
        dict(data=[os.path.abspath(path) for path in options.data], res=options.res),
    )

    if options.what == "train":
        fields = dict(
            patch=options.patch,
            channels=options.channels,
            encoder=options.encoder,
            decoder=options.decoder,
        )
        torch.manual_seed(options.seed)
        net, data = ViTok(**fields).to(device), open_pictures(config, device)
        print(
            f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, E = {net.floats(options.res, options.res)}, {len(data)} pictures"
        )
        net = fit(
            net,
            data,
            steps=options.steps,
            batch=options.batch,
            lr=options.lr,
            beta=options.beta,
            seed=options.seed,
            device=device,
        )
        z, _ = latents_of(
            net, data, some_of(data, 1000, options.seed), options.batch, options.seed, device
        )  # whose scale latents are divided by, when they are written
        saved = dict(
            net=fields,
            config=config,
            mean=z.mean((0, 2, 3))[:, None, None],
            std=z.std((0, 2, 3))[:, None, None],
            weights=net.state_dict(),
        )
        return save_vitok(folder, saved)

    net, saved = load_vitok(options.run, device)
    config = saved["config"] | (dict(data=config["data"]) if options.data else {})
    if options.what == "tune":
        net = fit(
            net,
            open_pictures(config, device),
            steps=options.steps,
            batch=options.batch,
            lr=options.lr,
            gan=options.gan,
            seed=options.seed,
            device=device,
        )
        return save_vitok(folder, saved | dict(weights=net.state_dict()))
    if options.what == "test":
        if config["data"] and not options.data:
            raise ValueError("--data is missing: pictures other than those of the training")
        x, _ = some_pictures(config, options.n or 1000, device)
        y = torch.cat([net.decode(net.encode(part)[0]) for part in x.split(options.batch)]).clamp(
            -1, 1
        )
        print(
            f"E = {net.floats(*x.shape[2:])}, {len(x)} pictures: PSNR {psnr(x, y).mean():.2f} dB, SSIM {ssim(x, y).mean():.4f}"
        )
        if options.out:
            columns, rows = min(10, len(x)), []
            for i in range(0, min(4, len(x) // columns) * columns, columns):
                rows += [x[i : i + columns], y[i : i + columns]]
            with writing(options.out) as file:
                make_grid(
                    to_uint8(torch.cat(rows)).permute(0, 2, 3, 1).cpu().numpy(), columns
                ).save(file, "PNG")
    elif options.what == "encode":
        data = open_pictures(config, device)
        z, y = latents_of(
            net,
            data,
            range(min(options.n or (len(data) if config["data"] else 50_000), len(data))),
            options.batch,
            options.seed,
            device,
        )
        with writing(options.out) as file:
            np.savez(
                file,
                z=((z - saved["mean"].cpu()) / saved["std"].cpu()).numpy(),
                **(dict(y=y.numpy(), classes=data.classes) if data.classes else {}),
            )
        print(
            f"wrote {len(z)} latents {tuple(z.shape[1:])} to {options.out}: train with --data {options.out} --res {z.shape[2]} --size tiny"
        )
    else:
        if len(options.data) != 1:
            raise ValueError("decode takes --data latents.npz")
        data = Latents(options.data[0])
        z, y = data[range(min(options.n or len(data), len(data)))]
        if z.shape[1] != net.channels:
            raise ValueError(
                f"{options.data[0]} holds latents of {z.shape[1]} channels, not of {net.channels}"
            )
        pictures = [
            to_uint8(net.decode(part.to(device) * saved["std"] + saved["mean"]))
            .permute(0, 2, 3, 1)
            .cpu()
            for part in z.split(options.batch)
        ]
        write_pictures(options.out, torch.cat(pictures), y, data.classes)


if __name__ == "__main__":
    run_command(main)
