"""Files of results: what belongs to one machine is read as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reimplementation.bench import results
from tests.bench.figures import document, result


def test_files_of_one_machine_are_merged(tmp_path):
    first = document(result(us=1), result(passed="backward", us=2))
    second = document(result(us=3), result(dtype="float16", us=4))
    other = document(result(us=5), device="another")
    paths = []
    for i, each in enumerate((first, replace(second, date="2026-01-01"), other)):
        paths.append(tmp_path / f"{i}.json")
        each.write(paths[-1])
    merged, alone = results.read(paths)
    assert [r.timing.median_us for r in merged.results] == [3, 2, 4]
    assert merged.date == "2026-01-01, 2026-01-02"
    assert alone == other


def test_a_peer_in_one_file_alone_does_not_part_them(tmp_path):
    """But two versions of it do."""
    paths, versions = [], {"torch": "2.11", "cuda": "13.0"}
    for peers in ({}, {"deformops": "3.0.1"}, {"deformops": "3.1"}):
        paths.append(tmp_path / f"{len(paths)}.json")
        replace(document(result()), versions=versions | peers).write(paths[-1])
    assert [found.versions for found in results.read(paths[:2])] == [versions | {"deformops": "3.0.1"}]
    assert len(results.read(paths)) == 2


@pytest.mark.parametrize(("device", "documents"), [("NVIDIA H200", 1), ("a", 2)], ids=["GPU", "CPU"])
def test_threads_of_the_host_tell_cpus_apart(tmp_path, device, documents):
    paths = [tmp_path / "2.json", tmp_path / "16.json"]
    for path, case in zip(paths, ("rig-bs1", "rig-bs6")):
        both = result("module-bs1", us=1, passed=path.stem), result(case, us=2)
        document(*both, device=device, threads=int(path.stem)).write(path)
    read = results.read(paths)
    assert len(read) == documents
    cases = [r.case for r in read[0].results]
    assert cases == sorted(cases, key=cases.index) and len(cases) == 4 / documents  # the parts of a case lie together
