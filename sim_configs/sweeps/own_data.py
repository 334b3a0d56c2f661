"""Own data for the sweep beside this file: replace this function by one that reads your files."""

import numpy as np


def load(people: int = 200, examples: int = 12, difference: float = 0.0) -> dict[str, np.ndarray]:
    """Return windows of movement, each with its activity: standing, walking or running.

    Args:
        people: Number of people, each of whom holds some examples.
        examples: Mean number of examples of a person.
        difference: Spread between people: in the place of the phone on the body, and in their activities.
    """
    rng = np.random.default_rng(0)
    who = np.sort(rng.integers(0, people, people * examples))
    habits = rng.normal(size=(people, 3)) * difference
    labels = (habits[who] + rng.gumbel(size=(len(who), 3))).argmax(axis=1)
    worn = 1.0 + 0.5 * difference * rng.uniform(-1.0, 1.0, size=people)
    steps = np.array([0.0, 2.0, 3.0])[labels, None] * np.linspace(0.0, 2.0 * np.pi, 16)
    strength = np.array([0.1, 0.6, 1.2])[labels] * worn[who]
    windows = strength[:, None] * np.sin(steps + rng.uniform(0.0, 2.0 * np.pi, size=(len(who), 1)))
    inputs = np.concatenate([windows, np.abs(windows)], axis=1) + rng.normal(0.0, 0.3, size=(len(who), 32))
    held = rng.random(len(who)) < 0.2
    return {
        "inputs": inputs[~held],
        "labels": labels[~held],
        "client_ids": who[~held],
        "clients": np.arange(people),
        "test_inputs": inputs[held],
        "test_labels": labels[held],
    }
