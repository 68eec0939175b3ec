"""The picture of `day.py`: goodput over a day, replanned and not."""

from pathlib import Path
from typing import Any

STYLES = {"static": ("#c06a2b", "yesterday's plan, kept"), "replanned": ("#3b6ea5", "replanned")}


def draw(data: dict[str, Any], path: Path) -> None:
    """Requests/s that came, and those served within targets; a line where the placement changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    hours = range(len(data["static"]["hours"]))
    offered = [one["offered_rps"] for one in data["static"]["hours"]]
    axes.step(hours, offered, where="post", color="0.6", label="asked for")
    for name, (color, label) in STYLES.items():
        goodput = [one["goodput_rps"] for one in data[name]["hours"]]
        axes.step(hours, goodput, where="post", color=color, label=label, linewidth=2)
    changed = [one["hour"] for one in data["replanned"]["decisions"] if one.get("is_worth")]
    for number, hour in enumerate(changed):
        label = "placement changed" if number == 0 else None
        axes.axvline(hour, color=STYLES["replanned"][0], alpha=0.4, linestyle=":", label=label)
    axes.set_xlabel(f"hour of the day ({data['hour_s']:g} s each)")
    axes.set_ylabel("requests/s within targets")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=130)
