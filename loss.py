"""The losses of simple diffusion (Sec. 2, multiscale: Eq. 7-8) and its likelihood bound.

    loss, logsnr = diffusion_loss(net, x, schedule, label)     # both (B,); loss.mean().backward()
    bits = elbo_bpd(net, x, schedule, label)                   # (B,), bits per dimension

A net is any function v_hat = net(z, logsnr, label). At a given z, v = alpha eps - sigma x implies

    eps - eps_hat = alpha (v - v_hat)      and      x - x_hat = -sigma (v - v_hat).

Each loss is therefore a rescaled v loss: the eps loss is sigmoid(logsnr) = alpha^2 times it.
"""

import math

import torch
import torch.nn.functional as F

from schedule import alpha_sigma, diffuse, v_from_x_eps


def multiscale_mean_squares(error):
    """Eq. 7-8: the multiscale loss of each image. error: (B, C, H, W). Returns (B,).

    Raises ValueError for images below 32 pixels and for sides that cannot be pooled evenly.
    """
    height, width = error.shape[2:]
    # Eq. 8 sums (1 / s) L^s over the sizes s = 32, 64, ..., d. Here the sum is multiplied by the
    # constant d. The weights d / s then equal the pooling factors, and the finest term is the plain
    # loss. For a non-square image, s and d are the shorter side (our choice).
    total = 0.0
    factor = 1
    while min(height, width) >= 32 * factor:
        if height % factor or width % factor:
            raise ValueError(
                f"the multiscale loss needs sides divisible by {factor}, not {(height, width)}"
            )
        # Eq. 7: L^s is the mean square of the error after average pooling to s x s pixels.
        # Pooling is linear, so the pooled error is the error of the pooled images.
        pooled = F.avg_pool2d(error, factor)  # (B, C, H / factor, W / factor)
        total = total + factor * pooled.square().mean((1, 2, 3))
        factor *= 2
    if factor == 1:
        raise ValueError(
            f"the multiscale loss needs at least 32 pixels a side, not {(height, width)}"
        )
    return total


def mean_squares(error, multiscale=False):
    """The mean of error^2 over each image, or the multiscale loss. (B, C, H, W) -> (B,)."""
    if multiscale:
        return multiscale_mean_squares(error)
    return error.square().mean((1, 2, 3))


def diffusion_loss(
    net, x, schedule, label=None, *, space="eps", multiscale=False, t=None, eps=None
):
    """The unweighted training loss: the mean of (eps - eps_hat)^2, or of (v - v_hat)^2.

    x: (B, C, H, W) in [-1, 1], float32 or float64. label: passed to the net. space: "eps" or "v".
    t: (B,) in [0, 1], uniform by default. eps: shaped like x, standard normal by default. Returns
    the loss of each image, in the dtype of x, and its logsnr, both (B,). Raises ValueError for
    another space.
    """
    if space not in ("eps", "v"):
        raise ValueError(f"space {space!r} is neither eps nor v")

    # Sec. 2: draw a noise level for each image, and add noise to the image accordingly.
    if t is None:
        t = torch.rand(len(x), device=x.device)
    if eps is None:
        eps = torch.randn_like(x)
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)

    # The network predicts v. Under autocast v_hat may be bfloat16, but the loss has x's dtype.
    v_hat = net(z, logsnr, label)
    error = v_from_x_eps(x, eps, logsnr) - v_hat.to(x.dtype)

    # eps - eps_hat = alpha (v - v_hat). Computing eps_hat and subtracting it would lose precision
    # at high noise, where eps and eps_hat are nearly equal.
    if space == "eps":
        alpha, _ = alpha_sigma(logsnr, like=x)
        error = alpha * error
    return mean_squares(error, multiscale), logsnr


def _prior_nats(x, logsnr_min):
    """KL(q(z_1 | x) || N(0, 1)) in nats, summed over each image. Returns (B,)."""
    # Per dimension, the KL divergence is (alpha^2 x^2 + sigma^2 - 1 - log sigma^2) / 2.
    # Here sigma^2 - 1 = -alpha^2 and log sigma^2 = logsigmoid(-logsnr).
    alpha, _ = alpha_sigma(logsnr_min)
    kl = 0.5 * (alpha.item() ** 2 * (x.square() - 1) - F.logsigmoid(-logsnr_min))
    return kl.flatten(1).sum(1)


