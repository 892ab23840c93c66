"""Tests of related/video.py, and of related/vitok.py on video."""

import argparse
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample as sampling
import train
from related import ppgn, video, vitok
from related.video import MovingShapes
from support.data import Shapes, load_batch
from tests.helpers import call, float64

# ---------------------------------------------------------------- moving shapes


def test_clips_without_motion_are_images_of_shapes():
    clips, labels = load_batch(MovingShapes(16, 3, speed=0, spin=0), range(20))
    images, expected_labels = load_batch(Shapes(16), range(20))
    assert clips.dtype == torch.uint8
    assert clips.shape == (20, 3, 3, 16, 16)
    for frame in clips.unbind(2):
        assert torch.equal(frame, images)
    assert torch.equal(labels, expected_labels)

    # With motion, this is still the first frame, and the others differ.
    clips, _ = load_batch(MovingShapes(16, 3), range(20))
    assert torch.equal(clips[:, :, 0], images)
    for k in (1, 2):
        assert (clips[:, :, k] != images).flatten(1).any(1).all()


def test_clips_follow_from_their_index():
    data = MovingShapes((16, 24), 2)
    clips, labels = load_batch(data, range(30))
    assert torch.equal(clips[7:9], load_batch(data, [7, 8])[0])
    assert torch.equal(clips[10:], load_batch(MovingShapes((16, 24), 2, first=10), range(20))[0])

    # One clip, as a map-style dataset returns it.
    clip, label = data[3]
    assert clip.shape == (2, 16, 24, 3)
    assert torch.equal(clip.movedim(-1, 0), clips[3])
    assert label == labels[3]
    assert data.classes == Shapes.classes


def test_motions_are_spread_over_their_range():
    data = MovingShapes(16, 2, speed=0.2, spin=0.5)
    motion = data.motion(range(1000)) / torch.tensor([0.2, 0.2, 0.5])
    assert motion.abs().max() <= 1
    torch.testing.assert_close(motion.mean(0), torch.zeros(3), atol=0.06, rtol=0)
    torch.testing.assert_close(motion.std(0), torch.full((3,), 3**-0.5), atol=0.03, rtol=0)
    # They are independent of each other.
    assert (torch.corrcoef(motion.T) - torch.eye(3)).abs().max() < 0.1


def test_shapes_move_at_constant_velocity_and_turn():
    class Moved(Shapes):
        """Shapes whose centers and tilts are shifted by given numbers."""

        shift = (0.0, 0.0, 0.0)

        def _attributes(self, u, label):
            radius, right, up, hue = Shapes._attributes(u, label)
            return radius, right + self.shift[0], up + self.shift[1], hue

        def _tilt(self, u):
            return Shapes._tilt(u) + self.shift[2]

    clips = MovingShapes(16, 4)
    for i in range(10):
        motion = clips.motion([i])[0]
        clip, _ = load_batch(clips, [i])
        for k in range(4):
            # Frame k is the image of the same shape at the center and tilt of time k.
            shapes = Moved(16)
            shapes.shift = k * motion
            image, _ = load_batch(shapes, [i])
            assert torch.equal(clip[:, :, k], image)


def test_a_motion_of_one_pixel_shifts_the_image():
    class OnePixel(MovingShapes):
        """Shapes on white that move by exactly one pixel per frame: to the right, or up."""

        velocity = (2 / 32, 0.0, 0.0)

        def motion(self, indices):
            return torch.tensor([self.velocity]).expand(len(indices), -1)

        def _background(self, u, x, y):
            return torch.ones(len(u), 3, len(y), len(x))

        @staticmethod
        def _along(u, x, y):
            return torch.zeros(len(u), len(y), len(x))

    data = OnePixel(32, 3)
    clips = load_batch(data, range(20))[0].int()
    for k in (1, 2):
        difference = clips[:, :, k, :, k:] - clips[:, :, 0, :, :-k]
        assert difference.abs().max() <= 1

    # Row 0 is at the top.
    data.velocity = (0.0, 2 / 32, 0.0)
    clips = load_batch(data, range(20))[0].int()
    for k in (1, 2):
        difference = clips[:, :, k, :-k] - clips[:, :, 0, k:]
        assert difference.abs().max() <= 1


