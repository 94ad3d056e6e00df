"""What the tests share: markers, tiny runs, errors and refusals, pictures, processes.

--run-slow runs the tests that take minutes, too. -m "not pins" leaves out those that an exercise may break.
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from errno import EACCES
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import train

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
BASE = ("--model dit --size tiny --data shapes --image-size 8 --batch-size 16 --images 64 "
        "--device cpu --no-compile")
MOVES = "--lr 1e-3 --warmup 1"          # so that a few steps change the weights by far more than a tolerance
COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), grey=(90, 90, 90))
draw_shapes = train.draw_shapes


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; needs --run-slow")
    config.addinivalue_line("markers", "pins: pins a number, a name or a line: an exercise may change it")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --run-slow"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Here as in the other processes: more would wait for each other, and add up otherwise."""
    torch.set_num_threads(1)


# --- fewer shapes, a smaller network, shorter previews ---

def few_shapes(patch, learn=400, test=400):
    """So many drawn shapes instead of 50,000 and 5,000, until the monkeypatch is undone."""
    patch.setattr(train, "draw_shapes",
                  lambda n, *args, **kw: draw_shapes(learn if n == 50_000 else test, *args, **kw))


def speed_up(patch):
    """Few shapes, a DiT of two blocks, sample grids in 2 steps not 50, until the monkeypatch is undone."""
    few_shapes(patch)
    patch.setitem(train.DiT.SIZES, "tiny", dict(train.DiT.SIZES["tiny"], dim=64, depth=2))
    patch.setattr(train.GaussianDiffusion, "sample", partialmethod(train.GaussianDiffusion.sample, steps=2))


@pytest.fixture
def quick(monkeypatch):
    """speed_up for a test; a file asks for it by pytestmark = pytest.mark.usefixtures("quick")."""
    speed_up(monkeypatch)


def like_windows(patch):
    """Neither locks nor opened folders are to be had, as on Windows, until the monkeypatch is undone."""
    plain = os.open

    def refuse_folders(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(EACCES, "Permission denied", str(path))
        return plain(path, *args, **kwargs)
    patch.setattr(os, "open", refuse_folders)
    patch.setitem(sys.modules, "fcntl", None)                                # cannot be imported


# --- tiny runs: 8 px, four steps of 16 images ---

def config(flags=""):
    return train.parse_config([*BASE.split(), *flags.split()])


def argv(out, flags="", *more):
    return [*BASE.split(), "--out", str(out), *flags.split(), *map(str, more)]


def load(out):
    """-> checkpoint of a run folder."""
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def run(out, flags="", *more):
    """A run in this process -> its checkpoint."""
    train.main(argv(out, flags, *more))
    return load(out)


def log(out):
    """-> first record, the others."""
    head, *rest = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return head, rest


def losses(out, name="loss"):
    """{images: loss}; an image count that is logged twice is an error."""
    rest = log(out)[1]
    found = {record["images"]: record.get(name) for record in rest}
    assert len(found) == len(rest), "an interval is in the log twice"
    return found


def small_run(folder, flags):
    """A run of two steps on 16 px shapes -> its folder; no zero gate hides the time, the class or z.

    For that, its EMA weights get noise of their own.
    """
    flags = f"--model {flags} --size tiny --data shapes --images 16 --batch-size 8 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.GaussianDiffusion, "sample", lambda self, net, noise, *args, **kwargs: noise)
        train.main([*flags.split(), "--out", str(folder)])
    state, generator = load(folder), torch.Generator().manual_seed(1)
    for value in state["ema"].values():
        value += 0.04 * torch.randn(value.shape, generator=generator)
    torch.save(state, folder / "checkpoint.pt")
    return folder


def precision():
    """The dtype in which a network runs here and now."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def probed(layers=4, levels=(1, 10, 30), run="made", **changes):
    """A result as probe.json has it, with values that rise from layer to layer and level to level."""
    values = [[round(0.3 + 0.05 * i + 0.01 * j, 5) for j in range(len(levels))] for i in range(layers)]
    best = dict(layer=f"block_{layers}", t=levels[-1], accuracy=values[-1][-1], miou=0.2)
    result = dict(run=run, data="shapes", metric="accuracy", layers=[f"block_{n + 1}" for n in range(layers)],
                  levels=list(levels), sigmas=[t / (1000 - t) for t in levels], held_out=values, best=best,
                  bottleneck=f"block_{layers // 2 or 1}",
                  test=dict(accuracy=0.5, miou=0.25), train_images=5_000, test_images=40, test_set="12ab",
                  augment=0, seed=0, batch_size=500)
    return result | changes


# --- comparisons ---

def error(a, b):
    """Maximum absolute error of two tensors, arrays, lists, or dicts of them with the same keys."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(error(a[k], b[k]) for k in a)
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def moments(state):
    """The optimizer's running mean of the gradient, of every parameter."""
    return {k: s["exp_avg"] for k, s in state["optimizer"]["state"].items()}


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Checkpoints equal bit for bit, but for the flags that say how far to go and where to."""
    for name in a.keys() | b.keys():
        if name != "config":
            assert same(a[name], b[name]), name


def tree(folder):
    """Everything in a folder, with the files' bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextmanager
def refused(capsys, *words):
    """The body ends with exit code 2 and one line on stderr, beside bars, with all words; it is said[0]."""
    said = []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield said
    lines = re.split(r"[\r\n]+", capsys.readouterr().err.replace("\x1b[A", ""))
    said += [line for line in lines if line.strip() and not re.search(r"\d%\||\?, \?|/s[\],]|s/it", line)]
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    # pytest's folder has words of the test in its name
    short = re.sub(r"\S*/pytest-of-[^/]+/pytest-\d+/[^/]+/", "", said[0])
    assert [word for word in words if word not in short and not ("/" in word and word in said[0])] == [], said


# --- pictures ---

def picture(path, *colours, size=(8, 8), mode="RGB"):
    """An image file; its colours stand side by side (below each other where it is upright) in equal bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.array([COLOURS[c] for c in colours], np.uint8)
    width, height = size
    rows, cols = (1, len(bands)) if width >= height else (len(bands), 1)
    pixels = bands.reshape(rows, cols, 3).repeat(height // rows, 0).repeat(width // cols, 1)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root, files):
    """Writes {name: colour, bytes or None, a folder} below root -> the spec."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            picture(path, content)
    return f"folder:{root}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 40 images to train, 10 to test, in two classes, 30 x 24 pixels; nobody changes it."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 10)):
        for i in range(n):
            path = root / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(6, 0).repeat(6, 1)
            pixels[:, :, 0] = pixels[:, :, 0] // 2 + 120 * (i % 2)           # class b is redder
            Image.fromarray(pixels).save(path)
    return root


