"""Interventions: which latents belong to the topic, the sweep over settings, and the results of exams under each.

All SAEs share two passes of the model: one for how latents fire, and the exams.

The intervention sets firing latents of the topic to a negative value. SAEBench decodes codes twice, as they are (f) and
clamped (f'), and keeps the error of the first: x' = decode(f') + x - decode(f). A decoder is linear, so this is
x + (f' - f) W_dec, and only the K clamped latents differ. Decoder rows are scaled to length one, and codes with them.
Position 0 (BOS) is encoded as zeros in both, so it stays as it is.

W rows, T tokens, D width, F latents, K clamped latents, N questions.

The questions that an undisturbed model answers correctly are cached between runs, because 24 orders of every question
take longer than all SAEs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....cache_schema import AttentionSpec
from ....train.disk.plain_form import row_lengths
from ...context.disk_cache import decided_by, model_print, remembered
from ...context.loaded_sae import LoadedSae, layers_of, together
from ...model.batches import Sums, Windows, run_windows
from ...model.prefix_suffix import LanguageModel
from ...model.smaller_pieces import PieceSize, in_pieces
from .exams import ChoicePaper, Choose, Exam, Paper, Sheet


@dataclass(frozen=True)
class Sweep:
    """The interventions to try: every combination of these."""

    retain_thresholds: tuple[float, ...] = (0.001, 0.01)
    num_latents: tuple[int, ...] = (10, 20)
    multipliers: tuple[float, ...] = (25, 50, 100, 200)


@dataclass(frozen=True)
class Setting:
    """One intervention: these latents are clamped to -multiplier."""

    retain_threshold: float
    num_latents: int
    multiplier: float
    latents: tuple[int, ...]

    @property
    def essence(self) -> tuple[object, ...]:
        """What it does, however it was chosen; without latents every multiplier does nothing."""
        return (self.latents, self.multiplier) if self.latents else ()


@dataclass(frozen=True)
class Outcome:
    """Answers under a setting, by exam: (right, asked)."""

    setting: Setting
    right: Mapping[str, tuple[int, int]]

    @property
    def shares(self) -> dict[str, float]:
        return {name: right / asked for name, (right, asked) in self.right.items() if asked}

    def accuracy(self, exams: Sequence[str]) -> float:
        """Pooled over exams: every question weighs the same."""
        right, asked = (sum(numbers) for numbers in zip(*(self.right[exam] for exam in exams), strict=True))
        return right / asked


def make_settings(forget_F: np.ndarray, retain_F: np.ndarray, sweep: Sweep) -> list[Setting]:
    """Every combination, in SAEBench's order. There may be fewer topic latents than requested, or none."""
    settings = []
    for threshold in sweep.retain_thresholds:
        ranked = topic_latents(forget_F, retain_F, threshold).tolist()
        settings += [
            Setting(threshold, number, multiplier, tuple(ranked[:number]))
            for number, multiplier in product(sweep.num_latents, sweep.multipliers)
        ]
    return settings


KEPT = 0.99
"""Share of the rest that an intervention must keep to count."""


def unlearning_score(outcomes: Sequence[Outcome], forget: Sequence[str], retain: Sequence[str]) -> float:
    """1 minus the lowest accuracy on the topic among settings that keep at least 99 % of the rest; 0 if none does."""
    return 1.0 - min(outcome.accuracy(forget) if outcome.accuracy(retain) >= KEPT else 1.0 for outcome in outcomes)


def why_zero(outcomes: Sequence[Outcome], retain: Sequence[str]) -> str | None:
    """Why the score is 0 whatever the interventions did to the topic; None if it is not."""
    clamping = [outcome for outcome in outcomes if outcome.setting.latents]
    if not clamping:
        return "0 because no latent fires on the text to forget and rarely enough on the text to retain"
    if all(outcome.accuracy(retain) < KEPT for outcome in clamping):
        return f"0 because no intervention keeps {100 * KEPT:.0f} % of the rest"
    return None


def topic_latents(forget_F: np.ndarray, retain_F: np.ndarray, retain_threshold: float) -> np.ndarray:
    """Latents by descending share on the forget text, without those that never fire there or fire on at least
    `retain_threshold` of the retain tokens. Among equal shares the higher index comes first, as in SAEBench."""
    scores = np.where(retain_F >= retain_threshold, 0.0, forget_F)
    rising = scores.argsort(kind="stable")
    return rising[::-1][: np.count_nonzero(scores)]


CHUNK = 256
"""Questions whose logits are in memory at once."""
Advance = Callable[[int], None]
Answered = tuple[LoadedSae, str, tuple[object, ...]]
"""An SAE, the name of an exam, and the essence of a setting."""


@dataclass(frozen=True, eq=False)
class FiringCounts(Sums):
    fired: Tensor  # int64 [F]
    tokens: int

    @staticmethod
    def of(acts_WTF: Tensor, keep_WT: Tensor) -> FiringCounts:
        """The counts of a batch; special tokens (`keep` is false) do not count."""
        return FiringCounts(((acts_WTF > 0) & keep_WT[..., None]).sum((0, 1)), int(keep_WT.sum()))

    def shares(self) -> np.ndarray:
        """float64 [F]: the share of tokens on which each latent fires, to six decimals.

        SAEBench passes these numbers through a text file with six decimals. That creates ties, and turns latents that
        fire less than once in two million tokens into zeros.
        """
        shares = (self.fired.to(torch.float32) / self.tokens).tolist()
        return np.array([float(f"{share:f}") for share in shares])


