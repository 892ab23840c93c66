"""Text to image: the captions of pictures, and the tokens that the net is given instead of a label (see uvit.Text).

The paper takes the token embeddings of a frozen T5-XXL. Here any T5 of the transformers library will do, or embeddings that were
computed elsewhere, or no encoder at all: the bytes of a text, for which the net trains a small transformer of its own.

    python train.py --res 32 --captions --out runs/text                            # built-in shapes and their captions, by bytes
    python train.py --res 64 --data photos/ --captions --text-encoder google-t5/t5-small    # photos/a.jpg and photos/a.txt
    python sample.py runs/text --prompt "a small red star on blue, top left" --guidance 2 --out grid.png
"""

import collections
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import time
import zipfile

import numpy as np
import torch

from fid import is_hidden


def byte_tokens(texts, length):
    """The UTF-8 bytes of texts, each + 1, cut or padded with 0 to `length`: (len(texts), length) int64."""
    tokens = np.zeros((len(texts), length), np.int64)
    for row, text in zip(tokens, texts):
        values = np.frombuffer(text.encode(), np.uint8)[:length]
        row[: len(values)] = values.astype(np.int64) + 1
    return tokens


class Asked:
    """n labels that are made when they are asked for, as embeddings of all would not fit into memory: len(), and [indices] -> make(indices)."""

    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        return self.make(indices)


def as_label(tokens, upright=None):
    """Tokens, an array (B, N) or (B, N, D), as the net takes them; upright: (B,), for a net with `portrait`, which gets them as a last row of ones or zeros."""
    tokens = torch.from_numpy(np.array(tokens, np.float32 if tokens.ndim == 3 else np.int64))
    if upright is None:
        return tokens
    return torch.cat(
        [
            tokens,
            torch.as_tensor(upright)
            .reshape(-1, *[1] * (tokens.ndim - 1))
            .to(tokens.dtype)
            .expand_as(tokens[:, :1]),
        ],
        1,
    )


