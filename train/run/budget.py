"""How many steps a run takes: the budget against what the store has."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.run_config import CourseConfig
from ..data.read_order import Plan
from ..errors import NothingToTrain, StoreTooShort

DEFAULT_TOKENS = 8_000_000  # if no epochs are given, a smaller store is read several times
MOST_EPOCHS = 16


@dataclass(frozen=True)
class Budget:
    """The length of a run."""

    steps: int
    tokens: int
    epochs: float
    remark: str  # how it came about


def settle_budget(course: CourseConfig, plan: Plan, where: str) -> Budget:
    """Steps from tokens, epochs or neither; an error where the store cannot give them."""
    available = plan.steps_in(1)
    _require_steps(available, plan, where)
    if course.tokens is None:
        epochs = course.epochs or default_epochs(available * plan.batch_tokens)
        said = "" if course.epochs else "no --tokens or --epochs given: "
        return _budget(plan.steps_in(epochs), plan, said)
    epochs = course.epochs or 1
    steps = course.tokens // plan.batch_tokens
    if steps == 0:
        raise NothingToTrain(
            f"a budget of {course.tokens} tokens is less than one batch of {plan.batch_tokens}: nothing to train"
        )
    if course.tokens > plan.sizes.tokens * epochs:
        needed = -(-course.tokens // (available * plan.batch_tokens))
        raise StoreTooShort(
            f"a budget of {course.tokens:,} tokens, but the train split of {where} has {plan.sizes.tokens:,} "
            f"in an epoch{f', {plan.sizes.tokens * epochs:,} in {epochs}' if epochs > 1 else ''}: "
            f"give --epochs {needed} to read it again, or fewer --tokens"
        )
    return _budget(min(steps, plan.steps_in(epochs)), plan, "")


def default_epochs(epoch_tokens: int) -> int:
    """Small stores are read several times."""
    return max(1, min(MOST_EPOCHS, -(-DEFAULT_TOKENS // epoch_tokens)))


def _budget(steps: int, plan: Plan, said: str) -> Budget:
    tokens = steps * plan.batch_tokens
    epochs = tokens / plan.sizes.tokens
    return Budget(steps, tokens, epochs, f"{said}{tokens:,} tokens, {epochs:.2g} epochs of {plan.sizes.tokens:,}")


def _require_steps(available: int, plan: Plan, where: str) -> None:
    sizes = plan.sizes
    if sizes.windows == 0 or sizes.tokens == 0:
        raise NothingToTrain(
            f"the train split of {where} has {sizes.windows} windows with {sizes.tokens} tokens that may train: "
            "nothing to train. Harvest more text, or look at its splits with `sae-store info`"
        )
    if available == 0:
        raise NothingToTrain(
            f"the train split of {where} has {sizes.tokens} tokens, less than one batch of {plan.batch_tokens} "
            f"in a block: nothing to train. Set a smaller data.batch_tokens"
        )
