"""The fixtures of all tests. A fixture of session scope is made once, also for several workers."""

import collections
import fcntl
import os
import re
import resource
import zipfile

# The tests, and the commands that they start, are for the CPU. Their networks are so tiny that
# several threads mostly wait for each other.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

import train
from tests.helpers import SMALL_NET, TINY_RUN, call, content_of, no_grid, short_grid, train_small


@pytest.fixture(autouse=True)
def short_grids(monkeypatch):
    """Sample grids are drawn in 2 steps in all tests but those that call full_grid."""
    short_grid(monkeypatch)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function (name, make) that returns a folder, which make(folder) has filled.

    Workers of pytest-xdist share the folder: the first one makes it, the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of all workers

    def shared_folder(name, make):
        folder = base / f"shared-{name}"
        with open(base / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "done"
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder / "content")
                done.touch()
        return folder / "content"

    return shared_folder


@pytest.fixture(scope="session")
def run(made_once):
    """The folder of a run of six tiny steps on Shapes. Tests copy it before they change it."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            short_grid(monkeypatch)
            call(train.main, *TINY_RUN, "--steps 6 --out", folder)

    return str(made_once("run", make))


@pytest.fixture(scope="session")
def small_run(made_once):
    """The folder of a run of two steps with the network that the recipe calls tiny, but smaller."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            short_grid(monkeypatch)
            train_small(folder, *SMALL_NET)

    return str(made_once("small_run", make) / "run")


@pytest.fixture(scope="session")
def sets(made_once):
    """Forty images as a folder, zip, npz and npy file, and thirty others as an npz file."""

    def make(folder):
        x = np.random.default_rng(0).integers(0, 256, (40, 12, 10, 3), np.uint8)
        y = np.random.default_rng(1).integers(60, 200, (30, 12, 10, 3), np.uint8)
        for i, image in enumerate(x):
            path = folder / "real" / str(i % 3) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        with zipfile.ZipFile(folder / "real.zip", "w") as file:
            for path in (folder / "real").rglob("*.png"):
                file.write(path, path.name)
        np.savez(folder / "real.npz", arr_0=x)
        np.save(folder / "real.npy", x)
        np.savez(folder / "fake.npz", arr_0=y)

    return made_once("sets", make)


@pytest.fixture
def outcomes(monkeypatch, tmp_path, capsys):
    """A dict of lists for outcomes, in an empty folder, without grids, with 8 GiB of memory.

    A command that allocates more fails, instead of slowing down the machine.
    """
    monkeypatch.chdir(tmp_path)
    no_grid(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = 1024 * int(re.search(rb"VmSize:\s+(\d+)", content_of("/proc/self/status"))[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, before[1]))
    try:
        yield collections.defaultdict(list)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
