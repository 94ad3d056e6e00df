"""Makes tables of the pages anew from the raw files behind them; fails where a page says something else.

Of the first page, claim.md, paths.md, latents.md, speed.md (speeds, costs), dead-ends.md (forms),
exercises.md; see main.

    python .github/results/check_numbers.py
"""
import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
import torch  # noqa: E402

import claim  # noqa: E402
import claim_curves  # noqa: E402
import claim_runs  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402

FIRST = "../../README.md"             # the first page, from here
TITLES = {"unet": "UNet", "uvit": "U-ViT", "dit": "DiT"}
PRIMARY = claim.MEASURES[:3]
SAME = claim.SAME_PICTURES
WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()
PEERS = {"unet": ("ddae", "DDAE", "fp16"), "uvit": ("uvit", "U-ViT", "fp16"), "dit": ("dit", "DiT", "TF32")}


# --- speed.txt ---

def number(pattern, text):
    return float(re.search(pattern, text)[1].replace(",", ""))


def commands():
    """Each command of speed.txt, and what it said."""
    for block in (HERE / "speed.txt").read_text().split("=== ")[1:]:
        command, _, said = block.partition("\n")
        yield command, said


def bench_runs():
    """What bench.py printed: command -> [dict(speed=, ms=, tflops=, share=, memory=, ready=), ...]."""
    runs = {}
    for command, said in commands():
        if "bench.py" in command:
            run = dict(speed=number(r"([\d,]+) images/s", said), ms=number(r"([\d.]+) ms", said),
                       tflops=number(r"([\d.]+) TFLOP/s", said), share=number(r"(\d+) % of", said),
                       memory=number(r"([\d.]+) GB", said), ready=number(r"([\d.]+) s from", said))
            runs.setdefault(command.replace(".github/results/", ""), []).append(run)
    return runs


def public_speeds():
    """(name, batch) -> images/s of the public code."""
    lines = re.findall(r"^{.*}$", (HERE / "speed.txt").read_text(), re.M)
    return {(r["peer"], r["batch"]): r["images_per_s"] for r in map(json.loads, lines)}


def starts(runs):
    """Seconds to the first step: cold, and again where that was measured."""
    return " / ".join(f"{run['ready']:.0f} s" for run in runs)


def speed_rows():
    """Speeds of a step, beside the public code's, and on several GPUs; of two runs the first one's."""
    runs, public = bench_runs(), public_speeds()
    for name, batch in (("unet", 128), ("unet", 512), ("uvit", 512), ("dit", 512)):
        flags = f"{name} --batch-size {batch}"
        both, (key, peer, kind) = runs[f"python bench.py --model {flags}"], PEERS[name]
        run, theirs = both[0], public[key, batch]
        speed, memory = f"{run['speed']:,.0f}", f"{run['memory']:.1f} GB"
        times = f"{run['speed'] / theirs:.1f} x"
        work = f"{run['ms']:.1f} | {run['tflops']:.0f}, {run['share']:.0f} %"
        yield "speed.md", (f"| `{flags}` | {speed} | {work} | {memory} | {starts(both)} | "
                           f"{theirs:,.0f} ({peer}, {kind}): {times} |")
        if batch == 512:
            title = f"{TITLES[name]} `{train.DEFAULT_SIZE[name]}`"
            yield FIRST, f"| {title} | {speed} | {theirs:,.0f} ({peer}): {times} | {memory} | "
        if name == "unet" and batch == 128:
            yield FIRST, f"{starts(both)} (1)"
    speeds = [runs[f"torchrun --nproc_per_node={n} bench.py --model dit --batch-size {512 * n}"][0]["speed"]
              for n in (1, 2, 4)]
    two, four = speeds[1] / speeds[0], speeds[2] / speeds[0]
    yield "speed.md", ", ".join(f"{speed:,.0f}" for speed in speeds) + f" images/s: {two:.2f} and {four:.2f}"
    yield FIRST, f"{two:.2f} times as fast as one, four {four:.2f}."


def slower(speed, plain, digits):
    """-> what a page says of a cost, and its last words: the share alone."""
    share = f"{100 * (plain / speed - 1):.{digits}f} %"
    return f"{speed:,.0f} instead of {plain:,.0f} images/s: {share}", share


