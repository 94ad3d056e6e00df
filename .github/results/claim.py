"""What z, alone and with distillation, changes in runs of one seed: tables of the first page and of claim.md.

    python .github/results/claim.py [FILE]

A cell: mean difference to the run of the same seed [paired 95 % t-interval], bold where that excludes 0.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent
# 97.5 % quantile of t, by degrees of freedom: up to ten pairs
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NETWORKS = [                                     # title, name, its z, weight of its distillation
    ("UNet 36 M", "unet", "mid", "0.005"),
    ("U-ViT 11 M", "uvit", "mid", "0.005"),
    ("DiT 14.5 M", "dit", "block_6", "0.02"),
]
MEASURES = [            # where a run says it, times what; digits of a level, of a difference; is that in %?
    ("distance, classifier", ("distance", "classifier"), 1, 2, 1, True),
    ("distance, EfficientNet", ("distance", "imagenet"), 1, 1, 1, True),
    ("probe, %", ("test",), 100, 1, 1, False),
    ("k-NN, %", ("knn",), 100, 1, 1, False),
    ("mIoU, %", ("dense", "miou"), 100, 1, 1, False),
    ("transfer, %", ("transfer", "accuracy"), 100, 1, 1, False),
    ("loss", ("loss",), 1, 4, 2, True),
]
FIRST_PAGE = MEASURES[:4]
SAME_PICTURES = [measure for measure in MEASURES if measure[1][0] != "transfer"]    # in every run
COMPARED = [                                     # forms, against what; the first three: on the first page
    ("z", "baseline"),
    ("z + distillation", "baseline"),            # the primary comparison
    ("z + distillation", "z"),                   # not in the plan
    ("z + distillation", "distillation"),
    ("distillation", "baseline"),
]


def interval(values):
    """-> mean, low, high of the paired 95 % t-interval."""
    n = len(values)
    mean = statistics.mean(values)
    half = T95[n - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def cell(values, digits):
    if len(values) == 1:
        return f"{values[0]:+.{digits}f}"
    mean, low, high = interval(values)
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def parse(doc, argv=None):
    """The flags of a script -> its file, None where it is not given."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("file", nargs="?", help="lines of claim_runs.py [the published claim.jsonl]")
    return parser.parse_args(argv).file


def read_runs(file=None):
    """Lines of a file [the published ones] -> {(network, variant): {seed: run}}."""
    path = Path(file) if file else HERE / "claim.jsonl"
    runs = {}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        runs.setdefault((run["network"], run["variant"]), {})[run["seed"]] = run
    return runs


def value(run, place, factor):
    """What a run says at a place, None where it does not."""
    for name in place:
        run = run.get(name) if run else None
    return None if run is None else factor * run


def paired(ours, theirs, measure):
    """Runs of two forms by seed -> their differences in a measure, of the seeds that both have."""
    _, place, factor, _, _, relative = measure
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = value(ours[seed], place, factor), value(theirs[seed], place, factor)
        if a is not None and b is not None:
            found.append(100 * (a / b - 1) if relative else a - b)
    return found


def differences(ours, theirs, measures):
    """A cell of each of these measures."""
    cells = []
    for measure in measures:
        values = paired(ours, theirs, measure)
        *_, digits, _ = measure
        cells.append(cell(values, digits) if values else "-")
    return cells


def forms(z, weight):
    """-> title and variant of each form of a network."""
    return {"baseline": "baseline", "z": z, "distillation": f"baseline distill {weight}",
            "z + distillation": f"{z} distill {weight}"}


def compared(runs, pairs, measures):
    """-> title of a network, "form vs other", how many seeds have both, a cell a measure; pairs: of forms."""
    for title, name, z, weight in NETWORKS:
        variants = forms(z, weight)
        for form, other in pairs:
            ours, theirs = runs.get((name, variants[form]), {}), runs.get((name, variants[other]), {})
            both = ours.keys() & theirs.keys()
            if both:
                yield title, f"{form} vs {other}", len(both), differences(ours, theirs, measures)


def first_rows(runs):
    """The first page's table: what z does to samples and features, and the distillation on top."""
    titles = [title.split(", %")[0] + (", %" if relative else ", points")
              for title, *_, relative in FIRST_PAGE]
    yield f"| network | comparison | pairs | {' | '.join(titles)} |"
    yield "|---" * (3 + len(FIRST_PAGE)) + "|"
    for title, against, n, cells in compared(runs, COMPARED[:3], FIRST_PAGE):
        yield f"| {title} | {against} | {n} | {' | '.join(cells)} |"


# --- claim.md ---

def level_rows(runs):
    """What each form reached, a number a seed."""
    yield "| network | form | seeds | " + " | ".join(title for title, *_ in MEASURES) + " |"
    yield "|---" * (3 + len(MEASURES)) + "|"
    for title, name, z, weight in NETWORKS:
        for form, variant in forms(z, weight).items():
            found = runs.get((name, variant))
            if not found:
                continue
            cells = [title, form, ", ".join(map(str, sorted(found)))]
            for _, place, factor, digits, *_ in MEASURES:
                values = [value(found[seed], place, factor) for seed in sorted(found)]
                cells.append(", ".join("-" if x is None else f"{x:.{digits}f}" for x in values))
            yield f"| {' | '.join(cells)} |"


def difference_rows(runs):
    """Forms against forms: distances and loss in %, all else in points."""
    yield "| network | comparison | " + " | ".join(title.split(", %")[0] for title, *_ in MEASURES) + " |"
    yield "|---" * (2 + len(MEASURES)) + "|"
    for title, against, _, cells in compared(runs, COMPARED, MEASURES):
        yield f"| {title} | {against} | {' | '.join(cells)} |"


def growth_rows(runs, longer):
    """Pairs of longer runs beside those of the same seed: baseline / z."""
    yield "| network | images | " + " | ".join(title for title, *_ in SAME_PICTURES) + " |"
    yield "|---" * (2 + len(SAME_PICTURES)) + "|"
    for title, name, z, _ in NETWORKS:
        for seed in longer.get((name, z), {}):
            for found in (runs, longer):
                pair = [found[name, variant][seed] for variant in ("baseline", z)]
                cells = [title, f"{pair[0]['images'] / 1e6:.1f} M"]
                for _, place, factor, digits, *_ in SAME_PICTURES:
                    cells.append(" / ".join(f"{value(run, place, factor):.{digits}f}" for run in pair))
                yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    file = parse(__doc__)
    runs = read_runs(file)
    print("\n".join(first_rows(runs)))
    print("\n".join(level_rows(runs)))
    print("\n".join(difference_rows(runs)))
    if not file:
        print("\n".join(growth_rows(runs, read_runs(HERE / "growth.jsonl"))))
