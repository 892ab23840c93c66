"""Text to image: captioned datasets, text encoders, prompts, and a U-ViT whose label is a text.

The paper conditions on the token embeddings of a frozen T5-XXL. This file accepts any T5 of the
transformers library, embeddings from another program, or no encoder at all: then the network
receives the bytes of a text and trains a small transformer on them, jointly.

    python train.py --res 32 --captions --out runs/text        # captioned Shapes, as bytes
    python train.py --res 64 --data photos/ --captions         # photos/a.jpg with photos/a.txt
    python train.py --res 64 --data photos/ --captions --text-encoder google-t5/t5-small
    python sample.py runs/text --prompt "a small red star on blue, top left" --guidance 2

A captioned dataset returns tokens as labels: bytes (B, N) int64, or embeddings (B, N, D) float32.
Zeros are padding, and zeros alone are the empty text, which is the null label. In landscape runs
the tokens end with one more row, of ones if the image is a portrait that was rotated.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
import typing
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fid import StringArray, in_array, is_hidden, list_paths, one_line
from support.data import ImageData, Shapes
from support.runtime import duration
from support.sources import expand
from unet import ResBlock, attend, print_table, zero_init
from uvit import TransformerBlock, UViT

# ---------------------------------------------------------------- tokens as labels


def byte_tokens(texts, length):
    """Return the UTF-8 bytes of texts, each plus 1, as an int64 array (len(texts), length).

    Longer texts are truncated; shorter ones are padded with 0.
    """
    tokens = np.zeros((len(texts), length), np.int64)
    for row, text in zip(tokens, texts):
        values = np.frombuffer(text.encode(), np.uint8)[:length]
        # Plus 1, because 0 is padding.
        row[: len(values)] = values.astype(np.int64) + 1
    return tokens


def byte_lengths(texts):
    """Return the number of UTF-8 bytes of each text."""
    return [len(text.encode()) for text in texts]


def to_label(tokens, portrait=None):
    """Turn tokens, an array (B, N) or (B, N, D), into the tensor that the network takes as label.

    portrait: (B,) booleans, for a network with `portrait`; they are appended as a row of ones or
    zeros. Returns int64 (B, N) or float32 (B, N, D), with N + 1 rows if portrait is given.
    """
    tokens = torch.from_numpy(np.array(tokens, np.float32 if tokens.ndim == 3 else np.int64))
    if portrait is None:
        return tokens
    row = torch.as_tensor(portrait).reshape(-1, *[1] * (tokens.ndim - 1)).to(tokens.dtype)
    return torch.cat([tokens, row.expand_as(tokens[:, :1])], 1)


class LazyLabels:
    """A sequence of n labels, computed on access: all embeddings at once would not fit in memory.

    labels[indices] calls make(indices).
    """

    def __init__(self, n, make):
        self.n = n
        self.make = make

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        return self.make(indices)


def warn_truncated(texts, lengths, length):
    """Warn on rank 0 about texts that exceed `length` tokens and are truncated.

    lengths: a function that returns the number of tokens of each text in a list.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    truncated = 0
    for i in range(0, len(texts), 1024):
        truncated += sum(n > length for n in lengths(texts[i : i + 1024]))
    if truncated:
        print(
            f"{truncated} of {len(texts)} texts are longer than {length} tokens and are truncated: "
            "see --text-tokens",
            flush=True,
        )


# ---------------------------------------------------------------- captions of image files


def read_captions(reader, path=None):
    """Return the caption of each image of a source (see support/sources.py).

    path: None if the format stores captions, or if the caption of name.jpg is in name.txt next to
    it; or a .jsonl with a line {"file": ..., "text": ...} for each image. Raises ValueError, naming
    the first bad file, for an image without caption, a caption without image, an empty caption, or
    text that is not UTF-8.
    """
    texts = reader.texts
    if texts is None and any(in_array(where) for where, _ in reader.sources.parts):
        raise ValueError(
            "captions need images in folders or zip files: "
            "images in npz and npy files have no names"
        )
    names = StringArray(reader.name(i) for i in range(len(reader)))
    if path:
        texts = caption_list(names, path)
    elif texts is None:
        texts = caption_files(reader.sources, names)
    missing = sum(text is None for text in texts)
    for name, text in zip(names, texts):
        if text is None:
            raise ValueError(
                f"{name} has no caption: {missing} of {len(texts)} images have no caption"
            )
        if not text.strip():
            raise ValueError(f"the caption of {name} is empty")
    return [text.strip() for text in texts]


