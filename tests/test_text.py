"""Tests of support/text.py: captions, encoders, and the text-to-image network."""

import argparse
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample as sampling
import train
from sample import guided, sample, to_uint8
from support.checkpoint import load, load_checkpoint
from support.data import load_batch
from support.recipes import RECIPES
from support.runtime import pixels
from support.sources import open_source
from support.text import (
    T5,
    CaptionedImages,
    CaptionedShapes,
    CrossAttention,
    Text,
    TextUViT,
    byte_tokens,
    cache_embeddings,
    parse_caption,
    prompt_texts,
    read_captions,
    read_prompts,
)
from tests.helpers import SMALL_NET, TINY_UVIT, call, named, on_ranks, skip_grid
from uvit import UViT

# ---------------------------------------------------------------- the network

TEXT = TINY_UVIT | dict(res=(16, 32), num_classes=0, attn_resolutions=(16,), text_tokens=6)


def text_net(**fields):
    """A tiny TextUViT with random weights, always the same."""
    torch.manual_seed(0)
    net = TextUViT(**TEXT | fields).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def text_tensor(*texts, length=6):
    """The bytes of texts as the tensor that the network takes."""
    return torch.from_numpy(byte_tokens(texts, length))


@pytest.mark.parametrize("text_dim", [0, 5])
def test_padding_of_texts_has_no_effect(text_dim):
    net = text_net(text_dim=text_dim)
    z, logsnr = torch.randn(1, 3, 16, 32), torch.zeros(1)
    close = dict(rtol=0, atol=1e-6)

    # A text of three embeddings or bytes, padded to six. Four bytes are one token. The first token
    # is the learned one.
    text = torch.randn(1, 6, 5) if text_dim else torch.randint(1, 257, (1, 6))
    text[:, 3:] = 0
    _, mask, _ = net.text(text)
    expected = [True] * 4 + [False] * 3 if text_dim else [True, True, False]
    assert mask.tolist() == [expected]

    # A network with the same weights for texts of three tokens gives the same output.
    weights = net.state_dict()
    if not text_dim:
        weights["text.position"] = weights["text.position"][:1]
    short = text_net(text_dim=text_dim, text_tokens=3)
    short.load_state_dict(weights)
    torch.testing.assert_close(net(z, logsnr, text), short(z, logsnr, text[:, :3]), **close)

    # Without a text the output is that of the empty text, not that of this one.
    torch.testing.assert_close(net(z, logsnr), net(z, logsnr, torch.zeros_like(text)))
    assert not torch.allclose(net(z, logsnr), net(z, logsnr, text), **close)

    # The last token before the padding matters.
    other = text.clone()
    other[:, 2] = 2 * other[:, 2] if text_dim else 1 + other[:, 2] % 256
    assert not torch.allclose(net(z, logsnr, other), net(z, logsnr, text), **close)


