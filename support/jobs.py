"""Sampling as a job: a folder of images that sample.py continues, and that it packs into one file.

The folder holds 000000.png, 000001.png, ... and job.json. The noise and the label of an image
follow from the settings and its number, so missing images can be drawn at any time, by any number
of processes. job.json states the settings. A command with other settings is refused.

Nothing is locked. Each file is written under a temporary name, then renamed. So a killed process
leaves whole images, and several machines may draw different images of one folder at the same time.
"""

import hashlib
import json
import os
import re
import shlex
import socket
import zipfile

import numpy as np
import torch
from PIL import Image

from fid import cpu_cores, decode, is_hidden, one_line, read_ahead
from sample import wants_bf16
from support.checkpoint import has_types, load_model
from support.data import write_array, write_images
from support.runtime import writing
from support.settings import flag
from support.sources import short

JOB = "job.json"

# What job.json holds besides the settings. A command may differ in these: where the samples are
# from, how they were drawn first, and the range of numbers over all commands.
RECORDS = dict(command=str, first=int, n=int)

# ---------------------------------------------------------------- the images of a folder

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk: length 0, name, checksum


def image_path(folder, number):
    """Return the path of the image with this number."""
    return os.path.join(folder, f"{number:06d}.png")


def is_complete(path):
    """True for a PNG with its first and last bytes.

    After a crash of the machine, a file can be empty, truncated or filled with zeros. Decoding
    would find more faults, but takes a thousand times as long.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and file.read() == PNG_END
    except OSError:  # missing, or shorter than the last chunk
        return False


def missing_images(folder, numbers):
    """Return the numbers of the images that are missing or incomplete, as a list."""
    return [number for number in numbers if not is_complete(image_path(folder, number))]


def write_folder(rounds, folder):
    """Write each sample to a file, named by its number, as soon as it is drawn.

    rounds: see sample_batches. Raises OSError.
    """
    for numbers, images in rounds:
        for number, image in zip(numbers, images.numpy()):
            path = image_path(folder, number)
            try:
                with writing(path) as file:
                    Image.fromarray(image).save(file, "PNG")
            except OSError:
                # Another process may draw the same image, and may have renamed it first.
                if not is_complete(path):
                    raise


# ---------------------------------------------------------------- the settings of a job


def given_options(args, parser):
    """Return the options that differ from their defaults, as a dict."""
    return {name: x for name, x in vars(args).items() if x != parser.get_default(name)}


def command_line(given):
    """Return the command with these options, except those that say which images, and where to."""
    words = ["python", "sample.py", given["checkpoint"]]
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif name not in ("checkpoint", "first", "n", "out"):
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def weights_checksum(net):
    """Return a checksum of all weights and their names, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        # Bytes of any type, also of bfloat16, which numpy lacks.
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()[:16]


def label_settings(texts, labels, classes):
    """Return the settings that identify the labels: class numbers, prompts, or embeddings."""
    if torch.is_tensor(labels):
        return dict(labels=labels.tolist() if classes else None)
    if texts:
        return dict(prompts=texts)
    # Embeddings may be large: a checksum of their number and of about a thousand.
    digest = hashlib.sha256()
    for i in range(0, len(labels), 1 + len(labels) // 1000):
        digest.update(labels[[i]].numpy().tobytes())
    return dict(embeddings=f"{len(labels)} ({digest.hexdigest()[:16]})")


def job_settings(plan, path, net):
    """Return every setting that changes an image, as JSON values. path: the checkpoint.

    Neither the batch size nor the number of ranks changes an image beyond rounding.
    """
    args, config = plan.args, plan.config
    options = dict(plan.options)
    for name in ("device", "null_label"):
        del options[name]
    settings = dict(
        # Which network. Retraining can give other weights at the same step.
        step=load_model(path)["step"],
        weights=weights_checksum(net),
        model=config["model"],
        res=config["res"],
        schedule=config["schedule"],
        # Which samples of it.
        **label_settings(plan.texts, plan.labels, config["classes"]),
        negative=args.negative,
        text_encoder=args.text_encoder,
        portrait=args.portrait,
        **options,
        # The precision, and the kind of device: each kind has a random generator of its own.
        bf16=wants_bf16(args, config),
        device=plan.options["device"].type,
    )
    return json.loads(json.dumps(settings))  # tuples become lists


# ---------------------------------------------------------------- job.json


def is_job(folder):
    """True for a folder of samples that sample.py has written."""
    return os.path.isfile(os.path.join(folder, JOB))


def check_folder(folder):
    """Raise ValueError if a folder holds files, and no job.json that says what they are.

    fid.py would measure other images in the folder together with the new ones.
    """
    # A process that was killed at its start may have left a part of job.json.
    # Hidden files are no images.
    names = [
        name
        for name in os.listdir(folder)
        if not name.startswith(f"{JOB}.") and not is_hidden(name)
    ]
    # List first: a process that is just starting writes job.json before its first image.
    if names and not is_job(folder):
        raise ValueError(
            f"--out {folder} is not empty, and has no {JOB}: choose another folder, or empty it"
        )


def read_job(folder):
    """Read job.json. Raises ValueError if sample.py did not write it."""
    path = os.path.join(folder, JOB)
    try:
        with open(path, encoding="utf-8") as file:
            job = json.load(file)
        if not has_types(job, RECORDS):
            raise ValueError(f"it has no {', '.join(RECORDS)}")
    except ValueError as error:  # also invalid JSON or UTF-8
        raise ValueError(
            f"{path} is not from sample.py ({one_line(error)}): choose another folder"
        ) from error
    return job


def write_job(folder, job, replace):
    """Write job.json. Without replace, an existing one is kept, even if it was just written."""
    path = os.path.join(folder, JOB)
    # No other process writes to a file of this name.
    part = f"{path}.{socket.gethostname()}.{os.getpid()}"
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in job.items()]
    with writing(part) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
        file.flush()
        os.fsync(file.fileno())  # without this file, the images could not be continued
    if not replace:
        # Linking fails if the file exists. Renaming would replace it.
        try:
            os.link(part, path)
        except OSError:
            replace = not os.path.exists(path)  # this file system has no links
    if replace:
        os.replace(part, path)
    else:
        os.remove(part)


