"""Which modalities are worth having: ``python launchers/importance.py --from RUN --data GOLD --labels 200``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import common


def run(arguments: argparse.Namespace) -> None:
    """Call the library and print the report."""
    if arguments.draws < 2:
        raise ValueError(f"--draws {arguments.draws}: an interval needs at least 2")
    from lanistr.evaluation.importance import importance
    from lanistr.evaluation.importance_report import write_importance

    found = importance(arguments.source, arguments.data, arguments.labels, arguments.seed, arguments.draws)
    out = arguments.out or arguments.source / "importance"
    print(write_importance(found, out))
    print(f"{out}: importance.json, importance.md, importance.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which modalities are worth having, before fine-tuning.")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="RUN", help="of pretraining")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset with labels")
    parser.add_argument("--labels", type=common.label_count, default=200, help="labelled samples: a number or all")
    parser.add_argument("--out", type=Path, help="folder for the report (default: RUN/importance)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of labels, the folds and the bootstrap")
    parser.add_argument("--draws", type=int, default=100, help="of the bootstrap")
    parsed = parser.parse_args()
    sys.exit(common.main(lambda: run(parsed)))
