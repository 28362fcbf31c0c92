"""Results do not depend on how cells are stored, read, sharded and written."""

import random
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.commands import assert_same, read_result, run_command
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.inference.run import embed, run

STORED_AS = ("csr.h5ad", "csc.h5ad", "dense.h5ad", "csr.zarr", "dense.zarr")
# Each filter keeps at least one cell per file: the first has more than 5 genes, and one is always close to the mean.
FILTERS: tuple[dict[str, float], ...] = ({}, {"min_expressed_genes": 5}, {"filter_outliers": 1.5})


@dataclass(frozen=True)
class Run:
    """One way to embed the same cells."""

    sizes: tuple[int, ...]
    stored_as: tuple[str, ...]
    seed: int
    filters: dict[str, float]
    oom_dataloader: bool
    workers: int
    batch_size: int | str
    tokens_per_batch: int | None
    block_size: int
    ending: str

    def files(self) -> list[anndata.AnnData]:
        """Cells from no genes to more than the model has positions."""
        files = []
        for i, n_cells in enumerate(self.sizes):
            rng = np.random.default_rng([self.seed, i])
            adata = random_adata(n_cells, n_genes=200, density=1.0, seed=self.seed + i)
            share = rng.choice([0.0, 0.02, 0.1, 0.5, 1.0], n_cells)
            share[0] = 0.5
            adata.X = adata.X.multiply(rng.random(adata.shape) < share[:, None]).tocsr()
            adata.obs_names = [f"file{i}-{name}" for name in adata.obs_names]
            adata.obs["depth"] = adata.X.sum(axis=1).A1
            adata.strings_to_categoricals()  # as in a file
            files.append(adata)
        return files

    def write(self, folder: Path) -> list[Path]:
        paths = []
        for i, (adata, stored_as) in enumerate(zip(self.files(), self.stored_as, strict=False)):
            layout, _, ending = stored_as.partition(".")
            adata.X = adata.X.toarray() if layout == "dense" else adata.X.asformat(layout)
            paths.append(folder / f"{i}.{ending}")
            getattr(adata, f"write_{ending}")(paths[-1])
        return paths

    def options(self, folder: Path) -> dict[str, object]:
        return {
            **{f"model.data_config.{key}": value for key, value in self.filters.items()},
            "model.data_config.n_data_workers": self.workers,
            "model.data_config.block_size": self.block_size,
            "model.inference_config.oom_dataloader": self.oom_dataloader,
            "model.inference_config.batch_size": self.batch_size,
            "model.inference_config.tokens_per_batch": self.tokens_per_batch,
            "model.inference_config.output_path": str(folder),
            "model.inference_config.output_filename": f"embeddings.{self.ending}",
            **FIXED,
        }

    def expected(self) -> anndata.AnnData:
        """The cells in memory, one at a time."""
        filters = {f"model.data_config.{key}": value for key, value in self.filters.items()}
        config = load_config(CHECKPOINT, {**filters, **FIXED, "model.inference_config.batch_size": 1})
        return embed(self.files(), load_checkpoint(CHECKPOINT, config))


FIXED: dict[str, object] = {
    "model.inference_config.precision": "32",
    "model.inference_config.device": "cpu",
    "model.inference_config.output_keys": ["embeddings", "llh"],
}

ZARR_V2 = "ignore:Writing zarr v2 data will no longer be the default"
GENERATE = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking would take minutes

RUNS = st.builds(
    Run,
    sizes=st.one_of(st.tuples(st.integers(1, 20)), st.tuples(*[st.integers(1, 9)] * 3)),
    stored_as=st.tuples(*[st.sampled_from(STORED_AS)] * 3),
    seed=st.integers(0, 2**16),
    filters=st.sampled_from(FILTERS),
    oom_dataloader=st.booleans(),
    workers=st.sampled_from([0, 0, 0, 2]),  # rarely workers, which are slow to start
    batch_size=st.one_of(st.integers(1, 9), st.just("auto")),
    tokens_per_batch=st.sampled_from([None, 1, 300]),
    block_size=st.integers(1, 30),
    ending=st.sampled_from(["h5ad", "zarr"]),
).filter(lambda way: max(way.sizes) > 1 or "filter_outliers" not in way.filters)


def check(way: Run) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        written = run(way.write(folder), CHECKPOINT, load_config(CHECKPOINT, way.options(folder)))
        assert written is not None
        assert_same(read_result(written), way.expected())
        assert not list(folder.glob("*.parts"))


@settings(max_examples=8, phases=GENERATE)
@given(way=RUNS)
@pytest.mark.filterwarnings(ZARR_V2)
def test_the_result_does_not_depend_on_how_cells_are_processed(way: Run) -> None:
    check(way)


@pytest.mark.slow
@settings(max_examples=120, phases=GENERATE)
@given(way=RUNS)
@pytest.mark.filterwarnings(ZARR_V2)
def test_the_result_is_the_same_in_many_more_ways(way: Run) -> None:
    check(way)


@pytest.mark.slow
@pytest.mark.filterwarnings(ZARR_V2)
@pytest.mark.parametrize("seed", range(4))
def test_the_result_is_the_same_if_killed_and_resumed(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    n_files = rng.choice([1, 3])
    way = Run(
        sizes=(600 // n_files,) * n_files,
        stored_as=tuple(rng.choice(STORED_AS) for _ in range(n_files)),
        seed=seed,
        filters=rng.choice(FILTERS),
        oom_dataloader=rng.choice([True, False]),
        workers=rng.choice([0, 2]),
        batch_size=rng.randint(1, 3),
        tokens_per_batch=None,
        block_size=rng.choice([10, 100]),
        ending=rng.choice(["h5ad", "zarr"]),
    )
    options: list[object] = [part for path in way.write(tmp_path) for part in ("--data-file", path)]
    for key, value in way.options(tmp_path).items():
        text = f"[{','.join(value)}]" if isinstance(value, list) else "null" if value is None else value
        options += ["--config-override", f"{key}={text}"]
    options += ["--num-gpus", 1 + seed % 2]  # on a CPU: processes
    done = run_command(*options, kill_after=rng.uniform(6, 25))
    if done.returncode == -signal.SIGKILL:
        done = run_command(*options, "--resume", kill_after=rng.uniform(8, 20))
    if done.returncode == -signal.SIGKILL:
        done = run_command(*options, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same(read_result(tmp_path / f"embeddings.{way.ending}"), way.expected())
    assert not list(tmp_path.glob("*.parts"))
