"""`python -m reimplementation info`: versions, the extension, and the backends of this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform

import torch

import reimplementation
from reimplementation import ops

CAPABILITIES = ("default", "avx2", "avx512")  # what REIMPLEMENTATION_CPU_CAPABILITY may say, least first


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("info", help="show versions, the extension and the available backends")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))


def collect() -> dict:
    """Everything that `info` tells, ready for JSON."""
    return {
        "reimplementation": reimplementation.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "extension": ops.build_info(),
        "forced_backend": os.environ.get("REIMPLEMENTATION_BACKEND") or None,
        "cpu_capability": _cpu_capability(),
        "devices": [
            {
                "device": device,
                "name": name,
                "backends": ops.available_backends(device),
                "missing": ops.backends.why_missing(device),
            }
            for device, name in _devices().items()
        ],
    }


def _cpu_capability() -> str:
    """The instruction set that the CPU kernels use: the processor's, or less if a variable asks for less."""
    limit = os.environ.get("REIMPLEMENTATION_CPU_CAPABILITY") or CAPABILITIES[-1]
    if limit not in CAPABILITIES:
        return f"{limit}, which REIMPLEMENTATION_CPU_CAPABILITY asks for, is none of {', '.join(CAPABILITIES)}"
    supported = torch.backends.cpu.get_cpu_capability().lower()
    if supported not in CAPABILITIES:  # that of another architecture, for which there is one build
        supported = CAPABILITIES[0]
    return min(limit, supported, key=CAPABILITIES.index)


def _devices() -> dict[str, str]:
    names = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return names


def _lines(facts: dict) -> list[str]:
    extension = facts["extension"]
    rows = [
        ("reimplementation", facts["reimplementation"]),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']} (CUDA {facts['torch_cuda'] or 'not in this build'})"),
        ("extension", extension["file"] or "not there"),
    ]
    for kind in ("cpu", "cuda"):
        rows.append((f"{kind} kernels", "there" if extension[kind] else f"missing: {extension['reasons'].get(kind)}"))
    rows.append(("cpu instructions", facts["cpu_capability"]))
    if facts["forced_backend"]:
        rows.append(("forced backend", f"{facts['forced_backend']} (REIMPLEMENTATION_BACKEND)"))
    if extension["architectures"]:
        rows.append(("architectures", " ".join(extension["architectures"])))
    rows += [(tool, extension[tool]) for tool in ("nvcc", "compiler") if extension.get(tool)]
    for device in facts["devices"]:
        rows.append((device["device"], f"{device['name']}; backends: {', '.join(device['backends'])}"))
        if device["missing"] and device["device"] != "cpu":  # the cpu kernels have had their line
            rows.append(("", device["missing"]))
    width = max(len(key) for key, _ in rows)
    return [f"{key:<{width}}  {value}" for key, value in rows]
