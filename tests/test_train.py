"""train.py: flags, data, batches, the loop, runs that stop and go on, bad input. Runs are tiny: 8 px, a CPU."""
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from errno import ENOSPC
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import train

ROOT = Path(train.__file__).parent
BASE = ("--model dit --size tiny --data shapes --image-size 8 --batch-size 16 --images 64 "
        "--device cpu --no-compile")
MOVES = "--lr 1e-3 --warmup 1"          # so that a few steps change the weights by far more than a tolerance
COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), grey=(90, 90, 90))
each_model = pytest.mark.parametrize("model", train.MODELS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """400 drawn shapes instead of 50,000; previews in 2 steps instead of 50."""
    draw, sample = train.draw_shapes, train.GaussianDiffusion.sample
    monkeypatch.setattr(train, "draw_shapes", lambda n, *args, **kw: draw(min(n, 400), *args, **kw))
    monkeypatch.setattr(train.GaussianDiffusion, "sample", partialmethod(sample, steps=2))


def argv(out, flags="", *more):
    return [*BASE.split(), "--out", str(out), *flags.split(), *map(str, more)]


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def run(out, flags="", *more):
    """A run in this process -> its checkpoint."""
    train.main(argv(out, flags, *more))
    return load(out)


def log(out):
    """-> first record, the others."""
    head, *rest = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return head, rest


def losses(out):
    """{images: loss}; an image count that is logged twice is an error."""
    rest = log(out)[1]
    found = {record["images"]: record["loss"] for record in rest}
    assert len(found) == len(rest), "an interval is in the log twice"
    return found


def error(a, b):
    """Maximum absolute error over two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


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
def refused(capsys, *words, late=False):
    """The body ends with exit code 2 and one line on stderr that has all words; late: beside a progress bar."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    said = [line for line in lines if "error: " in line]
    assert len(said) == 1 and said[0].startswith("error: ") and (late or said == lines), lines
    assert [word for word in words if word not in said[0]] == [], said


def picture(path, *colours, size=(8, 8), mode="RGB"):
    """An image file; its colours stand side by side (below each other where it is upright) in equal bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.array([COLOURS[c] for c in colours], np.uint8)
    width, height = size
    rows, cols = (1, len(bands)) if width >= height else (len(bands), 1)
    pixels = bands.reshape(rows, cols, 3).repeat(height // rows, 0).repeat(width // cols, 1)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 2 x 20 noise images, for the runs in processes of their own, which draw no shapes."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(40):
        path = root / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return root


def launch(*command, timeout=120):
    """A command in a process of its own, in another folder -> exit code, stdout, stderr."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        return (process.returncode, *process.communicate(timeout=timeout))[1:] + (process.returncode,)
    except subprocess.TimeoutExpired:
        process.terminate()                         # torchrun then ends its processes
        process.communicate(timeout=60)
        pytest.fail(f"still running after {timeout} s")


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


# --- config ---

def test_help(capsys, monkeypatch):
    """--help names every flag, and says what it is for."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code
    for name in """model size data image-size out images minutes batch-size micro-batch lr warmup decay ema save-every
                   sample-every resume conditional no-self-cond target schedule seed device precision no-compile
                   skip-bad""".split():
        assert re.search(rf"--{name}\b", text), name
    for f in fields(train.Config):
        assert "--" + f.name.replace("_", "-") in text
        assert f.metadata["help"] and f.metadata["help"] % () in text, f.name


FLAGS = {"model": "uvit", "size": "small", "data": "shapes", "image_size": 24, "out": "here", "images": 7,
         "minutes": 0.5, "batch_size": 3, "micro_batch": 1, "lr": 0.25, "warmup": 11, "decay": 12, "ema": 13,
         "save_every": 14, "sample_every": 15, "resume": True, "conditional": True, "self_cond": False,
         "target": "v", "schedule": "cosine", "seed": -4, "device": "cpu", "precision": "bf16",
         "compile": False, "skip_bad": True}


def test_flags():
    """Every field of Config has a flag that sets it, and no other field."""
    assert list(FLAGS) == [f.name for f in fields(train.Config)]
    for name, value in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        given = [flag, str(value)] if type(value) is not bool else [flag if value else flag.replace("--", "--no-")]
        cfg, default = (asdict(train.parse_config(["--model", "uvit", *x])) for x in (given, []))
        changed = {k for k in cfg if cfg[k] != default[k]}
        assert cfg[name] == value and type(cfg[name]) is type(value)
        assert changed - {"out", "images"} == {name} - {"model", "size", "out", "images"}, name


RECIPE = {**train.TINY_SHAPES, "conditional": True, "target": "v", "schedule": "cosine"}


@pytest.mark.parametrize("flags, expected", [
    ("", dict(model="dit", size="small", data="cifar10", out="runs/dit-small-cifar10", images=10_000_000,
              batch_size=256, lr=2e-4, self_cond=True, conditional=False, target="eps", schedule="linear",
              decay=None, minutes=None, resume=False, compile=True, seed=0)),
    ("--model unet", dict(size="base", out="runs/unet-base-cifar10")),
    ("--model uvit --no-self-cond", dict(size="small", out="runs/uvit-small-cifar10-baseline")),
    ("--out here --no-self-cond", dict(out="here")),
    ("--minutes 5", dict(minutes=5.0, images=None)),
    ("--minutes 5 --images 9", dict(minutes=5.0, images=9)),
    *[(f"--model {m} --size tiny --data shapes", {**RECIPE, "images": train.TINY_IMAGES[m],
       "decay": train.TINY_IMAGES[m], "out": f"runs/{m}-tiny-shapes"}) for m in train.MODELS],
    ("--size tiny --data shapes --lr 0.5 --no-conditional --target eps --batch-size 8 --decay 5 --images 77",
     {**RECIPE, "lr": 0.5, "conditional": False, "target": "eps", "batch_size": 8, "decay": 5, "images": 77}),
    ("--size tiny --data shapes:full", dict(lr=2e-4, target="eps", conditional=False, batch_size=256,
                                            out="runs/dit-tiny-shapes-full", images=10_000_000)),
    ("--size small --data shapes", dict(lr=2e-4, target="eps", out="runs/dit-small-shapes", decay=None)),
    ("--data folder:/some/where/photos", dict(out="runs/dit-small-photos")),
])
def test_defaults(flags, expected):
    """Defaults are filled in; tiny with shapes has a recipe of its own; flags given by hand win."""
    cfg = asdict(train.parse_config(flags.split()))
    assert {name: cfg[name] for name in expected} == expected


# --- data ---

SHAPES = ["circle", "ring", "square", "bar", "triangle", "cross", "star", "heart", "moon", "arrow"]


@pytest.mark.parametrize("spec", ["shapes", "shapes:full"])
@pytest.mark.parametrize("size", [None, 16, 32])
def test_shapes(spec, size):
    """Drawn shapes: uint8, ten classes, 16 px unless asked, the same again, other ones in the test split."""
    data, again, test = (train.load_data(spec, split, size) for split in ("train", "train", "test"))
    side = size or 16
    assert data.images.shape == (400, 3, side, side) and data.masks.shape == (400, side, side)
    assert data.images.dtype == data.masks.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert data.classes == SHAPES and data.labels.bincount().tolist() == [40] * 10
    assert all(map(torch.equal, data[:3], again[:3]))
    assert torch.equal(data.labels, test.labels)
    assert (data.images != test.images).flatten(1).any(1).all()
    other = train.load_data("shapes" if ":" in spec else "shapes:full", "train", size)
    assert (data.images != other.images).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [16, 32])
def test_masks(size):
    """A mask is its image's class + 1 where the image is bright, 0 where it is dark."""
    data = train.load_data("shapes", "train", size)
    inside = data.masks > 0
    assert torch.equal(data.masks.long(), inside * (data.labels + 1)[:, None, None])
    bright = data.images.amax(1) > 0.53 * 255        # half between the ground's 0.11 and the colours' 0.95
    assert (bright != inside).float().mean() < 0.01
    part = inside.float().mean((1, 2))
    assert 0.04 < part.min() and part.max() < 0.55
    edge = inside[:, 0].any(1) | inside[:, -1].any(1) | inside[:, :, 0].any(1) | inside[:, :, -1].any(1)
    assert edge.float().mean() < 0.05                # the shapes lie within their pictures


def test_shapes_differ():
    """No two of the ten classes look alike: the nearest of 400 masks tells every one of them apart."""
    (_, k, a, _), (_, truth, b, _) = (train.load_data("shapes", split, 16) for split in ("train", "test"))
    nearest = torch.cdist((b > 0).float().flatten(1), (a > 0).float().flatten(1)).argmin(1)
    right = (k[nearest] == truth).float()
    assert min(right[truth == c].mean().item() for c in range(10)) > 0.7          # by chance: 0.1


@pytest.mark.parametrize("other", ["test", "val"])
def test_folder(tmp_path, other):
    """train/<class>/* and test or val: classes in order of their names, in both splits numbered as in train."""
    for split, name, colour in (("train", "b", "blue"), ("train", "a", "red"), ("train", "c", "green"),
                                ("train", "a", "grey"), (other, "c", "green"), (other, "b", "blue")):
        picture(tmp_path / "photos" / split / name / f"{colour}.png", colour)
    (tmp_path / "photos/train/a/notes.txt").write_text("no image")
    data, test = (train.load_data(f"folder:{tmp_path}/photos", split, 8) for split in ("train", "test"))
    for found, colours, labels in ((data, ["grey", "red", "blue", "green"], [0, 0, 1, 2]),
                                   (test, ["blue", "green"], [1, 2])):
        assert found.classes == ["a", "b", "c"] and found.labels.tolist() == labels and found.masks is None
        assert found.images.shape == (len(labels), 3, 8, 8) and found.images.dtype == torch.uint8
        assert found.images[:, :, 0, 0].tolist() == [list(COLOURS[c]) for c in colours]


def test_flat_folder(tmp_path):
    """A folder of images alone is one class, in order of the names; 32 px unless asked; it has no test split."""
    for name, colour in (("2.PNG", "red"), ("1.jpeg", "grey"), ("3.webp", "grey")):
        picture(tmp_path / "photos" / name, colour)
    data = train.load_data(f"folder:{tmp_path}/photos", "train")
    assert data.classes == ["image"] and data.labels.tolist() == [0, 0, 0]
    assert data.images.shape == (3, 3, 32, 32)
    assert (data.images[:, :, 9, 9] - torch.tensor([[90.] * 3, [255, 0, 0], [90] * 3])).abs().max() <= 2
    with pytest.raises(train.UserError, match="test"):
        train.load_data(f"folder:{tmp_path}/photos", "test")


@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "png"), ("LA", "png"), ("P", "png"),
                                          ("RGBA", "png"), ("CMYK", "tif")])
