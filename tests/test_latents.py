"""Latents, from images to decoded samples, through small autoencoders with random weights."""
import errno
import io
import json
import os
import runpy
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probe
import sample
import train
from conftest import (CPU, ROOT, Program, end, error, few_shapes, fork_two, like_windows, load, refused,
                      speed_up, train_in_fork, tree)

SIZE, SIDE, N = 16, 8, 40                       # pixels, latents, training images
NET = "--model dit --size tiny --batch-size 8 --images 16 --save-every 1000000 --device cpu --no-compile"


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """The VAE sees 16 images at a time, so that there are several batches; sample grids take 2 steps."""
    with pytest.MonkeyPatch.context() as patch:
        speed_up(patch)
        patch.setattr(train, "VAE_PIXELS", 16 * SIZE ** 2)
        yield


def make_vae(kind, folder):
    """A folder with a small model of diffusers that has random weights -> the folder."""
    diffusers = pytest.importorskip("diffusers")
    configs = dict(
        AutoencoderKL=dict(
            block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        AutoencoderTiny=dict(
            encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], latent_channels=4,
            num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1]),
        AutoencoderDC=dict(
            encoder_block_out_channels=[8, 16], decoder_block_out_channels=[8, 16], latent_channels=4,
            encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1], attention_head_dim=8,
            encoder_qkv_multiscales=[[], []], decoder_qkv_multiscales=[[], []],
            encoder_block_types="ResBlock", decoder_block_types="ResBlock"),
        AutoencoderKLTemporalDecoder=dict(                  # of video, but its encoder knows images
            block_out_channels=[32, 32], layers_per_block=1, down_block_types=["DownEncoderBlock2D"] * 2))
    torch.manual_seed(0)
    getattr(diffusers, kind)(**configs[kind]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an AutoencoderKL that halves a side."""
    return make_vae("AutoencoderKL", tmp_path_factory.mktemp("vae") / "small-kl")


@pytest.fixture
def mine(photos, tmp_path):
    """A copy of the photos, to be changed."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def encode(folder, vae, **kwargs):
    return train.encode(f"folder:{folder}", SIZE, str(vae), CPU, **kwargs)


@pytest.fixture(scope="module")
def latents(photos, vae):
    """The folder of the photos' latents."""
    return encode(photos, vae)


def flags(folder, vae, out, more=""):
    return [*NET.split(), "--data", f"folder:{folder}", "--image-size", str(SIZE), "--vae", str(vae),
            "--out", str(out), *more.split()]


@pytest.fixture(scope="module")
def trained(photos, vae, latents, tmp_path_factory):
    """A class-conditional run on the photos' latents."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(flags(photos, vae, out, "--conditional"))
    return out


def both_of(folder, split="train"):
    return np.load(folder / split / "latents.npy")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def close(a, b):
    """Equal but for the last bit of float16, which may follow how many images the VAE saw at once."""
    return a.shape == b.shape and np.allclose(a.astype(np.float64), b, rtol=2**-10, atol=1e-5)


# --- encode ---

def test_encode(latents, photos, vae):
    """latents.npy has the posterior means of images, then of flipped ones; labels.npy the classes.

    meta.json has each channel's mean and standard deviation over the training part, and the rest.
    """
    net = train.load_vae(str(vae), CPU)
    for split, n in (("train", N), ("test", N // 4)):
        data = train.load_data(f"folder:{photos}", split, SIZE)
        both, labels = both_of(latents, split), np.load(latents / split / "labels.npy")
        assert both.shape == (2, n, 4, SIDE, SIDE) and both.dtype == np.float16
        assert labels.dtype == np.int64 and labels.tolist() == data.labels.tolist()
        x = data.images.float() / 127.5 - 1
        for half, view in zip(both, (x, x.flip(3))):
            assert error(half, net.encode(view).latent_dist.mean) < 2e-3
        assert names(latents / split) == ["labels.npy", "latents.npy"]
    meta, both = json.loads((latents / "meta.json").read_text()), both_of(latents).astype(np.float64)
    assert meta.pop("mean") == pytest.approx(both.mean((0, 1, 3, 4)).tolist(), abs=1e-9)
    assert meta.pop("std") == pytest.approx(both.std((0, 1, 3, 4)).tolist(), rel=1e-6)
    assert len(meta.pop("stamp")) == 64
    assert meta == dict(vae=str(vae.resolve()), image_size=SIZE, classes=["a", "b"], shape=[4, SIDE, SIDE])
    assert latents == photos.with_name(f"photos-{SIZE}px-small-kl") and not [*latents.parent.glob("*.part")]


def test_encode_at_once(mine, vae, monkeypatch, capsys):
    """Of two programs that want the same latents one makes them, and the other waits, and says so."""
    begun, waits, made = threading.Event(), threading.Event(), []
    load_vae, put_in_place, say = train.load_vae, train.put_in_place, train.say

    def slow_vae(*args):
        begun.set()
        assert waits.wait(60), "the other one does not wait"
        return load_vae(*args)

    def watch(message, *more, **how):
        say(message, *more, **how)
        if "waiting for it" in message:
            waits.set()

    def count(*args):
        made.append(1)
        put_in_place(*args)
    monkeypatch.setattr(train, "say", watch)
    monkeypatch.setattr(train, "load_vae", slow_vae)
    monkeypatch.setattr(train, "put_in_place", count)

    def want():
        return train.load_data(f"folder:{mine}", "train", SIZE, vae=str(vae))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(want)
        assert begun.wait(60)
        second = pool.submit(want)
        assert torch.equal(first.result().images, second.result().images) and made == [1]
    assert capsys.readouterr().out.count("waiting for it") == 1


def test_encode_like_windows(mine, vae, latents, monkeypatch):
    """Where neither locks nor opened folders are to be had, one encodes without them."""
    like_windows(monkeypatch)
    data = train.load_data(f"folder:{mine}", "train", SIZE, vae=str(vae))
    assert np.array_equal(data.both.numpy(), both_of(latents))


def test_place(mine, vae, tmp_path, monkeypatch):
    """Latents of shapes, or where the data's parent can't be written, are under data/, and found there.

    Else a sentence. A flat folder of images has no test part.
    """
    few_shapes(monkeypatch, 30, 20)
    monkeypatch.chdir(tmp_path)
    out = train.encode("shapes", SIZE, str(vae), CPU)
    assert out == Path(f"data/shapes-{SIZE}px-small-kl")
    assert (both_of(out).shape[1], both_of(out, "test").shape[1]) == (30, 20)
    shut, access = [mine.parent], os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in shut and access(path, mode))
    out = encode(mine, vae)
    assert out == Path(f"data/photos-{SIZE}px-small-kl") and both_of(out).shape[1] == N
    assert names(tmp_path) == ["data", "photos"]
    shut.append(Path("data"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "encode_split", None)
        assert encode(mine, vae) == out
    (mine / "train/a/00.png").touch()
    with pytest.raises(train.UserError, match="writable"):
        encode(mine, vae)
    flat = encode(mine / "train/a", vae)
    assert names(flat) == ["meta.json", "train"] and both_of(flat).shape[1] == N // 2
    with pytest.raises(train.UserError, match="put images into test/<class>/"):
        train.load_latents(flat, "test")


def test_other_vae(mine, vae, tmp_path):
    """Latents of a VAE whose folder has the same name stay: there may be hours in them."""
    other = Path(shutil.copytree(vae, tmp_path / "other" / vae.name))
    out = encode(mine, other)
    before = both_of(out)
    with pytest.raises(train.UserError, match=f"{out} .*another VAE, {other}: move it"):
        encode(mine, vae)
    assert np.array_equal(both_of(out), before)
    (out / "meta.json").write_text("damaged")
    assert encode(mine, vae) == out


def test_used_again(mine, vae, tmp_path, monkeypatch):
    """While files, VAE and size are the same nothing is encoded again; else it is, anew or apart."""
    splits, encode_split = [], train.encode_split
    monkeypatch.setattr(train, "encode_split", lambda *args: [splits.append(args), encode_split(*args)][1])

    def anew(name=vae, size=SIZE):
        """-> folder, whether it was made just now."""
        del splits[:]
        out = train.encode(f"folder:{mine}", size, str(name), CPU)
        assert len(splits) in (0, 2)
        return out.name, bool(splits)
    first = f"photos-{SIZE}px-small-kl"
    assert anew() == (first, True) and anew() == (first, False)
    os.utime(mine / "test/b/01.png", (1, 1))
    assert anew() == (first, True) and anew() == (first, False)
    other = make_vae("AutoencoderTiny", tmp_path / "other")
    assert anew(other) == (f"photos-{SIZE}px-other", True)
    assert anew(size=32) == ("photos-32px-small-kl", True) and anew() == (first, False)
    os.utime(other / "config.json", (1, 1))
    assert anew(other) == (f"photos-{SIZE}px-other", True)
    monkeypatch.chdir(tmp_path)                     # the same folder by a shorter name
    assert anew("other") == (f"photos-{SIZE}px-other", False)
    (tmp_path / "moved").mkdir()
    for name in ("photos", first):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    mine = tmp_path / "moved/photos"
    assert anew() == (first, False)


def test_broken_images(latents, mine, vae, tmp_path, capsys):
    """A broken image is named, nothing is left; --skip-bad leaves out what is broken, with its label."""
    bad, files = [0, 25, N - 1], sorted((mine / "train").rglob("*.png"))
    for i in bad:
        files[i].write_bytes(files[i].read_bytes()[:30])
    with refused(capsys, files[0].name, "--skip-bad"):
        train.main(flags(mine, vae, tmp_path / "run"))
    assert names(tmp_path) == ["photos"]
    out = encode(mine, vae, skip_bad=True)
    assert "3 unreadable" in capsys.readouterr().out
    assert close(both_of(out), np.delete(both_of(latents), bad, 1))
    labels, every = (np.load(folder / "train/labels.npy") for folder in (out, latents))
    assert np.array_equal(labels, np.delete(every, bad))


def test_stopped(mine, vae, tmp_path, monkeypatch, capsys):
    """A full disk is one sentence; until new latents are whole they lie apart, and the old ones stay.

    What lies there of an encoding that was killed is cleared by the next.
    """
    out, seen = encode(mine, vae), []
    part = out.with_name(f"{out.name}.part")

    class Full(io.FileIO):
        def write(self, data):
            seen.append(names(tmp_path))
            raise OSError(errno.ENOSPC, "No space left on device")
    (mine / "train/a/00.png").unlink()
    with monkeypatch.context() as patch, refused(capsys, "No space left"):
        patch.setattr(train, "open", Full, raising=False)
        train.main(flags(mine, vae, tmp_path / "run"))
    assert seen == [["photos", out.name, part.name]] and names(tmp_path) == ["photos", out.name]
    assert train.load_latents(out, "train").images.shape[0] == N
    shutil.copytree(out, part)
    assert encode(mine, vae) == out and both_of(out).shape[1] == N - 1 and not part.exists()


def test_two_processes(mine, latents, vae, tmp_path):
    """Two processes make the latents of one, and train on them as one does."""
    both = fork_two(train_in_fork, flags(mine, vae, tmp_path / "two"))
    (code, out, err), (other, *_) = [end(process, 120) for process in both]
    assert code == other == 0, err
    made = mine.with_name(latents.name)
    assert close(both_of(made), both_of(latents)) and close(both_of(made, "test"), both_of(latents, "test"))
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (made, latents)]
    assert all(error(*(meta[key] for meta in metas)) < 1e-5 for key in ("mean", "std"))
    assert out.count("latents: ") == 1 and not [*tmp_path.glob("*.part")]
    train.main(flags(mine, vae, tmp_path / "one"))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert error(one["ema"], two["ema"]) < 1e-5 and (tmp_path / "two/samples-16.png").exists()


def encode_in_fork(photos, vae):
    """Leaves how many images a process decoded to see which are broken, in a file of its own."""
    real, seen = train.decode, []
    train.decode = lambda path, size, skip_bad: seen.append(size) or real(path, size, skip_bad)
    train.encode(f"folder:{photos}", SIZE, str(vae), train.setup("cpu")[0], skip_bad=True)
    (photos.parent / f"seen{os.environ['RANK']}").write_text(str(seen.count(8)))


def test_two_processes_skip_bad(mine, latents, vae):
    """Two processes leave out the same broken images, each of which one of them found."""
    bad, files = [0, N - 1], sorted((mine / "train").rglob("*.png"))
    for i in bad:
        files[i].write_bytes(b"")
    both = fork_two(encode_in_fork, mine, vae)
    assert [end(process, 120)[0] for process in both] == [0, 0]
    assert [int((mine.parent / f"seen{rank}").read_text()) for rank in (0, 1)] == [(N + N // 4) // 2] * 2
    assert close(both_of(mine.with_name(latents.name)), np.delete(both_of(latents), bad, 1))


# --- latents as data ---

def test_load(latents):
    """latents: is what was encoded; to_x0 makes it of zero mean and unit variance, to_pixels goes back."""
    data, both = train.load_data(f"latents:{latents}", "train"), both_of(latents)
    assert np.array_equal(data.images, both[0]) and np.array_equal(data.both, both) and data.masks is None
    moments = train.moments_of(data.meta, CPU)
    x = train.to_x0(data.both.flatten(0, 1), moments).double()
    assert error(x.mean((0, 2, 3)), torch.zeros(4)) < 1e-5
    assert error(x.std((0, 2, 3), correction=0), torch.ones(4)) < 1e-5
    vae = train.load_vae(data.meta["vae"], CPU)
    x0 = train.to_x0(data.images[:20], moments)
    assert error(train.to_pixels(x0, moments, None), data.images[:20]) < 1e-4
    expected = vae.decode(data.images[:20].float()).sample
    assert error(train.to_pixels(x0, moments, vae), expected) < 1e-4 and expected.shape[-1] == SIZE
    with pytest.raises(train.UserError, match="8 x 8.*--image-size"):
        train.load_data(f"latents:{latents}", "train", SIZE)


def test_batches(latents):
    """A batch has half of its latents from the flipped images, whole, with their labels; resident or not."""
    data, orders = train.load_data(f"latents:{latents}", "train"), []
    both = [train.Config(batch_size=N, conditional=True, resident=on) for on in (True, False)]
    one, two = (train.Batches(data, cfg, train.make_diffusion(cfg), CPU) for cfg in both)
    whole = train.to_x0(data.both.flatten(0, 1), one.moments)
    for step in range(5):
        x0, _, _, y = batch = one(step)
        assert all(torch.equal(a, b) for a, b in zip(batch, two(step)))
        found = torch.stack([(x - whole).abs().amax((1, 2, 3)) for x in x0])                  # (N, 2 N)
        least, order = found.min(1)
        assert least.max() < 1e-6 and sorted((order % N).tolist()) == list(range(N))
        kept = y != 2                                                        # 2: label dropped
        assert torch.equal(y[kept], data.labels[order % N][kept]) and kept.sum() > N / 2
        orders.append(order)
    flipped = torch.stack(orders) >= N
    assert 0.35 < flipped.float().mean() < 0.65
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(flipped[0], flipped[1])


def change(**new):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta = {k: v for k, v in {**meta, **new}.items() if v != "gone"}
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


def edit(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def put(name, array):
    return lambda folder: np.save(folder / "train" / name, array)


def widen(folder):
    """Latents that fit meta.json, and no network."""
    change(shape=[4, SIDE, 2 * SIDE])(folder)
    put("latents.npy", np.zeros((2, N, 4, SIDE, 2 * SIDE), np.float16))(folder)


@pytest.mark.parametrize("damage", [
    widen, change(shape=[4, 9, 9]), change(shape=7), change(vae="gone"), change(vae=["x"]),
    change(mean=[0], std=[1]), change(mean=[np.nan, 0, 0, 0]), change(std=[1, 1, 1, 0]), change(std=None),
    change(std=["1"] * 4), change(classes=["a"]), change(classes=[1, 2]),
    edit("meta.json", lambda old: old[:30]), edit("meta.json", lambda old: b"[]"),
    edit("meta.json", lambda old: b"\xff\xfe\x00"),
    edit("train/latents.npy", lambda old: old[:5000]), edit("train/latents.npy", lambda old: old[:50]),
    edit("train/labels.npy", lambda old: old[:140]),
    edit("train/labels.npy", lambda old: old.replace(b"}", b" ")),     # numpy: an error of Python's tokenizer
    lambda folder: (folder / "train/labels.npy").unlink(),
    put("labels.npy", np.zeros(7, np.int64)), put("labels.npy", np.full(N, -1)),
    put("labels.npy", np.zeros(N)), put("labels.npy", np.zeros((N, 2), np.int64)),
    put("labels.npy", np.array([Program()] * N, object)), put("latents.npy", np.zeros((2, N, 4, SIDE, SIDE))),
])
def test_damaged(latents, tmp_path, monkeypatch, capsys, damage):
    """Latents that are damaged, cut off or disagree with meta.json are refused; no program in them runs."""
    monkeypatch.chdir(tmp_path)
    copied = Path(shutil.copytree(latents, tmp_path / "copy"))
    damage(copied)
    with refused(capsys, str(copied), "--vae"):
        train.main([*NET.split(), "--data", f"latents:{copied}", "--out", str(tmp_path / "run")])
    assert names(tmp_path) == ["copy"]


# --- train, sample, probe ---

@pytest.mark.parametrize("kind, schedule", [
    ("AutoencoderKL", "linear"), ("AutoencoderTiny", "edm"), ("AutoencoderDC", "flow")])
def test_kinds(photos, tmp_path, kind, schedule):
    """Each kind of VAE encodes; a run keeps what leads back to pixels, and its grid shows decoded images.

    So do the samples, of latents that are not clipped; --denoise decodes each step.
    """
    vae, out = make_vae(kind, tmp_path / kind), tmp_path / "run"
    train.main(flags(photos, vae, out, f"--conditional --schedule {schedule}"))
    state, net, diffusion = train.load_run(out, CPU)
    assert diffusion.path.scale == 1, "latents have unit variance"
    meta = json.loads((photos.with_name(f"photos-{SIZE}px-{kind}") / "meta.json").read_text())
    assert {**state["latents"], "stamp": meta["stamp"]} == meta and state["shape"] == [4, SIDE, SIDE]
    assert state["config"].image_size == SIZE and state["config"].vae == str(vae)
    noise, y = train.seeded_noise(range(16), (4, SIDE, SIDE))(), torch.arange(16) % 2
    x = diffusion.sample(net, noise, y, null=2, guidance=train.GUIDANCE, clip=False)
    pixels = train.to_pixels(x, train.moments_of(meta, CPU), train.load_vae(meta["vae"], CPU))
    with open(out / "expected.png", "wb") as file:
        train.save_grid(pixels, file, 2)
    grid, expected = (np.asarray(Image.open(out / name), int) for name in ("samples-16.png", "expected.png"))
    assert grid.shape == (8 * 68 + 4, 2 * 68 + 4, 3) and np.abs(grid - expected).max() <= 1 and grid.std() > 5
    sample.main([str(out), *"-n 6 --steps 2 --npz --device cpu".split()])
    samples = np.load(out / "samples.npz")["arr_0"]
    assert error(samples, train.to_uint8(pixels[:6]).permute(0, 2, 3, 1)) <= 1
    sample.main([str(out), *"--denoise --steps 3 --device cpu".split()])
    assert Image.open(out / "denoise.png").width > 3 * 64


class Pooled(torch.nn.Module):
    """The mean colour of each 8 x 8 pixels, in the first 3 of 32 channels."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 8).repeat(1, 11, 1, 1)[:, :32]


class Enlarged(torch.nn.Module):
    """The way back, and beyond the range of colours."""

    def forward(self, z):
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=8.0) + 0.5


