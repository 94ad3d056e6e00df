"""Layer curves of the runs of claim.md, a picture a network: mean over seeds, with a band of one deviation.

    python .github/results/claim_curves.py [FILE]           claim-unet.png, claim-uvit.png, claim-dit.png

They go beside FILE; those of the published lines into .github/assets.

A point is a layer's best held-out probe accuracy over t; in brackets stands the number of seeds.
"""
import statistics
import sys
from pathlib import Path

import numpy as np
from PIL import ImageDraw

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import claim  # noqa: E402
import probe  # noqa: E402

COLOURS = {"baseline": "#222222", "z": "#1f77b4", "distillation": "#ff7f0e", "z + distillation": "#d62728"}


def curve(runs):
    """Runs of one form -> mean over seeds of each layer, and its deviation, both in %."""
    best = [[100 * max(row) for row in run["held_out"]] for run in runs]
    layers = list(zip(*best))
    spread = [statistics.stdev(layer) if len(layer) > 1 else 0.0 for layer in layers]
    return np.array([statistics.mean(layer) for layer in layers]), np.array(spread)


def by_form(runs, name, z, weight):
    """-> form of a network: its runs, of each form that has any."""
    return {form: [*runs[name, variant].values()]
            for form, variant in claim.forms(z, weight).items() if (name, variant) in runs}


def draw(title, bottleneck, found, file):
    """found: form -> its runs; bottleneck: the layer of z, marked below."""
    names = next(iter(found.values()))[0]["layers"]
    curves = {form: curve(runs) for form, runs in found.items()}
    ends = probe.axis(min((mean - spread).min() for mean, spread in curves.values()),
                      max((mean + spread).max() for mean, spread in curves.values()))
    heading = [(f"{title}: probe accuracy, held out (%), best t", "black"),
               *((f"{form} ({len(runs)})", COLOURS[form]) for form, runs in found.items())]
    right, bottom = 130 + 90 * len(names), 560 + 36 * len(found)
    picture, pen = probe.canvas(right + 30, bottom + 60, heading)
    probe.draw_grid(pen, ends, right, bottom)
    glass = ImageDraw.Draw(picture, "RGBA")                 # paints what one sees through
    x = 145 + 90 * np.arange(len(names))
    for form, (mean, spread) in curves.items():
        y, above, below = (probe.height(values, ends, bottom)
                           for values in (mean, mean + spread, mean - spread))
        if len(found[form]) > 1:
            glass.polygon([*zip(x, above), *zip(x[::-1], below[::-1])], COLOURS[form] + "33")
        pen.line([*zip(x, y)], COLOURS[form], 4)
    for place, name in zip(x, names):
        colour = "red" if name == bottleneck else "black"
        pen.text((place, bottom + 25), name.replace("block_", ""), colour, anchor="mm")
    picture.save(file)


def main(argv=None):
    file = claim.parse(__doc__, argv)
    runs = claim.read_runs(file)
    folder = Path(file).parent if file else HERE.parent / "assets"
    for title, name, z, weight in claim.NETWORKS:
        found = by_form(runs, name, z, weight)
        if found:
            picture = folder / f"claim-{name}.png"
            draw(title, z, found, picture)
            print(picture)


if __name__ == "__main__":
    main()