@pytest.mark.parametrize("size", [(96, 32), (32, 96), (24, 8), (12, 4)])
def test_any_image(tmp_path, mode, suffix, size):
    """Of any mode and proportions: the short side becomes the image size, the middle of the long one stays."""
    colours = ("red", "grey" if mode in ("L", "LA") else "green", "blue")
    picture(tmp_path / f"image.{suffix}", *colours, size=size, mode=mode)
    assert Image.open(tmp_path / f"image.{suffix}").mode == mode
    image = train.load_data(f"folder:{tmp_path}", "train", 8).images[0].int()
    assert image.shape == (3, 8, 8)
    middle = image[:, :, 2:6] if size[0] > size[1] else image[:, 2:6]
    expected = torch.tensor(COLOURS[colours[1]])[:, None, None]
    assert (middle - expected).abs().max() <= (40 if suffix == "jpg" else 6)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the image files that were decoded."""
    names, loader = [], train.pil_loader
    monkeypatch.setattr(train, "pil_loader", lambda path: (names.append(Path(path).name), loader(path))[1])
    return names


def test_cache(tmp_path, decoded):
    """Decoded images are kept beside the folder, for each size and split, until a file changes, comes or goes."""
    root = tmp_path / "data/photos"
    for split, name, colour in (("train", "a/1.png", "red"), ("train", "b/2.png", "blue"),
                                ("test", "a/3.png", "grey")):
        picture(root / split / name, colour)
    before = tree(root)

    def look(expected, split="train", size=8):
        decoded.clear()
        data = train.load_data(f"folder:{root}", split, size)
        assert sorted(decoded) == expected
        return data

    both = ["1.png", "2.png"]
    first, second = look(both), look([])
    assert all(map(torch.equal, first[:2], second[:2])) and first[2:] == second[2:]
    look(both, size=16), look(["3.png"], "test"), look([]), look([], size=16), look([], "test")
    assert tree(root) == before and len(list(root.parent.iterdir())) == 4

    picture(root / "train/a/1.png", "green")
    os.utime(root / "train/a/1.png", ns=(1, 1))
    assert look(both).images[0, :, 0, 0].tolist() == list(COLOURS["green"])
    picture(root / "train/a/0.png", "grey")
    assert look(["0.png", *both]).labels.tolist() == [0, 0, 1]
    (root / "train/a/1.png").unlink()
    assert look(["0.png", "2.png"]).labels.tolist() == [0, 1]
    look([])


def test_no_cache(tmp_path, decoded, monkeypatch, capsys):
    """Where the cache can't be written, training goes on and one line says so; nothing half-written stays."""
    picture(tmp_path / "photos/1.png", "red")
    before = tree(tmp_path)

    def read_only(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(train, "open", read_only, raising=False)
    for _ in range(2):
        assert train.load_data(f"folder:{tmp_path}/photos", "train", 8).images.shape == (1, 3, 8, 8)
        assert "Permission denied" in (out := capsys.readouterr().out) and out.count("\n") == 1
    assert decoded == ["1.png"] * 2 and tree(tmp_path) == before


def test_skip_bad(tmp_path, capsys):
    """--skip-bad leaves out what can't be read, says how many, and trains on; it never becomes the cache."""
    for i in range(18):
        picture(tmp_path / "photos/train" / "ab"[i % 2] / f"{i:02}.png", "red" if i % 2 else "blue")
    torn, empty = tmp_path / "photos/train/a/04.png", tmp_path / "photos/train/b/05.png"
    torn.write_bytes(torn.read_bytes()[:40])
    empty.write_bytes(b"")
    spec = f"folder:{tmp_path}/photos"
    data = train.load_data(spec, "train", 8, skip_bad=True)
    assert "left out 2" in capsys.readouterr().out
    assert data.labels.tolist() == [0] * 8 + [1] * 8
    assert (data.images[:, 0, 0, 0] == 255).long().equal(data.labels)
    assert run(tmp_path / "run", "--skip-bad --images 16", "--data", spec)["images"] == 16
    with pytest.raises(train.UserError, match="0[45].png"):
        train.load_data(spec, "train", 8)


def stand_in(monkeypatch, spec):
    """A tiny CIFAR in torchvision's layout under ./data -> {split: (images, labels, class names)}."""
    kind, K, rng, truth = getattr(torchvision.datasets, spec.upper()), int(spec[5:]), np.random.default_rng(0), {}
    folder = Path("data") / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for split in ("train", "test"):
        images, labels, files = [], [], []
        for name, _ in getattr(kind, f"{split}_list"):
            images.append(rng.integers(0, 256, (16, 3, 32, 32), np.uint8))
            labels.append(rng.integers(0, K, 16).tolist())
            pixels = {"data": images[-1].reshape(16, -1), "labels" if K == 10 else "fine_labels": labels[-1]}
            files.append([name, write(name, pixels)])
        monkeypatch.setattr(kind, f"{split}_list", files)
        truth[split] = torch.from_numpy(np.concatenate(images)), torch.tensor(labels).flatten()
    names = [f"class {k}" for k in range(K)]
    md5 = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return {split: (*found, names) for split, found in truth.items()}


@pytest.mark.parametrize("spec", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, spec):
    """CIFAR through torchvision: both splits, labels, class names; resized where a size is asked.

    It did not run on the real thing: a few random images stand in, with torchvision's md5 lists patched.
    """
    monkeypatch.chdir(tmp_path)
    for split, (images, labels, names) in stand_in(monkeypatch, spec).items():
        data = train.load_data(spec, split)
        assert torch.equal(data.images, images) and data.images.is_contiguous()
        assert torch.equal(data.labels, labels) and data.classes == names and data.masks is None
        small = train.load_data(spec, split, 16).images
        halved = images.float().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
        assert small.dtype == torch.uint8 and small.shape[2:] == (16, 16)
        assert (small.float() - halved).abs().mean() < 16                # noise of +-37 where nothing is averaged
    assert run(tmp_path / "run", "--images 16 --image-size 32", "--data", spec)["images"] == 16


# --- batches ---

def config(flags=""):
    return train.parse_config([*BASE.split(), *flags.split()])


@pytest.fixture(scope="module")
def noise_data():
    """40 images of noise, no two alike, none its own mirror image."""
    images = torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 255
    return train.Data(images, torch.arange(40) % 10, None, SHAPES)


CPU = torch.device("cpu")


def batches(data, flags="", T=1000, **kw):
    return train.Batches(data, config(flags), T, CPU, **kw)


def test_batch_is_a_function_of_seed_and_step(noise_data):
    """A batch depends on (seed, step) alone: not on what was asked before. All of it changes with both."""
    a, b = batches(noise_data), batches(noise_data)
    first = {step: a(step) for step in range(6)}
    for step in (4, 0, 5, 5, 2, 1, 3):
        assert all(map(torch.equal, b(step), first[step])), step
    assert not any(map(torch.equal, first[0], first[1]))
    for seed in (1, 2, 1000, -1):
        assert not any(map(torch.equal, batches(noise_data, f"--seed {seed}")(3), first[3])), seed


@pytest.mark.parametrize("world", [2, 4])
def test_shares_make_up_the_batch(noise_data, world):
    """The processes' shares, one after the other, are the batch of one process."""
    parts = [batches(noise_data, rank=rank, world=world) for rank in range(world)]
    whole = batches(noise_data)
    for step in range(3):
        for name, all_, *shares in zip("x0 t noise y".split(), whole(step), *(part(step) for part in parts)):
            assert len(shares[0]) == 16 // world and torch.equal(torch.cat(shares), all_), name


def test_fetching_ahead(noise_data):
    """Data that is not on the device gives the same batches, also after a jump."""
    here, ahead = batches(noise_data, resident=True), batches(noise_data, resident=False)
    for step in (0, 1, 2, 7, 8, 3):
        assert all(map(torch.equal, here(step), ahead(step))), step


def test_batch_contents(noise_data):
    """x0 are images in [-1, 1], half of them flipped, with their labels, a tenth dropped; t and noise are fair."""
    make, steps = batches(noise_data, "--batch-size 20", T=10), 200
    x0, t, noise, y = (torch.cat(parts) for parts in zip(*(make(step) for step in range(steps))))
    images = noise_data.images / 127.5 - 1
    both = torch.cat([images, images.flip(3)]).flatten(1)
    nearest = torch.cdist(x0.flatten(1), both).argmin(1)
    assert (x0.flatten(1) - both[nearest]).abs().max() < 1e-6
    assert x0.min() == -1 and x0.max() == 1
    flipped, picked, drop = nearest >= 40, nearest % 40, y == 10
    assert abs(flipped.float().mean() - 0.5) < 0.03
    assert 0.7 < picked.bincount(minlength=40).float().min() / 100 < 1       # each about 100 times
    assert all(len(set(i.tolist())) == 20 for i in picked.split(20))         # none twice in a batch
    assert torch.equal(y[~drop], noise_data.labels[picked][~drop])
    assert abs(drop.float().mean() - 0.1) < 0.02
    counts = t.bincount(minlength=10)
    assert t.dtype == torch.int64 and len(counts) == 10 and counts.min() > 320        # each about 400 times
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise.flatten(1)[:, 0].unique()) == len(noise)
    by_column = torch.stack([v.float().view(steps, 20).mean(0) for v in (flipped, drop)])
    assert (by_column - torch.tensor([[0.5], [0.1]])).abs().max() < 0.15     # not the same images every time
    pairs = torch.stack([flipped.float(), drop.float(), t.float(), noise[:, 0, 0, 0]])
    assert (pairs.corrcoef() - torch.eye(4)).abs().max() < 0.08              # and independent of each other


