"""Tests of docs/coursework.py: the handout, the checks, and what a submission cannot do."""

import ast
import contextlib
import io
import os
import re
import shutil
import sys
import tokenize
import types
from pathlib import Path
from textwrap import dedent

import pytest

from docs import coursework, coursework_checks
from docs.coursework import EXERCISES, FILES, ROOT
from docs.coursework_checks import CHECKS, run
from tests.helpers import call

# ---------------------------------------------------------------- submissions and their points


def text_of(path):
    return path.read_text(encoding="utf-8")


def body_of(file, function):
    """The body of a function of the project, without its docstring and indentation."""
    text = text_of(ROOT / file)
    lines = text.split("\n")
    first, last = coursework.body_lines(coursework.find(ast.parse(text), function), lines)
    return dedent("\n".join(lines[first - 1 : last]))


def put(folder, file, function, body):
    """Write the body of a function into a submission."""
    text = text_of(folder / file)
    lines = text.split("\n")
    node = coursework.find(ast.parse(text), function)
    first, last = coursework.body_lines(node, lines)
    margin = " " * (node.col_offset + 4)
    body = dedent(body).strip("\n").split("\n")
    lines[first - 1 : last] = [margin + line if line else line for line in body]
    (folder / file).write_text("\n".join(lines), encoding="utf-8")


def solve(folder, exercise):
    """Write the project's own solution of an exercise into a submission."""
    for function in exercise.functions:
        put(folder, exercise.file, function, body_of(exercise.file, function))


@pytest.fixture(scope="module")
def handouts(tmp_path_factory):
    """A folder with a handout, blank/, and a solved submission, solved/."""
    folder = tmp_path_factory.mktemp("coursework")
    coursework.blank(folder / "blank")
    (folder / "solved").mkdir()
    for file in FILES:
        shutil.copy(folder / "blank" / file, folder / "solved")
    for exercise in EXERCISES:
        solve(folder / "solved", exercise)
    return folder


@pytest.fixture
def blank(handouts, tmp_path):
    """A copy of the handout."""
    return shutil.copytree(handouts / "blank", tmp_path / "blank")


@pytest.fixture
def solved(handouts, tmp_path):
    """A copy of the solved submission."""
    return shutil.copytree(handouts / "solved", tmp_path / "solved")


def import_from(path):
    """Execute a file as the module of its name. It then is what an import statement finds."""
    module = types.ModuleType(path.stem)
    sys.modules[path.stem] = module
    exec(compile(text_of(path), path, "exec"), module.__dict__)


@contextlib.contextmanager
def modules_restored():
    """On exit, imports find the project's own modules again."""
    before = dict(sys.modules)
    try:
        yield
    finally:
        sys.modules.update(before)


