"""ReCAP (arXiv 2505.19089) on MAR (Li et al. 2024, arXiv 2406.11838): continuous tokens.

MAR generates an image without a codebook. An encoder sees the tokens that are known, and a decoder
predicts a vector z for each of the others. Given z, a small diffusion head draws the token. The
order is random. After a whole evaluation, ReCAP keeps the keys and values of every layer. The next
evaluations are local: they recompute only the tokens that are being generated, and attend to the
kept keys. Their head also takes fewer steps. This needs no training. Here a token is a patch of 2x2
pixels of the built-in shapes at 16x16: 64 tokens of 12 numbers. The authors use the latents of an
autoencoder.

    python -m related.mar train runs/mar
    python -m related.mar sample runs/mar --steps 16 --whole 8 --local 1 --local-head-steps 20 \\
        --guidance 1 3 --out grid.png                 # 12 whole evaluations and 4 local ones
    python -m related.mar sample runs/mar --steps 16 --n 250 --out samples.npz    # all whole
    python -m related.mar real --n 5000 --out real.npz                            # real shapes
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import diffusion_loss
from related.common import (
    check_numbers,
    check_out,
    introduce,
    no_arguments,
    noise_by_number,
    one_process,
    reading,
    write_images,
)
from related.recap import SIDE, MaskedBlock, fit_masked, grouped, new_file
from sample import guided, parse_labels, sample_ddpm, to_float, to_uint8
from schedule import logsnr_schedule_cosine
from support.data import Shapes, load_batch
from support.runtime import has_bf16, run_command, writing
from unet import Embedding, zero_init

PATCH = 2
LENGTH = (SIDE // PATCH) ** 2  # tokens of an image
TOKEN = 3 * PATCH**2  # numbers of a token


# ---------------------------------------------------------------- tokens


def tokens_of(images):
    """Return the patches of images: (B, 3, H, W) -> (B, H W / 4, 12), in the same range."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).mT


