"""`python -m tiger_fast.training.demo_table RESULT ... --out docs/demo.md`: the demo's figures for several seeds."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]

INTRODUCTION = """\
# The demo on several seeds

Made by `make demo-table`, which runs the demo with each seed and writes this page from the `report.json` files; no
figure is typed by hand. TIGER (`tiger-tiny`) and its controls are trained for the same number of steps on the same
batches of the embedded scenes and scored on held-out ones. `without` is TIGER without the counterfactual loss. Each
other control is the same task-conditioned decoder on one specialist, or on the plain mean of all, with at least as many
trainable parameters.
"""


def scores(report: Report) -> dict[str, dict[str, float]]:
    """Score by model and task, TIGER first."""
    own = {name: row["value"] for name, row in report["tasks"].items()}
    return {"tiger": own, "without": report["without"], **report["controls"]}


def lost_tasks(report: Report) -> list[str]:
    """Tasks on which a control is better than TIGER."""
    lost = []
    for name, row in report["tasks"].items():
        sign = 1 if row["higher_is_better"] else -1
        if any(sign * control[name] > sign * row["value"] for control in report["controls"].values()):
            lost.append(name)
    return lost


def shortfalls(report: Report) -> list[str]:
    """What the demo is to show and this report does not; empty if all is shown."""
    agreement, divergence = report["agreement"], report["divergence"]
    demands = {
        "a control is better than TIGER on more than one task": len(lost_tasks(report)) <= 1,
        "agreement is below 0.8": agreement["with"] >= 0.8,
        "agreement is not higher than without the counterfactual loss": agreement["with"] > agreement["without"],
        "divergence is more than half of that without": divergence["with"] <= divergence["without"] / 2,
        "divergence is not below that of uniform weights": divergence["with"] < divergence["uniform"],
    }
    return [what for what, holds in demands.items() if not holds]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _score_table(report: Report) -> list[str]:
    heads = [
        f"{name} ({row['metric']} {'↑' if row['higher_is_better'] else '↓'})" for name, row in report["tasks"].items()
    ]
    lines = [_row(["model", "trainable parameters", *heads]), _row(["---"] * (len(heads) + 2))]
    for model, row in scores(report).items():
        cells = [f"{row[name]:.3f}" for name in report["tasks"]]
        lines.append(_row([model, f"{report['parameters'][model]:,}", *cells]))
    return lines


def _routing_table(report: Report) -> list[str]:
    experts = list(next(iter(report["routing"].values())))
    lines = [_row(["task", *experts]), _row(["---"] * (len(experts) + 1))]
    for task in report["tasks"]:
        cells = (
            f"{report['routing'][task][e]:.2f} ({report['causal'][task][e]:+.3f}, {report['causal_input'][task][e]:+.3f})"
            for e in experts
        )
        lines.append(_row([task, *cells]))
    return lines


def _alignment_table(reports: Sequence[Report]) -> list[str]:
    heads = (
        "seed",
        "lambda_cf",
        "tasks on which a control is better",
        "agreement with / without",
        "agreement at the input",
        "divergence with / without / uniform",
        "entropy with / without",
        "minutes",
    )
    lines = [_row(heads), _row(["---"] * len(heads))]
    for report in reports:
        agreement, divergence, entropy = report["agreement"], report["divergence"], report["entropy"]
        cells = (
            str(report["seed"]),
            f"{report['counterfactual_weight']:g}",
            ", ".join(lost_tasks(report)) or "none",
            f"{agreement['with']:.3f} / {agreement['without']:.3f}",
            f"{report['agreement_input']:.3f}",
            f"{divergence['with']:.3f} / {divergence['without']:.3f} / {divergence['uniform']:.3f}",
            f"{entropy['with']:.3f} / {entropy['without']:.3f}",
            f"{report['seconds'] / 60:.1f}",
        )
        lines.append(_row(cells))
    return lines


def page(reports: Sequence[Report]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION, "## Routing against causes\n", *_alignment_table(reports), ""]
    parts.append(
        "Agreement is Spearman's rank correlation over task x expert between mean routing weight and mean difference of "
        "TIGER eq. 9;\ndivergence the mean Jensen-Shannon divergence between causal target and weights; both on held-out "
        "scenes. `at the input` removes\nthe expert before the experts interact instead of at the mixture: interaction "
        "mixes tokens, so a slot's removal is not its expert's.\n"
    )
    for report in reports:
        parts += [f"## Seed {report['seed']}\n", *_score_table(report), ""]
        parts += [
            "Mean routing weight (mean difference of the loss when the expert is removed at the mixture, at the input):\n",
            *_routing_table(report),
            "",
        ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the reports, write the page."""
    options = argparse.ArgumentParser(prog="python -m tiger_fast.training.demo_table", description=__doc__)
    options.add_argument("results", type=Path, nargs="+", help="result folders of the demo")
    options.add_argument("--out", type=Path, required=True, help="the page to write")
    chosen = options.parse_args(arguments)
    reports = [json.loads((folder / "report.json").read_text()) for folder in chosen.results]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(page(reports))
    print(f"wrote {chosen.out}")
    missed = [f"seed {report['seed']}: {what}" for report in reports for what in shortfalls(report)]
    if missed:
        raise SystemExit("\n".join(["what the demo is to show, it does not show:", *missed]))


if __name__ == "__main__":
    main()
