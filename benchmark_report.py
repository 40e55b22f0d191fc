"""What a benchmark says: numbers of many rounds summed up, tables for people, a JSON file that grows as it runs."""

import statistics
import sys
import time

import torch

import utils


def spread(values):
    """{"median", "low", "high", "values"}; low and high are the extremes."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def ratio(others, ours):
    """How many times as much the one takes as the other, from values of the same rounds.

    Returns {"rounds": the median of the rounds' ratios, "medians": the ratio of the medians, "low", "high"}.
    """
    each = [other / mine for other, mine in zip(others, ours, strict=True)]
    medians = statistics.median(others) / statistics.median(ours)
    return {"rounds": statistics.median(each), "medians": medians, "low": min(each), "high": max(each)}


class Report:
    """What a run has found so far: tables for people, measurements for the file, written as soon as they are there."""

    def __init__(self, args, command):
        self.path, self.markdown = args.json, args.markdown
        self.complete = True
        self.started = time.perf_counter()
        self.content = {
            "command": command,
            "environment": utils.describe_environment(torch.device(args.device)),
            "arguments": vars(args),
            "notes": [],
            "measurements": {},
            "tables": [],
        }
        if not self.markdown:
            print(self.heading())

    def heading(self):
        facts = self.content["environment"]
        commit = f"{(facts['commit'] or 'unknown')[:10]}{' (modified)' if facts['modified'] else ''}"
        hardware = facts["processor"] if facts["device"] == "cpu" else facts["device"]
        lines = [
            self.content["command"],
            f"{hardware}, {facts['processors']} processors; torch {facts['torch']}, "
            f"torchvision {facts['torchvision']}, Python {facts['python']}; commit {commit}",
        ]
        return "\n\n".join([f"`{lines[0]}`", lines[1]]) if self.markdown else "\n".join(lines)

    def progress(self, text):
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", file=sys.stderr)

    def note(self, text):
        self.content["notes"].append(text)
        self.progress(text)
        self.save()

    def keep(self, name, value):
        self.content["measurements"][name] = value
        self.save()

    def table(self, title, columns, rows):
        """rows: lists of cells; a number is shown with three digits, None as a dash."""
        rows = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
        self.content["tables"].append({"title": title, "columns": columns, "rows": rows})
        self.save()
        if not self.markdown:
            print("\n" + format_table(title, columns, rows))

    def save(self):
        if self.path:
            utils.write_json(self.path, self.content)

    def finish(self):
        """Print what is left to print; returns the exit status."""
        if self.markdown:
            tables = [format_markdown(**table) for table in self.content["tables"]]
            print("\n\n".join([self.heading(), *tables]))
        for note in self.content["notes"]:
            print(f"\nnote: {note}")
        return 0 if self.complete else 1


def number(value, digits=3):
    """1234.5 -> "1,234", 12.345 -> "12.3", 0.01234 -> "0.0123", None -> "–"."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def times(value):
    """A ratio's cell: by rounds, by medians."""
    return "–" if value is None else f"{value['rounds']:.2f} / {value['medians']:.2f}"


def between(value):
    return f"{number(value['low'])}–{number(value['high'])}"


def format_table(title, columns, rows):
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [columns, *rows]
    ]
    return "\n".join([title, *lines])


def format_markdown(title, columns, rows):
    align = ["---", *["---:"] * (len(columns) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in [columns, align, *rows]]
    return "\n".join([f"**{title}**", "", *lines])
