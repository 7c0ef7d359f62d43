"""What a compile is going to take, and what came of it, as text for people."""

import json
from pathlib import Path

MODEL_JSON = "model.json"
FORMAT = 1  # of model.json
MAX_BYTES = 1 << 20  # of one from a stranger

GB, MB, MINUTE = 1e9, 1e6, 60.0


def estimate_text(found: dict) -> str:
    """Of a dry run (job.py)."""
    costs = found["costs"]
    rows = [("network", "time", "comparing", "memory", "disk kept")]
    for cost in costs:
        compiling = cost["build"] + cost["transform"] + cost["deploy"]
        simulated = duration(cost["simulate"]) + ("" if cost["verified"] else ", not verified: over the budget")
        rows.append((cost["name"], duration(compiling), simulated, gigabytes(cost["memory"]), gigabytes(cost["result"])))
    seconds = sum(cost["build"] + cost["transform"] + cost["deploy"] for cost in costs)
    seconds += sum(cost["simulate"] for cost in costs if cost["verified"])
    memory = max(cost["memory"] for cost in costs)
    return "\n".join([
        table(rows),
        f"in all about {duration(seconds)} on two idle cores, {gigabytes(found['disk'])} of disk while it runs, and "
        f"{gigabytes(memory)} of memory, of which {gigabytes(found['memory'])} are free",
    ])


def folder_text(folder: Path) -> str:
    """What the model.json of a folder says; nothing if it has none. It may come from a stranger."""
    path = folder / MODEL_JSON
    try:
        if not path.is_file():
            return ""
        if path.stat().st_size > MAX_BYTES:
            raise ValueError
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            return f"{MODEL_JSON}: of a later version of this pack"
        return "\n".join([report_text(report), *_sources(report["source"])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{MODEL_JSON}: damaged, or not written by this pack"


def _sources(source: dict) -> list[str]:
    lines = [f"from {source['file']}"] if "file" in source else []
    for node in source.get("nodes", []):
        settings = ", ".join(f"{name} {value}" for name, value in node["settings"].items())
        lines.append(f"from {node['node']} ({settings[:200]})")
    return lines


def report_text(report: dict) -> str:
    """Of a finished compile: model.json in plain words."""
    rows = [("file", "precision", "size", "compared with the reference")]
    for file in report["files"]:
        rows.append((file["file"], file["recipe"], f"{file['bytes'] / MB:,.1f} MB", verdict(file)))
    lines = [f"'{report['name']}' for {report['chip']}, compiled by {report['versions']['compiler']}", table(rows)]
    for file in report["files"]:
        if len(file["attempts"]) > 1:
            failed = "; ".join(
                f"{a['recipe']}: " + ("not compiled" if "failure" in a else f"cosine {worst(a):.5f}")
                for a in file["attempts"][:-1]
            )
            lines.append(f"{file['file']}: {failed} did not do, {file['recipe']} did")
    return "\n".join(lines)


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
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < 100 * MINUTE else f"{seconds / MINUTE / 60:.0f} h"


def gigabytes(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / MB:,.0f} MB"