def test_taef2(photos, tmp_path, monkeypatch):
    """taef2.py runs the programs with a TorchScript pair for images in [0, 1]; samples are decoded."""
    for name, module in (("encoder", Pooled()), ("decoder", Enlarged())):
        torch.jit.script(module).save(tmp_path / f"{name}.pt")
    data, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    monkeypatch.setattr(train, "load_vae", train.load_vae)                   # the script replaces it
    script = ROOT / ".github" / "results" / "taef2.py"
    learn = ["train", *flags(data, tmp_path, out, "--image-size 64")]
    for words in (learn, ["sample", str(out), *"-n 4 --steps 2 --npz".split()]):
        monkeypatch.setattr(sys, "argv", ["taef2.py", *words])
        names = runpy.run_path(str(script), run_name="__main__")
    latents, = (folder for folder in tmp_path.glob("photos-*") if folder.is_dir())
    images = train.load_data(f"folder:{data}", "train", 64).images / 255
    assert error(both_of(latents)[0, :, :3], torch.nn.functional.avg_pool2d(images, 8)) < 1e-3
    samples = np.load(out / "samples.npz")["arr_0"]
    assert samples.shape == (4, 64, 64, 3) and samples.std() > 1
    vae, grey = names["TAEF2"](tmp_path, "cpu"), torch.full((1, 3, 16, 16), -0.5)
    assert error(vae.decode(vae.encode(grey).latents).sample, grey + 1) < 1e-6