def test_no_labels(noise_data):
    """Without --conditional there is no y; the rest of the batch stays the same."""
    *a, y = batches(noise_data, "--no-conditional")(3)
    assert y is None and all(map(torch.equal, a, batches(noise_data)(3)[:3]))


# --- the loop ---

@pytest.mark.parametrize("start, half_life, rising", [(0, 10**6, True), (0, 64, True), (10**6, 160, False)])
def test_ema(start, half_life, rising):
    """The EMA's half-life is min(--ema, 5 % of the images seen): closed form, in ramp-up, across and after."""
    cfg, n = config(f"--ema {half_life}"), 120
    net, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    nn.init.zeros_(ema.weight), nn.init.zeros_(ema.bias)
    values = [k if rising else 1.0 for k in range(1, n + 1)]
    for k, value in enumerate(values, 1):
        nn.init.constant_(net.weight, value), nn.init.constant_(net.bias, -value)
        train.update_ema(ema, net, cfg, start + 16 * k)
    halvings = [16 / min(half_life, (start + 16 * k) / 20) for k in range(1, n + 1)]
    expected = sum(value * (1 - 0.5 ** halvings[k]) * 0.5 ** sum(halvings[k + 1:])
                   for k, value in enumerate(values))
    if not rising:
        assert expected == pytest.approx(1 - 0.5 ** (n * 16 / half_life), abs=1e-9)
    assert (ema.weight - expected).abs().max() < 1e-5 * n and (ema.bias + expected).abs().max() < 1e-5 * n
    assert (net.weight == values[-1]).all()


