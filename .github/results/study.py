"""Small networks in pairs: variants of self-conditioning and distillation beside a baseline, over seeds.

    python .github/results/study.py uvit --seeds 0 1 --out uvit.jsonl
    python .github/results/study.py unet --variants baseline mid "mid distill 0.005" --size dim=128 dropout=0

For every seed and variant: trains on the same images, draws 10,000 samples, measures their distance as fd.py
does (where its packages are installed), probes; one JSON line each, in the end a table of all that --out
holds (alone, if --seeds is empty). A variant is a few replaced lines of the network's file, below; "mid
distill 0.02" trains mid with --distill 0.02, "mid distill 0.02 until 400000" adds --distill-images 400000.
"""
import argparse
import json
import math
import statistics
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import claim   # noqa: E402
import fd      # noqa: E402
import probe   # noqa: E402
import sample  # noqa: E402
import train   # noqa: E402

SIZES = {
    "unet": dict(dim=64, mults=(1, 2, 2, 2), attention=(1,), blocks=2, dropout=0.1),
    "uvit": dict(dim=256, depth=12, heads=4, patch=2),
    "dit": dict(dim=256, depth=12, heads=4, patch=2),
}

MIXIN = "            c = c + abar * self.proj(z.to(c.dtype))"   # the default, in all three
AGGREGATE = "        z = self.aggregate(feats)"
EARLY = "        *_, feats = self.encoder(x, t, y)\n        return self.aggregate(feats)"
ADD = "c = c + self.counts * self.proj(self.aggregate(feats).to(c.dtype))\n"
PLAIN = [(MIXIN, "            c = c + self.proj(z.to(c.dtype))")]        # counts alike at all t


def at(layer):
    """z is of another layer than mid; the lines that add it are taken out, to come elsewhere."""
    return [(MIXIN, "            self.counts = abar"),
            ('self.bottleneck = "mid"', f'self.bottleneck = "{layer}"')]


def in_decoder(layer, decode):
    """The same in the decoder: there features are kept always, and z is known only in the end."""
    return [*at(layer), (AGGREGATE, "        # z:"),
            (EARLY, "        return self(x, t, y, return_z=True)[1]"),
            (f"eps = self.decoder({decode}, feats if return_features else None)",
             f"eps = self.decoder({decode}, feats)\n        z = self.aggregate(feats)")]


def unet_out(n):
    keep = '                    feats[f"out_{n}"] = h\n'
    add = f"                if n == {n} and self.self_cond:\n                    {ADD}"
    return [*in_decoder(f"out_{n}", "h, c, skips"), (keep, keep + add)]


def dit_block(n):
    return [("self.patch, self.before_z = patch, depth // 2", f"self.patch, self.before_z = patch, {n}")]


UVIT_ONE = """nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, dim))
            nn.init.zeros_(self.proj[1].weight)
            nn.init.zeros_(self.proj[1].bias)
"""
UVIT_MANY = """nn.ModuleList(
                nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, dim))
                for _ in range(depth // 2))
            for proj in self.proj:
                nn.init.zeros_(proj[1].weight)
                nn.init.zeros_(proj[1].bias)
"""
UVIT_KEEP = '                feats[f"out_{n}"] = self.patch_map(x)\n'
UNET_MID = "        for block in self.mid:\n"
COUNTS = "            self.counts = self.abar[t.long(), None].to(c.dtype)\n"
VARIANTS = {           # name -> [(old text, new text), ...]; "baseline" and the default are not patched
    "unet": {
        "baseline": [], "mid": [], "mid, plain": PLAIN, "out_3": unet_out(3), "out_6": unet_out(6),
        "in_8": [*at("in_8"), (UNET_MID, f"        if self.self_cond:\n{COUNTS}            {ADD}{UNET_MID}")],
    },
    "uvit": {
        "baseline": [], "mid": [], "mid, plain": PLAIN,
        "mid, separate projections": [
            (UVIT_ONE, UVIT_MANY),
            (MIXIN, "            c = [c + abar * proj(z.to(c.dtype)) for proj in self.proj]"),
            ("skips.pop(), c)", "skips.pop(), c[n - 1] if isinstance(c, list) else c)")],
        "mid, once to all tokens": [
            (MIXIN, "            x = x + (abar * self.proj(z.to(x.dtype)))[:, None]")],
        "out_2": [*in_decoder("out_2", "x, c, skips"),
                  (UVIT_KEEP,
                   f"{UVIT_KEEP}            if n == 2 and self.self_cond:\n                {ADD}")],
    },
    "dit": {
        "baseline": [], "block_6": [], "block_6, plain": PLAIN, "block_4": dit_block(4),
        "block_8": dit_block(8),
    },
}


def network(name, variant):
    """The class of a network with a variant's lines replaced, of the size above."""
    file = f"{name}_selfcond.py"
    text = (ROOT / file).read_text()
    for old, new in VARIANTS[name][variant]:
        assert old in text, (variant, old)
        text = text.replace(old, new)
    module = types.ModuleType(f"{name}_variant")
    sys.modules[module.__name__] = module           # the compiler looks for it there
    exec(compile(text, file, "exec"), module.__dict__)
    found = getattr(module, train.MODELS[name].__name__)
    found.SIZES = {"study": SIZES[name]}
    return found


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def distance(path, data):
    """samples.npz -> {judge: distance}, by fd.py; None for latents, or without its packages, said once."""
    if data.startswith("latents:"):                 # no pixels to compare with
        return None
    device, _, _ = train.setup(None)
    try:
        fd.load_network(device)
    except train.UserError as e:
        train.say_once(f"going on without distances: {e}")
        return None
    value, _ = fd.distance(fd.read(path), data, device, str(path))
    return dict(imagenet=value)