def test_held_out_clips():
    settings = dict(data=[], res=16, frames=2)
    training = video.open_data(settings, "cpu")
    held_out = video.open_data(settings, "cpu", held_out=5)
    assert (len(training), training.first) == (1_000_000, 0)
    assert (len(held_out), held_out.first) == (5, 2**30)

    # Settings from before there was video, and those of images.
    for settings in (dict(data=[], res=16), dict(data=[], res=16, frames=0)):
        assert type(video.open_data(settings, "cpu")) is Shapes

    with pytest.raises(ValueError, match="--data"):
        video.open_data(dict(data=["x.npz"], res=16, frames=2), "cpu")


# ---------------------------------------------------------------- clips as images


def test_clips_become_frames():
    x = torch.randn(2, 3, 4, 5, 6)
    frames = video.frames_of(x)
    assert frames.shape == (8, 3, 5, 6)
    assert torch.equal(frames[5], x[1, :, 1])
    images = torch.randn(2, 3, 5, 6)
    assert video.frames_of(images) is images


def test_latents_are_folded_and_unfolded():
    z = torch.randn(2, 3, 4, 5, 6)
    folded = video.fold(z)
    assert folded.shape == (2, 12, 5, 6)
    # The times of a channel are next to each other.
    assert torch.equal(folded[:, 4], z[:, 1, 0])
    assert torch.equal(video.unfold(folded, 4), z)

    # Latents of images are unchanged.
    z = torch.randn(2, 3, 5, 6)
    assert torch.equal(video.fold(z), z)
    assert torch.equal(video.unfold(z, 0), z)


def test_clips_are_written_above_their_reconstructions(tmp_path):
    x = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    y = -x
    path = tmp_path / "strip.png"
    video.write_pairs(path, x, y)

    # Rows are clips and columns are frames, 8 pixels and a gap of 2.
    grid = np.array(Image.open(path))
    assert grid.shape == (4 * 10 - 2, 5 * 10 - 2, 3)
    for row, clip in enumerate((x[0], y[0], x[1], y[1])):
        for k in range(5):
            frame = grid[10 * row : 10 * row + 8, 10 * k : 10 * k + 8]
            expected = sampling.to_uint8(clip[:, k]).permute(1, 2, 0).numpy()
            assert np.array_equal(frame, expected)


# ---------------------------------------------------------------- the network


