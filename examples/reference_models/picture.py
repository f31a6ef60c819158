"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from graphopt.training import Record


def draw_losses(record: Record, path: Path, title: str, lines: dict[str, float]) -> None:
    """Draw training and validation loss over steps, and levels to compare with as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=100)
    mean, smooth = record.losses[0], []
    for value in record.losses:
        mean = 0.95 * mean + 0.05 * value
        smooth.append(mean)
    steps = range(1, len(smooth) + 1)
    axes.plot(steps, record.losses, color="#c8d4e3", linewidth=0.6)
    axes.plot(steps, smooth, color="#27598c", label="training, running mean")
    names = sorted({name for _, values in record.measured for name in values if "loss" in name})
    for name in names:
        points = [(step, values[name]) for step, values in record.measured if name in values]
        axes.plot(*zip(*points, strict=True), color="#c2571a", marker="o", markersize=3, label=name)
    for label, level in lines.items():
        axes.axhline(level, color="#777777", linestyle="--", linewidth=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
