"""Learning which latents to swap (MDBM), and swapping them, all SAEs on the same pairs; the model runs once for all.

The base's codes are mixed with the source's: (1 - m) f_base + m f_source, m = sigmoid(mask / T). T falls on a log
scale from 1 to 1e-4, so that soft mixing hardens into a choice; afterwards latents with a positive mask are swapped.
The decoded mixture replaces the residual: the SAE's error is not added back.

W pairs of a batch, T tokens, D width, F latents, V vocabulary. Bases are padded on the left, so that all answers come
at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...context.loaded_sae import LoadedSae, layers_of
from ...context.prompt_positions import Reader, Reading, Spot
from ...errors import NotApplicable
from ...model.batches import make_rows
from ...model.prefix_suffix import LanguageModel
from .prompts_and_pairs import Pair, Prompt


def temperatures(steps: int, dtype: torch.dtype) -> list[float]:
    """One for each step, from 1 to 1e-4; rounded to the model's dtype, as in SAEBench."""
    return torch.logspace(0, -4, steps, dtype=dtype).tolist()


def mixed(base_BF: Tensor, source_BF: Tensor, share_F: Tensor) -> Tensor:
    return (1 - share_F) * base_BF + share_F * source_BF


class LatentMask:
    """The mask of one SAE and one attribute, while it is learned and afterwards."""

    def __init__(self, width: int, lr: float, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(width, device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.values], lr=lr)

    def step(
        self,
        base_BF: Tensor,
        source_BF: Tensor,
        targets_B: Tensor,
        temperature: float,
        predict: Callable[[Tensor], Tensor],
    ) -> None:
        """One step on a batch: codes at the entities, and the token that each pair should produce. `predict` maps mixed
        codes [B, F] to logits [B, V]."""
        with torch.enable_grad():
            share_F = torch.sigmoid(self.values / temperature)
            logits_BV = predict(mixed(base_BF, source_BF, share_F))
            loss = functional.cross_entropy(logits_BV.float(), targets_B)
            self._optimizer.zero_grad()
            loss.backward()
        self._optimizer.step()

    def chosen(self) -> Tensor:
        """float [F], 1 for latents that are swapped."""
        return (self.values.detach() > 0).to(self.values.dtype)


Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class PairBatch:
    pairs: Sequence[Pair]
    tokens: Tensor  # int64 [W, T], the bases
    valid: Tensor  # bool [W, T]
    places: Tensor  # int64 [W], the entity's last token in the base
    bases: Tensor  # int64 [W], numbers of the prompts in the reading
    sources: Tensor
    targets: Tensor

    def replaced(self, resid_WTD: Tensor, x_hat_WD: Tensor) -> Tensor:
        """The residual with another vector at each entity."""
        changed = resid_WTD.clone()
        changed[torch.arange(len(changed), device=changed.device), self.places] = x_hat_WD.to(changed.dtype)
        return changed


