"""MEASURES.md says of every number what it is, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from saemill import evaluate
from saemill.evaluate.evals import attention, examples, position, temporal, tiers

TEXT = (Path(evaluate.__file__).parent / "MEASURES.md").read_text()
CONFIGS = {
    "tiers": tiers.Config(windows=8, trace_windows=8, batch_windows=8),
    "position": position.Config(windows=16, batch_windows=8, least_firings=3, probe_k=(2,), probe_tokens=6),
    "temporal": temporal.Config(windows=8, batch_windows=8, least_firings=3),
    "attention": attention.Config(windows=8, batch_windows=8),
    "examples": examples.Config(windows=8, batch_windows=8),
}
MODULES = {"tiers": tiers, "position": position, "temporal": temporal, "attention": attention, "examples": examples}


def documented(name: str) -> dict[str, re.Pattern]:
    """`group.metric` as it is written, and the names that it stands for."""
    section = TEXT.split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (`.*?`) \|", section, re.MULTILINE)
    written = [f"{group}.{metric}" for group, cell in rows for metric in re.findall(r"`(\w+)`", cell)]
    return {
        metric: re.compile(re.sub(r"_(t|u|l|k)(?=_|$)", r"_\\d+", metric.replace(".", r"\."))) for metric in written
    }


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_tables_are_what_is_written(name, make_world, builder, open_context):
    long = torch.randint(3, builder.VOCAB, (40, 24), generator=torch.Generator().manual_seed(0))
    long[:, 0] = 2
    subject = builder.subject(builder.make_sae(k=None))
    subject.sae.extras_tensors = {"composition.C2": torch.ones(8, 8), "composition.C3": torch.ones(8, 8)}
    (result,) = MODULES[name].evaluate(open_context(make_world(tokens=long)), [subject], CONFIGS[name])
    found = {f"{group}.{metric}" for group, values in result.metrics.items() for metric in values}
    patterns = documented(name)
    assert not [metric for metric in found if not any(p.fullmatch(metric) for p in patterns.values())]
    assert not [row for row, p in patterns.items() if not any(map(p.fullmatch, found))]
