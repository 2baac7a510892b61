"""A run of the benchmark: every case, dtype, backend and pass that was chosen, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from reimplementation.bench import results
from reimplementation.bench.cases import CASES, DTYPES, PASSES
from reimplementation.bench.floor import copy_bandwidth
from reimplementation.bench.peers import PEERS, versions
from reimplementation.bench.results import Document, Result


@dataclass(frozen=True)
class Choice:
    """What a run is to time; a case, backend and pass that do not belong together are left out.

    cases: names in `cases.CASES`.
    dtypes: names in `cases.DTYPES`.
    backends: names of backends, of peers, and "floor".
    passes: some of `cases.PASSES`.
    """

    cases: Sequence[str]
    dtypes: Sequence[str]
    backends: Sequence[str]
    passes: Sequence[str] = PASSES

    def __len__(self) -> int:
        """How many figures that makes."""
        return len(self.dtypes) * sum(len(self._pairs(case)) for case in self.cases)

    def __iter__(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Each case and dtype, with its backends and passes."""
        for case in self.cases:
            if pairs := self._pairs(case):
                yield from ((case, dtype, pairs) for dtype in self.dtypes)

    def _pairs(self, case: str) -> list[tuple[str, str]]:
        return [(b, p) for b in self.backends for p in CASES[case].passes(b) if p in self.passes]


def measure_all(
    choice: Choice,
    device: torch.device,
    repeats: int,
    *,
    begins: Callable[[str], None],
    fails: Callable[[str], None],
) -> Document:
    """Time all that was chosen; what fails is left out.

    Args:
        choice: what to time.
        device: where.
        repeats: timed runs of each.
        begins: is told of each figure before its work begins, in words.
        fails: is told of each figure that could not be had, and why.

    Raises:
        RuntimeError: nothing could be timed.
    """
    figures = []
    for case, dtype, pairs in choice:
        prepared = None
        for backend, passed in pairs:
            what = f"{case} {dtype} {backend} {passed}"
            begins(what)
            try:
                prepared = prepared or CASES[case].prepare(DTYPES[dtype], device)
                found = prepared.measure(backend, passed, repeats)
            except RuntimeError as error:  # too little memory, say
                fails(f"{what} failed: {error}")
                continue
            if found is not None:
                figures.append(Result(case, str(device), backend, dtype, passed, **vars(found)))
    if not figures:
        raise RuntimeError("nothing was timed: no case has such a pass on such a backend, or all of them failed")
    packages = versions({r.backend for r in figures} & PEERS.keys())
    return results.describe(device, figures, copy_bandwidth(device, repeats), packages)
