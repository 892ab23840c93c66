"""Tests of the GPU code paths without a GPU: devices, types, and waits for the device.

A fake CUDA tensor has a device, a type and a shape, but no data. With fake tensors, a training step
for a GPU runs on any machine. This needs a CUDA build of PyTorch, such as the default one for Linux
(3 GB). It may have an environment of its own; all other builds skip this file:

    python -m venv cuda-venv
    cuda-venv/bin/pip install torch numpy pillow scipy pytest
    cuda-venv/bin/python -m pytest tests/test_fake_cuda.py

The CPU issues kernels ahead of the GPU. If it reads a result, or copies a tensor without
non_blocking, it waits until the GPU has finished, and the GPU then waits for the next kernels.
Not covered: values, backward passes, compilation, several ranks, and the kernels themselves.
"""

import contextlib
import os
import traceback
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fid
import train
from sample import sample_batches
from schedule import make_schedule
from support.checkpoint import build_net
from support.data import Dataset, Shapes, example_noise
from support.runtime import in_bf16
from support.settings import make_config
from support.text import CaptionedShapes, LazyLabels
from tests.helpers import HERE, TINY_UNET, TINY_UVIT
from unet import Attention, GroupNorm, ResBlock
from uvit import TransformerBlock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    # copy.deepcopy asks for the address of each weight, and fake tensors have none.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
CUDA = torch.device("cuda", 0)

# ---------------------------------------------------------------- the fake GPU

# The operators that accept CPU tensors next to CUDA tensors: they copy them to the GPU.
COPIES = {"_to_copy", "copy_", "index", "index_put_", "where"}


class FakeGenerator(torch.Generator):
    """A random generator that remembers the type of its device. In fact it is one of the CPU."""

    devices = {}  # address of the C++ object, which is all that operators receive -> type

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        cls.devices[self._cdata] = torch.device(device).type
        return self