def caption_files(sources, names):
    """Return the text of the .txt file next to each image, or None if there is no such file.

    sources: those of a fid.ImageReader. names: the path of each source.
    """
    # Visit each zip file and each folder once, in the order of the images.
    places = dict.fromkeys(
        (where, None if where else os.path.dirname(name)) for where, name in sources
    )
    found = {}  # path without extension -> text
    for where, folder in places:
        with zipfile.ZipFile(where) if where else contextlib.nullcontext() as archive:
            for file in sorted(archive.namelist() if archive else os.listdir(folder)):
                if not file.endswith(".txt") or any(map(is_hidden, file.split("/"))):
                    continue
                path = os.path.join(where or folder, file)
                found[os.path.splitext(path)[0]] = read_text(path, file, archive)

    stems = [os.path.splitext(name)[0] for name in names]
    alone = sorted(found.keys() - set(stems))
    if alone:
        raise ValueError(f"{alone[0]}.txt is a caption without an image")
    return [found.get(stem) for stem in stems]


def read_text(path, file, archive=None):
    """Read the UTF-8 text of a file in an open zip archive, or at a path. Raises ValueError."""
    try:
        with archive.open(file) if archive else open(path, "rb") as content:
            return content.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def caption_list(names, path):
    """Return the text for each image name in a .jsonl file, or None if the file has none.

    A line may name an image by the end of its path: a.jpg, or cats/a.jpg if there are two of them.
    Raises ValueError, naming the line, for a line that does not name exactly one image, once.
    """
    # Compare whole path components: "/a.jpg" does not match "/aa.jpg".
    names = ["/" + name.replace(os.sep, "/").lstrip("/") for name in names]
    # Group the images by file name, so that each line compares only a few paths.
    same_name = collections.defaultdict(list)
    for i, name in enumerate(names):
        same_name[os.path.basename(name)].append(i)

    texts = [None] * len(names)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            image, text = parse_caption(line, f"{path}, line {number}")
            candidates = same_name[os.path.basename(image)]
            matches = [i for i in candidates if names[i].endswith("/" + image.lstrip("/"))]
            if len(matches) != 1:
                count = "several" if matches else "none"
                raise ValueError(
                    f"{path}, line {number}: {image} is the end of {count} of the image paths"
                )
            if texts[matches[0]] is not None:
                raise ValueError(
                    f"{path}, line {number}: {image} has had a caption before; "
                    "an image has one caption"
                )
            texts[matches[0]] = text
    return texts