def test_ema_in_the_loop(tmp_path, monkeypatch):
    """The checkpoint's EMA is the average of the weights after each step, begun at the first ones."""
    seen, update = [], train.update_ema

    def watch(ema, net, cfg, images):
        if not seen:
            seen.append({k: v.double().clone() for k, v in ema.state_dict().items()})
        seen.append({k: v.double().clone() for k, v in net.state_dict().items()})
        update(ema, net, cfg, images)
    monkeypatch.setattr(train, "update_ema", watch)
    state = run(tmp_path / "run", f"{MOVES} --images 1600 --ema 40 --batch-size 32")
    expected = seen[0]
    for k, net in enumerate(seen[1:], 1):
        beta = 0.5 ** (32 / min(40, 32 * k / 20))
        expected = {name: beta * expected[name] + (1 - beta) * net[name] for name in net}
    assert len(seen) == 51 and same(state["model"], {k: v.float() for k, v in seen[-1].items()})
    assert error(state["ema"], expected) < 1e-6 < 1e-3 < error(state["ema"], state["model"])


def test_learning_rate(tmp_path, monkeypatch):
    """The rate rises over --warmup images, falls linearly by --decay to 1 %, and is the one the optimizer has."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    state = run(tmp_path / "run", "--lr 0.01 --warmup 100 --decay 480 --images 560")
    rates = [record["lr"] for record in log(tmp_path / "run")[1]]
    seen = range(0, 560, 16)                        # before the step
    assert rates == pytest.approx([0.01 * min(1, i / 100) * max(1 - i / 480, 0.01) for i in seen], abs=1e-12)
    assert state["optimizer"]["param_groups"][0]["lr"] == rates[-1]
    run(tmp_path / "flat", "--lr 0.01 --warmup 16 --decay 1000000000 --images 64")
    assert [r["lr"] for r in log(tmp_path / "flat")[1]] == pytest.approx([0, 0.01, 0.01, 0.01], abs=1e-9)


def test_one_step(tmp_path, monkeypatch):
    """The first step by hand: the mean loss of its batch, the gradient of that mean, clipped, into AdamW."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    cfg = config("--model unet")
    state = run(tmp_path / "run", "--model unet --images 16")
    data = train.load_data("shapes", "train", 8)
    torch.manual_seed(0)
    net, diffusion = train.build(cfg, 3, 10)
    x0, t, noise, y = train.Batches(data, cfg, 1000, CPU)(0)
    loss = diffusion.loss(net, x0, t, noise, y).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert norm > train.CLIP
    expected = {i: 0.1 * p.grad / norm for i, p in enumerate(net.parameters())}       # 0.1 = 1 - beta1
    assert error(moments(state), expected) < 1e-6
    assert losses(tmp_path / "run") == {16: pytest.approx(loss.item(), abs=1e-6)}


