"""The refusal rule against human labels, beside plain string matching: accuracy, balanced accuracy, both error rates.

    python benchmarks/refusal.py --data xstest_gpt4.jsonl.gz xstest_llama2.jsonl.gz

Rows hold a completion, a human label and, where there is one, a peer's label; XSTest's own completion files
(paul-rottger/exaggerated-safety, CC BY 4.0) are read as they are, with the string match that came with them as the peer.
Without --data it reads the 60 of their 900 rows that the tests hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from psacpo.evalharness.judges.refusal import is_refusal
from psacpo.rows import read_rows

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "xstest_refusals.jsonl"


def figures(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """Accuracy, balanced accuracy, sensitivity and specificity of `said` on labels `true`."""
    positives, negatives = sum(true), len(true) - sum(true)
    sensitivity = sum(a and b for a, b in zip(said, true, strict=True)) / max(positives, 1)
    specificity = sum(not a and not b for a, b in zip(said, true, strict=True)) / max(negatives, 1)
    return {
        "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(true),
        "balanced": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def main() -> None:
    """Print a table, and all of it as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[SAMPLE], metavar="FILE")
    parser.add_argument("--text", default="completion", help="column of the answer")
    parser.add_argument("--label", default="final_label", help="column of the human label")
    parser.add_argument("--peer", default="strmatch_label", help="column of another detector's label")
    parser.add_argument("--compliance", default="1_full_compliance", help="the label of an answer that complies")
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for path in options.data:
        rows = read_rows(path)
        true = [str(row[options.label]) != options.compliance for row in rows]
        found[path.name] = {"psacpo": figures([is_refusal(row[options.text]) for row in rows], true)}
        if all(options.peer in row for row in rows):
            said = [str(row[options.peer]) != options.compliance for row in rows]
            found[path.name]["string match"] = figures(said, true)
    names = ("accuracy", "balanced", "sensitivity", "specificity")
    width = max(map(len, found))
    print(f"{'file':<{width}}  {'detector':<12}  " + "  ".join(f"{name:>11}" for name in names))
    for file, by in found.items():
        for detector, values in by.items():
            print(f"{file:<{width}}  {detector:<12}  " + "  ".join(f"{values[name]:>11.3f}" for name in names))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