def test_byte_tokens_are_sums_of_embeddings():
    words = byte_tokens(["a red red", ""], 10)
    text = Text(10, 0, 8).double()
    text.transformer = torch.nn.ModuleList()
    text.norm = torch.nn.Identity()
    tokens, mask, _ = text(torch.from_numpy(words))

    # Nine bytes are three tokens after the learned one, which is all of the empty text.
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert torch.equal(tokens[:, 0], text.empty.expand(2, 8))

    # Each byte adds its own embedding, and that of the hash of up to five bytes.
    expected = text.position.clone()
    for i in range(9):
        five = sum(1009**j * int(words[0, i - j]) for j in range(min(i + 1, 5))) % 4093
        expected[i // 4] += text.encode.weight[words[0, i]] + text.five.weight[five]
    torch.testing.assert_close(tokens[0, 1:], expected)


def test_cross_attention_is_softmax_attention():
    torch.manual_seed(0)
    cross = CrossAttention(8, 5, 2).double()
    torch.nn.init.normal_(cross.out.weight)
    x = torch.randn(1, 4, 8).double()
    text = torch.randn(1, 3, 5).double()
    mask = torch.tensor([[True, True, False]])

    # Two heads of four channels. The third token is padding.
    q = cross.q(cross.norm(x))[0]
    k, v = cross.kv(text)[0].chunk(2, 1)
    heads = []
    for channels in (slice(0, 4), slice(4, 8)):
        scores = cross.norm_q(q[:, channels]) @ cross.norm_k(k[:2, channels]).T / 2
        heads.append(scores.softmax(1) @ v[:2, channels])
    expected = x[0] + cross.out(torch.cat(heads, 1))
    torch.testing.assert_close(cross(x, text, mask)[0], expected)


def test_guidance_away_from_a_text():
    net = text_net()
    z, logsnr = torch.randn(2, 3, 16, 32), torch.zeros(2)
    text, negative = text_tensor("ab", "xyz"), text_tensor("no")

    # The null label is the empty text, or a negative prompt.
    for given, null in ((None, torch.zeros_like(text)), (negative, negative.expand(2, -1))):
        cond, uncond = net(z, logsnr, text), net(z, logsnr, null)
        expected = uncond + 2 * (cond - uncond)
        torch.testing.assert_close(guided(net, 2.0, given)(z, logsnr, text), expected)


def test_the_portrait_flag_reaches_the_net():
    net = text_net(portrait=True)
    z, logsnr = torch.randn(1, 3, 16, 32), torch.zeros(1)
    landscape = text_tensor("ab", length=7)
    portrait = landscape.clone()
    portrait[:, -1] = 1
    with torch.no_grad():
        v_landscape, v_portrait = net(z, logsnr, landscape), net(z, logsnr, portrait)
        assert not torch.allclose(v_landscape, v_portrait, atol=1e-6)

        # It acts only through its learned vector.
        net.portrait.zero_()
        assert torch.equal(net(z, logsnr, landscape), net(z, logsnr, portrait))


@pytest.mark.parametrize("text_dim", [0, 5])
def test_text_gradients_reach_all_weights(text_dim):
    net = text_net(text_dim=text_dim, portrait=True)
    text = torch.randn(4, 7, 5) if text_dim else torch.randint(1, 257, (4, 7))
    net(torch.randn(4, 3, 16, 32), torch.randn(4), text).square().mean().backward()

    # The bias of norm_k adds the same number to all logits of a query, which softmax ignores.
    for name, parameter in net.named_parameters():
        if "norm_k.bias" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def number_of_parameters(net):
    """The number of parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters())


def parameters_of_cross_attention(channels):
    """The number of parameters of CrossAttention to tokens of 1024 channels, four heads."""
    norm = 2 * channels
    query = channels * channels + channels
    key_and_value = 1024 * 2 * channels + 2 * channels
    norms_of_heads = 4 * (channels // 4)
    out = channels * channels + channels
    return norm + query + key_and_value + norms_of_heads + out


@pytest.mark.parametrize(
    "res", [256, *(pytest.param(res, marks=pytest.mark.slow) for res in (512, "384x640"))]
)
def test_text_recipes(res):
    assert list(RECIPES["uvit"]["text"]) == [256, 512, "384x640"]
    height, width = pixels(res)
    fields = RECIPES["uvit"]["text"][res] | dict(res=(height, width), num_classes=0)
    with torch.device("meta"):
        net = TextUViT(**fields, text_tokens=128, text_dim=4096)
        z, text = torch.empty(1, 3, height, width), torch.empty(1, 128, 4096)
        assert net(z, torch.empty(1), text).shape == z.shape
        plain = UViT(**fields)

    # The parameters that texts add: cross-attention in 36 + 4 blocks, and the text encoder.
    empty_text, projection = 1024, 4096 * 1024 + 1024
    norms, summary = 2 * 1024 + 4 * 1024, 4 * 1024 * 1024 + 1024
    added = 36 * parameters_of_cross_attention(2048) + 4 * parameters_of_cross_attention(512)
    added += empty_text + projection + norms + summary
    assert number_of_parameters(net) - number_of_parameters(plain) == added

    # A small net with the same levels computes gradients.
    small = dict(base_channels=4, emb_channels=8, num_transformer_blocks=1)
    net = TextUViT(**fields | small, text_tokens=4, text_dim=8)
    z, text = torch.randn(1, 3, height, width), torch.randn(1, 4, 8)
    net(z, torch.zeros(1), text).mean().backward()


# ---------------------------------------------------------------- the built-in captions

RGB = {
    "red": (1, 0, 0),
    "magenta": (1, 0, 1),
    "blue": (0, 0, 1),
    "cyan": (0, 1, 1),
    "green": (0, 1, 0),
    "yellow": (1, 1, 0),
}


def nearest_color(color):
    """The name of the color whose hue is nearest to that of an RGB tensor (3,)."""

    def similarity(name):
        rgb = torch.tensor(RGB[name]).float()
        return F.cosine_similarity(color - color.mean(), rgb - rgb.mean(), 0)

    return max(RGB, key=similarity)


def test_captioned_shapes_match_their_captions():
    data = CaptionedShapes(64, full=True)
    images, tokens = load_batch(data, range(300))
    texts = data.captions(range(300))

    # A caption does not depend on the batch, and fits into the tokens, which are its bytes.
    text_bytes = bytes((tokens[7][tokens[7] > 0] - 1).tolist())
    assert text_bytes.decode() == texts[7]
    assert data.captions([7])[0] == texts[7]
    assert max(map(len, texts)) <= 64
    assert torch.equal(data.sample_labels(9)[torch.arange(9)], tokens[:9])

    for i, text in enumerate(texts):
        # For example "a small red star on blue and green, top left".
        _, size, color, shape, *_, up, right = text.split()

        # The shape is brighter than the background.
        image = images[i].float()
        saturation = image.amax(0) - image.amin(0)
        inside = saturation > 0.8 * saturation.max()

        # The center of the shape is in the corner of the caption. A moon is heavier on its left
        # half, so its center says nothing about left and right.
        row, column = inside.nonzero().float().mean(0)
        assert (row < 31.5) == (up == "top"), (i, text)
        if shape != "moon":
            assert (column > 31.5) == (right == "right"), (i, text)

        mean = image[:, inside].mean(1)
        assert nearest_color(mean) == color, (i, text, mean)


def test_captions_leave_out_words_but_not_the_shape():
    full = CaptionedShapes(64, full=True).captions(range(300))
    partial = CaptionedShapes(64).captions(range(300))
    for text, full_text in zip(partial, full):
        words = text.replace(",", "").split()
        full_words = full_text.replace(",", "").split()
        shape = full_words[3]
        assert set(words) <= set(full_words)
        assert shape in words

    # One caption in eight leaves out the position.
    with_position = ["top" in text or "bottom" in text for text in partial]
    assert 0.6 < np.mean(with_position) < 0.9


def test_training_never_shows_the_held_out_color_of_a_shape():
    def pairs(data, n):
        """The pairs (color, shape) in the first n captions."""
        return {tuple(text.split()[2:4]) for text in data.captions(range(n))}

    shown = pairs(CaptionedShapes(64, full=True), 300)
    held_out = pairs(CaptionedShapes(64, held_out=True, full=True), 100)
    assert len(held_out) == 10
    assert len(shown) == 50
    assert not held_out & shown


# ---------------------------------------------------------------- captions of image files


def write_images(folder, texts):
    """Write an image for each text, and its caption if the text is not None. Returns the folder."""
    folder.mkdir()
    for i, text in enumerate(texts):
        # Every other image is wide.
        image = np.full((12, 8 + 8 * (i % 2), 3), 20 * i, np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        if text is not None:
            content = text if isinstance(text, bytes) else text.encode()
            (folder / f"{i}.txt").write_bytes(content)
    return folder


def caption_lines(files, texts):
    """The lines of a .jsonl file with captions."""
    return [json.dumps(dict(file=file, text=text)) for file, text in zip(files, texts)]


def test_captions_of_folders_zip_files_and_lists(tmp_path):
    texts = [f"number {i} \u00e9" for i in range(4)]
    folder = write_images(tmp_path / "folder", texts)
    archive, captions = tmp_path / "a.zip", tmp_path / "list.jsonl"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.iterdir()):
            file.write(path, f"deep/{path.name}")

    # A list may be in any order, and name images by the end of their paths.
    lines = caption_lines(["folder/0.png", "1.png", "2.png", "3.png"], texts)
    captions.write_text("\n".join(reversed(lines)))

    assert read_captions(open_source([folder])) == texts
    assert read_captions(open_source([archive])) == texts
    assert read_captions(open_source([folder]), captions) == texts


@pytest.mark.parametrize(
    "texts, lines, message",
    [
        ([None, "b"], None, "0.png 1 2"),
        (["a", " \n"], None, "1.png"),
        ([b"\xff", "b"], None, "0.txt UTF-8"),
        ([None, None], b'{"file": "0.png", "text": "a"}', "1.png"),
        ([None], b'{"file": "7.png", "text": "a"}', "list.jsonl 1 7.png"),
        ([None], b'{"file": "0.png"}', "list.jsonl 1"),
        ([None], b"\xff", "list.jsonl 1"),
        ([None], b"[]", "list.jsonl 1"),
        ([None], b'{"file": "0.png", "text": null}', "list.jsonl 1"),
        ([None], b'{"file": ["0.png"], "text": "a"}', "list.jsonl 1"),
        (
            [None],
            b'{"file": "0.png", "text": "a"}\n{"file": "0.png", "text": "b"}',
            "list.jsonl 2 0.png",
        ),
    ],
)
def test_invalid_captions_are_rejected(tmp_path, texts, lines, message):
    folder, captions = write_images(tmp_path / "folder", texts), None
    if lines:
        captions = tmp_path / "list.jsonl"
        captions.write_bytes(lines)
    with pytest.raises(ValueError, match=named(*message.split())):
        read_captions(open_source([folder]), captions)


def test_captions_without_an_image_are_rejected(tmp_path):
    folder = write_images(tmp_path / "folder", ["a", "b"])
    (folder / "2.txt").write_text("alone")
    with pytest.raises(ValueError, match=named("2.txt")):
        read_captions(open_source([folder]))


def test_portrait_images_are_rotated(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    portrait = rng.integers(0, 256, (10, 6, 3), dtype=np.uint8)
    landscape = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)

    # Orientation 6: a camera was held upright, and its image must be turned to the right.
    no_exif, sideways = Image.Exif(), Image.Exif()
    sideways[0x0112] = 6
    files = [(portrait, no_exif), (landscape, no_exif), (landscape, sideways)]
    for i, (image, exif) in enumerate(files):
        Image.fromarray(image).save(folder / f"{i}.png", exif=exif)
        (folder / f"{i}.txt").write_text(f"number {i}")

    # In a landscape run, portrait images are rotated to the left. Their tokens end with a one.
    data = CaptionedImages([str(folder)], (6, 10), False, "", "bytes", 9, "cpu")
    images, tokens = load_batch(data, [0, 1, 2])
    expected = [np.rot90(portrait), landscape, np.rot90(np.rot90(landscape, -1))]
    for image, rotated in zip(images, expected):
        assert np.array_equal(image.permute(1, 2, 0), rotated)
    assert tokens[:, -1].tolist() == [1, 0, 1]

    # Samples during training are landscape images.
    assert data.sample_labels(4)[torch.arange(4)][:, -1].tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- frozen text encoders


def test_embeddings_are_cached_once_and_continued(tmp_path):
    encoded = []

    class Encoder:
        """Encodes a number as 2 x 3 copies of it. It is interrupted in the third batch of 64."""

        length, dim = 2, 3

        def lengths(self, texts):
            return [len(text) for text in texts]

        def __call__(self, texts):
            encoded.extend(texts)
            if len(encoded) == 192:
                raise KeyboardInterrupt
            return np.array([[[float(text)] * 3] * 2 for text in texts], np.float16)

    texts = [str(i + 1) for i in range(200)]
    with pytest.raises(KeyboardInterrupt):
        cache_embeddings(texts, Encoder, "counting", tmp_path)

    # Of the two batches in the file, the second is encoded again, because it may be incomplete.
    array = cache_embeddings(texts, Encoder, "counting", tmp_path)
    assert array.shape == (200, 2, 3)
    assert array[:, 0, 0].tolist() == list(range(1, 201))
    assert len(encoded) == 192 + 200 - 64

    # The complete file needs no encoder.
    assert np.array_equal(cache_embeddings(texts, None, "counting", tmp_path), array)


def test_embeddings_that_do_not_fit_on_the_disk_are_refused(tmp_path, monkeypatch, capsys):
    class Encoder:
        """128 tokens of 4096 channels, as T5-XXL: 1 MiB for each text."""

        length, dim = 128, 4096

        def lengths(self, texts):
            return [1] * len(texts)

        def __call__(self, texts):
            return np.zeros((len(texts), 128, 4096), np.float16)

    texts, folder = [str(i) for i in range(3)], str(tmp_path)
    needed = 3 * 2**20 + 128  # with the header
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = shutil._ntuple_diskusage(1, 1, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            assert len(cache_embeddings(texts, Encoder, "large", folder)) == 3
        else:
            with pytest.raises(ValueError, match=named(folder, "0.00315 GB", "--text-tokens")):
                cache_embeddings(texts, Encoder, "large", folder)
        printed = capsys.readouterr()
        assert re.search(named("3 captions", "0.00315 GB", "1 MiB"), printed.out)
        assert ("0:00 left" in printed.err) == fits


@pytest.fixture
def transformers():
    """The transformers library. Without it, the test is skipped."""
    return pytest.importorskip("transformers", reason="T5 takes the transformers library")


def save_t5(transformers, folder, layers=2):
    """Save a tiny T5 with random weights, and a tokenizer. Returns the folder as a string."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def test_t5(tmp_path, transformers):
    name = save_t5(transformers, tmp_path / "t5")
    texts = [f"number {i}" for i in range(4)]
    folder = write_images(tmp_path / "folder", texts)
    live, ready = tmp_path / "live", tmp_path / "ready"

    # Training with the encoder equals training on the embeddings of its texts.
    options = ["--data", folder, "--captions --res 32 --text-tokens 24 --steps 1 --batch 4"]
    options += ["--no-flip --no-bf16"]
    call(train.main, *options, "--text-encoder", name, "--out", live)
    embeddings = np.concatenate([T5(name, 24)([text]) for text in texts])
    np.save(tmp_path / "ready.npy", embeddings)
    call(train.main, *options, "--text-encoder", tmp_path / "ready.npy", "--out", ready)
    live_weights = load(str(live))[0].state_dict()
    ready_weights = load(str(ready))[0].state_dict()
    for key in live_weights:
        torch.testing.assert_close(live_weights[key], ready_weights[key], rtol=0, atol=1e-5)

    # Sampling from a prompt equals sampling from its embeddings.
    np.save(tmp_path / "prompt.npy", T5(name, 24)(["number 2"]))
    one = "--steps 1 --n 1 --out"
    prompt = ["--prompt", "number 2"]
    call(sampling.main, live, *prompt, "--text-encoder", name, one, tmp_path / "live.npz")
    call(sampling.main, live, "--prompts", tmp_path / "prompt.npy", one, tmp_path / "ready.npz")
    live_samples = np.load(tmp_path / "live.npz")["arr_0"]
    ready_samples = np.load(tmp_path / "ready.npz")["arr_0"]
    assert np.array_equal(live_samples, ready_samples)

    # A checkpoint does not load an encoder. The command line must name it.
    with pytest.raises(ValueError, match=named(name, "--text-encoder")):
        call(sampling.main, live, *prompt, "--out", tmp_path / "none.png")


def test_invalid_t5_models_are_rejected(tmp_path, transformers):
    # The model of another class, a T5 without the weights of one layer, and no model.
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "bert")
    save_t5(transformers, tmp_path / "t5")
    save_t5(transformers, tmp_path / "short", layers=1)
    two_layers = (tmp_path / "t5" / "config.json").read_text()
    (tmp_path / "short" / "config.json").write_text(two_layers)

    for other in ("bert", "short", "missing"):
        with pytest.raises(ValueError, match=named("--text-encoder", tmp_path / other)):
            T5(str(tmp_path / other), 24)


