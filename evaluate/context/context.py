"""The context of an evaluation: the store, the language model behind it, the device, and the progress display."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from ...cache_schema import Manifest, Store
from ...cache_schema.massive_activations import Massive, default_multiple, measure_massive
from ...cache_schema.sites import Place, site_of
from ...harvest.errors import HarvestError
from ...harvest.model.load_and_truncate import read_facts
from ...harvest.model.resolve import POCKET, Choice, ModelSource, fetch, fetch_recorded
from ...harvest.model.tokenizer import TextEncoder, load_encoder
from ...harvest.progress import Watch
from ..errors import DataMissing, MemoryTooSmall, ModelMissing
from ..model.prefix_suffix import LanguageModel, load_language_model
from ..model.unembedding_head import Head, load_head


@dataclass(eq=False)
class Context:
    """What all evaluations of one store share. The model is loaded when it is first needed."""

    opened: Store | None
    model_name: str | None = None
    """A folder, `pocket` or an id given by the user; None: the model that the store names."""
    dtype_name: Literal["bfloat16", "float16", "float32"] | None = None
    """None: the store's, or bfloat16 without a store."""
    from_tokens: bool = False
    """Run the whole model from tokens, even if the store's residuals would do."""
    massive_norms: float | Literal["store's"] | None = "store's"
    """Rows whose norm is beyond this multiple of their layer's median are left out; None: every row counts."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch = field(default_factory=Watch)
    model_identity: str | None = None
    """Id and revision of the loaded model."""
    _massive: dict[Place, Massive] = field(default_factory=dict)
    _source: ModelSource | None = None
    _model: LanguageModel | None = None
    _obstacle: ModelMissing | None = None
    _no_room: str | None = None
    """Why the model does not fit: text only, as the error would keep the loaded weights in memory."""

    @property
    def store(self) -> Store:
        if self.opened is None:
            raise DataMissing("this evaluation reads activations from a store: give --cache")
        return self.opened

    @property
    def manifest(self) -> Manifest:
        return self.store.manifest

    @property
    def without_tokens(self) -> str | None:
        """What to do about a store imported without tokens, so that those it holds are made up; None: they are real."""
        if self.opened is None or self.manifest.corpus.settings.get("tokens") is not False:
            return None
        return (
            f"{self.store.url} was imported without tokens: import it into another folder with --tokens FILE, and give "
            "that folder with --cache"
        )

    @property
    def massive_multiple(self) -> float | None:
        """The multiple that is in effect; None: every row counts."""
        if self.massive_norms == "store's":
            return default_multiple(self.manifest)
        return self.massive_norms

    def massive(self, layer: Place) -> Massive | None:
        """The massive rows of a layer; None if every row counts, or the store does not hold the layer."""
        if self.massive_multiple is None or site_of(layer) not in self.manifest.sites:
            return None
        if layer not in self._massive:
            self._massive[layer] = measure_massive(self.store, layer, self.massive_multiple)
        return self._massive[layer]

    @property
    def dtype(self) -> torch.dtype:
        """The model's; by default the store's, so that a stored residual is exactly what the model computes."""
        name = self.dtype_name or (self.opened.manifest.model.dtype if self.opened else "bfloat16")
        return getattr(torch, name)

    @property
    def model(self) -> LanguageModel:
        """The whole language model. If it does not load, raises the same ModelMissing or MemoryTooSmall each time."""
        if self._no_room is not None:
            raise MemoryTooSmall(self._no_room)
        if self._model is None:
            source = self._find_source()
            self.say(f"loading {source.id} in {str(self.dtype).removeprefix('torch.')}")
            try:
                self._model = load_language_model(source.folder, self.dtype, self.device)
            except ModelMissing as error:
                self._obstacle = error
                raise
            except MemoryTooSmall as error:
                self._no_room = str(error)
                raise
            self.model_identity = f"{source.id}@{source.revision}"
        return self._model

    def require_model(self) -> None:
        """Load the model now, so that ModelMissing is raised here if it cannot be loaded."""
        _ = self.model

    def why_no_model(self) -> str | None:
        """Load the model now; why it cannot be loaded, or None."""
        try:
            self.require_model()
        except ModelMissing as error:
            return str(error)
        return None

    @property
    def head(self) -> Head:
        """The model's final norm and unembedding, in float32 whatever the model runs in; nothing else is loaded.

        Raises ModelMissing if there are none."""
        return load_head(self._find_source().folder, self.device)

    @property
    def tokenizer(self) -> TextEncoder:
        """The model's tokenizer; no weights are loaded. Raises ModelMissing if it cannot be loaded."""
        if self._model is not None:
            return self._model.tokenizer
        try:
            return load_encoder(self._find_source().folder)
        except HarvestError as error:
            raise ModelMissing(str(error)) from error

    def _find_source(self) -> ModelSource:
        """The model's files. Raises the same error each time if they are missing."""
        if self._obstacle is not None:
            raise self._obstacle
        if self._source is None:
            manifest = self.opened.manifest if self.opened else None
            try:
                self._source = find_model(manifest, self.model_name)
                if manifest is not None:
                    require_same_shape(self._source.folder, manifest)
            except ModelMissing as error:
                self._obstacle = error
                raise
        return self._source

    @cached_property
    def folder_revision(self) -> str | None:
        """A digest of the model in a folder that the user named, where no store says which model it is: the folder may
        hold another one next time. None without such a folder, or if it holds no model."""
        is_known = self.opened is not None and self.opened.manifest.model.revision is not None
        if self.model_name is None or is_known or not Path(self.model_name).expanduser().is_dir():
            return None
        try:
            return self._find_source().revision
        except ModelMissing:
            return None

    @property
    def name_of_model(self) -> str:
        """As results give it; empty if neither the user nor a store names a model."""
        return self.model_name or (self.opened.manifest.model.id if self.opened else "")

    @property
    def is_pocket(self) -> bool:
        """Whether the model is the one that comes with this package: evaluations then use data made locally."""
        return self.name_of_model == POCKET

    def takes_library(self, data: str) -> bool:
        """Whether an evaluation's setting `data` means text of this Python's standard library."""
        return data == "stdlib" or (data == "auto" and self.is_pocket)

    def say(self, text: str) -> None:
        self.watch.say(text)


def find_model(manifest: Manifest | None, override: str | None) -> ModelSource:
    """The files of the model that a store was made with, down to the revision."""
    if manifest is None and override is None:
        raise ModelMissing("no store and no model: give --cache or --model")
    try:
        return fetch(Choice(override or "")) if manifest is None else fetch_recorded(manifest.model, override)
    except HarvestError as error:
        raise ModelMissing(f"{error}. Or give its folder with --model") from error


def require_same_shape(folder: Path, manifest: Manifest) -> None:
    """Refuse a model whose width or depth cannot have made the store, which may record no revision."""
    try:
        facts = read_facts(folder)
    except HarvestError as error:
        raise ModelMissing(str(error)) from error
    if facts.d_model != manifest.model.d_model or max(manifest.layers, default=0) >= facts.num_layers:
        raise ModelMissing(
            f"the store holds layers {list(manifest.layers)} of width {manifest.model.d_model}, "
            f"the model has {facts.num_layers} layers of width {facts.d_model}: it is not the one that made the store. "
            "Give that one with --model"
        )
