"""What came after: Simpler Diffusion (Hoogeboom et al. 2024, arXiv 2410.19324, "SiD2"), as a net and a loss for train.py.

Three changes: the Residual U-ViT drops the skips of the blocks for one residual around each lower level; the sigmoid loss weights
noise levels by what they are, not by how often training draws them; and guidance acts only in an interval of noise levels.

    python -m related.sid2                                                 # the configurations: 137 and 653 GMAC were published
    python train.py --res 64 --model related.sid2:ResidualUViT --size tiny --out runs/sid2
    torchrun --nproc-per-node 8 train.py --data imagenet/ --res 256 --model related.sid2:ResidualUViT --size flop-heavy
    python sample.py runs/sid2 --guidance 2 --out grid.png                 # guided in the recipe's interval
"""

import math

import torch
import torch.nn as nn

from loss import diffusion_loss
from unet import print_table, run_block
from uvit import UViT


class ResidualUViT(UViT):
    """The Residual U-ViT: M, all that lies below a level, is wrapped in one residual, out = h + U(M(D(h)) - D(h)); there is no other skip.

    Fields, forward and what it returns are those of uvit.UViT. As every block is the identity at first, so is all between stem and head.
    Autograd keeps the inputs of blocks anyway, and skips are such inputs: it is sampling, and training with recomputation, that need less memory.
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
        for up in self.upsample:
            nn.init.zeros_(up.bias)  # else the residual would not be 0 at first

    def forward(self, z, logsnr, label=None):
        return self.head(self.level(0, self.stem(z), *self.embed(logsnr, label)))

    def level(self, i, h, emb, text=None):
        """All of level i and below, M of the level above. h: (B, C_i, H_i, W_i), and so is what it returns."""
        if i == len(self.down):
            for block in self.transformer:
                h = run_block(block, h, emb, None, text)
            return h
        for block in self.down[i]:
            h = run_block(block, h, emb, None, text)
        low = self.downsample[i](h)
        if i + 1 == len(self.down):
            low = low + self.position.to(
                low.dtype
            )  # before the residual, so that M is the identity at first; the paper does not say
        h = h + self.upsample[i](self.level(i + 1, low, emb, text) - low)
        for block in self.up[i]:
            h = run_block(block, h, emb, None, text)
        return h


def loss_bias(image_d):
    """The bias b of the sigmoid weighting for a resolution in pixels: 0 up to 128, -1 up to 256, -3 up to 512, -4 above (1024), as far as we know."""
    return 0.0 if image_d <= 128 else -1.0 if image_d <= 256 else -3.0 if image_d <= 512 else -4.0


def sigmoid_loss(net, x, schedule, label=None, *, bias=None, t=None, eps=None):
    """The sigmoid loss: -dlogsnr/dt sigmoid(b - logsnr) ||eps - eps_hat||^2; bias: b, by default that of the resolution.

    -dlogsnr/dt turns the mean over t into an integral over logsnr, so that the schedule only says where draws are many, not what
    they count: its ends aside, the expectation does not depend on it. The lower b, the more noisy pictures count; in x the same loss
    is -dlogsnr/dt e^b sigmoid(logsnr - b) ||x - x_hat||^2. x, label, t, eps, and what is returned: as in loss.diffusion_loss.
    """
    t = torch.rand(len(x), device=x.device) if t is None else t
    bias = loss_bias(min(x.shape[2:])) if bias is None else bias
    _, slope = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))
    loss, logsnr = diffusion_loss(net, x, schedule, label, space="eps", t=t, eps=eps)
    return -slope * torch.sigmoid(bias - logsnr) * loss, logsnr


# Nets as published: "flop-heavy" is that of "small" on a grid that is twice as fine, which 128 px has not got. "tiny", the optimizer, no dropout
# and the guidance interval are ours; that is -3 to 5 at 64 px, and shifted as noise is by Eq. 4 elsewhere.
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
_BIG = dict(
    batch=1024, steps=500_000, lr=1e-4, warmup=10_000, ema=0.9999
)  # of nets as large as "base" of train.py
_TRAINING = {"tiny": {}, "small": dict(_BIG, micro=16), "flop-heavy": dict(_BIG, micro=16)}
ResidualUViT.TRAINING = {
    (size, res): dict(
        _TRAINING[size],
        loss="related.sid2:sigmoid_loss",
        schedule=f"interpolated:32:{res}@10",
        sampling=dict(
            guidance_interval=[round(end + 2 * math.log(64 / res), 2) for end in (-3, 5)]
        ),
    )
    for size, by_res in ResidualUViT.RECIPES.items()
    for res in by_res
}

if __name__ == "__main__":
    print_table(
        ResidualUViT,
        {
            f"{size} {res}": dict(fields, res=res)
            for size, by_res in ResidualUViT.RECIPES.items()
            for res, fields in by_res.items()
        },
    )
