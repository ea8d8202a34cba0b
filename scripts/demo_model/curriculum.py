"""The fixed course of training: what each step's rows hold and how large its update is."""

from dataclasses import dataclass

from scripts.demo_model.rows import Mix

WARMUP_STEPS = 100


@dataclass(frozen=True)
class Stage:
    """A stretch of steps over one mix of rows."""

    steps: int
    mix: Mix
    scale: tuple[float, float]  # of the learning rates, at the stage's start and end


# Short rows of many questions first, then longer ones, then prose with facts in it only. Nearly half of all tokens
# are seen in rows longer than the demo's prompt of 10,443. A model that knows short rows only predicts prose the
# worse the more of it stands before; by such a model nobody can tell what it costs to show less.
PROSE = Mix(length=1024, rows=8, pairs=0.0, dense=0.0, facts=(1, 64))
LONG = Mix(length=12_288, rows=1, pairs=0.0, dense=0.0, facts=(1, 64))
CURRICULUM: tuple[Stage, ...] = (
    Stage(300, Mix(length=256, rows=32, pairs=0.125, dense=0.25, facts=(2, 24)), scale=(1.0, 1.0)),
    Stage(500, Mix(length=1024, rows=8, pairs=0.125, dense=0.125, facts=(1, 64)), scale=(1.0, 1.0)),
    Stage(100, PROSE, scale=(1.0, 2 / 3)),
    Stage(500, LONG, scale=(2 / 3, 0.02)),
)
TOTAL_STEPS = sum(stage.steps for stage in CURRICULUM)


def at_step(step: int) -> tuple[Mix, float]:
    """The mix and the learning rates' scale of a step, from 0.

    Raises:
        ValueError: the step is past the curriculum's end.
    """
    begun = 0
    for stage in CURRICULUM:
        if step < begun + stage.steps:
            start, end = stage.scale
            scale = start + (end - start) * (step - begun) / stage.steps
            return stage.mix, scale * min(1.0, (step + 1) / WARMUP_STEPS)
        begun += stage.steps
    raise ValueError(f"step {step} is past the curriculum's end")