def few_latents(root, classes, **parts):
    """A folder of latents (4, 8, 8), mean 1 and deviation 5, so many of each part: train=20, test=10."""
    rng = np.random.default_rng(0)
    for split, n in parts.items():
        (root / split).mkdir(parents=True)
        np.save(root / split / "latents.npy", rng.normal(1, 5, (2, n, 4, 8, 8)).astype(np.float16))
        np.save(root / split / "labels.npy", np.arange(n) % len(classes))
    meta = dict(vae="nowhere", image_size=64, classes=list(classes), shape=[4, 8, 8], mean=[1.0] * 4,
                std=[5.0] * 4)
    (root / "meta.json").write_text(json.dumps(meta))
    return root


class Program:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


# --- processes of their own ---

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest"])
tqdm.get_lock()                         # of all forks, or one that is killed would leave its own behind


def start(*command, **env):
    """A Python command in a process of its own, elsewhere, that goes on -> the process, a Popen."""
    return subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **env}, text=True,
                            cwd=ROOT.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # background


class Fork:
    """body(*args), a function of a test file, in a quick process of its own; used like a Popen.

    It starts at once: it is forked from a server that has imported train and did nothing else.
    """

    def __init__(self, body, *args, **env):
        self.folder = tempfile.TemporaryDirectory()
        self.process = FORKS.Process(target=in_fork, args=(self.folder.name, env, body, args), daemon=True)
        self.process.start()
        self.pid = self.process.pid
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def send_signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout)

    def communicate(self, timeout=None):
        self.wait(timeout)
        self.returncode = self.poll()
        return self.said("out"), self.said("err")

    def said(self, name):
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""


def in_fork(folder, env, body, args):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    torch.set_num_threads(1)
    speed_up(pytest.MonkeyPatch())
    body(*args)


def train_in_fork(flags):
    sys.argv = [str(ROOT / "train.py"), *flags]
    train.main(flags)


def fork_two(body, *args):
    """Two processes of one run, as torchrun would start them -> both, the first one first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])                                  # one that is free
    return [Fork(body, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                 MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]


def give_up(process, why):
    """Ends a process, torchrun with its own, and the test."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=40)
    process.kill()
    pytest.fail(f"{why}: {process.communicate()}")


def wait_for(what, process, seconds=60):
    """Waits until what() is true of a process that runs."""
    end = time.time() + seconds
    while not what():
        if process.poll() is not None or time.time() > end:
            give_up(process, "it did not get there")
        time.sleep(0.02)


def end(process, seconds=60):
    """-> exit code, stdout, stderr of a process that ends by itself within so many seconds."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        give_up(process, f"still there after {seconds} s")
    return process.returncode, out, err


def run_two(out, flags, *more):
    """A run in two processes -> its checkpoint, and what was said on stdout."""
    both = fork_two(train_in_fork, argv(out, flags, *more))
    (code, said, err), (other, *_) = [end(process) for process in both]
    assert code == other == 0, err
    return load(out), said


# --- a finished run ---

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of 32 images, which nobody changes."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speed_up(patch)
        run(out, "--images 32")
    return out


@pytest.fixture
def old_run(tmp_path, finished):
    """A copy of it -> its folder."""
    return shutil.copytree(finished, tmp_path / "run")