def parse_caption(line, where):
    """Return (file, text) of a line {"file": ..., "text": ...}. Raises ValueError, naming where."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
        file, text = entry["file"], entry["text"]
        if not isinstance(file, str) or not isinstance(text, str):
            raise TypeError("both must be strings")
        text.encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: not {{"file": ..., "text": ...}} in UTF-8 ({one_line(error)})'
        ) from error
    return file, text


# ---------------------------------------------------------------- encoders


def make_encoder(name, length, device="cpu"):
    """Return a function from texts to tokens.

    name: "bytes", for byte_tokens (B, length); or the name or folder of a T5, for its embeddings
    (B, length, dim).
    """
    if name == "bytes":
        return functools.partial(byte_tokens, length=length)
    return T5(name, length, device)


class T5:
    """A frozen T5 encoder: texts -> embeddings (len(texts), length, dim) float16.

    name: a model of the transformers library, or a folder. Rows after the end of a text are 0.
    Raises ValueError if the library or the model is missing, or if the model is not a T5.
    """

    def __init__(self, name, length, device="cpu"):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ValueError(f"--text-encoder {name} needs: pip install transformers") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model, report = T5EncoderModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # the library raises many types for a missing or damaged model
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--text-encoder {name} is neither bytes, an .npy file nor a T5 ({reason})"
            ) from error
        # The library initializes missing weights at random and continues. Refuse them.
        missing = report["missing_keys"] or report["mismatched_keys"]
        if missing:
            key = sorted(map(str, missing))[0]
            raise ValueError(f"--text-encoder {name} is no T5: its weights lack {key}")
        self.model.to(device).eval().requires_grad_(False)
        self.length = length
        self.device = device
        self.dim = self.model.config.d_model

    @torch.no_grad()
    def __call__(self, texts):
        """Encode texts in batches of 64."""
        rows = []
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(
                texts[i : i + 64],
                max_length=self.length,
                truncation=True,
                padding="max_length",
                return_tensors="pt",
            ).to(self.device)
            states = self.model(**batch).last_hidden_state * batch["attention_mask"][:, :, None]
            rows.append(states.cpu().numpy().astype(np.float16))
        return np.concatenate(rows)

    def lengths(self, texts):
        """Return the number of tokens of each text."""
        return [len(tokens) for tokens in self.tokenizer(texts).input_ids]


def cache_embeddings(texts, load, name, folder):
    """Return the embeddings of all texts, (len(texts), length, dim) float16, mapped from a file.

    The file is written to the folder once. If writing is interrupted, the next call continues it.
    load: a function that returns the encoder. name: identifies the encoder and its settings.
    """
    # The file name depends on the encoder and on all texts: other captions make another file.
    digest = hashlib.sha256("\0".join([name, *texts]).encode()).hexdigest()[:8]
    path = os.path.join(folder, f"captions-{digest}.npy")
    # The first rank of each machine writes.
    if not os.path.isfile(path) and os.environ.get("LOCAL_RANK", "0") == "0":
        write_embeddings(texts, load(), path)
    # The others wait for the file. A barrier would time out after some minutes.
    while not os.path.isfile(path):
        time.sleep(1)
    return np.load(path, mmap_mode="r")


def write_embeddings(texts, encoder, path):
    """Encode all texts into an .npy file. Continue a partial file of an interrupted run.

    Raises ValueError if the disk is too small for the file.
    """
    buffer = io.BytesIO()
    shape = (len(texts), encoder.length, encoder.dim)
    np.lib.format.write_array_header_1_0(
        buffer, dict(descr="<f2", fortran_order=False, shape=shape)
    )
    header = buffer.getvalue()
    text_bytes = 2 * encoder.length * encoder.dim  # float16

    with open(f"{path}.part", "ab") as file:
        # Wait while another process writes the same file. Windows and some disks have no locks.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)
        # The other process may have finished it.
        if os.path.isfile(path):
            return

        # Repeat the last 64 texts of a partial file: they may not have reached the disk.
        size = file.seek(0, 2)
        done = max(0, (size - len(header)) // text_bytes - 64)
        check_disk(path, len(header) + len(texts) * text_bytes - size, len(texts), text_bytes)
        if done:
            file.truncate(len(header) + done * text_bytes)
        else:
            file.truncate(0)
            file.write(header)
        start = time.time()
        for i in range(done, len(texts), 64):
            file.write(encoder(texts[i : i + 64]).tobytes())
            count = min(i + 64, len(texts))
            left = (time.time() - start) / (count - done) * (len(texts) - count)
            message = f"\r{count} of {len(texts)} captions encoded, {duration(left)} left "
            print(message, end="", file=sys.stderr, flush=True)

        # The file receives its name only when all of it is on the disk.
        file.flush()
        os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    print(f"\nwrote {path}", flush=True)
    warn_truncated(texts, encoder.lengths, encoder.length)


def check_disk(path, needed, count, text_bytes):
    """Print the size of a file of embeddings. Raises ValueError if the disk has less than needed.

    needed: bytes that are still to be written, of count texts with text_bytes each.
    """
    total = count * text_bytes
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    print(
        f"the embeddings of {count} captions take {total / 1e9:.3g} GB in {path} "
        f"({text_bytes / 2**20:.2g} MiB each)",
        flush=True,
    )
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e9:.3g} GB more, and the disk has {free / 1e9:.3g} GB free: "
            "free some, use a lower --text-tokens, or a smaller --text-encoder"
        )


def open_embeddings(path, count=None):
    """Map embeddings (count, length, dim), float16 or float32, from an .npy of another program.

    count: the required number of texts; None accepts any. Raises ValueError.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # np.load raises many types for a damaged file
        raise ValueError(f"{path}: {one_line(error)}") from error
    is_array = isinstance(array, np.ndarray)  # an .npz is not
    fits = is_array and array.dtype in (np.float16, np.float32) and array.ndim == 3 and array.size
    if not fits or count not in (None, len(array)):
        found = f"{array.dtype} {array.shape}" if is_array else "several arrays"
        raise ValueError(
            f"{path} must hold float16 or float32 ({count or 'number'}, length, dim), not {found}"
        )
    return array


