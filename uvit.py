"""The U-ViT of simple diffusion (Fig. 7-8, appendix): a transformer inside a convolutional U-Net.

The levels above 16x16 are those of the U-Net, with n blocks each way. The 16x16 level is one stack
of transformer blocks, with learned position embeddings and without skip connections. [S] has the
same meaning as in unet.py.

    python uvit.py    # published configurations: we count 2455.0 M parameters for U-ViT L 256
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from unet import (
    Attention,
    Down,
    Embedding,
    Head,
    ResBlock,
    Stem,
    Up,
    grid_sizes,
    print_table,
    run_block,
    to_grid,
    to_tokens,
    zero_init,
)


class MLPBlock(nn.Module):
    """The MLP block, over tokens x, skip (B, T, C). emb: (B, emb_channels)."""

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.norm_skip = nn.LayerNorm(channels) if skip else None
        self.dense1 = nn.Linear(channels, 4 * channels)
        self.film = nn.Linear(emb_channels, 8 * channels)
        self.dropout = nn.Dropout(dropout)
        self.dense2 = zero_init(nn.Linear(4 * channels, channels))

    def forward(self, x, emb, skip=None):
        # A skip is normalized and added, as in the ResBlock. Only transformer blocks on the upward
        # path have one: those at the lowest resolution have none.
        h = self.norm(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)

        # FiLM acts on the hidden layer, which has 4 C channels [S]. On C channels, U-ViT L would
        # have 2.00 B parameters. Others quote 2.4 to 2.5 B.
        scale, shift = self.film(emb)[:, None].chunk(2, 2)  # (B, 1, 4 C) each
        h = F.silu(self.dense1(h)) * (1 + scale) + shift  # (B, T, 4 C)

        # Dropout, then a zero-initialized projection back to C channels.
        return x + self.dense2(self.dropout(h))


class TransformerBlock(nn.Module):
    """An MLP block, then self-attention. x, skip: (B, C, H, W), so it can replace a ResBlock."""

    def __init__(self, channels, emb_channels, num_heads, dropout=0.0, skip=False):
        super().__init__()
        self.mlp = MLPBlock(channels, emb_channels, dropout, skip)
        self.attention = Attention(channels, num_heads)

    def forward(self, x, emb, skip=None):
        # Every pixel of the feature map is one token.
        if skip is not None:
            skip = to_tokens(skip)
        return to_grid(self.tokens_forward(to_tokens(x), emb, skip), like=x)

    def tokens_forward(self, x, emb, skip=None):
        """The block on tokens. x, skip: (B, H W, C). Returns the same shape."""
        return self.attention(self.mlp(x, emb, skip))


class UViT(nn.Module):
    """The U-ViT of Fig. 7-8.

    res: side of the image in pixels, or (height, width), fixed by the position embeddings.
    num_classes: number of classes, without the null label. channel_multiplier: one number per
    level, the last for the transformer. num_res_blocks: one number per level above the transformer.
    Three options name feature map sizes (the shorter side): levels in attn_resolutions have
    transformer blocks instead of ResBlocks, ResBlocks of size dropout_from_resolution or smaller
    have dropout, and blocks in checkpoint_resolutions recompute their activations, which saves
    memory and costs time. transformer_dropout acts in all transformer blocks. Raises ValueError for
    sizes and lists that do not match.
    """

    # Subclasses change the net through these hooks. res_block and transformer_block are the classes
    # of the blocks, and block_skips = False removes the skip connections. add_embedding() and
    # embed() define the condition that every block receives as emb. TransformerBlock.tokens_forward
    # can be extended, for example with cross-attention to a text.
    block_skips = True
    res_block = ResBlock
    transformer_block = TransformerBlock

    def __init__(
        self,
        res,
        num_classes=1000,
        base_channels=128,
        emb_channels=1024,
        channel_multiplier=(1, 2, 4, 16),
        num_res_blocks=(2, 2, 2),
        num_transformer_blocks=36,
        num_heads=4,
        dropout=0.0,
        dropout_from_resolution=16,
        transformer_dropout=0.2,
        patching="none",
        attn_resolutions=(),
        checkpoint_resolutions=(),
        in_channels=3,
    ):
        super().__init__()
        if len(channel_multiplier) != len(num_res_blocks) + 1:
            raise ValueError(
                f"channel_multiplier {channel_multiplier} must have one entry more than "
                f"num_res_blocks {num_res_blocks}"
            )
        channels = [base_channels * multiplier for multiplier in channel_multiplier]
        sizes = grid_sizes(res, patching, len(channels))
        last = len(num_res_blocks)
        self.num_classes = num_classes

        # The last level and the levels in attn_resolutions have transformer blocks.
        def make_block(level, skip):
            size = min(sizes[level])
            if level == last or size in attn_resolutions:
                block = self.transformer_block(
                    channels[level], emb_channels, num_heads, transformer_dropout, skip
                )
            else:
                p = dropout if size <= dropout_from_resolution else 0.0
                block = self.res_block(channels[level], emb_channels, p, skip)
            block.recompute = size in checkpoint_resolutions
            return block

        def make_level(level, n, skip=False):
            return nn.ModuleList(make_block(level, skip) for _ in range(n))

        levels = range(last)
        self.add_embedding(num_classes, emb_channels)
        self.stem = Stem(channels[0], patching, in_channels)
        # Each level above the transformer has n blocks on the way down, then a down-sampling.
        self.down = nn.ModuleList(make_level(i, num_res_blocks[i]) for i in levels)
        self.downsample = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in levels)
        # The transformer needs positions, because attention does not see the order of its tokens.
        self.position = nn.Parameter(0.01 * torch.randn(channels[-1], *sizes[-1]))  # (C, H, W)
        self.transformer = make_level(last, num_transformer_blocks)
        # On the way up, each of the n blocks takes the skip of one block on the way down.
        self.up = nn.ModuleList(make_level(i, num_res_blocks[i], self.block_skips) for i in levels)
        self.upsample = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in levels)
        self.head = Head(channels[0], patching, in_channels)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W) of the size res; logsnr: (B,); label: (B,) int64 or None.

        Returns v_hat, shaped like z.
        """
        emb = self.embed(logsnr, label)  # (B, emb_channels)
        h = self.stem(z)  # (B, C_0, H_0, W_0)

        # Down: (B, C_i, H_0 / 2^i, W_0 / 2^i) on level i. The output of each block is a skip.
        skips = []
        for level, downsample in zip(self.down, self.downsample):
            for block in level:
                h = run_block(block, h, emb)
                skips.append(h)
            h = downsample(h)

        # The transformer, at the lowest resolution. Under bfloat16 autocast, float32 position
        # embeddings would turn all of its residual sums into float32, so they get the dtype of h.
        h = h + self.position.to(h.dtype)
        for block in self.transformer:
            h = run_block(block, h, emb)

        # Up: the same levels in reverse order. Each block takes one skip, the last one first.
        for level, upsample in zip(reversed(self.up), reversed(self.upsample)):
            h = upsample(h)
            for block in level:
                h = run_block(block, h, emb, skips.pop())
        return self.head(h)

    def add_embedding(self, num_classes, emb_channels):
        """Create the modules that embed() needs. Called before all other modules are created."""
        self.embedding = Embedding(num_classes, emb_channels)

    def embed(self, logsnr, label=None):
        """Embed logsnr and label, (B,) each, as the condition of all blocks: (B, emb_channels)."""
        return self.embedding(logsnr, label)