def distill_cost(runs, command, weight, end):
    """What slower says of the distillation, beside the mean of the same command without it."""
    plain = statistics.mean(run["speed"] for run in runs[command + end])
    return slower(runs[f"{command} --distill {weight}{end}"][0]["speed"], plain, 0)


def cost_rows():
    """What z costs of a step, and the distillation."""
    runs = bench_runs()
    forms = {r["variant"]: r["images_per_second"] for r in study.read(HERE / "unet-forms.jsonl")}
    said, z = slower(forms["mid, signal"], forms["baseline"], 1)         # today's form
    yield "speed.md", said
    said, distill = slower(forms["mid distill 0.005"], forms["mid"], 0)
    yield "speed.md", said
    yield FIRST, f" (1) | {z} | {distill} |"
    uvit, dit = (f"python bench.py --model {name} --batch-size 512" for name in ("uvit", "dit"))
    gpu = "CUDA_VISIBLE_DEVICES=0"
    for alone, ours, plain in (
        (uvit, f"{gpu} {uvit}", f"{gpu} {uvit} --no-self-cond"),
        (dit, f"{dit} --self-cond", f"{dit} --no-self-cond"),
    ):
        said, z = slower(runs[ours][0]["speed"], runs[plain][0]["speed"], 1)
        yield "speed.md", said
        yield FIRST, f"| {starts(runs[alone])} | {z} |"
    day = "   (one H200)"                           # another one
    said, uvit_z = slower(runs[uvit + day][0]["speed"], runs[f"{uvit} --no-self-cond{day}"][0]["speed"], 1)
    yield "speed.md", f"on another day {said}"
    plain = f"{runs[f'{dit} --no-self-cond{day}'][0]['speed']:,.0f}"
    first, second = (run["speed"] for run in runs[dit + day])
    yield "speed.md", f"on another day {first:,.0f} and {second:,.0f} instead of {plain}"
    said, cost = distill_cost(runs, dit, 0.02, day)
    yield "speed.md", said
    yield FIRST, f"| {z} | {cost} |"
    said, cost = distill_cost(runs, uvit, 0.005, "   (one H200, third day)")
    yield "speed.md", said
    yield FIRST, f"| {uvit_z} | {cost} |"
    small = "   (small with dim 256, depth 12, heads 4; one H200, third day)"
    said, _ = distill_cost(runs, "python bench.py --model uvit --batch-size 128", 0.005, small)
    yield "speed.md", said
    flags, size = "--model dit --batch-size 128", "(small with dim 256, heads 4)"
    plain = runs[f"python bench.py {flags}   {size}"][0]["ms"]
    distilled = runs[f"python bench.py {flags} --distill 0.02   {size}"][0]["ms"]
    yield "speed.md", f"{distilled:.1f} instead of {plain:.1f} ms: {100 * (distilled / plain - 1):.0f} %"


def sampling_rows():
    """How long 10,000 samples take: cold, with a filled cache, and without the compiler."""
    times = [(number(r"([\d.]+) s", said), "--no-compile" in command)
             for command, said in commands() if "sample.py" in command]
    cold, *again = [f"{seconds:.0f}" for seconds, plain in times if not plain]
    without, = [f"{seconds:.0f}" for seconds, plain in times if plain]
    warm = " and ".join(again)
    yield "speed.md", f"{cold} s the first time, {warm} s then; {without} s with `--no-compile`"


# --- the other tables ---

def size_rows():
    """How many parameters the networks have, and how many z adds."""
    for name, network in train.MODELS.items():
        counts = []
        for self_cond in (False, True):
            with torch.device("meta"):
                net = network(self_cond=self_cond, **network.SIZES[train.DEFAULT_SIZE[name]])
            counts.append(sum(p.numel() for p in net.parameters()))
        baseline, ours = counts
        yield FIRST, f"| {baseline / 1e6:.2f} M, +{100 * (ours / baseline - 1):.2f} % |"


