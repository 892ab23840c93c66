"""ReCAP (arXiv 2505.19089): in masked generation most features hardly change while few tokens are decoded, so cheap steps in between reuse them.

A masked transformer (MaskGIT's kind) fills in discrete tokens, the surest ones first, in T steps. With ReCAP some steps are whole evaluations, whose keys and
values are kept, and the steps after each recompute the few tokens alone that are being decoded. No training is needed for it. The tokens here are the colors
of the built-in shapes at 16x16, in a palette of 16: 256 tokens.

    python -m related.recap train runs/recap                                             # the palette and the transformer, in half an hour on one core
    python -m related.recap sample runs/recap --steps 32 --whole 12 --local 1 --out grid.png        # 22 whole evaluations and 10 local ones
    python -m related.recap sample runs/recap --steps 32 --n 500 --out samples.npz       # all 32 whole
    python -m related.recap real runs/recap --n 5000 --out real.npz                      # shapes in that palette, to compare with
    python -m related.recap reuse runs/recap --n 200                                     # how far cached context, and reused logits, lead astray
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2

from data import Shapes
from related.common import check_numbers, check_out, one_process, write_pictures
from sample import has_bf16, mix_seed, parse_labels, run_command, writing
from train import ema_update, learning_rate
from unet import attend, zero_init

SIDE, COLORS = 16, 16


# ---------------------------------------------------------------- tokens


def make_palette(x, colors=COLORS, seed=0):
    """The centers (colors, 3) uint8 of k-means of all pixels of pictures (B, 3, H, W) uint8."""
    pixels = x.movedim(1, 3).reshape(-1, 3).double().numpy()
    return torch.from_numpy(kmeans2(pixels, colors, minit="++", seed=seed)[0].round()).to(
        torch.uint8
    )


def tokens_of(x, palette):
    """The nearest color's number for each pixel: (B, 3, H, W) uint8 -> (B, H W) int64."""
    pixels = x.movedim(1, 3).flatten(1, 2).float()  # (B, H W, 3)
    return torch.cdist(pixels, palette.float().to(x.device).expand(len(x), -1, -1)).argmin(2)


def pictures_of(tokens, palette, side=SIDE):
    """(B, side^2) -> (B, side, side, 3) uint8."""
    return palette[tokens].unflatten(1, (side, side))


# ---------------------------------------------------------------- the net


class MaskedBlock(nn.Module):
    """x + Attention(norm x), x + MLP(norm x); keys and values of tokens that are not in x may come from a cache."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = (
            nn.Linear(channels, 3 * channels),
            zero_init(nn.Linear(channels, channels)),
        )
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            zero_init(nn.Linear(4 * channels, channels)),
        )

    def forward(self, x, cache=None):
        """x: (B, N, C), cache: keys and values (B, heads, M, dim) each, or None. Returns the same of x."""
        q, k, v = (
            each.transpose(1, 2)
            for each in self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        )  # (B, heads, N, dim)
        keys, values = (
            (k, v)
            if cache is None
            else (torch.cat([old, new], 2) for old, new in zip(cache, (k, v)))
        )
        x = x + self.out(attend(q, keys, values).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class MaskedModel(nn.Module):
    """Logits of all tokens, given some of them and a class. vocabulary: number of tokens, after which comes the mask's; length: of the sequence."""

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
        self.vocabulary, self.length = vocabulary, length
        self.token, self.label = (
            nn.Embedding(vocabulary + 1, channels),
            nn.Embedding(num_classes, channels),
        )
        self.position = nn.Parameter(0.02 * torch.randn(length, channels))
        self.blocks = nn.ModuleList(MaskedBlock(channels, num_heads) for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, vocabulary)

    def forward(self, ids, label, positions=None, cache=None):
        """ids: (B, N), of masked tokens `vocabulary`; positions: (B, N) of them, or None for all in order; label: (B,). cache: for each block keys and
        values of other positions. Returns logits (B, N, vocabulary), and for each block keys and values of the class's token and of ids."""
        places = self.position if positions is None else self.position[positions]
        x = torch.cat(
            [self.label(label)[:, None], self.token(ids) + places], 1
        )  # the class is a token of its own, and computed anew each time
        kept = []
        for i, block in enumerate(self.blocks):
            x, own = block(x, None if cache is None else cache[i])
            kept.append(own)
        return self.head(self.norm(x[:, 1:])).to(
            self.position.dtype
        ), kept  # float32 under autocast, too


def without(cache, group):
    """The cache of a whole evaluation without the class's token and the positions (B, M) of group."""
    (first, _), *_ = cache
    b, heads, n, dim = first.shape
    left = torch.ones(b, n - 1, dtype=torch.bool, device=group.device).scatter(1, group, False)
    index = 1 + left.nonzero()[:, 1].reshape(b, 1, -1, 1).expand(
        -1, heads, -1, dim
    )  # as many are left of each sequence
    return [tuple(each.gather(2, index) for each in pair) for pair in cache]