def read_prompts(args, config, device):
    """What sample.py's --n, --prompt, --prompts, --negative and --portrait ask for: n texts, None where only embeddings are given; n labels; that of --negative, or the empty text's."""
    if args.negative and args.guidance == 1.0:
        raise ValueError("--negative takes a --guidance other than 1")
    texts, name = list(args.prompt or []), config.get("text_encoder", "bytes")
    length, dim, portrait = (
        config["model_args"].get(key, 0) for key in ("text_tokens", "text_dim", "portrait")
    )
    if args.portrait and not portrait:
        raise ValueError(
            f"{args.checkpoint} was trained on pictures of one format: it takes no --portrait"
        )
    label = lambda tokens: as_label(tokens, [args.portrait] * len(tokens) if portrait else None)
    nothing = label(np.zeros((1, length, dim) if dim else (1, length))).to(device)
    if args.prompts and args.prompts.endswith(".npy"):
        array = stored(args.prompts)
        if texts or args.negative or array.shape[1:] != (length, dim):
            raise ValueError(
                f"--prompts {args.prompts} takes neither --prompt nor --negative, and embeddings of {(length, dim)} each, as in training; these are {array.shape[1:]}"
            )
        return (
            None,
            Asked(
                args.n or len(array), lambda indices: label(array[np.asarray(indices) % len(array)])
            ),
            nothing,
        )
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as file:
                texts += [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{args.prompts} is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
    if not texts:
        raise ValueError(f"{args.prompts} has no prompts")
    if name != "bytes" and not args.text_encoder:
        raise ValueError(
            f"the texts of this run were encoded by {name}: repeat --text-encoder to load it, or give --prompts as .npy"
        )
    encode = encoder(args.text_encoder or name, length, device)
    if encode([""]).shape[2:] != ((dim,) if dim else ()):
        raise ValueError(
            f"--text-encoder {args.text_encoder} is not that of the run, {name}: its embeddings are {tuple(encode(['']).shape[2:])}, not {dim}"
        )
    tell_cut(texts, byte_lengths if name == "bytes" else encode.lengths, length)
    texts = list(itertools.islice(itertools.cycle(texts), args.n or len(texts)))
    negative = label(encode([args.negative])).to(device) if args.negative else nothing
    return (
        texts,
        Asked(len(texts), lambda indices: label(encode([texts[i] for i in indices]))),
        negative,
    )


def encoder(name, length, device="cpu"):
    """texts -> their tokens: (B, length) by byte_tokens for "bytes", else (B, length, dim) by a T5."""
    return (
        functools.partial(byte_tokens, length=length)
        if name == "bytes"
        else T5(name, length, device)
    )


def read_captions(pictures, path=None):
    """The text of each of fid.Pictures. path: None for name.txt beside name.jpg, or a .jsonl of {"file": ..., "text": ...}.

    In a .jsonl a file is named by the end of its path: a.jpg, or cats/a.jpg if there are two of them. Raises ValueError, naming the
    first, for pictures without a caption, captions without a picture, and what is empty or not UTF-8.
    """
    if any(isinstance(where, np.ndarray) for where, _ in pictures.sources):
        raise ValueError(
            "captions are of pictures in folders or zip files: those of npz and npy files have no names"
        )
    names = [os.path.join(where or "", name) for where, name in pictures.sources]
    texts = listed_captions(names, path) if path else captions_beside(pictures.sources, names)
    for name, text in zip(names, texts):
        if text is None:
            raise ValueError(
                f"{name} has no caption: {sum(text is None for text in texts)} of {len(texts)} pictures have none"
            )
        if not text.strip():
            raise ValueError(f"the caption of {name} is empty")
    return [text.strip() for text in texts]


def captions_beside(sources, names):
    """The texts that lie beside pictures (see fid.Pictures.sources) of these names, None where there is none."""
    found, stems = {}, [os.path.splitext(name)[0] for name in names]
    for where, folder in dict.fromkeys(
        (where, None if where else os.path.dirname(name)) for where, name in sources
    ):
        with zipfile.ZipFile(where) if where else contextlib.nullcontext() as archive:
            for file in sorted(archive.namelist() if archive else os.listdir(folder)):
                name = os.path.join(where or folder, file)
                if not file.endswith(".txt") or any(map(is_hidden, file.split("/"))):
                    continue
                try:
                    with archive.open(file) if archive else open(name, "rb") as text:
                        found[os.path.splitext(name)[0]] = text.read().decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{name} is not UTF-8 ({error.reason} at byte {error.start})"
                    ) from error
                except Exception as error:  # whatever a broken archive makes of the reader
                    raise ValueError(
                        f"cannot read {name}: {str(error) or type(error).__name__}"
                    ) from error
    for stem in sorted(found.keys() - set(stems)):
        raise ValueError(f"{stem}.txt is a caption without a picture")
    return [found.get(stem) for stem in stems]


def listed_captions(names, path):
    """The texts that a .jsonl has for files of these names, None where it has none."""
    names = ["/" + name.replace(os.sep, "/").lstrip("/") for name in names]
    numbers, texts = collections.defaultdict(list), [None] * len(names)
    for i, name in enumerate(names):
        numbers[os.path.basename(name)].append(i)
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                entry = json.loads(line.decode("utf-8-sig"))
                file_name, text = entry["file"], entry["text"]
                if not isinstance(file_name, str) or not isinstance(text, str):
                    raise TypeError("both are texts")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {n}: not {{"file": ..., "text": ...}} in UTF-8 ({error})'
                ) from error
            ends = [
                i
                for i in numbers[os.path.basename(file_name)]
                if names[i].endswith("/" + file_name.lstrip("/"))
            ]
            if len(ends) != 1:
                raise ValueError(
                    f"{path}, line {n}: {file_name} is the end of {'several' if ends else 'none'} of the pictures' paths"
                )
            if texts[ends[0]] is not None:
                raise ValueError(
                    f"{path}, line {n}: {file_name} has had a caption before: a picture has one"
                )
            texts[ends[0]] = text
    return texts