def compare_job(folder, job, settings):
    """Raise ValueError if the folder holds another job. It names the first setting that differs.

    job: see read_job. settings: see job_settings.
    """
    stored = {key: value for key, value in job.items() if key not in RECORDS}
    for key in settings | stored:
        if key not in stored or key not in settings or stored[key] != settings[key]:
            raise ValueError(
                f"{folder} holds another job: its {key} is {short(stored.get(key))}, not "
                f"{short(settings.get(key))}. Choose another --out. Its command was: "
                f"{job['command']}"
            )


def open_job(plan, path, net, given):
    """Create or continue the job in the folder --out. Returns the numbers of the missing images.

    plan: see sample.py. path: of the checkpoint. net: its network. given: see given_options.
    Raises ValueError if the folder holds another job.
    """
    folder, numbers = plan.args.out, plan.numbers
    settings = job_settings(plan, path, net)
    check_folder(folder)
    if not is_job(folder):
        records = dict(command=command_line(given), first=numbers[0], n=len(numbers))
        write_job(folder, records | settings, replace=False)
    # It may be that of another process that began at the same time.
    job = read_job(folder)
    compare_job(folder, job, settings)

    # Record the range of all commands, so that packing knows how many images there should be.
    first = min(job["first"], numbers[0])
    end = max(job["first"] + job["n"], numbers[-1] + 1)
    if (first, end - first) != (job["first"], job["n"]):
        write_job(folder, job | dict(first=first, n=end - first), replace=True)

    missing = missing_images(folder, numbers)
    print(
        f"{folder}: {len(numbers) - len(missing):,} of {len(numbers):,} images are there, "
        f"{len(missing):,} are missing",
        flush=True,
    )
    return missing


# ---------------------------------------------------------------- packing


def label_arrays(numbers, labels=None, prompts=None):
    """Return the labels y or the prompts of the images with these numbers, as a dict of one array.

    labels, prompts: one cycle of them, or None. Without both, the dict is empty.
    """
    if prompts:
        return dict(prompts=np.array([prompts[k % len(prompts)] for k in numbers]))
    if labels is None:
        return {}
    return dict(y=np.asarray(labels)[np.asarray(numbers) % len(labels)])


def choose_range(folder, job, n, first):
    """Return the range of numbers to pack: n from `first` on. By default, those of all commands.

    Raises ValueError if one of them is missing.
    """
    # job.json records the range of all commands. Two commands that start at the same moment may
    # overwrite each other's record, so the images in the folder count, too.
    numbers = [int(name[:-4]) for name in os.listdir(folder) if re.fullmatch(r"\d{6,}\.png", name)]
    end = max([job["first"] + job["n"], *(number + 1 for number in numbers)])
    first = min([job["first"], *numbers]) if first is None else first
    n = max(0, end - first) if n is None else n
    if first < 0 or n < 1:
        raise ValueError(f"{folder} has no such images: choose others with --first and --n")
    missing = missing_images(folder, range(first, first + n))
    if missing:
        begin = f" --first {first}" if first else ""
        raise ValueError(
            f"{folder}: {len(missing):,} of {n:,} images are missing or incomplete. This command "
            f"draws them: {job['command']}{begin} --n {n} --out {shlex.quote(folder)}"
        )
    return range(first, first + n)


def pack_folder(checkpoint, out=None, n=None, first=None, **others):
    """Write the images of a job into an .npz, with the arrays of sample.py --out samples.npz.

    checkpoint: the folder. out, n, first: options of sample.py. Raises ValueError for others, and
    if an image is missing.
    """
    folder = os.path.join(checkpoint, "")
    if others:
        option = flag(next(iter(others)))
        raise ValueError(f"{folder} holds samples that are drawn already: omit {option}")
    if not (out or "").endswith(".npz"):
        raise ValueError(f"{folder} is a folder of samples: pack it with --out samples.npz")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{folder} is packed by one process: omit torchrun")
    job = read_job(folder)
    numbers = choose_range(folder, job, n, first)

    def read(part):
        """Decode the images with these numbers."""
        images = [read_image(image_path(folder, number)) for number in part]
        for number, image in zip(part, images):
            if image.shape != shape:
                path = image_path(folder, number)
                raise ValueError(f"{path} has the shape {image.shape}, and others have {shape}")
        return np.stack(images)

    # The images pass through memory in parts of 64, as many as there are threads.
    shape = read_image(image_path(folder, numbers[0])).shape
    workers = cpu_cores()
    parts = [numbers[i : i + 64] for i in range(0, len(numbers), 64)]
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with writing(out) as file, zipfile.ZipFile(file, "w") as archive:
        images = read_ahead(read, parts, workers, progress=True)
        write_images(archive, "arr_0", (len(numbers), *shape), images)
        arrays = label_arrays(numbers, job.get("labels"), job.get("prompts"))
        for name, array in arrays.items():
            write_array(archive, name, array)
    print(f"wrote {len(numbers)} images to {out}")


def read_image(path):
    """Decode an image (H, W, 3) uint8. Raises ValueError, with its path, if it is damaged."""
    try:
        return decode(path)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"cannot read {path} ({one_line(error)}): delete it, and draw it again with the "
            f"command in {JOB}"
        ) from error