def _log_likelihood(x, logsnr_max, pixels):
    """log p(x | z_0) in nats for one sample z_0 of q(z_0 | x), summed over each image: (B,)."""
    eps = torch.randn_like(x)
    z_0 = diffuse(x, eps, logsnr_max)
    alpha, sigma = alpha_sigma(logsnr_max)
    if pixels == "gaussian":
        # The density of x under N(z_0 / alpha, sigma^2 / alpha^2). Its exponent is -eps^2 / 2.
        log_p = -0.5 * eps.square() - torch.log(sigma / alpha) - 0.5 * math.log(2 * math.pi)
    else:
        # A softmax over the 256 pixel levels with logits -(z_0 - alpha level)^2 / (2 sigma^2).
        # The logit of the true level is -eps^2 / 2. The loop over levels saves memory: all logits
        # at once take 256 times the memory of the images.
        log_sum = torch.full_like(x, -math.inf)
        for level in range(256):
            logit = -0.5 * ((z_0 - alpha * (level / 127.5 - 1)) / sigma).square()
            log_sum = torch.logaddexp(log_sum, logit)
        log_p = -0.5 * eps.square() - log_sum
    return log_p.flatten(1).sum(1)


@torch.no_grad()
def elbo_bpd(net, x, schedule, label=None, *, draws=16, pixels="uint8"):
    """The variational bound on -log2 p(x) per dimension (Sec. 2; VDM, arXiv 2107.00630).

    net: in eval mode. x: (B, C, H, W) in [-1, 1]. draws: evaluations of the net per image.
    pixels: "uint8" for 8-bit pixels x = level / 127.5 - 1, or "gaussian" for the density of
    continuous x. Returns (B,); 7.04 bits for 8-bit Gaussian pixels with std 0.25 and a
    perfect net. Raises ValueError for other values of pixels.
    """
    if pixels not in ("uint8", "gaussian"):
        raise ValueError(f"pixels {pixels!r} is neither uint8 nor gaussian")

    # The bound depends on the schedule only through its two ends, and holds for any logsnr_max. For
    # a net that cannot resolve the 256 pixel levels, it is tightest at a logsnr_max near 12.
    ends = schedule(torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device))
    logsnr_min, logsnr_max = ends[:1], ends[1:]  # (1,) each

    # Prior term: z_1 is not exactly standard normal.
    nats = _prior_nats(x, logsnr_min)

    # Diffusion term (Sec. 2): half the integral of -dlogsnr/dt ||eps - eps_hat||^2 over t. The
    # weight -dlogsnr/dt turns it into an integral over logsnr.
    for k in range(draws):
        # Stratified sampling: one logsnr in each of draws * B equal intervals. The estimate has
        # about a hundredth of the standard deviation that uniform t would give.
        order = torch.randperm(len(x), device=x.device)
        offset = torch.rand(len(x), dtype=x.dtype, device=x.device)
        strata = (order + offset) / len(x)  # (B,) in [0, 1]
        logsnr = logsnr_min + (logsnr_max - logsnr_min) * (k + strata) / draws

        # As in diffusion_loss: ||eps - eps_hat||^2 = alpha^2 ||v - v_hat||^2.
        eps = torch.randn_like(x)
        v_hat = net(diffuse(x, eps, logsnr), logsnr, label)
        error = v_from_x_eps(x, eps, logsnr) - v_hat.to(x.dtype)
        eps_error = torch.sigmoid(logsnr) * error.square().flatten(1).sum(1)
        nats = nats + 0.5 * (logsnr_max - logsnr_min) * eps_error / draws

    # Reconstruction term. Then convert nats per image to bits per dimension.
    nats = nats - _log_likelihood(x, logsnr_max, pixels)
    return nats / (x[0].numel() * math.log(2))