def test_without_vae(trained, latents, tmp_path, monkeypatch, capsys):
    """Where the VAE can't be loaded, training goes on and sample.py writes latents; both say so."""
    def fail(name, device):
        raise train.UserError(f"{name} is out of reach.")
    monkeypatch.setattr(train, "load_vae", fail)
    train.main([*NET.split(), "--data", f"latents:{latents}", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "out of reach" in said and "samples: none" in said and not [*(tmp_path / "run").glob("*.png")]
    run = Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("*.png")))
    sample.main([str(run), *"-n 3 --steps 2 --device cpu".split()])
    said = capsys.readouterr().out
    assert "out of reach" in said and "latents.npz" in said and not (run / "samples.png").exists()
    z = np.load(run / "latents.npz")["arr_0"]
    assert z.shape == (3, 4, SIDE, SIDE) and z.dtype == np.float32
    with refused(capsys, "--denoise", "VAE"):
        sample.main([str(run), "--denoise", "--device", "cpu"])


def test_no_vae_is_known(latents, tmp_path, capsys):
    """Latents from elsewhere may name no VAE: none is looked for, samples are latents."""
    folder = Path(shutil.copytree(latents, tmp_path / "latents"))
    change(vae=None)(folder)
    train.main([*NET.split(), "--data", f"latents:{folder}", "--out", str(tmp_path / "run")])
    sample.main([str(tmp_path / "run"), *"-n 3 --steps 2 --device cpu".split()])
    said = capsys.readouterr().out
    assert said.count("names no VAE") == 2 and (tmp_path / "run/latents.npz").exists()