@dataclass(frozen=True, eq=False)
class SharedPasses:
    """Passes of one model that all SAEs share. Rows run in smaller batches if memory runs out."""

    model: LanguageModel
    subjects: Sequence[LoadedSae]
    attention: AttentionSpec | None
    batch_size: int
    say: Callable[[str], None]

    def firing_shares(self, rows_WT: Tensor, advance: Advance) -> dict[LoadedSae, np.ndarray]:
        def count(start: int, stop: int) -> list[FiringCounts]:
            tokens_WT = rows_WT[start:stop]
            batch = self._run(tokens_WT, torch.ones_like(tokens_WT, dtype=torch.bool))
            advance(tokens_WT.numel())
            return [FiringCounts.of(subject.encode(batch), batch.keep) for subject in self.subjects]

        size = PieceSize(self.batch_size, "rows", self.say, together(self.subjects))
        parts = list(in_pieces(len(rows_WT), size, count))
        totals = [reduce(add, counts) for counts in zip(*parts, strict=True)]
        return {subject: total.shares() for subject, total in zip(self.subjects, totals, strict=True)}

    def take_exams(
        self, exams: Sequence[Exam], settings: Mapping[LoadedSae, Sequence[Setting]], advance: Advance
    ) -> dict[LoadedSae, list[Outcome]]:
        """Every exam under every setting of every SAE; the layers below an SAE run once for all of them."""
        right = Counter[Answered]()
        for exam in exams:
            for sheet in (sheet.to(self.model.device) for sheet in exam.sheets):
                size = PieceSize(len(sheet.tokens), "rows of an exam", self.say, together(self.subjects))
                for found in in_pieces(len(sheet.tokens), size, partial(self._answer_part, exam, sheet, settings)):
                    right.update(found)
                advance(len(sheet))

        def outcome(subject: LoadedSae, setting: Setting) -> Outcome:
            of_exam = {exam.name: (right[subject, exam.name, setting.essence], len(exam)) for exam in exams}
            return Outcome(setting, of_exam)

        return {subject: [outcome(subject, setting) for setting in settings[subject]] for subject in self.subjects}

    def _run(self, tokens_WT: Tensor, valid_WT: Tensor) -> Windows:
        return run_windows(self.model, tokens_WT, valid_WT, layers_of(self.subjects), self.attention)

    def _answer_part(
        self, exam: Exam, sheet: Sheet, settings: Mapping[LoadedSae, Sequence[Setting]], start: int, stop: int
    ) -> dict[Answered, int]:
        """The right answers of one part, which is tried again in smaller ones if memory runs out."""
        part, right = sheet.part(start, stop), dict[Answered, int]()
        if not len(part):
            return right
        last = part.tokens.new_zeros(len(part.tokens)).scatter_reduce_(0, part.rows, part.positions, "amax")
        valid_WT = torch.arange(part.tokens.shape[1], device=last.device) <= last[:, None]  # nothing is asked after it
        batch = self._run(part.tokens, valid_WT)
        for subject in self.subjects:
            acts_WTF, resid_WTD = subject.encode(batch), batch.resid[subject.layer]
            distinct = {setting.essence: setting for setting in settings[subject]}  # many have the same latents
            for essence, setting in distinct.items():
                latents = list(setting.latents)
                shift_WTD = clamp_shift(acts_WTF[..., latents], subject.sae.W_dec[latents], setting.multiplier)
                changed_WTD = (resid_WTD.to(torch.float32) + shift_WTD).to(resid_WTD.dtype)
                hidden_WTD = self.model.suffix(changed_WTD, subject.layer)
                answers = right_answers(self.model, hidden_WTD, part, exam.choose)
                right[subject, exam.name, essence] = int(answers.sum())
        return right


def clamp_shift(acts_WTK: Tensor, W_dec_KD: Tensor, multiplier: float) -> Tensor:
    """What clamping adds to the residual: [W, T, D]. Each latent then writes -multiplier times its row's direction, at
    any scale of the row."""
    fires, lengths_K = acts_WTK > 0, row_lengths(W_dec_KD)
    fires[:, 0] = False
    change_WTK = torch.where(fires, -multiplier - acts_WTK * lengths_K, torch.zeros_like(acts_WTK))
    return change_WTK @ (W_dec_KD / lengths_K[:, None])


def right_answers(model: LanguageModel, hidden_WTD: Tensor, sheet: Sheet, choose: Choose) -> Tensor:
    """bool [N]: whether the model chooses correctly at each question."""
    asked = hidden_WTD[sheet.rows, sheet.positions].split(CHUNK)
    chosen = torch.cat([choose(model.head(rows)) for rows in asked])
    return chosen == sheet.answers


def known_questions(model: LanguageModel, paper: Paper) -> list[int]:
    """The numbers of the questions that the undisturbed model answers correctly in every order."""
    exam = paper.trial()
    sheets = (sheet.to(model.device) for sheet in exam.sheets)
    right = [right_answers(model, model.hidden(sheet.tokens), sheet, exam.choose).cpu() for sheet in sheets]
    return torch.cat(right).view(-1, paper.orders).all(1).nonzero().view(-1).tolist()


def remembered_questions(model: LanguageModel, paper: Paper, folder: str | Path) -> list[int]:
    """The numbers of the questions that the model knows; cached for multiple choice."""
    if not isinstance(paper, ChoicePaper):
        return known_questions(model, paper)
    questions = [(question.prompt(), question.answer) for question in paper.questions]
    decided = decided_by(model=model_print(model), questions=questions)
    return remembered(folder, paper.name, decided, lambda: known_questions(model, paper))
