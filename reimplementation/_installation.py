"""Says where the kernels are when the package that Python found has none."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def hidden_installation(package: Path) -> str | None:
    """A sentence where ``package`` hides an installed copy whose extension is built; None where it hides none.

    Python looks into the current folder first. In the project's own folder it finds the sources there, which
    ``pip install .`` leaves without an extension.

    Args:
        package: the folder of the package that was imported.
    """
    package = package.resolve()
    if not (package / "ops" / "csrc").is_dir():  # an installed package, which comes without the kernels' sources
        return None
    for distribution in metadata.distributions(name=package.name):
        installed = Path(str(distribution.locate_file(package.name))).resolve()
        if installed != package and (installed / "_C.abi3.so").exists():
            return (
                f"this is the source folder {package.parent}, which hides the package installed in {installed.parent}: "
                "run from another folder, or build the kernels in this one with "
                "pip install --editable ."
            )
    return None
