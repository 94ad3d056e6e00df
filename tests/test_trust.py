"""What we promise to people who let it run for days, and to those who open what others made.

Done to real processes, on the CPU; what takes minutes needs --run-slow. More of the promises are tested in
test_train.py and test_latents.py: .github/results/reliability.md has the table.
"""
import importlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import probe
import sample
import train
from conftest import (MOVES, ROOT, TORCHRUN, Fork, Program, argv, assert_same_run, end, error, few_latents,
                      fork_two, like_windows, load, log, losses, probed, refused, run, run_two, start,
                      train_in_fork, tree, wait_for)

pytestmark = pytest.mark.usefixtures("quick")
slow = pytest.mark.slow


# --- it is killed, or asked to stop ---

def before_call(owner, name, n, act):
    """From now on the n-th call of a function of a module begins with act()."""
    calls, real = [], getattr(owner, name)

    def replacement(*args):
        calls.append(1)
        if len(calls) == n:
            act()
        return real(*args)
    setattr(owner, name, replacement)


def killed_in_fork(module, name, n, flags):
    """A run, logged every 64 images, that is killed before the n-th call of a function."""
    before_call(sys.modules[module], name, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train.LOG_STEPS = 4
    train.main(flags)


def test_kill(tmp_path, monkeypatch, photos):
    """Killed between two saves, as one begins, before it is in place: a run goes on bit for bit.

    Nothing is logged twice or left.
    """
    flags = f"{MOVES} --save-every 160 --images 400 --data folder:{photos} --resume"
    out = tmp_path / "run"
    kills = [("train", "update_ema", 19),       # two log points after the save at 160 images
             ("torch", "save", 1),              # the next checkpoint has been begun
             ("os", "replace", 3)]              # it is written, but not in its place (config and log are)
    for module, name, n in kills:
        assert end(Fork(killed_in_fork, module, name, n, argv(out, flags)))[0] == -signal.SIGKILL
        assert load(out)["images"] == 160 and any(out.glob("checkpoint.pt.*.part")) == (module != "train")
        assert max(record["images"] for record in log(out)[1]) > 160
    with open(out / "log.jsonl", "a") as file:
        file.write('{"images": 352, "lo')                # a line that was being written
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    assert_same_run(run(out, flags), run(tmp_path / "whole", flags))
    assert losses(out) == losses(tmp_path / "whole") and not list(out.glob("*.part"))


@slow
def test_kill_again_and_again(tmp_path, photos, n=10):
    """Killed ten times at random moments, most of them within a save: it ends as if nothing had happened."""
    flags = f"{MOVES} --save-every 16 --sample-every 160 --data folder:{photos}"
    out, rng, within = tmp_path / "run", random.Random(0), 0
    for k in range(n):
        process = Fork(train_in_fork, argv(out, f"{flags} --images 100000 --resume"))
        saved = out / "checkpoint.pt"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        wait_for(lambda: saved.exists() and saved.stat().st_mtime_ns > before, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        within += any(out.glob("*.part"))
        assert load(out)["images"] >= 16 * (k + 1)                           # it is whole
    images = load(out)["images"] + 320
    assert within
    flags += f" --images {images}"
    assert_same_run(run(out, flags + " --resume"), run(tmp_path / "whole", flags))
    found, expected = losses(out), losses(tmp_path / "whole")
    assert {i: found[i] for i in expected} == expected and not list(out.glob("*.part"))


def stopped_in_fork(flags, go_on):
    """A run that says when it is in its second step, which lasts until the file go_on is there."""
    def linger():
        print("in a step", flush=True)
        while not go_on.exists():
            time.sleep(0.02)
    before_call(train, "update_ema", 2, linger)
    for number in (signal.SIGINT, signal.SIGHUP):   # a job in the background, or under nohup, ignores these
        signal.signal(number, signal.SIG_DFL)
    sys.orig_argv = ["python", "train.py", *flags]
    train.main(flags)


def on_two_disks(folders, flags):
    """The processes of a run as on two machines that share no drive; the first alone has CIFAR."""
    rank = int(os.environ["RANK"])
    os.chdir(folders[rank])
    if rank == 0:
        few = SimpleNamespace(data=np.zeros((40, 32, 32, 3), np.uint8), targets=[0] * 40, classes=["a"])
        train.open_cifar = lambda name, split, download: few
    train_in_fork(flags)


@pytest.mark.parametrize("case, words", [
    ("the same photos", []), ("a photo less", ["photos", "other files", "another machine"]),
    ("no checkpoint", ["checkpoint.pt", "every machine"]), ("an old checkpoint", ["checkpoint.pt", "same"]),
    ("a file in the run", ["run", "not empty"]), ("no cifar10", ["cifar10", "not in ./data"]),
    ("fewer latents", ["latents", "another machine"]), ("damaged latents", ["latents", "no whole"])])
def test_two_disks(tmp_path, photos, case, words):
    """Machines that share no drive: equal data is enough; what differs ends both with one sentence."""
    disks = [tmp_path / "first", tmp_path / "second"]
    for disk in disks:
        shutil.copytree(photos, disk / "photos", copy_function=shutil.copyfile)             # of another time
    flags = argv("run", f"{MOVES} --data folder:photos --images 64")
    if case == "a photo less":
        next(disks[1].glob("photos/train/*/*")).unlink()
    if "checkpoint" in case:
        first = f"{MOVES} --data folder:{disks[0]}/photos --images 32"
        run(disks[0] / "run", first)
        if "old" in case:
            shutil.copytree(disks[0] / "run", disks[1] / "run")
            run(disks[0] / "run", f"{first} --images 48 --resume")
        flags += ["--resume"]
    if case == "a file in the run":
        (disks[1] / "run").mkdir()
        (disks[1] / "run/notes.txt").write_text("mine")
    if "latents" in case:
        few_latents(disks[0] / "latents", "ab", train=20)
        few_latents(disks[1] / "latents", "ab", train=18 if case == "fewer latents" else 20)
        if case == "damaged latents":
            (disks[1] / "latents/train/latents.npy").unlink()
        flags = argv("run", "--data latents:latents")
    if case == "no cifar10":
        flags = argv("run", "--data cifar10")
    before = [tree(disk) for disk in disks]
    both = fork_two(on_two_disks, disks, flags)
    (code, _, err), (other, _, nothing) = [end(process) for process in both]
    assert tree(disks[1]) == before[1]
    if case == "the same photos":
        assert code == other == 0, err
        one = run(tmp_path / "one", f"{MOVES} --data folder:{disks[0]}/photos --images 64")
        assert error(load(disks[0] / "run")["ema"], one["ema"]) < 1e-5
    else:
        assert code == other == 2 and nothing == "" and tree(disks[0]) == before[0]
        assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_goes_on_on_several_machines(monkeypatch):
    """Of several machines one knows its own command alone: it does not make up the others'."""
    for name, value in dict(RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    assert train.resume_command() == "the same commands on all machines, and --resume"


@pytest.mark.parametrize("who", ["second", "torchrun"])
def test_asked_to_stop(tmp_path, photos, who):
    """SIGTERM to one of two processes, or to torchrun: both finish the same step, which is saved.

    The command that is named goes on, also in one process.
    """
    out = tmp_path / "run"
    flags = f"{MOVES} --model uvit --data folder:{photos} --save-every 64"      # of one size in all processes
    program, given = str(ROOT / "train.py"), argv(out, f"{flags} --images 100000")
    both = fork_two(train_in_fork, given) if who == "second" else [start(*TORCHRUN, program, *given)]
    wait_for((out / "checkpoint.pt").exists, both[0])
    both[-1].send_signal(signal.SIGTERM)
    (code, said, err), *others = [end(process) for process in both]
    images = load(out)["images"]
    assert (code > 0 if who == "torchrun" else code == 143) and all(other[0] == code for other in others)
    assert 'train.py", line' not in err and images % 16 == 0 and list(losses(out))[-1] == images
    found = re.findall(rf"stopped by SIGTERM at {images:,} images; .*; go on with: (.*)\n", said)
    begin = ["torchrun", "--nproc_per_node=2", program]
    assert [shlex.split(command) for command in found] == [[*begin, *given, "--resume"]]
    train.main([*given, "--resume", "--images", str(images + 32)])
    whole = run(tmp_path / "whole", f"{flags} --images {images + 32}")
    assert error(load(out)["model"], whole["model"]) < 1e-4


@pytest.mark.parametrize("signals, expected", [("SIGINT", 130), ("SIGINT SIGINT", -2), ("SIGHUP", 129),
                                               ("SIGTERM SIGTERM", 143)])
def test_ctrl_c(tmp_path, photos, signals, expected):
    """Ctrl-C waits for the step, saves, adds no second --resume; twice, it ends at once. Not so SIGTERM."""
    out = tmp_path / "run"
    flags = argv(out, f"{MOVES} --data folder:{photos} --resume --images 100000")
    process = Fork(stopped_in_fork, flags, tmp_path / "go on")
    wait_for(lambda: "in a step" in process.said("out"), process)
    for name in signals.split():
        process.send_signal(getattr(signal, name))
        time.sleep(0.2)
    (tmp_path / "go on").touch()
    code, said, err = end(process)
    assert code == expected and "Traceback" not in err, err
    assert (out / "checkpoint.pt").exists() == (code > 0) and not list(out.glob("*.p*g*"))
    if code > 0:
        command = shlex.join(["python", "train.py", *flags])
        assert f"stopped by {name} at 32 images; " in said and said.endswith(f"go on with: {command}\n")
        assert_same_run(load(out), run(tmp_path / "whole", f"{MOVES} --data folder:{photos} --images 32"))


def test_ignored_signals():
    """What is ignored stays so, as Ctrl-C in a job in the background; all is put back at the end."""
    old = [signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)]
    seen = []
    try:
        @train.command
        def main(argv):
            seen.append(train.collect_stops())
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        main()
        assert seen == [[signal.SIGTERM]] and signal.getsignal(signal.SIGTERM) == old[1]
    finally:
        signal.signal(signal.SIGINT, old[0])


def windows_in_fork(flags):
    """A run of train.py, imported anew, without what Windows lacks."""
    patch = pytest.MonkeyPatch()
    like_windows(patch)
    patch.delattr(signal, "SIGHUP")
    importlib.reload(train).main(flags)


def test_like_windows(tmp_path, photos):
    """A run needs nothing that Windows lacks."""
    flags = f"{MOVES} --data folder:{photos} --images 32"
    code, said, err = end(Fork(windows_in_fork, argv(tmp_path / "run", flags)))
    assert code == 0 and "Traceback" not in err, err
    assert_same_run(load(tmp_path / "run"), run(tmp_path / "whole", flags))


# --- several processes ---

def test_one_dies(tmp_path, photos):
    """Where one process of two dies, the other ends with an error within a minute, also without torchrun."""
    out = tmp_path / "run"
    both = fork_two(train_in_fork, argv(out, f"--data folder:{photos} --save-every 16 --images 100000"))
    wait_for((out / "checkpoint.pt").exists, both[0])
    both[1].kill()
    code, said, err = end(both[0], 60)
    assert code not in (0, -signal.SIGKILL) and "images in" not in said and err
    assert load(out)["images"] > 0


DIES_ONCE = """
import os, sys, conftest, pytest, train, test_trust
conftest.speed_up(pytest.MonkeyPatch())
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_trust.before_call(train, "update_ema", 25, lambda: os.kill(os.getpid(), 9))
train.main(sys.argv[1:])
"""


@slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_one_dies_under_torchrun(tmp_path, photos, restarts):
    """torchrun then ends the other one; with --max-restarts and --resume it goes on to the same end."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos} --save-every 160 --images 800"
    (tmp_path / "main.py").write_text(DIES_ONCE)
    process = start(*TORCHRUN, f"--max-restarts={restarts}", tmp_path / "main.py", *argv(out, flags),
                    "--resume", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    code, _, err = end(process, 120)
    assert (code == 0) == (restarts == 1) and load(out)["images"] == (800 if restarts else 320), err
    if restarts:
        whole = run(tmp_path / "whole", flags)
        assert error(load(out)["model"], whole["model"]) < 1e-3 < error(whole["model"], whole["ema"])
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-3)


def test_resume_with_more_processes(tmp_path, photos):
    """A run of one process goes on with two: weights and losses are those of one."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos}"
    whole = run(tmp_path / "whole", f"{flags} --images 240")
    run(out, f"{flags} --images 80")
    state, _ = run_two(out, f"{flags} --images 240 --resume")
    assert error(state["model"], whole["model"]) < 1e-4 < 5e-4 < error(whole["model"], whole["ema"])
    assert losses(out)[240] == pytest.approx(losses(tmp_path / "whole")[240], abs=1e-4)


# --- the disk is full ---

FULL = OSError(ENOSPC, "No space left on device")


@pytest.mark.parametrize("problem", ["fsync", "a real one"])
def test_full_disk(old_run, capsys, monkeypatch, problem):
    """A full disk while saving: one sentence; the last good checkpoint stays, byte for byte; no litter."""
    def fail():
        raise FULL
    resource, before = pytest.importorskip("resource"), (old_run / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if problem == "fsync":
        monkeypatch.setattr(os, "fsync", os.fsync)       # to be put back
        before_call(os, "fsync", 5, fail)                # after config.json, the log and their folder, twice
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with refused(capsys, str(old_run / "checkpoint.pt"), "--resume"):
            train.main(argv(old_run, "--resume --images 64"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (old_run / "checkpoint.pt").read_bytes() == before and not list(old_run.glob("*.part"))


def test_log_not_writable(old_run, capsys, monkeypatch):
    """A log that can't be written ends the run with one sentence that names it; the checkpoint stays."""
    def full(path, mode):
        if path.name == "log.jsonl":
            raise OSError(*FULL.args, str(path))
        return open(path, mode)
    monkeypatch.setattr(train, "open", full, raising=False)
    with refused(capsys, "No space left", str(old_run / "log.jsonl")):
        train.main(argv(old_run, "--resume --images 64"))
    assert load(old_run)["images"] == 32


# --- the numbers overflow ---

def spoil(monkeypatch, value, at, gradient=False):
    """From now on the losses, or their gradients, are multiplied by value in the passes at (1, 2, ...)."""
    calls, real = [], train.GaussianDiffusion.error

    def spoilt(self, *args):
        calls.append(1)
        result, factor = real(self, *args), float(value) if len(calls) in np.atleast_1d(at) else 1
        if not gradient:
            return result * factor
        result.register_hook(lambda grad: grad * factor)
        return result
    monkeypatch.setattr(train.GaussianDiffusion, "error", spoilt)


@pytest.mark.parametrize("log_steps, spoilt, flags, interval, kept", [
    (4, ("nan", 9), "", "128 and 192", 128),            # seen at a log point
    (20, ("inf", 9), "", "0 and 192", 128),             # before a save: it does not become the checkpoint
    (20, ("nan", 8, True), "", "0 and 128", 64),        # the last gradient, under losses that are finite
    (20, (1, 0), "--lr 1e30 --warmup 1", "0 and 64", None)])
def test_not_finite(tmp_path, capsys, monkeypatch, log_steps, spoilt, flags, interval, kept):
    """A loss or gradient that is not finite stops the run and leaves the last good checkpoint; no picture."""
    monkeypatch.setattr(train, "LOG_STEPS", log_steps)
    spoil(monkeypatch, *spoilt)
    out = tmp_path / "run"
    with refused(capsys, "not finite", f"between {interval} images", str(out / "checkpoint.pt"), "--lr"):
        train.main(argv(out, f"--save-every 64 --images 800 {flags}"))
    assert (out / "checkpoint.pt").exists() == (kept is not None) and not list(out.glob("*.p*g*"))
    if kept:
        state = load(out)
        assert state["images"] == kept
        assert all(v.isfinite().all() for name in ("model", "ema") for v in state[name].values())
    assert all(np.isfinite(x) for x in losses(out).values())


@pytest.mark.parametrize("at, skipped", [((1, 2, 7, 10), [2, 3, 4]), ((1, 2, 3, 4), [4, 4, 4])])
def test_skipped_steps(tmp_path, monkeypatch, at, skipped):
    """In fp16 a step whose gradient overflows is left out and counted in the log, across --resume as well."""
    spoil(monkeypatch, "inf", at, gradient=True)
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    out = tmp_path / "run"
    run(out, "--precision fp16 --images 128")
    state = run(out, "--precision fp16 --images 192 --resume")
    assert [record["skipped"] for record in log(out)[1]] == skipped
    assert all(v.isfinite().all() for name in ("model", "ema") for v in state[name].values())
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {8}
    assert state["scaler"]["scale"] == 2.0 ** (16 - 4)       # halved by each of the four


# --- what others made: checkpoints, latents, logs, pictures ---

ODD_JSON = [None, True, -1, 0, 7, 1.5, float("nan"), 10**9, "", "x", [], [1], ["x"], {}, {"x": 1}]


def mutate(value, rng):
    """A copy with one entry replaced by something odd, or left out, somewhere within."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD_JSON)
    copy = type(value)(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.25:
        del copy[key]
    else:
        copy[key] = mutate(copy[key], rng)
    return copy


def changed(whole, at, rng, n):
    """Bytes with n of them replaced by random ones."""
    return whole[:at] + bytes([rng.randrange(256) for _ in range(n)]) + whole[at + n:]


def sound(capsys, main, flags):
    """main ends well, or with exit code 2 and one sentence -> whether it ended well. Else it fails."""
    capsys.readouterr()
    try:
        main(list(map(str, flags)))
        return True
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
        return False


@pytest.mark.parametrize("n", [24, pytest.param(300, marks=slow)])
def test_damaged_checkpoint(tmp_path, capsys, n):
    """Bytes of a checkpoint cut off or changed: one sentence where it will not do."""
    out, rng, ended = tmp_path / "run", random.Random(n), []
    run(out, "--images 32")
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    for k in range(n):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] if k % 2 == 0 else changed(whole, at, rng, 9))
        sound(capsys, sample.main, [out, *"-n 2 --steps 2 --device cpu".split()])
        ended.append(sound(capsys, train.main, argv(out, "--resume --images 48")))
    assert n / 2 < ended.count(False) and not any(ended[::2]) and not list(out.glob("*.part"))


BAD = {             # what a checkpoint becomes: bytes, or what torch saves; or a change of what it holds
    "text": b"a text\n" * 99,
    "tensor": torch.zeros(3),
    "other": {"weights": {}},
    "pickle": pickle.dumps(Program(), protocol=2),
    "evil": lambda state: state.update(more=Program()),
    "headless": lambda state: state.pop("model"),
    "no loss": lambda state: state.pop("loss_sums"),
    "weight": lambda state: state["model"].update({next(iter(state["model"])): torch.zeros(3)}),
    "weights": lambda state: state.update(model=[1]),
    "of another depth": lambda state: state["model"].popitem(),
    "older": lambda state: state.update(channels=state.pop("shape")[0], loss_sum=0.5),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoint(tmp_path, monkeypatch, capsys, old_run, what):
    """What is no whole checkpoint, or fits no network, is refused by name; nothing in it is run or written.

    One of an older version of the code is told to be so.
    """
    path, state, content = old_run / "checkpoint.pt", load(old_run), BAD[what]
    if callable(content):
        content(state)
        content = state
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with refused(capsys, str(path), "other code: without shape" if what == "older" else ""):
        train.main(argv(old_run, "--resume --images 64"))
    if what in ("pickle", "evil"):
        for program in (sample, probe):
            assert not sound(capsys, program.main, [old_run])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("n", [32, pytest.param(300, marks=slow)])
def test_odd_latents(tmp_path, monkeypatch, capsys, n):
    """So with the files of a folder of latents."""
    monkeypatch.setattr(train, "vae_of", lambda meta, device: None)          # nothing is looked for online
    root, rng, ended = few_latents(tmp_path / "latents", "ab", train=20), random.Random(n), []
    meta = json.loads((root / "meta.json").read_text())
    files = {path: path.read_bytes() for path in root.rglob("*.*")}
    for k in range(n):
        for path, content in files.items():
            path.write_bytes(content)
        path = rng.choice(list(files))
        whole, at = files[path], rng.randrange(len(files[path]))
        if k % 4 == 0:
            value = rng.choice(ODD_JSON)
            odd = {**meta, rng.choice(list(meta)): value if k % 8 else [value] * 4}
            (root / "meta.json").write_text(json.dumps(odd))
        else:
            path.write_bytes(whole[:at] if k % 4 == 1 else changed(whole, at, rng, 3))
        flags = argv(tmp_path / f"run-{k}", "--images 16 --data", f"latents:{root}")
        ended.append(sound(capsys, train.main, flags))
    assert n / 3 < ended.count(False) < n and not any(ended[1::4])


def test_odd_log(tmp_path, capsys):
    """Whatever a log holds, --resume goes on, keeps the records that are whole, and drops the others."""
    out, rng = tmp_path / "run", random.Random(0)
    run(out, "--images 32")
    whole = (out / "log.jsonl").read_bytes()
    for k in range(9):
        at, images = rng.randrange(len(whole)), 48 + 16 * k
        odd = b"{}\xff\n\0}[]\n"[k:]
        (out / "log.jsonl").write_bytes(whole[:at] + odd + whole[at + k % 3:] + b"{\n}\n")
        assert sound(capsys, train.main, argv(out, f"--images {images} --resume"))
        records = (out / "log.jsonl").read_text().splitlines()
        assert f'{{"images": {images}, ' in records[-1][:20] and "{" not in records and "}" not in records
        untouched = whole[:at].split(b"\n")[:-1] + whole[at + k % 3:].split(b"\n")[1:-1]
        assert {line.decode() for line in untouched} <= {*records}


@pytest.mark.parametrize("n", [32, pytest.param(500, marks=slow)])
def test_odd_results(tmp_path, capsys, n):
    """probe.py --compare reads the results that others made: a sentence where they will not do."""
    rng, ended = random.Random(n), []
    result = probed(2, (1, 10))
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps(result))
    runs = [tmp_path / "x", tmp_path / "y"]
    assert sound(capsys, probe.main, ["--compare", *runs])
    for k in range(n):
        text = json.dumps(mutate(result, rng))
        (tmp_path / "y/probe.json").write_text(text[:rng.randrange(len(text))] if k % 4 == 0 else text)
        ended.append(sound(capsys, probe.main, ["--compare", *runs]))
    assert n / 3 < ended.count(False) < n and not any(ended[::4])


def test_paths_in_a_checkpoint(tmp_path, monkeypatch, old_run):
    """Nothing is written where a checkpoint points to, but to the folder that was named."""
    state, other = load(old_run), tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    state["config"]["out"] = str(other)
    torch.save(state, old_run / "checkpoint.pt")
    (old_run / "config.json").write_text(json.dumps(state["config"]))
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    sample.main([str(old_run), *"-n 1 --steps 1 --npz --device cpu".split()])
    probe.main([str(old_run), *"--t 10 --images 40 --device cpu".split()])
    run(old_run, "--images 48 --resume")
    assert {path.split("/")[0] for path in tree(tmp_path)} == {"run", "other"} and not tree(other)
    assert {"samples.png", "samples.npz", "probe.json", "samples-48.png"} <= set(tree(old_run))


# as stored -> as it was held, by the number of EXIF
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
           7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("suffix, grey", [("jpg", False), ("png", False), ("webp", False), ("tif", False),
                                          ("png", True)])
def test_upright(tmp_path, suffix, grey):
    """Photographs stand upright, as their EXIF says, in all of its eight ways; grey ones of 16 bits too."""
    stored = np.zeros((8, 8, 3), np.uint8)
    stored[:4, :4, 0], stored[:4, 4:, 1], stored[4:, :4, 2] = 255, 255, 255
    large = stored.repeat(8, 0).repeat(8, 1)
    if grey:
        stored = stored[:, :, :1].repeat(3, 2)
        large = large[:, :, 0].astype(np.uint16) * 257
    for number in UPRIGHT:
        exif = Image.Exif()
        exif[0x112] = number
        Image.fromarray(large).save(tmp_path / f"{number}.{suffix}", exif=exif)
    images = train.load_data(f"folder:{tmp_path}", "train", 8).images.int()
    for image, turn in zip(images, UPRIGHT.values()):
        assert error(image, np.ascontiguousarray(turn(stored).transpose(2, 0, 1))) < 60


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits(tmp_path, suffix):
    """A grey image of 16 bits keeps its brightness; numbers without a white are refused by name."""
    for value in (0, 90, 255):
        pixels = np.full((8, 8), value * 257, np.uint16)
        path = tmp_path / f"{value:03}.{suffix}"
        if suffix == "pgm":
            path.write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
        else:
            Image.fromarray(pixels).save(path)
    images = train.load_data(f"folder:{tmp_path}", "train", 8).images
    assert [image.unique().tolist() for image in images] == [[0], [90], [255]]
    for dtype in (np.int32, np.float32) if suffix == "tif" else ():
        Image.fromarray(np.full((8, 8), 90, dtype)).save(tmp_path / "odd.tif")
        with pytest.raises(train.UserError, match="odd.tif"):
            train.load_data(f"folder:{tmp_path}", "train", 8)


# --- the same again ---

def test_same_bytes(tmp_path, monkeypatch, photos):
    """The same command, in two places: checkpoint, samples and config byte for byte, losses equal."""
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run("run", f"{MOVES} --images 336 --save-every 160 --data folder:{photos}")
    a, b = (tree(tmp_path / name / "run") for name in "ab")
    assert a.keys() == b.keys() == {"config.json", "checkpoint.pt", "log.jsonl", "samples-336.png"}
    assert [name for name in a if a[name] != b[name]] == ["log.jsonl"]
    assert losses(tmp_path / "a/run") == losses(tmp_path / "b/run") and len(losses(tmp_path / "a/run")) == 2


# --- for days ---

MINUTES = 10 if torch.cuda.is_available() else 2


def memory(process):
    """Bytes that a process holds on the host; where there is a GPU, MiB in use there as well."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    query = "nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits".split()
    used = int(subprocess.check_output(query)) if torch.cuda.is_available() else 0
    return pages * os.sysconf("SC_PAGESIZE"), used


@slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_soak(tmp_path, photos):
    """Minutes of training, saving and drawing: after a third of them, memory and speed stay what they are."""
    device = "cuda --compile" if torch.cuda.is_available() else "cpu"
    flags = argv(tmp_path / "run", f"--data folder:{photos} --minutes {MINUTES} --images {10**9} "
                                   f"--save-every 3200 --sample-every 6400 --device {device}")
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=said, stderr=said)
    held = []
    while process.poll() is None:
        held.append(memory(process))
        time.sleep(MINUTES)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-1000:]
    speeds = [record["images_per_second"] for record in log(tmp_path / "run")[1]]
    held, n, m = np.array(held[:-1]), len(held) // 3, len(speeds) // 3
    print("memory", held[n:-n:n // 4].tolist(), "images/s", np.median(speeds[m:-m]), np.median(speeds[-m:]))
    assert len(list((tmp_path / "run").glob("*.png"))) > 2
    assert (held[-n:].max(0) <= 1.02 * held[n:-n].max(0)).all()
    assert np.median(speeds[-m:]) > 0.9 * np.median(speeds[m:-m])