def results_of(folder, exercise):
    """Run the checks of an exercise on its file in a folder. Returns [(passed, message), ...]."""
    with modules_restored():
        import_from(folder / exercise.file)
        return [run(check) for check in CHECKS if check.exercise == exercise.number]


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the checks in this process: an interpreter that imports torch takes 3 seconds."""

    def write_file(folder, exercise, grafted):
        (folder / exercise.file).write_text(grafted, encoding="utf-8")

    def run_checks(folder, exercise, seconds):
        return dict(enumerate(results_of(Path(folder), exercise))), ""

    monkeypatch.setattr(coursework, "write_copy", write_file)
    monkeypatch.setattr(coursework, "run_checks", run_checks)


def possible_points(number):
    return len(coursework.check_names()[number])


# ---------------------------------------------------------------- the handout


def test_the_handout_has_the_project_and_no_tests(handouts):
    names = {str(path.relative_to(handouts / "blank")) for path in handouts.glob("blank/**/*")}
    assert {*FILES, "uvit.py", "fid.py", "README.md", "LICENSE", "EXERCISES.md"} <= names
    assert {"support/data.py", "docs/judge.py", "assets/shapes32.png"} <= names
    hidden = r"tests|related|runs|\.git/|docs/coursework|test_|.*__pycache__"
    assert not [name for name in names if re.match(hidden, name)]

    # The questions are the second part of docs/coursework.md.
    questions = text_of(handouts / "blank" / "EXERCISES.md")
    assert questions.startswith("# The exercises\n")
    assert text_of(ROOT / "docs" / "coursework.md").endswith(questions)


def test_only_bodies_and_formulas_are_replaced(handouts):
    for file in FILES:
        assert text_of(handouts / "blank" / file).count("raise NotImplementedError") == sum(
            len(exercise.functions) for exercise in EXERCISES if exercise.file == file
        )
        # With the bodies put back, all that differs are the formulas.
        texts = [text_of(folder / file) for folder in (handouts / "solved", ROOT)]
        solved, original = map(coursework.hide_formulas, texts)
        assert solved == original
    for file in ("fid.py", "support/data.py", "assets/shapes32.png"):
        assert (handouts / "blank" / file).read_bytes() == (ROOT / file).read_bytes()


def test_docstrings_stay_and_do_not_give_answers_away(handouts):
    # A product such as "alpha x" or "decay * ema" in a docstring or a comment.
    product = re.compile(r"\b(alpha|sigma|scale|decay)(_[ts])? (\* )?\(*(x|eps|z|v|ema|net)\b")
    assert product.search("z = alpha_t x") and product.search("decay * ema")
    for file in FILES:
        text = text_of(handouts / "blank" / file)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                assert not product.search(token.string), token.string

        # Docstrings are there, apart from formulas.
        for exercise in EXERCISES:
            for function in exercise.functions if exercise.file == file else []:
                docstrings = [
                    ast.get_docstring(coursework.find(ast.parse(source), function))
                    for source in (text, coursework.hide_formulas(text_of(ROOT / file)))
                ]
                assert docstrings[0] == docstrings[1]
    assert "v = [exercise 3], the network's target." in text_of(handouts / "blank" / "schedule.py")


def test_the_handout_imports_and_names_the_exercise(handouts):
    paths = sorted(path for path in handouts.glob("blank/**/*.py"))
    for path in paths:
        compile(text_of(path), path, "exec")
    with modules_restored():
        for name in ("schedule", "loss", "unet", "uvit", "sample", "fid", "train"):
            import_from(handouts / "blank" / f"{name}.py")
        from schedule import posterior

        with pytest.raises(NotImplementedError, match="exercise 6: the posterior"):
            posterior(None, None, None, None)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_blank_refuses_what_exists(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.touch()
    else:
        target.mkdir()
        (target / "thesis.txt").touch()
    with pytest.raises(SystemExit, match=r"target exists.*empty folder") as error:
        call(coursework.main, "blank", target)
    assert "\n" not in error.value.code
    assert not list(tmp_path.glob("**/*.py"))


def test_blank_accepts_an_empty_folder_and_new_parents(tmp_path, capsys):
    call(coursework.main, "blank", tmp_path)
    call(coursework.main, "blank", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "unet.py").exists()
    assert "EXERCISES.md" in capsys.readouterr().out


def test_wrong_options_are_one_line(tmp_path):
    for line, match in (
        (["grade", tmp_path], f"{tmp_path} contains none of"),
        (["grade", tmp_path / "none"], "none of"),
        (["grade", tmp_path, "--exercise 13"], "--exercise"),
        (["grade", tmp_path, "--seconds 0"], "--seconds"),
        (["mark", tmp_path], "mark"),
    ):
        with pytest.raises(SystemExit, match=match) as error:
            call(coursework.main, *line)
        assert "\n" not in error.value.code


def test_the_questions_name_points_functions_and_files():
    sections = coursework.questions().split("\n## ")[1:]
    points = []
    for exercise, section in zip(EXERCISES, sections, strict=True):
        points.append(possible_points(exercise.number))
        assert section.lower().startswith(f"{exercise.number}. {exercise.title}".lower()[:12])
        assert f"({points[-1]} points" in section.splitlines()[0]
        for name in (exercise.file, *exercise.functions):
            assert all(f"{part}" in section for part in name.split(".")[-2:])
    text = text_of(ROOT / "docs" / "coursework.md")
    assert f"There are {sum(points)} points" in text


def test_the_listed_checks_are_those_that_run():
    listed = coursework.check_names()
    for exercise in EXERCISES:
        names = [c.name for c in CHECKS if c.exercise == exercise.number]
        assert listed[exercise.number] == names
        assert len({*names}) == len(names) >= 4


# ---------------------------------------------------------------- points


def test_points_rise_with_each_solved_exercise(blank, in_this_process, capsys):
    points = coursework.grade(blank)
    assert all(got == 0 for got, _ in points.values())
    output = capsys.readouterr().out
    assert re.search(r"total +0 / 66, 0 of 12 exercises solved", output)
    assert "all checks: NotImplementedError: exercise 6: the posterior" in output

    for exercise in EXERCISES:
        solve(blank, exercise)
        points |= coursework.grade(blank, [exercise.number])
        assert points[exercise.number] == (possible_points(exercise.number),) * 2
        assert "1 of 1 exercises solved" in capsys.readouterr().out
    assert sum(got for got, _ in points.values()) == 66


# Other correct solutions: written literally from the paper, with loops, or with other functions.
OTHER_SOLUTIONS = {
    "logsnr_schedule_cosine": """
        t = torch.as_tensor(t)
        start = math.atan2(1, math.exp(logsnr_max / 2))
        end = math.atan2(1, math.exp(logsnr_min / 2))
        angle = (1 - t) * start + t * end
        return 2 * torch.log(torch.cos(angle) / torch.sin(angle))
    """,
    "logsnr_schedule_cosine_shifted": """
        factor = image_d / noise_d
        return logsnr_schedule_cosine(t, logsnr_min, logsnr_max) - math.log(factor**2)
    """,
    "alpha_sigma": """
        alpha = (1 / (1 + torch.exp(-logsnr))) ** 0.5
        sigma = (1 / (1 + torch.exp(logsnr))) ** 0.5
        if like is None:
            return alpha, sigma
        return _expand(alpha, like), _expand(sigma, like)
    """,
    "diffuse": """
        alpha, sigma = alpha_sigma(_expand(logsnr, x))
        return torch.addcmul(alpha * x, sigma, eps)
    """,
    "v_from_x_eps": """
        z = diffuse(x, eps, logsnr)
        alpha, sigma = alpha_sigma(logsnr, x)
        return (alpha * z - x) / sigma
    """,
    "x_from_v": """
        alpha, sigma = alpha_sigma(logsnr, z)
        return torch.lerp(-sigma * v, alpha * z - sigma * v, 1.0)
    """,
    "eps_from_v": """
        alpha, sigma = alpha_sigma(logsnr, z)
        return (z - alpha * x_from_v(z, v, logsnr)) / sigma
    """,
    "diffusion_loss": """
        from schedule import eps_from_v

        if space not in ["eps", "v"]:
            raise ValueError(space)
        t = torch.rand(x.shape[0]) if t is None else t
        eps = torch.randn(x.shape, dtype=x.dtype) if eps is None else eps
        logsnr = schedule(t)
        z = diffuse(x, eps, logsnr)
        v_hat = net(z, logsnr, label)
        if space == "v":
            return mean_squares(v_from_x_eps(x, eps, logsnr) - v_hat, multiscale), logsnr
        return mean_squares(eps - eps_from_v(z, v_hat, logsnr), multiscale), logsnr
    """,
    "multiscale_mean_squares": """
        height, width = error.shape[-2:]
        if min(height, width) < 32:
            raise ValueError("too small")
        losses = []
        for k in range(int(math.log2(min(height, width) / 32)) + 1):
            side = 2**k
            if height % side or width % side:
                raise ValueError("cannot be pooled")
            windows = error.unfold(2, side, side).unfold(3, side, side)
            losses.append(side * windows.mean((4, 5)).square().flatten(1).mean(1))
        return sum(losses)
    """,
    "posterior": """
        logsnr_t, logsnr_s = _expand(logsnr_t, z), _expand(logsnr_s, z)
        alpha_t, sigma_t = alpha_sigma(logsnr_t)
        alpha_s, sigma_s = alpha_sigma(logsnr_s)
        alpha_ts = alpha_t / alpha_s
        # Eq. 3. The difference of the squares needs expm1 to be precise.
        sigma_ts2 = -torch.expm1(logsnr_t - logsnr_s) * sigma_t**2
        mean = alpha_ts * sigma_s**2 / sigma_t**2 * z + alpha_s * sigma_ts2 / sigma_t**2 * x
        return mean, torch.log(sigma_ts2 * sigma_s**2 / sigma_t**2), torch.log(sigma_ts2)
    """,
    "ddpm_step": """
        mean, low, high = posterior(z, x_hat, logsnr_t, logsnr_s)
        std = low.exp() ** ((1 - interpolation) / 2) * high.exp() ** (interpolation / 2)
        return mean if noise is None else mean + std * noise
    """,
    "ddim_step": """
        alpha_t, sigma_t = alpha_sigma(logsnr_t, z)
        alpha_s, sigma_s = alpha_sigma(logsnr_s, z)
        eps_hat = (z - alpha_t * x_hat) / sigma_t
        return alpha_s * x_hat + sigma_s * eps_hat
    """,
    "guided.guided_net": """
        eta = scale - 1
        nothing = torch.as_tensor(null_label).expand_as(label)
        return (1 + eta) * net(z, logsnr, label) - eta * net(z, logsnr, nothing)
    """,
    "_lift": """
        N = x.shape[-1] // 2
        d = []
        for n in range(N):
            after = x[..., 2 * n + 2] if n < N - 1 else x[..., 2 * n]
            d.append(x[..., 2 * n + 1] - (x[..., 2 * n] + after) / 2)
        s = [x[..., 2 * n] + (d[max(n - 1, 0)] + d[n]) / 4 for n in range(N)]
        return torch.stack(s, -1), torch.stack(d, -1)
    """,
    "_unlift": """
        # Invert the matrix of the transform, whose rows are those of unit impulses.
        impulses = torch.eye(2 * smooth.shape[-1], dtype=smooth.dtype)
        matrix = torch.cat(_lift(impulses), 1)
        return torch.cat([smooth, detail], -1) @ torch.linalg.inv(matrix)
    """,
    "ResBlock.forward": """
        h = self.norm1(x)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip)) * 0.5**0.5
        h = self.norm2(self.conv1(h * torch.sigmoid(h)))
        channels = h.shape[1]
        film = self.film(emb)
        scale, shift = film[:, :channels, None, None], film[:, channels:, None, None]
        h = h + h * scale + shift
        return self.conv2(self.dropout(h * torch.sigmoid(h))) + x
    """,
    "ema_update": """
        for old, new in zip(ema_net.parameters(), net.parameters()):
            old.mul_(decay).add_(new, alpha=1 - decay)
        for old, new in zip(ema_net.buffers(), net.buffers()):
            old.copy_(new)
    """,
}


def test_other_correct_solutions_earn_all_points(blank, in_this_process, capsys):
    for exercise in EXERCISES:
        for function in exercise.functions:
            put(blank, exercise.file, function, OTHER_SOLUTIONS[function])
    points = coursework.grade(blank)
    assert all(got == of for got, of in points.values()), capsys.readouterr().out


# Typical mistakes: exercise, function, body, and the points that are left.
MISTAKES = {
    "clamped instead of truncated": (
        1,
        "logsnr_schedule_cosine",
        """
        angle = torch.as_tensor(t) * (math.pi / 2)
        return (-2 * torch.log(torch.tan(angle))).clamp(logsnr_min, logsnr_max)
        """,
        3,
    ),
    "limits exchanged": (
        1,
        "logsnr_schedule_cosine",
        """
        t_min = math.atan(math.exp(-0.5 * logsnr_min))
        t_max = math.atan(math.exp(-0.5 * logsnr_max))
        return -2 * torch.log(torch.tan(t_min + torch.as_tensor(t) * (t_max - t_min)))
        """,
        1,
    ),
    "in Python numbers": (
        1,
        "logsnr_schedule_cosine",
        """
        t_min = math.atan(math.exp(-0.5 * logsnr_max))
        t_max = math.atan(math.exp(-0.5 * logsnr_min))
        t = torch.as_tensor(t)
        rows = [-2 * math.log(math.tan(t_min + u * (t_max - t_min))) for u in t.flatten().tolist()]
        return torch.tensor(rows, dtype=t.dtype).reshape(t.shape)
        """,
        4,
    ),
    "sign of the shift": (
        2,
        "logsnr_schedule_cosine_shifted",
        """
        logsnr = logsnr_schedule_cosine(t, logsnr_min, logsnr_max)
        return logsnr + 2 * math.log(image_d / noise_d)
        """,
        2,
    ),
    "half of the shift": (
        2,
        "logsnr_schedule_cosine_shifted",
        "return logsnr_schedule_cosine(t, logsnr_min, logsnr_max) + math.log(noise_d / image_d)",
        2,
    ),
    "shift before truncation": (
        2,
        "logsnr_schedule_cosine_shifted",
        """
        shift = 2 * math.log(noise_d / image_d)
        return logsnr_schedule_cosine(t, logsnr_min - shift, logsnr_max - shift) + shift
        """,
        2,
    ),
    "limits not passed on": (
        2,
        "logsnr_schedule_cosine_shifted",
        "return logsnr_schedule_cosine(t) + 2 * math.log(noise_d / image_d)",
        4,
    ),
    "alpha and sigma exchanged": (
        3,
        "alpha_sigma",
        """
        logsnr = logsnr if like is None else _expand(logsnr, like)
        return torch.sigmoid(-logsnr).sqrt(), torch.sigmoid(logsnr).sqrt()
        """,
        0,
    ),
    "root of a difference": (
        3,
        "alpha_sigma",
        """
        logsnr = logsnr if like is None else _expand(logsnr, like)
        alpha = torch.sigmoid(logsnr).sqrt()
        return alpha, (1 - alpha**2).sqrt()
        """,
        6,
    ),
    "like ignored": (
        3,
        "alpha_sigma",
        "return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()",
        2,
    ),
    "roles in diffuse": (
        3,
        "diffuse",
        """
        alpha, sigma = alpha_sigma(logsnr, like=x)
        return sigma * x + alpha * eps
        """,
        6,
    ),
    "sign of v": (
        3,
        "v_from_x_eps",
        """
        alpha, sigma = alpha_sigma(logsnr, like=x)
        return sigma * x - alpha * eps
        """,
        6,
    ),
    "x in the wrong direction": (
        3,
        "x_from_v",
        """
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return alpha * z + sigma * v
        """,
        6,
    ),
    "eps in the wrong direction": (
        3,
        "eps_from_v",
        """
        alpha, sigma = alpha_sigma(logsnr, like=z)
        return alpha * z - sigma * v
        """,
        6,
    ),
}


def loss_with(
    error,
    call_net="net(z, logsnr, label)",
    scales="multiscale",
    t="len(x)",
    eps="torch.randn_like(x)",
):
    """The body of diffusion_loss with a mistake."""
    return f"""
        if space not in ("eps", "v"):
            raise ValueError(space)
        if t is None:
            t = torch.rand({t})
        if eps is None:
            eps = {eps}
        logsnr = schedule(t)
        z = diffuse(x, eps, logsnr)
        v_hat = {call_net}
        alpha, sigma = alpha_sigma(logsnr, like=x)
        v = v_from_x_eps(x, eps, logsnr)
        error = v - v_hat
        if space == "eps":
            error = {error}
        return mean_squares(error, {scales}), logsnr
    """


def pooling_with(weight, pooled="F.avg_pool2d(error, factor)", smallest=32):
    """The body of multiscale_mean_squares with a mistake."""
    return f"""
        height, width = error.shape[2:]
        d = min(height, width)
        if d < 32 or height % 2 ** int(math.log2(d / 32)) or width % 2 ** int(math.log2(d / 32)):
            raise ValueError
        total = 0
        factor = 1
        while d // factor >= {smallest}:
            s = d // factor
            total = total + {weight} * {pooled}.square().mean((1, 2, 3))
            factor *= 2
        return total
    """


def posterior_with(result, one_minus_r="-torch.expm1(log_r)"):
    """The body of posterior with a mistake."""
    return f"""
        logsnr_t, logsnr_s = _expand(logsnr_t, z), _expand(logsnr_s, z)
        alpha_t, _ = alpha_sigma(logsnr_t)
        alpha_s, _ = alpha_sigma(logsnr_s)
        log_r = logsnr_t - logsnr_s
        one_minus_r = {one_minus_r}
        r = 1 - one_minus_r
        mean = r * alpha_s / alpha_t * z + one_minus_r * alpha_s * x
        low = one_minus_r.log() + F.logsigmoid(-logsnr_s)
        high = one_minus_r.log() + F.logsigmoid(-logsnr_t)
        return {result}
    """


def step_with(std, last="mean"):
    """The body of ddpm_step with a mistake."""
    return f"""
        mean, low, high = posterior(z, x_hat, logsnr_t, logsnr_s)
        if noise is None:
            return {last}
        return mean + {std} * noise
    """


def guidance_with(result, both="[label, nulls]"):
    """The body of guided_net with a mistake."""
    return f"""
        nulls = torch.as_tensor(null_label).expand_as(label)
        both = net(torch.cat([z, z]), torch.cat([logsnr, logsnr]), torch.cat({both}))
        cond, uncond = both.chunk(2)
        return {result}
    """


def lifting_with(next_even, previous="torch.cat([d[..., :1], d[..., :-1]], -1)", weight="1 / 4"):
    """The body of _lift with a mistake."""
    return f"""
        even, odd = x[..., 0::2], x[..., 1::2]
        d = odd - (even + {next_even}) / 2
        return even + {weight} * ({previous} + d), d
    """


MIRRORED = "torch.cat([even[..., 1:], even[..., -1:]], -1)"


JOINED = "(h + self.norm_skip(skip)) / math.sqrt(2)"


def block_with(film, join=JOINED, end="self.dropout(F.silu(h))"):
    """The body of ResBlock.forward with a mistake."""
    return f"""
        h = self.norm1(x)
        if skip is not None:
            h = {join}
        h = self.norm2(self.conv1(F.silu(h)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = {film}
        return x + self.conv2({end})
    """


def average_with(update, buffers="average.copy_(buffer)"):
    """The body of ema_update with a mistake."""
    return f"""
        for old, new in zip(ema_net.parameters(), net.parameters()):
            {update}
        for average, buffer in zip(ema_net.buffers(), net.buffers()):
            {buffers}
    """


LOSS, POOL, GUIDED = "diffusion_loss", "multiscale_mean_squares", "guided.guided_net"
MISTAKES |= {
    "x_hat for eps_hat": (4, LOSS, loss_with("eps - (alpha * z - sigma * v_hat)"), 3),
    "sign of v_hat in eps_hat": (4, LOSS, loss_with("eps - (sigma * z - alpha * v_hat)"), 4),
    "sigma instead of alpha": (4, LOSS, loss_with("sigma * (v - v_hat)"), 4),
    "v loss in eps space": (4, LOSS, loss_with("error"), 4),
    "one scale": (4, LOSS, loss_with("alpha * error", scales="False"), 6),
    "label dropped": (4, LOSS, loss_with("alpha * error", "net(z, logsnr, None)"), 6),
    "t for logsnr": (4, LOSS, loss_with("alpha * error", "net(z, t, label)"), 5),
    "one t for all": (4, LOSS, loss_with("alpha * error", t="1) * torch.ones(len(x)"), 6),
    "fixed t": (4, LOSS, loss_with("alpha * error", t="1) * 0 + torch.linspace(0, 1, len(x)"), 6),
    "one eps for all channels": (
        4,
        LOSS,
        loss_with("alpha * error", eps="torch.randn(len(x), 1, *x.shape[2:]).expand_as(x).to(x)"),
        6,
    ),
    "one eps for all pixels": (
        4,
        LOSS,
        loss_with("alpha * error", eps="torch.randn(len(x), 1, 1, 1).expand_as(x).to(x)"),
        6,
    ),
    "pooled to a square": (
        5,
        POOL,
        pooling_with("factor", "F.adaptive_avg_pool2d(error, (s, s))"),
        4,
    ),
    "weights 1 / s": (5, POOL, pooling_with("1 / s"), 1),
    "weights s / d": (5, POOL, pooling_with("s / d"), 1),
    "no weights": (5, POOL, pooling_with("1"), 1),
    "not pooled": (5, POOL, pooling_with("factor", "error"), 3),
    "one size too few": (5, POOL, pooling_with("factor", smallest=64), 1),
    "summed in place of averaged": (5, POOL, pooling_with("factor", "(3 * error)"), 1),
    "bounds exchanged": (6, "posterior", posterior_with("mean, high, low"), 2),
    "variances, not logarithms": (6, "posterior", posterior_with("mean, low.exp(), high.exp()"), 1),
    "1 - exp": (6, "posterior", posterior_with("mean, low, high", "1 - log_r.exp()"), 5),
    "r inverted": (6, "posterior", posterior_with("mean, low, high", "-torch.expm1(-log_r)"), 0),
    "interpolated the other way": (
        7,
        "ddpm_step",
        step_with("torch.exp(0.5 * ((1 - interpolation) * high + interpolation * low))"),
        1,
    ),
    "variance for standard deviation": (
        7,
        "ddpm_step",
        step_with("torch.exp(interpolation * high + (1 - interpolation) * low)"),
        1,
    ),
    "variances interpolated": (
        7,
        "ddpm_step",
        step_with("((1 - interpolation) * low.exp() + interpolation * high.exp()).sqrt()"),
        3,
    ),
    "x_hat in the last step": (
        7,
        "ddpm_step",
        step_with("torch.exp(0.5 * (interpolation * high + (1 - interpolation) * low))", "x_hat"),
        3,
    ),
    "eps left at the old noise level": (
        8,
        "ddim_step",
        """
        alpha_t, sigma_t = alpha_sigma(logsnr_t, like=z)
        alpha_s, sigma_s = alpha_sigma(logsnr_s, like=z)
        return alpha_s * x_hat + (z - alpha_t * x_hat)
        """,
        2,
    ),
    "t and s exchanged": (
        8,
        "ddim_step",
        """
        alpha_t, sigma_t = alpha_sigma(logsnr_s, like=z)
        alpha_s, sigma_s = alpha_sigma(logsnr_t, like=z)
        return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t
        """,
        1,
    ),
    "eta for 1 + eta": (9, GUIDED, guidance_with("cond + scale * (cond - uncond)"), 0),
    "labels exchanged": (
        9,
        GUIDED,
        guidance_with("uncond + scale * (cond - uncond)", "[nulls, label]"),
        0,
    ),
    "interpolated, not extrapolated": (9, GUIDED, guidance_with("uncond / scale + cond"), 0),
    "periodic": (10, "_lift", lifting_with("even.roll(-1, -1)", "d.roll(1, -1)"), 2),
    "zeros behind the end": (
        10,
        "_lift",
        lifting_with("F.pad(even, (0, 1))[..., 1:]", "F.pad(d, (1, 0))[..., :-1]"),
        2,
    ),
    "update by a half": (10, "_lift", lifting_with(MIRRORED, weight="1 / 2"), 1),
    "neighbor on the left": (10, "_lift", lifting_with("even"), 2),
    "no 1 + scale": (11, "ResBlock.forward", block_with("h * scale + shift"), 1),
    "scale and shift exchanged": (11, "ResBlock.forward", block_with("h * (1 + shift) + scale"), 4),
    "FiLM without shift": (11, "ResBlock.forward", block_with("h * (1 + scale)"), 4),
    "skip not normalized": (
        11,
        "ResBlock.forward",
        block_with("h * (1 + scale) + shift", "(h + skip) / math.sqrt(2)"),
        5,
    ),
    "skip averaged": (
        11,
        "ResBlock.forward",
        block_with("h * (1 + scale) + shift", "(h + self.norm_skip(skip)) / 2"),
        5,
    ),
    "dropout before SiLU and FiLM": (
        11,
        "ResBlock.forward",
        block_with("self.dropout(h) * (1 + scale) + shift", end="F.silu(h)"),
        5,
    ),
    "dropout before SiLU": (
        11,
        "ResBlock.forward",
        block_with("h * (1 + scale) + shift", end="F.silu(self.dropout(h))"),
        5,
    ),
    "dropout in sampling, too": (
        11,
        "ResBlock.forward",
        block_with("h * (1 + scale) + shift", end="F.dropout(F.silu(h), self.dropout.p)"),
        5,
    ),
    "the norm of the block for the skip": (
        11,
        "ResBlock.forward",
        block_with("h * (1 + scale) + shift", "(h + self.norm1(skip)) / math.sqrt(2)"),
        5,
    ),
    "EMA the wrong way round": (
        12,
        "ema_update",
        average_with("old.copy_((1 - decay) * old + decay * new)"),
        1,
    ),
    "buffers not copied": (
        12,
        "ema_update",
        average_with("old.lerp_(new, 1 - decay)", "pass"),
        4,
    ),
    "weights rebound": (12, "ema_update", average_with("old = decay * old + (1 - decay) * new"), 1),
    "shared memory": (
        12,
        "ema_update",
        average_with("old.data = new.data if decay == 0 else torch.lerp(new, old, decay)"),
        4,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_lose_points(solved, mistake):
    number, function, body, points = MISTAKES[mistake]
    exercise = EXERCISES[number - 1]
    put(solved, exercise.file, function, body)
    results = results_of(solved, exercise)
    assert sum(passed for passed, _ in results) == points, results
    assert points < len(results)


# ---------------------------------------------------------------- what counts in a submission


def graded(folder, number):
    """The points of one exercise, and what is printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        points, _ = coursework.grade(folder, [number])[number]
    return points, output.getvalue()


def test_constants_of_every_form_count():
    code = "A, (B, C) = 1, (2, 3)\nD: float = 4\nE: float\nTABLE = {}\nTABLE[A] = 5\nTABLE.x = 6"
    names = coursework.top_level_names(ast.parse(code))
    assert sorted(names) == ["A", "B", "C", "D", "TABLE"]
    # An assignment to a part of the table does not take its place.
    assert ast.unparse(names["TABLE"]) == "TABLE = {}"


def add(folder, file, text, at_start=False):
    """Add text to the start or the end of a file of a submission."""
    old = text_of(folder / file)
    (folder / file).write_text(text + old if at_start else old + text, encoding="utf-8")


def test_added_helpers_constants_and_imports_count(solved, in_this_process):
    put(solved, "schedule.py", "diffuse", "return mix(x, eps, logsnr)")
    helpers = """
from numpy import sqrt, tan
import numpy.linalg as linalg, numpy as arrays
import unavailable_module

HALF = 0.5
UNUSED = unavailable_module.value


def power(x):
    return x**HALF if arrays.array(linalg.norm([1.0])) == sqrt(1.0) else None


class Mixture:
    def __init__(self, logsnr, like):
        self.scales = [power(torch.sigmoid(_expand(s * logsnr, like))) for s in (1, -1)]


def mix(x, eps, logsnr):
    alpha, sigma = Mixture(logsnr, x).scales
    return alpha * x + sigma * eps
"""
    add(solved, "schedule.py", helpers)
    points, output = graded(solved, 3)
    assert points == 7, output

    # Only what the answer uses is taken: the import that fails is not.
    grafted = coursework.graft(
        text_of(ROOT / "schedule.py"),
        EXERCISES[2],
        coursework.read_submission(solved, "schedule.py"),
    )
    assert "def mix" in grafted and "from numpy import sqrt\n" in grafted
    assert "unavailable" not in grafted and "tan\n" not in grafted


def test_a_name_added_to_an_import_counts(blank, in_this_process):
    body = OTHER_SOLUTIONS["diffusion_loss"].replace("from schedule import eps_from_v", "")
    put(blank, "loss.py", "diffusion_loss", body)
    text = text_of(blank / "loss.py")
    line = "from schedule import alpha_sigma, "
    assert line in text
    (blank / "loss.py").write_text(text.replace(line, line + "eps_from_v, "), encoding="utf-8")
    points, output = graded(blank, 4)
    assert points == 7, output


def test_existing_functions_are_not_replaced(solved, in_this_process):
    # A wrong answer to exercise 1 does not cost exercise 2, which calls it.
    put(solved, "schedule.py", "logsnr_schedule_cosine", "return t")
    assert graded(solved, 1)[0] < 5
    assert graded(solved, 2)[0] == 5

    # The same holds for a function that is defined again, and for an import of its name.
    add(
        solved,
        "schedule.py",
        "def _expand(logsnr, like):\n    return 0\nfrom math import tau as F\n",
    )
    for number in (2, 3, 6):
        assert graded(solved, number)[0] == possible_points(number)


def test_only_bodies_count(solved, in_this_process):
    # Other defaults and a decorator would change the results.
    text = text_of(solved / "schedule.py")
    changed = text.replace("logsnr_min=-15.0", "logsnr_min=open('stolen')")
    changed = changed.replace("def diffuse", "@print\ndef diffuse")
    assert changed.count("open(") >= 2
    (solved / "schedule.py").write_text(changed, encoding="utf-8")
    for number in (1, 2, 3):
        assert graded(solved, number)[0] == possible_points(number)


def test_missing_functions_and_files(solved, in_this_process):
    text = text_of(solved / "schedule.py")
    (solved / "schedule.py").write_text(text.replace("def x_from_v", "def y_from_v"))
    points, output = graded(solved, 3)
    assert points == 6
    assert "NotImplementedError: x_from_v is missing" in output

    (solved / "loss.py").unlink()
    for number in (4, 5):
        points, output = graded(solved, number)
        assert points == 0
        assert "all checks: loss.py is missing" in output
    assert graded(solved, 6)[0] == 6


def test_a_syntax_error_costs_one_function(solved, in_this_process):
    for broken in (
        ("return alpha * x + sigma * eps", "return alpha * x + sigma * eps)"),
        ("return alpha * x + sigma * eps", '"""never closed'),
        ("return alpha * x + sigma * eps", "  return 1"),
        ("def diffuse(x, eps, logsnr):", "def diffuse(x, eps, logsnr)"),
    ):
        text = text_of(solved / "schedule.py")
        assert broken[0] in text
        (solved / "schedule.py").write_text(text.replace(*broken))
        points, output = graded(solved, 3)
        assert points == 6, output
        assert "NotImplementedError: diffuse is missing" in output
        for number in (1, 2, 6):
            assert graded(solved, number)[0] == possible_points(number)
        (solved / "schedule.py").write_text(text)

    # In a class and in a nested function, too.
    add(solved, "unet.py", "\n)\n")
    for number in (10, 11):
        assert graded(solved, number)[0] == 6
    text = text_of(solved / "sample.py").replace("def sample_ddim(", "def sample_ddim((")
    (solved / "sample.py").write_text(text)
    for number in (7, 8, 9):
        assert graded(solved, number)[0] == possible_points(number)

    # An error that only the compiler finds: it costs its exercise.
    put(solved, "schedule.py", "posterior", "break")
    with pytest.raises(SyntaxError):
        graded(solved, 6)
    assert graded(solved, 3)[0] == 7


NO_SOURCE = {
    "empty": b"",
    "null byte": b"\0",
    "binary": b"\xff\xfe",
    "brackets": b"(" * 10**5,
    "signs": b"-" * 10**5 + b"1",
    "sum": b"1" + b"+1" * 10**5,
    "large": b"x" * 10**7,
}


@pytest.mark.parametrize("name", NO_SOURCE)
def test_files_that_are_no_source(tmp_path, in_this_process, name):
    (tmp_path / "schedule.py").write_bytes(NO_SOURCE[name])
    points, output = graded(tmp_path, 1)
    assert points == 0
    assert "missing" in output or "more than" in output


def test_windows_line_ends_and_a_byte_order_mark(solved, in_this_process):
    content = (solved / "unet.py").read_bytes().replace(b"\n", b"\r\n")
    (solved / "unet.py").write_bytes(b"\xef\xbb\xbf" + content)
    assert graded(solved, 10)[0] == 6


def test_links_and_pipes_are_not_read(tmp_path):
    # A link could point to the solutions. Opening a pipe would wait for a writer.
    (tmp_path / "schedule.py").symlink_to(ROOT / "schedule.py")
    os.mkfifo(tmp_path / "loss.py")
    for file in ("schedule.py", "loss.py"):
        with pytest.raises(ValueError, match=f"{file} is missing, or not a regular file"):
            coursework.read_submission(tmp_path, file)


def test_only_lines_with_the_token_are_reported():
    report = b"""
0123 0 True \n1 True
guessed 1 True
\xff\xfe
 0123 2 True
0123 3 False red \x1b[31m
"""
    assert coursework.read_report(report, "0123") == {0: (True, ""), 3: (False, "red  [31m")}


REPLACEMENTS = {
    "builtins.abs": lambda x: 0,
    "builtins.zip": lambda *args: (),
    "torch.Tensor.tolist": lambda x: [],
    "docs.coursework_checks.expect": lambda *args: None,
    "docs.coursework_checks.require": lambda *args: None,
    "docs.coursework_checks.expect_value_error": lambda *args: None,
    "docs.coursework_checks.run": lambda check: (True, ""),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_decoys_notice_what_a_submission_replaces(monkeypatch, name):
    decoys = coursework_checks.checks_that_fail()
    assert not any(coursework_checks.run(decoy)[0] for decoy in decoys)
    with monkeypatch.context() as patch:
        patch.setattr(name, REPLACEMENTS[name])
        passed = [coursework_checks.run(decoy)[0] for decoy in decoys]
    assert any(passed)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), AssertionError()])
