"""How to repeat a run: its commands, versions and machines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distill.eval.reports.page import pairs
from distill.eval.scorefile import Score


def repeat_section(run_dir: Path, recipe: Mapping[str, Any], scores: Sequence[Score]) -> str:
    """The section: commands, versions and machines."""
    name = shlex.quote(str(run_dir / "recipe.toml"))
    verbs = ["label", "train", *(["score"] if recipe.get("benchmarks") else []), "report"]
    commands = "\n".join(f"distill {verb} {name}" for verb in verbs)
    devices = sorted({str(s.cost.get("device", "")) for s in scores if s.cost} - {""})
    facts = pairs(
        [
            ("trained with", trained_with(run_dir)),
            ("scored with", ", ".join(sorted({s.software for s in scores if s.software}))),
            ("predicted on", "; ".join(devices)),
            ("last score", max((s.created for s in scores), default="")),
            ("seed", str(recipe.get("run", {}).get("seed", ""))),
        ]
    )
    return (
        '<p class="key">Every command is safe to interrupt; rerun it to resume. The recipe above '
        f'holds every setting.</p><pre>{escape(commands)}</pre><dl class="plain">{facts}</dl>'
    )


def trained_with(run_dir: Path) -> str:
    """Versions and machine of the training, from train/run.json; "" if nothing was trained."""
    try:
        facts = json.loads((run_dir / "train" / "run.json").read_text(encoding="utf-8"))
        torch, processes = facts.get("torch", ""), facts.get("processes", 1)
        machine = str(facts.get("machine") or facts.get("device", ""))
        made_by = str(facts.get("card", {}).get("made_by", "")).removeprefix("distill train, ")
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
    suffix = f", {processes} processes" if processes != 1 else ""
    software = str(facts.get("software") or (f"torch {torch}" if torch else ""))
    return (
        ", ".join(
            filter(None, (f"version {made_by}" if made_by else "", software.partition(", ")[2] or software, machine))
        )
        + suffix
    )
