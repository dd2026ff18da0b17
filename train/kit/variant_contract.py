"""The contract of a variant: everything that a file in `train/variants/` may define, and the rules it must follow.

A variant is one file. Its name is the id that runs store and `--variant` takes; no other file is edited, and the test
battery (`tests/train/variants/`) finds it. It defines `Config`, a frozen dataclass that extends
`Variant` below, or a class of the kit that does: `SingleLayer` (one layer in, the same layer out) or
`Wrapping` (a base inside, chosen by name). Fields are the settings. Each has a default and a JSON form (numbers,
strings, booleans, None, tuples, records of them); `layer`, `width`, `k`, `target_l0`, `seed` and `optim` mean
the same in every variant. The command line has options for `layer`, `width`, `k`, `seed` and `optim.lr`; the rest is
`--set`. `require_bounds` ensures that a setting whose name ends in `_fraction`, `_from` or `_until` is a share of the
run, that one in `_weight`, `_weights` or `penalty` is not negative, and that one in `_decay` is less than 1.

`build` returns an `Assembly` of parts that know nothing about each other:
- `sae`: a `SparseAutoencoder` owns W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] and a gate. A new way to
  choose active latents is a `Gate` (`choose`: where a training batch may be active; `open`: the values there;
  `infer`: the dense activations of the saved SAE). `choose` gives a `Support`, by `support_from_topk` where a row has k
  latents, or None, in which case `open` gets all pre-activations. It must not read values on the host, as `nonzero`
  does, since that waits for the GPU. A gate that extends one of `gates.py` and keeps its `infer` is saved as
  that one; an SAE with another gate opens only with `load_sae`, through its variant's file.
  Where that is not enough, a subclass overrides `codes` and `encode`; it sets `is_plain = False` if the plain weights
  and gate do not compute its `encode`, and `needs_side` if `encode` reads side inputs. Its input is `centred`, and
  what that subtracts has a gradient only if it is `trained_center`. A subclass cannot be
  wrapped: wrappers refuse it.
- `terms`: losses, each a function of a `View` with a schedule as its weight. A term changes nothing and leaves
  nothing for other terms; what two terms share is a function marked `@once`.
- `constraints`: applied to gradients before the optimiser's step, and to weights after it.
- `knobs`: schedules of values that are not loss weights (p, temperature). Gates and terms read them by name.
- `extras`: modules (`Extra`) that train along but are not needed for activations. They see each step (`observe`), and
  set how fast they are trained (`lr_scale`) and which latents they retire (`retired_latents`).

The engine fits the first weights to the data (`engine/first_weights_from_data.py`): on the first batch it lowers
pre-activations, through `lower` and `rescale` of the SAE and its gate. A gate or SAE with offsets of its own adjusts
them there. Lowering is meaningless for signed codes, whose gate sets `can_lower = False`.

Rules:
1. Random numbers come only from `assembly.generator`, seeded by `seed`, so that an SAE trains to the same bits alone,
   with others, and after a resume. A term draws by `view.draw`, or a GPU launches its steps kernel by kernel; so it
   does for an SAE with an extra that is not `is_recordable`.
2. Everything that training changes is a parameter or a buffer of `sae` or of an extra, so that checkpoints hold it.
3. A gradient reaches every parameter within a few steps (except in a baseline).
4. The (row, latent) pairs of a `Support` are distinct and ordered by row: sparse sums add them unchecked.
5. `sae.encode` agrees with what was trained, for any number of rows, and reads only what `needs` requested.
6. What depends on the whole batch (a batch's top k, a mean, a count) goes through `view.side.ranks`. A term that can
   work on part of the latents is marked `@split`, and gets totals over all of them from `view.side.latents`.
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
    """The base of every `Config`. `needs` and `build` must be defined; everything else has a default."""

    is_baseline: ClassVar[bool] = False
    """Whether it exists only for comparison; it may leave weights unchanged, or change them without a gradient."""

    width: int
    """Latents of the dictionary."""

    @abstractmethod
    def needs(self) -> Needs:
        """What to read from the store: layers, targets, positions, windows, attention. Refuses settings that
        contradict each other (`require`). Called without a store, also with all settings at their defaults."""

    @abstractmethod
    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        """The SAE and everything needed to train it.

        `stats` are those of the input layers, in the order of `needs().inputs`; None means already scaled and
        centred (tests, and loading a saved SAE, whose weights are replaced afterwards). With `needs().targets`
        the targets' statistics are a third argument.
        """

    def check(self, manifest: Manifest) -> None:  # noqa: B027
        """Refuse an unsuitable store (`require`), before anything is built. Layers are already checked."""

    def unread(self) -> Mapping[str, str]:
        """Settings (`k`, `optim.lr`) that have no effect given the others, and what to do about them. Values other than
        the default are refused."""
        return {}

    def fill(self, manifest: Manifest) -> Self:
        """A copy with the settings that depend on the store, such as the length of its windows."""
        return self

    def step_tables(self) -> float:
        """Tables [B, F] in float32 that a step holds at its peak, for the check that a run fits into memory.

        The default was measured with sparse activations: pre-activations in bfloat16 and in float32. A
        variant with dense activations, even if only in its first steps, returns its own number.
        """
        return 1.5

    def layers_read(self) -> int:
        """How many layers one latent reads, for the same check."""
        return len(self.needs().inputs)

    def dead_part(self) -> int:
        """n: a latent that has not fired for 1/n of the budget counts as dead, at the latest."""
        return 10

    def limits(self, manifest: Manifest, tokens: int) -> Mapping[str, float]:
        """Upper bounds for settings left at their defaults: those of papers suit larger models and longer runs."""
        width = self.input_width(manifest)
        active = most_active(width)
        return {
            "width": 16 * width,
            "k": active,
            "target_l0": active,
            "dead_after_tokens": max(1, tokens // self.dead_part()),
        }

    def input_width(self, manifest: Manifest) -> int:
        """Width of the hook that it reads; the residual's if the store lacks that hook (reported elsewhere)."""
        hook = self.needs().hook
        return manifest.width_of(hook) if hook in manifest.hooks else manifest.model.d_model


def most_active(d_model: int) -> int:
    """The largest default number of active latents."""
    return max(1, d_model // 4)
