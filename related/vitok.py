"""ViTok (Hansen-Estruch, Yan, Chung, ..., Chen 2025, arXiv 2501.09755): a transformer autoencoder.

Patches of p x p pixels become tokens. An encoder turns each token into c latent floats, a mean and
a variance, and a decoder turns them back into pixels. The claim: the number E of latent floats, c
times the number of tokens, determines the quality of reconstructions, and not the compute.
Stage 1 trains both halves by MSE and KL; stage 2 trains the decoder alone, with a discriminator.
A diffusion model is then trained on the latents (c, H / p, W / p).

    python -m related.vitok                                  # published sizes: parameters and GMAC
    python -m related.vitok train runs/vitok --res 32 --patch 4 --channels 8     # stage 1
    python -m related.vitok tune runs/vitok                                      # stage 2
    python -m related.vitok test runs/vitok --out grid.png   # PSNR, SSIM, pairs of images
    python -m related.vitok encode runs/vitok --n 50000 --out latents.npz
    python train.py --data latents.npz --res 8 --size tiny --out runs/latents
    python sample.py runs/latents --n 60 --out z.npz
    python -m related.vitok decode runs/vitok --data z.npz --out grid.png

From the paper: SwiGLU, rotary positions by row and column, the weights of the losses. From a port,
because the authors published no code: hidden channels, biases, the mean in KL. Left out: LPIPS,
which needs a network trained on photographs. The small discriminator is ours.
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
from related.dit import rope_angles
from sample import make_grid, mix_seed, to_float, to_uint8
from support.data import collate, image_order
from support.runtime import has_bf16, run_command, writing
from train import ema_update
from unet import attend

# ---------------------------------------------------------------- the network


def rotated(x, angles):
    """Rotary positions: rotate pairs of channels. x: (..., N, dim); angles: (N, dim / 2)."""
    # A pair has one channel of the first half and one of the second half. The products of rotated
    # queries and keys depend on differences of positions only.
    a, b = x.chunk(2, -1)
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """A transformer block with rotary positions and a SwiGLU MLP. x: (B, N, C)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        hidden = int(2.67 * channels)
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.w0 = nn.Linear(channels, hidden)
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(hidden, channels)

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
    """Blocks and a final norm, for tokens (B, N, C) on a grid (H, W)."""

    def __init__(self, channels, depth, num_heads):
        super().__init__()
        if channels % num_heads or channels // num_heads % 4:
            raise ValueError(
                f"{channels} channels in {num_heads} heads do not work: "
                "the channels of a head must be divisible by 4"
            )
        self.dim = channels // num_heads
        self.blocks = nn.ModuleList(Block(channels, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x, grid):
        # The paper's third axis, for video, is left out.
        angles = rope_angles(grid, self.dim).to(x.device)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}  # width, blocks, heads


class ViTok(nn.Module):
    """The autoencoder, for images of any size that `patch` divides.

    patch: p. channels: c. encoder, decoder: (width, blocks, heads) each.
    """

    def __init__(self, patch=16, channels=16, encoder=SIZES["S"], decoder=SIZES["B"]):
        super().__init__()
        self.patch = patch
        self.channels = channels
        self.patchify = nn.Conv2d(3, encoder[0], patch, patch)
        self.encoder = Transformer(*encoder)
        self.to_latent = nn.Linear(encoder[0], 2 * channels)
        self.from_latent = nn.Linear(channels, decoder[0])
        self.decoder = Transformer(*decoder)
        self.to_pixels = nn.ConvTranspose2d(decoder[0], 3, patch, patch)

    def floats(self, height, width):
        """Return E, the number of latent floats of an image."""
        return self.channels * (height // self.patch) * (width // self.patch)

    def encode(self, x):
        """Return mean and log-variance of the latents, (B, c, H / p, W / p) each.

        x: (B, 3, H, W) in [-1, 1]. Raises ValueError for sides that p does not divide.
        """
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"patches of {self.patch} do not divide {height}x{width} pixels")
        # Patches become tokens, and each token becomes c means and c log-variances.
        h = self.patchify(x)  # (B, C, H / p, W / p)
        grid = h.shape[2:]
        h = self.to_latent(self.encoder(h.flatten(2).mT, grid))  # (B, N, 2 c)
        mean, logvar = h.mT.unflatten(2, grid).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """Return images (B, 3, h p, w p), about [-1, 1]. latent: (B, c, h, w)."""
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