@each_model
def test_micro_batch(tmp_path, monkeypatch, model):
    """--micro-batch changes memory, not the result: weights, averages, gradients and loss stay within 1e-5.

    Not clipped, or a gradient of the wrong size would not show. With a larger eps in Adam: before a GroupNorm of
    one channel a group, the gradient of a bias is rounding noise, which Adam would blow up to steps of size lr.
    """
    monkeypatch.setattr(train, "CLIP", 1e9)
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-4))
    flags = f"--model {model} {MOVES} --images 96"
    whole, parts = (run(tmp_path / str(m), f"{flags} --micro-batch {m}") for m in (16, 4))
    fresh = run(tmp_path / "fresh", f"{flags} --images 16")
    assert error(whole["model"], fresh["model"]) > 1e-3
    for a, b in ((whole["model"], parts["model"]), (whole["ema"], parts["ema"]),
                 (moments(whole), moments(parts))):
        assert error(a, b) < 1e-5
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "16"), abs=1e-5)


@pytest.mark.parametrize("model, images", [("unet", 1280), ("uvit", 2560), ("dit", 1280)])
def test_learns(tmp_path, model, images):
    """The loss falls within a short run, in each of the networks."""
    run(tmp_path / "run", f"--model {model} --lr 4e-3 --warmup 320 --images {images} --batch-size 32")
    first, *_, last = losses(tmp_path / "run").values()
    assert last < 0.85 * first