def probed(run, flags):
    """Probes a run -> what probe.py says of it."""
    before = set(run.glob("probe*.json"))
    probe.main([str(run), *flags.split()])
    path, = set(run.glob("probe*.json")) - before
    return json.loads(path.read_text())


def loss_curve(records):
    """Records of a log -> mean loss over each 50,000 images."""
    parts = {}
    for r in records:
        parts.setdefault((r["images"] - 1) // 50_000, []).append(r["loss"])
    return [round(statistics.mean(part), 5) for part in parts.values()]


def measure(args, name, variant, seed):
    """Trains, samples, judges and probes -> dict."""
    run = Path(args.runs, f"{name}-{variant.replace(', ', '-').replace(' ', '-')}-{seed}")
    kind, _, rest = variant.partition(" distill ")
    weight, _, until = rest.partition(" until ")
    train.MODELS[name] = network(name, kind)
    rare = "--save-every 1000000000 --sample-every 1000000000"
    train.main([*f"--model {name} --size study --data {args.data} --images {args.images} --batch-size "
                f"{args.batch_size} --lr 5e-4 {rare} --seed {seed} --out {run}".split(), *args.flags.split(),
                *["--no-self-cond"] * (kind == "baseline"), *["--distill", weight] * bool(weight),
                *["--distill-images", until] * bool(until)])
    sample.main([str(run), *f"-n {args.samples} --steps 30 --batch-size 1000 --npz".split()])
    head, *records = read(run / "log.jsonl")
    last = records[-max(1, len(records) // 5):]            # the loss is the mean over the last fifth
    result = dict(network=name, variant=variant, seed=seed, images=records[-1]["images"],
                  batch_size=args.batch_size, size=SIZES[name], flags=args.flags, device=head["device"],
                  versions=head["versions"], parameters=head["parameters"],
                  images_per_second=statistics.median(r["images_per_second"] for r in records),
                  seconds=records[-1]["seconds"], loss=statistics.mean(r["loss"] for r in last),
                  losses_of_50k=loss_curve(records), distance=distance(run / "samples.npz", args.data))
    found = probed(run, "--t 10 30 60 100 200 --batch-size 1000 --knn")
    result |= dict(best=found["best"], test=found["test"]["accuracy"], knn=found["knn"],
                   layers=found["layers"], levels=found["levels"], held_out=found["held_out"])
    if args.transfer:
        found = probed(run, "--task segment --data shapes:full --t 10 60 --batch-size 500")
        result["dense"] = dict(best=found["best"], miou=found["test"]["miou"], held_out=found["held_out"])
        found = probed(run, f"--data {args.transfer} --t 10 60 --batch-size 1000")
        result["transfer"] = dict(best=found["best"], accuracy=found["test"]["accuracy"],
                                  held_out=found["held_out"])
    return result


def table(records):
    """Records of one network -> Markdown: each variant by seed, then the differences.

    A variant is compared with the first, and with itself without distillation.
    """
    found = {}
    for r in records:
        found.setdefault(r["variant"], {})[r["seed"]] = judged(r), 100 * r["test"]
    rows = ["| variant | distance | probe, % |", "|---|---|---|"]
    for variant, runs in found.items():
        distances, scores = zip(*[runs[seed] for seed in sorted(runs)])
        rows.append(f"| {variant} | {numbers(distances, 2)} | {numbers(scores, 1)} |")
    for variant, other in comparisons(list(found)):
        seeds = sorted(found[variant].keys() & found[other].keys())
        pairs = [(found[variant][seed], found[other][seed]) for seed in seeds]
        distances = [a[0] - b[0] for a, b in pairs]
        scores = [a[1] - b[1] for a, b in pairs]
        rows.append(f"| {variant} - {other} | {difference(distances, 2)} | {difference(scores, 1)} |")
    return "\n".join(rows)


def judged(record):
    """The distance of a record by EfficientNet; NaN where nobody judged its samples."""
    return record["distance"]["imagenet"] if record["distance"] else math.nan


def comparisons(variants):
    """-> pairs of a variant and what it is compared with."""
    pairs = []
    for variant in variants[1:]:
        pairs.append((variant, variants[0]))
        plain = variant.partition(" distill ")[0]
        if plain in variants[1:] and plain != variant:
            pairs.append((variant, plain))
    return pairs


def numbers(values, digits):
    return "-" if any(map(math.isnan, values)) else " / ".join(f"{x:.{digits}f}" for x in values)


def difference(values, digits):
    """Mean [paired 95 % t-interval]; of one pair, that pair."""
    if not values or any(map(math.isnan, values)):
        return "-"
    return claim.cell(values, digits)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=VARIANTS)
    parser.add_argument("--variants", nargs="+", help="some of them [all]")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--flags", default="", help="more flags of train.py, in quotes")
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=NUMBER", help="changes to SIZES")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--transfer", metavar="DATA", help="probe these too, and the pixels of shapes:full")
    parser.add_argument("--runs", default="runs/study", help="folder of the runs")
    parser.add_argument("--out", default="study.jsonl")
    args = parser.parse_args(argv)
    for change in args.size:
        name, value = change.split("=")
        SIZES[args.network][name] = json.loads(value)
    for seed in args.seeds:
        for variant in args.variants or VARIANTS[args.network]:
            record = measure(args, args.network, variant, seed)
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
