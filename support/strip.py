"""A denoising strip: z_t and x_hat of a few samples, from pure noise to the image.

python sample.py runs/shapes-32 --strip --out strip.png
"""

import torch
from PIL import Image, ImageDraw, ImageFont

from sample import clip_x, sample, to_uint8
from schedule import x_from_v
from support.runtime import writing

COLUMNS = 9
TILE = 140  # smallest width of an image: the caption of a column needs it
LEFT, TOP = 156, 76  # room for the names of the rows, and for the captions of columns
DARK, BLUE = "#222222", "#0072B2"


def choose_steps(steps, columns=COLUMNS):
    """Return the numbers of the steps to show: evenly spaced, with the first and the last one."""
    numbers = torch.linspace(0, steps - 1, min(columns, steps), dtype=torch.float64)
    return numbers.round().long().tolist()


def record_steps(net, shape, schedule, *, steps=256, clip="static", **options):
    """Draw samples as sample() does, and record z_t and x_hat at the steps of a strip.

    Returns (samples (B, C, H, W), {step: (logsnr, z (B, C, H, W), x_hat (B, C, H, W))}).
    """
    chosen = choose_steps(steps)
    records = {}

    def observe(step, z, logsnr, v_hat):
        # A sampler may call the net several times per step. The first call is at z_t.
        if step in chosen and step not in records:
            x_hat = clip_x(x_from_v(z, v_hat, logsnr), clip)
            records[step] = (logsnr[0].item(), z, x_hat)

    options |= dict(steps=steps, clip=clip, observe=observe)
    return sample(net, shape, schedule, **options), records


def make_strip(records, names, steps=None):
    """Draw a denoising strip: z_t and x_hat of each sample, from pure noise to the image.

    records: see record_steps. names: one text per sample. steps: their number, if they are uniform
    in t: the columns then show t. Returns a PIL image.
    """
    n, _, height, width = records[0][1].shape
    scale = -(-TILE // width)
    across, down = width * scale + 8, height * scale + 8  # from one image to the next

    # A name that is too long for the left margin, such as a prompt, is a line above its sample.
    font = ImageFont.load_default(24)
    names = [" ".join(name.split()) for name in names]
    fits = max(font.getlength(name) for name in names) <= LEFT - 8
    line = 0 if fits else 40
    top, pair = TOP + line, 2 * down + 16 + line  # pair: height of one sample
    right = LEFT + len(records) * across - 8
    strip = Image.new("RGB", (right, TOP + n * pair - 24), "white")
    draw = ImageDraw.Draw(strip)

    for column, (step, (logsnr, z, x_hat)) in enumerate(records.items()):
        # The noise level is above the column.
        left = LEFT + column * across
        time = f"t = {1 - step / steps:.3f}" if steps else f"step {step}"
        draw.multiline_text((left, 4), f"{time}\nlogsnr {logsnr:z.1f}", DARK, font, spacing=8)

        # Two images per sample: the input of the network, and its estimate of the clean image.
        for i in range(n):
            for y, image in ((top + i * pair, z[i]), (top + i * pair + down, x_hat[i])):
                image = Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
                size = (width * scale, height * scale)
                strip.paste(image.resize(size, Image.Resampling.NEAREST), (left, y))

    # The names of the samples and of the rows, at the left.
    for i, name in enumerate(names):
        y = top + i * pair
        while font.getlength(name) > right - 8:
            name = name[:-4] + "..."
        draw.text((4, y - line), name, BLUE, font)
        for row, symbol in enumerate(("z_t", "x_hat")):
            draw.text((4, y + (row + 0.5) * down), symbol, DARK, font, anchor="lm")
    return strip


def draw_strip(plan, net, schedule):
    """Draw a denoising strip of the samples, and write it to --out. plan: see sample.py."""
    # Image k takes its label from its number, as in all outputs of sample.py.
    label = plan.labels[torch.tensor(plan.numbers) % len(plan.labels)]
    options = plan.options | dict(label=label.to(plan.options["device"]), numbers=plan.numbers)
    _, records = record_steps(net, (len(plan.numbers), *plan.size), schedule, **options)
    # Training rotates portrait images to the left. Rotate samples back to the right.
    if plan.args.portrait:
        records = {
            step: (logsnr, z.rot90(-1, (2, 3)), x_hat.rot90(-1, (2, 3)))
            for step, (logsnr, z, x_hat) in records.items()
        }
    # On other grids, t is not known from the number of the step.
    steps = plan.options["steps"] if plan.options["grid"] == "t" else None
    with writing(plan.args.out) as file:
        make_strip(records, plan.names(), steps).save(file, "PNG")
