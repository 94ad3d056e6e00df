"""What real users ran into: odd folders, half an environment, damaged files, terminals that are none."""
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

import probe
import sample
import train
from conftest import (COLOURS, CPU, MOVES, ROOT, argv, end, folder, fork_two, load, refused, run, same,
                      train_in_fork, tree)

pytestmark = pytest.mark.usefixtures("quick")


def fail(*args, **kwargs):
    """Stands in for what the system refuses."""
    raise OSError(30, "Read-only file system")


def no_memory(*args, **kwargs):
    """Stands in for what needs too much of the GPU."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


def no_memory_of_a_mac(*args, **kwargs):
    raise RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB, max allowed: 18.1 GB).")


CLASSES = {f"train/{'ab'[i % 2]}/{i:02}.png": ("red", "blue")[i % 2] for i in range(16)}


# --- what is not needed does not stop what is ---

def test_read_only_data(tmp_path, monkeypatch, capsys):
    """Where neither the cache can be written nor what is left of it removed, one line says so."""
    spec = folder(tmp_path / "photos", CLASSES)
    before = tree(tmp_path)
    monkeypatch.setattr(train, "open", fail, raising=False)
    monkeypatch.setattr(Path, "unlink", fail)
    assert len(train.load_data(spec, "train", 8).images) == 16
    assert capsys.readouterr().out.count("Read-only file system") == 1 and tree(tmp_path) == before


@pytest.mark.parametrize("what", ["grid", "memory", "memory of a Mac", "git"])
def test_goes_on_without(tmp_path, monkeypatch, capsys, what):
    """A grid that can't be drawn or written, or a machine without git, does not end a run."""
    if what == "grid":
        monkeypatch.setattr(train, "save_grid", fail)
    if what == "memory":
        monkeypatch.setattr(train.GaussianDiffusion, "sample", no_memory)
    if what == "memory of a Mac":
        monkeypatch.setattr(train.GaussianDiffusion, "sample", no_memory_of_a_mac)
    if what == "git":
        monkeypatch.setenv("PATH", "")
    assert run(tmp_path / "run", "--images 32 --sample-every 16")["images"] == 32
    assert capsys.readouterr().out.count("could not draw samples") == (0 if what == "git" else 2)
    assert not list((tmp_path / "run").glob("*.part"))


# --- environment ---

@pytest.mark.parametrize("given", [
    dict(RANK="1"), dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"),
    dict(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="high")])
def test_half_an_environment(tmp_path, monkeypatch, capsys, given):
    """What only looks like a start of several processes is refused, in whichever process it is seen."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with refused(capsys, "RANK", "torchrun"):
        train.main(argv(tmp_path / "run"))
    assert not tree(tmp_path)


def test_port_in_use(tmp_path, monkeypatch, capsys):
    """So is a start whose processes cannot meet, here since another run has the port."""
    with socket.create_server(("", 0)) as server:
        for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost",
                                MASTER_PORT=str(server.getsockname()[1])).items():
            monkeypatch.setenv(name, value)
        with refused(capsys, "RANK", "torchrun"):
            train.main(argv(tmp_path / "run"))


def test_address_alone(monkeypatch):
    """An address in the environment starts nothing; the world is one process."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert train.setup("cpu") == (CPU, 0, 1)


def test_too_many_processes(monkeypatch):
    """A process without a GPU of its own says how many there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(train.OwnError, match="GPU 2, and there are 2"):
        train.setup("cuda")


def test_processes_on_a_mac(monkeypatch):
    """torchrun is refused where the device would be MPS, which has no way to share the work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(train.UserError, match="without torchrun"):
        train.setup(None)


# --- the data of a run that goes on ---