# ---------------------------------------------------------------- datasets


class CaptionedShapes(Shapes):
    """Shapes with captions such as "a small red star on blue and green, top left".

    The shapes are smaller, in six colors, and in one of the four corners. As in captions by people,
    details are missing: one caption in eight leaves out the size, one in eight the color, and so on
    for background and position; with full=True none is left out. Each shape has one color that is
    held out: training never shows it, and held_out=True shows only it.
    Labels are byte_tokens (B, tokens) of the captions.
    """

    colors = ["red", "magenta", "blue", "cyan", "green", "yellow"]

    def __init__(
        self, res, device="cpu", length=1_000_000, first=0, held_out=False, full=False, tokens=64
    ):
        super().__init__(res, device, length, first)
        self.held_out = held_out
        self.full = full
        self.shapes = self.classes
        self.classes = []
        self.net_fields = dict(text_tokens=tokens, text_dim=0)

    def __str__(self):
        return "built-in with captions"

    def __getitems__(self, indices):
        """Draw the images (B, H, W, 3) at these indices. Returns them and the tokens (B, N)."""
        images, _ = super().__getitems__(indices)
        return images, self._tokens(indices).to(self.device, non_blocking=True)

    def sample_labels(self, n):
        """Return the tokens of the first n captions, as LazyLabels."""
        return LazyLabels(n, self._tokens)

    def _tokens(self, indices):
        return to_label(byte_tokens(self.captions(indices), self.net_fields["text_tokens"]))

    def captions(self, indices):
        """Return the captions at these indices."""
        # Recompute the attributes of the images, without drawing them.
        indices = torch.as_tensor(indices, dtype=torch.int64) + self.first
        u, label = self._uniform(indices, 16)[:, :, None, None], indices % 10
        radius, right, up, hue = self._attributes(u, label[:, None, None])
        attributes = zip(
            (radius > 0.58).flatten().tolist(),
            self._nearest_color(hue),
            label.tolist(),
            self._nearest_color(u[:, 8]),
            self._nearest_color(u[:, 11]),
            (up > 0).flatten().tolist(),
            (right > 0).flatten().tolist(),
        )
        # What a caption mentions depends on the first four digits of the last random number in
        # base 8: the digit 0, one of eight, leaves out size, color, background or position.
        digits = torch.cat([torch.floor(u[:, 15, 0] * 8**i) % 8 for i in (1, 2, 3, 4)], 1)
        mentioned = (digits >= (0 if self.full else 1)).tolist()
        return [self._caption(*both) for both in zip(attributes, mentioned)]

    def _caption(self, attributes, mentioned):
        """Return one caption: the attributes of an image, and which of them to mention."""
        large, color, shape, ground, other_ground, top, right = attributes
        say_size, say_color, say_ground, say_position = mentioned
        words = ["a"]
        if say_size:
            words.append("large" if large else "small")
        if say_color:
            words.append(self.colors[color])
        words.append(self.shapes[shape])
        if say_ground:
            # Two equal colors are mentioned once.
            names = dict.fromkeys([self.colors[ground], self.colors[other_ground]])
            words += ["on", " and ".join(names)]
        text = " ".join(words)
        if say_position:
            text += f", {'top' if top else 'bottom'} {'right' if right else 'left'}"
        return text

    @staticmethod
    def _nearest_color(hue):
        """Return the index in `colors` of each hue (B, 1, 1), as a list."""
        return (6 * hue).round().long().remainder(6).flatten().tolist()

    def _attributes(self, u, label):
        """Return radius, center (right, up) and hue of the shapes, each (B, 1, 1)."""
        # Two groups of sizes, 0.48 to 0.56 and 0.62 to 0.70: "small" and "large".
        radius = torch.where(u[:, 0] < 0.5, 0.48, 0.62) + 0.08 * torch.remainder(2 * u[:, 0], 1)

        # Keep away from both axes, so that each shape is in one corner.
        def away(v):  # v in [-1, 1)
            return (0.9 - radius) * (0.6 * v.sign() + 0.4 * v)

        # The held-out color of a class is -label mod 6. The others are 1 to 5 steps further.
        step = 0 if self.held_out else torch.floor(5 * u[:, 4]) + 1
        color = (step - label) % 6
        # The hue varies around its color, but less than half of the way to the next color.
        hue = (color + 0.4 * (u[:, 5] - 0.5)) / 6
        return radius, away(2 * u[:, 2] - 1), away(2 * u[:, 3] - 1), hue