# ---------------------------------------------------------------- losses and metrics


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over all floats. Returns (B,)."""
    # The port averages, and does not add. A weight of 1e-3 is therefore tiny.
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class Discriminator(nn.Sequential):
    """Distinguish real images (B, 3, H, W) from reconstructions: logits of patches (B, 1, h, w)."""

    # The paper uses the discriminator of StyleGAN. This one is small.
    def __init__(self, width=64):
        def unit(channels, out, stride):
            kernel = 4 if stride > 1 else 3
            conv = nn.Conv2d(channels, out, kernel, stride, 1)
            return [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]

        super().__init__(
            *unit(3, width, 1),
            *unit(width, width, 2),
            *unit(width, 2 * width, 2),
            *unit(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, 1, 1),
        )


def discriminator_loss(real, fake):
    """The hinge loss of logits of real images and reconstructions, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def psnr(x, y):
    """Peak signal-to-noise ratio in dB. x, y: (B, C, H, W) in [-1, 1]. Returns (B,)."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def ssim(x, y):
    """Structural similarity (Wang et al. 2004). x, y: (B, C, H, W) in [-1, 1]. Returns (B,).

    Raises ValueError for images below 11 x 11 pixels.
    """
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, not {tuple(x.shape[2:])}")
    # Windows of 11 x 11 pixels, with Gaussian weights of standard deviation 1.5.
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=x.dtype, device=x.device) / 1.5).square())
    window = (line[:, None] * line / line.sum().square()).expand(x.shape[1], 1, -1, -1)

    def mean(a):
        return F.conv2d(a, window, groups=x.shape[1])

    # Means, variances and covariance of each window.
    mx, my = mean(x), mean(y)
    vx, vy = mean(x * x) - mx * mx, mean(y * y) - my * my
    cov = mean(x * y) - mx * my

    # The constants are (K L)^2, with K1 = 0.01, K2 = 0.03 and the range L = 2 of the pixels.
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


# ---------------------------------------------------------------- training


def fit(net, data, *, steps, batch, lr, beta=1e-3, gan=0.0, seed=0, device="cpu"):
    """Train a ViTok in place. Return a copy with EMA weights, in eval mode.

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
    report = progress_printer(steps, batch, "mse {:.5f}  KL {:.3f}")
    for step in range(steps):
        # Linear warmup over 100 steps, and a cosine to 0 over all.
        decay = 1 + math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * decay

        # L = MSE + beta KL. The reconstruction is that of a random draw of the latents.
        images, _ = next(batches)
        x = to_float(images.to(device))  # (B, 3, H, W) in [-1, 1]
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
            loss = loss - gan * min(1, (step + 1) / (0.25 * steps)) * critic(x_hat).mean()

        # The gradient norm is clipped at 1, as in the paper.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

        # The discriminator learns to tell images from these reconstructions.
        if gan:
            critic.requires_grad_(True)
            critic_adam.zero_grad()
            discriminator_loss(critic(x), critic(x_hat.detach())).backward()
            critic_adam.step()
        ema_update(ema_net, net, min(0.998, (step + 1) / (step + 10)))
        report(step, mse, divergence)
    return ema_net


