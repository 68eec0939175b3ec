"""In which order models get their decode steps while nothing else happens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rotation:
    """Who is asked for a decode step: the first model that has one for the lane takes it."""

    models: tuple[str, ...]  # in the order in which they are asked next
    turns: bool = True  # the model that had a step is asked last from then on
