"""Prompt embeddings, cached: the jobs of a catalogue share a handful of prompts."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from workers.engines.stable_diffusion.components import Components

log = logging.getLogger(__name__)

CACHE_SIZE = 256  # embeddings; of 77 x 1024 float16 they take 40 MB


class PromptEncoder:
    """Encodes prompts with the text encoder and an LRU cache. For one thread."""

    def __init__(
        self,
        components: Components,
        *,
        cache_size: int = CACHE_SIZE,
        before_encode: Callable[[], None] = lambda: None,
    ) -> None:
        """before_encode: called each time the text encoder is about to run."""
        self._components = components
        self._before_encode = before_encode
        self._cache_size = cache_size
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompt: str) -> Tensor:
        """Return (1, tokens, embedding) in the model's dtype, on its device.

        A prompt longer than the text encoder reads is truncated; each encoding logs a warning.
        """
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self._encode(prompt)
            if len(self._embeddings) > self._cache_size:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

    def _encode(self, prompt: str) -> Tensor:
        self._before_encode()
        tokenizer, encoder = self._components.tokenizer, self._components.text_encoder
        # Without tokenizer_config.json, transformers sets model_max_length to 10**30.
        max_tokens = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(
            prompt,
            padding="max_length",
            max_length=max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        if len(tokenizer(prompt).input_ids) > max_tokens:
            log.warning("prompt truncated to %d tokens: %.80r...", max_tokens, prompt)
        attention_mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            attention_mask = tokens.attention_mask.to(self._components.device)
        token_ids = tokens.input_ids.to(self._components.device)
        embeddings: Tensor = encoder(token_ids, attention_mask=attention_mask)[0]
        return embeddings.to(self._components.dtype)
