"""README.md: its commands run; the files, flags, pictures, links in it exist. And the repository's form."""
import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.distributed.run import get_args_parser

import probe
import sample
import train
from diffusion import GaussianDiffusion
from train import draw_shapes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".github" / "results"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in RESULTS.glob("*.md"))]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
SCRIPTS = {"train.py": train, "sample.py": sample, "probe.py": probe}
NOT_RUN = "-m pytest", "-m pip", "-m venv"          # and whatever is no command of python or torchrun
BATCH = 4                                           # of the tiny budget
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CARD = """README.md requirements.txt unet_selfcond.py uvit_selfcond.py dit_selfcond.py diffusion.py train.py
          probe.py sample.py tests""".split()
FENCES = re.compile(r"^ *```.*?^ *```", re.M | re.S)
readme = pytest.mark.skipif(not README.exists(), reason="README.md does not exist yet")


def shell_commands(text):
    """Words of each command in the ```bash blocks: continued lines joined, && split, VAR=... left out."""
    commands = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                words = shlex.split(part.removeprefix("$ "), comments=True)
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                commands.append(words)
    return [words for words in commands if words]


def script_and_flags(words):
    """A command of python or torchrun -> its script and the script's flags, or None if it is not to be run.

    torchrun's own flags go through torchrun's own parser. --fid-weights names a file that is not here.
    """
    if words[0] == "torchrun" or words[1:3] == ["-m", "torch.distributed.run"]:
        given = get_args_parser().parse_args(words[1 if words[0] == "torchrun" else 3:])
        words = ["python", given.training_script, *given.training_script_args]
    if "--fid-weights" in words:
        words = words[:words.index("--fid-weights")] + words[words.index("--fid-weights") + 2:]
    return None if " ".join(words[1:3]) in NOT_RUN else (words[1], words[2:])


COMMANDS = shell_commands(TEXT)
RUN = [words for words in COMMANDS if words[0] in ("python", "torchrun")]


def train_flags():
    """The flags of each train.py command."""
    found = [script_and_flags(words) for words in RUN if "train.py" in words]
    return [flags for script, flags in found if script == "train.py"]


class Cifar:
    """Stands in for torchvision's CIFAR10 and CIFAR100, which would be downloaded."""
    classes = CIFAR10

    def __init__(self, root, train, download):
        self.data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(20)]


class Vae:
    """Stands in for an AutoencoderKL that scales down by 8, which would be downloaded."""
    device = torch.device("cpu")

    class config(dict):
        in_channels = 3
    config = config(block_out_channels=[1] * 4)

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)
        mean = torch.cat([mean, mean[:, :1]], dim=1) + torch.linspace(0, 1, mean.shape[-1])
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean))

    def decode(self, z):
        return types.SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a small folder of images, photos."""
    place = tmp_path_factory.mktemp("readme")
    for i, (split, name) in enumerate((split, name) for split in ("train", "test") for name in CIFAR10):
        folder = place / "photos" / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 36), (12 * i, 90, 120)).save(folder / "1.png")
    return place


@pytest.fixture
def small(place, monkeypatch):
    """What takes long or is not here is replaced by something small; place is the working directory."""
    load_folder, steps, find_spec = train.load_folder, GaussianDiffusion.sample, importlib.util.find_spec

    def two_steps(self, net, noise, y=None, **kwargs):
        return steps(self, net, noise[:4], y if y is None else y[:4], **{**kwargs, "steps": 2})
    monkeypatch.setattr(GaussianDiffusion, "sample", two_steps)
    for net in train.MODELS.values():
        less = dict(dim=32, blocks=1) if "mults" in net.SIZES["tiny"] else dict(dim=32, depth=2, heads=2)
        monkeypatch.setattr(net, "SIZES", {size: {**kwargs, **less} for size, kwargs in net.SIZES.items()})
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Cifar)
    monkeypatch.setattr(train, "draw_shapes", lambda n, *args, **kwargs: draw_shapes(20, *args, **kwargs))
    monkeypatch.setattr(train, "load_folder", lambda root, *args: load_folder(place / "photos", *args))
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *args: name == "torch_fidelity" or find_spec(name, *args))
    monkeypatch.setattr(train, "load_vae", lambda name, device: Vae())
    monkeypatch.setattr(sample, "fid", lambda images, *args: (1.0, len(images)))
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    monkeypatch.chdir(place)
    return place


def train_run(flags):
    """Runs train.py with a tiny budget appended -> the run's folder."""
    cfg = train.parse_config(flags)
    folder = Path(cfg.out)
    if folder.exists() and "--resume" not in flags:
        shutil.rmtree(folder)                       # the same run is trained by several commands
    budget = f"--images {2 * BATCH} --batch-size {BATCH} --device cpu --no-compile"
    if "--micro-batch" in flags:
        budget += " --micro-batch 2"
    train.main([*flags, *budget.split()])
    return folder


