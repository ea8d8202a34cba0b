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


# Short rows of many questions first; then prose with ever fewer facts among it, ever longer.
CURRICULUM: tuple[Stage, ...] = (
    Stage(300, Mix(length=256, rows=32, pairs=0.125, dense=0.25, facts=(2, 24)), scale=(1.0, 1.0)),
    Stage(1200, Mix(length=1024, rows=8, pairs=0.125, dense=0.125, facts=(1, 64)), scale=(1.0, 1.0)),
    Stage(2000, Mix(length=2048, rows=4, pairs=0.0, dense=0.0, facts=(1, 64)), scale=(1.0, 0.5)),
    Stage(700, Mix(length=8192, rows=1, pairs=0.0, dense=0.0, facts=(4, 64)), scale=(0.5, 0.0)),
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