class FakeGPU(TorchDispatchMode):
    """Inside this mode, all operators call __torch_dispatch__. Only tensors on the GPU are fake.

    waits: "function: operator" for each wait, with the project's innermost function.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def add_wait(self, name):
        frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
        folders = (HERE, f"{HERE}/support")
        ours = (code.co_name for code in frames if os.path.dirname(code.co_filename) in folders)
        self.waits.append(f"{next(ours, 'test')}: {name}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not isinstance(x, FakeTensor)]
        target = kwargs["device"].type if kwargs.get("device") else None
        device = "cuda" if len(on_cpu) < len(tensors) or target == "cuda" else "cpu"

        # Random numbers need a generator of the same device.
        generators = [x._cdata for x in leaves if isinstance(x, torch._C.Generator)]
        if any(FakeGenerator.devices.get(address, "cpu") != device for address in generators):
            raise RuntimeError(f"{name} on {device} with the generator of another device")

        with unset_fake_temporarily():
            # The CPU computes as always.
            if device == "cpu":
                return func(*args, **kwargs)

            # Reading a number, as item(), float() and bool() do. Instead of data there are zeros.
            if name == "_local_scalar_dense":
                self.add_wait(name)
                return torch.zeros((), dtype=args[0].dtype).item()
            # Copying into a CPU tensor, or to a new one, as cpu() does.
            if name == "copy_" and not isinstance(args[0], FakeTensor):
                self.add_wait(name)
                return args[0].zero_()
            if name == "_to_copy" and target == "cpu":
                self.add_wait(name)
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

        # Scalars may be on the CPU: kernels take them as numbers. For other CPU tensors there is an
        # error here, because FakeTensorMode does not notice all of them.
        if name not in COPIES and any(x.ndim for x in on_cpu):
            raise RuntimeError(f"{name} of tensors on two devices")

        # Copying to the GPU.
        non_blocking = any(args[2:]) if name == "copy_" else kwargs.get("non_blocking")
        if name in COPIES and on_cpu and not non_blocking:
            self.add_wait(name)
        # FakeTensorMode returns a fake tensor, or raises an error.
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu():
    """Run the block as if there were a GPU. Yields the list of waits, see FakeGPU."""
    patches = [
        mock.patch("torch.Generator", FakeGenerator),
        # By default it reads number by number.
        mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()),
        # Without a GPU, autocast turns itself off.
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(FakeGPU()).waits


def is_on_gpu(x, dtype, shape):
    """Whether a tensor is on the GPU and has this type and shape."""
    return (x.device, x.dtype, x.shape) == (CUDA, dtype, torch.Size(shape))


def test_the_fake_gpu_notices_waits_and_wrong_devices():
    with fake_gpu() as waits:
        x = torch.zeros(3, device="cuda")
        cpu = torch.ones(3)

        # Read one number or all, write into a CPU tensor, copy to the GPU, index with a list.
        x.sum().item()
        assert not x.any()
        x.tolist()
        x.cpu()
        cpu[:] = x
        cpu.to("cuda")
        x[[0, 1]]
        names = ["_local_scalar_dense"] * 2 + ["_to_copy"] * 2 + ["copy_"] + ["_to_copy"] * 2
        assert waits == [f"test: {name}" for name in names]

        # No waits: kernels, scalars on the CPU, and copies with non_blocking.
        waits.clear()
        x[-1] = torch.where(x.isfinite(), 1.0, 2.0).sum() + torch.ones(())
        x.copy_(cpu.to("cuda", non_blocking=True))
        assert not waits

        # CPU tensors in a computation on the GPU, and generators of the other device.
        with pytest.raises(RuntimeError, match="two devices"):
            x + cpu
        with pytest.raises(RuntimeError, match="two devices"):
            x.index_add_(0, torch.tensor([0]), x[:1])
        for one, other in (("cpu", "cuda"), ("cuda", "cpu")):
            with pytest.raises(RuntimeError, match="generator"):
                torch.rand(3, generator=torch.Generator(one), device=other)
        # A shape that depends on the data.
        with pytest.raises(Exception, match="nonzero"):
            x[x > 0]


# ---------------------------------------------------------------- data and training


@pytest.mark.parametrize(
    "dataset, label_shape",
    [
        (Shapes((32, 48), "cuda"), ()),
        (CaptionedShapes((32, 48), "cuda", tokens=9), (9,)),
    ],
)
def test_shapes_are_drawn_on_the_gpu(dataset, label_shape):
    with fake_gpu() as waits:
        images, labels = dataset.__getitems__([3, 1, 4])
        assert is_on_gpu(images, torch.uint8, (3, 32, 48, 3))
        assert is_on_gpu(labels, torch.int64, (3, *label_shape))
    assert not waits


def test_noise_is_drawn_on_the_gpu():
    with fake_gpu() as waits:
        u, eps = example_noise(0, 5, range(3, 7), (3, 8, 16), "cuda")
        assert is_on_gpu(u, torch.float32, (4, 3))
        assert is_on_gpu(eps, torch.float32, (4, 3, 8, 16))
    assert not waits


class Captioned(Dataset):
    """Black images and empty captions. They are on the CPU, as if read from files."""

    def __init__(self, size, text_dim=0, portrait=False):
        self.size = size
        self.net_fields = dict(text_tokens=6, text_dim=text_dim, portrait=portrait)
        rows = 6 + portrait
        self.label = torch.zeros(rows, text_dim) if text_dim else torch.zeros(rows).long()

    def __len__(self):
        return 100

    def __getitems__(self, indices):
        n = len(indices)
        return torch.zeros(n, *self.size, 3).byte(), self.label.expand(n, *self.label.shape)

    def sample_labels(self, n):
        return LazyLabels(n, lambda indices: self.__getitems__(indices)[1])


# The arguments of tiny networks. Those that follow from the dataset are left out.
NETS = dict(
    uvit=TINY_UVIT | dict(patching="dwt_1", transformer_dropout=0.2),
    unet=TINY_UNET | dict(patching="conv_2", checkpoint_resolutions=(16,)),
)
for fields in NETS.values():
    del fields["res"], fields["num_classes"]


@pytest.mark.parametrize(
    "model, dataset, options",
    [
        ("uvit", Shapes(32, "cuda"), dict(space="eps", multiscale=True)),
        ("unet", Shapes(32, "cuda"), dict(space="v", flip=True)),
        ("uvit", Captioned((32, 32)), dict(space="v", multiscale=True)),
        ("uvit", Captioned((32, 64), text_dim=5, portrait=True), dict(space="eps")),
    ],
)
def test_training_does_not_wait_between_lines_of_the_log(monkeypatch, model, dataset, options):
    given = dict(model=model, model_args=NETS[model], size="tiny", compile=False)
    given |= dict(res="x".join(map(str, dataset.size)), steps=2, batch=4, micro=2) | options
    losses = []

    def fake_backward(loss):
        """Set the gradients to zero: autograd asks the driver of a GPU, so it cannot run."""
        losses.append(loss)
        for weight in run.net.parameters():
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", fake_backward)
    # Two steps of two micro-batches, without a line of the log, a checkpoint or a grid.
    monkeypatch.setattr(train, "is_due", lambda run, name: False)
    with fake_gpu() as waits:
        # What train.prepare does, without files.
        config = make_config(given, CUDA, dataset)
        run = train.Run(config, "", 0, 1, CUDA, dataset)
        run.schedule = make_schedule(config["schedule"], min(dataset.size))
        run.loss_fn = train.choose_loss(config)
        train.build(run, None)

        # Copying the weights to the GPU has waited.
        waits.clear()
        train.train(run, train.make_batches(run, 0))
        assert not waits
        assert config["bf16"] and run.step == 2

        # Losses, weights, EMA weights and moments are float32.
        assert len(losses) == 4 and all(loss.requires_grad for loss in losses)
        moments = [x for state in run.optimizer.state.values() for x in state.values()]
        assert moments
        for x in [*losses, *run.net.parameters(), *run.ema_net.parameters(), *moments]:
            assert is_on_gpu(x, torch.float32, x.shape)


# ---------------------------------------------------------------- types in the network


def spy(monkeypatch, name):
    """A list of (arguments, result) of each call of a function in torch.nn.functional."""
    function = getattr(F, name)
    calls = []

    def recorded(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(F, name, recorded)
    return calls


@pytest.mark.parametrize("model, text", [("uvit", {}), ("unet", {}), ("uvit", {"text_tokens": 6})])
def test_types_under_autocast(monkeypatch, model, text):
    norms = spy(monkeypatch, "group_norm")
    attentions = spy(monkeypatch, "scaled_dot_product_attention")
    dtypes = set()
    with fake_gpu() as waits:
        net = build_net(model, NETS[model] | dict(res=32, num_classes=3) | text, CUDA)
        for block in net.modules():
            if isinstance(block, (ResBlock, TransformerBlock, Attention, GroupNorm)):
                block.register_forward_hook(lambda _, x, h: dtypes.update([x[0].dtype, h.dtype]))

        waits.clear()
        z, logsnr = torch.zeros(2, 3, 32, 32, device=CUDA), torch.zeros(2, device=CUDA)
        for label in (torch.zeros(2, *text.values(), dtype=torch.int64, device=CUDA), None):
            assert is_on_gpu(in_bf16(net)(z, logsnr, label), torch.float32, z.shape)
    assert not waits

    # Autocast turns other operators into float32 on a GPU than on a CPU. The blocks are bfloat16
    # nevertheless. GroupNorm adds in float32, and attention is one kernel.
    assert dtypes == {torch.bfloat16}
    assert {x.dtype for (x, *_), _ in norms} == {torch.float32}
    assert {h.dtype for _, h in attentions} == {torch.bfloat16}
    # Only cross-attention has a mask of booleans, for the padding of texts.
    masks = [args[3] for args, _ in attentions if args[3] is not None]
    assert any(mask.dtype == torch.bool for mask in masks) == bool(text)


# ---------------------------------------------------------------- sampling and FID


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("text_dim", [0, 5])
def test_sampling_from_texts_waits_at_its_ends_only(sampler, text_dim):
    dataset = Captioned((32, 32), text_dim)
    args = NETS["uvit"] | dict(res=32, num_classes=0) | dataset.net_fields
    options = dict(sampler=sampler, steps=3, guidance=2.0, guidance_interval=(-5.0, 10.0))
    with fake_gpu() as waits:
        net = in_bf16(build_net("uvit", args, CUDA).eval())
        options |= dict(null_label=dataset.label[None].to(CUDA), clip="dynamic", device=CUDA)
        waits.clear()
        # Five samples in two batches.
        labels, schedule = dataset.sample_labels(5), make_schedule("cosine", 32)
        rounds = list(sample_batches(net, (3, 32, 32), schedule, labels, 3, **options))
    samples = torch.cat([x for _, x in rounds])
    assert (samples.device.type, samples.dtype, len(samples)) == ("cpu", torch.uint8, 5)

    # Each batch copies its labels and noise levels to the GPU, and at last its samples to the CPU.
    assert waits == 2 * ["sample_batches: _to_copy", "sample: _to_copy", "sample_batches: copy_"]


@pytest.mark.parametrize("keep", [False, True])
def test_features_and_their_sums_stay_on_the_gpu(keep):
    with fake_gpu() as waits:
        net = fid.InceptionV3().fold().to(CUDA)
        statistics = fid.Statistics(keep)
        waits.clear()
        for n in (3, 2):
            images = torch.zeros(n, 3, 32, 48, dtype=torch.uint8, device=CUDA)
            features, logits, spatial = fid.extract(net, images, spatial=True)
            assert is_on_gpu(features, torch.float32, (n, 2048))
            statistics.update(features, logits, fid.score_splits(n), spatial)
        assert is_on_gpu(statistics.moments, torch.float64, (2049, 2049))
        assert is_on_gpu(statistics.spatial, torch.float64, (2024, 2024))
        assert is_on_gpu(statistics.scores, torch.float64, (fid.SPLITS, 1010))

    # Precision and recall keep the features on the CPU. Each update copies them.
    assert waits == (2 if keep else 0) * ["update: _to_copy"]
