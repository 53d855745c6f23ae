"""Asks a model with a cache method what an evaluation asks: how likely a text is, and how it goes on.

The context is the prompt, which a method may compress at its end; the rest is decoded step by step, as it is
in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import measure, reading
from kvjax.method import CacheMethod
from kvjax.sampling import Sampling

__all__ = ["Asked"]

_STEPS = 16  # lengths are multiples of as many, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class Asked:
    """A model and a method, and when it compresses: at a prompt's "end", or after each "chunk"."""

    model: kvjax.Model
    method: CacheMethod
    compress: str = "end"

    def likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-likelihood in nats, and whether greedy decoding takes it.

        The last tokens of a context that is too long are taken.

        Raises:
            ValueError: for an empty context, or a continuation that is empty or fills the model's context.
        """
        lengths = [len(x) for x in continuations]
        if not context or not all(lengths):
            raise ValueError(f"context and continuations are tokens, got {len(context)} and {lengths}")
        size, most = -(-max(lengths) // _STEPS) * _STEPS, self.model.config.context_length
        if size >= most:
            raise ValueError(
                f"a continuation leaves room in the context of {most} tokens, got {max(lengths)}"
            )
        forced = np.full((len(lengths), size), -2, np.int32)
        for row, tokens in zip(forced, continuations, strict=True):
            row[: len(tokens)] = tokens
        ids = reading.pad([self._fitting(context, size)] * len(lengths))
        logits, state = kvjax.prefill(self.model, ids, self.method, room=size, compress=self.compress)
        steps = max(lengths)
        kept = kvjax.decode(self.model, logits, state, self.method, forced, steps=steps, keep_logits=True)[3]
        tokens = jnp.maximum(forced, 0)
        nll, best = np.asarray(measure.nll(kept, tokens)), np.asarray(kept.argmax(-1))
        return [
            (-float(nll[i, :n].sum()), bool((best[i, :n] == forced[i, :n]).all()))
            for i, n in enumerate(lengths)
        ]

    def continued(self, context: Sequence[int], until: Sequence[str], n: int, sampling: Sampling) -> str:
        """Returns what follows a context: n tokens at most, and nothing from the first of `until` on."""
        n = min(n, self.model.config.context_length // 2)
        prompt, tokens, found = [self._fitting(context, n)], [], ""
        how = {"max_new_tokens": n, "sampling": sampling, "compress": self.compress}
        for (token,) in kvjax.stream(self.model, prompt, self.method, **how):
            tokens.append(token)
            found = self.model.tokenizer.decode([t for t in tokens if t not in self.model.tokenizer.stop_ids])
            if ends := [found.find(word) for word in until if word and word in found]:
                return found[: min(ends)]
        return found

    def _fitting(self, context: Sequence[int], room: int) -> list[int]:
        """Returns the last tokens of a context that leave room."""
        return list(context[-(self.model.config.context_length - room) :])
