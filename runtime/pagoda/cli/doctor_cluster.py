"""`pagoda doctor --cluster`: the nodes of a Ray cluster, what each would use, and what the network between them does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pagoda.config.sources import load
from pagoda.errors import PagodaError


def examine_cluster(settings: Sequence[str]) -> dict[str, Any]:
    """The survey as plain values: `address`, `nodes`, `problems`; and `problem`, all of them in one, or None."""
    from pagoda.distributed.ray.cluster_check import survey

    try:
        found = survey(load(settings).config, lambda words: print(words, file=sys.stderr))
    except PagodaError as error:
        return {"address": None, "nodes": [], "problems": [str(error)], "problem": str(error)}
    return {**asdict(found), "problem": "; ".join(found.problems) or None}


def cluster_as_text(report: dict[str, Any]) -> str:
    """The survey as text."""
    lines = [f"Ray cluster at {report['address']}"] if report["address"] else []
    for node in report["nodes"]:
        lines += [
            "",
            f"  {node['host']} ({node['address']})",
            f"    offers      {node['cpus']:g} CPU, {node['gpus']:g} GPU",
        ]
        lines.append(f"    interfaces  {', '.join(node['interfaces']) or 'unknown'}")
        lines.append(f"    would use   {node['interface'] or 'none'}")
        versions = node["versions"] or {}
        lines.append("    versions    " + (", ".join(f"{name} {text}" for name, text in versions.items()) or "unknown"))
        if node["latency_seconds"] is not None:
            from_before = node["bytes_per_second"]
            speed = "" if from_before is None else f", {from_before / 1e6:,.0f} MB/s from the node above"
            lines.append(f"    network     {node['latency_seconds'] * 1e3:.2f} ms{speed}")
    lines += ["", *(f"PROBLEM: {problem}" for problem in report["problems"])] if report["problems"] else []
    return "\n".join(lines)