class CaptionedImages(ImageData):
    """Images from files, with the tokens of their captions as labels.

    paths, res, skip_bad: see ImageData. captions: see read_captions. text_encoder: "bytes", a T5,
    or an .npy with embeddings in the order of the images (by paths, then by names). tokens: the
    length of a text in tokens. device: where a T5 runs.
    If res is landscape, portrait images are rotated to the left, and their tokens end with a row of
    ones. One rank computes embeddings, once; the others wait. Raises ValueError.
    """

    def __init__(self, paths, res, skip_bad, captions, text_encoder, tokens, device, folder=None):
        super().__init__(paths, res, skip_bad, True, folder)
        self.classes = []
        self.rotate = self.size[0] < self.size[1]
        self.texts = StringArray(read_captions(self.reader, captions))
        if text_encoder == "bytes":
            warn_truncated(self.texts, byte_lengths, tokens)
            self.embeddings = None  # bytes are computed when an image is read
            length, dim = tokens, 0
        else:
            # A path may be a pattern: take the first of its files.
            first = expand(list_paths(paths)[:1])[0][0]
            self.embeddings = self._embeddings(first, text_encoder, tokens, device)
            length, dim = self.embeddings.shape[1:]
        self.net_fields = dict(text_tokens=length, text_dim=dim, portrait=self.rotate)

    def _embeddings(self, path, text_encoder, tokens, device):
        """Return the embeddings (N, length, dim): from an .npy, or of a T5, cached near path."""
        if text_encoder.endswith(".npy"):
            return open_embeddings(text_encoder, len(self))
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))

        def load():
            return make_encoder(text_encoder, tokens, device)

        return cache_embeddings(self.texts, load, f"{text_encoder} {tokens}", folder)

    def _labels(self, indices, portrait):
        """Return tokens (B, N) int64 or (B, N, D) float32, with one more row if self.rotate."""
        if self.embeddings is None:
            tokens = byte_tokens(self.captions(indices), self.net_fields["text_tokens"])
        else:
            tokens = self.embeddings[indices]
        return to_label(tokens, portrait if self.rotate else None)

    def sample_labels(self, n):
        """Return the tokens of n captions, for landscape images, as LazyLabels."""

        def make(indices):
            return self._labels(np.asarray(indices) % len(self), [False] * len(indices))

        return LazyLabels(n, make)

    def captions(self, indices):
        """Return the captions at these indices; they repeat after the last image."""
        return [self.texts[i % len(self)] for i in indices]

    def __str__(self):
        """Return the text of ImageData, and a checksum of the captions."""
        digest = hashlib.sha256(repr(list(self.texts)).encode()).hexdigest()[:8]
        return f"{super().__str__()} with captions ({digest})"


def check_text_options(config):
    """Raise ValueError for settings of texts that contradict each other or are out of range."""
    if config["text_tokens"] < 1:
        raise ValueError(f"--text-tokens is {config['text_tokens']}, but must be at least 1")
    if config["captions"] is None and config["text_encoder"] != "bytes":
        raise ValueError("--text-encoder needs --captions")


