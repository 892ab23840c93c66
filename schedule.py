"""The diffusion process of simple diffusion (Hoogeboom, Heek, Salimans 2023, arXiv 2301.11093): Sec. 2 and Eq. 1-6.

Three noise schedules logsnr(t), the variance preserving alpha and sigma they stand for, the rotation between (x, eps)
and (z, v), and the posterior that the sampler steps through. Needs torch only; copy it into your own project.

    python schedule.py                # the logsnr of each schedule at 512 px: at t = 0.5 cosine 0, shifted:64 -4.159
    python schedule.py photo.jpg      # also noised.png: the photo under cosine and shifted noise, at full size and pooled

t runs from 0 (data) to 1 (noise). A schedule is any function t -> logsnr = log(alpha^2 / sigma^2) that falls in t.
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F


def logsnr_schedule_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """The cosine schedule, truncated so that t = 0 gives logsnr_max and t = 1 gives logsnr_min (Sec. 2 and appendix).

    t: number or tensor of any shape, in [0, 1]. Returns logsnr as a tensor of that shape.
    """
    t = torch.as_tensor(t)
    t_min, t_max = math.atan(math.exp(-0.5 * logsnr_max)), math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_schedule_cosine_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    """Eq. 5: the cosine schedule of a noise_d x noise_d picture, carried over to image_d x image_d pixels.

    Averaging s x s pixels multiplies their SNR by s^2 (Eq. 4), so a larger picture is noised by 2 log(image_d / noise_d)
    more to look as noisy from afar. The shift follows the truncation, whose limits move along (the paper leaves this open).
    """
    return logsnr_schedule_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)


def logsnr_schedule_cosine_interpolated(
    t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0
):
    """Eq. 6: from the shift to noise_d_high at t = 0 (keeps detail) to the shift to noise_d_low at t = 1 (tolerates guidance).

    Printed, Eq. 6 exchanges the two: t shift(high) + (1 - t) shift(low). That squeezes the noise levels together and no
    longer falls everywhere once high / low > e^pi. The appendix's code is what the text describes, and what stands here.
    """
    low = logsnr_schedule_cosine_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    high = logsnr_schedule_cosine_shifted(t, image_d, noise_d_high, logsnr_min, logsnr_max)
    return t * low + (1.0 - t) * high


def make_schedule(spec, image_d):
    """The function t -> logsnr that a command line names: "cosine", "shifted:64" or "interpolated:32:256".

    With @10 behind it, logsnr_min and logsnr_max are -10 and 10, before any shift; 20 is the largest such limit. image_d: the
    picture's side in pixels, the shorter one if it is not square. Raises ValueError for any other spec, and for a reference side
    above image_d, which would remove noise.
    """
    name, at, limit = spec.partition("@")
    kind, *sides = name.split(":")
    numbers = sides + [limit] if at else sides
    if (
        not all(n.isdecimal() and int(n) > 0 for n in numbers)
        or {"cosine": 0, "shifted": 1, "interpolated": 2}.get(kind) != len(sides)
        or int(limit or 0) > 20
    ):
        raise ValueError(
            f"schedule {spec!r} is none of cosine, shifted:D, interpolated:LOW:HIGH (for example shifted:64, or shifted:64@10)"
        )
    sides, limit = [int(s) for s in sides], float(limit or 15)
    limits = dict(logsnr_min=-limit, logsnr_max=limit)
    if sides != sorted(sides) or sides and sides[-1] > image_d:
        raise ValueError(
            f"schedule {spec!r} at {image_d} px: it takes LOW <= HIGH <= {image_d}, as a larger side would remove noise"
        )
    if kind == "cosine":
        return partial(logsnr_schedule_cosine, **limits)
    if kind == "shifted":
        return partial(logsnr_schedule_cosine_shifted, image_d=image_d, noise_d=sides[0], **limits)
    return partial(
        logsnr_schedule_cosine_interpolated,
        image_d=image_d,
        noise_d_low=sides[0],
        noise_d_high=sides[1],
        **limits,
    )


def alpha_sigma(logsnr, like=None):
    """alpha = sqrt(sigmoid(logsnr)) and sigma = sqrt(sigmoid(-logsnr)), so that alpha^2 + sigma^2 = 1 (Eq. 1).

    logsnr: (B,) or a scalar tensor. like: a tensor (B, ...) to broadcast against; then both are (B, 1, ..., 1).
    """
    if like is not None:
        logsnr = logsnr.reshape(-1, *[1] * (like.ndim - 1))
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffuse(x, eps, logsnr):
    """z = alpha x + sigma eps, a draw from q(z_t | x) (Eq. 1). x, eps: (B, ...); logsnr: (B,)."""
    alpha, sigma = alpha_sigma(logsnr, like=x)
    return alpha * x + sigma * eps


def v_from_x_eps(x, eps, logsnr):
    """v = alpha eps - sigma x, what the network predicts. (z, v) is (x, eps) rotated: no division either way."""
    alpha, sigma = alpha_sigma(logsnr, like=x)
    return alpha * eps - sigma * x


def x_from_v(z, v, logsnr):
    """x = alpha z - sigma v. z, v: (B, ...); logsnr: (B,)."""
    alpha, sigma = alpha_sigma(logsnr, like=z)
    return alpha * z - sigma * v


def eps_from_v(z, v, logsnr):
    """eps = sigma z + alpha v. z, v: (B, ...); logsnr: (B,)."""
    alpha, sigma = alpha_sigma(logsnr, like=z)
    return sigma * z + alpha * v


def posterior(z, x, logsnr_t, logsnr_s):
    """q(z_s | z_t, x) for s < t (Eq. 3): its mean, and the logarithms of its variance and of the largest sensible one.

    With r = (alpha_t sigma_s / alpha_s sigma_t)^2 = exp(logsnr_t - logsnr_s): mean = r (alpha_s / alpha_t) z + (1 - r) alpha_s x,
    variance (1 - r) sigma_s^2. The upper bound, (1 - r) sigma_t^2, is that of q(z_t | z_s).
    z, x: (B, ...); logsnr_t < logsnr_s: (B,). Returns mean (B, ...) and two (B, 1, ..., 1).
    """
    logsnr_t, logsnr_s = (l.reshape(-1, *[1] * (z.ndim - 1)) for l in (logsnr_t, logsnr_s))
    log_r = logsnr_t - logsnr_s
    one_minus_r = -torch.expm1(log_r)
    alpha_t, alpha_s = alpha_sigma(logsnr_t)[0], alpha_sigma(logsnr_s)[0]
    mean = log_r.exp() * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x
    return (
        mean,
        one_minus_r.log() + F.logsigmoid(-logsnr_s),
        one_minus_r.log() + F.logsigmoid(-logsnr_t),
    )


def draw_figure(photo, out="noised.png", image_d=256, noise_d=64):
    """Like the paper's Fig. 3: a photo noised by the cosine and the shifted schedule, at full size and average-pooled.

    photo, out: file names. Writes a PNG whose columns are five times t; needs pillow and numpy.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps

    picture = ImageOps.fit(
        ImageOps.exif_transpose(Image.open(photo)).convert("RGB"),
        (image_d, image_d),
        Image.Resampling.LANCZOS,
    )
    x = (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0
    )  # (3, image_d, image_d)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9])
    eps = torch.randn(len(t), *x.shape, generator=torch.Generator().manual_seed(0))
    figure = Image.new("RGB", (image_d * len(t), (image_d + 16) * 4), "white")
    for i, spec in enumerate(("cosine", f"shifted:{noise_d}")):
        logsnr = make_schedule(spec, image_d)(t)
        z = diffuse(x.expand_as(eps), eps, logsnr)
        pooled = F.interpolate(F.avg_pool2d(z, image_d // noise_d), scale_factor=image_d // noise_d)
        for j, (rows, size) in enumerate(((z, image_d), (pooled, noise_d))):
            top = (image_d + 16) * (2 * i + j)
            for k, tile in enumerate(rows):
                tile = (
                    (127.5 * tile + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
                )  # as sample.to_uint8
                figure.paste(Image.fromarray(tile), (image_d * k, top + 16))
                label = f"{spec}, {size} px, t = {t[k]:g}, logsnr {logsnr[k]:.1f}"
                ImageDraw.Draw(figure).text((image_d * k + 4, top + 2), label, "black")
    figure.save(out)


if __name__ == "__main__":
    times = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    print("logsnr at 512 px, t =" + "".join(f"{t:9g}" for t in times))
    for spec in ("cosine", "shifted:64", "shifted:32", "interpolated:32:256"):
        print(
            f"{spec:21s}" + "".join(f"{logsnr:9.3f}" for logsnr in make_schedule(spec, 512)(times))
        )
    if len(sys.argv) > 1:
        try:
            draw_figure(sys.argv[1])
        except Exception as error:  # whatever a broken photo makes of Pillow
            sys.exit(f"{sys.argv[1]}: {error}")
        print("wrote noised.png")
