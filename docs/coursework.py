"""Coursework that grades itself: twelve exercises in the order of the paper.

    python docs/coursework.py blank handout/       # the project without its twelve solutions
    python docs/coursework.py grade submission/    # run the checks, print a table of points

docs/coursework.md has the exercises, and tells a teacher how to hand out and how to grade. The
checks are in docs/coursework_checks.py. This file needs Python only; the checks need torch.

`blank` finds the functions in the syntax tree of each file and replaces the lines of their bodies.
All other lines stay as they are.

`grade` runs the code of a submission, so it trusts nothing in it. For each exercise it copies the
grader's own project into a temporary folder, and grafts the submission's function bodies into the
copy. An error thus costs its own exercise only, and a submission cannot change the checks. They run
in a process with limits on time and memory. The process reports each passed check together with a
secret token, so the end of the process, or what it prints, earns nothing.
"""

import argparse
import ast
import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent  # the folder of the project

# ---------------------------------------------------------------- the exercises


class Exercise(NamedTuple):
    number: int
    title: str
    file: str
    functions: Sequence[str]  # "function", "Class.method" or "function.inner_function"


EXERCISES = [
    Exercise(1, "the cosine schedule", "schedule.py", ["logsnr_schedule_cosine"]),
    Exercise(2, "the shift", "schedule.py", ["logsnr_schedule_cosine_shifted"]),
    Exercise(
        3,
        "diffuse and v",
        "schedule.py",
        ["alpha_sigma", "diffuse", "v_from_x_eps", "x_from_v", "eps_from_v"],
    ),
    Exercise(4, "the loss in eps space, through v", "loss.py", ["diffusion_loss"]),
    Exercise(5, "the multiscale loss", "loss.py", ["multiscale_mean_squares"]),
    Exercise(6, "the posterior", "schedule.py", ["posterior"]),
    Exercise(7, "a step of DDPM", "sample.py", ["ddpm_step"]),
    Exercise(8, "a step of DDIM", "sample.py", ["ddim_step"]),
    Exercise(9, "guidance", "sample.py", ["guided.guided_net"]),
    Exercise(10, "the 5/3 wavelet and its inverse", "unet.py", ["_lift", "_unlift"]),
    Exercise(11, "FiLM in the ResBlock", "unet.py", ["ResBlock.forward"]),
    Exercise(12, "the EMA", "train.py", ["ema_update"]),
]
FILES = sorted({exercise.file for exercise in EXERCISES})  # what a student hands in


def find(tree, path):
    """Return the function "name", "Class.name" or "function.name" of a syntax tree, or None."""
    for name in path.split("."):
        found = [
            node
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
        ]
        if not found:
            return None
        tree = found[-1]  # Python, too, uses the last definition
    return tree if isinstance(tree, ast.FunctionDef) else None


# ---------------------------------------------------------------- blank: the handout

# What a student gets: files at the top level, and folders with files of these kinds.
TOP_FILES = [
    "schedule.py",
    "loss.py",
    "unet.py",
    "uvit.py",
    "sample.py",
    "fid.py",
    "train.py",
    "README.md",
    "LICENSE",
    "requirements.txt",
    "requirements-dev.txt",
    "pyproject.toml",
    ".gitignore",
]
FOLDERS = ["support", "docs", "assets"]
SUFFIXES = {".py", ".md", ".png"}

# Formulas in docstrings, comments and Markdown that give an answer away. The number of the exercise
# takes their place. Code has a * in its products, so it is never changed.
GIVE_AWAYS = [
    (3, "alpha x + sigma eps"),
    (3, "alpha_t x + sigma_t eps"),
    (3, "alpha eps - sigma x"),
    (3, "alpha z - sigma v"),
    (3, "sigma z + alpha v"),
    (4, "alpha (v - v_hat)"),
    (4, "-sigma (v - v_hat)"),
    (4, "sigmoid(logsnr) = alpha^2 times it"),
    (4, "alpha^2 ||v - v_hat||^2"),
    (8, "alpha_s x_hat + sigma_s eps_hat"),
    (8, "(z - alpha_t x_hat) / sigma_t"),
    (8, "(sigma_s / sigma_t) z - alpha_s expm1((logsnr_t - logsnr_s) / 2) x_hat"),
    (9, "eps_uncond + scale (eps_cond - eps_uncond)"),
    (12, "decay * ema + (1 - decay) * net"),
]