def open_captioned_dataset(config, device="cpu", folder=None):
    """Open the captioned dataset that the settings of a run name.

    The settings are `data`, `res`, `skip_bad`, `captions`, `text_encoder` and `text_tokens`.
    Without data, it is CaptionedShapes. folder: see open_source. Raises the errors of the classes.
    """
    if not config["data"]:
        if config["captions"] or config["text_encoder"] != "bytes":
            raise ValueError(
                "captions of the built-in shapes are read as bytes: "
                "--captions FILE and --text-encoder need --data"
            )
        return CaptionedShapes(config["res"], device, tokens=config["text_tokens"])
    return CaptionedImages(
        config["data"],
        config["res"],
        config["skip_bad"],
        config["captions"],
        config["text_encoder"],
        config["text_tokens"],
        device,
        folder,
    )


# ---------------------------------------------------------------- prompts


def read_prompts(args, config, device):
    """Read the prompts that sample.py asks for: --prompt, --prompts, --negative and --portrait.

    Returns (texts, labels, null_label): a list of all texts, or None if only embeddings are given;
    their labels, as LazyLabels; and the label (1, ...) for guidance, of --negative or of the empty
    text. Raises ValueError.
    """
    model_args = config["model_args"]
    length, dim = model_args.get("text_tokens", 0), model_args.get("text_dim", 0)
    portrait = model_args.get("portrait", 0)
    if args.negative and args.guidance == 1.0:
        raise ValueError("--negative takes a --guidance other than 1")
    if args.portrait and not portrait:
        raise ValueError(
            f"{args.checkpoint} was trained on images of one orientation: it takes no --portrait"
        )

    def label(tokens):
        return to_label(tokens, [args.portrait] * len(tokens) if portrait else None)

    # The empty text: zeros alone.
    null_label = label(np.zeros((1, length, dim) if dim else (1, length))).to(device)
    if args.prompts and args.prompts.endswith(".npy"):
        array = open_embeddings(args.prompts)
        if args.text_encoder:
            raise ValueError(f"--prompts {args.prompts} are embeddings: omit --text-encoder")
        if args.prompt or args.negative or array.shape[1:] != (length, dim):
            raise ValueError(
                f"--prompts {args.prompts} takes neither --prompt nor --negative, and "
                f"embeddings of {(length, dim)} each, as in training; these are {array.shape[1:]}"
            )

        def embedded(indices):
            return label(array[np.asarray(indices)])

        return None, LazyLabels(len(array), embedded), null_label

    texts = prompt_texts(args)
    encode = prompt_encoder(args, config, texts, device)
    if args.negative:
        null_label = label(encode([args.negative])).to(device)

    def encoded(indices):
        return label(encode([texts[i] for i in indices]))

    return texts, LazyLabels(len(texts), encoded), null_label


def prompt_texts(args):
    """Return the texts of --prompt, and those of the lines of the file --prompts."""
    texts = [text.strip() for text in args.prompt or []]
    if args.prompts:
        try:
            # Programs on Windows begin a file with a byte order mark, which -sig removes.
            with open(args.prompts, encoding="utf-8-sig") as file:
                texts += [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{args.prompts} is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
    if not texts:
        raise ValueError(f"{args.prompts} has no prompts")
    return texts


def prompt_encoder(args, config, texts, device):
    """Return the text encoder of a run, checked; warn if it truncates any of the texts."""
    name = config.get("text_encoder", "bytes")
    length, dim = config["model_args"]["text_tokens"], config["model_args"].get("text_dim", 0)
    # A checkpoint may not choose a model to load. The command line must name it.
    if name != "bytes" and not args.text_encoder:
        encoder = "of these embeddings" if name.endswith(".npy") else "of the run"
        raise ValueError(
            f"the texts of this run were encoded by {name}: name the encoder {encoder} with "
            "--text-encoder to load it, or pass embeddings with --prompts FILE.npy"
        )
    encode = make_encoder(args.text_encoder or name, length, device)
    shape = encode([""]).shape[2:]
    if shape != ((dim,) if dim else ()):
        raise ValueError(
            f"--text-encoder {args.text_encoder} is not the encoder of the run, {name}: "
            f"its embeddings are {tuple(shape)}, not {dim}"
        )
    warn_truncated(texts, byte_lengths if name == "bytes" else encode.lengths, length)
    return encode


# ---------------------------------------------------------------- the network


class CrossAttention(nn.Module):
    """Attention of image tokens to text tokens, with the normalization of self-attention.

    x: (B, T, channels). text: (B, N, text_channels). mask: (B, N), True for tokens to attend to.
    Returns (B, T, channels).
    """

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
        # Queries are from the image, keys and values from the text. The text is normalized already.
        q = self.q(self.norm(x)).unflatten(2, (self.num_heads, -1))  # (B, T, heads, dim)
        kv = self.kv(text).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.unbind(2)  # (B, N, heads, dim) each

        # Normalized queries and keys keep the attention logits small. Then softmax(q k^T) v.
        q, k = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2)
        h = attend(q, k, v.transpose(1, 2), mask)  # (B, heads, T, dim)

        # The output layer is zero at first: a new block ignores the text.
        return x + self.out(h.transpose(1, 2).flatten(2))


