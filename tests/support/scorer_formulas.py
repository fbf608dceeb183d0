"""The scorers' formulas, written out for one head, one token and one query at a time."""

from __future__ import annotations

import math

import torch

from tests.support.scorer_inputs import Head


def softmax(numbers: list[float]) -> list[float]:
    largest = max(numbers, default=0.0)
    weights = [math.exp(number - largest) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def attention(head: Head, last: int, causal: bool = True) -> list[float]:
    """Mean probability over the last queries and the query group."""
    scores = [0.0] * len(head)
    window = head.queries[-last:]
    for position, group in window:
        seen = [n for n in range(len(head)) if head.positions[n] <= position or not causal]
        for query in group:
            weights = softmax([head.scaling * float(query @ head.keys[n]) for n in seen])
            for n, weight in zip(seen, weights, strict=True):
                scores[n] += weight / len(window) / len(group)
    return scores


def rkv(head: Head, lam=0.1, last=8, kernel=7, threshold=0.5) -> list[float]:
    n = len(head)
    window = head.queries[-last:]
    past = [i for i in range(n) if head.positions[i] < window[0][0]]
    importance = [0.0] * n
    for _, group in window:
        logits = [max(head.scaling * float(q @ head.keys[i]) for q in group) for i in past]
        for i, weight in zip(past, softmax(logits), strict=True):
            importance[i] += weight / len(window)
    half = kernel // 2
    pooled = [max(importance[max(0, i - half) : i + half + 1]) for i in range(n)]
    unit = [key / key.norm() for key in head.keys]
    column = [0.0] * n
    for i in range(n):
        cosine = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)]
        repeats = [j for j in range(n) if cosine[j] > threshold]
        if repeats:
            cosine[repeats[-1]] = 0.0
        column = [total + c / n for total, c in zip(column, cosine, strict=True)]
    redundant = softmax(column)
    return [lam * i - (1 - lam) * r for i, r in zip(pooled, redundant, strict=True)]


def snapkv(head: Head, last=8, kernel=5) -> list[float]:
    raw = attention(head, last)
    first = head.queries[-last:][0][0]
    past = [i for i in range(len(head)) if head.positions[i] < first]
    scores = list(raw)
    for i in past:
        near = [raw[j] for j in past if abs(i - j) <= kernel // 2]
        scores[i] = sum(near) / len(near)
    return scores


def h2o(head: Head, recent_ratio=0.5, decay=1.0, average=False) -> list[float]:
    def seen_by(position: int) -> float:
        return sum(decay**age for age in range(head.length - position)) if average else 1.0

    scores = [
        m / seen_by(p) for m, p in zip(head.cumulative_attention, head.positions, strict=True)
    ]
    recent = math.ceil(recent_ratio * len(head))
    for i in range(len(head) - recent, len(head)):
        scores[i] = math.inf
    return scores


def streaming_llm(head: Head, sinks=4) -> list[float]:
    share = [(position + 1) / head.length for position in head.positions]
    return [3 - s if p < sinks else s for s, p in zip(share, head.positions, strict=True)]


def key_norm(head: Head) -> list[float]:
    return [-math.sqrt(sum(x * x for x in key)) for key in head.keys.tolist()]


def value_norm(head: Head) -> list[float]:
    return [math.sqrt(sum(x * x for x in value)) for value in head.values.tolist()]


def key_diff(head: Head) -> list[float]:
    unit = [key / key.norm() for key in head.keys]
    anchor = sum(unit) / len(unit)
    return [-float(u @ anchor / anchor.norm()) for u in unit]


def lag_kv(head: Head, sinks: int, lag: int) -> list[float]:
    n = len(head)
    share = [(position + 1) / head.length for position in head.positions]
    scores = [4 - s if i < sinks else 1 + s for i, s in enumerate(share)]
    for start in range(sinks, n - 2 * lag + 1, lag):
        here, after = slice(start, start + lag), slice(start + lag, start + 2 * lag)
        unusual = torch.zeros(lag, dtype=torch.float64)
        for states in (head.keys, head.values):
            lowest, highest = states[after].min(0).values, states[after].max(0).values
            scaled = (states[here] - lowest) / (highest - lowest)
            scaled[:, lowest == highest] = 0.0
            unusual += torch.tensor(softmax([float(token.std()) for token in scaled])) / 2
        for place, index in enumerate(unusual.argsort().tolist()):
            scores[start + index] = place / lag
    return scores


def expected_attention(
    head: Head, frequencies: tuple[float, ...], last=128, ahead=512, sinks=4
) -> list[float]:
    """With mean and covariance before RoPE, and the mean of the matrices that turn by it."""
    half = len(frequencies)

    def rotation(position: int) -> torch.Tensor:
        angle = position * torch.tensor(frequencies, dtype=torch.float64)
        made = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
        made[:half, :half] = made[half:, half:] = angle.cos().diag()
        made[:half, half:], made[half:, :half] = -angle.sin().diag(), angle.sin().diag()
        return made

    turn = sum(rotation(head.length + far) for far in range(ahead)) / ahead
    plain = [rotation(at).T @ each.T for at, each in head.queries[-last:] if at >= sinks]
    later = [i for i, at in enumerate(head.positions) if at >= sinks]
    group = head.queries[0][1].shape[0]
    shares = torch.zeros(len(later), dtype=torch.float64)
    for number in range(group):
        rows = torch.stack([each[:, number] for each in plain]) if plain else None
        logits = []
        for key in head.keys[later]:
            if rows is None:
                logits.append(0.0)
                continue
            mean, covariance = turn @ rows.mean(0), turn @ rows.T.cov(correction=0) @ turn.T
            spread = head.scaling**2 * key @ covariance @ key / 2
            logits.append(float(head.scaling * mean @ key + spread))
        shares += torch.tensor(softmax(logits), dtype=torch.float64) / group
    scores = (shares * head.values[later].norm(dim=-1)).tolist()
    return [
        scores[later.index(i)] if i in later else max(scores, default=0.0) for i in range(len(head))
    ]