def project_files():
    """Return the paths of the files that a student gets, relative to the project."""
    # Only what is named: no trained runs, no history, and no environment that lies in the folder.
    paths = [Path(name) for name in TOP_FILES if (ROOT / name).is_file()]
    for folder in FOLDERS:
        # Not what is below: a teacher may keep submissions or handouts there.
        for path in sorted((ROOT / folder).glob("*")):
            is_coursework = path.name.startswith("coursework")
            if path.is_file() and path.suffix in SUFFIXES and not is_coursework:
                paths.append(path.relative_to(ROOT))
    return paths


def body_lines(node, lines):
    """Return the first and last line number of a function's body, without its docstring."""
    first, last = node.body[0].lineno, node.end_lineno
    if ast.get_docstring(node, clean=False) is not None:
        return node.body[0].end_lineno + 1, last
    # The comments above the first statement belong to the body.
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, last


def blank_bodies(text, exercises):
    """Replace the bodies of the functions of the exercises in the text of their file."""
    lines = text.split("\n")
    tree = ast.parse(text)
    places = []
    for exercise in exercises:
        for name in exercise.functions:
            node = find(tree, name)
            places.append((*body_lines(node, lines), node.col_offset, exercise))

    # From the end of the file to its start, so that line numbers stay valid.
    for first, last, indent, exercise in sorted(places, reverse=True):
        error = f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'
        lines[first - 1 : last] = [" " * (indent + 4) + error]
    return "\n".join(lines)


def hide_formulas(text):
    """Replace the formulas of GIVE_AWAYS by "[exercise N]"."""
    for number, formula in GIVE_AWAYS:
        # A formula can continue on the next line, behind the # of a comment.
        pattern = r"[\s#]+".join(re.escape(word) for word in formula.split())
        text = re.sub(pattern, f"[exercise {number}]", text)
    return text


def questions():
    """Return the part of docs/coursework.md that is for students."""
    text = (ROOT / "docs" / "coursework.md").read_text(encoding="utf-8")
    start = text.index("# The exercises\n")
    return text[start:]


def blank(folder):
    """Write the handout into a new or empty folder. Raises ValueError for another one."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists: name a new or an empty folder")

    # List the files first: the new folder may be inside of the project.
    paths = project_files()
    for path in paths:
        # Images are copied as they are. Code loses the bodies, and all text loses the formulas.
        content = (ROOT / path).read_bytes()
        if path.suffix in (".py", ".md"):
            text = content.decode("utf-8")
            exercises = [exercise for exercise in EXERCISES if exercise.file == str(path)]
            if exercises:
                text = blank_bodies(text, exercises)
            content = hide_formulas(text).encode("utf-8")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "EXERCISES.md").write_text(questions(), encoding="utf-8")
    print(f"wrote {len(paths) + 1} files to {folder}: the questions are in EXERCISES.md")


# ---------------------------------------------------------------- grade: reading a submission

MAX_BYTES = 10**6  # of a file of a submission; ours have up to 60,000


def read_submission(folder, name):
    """Return the syntax tree of a file of a submission. Raises ValueError if it cannot be read."""
    path = Path(folder, name)
    # A link could point to the grader's own solution. A device or a pipe could be endless.
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{name} is missing, or not a regular file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes")
    text = content.decode("utf-8-sig", errors="replace")
    try:
        return parse(text)
    except SyntaxError:
        return parse_what_is_possible(text)


def parse(text):
    """Parse Python source. Raises SyntaxError for whatever is wrong with it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes, for example
            return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, endless nesting
        raise SyntaxError(str(error)) from error


