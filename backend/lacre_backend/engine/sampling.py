"""Samples each sequence's next token from the step's logits.

numpy handles greedy sampling, and temperature with top-p and min-p. llama.cpp's sampler chain handles penalties, seeds and
top-k. Both see only the tokens that the sequence's grammar allows.

Rules:
- Both follow llama.cpp's order: bias, penalties, top-k, top-p, min-p, temperature.
- Logprobs are the model's, before penalties, bias and temperature.
- The grammar comes first: no bias or penalty can make a forbidden token available.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any, Final

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from lacre_backend.engine.context import Logits
from lacre_backend.engine.masks import Constraint
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import Alternative, EngineError, Sampling

# llama_token_data as a numpy type.
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_BLOCK: Final = 256
_LEAST_TEMPERATURE: Final = 1e-5  # below it, a lead of one thousandth of a logit is certainty anyway
_SEEDS: Final = 2**32 - 1  # llama.cpp draws its own seed for 2**32 - 1


class Candidates:
    """The rows that llama.cpp's samplers cut and sort: one buffer, filled from the logits before each use."""

    def __init__(self, size: int) -> None:
        self._rows = np.zeros(size, dtype=_CANDIDATE)
        self.array = L.llama_token_data_array()

    def fill(self, ids: NDArray[np.int32], logits: Logits) -> None:
        n = len(ids)
        self._rows["id"][:n] = ids
        self._rows["logit"][:n] = logits
        self.array.data = ctypes.cast(self._rows.ctypes.data, L.llama_token_data_p)  # type: ignore[assignment]  # stub says Array
        self.array.size = n
        self.array.selected = -1
        self.array.sorted = False

    def apply(self, sampler: Any) -> None:
        L.llama_sampler_apply(sampler, ctypes.byref(self.array))

    def chosen(self) -> int:
        if self.array.selected < 0:
            raise EngineError("No token was chosen.")
        return int(self.array.data[self.array.selected].id)