# ---------------------------------------------------------------- the commands

CAPTIONED = ["--res 32x64 --size tiny --batch 4 --text-tokens 16", *SMALL_NET]


@pytest.fixture
def images(tmp_path):
    """A folder with four images. tmp_path / list.jsonl has their captions; the first is long."""
    texts = ["a" * 10_000, "number 1", "number 2", "number 3"]
    lines = caption_lines([f"{i}.png" for i in range(4)], texts)
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return write_images(tmp_path / "folder", [None] * 4)


def save_embeddings(path, *shape):
    """Write an .npy file of zeros in float32. Returns its path."""
    np.save(path, np.zeros(shape, np.float32))
    return path


def test_text_to_image_trains_resumes_and_samples(tmp_path, images, monkeypatch, capsys):
    # Train with relative paths. One of four captions is longer than 16 tokens.
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    call(train.main, "--data", images, *CAPTIONED, "--captions list.jsonl --steps 1 --out", run)
    assert re.search(r"\b1\b\D+\b4\b\D+\b16\b.*--text-tokens", capsys.readouterr().out)

    # Resume in another folder.
    monkeypatch.chdir(images)
    call(train.main, "--out", run, "--steps 2 --label-drop 1")
    net, config, schedule = load(str(run))
    assert config["model_args"]["portrait"]
    assert config["model_args"]["text_tokens"] == 16
    assert Image.open(run / "samples_0000001.png").size[0] == 8 * 130 - 2

    def portrait_tokens(*texts):
        """The tokens of texts, for portrait images."""
        ones = torch.ones(len(texts), 1, dtype=torch.int64)
        return torch.cat([text_tensor(*texts, length=16), ones], 1)

    # The command cycles through the prompts. It draws portrait images as rotated landscape images.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("number 2\n\nnumber 3\n")
    drawn = ["number 2", "number 3", "number 2"]
    options = "--n 3 --guidance 2 --steps 2 --sampler ddim --portrait --no-bf16 --out"
    for negative in ("number 1", ""):
        out = tmp_path / "out.npz"
        call(sampling.main, run, "--prompts", prompts, options, out, "--negative", negative)
        x = sample(
            net,
            (3, 3, 32, 64),
            schedule,
            steps=2,
            sampler="ddim",
            label=portrait_tokens(*drawn),
            guidance=2.0,
            null_label=portrait_tokens(negative),
        )
        with np.load(out) as samples:
            rotated = np.rot90(samples["arr_0"], 1, (1, 2))
            assert np.array_equal(rotated, to_uint8(x).permute(0, 2, 3, 1))
            assert samples["prompts"].tolist() == drawn

    # Sampling rejects options that the run does not support.
    wide = save_embeddings(tmp_path / "wide.npy", 4, 16, 3)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    for args, message in (
        ([], f"{run} --prompt --prompts"),
        (["--prompt a --label 3"], f"{run} --label"),
        (["--prompts", wide], "--prompts wide.npy (16, 0) (16, 3)"),
        (["--prompts", tmp_path / "bad.txt"], "bad.txt UTF-8"),
        (["--prompts", tmp_path / "empty.txt"], "empty.txt"),
        (["--prompt a --negative b"], "--negative --guidance"),
    ):
        with pytest.raises(ValueError, match=named(*message.split())):
            call(sampling.main, run, *args)

    # A run keeps its encoder and the length of its texts.
    for args in (["--text-encoder", wide], ["--text-tokens 17"]):
        with pytest.raises(ValueError, match=named(run, "--out")):
            call(train.main, "--out", run, *args)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 16, 3), np.float32), "array.npy float16 float32 (4,"),
        (np.zeros((0, 16, 3), np.float32), "array.npy float16 float32"),
        (np.zeros(4), "array.npy float16 float32"),
        (b"PK broken", "array.npy"),
    ],
    ids=["few", "none", "flat", "broken"],
)
def test_invalid_embeddings_are_rejected(tmp_path, images, array, message):
    path = tmp_path / "array.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    options = ["--data", images, *CAPTIONED, "--captions", tmp_path / "list.jsonl"]
    with pytest.raises(ValueError, match=named(*message.split())):
        call(train.main, *options, "--text-encoder", path, "--out", tmp_path / "new")