def images_of(tokens):
    """Return the square images (B, 3, side, side) of tokens (B, N, 12), inverting tokens_of."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), PATCH)


# ---------------------------------------------------------------- the networks


class HeadBlock(nn.Module):
    """A residual MLP with adaLN-zero, for single tokens. At initialization it is the identity."""

    def __init__(self, width):
        super().__init__()
        self.modulation = zero_init(nn.Linear(width, 3 * width))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x, condition):
        """x, condition: (N, width). Returns (N, width)."""
        shift, scale, gate = self.modulation(condition).chunk(3, 1)
        h = F.layer_norm(x, x.shape[1:]) * (1 + scale) + shift
        return x + gate * self.mlp(h)


class DiffusionHead(nn.Module):
    """The denoiser of one token (MAR, Sec. 3.2). It is a net of sample.py and loss.py.

    The token is an image of one pixel, and the vector z of the decoder takes the place of the
    label. z_channels: size of z.
    """

    def __init__(self, z_channels, width=128, num_blocks=3):
        super().__init__()
        self.token = nn.Linear(TOKEN, width)
        self.embedding = Embedding(0, width)  # of the noise level, without classes
        self.condition = nn.Linear(z_channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(num_blocks))
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.out = zero_init(nn.Linear(width, TOKEN))

    def forward(self, x, logsnr, z):
        """x: (N, 12, 1, 1), noisy tokens. logsnr: (N,). z: (N, z_channels). Returns v_hat."""
        # adaLN: noise level and z together shift, scale and gate every layer.
        condition = self.embedding(logsnr, extra=self.condition(z))  # (N, width)
        h = self.token(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, 1)
        h = F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift
        # In the dtype of x, also under autocast.
        return self.out(h).to(x.dtype)[:, :, None, None]


class MAR(nn.Module):
    """Encoder, decoder and head (MAR, Sec. 3.4). The null label follows the classes.

    Tokens are passed in the order of generation, with their positions. Attention does not depend on
    that order, so the known tokens, the current group and the masked tokens are slices. length:
    tokens of an image. num_buffer: number of tokens that pass the class to the encoder, 1 per 4
    image tokens as in the paper. width: channels of the head.
    """

    def __init__(
        self,
        length=LENGTH,
        num_classes=10,
        num_buffer=16,
        channels=96,
        num_blocks=3,
        num_heads=3,
        width=128,
    ):
        super().__init__()
        self.length = length
        self.num_classes = num_classes
        self.num_buffer = num_buffer

        def position_table(n):
            return nn.Parameter(0.02 * torch.randn(n, channels))

        # The encoder. The first rows of the positions are those of the buffer.
        self.token = nn.Linear(TOKEN, channels)
        self.label = nn.Embedding(num_classes + 1, channels)
        self.encoder_position = position_table(num_buffer + length)
        self.norm = nn.LayerNorm(channels)
        self.encoder = nn.ModuleList(MaskedBlock(channels, num_heads) for _ in range(num_blocks))
        self.encoder_norm = nn.LayerNorm(channels)

        # The decoder. One vector stands for all masked tokens.
        self.bridge = nn.Linear(channels, channels)
        self.mask = position_table(1)
        self.decoder_position = position_table(num_buffer + length)
        self.decoder = nn.ModuleList(MaskedBlock(channels, num_heads) for _ in range(num_blocks))
        self.decoder_norm = nn.LayerNorm(channels)

        # The head, which learns the position once more.
        self.z_position = position_table(length)
        self.head = DiffusionHead(channels, width)

    def forward(self, tokens, positions, label, cache=None):
        """Return z (B, N, channels) of N positions, and the keys and values of each block.

        tokens: (B, K, 12), the known ones. positions: (B, N), the K known ones first; the other
        N - K are masked. label: (B,). cache: None for a whole evaluation, in which positions
        has all positions of the image. For a local one: (encoder, decoder), a list each, with the
        keys and values (B, heads, M, dim) of other tokens and the buffer in every block (see
        context_of). The buffer is then not computed again.
        """
        known = tokens.shape[1]
        encoder_cache, decoder_cache = cache or (None, None)

        # The encoder sees the known tokens and, in a whole evaluation, the buffer. Every token of
        # the buffer is the class.
        x = self.token(tokens) + self.encoder_position[self.num_buffer + positions[:, :known]]
        if cache is None:
            buffer = self.label(label)[:, None] + self.encoder_position[: self.num_buffer]
            x = torch.cat([buffer, x], 1)  # (B, num_buffer + K, C)
        x, encoder_own = run_blocks(self.encoder, self.norm(x), encoder_cache)
        x = self.bridge(self.encoder_norm(x))

        # The decoder sees all N positions: the output of the encoder, then mask tokens.
        masks = self.mask.to(x.dtype).expand(len(x), positions.shape[1] - known, -1)
        x = torch.cat([x, masks], 1)  # (B, [num_buffer +] N, C)
        position = self.decoder_position[self.num_buffer + positions]
        if cache is None:
            buffer_position = self.decoder_position[: self.num_buffer].expand(len(x), -1, -1)
            position = torch.cat([buffer_position, position], 1)
        x, decoder_own = run_blocks(self.decoder, x + position, decoder_cache)

        # The output at the buffer is not used.
        z = self.decoder_norm(x)[:, -positions.shape[1] :] + self.z_position[positions]
        return z, (encoder_own, decoder_own)


def run_blocks(blocks, x, cache):
    """Run blocks on x (B, N, C). Returns x, and the keys and values of x in each block.

    cache: for each block the keys and values of other tokens, or None.
    """
    own = []
    for i, block in enumerate(blocks):
        x, keys_values = block(x, None if cache is None else cache[i])
        own.append(keys_values)
    return x, own


def context_of(cache, first, last):
    """Return what a local evaluation attends to: the cache without entries first to last - 1.

    cache: that of a whole evaluation. Entry num_buffer + i of the decoder is token i of the order.
    """
    encoder, decoder = cache

    # The encoder has seen the buffer and known tokens only, so nothing has to go.
    def rest(tensor):
        return torch.cat([tensor[:, :, :first], tensor[:, :, last:]], 2)

    # The decoder has seen the group as masked tokens. All other masked tokens stay.
    return encoder, [(rest(keys), rest(values)) for keys, values in decoder]


# ---------------------------------------------------------------- training


def mar_loss(model, tokens, label, least_masked=0.7, repeats=2):
    """Return the v loss of masked tokens, a scalar (MAR, Eq. 1 and Sec. 3.4, which predict eps).

    tokens: (B, length, 12) in [-1, 1]. label: (B,). least_masked: the smallest share of masked
    tokens, 0.7 in the paper. repeats: noise levels per token, 4 in the paper.
    """
    # A random order for each image.
    order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)
    tokens = tokens.gather(1, order[:, :, None].expand_as(tokens))

    # One share of masked tokens per batch, as in the authors' code: normal with mean 1 and std
    # 0.25, truncated to [least_masked, 1]. Its distance from 1 is below d with a probability
    # proportional to erf(d / (0.25 sqrt(2))). The inverse maps a uniform number to a distance.
    u = torch.rand(()) * math.erf((1 - least_masked) / 0.25 / math.sqrt(2))
    share = 1 - 0.25 * math.sqrt(2) * torch.erfinv(u).item()
    known = model.length - math.ceil(share * model.length)

    # z of the masked tokens. The model is evaluated once. The head is small, so each token is used
    # at several noise levels.
    z, _ = model(tokens[:, :known], order, label)
    z = z[:, known:].flatten(0, 1).repeat(repeats, 1)  # (repeats B masked, C)
    x = tokens[:, known:].flatten(0, 1).repeat(repeats, 1)
    x = x[:, :, None, None]  # (repeats B masked, 12, 1, 1)
    return diffusion_loss(model.head, x, logsnr_schedule_cosine, z, space="v")[0].mean()


# ---------------------------------------------------------------- generation


def cosine_plan(steps, length):
    """Return the number of tokens that each step generates, at least 1. Raises ValueError.

    After step i of T, length * cos(pi i / (2 T)) tokens are masked, rounded down.
    """
    if not 1 <= steps <= length:
        raise ValueError(f"{length} tokens need 1 to {length} steps, not {steps}")
    # 1e-9 keeps whole numbers from being rounded down.
    masked = [length]
    for i in range(1, steps):
        share = math.cos(0.5 * math.pi * i / steps)
        masked.append(min(masked[-1] - 1, math.floor(length * share + 1e-9)))
    return [now - after for now, after in zip(masked, [*masked[1:], 0])]


def draw_tokens(head, z, z_null, noise, steps, *, temperature=1.0, scale=1.0, clip="static"):
    """Draw one token for each z (B, n, C), by DDPM with the diffusion head. Returns (B, n, 12).

    z_null: z of the null label, for guidance by `scale`; None without guidance. noise: see
    common.noise_by_number. temperature: the factor of all noise except the initial one. clip: see
    sample.clip_x.
    """
    b, n = z.shape[:2]
    logsnrs = logsnr_schedule_cosine(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    # The head is a net whose label is z, so guidance and sampler are those of sample.py.
    net = head if z_null is None else guided(head, scale, z_null.flatten(0, 1))

    def bound(x, logsnr):
        return net(x, logsnr, z.flatten(0, 1))

    # Draw the noise of all steps at once: (steps, B n, 12, 1, 1).
    draws = noise(steps, n, TOKEN).transpose(0, 1).flatten(1, 2)[:, :, :, None, None]
    later = iter(temperature * draws[1:])
    x = sample_ddpm([bound] * steps, draws[0], logsnrs.to(draws), lambda: next(later), clip=clip)
    return x.reshape(b, n, TOKEN)


def predict(model, tokens, positions, label, is_guided, cache=None):
    """Evaluate the model. Returns z (B, N, C), z of the null label or None, and keys and values.

    With guidance, the model evaluates every sequence twice, in one batch. The keys and values, also
    those of the cache, are then of both. The rest is as in MAR.forward.
    """
    if not is_guided:
        z, own = model(tokens, positions, label, cache)
        return z, None, own
    labels = torch.cat([label, torch.full_like(label, model.num_classes)])
    z, own = model(tokens.repeat(2, 1, 1), positions.repeat(2, 1), labels, cache)
    return *z.chunk(2), own


def part(z, start, stop):
    """Return z[:, start:stop], or None for None: z of the null label without guidance."""
    return None if z is None else z[:, start:stop]


@torch.no_grad()
def generate(
    model,
    label,
    steps,
    whole=0,
    local=0,
    *,
    head_steps=50,
    local_head_steps=50,
    temperature=1.0,
    guidance=(1.0, 1.0),
    seed=0,
    first=0,
):
    """Generate tokens (B, length, 12) for labels (B,). With local=0 every evaluation is whole.

    whole, local: see recap.grouped. head_steps, local_head_steps: of the diffusion head after a
    whole and after a local evaluation. temperature: see draw_tokens. guidance: the scales with all
    tokens masked and with none; (1, 1) is no guidance. The draws of image i depend on the seed and
    first + i.

    Returns the tokens, the number of whole and of local evaluations, and the mean number of head
    steps per token. Raises ValueError for too many steps.
    """
    groups = grouped(cosine_plan(steps, model.length), whole, local)
    noise = noise_by_number(seed, range(first, first + len(label)), label.device)
    is_guided = tuple(guidance) != (1, 1)
    low, high = guidance

    # A random order of the positions. Tokens are stored in this order.
    order = noise(model.length).argsort(1)
    tokens = torch.zeros(len(label), 0, TOKEN, device=label.device)
    head_evaluations = 0

    for group in groups:
        # A whole evaluation: the encoder sees all known tokens, the decoder all positions.
        z, z_null, cache = predict(model, tokens, order, label, is_guided)

        # The next positions of the order are the group, (B, M). Keep z of these only.
        start = tokens.shape[1]
        stop = start + sum(group)
        members = order[:, start:stop]
        z, z_null = part(z, start, stop), part(z_null, start, stop)  # (B, M, C) each
        if len(group) > 1:
            context = context_of(cache, model.num_buffer + start, model.num_buffer + stop)

        drawn = tokens[:, :0]
        for j, n in enumerate(group):
            # From the second step on, a local evaluation. The encoder computes the known tokens of
            # the group, the decoder the whole group. Both attend to the cached context.
            steps_now = local_head_steps if j else head_steps
            if j:
                z, z_null, _ = predict(model, drawn, members, label, is_guided, context)

            # The guidance is linear in the share of tokens that are known after this step.
            done = drawn.shape[1]
            scale = low + (high - low) * (start + done + n) / model.length

            # Given z, the n tokens of a step are independent.
            new = draw_tokens(
                model.head,
                part(z, done, done + n),  # (B, n, C)
                part(z_null, done, done + n),
                noise,
                steps_now,
                temperature=temperature,
                scale=scale,
            )
            drawn = torch.cat([drawn, new], 1)
            head_evaluations += steps_now * n
        tokens = torch.cat([tokens, drawn], 1)

    # From the order of generation back to rows and columns.
    tokens = torch.empty_like(tokens).scatter(1, order[:, :, None].expand_as(tokens), tokens)
    return tokens, len(groups), steps - len(groups), head_evaluations / model.length


# ---------------------------------------------------------------- the command


def train_model(options, device):
    """Train a model on Shapes, and write it."""
    path = new_file(options.run, "mar.pt")
    torch.manual_seed(options.seed)
    model = MAR().to(device)

    def loss(images, label):
        return mar_loss(model, tokens_of(to_float(images)), label, options.least_masked)

    ema_model = fit_masked(options, model, loss, device, weight_decay=0.02)
    with writing(path) as file:
        torch.save(ema_model.state_dict(), file)
    print(f"wrote {path}")


def load_model(run, device):
    """Return the model in eval mode. run: a folder that `train` wrote.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    path = os.path.join(run, "mar.pt")
    with reading(path, "related.mar"):
        model = MAR().to(device)
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return model.eval().requires_grad_(False)