class Text(nn.Module):
    """The text encoder inside the network.

    text: embeddings (B, N, text_dim) of a frozen encoder, projected; or, if text_dim is 0, bytes
    plus 1, (B, length) int64, encoded by a small transformer that is trained jointly, with N =
    length / 4 tokens, rounded up. Rows of 0 are padding.

    Returns tokens (B, 1 + N, channels), normalized; mask (B, 1 + N), True for tokens that are not
    padding; and a summary (B, channels) of the text, 0 at first. Token 0 is learned, and it is the
    only token of the empty text.
    """

    def __init__(self, text_tokens, text_dim, channels):
        super().__init__()
        self.empty = nn.Parameter(torch.randn(channels))
        if text_dim:
            self.encode = nn.Linear(text_dim, channels)
        else:
            self.encode = nn.Embedding(257, channels)  # 256 bytes and padding
            self.five = nn.Embedding(4093, channels)  # hashes of five bytes
            self.position = nn.Parameter(0.1 * torch.randn((text_tokens + 3) // 4, channels))
            self.transformer = nn.ModuleList(self._layer(channels) for _ in range(2))
        self.norm = nn.LayerNorm(channels)
        self.weights = nn.Linear(channels, 4, bias=False)
        self.pooled = zero_init(nn.Linear(4 * channels, channels))

    @staticmethod
    def _layer(channels):
        return nn.TransformerEncoderLayer(
            channels, 4, 4 * channels, 0.0, F.gelu, batch_first=True, norm_first=True
        )

    def forward(self, text):
        frozen = text.is_floating_point()
        if frozen:
            tokens, mask = self.encode(text), text.any(2)
        else:
            tokens, mask = self._embed_bytes(text)

        # Prepend the learned token. The empty text has no other token to attend to.
        mask = F.pad(mask, (1, 0), value=True)  # (B, 1 + N)
        empty = self.empty.to(tokens.dtype).expand(len(text), 1, -1)
        tokens = torch.cat([empty, tokens], 1)  # (B, 1 + N, C)

        # A frozen encoder has its own transformer. Bytes need one.
        if not frozen:
            for layer in self.transformer:
                tokens = layer(tokens, src_key_padding_mask=~mask)
        tokens = self.norm(tokens)

        # The summary: four weighted means of the tokens, with learned weights. A plain mean would
        # lose a single word in a long text.
        scores = self.weights(tokens).masked_fill(~mask[:, :, None], -math.inf)
        weights = torch.softmax(scores, 1)  # (B, 1 + N, 4)
        means = weights.mT.to(tokens.dtype) @ tokens  # (B, 4, C)
        return tokens, mask, self.pooled(means.flatten(1))

    def _embed_bytes(self, text):
        """Return a token for every four bytes, (B, N, C), and which of them are not padding."""
        # Pad to a multiple of four at the end, and by four bytes in front for the first 5-grams.
        text = F.pad(text, (4, -text.shape[1] % 4))
        current = text[:, 4:]  # (B, 4 N)

        # Hash each byte and the four before it to one of 4093 embeddings, as fastText does
        # (arXiv 1607.04606). So a word is recognized at any position. The hash is a polynomial:
        # b[t] + 1009 b[t-1] + ... + 1009^4 b[t-4], modulo the prime 4093.
        five = sum(1009**i * text[:, 4 - i : text.shape[1] - i] for i in range(5)) % 4093

        # A byte is the sum of its own embedding and of the 5-gram; padding is 0.
        embeddings = (self.encode(current) + self.five(five)) * (current[:, :, None] != 0)

        # Four bytes are one token: a sequence four times shorter. Add its position.
        tokens = embeddings.unflatten(1, (-1, 4)).sum(2) + self.position  # (B, N, C)
        return tokens, current.unflatten(1, (-1, 4)).any(2)


class Conditioning(typing.NamedTuple):
    """What the blocks of a text-conditioned network receive instead of the embedding alone."""

    emb: torch.Tensor  # (B, emb_channels), for every FiLM
    tokens: torch.Tensor  # (B, 1 + N, emb_channels), for cross-attention
    mask: torch.Tensor  # (B, 1 + N), True for tokens that are not padding


class TextResBlock(ResBlock):
    """A ResBlock in a text-conditioned network. It uses the embedding only."""

    def forward(self, x, conditioning, skip=None):
        return super().forward(x, conditioning.emb, skip)


class TextTransformerBlock(TransformerBlock):
    """A transformer block followed by cross-attention to the text."""

    def __init__(self, channels, emb_channels, num_heads, dropout=0.0, skip=False):
        super().__init__(channels, emb_channels, num_heads, dropout, skip)
        self.cross = CrossAttention(channels, emb_channels, num_heads)

    def tokens_forward(self, x, conditioning, skip=None):
        h = super().tokens_forward(x, conditioning.emb, skip)
        return self.cross(h, conditioning.tokens, conditioning.mask)


class TextConditioning:
    """A mixin that turns UViT, or a subclass, into a network whose label is a text.

    It precedes that class in the list of bases. text_tokens: length of a text in tokens. text_dim:
    channels of its embeddings, 0 for bytes. portrait: True if the label ends with one more row,
    which is not 0 if the image was rotated. fields: the arguments of the U-ViT.
    """

    res_block = TextResBlock
    transformer_block = TextTransformerBlock

    def __init__(self, res, num_classes=0, text_tokens=64, text_dim=0, portrait=False, **fields):
        self.text_fields = (text_tokens, text_dim, portrait)
        super().__init__(res, num_classes, **fields)

    def add_embedding(self, num_classes, emb_channels):
        """Create the embeddings of logsnr and label, and the text encoder, before all blocks."""
        super().add_embedding(num_classes, emb_channels)
        text_tokens, text_dim, portrait = self.text_fields
        rows = text_tokens + portrait
        self.text_size = (rows, text_dim) if text_dim else (rows,)
        self.text = Text(text_tokens, text_dim, emb_channels)
        self.portrait = nn.Parameter(torch.zeros(emb_channels)) if portrait else None

    def embed(self, logsnr, label=None):
        """Return the Conditioning. logsnr: (B,). label: a text (see Text), or None if empty."""
        if label is None:
            dtype = self.text.encode.weight.dtype if len(self.text_size) > 1 else torch.int64
            label = torch.zeros(len(logsnr), *self.text_size, dtype=dtype, device=logsnr.device)
        if self.portrait is None:
            tokens, mask, pooled = self.text(label)
        else:
            # The last row says whether the image was rotated. If so, add a learned vector.
            tokens, mask, pooled = self.text(label[:, :-1])
            rotated = label[:, -1:].flatten(1).any(1, keepdim=True)
            pooled = pooled + rotated * self.portrait
        # The text acts twice: its summary by FiLM in every block, its tokens by cross-attention.
        return Conditioning(self.embedding(logsnr, None, pooled), tokens, mask)


class TextUViT(TextConditioning, UViT):
    """The U-ViT with a text as label."""


@functools.cache
def with_text(net_class):
    """Return the text-conditioned version of UViT, which is TextUViT, or of a subclass of UViT."""
    if net_class is UViT:
        return TextUViT
    return type(f"Text{net_class.__name__}", (TextConditioning, net_class), {})


# The text-to-image model of --size text, with the 4096 channels of T5-XXL.
CONFIGS = {
    "U-ViT text 256": dict(
        res=256,
        patching="dwt_1",
        num_classes=0,
        attn_resolutions=(32,),
        text_tokens=128,
        text_dim=4096,
    ),
}

if __name__ == "__main__":
    print_table(TextUViT, CONFIGS)
