r"""SiD2, the successor: Simpler Diffusion (Hoogeboom et al., 2024, arXiv 2410.19324).

A net and a loss for train.py. The paper changes four things. The Residual U-ViT drops the skip
connections of the blocks and keeps one residual around each lower level, which saves memory. The
sigmoid loss weights each noise level by a function of logsnr, whatever the noise schedule, so that
the schedule only decides how often a level is drawn. This schedule is interpolated,
`interpolated:32:RES@10`. Guidance acts only in an interval of noise levels.

    python -m related.sid2                        # the configurations; published: 137 and 653 GMAC
    python train.py --res 64 --model related.sid2:ResidualUViT --size tiny --out runs/sid2
    torchrun --nproc-per-node 8 train.py --data imagenet/ --res 256 \
        --model related.sid2:ResidualUViT --size flop-heavy
    python sample.py runs/sid2 --guidance 2 --out grid.png     # guided in the recipe's interval
"""

import math

import torch
import torch.nn as nn

from loss import diffusion_loss
from related.common import introduce
from support.recipes import TRAINING
from unet import print_table, run_block
from uvit import UViT

# ---------------------------------------------------------------- the Residual U-ViT


class ResidualUViT(UViT):
    """The Residual U-ViT: one residual around all that is below a level, and no other skip.

    Arguments, forward and its result are those of uvit.UViT. At initialization every block is the
    identity, and so is everything between stem and head. Without skips, sampling needs less memory,
    and so does training that recomputes activations. Plain training does not: it keeps the input of
    every block for the gradient, and a skip is such an input.
    """

    block_skips = False

    def __init__(
        self,
        res,
        num_classes=1000,
        channel_multiplier=(1, 2, 4, 8),
        num_res_blocks=(3, 3, 3),
        num_transformer_blocks=16,
        transformer_dropout=0.0,
        attn_resolutions=(32,),
        **fields,
    ):
        super().__init__(
            res,
            num_classes,
            channel_multiplier=channel_multiplier,
            num_res_blocks=num_res_blocks,
            num_transformer_blocks=num_transformer_blocks,
            transformer_dropout=transformer_dropout,
            attn_resolutions=attn_resolutions,
            **fields,
        )
        # At initialization the residual is U(0), which must be 0: so is the bias of U.
        for up in self.upsample:
            nn.init.zeros_(up.bias)

    def forward(self, z, logsnr, label=None):
        """See uvit.UViT.forward."""
        h = self.stem(z)
        # Without levels above it, the transformer gets the position embedding here.
        if not self.down:
            h = h + self.position.to(h.dtype)
        return self.head(self.level(0, h, self.embed(logsnr, label)))

    def level(self, i, h, emb):
        """Run level i and all levels below it. h: (B, C_i, H_i, W_i). Returns the same shape."""
        # The lowest level is the transformer.
        if i == len(self.down):
            for block in self.transformer:
                h = run_block(block, h, emb)
            return h

        for block in self.down[i]:
            h = run_block(block, h, emb)

        # D: to the coarser grid of the next level.
        low = self.downsample[i](h)  # (B, C_{i+1}, H_i / 2, W_i / 2)

        # The position embedding enters before the residual, so that M is the identity at
        # initialization. This is our choice.
        if i + 1 == len(self.down):
            low = low + self.position.to(low.dtype)

        # The paper's residual: out = h + U(M(D(h)) - D(h)), with M the levels below.
        h = h + self.upsample[i](self.level(i + 1, low, emb) - low)

        for block in self.up[i]:
            h = run_block(block, h, emb)
        return h


# ---------------------------------------------------------------- the sigmoid loss


def loss_bias(image_d):
    """Return the bias b of the sigmoid weighting for a resolution in pixels.

    0 up to 128, -1 up to 256, -3 up to 512, -4 above (1024 px), as far as we know.
    """
    for largest, bias in ((128, 0.0), (256, -1.0), (512, -3.0)):
        if image_d <= largest:
            return bias
    return -4.0


