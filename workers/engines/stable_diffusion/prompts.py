"""Prompts as the UNet reads them: a catalogue has a handful, so they are kept."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from workers.engines.stable_diffusion.components import Components

log = logging.getLogger(__name__)

CACHE_SIZE = 256  # of 77 x 1024 float16: 40 MB


class PromptEncoder:
    """Text to embeddings, least recently used ones forgotten first. For one thread."""

    def __init__(
        self,
        components: Components,
        *,
        cache_size: int = CACHE_SIZE,
        before_encode: Callable[[], None] = lambda: None,
    ) -> None:
        """before: called each time the text encoder is about to run."""
        self._components = components
        self._before_encode = before_encode
        self._cache_size = cache_size
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, text: str) -> Tensor:
        """(1, tokens, embedding) in the model's dtype, on its device.

        What does not fit the text encoder is cut off, with a warning once while kept.
        """
        if text not in self._embeddings:
            self._embeddings[text] = self._encode(text)
            if len(self._embeddings) > self._cache_size:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(text)
        return self._embeddings[text]

    def _encode(self, text: str) -> Tensor:
        self._before_encode()
        tokenizer, encoder = self._components.tokenizer, self._components.text_encoder
        # A tokenizer without its tokenizer_config.json names no length, so to say 10**30.
        longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(
            text, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        if len(tokenizer(text).input_ids) > longest:
            log.warning("prompt cut off after %d tokens: %.80r...", longest, text)
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self._components.device)
        ids = tokens.input_ids.to(self._components.device)
        embeddings: Tensor = encoder(ids, attention_mask=mask)[0]
        return embeddings.to(self._components.dtype)
