"""The blocks of the nets, two small nets, and training against a reference written from the paper.

The reference is float64 numpy and plain loops. It takes from the project only the names of the
weights and what the paper leaves open: 1e-5 in the norms, the order of the sinusoidal features
and of the wavelet's bands, and the SiLU at the end of the embedding.
"""

import json
import math

import numpy as np
import pytest
import torch

import train
from schedule import make_schedule
from support.checkpoint import build_net, load_checkpoint
from support.data import Shapes, example_noise, image_order, load_batch
from support.settings import DEFAULTS
from support.text import CrossAttention, Text, TextUViT
from unet import (
    PATCHING,
    Attention,
    Down,
    Embedding,
    GroupNorm,
    Head,
    ResBlock,
    Stem,
    UNet,
    UNetBlock,
    Up,
)
from uvit import MLPBlock, TransformerBlock, UViT

# ---------------------------------------------------------------- weights and numbers


def randomize(module, seed=0):
    """Fill every weight with random numbers, also the zero-initialized ones. float64, eval mode."""
    module = module.double().eval()
    numbers = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        values = numbers.standard_normal(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            # The scale of a norm is near 1.
            values = 1 + 0.2 * values
        elif parameter.ndim > 1:
            # Division by the square root of the number of inputs keeps the outputs near 1.
            values = values / math.sqrt(parameter[0].numel())
        else:
            values = 0.3 * values
        parameter.data.copy_(torch.from_numpy(values))
    return module


def weights(module):
    """The weights as nested dicts of arrays: w["down"]["0"]["1"]["res"]["conv1"]["bias"]."""
    tree = {}
    for name, value in module.state_dict().items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value.numpy()
    return tree


def normal(*shape, seed=1):
    """Standard normal numbers of a shape, float64."""
    return np.random.default_rng(seed).standard_normal(shape)


def call(module, *arguments):
    """Call a module with arrays as tensors. Returns an array; it must be float64."""
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    output = module(*tensors)
    assert output.dtype == torch.float64
    return output.detach().numpy()


def assert_same(output, reference, tolerance=1e-10):
    """The two arrays agree, and their values are of order 1."""
    assert output.shape == reference.shape
    assert 0.1 < np.abs(reference).mean() < 10
    assert np.abs(output - reference).max() < tolerance


# ---------------------------------------------------------------- the reference: layers


def silu(x):
    return x / (1 + np.exp(-x))


def dense(w, x):
    """A linear layer over the last axis."""
    return x @ w["weight"].T + w.get("bias", 0)


def convolve(w, x, size, stride=1):
    """A size x size convolution of x (B, C, H, W). A 3x3 one pads with one zero on each side."""
    kernel = w["weight"]
    assert kernel.shape[2:] == (size, size)
    padding = 1 if size == 3 else 0
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    rows = (x.shape[2] - size) // stride + 1
    columns = (x.shape[3] - size) // stride + 1
    out = np.zeros((len(x), len(kernel), rows, columns))
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            window = x[:, :, top : top + size, left : left + size]
            out[:, :, row, column] = np.einsum("bcij,ocij->bo", window, kernel)
    return out + w["bias"][:, None, None]


def transposed_convolve(w, x, size):
    """Every pixel of x (B, C, H, W) paints size x size pixels, side by side."""
    kernel = w["weight"]  # (C, out, size, size)
    assert kernel.shape[2:] == (size, size)
    batch, _, height, width = x.shape
    out = np.zeros((batch, kernel.shape[1], size * height, size * width))
    for row in range(height):
        for column in range(width):
            patch = np.einsum("bc,coij->boij", x[:, :, row, column], kernel)
            top, left = row * size, column * size
            out[:, :, top : top + size, left : left + size] = patch
    return out + w["bias"][:, None, None]


def standardize(values):
    """Subtract the mean of all values, and divide by their standard deviation."""
    centered = values - values.sum() / values.size
    variance = (centered**2).sum() / values.size
    return centered / math.sqrt(variance + 1e-5)


def group_norm(w, x):
    """GroupNorm-32 of x (B, C, H, W). Below 128 channels a group has 4 channels (our choice)."""
    channels = x.shape[1]
    groups = 32 if channels >= 128 else max(1, channels // 4)
    size = channels // groups
    out = np.zeros_like(x)
    for image in range(len(x)):
        for first in range(0, channels, size):
            group = x[image, first : first + size]
            out[image, first : first + size] = standardize(group)
    return out * w["weight"][:, None, None] + w["bias"][:, None, None]


def layer_norm(w, x):
    """LayerNorm over the last axis."""
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape[:-1]):
        out[index] = standardize(x[index])
    return out * w["weight"] + w["bias"]


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def add_skip(w, norm, x, skip):
    """(x + Norm(skip)) / sqrt(2), for an x that is normalized, or x if there is no skip."""
    if skip is None:
        return x
    return (x + norm(w["norm_skip"], skip)) / math.sqrt(2)


def film(w, h, emb):
    """h (1 + scale) + shift over channels, the last axis of h (B, ..., C)."""
    both = dense(w, emb)
    channels = both.shape[1] // 2
    out = np.zeros_like(h)
    for image in range(len(h)):
        scale, shift = both[image, :channels], both[image, channels:]
        out[image] = h[image] * (1 + scale) + shift
    return out


def channels_last(x):
    """(B, C, H, W) -> (B, H, W, C)."""
    return np.moveaxis(x, 1, -1)


def channels_first(x):
    """(B, H, W, C) -> (B, C, H, W)."""
    return np.moveaxis(x, -1, 1)


# ---------------------------------------------------------------- the reference: blocks


def embedding(w, logsnr, label, extra=0.0):
    """u = (logsnr + 20) / 40, x 1000 -> 256 sinusoidal features -> Dense -> SiLU -> Dense."""
    features = np.zeros((len(logsnr), 256))
    for image, value in enumerate(logsnr):
        u = (value + 20) / 40 * 1000
        for i in range(128):
            # Frequencies from 1 to 1 / 10000, evenly spaced in their logarithm.
            frequency = 10000.0 ** (-i / 127)
            features[image, i] = math.sin(u * frequency)
            features[image, 128 + i] = math.cos(u * frequency)
    h = dense(w["dense2"], silu(dense(w["dense1"], features)))
    # The class embedding is added. The SiLU at the end is our choice.
    return silu(h + w["label"]["weight"][label] + extra)


def res_block(w, x, emb, skip=None, dropout=1.0):
    """Norm, SiLU, 3x3, Norm, FiLM, SiLU, dropout, 3x3, + x. dropout: the mask to multiply by."""
    # Norm of x; on the way up, the norm of the skip is added. SiLU, 3x3 convolution.
    h = add_skip(w, group_norm, group_norm(w["norm1"], x), skip)
    h = convolve(w["conv1"], silu(h), 3)
    # Norm, FiLM.
    h = group_norm(w["norm2"], h)
    h = channels_first(film(w["film"], channels_last(h), emb))
    # SiLU, dropout, 3x3 convolution, and the residual sum.
    return x + convolve(w["conv2"], dropout * silu(h), 3)


def heads_attend(w, q, k, v, num_heads, mask=None):
    """Softmax attention of each head, with queries and keys normalized over the head dimension."""
    size = q.shape[-1] // num_heads
    out = np.zeros_like(q)
    for image in range(len(q)):
        for first in range(0, q.shape[-1], size):
            part = slice(first, first + size)
            # QK-norm, with a scale and a bias that all heads share.
            queries = layer_norm(w["norm_q"], q[image, :, part])
            keys = layer_norm(w["norm_k"], k[image, :, part])
            values = v[image, :, part]
            if mask is not None:
                # Padding takes no part.
                keys, values = keys[mask[image]], values[mask[image]]
            # Every token receives a mean of the values.
            out[image, :, part] = softmax(queries @ keys.T / math.sqrt(size)) @ values
    return out


def self_attention(w, x, num_heads=4):
    """Norm -> q, k, v -> q and k normalized -> softmax attention -> Dense -> + x, over tokens."""
    # The projection holds all queries, then all keys, then all values.
    q, k, v = np.split(dense(w["qkv"], layer_norm(w["norm"], x)), 3, -1)
    return x + dense(w["out"], heads_attend(w, q, k, v, num_heads))


def cross_attention(w, x, text, mask, num_heads=4):
    """Queries from the image, keys and values from the text."""
    q = dense(w["q"], layer_norm(w["norm"], x))
    k, v = np.split(dense(w["kv"], text), 2, -1)
    return x + dense(w["out"], heads_attend(w, q, k, v, num_heads, mask))


def mlp_block(w, x, emb, skip=None, dropout=1.0):
    """Norm -> Dense to 4C -> SiLU -> FiLM on 4C -> dropout -> Dense to C -> + x, over tokens."""
    # Norm, with the skip added to it as in the ResBlock.
    h = add_skip(w, layer_norm, layer_norm(w["norm"], x), skip)
    # The hidden layer of 4C channels, SiLU, FiLM.
    h = silu(dense(w["dense1"], h))
    assert h.shape[-1] == 4 * x.shape[-1]
    h = film(w["film"], h, emb)
    # Dropout, back to C channels, and the residual sum.
    return x + dense(w["dense2"], dropout * h)


def on_pixels(block, w, x, *arguments):
    """Apply a block over tokens to feature maps (B, C, H, W): one token per pixel, row by row."""
    batch, channels, height, width = x.shape
    maps = [np.reshape(channels_last(x), (batch, height * width, channels))]
    for argument in arguments:
        if argument is not None and argument.ndim == 4:
            argument = np.reshape(channels_last(argument), maps[0].shape)
        maps.append(argument)
    out = block(w, *maps)
    return channels_first(np.reshape(out, (batch, height, width, channels)))


def transformer_block(w, x, emb, skip=None):
    """The MLP block, then self-attention."""
    return self_attention(w["attention"], mlp_block(w["mlp"], x, emb, skip))


def down(w, x):
    """2x2 average pool, then a 1x1 projection."""
    pooled = np.zeros((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
    for row in range(pooled.shape[2]):
        for column in range(pooled.shape[3]):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            pooled[:, :, row, column] = window.sum((2, 3)) / 4
    return convolve(w["1"], pooled, 1)


def up(w, x):
    """A 1x1 projection, then each pixel becomes 2x2 pixels."""
    x = convolve(w, x, 1)
    out = np.zeros((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            out[:, :, row, column] = x[:, :, row // 2, column // 2]
    return out


# ---------------------------------------------------------------- the reference: stem and head


def lift(signal):
    """The 5/3 wavelet of an even number of samples: the smooth half, then the details."""
    period = 2 * (len(signal) - 1)

    def x(n):
        # The symmetric extension mirrors the signal at its first and its last sample.
        n = abs(n) % period
        return signal[min(n, period - n)]

    def d(n):
        return x(2 * n + 1) - (x(2 * n) + x(2 * n + 2)) / 2

    def s(n):
        return x(2 * n) + (d(n - 1) + d(n)) / 4

    half = range(len(signal) // 2)
    return np.array([s(n) for n in half] + [d(n) for n in half])


def unlift(coefficients):
    """The inverse of lift."""
    half = len(coefficients) // 2
    s, d = coefficients[:half], coefficients[half:]
    x = np.zeros(2 * half)
    # Undo the update: it used the details only. By symmetry, d[-1] is d[0].
    for n in range(half):
        x[2 * n] = s[n] - (d[max(n - 1, 0)] + d[n]) / 4
    # Undo the prediction. By symmetry, the sample after the last is the one before it.
    for n in range(half):
        after = x[2 * n + 2] if n + 1 < half else x[2 * n]
        x[2 * n + 1] = d[n] + (x[2 * n] + after) / 2
    return x


def dwt(x, levels):
    """Rows and columns; the finer bands go from space to depth, to the size of the coarsest."""
    if levels == 0:
        return x
    # Transform columns and rows. This gives four bands.
    x = np.apply_along_axis(lift, 3, np.apply_along_axis(lift, 2, x))
    height, width = x.shape[2] // 2, x.shape[3] // 2
    smooth, tall = x[:, :, :height, :width], x[:, :, height:, :width]
    wide, both = x[:, :, :height, width:], x[:, :, height:, width:]
    # Our order: smooth, details along the height, along the width, along both.
    details = np.concatenate([tall, wide, both], 1)
    # The smooth band is transformed again. Space to depth brings the details to its size.
    step = 2 ** (levels - 1)
    bands = [dwt(smooth, levels - 1)]
    for channel in range(details.shape[1]):
        for i in range(step):
            for j in range(step):
                bands.append(details[:, channel : channel + 1, i::step, j::step])
    return np.concatenate(bands, 1)


def idwt(y, levels):
    """The inverse of dwt."""
    if levels == 0:
        return y
    # The first quarter of the channels is the transformed smooth band.
    step = 2 ** (levels - 1)
    channels = y.shape[1] // 4**levels
    smooth = idwt(y[:, : y.shape[1] // 4], levels - 1)
    height, width = smooth.shape[2:]
    # From depth back to space.
    details = np.zeros((len(y), 3 * channels, height, width))
    source = y.shape[1] // 4
    for channel in range(3 * channels):
        for i in range(step):
            for j in range(step):
                details[:, channel, i::step, j::step] = y[:, source]
                source += 1
    # Put the four bands together, and undo rows and columns.
    tall, wide, both = np.split(details, 3, 1)
    upper = np.concatenate([smooth, wide], 3)
    lower = np.concatenate([tall, both], 3)
    x = np.concatenate([upper, lower], 2)
    return np.apply_along_axis(unlift, 2, np.apply_along_axis(unlift, 3, x))


# The number of wavelet levels of each patching.
LEVELS = {"none": 0, "dwt_1": 1, "dwt_2": 2}


def stem(w, z, patching):
    """A d x d convolution with stride d, or a wavelet and a 3x3 convolution."""
    if patching.startswith("conv"):
        size = int(patching[-1])
        return convolve(w["conv"], z, size, stride=size)
    return convolve(w["conv"], dwt(z, LEVELS[patching]), 3)


def head(w, h, patching):
    """Norm -> SiLU -> projection, then the inverse of the stem."""
    h = silu(group_norm(w["norm"], h))
    if patching.startswith("conv"):
        return transposed_convolve(w["conv"], h, int(patching[-1]))
    return idwt(convolve(w["conv"], h, 3), LEVELS[patching])


# ---------------------------------------------------------------- the reference: nets (Fig. 7-8)


def unet(w, z, logsnr, label, num_blocks, attention, patching="none"):
    """The U-Net. num_blocks: n of each level. attention: the levels with self-attention."""
    emb = embedding(w["embedding"], logsnr, label)

    # A ResBlock, and self-attention in some of the levels.
    def block(w, h, skip=None, attends=False):
        h = res_block(w["res"], h, emb, skip)
        return on_pixels(self_attention, w["attention"], h) if attends else h

    # Of each level, keep its input and the outputs of its n blocks.
    h = stem(w["stem"], z, patching)
    kept = []
    for i, n in enumerate(num_blocks):
        if i > 0:
            h = down(w["downsample"][str(i - 1)], h)
        kept.append([h])
        for k in range(n):
            h = block(w["down"][str(i)][str(k)], h, attends=i in attention)
            kept[i].append(h)

    # The middle: ResBlock, attention, ResBlock.
    h = block(w["middle"]["0"], h, attends=True)
    h = block(w["middle"]["1"], h)

    # These n + 1 feature maps feed the n + 1 blocks on the way up, in reverse order.
    for i, n in reversed(list(enumerate(num_blocks))):
        for k in range(n + 1):
            h = block(w["up"][str(i)][str(k)], h, kept[i][n - k], attends=i in attention)
        if i > 0:
            h = up(w["upsample"][str(i - 1)], h)
    return head(w["head"], h, patching)


def uvit(w, z, emb, num_blocks, num_transformer_blocks, attention=(), text=None, patching="none"):
    """The U-ViT. attention: the levels of transformer blocks. text: (tokens, mask), or None."""

    def transformer(w, h, skip=None):
        h = on_pixels(transformer_block, w, h, emb, skip)
        if text is None:
            return h
        # Text to image adds cross-attention to every transformer block.
        return on_pixels(cross_attention, w["cross"], h, *text)

    def block(level, w, h, skip=None):
        return transformer(w, h, skip) if level in attention else res_block(w, h, emb, skip)

    # Down: the outputs of the n blocks of each level are kept.
    h = stem(w["stem"], z, patching)
    kept = []
    for i, n in enumerate(num_blocks):
        kept.append([])
        for k in range(n):
            h = block(i, w["down"][str(i)][str(k)], h)
            kept[i].append(h)
        h = down(w["downsample"][str(i)], h)

    # One stack of transformer blocks without skips, with learned positions.
    h = h + w["position"]
    for k in range(num_transformer_blocks):
        h = transformer(w["transformer"][str(k)], h)

    # Up: each of the n blocks takes one of them, in reverse order.
    for i, n in reversed(list(enumerate(num_blocks))):
        h = up(w["upsample"][str(i)], h)
        for k in range(n):
            h = block(i, w["up"][str(i)][str(k)], h, kept[i][n - 1 - k])
    return head(w["head"], h, patching)


# ---------------------------------------------------------------- the reference: texts (ours)


def encoder_layer(w, x, mask):
    """A transformer layer of 4 heads, norms first: attention without QK-norm, then GELU MLP."""
    # Attention of each head to the tokens that are not padding.
    attention = w["self_attn"]
    h = layer_norm(w["norm1"], x)
    qkv = h @ attention["in_proj_weight"].T + attention["in_proj_bias"]
    q, k, v = np.split(qkv, 3, -1)
    size = x.shape[-1] // 4
    out = np.zeros_like(x)
    for image in range(len(x)):
        for first in range(0, x.shape[-1], size):
            part = slice(first, first + size)
            keys, values = k[image, mask[image], part], v[image, mask[image], part]
            logits = q[image, :, part] @ keys.T / math.sqrt(size)
            out[image, :, part] = softmax(logits) @ values
    x = x + dense(attention["out_proj"], out)
    # Then the MLP, with the exact GELU.
    h = dense(w["linear1"], layer_norm(w["norm2"], x))
    h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    return x + dense(w["linear2"], h)


def byte_groups(w, text):
    """One token for every four bytes: the sum of their embeddings and 5-grams, and a position."""
    batch, length = text.shape
    count = math.ceil(length / 4)
    tokens = np.zeros((batch, count, w["encode"]["weight"].shape[1]))
    mask = np.zeros((batch, count), bool)
    for image in range(batch):
        for n, byte in enumerate(text[image]):
            # The 5-gram is this byte and the four before it; there are zeros before the text.
            five = [int(text[image, n - i]) if n >= i else 0 for i in range(5)]
            code = sum(1009**i * value for i, value in enumerate(five)) % 4093
            # Byte 0 is padding.
            if byte:
                tokens[image, n // 4] += w["encode"]["weight"][byte] + w["five"]["weight"][code]
                mask[image, n // 4] = True
    return tokens + w["position"], mask


def text_encoder(w, text):
    """The tokens of a text, which of them take part, and a summary of the text."""
    frozen = text.ndim == 3
    if frozen:
        tokens, mask = dense(w["encode"], text), (text != 0).any(2)
    else:
        tokens, mask = byte_groups(w, text)
    # One learned token in front stands for the empty text.
    empty = np.broadcast_to(w["empty"], (len(text), 1, len(w["empty"])))
    tokens = np.concatenate([empty, tokens], 1)
    mask = np.concatenate([np.ones((len(text), 1), bool), mask], 1)
    if not frozen:
        for k in range(2):
            tokens = encoder_layer(w["transformer"][str(k)], tokens, mask)
    tokens = layer_norm(w["norm"], tokens)

    # The summary is a projection of four means, each with its own softmax over the tokens.
    summary = []
    for image in range(len(text)):
        present = tokens[image, mask[image]]
        shares = softmax(dense(w["weights"], present).T)  # (4, tokens)
        summary.append(np.concatenate([share @ present for share in shares]))
    return tokens, mask, dense(w["pooled"], np.stack(summary))


# ---------------------------------------------------------------- the blocks equal the reference


@pytest.mark.parametrize("channels", [2, 8, 12, 64, 128, 256])
def test_group_norm_has_32_groups_or_groups_of_4_channels(channels):
    block = randomize(GroupNorm(channels))
    x = 2 * normal(2, channels, 2, 3) + 1
    assert_same(call(block, x), group_norm(weights(block), x))


def test_embedding():
    """A label, the null label, and no label; logsnr beyond the limits is not clamped."""
    block = randomize(Embedding(3, 16))
    logsnr = np.array([-22.5, -20.0, -3.3, 0.0, 15.0, 20.0])
    label = np.array([0, 1, 2, 3, 1, 0])
    extra = normal(6, 16)
    assert_same(call(block, logsnr, label), embedding(weights(block), logsnr, label))
    # Without a label all have the null label, the number behind the last class.
    assert_same(call(block, logsnr), embedding(weights(block), logsnr, [3] * 6))
    assert_same(call(block, logsnr, label, extra), embedding(weights(block), logsnr, label, extra))


def test_res_block_adds_its_skip():
    """The skip is added, not concatenated."""
    x, skip, emb = normal(2, 8, 3, 4), 3 * normal(2, 8, 3, 4, seed=2) + 1, normal(2, 16, seed=3)
    block = randomize(ResBlock(8, 16))
    assert_same(call(block, x, emb), res_block(weights(block), x, emb))
    block = randomize(ResBlock(8, 16, skip=True))
    assert_same(call(block, x, emb, skip), res_block(weights(block), x, emb, skip))


def test_mlp_block_applies_film_to_its_hidden_layer():
    x, skip, emb = normal(2, 5, 8), 3 * normal(2, 5, 8, seed=2) + 1, normal(2, 16, seed=3)
    block = randomize(MLPBlock(8, 16))
    assert_same(call(block, x, emb), mlp_block(weights(block), x, emb))
    block = randomize(MLPBlock(8, 16, skip=True))
    assert_same(call(block, x, emb, skip), mlp_block(weights(block), x, emb, skip))


class Mask(torch.nn.Module):
    """Multiplication by a fixed mask, in the place of dropout."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def forward(self, x):
        return x * self.mask


def test_dropout_acts_before_the_last_layer():
    """SiLU, dropout, conv in the ResBlock; FiLM, dropout, Dense in the MLP block."""
    emb = normal(2, 16, seed=3)
    x, mask = normal(2, 8, 3, 4), 2.0 * (normal(2, 8, 3, 4, seed=4) > 0)
    block = randomize(ResBlock(8, 16, dropout=0.5))
    assert block.dropout.p == 0.5
    block.dropout = Mask(mask)
    assert_same(call(block, x, emb), res_block(weights(block), x, emb, dropout=mask))

    x, mask = normal(2, 5, 8), 2.0 * (normal(2, 5, 32, seed=4) > 0)
    block = randomize(MLPBlock(8, 16, dropout=0.5))
    assert block.dropout.p == 0.5
    block.dropout = Mask(mask)
    assert_same(call(block, x, emb), mlp_block(weights(block), x, emb, dropout=mask))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_self_attention_normalizes_queries_and_keys(num_heads):
    block = randomize(Attention(16, num_heads))
    x = normal(2, 6, 16)
    assert_same(call(block, x), self_attention(weights(block), x, num_heads))


def test_blocks_on_feature_maps():
    """A U-Net block ends with attention over pixels; a transformer block is MLP, then attention."""
    x, skip, emb = normal(2, 8, 2, 3), normal(2, 8, 2, 3, seed=2), normal(2, 16, seed=3)
    block = randomize(UNetBlock(8, 16, 4, 0.0, attention=True, skip=True))
    w = weights(block)
    reference = on_pixels(self_attention, w["attention"], res_block(w["res"], x, emb, skip))
    assert_same(call(block, x, emb, skip), reference)

    block = randomize(TransformerBlock(8, 16, 4, skip=True))
    reference = on_pixels(transformer_block, weights(block), x, emb, skip)
    assert_same(call(block, x, emb, skip), reference)


def test_down_averages_and_up_repeats():
    x = normal(2, 8, 4, 6)
    block = randomize(Down(8, 12))
    assert_same(call(block, x), down(weights(block), x))
    block = randomize(Up(8, 4))
    assert_same(call(block, x), up(weights(block), x))


@pytest.mark.parametrize("patching", PATCHING)
def test_stem_and_head(patching):
    """Both ends of the net, for each input down-sampling, at a non-square size."""
    factor = int(patching[-1]) if patching.startswith("conv") else 2 ** LEVELS[patching]
    z = normal(2, 3, 4 * factor, 2 * factor)
    block = randomize(Stem(8, patching, 3))
    h = call(block, z)
    assert h.shape == (2, 8, 4, 2)
    assert_same(h, stem(weights(block), z, patching))
    block = randomize(Head(8, patching, 3))
    assert_same(call(block, h), head(weights(block), h, patching))


# ---------------------------------------------------------------- texts equal the reference


def test_cross_attention_ignores_padding():
    block = randomize(CrossAttention(8, 12, 4))
    x, text = normal(2, 6, 8), normal(2, 5, 12, seed=2)
    mask = np.array([[True, False, False, False, False], [True, True, True, False, True]])
    assert_same(call(block, x, text, mask), cross_attention(weights(block), x, text, mask))


# The bytes of two texts and of the empty text, plus 1. The first ends within a group of four.
BYTES = np.array([[5, 200, 256, 3, 77, 9, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3, 2, 1], [0] * 9])
# Embeddings of two texts and of the empty text.
EMBEDDINGS = normal(3, 4, 5) * np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])[:, :, None]


@pytest.mark.parametrize("text", [BYTES, EMBEDDINGS], ids=["bytes", "embeddings"])
def test_text_encoder(text):
    block = randomize(Text(text.shape[1], text.shape[2] if text.ndim == 3 else 0, 16))
    outputs = [part.detach().numpy() for part in block(torch.from_numpy(text))]
    tokens, mask, summary = text_encoder(weights(block), text)
    assert np.array_equal(outputs[1], mask)
    assert_same(outputs[0][mask], tokens[mask])
    assert_same(outputs[2], summary)


# ---------------------------------------------------------------- nets equal the reference

SMALL = dict(num_classes=3, base_channels=8, emb_channels=16)
LOGSNR = np.array([-4.0, 7.5])


@pytest.mark.parametrize(
    "size, patching, attn_resolutions, attention",
    [((8, 8), "none", (2,), [2]), ((16, 24), "dwt_1", (4, 8), [0, 1])],
    ids=["square", "non-square"],
)
def test_unet(size, patching, attn_resolutions, attention):
    """The order of blocks, attention and skips, on three levels; with labels and without."""
    net = UNet(
        size,
        **SMALL,
        channel_multiplier=(1, 2, 1),
        num_res_blocks=(2, 1, 2),
        patching=patching,
        attn_resolutions=attn_resolutions,
    )
    w, z = weights(randomize(net)), normal(2, 3, *size)
    for label, rows in ((np.array([2, 3]), [2, 3]), (None, [3, 3])):
        reference = unet(w, z, LOGSNR, rows, (2, 1, 2), attention, patching)
        assert_same(call(net, z, LOGSNR, label), reference, 1e-8)


@pytest.mark.parametrize(
    "size, patching, attn_resolutions, attention",
    [((8, 8), "none", (), []), ((8, 8), "none", (4,), [1]), ((16, 8), "conv_2", (), [])],
    ids=["square", "two transformer levels", "non-square"],
)
def test_uvit(size, patching, attn_resolutions, attention):
    """The same for the U-ViT, whose transformer has positions and no skips."""
    net = UViT(
        size,
        **SMALL,
        channel_multiplier=(1, 2, 2),
        num_res_blocks=(2, 3),
        num_transformer_blocks=2,
        patching=patching,
        attn_resolutions=attn_resolutions,
    )
    w, z = weights(randomize(net)), normal(2, 3, *size)
    for label, rows in ((np.array([2, 3]), [2, 3]), (None, [3, 3])):
        emb = embedding(w["embedding"], LOGSNR, rows)
        reference = uvit(w, z, emb, (2, 3), 2, attention, patching=patching)
        assert_same(call(net, z, LOGSNR, label), reference, 1e-8)


@pytest.mark.parametrize("kind", ["bytes", "embeddings", "portrait", "none"])
def test_text_uvit(kind):
    """A text acts by its summary in every FiLM, and by its tokens in every transformer block."""
    text = BYTES if kind == "bytes" else EMBEDDINGS
    shape = dict(text_tokens=text.shape[1], text_dim=0 if kind == "bytes" else text.shape[2])
    net = TextUViT(
        (8, 8),
        0,
        portrait=kind == "portrait",
        base_channels=8,
        emb_channels=16,
        channel_multiplier=(1, 2, 1),
        num_res_blocks=(1, 1),
        num_transformer_blocks=1,
        attn_resolutions=(4,),
        **shape,
    )
    w, z, logsnr = weights(randomize(net)), normal(3, 3, 8, 8), np.array([-4.0, 7.5, 1.0])
    label = text
    if kind == "none":
        label, text = None, 0 * text
    tokens, mask, summary = text_encoder(w["text"], text)
    if kind == "portrait":
        # One more row says which images were rotated; a learned vector is added for these.
        rotated = np.array([1.0, 0.0, 1.0])
        label = np.concatenate([text, np.broadcast_to(rotated[:, None, None], (3, 1, 5))], 1)
        summary = summary + rotated[:, None] * w["portrait"]
    emb = embedding(w["embedding"], logsnr, [0, 0, 0], summary)
    reference = uvit(w, z, emb, (1, 1), 1, [1], (tokens, mask))
    assert_same(call(net, z, logsnr, label), reference, 1e-8)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_logsnr_may_have_another_dtype_than_the_net(dtypes):
    """The net computes in the dtype of its weights."""
    net_dtype, logsnr_dtype = dtypes
    logsnr, label = torch.tensor([-4.0, 7.5]), torch.tensor([2, 3])
    z = torch.from_numpy(normal(2, 3, 8, 8)).to(net_dtype)
    net = UViT(8, **SMALL, channel_multiplier=(1, 2), num_res_blocks=(1,), num_transformer_blocks=1)
    net = randomize(net).to(net_dtype)
    v_hat = net(z, logsnr.to(logsnr_dtype), label)
    assert v_hat.dtype == net_dtype
    assert torch.equal(v_hat, net(z, logsnr.to(net_dtype), label))


# ---------------------------------------------------------------- training equals the reference


@pytest.fixture
def in_float64(monkeypatch):
    """Training in float64: in float32, Adam would turn rounding errors into whole steps."""
    state = torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    to_float = train.to_float
    monkeypatch.setattr(train, "to_float", lambda images: to_float(images).double())
    # The sample grid of the last step is not part of training.
    monkeypatch.setattr(train, "save_sample_grid", lambda run: 0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)


SETTINGS = dict(seed=4, batch=4, steps=4, lr=0.05, warmup=3, decay=0.5, ema=0.2, label_drop=0.3)


def train_by_hand(
    net, space, res, schedule, seed, batch, steps, lr, warmup, decay, ema, label_drop
):
    """The training of Sec. 2 and the appendix. Returns the EMA weights, and what happened."""
    parameters = list(net.parameters())
    average = [weight.detach().clone() for weight in parameters]
    first = [torch.zeros_like(weight) for weight in parameters]
    second = [torch.zeros_like(weight) for weight in parameters]
    order = image_order(1_000_000, seed, batch, 0, [range(batch)])
    events = dict(flipped=0, dropped=0, norms=[], rates=[], decays=[])
    for step in range(steps):
        # A batch of images in [-1, 1], of which half are mirrored, and labels, of which some drop.
        images, labels = load_batch(Shapes(res), next(order))
        x = (images.float() / 127.5 - 1).double()
        u, eps = example_noise(seed, step, range(batch), x.shape[1:], "cpu")
        for i in range(batch):
            if u[i, 1] < 0.5:
                x[i] = x[i, :, :, list(range(res - 1, -1, -1))]
                events["flipped"] += 1
            if u[i, 0] < label_drop:
                labels[i] = 10
                events["dropped"] += 1

        # z = alpha x + sigma eps, v = alpha eps - sigma x, eps_hat = sigma z + alpha v_hat.
        logsnr = schedule(u[:, 2])
        alpha = (1 / (1 + torch.exp(-logsnr))).sqrt()[:, None, None, None]
        sigma = (1 / (1 + torch.exp(logsnr))).sqrt()[:, None, None, None]
        z = alpha * x + sigma * eps
        v_hat = net(z, logsnr, labels)
        if space == "v":
            error = alpha * eps - sigma * x - v_hat
        else:
            error = eps - (sigma * z + alpha * v_hat)
        gradients = torch.autograd.grad((error**2).mean(), parameters)

        # Clip the norm of all gradients together at 1. (PyTorch adds 1e-6 to the norm.)
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        factor = min(1.0, 1 / (norm + 1e-6))
        # Linear warmup, and a linear decay over the last part of the steps.
        rate = lr * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))
        # The average forgets the initial weights faster at first.
        keep = min(ema, (step + 1) / (step + 10))
        for i, gradient in enumerate(gradients):
            # Adam with beta (0.9, 0.99), eps 1e-12 and bias correction.
            gradient = factor * gradient
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.99 * second[i] + 0.01 * gradient**2
            mean = first[i] / (1 - 0.9 ** (step + 1))
            deviation = (second[i] / (1 - 0.99 ** (step + 1))).sqrt()
            parameters[i].data -= rate * mean / (deviation + 1e-12)
            average[i] = keep * average[i] + (1 - keep) * parameters[i].detach()
        events["norms"].append(norm)
        events["rates"].append(rate)
        events["decays"].append(keep)
    return average, events


TINY_UVIT = dict(channel_multiplier=[1, 2], num_res_blocks=[1], num_transformer_blocks=1)
TINY_UNET = dict(channel_multiplier=[1, 2], num_res_blocks=[1, 1], attn_resolutions=[4])


@pytest.mark.parametrize(
    "model, space, res, schedule, fields",
    [
        ("uvit", "v", 8, "shifted:4", TINY_UVIT),
        ("unet", "eps", 32, "cosine", dict(TINY_UNET, patching="dwt_2")),
    ],
    ids=["uvit", "unet"],
)
def test_training_equals_plain_loops(in_float64, tmp_path, model, space, res, schedule, fields):
    """Four steps through the command: the weights and their average equal those by hand."""
    fields = dict(fields, base_channels=8, emb_channels=16)
    options = ["--model", model, "--space", space, "--res", str(res), "--schedule", schedule]
    options += ["--model-args", json.dumps(fields), "--micro", "2", "--flip", "--device", "cpu"]
    options += ["--no-bf16", "--no-compile", "--size", "tiny", "--out", str(tmp_path)]
    for name, value in SETTINGS.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    train.main(options)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint["step"] == 4

    torch.manual_seed(SETTINGS["seed"])
    net = build_net(model, checkpoint["config"]["model_args"])
    initial = [weight.detach().clone() for weight in net.parameters()]
    logsnr_at = make_schedule(schedule, res)
    average, events = train_by_hand(net, space, res, logsnr_at, **SETTINGS)
    for i, (name, weight) in enumerate(net.named_parameters()):
        trained = checkpoint["net"][name]
        assert trained.dtype == torch.float64
        if name.endswith("norm_k.bias"):
            # A bias shared by all keys changes no result: its gradient is a rounding error.
            assert trained.abs().max() < 1e-6, name
            continue
        assert (trained - weight).abs().max() < 1e-10, name
        assert (checkpoint["ema"][name] - average[i]).abs().max() < 1e-10, name
        # Every weight has moved.
        assert (weight - initial[i]).abs().max() > 0.01, name
    # Everything took part: flips, dropped labels, clipping, warmup, decay, and both EMA decays.
    assert 0 < events["flipped"] < 16
    assert 0 < events["dropped"] < 16
    assert min(events["norms"]) < 1 < 2 < max(events["norms"])
    assert len(set(events["rates"])) == 4
    assert events["decays"] == [1 / 10, 2 / 11, 0.2, 0.2]


# ---------------------------------------------------------------- dropped labels


def test_a_tenth_of_the_labels_is_dropped():
    """Of 10,000 examples, 1000 +- 4 standard deviations become the null label."""
    n, classes = 10_000, ["a", "b", "c"]
    config = dict(DEFAULTS, classes=classes, model_args={})
    assert config["label_drop"] == 0.1
    u, _ = example_noise(0, 7, range(n), (1, 1, 1), "cpu")
    labels = torch.arange(n) % 3
    result = train.drop_labels(labels, u[:, 0], config)
    dropped = result == 3
    assert abs(dropped.sum().item() - 1000) < 4 * math.sqrt(n * 0.1 * 0.9)
    assert torch.equal(result[~dropped], labels[~dropped])

    # The same examples lose their whole text, except for a last token that marks portraits.
    tokens = torch.randint(1, 257, (n, 5), generator=torch.Generator().manual_seed(0))
    config["classes"] = []
    result = train.drop_labels(tokens, u[:, 0], config)
    assert torch.equal(result[~dropped], tokens[~dropped])
    assert not result[dropped].any()
    config["model_args"] = dict(portrait=True)
    result = train.drop_labels(tokens, u[:, 0], config)
    assert torch.equal(result[~dropped], tokens[~dropped])
    assert not result[dropped, :-1].any()
    assert torch.equal(result[:, -1], tokens[:, -1])