@each_model
def test_twins(tmp_path, monkeypatch, model):
    """A run and its baseline see the same images, noise and initial weights: equal until proj has moved."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    states = [run(tmp_path / f, f"--model {model} {MOVES} --images 128 {f}") for f in ("--self-cond", "--no-self-cond")]
    on, off = (list(losses(tmp_path / f).values()) for f in ("--self-cond", "--no-self-cond"))
    assert on[0] == off[0] and on[-1] != off[-1]
    assert states[0]["model"].keys() - states[1]["model"].keys() == {"proj.1.weight", "proj.1.bias"}


# --- what a run leaves behind ---

@pytest.mark.parametrize("conditional, size", [(True, 8), (False, 16)])
def test_run_folder(tmp_path, capsys, conditional, size):
    """config.json, checkpoint.pt, log.jsonl, samples-<images>.png; the last line says where they lie."""
    out, flag = tmp_path / "some/run", "" if conditional else "--no-conditional"
    state = run(out, f"--images 500 --image-size {size} {flag}")
    assert {p.name for p in out.iterdir()} == {"config.json", "checkpoint.pt", "log.jsonl", "samples-512.png"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(str(out / name) in last for name in ("checkpoint.pt", "log.jsonl", "samples-512.png"))

    cfg = json.loads((out / "config.json").read_text())
    asked = asdict(train.parse_config(argv(out, f"--images 500 --image-size {size} {flag}")))
    assert cfg == asked == state["config"]
    assert set(state) >= {"step", "images", "config", "model", "ema", "optimizer", "scaler", "classes"}
    assert state["step"] == 32 and state["images"] == 512 and state["classes"] == SHAPES
    assert state["channels"] == 3 and state["num_classes"] == 10 * conditional

    head, rest = log(out)
    assert head["config"] == cfg and head["parameters"] == sum(v.numel() for v in state["model"].values())
    assert torch.__version__ in head["versions"] and "cpu" in head["device"]
    assert re.fullmatch("([0-9a-f]{40})?", head["commit"])
    assert [r["images"] for r in rest] == [320, 512]
    for record in rest:
        assert set(record) == {"images", "loss", "lr", "images_per_second", "seconds"}
        assert 0 < record["loss"] < 2 and record["images_per_second"] > 0 <= record["seconds"]

    with Image.open(out / "samples-512.png") as image:                   # tiles of 64 px, 4 px between them
        assert image.size == ((10 if conditional else 8) * 68 + 4, 8 * 68 + 4)
        assert image.mode == "RGB" and len(image.getcolors(10**6)) > 100


def test_image_size_is_kept(tmp_path):
    """The size that the data chose by itself stands in the checkpoint and in config.json."""
    train.main(["--size", "tiny", "--data", "shapes", "--images", "16", "--batch-size", "16", "--device", "cpu",
                "--out", str(tmp_path / "run")])
    assert load(tmp_path / "run")["config"]["image_size"] == 16
    assert json.loads((tmp_path / "run/config.json").read_text())["image_size"] == 16


def test_how_often(tmp_path, monkeypatch):
    """--save-every and --sample-every count images; both happen once more at the end."""
    written, save_file = [], train.save_file
    monkeypatch.setattr(train, "save_file", lambda path, write: (written.append(path.name), save_file(path, write)))
    run(tmp_path / "run", "--images 160 --save-every 40 --sample-every 64")
    assert written == ["config.json", "log.jsonl", "checkpoint.pt", "samples-64.png", "checkpoint.pt",
                       "checkpoint.pt", "samples-128.png", "checkpoint.pt", "samples-160.png"]


def test_preview(tmp_path, monkeypatch):
    """A sample grid: EMA weights in eval mode, a class a column, guidance, noise of the seeds 0, 1, 2 ..."""
    calls, sample = [], train.GaussianDiffusion.sample

    def watch(self, net, noise, y, **kw):
        calls.append((net.state_dict(), net.training, noise, y, kw))
        return sample(self, net, noise, y, **kw)
    monkeypatch.setattr(train.GaussianDiffusion, "sample", watch)
    state = run(tmp_path / "a", "--images 64")
    run(tmp_path / "b", "--images 16 --no-conditional")
    weights, training, noise, y, kw = calls[0]
    assert same(weights, state["ema"]) and not training
    assert y.tolist() == list(range(10)) * 8 and kw == dict(null=10, guidance=train.GUIDANCE)
    for i in (0, 33, 79):
        assert torch.equal(noise[i], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))
    assert len(calls[1][2]) == 64 and calls[1][3] is None and calls[1][4]["guidance"] == 1


def test_load_run(tmp_path):
    """load_run gives the EMA network, in eval mode, and the run's diffusion."""
    state = run(tmp_path / "run", f"{MOVES} --model uvit")
    found, net, diffusion = train.load_run(tmp_path / "run", CPU)
    assert same(net.state_dict(), state["ema"]) and error(state["ema"], state["model"]) > 1e-5
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert diffusion.target == "v" and found["config"] == train.Config(**state["config"])


# --- budgets ---

def test_minutes(tmp_path, monkeypatch):
    """--minutes ends a run by the clock; with --images, whichever comes first does."""
    ticks = iter(range(10_000))                      # a look at the clock takes 1 s
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(ticks)))
    flags = argv(tmp_path / "a", "--minutes 0.5")
    i = flags.index("--images")
    train.main(flags[:i] + flags[i + 2:])
    assert 16 <= load(tmp_path / "a")["images"] <= 30 * 16
    assert run(tmp_path / "b", "--minutes 100 --images 32")["images"] == 32
    assert run(tmp_path / "c", "--minutes 0.5 --images 100000")["images"] <= 30 * 16
