"""Text from a Hugging Face model: the greedy continuation of a prompt, by transformers' own `generate`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, TextStreamer

from maskllm.errors import MaskLLMError
from maskllm.families.model_config import check_vocabulary
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import context_of, load_hf_model, load_hf_tokenizer, quiet_transformers, usable_device

_SPELLING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True)
class Continuation:
    """A prompt and the text that a model adds to it."""

    prompt: str
    text: str
    """What follows the prompt, without special tokens."""
    new_tokens: int
    """The tokens of `text`, and the end-of-sequence token if the model gave one."""


class TextGenerator:
    """A causal language model with its tokenizer, as transformers loads both."""

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a local directory or hub id.

        Args:
            dtype: as `maskllm.huggingface.loading.load_hf_model` has it.
            device: the default is the GPU if there is one.
            trust_remote_code: allow code from the model's directory.

        Raises MaskLLMError if model or tokenizer cannot be loaded, or the device cannot be used.
        """
        self.directory = find_source(model)
        device = usable_device(device)
        self.tokenizer = load_hf_tokenizer(self.directory, trust_remote_code=trust_remote_code)
        self.model = load_hf_model(self.directory, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        # Greedy, with nothing that the model's generation_config.json asks for but the tokens that end a text.
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if isinstance(ends, list) else ends
        )

    def continue_text(self, prompt: str, max_new_tokens: int, *, stream: bool = False) -> Continuation:
        """Continue `prompt` as plain text, without a chat template: each token is the model's most probable one.

        The text ends after `max_new_tokens`, with the model's end-of-sequence token, or where the model's context ends. `stream` prints
        prompt and text to standard output while they come, and then a line break.

        Raises MaskLLMError if the prompt has no tokens, tokens of another vocabulary, or as many as the context.
        """
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise MaskLLMError(f"--prompt {prompt!r}: is not UTF-8")
        tokens = self.tokenizer(prompt, return_tensors="pt").input_ids.long()  # float if empty
        length = tokens.shape[1]
        if length == 0:
            raise MaskLLMError(f"--prompt {prompt!r}: has no tokens; wanted a text to continue")
        check_vocabulary(tokens, self.model.get_input_embeddings().num_embeddings, f"{self.directory}'s tokenizer")
        context = context_of(self.model.config)
        if context is not None:
            if length >= context:
                raise MaskLLMError(f"--prompt: has {length} tokens; the model has a context of {context}, so wanted fewer")
            max_new_tokens = min(max_new_tokens, context - length)
        streamer = TextStreamer(self.tokenizer, **_SPELLING) if stream else None
        tokens = tokens.to(self.model.device)
        with quiet_transformers():
            (found,) = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, streamer=streamer
            )
        # Spell the whole text: a SentencePiece tokenizer drops the space before the first word that it spells.
        before, whole = (self.tokenizer.decode(ids, **_SPELLING) for ids in (found[:length], found))
        return Continuation(prompt, whole[len(before) :], len(found) - length)