def draw_samples(options, model, device):
    """Draw images (N, 3, SIDE, SIDE) uint8 of all classes in turn, and labels (N,), on the CPU."""
    label = parse_labels(None, Shapes.classes, options.n)
    names = ("head_steps", "local_head_steps", "temperature", "guidance", "seed")
    settings = {name: getattr(options, name) for name in names}
    start, start_cpu = time.time(), time.process_time()
    images = []
    for first in range(0, options.n, options.batch):
        own_label = label[first : first + options.batch].to(device)
        steps = (options.steps, options.whole, options.local)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            tokens, whole, local, head_steps = generate(
                model, own_label, *steps, first=first, **settings
            )
        images.append(to_uint8(images_of(tokens)).cpu())
    cpu = 1000 * (time.process_time() - start_cpu) / options.n
    print(
        f"{options.n} images in {time.time() - start:.1f} s ({cpu:.0f} ms of processor time each): "
        f"{whole} whole and {local} local evaluations, {head_steps:.1f} head steps per token"
    )
    return torch.cat(images), label


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="mar",
        description="Masked generation of continuous tokens with reused context features.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"mar: {message}")
    add = parser.add_argument
    add("what", choices=["train", "sample", "real"])
    add("run", nargs="?", default="runs/mar", help="the folder of the model (default: runs/mar)")
    add("--updates", type=int, default=1800, help="train: training steps")
    add("--lr", type=float, default=1.5e-3, help="train: learning rate")
    least_help = "train: smallest share of masked tokens (default 0.7, as in the paper)"
    add("--least-masked", type=float, default=0.7, help=least_help)
    add("--steps", type=int, default=16, help="sample: steps of generation, up to 64")
    add("--whole", type=int, default=0, help="sample: first steps that are whole evaluations")
    add("--local", type=int, default=0, help="sample: local steps after each later whole one")
    add("--head-steps", type=int, default=50, help="sample: steps of the diffusion head")
    local_help = "sample: the same after local evaluations (default: as many)"
    add("--local-head-steps", type=int, help=local_help)
    add("--temperature", type=float, default=1.0, help="sample: the factor of the head's noise")
    guidance_help = (
        "sample: guidance scales with all tokens masked and with none (default 1 1: off)"
    )
    add("--guidance", type=float, nargs=2, default=(1.0, 1.0), help=guidance_help)
    add("--n", type=int, default=60, help="number of images")
    add("--batch", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--out", default="grid.png", help="sample, real: a .png (a grid) or .npz (samples)")
    return parser


def print_configurations():
    """Print the evaluations of the released settings: 256 tokens, half of the steps whole."""
    for name, numbers in (("MAR-L", (96, 84, 56, 36)), ("MAR-H", (128, 96, 48))):
        for steps in numbers:
            groups = grouped(cosine_plan(steps, 256), steps // 2, 1)
            print(
                f"{name}, {steps:3d} steps, --whole {steps // 2} --local 1: {len(groups)} whole "
                f"and {steps - len(groups)} local evaluations"
            )
    print("The head takes 100 steps after whole evaluations and 40 after local ones.")


def main(argv=None):
    """Parse the options and run the command."""
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = make_parser().parse_args(argv)
    if options.local_head_steps is None:
        options.local_head_steps = options.head_steps
    from_one = ("updates", "n", "batch", "head_steps", "local_head_steps")
    check_numbers(options, from_one, ("whole", "local", "seed"))
    check_out(options.out)
    if not (0 <= options.temperature < math.inf and 0 < options.lr < math.inf):
        raise ValueError("--temperature must be at least 0, and --lr above 0")
    if not 0 < options.least_masked < 1:
        raise ValueError("--least-masked must be above 0 and below 1")
    if not all(1 <= scale < math.inf for scale in options.guidance):
        raise ValueError("--guidance: both scales must be 1 or more")
    device = one_process(options.device)
    if options.what == "train":
        return train_model(options, device)
    if options.what == "real":
        images, label = load_batch(Shapes(SIDE, first=2**30), range(options.n))
    else:
        images, label = draw_samples(options, load_model(options.run, device), device)
    write_images(options.out, images.permute(0, 2, 3, 1), label, Shapes.classes)


if __name__ == "__main__":
    run_command(main)