def test_training_on_captions_rejects_wrong_options(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ["--data", images, *CAPTIONED, "--out", tmp_path / "new"]
    captioned = [*plain, "--captions", tmp_path / "list.jsonl"]
    for args, message in (
        ([*captioned, "--flip"], "--flip"),
        ([*captioned, "--text-tokens 0"], "--text-tokens 0"),
        ([*captioned, "--pack a.npz"], "--pack --captions"),
        ([*plain, "--text-encoder t5"], "--text-encoder --captions"),
        (["--size text --res 256"], "--size text --captions"),
        (["--captions --text-encoder t5"], "--captions --text-encoder --data"),
    ):
        with pytest.raises(ValueError, match=named(*message.split())):
            call(train.main, *args)


def test_resuming_rejects_embeddings_of_another_size(tmp_path, images):
    out = tmp_path / "new"
    wide = save_embeddings(tmp_path / "wide.npy", 4, 16, 3)
    options = ["--data", images, *CAPTIONED, "--captions", tmp_path / "list.jsonl", "--out", out]
    call(train.main, *options, "--text-encoder", wide, "--steps 1")
    save_embeddings(wide, 4, 16, 4)
    with pytest.raises(ValueError, match=named(out)):
        call(train.main, "--out", out, "--steps 2")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--no-bf16"], ["--bf16 --fsdp"]])
def test_text_to_image_on_two_ranks(tmp_path, options):
    common = ["--captions --res 32 --size tiny --batch 8 --steps 3 --sample-every 1000"]
    common += ["--device cpu", *options]
    # Only a hang is an error: without bfloat16 in hardware this takes minutes.
    statuses, _, errors = on_ranks(
        train.main, *common, "--out two", cwd=tmp_path, prepare=skip_grid, timeout=2400
    )
    assert statuses == [0, 0], errors
    call(train.main, *common, "--out", tmp_path / "one")

    # The gradient of norm_k.bias is rounding noise, which Adam enlarges.
    one = load_checkpoint(str(tmp_path / "one"))["net"]
    two = load_checkpoint(str(tmp_path / "two"))["net"]
    atol = 1e-5 if "--no-bf16" in options else 2e-3
    for name in one:
        is_close = torch.allclose(one[name], two[name], rtol=0, atol=atol)
        assert is_close or "norm_k.bias" in name, name


def test_prompts_of_windows_begin_with_a_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red star\n a ring \n", encoding="utf-8")
    args = argparse.Namespace(prompt=[" a moon "], prompts=str(path))
    assert prompt_texts(args) == ["a moon", "a red star", "a ring"]


def test_half_a_character_is_named_with_its_line():
    with pytest.raises(ValueError, match="list.jsonl, line 3"):
        parse_caption(b'{"file": "a.png", "text": "a \\ud800"}', "list.jsonl, line 3")


def test_embeddings_of_prompts_need_no_encoder(tmp_path):
    np.save(tmp_path / "prompts.npy", np.zeros((2, 6, 5), np.float32))
    config = dict(model_args=dict(text_tokens=6, text_dim=5), text_encoder="train.npy")
    args = dict(prompt=None, prompts=f"{tmp_path}/prompts.npy", negative=None, guidance=1.0)
    args |= dict(text_encoder=None, portrait=False, checkpoint="run")
    assert len(read_prompts(argparse.Namespace(**args), config, "cpu")[1]) == 2
    with pytest.raises(ValueError, match="omit --text-encoder"):
        read_prompts(argparse.Namespace(**args | dict(text_encoder="t5")), config, "cpu")

    # A run on embeddings has no encoder that could be loaded.
    with pytest.raises(ValueError, match="--prompts FILE.npy"):
        read_prompts(argparse.Namespace(**args | dict(prompt=["a"], prompts=None)), config, "cpu")