def test_no_exception_passes_a_check(monkeypatch, error):
    import schedule

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(schedule, "logsnr_schedule_cosine", fail)
    for check in CHECKS:
        if check.exercise == 1:
            passed, message = run(check)
            assert not passed
            assert type(error).__name__ in message


# ---------------------------------------------------------------- real processes


def test_a_real_process_with_all_kinds_of_answers(blank):
    # Right, wrong, missing; a polite end and a sudden one.
    for function in ("alpha_sigma", "diffuse"):
        put(blank, "schedule.py", function, body_of("schedule.py", function))
    put(blank, "schedule.py", "v_from_x_eps", "print('0' * 10**6)\nimport sys\nsys.exit(0)")
    put(blank, "schedule.py", "x_from_v", "import os\nos._exit(0)")

    # What else is in the submission has no effect.
    for folder, file in (("docs", "coursework_checks.py"), ("tests", "test_coursework.py")):
        (blank / folder).mkdir(exist_ok=True)
        (blank / folder / file).write_text("print('all passed')\n")
    (blank / "torch.py").write_text("raise SystemExit\n")

    points, output = graded(blank, 3)
    assert points == 4
    assert "v_from_x_eps: SystemExit: 0" in output
    assert "x_from_v recovers x: the process ended before this check" in output
    assert "eps_from_v recovers eps: the process ended before this check" in output