@pytest.fixture
def photo_run(tmp_path, monkeypatch):
    """A conditional run on "folder:photos", beside it -> its flags; a folder like it may take its place."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "photos", CLASSES)
    run("run", "--images 16 --conditional --data folder:photos")
    return "--resume --images 32 --conditional --data"


@pytest.mark.parametrize("spec", ["folder:./photos", "folder:photos/", "folder:{}/photos", "folder:~/photos",
                                  "folder:moved"])
def test_another_way_to_the_data(tmp_path, photo_run, monkeypatch, spec):
    """A run goes on by any spelling of its folder, and after the folder has moved."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if spec.endswith("moved"):
        (tmp_path / "photos").rename(tmp_path / "moved")
    typed = spec.format(tmp_path)
    state = run("run", f"{photo_run} {typed}")
    assert state["images"] == 32
    assert state["config"]["data"] == f"folder:{tmp_path}/{'moved' if 'moved' in spec else 'photos'}"
    assert json.loads(Path("run/config.json").read_text())["data"] == typed


def test_from_elsewhere(tmp_path, photo_run, monkeypatch):
    """A run is probed from any folder; what is published names no folder of this machine."""
    folder(tmp_path / "photos", {name.replace("train", "test"): c for name, c in CLASSES.items()})
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    probe.main(["../run", "--device", "cpu", "--t", "10"])
    for name in ("probe.json", "config.json", "log.jsonl"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize("change, words", [
    (lambda root: (root / "train/a").rename(root / "train/z"), "were ['a', 8], are ['b', 8]"),
    (lambda root: (root / "train/a/00.png").unlink(), "were ['a', 8], are ['a', 7]"),
    (lambda root: folder(root, {"train/c/1.png": "red"}), "were None, are ['c', 1]")])
def test_other_data(tmp_path, photo_run, capsys, change, words):
    """A run does not go on with classes that mean something else, or with other images."""
    change(tmp_path / "photos")
    before = tree(tmp_path / "run")
    with refused(capsys, "run/checkpoint.pt", "folder:photos", words):
        train.main(argv("run", f"{photo_run} folder:photos"))
    assert tree(tmp_path / "run") == before


def test_names_do_not_matter_without_classes(tmp_path, monkeypatch):
    """A run without classes goes on after they were renamed."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "photos", CLASSES)
    run("run", "--images 16 --no-conditional --data folder:photos")
    (tmp_path / "photos/train/a").rename(tmp_path / "photos/train/z")
    assert run("run", "--images 32 --no-conditional --resume --data folder:photos")["images"] == 32


@pytest.mark.parametrize("spec, words", [
    ("photos", "folder:photos"), ("folder:/", "drive"), ("latents:nowhere", "nowhere exist")])
def test_no_such_data(tmp_path, monkeypatch, capsys, spec, words):
    """A folder that is not there is called so; one without its "folder:" is suggested."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with refused(capsys, *words.split()):
        train.main(argv("run", f"--data {spec}"))


# --- a run that goes on ---

def test_resume_alone(tmp_path):
    """--resume --out RUN goes on with the flags of that run; those that are given win."""
    first = f"{MOVES} --target eps --micro-batch 4 --images 32"
    expected = run(tmp_path / "whole", first.replace("32", "64"))
    run(tmp_path / "run", first)
    train.main(["--resume", "--out", str(tmp_path / "run"), "--images", "64"])
    assert same(load(tmp_path / "run")["model"], expected["model"])


def test_resume_of_other_code(old_run, capsys):
    """A flag that this code does not know, in config.json or in a checkpoint, is named."""
    config = json.loads((old_run / "config.json").read_text())
    (old_run / "config.json").write_text(json.dumps(config | dict(min_snr=5)))
    with refused(capsys, "config.json", "other code", "min_snr"):
        train.main(["--resume", "--out", str(old_run)])
    (old_run / "config.json").write_text(json.dumps(config | dict(lr="fast")))
    with refused(capsys, "config.json", "lr 'fast' is no float", "remove it"):
        train.main(["--resume", "--out", str(old_run)])
    (old_run / "config.json").write_text(json.dumps(config | dict(size="huge")))
    with refused(capsys, "config.json", "no network dit huge", "remove it"):
        train.main(["--resume", "--out", str(old_run)])
    (old_run / "config.json").unlink()
    assert run(old_run, "--resume --images 64")["images"] == 64              # all flags by hand
    state = load(old_run)
    for change, words in ((dict(min_snr=5), ["other code", "min_snr"]), (dict(size="huge"), ["dit huge"])):
        torch.save(state | dict(config=state["config"] | change), old_run / "checkpoint.pt")
        for main in (sample.main, probe.main):
            with refused(capsys, "checkpoint.pt", *words):
                main([str(old_run), "--device", "cpu"])


def test_two_programs(old_run, capsys):
    """Where another program trains in a folder, all processes of a second one end; nothing is written."""
    before = tree(old_run)
    other = train.lock(old_run, None)
    with refused(capsys, "another program trains in", "run", "--out"):
        train.main(argv(old_run, "--resume --images 64"))
    both = fork_two(train_in_fork, argv(old_run, "--resume --images 64"))
    assert [end(process)[0] for process in both] == [2, 2]
    assert tree(old_run) == before
    os.close(other)
    for images in (64, 96):                         # the lock goes with its holder
        assert run(old_run, f"--resume --images {images}")["images"] == images


@pytest.mark.parametrize("name, flags", [("new", ""), ("old", "--resume --images 64")])
def test_a_program_that_ends_meanwhile(old_run, tmp_path, monkeypatch, capsys, name, flags):
    """What another program wrote into a folder while this one still loaded its data stays."""
    out, asked = dict(new=tmp_path / "new", old=old_run)[name], train.load_data

    def load_slowly(*args, **kwargs):
        out.mkdir(exist_ok=True)
        (out / "checkpoint.pt").write_bytes(b"its end")
        return asked(*args, **kwargs)
    monkeypatch.setattr(train, "load_data", load_slowly)
    with refused(capsys, "checkpoint.pt was written by another program", "--resume", "--out"):
        train.main(argv(out, flags))
    assert (out / "checkpoint.pt").read_bytes() == b"its end"


def test_old_log_is_kept(old_run, capsys):
    """Where the checkpoint is gone, --resume begins anew and keeps the log under another name, each time."""
    old = (old_run / "log.jsonl").read_text()
    for kept in ("log.jsonl.1", "log.jsonl.2"):
        (old_run / "checkpoint.pt").unlink()
        train.main(argv(old_run, "--resume --images 16"))
        assert kept in capsys.readouterr().out
    assert (old_run / "log.jsonl.1").read_text() == old


def test_finished(old_run):
    """A finished run that is resumed keeps its checkpoint as it is."""
    before = (old_run / "checkpoint.pt").read_bytes()
    train.main(argv(old_run, "--resume --images 32"))
    assert (old_run / "checkpoint.pt").read_bytes() == before


# --- files that are not what was written ---

def spoil(path):
    """Half of the heaviest average becomes zeros, in the file."""
    weights = max(torch.load(path, weights_only=True)["ema"].values(), key=lambda w: w.abs().sum())
    content, part = bytearray(path.read_bytes()), weights.numpy().tobytes()
    start = content.index(part)
    content[start:start + len(part) // 2] = bytes(len(part) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["zeros", "ema", "model"])
def test_damaged_weights(old_run, capsys, how):
    """No program loads a checkpoint whose bytes changed, or whose weights are not finite."""
    path = old_run / "checkpoint.pt"
    if how == "zeros":
        spoil(path)
    else:
        state = load(old_run)
        next(iter(state[how].values()))[0] = torch.nan
        torch.save(state, path)
    before = tree(old_run)
    for main, flags in ((sample.main, [str(old_run)]), (probe.main, [str(old_run)]),
                        (train.main, argv(old_run, "--resume --images 64"))):
        with refused(capsys, str(path), "no whole checkpoint"):
            main([*flags, "--device", "cpu"])
    assert tree(old_run) == before


def test_links_are_not_followed(tmp_path, monkeypatch):
    """A link where a temporary file is to be is not written through, whatever its name."""
    precious = tmp_path / "thesis"
    precious.write_text("do not lose me")
    monkeypatch.setattr(train.secrets, "token_hex", lambda n: "guessed")
    for name in ("file.part", "file.guessed.part"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(train.UserError, match="exists"):
        train.save_file(tmp_path / "file", lambda file: file.write(b"new"))
    monkeypatch.undo()
    train.save_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert precious.read_text() == "do not lose me" and (tmp_path / "file").read_bytes() == b"new"


def test_old_parts_go(tmp_path):
    """What a killed process left of a file goes when that is written again; what is being made stays."""
    old, young, other = (tmp_path / name for name in ("a[1].x.part", "a[1].y.part", "b.x.part"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (1, 1))
    train.save_file(tmp_path / "a[1]", lambda file: file.write(b"whole"))
    assert not old.exists() and young.exists() and other.exists()


def test_names_reach_the_disk(tmp_path, monkeypatch):
    """All files and folders of latents are flushed before they get their name, every name after it."""
    order, replace = [], os.replace
    monkeypatch.setattr(train, "flush", lambda path: order.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("renamed") or replace(a, b))
    part = tmp_path / "l.part"
    folder(part, {"train/latents.npy": b"1", "train/labels.npy": b"2"})
    train.put_in_place(part, tmp_path / "l", {})
    assert set(order[:-2]) == {"train", "latents.npy", "labels.npy", "meta.json", "l.part"}
    assert order[-2:] == ["renamed", tmp_path.name]
    order.clear()
    train.save_file(tmp_path / "file", lambda file: file.write(b"whole"))
    assert order == ["renamed", tmp_path.name]


@pytest.mark.parametrize("program", ["probe", "sample"])
def test_no_picture_beside_other_numbers(old_run, monkeypatch, capsys, program):
    """Stopped between the numbers and their picture, a program leaves new numbers without the old picture.

    Ctrl-C is a line and exit code 130.
    """
    def stop(*args):
        raise KeyboardInterrupt
    module, flags = (probe, "--t 10") if program == "probe" else (sample, "--npz -n 1 --steps 1")
    name = "probe" if program == "probe" else "samples"
    (old_run / f"{name}.png").write_text("old")
    monkeypatch.setattr(module, "draw_maps" if program == "probe" else "save_grid", stop)
    with pytest.raises(SystemExit, match="130"):
        module.main([str(old_run), "--device", "cpu", *flags.split()])
    assert capsys.readouterr().err.endswith("interrupted\n") and not (old_run / f"{name}.png").exists()
    assert (old_run / f"{name}{'.json' if program == 'probe' else '.npz'}").exists()


# --- folders of images ---

def test_system_files(tmp_path, capsys):
    """What systems leave in folders is neither class nor image; other files are counted, once."""
    spec = folder(tmp_path / "photos", {
        **CLASSES, "train/.ipynb_checkpoints/1.png": "red", "train/__MACOSX/1.png": "red",
        "train/@eaDir/1.png": "red", "train/a/@eaDir/1.png": "red", "train/a/._1.png": b"Mac",
        "train/a/x.heic": b"", "train/a/y.HEIC": b"", "train/b/notes.txt": b""})
    for _ in range(2):
        data = train.load_data(spec, "train", 8)
        assert data.classes == ["a", "b"] and len(data.images) == 16
    said = capsys.readouterr().out
    assert said.count("2 .heic, 1 .txt") == said.count("\n") == 1
    flat = folder(tmp_path / "flat", {"1.png": "red", ".2.png": "red", "._1.png": b"Mac", "3.svg": b""})
    assert len(train.load_data(flat, "train", 8).images) == 1
    assert "1 .svg" in capsys.readouterr().out


def test_images_in_no_class(tmp_path, capsys):
    """Images beside the folders of classes, or in folders beside images, are left out, which is said."""
    beside = {"train/1.png": "red", "train/2.png": "red", "train/a.txt": b""}
    spec = folder(tmp_path / "photos", {**CLASSES, **beside})
    assert len(train.load_data(spec, "train", 8).images) == 16
    assert "left out 2 images" in capsys.readouterr().out
    flat = folder(tmp_path / "flat", {"1.png": "red", "more/2.png": "red"})
    assert len(train.load_data(flat, "train", 8).images) == 1
    assert f"left out the folders in {tmp_path}/flat: more" in capsys.readouterr().out


def test_nobodys_home():
    """~name of nobody is a folder that does not exist."""
    for spec in ("folder:~nobody-of-that-name/photos", "~nobody-of-that-name"):
        with pytest.raises(train.UserError, match="nobody-of-that-name"):
            train.load_data(spec, "train", 8)


@pytest.mark.parametrize("suffix", ["jfif", "gif", "avif"])
def test_more_kinds(tmp_path, suffix):
    """.jfif, .gif (its first frame) and, where Pillow can, .avif are images."""
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {suffix}")
    frames = [Image.new("RGB", (8, 8), COLOURS[c]) for c in ("red", "blue")]
    more = dict(save_all=True, append_images=frames[1:]) if suffix == "gif" else {}
    (tmp_path / "photos").mkdir()
    frames[0].save(tmp_path / f"photos/1.{suffix}", **more)
    image = train.load_data(f"folder:{tmp_path}/photos", "train", 8).images[0]
    assert (image[:, 4, 4].float() - torch.tensor(COLOURS["red"])).abs().max() < 8


@pytest.mark.parametrize("files, flags", [
    ({"train/c": None}, ""), ({"train/c/1.heic": b""}, ""), ({"train/c/1.png": b"broken"}, "--skip-bad")])
def test_empty_class(tmp_path, capsys, files, flags):
    """A class of which no image can be read is named."""
    spec = folder(tmp_path / "photos", CLASSES)
    train.load_data(spec, "train", 8)               # which keeps the images: an empty folder changes none
    folder(tmp_path / "photos", files)
    with refused(capsys, "of class c", ".png"):
        train.main(argv(tmp_path / "run", f"--data {spec} {flags}"))


def test_skip_what_is_no_file(tmp_path, capsys):
    """A link to nothing, a loop of links and a pipe are unreadable images, which --skip-bad leaves out."""
    spec = folder(tmp_path / "photos", CLASSES)
    (tmp_path / "photos/train/a/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "photos/train/a/loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "photos/train/b/pipe.png")
    with refused(capsys, "dangling.png", "--skip-bad"):
        train.main(argv(tmp_path / "run", f"--data {spec}"))
    data = train.load_data(spec, "train", 8, skip_bad=True)
    assert "left out 3 unreadable" in capsys.readouterr().out
    assert data.labels.bincount().tolist() == [8, 8]
    whole = 19 * 3 * 8 * 8
    assert data.images.untyped_storage().nbytes() == whole, "the images were copied"
    assert (data.images[:, 0, 4, 4] == 255).tolist() == [True] * 8 + [False] * 8


def test_links_in_a_circle(tmp_path):
    """Links to folders are followed, but not round and round; the order is that of torchvision."""
    spec = folder(tmp_path / "photos", {**CLASSES, "train/a/x/2.png": "red", "train/a/x-y/1.png": "red",
                                        "train/a/x/z/0.png": "red"})
    root = tmp_path / "photos/train"
    found = make_dataset(root, dict(a=0, b=1), IMG_EXTENSIONS)
    for link, target in (("a/loop", ".."), ("b/loop", ".."), ("b/back", "../b"), ("a/x/up", "..")):
        (root / link).symlink_to(target)
    files, labels, _ = train.list_folder(tmp_path / "photos", "train")
    assert [(str(path), k) for path, k in zip(files, labels.tolist())] == found
    assert len(train.load_data(spec, "train", 8).images) == len(found)


@pytest.mark.parametrize("program, flags", [(sample, "--fid -n 1 --steps 1"), (probe, "--t 10")])
def test_skip_bad_everywhere(tmp_path, photo_run, monkeypatch, capsys, program, flags):
    """sample.py --fid and probe.py have the --skip-bad that they advise."""
    folder(tmp_path / "photos", {name.replace("train", "test"): c for name, c in CLASSES.items()})
    folder(tmp_path / "photos", {"train/a/99.png": b"broken"})
    monkeypatch.setattr(sample, "fid", lambda *args: 1.0)
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda name: True)
    with refused(capsys, "99.png", "--skip-bad"):
        program.main(["run", "--device", "cpu", *flags.split()])
    program.main(["run", "--device", "cpu", "--skip-bad", *flags.split()])
    said = capsys.readouterr().out
    assert "left out 1" in said
    assert program is probe or "fewer than 2,048" in said


def test_transparent(tmp_path):
    """Where an image is transparent it is white, whatever colour hides there."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = 0, 0, 255, 255
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/1.png")
    Image.fromarray(pixels).quantize(8).save(tmp_path / "photos/2.png")
    for image in train.load_data(f"folder:{tmp_path}/photos", "train", 8).images:
        assert image[:, 1, 4].tolist() == [0, 0, 255] and image[:, 6, 4].tolist() == [255, 255, 255]


def test_nearly_black(tmp_path, capsys):
    """12 bits in a file of 16 look black, which is said."""
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "photos/1.png")
    train.load_data(f"folder:{tmp_path}/photos", "train", 8)
    assert "nearly black" in capsys.readouterr().out


def test_none_readable(tmp_path, capsys):
    """Where no image can be read that is said, and not that they are black."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(b"no image")
    with pytest.raises(train.UserError, match="none of the 1 images"):
        train.load_data(f"folder:{tmp_path}/photos", "train", 8, skip_bad=True)
    assert capsys.readouterr().out == ""


# --- cheap before costly ---

@pytest.mark.parametrize("flags, words", [("--image-size 7", "dit tiny 7"), ("--out {}", "too long")])
def test_before_the_data(tmp_path, photos, monkeypatch, capsys, flags, words):
    """What needs no data is refused before an image is decoded."""
    monkeypatch.setattr(train, "load_data", lambda *args, **how: pytest.fail("it loads the data"))
    flags = flags.format("x" * 300)
    with refused(capsys, *words.split()):
        train.main(argv(tmp_path / "run", f"--data folder:{photos} {flags}"))


def test_folder_that_may_not_be_written(tmp_path, photos, monkeypatch, capsys):
    """So is a run folder that can't be made."""
    monkeypatch.setattr(train, "load_data", lambda *args, **how: pytest.fail("it loads the data"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with refused(capsys, str(tmp_path / "a/run"), "can't be written"):
        train.main(argv(tmp_path / "a/run", f"--data folder:{photos}"))


@pytest.mark.parametrize("module, work", [(sample, "draw"), (probe, "study")])
def test_run_that_may_not_be_written(old_run, monkeypatch, capsys, module, work):
    """Nor do the others work for results that can't be written."""
    monkeypatch.setattr(module, work, lambda *args: pytest.fail("it works"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != old_run)
    with refused(capsys, str(old_run), "can't be written"):
        module.main([str(old_run), "--device", "cpu"])


@pytest.mark.parametrize("folder", ["x/" * 150, "\u5199" * 70])
def test_name_too_long(old_run, capsys, folder):
    """A result that no file name can hold, which counts bytes, is refused before the probes."""
    with refused(capsys, "--data", "too long"):
        probe.main([str(old_run), "--data", f"folder:{folder}"])


@pytest.mark.parametrize("main, flags, words", [
    (train.main, "--sede 1", "--sede --seed"), (sample.main, "run --guidence 1", "--guidence --guidance"),
    (probe.main, "run --argument 1", "--argument --augment"),
    (train.main, "--images 1.5", "--images 1.5 whole"),
    (sample.main, "run --out a/b", "--out a/b"), (sample.main, f"run --out {'x' * 255}", "--out shorten"),
    (sample.main, "run --out " + "\u5199" * 80, "--out shorten"),
    (train.main, "--images nan", "nan whole"), (train.main, "--images 1e400", "1e400 whole"),
    (sample.main, f"run -n {10 ** 12}", "--count 10,000,000"),
    (sample.main, f"run --seed {2 ** 63}", "--seed"),
    (sample.main, f"run -n 2 --seed {2 ** 32 - 1}", "--seed 4,294,967,294"),     # torch takes 32 bits
    (sample.main, "run --seed -1", "--seed 0")])
def test_flags(capsys, main, flags, words):
    """A misspelt flag is told what may be meant; a number that cannot be is named."""
    with refused(capsys, *words.split()):
        main(flags.split())


def test_whole_numbers():
    """1e6 is a whole number, and large ones lose no digit."""
    cfg = train.parse_config(f"--images 1e6 --seed {2 ** 63 + 1}".split())
    assert cfg.images == 1_000_000 and cfg.seed == 2 ** 63 + 1


@pytest.mark.parametrize("models", [
    ",".join(train.MODELS), pytest.param("unet,uvit,dit", marks=pytest.mark.pins)])
def test_help_shows_choices(capsys, models):
    """--help has groups, and the choices of a flag."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert f"{{{models}}}" in said and "{bf16,fp16,fp32}" in said
    assert all(f"{name}:" in said for name in train.GROUPS.values())


# --- pictures ---

@pytest.mark.parametrize("value", ["nan", "inf"])
def test_pictures_that_are_none(old_run, monkeypatch, capsys, value):
    """What is not finite is no picture: it is named, and nothing is written. Nor can --guidance be so."""
    before, flags = tree(old_run), [str(old_run), *"-n 2 --steps 2 --npz --device cpu".split()]
    with refused(capsys, "--guidance", "no number"):
        sample.main([*flags, "--guidance", value])
    monkeypatch.setattr(train.GaussianDiffusion, "sample",
                        lambda self, net, noise, *args, **how: noise * float(value))
    with refused(capsys, "not finite", "--guidance", "--precision"):
        sample.main(flags)
    assert tree(old_run) == before


def test_classes_called_by_number(capsys):
    """Where classes are called 01, 02, 03, a number is a name, and no other number is taken for one."""
    assert sample.class_ids(["02"], ["01", "02", "03"], True) == [1]
    assert sample.class_ids(["1", "b"], ["a", "b"], True) == [1, 1]
    with pytest.raises(train.UserError, match="--classes 1 is not"):
        sample.class_ids(["1"], ["01", "02", "03"], True)


def test_samples_have_names(old_run, capsys):
    """--out names the files; where they take the place of others, that is said."""
    for flags, words in (("--out seven --npz", "seven.png: "), ("--out seven", "seven.png, in place of")):
        sample.main([str(old_run), "--device", "cpu", "--count", "2", "--steps", "1", *flags.split()])
        assert words in capsys.readouterr().out
    assert {p.name for p in old_run.glob("s*")} == {"samples-32.png", "seven.png", "seven.npz"}
    sample.main([str(old_run), *"--denoise --steps 2 --out way --device cpu".split()])
    assert (old_run / "way.png").exists() and not (old_run / "denoise.png").exists()


# --- memory ---

@pytest.mark.parametrize("program, flags", [
    (train, "--micro-batch, --batch-size, --image-size or --size (train.py)"),
    (sample, "--batch-size (sample.py)"), (probe, "--batch-size, --images or fewer --t (probe.py)")])
def test_no_memory(old_run, tmp_path, monkeypatch, capsys, program, flags):
    """Where the GPU's memory is too small, a sentence says what to turn."""
    monkeypatch.setattr(program, {train: "train_step", sample: "draw", probe: "study"}[program], no_memory)
    with refused(capsys, "memory", flags):
        program.main(argv(tmp_path / "other") if program is train else [str(old_run), "--device", "cpu"])


@pytest.mark.parametrize("work", [
    lambda run: train.decode(run / "samples-32.png", 8, skip_bad=True),
    lambda run: train.read_checkpoint(run / "checkpoint.pt"),
    lambda run: train.save_file(run / "checkpoint.pt", torch.load),
    lambda run: train.knows_images(None)])
def test_no_memory_is_no_broken_file(old_run, monkeypatch, work):
    """Where the memory is too small for a file, nothing calls it broken, or the disk full."""
    before = tree(old_run)
    monkeypatch.setattr(train, "open_image", no_memory)
    monkeypatch.setattr(torch, "load", no_memory)
    monkeypatch.setattr(train, "scale_of", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        work(old_run)
    assert tree(old_run) == before


def test_a_broken_file_called_out_of_memory(monkeypatch):
    """Pillow's word for some broken files does not keep --skip-bad from leaving them out."""
    monkeypatch.setattr(train, "open_image", Mock(side_effect=OSError("out of memory error when reading")))
    assert train.decode(Path("a.png"), 8, skip_bad=True) is None


def test_grid_in_parts(tmp_path, monkeypatch):
    """The grid is drawn --micro-batch images at a time, and is the same."""
    sizes, real = [], train.GaussianDiffusion.sample
    run(tmp_path / "whole", "--images 16")

    def sample_some(self, net, noise, *args, **kwargs):
        sizes.append(len(noise))
        return real(self, net, noise, *args, **kwargs)
    monkeypatch.setattr(train.GaussianDiffusion, "sample", sample_some)
    run(tmp_path / "parts", "--images 16 --micro-batch 8")
    assert sizes == [8] * 10
    a, b = (np.asarray(Image.open(tmp_path / name / "samples-16.png"), int) for name in ("whole", "parts"))
    assert abs(a - b).max() <= 2


def test_grid_of_many_classes(tmp_path):
    """A grid has a column a class, ten at most."""
    spec = folder(tmp_path / "photos", {f"train/{k:02}/1.png": "red" for k in range(12)})
    run(tmp_path / "run", f"--images 16 --conditional --data {spec}")
    assert Image.open(tmp_path / "run/samples-16.png").size == (10 * 68 + 4, 8 * 68 + 4)


# --- the terminal ---

def test_control_characters(capsys):
    """What a terminal would obey is not passed on."""
    train.say("class \x1b[2J\x07 b\udcff\nnext")
    assert capsys.readouterr().out == "class ?[2J? b?\nnext\n"


def test_no_terminal(tmp_path, capsys):
    """Where stderr is no terminal there is no bar, but a line a record."""
    train.main(argv(tmp_path / "run", "--images 640"))
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "320 of 640 images" in err and "\r" not in err and "it/s" not in err


def test_poor_letters(tmp_path, monkeypatch):
    """Letters that a terminal lacks become a "?", and end no run."""
    said = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", said)
    run(tmp_path / "räume ★", "--images 16")
    said.seek(0)
    assert "r?ume ?/checkpoint.pt" in said.read()


@pytest.mark.parametrize("shell", ["exec \"$@\" >&- 2>&-", "exec \"$@\" | true"])
def test_poor_terminals(tmp_path, photos, shell):
    """Neither that it is closed, nor that it goes away, ends a run."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *argv(out, f"--images 16 --data folder:{photos}")]
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", shell, "bash", *command], capture_output=True)
    assert load(out)["images"] == 16 and (ended.returncode == 0 or "true" in shell)


def test_few_images(tmp_path):
    """Fewer images than a batch holds: each is there as often as the others."""
    spec = folder(tmp_path / "photos", {f"{i}.png": ("red", "blue", "green")[i] for i in range(3)})
    cfg = train.parse_config(f"--data {spec} --batch-size 9 --image-size 8".split())
    batches = train.Batches(train.load_data(spec, "train", 8), cfg, train.make_diffusion(cfg), CPU)
    x0, *_ = batches(0)
    assert sorted(x0[:, :, 4, 4].argmax(1).tolist()) == [0] * 3 + [1] * 3 + [2] * 3


# --- tiny networks on data of one's own ---

def test_tiny_recipe(tmp_path):
    """tiny has flags of its own for one's own images, too: labels where there are classes, 16 pixels."""
    folder(tmp_path / "flat", {"1.png": "red"})
    folder(tmp_path / "photos", CLASSES)
    for name, conditional in (("flat", False), ("photos", True)):
        cfg = train.parse_config(f"--model unet --size tiny --data folder:{tmp_path}/{name}".split())
        assert cfg.conditional == conditional and cfg.image_size == 16 and cfg.lr == train.TINY["lr"]
        assert cfg.images == cfg.decay == train.TINY_IMAGES["unet"]


def test_recipe_is_printed(tmp_path, capsys):
    """The recipe is said, once."""
    train.main(argv(tmp_path / "run", "--images 16"))
    assert capsys.readouterr().out.count("'target': 'v'") == 1