def demo_rows():
    """What the probe said of the demo's UNet, of the pixels and of an untrained network."""
    result = json.loads((HERE / "probe-shapes.json").read_text())
    own, pixels, untrained = (100 * r["test"]["accuracy"] for r in (
        result, result["references"]["pixels"], result["references"]["untrained"]))
    yield FIRST, f"scored once on the test set: {own:.1f} %."
    yield FIRST, f"pixels reach {pixels:.1f} %, an untrained network {untrained:.1f} %."


def path_rows():
    """What both samplers made of each path, and the probe, at the first run that has one."""
    probed = set()
    for run in study.read(HERE / "paths.jsonl"):
        for sampler in ("ddim", "heun"):
            if run.get(sampler):
                distances = run[sampler]
                yield "paths.md", f"{distances['classifier']:.2f} / {distances['imagenet']:.3g}"
        if run.get("probe") and (run["network"], run["schedule"]) not in probed:
            probed.add((run["network"], run["schedule"]))
            best, test = run["probe"]["best"], 100 * run["probe"]["test"]["accuracy"]
            yield "paths.md", f"| {test:.1f} ({best['layer']}, {best['t']}, "
            yield "paths.md", f"| {100 * run['probe']['knn']:.1f} |"


def form_name(variant):
    """A variant of forms.jsonl -> what dead-ends.md calls it."""
    today = re.sub(r"^(mid|block_6), signal", "z", variant)
    return re.sub(r"^(mid|block_6)", "z without abar", today)


def form_rows():
    """Forms of z on the original CIFAR-10: a row a form, in its cells a number a seed."""
    runs = {}
    for run in study.read(HERE / "forms.jsonl"):
        path = run["flags"].split()[1]
        rate = "falls" if "--decay" in run["flags"] else "stays"
        runs.setdefault((run["network"], path, rate, run["variant"]), []).append(run)
    for (name, path, rate, variant), same in runs.items():
        cells = []
        for found in (
            [f"{run['distance']['classifier']:.2f}" for run in same],
            [f"{run['distance']['imagenet']:.1f}" for run in same],
            [f"{100 * run['test']:.1f}" for run in same if "test" in run],
            [f"{100 * run['knn']:.1f}" for run in same if "knn" in run],
            [f"{run['loss']:.4f}" for run in same],
        ):
            cells.append(", ".join(found))
        which = f"{TITLES[name]} `{path}`, {rate} | {form_name(variant)}"
        yield "dead-ends.md", f"| {which} | {' | '.join(cells)} |\n"


def rate_rows():
    """Baselines at each rate, those at 5e-4 from the forms; in bold the rates of the claim's runs."""
    usual = dict(lr=5e-4, warmup=50_000)
    forms = [{**usual, **run} for run in study.read(HERE / "forms.jsonl")
             if run["variant"] == "baseline" and run["seed"] == 0 and "--decay" in run["flags"]]
    for run in [*forms, *study.read(HERE / "rates.jsonl")]:
        rate = f"{run['lr']:g}, {run['warmup']:,}"
        chosen = {**usual, **train.parse_flags(claim_runs.FLAGS[run["network"]].split())}
        if (run["lr"], run["warmup"]) == (chosen["lr"], chosen["warmup"]):
            rate = f"**{rate}**"
        distances = f"{run['distance']['classifier']:.2f} / {run['distance']['imagenet']:.1f}"
        yield "claim.md", f"| {TITLES[run['network']]} | {rate} | {distances} |\n"


def seed_rows():
    """What the runs on the original CIFAR-10 reached, and how far they differ."""
    runs = claim.read_runs()
    yield "claim.md", "\n".join(claim.level_rows(runs)) + "\n"
    yield "claim.md", "\n".join(claim.difference_rows(runs)) + "\n"
    stand = sum(len(seeds) for (_, variant), seeds in runs.items() if "," not in variant)
    yield "claim.md", f"All {stand} runs."
    grey = []
    for _, name, z, weight in claim.NETWORKS:
        variant = claim.forms(z, weight)["z + distillation"]
        grey += changes(runs[name, variant], runs[name, f"{variant}, grey border"], claim.MEASURES)
    yield "claim.md", f"Of the {len(grey)} intervals of new minus old runs, {decided(grey)} exclude 0"


