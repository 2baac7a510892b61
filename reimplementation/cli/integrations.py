"""`python -m reimplementation integrations`: whose models can run on our ops, what is installed, what was tested."""

from __future__ import annotations

import argparse
import json

from reimplementation.integrations.clients import PACKAGES, REPOSITORIES


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "integrations",
        help="list whose models `integrations.accelerate` knows",
        description="List the packages whose models reimplementation.integrations.accelerate knows, with the version "
        "that was tested and the one that is installed, and the repositories whose modules it recognises.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(collect(), indent=2))
        return
    rows = [("package", "installed", "tested", "what of it")]
    rows += [(client.package, client.installed or "-", ", ".join(client.tested), client.models) for client in PACKAGES]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *columns, models in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(columns, widths)), models]))
    print("\nRecognised by the form of their modules, whatever they are installed from:")
    for repository in REPOSITORIES:
        print(f"  {repository}")


def collect() -> dict:
    """The same, ready for JSON."""
    return {
        "packages": [
            {
                "package": client.package,
                "installed": client.installed,
                "tested": client.tested,
                "models": client.models.split(", "),
            }
            for client in PACKAGES
        ],
        "recognised": list(REPOSITORIES),
    }
