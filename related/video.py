"""Video for related/vitok.py: moving shapes, and clips as images. Not a command of its own.

A clip has T frames. A dataset returns clips (B, T, H, W, 3) uint8, and networks take (B, 3, T, H,
W). Diffusion models and make_grid take images. The functions below turn clips into images, and
latents of clips into those of images and back.
"""

import torch

from related import common
from sample import make_grid, to_uint8
from support.data import Shapes
from support.runtime import writing

# ---------------------------------------------------------------- moving shapes


class MovingShapes(Shapes):
    """Clips of Shapes that move and turn, over a fixed background.

    Frame 0 of clip i is image i of Shapes, with the same class. The shape then moves at a constant
    velocity and turns at a constant rate, which are hashes of i. A part of it may leave the frame.
    distances() is for images only.

    frames: T. speed: the largest displacement per frame along each axis; the shorter side of a
    frame is 2. spin: the largest rotation per frame, in radians. The other arguments are those of
    Shapes.
    """

    def __init__(self, res, frames, device="cpu", length=1_000_000, first=0, speed=0.06, spin=0.15):
        super().__init__(res, device, length, first)
        self.frames = frames
        self.speed = speed
        self.spin = spin

    def motion(self, indices):
        """Return velocity right, velocity up and rotation per frame of these clips, (B, 3)."""
        indices = torch.as_tensor(indices, dtype=torch.int64).to(self.device) + self.first
        # Three further numbers from -1 to 1. The offset keeps them apart from those of Shapes.
        direction = 2 * self._uniform(indices + 2**31, 3) - 1
        limits = [self.speed, self.speed, self.spin]
        return direction * torch.tensor(limits, device=self.device)

    def __getitems__(self, indices):
        """Draw the clips (B, T, H, W, 3) uint8 at these indices. Returns them and labels (B,)."""
        u, label, x, y, pixel = self._coordinates(indices)  # u: (B, 16, 1, 1)

        # All frames of a clip have the 16 numbers of its image. Frame k has three more: the
        # displacement and the turn, which are k times the motion.
        k = torch.arange(self.frames, device=self.device)[:, None]  # (T, 1)
        moved = k * self.motion(indices)[:, None]  # (B, T, 3)
        u = u.flatten(1)[:, None].expand(-1, self.frames, -1)  # (B, T, 16)
        u = torch.cat([u, moved], 2).flatten(0, 1)[:, :, None, None]  # (B T, 19, 1, 1)

        # Draw the frames as images.
        images = self._paint(u, label.repeat_interleave(self.frames), x, y, pixel)
        return images.unflatten(0, (-1, self.frames)), label

    @staticmethod
    def _attributes(u, label):
        """Return the attributes of each frame, with the center moved. u: (B T, 19, 1, 1)."""
        radius, right, up, hue = Shapes._attributes(u, label)
        return radius, right + u[:, 16], up + u[:, 17], hue

    @staticmethod
    def _tilt(u):
        """Return the angle of each frame. u: (B T, 19, 1, 1)."""
        return Shapes._tilt(u) + u[:, 18]


def open_data(config, device, held_out=None, import_classes=False):
    """Open the dataset of an autoencoder: images, or moving shapes if the settings have `frames`.

    held_out: for moving shapes, the number of clips, which no training uses. None: the clips for
    training. import_classes, and other errors: see open_images. Raises ValueError for other clips
    than the built-in ones.
    """
    if not config.get("frames"):
        return common.open_images(config, device, import_classes)
    if config["data"]:
        raise ValueError("video comes from the built-in moving shapes: omit --data")
    size = config["res"], config["frames"]
    if held_out:
        # Training uses the indices below 2^30.
        return MovingShapes(*size, device, held_out, first=2**30)
    return MovingShapes(*size, device)


# ---------------------------------------------------------------- clips as images


def frames_of(x):
    """Return the frames (B T, 3, H, W) of clips (B, 3, T, H, W). Images are returned unchanged."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def fold(z):
    """Return latents of clips (B, c, t, h, w) as those of images (B, c t, h, w).

    A network for images then denoises all times at once. Latents of images are unchanged.
    """
    return z.flatten(1, -3)


def unfold(z, times):
    """Return latents of clips (B, c, times, h, w) from folded ones (B, c times, h, w).

    times: T / q, or 0 for latents of images, which are unchanged.
    """
    return z.unflatten(1, (-1, times)) if times else z


def write_pairs(path, x, y):
    """Write a grid (.png) in which a row of real images is above the row of their reconstructions.

    x, y: images (B, 3, H, W), up to 10 in a row, or clips (B, 3, T, H, W), whose frames are a row.
    Values are in [-1, 1]. At most four pairs of rows are written.
    """
    columns = x.shape[2] if x.ndim == 5 else min(10, len(x))
    x, y = (frames_of(part)[: 4 * columns] for part in (x, y))
    n = len(x) // columns * columns
    rows = torch.stack([part[:n].unflatten(0, (-1, columns)) for part in (x, y)], 1)
    images = to_uint8(rows.flatten(0, 2)).permute(0, 2, 3, 1).cpu().numpy()
    with writing(path) as file:
        make_grid(images, columns).save(file, "PNG")