def again_rows():
    """How far two runs of one seed are apart, and what the second ones would change in the tables."""
    runs = claim.read_runs()
    swapped = {form: dict(seeds) for form, seeds in runs.items()}
    twice, distances, probes, neighbours = 0, [], [], []
    for (name, variant), second in runs.items():
        form, again, _ = variant.partition(", again")
        if again:
            swapped[name, form].update(second)
            near, far, probe, knn = changes(second, runs[name, form], claim.FIRST_PAGE)
            distances += map(abs, near + far)
            probes += map(abs, probe)
            neighbours += map(abs, knn)
            twice += len(second)
    yield "claim.md", f"{WORDS[twice].capitalize()} runs were made a second time"
    yield "claim.md", (f"{min(distances):.1f} to {max(distances):.1f} % apart in distances, "
                       f"{min(probes):.1f} to {max(probes):.1f} points in the probe and "
                       f"{min(neighbours):.1f} to {max(neighbours):.1f} in k-NN")
    before, after = (tenth_pair(found, "unet", "mid")[0] for found in (runs, swapped))
    yield "claim.md", f"by {before:.1f} % the first time, by {after:.1f} % the second"
    first, second = (
        ["**" in cell for *_, cells in claim.compared(found, claim.COMPARED, SAME) for cell in cells]
        for found in (runs, swapped))
    turned = sum(old != new for old, new in zip(first, second))
    yield "claim.md", f"{turned} of the {len(first)} cells without transfer change sides"
    one = {**runs["uvit", "baseline"], 15: runs["uvit", "baseline, again"][15]}
    worse = claim.differences(runs["uvit", "mid distill 0.005"], one, PRIMARY)[1]
    yield "claim.md", f"by EfficientNet, {worse} %"


def growth_rows():
    """Pairs of runs that were four times as long."""
    runs, longer = claim.read_runs(), claim.read_runs(HERE / "growth.jsonl")
    yield "claim.md", "\n".join(claim.growth_rows(runs, longer)) + "\n"
    short, long = (tenth_pair(found, "dit", "block_6") for found in (runs, longer))
    yield "claim.md", (f"{-long[0]:.1f} % closer by the classifier ({-short[0]:.1f} % in this seed "
                       f"after 1.4 million), but {long[1]:.1f} % farther off by EfficientNet "
                       f"({-short[1]:.1f} % closer)")
    yield "claim.md", (f"the probe is {-long[2]:.1f} points lower ({short[2]:.1f} higher), "
                       f"neighbours {-long[3]:.1f} lower ({short[3]:.1f} higher)")
    short, long = (tenth_pair(found, "unet", "mid") for found in (runs, longer))
    yield "claim.md", (f"{-long[0]:.1f} % closer by the classifier ({short[0]:.1f} % farther off after "
                       f"1.4 million) and {long[1]:.1f} % farther off by EfficientNet ({short[1]:.1f} %)")
    yield "claim.md", f"neighbours are {-long[3]:.1f} points lower ({short[3]:.1f} higher)"
    yield "claim.md", (f"dense features know {-long[4]:.1f} points less "
                       f"({-short[4]:.1f} less; undecided over six)")
    losses = longer["uvit", "baseline"][10]["losses_of_50k"]
    low, high = losses.index(min(losses)), losses.index(max(losses[1:]))
    back = losses.index(min(losses[high:]))
    yield "claim.md", (f"from {losses[low]:.3f} after {(low + 1) / 20:.0f} million images to "
                       f"{losses[high]:.3f} after {(high + 1) / 20:.1f} million, fell to {losses[back]:.3f} "
                       f"after {(back + 1) / 20:.0f} million, rose again and ended at {losses[-1]:.3f}")


def tenth_pair(runs, network, variant):
    """What z changes in the pair of seed 10, measure by measure."""
    ours = {10: runs[network, variant][10]}
    return [values[0] for values in changes(ours, runs[network, "baseline"], SAME)]


def changes(ours, theirs, measures):
    """Runs of two forms by seed -> differences of the pairs, a list a measure."""
    return [claim.paired(ours, theirs, measure) for measure in measures]


def decided(found):
    """How many of these lists of differences have an interval that excludes 0."""
    return sum("**" in claim.cell(values, 1) for values in found)


