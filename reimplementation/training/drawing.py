"""The picture of an evaluation: precision over recall, a panel a class."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .evaluate import RECALLS, DetectionMetrics

COLUMNS = 5


def draw_curves(path: Path, metrics: DetectionMetrics) -> None:
    """Draw every class's curves, one a distance threshold; the format follows the file's suffix."""
    names = list(metrics.curves)
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.8 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    figure.suptitle(f"mAP {metrics.mean_average_precision:.3f}, NDS {metrics.nd_score:.3f}")
    for panel, name in zip(panels, names):
        for distance, curve in metrics.curves[name].items():
            panel.plot(RECALLS, curve.precision, label=f"{distance:g} m: {curve.average_precision:.2f}", linewidth=1.4)
        panel.set(title=name.replace("_", " "), xlim=(0, 1), ylim=(0, 1.02))
        panel.legend(title="AP", fontsize="small")
        panel.grid(alpha=0.3)
    figure.supxlabel("recall")
    figure.supylabel("precision")
    figure.savefig(path, dpi=120)
