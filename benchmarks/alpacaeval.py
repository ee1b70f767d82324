"""Win rates of AlpacaEval's public annotations, recomputed and held against its published leaderboard.

    python benchmarks/alpacaeval.py --annotations annotations.jsonl.gz --leaderboard leaderboard.csv

Annotations are JSON lines (plain or gzip): model, preference (1 to 2, where 2 says that the model's answer is better and
0 is a tie; empty or null is left out), len_model and len_baseline (characters). From a checkout of tatsu-lab/alpaca_eval
they come out of `results/MODEL/ANNOTATOR/annotations.json`; the leaderboard is the CSV file of that annotator. The
annotations are CC BY-NC 4.0, which is why they are not here; without them nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from psacpo.evalharness.statistics.pairwise import length_adjusted_win_rates, win_rate


def read(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [row for line in text.splitlines() if (row := json.loads(line))["preference"] not in (None, "")]


def preference(row: dict[str, Any]) -> float:
    said = float(row["preference"])
    return 0.5 if said == 0 else said - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--leaderboard", type=Path)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="100 resamples")
    given = parser.parse_args()
    if given.annotations is None or given.leaderboard is None:
        print(json.dumps({"left_out": "no --annotations and --leaderboard"}))
        return
    draws_wanted = 100 if given.quick else given.resamples

    rows = read(given.annotations)
    with given.leaderboard.open(encoding="utf-8") as lines:
        published = {row[""]: row for row in csv.DictReader(lines)}
    names = sorted({row["model"] for row in rows} & set(published))
    rows = [row for row in rows if row["model"] in names]
    policy = np.array([names.index(row["model"]) for row in rows])
    wins = np.array([preference(row) for row in rows])
    delta = np.array([float(row["len_model"]) - float(row["len_baseline"]) for row in rows])
    adjusted = 100 * length_adjusted_win_rates(wins, delta, policy)[0]

    print(f"{'model':<36}{'win rate':>9}{'error':>7}{'SE':>6}{'error':>7}{'adjusted':>10}{'published':>10}")
    worst, theirs = 0.0, np.full(len(names), np.nan)
    for k, name in enumerate(names):
        ours, row = win_rate(wins[policy == k]), published[name]
        rate, error = 100 * ours.mean, 100 * (ours.standard_error or 0)
        off = rate - float(row["win_rate"]), error - float(row["standard_error"])
        worst = max(worst, *map(abs, off))
        theirs[k] = float(row["length_controlled_winrate"] or "nan")
        counts = ours.wins, ours.losses, ours.ties
        if counts != tuple(int(row[column]) for column in ("n_wins", "n_wins_base", "n_draws")):
            print(f"{name}: {counts} are not the published wins, losses and draws")
        print(f"{name:<36}{rate:>9.3f}{off[0]:>7.0e}{error:>6.3f}{off[1]:>7.0e}{adjusted[k]:>10.2f}{theirs[k]:>10.2f}")
    known = np.isfinite(theirs)
    raw = np.array([100 * wins[policy == k].mean() for k in range(len(names))])
    print(f"largest difference of a win rate or its standard error: {worst:.1e} points")
    figures: dict[str, float] = {"models": len(names), "comparisons": len(rows), "largest_difference": worst}
    for what, values in (("length-adjusted", adjusted), ("not adjusted", raw)):
        rank = spearmanr(values[known], theirs[known]).statistic
        miss = np.abs(values - theirs)[known].mean()
        figures |= {f"{what}, Spearman": round(float(rank), 4), f"{what}, mean error": round(float(miss), 3)}
        print(f"{what}: Spearman with the published length-controlled column {rank:.3f}, mean error {miss:.2f} points")

    # The same fit in each draw of a bootstrap over instructions, as the frontier does it.
    _, cluster = np.unique([row["idx"] for row in rows], return_inverse=True)
    size = int(cluster.max()) + 1
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), draws_wanted).astype(float)
    started = time.perf_counter()
    low, high = np.nanquantile(
        100 * length_adjusted_win_rates(wins, delta, policy, draws[:, cluster]), [0.025, 0.975], axis=0
    )
    seconds = time.perf_counter() - started
    inside = np.mean((low <= theirs) & (theirs <= high), where=known)
    print(
        f"{draws_wanted} draws of {len(rows)} comparisons in {seconds:.1f} s; mean width of the 95 % intervals "
        f"{np.mean(high - low):.1f} points; {inside:.0%} hold the published value"
    )
    print(json.dumps(figures | {"seconds": round(seconds, 2), "draws": draws_wanted}))


if __name__ == "__main__":
    main()
