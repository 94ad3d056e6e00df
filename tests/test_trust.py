"""What we promise to people who let it run for days, and to those who open what others made.

Done to real processes, on the CPU; what takes minutes needs --run-slow. Each test was seen to fail without
what it tests. More of the promises are tested in test_train.py and test_latents.py: the README has the table.
"""
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import probe
import sample
import train
from test_train import (CPU, MOVES, ROOT, TORCHRUN, argv, assert_same_run, error, launch, load, log, losses,
                        photos, picture, refused, run, same, speed_up, tree)

assert photos           # a fixture


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """In one thread, here as in the other processes: more would wait for each other, and add up otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speed_up(monkeypatch)
    yield
    torch.set_num_threads(threads)


def start(*command, **more):
    """A Python command in a process of its own that goes on -> the process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # background


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


def logged(out):
    """How many records the log has."""
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


# --- it is killed, or asked to stop ---

KILLS = 10


@pytest.mark.slow
def test_kill_again_and_again(tmp_path, photos):
    """Killed ten times at random moments, most of them within a save: it ends as if nothing had happened."""
    flags = f"{MOVES} --save-every 16 --sample-every 160 --data folder:{photos}"
    out, rng, within = tmp_path / "run", random.Random(0), 0
    for k in range(KILLS):
        process = start(ROOT / "train.py", *argv(out, f"{flags} --images 100000 --resume"))
        saved = out / "checkpoint.pt"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        wait_for(lambda: saved.exists() and saved.stat().st_mtime_ns > before, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        within += any(out.glob("*.part"))
        assert load(out)["images"] >= 16 * (k + 1)                                         # it is whole
    images = load(out)["images"] + 320
    print(f"{KILLS} kills, {within} within a save, {images - 320} images")
    assert within and images > 320
    flags += f" --images {images}"
    assert_same_run(run(out, flags + " --resume"), run(tmp_path / "whole", flags))
    found, expected = losses(out), losses(tmp_path / "whole")
    assert {i: found[i] for i in expected} == expected and not list(out.glob("*.part"))


def test_no_litter(tmp_path):
    """What a run leaves half-written when it is killed while drawing is cleared away by --resume."""
    run(tmp_path / "run", "--images 32")
    (tmp_path / "run/samples-16.png.part").write_bytes(b"half a picture")
    run(tmp_path / "run", "--images 48 --resume")
    assert not list((tmp_path / "run").glob("*.part"))


def test_asked_to_stop(tmp_path, photos):
    """SIGTERM: the step is finished and saved, the exit code is 143, the command it names goes on."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos} --save-every 100000"
    process = start("train.py", *argv(out, f"{flags} --images 100000"))
    wait_for(lambda: logged(out), process)
    process.send_signal(signal.SIGTERM)
    code, said, err = end(process)
    images = load(out)["images"]
    assert code == 128 + signal.SIGTERM and "Traceback" not in err, err
    assert images % 16 == 0 and list(losses(out))[-1] == images and not list(out.glob("*.p*g*"))
    found = re.search(rf"stopped by SIGTERM at {images:,} images; .*; go on with: (.*)\n", said)
    words = shlex.split(found[1])
    assert words == [sys.executable, "train.py", *argv(out, f"{flags} --images 100000"), "--resume"]
    train.main([*words[2:], "--images", str(images + 32)])
    assert_same_run(load(out), run(tmp_path / "whole", f"{flags} --images {images + 32}"))


SLOW_STEP = """
import sys, time, train
def update_ema(ema, net, cfg, images):
    if images == 32:
        print("in a step", flush=True)
        time.sleep(2)
train.update_ema = update_ema
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("signals, expected", [
    pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGINT SIGINT", -2), ("SIGTERM SIGTERM", 143)])
def test_ctrl_c(tmp_path, photos, signals, expected):
    """Ctrl-C waits for the step, saves, adds no second --resume; twice, it ends at once. Not so SIGTERM."""
    out = tmp_path / "run"
    process = start("-c", SLOW_STEP, *argv(out, f"--data folder:{photos} --resume --images 100000"))
    while "in a step" not in process.stdout.readline():
        assert process.poll() is None
    for name in signals.split():
        process.send_signal(getattr(signal, name)), time.sleep(0.3)
    code, said, err = end(process)
    assert code == expected and "Traceback" not in err, err
    assert (out / "checkpoint.pt").exists() == (code > 0)
    if code > 0:
        assert load(out)["images"] == 32 and said.split("go on with")[1].count("--resume") == 1


def test_ignored_signals(monkeypatch):
    """What is ignored stays so, as Ctrl-C in a job in the background; all is put back at the end."""
    old = [signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)]
    seen = []
    try:
        @diffusion.command
        def main(argv):
            seen.append(diffusion.collect_stops())
            os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGTERM)
        main()
        assert seen == [[signal.SIGTERM]] and signal.getsignal(signal.SIGTERM) == old[1]
    finally:
        signal.signal(signal.SIGINT, old[0])


# --- several processes ---

def ranks(process):
    """Process ids of torchrun's two processes, the first one first; none before they are there."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rsplit(")", 1)[1].split()[1] == str(process.pid):
                rank = re.search(r"\0RANK=(\d)", (path.parent / "environ").read_text())
                found.update({rank[1]: int(path.parent.name)} if rank else {})
        except OSError:                             # it ended meanwhile
            pass
    return [found[rank] for rank in sorted(found)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("who", ["second", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_asked_to_stop_two_processes(tmp_path, photos, who):
    """SIGTERM to torchrun or to one of its processes: both stop at the same step, saved, not as a success."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos} --save-every 100000"
    process = start(*TORCHRUN, "train.py", *argv(out, f"{flags} --images 100000"))
    wait_for(lambda: logged(out), process)
    os.kill(ranks(process)[1] if who == "second" else process.pid, signal.SIGTERM)
    code, said, err = end(process)
    state = load(out)
    assert code != 0 and 'train.py", line' not in err, err
    assert said.count("stopped by SIGTERM") == 1 and 0 < state["images"] < 100_000
    words = shlex.split(said.split("go on with: ")[1].splitlines()[0])
    expected = ["train.py", *argv(out, f"{flags} --images 100000"), "--resume"]
    assert words == ["torchrun", "--nproc_per_node=2", *expected]
    if who == "torchrun":
        more = ["--images", str(state["images"] + 32)]
        code, _, err = end(start("-m", "torch.distributed.run", "--standalone", *words[1:], *more))
        assert code == 0, err
        assert error(load(out)["model"], run(tmp_path / "whole", f"{flags} {' '.join(more)}")["model"]) < 1e-4


@needs_proc
def test_one_dies(tmp_path, photos):
    """Where one process of two dies, the other ends with an error within a minute, also without torchrun."""
    out, flags = tmp_path / "run", f"--data folder:{photos} --save-every 16 --images 100000"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])                      # one that is free
    both = [start("train.py", *argv(out, flags), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    try:
        wait_for(lambda: logged(out), both[0])
    finally:
        both[1].kill(), both[1].communicate()
    code, said, err = end(both[0], 60)
    assert code not in (0, -signal.SIGKILL) and "images in" not in said and err
    assert load(out)["images"] > 0


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_one_dies_under_torchrun(tmp_path, photos, restarts):
    """torchrun then ends the other one; with --max-restarts and --resume it goes on to the same end."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos} --save-every 160 --images 1600"
    process = start(*TORCHRUN, f"--max-restarts={restarts}", "train.py", *argv(out, flags), "--resume",
                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(lambda: (out / "checkpoint.pt").exists(), process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    code, _, err = end(process, 120)
    assert (code == 0) == (restarts == 1), err
    if restarts:
        whole = run(tmp_path / "whole", flags)
        assert error(load(out)["model"], whole["model"]) < 1e-3 < error(whole["model"], whole["ema"])
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-3)


def test_resume_with_more_processes(tmp_path, photos):
    """A run of one process goes on with two, and with one again: weights and losses are those of one."""
    out, flags = tmp_path / "run", f"{MOVES} --data folder:{photos}"
    whole = run(tmp_path / "whole", f"{flags} --images 480")
    run(out, f"{flags} --images 160")
    code, _, err = launch(*TORCHRUN, ROOT / "train.py", *argv(out, f"{flags} --images 320 --resume"))
    assert code == 0 and load(out)["images"] == 320, err
    state, found = run(out, f"{flags} --images 480 --resume"), losses(out)
    assert error(state["model"], whole["model"]) < 1e-4 < 1e-3 < error(whole["model"], whole["ema"])
    assert {i: found[i] for i in (320, 480)} == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


# --- the disk is full, the numbers overflow ---

@pytest.mark.slow
@pytest.mark.parametrize("when", ["saving", "logging"])
def test_really_full_disk(tmp_path, photos, when):
    """On a file system that is too small the last good checkpoint stays, and --resume goes on from it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={45 if when == 'saving' else 80}m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    out, flags = disk / "run", f"{MOVES} --data folder:{photos}"
    try:
        run(out, f"{flags} --images 32")
        before = load(out)
        if when == "logging":
            with pytest.raises(OSError), open(disk / "fill", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        code, _, err = end(start("train.py", *argv(out, f"{flags} --images 10000 --save-every 64 --resume")))
        name = out / "checkpoint.pt" if when == "saving" else out           # the first file of a run
        assert code == 2 and f"error: could not write {name}" in err, err
        assert "--resume" in err and "Traceback" not in err and same(load(out), before)
        (disk / "fill").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        whole = run(tmp_path / "whole", f"{flags} --images 96")
        assert_same_run(run(out, f"{flags} --images 96 --resume"), whole)
    finally:
        subprocess.run(["umount", str(disk)])


def test_skipped_steps(tmp_path, monkeypatch):
    """In fp16 a step whose gradient overflows is left out and counted in the log, across --resume as well."""
    calls, loss = [], train.GaussianDiffusion.loss

    def spoilt(self, *args):
        calls.append(1)
        result = loss(self, *args)
        result.register_hook(lambda grad: grad * (float("inf") if len(calls) in (1, 2, 7, 14) else 1))
        return result
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    monkeypatch.setattr(train.GaussianDiffusion, "loss", spoilt)
    out = tmp_path / "run"
    run(out, "--precision fp16 --images 192")
    state = run(out, "--precision fp16 --images 256 --resume")
    assert [record["skipped"] for record in log(out)[1]] == [2, 3, 3, 4]
    assert all(v.isfinite().all() for name in ("model", "ema") for v in state[name].values())
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {12}


# --- what others made: checkpoints, latents, logs, pictures ---

@pytest.fixture
def small(monkeypatch):
    """A smaller network, so that hundreds of damaged files can be tried."""
    sizes = {**train.DiT.SIZES, "tiny": dict(patch=4, dim=32, depth=2, heads=2)}
    monkeypatch.setattr(train.DiT, "SIZES", sizes)


ODD = [None, True, -1, 0, 7, 1.5, float("nan"), 10**9, "", "x", b"x", [], [1], ["x"], {}, {"x": 1},
       torch.zeros(()), torch.zeros(3)]


def mutate(value, rng):
    """A copy with one entry replaced by something odd, or left out, somewhere within."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD)
    copy = type(value)(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.25:
        del copy[key]
    else:
        copy[key] = mutate(copy[key], rng)
    return copy


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


@pytest.mark.parametrize("n", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_odd_checkpoint(tmp_path, capsys, small, n):
    """Entries of a checkpoint missing or odd, bytes cut off or changed: one sentence where it will not do."""
    out, rng, ended = tmp_path / "run", random.Random(n), []
    state = run(out, "--images 32 --data shapes")
    files, path = {p.name: p.read_bytes() for p in out.iterdir()}, out / "checkpoint.pt"
    for k in range(n):
        for name, content in files.items():
            (out / name).write_bytes(content)
        whole, at = files["checkpoint.pt"], rng.randrange(len(files["checkpoint.pt"]))
        if k % 4 == 0:
            path.write_bytes(whole[:at])
        elif k % 4 == 1:
            path.write_bytes(whole[:at] + bytes([rng.randrange(256) for _ in range(9)]) + whole[at + 9:])
        else:
            name = rng.choice(list(state))
            torch.save({**state, name: mutate(state[name], rng)}, path)
        what = f"mutation {k} of {n}"
        ended.append(sound(capsys, train.main, argv(out, "--resume --images 48")))
        assert ended[-1] or k % 4 == 0 or not list(out.glob("*.part")), what
        if k % 4:
            sound(capsys, sample.main, [out, *"--n 2 --steps 2 --device cpu".split()])
    assert n / 3 < ended.count(False) < n and not any(ended[::4])


MISFITS = {"moment": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
           "no moment": lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
           "weight": lambda state: state["model"].update({next(iter(state["model"])): torch.zeros(3)}),
           "weights": lambda state: state.update(model=[1]), "images": lambda state: state.update(images=-16),
           "step": lambda state: state["optimizer"]["state"][0].update(step=-1),
           "part of a batch": lambda state: state.update(images=17),
           "no loss": lambda state: state.pop("loss_sum")}


@pytest.mark.parametrize("what", MISFITS)
def test_misfit(tmp_path, capsys, small, what):
    """Tensors of other shapes than the network's and counts that cannot be are refused before use."""
    state = run(tmp_path / "run", "--images 32")
    MISFITS[what](state)
    torch.save(state, tmp_path / "run/checkpoint.pt")
    before = tree(tmp_path)
    with refused(capsys, str(tmp_path / "run/checkpoint.pt")):
        train.main(argv(tmp_path / "run", "--resume --images 48"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("n", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_odd_latents(tmp_path, capsys, small, n):
    """So with the files of a folder of latents, and with what a checkpoint says of its latents."""
    root, rng, ended = tmp_path / "latents", random.Random(n), []
    (root / "train").mkdir(parents=True)
    meta = dict(vae=str(tmp_path / "none"), image_size=64, classes=["a", "b"], shape=[4, 8, 8],
                mean=[0.1, 0.2, 0.3, 0.4], std=[1.0, 1.1, 1.2, 1.3])
    (root / "meta.json").write_text(json.dumps(meta))
    z = np.random.default_rng(0).normal(size=(2, 20, 4, 8, 8))
    np.save(root / "train/latents.npy", z.astype(np.float16))
    np.save(root / "train/labels.npy", np.arange(20) % 2)
    flags = [*argv(tmp_path / "run", "--images 16"), "--data", f"latents:{root}"]
    flags = [x for x in flags if x not in ("--image-size", "8")]
    files = {p: p.read_bytes() for p in root.rglob("*.*")}
    train.main(flags)
    state = load(tmp_path / "run")
    for k in range(n):
        for path, content in files.items():
            path.write_bytes(content)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        path = rng.choice(list(files)) if k % 2 else root / "meta.json"
        whole, at = files[path], rng.randrange(len(files[path]))
        if k % 4 == 0:
            odd = [x for x in ODD if not isinstance(x, (bytes, torch.Tensor))]
            name = rng.choice(list(meta))
            changed = {**meta, name: rng.choice(odd) if k % 8 else [rng.choice(odd)] * 4}
            path.write_text(json.dumps(changed))
            (tmp_path / "run").mkdir()
            torch.save({**state, "latents": changed}, tmp_path / "run/checkpoint.pt")
            sound(capsys, sample.main, [tmp_path / "run", *"--n 2 --steps 2 --device cpu".split()])
            shutil.rmtree(tmp_path / "run")
        elif k % 4 == 1:
            path.write_bytes(whole[:at])
        else:
            path.write_bytes(whole[:at] + bytes([rng.randrange(256) for _ in range(3)]) + whole[at + 3:])
        ended.append(sound(capsys, train.main, flags))
    assert n / 3 < ended.count(False) and not any(ended[1::4])


def test_odd_log(tmp_path, capsys, small):
    """Whatever a log holds, --resume goes on, keeps the records that are whole, and drops the others."""
    out, rng = tmp_path / "run", random.Random(0)
    run(out, "--images 32")
    state, whole = (out / "checkpoint.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    for k in range(20):
        (out / "checkpoint.pt").write_bytes(state)
        at = rng.randrange(len(whole))
        odd = b"{}\xff\n\0}[]\n"[k % 9:]
        (out / "log.jsonl").write_bytes(whole[:at] + odd + whole[at + k % 3:] + b"{\n}\n")
        assert sound(capsys, train.main, argv(out, "--images 48 --resume"))
        records = (out / "log.jsonl").read_text().splitlines()
        assert sum('"images": 48' in x for x in records) == 1 and "{" not in records and "}" not in records


@pytest.mark.parametrize("n", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_odd_results(tmp_path, capsys, n):
    """probe.py --compare reads the results that others made: a sentence where they will not do."""
    rng, ended = random.Random(n), []
    result = dict(run="a", data="shapes", metric="accuracy", bottleneck="b", layers=["a", "b"],
                  levels=[1, 10], held_out=[[0.1, 0.2], [0.3, 0.4]], train_images=50, augment=0, seed=0,
                  best=dict(layer="b", t=10, accuracy=0.4, miou=0.2), test=dict(accuracy=0.3, miou=0.1))
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps(result))
    runs = [tmp_path / "x", tmp_path / "y"]
    assert sound(capsys, probe.main, ["--compare", *runs])
    odd = [x for x in ODD if not isinstance(x, (bytes, torch.Tensor))]
    for k in range(n):
        text = json.dumps(mutate(result, rng), default=lambda x: rng.choice(odd))
        (tmp_path / "y/probe.json").write_text(text[:rng.randrange(len(text))] if k % 4 == 0 else text)
        ended.append(sound(capsys, probe.main, ["--compare", *runs]))
    assert n / 3 < ended.count(False)


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("where", ["state", "ema", "config", "optimizer", "classes"])
def test_evil_checkpoint(tmp_path, capsys, small, where):
    """Code in a checkpoint is not run, by none of the three programs, wherever in it it stands."""
    state = run(tmp_path / "run", "--images 16")
    evil = Evil(tmp_path / "pwned")
    part = state if where == "state" else state[where]
    part.append(evil) if where == "classes" else part.update(evil=evil)
    torch.save(state, tmp_path / "run/checkpoint.pt")
    before = tree(tmp_path)
    assert not sound(capsys, train.main, argv(tmp_path / "run", "--resume --images 32"))
    for program in (sample, probe):
        assert not sound(capsys, program.main, [tmp_path / "run"])
    assert tree(tmp_path) == before


def test_paths_in_a_checkpoint(tmp_path, monkeypatch, small):
    """Nothing is written where a checkpoint points to, but to the folder that was named."""
    state = run(tmp_path / "run", "--images 16")
    (tmp_path / "other").mkdir(), (tmp_path / "cwd").mkdir(), monkeypatch.chdir(tmp_path / "cwd")
    state["config"].update({name: str(tmp_path / to) for name, to in dict(out="other", encode="new").items()})
    torch.save(state, tmp_path / "run/checkpoint.pt")
    (tmp_path / "run/config.json").write_text(json.dumps(state["config"]))
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    sample.main([str(tmp_path / "run"), *"--n 1 --steps 1 --npz --device cpu".split()])
    probe.main([str(tmp_path / "run"), *"--t 10 --images 40 --device cpu".split()])
    run(tmp_path / "run", "--images 32 --resume")
    assert {path.split("/")[0] for path in tree(tmp_path)} == {"run", "other", "cwd"}
    assert not tree(tmp_path / "other") and not tree(tmp_path / "cwd")
    assert {"samples.png", "samples.npz", "probe.json", "samples-32.png"} <= set(tree(tmp_path / "run"))


# as stored -> as it was held, by the number of EXIF
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
           7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_upright(tmp_path, suffix):
    """Photographs stand upright, as their EXIF says, in all of its eight ways."""
    stored = np.zeros((8, 8, 3), np.uint8)
    stored[:4, :4, 0], stored[:4, 4:, 1], stored[4:, :4, 2] = 255, 255, 255
    for number, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x112] = number
        Image.fromarray(stored.repeat(8, 0).repeat(8, 1)).save(tmp_path / f"{number}.{suffix}", exif=exif)
    images = diffusion.load_data(f"folder:{tmp_path}", "train", 8).images.int()
    for image, turn in zip(images, UPRIGHT.values()):
        assert (image - torch.from_numpy(turn(stored).copy()).permute(2, 0, 1)).abs().max() < 60


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    """A grey image of 16 bits keeps its brightness; numbers without a white are refused by name."""
    for value in (0, 90, 255):
        pixels = np.full((8, 8), value * 257, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{value:03}.{suffix}")
    images = diffusion.load_data(f"folder:{tmp_path}", "train", 8).images
    assert [image.unique().tolist() for image in images] == [[0], [90], [255]]
    for dtype in (np.int32, np.float32) if suffix == "tif" else ():
        Image.fromarray(np.full((8, 8), 90, dtype)).save(tmp_path / "odd.tif")
        with pytest.raises(diffusion.UserError, match="odd.tif"):
            diffusion.load_data(f"folder:{tmp_path}", "train", 8)


@pytest.mark.parametrize("damage", ["cut at 20 %", "cut at 90 %", "empty", "text", "too large"])
def test_damaged_picture(tmp_path, capsys, monkeypatch, damage):
    """A JPEG that is cut off, empty, none or a bomb is refused by name, before anything is written."""
    for i in range(16):
        picture(tmp_path / f"photos/{i}.jpg", "red", "blue", size=(64, 64), mode="CMYK" if i % 2 else "RGB")
    images = diffusion.load_data(f"folder:{tmp_path}/photos", "train", 8).images.int()
    assert (images[:, :, 4, 1] - torch.tensor([255, 0, 0])).abs().max() < 40          # CMYK as well
    path = tmp_path / "photos/7.jpg"
    whole = path.read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if damage == "too large" else 10**8)
    path.write_bytes({"empty": b"", "text": b"a text", "too large": whole + b" "}.get(
        damage, whole[:len(whole) * int(re.sub(r"\D", "", damage) or 0) // 100]))
    with refused(capsys, "" if damage == "too large" else str(path), "--skip-bad"):
        train.main(argv(tmp_path / "run", "", "--data", f"folder:{tmp_path}/photos"))
    assert not (tmp_path / "run").exists()


# --- the same again ---

def test_same_bytes(tmp_path, photos):
    """The same command, in two places: checkpoint, samples and config byte for byte, losses equal."""
    flags = argv("run", f"{MOVES} --images 336 --save-every 160 --data folder:{photos}")
    code = "import os, sys; os.chdir(sys.argv[1]); import train; train.main(sys.argv[2:])"
    for name in "ab":
        (tmp_path / name).mkdir()
    both = [start("-c", code, tmp_path / name, *flags) for name in "ab"]
    assert [end(process)[0] for process in both] == [0, 0]
    a, b = (tree(tmp_path / name / "run") for name in "ab")
    assert a.keys() == b.keys() == {"config.json", "checkpoint.pt", "log.jsonl", "samples-336.png"}
    assert [name for name in a if a[name] != b[name] and name != "log.jsonl"] == []
    assert losses(tmp_path / "a/run") == losses(tmp_path / "b/run") and len(losses(tmp_path / "a/run")) == 2


# --- for days ---

MINUTES = 10 if torch.cuda.is_available() else 2


def memory(process):
    """Bytes that a process holds on the host; where there is a GPU, MiB in use there as well."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    query = "nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits".split()
    used = int(subprocess.check_output(query)) if torch.cuda.is_available() else 0
    return pages * os.sysconf("SC_PAGESIZE"), used


@pytest.mark.slow
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