class Swapper:
    """Swaps latents between prompts, which are read once for all SAEs."""

    def __init__(self, reader: Reader, prompts: Sequence[Prompt], advance: Advance) -> None:
        self.model: LanguageModel = reader.model
        self.subjects = reader.subjects
        self._numbers = {prompt: number for number, prompt in enumerate(prompts)}
        spots = [Spot(prompt.tokens, prompt.entity_position) for prompt in prompts]
        self._reading: Reading = reader.read(spots, advance)

    def learn(
        self, pairs: Sequence[Pair], epochs: int, lr: float, batch_size: int, advance: Advance
    ) -> dict[LoadedSae, Tensor]:
        """For each SAE the latents to swap: float [F], 0 or 1."""
        batches = list(self.batches(pairs, batch_size))
        masks = {subject: LatentMask(subject.width, lr, self.model.device) for subject in self.subjects}
        schedule = iter(temperatures(epochs * len(batches), self.model.dtype))
        for _ in range(epochs):
            for batch in batches:
                self._step(batch, masks, next(schedule))
                advance(len(batch.pairs))
        return {subject: mask.chosen() for subject, mask in masks.items()}

    def completions(
        self, pairs: Sequence[Pair], chosen: Mapping[LoadedSae, Tensor], count: int, batch_size: int, advance: Advance
    ) -> tuple[list[Pair], dict[LoadedSae, list[str]]]:
        """The pairs that fill batches, and the model's answer to each when an SAE's latents are swapped."""
        judged: list[Pair] = []
        answers: dict[LoadedSae, list[str]] = {subject: [] for subject in self.subjects}
        for batch in self.batches(pairs, batch_size):
            judged += batch.pairs
            for subject, share_F in chosen.items():
                answers[subject] += self._answers(batch, subject, share_F, count)
            advance(len(batch.pairs))
        return judged, answers

    def batches(self, pairs: Sequence[Pair], size: int) -> Iterator[PairBatch]:
        """Whole batches only: pairs that do not fill one are left out, as in SAEBench."""
        if len(pairs) < size:
            raise NotApplicable(
                f"RAVEL: {len(pairs)} pairs of prompts that the model answers do not fill one batch of {size}: use a "
                "larger model, which answers more, or a smaller batch with --set ravel.llm_batch_size=N"
            )
        for start in range(0, len(pairs) - size + 1, size):
            yield self._batch(pairs[start : start + size])

    def _batch(self, pairs: Sequence[Pair]) -> PairBatch:
        device = self.model.device
        rows = [pair.base.tokens for pair in pairs]
        tokens, valid = make_rows(self.model, rows, max(map(len, rows)), "left")
        places = [tokens.shape[1] + pair.base.entity_position for pair in pairs]
        bases = [self._numbers[pair.base] for pair in pairs]
        sources = [self._numbers[pair.source] for pair in pairs]
        targets = [pair.target_token for pair in pairs]
        numbers = (torch.tensor(each, device=device) for each in (places, bases, sources, targets))
        return PairBatch(pairs, tokens.to(device), valid.to(device), *numbers)

    def _step(self, batch: PairBatch, masks: Mapping[LoadedSae, LatentMask], temperature: float) -> None:
        resid = self.model.resid(batch.tokens, layers_of(self.subjects), batch.valid)
        resid = {layer: each.clone() for layer, each in resid.items()}  # inference tensors take no gradient
        for subject, mask in masks.items():

            def predict(codes_WF: Tensor, subject: LoadedSae = subject) -> Tensor:
                changed = batch.replaced(resid[subject.layer], subject.sae.decode(codes_WF))
                return self.model.last_logits(changed, subject.layer, batch.valid)

            mask.step(*self._codes(subject, batch), batch.targets, temperature, predict)

    def _answers(self, batch: PairBatch, subject: LoadedSae, share_F: Tensor, count: int) -> list[str]:
        x_hat_WD = subject.sae.decode(mixed(*self._codes(subject, batch), share_F))
        splice = {subject.layer: lambda resid_WTD: batch.replaced(resid_WTD, x_hat_WD)}
        return decoded(self.model, self.model.complete(batch.tokens, count, batch.valid, splice))

    def _codes(self, subject: LoadedSae, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return self._reading.acts_of(subject, batch.bases), self._reading.acts_of(subject, batch.sources)


def complete(
    model: LanguageModel, prompts: Sequence[Prompt], count: int, batch_size: int, advance: Advance
) -> tuple[list[int], list[str]]:
    """The undisturbed model's answer to each prompt: its first token, and the text."""
    first, answers = [], []
    for start in range(0, len(prompts), batch_size):
        rows = [prompt.tokens for prompt in prompts[start : start + batch_size]]
        tokens, valid = make_rows(model, rows, max(map(len, rows)), "left")
        new = model.complete(tokens.to(model.device), count, valid.to(model.device))
        first += new[:, 0].tolist()
        answers += decoded(model, new)
        advance(len(rows))
    return first, answers


def decoded(model: LanguageModel, tokens_WC: Tensor) -> list[str]:
    """Tokens as text, including special ones."""
    return model.tokenizer.backend.decode_batch(tokens_WC.tolist(), skip_special_tokens=False)
