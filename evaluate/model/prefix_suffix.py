"""A causal language model in the parts that evaluations run: prefix, suffix, head.

Prefix followed by suffix is the whole model to the bit. Full windows share one mask and the harvest's function, so that
a stored residual is exactly what the model computes here; a padded batch has a mask for each row.

W windows, T positions, D residual width, V vocabulary, N rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...cache_schema.sites import RESID, Site
from ...harvest.errors import UNREADABLE, HarvestError
from ...harvest.model.architectures import NoPositions, architecture_of, require_parts
from ...harvest.model.attention import ATTENTION, Sinks, register_attention
from ...harvest.model.fused_on_gpu import fuse
from ...harvest.model.hooks import kept, tapped
from ...harvest.model.load_and_truncate import ModelFacts, find_weights, names_in_files, read_config, without_report
from ...harvest.model.products_in_16_bits import widen_products
from ...harvest.model.tokenizer import TextEncoder, load_tokenizer, make_encoder
from ..errors import MemoryTooSmall, ModelMissing, NotApplicable, WidthMismatch
from .smaller_pieces import is_out_of_memory

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class LanguageModel:
    """A model in memory that can be cut after any layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TextEncoder | None,
        eos: int | None,
        pad: int | None,
        obstacle: str = "",
    ) -> None:
        register_attention()
        self.facts = ModelFacts.of(model.config)
        self._architecture = architecture_of(self.facts.model_type)
        widen_products(model)
        fuse(model, self._architecture.norm)
        self.model: Any = model.eval().requires_grad_(False)
        self.stack: Any = model.base_model
        self.stack.set_attn_implementation(ATTENTION)
        self.dtype: torch.dtype = model.dtype
        self.encoder, self._obstacle = tokenizer, obstacle
        self.eos = eos
        self.pad = pad if pad is not None else (eos if eos is not None else 0)
        require_parts(self.stack, self._architecture)
        self._unembed: Any = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        return self._unembed.weight.device

    @property
    def tokenizer(self) -> TextEncoder:
        if self.encoder is None:
            raise ModelMissing(self._obstacle)
        return self.encoder

    @property
    def bos(self) -> int:
        return self.tokenizer.bos_token

    def token_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, after BOS."""
        return [[self.bos, *ids] for ids in self.tokenizer.encode(texts)]

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that stand for no text: BOS, EOS, padding and others that the tokenizer reserves."""
        reserved = self.encoder.special_tokens if self.encoder is not None else ()
        ends = self.model.config.eos_token_id  # some models have several
        found = {*reserved, self.eos, self.pad, self.model.config.bos_token_id}
        found |= {*ends} if isinstance(ends, list) else {ends}
        return tuple(sorted(token for token in found if token is not None))

    @torch.inference_mode()
    def resid(
        self,
        tokens_WT: Tensor,
        layers: Sequence[int],
        valid_WT: Tensor | None = None,
        sinks: Sinks | None = None,
    ) -> dict[int, Tensor]:
        """The residual after each of `layers`; nothing above the highest is run.

        `sinks` are given the attention probabilities [w, H, T, T] of their layers, block by block.
        """
        wanted: list[int] = [*layers, *(sinks or {})]
        if max(wanted) >= self.facts.num_layers:
            raise WidthMismatch(
                f"expected a layer below {self.facts.num_layers}, the model's number of layers, found {max(wanted)}"
            )
        self._require_positions(tokens_WT.shape[1])
        stack = self._part(0, max(wanted) + 1, normed=False)
        sites = [Site(RESID, layer) for layer in layers]
        with kept(self.stack, self.facts.model_type, sites) as found:
            stack(input_ids=tokens_WT, use_cache=False, sinks=sinks or {}, **_padding(valid_WT))
        return {site.layer: resid for site, resid in found.items()}

    @torch.inference_mode()
    def suffix(self, resid_WTD: Tensor, layer: int, valid_WT: Tensor | None = None) -> Tensor:
        """[W, T, D] after the final norm, from the residual after `layer`."""
        stack = self._part(layer + 1, self.facts.num_layers, normed=True)
        return stack(inputs_embeds=resid_WTD.to(self.dtype), use_cache=False, **_padding(valid_WT)).last_hidden_state

    @torch.inference_mode()
    def hidden(self, tokens_WT: Tensor) -> Tensor:
        """[W, T, D] after the final norm, from tokens."""
        self._require_positions(tokens_WT.shape[1])
        return self.stack(input_ids=tokens_WT, use_cache=False).last_hidden_state

    def tapped(self, taps: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> AbstractContextManager[None]:
        """While this is active, the functions read or replace the activations at these sites."""
        return tapped(self.stack, self.facts.model_type, taps)

    @torch.inference_mode()
    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the model's dtype, soft-capped if the model does so."""
        logits_NV = self._unembed(hidden_ND)
        if self._softcap is not None:
            logits_NV.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits_NV

    def last_logits(self, resid_WTD: Tensor, layer: int, valid_WT: Tensor | None = None) -> Tensor:
        """Logits [W, V] of the last position, from the residual after `layer` and with a gradient to it."""
        with torch.enable_grad():
            stack = self._part(layer + 1, self.facts.num_layers, normed=True)
            out = stack(inputs_embeds=resid_WTD.to(self.dtype), use_cache=False, **_padding(valid_WT))
            logits_WV = self._unembed(out.last_hidden_state[:, -1])
            return logits_WV if self._softcap is None else torch.tanh(logits_WV / self._softcap) * self._softcap

    @torch.inference_mode()
    def attention(self, resid_WTD: Tensor, layer: int, sink: Callable[[Tensor], None] | None = None) -> Tensor:
        """The residual after layer + 1, from that after `layer`; `sink` is given its attention probabilities."""
        stack = self._part(layer + 1, layer + 2, normed=False)
        sinks = {} if sink is None else {layer + 1: sink}
        return stack(inputs_embeds=resid_WTD.to(self.dtype), use_cache=False, sinks=sinks).last_hidden_state

    @torch.inference_mode()
    def complete(
        self,
        tokens_WT: Tensor,
        count: int,
        valid_WT: Tensor,
        splice: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The next `count` tokens [W, count], greedily, with cached keys and values. The splice, which replaces the
        residuals after some layers, acts on the prompt alone."""
        from transformers import DynamicCache

        self._require_positions(tokens_WT.shape[1] + count)
        # transformers 5.24 renamed it, and a forward pass ignores names that it does not know.
        name = "cache" if "cache" in inspect.signature(self.stack.forward).parameters else "past_key_values"
        cache = {name: DynamicCache(config=self.stack.config)}
        positions = (valid_WT.long().cumsum(dim=1) - 1).clamp_min(0)
        with self.tapped({Site(RESID, layer): change for layer, change in (splice or {}).items()}):
            new = [self._next(tokens_WT, valid_WT, positions, cache)]
        for number in range(1, count):
            valid_WT = torch.cat([valid_WT, valid_WT.new_ones(len(valid_WT), 1)], dim=1)
            new.append(self._next(new[-1], valid_WT, positions[:, -1:] + number, cache))
        return torch.cat(new, dim=1)

    def _require_positions(self, length: int) -> None:
        """Require positions for `length` tokens: a table of learned ones has an end."""
        if self._architecture.positions and length > self.facts.max_context:
            raise NotApplicable(
                f"expected texts of at most {self.facts.max_context} tokens, the model's positions, found {length}: "
                "ask for shorter ones"
            )

    def _next(
        self, tokens_WT: Tensor, valid_WT: Tensor, positions_WT: Tensor, cache: Mapping[str, DynamicCache]
    ) -> Tensor:
        """The most likely next token [W, 1] of each row."""
        out = self.stack(
            input_ids=tokens_WT,
            attention_mask=valid_WT.long(),
            position_ids=positions_WT,
            use_cache=True,
            **cache,
        )
        return self.head(out.last_hidden_state[:, -1]).argmax(dim=-1, keepdim=True)

    def _part(self, start: int, stop: int, normed: bool) -> Any:
        """The stack with the layers start..stop alone; weights are shared, nothing is copied."""
        part = copy.copy(self.stack)
        part._modules = dict(self.stack._modules)
        part.config = copy.copy(self.stack.config)
        setattr(part, self._architecture.layers, self._architecture.layers_of(self.stack)[start:stop])
        if start > 0 and self._architecture.positions:
            setattr(part, self._architecture.positions, NoPositions())
        if getattr(part.config, "layer_types", None):
            part.config.layer_types = part.config.layer_types[start:stop]
        part.config.num_hidden_layers = stop - start
        if not normed:
            setattr(part, self._architecture.final_norm, nn.Identity())
        return part


def load_language_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    from transformers import AutoModelForCausalLM  # here: it takes seconds to import

    try:
        config = read_config(folder)  # refuses types that only downloaded code could run
    except HarvestError as error:
        raise ModelMissing(str(error)) from error
    if not find_weights(folder):
        raise ModelMissing(f"{folder}: expected complete safetensors weights; fetch the model again")
    register_attention()
    with _room_for(folder):
        try:
            with without_report():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype,
                    attn_implementation=ATTENTION,
                    use_safetensors=True,
                    output_loading_info=True,
                    **names_in_files(config, "model."),
                )
        except (SafetensorError, MemoryError, *UNREADABLE) as error:
            if is_out_of_memory(error):
                raise
            raise ModelMissing(f"{folder}: the model cannot be loaded ({error}); fetch it again") from error
        model, report = loaded[0].to(device), loaded[1]
    if report["missing_keys"]:
        raise ModelMissing(
            f"{folder}: weights are missing ({sorted(report['missing_keys'])[0]} first); fetch the model again"
        )
    return make_language_model(model, folder)


@contextmanager
def _room_for(folder: Path) -> Iterator[None]:
    """Raise MemoryTooSmall if memory runs out, whether the host's or the device's."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryTooSmall(
                f"{folder}: the model does not fit into memory; free some, or try --device cpu"
            ) from error
        raise


def make_language_model(model: PreTrainedModel, folder: Path) -> LanguageModel:
    """A model in memory, with the tokenizer of its folder if there is one."""
    try:
        tokenizer = load_tokenizer(folder)
        encoder = make_encoder(tokenizer, str(folder))
        return LanguageModel(model, encoder, tokenizer.eos_token_id, tokenizer.pad_token_id)
    except HarvestError as error:  # reported when text is needed: activations need none
        eos = model.config.eos_token_id  # the configuration also says which tokens are special
        return LanguageModel(
            model, None, eos if isinstance(eos, int) else None, model.config.pad_token_id, obstacle=str(error)
        )


def _padding(valid_WT: Tensor | None) -> dict[str, Tensor]:
    """Mask and positions of a padded batch. Padding on the right needs neither: nothing looks ahead."""
    if valid_WT is None or bool(valid_WT[:, 0].all()):
        return {}
    positions = (valid_WT.long().cumsum(dim=1) - 1).clamp_min(0)
    return {"attention_mask": valid_WT.long(), "position_ids": positions}