def chance(values):
    """The two-sided p of a paired t-test of six differences: Student's t with 5 degrees of freedom."""
    t = abs(statistics.mean(values)) / (statistics.stdev(values) / math.sqrt(6))
    a = math.atan(t / math.sqrt(5))
    return 1 - 2 / math.pi * (a + math.sin(a) * math.cos(a) * (1 + 2 / 3 * math.cos(a) ** 2))


def by_holm(chances):
    """How many of these p are below what Holm's correction asks of them at 5 %."""
    chances = sorted(chances)
    for k, p in enumerate(chances):
        if p >= 0.05 / (len(chances) - k):
            return k
    return len(chances)


def apart(values):
    """Changes of distances -> by how much samples came closer, by how much others moved away."""
    return [-change for change in values if change < 0], [change for change in values if change > 0]


def place_of(run):
    """Where the probe of a run was."""
    return run["best"]["layer"], run["best"]["t"]


def shown_rows():
    """How many intervals of z with distillation against the baseline exclude 0; how single pairs differ."""
    runs = claim.read_runs()
    pairs, moved = {}, 0            # network -> changes of its measures; pairs probed at two places
    for _, name, z, weight in claim.NETWORKS:
        forms = claim.forms(z, weight)
        ours, theirs = runs[name, forms["z + distillation"]], runs[name, forms["baseline"]]
        pairs[name] = changes(ours, theirs, claim.MEASURES)
        moved += sum(place_of(ours[seed]) != place_of(theirs[seed]) for seed in ours)
    primary = [values for found in pairs.values() for values in found[:len(PRIMARY)]]
    secondary = [values for found in pairs.values() for values in found[len(PRIMARY):]]
    shown = decided(primary)
    also = ", and still do by Holm's correction" if by_holm(map(chance, primary)) == shown else ""
    yield "claim.md", f"Of the {WORDS[len(primary)]} primary intervals {WORDS[shown]} exclude 0{also}."
    yield FIRST, f"of the {WORDS[len(primary)]} primary ones {WORDS[shown]} do{also};"
    yield "claim.md", (f"Of the {WORDS[len(secondary)]} secondary ones of this comparison "
                       f"{WORDS[decided(secondary)]} exclude 0")
    every = sum(len(found[0]) for found in pairs.values())
    yield "claim.md", f"another layer or t in {moved} of the {every} pairs"
    near, far, *_ = pairs["uvit"]
    closer, away = apart(near)
    yield "claim.md", (f"six, {WORDS[len(closer)]} come closer by the classifier, by {min(closer):.0f} to "
                       f"{max(closer):.0f} %, and {WORDS[len(away)]} move away, by {min(away):.1f} and "
                       f"{max(away):.1f} %")
    closer, away = apart(far)
    yield "claim.md", (f"by EfficientNet {WORDS[len(closer)]} comes closer, by {max(closer):.0f} %, and "
                       f"{WORDS[len(away)]} move away, by {min(away):.0f} to {max(away):.0f} %.")
    farther = WORDS[sum(min(both) > 0 for both in zip(*pairs["unet"][:2]))]
    yield "claim.md", f"The UNet's {farther} all move away by both judges."


def alone_rows():
    """How many intervals of z alone exclude 0."""
    runs = claim.read_runs()
    found = []
    for _, name, z, _ in claim.NETWORKS:
        found += changes(runs[name, z], runs[name, "baseline"], PRIMARY)
    every, shown, stand = WORDS[len(found)], WORDS[decided(found)], WORDS[by_holm(map(chance, found))]
    yield "claim.md", (f"Of z's {every} intervals of distances and probe {shown} exclude 0, "
                       f"{stand} by Holm's correction")
    yield FIRST, f"of z alone's {every} (distances, probe) {shown} do, {stand} of them by Holm's correction"