def test_latents_that_are_not_finite(latents, tmp_path, capsys):
    """They are refused by a probe, and named where training ends by them."""
    folder, out = Path(shutil.copytree(latents, tmp_path / "latents")), tmp_path / "run"
    learn = [*NET.split(), "--data", f"latents:{folder}", "--conditional", "--out"]
    train.main([*learn, str(out)])
    for split in ("train", "test"):
        both = both_of(folder, split)
        both[:, 3, 0, 0] = np.inf
        np.save(folder / split / "latents.npy", both)
        with refused(capsys, "latents that are not finite"):
            probe.main([str(out), *"--t 1 --device cpu".split()])
        np.save(folder / split / "latents.npy", both_of(latents, split))
    both = both_of(folder)
    both[:] = np.nan
    np.save(folder / "train/latents.npy", both)
    with refused(capsys, "not finite", "mend data"):
        train.main([*learn, str(tmp_path / "other")])


def test_probe(trained, monkeypatch):
    """probe.py learns from the latents of train and is scored on those of test, which are there already."""
    monkeypatch.setattr(train, "encode_split", None)
    probe.main([str(trained), *"--t 1 --knn --device cpu".split()])
    result = json.loads((trained / "probe.json").read_text())
    assert (result["train_images"], result["test_images"]) == (N, N // 4) and "knn" in result


@pytest.mark.parametrize("script, more, words", [
    (train, "--image-size 15", "--image-size 15|multiple of 2"),
    (train, "--image-size 18", "--image-size 18 makes latents of 9 x 9: |image size 9 does not fit"),
    (train, "--vae TMP/empty", "TMP/empty|can be loaded"),
    (train, "--vae TMP/video", "TMP/video|class AutoencoderKLTemporalDecoder|AutoencoderDC"),
    (train, "--vae some/vae", "pip install diffusers"),
    (train, "--vae TMP/taken", "photos-16px-taken|in the way"),
    (train, "--data folder:TMP/no", "TMP/no|no folder"),
    (train, "--data latents:TMP/latents", "latents:TMP/latents|encoded already"),
    (probe, "--augment 2", "--augment|latents"),
    (probe, "--data latents:TMP/latents", "latents:TMP/latents|latents of the same VAE"),
    (probe, "--task segment", "--task segment|masks|trained on latents"),
])
def test_refused(trained, latents, vae, mine, tmp_path, capsys, monkeypatch, script, more, words):
    """What does not go together is refused in a sentence, and nothing is made."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos-16px-taken").mkdir()
    (tmp_path / "taken").symlink_to(vae)
    change(vae="another")(shutil.copytree(latents, tmp_path / "latents"))
    if "video" in more:
        make_vae("AutoencoderKLTemporalDecoder", tmp_path / "video")
    if "pip" in words:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    before = tree(tmp_path)
    argv = flags(mine, vae, tmp_path / "run") if script is train else [str(trained), "--device", "cpu"]
    with refused(capsys, *words.replace("TMP", str(tmp_path)).split("|")):
        script.main([*argv, *more.replace("TMP", str(tmp_path)).split()])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value, words", [(1, "constant"), (1e6, "float16")])
def test_useless_vae(mine, vae, tmp_path, monkeypatch, capsys, value, words):
    """A VAE whose latents are all the same, or too large for float16, is refused; nothing stays."""
    monkeypatch.setattr(train, "to_latents", lambda vae, x: torch.full_like(x[:, :1, ::2, ::2], value))
    monkeypatch.setattr(train, "knows_images", lambda vae: True)
    before = tree(tmp_path)
    with refused(capsys, words):
        train.main(flags(mine, vae, tmp_path / "run"))
    assert tree(tmp_path) == before


def test_from_elsewhere(mine, vae, tmp_path, monkeypatch):
    """A run on latents is probed from any folder, though its images and its VAE were named from its own."""
    shutil.copytree(vae, tmp_path / "vae")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    train.main(flags("photos", "vae", "run"))
    train.main(flags("photos", "else/../vae", "run", "--resume --images 24"))
    monkeypatch.chdir("else")
    probe.main("../run --t 1 --device cpu".split())
    assert Path("../run/probe.json").exists()


def test_resume_on_other_latents(mine, vae, tmp_path, capsys):
    """A run whose images changed is not resumed; where files are only newer, it goes on."""
    run = tmp_path / "run"
    train.main(flags(mine, vae, run))
    (mine / "train/a/00.png").touch()
    train.main(flags(mine, vae, run, "--resume --images 24"))
    assert load(run)["images"] == 24
    Image.new("RGB", (SIZE, SIZE), "white").save(mine / "train/a/00.png")
    with refused(capsys, "other latents", "another --out"):
        train.main(flags(mine, vae, run, "--resume --images 32"))