def small_vitok(patch=2, channels=5, tubelet=2):
    """A net with random weights in every layer, in float64."""
    torch.manual_seed(0)
    net = vitok.ViTok(patch, channels, (16, 1, 2), (32, 2, 4), tubelet).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize(
    "tubelet, patch, channels, size",
    [(1, 4, 3, (2, 8, 12)), (2, 4, 5, (4, 8, 8)), (4, 2, 2, (4, 4, 6))],
)
def test_latents_of_clips(tubelet, patch, channels, size):
    net = small_vitok(patch, channels, tubelet)
    x = torch.randn(2, 3, *size, dtype=float64)
    mean, logvar = net.encode(x)
    frames, height, width = size
    assert mean.shape == (2, channels, frames // tubelet, height // patch, width // patch)
    assert logvar.shape == mean.shape
    assert net.floats(*size) == mean[0].numel()
    assert net.decode(mean).shape == x.shape


def test_a_tubelet_of_one_frame_is_a_patch():
    # The only difference of a video of one frame is the number of rotated channels. So compare
    # the layers at the ends, which are convolutions in three or in two dimensions.
    net = small_vitok(tubelet=1)
    images = vitok.ViTok(2, 5, (16, 1, 2), (32, 2, 4)).double()
    weights = net.state_dict()
    for name in ("patchify.weight", "to_pixels.weight"):
        weights[name] = weights[name][:, :, 0]
    images.load_state_dict(weights)

    x = torch.randn(2, 3, 1, 4, 6, dtype=float64)
    torch.testing.assert_close(net.patchify(x)[:, :, 0], images.patchify(x[:, :, 0]))
    h = torch.randn(2, 32, 1, 2, 3, dtype=float64)
    torch.testing.assert_close(net.to_pixels(h)[:, :, 0], images.to_pixels(h[:, :, 0]))

    # A single token has the position 0. Then the networks agree from end to end.
    x = torch.randn(2, 3, 1, 2, 2, dtype=float64)
    mean, _ = net.encode(x)
    expected, _ = images.encode(x[:, :, 0])
    torch.testing.assert_close(mean[:, :, 0], expected)
    torch.testing.assert_close(net.decode(mean)[:, :, 0], images.decode(expected))


def test_tubelets_become_tokens_in_the_order_of_the_grid():
    # Without blocks, each token depends on its own tubelet, and each tubelet on its own token.
    net = vitok.ViTok(2, 3, (16, 0, 2), (16, 0, 2), tubelet=2).double()
    x = torch.randn(1, 3, 4, 4, 6, dtype=float64)
    mean, _ = net.encode(x)
    for t, row, column in itertools.product(range(2), range(2), range(3)):
        times = slice(2 * t, 2 * t + 2)
        rows = slice(2 * row, 2 * row + 2)
        columns = slice(2 * column, 2 * column + 2)
        own, _ = net.encode(x[:, :, times, rows, columns])
        torch.testing.assert_close(mean[:, :, t, row, column], own[:, :, 0, 0, 0])
        torch.testing.assert_close(net.decode(mean)[:, :, times, rows, columns], net.decode(own))


def test_other_shapes_are_rejected():
    net = small_vitok(patch=4, tubelet=2)
    for size, message in (
        ((3, 8, 8), r"\b2 x 4 x 4\b.*\b3x8x8\b"),
        ((2, 6, 8), r"\b2 x 4 x 4\b.*\b2x6x8\b"),
        ((2, 8, 6), r"\b2 x 4 x 4\b.*\b2x8x6\b"),
        ((8, 8), r"\bclips\b.*\(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net.encode(torch.zeros(1, 3, *size, dtype=float64))
    images = vitok.ViTok(4, 2, (16, 1, 2), (16, 1, 2))
    with pytest.raises(ValueError, match=r"\bimages\b.*\(3, 2, 8, 8\)"):
        images.encode(torch.zeros(1, 3, 2, 8, 8))


# ---------------------------------------------------------------- training and the commands


def test_stage_1_learns_from_clips_and_stage_2_keeps_the_encoder():
    torch.manual_seed(0)
    net = vitok.ViTok(4, 8, (32, 1, 2), (32, 1, 2), tubelet=2)
    data = MovingShapes(16, 4)
    clips, _ = load_batch(MovingShapes(16, 4, first=2**30), range(20))
    x = clips / 127.5 - 1

    def error(net):
        return (net.decode(net.encode(x)[0]) - x).square().mean()

    before = error(net)
    net = vitok.fit(net, data, steps=40, batch=8, lr=3e-3)
    assert error(net) < 0.6 * before

    # The discriminator of stage 2 sees frames. The encoder stays as it is.
    mean, _ = net.encode(x)
    weight = net.to_pixels.weight.clone()
    tuned = vitok.fit(net, data, steps=3, batch=4, lr=1e-3, gan=0.1)
    assert torch.equal(tuned.encode(x)[0], mean)
    assert not torch.equal(tuned.to_pixels.weight, weight)


@pytest.fixture(scope="session")
def trained(made_once):
    """A folder with an autoencoder of clips, net, and the latents of 200 clips, latents.npz."""

    def make(folder):
        net = folder / "net"
        options = "--res 16 --patch 2 --channels 3 --encoder 16,1,2 --decoder 16,1,2"
        call(vitok.main, "train", net, options, "--frames 4 --tubelet 2 --steps 3 --batch 25")
        call(vitok.main, "encode", net, "--n 200 --out", folder / "latents.npz")

    return made_once("vitok-video", make)


def test_vitok_prints_psnr_and_ssim_of_frames(trained, tmp_path, capsys):
    call(vitok.main, "test", trained / "net", "--n 6 --out", tmp_path / "strip.png")
    pattern = r"E = 384\b[^\d\n]+\b6 clips\b.*PSNR ([\d.]+) dB.*SSIM ([\d.-]+)"
    printed = re.search(pattern, capsys.readouterr().out)

    # The mean over the frames of clips that no training uses.
    net, _ = vitok.load_vitok(trained / "net", "cpu")
    clips, _ = load_batch(MovingShapes(16, 4, first=2**30), range(6))
    x = clips / 127.5 - 1
    y = net.decode(net.encode(x)[0]).clamp(-1, 1)
    psnr, ssim = [], []
    for k in range(4):
        psnr.append(vitok.psnr(x[:, :, k], y[:, :, k]))
        ssim.append(vitok.ssim(x[:, :, k], y[:, :, k]))
    assert float(printed[1]) == pytest.approx(torch.stack(psnr).mean().item(), abs=0.006)
    assert float(printed[2]) == pytest.approx(torch.stack(ssim).mean().item(), abs=6e-5)

    # Four clips and their reconstructions, with four frames.
    assert Image.open(tmp_path / "strip.png").size == (4 * 18 - 2, 8 * 18 - 2)


def test_latents_of_clips_are_standardized_and_decoded(trained, tmp_path):
    with np.load(trained / "latents.npz") as arrays:
        z = torch.from_numpy(arrays["z"])
        assert z.shape == (200, 3 * 2, 8, 8)
        assert arrays["y"].tolist() == [i % 10 for i in range(200)]
    z = z.unflatten(1, (3, 2))
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.ones(3), atol=0.1, rtol=0)

    # Decoding undoes the standardization.
    out = tmp_path / "clips.npz"
    call(
        vitok.main, "decode", trained / "net", "--data", trained / "latents.npz", "--n 5 --out", out
    )
    net, saved = vitok.load_vitok(trained / "net", "cpu")
    x = net.decode(z[:5] * saved["std"] + saved["mean"])
    expected = sampling.to_uint8(x).movedim(1, -1).numpy()
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (5, 4, 16, 16, 3)
        assert np.abs(arrays["arr_0"].astype(int) - expected).max() <= 1
        assert arrays["y"].tolist() == [0, 1, 2, 3, 4]


def test_a_diffusion_model_is_trained_on_latents_of_clips(trained, tmp_path):
    # Train on latents, draw latents, and decode them to a strip.
    run = tmp_path / "run"
    samples = tmp_path / "samples.npz"
    strip = tmp_path / "strip.png"
    model_args = '{"base_channels": 8, "emb_channels": 16}'
    options = ["--res 8 --steps 2 --batch 4 --model-args", model_args]
    call(train.main, "--data", trained / "latents.npz", *options, "--out", run)
    call(sampling.main, run, "--n 3 --steps 2 --out", samples)
    call(vitok.main, "decode", trained / "net", "--data", samples, "--out", strip)
    # Rows are clips, columns are frames.
    assert Image.open(strip).size == (4 * 18 - 2, 3 * 18 - 2)


def test_tune_on_video(trained, tmp_path):
    call(vitok.main, "tune", trained / "net", "--steps 1 --batch 2 --out", tmp_path / "tuned")
    net, saved = vitok.load_vitok(tmp_path / "tuned", "cpu")
    assert net.tubelet == 2
    assert saved["config"]["frames"] == 4


def test_autoencoders_from_before_video_are_loaded(tmp_path):
    torch.manual_seed(0)
    fields = dict(patch=4, channels=2, encoder=(16, 1, 2), decoder=(16, 1, 2))
    net = vitok.ViTok(**fields)
    config = dict(data=[], res=16)
    saved = dict(net=fields, config=config, mean=torch.zeros(2, 1, 1), std=torch.ones(2, 1, 1))
    vitok.save_vitok(tmp_path, saved | dict(weights=net.state_dict()))
    call(vitok.main, "test", tmp_path, "--n 2")
    latents = tmp_path / "latents.npz"
    call(vitok.main, "encode", tmp_path, "--n 2 --out", latents)
    call(vitok.main, "decode", tmp_path, "--data", latents, "--out", tmp_path / "grid.png")


def test_invalid_options_for_video_are_rejected(trained, tmp_path):
    net = trained / "net"
    latents = tmp_path / "z.npz"
    np.savez(latents, z=np.zeros((2, 3, 8, 8), np.float32))
    size = "--res 16 --encoder 16,1,2 --decoder 16,1,2"
    for args, message in (
        (["train", "x", "--frames 4"], "--tubelet"),
        (["train", "x", "--tubelet 4"], "--frames"),
        (["train", "x", "--frames -1 --tubelet 2"], "--frames"),
        (["train", "x", size, "--frames 5 --tubelet 2"], r"\b2 x 4 x 4\b.*\b5x16x16\b"),
        (["train", "x", size, "--frames 4 --tubelet 2 --data y.npz"], "--data"),
        (["test", net, "--data y.npz"], "--data"),
        # The latents have 3 channels instead of 3 for each of 2 times.
        (["decode", net, "--data", latents, "--out x.npz"], r"z\.npz\b(?=.*\b3\b).*\b6\b"),
    ):
        with pytest.raises(ValueError, match=message):
            call(vitok.main, args)

    # PPGN needs an autoencoder of images.
    options = argparse.Namespace(joint=str(net))
    with pytest.raises(ValueError, match=re.escape(str(net))):
        ppgn.choose_variant(options, None, (3, 16, 16), "cpu")