class Sampler:
    """The state of one sequence's sampling. Any thread creates it; then only the engine's thread uses it until `close`."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        max_tokens: int,
        constraint: Constraint | None = None,
        given: Sequence[int] = (),
    ) -> None:
        """given: the tokens to return in place of sampled ones; empty: samples."""
        self._closed = False
        self.given = iter(given) if given else None
        self._chain: Any = None
        self.constraint = constraint
        self.sampling = sampling
        penalised = sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        drawn = sampling.temperature > 0 and (sampling.seed is not None or sampling.top_k > 0)
        self.plain = not penalised and not drawn
        self.bias: tuple[NDArray[np.int32], Logits] | None = None
        if self.plain:
            if sampling.logit_bias:
                tokens, values = zip(*sampling.logit_bias.items(), strict=True)
                self.bias = np.array(tokens, dtype=np.int32), np.array(values, dtype=np.float32)
            return
        self._n_vocab = model.n_vocab
        self._candidates = Candidates(model.n_vocab) if constraint is not None else None
        self._chain = _chain([*_stages(model, sampling, max_tokens), *_choice(sampling)])

    def sample(self, context: Any, row: int | None, logits: Logits) -> int:
        """The next token from the chain. logits: one row. row: its index in the last batch; None if in an earlier one."""
        if self.constraint is None and row is not None:
            return int(L.llama_sampler_sample(self._chain, context, row))
        allowed = np.arange(self._n_vocab) if self.constraint is None else np.flatnonzero(self.constraint.allowed())
        if len(allowed) == 0:
            raise _nothing_left()
        ids = allowed.astype(np.int32)
        candidates = self._candidates or Candidates(self._n_vocab)
        candidates.fill(ids, logits[ids])
        candidates.apply(self._chain)
        token = candidates.chosen()
        L.llama_sampler_accept(self._chain, token)
        return token

    def masked(self, logits: Logits) -> Logits:
        """The logits with minus infinity for forbidden tokens. Raises `EngineError` if no token is left."""
        if self.constraint is None:
            return logits
        left = np.where(self.constraint.allowed(), logits, np.float32(-np.inf))
        if left.max() == -np.inf:
            raise _nothing_left()
        return left

    def ready(self, seconds: float) -> bool:
        """Whether the next token can be sampled, after at most this many seconds: a mask thread computes its mask."""
        return self.constraint is None or self.constraint.ready or self.constraint.wait(max(seconds, 0))

    def begin(self, tokens: Sequence[int]) -> None:
        """Counts these tokens as sampled, for the penalties."""
        if self._chain is not None:
            for token in tokens:
                L.llama_sampler_accept(self._chain, token)

    def accept(self, token: int) -> None:
        """Adds `token` to an answer that continues: advances the grammar."""
        if self.constraint is not None:
            self.constraint.accept(token)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._chain is not None:
            L.llama_sampler_free(self._chain)
        if self.constraint is not None:
            self.constraint.close()


def choose(
    samplers: Sequence[Sampler], context: Any, rows: Sequence[int | None], logits: Logits, random: np.random.Generator
) -> list[int | EngineError]:
    """A token or an error for each sequence. rows: the index of its output in the last batch; None if it is not there. logits:
    a row for each; unchanged afterwards.
    """
    biased = [(i, *sampler.bias) for i, sampler in enumerate(samplers) if sampler.bias is not None]
    before = [logits[i, ids] for i, ids, _ in biased]
    for i, ids, values in biased:
        logits[i, ids] += values
    try:
        greedy = any(s.plain and s.constraint is None and s.sampling.temperature == 0 for s in samplers)
        best = logits.argmax(axis=1) if greedy else None
        tokens: list[int | EngineError] = []
        for i, sampler in enumerate(samplers):
            if sampler.given is not None:
                tokens.append(next(sampler.given))
            elif best is not None and sampler.plain and sampler.constraint is None and sampler.sampling.temperature == 0:
                tokens.append(int(best[i]))
            else:
                tokens.append(_chosen(sampler, context, rows[i], logits[i], random))
        return tokens
    finally:
        for (i, ids, _), old in zip(biased, before, strict=True):
            logits[i, ids] = old


def _chosen(sampler: Sampler, context: Any, row: int | None, logits: Logits, random: np.random.Generator) -> int | EngineError:
    """One sequence's token. An error of one sequence must not fail the others' step."""
    try:
        if not sampler.plain:
            return sampler.sample(context, row, logits)
        left = sampler.masked(logits)
        if sampler.sampling.temperature == 0:
            return int(left.argmax())
        return draw(left, sampler.sampling, float(random.random()))
    except EngineError as error:
        return error


def _nothing_left() -> EngineError:
    return EngineError("The grammar leaves no token to choose.")


def draw(logits: Logits, sampling: Sampling, uniform: float) -> int:
    """Samples a token by temperature, top-p and min-p. uniform: from [0, 1)."""
    shifted = logits - logits.max()
    temperature = max(sampling.temperature, _LEAST_TEMPERATURE)
    if sampling.top_p >= 1 and sampling.min_p <= 0:
        return _pick(np.exp(shifted / np.float32(temperature)), uniform)
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    # All tokens below this floor together weigh less than top-p excludes, so none of them is in the nucleus.
    floor = max(sampling.min_p, (1 - sampling.top_p) * total / len(weights) if sampling.top_p < 1 else 0.0)
    kept = np.flatnonzero(weights >= min(floor, 1.0))
    kept = kept[np.argsort(-weights[kept], kind="stable")]
    if sampling.top_p < 1:
        within = np.cumsum(weights[kept], dtype=np.float64)
        kept = kept[: int(np.searchsorted(within, sampling.top_p * total)) + 1]
    kept = kept[weights[kept] >= sampling.min_p]
    return int(kept[_pick(np.exp(shifted[kept] / np.float32(temperature)), uniform)])


def _pick(weights: Logits, uniform: float) -> int:
    """An index with probability by weight. It picks the block first, then the place in it, which avoids a long exact sum."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    target = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    before = sums[block - 1] if block else 0.0
    within = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    place = min(int(np.searchsorted(within, target - before, side="right")), len(within) - 1)
    while weights[starts[block] + place] == 0 and place > 0:  # rounding put the target past the last positive weight
        place -= 1
    return int(starts[block]) + place


def _stages(model: Model, sampling: Sampling, max_tokens: int) -> list[Any]:
    """The stages that change the logits before the choice, in llama.cpp's order."""
    stages = []
    if sampling.logit_bias:
        bias = (L.llama_logit_bias * len(sampling.logit_bias))(
            *(L.llama_logit_bias(token, value) for token, value in sampling.logit_bias.items())
        )
        stages.append(L.llama_sampler_init_logit_bias(model.n_vocab, len(bias), bias))
    if sampling.repeat_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
        stages.append(
            L.llama_sampler_init_penalties(
                model.n_vocab, max_tokens, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
            )
        )
    return stages


def _choice(sampling: Sampling) -> list[Any]:
    if sampling.temperature == 0:
        return [L.llama_sampler_init_greedy()]
    stages = []
    if sampling.top_k > 0:
        stages.append(L.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        stages.append(L.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        stages.append(L.llama_sampler_init_min_p(sampling.min_p, 1))
    seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed % _SEEDS
    return [*stages, L.llama_sampler_init_temp(sampling.temperature), L.llama_sampler_init_dist(seed)]


def _chain(stages: list[Any]) -> Any:
    params = L.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = L.llama_sampler_chain_init(params)
    for stage in stages:
        L.llama_sampler_chain_add(chain, stage)  # the chain owns its stages from here
    return chain


def logprob(model: Model, logits: Logits, token: int, k: int) -> tuple[float, tuple[Alternative, ...]]:
    """The natural log-probability of `token`, and the `k` most likely tokens, best first."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    if k == 0:
        return float(logits[token]) - total, ()
    top = np.argpartition(logits, -k)[-k:]
    top = top[np.argsort(-logits[top], kind="stable")]
    return float(logits[token]) - total, tuple(Alternative(int(i), model.piece(int(i)), float(logits[i]) - total) for i in top)