def added_rows():
    """What the distillation adds to z, and z to the distillation: mean changes of distances and probe."""
    runs = claim.read_runs()
    to_z, to_distillation = {}, {}
    for _, name, z, weight in claim.NETWORKS:
        forms = claim.forms(z, weight)
        both = runs[name, forms["z + distillation"]]
        for form, added in (("z", to_z), ("distillation", to_distillation)):
            added[name] = [*map(statistics.mean, changes(both, runs[name, forms[form]], PRIMARY))]
    _, far, probe = to_z["dit"]
    yield "claim.md", f"adds {probe:.1f} points of the probe to z"
    yield "claim.md", f"samples are {far:.1f} % farther off by EfficientNet. - U-ViT"
    yield "claim.md", f"samples are {to_z['uvit'][1]:.1f} % farther off by EfficientNet. - UNet"
    yield "claim.md", f"takes {-to_z['unet'][2]:.1f} points of the probe from z."
    yield "claim.md", f"takes {-to_distillation['unet'][2]:.1f} points of the probe, and lowers the loss."
    one, other, probe = to_distillation["dit"]
    yield "claim.md", f"closer by both judges, {-one:.1f} and {-other:.1f} %, adds {probe:.1f} points"
    yield "claim.md", f"moves samples away by the classifier, {to_distillation['uvit'][0]:.1f} %."


def curve_rows():
    """What z and distillation change in single layers."""
    runs = claim.read_runs()
    base, ours = {}, {}                             # network -> {layer: mean probe accuracy in %}
    for _, name, z, weight in claim.NETWORKS:
        found = claim_curves.by_form(runs, name, z, weight)
        for curves, form in ((base, "baseline"), (ours, "z + distillation")):
            mean, _ = claim_curves.curve(found[form])
            curves[name] = dict(zip(found[form][0]["layers"], mean))
    before, after = base["uvit"]["out_6"], ours["uvit"]["out_6"]
    yield "claim.md", f"the U-ViT's last layer has {after:.0f} instead of {before:.0f} %"
    third, fourth = (base["dit"][block] - ours["dit"][block] for block in ("block_3", "block_4"))
    yield "claim.md", f"its blocks 3 and 4 know {third:.0f} and {fourth:.0f} points less."
    layers = [*base["unet"]]
    gains = [ours["unet"][layer] - base["unet"][layer] for layer in layers]
    mid, out_4, in_6 = (layers.index(layer) for layer in ("mid", "out_4", "in_6"))
    more, less = gains[mid:out_4], [-gain for gain in gains[out_4:]]
    yield "claim.md", (f"{min(more):.1f} to {max(more):.1f} points more from `mid` to out_3, "
                       f"{-gains[in_6]:.1f} less in in_6, "
                       f"and from out_4 on {min(less):.1f} to {max(less):.1f} less.")


def claim_rows():
    """What the first page says of these runs: differences, levels of the baselines, minutes."""
    runs = claim.read_runs()
    yield FIRST, "\n".join(claim.first_rows(runs)) + "\n"
    levels = []
    for _, place, factor, digits, *_ in claim.FIRST_PAGE:
        means = [statistics.mean(claim.value(run, place, factor) for run in runs[name, "baseline"].values())
                 for name in TITLES]
        levels.append(", ".join(f"{mean:.{digits - 1}f}" for mean in means))
    near, far, probe, knn = levels
    yield FIRST, f"classifier {near}; EfficientNet {far}; probe {probe} %; k-NN {knn} %."
    every = [run for seeds in runs.values() for run in seeds.values()]
    minutes = [run["images"] / run["images_per_second"] / 60 for run in every]
    span = f"{min(minutes):.0f} to {max(minutes):.0f} minutes"
    yield FIRST, f"images, {span}, up to three at a time on one H200."


def mps_rows():
    """What NVIDIA's MPS gains where two UNets share a GPU: seed 11 ran under it, seed 12 did not."""
    runs = claim.read_runs()
    said, sums = [], []
    for seed in (11, 12):
        pair = [runs["unet", variant][seed]["images_per_second"]
                for variant in ("baseline", "mid distill 0.005, grey border")]
        said.append(" and ".join(f"{speed:,.0f}" for speed in pair))
        sums.append(sum(pair))
    yield "speed.md", f"{said[0]} images/s, without it {said[1]}: {100 * (sums[0] / sums[1] - 1):.0f} % more"