def parse_what_is_possible(text):
    """Return a syntax tree of those top-level statements of a broken file that can be parsed."""
    # A statement starts where a line is neither indented nor a comment nor a closing bracket.
    starts = re.compile(r"[^\s#)\]}]")
    blocks = [[]]
    for line in text.splitlines():
        follows_decorator = blocks[-1] and blocks[-1][-1].startswith("@")
        if starts.match(line) and not follows_decorator:
            blocks.append([])
        blocks[-1].append(line)

    tree = ast.Module(body=[], type_ignores=[])
    for block in blocks:
        try:
            tree.body += parse("\n".join(block)).body
        except SyntaxError:
            continue
    return tree


# ---------------------------------------------------------------- grade: grafting


def top_level_names(tree):
    """Return a dict from each name that a file defines at its top level to the statement.

    An import of several names is split, so that one of them can be taken alone.
    """
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            # Also the names of a tuple, as in A, B = 1, 2. TABLE[0] = 1 stores to no name.
            targets = [part for target in node.targets for part in ast.walk(target)]
            stored = [part for part in targets if isinstance(getattr(part, "ctx", None), ast.Store)]
            names |= {part.id: node for part in stored if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                single = ast.Import([alias])
                if isinstance(node, ast.ImportFrom):
                    single = ast.ImportFrom(node.module, [alias], node.level)
                names[alias.asname or alias.name.partition(".")[0]] = single
    return names


def used_names(nodes, definitions):
    """Return those of the definitions, a dict, that nodes use, directly or through others."""
    used = {}
    waiting = list(nodes)
    while waiting:
        for node in ast.walk(waiting.pop()):
            name = node.id if isinstance(node, ast.Name) else None
            if name in definitions and name not in used:
                used[name] = definitions[name]
                waiting.append(definitions[name])
    # In the order of the file, because a constant may use what is above it.
    return [node for name, node in definitions.items() if name in used]


def graft(text, exercise, submission):
    """Return the source of a file with the submission's answer to an exercise.

    text: the grader's own file. submission: the syntax tree of the submission's file. Only bodies
    are taken: names, parameters, defaults and decorators are the grader's. So are all other
    functions. Functions, classes, constants and imports that the submission adds at its top level
    are appended if an answer uses them.
    """
    # Put the answers into the grader's own tree.
    tree = ast.parse(text)
    bodies = []
    for name in exercise.functions:
        target, answer = find(tree, name), find(submission, name)
        # The grader's own body must not stay: a missing function is not a correct one.
        body = ast.parse(f"raise NotImplementedError('{name} is missing')").body
        if answer is not None:
            body = answer.body
            bodies += body
        target.body = body

    # Names that the grader's file has stay the grader's, so an answer cannot replace its helpers.
    own = top_level_names(tree)
    added = {name: node for name, node in top_level_names(submission).items() if name not in own}
    tree.body += used_names(bodies, added)
    return ast.unparse(tree)


# ---------------------------------------------------------------- grade: running the checks


@functools.cache
def check_names():
    """Return {exercise: [name of each check, ...]}, read from docs/coursework_checks.py."""
    # Read, not imported: the checks need torch, and this process does not.
    tree = ast.parse((ROOT / "docs" / "coursework_checks.py").read_text(encoding="utf-8"))
    names = {exercise.number: [] for exercise in EXERCISES}
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "check":
                number, name = (argument.value for argument in decorator.args)
                names[number].append(name)
    return names


def write_copy(folder, exercise, grafted):
    """Write the grader's project into a folder, with the grafted file and the checks."""
    for path in project_files():
        if path.suffix == ".py":
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    (folder / exercise.file).write_text(grafted, encoding="utf-8")
    shutil.copy(ROOT / "docs" / "coursework_checks.py", folder)


def child_environment(folder):
    """Return the few environment variables of the process that runs the checks."""
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # to find and load Python and torch
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    for name in ("HOME", "TMPDIR", "TEMP", "TMP"):
        environment[name] = str(folder)
    environment["PYTHONUSERBASE"] = site.getuserbase() or ""  # packages of pip install --user
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def run_checks(folder, exercise, seconds):
    """Run the checks of an exercise in a folder of write_copy.

    Returns the reported checks, {number: (passed, message)}, and why there are no more.
    """
    # The token goes through stdin, which the process reads before it imports the answers. stdout
    # goes to a file: a pipe would block when it is full.
    token = secrets.token_hex(16)
    command = [sys.executable, "coursework_checks.py", str(exercise.number), str(seconds)]
    with tempfile.TemporaryFile() as report:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=child_environment(folder),
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = "the process ended before this check"
        try:
            process.communicate(token.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            end = f"no result within {seconds} seconds"
        finally:
            kill(process)
        report.seek(0)
        return read_report(report.read(MAX_BYTES), token), end


def kill(process):
    """End a process, and the processes that it has started."""
    if hasattr(os, "killpg"):
        # The session of the process has its number. Without members, there is nothing to kill.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def read_report(content, token):
    """Return {number: (passed, message)} from the lines of a report that start with the token."""
    checks = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        if line.startswith(f"{token} "):
            _, number, passed, message = line.split(" ", 3)
            # A message can contain anything, also control characters for the terminal.
            message = "".join(c if c.isprintable() else " " for c in message)
            checks[int(number)] = passed == "True", message
    return checks


def grade_exercise(folder, exercise, names, seconds):
    """Return (passed, message) for each check of an exercise."""
    text = (ROOT / exercise.file).read_text(encoding="utf-8")
    try:
        grafted = graft(text, exercise, read_submission(folder, exercise.file))
    except (ValueError, OSError, RecursionError) as error:
        return [(False, str(error))] * len(names)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
        write_copy(Path(copy), exercise, grafted)
        reported, end = run_checks(copy, exercise, seconds)
    return [reported.get(number, (False, end)) for number in range(len(names))]


# ---------------------------------------------------------------- grade: the table


def print_exercise(exercise, names, results):
    """Print the points of an exercise, and one line for each check that failed."""
    points = sum(passed for passed, _ in results)
    print(f"{exercise.number:2d}  {exercise.title:34s} {points:3d} / {len(names)}")
    # A missing answer fails all checks with the same message: print it once.
    messages = {message for _, message in results}
    if points == 0 and len(messages) == 1:
        print(f"      all checks: {messages.pop()}")
    else:
        for name, (passed, message) in zip(names, results):
            if not passed:
                print(f"      {name}: {message}")
    sys.stdout.flush()


def grade(folder, numbers=None, seconds=60):
    """Grade a submission and print the table. Returns the points, {exercise: (points, of)}.

    numbers: of the exercises to grade, all by default. seconds: the time limit for each. Raises
    ValueError if the folder has none of the files.
    """
    if not any(Path(folder, name).exists() for name in FILES):
        raise ValueError(
            f"{folder} contains none of {', '.join(FILES)}: name the folder of a submission"
        )
    checks = check_names()
    points = {}
    for exercise in EXERCISES:
        # Each exercise has a copy of the project and a process of its own.
        if numbers is None or exercise.number in numbers:
            names = checks[exercise.number]
            results = grade_exercise(folder, exercise, names, seconds)
            print_exercise(exercise, names, results)
            points[exercise.number] = sum(passed for passed, _ in results), len(names)

    total, possible = (sum(column) for column in zip(*points.values()))
    solved = sum(got == of for got, of in points.values())
    print(f"{'total':38s} {total:3d} / {possible}, {solved} of {len(points)} exercises solved")
    return points


# ---------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        sys.exit(f"{self.prog}: {message}")


def positive(text):
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_parser():
    parser = Parser(
        prog="coursework.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    blank_parser = commands.add_parser("blank", help="write the handout for students")
    blank_parser.add_argument("folder", help="a new or empty folder")

    grade_parser = commands.add_parser("grade", help="run the checks on a submission")
    grade_parser.add_argument("folder", help=f"the folder with {', '.join(FILES)}")
    numbers = [exercise.number for exercise in EXERCISES]
    exercise_help = "numbers of the exercises to grade (default: all)"
    grade_parser.add_argument(
        "--exercise", type=int, nargs="+", choices=numbers, metavar="N", help=exercise_help
    )
    seconds_help = "time limit for each exercise (default 60)"
    grade_parser.add_argument("--seconds", type=positive, default=60, help=seconds_help)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        if args.command == "blank":
            blank(args.folder)
        else:
            grade(args.folder, args.exercise, args.seconds)
    except (ValueError, OSError) as error:
        sys.exit(f"coursework.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
