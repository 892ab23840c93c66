"""The losses of simple diffusion (Sec. 2; multiscale: Eq. 7-8) and the likelihood of the same net in bits per dimension.

All of them see the net only through v_hat = net(z, logsnr, label). At one z, v = alpha eps - sigma x gives
    eps - eps_hat = alpha (v - v_hat)      and      x - x_hat = -sigma (v - v_hat),
so the eps loss is sigmoid(logsnr) times the v loss, and no error is ever computed as a difference of large numbers.

    loss, logsnr = diffusion_loss(net, x, schedule, label)     # both (B,); loss.mean().backward()
    bits = elbo_bpd(net, x, schedule, label)                   # (B,); 7.04 for pixels that are Gaussian with std 0.25
"""

import math

import torch
import torch.nn.functional as F

from schedule import alpha_sigma, diffuse, v_from_x_eps


def mean_squares(error, multiscale=False):
    """The mean of error^2 over each picture, or the multiscale sum of Eq. 7-8. error: (B, C, H, W). Returns (B,).

    Eq. 8 sums (1 / s) L^s over the side s in {32, 64, ..., d}, L^s being the mean square of the error pooled to s x s.
    Here that sum is multiplied by the constant d: the finest term is the plain loss, and clipping keeps its meaning.
    For other than square pictures s is the shorter side. Raises ValueError for sides that do not divide.
    """
    if not multiscale:
        return error.square().mean((1, 2, 3))
    total, factor = 0.0, 1
    while min(error.shape[2:]) >= 32 * factor:
        if error.shape[2] % factor or error.shape[3] % factor:
            raise ValueError(
                f"the multiscale loss of {tuple(error.shape[2:])} pixels needs sides divisible by {factor}"
            )
        total = total + factor * F.avg_pool2d(error, factor).square().mean((1, 2, 3))
        factor *= 2
    if factor == 1:
        raise ValueError(
            f"the multiscale loss starts at 32 pixels, the picture has {tuple(error.shape[2:])}"
        )
    return total


def diffusion_loss(
    net, x, schedule, label=None, *, space="eps", multiscale=False, t=None, eps=None
):
    """The training loss: w(t) = 1 on ||eps - eps_hat||^2 ("eps", Sec. 2), or on ||v - v_hat||^2 ("v").

    x: (B, C, H, W) in [-1, 1]. t: (B,) in [0, 1], uniform if not given; eps: like x, standard normal if not given.
    Returns the loss of each picture, in the type of x, and the logsnr it was taken at, both (B,). Raises ValueError.
    """
    if space not in ("eps", "v"):
        raise ValueError(f"space {space!r} is neither eps nor v")
    t = torch.rand(len(x), device=x.device) if t is None else t
    eps = torch.randn_like(x) if eps is None else eps
    logsnr = schedule(t)
    v_hat = net(diffuse(x, eps, logsnr), logsnr, label)
    error = v_from_x_eps(x, eps, logsnr) - v_hat.to(x.dtype)
    if space == "eps":
        error = (
            alpha_sigma(logsnr, like=x)[0] * error
        )  # = eps - eps_hat, without its cancellation at high noise
    return mean_squares(error, multiscale), logsnr


@torch.no_grad()
def elbo_bpd(net, x, schedule, label=None, *, draws=16, pixels="uint8"):
    """The variational bound on -log2 p(x) per dimension (Sec. 2; VDM, arXiv 2107.00630): prior + diffusion + reconstruction.

    net: in eval mode. x: (B, C, H, W) in [-1, 1]. pixels: "uint8" for the bits of 8-bit pixels, x = level / 127.5 - 1; "gaussian" for the
    differential entropy of continuous x, reconstructed with the density N(z_0 / alpha, sigma^2 / alpha^2).
    draws: evaluations of the net per picture. Returns (B,). Raises ValueError.

    The weight -dlogsnr/dt turns the integral over t into one over logsnr, which does not know the schedule, only its ends.
    Any upper end gives a bound; a net that does not resolve the 256 levels has its best one below logsnr 15, near 12.
    Drawn uniformly in logsnr, a stratum per draw and picture, it is a hundred times less noisy than uniformly in t.
    """
    if pixels not in ("uint8", "gaussian"):
        raise ValueError(f"pixels {pixels!r} is neither uint8 nor gaussian")
    ends = schedule(
        torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
    )  # logsnr_min, logsnr_max
    low, high = ends[:1], ends[1:]

    alpha = alpha_sigma(low)[
        0
    ].item()  # KL(q(z_1 | x) || N(0, 1)) = (alpha^2 x^2 + sigma^2 - 1 - log sigma^2) / 2
    nats = 0.5 * (alpha**2 * (x.square() - 1) - F.logsigmoid(-low)).flatten(1).sum(1)

    for k in range(draws):
        strata = (
            torch.randperm(len(x), device=x.device)
            + torch.rand(len(x), dtype=x.dtype, device=x.device)
        ) / len(x)
        logsnr = low + (high - low) * (k + strata) / draws
        eps = torch.randn_like(x)
        error = v_from_x_eps(x, eps, logsnr) - net(diffuse(x, eps, logsnr), logsnr, label).to(
            x.dtype
        )
        eps_error = torch.sigmoid(logsnr) * error.square().flatten(1).sum(1)  # ||eps - eps_hat||^2
        nats = nats + 0.5 * (high - low) * eps_error / draws

    eps = torch.randn_like(x)
    z_0 = diffuse(x, eps, high)
    alpha, sigma = alpha_sigma(high)
    if pixels == "gaussian":
        log_p = -0.5 * eps.square() - torch.log(sigma / alpha) - 0.5 * math.log(2 * math.pi)
    else:  # the softmax over all 256 levels of -(z_0 - alpha x_k)^2 / (2 sigma^2), at the pixel's own level
        log_p = torch.full_like(x, -math.inf)
        for level in range(256):  # a level at a time: 256 times the picture would not fit in memory
            log_p = torch.logaddexp(
                log_p, -0.5 * ((z_0 - alpha * (level / 127.5 - 1)) / sigma).square()
            )
        log_p = -0.5 * eps.square() - log_p
    return (nats - log_p.flatten(1).sum(1)) / (x[0].numel() * math.log(2))
