"""The diffusion process of simple diffusion (Hoogeboom, Heek, Salimans 2023, arXiv 2301.11093).

Sec. 2 and Eq. 1-6: three noise schedules logsnr(t), alpha and sigma, the conversions between
(x, eps) and (z, v), and the posterior that the sampler uses. Needs only torch.

    python schedule.py            # logsnr of each schedule at 512 px; shifted:64: -4.159 at t = 0.5
    python schedule.py photo.jpg  # also writes noised.png: the photo under two schedules (Fig. 3)

Time t runs from 0 (data) to 1 (noise). A schedule is any decreasing function
t -> logsnr = log(alpha^2 / sigma^2), the logarithm of the signal-to-noise ratio (SNR).
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- noise schedules


def logsnr_schedule_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """The cosine schedule, truncated to [logsnr_min, logsnr_max] (Sec. 2 and appendix).

    t: number or tensor of any shape, in [0, 1]. Returns logsnr, a tensor of the same shape.
    """
    t = torch.as_tensor(t)
    # alpha = cos(angle) and sigma = sin(angle) give logsnr = -2 log tan(angle). Without truncation
    # the angle runs from 0 to pi / 2, where logsnr is infinite. The limits on logsnr restrict it to
    # [t_min, t_max].
    t_min = math.atan(math.exp(-0.5 * logsnr_max))
    t_max = math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_schedule_cosine_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    """Eq. 5: the cosine schedule of noise_d x noise_d images, shifted to image_d x image_d pixels.

    image_d, noise_d: sides in pixels. The rest is as in logsnr_schedule_cosine.
    """
    # Eq. 4: neighboring pixels of an image are nearly equal. Averaging s x s of them keeps the
    # signal, divides the variance of the noise by s^2, and so multiplies the SNR by s^2. An image
    # of image_d pixels therefore needs a logsnr lower by 2 log(image_d / noise_d) to be as noisy as
    # the reference after averaging.
    # The shift also moves the limits logsnr_min and logsnr_max, as in most implementations.
    return logsnr_schedule_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)


def logsnr_schedule_cosine_interpolated(
    t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0
):
    """Eq. 6: interpolate from the shift to noise_d_high (at t = 0) to noise_d_low (at t = 1).

    image_d, noise_d_low, noise_d_high: sides in pixels. The rest is as in logsnr_schedule_cosine.
    """
    low = logsnr_schedule_cosine_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    high = logsnr_schedule_cosine_shifted(t, image_d, noise_d_high, logsnr_min, logsnr_max)
    # Less noise near t = 0 keeps detail. More noise near t = 1 makes sampling robust to guidance.
    # Eq. 6 as printed swaps low and high, unlike the code in the paper's appendix. The printed form
    # narrows the range of noise levels, and it is not monotone if high / low > e^pi. The code does
    # what the text describes, so this function follows the code.
    return t * low + (1.0 - t) * high


def _parse_schedule(spec):
    """Split "kind:side:side@limit" into (kind, [side, ...], limit). Raises ValueError."""
    name, at, limit = spec.partition("@")
    kind, *sides = name.split(":")
    numbers = [*sides, limit] if at else sides

    positive = all(number.isdecimal() and int(number) > 0 for number in numbers)
    sides_needed = {"cosine": 0, "shifted": 1, "interpolated": 2}.get(kind)
    if not positive or len(sides) != sides_needed or (at and int(limit) > 20):
        raise ValueError(
            f"schedule {spec!r} is unknown: use cosine, shifted:D or interpolated:LOW:HIGH, "
            "optionally with @LIMIT up to 20 (for example shifted:64 or shifted:64@10)"
        )
    return kind, [int(side) for side in sides], float(limit) if at else 15.0


def make_schedule(spec, image_d):
    """Return the function t -> logsnr for "cosine", "shifted:64" or "interpolated:32:256".

    A suffix such as @10 sets logsnr_min = -10 and logsnr_max = 10 before the shift (at most 20).
    image_d: side of the image in pixels, the shorter one for a non-square image. Raises ValueError
    for an unknown spec and for a reference side larger than image_d.
    """
    kind, sides, limit = _parse_schedule(spec)
    # A reference side above image_d would remove noise. LOW > HIGH would be Eq. 6 as printed.
    if sides != sorted(sides) or any(side > image_d for side in sides):
        raise ValueError(
            f"schedule {spec!r} at {image_d} px needs LOW <= HIGH, "
            f"and no reference side above {image_d}"
        )
    limits = dict(logsnr_min=-limit, logsnr_max=limit)
    if kind == "cosine":
        return partial(logsnr_schedule_cosine, **limits)
    if kind == "shifted":
        return partial(logsnr_schedule_cosine_shifted, image_d=image_d, noise_d=sides[0], **limits)
    low, high = sides
    return partial(
        logsnr_schedule_cosine_interpolated,
        image_d=image_d,
        noise_d_low=low,
        noise_d_high=high,
        **limits,
    )


# ---------------------------------------------------------------- the forward process and v


def _expand(logsnr, like):
    """Reshape logsnr, (B,) or a scalar, to (B, 1, ..., 1), so that it broadcasts against like."""
    return logsnr.reshape(-1, *[1] * (like.ndim - 1))


def alpha_sigma(logsnr, like=None):
    """Return alpha and sigma, the scale of the signal and of the noise (Eq. 1).

    logsnr: (B,) or a scalar tensor. like: an optional tensor (B, ...) to broadcast against; both
    results are then (B, 1, ..., 1), and otherwise shaped like logsnr.
    """
    if like is not None:
        logsnr = _expand(logsnr, like)
    # Variance preserving: alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = exp(logsnr) together give
    # alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffuse(x, eps, logsnr):
    """Eq. 1: sample z_t = alpha x + sigma eps from q(z_t | x). x, eps: (B, ...); logsnr: (B,)."""
    alpha, sigma = alpha_sigma(logsnr, like=x)
    return alpha * x + sigma * eps


# The network predicts v = alpha eps - sigma x (Sec. 2). The pair (z, v) is a rotation of (x, eps)
# with cosine alpha and sine sigma. The inverse rotation recovers x and eps without a division.


def v_from_x_eps(x, eps, logsnr):
    """v = alpha eps - sigma x, the network's target. x, eps: (B, ...); logsnr: (B,)."""
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
    """Eq. 3: q(z_s | z_t, x) for s < t, the distribution of a reverse step for a known x.

    z, x: (B, ...); logsnr_t < logsnr_s: (B,). Returns the mean (B, ...) and two log-variances
    (B, 1, ..., 1): the variance of q(z_s | z_t, x), and the larger variance of q(z_t | z_s). The
    sampler interpolates between the two.
    """
    logsnr_t = _expand(logsnr_t, like=z)  # (B, 1, ..., 1)
    logsnr_s = _expand(logsnr_s, like=z)
    alpha_t, _ = alpha_sigma(logsnr_t)
    alpha_s, _ = alpha_sigma(logsnr_s)

    # Eq. 3 in terms of r = (alpha_t sigma_s / (alpha_s sigma_t))^2 = exp(logsnr_t - logsnr_s).
    # expm1 keeps 1 - r precise for small steps, where r is close to 1.
    log_r = logsnr_t - logsnr_s
    one_minus_r = -torch.expm1(log_r)
    mean = log_r.exp() * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x

    # The variance of q(z_s | z_t, x) is (1 - r) sigma_s^2, that of q(z_t | z_s) (1 - r) sigma_t^2.
    # Their logarithms use log sigma^2 = logsigmoid(-logsnr).
    log_one_minus_r = one_minus_r.log()
    log_var_min = log_one_minus_r + F.logsigmoid(-logsnr_s)
    log_var_max = log_one_minus_r + F.logsigmoid(-logsnr_t)
    return mean, log_var_min, log_var_max