# ---------------------------------------------------------------- decoding


def decoding_plan(steps, length):
    """How many tokens each step decodes: of a ratio 1 - (i / T)^2.5 that is still masked before step i; at least one, what is left in the last. Raises ValueError."""

    def plan(steps):
        left = [math.floor((1 - (i / steps) ** 2.5) * length) for i in range(steps + 1)]
        numbers = [max(1, a - b) for a, b in zip(left, left[1:])]
        return [*numbers[:-1], length - sum(numbers[:-1])]

    if steps < 1 or plan(min(steps, length))[-1] < 1 or steps > length:
        raise ValueError(
            f"{length} tokens are decoded in 1 to {max(n for n in range(1, length + 1) if plan(n)[-1] >= 1)} steps, not {steps}"
        )
    return plan(steps)


def grouped(plan, whole, local):
    """The plan in groups: the first `whole` steps alone, then each with the `local` steps after it, for which its keys and values are reused."""
    rest = plan[whole:]
    return [[n] for n in plan[:whole]] + [
        rest[i : i + 1 + local] for i in range(0, len(rest), 1 + local)
    ]


@torch.no_grad()
def decode(
    model, label, steps, whole=0, local=0, *, temperature=0.65, confidence=5.5, seed=0, first=0
):
    """Draws tokens (B, length) for labels (B,). local=0 evaluates the whole sequence in all steps.

    whole, local: see grouped. temperature: of the last step's draws, 1 at first. confidence: the scale of the Gumbel noise in the order of decoding, at
    first. The draws of sequence i follow from seed and first + i. Returns also the numbers of whole and of local evaluations, and how many
    tokens they computed, in whole evaluations.
    """
    b, s, groups, device = (
        len(label),
        model.length,
        grouped(decoding_plan(steps, model.length), whole, local),
        label.device,
    )
    generators = [torch.Generator(device).manual_seed(mix_seed(seed, first + i)) for i in range(b)]
    uniform = lambda *shape: torch.stack(
        [torch.rand(shape, generator=generator, device=device) for generator in generators]
    ).clamp(1e-20, 1 - 1e-7)
    gumbel = lambda *shape: -torch.log(-torch.log(uniform(*shape)))
    ids, step, queries = torch.full((b, s), model.vocabulary, device=device), 0, 0

    for g, group in enumerate(groups):
        logits, cache = model(ids, label)
        queries += 1 + s
        guess = (logits + gumbel(s, model.vocabulary)).argmax(
            2, keepdim=True
        )  # only to know how sure each is: the tokens are drawn again
        sure = logits.log_softmax(2).gather(2, guess)[:, :, 0] + confidence * (
            1 - (g + 1) / len(groups)
        ) * gumbel(s)
        group_at = (
            sure.masked_fill(ids != model.vocabulary, -math.inf).topk(sum(group), 1).indices
        )  # (B, M), the surest first
        tokens, done = torch.full_like(group_at, model.vocabulary), 0
        logits = logits.gather(1, group_at[:, :, None].expand(-1, -1, logits.shape[2]))
        others = without(cache, group_at) if len(group) > 1 else None
        for j, n in enumerate(group):
            if j:
                logits, _ = model(tokens, label, group_at, others)
                queries += 1 + group_at.shape[1]
            at_step = temperature + (1 - math.sqrt(step / max(1, steps - 1))) * (1 - temperature)
            tokens[:, done : done + n] = (
                logits[:, done : done + n] / at_step + gumbel(n, model.vocabulary)
            ).argmax(2)
            done, step = done + n, step + 1
        ids = ids.scatter(1, group_at, tokens)
    return ids, len(groups), steps - len(groups), queries / (1 + s)


@torch.no_grad()
def reuse_errors(model, ids, label, masked, group, generator=None):
    """KL(true, local) and KL(true, stale) in nats a token: what cached context costs, and what reusing logits would.

    Of sequences (B, length) random `masked` tokens are masked, and `group` of these decoded together, the first half already as in ids. For the other
    half, true are the logits of a whole evaluation now, local those of the group alone, stale those of before.
    """
    order = torch.rand(ids.shape, device=ids.device, generator=generator).argsort(1)
    places, half = order[:, :group], group // 2
    before = ids.scatter(1, order[:, :masked], model.vocabulary)
    now = before.scatter(1, places[:, :half], ids.gather(1, places[:, :half]))
    stale, cache = model(before, label)
    local, _ = model(now.gather(1, places), label, places, without(cache, places))
    at = places[:, half:, None].expand(-1, -1, stale.shape[2])
    true, local, stale = (
        logits.log_softmax(2)
        for logits in (model(now, label)[0].gather(1, at), local[:, half:], stale.gather(1, at))
    )
    return tuple((true.exp() * (true - other)).sum(2).mean().item() for other in (local, stale))


# ---------------------------------------------------------------- the command