# A later family by the same authors [S], published with 394 M, 1.23 B, 397 M and 1.25 B parameters.
# The blocks of unet.py and uvit.py reproduce them to 1.1 %.
_FAMILY_64 = dict(
    res=64,
    base_channels=256,
    channel_multiplier=(1, 2, 4),
    num_res_blocks=(3, 3),
    attn_resolutions=(32,),
    num_transformer_blocks=16,
)
_FAMILY_128 = dict(
    res=128,
    base_channels=128,
    channel_multiplier=(1, 2, 4, 8),
    num_res_blocks=(3, 3, 3),
    attn_resolutions=(32,),
    num_transformer_blocks=16,
)

# U-ViT L as published (appendix). The input down-sampling keeps its feature maps the same size at
# all three resolutions. Its other settings are the defaults of UViT.
CONFIGS = {
    "U-ViT L 128": dict(res=128),
    "U-ViT L 256": dict(res=256, patching="dwt_1"),
    "U-ViT L 512": dict(res=512, patching="dwt_2"),
    "family 64": _FAMILY_64,
    "family 64 wide": dict(_FAMILY_64, base_channels=512),
    "family 128": _FAMILY_128,
    "family 128 wide": dict(_FAMILY_128, base_channels=256),
}

if __name__ == "__main__":
    print_table(UViT, CONFIGS)
