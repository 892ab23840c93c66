"""The U-ViT of simple diffusion (Fig. 7 and 8, appendix): a convolutional U-Net around one deep transformer.

The levels above 16x16 are the U-Net's, with n blocks each way. All of 16x16 is one stack of transformer blocks, with
learned position embeddings and no skips inside. CONFIGS has the published configurations, and a family by the same
authors that the blocks are checked against.

    python uvit.py          # their table: U-ViT L has 2455.0 M parameters and 533.6 GMAC per picture at 256 px
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
    attend,
    grid_sizes,
    print_table,
    run_block,
    to_grid,
    to_tokens,
    zero_init,
)


class MLPBlock(nn.Module):
    """Norm, Dense to 4C, SiLU, FiLM on the hidden layer, dropout, Dense to C, + x (appendix), over tokens (B, T, C).

    With FiLM on C instead of 4C channels U-ViT L would have 2.00 B parameters, not the 2.4 to 2.5 B that are quoted for it.
    A skip is added after normalization, as in the ResBlock; only levels of transformer blocks above the last have any.
    """

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.norm_skip = nn.LayerNorm(channels) if skip else None
        self.dense1 = nn.Linear(channels, 4 * channels)
        self.film = nn.Linear(emb_channels, 8 * channels)
        self.dropout = nn.Dropout(dropout)
        self.dense2 = zero_init(nn.Linear(4 * channels, channels))

    def forward(self, x, emb, skip=None):
        h = self.norm(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)
        scale, shift = self.film(emb)[:, None].chunk(2, 2)  # (B, 1, 4C) each
        h = F.silu(self.dense1(h)) * (1 + scale) + shift
        return x + self.dense2(self.dropout(h))


class CrossAttention(nn.Module):
    """Attention of a picture's tokens x (B, T, C) to a text's, (B, N, D), where mask (B, N) says so; made as self-attention is."""

    def __init__(self, channels, text_channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(text_channels, 2 * channels)
        self.norm_q = nn.LayerNorm(channels // num_heads)
        self.norm_k = nn.LayerNorm(channels // num_heads)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x, text, mask):
        q = self.q(self.norm(x)).unflatten(2, (self.num_heads, -1))  # (B, T, heads, dim)
        k, v = (
            self.kv(text).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        )  # (B, N, heads, dim) each
        h = attend(
            self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2), mask
        )
        return x + self.out(h.transpose(1, 2).flatten(2))


class Text(nn.Module):
    """A text, as cross-attention and the embedding take it.

    text: (B, N, text_dim) from a frozen encoder; or, if text_dim is 0, its bytes + 1, (B, 4 N) int64, of which a small transformer is
    trained along: four bytes are a token, the sum of embeddings of each and of the five up to it (their hash, as in fastText, arXiv
    1607.04606), so that a word is known wherever it stands. Rows of 0 are padding; a text of nothing else is the empty one. Returns tokens
    (B, 1 + N, C), normalized, of which the first is learned and all that the empty text has; which of them count, (B, 1 + N); and
    four weighted means of them, projected, (B, C), at first 0: a plain mean would lose a word in a long text.
    """

    def __init__(self, text_tokens, text_dim, channels):
        super().__init__()
        self.empty = nn.Parameter(torch.randn(channels))
        if text_dim:
            self.encode = nn.Linear(text_dim, channels)
        else:
            self.encode = nn.Embedding(257, channels)
            self.five = nn.Embedding(4093, channels)
            self.position = nn.Parameter(0.1 * torch.randn((text_tokens + 3) // 4, channels))
            layer = lambda: nn.TransformerEncoderLayer(
                channels, 4, 4 * channels, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.transformer = nn.ModuleList(layer() for _ in range(2))
        self.norm = nn.LayerNorm(channels)
        self.weights = nn.Linear(channels, 4, bias=False)
        self.pooled = zero_init(nn.Linear(4 * channels, channels))

    def forward(self, text):
        frozen = text.is_floating_point()
        if frozen:
            tokens, mask = self.encode(text), text.any(2)
        else:
            text = F.pad(text, (4, -text.shape[1] % 4))
            five = sum(1009**i * text[:, 4 - i : text.shape[1] - i] for i in range(5)) % 4093
            tokens = (self.encode(text[:, 4:]) + self.five(five)) * (text[:, 4:, None] != 0)
            tokens, mask = (
                tokens.unflatten(1, (-1, 4)).sum(2) + self.position,
                text[:, 4:].unflatten(1, (-1, 4)).any(2),
            )
        mask = F.pad(mask, (1, 0), value=True)  # (B, 1 + N)
        tokens = torch.cat(
            [self.empty.to(tokens.dtype).expand(len(text), 1, -1), tokens], 1
        )  # (B, 1 + N, C)
        for layer in () if frozen else self.transformer:
            tokens = layer(tokens, src_key_padding_mask=~mask)
        tokens = self.norm(tokens)
        weights = torch.softmax(
            self.weights(tokens).masked_fill(~mask[:, :, None], -math.inf), 1
        )  # (B, 1 + N, 4)
        return tokens, mask, self.pooled((weights.mT.to(tokens.dtype) @ tokens).flatten(1))


class TransformerBlock(nn.Module):
    """An MLP block, self-attention, and for a text cross-attention. x, skip: (B, C, H, W), so that it can stand wherever a ResBlock can."""

    def __init__(self, channels, emb_channels, num_heads, dropout=0.0, skip=False, text=False):
        super().__init__()
        self.mlp = MLPBlock(channels, emb_channels, dropout, skip)
        self.attention = Attention(channels, num_heads)
        self.cross = CrossAttention(channels, emb_channels, num_heads) if text else None

    def forward(self, x, emb, skip=None, text=None):
        h = self.mlp(
            to_tokens(x), emb, None if skip is None else to_tokens(skip)
        )  # (B, H W, C), a view in channels_last
        h = self.attention(h)
        return to_grid(h if self.cross is None else self.cross(h, *text), like=x)


class UViT(nn.Module):
    """The U-ViT. The last of channel_multiplier is the transformer's; num_res_blocks has a number per level above it.

    res: side of the picture in pixels, or (height, width); the position embeddings allow no other afterwards.
    attn_resolutions: feature map sizes, the shorter side; levels above the last of these sizes have transformer blocks
    instead of ResBlocks. dropout acts in the ResBlocks of size dropout_from_resolution and below, transformer_dropout in
    every transformer block. text_tokens: the length of the texts that take the place of labels, text_dim: see Text; portrait: with a
    last row that is not 0 if the picture was rotated. The activations of blocks of sizes in checkpoint_resolutions are recomputed (see run_block): less
    memory, more time. Raises ValueError for sizes and lists that do not fit.
    """

    block_skips = True  # from each block on the way down to one on the way up

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
        text_tokens=0,
        text_dim=0,
        portrait=False,
    ):
        super().__init__()
        if len(channel_multiplier) != len(num_res_blocks) + 1:
            raise ValueError(
                f"channel_multiplier {channel_multiplier} must be one longer than num_res_blocks {num_res_blocks}"
            )
        channels = [base_channels * m for m in channel_multiplier]
        sizes = grid_sizes(res, patching, len(channels))
        self.num_classes = num_classes

        def block(level, skip=False):
            size, c = min(sizes[level]), channels[level]
            if level == len(num_res_blocks) or size in attn_resolutions:
                one = TransformerBlock(
                    c, emb_channels, num_heads, transformer_dropout, skip, text=text_tokens > 0
                )
            else:
                one = ResBlock(
                    c, emb_channels, dropout if size <= dropout_from_resolution else 0.0, skip
                )
            one.recompute = size in checkpoint_resolutions
            return one

        def blocks(level, n, skip=False):
            return nn.ModuleList(block(level, skip) for _ in range(n))

        levels = range(len(num_res_blocks))
        self.embedding = Embedding(num_classes, emb_channels)
        self.text = Text(text_tokens, text_dim, emb_channels) if text_tokens else None
        self.portrait = nn.Parameter(torch.zeros(emb_channels)) if portrait else None
        self.text_size = (
            (text_tokens + portrait, text_dim) if text_dim else (text_tokens + portrait,)
        )
        self.stem = Stem(channels[0], patching, in_channels)
        self.down = nn.ModuleList(blocks(i, num_res_blocks[i]) for i in levels)
        self.downsample = nn.ModuleList(Down(channels[i], channels[i + 1]) for i in levels)
        self.position = nn.Parameter(0.01 * torch.randn(channels[-1], *sizes[-1]))  # (C, H, W)
        self.transformer = blocks(len(num_res_blocks), num_transformer_blocks)
        self.up = nn.ModuleList(blocks(i, num_res_blocks[i], self.block_skips) for i in levels)
        self.upsample = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in levels)
        self.head = Head(channels[0], patching, in_channels)

    def forward(self, z, logsnr, label=None):
        """z: (B, in_channels, H, W) of the built size, logsnr: (B,), label: (B,) int64, a text (see Text) or None. Returns v_hat like z."""
        emb, text = self.embed(logsnr, label)
        h, skips = self.stem(z), []
        for level, downsample in zip(self.down, self.downsample):
            for block in level:
                h = run_block(block, h, emb, None, text)
                skips.append(h)
            h = downsample(h)
        h = h + self.position.to(
            h.dtype
        )  # or in bf16 the transformer's residual stream would be float32
        for block in self.transformer:
            h = run_block(block, h, emb, None, text)
        for level, upsample in zip(reversed(self.up), reversed(self.upsample)):
            h = upsample(h)
            for block in level:
                h = run_block(block, h, emb, skips.pop(), text)
        return self.head(h)

    def embed(self, logsnr, label):
        """The embedding (B, emb_channels), and for a text its tokens (B, 1 + N, emb_channels) and which of them count."""
        if self.text is None:
            return self.embedding(logsnr, label), None
        if label is None:
            label = torch.zeros(
                len(logsnr),
                *self.text_size,
                dtype=torch.float32 if len(self.text_size) > 1 else torch.int64,
                device=logsnr.device,
            )
        text, rotated = (
            (label, None)
            if self.portrait is None
            else (label[:, :-1], label[:, -1:].flatten(1).any(1, keepdim=True))
        )
        tokens, mask, pooled = self.text(text)
        pooled = pooled if rotated is None else pooled + rotated * self.portrait
        return self.embedding(logsnr, None, pooled), (tokens, mask)


_FAMILY64 = dict(
    res=64,
    base_channels=256,
    channel_multiplier=(1, 2, 4),
    num_res_blocks=(3, 3),
    attn_resolutions=(32,),
    num_transformer_blocks=16,
)
_FAMILY128 = dict(
    _FAMILY64, res=128, base_channels=128, channel_multiplier=(1, 2, 4, 8), num_res_blocks=(3, 3, 3)
)
CONFIGS = {
    "U-ViT L 128": dict(res=128),  # as published; the defaults are this net
    "U-ViT L 256": dict(res=256, patching="dwt_1"),
    "U-ViT L 512": dict(res=512, patching="dwt_2"),
    "U-ViT text 256": dict(
        res=256,
        patching="dwt_1",
        num_classes=0,
        attn_resolutions=(32,),
        text_tokens=128,
        text_dim=4096,
    ),  # T5-XXL's channels
    "family 64": _FAMILY64,  # the same authors' later family, published with 394 M, 1.23 B, 397 M and 1.25 B parameters
    "family 64 wide": dict(_FAMILY64, base_channels=512),
    "family 128": _FAMILY128,
    "family 128 wide": dict(_FAMILY128, base_channels=256),
}

if __name__ == "__main__":
    print_table(UViT, CONFIGS)
