"""Checks and defaults that the variants share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

from ...cache_schema.sites import HOOKS
from ...cache_schema.strict_json import nearest
from ..data.scaling import Stats, unit_stats
from ..engine.adam import Optim
from ..errors import ConfigInvalid

EARLY_DEAD_PART = 30
"""`dead_part` of variants that revive dead latents: fewer stay dead than with 10, and in the top-k family
reconstruction is no worse. With 100, half of a matryoshka dictionary died (`bench/quality.py`)."""

MOST_SEED = 2**40
"""Generators take up to 2**64; some seeds are offset above those of weights (`ENCODER_SEEDS`, `SCATTER_SEEDS`)."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigInvalid with this message unless the condition holds."""
    if not condition:
        raise ConfigInvalid(message)


def require_least(config: Any, **least: float) -> None:
    """Refuse settings below the given bounds; None is allowed."""
    for name, bound in least.items():
        value = getattr(config, name)  # `>=`, so that NaN is refused too
        require(value is None or value >= bound, f"{name}: expected {bound} or more, found {value}")


def require_positive(config: Any, *names: str, most: float = math.inf) -> None:
    """Refuse settings that are not above 0, or are above `most`; None is allowed."""
    bound = "" if most == math.inf else f" and at most {most:g}"
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 < value <= most, f"{name}: expected more than 0{bound}, found {value}")


def require_bounds(config: Any) -> None:
    """Refuse impossible shares of the run, weights and decays, recognised by the ends of their names.

    They would not fail on their own: a penalty that rises over 2000 runs just never comes in. Only new requests are
    checked, so that older runs and SAEs still work.
    """
    for name in (field.name for field in fields(config)):
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if not isinstance(value, int | float):
                continue
            if name.endswith(("_fraction", "_from", "_until")) and not name.startswith("half_life"):
                require(0 <= value <= 1, f"{name}: expected a share of the run from 0 to 1, found {value}")
            elif name.endswith(("_weight", "_weights", "penalty")):
                require(value >= 0, f"{name}: expected 0 or more, found {value}")
            elif name == "seed":
                require(0 <= value < MOST_SEED, f"seed: expected a number from 0 to below 2**40, found {value}")
            elif name.endswith("_decay"):
                require(0 <= value < 1, f"{name}: expected 0 or more and less than 1, found {value}")


def unread_unless(switch: str, is_on: bool, *names: str) -> dict[str, str]:
    """For `unread`: settings that have no effect unless the switch is on, and what to do about them."""
    return {} if is_on else dict.fromkeys(names, f"only {switch} reads it; set that too, or leave it out")


def unread_where_dense(switches: Mapping[str, bool]) -> dict[str, str]:
    """For `unread`, if settings make the encoder one that is float32 throughout: the precision of its products."""
    on = ", ".join(name for name, is_on in switches.items() if is_on)
    return {"encoder_product": f"with {on} the encoder's products are in float32; leave it out"} if on else {}


def require_hook(hook: str | None, setting: str = "hook") -> None:
    require(hook is None or hook in HOOKS, f"{setting}: unknown hook {hook!r}{nearest(str(hook), HOOKS)}")


def require_layers(layers: tuple[int, ...], rising: bool) -> None:
    is_distinct = len(set(layers)) == len(layers) > 0
    require(is_distinct, f"layers: expected one or more distinct layers, found {layers}")
    require(not rising or list(layers) == sorted(layers), f"layers: expected rising layers, found {layers}")


def require_width(width: int) -> None:
    require(width >= 1, f"width: expected 1 or more, found {width}")


def require_sparsity(k: float, width: int, setting: str = "k") -> None:
    require_width(width)
    require(
        0 < k <= width,
        f"{setting}: expected more than 0 and at most width = {width}, found {k}: set another {setting} or --width",
    )


def require_some_latents(name: str, share: float, number: int, width: int) -> None:
    """Refuse a share of a dictionary that is less than one latent, and so would do nothing."""
    require(number >= 1, f"{name}: expected a share of the {width} latents that is at least one, found {share}")


def ends_of(name: str, fractions: tuple[float, ...], width: int) -> tuple[int, ...]:
    """Where each part of a dictionary ends, from shares of the width; `name` is their setting, for messages."""
    ends = tuple(round(max(0.0, min(fraction, 2.0)) * width) for fraction in fractions)  # 1e308 * width would overflow
    require(
        is_rising(fractions) and ends[-1:] == (width,),
        f"{name}: expected rising shares of the dictionary, the last 1, found {fractions}",
    )
    require(
        is_rising(ends),
        f"{name}: --width {width} is too small for the shares {fractions}: use a larger one, or fewer shares",
    )
    return ends


def is_rising(numbers: tuple[float, ...]) -> bool:
    """Whether the first is above 0, and each is above the previous one."""
    return all(low < high for low, high in pairwise((0, *numbers)))


def write_hook(hook: str, to_hook: str | None) -> str:
    """The hook that a transcoder writes to: as given; otherwise mlp_out for mlp_in, or the same hook."""
    require_hook(hook)
    require_hook(to_hook, "to_hook")
    return to_hook or ("mlp_out" if hook == "mlp_in" else hook)


def scaled_lr(lr_at_16k: float, width: int, d_model: int) -> float:
    """lr / sqrt(F / 2^14), the published scaling of top-k SAEs, for a residual as wide as Gemma-2-2B's.

    Adam turns a unit decoder row of D entries by about lr * sqrt(D) per step, so a narrower residual
    needs a larger rate to turn it as far.
    """
    require_width(width)
    return lr_at_16k / (width / 2**14) ** 0.5 * (2304 / d_model) ** 0.5


def fill_optim(optim: Optim, **own: float) -> Optim:
    """The settings, with the variant's own values where none was given."""
    return replace(optim, **{name: value for name, value in own.items() if getattr(optim, name) is None})


def topk_optim(optim: Optim, width: int, d_model: int) -> Optim:
    """The settings, with the values of the top-k family where none was given.

    The rate at 2^14 latents is twice the published one: better at every k and width tried (`bench/quality.py`),
    at the price of a few dead latents where the dictionary is wide and k small.
    """
    return fill_optim(optim, lr=scaled_lr(4e-4, width, d_model), epsilon=6.25e-10)


def relu_optim(optim: Optim, width: int, d_model: int, **own: float) -> Optim:
    """The settings, with the values of variants with dense activations where none was given."""
    return fill_optim(optim, lr=scaled_lr(5e-4, width, d_model), **own)


def stats_or_unit(stats: Stats | None, width: int) -> Stats:
    """The given statistics, or those of activations that are already scaled and centred."""
    if stats is None:
        return unit_stats(width)
    require(stats.width == width, f"statistics: expected width {width}, found {stats.width}")
    return stats