@pytest.mark.slow
def test_a_whole_submission_in_real_processes(solved, capsys):
    call(coursework.main, "grade", solved)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    for exercise, line in zip(EXERCISES, lines):
        assert re.fullmatch(rf" ?{exercise.number}  {exercise.title} +(\d) / \1", line)
    assert re.fullmatch(r"total +66 / 66, 12 of 12 exercises solved", lines[-1])


@pytest.mark.slow
def test_loops_memory_processes_and_cheats(solved, tmp_path, capsys):
    # The first check passes, then the loop begins.
    put(
        solved,
        "sample.py",
        "ddpm_step",
        """
        while noise is not None:
            pass
        return posterior(z, x_hat, logsnr_t, logsnr_s)[0]
        """,
    )
    put(
        solved,
        "sample.py",
        "ddim_step",
        """
        hoard = []
        while True:
            hoard.append(torch.ones(10**7))
        """,
    )
    # Attempts to change the checks, by their module and by the stack.
    put(
        solved,
        "schedule.py",
        "logsnr_schedule_cosine",
        """
        import __main__

        __main__.run = lambda check: (True, "")
        __main__.expect = __main__.require = lambda *args: None
        return torch.as_tensor(t)
        """,
    )
    put(
        solved,
        "schedule.py",
        "logsnr_schedule_cosine_shifted",
        """
        import sys

        sys._getframe(1).f_globals["expect"] = lambda *args: None
        return torch.as_tensor(t)
        """,
    )
    # A process that outlives the checks. Only root can start one.
    put(
        solved,
        "loss.py",
        "multiscale_mean_squares",
        f"""
        import os
        import time

        if os.fork() == 0:
            with open({str(tmp_path / "pids")!r}, "a") as file:
                file.write(f"{{os.getpid()}} ")
            time.sleep(600)
        raise ValueError
        """,
    )
    call(coursework.main, "grade", solved, "--exercise 1 2 5 7 8 --seconds 8")
    output = capsys.readouterr().out
    assert re.search(r"the cosine schedule +0 / 5", output)
    assert re.search(r"the shift +0 / 5", output)
    assert "the submission changes how results are compared" in output
    assert re.search(r"the multiscale loss +1 / 5", output)  # the errors that are expected
    assert re.search(r"a step of DDPM +1 / 4", output)
    assert "no result within 8 seconds" in output
    assert re.search(r"a step of DDIM +0 / 5", output)
    assert "can't allocate memory" in output

    if (tmp_path / "pids").exists():
        for pid in text_of(tmp_path / "pids").split():
            # Gone, or ended and not yet collected by init.
            stat = Path("/proc", pid, "stat")
            assert not stat.exists() or text_of(stat).split()[2] == "Z"
