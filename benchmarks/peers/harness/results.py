"""From rounds to the table: medians, ratios to every peer, goals. Written anew after each row, so that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.pairing import Rounds, median_ratio
from harness.rows import GOALS, UNCACHED

OWN = "pagoda"


class Results:
    """The rows so far, and the files that they are written to: `PATH.json` and `PATH.md`."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {**head, "engines": {}, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add_engine(self, key: str, facts: dict[str, Any]) -> None:
        """Versions, or why an engine is missing."""
        self._content["engines"][key] = facts
        self._write()

    def add(
        self, model: str, weights: str, row: str, figure: str, unit: str, rounds: Rounds, *, higher_is_better: bool
    ) -> None:
        """One row; prints it too."""
        engines = [*rounds.figures, *rounds.slow]
        figures = {
            engine: {
                "median": rounds.median(engine, figure),
                "values": rounds.values(engine, figure),
                "agreeing_tokens": _agreeing_tokens(rounds, engine),
                "ratio": None
                if engine == OWN
                else median_ratio(
                    rounds.values(OWN, figure), rounds.values(engine, figure), higher_is_better=higher_is_better
                ),
            }
            for engine in engines
        }
        entry = {
            "model": model,
            "weights": weights,
            "row": row,
            "unit": unit,
            "higher_is_better": higher_is_better,
            "figures": figures,
            "failures": rounds.failures,
            "goal": GOALS.get((model, weights, row)),
            **_against_best(figures, row, higher_is_better=higher_is_better),
        }
        self._content["rows"].append(entry)
        print(_line(entry, self._columns()), flush=True)
        self._write()

    def _columns(self) -> list[str]:
        names = {engine for entry in self._content["rows"] for engine in (*entry["figures"], *entry["failures"])}
        return sorted(names - {OWN})

    def _write(self) -> None:
        self._path.with_suffix(".json").write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        self._path.with_suffix(".md").write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        content = self._content
        columns = self._columns()
        heads = ["row", OWN, *columns, "best peer", "ratio", "goal", ""]
        lines = [
            f"# Pagoda and its peers, {content['time']}",
            "",
            f"{content['cpu']['name']}, {content['threads']} threads ({' '.join(content['cpu']['instruction_sets'])}). "
            f"Commit {content['commit']}. Medians of {content['pairs']} rounds; the ratio is the median of the ratios within "
            "the rounds, above 1 where Pagoda is better. `(…)`: one run, too slow for more. See ../NOTES.md.",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + "---|" * len(heads),
            *(_line(entry, columns) for entry in content["rows"]),
            "",
            "Limits of the machine in the same run: "
            + ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in content["limits"].items()),
            "",
            *(f"- {name}: {_facts(facts)}" for name, facts in content["engines"].items()),
            *(
                f"- {entry['model']} {entry['weights']} {entry['row']}, {engine}: {why}"
                for entry in content["rows"]
                for engine, why in entry["failures"].items()
            ),
        ]
        return "\n".join(lines) + "\n"


def _agreeing_tokens(rounds: Rounds, engine: str) -> list[int]:
    """How many tokens of the first sequence an engine and Pagoda have in common before they part, by round."""
    pairs = zip(rounds.figures.get(OWN, ()), rounds.figures.get(engine, ()), strict=False)
    lengths = []
    for own, other in pairs:
        same = [
            mine == theirs for mine, theirs in zip(own.get("first_ids", ()), other.get("first_ids", ()), strict=False)
        ]
        lengths.append(same.index(False) if False in same else len(same))
    return lengths


def _against_best(figures: dict[str, Any], row: str, *, higher_is_better: bool) -> dict[str, Any]:
    """The best peer by its median, and how many times better Pagoda is; in `shared-prefix` Pagoda's own other form counts."""
    paired = {name: entry for name, entry in figures.items() if name != OWN and entry["ratio"] is not None}
    if row == "shared-prefix":
        paired = {name: entry for name, entry in paired.items() if name == UNCACHED}
    if not paired or OWN not in figures:
        return {"best_peer": None, "ratio": None}
    sign = -1 if higher_is_better else 1
    best = min(paired, key=lambda name: sign * paired[name]["median"])
    return {"best_peer": best, "ratio": paired[best]["ratio"]}


def _line(entry: dict[str, Any], columns: list[str]) -> str:
    def cell(engine: str) -> str:
        figures = entry["figures"].get(engine)
        if figures is None:
            return "failed" if engine in entry["failures"] else ""
        text = f"{figures['median']:.4g}"
        return text if figures["values"] else f"({text})"

    ratio, goal = entry["ratio"], entry["goal"]
    verdict = "" if ratio is None or goal is None else "reached" if ratio >= goal else "missed"
    cells = [
        f"{entry['model']} {entry['weights']} {entry['row']}, {entry['unit']}",
        cell(OWN),
        *map(cell, columns),
        entry["best_peer"] or "",
        "" if ratio is None else f"{ratio:.2f}",
        "" if goal is None else f"≥ {goal}",
        verdict,
    ]
    return "| " + " | ".join(cells) + " |"


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