def latent_rows():
    """A DiT in the latents of photographs: two pairs, with z and without; moved noise; classes."""
    runs = {run["run"]: run for run in study.read(HERE / "latents.jsonl")}
    reference, farther, minutes, gains = runs["reference"], [], [], []
    for path in ("flow", "eps"):
        base, ours = runs[f"{path}-baseline"], runs[f"{path}-z"]
        farther.append(f"{100 * (ours['distance'] / base['distance'] - 1):.1f}")
        minutes += [base["seconds"] / 60, ours["seconds"] / 60]
        after, before = (claim_curves.curve([run])[0] for run in (ours, base))
        gains.append(after - before)                # points, by layer
        for run, form in ((base, "baseline"), (ours, "z")):
            best = run["best"]
            shares = best["accuracy"], run["test"], run["knn"]
            scores = " | ".join(f"{100 * share:.1f} %" for share in shares)
            yield "latents.md", (f"| `{run['config']['schedule']}` | {form} | {run['distance']:.1f} | "
                                 f"{best['layer']}, t = {best['t']} | {scores} | {run['loss']:.3f} |\n")
    yield "latents.md", f"samples are {farther[0]} and {farther[1]} % farther off"
    yield "latents.md", f"in {min(minutes):.1f} to {max(minutes):.1f} minutes on one H200"
    yield "latents.md", (f"the test photographs have {reference['test']:.1f}, what the VAE makes of them "
                         f"(PSNR {reference['psnr']:.1f} dB) has {reference['reconstructed']:.1f}.")
    flow, eps = gains
    less = -flow[0], -eps[0]
    yield "latents.md", f"block_1 knows {less[0]:.1f} points less (`flow`) and {less[1]:.1f} (`linear`)"
    yield "latents.md", f"blocks 3 to 7 {min(flow[2:7]):.1f} to {max(flow[2:7]):.1f} more (`flow`)"
    yield "latents.md", f"blocks 5 to 12 {min(eps[4:]):.1f} to {max(eps[4:]):.1f} (`linear`)"
    for name in ("flow-z-half", "flow-z", "flow-z-2"):
        run = runs[name]
        yield "latents.md", (f"| {run['shift']:g} | {run['distance']:.1f} | {100 * run['test']:.1f} % | "
                             f"{100 * run['knn']:.1f} % |")
    half = min(sigma for sigma, left in runs["flow-z"]["unexplained"] if left > runs["flow-z"]["power"] / 2)
    yield "latents.md", f"half of the latents' variance at a noise of σ = {half:.1f}"
    with_classes = runs["conditional"]
    yield "latents.md", f"8 million images in {with_classes['seconds'] / 60:.1f} minutes"
    distances = ", ".join(f"{distance:.1f}" for distance in with_classes["distance"].values())
    yield "latents.md", f"have a distance of {distances} at a guidance of 1, 1.5, 2"
    yield "latents.md", f"(PSNR {reference['psnr_128']:.1f} dB) has {reference['reconstructed_128']:.1f}."


def exercise_rows():
    """Held-out accuracy (%) of three probes at four layers, a cell one value a seed."""
    cells = {}
    for line in study.read(HERE / "exercises.jsonl"):
        for layer, (share,) in zip(line["layers"], line["held_out"]):
            cells.setdefault(line["probe"], {}).setdefault(layer, []).append(f"{100 * share:.1f}")
    for title, found in cells.items():
        row = [title, *(", ".join(found[layer]) for layer in ("in_1", "mid", "out_2", "out_5"))]
        yield "exercises.md", f"| {' | '.join(row)} |\n"


def on_one_line(text):
    """So that it does not matter where a page breaks its lines; rows of tables end where they end."""
    return re.sub(r"(?<!\|)\n *", " ", text)


def main():
    wrong = 0
    for rows in (claim_rows, size_rows, speed_rows, cost_rows, sampling_rows, demo_rows, path_rows, form_rows,
                 rate_rows, seed_rows, again_rows, growth_rows, shown_rows, alone_rows, added_rows,
                 curve_rows, mps_rows, latent_rows, exercise_rows):
        found = list(rows())                        # (page, what it has to say)
        for page, text in found:
            if on_one_line(text) not in on_one_line((HERE / page).read_text(encoding="utf-8")):
                wrong += 1
                print(f"{page} does not say: {text}")
        print(f"{rows.__name__}: {len(found)} pieces")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
