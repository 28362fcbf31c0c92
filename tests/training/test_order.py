"""The order of training: every cell once per epoch, determined by the seed."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcriptformer.errors import DataError
from transcriptformer.training.order import Blocks, Epochs


def make_epochs(
    n_cells: Sequence[int] = (1000, 333),
    weights: Sequence[float] | None = None,
    mask: np.ndarray | None = None,
    block_size: int = 16,
    n_streams: int = 4,
    window_size: int = 48,
    batch_size: int = 32,
    seed: int = 0,
) -> Epochs:
    is_training = np.ones(sum(n_cells), bool) if mask is None else mask
    blocks = Blocks(n_cells, is_training, block_size)
    return Epochs(blocks, weights or [1.0] * len(n_cells), n_streams, window_size, batch_size, seed)


def rows_of_stream(epochs: Epochs, epoch: int, stream: int) -> np.ndarray:
    """Return the cells of a stream in training order."""
    n_cells = int(epochs.cells_of_steps(epoch, stream)[-1])
    windows = range(epochs.window_of(stream, 0), epochs.window_of(stream, n_cells - 1) + 1)
    rows, n_before = [], 0
    for number in windows:
        start, order, pieces = epochs.window(epoch, stream, number)
        assert start == n_before
        rows.append(np.concatenate([piece.rows for piece in pieces])[order])
        n_before += len(order)
    return np.concatenate(rows)


def rows_of_epoch(epochs: Epochs, epoch: int) -> np.ndarray:
    return np.concatenate([rows_of_stream(epochs, epoch, stream) for stream in range(epochs.n_streams)])


@given(
    n_cells=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    block_size=st.integers(1, 50),
    n_streams=st.integers(1, 7),
    window_size=st.integers(1, 90),
    extra=st.integers(0, 40),
    seed=st.integers(0, 3),
)
@settings(max_examples=60)
def test_every_training_cell_occurs_once_per_epoch(
    n_cells: list[int], block_size: int, n_streams: int, window_size: int, extra: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random(sum(n_cells)) < 0.7
    if mask.sum() < n_streams:
        return
    epochs = make_epochs(n_cells, None, mask, block_size, n_streams, window_size, n_streams + extra, seed)
    for epoch in range(2):
        assert sorted(rows_of_epoch(epochs, epoch)) == np.flatnonzero(mask).tolist()


@given(n_cells=st.integers(8, 500), n_streams=st.integers(1, 8), batch_size=st.integers(8, 64))
def test_every_step_has_a_cell_of_every_stream_and_at_most_batch_size_cells(
    n_cells: int, n_streams: int, batch_size: int
) -> None:
    epochs = make_epochs([n_cells], n_streams=n_streams, batch_size=batch_size)
    per_step = np.sum([np.diff(epochs.cells_of_steps(0, stream)) for stream in range(n_streams)], axis=0)
    assert len(per_step) == epochs.n_steps(0)
    assert per_step.sum() == n_cells
    for stream in range(n_streams):
        assert np.diff(epochs.cells_of_steps(0, stream)).min() >= 1
    assert per_step.max() - per_step.min() <= 1
    if n_cells // n_streams >= -(-n_cells // batch_size):  # else every stream would not have a cell in every step
        assert per_step.max() <= batch_size


def test_the_order_depends_on_the_epoch_and_the_seed() -> None:
    first, again, other = make_epochs(seed=0), make_epochs(seed=0), make_epochs(seed=1)
    assert rows_of_epoch(first, 0).tolist() == rows_of_epoch(again, 0).tolist()
    assert rows_of_epoch(first, 0).tolist() != rows_of_epoch(first, 1).tolist()
    assert rows_of_epoch(first, 0).tolist() != rows_of_epoch(other, 0).tolist()


def test_cells_of_a_piece_are_consecutive_in_their_source() -> None:
    mask = np.random.default_rng(0).random(1333) < 0.9
    epochs = make_epochs(mask=mask)
    for stream in range(4):
        _, _, pieces = epochs.window(0, stream, 1)
        for piece in pieces:
            assert piece.cells[-1] - piece.cells[0] < 16
            assert piece.cells[0] // 16 == piece.cells[-1] // 16
            np.testing.assert_array_equal(piece.rows, piece.cells + (0 if piece.source == 0 else 1000))
            assert mask[piece.rows].all()


def test_fractions_of_a_source_add_up_to_whole_passes() -> None:
    epochs = make_epochs((160, 320), weights=[0.25, 1.5])
    visits = np.zeros(480, int)
    for epoch in range(4):
        np.add.at(visits, rows_of_epoch(epochs, epoch), 1)
        assert visits[:160].max() <= 1
    assert visits[:160].tolist() == [1] * 160
    assert visits[160:].tolist() == [6] * 320


def test_a_step_is_located_in_its_epoch() -> None:
    epochs = make_epochs((100,), batch_size=10)
    assert epochs.n_steps(0) == 10
    assert [epochs.locate(step) for step in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]


def test_genes_are_reshuffled_at_every_visit() -> None:
    epochs = make_epochs()
    seeds = [piece.seed for epoch in range(3) for piece in epochs.window(epoch, 0, 1)[2]]
    assert len(set(seeds)) == len(seeds)


def test_fewer_cells_than_streams_are_refused() -> None:
    with pytest.raises(DataError, match=r"an epoch has 3 training cells, fewer than training\.streams=4"):
        make_epochs((3,)).n_steps(0)
