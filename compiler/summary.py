"""What a compile is going to take, and what came of it, as text for people.

A `_text` is Markdown whose tables read well as they are, for a shell and for Preview as Text; a `_brief` has a line for each
network and no columns, for the node itself, whose letters are not of one width.
"""

import json
from pathlib import Path

from .request import MINUTE, MODEL_JSON, Request

FORMAT = 1  # of model.json
MAX_BYTES = 1 << 20  # of one from a stranger
HASH_DIGITS = 12  # that are shown

# what reading one that is not as it should be raises
MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)

GB, MB = 1e9, 1e6


def estimate_text(found: dict) -> str:
    """Of a dry run (job.py)."""
    rows = [("network", "time", "comparing", "memory", "disk kept")]
    for cost in found["costs"]:
        compiling = duration(_compiling(cost))
        rows.append((cost["name"], compiling, _simulated(cost), gigabytes(cost["memory"]), gigabytes(cost["result"])))
    return "\n\n".join([table(rows), _whole_estimate(found), *found.get("notes", [])])


def estimate_brief(found: dict) -> str:
    lines = [f"{c['name']}: {duration(_compiling(c))}, comparing {_simulated(c)}" for c in found["costs"]]
    return "\n".join([_whole_estimate(found), *lines, *found.get("notes", [])])


def _whole_estimate(found: dict) -> str:
    costs = found["costs"]
    seconds = sum(_compiling(cost) for cost in costs) + sum(cost["simulate"] for cost in costs if cost["verified"])
    memory = max(cost["memory"] for cost in costs)
    return (
        f"In all about {duration(seconds)} on two idle cores, {gigabytes(found['disk'])} of disk while it runs, and "
        f"{gigabytes(memory)} of memory, of which {gigabytes(found['memory'])} are free."
    )


def _compiling(cost: dict) -> float:
    return cost["build"] + cost["transform"] + cost["deploy"]


def _simulated(cost: dict) -> str:
    return duration(cost["simulate"]) + ("" if cost["verified"] else ", not done: over the budget")


def folder_text(folder: Path) -> str:
    """What the model.json of a folder says; nothing if it has none. It may come from a stranger."""
    try:
        if not (folder / MODEL_JSON).is_file():
            return ""
        report = _read(folder)
        if report["format"] != FORMAT:
            return f"{MODEL_JSON}: of a later version of this pack"
        return "\n\n".join(filter(None, [report_text(report), "\n".join(_sources(report["source"]))]))
    except MALFORMED:
        return f"{MODEL_JSON}: damaged, or not written by this pack"


def made(request: Request) -> dict | None:
    """The model.json of the folder that is asked for, if it is there and was made as asked; from which weights, it says."""
    try:
        report = _read(request.out)
        asked = (FORMAT, request.chip.upper(), request.options)
        same = (report["format"], report["chip"], report["options"]) == asked
        return report if same and report_text(report) and report["weights_sha256"] else None
    except MALFORMED:
        return None


def _read(folder: Path) -> dict:
    path = folder / MODEL_JSON
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is too large")
    return json.loads(path.read_text(encoding="utf-8"))


def _sources(source: dict) -> list[str]:
    hashes = {file["file"]: file["sha256"][:HASH_DIGITS] for file in source.get("files", [])}
    lines = [f"- from {source['file']}"] if "file" in source else []
    for node in source.get("nodes", []):
        settings = ", ".join(f"{name} {value}" for name, value in node["settings"].items())
        known = [f"sha256 {hashes[value]}..." for value in map(str, node["settings"].values()) if value in hashes]
        lines.append(f"- from {node['node']} ({', '.join([settings[:200], *known])})")
    return lines


def report_text(report: dict) -> str:
    """Of a finished compile: model.json in plain words."""
    rows = [("file", "precision", "size", "compared with the reference")]
    for file in report["files"]:
        rows.append((file["file"], file["recipe"], gigabytes(file["bytes"]), verdict(file)))
    blocks = [f"'{report['name']}' for {report['chip']}, compiled by {report['versions']['compiler']}", table(rows)]
    return "\n\n".join(blocks + ["\n".join(f"- {line}" for line in _remarks(report))]).rstrip()


def report_brief(report: dict) -> str:
    files = report["files"]
    size = gigabytes(sum(file["bytes"] for file in files))
    lines = [f"'{report['name']}' for {report['chip']}, {size}", "press R, and the loaders offer it"]
    for file in files:
        parity = f"cosine {worst(file['attempts'][-1]):.6f}" if file["verified"] else "not verified"
        lines.append(f"{file['file']}: {file['recipe']}, {parity}")
    return "\n".join([*lines, *_remarks(report)])


def _remarks(report: dict) -> list[str]:
    lines = []
    for file in report["files"]:
        if len(file["attempts"]) > 1:
            failed = "; ".join(
                f"{a['recipe']}: " + ("not compiled" if "failure" in a else f"cosine {worst(a):.5f}")
                for a in file["attempts"][:-1]
            )
            lines.append(f"{file['file']}: {failed} did not do, {file['recipe']} did")
    return lines + report["source"].get("notes", [])


def verdict(file: dict) -> str:
    """How one file of model.json compares."""
    if not file["verified"]:
        return "not verified: the simulator would take longer than its budget"
    outputs = file["attempts"][-1]["parity"]
    return ", ".join(
        f"{name} cosine {parity['cosine']:.7f}, largest difference {parity['largest']:.1e}"
        for name, parity in outputs.items()
    )


def worst(attempt: dict) -> float:
    return min((parity["cosine"] for parity in attempt["parity"].values()), default=0.0)


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown, in columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *body = ("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < 100 * MINUTE else f"{seconds / MINUTE / 60:.0f} h"


def gigabytes(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / MB:,.{0 if size >= 10 * MB else 1}f} MB"