# ---------------------------------------------------------------- the command: a table and Fig. 3


def draw_figure(photo, out="noised.png", image_d=256, noise_d=64):
    """Draw Fig. 3 of the paper for a photo: cosine and shifted noise, at full size and pooled.

    photo, out: file names. Writes a PNG with five columns, one per t. Needs pillow and numpy.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps

    # Crop the photo to a square and scale its pixels to [-1, 1].
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    image = ImageOps.fit(image, (image_d, image_d), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0  # (3, H, W)

    # Both schedules use the same noise, so that only the noise level differs.
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9])
    eps = torch.randn(len(t), *x.shape, generator=torch.Generator().manual_seed(0))
    # Two rows of tiles per schedule, each below 16 pixels of captions.
    factor = image_d // noise_d
    row_height = image_d + 16
    figure = Image.new("RGB", (image_d * len(t), row_height * 4), "white")
    draw = ImageDraw.Draw(figure)

    for i, spec in enumerate(("cosine", f"shifted:{noise_d}")):
        logsnr = make_schedule(spec, image_d)(t)
        z = diffuse(x.expand_as(eps), eps, logsnr)  # (5, 3, H, W)
        # Eq. 4: after pooling to noise_d pixels, the shifted schedule is as noisy as the cosine
        # schedule of images with noise_d pixels.
        pooled = F.interpolate(F.avg_pool2d(z, factor), scale_factor=factor)
        pooled_logsnr = logsnr + 2 * math.log(factor)
        tiles_of = (z, image_d, logsnr), (pooled, noise_d, pooled_logsnr)
        for j, (tiles, size, levels) in enumerate(tiles_of):
            top = row_height * (2 * i + j)
            # To uint8 with rounding, (5, H, W, 3), as sample.to_uint8 does.
            tiles = (127.5 * tiles + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            for k, tile in enumerate(tiles):
                figure.paste(Image.fromarray(tile), (image_d * k, top + 16))
                caption = f"{spec}, {size} px, t = {t[k]:g}, logsnr {levels[k].item():z.1f}"
                draw.text((image_d * k + 4, top + 2), caption, "black")
    figure.save(out)


def main():
    """Print the table of schedules. With a photo on the command line, also write noised.png."""
    times = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    print("logsnr at 512 px, t =" + "".join(f"{t:9g}" for t in times))
    for spec in ("cosine", "shifted:64", "shifted:32", "interpolated:32:256"):
        logsnrs = make_schedule(spec, 512)(times)
        print(f"{spec:21s}" + "".join(f"{logsnr:9.3f}" for logsnr in logsnrs))
    if len(sys.argv) > 1:
        try:
            draw_figure(sys.argv[1])
        except Exception as error:  # Pillow raises many kinds of errors for a broken photo
            sys.exit(f"{sys.argv[1]}: {error}")
        print("wrote noised.png")


if __name__ == "__main__":
    main()
