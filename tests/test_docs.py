"""Tests of the README and docs: links, examples, the table of options."""

import glob
import math
import os
import re

import pytest
import torch

import sample as sampling
import train
from docs.judge import measure_run
from docs.options import PAGE, with_table
from loss import diffusion_loss
from schedule import make_schedule
from tests.helpers import HERE, call, gaussian_net, no_grid

PAGES = ["README.md", "related/README.md"]
PAGES += sorted(os.path.relpath(path, HERE) for path in glob.glob(f"{HERE}/docs/*.md"))


def read(page):
    with open(os.path.join(HERE, page), encoding="utf-8") as file:
        return file.read()


def anchors(text):
    """The anchors of the headings of a page, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    folder = os.path.dirname(os.path.join(HERE, page))
    links = re.findall(r"\]\(([^)\s]+)\)", read(page))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        path = os.path.join(folder, path) if path else os.path.join(HERE, page)
        assert os.path.exists(path), link
        if anchor:
            with open(path, encoding="utf-8") as file:
                assert anchor in anchors(file.read()), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    # Names such as `docs/judge.py` or related/dico.py, in prose and in commands.
    names = re.findall(r"\b((?:docs|related|support|tests)/\w+\.(?:py|md))\b", read(page))
    # And modules that are run, such as python -m docs.judge.
    names += [
        name.replace(".", "/") + ".py"
        for name in re.findall(r"-m ((?:docs|related)\.\w+)", read(page))
    ]
    for name in names:
        assert os.path.exists(os.path.join(HERE, name)), name


def test_names_in_the_map_of_the_paper_exist():
    section = read("README.md").split("## The paper, and where it is")[1].split("\n## ")[0]
    table = [row.split("|")[2] for row in section.splitlines() if row.startswith("|")]
    paths = [*glob.glob(f"{HERE}/*.py"), *glob.glob(f"{HERE}/support/*.py")]
    code = "\n".join(read(path) for path in paths)
    names = re.findall(r"`(\w+)`", " ".join(table))
    assert len(names) > 20
    for name in names:
        assert re.search(rf"^(def|class) {name}\b", code, re.M), name


def test_readme_can_be_read_in_one_sitting():
    text = read("README.md")
    assert len(text.split()) <= 2250
    assert len(text.splitlines()) <= 240


def test_table_of_options_is_that_of_the_code():
    with open(PAGE, encoding="utf-8") as file:
        page = file.read()
    assert page == with_table(page), "run python -m docs.options"


def python_blocks(page="README.md"):
    """The Python blocks of a page: {file name, or "": code}."""
    blocks = {}
    for code in re.findall(r"```python\n(.*?)```", read(page), re.S):
        name = re.match(r"# (\w+\.py)", code)
        blocks[name[1] if name else ""] = code
    return blocks


def test_extensions_of_the_readme_and_the_docs(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = python_blocks() | python_blocks("docs/training.md")
    for name, code in blocks.items():
        if name:
            (tmp_path / name).write_text(code)
    small = "--res 32 --steps 2 --batch 4 --log-every 1"

    # The network, with the option that its comment names, and with another width.
    call(train.main, small, "--model mynet:Net --out net")
    call(train.main, small, "--out wide --model mynet:Net --model-args", '{"width": 16}')

    # The judge measures it, too, if its class is named again.
    bits, errors = measure_run("net", "shapes", images=4, model="mynet:Net")
    assert math.isfinite(bits)
    assert len(errors) == 8

    # The loss and the dataset together.
    tiny = '{"base_channels": 8, "emb_channels": 16}'
    call(
        train.main,
        small,
        "--loss myloss:min_snr --data mydata:Stripes --out stripes --model-args",
        tiny,
    )
    assert sampling.SAMPLERS.keys() == {"ddpm", "ddim", "dpmpp"}


def test_loss_of_the_readme_weighs_as_min_snr(tmp_path):
    # Min-SNR on the loss in eps space is min(snr, 5) / snr.
    namespace = {}
    exec(python_blocks()["myloss.py"], namespace)
    x, eps = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    t = torch.linspace(0.1, 0.9, 8)
    net = gaussian_net(0.0, 2.0)
    schedule = make_schedule("cosine", 4)
    arguments = dict(t=t, eps=eps)
    loss, logsnr = namespace["min_snr"](net, x, schedule, **arguments)
    eps_loss, _ = diffusion_loss(net, x, schedule, space="eps", **arguments)
    snr = logsnr.exp()
    torch.testing.assert_close(loss, eps_loss * snr.clamp(max=5) / snr)


def test_sampler_of_the_docs_is_of_second_order(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLERS", dict(sampling.SAMPLERS))
    exec(python_blocks("docs/training.md")["mysampler.py"], {})

    # The exact network of Gaussian data. Halving the steps of Heun quarters the error.
    def deviation(sampler, steps):
        x = sampling.sample(
            gaussian_net(0.0, 0.04),
            (4, 3, 8, 8),
            make_schedule("cosine", 8),
            sampler=sampler,
            steps=steps,
            grid="logsnr",
            clip=None,
            dtype=torch.float64,
        )
        return x.std().item()

    exact = deviation("dpmpp", 4000)
    for sampler, low, high in (("heun", 3.5, 4.5), ("ddim", 1.7, 2.3)):
        ratio = (deviation(sampler, 64) - exact) / (deviation(sampler, 128) - exact)
        assert low < ratio < high, (sampler, ratio)


def test_functions_of_the_training_page(tmp_path, monkeypatch):
    no_grid(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tiny = '{"base_channels": 8, "emb_channels": 16}'
    call(train.main, "--res 32 --steps 1 --batch 2 --out runs/shapes-32 --model-args", tiny)
    namespace = {}
    exec(python_blocks("docs/training.md")[""].replace("steps=25", "steps=2"), namespace)
    assert namespace["images"].shape == (10, 3, 32, 32)
    assert namespace["images"].dtype == torch.uint8