@torch.no_grad()
def latents_of(net, data, indices, batch, seed, device):
    """Sample the latents (N, c, h, w) of the images at these indices. Also returns labels (N,)."""

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
    fields = {key: getattr(options, key) for key in ("patch", "channels", "encoder", "decoder")}
    torch.manual_seed(options.seed)
    net = ViTok(**fields).to(device)
    data = common.open_images(config, device)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    floats = net.floats(options.res, options.res)
    print(f"{millions:.2f} M parameters, E = {floats}, {len(data)} images")
    settings = dict(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    net = fit(net, data, beta=options.beta, device=device, **settings)

    # The latents are standardized per channel when they are written: mean 0, variance 1.
    indices = common.random_indices(data, 1000, options.seed)
    z, _ = latents_of(net, data, indices, options.batch, options.seed, device)
    mean = z.mean((0, 2, 3))[:, None, None]  # (c, 1, 1)
    std = z.std((0, 2, 3))[:, None, None]
    saved = dict(net=fields, config=config, mean=mean, std=std, weights=net.state_dict())
    save_vitok(folder, saved)


def tune(options, config, folder, device, net, saved):
    """Stage 2: train the decoder with a discriminator."""
    data = common.open_images(config, device)
    settings = dict(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    net = fit(net, data, gan=options.gan, device=device, **settings)
    save_vitok(folder, saved | dict(weights=net.state_dict()))


def test(options, config, device, net):
    """Print PSNR and SSIM. --out: a grid of images, each above its reconstruction."""
    if config["data"] and not options.data:
        raise ValueError("test needs --data: images that the training has not seen")
    x, _ = common.some_images(config, options.n or 1000, device)
    # Reconstruct from the mean of the latents, without noise.
    y = torch.cat([net.decode(net.encode(part)[0]) for part in x.split(options.batch)])
    y = y.clamp(-1, 1)
    print(
        f"E = {net.floats(*x.shape[2:])}, {len(x)} images: "
        f"PSNR {psnr(x, y).mean():.2f} dB, SSIM {ssim(x, y).mean():.4f}"
    )
    if options.out:
        columns = min(10, len(x))
        rows = []
        for i in range(0, min(4, len(x) // columns) * columns, columns):
            rows += [x[i : i + columns], y[i : i + columns]]
        images = to_uint8(torch.cat(rows)).permute(0, 2, 3, 1).cpu().numpy()
        with writing(options.out) as file:
            make_grid(images, columns).save(file, "PNG")


def encode(options, config, device, net, saved):
    """Write the standardized latents of a dataset, with labels and classes if it has any."""
    data = common.open_images(config, device)
    n = options.n or (len(data) if config["data"] else 50_000)
    indices = range(min(n, len(data)))
    z, label = latents_of(net, data, indices, options.batch, options.seed, device)
    # train.py expects latents of mean 0 and variance 1.
    z = (z - saved["mean"].cpu()) / saved["std"].cpu()
    common.write_latents(options.out, z, label, data.classes)
    print(f"train with --data {options.out} --res {z.shape[2]} --size tiny")


def decode(options, device, net, saved):
    """Write the images of latents that `encode` or sample.py wrote."""
    if len(options.data) != 1:
        raise ValueError("decode needs --data latents.npz: one file")

    def images_of(z):
        return net.decode(z.to(device) * saved["std"] + saved["mean"])

    path = options.data[0]
    common.decode_latents(path, net.channels, images_of, options.batch, options.out, options.n)


# ---------------------------------------------------------------- the command line


def print_sizes():
    """Print parameters and multiply-accumulates of the published sizes."""
    for name, (published, published_gmac) in {"S-B": (129.0, 34.8), "S-L": (426.8, 113.4)}.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = ViTok(16, 16, SIZES[name[0]], SIZES[name[2]])
            net(torch.empty(1, 3, 256, 256))
        parameters = sum(p.numel() for p in net.parameters())
        gmac = counter.get_total_flops() / 2e9
        print(
            f"{name}/16: {parameters:,} parameters (published {published} M), "
            f"{gmac:.2f} GMAC at 256 px (published {published_gmac})"
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
    common.check_numbers(options, ("res", "patch", "channels", "steps", "batch"), ("seed",))
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
    config = dict(data=[os.path.abspath(path) for path in options.data], res=options.res)
    if options.what == "train":
        return train(options, config, folder, device)

    # The other commands use the data of the training, unless --data names other images.
    net, saved = load_vitok(options.run, device)
    config = saved["config"] | (dict(data=config["data"]) if options.data else {})
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