def need_run(name):
    """The folder of a run that a train.py command of the README makes; it is trained if it is not there."""
    made = {Path(train.parse_config(flags).out): flags for flags in train_flags()}
    assert Path(name) in made, f"no train.py command of the README makes {name}"
    return Path(name) if Path(name, "checkpoint.pt").exists() else train_run(made[Path(name)])


def probe_command(flags):
    """Runs a command of probe.py on two noise levels; --compare on runs that are then probed."""
    args = probe.parse(flags)
    for run in map(need_run, args.compare or [args.run]):
        if args.compare and not (run / "probe.json").exists():
            probe.main([str(run), *"--t 10 300 --device cpu".split()])
    stem = probe.stem(args)
    expected = [f"{stem}-compare.png"] if args.compare else [f"{stem}.json", f"{stem}.png"]
    for name in expected:
        Path((args.compare or [args.run])[0], name).unlink(missing_ok=True)
    probe.main(flags if args.compare else [*flags, *"--t 10 300 --device cpu".split()])
    assert all(Path((args.compare or [args.run])[0], name).exists() for name in expected)


@readme
@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_command(small, words):
    """Every command of the README runs, on a tiny budget, and writes what it promises.

    Networks, data, images and steps are few and small, cifar10 and folder: are stand-ins, the FID is not
    computed, and torchrun's scripts run in this process: the flags and the names are the README's. sample.py
    and probe.py get the runs that train.py commands of the README make.
    """
    found = script_and_flags(words)
    if found is None:
        return
    script, flags = found
    assert script in SCRIPTS, f"{script} is no script that this test knows"
    if script == "train.py":
        folder = train_run(flags)
        assert (folder / "checkpoint.pt").exists() and (folder / f"samples-{2 * BATCH}.png").exists()
        return
    if script == "probe.py":
        return probe_command(flags)
    args = sample.parse(flags)
    need_run(args.run)
    expected = {"denoise.png"} if args.denoise else {"samples.png"} | ({"samples.npz"} if args.npz else set())
    for name in expected:
        Path(args.run, name).unlink(missing_ok=True)
    sample.main([*flags, *"--n 3 --steps 2 --device cpu".split()])
    assert all(Path(args.run, name).exists() for name in expected)


@readme
def test_other_commands():
    """No script hides behind another first word than python or torchrun, where the test above misses it."""
    others = [words for words in COMMANDS if words not in RUN]
    assert not [words for words in others if any(word.endswith(".py") for word in words)]


@readme
@pytest.mark.parametrize("command", [
    "python train.py --model unet --size tiny --data shapes", "python -m pytest"])
def test_two_commands(command):
    """The two commands for a fresh machine stand in the README, word by word, in one line each."""
    command = re.escape(f"pip install -r requirements.txt && {command}")
    assert re.search(rf"^ *{command} *(#.*)?$", TEXT, re.M)


@readme
def test_inline_commands(small):
    """Whole commands in the running text and in tables pass their script's parser."""
    for code in re.findall(r"`((?:python|torchrun) [^`]*\.py\b[^`]*)`", FENCES.sub("", TEXT)):
        if not re.search(r"--help|\.\.\.|[\[\]<>|…]", code):                   # the rest are patterns
            script, flags = script_and_flags(shlex.split(code))
            assert script in SCRIPTS, code
            getattr(SCRIPTS[script], "parse_config" if script == "train.py" else "parse")(flags)


@readme
def test_flags_exist(capsys):
    """Every --flag that the README mentions is one of our scripts', of torchrun's or of this test suite's."""
    known = get_args_parser().format_help()
    for file in ("tests/conftest.py", ".github/results/study.py", ".github/results/bench.py"):
        known += (ROOT / file).read_text(encoding="utf-8")
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit) as exit:
            script.main(["--help"])
        assert not exit.value.code
        known += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][\w-]*", known))
    others = {word for words in COMMANDS if words not in RUN for word in words}     # of pip, git ...
    text = re.sub(r"https?://\S+|<!--.*?-->", "", TEXT, flags=re.S)
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known - others