def masked_loss(model, ids, label, generator=None):
    """The mean cross-entropy of the masked tokens, of a share cos(pi u / 2) of them for u uniform in [0, 1), at least one (MaskGIT, arXiv 2202.04200)."""
    u = torch.rand(len(ids), 1, device=ids.device, generator=generator)
    order = torch.rand(ids.shape, device=ids.device, generator=generator).argsort(1).argsort(1)
    masked = order < (torch.cos(0.5 * math.pi * u) * ids.shape[1]).ceil().clamp(min=1)
    logits, _ = model(torch.where(masked, model.vocabulary, ids), label)
    return F.cross_entropy(logits[masked], ids[masked])


def load_model(path, device):
    """(model in eval mode, palette) of a folder that `train` wrote. Raises ValueError."""
    try:
        saved = torch.load(os.path.join(path, "recap.pt"), map_location=device, weights_only=True)
        model = MaskedModel().to(device)
        model.load_state_dict(saved["ema"])
        return model.eval().requires_grad_(False), saved["palette"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}/recap.pt was not written by this command ({type(error).__name__})"
        ) from error


def train_model(options, device):
    if os.path.exists(f"{options.run}/recap.pt"):
        raise ValueError(f"{options.run} holds a model: choose another folder, or delete it")
    torch.manual_seed(options.seed)
    data, palette = (
        Shapes(SIDE, device),
        make_palette(Shapes(SIDE)[range(min(5000, options.updates * options.batch))][0]),
    )
    model = MaskedModel().to(device)
    average = MaskedModel().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer, begun = (
        torch.optim.AdamW(
            model.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=0.03, fused=True
        ),
        time.time(),
    )
    for update in range(options.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, options.lr, 100, 0.33, options.updates)
        x, label = data[range(update * options.batch, (update + 1) * options.batch)]
        ids = tokens_of(x, palette)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            loss = masked_loss(model, ids, label)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(average, model, min(0.998, (update + 1) / (update + 10)))
        if (update + 1) % 100 == 0 or update + 1 == options.updates:
            print(
                f"update {update + 1}/{options.updates}  cross-entropy {loss.item():.3f}  {(update + 1) * options.batch / (time.time() - begun):.0f} img/s",
                flush=True,
            )
    os.makedirs(options.run, exist_ok=True)
    with writing(f"{options.run}/recap.pt") as file:
        torch.save(dict(ema=average.state_dict(), palette=palette.cpu()), file)
    print(f"wrote {options.run}/recap.pt")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="recap",
        description="Masked generation of shapes, with cached context.",
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"recap: {message}")
    parser.add_argument("what", choices=["train", "sample", "real", "reuse"])
    parser.add_argument("run", help="a folder")
    parser.add_argument("--updates", type=int, default=1500, help="train: of the weights")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=32, help="sample: of decoding")
    parser.add_argument(
        "--whole", type=int, default=0, help="steps at first that are whole evaluations"
    )
    parser.add_argument(
        "--local", type=int, default=0, help="steps after each whole one, later, that are local"
    )
    parser.add_argument("--temperature", type=float, default=0.65, help="of the last step")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", default="grid.png", help="grid.png or samples.npz")
    options = parser.parse_args(argv)
    check_numbers(options, ("updates", "n", "batch"), ("whole", "local", "seed"))
    check_out(options.out)
    if not (0 < options.temperature < math.inf and 0 < options.lr < math.inf):
        raise ValueError("--temperature and --lr take numbers above 0")
    device = one_process(options.device)
    if options.what == "train":
        return train_model(options, device)
    model, palette = load_model(options.run, device)
    if options.what == "reuse":
        x, label = Shapes(SIDE, first=2**30)[range(options.n)]
        for masked in (192, 128, 64):
            local, stale = reuse_errors(
                model,
                tokens_of(x.to(device), palette),
                label.to(device),
                masked,
                16,
                torch.Generator(device).manual_seed(options.seed),
            )
            print(
                f"{masked} of 256 masked, 16 decoded together: KL of cached context {local:.5f}, of reused logits {stale:.5f} nats a token"
            )
        return
    if options.what == "real":
        x, label = Shapes(SIDE, first=2**30)[range(options.n)]
        pictures = pictures_of(tokens_of(x, palette.cpu()), palette.cpu())
    else:
        label, begun, tokens = parse_labels(None, Shapes.classes, options.n), time.time(), []
        for i in range(0, options.n, options.batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                ids, whole, local, cost = decode(
                    model,
                    label[i : i + options.batch].to(device),
                    options.steps,
                    options.whole,
                    options.local,
                    temperature=options.temperature,
                    seed=options.seed,
                    first=i,
                )
            tokens.append(ids.cpu())
        print(
            f"{options.n} pictures in {time.time() - begun:.1f} s: {whole} whole and {local} local evaluations each, the tokens of {cost:.1f} whole ones"
        )
        pictures = pictures_of(torch.cat(tokens), palette.cpu())
    write_pictures(options.out, pictures, label, Shapes.classes)


if __name__ == "__main__":
    run_command(main)