class T5:
    """A frozen T5 encoder, by its name or folder: texts -> (len(texts), length, dim) float16, rows of 0 behind each text's end. Raises ValueError."""

    def __init__(self, name, length, device="cpu"):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ValueError(f"--text-encoder {name} needs: pip install transformers") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model, found = T5EncoderModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # whatever a missing or broken folder makes of the library
            raise ValueError(
                f"--text-encoder {name} is neither bytes, an .npy file nor a T5 ({(str(error).splitlines() or [type(error).__name__])[0]})"
            ) from error
        if (
            found["missing_keys"] or found["mismatched_keys"]
        ):  # the library would go on, with random weights
            raise ValueError(
                f"--text-encoder {name} is no T5: it has no {sorted(map(str, found['missing_keys'] or found['mismatched_keys']))[0]}"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.length, self.device, self.dim = length, device, self.model.config.d_model

    @torch.no_grad()
    def __call__(self, texts):
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
        """The number of tokens of each text."""
        return [len(tokens) for tokens in self.tokenizer(texts).input_ids]


def store(texts, load, name, folder):
    """The embeddings of all texts, (len(texts), length, dim) float16, memory mapped from a file in the folder that is written once.

    load: a function that returns the encoder; name: what tells it from others. The first rank of each machine that finds none writes, from
    where an earlier end has left it.
    """
    digest = hashlib.sha256("\0".join([name, *texts]).encode()).hexdigest()[:8]
    path = os.path.join(folder, f"captions-{digest}.npy")
    if not os.path.isfile(path) and os.environ.get("LOCAL_RANK", "0") == "0":
        encoder, header = load(), io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            dict(descr="<f2", fortran_order=False, shape=(len(texts), encoder.length, encoder.dim)),
        )
        with open(f"{path}.part", "ab") as file:
            with contextlib.suppress(ImportError, OSError):  # Windows, and a disk without locks
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX)  # waits for another one that does the same
            if not os.path.isfile(path):
                done = max(
                    0,
                    (file.seek(0, 2) - len(header.getvalue())) // (2 * encoder.length * encoder.dim)
                    - 64,
                )  # the last may not have reached the disk
                file.truncate(
                    len(header.getvalue()) + done * 2 * encoder.length * encoder.dim if done else 0
                )
                file.write(b"" if done else header.getvalue())
                for i in range(done, len(texts), 64):
                    file.write(encoder(texts[i : i + 64]).tobytes())
                    print(
                        f"\r{min(i + 64, len(texts))} of {len(texts)} captions encoded ",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
                file.flush()
                os.fsync(file.fileno())
                os.replace(f"{path}.part", path)
                print(f"\nwrote {path}", flush=True)
                tell_cut(texts, encoder.lengths, encoder.length)
    while not os.path.isfile(path):
        time.sleep(1)  # a barrier would give up after some minutes
    return np.load(path, mmap_mode="r")


def tell_cut(texts, lengths, length):
    """Says on rank 0 how many texts are longer than `length` tokens, by lengths(texts), and so are cut."""
    cut = (
        0
        if os.environ.get("RANK", "0") != "0"
        else sum(
            n > length for i in range(0, len(texts), 1024) for n in lengths(texts[i : i + 1024])
        )
    )
    if cut:
        print(
            f"{cut} of {len(texts)} texts are longer than {length} tokens, and are cut: see --text-tokens",
            flush=True,
        )


def byte_lengths(texts):
    """The number of UTF-8 bytes of each text."""
    return [len(text.encode()) for text in texts]


def stored(path, count=None):
    """Embeddings (count, length, dim) of an .npy file that another program wrote, memory mapped; count: if it must be that. Raises ValueError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 3
        or not array.size
        or len(array) != (count or len(array))
        or array.dtype not in (np.float16, np.float32)
    ):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(
            f"{path}: it must hold float16 or float32 ({count or 'number'}, length, dim), not {what}"
        )
    return array