@readme
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


@readme
@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative links of a page lead to files of the repository or to its headings; its pictures open."""
    text, folder = FENCES.sub("", (ROOT / page).read_text(encoding="utf-8")), (ROOT / page).parent
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]*?src=\"([^\"]+)\"", text)
    pictures = [link for links in pictures for link in links if link]
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"href=\"([^\"]+)\"", text)
    links += re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)
    titles = headings(text)
    assert pictures or page != "README.md", "a README without pictures that the code made"
    for link in pictures + links:
        path, _, title = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            assert (folder / path).exists(), link
            if title and (not path or path.endswith(".md")):
                assert title in (headings((folder / path).read_text()) if path else titles), link
    for picture in pictures:
        if not re.match(r"[a-z]+:", picture) and not picture.endswith(".svg"):
            with Image.open(folder / picture) as image:
                image.verify()


def patched(file, *parts, page="README.md"):
    """The module of a file with those ```diff blocks of a page applied that contain one of parts."""
    source = (ROOT / file).read_text(encoding="utf-8")
    applied = 0
    page = (ROOT / page).read_text(encoding="utf-8")
    for name, block in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```", page, re.M | re.S):
        if name == file and any(part in block for part in parts):
            lines = block.splitlines()
            old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
            new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
            assert source.count(old) == 1 and sum(line[:1] == "+" for line in lines) <= 15, block
            source = source.replace(old, new)
            applied += 1
    assert applied == len(parts), parts
    module = types.ModuleType(file[:-3])
    module.__file__ = str(ROOT / file)
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def moved(module, name):
    """-> a patched network none of whose weights is zero."""
    torch.manual_seed(0)
    net_class = getattr(module, name)
    net = net_class(image_size=16, **net_class.SIZES["tiny"])
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


X, T = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), torch.tensor([10, 500])


def reroutes(net, z):
    """Is this z what the network says z is, and what reaches proj?"""
    seen = []
    net.proj.register_forward_hook(lambda proj, args, out: seen.append(args[0]))
    _, said = net(X, T, return_z=True)
    return all((z - other).abs().max() < 1e-5 for other in (seen[0], said, net.encode(X, T)))


@pytest.mark.pins
@readme
def test_exercise_two_layers():
    """Exercise 1: z is the mean of two layers' means."""
    net = moved(patched("dit_selfcond.py", "last_two"), "DiT")
    _, feats = net(X, T, return_features=True)
    assert reroutes(net, (feats["block_2"] + feats[net.bottleneck]).mean((2, 3)) / 2)


@pytest.mark.pins
@readme
def test_exercise_attention_pooling():
    """Exercise 2: z is a weighted mean over the places; the query learns."""
    net = moved(patched("unet_selfcond.py", "self.query =", "softmax"), "UNet")
    eps, feats = net(X, T, return_features=True)
    h = feats["mid"].flatten(2)
    weight = (h * net.query[:, None]).sum(1).softmax(1)[:, None]
    assert reroutes(net, (h * weight).sum(2))
    eps.square().mean().backward()
    assert net.query.grad.abs().max() > 0


@pytest.mark.pins
@readme
def test_exercise_probe_head():
    """Exercise 3: two layers on whitened features learn what a linear layer cannot: exclusive or."""
    head = patched("probe.py", "eigh", page=".github/results/probe-head.md")
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


def test_claim(study, capsys):
    """The first page's table is what its script makes of the published runs."""
    study.claim.main()
    assert capsys.readouterr().out.strip() in TEXT


def test_interval(study):
    """The paired 95 % t-interval is mean +- t s / sqrt(n), t = 4.303 for three pairs (from tables)."""
    mean, low, high = study.claim.interval([1.0, 2.0, 3.0])
    assert abs(mean - 2) < 1e-9 and abs(high - 2 - 4.303 / 3 ** 0.5) < 1e-3 and abs(high + low - 4) < 1e-9


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
            said[name, variant], feats = net(x, t, return_features=True)
            z = feats[net.bottleneck].mean((2, 3))
            for found in (net.encode(x, t), net(x, t, return_z=True)[1]):
                assert torch.allclose(found, z, atol=1e-5), variant
    for (name, variant), eps in said.items():
        others = [said[name, other] for other in study.VARIANTS[name] if other != variant]
        assert all((eps - other).abs().max() > 1e-4 for other in others), (name, variant)