def sigmoid_loss(net, x, schedule, label=None, *, bias=None, t=None, eps=None):
    """The sigmoid loss: -dlogsnr/dt sigmoid(b - logsnr) ||eps - eps_hat||^2.

    A lower b gives noisy images more weight. In x the same loss is
    -dlogsnr/dt e^b sigmoid(logsnr - b) ||x - x_hat||^2. bias: b; default: that of the resolution.
    Other arguments and results: see loss.diffusion_loss.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if bias is None:
        bias = loss_bias(min(x.shape[2:]))

    # The factor -dlogsnr/dt turns the mean over t into an integral over logsnr. Its value does not
    # depend on the schedule, apart from the schedule's ends.
    _, slope = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))  # (B,)
    loss, logsnr = diffusion_loss(net, x, schedule, label, space="eps", t=t, eps=eps)

    # The sigmoid falls from 1 at high noise to 0 at low noise, around logsnr = b.
    return -slope * torch.sigmoid(bias - logsnr) * loss, logsnr


# ---------------------------------------------------------------- recipes

# "small" and "flop-heavy" are nets of the paper. "flop-heavy" is the "small" net on a grid twice as
# fine; at 128 px there is no finer grid. "tiny" is ours.
_TINY = dict(emb_channels=128, base_channels=32, num_transformer_blocks=4, attn_resolutions=[])
ResidualUViT.RECIPES = {
    "tiny": {
        32: dict(_TINY, patching="conv_2", channel_multiplier=[1, 4], num_res_blocks=[2]),
        64: dict(_TINY, patching="conv_2", channel_multiplier=[1, 2, 4], num_res_blocks=[2, 2]),
        128: dict(
            _TINY,
            base_channels=16,
            patching="conv_2",
            channel_multiplier=[1, 2, 4, 8],
            num_res_blocks=[1, 2, 2],
        ),
    },
    "small": {128: dict(), 256: dict(patching="conv_2"), 512: dict(patching="conv_4")},
    "flop-heavy": {
        256: dict(attn_resolutions=[64]),
        512: dict(patching="conv_2", attn_resolutions=[64]),
    },
}

# Optimizer settings and no dropout are ours; those of large nets follow "base" of train.py.
_LARGE = dict(batch=1024, steps=500_000, lr=1e-4, warmup=10_000, ema=0.9999)
_TRAINING = {
    "tiny": dict(sampling=TRAINING["uvit", "tiny"]["sampling"]),
    "small": dict(_LARGE, micro=16),
    "flop-heavy": dict(_LARGE, micro=16),
}


def _guidance_interval(res):
    """Our interval of logsnr: -3 to 5 at 64 px, shifted elsewhere as Eq. 4 shifts the noise."""
    shift = 2 * math.log(64 / res)
    return [round(end + shift, 2) for end in (-3, 5)]


ResidualUViT.TRAINING = {
    (size, res): _TRAINING[size]
    | dict(
        loss="related.sid2:sigmoid_loss",
        schedule=f"interpolated:32:{res}@10",
        sampling=_TRAINING[size].get("sampling", {})
        | dict(guidance_interval=_guidance_interval(res)),
    )
    for size, by_res in ResidualUViT.RECIPES.items()
    for res in by_res
}


def print_configurations():
    """Print a table of the configurations: parameters, GMAC and activations."""
    recipes = ResidualUViT.RECIPES
    tiny = {f"tiny {res}": dict(fields, res=res) for res, fields in recipes["tiny"].items()}
    # At other resolutions, patching leads to the same grid, and the costs change by 0.2 % at most.
    paper = {f"{size} 256": dict(recipes[size][256], res=256) for size in ("small", "flop-heavy")}
    print_table(ResidualUViT, tiny | paper)
    print("small at 128 and 512 px and flop-heavy at 512 px: the same within 0.2 %, by patching")
    print("published at 256 px: small 137 GMAC, flop-heavy 653 GMAC")


def main(argv=None):
    """Print the idea, the configurations and the commands."""
    introduce(__doc__, print_configurations)


if __name__ == "__main__":
    main()
