"""The contract of a variant: all that a file in `train/variants/` may define, and what it must hold to.

A variant is one file. Its name is the id that runs store and `--variant` takes; nothing else is edited, and the
battery (`tests/train/variants/`) finds it by itself. It defines `Config`, a frozen dataclass that extends
`Variant` below, or a class of the kit that does: `SingleLayer` (one layer in, the same layer out) or
`Wrapping` (a base inside, chosen by name). Fields are the settings. Each has a default and a JSON form (numbers,
strings, booleans, None, tuples, records of them); `layer`, `width`, `k`, `target_l0`, `seed` and `optim` mean
the same in every variant. The command line has options for `layer`, `width`, `k`, `seed` and `optim.lr`; all else is
`--set`. A name that ends in `_fraction`, `_from` or `_until` is a share of the run, one in `_weight`, `_weights` or
`penalty` is never negative, one in `_decay` is less than 1: `require_bounds` sees to it.

`build` returns an `Assembly` of parts that know nothing of each other:
- `sae`: a `SparseAutoencoder` owns W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] and a gate. A new way to
  choose active latents is a `Gate` (`choose` where a training batch may be active, `open` the values there,
  `infer` the dense activations of the saved SAE). `choose` gives a `Support`, by `support_from_topk` where a row has k
  latents, or None, and `open` is given all pre-activations; it reads no value on the host, as `nonzero` does, or a GPU
  is waited for. An SAE with a gate of one's own opens with `load_sae`, by its variant's file, and in no other tool.
  Where that is not enough a subclass overrides `codes` and `encode`; it sets `is_plain = False` where the plain weights
  and gate do not compute its `encode`, and `needs_side` where `encode` reads side inputs. A subclass cannot be
  wrapped: wrappers refuse it.
- `terms`: losses, each a function of a `View` with a schedule as its weight. A term changes nothing and leaves
  nothing for other terms; what two terms share is a function marked `@once`.
- `constraints`: what is done to gradients before, and to weights after, the optimiser's step.
- `knobs`: schedules of values that are not loss weights (p, temperature). Gates and terms read them by name.
- `extras`: modules (`Extra`) that train along without being needed for activations: who is told of each
  step (`observe`), how fast they learn (`lr_scale`), which latents they retire (`retired_latents`).

Where training begins is the engine's (`engine/first_weights_from_data.py`): it lowers pre-activations on the first
batch, through `lower` and `rescale` of the SAE and its gate. A gate or SAE with offsets of its own moves them along
there. Where codes have signs, lowering means nothing, and the gate says so (`can_lower`).

What must hold:
1. Random numbers come from `assembly.generator` alone, seeded by `seed`: an SAE trains to the same bits alone,
   beside others, and after a resume.
2. Everything that training changes is a parameter or a buffer of `sae` or of an extra, so checkpoints hold it.
3. A gradient reaches every parameter within a few steps (not of a baseline).
4. The (row, latent) pairs of a `Support` are distinct, in order of rows: sparse sums add them unchecked.
5. `sae.encode` agrees with what was trained, for any number of rows, and reads only what `needs` asked for.
6. What depends on the whole batch (a batch's top k, a mean, a count) goes through `view.side.ranks`. A term that may
   see some of the latents only says so by `@split`, and asks `view.side.latents` for what is of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from ...cache_schema import Manifest
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly


class Variant(ABC):
    """What `Config` offers. `needs` and `build` must be defined; everything else has a default."""

    is_baseline: ClassVar[bool] = False
    """It is there to be compared with, and may leave weights as they are or learn without a gradient."""

    width: int
    """Latents of the dictionary."""

    @abstractmethod
    def needs(self) -> Needs:
        """What is read of the store: layers, targets, positions, windows, attention. Refuses settings that
        contradict each other (`require`). Called without a store, also with all settings at their defaults."""

    @abstractmethod
    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        """The SAE and all that its training takes.

        `stats` are those of the input's layers, in the order of `needs().inputs`; None means scaled and centred
        already (tests, and loading a saved SAE, whose weights are replaced afterwards). With `needs().targets`
        the targets' statistics come as a third argument.
        """

    def check(self, manifest: Manifest) -> None:  # noqa: B027
        """Refuse a store that cannot serve (`require`), before anything is built. Layers are checked already."""

    def unread(self) -> Mapping[str, str]:
        """Settings (`k`, `optim.lr`) that say nothing beside the others, and what to do: who asks for another value
        than their default is refused."""
        return {}

    def fill(self, manifest: Manifest) -> Self:
        """The same with settings that only the store can answer, such as the length of its windows."""
        return self

    def step_tables(self) -> float:
        """Tables [B, F] in float32 that a step holds at its peak, for the check that a run fits into memory.

        The default was measured where activations are sparse: pre-activations in bfloat16 and in float32. A
        variant with dense activations, if only in its first steps, says how many it holds.
        """
        return 1.5

    def layers_read(self) -> int:
        """How many layers one latent reads, for the same check."""
        return len(self.needs().inputs)

    def dead_part(self) -> int:
        """A latent that did not fire for this part of the budget counts as dead, at the latest."""
        return 10

    def limits(self, manifest: Manifest, tokens: int) -> Mapping[str, float]:
        """Upper bounds for settings that were not chosen: papers' defaults are for larger models and longer runs."""
        width = self.input_width(manifest)
        active = most_active(width)
        return {
            "width": 16 * width,
            "k": active,
            "target_l0": active,
            "dead_after_tokens": max(1, tokens // self.dead_part()),
        }

    def input_width(self, manifest: Manifest) -> int:
        """Of what it reads of a layer; the residual's where the store lacks the hook, which is told elsewhere."""
        hook = self.needs().hook
        return manifest.width_of(hook) if hook in manifest.hooks else manifest.model.d_model


def most_active(d_model: int) -> int:
    """The most active latents that a default asks for."""
    return max(1, d_model // 4)