def test_study_table(study):
    """Differences of equal seeds, their mean and interval, bold where it excludes 0."""
    def runs(variant, distances, tests):
        return [dict(variant=variant, seed=s, distance=d, test=a)
                for s, (d, a) in enumerate(zip(distances, tests))]
    found = study.table(runs("baseline", [8.0, 8.2, 8.1], [0.5, 0.52, 0.5])
                        + runs("z", [7.5, 7.71, 7.6], [0.51, 0.52, 0.55])
                        + runs("w", [7.0], [0.6]) + runs("u", 3 * [None], 3 * [0.6])
                        + runs("z distill 0.1", [7.4, 7.61, 7.5], [0.55, 0.56, 0.58]))
    rows = dict(line.strip("| ").split(" | ", 1) for line in found.splitlines() if " " in line)
    assert rows["baseline"] == "8.00 / 8.20 / 8.10 | 50.0 / 52.0 / 50.0"
    assert rows["z - baseline"] == "**-0.50 [-0.51, -0.48]** | +2.0 [-4.6, +8.6]"
    assert rows["w - baseline"] == "-1.00 | +10.0"                          # one pair has no interval
    assert rows["z distill 0.1 - z"] == "**-0.10 [-0.10, -0.10]** | **+3.7 [+2.2, +5.1]**"
    assert rows["u"] == "- | 60.0 / 60.0 / 60.0"                            # nobody judged its samples
    assert rows["u - baseline"].startswith("- | ")


@readme
def test_study_pairs(study):
    """The page's tables of pairs are what the script makes of the published results, whose runs are there."""
    page = (RESULTS / "results.md").read_text(encoding="utf-8")
    files = list(RESULTS.glob("pairs-*.jsonl"))
    assert files
    for file in files:
        records = study.read(file)
        assert study.table(records) in page, file
        for r in records:
            run = file.parent / "pairs" / f"{r['network']}-{r['variant'].replace(' ', '-')}-{r['seed']}"
            assert json.loads((run / "probe.json").read_text())["test"]["accuracy"] == r["test"]
            assert study.read(run / "log.jsonl")[-1]["images"] == r["images"]


@readme
def test_probe_rows():
    """A row of a table that links a result of probe.py shows that result's place and scores."""
    page = (RESULTS / "results.md").read_text(encoding="utf-8")
    rows = list(re.finditer(r"^\|.*\[probe\]\((\S+?)\).*$", page, re.M))
    assert rows
    for row in rows:
        result = json.loads((RESULTS / row[1]).read_text())
        best, test = result["best"], result["test"]["accuracy"]
        place = f"| {best['layer']}, t = {best['t']} | {100 * best['accuracy']:.1f} % | {100 * test:.1f} % |"
        assert place in row[0], row[1]


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


def test_study_size(study, tmp_path, capsys):
    """--size changes the network's sizes; without seeds the script only shows what its file holds."""
    record = json.dumps(dict(variant="baseline", seed=0, distance=8.0, test=0.5))
    (tmp_path / "dit.jsonl").write_text(record + "\n")
    study.main(f"dit --seeds --size dim=128 depth=4 --out {tmp_path}/dit.jsonl".split())
    assert study.SIZES["dit"] == dict(dim=128, depth=4, heads=4, patch=2)
    assert capsys.readouterr().out.splitlines()[2:] == ["| baseline | 8.00 | 50.0 |"]


@readme
def test_licence():
    """The last section is the text of the MIT licence."""
    last = re.split(r"^## ", TEXT, flags=re.M)[-1]
    assert re.match(r".*licen[cs]e", last.splitlines()[0], re.I)
    assert "Permission is hereby granted, free of charge" in " ".join(last.split()) and '"AS IS"' in last


def test_requirements():
    """requirements.txt names the five packages, each with a lower bound, and nothing else."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.fullmatch(r"(\w+)>=[\d.]+", line).group(1) for line in lines]
    assert sorted(names) == ["numpy", "pytest", "torch", "torchvision", "tqdm"]


def test_top_level():
    """The top level holds the files of the design and hidden ones, nothing else."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    names = {name.split("/")[0] for name in done.stdout.split("\0") if name}
    assert not [name for name in names if name not in CARD and not name.startswith(".")]


def test_functions_are_short():
    """No function has more than 80 lines."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *RESULTS.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{file.name}: {node.name}"


def test_columns():
    """No line of Python is longer than 110 columns."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *RESULTS.glob("*.py")]
    lines = [(file.name, i, line) for file in files
             for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)]
    long = [place for *place, line in lines if len(line) > 110]
    assert len(files) > 6 and not long
