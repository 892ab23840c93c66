"""ReCAP (Liu, Liu, Van den Broeck and Liang 2025, arXiv 2505.19089): reuse of context features.

Masked generation fills in discrete tokens in T steps, the most confident ones first. While few
tokens are decoded, the features of all others hardly change. So after a whole evaluation, ReCAP
keeps the keys and values of every layer. The next steps are local: they recompute only the tokens
that are being decoded, and they attend to the kept ones. This needs no training. Here the tokens
are the colors of the built-in shapes at 16x16, in a palette of 16: 256 tokens.

    python -m related.recap train runs/recap          # palette and transformer
    python -m related.recap sample runs/recap --steps 32 --whole 12 --local 1 --out grid.png
                                                      # 22 whole evaluations and 10 local ones
    python -m related.recap sample runs/recap --steps 32 --n 500 --out samples.npz    # all whole
    python -m related.recap sample runs/recap --steps 32 --guidance 1 3 --out grid.png
    python -m related.recap real runs/recap --n 5000 --out real.npz    # shapes in the palette
    python -m related.recap reuse runs/recap --n 200  # errors of reused context and reused logits
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from related.common import (
    check_numbers,
    check_out,
    fit,
    introduce,
    no_arguments,
    noise_by_number,
    one_process,
    progress_printer,
    reading,
    write_images,
)
from sample import parse_labels
from support.data import Shapes, load_batch
from support.runtime import has_bf16, run_command, writing
from unet import attend, zero_init

SIDE, COLORS = 16, 16


# ---------------------------------------------------------------- tokens


def make_palette(images, colors=COLORS, seed=0):
    """Return the colors (colors, 3) uint8 that k-means finds in images (B, 3, H, W) uint8."""
    from scipy.cluster.vq import kmeans2

    # Every pixel is a point in RGB space. kmeans2 computes in float64.
    pixels = images.movedim(1, 3).reshape(-1, 3).double().numpy()
    centers, _ = kmeans2(pixels, colors, minit="++", seed=seed)
    return torch.from_numpy(centers.round()).to(torch.uint8)


def tokens_of(images, palette):
    """Return the index of the nearest color of each pixel: (B, 3, H, W) uint8 -> (B, H W) int64."""
    pixels = images.movedim(1, 3).flatten(1, 2).float()  # (B, H W, 3)
    colors = palette.float().to(images.device).expand(len(images), -1, -1)  # (B, colors, 3)
    return torch.cdist(pixels, colors).argmin(2)


def images_of(tokens, palette, side=SIDE):
    """Return the images (B, side, side, 3) uint8 of tokens (B, side^2)."""
    return palette[tokens].unflatten(1, (side, side))


# ---------------------------------------------------------------- the network


class MaskedBlock(nn.Module):
    """A transformer block whose tokens may also attend to cached keys and values."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            zero_init(nn.Linear(4 * channels, channels)),
        )

    def forward(self, x, cache=None):
        """x: (B, N, C). cache: keys and values of M other tokens, (B, heads, M, dim), or None.

        Returns x, and the keys and values of x itself, (B, heads, N, dim).
        """
        # Pre-norm self-attention: queries, keys and values of the tokens in x.
        h = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = h.transpose(1, 3).unbind(2)  # (B, heads, N, dim) each

        # The order of keys does not matter: their positions are part of them.
        keys, values = k, v
        if cache is not None:
            cached_keys, cached_values = cache
            keys = torch.cat([cached_keys, k], 2)  # (B, heads, M + N, dim)
            values = torch.cat([cached_values, v], 2)
        h = attend(q, keys, values)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class MaskedModel(nn.Module):
    """A bidirectional transformer that predicts tokens from other tokens and a class.

    vocabulary: number of tokens; the mask token follows them. length: of the sequence. The null
    label follows the classes.
    """

    def __init__(
        self,
        vocabulary=COLORS,
        length=SIDE**2,
        num_classes=10,
        channels=96,
        num_blocks=6,
        num_heads=3,
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.length = length
        self.num_classes = num_classes
        self.token = nn.Embedding(vocabulary + 1, channels)
        self.label = nn.Embedding(num_classes + 1, channels)
        self.position = nn.Parameter(0.02 * torch.randn(length, channels))
        self.blocks = nn.ModuleList(MaskedBlock(channels, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocabulary)

    def forward(self, ids, label, positions=None, cache=None):
        """Return logits (B, N, vocabulary), and the keys and values of each block.

        ids: (B, N); a masked token is `vocabulary`. label: (B,). positions: (B, N), the positions
        of these tokens, or None for the whole sequence in order. cache: keys and values of each
        block for other positions, or None.
        """
        position = self.position if positions is None else self.position[positions]
        x = self.token(ids) + position  # (B, N, C)

        # The class is a token of its own. A local evaluation computes it again.
        x = torch.cat([self.label(label)[:, None], x], 1)  # (B, 1 + N, C)
        own = []
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, None if cache is None else cache[i])
            own.append(keys_values)
        logits = self.head(self.norm(x[:, 1:]))
        return logits.to(self.position.dtype), own  # float32, also under autocast


def without(cache, group):
    """Return the cache of a whole evaluation without the class token and the group's positions.

    group: (B, M). All other positions stay, decoded and masked: dropping the masked ones would
    change the attention weights.
    """
    # Mark the positions to keep.
    (keys, _), *_ = cache
    b, heads, n, dim = keys.shape
    kept = torch.ones(b, n - 1, dtype=torch.bool, device=group.device).scatter(1, group, False)
    # Every sequence keeps the same number of positions. The class token is entry 0 of the cache.
    index = 1 + kept.nonzero()[:, 1].reshape(b, 1, -1, 1).expand(-1, heads, -1, dim)
    return [tuple(tensor.gather(2, index) for tensor in pair) for pair in cache]


# ---------------------------------------------------------------- decoding


def decoding_plan(steps, length):
    """Return the number of tokens that each step decodes. Raises ValueError for too many steps."""

    def plan(steps):
        # Before step i, a ratio 1 - (i / T)^2.5 is masked. A step decodes at least one token, and
        # the last step decodes the rest.
        masked = [math.floor((1 - (i / steps) ** 2.5) * length) for i in range(steps + 1)]
        numbers = [max(1, now - after) for now, after in zip(masked, masked[1:])]
        return [*numbers[:-1], length - sum(numbers[:-1])]

    if steps < 1 or steps > length or plan(steps)[-1] < 1:
        most = max(n for n in range(1, length + 1) if plan(n)[-1] >= 1)
        raise ValueError(f"{length} tokens need 1 to {most} decoding steps, not {steps}")
    return plan(steps)


def grouped(plan, whole, local):
    """Group the steps of a plan: each group has one whole evaluation.

    The first `whole` steps are alone. After that, each step takes the next `local` steps with it.
    """
    first = [[n] for n in plan[:whole]]
    rest = plan[whole:]
    return first + [rest[i : i + 1 + local] for i in range(0, len(rest), 1 + local)]


def gumbel_noise(seed, numbers, device):
    """Return a function that draws Gumbel noise (B, *shape) at each call.

    The noise of a sequence depends on the seed and its number, so not on the batch size.
    """
    uniform = noise_by_number(seed, numbers, device, torch.rand)

    def gumbel(*shape):
        # The limits keep both logarithms finite.
        u = uniform(*shape).clamp(1e-20, 1 - 1e-7)
        return -torch.log(-torch.log(u))

    return gumbel


def choose_positions(logits, masked, n, scale, gumbel):
    """Return the n masked positions of highest confidence, the most confident ones first.

    logits: (B, S, vocabulary). masked: (B, S) bool. scale: of the noise on the confidences. Returns
    the positions and the tokens on which their confidences were judged, (B, n) each.
    """
    # Draw a token for each position, by the Gumbel-max trick. Its probability is the confidence.
    draws = (logits + gumbel(*logits.shape[1:])).argmax(2)  # (B, S)
    log_p = logits.log_softmax(2).gather(2, draws[:, :, None])[:, :, 0]

    # Noise on the confidences makes the order of decoding random.
    confidence = log_p + scale * gumbel(logits.shape[1])
    positions = confidence.masked_fill(~masked, -math.inf).topk(n, 1).indices
    return positions, draws.gather(1, positions)


def guided_logits(model, ids, label, w, positions=None, cache=None):
    """Return cond + w (cond - uncond), logits (B, N, vocabulary), and keys and values.

    The model evaluates every sequence twice, in one batch: with its label and with the null label.
    The keys and values, also those of the cache, are of both: (2 B, heads, N, dim). With w = None
    there is no guidance, and only the label is used.
    """
    if w is None:
        return model(ids, label, positions, cache)
    labels = torch.cat([label, torch.full_like(label, model.num_classes)])
    positions = None if positions is None else positions.repeat(2, 1)
    logits, own = model(ids.repeat(2, 1), labels, positions, cache)
    cond, uncond = logits.chunk(2)
    return cond + w * (cond - uncond), own


@torch.no_grad()
def decode(
    model,
    label,
    steps,
    whole=0,
    local=0,
    *,
    temperature=0.65,
    confidence=5.5,
    guidance=(1.0, 1.0),
    seed=0,
    first=0,
):
    """Draw tokens (B, length) for labels (B,). With local=0 every step is a whole evaluation.

    whole, local: see grouped. temperature: of the draws in the last step of groups of several
    steps; it is 1 in the first. confidence: the scale of the noise on the confidences in the
    beginning. guidance: the scales in the first and in the last step; (1, 1) is no guidance. The
    draws of sequence i depend on the seed and first + i.

    Returns the tokens, the number of whole and of local evaluations, and their cost, counted in
    tokens, as a number of whole evaluations without guidance.
    """
    groups = grouped(decoding_plan(steps, model.length), whole, local)
    gumbel = gumbel_noise(seed, range(first, first + len(label)), label.device)
    mask = model.vocabulary
    ids = torch.full((len(label), model.length), mask, device=label.device)
    # The authors write a scale s as w = s - 1. It changes linearly over the steps.
    is_guided = tuple(guidance) != (1, 1)
    w = [None] * steps
    if is_guided:
        w = torch.linspace(guidance[0] - 1, guidance[1] - 1, steps).tolist()
    step = computed = 0

    for g, group in enumerate(groups):
        # A whole evaluation of all tokens and the class.
        logits, cache = guided_logits(model, ids, label, w[step])
        computed += 1 + model.length

        # It chooses the positions (B, M) of all steps of the group at once. The noise on the
        # confidences falls to 0 over the groups.
        scale = confidence * (1 - (g + 1) / len(groups))
        positions, tokens = choose_positions(logits, ids == mask, sum(group), scale, gumbel)

        # A group of one step keeps the tokens on which the confidences were judged, as MaskGIT
        # does. A group of several steps draws all of its tokens again, at a lower temperature.
        if len(group) > 1:
            logits = logits.gather(1, positions[:, :, None].expand(-1, -1, logits.shape[2]))
            context = without(cache, positions.repeat(2, 1) if is_guided else positions)
            tokens = torch.full_like(positions, mask)
            done = 0
            for j, n in enumerate(group):
                # From the second step on, a local evaluation: only the group's tokens are
                # recomputed, and they attend to the cached context.
                if j:
                    given = (tokens, label, w[step + j], positions, context)
                    logits, _ = guided_logits(model, *given)
                    computed += 1 + positions.shape[1]

                # Draw the next n tokens. The temperature falls from 1 to its final value.
                progress = math.sqrt((step + j) / (steps - 1))
                now = temperature + (1 - progress) * (1 - temperature)
                scores = logits[:, done : done + n] / now + gumbel(n, model.vocabulary)
                tokens[:, done : done + n] = scores.argmax(2)
                done += n
        ids = ids.scatter(1, positions, tokens)
        step += len(group)
    cost = computed / (1 + model.length) * (2 if is_guided else 1)
    return ids, len(groups), steps - len(groups), cost


@torch.no_grad()
def reuse_errors(model, ids, label, masked, group, generator=None):
    """Return KL(true, local) and KL(true, stale) in nats per token.

    They are the errors of reused context and of reused logits. ids: sequences (B, length). Of each,
    `masked` random tokens are masked, and `group` of these are decoded together. The first half of
    the group is decoded already. For the other half, the true logits are those of a whole
    evaluation, the local ones use cached context, and the stale ones are from before.
    """
    order = torch.rand(ids.shape, device=ids.device, generator=generator).argsort(1)
    positions = order[:, :group]
    half = group // 2

    # The sequences before and after the first half of the group is decoded.
    before = ids.scatter(1, order[:, :masked], model.vocabulary)
    decoded = positions[:, :half]
    now = before.scatter(1, decoded, ids.gather(1, decoded))

    # Three predictions for the other half, (B, group - half, vocabulary) each.
    stale, cache = model(before, label)
    local, _ = model(now.gather(1, positions), label, positions, without(cache, positions))
    true, _ = model(now, label)
    at = positions[:, half:, None].expand(-1, -1, stale.shape[2])
    true = true.gather(1, at).log_softmax(2)
    local = local[:, half:].log_softmax(2)
    stale = stale.gather(1, at).log_softmax(2)

    # KL(true, other) = sum of p (log p - log q), averaged over positions.
    def kl(other):
        return (true.exp() * (true - other)).sum(2).mean().item()

    return kl(local), kl(stale)


# ---------------------------------------------------------------- training and files


def masked_loss(model, ids, label, generator=None):
    """Return the mean cross-entropy of masked tokens (MaskGIT, arXiv 2202.04200), a scalar."""
    # A random share cos(pi u / 2) of the tokens is masked, at least one; u is uniform in [0, 1).
    u = torch.rand(len(ids), 1, device=ids.device, generator=generator)
    rank = torch.rand(ids.shape, device=ids.device, generator=generator).argsort(1).argsort(1)
    masked = rank < (torch.cos(0.5 * math.pi * u) * ids.shape[1]).ceil().clamp(min=1)

    # The loss counts masked tokens only: the others are visible.
    logits, _ = model(torch.where(masked, model.vocabulary, ids), label)
    return F.cross_entropy(logits[masked], ids[masked])


def fit_masked(options, model, loss, device, weight_decay=0.03):
    """Train a model on Shapes. Returns a copy with EMA weights. Also for mar.py.

    options: updates, batch, lr and seed are used. model.num_classes: the null label. loss: a
    function from images (B, 3, SIDE, SIDE) uint8 and labels (B,) to a scalar. weight_decay: of
    AdamW.
    """
    data = Shapes(SIDE, device)
    drops = torch.Generator().manual_seed(options.seed)

    def gradients(update):
        first = update * options.batch
        images, label = load_batch(data, range(first, first + options.batch))
        # A tenth of the images has the null label, for guidance.
        dropped = torch.rand(len(label), generator=drops) < 0.1
        label = torch.where(dropped.to(device), model.num_classes, label)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            value = loss(images, label)
        value.backward()
        return value

    # The learning rate rises over 100 steps, and falls to 0 over the last third.
    report = progress_printer(options.updates, options.batch, "loss {:.4f}", "update")
    settings = dict(warmup=100, decay=0.33, ema=0.998, eps=1e-8, weight_decay=weight_decay)
    return fit(model, gradients, steps=options.updates, lr=options.lr, report=report, **settings)


def new_file(run, name):
    """Return RUN/NAME and create the folder. Raises ValueError if the file exists."""
    path = os.path.join(run, name)
    if os.path.exists(path):
        raise ValueError(f"{run} holds a model: choose another folder, or delete it")
    os.makedirs(run, exist_ok=True)
    return path


def train_model(options, device):
    """Train a masked transformer on Shapes, and write it with its palette."""
    path = new_file(options.run, "recap.pt")
    torch.manual_seed(options.seed)
    # The palette comes from the first training images, at most 5,000.
    images, _ = load_batch(Shapes(SIDE), range(min(5000, options.updates * options.batch)))
    palette = make_palette(images)
    model = MaskedModel().to(device)

    def loss(images, label):
        return masked_loss(model, tokens_of(images, palette), label)

    ema_model = fit_masked(options, model, loss, device)
    with writing(path) as file:
        torch.save(dict(ema=ema_model.state_dict(), palette=palette.cpu()), file)
    print(f"wrote {path}")


def load_model(run, device):
    """Return the model, in eval mode, and its palette. run: a folder that `train` wrote.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    path = os.path.join(run, "recap.pt")
    with reading(path, "related.recap"):
        saved = torch.load(path, map_location=device, weights_only=True)
        model = MaskedModel().to(device)
        model.load_state_dict(saved["ema"])
        return model.eval().requires_grad_(False), saved["palette"]


# ---------------------------------------------------------------- the command


def print_reuse(options, model, palette, device):
    """Print the errors of reused context and reused logits, at three stages of decoding."""
    images, label = load_batch(Shapes(SIDE, first=2**30), range(options.n))
    ids = tokens_of(images.to(device), palette)
    for masked in (192, 128, 64):
        generator = torch.Generator(device).manual_seed(options.seed)
        local, stale = reuse_errors(model, ids, label.to(device), masked, 16, generator)
        print(
            f"{masked} of 256 masked, 16 decoded together: KL of cached context {local:.5f}, "
            f"of reused logits {stale:.5f} nats per token"
        )


def draw_samples(options, model, device):
    """Draw tokens for all classes in turn. Returns tokens (N, length) and labels (N,), on CPU."""
    label = parse_labels(None, Shapes.classes, options.n)
    settings = {key: getattr(options, key) for key in ("temperature", "guidance", "seed")}
    start = time.time()
    tokens = []
    for first in range(0, options.n, options.batch):
        part = label[first : first + options.batch].to(device)
        steps = (options.steps, options.whole, options.local)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            ids, whole, local, cost = decode(model, part, *steps, first=first, **settings)
        tokens.append(ids.cpu())
    print(
        f"{options.n} images in {time.time() - start:.1f} s: {whole} whole and {local} local "
        f"evaluations each, at the cost of {cost:.1f} whole ones without guidance"
    )
    return torch.cat(tokens), label


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="recap",
        description="Masked generation of shapes with reused context features.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"recap: {message}")
    add = parser.add_argument
    add("what", choices=["train", "sample", "real", "reuse"])
    add("run", help="the folder of the model")
    add("--updates", type=int, default=1500, help="train: training steps")
    add("--lr", type=float, default=1e-3, help="train: learning rate")
    add("--steps", type=int, default=32, help="sample: decoding steps")
    add("--whole", type=int, default=0, help="sample: first steps that are whole evaluations")
    add("--local", type=int, default=0, help="sample: local steps after each later whole one")
    add("--temperature", type=float, default=0.65, help="sample: temperature of the last step")
    guidance_help = "sample: guidance scales of the first and the last step (default 1 1: none)"
    add("--guidance", type=float, nargs=2, default=(1.0, 1.0), help=guidance_help)
    add("--n", type=int, default=60, help="number of images")
    add("--batch", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: a GPU if there is one)")
    add("--out", default="grid.png", help="sample, real: a .png (a grid) or .npz (samples)")
    return parser


# Released settings for MaskGIT: steps, whole steps before the first local one, local steps after a
# whole one; then the published numbers of whole and local evaluations.
PUBLISHED = (
    (32, 12, 1, 22, 10),
    (24, 10, 1, 17, 7),
    (20, 10, 1, 15, 5),
    (16, 8, 1, 12, 4),
    (16, 0, 1, 8, 8),
)


def print_configurations():
    """Print the evaluations of the released settings, for 256 tokens."""
    for steps, whole, local, *published in PUBLISHED:
        groups = grouped(decoding_plan(steps, 256), whole, local)
        later = sum(len(group) - 1 for group in groups)
        print(
            f"{steps} steps, --whole {whole:2d} --local {local}: {len(groups):2d} whole and "
            f"{later:2d} local evaluations (released: {published[0]} and {published[1]})"
        )


def main(argv=None):
    """Parse the options and run the command."""
    if no_arguments(argv):
        return introduce(__doc__, print_configurations)
    options = make_parser().parse_args(argv)
    check_numbers(options, ("updates", "n", "batch"), ("whole", "local", "seed"))
    check_out(options.out)
    if not (0 < options.temperature < math.inf and 0 < options.lr < math.inf):
        raise ValueError("--temperature and --lr must be above 0")
    if not all(1 <= scale < math.inf for scale in options.guidance):
        raise ValueError("--guidance: both scales must be 1 or more")
    device = one_process(options.device)
    if options.what == "train":
        return train_model(options, device)

    model, palette = load_model(options.run, device)
    if options.what == "reuse":
        return print_reuse(options, model, palette, device)
    if options.what == "real":
        images, label = load_batch(Shapes(SIDE, first=2**30), range(options.n))
        tokens = tokens_of(images, palette.cpu())
    else:
        tokens, label = draw_samples(options, model, device)
    write_images(options.out, images_of(tokens, palette.cpu()), label, Shapes.classes)


if __name__ == "__main__":
    run_command(main)
