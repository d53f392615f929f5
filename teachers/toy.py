"""What each access to a teacher is worth, on one whose probabilities are known: `python train.py experiment=toy`.

The teacher is t_i ~ 1/i over V tokens, the same at every position. For each access: what a student that fits its targets
perfectly would say, and how much a target varies from draw to draw, by the very function that training uses. R positions.
"""

import torch
from rich.console import Console
from rich.table import Table

from teachers.access import ACCESS_KINDS, TeacherOutput, to_sparse_targets
from teachers.cache import CacheSpec

V, K, N, R = 100_000, 20, 12, 20_000


def zipf(size: int = V) -> torch.Tensor:
    """[V] probabilities, the likeliest first."""
    weights = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    return weights / weights.sum()


def measure(
    kind: str, t: torch.Tensor, generator: torch.Generator, rows: int = R
) -> tuple[torch.Tensor, float]:
    """The mean target [V] of an access, unnormalised, and its variance (the sum over tokens) at one position."""
    size = len(t)
    access = ACCESS_KINDS[kind]
    if access.entries == "all":
        rows = 1  # the same at every position
    ids = torch.arange(access.num_entries(K, size)).expand(rows, -1)
    n = access.num_draws(N)
    draws = None
    labels = torch.multinomial(t, len(ids), True, generator=generator)
    if access.draws == "any":
        draws = torch.multinomial(t, rows * n, True, generator=generator).view(rows, n)
    if access.draws == "tail":
        draws = K + torch.multinomial(t[K:], rows * n, True, generator=generator).view(rows, n)
    output = TeacherOutput(ids, t[ids].log().float(), None, draws)
    found, log_weights, _ = to_sparse_targets(kind, output, labels)
    slots, weights = found.clamp(min=0), torch.where(found < 0, 0.0, log_weights.double().exp())
    mean = torch.zeros(size, dtype=torch.float64).index_add_(
        0, slots.flatten(), weights.flatten()
    ) / len(found)
    same = (
        (slots[:, :, None] == slots[:, None, :]).double() if slots.shape[1] < 100 else None
    )  # a token drawn twice adds up
    square = (
        weights.square().sum()
        if same is None
        else torch.einsum("rj,rjk,rk->", weights, same, weights)
    ) / len(found)
    return mean, max(0.0, (square - mean.square().sum()).item()) if len(found) > 1 else 0.0


SHOWN = (  # access, tail, what a perfect student is
    ("greedy", "", "biased: all on one token"),
    ("text", "", "unbiased"),
    ("sampled", "", "unbiased"),
    ("topk", "ghost", "head and tail's mass exact, its shape free"),
    ("topk", "smooth", "head and tail's mass exact, its shape flat"),
    ("topk", "truncate", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize_both", "only ratios inside the top k; the rest is not identified"),
    ("residual_to_label", "", "biased: the head 2-M too high, the tail 1-M too low"),
    ("unbiased", "", "unbiased"),
    ("stratified", "", "unbiased, the least variance a byte"),
    ("full", "", "exact"),
)


def rows(t: torch.Tensor) -> list[dict]:
    """A row for each of SHOWN: p_1, p_2 and the mass off the top K of the perfect student, variance, bytes a token."""
    generator, table = torch.Generator().manual_seed(0), []
    measured = {kind: measure(kind, t, generator) for kind in ACCESS_KINDS}
    for kind, tail, note in SHOWN:
        mean, variance = measured[kind]
        p = (
            t
            if tail in ("ghost", "smooth")
            else t * float("nan")
            if tail == "renormalize_both"
            else mean / mean.sum()
        )
        row = {
            "access": kind,
            "tail": tail,
            "p_1": float(p[0]),
            "p_2": float(p[1]),
            "off": float(1 - p[:K].sum()),
        }
        size = CacheSpec(kind, len(t), 1, {"train": 1}, "", "", "", K, N).row.itemsize
        table.append(row | {"variance": variance, "bytes": size, "note": note})
    return table


def show() -> None:
    t = zipf()
    truth = f"p_1 = {t[0]:.4f}, p_2 = {t[1]:.4f}, off the top k {1 - t[:K].sum():.4f}"
    title = f"A teacher with t_i ~ 1/i, V={V:,}, k={K}, n={N}: {truth}; {R:,} positions"
    table = Table(title=title, title_justify="left")
    for head in (
        "access",
        "tail",
        "p_1",
        "p_2",
        "off top k",
        "variance",
        "bytes a token",
        "a perfect student is",
    ):
        table.add_column(
            head, justify="left" if head in ("access", "tail", "a perfect student is") else "right"
        )
    for row in rows(t):
        shown = [
            "" if value != value else f"{value:.4f}"
            for value in (row["p_1"], row["p_2"], row["off"], row["variance"])
        ]
        table.add_row(row["access"], row["tail"], *shown, f"{row['bytes']:,}", row["note"])
    Console(width=150).print(table)
